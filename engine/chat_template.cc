#include "engine/chat_template.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <string_view>
#include <utility>

#include "engine/template_budget.h"
#include "engine/template_marks.h"
#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "jinja/value.h"

namespace gloam {
namespace {

// Far above what a real template makes of the largest body, whose limit is the server's: 10,000
// messages take 0.1 s.
constexpr size_t kMaxRenderedBytes = size_t{256} << 20;
constexpr std::chrono::seconds kMaxRenderTime{10};

// Roles come from a fixed list that the service checks, so templates may build special tokens
// from them ('<|' + role + '|>'): they are not marked as a client's text.
void TrustRoles(jinja::context& context) {
  for (const jinja::value& message : context.get_val("messages")->as_array()) {
    if (!jinja::is_val<jinja::value_object>(message)) continue;
    jinja::value undefined = jinja::mk_val<jinja::value_undefined>("role");
    const jinja::value role = message->at("role", undefined);
    if (!jinja::is_val<jinja::value_string>(role)) continue;
    message->insert(jinja::mk_val<jinja::value_string>("role"),
                    jinja::mk_val<jinja::value_string>(role->as_string().str()));
  }
}

std::string_view Trim(std::string_view text, bool left, bool right) {
  constexpr std::string_view kSpace = " \t\n\r\f\v";
  if (left) text.remove_prefix(std::min(text.find_first_not_of(kSpace), text.size()));
  if (right) text = text.substr(0, text.find_last_not_of(kSpace) + 1);
  return text;
}

// Cuts the prompt right after the last message's content, as Hugging Face's transformers does: the
// model continues it.
Status CutAfterFinalMessage(const nlohmann::ordered_json& messages, RenderedPrompt& prompt) {
  const std::string content = messages.back().value("content", "");
  const std::string text = prompt.Text();
  const std::string_view stripped = Trim(content, true, true);
  const size_t at = text.rfind(stripped);
  if (stripped.empty() || at == std::string::npos) {
    return InvalidArgument(
        "continue_final_message: the final message's content does not appear in the prompt that "
        "the chat template makes of it");
  }
  // The template may have trimmed the content's end; where it did not, it stays.
  const std::string_view with_tail = Trim(content, true, false);
  const bool keeps_tail = std::string_view(text).substr(at, with_tail.size()) == with_tail;
  size_t left = at + (keeps_tail ? with_tail.size() : stripped.size());
  for (RenderedPrompt::Part& part : prompt.parts) {
    const size_t length = std::min(left, part.text.size());
    part.text.resize(length);
    left -= length;
  }
  std::erase_if(prompt.parts, [](const RenderedPrompt::Part& part) { return part.text.empty(); });
  return OkStatus();
}

}  // namespace

struct ChatTemplate::Impl {
  std::string source;
  jinja::program program;
  std::string bos_token;
  std::string eos_token;
};

std::string RenderedPrompt::Text() const {
  std::string text;
  for (const Part& part : parts) text += part.text;
  return text;
}

std::vector<TextPart> RenderedPrompt::TextParts() const {
  std::vector<TextPart> views;
  views.reserve(parts.size());
  for (const Part& part : parts) {
    views.push_back({.text = part.text, .allow_special = !part.from_client});
  }
  return views;
}

ChatTemplate::ChatTemplate(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ChatTemplate::~ChatTemplate() = default;

StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::Parse(std::string_view source,
                                                            std::string bos_token,
                                                            std::string eos_token) {
  auto impl = std::make_unique<Impl>();
  impl->source = source;
  impl->bos_token = std::move(bos_token);
  impl->eos_token = std::move(eos_token);
  try {
    jinja::lexer lexer;
    impl->program = jinja::parse_from_tokens(lexer.tokenize(impl->source));
    KeepMarks(&impl->program);
    GuardStatements(&impl->program);
  } catch (const std::exception& error) {
    return InvalidArgument("chat template: {}", error.what());
  }
  return std::unique_ptr<ChatTemplate>(new ChatTemplate(std::move(impl)));
}

StatusOr<RenderedPrompt> ChatTemplate::Render(const nlohmann::ordered_json& messages,
                                              const RenderOptions& options) const {
  RenderedPrompt prompt;
  try {
    jinja::context context(impl_->source);
    if (options.extra.is_object()) {
      for (const auto& [name, value] : options.extra.items()) {
        context.set_val(name, MarkedValue(value));
      }
    }
    context.set_val("messages", MarkedValue(messages));
    if (!options.tools.is_null()) context.set_val("tools", MarkedValue(options.tools));
    TrustRoles(context);
    context.set_val("bos_token", jinja::mk_val<jinja::value_string>(impl_->bos_token));
    context.set_val("eos_token", jinja::mk_val<jinja::value_string>(impl_->eos_token));
    context.set_val("add_generation_prompt",
                    jinja::mk_val<jinja::value_bool>(options.add_generation_prompt));
    const TemplateBudget budget(kMaxRenderedBytes, kMaxRenderTime);
    jinja::runtime runtime(context);
    const jinja::value results = runtime.execute(impl_->program);
    const jinja::value text = jinja::runtime::gather_string_parts(results);
    for (const jinja::string_part& part : text->as_string().parts) {
      if (!part.val.empty()) {
        prompt.parts.push_back({.text = part.val, .from_client = part.is_input});
      }
    }
  } catch (const std::exception& error) {
    return InvalidArgument("messages: the model's chat template refused them: {}", error.what());
  }
  if (options.continue_final_message) {
    GLOAM_RETURN_IF_ERROR(CutAfterFinalMessage(messages, prompt));
  }
  return prompt;
}

}  // namespace gloam
