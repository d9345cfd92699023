#include "engine/template_marks.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace gloam {
namespace {

template <size_t n>
bool IsOneOf(const std::string& name, const std::string_view (&names)[n]) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

// Filters whose result is always a new string.
constexpr std::string_view kFilters[] = {"tojson",  "join",   "string",   "format",
                                         "replace", "indent", "wordwrap", "safe"};
// Methods whose result is a new string, or a list of them. (Those that cut text keep the mark only
// where all of it was marked.)
constexpr std::string_view kMethods[] = {"join",  "format", "replace",
                                         "split", "rsplit", "splitlines"};

bool HasMark(const jinja::value& value) {
  if (jinja::is_val<jinja::value_string>(value)) {
    const auto& parts = jinja::cast_val<jinja::value_string>(value)->val_str.parts;
    return std::any_of(parts.begin(), parts.end(), [](const auto& part) { return part.is_input; });
  }
  if (jinja::is_val<jinja::value_object>(value)) {
    const auto& pairs = value->as_ordered_object();
    return std::any_of(pairs.begin(), pairs.end(), [](const auto& pair) {
      return HasMark(pair.first) || HasMark(pair.second);
    });
  }
  if (jinja::is_val<jinja::value_array>(value)) {
    const auto& items = value->as_array();
    return std::any_of(items.begin(), items.end(), HasMark);
  }
  return false;
}

// `value`, with those strings in it marked that have no marks.
jinja::value Marked(const jinja::value& value) {
  if (jinja::is_val<jinja::value_array>(value)) {
    auto marked = jinja::mk_val<jinja::value_array>();
    for (const jinja::value& item : value->as_array()) marked->push_back(Marked(item));
    return marked;
  }
  if (!jinja::is_val<jinja::value_string>(value) || HasMark(value)) return value;
  auto marked = jinja::mk_val<jinja::value_string>(value->as_string());
  marked->mark_input();
  return marked;
}

// Where the filter that this thread is applying notes that something marked went into it.
thread_local bool* current_note = nullptr;

// An operand or argument of a filter.
class NotedExpression final : public jinja::expression {
 public:
  explicit NotedExpression(jinja::statement_ptr inner) : inner_(std::move(inner)) {}
  std::string type() const override { return inner_->type(); }
  void visit(jinja::context& context) const override { inner_->visit(context); }
  jinja::value execute_impl(jinja::context& context) const override {
    jinja::value value = inner_->execute(context);
    if (current_note != nullptr && HasMark(value)) *current_note = true;
    return value;
  }

 private:
  jinja::statement_ptr inner_;
};

// A filter or slice over noted operand and arguments.
class MarkingFilter final : public jinja::expression {
 public:
  explicit MarkingFilter(jinja::statement_ptr filter) : filter_(std::move(filter)) {}
  std::string type() const override { return filter_->type(); }
  void visit(jinja::context& context) const override { filter_->visit(context); }
  jinja::value execute_impl(jinja::context& context) const override {
    bool is_marked = false;
    struct Restore {
      bool* outer;
      ~Restore() { current_note = outer; }
    } const restore{std::exchange(current_note, &is_marked)};
    jinja::value value = filter_->execute(context);
    return is_marked ? Marked(value) : value;
  }

 private:
  jinja::statement_ptr filter_;
};

// The method of a call, e.g. the `text.replace` of `text.replace(a, b)`.
class MarkingCallee final : public jinja::expression {
 public:
  explicit MarkingCallee(jinja::statement_ptr inner) : inner_(std::move(inner)) {}
  std::string type() const override { return inner_->type(); }
  void visit(jinja::context& context) const override { inner_->visit(context); }
  jinja::value execute_impl(jinja::context& context) const override {
    const jinja::value callee = inner_->execute(context);
    if (!jinja::is_val<jinja::value_func>(callee)) return callee;
    const auto* function = jinja::cast_val<jinja::value_func>(callee);
    return jinja::mk_val<jinja::value_func>(
        function->name, [callee, self = function->arg0](const jinja::func_args& args) {
          const auto& values = args.get_args();
          const bool is_marked =
              (self && HasMark(self)) || std::any_of(values.begin(), values.end(), HasMark);
          jinja::value value = callee->invoke(args);
          return is_marked ? Marked(value) : value;
        });
  }

