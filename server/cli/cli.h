// The subcommands of the program. Each takes what main.cc parsed and returns the process's exit
// code: 0 done, 1 failed, 2 used wrongly. Messages of failures go to stderr, one line each.
#pragma once

#include <string>
#include <vector>

#include "base/status.h"
#include "server/cli/options.h"

namespace gloam {

inline constexpr int kExitFailure = 1;
inline constexpr int kExitUsage = 2;

int RunServe(const ServeOptions& options);

struct ChatOptions {
  ServeOptions model;       // model.model: MODEL, or the URL of a server
  std::string once;         // one message to answer, then exit; empty: interactive
  std::string system;       // system message
  std::string api_key;      // for a URL
  double temperature = -1;  // below 0: the model's default
  int max_tokens = 0;       // 0: to the end of the context
};
int RunChat(const ChatOptions& options);

struct CompleteOptions {
  ServeOptions model;
  std::string prompt;
  double temperature = 0;
  int max_tokens = 64;
};
int RunComplete(const CompleteOptions& options);

int RunPull(const std::string& name);
int RunInspect(const std::string& model, bool list_tensors);
int RunDoctor(const ServeOptions& options);
// Asks the server at the settings' host and port for its health: 0 when it is ready to serve.
int RunHealth(const ServeOptions& options);

struct BenchThroughputOptions {
  ServeOptions model;
  std::vector<int> context_tokens;    // prompt lengths
  std::vector<int> concurrency;       // streams at a time
  std::vector<std::string> policies;  // of sparsity, in turn over the same prompts
  std::vector<std::string> texts;     // files to take prompts from; none: random tokens
  int output_tokens = 64;
  bool json = false;  // rows as one JSON array instead of a table
};
int RunBenchThroughput(const BenchThroughputOptions& options);

struct BenchServeOptions {
  std::string url;
  std::string api_key;
  std::string model;  // empty: the served one
  int num_streams = 16;
  int num_requests = 64;
  int prompt_words = 64;
  int output_tokens = 64;
};
int RunBenchServe(const BenchServeOptions& options);

// Zeros and empty texts: the default of the benchmark.
struct EvalOptions {
  ServeOptions model;                 // model.model: MODEL, or the URL of a server
  std::string benchmark;              // passkey, ruler, longbench, ppl, kl, code
  std::string policies = "twilight";  // eval/policy_set.h says what it may hold
  std::string out = ".";              // results go to OUT/result_BENCHMARK/MODEL/
  std::string api_key;                // for a URL
  int concurrency = 4;                // policies of one item at a time
  // passkey, ruler, code
  std::vector<int> lengths = {4096};  // tokens
  int samples = 10;                   // per cell
  uint64_t seed = 1;
  bool chat = false;
  int answer_tokens = 0;
  std::vector<double> depths = {0, 0.25, 0.5, 0.75, 1};
  std::vector<std::string> kinds;  // of RULER
  std::string haystack;            // a text file
  std::string qa_data;             // a file as SQuAD's
  std::string data;                // a folder
  std::string extension = ".py";
  // longbench
  std::vector<std::string> datasets;
  int max_prompt_tokens = 0;
  int longbench_samples = 0;
  // ppl, kl
  std::vector<std::string> texts;  // files
  int context = 4096;
  int decoded = 256;
  int stride = 0;
  int windows = 0;
};
int RunEval(const EvalOptions& options);

struct CalibrateOptions {
  ServeOptions model;
  std::vector<std::string> texts;  // files
  std::string out;                 // file
  int context = 2048;              // tokens of one piece
  int tokens = 65536;              // of the texts, at most
};
int RunCalibrate(const CalibrateOptions& options);

// The model that parts of a step are measured on.
struct BenchModelOptions {
  ServeOptions settings;
  std::string name;                         // or random_weights
  std::string random_weights;               // a shape's name (models/random_model_file.h), or empty
  std::string random_weight_type = "bf16";  // or q4_0, q8_0
};

// Decode attention: its stages on a profile, on the CPU; or, with random weights, dense attention
// alone on random keys and values, on either device.
struct BenchAttentionOptions {
  BenchModelOptions model;         // to record a profile; not with `replay`
  std::vector<std::string> texts;  // files
  std::string replay;              // profile to measure on
  std::string record;              // file to keep the profile in
  std::vector<std::string> policies;
  std::vector<int> contexts;
  std::vector<int> batches;
  std::vector<int> layers;  // to record; empty: six of them
  int repeats = 20;
  bool json = false;
};
int RunBenchAttention(const BenchAttentionOptions& options);
[[nodiscard]] Status RunBenchDenseAttention(const BenchAttentionOptions& options);

// A step of the engine on random tokens, without requests: decode steps or whole prompts.
struct BenchStepOptions {
  BenchModelOptions model;
  bool prefill = false;
  std::vector<int> batches = {1};
  std::vector<int> contexts;
  int steps = 32;  // that count; the median is reported
  int prefill_repeats = 3;
  bool json = false;
};
int RunBenchStep(const BenchStepOptions& options);

// The matrix products of a model, one by one.
struct BenchGemmOptions {
  BenchModelOptions model;
  std::vector<int> rows = {1, 4, 16, 64, 256};
  int repeats = 20;  // the median is reported
  bool json = false;
};
int RunBenchGemm(const BenchGemmOptions& options);

// Prints "gloam: MESSAGE" and returns kExitFailure.
int Fail(const Status& status);

}  // namespace gloam
