// Calibration of Double Sparsity: which channels of queries and keys carry the most, measured on
// sample text. The result is the channel file that a `ds` selector names
// (models/attention/channel_table.h reads it).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "kernels/forwarding_ops.h"
#include "models/model.h"
#include "nlohmann/json.hpp"

namespace gloam {

// Sums, per layer and head, of the channels' magnitudes after RoPE, as a model's forward passes
// go through it.
class ChannelSums final : public ForwardingOps {
 public:
  explicit ChannelSums(Ops& ops) : ForwardingOps(ops) {}

  void RopeAppendKv(const RopeKvParams& params) override;

  // Forgets everything; the next RopeAppendKv is layer 0 of `num_layers`.
  void Begin(int num_layers);

  // {"model.layers.{i}.self_attn.{q,k,qk}_proj": [heads][channels]}: every head's channels, best
  // first, by mean |q|, mean |k| and mean |q k| of the token's own query and key. Lists of q and qk
  // are per query head, those of k per KV head.
  nlohmann::ordered_json ToJson() const;

 private:
  struct Layer {
    int num_heads = 0, num_kv_heads = 0, head_dim = 0;
    std::vector<double> q, k, qk;  // [num_heads][head_dim], [num_kv_heads][...], [num_heads][...]
  };

  std::vector<Layer> layers_;
  size_t next_layer_ = 0;
};

// Runs `tokens` through `model`, which uses `sums`, in pieces of `context` tokens that each start
// at position 0. Errors: kResourceExhausted, kInvalidArgument (fewer tokens than one piece).
[[nodiscard]] StatusOr<nlohmann::ordered_json> CalibrateChannels(Model& model, ChannelSums& sums,
                                                                 std::span<const int32_t> tokens,
                                                                 int context);

}  // namespace gloam
