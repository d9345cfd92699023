// Fetches one part of a catalogue entry with the machine's own client.
#pragma once

#include <filesystem>
#include <functional>

#include "base/status.h"
#include "models/catalog.h"

namespace gloam {

// Downloads into `staging` (an own, existing folder) and returns the path of the part's file below
// it. `tick` is called several times a second. Errors: as PullModel's; the client's own words are
// in the message.
[[nodiscard]] StatusOr<std::filesystem::path> FetchPart(CatalogSource::Kind kind,
                                                        const CatalogSource::Part& part,
                                                        const std::filesystem::path& staging,
                                                        const std::function<void()>& tick);

}  // namespace gloam
