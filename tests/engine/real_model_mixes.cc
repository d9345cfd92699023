#include "tests/engine/real_model_mixes.h"

#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "catch2/catch.hpp"
#include "engine/engine.h"
#include "engine/metrics.h"
#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "tests/engine/collecting_sink.h"

namespace gloam {
namespace {

using testing::CollectingSink;

// Lets many engines, one after another, run one loaded model.
class BorrowedModel : public Model {
 public:
  explicit BorrowedModel(Model& model) : model_(model) {}
  const ModelConfig& config() const override { return model_.config(); }
  int64_t weight_bytes() const override { return model_.weight_bytes(); }
  Status Reserve(int max_tokens, int max_logit_rows) override {
    return model_.Reserve(max_tokens, max_logit_rows);
  }
  LogitRows Forward(const ForwardBatch& batch) override { return model_.Forward(batch); }

 private:
  Model& model_;
};

// Text of the model's golden file, or tokens at random where there is none.
std::vector<std::vector<int32_t>> Texts(const std::string& model_name, int vocab_size) {
  std::vector<std::vector<int32_t>> texts;
  std::ifstream file("tests/goldens/logits_" + model_name + ".json");
  if (file) {
    const nlohmann::json goldens = nlohmann::json::parse(file);
    for (const nlohmann::json& prompt : goldens.at("prompts")) {
      texts.push_back(prompt.at("token_ids"));
    }
    return texts;
  }
  std::mt19937 random(5);
  for (int i = 0; i < 17; ++i) {
    std::vector<int32_t>& text = texts.emplace_back(64);
    for (int32_t& token : text) token = static_cast<int32_t>(random() % vocab_size);
  }
  return texts;
}

// Requests of 8 to 44 prompt tokens; some begin alike for one or two blocks.
std::vector<Request> MakeRequests(const std::vector<std::vector<int32_t>>& texts,
                                  std::mt19937& random) {
  const std::vector<int32_t>& shared = texts.at(0);
  std::vector<Request> requests;
  for (int i = 0; i < 16; ++i) {
    const std::vector<int32_t>& text = texts.at(i + 1);
    Request request;
    const int num_shared = i % 2 == 0 ? 0 : kBlockTokens * (1 + i % 4 / 2);
    request.prompt.assign(shared.begin(), shared.begin() + num_shared);
    request.prompt.insert(request.prompt.end(), text.begin(),
                          text.begin() + 8 + static_cast<int>(random() % 5));
    request.sampling.temperature = 0;
    request.sampling.max_tokens = 4 + static_cast<int>(random() % 14);
    request.sampling.ignore_eos = true;
    request.sampling.num_logprobs = 0;
    requests.push_back(std::move(request));
  }
  return requests;
}

bool SameBits(const CollectingSink::Output& a, const CollectingSink::Output& b) {
  if (a.tokens != b.tokens || a.text != b.text || a.logprobs.size() != b.logprobs.size()) {
    return false;
  }
  for (size_t i = 0; i < a.logprobs.size(); ++i) {
    if (std::memcmp(&a.logprobs[i].logprob.logprob, &b.logprobs[i].logprob.logprob,
                    sizeof(float)) != 0) {
      return false;
    }
  }
  return true;
}

}  // namespace

void CheckMixes(const LoadedModel& loaded, Ops& ops, const std::string& model_name,
                DType kv_dtype) {
  MetricsRegistry metrics("test");
  const auto make_engine = [&](const EngineOptions& options) {
    return Engine::Create(options, ops, std::make_unique<BorrowedModel>(*loaded.model),
                          *loaded.tokenizer, metrics)
        .value();
  };

  constexpr uint32_t kSeed = 42;
  CAPTURE(kSeed);
  std::mt19937 random(kSeed);
  const auto draw = [&random](int n) { return static_cast<int>(random() % n); };
  const std::vector<Request> requests =
      MakeRequests(Texts(model_name, loaded.model->config().vocab_size), random);
  EngineOptions options;
  options.kv_cache_dtype = kv_dtype;
  options.max_model_len = 64;
  options.num_kv_blocks = 64;
  options.enable_prefix_caching = false;
  std::vector<std::shared_ptr<CollectingSink>> alone;
  {
    const auto engine = make_engine(options);
    for (const Request& request : requests) {
      alone.push_back(std::make_shared<CollectingSink>());
      REQUIRE(engine->Submit(request, alone.back()).ok());
      alone.back()->Wait();
    }
  }

  int64_t num_preemptions = 0;
  int64_t num_hits = 0;
  int num_answers = 0;
  for (int mix = 0; mix < 200; ++mix) {
    CAPTURE(mix);
    options.num_kv_blocks = 4 + draw(6);
    options.max_num_seqs = 1 + draw(8);
    options.max_num_batched_tokens = options.max_num_seqs + 4 + draw(mix % 2 == 0 ? 12 : 80);
    options.enable_prefix_caching = draw(4) != 0;
    const auto engine = make_engine(options);
    std::vector<std::pair<size_t, std::shared_ptr<CollectingSink>>> running;
    for (int i = 0, n = 3 + draw(6); i < n; ++i) {
      const auto which = static_cast<size_t>(draw(static_cast<int>(requests.size())));
      running.emplace_back(which, std::make_shared<CollectingSink>());
      REQUIRE(engine->Submit(requests[which], running.back().second).ok());
    }
    for (const auto& [which, sink] : running) {
      sink->Wait();
      CAPTURE(which);
      REQUIRE(SameBits(sink->output(), alone[which]->output()));
      ++num_answers;
    }
    num_preemptions += engine->stats().num_preemptions_total;
    num_hits += engine->stats().prefix_cache_hits;
    REQUIRE(engine->stats().num_blocks_in_use == 0);
  }
  fmt::print("{}, {}: {} answers equal; {} pre-emptions, {} tokens found in the cache\n",
             model_name, ops.DeviceName(), num_answers, num_preemptions, num_hits);
  CHECK(num_preemptions > 20);
  CHECK(num_hits > 1000);
}

}  // namespace gloam
