// An OutputSink that keeps nothing: for benches of the engine.
#pragma once

#include <vector>

#include "engine/request.h"

namespace gloam::testing {

class NullSink final : public OutputSink {
 public:
  void OnPromptLogprobs(std::vector<SampleResult> /*logprobs*/) override {}
  bool OnDelta(OutputDelta /*delta*/) override { return true; }
  void OnEnd(const RequestSummary& /*summary*/) override {}
};

}  // namespace gloam::testing
