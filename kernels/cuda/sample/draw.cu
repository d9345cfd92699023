// The draw and log-probabilities: a thread block per row, which looks only into chunks that can
// hold a candidate. Cuts (top-k, top-p) are found by selection over histograms of the logits' bits,
// never by sorting.
#include <climits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/sample/row.cuh"

namespace gloam::cuda {
namespace {

// ---- masses of chunks

// Turns a chunk's mass relative to its own maximum into one relative to the row's. Returns the sum.
__device__ __forceinline__ uint64_t ScaleChunkMasses(BlockMemory& memory, const uint32_t* chunk_max,
                                                     uint64_t* chunk_mass, int num_chunks,
                                                     const Weigher& weigher) {
  uint64_t sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < num_chunks; i += kRowThreads) {
    uint64_t mass = 0;
    if (chunk_max[i] != kMinusInfinityKey) {
      const double below = double{LogitOf(chunk_max[i])} - double{weigher.max};
      mass = __double2ull_rn(static_cast<double>(chunk_mass[i]) *
                             exp(below * double{weigher.inverse_temperature}));
    }
    chunk_mass[i] = mass;
    sum += mass;
  }
  return BlockSum64(memory, sum);
}

// ---- selection

constexpr int kBins = 2 * kRowThreads;
constexpr int kBinBits = 11;
static_assert(kBins == 1 << kBinBits);
constexpr int kFewTokens = 256;  // that are ranked one by one

struct SelectMemory {
  uint32_t counts[kBins];
  uint32_t mass_low[kBins];
  uint32_t mass_high[kBins];
  uint32_t few_keys[kFewTokens];
  uint64_t few_masses[kFewTokens];
  uint32_t num_few;
  BlockMemory block;
  uint64_t before[2];  // in the criterion, in mass
  uint64_t left;       // of the criterion inside the bin
  uint32_t bin;
  int32_t token;
  uint32_t cut_key, cut_equal, cut_kept;
};

// The end of a prefix of the tokens in the order of Before (larger logit first, lower id among
// equals): all tokens above `key` and the first `num_kept` of the `num_equal` at it.
struct Cut {
  uint32_t key;
  uint32_t num_kept;
  uint32_t num_equal;
  uint64_t mass_above;  // 0 where it was not asked for
};

enum class Criterion : uint8_t { kCount, kMass };

// The keys [lowest, highest] in kBins bins, the largest keys in the first. Evenly by logit, which
// spreads tokens well, or by key, which ends with a bin per key.
struct Bins {
  uint32_t highest;
  uint32_t lowest;
  int shift;           // by key
  float max, per_bin;  // by logit where per_bin is not 0; its inverse

  __device__ __forceinline__ bool by_logit() const { return per_bin != 0; }
  __device__ __forceinline__ uint32_t BinOf(uint32_t key) const {
    if (!by_logit()) return (highest - key) >> shift;
    return umin(static_cast<uint32_t>(__fmul_rn(__fsub_rn(max, LogitOf(key)), per_bin)), kBins - 1);
  }
};

__device__ __forceinline__ Bins BinsByKey(uint32_t highest, uint32_t lowest) {
  const int bits = 32 - __clz(static_cast<int>(highest - lowest));
  return {highest, lowest, max(0, bits - kBinBits), 0, 0};
}

__device__ __forceinline__ Bins BinsByLogit(uint32_t highest, uint32_t lowest) {
  Bins bins = BinsByKey(highest, lowest);
  bins.max = LogitOf(highest);
  const float width = bins.max - LogitOf(lowest);
  // By key where that is as good, or where a bin's width would overflow.
  if (bins.shift > 0 && width > 1e-30f && width < 1e30f) bins.per_bin = (kBins - 1) / width;
  return bins;
}

// The bins of one bin's keys.
__device__ __forceinline__ Bins BinsOfBin(const Bins& bins, uint32_t bin) {
  if (!bins.by_logit()) {
    const uint32_t highest = bins.highest - (bin << bins.shift);
    return BinsByKey(highest, highest - umin((1u << bins.shift) - 1, highest - bins.lowest));
  }
  // The lowest key whose bin is at most `last`; bins do not decrease as keys do.
  const auto lowest_of = [&](uint32_t last) {
    uint32_t low = bins.lowest, high = bins.highest;
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      if (bins.BinOf(middle) <= last) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  };
  return BinsByKey(bin == 0 ? bins.highest : lowest_of(bin - 1) - 1, lowest_of(bin));
}

// Counts and weighs the tokens of every bin. for_each(lowest_key, f) calls f(key, mass_of).
template <typename ForEach>
__device__ __forceinline__ void FillBins(SelectMemory& memory, bool weigh, const Bins& bins,
                                         const ForEach& for_each) {
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kRowThreads) {
    memory.counts[i] = memory.mass_low[i] = memory.mass_high[i] = 0;
  }
  if (threadIdx.x == 0) memory.num_few = 0;
  __syncthreads();
  for_each(bins.lowest, [&](uint32_t key, auto mass_of) {
    if (key > bins.highest) return;
    const uint32_t bin = bins.BinOf(key);
    atomicAdd(&memory.counts[bin], 1u);
    if (!weigh) return;
    const uint64_t mass = mass_of();
    const uint32_t low = static_cast<uint32_t>(mass);
    const uint32_t old = atomicAdd(&memory.mass_low[bin], low);
    const uint32_t high = static_cast<uint32_t>(mass >> 32) + (old + low < old ? 1 : 0);
    if (high != 0) atomicAdd(&memory.mass_high[bin], high);
  });
  __syncthreads();
}

