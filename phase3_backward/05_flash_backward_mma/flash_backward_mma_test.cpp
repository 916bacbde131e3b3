// In the order in which one would build the kernel: one tile, product by product; the loop over tiles; who adds up dQ;
// what makes it fast; ragged shapes; causal; then what holds everywhere.
#include "flash_backward_mma.hpp"

#include <array>

#include "phase3_backward/kernel_suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

template <typename T>
BackwardStep<T> step(Index width = 64) {
  return {[](const FlashBackward<T>& problem) { flash_backward_mma(problem); }, width};
}

struct Lengths {
  Index queries, keys;
};

// clang-format off
// Their numbers never change: new ones go to the end.
const std::vector<FlashCase>& mma_backward_cases() {
  static const std::vector<FlashCase> list = [] {
    std::vector<FlashCase> cases = {
      {{.why = "one query, one key", .queries = 1, .keys = 1}},
      {{.why = "one fragment of rows", .queries = 16, .keys = 16}},
      {{.why = "17 queries, 33 keys", .queries = 17, .keys = 33}},
      {{.why = "37 queries, 53 keys", .queries = 37, .keys = 53}},
      {{.why = "129 queries, 17 keys", .queries = 129, .keys = 17}},
      {{.why = "17 queries, 129 keys", .queries = 17, .keys = 129}},
      {{.why = "width 128, more keys", .queries = 19, .keys = 70, .width = 128}},
      {{.why = "width 128, more queries", .queries = 70, .keys = 19, .width = 128}},
      {{.why = "a scale is given", .queries = 20, .keys = 28, .scale = 0.3f}},
      {{.why = "scale 0 is given", .queries = 9, .keys = 20, .scale = 0.0f}},
      {{.why = "a negative scale is given", .queries = 9, .keys = 75, .scale = -0.5f}},
      {{.why = "a scale is given, width 128", .queries = 20, .keys = 28, .width = 128, .scale = 0.2f}},
      {{.why = "two batch items, three heads", .batch = 2, .heads = 3, .queries = 11, .keys = 20}},
      {{.why = "tokens first, as a model lays them out", .batch = 2, .heads = 3, .queries = 21, .keys = 25}, TOKENS},
      {{.why = "rows lie apart, width 128", .heads = 2, .queries = 11, .keys = 14, .width = 128}, APART},
      {{.why = "every tensor lies otherwise, causal", .batch = 2, .heads = 2, .queries = 20, .keys = 23, .causal = true}, MIXED},
      {{.why = "every tensor lies otherwise", .batch = 2, .heads = 2, .queries = 23, .keys = 20}, MIXED_OTHERWISE},
      {{.why = "scores rise by 300 along the keys", .queries = 6, .keys = 140, .scores = Scores::rising}},
      {{.why = "scores fall by 300 along the keys", .queries = 6, .keys = 140, .scores = Scores::falling}},
      {{.why = "all scores near -120", .queries = 6, .keys = 70, .scores = Scores::near_minus_120}},
      {{.why = "all scores near +120", .queries = 6, .keys = 70, .scores = Scores::near_plus_120}},
      {{.why = "one query, 200 keys", .queries = 1, .keys = 200}},
      {{.why = "200 queries, one key", .queries = 200, .keys = 1}},
      {{.why = "no key at all", .queries = 20, .keys = 0}},
      {{.why = "no query at all", .queries = 0, .keys = 20}},
      {{.why = "causal, as many queries as keys", .queries = 33, .keys = 33, .causal = true}},
      {{.why = "causal, more keys than queries", .queries = 17, .keys = 83, .causal = true}},
      {{.why = "causal, more queries than keys", .queries = 83, .keys = 17, .causal = true}},
      {{.why = "causal, whole blocks of queries without a key", .queries = 150, .keys = 9, .causal = true}},
      {{.why = "causal, several tiles both ways", .queries = 70, .keys = 135, .causal = true}},
      {{.why = "causal, one query", .heads = 2, .queries = 1, .keys = 70, .causal = true}},
      {{.why = "causal, width 128", .queries = 40, .keys = 40, .width = 128, .causal = true}},
      {{.why = "causal, several heads, a scale", .heads = 3, .queries = 18, .keys = 25, .scale = 0.4f, .causal = true}},
      {{.why = "weights nearly alike", .queries = 12, .keys = 100, .scores = Scores::tiny}},
    };
    for (std::size_t i = 0; i < cases.size(); ++i) {
      AttentionCase& problem = cases[i].problem;
      problem.number = static_cast<int>(i) + 1;
      if (problem.width != 128) problem.width = 64;
      problem.value_width = problem.width;
    }
    return cases;
  }();
  return list;
}
// clang-format on

