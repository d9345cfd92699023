#include "kernels/weight.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "catch2/catch.hpp"
#include "kernels/float16.h"
#include "nlohmann/json.hpp"

namespace gloam {
namespace {

std::vector<std::byte> FromHex(const std::string& hex) {
  std::vector<std::byte> bytes(hex.size() / 2);
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::byte>(std::stoi(hex.substr(2 * i, 2), nullptr, 16));
  }
  return bytes;
}

constexpr int kNumTypes = 11;

TEST_CASE("DequantizeRow equals the gguf package bit for bit") {
  std::ifstream file("tests/kernels/goldens/quants.json");
  REQUIRE(file);
  const auto goldens = nlohmann::json::parse(file);
  REQUIRE(goldens.size() == kNumTypes);
  for (int i = 0; i < kNumTypes; ++i) {
    const auto type = static_cast<WeightType>(i);
    const std::string name(InfoOf(type).name);
    CAPTURE(name);
    REQUIRE(goldens.contains(name));
    const auto& golden = goldens[name];
    const std::vector<std::byte> data = FromHex(golden["data"]);
    const std::vector<std::byte> expected = FromHex(golden["values"]);
    const RawWeight weight = {data.data(), type, golden["rows"], golden["cols"]};
    REQUIRE(static_cast<int64_t>(data.size()) == weight.rows * RowBytes(type, weight.cols));
    std::vector<float> row(weight.cols);
    for (int64_t r = 0; r < weight.rows; ++r) {
      DequantizeRow(weight, r, row.data());
      for (int64_t c = 0; c < weight.cols; ++c) {
        float value;
        std::memcpy(&value, expected.data() + (r * weight.cols + c) * 4, 4);
        CAPTURE(r, c);
        REQUIRE(row[c] == value);  // values are finite; 0 == -0
      }
    }
  }
}

TEST_CASE("RowBytes counts whole blocks") {
  CHECK(RowBytes(WeightType::kF32, 7) == 28);
  CHECK(RowBytes(WeightType::kBF16, 7) == 14);
  CHECK(RowBytes(WeightType::kQ4_1, 576) == 18 * 20);
  CHECK(RowBytes(WeightType::kQ6_K, 512) == 2 * 210);
}

TEST_CASE("F16ToF32 is exact") {
  CHECK(F16ToF32(0x3c00) == 1.0f);
  CHECK(F16ToF32(0xc000) == -2.0f);
  CHECK(F16ToF32(0x7bff) == 65504.0f);
  CHECK(F16ToF32(0x0001) == 0x1p-24f);    // smallest subnormal
  CHECK(F16ToF32(0x03ff) == 0x3ffp-24f);  // largest subnormal
  CHECK(F16ToF32(0x0400) == 0x1p-14f);
  CHECK(std::signbit(F16ToF32(0x8000)));
  CHECK(std::isinf(F16ToF32(0xfc00)));
  CHECK(std::isnan(F16ToF32(0x7e00)));
  CHECK(BF16ToF32(0xbf80) == -1.0f);
}

}  // namespace
}  // namespace gloam
