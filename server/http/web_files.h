// Files of server/http/web/, embedded at build time (server/CMakeLists.txt).
#pragma once

#include <string_view>

namespace gloam {

extern const std::string_view kIndexHtml;
extern const std::string_view kOpenApiJson;

}  // namespace gloam
