#include "bench/timed_ops.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <optional>
#include <utility>
#include <vector>

#include "fmt/format.h"

namespace gloam {

namespace {

using Clock = std::chrono::steady_clock;

// A matrix product in the table: what it is called and what it takes.
struct Product {
  std::string name;
  double flops = 0;
  double weight_bytes = 0;

  void Add(const TensorView& x, const Weight& weight, const char* separator) {
    name += fmt::format("{}{}x{} {}", separator, weight.rows(), weight.cols(),
                        InfoOf(weight.type()).name);
    flops += 2.0 * static_cast<double>(x.shape[0] * weight.rows() * weight.cols());
    weight_bytes += static_cast<double>(weight.bytes());
  }
};

void Count(const Product& product, TimedOps::Entry* entry) {
  entry->flops += product.flops;
  entry->weight_bytes += product.weight_bytes;
}

}  // namespace

TimedOps::Entry& TimedOps::AddCall(const std::string& name, Clock::time_point begin) {
  const std::chrono::duration<double> elapsed = Clock::now() - begin;
  Entry& entry = entries_[name];
  ++entry.calls;
  entry.seconds += elapsed.count();
  return entry;
}

template <typename Call>
TimedOps::Entry& TimedOps::Time(const std::string& name, const Call& call) {
  const auto begin = Clock::now();
  call();
  return AddCall(name, begin);
}

void TimedOps::Embed(const EmbedParams& params) {
  Time("Embed", [&] { ops_.Embed(params); });
}
void TimedOps::RmsNorm(const RmsNormParams& params) {
  Time("RmsNorm", [&] { ops_.RmsNorm(params); });
}
void TimedOps::SiluMul(const SiluMulParams& params) {
  Time("SiluMul", [&] { ops_.SiluMul(params); });
}
void TimedOps::GatherRows(const GatherRowsParams& params) {
  Time("GatherRows", [&] { ops_.GatherRows(params); });
}
void TimedOps::RopeAppendKv(const RopeKvParams& params) {
  Time("RopeAppendKv", [&] { ops_.RopeAppendKv(params); });
}
void TimedOps::Attention(const AttentionParams& params) {
  Time("Attention", [&] { ops_.Attention(params); });
}
void TimedOps::UpdateSidecars(const UpdateSidecarsParams& params) {
  Time("UpdateSidecars", [&] { ops_.UpdateSidecars(params); });
}
void TimedOps::CompressPrompt(const CompressPromptParams& params) {
  Time("CompressPrompt", [&] { ops_.CompressPrompt(params); });
}
void TimedOps::SparseAttention(const SparseAttentionParams& params) {
  Time("SparseAttention", [&] { ops_.SparseAttention(params); });
}
void TimedOps::Sample(const SampleParams& params) {
  Time("Sample", [&] { ops_.Sample(params); });
}
void TimedOps::Score(const ScoreParams& params) {
  Time("Score", [&] { ops_.Score(params); });
}

void TimedOps::Gemm(const GemmParams& params) {
  Product product{.name = "Gemm"};
  for (int i = 0; i < params.num_outputs; ++i) {
    product.Add(params.x, *params.outputs[i].weight, i == 0 ? " " : " + ");
  }
  Count(product, &Time(product.name, [&] { ops_.Gemm(params); }));
}

void TimedOps::AddProduct(const char* name, const TensorView& x, const Weight& weight,
                          Clock::time_point begin) {
  Product product{.name = name};
  product.Add(x, weight, " ");
  Count(product, &AddCall(product.name, begin));
}

bool TimedOps::GatedGemm(const GatedGemmParams& params) {
  const auto begin = Clock::now();
  if (!ops_.GatedGemm(params)) return false;  // Gemm and SiluMul follow
  AddProduct("GatedGemm", params.x, *params.weight, begin);
  return true;
}

std::optional<LogitRows> TimedOps::GreedyLogits(const GreedyLogitsParams& params) {
  const auto begin = Clock::now();
  const std::optional<LogitRows> logits = ops_.GreedyLogits(params);
  if (!logits) return logits;  // Gemm follows
  AddProduct("GreedyLogits", params.x, *params.weight, begin);
  return logits;
}

std::string TimedOps::Report() const {
  std::vector<std::pair<std::string, Entry>> rows(entries_.begin(), entries_.end());
  std::sort(rows.begin(), rows.end(),
            [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
  double total = 0;
  for (const auto& [name, entry] : rows) total += entry.seconds;
  std::string report = fmt::format("  {:<44} {:>6} {:>10} {:>7} {:>8} {:>7}\n", "operation",
                                   "calls", "ms/call", "share", "GFLOP/s", "GB/s");
  for (const auto& [name, entry] : rows) {
    fmt::format_to(std::back_inserter(report), "  {:<44} {:>6} {:>10.4f} {:>6.1f}%", name,
                   entry.calls, 1e3 * entry.seconds / static_cast<double>(entry.calls),
                   100 * entry.seconds / total);
    if (entry.flops > 0) {
      fmt::format_to(std::back_inserter(report), " {:>8.1f} {:>7.2f}",
                     entry.flops / entry.seconds / 1e9, entry.weight_bytes / entry.seconds / 1e9);
    }
    report += '\n';
  }
  return report;
}

}  // namespace gloam
