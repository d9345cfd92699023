#include "eval/teacher_forcing.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"

namespace gloam {
namespace {

// ln sum exp of a row of logits.
double LogSumExp(std::span<const float> logits) {
  const float max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - max);
  return max + std::log(sum);
}

int64_t Likeliest(std::span<const float> logits) {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

// The dense row of a step, as the others are compared with it.
struct DenseStep {
  std::span<const float> logits;
  double log_sum = 0;
  int64_t likeliest = 0;
  std::vector<float> probabilities;

  void Set(std::span<const float> row) {
    logits = row;
    log_sum = LogSumExp(row);
    likeliest = Likeliest(row);
    probabilities.resize(row.size());
    for (size_t i = 0; i < row.size(); ++i) {
      probabilities[i] = std::exp(row[i] - static_cast<float>(log_sum));
    }
  }

  // KL(dense || row) = sum p (z_dense - z_row) - log_sum_dense + log_sum_row.
  double Divergence(std::span<const float> row, double row_log_sum) const {
    double sum = 0;
    for (size_t i = 0; i < row.size(); ++i) {
      sum += static_cast<double>(probabilities[i]) * (logits[i] - row[i]);
    }
    return std::max(0.0, sum - log_sum + row_log_sum);  // rounding may go below
  }
};

// What the sparse steps of one row did, by layer and KV head.
class LayerSums {
 public:
  void Add(const StepSparsity& step, size_t row) {
    const size_t size =
        static_cast<size_t>(step.num_layers) * static_cast<size_t>(step.num_kv_heads);
    if (shares_.empty()) {
      shares_.num_layers = step.num_layers;
      shares_.num_kv_heads = step.num_kv_heads;
      shares_.kept.assign(size, 0);
      shares_.loaded.assign(size, 0);
    }
    for (int layer = kDenseLayers; layer < step.num_layers; ++layer) {
      size_t i = static_cast<size_t>(layer) * static_cast<size_t>(step.num_kv_heads);
      for (const SparseHeadStats& head : step.Heads(layer, row)) {
        shares_.kept[i] += head.kept / head.context;
        shares_.loaded[i++] += static_cast<double>(head.loaded) / head.context;
      }
    }
    ++num_steps_;
  }

  // The first layers are dense, or not recorded (NaN).
  LayerShares Means(bool first_layers_dense) const {
    const double first = first_layers_dense ? 1 : std::numeric_limits<double>::quiet_NaN();
    LayerShares means = shares_;
    const size_t num_dense =
        static_cast<size_t>(kDenseLayers) * static_cast<size_t>(means.num_kv_heads);
    for (auto* shares : {&means.kept, &means.loaded}) {
      for (size_t i = 0; i < shares->size(); ++i) {
        (*shares)[i] = i < num_dense ? first : (*shares)[i] / static_cast<double>(num_steps_);
      }
    }
    return means;
  }

 private:
  LayerShares shares_;  // sums
  int64_t num_steps_ = 0;
};

struct RowSums {
  ForcedScores scores;  // sums until the end
  SparsityTotals totals;
  LayerSums layers;
};

void AddSparsity(const StepSparsity& step, RowPolicies policies, std::vector<RowSums>& rows) {
  std::vector<bool> sparse(rows.size(), false);
  for (size_t i = 0; i < step.rows.size(); ++i) {
    const auto row = static_cast<size_t>(step.rows[i].seq) + 1;
    sparse[row] = true;
    rows[row].totals.AddSparseStep(step, i);
    rows[row].layers.Add(step, i);
  }
  for (size_t row = 0; row < rows.size(); ++row) {
    if (policies[row] != nullptr && !sparse[row]) rows[row].totals.AddBypassedSteps(1);
  }
}

}  // namespace

StatusOr<std::vector<ForcedScores>> RunTeacherForcing(ForcedDecoder& decoder,
                                                      std::span<const int32_t> context,
                                                      std::span<const int32_t> tokens,
                                                      RowPolicies policies) {
  GLOAM_CHECK(!policies.empty() && policies.front() == nullptr);
  if (tokens.size() < 2) return InvalidArgument("teacher forcing needs two tokens and more");
  GLOAM_RETURN_IF_ERROR(decoder.Start(context, tokens.first(tokens.size() - 1), policies));
  std::vector<RowSums> rows(policies.size());
  DenseStep dense;
  for (size_t i = 0; i + 1 < tokens.size(); ++i) {
    const ForcedDecoder::Step step = decoder.Next();
    dense.Set(step.logits.front());
    for (size_t row = 0; row < rows.size(); ++row) {
      const std::span<const float> logits = step.logits[row];
      const double log_sum = row == 0 ? dense.log_sum : LogSumExp(logits);
      ForcedScores& scores = rows[row].scores;
      scores.nll += log_sum - logits[static_cast<size_t>(tokens[i + 1])];
      const double kl = row == 0 ? 0 : dense.Divergence(logits, log_sum);
      scores.kl += kl;
      scores.max_kl = std::max(scores.max_kl, kl);
      scores.agreement += Likeliest(logits) == dense.likeliest ? 1 : 0;
      ++scores.num_tokens;
    }
    AddSparsity(step.sparsity, policies, rows);
  }
  std::vector<ForcedScores> results;
  for (size_t row = 0; row < rows.size(); ++row) {
    ForcedScores& scores = results.emplace_back(std::move(rows[row].scores));
    const auto count = static_cast<double>(scores.num_tokens);
    scores.nll /= count;
    scores.kl /= count;
    scores.agreement /= count;
    if (policies[row] == nullptr) continue;
    scores.sparsity = rows[row].totals.Usage(*policies[row]);
    scores.layers = rows[row].layers.Means(policies[row]->skip_first_two_layers);
  }
  return results;
}

}  // namespace gloam
