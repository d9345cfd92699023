// The subcommands of the program. Each takes what main.cc parsed and returns the process's exit
// code: 0 done, 1 failed, 2 used wrongly. Messages of failures go to stderr, one line each.
#pragma once

#include <string>
#include <vector>

#include "base/status.h"
#include "server/options.h"

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
  std::vector<int> context_tokens;  // prompt lengths
  std::vector<int> concurrency;     // streams at a time
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

// Prints "gloam: MESSAGE" and returns kExitFailure.
int Fail(const Status& status);

}  // namespace gloam
