// Stands in for llama.cpp's header of the same name, of which the Jinja engine's JSON wrapper uses
// the assertion only.
#pragma once

#include "base/check.h"

#define GGML_ASSERT(condition) GLOAM_CHECK(condition)
