// Sparse decode attention: a task per (row, KV head) that runs all stages on one thread; threads
// that have no task help with the stages that look at every candidate. The stages themselves are in
// kernels/selectors/, estimate/ and prune.cc; what is kept is attended by the arithmetic of dense
// attention (kernels/cpu/attention/tile.h), where it lies in the cache.
#include "kernels/sparse_attention.h"

#include <algorithm>
#include <cfloat>
#include <chrono>
#include <cmath>
#include <limits>

#include "kernels/cpu/attention/tile.h"
#include "kernels/cpu/carver.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/sparse/tail.h"
#include "kernels/cpu/sparse/token_scan.h"
#include "kernels/estimate.h"
#include "kernels/prune.h"

namespace gloam::cpu {
namespace {

// A piece of the estimates takes about 5 us.
constexpr int64_t kEstimatedBlocksPerPiece = 32;

// Sizes of one step's largest task.
struct TaskShape {
  int num_heads = 0;  // query heads of a KV head's group
  int head_dim = 0;
  int64_t num_blocks = 0;  // full blocks

  int64_t num_tokens() const { return num_blocks * kBlockTokens; }
  // Groups that the tokens and those of an open block may fill.
  int64_t num_groups() const { return num_blocks / kGroupBlocks + 1; }
};

// What one thread works in.
struct TaskMemory {
  TileWorkspace workspace;
  AttentionPartial part, total, tail;
  int32_t* block_table = nullptr;    // [blocks + 1] blocks with a candidate, and the open one
  TokenMask* masks = nullptr;        // [heads][blocks] candidates
  TokenMask* kept = nullptr;         // [heads][blocks]
  TokenMask* always_kept = nullptr;  // [blocks]
  TokenMask* loaded = nullptr;       // [blocks] union of the heads
  float* logits = nullptr;           // [heads][tokens] estimated
  float* weights = nullptr;          // [heads][tokens]
  TokenMask* open_masks = nullptr;   // [heads]
  float* open_logits = nullptr;      // [heads][16]
  float* masses = nullptr;           // [heads][blocks]
  int32_t* tail_blocks = nullptr;    // [blocks]
  int32_t* tokens = nullptr;         // [tokens + 16] to attend to
  const std::byte** rows = nullptr;  // [tokens + 16] their keys
  uint32_t* row_masks = nullptr;     // [heads][groups]
  float* row_logits = nullptr;       // [heads][tokens of the groups]

  TaskMemory(Carver& carver, const TaskShape& shape) {
    const int64_t heads = shape.num_heads;
    const int64_t dim = shape.head_dim;
    workspace.queries = carver.Take<float>(heads * dim);
    workspace.ordered_queries = carver.Take<float>(heads * dim);
    workspace.keys = carver.Take<float>(dim * kGroupTokens);
    workspace.values = carver.Take<float>(dim * kGroupTokens);
    workspace.probs = carver.Take<float>(heads * kGroupTokens);
    workspace.lane_sums = carver.Take<float>(heads * kBlockTokens);
    for (AttentionPartial* partial : {&part, &total, &tail}) {
      partial->acc = carver.Take<float>(heads * dim);
      partial->sum = carver.Take<float>(heads);
      partial->max = carver.Take<float>(heads);
    }
    block_table = carver.Take<int32_t>(shape.num_blocks + 1);
    masks = carver.Take<TokenMask>(heads * shape.num_blocks);
    kept = carver.Take<TokenMask>(heads * shape.num_blocks);
    always_kept = carver.Take<TokenMask>(shape.num_blocks);
    loaded = carver.Take<TokenMask>(shape.num_blocks);
    logits = carver.Take<float>(heads * shape.num_tokens());
    weights = carver.Take<float>(heads * shape.num_tokens());
    open_masks = carver.Take<TokenMask>(heads);
    open_logits = carver.Take<float>(heads * kBlockTokens);
    masses = carver.Take<float>(heads * shape.num_blocks);
    tail_blocks = carver.Take<int32_t>(shape.num_blocks);
    tokens = carver.Take<int32_t>(shape.num_tokens() + kBlockTokens);
    rows = carver.Take<const std::byte*>(shape.num_tokens() + kBlockTokens);
    row_masks = carver.Take<uint32_t>(heads * shape.num_groups());
    row_logits = carver.Take<float>(heads * shape.num_groups() * kGroupTokens);
  }
};

// Adds the time since the last lap to a stage; does nothing without `times`.
class StageClock {
 public:
  explicit StageClock(SparseStageTimes* times) : times_(times) {
    if (times_ != nullptr) last_ = Clock::now();
  }
  void Lap(std::atomic<int64_t> SparseStageTimes::*stage) {
    if (times_ == nullptr) return;
    const Clock::time_point now = Clock::now();
    const auto elapsed = std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_);
    (times_->*stage).fetch_add(elapsed.count(), std::memory_order_relaxed);
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  SparseStageTimes* times_;
  Clock::time_point last_;
};

void AddTokens(const TokenMask* more, int64_t num_blocks, TokenMask* masks) {
  for (int64_t i = 0; i < num_blocks; ++i) masks[i] |= more[i];
}

// All stages for one row and KV head.
class HeadTask {
 public:
  HeadTask(const SparseAttentionParams& params, const SparseRow& row, int kv_head,
           const TaskMemory& memory, const InnerLoop& loop);

