// Prefill attention of one layer: milliseconds, TFLOP/s and the host's plan, a JSON line per shape.
//
//   prefill_cuda_bench [--fa2] [--fp8]
//
// --fa2: without FA3, as GPUs other than Hopper run it; --fp8: over an fp8 cache instead of bf16
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <random>
#include <string_view>
#include <vector>

#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/prefill/prefill_attention.h"
#include "tests/kernels/cuda/cache_values.h"

namespace gloam::cuda {
namespace {

struct Shape {
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int tokens = 0;   // of the chunk
  int context = 0;  // with the chunk
};

// An H100's cuBLAS on 8192^3 in bf16 (2026-11-22): what attention's products could reach.
constexpr double kGemmTflops = 759;

Buffer DeviceCopy(const void* host, size_t bytes) {
  Buffer buffer = AllocateDevice(bytes).value();
  GLOAM_CUDA_CHECK(cudaMemcpy(buffer.data(), host, bytes, cudaMemcpyHostToDevice));
  return buffer;
}

// Values in [-1, 1) of a cache's or its queries' type, half a million over and over.
Buffer RandomValues(int64_t elements, DType dtype, std::mt19937& rng) {
  std::vector<float> values(std::min<int64_t>(elements, 1 << 19));
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (float& x : values) x = uniform(rng);
  const std::vector<uint8_t> part = ToBytes(dtype, values);
  const auto bytes = elements * static_cast<int64_t>(DTypeBytes(dtype));
  Buffer buffer = AllocateDevice(bytes).value();
  for (int64_t begin = 0; begin < bytes; begin += static_cast<int64_t>(part.size())) {
    const int64_t count = std::min<int64_t>(bytes - begin, static_cast<int64_t>(part.size()));
    GLOAM_CUDA_CHECK(cudaMemcpy(static_cast<uint8_t*>(buffer.data()) + begin, part.data(), count,
                                cudaMemcpyHostToDevice));
  }
  return buffer;
}

void Measure(const Shape& shape, DType dtype, const DeviceContext& context) {
  std::mt19937 rng(1);
  const int num_blocks = (shape.context + kBlockTokens - 1) / kBlockTokens;
  const KvLayout layout = {dtype, shape.num_kv_heads, shape.head_dim};
  std::vector<int32_t> table(num_blocks);
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), rng);
  const std::vector<int32_t> cu_seqlens = {0, shape.tokens};
  const std::vector<int32_t> context_lens = {shape.context};
  const Buffer device_table = DeviceCopy(table.data(), table.size() * sizeof(int32_t));
  const Buffer kv = RandomValues(layout.block_elements() * num_blocks, dtype, rng);
  const int64_t q_elements = int64_t{shape.tokens} * shape.num_heads * shape.head_dim;
  const DType q_dtype = QueryDType(dtype);
  const Buffer q = RandomValues(q_elements, q_dtype, rng);
  const Buffer out = AllocateDevice(q_elements * sizeof(uint16_t)).value();

  AttentionParams params;
  params.batch = {.num_seqs = 1,
                  .num_tokens = shape.tokens,
                  .max_blocks_per_seq = num_blocks,
                  .block_tables = static_cast<const int32_t*>(device_table.data()),
                  .host_cu_seqlens = cu_seqlens.data(),
                  .host_context_lens = context_lens.data()};
  params.q = TensorView::Contiguous(q.data(), q_dtype, Device::kCuda,
                                    {shape.tokens, shape.num_heads, shape.head_dim});
  params.kv = {.data = kv.data(), .layout = layout, .num_blocks = num_blocks};
  params.scale = 0.1f;
  params.out = TensorView::Contiguous(out.data(), DType::kBF16, Device::kCuda,
                                      {shape.tokens, shape.num_heads, shape.head_dim});
  const AttentionPlanParams plan = {
      .batch = params.batch, .kv = layout, .num_heads = shape.num_heads};

