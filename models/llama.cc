#include "models/llama.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <optional>
#include <utility>

#include "base/check.h"

namespace gloam {
namespace {

// Tokens of a step whose activations are worth keeping in a cache: a layer's of 256 tokens of
// Llama-3.1-8B take 21 MB, of which 14 are written.
constexpr int kKeptTokens = 256;

const float* Floats(const Buffer& buffer) { return static_cast<const float*>(buffer.data()); }

// [rows, num_heads * head_dim] seen as [rows, num_heads, head_dim].
TensorView Heads(const TensorView& x, int64_t num_heads, int64_t head_dim) {
  GLOAM_CHECK(x.rank == 2 && x.shape[1] == num_heads * head_dim);
  TensorView view = x;
  view.rank = 3;
  view.shape = {x.shape[0], num_heads, head_dim};
  view.strides = {x.strides[0], head_dim, 1};
  return view;
}

}  // namespace

Llama::Llama(ModelConfig config, LlamaWeights weights, Ops& ops)
    : config_(std::move(config)), weights_(std::move(weights)), ops_(ops) {}

StatusOr<std::unique_ptr<Model>> Llama::Load(const ModelFile& file, Ops& ops,
                                             const LoadOptions& options) {
  GLOAM_ASSIGN_OR_RETURN(LlamaWeights weights, LoadLlamaWeights(file, ops, options));
  return std::unique_ptr<Model>(new Llama(file.config(), std::move(weights), ops));
}

Llama::Activations Llama::ActivationsAt(void* memory, int num_tokens, int num_logit_rows) const {
  const ModelConfig& c = config_;
  const ActivationDTypes dtypes = ops_.activation_dtypes();
  // Two-byte types are told apart when the cache's type is known, in the forward pass.
  const DType query_dtype = ops_.QueryDType(DType::kBF16);
  // A bias may be far larger than the sums, and what a norm scales should not be rounded before.
  const bool is_adjusted = c.qk_norm || weights_.layers.front().qkv.bias.data() != nullptr;
  const DType qkv_dtype = is_adjusted ? DType::kF32 : dtypes.qkv;
  const int64_t q_dim = int64_t{c.num_heads} * c.head_dim;
  // A token's logits may be asked for twice, so there may be more of them than tokens.
  const int max_rows = std::max(num_tokens, num_logit_rows);
  Activations step;
  constexpr size_t kLineBytes = 64;
  // A product writes one line of every row after another. On a CPU rows are an odd number of lines
  // apart, or all these would lie in the same few sets of its caches.
  const auto row_stride = [this](DType dtype, int64_t cols) {
    if (ops_.device() != Device::kCpu) return cols;
    const auto line = static_cast<int64_t>(kLineBytes / DTypeBytes(dtype));
    return ((cols + line - 1) / line | 1) * line;
  };
  const auto place = [&](TensorView& view, DType dtype, int64_t rows, int64_t cols) {
    auto* at = memory == nullptr ? nullptr : static_cast<std::byte*>(memory) + step.bytes;
    const int64_t stride = row_stride(dtype, cols);
    view = TensorView::Contiguous(at, dtype, ops_.device(), {rows, stride}).Columns(0, cols);
    const size_t bytes = static_cast<size_t>(rows * stride) * DTypeBytes(dtype);
    step.bytes += (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
  };
  // In one place: none is needed any more when another is written.
  const auto place_each = [&](const auto&... pieces) {
    const size_t begin = step.bytes;
    size_t end = begin;
    const auto place_at_begin = [&](const auto& piece) {
      step.bytes = begin;
      piece();
      end = std::max(end, step.bytes);
    };
    (place_at_begin(pieces), ...);
    step.bytes = end;
  };
  place(step.hidden, dtypes.residual, num_tokens, c.hidden_size);
  place_each([&] { place(step.normed, dtypes.input, max_rows, c.hidden_size); },
             [&] { place(step.attended, dtypes.input, num_tokens, q_dim); });
  place_each(
      [&] {
        place(step.qkv, qkv_dtype, num_tokens, q_dim + int64_t{2} * c.num_kv_heads * c.head_dim);
        place(step.query, query_dtype, query_dtype == DType::kF32 ? 0 : num_tokens, q_dim);
      },
      [&] { place(step.gate_up, dtypes.input, max_rows, int64_t{2} * c.intermediate_size); });
  step.bytes_per_layer = step.bytes;
  place(step.last, dtypes.residual, num_logit_rows, c.hidden_size);
  place(step.last_attended, dtypes.input, num_logit_rows, q_dim);
  place(step.logits, DType::kF32, num_logit_rows, c.vocab_size);
  return step;
}

Status Llama::Reserve(int max_tokens, int max_logit_rows) {
  GLOAM_CHECK(max_tokens > 0 && max_logit_rows > 0);
  memory_ = Buffer();  // gives the old memory back first
  GLOAM_ASSIGN_OR_RETURN(memory_,
                         ops_.Allocate(ActivationsAt(nullptr, max_tokens, max_logit_rows).bytes));
  max_tokens_ = max_tokens;
  max_logit_rows_ = max_logit_rows;
  const int kept_tokens = std::min(max_tokens, kKeptTokens);
  ops_.KeepInCache(memory_.data(), ActivationsAt(nullptr, kept_tokens, 0).bytes_per_layer);
  return OkStatus();
}

LogitRows Llama::Forward(const ForwardBatch& batch) {
  const int num_tokens = batch.seqs.num_tokens;
  GLOAM_CHECK(num_tokens > 0 && num_tokens <= max_tokens_);
  GLOAM_CHECK(batch.num_logit_rows >= 0 && batch.num_logit_rows <= max_logit_rows_);
  GLOAM_CHECK(batch.kv.size() == weights_.layers.size());
  activations_ = ActivationsAt(memory_.data(), num_tokens, batch.num_logit_rows);

  ops_.Embed({.table = weights_.token_embedding.get(),
              .token_ids = batch.token_ids,
              .out = activations_.hidden});
  ops_.PlanAttention({.batch = batch.seqs,
                      .kv = batch.kv.front().layout,
                      .num_heads = config_.num_heads,
                      .sliding_window = config_.sliding_window});
  const TensorView hidden = activations_.hidden;
  const TensorView attended = activations_.attended;
  const int last_layer = config_.num_layers - 1;
  for (int i = 0; i < last_layer; ++i) {
    Attention(i, batch);
    AfterAttention(weights_.layers[i], attended, hidden);
  }
  Attention(last_layer, batch);
  // Behind its attention the last layer serves the rows alone whose logits are asked for.
  const TensorView last = activations_.last;
  if (batch.num_logit_rows > 0) {
    const TensorView last_attended = activations_.last_attended;
    ops_.GatherRows({.x = hidden, .row_indices = batch.logit_rows, .out = last});
    ops_.GatherRows({.x = attended, .row_indices = batch.logit_rows, .out = last_attended});
    AfterAttention(weights_.layers[last_layer], last_attended, last);
  }
  return Logits(last, batch.is_greedy);
}

// attended = attention(rope(norm(W_q h)), cache of rope(norm(W_k h)) and W_v h), h = norm(hidden)
void Llama::Attention(int layer_index, const ForwardBatch& batch) {
  const ModelConfig& c = config_;
  const LlamaLayer& layer = weights_.layers[layer_index];
  const int num_tokens = batch.seqs.num_tokens;
  const TensorView hidden = activations_.hidden;
  const TensorView normed = activations_.normed.Rows(0, num_tokens);
  const TensorView qkv = activations_.qkv;
  const TensorView attended = activations_.attended;
  const int64_t q_dim = int64_t{c.num_heads} * c.head_dim;
  const int64_t kv_dim = int64_t{c.num_kv_heads} * c.head_dim;
  const TensorView q = Heads(qkv.Columns(0, q_dim), c.num_heads, c.head_dim);
  const TensorView k = Heads(qkv.Columns(q_dim, kv_dim), c.num_kv_heads, c.head_dim);
  const TensorView v = Heads(qkv.Columns(q_dim + kv_dim, kv_dim), c.num_kv_heads, c.head_dim);

  RmsNorm(hidden, layer.attention_norm, normed);
  layer.qkv.Apply(ops_, normed, qkv, /*accumulate=*/false);
  if (c.qk_norm) {
    RmsNorm(q, layer.q_norm, q);
    RmsNorm(k, layer.k_norm, k);
  }
  TensorView query = q;
  if (activations_.query.num_elements() > 0) {
    query = Heads(activations_.query, c.num_heads, c.head_dim);
    query.dtype = ops_.QueryDType(batch.kv[layer_index].layout.dtype);
  }
  const bool uses_rope = c.layer_uses_rope.empty() || c.layer_uses_rope[layer_index];
  ops_.RopeAppendKv({.batch = batch.seqs,
                     .q = q,
                     .q_out = query,
                     .k = k,
                     .v = v,
                     .cos = Floats(weights_.rope_cos),
                     .sin = Floats(weights_.rope_sin),
                     .rotary_dim = uses_rope ? c.rotary_dim : 0,
                     .style = c.rope_style,
                     .kv = batch.kv[layer_index]});
  Attend(layer_index, batch, query, Heads(attended, c.num_heads, c.head_dim));
}

// Attention of a layer: dense rows, then those with a sparsity policy.
void Llama::Attend(int layer_index, const ForwardBatch& batch, const TensorView& q,
                   const TensorView& out) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  const KvLayerView& kv = batch.kv[layer_index];
  const SparseTokens& sparse =
      layer_index < kDenseLayers ? batch.sparse_first_layers : batch.sparse;
  const SidecarLayerView sidecars =
      batch.sidecars.empty() ? SidecarLayerView() : batch.sidecars[layer_index];
  if (sidecars.config != nullptr) {
    ops_.UpdateSidecars(
        {.batch = batch.seqs, .kv = kv, .sidecars = sidecars, .layer = layer_index});
  }
  for (const PromptVote& vote : batch.votes) {
    ops_.CompressPrompt({.batch = batch.seqs,
                         .seq = vote.seq,
                         .first_window_token = vote.first_window_token,
                         .config = *vote.config,
                         .q = q,
                         .kv = kv,
                         .scale = scale,
                         .layer = layer_index,
                         .compressed = vote.compressed});
  }
  const bool is_read = batch.num_logit_rows > 0 || layer_index + 1 < config_.num_layers;
  if (is_read && static_cast<int>(sparse.rows.size()) < batch.seqs.num_tokens) {
    ops_.Attention({.batch = batch.seqs,
                    .q = q,
                    .kv = kv,
                    .scale = scale,
                    .sliding_window = config_.sliding_window,
                    .out = out,
                    .left_out = sparse.rows.empty() ? nullptr : sparse.seqs});
  }
  if (!sparse.rows.empty()) {
    const size_t layer_stats = batch.sparse.rows.size() * config_.num_kv_heads;
    ops_.SparseAttention({.batch = batch.seqs,
                          .q = q,
                          .kv = kv,
                          .sidecars = sidecars,
                          .scale = scale,
                          .layer = layer_index,
                          .rows = sparse.rows,
                          .stats = batch.sparse_stats + layer_index * layer_stats,
                          .out = out});
  }
}

// hidden += W_o attended, then hidden += W_down (silu(W_gate h) * W_up h), h = norm(hidden)
void Llama::AfterAttention(const LlamaLayer& layer, const TensorView& attended,
                           const TensorView& hidden) {
  const TensorView normed = activations_.normed.Rows(0, hidden.shape[0]);
  const TensorView gate_up = activations_.gate_up.Rows(0, hidden.shape[0]);
  const TensorView gate = gate_up.Columns(0, config_.intermediate_size);
  const TensorView up = gate_up.Columns(config_.intermediate_size, config_.intermediate_size);

  layer.attention_out.Apply(ops_, attended, hidden, /*accumulate=*/true);
  RmsNorm(hidden, layer.feed_forward_norm, normed);
  if (!layer.gate_up.ApplyGated(ops_, normed, gate)) {
    layer.gate_up.Apply(ops_, normed, gate_up, /*accumulate=*/false);
    ops_.SiluMul({.gate = gate, .up = up, .out = gate});
  }
  layer.down.Apply(ops_, gate, hidden, /*accumulate=*/true);
}

// logits = W_lm norm(hidden)
LogitRows Llama::Logits(const TensorView& hidden, bool is_greedy) {
  const TensorView logits = activations_.logits;
  if (hidden.shape[0] == 0) return {logits};
  const TensorView normed = activations_.normed.Rows(0, hidden.shape[0]);
  RmsNorm(hidden, weights_.output_norm, normed);
  const Weight* lm_head =
      weights_.lm_head ? weights_.lm_head.get() : weights_.token_embedding.get();
  if (is_greedy) {
    const std::optional<LogitRows> candidates =
        ops_.GreedyLogits({.x = normed, .weight = lm_head, .y = logits});
    if (candidates) return *candidates;
  }
  ops_.Gemm({.x = normed, .outputs = {{{.weight = lm_head, .y = logits}}}, .num_outputs = 1});
  return {logits};
}

void Llama::RmsNorm(const TensorView& x, const Buffer& weight, const TensorView& out) {
  ops_.RmsNorm({.x = x, .weight = Floats(weight), .eps = config_.rms_norm_eps, .out = out});
}

}  // namespace gloam