__device__ __forceinline__ uint64_t MassOfBin(const SelectMemory& memory, uint32_t bin) {
  return (uint64_t{memory.mass_high[bin]} << 32) + memory.mass_low[bin];
}

// Finds the bin in which the criterion reaches `need`, or the last with any when all fall short:
// memory.bin, .before and .left.
__device__ __forceinline__ void FindBin(SelectMemory& memory, Criterion criterion, bool weigh,
                                        uint64_t need) {
  const uint32_t first = 2 * threadIdx.x;
  uint64_t values[2], masses[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    masses[i] = MassOfBin(memory, first + i);
    values[i] = criterion == Criterion::kMass ? masses[i] : memory.counts[first + i];
  }
  uint64_t total = 0, total_mass = 0;
  const uint64_t before = BlockScan64(memory.block, values[0] + values[1], total);
  const uint64_t mass_before =
      weigh ? BlockScan64(memory.block, masses[0] + masses[1], total_mass) : 0;
  if (need > total) need = total;
  if (before < need && need <= before + values[0] + values[1]) {
    const bool second = before + values[0] < need;
    memory.bin = first + (second ? 1 : 0);
    memory.before[0] = before + (second ? values[0] : 0);
    memory.before[1] = mass_before + (second ? masses[0] : 0);
    memory.left = need - memory.before[0];
  }
  __syncthreads();
}

// How many of `num_equal` tokens it takes to reach `left`.
__device__ __forceinline__ uint32_t NumKept(Criterion criterion, uint64_t left, uint64_t each) {
  return static_cast<uint32_t>(criterion == Criterion::kMass ? (left + each - 1) / each : left);
}

// Ends the selection inside memory.bin of `bins`, which has few tokens: ranks each of them.
template <typename ForEach>
__device__ __forceinline__ Cut RankFew(SelectMemory& memory, Criterion criterion, bool weigh,
                                       const Bins& bins, uint64_t mass_above,
                                       const ForEach& for_each) {
  const uint32_t bin = memory.bin;
  for_each(bins.lowest, [&](uint32_t key, auto mass_of) {
    if (key > bins.highest || bins.BinOf(key) != bin) return;
    const uint32_t at = atomicAdd(&memory.num_few, 1u);
    memory.few_keys[at] = key;
    memory.few_masses[at] = weigh ? mass_of() : 0;
  });
  __syncthreads();
  const uint32_t count = memory.num_few;
  if (threadIdx.x < count) {
    const uint32_t key = memory.few_keys[threadIdx.x];
    const uint64_t each = memory.few_masses[threadIdx.x];
    uint32_t num_above = 0, num_equal = 0;
    uint64_t above = 0;
    bool first = true;  // of its equals
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t other = memory.few_keys[i];
      if (i < threadIdx.x && other == key) first = false;
      num_equal += other == key ? 1 : 0;
      num_above += other > key ? 1 : 0;
      above += other > key ? memory.few_masses[i] : 0;
    }
    const bool by_mass = criterion == Criterion::kMass;
    const uint64_t before = by_mass ? above : num_above;
    const uint64_t own = by_mass ? num_equal * each : num_equal;
    if (first && before < memory.left && memory.left <= before + own) {
      memory.cut_key = key;
      memory.cut_equal = num_equal;
      memory.cut_kept = NumKept(criterion, memory.left - before, each);
      memory.before[1] = above;
    }
  }
  __syncthreads();
  const Cut cut = {memory.cut_key, memory.cut_kept, memory.cut_equal,
                   mass_above + memory.before[1]};
  __syncthreads();
  return cut;
}

