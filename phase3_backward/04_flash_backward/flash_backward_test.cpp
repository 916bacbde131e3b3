#include "flash_backward.hpp"

#include <array>

#include "phase3_backward/kernel_suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr BackwardStep<float> STEP{[](const FlashBackward<float>& problem) { flash_backward(problem); }, 16};

BackwardInputs inputs_of(const FlashCase& c) { return testing::inputs_of<float>(c.problem); }

// Numbers are judged, and recognised, in the fast executable.
const Recognise recognise_flash_backward(numbers(flash_cases()), [](int number) -> std::vector<Array> {
  if (kernels_are_checked()) throw NotImplemented(__FILE__);
  const FlashCase& c = flash_cases().at(static_cast<std::size_t>(number) - 1);
  std::vector<Array> outputs;
  for (const bool deterministic : {false, true}) {
    GradientMemory<float>* const own = nullptr;
    Gradients got = gradients(STEP, inputs_of(c), {.deterministic = deterministic, .layouts = c.layouts}, own,
                              /*judge=*/false);
    for (Array* gradient : {&got.query, &got.key, &got.value}) outputs.push_back(std::move(*gradient));
  }
  return outputs;
});

struct Lengths {
  Index queries, keys;
};

}  // namespace

TEST_SUITE("phase3.04_flash_backward") {
  TEST_CASE("the gradient of the only key's value is that of the output") {
    ask("There is one key, so it has all the weight, whatever its score is. What is P, what is dP - delta, and what is "
        "left for dQ and dK?");
    for (const Index width : {16, 32, 64, 128}) {
      if (!expect_one_pair(STEP, width)) return;
    }
  }

  TEST_CASE("two queries and two keys as on the page") {
    ask("The README has every number on the way. Which is the first of yours that differs: P, dP, delta or dS?");
    for (const bool deterministic : {false, true}) {
      if (!expect_example(STEP, deterministic)) return;
    }
  }

  TEST_CASE("a query of 0 gives each key that it sees an even share of its dO") {
    ask("All scores are 0. What does exp(score - lse) come to, and which queries does the block of a key walk over?");
    for (const Index queries : {1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 129}) {
      if (!expect_even_shares(STEP, queries, 5, false)) return;
    }
    for (const Index keys : {1, 15, 16, 17, 32, 33, 63, 65, 128, 129}) {
      if (!expect_even_shares(STEP, 3, keys, false)) return;
    }
  }

  TEST_CASE("under a causal mask a key hears from the queries that see it and from no other") {
    ask("The last query stands at the last key. For a block's tile of keys, which is the first query that sees one of "
        "them, which tile of queries holds it, and which keys does that query not see?");
    for (const auto& [queries, keys] : {Lengths{1, 1},
                                        {16, 16},
                                        {17, 17},
                                        {33, 33},
                                        {64, 64},
                                        {65, 65},
                                        {20, 37},
                                        {37, 20},
                                        {100, 30},
                                        {40, 90},
                                        {2, 66},
                                        {66, 65},
                                        {97, 97},
                                        {131, 129},
                                        {130, 131}}) {
      if (!expect_even_shares(STEP, queries, keys, true)) return;
    }
  }

  TEST_CASE("every number comes from its row and its channel") {
    ask("Each query has one key that it belongs to. Which of the two has the index that your sum runs over, and which "
        "has the index of the row that you write?");
    for (const Index width : {16, 64, 128}) {
      if (kernels_are_checked() && width == 128) continue;
      if (!expect_positions(STEP, width, Product::d_value)) return;
      if (!expect_positions(STEP, width, Product::d_key)) return;
      if (!expect_positions(STEP, width, Product::d_query)) return;
      if (!expect_positions(STEP, width, Product::d_query, /*deterministic=*/true)) return;
    }
  }

  TEST_CASE("equal values give queries and keys no gradient") {
    ask("If all values are alike, does it matter where a query looks? What is dO V^T for each of its keys, and what is "
        "dO O?");
    for (const bool causal : {false, true}) {
      if (!expect_nothing_from_equal_values(STEP, 21, 37, causal)) return;
      if (!expect_nothing_from_equal_values(STEP, 37, 70, causal)) return;
    }
  }

  TEST_CASE("equal keys give queries no gradient") {
    ask("If all keys are alike, a query cannot tell them apart. What do the numbers of a row of dS add up to, and over "
        "which keys does your delta run?");
    for (const bool causal : {false, true}) {
      if (!expect_nothing_from_equal_keys(STEP, 21, 37, causal)) return;
      if (!expect_nothing_from_equal_keys(STEP, 20, 150, causal)) return;
    }
  }

  TEST_CASE("a dO of 0 gives nothing and a dO of twice the size gives twice as much") {
    ask("Every gradient is a sum of products with dO in them. Which of your terms has none, or two?");
    const AttentionCase sizes{
        .why = "", .heads = 2, .queries = 37, .keys = 45, .width = 32, .causal = true, .number = 12};
    if (expect_nothing_from_nothing(STEP, sizes)) expect_linear(STEP, sizes);
  }

  TEST_CASE("half the scale and twice the keys are the same scores") {
    ask("Differentiate scale * q.k by q, then by k. How many times does scale stand between dO and dQ, and between dO "
        "and dV?");
    for (const bool causal : {false, true}) {
      if (!expect_scale_belongs_to_keys(
              STEP, {.why = "", .queries = 37, .keys = 45, .width = 32, .causal = causal, .number = 13})) {
        return;
      }
    }
  }

  TEST_CASE("what keys take is what queries give") {
    ask("The weights of a query add up to 1: so how much of its dO is in all dV together? And scores are products of "
        "queries and keys: why should <dQ, Q> be <dK, K>?");
    for (const auto& [queries, keys] : {Lengths{33, 45}, {53, 37}, {131, 129}, {130, 131}}) {
      for (const bool causal : {false, true}) {
        for (const bool deterministic : {false, true}) {
          if (kernels_are_checked() && deterministic != causal) continue;
          const AttentionCase sizes{.why = "",
                                    .batch = 2,
                                    .queries = queries,
                                    .keys = keys,
                                    .width = 16,
                                    .scale = 0.4f,
                                    .causal = causal,
                                    .number = 14};
          if (!expect_balanced(STEP, sizes, {.deterministic = deterministic})) return;
        }
      }
    }
  }

  TEST_CASE("a query that sees no key has gradients of 0 and gives nothing to any key") {
    ask("Its lse is -inf. What is exp(score - lse) then, and what should it be? A block may have no other queries: who "
        "writes their rows?");
    for (const bool deterministic : {false, true}) {
      for (const auto& [queries, keys] : {Lengths{9, 4}, {4, 0}, {70, 3}, {140, 7}, {33, 32}, {0, 5}, {0, 70}}) {
        if (!expect_zeros_where_nobody_looks(STEP, queries, keys, /*causal=*/true, deterministic)) return;
      }
      for (const auto& [queries, keys] : {Lengths{5, 0}, {130, 0}, {0, 9}, {0, 0}}) {
        if (!expect_zeros_where_nobody_looks(STEP, queries, keys, /*causal=*/false, deterministic)) return;
      }
      if (!expect_blind_are_harmless(STEP, 29, 20, deterministic)) return;
      if (!expect_blind_are_harmless(STEP, 100, 10, deterministic)) return;
    }
  }

  TEST_CASE("a key that a query may not see cannot move its gradient") {
    ask("A key that only later queries may see holds NaN, or its value does. Follow it to the row of an earlier query: "
        "is dS there 0, and what is 0 times NaN?");
    for (const Poisoned poisoned : {Poisoned::key, Poisoned::value}) {
      for (const auto& [queries, keys] : {Lengths{13, 13}, {11, 37}, {37, 11}, {70, 70}}) {
        if (kernels_are_checked() && queries != 11) continue;
        for (const Index place : {keys / 2, keys - 2, keys - 1}) {
          for (const bool deterministic : {false, true}) {
            if (!expect_forbidden_is_harmless(STEP, queries, keys, place, poisoned, deterministic)) return;
          }
        }
      }
    }
  }

  TEST_CASE("heads and batch items know nothing of each other") {
    ask("Six heads, in two orders. From a block's number, how do you know its head, its batch item, and where they "
        "lie? In which of your kernels?");
    for (const bool causal : {false, true}) {
      if (!expect_heads_apart(STEP, 21, 35, causal)) return;
    }
  }

  TEST_CASE("rows may lie anywhere in memory") {
    ask("How far apart in memory are two rows of this view? Ten tensors have strides, and the gradient of sum() has a "
        "stride of 0: which of yours belongs to which?");
    const AttentionCase sizes{.why = "", .batch = 2, .heads = 3, .queries = 17, .keys = 35, .width = 16, .number = 15};
    if (!expect_layouts_do_not_matter(STEP, sizes)) return;
    expect_repeated_d_output(STEP, sizes);
  }

  TEST_CASE("the gradients' memory may hold anything before the call") {
    ask("Call it twice in the same memory. What does a sum begin with, and who has put it there, before whom?");
    for (const bool deterministic : {false, true}) {
      if (kernels_are_checked() && deterministic) continue;
      const AttentionCase sizes{.why = "", .heads = 2, .queries = 37, .keys = 75, .width = 32, .number = 16};
      if (!expect_memory_may_hold_anything(STEP, sizes, deterministic)) return;
    }
  }

  TEST_CASE("with deterministic the order in which blocks run changes no bit and without it none of dK and dV") {
    ask("Two blocks add to the same number. Is (a + b) + c the same as (c + a) + b? And if one of them reads the "
        "number before the other has written it?");
    for (const bool causal : {false, true}) {
      if (kernels_are_checked() && causal) continue;
      const AttentionCase sizes{.why = "", .queries = 70, .keys = 150, .width = 16, .causal = causal, .number = 17};
      if (!expect_order_does_not_matter(STEP, sizes)) return;
    }
    expect_deterministic(STEP, 20, 128);
  }

  TEST_CASE("rows are loaded once for a tile of the other side") {
    ask("64 queries, 64 keys. How many times is each row loaded from global memory, and by how many rows of the other "
        "side is it used each time? Who else could use what one thread has loaded?");
    if (!needs_a_check()) expect_tiled_traffic(STEP, 64, /*tile=*/16);
  }

  TEST_CASE("tiles that see nothing of each other are not even read") {
    ask("Above the diagonal lie whole tiles that nobody may see. For a block's keys, which is the first tile of "
        "queries worth loading? And for a block's queries the last tile of keys?");
    if (!needs_a_check()) expect_blind_tiles_not_loaded(STEP, 512);
  }

  TEST_CASE("no row of scores is kept in shared memory") {
    ask("For how many pairs at once does your block hold scores? What if there were a million keys, or queries?");
    if (!needs_a_check()) expect_no_row_of_scores(STEP);
  }

  TEST_CASE("agrees with the float64 reference") {
    for_each<FlashCase>(flash_cases(), [](const FlashCase& c) {
      if (kernels_are_checked() && c.problem.queries * c.problem.keys > 10000) return;
      const BackwardInputs in = with_forward(inputs_of(c));
      const Judgement<float> judgement(in);
      for (const bool deterministic : {false, true}) {
        if (kernels_are_checked() && deterministic != (c.problem.number % 2 == 0)) continue;
        const Gradients got = gradients(STEP, in, {.deterministic = deterministic, .layouts = c.layouts});
        if (expect_gradients(got, judgement)) continue;
        finding("of", deterministic ? "a deterministic call" : "a call that need not be deterministic");
        return;
      }
    });
  }

  TEST_CASE("agrees with the float64 reference at 256 and 512") {
    if (needs_a_gpu(STEP)) return;
    for (const bool causal : {false, true}) {
      if (!expect_long(STEP, 2, 8, 256, 256, 64, causal)) return;
      if (!expect_long(STEP, 1, 16, 512, 512, 128, causal)) return;
      if (!expect_long(STEP, 1, 2, 127, 513, 32, causal)) return;
    }
  }

  TEST_CASE("agrees with the float64 reference at 1024 and 2048") {
    if (needs_a_gpu(STEP)) return;
    for (const bool causal : {false, true}) {
      if (!expect_long(STEP, 4, 8, 1024, 1024, 64, causal)) return;
      if (!expect_long(STEP, 1, 2, 1023, 1024, 32, causal)) return;
      if (!expect_long(STEP, 1, 2, 2048, 2048, 16, causal)) return;
    }
  }

  TEST_CASE("agrees with the float64 reference for 70400 heads") {
    ask("How many blocks may a grid have in x, and how many in y and z?");
    if (needs_a_gpu(STEP)) return;
    expect_long(STEP, 1100, 64, 2, 3, 16, true);
  }

  TEST_CASE("says what is wrong with bad arguments") { expect_bad_arguments_refused(STEP); }
}
