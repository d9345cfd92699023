// Options of `gloam serve`: one table of named settings, each with its value, its source and its
// parser. Precedence: flag > environment (GLOAM_*) > configuration file (JSON) > default.
// The table is pure: main.cc gives it flags, environment and file text.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace gloam {

struct ServeOptions {
  std::string model;
  std::vector<std::string> served_model_names;  // empty: from the model
  int max_model_len = 0;                        // 0: the model's own
  std::string chat_template;                    // a file; empty: the model's own

  std::string device = "auto";
  int threads = 0;  // 0: one per core
  std::string activations = "int8";
  std::string dtype = "auto";
  std::string quantization = "none";
  bool batch_invariant = false;
  std::string kv_cache_dtype = "auto";
  int64_t kv_cache_memory = 0;  // 0: from the memory that is free
  double gpu_memory_utilization = 0.90;

  int max_num_seqs = 256;
  int max_num_batched_tokens = 0;  // 0: 8192 on a GPU, 2048 on the CPU
  bool enable_prefix_caching = true;
  int max_queued_requests = 1024;
  double request_timeout = 0;  // seconds; 0: none

  std::string sparsity = "dense";         // a policy's name
  std::string sparsity_dir;               // a folder; empty: none
  std::string sparsity_policies = "all";  // names with commas between, or "all"

  std::string host = "127.0.0.1";
  int port = 8000;
  int grpc_port = 50051;
  bool enable_grpc = true;
  std::vector<std::string> api_keys;
  std::string allowed_origin;

  int64_t max_body_bytes = 8 << 20;
  int max_connections = 4096;
  int http_threads = 2;
  double header_timeout = 10;  // seconds, as the next ones
  double body_timeout = 60;
  double idle_timeout = 75;
  double write_timeout = 30;

  std::string log_level = "info";
  std::string log_format = "text";
  double shutdown_timeout = 30;  // seconds
};

struct OptionSpec {
  enum class Kind { kValue, kFlag, kList };
  std::string name;        // "max-model-len": --max-model-len, GLOAM_MAX_MODEL_LEN, the file's key
  std::string group;       // heading in --help
  std::string value_name;  // "N", "FILE", ...
  std::string help;
  Kind kind = Kind::kValue;
  bool secret = false;  // --print-config hides the value
  std::function<Status(const std::vector<std::string>&)> set;
  std::function<std::string()> get;  // as --print-config shows it
};

class OptionTable {
 public:
  // The specs write to `options`, which must outlive the table.
  explicit OptionTable(ServeOptions* options);
  OptionTable(const OptionTable&) = delete;
  OptionTable& operator=(const OptionTable&) = delete;

  const std::vector<OptionSpec>& specs() const { return specs_; }

  using Values = std::map<std::string, std::vector<std::string>>;  // by option name
  using Environment = std::function<std::optional<std::string>(const std::string&)>;

  // Applies all sources in the order of precedence. `config_json` is the file's text, or empty.
  // Errors: kInvalidArgument naming the option and the source it came from.
  [[nodiscard]] Status Apply(const Values& flags, const Environment& environment,
                             std::string_view config_json);

  // One line each: name, value, source.
  std::string Describe() const;

  static std::string EnvironmentName(std::string_view option);  // "GLOAM_MAX_MODEL_LEN"

 private:
  std::vector<OptionSpec> specs_;
  std::map<std::string, std::string> sources_;  // by name: "flag", "environment", "file"
};

// "a,b" as {"a", "b"}; empty parts are left out.
std::vector<std::string> SplitCommas(const std::string& text);

// "2G", "512MiB", "1048576": binary units. Errors: kInvalidArgument.
[[nodiscard]] StatusOr<int64_t> ParseBytes(std::string_view text);

}  // namespace gloam
