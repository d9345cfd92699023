// Safetensors: the tensor table of one .safetensors file, read in place and checked as strictly as
// a GGUF file is. Views the bytes, which must outlive it. Immutable after parsing; any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "kernels/weight.h"

namespace gloam {

struct SafetensorsTensor {
  std::string name;
  std::vector<int64_t> shape;  // outermost first; empty for a scalar
  WeightType type = WeightType::kF32;
  uint64_t offset = 0;  // in the file
  std::span<const std::byte> data;
};

class Safetensors {
 public:
  // `file` names the bytes in errors. The tensors must cover the data exactly: in any order, but
  // without overlap or hole. Errors are one line with file, tensor and byte offset:
  // kInvalidArgument (malformed), kUnimplemented (a dtype that is not F32, F16 or BF16).
  [[nodiscard]] static StatusOr<Safetensors> Parse(std::span<const std::byte> bytes,
                                                   std::string file);

  const std::vector<SafetensorsTensor>& tensors() const { return tensors_; }  // by offset

 private:
  std::vector<SafetensorsTensor> tensors_;
};

}  // namespace gloam
