#include "attention.hpp"

#include <cmath>
#include <limits>

#include "common/testing/suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
const Axes OUTPUT = {"query", "channel"};
const Axes WEIGHTS = {"query", "key"};

std::vector<AttentionCase> one_head_cases() {
  return select([](const AttentionCase& c) { return c.batch * c.heads == 1 && !c.causal; });
}

Mask mask_of(const AttentionInputs& inputs) {
  if (inputs.allowed) return *inputs.allowed;
  if (inputs.bias) return *inputs.bias;
  return {};
}

AttentionResult answer(const AttentionCase& c, const AttentionInputs& inputs) {
  return attention(inputs.query.head(), inputs.key.head(), inputs.value.head(), mask_of(inputs), c.scale);
}

const Recognise recognise_attention(numbers(one_head_cases()), [](int number) -> std::vector<Array> {
  const AttentionCase& c = attention_case(number);
  const AttentionResult result = answer(c, make_inputs(c));
  return {to_array(result.output), to_array(result.weights)};
});

Matrix matrix(std::initializer_list<std::initializer_list<float>> rows) { return Matrix(rows); }

// What NaN in the places that a query may not see does to its output: nothing.
void expect_deaf_to_forbidden_keys(const AttentionCase& c, float poison) {
  const AttentionInputs clean = make_inputs(c);
  const AttentionResult want = answer(c, clean);
  for (Index j = 0; j < c.keys; ++j) {
    AttentionInputs poisoned = make_inputs(c);
    for (Index d = 0; d < c.width; ++d) poisoned.key.heads()(0, 0, j, d) = poison;
    for (Index d = 0; d < c.value_width; ++d) poisoned.value.heads()(0, 0, j, d) = poison;
    const AttentionResult got = answer(c, poisoned);
    for (Index i = 0; i < c.queries; ++i) {
      if (may_attend(c, clean, 0, i, j)) continue;
      const std::string why = "when key " + std::to_string(j) + ", which query " + std::to_string(i) +
                              " may not see, became " + std::to_string(poison);
      const bool same =
          expect_same_bits("output", to_array(got.output.row(i)), to_array(want.output.row(i)), {"row", "channel"},
                           why) &&
          expect_same_bits("weights", to_array(got.weights.row(i)), to_array(want.weights.row(i)), {"row", "key"}, why);
      if (!same) return;
    }
  }
}

}  // namespace

