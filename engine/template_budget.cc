#include "engine/template_budget.h"

#include <memory>
#include <stdexcept>
#include <utility>

#include "base/check.h"
#include "fmt/format.h"

namespace gloam {
namespace {

// Nested loops, conditions and macro calls; real templates reach about 10. Each level takes a few
// kilobytes of the thread's stack.
constexpr int kMaxDepth = 200;

// The engine's context type cannot carry our budget, so the rendering thread does.
thread_local TemplateBudget* current_budget = nullptr;

void GuardAll(jinja::statements* body);

// The blocks inside a statement.
void GuardBlocksOf(jinja::statement* statement) {
  if (auto* s = dynamic_cast<jinja::if_statement*>(statement)) {
    GuardAll(&s->body);
    GuardAll(&s->alternate);
  } else if (auto* s = dynamic_cast<jinja::for_statement*>(statement)) {
    GuardAll(&s->body);
    GuardAll(&s->default_block);
  } else if (auto* s = dynamic_cast<jinja::macro_statement*>(statement)) {
    GuardAll(&s->body);
  } else if (auto* s = dynamic_cast<jinja::set_statement*>(statement)) {
    GuardAll(&s->body);
  } else if (auto* s = dynamic_cast<jinja::filter_statement*>(statement)) {
    GuardAll(&s->body);
  } else if (auto* s = dynamic_cast<jinja::call_statement*>(statement)) {
    GuardAll(&s->body);
  }
}

}  // namespace

class GuardedStatement final : public jinja::statement {
 public:
  explicit GuardedStatement(jinja::statement_ptr inner) : inner_(std::move(inner)) {
    pos = inner_->pos;
  }
  std::string type() const override { return inner_->type(); }
  void visit(jinja::context& context) const override { inner_->visit(context); }
  jinja::value execute_impl(jinja::context& context) const override {
    const TemplateBudget::Level level(*current_budget);
    jinja::value result = inner_->execute(context);
    current_budget->Count(result);
    return result;
  }

 private:
  jinja::statement_ptr inner_;
};

namespace {

void GuardAll(jinja::statements* body) {
  for (jinja::statement_ptr& statement : *body) {
    GuardBlocksOf(statement.get());
    statement = std::make_unique<GuardedStatement>(std::move(statement));
  }
}

}  // namespace

void GuardStatements(jinja::program* program) { GuardAll(&program->body); }

TemplateBudget::TemplateBudget(size_t max_bytes, std::chrono::steady_clock::duration max_time)
    : max_bytes_(max_bytes), deadline_(std::chrono::steady_clock::now() + max_time) {
  GLOAM_CHECK(current_budget == nullptr);
  current_budget = this;
}

TemplateBudget::~TemplateBudget() { current_budget = nullptr; }

TemplateBudget::Level::Level(TemplateBudget& budget) : budget_(budget) {
  if (budget.depth_ == kMaxDepth) throw std::runtime_error("the template recurses too deep");
  if (std::chrono::steady_clock::now() > budget.deadline_) {
    throw std::runtime_error("rendering takes too long");
  }
  ++budget.depth_;
}

TemplateBudget::Level::~Level() { --budget_.depth_; }

void TemplateBudget::Count(const jinja::value& result) {
  // The text of an inner block counts again in the blocks around it; it is copied there, too.
  if (jinja::is_val<jinja::value_string>(result)) {
    num_bytes_ += jinja::cast_val<jinja::value_string>(result)->val_str.length();
  }
  if (num_bytes_ > max_bytes_) {
    throw std::runtime_error(fmt::format("the text is over {} bytes", max_bytes_));
  }
}

}  // namespace gloam
