#include "server/grpc/call.h"

#include <utility>

#include "base/check.h"
#include "server/api_error.h"

namespace gloam {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kStallCheckInterval = std::chrono::seconds(1);
constexpr size_t kMaxMessageBytes = 2048;  // of an error, whose default limit is 8 KiB in clients
constexpr size_t kMaxMetadataBytes = 256;

// Metadata may hold printable ASCII only, and a field's path may quote the client.
std::string MetadataValue(const std::string& text) {
  std::string value = text.substr(0, kMaxMetadataBytes);
  for (char& c : value) {
    if (c < 0x20 || c > 0x7e) c = '?';
  }
  return value;
}

// The earlier of the client's deadline and the server's limit; empty when there is neither.
std::optional<Clock::time_point> DeadlineOf(const grpc::CallbackServerContext& context,
                                            std::chrono::milliseconds request_timeout) {
  std::optional<Clock::time_point> result;
  if (request_timeout.count() > 0) result = Clock::now() + request_timeout;
  const auto deadline = context.deadline();
  if (deadline != std::chrono::system_clock::time_point::max()) {
    const auto client = Clock::now() + (deadline - std::chrono::system_clock::now());
    if (!result || client < *result) result = client;
  }
  return result;
}

}  // namespace

grpc::Status ToGrpcStatus(const Status& status, grpc::CallbackServerContext* context) {
  if (status.ok()) return grpc::Status::OK;
  const std::string param = ParamOf(status);
  const std::string code = ErrorCodeOf(status);
  if (!param.empty()) context->AddTrailingMetadata("gloam-error-param", MetadataValue(param));
  if (!code.empty()) context->AddTrailingMetadata("gloam-error-code", MetadataValue(code));
  const auto grpc_code = code == kOverloadedCode ? grpc::StatusCode::UNAVAILABLE
                                                 : static_cast<grpc::StatusCode>(status.code());
  return grpc::Status(grpc_code, MessageOf(status).substr(0, kMaxMessageBytes));
}

GrpcCallLoop::GrpcCallLoop(std::chrono::milliseconds write_timeout)
    : write_timeout_(write_timeout), thread_([this] { Run(); }) {}

