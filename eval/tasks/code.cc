#include <algorithm>
#include <fstream>
#include <sstream>

#include "eval/metrics.h"
#include "eval/random.h"
#include "eval/tasks/tasks.h"
#include "fmt/format.h"

namespace gloam {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxAnswerTokens = 48;  // a line of source, and the end of the one before it
constexpr int kMinLinesBefore = 20;   // of the same file
constexpr int kDecodedLines = 8;      // the last lines before the wanted one
constexpr size_t kMinLineBytes = 10;  // of a line worth asking for, without its indentation
constexpr size_t kMaxLineBytes = 120;
constexpr size_t kMaxFileBytes = 1 << 20;
constexpr size_t kMaxBytesPerToken = 8;  // of source text, generously: how much context to read

// The files with this ending below `folder`, sorted by name, links aside.
StatusOr<std::vector<fs::path>> FindSources(const fs::path& folder, const std::string& extension) {
  std::vector<fs::path> paths;
  std::error_code error;
  const auto options = fs::directory_options::skip_permission_denied;
  for (fs::recursive_directory_iterator at(folder, options, error), end; !error && at != end;
       at.increment(error)) {
    std::error_code ignored;
    if (!at->is_regular_file(ignored) || at->is_symlink(ignored)) continue;
    if (at->path().extension() != extension) continue;
    const auto bytes = at->file_size(ignored);
    if (!ignored && bytes > 0 && bytes <= kMaxFileBytes) paths.push_back(at->path());
  }
  if (error) return NotFound("cannot read the folder {}: {}", folder.string(), error.message());
  if (paths.empty()) {
    return NotFound("{} holds no files that end with {}", folder.string(), extension);
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

std::vector<std::string> ReadLines(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  std::vector<std::string> lines;
  for (std::string line; std::getline(stream, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    lines.push_back(std::move(line));
  }
  return lines;
}

// Lines that the ones before them say something about: no comments, imports, or brackets alone.
std::vector<int> WantedLines(const std::vector<std::string>& lines) {
  std::vector<int> wanted;
  for (size_t i = kMinLinesBefore; i < lines.size(); ++i) {
    const std::string_view line = Trim(lines[i]);
    if (line.size() < kMinLineBytes || line.size() > kMaxLineBytes) continue;
    const bool comment = line.starts_with("#") || line.starts_with("//") || line.starts_with("*") ||
                         line.starts_with("/*") || line.starts_with("\"\"\"");
    const bool import = line.starts_with("import ") || line.starts_with("from ");
    if (!comment && !import) wanted.push_back(static_cast<int>(i));
  }
  return wanted;
}

class CodeTask final : public Task {
 public:
  CodeTask(CodeOptions options, std::vector<fs::path> paths, PromptTokenizer& tokenizer)
      : options_(std::move(options)),
        common_(options_.common),
        paths_(std::move(paths)),
        tokenizer_(tokenizer) {}

  std::string_view name() const override { return "code"; }
  nlohmann::json parameters() const override {
    uint64_t files = 0;
    for (const fs::path& path : paths_) files = files * 31 + HashText(Name(path));
    return {{"lengths", common_.lengths},
            {"samples", common_.num_samples},
            {"seed", common_.seed},
            {"extension", options_.extension},
            {"files", paths_.size()},
            {"names", fmt::format("{:016x}", files)},
            {"answer_tokens", MaxAnswerTokens()}};
  }
  std::vector<std::string> metrics() const override { return {"edit_similarity", "exact"}; }
  int num_items() const override {
    return static_cast<int>(common_.lengths.size()) * common_.num_samples;
  }
  std::string ItemId(int index) const override {
    return fmt::format("{}/{}", Length(index), index % common_.num_samples);
  }

  StatusOr<EvalItem> MakeItem(int index) override {
    EvalItem item;
    item.id = ItemId(index);
    item.group = fmt::format("{}", Length(index));
    item.max_tokens = MaxAnswerTokens();
    // The same line at every length, so that lengths can be compared.
    Random random(common_.seed, fmt::format("code/{}", index % common_.num_samples));
    GLOAM_ASSIGN_OR_RETURN(const Place place, ChoosePlace(random));
    const auto context = ContextLines(place, Length(index), random);
    const int first_decoded = place.line - kDecodedLines;
    const std::string tail = Join(place.lines, first_decoded, place.line);
    const auto make = [&](int size) -> PromptText {
      const int end = static_cast<int>(context.size());
      return {.context = Join(context, end - size, end) + (size > 0 ? "\n" : ""), .question = tail};
    };
    GLOAM_ASSIGN_OR_RETURN(FittedPrompt fitted,
                           FitPrompt(tokenizer_, /*chat=*/false, Length(index) - item.max_tokens,
                                     static_cast<int>(context.size()), make));
    item.prompt = std::move(fitted.prompt);
    item.references = {std::string(Trim(place.lines[static_cast<size_t>(place.line)]))};
    item.facts = {{"length", Length(index)}, {"file", place.name}, {"line", place.line + 1}};
    return item;
  }

  std::vector<double> Score(const EvalItem& item, std::string_view answer) const override {
    const std::string_view line = FirstLine(answer);
    const std::string& reference = item.references.front();
    return {EditSimilarity(line, reference), line == reference ? 1.0 : 0.0};
  }

 private:
  // A line to complete.
  struct Place {
    std::string name;
    std::vector<std::string> lines;
    int line = 0;
  };

  int Length(int index) const {
    return common_.lengths[static_cast<size_t>(index / common_.num_samples)];
  }
  int MaxAnswerTokens() const {
    return common_.max_answer_tokens > 0 ? common_.max_answer_tokens : kMaxAnswerTokens;
  }
  std::string Name(const fs::path& path) const {
    return path.lexically_relative(options_.folder).generic_string();
  }

  static std::string Join(const std::vector<std::string>& lines, int begin, int end) {
    std::string text;
    for (int i = begin; i < end; ++i) {
      if (i > begin) text += '\n';
      text += lines[static_cast<size_t>(i)];
    }
    return text;
  }

  StatusOr<Place> ChoosePlace(Random& random) const {
    constexpr int kMaxTries = 1000;
    for (int i = 0; i < kMaxTries; ++i) {
      const fs::path& path = random.Pick(paths_);
      Place place{.name = Name(path), .lines = ReadLines(path)};
      const auto wanted = WantedLines(place.lines);
      if (wanted.empty()) continue;
      place.line = random.Pick(wanted);
      return place;
    }
    return NotFound("{} holds no file with a line to complete", options_.folder.string());
  }

  // Lines before the decoded ones: other files, in a random order, then the file itself.
  std::vector<std::string> ContextLines(const Place& place, int length, Random& random) const {
    const size_t max_bytes = static_cast<size_t>(length) * kMaxBytesPerToken;
    std::vector<std::string> own = {fmt::format("# file: {}", place.name)};
    own.insert(own.end(), place.lines.begin(), place.lines.begin() + (place.line - kDecodedLines));
    std::vector<std::string> others;
    size_t bytes = 0;
    std::vector<fs::path> order = paths_;
    random.Shuffle(order);
    for (const fs::path& path : order) {
      if (bytes >= max_bytes) break;
      if (Name(path) == place.name) continue;
      others.push_back(fmt::format("# file: {}", Name(path)));
      for (std::string& line : ReadLines(path)) {
        bytes += line.size() + 1;
        others.push_back(std::move(line));
      }
    }
    others.insert(others.end(), own.begin(), own.end());
    return others;
  }

  const CodeOptions options_;
  const TaskOptions& common_;
  const std::vector<fs::path> paths_;
  PromptTokenizer& tokenizer_;
};

}  // namespace

StatusOr<std::unique_ptr<Task>> MakeCodeTask(CodeOptions options, PromptTokenizer& tokenizer) {
  GLOAM_ASSIGN_OR_RETURN(auto paths, FindSources(options.folder, options.extension));
  return std::make_unique<CodeTask>(std::move(options), std::move(paths), tokenizer);
}

}  // namespace gloam
