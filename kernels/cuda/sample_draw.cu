// The draw and log-probabilities: a thread block per row, which looks only into chunks that can
// hold a candidate. Cuts (top-k, top-p) are found by selection over histograms of the logits' bits,
// never by sorting.
#include <climits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/sample_row.cuh"

namespace gloam::cuda {
namespace {

// ---- selection

constexpr int kBins = 2 * kRowThreads;
constexpr int kBinBits = 11;
static_assert(kBins == 1 << kBinBits);

struct SelectMemory {
  uint32_t counts[kBins];
  uint32_t mass_low[kBins];
  uint32_t mass_high[kBins];
  BlockMemory block;
  uint64_t before[2];  // in the criterion, in mass
  uint64_t left;       // of the criterion inside the bin
  uint32_t bin;
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

// The shortest prefix that has `need` tokens (or that mass), or all down to `low_key` when they
// fall short. for_each(lowest_key, f) calls f(key, mass) for the tokens from lowest_key upwards.
// The keys between the largest and low_key fall into bins, the bin with the end into bins again.
template <typename ForEach>
__device__ __forceinline__ Cut Select(SelectMemory& memory, Criterion criterion, bool weigh,
                                      uint32_t max_key, uint32_t low_key, uint64_t need,
                                      const ForEach& for_each) {
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t base = 0;                    // of the bins, below the largest key
  uint32_t window = max_key - low_key;  // the last key of the bins, below base
  uint64_t mass_above = 0;
  int shift = max(0, 32 - __clz(static_cast<int>(window)) - kBinBits);
  while (true) {
    for (int i = thread; i < kBins; i += kRowThreads) {
      memory.counts[i] = memory.mass_low[i] = memory.mass_high[i] = 0;
    }
    __syncthreads();
    for_each(max_key - base - window, [&](uint32_t key, auto mass_of) {
      const uint32_t below = max_key - key - base;  // wraps for keys above the bins
      if (below > window) return;
      const uint32_t bin = below >> shift;
      atomicAdd(&memory.counts[bin], 1u);
      if (!weigh) return;
      const uint64_t mass = mass_of();
      const uint32_t low = static_cast<uint32_t>(mass);
      const uint32_t old = atomicAdd(&memory.mass_low[bin], low);
      const uint32_t high = static_cast<uint32_t>(mass >> 32) + (old + low < old ? 1 : 0);
      if (high != 0) atomicAdd(&memory.mass_high[bin], high);
    });
    __syncthreads();
    uint64_t values[2], masses[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int bin = 2 * thread + i;
      masses[i] = (uint64_t{memory.mass_high[bin]} << 32) + memory.mass_low[bin];
      values[i] = criterion == Criterion::kMass ? masses[i] : memory.counts[bin];
    }
    uint64_t total = 0, total_mass = 0;
    const uint64_t before = BlockScan64(memory.block, values[0] + values[1], total);
    const uint64_t mass_before =
        weigh ? BlockScan64(memory.block, masses[0] + masses[1], total_mass) : 0;
    const uint64_t need_here = need < total ? need : total;
    if (before < need_here && need_here <= before + values[0] + values[1]) {
      const int second = before + values[0] < need_here ? 1 : 0;
      memory.bin = 2 * thread + second;
      memory.before[0] = before + (second != 0 ? values[0] : 0);
      memory.before[1] = mass_before + (second != 0 ? masses[0] : 0);
      memory.left = need_here - memory.before[0];
    }
    __syncthreads();
    const uint32_t bin = memory.bin;
    mass_above += memory.before[1];
    need -= memory.before[0];
    base += bin << shift;
    window = umin(window - (bin << shift), (1u << shift) - 1);
    if (shift == 0) {
      Cut cut = {max_key - base, 0, memory.counts[bin], mass_above};
      uint64_t kept = memory.left;
      if (criterion == Criterion::kMass) {
        const uint64_t mass = (uint64_t{memory.mass_high[bin]} << 32) + memory.mass_low[bin];
        const uint64_t each = mass / cut.num_equal;
        kept = (memory.left + each - 1) / each;
      }
      cut.num_kept = static_cast<uint32_t>(kept);
      __syncthreads();
      return cut;
    }
    shift = max(0, shift - kBinBits);
    __syncthreads();
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

// A key that at least `count` tokens reach: that of the count-th largest chunk maximum.
__device__ __noinline__ uint32_t KeyThatManyReach(SelectMemory& memory, const Row& row,
                                                  uint32_t max_key, uint32_t count) {
  if (count > static_cast<uint32_t>(row.num_chunks)) return kMinusInfinityKey;
  const Cut cut =
      Select(memory, Criterion::kCount, false, max_key, kMinusInfinityKey, count,
             [&](uint32_t lowest_key, const auto& f) {
               for (int i = static_cast<int>(threadIdx.x); i < row.num_chunks; i += kRowThreads) {
                 const uint32_t key = row.chunk_max[i];
                 if (key >= lowest_key) f(key, [] { return uint64_t{0}; });
               }
             });
  return cut.key;
}

// ---- finding a token by cumulative mass, in ascending order of ids

// With the masses of all chunks in row.chunk_mass, the token at which the cumulative mass passes
// target(total). mass_of(logit, token) must add up to the chunks' masses.
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
  }
  __syncthreads();
  if (Warp() == 0) {
    const int at = static_cast<int>(memory.bin) * kSampleChunk + 4 * Lane();
    const uint64_t left = memory.left;
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
    uint64_t passed = inclusive - own;
    if (passed <= left && left < inclusive) {
      int i = 0;
      while (i < 3 && left - passed >= masses[i]) passed += masses[i++];
      memory.bin = at + i;
    }
  }
  __syncthreads();
  const int token = static_cast<int>(memory.bin);
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
    return Pick(memory, row, target_of, [&](float logit, int) { return weigher.Mass(logit); });
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
    uint64_t sum = 0;
    for (int i = static_cast<int>(threadIdx.x); i < row.num_chunks; i += kRowThreads) {
      sum += row.chunk_mass[i];
    }
    total = BlockSum64(memory.block, sum);
    // Tokens below this weight, all together, cannot reach the mass that top_p leaves out.
    low_key = KeyBelowWeight(weigher, (1.0 - double{task.top_p}) * static_cast<double>(total) *
                                          kWeightUnit / static_cast<double>(row.vocab_size));
  } else {
    cut.key = KeyBelowWeight(weigher, task.min_p);
  }
  if (by_mass) {
    const double mass = ceil(double{task.top_p} * static_cast<double>(total));
    const uint64_t need = mass < 1 ? 1 : static_cast<uint64_t>(mass);
    cut = SelectTokens(memory, row, Criterion::kMass, true, weigher, max_key, low_key,
                       need < total ? need : total);
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
  uint64_t mass = 0;
  for (int i = static_cast<int>(threadIdx.x); i < row.num_chunks; i += kRowThreads) {
    mass += row.chunk_mass[i];
  }
  mass = BlockSum64(memory.block, mass);
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
