#include "engine/kv_cache_pool.h"

#include "catch2/catch.hpp"
#include "tests/engine/fake_model.h"

namespace gloam {
namespace {

// Two layers, one head of two channels: a block takes 2 x 2 x 16 x 2 elements.
constexpr int64_t kBytesPerBlock = 2 * 2 * 16 * 2 * 2;

std::string ErrorOf(const EngineOptions& options, StatusCode code) {
  const StatusOr<KvPlan> plan = PlanKvCache(options, testing::FakeModel().config());
  REQUIRE_FALSE(plan.ok());
  CHECK(plan.status().code() == code);
  return MessageOf(plan.status());
}

TEST_CASE("the number of blocks comes from the flag or from the memory") {
  const testing::FakeModel model;
  EngineOptions options;
  options.kv_cache_bytes = 100 * kBytesPerBlock + 1;
  KvPlan plan = PlanKvCache(options, model.config()).value();
  CHECK(plan.bytes_per_block == kBytesPerBlock);
  CHECK(plan.num_blocks == 100);
  CHECK(plan.max_model_len == 1024);
  options.num_kv_blocks = 65;
  options.kv_cache_dtype = DType::kF32;
  plan = PlanKvCache(options, model.config()).value();
  CHECK(plan.num_blocks == 65);
  CHECK(plan.bytes_per_block == 2 * kBytesPerBlock);
}

TEST_CASE("a context that nobody asked for is lowered; one that was is refused") {
  EngineOptions options;
  options.num_kv_blocks = 10;
  CHECK(PlanKvCache(options, testing::FakeModel().config())->max_model_len == 160);
  options.max_model_len = 160;
  CHECK(PlanKvCache(options, testing::FakeModel().config())->max_model_len == 160);
  options.max_model_len = 161;
  const std::string message = ErrorOf(options, StatusCode::kResourceExhausted);
  CHECK(message.find("--max-model-len to 160") != std::string::npos);
  CHECK(message.find("--kv-cache-memory to 2816") != std::string::npos);
}

TEST_CASE("impossible options are named") {
  EngineOptions options;
  options.kv_cache_bytes = kBytesPerBlock - 1;
  CHECK(ErrorOf(options, StatusCode::kResourceExhausted).find("256 bytes") != std::string::npos);
  options = {};
  options.max_model_len = 1025;
  CHECK(ErrorOf(options, StatusCode::kInvalidArgument).find("[1, 1024]") != std::string::npos);
  options = {};
  options.kv_cache_dtype = DType::kI32;
  CHECK(ErrorOf(options, StatusCode::kInvalidArgument).find("--kv-cache-dtype") !=
        std::string::npos);
}

TEST_CASE("every layer has memory of its own") {
  testing::FakeOps ops;
  EngineOptions options;
  options.num_kv_blocks = 70;
  const KvPlan plan = PlanKvCache(options, testing::FakeModel().config()).value();
  const KvCachePool pool = KvCachePool::Create(ops, plan, 2).value();
  REQUIRE(pool.layers().size() == 2);
  CHECK(pool.layers()[0].num_blocks == 70);
  CHECK(pool.layers()[0].data != pool.layers()[1].data);
  CHECK(ops.num_bytes_allocated == 70 * kBytesPerBlock);
}

}  // namespace
}  // namespace gloam
