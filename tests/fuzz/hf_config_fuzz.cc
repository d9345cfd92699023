// Any text as a config.json.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "models/checked_json.h"
#include "models/hf_config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto json = gloam::ParseJsonObject(text, "fuzz");
  if (json.ok()) (void)gloam::ParseHfConfig(*json, "fuzz").status();
  return 0;
}