// The shortest prefix that has `need` tokens (or that mass), or all down to `low_key` when they
// fall short. The keys between the largest and low_key fall into bins, the bin with the end into
// bins again, until few tokens or one key are left.
template <typename ForEach>
__device__ __forceinline__ Cut Select(SelectMemory& memory, Criterion criterion, bool weigh,
                                      uint32_t max_key, uint32_t low_key, uint64_t need,
                                      const ForEach& for_each) {
  Bins bins = BinsByLogit(max_key, low_key);
  uint64_t mass_above = 0;
  while (true) {
    FillBins(memory, weigh, bins, for_each);
    FindBin(memory, criterion, weigh, need);
    const uint32_t bin = memory.bin;
    const uint32_t count = memory.counts[bin];
    mass_above += memory.before[1];
    need -= memory.before[0];
    if (!bins.by_logit() && bins.shift == 0) {
      const uint64_t each = criterion == Criterion::kMass ? MassOfBin(memory, bin) / count : 1;
      const Cut cut = {bins.highest - bin, NumKept(criterion, memory.left, each), count,
                       mass_above};
      __syncthreads();
      return cut;
    }
    __syncthreads();
    if (count <= kFewTokens) {
      return RankFew(memory, criterion, weigh, bins, mass_above, for_each);
    }
    bins = BinsOfBin(bins, bin);
  }
}

// Selects among the row's tokens.
__device__ __noinline__ Cut SelectTokens(SelectMemory& memory, const Row& row, Criterion criterion,
                                         bool weigh, const Weigher& weigher, uint32_t max_key,
                                         uint32_t low_key, uint64_t need) {
  return Select(memory, criterion, weigh, max_key, low_key, need,
                [&](uint32_t lowest_key, const auto& f) {
                  ForTokens(row, lowest_key, [&](uint32_t key, float logit, int) {
                    f(key, [&] { return weigher.Mass(logit); });
                  });
                });
}

template <typename MassOf>
__device__ __forceinline__ Cut SelectChunkMaxima(SelectMemory& memory, const Row& row,
                                                 Criterion criterion, uint32_t max_key,
                                                 uint32_t low_key, uint64_t need,
                                                 const MassOf& mass_of) {
  return Select(memory, criterion, criterion == Criterion::kMass, max_key, low_key, need,
                [&](uint32_t lowest_key, const auto& f) {
                  for (int i = static_cast<int>(threadIdx.x); i < row.num_chunks;
                       i += kRowThreads) {
                    const uint32_t key = row.chunk_max[i];
                    if (key >= lowest_key) f(key, [&] { return mass_of(LogitOf(key)); });
                  }
                });
}

// A key that at least `count` tokens reach: that of the count-th largest chunk maximum.
__device__ __noinline__ uint32_t KeyThatManyReach(SelectMemory& memory, const Row& row,
                                                  uint32_t max_key, uint32_t count) {
  if (count > static_cast<uint32_t>(row.num_chunks)) return kMinusInfinityKey;
  uint32_t lowest = ~max_key;  // of the maxima, as the largest complement
  for (int i = static_cast<int>(threadIdx.x); i < row.num_chunks; i += kRowThreads) {
    lowest = umax(lowest, ~row.chunk_max[i]);
  }
  lowest = ~BlockMax(memory.block, lowest);
  return SelectChunkMaxima(memory, row, Criterion::kCount, max_key, lowest, count,
                           [](float) { return uint64_t{0}; })
      .key;
}

