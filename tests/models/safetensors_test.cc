// Every fault that a safetensors file can have, each in a file made for it.
#include "models/safetensors.h"

#include <algorithm>
#include <memory>
#include <string>

#include "catch2/catch.hpp"
#include "tests/models/test_model_writer.h"

namespace gloam {
namespace {

using test::ByteWriter;
using test::SafetensorsWriter;

std::string ParseError(const std::string& file) {
  const auto bytes = std::make_unique<std::byte[]>(file.size());  // exact, for sanitizers
  std::copy_n(reinterpret_cast<const std::byte*>(file.data()), file.size(), bytes.get());
  const auto parsed = Safetensors::Parse({bytes.get(), file.size()}, "f.safetensors");
  return parsed.ok() ? "ok" : MessageOf(parsed.status());
}

void CheckError(const std::string& file, const std::string& part) {
  const std::string message = ParseError(file);
  CAPTURE(message);
  CHECK(message.starts_with("f.safetensors: "));
  CHECK(message.find('\n') == std::string::npos);
  CHECK(message.find(part) != std::string::npos);
}

// One tensor "t" whose header entry is `entry`, over 16 bytes of data.
void CheckEntry(const std::string& entry, const std::string& part) {
  CheckError(SafetensorsWriter::Raw("{\"t\":" + entry + "}", std::string(16, '\0')), part);
}

TEST_CASE("Good safetensors files are read", "[safetensors]") {
  SafetensorsWriter out;
  out.Tensor("b", {2, 3}, "F32", std::string(24, '\1'));
  out.Tensor("a", {4}, "BF16", std::string(8, '\2'));
  out.Tensor("empty", {0, 5}, "F16", "");
  const std::string file = out.Build();
  const auto bytes = std::as_bytes(std::span(file));
  const auto parsed = Safetensors::Parse(bytes, "f.safetensors");
  REQUIRE(parsed.ok());
  REQUIRE(parsed->tensors().size() == 3);
  const SafetensorsTensor& first = parsed->tensors()[0];
  CHECK(first.name == "b");
  CHECK(first.shape == std::vector<int64_t>{2, 3});
  CHECK(first.type == WeightType::kF32);
  CHECK(first.data.size() == 24);
  CHECK(first.data.data() == bytes.data() + first.offset);
  CHECK(first.data[0] == std::byte{1});
  CHECK(parsed->tensors()[1].data[0] == std::byte{2});
  CHECK(ParseError(SafetensorsWriter::Raw(R"({"__metadata__":{"format":"pt"}})", "")) == "ok");
}

TEST_CASE("Safetensors header faults", "[safetensors]") {
  CheckError("", "header length: the file is truncated");
  CheckError("1234567", "header length: the file is truncated");
  CheckError(ByteWriter().Add<uint64_t>(0).bytes(), "header length: 0 is not in [2, 100000000]");
  CheckError(ByteWriter().Add<uint64_t>(100'000'001).bytes(), "header length: 100000001 is not in");
  CheckError(ByteWriter().Add(~0ull).bytes(), "header length: 18446744073709551615 is not in");
  CheckError(ByteWriter().Add<uint64_t>(3).Raw("{}").bytes(), "3 is beyond the end of the file");
  CheckError(SafetensorsWriter::Raw("[]", ""), "header: not a JSON object");
  CheckError(SafetensorsWriter::Raw("{\"a\"", ""), "header: the JSON ends too early");
  CheckError(SafetensorsWriter::Raw("{]", ""), "header: not valid JSON (at byte 1)");
  CheckError(SafetensorsWriter::Raw("{\"\xff\":1}", ""), "header: not valid JSON");
  CheckError(SafetensorsWriter::Raw("{\"a\":" + std::string(100000, '[') + "}", ""),
             "nests deeper than 64");
  const std::string entry = R"("t":{"dtype":"F32","shape":[4],"data_offsets":[0,16]})";
  CheckError(SafetensorsWriter::Raw("{" + entry + "," + entry + "}", std::string(16, '\0')),
             "the key 't' is there twice");
}

TEST_CASE("Safetensors tensor faults", "[safetensors]") {
  CheckEntry("7", "tensor 't' must be an object");
  CheckEntry(R"({"shape":[4],"data_offsets":[0,16]})", "tensor 't': dtype is missing");
  CheckEntry(R"({"dtype":7,"shape":[4],"data_offsets":[0,16]})", "dtype must be a string");
  CheckEntry(R"({"dtype":"I64","shape":[2],"data_offsets":[0,16]})", "tensor 't': dtype is 'I64'");
  CheckEntry(R"({"dtype":"F32","data_offsets":[0,16]})", "shape must be an array");
  CheckEntry(R"({"dtype":"F32","shape":[-4],"data_offsets":[0,16]})", "shape must hold integers");
  CheckEntry(R"({"dtype":"F32","shape":[1.5],"data_offsets":[0,16]})", "shape must hold integers");
  CheckEntry(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]})",
             "shape overflows");
  CheckEntry(R"({"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,16]})",
             "shape overflows");
  CheckEntry(R"({"dtype":"F32","shape":[4],"data_offsets":[0]})", "must be [begin, end]");
  CheckEntry(R"({"dtype":"F32","shape":[4],"data_offsets":[16,0]})", "[16, 0] run backwards");
  CheckEntry(R"({"dtype":"F32","shape":[3],"data_offsets":[0,16]})",
             "span 16 bytes; shape and dtype need 12");
  CheckEntry(R"({"dtype":"F32","shape":[3],"data_offsets":[0,12]})",
             "4 bytes follow the last tensor's data");
  CheckEntry(R"({"dtype":"F32","shape":[5],"data_offsets":[0,20]})",
             "ends 20 bytes into the tensor data, of which the file holds 16");
  CheckEntry(R"({"dtype":"F32","shape":[3],"data_offsets":[4,16]})", "leaves a hole before it");
  CheckEntry(R"({"dtype":"F32","shape":[0],"data_offsets":[18446744073709551615,)"
             R"(18446744073709551615]})",
             "leaves a hole before it");
  CheckError(SafetensorsWriter::Raw(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},)"
                                    R"("b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})",
                                    std::string(16, '\0')),
             "tensor 'b': its data overlaps the tensor before it");
  CheckError(
      SafetensorsWriter::Raw(R"({"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}} )", "xx"),
      "not aligned");
}

TEST_CASE("A safetensors file cut or changed at any byte is refused or read", "[safetensors]") {
  SafetensorsWriter out;
  out.Tensor("model.norm.weight", {2, 2}, "F32", std::string(16, '\1'));
  out.Tensor("b", {4}, "BF16", std::string(8, '\2'));
  const std::string file = out.Build();
  REQUIRE(ParseError(file) == "ok");
  for (size_t size = 0; size < file.size(); ++size) {
    CAPTURE(size);
    CHECK(ParseError(file.substr(0, size)) != "ok");
  }
  for (size_t at = 0; at < file.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string changed = file;
      changed[at] = static_cast<char>(changed[at] ^ (1 << bit));
      CHECK(ParseError(changed).find('\n') == std::string::npos);
    }
  }
}

}  // namespace
}  // namespace gloam
