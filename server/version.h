// The program's version, from the project's CMakeLists.txt.
#pragma once

namespace gloam {

inline constexpr char kVersion[] = GLOAM_VERSION;

}  // namespace gloam
