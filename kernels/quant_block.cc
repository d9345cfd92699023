#include "kernels/quant_block.h"

#include <bit>

#include "base/check.h"
#include "kernels/quant_decode.h"

namespace gloam {

static_assert(std::endian::native == std::endian::little, "GGUF files are little-endian");

bool IsQuantized(WeightType type) { return InfoOf(type).block_elements > 1; }

QuantRun DecodeRun(WeightType type, const std::byte* row, int64_t run) {
  GLOAM_CHECK(IsQuantized(type));
  const WeightTypeInfo& info = InfoOf(type);
  const int64_t runs_per_block = info.block_elements / kRunElements;
  const std::byte* block = row + run / runs_per_block * info.block_bytes;
  return quant_decode::DecodeRunOfBlock(type, block, static_cast<int>(run % runs_per_block));
}

}  // namespace gloam
