// The benchmarks that give items and score answers; each in a file of its own. Tokenizers must
// outlive the tasks. docs/eval.md describes them for users.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "eval/task.h"

namespace gloam {

// What every task is given. Lengths are of prompt and answer together, in tokens of the model.
struct TaskOptions {
  std::vector<int> lengths;
  int num_samples = 10;  // per cell: length and depth, length and kind, length
  uint64_t seed = 1;
  bool chat = false;  // prompts are messages of a chat instead of plain text
  // Sentences of real text that hide the needles; empty: made-up prose.
  std::vector<std::string> haystack;
  int max_answer_tokens = 0;  // 0: as each task has it
};

// Text cut at the ends of its sentences.
std::vector<std::string> SplitIntoSentences(std::string_view text);

// A number hidden at a depth of a text that repeats itself; 1 when the answer's first number is it.
struct PasskeyOptions {
  TaskOptions common;
  std::vector<double> depths;  // 0: at the beginning of the text, 1: at its end
};
std::unique_ptr<Task> MakePasskeyTask(PasskeyOptions options, PromptTokenizer& tokenizer);

// RULER's kinds of task (arXiv 2404.06654), in our own words. Scores: share of the references found
// in the answer; for questions, whether one is.
struct QaParagraph {
  std::string text;
};
struct QaQuestion {
  std::string question;
  std::vector<std::string> answers;
  int paragraph = 0;  // that has the answer
};
struct QaData {
  std::vector<QaParagraph> paragraphs;
  std::vector<QaQuestion> questions;  // those with an answer
};
// SQuAD's format: {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers": [{"text"}],
// "is_impossible"}]}]}]}. Errors: kInvalidArgument naming what is missing.
[[nodiscard]] StatusOr<QaData> ParseQaData(std::string_view json);

struct RulerOptions {
  TaskOptions common;
  std::vector<std::string> kinds;  // of RulerKinds(); empty: all for which there are data
  QaData qa;
};
std::vector<std::string> RulerKinds();
// Errors: kInvalidArgument naming an unknown kind, or qa without data.
[[nodiscard]] StatusOr<std::unique_ptr<Task>> MakeRulerTask(RulerOptions options,
                                                            PromptTokenizer& tokenizer);

// LongBench (arXiv 2308.14508) from its published files: DATASET.jsonl, dataset2prompt.json and
// dataset2maxlen.json in `folder`, or in its folders data/ and config/. Prompts longer than
// `max_prompt_tokens` lose their middle.
struct LongBenchOptions {
  std::filesystem::path folder;
  std::vector<std::string> datasets;  // empty: all that are there and have a metric here
  int max_prompt_tokens = 0;
  int num_samples = 0;  // per data set, the first; 0: all
  bool chat = false;    // but for the data sets that are published without a template
};
// Errors: kNotFound, kInvalidArgument naming the file and what is wrong in it, kUnimplemented for
// data sets whose metric needs Chinese word segmentation.
[[nodiscard]] StatusOr<std::unique_ptr<Task>> MakeLongBenchTask(LongBenchOptions options,
                                                                PromptTokenizer& tokenizer);

// The next line of a source file, after lines of other files of the same folder and the lines
// before it. The last lines are fed in decode mode. Errors: kNotFound.
struct CodeOptions {
  TaskOptions common;
  std::filesystem::path folder;
  std::string extension = ".py";
};
[[nodiscard]] StatusOr<std::unique_ptr<Task>> MakeCodeTask(CodeOptions options,
                                                           PromptTokenizer& tokenizer);

}  // namespace gloam
