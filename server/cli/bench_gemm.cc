// `gloam bench gemm`: what the matrix products of a model cost, beside the time that reading their
// weights takes at the device's measured read rate. Each is run over all layers in turn, as a step
// does, so that no layer's weights are in a cache that a step would not find them in.
#include <algorithm>
#include <chrono>
#include <functional>
#include <random>

#include "fmt/format.h"
#include "models/llama_weights.h"
#include "nlohmann/json.hpp"
#include "server/cli/backend.h"
#include "server/cli/bench_model.h"
#include "server/cli/cli.h"

namespace gloam {
namespace {

using Clock = std::chrono::steady_clock;
using json = nlohmann::ordered_json;

constexpr int kHeadRuns = 4;  // of the one output layer, where others have a layer's each

int64_t BytesOf(const StackedLinear& linear) {
  int64_t bytes = 0;
  for (const StackedLinear::Part& part : linear.parts) bytes += part.weight->bytes();
  return bytes;
}

// Inputs and outputs of every product, and the weights of one model.
class GemmBench {
 public:
  static StatusOr<std::unique_ptr<GemmBench>> Create(const BenchGemmOptions& options) {
    std::unique_ptr<GemmBench> bench(new GemmBench(options));
    GLOAM_RETURN_IF_ERROR(bench->SetUp());
    return bench;
  }

  // A row per product, and one for a layer's products together.
  void Measure(int num_rows, json& rows) {
    double layer_us = 0;
    int64_t layer_bytes = 0;
    for (const Product& product : products_) {
      const double us = Time(product, num_rows);
      rows.push_back(RowOf(product.name, num_rows, us, product.bytes));
      if (!product.of_layer) continue;
      layer_us += us;
      layer_bytes += product.bytes;
    }
    rows.push_back(RowOf("layer", num_rows, layer_us, layer_bytes));
  }

  json Facts() const {
    return {{"device", ops_->DeviceName()},
            {"model", config_.name},
            {"weight_bytes", weights_.bytes},
            {"read_gigabytes_per_second", read_rate_ / 1e9},
            {"batch_invariant", options_.model.settings.batch_invariant}};
  }

 private:
  // `run` multiplies so many rows by the weights of one layer, or by the output layer's.
  struct Product {
    std::string name;
    int64_t bytes = 0;  // of the weights of one run
    bool of_layer = true;
    int runs = 0;
    std::function<void(int run, int num_rows)> run;
  };

  explicit GemmBench(const BenchGemmOptions& options) : options_(options) {}

  Status SetUp() {
    GLOAM_ASSIGN_OR_RETURN(ops_, MakeBackend(options_.model.settings));
    GLOAM_ASSIGN_OR_RETURN(const auto file, OpenBenchModel(options_.model));
    config_ = file->config();
    GLOAM_ASSIGN_OR_RETURN(weights_, LoadLlamaWeights(*file, *ops_, {}));
    read_rate_ = ops_->MeasureReadRate();

    const int max_rows = *std::max_element(options_.rows.begin(), options_.rows.end());
    GLOAM_RETURN_IF_ERROR(ops_->Reserve({.max_tokens = max_rows,
                                         .max_seqs = max_rows,
                                         .max_context = kBlockTokens,
                                         .max_logit_rows = max_rows,
                                         .num_heads = config_.num_heads,
                                         .num_kv_heads = config_.num_kv_heads,
                                         .head_dim = config_.head_dim,
                                         .hidden_size = config_.hidden_size,
                                         .intermediate_size = config_.intermediate_size,
                                         .vocab_size = config_.vocab_size}));
    const int64_t q_dim = int64_t{config_.num_heads} * config_.head_dim;
    const int64_t kv_dim = int64_t{config_.num_kv_heads} * config_.head_dim;
    const ActivationDTypes dtypes = ops_->activation_dtypes();
    GLOAM_ASSIGN_OR_RETURN(input_, Make(dtypes.input, max_rows,
                                        std::max({int64_t{config_.hidden_size}, q_dim,
                                                  int64_t{2} * config_.intermediate_size})));
    GLOAM_ASSIGN_OR_RETURN(qkv_, Make(dtypes.qkv, max_rows, q_dim + 2 * kv_dim));
    GLOAM_ASSIGN_OR_RETURN(hidden_, Make(dtypes.residual, max_rows, config_.hidden_size));
    GLOAM_ASSIGN_OR_RETURN(gate_up_,
                           Make(dtypes.input, max_rows, int64_t{2} * config_.intermediate_size));
    GLOAM_ASSIGN_OR_RETURN(logits_, Make(DType::kF32, max_rows, config_.vocab_size));
    AddProducts(q_dim);
    return OkStatus();
  }

