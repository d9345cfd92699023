// TemplateBudget: bounds of one rendering. The Jinja engine has none of its own, and a client's
// messages decide how often a template's loops run.
#pragma once

#include <chrono>
#include <cstddef>

#include "jinja/runtime.h"

namespace gloam {

// Wraps the statements of `program`, so that each asks the budget of the rendering thread before it
// runs. Call once, after parsing.
void GuardStatements(jinja::program* program);

// While it lives, renderings on this thread throw std::runtime_error when they make more than
// `max_bytes` of text, take longer than `max_time`, or recurse too deep. Not nested.
class TemplateBudget {
 public:
  TemplateBudget(size_t max_bytes, std::chrono::steady_clock::duration max_time);
  ~TemplateBudget();
  TemplateBudget(const TemplateBudget&) = delete;
  TemplateBudget& operator=(const TemplateBudget&) = delete;

 private:
  friend class GuardedStatement;
  // One statement under way; left also when the statement throws, as `break` does.
  class Level {
   public:
    explicit Level(TemplateBudget& budget);
    ~Level();
    Level(const Level&) = delete;
    Level& operator=(const Level&) = delete;

   private:
    TemplateBudget& budget_;
  };
  void Count(const jinja::value& result);

  const size_t max_bytes_;
  const std::chrono::steady_clock::time_point deadline_;
  size_t num_bytes_ = 0;
  int depth_ = 0;
};

}  // namespace gloam