  const std::unique_ptr<PrefillAttention> prefill = PrefillAttention::Make(context);
  const Status reserved = prefill->Reserve({.max_tokens = shape.tokens,
                                            .max_seqs = 1,
                                            .max_context = shape.context,
                                            .num_heads = shape.num_heads,
                                            .num_kv_heads = shape.num_kv_heads,
                                            .head_dim = shape.head_dim,
                                            .kv_dtype = dtype});
  GLOAM_CHECK(reserved.ok());
  const std::vector<int> seqs = {0};
  std::vector<double> plan_us, ms;
  const Event begin(cudaEventDefault), end(cudaEventDefault);
  // Several launches at a time, as in a step: the host is ahead of the GPU.
  constexpr int kWarmUps = 2, kSamples = 7, kRuns = 4;
  for (int sample = 0; sample < kWarmUps + kSamples; ++sample) {
    const auto started = std::chrono::steady_clock::now();
    prefill->Plan(plan, seqs);
    const std::chrono::duration<double, std::micro> planned =
        std::chrono::steady_clock::now() - started;
    GLOAM_CUDA_CHECK(cudaEventRecord(begin.get(), context.stream));
    for (int i = 0; i < kRuns; ++i) prefill->Run(params);
    GLOAM_CUDA_CHECK(cudaEventRecord(end.get(), context.stream));
    GLOAM_CUDA_CHECK(cudaEventSynchronize(end.get()));
    float elapsed = 0;
    GLOAM_CUDA_CHECK(cudaEventElapsedTime(&elapsed, begin.get(), end.get()));
    if (sample < kWarmUps) continue;
    plan_us.push_back(planned.count());
    ms.push_back(elapsed / kRuns);
  }
  const auto median = [](std::vector<double>& values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
  };
  // Two products over every query and each token that it sees.
  const double first = shape.context - shape.tokens + 1, last = shape.context;
  const double pairs = (first + last) / 2 * shape.tokens;
  const double flops = 4.0 * pairs * shape.head_dim * shape.num_heads;
  const double milliseconds = median(ms);
  const double tflops = flops / milliseconds * 1e-9;
  fmt::print(
      "{{\"bench\": \"prefill_attention\", \"heads\": {}, \"kv_heads\": {}, \"head_dim\": {}, "
      "\"tokens\": {}, \"context\": {}, \"fa3\": {}, \"kv_dtype\": \"{}\", \"ms\": {:.4f}, "
      "\"tflops\": {:.1f}, \"percent_of_gemm\": {:.1f}, \"plan_us\": {:.0f}}}\n",
      shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.tokens, shape.context,
      context.compute_capability == 90, dtype == DType::kF8E4M3 ? "fp8" : "bf16", milliseconds,
      tflops, 100 * tflops / kGemmTflops, median(plan_us));
}

int Main(bool without_fa3, DType dtype) {
  const Stream stream;
  cudaDeviceProp properties{};
  GLOAM_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
  DeviceContext context = {.stream = stream.get(),
                           .num_sms = properties.multiProcessorCount,
                           .compute_capability = 10 * properties.major + properties.minor,
                           .max_shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin)};
  if (without_fa3) context.compute_capability = 80;
  for (const Shape& shape :
       {Shape{32, 8, 128, 2048, 2048}, Shape{32, 8, 128, 8192, 8192},
        Shape{32, 8, 128, 32768, 32768}, Shape{32, 8, 128, 2048, 16384},
        Shape{32, 32, 128, 2048, 2048}, Shape{32, 32, 128, 8192, 8192},
        Shape{32, 32, 128, 32768, 32768}, Shape{32, 32, 128, 2048, 16384},
        Shape{32, 8, 64, 8192, 8192}, Shape{32, 8, 64, 2048, 16384}, Shape{32, 8, 128, 20, 16384},
        Shape{32, 8, 128, 128, 16384}, Shape{32, 8, 128, 512, 16384},
        // Contexts that end inside a block.
        Shape{32, 8, 128, 2043, 2043}, Shape{32, 8, 64, 2043, 2043}}) {
    Measure(shape, dtype, context);
  }
  return 0;
}

}  // namespace
}  // namespace gloam::cuda

int main(int argc, char** argv) {
  const std::vector<std::string_view> flags(argv + 1, argv + argc);
  const auto has = [&](std::string_view flag) {
    return std::find(flags.begin(), flags.end(), flag) != flags.end();
  };
  return gloam::cuda::Main(has("--fa2"),
                           has("--fp8") ? gloam::DType::kF8E4M3 : gloam::DType::kBF16);
}
