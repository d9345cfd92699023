// Selector: the first stage of sparse attention. Picks, per query head, the candidate tokens that
// the later stages look at. To add one: a file in kernels/selectors/ and its row in
// kernels/selectors/registry.cc; docs/add_selector.md walks through a real one.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>

#include "kernels/cpu/thread_pool.h"
#include "kernels/paged_kv.h"
#include "kernels/sidecars.h"
#include "kernels/sparsity_policy.h"
#include "kernels/token_set.h"

namespace gloam {

enum class KeyUse : uint8_t {
  kRequired,
  kOptional,  // NumberKey::default_value where it is not given
  kOneOf,     // exactly one of the selector's keys marked so is given
};

// A numeric key of a selector's configuration.
struct NumberKey {
  std::string_view name;
  double min = 0;
  double max = 0;
  bool integer = true;
  KeyUse use = KeyUse::kRequired;
  double default_value = 0;
  std::span<const double> allowed = {};  // where not empty: the only values
};

// The keys of a selector that reads a file of calibrated channels
// (models/attention/channel_table.h).
struct ChannelFileKeys {
  std::string_view path;        // key of the file's path
  std::string_view projection;  // key of one of kChannelProjections; the first is the default
  std::string_view count;       // the number key that says how many channels a head uses
};
inline constexpr std::array<std::string_view, 3> kChannelProjections = {"qk", "q", "k"};

// The full blocks of one sequence, for one KV head.
struct KeyBlocks {
  KvLayerView kv;
  SidecarLayerView sidecars;
  const int32_t* block_table = nullptr;  // [num_blocks] block ids
  int64_t num_blocks = 0;                // full ones: 16 * num_blocks tokens
  int kv_head = 0;

  // [2][head_dim]: minima and maxima of block i of the sequence, of the cache's type.
  const std::byte* Ranges(int64_t i) const {
    return sidecars.At(SidecarKind::kRanges, block_table[i], kv_head);
  }
};

// One decode row and KV head.
struct SelectParams {
  const SelectorConfig* config = nullptr;
  KeyBlocks keys;
  const float* queries = nullptr;  // [num_heads, head_dim], times the softmax scale, after RoPE
  int num_heads = 0;               // query heads of the KV head's group
  int head_dim = 0;
  int64_t context_len = 0;  // tokens, those of the open block included
  int layer = 0;
  // Candidates in: [num_heads][num_blocks], what may be selected (a compressor or a caller may have
  // taken tokens out). Selected tokens out: a subset of it. Tokens of the open block, which are
  // context_len - 16 * num_blocks, are kept by the caller; a budget counts them.
  TokenMask* masks = nullptr;
  // The sets that this row and KV head selected in the last layer that called Remember, and room
  // for this layer's: [num_heads][num_blocks]. Empty in the first sparse layer of a step.
  std::span<const TokenMask> remembered;
  bool remember = false;     // set by Select: keep `masks` for the layers after this one
  float* scratch = nullptr;  // [num_heads][16 * num_blocks] floats, undefined contents
  cpu::InnerLoop loop;       // for loops that are worth a second thread
};

class Selector {
 public:
  virtual ~Selector() = default;

  virtual std::string_view name() const = 0;  // `selector.type` in policies

  // Keys beside `type`. `layer_list_key` takes a list of layers; empty where the selector has none.
  // Null `channel_file_keys`: no channel file.
  virtual std::span<const NumberKey> number_keys() const { return {}; }
  virtual std::string_view layer_list_key() const { return {}; }
  virtual const ChannelFileKeys* channel_file_keys() const { return nullptr; }

  // Adds what the selector reads beside keys. The default: nothing.
  virtual void AddSidecars(const SelectorConfig& /*config*/, SidecarConfig& /*sidecars*/) const {}

  // CPU backend: narrows params.masks. Deterministic; ties go to the lowest index. Any thread.
  virtual void Select(SelectParams& params) const = 0;
};

// The selector called `name`, or null.
const Selector* FindSelector(std::string_view name);
// All of them, in the order of the documentation.
std::span<const Selector* const> Selectors();

}  // namespace gloam
