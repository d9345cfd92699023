// Sampling's passes over whole rows (4 bytes per entry of the vocabulary): the largest logit,
// penalties, and the maxima and masses of chunks of 128 entries, which spare the draw
// (draw.cu) most of the vocabulary.
#include <cfloat>
#include <climits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/sample/row.cuh"

namespace gloam::cuda {
namespace {

// ---- greedy, nothing else asked for

constexpr int kScanThreads = 256;

struct Best {
  uint32_t key;
  uint32_t token;
};

// The largest logit that a thread has seen, with the lowest token.
struct Largest {
  float logit = -INFINITY;
  uint32_t token = UINT_MAX;  // while all were -infinity

  // Tokens come in ascending order.
  __device__ __forceinline__ void Take(float x, int at) {
    const float clean = x > FLT_MAX ? FLT_MAX : x;
    if (clean > logit) {  // never for NaN
      logit = clean;
      token = at;
    }
  }
  // In any order.
  __device__ __forceinline__ void TakeCandidate(float x, uint32_t its_token) {
    const float clean = x > FLT_MAX ? FLT_MAX : x;
    if (clean > logit || (clean == logit && its_token < token && token != UINT_MAX)) {
      logit = clean;
      token = its_token;
    }
  }
};

// The larger key, the lower token among equals.
__device__ __forceinline__ Best WarpBest(Best best) {
  const uint32_t key = __reduce_max_sync(kAllLanes, best.key);
  return {key, __reduce_min_sync(kAllLanes, best.key == key ? best.token : UINT_MAX)};
}

// grid: [parts of the vocabulary, rows]
__global__ void __launch_bounds__(kScanThreads) GreedyKernel(SampleArgs args) {
  AllowNextKernel();
  WaitForEarlierKernels();
  const int64_t row = blockIdx.y;
  const float* logits = args.logits + row * args.row_stride;
  const int num_parts = static_cast<int>(gridDim.x);
  const int part = (args.vocab_size + num_parts * 4 - 1) / (num_parts * 4) * 4;
  const int begin = static_cast<int>(blockIdx.x) * part;
  const int end = min(begin + part, args.vocab_size);
  Largest largest;
  if (args.candidates != nullptr) {
    const int32_t* tokens = args.candidates + row * args.row_stride;
#pragma unroll 4
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kScanThreads) {
      largest.TakeCandidate(logits[i], tokens[i]);
    }
  } else if (args.by_four) {
    const int end_of_fours = begin < end ? begin + (end - begin) / 4 * 4 : begin;
#pragma unroll 4
    for (int i = begin + 4 * static_cast<int>(threadIdx.x); i < end_of_fours;
         i += 4 * kScanThreads) {
      const float4 v = *reinterpret_cast<const float4*>(logits + i);
      largest.Take(v.x, i);
      largest.Take(v.y, i + 1);
      largest.Take(v.z, i + 2);
      largest.Take(v.w, i + 3);
    }
    const int last = end_of_fours + static_cast<int>(threadIdx.x);
    if (last < end) largest.Take(logits[last], last);
  } else {
#pragma unroll 4
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kScanThreads) {
      largest.Take(logits[i], i);
    }
  }
  Best best = {KeyOf(Clean(largest.logit)), largest.token};
  __shared__ Best bests[kScanThreads / kWarpThreads];
  best = WarpBest(best);
  if (Lane() == 0) bests[Warp()] = best;
  __syncthreads();
  if (Warp() != 0) return;
  best = WarpBest(Lane() < NumWarps() ? bests[Lane()] : Best{0, UINT_MAX});
  if (Lane() != 0) return;
  uint64_t packed = uint64_t{best.key} << 32 | (UINT_MAX - best.token);
  if (num_parts > 1) {
    atomicMax(reinterpret_cast<unsigned long long*>(args.best + row), packed);
    __threadfence();
    if (atomicAdd(args.num_done + row, 1u) != gridDim.x - 1) return;
    packed = atomicExch(reinterpret_cast<unsigned long long*>(args.best + row), 0ull);
    args.num_done[row] = 0;
  }
  const uint32_t first = UINT_MAX - static_cast<uint32_t>(packed);
  const int32_t token = first == UINT_MAX ? 0 : static_cast<int32_t>(first);
  args.tokens[row] = token;
  args.outcomes[row].token = token;
}

// ---- penalties

