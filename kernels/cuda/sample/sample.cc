// Sampling's host part: packs what the rows ask for into one pinned buffer, which goes to the GPU
// in one copy, launches the kernels that the rows need, and reads the results, which the kernels
// write to pinned memory, when the event behind the kernels has come. Engine thread only.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/sample/kernels.h"
#include "kernels/philox.h"

namespace gloam::cuda {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// What Reserve makes room for beside every row's mask: entries of all rows' lists together, and
// likely tokens per row (what OpenAI's API allows). A call that needs more allocates, once.
constexpr size_t kReservedEntries = 1 << 18;
constexpr size_t kReservedTop = 20;

// Memory that only grows: to `bytes` at least, and at least twice what was there.
void Grow(Buffer& buffer, size_t bytes, StatusOr<Buffer> (*allocate)(size_t)) {
  if (bytes <= buffer.bytes()) return;
  const size_t wanted = std::max(bytes, 2 * buffer.bytes());
  buffer = Buffer();
  StatusOr<Buffer> grown = allocate(wanted);
  if (!grown.ok()) {
    throw CudaError(cudaErrorMemoryAllocation, __FILE__, __LINE__, "memory for sampling");
  }
  buffer = std::move(grown).value();
}

// What one call needs room for.
struct CallSize {
  size_t num_rows = 0;
  size_t vocab_size = 0;
  size_t num_entries = 0;  // of all lists
  size_t num_values = 0;   // biases and counts
  size_t num_masks = 0;
  size_t num_top = 0;

  size_t num_chunks() const { return (vocab_size + kSampleChunk - 1) / kSampleChunk; }
  size_t mask_words() const { return (vocab_size + 31) / 32; }
  // Offsets in the staged buffer, in bytes: tasks come first.
  size_t entries_at() const { return num_rows * sizeof(SampleTask); }
  size_t values_at() const { return entries_at() + num_entries * sizeof(int32_t); }
  size_t masks_at() const { return values_at() + num_values * sizeof(uint32_t); }
  size_t staged_bytes() const { return masks_at() + num_masks * mask_words() * sizeof(uint32_t); }
};

void CheckTokens(std::span<const int32_t> tokens, int64_t vocab_size) {
  for (const int32_t token : tokens) GLOAM_CHECK(token >= 0 && token < vocab_size);
}

int NumLogprobs(int wanted, int64_t vocab_size) {
  return static_cast<int>(std::min<int64_t>(wanted, vocab_size));
}

class SampleBackendImpl final : public SampleBackend {
 public:
  explicit SampleBackendImpl(const DeviceContext& context) : context_(context) {}

  Status Reserve(const StepLimits& limits) override;
  void Sample(const SampleParams& params) override;
  void FinishSample() override;
  void Score(const ScoreParams& params) override;
  const int32_t* device_tokens() const override {
    return static_cast<const int32_t*>(tokens_.data());
  }

 private:
  void MakeRoom(const CallSize& size);
  SampleArgs ArgsOf(const TensorView& logits, const CallSize& size) const;
  void Pack(const SampleParams& params, const CallSize& size);
  void CopyToDevice(size_t bytes) const;
  void LaunchLogprobPasses(const SampleArgs& args, bool any_changed) const;
  void ReadLogprobs(const SampleTask& task, const SampleOutcome& outcome, SampleResult& result);
  void LaunchDone() const { GLOAM_CUDA_CHECK(cudaEventRecord(done_.get(), context_.stream)); }
  void WaitUntilDone() const { GLOAM_CUDA_CHECK(cudaEventSynchronize(done_.get())); }

  template <typename T>
  T* Staged(size_t offset_bytes) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(staged_host_.data()) + offset_bytes);
  }

  const DeviceContext context_;
  Buffer chunk_max_, chunk_mass_, model_mass_, best_, num_done_, tokens_,
      saved_;                                    // device: see SampleArgs
  Buffer staged_host_, staged_;                  // pinned, and its copy
  Buffer outcomes_, top_;                        // pinned; kernels write them
  std::vector<std::pair<int32_t, float>> bias_;  // scratch
  const Event done_;                             // the last call's kernels
  std::span<SampleResult> open_;                 // of a Sample that is not finished
  bool open_has_tasks_ = false;
};

