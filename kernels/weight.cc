#include "kernels/weight.h"

#include <cstring>
#include <iterator>

#include "base/check.h"
#include "kernels/float16.h"
#include "kernels/quant_block.h"

namespace gloam {
namespace {

void DequantizeRun(WeightType type, const QuantRun& run, float* out) {
  const QuantTraits traits = QuantTraitsOf(type);
  float add = 0;
  if (traits.has_min) {
    add = F16ToF32(run.min);
    if (traits.is_k_quant) add *= -static_cast<float>(run.sub_min);
  }
  for (int i = 0; i < kRunElements; ++i) {
    float scale = F16ToF32(run.scale);
    if (traits.is_k_quant) {
      scale *= static_cast<float>(run.sub_scales[i * traits.scales_per_run / kRunElements]);
    }
    const int quant = static_cast<int>(run.quants[i / 4] >> (8 * (i % 4)) & 0xff);
    out[i] = scale * static_cast<float>(quant - traits.offset);
    if (traits.has_min) out[i] += add;
  }
}

}  // namespace

const WeightTypeInfo& InfoOf(WeightType type) {
  static constexpr WeightTypeInfo kInfos[] = {
      {"F32", 1, 4},      {"F16", 1, 2},      {"BF16", 1, 2},     {"Q4_0", 32, 18},
      {"Q4_1", 32, 20},   {"Q5_0", 32, 22},   {"Q5_1", 32, 24},   {"Q8_0", 32, 34},
      {"Q4_K", 256, 144}, {"Q5_K", 256, 176}, {"Q6_K", 256, 210},
  };
  const auto index = static_cast<size_t>(type);
  GLOAM_CHECK(index < std::size(kInfos));
  return kInfos[index];
}

int64_t RowBytes(WeightType type, int64_t cols) {
  const WeightTypeInfo& info = InfoOf(type);
  GLOAM_CHECK(cols >= 0 && cols % info.block_elements == 0);
  return cols / info.block_elements * info.block_bytes;
}

void DequantizeRow(const RawWeight& weight, int64_t row, float* out) {
  GLOAM_CHECK(row >= 0 && row < weight.rows);
  const std::byte* data = weight.data + row * RowBytes(weight.type, weight.cols);
  if (weight.type == WeightType::kF32) {
    std::memcpy(out, data, weight.cols * sizeof(float));
    return;
  }
  if (!IsQuantized(weight.type)) {
    for (int64_t i = 0; i < weight.cols; ++i) {
      uint16_t bits;
      std::memcpy(&bits, data + 2 * i, sizeof(bits));
      out[i] = weight.type == WeightType::kF16 ? F16ToF32(bits) : BF16ToF32(bits);
    }
    return;
  }
  for (int64_t run = 0; run < weight.cols / kRunElements; ++run) {
    DequantizeRun(weight.type, DecodeRun(weight.type, data, run), out + run * kRunElements);
  }
}

}  // namespace gloam
