#include "kernels/selectors/registry.h"

#include <array>

namespace gloam {

std::span<const Selector* const> Selectors() {
  static const std::array selectors = {
      &NoneSelector(),  &QuestSelector(),       &DoubleSparsitySelector(), &StreamingSelector(),
      &SparqSelector(), &TidalDecodeSelector(), &OracleTopKSelector(),
  };
  return selectors;
}

const Selector* FindSelector(std::string_view name) {
  for (const Selector* selector : Selectors()) {
    if (selector->name() == name) return selector;
  }
  return nullptr;
}

}  // namespace gloam