TEST_SUITE("phase1.02_attention") {
  TEST_CASE("a query orthogonal to every key attends to all of them alike") {
    ask("A query whose product with every key is 0 prefers none of them. What is the weight of each of 4 keys?");
    const Matrix query = matrix({{0, 0, 3}});
    const Matrix key = matrix({{1, 0, 0}, {0, 2, 0}, {-1, 5, 0}, {4, 4, 0}});
    const Matrix value = matrix({{4, 8}, {0, 8}, {8, 0}, {4, 0}});
    const AttentionResult result = attention(query, key, value);
    expect_all("weights", to_array(result.weights), 0.25, 1e-7, WEIGHTS, "each of 4 keys should weigh 1/4");
    expect_all("output", to_array(result.output), 4.0, 1e-6, OUTPUT, "the mean of the values is 4 in both channels");
  }

  TEST_CASE("two queries and three keys as worked with a pencil in the README") {
    ask("Follow the README's example line by line. Which is the first of its numbers that yours differs from?");
    const Matrix query = matrix({{2, 0}, {0, 2}});
    const Matrix key = matrix({{1, 0}, {0, 1}, {1, 1}});
    const Matrix value = matrix({{1, 0}, {0, 1}, {1, 1}});
    const AttentionResult result = attention(query, key, value);
    // Scores / sqrt(2): [1.4142, 0, 1.4142] and [0, 1.4142, 1.4142]; e^1.4142 = 4.1133.
    const double one = std::exp(std::sqrt(2.0)) / (2.0 * std::exp(std::sqrt(2.0)) + 1.0);
    const double rest = 1.0 - 2.0 * one;
    const Array weights{{2, 3}, {one, rest, one, rest, one, one}};
    const Array output{{2, 2}, {2 * one, rest + one, rest + one, 2 * one}};
    expect_close("weights", to_array(result.weights), weights, fp32_bound(weights, 1.5), WEIGHTS);
    expect_close("output", to_array(result.output), output, fp32_bound(output, 1.5), OUTPUT);
  }

  TEST_CASE("a key that matches far better than the others gives its value alone") {
    ask("One score is 1000 above the rest. Which value should come out, and does it?");
    for (Index winner = 0; winner < 9; ++winner) {
      const Matrix query = Matrix::Constant(3, 4, 1.0f);
      Matrix key = Matrix::Constant(9, 4, -250.0f);
      key.row(winner).setConstant(250.0f);
      Matrix value(9, 5);
      for (Index j = 0; j < 9; ++j) value.row(j).setConstant(static_cast<float>(j + 1));
      const AttentionResult result = attention(query, key, value);
      expect_all("output", to_array(result.output), static_cast<double>(winner + 1), 0.0, OUTPUT,
                 "key " + std::to_string(winner) + " should win alone");
    }
  }

  TEST_CASE("values of one give an output of one") {
    ask("What do the weights of a query add up to? Then what must a value of 1 everywhere become?");
    for_each(one_head_cases(), [](const AttentionCase& c) {
      AttentionInputs inputs = make_inputs(c);
      for (Index j = 0; j < c.keys; ++j)
        for (Index d = 0; d < c.value_width; ++d) inputs.value.heads()(0, 0, j, d) = 1.0f;
      const Array output = to_array(answer(c, inputs).output);
      const Expected want = expected(c, inputs);
      Array ones = want.output;  // 1, or 0 where a query may attend to nothing
      for (double& one : ones.values) one = std::round(one);
      ones.shape = {c.queries, c.value_width};
      expect_close("output", output, ones, {2e-6, ones}, OUTPUT);
    });
  }

  TEST_CASE("with a scale of 0 every key weighs the same") {
    ask("Call it with scale = 0: what should every weight be?");
    const AttentionCase& c = attention_case(8);
    const Array weights = to_array(answer(c, make_inputs(c)).weights);
    expect_all("weights", weights, 1.0 / static_cast<double>(c.keys), 1e-7, WEIGHTS, "each of 7 keys should weigh 1/7");
  }

  TEST_CASE("a mask that adds ln 2 to one of two equal keys doubles its weight") {
    ask("The mask adds ln 2 to the first of two keys with equal scores. What are the two weights?");
    const Matrix query = matrix({{1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4}});
    const Matrix key = Matrix::Constant(2, 16, 0.1f);
    const Matrix value = matrix({{3}, {0}});
    const Matrix bias = matrix({{std::log(2.0f), 0.0f}});
    const Array weights{{1, 2}, {2.0 / 3.0, 1.0 / 3.0}};
    for (const std::optional<float> scale : {std::optional<float>{}, std::optional<float>{3.0f}}) {
      const AttentionResult result = attention(query, key, value, bias, scale);
      expect_close("weights", to_array(result.weights), weights, fp32_bound(weights, 10.0), WEIGHTS);
    }
  }

  TEST_CASE("a mask that allows everything changes nothing") {
    ask("In a boolean mask true means attend, and in an additive mask 0 adds nothing. What should these two masks do?");
    const AttentionCase& c = attention_case(3);
    const AttentionInputs inputs = make_inputs(c);
    const AttentionResult want = answer(c, inputs);
    AttentionInputs masked = make_inputs(c);
    masked.allowed = BoolMatrix::Constant(c.queries, c.keys, true);
    const AttentionResult all_true = answer(c, masked);
    expect_same_bits("output", to_array(all_true.output), to_array(want.output), OUTPUT, "under a mask of true");
    masked.allowed.reset();
    masked.bias = Matrix::Zero(c.queries, c.keys);
    const AttentionResult zeros = answer(c, masked);
    expect_same_bits("output", to_array(zeros.output), to_array(want.output), OUTPUT, "under an additive mask of 0");
  }

  TEST_CASE("a query that may attend to nothing has weights and output 0") {
    ask("If a query may look at nobody, what is its maximum, its sum, its quotient?");
    for (const int number : {22, 27, 30}) {
      const AttentionCase& c = attention_case(number);
      run_case(number, c.text(), [&] {
        const AttentionInputs inputs = make_inputs(c);
        const AttentionResult result = answer(c, inputs);
        for (Index i = 0; i < c.queries; ++i) {
          bool any = false;
          for (Index j = 0; j < c.keys; ++j) any = any || may_attend(c, inputs, 0, i, j);
          if (any) continue;
          const std::string what = "query " + std::to_string(i) + " may attend to nothing";
          expect_all("output", to_array(result.output.row(i)), 0.0, 0.0, {"row", "channel"}, what);
          expect_all("weights", to_array(result.weights.row(i)), 0.0, 0.0, {"row", "key"}, what);
        }
      });
    }
  }

  TEST_CASE("a key that a query may not see cannot move its output, whatever the key holds") {
    ask("A forbidden key holds NaN. Follow it through every line of yours: where does it first meet an allowed "
        "number?");
    for_each(select([](const AttentionCase& c) { return c.number >= 25 && c.number <= 34; }),
             [](const AttentionCase& c) {
               for (const float poison : {7.5f, -3e4f, INF, NOT_A_NUMBER}) expect_deaf_to_forbidden_keys(c, poison);
             });
  }

  TEST_CASE("the weights times the values are the output") {
    ask("Multiply the weights that you return by value. Do you get the output that you return?");
    for_each(one_head_cases(), [](const AttentionCase& c) {
      const AttentionInputs inputs = make_inputs(c);
      const AttentionResult result = answer(c, inputs);
      if (!expect(result.weights.rows() == c.queries && result.weights.cols() == c.keys, "weights",
                  "want shape [Sq, Sk]")) {
        return;
      }
      const Eigen::MatrixXd product = result.weights.cast<double>() * inputs.value.head().cast<double>();
      expect_close("output", to_array(result.output), to_array(product), expected(c, inputs).output_bound, OUTPUT);
    });
  }

  TEST_CASE("agrees with the float64 reference") {
    for_each(one_head_cases(), [](const AttentionCase& c) {
      const AttentionInputs inputs = make_inputs(c);
      const Expected want = expected(c, inputs);
      const AttentionResult result = answer(c, inputs);
      Array output = want.output;
      Array weights = want.weights;
      output.shape = {c.queries, c.value_width};
      weights.shape = {c.queries, c.keys};
      expect_close("weights", to_array(result.weights), weights, want.weights_bound, WEIGHTS);
      expect_close("output", to_array(result.output), output, want.output_bound, OUTPUT);
    });
  }

  TEST_CASE("says what is wrong with bad arguments") {
    const Matrix query = Matrix::Ones(5, 4);
    const Matrix key = Matrix::Ones(7, 4);
    const Matrix value = Matrix::Ones(7, 3);
    attention(query, key, value);  // these are right
    expect_rejected("a key narrower than the query", "key", [&] { attention(query, Matrix::Ones(7, 3), value); });
    expect_rejected("a value too few", "value", [&] { attention(query, key, Matrix::Ones(6, 3)); });
    expect_rejected("a boolean mask [Sk, Sq]", "mask",
                    [&] { attention(query, key, value, BoolMatrix(BoolMatrix::Constant(7, 5, true))); });
    expect_rejected("an additive mask [Sq, Sk + 1]", "mask",
                    [&] { attention(query, key, value, Matrix(Matrix::Zero(5, 8))); });
    expect_rejected("a scale that is NaN", "scale", [&] { attention(query, key, value, {}, NOT_A_NUMBER); });
    expect_rejected("an infinite scale", "scale", [&] { attention(query, key, value, {}, INF); });
    expect_rejected("a width of 0", "query", [&] { attention(Matrix(5, 0), Matrix(7, 0), value); });
  }
}