  SparseHeadStats Run(SelectionMemory& selections, size_t slot);

 private:
  void StageQueries();
  void SetCandidates();
  void SetAlwaysKept();
  void Select(SelectionMemory& selections, size_t slot);
  // Leaves the blocks without a candidate out of everything that follows.
  void DropOtherBlocks();
  void EstimateLogits();
  void ComputeOpenLogits();
  void Prune();
  void Unite();
  // memory_.loaded := the union of the heads' masks, [num_heads][num_blocks].
  void UniteHeads(const TokenMask* masks);
  // Every head's masks := memory_.loaded.
  void GiveToHeads(TokenMask* masks) const;
  // Lists the loaded tokens, ascending, and those of the open block.
  void ListTokens();
  void Attend();
  void SumTail();
  void WriteOutput();
  SparseHeadStats Stats();
  float TrueMass();

  // Notes which heads see token number i of the list, and its estimated logits.
  void NoteMasks(int64_t i);
  // Of the list.
  int64_t NumGroups() const { return (num_tokens_ + kGroupTokens - 1) / kGroupTokens; }
  int64_t BlockId(int64_t block) const { return keys_.block_table[block]; }
  const std::byte* KeyRow(int64_t token) const {
    return static_cast<const std::byte*>(params_.kv.data) +
           BlockId(token / kBlockTokens) * params_.kv.layout.block_bytes() + kv_head_ * run_bytes_ +
           token % kBlockTokens * row_bytes_;
  }
  TokenMask* MasksOf(TokenMask* masks, int head) const { return masks + head * num_blocks_; }
  float* RowOf(float* rows, int head) const { return rows + head * num_blocks_ * kBlockTokens; }
  // Whether the heads of the group may attend to different tokens.
  bool UsesRowMasks() const { return !policy_.pruner.share_group && num_heads_ > 1; }
  // What one head selects is estimated for the whole group: with shared sets all may keep it.
  bool SharesCandidates() const {
    return policy_.pruner.share_group && policy_.pruner.type != PrunerType::kNone;
  }
  bool NeedsEstimate() const {
    return policy_.pruner.type != PrunerType::kNone || policy_.tail != TailType::kNone ||
           policy_.use_estimated_weights_in_attn;
  }

