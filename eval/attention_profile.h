// AttentionProfile: queries, keys and values of a model's own run over real text, to measure
// attention on. Random keys would make attention flat and say nothing about sparse attention.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "kernels/ops.h"
#include "models/model.h"

namespace gloam {

struct AttentionProfile {
  struct Layer {
    int layer = 0;
    std::vector<float> queries;       // [num_queries][num_heads][head_dim], after RoPE
    std::vector<std::byte> kv_cache;  // [num_blocks] blocks of kv layout
  };

  std::string model;  // whose run it was
  int num_heads = 0;
  KvLayout kv;
  int context = 0;      // tokens whose keys and values are there
  int num_queries = 0;  // of the last tokens: query i belongs to position context - num_queries + i
  std::vector<Layer> layers;

  int64_t num_blocks() const { return (context + kBlockTokens - 1) / kBlockTokens; }
};

struct ProfileOptions {
  int context = 0;  // tokens
  int num_queries = 16;
  std::vector<int> layers;
};

// Runs the first `context` tokens through `model`, which must have been loaded with ops made by
// MakeProfilingOps. Errors: kInvalidArgument (too few tokens, a layer that is not there).
class ProfilingOps;
[[nodiscard]] StatusOr<AttentionProfile> RecordProfile(Model& model, ProfilingOps& ops,
                                                       std::span<const int32_t> tokens,
                                                       const ProfileOptions& options);

// A file: one line of JSON with the shape, then the layers' arrays in order.
[[nodiscard]] Status SaveProfile(const AttentionProfile& profile,
                                 const std::filesystem::path& path);
// Errors: kNotFound, kInvalidArgument naming file and field.
[[nodiscard]] StatusOr<AttentionProfile> LoadProfile(const std::filesystem::path& path);

}  // namespace gloam
