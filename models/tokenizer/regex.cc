#include "models/tokenizer/regex.h"

#include <cctype>
#include <cstdint>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace gloam {
namespace {

// Backtracking steps allowed in one match. A legitimate match of these patterns takes a few steps
// a character; 3 MB in one run stay far below.
constexpr uint32_t kMatchLimit = 50'000'000;
// Heap that the interpreter may use when the JIT's stack does not suffice.
constexpr uint32_t kHeapLimitKib = 256 * 1024;
constexpr size_t kJitStackStartBytes = 32 * 1024;
constexpr size_t kJitStackMaxBytes = 1024 * 1024;

// Unicode's White_Space, which is Oniguruma's \s. PCRE2's own also takes U+180E.
constexpr std::string_view kSpaceSet = R"(\t-\r\x{85}\p{Z})";
// Oniguruma's \w, with the superscripts and fractions of Latin-1 (PCRE2 10.42's is \p{L}\p{N}_).
constexpr std::string_view kWordSet =
    R"(\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{B2}\x{B3}\x{B9}\x{BC}-\x{BE}\x{24B6}-\x{24E9})";

// Rewrites one pattern from Oniguruma's syntax to PCRE2's.
class Translator {
 public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  StatusOr<std::string> Run() {
    while (pos_ < in_.size()) {
      const char c = in_[pos_];
      if (c == '\\') {
        GLOAM_RETURN_IF_ERROR(Escape());
      } else if (in_class_) {
        GLOAM_RETURN_IF_ERROR(ClassChar());
      } else if (c == '[') {
        OpenClass();
      } else if (c == '^' || c == '$') {
        // Oniguruma anchors at every line; say so to PCRE2.
        out_ += c == '^' ? "(?m:^)" : "(?m:$)";
        ++pos_;
      } else {
        out_ += c;
        ++pos_;
      }
    }
    return std::move(out_);
  }

 private:
  Status Unsupported(std::string_view what) const {
    return Unimplemented("regular expression '{}': {} at byte {} is not supported", in_, what,
                         pos_);
  }

  void OpenClass() {
    in_class_ = true;
    out_ += in_[pos_++];
    if (pos_ < in_.size() && in_[pos_] == '^') out_ += in_[pos_++];
  }

  Status ClassChar() {
    const char c = in_[pos_];
    if (c == '[') return Unsupported("a set inside a set");
    if (in_.substr(pos_, 2) == "&&") return Unsupported("a set intersection");
    if (c == ']') in_class_ = false;
    out_ += c;
    ++pos_;
    return OkStatus();
  }

  Status Escape() {
    if (pos_ + 1 >= in_.size()) return InvalidArgument("regular expression '{}' ends in \\", in_);
    const char c = in_[pos_ + 1];
    switch (c) {
      case 's':
      case 'w': {
        const std::string_view set = c == 's' ? kSpaceSet : kWordSet;
        out_ += in_class_ ? std::string(set) : fmt::format("[{}]", set);
        break;
      }
      case 'S':
      case 'W':
        if (in_class_) return Unsupported("\\S or \\W inside a set");
        out_ += fmt::format("[^{}]", c == 'S' ? kSpaceSet : kWordSet);
        break;
      case 'u':
        if (pos_ + 6 > in_.size()) return Unsupported("a short \\u");
        out_ += fmt::format("\\x{{{}}}", in_.substr(pos_ + 2, 4));
        pos_ += 6;
        return OkStatus();
      case 'd':
      case 'D':
      case 'p':
      case 'P':
      case 'x':
      case 'n':
      case 'r':
      case 't':
      case 'f':
        out_ += in_.substr(pos_, 2);
        break;
      default:
        // Letters that are left mean different things to the two engines (\h, \R, \Z, ...).
        if (std::isalnum(static_cast<unsigned char>(c))) {
          return Unsupported(fmt::format("\\{}", c));
        }
        out_ += in_.substr(pos_, 2);
    }
    pos_ += 2;
    return OkStatus();
  }

  std::string_view in_;
  std::string out_;
  size_t pos_ = 0;
  bool in_class_ = false;
};

}  // namespace

struct Regex::Code {
  ~Code() { pcre2_code_free(code); }
  pcre2_code* code = nullptr;
};

Regex::Regex(std::unique_ptr<Code> code) : code_(std::move(code)) {}
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;
Regex::~Regex() = default;

StatusOr<Regex> Regex::Compile(std::string_view pattern) {
  GLOAM_ASSIGN_OR_RETURN(const std::string translated, Translator(pattern).Run());
  int error = 0;
  PCRE2_SIZE offset = 0;
  auto code = std::make_unique<Code>();
  code->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                             PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr);
  if (code->code == nullptr) {
    unsigned char message[256];
    pcre2_get_error_message(error, message, sizeof(message));
    return InvalidArgument("regular expression '{}': {}", pattern,
                           reinterpret_cast<const char*>(message));
  }
  // Without JIT support matching is interpreted: slower, the same result.
  pcre2_jit_compile(code->code, PCRE2_JIT_COMPLETE);
  return Regex(std::move(code));
}

std::string Regex::Quote(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x80 && std::ispunct(byte)) out += '\\';
    out += c;
  }
  return out;
}

struct RegexMatcher::State {
  State()
      : data(pcre2_match_data_create(1, nullptr)),
        context(pcre2_match_context_create(nullptr)),
        stack(pcre2_jit_stack_create(kJitStackStartBytes, kJitStackMaxBytes, nullptr)) {
    pcre2_set_match_limit(context, kMatchLimit);
    pcre2_set_heap_limit(context, kHeapLimitKib);
    pcre2_jit_stack_assign(context, nullptr, stack);
  }
  ~State() {
    pcre2_jit_stack_free(stack);
    pcre2_match_context_free(context);
    pcre2_match_data_free(data);
  }
  pcre2_match_data* data;
  pcre2_match_context* context;
  pcre2_jit_stack* stack;
};

RegexMatcher::RegexMatcher() : state_(std::make_unique<State>()) {}
RegexMatcher::~RegexMatcher() = default;

StatusOr<RegexMatcher::Match> RegexMatcher::Find(const Regex& regex, std::string_view text,
                                                 size_t start) {
  const auto match = [&](uint32_t options) {
    return pcre2_match(regex.code_->code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                       start, PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY | options, state_->data,
                       state_->context);
  };
  int rc = match(0);
  if (rc == PCRE2_ERROR_JIT_STACKLIMIT) rc = match(PCRE2_NO_JIT);
  if (rc == PCRE2_ERROR_NOMATCH) return Match{};
  if (rc < 0) {
    unsigned char message[256];
    pcre2_get_error_message(rc, message, sizeof(message));
    return ResourceExhausted("the pre-tokenizer gave up on a text of {} bytes: {}", text.size(),
                             reinterpret_cast<const char*>(message));
  }
  const PCRE2_SIZE* span = pcre2_get_ovector_pointer(state_->data);
  return Match{span[0], span[1], true};
}

}  // namespace gloam
