#include "multi_head.hpp"

#include <cmath>

#include "phase1_eager/heads_suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

const HeadsStep MULTI_HEAD{eager_bidirectional, /*causal=*/false};

std::vector<AttentionCase> model_cases() {
  return select([](const AttentionCase& c) {
    const bool padding_or_nothing = c.masking == Masking::none || c.masking >= Masking::padding_none;
    return padding_or_nothing && !c.scale && !c.causal;
  });
}

// Several heads, few tokens: those that can be tried with every query and every head changed.
std::vector<AttentionCase> small_cases() {
  return select([](const AttentionCase& c) { return c.number >= 35 && c.number <= 47 && !c.causal; });
}

std::vector<AttentionCase> padded_cases() {
  return select([](const AttentionCase& c) { return c.masking >= Masking::padding_none && !c.causal; });
}

const Recognise recognise_multi_head(numbers(model_cases()), [](int number) -> std::vector<Array> {
  const AttentionCase& c = attention_case(number);
  return {to_array(MULTI_HEAD(c, make_inputs(c)))};
});

}  // namespace

TEST_SUITE("phase1.03_multi_head") {
  TEST_CASE("two tokens in two heads worked with a pencil in the README") {
    ask("Follow the README's example head by head. Which is the first of its numbers that yours differs from?");
    const float ln3 = std::log(3.0f);
    const Tensor<float, 3> q = tokens({1, 2, 2}, {ln3, 0, 0, ln3});
    const Tensor<float, 3> k = tokens({1, 2, 2}, {1, 0, 0, 1});
    const Tensor<float, 3> v = tokens({1, 2, 4}, {4, 0, 12, 0, 8, 4, 20, 4});
    const Array output{{1, 2, 4}, {5, 1, 16, 2, 6, 2, 18, 3}};
    expect_close("output", to_array(eager_bidirectional(q, k, v, 2)), output, fp32_bound(output, 2.0), OUTPUT);
  }

  TEST_CASE("every query finds the needle in its own head and its own batch item") {
    ask("Take one number of your output and walk back: which channels of which token of which batch item made it?");
    for (const Sizes& sizes :
         {Sizes{1, 1, 3, 4, 2}, Sizes{1, 2, 3, 3, 3}, Sizes{1, 3, 4, 4, 1}, Sizes{2, 1, 4, 3, 5}, Sizes{2, 3, 4, 5, 2},
          Sizes{3, 2, 6, 4, 7}, Sizes{5, 4, 4, 4, 4}, Sizes{3, 9, 2, 6, 3}, Sizes{2, 5, 1, 7, 2}, Sizes{2, 2, 7, 1, 2},
          Sizes{9, 17, 2, 3, 1}, Sizes{2, 2, 3, 4, 70}, Sizes{1, 2, 40, 150, 2}, Sizes{1, 2, 300, 3, 2}}) {
      if (!expect_needles(MULTI_HEAD, sizes)) return;
    }
  }

  TEST_CASE("a head answers beside others as it does alone") {
    ask("Put two copies of one head side by side. Should either of them attend more evenly than it did alone?");
    for (const Index heads : {2, 3, 8}) {
      const Index width = 6;
      const Index value_width = 5;
      TokenTensor q(2, 7, heads, width);
      TokenTensor k(2, 9, heads, width);
      TokenTensor v(2, 9, heads, value_width);
      for (Index h = 0; h < heads; ++h) {  // in every head the same numbers
        const auto head_of = [&](View<float, 4> x) {
          return View<float, 4>(&x(0, h, 0, 0), {2, 1, x.size(2), x.size(3)}, x.strides());
        };
        fill_normal(head_of(q.heads()), 1);
        fill_normal(head_of(k.heads()), 2);
        fill_normal(head_of(v.heads()), 3);
      }
      TokenTensor q1(2, 7, 1, width);
      TokenTensor k1(2, 9, 1, width);
      TokenTensor v1(2, 9, 1, value_width);
      fill_normal(q1.heads(), 1);
      fill_normal(k1.heads(), 2);
      fill_normal(v1.heads(), 3);
      const Array alone = to_array(eager_bidirectional(q1.model(), k1.model(), v1.model(), 1));
      const Array together = to_array(eager_bidirectional(q.model(), k.model(), v.model(), heads));
      Array want{{2, 7, heads * value_width}, {}};
      for (Index row = 0; row < 2 * 7; ++row)
        for (Index column = 0; column < heads * value_width; ++column)
          want.values.push_back(alone.values.at(static_cast<std::size_t>(row * value_width + column % value_width)));
      Array ones = want;
      std::fill(ones.values.begin(), ones.values.end(), 1.0);
      if (!expect_close("output of " + std::to_string(heads) + " equal heads", together, want, fp32_bound(ones, 10.0),
                        OUTPUT)) {
        return;
      }
    }
  }

  TEST_CASE("new numbers in one head of one batch item move its output alone") {
    ask("Change head 1 of batch item 0. Which columns of which rows of the output may move, and must they?");
    expect_heads_apart(MULTI_HEAD, small_cases());
  }

  TEST_CASE("a query hears no other query") {
    ask("Change query 0. May the output of query 1 move? Over which index do your weights add up to 1?");
    expect_queries_apart(MULTI_HEAD, small_cases());
  }

  TEST_CASE("a query sees the keys of its batch item that are not padding") {
    ask("Write down the mask over pairs for batch item 1, from row 1 of [B, Sk]. What do its rows have in common?");
    const std::vector<BoolMatrix> masks = {
        bool_matrix({{true, true, false, true}, {false, true, true, true}, {true, false, false, false}}),
        bool_matrix({{true, true, true, true}, {true, true, true, true}, {true, true, true, false}}),
        bool_matrix({{true, false, true, true, false, true}, {false, false, true, true, true, false}}),
        bool_matrix({{false, false}, {true, true}, {false, true}, {true, false}, {true, true}}),
        bool_matrix({{true}, {false}, {true}}),
    };
    for (const BoolMatrix& mask : masks) {
      const BoolMatrix reversed = mask.colwise().reverse();  // the last batch item first
      for (const Index heads : {1, 2, 3, 7}) {
        for (const Index queries : {1, 2, 3, 4, 6, 9}) {
          const Sizes sizes{mask.rows(), heads, queries, mask.cols(), mask.cols()};
          if (!expect_to_see(MULTI_HEAD, sizes, {}) || !expect_to_see(MULTI_HEAD, sizes, mask) ||
              !expect_to_see(MULTI_HEAD, sizes, reversed))
            return;
        }
      }
    }
  }

  TEST_CASE("a padded key cannot move any output whatever the key holds") {
    ask("A padded key holds NaN. Follow it from k to the output: where does it first meet a number of a real key?");
    for_each(padded_cases(), [](const AttentionCase& c) { expect_deaf_to_forbidden_keys(MULTI_HEAD, c); });
  }

  TEST_CASE("a batch item that is nothing but padding gets 0") {
    ask("If a query may look at nobody, what is its maximum, its sum, its quotient?");
    for (const int number : {22, 47, 49}) {
      const AttentionCase& c = attention_case(number);
      run_case(number, c.text(), [&] {
        const Tensor<float, 3> output = MULTI_HEAD(c, make_inputs(c));
        const Index last = c.batch - 1;
        expect_all("output", to_array(output.view()[last]), 0.0, 0.0, {"query", "column"},
                   "batch item " + std::to_string(last) + " has no key to attend to");
      });
    }
  }

  TEST_CASE("no key of a long sequence is lost") {
    ask("A query weighs 2050 keys all alike. What is the mean of the numbers 0 to 2049?");
    for (const Sizes& n : {Sizes{1, 2, 200, 213, 2}, Sizes{2, 2, 3, 2050, 2}}) expect_no_key_lost(MULTI_HEAD, n);
  }

  TEST_CASE("an empty batch and sequences of no token are legal") {
    ask("How many rows has the output if there is no query? And what is in them if there is no key?");
    expect_emptiness_legal(MULTI_HEAD);
  }

  TEST_CASE("a mask that allows everything changes nothing") {
    ask("In this mask true means attend. What should a mask of true change?");
    expect_mask_of_true_to_change_nothing(MULTI_HEAD, {35, 36, 38, 41});
  }

  TEST_CASE("values of one give an output of one") {
    ask("What do the weights of a query add up to in each head? Then what must a value of 1 everywhere become?");
    expect_averages(MULTI_HEAD, model_cases());
  }

  TEST_CASE("q and k and v may be slices of something larger") {
    ask("k and v are slices of a cache with room for more tokens than there are. How far is it in memory to the next "
        "token, how far to the next batch item, and is it as far in q?");
    expect_slices_read(MULTI_HEAD, model_cases());
  }

  TEST_CASE("every call stands on its own and leaves its arguments alone") {
    ask("Call it twice with other numbers in the same memory. What of the first call may the second one know?");
    expect_calls_apart(MULTI_HEAD, {36, 38, 43, 45});
  }

  TEST_CASE("agrees with the float64 reference") { expect_reference_everywhere(MULTI_HEAD, model_cases()); }

  TEST_CASE("says what is wrong with bad arguments") { expect_bad_arguments_refused(MULTI_HEAD); }
}
