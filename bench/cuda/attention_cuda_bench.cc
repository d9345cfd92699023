// Dense decode attention of one layer on the GPU: the cells of the peers' table, as they were
// measured: bf16, blocks in random order, every request with its own, more memory than the L2 cache
// keeps. One JSON line per cell. `us` is the time of one of several layers in a recorded step, each
// with blocks of its own; `us_alone` that of a recorded step with nothing else.
//
//   attention_cuda_bench [fp8]     fp8: the type of the cache, beside the peers' bf16
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/decode/decode_attention.h"
#include "kernels/paged_kv.h"

namespace gloam::cuda {
namespace {

struct Shape {
  const char* name;
  int num_kv_heads;
  int heads_per_kv;
  int head_dim;

  int64_t token_elements() const { return int64_t{2} * num_kv_heads * head_dim; }
};

constexpr Shape kShapes[] = {{"mha_32x128", 32, 1, 128}, {"gqa_32/8x128", 8, 4, 128}};

// Best of FlashInfer's variants, vLLM's FlashAttention 3 and cuDNN on an H100 80GB HBM3, us,
// 2026-11-22: FlashInfer 0.6.12, vLLM 0.23.0, cuDNN 9.19.
struct PeerRow {
  int shape;
  int batch;
  double us[10];  // by context, as in kContexts; 0: not measured
};
constexpr int kContexts[] = {128, 256, 512, 1024, 4096, 8192, 16384, 32768, 65536, 131072};
constexpr PeerRow kPeers[] = {
    {0, 1, {4.6, 6.4, 8.1, 11, 30.2, 54.3, 97.5, 184, 358, 710}},
    {0, 4, {5.9, 9, 15.5, 28, 96.3, 183, 357, 707, 1409, 2810}},
    {0, 16, {15.5, 27, 49, 93, 355, 705, 1407, 2789, 5574, 11167}},
    {0, 64, {50, 95, 184, 359, 1397, 2780, 5565, 11129, 0, 0}},
    {1, 1, {5.1, 6.1, 8.0, 8.2, 13.2, 19.2, 32.1, 55.7, 99.7, 187}},
    {1, 4, {5.3, 6.5, 9.1, 11.5, 30.5, 55.1, 99.1, 187, 364, 714}},
    {1, 16, {6.6, 9.5, 15.6, 28.5, 99.2, 186, 362, 716, 1416, 2818}},
    {1, 64, {17, 32, 54, 98, 360, 707, 1402, 2794, 5574, 11178}},
};

constexpr int64_t kPoolBytes = int64_t{36} << 30;
constexpr int64_t kMinStepBytes = int64_t{1} << 30;  // of a recorded step, 20 times the L2 cache
constexpr int kMaxLayers = 64;

Buffer Allocate(size_t bytes) { return AllocateDevice(bytes).value(); }

template <typename T>
Buffer Upload(const std::vector<T>& values) {
  Buffer buffer = Allocate(values.size() * sizeof(T));
  GLOAM_CUDA_CHECK(
      cudaMemcpy(buffer.data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return buffer;
}

// Random bits of bf16 or e4m3 between 0.5 and 1 with either sign; the pool repeats them.
void FillPool(const Buffer& pool, DType dtype) {
  const bool is_fp8 = dtype == DType::kF8E4M3;
  const uint32_t random = is_fp8 ? 0x87878787u : 0x807F807Fu;
  const uint32_t exponents = is_fp8 ? 0x30303030u : 0x3F003F00u;
  std::mt19937 rng(1);
  std::vector<uint32_t> bits(16 << 20);
  for (uint32_t& x : bits) x = (static_cast<uint32_t>(rng()) & random) | exponents;
  size_t filled = bits.size() * sizeof(uint32_t);
  auto* data = static_cast<char*>(pool.data());
  GLOAM_CUDA_CHECK(cudaMemcpy(data, bits.data(), filled, cudaMemcpyHostToDevice));
  while (filled < pool.bytes()) {
    const size_t bytes = std::min(filled, pool.bytes() - filled);
    GLOAM_CUDA_CHECK(cudaMemcpy(data + filled, data, bytes, cudaMemcpyDeviceToDevice));
    filled += bytes;
  }
}

// A step recorded as a CUDA graph. Move-only.
class Recording {
 public:
  Recording(cudaStream_t stream, const std::function<void()>& step) {
    GLOAM_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    step();
    cudaGraph_t graph = nullptr;
    GLOAM_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    GLOAM_CUDA_CHECK(cudaGraphInstantiate(&graph_, graph, 0));
    GLOAM_CUDA_CHECK(cudaGraphDestroy(graph));
  }
  Recording(Recording&& other) noexcept : graph_(std::exchange(other.graph_, nullptr)) {}
  ~Recording() {
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
  }
  void Launch(cudaStream_t stream) const { GLOAM_CUDA_CHECK(cudaGraphLaunch(graph_, stream)); }

 private:
  cudaGraphExec_t graph_ = nullptr;
};

// Median time of a step in us, taking the recordings in turn.
double MedianUs(cudaStream_t stream, const std::vector<Recording>& recordings) {
  constexpr size_t kMinRuns = 5, kMaxRuns = 31;
  constexpr double kMaxTotalUs = 40e3;
  const Event begin(cudaEventDefault), end(cudaEventDefault);
  std::vector<double> times;
  double total = 0;
  for (size_t run = 0; run < kMaxRuns && (run < kMinRuns || total < kMaxTotalUs); ++run) {
    GLOAM_CUDA_CHECK(cudaEventRecord(begin.get(), stream));
    recordings[run % recordings.size()].Launch(stream);
    GLOAM_CUDA_CHECK(cudaEventRecord(end.get(), stream));
    GLOAM_CUDA_CHECK(cudaEventSynchronize(end.get()));
    float ms = 0;
    GLOAM_CUDA_CHECK(cudaEventElapsedTime(&ms, begin.get(), end.get()));
    total += ms * 1e3;
    if (run > 0) times.push_back(ms * 1e3);
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

class Bench {
 public:
  Bench(const DeviceContext& context, const Shape& shape, const Buffer& pool, DType dtype)
      : context_(context), shape_(shape), pool_(pool), dtype_(dtype) {
    order_.resize(pool.bytes() / (kBlockTokens * token_bytes()));
    std::iota(order_.begin(), order_.end(), 0);
    std::shuffle(order_.begin(), order_.end(), std::mt19937(2));
  }

  // A cell of the peers' table.
  void RunDecode(int batch, int num_tokens, double peer_us, double read_rate);
  // A prompt's last chunk as batch-invariant mode computes it: every token a row of its own.
  void RunInvariantChunk(int chunk, int num_tokens);

 private:
  struct Times {
    int layers = 0;  // of the recorded step; 0: the pool is too small
    double us = 0;
    double alone_us = 0;
  };
  // Sequences of `chunk` tokens each, whose contexts are num_tokens.
  Times Measure(int batch, int chunk, int num_tokens) const;

  int64_t token_bytes() const {
    return shape_.token_elements() * static_cast<int64_t>(DTypeBytes(dtype_));
  }

  const DeviceContext& context_;
  const Shape& shape_;
  const Buffer& pool_;
  const DType dtype_;
  std::vector<int32_t> order_;  // the pool's blocks, shuffled
};

Bench::Times Bench::Measure(int batch, int chunk, int num_tokens) const {
  const int64_t bytes = batch * num_tokens * token_bytes();
  const int blocks_per_seq = num_tokens / kBlockTokens;
  const int64_t blocks = int64_t{batch} * blocks_per_seq;
  const int layers = static_cast<int>(std::min<int64_t>(
      {kMaxLayers, static_cast<int64_t>(order_.size()) / blocks, kMinStepBytes / bytes + 1}));
  if (layers == 0) return {};
  const int num_rows = batch * chunk;
  const int rows_per_launch = std::min(num_rows, kMaxDecodeRows);
  const int num_groups =
      DecodeGroups(shape_.num_kv_heads, shape_.heads_per_kv, shape_.heads_per_kv);
  const int max_splits = DecodeSplits(blocks_per_seq, num_groups);
  const int width = shape_.num_kv_heads * shape_.heads_per_kv * shape_.head_dim;
  std::vector<int32_t> cu_seqlens(batch + 1);
  for (int i = 0; i <= batch; ++i) cu_seqlens[i] = i * chunk;
  const Buffer tables =
      Upload(std::vector<int32_t>(order_.begin(), order_.begin() + layers * blocks));
  const Buffer seqs = Upload(cu_seqlens);
  const Buffer contexts = Upload(std::vector<int32_t>(batch, num_tokens));
  const uint16_t half = dtype_ == DType::kF8E4M3 ? 0x3800 : 0x3F00;  // in fp16 or bf16
  const Buffer q = Upload(std::vector<uint16_t>(num_rows * width, half));
  const Buffer out = Allocate(sizeof(uint16_t) * num_rows * width);
  const Buffer partials =
      Allocate(sizeof(float) * (rows_per_launch * num_groups * max_splits + context_.num_sms) *
               DecodePartialFloats(shape_.heads_per_kv, shape_.head_dim));
  const Buffer arrivals = Allocate(sizeof(int32_t) * rows_per_launch * num_groups);
  const auto attend = [&](int layer) {
    for (int row = 0; row < num_rows; row += rows_per_launch) {
      LaunchDecodeAttention(
          {.q = q.data(),
           .q_token_stride = width,
           .q_head_stride = shape_.head_dim,
           .out = out.data(),
           .out_token_stride = width,
           .out_head_stride = shape_.head_dim,
           .kv = pool_.data(),
           .kv_dtype = dtype_,
           .num_kv_heads = shape_.num_kv_heads,
           .heads_per_kv = shape_.heads_per_kv,
           .head_dim = shape_.head_dim,
           .heads_per_unit = shape_.heads_per_kv,
           .cu_seqlens = static_cast<const int32_t*>(seqs.data()),
           .context_lens = static_cast<const int32_t*>(contexts.data()),
           .block_tables = static_cast<const int32_t*>(tables.data()) + layer * blocks,
           .num_seqs = batch,
           .max_blocks_per_seq = blocks_per_seq,
           .first_row = row,
           .num_rows = std::min(rows_per_launch, num_rows - row),
           .rows = chunk == 1 ? DecodeRows::kSingleTokens : DecodeRows::kEveryToken,
           .scale = 1 / std::sqrt(static_cast<float>(shape_.head_dim)),
           .balanced = chunk == 1,
           .max_splits = max_splits,
           .partials = static_cast<float*>(partials.data()),
           .arrivals = static_cast<int32_t*>(arrivals.data())},
          {context_.num_sms, context_.compute_capability, context_.stream});
    }
  };
  std::vector<Recording> together, alone;
  together.emplace_back(context_.stream, [&] {
    for (int layer = 0; layer < layers; ++layer) attend(layer);
  });
  for (int layer = 0; layer < layers; ++layer) {
    alone.emplace_back(context_.stream, [&] { attend(layer); });
  }
  return {.layers = layers,
          .us = MedianUs(context_.stream, together) / layers,
          .alone_us = MedianUs(context_.stream, alone)};
}

void Bench::RunDecode(int batch, int num_tokens, double peer_us, double read_rate) {
  const Times times = Measure(batch, 1, num_tokens);
  if (times.layers == 0) return;
  const double rate = batch * num_tokens * token_bytes() / (times.us * 1e-6);
  fmt::print(
      "{{\"shape\": \"{}\", \"batch\": {}, \"context\": {}, \"layers\": {}, \"us\": {:.2f}, "
      "\"us_alone\": {:.2f}, \"gb_per_s\": {:.0f}, \"percent_of_read\": {:.1f}, \"peer_us\": {}, "
      "\"ratio_to_peer\": {:.3f}}}\n",
      shape_.name, batch, num_tokens, times.layers, times.us, times.alone_us, rate / 1e9,
      100 * rate / read_rate, peer_us, times.us / peer_us);
  std::fflush(stdout);
}

void Bench::RunInvariantChunk(int chunk, int num_tokens) {
  const Times times = Measure(1, chunk, num_tokens);
  fmt::print("{{\"shape\": \"{}\", \"invariant_chunk\": {}, \"context\": {}, \"us\": {:.0f}}}\n",
             shape_.name, chunk, num_tokens, times.us);
  std::fflush(stdout);
}

int Main(DType dtype) {
  cudaDeviceProp properties{};
  GLOAM_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  const Stream stream;
  const DeviceContext context = {
      .options = {},
      .stream = stream.get(),
      .num_sms = properties.multiProcessorCount,
      .compute_capability = 10 * properties.major + properties.minor,
      .max_shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin),
      .l2_bytes = properties.l2CacheSize};
  const double read_rate = MeasureReadRate(context);
  fmt::print("{{\"gpu\": \"{}\", \"read_gb_per_s\": {:.0f}, \"kv_dtype\": \"{}\"}}\n",
             properties.name, read_rate / 1e9, dtype == DType::kF8E4M3 ? "fp8" : "bf16");
  const Buffer pool = Allocate(kPoolBytes);
  FillPool(pool, dtype);
  for (int shape = 0; shape < static_cast<int>(std::size(kShapes)); ++shape) {
    Bench bench(context, kShapes[shape], pool, dtype);
    for (const PeerRow& row : kPeers) {
      if (row.shape != shape) continue;
      for (size_t i = 0; i < std::size(kContexts); ++i) {
        if (row.us[i] > 0) bench.RunDecode(row.batch, kContexts[i], row.us[i], read_rate);
      }
    }
    for (const int num_tokens : {2048, 8192}) bench.RunInvariantChunk(512, num_tokens);
  }
  return 0;
}

}  // namespace
}  // namespace gloam::cuda

int main(int argc, char** argv) {
  const bool is_fp8 = argc > 1 && std::string_view(argv[1]) == "fp8";
  return gloam::cuda::Main(is_fp8 ? gloam::DType::kF8E4M3 : gloam::DType::kBF16);
}
