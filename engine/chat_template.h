// ChatTemplate: a model's Jinja template, parsed once, rendered per request.
// Immutable after parsing; any thread.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "models/tokenizer/tokenizer.h"
#include "nlohmann/json.hpp"

namespace gloam {

// A rendered prompt: text from the template may hold special tokens, text from the client may not.
struct RenderedPrompt {
  struct Part {
    std::string text;
    bool from_client = false;
  };
  std::vector<Part> parts;

  std::string Text() const;
  std::vector<TextPart> TextParts() const;  // views into `parts`
};

// JSON keeps its keys in the order of the request: templates print tools as they came, and models
// were trained on that order.
struct RenderOptions {
  bool add_generation_prompt = true;
  bool continue_final_message = false;  // the prompt ends inside the last message
  nlohmann::ordered_json tools;         // array or null
  nlohmann::ordered_json extra;         // chat_template_kwargs: object or null
};

class ChatTemplate {
 public:
  ~ChatTemplate();

  // `bos_token` and `eos_token` are the texts that the template may print.
  // Errors: kInvalidArgument with the parser's message and line.
  [[nodiscard]] static StatusOr<std::unique_ptr<ChatTemplate>> Parse(std::string_view source,
                                                                     std::string bos_token,
                                                                     std::string eos_token);

  // `messages`: [{"role": ..., "content": ...}, ...]. Errors: kInvalidArgument when the template
  // itself refuses (raise_exception) or fails on these messages.
  [[nodiscard]] StatusOr<RenderedPrompt> Render(const nlohmann::ordered_json& messages,
                                                const RenderOptions& options) const;

 private:
  struct Impl;
  explicit ChatTemplate(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace gloam
