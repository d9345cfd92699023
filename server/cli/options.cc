#include "server/cli/options.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <limits>
#include <utility>

#include "server/strict_json.h"

namespace gloam {
namespace {

using json = nlohmann::ordered_json;
using Strings = std::vector<std::string>;

template <typename T>
StatusOr<T> ParseNumber(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) {
    return InvalidArgument("'{}' is not a number", text);
  }
  return value;
}

StatusOr<bool> ParseBool(std::string_view text) {
  if (text == "true" || text == "1") return true;
  if (text == "false" || text == "0") return false;
  return InvalidArgument("'{}' is neither true nor false", text);
}

// Makers of specs: what differs between two settings of one type is a line.
struct Maker {
  std::string group;
  std::vector<OptionSpec>& specs;

  OptionSpec& Add(std::string name, std::string value_name, std::string help) {
    OptionSpec& spec = specs.emplace_back();
    spec.name = std::move(name);
    spec.group = group;
    spec.value_name = std::move(value_name);
    spec.help = std::move(help);
    return spec;
  }

  // `zero`: how the value 0, which cannot be given, is shown.
  void Int(std::string name, int* out, int low, int high, std::string help,
           std::string zero = "0") {
    OptionSpec& spec = Add(std::move(name), "N", std::move(help));
    spec.set = [out, low, high](const Strings& values) -> Status {
      GLOAM_ASSIGN_OR_RETURN(const int value, ParseNumber<int>(values.back()));
      if (value < low || value > high) {
        return InvalidArgument("{} is not between {} and {}", value, low, high);
      }
      *out = value;
      return OkStatus();
    };
    spec.get = [out, zero] { return *out == 0 ? zero : std::to_string(*out); };
  }

  // A number in (0, 1].
  void Share(std::string name, double* out, std::string help) {
    OptionSpec& spec = Add(std::move(name), "SHARE", std::move(help));
    spec.set = [out](const Strings& values) -> Status {
      GLOAM_ASSIGN_OR_RETURN(const double value, ParseNumber<double>(values.back()));
      if (!(value > 0 && value <= 1)) return InvalidArgument("{} is not in (0, 1]", value);
      *out = value;
      return OkStatus();
    };
    spec.get = [out] { return fmt::format("{:g}", *out); };
  }

  void Bytes(std::string name, int64_t* out, std::string help, std::string zero = "") {
    OptionSpec& spec = Add(std::move(name), "BYTES", std::move(help));
    spec.set = [out](const Strings& values) -> Status {
      GLOAM_ASSIGN_OR_RETURN(*out, ParseBytes(values.back()));
      return OkStatus();
    };
    spec.get = [out, zero] { return *out == 0 && !zero.empty() ? zero : std::to_string(*out); };
  }

  void Seconds(std::string name, double* out, double low, std::string help) {
    OptionSpec& spec = Add(std::move(name), "SECONDS", std::move(help));
    spec.set = [out, low](const Strings& values) -> Status {
      GLOAM_ASSIGN_OR_RETURN(const double value, ParseNumber<double>(values.back()));
      if (!(value >= low && value <= 1e6)) {
        return InvalidArgument("{} is not between {} and 1000000 seconds", value, low);
      }
      *out = value;
      return OkStatus();
    };
    spec.get = [out] { return fmt::format("{:g}", *out); };
  }

  void Text(std::string name, std::string* out, std::string value_name, std::string help) {
    OptionSpec& spec = Add(std::move(name), std::move(value_name), std::move(help));
    spec.set = [out](const Strings& values) {
      *out = values.back();
      return OkStatus();
    };
    spec.get = [out] { return *out; };
  }

  void Choice(std::string name, std::string* out, Strings choices, std::string help) {
    OptionSpec& spec =
        Add(std::move(name), fmt::format("{}", fmt::join(choices, "|")), std::move(help));
    spec.set = [out, choices](const Strings& values) -> Status {
      if (std::find(choices.begin(), choices.end(), values.back()) == choices.end()) {
        return InvalidArgument("'{}' is not one of {}", values.back(), fmt::join(choices, ", "));
      }
      *out = values.back();
      return OkStatus();
    };
    spec.get = [out] { return *out; };
  }

