// Reading Double Sparsity's channel files: what the lists come to, and what is refused.
#include "models/attention/channel_table.h"

#include <string>
#include <vector>

#include "catch2/catch.hpp"
#include "nlohmann/json.hpp"
#include "tests/models/test_model_writer.h"

namespace gloam {
namespace {

using nlohmann::json;
using test::TempFolder;
using test::WriteFile;

ModelConfig SmallModel() {
  ModelConfig model;
  model.num_layers = 2;
  model.num_heads = 4;
  model.num_kv_heads = 2;
  model.head_dim = 8;
  return model;
}

std::string KeyOf(int layer, const std::string& projection) {
  return "model.layers." + std::to_string(layer) + ".self_attn." + projection + "_proj";
}

// Lists of every kind for both layers: "q" and "qk" per query head, "k" per KV head.
json SmallFile() {
  json file;
  for (int layer = 0; layer < 2; ++layer) {
    file[KeyOf(layer, "q")] = {{0, 1, 2, 3}, {4, 0, 5, 1}, {7, 6, 5, 4}, {7, 6, 5, 4}};
    file[KeyOf(layer, "k")] = {{1, 2, 3}, {layer, 6, 5}};
    file[KeyOf(layer, "qk")] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}};
  }
  return file;
}

struct Result {
  std::vector<int16_t> channels;
  std::string error;
};

Result Read(const std::string& text, const std::string& projection, int num_channels) {
  const TempFolder folder;
  const auto path = folder.path() / "channels.json";
  WriteFile(path, text);
  const auto table = ReadChannelTable(path, projection, num_channels, SmallModel());
  if (table.ok()) {
    CHECK((*table)->num_layers == 2);
    CHECK((*table)->num_kv_heads == 2);
    CHECK((*table)->num_channels == num_channels);
    CHECK((*table)->source == path.string());
    return {(*table)->channels, ""};
  }
  CHECK(table.status().code() == StatusCode::kInvalidArgument);
  const std::string message = MessageOf(table.status());
  CHECK(message.starts_with(path.string() + ": "));
  CHECK(message.find('\n') == std::string::npos);
  return {{}, message.substr(path.string().size() + 2)};
}

std::string ErrorOf(const json& file, const std::string& projection = "k", int num_channels = 2) {
  return Read(file.dump(), projection, num_channels).error;
}

TEST_CASE("One list per KV head is taken as it is", "[channel_table]") {
  CHECK(Read(SmallFile().dump(), "k", 2).channels ==
        std::vector<int16_t>{1, 2, /**/ 0, 6, /**/ 1, 2, /**/ 1, 6});
  CHECK(Read(SmallFile().dump(), "k", 3).channels ==
        std::vector<int16_t>{1, 2, 3, 0, 6, 5, 1, 2, 3, 1, 6, 5});
}

TEST_CASE("Lists per query head are merged by rank", "[channel_table]") {
  // 0 4 | 1 (0) | 2 5 | 3 (1) of the first two heads, the same list twice of the others.
  CHECK(Read(SmallFile().dump(), "q", 4).channels ==
        std::vector<int16_t>{0, 4, 1, 2, /**/ 7, 6, 5, 4, /**/ 0, 4, 1, 2, /**/ 7, 6, 5, 4});
  CHECK(Read(SmallFile().dump(), "qk", 1).channels == std::vector<int16_t>{0, 4, 0, 4});
}

TEST_CASE("Tables are found by layer and head", "[channel_table]") {
  const TempFolder folder;
  const auto path = folder.path() / "channels.json";
  WriteFile(path, SmallFile().dump());
  const auto table = ReadChannelTable(path, "k", 2, SmallModel());
  REQUIRE(table.ok());
  CHECK((*table)->Head(1, 1)[0] == 1);
  CHECK((*table)->Head(0, 1)[1] == 6);
}

TEST_CASE("A missing file", "[channel_table]") {
  const TempFolder folder;
  const auto table = ReadChannelTable(folder.path() / "none.json", "k", 2, SmallModel());
  CHECK(table.status().code() == StatusCode::kNotFound);
}

TEST_CASE("Files that are not of the model are refused", "[channel_table]") {
  json file = SmallFile();
  file.erase(KeyOf(1, "k"));
  CHECK(ErrorOf(file) == "model.layers.1.self_attn.k_proj is missing");
  CHECK(ErrorOf(file, "q").empty());  // other projections do not matter

  file = SmallFile();
  file[KeyOf(2, "v")] = json::array();
  CHECK(ErrorOf(file) == "'model.layers.2.self_attn.v_proj' is no layer of the model, which has 2");

  const std::string per_head =
      "model.layers.0.self_attn.k_proj must be one list of channels per query head (4) or per KV "
      "head (2)";
  for (const json& wrong : {json(3), json::array(), json({{1, 2}}), json({{1}, {1}, {1}})}) {
    file = SmallFile();
    file[KeyOf(0, "k")] = wrong;
    CHECK(ErrorOf(file) == per_head);
  }
}

TEST_CASE("Lists that are not of the head are refused", "[channel_table]") {
  const std::string where = "model.layers.1.self_attn.k_proj[1] ";
  const auto error_of = [](json list) {
    json file = SmallFile();
    file[KeyOf(1, "k")][1] = std::move(list);
    return ErrorOf(file);
  };
  CHECK(error_of(3) == where + "must be a list of channels");
  CHECK(error_of({0, 8}) == where + "must have channels in [0, 7]");
  CHECK(error_of({0, -1}) == where + "must have channels in [0, 7]");
  CHECK(error_of({0, 1.5}) == where + "must have channels in [0, 7]");
  CHECK(error_of({0, "1"}) == where + "must have channels in [0, 7]");
  CHECK(error_of({5, 3, 5}) == where + "has channel 5 twice");
  CHECK(error_of(json::array({4})) == where + "has 1 channels; 2 are wanted");
  CHECK(ErrorOf(SmallFile(), "q", 5) ==
        "model.layers.0.self_attn.q_proj[0] has 4 channels; 5 are wanted");
}

TEST_CASE("Files that are no JSON object are refused", "[channel_table]") {
  CHECK(Read("[1]", "k", 2).error == "not a JSON object (at byte 0)");
  CHECK(Read("{\"a\": 1, \"a\": 2}", "k", 2).error == "the key 'a' is there twice");
  CHECK(Read("{\"a\": ", "k", 2).error.starts_with("the JSON ends too early"));
}

}  // namespace
}  // namespace gloam
