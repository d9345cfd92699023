#include "models/attention/policy_json.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/cord.h"
#include "base/check.h"
#include "kernels/selector.h"
#include "models/field_name.h"

namespace gloam {
namespace {

using nlohmann::json;

constexpr char kKeyUrl[] = "gloam/policy-key";

// Far beyond any model's context: larger values are slips.
constexpr int kMaxTokens = 1 << 24;
constexpr int kMaxKernelSize = 255;
constexpr int kDefaultPromptCapacity = 320;  // of the paper's code
constexpr int kMaxTailBlock = 1 << 12;
constexpr double kMaxLogitDistance = 1e4;
constexpr double kNotGiven = std::numeric_limits<double>::quiet_NaN();
constexpr int kQuantBits[] = {2, 4, 8};

template <typename T>
struct NameOfValue {
  std::string_view name;
  T value;
};

constexpr NameOfValue<CompressorType> kCompressors[] = {{"none", CompressorType::kNone},
                                                        {"snap_kv", CompressorType::kSnapKv}};
constexpr NameOfValue<Pooling> kPoolings[] = {{"avgpool", Pooling::kAverage},
                                              {"maxpool", Pooling::kMax}};
constexpr NameOfValue<EstimatorType> kEstimators[] = {
    {"none", EstimatorType::kNone},
    {"min_max_quant", EstimatorType::kMinMaxQuant},
    {"max_quant", EstimatorType::kMaxQuant},
    {"block_quant", EstimatorType::kBlockQuant}};
constexpr NameOfValue<PrunerType> kPruners[] = {{"none", PrunerType::kNone},
                                                {"top_p", PrunerType::kTopP},
                                                {"threshold", PrunerType::kThreshold}};
constexpr NameOfValue<TailType> kTails[] = {{"none", TailType::kNone},
                                            {"block_mean", TailType::kBlockMean}};

template <typename T, size_t kSize>
std::string_view NameOf(const NameOfValue<T> (&names)[kSize], T value) {
  for (const auto& entry : names) {
    if (entry.value == value) return entry.name;
  }
  GLOAM_CHECK(false);
  return {};
}

// "a, b or c".
std::string OrList(const std::vector<std::string>& names) {
  if (names.size() == 1) return names.front();
  return fmt::format("{} or {}", fmt::join(names.begin(), names.end() - 1, ", "), names.back());
}

// A key that may stand in an error's path: those of this format do, a client's slip usually.
bool IsPlainKey(std::string_view key) {
  return !key.empty() && key.size() <= 64 && std::all_of(key.begin(), key.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  });
}

// One object of the policy. The first fault of all objects is kept, and everything after it does
// nothing, so that reading is a list of keys.
class Keys {
 public:
  Keys(const json& object, std::string prefix, Status* fault)
      : object_(object), prefix_(std::move(prefix)), fault_(*fault) {}

  bool Has(std::string_view name) const { return object_.contains(std::string(name)); }

  // The value of a key, which from now on is known; null where it is absent.
  const json* Find(std::string_view name) {
    known_.push_back(name);
    const auto found = object_.find(std::string(name));
    return found == object_.end() ? nullptr : &*found;
  }

  void Fail(std::string_view name, std::string_view problem) {
    FailWith(PolicyKeyError(PathOf(name), problem));
  }
  void FailWith(Status fault) {
    if (fault_.ok()) fault_ = std::move(fault);
  }

  // Each leaves `out` alone where the key is absent.
  void Int(std::string_view name, int min, int max, int* out) {
    double number = kNotGiven;
    Number({name, static_cast<double>(min), static_cast<double>(max), true, KeyUse::kOptional,
            kNotGiven},
           &number);
    if (!std::isnan(number)) *out = static_cast<int>(number);
  }

  void Bool(std::string_view name, bool* out) {
    const json* value = Find(name);
    if (value == nullptr) return;
    if (!value->is_boolean()) return Fail(name, "must be true or false");
    *out = value->get<bool>();
  }

  template <typename T, size_t kSize>
  void Choice(std::string_view name, const NameOfValue<T> (&names)[kSize], T* out) {
    const json* value = Find(name);
    if (value == nullptr) return;
    std::vector<std::string> all;
    for (const auto& entry : names) {
      if (value->is_string() && value->get_ref<const std::string&>() == entry.name) {
        *out = entry.value;
        return;
      }
      all.push_back(fmt::format("\"{}\"", entry.name));
    }
    Fail(name, "must be " + OrList(all));
  }

