#include "tests/models/tiny_model.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numbers>

#include "base/check.h"

namespace gloam {
namespace {

using Row = std::vector<double>;
using Matrix = std::vector<Row>;

Matrix Dequantize(const TinyModelFile& file, const std::string& name) {
  const auto tensor = file.Find(name);
  GLOAM_CHECK(tensor.ok());
  std::vector<float> row(tensor->data.cols);
  Matrix matrix;
  for (int64_t r = 0; r < tensor->data.rows; ++r) {
    DequantizeRow(tensor->data, r, row.data());
    matrix.emplace_back(row.begin(), row.end());
  }
  return matrix;
}

Row Vector(const TinyModelFile& file, const std::string& name) { return Dequantize(file, name)[0]; }

Row Multiply(const Matrix& weight, const Row& x) {
  Row y(weight.size());
  for (size_t n = 0; n < y.size(); ++n) {
    for (size_t k = 0; k < x.size(); ++k) y[n] += weight[n][k] * x[k];
  }
  return y;
}

void AddTo(Row& x, const Row& y) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

// Normalises [begin, begin + weight.size()) of x.
void Normalise(Row& x, size_t begin, const Row& weight, double eps) {
  double sum = 0;
  for (size_t i = 0; i < weight.size(); ++i) sum += x[begin + i] * x[begin + i];
  const double scale = 1 / std::sqrt(sum / static_cast<double>(weight.size()) + eps);
  for (size_t i = 0; i < weight.size(); ++i) x[begin + i] *= scale * weight[i];
}

Row Normalised(Row x, const Row& weight, double eps) {
  Normalise(x, 0, weight, eps);
  return x;
}

// The inverse frequency of pair i, as transformers' modeling_rope_utils words it.
double InverseFrequency(const ModelConfig& config, int i) {
  double inv_freq = 1 / std::pow(config.rope_theta, 2.0 * i / config.rotary_dim);
  const RopeScaling& scaling = config.rope_scaling;
  if (scaling.type == RopeScaling::Type::kLinear) inv_freq /= scaling.factor;
  if (scaling.type == RopeScaling::Type::kLlama3) {
    const double low_freq_wavelen = scaling.original_max_position / scaling.low_freq_factor;
    const double high_freq_wavelen = scaling.original_max_position / scaling.high_freq_factor;
    const double wavelen = 2 * std::numbers::pi / inv_freq;
    if (wavelen > low_freq_wavelen) {
      inv_freq /= scaling.factor;
    } else if (wavelen >= high_freq_wavelen) {
      const double smooth = (scaling.original_max_position / wavelen - scaling.low_freq_factor) /
                            (scaling.high_freq_factor - scaling.low_freq_factor);
      inv_freq = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq;
    }
  }
  if (!scaling.freq_factors.empty()) inv_freq /= scaling.freq_factors[i];
  return inv_freq;
}

void Rotate(Row& x, size_t begin, int position, const ModelConfig& config) {
  const int pairs = config.rotary_dim / 2;
  for (int i = 0; i < pairs; ++i) {
    const bool neox = config.rope_style == RopeStyle::kNeox;
    double& a = x[begin + (neox ? i : 2 * i)];
    double& b = x[begin + (neox ? i + pairs : 2 * i + 1)];
    const double angle = position * InverseFrequency(config, i);
    const double rotated = a * std::cos(angle) - b * std::sin(angle);
    b = a * std::sin(angle) + b * std::cos(angle);
    a = rotated;
  }
}

// Attention of the query at `position` over keys[0..position], per head.
Row Attend(const ModelConfig& config, const Row& q, const Matrix& keys, const Matrix& values,
           int position) {
  const int dim = config.head_dim;
  const int group = config.num_heads / config.num_kv_heads;
  const int begin =
      config.sliding_window > 0 ? std::max(0, position + 1 - config.sliding_window) : 0;
  Row out(q.size());
  for (int head = 0; head < config.num_heads; ++head) {
    const int kv_offset = head / group * dim;
    Row weights;
    for (int j = begin; j <= position; ++j) {
      double dot = 0;
      for (int d = 0; d < dim; ++d) dot += q[head * dim + d] * keys[j][kv_offset + d];
      weights.push_back(dot / std::sqrt(dim));
    }
    const double max = *std::max_element(weights.begin(), weights.end());
    double sum = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - max);
    for (int j = begin; j <= position; ++j) {
      for (int d = 0; d < dim; ++d) {
        out[head * dim + d] += weights[j - begin] / sum * values[j][kv_offset + d];
      }
    }
  }
  return out;
}

}  // namespace

