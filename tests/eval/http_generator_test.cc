// The generator over HTTP against a real HTTP server whose engine is the test.
#include <future>

#include "catch2/catch.hpp"
#include "server/cli/eval_generators.h"
#include "tests/server/http_fixture.h"

namespace gloam {
namespace {

std::string UrlOf(const HttpFixture& fixture) {
  return fmt::format("http://127.0.0.1:{}", fixture.server->port());
}

TEST_CASE("A server answers what gloam eval asks it") {
  HttpFixture fixture;
  auto generator = MakeHttpGenerator(UrlOf(fixture), "");
  INFO(generator.status());
  REQUIRE(generator.ok());
  CHECK((*generator)->model_name() == "m");
  CHECK((*generator)->max_model_len() == 1024);
  PromptTokenizer& tokenizer = (*generator)->tokenizer();
  const auto tokens = tokenizer.Encode("hi there", /*add_special=*/true);
  REQUIRE(tokens.ok());
  CHECK(*tokens == std::vector<int32_t>{'h', 'i', ' ', 't', 'h', 'e', 'r', 'e'});
  CHECK(*tokenizer.Decode(*tokens) == "hi there");

  const GenerateRequest request = {.prompt = *tokens,
                                   .num_decoded_prompt_tokens = 3,
                                   .max_tokens = 9,
                                   .min_tokens = 1,
                                   .stop_token_ids = {10},
                                   .policy = {{"selector", {{"type", "none"}}}}};
  auto answer = std::async(std::launch::async, [&] { return (*generator)->Generate(request); });
  const RequestHandle handle = fixture.engine.WaitForRequest();
  const Request got = fixture.engine.request(handle);
  CHECK(got.prompt == request.prompt);
  CHECK(got.num_decoded_prompt_tokens == 3);
  CHECK(got.sampling.temperature == 0);
  CHECK(got.sampling.max_tokens == 9);
  CHECK(got.sampling.min_tokens == 1);
  CHECK(got.sampling.stop_token_ids == std::vector<int32_t>{10});
  CHECK(got.sparsity != nullptr);
  fixture.engine.Push(handle, "yes");
  fixture.engine.Finish(handle);
  fixture.engine.End(handle, {.prompt_tokens = 8,
                              .completion_tokens = 3,
                              .sparsity = SparsityUsage{.kept_tokens_per_head = 5.5,
                                                        .loaded_tokens_per_kv_head = 7,
                                                        .loaded_share = 0.75,
                                                        .sparse_steps = 6,
                                                        .true_mass = 0.5}});
  const auto text = answer.get();
  INFO(text.status());
  REQUIRE(text.ok());
  CHECK(text->text == "yes");
  CHECK(text->num_tokens == 3);
  REQUIRE(text->sparsity.has_value());
  CHECK(text->sparsity->kept_tokens_per_head == 5.5);
  CHECK(text->sparsity->loaded_share == 0.75);
  CHECK(text->sparsity->sparse_steps == 6);
  CHECK(text->sparsity->true_mass == 0.5);
}

TEST_CASE("What a server refuses is passed on, and the next request still works") {
  HttpFixture fixture;
  auto generator = MakeHttpGenerator(UrlOf(fixture), "");
  REQUIRE(generator.ok());
  const auto refused = (*generator)->Generate({.prompt = {1, 2}, .max_tokens = 5000});
  CHECK(MessageOf(refused.status()).find("400") != std::string::npos);
  CHECK((*generator)->tokenizer().Encode("a", false).ok());
  CHECK(MakeHttpGenerator("http://127.0.0.1:1", "").status().code() == StatusCode::kUnavailable);
  CHECK(MakeHttpGenerator("ftp://x", "").status().code() == StatusCode::kInvalidArgument);
}

TEST_CASE("A server's policies can be named") {
  HttpFixture fixture;
  const auto known = FetchPolicies(UrlOf(fixture), "");
  INFO(known.status());
  REQUIRE(known.ok());
  CHECK(known->at("dense").is_null());
}

}  // namespace
}  // namespace gloam
