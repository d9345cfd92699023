# The Jinja engine of llama.cpp, unpacked by deploy/install-deps from the pinned source package.

set(GLOAM_JINJA_DIR ${PROJECT_SOURCE_DIR}/third_party)
if(NOT EXISTS ${GLOAM_JINJA_DIR}/jinja/runtime.cpp)
  message(FATAL_ERROR "no third_party/jinja: run deploy/install-deps")
endif()
add_library(gloam_jinja STATIC
  ${GLOAM_JINJA_DIR}/json.cpp
  ${GLOAM_JINJA_DIR}/unicode.cpp
  ${GLOAM_JINJA_DIR}/jinja/lexer.cpp
  ${GLOAM_JINJA_DIR}/jinja/parser.cpp
  ${GLOAM_JINJA_DIR}/jinja/runtime.cpp
  ${GLOAM_JINJA_DIR}/jinja/string.cpp
  ${GLOAM_JINJA_DIR}/jinja/value.cpp)
target_include_directories(gloam_jinja SYSTEM PUBLIC ${GLOAM_JINJA_DIR})
target_link_libraries(gloam_jinja PUBLIC nlohmann_json::nlohmann_json)
target_include_directories(gloam_jinja PRIVATE ${PROJECT_SOURCE_DIR}/cmake/jinja ${PROJECT_SOURCE_DIR})
