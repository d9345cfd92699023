#include "eval/result_file.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "eval/random.h"
#include "models/tokenizer/utf8.h"

namespace gloam {
namespace {

using nlohmann::json;

// Shares to five digits: they are many.
json Rounded(const std::vector<double>& values, int row_size) {
  json rows = json::array();
  for (size_t i = 0; i < values.size(); ++i) {
    if (i % static_cast<size_t>(row_size) == 0) rows.push_back(json::array());
    rows.back().push_back(std::round(values[i] * 1e5) / 1e5);
  }
  return rows;
}

json SparsityJson(const SparsityUsage& usage) {
  json out = {{"kept_tokens_per_head", usage.kept_tokens_per_head},
              {"loaded_tokens_per_kv_head", usage.loaded_tokens_per_kv_head},
              {"loaded_share", usage.loaded_share},
              {"context_tokens", usage.context_tokens},
              {"sparse_steps", usage.sparse_steps},
              {"bypassed_steps", usage.bypassed_steps}};
  if (usage.true_mass) out["true_mass"] = *usage.true_mass;
  return out;
}

SparsityUsage ParseSparsity(const json& from) {
  SparsityUsage usage;
  usage.kept_tokens_per_head = from.at("kept_tokens_per_head");
  usage.loaded_tokens_per_kv_head = from.at("loaded_tokens_per_kv_head");
  usage.loaded_share = from.at("loaded_share");
  usage.context_tokens = from.at("context_tokens");
  usage.sparse_steps = from.at("sparse_steps");
  usage.bypassed_steps = from.at("bypassed_steps");
  if (from.contains("true_mass")) usage.true_mass = from.at("true_mass").get<double>();
  return usage;
}

std::string RecordLine(const std::string& run, const ResultRecord& record) {
  json line = {{"run", run},
               {"id", record.id},
               {"group", record.group},
               {"scores", record.scores},
               {"prompt_tokens", record.prompt_tokens},
               {"decoded_prompt_tokens", record.decoded_prompt_tokens},
               {"answer_tokens", record.answer_tokens},
               {"context_tokens", record.context_tokens},
               {"facts", record.facts}};
  if (!record.references.empty()) {
    line["answer"] = ReplaceInvalidUtf8(record.answer);
    for (const std::string& text : record.references) {
      line["references"].push_back(ReplaceInvalidUtf8(text));
    }
  }
  if (record.sparsity) line["sparsity"] = SparsityJson(*record.sparsity);
  if (!record.layers.empty()) {
    line["layers"] = {{"kept_share", Rounded(record.layers.kept, record.layers.num_kv_heads)},
                      {"loaded_share", Rounded(record.layers.loaded, record.layers.num_kv_heads)}};
  }
  return line.dump() + "\n";
}

std::vector<double> ParseShares(const json& rows) {
  std::vector<double> shares;
  for (const json& row : rows) {
    for (const json& share : row) {
      shares.push_back(share.is_null() ? std::numeric_limits<double>::quiet_NaN()
                                       : share.get<double>());
    }
  }
  return shares;
}

ResultRecord ParseRecord(const json& line) {
  ResultRecord record;
  record.id = line.at("id");
  record.group = line.at("group");
  record.scores = line.at("scores").get<std::vector<double>>();
  record.prompt_tokens = line.at("prompt_tokens");
  record.decoded_prompt_tokens = line.at("decoded_prompt_tokens");
  record.answer_tokens = line.at("answer_tokens");
  record.context_tokens = line.at("context_tokens");
  record.facts = line.at("facts");
  if (line.contains("sparsity")) record.sparsity = ParseSparsity(line.at("sparsity"));
  if (line.contains("layers")) {
    LayerShares& layers = record.layers;
    const json& kept = line.at("layers").at("kept_share");
    layers.num_layers = static_cast<int>(kept.size());
    layers.num_kv_heads = static_cast<int>(kept.at(0).size());
    layers.kept = ParseShares(kept);
    layers.loaded = ParseShares(line.at("layers").at("loaded_share"));
  }
  return record;
}

std::string RunId(const json& parameters, const json& policy) {
  return fmt::format("{:016x}",
                     HashText(json{{"parameters", parameters}, {"policy", policy}}.dump()));
}

// The lines of `path` that are JSON objects. False: the last line was cut off.
bool ForEachLine(const std::filesystem::path& path, const std::function<void(const json&)>& use) {
  std::ifstream stream(path, std::ios::binary);
  bool complete = true;
  for (std::string text; std::getline(stream, text);) {
    complete = !stream.eof();
    const json line = json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (line.is_object()) use(line);
  }
  return complete;
}

}  // namespace

StatusOr<ResultFile> ResultFile::Open(const std::filesystem::path& path, const json& parameters,
                                      const EvalPolicy& policy) {
  ResultFile file;
  file.path_ = path;
  file.run_ = RunId(parameters, policy.body);
  bool announced = false;
  const bool complete = ForEachLine(path, [&](const json& line) {
    if (line.value("run", "") != file.run_) return;
    if (line.contains("parameters")) {
      announced = true;
      return;
    }
    try {
      ResultRecord record = ParseRecord(line);
      if (file.ids_.insert(record.id).second) file.records_.push_back(std::move(record));
    } catch (const json::exception&) {
      return;  // not of this program's making: the item runs again
    }
  });
  file.stream_.open(path, std::ios::binary | std::ios::app);
  if (!complete) file.stream_ << '\n';
  if (!announced) {
    file.stream_ << json{{"run", file.run_},
                         {"parameters", parameters},
                         {"name", policy.name},
                         {"control", policy.is_control},
                         {"policy", policy.body}}
                        .dump()
                 << '\n';
  }
  file.stream_.flush();
  if (!file.stream_) return Unavailable("cannot write {}", path.string());
  return file;
}

StatusOr<std::vector<PolicyResults>> CollectResults(const std::filesystem::path& folder,
                                                    const json& parameters) {
  std::vector<std::filesystem::path> paths;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    if (entry.path().extension() == ".jsonl") paths.push_back(entry.path());
  }
  if (error) return Unavailable("cannot read {}: {}", folder.string(), error.message());
  std::vector<PolicyResults> results;
  for (const auto& path : paths) {
    EvalPolicy policy;
    ForEachLine(path, [&](const json& line) {
      if (!line.contains("parameters") || line["parameters"] != parameters) return;
      policy = {.name = line.value("name", ""),
                .body = line.value("policy", json()),
                .is_control = line.value("control", false)};
    });
    if (policy.name.empty()) continue;
    GLOAM_ASSIGN_OR_RETURN(const ResultFile file, ResultFile::Open(path, parameters, policy));
    if (!file.records().empty()) results.push_back({std::move(policy), file.records()});
  }
  std::sort(results.begin(), results.end(), [](const auto& a, const auto& b) {
    if (a.policy.dense() != b.policy.dense()) return a.policy.dense();
    return a.policy.name < b.policy.name;
  });
  return results;
}

Status ResultFile::Append(ResultRecord record) {
  stream_ << RecordLine(run_, record) << std::flush;
  if (!stream_) return Unavailable("cannot write {}", path_.string());
  record.answer.clear();
  record.references.clear();
  ids_.insert(record.id);
  records_.push_back(std::move(record));
  return OkStatus();
}

}  // namespace gloam
