// Protobuf to server/api.h and back: what the JSON codec is to HTTP. Requests are only translated
// (ranges are GenerationService's business). Pure functions, and one stateful encoder per answer.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "base/status.h"
#include "gloam/v1/chat_completions.pb.h"
#include "gloam/v1/completions.pb.h"
#include "gloam/v1/tokenizer.pb.h"
#include "google/protobuf/message.h"
#include "grpcpp/support/byte_buffer.h"
#include "server/api.h"
#include "server/running_generation.h"

namespace gloam {

// Errors: kInvalidArgument with `param`.
[[nodiscard]] StatusOr<CompletionRequest> ToApi(const v1::CreateCompletionRequest& message);
[[nodiscard]] StatusOr<ChatCompletionRequest> ToApi(const v1::CreateChatCompletionRequest& message);
[[nodiscard]] StatusOr<TokenizeRequest> ToApi(const v1::TokenizeRequest& message);
[[nodiscard]] StatusOr<DetokenizeRequest> ToApi(const v1::DetokenizeRequest& message);

// Errors: kInvalidArgument when the bytes are not such a message (or hold invalid UTF-8).
[[nodiscard]] Status ParseMessage(const grpc::ByteBuffer& bytes,
                                  google::protobuf::Message* message);
grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message);

// Makes the wire messages of one answer. `running` must outlive it. One thread at a time.
class AnswerEncoder {
 public:
  virtual ~AnswerEncoder() = default;

  // The whole answer in one message, after the running generation's last batch.
  virtual grpc::ByteBuffer Whole(const std::vector<Answer>& answers,
                                 const std::vector<std::vector<SampleResult>>& prompt_logprobs) = 0;

  // What a batch adds to a stream; nothing when there is nothing to send.
  virtual std::optional<grpc::ByteBuffer> Chunk(const RunningGeneration::Batch& batch) = 0;
};

// The answers carry `model` and the time of this call.
std::unique_ptr<AnswerEncoder> MakeCompletionEncoder(const RunningGeneration& running,
                                                     const Tokenizer& tokenizer,
                                                     const std::string& model);
std::unique_ptr<AnswerEncoder> MakeChatEncoder(const RunningGeneration& running,
                                               const Tokenizer& tokenizer,
                                               const std::string& model);

}  // namespace gloam
