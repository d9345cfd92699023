#include "models/inspect.h"

#include <algorithm>
#include <map>
#include <string>
#include <string_view>

#include "fmt/format.h"
#include "fmt/ranges.h"

namespace gloam {
namespace {

constexpr int64_t kKvElementBytes = 2;  // bf16, the cache's default

void Line(std::ostream& out, std::string_view label, std::string_view value) {
  out << fmt::format("{:<16} {}\n", label, value);
}

int64_t ElementsOf(const TensorInfo& tensor) { return tensor.data.rows * tensor.data.cols; }

int64_t BytesOf(const TensorInfo& tensor) {
  return tensor.data.rows * RowBytes(tensor.data.type, tensor.data.cols);
}

std::string CountText(int64_t count) {
  const double value = static_cast<double>(count);
  if (count >= 1'000'000'000) return fmt::format("{:.2f} B", value / 1e9);
  if (count >= 1'000'000) return fmt::format("{:.1f} M", value / 1e6);
  return fmt::format("{}", count);
}

std::string BytesText(int64_t bytes) {
  const double value = static_cast<double>(bytes);
  if (bytes >= 1'000'000'000) return fmt::format("{:.2f} GB", value / 1e9);
  if (bytes >= 1'000'000) return fmt::format("{:.1f} MB", value / 1e6);
  return fmt::format("{:.1f} KB", value / 1e3);
}

std::string RopeText(const ModelConfig& config) {
  std::string text = fmt::format(
      "base {}, {} of {} channels, {}", config.rope_theta, config.rotary_dim, config.head_dim,
      config.rope_style == RopeStyle::kNeox ? "pairs (i, i + n/2)" : "pairs (2i, 2i + 1)");
  const RopeScaling& scaling = config.rope_scaling;
  if (scaling.type == RopeScaling::Type::kLinear) {
    text += fmt::format(", linear scaling x{}", scaling.factor);
  } else if (scaling.type == RopeScaling::Type::kLlama3) {
    text += fmt::format(", Llama 3 scaling x{} beyond {}", scaling.factor,
                        scaling.original_max_position);
  }
  if (!scaling.freq_factors.empty()) text += ", factors per channel";
  const auto without =
      std::count(config.layer_uses_rope.begin(), config.layer_uses_rope.end(), false);
  if (without > 0) text += fmt::format(", none in {} of {} layers", without, config.num_layers);
  return text;
}

void WriteNumbers(const ModelConfig& config, std::ostream& out) {
  Line(out, "layers", fmt::format("{}", config.num_layers));
  Line(out, "width",
       fmt::format("{}, feed-forward {}", config.hidden_size, config.intermediate_size));
  Line(out, "attention",
       fmt::format("{} heads, {} KV heads, {} channels{}{}", config.num_heads, config.num_kv_heads,
                   config.head_dim, config.qk_norm ? ", QK norm" : "",
                   config.attention_bias ? ", Q/K/V biases" : ""));
  if (config.sliding_window > 0) {
    Line(out, "sliding window", fmt::format("{} tokens", config.sliding_window));
  }
  Line(out, "rope", RopeText(config));
  Line(out, "context", fmt::format("{} tokens", config.max_position));
  const int64_t kv_bytes =
      2 * kKvElementBytes * config.num_layers * config.num_kv_heads * config.head_dim;
  Line(out, "KV cache",
       fmt::format("{} bytes a token in bf16, {} for the whole context", kv_bytes,
                   BytesText(kv_bytes * config.max_position)));
  Line(out, "vocabulary",
       fmt::format("{} tokens, {} embeddings", config.vocab_size,
                   config.tie_embeddings ? "tied" : "untied"));
}

void WriteWeights(const ModelFile& file, std::ostream& out) {
  struct Sum {
    int tensors = 0;
    int64_t elements = 0, bytes = 0;
  };
  std::map<WeightType, Sum> sums;
  Sum total;
  for (const TensorInfo& tensor : file.tensors()) {
    for (Sum* sum : {&sums[tensor.data.type], &total}) {
      ++sum->tensors;
      sum->elements += ElementsOf(tensor);
      sum->bytes += BytesOf(tensor);
    }
  }
  Line(out, "parameters", CountText(total.elements));
  Line(out, "weights",
       fmt::format("{} in {} tensors, {:.2f} bits a parameter", BytesText(total.bytes),
                   total.tensors,
                   8.0 * static_cast<double>(total.bytes) / static_cast<double>(total.elements)));
  for (const auto& [type, sum] : sums) {
    Line(out, "",
         fmt::format("{:<5} {:>5} tensors {:>10} parameters {:>10}", InfoOf(type).name, sum.tensors,
                     CountText(sum.elements), BytesText(sum.bytes)));
  }
}

void WriteTokenizer(const ModelFile& file, std::ostream& out) {
  const auto tokenizer = file.LoadTokenizer();
  if (!tokenizer.ok()) {
    Line(out, "tokenizer", fmt::format("cannot be loaded: {}", MessageOf(tokenizer.status())));
    return;
  }
  Line(out, "tokenizer",
       fmt::format("{}, {} tokens, an answer ends with {}",
                   (*tokenizer)->strips_leading_space() ? "SentencePiece" : "byte-level BPE",
                   (*tokenizer)->vocab_size(), (*tokenizer)->eos_ids()));
}

}  // namespace

void InspectModel(const ModelFile& file, const InspectOptions& options, std::ostream& out) {
  const ModelConfig& config = file.config();
  Line(out, "file", file.path());
  if (!config.name.empty()) Line(out, "name", config.name);
  Line(out, "architecture", config.architecture);
  WriteNumbers(config, out);
  WriteWeights(file, out);
  WriteTokenizer(file, out);
  Line(out, "chat template",
       file.chat_template().empty() ? "no"
                                    : fmt::format("yes, {} bytes", file.chat_template().size()));
  if (!options.list_tensors) return;
  out << '\n';
  for (const TensorInfo& tensor : file.tensors()) {
    out << fmt::format("{:<32} {:<5} [{}] {}\n", tensor.name, InfoOf(tensor.data.type).name,
                       fmt::join(tensor.shape, ", "), BytesText(BytesOf(tensor)));
  }
}

}  // namespace gloam