TinyModelFile::TinyModelFile(const ModelConfig& config, bool mixed_types, uint64_t seed)
    : config_(config), random_(seed) {
  const WeightType type = mixed_types ? WeightType::kQ8_0 : WeightType::kF32;
  const WeightType other = mixed_types ? WeightType::kBF16 : WeightType::kF32;
  const int64_t hidden = config.hidden_size;
  const int64_t q_rows = int64_t{config.num_heads} * config.head_dim;
  const int64_t kv_rows = int64_t{config.num_kv_heads} * config.head_dim;
  AddMatrix("token_embd.weight", type, config.vocab_size, hidden);
  AddVector("output_norm.weight", hidden, 1, 0.2);
  if (!config.tie_embeddings) AddMatrix("output.weight", other, config.vocab_size, hidden);
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = "blk." + std::to_string(layer) + ".";
    AddVector(prefix + "attn_norm.weight", hidden, 1, 0.2);
    AddMatrix(prefix + "attn_q.weight", type, q_rows, hidden);
    AddMatrix(prefix + "attn_k.weight", type, kv_rows, hidden);
    AddMatrix(prefix + "attn_v.weight", other, kv_rows, hidden);
    AddMatrix(prefix + "attn_output.weight", type, hidden, q_rows);
    AddVector(prefix + "ffn_norm.weight", hidden, 1, 0.2);
    AddMatrix(prefix + "ffn_gate.weight", type, config.intermediate_size, hidden);
    AddMatrix(prefix + "ffn_up.weight", other, config.intermediate_size, hidden);
    AddMatrix(prefix + "ffn_down.weight", type, hidden, config.intermediate_size);
    if (config.attention_bias) {
      AddVector(prefix + "attn_q.bias", q_rows, 0, 1);
      AddVector(prefix + "attn_k.bias", kv_rows, 0, 1);
      AddVector(prefix + "attn_v.bias", kv_rows, 0, 1);
    }
    if (config.qk_norm) {
      AddVector(prefix + "attn_q_norm.weight", config.head_dim, 1, 0.2);
      AddVector(prefix + "attn_k_norm.weight", config.head_dim, 1, 0.2);
    }
  }
}

StatusOr<std::unique_ptr<Tokenizer>> TinyModelFile::LoadTokenizer() const {
  return Unimplemented("a tiny model has no tokenizer");
}

void TinyModelFile::AddMatrix(const std::string& name, WeightType type, int64_t rows,
                              int64_t cols) {
  std::vector<std::byte> data(rows * RowBytes(type, cols));
  // Rows of about unit length times 1.5, so that attention is not flat and signals do not fade.
  const double deviation = 1.5 / std::sqrt(static_cast<double>(cols));
  std::normal_distribution<double> normal(0, deviation);
  std::uniform_int_distribution<int> quant(-127, 127);
  auto* next = data.data();
  const auto write = [&next](const auto& value) {
    std::memcpy(next, &value, sizeof(value));
    next += sizeof(value);
  };
  for (int64_t i = 0; i < rows * cols; ++i) {
    switch (type) {
      case WeightType::kF32:
        write(static_cast<float>(normal(random_)));
        break;
      case WeightType::kBF16:
        write(static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(normal(random_))) >>
                                    16));
        break;
      case WeightType::kQ8_0: {
        // A block of 32: a half-precision scale (2^-8, 2^-9 or 2^-10), then the quants.
        constexpr int kExponentShift = 10, kExponentBias = 15;
        if (i % 32 == 0) {
          write(static_cast<uint16_t>((kExponentBias - 8 - static_cast<int>(random_() % 3))
                                      << kExponentShift));
        }
        write(static_cast<int8_t>(quant(random_)));
        break;
      }
      default:
        GLOAM_CHECK(false && "types used here are F32, BF16 and Q8_0");
    }
  }
  Add(name, type, {rows, cols}, std::move(data));
}

