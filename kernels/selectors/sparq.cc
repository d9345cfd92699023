// SparQ (arXiv 2312.04985): logits from the channels in which the query is largest, chosen anew for
// every head and step.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/selectors/budget.h"
#include "kernels/selectors/registry.h"

namespace gloam {
namespace {

enum Key { kChannels = kNumBudgetKeys };
constexpr NumberKey kKeys[] = {
    kTokenBudgetKey,
    kSparsityRateKey,
    {.name = "r", .min = 1, .max = 1024},  // all channels where a head has fewer
};

// Zeroes the channels of `query` that are not among the r largest; the lower one of equals stays.
void KeepLargest(int r, int head_dim, float* query, std::vector<int>& order) {
  if (r >= head_dim) return;
  order.resize(static_cast<size_t>(head_dim));
  std::iota(order.begin(), order.end(), 0);
  std::nth_element(order.begin(), order.begin() + r, order.end(), [query](int a, int b) {
    const float left = std::fabs(query[a]);
    const float right = std::fabs(query[b]);
    return left != right ? left > right : a < b;
  });
  for (auto i = order.begin() + r; i != order.end(); ++i) query[*i] = 0;
}

class Sparq final : public Selector {
 public:
  std::string_view name() const override { return "sparq"; }
  std::span<const NumberKey> number_keys() const override { return kKeys; }

  void Select(SelectParams& params) const override {
    const int r = static_cast<int>(params.config->numbers[kChannels]);
    thread_local std::vector<float> queries;
    thread_local std::vector<int> order;
    queries.assign(params.queries, params.queries + params.num_heads * params.head_dim);
    for (int head = 0; head < params.num_heads; ++head) {
      KeepLargest(r, params.head_dim, queries.data() + head * params.head_dim, order);
    }
    // A key is a few cache lines, and channels picked one by one touch nearly all of them: zeros in
    // the query cost a CPU no more than leaving the channels out.
    KeepTopLogits(params, queries.data());
  }
};

}  // namespace

const Selector& SparqSelector() {
  static const Sparq selector;
  return selector;
}

}  // namespace gloam
