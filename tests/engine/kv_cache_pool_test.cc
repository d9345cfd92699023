#include "engine/kv_cache_pool.h"

#include "catch2/catch.hpp"
#include "fmt/format.h"
#include "tests/engine/fake_model.h"

namespace gloam {
namespace {

// Two layers, one head of two channels: a block takes 2 x 2 x 16 x 2 elements.
constexpr int64_t kBytesPerBlock = 2 * 2 * 16 * 2 * 2;

std::string ErrorOf(const EngineOptions& options, StatusCode code) {
  const StatusOr<KvPlan> plan = PlanKvCache(options, testing::FakeModel().config());
  REQUIRE_FALSE(plan.ok());
  CHECK(plan.status().code() == code);
  return MessageOf(plan.status());
}

TEST_CASE("the number of blocks comes from the flag or from the memory") {
  const testing::FakeModel model;
  EngineOptions options;
  options.kv_cache_bytes = 100 * kBytesPerBlock + 1;
  KvPlan plan = PlanKvCache(options, model.config()).value();
  CHECK(plan.bytes_per_block == kBytesPerBlock);
  CHECK(plan.num_blocks == 100);
  CHECK(plan.max_model_len == 1024);
  options.num_kv_blocks = 65;
  options.kv_cache_dtype = DType::kF32;
  plan = PlanKvCache(options, model.config()).value();
  CHECK(plan.num_blocks == 65);
  CHECK(plan.bytes_per_block == 2 * kBytesPerBlock);
}

TEST_CASE("a context that nobody asked for is lowered; one that was is refused") {
  EngineOptions options;
  options.num_kv_blocks = 10;
  CHECK(PlanKvCache(options, testing::FakeModel().config())->max_model_len == 160);
  options.max_model_len = 160;
  CHECK(PlanKvCache(options, testing::FakeModel().config())->max_model_len == 160);
  options.max_model_len = 161;
  const std::string message = ErrorOf(options, StatusCode::kResourceExhausted);
  CHECK(message.find("--max-model-len to 160") != std::string::npos);
  CHECK(message.find("--kv-cache-memory to 2816") != std::string::npos);
}

TEST_CASE("impossible options are named") {
  EngineOptions options;
  options.kv_cache_bytes = kBytesPerBlock - 1;
  CHECK(ErrorOf(options, StatusCode::kResourceExhausted).find("256 bytes") != std::string::npos);
  options = {};
  options.max_model_len = 1025;
  CHECK(ErrorOf(options, StatusCode::kInvalidArgument).find("[1, 1024]") != std::string::npos);
  options = {};
  options.kv_cache_dtype = DType::kI32;
  CHECK(ErrorOf(options, StatusCode::kInvalidArgument).find("--kv-cache-dtype") !=
        std::string::npos);
}

// 80 GB, of which 2 are in use by others; 16 GB of weights, 1 GB of workspaces.
MemoryPlan EightyGb(double utilization = 0.9) {
  return PlanMemory(utilization, /*weight_bytes=*/16'000'000'000,
                    {.free_bytes = 62'000'000'000, .total_bytes = 80'000'000'000},
                    {.free_bytes = 61'000'000'000, .total_bytes = 80'000'000'000});
}

// Llama 3.1 8B: 32 layers, 8 KV heads of 128, 131072 positions: 128 KiB a token in bf16.
ModelConfig Llama8B() {
  ModelConfig config;
  config.num_layers = 32;
  config.num_kv_heads = 8;
  config.head_dim = 128;
  config.max_position = 131072;
  return config;
}

TEST_CASE("a GPU's memory: the cache gets what utilization leaves") {
  MemoryPlan memory = EightyGb();
  CHECK(memory.other_bytes == 2'000'000'000);
  CHECK(memory.workspace_bytes == 1'000'000'000);
  CHECK(memory.usable_bytes() == 72'000'000'000);
  CHECK(memory.room_bytes() == 53'000'000'000 - memory.graph_bytes);
  EngineOptions options;
  options.kv_cache_bytes = 0;
  const KvPlan plan = PlanKvCache(options, Llama8B(), &memory).value();
  CHECK(plan.bytes_per_block == 16 * 131072);
  CHECK(plan.num_blocks == memory.room_bytes() / plan.bytes_per_block);
  CHECK(plan.max_model_len == 131072);

  memory.kv_bytes = plan.num_blocks * plan.bytes_per_block;
  const std::string table = memory.Table(/*indent=*/4);
  CHECK(table.find("    weights            16.00 GB\n") != std::string::npos);
  CHECK(table.find("    workspaces          1.00 GB\n") != std::string::npos);
  CHECK(table.find("    sidecars            0.00 GB\n") != std::string::npos);
  CHECK(table.find("    other uses          2.00 GB\n") != std::string::npos);
  CHECK(table.find("    in all             72.00 GB of 80.00, 90 % may be used\n") !=
        std::string::npos);

  options.kv_cache_dtype = DType::kF8E4M3;
  const KvPlan fp8 = PlanKvCache(options, Llama8B(), &memory).value();
  CHECK(2 * fp8.bytes_per_block == plan.bytes_per_block);
  CHECK(fp8.num_blocks == memory.room_bytes() / fp8.bytes_per_block);
  options.kv_cache_dtype = DType::kBF16;

  // What was asked for in bytes or blocks is given.
  options.kv_cache_bytes = 10 * plan.bytes_per_block;
  options.max_model_len = 160;
  CHECK(PlanKvCache(options, Llama8B(), &memory)->num_blocks == 10);
}

TEST_CASE("a GPU that is too small says what would fit") {
  const auto error_of = [](const EngineOptions& options, const MemoryPlan& memory) {
    const StatusOr<KvPlan> plan = PlanKvCache(options, Llama8B(), &memory);
    REQUIRE_FALSE(plan.ok());
    CHECK(plan.status().code() == StatusCode::kResourceExhausted);
    return MessageOf(plan.status());
  };
  EngineOptions options;
  options.kv_cache_bytes = 0;
  // Weights, workspaces and others take 19.27 GB of 80: 24.09 %.
  std::string message = error_of(options, EightyGb(0.24));
  INFO(message);
  CHECK(message.find("--gpu-memory-utilization 0.24 allows 19.20 GB") != std::string::npos);
  CHECK(message.find("weights take 16.00 GB") != std::string::npos);
  CHECK(message.find("raise --gpu-memory-utilization to 0.25") != std::string::npos);

  // 131072 tokens take 17.18 GB, with the rest 36.45: 45.6 %.
  options.max_model_len = 131072;
  message = error_of(options, EightyGb(0.4));
  CHECK(message.find("--max-model-len 131072 needs 16384.0 MiB") != std::string::npos);
  CHECK(message.find("raise --gpu-memory-utilization to 0.46") != std::string::npos);
  const int fits = static_cast<int>(EightyGb(0.4).room_bytes() / (16 * 131072)) * kBlockTokens;
  CHECK(message.find(fmt::format("lower --max-model-len to {}", fits)) != std::string::npos);
  options.max_model_len = fits;
  const MemoryPlan memory = EightyGb(0.4);
  CHECK(PlanKvCache(options, Llama8B(), &memory)->max_model_len == fits);

  // Nothing below 1 would do.
  MemoryPlan full = EightyGb(0.9);
  full.weight_bytes = 79'000'000'000;
  options.max_model_len = 0;
  message = error_of(options, full);
  INFO(message);
  CHECK(message.find("take smaller weights") != std::string::npos);
  CHECK(message.find("raise") == std::string::npos);
}

TEST_CASE("the cache's types by device") {
  CHECK(CheckKvDType(DType::kF32, Device::kCpu).ok());
  CHECK(CheckKvDType(DType::kBF16, Device::kCuda).ok());
  CHECK(CheckKvDType(DType::kF8E4M3, Device::kCuda).ok());
  CHECK_THAT(MessageOf(CheckKvDType(DType::kF32, Device::kCuda)),
             Catch::Matchers::Contains("--kv-cache-dtype"));
  CHECK_THAT(MessageOf(CheckKvDType(DType::kF8E4M3, Device::kCpu)),
             Catch::Matchers::Contains("fp8 needs a GPU"));
}

TEST_CASE("every layer has memory of its own") {
  testing::FakeOps ops;
  EngineOptions options;
  options.num_kv_blocks = 70;
  const KvPlan plan = PlanKvCache(options, testing::FakeModel().config()).value();
  const KvCachePool pool = KvCachePool::Create(ops, plan, 2).value();
  REQUIRE(pool.layers().size() == 2);
  CHECK(pool.layers()[0].num_blocks == 70);
  CHECK(pool.layers()[0].data != pool.layers()[1].data);
  CHECK(ops.num_bytes_allocated == 70 * kBytesPerBlock);
}

}  // namespace
}  // namespace gloam