void SampleBackendImpl::MakeRoom(const CallSize& size) {
  const size_t num_chunks = size.num_rows * size.num_chunks();
  Grow(chunk_max_, num_chunks * sizeof(uint32_t), AllocateDevice);
  Grow(chunk_mass_, num_chunks * sizeof(uint64_t), AllocateDevice);
  Grow(model_mass_, num_chunks * sizeof(uint64_t), AllocateDevice);
  Grow(best_, size.num_rows * sizeof(uint64_t), AllocateDevice);
  Grow(num_done_, size.num_rows * sizeof(uint32_t), AllocateDevice);
  Grow(tokens_, size.num_rows * sizeof(int32_t), AllocateDevice);
  Grow(saved_, size.num_entries * sizeof(float), AllocateDevice);
  Grow(staged_host_, size.staged_bytes(), AllocatePinned);
  Grow(staged_, size.staged_bytes(), AllocateDevice);
  Grow(outcomes_, size.num_rows * sizeof(SampleOutcome), AllocatePinned);
  Grow(top_, size.num_top * sizeof(SampleTop), AllocatePinned);
}

Status SampleBackendImpl::Reserve(const StepLimits& limits) {
  const size_t num_rows = static_cast<size_t>(std::max(limits.max_logit_rows, 1));
  try {
    MakeRoom({.num_rows = num_rows,
              .vocab_size = static_cast<size_t>(std::max(limits.vocab_size, 1)),
              .num_entries = kReservedEntries,
              .num_values = kReservedEntries,
              .num_masks = num_rows,
              .num_top = num_rows * kReservedTop});
  } catch (const CudaError& error) {
    if (error.error() != cudaErrorMemoryAllocation) throw;
    return ResourceExhausted("no memory to sample {} rows of {} logits", num_rows,
                             limits.vocab_size);
  }
  return OkStatus();
}

SampleArgs SampleBackendImpl::ArgsOf(const TensorView& logits, const CallSize& size) const {
  const std::byte* staged = static_cast<const std::byte*>(staged_.data());
  SampleArgs args = {};
  args.logits = logits.Data<float>();
  args.row_stride = logits.strides[0];
  args.vocab_size = static_cast<int32_t>(logits.shape[1]);
  args.num_rows = static_cast<int32_t>(logits.shape[0]);
  args.num_chunks = static_cast<int32_t>(size.num_chunks());
  args.by_four = reinterpret_cast<uintptr_t>(logits.data) % 16 == 0 && logits.strides[0] % 4 == 0;
  args.tasks = reinterpret_cast<const SampleTask*>(staged);
  args.list_tokens = reinterpret_cast<const int32_t*>(staged + size.entries_at());
  args.list_values = reinterpret_cast<const uint32_t*>(staged + size.values_at());
  args.masks = reinterpret_cast<const uint32_t*>(staged + size.masks_at());
  args.saved = static_cast<float*>(saved_.data());
  args.chunk_max = static_cast<uint32_t*>(chunk_max_.data());
  args.chunk_mass = static_cast<uint64_t*>(chunk_mass_.data());
  args.model_mass = static_cast<uint64_t*>(model_mass_.data());
  args.best = static_cast<uint64_t*>(best_.data());
  args.num_done = static_cast<uint32_t*>(num_done_.data());
  args.tokens = static_cast<int32_t*>(tokens_.data());
  args.outcomes = static_cast<SampleOutcome*>(outcomes_.data());
  args.top = static_cast<SampleTop*>(top_.data());
  return args;
}

void SampleBackendImpl::CopyToDevice(size_t bytes) const {
  CopyFromPinned(staged_host_.data(), staged_.data(), bytes, context_);
}

CallSize SizeOf(const SampleParams& params) {
  CallSize size = {.num_rows = params.rows.size(),
                   .vocab_size = static_cast<size_t>(params.logits.values.shape[1])};
  for (const SampleRow& row : params.rows) {
    const size_t num_counts = row.is_penalised() ? row.output_counts.size() : 0;
    const size_t num_prompt = row.repetition_penalty != 1.0f ? row.prompt_tokens.size() : 0;
    size.num_entries += row.banned_tokens.size() + row.logit_bias.size() + num_prompt + num_counts;
    size.num_values += row.logit_bias.size() + num_counts;
    size.num_masks += row.allowed != nullptr ? 1 : 0;
    size.num_top += std::max(0, NumLogprobs(row.num_logprobs, params.logits.values.shape[1]));
  }
  return size;
}

