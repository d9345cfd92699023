#include "eval/forced_model.h"

#include <algorithm>
#include <utility>

#include "eval/paged_forced_decoder.h"
#include "models/attention/channel_table.h"
#include "models/attention/policy_json.h"
#include "models/attention/sidecar_plan.h"

namespace gloam {
namespace {

std::string_view NameOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kF16:
      return "f16";
    default:
      return "bf16";
  }
}

// The channel file that a policy names: "{model}" stands for the model's name, relative paths are
// meant from the folder of the model's files.
std::filesystem::path FindChannelFile(std::string path, const std::string& model_name,
                                      const std::filesystem::path& model_path) {
  constexpr std::string_view kModelMark = "{model}";
  for (size_t at = path.find(kModelMark); at != path.npos; at = path.find(kModelMark, at)) {
    path.replace(at, kModelMark.size(), model_name);
    at += model_name.size();
  }
  std::error_code error;
  const bool is_folder = std::filesystem::is_directory(model_path, error);
  return (is_folder ? model_path : model_path.parent_path()) / path;
}

}  // namespace

ForcedModel::ForcedModel(ForcedModelOptions options, std::filesystem::path path)
    : options_(std::move(options)), path_(std::move(path)) {}

StatusOr<std::unique_ptr<ForcedModel>> ForcedModel::Load(const std::filesystem::path& path,
                                                         ForcedModelOptions options) {
  std::unique_ptr<ForcedModel> model(new ForcedModel(std::move(options), path));
  model->ops_ = MakeCpuOps(model->options_.cpu);
  GLOAM_ASSIGN_OR_RETURN(model->loaded_,
                         LoadModel(path, *model->ops_, {.progress = model->options_.progress}));
  model->kv_dtype_ =
      model->options_.kv_dtype.value_or(DefaultKvDType(model->loaded_.model->config()));
  return model;
}

nlohmann::json ForcedModel::settings() const {
  return {{"activations", options_.activations}, {"kv_cache_dtype", NameOf(kv_dtype_)}};
}

StatusOr<std::shared_ptr<const SparsityPolicy>> ForcedModel::Parse(const nlohmann::json& body) {
  if (body.is_null()) return std::shared_ptr<const SparsityPolicy>();
  const ModelConfig& config = loaded_.model->config();
  if (config.sliding_window > 0) {
    return InvalidArgument("policies cannot be used with a model of sliding windows");
  }
  const auto find_channels = [&](const std::string& path, std::string_view projection,
                                 int num_channels) {
    return ReadChannelTable(FindChannelFile(path, options_.name, path_), projection, num_channels,
                            config);
  };
  GLOAM_ASSIGN_OR_RETURN(SparsityPolicy policy, ParsePolicy(body, config, find_channels));
  return std::make_shared<const SparsityPolicy>(std::move(policy));
}

StatusOr<std::unique_ptr<ForcedDecoder>> ForcedModel::MakeDecoder(int context, int decoded,
                                                                  RowPolicies policies) {
  ForcedDecoderLimits limits{.max_context = context,
                             .max_decoded = decoded,
                             .max_rows = static_cast<int>(policies.size()),
                             .kv_dtype = kv_dtype_};
  for (const auto& policy : policies) {
    if (policy == nullptr) continue;
    GLOAM_RETURN_IF_ERROR(AddSidecars(*policy, &limits.sidecars));
    if (!policy->compresses()) continue;
    ++limits.max_compressed_rows;
    limits.max_window = std::max(limits.max_window, policy->compressor.window_size);
  }
  return PagedForcedDecoder::Create(limits, *ops_, *loaded_.model);
}

}  // namespace gloam
