// Any bytes as a GGUF model: refused with a Status or read, within bounds either way.
#include <cstddef>
#include <cstdint>
#include <span>

#include "models/gguf_model_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  const auto gguf = gloam::Gguf::Parse(bytes, "fuzz");
  if (!gguf.ok()) return 0;
  (void)gloam::ReadGgufVocabulary(*gguf).status();
  (void)gloam::ParseGgufModel(bytes, "fuzz").status();
  return 0;
}
