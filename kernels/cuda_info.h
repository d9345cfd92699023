// What CUDA this machine has, for people (`gloam doctor`). Any thread.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace gloam {

// Names and facts, a line each; never empty.
std::vector<std::pair<std::string, std::string>> DescribeCuda();

}  // namespace gloam
