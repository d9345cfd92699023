// OpenAiStream: turns one request's deltas into SSE events in OpenAI's shape. The parts of a chunk
// that never change are built once; a token then costs an append and the escaping of its text.
// One connection's, one thread at a time.
#pragma once

#include <string>
#include <vector>

#include "server/openai/responses.h"

namespace gloam {

class OpenAiStream {
 public:
  // `running` and `tokenizer` must outlive the stream.
  OpenAiStream(ResponseInfo info, const RunningGeneration& running, const Tokenizer& tokenizer);

  // Appends the batch's events to `out`; after the last one also the usage chunk (when asked for)
  // and "[DONE]". Errors: an answer failed; nothing may follow then but ErrorEvent.
  [[nodiscard]] Status Append(RunningGeneration::Batch batch, std::string* out);

  static std::string ErrorEvent(const Status& status);

 private:
  struct Choice {
    bool started = false;
    CompletionLogprobs logprobs;
  };

  void AppendDelta(const OutputDelta& delta, std::string* out);
  void AppendStart(int index, std::string* out);
  void AppendChunk(int index, std::string_view content, const nlohmann::json& logprobs,
                   const OutputDelta* last, std::string* out);

  ResponseInfo info_;
  const RunningGeneration& running_;
  const Tokenizer& tokenizer_;
  std::string head_;  // of every chunk, up to the choice's index
  std::string tail_;  // of every chunk, from the end of the choice
  std::vector<Choice> choices_;
  std::vector<std::vector<SampleResult>> prompt_logprobs_;  // for echo, by prompt
};

}  // namespace gloam
