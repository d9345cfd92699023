#include "server/http/generation.h"

#include <utility>

#include "boost/asio/post.hpp"
#include "server/api_error.h"

namespace gloam {

HttpResponse ErrorResponse(const Status& status) {
  HttpResponse response;
  response.status = HttpStatusOf(status);
  response.body = ErrorBody(status);
  if (response.status == 401) response.headers.emplace_back("WWW-Authenticate", "Bearer");
  if (response.status == 429 || response.status == 503) {
    response.headers.emplace_back("Retry-After", "1");
  }
  return response;
}

HttpGeneration::HttpGeneration(const Tokenizer& tokenizer, ResponseInfo info,
                               const std::shared_ptr<HttpExchange>& exchange)
    : tokenizer_(tokenizer), info_(std::move(info)), exchange_(exchange) {}

void HttpGeneration::Start(GenerationService& service, PreparedGeneration prepared,
                           ResponseInfo info, size_t max_queued_bytes,
                           const std::shared_ptr<HttpExchange>& exchange) {
  std::shared_ptr<HttpGeneration> self(
      new HttpGeneration(service.tokenizer(), std::move(info), exchange));
  auto on_ready = [weak = std::weak_ptr(self), executor = exchange->executor()] {
    boost::asio::post(executor, [weak] {
      if (const auto generation = weak.lock()) generation->Pump();
    });
  };
  auto running = RunningGeneration::Start(service.engine(), std::move(prepared), max_queued_bytes,
                                          std::move(on_ready));
  if (!running.ok()) return exchange->Respond(ErrorResponse(running.status()));
  self->running_ = *std::move(running);
  if (self->running_->prepared().stream.stream) {
    self->stream_ = std::make_unique<OpenAiStream>(self->info_, *self->running_, self->tokenizer_);
  } else {
    self->collector_ = std::make_unique<AnswerCollector>(*self->running_);
  }
  exchange->SetOnDisconnect([self] { self->End(); });  // keeps this alive until the end
}

void HttpGeneration::End() {
  stream_.reset();
  collector_.reset();
  running_.reset();
}

void HttpGeneration::Pump() {
  const auto exchange = exchange_.lock();
  if (!running_ || writing_ || !exchange) return;
  stream_ ? PumpStream(*exchange) : PumpWhole(*exchange);
}

void HttpGeneration::PumpStream(HttpExchange& exchange) {
  const auto keep = shared_from_this();  // the exchange drops this when the last write is done
  RunningGeneration::Batch batch = running_->Take();
  bool last = batch.done;
  std::string events;
  if (const Status status = stream_->Append(std::move(batch), &events); !status.ok()) {
    if (!begun_) {
      exchange.Respond(ErrorResponse(status));
      return End();
    }
    events += OpenAiStream::ErrorEvent(status);
    last = true;
  }
  if (events.empty()) return;
  if (!begun_) {
    begun_ = true;
    exchange.BeginStream([weak = weak_from_this()] {
      const auto generation = weak.lock();
      if (!generation) return;
      generation->writing_ = false;
      generation->Pump();  // what came meanwhile
    });
  }
  writing_ = true;
  exchange.WriteStream(std::move(events), last);
  if (last) End();
}

void HttpGeneration::PumpWhole(HttpExchange& exchange) {
  const auto keep = shared_from_this();
  RunningGeneration::Batch batch = running_->Take();
  const bool done = batch.done;
  if (const Status status = collector_->Add(std::move(batch)); !status.ok()) {
    exchange.Respond(ErrorResponse(status));
    return End();
  }
  if (!done) return;
  const std::vector<Answer> answers = collector_->TakeAnswers();
  const auto prompt_logprobs = collector_->TakePromptLogprobs();
  HttpResponse response;
  response.body = info_.is_chat
                      ? ChatCompletionBody(info_, *running_, answers, prompt_logprobs, tokenizer_)
                      : CompletionBody(info_, *running_, answers, prompt_logprobs, tokenizer_);
  exchange.Respond(std::move(response));
  End();
}

}  // namespace gloam
