// Work lists of prefill attention: every tile once, even loads, bounds that Reserve relies on.
#include "kernels/cuda/prefill/plan.h"

#include <algorithm>
#include <map>
#include <random>
#include <tuple>

#include "catch2/catch.hpp"
#include "kernels/paged_kv.h"

namespace gloam::cuda {
namespace {

constexpr uint32_t kSeed = 20261125;

std::vector<PrefillSeq> RandomSeqs(std::mt19937& rng, int max_tokens) {
  std::vector<PrefillSeq> seqs;
  int row = 0;
  for (int n = 1 + static_cast<int>(rng() % 6); n > 0; --n) {
    const int tokens = 2 + static_cast<int>(rng() % max_tokens);
    const int earlier = rng() % 2 == 0 ? 0 : static_cast<int>(rng() % 20000);
    seqs.push_back({.table_begin = n, .q_begin = row, .q_len = tokens, .kv_len = tokens + earlier});
    row += tokens;
  }
  return seqs;
}

PrefillShape RandomShape(std::mt19937& rng) {
  PrefillShape shape;
  shape.num_kv_heads = 1 + static_cast<int>(rng() % 8);
  shape.num_heads = shape.num_kv_heads * (1 + static_cast<int>(rng() % 8));
  shape.head_dim = rng() % 2 == 0 ? 64 : 128;
  shape.window_left = rng() % 3 == 0 ? static_cast<int>(rng() % 5000) : -1;
  shape.num_sms = 132;
  return shape;
}

int CeilDiv(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

TEST_CASE("prefill plan: what queries see has a place in the workspace") {
  std::mt19937 rng(kSeed);
  for (int round = 0; round < 200; ++round) {
    const std::vector<PrefillSeq> seqs = RandomSeqs(rng, 4000);
    const int window_left = RandomShape(rng).window_left;
    const int num_blocks = CeilDiv(24000, kBlockTokens) + static_cast<int>(rng() % 500);
    const std::vector<PlacedBlocks> placed = PlaceBlocks(seqs, window_left, num_blocks);
    REQUIRE(placed.size() == seqs.size());
    int end = 0;  // of the group so far
    for (size_t i = 0; i < seqs.size(); ++i) {
      const PlacedBlocks& blocks = placed[i];
      const int first_query = seqs[i].kv_len - seqs[i].q_len;
      const int first_seen = window_left < 0 ? 0 : std::max(0, first_query - window_left);
      CHECK(blocks.first == first_seen / kBlockTokens);
      CHECK(blocks.first + blocks.count == CeilDiv(seqs[i].kv_len, kBlockTokens));
      CHECK(blocks.place + blocks.count <= num_blocks);
      const bool fits = end + blocks.count <= num_blocks;
      CHECK(blocks.place == (fits ? end : 0));
      end = blocks.place + blocks.count;
    }
  }
}

TEST_CASE("prefill plan: FA3 has each tile of each head once, evenly spread") {
  std::mt19937 rng(kSeed);
  for (int round = 0; round < 100; ++round) {
    const PrefillShape shape = RandomShape(rng);
    const std::vector<PrefillSeq> seqs = RandomSeqs(rng, 4000);
    const Fa3Plan plan = PlanFa3(seqs, shape);
    REQUIRE(plan.begins.size() == 133);
    REQUIRE(plan.begins.back() == static_cast<int>(plan.works.size()));

    std::map<std::tuple<int, int, int>, int> seen;
    std::vector<int64_t> loads;
    int64_t most_of_one = 0;
    for (int block = 0; block < shape.num_sms; ++block) {
      int64_t load = 0;
      for (int i = plan.begins[block]; i < plan.begins[block + 1]; ++i) {
        const Fa3Work& work = plan.works[i];
        ++seen[{work.index, work.head, work.tile}];
        const PrefillSeq& seq = seqs[work.index];
        const int rows = Fa3TileRows(shape.head_dim);
        int64_t tokens = seq.kv_len - seq.q_len + std::min(seq.q_len, (work.tile + 1) * rows);
        if (shape.window_left >= 0) tokens = std::min<int64_t>(tokens, shape.window_left + rows);
        load += tokens + 2 * rows;
        most_of_one = std::max(most_of_one, tokens + 2 * rows);
      }
      loads.push_back(load);
    }
    size_t expected = 0;
    int64_t tokens = 0;
    for (const PrefillSeq& seq : seqs) {
      expected += int64_t{CeilDiv(seq.q_len, Fa3TileRows(shape.head_dim))} * shape.num_heads;
      tokens += seq.q_len;
    }
    CHECK(seen.size() == expected);
    CHECK(plan.works.size() == expected);
    CHECK(static_cast<int64_t>(expected) <=
          MaxFa3Works(tokens, static_cast<int64_t>(seqs.size()), shape.num_heads, shape.head_dim));
    const auto [least, most] = std::minmax_element(loads.begin(), loads.end());
    CHECK(*most - *least <= most_of_one);
  }
}

TEST_CASE("prefill plan: FA2 has each tile and piece once, and splits within bounds") {
  std::mt19937 rng(kSeed);
  for (int round = 0; round < 200; ++round) {
    const PrefillShape shape = RandomShape(rng);
    const std::vector<PrefillSeq> seqs = RandomSeqs(rng, round % 2 == 0 ? 60 : 4000);
    const Fa2Plan plan = PlanFa2(seqs, shape);
    const int group = shape.num_heads / shape.num_kv_heads;
    std::map<std::tuple<int, int, int>, int> seen;
    for (const Fa2Work& work : plan.works) ++seen[{work.index, work.tile, work.piece}];
    size_t expected = 0;
    int64_t piece_rows = 0;
    for (size_t i = 0; i < seqs.size(); ++i) {
      const int64_t tiles = CeilDiv(int64_t{seqs[i].q_len} * group, plan.tile_rows);
      expected += tiles * plan.num_pieces[i];
      piece_rows += int64_t{seqs[i].q_len} * plan.num_pieces[i] * shape.num_heads;
      const int64_t visible =
          shape.window_left < 0
              ? seqs[i].kv_len
              : std::min<int64_t>(seqs[i].kv_len, shape.window_left + plan.tile_rows);
      if (plan.piece_tokens > 0) {
        CHECK(int64_t{plan.piece_tokens} * plan.num_pieces[i] >= visible);
      } else {
        CHECK(plan.num_pieces[i] == 1);
      }
    }
    CHECK(seen.size() == expected);
    CHECK(plan.works.size() == expected);
    if (plan.piece_tokens > 0) {
      CHECK(static_cast<int64_t>(expected) * shape.num_kv_heads <= MaxSplitBlocks(132));
      CHECK(piece_rows <= int64_t{kMaxFa2TileRows} * MaxSplitBlocks(132));
    }
  }
}

TEST_CASE("prefill plan: few rows go to FA2, many to FA3") {
  const PrefillShape shape = {.num_heads = 32, .num_kv_heads = 8, .head_dim = 128, .num_sms = 132};
  const std::vector<PrefillSeq> mixed = {{0, 0, 2048, 2048}, {1, 2048, 20, 4000}};
  const PrefillSplit both = SplitPrefill(mixed, shape);
  CHECK(both.fa3.size() == 1);
  CHECK(both.fa2.size() == 1);
  // 128 rows make 32 thread blocks of 132.
  const std::vector<PrefillSeq> small = {{0, 0, 128, 9000}};
  CHECK(SplitPrefill(small, shape).fa2.size() == 1);
}

}  // namespace
}  // namespace gloam::cuda