void TinyModelFile::AddVector(const std::string& name, int64_t size, double mean,
                              double deviation) {
  std::normal_distribution<float> normal(static_cast<float>(mean), static_cast<float>(deviation));
  std::vector<std::byte> data(size * sizeof(float));
  for (int64_t i = 0; i < size; ++i) {
    const float value = normal(random_);
    std::memcpy(data.data() + i * sizeof(float), &value, sizeof(value));
  }
  Add(name, WeightType::kF32, {size}, std::move(data));
}

void TinyModelFile::Add(const std::string& name, WeightType type, std::vector<int64_t> shape,
                        std::vector<std::byte> data) {
  const int64_t rows = shape.size() == 1 ? 1 : shape[0];
  storage_.push_back(std::move(data));
  tensors_.push_back(
      {.name = name, .shape = shape, .data = {storage_.back().data(), type, rows, shape.back()}});
}

std::vector<std::vector<double>> ReferenceLogits(const TinyModelFile& file,
                                                 std::span<const int32_t> tokens) {
  const ModelConfig& config = file.config();
  const double eps = config.rms_norm_eps;
  const Matrix embedding = Dequantize(file, "token_embd.weight");
  Matrix hidden;
  for (const int32_t token : tokens) hidden.push_back(embedding[token]);

  for (int layer = 0; layer < config.num_layers; ++layer) {
    const std::string prefix = "blk." + std::to_string(layer) + ".";
    const auto matrix = [&](const char* name) { return Dequantize(file, prefix + name); };
    const auto vector = [&](const char* name) { return Vector(file, prefix + name); };
    const Matrix w_q = matrix("attn_q.weight"), w_k = matrix("attn_k.weight");
    const Matrix w_v = matrix("attn_v.weight"), w_o = matrix("attn_output.weight");
    const Matrix w_gate = matrix("ffn_gate.weight"), w_up = matrix("ffn_up.weight");
    const Matrix w_down = matrix("ffn_down.weight");
    const Row attention_norm = vector("attn_norm.weight"), ffn_norm = vector("ffn_norm.weight");
    const bool uses_rope = config.layer_uses_rope.empty() || config.layer_uses_rope[layer];

    Matrix keys, values;
    for (size_t t = 0; t < tokens.size(); ++t) {
      const int position = static_cast<int>(t);
      const Row x = Normalised(hidden[t], attention_norm, eps);
      Row q = Multiply(w_q, x), k = Multiply(w_k, x), v = Multiply(w_v, x);
      if (config.attention_bias) {
        AddTo(q, vector("attn_q.bias"));
        AddTo(k, vector("attn_k.bias"));
        AddTo(v, vector("attn_v.bias"));
      }
      for (auto [row, norm] : {std::pair{&q, "attn_q_norm.weight"}, {&k, "attn_k_norm.weight"}}) {
        for (size_t begin = 0; begin < row->size(); begin += config.head_dim) {
          if (config.qk_norm) Normalise(*row, begin, vector(norm), eps);
          if (uses_rope) Rotate(*row, begin, position, config);
        }
      }
      keys.push_back(k);
      values.push_back(v);
      AddTo(hidden[t], Multiply(w_o, Attend(config, q, keys, values, position)));
    }
    for (Row& row : hidden) {
      const Row x = Normalised(row, ffn_norm, eps);
      Row gate = Multiply(w_gate, x);
      const Row up = Multiply(w_up, x);
      for (size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
      AddTo(row, Multiply(w_down, gate));
    }
  }

  const Matrix lm_head = config.tie_embeddings ? embedding : Dequantize(file, "output.weight");
  const Row output_norm = Vector(file, "output_norm.weight");
  Matrix logits;
  for (const Row& row : hidden)
    logits.push_back(Multiply(lm_head, Normalised(row, output_norm, eps)));
  return logits;
}

}  // namespace gloam
