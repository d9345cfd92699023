#include "models/hf_model_file.h"

#include <map>
#include <set>
#include <system_error>
#include <utility>

#include "models/checked_json.h"
#include "models/config_checks.h"
#include "models/field_name.h"
#include "models/hf_config.h"
#include "models/mapped_file.h"
#include "models/safetensors.h"
#include "models/tokenizer/tokenizer_factory.h"

namespace gloam {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr char kSingleFile[] = "model.safetensors";

// Which shard holds which tensor; for a folder with one file and no index, just that file.
struct ShardList {
  std::set<std::string> files;
  std::map<std::string, std::string> file_of_tensor;  // empty without an index
};

// For a folder without safetensors: says what stands in their place.
Status MissingWeights(const fs::path& folder) {
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    if (IsPickleFile(entry.path())) {
      return InvalidArgument(
          "{}: pickle files are refused, they can run code; convert the weights "
          "to safetensors or GGUF",
          entry.path().string());
    }
  }
  return NotFound("{}: neither {} nor {}", folder.string(), kSingleFile, kIndexFile);
}

StatusOr<ShardList> ReadIndex(const fs::path& path) {
  GLOAM_ASSIGN_OR_RETURN(const json document, ReadJsonFile(path));
  const JsonFields fields(document, path.string());
  const json* map = fields.Find("weight_map");
  if (map == nullptr || !map->is_object() || map->empty()) {
    return fields.Error("weight_map", "must be an object of tensor and file names");
  }
  ShardList shards;
  for (const auto& [tensor, file] : map->items()) {
    const std::string field = fmt::format("weight_map[{}]", QuoteName(tensor));
    if (!file.is_string()) return fields.Error(field, "must be a string");
    const std::string name = file.get<std::string>();
    if (IsPickleFile(name)) {
      return fields.Error(field, fmt::format("is {}: pickle files are refused", QuoteName(name)));
    }
    if (name != fs::path(name).filename() || fs::path(name).extension() != ".safetensors" ||
        name.find('\0') != std::string::npos) {
      return fields.Error(field, fmt::format("is {}; it must be a .safetensors file of this folder",
                                             QuoteName(name)));
    }
    shards.files.insert(name);
    shards.file_of_tensor.emplace(tensor, name);
  }
  return shards;
}

StatusOr<ShardList> ListShards(const fs::path& folder) {
  if (FileExists(folder / kIndexFile)) return ReadIndex(folder / kIndexFile);
  if (FileExists(folder / kSingleFile)) return ShardList{.files = {kSingleFile}};
  return MissingWeights(folder);
}

class HfModelFile final : public ModelFile {
 public:
  explicit HfModelFile(fs::path folder) : folder_(std::move(folder)) {}

  Status Init() {
    const fs::path config_path = folder_ / "config.json";
    GLOAM_ASSIGN_OR_RETURN(const json document, ReadJsonFile(config_path));
    GLOAM_ASSIGN_OR_RETURN(config_, ParseHfConfig(document, config_path.string()));
    GLOAM_ASSIGN_OR_RETURN(defaults_,
                           ReadGenerationDefaults(folder_, document, config_.vocab_size));
    GLOAM_ASSIGN_OR_RETURN(chat_template_, ReadChatTemplate(folder_));
    GLOAM_ASSIGN_OR_RETURN(const ShardList shards, ListShards(folder_));
    size_t num_listed = 0;
    for (const std::string& file : shards.files) {
      GLOAM_RETURN_IF_ERROR(MapShard(file, shards, &num_listed));
    }
    if (num_listed != shards.file_of_tensor.size()) return MissingFromShards(shards);
    return CheckTensors(config_, tensors_, folder_.string());
  }

  const ModelConfig& config() const override { return config_; }
  const GenerationDefaults& generation_defaults() const override { return defaults_; }
  const std::string& chat_template() const override { return chat_template_; }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  std::string path() const override { return folder_.string(); }

  StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer() const override {
    GLOAM_ASSIGN_OR_RETURN(auto tokenizer, LoadTokenizerFolder(folder_, defaults_.eos_token_ids));
    if (tokenizer->vocab_size() > config_.vocab_size) {
      return InvalidArgument("{}: the tokenizer has {} tokens, config.json's vocab_size is {}",
                             folder_.string(), tokenizer->vocab_size(), config_.vocab_size);
    }
    return tokenizer;
  }

