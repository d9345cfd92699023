#include "eval/words.h"

#include <algorithm>

#include "fmt/format.h"

namespace gloam {
namespace {

constexpr std::string_view kAdjectives[] = {
    "amber",   "ancient", "bitter", "bold",  "brave",   "brief",   "bright",  "broken",  "calm",
    "careful", "cheap",   "clever", "cold",  "common",  "crimson", "curious", "dark",    "deep",
    "distant", "dusty",   "eager",  "early", "empty",   "famous",  "fierce",  "foreign", "fragile",
    "frozen",  "gentle",  "golden", "grand", "green",   "hidden",  "hollow",  "honest",  "humble",
    "idle",    "jolly",   "keen",   "late",  "lonely",  "loud",    "lucky",   "mellow",  "modern",
    "narrow",  "noble",   "odd",    "pale",  "patient", "plain",   "polite",  "proud",   "quick",
    "quiet",   "rapid",   "rare",   "rough", "royal",   "rusty",   "secret",  "sharp",   "silent",
    "silver",  "slow",    "smooth", "soft",  "stern",   "strange", "sturdy",  "sudden",  "tall",
    "tender",  "tidy",    "tiny",   "tired", "vast",    "violet",  "warm",    "wild"};

constexpr std::string_view kNouns[] = {
    "anchor",  "apple",    "arrow",   "attic",    "badge",    "bakery",  "barrel",  "basket",
    "beacon",  "bell",     "bishop",  "blanket",  "bottle",   "branch",  "bridge",  "bucket",
    "butcher", "cabin",    "camera",  "candle",   "canyon",   "captain", "carpet",  "castle",
    "cellar",  "chapel",   "cherry",  "circus",   "clock",    "cloud",   "coast",   "collar",
    "copper",  "corner",   "cottage", "cotton",   "cradle",   "crystal", "curtain", "desert",
    "diamond", "doctor",   "dragon",  "drawer",   "drum",     "eagle",   "engine",  "farmer",
    "feather", "ferry",    "fiddle",  "forest",   "fountain", "fox",     "furnace", "garden",
    "gate",    "giant",    "glacier", "glove",    "goose",    "granite", "guitar",  "hammer",
    "harbour", "harvest",  "hedge",   "helmet",   "horizon",  "hotel",   "island",  "jacket",
    "jewel",   "journal",  "kettle",  "kitchen",  "ladder",   "lantern", "lemon",   "letter",
    "library", "lion",     "lizard",  "magnet",   "maple",    "market",  "meadow",  "mirror",
    "monkey",  "mountain", "museum",  "needle",   "nest",     "oak",     "ocean",   "orchard",
    "orange",  "otter",    "oven",    "painter",  "palace",   "paper",   "parrot",  "pepper",
    "piano",   "pillow",   "pilot",   "planet",   "pocket",   "pond",    "pony",    "potato",
    "prison",  "pulley",   "puppet",  "rabbit",   "radio",    "river",   "rocket",  "saddle",
    "sailor",  "school",   "shadow",  "shovel",   "signal",   "spider",  "station", "statue",
    "stream",  "summer",   "sword",   "tailor",   "teacher",  "temple",  "thunder", "ticket",
    "tiger",   "tower",    "tractor", "treasure", "trumpet",  "tunnel",  "turtle",  "valley",
    "velvet",  "village",  "violin",  "wagon",    "walnut",   "weaver",  "whistle", "window"};

constexpr std::string_view kVerbs[] = {
    "admired", "avoided", "borrowed", "brought", "carried",   "crossed",    "described", "followed",
    "forgot",  "found",   "guarded",  "ignored", "inherited", "mended",     "mentioned", "missed",
    "noticed", "painted", "praised",  "reached", "recalled",  "remembered", "repaired",  "sketched",
    "sold",    "studied", "trusted",  "visited", "watched",   "welcomed"};

constexpr std::string_view kCircumstances[] = {
    "before the rain came",       "at the end of the week",   "without a word",
    "as the old stories tell",    "on the way to the coast",  "in spite of the cold",
    "while the others slept",     "for the second time",      "when the lamps were lit",
    "with more care than needed", "after a long discussion",  "although nobody had asked",
    "during the first winter",    "not far from the station", "until the letters stopped",
    "just as the book had said"};

constexpr std::string_view kOpenings[] = {"",
                                          "Later, ",
                                          "In those days, ",
                                          "As a rule, ",
                                          "Once more, ",
                                          "Oddly enough, ",
                                          "That year, ",
                                          "Of course, ",
                                          "By then, ",
                                          "At last, ",
                                          "Some say that ",
                                          "Meanwhile, "};

constexpr std::string_view kRepeated[] = {"The lane runs past the mill.",
                                          "The water is clear and slow.", "A cart goes by at noon.",
                                          "The gate stands open.", "Then all is as it was."};

std::string Upper(std::string text) {
  if (!text.empty() && text[0] >= 'a' && text[0] <= 'z') text[0] = static_cast<char>(text[0] - 32);
  return text;
}

}  // namespace

std::span<const std::string_view> Adjectives() { return kAdjectives; }
std::span<const std::string_view> Nouns() { return kNouns; }

std::string NameMaker::Next() {
  const size_t num_pairs = std::size(kAdjectives) * std::size(kNouns);
  for (;;) {
    std::string name = fmt::format("{}-{}", random_.Pick(kAdjectives), random_.Pick(kNouns));
    if (used_.size() > num_pairs / 2) name += fmt::format("-{}", random_.Pick(kNouns));
    const auto at = std::lower_bound(used_.begin(), used_.end(), name);
    if (at != used_.end() && *at == name) continue;
    used_.insert(at, name);
    return name;
  }
}

std::vector<std::string> DistinctWords(Random& random, int count) {
  std::vector<std::string> words;
  for (const auto& list : {Adjectives(), Nouns(), std::span<const std::string_view>(kVerbs)}) {
    words.insert(words.end(), list.begin(), list.end());
  }
  random.Shuffle(words);
  NameMaker names(random);
  while (static_cast<int>(words.size()) < count) words.push_back(names.Next());
  words.resize(static_cast<size_t>(count));
  return words;
}

std::string ProseSentence(Random& random) {
  std::string sentence =
      fmt::format("{}the {} {} {} the {} {} {}.", random.Pick(kOpenings), random.Pick(kAdjectives),
                  random.Pick(kNouns), random.Pick(kVerbs), random.Pick(kAdjectives),
                  random.Pick(kNouns), random.Pick(kCircumstances));
  return Upper(std::move(sentence));
}

std::string_view RepeatedSentence(int i) {
  return kRepeated[static_cast<size_t>(i) % std::size(kRepeated)];
}

std::string RandomDigits(Random& random, int count) {
  std::string digits(1, static_cast<char>('1' + random.Below(9)));
  while (static_cast<int>(digits.size()) < count) {
    digits += static_cast<char>('0' + random.Below(10));
  }
  return digits;
}

std::string RandomUuid(Random& random) {
  std::string uuid;
  for (const int length : {8, 4, 4, 4, 12}) {
    if (!uuid.empty()) uuid += '-';
    for (int i = 0; i < length; ++i) uuid += "0123456789abcdef"[random.Below(16)];
  }
  return uuid;
}

}  // namespace gloam