template <typename T>
constexpr bool is_bf16 = std::is_same_v<T, bf16>;

bool is_small(const FlashCase& c) { return c.problem.queries * c.problem.keys * c.problem.width <= 32 * 1024; }

// Small cases are tried with both types, each of which goes one of the two ways to dQ; larger ones with one type that
// goes both ways. The watched kernels are slower: with them small cases are tried with one type, larger ones not at
// all.
template <typename T>
bool is_tried(const FlashCase& c) {
  const bool its_turn = (c.problem.number % 4 < 2) == is_bf16<T>;
  return kernels_are_checked() ? is_small(c) && its_turn : is_small(c) || its_turn;
}

// By the number of the case. Recognition takes the two types the other way round.
template <typename T>
bool deterministic(const FlashCase& c) {
  return (c.problem.number % 2 == 0) == is_bf16<T>;
}

const Recognise recognise_mma(numbers(mma_backward_cases()), [](int number) -> std::vector<Array> {
  if (kernels_are_checked()) throw NotImplemented(__FILE__);
  const FlashCase& c = mma_backward_cases().at(static_cast<std::size_t>(number) - 1);
  std::vector<Array> outputs;
  for_both_types([&](auto type) {
    using T = decltype(type);
    GradientMemory<T>* const own = nullptr;
    Gradients got = gradients(step<T>(), inputs_of<T>(c.problem),
                              {.deterministic = !deterministic<T>(c), .layouts = c.layouts}, own,
                              /*judge=*/false);
    for (Array* gradient : {&got.query, &got.key, &got.value}) outputs.push_back(std::move(*gradient));
  });
  return outputs;
});

// N(0, 1) times so much, for each of the four.
struct Sizes {
  double query = 1.0, key = 1.0, value = 1.0, d_output = 1.0;
};

template <typename T>
BackwardInputs magnified(const AttentionCase& c, const Sizes& sizes) {
  BackwardInputs in = inputs_of<float>(c);
  const auto times = [](TokenTensor& tensor, double factor) {
    const TokenTensor before = tensor;
    set<T>(tensor, [&, view = before.heads()](Index b, Index h, Index s, Index d) {
      return factor * static_cast<double>(view(b, h, s, d));
    });
  };
  times(in.inputs.query, sizes.query);
  times(in.inputs.key, sizes.key);
  times(in.inputs.value, sizes.value);
  times(in.d_output, sizes.d_output);
  return in;
}

}  // namespace