  const SparseAttentionParams& params_;
  const SparseRow& row_;
  const SparsityPolicy& policy_;
  const int kv_head_;
  const TaskMemory& memory_;
  const InnerLoop loop_;
  const int head_dim_;
  const int num_heads_;
  const int64_t context_len_;
  const KeyBlocks context_;  // all full blocks
  const int num_open_;       // tokens of the open block, which comes after them: 1 to 16
  const int64_t row_bytes_;  // of a key or value
  const int64_t run_bytes_;
  // What is still in question: all full blocks, then those with a candidate. Tokens are counted
  // through these blocks, the open one last.
  KeyBlocks keys_;
  int64_t num_blocks_;  // of keys_
  std::vector<PruneResult>& results_;
  int64_t num_candidates_ = 0;  // over the heads
  int64_t num_kept_ = 0;        // over the heads, before sharing
  int64_t num_tokens_ = 0;      // to attend to
};

std::vector<PruneResult>& ThreadResults(int num_heads) {
  thread_local std::vector<PruneResult> results;
  results.assign(num_heads, {});
  return results;
}

int64_t ContextOf(const SparseAttentionParams& params, const SparseRow& row) {
  return int64_t{params.batch.positions[row.token]} + 1;
}

int64_t FullBlocksOf(int64_t context_len) { return (context_len - 1) / kBlockTokens; }

// The full blocks of a row's context, for one KV head.
KeyBlocks ContextBlocks(const SparseAttentionParams& params, const SparseRow& row, int kv_head) {
  KeyBlocks keys;
  keys.kv = params.kv;
  keys.sidecars = params.sidecars;
  keys.block_table = params.batch.block_tables + int64_t{row.seq} * params.batch.max_blocks_per_seq;
  keys.num_blocks = FullBlocksOf(ContextOf(params, row));
  keys.kv_head = kv_head;
  return keys;
}

HeadTask::HeadTask(const SparseAttentionParams& params, const SparseRow& row, int kv_head,
                   const TaskMemory& memory, const InnerLoop& loop)
    : params_(params),
      row_(row),
      policy_(*row.policy),
      kv_head_(kv_head),
      memory_(memory),
      loop_(loop),
      head_dim_(params.kv.layout.head_dim),
      num_heads_(static_cast<int>(params.q.shape[1]) / params.kv.layout.num_kv_heads),
      context_len_(ContextOf(params, row)),
      context_(ContextBlocks(params, row, kv_head)),
      num_open_(static_cast<int>(context_len_ - context_.num_blocks * kBlockTokens)),
      row_bytes_(head_dim_ * static_cast<int64_t>(DTypeBytes(params.kv.layout.dtype))),
      run_bytes_(row_bytes_ * kBlockTokens),
      keys_(context_),
      num_blocks_(context_.num_blocks),
      results_(ThreadResults(num_heads_)) {}

SparseHeadStats HeadTask::Run(SelectionMemory& selections, size_t slot) {
  StageClock clock(params_.times);
  StageQueries();
  SetCandidates();
  SetAlwaysKept();
  Select(selections, slot);
  DropOtherBlocks();
  clock.Lap(&SparseStageTimes::select);
  if (NeedsEstimate()) EstimateLogits();
  clock.Lap(&SparseStageTimes::estimate);
  Prune();
  Unite();
  ListTokens();
  clock.Lap(&SparseStageTimes::prune);
  // The two read different things, and need nothing of each other.
  const bool has_tail = policy_.tail == TailType::kBlockMean;
  loop_.For(has_tail ? 2 : 1, [&](int64_t part, int /*thread*/) {
    StageClock part_clock(params_.times);
    if (part == 0) {
      Attend();
      part_clock.Lap(&SparseStageTimes::attend);
    } else {
      SumTail();
      part_clock.Lap(&SparseStageTimes::tail);
    }
  });
  if (has_tail) FoldPartial(memory_.total, memory_.tail, num_heads_, head_dim_);
  WriteOutput();
  return Stats();
}

void HeadTask::StageQueries() {
  const TensorView& q = params_.q;
  for (int head = 0; head < num_heads_; ++head) {
    const int64_t at =
        row_.token * q.strides[0] + (int64_t{kv_head_} * num_heads_ + head) * q.strides[1];
    ScaleRow(static_cast<const float*>(q.data) + at, params_.scale, head_dim_,
             memory_.workspace.queries + int64_t{head} * head_dim_);
  }
}

// Every full block, less what a compressor has dropped.
void HeadTask::SetCandidates() {
  std::fill_n(memory_.loaded, num_blocks_, kAllTokens);
  if (row_.compressed != nullptr) {
    const TokenMask* prompt = row_.compressed->Head(params_.layer, kv_head_);
    std::copy_n(prompt, std::min(row_.compressed->num_blocks, num_blocks_), memory_.loaded);
  }
  GiveToHeads(memory_.masks);
}

void HeadTask::SetAlwaysKept() {
  const int64_t num_sinks = policy_.sink_tokens;
  const int64_t first_recent = context_len_ - policy_.recent_tokens;
  std::fill_n(memory_.always_kept, num_blocks_, kNoTokens);
  for (int64_t block = 0; block < num_blocks_ && block * kBlockTokens < num_sinks; ++block) {
    const int64_t count = std::min<int64_t>(num_sinks - block * kBlockTokens, kBlockTokens);
    memory_.always_kept[block] |= kAllTokens >> (kBlockTokens - count);
  }
  for (int64_t block = num_blocks_ - 1; block >= 0 && (block + 1) * kBlockTokens > first_recent;
       --block) {
    const int64_t skipped = std::max<int64_t>(0, first_recent - block * kBlockTokens);
    memory_.always_kept[block] |= static_cast<TokenMask>(kAllTokens << skipped);
  }
  for (int64_t block = 0; block < num_blocks_; ++block) {
    memory_.always_kept[block] &= memory_.masks[block];
  }
}

void HeadTask::Select(SelectionMemory& selections, size_t slot) {
  SelectParams select;
  select.config = &policy_.selector;
  select.keys = keys_;
  select.queries = memory_.workspace.queries;
  select.num_heads = num_heads_;
  select.head_dim = head_dim_;
  select.context_len = context_len_;
  select.layer = params_.layer;
  select.masks = memory_.masks;
  select.remembered = selections.Recall(slot);
  select.scratch = memory_.weights;
  select.loop = loop_;
  policy_.selector.selector->Select(select);
  if (select.remember) {
    selections.Remember(slot, {memory_.masks, static_cast<size_t>(num_heads_ * num_blocks_)});
  }
  if (SharesCandidates()) {
    UniteHeads(memory_.masks);
    AddTokens(memory_.always_kept, num_blocks_, memory_.loaded);
    GiveToHeads(memory_.masks);
    num_candidates_ = num_heads_ * CountTokens(memory_.loaded, num_blocks_);
    return;
  }
  for (int head = 0; head < num_heads_; ++head) {
    TokenMask* masks = MasksOf(memory_.masks, head);
    AddTokens(memory_.always_kept, num_blocks_, masks);
    num_candidates_ += CountTokens(masks, num_blocks_);
  }
}

void HeadTask::DropOtherBlocks() {
  // Means over more than a block go by position.
  if (policy_.tail != TailType::kNone && policy_.tail_block != kBlockTokens) return;
  int64_t count = 0;
  int32_t* table = memory_.block_table;
  if (!SharesCandidates()) UniteHeads(memory_.masks);  // else Select has
  for (int64_t block = 0; block < num_blocks_; ++block) {
    table[count] = static_cast<int32_t>(block);
    count += memory_.loaded[block] != kNoTokens;
  }
  if (count == num_blocks_) return;
  if (SharesCandidates()) {
    for (int64_t i = 0; i < count; ++i) memory_.loaded[i] = memory_.loaded[table[i]];
    for (int head = 0; head < num_heads_; ++head) {
      std::copy_n(memory_.loaded, count, memory_.masks + head * count);
    }
  } else {
    for (int head = 0; head < num_heads_; ++head) {
      const TokenMask* from = MasksOf(memory_.masks, head);
      TokenMask* to = memory_.masks + head * count;  // never behind what is still to be read
      for (int64_t i = 0; i < count; ++i) to[i] = from[table[i]];
    }
  }
  for (int64_t i = 0; i < count; ++i) memory_.always_kept[i] = memory_.always_kept[table[i]];
  for (int64_t i = 0; i < count; ++i) table[i] = context_.block_table[table[i]];
  table[count] = context_.block_table[num_blocks_];
  keys_.block_table = table;
  keys_.num_blocks = num_blocks_ = count;
}

void HeadTask::EstimateLogits() {
  ComputeOpenLogits();
  loop_.ForPieces(num_blocks_, kEstimatedBlocksPerPiece, [&](int64_t begin, int64_t end) {
    Estimate({.estimator = policy_.estimator,
              .keys = keys_,
              .queries = memory_.workspace.queries,
              .num_heads = num_heads_,
              .head_dim = head_dim_,
              .masks = memory_.masks,
              .logits = memory_.logits,
              .begin_block = begin,
              .end_block = end});
  });
}

// Exact logits of the open block, and of nothing else.
void HeadTask::ComputeOpenLogits() {
  KeyBlocks open = keys_;
  open.block_table += num_blocks_;
  open.num_blocks = 1;
  std::fill_n(memory_.open_masks, num_heads_,
              static_cast<TokenMask>(kAllTokens >> (kBlockTokens - num_open_)));
  Estimate({.estimator = {.type = EstimatorType::kNone},
            .keys = open,
            .queries = memory_.workspace.queries,
            .num_heads = num_heads_,
            .head_dim = head_dim_,
            .masks = memory_.open_masks,
            .logits = memory_.open_logits});
}

void HeadTask::Prune() {
  if (!NeedsEstimate()) {
    std::copy_n(memory_.masks, num_heads_ * num_blocks_, memory_.kept);
    num_kept_ = num_candidates_;
    return;
  }
  loop_.For(num_heads_, [&](int64_t index, int /*thread*/) {
    const int head = static_cast<int>(index);
    results_[head] = cpu::Prune({.pruner = policy_.pruner,
                                 .logits = RowOf(memory_.logits, head),
                                 .candidates = MasksOf(memory_.masks, head),
                                 .always_kept = memory_.always_kept,
                                 .num_blocks = num_blocks_,
                                 .open_logits = memory_.open_logits + head * kBlockTokens,
                                 .num_open = num_open_,
                                 .weights = RowOf(memory_.weights, head),
                                 .kept = MasksOf(memory_.kept, head)});
  });
  for (const PruneResult& result : results_) num_kept_ += result.num_kept;
}

// What the group reads; with share_group it is also what each of its heads attends to.
void HeadTask::Unite() {
  UniteHeads(memory_.kept);
  if (policy_.pruner.share_group) GiveToHeads(memory_.kept);
}

void HeadTask::UniteHeads(const TokenMask* masks) {
  std::copy_n(masks, num_blocks_, memory_.loaded);
  for (int head = 1; head < num_heads_; ++head) {
    AddTokens(masks + head * num_blocks_, num_blocks_, memory_.loaded);
  }
}

void HeadTask::GiveToHeads(TokenMask* masks) const {
  for (int head = 0; head < num_heads_; ++head) {
    std::copy_n(memory_.loaded, num_blocks_, MasksOf(masks, head));
  }
}

void HeadTask::NoteMasks(int64_t i) {
  const int64_t token = memory_.tokens[i];
  const int64_t judged = token / kBlockTokens;
  const int64_t num_groups = NumGroups();
  for (int head = 0; head < num_heads_; ++head) {
    const bool open = judged == num_blocks_;
    const bool sees =
        open || (MasksOf(memory_.kept, head)[judged] >> (token % kBlockTokens) & 1) != 0;
    uint32_t& mask = memory_.row_masks[head * num_groups + i / kGroupTokens];
    mask |= uint32_t{sees} << (i % kGroupTokens);
    if (policy_.use_estimated_weights_in_attn) {
      memory_.row_logits[head * num_groups * kGroupTokens + i] =
          open ? memory_.open_logits[head * kBlockTokens + token % kBlockTokens]
               : RowOf(memory_.logits, head)[token];
    }
  }
}

void HeadTask::ListTokens() {
  num_tokens_ = cpu::ListTokens(memory_.loaded, num_blocks_, memory_.tokens);
  for (int i = 0; i < num_open_; ++i) {
    memory_.tokens[num_tokens_++] = static_cast<int32_t>(num_blocks_ * kBlockTokens + i);
  }
}

void HeadTask::Attend() {
  const int64_t values_offset = params_.kv.layout.num_kv_heads * run_bytes_;
  for (int64_t i = 0; i < num_tokens_; ++i) {
    const std::byte* row = memory_.rows[i] = KeyRow(memory_.tokens[i]);
    if (i >= kGroupTokens) continue;
    // Each group is fetched while the one before it is computed; the first one here.
    PrefetchRange(row, row_bytes_);
    PrefetchRange(row + values_offset, row_bytes_);
  }
  const int64_t padded = (num_tokens_ + kBlockTokens - 1) / kBlockTokens * kBlockTokens;
  std::fill(memory_.rows + num_tokens_, memory_.rows + padded, memory_.rows[num_tokens_ - 1]);

  AttentionTile tile;
  tile.kv = params_.kv;
  tile.num_tokens = 1;
  tile.heads_per_kv = num_heads_;
  tile.first_position = num_tokens_ - 1;
  tile.window = std::numeric_limits<int32_t>::max();
  tile.rows = memory_.rows;
  tile.values_offset = values_offset;
  const int64_t num_groups = NumGroups();
  if (UsesRowMasks() || policy_.use_estimated_weights_in_attn) {
    std::fill_n(memory_.row_masks, num_heads_ * num_groups, 0u);
    for (int64_t i = 0; i < num_tokens_; ++i) NoteMasks(i);
  }
  if (UsesRowMasks()) {
    tile.row_masks = memory_.row_masks;
    tile.row_mask_stride = num_groups;
  }
  if (policy_.use_estimated_weights_in_attn) {
    tile.logits = memory_.row_logits;
    tile.logits_stride = num_groups * kGroupTokens;
  }
  ClearPartial(memory_.total, num_heads_, head_dim_);
  for (int64_t first = 0; first < num_tokens_; first += kPartitionTokens) {
    AttendPartition(tile, first / kPartitionTokens, memory_.workspace, memory_.part);
    FoldPartial(memory_.total, memory_.part, num_heads_, head_dim_);
  }
}

void HeadTask::SumTail() {
  const TailParams tail = {.keys = keys_,
                           .tail_block = policy_.tail_block,
                           .num_heads = num_heads_,
                           .head_dim = head_dim_,
                           .weights = memory_.weights,
                           .kept = memory_.kept,
                           .masses = memory_.masses,
                           .listed = memory_.tail_blocks};
  const AttentionPartial& sum = memory_.tail;
  const int64_t num_blocks = FindTail(tail, sum.sum);
  std::fill_n(sum.acc, int64_t{num_heads_} * head_dim_, 0.0f);
  AddTailMeans(tail, num_blocks, sum.acc);
  for (int head = 0; head < num_heads_; ++head) {
    // Without a tail the fold must not touch the head's result.
    sum.max[head] = sum.sum[head] > 0 ? results_[head].max_logit : -FLT_MAX;
  }
}

void HeadTask::WriteOutput() {
  const TensorView& out = params_.out;
  for (int head = 0; head < num_heads_; ++head) {
    const int64_t at =
        row_.token * out.strides[0] + (int64_t{kv_head_} * num_heads_ + head) * out.strides[1];
    ScaleRow(memory_.total.acc + int64_t{head} * head_dim_, 1.0f / memory_.total.sum[head],
             head_dim_, static_cast<float*>(out.data) + at);
  }
}

SparseHeadStats HeadTask::Stats() {
  SparseHeadStats stats;
  stats.context = static_cast<int>(context_len_);
  const auto heads = static_cast<float>(num_heads_);
  const auto open = static_cast<float>(num_open_);
  stats.candidates = static_cast<float>(num_candidates_) / heads + open;
  stats.kept = static_cast<float>(num_kept_) / heads + open;
  stats.loaded = static_cast<int>(CountTokens(memory_.loaded, num_blocks_)) + num_open_;
  if (row_.measure_true_mass) stats.true_mass = TrueMass();
  return stats;
}

// Sum of exp(logit - max) over the tokens of `masks`; null: over all.
double MassOf(const float* logits, const TokenMask* masks, int64_t num_blocks, float max) {
  double mass = 0;
  for (int64_t i = 0; i < num_blocks * kBlockTokens; ++i) {
    if (masks != nullptr && (masks[i / kBlockTokens] >> (i % kBlockTokens) & 1) == 0) continue;
    mass += std::exp(logits[i] - max);
  }
  return mass;
}

// Share of the full softmax that falls on the attended tokens, mean over the heads.
float HeadTask::TrueMass() {
  std::vector<float> max(num_heads_);
  std::vector<double> all(num_heads_);
  EstimateParams exact;
  exact.estimator = {.type = EstimatorType::kNone};
  exact.keys = context_;
  exact.queries = memory_.workspace.queries;
  exact.num_heads = num_heads_;
  exact.head_dim = head_dim_;
  exact.logits = memory_.logits;
  const std::vector<TokenMask> everything(num_heads_ * context_.num_blocks, kAllTokens);
  exact.masks = everything.data();
  Estimate(exact);
  ComputeOpenLogits();
  const int64_t num_tokens = context_.num_blocks * kBlockTokens;
  for (int head = 0; head < num_heads_; ++head) {
    const float* logits = memory_.logits + head * num_tokens;
    const float* open = memory_.open_logits + head * kBlockTokens;
    max[head] = *std::max_element(open, open + num_open_);
    for (int64_t i = 0; i < num_tokens; ++i) max[head] = std::max(max[head], logits[i]);
    all[head] = MassOf(logits, nullptr, context_.num_blocks, max[head]);
  }

  exact.keys = keys_;
  exact.masks = memory_.kept;
  Estimate(exact);
  double share = 0;
  for (int head = 0; head < num_heads_; ++head) {
    double open = 0;
    for (int i = 0; i < num_open_; ++i) {
      open += std::exp(memory_.open_logits[head * kBlockTokens + i] - max[head]);
    }
    const double kept =
        MassOf(RowOf(memory_.logits, head), MasksOf(memory_.kept, head), num_blocks_, max[head]);
    share += (kept + open) / (all[head] + open);
  }
  return static_cast<float>(share / num_heads_);
}

void CheckShapes(const SparseAttentionParams& params) {
  const TensorView& q = params.q;
  const KvLayout& layout = params.kv.layout;
  GLOAM_CHECK(q.rank == 3 && params.out.rank == 3 && params.out.shape == q.shape);
  GLOAM_CHECK(q.dtype == DType::kF32 && params.out.dtype == DType::kF32);
  GLOAM_CHECK(q.shape[0] == params.batch.num_tokens && q.shape[2] == layout.head_dim);
  GLOAM_CHECK(layout.num_kv_heads > 0 && q.shape[1] % layout.num_kv_heads == 0);
  GLOAM_CHECK(layout.head_dim > 0 && layout.head_dim % 16 == 0 &&
              IsKvDType(layout.dtype, Device::kCpu));
  for (const SparseRow& row : params.rows) {
    GLOAM_CHECK(row.policy != nullptr && row.token >= 0 && row.token < params.batch.num_tokens);
    GLOAM_CHECK(row.compressed == nullptr || row.compressed->complete);
  }
}

}  // namespace

void SparseAttention(const SparseAttentionParams& params, ThreadPool& pool, Scratch& scratch,
                     SelectionMemory& memory) {
  CheckShapes(params);
  if (params.rows.empty()) return;
  const int num_kv_heads = params.kv.layout.num_kv_heads;
  TaskShape shape;
  shape.num_heads = static_cast<int>(params.q.shape[1]) / num_kv_heads;
  shape.head_dim = params.kv.layout.head_dim;
  for (const SparseRow& row : params.rows) {
    shape.num_blocks = std::max(shape.num_blocks, FullBlocksOf(ContextOf(params, row)));
  }
  Carver counter(nullptr);
  TaskMemory(counter, shape);
  const int64_t thread_bytes = counter.used_bytes();
  auto* base = static_cast<char*>(scratch.Get(thread_bytes * pool.num_threads()));

  memory.BeginLayer(params.layer, static_cast<size_t>(params.batch.num_tokens) * num_kv_heads);
  const auto num_tasks = static_cast<int64_t>(params.rows.size()) * num_kv_heads;
  pool.ParallelFor(num_tasks, [&](int64_t index, int thread) {
    Carver carver(base + thread * thread_bytes);
    const TaskMemory task_memory(carver, shape);
    const SparseRow& row = params.rows[index / num_kv_heads];
    const int kv_head = static_cast<int>(index % num_kv_heads);
    const size_t slot = static_cast<size_t>(row.token) * num_kv_heads + kv_head;
    params.stats[index] =
        HeadTask(params, row, kv_head, task_memory, {pool, thread}).Run(memory, slot);
  });
}

}  // namespace gloam::cpu
