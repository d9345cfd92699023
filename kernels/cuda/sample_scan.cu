// Sampling's passes over whole rows (4 bytes per entry of the vocabulary): the largest logit,
// penalties, and the maxima and masses of chunks of 128 entries, which spare the draw
// (sample_draw.cu) most of the vocabulary.
#include <climits>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/sample_row.cuh"

namespace gloam::cuda {
namespace {

// ---- greedy, nothing else asked for

constexpr int kScanThreads = 256;

struct Best {
  uint32_t key;
  uint32_t token;
};

__device__ __forceinline__ void Take(Best& best, float logit, int token) {
  const uint32_t key = KeyOf(Clean(logit));
  if (key > best.key) best = {key, static_cast<uint32_t>(token)};
}

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
  Best best = {0, UINT_MAX};
  if (args.by_four) {
    const int end_of_fours = begin < end ? begin + (end - begin) / 4 * 4 : begin;
#pragma unroll 4
    for (int i = begin + 4 * static_cast<int>(threadIdx.x); i < end_of_fours;
         i += 4 * kScanThreads) {
      const float4 v = *reinterpret_cast<const float4*>(logits + i);
      Take(best, v.x, i);
      Take(best, v.y, i + 1);
      Take(best, v.z, i + 2);
      Take(best, v.w, i + 3);
    }
    const int last = end_of_fours + static_cast<int>(threadIdx.x);
    if (last < end) Take(best, logits[last], last);
  } else {
#pragma unroll 4
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kScanThreads) {
      Take(best, logits[i], i);
    }
  }
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
  const int32_t token = static_cast<int32_t>(UINT_MAX - static_cast<uint32_t>(packed));
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

struct PassRow {
  bool wanted;
  int64_t mask;
  float inverse_temperature;
};

__device__ __forceinline__ PassRow PassRowOf(const SampleTask& task, SamplePass pass) {
  if (pass == SamplePass::kLogprobs) return {task.num_logprobs >= 0, -1, 1.0f};
  return {true, task.mask, task.inverse_temperature};
}

// This thread block's chunks: [begin, end).
struct ChunkRange {
  int begin;
  int end;
};

__device__ __forceinline__ ChunkRange RangeOf(int num_chunks) {
  const int per_block =
      (num_chunks + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  const int begin = static_cast<int>(blockIdx.x) * per_block;
  return {begin, min(begin + per_block, num_chunks)};
}

// grid: [parts of the vocabulary, rows]
__global__ void __launch_bounds__(kScanThreads)
    ChunkMaximaKernel(SampleArgs args, SamplePass pass) {
  AllowNextKernel();
  WaitForEarlierKernels();
  const int64_t index = blockIdx.y;
  const PassRow pass_row = PassRowOf(args.tasks[index], pass);
  if (!pass_row.wanted) return;
  const Row row = RowOf(args, index, pass_row.mask);
  uint32_t* chunk_max = args.chunk_max + index * args.num_chunks;
  const ChunkRange range = RangeOf(args.num_chunks);
  ForChunks(row, range.begin, range.end, 0, [&](int chunk, const Four& four) {
    uint32_t key =
        umax(umax(KeyOf(four.x[0]), KeyOf(four.x[1])), umax(KeyOf(four.x[2]), KeyOf(four.x[3])));
    key = __reduce_max_sync(kAllLanes, key);
    if (Lane() == 0) chunk_max[chunk] = key;
  });
}

// grid: [parts of the vocabulary, rows]
__global__ void __launch_bounds__(kScanThreads)
    ChunkMassesKernel(SampleArgs args, SamplePass pass) {
  __shared__ BlockMemory memory;
  AllowNextKernel();
  WaitForEarlierKernels();
  const int64_t index = blockIdx.y;
  const SampleTask& task = args.tasks[index];
  const PassRow pass_row = PassRowOf(task, pass);
  if (!pass_row.wanted || (pass == SamplePass::kDraw && !task.draws_from_total)) return;
  const Row row = RowOf(args, index, pass_row.mask);
  const Weigher weigher = {LogitOf(RowMaxKey(memory, row)), pass_row.inverse_temperature};
  const ChunkRange range = RangeOf(args.num_chunks);
  ForChunks(row, range.begin, range.end, 0, [&](int chunk, const Four& four) {
    uint64_t mass = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) mass += weigher.Mass(four.x[i]);
    mass = WarpSum64(mass);
    if (Lane() == 0) row.chunk_mass[chunk] = mass;
  });
}

// Thread blocks that share a row: enough to fill the GPU, as long as each has `least` entries.
unsigned NumParts(const SampleArgs& args, int num_sms, int least) {
  constexpr int kBlocksPerSm = 4;
  const int wanted = (kBlocksPerSm * num_sms + args.num_rows - 1) / args.num_rows;
  const int most = (args.vocab_size + least - 1) / least;
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

}  // namespace

void LaunchGreedy(const SampleArgs& args, int num_sms, cudaStream_t stream) {
  const dim3 grid(NumParts(args, num_sms, 4 * kScanThreads), args.num_rows);
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

void LaunchChunkMaxima(const SampleArgs& args, SamplePass pass, int num_sms, cudaStream_t stream) {
  const dim3 grid(NumParts(args, num_sms, 4 * kScanThreads), args.num_rows);
  LaunchKernel(ChunkMaximaKernel, {grid, kScanThreads}, stream, args, pass);
}

void LaunchChunkMasses(const SampleArgs& args, SamplePass pass, int num_sms, cudaStream_t stream) {
  const dim3 grid(NumParts(args, num_sms, 4 * kScanThreads), args.num_rows);
  LaunchKernel(ChunkMassesKernel, {grid, kScanThreads}, stream, args, pass);
}

}  // namespace gloam::cuda
