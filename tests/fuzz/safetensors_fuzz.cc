// Any bytes as a safetensors file: refused with a Status or read, within bounds either way.
#include <cstddef>
#include <cstdint>
#include <span>

#include "models/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  (void)gloam::Safetensors::Parse(std::as_bytes(std::span(data, size)), "fuzz").status();
  return 0;
}
