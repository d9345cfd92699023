// The selectors, each defined in the file of its name.
#pragma once

#include "kernels/selector.h"

namespace gloam {

const Selector& NoneSelector();
const Selector& QuestSelector();
const Selector& DoubleSparsitySelector();
const Selector& StreamingSelector();
const Selector& SparqSelector();
const Selector& TidalDecodeSelector();
const Selector& OracleTopKSelector();

}  // namespace gloam
