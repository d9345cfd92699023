// Facts about the machine, for defaults, the banner and `gloam doctor`. Any thread.
#pragma once

#include <cstdint>
#include <string>

namespace gloam {

std::string CpuModelName();          // "unknown CPU" where the system does not say
std::string CpuFeatures();           // those that the CPU backend can use, e.g. "avx2 avx512_vnni"
int UsableCores();                   // that this process may run on
int64_t TotalMemoryBytes();          // of the machine or its control group
int64_t AvailableMemoryBytes();      // without swapping, also within the control group's limit
int64_t RaiseFileDescriptorLimit();  // soft limit to the hard one; returns what holds now

}  // namespace gloam
