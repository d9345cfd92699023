// Which kernel attends for which rows: single tokens of a sequence go to decode_attention.h, chunks
// to prefill_attention.h. In batch-invariant mode every token is a row of the decode kernel,
// because a row's bits must not tell how its prompt was cut.
#include "kernels/attention.h"

#include <algorithm>
#include <vector>

#include "base/check.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/decode/decode_attention.h"
#include "kernels/cuda/prefill/prefill_attention.h"

namespace gloam::cuda {
namespace {

// Partials of one launch of the decode kernel may take this much; more rows are more launches. 256
// rows of Llama-3.1-8B with its longest context fit.
constexpr int64_t kMaxPartialBytes = int64_t{72} << 20;

int BlocksOf(int tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

class Backend final : public AttentionBackend {
 public:
  explicit Backend(const DeviceContext& context) : context_(context) {
    if (!context.options.batch_invariant) prefill_ = PrefillAttention::Make(context);
  }

  Status Reserve(const StepLimits& limits) override;
  void Plan(const AttentionPlanParams& params) override;
  void Attention(const AttentionParams& params) override;

 private:
  // Rows [0, num_rows) of the decode kernel's view of the batch.
  void Decode(const AttentionParams& params, DecodeRows rows, int num_rows);

  const DeviceContext context_;
  std::unique_ptr<PrefillAttention> prefill_;  // null in batch-invariant mode

  StepLimits limits_;
  int heads_per_unit_ = 0;
  int max_splits_ = 0;
  int rows_per_launch_ = 0;
  Buffer partials_;
  Buffer arrivals_;

  std::vector<int> chunks_;  // of this forward pass: sequences of more than one token
};

Status Backend::Reserve(const StepLimits& limits) {
  GLOAM_CHECK(limits.num_kv_heads > 0 && limits.num_heads % limits.num_kv_heads == 0);
  limits_ = limits;
  const int heads_per_kv = limits.num_heads / limits.num_kv_heads;
  heads_per_unit_ = std::min(heads_per_kv, DecodeHeads(context_.compute_capability));
  const int64_t num_groups = DecodeGroups(limits.num_kv_heads, heads_per_kv, heads_per_unit_);
  max_splits_ = DecodeSplits(BlocksOf(limits.max_context), static_cast<int>(num_groups));
  const int64_t partial_bytes =
      int64_t{sizeof(float)} * DecodePartialFloats(heads_per_unit_, limits.head_dim);
  const int64_t row_bytes = num_groups * max_splits_ * partial_bytes;
  const int max_rows = context_.options.batch_invariant ? limits.max_tokens : limits.max_seqs;
  rows_per_launch_ = static_cast<int>(std::clamp<int64_t>(
      kMaxPartialBytes / row_bytes, 1, std::min(kMaxDecodeRows, std::max(1, max_rows))));
  partials_ = Buffer();
  GLOAM_ASSIGN_OR_RETURN(
      partials_, AllocateDevice(rows_per_launch_ * row_bytes + context_.num_sms * partial_bytes));
  GLOAM_ASSIGN_OR_RETURN(arrivals_,
                         AllocateDevice(rows_per_launch_ * num_groups * sizeof(int32_t)));
  if (prefill_ == nullptr) return OkStatus();
  chunks_.reserve(limits.max_seqs);
  return prefill_->Reserve(limits);
}

void Backend::Plan(const AttentionPlanParams& params) {
  chunks_.clear();
  const SequenceBatch& batch = params.batch;
  if (prefill_ == nullptr || batch.decode_only()) return;
  for (int seq = 0; seq < batch.num_seqs; ++seq) {
    if (batch.host_cu_seqlens[seq + 1] - batch.host_cu_seqlens[seq] > 1) chunks_.push_back(seq);
  }
  if (!chunks_.empty()) prefill_->Plan(params, chunks_);
}

void Backend::Attention(const AttentionParams& params) {
  const SequenceBatch& batch = params.batch;
  const KvLayout& kv = params.kv.layout;
  const TensorView& q = params.q;
  GLOAM_CHECK(params.left_out == nullptr);
  GLOAM_CHECK(q.rank == 3 && params.out.rank == 3 && params.out.shape == q.shape);
  GLOAM_CHECK(q.dtype == QueryDType(kv.dtype));
  GLOAM_CHECK(params.out.dtype == DType::kBF16);
  GLOAM_CHECK(q.shape[0] == batch.num_tokens && q.shape[2] == kv.head_dim);
  GLOAM_CHECK(q.shape[1] == limits_.num_heads && kv.num_kv_heads == limits_.num_kv_heads);
  GLOAM_CHECK(kv.head_dim == limits_.head_dim);
  if (batch.num_tokens == 0) return;
  if (batch.decode_only()) return Decode(params, DecodeRows::kSingleTokens, batch.num_seqs);
  if (prefill_ == nullptr) return Decode(params, DecodeRows::kEveryToken, batch.num_tokens);
  if (!chunks_.empty()) prefill_->Run(params);
  if (static_cast<int>(chunks_.size()) < batch.num_seqs) {
    Decode(params, DecodeRows::kSingleTokens, batch.num_seqs);
  }
}

void Backend::Decode(const AttentionParams& params, DecodeRows rows, int num_rows) {
  const SequenceBatch& batch = params.batch;
  const KvLayout& kv = params.kv.layout;
  DecodeAttentionParams decode = {
      .q = params.q.data,
      .q_token_stride = params.q.strides[0],
      .q_head_stride = params.q.strides[1],
      .out = params.out.data,
      .out_token_stride = params.out.strides[0],
      .out_head_stride = params.out.strides[1],
      .kv = params.kv.data,
      .kv_dtype = kv.dtype,
      .num_kv_heads = kv.num_kv_heads,
      .heads_per_kv = limits_.num_heads / kv.num_kv_heads,
      .head_dim = kv.head_dim,
      .heads_per_unit = heads_per_unit_,
      .cu_seqlens = batch.cu_seqlens,
      .context_lens = batch.context_lens,
      .block_tables = batch.block_tables,
      .num_seqs = batch.num_seqs,
      .max_blocks_per_seq = batch.max_blocks_per_seq,
      .rows = rows,
      .scale = params.scale,
      .window = params.sliding_window,
      .balanced = !context_.options.batch_invariant,
      .max_splits = max_splits_,
      .partials = static_cast<float*>(partials_.data()),
      .arrivals = static_cast<int32_t*>(arrivals_.data()),
  };
  for (int row = 0; row < num_rows; row += rows_per_launch_) {
    decode.first_row = row;
    decode.num_rows = std::min(rows_per_launch_, num_rows - row);
    LaunchDecodeAttention(decode, {context_.num_sms, context_.compute_capability, context_.stream});
  }
}

}  // namespace

std::unique_ptr<AttentionBackend> MakeAttentionBackend(const DeviceContext& context) {
  return std::make_unique<Backend>(context);
}

}  // namespace gloam::cuda
