// ApiKeys: the keys that clients may show, and the check that both front ends make.
// Immutable; any thread.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace gloam {

class ApiKeys {
 public:
  // No keys: everybody is let in.
  explicit ApiKeys(std::vector<std::string> keys) : keys_(std::move(keys)) {}

  // `authorization`: the value of that header, "Bearer KEY". Takes the same time whatever part of
  // a key is right.
  bool Allow(std::string_view authorization) const;

 private:
  std::vector<std::string> keys_;
};

}  // namespace gloam