  void AddProducts(int64_t q_dim) {
    const LlamaLayer& first = weights_.layers.front();
    const int layers = config_.num_layers;
    const int64_t intermediate = config_.intermediate_size;
    products_ = {
        {"qkv", BytesOf(first.qkv), /*of_layer=*/true, layers,
         [this](int i, int m) {
           weights_.layers[i].qkv.Apply(*ops_, Input(m, config_.hidden_size), qkv_.view.Rows(0, m),
                                        /*accumulate=*/false);
         }},
        {"attention_out", BytesOf(first.attention_out), /*of_layer=*/true, layers,
         [this, q_dim](int i, int m) {
           weights_.layers[i].attention_out.Apply(*ops_, Input(m, q_dim), hidden_.view.Rows(0, m),
                                                  /*accumulate=*/true);
         }},
        {"gate_up", BytesOf(first.gate_up), /*of_layer=*/true, layers,
         [this, intermediate](int i, int m) {
           const TensorView x = Input(m, config_.hidden_size);
           const TensorView gate_up = gate_up_.view.Rows(0, m);
           const TensorView gate = gate_up.Columns(0, intermediate);
           const StackedLinear& linear = weights_.layers[i].gate_up;
           if (linear.ApplyGated(*ops_, x, gate)) return;
           linear.Apply(*ops_, x, gate_up, /*accumulate=*/false);
           ops_->SiluMul(
               {.gate = gate, .up = gate_up.Columns(intermediate, intermediate), .out = gate});
         }},
        {"down", BytesOf(first.down), /*of_layer=*/true, layers,
         [this, intermediate](int i, int m) {
           weights_.layers[i].down.Apply(*ops_, Input(m, intermediate), hidden_.view.Rows(0, m),
                                         /*accumulate=*/true);
         }},
        {"lm_head", Head()->bytes(), /*of_layer=*/false, kHeadRuns, [this](int /*i*/, int m) {
           ops_->Gemm({.x = Input(m, config_.hidden_size),
                       .outputs = {{{.weight = Head(), .y = logits_.view.Rows(0, m)}}},
                       .num_outputs = 1});
         }}};
  }

  const Weight* Head() const {
    return weights_.lm_head ? weights_.lm_head.get() : weights_.token_embedding.get();
  }

  struct Matrix {
    Buffer memory;
    TensorView view;
  };

  // Holds random values of magnitude below 1: zeros cost a device less power than data does.
  StatusOr<Matrix> Make(DType dtype, int64_t rows, int64_t cols) {
    const auto bytes = static_cast<size_t>(rows * cols) * DTypeBytes(dtype);
    Matrix matrix;
    GLOAM_ASSIGN_OR_RETURN(matrix.memory, ops_->Allocate(bytes));
    matrix.view = TensorView::Contiguous(matrix.memory.data(), dtype, ops_->device(), {rows, cols});
    std::vector<uint32_t> words((bytes + 3) / 4);
    // Two bf16 or one fp32: any sign, exponents below that of 1.
    for (uint32_t& word : words)
      word = (static_cast<uint32_t>(random_()) & 0x807f807f) | 0x3f003f00;
    ops_->Upload(matrix.memory.data(), words.data(), bytes);
    return matrix;
  }

  TensorView Input(int num_rows, int64_t cols) const {
    return input_.view.Rows(0, num_rows).Columns(0, cols);
  }

  // Microseconds of one run, of the median over repeated sets of runs.
  double Time(const Product& product, int num_rows) {
    const uint64_t key = ++last_key_;
    std::vector<double> us;
    constexpr int kWarmUps = 3;  // the first load kernels and record
    for (int i = 0; i < kWarmUps + options_.repeats; ++i) {
      float taken = 0;
      const auto start = Clock::now();
      ops_->Repeat(key, [&] {
        for (int run = 0; run < product.runs; ++run) product.run(run, num_rows);
      });
      ops_->Download(&taken, hidden_.memory.data(), sizeof(taken));  // waits
      const std::chrono::duration<double, std::micro> elapsed = Clock::now() - start;
      if (i >= kWarmUps) us.push_back(elapsed.count() / product.runs);
    }
    return Median(std::move(us));
  }

  json RowOf(const std::string& product, int num_rows, double us, int64_t bytes) const {
    const double rate = static_cast<double>(bytes) / us * 1e6;
    return {{"product", product},
            {"rows", num_rows},
            {"us", us},
            {"megabytes", static_cast<double>(bytes) / 1e6},
            {"gigabytes_per_second", rate / 1e9},
            {"percent_of_read_rate", 100 * rate / read_rate_}};
  }

  const BenchGemmOptions& options_;
  std::mt19937 random_{1};
  std::unique_ptr<Ops> ops_;
  ModelConfig config_;
  LlamaWeights weights_;
  double read_rate_ = 0;
  Matrix input_, qkv_, hidden_, gate_up_, logits_;
  std::vector<Product> products_;
  uint64_t last_key_ = 0;
};

Status Run(const BenchGemmOptions& options) {
  GLOAM_ASSIGN_OR_RETURN(const std::unique_ptr<GemmBench> bench, GemmBench::Create(options));
  json rows = json::array();
  for (const int num_rows : options.rows) bench->Measure(num_rows, rows);
  if (options.json) {
    fmt::print("{}\n", json{{"facts", bench->Facts()}, {"rows", rows}}.dump(1));
    return OkStatus();
  }
  fmt::print("{}\n", bench->Facts().dump(1));
  fmt::print("{:>14} {:>6} {:>10} {:>8} {:>9} {:>7}\n", "product", "rows", "us", "MB", "GB/s",
             "% read");
  for (const json& row : rows) {
    fmt::print("{:>14} {:>6} {:>10.1f} {:>8.1f} {:>9.0f} {:>7.1f}\n",
               row["product"].get<std::string>(), row["rows"].get<int>(), row["us"].get<double>(),
               row["megabytes"].get<double>(), row["gigabytes_per_second"].get<double>(),
               row["percent_of_read_rate"].get<double>());
  }
  return OkStatus();
}

}  // namespace

int RunBenchGemm(const BenchGemmOptions& options) {
  const Status status = Run(options);
  return status.ok() ? 0 : Fail(status);
}

}  // namespace gloam
