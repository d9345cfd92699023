// What tests of selectors select from: a random context with sidecars and a query, and masks of
// candidates.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/cpu/bf16.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/float16.h"
#include "kernels/selector.h"

namespace gloam::cpu {

inline constexpr uint32_t kSeed = 20261123;
inline constexpr double kNotGiven = std::numeric_limits<double>::quiet_NaN();
inline constexpr int kNumLabels = 8;

struct Shape {
  DType dtype = DType::kBF16;
  int num_kv_heads = 2;
  int num_heads = 3;  // of a KV head's group
  int head_dim = 32;
  int length = 100;
};

using KeyOf = std::function<float(int64_t token, int channel, std::mt19937& rng)>;

inline float Normal(std::mt19937& rng) { return std::normal_distribution<float>()(rng); }

// One sequence in randomly placed blocks, with ranges and labels, and a query for its last token.
class Context {
 public:
  Context(const Shape& shape, std::mt19937& rng, const KeyOf& key_of = {})
      : shape_(shape), num_blocks_((shape.length - 1) / kBlockTokens) {
    kv_.layout = {shape.dtype, shape.num_kv_heads, shape.head_dim};
    kv_.num_blocks = num_blocks_ + 3;
    cache_.resize(static_cast<size_t>(kv_.layout.block_bytes() * kv_.num_blocks));
    kv_.data = cache_.data();
    table_.resize(static_cast<size_t>(kv_.num_blocks));
    std::iota(table_.begin(), table_.end(), 0);
    std::shuffle(table_.begin(), table_.end(), rng);
    for (int64_t token = 0; token < shape.length; ++token) {
      for (int head = 0; head < shape.num_kv_heads; ++head) {
        for (int c = 0; c < shape.head_dim; ++c) {
          WriteKey(token, head, c, key_of ? key_of(token, c, rng) : Normal(rng));
        }
      }
    }
    queries_.resize(static_cast<size_t>(shape.num_heads * shape.head_dim));
    for (float& q : queries_) q = 2 * Normal(rng);
    MakeSidecars(rng);
  }

  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const Shape& shape() const { return shape_; }
  int64_t num_blocks() const { return num_blocks_; }
  int num_open() const { return static_cast<int>(shape_.length - num_blocks_ * kBlockTokens); }
  const std::shared_ptr<ChannelTable>& channels() const { return channels_; }
  float query(int head, int channel) const { return queries_[head * shape_.head_dim + channel]; }
  const float* queries() const { return queries_.data(); }

  float Key(int64_t token, int head, int channel) const {
    const int64_t at = KeyIndex(token, head, channel);
    switch (shape_.dtype) {
      case DType::kBF16:
        return FloatFromBf16(reinterpret_cast<const uint16_t*>(cache_.data())[at]);
      case DType::kF16:
        return F16ToF32(reinterpret_cast<const uint16_t*>(cache_.data())[at]);
      default:
        return reinterpret_cast<const float*>(cache_.data())[at];
    }
  }

  KeyBlocks Keys(int kv_head) const {
    KeyBlocks keys;
    keys.kv = kv_;
    keys.sidecars = sidecars_;
    keys.block_table = table_.data();
    keys.num_blocks = num_blocks_;
    keys.kv_head = kv_head;
    return keys;
  }

  // query . key over the channels with include[channel], or all of them.
  double Logit(int64_t token, int kv_head, int head, const std::vector<bool>& include = {}) const {
    double sum = 0;
    for (int c = 0; c < shape_.head_dim; ++c) {
      if (include.empty() || include[c]) {
        sum += static_cast<double>(query(head, c)) * static_cast<double>(Key(token, kv_head, c));
      }
    }
    return sum;
  }

  // Sum of |query| * |key| over the channels: what rounding errors are measured in.
  double Magnitude(int64_t token, int kv_head, int head) const {
    double sum = 0;
    for (int c = 0; c < shape_.head_dim; ++c) {
      sum += std::fabs(static_cast<double>(query(head, c)) * Key(token, kv_head, c));
    }
    return sum;
  }

 private:
  int64_t KeyIndex(int64_t token, int head, int channel) const {
    return table_[token / kBlockTokens] * kv_.layout.block_elements() +
           head * kv_.layout.head_run_elements() + token % kBlockTokens * shape_.head_dim + channel;
  }

  void WriteKey(int64_t token, int head, int channel, float value) {
    const int64_t at = KeyIndex(token, head, channel);
    switch (shape_.dtype) {
      case DType::kBF16:
        reinterpret_cast<uint16_t*>(cache_.data())[at] = Bf16FromFloat(value);
        break;
      case DType::kF16:
        reinterpret_cast<uint16_t*>(cache_.data())[at] = F32ToF16(value);
        break;
      default:
        reinterpret_cast<float*>(cache_.data())[at] = value;
    }
  }