TEST_SUITE("phase3.05_flash_backward_mma") {
  TEST_CASE("one tile: one query and one key") {
    ask("There is one key, so it has all the weight. What is P, what is dP - delta, and what do the other 15 rows of "
        "the fragments hold?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const Index width : {64, 128}) {
        if (!expect_one_pair(step<T>(), width)) return;
      }
    });
  }

  TEST_CASE("one tile: two queries and two keys as on the page of step 04") {
    ask("That README has every number on the way. Which is the first of yours that differs: P, dP, delta or dS?");
    for_both_types([](auto type) {
      for (const bool deterministic : {false, true}) {
        if (!expect_example(step<decltype(type)>(), deterministic)) return;
      }
    });
  }

  TEST_CASE("one tile: P comes from the scores and the log-sum-exp") {
    ask("Queries of 0 give each of n keys the weight 1/n, and dV shows it. In which base are your exponents, and is "
        "the lse in the same? In a tile of S^T, is a query a row or a column?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const auto& [queries, keys] : {Lengths{16, 16}, {8, 64}, {32, 5}}) {
        if (!expect_even_shares(step<T>(), queries, keys, false)) return;
      }
    });
  }

  TEST_CASE("one tile: dV is P transposed times dO") {
    ask("P is 1 for the pairs that belong together, so rows of dO should come out. Lane 5 holds which pairs of S? And "
        "of the A fragment of P^T dO?");
    for_both_types([](auto type) {
      using T = decltype(type);
      if (!expect_positions(step<T>(), 64, Product::d_value)) return;
      if (is_bf16<T> && !kernels_are_checked()) expect_positions(step<T>(), 128, Product::d_value);
    });
  }

  TEST_CASE("one tile: dK is dS transposed times Q") {
    ask("dS is large for the pairs that belong together, so rows of Q should come out. Which operand of this product "
        "lies in registers, which in shared memory, and which way round does ldmatrix hand it out?");
    for_both_types([](auto type) {
      using T = decltype(type);
      if (!expect_positions(step<T>(), 64, Product::d_key)) return;
      if (is_bf16<T> && !kernels_are_checked()) expect_positions(step<T>(), 128, Product::d_key);
    });
  }

  TEST_CASE("one tile: dQ is dS times K") {
    ask("Now keys are summed over, and rows are queries: the transpose of the dS that you have. On which way does it "
        "come to the lanes that want it, and what did each lane write where?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const bool deterministic : {false, true}) {
        if (!expect_positions(step<T>(), 64, Product::d_query, deterministic)) return;
        if (!is_bf16<T> || kernels_are_checked()) continue;
        if (!expect_positions(step<T>(), 128, Product::d_query, deterministic)) return;
      }
    });
  }

  TEST_CASE("one tile: equal values give no gradient but dV") {
    ask("If all values are alike, every dP is the same number, and delta is that number too. From which tensors does "
        "your delta come, and in which type is it added up?");
    for_both_types([](auto type) {
      if (!expect_nothing_from_equal_values(step<decltype(type)>(), 32, 64, false)) return;
    });
  }

  TEST_CASE("the loop: every query of every tile counts") {
    ask("Many tiles of queries pass by a block of keys. Is the last of them loaded, and what is in dK and dV before "
        "the first?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const auto& [queries, keys] : {Lengths{150, 16}, {16, 150}, {130, 140}}) {
        if (kernels_are_checked() && queries == 130) continue;
        if (!expect_even_shares(step<T>(), queries, keys, false)) return;
      }
    });
  }

  TEST_CASE("the loop: equal keys give queries no gradient") {
    ask("If all keys are alike, a query cannot tell them apart. What do the numbers of a row of dS add up to, over all "
        "tiles of keys? How many blocks add to one row of dQ?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const bool causal : {false, true}) {
        if (!expect_nothing_from_equal_keys(step<T>(), 20, 150, causal)) return;
      }
    });
  }

  TEST_CASE("the loop: 512 rows of equal weight") {
    ask("Each of 512 queries adds a little to a large sum, or each of 512 keys. What is 256 + 0.5 in 16 bits, and "
        "which sums have you rounded before the last of them was in?");
    for_both_types([](auto type) {
      using T = decltype(type);
      const Index many = kernels_are_checked() ? 150 : 512;
      for (const auto& [queries, keys] : {Lengths{many, 3}, {3, many}}) {
        BackwardInputs in = inputs_of<T>({.why = "", .queries = queries, .keys = keys, .width = 64, .number = 20});
        const BackwardInputs before = in;
        for (const auto& [tensor, source] : {std::pair{&in.inputs.query, &before.inputs.query},
                                             {&in.inputs.key, &before.inputs.key},
                                             {&in.d_output, &before.d_output}}) {
          set<T>(*tensor, [view = source->heads()](Index b, Index h, Index s, Index d) {
            return 1.0 + 0.2 * static_cast<double>(view(b, h, s, d));
          });
        }
        if (!expect_right(step<T>(), in)) return;
      }
    });
  }

  TEST_CASE("the loop: the gradients' memory may hold anything before the call") {
    ask("Call it twice in the same memory. What does a sum begin with, and which kernel has put it there, before "
        "which?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const bool deterministic : {false, true}) {
        if (kernels_are_checked() && deterministic) continue;
        const AttentionCase sizes{.why = "", .queries = 37, .keys = 75, .width = 64, .number = 16};
        if (!expect_memory_may_hold_anything(step<T>(), sizes, deterministic)) return;
      }
    });
  }

  TEST_CASE("the loop: with deterministic no bit depends on the order of blocks and without it none of dK and dV") {
    ask("Two blocks add to the same number. Is (a + b) + c the same as (c + a) + b? And if one of them reads the "
        "number before the other has written it?");
    const AttentionCase sizes{.why = "", .queries = 40, .keys = 270, .width = 64, .number = 17};
    if (expect_order_does_not_matter(step<bf16>(), sizes)) expect_deterministic(step<bf16>(), 8, 128);
  }

  TEST_CASE("speed: five products on tensor cores and no bank conflicts") {
    ask("S, dP, dV, dK, dQ: which of the five does not run on tensor cores? And the 8 rows that ldmatrix reads "
        "together: in which banks does each begin?");
    if (needs_a_check()) return;
    for (const Index width : {64, 128}) expect_tensor_cores(step<bf16>(width), 64, 128);
  }

  TEST_CASE("speed: rows are loaded once for a tile of the other side") {
    ask("How many times is each row of Q loaded from global memory, and by how many keys is it used each time?");
    if (!needs_a_check()) expect_tiled_traffic(step<fp16>(), 128, /*tile=*/32);
  }

  TEST_CASE("speed: tiles that see nothing of each other are not even read") {
    ask("Above the diagonal lie whole tiles that nobody may see. For a block's keys, which is the first tile of "
        "queries worth loading? And for a block's queries the last tile of keys?");
    if (!needs_a_check()) expect_blind_tiles_not_loaded(step<fp16>(), 512);
  }

  TEST_CASE("speed: no row of scores is kept in shared memory") {
    ask("For how many pairs at once does your block hold scores? What if there were a million keys, or queries?");
    if (!needs_a_check()) expect_no_row_of_scores(step<bf16>());
  }

  TEST_CASE("ragged: what keys take is what queries give") {
    ask("The weights of a query add up to 1: so how much of its dO is in all dV together? Which places of the last "
        "tile are no keys at all, or no queries, and what is their weight?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const auto& [queries, keys] : {Lengths{33, 45}, {1, 130}, {130, 3}, {65, 20}}) {
        for (const bool deterministic : {false, true}) {
          if (kernels_are_checked() && deterministic) continue;
          const AttentionCase sizes{
              .why = "", .queries = queries, .keys = keys, .width = 64, .scale = 0.2f, .number = 14};
          if (!expect_balanced(step<T>(), sizes, {.deterministic = deterministic})) return;
        }
      }
    });
  }

  TEST_CASE("ragged: heads and batch items know nothing of each other") {
    ask("Six heads, in two orders. From a block's number, how do you know its head, its batch item, and where they "
        "lie? In which of your kernels?");
    for_both_types([](auto type) {
      using T = decltype(type);
      expect_heads_apart(step<T>(), 21, 35, /*causal=*/is_bf16<T>);
    });
  }

  TEST_CASE("ragged: rows may lie anywhere in memory") {
    ask("How far apart in memory are two rows of this view? Ten tensors have strides, and the gradient of sum() has a "
        "stride of 0: which of yours belongs to which?");
    const AttentionCase sizes{.why = "", .batch = 2, .heads = 2, .queries = 17, .keys = 21, .width = 64, .number = 15};
    if (!expect_layouts_do_not_matter(step<fp16>(), sizes)) return;
    expect_repeated_d_output(step<bf16>(), sizes);
  }

  TEST_CASE("causal: a key hears from the queries that see it and from no other") {
    ask("The last query stands at the last key. In a tile of S^T a lane has two keys and pairs of queries: which of "
        "them see each other?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const auto& [queries, keys] :
           {Lengths{16, 16}, {33, 33}, {17, 53}, {53, 17}, {130, 150}, {150, 20}, {1, 70}, {65, 64}}) {
        if (kernels_are_checked() && queries == 130) continue;
        if (!expect_even_shares(step<T>(), queries, keys, true)) return;
      }
    });
  }

  TEST_CASE("causal: a query that sees no key has gradients of 0 and gives nothing to any key") {
    ask("Its lse is -inf. What is exp2(score - lse) then, and what should it be? A tensor core multiplies all 16 rows "
        "of a fragment: with what, if one of them is NaN?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const bool deterministic : {false, true}) {
        if (kernels_are_checked() && deterministic != is_bf16<T>) continue;
        for (const auto& [queries, keys] : {Lengths{9, 4}, {4, 0}, {140, 7}, {33, 32}, {0, 70}}) {
          if (kernels_are_checked() && queries == 33) continue;
          if (!expect_zeros_where_nobody_looks(step<T>(), queries, keys, /*causal=*/true, deterministic)) return;
        }
        for (const auto& [queries, keys] : {Lengths{130, 0}, {0, 9}, {0, 0}}) {
          if (!expect_zeros_where_nobody_looks(step<T>(), queries, keys, /*causal=*/false, deterministic)) return;
        }
        if (!expect_blind_are_harmless(step<T>(), 29, 20, deterministic)) return;
        if (kernels_are_checked()) continue;
        if (!expect_blind_are_harmless(step<T>(), 100, 10, deterministic)) return;
      }
    });
  }

  TEST_CASE("causal: a key that a query may not see cannot move its gradient") {
    ask("A key that only later queries may see holds NaN, or its value does. dS is 0 there, and a tensor core "
        "multiplies it by that key all the same: what is 0 times NaN, and what could stand in the tile instead of "
        "NaN?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const Poisoned poisoned : {Poisoned::key, Poisoned::value}) {
        for (const auto& [queries, keys] : {Lengths{33, 33}, {11, 37}, {37, 21}}) {
          if (kernels_are_checked() && queries != 11) continue;
          for (const Index place : {keys / 2, keys - 1}) {
            for (const bool deterministic : {false, true}) {
              // All of it for one type and as many queries as keys; otherwise one way for each place.
              const bool all = is_bf16<T> && queries == keys;
              if (!all && is_bf16<T> != (deterministic == (place == keys - 1))) continue;
              if (!expect_forbidden_is_harmless(step<T>(), queries, keys, place, poisoned, deterministic)) return;
            }
          }
        }
      }
    });
  }

  TEST_CASE("a dO of 0 gives nothing and a dO of twice the size gives twice as much") {
    ask("Every gradient is a sum of products with dO in them. Which of your terms has none, or two?");
    const AttentionCase sizes{
        .why = "", .heads = 2, .queries = 37, .keys = 45, .width = 64, .causal = true, .number = 12};
    if (!kernels_are_checked() && !expect_nothing_from_nothing(step<fp16>(), sizes)) return;
    if (expect_nothing_from_nothing(step<bf16>(), sizes)) expect_linear(step<bf16>(), sizes);
  }

  TEST_CASE("half the scale and twice the keys are the same scores") {
    ask("Differentiate scale * q.k by q, then by k. How many times does scale stand between dO and dQ, and between dO "
        "and dV?");
    for (const bool causal : {false, true}) {
      const AttentionCase sizes{.why = "", .queries = 37, .keys = 45, .width = 64, .causal = causal, .number = 13};
      if (!expect_scale_belongs_to_keys(step<bf16>(), sizes)) return;
    }
  }

  TEST_CASE("numbers beyond 65504 on the way") {
    ask("Where are the largest numbers of your computation, before or after the scale? Which type holds them?");
    const AttentionCase few{.why = "", .queries = 20, .keys = 6, .width = 128, .number = 21};
    AttentionCase scaled{.why = "", .queries = 9, .keys = 40, .width = 128, .scale = 1e-4f, .number = 22};
    for_both_types([&](auto type) {
      using T = decltype(type);
      for (const bool deterministic : {false, true}) {
        if (kernels_are_checked() && deterministic != is_bf16<T>) continue;
        const BackwardOptions options{.deterministic = deterministic};
        const BackwardInputs large_dp =
            magnified<T>(few, {.query = 0.1, .key = 0.1, .value = 200.0, .d_output = 200.0});
        if (!expect_right(step<T>(128), large_dp, options)) return;
        const BackwardInputs large_products = magnified<T>(scaled, {.query = 120.0, .key = 120.0});
        if (!expect_right(step<T>(128), large_products, options)) return;
      }
    });
  }

  TEST_CASE("as exact as 16 bits allow") {
    ask("Which numbers did you round to 16 bits? The operands arrive so, and P, dS and the gradients have to be. "
        "Anything else, and anything twice?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const Index width : {64, 128}) {
        const AttentionCase c{.why = "", .queries = 33, .keys = 70, .width = width, .number = 23};
        if (!expect_right(step<T>(), magnified<T>(c, {.query = 2.5}), {.deterministic = true})) return;
        if (kernels_are_checked()) return;
        if (!expect_right(step<T>(), magnified<T>(c, {}), {.deterministic = false})) return;
      }
    });
  }

  TEST_CASE("agrees with the float64 reference") {
    ask("Which of the cases agree, and what have the others in common?");
    for (const FlashCase& c : mma_backward_cases()) {
      run_case(c.problem.number, c.text(), [&] {
        for_both_types([&](auto type) {
          using T = decltype(type);
          if (!is_tried<T>(c)) return;
          const BackwardInputs in = with_forward(inputs_of<T>(c.problem));
          const Judgement<T> judgement(in);
          for (const bool way : {false, true}) {
            if (is_small(c) && way != deterministic<T>(c)) continue;
            const Gradients got = gradients(step<T>(), in, {.deterministic = way, .layouts = c.layouts});
            if (!expect_gradients(got, judgement)) not_so<T>(in, way ? ", deterministic" : "");
          }
        });
      });
    }
  }

  TEST_CASE("long sequences and many heads") {
    ask("The short ones are right. Which of your numbers has a limit that only a long sequence reaches?");
    if (needs_a_gpu(step<bf16>())) return;
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const bool causal : {false, true}) {
        if (!expect_long(step<T>(), 2, 8, 256, 256, 64, causal)) return;
        if (!expect_long(step<T>(), 1, 16, 512, 512, 128, causal)) return;
        if (!expect_long(step<T>(), 4, 8, 1024, 1024, 64, causal)) return;
        if (!expect_long(step<T>(), 1, 2, 127, 513, 128, causal)) return;
        if (!expect_long(step<T>(), 1, 2, 1023, 1024, 64, causal)) return;
        if (!expect_long(step<T>(), 1, 2, 239, 1, 64, causal)) return;
        if (!expect_long(step<T>(), 1100, 64, 2, 3, 64, causal)) return;  // 70400 heads
      }
    });
  }

  TEST_CASE("says what is wrong with bad arguments") {
    for_both_types([](auto type) { expect_bad_arguments_refused(step<decltype(type)>()); });
  }
}