 private:
  jinja::statement_ptr inner_;
};

void Note(jinja::statement_ptr* argument) {
  if (auto* keyword = dynamic_cast<jinja::keyword_argument_expression*>(argument->get())) {
    argument = &keyword->val;
  }
  *argument = std::make_unique<NotedExpression>(std::move(*argument));
}

// `operand | filter` becomes `marking(operand | filter) | string`; the last step changes nothing.
void MarkFilter(jinja::filter_expression* expression) {
  auto* call = dynamic_cast<jinja::call_expression*>(expression->filter.get());
  const auto* name = dynamic_cast<jinja::identifier*>(call != nullptr ? call->callee.get()
                                                                      : expression->filter.get());
  if (name == nullptr || !IsOneOf(name->val, kFilters)) return;
  if (call != nullptr)
    std::for_each(call->args.begin(), call->args.end(), [](auto& a) { Note(&a); });
  Note(&expression->operand);
  auto inner = std::make_unique<jinja::filter_expression>(std::move(expression->operand),
                                                          std::move(expression->filter));
  inner->pos = expression->pos;
  expression->operand = std::make_unique<MarkingFilter>(std::move(inner));
  expression->operand->pos = expression->pos;
  expression->filter = std::make_unique<jinja::identifier>("string");
  expression->filter->pos = expression->pos;
}

// `text[a:b]` becomes `marking(text[a:b])[:]`.
void MarkSlice(jinja::member_expression* expression) {
  if (dynamic_cast<jinja::slice_expression*>(expression->property.get()) == nullptr) return;
  Note(&expression->object);
  auto inner = std::make_unique<jinja::member_expression>(std::move(expression->object),
                                                          std::move(expression->property),
                                                          /*computed=*/true);
  inner->pos = expression->pos;
  expression->object = std::make_unique<MarkingFilter>(std::move(inner));
  expression->object->pos = expression->pos;
  expression->property = std::make_unique<jinja::slice_expression>(nullptr, nullptr, nullptr);
  expression->property->pos = expression->pos;
}

void MarkMethod(jinja::call_expression* expression) {
  const auto* member = dynamic_cast<jinja::member_expression*>(expression->callee.get());
  if (member == nullptr) return;
  const auto* name = dynamic_cast<jinja::identifier*>(member->property.get());
  if (name == nullptr || !IsOneOf(name->val, kMethods)) return;
  const size_t pos = expression->callee->pos;
  expression->callee = std::make_unique<MarkingCallee>(std::move(expression->callee));
  expression->callee->pos = pos;
}

}  // namespace

jinja::value MarkedValue(const nlohmann::ordered_json& json) {
  switch (json.type()) {
    case nlohmann::ordered_json::value_t::boolean:
      return jinja::mk_val<jinja::value_bool>(json.get<bool>());
    case nlohmann::ordered_json::value_t::number_integer:
    case nlohmann::ordered_json::value_t::number_unsigned:
      return jinja::mk_val<jinja::value_int>(json.get<int64_t>());
    case nlohmann::ordered_json::value_t::number_float:
      return jinja::mk_val<jinja::value_float>(json.get<double>());
    case nlohmann::ordered_json::value_t::string: {
      auto text = jinja::mk_val<jinja::value_string>(json.get<std::string>());
      text->mark_input();
      return text;
    }
    case nlohmann::ordered_json::value_t::array: {
      auto array = jinja::mk_val<jinja::value_array>();
      for (const auto& item : json) array->push_back(MarkedValue(item));
      return array;
    }
    case nlohmann::ordered_json::value_t::object: {
      auto object = jinja::mk_val<jinja::value_object>();
      for (const auto& [name, item] : json.items()) {
        auto key = jinja::mk_val<jinja::value_string>(name);
        key->mark_input();
        object->insert(jinja::value(key), MarkedValue(item));
      }
      return object;
    }
    default:
      return jinja::mk_val<jinja::value_none>();
  }
}

void KeepMarks(jinja::program* program) {
  // Collected first: changing a node while its parent is being visited would confuse the visit.
  std::vector<jinja::statement*> nodes;
  jinja::context context;
  context.visitor = [&](bool, const jinja::statement* node,
                        const std::vector<jinja::visitor_pair>& children) {
    // The nodes are ours, only the visitor sees them as const.
    nodes.push_back(const_cast<jinja::statement*>(node));
    for (const auto& [label, list] : children) {
      for (const jinja::statement* child : list) {
        if (child != nullptr) child->visit(context);
      }
    }
  };
  for (const jinja::statement_ptr& statement : program->body) statement->visit(context);
  for (jinja::statement* node : nodes) {
    if (auto* filter = dynamic_cast<jinja::filter_expression*>(node)) MarkFilter(filter);
    if (auto* member = dynamic_cast<jinja::member_expression*>(node)) MarkSlice(member);
    if (auto* call = dynamic_cast<jinja::call_expression*>(node)) MarkMethod(call);
  }
}

}  // namespace gloam
