// RopeTable: cos and sin of every position and frequency of a model, with its rope scaling.
// Computed once at load, in double; a plain value.
#pragma once

#include <vector>

#include "models/model_config.h"

namespace gloam {

struct RopeTable {
  std::vector<float> cos;  // [num_positions, rotary_dim / 2]
  std::vector<float> sin;  // same
};

// The angle by which each pair of channels turns per position, [rotary_dim / 2]: theta^(-2i/dim),
// scaled as Llama 3.1 (transformers' `rope_type: llama3`), linearly, or by the file's own factors.
std::vector<double> RopeFrequencies(const ModelConfig& config);

RopeTable MakeRopeTable(const ModelConfig& config, int num_positions);

}  // namespace gloam