  // Those of the full blocks, as one step that appends the whole sequence makes them.
  void MakeSidecars(std::mt19937& rng) {
    channels_ = std::make_shared<ChannelTable>();
    channels_->num_layers = 1;
    channels_->num_kv_heads = shape_.num_kv_heads;
    channels_->num_channels = kNumLabels;
    std::vector<int16_t> order(static_cast<size_t>(shape_.head_dim));
    std::iota(order.begin(), order.end(), int16_t{0});
    for (int head = 0; head < shape_.num_kv_heads; ++head) {
      std::shuffle(order.begin(), order.end(), rng);
      channels_->channels.insert(channels_->channels.end(), order.begin(),
                                 order.begin() + kNumLabels);
    }
    config_.ranges = true;
    config_.label_bits = 4;
    config_.label_channels = channels_;
    sidecars_.config = &config_;
    sidecars_.num_kv_heads = shape_.num_kv_heads;
    sidecars_.num_blocks = kv_.num_blocks;
    for (int i = 0; i < kNumSidecarKinds; ++i) {
      const int64_t bytes = SidecarBytes(static_cast<SidecarKind>(i), config_, kv_.layout);
      memory_[i].resize(static_cast<size_t>(bytes * shape_.num_kv_heads * kv_.num_blocks) + 64);
      sidecars_.head_bytes[i] = bytes;
      const auto address = reinterpret_cast<uintptr_t>(memory_[i].data());
      sidecars_.data[i] = memory_[i].data() + (64 - address % 64) % 64;
    }

    std::vector<int32_t> positions(static_cast<size_t>(shape_.length));
    std::iota(positions.begin(), positions.end(), 0);
    std::vector<int64_t> slots;
    for (const int32_t position : positions) {
      slots.push_back(int64_t{table_[position / kBlockTokens]} * kBlockTokens +
                      position % kBlockTokens);
    }
    const int32_t cu_seqlens[] = {0, shape_.length};
    UpdateSidecarsParams params;
    params.batch.num_seqs = 1;
    params.batch.num_tokens = shape_.length;
    params.batch.max_blocks_per_seq = static_cast<int>(table_.size());
    params.batch.positions = positions.data();
    params.batch.slot_mapping = slots.data();
    params.batch.cu_seqlens = cu_seqlens;
    params.batch.context_lens = &shape_.length;
    params.batch.block_tables = table_.data();
    params.kv = kv_;
    params.sidecars = sidecars_;
    ThreadPool pool(1);
    UpdateSidecars(params, pool);
  }

  Shape shape_;
  int64_t num_blocks_;
  KvLayerView kv_;
  std::vector<std::byte> cache_;
  std::vector<int32_t> table_;
  std::vector<float> queries_;
  std::shared_ptr<ChannelTable> channels_;
  SidecarConfig config_;
  SidecarLayerView sidecars_;
  std::array<std::vector<std::byte>, kNumSidecarKinds> memory_;
};

// A configuration as the policy reader makes it: `given` keys, defaults for the others.
inline SelectorConfig ConfigOf(const std::string& name, const std::map<std::string, double>& given,
                               const Context* context = nullptr, std::vector<int> layers = {}) {
  SelectorConfig config;
  config.selector = FindSelector(name);
  REQUIRE(config.selector != nullptr);
  size_t num_used = 0;
  for (const NumberKey& key : config.selector->number_keys()) {
    const auto found = given.find(std::string(key.name));
    num_used += found != given.end();
    config.numbers.push_back(found != given.end()           ? found->second
                             : key.use == KeyUse::kOptional ? key.default_value
                                                            : kNotGiven);
  }
  REQUIRE(num_used == given.size());
  config.layers = std::move(layers);
  if (config.selector->channel_file_keys() != nullptr) config.channels = context->channels();
  return config;
}

// Masks of the heads of one KV head's group.
struct Selection {
  std::vector<TokenMask> masks;
  bool remember = false;
};

inline Selection SelectFrom(const Context& context, const SelectorConfig& config, int kv_head,
                            std::vector<TokenMask> candidates, int layer = 0,
                            std::span<const TokenMask> remembered = {}) {
  const Shape& shape = context.shape();
  std::vector<float> scratch(
      static_cast<size_t>(shape.num_heads * context.num_blocks() * kBlockTokens), -1e30f);
  SelectParams params;
  params.config = &config;
  params.keys = context.Keys(kv_head);
  params.queries = context.queries();
  params.num_heads = shape.num_heads;
  params.head_dim = shape.head_dim;
  params.context_len = shape.length;
  params.layer = layer;
  params.masks = candidates.data();
  params.remembered = remembered;
  params.scratch = scratch.data();
  config.selector->Select(params);
  return {std::move(candidates), params.remember};
}

inline std::vector<TokenMask> AllCandidates(const Context& context) {
  return std::vector<TokenMask>(
      static_cast<size_t>(context.shape().num_heads * context.num_blocks()), kAllTokens);
}

inline std::vector<TokenMask> RandomCandidates(const Context& context, std::mt19937& rng) {
  std::vector<TokenMask> masks = AllCandidates(context);
  for (TokenMask& mask : masks) {
    const auto bits = static_cast<TokenMask>(rng());
    mask = rng() % 3 == 0 ? kNoTokens : rng() % 2 == 0 ? kAllTokens : bits;
  }
  return masks;
}

inline bool Has(const Context& context, const std::vector<TokenMask>& masks, int head,
                int64_t token) {
  return (masks[head * context.num_blocks() + token / kBlockTokens] >> token % kBlockTokens & 1) !=
         0;
}

inline int64_t CountOfHead(const Context& context, const std::vector<TokenMask>& masks, int head) {
  return CountTokens(masks.data() + head * context.num_blocks(), context.num_blocks());
}

// What a logit may be off by.
inline double RoundingOf(const Context& context, int kv_head) {
  double magnitude = 0;
  for (int64_t token = 0; token < context.num_blocks() * kBlockTokens; ++token) {
    for (int head = 0; head < context.shape().num_heads; ++head) {
      magnitude = std::max(magnitude, context.Magnitude(token, kv_head, head));
    }
  }
  return 2 * context.shape().head_dim * 0x1p-24 * magnitude;
}

}  // namespace gloam::cpu
