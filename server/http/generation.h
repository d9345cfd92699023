// HttpGeneration: one generation request over HTTP, from Engine::Submit to the last byte, whole or
// as events. The connection owns it and tells it of a disconnect; everything runs on the
// exchange's executor.
#pragma once

#include <memory>

#include "server/http/types.h"
#include "server/openai/responses.h"
#include "server/openai/stream.h"
#include "server/running_generation.h"

namespace gloam {

// The HTTP answer that a fault makes, with Retry-After where trying again helps.
HttpResponse ErrorResponse(const Status& status);

class HttpGeneration : public std::enable_shared_from_this<HttpGeneration> {
 public:
  // Submits and answers through `exchange`, errors too. `service` must outlive the exchange.
  // `max_queued_bytes` bounds what waits for a slow reader.
  static void Start(GenerationService& service, PreparedGeneration prepared, ResponseInfo info,
                    size_t max_queued_bytes, const std::shared_ptr<HttpExchange>& exchange);

 private:
  HttpGeneration(const Tokenizer& tokenizer, ResponseInfo info,
                 const std::shared_ptr<HttpExchange>& exchange);

  void Pump();
  void PumpStream(HttpExchange& exchange);
  void PumpWhole(HttpExchange& exchange);
  void End();  // cancels what still runs

  const Tokenizer& tokenizer_;
  const ResponseInfo info_;
  std::weak_ptr<HttpExchange> exchange_;  // it owns this
  std::unique_ptr<RunningGeneration> running_;
  std::unique_ptr<OpenAiStream> stream_;        // null: a whole answer
  std::unique_ptr<AnswerCollector> collector_;  // null: a stream
  bool begun_ = false;                          // the stream's head is out
  bool writing_ = false;
};

}  // namespace gloam
