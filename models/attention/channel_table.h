// Reads Double Sparsity's channel file: which channels of a head's queries and keys weigh most.
// JSON, "model.layers.{i}.self_attn.{q,k,qk}_proj" -> one list of channels per head, best first.
#pragma once

#include <filesystem>
#include <memory>
#include <string_view>

#include "base/status.h"
#include "kernels/sidecars.h"
#include "models/model_config.h"

namespace gloam {

// The best `num_channels` channels of each KV head of `model`, from the lists of `projection`,
// which is one of kChannelProjections. A layer's lists are one per KV head or one per query head;
// of the latter, those of a KV head's group are merged by rank: first the best channel of each
// head, then the second best, repeats left out. Lists of other projections are not looked at. Any
// thread. Errors: kNotFound; kInvalidArgument with file and key for a layer that is missing, too
// few or too many lists, channels that are not of the head or repeat, lists shorter than
// `num_channels`.
[[nodiscard]] StatusOr<std::shared_ptr<const ChannelTable>> ReadChannelTable(
    const std::filesystem::path& file, std::string_view projection, int num_channels,
    const ModelConfig& model);

}  // namespace gloam
