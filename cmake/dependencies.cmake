# Third-party packages. deploy/install-deps installs them; each folder links what it uses.

find_package(Threads REQUIRED)
find_package(absl REQUIRED)
include(grpc)  # gRPC, Protobuf, and Abseil from here on: static
find_package(spdlog REQUIRED)
find_package(hwy REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(prometheus-cpp CONFIG REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(sentencepiece REQUIRED IMPORTED_TARGET sentencepiece)
pkg_check_modules(pcre2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(utf8proc REQUIRED IMPORTED_TARGET libutf8proc)

include(jinja)
