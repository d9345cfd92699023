// CountedBody: a Beast body that is read into a string without trusting the announced length, and
// whose bytes count against a budget that all connections share.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <utility>

#include "boost/asio/buffer.hpp"
#include "boost/beast/core/buffers_range.hpp"
#include "boost/beast/http/error.hpp"
#include "boost/beast/http/message.hpp"
#include "boost/optional.hpp"

namespace gloam {

// A string whose growth is counted in `*budget_used`, until it is destroyed.
class CountedString {
 public:
  CountedString() = default;
  CountedString(CountedString&& other) noexcept
      : used_(std::exchange(other.used_, nullptr)),
        counted_(std::exchange(other.counted_, 0)),
        limit_(other.limit_),
        text_(std::move(other.text_)) {}
  CountedString& operator=(CountedString&& other) noexcept {
    CountedString taken(std::move(other));
    std::swap(used_, taken.used_);
    std::swap(counted_, taken.counted_);
    std::swap(limit_, taken.limit_);
    std::swap(text_, taken.text_);
    return *this;
  }
  ~CountedString() {
    if (used_ != nullptr) used_->fetch_sub(counted_);
  }

  void SetBudget(std::atomic<int64_t>* used, int64_t limit) {
    used_ = used;
    limit_ = limit;
  }

  // False when the budget is spent.
  bool Append(const void* data, size_t size) {
    const auto bytes = static_cast<int64_t>(size);
    if (used_ != nullptr) {
      if (used_->fetch_add(bytes) + bytes > limit_) {
        used_->fetch_sub(bytes);
        return false;
      }
      counted_ += bytes;
    }
    text_.append(static_cast<const char*>(data), size);
    return true;
  }

  std::string& text() { return text_; }

 private:
  std::atomic<int64_t>* used_ = nullptr;
  int64_t counted_ = 0;
  int64_t limit_ = 0;
  std::string text_;
};

struct CountedBody {
  using value_type = CountedString;

  class reader {
   public:
    template <bool is_request, class Fields>
    reader(boost::beast::http::header<is_request, Fields>&, value_type& body) : body_(body) {}

    void init(const boost::optional<uint64_t>&, boost::beast::error_code& error) { error = {}; }

    template <class ConstBufferSequence>
    size_t put(const ConstBufferSequence& buffers, boost::beast::error_code& error) {
      error = {};
      size_t taken = 0;
      for (const auto buffer : boost::beast::buffers_range_ref(buffers)) {
        if (!body_.Append(buffer.data(), buffer.size())) {
          error = boost::beast::http::error::buffer_overflow;
          return taken;
        }
        taken += buffer.size();
      }
      return taken;
    }

    void finish(boost::beast::error_code& error) { error = {}; }

   private:
    value_type& body_;
  };
};

}  // namespace gloam