// A key that tokens of `mass` reach, as far as the chunks' largest tokens tell; else low_key.
__device__ __noinline__ uint32_t KeyThatMassReaches(SelectMemory& memory, const Row& row,
                                                    const Weigher& weigher, uint32_t max_key,
                                                    uint32_t low_key, uint64_t mass) {
  uint64_t sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < row.num_chunks; i += kRowThreads) {
    if (row.chunk_max[i] >= low_key) sum += weigher.Mass(LogitOf(row.chunk_max[i]));
  }
  if (BlockSum64(memory.block, sum) < mass) return low_key;
  return SelectChunkMaxima(memory, row, Criterion::kMass, max_key, low_key, mass,
                           [&](float logit) { return weigher.Mass(logit); })
      .key;
}

// ---- finding a token by cumulative mass, in ascending order of ids

// With the masses of all chunks in row.chunk_mass, the token at which the cumulative mass passes
// target_of(total). mass_of(logit, token) must add up to the chunk's mass but for its unit.
template <typename TargetOf, typename MassOf>
__device__ __forceinline__ int Pick(SelectMemory& memory, const Row& row, const TargetOf& target_of,
                                    const MassOf& mass_of) {
  const int per_thread = (row.num_chunks + kRowThreads - 1) / kRowThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * per_thread, row.num_chunks);
  const int end = min(begin + per_thread, row.num_chunks);
  uint64_t sum = 0, total = 0;
  for (int i = begin; i < end; ++i) sum += row.chunk_mass[i];
  uint64_t before = BlockScan64(memory.block, sum, total);
  const uint64_t target = target_of(total);
  if (before <= target && target < before + sum) {
    int chunk = begin;
    while (target - before >= row.chunk_mass[chunk]) before += row.chunk_mass[chunk++];
    memory.bin = chunk;
    memory.left = target - before;
    memory.before[0] = row.chunk_mass[chunk];
  }
  __syncthreads();
  if (Warp() == 0) {
    const int at = static_cast<int>(memory.bin) * kSampleChunk + 4 * Lane();
    uint64_t left = memory.left;
    const uint64_t chunk_mass = memory.before[0];
    const Four four = LoadFour(row, at);
    uint64_t masses[4], inclusive = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) inclusive += masses[i] = mass_of(four.x[i], at + i);
    const uint64_t own = inclusive;
#pragma unroll
    for (int offset = 1; offset < kWarpThreads; offset *= 2) {
      const uint64_t lower = __shfl_up_sync(kAllLanes, inclusive, offset);
      if (Lane() >= offset) inclusive += lower;
    }
    const uint64_t sum = __shfl_sync(kAllLanes, inclusive, kWarpThreads - 1);
    if (sum != chunk_mass) {
      const double share = static_cast<double>(left) / static_cast<double>(chunk_mass);
      left = static_cast<uint64_t>(share * static_cast<double>(sum));
      if (left >= sum) left = sum - 1;
    }
    uint64_t passed = inclusive - own;
    if (passed <= left && left < inclusive) {
      int i = 0;
      while (i < 3 && left - passed >= masses[i]) passed += masses[i++];
      memory.token = at + i;
    }
  }
  __syncthreads();
  const int token = memory.token;
  __syncthreads();
  return token;
}

// The same after filling row.chunk_mass; only chunks from lowest_key upwards have any mass.
template <typename TargetOf, typename MassOf>
__device__ __forceinline__ int FillAndPick(SelectMemory& memory, const Row& row,
                                           uint32_t lowest_key, const TargetOf& target_of,
                                           const MassOf& mass_of) {
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < row.num_chunks; i += kRowThreads) {
    row.chunk_mass[i] = 0;
  }
  __syncthreads();
  ForChunks(row, 0, row.num_chunks, lowest_key, [&](int chunk, const Four& four) {
    const int at = chunk * kSampleChunk + 4 * Lane();
    uint64_t mass = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) mass += mass_of(four.x[i], at + i);
    mass = WarpSum64(mass);
    if (Lane() == 0) row.chunk_mass[chunk] = mass;
  });
  __syncthreads();
  return Pick(memory, row, target_of, mass_of);
}