// A thread block per row. Dynamic shared memory: a bit per token where repetition is penalised.
__global__ void __launch_bounds__(kRowThreads) PenaltiesKernel(SampleArgs args) {
  extern __shared__ uint32_t seen[];
  AllowNextKernel();
  WaitForEarlierKernels();
  const int64_t row = blockIdx.x;
  const SampleTask& task = args.tasks[row];
  float* logits = args.logits + row * args.row_stride;
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t* banned = args.list_tokens + task.first_entry;
  const int32_t* bias = banned + task.num_banned;
  const int32_t* prompt = bias + task.num_bias;
  const int32_t* counts = prompt + task.num_prompt;
  const int num_repeated = task.num_prompt + task.num_counts;
  const int num_entries = task.num_banned + task.num_bias + num_repeated;
  if (num_entries == 0) return;
  const bool repetition = task.repetition_penalty != 1.0f;

  if (task.num_logprobs >= 0) {
    for (int i = thread; i < num_entries; i += kRowThreads) {
      args.saved[task.first_entry + i] = logits[banned[i]];
    }
  }
  if (repetition) {
    for (int i = thread; i < (args.vocab_size + 31) / 32; i += kRowThreads) seen[i] = 0;
  }
  __syncthreads();
  for (int i = thread; i < task.num_banned; i += kRowThreads) logits[banned[i]] = -INFINITY;
  __syncthreads();
  const uint32_t* biases = args.list_values + task.first_value;
  for (int i = thread; i < task.num_bias; i += kRowThreads) {
    if (i > 0 && bias[i - 1] == bias[i]) continue;  // the first of equal tokens adds them all
    float logit = logits[bias[i]];
    for (int j = i; j < task.num_bias && bias[j] == bias[i]; ++j) {
      logit = __fadd_rn(logit, __uint_as_float(biases[j]));
    }
    logits[bias[i]] = logit;
  }
  __syncthreads();
  if (repetition) {
    for (int i = thread; i < num_repeated; i += kRowThreads) {
      const int token = prompt[i];
      const uint32_t bit = 1u << (token % 32);
      if ((atomicOr(&seen[token / 32], bit) & bit) != 0) continue;
      const float logit = logits[token];
      logits[token] = logit > 0 ? __fdiv_rn(logit, task.repetition_penalty)
                                : __fmul_rn(logit, task.repetition_penalty);
    }
    __syncthreads();
  }
  const uint32_t* occurrences = biases + task.num_bias;
  for (int i = thread; i < task.num_counts; i += kRowThreads) {
    const int32_t count = static_cast<int32_t>(occurrences[i]);
    if (count <= 0) continue;
    const float penalty = __fadd_rn(__fmul_rn(task.frequency_penalty, static_cast<float>(count)),
                                    task.presence_penalty);
    logits[counts[i]] = __fsub_rn(logits[counts[i]], penalty);
  }
}

// ---- maxima and masses of chunks

struct ChunkWork {
  bool maxima = false;
  bool mass = false;        // at the row's temperature
  bool model_mass = false;  // at temperature 1
  int64_t mask = -1;
};

__device__ __forceinline__ ChunkWork WorkOf(const SampleTask& task, SamplePass pass) {
  const bool logprobs = task.num_logprobs >= 0;
  if (pass == SamplePass::kDraw) {
    return {true, task.draws_from_total, logprobs && !task.changed, task.mask};
  }
  return {logprobs && task.changed, false, logprobs && task.changed, -1};
}

__device__ __forceinline__ uint64_t ChunkMass(const Four& four, const Weigher& weigher) {
  uint64_t mass = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) mass += weigher.Mass(four.x[i]);
  return WarpSum64(mass);
}

// grid: [parts of the vocabulary, rows]
__global__ void __launch_bounds__(kScanThreads) ScanKernel(SampleArgs args, SamplePass pass) {
  AllowNextKernel();
  WaitForEarlierKernels();
  const int64_t index = blockIdx.y;
  const SampleTask& task = args.tasks[index];
  const ChunkWork work = WorkOf(task, pass);
  if (!work.maxima) return;
  const Row row = RowOf(args, index, work.mask);
  uint32_t* chunk_max = args.chunk_max + index * args.num_chunks;
  uint64_t* model_mass = args.model_mass + index * args.num_chunks;
  const float inverse_temperature = task.inverse_temperature;
  const int num_parts = static_cast<int>(gridDim.x);
  const int per_block = (args.num_chunks + num_parts - 1) / num_parts;
  const int begin = static_cast<int>(blockIdx.x) * per_block;
  const int end = min(begin + per_block, args.num_chunks);
  ForChunks(row, begin, end, 0, [&](int chunk, const Four& four) {
    uint32_t key =
        umax(umax(KeyOf(four.x[0]), KeyOf(four.x[1])), umax(KeyOf(four.x[2]), KeyOf(four.x[3])));
    key = __reduce_max_sync(kAllLanes, key);
    if (Lane() == 0) chunk_max[chunk] = key;
    const float max = LogitOf(key);
    if (work.mass) {
      const uint64_t mass = ChunkMass(four, {max, inverse_temperature});
      if (Lane() == 0) row.chunk_mass[chunk] = mass;
    }
    if (work.model_mass) {
      const uint64_t mass = ChunkMass(four, {max, 1.0f});
      if (Lane() == 0) model_mass[chunk] = mass;
    }
  });
}

// Thread blocks that share a row: enough to fill the GPU, as long as each has 1024 entries.
unsigned NumParts(const SampleArgs& args, int num_sms) {
  constexpr int kBlocksPerSm = 6;
  const int wanted = kBlocksPerSm * num_sms / args.num_rows;
  const int most = (args.vocab_size + 4 * kScanThreads - 1) / (4 * kScanThreads);
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

}  // namespace

void LaunchGreedy(const SampleArgs& args, int num_sms, cudaStream_t stream) {
  const dim3 grid(NumParts(args, num_sms), args.num_rows);
  LaunchKernel(GreedyKernel, {grid, kScanThreads}, stream, args);
}

void LaunchPenalties(const SampleArgs& args, bool any_repetition, cudaStream_t stream) {
  const size_t shared_bytes = any_repetition ? (args.vocab_size + 31) / 32 * sizeof(uint32_t) : 0;
  if (shared_bytes > 48 * 1024) {
    GLOAM_CUDA_CHECK(cudaFuncSetAttribute(PenaltiesKernel,
                                          cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes)));
  }
  LaunchKernel(PenaltiesKernel, {args.num_rows, kRowThreads, shared_bytes}, stream, args);
}

void LaunchScan(const SampleArgs& args, SamplePass pass, int num_sms, cudaStream_t stream) {
  const dim3 grid(NumParts(args, num_sms), args.num_rows);
  LaunchKernel(ScanKernel, {grid, kScanThreads}, stream, args, pass);
}

}  // namespace gloam::cuda
