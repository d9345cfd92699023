// Whether AVX-512 kernels take the dot products of VNNI, which Highway's targets do not tell apart.
// Any thread.
#pragma once

namespace gloam::cpu {

// The host has AVX512-VNNI, and no test does without.
bool UseVnni();

// Makes the AVX-512 kernels do without VNNI, so that a test on a newer host covers that path.
void DisableVnniForTest(bool disable);

}  // namespace gloam::cpu