SampleTask TaskOf(const SampleRow& row, int64_t vocab_size) {
  SampleTask task = {};
  task.greedy = !(row.temperature > 0);
  task.uniform = cpu::UniformDraw(row.seed, row.draw_index);
  task.inverse_temperature =
      task.greedy ? 1.0f : std::min(1.0f / row.temperature, std::numeric_limits<float>::max());
  task.top_p = row.top_p;
  task.min_p = row.min_p;
  task.top_k = row.top_k;
  task.repetition_penalty = row.repetition_penalty;
  task.frequency_penalty = row.frequency_penalty;
  task.presence_penalty = row.presence_penalty;
  task.num_logprobs = NumLogprobs(row.num_logprobs, vocab_size);
  const bool by_count = row.top_k > 0 && row.top_k < vocab_size;
  task.draws_from_total = !task.greedy && !by_count && (row.top_p < 1.0f || !(row.min_p > 0));
  return task;
}

// Writes tasks, lists and masks to the staged buffer.
void SampleBackendImpl::Pack(const SampleParams& params, const CallSize& size) {
  const int64_t vocab_size = params.logits.values.shape[1];
  SampleTask* tasks = Staged<SampleTask>(0);
  int32_t* const entries = Staged<int32_t>(size.entries_at());
  uint32_t* const values = Staged<uint32_t>(size.values_at());
  uint32_t* const masks = Staged<uint32_t>(size.masks_at());
  int64_t entry = 0, value = 0, mask = 0, top = 0;
  for (const SampleRow& row : params.rows) {
    SampleTask task = TaskOf(row, vocab_size);
    task.first_entry = entry;
    task.first_value = value;
    task.first_top = top;
    task.mask = row.allowed != nullptr ? mask : -1;
    top += std::max(0, task.num_logprobs);

    task.num_banned = static_cast<int32_t>(row.banned_tokens.size());
    std::copy(row.banned_tokens.begin(), row.banned_tokens.end(), entries + entry);
    entry += task.num_banned;

    task.num_bias = static_cast<int32_t>(row.logit_bias.size());
    bias_.assign(row.logit_bias.begin(), row.logit_bias.end());
    std::stable_sort(bias_.begin(), bias_.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    for (const auto& [token, bias] : bias_) {
      entries[entry++] = token;
      values[value++] = std::bit_cast<uint32_t>(bias);
    }
    if (row.repetition_penalty != 1.0f) {
      task.num_prompt = static_cast<int32_t>(row.prompt_tokens.size());
      std::copy(row.prompt_tokens.begin(), row.prompt_tokens.end(), entries + entry);
      entry += task.num_prompt;
    }
    if (row.is_penalised()) {
      task.num_counts = static_cast<int32_t>(row.output_counts.size());
      for (const auto& [token, count] : row.output_counts) {
        entries[entry++] = token;
        values[value++] = static_cast<uint32_t>(count);
      }
    }
    if (row.allowed != nullptr) {
      std::memcpy(masks + mask, row.allowed, size.mask_words() * sizeof(uint32_t));
      mask += static_cast<int64_t>(size.mask_words());
    }
    task.changed = task.mask >= 0 || entry > task.first_entry;
    *tasks++ = task;
  }
  CheckTokens({entries, static_cast<size_t>(entry)}, vocab_size);
}

// The model's probabilities; changed rows have their own logits back.
void SampleBackendImpl::LaunchLogprobPasses(const SampleArgs& args, bool any_changed) const {
  if (any_changed) LaunchScan(args, SamplePass::kLogprobs, context_.num_sms, context_.stream);
  LaunchLogprobs(args, context_.stream);
}

void SampleBackendImpl::ReadLogprobs(const SampleTask& task, const SampleOutcome& outcome,
                                     SampleResult& result) {
  const double log_sum = std::log(static_cast<double>(outcome.exp_mass) * kWeightUnit);
  const auto logprob_of = [&](float logit) {
    if (logit == kMinusInfinity) return kMinusInfinity;
    return static_cast<float>(double{logit} - double{outcome.max} - log_sum);
  };
  result.logprob = {outcome.token, logprob_of(outcome.logit), outcome.rank};
  SampleTop* const top = static_cast<SampleTop*>(top_.data()) + task.first_top;
  std::sort(top, top + task.num_logprobs, [](const SampleTop& a, const SampleTop& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
  });
  int rank = 0;
  for (int i = 0; i < task.num_logprobs; ++i) {
    if (i == 0 || top[i].logit != top[i - 1].logit) rank = i + 1;
    result.top.push_back({top[i].token, logprob_of(top[i].logit), rank});
  }
}

void CheckLogits(const TensorView& logits, size_t num_rows, size_t num_results) {
  GLOAM_CHECK(logits.rank == 2 && logits.dtype == DType::kF32 && logits.shape[1] > 0);
  GLOAM_CHECK(logits.shape[0] == static_cast<int64_t>(num_rows) && num_results == num_rows);
}

void SampleBackendImpl::Sample(const SampleParams& params) {
  CheckLogits(params.logits.values, params.rows.size(), params.results.size());
  if (!open_.empty()) WaitUntilDone();  // nobody wants its results, but its buffers are in use
  open_ = params.results;
  open_has_tasks_ = false;
  if (params.rows.empty()) return;
  const CallSize size = SizeOf(params);
  MakeRoom(size);
  SampleArgs args = ArgsOf(params.logits.values, size);
  const auto any = [&](const auto& condition) {
    return std::any_of(params.rows.begin(), params.rows.end(), condition);
  };
  if (any([](const SampleRow& row) { return !row.is_greedy(); })) {
    GLOAM_CHECK(params.logits.tokens == nullptr);
    open_has_tasks_ = true;
    Pack(params, size);
    CopyToDevice(size.staged_bytes());
    if (size.num_entries > 0) {
      const bool any_repetition =
          any([](const SampleRow& row) { return row.repetition_penalty != 1.0f; });
      LaunchPenalties(args, any_repetition, context_.stream);
    }
    LaunchScan(args, SamplePass::kDraw, context_.num_sms, context_.stream);
    LaunchDraw(args, context_.stream);
    if (any([](const SampleRow& row) { return row.num_logprobs >= 0; })) {
      const std::span<const SampleTask> tasks(Staged<SampleTask>(0), size.num_rows);
      LaunchLogprobPasses(args, std::any_of(tasks.begin(), tasks.end(), [](const SampleTask& task) {
                            return task.changed && task.num_logprobs >= 0;
                          }));
    }
  } else {
    args.candidates = params.logits.tokens;
    LaunchGreedy(args, context_.num_sms, context_.stream);
  }
  LaunchDone();
}

void SampleBackendImpl::FinishSample() {
  if (open_.empty()) return;
  WaitUntilDone();
  const auto* const outcomes = static_cast<const SampleOutcome*>(outcomes_.data());
  const SampleTask* const tasks = open_has_tasks_ ? Staged<SampleTask>(0) : nullptr;
  for (size_t i = 0; i < open_.size(); ++i) {
    SampleResult& result = open_[i];
    result.token = outcomes[i].token;
    result.logprob = {};
    result.top.clear();
    if (tasks != nullptr && tasks[i].num_logprobs >= 0) ReadLogprobs(tasks[i], outcomes[i], result);
  }
  open_ = {};
}

void SampleBackendImpl::Score(const ScoreParams& params) {
  CheckLogits(params.logits, params.tokens.size(), params.results.size());
  if (params.tokens.empty()) return;
  if (!open_.empty()) WaitUntilDone();
  open_ = {};
  const int64_t vocab_size = params.logits.shape[1];
  const int num_logprobs = std::max(0, NumLogprobs(params.num_logprobs, vocab_size));
  CheckTokens(params.tokens, vocab_size);
  const CallSize size = {.num_rows = params.tokens.size(),
                         .vocab_size = static_cast<size_t>(vocab_size),
                         .num_entries = params.tokens.size(),
                         .num_top = params.tokens.size() * static_cast<size_t>(num_logprobs)};
  MakeRoom(size);
  SampleTask* const tasks = Staged<SampleTask>(0);
  for (size_t i = 0; i < size.num_rows; ++i) {
    tasks[i] = {};
    tasks[i].num_logprobs = num_logprobs;
    tasks[i].changed = true;  // no draw has scanned it
    tasks[i].first_top = static_cast<int64_t>(i) * num_logprobs;
  }
  std::copy(params.tokens.begin(), params.tokens.end(), Staged<int32_t>(size.entries_at()));
  CopyToDevice(size.staged_bytes());
  SampleArgs args = ArgsOf(params.logits, size);
  args.tokens =
      reinterpret_cast<int32_t*>(static_cast<std::byte*>(staged_.data()) + size.entries_at());
  LaunchLogprobPasses(args, true);
  LaunchDone();
  WaitUntilDone();
  for (size_t i = 0; i < size.num_rows; ++i) {
    SampleResult& result = params.results[i];
    result.token = params.tokens[i];
    result.top.clear();
    ReadLogprobs(tasks[i], args.outcomes[i], result);
  }
}

}  // namespace

std::unique_ptr<SampleBackend> MakeSampleBackend(const DeviceContext& context) {
  return std::make_unique<SampleBackendImpl>(context);
}

}  // namespace gloam::cuda
