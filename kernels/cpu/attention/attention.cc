// Plan and threads of attention; the arithmetic is in tile.cc.
//
// Work is cut into tiles: some consecutive tokens of a sequence for one KV head, or for several
// where a head has few rows. A task is a tile, or, where there are too few tiles to keep the
// threads busy, some partitions of a tile's context; the task that finishes a tile last folds its
// partials in ascending order. No cut changes a result. Decode reads every visible key and value
// once; prefill does 4 * rows * context * head_dim FLOPs.
#include "kernels/attention.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <new>

#include "kernels/cpu/attention/tile.h"
#include "kernels/cpu/carver.h"
#include "kernels/cpu/ceil_div.h"
#include "kernels/cpu/cpu_kernels.h"

namespace gloam::cpu {
namespace {

// Query rows that share one transposition of the keys: enough to hide it, few enough that queries
// and accumulators stay in the L1 cache beside a group's keys and values.
constexpr int kTileRows = 48;
// Cost of a token of context for a tile, in rows: what is done once for all rows.
constexpr int64_t kTokenCost = 4;
// Work (rows * tokens) below which a second thread does not pay.
constexpr int64_t kMinParallelCost = 4096;
constexpr int64_t kTasksPerThread = 12;
// Partials of split tiles may take this much memory; beyond it a tile stays whole.
constexpr int64_t kMaxPartialBytes = int64_t{64} << 20;

// Some consecutive tokens of one sequence and some neighbouring KV heads.
struct TokenTile {
  int seq = 0;
  int kv_head = 0;  // the first
  int num_kv_heads = 0;
  int64_t first_token = 0;  // in the batch
  int num_tokens = 0;
  int64_t first_partition = 0;  // partitions of the context that some token sees
  int64_t num_partitions = 0;
  int64_t cost = 0;  // in rows * tokens
};

// What one task does: a tile's whole context, or some partitions of it.
struct WorkItem {
  TokenTile tile;
  int64_t first_partition = 0;
  int64_t num_partitions = 0;
  int split = -1;  // index of the tile's SplitTile, or -1: the item is the whole tile
};

// Where the partials of one tile meet.
struct SplitTile {
  int64_t num_items = 0;
  int64_t first_byte = 0;  // of its partials, [num_partitions]
};

AttentionPartial TakePartial(Carver& carver, int64_t num_rows, int head_dim) {
  AttentionPartial partial;
  partial.acc = carver.Take<float>(num_rows * head_dim);
  partial.sum = carver.Take<float>(num_rows);
  partial.max = carver.Take<float>(num_rows);
  return partial;
}

// What one thread works in.
struct ThreadMemory {
  TileWorkspace workspace;
  AttentionPartial part;
  AttentionPartial total;

  ThreadMemory(Carver& carver, int64_t num_rows, int head_dim) {
    workspace.queries = carver.Take<float>(num_rows * head_dim);
    workspace.ordered_queries = carver.Take<float>(num_rows * head_dim);
    workspace.keys = carver.Take<float>(head_dim * kGroupTokens);
    workspace.values = carver.Take<float>(head_dim * kGroupTokens);
    workspace.probs = carver.Take<float>(num_rows * kGroupTokens);
    workspace.lane_sums = carver.Take<float>(num_rows * kBlockTokens);
    part = TakePartial(carver, num_rows, head_dim);
    total = TakePartial(carver, num_rows, head_dim);
  }
};

class AttentionRun {
 public:
  AttentionRun(const AttentionParams& params, int num_threads);

  void Execute(ThreadPool& pool, Scratch& scratch);

 private:
  void CheckShapes() const;
  // Calls f(tile) for every tile, those with the longest context of a sequence first.
  template <typename F>
  void ForEachTile(const F& f) const;
  // Counts items, splits and partials, and writes the plan where there is memory for it.
  void PlanItems();
  int64_t PartialBytes(int64_t num_rows) const;

  int64_t RowsOf(const TokenTile& tile) const {
    return int64_t{tile.num_tokens} * tile.num_kv_heads * heads_per_kv_;
  }
  // Where a row of a tile lies in q or out, in elements.
  int64_t OffsetOf(const TokenTile& tile, int row, const TensorView& x) const;
  const int32_t* BlockTableOf(const TokenTile& tile) const {
    return params_.batch.block_tables + int64_t{tile.seq} * params_.batch.max_blocks_per_seq;
  }

