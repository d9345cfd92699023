// ProfilingOps: keeps the queries of the steps that go through it, for AttentionProfile.
#pragma once

#include <vector>

#include "kernels/forwarding_ops.h"

namespace gloam {

class ProfilingOps final : public ForwardingOps {
 public:
  explicit ProfilingOps(Ops& ops) : ForwardingOps(ops) {}

  // From the next step on, keeps the queries of each layer's last `num_queries` tokens.
  void Begin(int num_layers, int num_queries) {
    queries_.assign(num_layers, {});
    num_queries_ = num_queries;
    next_layer_ = 0;
  }
  // [num_queries][num_heads][head_dim] of the last step.
  const std::vector<float>& queries(int layer) const { return queries_[layer]; }

  void Attention(const AttentionParams& params) override {
    if (!queries_.empty()) {
      std::vector<float>& kept = queries_[next_layer_];
      next_layer_ = (next_layer_ + 1) % queries_.size();
      kept.clear();
      const int64_t tokens = params.q.shape[0];
      for (int64_t token = tokens - num_queries_; token < tokens; ++token) {
        for (int64_t head = 0; head < params.q.shape[1]; ++head) {
          const float* from = static_cast<const float*>(params.q.data) +
                              token * params.q.strides[0] + head * params.q.strides[1];
          kept.insert(kept.end(), from, from + params.q.shape[2]);
        }
      }
    }
    ops_.Attention(params);
  }

 private:
  std::vector<std::vector<float>> queries_;  // [num_layers]
  int64_t num_queries_ = 0;
  size_t next_layer_ = 0;
};

}  // namespace gloam
