// The real SmolLM2 on the CPU backend: greedy answers, and the log-probabilities of their tokens,
// are the same bits whatever the batch, the chunks, the prefix cache and pre-emption.
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "catch2/catch.hpp"
#include "engine/engine.h"
#include "engine/metrics.h"
#include "kernels/ops.h"
#include "models/model.h"
#include "nlohmann/json.hpp"
#include "tests/engine/collecting_sink.h"
#include "tests/models/catalogue_model.h"

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
  TensorView Forward(const ForwardBatch& batch) override { return model_.Forward(batch); }

 private:
  Model& model_;
};

// Requests of 8 to 44 prompt tokens; some begin alike for one or two blocks.
std::vector<Request> MakeRequests(std::mt19937& random) {
  std::ifstream file("tests/goldens/logits_smollm2-135m-instruct.json");
  const nlohmann::json prompts = nlohmann::json::parse(file).at("prompts");
  const std::vector<int32_t> shared = prompts.at(0).at("token_ids");
  std::vector<Request> requests;
  for (int i = 0; i < 16; ++i) {
    const std::vector<int32_t> text = prompts.at(i + 1).at("token_ids");
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

TEST_CASE("200 random mixes of a real model give the same bits as each request alone") {
  const auto path = CatalogueModelPath("smollm2-135m-instruct");
  if (!std::filesystem::exists(path)) {
    WARN("skipped: " << path << " is not there; `gloam pull smollm2-135m-instruct` fetches it");
    return;
  }
  const std::unique_ptr<Ops> ops = MakeCpuOps({});
  LoadedModel loaded = LoadModel(path, *ops, {}).value();
  MetricsRegistry metrics("smollm2");
  const auto make_engine = [&](const EngineOptions& options) {
    return Engine::Create(options, *ops, std::make_unique<BorrowedModel>(*loaded.model),
                          *loaded.tokenizer, metrics)
        .value();
  };

  constexpr uint32_t kSeed = 42;
  CAPTURE(kSeed);
  std::mt19937 random(kSeed);
  const auto draw = [&random](int n) { return static_cast<int>(random() % n); };
  const std::vector<Request> requests = MakeRequests(random);
  EngineOptions options;
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
  fmt::print("{} answers equal; {} pre-emptions, {} tokens found in the cache\n", num_answers,
             num_preemptions, num_hits);
  CHECK(num_preemptions > 20);
  CHECK(num_hits > 1000);
}

}  // namespace
}  // namespace gloam
