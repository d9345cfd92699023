// Keeps a client's text marked on its way through a template. The Jinja engine carries the mark
// through most operations, but drops it where text is built anew: tojson, join, format, ...; there
// a client could forge special tokens, for instance in the description of a tool.
#pragma once

#include "jinja/runtime.h"
#include "nlohmann/json.hpp"

namespace gloam {

// `json` as a template's value, every string and every key in it marked.
jinja::value MarkedValue(const nlohmann::ordered_json& json);

// Changes the filters and methods of `program` that drop the mark: their result is marked as a
// whole when anything marked went into it. Call once, after parsing.
void KeepMarks(jinja::program* program);

}  // namespace gloam
