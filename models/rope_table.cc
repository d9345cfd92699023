#include "models/rope_table.h"

#include <cmath>
#include <numbers>

#include "base/check.h"

namespace gloam {
namespace {

// Llama 3.1: waves longer than the original context can show are slowed down by `factor`, short
// ones are kept, and those between are blended by how many turns fit into the original context.
double ScaleLlama3(double frequency, const RopeScaling& scaling) {
  const double wavelength = 2 * std::numbers::pi / frequency;
  const double turns = scaling.original_max_position / wavelength;
  if (turns < scaling.low_freq_factor) return frequency / scaling.factor;
  if (turns > scaling.high_freq_factor) return frequency;
  const double smooth =
      (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
  return (1 - smooth) * frequency / scaling.factor + smooth * frequency;
}

double Scale(double frequency, const RopeScaling& scaling) {
  switch (scaling.type) {
    case RopeScaling::Type::kNone:
      return frequency;
    case RopeScaling::Type::kLinear:
      return frequency / scaling.factor;
    case RopeScaling::Type::kLlama3:
      return ScaleLlama3(frequency, scaling);
  }
  return frequency;
}

}  // namespace

std::vector<double> RopeFrequencies(const ModelConfig& config) {
  const std::vector<float>& factors = config.rope_scaling.freq_factors;
  std::vector<double> frequencies(config.rotary_dim / 2);
  GLOAM_CHECK(factors.empty() || factors.size() == frequencies.size());
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double exponent = -2.0 * static_cast<double>(i) / config.rotary_dim;
    frequencies[i] = Scale(std::pow(double{config.rope_theta}, exponent), config.rope_scaling);
    if (!factors.empty()) frequencies[i] /= factors[i];
  }
  return frequencies;
}

RopeTable MakeRopeTable(const ModelConfig& config, int num_positions) {
  const std::vector<double> frequencies = RopeFrequencies(config);
  const size_t size = frequencies.size() * num_positions;
  RopeTable table = {.cos = std::vector<float>(size), .sin = std::vector<float>(size)};
  size_t next = 0;
  for (int position = 0; position < num_positions; ++position) {
    for (const double frequency : frequencies) {
      const double angle = position * frequency;
      table.cos[next] = static_cast<float>(std::cos(angle));
      table.sin[next] = static_cast<float>(std::sin(angle));
      ++next;
    }
  }
  return table;
}

}  // namespace gloam
