#include "eval/channel_calibration.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "engine/kv_cache_pool.h"
#include "engine/model_runner.h"
#include "fmt/format.h"

namespace gloam {
namespace {

const float* HeadOf(const TensorView& x, int64_t token, int64_t head) {
  return static_cast<const float*>(x.data) + token * x.strides[0] + head * x.strides[1];
}

nlohmann::ordered_json BestFirst(const std::vector<double>& sums, int head_dim) {
  nlohmann::ordered_json heads = nlohmann::ordered_json::array();
  for (size_t begin = 0; begin < sums.size(); begin += head_dim) {
    std::vector<int> order(head_dim);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return sums[begin + a] > sums[begin + b]; });
    heads.push_back(order);
  }
  return heads;
}

}  // namespace

void ChannelSums::Begin(int num_layers) {
  layers_.assign(num_layers, {});
  next_layer_ = 0;
}

void ChannelSums::RopeAppendKv(const RopeKvParams& params) {
  ops_.RopeAppendKv(params);
  if (layers_.empty()) return;
  Layer& layer = layers_[next_layer_];
  next_layer_ = (next_layer_ + 1) % layers_.size();
  layer.num_heads = static_cast<int>(params.q.shape[1]);
  layer.num_kv_heads = static_cast<int>(params.k.shape[1]);
  layer.head_dim = static_cast<int>(params.q.shape[2]);
  layer.q.resize(int64_t{layer.num_heads} * layer.head_dim);
  layer.qk.resize(layer.q.size());
  layer.k.resize(int64_t{layer.num_kv_heads} * layer.head_dim);
  const int group = layer.num_heads / layer.num_kv_heads;
  for (int64_t token = 0; token < params.q.shape[0]; ++token) {
    for (int head = 0; head < layer.num_heads; ++head) {
      const float* q = HeadOf(params.q, token, head);
      const float* k = HeadOf(params.k, token, head / group);
      for (int c = 0; c < layer.head_dim; ++c) {
        layer.q[head * layer.head_dim + c] += std::abs(q[c]);
        layer.qk[head * layer.head_dim + c] += std::abs(q[c] * k[c]);
        if (head % group == 0) {
          layer.k[head / group * layer.head_dim + c] += std::abs(k[c]);
        }
      }
    }
  }
}

nlohmann::ordered_json ChannelSums::ToJson() const {
  nlohmann::ordered_json json;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    const std::string prefix = fmt::format("model.layers.{}.self_attn.", i);
    json[prefix + "q_proj"] = BestFirst(layer.q, layer.head_dim);
    json[prefix + "k_proj"] = BestFirst(layer.k, layer.head_dim);
    json[prefix + "qk_proj"] = BestFirst(layer.qk, layer.head_dim);
  }
  return json;
}

StatusOr<nlohmann::ordered_json> CalibrateChannels(Model& model, ChannelSums& sums,
                                                   std::span<const int32_t> tokens, int context) {
  constexpr int kChunkTokens = 512;
  const ModelConfig& config = model.config();
  if (context < 1 || context > config.max_position) {
    return InvalidArgument("--context {} is not in [1, {}], the context of this model", context,
                           config.max_position);
  }
  if (static_cast<int64_t>(tokens.size()) < context) {
    return InvalidArgument("the text has {} tokens, fewer than one context of {}", tokens.size(),
                           context);
  }
  KvPlan plan;
  plan.layout = {.dtype = DefaultKvDType(config),
                 .num_kv_heads = config.num_kv_heads,
                 .head_dim = config.head_dim};
  plan.num_blocks = BlocksFor(context);
  GLOAM_ASSIGN_OR_RETURN(KvCachePool pool, KvCachePool::Create(sums, plan, config.num_layers));
  const ModelRunnerLimits limits = {.max_num_seqs = 1,
                                    .max_num_batched_tokens = kChunkTokens,
                                    .max_score_rows = 1,
                                    .max_model_len = context};
  GLOAM_ASSIGN_OR_RETURN(ModelRunner runner, ModelRunner::Create(limits, sums, model));
  runner.SetCache(pool.layers(), pool.sidecars());

  sums.Begin(config.num_layers);
  for (size_t first = 0; first + context <= tokens.size(); first += context) {
    Sequence sequence;
    sequence.tokens.assign(tokens.begin() + first, tokens.begin() + first + context);
    sequence.table.blocks.resize(plan.num_blocks);
    std::iota(sequence.table.blocks.begin(), sequence.table.blocks.end(), 0);
    while (sequence.num_pending() > 0) {
      StepPlan step;
      step.num_tokens = std::min(kChunkTokens, sequence.num_pending());
      step.sequences.push_back({.sequence = &sequence, .num_tokens = step.num_tokens});
      runner.Forward(step);
      sequence.num_computed += step.num_tokens;
    }
  }
  return sums.ToJson();
}

}  // namespace gloam