  void Flag(std::string name, bool* out, std::string help) {
    OptionSpec& spec = Add(std::move(name), "", std::move(help));
    spec.kind = OptionSpec::Kind::kFlag;
    spec.set = [out](const Strings& values) -> Status {
      GLOAM_ASSIGN_OR_RETURN(*out, ParseBool(values.back()));
      return OkStatus();
    };
    spec.get = [out] { return std::string(*out ? "true" : "false"); };
  }

  void List(std::string name, Strings* out, std::string value_name, std::string help,
            bool secret = false) {
    OptionSpec& spec = Add(std::move(name), std::move(value_name), std::move(help));
    spec.kind = OptionSpec::Kind::kList;
    spec.secret = secret;
    spec.set = [out](const Strings& values) -> Status {
      for (const std::string& value : values) {
        if (value.empty()) return InvalidArgument("an empty value is not allowed");
      }
      *out = values;
      return OkStatus();
    };
    spec.get = [out, secret] {
      if (secret) return out->empty() ? std::string() : fmt::format("({} hidden)", out->size());
      return fmt::format("{}", fmt::join(*out, " "));
    };
  }
};

// A value of the configuration file as the text that a flag would carry.
StatusOr<Strings> TextsOf(const json& value) {
  if (value.is_array()) {
    Strings texts;
    for (const json& element : value) {
      if (!element.is_string()) return InvalidArgument("a list must hold strings");
      texts.push_back(element.get<std::string>());
    }
    if (texts.empty()) return InvalidArgument("a list may not be empty");
    return texts;
  }
  if (value.is_string()) return Strings{value.get<std::string>()};
  if (value.is_number() || value.is_boolean()) return Strings{value.dump()};
  return InvalidArgument("the value must be a string, a number, true, false or a list of strings");
}

}  // namespace

