#include "common/testing/flash_cases.hpp"

namespace flashkata::testing {

std::string FlashCase::text() const {
  return problem.text() + (layouts.query == Layout::heads && layouts.key == Layout::heads ? "" : ", strided");
}

// clang-format off
const std::vector<FlashCase>& flash_cases() {
  static const std::vector<FlashCase> list = [] {
    std::vector<FlashCase> cases = {
      {{.why = "one query, one key", .queries = 1, .keys = 1, .width = 16}},
      {{.why = "a few queries, a few keys", .queries = 5, .keys = 3, .width = 16}},
      {{.why = "the plain case", .queries = 16, .keys = 16, .width = 16}},
      {{.why = "one query more than 64", .queries = 65, .keys = 64, .width = 16}},
      {{.why = "nothing is a multiple of anything", .queries = 37, .keys = 53, .width = 32}},
      {{.why = "more queries than keys", .queries = 53, .keys = 37, .width = 64}},
      {{.why = "1 x 2 x 64 x 32", .heads = 2, .queries = 64, .keys = 64, .width = 32}},
      {{.why = "one less than 128, one more than 128", .queries = 127, .keys = 129, .width = 16}},
      {{.why = "113 queries, 203 keys", .queries = 113, .keys = 203, .width = 16}},
      {{.why = "width 128", .queries = 9, .keys = 41, .width = 128}},
      {{.why = "causal, width 128", .queries = 19, .keys = 35, .width = 128, .causal = true}},
      {{.why = "causal, width 64", .queries = 37, .keys = 37, .width = 64, .causal = true}},
      {{.why = "causal, more keys than queries", .queries = 37, .keys = 53, .width = 16, .causal = true}},
      {{.why = "causal, more queries than keys", .queries = 53, .keys = 37, .width = 16, .causal = true}},
      {{.why = "causal, whole tiles of queries without a key", .queries = 200, .keys = 40, .width = 16, .causal = true}},
      {{.why = "causal, several tiles each way", .queries = 130, .keys = 130, .width = 16, .causal = true}},
      {{.why = "causal, few queries behind many keys", .queries = 5, .keys = 133, .width = 16, .causal = true}},
      {{.why = "causal, one query", .heads = 2, .queries = 1, .keys = 19, .width = 16, .causal = true}},
      {{.why = "causal, one key", .queries = 9, .keys = 1, .width = 16, .causal = true}},
      {{.why = "three heads, two batch items", .batch = 2, .heads = 3, .queries = 17, .keys = 19, .width = 16}},
      {{.why = "one head, three batch items, and a scale", .batch = 3, .queries = 6, .keys = 9, .width = 16, .scale = 0.6f}},
      {{.why = "tokens first, as a model lays them out", .batch = 2, .heads = 3, .queries = 21, .keys = 25, .width = 16}, TOKENS},
      {{.why = "rows lie apart", .batch = 2, .heads = 2, .queries = 11, .keys = 14, .width = 32}, APART},
      {{.why = "every tensor lies otherwise, causal", .batch = 2, .heads = 3, .queries = 20, .keys = 23, .width = 16, .causal = true}, MIXED},
      {{.why = "every tensor lies otherwise", .batch = 2, .heads = 2, .queries = 23, .keys = 20, .width = 16}, MIXED_OTHERWISE},
      {{.why = "a scale is given", .queries = 20, .keys = 28, .width = 32, .scale = 0.3f}},
      {{.why = "scale 0 is given", .queries = 5, .keys = 7, .width = 16, .scale = 0.0f}},
      {{.why = "a negative scale is given", .queries = 5, .keys = 37, .width = 16, .scale = -0.5f}},
      {{.why = "scores up to 1e4 in size", .queries = 13, .keys = 39, .width = 16, .scale = 0.25f, .scores = Scores::exact}},
      {{.why = "all scores near -120", .queries = 13, .keys = 19, .width = 16, .scores = Scores::near_minus_120}},
      {{.why = "all scores near +120", .queries = 13, .keys = 19, .width = 16, .scores = Scores::near_plus_120}},
      {{.why = "all scores near -20000", .queries = 13, .keys = 19, .width = 16, .scale = 0.25f, .scores = Scores::near_minus_2e4}},
      {{.why = "scores fall by 300 along the keys", .queries = 9, .keys = 140, .width = 16, .scores = Scores::falling}},
      {{.why = "scores rise by 300 along the keys", .queries = 9, .keys = 140, .width = 16, .scores = Scores::rising}},
      {{.why = "each query's scores lie 150 below those of the query before", .queries = 6, .keys = 12, .width = 16, .scores = Scores::rows_apart}},
      {{.why = "all scores are 0", .queries = 7, .keys = 75, .width = 16, .scores = Scores::flat}},
      {{.why = "no key at all", .queries = 4, .keys = 0, .width = 16}},
      {{.why = "no query at all", .queries = 0, .keys = 4, .width = 16}},
      {{.why = "causal, no key at all", .queries = 5, .keys = 0, .width = 16, .causal = true}},
      {{.why = "causal, scores rise by 300 along the keys", .queries = 70, .keys = 70, .width = 16, .causal = true, .scores = Scores::rising}},
      {{.why = "causal, scores fall by 300 along the keys", .queries = 70, .keys = 70, .width = 16, .causal = true, .scores = Scores::falling}},
      {{.why = "causal, all scores near -120", .queries = 21, .keys = 17, .width = 16, .causal = true, .scores = Scores::near_minus_120}},
      {{.why = "scores so small that all weights are nearly alike", .queries = 12, .keys = 20, .width = 16, .scores = Scores::tiny}},
      {{.why = "one query", .queries = 1, .keys = 65, .width = 16}},
      {{.why = "causal, five heads, a scale", .heads = 5, .queries = 10, .keys = 14, .width = 16, .scale = 0.8f, .causal = true}},
      {{.why = "causal, all scores near -20000", .queries = 13, .keys = 11, .width = 16, .scale = 0.25f, .causal = true, .scores = Scores::near_minus_2e4}},
      {{.why = "239 queries, one key", .queries = 239, .keys = 1, .width = 16}},
      {{.why = "causal, more keys than queries by more than a tile", .queries = 40, .keys = 110, .width = 16, .causal = true}},
      {{.why = "nine batch items of one row each", .batch = 9, .heads = 2, .queries = 1, .keys = 5, .width = 16}},
    };
    for (std::size_t i = 0; i < cases.size(); ++i) {
      cases[i].problem.number = static_cast<int>(i) + 1;
      cases[i].problem.value_width = cases[i].problem.width;
    }
    return cases;
  }();
  return list;
}
// clang-format on

}  // namespace flashkata::testing
