// Which sidecars a server keeps: the union of what its policies read. Of each kind it keeps one
// shape (bits, channels). Pure functions.
#pragma once

#include "base/status.h"
#include "kernels/sparsity_policy.h"

namespace gloam {

// Adds what `policy` reads to `kept`. Errors: kInvalidArgument, naming the key (PolicyKeyOf) that
// asks for another shape than the one that is kept; `kept` is then as before.
[[nodiscard]] Status AddSidecars(const SparsityPolicy& policy, SidecarConfig* kept);

// Whether `kept` has all that `policy` reads. Errors: kInvalidArgument, naming the key that asks
// for what is not kept and the flag that adds it.
[[nodiscard]] Status CheckSidecars(const SparsityPolicy& policy, const SidecarConfig& kept);

}  // namespace gloam
