// Checks that every model passes, whichever files it came from: numbers that make sense, and
// exactly the tensors of their shapes that the numbers call for.
#pragma once

#include <string>
#include <vector>

#include "base/status.h"
#include "models/model_config.h"
#include "models/model_file.h"

namespace gloam {

// What the source calls each number, so that an error names the key at fault.
struct ConfigKeys {
  std::string file;
  std::string num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim;
  std::string max_position, rms_norm_eps, rope_theta, rotary_dim, rope_factor, sliding_window;
};

// Errors: kInvalidArgument naming file, key, value and range.
[[nodiscard]] Status CheckConfig(const ModelConfig& config, const ConfigKeys& keys);

// Errors: kInvalidArgument (a tensor missing or of another shape), kUnimplemented (a tensor that
// the forward pass would not use, a quantised vector); each names file and tensor.
[[nodiscard]] Status CheckTensors(const ModelConfig& config, const std::vector<TensorInfo>& tensors,
                                  const std::string& file);

// SmolLM3 leaves every fourth layer without rotary embedding.
std::vector<bool> SmolLm3RopeLayers(int num_layers);

}  // namespace gloam
