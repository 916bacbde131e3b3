#include "common/testing/tile_cases.hpp"

namespace flashkata::testing {

std::string TileCase::text() const {
  return problem.text() + ", tiles of " + std::to_string(block_rows) + " x " + std::to_string(block_cols);
}

// clang-format off
const std::vector<TileCase>& tile_cases() {
  static const std::vector<TileCase> list = [] {
    std::vector<TileCase> cases = {
      {{.why = "one query, one key", .queries = 1, .keys = 1, .width = 4, .value_width = 4}, 1, 1},
      {{.why = "one tile, filled", .queries = 8, .keys = 8}, 8, 8},
      {{.why = "tiles larger than everything", .queries = 7, .keys = 9}, 64, 64},
      {{.why = "two tiles of keys", .queries = 8, .keys = 16}, 8, 8},
      {{.why = "two tiles of queries", .queries = 16, .keys = 8}, 8, 8},
      {{.why = "the plain case", .queries = 24, .keys = 24, .width = 16, .value_width = 16}, 8, 8},
      {{.why = "nothing is a multiple of anything, values wider than keys", .queries = 37, .keys = 53, .width = 16, .value_width = 24}, 16, 16},
      {{.why = "more queries than keys, values narrower than keys", .queries = 53, .keys = 37, .width = 24, .value_width = 16}, 16, 8},
      {{.why = "tall tiles, and a scale", .queries = 64, .keys = 64, .scale = 0.5f}, 48, 16},
      {{.why = "wide tiles", .queries = 64, .keys = 64}, 16, 48},
      {{.why = "tiles of one pair", .queries = 9, .keys = 11}, 1, 1},
      {{.why = "tiles of one query, and a scale", .queries = 6, .keys = 20, .scale = 0.7f}, 1, 7},
      {{.why = "tiles of one key", .queries = 20, .keys = 6}, 7, 1},
      {{.why = "one key and one query more than a tile holds", .queries = 33, .keys = 33}, 32, 32},
      {{.why = "one key and one query less than two tiles hold", .queries = 31, .keys = 31}, 16, 16},
      {{.why = "a scale is given", .queries = 20, .keys = 28, .width = 16, .value_width = 24, .scale = 0.3f}, 8, 8},
      {{.why = "scale 1 is given", .queries = 9, .keys = 11, .width = 16, .value_width = 16, .scale = 1.0f}, 4, 4},
      {{.why = "scale 0 is given", .queries = 5, .keys = 7, .width = 16, .value_width = 4, .scale = 0.0f}, 4, 4},
      {{.why = "a negative scale is given", .queries = 5, .keys = 7, .width = 4, .value_width = 4, .scale = -0.5f}, 4, 4},
      {{.why = "width 1", .queries = 6, .keys = 9, .width = 1, .value_width = 3}, 4, 4},
      {{.why = "width 128", .queries = 17, .keys = 33, .width = 128, .value_width = 64}, 8, 16},
      {{.why = "scores so small that all weights are nearly alike", .queries = 12, .keys = 20, .scores = Scores::tiny}, 5, 6},
      {{.why = "all scores are 0", .queries = 7, .keys = 10, .scores = Scores::flat}, 4, 4},
      {{.why = "scores up to 1e4 in size", .queries = 13, .keys = 19, .width = 16, .value_width = 8, .scale = 0.25f, .scores = Scores::exact}, 4, 6},
      {{.why = "all scores near -120", .queries = 13, .keys = 19, .scores = Scores::near_minus_120}, 4, 8},
      {{.why = "all scores near +120", .queries = 13, .keys = 19, .scores = Scores::near_plus_120}, 4, 8},
      {{.why = "all scores near -20000", .queries = 13, .keys = 19, .width = 4, .value_width = 4, .scale = 0.25f, .scores = Scores::near_minus_2e4}, 4, 8},
      {{.why = "each query's scores lie 150 below those of the query before", .queries = 6, .keys = 12, .scores = Scores::rows_apart}, 4, 4},
      {{.why = "scores fall by 300 along the keys", .queries = 9, .keys = 40, .scores = Scores::falling}, 4, 10},
      {{.why = "scores rise by 300 along the keys", .queries = 9, .keys = 40, .scores = Scores::rising}, 4, 10},
      {{.why = "one key", .queries = 9, .keys = 1}, 4, 4},
      {{.why = "one query", .queries = 1, .keys = 65}, 16, 16},
      {{.why = "no key at all", .queries = 4, .keys = 0}, 2, 2},
      {{.why = "no query at all", .queries = 0, .keys = 4}, 2, 2},
      {{.why = "three heads, two batch items", .batch = 2, .heads = 3, .queries = 10, .keys = 13, .width = 4, .value_width = 6}, 4, 5},
      {{.why = "one head, three batch items, and a scale", .batch = 3, .heads = 1, .queries = 6, .keys = 9, .scale = 0.6f}, 4, 4},
      {{.why = "the rows of a token lie apart in memory", .batch = 2, .heads = 2, .queries = 9, .keys = 14, .width = 8, .value_width = 6, .gap = 5}, 4, 4},
      {{.why = "causal, as many queries as keys", .queries = 16, .keys = 16, .causal = true}, 4, 4},
      {{.why = "causal, nothing is a multiple of anything", .queries = 37, .keys = 37, .causal = true}, 16, 16},
      {{.why = "causal, wide tiles, and a scale", .queries = 64, .keys = 64, .scale = 0.45f, .causal = true}, 16, 48},
      {{.why = "causal, tall tiles", .queries = 64, .keys = 64, .causal = true}, 48, 16},
      {{.why = "causal, more keys than queries", .queries = 37, .keys = 53, .width = 16, .value_width = 24, .causal = true}, 16, 8},
      {{.why = "causal, more queries than keys", .queries = 53, .keys = 37, .causal = true}, 16, 16},
      {{.why = "causal, whole tiles of queries without a key", .queries = 40, .keys = 12, .causal = true}, 8, 8},
      {{.why = "causal, more queries than keys, wide tiles, and a scale", .queries = 30, .keys = 17, .scale = 0.55f, .causal = true}, 5, 12},
      {{.why = "causal, one query", .heads = 2, .queries = 1, .keys = 19, .causal = true}, 4, 4},
      {{.why = "causal, two queries", .heads = 2, .queries = 2, .keys = 19, .causal = true}, 4, 4},
      {{.why = "causal, one key", .queries = 9, .keys = 1, .causal = true}, 4, 4},
      {{.why = "causal, no key at all", .queries = 5, .keys = 0, .causal = true}, 2, 2},
      {{.why = "causal, the diagonal runs through the middle of tiles", .queries = 24, .keys = 27, .causal = true}, 8, 8},
      {{.why = "causal, tiles of one pair", .queries = 7, .keys = 9, .causal = true}, 1, 1},
      {{.why = "causal, tiles larger than everything, and a scale", .queries = 10, .keys = 14, .scale = 0.65f, .causal = true}, 32, 32},
      {{.why = "causal, scores fall by 300 along the keys", .queries = 24, .keys = 24, .causal = true, .scores = Scores::falling}, 8, 6},
      {{.why = "causal, scores rise by 300 along the keys", .queries = 24, .keys = 24, .causal = true, .scores = Scores::rising}, 8, 6},
      {{.why = "causal, all scores near -120", .queries = 21, .keys = 17, .causal = true, .scores = Scores::near_minus_120}, 8, 6},
      {{.why = "causal, all scores near -20000", .queries = 13, .keys = 11, .width = 4, .value_width = 4, .scale = 0.25f, .causal = true, .scores = Scores::near_minus_2e4}, 4, 6},
      {{.why = "causal, several heads, a scale", .batch = 2, .heads = 3, .queries = 11, .keys = 14, .width = 4, .value_width = 6, .scale = 0.8f, .causal = true, .gap = 3}, 4, 4},
      {{.why = "1 x 2 x 64 x 32", .batch = 1, .heads = 2, .queries = 64, .keys = 64, .width = 32, .value_width = 32}, 32, 32},
      {{.why = "113 queries, 203 keys, and a scale", .queries = 113, .keys = 203, .scale = 0.2f}, 64, 32},
      {{.why = "239 queries, one key", .queries = 239, .keys = 1}, 64, 64},
      {{.why = "127 queries, 513 keys, causal", .queries = 127, .keys = 513, .width = 4, .value_width = 4, .causal = true}, 32, 64},
      {{.why = "the last tile of keys holds one key", .queries = 5, .keys = 17, .scores = Scores::near_minus_120}, 4, 8},
      {{.why = "causal, more queries than keys by less than a tile", .queries = 19, .keys = 16, .causal = true}, 8, 8},
      {{.why = "seven heads", .batch = 1, .heads = 7, .queries = 6, .keys = 6, .width = 3, .value_width = 5, .causal = true}, 4, 4},
    };
    for (std::size_t i = 0; i < cases.size(); ++i) cases[i].problem.number = static_cast<int>(i) + 1;
    return cases;
  }();
  return list;
}
// clang-format on

const std::vector<Cut>& cuts() {
  static const std::vector<Cut> all = {{12, 12, 4, 4},  {13, 13, 4, 4},  {12, 12, 3, 6},  {12, 12, 6, 3},
                                       {10, 17, 4, 4},  {17, 10, 4, 4},  {20, 6, 4, 4},   {5, 23, 2, 8},
                                       {23, 23, 16, 5}, {23, 23, 5, 16}, {30, 30, 8, 32}, {1, 9, 4, 4},
                                       {9, 1, 4, 4},    {16, 19, 8, 8},  {19, 16, 8, 8},  {7, 7, 1, 1}};
  return all;
}

}  // namespace flashkata::testing
