#include "eval/forced_benchmark.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>

#include "base/check.h"
#include "eval/random.h"
#include "eval/teacher_forcing.h"
#include "models/attention/sidecar_plan.h"

namespace gloam {
namespace {

using nlohmann::json;

struct Text {
  std::string name;  // of the group: the file's name, made unique
  uint64_t hash = 0;
  std::vector<int32_t> tokens;
  std::vector<int64_t> starts;  // of windows
};

// Tokens that the model puts before every text.
StatusOr<std::vector<int32_t>> PrefixOf(const Tokenizer& tokenizer) {
  auto prefix = tokenizer.Encode({}, /*add_special=*/true);
  if (!prefix.ok()) return prefix;
  // Some tokenizers also end a text; a window does not end one.
  const auto eos = tokenizer.eos_ids();
  while (!prefix->empty() && prefix->back() != tokenizer.bos_id() &&
         std::find(eos.begin(), eos.end(), prefix->back()) != eos.end()) {
    prefix->pop_back();
  }
  return prefix;
}

StatusOr<Text> ReadText(const std::filesystem::path& path, const Tokenizer& tokenizer,
                        int num_prefix, const ForcedOptions& options) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFound("--text: cannot read {}", path.string());
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  Text text{.name = path.filename().string(), .hash = HashText(bytes)};
  const TextPart part{.text = bytes};
  GLOAM_ASSIGN_OR_RETURN(text.tokens, tokenizer.Encode({&part, 1}, /*add_special=*/false));
  text.starts = WindowStarts(static_cast<int64_t>(text.tokens.size()), num_prefix, options);
  if (text.starts.empty()) {
    return InvalidArgument(
        "--text: {} has {} tokens, fewer than --context {} and --decoded {} need", path.string(),
        text.tokens.size(), options.context, options.decoded);
  }
  return text;
}

StatusOr<std::vector<Text>> ReadTexts(const ForcedOptions& options, const Tokenizer& tokenizer,
                                      int num_prefix) {
  std::vector<Text> texts;
  std::set<std::string> names;
  for (const auto& path : options.texts) {
    GLOAM_ASSIGN_OR_RETURN(Text text, ReadText(path, tokenizer, num_prefix, options));
    const std::string name = text.name;
    for (int i = 2; !names.insert(text.name).second; ++i) text.name = fmt::format("{}-{}", name, i);
    texts.push_back(std::move(text));
  }
  return texts;
}

// The scores by benchmark: the one that it is named after goes first.
enum class Score { kNll, kKl, kAgreement, kMaxKl };

std::vector<Score> ScoresOf(const std::string& benchmark) {
  if (benchmark == "ppl") return {Score::kNll, Score::kKl, Score::kAgreement, Score::kMaxKl};
  return {Score::kKl, Score::kNll, Score::kAgreement, Score::kMaxKl};
}

double ValueOf(Score score, const ForcedScores& scores) {
  switch (score) {
    case Score::kNll:
      return scores.nll;
    case Score::kKl:
      return scores.kl;
    case Score::kAgreement:
      return scores.agreement;
    case Score::kMaxKl:
      return scores.max_kl;
  }
  return 0;
}

ReportMetric MetricOf(Score score) {
  switch (score) {
    case Score::kNll:
      return {"perplexity", ReportMetric::Show::kExponential};
    case Score::kKl:
      return {"KL from dense (nats)", ReportMetric::Show::kNats};
    case Score::kAgreement:
      return {"same top token (%)", ReportMetric::Show::kPercent};
    case Score::kMaxKl:
      return {"largest KL, mean of windows", ReportMetric::Show::kNats};
  }
  return {};
}

ResultRecord MakeRecord(const std::string& id, const Text& text, int64_t start,
                        const ForcedOptions& options, ForcedScores scores) {
  ResultRecord record;
  record.id = id;
  record.group = text.name;
  for (const Score score : ScoresOf(options.benchmark)) {
    record.scores.push_back(ValueOf(score, scores));
  }
  record.prompt_tokens = options.context + options.decoded;
  record.decoded_prompt_tokens = options.decoded;
  record.context_tokens = options.context + (options.decoded + 1) / 2.0;
  record.sparsity = std::move(scores.sparsity);
  record.layers = std::move(scores.layers);
  record.facts = {{"start", start}, {"tokens", scores.num_tokens}};
  return record;
}

class Pass {
 public:
  Pass(ForcedBackend& backend, const ForcedOptions& options, const std::vector<Text>& texts,
       std::vector<int32_t> prefix)
      : backend_(backend), options_(options), texts_(texts), prefix_(std::move(prefix)) {}

