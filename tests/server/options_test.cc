#include "server/cli/options.h"

#include "catch2/catch.hpp"

namespace gloam {
namespace {

OptionTable::Environment Variables(std::map<std::string, std::string> variables) {
  return [variables](const std::string& name) -> std::optional<std::string> {
    const auto it = variables.find(name);
    return it == variables.end() ? std::nullopt : std::optional(it->second);
  };
}

TEST_CASE("Flag beats environment beats file beats default") {
  ServeOptions options;
  OptionTable table(&options);
  const std::string file = R"({"port": 1, "max-num-seqs": 1, "threads": 1, "device": "cpu"})";
  REQUIRE(table
              .Apply({{"port", {"3"}}},
                     Variables({{"GLOAM_PORT", "2"}, {"GLOAM_MAX_NUM_SEQS", "2"}}), file)
              .ok());
  CHECK(options.port == 3);
  CHECK(options.max_num_seqs == 2);
  CHECK(options.threads == 1);
  CHECK(options.device == "cpu");
  CHECK(options.grpc_port == 50051);
  const std::string shown = table.Describe();
  CHECK_THAT(shown, Catch::Matchers::Matches("[^]*\nport +3 +flag\n[^]*"));
  CHECK_THAT(shown, Catch::Matchers::Matches("[^]*\nmax-num-seqs +2 +environment\n[^]*"));
  CHECK_THAT(shown, Catch::Matchers::Matches("[^]*\nthreads +1 +file\n[^]*"));
  CHECK_THAT(shown, Catch::Matchers::Matches("[^]*\ngrpc-port +50051 +default\n[^]*"));
}

TEST_CASE("Flags, lists and sizes from every source") {
  ServeOptions options;
  OptionTable table(&options);
  REQUIRE(table
              .Apply({{"served-model-name", {"a", "b"}}, {"kv-cache-memory", {"2G"}}},
                     Variables({{"GLOAM_API_KEY", "k1,k2"}}),
                     R"({"enable-prefix-caching": false, "request-timeout": 2.5})")
              .ok());
  CHECK(options.served_model_names == std::vector<std::string>{"a", "b"});
  CHECK(options.api_keys == std::vector<std::string>{"k1", "k2"});
  CHECK_FALSE(options.enable_prefix_caching);
  CHECK(options.kv_cache_memory == int64_t{2} << 30);
  CHECK(options.request_timeout == 2.5);
  CHECK(table.Describe().find("k1") == std::string::npos);  // keys are not shown
}

TEST_CASE("Faults name the setting and its source") {
  const auto fault = [](OptionTable::Values flags, std::map<std::string, std::string> variables,
                        std::string_view file) {
    ServeOptions options;
    OptionTable table(&options);
    return MessageOf(table.Apply(flags, Variables(variables), file));
  };
  using Catch::Matchers::Contains;
  CHECK_THAT(fault({{"port", {"70000"}}}, {}, ""), Contains("--port") && Contains("65535"));
  CHECK_THAT(fault({{"port", {"8000x"}}}, {}, ""), Contains("--port"));
  CHECK_THAT(fault({}, {{"GLOAM_DEVICE", "tpu"}}, ""), Contains("GLOAM_DEVICE") && Contains("cpu"));
  CHECK_THAT(fault({}, {{"GLOAM_ENABLE_GRPC", "maybe"}}, ""), Contains("GLOAM_ENABLE_GRPC"));
  CHECK_THAT(fault({}, {}, R"({"prot": 1})"), Contains("prot"));
  CHECK_THAT(fault({}, {}, R"({"port": {}})"), Contains("port"));
  CHECK_THAT(fault({}, {}, R"({"port": null})"), Contains("port"));
  CHECK_THAT(fault({}, {}, "port: 1"), Contains("--config"));
  CHECK_THAT(fault({{"kv-cache-memory", {"2X"}}}, {}, ""), Contains("--kv-cache-memory"));
  CHECK_THAT(fault({{"api-key", {""}}}, {}, ""), Contains("--api-key"));
  CHECK_THAT(fault({{"idle-timeout", {"nan"}}}, {}, ""), Contains("--idle-timeout"));
}

TEST_CASE("Sparsity's settings, from flags and from the environment") {
  ServeOptions options;
  OptionTable table(&options);
  CHECK(options.sparsity == "dense");
  CHECK(options.sparsity_policies == "all");
  REQUIRE(table
              .Apply({{"sparsity", {"twilight"}}},
                     Variables({{"GLOAM_SPARSITY_POLICIES", "twilight,quest_twi"}}),
                     R"({"sparsity-dir": "policies"})")
              .ok());
  CHECK(options.sparsity == "twilight");
  CHECK(SplitCommas(options.sparsity_policies) ==
        std::vector<std::string>{"twilight", "quest_twi"});
  CHECK(options.sparsity_dir == "policies");
  CHECK_THAT(table.Describe(), Catch::Matchers::Contains("sparsity-policies"));
}

TEST_CASE("Where and how the model runs") {
  ServeOptions options;
  OptionTable table(&options);
  CHECK(options.device == "auto");
  CHECK(options.gpu_memory_utilization == 0.90);
  CHECK_THAT(table.Describe(),
             Catch::Matchers::Matches("[^]*\nmax-num-batched-tokens +auto +default\n[^]*"));
  REQUIRE(table
              .Apply({{"device", {"cuda"}},
                      {"kv-cache-dtype", {"fp8"}},
                      {"quantization", {"fp8"}},
                      {"max-num-batched-tokens", {"4096"}}},
                     Variables({{"GLOAM_GPU_MEMORY_UTILIZATION", "0.85"}}),
                     R"({"batch-invariant": true, "dtype": "bfloat16"})")
              .ok());
  CHECK(options.device == "cuda");
  CHECK(options.kv_cache_dtype == "fp8");
  CHECK(options.quantization == "fp8");
  CHECK(options.dtype == "bfloat16");
  CHECK(options.batch_invariant);
  CHECK(options.gpu_memory_utilization == 0.85);
  CHECK(options.max_num_batched_tokens == 4096);
  for (const char* bad : {"0", "1.01", "-0.5", "nan", "90%"}) {
    CAPTURE(bad);
    CHECK_THAT(MessageOf(table.Apply({{"gpu-memory-utilization", {bad}}}, Variables({}), "")),
               Catch::Matchers::Contains("--gpu-memory-utilization"));
  }
  CHECK_FALSE(table.Apply({{"max-num-batched-tokens", {"0"}}}, Variables({}), "").ok());
}

TEST_CASE("Sizes") {
  CHECK(*ParseBytes("0") == 0);
  CHECK(*ParseBytes("1048576") == 1 << 20);
  CHECK(*ParseBytes("1.5k") == 1536);
  CHECK(*ParseBytes("512MiB") == 512 << 20);
  CHECK(*ParseBytes("3gb") == int64_t{3} << 30);
  for (const char* bad : {"", "G", "-1", "1e3", "1 G", "1GG", "99999999999T"}) {
    INFO(bad);
    CHECK_FALSE(ParseBytes(bad).ok());
  }
}

}  // namespace
}  // namespace gloam
