#include "models/attention/channel_table.h"

#include <algorithm>
#include <charconv>
#include <string>
#include <vector>

#include "base/check.h"
#include "kernels/selector.h"
#include "models/checked_json.h"
#include "models/field_name.h"

namespace gloam {
namespace {

using nlohmann::json;

constexpr std::string_view kLayerPrefix = "model.layers.";

std::string KeyOf(int layer, std::string_view projection) {
  return fmt::format("{}{}.self_attn.{}_proj", kLayerPrefix, layer, projection);
}

// A file of a deeper model is of another model.
Status CheckLayers(const json& document, int num_layers, const std::string& file) {
  for (const auto& [key, value] : document.items()) {
    if (!key.starts_with(kLayerPrefix)) continue;
    const char* const first = key.data() + kLayerPrefix.size();
    int64_t layer = 0;
    const auto [end, error] = std::from_chars(first, key.data() + key.size(), layer);
    if (error == std::errc() && layer >= 0 && layer < num_layers) continue;
    return InvalidArgument("{}: {} is no layer of the model, which has {}", file, QuoteName(key),
                           num_layers);
  }
  return OkStatus();
}

// The lists of one layer: the errors name its key.
class LayerLists {
 public:
  LayerLists(const JsonFields& fields, std::string key, const ModelConfig& model, int num_channels)
      : fields_(fields), key_(std::move(key)), model_(model), num_channels_(num_channels) {}

  // Appends the channels of every KV head.
  Status Read(std::vector<int16_t>* channels) {
    const json* lists = fields_.Find(key_);
    if (lists == nullptr) return fields_.Error(key_, "is missing");
    const auto num_lists = lists->is_array() ? static_cast<int>(lists->size()) : -1;
    if (num_lists != model_.num_kv_heads && num_lists != model_.num_heads) {
      return fields_.Error(
          key_, fmt::format("must be one list of channels per query head ({}) or per KV head ({})",
                            model_.num_heads, model_.num_kv_heads));
    }
    const int group = num_lists / model_.num_kv_heads;
    for (int head = 0; head < model_.num_kv_heads; ++head) {
      std::vector<std::vector<int16_t>> members(group);
      for (int i = 0; i < group; ++i) {
        const int index = head * group + i;
        GLOAM_RETURN_IF_ERROR(ReadList((*lists)[index], index, &members[i]));
      }
      AppendMerged(members, channels);
    }
    return OkStatus();
  }

 private:
  Status ReadList(const json& list, int index, std::vector<int16_t>* channels) const {
    const auto error = [&](std::string_view problem) {
      return fields_.Error(fmt::format("{}[{}]", key_, index), problem);
    };
    if (!list.is_array()) return error("must be a list of channels");
    std::vector<bool> seen(model_.head_dim);
    for (const json& entry : list) {
      if (!entry.is_number_unsigned() ||
          entry.get<uint64_t>() >= static_cast<uint64_t>(model_.head_dim)) {
        return error(fmt::format("must have channels in [0, {}]", model_.head_dim - 1));
      }
      const auto channel = entry.get<int16_t>();
      if (seen[channel]) return error(fmt::format("has channel {} twice", channel));
      seen[channel] = true;
      channels->push_back(channel);
    }
    if (static_cast<int>(channels->size()) < num_channels_) {
      return error(fmt::format("has {} channels; {} are wanted", channels->size(), num_channels_));
    }
    return OkStatus();
  }

  // The best of each list, then the second best of each, and so on, without repeats.
  void AppendMerged(const std::vector<std::vector<int16_t>>& lists,
                    std::vector<int16_t>* channels) const {
    std::vector<bool> seen(model_.head_dim);
    int left = num_channels_;
    for (size_t rank = 0; left > 0; ++rank) {
      for (const std::vector<int16_t>& list : lists) {
        if (left == 0 || rank >= list.size() || seen[list[rank]]) continue;
        seen[list[rank]] = true;
        channels->push_back(list[rank]);
        --left;
      }
    }
  }

  const JsonFields& fields_;
  const std::string key_;
  const ModelConfig& model_;
  const int num_channels_;
};

}  // namespace

StatusOr<std::shared_ptr<const ChannelTable>> ReadChannelTable(const std::filesystem::path& file,
                                                               std::string_view projection,
                                                               int num_channels,
                                                               const ModelConfig& model) {
  GLOAM_CHECK(std::find(kChannelProjections.begin(), kChannelProjections.end(), projection) !=
              kChannelProjections.end());
  GLOAM_CHECK(num_channels > 0);
  GLOAM_ASSIGN_OR_RETURN(const json document, ReadJsonFile(file));
  GLOAM_RETURN_IF_ERROR(CheckLayers(document, model.num_layers, file.string()));
  const JsonFields fields(document, file.string());
  auto table = std::make_shared<ChannelTable>();
  table->source = file.string();
  table->num_layers = model.num_layers;
  table->num_kv_heads = model.num_kv_heads;
  table->num_channels = num_channels;
  for (int layer = 0; layer < model.num_layers; ++layer) {
    LayerLists lists(fields, KeyOf(layer, projection), model, num_channels);
    GLOAM_RETURN_IF_ERROR(lists.Read(&table->channels));
  }
  return table;
}

}  // namespace gloam
