#include "tests/models/named_model.h"

#include <memory>

#include "models/llama.h"
#include "models/random_model_file.h"
#include "tests/models/catalogue_model.h"

namespace gloam {

StatusOr<NamedModel> FindNamedModel(const std::string& argument) {
  constexpr std::string_view kRandom = "random:";
  if (argument.rfind(kRandom, 0) == 0) {
    const std::string rest = argument.substr(kRandom.size());
    const size_t colon = rest.find(':');
    if (colon == rest.npos) return InvalidArgument("{} is not random:SHAPE:TYPE", argument);
    return NamedModel{
        .name = argument, .shape = rest.substr(0, colon), .weight_type = rest.substr(colon + 1)};
  }
  NamedModel named = {.name = std::filesystem::path(argument).stem().string(), .path = argument};
  if (std::filesystem::exists(named.path)) return named;
  named = {.name = argument, .path = CatalogueModelPath(argument)};
  if (std::filesystem::exists(named.path)) return named;
  return NotFound("no {}; fetch it with: gloam pull {}", named.path.string(), argument);
}

StatusOr<LoadedModel> LoadNamedModel(const NamedModel& named, Ops& ops) {
  if (!named.path.empty()) return LoadModel(named.path, ops, {});
  GLOAM_ASSIGN_OR_RETURN(const auto file, RandomModelFile::Create(named.shape, named.weight_type));
  LoadedModel loaded;
  GLOAM_ASSIGN_OR_RETURN(loaded.model, Llama::Load(*file, ops, {}));
  return loaded;
}

}  // namespace gloam
