// Streaming SHA-256 (OpenSSL's). One owner at a time.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace gloam {

class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void Update(std::span<const std::byte> bytes);
  // Lower-case hex digest of everything so far; nothing may be added after it.
  std::string HexDigest();

 private:
  void* context_;  // EVP_MD_CTX
};

}  // namespace gloam
