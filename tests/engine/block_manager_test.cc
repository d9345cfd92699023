#include "engine/block_manager.h"

#include <algorithm>
#include <map>
#include <memory>
#include <random>

#include "catch2/catch.hpp"

namespace gloam {
namespace {

std::vector<int32_t> Iota(int n, int first = 0) {
  std::vector<int32_t> tokens(n);
  for (int i = 0; i < n; ++i) tokens[i] = first + i;
  return tokens;
}

void RequireIntegrity(const BlockManager& manager, std::vector<const BlockTable*> tables) {
  const Status status = manager.CheckIntegrity(tables);
  INFO(status.ToString());
  REQUIRE(status.ok());
}

TEST_CASE("blocks are handed out, all or none, and come back") {
  BlockManager manager(4, true);
  BlockTable a, b;
  REQUIRE(manager.Grow(a, 33));
  CHECK(a.blocks == std::vector<int32_t>{0, 1, 2});
  CHECK(manager.num_in_use() == 3);
  CHECK_FALSE(manager.Grow(b, 17));
  CHECK(b.blocks.empty());
  REQUIRE(manager.Grow(b, 16));
  REQUIRE(manager.Grow(a, 48));  // room is there already
  CHECK(a.blocks.size() == 3);
  RequireIntegrity(manager, {&a, &b});
  manager.Release(a);
  manager.Release(b);
  CHECK(manager.num_in_use() == 0);
  RequireIntegrity(manager, {});
}

TEST_CASE("a prefix is found in full blocks, without its last token") {
  BlockManager manager(8, true);
  const std::vector<int32_t> tokens = Iota(40);
  BlockTable a;
  REQUIRE(manager.Grow(a, 40));
  manager.CommitFullBlocks(a, tokens, 31);
  CHECK(manager.FindPrefix(tokens).num_tokens() == 16);
  manager.CommitFullBlocks(a, tokens, 40);
  CHECK(manager.FindPrefix(tokens).num_tokens() == 32);
  CHECK(manager.FindPrefix(Iota(32)).num_tokens() == 16);  // token 31 must be computed
  CHECK(manager.FindPrefix(Iota(33)).num_tokens() == 32);
  CHECK(manager.FindPrefix(Iota(40, 1)).num_tokens() == 0);

  // The second block alone, after other text, is another text.
  std::vector<int32_t> other = Iota(33);
  other[3] = 99;
  CHECK(manager.FindPrefix(other).num_tokens() == 0);

  BlockTable b;
  manager.Attach(manager.FindPrefix(tokens), b);
  CHECK(b.blocks == std::vector<int32_t>{0, 1});
  CHECK(manager.num_in_use() == 3);
  RequireIntegrity(manager, {&a, &b});
  manager.Release(a);
  CHECK(manager.num_in_use() == 2);
  manager.Release(b);
  CHECK(manager.num_in_use() == 0);
  CHECK(manager.FindPrefix(tokens).num_unreferenced == 2);
}

TEST_CASE("freed contents stay until their block is needed, oldest and deepest first") {
  BlockManager manager(3, true);
  const std::vector<int32_t> tokens = Iota(48);
  BlockTable a;
  REQUIRE(manager.Grow(a, 48));
  manager.CommitFullBlocks(a, tokens, 48);
  manager.Release(a);
  REQUIRE(manager.FindPrefix(Iota(49)).num_tokens() == 48);
  BlockTable b;
  REQUIRE(manager.Grow(b, 1));
  CHECK(manager.FindPrefix(Iota(49)).num_tokens() == 32);
  REQUIRE(manager.Grow(b, 17));
  CHECK(manager.FindPrefix(Iota(49)).num_tokens() == 16);
  RequireIntegrity(manager, {&b});
}

TEST_CASE("two blocks with the same text: one is kept, both chains go on") {
  BlockManager manager(8, true);
  const std::vector<int32_t> tokens = Iota(33);
  BlockTable a, b;
  REQUIRE(manager.Grow(a, 33));
  REQUIRE(manager.Grow(b, 33));
  manager.CommitFullBlocks(a, tokens, 16);
  manager.CommitFullBlocks(b, tokens, 32);  // its first block is a duplicate, its second new
  const auto& match = manager.FindPrefix(tokens);
  CHECK(match.blocks == std::vector<int32_t>{a.blocks[0], b.blocks[1]});
  RequireIntegrity(manager, {&a, &b});
}

TEST_CASE("without prefix caching nothing is found") {
  BlockManager manager(4, false);
  BlockTable a;
  REQUIRE(manager.Grow(a, 33));
  manager.CommitFullBlocks(a, Iota(33), 33);
  CHECK(manager.FindPrefix(Iota(33)).num_tokens() == 0);
  manager.Release(a);
  RequireIntegrity(manager, {});
}

// What a model would see: blocks are written as sequences compute, and whatever is attached must
// hold exactly the sequence's tokens.
TEST_CASE("random operations keep every block in one state and share only equal text") {
  for (uint32_t seed = 1; seed <= 20; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    const auto draw = [&random](int n) { return static_cast<int>(random() % n); };
    const int num_blocks = 4 + draw(30);
    BlockManager manager(num_blocks, seed % 5 != 0);
    std::vector<std::vector<int32_t>> contents(num_blocks, std::vector<int32_t>(kBlockTokens, -1));
    struct Live {
      std::vector<int32_t> tokens;
      int num_computed = 0;
      BlockTable table;
    };
    std::vector<std::unique_ptr<Live>> live;
    int num_hits = 0;
    for (int step = 0; step < 1000; ++step) {
      const int operation = draw(10);
      if (operation < 3) {
        auto sequence = std::make_unique<Live>();
        // Few distinct texts per block, so that prefixes are shared often.
        for (int block = 0, n = draw(5); block <= n; ++block) {
          const int variant = draw(2);
          for (int i = 0; i < kBlockTokens; ++i) sequence->tokens.push_back(variant * 100 + i);
        }
        sequence->tokens.resize(sequence->tokens.size() - draw(kBlockTokens));
        const auto& match = manager.FindPrefix(sequence->tokens);
        manager.Attach(match, sequence->table);
        sequence->num_computed = match.num_tokens();
        num_hits += match.num_tokens() > 0;
        live.push_back(std::move(sequence));
      } else if (!live.empty() && operation < 8) {
        Live& sequence = *live[draw(static_cast<int>(live.size()))];
        if (draw(4) == 0) sequence.tokens.push_back(draw(3));
        const int pending = static_cast<int>(sequence.tokens.size()) - sequence.num_computed;
        const int n = pending == 0 ? 0 : 1 + draw(pending);
        if (manager.Grow(sequence.table, sequence.num_computed + n)) {
          for (int p = sequence.num_computed; p < sequence.num_computed + n; ++p) {
            contents[sequence.table.blocks[p / kBlockTokens]][p % kBlockTokens] =
                sequence.tokens[p];
          }
          sequence.num_computed += n;
          manager.CommitFullBlocks(sequence.table, sequence.tokens, sequence.num_computed);
        }
      } else if (!live.empty()) {
        const int i = draw(static_cast<int>(live.size()));
        manager.Release(live[i]->table);
        live.erase(live.begin() + i);
      }

      std::vector<const BlockTable*> tables;
      for (const auto& sequence : live) {
        tables.push_back(&sequence->table);
        for (int p = 0; p < sequence->num_computed; ++p) {
          if (contents[sequence->table.blocks[p / kBlockTokens]][p % kBlockTokens] !=
              sequence->tokens[p]) {
            FAIL("step " << step << ": position " << p << " holds another token");
          }
        }
      }
      RequireIntegrity(manager, tables);
    }
    for (const auto& sequence : live) manager.Release(sequence->table);
    CHECK(manager.num_in_use() == 0);
    if (manager.prefix_caching()) CHECK(num_hits > 10);
  }
}

}  // namespace
}  // namespace gloam