 private:
  Status MapShard(const std::string& file, const ShardList& shards, size_t* num_listed) {
    const fs::path path = folder_ / file;
    GLOAM_ASSIGN_OR_RETURN(MappedFile mapping, MappedFile::Open(path));
    GLOAM_ASSIGN_OR_RETURN(const Safetensors parsed,
                           Safetensors::Parse(mapping.bytes(), path.string()));
    for (const SafetensorsTensor& tensor : parsed.tensors()) {
      if (!shards.file_of_tensor.empty()) {
        const auto listed = shards.file_of_tensor.find(tensor.name);
        if (listed == shards.file_of_tensor.end() || listed->second != file) {
          return InvalidArgument("{}: tensor {} is not in {}'s list of this file", path.string(),
                                 QuoteName(tensor.name), kIndexFile);
        }
        ++*num_listed;
      }
      GLOAM_RETURN_IF_ERROR(AddTensor(tensor, path));
    }
    shards_.push_back(std::move(mapping));
    return OkStatus();
  }

  Status AddTensor(const SafetensorsTensor& tensor, const fs::path& path) {
    std::string name = GgufNameOf(tensor.name);
    // With tied embeddings a stored lm_head is a copy that transformers ignores too.
    if (name.empty() || (config_.tie_embeddings && name == "output.weight")) return OkStatus();
    if (!names_.insert(name).second) {
      return InvalidArgument("{}: tensor {} is there twice", path.string(), QuoteName(tensor.name));
    }
    const int64_t cols = tensor.shape.empty() ? 1 : tensor.shape.back();
    int64_t rows = 1;
    for (size_t d = 0; d + 1 < tensor.shape.size(); ++d) rows *= tensor.shape[d];
    tensors_.push_back({.name = std::move(name),
                        .shape = tensor.shape,
                        .data = {tensor.data.data(), tensor.type, rows, cols}});
    return OkStatus();
  }

  Status MissingFromShards(const ShardList& shards) const {
    for (const auto& [tensor, file] : shards.file_of_tensor) {
      const std::string name = GgufNameOf(tensor);
      if (!name.empty() && !names_.contains(name)) {
        return InvalidArgument("{}: tensor {} is missing; {} lists it", (folder_ / file).string(),
                               QuoteName(tensor), kIndexFile);
      }
    }
    return InvalidArgument("{}: the shards lack a tensor of weight_map",
                           (folder_ / kIndexFile).string());
  }

  fs::path folder_;
  ModelConfig config_;
  GenerationDefaults defaults_;
  std::string chat_template_;
  std::vector<MappedFile> shards_;
  std::vector<TensorInfo> tensors_;
  std::set<std::string> names_;
};

}  // namespace

bool IsPickleFile(const fs::path& path) {
  const std::string extension = path.extension().string();
  return extension == ".bin" || extension == ".pt" || extension == ".pth" || extension == ".pkl";
}

std::string GgufNameOf(const std::string& hf_name) {
  static const std::map<std::string, std::string, std::less<>> kModelNames = {
      {"model.embed_tokens.weight", "token_embd.weight"},
      {"model.norm.weight", "output_norm.weight"},
      {"lm_head.weight", "output.weight"},
  };
  static const std::map<std::string, std::string, std::less<>> kLayerNames = {
      {"input_layernorm", "attn_norm"},    {"self_attn.q_proj", "attn_q"},
      {"self_attn.k_proj", "attn_k"},      {"self_attn.v_proj", "attn_v"},
      {"self_attn.o_proj", "attn_output"}, {"self_attn.q_norm", "attn_q_norm"},
      {"self_attn.k_norm", "attn_k_norm"}, {"post_attention_layernorm", "ffn_norm"},
      {"mlp.gate_proj", "ffn_gate"},       {"mlp.up_proj", "ffn_up"},
      {"mlp.down_proj", "ffn_down"},
  };
  if (hf_name.ends_with("rotary_emb.inv_freq")) return "";
  if (const auto found = kModelNames.find(hf_name); found != kModelNames.end()) {
    return found->second;
  }
  constexpr std::string_view kPrefix = "model.layers.";
  if (!hf_name.starts_with(kPrefix)) return hf_name;
  const size_t after_layer = hf_name.find('.', kPrefix.size());
  const size_t last_dot = hf_name.rfind('.');
  if (after_layer == std::string::npos || last_dot <= after_layer) return hf_name;
  const std::string layer = hf_name.substr(kPrefix.size(), after_layer - kPrefix.size());
  const auto found = kLayerNames.find(hf_name.substr(after_layer + 1, last_dot - after_layer - 1));
  if (found == kLayerNames.end()) return hf_name;
  return "blk." + layer + "." + found->second + hf_name.substr(last_dot);
}

StatusOr<std::unique_ptr<ModelFile>> OpenHfModel(const fs::path& folder) {
  auto model = std::make_unique<HfModelFile>(folder);
  GLOAM_RETURN_IF_ERROR(model->Init());
  return model;
}

}  // namespace gloam
