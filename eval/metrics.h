// Metrics of answers against references: those that RULER and LongBench publish, and exact match.
// Every one is a share from 0 to 1. Pure functions; any thread.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace gloam {

// Share of `references` that `answer` contains, letter case aside (RULER's tasks but QA).
double ContainedShare(std::string_view answer, std::span<const std::string> references);

// 1 when `answer` contains one of `references`, letter case aside (RULER's QA).
double ContainsAny(std::string_view answer, std::span<const std::string> references);

// Lower case, without ASCII punctuation, without the articles a, an, the; the words left (SQuAD).
std::vector<std::string> NormalizedWords(std::string_view text);

// Harmonic mean of precision and recall of the normalised words, each counted as often as it
// occurs (SQuAD, LongBench's question answering).
double TokenF1(std::string_view answer, std::string_view reference);

// Summary-level ROUGE-L, F with beta 1, as the Python package `rouge` 1.0.1 has it, which LongBench
// uses: sentences end at '.', words are separated by white space, and every count is of distinct
// words. 0 where either side has no sentence.
double RougeL(std::string_view answer, std::string_view reference);

// Ratcliff and Obershelp's ratio over code points, to whole per cent: `ratio` of the Python package
// `fuzzywuzzy`, which LongBench uses, on difflib's SequenceMatcher.
double EditSimilarity(std::string_view answer, std::string_view reference);

// LongBench's code completion: edit similarity of the answer's first line that holds neither a
// backtick nor a comment ('#', "//").
double CodeSimilarity(std::string_view answer, std::string_view reference);

// LongBench's retrieval: of the numbers in `answer`, the share equal to the one that follows
// `label` ("Paragraph ") in `reference`. 0 without numbers.
double RetrievalScore(std::string_view answer, std::string_view reference, std::string_view label);

// LongBench's counting: of the numbers in `answer`, the share equal to `reference`.
double CountScore(std::string_view answer, std::string_view reference);

// LongBench's classification: one over the number of classes that `answer` names, when `reference`
// is among them; a class whose name lies inside the reference's does not count.
double ClassificationScore(std::string_view answer, std::string_view reference,
                           std::span<const std::string> classes);

// Without leading and trailing white space.
std::string_view Trim(std::string_view text);

// The first line with something other than white space on it, trimmed; empty where there is none.
std::string_view FirstLine(std::string_view text);

}  // namespace gloam
