#include "kernels/cuda/prefill/prefill_attention.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <vector>

#include "base/check.h"
#include "kernels/cuda/prefill/fa2.h"
#include "kernels/cuda/prefill/fa3.h"
#include "kernels/cuda/prefill/plan.h"
#include "kernels/cuda/prefill/widen.h"

namespace gloam::cuda {
namespace {

int BlocksOf(int tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

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
  // Sequences whose keys and values the kernels can read at a time: all of a step, but of an fp8
  // cache no more than the workspace holds. A kernel with no work is not launched.
  struct Group {
    std::vector<PrefillSeq> seqs;
    std::optional<WidenParams> widen;
    std::optional<Fa3Params> fa3;
    std::optional<Fa2Params> fa2;
    MergePiecesParams merge;  // of fa2, if that is split
  };

  // The arrays of a plan on their way to the device: filled for one step while the copy of the step
  // before may not have run yet.
  struct Staging {
    Buffer host;
    Event copied;
  };

  bool use_fa3() const { return GLOAM_WITH_HOPPER_KERNELS && context_.compute_capability == 90; }
  Status ReserveWorkspace(const StepLimits& limits);
  // Splits the sequences of a step over an fp8 cache into groups with places in the workspace.
  void PlanWidening(const AttentionPlanParams& params, std::span<const PrefillSeq> seqs,
                    const PrefillShape& shape, PlanWriter* writer);
  Fa3Params PlanFa3Works(const AttentionPlanParams& params, std::span<const PrefillSeq> seqs,
                         const PrefillShape& shape, PlanWriter* writer) const;
  void PlanFa2Works(std::span<const PrefillSeq> seqs, const PrefillShape& shape, PlanWriter* writer,
                    Group* group) const;
  // `kv`: what the kernels read, the cache or the workspace.
  void RunFa3(const AttentionParams& params, const KvLayerView& kv, Fa3Params fa3) const;
  void RunFa2(const AttentionParams& params, const KvLayerView& kv, const Group& group) const;

  const DeviceContext context_;
  int64_t plan_capacity_ = 0;  // int32 elements
  std::array<Staging, 2> staging_;
  int next_staging_ = 0;
  Buffer plan_;         // device
  Buffer partial_;      // bf16 [MaxSplitBlocks * kMaxFa2TileRows, head_dim]: rows of split contexts
  Buffer partial_lse_;  // fp32 [MaxSplitBlocks * kMaxFa2TileRows]

  // Over an fp8 cache: the blocks at hand as fp16, and a table that has each in its place, behind
  // zeros for what lies before a window.
  Buffer workspace_;
  KvLayerView workspace_view_;
  Buffer workspace_table_;  // int32 [table_zeros_ + blocks of the workspace]
  int table_zeros_ = 0;

  // Set by Plan.
  std::vector<Group> groups_;
  const int32_t* block_tables_ = nullptr;  // flat, device
  int block_tables_size_ = 0;
};

Status FlashInferPrefill::Reserve(const StepLimits& limits) {
  const bool is_widened = limits.kv_dtype == DType::kF8E4M3;
  const int64_t max_seqs = limits.max_seqs + 1;  // and what a division of tokens rounds up
  const int64_t max_groups = is_widened ? limits.max_seqs : 1;
  const int64_t fa3_works =
      MaxFa3Works(limits.max_tokens, max_seqs, limits.num_heads, limits.head_dim);
  const int64_t group = limits.num_heads / limits.num_kv_heads;
  // Contexts are split where their tiles are fewer than the thread blocks that split contexts.
  const int64_t fa2_works =
      limits.max_tokens * group / 64 + max_seqs + max_groups * MaxSplitBlocks(context_.num_sms);
  plan_capacity_ = 6 * fa3_works + max_groups * (context_.num_sms + 1) +  // FA3
                   3 * fa2_works + 5 * max_seqs + 2 * max_groups +        // FA2
                   2 * int64_t{limits.max_tokens} + max_groups +          // merging
                   2 * max_seqs + max_groups;                             // widening
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
  return is_widened ? ReserveWorkspace(limits) : OkStatus();
}

Status FlashInferPrefill::ReserveWorkspace(const StepLimits& limits) {
  // Room for one sequence of the longest context, and for every step without earlier context.
  table_zeros_ = BlocksOf(limits.max_context);
  const int num_blocks = std::max(table_zeros_, limits.max_tokens / kBlockTokens + limits.max_seqs);
  const KvLayout layout = {
      .dtype = DType::kF16, .num_kv_heads = limits.num_kv_heads, .head_dim = limits.head_dim};
  workspace_ = Buffer();  // gives the old memory back first
  GLOAM_ASSIGN_OR_RETURN(workspace_, AllocateDevice(num_blocks * layout.block_bytes()));
  workspace_view_ = {.data = workspace_.data(), .layout = layout, .num_blocks = num_blocks};
  std::vector<int32_t> table(table_zeros_ + num_blocks, 0);
  std::iota(table.begin() + table_zeros_, table.end(), 0);
  const size_t table_bytes = table.size() * sizeof(int32_t);
  GLOAM_ASSIGN_OR_RETURN(workspace_table_, AllocateDevice(table_bytes));
  GLOAM_CUDA_CHECK(
      cudaMemcpy(workspace_table_.data(), table.data(), table_bytes, cudaMemcpyHostToDevice));
  return OkStatus();
}

void FlashInferPrefill::Plan(const AttentionPlanParams& params, std::span<const int> seqs) {
  const SequenceBatch& batch = params.batch;
  GLOAM_CHECK(params.kv.head_dim == 64 || params.kv.head_dim == 128);
  GLOAM_CHECK(params.num_heads % params.kv.num_kv_heads == 0);
  std::vector<PrefillSeq> planned;
  for (const int seq : seqs) {
    const int begin = batch.host_cu_seqlens[seq];
    planned.push_back({.table_begin = seq * batch.max_blocks_per_seq,
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

  Staging& staging = staging_[next_staging_];
  next_staging_ = 1 - next_staging_;
  GLOAM_CUDA_CHECK(cudaEventSynchronize(staging.copied.get()));
  PlanWriter writer(staging.host.data(), plan_.data(), plan_capacity_);
  groups_.clear();
  if (params.kv.dtype == DType::kF8E4M3) {
    PlanWidening(params, planned, shape, &writer);
  } else {
    groups_.push_back({.seqs = std::move(planned)});
    block_tables_ = batch.block_tables;
    block_tables_size_ = batch.num_seqs * batch.max_blocks_per_seq;
  }
  for (Group& group : groups_) {
    PrefillSplit split;
    if (use_fa3()) {
      split = SplitPrefill(group.seqs, shape);
    } else {
      split.fa2 = group.seqs;
    }
    if (!split.fa3.empty()) group.fa3 = PlanFa3Works(params, split.fa3, shape, &writer);
    if (!split.fa2.empty()) PlanFa2Works(split.fa2, shape, &writer, &group);
  }
  GLOAM_CUDA_CHECK(cudaMemcpyAsync(plan_.data(), staging.host.data(), writer.bytes(),
                                   cudaMemcpyHostToDevice, context_.stream));
  GLOAM_CUDA_CHECK(cudaEventRecord(staging.copied.get(), context_.stream));
}

void FlashInferPrefill::PlanWidening(const AttentionPlanParams& params,
                                     std::span<const PrefillSeq> seqs, const PrefillShape& shape,
                                     PlanWriter* writer) {
  GLOAM_CHECK(workspace_view_.layout.num_kv_heads == params.kv.num_kv_heads &&
              workspace_view_.layout.head_dim == params.kv.head_dim);
  const auto num_blocks = static_cast<int>(workspace_view_.num_blocks);
  const std::vector<PlacedBlocks> placed = PlaceBlocks(seqs, shape.window_left, num_blocks);
  block_tables_ = static_cast<const int32_t*>(workspace_table_.data());
  block_tables_size_ = table_zeros_ + num_blocks;
  for (size_t begin = 0, end = 0; begin < seqs.size(); begin = end) {
    while (++end < seqs.size() && placed[end].place > 0) {
    }
    const auto count = static_cast<int>(end - begin);
    const PlacedBlocks& last = placed[end - 1];
    WidenParams widen = {.block_tables = params.batch.block_tables,
                         .num_seqs = count,
                         .num_blocks = last.place + last.count,
                         .block_elements = params.kv.block_elements(),
                         .out = workspace_.data(),
                         .stream = context_.stream};
    widen.places = writer->Add(count + 1, [&](int64_t i) {
      return i < count ? placed[begin + i].place : widen.num_blocks;
    });
    widen.sources = writer->Add(
        count, [&](int64_t i) { return seqs[begin + i].table_begin + placed[begin + i].first; });
    Group group = {.seqs = {seqs.begin() + begin, seqs.begin() + end}, .widen = widen};
    for (int i = 0; i < count; ++i) {
      const PlacedBlocks& blocks = placed[begin + i];
      group.seqs[i].table_begin = table_zeros_ + blocks.place - blocks.first;
    }
    groups_.push_back(std::move(group));
  }
}

Fa3Params FlashInferPrefill::PlanFa3Works(const AttentionPlanParams& params,
                                          std::span<const PrefillSeq> seqs,
                                          const PrefillShape& shape, PlanWriter* writer) const {
  const Fa3Plan plan = PlanFa3(seqs, shape);
  const int64_t num_works = static_cast<int64_t>(plan.works.size());
  const auto seq_of = [&](int64_t i) -> const PrefillSeq& { return seqs[plan.works[i].index]; };
  Fa3Params fa3;
  fa3.num_tokens = params.batch.num_tokens;
  fa3.num_heads = shape.num_heads;
  fa3.num_kv_heads = shape.num_kv_heads;
  fa3.block_tables = block_tables_;
  fa3.window_left = shape.window_left;
  fa3.num_thread_blocks = shape.num_sms;
  fa3.stream = context_.stream;
  fa3.work_begins = writer->Add(shape.num_sms + 1, [&](int64_t i) { return plan.begins[i]; });
  fa3.work_heads = writer->Add(num_works, [&](int64_t i) { return plan.works[i].head; });
  fa3.work_tiles = writer->Add(num_works, [&](int64_t i) { return plan.works[i].tile; });
  fa3.work_q_begins = writer->Add(num_works, [&](int64_t i) { return seq_of(i).q_begin; });
  fa3.work_table_begins = writer->Add(num_works, [&](int64_t i) { return seq_of(i).table_begin; });
  fa3.work_q_lens = writer->Add(num_works, [&](int64_t i) { return seq_of(i).q_len; });
  fa3.work_kv_lens = writer->Add(num_works, [&](int64_t i) { return seq_of(i).kv_len; });
  return fa3;
}

void FlashInferPrefill::PlanFa2Works(std::span<const PrefillSeq> seqs, const PrefillShape& shape,
                                     PlanWriter* writer, Group* group) const {
  const Fa2Plan plan = PlanFa2(seqs, shape);
  const int64_t num_works = static_cast<int64_t>(plan.works.size());
  const int64_t num_seqs = static_cast<int64_t>(seqs.size());
  Fa2Params& fa2 = group->fa2.emplace();
  fa2.num_heads = shape.num_heads;
  fa2.num_kv_heads = shape.num_kv_heads;
  fa2.num_seqs = static_cast<int>(num_seqs);
  fa2.num_works = static_cast<int>(num_works);
  fa2.tile_rows = plan.tile_rows;
  fa2.block_tables = block_tables_;
  fa2.window_left = shape.window_left;
  fa2.split = plan.piece_tokens > 0;
  fa2.max_shared_bytes = context_.max_shared_bytes;
  fa2.stream = context_.stream;
  fa2.table_begins = writer->Add(num_seqs + 1, [&](int64_t i) {
    return i < num_seqs ? seqs[i].table_begin : block_tables_size_;
  });
  fa2.q_begins = writer->Add(num_seqs, [&](int64_t i) { return seqs[i].q_begin; });
  fa2.q_lens = writer->Add(num_seqs, [&](int64_t i) { return seqs[i].q_len; });
  fa2.kv_lens = writer->Add(num_seqs, [&](int64_t i) { return seqs[i].kv_len; });
  fa2.work_seqs = writer->Add(num_works, [&](int64_t i) { return plan.works[i].index; });
  fa2.work_tiles = writer->Add(num_works, [&](int64_t i) { return plan.works[i].tile; });
  fa2.work_pieces = writer->Add(num_works, [&](int64_t i) { return plan.works[i].piece; });
  fa2.piece_tokens = writer->Add(1, [&](int64_t) { return plan.piece_tokens; });
  if (!fa2.split) {
    fa2.out_begins = fa2.q_begins;
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
  fa2.out_begins = writer->Add(num_seqs, [&](int64_t i) { return seq_begins[i]; });
  fa2.out = partial_.data();
  fa2.lse = static_cast<float*>(partial_lse_.data());
  MergePiecesParams& merge = group->merge;
  merge.partial = partial_.data();
  merge.lse = fa2.lse;
  merge.num_rows = static_cast<int>(out_rows.size());
  merge.num_heads = shape.num_heads;
  merge.head_dim = shape.head_dim;
  merge.stream = context_.stream;
  merge.begins = writer->Add(row_begins.size(), [&](int64_t i) { return row_begins[i]; });
  merge.out_rows = writer->Add(out_rows.size(), [&](int64_t i) { return out_rows[i]; });
}

void FlashInferPrefill::Run(const AttentionParams& params) {
  GLOAM_CHECK(params.out.dtype == DType::kBF16);
  GLOAM_CHECK(params.out.strides[1] == params.kv.layout.head_dim &&
              params.out.strides[0] == params.out.shape[1] * params.out.strides[1]);
  for (const Group& group : groups_) {
    if (group.widen) {
      WidenParams widen = *group.widen;
      widen.cache = params.kv.data;
      WidenBlocks(widen);
    }
    const KvLayerView& kv = group.widen ? workspace_view_ : params.kv;
    GLOAM_CHECK(kv.layout.dtype == DType::kBF16 || kv.layout.dtype == DType::kF16);
    GLOAM_CHECK(params.q.dtype == kv.layout.dtype);
    if (group.fa3) RunFa3(params, kv, *group.fa3);
    if (group.fa2) RunFa2(params, kv, group);
  }
}

void FlashInferPrefill::RunFa3([[maybe_unused]] const AttentionParams& params,
                               [[maybe_unused]] const KvLayerView& kv,
                               [[maybe_unused]] Fa3Params fa3) const {
#if GLOAM_WITH_HOPPER_KERNELS
  fa3.q = params.q.data;
  fa3.q_token_stride = params.q.strides[0];
  fa3.q_head_stride = params.q.strides[1];
  fa3.cache = kv.data;
  fa3.num_blocks = kv.num_blocks;
  fa3.scale = params.scale;
  fa3.out = params.out.data;
  const bool is_bf16 = params.q.dtype == DType::kBF16;
  if (kv.layout.head_dim == 64) {
    is_bf16 ? RunFa3Bf16x64(fa3) : RunFa3F16x64(fa3);
  } else {
    is_bf16 ? RunFa3Bf16x128(fa3) : RunFa3F16x128(fa3);
  }
#endif
}

void FlashInferPrefill::RunFa2(const AttentionParams& params, const KvLayerView& kv,
                               const Group& group) const {
  Fa2Params fa2 = *group.fa2;
  fa2.q = params.q.data;
  fa2.q_token_stride = params.q.strides[0];
  fa2.q_head_stride = params.q.strides[1];
  fa2.keys = kv.Keys<uint16_t>(0, 0);
  fa2.values = kv.Values<uint16_t>(0, 0);
  fa2.scale = params.scale;
  if (!fa2.split) fa2.out = params.out.data;
  const bool is_bf16 = params.q.dtype == DType::kBF16;
  if (kv.layout.head_dim == 64) {
    is_bf16 ? RunFa2Bf16x64(fa2) : RunFa2F16x64(fa2);
  } else {
    is_bf16 ? RunFa2Bf16x128(fa2) : RunFa2F16x128(fa2);
  }
  if (!fa2.split) return;
  MergePiecesParams merge = group.merge;
  merge.out = params.out.data;
  MergePieces(merge);
}

}  // namespace

std::unique_ptr<PrefillAttention> PrefillAttention::Make(const DeviceContext& context) {
  return std::make_unique<FlashInferPrefill>(context);
}

}  // namespace gloam::cuda
