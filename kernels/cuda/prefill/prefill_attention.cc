#include "kernels/cuda/prefill/prefill_attention.h"

#include <algorithm>
#include <array>
#include <vector>

#include "base/check.h"
#include "kernels/cuda/prefill/fa2.h"
#include "kernels/cuda/prefill/fa3.h"
#include "kernels/cuda/prefill/plan.h"

namespace gloam::cuda {
namespace {

// Packs a plan's arrays into pinned memory; each is found again on the device at the same offset.
class PlanWriter {
 public:
  PlanWriter(void* host, const void* device, int64_t capacity)
      : host_(static_cast<int32_t*>(host)),
        device_(static_cast<const int32_t*>(device)),
        capacity_(capacity) {}

  // value(i) for i in [0, size); returns where the array will be on the device.
  template <typename Value>
  const int32_t* Add(int64_t size, const Value& value) {
    GLOAM_CHECK(used_ + size <= capacity_);
    for (int64_t i = 0; i < size; ++i) host_[used_ + i] = value(i);
    const int32_t* array = device_ + used_;
    used_ += size;
    return array;
  }

  size_t bytes() const { return used_ * sizeof(int32_t); }

 private:
  int32_t* host_;
  const int32_t* device_;
  int64_t capacity_;  // in elements, as used_
  int64_t used_ = 0;
};

class FlashInferPrefill final : public PrefillAttention {
 public:
  explicit FlashInferPrefill(const DeviceContext& context) : context_(context) {}

  Status Reserve(const StepLimits& limits) override;
  void Plan(const AttentionPlanParams& params, std::span<const int> seqs) override;
  void Run(const AttentionParams& params) override;

 private:
  // The arrays of a plan on their way to the device: filled for one step while the copy of the step
  // before may not have run yet.
  struct Staging {
    Buffer host;
    Event copied;
  };

  bool use_fa3() const { return GLOAM_WITH_HOPPER_KERNELS && context_.compute_capability == 90; }
  void PlanFa3Works(const AttentionPlanParams& params, std::span<const PrefillSeq> seqs,
                    const PrefillShape& shape, PlanWriter* writer);
  void PlanFa2Works(const AttentionPlanParams& params, std::span<const PrefillSeq> seqs,
                    const PrefillShape& shape, PlanWriter* writer);
  void RunFa3(const AttentionParams& params) const;
  void RunFa2(const AttentionParams& params) const;

  const DeviceContext context_;
  int64_t plan_capacity_ = 0;  // int32 elements
  std::array<Staging, 2> staging_;
  int next_staging_ = 0;
  Buffer plan_;         // device
  Buffer partial_;      // bf16 [MaxSplitBlocks * kMaxFa2TileRows, head_dim]: rows of split contexts
  Buffer partial_lse_;  // fp32 [MaxSplitBlocks * kMaxFa2TileRows]

