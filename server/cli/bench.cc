// `gloam bench throughput MODEL` (in this process) and `gloam bench serve URL` (over HTTP).
#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "nlohmann/json.hpp"
#include "server/blocking_generation.h"
#include "server/cli/cli.h"
#include "server/cli/local_model.h"
#include "server/cli/text_files.h"
#include "server/http/client.h"

namespace gloam {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The value below which `share` of the values lie; 0 without values.
double Percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  const size_t rank = std::min(values.size() - 1, static_cast<size_t>(share * values.size()));
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(rank),
                   values.end());
  return values[rank];
}

using StreamTimes = std::vector<Clock::time_point>;  // of each token

// One measurement: streams of one prompt length that start together.
struct ThroughputRow {
  int context = 0;
  int streams = 0;
  std::string policy;
  // Until the last stream has its first token; 0 where the prompts were in the prefix cache.
  double prefill_tokens_per_second = 0;
  // Of all streams together, from then until the last token; streams that had their first token
  // earlier end earlier.
  double decode_tokens_per_second = 0;
  double first_token_ms = 0;  // of the first stream
};

using Prompts = std::vector<std::vector<int64_t>>;

// One prompt of `context` tokens per stream, each with a beginning of its own: of random tokens, or
// consecutive pieces of `text`, from its start again after its end.
Prompts MakePrompts(LocalModel& model, std::span<const int32_t> text, int context, int concurrency,
                    std::mt19937* random) {
  const int vocab_size = model.service().tokenizer().vocab_size();
  std::uniform_int_distribution<int64_t> token(0, vocab_size - 1);
  Prompts prompts(concurrency, std::vector<int64_t>(context));
  size_t at = text.empty() ? 0 : (*random)() % text.size();
  for (std::vector<int64_t>& prompt : prompts) {
    for (int64_t& id : prompt) id = text.empty() ? token(*random) : text[at++ % text.size()];
  }
  return prompts;
}

