// The kinds of RULER task: each makes items whose text grows with a size. Pure functions.
#pragma once

#include <functional>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "eval/prompt.h"
#include "eval/tasks/tasks.h"

namespace gloam {

struct RulerContext {
  std::string id;  // names the item's random streams
  uint64_t seed = 0;
  int sample = 0;
  int length = 0;  // tokens that the item will have
  const std::vector<std::string>& haystack;
  const QaData& qa;
};

struct RulerItem {
  std::vector<std::string> references;
  int max_size = std::numeric_limits<int>::max();
  std::function<PromptText(int size)> text;  // owns what it needs but the context's references
};

struct RulerKind {
  std::string_view name;
  int max_answer_tokens = 0;  // as in RULER
  RulerItem (*make)(const RulerContext& context) = nullptr;
};

inline constexpr std::string_view kQuestionKind = "qa";

std::span<const RulerKind> AllRulerKinds();

}  // namespace gloam
