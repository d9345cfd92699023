// Every fault that a GGUF file can have, each in a file made for it.
#include "models/gguf.h"

#include <functional>
#include <limits>
#include <memory>
#include <string>

#include "catch2/catch.hpp"
#include "models/gguf_model_file.h"
#include "tests/models/test_model_writer.h"

namespace gloam {
namespace {

using test::ByteWriter;
using test::GgufWriter;
using test::TinyModel;

// A copy in memory of exactly the file's size, so that a sanitizer sees a read past its end.
struct FileBytes {
  explicit FileBytes(const std::string& text)
      : data(new std::byte[text.size()]), size(text.size()) {
    std::copy_n(reinterpret_cast<const std::byte*>(text.data()), text.size(), data.get());
  }
  std::span<const std::byte> span() const { return {data.get(), size}; }
  std::unique_ptr<std::byte[]> data;
  size_t size;
};

std::string ParseError(const std::string& file) {
  const FileBytes bytes(file);
  const auto parsed = Gguf::Parse(bytes.span(), "f.gguf");
  return parsed.ok() ? "ok" : MessageOf(parsed.status());
}

std::string ModelError(const std::string& file) {
  const FileBytes bytes(file);
  const auto model = ParseGgufModel(bytes.span(), "f.gguf");
  return model.ok() ? "ok" : MessageOf(model.status());
}

// One line with the file, what is expected of it, and the offset where `offset` says so.
void CheckMessage(const std::string& message, const std::string& part) {
  CAPTURE(message);
  CHECK(message.starts_with("f.gguf: "));
  CHECK(message.find('\n') == std::string::npos);
  CHECK(message.find(part) != std::string::npos);
}

void CheckParseError(const std::string& file, const std::string& part) {
  const std::string message = ParseError(file);
  CheckMessage(message, part);
  CHECK(message.find("(at byte ") != std::string::npos);
}

// Magic, version and counts, to go on from.
ByteWriter Header(uint64_t num_tensors, uint64_t num_entries) {
  return ByteWriter().Raw("GGUF").Add<uint32_t>(3).Add(num_tensors).Add(num_entries);
}

// A file whose one metadata key "k" has this type and payload.
std::string WithValue(uint32_t type, std::string_view payload) {
  GgufWriter out;
  out.Value("k", type, payload);
  return out.Build();
}

// A file whose one tensor "t" has these fields, and `data_bytes` bytes of data.
std::string WithTensor(const std::vector<uint64_t>& dims, uint32_t type, uint64_t offset,
                       size_t data_bytes) {
  ByteWriter out = Header(1, 0);
  out.String("t").Add<uint32_t>(dims.size());
  for (const uint64_t dim : dims) out.Add(dim);
  return out.Add(type).Add(offset).PadTo(32).Raw(std::string(data_bytes, '\0')).bytes();
}

TEST_CASE("GGUF header faults", "[gguf]") {
  CheckParseError("", "magic: the file is truncated");
  CheckParseError("GG", "magic: the file is truncated");
  CheckParseError("PK\3\4 and more", "magic: not a GGUF file");
  CheckParseError("GGUF", "version: the file is truncated");
  CheckParseError(ByteWriter().Raw("GGUF").Add<uint32_t>(1).bytes(), "version: 1 is not supported");
  CheckParseError(ByteWriter().Raw("GGUF").Add<uint32_t>(4).bytes(), "version: 4 is not supported");
  CheckParseError(ByteWriter().Raw("GGUF").Add<uint32_t>(0x03000000).bytes(), "big-endian");
  CheckParseError(Header(~0ull, 0).bytes(),
                  "tensor count: 18446744073709551615 is more than the file can hold (at byte 8)");
  CheckParseError(Header(0, ~0ull).bytes(),
                  "metadata count: 18446744073709551615 is more than the file can hold (at byte "
                  "16)");
  CheckParseError(Header(0, 1).Raw(std::string(13, '\0')).bytes(), "metadata count: 1 is more");
}

TEST_CASE("GGUF metadata faults", "[gguf]") {
  const std::string filler(64, '\0');
  CheckParseError(Header(0, 1).Add(~0ull).Raw(filler).bytes(),
                  "metadata key 0: length 18446744073709551615 is beyond the end of the file (at "
                  "byte 24)");
  CheckParseError(Header(0, 1).String("").Raw(filler).bytes(), "metadata key 0: the key is empty");
  CheckParseError(Header(0, 1).String(std::string(65536, 'k')).Raw(filler).bytes(),
                  "metadata key 0: length 65536 is over the format's limit of 65535");
  GgufWriter twice;
  twice.Int("k", 1);
  twice.Int("k", 2);
  CheckParseError(twice.Build(), "key 'k': the key is there twice");
  CheckParseError(WithValue(13, filler), "key 'k': 13 is not a value type");
  CheckParseError(WithValue(~0u, filler), "is not a value type");
  CheckParseError(WithValue(7, "\2"), "key 'k': a bool must be 0 or 1");
  CheckParseError(WithValue(8, ByteWriter().Add(~0ull).Raw(filler).bytes()),
                  "key 'k': length 18446744073709551615 is beyond the end");
  CheckParseError(Header(0, 1).String("k\n\"").Add<uint32_t>(99).Raw(filler).bytes(), "x0a");
}

TEST_CASE("GGUF array faults", "[gguf]") {
  const std::string filler(64, '\0');
  const auto array = [&filler](uint32_t element_type, uint64_t count) {
    return WithValue(9, ByteWriter().Add(element_type).Add(count).Raw(filler).bytes());
  };
  for (const uint32_t type : {0u, 4u, 8u, 9u, 10u}) {
    CAPTURE(type);
    CheckParseError(array(type, ~0ull), "elements are more than the file can hold");
    CheckParseError(array(type, (~0ull >> 3) + 2), "elements are more than the file can hold");
  }
  CheckParseError(array(77, 1), "key 'k': 77 is not a value type");
  CheckParseError(WithValue(9, ByteWriter().Add<uint32_t>(7).Add<uint64_t>(1).Raw("\3").bytes()),
                  "a bool must be 0 or 1");
  // An array of an array of ... of one byte.
  const auto nested = [](int depth) {
    ByteWriter out;
    for (int i = 1; i < depth; ++i) out.Add<uint32_t>(9).Add<uint64_t>(1);
    return WithValue(9, out.Add<uint32_t>(0).Add<uint64_t>(1).Raw("x").bytes());
  };
  CHECK(ParseError(nested(4)) == "ok");
  CheckParseError(nested(5), "arrays nest deeper than 4");
  CheckParseError(nested(5000), "arrays nest deeper than 4");
}

TEST_CASE("GGUF alignment faults", "[gguf]") {
  for (const uint32_t bad : {0u, 1u, 4u, 12u, 33u, 0x80000000u}) {
    CAPTURE(bad);
    GgufWriter out;
    out.Int("general.alignment", bad);
    CheckParseError(out.Build(), "key 'general.alignment' is ");
  }
  GgufWriter wrong_type;
  wrong_type.String("general.alignment", "32");
  CheckParseError(wrong_type.Build(), "key 'general.alignment' is of type string");
}

TEST_CASE("GGUF tensor faults", "[gguf]") {
  CHECK(ParseError(WithTensor({32}, 0, 0, 128)) == "ok");
  CheckParseError(WithTensor({}, 0, 0, 128), "tensor 't': 0 dimensions");
  CheckParseError(WithTensor({1, 1, 1, 1, 1}, 0, 0, 128), "tensor 't': 5 dimensions");
  CheckParseError(WithTensor({0}, 0, 0, 128), "dimension 0 is 0");
  CheckParseError(WithTensor({8, ~0ull}, 0, 0, 128), "dimension 1 is -1");
  CheckParseError(WithTensor({1ull << 32, 1ull << 32}, 0, 0, 128), "number of elements overflows");
  CheckParseError(WithTensor({1ull << 62}, 0, 0, 128), "number of bytes overflows");
  CheckParseError(WithTensor({32}, 4, 0, 128), "4 is not a tensor type");
  CheckParseError(WithTensor({32}, ~0u, 0, 128), "is not a tensor type");
  CheckParseError(WithTensor({256}, 10, 0, 128), "type Q2_K is not supported");
  CheckParseError(WithTensor({48}, 8, 0, 128), "do not split into Q8_0's blocks of 32");
  CheckParseError(WithTensor({32}, 0, 8, 256), "offset 8 is not a multiple of the alignment 32");
  CheckParseError(WithTensor({32}, 0, 0, 127), "beyond the end of the file");
  CheckParseError(WithTensor({32}, 0, 32, 128), "beyond the end of the file");
  CheckParseError(WithTensor({32}, 0, ~0ull - 31, 128), "beyond the end of the file");
  CheckParseError(Header(1, 0).Add<uint64_t>(0).Raw(std::string(64, '\0')).bytes(),
                  "name of tensor 0: the name is empty");
  CheckParseError(Header(1, 0).String(std::string(65, 't')).Raw(std::string(64, '\0')).bytes(),
                  "name of tensor 0: length 65 is over the format's limit of 64");
  GgufWriter twice;
  twice.Tensor("t", {8}, 0, std::string(32, '\0'));
  twice.Tensor("t", {8}, 0, std::string(32, '\0'));
  CheckParseError(twice.Build(), "tensor 't': the tensor is there twice");

  ByteWriter overlap = Header(2, 0);
  overlap.String("a").Add<uint32_t>(1).Add<uint64_t>(16).Add<uint32_t>(0).Add<uint64_t>(0);
  overlap.String("b").Add<uint32_t>(1).Add<uint64_t>(8).Add<uint32_t>(0).Add<uint64_t>(32);
  CheckParseError(overlap.PadTo(32).Raw(std::string(128, '\0')).bytes(),
                  "tensor 'b': its data overlaps that of 'a'");
}

TEST_CASE("GGUF values of every type are read, and misuse of them is named", "[gguf]") {
  GgufWriter out;
  out.Value("u8", 0, ByteWriter().Add<uint8_t>(200).bytes());
  out.Value("i8", 1, ByteWriter().Add<int8_t>(-3).bytes());
  out.Value("u16", 2, ByteWriter().Add<uint16_t>(60000).bytes());
  out.Value("i16", 3, ByteWriter().Add<int16_t>(-300).bytes());
  out.Value("i32", 5, ByteWriter().Add<int32_t>(-70000).bytes());
  out.Value("u64", 10, ByteWriter().Add(~0ull).bytes());
  out.Value("i64", 11, ByteWriter().Add<int64_t>(-5).bytes());
  out.Value("f64", 12, ByteWriter().Add(0.5).bytes());
  out.Float("f32", 1.5f);
  out.Bool("bool", true);
  out.String("text", "hi");
  out.Ints("ints", {1, 2, 300});
  out.Floats("floats", {0.25f, -1.0f});
  out.Strings("texts", {"a", "", "bcd"});
  const FileBytes bytes(out.Build());
  const auto gguf = Gguf::Parse(bytes.span(), "f.gguf");
  REQUIRE(gguf.ok());
  constexpr int64_t kMin = std::numeric_limits<int64_t>::min();
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  CHECK(*gguf->GetInt("u8", kMin, kMax) == 200);
  CHECK(*gguf->GetInt("i8", kMin, kMax) == -3);
  CHECK(*gguf->GetInt("u16", kMin, kMax) == 60000);
  CHECK(*gguf->GetInt("i16", kMin, kMax) == -300);
  CHECK(*gguf->GetInt("i32", kMin, kMax) == -70000);
  CHECK(*gguf->GetInt("u64", kMin, kMax) == kMax);
  CHECK(*gguf->GetInt("i64", kMin, kMax) == -5);
  CHECK(*gguf->GetFloat("f64") == 0.5f);
  CHECK(*gguf->GetFloat("f32") == 1.5f);
  CHECK(*gguf->GetBool("bool"));
  CHECK(*gguf->GetString("text") == "hi");
  CHECK(*gguf->GetInts("ints", 0, 300) == std::vector<int64_t>{1, 2, 300});
  CHECK(*gguf->GetFloats("floats") == std::vector<float>{0.25f, -1.0f});
  CHECK(*gguf->GetStrings("texts") == std::vector<std::string>{"a", "", "bcd"});
  CHECK(*gguf->GetIntOr("absent", 7, 0, 9) == 7);

  CheckMessage(MessageOf(gguf->GetInt("absent", 0, 1).status()), "key 'absent' is missing");
  CheckMessage(MessageOf(gguf->GetInt("text", 0, 1).status()), "is of type string");
  CheckMessage(MessageOf(gguf->GetInt("u8", 0, 100).status()), "is 200; it must be in [0, 100]");
  CheckMessage(MessageOf(gguf->GetString("f32").status()), "is of type float32; it must be string");
  CheckMessage(MessageOf(gguf->GetStrings("ints").status()), "elements of type int32");
  CheckMessage(MessageOf(gguf->GetInts("ints", 0, 9).status()), "has 300 at index 2");
  CheckMessage(MessageOf(gguf->GetInts("floats", 0, 9).status()), "elements of type float32");
}

TEST_CASE("A GGUF file cut at any byte, or with any byte changed, is refused or read", "[gguf]") {
  const TinyModel tiny{.num_layers = 1,
                       .hidden_size = 8,
                       .intermediate_size = 8,
                       .num_heads = 2,
                       .num_kv_heads = 1,
                       .head_dim = 4};
  const std::string file = test::TinyGgufWriter(tiny).Build();
  REQUIRE(ModelError(file) == "ok");
  int refused = 0;
  for (size_t size = 0; size < file.size(); ++size) {
    const std::string message = ModelError(file.substr(0, size));
    if (message != "ok") ++refused;
  }
  CHECK(refused == static_cast<int>(file.size()));  // the last byte belongs to a tensor
  // The first part of the file is what the parser reads.
  for (size_t at = 0; at < file.size() - 9000; ++at) {
    std::string changed = file;
    changed[at] = static_cast<char>(changed[at] ^ (1 << (at % 8)));
    const std::string message = ModelError(changed);
    if (message.find('\n') != std::string::npos) FAIL("not one line: " << message);
  }
}

}  // namespace
}  // namespace gloam
