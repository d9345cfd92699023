#include "base/bounded_queue.h"

#include <memory>
#include <thread>

#include "catch2/catch.hpp"

namespace gloam {
namespace {

TEST_CASE("TryPush refuses when full and leaves the item with its owner") {
  BoundedQueue<std::unique_ptr<int>> queue(2);
  REQUIRE(queue.TryPush(std::make_unique<int>(1)));
  REQUIRE(queue.TryPush(std::make_unique<int>(2)));
  auto third = std::make_unique<int>(3);
  REQUIRE_FALSE(queue.TryPush(std::move(third)));
  REQUIRE(third != nullptr);
  auto items = queue.TakeAll();
  REQUIRE(items.size() == 2);
  REQUIRE(*items[0] == 1);
  REQUIRE(*items[1] == 2);
  REQUIRE(queue.TryPush(std::move(third)));
}

TEST_CASE("WaitAndTakeAll ends on an item and on Wake") {
  BoundedQueue<int> queue(4);
  std::thread producer([&] { REQUIRE(queue.TryPush(7)); });
  auto items = queue.WaitAndTakeAll(std::chrono::seconds(60));
  producer.join();
  REQUIRE(items.size() == 1);
  queue.Wake();
  REQUIRE(queue.WaitAndTakeAll(std::chrono::seconds(60)).empty());
}

}  // namespace
}  // namespace gloam