// The id of the last token that `cut` keeps among its equals.
__device__ __noinline__ int LastKept(SelectMemory& memory, const Row& row, const Cut& cut) {
  if (cut.num_kept == cut.num_equal) return INT_MAX;
  return FillAndPick(
      memory, row, cut.key, [&](uint64_t) { return uint64_t{cut.num_kept - 1}; },
      [&](float logit, int token) {
        return uint64_t{token < row.vocab_size && KeyOf(logit) == cut.key};
      });
}

// ---- the draw

// The key of a logit whose weight is a little less than `weight`.
__device__ __noinline__ uint32_t KeyBelowWeight(const Weigher& weigher, double weight) {
  const double distance = 0.01 - log(weight);
  const double threshold = double{weigher.max} - distance / double{weigher.inverse_temperature};
  return KeyOf(Clean(fminf(static_cast<float>(threshold), weigher.max)));
}

__device__ __forceinline__ int DrawToken(SelectMemory& memory, const SampleTask& task,
                                         const Row& row, uint32_t max_key) {
  const Weigher weigher = {LogitOf(max_key), task.inverse_temperature};
  const bool by_count = task.top_k > 0 && task.top_k < row.vocab_size;
  const bool by_mass = task.top_p < 1.0f;
  const auto target_of = [&](uint64_t total) {
    const uint64_t target = static_cast<uint64_t>(task.uniform * static_cast<double>(total));
    return target < total ? target : total - 1;
  };
  if (!by_count && !by_mass && task.min_p <= 0) {
    ScaleChunkMasses(memory.block, row.chunk_max, row.chunk_mass, row.num_chunks, weigher);
    return Pick(memory, row, target_of, [&](float logit, int token) {
      const float chunk_max = LogitOf(row.chunk_max[token / kSampleChunk]);
      return Weigher{chunk_max, task.inverse_temperature}.Mass(logit);
    });
  }
  Cut cut = {kMinusInfinityKey, 1, 1, 0};
  uint64_t total = 0;
  uint32_t low_key = kMinusInfinityKey;
  if (by_count) {
    low_key = KeyThatManyReach(memory, row, max_key, task.top_k);
    cut = SelectTokens(memory, row, Criterion::kCount, by_mass, weigher, max_key, low_key,
                       task.top_k);
    total = cut.mass_above + cut.num_kept * weigher.Mass(LogitOf(cut.key));
    low_key = cut.key;
  } else if (by_mass) {
    total = ScaleChunkMasses(memory.block, row.chunk_max, row.chunk_mass, row.num_chunks, weigher);
    // Tokens below this weight, all together, cannot reach the mass that top_p leaves out.
    low_key = KeyBelowWeight(weigher, (1.0 - double{task.top_p}) * static_cast<double>(total) *
                                          kWeightUnit / static_cast<double>(row.vocab_size));
  } else {
    cut.key = KeyBelowWeight(weigher, task.min_p);
  }
  if (by_mass) {
    const double mass = ceil(double{task.top_p} * static_cast<double>(total));
    uint64_t need = mass < 1 ? 1 : static_cast<uint64_t>(mass);
    if (need > total) need = total;
    if (!by_count) low_key = KeyThatMassReaches(memory, row, weigher, max_key, low_key, need);
    cut = SelectTokens(memory, row, Criterion::kMass, true, weigher, max_key, low_key, need);
  }
  const int last_kept = LastKept(memory, row, cut);
  const float min_weight = fminf(task.min_p, 1.0f);
  return FillAndPick(memory, row, cut.key, target_of, [&](float logit, int token) -> uint64_t {
    const uint32_t key = KeyOf(logit);
    if (key < cut.key || (key == cut.key && token > last_kept)) return 0;
    return weigher.Weight(logit) < min_weight ? 0 : weigher.Mass(logit);
  });
}