  void Text(std::string_view name, std::string* out) {
    const json* value = Find(name);
    if (value == nullptr) return;
    if (!value->is_string() || value->get_ref<const std::string&>().empty()) {
      return Fail(name, "must be a string that is not empty");
    }
    *out = value->get<std::string>();
  }

  // A number as a selector declares it; NaN where an absent key has no default.
  void Number(const NumberKey& key, double* out) {
    *out = key.use == KeyUse::kOptional ? key.default_value : kNotGiven;
    const json* value = Find(key.name);
    if (value == nullptr) {
      if (key.use == KeyUse::kRequired) Fail(key.name, "is missing: it " + RangeOf(key));
      return;
    }
    const double number = value->is_number() ? value->get<double>() : kNotGiven;
    const bool in_range = key.allowed.empty() ? number >= key.min && number <= key.max
                                              : std::find(key.allowed.begin(), key.allowed.end(),
                                                          number) != key.allowed.end();
    if (!in_range || (key.integer && std::floor(number) != number)) {
      return Fail(key.name, RangeOf(key));
    }
    *out = number;
  }

  void QuantBits(std::string_view name, int* out) {
    const json* value = Find(name);
    for (const int bits : kQuantBits) {
      if (value != nullptr && value->is_number_integer() && *value == bits) {
        *out = bits;
        return;
      }
    }
    Fail(name, value == nullptr ? "is missing: it must be 2, 4 or 8" : "must be 2, 4 or 8");
  }

  // A threshold above 0, up to `max`.
  void Threshold(std::string_view name, double max, float* out) {
    const json* value = Find(name);
    const std::string range = fmt::format("must be a number above 0, at most {}", max);
    if (value == nullptr) return Fail(name, "is missing: it " + range);
    const double number = value->is_number() ? value->get<double>() : kNotGiven;
    // As a float it must still be above 0.
    if (!(static_cast<float>(number) > 0 && number <= max)) return Fail(name, range);
    *out = static_cast<float>(number);
  }

  // Ascending layers, each once, of a model with so many.
  void Layers(std::string_view name, int num_layers, std::vector<int>* out) {
    const json* value = Find(name);
    const std::string range =
        fmt::format("must be a list of layers in [0, {}], ascending and each once", num_layers - 1);
    if (value == nullptr) return Fail(name, "is missing: it " + range);
    if (!value->is_array() || value->empty()) return Fail(name, range);
    for (const json& element : *value) {
      const int previous = out->empty() ? -1 : out->back();
      if (!element.is_number_integer() || element <= previous || element >= num_layers) {
        return Fail(name, range);
      }
      out->push_back(element.get<int>());
    }
  }

  // A nested object; an empty one where the key is absent.
  Keys Object(std::string_view name) {
    static const json kEmpty = json::object();
    const json* value = Find(name);
    if (value != nullptr && !value->is_object()) Fail(name, "must be an object");
    const bool is_there = value != nullptr && value->is_object();
    return Keys(is_there ? *value : kEmpty, PathOf(name) + ".", &fault_);
  }

  // After all keys that may be there were asked for. `what` owns the keys: "the selector 'quest'".
  void RefuseOthers(std::string_view what) {
    for (const auto& [key, value] : object_.items()) {
      if (std::find(known_.begin(), known_.end(), key) != known_.end()) continue;
      std::vector<std::string_view> known = known_;
      std::sort(known.begin(), known.end());
      const std::string problem =
          fmt::format("is not a key of {}, whose keys are {}", what, fmt::join(known, ", "));
      if (IsPlainKey(key)) return Fail(key, problem);
      const std::string parent = prefix_.substr(0, prefix_.size() - (prefix_.empty() ? 0 : 1));
      return FailWith(
          PolicyKeyError(parent, fmt::format("holds {}, which {}", QuoteName(key), problem)));
    }
  }

  std::string PathOf(std::string_view name) const { return prefix_ + std::string(name); }

 private:
  static std::string RangeOf(const NumberKey& key) {
    if (!key.allowed.empty()) {
      std::vector<std::string> values;
      for (const double value : key.allowed) values.push_back(fmt::format("{}", value));
      return "must be " + OrList(values);
    }
    if (key.min == key.max) return fmt::format("must be {}", key.min);
    return fmt::format("must be {} in [{}, {}]", key.integer ? "an integer" : "a number", key.min,
                       key.max);
  }