  // Every window under the policies that lack it. `results` begin with dense.
  Status Run(const RunOptions& run, ResultSet& results) {
    GLOAM_RETURN_IF_ERROR(ParseAll(results.policies()));
    int num_windows = 0, index = 0;
    for (const Text& text : texts_) num_windows += static_cast<int>(text.starts.size());
    Progress progress(num_windows, run.progress);
    for (const Text& text : texts_) {
      for (const int64_t start : text.starts) {
        std::string summary;
        GLOAM_RETURN_IF_ERROR(RunWindow(text, start, results, &summary));
        if (!summary.empty()) progress.ItemDone(index, summary);
        ++index;
      }
    }
    return OkStatus();
  }

 private:
  Status ParseAll(const std::vector<EvalPolicy>& policies) {
    parsed_.clear();
    for (const EvalPolicy& policy : policies) {
      auto parsed = backend_.Parse(policy.body);
      if (!parsed.ok()) {
        return InvalidArgument("--policies: {}: {}", policy.name, MessageOf(parsed.status()));
      }
      parsed_.push_back(*std::move(parsed));
    }
    GLOAM_CHECK(!parsed_.empty() && parsed_.front() == nullptr);
    decoder_.reset();
    GLOAM_ASSIGN_OR_RETURN(decoder_,
                           backend_.MakeDecoder(options_.context, options_.decoded, parsed_));
    return OkStatus();
  }

  Status RunWindow(const Text& text, int64_t start, ResultSet& results, std::string* summary) {
    const std::string id = fmt::format("{}@{}", text.name, start);
    const auto missing = results.Missing(id);
    if (missing.empty()) return OkStatus();
    // Dense is the reference, whether its result is missing or not.
    std::vector<size_t> rows = {0};
    std::copy_if(missing.begin(), missing.end(), std::back_inserter(rows),
                 [](size_t i) { return i != 0; });
    std::vector<std::shared_ptr<const SparsityPolicy>> policies;
    for (const size_t row : rows) policies.push_back(parsed_[row]);

    const int num_own = options_.context - static_cast<int>(prefix_.size());
    const auto at = text.tokens.begin() + start;
    std::vector<int32_t> context = prefix_;
    context.insert(context.end(), at, at + num_own);
    const std::vector<int32_t> fed(at + num_own, at + num_own + options_.decoded + 1);
    GLOAM_ASSIGN_OR_RETURN(auto scores, RunTeacherForcing(*decoder_, context, fed, policies));
    *summary = fmt::format("{} {}: dense ppl {:.2f}", options_.benchmark, id,
                           std::exp(scores.front().nll));
    for (size_t i = 0; i < rows.size(); ++i) {
      if (i > 0) {
        *summary += fmt::format("  {} kl {:.4f}", results.policies()[rows[i]].name, scores[i].kl);
      }
      if (i == 0 && missing.front() != 0) continue;
      GLOAM_RETURN_IF_ERROR(
          results.Append(rows[i], MakeRecord(id, text, start, options_, std::move(scores[i]))));
    }
    return OkStatus();
  }

