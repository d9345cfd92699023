// `gloam calibrate`: writes the channel file of Double Sparsity for a model.
#include <fstream>

#include "eval/channel_calibration.h"
#include "models/catalog.h"
#include "server/cli.h"
#include "server/text_files.h"

namespace gloam {
namespace {

Status Calibrate(const CalibrateOptions& options) {
  GLOAM_ASSIGN_OR_RETURN(const ResolvedModel resolved, ResolveModel(options.model));
  if (!resolved.present) {
    return NotFound("{} is not here yet: gloam pull {}", options.model, options.model);
  }
  const std::unique_ptr<Ops> ops = MakeCpuOps({.num_threads = options.threads});
  ChannelSums sums(*ops);
  GLOAM_ASSIGN_OR_RETURN(const LoadedModel loaded, LoadModel(resolved.path, sums, {}));
  GLOAM_ASSIGN_OR_RETURN(
      const std::vector<int32_t> tokens,
      TokenizeFiles(options.texts, *loaded.tokenizer, static_cast<size_t>(options.max_tokens)));
  GLOAM_ASSIGN_OR_RETURN(const nlohmann::ordered_json channels,
                         CalibrateChannels(*loaded.model, sums, tokens, options.context));
  std::ofstream out(options.out);
  out << "{\n";
  size_t left = channels.size();
  for (const auto& [key, heads] : channels.items()) {
    out << "  \"" << key << "\": " << heads.dump() << (--left > 0 ? ",\n" : "\n");
  }
  out << "}\n";
  out.close();
  if (!out) return Internal("cannot write {}", options.out);
  fmt::print("{}: {} layers, from {} tokens\n", options.out, loaded.model->config().num_layers,
             tokens.size() / options.context * options.context);
  return OkStatus();
}

}  // namespace

int RunCalibrate(const CalibrateOptions& options) {
  const Status status = Calibrate(options);
  return status.ok() ? 0 : Fail(status);
}

}  // namespace gloam