  // `next` is probably this thread's next item, or null.
  void RunItem(const WorkItem& item, const WorkItem* next, int thread) const;
  // The first group of blocks that a tile reads in a partition.
  HeadBlocks FirstBlocks(const TokenTile& tile, int64_t partition) const;
  AttentionPartial PartialOf(const WorkItem& item, int64_t partition) const;
  void WriteOutput(const TokenTile& tile, const AttentionPartial& total) const;

  const AttentionParams& params_;
  const int head_dim_;
  const int num_kv_heads_;
  const int heads_per_kv_;
  const int tokens_per_tile_;
  int kv_heads_per_tile_;  // for tiles of few rows
  const int64_t window_;

  int num_threads_;
  int64_t split_cost_ = 0;  // a tile that costs more is split
  int64_t max_rows_ = 0;    // of a tile

  int64_t num_items_ = 0;
  int64_t num_splits_ = 0;
  int64_t partial_bytes_ = 0;
  int64_t thread_bytes_ = 0;

  // In scratch memory.
  WorkItem* items_ = nullptr;
  SplitTile* splits_ = nullptr;
  std::atomic<int64_t>* counters_ = nullptr;  // [num_splits_] items still to finish
  char* partials_ = nullptr;
  char* thread_memory_ = nullptr;
};

AttentionRun::AttentionRun(const AttentionParams& params, int num_threads)
    : params_(params),
      head_dim_(params.kv.layout.head_dim),
      num_kv_heads_(params.kv.layout.num_kv_heads),
      heads_per_kv_(static_cast<int>(params.q.shape[1]) / num_kv_heads_),
      tokens_per_tile_(std::max(1, kTileRows / heads_per_kv_)),
      kv_heads_per_tile_(num_kv_heads_),
      window_(params.sliding_window > 0 ? params.sliding_window
                                        : std::numeric_limits<int32_t>::max()),
      num_threads_(num_threads) {
  CheckShapes();
  int64_t total_cost = 0;
  int64_t num_pieces = 0;
  ForEachTile([&](const TokenTile& tile) {
    total_cost += tile.cost;
    num_pieces += tile.num_partitions;
    max_rows_ = std::max(max_rows_, RowsOf(tile));
  });
  if (total_cost < kMinParallelCost) num_threads_ = 1;
  if (num_pieces < num_threads_) {
    kv_heads_per_tile_ = static_cast<int>(CeilDiv(num_kv_heads_, num_threads_));
  }
  split_cost_ = num_threads_ == 1
                    ? std::numeric_limits<int64_t>::max()
                    : std::max<int64_t>(1, total_cost / (num_threads_ * kTasksPerThread));
  PlanItems();
}

void AttentionRun::CheckShapes() const {
  const TensorView& q = params_.q;
  const KvLayout& layout = params_.kv.layout;
  GLOAM_CHECK(q.rank == 3 && params_.out.rank == 3 && params_.out.shape == q.shape);
  GLOAM_CHECK(q.dtype == DType::kF32 && params_.out.dtype == DType::kF32);
  GLOAM_CHECK(q.shape[0] == params_.batch.num_tokens && q.shape[2] == head_dim_);
  GLOAM_CHECK(heads_per_kv_ > 0 && q.shape[1] == heads_per_kv_ * num_kv_heads_);
  GLOAM_CHECK(head_dim_ > 0 && head_dim_ % 16 == 0);
  GLOAM_CHECK(IsKvDType(layout.dtype, Device::kCpu));
}

template <typename F>
void AttentionRun::ForEachTile(const F& f) const {
  const SequenceBatch& batch = params_.batch;
  for (int seq = 0; seq < batch.num_seqs; ++seq) {
    const int64_t begin = batch.cu_seqlens[seq];
    const int64_t end = batch.cu_seqlens[seq + 1];
    if (begin == end || (params_.left_out != nullptr && params_.left_out[seq])) continue;
    const int64_t start = batch.positions[begin];  // tokens of a sequence are consecutive
    GLOAM_CHECK(start >= 0 && batch.positions[end - 1] == start + (end - 1 - begin));
    GLOAM_CHECK(start + (end - begin) <= batch.context_lens[seq]);
    for (int64_t i = CeilDiv(end - begin, tokens_per_tile_) - 1; i >= 0; --i) {
      TokenTile tile;
      tile.seq = seq;
      tile.first_token = begin + i * tokens_per_tile_;
      tile.num_tokens =
          static_cast<int>(std::min<int64_t>(tokens_per_tile_, end - tile.first_token));
      const int64_t position = batch.positions[tile.first_token];
      const int64_t seen_begin = std::max<int64_t>(0, position - window_ + 1);
      const int64_t seen_end = position + tile.num_tokens;
      tile.first_partition = seen_begin / kPartitionTokens;
      tile.num_partitions = CeilDiv(seen_end, kPartitionTokens) - tile.first_partition;
      const int rows = tile.num_tokens * heads_per_kv_;
      const int num_kv_heads = std::min(kv_heads_per_tile_, std::max(1, kTileRows / rows));
      for (int head = 0; head < num_kv_heads_; head += num_kv_heads) {
        tile.kv_head = head;
        tile.num_kv_heads = std::min(num_kv_heads, num_kv_heads_ - head);
        tile.cost = (seen_end - seen_begin) * (kTokenCost + rows) * tile.num_kv_heads;
        f(tile);
      }
    }
  }
}

int64_t AttentionRun::PartialBytes(int64_t num_rows) const {
  Carver carver(nullptr);
  TakePartial(carver, num_rows, head_dim_);
  return carver.used_bytes();
}

void AttentionRun::PlanItems() {
  num_items_ = num_splits_ = partial_bytes_ = 0;
  ForEachTile([&](const TokenTile& tile) {
    WorkItem item;
    item.tile = tile;
    item.first_partition = tile.first_partition;
    item.num_partitions = tile.num_partitions;
    const int64_t tile_bytes = PartialBytes(RowsOf(tile)) * tile.num_partitions;
    if (tile.cost <= split_cost_ || tile.num_partitions == 1 ||
        partial_bytes_ + tile_bytes > kMaxPartialBytes) {
      if (items_ != nullptr) items_[num_items_] = item;
      ++num_items_;
      return;
    }
    const int64_t num_items = std::min(tile.num_partitions, CeilDiv(tile.cost, split_cost_));
    item.split = static_cast<int>(num_splits_);
    for (int64_t i = 0; i < num_items; ++i) {
      const int64_t first = tile.num_partitions * i / num_items;
      item.first_partition = tile.first_partition + first;
      item.num_partitions = tile.num_partitions * (i + 1) / num_items - first;
      if (items_ != nullptr) items_[num_items_] = item;
      ++num_items_;
    }
    if (splits_ != nullptr) {
      splits_[num_splits_] = {num_items, partial_bytes_};
      new (&counters_[num_splits_]) std::atomic<int64_t>(num_items);
    }
    ++num_splits_;
    partial_bytes_ += tile_bytes;
  });
}

void AttentionRun::Execute(ThreadPool& pool, Scratch& scratch) {
  if (num_items_ == 0) return;
  Carver thread_carver(nullptr);
  ThreadMemory(thread_carver, max_rows_, head_dim_);
  thread_bytes_ = thread_carver.used_bytes();
  const auto carve = [&](Carver carver) {
    thread_memory_ = carver.Take<char>(thread_bytes_ * num_threads_);
    partials_ = carver.Take<char>(partial_bytes_);
    items_ = carver.Take<WorkItem>(num_items_);
    splits_ = carver.Take<SplitTile>(num_splits_);
    counters_ = carver.Take<std::atomic<int64_t>>(num_splits_);
    return static_cast<size_t>(carver.used_bytes());
  };
  carve(Carver(scratch.Get(carve(Carver(nullptr)))));
  PlanItems();

  const auto task = [this](int64_t index, int thread) {
    const int64_t next = index + num_threads_;
    RunItem(items_[index], next < num_items_ ? &items_[next] : nullptr, thread);
  };
  if (num_threads_ > 1) {
    pool.ParallelFor(num_items_, task);
  } else {
    for (int64_t i = 0; i < num_items_; ++i) task(i, 0);
  }
}

AttentionPartial AttentionRun::PartialOf(const WorkItem& item, int64_t partition) const {
  const int64_t num_rows = RowsOf(item.tile);
  const int64_t index = partition - item.tile.first_partition;
  Carver carver(partials_ + splits_[item.split].first_byte + index * PartialBytes(num_rows));
  return TakePartial(carver, num_rows, head_dim_);
}

HeadBlocks AttentionRun::FirstBlocks(const TokenTile& tile, int64_t partition) const {
  const int64_t first_position = params_.batch.positions[tile.first_token];
  const int64_t first_block =
      std::max<int64_t>(partition * kPartitionTokens, first_position - window_ + 1) / kBlockTokens;
  const int64_t end_block = CeilDiv(first_position + tile.num_tokens, kBlockTokens);
  return {tile.kv_head, tile.num_kv_heads, BlockTableOf(tile) + first_block,
          std::min<int64_t>(kGroupBlocks, end_block - first_block)};
}

int64_t AttentionRun::OffsetOf(const TokenTile& tile, int row, const TensorView& x) const {
  const int rows_per_kv_head = tile.num_tokens * heads_per_kv_;
  const int kv_head = tile.kv_head + row / rows_per_kv_head;
  const int64_t token = tile.first_token + row % rows_per_kv_head / heads_per_kv_;
  const int64_t head = int64_t{kv_head} * heads_per_kv_ + row % heads_per_kv_;
  return token * x.strides[0] + head * x.strides[1];
}

void AttentionRun::RunItem(const WorkItem& item, const WorkItem* next, int thread) const {
  Carver carver(thread_memory_ + thread * thread_bytes_);
  const ThreadMemory memory(carver, max_rows_, head_dim_);
  const TokenTile& tokens = item.tile;
  AttentionTile tile;
  tile.kv = params_.kv;
  tile.kv_head = tokens.kv_head;
  tile.num_kv_heads = tokens.num_kv_heads;
  tile.block_table = BlockTableOf(tokens);
  tile.num_tokens = tokens.num_tokens;
  tile.heads_per_kv = heads_per_kv_;
  tile.first_position = params_.batch.positions[tokens.first_token];
  tile.window = window_;

  for (int row = 0; row < tile.num_rows(); ++row) {
    ScaleRow(params_.q.Data<const float>() + OffsetOf(tokens, row, params_.q), params_.scale,
             head_dim_, memory.workspace.queries + int64_t{row} * head_dim_);
  }

  const int64_t end = item.first_partition + item.num_partitions;
  const auto attend = [&](int64_t partition, const AttentionPartial& result) {
    if (partition + 1 < end) {
      tile.next = FirstBlocks(tokens, partition + 1);
    } else {
      tile.next = next == nullptr ? HeadBlocks() : FirstBlocks(next->tile, next->first_partition);
    }
    AttendPartition(tile, partition, memory.workspace, result);
  };
  if (item.split < 0) {
    // The first partition needs no fold: an empty total plus a part is the part, bit for bit.
    attend(item.first_partition, memory.total);
    for (int64_t partition = item.first_partition + 1; partition < end; ++partition) {
      attend(partition, memory.part);
      FoldPartial(memory.total, memory.part, tile.num_rows(), head_dim_);
    }
    WriteOutput(tokens, memory.total);
    return;
  }

  for (int64_t partition = item.first_partition; partition < end; ++partition) {
    attend(partition, PartialOf(item, partition));
  }
  if (counters_[item.split].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
  ClearPartial(memory.total, tile.num_rows(), head_dim_);
  for (int64_t i = 0; i < tokens.num_partitions; ++i) {
    FoldPartial(memory.total, PartialOf(item, tokens.first_partition + i), tile.num_rows(),
                head_dim_);
  }
  WriteOutput(tokens, memory.total);
}

void AttentionRun::WriteOutput(const TokenTile& tile, const AttentionPartial& total) const {
  const TensorView& out = params_.out;
  for (int row = 0; row < RowsOf(tile); ++row) {
    ScaleRow(total.acc + int64_t{row} * head_dim_, 1.0f / total.sum[row], head_dim_,
             out.Data<float>() + OffsetOf(tile, row, out));
  }
}

}  // namespace

void Attention(const AttentionParams& params, ThreadPool& pool, Scratch& scratch) {
  GLOAM_CHECK(params.kv.layout.num_kv_heads > 0 &&
              params.q.shape[1] >= params.kv.layout.num_kv_heads);
  AttentionRun(params, pool.num_threads()).Execute(pool, scratch);
}

}  // namespace gloam::cpu
