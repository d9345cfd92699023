// ForcedModel: a model loaded in this process for teacher forcing: no engine, no server. One
// thread.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "eval/forced_benchmark.h"
#include "kernels/ops.h"
#include "models/attention/policy_registry.h"
#include "models/model.h"

namespace gloam {

struct ForcedModelOptions {
  std::string name;  // of the model, for results
  CpuOptions cpu;
  std::string activations = "int8";  // what `cpu` says, for results
  std::optional<DType> kv_dtype;     // empty: the model's default
  std::function<void(int64_t bytes_done, int64_t bytes_total)> progress;  // of loading
};

class ForcedModel final : public ForcedBackend {
 public:
  // Errors: those of LoadModel.
  [[nodiscard]] static StatusOr<std::unique_ptr<ForcedModel>> Load(
      const std::filesystem::path& path, ForcedModelOptions options);

  const Tokenizer& tokenizer() const override { return *loaded_.tokenizer; }
  std::string model_name() const override { return options_.name; }
  nlohmann::json settings() const override;
  [[nodiscard]] StatusOr<std::shared_ptr<const SparsityPolicy>> Parse(
      const nlohmann::json& body) override;
  [[nodiscard]] StatusOr<std::unique_ptr<ForcedDecoder>> MakeDecoder(int context, int decoded,
                                                                     RowPolicies policies) override;

 private:
  ForcedModel(ForcedModelOptions options, std::filesystem::path path);

  ForcedModelOptions options_;
  const std::filesystem::path path_;
  std::unique_ptr<Ops> ops_;
  LoadedModel loaded_;
  DType kv_dtype_ = DType::kBF16;
};

}  // namespace gloam
