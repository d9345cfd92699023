// Time of the CUDA backend's small operations. Elementwise operations, RoPE and the kernels of
// sampling: microseconds of one in a recorded chain of them, where launches overlap as in a step.
// Sample: wall time of whole calls, copies and read-back included.
//
//   small_ops_bench          one JSON object per line, for dim 4096, intermediate 14336, 32 query
//                            and 8 KV heads of 128 channels, 128256 tokens of vocabulary
#include <algorithm>
#include <chrono>
#include <functional>
#include <random>
#include <string_view>
#include <vector>

#include "fmt/format.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/sample/kernels.h"
#include "tests/kernels/cuda/cuda_fixture.h"

namespace gloam::cuda {
namespace {

constexpr int64_t kDim = 4096, kIntermediate = 14336, kVocab = 128256;
constexpr int kHeads = 32, kKvHeads = 8, kHeadDim = 128;
constexpr int kQkv = (kHeads + 2 * kKvHeads) * kHeadDim;

std::vector<float> Normal(int64_t size, float scale) {
  std::mt19937 rng(1);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(std::min<int64_t>(size, 1 << 22));
  for (float& value : values) value = normal(rng);
  values.resize(size);
  for (int64_t i = 1 << 22; i < size; ++i) values[i] = values[i - (1 << 22)];
  return values;
}

// Microseconds per call of `op` in a graph of many; the best of several runs.
double MicrosecondsInChain(const CudaFixture& fixture, int chain, const std::function<void()>& op) {
  const cudaStream_t stream = fixture.context.stream;
  op();  // loads the kernel
  fixture.Synchronize();
  GLOAM_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < chain; ++i) op();
  cudaGraph_t graph = nullptr;
  GLOAM_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable = nullptr;
  GLOAM_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  Event begin(cudaEventDefault), end(cudaEventDefault);
  float best = 1e30f;
  for (int run = 0; run < 7; ++run) {
    GLOAM_CUDA_CHECK(cudaEventRecord(begin.get(), stream));
    GLOAM_CUDA_CHECK(cudaGraphLaunch(executable, stream));
    GLOAM_CUDA_CHECK(cudaEventRecord(end.get(), stream));
    GLOAM_CUDA_CHECK(cudaEventSynchronize(end.get()));
    float ms = 0;
    GLOAM_CUDA_CHECK(cudaEventElapsedTime(&ms, begin.get(), end.get()));
    best = std::min(best, ms);
  }
  GLOAM_CUDA_CHECK(cudaGraphExecDestroy(executable));
  GLOAM_CUDA_CHECK(cudaGraphDestroy(graph));
  return 1e3 * static_cast<double>(best) / chain;
}

int ChainOf(int64_t rows) { return rows >= 4096 ? 20 : 200; }

void Print(std::string_view op, int64_t rows, double us, double bytes, double read_rate) {
  fmt::print(R"({{"op": "{}", "rows": {}, "us": {:.2f}, "gb_s": {:.0f}, "of_read_rate": {:.3f}}})"
             "\n",
             op, rows, us, bytes / us / 1e3, bytes / us * 1e6 / read_rate);
}

TensorView View(void* data, DType dtype, int64_t rows, int64_t cols, int64_t stride) {
  TensorView view = TensorView::Contiguous(data, dtype, Device::kCuda, {rows, cols});
  view.strides[0] = stride;
  return view;
}

void BenchElementwise(const CudaFixture& fixture, double read_rate) {
  for (const int64_t rows : {1, 16, 256, 8192}) {
    const DeviceArray<float> x(Normal(rows * kDim, 1)), weight(Normal(kDim, 1));
    const DeviceArray<uint16_t> out(rows * kDim);
    const RmsNormParams norm = {.x = View(x.data(), DType::kF32, rows, kDim, kDim),
                                .weight = weight.data(),
                                .out = View(out.data(), DType::kBF16, rows, kDim, kDim)};
    Print("rms_norm", rows,
          MicrosecondsInChain(fixture, ChainOf(rows), [&] { RmsNorm(norm, fixture.context); }),
          static_cast<double>(rows * kDim) * 6, read_rate);

    const DeviceArray<float> qkv(Normal(rows * kQkv, 1));
    RmsNormParams heads;
    heads.x =
        TensorView::Contiguous(qkv.data(), DType::kF32, Device::kCuda, {rows, kHeads, kHeadDim});
    heads.x.strides[0] = kQkv;
    heads.out = heads.x;
    heads.weight = weight.data();
    Print("rms_norm_heads", rows,
          MicrosecondsInChain(fixture, ChainOf(rows), [&] { RmsNorm(heads, fixture.context); }),
          static_cast<double>(rows * kHeads * kHeadDim) * 8, read_rate);

    const DeviceArray<uint16_t> gate_up(RoundTo(DType::kBF16, Normal(rows * 2 * kIntermediate, 1)));
    const DeviceArray<uint16_t> product(rows * kIntermediate);
    SiluMulParams silu;
    silu.gate = View(gate_up.data(), DType::kBF16, rows, kIntermediate, 2 * kIntermediate);
    silu.up =
        View(gate_up.data() + kIntermediate, DType::kBF16, rows, kIntermediate, 2 * kIntermediate);
    silu.out = View(product.data(), DType::kBF16, rows, kIntermediate, kIntermediate);
    Print("silu_mul", rows,
          MicrosecondsInChain(fixture, ChainOf(rows), [&] { SiluMul(silu, fixture.context); }),
          static_cast<double>(rows * kIntermediate) * 6, read_rate);

    std::vector<int32_t> indices(rows);
    for (int64_t i = 0; i < rows; ++i) indices[i] = static_cast<int32_t>(rows - 1 - i);
    const DeviceArray<int32_t> device_indices(indices);
    const DeviceArray<float> gathered(rows * kDim);
    const GatherRowsParams gather = {.x = norm.x,
                                     .row_indices = device_indices.data(),
                                     .out = View(gathered.data(), DType::kF32, rows, kDim, kDim)};
    Print("gather_rows", rows,
          MicrosecondsInChain(fixture, ChainOf(rows), [&] { GatherRows(gather, fixture.context); }),
          static_cast<double>(rows * kDim) * 8, read_rate);
  }
}

void BenchRope(const CudaFixture& fixture, double read_rate) {
  constexpr int kMaxPositions = 8192;
  const DeviceArray<float> table(Normal(kMaxPositions * kHeadDim / 2, 1));
  for (const DType dtype : {DType::kBF16, DType::kF8E4M3}) {
    for (const int64_t rows : {1, 16, 256, 8192}) {
      const DeviceArray<uint16_t> qkv(RoundTo(DType::kBF16, Normal(rows * kQkv, 1)));
      const DeviceArray<uint16_t> q_out(rows * kHeads * kHeadDim);
      const KvLayout layout = {.dtype = dtype, .num_kv_heads = kKvHeads, .head_dim = kHeadDim};
      const int64_t num_blocks = rows / kBlockTokens + 1;
      const DeviceArray<uint8_t> cache(num_blocks * layout.block_bytes());
      std::vector<int32_t> positions(rows);
      std::vector<int64_t> slots(rows);
      for (int64_t i = 0; i < rows; ++i) positions[i] = static_cast<int32_t>(slots[i] = i);
      const DeviceArray<int32_t> device_positions(positions);
      const DeviceArray<int64_t> device_slots(slots);
      const auto heads = [&](int first, int count) {
        TensorView view = TensorView::Contiguous(qkv.data() + first * kHeadDim, DType::kBF16,
                                                 Device::kCuda, {rows, count, kHeadDim});
        view.strides[0] = kQkv;
        return view;
      };
      RopeKvParams params;
      params.batch.num_tokens = static_cast<int>(rows);
      params.batch.positions = device_positions.data();
      params.batch.slot_mapping = device_slots.data();
      params.q = heads(0, kHeads);
      params.q_out = TensorView::Contiguous(q_out.data(), QueryDType(dtype), Device::kCuda,
                                            {rows, kHeads, kHeadDim});
      params.k = heads(kHeads, kKvHeads);
      params.v = heads(kHeads + kKvHeads, kKvHeads);
      params.cos = params.sin = table.data();
      params.rotary_dim = kHeadDim;
      params.kv = {cache.data(), layout, num_blocks};
      const double bytes = static_cast<double>(rows * kQkv) * 2 +
                           static_cast<double>(q_out.size()) * 2 +
                           static_cast<double>(rows * 2 * kKvHeads * kHeadDim) *
                               static_cast<double>(DTypeBytes(dtype));
      Print(dtype == DType::kBF16 ? "rope_append_kv_bf16" : "rope_append_kv_fp8", rows,
            MicrosecondsInChain(fixture, ChainOf(rows),
                                [&] { RopeAppendKv(params, fixture.context); }),
            bytes, read_rate);
    }
  }
}

// What LaunchGreedy needs, and nothing more.
double GreedyMicroseconds(const CudaFixture& fixture, const DeviceArray<float>& logits,
                          int64_t rows) {
  const Buffer best = AllocateDevice(rows * sizeof(uint64_t)).value();
  const Buffer num_done = AllocateDevice(rows * sizeof(uint32_t)).value();
  const DeviceArray<int32_t> tokens(rows);
  const Buffer outcomes = AllocatePinned(rows * sizeof(SampleOutcome)).value();
  SampleArgs args = {};
  args.logits = logits.data();
  args.row_stride = args.vocab_size = kVocab;
  args.num_rows = static_cast<int32_t>(rows);
  args.by_four = true;
  args.best = static_cast<uint64_t*>(best.data());
  args.num_done = static_cast<uint32_t*>(num_done.data());
  args.tokens = tokens.data();
  args.outcomes = static_cast<SampleOutcome*>(outcomes.data());
  return MicrosecondsInChain(
      fixture, 100, [&] { LaunchGreedy(args, fixture.context.num_sms, fixture.context.stream); });
}

void BenchSample(const CudaFixture& fixture, double read_rate) {
  const std::unique_ptr<SampleBackend> backend = MakeSampleBackend(fixture.context);
  for (const int64_t rows : {1, 16, 64, 256}) {
    // Every thousandth token stands out, as in a model's logits; in flat rows none does.
    std::vector<float> values = Normal(rows * kVocab, 2);
    const DeviceArray<float> flat_logits(values);
    for (size_t i = 0; i < values.size(); i += 997) values[i] += 14;
    const DeviceArray<float> logits(values);
    const double bytes = static_cast<double>(rows * kVocab) * 4;
    Print("greedy_kernel", rows, GreedyMicroseconds(fixture, logits, rows), bytes, read_rate);

    SampleRow greedy, all, top_k, top_p, both, logprobs;
    greedy.temperature = 0;
    top_k.top_k = 50;
    top_p.top_p = 0.9f;
    both.top_k = 50;
    both.top_p = 0.9f;
    both.min_p = 0.02f;
    logprobs.num_logprobs = 5;
    for (const auto& [name, row] : std::vector<std::pair<std::string_view, SampleRow>>{
             {"sample_greedy", greedy},
             {"sample_all", all},
             {"sample_top_k_50", top_k},
             {"sample_top_p_0.9", top_p},
             {"sample_top_p_0.9_flat", top_p},
             {"sample_top_k_50_top_p_0.9_min_p_0.02", both},
             {"sample_all_5_logprobs", logprobs}}) {
      std::vector<SampleRow> batch(rows, row);
      for (int64_t i = 0; i < rows; ++i) batch[i].seed = i;
      std::vector<SampleResult> results(rows);
      float* const data = name.ends_with("flat") ? flat_logits.data() : logits.data();
      const SampleParams params = {.logits = View(data, DType::kF32, rows, kVocab, kVocab),
                                   .rows = batch,
                                   .results = results};
      double best = 1e30;
      for (int run = 0; run < 20; ++run) {
        const auto begin = std::chrono::steady_clock::now();
        backend->Sample(params);
        backend->FinishSample();
        const std::chrono::duration<double, std::micro> elapsed =
            std::chrono::steady_clock::now() - begin;
        best = std::min(best, elapsed.count());
      }
      Print(name, rows, best, bytes, read_rate);
    }
  }
}

void Run() {
  const CudaFixture fixture;
  const double read_rate = MeasureReadRate(fixture.context);
  fmt::print(R"({{"read_rate_gb_s": {:.0f}}})"
             "\n",
             read_rate / 1e9);
  BenchElementwise(fixture, read_rate);
  BenchRope(fixture, read_rate);
  BenchSample(fixture, read_rate);
}

}  // namespace
}  // namespace gloam::cuda

int main() { gloam::cuda::Run(); }
