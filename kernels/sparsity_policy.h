// SparsityPolicy: how one request's decode attention chooses the tokens that it reads. Immutable
// once made (models/attention/policy_json.h reads it from JSON); shared by the requests that name
// it; any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/sidecars.h"

namespace gloam {

class Selector;

// The selector's settings: one value per key that it declares (kernels/selector.h).
struct SelectorConfig {
  const Selector* selector = nullptr;  // never null in a finished policy
  std::vector<double> numbers;         // by the selector's `number_keys`; NaN: not given
  std::vector<int> layers;             // of the key with a list of layers: ascending, each once
  std::shared_ptr<const ChannelTable> channels;  // of the channel file, as many as are used
  std::string channel_file;                      // its path as the policy writes it
  std::string channel_projection;                // one of kChannelProjections
};

enum class CompressorType : uint8_t { kNone, kSnapKv };
enum class Pooling : uint8_t { kAverage, kMax };
struct CompressorConfig {
  CompressorType type = CompressorType::kNone;
  int window_size = 64;         // last prompt tokens, which vote and are kept
  int max_capacity_prompt = 0;  // prompt tokens kept, the window included
  int kernel_size = 5;          // odd
  Pooling pooling = Pooling::kAverage;
};

enum class EstimatorType : uint8_t {
  kNone,         // exact logits
  kMinMaxQuant,  // keys quantised per token with a minimum
  kMaxQuant,     // the same, symmetric
  kBlockQuant,   // keys quantised per channel within a block
};
struct EstimatorConfig {
  EstimatorType type = EstimatorType::kNone;
  int quant_bits = 4;
};

enum class PrunerType : uint8_t {
  kNone,       // keeps every candidate
  kTopP,       // the smallest set of largest weights that holds `threshold` of the mass
  kThreshold,  // logits within `threshold` of the row's largest
};
struct PrunerConfig {
  PrunerType type = PrunerType::kNone;
  float threshold = 1.0f;
  int min_tokens = 0;  // per query head; the largest weights fill up
  // kTopP: candidates with at least this share of the mass are kept too; 0: none. They are few, at
  // most 1 / keep_weight, and it is they who carry what a head looks up.
  float keep_weight = 0;
  // A query head prunes what its group has selected, and attends to what its group has kept.
  bool share_group = false;
};

enum class TailType : uint8_t {
  kNone,       // what is not kept counts nothing
  kBlockMean,  // its estimated mass goes to the mean value of its block
};

struct SparsityPolicy {
  std::string name;  // as requests name it; empty for one given in a request
  CompressorConfig compressor;
  SelectorConfig selector;
  EstimatorConfig estimator;
  PrunerConfig pruner;
  TailType tail = TailType::kNone;
  int tail_block = kBlockTokens;  // tokens whose mean value is one; a multiple of 16
  int sink_tokens = 0;            // first tokens, always kept
  int recent_tokens = 0;          // last tokens, always kept beside the open block
  bool skip_first_two_layers = true;
  bool use_estimated_weights_in_attn = false;
  int bypass_below_tokens = 0;  // dense while the context is shorter
  bool report_true_mass = false;

  bool compresses() const { return compressor.type != CompressorType::kNone; }
};

// Layers that stay dense with skip_first_two_layers.
inline constexpr int kDenseLayers = 2;

// The sidecars that a policy reads.
SidecarConfig SidecarsOf(const SparsityPolicy& policy);

}  // namespace gloam