std::vector<std::string> SplitCommas(const std::string& text) {
  Strings parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    if (end > begin) parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

StatusOr<int64_t> ParseBytes(std::string_view text) {
  size_t digits = 0;
  while (digits < text.size() &&
         (std::isdigit(static_cast<unsigned char>(text[digits])) || text[digits] == '.')) {
    ++digits;
  }
  std::string unit(text.substr(digits));
  std::transform(unit.begin(), unit.end(), unit.begin(),
                 [](unsigned char c) { return std::toupper(c); });
  static const std::map<std::string, int> kShifts = {
      {"", 0},     {"B", 0},  {"K", 10},  {"KB", 10},  {"KIB", 10}, {"M", 20},  {"MB", 20},
      {"MIB", 20}, {"G", 30}, {"GB", 30}, {"GIB", 30}, {"T", 40},   {"TB", 40}, {"TIB", 40}};
  const auto shift = kShifts.find(unit);
  const auto number = ParseNumber<double>(text.substr(0, digits));
  if (shift == kShifts.end() || !number.ok()) {
    return InvalidArgument("'{}' is not a number of bytes such as 512M or 2G", text);
  }
  const double bytes = *number * static_cast<double>(int64_t{1} << shift->second);
  if (bytes > 9.0e18) return InvalidArgument("'{}' is too large", text);
  return static_cast<int64_t>(bytes);
}

OptionTable::OptionTable(ServeOptions* o) {
  constexpr int kMaxInt = std::numeric_limits<int>::max();
  Maker model{"Model", specs_};
  model.Text("model", &o->model, "MODEL",
             "GGUF file, Hugging Face folder, or name of the catalogue (gloam pull)");
  model.List("served-model-name", &o->served_model_names, "NAME",
             "Names that requests may use; the first is the one in answers (default: from MODEL)");
  model.Int("max-model-len", &o->max_model_len, 0, kMaxInt,
            "Context length in tokens, prompt and answer together (0: the model's own)");
  model.Text("chat-template", &o->chat_template, "FILE",
             "Jinja chat template that replaces the model's own");

  Maker compute{"Compute and memory", specs_};
  compute.Choice("device", &o->device, {"auto", "cpu", "cuda"},
                 "Where the model runs (auto: on the GPU where there is one)");
  compute.Int("threads", &o->threads, 0, 1024, "Threads of the model's CPU work (0: one per core)");
  compute.Choice("activations", &o->activations, {"int8", "f32"},
                 "Arithmetic of the CPU backend: int8 is fast, f32 is closest to the reference");
  compute.Choice("dtype", &o->dtype, {"auto", "bfloat16"},
                 "Type of matrix products on the GPU (auto: bfloat16); sums are fp32");
  compute.Choice("quantization", &o->quantization, {"none", "fp8"},
                 "fp8: a GPU keeps 16-bit and 32-bit weights as e4m3 with a scale per row");
  compute.Flag("batch-invariant", &o->batch_invariant,
               "Give the same bits on the GPU whatever else is in the batch, as the CPU always "
               "does; costs speed");
  compute.Choice("kv-cache-dtype", &o->kv_cache_dtype, {"auto", "f16", "bf16", "f32", "fp8"},
                 "Type of the KV cache (auto: bf16, or f16 for models with attention biases); "
                 "f32 on the CPU only; fp8 (e4m3) on a GPU only: half the memory, less exact");
  compute.Bytes(
      "kv-cache-memory", &o->kv_cache_memory,
      "Memory of the KV cache, e.g. 2G (default: on the CPU a quarter of what is free, on "
      "a GPU what --gpu-memory-utilization leaves)",
      "auto");
  compute.Share("gpu-memory-utilization", &o->gpu_memory_utilization,
                "Share of the GPU's memory to bring into use, that of other programs included");

  Maker scheduling{"Scheduling", specs_};
  scheduling.Int("max-num-seqs", &o->max_num_seqs, 1, 65536, "Sequences that run at a time");
  scheduling.Int("max-num-batched-tokens", &o->max_num_batched_tokens, 1, 1 << 20,
                 "Tokens in one step; long prompts are split into chunks (default: 8192 on a GPU, "
                 "16384 on one of 64 GiB while nothing decodes, 2048 on the CPU)",
                 "auto");
  scheduling.Flag("enable-prefix-caching", &o->enable_prefix_caching,
                  "Keep the KV cache of earlier prompts and reuse equal beginnings");
  scheduling.Int("max-queued-requests", &o->max_queued_requests, 1, 1 << 20,
                 "Requests that may wait; more are answered 503");
  scheduling.Seconds("request-timeout", &o->request_timeout, 0,
                     "Deadline of every HTTP request, in the queue and while running (0: none)");

  Maker sparsity{"Sparsity", specs_};
  sparsity.Text("sparsity", &o->sparsity, "POLICY",
                "Attention policy of requests that name none (GET /v1/sparsity/policies)");
  sparsity.Text("sparsity-dir", &o->sparsity_dir, "DIR",
                "Folder of more policies (each *.json is one) and of their channel files");
  sparsity.Text("sparsity-policies", &o->sparsity_policies, "NAMES",
                "Policies that requests may name, with commas between, or all; the KV cache keeps "
                "what these need");

  Maker network{"Network", specs_};
  network.Text("host", &o->host, "ADDRESS", "Address to listen on");
  network.Int("port", &o->port, 0, 65535, "Port of the HTTP API (0: a free one)");
  network.Int("grpc-port", &o->grpc_port, 0, 65535, "Port of the gRPC API (0: a free one)");
  network.Flag("enable-grpc", &o->enable_grpc, "Serve the gRPC API");
  network.List("api-key", &o->api_keys, "KEY",
               "Key that clients must send (may be given several times; default: none)", true);
  network.Text("allowed-origin", &o->allowed_origin, "ORIGIN",
               "Origin of web pages that may use the API, or * (default: none)");

  Maker limits{"Limits", specs_};
  limits.Bytes("max-body-bytes", &o->max_body_bytes, "Largest request body; more is answered 413");
  limits.Int("max-connections", &o->max_connections, 1, 1 << 20,
             "HTTP connections at a time; more are answered 503");
  limits.Int("http-threads", &o->http_threads, 1, 256, "Threads that serve HTTP");
  limits.Seconds("header-timeout", &o->header_timeout, 0.01, "To receive a request's headers");
  limits.Seconds("body-timeout", &o->body_timeout, 0.01, "To receive a request's body");
  limits.Seconds("idle-timeout", &o->idle_timeout, 0.01, "Between two requests of a connection");
  limits.Seconds("write-timeout", &o->write_timeout, 0.01,
                 "For a client to take the next 64 KiB of an answer, else it is cancelled");

  Maker process{"Process", specs_};
  process.Choice("log-level", &o->log_level, {"trace", "debug", "info", "warn", "error", "off"},
                 "Least severe lines to log");
  process.Choice("log-format", &o->log_format, {"text", "json"}, "Format of log lines");
  process.Seconds("shutdown-timeout", &o->shutdown_timeout, 0,
                  "Time that running requests get to finish after SIGTERM");
}

std::string OptionTable::EnvironmentName(std::string_view option) {
  std::string name = "GLOAM_";
  for (const char c : option) {
    name += c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  }
  return name;
}

Status OptionTable::Apply(const Values& flags, const Environment& environment,
                          std::string_view config_json) {
  json file = json::object();
  if (!config_json.empty()) {
    auto parsed = ParseStrictJson(config_json);
    if (!parsed.ok() || !parsed->is_object()) {
      return InvalidArgument("--config: the file is not a JSON object of settings");
    }
    file = *std::move(parsed);
  }
  for (const auto& [key, value] : file.items()) {
    if (std::none_of(specs_.begin(), specs_.end(),
                     [&](const OptionSpec& spec) { return spec.name == key; })) {
      return InvalidArgument("--config: there is no setting '{}'", key);
    }
  }
  const auto set = [&](const OptionSpec& spec, const Strings& values, const std::string& source,
                       const std::string& shown) -> Status {
    if (const Status status = spec.set(values); !status.ok()) {
      return InvalidArgument("{}: {}", shown, MessageOf(status));
    }
    sources_[spec.name] = source;
    return OkStatus();
  };
  for (const OptionSpec& spec : specs_) {
    const std::string variable = EnvironmentName(spec.name);
    if (const auto it = flags.find(spec.name); it != flags.end()) {
      GLOAM_RETURN_IF_ERROR(set(spec, it->second, "flag", "--" + spec.name));
    } else if (const auto value = environment(variable); value && !value->empty()) {
      const Strings values =
          spec.kind == OptionSpec::Kind::kList ? SplitCommas(*value) : Strings{*value};
      GLOAM_RETURN_IF_ERROR(set(spec, values, "environment", variable));
    } else if (file.contains(spec.name)) {
      const std::string shown = fmt::format("--config, \"{}\"", spec.name);
      const auto values = TextsOf(file[spec.name]);
      if (!values.ok()) return InvalidArgument("{}: {}", shown, MessageOf(values.status()));
      GLOAM_RETURN_IF_ERROR(set(spec, *values, "file", shown));
    }
  }
  return OkStatus();
}

std::string OptionTable::Describe() const {
  std::string text;
  for (const OptionSpec& spec : specs_) {
    const auto source = sources_.find(spec.name);
    text += fmt::format("{:<24} {:<32} {}\n", spec.name, spec.get(),
                        source == sources_.end() ? "default" : source->second);
  }
  return text;
}

}  // namespace gloam
