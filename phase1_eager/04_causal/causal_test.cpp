#include "causal.hpp"

#include <cmath>

#include "phase1_eager/heads_suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

const HeadsStep CAUSAL{eager_causal, /*causal=*/true};

// The causal cases, and those of step 03 with the triangle.
std::vector<AttentionCase> model_cases() {
  std::vector<AttentionCase> cases = select([](const AttentionCase& c) {
    const bool padding_or_nothing = c.masking == Masking::none || c.masking >= Masking::padding_none;
    return padding_or_nothing && !c.scale;
  });
  for (AttentionCase& c : cases) c.causal = true;
  return cases;
}

// Several heads, few tokens: those that can be tried with every key and every head changed.
std::vector<AttentionCase> small_cases() {
  return CAUSAL.all({36, 41, 45, 47, 51, 52, 54, 55, 56, 57, 58, 59, 60, 65});
}

const Recognise recognise_causal(
    [] {
      std::vector<int> chosen = {36, 39, 42, 43, 48};
      for (const AttentionCase& c : select([](const AttentionCase& c) { return c.causal; })) chosen.push_back(c.number);
      return chosen;
    }(),
    [](int number) -> std::vector<Array> {
      const AttentionCase c = CAUSAL.number(number);
      return {to_array(CAUSAL(c, make_inputs(c)))};
    });

// The first queries of all, or the last ones: rows `begin` to `end` of an array [B, Sq, columns].
Array rows(const Array& all, Index begin, Index end) {
  Array some{{all.shape.at(0), end - begin, all.shape.at(2)}, {}};
  for (Index b = 0; b < some.shape[0]; ++b) {
    const auto first = all.values.begin() + (b * all.shape[1] + begin) * all.shape[2];
    some.values.insert(some.values.end(), first, first + some.shape[1] * some.shape[2]);
  }
  return some;
}

// Tokens `begin` to `end` of every batch item.
View<const float, 3> token_range(const View<const float, 3>& x, Index begin, Index end) {
  return {x.data() + begin * x.stride(1), {x.size(0), end - begin, x.size(2)}, x.strides()};
}

}  // namespace

