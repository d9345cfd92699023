// Rows of random logits and parameters for the tests of sampling.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/ops.h"

namespace gloam::cuda {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Rows of logits and what each asks for, with the lists that SampleRow points to.
struct Batch {
  explicit Batch(int64_t vocab_size, int64_t stride = 0)
      : vocab_size(vocab_size), stride(stride == 0 ? vocab_size : stride) {}

  struct Lists {
    std::vector<int32_t> prompt, banned;
    std::vector<std::pair<int32_t, int32_t>> counts;
    std::vector<std::pair<int32_t, float>> bias;
    std::vector<uint32_t> allowed;
  };

  void Add(const std::vector<float>& row_logits, const SampleRow& row,
           std::shared_ptr<Lists> row_lists = nullptr) {
    REQUIRE(static_cast<int64_t>(row_logits.size()) == vocab_size);
    logits.insert(logits.end(), row_logits.begin(), row_logits.end());
    logits.resize(logits.size() + (stride - vocab_size), kNan);
    rows.push_back(row);
    lists.push_back(row_lists);
    if (row_lists == nullptr) return;
    rows.back().prompt_tokens = row_lists->prompt;
    rows.back().banned_tokens = row_lists->banned;
    rows.back().output_counts = row_lists->counts;
    rows.back().logit_bias = row_lists->bias;
    rows.back().allowed = row_lists->allowed.empty() ? nullptr : row_lists->allowed.data();
  }

  int64_t num_rows() const { return static_cast<int64_t>(rows.size()); }
  const float* Row(int64_t row) const { return &logits[row * stride]; }
  TensorView View(float* data, Device device) const {
    TensorView view = TensorView::Contiguous(data, DType::kF32, device, {num_rows(), vocab_size});
    view.strides[0] = stride;
    return view;
  }

  int64_t vocab_size;
  int64_t stride;
  std::vector<float> logits;
  std::vector<SampleRow> rows;
  std::vector<std::shared_ptr<Lists>> lists;
};

inline std::vector<float> NormalLogits(int64_t vocab_size, std::mt19937& rng, float scale) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> logits(vocab_size);
  for (float& logit : logits) logit = normal(rng);
  return logits;
}

template <typename T>
T OneOf(std::mt19937& rng, const std::vector<T>& values) {
  return values[rng() % values.size()];
}

// A row of random kind: smooth, with many ties, peaked, flat, or with holes.
inline std::vector<float> RandomLogits(int64_t vocab_size, std::mt19937& rng) {
  std::vector<float> logits =
      NormalLogits(vocab_size, rng, OneOf<float>(rng, {0.01f, 1, 2, 5, 30}));
  switch (rng() % 6) {
    case 0:
      for (float& x : logits) x = std::round(x * 4) / 4;
      break;
    case 1:
      for (int i = 0; i < 5; ++i) logits[rng() % vocab_size] += 20;
      break;
    case 2:
      for (float& x : logits) {
        if (rng() % 3 == 0) x = -kInfinity;
      }
      break;
    case 3:
      logits[rng() % vocab_size] = OneOf<float>(rng, {kNan, kInfinity, -kInfinity, 1e30f, -0.0f});
      break;
    default:
      break;
  }
  return logits;
}

inline SampleRow RandomRow(std::mt19937& rng) {
  SampleRow row;
  row.temperature = OneOf<float>(rng, {0, 0.01f, 0.3f, 0.7f, 1, 1, 1.3f, 2, 50, 1e30f, 1e-30f});
  row.top_k = OneOf<int>(rng, {0, 0, 0, 1, 2, 7, 50, 300, 2000, 1 << 20});
  row.top_p = OneOf<float>(rng, {1, 1, 1, 0.99f, 0.95f, 0.9f, 0.5f, 0.1f, 0, 0.9999999f});
  row.min_p = OneOf<float>(rng, {0, 0, 0, 0.001f, 0.05f, 0.5f, 1});
  row.seed = rng() | uint64_t{rng()} << 32;
  row.draw_index = rng() % 3 == 0 ? rng() : rng() % 100;
  row.num_logprobs = OneOf<int>(rng, {-1, -1, -1, 0, 1, 5, 20, 300});
  return row;
}

inline std::shared_ptr<Batch::Lists> RandomLists(int64_t vocab_size, std::mt19937& rng,
                                                 SampleRow& row) {
  auto lists = std::make_shared<Batch::Lists>();
  const auto token = [&] { return static_cast<int32_t>(rng() % vocab_size); };
  const auto maybe = [&] { return rng() % 2 == 0; };
  if (maybe()) {
    row.repetition_penalty = OneOf<float>(rng, {1.1f, 0.8f, 2});
    for (size_t i = rng() % 2000; i > 0; --i) lists->prompt.push_back(token());
  }
  if (maybe()) {
    row.frequency_penalty = OneOf<float>(rng, {0, 0.1f, -0.5f, 2});
    row.presence_penalty = OneOf<float>(rng, {0, 0.3f, -1});
  }
  if (maybe()) {
    std::vector<int32_t> tokens;
    for (size_t i = rng() % 300; i > 0; --i) tokens.push_back(token());
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
    std::shuffle(tokens.begin(), tokens.end(), rng);
    for (const int32_t t : tokens) lists->counts.emplace_back(t, static_cast<int>(rng() % 9));
  }
  if (maybe()) {
    for (size_t i = rng() % 300; i > 0; --i) {
      lists->bias.emplace_back(token(), OneOf<float>(rng, {-100, -1, 0.5f, 3, 100}));
    }
  }
  if (maybe()) {
    for (size_t i = rng() % 8; i > 0; --i) lists->banned.push_back(token());
  }
  if (maybe()) {
    lists->allowed.assign((vocab_size + 31) / 32, 0);
    switch (rng() % 4) {
      case 0: {  // one token
        const int32_t only = token();
        lists->allowed[only / 32] |= 1u << (only % 32);
        break;
      }
      case 1:  // none
        break;
      default:
        for (uint32_t& word : lists->allowed) word = rng();
    }
  }
  return lists;
}

}  // namespace gloam::cuda
