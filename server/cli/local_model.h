// LocalModel: a model loaded in this process with everything that answers requests: ops, weights,
// chat template, engine, service. What `serve`, `chat`, `complete` and `bench` start from.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "base/status.h"
#include "engine/chat_template.h"
#include "engine/engine.h"
#include "engine/metrics.h"
#include "server/cli/options.h"
#include "server/generation_service.h"

namespace gloam {

class LocalModel {
 public:
  // Finds the model (pulling one of the catalogue that is not there yet), loads it with a progress
  // bar on stderr, and starts its engine. Of `options` it uses the groups of model, compute and
  // scheduling. Errors: one line, naming file and field or the option.
  [[nodiscard]] static StatusOr<std::unique_ptr<LocalModel>> Load(const ServeOptions& options);

  GenerationService& service() { return *service_; }
  Engine& engine() { return *engine_; }
  const MetricsRegistry& metrics() const { return *metrics_; }

  // Lines of facts for the start-up banner.
  std::string Describe() const;

 private:
  LocalModel() = default;
  [[nodiscard]] Status Start(const ServeOptions& options);
  [[nodiscard]] Status StartEngine(const ServeOptions& options, const std::string& name,
                                   const std::filesystem::path& path, LoadedModel loaded);

  // In this order, so that each outlives what uses it.
  std::unique_ptr<Ops> ops_;
  std::unique_ptr<MetricsRegistry> metrics_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<ChatTemplate> chat_template_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<GenerationService> service_;
  int64_t weight_bytes_ = 0;
  std::string compute_;  // the processor and its arithmetic
  DType kv_cache_dtype_ = DType::kBF16;
  double load_seconds_ = 0;
};

}  // namespace gloam