TEST_SUITE("phase1.04_causal") {
  TEST_CASE("a query sees the keys up to its own position counted from the end") {
    ask("Draw the triangle for 2 queries and 5 keys, and for 5 queries and 2 keys. The last query stands at the last "
        "key: where do the others stand?");
    for (const Index heads : {1, 7}) {
      for (Index queries = 1; queries <= 6; ++queries) {
        for (Index keys = 1; keys <= 6; ++keys) {
          if (!expect_to_see(CAUSAL, {2, heads, queries, keys, keys}, {})) return;
        }
      }
    }
  }

  TEST_CASE("a query sees a key only if both the triangle and the padding allow it") {
    ask("The triangle allows a key and the padding forbids it, or the other way round. May it be seen?");
    for (Index queries = 1; queries <= 6; ++queries) {
      for (Index keys = 1; keys <= 6; ++keys) {
        BoolMatrix mask(6, keys);  // padding on the right, on the left, two patterns in between, nothing else, none
        for (Index j = 0; j < keys; ++j) {
          mask.col(j) << (j < (keys + 1) / 2), (j >= keys / 2), (j % 2 == 0), (j % 3 != 0), false, true;
        }
        if (!expect_to_see(CAUSAL, {6, 7, queries, keys, keys}, mask)) return;
        if (!expect_to_see(CAUSAL, {6, 2, queries, keys, keys}, BoolMatrix(mask.colwise().reverse()))) return;
      }
    }
  }

  TEST_CASE("three tokens worked with a pencil in the README") {
    ask("Follow the README's example row by row. Which is the first of its numbers that yours differs from?");
    const float ln2 = std::log(2.0f);
    const Tensor<float, 3> q = tokens({1, 3, 1}, {ln2, ln2, ln2});
    const Tensor<float, 3> k = tokens({1, 3, 1}, {1, 0, 1});
    const Tensor<float, 3> v = tokens({1, 3, 1}, {15, 30, 60});
    const auto expect_output = [](const char* name, const Tensor<float, 3>& output, const Array& want) {
      expect_close(name, to_array(output), want, fp32_bound(want, 2.0), OUTPUT);
    };
    expect_output("all three", eager_causal(q, k, v, 1), {{1, 3, 1}, {15, 20, 36}});
    expect_output("last two", eager_causal(token_range(q, 1, 3), k, v, 1), {{1, 2, 1}, {20, 36}});
    expect_output("padded", eager_causal(q, k, v, 1, bool_matrix({{false, true, true}})), {{1, 3, 1}, {0, 30, 50}});
  }

  TEST_CASE("every query finds the needle in its own past") {
    ask("Take one number of your output and walk back: which channels of which token of which batch item made it?");
    for (const Sizes& sizes : {Sizes{1, 1, 3, 4, 2}, Sizes{1, 2, 3, 3, 3}, Sizes{1, 3, 4, 4, 1}, Sizes{2, 1, 4, 3, 5},
                               Sizes{2, 3, 4, 5, 2}, Sizes{3, 2, 6, 4, 7}, Sizes{5, 4, 4, 4, 4}, Sizes{3, 9, 2, 6, 3},
                               Sizes{2, 5, 1, 7, 2}, Sizes{2, 2, 7, 1, 2}, Sizes{9, 17, 2, 3, 1}, Sizes{2, 2, 3, 4, 70},
                               Sizes{1, 2, 40, 150, 2}, Sizes{1, 2, 300, 3, 2}, Sizes{1, 1, 6, 6, 1}}) {
      if (!expect_needles(CAUSAL, sizes)) return;
    }
  }

  TEST_CASE("new numbers in one head of one batch item move its output alone") {
    ask("Change head 1 of batch item 0. Which columns of which rows of the output may move, and must they?");
    expect_heads_apart(CAUSAL, small_cases());
  }

  TEST_CASE("a query hears no other query") {
    ask("Change query 0. May the output of query 1 move? Over which index do your weights add up to 1?");
    expect_queries_apart(CAUSAL, small_cases());
  }

  TEST_CASE("a key that a query may not see cannot move its output whatever the key holds") {
    ask("Change only the last key. Which outputs may move? And if it holds NaN?");
    for_each(small_cases(), [](const AttentionCase& c) { expect_deaf_to_forbidden_keys(CAUSAL, c); });
  }

  TEST_CASE("a query that may attend to nothing gets 0") {
    ask("Token 0 is padding: list the keys that it may see. If a query may look at nobody, what is its maximum, its "
        "sum, its quotient?");
    for (const int number : {22, 36, 44, 47, 49, 52, 55, 57, 58, 59, 60}) {
      const AttentionCase c = CAUSAL.number(number);
      run_case(number, c.text(), [&] {
        const AttentionInputs inputs = make_inputs(c);
        const Array output = to_array(CAUSAL(c, inputs));
        const std::vector<Index> shape = {c.batch, c.queries, c.heads * c.value_width};
        for (Index b = 0; b < c.batch; ++b) {
          for (Index i = 0; i < c.queries; ++i) {
            bool any = false;
            for (Index j = 0; j < c.keys; ++j) any = any || may_attend(c, inputs, b, i, j);
            if (any || !expect(output.shape == shape, "output", "has shape " + to_text(output.shape))) continue;
            Array row{{c.heads * c.value_width}, {}};
            const auto first = output.values.begin() + (b * c.queries + i) * row.shape[0];
            row.values.assign(first, first + row.shape[0]);
            expect_all(
                "output", row, 0.0, 0.0, {"column"},
                "query " + std::to_string(i) + " of batch item " + std::to_string(b) + " has no key to attend to");
          }
        }
      });
    }
  }

  TEST_CASE("the last queries answer alone as they do among all") {
    ask("A model has read 5 tokens and asks for the sixth alone, with the keys of all six. Where does that one query "
        "stand?");
    for_each(small_cases(), [](const AttentionCase& c) {
      const AttentionInputs inputs = make_inputs(c);
      const Array all = to_array(CAUSAL(c, inputs));
      const Bound bound = in_model_layout(expected(c, inputs).output_bound);
      if (!expect(all.shape == bound.magnitude.shape, "output", "has shape " + to_text(all.shape))) return;
      for (const Index begin : {c.queries - 1, c.queries - 2, c.queries / 2, Index{1}}) {
        if (begin < 0 || begin >= c.queries) continue;
        const auto some = eager_causal(token_range(inputs.query.model(), begin, c.queries), inputs.key.model(),
                                       inputs.value.model(), c.heads, inputs.padding);
        const std::string name = "last " + std::to_string(c.queries - begin);
        if (!expect_close(name, to_array(some), rows(all, begin, c.queries),
                          {bound.relative, rows(bound.magnitude, begin, c.queries)}, OUTPUT)) {
          return;
        }
      }
    });
  }

  TEST_CASE("tokens that come later change nothing before them") {
    ask("Leave out the last token, its query as well as its key. Which outputs are left, and may they differ?");
    for_each(small_cases(), [](const AttentionCase& c) {
      const AttentionInputs inputs = make_inputs(c);
      const Array all = to_array(CAUSAL(c, inputs));
      const Bound bound = in_model_layout(expected(c, inputs).output_bound);
      if (!expect(all.shape == bound.magnitude.shape, "output", "has shape " + to_text(all.shape))) return;
      for (const Index dropped : {1, 2, 5}) {
        const Index queries = c.queries - dropped;
        const Index keys = c.keys - dropped;
        if (queries < 1 || keys < 1) continue;
        PaddingMask mask;
        if (inputs.padding) mask = BoolMatrix(inputs.padding->leftCols(keys));
        const auto some =
            eager_causal(token_range(inputs.query.model(), 0, queries), token_range(inputs.key.model(), 0, keys),
                         token_range(inputs.value.model(), 0, keys), c.heads, mask);
        const std::string name = "but for the last " + std::to_string(dropped);
        if (!expect_close(name, to_array(some), rows(all, 0, queries),
                          {bound.relative, rows(bound.magnitude, 0, queries)}, OUTPUT)) {
          return;
        }
      }
    });
  }

  TEST_CASE("no key of a long past is lost") {
    ask("Query 199 of as many queries as keys may see 200 keys. With weights that are all alike, what is the mean of "
        "the numbers 0 to 199?");
    for (const Sizes& n : {Sizes{1, 2, 213, 200, 2}, Sizes{1, 2, 200, 213, 2}, Sizes{2, 2, 3, 2050, 2}}) {
      expect_no_key_lost(CAUSAL, n);
    }
  }

  TEST_CASE("an empty batch and sequences of no token are legal") {
    ask("How many rows has the output if there is no query? And what is in them if there is no key?");
    expect_emptiness_legal(CAUSAL);
  }

  TEST_CASE("a mask that allows everything changes nothing") {
    ask("In this mask true means attend. What should a mask of true change?");
    expect_mask_of_true_to_change_nothing(CAUSAL, {36, 50, 51, 52, 65});
  }

  TEST_CASE("values of one give an output of one") {
    ask("What do the weights of a query add up to in each head? Then what must a value of 1 everywhere become?");
    expect_averages(CAUSAL, model_cases());
  }

  TEST_CASE("q and k and v may be slices of something larger") {
    ask("k and v are slices of a cache with room for more tokens than there are. How far is it in memory to the next "
        "token, how far to the next batch item, and is it as far in q?");
    expect_slices_read(CAUSAL, model_cases());
  }

  TEST_CASE("every call stands on its own and leaves its arguments alone") {
    ask("Call it twice with other numbers in the same memory. What of the first call may the second one know?");
    expect_calls_apart(CAUSAL, {36, 51, 52, 57, 60});
  }

  TEST_CASE("agrees with the float64 reference") { expect_reference_everywhere(CAUSAL, model_cases()); }

  TEST_CASE("says what is wrong with bad arguments") { expect_bad_arguments_refused(CAUSAL); }
}