// Streams of one length at a time; the timings of all of them.
StatusOr<std::vector<StreamTimes>> RunStreams(LocalModel& model, const Prompts& prompts,
                                              const std::string& policy, int output_tokens) {
  const auto concurrency = static_cast<int>(prompts.size());
  std::vector<PreparedGeneration> prepared;
  for (const std::vector<int64_t>& prompt : prompts) {
    CompletionRequest request;
    request.prompts.emplace_back(prompt);
    request.params.temperature = 0;
    request.params.max_tokens = output_tokens;
    request.params.ignore_eos = true;
    request.params.sparsity.policy = policy;
    GLOAM_ASSIGN_OR_RETURN(prepared.emplace_back(), model.service().Prepare(request));
  }
  std::vector<StreamTimes> times(concurrency);
  std::vector<Status> results(concurrency);
  std::vector<std::thread> threads;
  for (int i = 0; i < concurrency; ++i) {
    threads.emplace_back([&, i] {
      results[i] = RunBlocking(model.engine(), std::move(prepared[i]), [&](const auto& delta) {
                     times[i].resize(times[i].size() + delta.tokens.size(), Clock::now());
                     return true;
                   }).status();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Status& result : results) GLOAM_RETURN_IF_ERROR(result);
  return times;
}

StatusOr<ThroughputRow> MeasureRow(LocalModel& model, const Prompts& prompts,
                                   const std::string& policy, int output_tokens) {
  const auto concurrency = static_cast<int>(prompts.size());
  const auto context = static_cast<int>(prompts.front().size());
  const auto start = Clock::now();
  GLOAM_ASSIGN_OR_RETURN(const auto times, RunStreams(model, prompts, policy, output_tokens));
  Clock::time_point first = Clock::time_point::max(), all_first = start, last = start;
  for (const StreamTimes& stream : times) {
    first = std::min(first, stream.front());
    all_first = std::max(all_first, stream.front());
    last = std::max(last, stream.back());
  }
  int64_t num_decoded = 0;
  for (const StreamTimes& stream : times) {
    num_decoded += stream.end() - std::upper_bound(stream.begin(), stream.end(), all_first);
  }
  const auto seconds = [](Clock::duration d) { return std::chrono::duration<double>(d).count(); };
  return ThroughputRow{
      .context = context,
      .streams = concurrency,
      .policy = policy,
      .prefill_tokens_per_second = double(context) * concurrency / seconds(all_first - start),
      .decode_tokens_per_second =
          num_decoded == 0 ? 0 : static_cast<double>(num_decoded) / seconds(last - all_first),
      .first_token_ms = seconds(first - start) * 1e3};
}

// What the load's threads fill in together.
struct LoadResult {
  std::mutex mutex;
  std::vector<double> first_ms;  // time to first token
  std::vector<double> gap_ms;    // between tokens
  int64_t tokens = 0;
  int failed = 0;
  Status first_failure;
};

void SendRequests(const BenchServeOptions& options, std::atomic<int>* next, LoadResult* result) {
  std::unique_ptr<HttpClient> client;
  for (int i; (i = next->fetch_add(1)) < options.num_requests;) {
    json request = {{"prompt", ""},       {"stream", true},
                    {"temperature", 0},   {"max_tokens", options.output_tokens},
                    {"ignore_eos", true}, {"stream_options", {{"include_usage", true}}}};
    if (!options.model.empty()) request["model"] = options.model;
    std::string prompt = fmt::format("Request {}.", i);  // different, so that no prefix is cached
    for (int word = 0; word < options.prompt_words; ++word) {
      prompt += fmt::format(" word{}", (word * 7919 + i) % 1000);
    }
    request["prompt"] = std::move(prompt);

    std::vector<double> gaps;
    double first_ms = 0;
    int64_t tokens = 0;
    const auto start = Clock::now();
    Clock::time_point previous = start;
    Status status;
    if (!client) {
      auto connected = HttpClient::Connect(options.url, options.api_key);
      if (connected.ok()) client = *std::move(connected);
      status = connected.status();
    }
    if (status.ok()) {
      status = client->PostForEvents("/v1/completions", request.dump(), [&](std::string_view data) {
        const json event = json::parse(data, nullptr, /*allow_exceptions=*/false);
        const auto now = Clock::now();
        const double ms = std::chrono::duration<double, std::milli>(now - previous).count();
        if (event.is_object() && event.contains("usage") && event["usage"].is_object()) {
          tokens = event["usage"].value("completion_tokens", int64_t{0});
          return;
        }
        previous = now;
        first_ms == 0 ? void(first_ms = ms) : gaps.push_back(ms);
      });
    }
    std::lock_guard lock(result->mutex);
    if (!status.ok()) {
      ++result->failed;
      if (result->first_failure.ok()) result->first_failure = status;
      client.reset();
      continue;
    }
    result->tokens += tokens;
    result->first_ms.push_back(first_ms);
    result->gap_ms.insert(result->gap_ms.end(), gaps.begin(), gaps.end());
  }
}

void ShowPercentiles(const char* name, const std::vector<double>& values) {
  fmt::print("{:<22} p50 {:>8.1f}  p90 {:>8.1f}  p99 {:>8.1f}  max {:>8.1f} ms\n", name,
             Percentile(values, 0.5), Percentile(values, 0.9), Percentile(values, 0.99),
             Percentile(values, 1.0));
}

}  // namespace

namespace {

// Streams of the row that comes before the measured ones. The first pass over the activations' and
// the cache's memory is the system's cost, not ours: in a virtual machine it took 8 % of the time
// of 32 streams (2026-11-26). A GPU's memory is there already.
int NumWarmUpStreams(LocalModel& model, const BenchThroughputOptions& options) {
  if (model.engine().memory_plan() != nullptr) return 1;
  return *std::max_element(options.concurrency.begin(), options.concurrency.end());
}

Status BenchThroughput(const BenchThroughputOptions& options) {
  ServeOptions served = options.model;
  // No prompt comes twice then, and a cache of them would only make each row take fresh memory.
  if (options.policies.size() == 1) served.enable_prefix_caching = false;
  GLOAM_ASSIGN_OR_RETURN(const std::unique_ptr<LocalModel> model, LocalModel::Load(served));
  GLOAM_ASSIGN_OR_RETURN(const std::vector<int32_t> text,
                         TokenizeFiles(options.texts, model->service().tokenizer(), 1 << 20));
  if (text.empty() && !options.texts.empty()) return InvalidArgument("--text: no text in it");
  if (!options.json) {
    fmt::print("{}\n{:>9} {:>9} {:<20} {:>14} {:>13} {:>10}\n", model->Describe(), "context",
               "streams", "policy", "prefill tok/s", "decode tok/s", "TTFT ms");
  }
  std::mt19937 random(1);  // fixed prompts, different from row to row
  const Prompts warm_up = MakePrompts(*model, text, options.context_tokens.front(),
                                      NumWarmUpStreams(*model, options), &random);
  GLOAM_RETURN_IF_ERROR(
      MeasureRow(*model, warm_up, options.policies.front(), options.output_tokens).status());
  json rows = json::array();
  for (const int context : options.context_tokens) {
    for (const int concurrency : options.concurrency) {
      const Prompts prompts = MakePrompts(*model, text, context, concurrency, &random);
      for (const std::string& policy : options.policies) {
        GLOAM_ASSIGN_OR_RETURN(ThroughputRow row,
                               MeasureRow(*model, prompts, policy, options.output_tokens));
        if (&policy != &options.policies.front()) row.prefill_tokens_per_second = 0;
        if (options.json) {
          rows.push_back({{"context", row.context},
                          {"streams", row.streams},
                          {"policy", row.policy},
                          {"prefill_tokens_per_second", row.prefill_tokens_per_second},
                          {"decode_tokens_per_second", row.decode_tokens_per_second},
                          {"first_token_ms", row.first_token_ms}});
        } else {
          fmt::print("{:>9} {:>9} {:<20} {:>14.0f} {:>13.1f} {:>10.1f}\n", row.context, row.streams,
                     row.policy, row.prefill_tokens_per_second, row.decode_tokens_per_second,
                     row.first_token_ms);
        }
      }
    }
  }
  if (options.json) fmt::print("{}\n", rows.dump(1));
  return OkStatus();
}

}  // namespace

int RunBenchThroughput(const BenchThroughputOptions& options) {
  const Status status = BenchThroughput(options);
  return status.ok() ? 0 : Fail(status);
}

int RunBenchServe(const BenchServeOptions& options) {
  LoadResult result;
  std::atomic<int> next{0};
  const auto start = Clock::now();
  std::vector<std::thread> threads;
  for (int i = 0; i < std::min(options.num_streams, options.num_requests); ++i) {
    threads.emplace_back(SendRequests, std::cref(options), &next, &result);
  }
  for (std::thread& thread : threads) thread.join();
  const double seconds = SecondsSince(start);
  fmt::print("{} requests by {} streams in {:.2f} s, {} failed\n", options.num_requests,
             options.num_streams, seconds, result.failed);
  fmt::print("{:<22} {:.1f} tokens/s, {:.2f} requests/s\n", "throughput",
             static_cast<double>(result.tokens) / seconds,
             static_cast<double>(result.first_ms.size()) / seconds);
  ShowPercentiles("time to first token", result.first_ms);
  ShowPercentiles("between chunks", result.gap_ms);
  return result.failed == 0 ? 0 : Fail(result.first_failure);
}

}  // namespace gloam