// The first token that has the largest key.
__device__ __forceinline__ int FirstBest(SelectMemory& memory, const Row& row, uint32_t max_key) {
  uint32_t first = 0;  // counted from the end
  for (int i = static_cast<int>(threadIdx.x); i < row.num_chunks; i += kRowThreads) {
    if (row.chunk_max[i] == max_key) first = umax(first, static_cast<uint32_t>(row.num_chunks - i));
  }
  const int chunk = row.num_chunks - static_cast<int>(BlockMax(memory.block, first));
  const int at = chunk * kSampleChunk + 4 * Lane();
  const Four four = LoadFour(row, at);
  uint32_t token = UINT_MAX;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    if (KeyOf(four.x[i]) == max_key) token = at + i;
  }
  return static_cast<int>(__reduce_min_sync(kAllLanes, token));
}

// A thread block per row.
__global__ void __launch_bounds__(kRowThreads) DrawKernel(SampleArgs args) {
  __shared__ SelectMemory memory;
  AllowNextKernel();
  WaitForEarlierKernels();
  const int64_t index = blockIdx.x;
  const SampleTask& task = args.tasks[index];
  const Row row = RowOf(args, index, task.mask);
  const uint32_t max_key = RowMaxKey(memory.block, row);
  int token = 0;  // where nothing is allowed
  if (max_key != kMinusInfinityKey) {
    token = task.greedy ? FirstBest(memory, row, max_key) : DrawToken(memory, task, row, max_key);
  }
  if (threadIdx.x == 0) {
    args.tokens[index] = token;
    args.outcomes[index].token = token;
  }
  if (task.num_logprobs < 0) return;
  __syncthreads();
  float* logits = args.logits + index * args.row_stride;
  const int num_entries = task.num_banned + task.num_bias + task.num_prompt + task.num_counts;
  for (int i = static_cast<int>(threadIdx.x); i < num_entries; i += kRowThreads) {
    logits[args.list_tokens[task.first_entry + i]] = args.saved[task.first_entry + i];
  }
}

// ---- log-probabilities

// A thread block per row.
__global__ void __launch_bounds__(kRowThreads) LogprobsKernel(SampleArgs args) {
  __shared__ SelectMemory memory;
  __shared__ unsigned num_written;
  AllowNextKernel();
  WaitForEarlierKernels();
  const int64_t index = blockIdx.x;
  const SampleTask& task = args.tasks[index];
  if (task.num_logprobs < 0) return;
  const Row row = RowOf(args, index, -1);
  const uint32_t max_key = RowMaxKey(memory.block, row);
  const uint64_t mass =
      ScaleChunkMasses(memory.block, row.chunk_max, args.model_mass + index * args.num_chunks,
                       row.num_chunks, {LogitOf(max_key), 1.0f});
  const int32_t token = args.tokens[index];
  const float logit = Clean(row.logits[token]);
  uint64_t larger = 0;
  ForTokens(row, KeyOf(logit) + 1, [&](uint32_t, float, int) { ++larger; });
  larger = BlockSum64(memory.block, larger);
  if (threadIdx.x == 0) {
    args.outcomes[index] = {token, logit, LogitOf(max_key), 1 + static_cast<int32_t>(larger), mass};
    num_written = 0;
  }
  if (task.num_logprobs == 0) return;
  const uint32_t count = task.num_logprobs;
  const uint32_t low_key = KeyThatManyReach(memory, row, max_key, count);
  const Cut cut = SelectTokens(memory, row, Criterion::kCount, false, {}, max_key, low_key, count);
  const int last_kept = LastKept(memory, row, cut);
  SampleTop* top = args.top + task.first_top;
  ForTokens(row, cut.key, [&](uint32_t key, float value, int id) {
    if (key == cut.key && id > last_kept) return;
    top[atomicAdd(&num_written, 1u)] = {id, value};
  });
}

}  // namespace

void LaunchDraw(const SampleArgs& args, cudaStream_t stream) {
  LaunchKernel(DrawKernel, {args.num_rows, kRowThreads}, stream, args);
}

void LaunchLogprobs(const SampleArgs& args, cudaStream_t stream) {
  LaunchKernel(LogprobsKernel, {args.num_rows, kRowThreads}, stream, args);
}

}  // namespace gloam::cuda