  // Set by Plan; a kernel with no work is not launched.
  bool has_fa3_ = false;
  Fa3Params fa3_;
  bool has_fa2_ = false;
  Fa2Params fa2_;
  MergePiecesParams merge_;
};

Status FlashInferPrefill::Reserve(const StepLimits& limits) {
  const int64_t max_seqs = limits.max_seqs + 1;  // and what a division of tokens rounds up
  const int64_t fa3_works =
      MaxFa3Works(limits.max_tokens, max_seqs, limits.num_heads, limits.head_dim);
  const int64_t group = limits.num_heads / limits.num_kv_heads;
  const int64_t fa2_works = std::max<int64_t>(limits.max_tokens * group / 64 + max_seqs,
                                              MaxSplitBlocks(context_.num_sms));
  plan_capacity_ = 6 * fa3_works + context_.num_sms + 1 +     // FA3
                   3 * fa2_works + 5 * max_seqs + 2 +         // FA2
                   2 * (int64_t{limits.max_tokens} + 1) + 1;  // merging
  const size_t plan_bytes = plan_capacity_ * sizeof(int32_t);
  for (Staging& staging : staging_) {
    GLOAM_ASSIGN_OR_RETURN(staging.host, AllocatePinned(plan_bytes));
  }
  GLOAM_ASSIGN_OR_RETURN(plan_, AllocateDevice(plan_bytes));
  const size_t partial_rows =
      size_t{kMaxFa2TileRows} * static_cast<size_t>(MaxSplitBlocks(context_.num_sms));
  GLOAM_ASSIGN_OR_RETURN(partial_,
                         AllocateDevice(partial_rows * limits.head_dim * sizeof(uint16_t)));
  GLOAM_ASSIGN_OR_RETURN(partial_lse_, AllocateDevice(partial_rows * sizeof(float)));
  return OkStatus();
}

void FlashInferPrefill::Plan(const AttentionPlanParams& params, std::span<const int> seqs) {
  const SequenceBatch& batch = params.batch;
  GLOAM_CHECK(params.kv.head_dim == 64 || params.kv.head_dim == 128);
  GLOAM_CHECK(params.kv.dtype == DType::kBF16 || params.kv.dtype == DType::kF16);
  GLOAM_CHECK(params.num_heads % params.kv.num_kv_heads == 0);
  std::vector<PrefillSeq> planned;
  for (const int seq : seqs) {
    const int begin = batch.host_cu_seqlens[seq];
    planned.push_back({.seq = seq,
                       .q_begin = begin,
                       .q_len = batch.host_cu_seqlens[seq + 1] - begin,
                       .kv_len = batch.host_context_lens[seq]});
  }
  const PrefillShape shape = {
      .num_heads = params.num_heads,
      .num_kv_heads = params.kv.num_kv_heads,
      .head_dim = params.kv.head_dim,
      .window_left = params.sliding_window > 0 ? params.sliding_window - 1 : -1,
      .num_sms = context_.num_sms};
  PrefillSplit split;
  if (use_fa3()) {
    split = SplitPrefill(planned, shape);
  } else {
    split.fa2 = std::move(planned);
  }

  Staging& staging = staging_[next_staging_];
  next_staging_ = 1 - next_staging_;
  GLOAM_CUDA_CHECK(cudaEventSynchronize(staging.copied.get()));
  PlanWriter writer(staging.host.data(), plan_.data(), plan_capacity_);
  has_fa3_ = !split.fa3.empty();
  has_fa2_ = !split.fa2.empty();
  if (has_fa3_) PlanFa3Works(params, split.fa3, shape, &writer);
  if (has_fa2_) PlanFa2Works(params, split.fa2, shape, &writer);
  GLOAM_CUDA_CHECK(cudaMemcpyAsync(plan_.data(), staging.host.data(), writer.bytes(),
                                   cudaMemcpyHostToDevice, context_.stream));
  GLOAM_CUDA_CHECK(cudaEventRecord(staging.copied.get(), context_.stream));
}

void FlashInferPrefill::PlanFa3Works(const AttentionPlanParams& params,
                                     std::span<const PrefillSeq> seqs, const PrefillShape& shape,
                                     PlanWriter* writer) {
  const Fa3Plan plan = PlanFa3(seqs, shape);
  const int64_t num_works = static_cast<int64_t>(plan.works.size());
  const auto seq_of = [&](int64_t i) -> const PrefillSeq& { return seqs[plan.works[i].index]; };
  fa3_ = {};
  fa3_.num_tokens = params.batch.num_tokens;
  fa3_.num_heads = shape.num_heads;
  fa3_.num_kv_heads = shape.num_kv_heads;
  fa3_.block_tables = params.batch.block_tables;
  fa3_.window_left = shape.window_left;
  fa3_.num_thread_blocks = shape.num_sms;
  fa3_.stream = context_.stream;
  fa3_.work_begins = writer->Add(shape.num_sms + 1, [&](int64_t i) { return plan.begins[i]; });
  fa3_.work_heads = writer->Add(num_works, [&](int64_t i) { return plan.works[i].head; });
  fa3_.work_tiles = writer->Add(num_works, [&](int64_t i) { return plan.works[i].tile; });
  fa3_.work_q_begins = writer->Add(num_works, [&](int64_t i) { return seq_of(i).q_begin; });
  fa3_.work_table_begins = writer->Add(
      num_works, [&](int64_t i) { return seq_of(i).seq * params.batch.max_blocks_per_seq; });
  fa3_.work_q_lens = writer->Add(num_works, [&](int64_t i) { return seq_of(i).q_len; });
  fa3_.work_kv_lens = writer->Add(num_works, [&](int64_t i) { return seq_of(i).kv_len; });
}

void FlashInferPrefill::PlanFa2Works(const AttentionPlanParams& params,
                                     std::span<const PrefillSeq> seqs, const PrefillShape& shape,
                                     PlanWriter* writer) {
  const Fa2Plan plan = PlanFa2(seqs, shape);
  const int64_t num_works = static_cast<int64_t>(plan.works.size());
  const int64_t num_seqs = static_cast<int64_t>(seqs.size());
  const int max_blocks = params.batch.max_blocks_per_seq;
  fa2_ = {};
  fa2_.num_heads = shape.num_heads;
  fa2_.num_kv_heads = shape.num_kv_heads;
  fa2_.num_seqs = static_cast<int>(num_seqs);
  fa2_.num_works = static_cast<int>(num_works);
  fa2_.tile_rows = plan.tile_rows;
  fa2_.block_tables = params.batch.block_tables;
  fa2_.window_left = shape.window_left;
  fa2_.split = plan.piece_tokens > 0;
  fa2_.max_shared_bytes = context_.max_shared_bytes;
  fa2_.stream = context_.stream;
  fa2_.table_begins = writer->Add(num_seqs + 1, [&](int64_t i) {
    return (i < num_seqs ? seqs[i].seq : params.batch.num_seqs) * max_blocks;
  });
  fa2_.q_begins = writer->Add(num_seqs, [&](int64_t i) { return seqs[i].q_begin; });
  fa2_.q_lens = writer->Add(num_seqs, [&](int64_t i) { return seqs[i].q_len; });
  fa2_.kv_lens = writer->Add(num_seqs, [&](int64_t i) { return seqs[i].kv_len; });
  fa2_.work_seqs = writer->Add(num_works, [&](int64_t i) { return plan.works[i].index; });
  fa2_.work_tiles = writer->Add(num_works, [&](int64_t i) { return plan.works[i].tile; });
  fa2_.work_pieces = writer->Add(num_works, [&](int64_t i) { return plan.works[i].piece; });
  fa2_.piece_tokens = writer->Add(1, [&](int64_t) { return plan.piece_tokens; });
  if (!fa2_.split) {
    fa2_.out_begins = fa2_.q_begins;
    return;
  }

  // The pieces of a row lie one after another, rows in order.
  std::vector<int32_t> seq_begins;
  std::vector<int32_t> row_begins = {0};
  std::vector<int32_t> out_rows;
  for (int64_t i = 0; i < num_seqs; ++i) {
    seq_begins.push_back(row_begins.back());
    for (int row = 0; row < seqs[i].q_len; ++row) {
      out_rows.push_back(seqs[i].q_begin + row);
      row_begins.push_back(row_begins.back() + plan.num_pieces[i]);
    }
  }
  GLOAM_CHECK(int64_t{row_begins.back()} * shape.num_heads <=
              int64_t{kMaxFa2TileRows} * MaxSplitBlocks(shape.num_sms));
  fa2_.out_begins = writer->Add(num_seqs, [&](int64_t i) { return seq_begins[i]; });
  fa2_.out = partial_.data();
  fa2_.lse = static_cast<float*>(partial_lse_.data());
  merge_ = {};
  merge_.partial = partial_.data();
  merge_.lse = fa2_.lse;
  merge_.num_rows = static_cast<int>(out_rows.size());
  merge_.num_heads = shape.num_heads;
  merge_.head_dim = shape.head_dim;
  merge_.stream = context_.stream;
  merge_.begins = writer->Add(row_begins.size(), [&](int64_t i) { return row_begins[i]; });
  merge_.out_rows = writer->Add(out_rows.size(), [&](int64_t i) { return out_rows[i]; });
}

void FlashInferPrefill::Run(const AttentionParams& params) {
  GLOAM_CHECK(params.q.dtype == params.kv.layout.dtype);
  GLOAM_CHECK(params.out.dtype == DType::kBF16);
  GLOAM_CHECK(params.out.strides[1] == params.kv.layout.head_dim &&
              params.out.strides[0] == params.out.shape[1] * params.out.strides[1]);
  if (has_fa3_) RunFa3(params);
  if (has_fa2_) RunFa2(params);
}

void FlashInferPrefill::RunFa3([[maybe_unused]] const AttentionParams& params) const {
#if GLOAM_WITH_HOPPER_KERNELS
  Fa3Params fa3 = fa3_;
  fa3.q = params.q.data;
  fa3.q_token_stride = params.q.strides[0];
  fa3.q_head_stride = params.q.strides[1];
  fa3.cache = params.kv.data;
  fa3.num_blocks = params.kv.num_blocks;
  fa3.scale = params.scale;
  fa3.out = params.out.data;
  const bool is_bf16 = params.q.dtype == DType::kBF16;
  if (params.kv.layout.head_dim == 64) {
    is_bf16 ? RunFa3Bf16x64(fa3) : RunFa3F16x64(fa3);
  } else {
    is_bf16 ? RunFa3Bf16x128(fa3) : RunFa3F16x128(fa3);
  }
#endif
}

void FlashInferPrefill::RunFa2(const AttentionParams& params) const {
  Fa2Params fa2 = fa2_;
  fa2.q = params.q.data;
  fa2.q_token_stride = params.q.strides[0];
  fa2.q_head_stride = params.q.strides[1];
  fa2.keys = params.kv.Keys<uint16_t>(0, 0);
  fa2.values = params.kv.Values<uint16_t>(0, 0);
  fa2.scale = params.scale;
  if (!fa2.split) fa2.out = params.out.data;
  const bool is_bf16 = params.q.dtype == DType::kBF16;
  if (params.kv.layout.head_dim == 64) {
    is_bf16 ? RunFa2Bf16x64(fa2) : RunFa2F16x64(fa2);
  } else {
    is_bf16 ? RunFa2Bf16x128(fa2) : RunFa2F16x128(fa2);
  }
  if (!fa2.split) return;
  MergePiecesParams merge = merge_;
  merge.out = params.out.data;
  MergePieces(merge);
}

}  // namespace

std::unique_ptr<PrefillAttention> PrefillAttention::Make(const DeviceContext& context) {
  return std::make_unique<FlashInferPrefill>(context);
}

}  // namespace gloam::cuda
