// RopeFrequencies against what transformers 5.23 computes (ROPE_INIT_FUNCTIONS, fp32) for the same
// parameters.
#include "models/rope_table.h"

#include <cmath>
#include <utility>

#include "catch2/catch.hpp"

namespace gloam {
namespace {

constexpr double kReferenceEpsilon = 1e-6;  // relative; the reference is fp32

TEST_CASE("Llama 3 scaling gives the reference's frequencies") {
  ModelConfig config;
  config.rotary_dim = 128;
  config.rope_theta = 500000.0f;
  config.rope_scaling = {.type = RopeScaling::Type::kLlama3,
                         .factor = 8.0f,
                         .low_freq_factor = 1.0f,
                         .high_freq_factor = 4.0f,
                         .original_max_position = 8192};
  // 28 is the last kept as it is, 29 to 34 are blended, from 35 on all are divided by the factor.
  constexpr std::pair<int, double> kExpected[] = {{0, 1.0},
                                                  {1, 0.814617217},
                                                  {16, 0.0376060307},
                                                  {28, 0.00321144611},
                                                  {29, 0.00216657063},
                                                  {31, 0.00085675146},
                                                  {33, 0.00031269365},
                                                  {34, 0.000178507791},
                                                  {36, 7.78465546e-05},
                                                  {40, 3.42810235e-05},
                                                  {63, 3.06892588e-07}};
  const std::vector<double> frequencies = RopeFrequencies(config);
  REQUIRE(frequencies.size() == 64);
  for (const auto& [i, expected] : kExpected) {
    CAPTURE(i);
    CHECK(frequencies[i] == Approx(expected).epsilon(kReferenceEpsilon));
  }
}

TEST_CASE("Linear scaling divides every frequency") {
  ModelConfig config;
  config.rotary_dim = 64;
  config.rope_scaling = {.type = RopeScaling::Type::kLinear, .factor = 4.0f};
  constexpr std::pair<int, double> kExpected[] = {
      {0, 0.25}, {1, 0.18747355}, {16, 0.00249999994}, {31, 3.33380376e-05}};
  const std::vector<double> frequencies = RopeFrequencies(config);
  for (const auto& [i, expected] : kExpected) {
    CAPTURE(i);
    CHECK(frequencies[i] == Approx(expected).epsilon(kReferenceEpsilon));
  }
}

TEST_CASE("A file's own factors divide the frequencies") {
  ModelConfig config;
  config.rotary_dim = 4;
  config.rope_theta = 100.0f;
  config.rope_scaling.freq_factors = {1.0f, 5.0f};
  CHECK(RopeFrequencies(config) == std::vector<double>{1.0, 0.1 / 5.0});
}

TEST_CASE("The table holds cos and sin of position times frequency") {
  ModelConfig config;
  config.rotary_dim = 4;
  config.rope_theta = 100.0f;
  const RopeTable table = MakeRopeTable(config, 1000);
  REQUIRE(table.cos.size() == 2000);
  REQUIRE(table.sin.size() == 2000);
  CHECK(table.cos[0] == 1.0f);
  CHECK(table.sin[0] == 0.0f);
  CHECK(table.cos[2 * 999] == static_cast<float>(std::cos(999.0)));
  CHECK(table.sin[2 * 999 + 1] == static_cast<float>(std::sin(999 * 0.1)));
}

}  // namespace
}  // namespace gloam