  const json& object_;
  const std::string prefix_;
  Status& fault_;
  std::vector<std::string_view> known_;
};

template <typename T, size_t kSize>
void ReadType(Keys& keys, const NameOfValue<T> (&names)[kSize], bool is_given, T* type) {
  keys.Choice("type", names, type);
  if (is_given && !keys.Has("type")) keys.Fail("type", "is missing");
}

void ReadCompressor(Keys& policy, CompressorConfig* out) {
  const bool is_given = policy.Has("compressor");
  Keys keys = policy.Object("compressor");
  ReadType(keys, kCompressors, is_given, &out->type);
  if (out->type == CompressorType::kSnapKv) {
    out->max_capacity_prompt = kDefaultPromptCapacity;
    keys.Int("window_size", 1, kMaxTokens, &out->window_size);
    keys.Int("max_capacity_prompt", 2, kMaxTokens, &out->max_capacity_prompt);
    keys.Int("kernel_size", 1, kMaxKernelSize, &out->kernel_size);
    keys.Choice("pooling", kPoolings, &out->pooling);
    if (out->kernel_size % 2 == 0) {
      keys.Fail("kernel_size", fmt::format("must be an odd integer in [1, {}]", kMaxKernelSize));
    }
    if (out->max_capacity_prompt <= out->window_size) {
      keys.Fail(
          "max_capacity_prompt",
          fmt::format("must be larger than window_size, which is {}: the window is part of it",
                      out->window_size));
    }
  }
  keys.RefuseOthers(fmt::format("the compressor \"{}\"", NameOf(kCompressors, out->type)));
}

void ReadChannelFile(Keys& keys, const ChannelFileKeys& names, SelectorConfig* out) {
  keys.Text(names.path, &out->channel_file);
  if (out->channel_file.empty()) keys.Fail(names.path, "is missing: it names the channel file");
  out->channel_projection = kChannelProjections.front();
  keys.Text(names.projection, &out->channel_projection);
  if (std::find(kChannelProjections.begin(), kChannelProjections.end(), out->channel_projection) ==
      kChannelProjections.end()) {
    keys.Fail(names.projection,
              fmt::format("must be one of {}", fmt::join(kChannelProjections, ", ")));
  }
}

// Exactly one of the keys marked so.
void CheckOneOf(Keys& keys, std::span<const NumberKey> number_keys,
                const std::vector<double>& numbers) {
  std::vector<std::string> names;
  std::string_view last_given;
  int num_given = 0;
  for (size_t i = 0; i < number_keys.size(); ++i) {
    if (number_keys[i].use != KeyUse::kOneOf) continue;
    names.emplace_back(number_keys[i].name);
    if (std::isnan(numbers[i])) continue;
    last_given = number_keys[i].name;
    ++num_given;
  }
  if (names.empty() || num_given == 1) return;
  if (num_given == 0) {
    keys.Fail(names.front(), fmt::format("is missing: give {}", OrList(names)));
  } else {
    keys.Fail(last_given, fmt::format("is one too many: give only one of {}", OrList(names)));
  }
}

void ReadSelector(Keys& policy, const ModelConfig& model, SelectorConfig* out) {
  const bool is_given = policy.Has("selector");
  Keys keys = policy.Object("selector");
  std::string type = "none";
  keys.Text("type", &type);
  if (is_given && !keys.Has("type")) keys.Fail("type", "is missing");
  out->selector = FindSelector(type);
  if (out->selector == nullptr) {
    std::vector<std::string> names;
    for (const Selector* selector : Selectors()) {
      names.push_back(fmt::format("\"{}\"", selector->name()));
    }
    return keys.Fail("type", "must be " + OrList(names));
  }
  const Selector& selector = *out->selector;
  for (const NumberKey& key : selector.number_keys()) {
    keys.Number(key, &out->numbers.emplace_back());
  }
  CheckOneOf(keys, selector.number_keys(), out->numbers);
  if (!selector.layer_list_key().empty()) {
    keys.Layers(selector.layer_list_key(), model.num_layers, &out->layers);
  }
  if (const ChannelFileKeys* names = selector.channel_file_keys()) {
    ReadChannelFile(keys, *names, out);
  }
  keys.RefuseOthers(fmt::format("the selector \"{}\"", type));
}

// The last step: only a policy that is right in itself asks for its channel file.
Status LoadChannels(const FindChannels& find_channels, SelectorConfig* config) {
  const ChannelFileKeys* names = config->selector->channel_file_keys();
  if (names == nullptr) return OkStatus();
  const std::span<const NumberKey> number_keys = config->selector->number_keys();
  const auto count = std::find_if(number_keys.begin(), number_keys.end(),
                                  [&](const NumberKey& key) { return key.name == names->count; });
  GLOAM_CHECK(count != number_keys.end());
  const auto num_channels = static_cast<int>(config->numbers[count - number_keys.begin()]);
  auto channels = find_channels(config->channel_file, config->channel_projection, num_channels);
  if (channels.ok()) {
    config->channels = *std::move(channels);
    return OkStatus();
  }
  const Status& fault = channels.status();
  if (!PolicyKeyOf(fault).empty()) return fault;
  const std::string key = fmt::format("selector.{}", names->path);
  return WithPolicyKey(MakeStatus(fault.code(), "{} cannot be used: {}", key, MessageOf(fault)),
                       key);
}

void ReadEstimator(Keys& policy, EstimatorConfig* out) {
  const bool is_given = policy.Has("weight_estimator");
  Keys keys = policy.Object("weight_estimator");
  ReadType(keys, kEstimators, is_given, &out->type);
  if (out->type != EstimatorType::kNone) keys.QuantBits("quant_bit", &out->quant_bits);
  keys.RefuseOthers(fmt::format("the weight_estimator \"{}\"", NameOf(kEstimators, out->type)));
}

void ReadPruner(Keys& policy, PrunerConfig* out) {
  const bool is_given = policy.Has("weight_pruner");
  Keys keys = policy.Object("weight_pruner");
  ReadType(keys, kPruners, is_given, &out->type);
  if (out->type != PrunerType::kNone) {
    const bool is_top_p = out->type == PrunerType::kTopP;
    keys.Threshold("threshold", is_top_p ? 1.0 : kMaxLogitDistance, &out->threshold);
    keys.Int("min_tokens", 0, kMaxTokens, &out->min_tokens);
    if (is_top_p) {
      double keep_weight = 0;
      keys.Number({.name = "keep_weight", .max = 1, .integer = false, .use = KeyUse::kOptional},
                  &keep_weight);
      out->keep_weight = static_cast<float>(keep_weight);
    }
  }
  keys.Bool("share_group", &out->share_group);  // a selector's sets differ by head too
  keys.RefuseOthers(fmt::format("the weight_pruner \"{}\"", NameOf(kPruners, out->type)));
}

// What stands beside the stages.
void ReadRest(Keys& keys, SparsityPolicy* out) {
  keys.Choice("tail", kTails, &out->tail);
  if (out->tail == TailType::kNone && keys.Has("tail_block")) {
    keys.Fail("tail_block", "is only for a tail of \"block_mean\"");
  }
  keys.Int("tail_block", kBlockTokens, kMaxTailBlock, &out->tail_block);
  if (out->tail_block % kBlockTokens != 0) {
    keys.Fail("tail_block", fmt::format("must be a multiple of {} in [{}, {}]", kBlockTokens,
                                        kBlockTokens, kMaxTailBlock));
  }
  keys.Int("sink_tokens", 0, kMaxTokens, &out->sink_tokens);
  keys.Int("recent_tokens", 0, kMaxTokens, &out->recent_tokens);
  keys.Bool("skip_first_two_layers", &out->skip_first_two_layers);
  keys.Bool("use_estimated_weights_in_attn", &out->use_estimated_weights_in_attn);
  keys.Int("bypass_below_tokens", 0, kMaxTokens, &out->bypass_below_tokens);
  keys.Bool("report_true_mass", &out->report_true_mass);

  // Without an estimator there are no estimated weights to give away or to attend with.
  if (out->estimator.type != EstimatorType::kNone) return;
  if (out->tail != TailType::kNone) {
    keys.Fail("tail", "must be \"none\" without a weight_estimator, whose weights it stands for");
  }
  if (out->use_estimated_weights_in_attn) {
    keys.Fail("use_estimated_weights_in_attn", "must be false without a weight_estimator");
  }
}

// The shortest decimal of a float, as a JSON number: 0.85f is 0.85.
json FloatJson(float value) { return std::stod(fmt::format("{}", value)); }

json CompressorJson(const CompressorConfig& config) {
  json out = {{"type", NameOf(kCompressors, config.type)}};
  if (config.type == CompressorType::kSnapKv) {
    out["window_size"] = config.window_size;
    out["max_capacity_prompt"] = config.max_capacity_prompt;
    out["kernel_size"] = config.kernel_size;
    out["pooling"] = NameOf(kPoolings, config.pooling);
  }
  return out;
}

json SelectorJson(const SelectorConfig& config) {
  GLOAM_CHECK(config.selector != nullptr);
  const Selector& selector = *config.selector;
  json out = {{"type", selector.name()}};
  const std::span<const NumberKey> number_keys = selector.number_keys();
  for (size_t i = 0; i < number_keys.size(); ++i) {
    const double number = config.numbers[i];
    if (std::isnan(number)) continue;
    const std::string name(number_keys[i].name);
    out[name] = number_keys[i].integer ? json(static_cast<int64_t>(number)) : json(number);
  }
  if (!selector.layer_list_key().empty()) {
    out[std::string(selector.layer_list_key())] = config.layers;
  }
  if (const ChannelFileKeys* keys = selector.channel_file_keys()) {
    out[std::string(keys->path)] = config.channel_file;
    out[std::string(keys->projection)] = config.channel_projection;
  }
  return out;
}

json EstimatorJson(const EstimatorConfig& config) {
  json out = {{"type", NameOf(kEstimators, config.type)}};
  if (config.type != EstimatorType::kNone) out["quant_bit"] = config.quant_bits;
  return out;
}

json PrunerJson(const PrunerConfig& config) {
  json out = {{"type", NameOf(kPruners, config.type)}, {"share_group", config.share_group}};
  if (config.type != PrunerType::kNone) {
    out["threshold"] = FloatJson(config.threshold);
    out["min_tokens"] = config.min_tokens;
    if (config.type == PrunerType::kTopP) out["keep_weight"] = FloatJson(config.keep_weight);
  }
  return out;
}

}  // namespace

