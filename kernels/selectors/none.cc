// Every token is a candidate.
#include "kernels/selectors/registry.h"

namespace gloam {
namespace {

class None final : public Selector {
 public:
  std::string_view name() const override { return "none"; }
  void Select(SelectParams& /*params*/) const override {}
};

}  // namespace

const Selector& NoneSelector() {
  static const None selector;
  return selector;
}

}  // namespace gloam
