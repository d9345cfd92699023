// A model, backend and tokenizer for engine tests. The model stores token ids in the KV cache
// through slot_mapping and predicts from the whole history as it reads it back through the block
// table, so that any mistake with blocks changes the output. It keeps them as two-byte integers,
// which every type of cache has room for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/check.h"
#include "models/model.h"

namespace gloam::testing {

inline uint64_t Hash(uint64_t state, uint64_t value) {
  uint64_t x = state * 0x9e3779b97f4a7c15 + value + 1;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// Sampling as the engine relies on it: greedy takes the largest logit, otherwise the token is a
// function of logits, seed and draw_index. The model's operations are not there.
//
// As a GPU it has memory of its own for staged arrays, which holds what was staged and nothing
// else, and records steps: a step that is repeated runs with the pointers and sizes of its
// recording. The host sees drawn tokens when it finishes a sample, not before.
class FakeOps : public Ops {
 public:
  explicit FakeOps(Device device = Device::kCpu) : device_(device) {}
  Device device() const override { return device_; }
  std::string DeviceName() const override { return "fake"; }
  ActivationDTypes activation_dtypes() const override { return {}; }
  DType QueryDType(DType) const override { return DType::kF32; }
  DeviceMemory memory() const override {
    return {.free_bytes = total_bytes - static_cast<int64_t>(num_bytes_allocated),
            .total_bytes = total_bytes};
  }
  double MeasureReadRate() override { return 0; }
  StatusOr<Buffer> Allocate(size_t bytes) override {
    num_bytes_allocated += bytes;
    return Buffer(std::calloc(std::max<size_t>(bytes, 1), 1), bytes,
                  [](void* data, size_t) { std::free(data); });
  }
  StatusOr<StagedBuffer> AllocateStaged(size_t bytes) override {
    StagedBuffer staged;
    staged.host = Allocate(bytes).value();
    if (device_ == Device::kCpu) return staged;
    staged.device = Allocate(bytes).value();
    std::memset(staged.device.data(), 0xCD, bytes);
    return staged;
  }
  Status Reserve(const StepLimits& limits) override {
    recordings_.clear();
    reserved = limits;
    return OkStatus();
  }
  void Upload(void* device, const void* host, size_t bytes) override {
    std::memcpy(device, host, bytes);
  }
  void Download(void* host, const void* device, size_t bytes) override {
    num_bytes_downloaded += bytes;
    std::memcpy(host, device, bytes);
  }
  void BeginStep() override {}
  void Stage(const StagedBuffer& buffer, size_t offset, size_t bytes) override {
    if (device_ == Device::kCpu) return;
    GLOAM_CHECK(offset + bytes <= buffer.host.bytes());
    std::memcpy(static_cast<std::byte*>(buffer.device.data()) + offset,
                static_cast<const std::byte*>(buffer.host.data()) + offset, bytes);
    ++num_copies_staged;
    num_bytes_staged += bytes;
  }
  // The first run of a key is not recorded, as on a real GPU.
  void Repeat(uint64_t key, const std::function<void()>& step) override {
    if (device_ == Device::kCpu) return step();
    const auto [it, is_new] = recordings_.try_emplace(key);
    if (is_new) return step();
    if (it->second.empty()) {
      recording_ = &it->second;
      step();
      recording_ = nullptr;
    }
    for (const auto& operation : it->second) operation();
    ++num_repeats;
  }
  // Runs `operation` now, or in every repetition of the step that is being recorded.
  void Run(std::function<void()> operation) {
    if (recording_ == nullptr) return operation();
    recording_->push_back(std::move(operation));
  }
  StatusOr<std::unique_ptr<Weight>> LoadWeight(std::span<const RawWeight>) override {
    return Unimplemented("the fake backend has no weights");
  }
  void Embed(const EmbedParams&) override { Unreachable(); }
  void RmsNorm(const RmsNormParams&) override { Unreachable(); }
  void SiluMul(const SiluMulParams&) override { Unreachable(); }
  void GatherRows(const GatherRowsParams&) override { Unreachable(); }
  void Gemm(const GemmParams&) override { Unreachable(); }
  void RopeAppendKv(const RopeKvParams&) override { Unreachable(); }
  void PlanAttention(const AttentionPlanParams&) override {}
  void Attention(const AttentionParams&) override { Unreachable(); }
  void UpdateSidecars(const UpdateSidecarsParams&) override { Unreachable(); }
  void CompressPrompt(const CompressPromptParams&) override { Unreachable(); }
  void SparseAttention(const SparseAttentionParams&) override { Unreachable(); }

  void Sample(const SampleParams& params) override {
    const int64_t num_columns = params.logits.values.shape[1];
    drawn_.assign(params.rows.size(), SampleResult());
    results_ = params.results;
    for (size_t i = 0; i < params.rows.size(); ++i) {
      const SampleRow& row = params.rows[i];
      float* logits = params.logits.values.Rows(static_cast<int64_t>(i), 1).Data<float>();
      for (const auto& [token, bias] : row.logit_bias) logits[token] += bias;
      for (const auto& [token, count] : row.output_counts) {
        logits[token] -= row.presence_penalty + row.frequency_penalty * static_cast<float>(count);
      }
      for (int32_t token : row.banned_tokens) logits[token] = -1e9f;
      auto best = static_cast<int32_t>(std::max_element(logits, logits + num_columns) - logits);
      if (params.logits.tokens != nullptr) {
        GLOAM_CHECK(row.is_greedy());
        best = params.logits.tokens[static_cast<int64_t>(i) * num_columns + best];
      }
      if (row.temperature > 0) {
        uint64_t hash = Hash(Hash(row.seed, row.draw_index), static_cast<uint64_t>(best));
        do {
          hash = Hash(hash, 1);
          best = static_cast<int32_t>(hash % static_cast<uint64_t>(num_columns));
        } while (logits[best] <= -1e9f);
      }
      SampleResult& result = drawn_[i];
      result.token = best;
      if (row.num_logprobs >= 0) FillLogprobs(logits, best, row.num_logprobs, &result);
    }
  }
  void FinishSample() override {
    GLOAM_CHECK(results_.size() == drawn_.size());
    std::copy(drawn_.begin(), drawn_.end(), results_.begin());
    results_ = {};
  }
  void TakeDrawnTokens(const DrawnTokensParams& params) override {
    Run([this, params] {
      for (int i = 0; i < params.num_tokens; ++i) {
        int32_t& token = params.token_ids[i];
        if (token >= 0) continue;
        GLOAM_CHECK(device_ != Device::kCpu);
        token = drawn_.at(static_cast<size_t>(-1 - token)).token;
        ++num_tokens_handed_over;
      }
    });
  }

  void Score(const ScoreParams& params) override {
    GLOAM_CHECK(results_.empty());
    for (size_t i = 0; i < params.tokens.size(); ++i) {
      params.results[i].token = params.tokens[i];
      FillLogprobs(params.logits.Rows(static_cast<int64_t>(i), 1).Data<float>(), params.tokens[i],
                   params.num_logprobs, &params.results[i]);
    }
  }

  int64_t total_bytes = int64_t{1} << 40;
  size_t num_bytes_allocated = 0;
  size_t num_bytes_downloaded = 0;
  size_t num_bytes_staged = 0;
  int num_copies_staged = 0;
  int num_repeats = 0;
  int num_tokens_handed_over = 0;  // from a Sample to the next step without the host
  StepLimits reserved;

 private:
  static void FillLogprobs(const float* logits, int32_t token, int num_top, SampleResult* result) {
    result->logprob = {.token = token, .logprob = logits[token], .rank = 1};
    for (int i = 0; i < num_top; ++i) result->top.push_back({.token = i, .logprob = logits[i]});
  }
  [[noreturn]] static void Unreachable() { std::abort(); }

  const Device device_;
  std::map<uint64_t, std::vector<std::function<void()>>> recordings_;
  std::vector<std::function<void()>>* recording_ = nullptr;  // while a step is being recorded
  std::vector<SampleResult> drawn_;                          // by the last Sample
  std::span<SampleResult> results_;                          // of the last Sample, unless finished
};

class FakeModel : public Model {
 public:
  static constexpr int kVocabSize = 64;
  static constexpr int kNumLayers = 2;

  FakeModel() {
    config_.architecture = "fake";
    config_.num_layers = kNumLayers;
    config_.num_heads = 1;
    config_.num_kv_heads = 1;
    config_.head_dim = 2;  // the token and its position
    config_.vocab_size = kVocabSize;
    config_.max_position = 1024;
  }

  const ModelConfig& config() const override { return config_; }
  int64_t weight_bytes() const override { return 0; }

  Status Reserve(int max_tokens, int max_logit_rows) override {
    max_tokens_ = max_tokens;
    logits_.resize(static_cast<size_t>(max_logit_rows) * kVocabSize);
    candidates_.resize(static_cast<size_t>(max_logit_rows) * kNumCandidates);
    candidate_logits_.resize(candidates_.size());
    return OkStatus();
  }

  LogitRows Forward(const ForwardBatch& batch) override {
    if (ops == nullptr) {
      Run(batch);
    } else {
      ops->Run([this, batch] { Run(batch); });
    }
    if (GivesCandidates(batch)) {
      return {TensorView::Contiguous(candidate_logits_.data(), DType::kF32, Device::kCpu,
                                     {batch.num_logit_rows, kNumCandidates}),
              candidates_.data()};
    }
    return {TensorView::Contiguous(logits_.data(), DType::kF32, Device::kCpu,
                                   {batch.num_logit_rows, kVocabSize})};
  }

  // Called at the start of each pass, on the thread that steps; may throw.
  std::function<void(const ForwardBatch&)> on_forward;
  // The most likely token after a history; without it, one drawn from a hash of the history.
  std::function<int32_t(std::span<const int32_t>)> next_token;
  // Which may record what the model does; null: nothing is recorded.
  FakeOps* ops = nullptr;

 private:
  static constexpr int kNumCandidates = 3;

  // As a GPU does.
  bool GivesCandidates(const ForwardBatch& batch) const {
    return batch.is_greedy && ops != nullptr && ops->device() == Device::kCuda;
  }

  // The most likely token between another one and none.
  void FillCandidates(int row) {
    const float* logits = logits_.data() + static_cast<size_t>(row) * kVocabSize;
    const auto best = static_cast<int32_t>(std::max_element(logits, logits + kVocabSize) - logits);
    const int32_t other = (best + kVocabSize / 2) % kVocabSize;
    int32_t* tokens = candidates_.data() + static_cast<size_t>(row) * kNumCandidates;
    float* values = candidate_logits_.data() + static_cast<size_t>(row) * kNumCandidates;
    tokens[0] = other;
    values[0] = logits[other];
    tokens[1] = best;
    values[1] = logits[best];
    tokens[2] = std::numeric_limits<int32_t>::max();
    values[2] = -std::numeric_limits<float>::infinity();
  }

  void Run(const ForwardBatch& batch) {
    if (on_forward) on_forward(batch);
    const SequenceBatch& seqs = batch.seqs;
    GLOAM_CHECK(seqs.num_tokens >= 1 && seqs.num_tokens <= max_tokens_);
    GLOAM_CHECK(seqs.cu_seqlens[0] == 0 && seqs.cu_seqlens[seqs.num_seqs] == seqs.num_tokens);
    for (int i = 0; i < seqs.num_tokens; ++i) {
      if (seqs.slot_mapping[i] < 0) continue;  // padding
      for (const KvLayerView& layer : batch.kv) {
        int16_t* keys = layer.Keys<int16_t>(seqs.slot_mapping[i] / kBlockTokens, 0) +
                        seqs.slot_mapping[i] % kBlockTokens * 2;
        keys[0] = static_cast<int16_t>(batch.token_ids[i]);
        keys[1] = static_cast<int16_t>(seqs.positions[i]);
      }
    }
    for (const PromptVote& vote : batch.votes) Vote(batch, vote);
    for (const SparseRow& row : batch.sparse.rows) MarkSparse(batch, row);
    CheckSparse(batch);
    for (int row = 0; row < batch.num_logit_rows; ++row) {
      float* logits = logits_.data() + static_cast<size_t>(row) * kVocabSize;
      if (seqs.slot_mapping[batch.logit_rows[row]] < 0) {
        CheckPadding(batch, batch.logit_rows[row]);
        std::fill_n(logits, kVocabSize, std::numeric_limits<float>::quiet_NaN());
      } else {
        FillLogits(ReadHistory(batch, batch.logit_rows[row]), logits);
      }
      if (GivesCandidates(batch)) FillCandidates(row);
    }
  }

  // Only decoding steps are padded, behind their sequences.
  static void CheckPadding(const ForwardBatch& batch, int token) {
    GLOAM_CHECK(batch.seqs.decode_only() && token > 0);
    GLOAM_CHECK(batch.seqs.cu_seqlens[token] == token && batch.seqs.context_lens[token] == 0);
    GLOAM_CHECK(batch.token_ids[token] == 0 && batch.seqs.positions[token] == 0);
  }

  // What a sparse token leaves in the cache tells its policy, by recent_tokens, and what the
  // compressor saw: so whoever reads another's sparse tokens gets other logits.
  void MarkSparse(const ForwardBatch& batch, const SparseRow& row) {
    const int64_t slot = batch.seqs.slot_mapping[row.token];
    int mark = row.policy->recent_tokens;
    if (row.compressed != nullptr) {
      GLOAM_CHECK(row.compressed->complete);
      mark += row.compressed->masks[0] % 7;
    }
    for (const KvLayerView& layer : batch.kv) {
      layer.Keys<int16_t>(slot / kBlockTokens, 0)[slot % kBlockTokens * 2] +=
          static_cast<int16_t>(kVocabSize * mark);
    }
    batch.sparse_stats[batch.sparse.rows.size() + (&row - batch.sparse.rows.data())] = {
        .context = batch.seqs.positions[row.token] + 1};
  }

  void Vote(const ForwardBatch& batch, const PromptVote& vote) {
    const int last = vote.first_window_token + vote.config->window_size - 1;
    GLOAM_CHECK(vote.first_window_token >= batch.seqs.cu_seqlens[vote.seq]);
    GLOAM_CHECK(last < batch.seqs.cu_seqlens[vote.seq + 1]);
    uint64_t hash = 0;
    for (int32_t token : ReadHistory(batch, last)) hash = Hash(hash, token);
    vote.compressed->masks[0] = static_cast<TokenMask>(hash);
  }

  // Sequences are wholly sparse or wholly dense.
  static void CheckSparse(const ForwardBatch& batch) {
    int num_rows = 0;
    for (int seq = 0; seq < batch.seqs.num_seqs; ++seq) {
      if (!batch.sparse.seqs[seq]) continue;
      for (int i = batch.seqs.cu_seqlens[seq]; i < batch.seqs.cu_seqlens[seq + 1]; ++i) {
        GLOAM_CHECK(batch.sparse.rows[num_rows].token == i);
        GLOAM_CHECK(batch.sparse.rows[num_rows++].seq == seq);
      }
    }
    GLOAM_CHECK(num_rows == static_cast<int>(batch.sparse.rows.size()));
  }

  // The tokens up to and including `token`, an index into the batch.
  const std::vector<int32_t>& ReadHistory(const ForwardBatch& batch, int token) {
    const SequenceBatch& seqs = batch.seqs;
    int seq = 0;
    while (seqs.cu_seqlens[seq + 1] <= token) ++seq;
    const int num_after = seqs.cu_seqlens[seq + 1] - 1 - token;
    GLOAM_CHECK(seqs.positions[token] == seqs.context_lens[seq] - 1 - num_after);
    const int32_t* table = seqs.block_tables + int64_t{seq} * seqs.max_blocks_per_seq;
    history_.clear();
    for (int p = 0; p <= seqs.positions[token]; ++p) {
      const int layer = p % kNumLayers;
      const int16_t* keys =
          batch.kv[layer].Keys<int16_t>(table[p / kBlockTokens], 0) + p % kBlockTokens * 2;
      GLOAM_CHECK(keys[1] == p);
      history_.push_back(keys[0]);
    }
    return history_;
  }

  void FillLogits(const std::vector<int32_t>& history, float* logits) const {
    uint64_t hash = 0;
    for (int32_t token : history) hash = Hash(hash, static_cast<uint64_t>(token));
    for (int i = 0; i < kVocabSize; ++i) {
      logits[i] = static_cast<float>(Hash(hash, static_cast<uint64_t>(i)) >> 44) * 1e-6f;
    }
    if (next_token) logits[next_token(history)] = 100.0f;
  }

  ModelConfig config_;
  int max_tokens_ = 0;
  std::vector<float> logits_;
  std::vector<int32_t> candidates_;  // [rows][kNumCandidates], and their logits
  std::vector<float> candidate_logits_;
  std::vector<int32_t> history_;
};

// Token 0 ends an answer; 1 to 26 are letters, 27 a space, 28 and 29 the two bytes of "é", and the
// rest "<i>".
class FakeTokenizer : public Tokenizer {
 public:
  static constexpr int32_t kEos = 0;

  FakeTokenizer() {
    for (int i = 0; i < FakeModel::kVocabSize; ++i) {
      if (i == kEos) {
        pieces_.push_back("<eos>");
      } else if (i <= 26) {
        pieces_.push_back(std::string(1, static_cast<char>('a' + i - 1)));
      } else if (i == 27) {
        pieces_.push_back(" ");
      } else if (i <= 29) {
        pieces_.push_back(i == 28 ? "\xC3" : "\xA9");
      } else {
        pieces_.push_back("<" + std::to_string(i) + ">");
      }
    }
  }

  int vocab_size() const override { return FakeModel::kVocabSize; }
  StatusOr<std::vector<int32_t>> Encode(std::span<const TextPart> parts, bool) const override {
    std::vector<int32_t> ids;
    for (const TextPart& part : parts) {
      for (char c : part.text) ids.push_back(c == ' ' ? 27 : c - 'a' + 1);
    }
    return ids;
  }
  std::string_view TokenBytes(int32_t id, bool skip_special) const override {
    GLOAM_CHECK(id >= 0 && id < vocab_size());
    return skip_special && IsSpecial(id) ? std::string_view() : pieces_[id];
  }
  bool strips_leading_space() const override { return false; }
  bool IsSpecial(int32_t id) const override { return id == kEos; }
  std::optional<int32_t> FindToken(std::string_view) const override { return std::nullopt; }
  std::optional<int32_t> bos_id() const override { return std::nullopt; }
  std::span<const int32_t> eos_ids() const override { return eos_ids_; }

 private:
  std::vector<std::string> pieces_;
  std::vector<int32_t> eos_ids_ = {kEos};
};

// Token ids of a text of letters and spaces.
inline std::vector<int32_t> Tokens(std::string_view text) {
  return FakeTokenizer().Encode(std::vector<TextPart>{{.text = text}}, false).value();
}

}  // namespace gloam::testing