Status WithPolicyKey(Status status, std::string_view key) {
  status.SetPayload(kKeyUrl, absl::Cord(std::string(key)));
  return status;
}

Status PolicyKeyError(std::string_view key, std::string_view problem) {
  return WithPolicyKey(InvalidArgument("{} {}", key.empty() ? "the policy" : key, problem), key);
}

std::string PolicyKeyOf(const Status& status) {
  const auto payload = status.GetPayload(kKeyUrl);
  return payload ? std::string(*payload) : std::string();
}

StatusOr<SparsityPolicy> ParsePolicy(const json& body, const ModelConfig& model,
                                     const FindChannels& find_channels) {
  if (!body.is_object()) return PolicyKeyError("", "must be an object");
  SparsityPolicy policy;
  Status fault;
  Keys keys(body, "", &fault);
  ReadCompressor(keys, &policy.compressor);
  ReadSelector(keys, model, &policy.selector);
  ReadEstimator(keys, &policy.estimator);
  ReadPruner(keys, &policy.pruner);
  ReadRest(keys, &policy);
  keys.RefuseOthers("a policy");
  if (!fault.ok()) return fault;
  GLOAM_RETURN_IF_ERROR(LoadChannels(find_channels, &policy.selector));
  return policy;
}

json PolicyToJson(const SparsityPolicy& policy) {
  json out = {{"compressor", CompressorJson(policy.compressor)},
              {"selector", SelectorJson(policy.selector)},
              {"weight_estimator", EstimatorJson(policy.estimator)},
              {"weight_pruner", PrunerJson(policy.pruner)},
              {"tail", NameOf(kTails, policy.tail)},
              {"sink_tokens", policy.sink_tokens},
              {"recent_tokens", policy.recent_tokens},
              {"skip_first_two_layers", policy.skip_first_two_layers},
              {"use_estimated_weights_in_attn", policy.use_estimated_weights_in_attn},
              {"bypass_below_tokens", policy.bypass_below_tokens},
              {"report_true_mass", policy.report_true_mass}};
  if (policy.tail == TailType::kBlockMean) out["tail_block"] = policy.tail_block;
  return out;
}

}  // namespace gloam