GrpcCallLoop::~GrpcCallLoop() {
  {
    std::lock_guard lock(mutex_);
    GLOAM_CHECK(calls_.empty());
    stopping_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

void GrpcCallLoop::Wake(std::weak_ptr<GrpcCall> call) {
  {
    std::lock_guard lock(mutex_);
    woken_.push_back(std::move(call));
  }
  wake_.notify_one();
}

void GrpcCallLoop::Register(const std::shared_ptr<GrpcCall>& call) {
  std::lock_guard lock(mutex_);
  calls_.emplace(call.get(), call);
}

void GrpcCallLoop::Unregister(GrpcCall* call) {
  std::lock_guard lock(mutex_);
  calls_.erase(call);
  if (calls_.empty()) idle_.notify_all();
}

bool GrpcCallLoop::WaitUntilIdle(std::chrono::system_clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  return idle_.wait_until(lock, deadline, [&] { return calls_.empty(); });
}

void GrpcCallLoop::Run() {
  Clock::time_point next_check = Clock::now() + kStallCheckInterval;
  for (;;) {
    std::vector<std::weak_ptr<GrpcCall>> woken;
    std::vector<std::weak_ptr<GrpcCall>> checked;
    {
      std::unique_lock lock(mutex_);
      wake_.wait_until(lock, next_check, [&] { return stopping_ || !woken_.empty(); });
      if (stopping_) return;
      woken.swap(woken_);
      if (Clock::now() >= next_check) {
        for (const auto& [unused, call] : calls_) checked.push_back(call);
        next_check = Clock::now() + kStallCheckInterval;
      }
    }
    for (const auto& weak : woken) {
      if (const auto call = weak.lock()) call->Advance();
    }
    for (const auto& weak : checked) {
      if (const auto call = weak.lock()) call->CancelIfStalled(Clock::now() - write_timeout_);
    }
  }
}

void GrpcCall::Begin(GrpcCallStart start) {
  self_ = shared_from_this();
  loop_.Register(self_);
  Status failure = start.prepared.status();
  std::unique_ptr<RunningGeneration> running;
  std::unique_ptr<AnswerEncoder> encoder;
  if (failure.ok()) {
    const auto deadline = DeadlineOf(context_, start.request_timeout);
    for (Request& request : start.prepared->requests) request.deadline = deadline;
    auto started = RunningGeneration::Start(
        start.service.engine(), *std::move(start.prepared), start.max_queued_bytes,
        [&loop = loop_, weak = weak_from_this()] { loop.Wake(weak); });
    failure = started.status();
    if (started.ok()) {
      running = *std::move(started);
      encoder = start.make_encoder(*running, start.service.tokenizer(), start.service.model_name());
    }
  }
  {
    std::lock_guard lock(mutex_);
    failure_ = std::move(failure);
    running_ = std::move(running);
    encoder_ = std::move(encoder);
    started_ = true;
  }
  Advance();
}

void GrpcCall::HandleCancel() {
  {
    std::lock_guard lock(mutex_);
    if (running_) running_->Cancel();
    if (failure_.ok()) {
      failure_ = MakeStatus(StatusCode::kCancelled, "the client is gone or its deadline has come");
    }
  }
  Advance();
}

void GrpcCall::HandleDone() {
  {
    std::lock_guard lock(mutex_);
    done_ = true;
  }
  loop_.Unregister(this);
  self_.reset();  // may delete this
}

void GrpcCall::CancelIfStalled(Clock::time_point limit) {
  std::lock_guard lock(mutex_);
  if (!done_ && write_began_ < limit) context_.TryCancel();
}

grpc::Status GrpcCall::EndLocked(const Status& status) {
  ended_ = true;
  if (!status.ok() && running_) running_->Cancel();
  return ToGrpcStatus(status, &context_);
}

namespace {

class UnaryCall final : public GrpcCall, public grpc::ServerUnaryReactor {
 public:
  static grpc::ServerUnaryReactor* Start(GrpcCallStart start, grpc::ByteBuffer* response) {
    std::shared_ptr<UnaryCall> call(new UnaryCall(start, response));
    call->Begin(std::move(start));
    return call.get();
  }

  void Advance() override {
    grpc::Status status;
    {
      std::lock_guard lock(mutex_);
      if (!started_ || ended_) return;
      if (failure_.ok() && !CollectLocked()) return;
      status = EndLocked(failure_);
    }
    Finish(status);
  }

  void OnCancel() override { HandleCancel(); }
  void OnDone() override { HandleDone(); }

 private:
  UnaryCall(const GrpcCallStart& start, grpc::ByteBuffer* response)
      : GrpcCall(start.loop, start.context), response_(response) {}

  // True when the answer is complete, or failed.
  bool CollectLocked() {
    if (!collector_) collector_.emplace(*running_);
    RunningGeneration::Batch batch = running_->Take();
    const bool is_complete = batch.done;
    failure_ = collector_->Add(std::move(batch));
    if (!failure_.ok()) return true;
    if (!is_complete) return false;
    *response_ = encoder_->Whole(collector_->TakeAnswers(), collector_->TakePromptLogprobs());
    return true;
  }

  grpc::ByteBuffer* const response_;
  std::optional<AnswerCollector> collector_;
};

class StreamCall final : public GrpcCall, public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  static grpc::ServerWriteReactor<grpc::ByteBuffer>* Start(GrpcCallStart start) {
    std::shared_ptr<StreamCall> call(new StreamCall(start));
    call->Begin(std::move(start));
    return call.get();
  }

  void Advance() override {
    std::optional<grpc::Status> end;
    {
      std::lock_guard lock(mutex_);
      if (!started_ || ended_ || IsWritingLocked()) return;
      bool has_chunk = false;
      bool is_complete = false;
      if (failure_.ok()) has_chunk = EncodeLocked(&is_complete);
      if (!failure_.ok() || (is_complete && !has_chunk)) {
        end = EndLocked(failure_);
      } else if (has_chunk) {
        write_began_ = Clock::now();
      } else {
        return;
      }
    }
    // Outside the lock: nobody else writes or finishes now.
    if (end) {
      Finish(*end);
    } else {
      StartWrite(&chunk_);
    }
  }

  void OnWriteDone(bool ok) override {
    {
      std::lock_guard lock(mutex_);
      write_began_ = Clock::time_point::max();
    }
    if (ok) {
      Advance();
    } else {
      HandleCancel();
    }
  }

  void OnCancel() override { HandleCancel(); }
  void OnDone() override { HandleDone(); }

 private:
  explicit StreamCall(const GrpcCallStart& start) : GrpcCall(start.loop, start.context) {}

  bool IsWritingLocked() const { return write_began_ != Clock::time_point::max(); }

  // Puts all that waits into chunk_; false when there was nothing. Sets failure_.
  bool EncodeLocked(bool* is_complete) {
    const RunningGeneration::Batch batch = running_->Take();
    *is_complete = batch.done;
    for (const OutputDelta& delta : batch.deltas) {
      failure_ = StatusOfEnd(delta);
      if (!failure_.ok()) return false;
    }
    std::optional<grpc::ByteBuffer> chunk = encoder_->Chunk(batch);
    if (chunk) chunk_ = *std::move(chunk);
    return chunk.has_value();
  }

  grpc::ByteBuffer chunk_;  // being written
};

}  // namespace

grpc::ServerUnaryReactor* StartUnaryCall(GrpcCallStart start, grpc::ByteBuffer* response) {
  return UnaryCall::Start(std::move(start), response);
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* StartStreamCall(GrpcCallStart start) {
  return StreamCall::Start(std::move(start));
}

}  // namespace gloam