  ForcedBackend& backend_;
  const ForcedOptions& options_;
  const std::vector<Text>& texts_;
  const std::vector<int32_t> prefix_;
  std::vector<std::shared_ptr<const SparsityPolicy>> parsed_;  // of the current pass
  std::unique_ptr<ForcedDecoder> decoder_;
};

// Policies that can run side by side: of each kind of sidecar a cache keeps one shape. Every group
// begins with dense, which `policies` do too.
StatusOr<std::vector<std::vector<EvalPolicy>>> GroupBySidecars(
    ForcedBackend& backend, const std::vector<EvalPolicy>& policies) {
  std::vector<std::vector<EvalPolicy>> groups;
  std::vector<SidecarConfig> sidecars;
  for (const EvalPolicy& policy : policies) {
    if (policy.dense()) continue;
    auto parsed = backend.Parse(policy.body);
    if (!parsed.ok()) {
      return InvalidArgument("--policies: {}: {}", policy.name, MessageOf(parsed.status()));
    }
    size_t group = 0;
    while (group < groups.size() && !AddSidecars(**parsed, &sidecars[group]).ok()) ++group;
    if (group == groups.size()) {
      groups.push_back({policies.front()});
      GLOAM_RETURN_IF_ERROR(AddSidecars(**parsed, &sidecars.emplace_back()));
    }
    groups[group].push_back(policy);
  }
  if (groups.empty()) groups.push_back({policies.front()});
  return groups;
}

json Parameters(const ForcedBackend& backend, const ForcedOptions& options,
                const std::vector<Text>& texts) {
  json names = json::array();
  for (const Text& text : texts) names.push_back({text.name, fmt::format("{:016x}", text.hash)});
  return {{"benchmark", options.benchmark}, {"model", backend.model_name()},
          {"settings", backend.settings()}, {"texts", names},
          {"context", options.context},     {"decoded", options.decoded},
          {"stride", options.stride},       {"windows", options.windows}};
}

}  // namespace

std::vector<int64_t> WindowStarts(int64_t num_tokens, int num_prefix,
                                  const ForcedOptions& options) {
  const int64_t size = int64_t{options.context} - num_prefix + options.decoded + 1;
  const int64_t stride = options.stride > 0 ? options.stride : options.context + options.decoded;
  std::vector<int64_t> starts;
  for (int64_t start = 0; start + size <= num_tokens; start += stride) {
    if (options.windows > 0 && static_cast<int>(starts.size()) == options.windows) break;
    starts.push_back(start);
  }
  return starts;
}

StatusOr<std::string> RunForcedBenchmark(ForcedBackend& backend, const ForcedOptions& options,
                                         const std::vector<EvalPolicy>& policies,
                                         const RunOptions& run) {
  if (options.texts.empty()) {
    return InvalidArgument(
        "--text is missing: one or more long plain text files. Python's own library is long real "
        "text for code models, a book of a public library for others");
  }
  if (options.context % kBlockTokens != 0 || options.context < kBlockTokens) {
    return InvalidArgument("--context {} is not a multiple of {}", options.context, kBlockTokens);
  }
  GLOAM_ASSIGN_OR_RETURN(const auto prefix, PrefixOf(backend.tokenizer()));
  GLOAM_ASSIGN_OR_RETURN(const auto texts,
                         ReadTexts(options, backend.tokenizer(), static_cast<int>(prefix.size())));
  const json parameters = Parameters(backend, options, texts);
  Pass pass(backend, options, texts, prefix);
  const auto run_all = [&](const std::vector<EvalPolicy>& rows) -> Status {
    GLOAM_ASSIGN_OR_RETURN(const auto groups, GroupBySidecars(backend, rows));
    for (const std::vector<EvalPolicy>& group : groups) {
      GLOAM_ASSIGN_OR_RETURN(ResultSet results, ResultSet::Open(run.folder, parameters, group));
      GLOAM_RETURN_IF_ERROR(pass.Run(run, results));
    }
    return OkStatus();
  };
  GLOAM_RETURN_IF_ERROR(run_all(policies));
  GLOAM_ASSIGN_OR_RETURN(const ResultSet results,
                         ResultSet::Open(run.folder, parameters, policies));
  std::vector<EvalPolicy> controls = ControlsFor(results.Results());
  if (!controls.empty()) {
    controls.insert(controls.begin(), policies.front());
    GLOAM_RETURN_IF_ERROR(run_all(controls));
  }

  ReportSpec spec{
      .title = fmt::format("{}: {}, {} tokens decoded after {} of context", options.benchmark,
                           backend.model_name(), options.decoded, options.context),
      .log_plot = options.benchmark == "kl",
      .group_title = "text",
      .parameters = parameters};
  for (const Score score : ScoresOf(options.benchmark)) spec.metrics.push_back(MetricOf(score));
  return WriteReport(run.folder, spec, /*passkey_maps=*/false);
}

}  // namespace gloam
