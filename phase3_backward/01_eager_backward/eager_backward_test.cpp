#include "eager_backward.hpp"

#include <cmath>
#include <limits>
#include <map>

#include "common/attention/reference.hpp"
#include "common/testing/suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
const Axes QUERY = {"query", "channel"};
const Axes KEY = {"key", "channel"};

// ---- Cases and answers ----------------------------------------------------------------------------------------------

std::vector<AttentionCase> one_head_cases() {
  return select([](const AttentionCase& c) { return c.batch * c.heads == 1 && !c.causal; });
}

// Those whose gradients are of order 1: nothing in them is so small that it rounds to 0.
std::vector<AttentionCase> plain_cases() {
  return select([](const AttentionCase& c) {
    return c.batch * c.heads == 1 && !c.causal && c.scores == Scores::normal && c.keys > 0 && c.queries > 0;
  });
}

Mask mask_of(const AttentionInputs& inputs) {
  if (inputs.allowed) return *inputs.allowed;
  if (inputs.bias) return *inputs.bias;
  return {};
}

AttentionGradients answer(const AttentionCase& c, const AttentionInputs& inputs, const TokenTensor& d_output) {
  return attention_backward(inputs.query.head(), inputs.key.head(), inputs.value.head(), d_output.head(),
                            mask_of(inputs), c.scale);
}

AttentionGradients answer(const AttentionCase& c) { return answer(c, make_inputs(c), make_output_gradient(c)); }

const Recognise recognise_attention_backward(numbers(one_head_cases()), [](int number) -> std::vector<Array> {
  const AttentionGradients got = answer(attention_case(number));
  return {to_array(got.query), to_array(got.key), to_array(got.value)};
});

Index keys_seen_by(const AttentionCase& c, const AttentionInputs& inputs, Index i) {
  Index seen = 0;
  for (Index j = 0; j < c.keys; ++j) seen += may_attend(c, inputs, 0, i, j);
  return seen;
}

bool sees_a_key(const AttentionCase& c, const AttentionInputs& inputs, Index i) {
  return keys_seen_by(c, inputs, i) > 0;
}

bool seen_by_a_query(const AttentionCase& c, const AttentionInputs& inputs, Index j) {
  for (Index i = 0; i < c.queries; ++i) {
    if (may_attend(c, inputs, 0, i, j)) return true;
  }
  return false;
}

// ---- What the reference says, for one head --------------------------------------------------------------------------

ExpectedGradients wanted(const AttentionCase& c, const AttentionInputs& inputs, const TokenTensor& d_output) {
  ExpectedGradients want = expected_gradients(c, inputs, d_output);
  for (Array* array : {&want.query, &want.key, &want.value, &want.query_bound.magnitude, &want.key_bound.magnitude,
                       &want.value_bound.magnitude}) {
    *array = head_of(*array, 0, 0);
  }
  return want;
}

const ExpectedGradients& wanted(const AttentionCase& c) {
  static std::map<int, ExpectedGradients> known;
  const auto at = known.find(c.number);
  if (at != known.end()) return at->second;
  return known.emplace(c.number, wanted(c, make_inputs(c), make_output_gradient(c))).first->second;
}

bool expect_gradients(const AttentionGradients& got, const ExpectedGradients& want) {
  const bool value = expect_close("dV", to_array(got.value), want.value, want.value_bound, KEY);
  const bool query = expect_close("dQ", to_array(got.query), want.query, want.query_bound, QUERY);
  return expect_close("dK", to_array(got.key), want.key, want.key_bound, KEY) && query && value;
}

bool expect_same(const AttentionGradients& got, const AttentionGradients& want, const std::string& why) {
  const bool value = expect_same_bits("dV", to_array(got.value), to_array(want.value), KEY, why);
  const bool query = expect_same_bits("dQ", to_array(got.query), to_array(want.query), QUERY, why);
  return expect_same_bits("dK", to_array(got.key), to_array(want.key), KEY, why) && query && value;
}

bool has_shapes(const AttentionGradients& got, const AttentionCase& c) {
  const auto is = [](const Matrix& matrix, Index rows, Index columns) {
    return matrix.rows() == rows && matrix.cols() == columns;
  };
  return expect(is(got.query, c.queries, c.width), "dQ", "want the shape of query") &&
         expect(is(got.key, c.keys, c.width), "dK", "want the shape of key") &&
         expect(is(got.value, c.keys, c.value_width), "dV", "want the shape of value");
}

template <typename Numbers>
bool has_nan(const Numbers& numbers) {
  return numbers.array().isNaN().any();
}

bool expect_zero_row(const char* name, const Matrix& matrix, Index row, const std::string& what) {
  return expect_all(name, to_array(matrix.row(row)), 0.0, 0.0, {"row", "channel"}, what);
}

// ---- Finite differences ---------------------------------------------------------------------------------------------

// The loss sum(dO * output) in float64, of inputs that can be moved one number at a time.
struct Loss {
  const AttentionCase& c;
  const AttentionInputs& inputs;
  Array query = to_array(inputs.query.heads());
  Array key = to_array(inputs.key.heads());
  Array value = to_array(inputs.value.heads());
  Array d_output;
  Array bias = inputs.bias ? to_array(*inputs.bias) : Array{};

  Loss(const AttentionCase& attention_case, const AttentionInputs& its_inputs, const TokenTensor& its_d_output)
      : c(attention_case), inputs(its_inputs), d_output(to_array(its_d_output.heads())) {}

  double operator()() const {
    const auto view = [](const Array& array) {
      return View<const double, 4>(array.values.data(), {1, 1, array.shape[2], array.shape[3]});
    };
    reference::Problem problem{.query = view(query), .key = view(key), .value = view(value)};
    if (c.scale) problem.scale = *c.scale;
    const Shape<4> pairs{1, 1, c.queries, c.keys};
    if (inputs.allowed) problem.allowed = View<const bool, 4>(inputs.allowed->data(), pairs);
    if (inputs.bias) problem.bias = View<const double, 4>(bias.values.data(), pairs);
    const Array output = to_array(reference::forward(problem).output);
    double sum = 0.0;
    for (std::size_t i = 0; i < output.count(); ++i) sum += d_output.values[i] * output.values[i];
    return sum;
  }

  // By how much the loss rises for each number of `moved`, one of the three inputs, when that number rises.
  Array slopes(Array& moved) const {
    constexpr double step = 1e-5;  // the error of a central difference is of the order of step^2 and 1e-16 / step
    Array result{{moved.shape[2], moved.shape[3]}, {}};
    for (double& number : moved.values) {
      const double here = number;
      number = here + step;
      const double above = (*this)();
      number = here - step;
      const double below = (*this)();
      number = here;
      result.values.push_back((above - below) / (2.0 * step));
    }
    return result;
  }
};

// Small enough to move every number of.
std::vector<AttentionCase> small_cases() {
  std::vector<AttentionCase> cases = {
      {.why = "two scores", .queries = 1, .keys = 2, .width = 1, .value_width = 1},
      {.why = "no mask", .queries = 3, .keys = 4, .width = 3, .value_width = 2},
      {.why = "more queries than keys", .queries = 5, .keys = 2, .width = 2, .value_width = 3},
      {.why = "a scale", .queries = 3, .keys = 5, .width = 2, .value_width = 3, .scale = 1.5f},
      {.why = "a negative scale", .queries = 2, .keys = 4, .width = 3, .value_width = 2, .scale = -0.75f},
      {.why = "a boolean mask", .queries = 4, .keys = 5, .width = 3, .value_width = 2, .masking = Masking::pairs},
      {.why = "a boolean mask that leaves some queries without a key",
       .queries = 5,
       .keys = 4,
       .width = 2,
       .value_width = 3,
       .masking = Masking::pairs_empty_rows},
      {.why = "an additive mask, and a scale",
       .queries = 3,
       .keys = 4,
       .width = 3,
       .value_width = 4,
       .scale = 0.4f,
       .masking = Masking::bias},
      {.why = "an additive mask with -inf in it",
       .queries = 4,
       .keys = 5,
       .width = 2,
       .value_width = 2,
       .masking = Masking::bias_infinite},
  };
  int number = 301;  // not those of the shared cases
  for (AttentionCase& c : cases) c.number = number++;
  return cases;
}

// ---- Hand-made inputs -----------------------------------------------------------------------------------------------

Matrix identity(Index size) { return Matrix::Identity(size, size); }

Array array(Index rows, Index columns, const std::function<double(Index, Index)>& element) {
  Array result{{rows, columns}, {}};
  for (Index row = 0; row < rows; ++row)
    for (Index column = 0; column < columns; ++column) result.values.push_back(element(row, column));
  return result;
}

Array zeros(Index rows, Index columns) {
  return array(rows, columns, [](Index, Index) { return 0.0; });
}

// What `poison` in key `j` and its value does to the gradients of queries that may not see it, and, if nobody may, to
// everything else: nothing.
bool deaf_to(Index j, float poison, const AttentionCase& c, const AttentionInputs& clean,
             const AttentionGradients& want) {
  AttentionInputs poisoned = make_inputs(c);
  for (Index d = 0; d < c.width; ++d) poisoned.key.heads()(0, 0, j, d) = poison;
  for (Index d = 0; d < c.value_width; ++d) poisoned.value.heads()(0, 0, j, d) = poison;
  const AttentionGradients got = answer(c, poisoned, make_output_gradient(c));
  const std::string became = "key " + std::to_string(j) + " became " + std::to_string(poison);
  if (!seen_by_a_query(c, clean, j)) return expect_same(got, want, "when " + became + ", which nobody may see");
  for (Index i = 0; i < c.queries; ++i) {
    if (may_attend(c, clean, 0, i, j)) continue;
    const std::string why = "of query " + std::to_string(i) + ", which may not see it, when " + became;
    if (!expect_same_bits("dQ", to_array(got.query.row(i)), to_array(want.query.row(i)), {"row", "channel"}, why)) {
      return false;
    }
  }
  return true;
}

}  // namespace

TEST_SUITE("phase3.01_eager_backward") {
  TEST_CASE("two queries and three keys as worked with a pencil in the README") {
    ask("Follow the README's example line by line. Which is the first of its numbers that yours differs from?");
    const Matrix query{{2, 0}, {0, 2}};
    const Matrix key{{1, 0}, {0, 1}, {1, 1}};
    const Matrix d_output{{1, 0}, {1, 2}};
    const AttentionGradients got = attention_backward(query, key, key, d_output);
    const Array d_query{{2, 2}, {0.0683323, -0.0341662, 0.1063678, 0.1024985}};
    const Array d_key{{3, 2}, {0.0683323, -0.2049969, -0.1366646, -0.2127356, 0.0683323, 0.4177325}};
    const Array d_value{{3, 2}, {0.5541917, 0.2167669, 0.5541917, 0.8916165, 0.8916165, 0.8916165}};
    const auto bound = [](const Array& like) {
      return Bound{1e-5, array(like.shape[0], like.shape[1], [](Index, Index) { return 1.0; })};
    };
    expect_close("dV", to_array(got.value), d_value, bound(d_value), KEY);
    expect_close("dQ", to_array(got.query), d_query, bound(d_query), QUERY);
    expect_close("dK", to_array(got.key), d_key, bound(d_key), KEY);
  }

  TEST_CASE("with a single key its value gets all of the gradient and no score matters") {
    ask("There is one key. What is its weight before and after its score rises by 1?");
    const Matrix query{{3, -1}, {0, 2}, {5, 5}};
    const Matrix key{{2, 7}};
    const Matrix value{{4, -6, 1}};
    const Matrix d_output{{1, 2, 3}, {10, 20, 30}, {-100, 200, 400}};
    const AttentionGradients got = attention_backward(query, key, value, d_output);
    const Array sum{{1, 3}, {-89, 222, 433}};
    expect_close("dV", to_array(got.value), sum, {1e-6, array(1, 3, [](Index, Index) { return 430.0; })}, KEY);
    expect_all("dQ", to_array(got.query), 0.0, 0.02, QUERY, "the weight of a single key is 1, whatever its score");
    expect_all("dK", to_array(got.key), 0.0, 0.02, KEY, "the weight of a single key is 1, whatever its score");
  }

  TEST_CASE("a query of 0 hands the gradient of its output to all values in equal shares") {
    ask("All four weights are 1/4. What share of the output's gradient goes to each value? And what does a key gain by "
        "moving if the query is 0?");
    // Values and keys are unit vectors: dP is dO itself, and dQ reads dS out.
    const Matrix d_output{{4, 0, 0, 0}, {1, 2, 3, 2}, {0, -8, 0, 4}};
    const AttentionGradients got = attention_backward(Matrix::Zero(3, 4), identity(4), identity(4), d_output, {}, 2.0f);
    const auto d_of = [&](Index i, Index j) { return static_cast<double>(d_output(i, j)); };
    const auto mean = [&](Index i) { return (d_of(i, 0) + d_of(i, 1) + d_of(i, 2) + d_of(i, 3)) / 4.0; };
    const Array d_query = array(3, 4, [&](Index i, Index j) { return 2.0 * (d_of(i, j) - mean(i)) / 4.0; });
    const Array d_value = array(4, 4, [&](Index, Index c) { return (d_of(0, c) + d_of(1, c) + d_of(2, c)) / 4.0; });
    const auto bound = [](const Array& like) {
      return Bound{1e-6, array(like.shape[0], like.shape[1], [](Index, Index) { return 8.0; })};
    };
    expect_close("dV", to_array(got.value), d_value, bound(d_value), KEY);
    expect_close("dQ", to_array(got.query), d_query, bound(d_query), QUERY);
    expect_same_bits("dK", to_array(got.key), zeros(4, 4), KEY, "though every query is 0");
  }

  TEST_CASE("what one weight gains the other weights of its row lose") {
    ask("Raise the score of key k. By how much does its own weight rise, by how much does another key's fall, and what "
        "do these changes of a row add up to?");
    // Queries are the scores, values are unit vectors and dO picks weight k: dQ is row k of the Jacobian.
    const float scores[] = {0.0f, 1.0f, -0.5f, 2.0f, 0.25f};
    Matrix query(5, 5);
    for (Index i = 0; i < 5; ++i)
      for (Index j = 0; j < 5; ++j) query(i, j) = scores[j];
    double p[5];
    double sum = 0.0;
    for (const float score : scores) sum += std::exp(static_cast<double>(score));
    for (int j = 0; j < 5; ++j) p[j] = std::exp(static_cast<double>(scores[j])) / sum;
    const AttentionGradients got = attention_backward(query, identity(5), identity(5), identity(5), {}, 1.0f);
    const Array jacobian = array(5, 5, [&](Index k, Index j) { return k == j ? p[k] * (1.0 - p[k]) : -p[k] * p[j]; });
    const Array size = array(5, 5, [&](Index k, Index j) { return p[j] * ((k == j ? 1.0 : 0.0) + p[k]); });
    expect_close("dQ", to_array(got.query), jacobian, {3e-6, size}, {"weight", "score"});
    expect_close("dV", to_array(got.value), array(5, 5, [&](Index j, Index) { return p[j]; }),
                 {3e-6, array(5, 5, [](Index, Index) { return 1.0; })}, KEY);
  }

  TEST_CASE("a key that matches far better than the others takes all of the gradient") {
    ask("One score is 1000 above the rest, so its weight is 1 and stays 1. Who gets the gradient of the output, and "
        "does it matter if a score moves a little?");
    for (Index winner = 0; winner < 7; ++winner) {
      Matrix key = Matrix::Constant(7, 4, -250.0f);
      key.row(winner).setConstant(250.0f);
      Matrix value(7, 2);
      for (Index j = 0; j < 7; ++j) value.row(j).setConstant(static_cast<float>(j + 1));
      const Matrix d_output{{1, 2}, {4, 8}, {16, 32}};
      const AttentionGradients got = attention_backward(Matrix::Constant(3, 4, 1.0f), key, value, d_output);
      const std::string what = "key " + std::to_string(winner) + " alone has a weight";
      const Array d_value =
          array(7, 2, [&](Index j, Index c) { return j == winner ? 21.0 * static_cast<double>(c + 1) : 0.0; });
      bool same = expect_same_bits("dV", to_array(got.value), d_value, KEY, "although " + what);
      same = expect_all("dQ", to_array(got.query), 0.0, 0.0, QUERY, what) && same;
      if (!expect_all("dK", to_array(got.key), 0.0, 0.0, KEY, what) || !same) return;
    }
  }

  TEST_CASE("values that are all alike leave queries and keys nothing to gain") {
    ask("Every value is the same row. Can other weights change the output? Which number do you subtract so that dS "
        "knows this?");
    for_each(one_head_cases(), [](const AttentionCase& c) {
      AttentionInputs inputs = make_inputs(c);
      for (Index j = 0; j < c.keys; ++j)
        for (Index d = 0; d < c.value_width; ++d) inputs.value.heads()(0, 0, j, d) = static_cast<float>(d + 1);
      const TokenTensor d_output = make_output_gradient(c);
      const ExpectedGradients want = wanted(c, inputs, d_output);
      const AttentionGradients got = answer(c, inputs, d_output);
      expect_close("dQ", to_array(got.query), zeros(c.queries, c.width), want.query_bound, QUERY);
      expect_close("dK", to_array(got.key), zeros(c.keys, c.width), want.key_bound, KEY);
    });
  }

  TEST_CASE("a channel that is the same in all keys gives its query channel no gradient") {
    ask("Add a constant to all scores of a row: the weights stay. What must each row of dS add up to, and does yours?");
    for_each(one_head_cases(), [](const AttentionCase& c) {
      AttentionInputs inputs = make_inputs(c);
      const Index d = c.width - 1;
      for (Index j = 0; j < c.keys; ++j) inputs.key.heads()(0, 0, j, d) = 1.0f;
      const TokenTensor d_output = make_output_gradient(c);
      const AttentionGradients got = answer(c, inputs, d_output);
      if (!has_shapes(got, c)) return;
      const Array magnitude = wanted(c, inputs, d_output).query_bound.magnitude;
      const Array size = array(
          c.queries, 1, [&](Index i, Index) { return magnitude.values[static_cast<std::size_t>(i * c.width + d)]; });
      const double relative = wanted(c, inputs, d_output).query_bound.relative;
      expect_close("dQ", to_array(got.query.col(d)), zeros(c.queries, 1), {relative, size}, {"query", "last channel"});
    });
  }

  TEST_CASE("the gradients of all values add up to the gradients of all outputs") {
    ask("Each query hands out weights that add up to 1. What do the shares of its output's gradient add up to?");
    for_each(one_head_cases(), [](const AttentionCase& c) {
      const AttentionInputs inputs = make_inputs(c);
      const TokenTensor d_output = make_output_gradient(c);
      const AttentionGradients got = answer(c, inputs, d_output);
      if (!has_shapes(got, c)) return;
      Array want{{1, c.value_width}, {}};
      Array size = want;
      Array sum = want;
      for (Index d = 0; d < c.value_width; ++d) {
        double total = 0.0;
        double terms = 0.0;
        for (Index i = 0; i < c.queries; ++i) {
          if (!sees_a_key(c, inputs, i)) continue;
          total += static_cast<double>(d_output.head()(i, d));
          terms += std::abs(static_cast<double>(d_output.head()(i, d)));
        }
        want.values.push_back(total);
        size.values.push_back(terms);
        sum.values.push_back(got.value.col(d).cast<double>().sum());
      }
      expect_close("sum of dV", sum, want, {wanted(c).value_bound.relative, size}, {"all keys", "channel"});
    });
  }

  TEST_CASE("queries and keys have the same share in the scores") {
    ask("Query and key play the same part in scale * q.k. Then sum(dQ * Q) and sum(dK * K) are both sum(dS * S): are "
        "yours the same?");
    for_each(one_head_cases(), [](const AttentionCase& c) {
      const AttentionInputs inputs = make_inputs(c);
      const AttentionGradients got = answer(c, inputs, make_output_gradient(c));
      if (!has_shapes(got, c)) return;
      const ExpectedGradients& want = wanted(c);
      const auto product = [](const Array& one, const Array& other, bool size) {
        double sum = 0.0;
        for (std::size_t i = 0; i < one.count(); ++i) {
          const double term = one.values[i] * other.values[i];
          sum += size ? std::abs(term) : term;
        }
        return sum;
      };
      const Array query = to_array(inputs.query.head());
      const Array key = to_array(inputs.key.head());
      const double of_query = product(to_array(got.query), query, false);
      const double of_key = product(to_array(got.key), key, false);
      const double size = product(want.query_bound.magnitude, query, true);
      expect_close("sum(dQ * Q)", Array{{1}, {of_query}}, Array{{1}, {of_key}},
                   {want.query_bound.relative, Array{{1}, {2.0 * size}}}, {"sum(dK * K) being what is wanted"});
    });
  }

  TEST_CASE("twice the gradient of the output gives twice all gradients") {
    ask("The loss counts double. Does your answer change when dO doubles, and by what factor should it?");
    for_each(plain_cases(), [](const AttentionCase& c) {
      const AttentionInputs inputs = make_inputs(c);
      AttentionGradients want = answer(c, inputs, make_output_gradient(c));
      for (const float factor : {2.0f, -0.5f, 0x1p20f, 0x1p-20f}) {  // exact: only exponents change
        TokenTensor d_output = make_output_gradient(c);
        for (Index i = 0; i < c.queries; ++i)
          for (Index d = 0; d < c.value_width; ++d) d_output.heads()(0, 0, i, d) *= factor;
        const AttentionGradients scaled{want.query * factor, want.key * factor, want.value * factor};
        const std::string why = "of " + std::to_string(factor) + " times what they were for dO itself";
        if (!expect_same(answer(c, inputs, d_output), scaled, why)) return;
      }
    });
  }

  TEST_CASE("without a gradient of the output there is none at all") {
    ask("The loss does not look at the output: dO is 0. What can moving a query do to it?");
    for_each(one_head_cases(), [](const AttentionCase& c) {
      const TokenTensor zero = [&] {
        TokenTensor d_output = make_output_gradient(c);
        for (Index i = 0; i < c.queries; ++i)
          for (Index d = 0; d < c.value_width; ++d) d_output.heads()(0, 0, i, d) = 0.0f;
        return d_output;
      }();
      const AttentionGradients got = answer(c, make_inputs(c), zero);
      if (!has_shapes(got, c)) return;
      expect_all("dV", to_array(got.value), 0.0, 0.0, KEY, "dO is 0");
      expect_all("dQ", to_array(got.query), 0.0, 0.0, QUERY, "dO is 0");
      expect_all("dK", to_array(got.key), 0.0, 0.0, KEY, "dO is 0");
    });
  }

  TEST_CASE("a query whose output the loss ignores has no part in anything") {
    ask("One row of dO is 0. Which rows of P, dP and dS does that query have, and what do they hold?");
    for_each(plain_cases(), [](const AttentionCase& c) {
      const Index ignored = c.queries / 2;
      TokenTensor d_output = make_output_gradient(c);
      for (Index d = 0; d < c.value_width; ++d) d_output.heads()(0, 0, ignored, d) = 0.0f;
      AttentionInputs inputs = make_inputs(c);
      const AttentionGradients want = answer(c, inputs, d_output);
      if (!has_shapes(want, c)) return;
      expect_zero_row("dQ", want.query, ignored, "the loss ignores this query");
      for (Index d = 0; d < c.width; ++d) inputs.query.heads()(0, 0, ignored, d) = 3.0f - static_cast<float>(d % 5);
      expect_same(answer(c, inputs, d_output), want, "when a query changed whose output the loss ignores");
    });
  }

  TEST_CASE("the gradient of the values does not depend on the values") {
    ask("The output is a sum of weight times value. Differentiate it by one value: is any value left in the result?");
    for_each(one_head_cases(), [](const AttentionCase& c) {
      AttentionInputs inputs = make_inputs(c);
      const TokenTensor d_output = make_output_gradient(c);
      const Array want = to_array(answer(c, inputs, d_output).value);
      for (Index j = 0; j < c.keys; ++j)
        for (Index d = 0; d < c.value_width; ++d) inputs.value.heads()(0, 0, j, d) = static_cast<float>(3 * j - d);
      expect_same_bits("dV", to_array(answer(c, inputs, d_output).value), want, KEY, "when the values changed");
    });
  }

  TEST_CASE("a mask that allows everything changes nothing") {
    ask("In a boolean mask true means attend, and in an additive mask 0 adds nothing. What should these two masks do?");
    const AttentionCase& c = attention_case(5);
    AttentionInputs inputs = make_inputs(c);
    const TokenTensor d_output = make_output_gradient(c);
    const AttentionGradients want = answer(c, inputs, d_output);
    inputs.allowed = BoolMatrix::Constant(c.queries, c.keys, true);
    expect_same(answer(c, inputs, d_output), want, "under a mask of true");
    inputs.allowed.reset();
    inputs.bias = Matrix::Zero(c.queries, c.keys);
    expect_same(answer(c, inputs, d_output), want, "under an additive mask of 0");
  }

  TEST_CASE("a key that nobody may see has gradients of exactly 0") {
    ask("Nobody sees this key. If it moves, or its value does, what happens to the loss?");
    for (const int number : {25, 27, 28, 30}) {
      const AttentionCase& c = attention_case(number);
      run_case(number, c.text(), [&] {
        AttentionInputs inputs = make_inputs(c);
        for (const Index j : {Index{0}, c.keys / 2, c.keys - 1}) {
          for (Index i = 0; i < c.queries; ++i) {
            if (inputs.allowed) (*inputs.allowed)(i, j) = false;
            if (inputs.bias) (*inputs.bias)(i, j) = -INF;
          }
        }
        const AttentionGradients got = answer(c, inputs, make_output_gradient(c));
        if (!has_shapes(got, c)) return;
        for (const Index j : {Index{0}, c.keys / 2, c.keys - 1}) {
          const std::string what = "nobody may see key " + std::to_string(j);
          if (!expect_zero_row("dV", got.value, j, what) || !expect_zero_row("dK", got.key, j, what)) return;
        }
        expect_gradients(got, wanted(c, inputs, make_output_gradient(c)));
      });
    }
  }

  TEST_CASE("a query that may attend to nothing has no gradient and gives none") {
    ask("This query sees no key, so its output is 0 whatever happens. What does it hand to keys and values? And if its "
        "row of dO holds NaN: what is 0 times NaN?");
    for (const int number : {22, 27, 30}) {
      const AttentionCase& c = attention_case(number);
      run_case(number, c.text(), [&] {
        AttentionInputs inputs = make_inputs(c);
        TokenTensor d_output = make_output_gradient(c);
        const AttentionGradients want = answer(c, inputs, d_output);
        if (!has_shapes(want, c)) return;
        for (const float poison : {0.0f, 1e30f, NOT_A_NUMBER}) {
          for (Index i = 0; i < c.queries; ++i) {
            if (sees_a_key(c, inputs, i)) continue;
            const std::string what = "query " + std::to_string(i) + " may attend to nothing";
            if (!expect_zero_row("dQ", want.query, i, what)) return;
            for (Index d = 0; d < c.width; ++d) inputs.query.heads()(0, 0, i, d) = poison;
            for (Index d = 0; d < c.value_width; ++d) d_output.heads()(0, 0, i, d) = poison;
          }
          const std::string why =
              "when queries that may attend to nothing, and their rows of dO, became " + std::to_string(poison);
          if (!expect_same(answer(c, inputs, d_output), want, why)) return;
        }
      });
    }
  }

  TEST_CASE("a key that a query may not see cannot move its gradient whatever the key holds") {
    ask("A forbidden key holds NaN, or its value does. Follow it through every product of yours: where does it first "
        "meet an allowed number?");
    for_each(select([](const AttentionCase& c) { return c.number >= 25 && c.number <= 34; }),
             [](const AttentionCase& c) {
               AttentionInputs clean = make_inputs(c);
               const AttentionGradients want = answer(c, clean, make_output_gradient(c));
               if (!has_shapes(want, c)) return;
               for (const float poison : {7.5f, INF, NOT_A_NUMBER}) {
                 for (Index j = 0; j < c.keys; ++j) {
                   if (!deaf_to(j, poison, c, clean, want)) return;
                 }
               }
             });
  }

  TEST_CASE("a padded key that holds NaN moves nothing") {
    ask("The last keys are padding: nobody sees them, and they hold NaN. Which of your products takes them in?");
    for (const bool boolean : {true, false}) {
      AttentionCase c{.why = "", .queries = 6, .keys = 9, .width = 5, .value_width = 3};
      c.number = 320;
      AttentionInputs inputs = make_inputs(c);
      BoolMatrix allowed = BoolMatrix::Constant(6, 9, true);
      allowed.rightCols(3).setConstant(false);
      Matrix bias = Matrix::Zero(6, 9);
      bias.rightCols(3).setConstant(-INF);
      if (boolean) inputs.allowed = allowed;
      if (!boolean) inputs.bias = bias;
      const TokenTensor d_output = make_output_gradient(c);
      const AttentionGradients want = answer(c, inputs, d_output);
      if (!expect_gradients(want, wanted(c, inputs, d_output))) return;
      for (const float poison : {-1e30f, INF, NOT_A_NUMBER}) {
        for (Index j = 6; j < 9; ++j) {
          for (Index d = 0; d < 5; ++d) inputs.key.heads()(0, 0, j, d) = poison;
          for (Index d = 0; d < 3; ++d) inputs.value.heads()(0, 0, j, d) = poison;
        }
        const std::string why = "when padded keys became " + std::to_string(poison);
        if (!expect_same(answer(c, inputs, d_output), want, why)) return;
      }
    }
  }

  TEST_CASE("NaN in the gradient of one output is shown and reaches no other query") {
    ask("One row of dO holds NaN. Whose gradients may hold it, and what would a caller think if none did?");
    for_each(plain_cases(), [](const AttentionCase& c) {
      const AttentionInputs inputs = make_inputs(c);
      const AttentionGradients want = answer(c, inputs, make_output_gradient(c));
      if (!has_shapes(want, c)) return;
      for (const Index poisoned : {Index{0}, c.queries / 2, c.queries - 1}) {
        if (!sees_a_key(c, inputs, poisoned)) continue;
        TokenTensor d_output = make_output_gradient(c);
        d_output.heads()(0, 0, poisoned, 0) = NOT_A_NUMBER;
        const AttentionGradients got = answer(c, inputs, d_output);
        const std::string row = "row " + std::to_string(poisoned) + " of d_output";
        if (!expect(has_nan(got.value.col(0)), "dV", "holds no NaN, though " + row + " does")) return;
        // With a single key the weight stays 1 and the query's gradient may as well be 0.
        const bool moves = keys_seen_by(c, inputs, poisoned) > 1;
        if (!expect(!moves || has_nan(got.query.row(poisoned)), "dQ", "holds no NaN, though " + row + " does")) return;
        for (Index i = 0; i < c.queries; ++i) {
          if (i == poisoned) continue;
          const std::string why = "of query " + std::to_string(i) + " when " + row + " became NaN";
          if (!expect_same_bits("dQ", to_array(got.query.row(i)), to_array(want.query.row(i)), {"row", "channel"},
                                why)) {
            return;
          }
        }
      }
    });
  }

  TEST_CASE("NaN in one value is shown by the queries that see it and by nothing else") {
    ask("One value holds NaN, and some queries see it. Which of your numbers are made of it? What would a caller think "
        "if none were?");
    for_each(plain_cases(), [](const AttentionCase& c) {
      const AttentionInputs inputs = make_inputs(c);
      const TokenTensor d_output = make_output_gradient(c);
      const AttentionGradients want = answer(c, inputs, d_output);
      if (!has_shapes(want, c)) return;
      for (const Index poisoned : {Index{0}, c.keys / 2, c.keys - 1}) {
        AttentionInputs with_nan = make_inputs(c);
        with_nan.value.heads()(0, 0, poisoned, c.value_width - 1) = NOT_A_NUMBER;
        const AttentionGradients got = answer(c, with_nan, d_output);
        const std::string value = "value " + std::to_string(poisoned);
        if (!expect_same_bits("dV", to_array(got.value), to_array(want.value), KEY, "when " + value + " became NaN")) {
          return;
        }
        for (Index i = 0; i < c.queries; ++i) {
          const Matrix row = got.query.row(i);
          const std::string query = "of query " + std::to_string(i);
          if (may_attend(c, inputs, 0, i, poisoned)) {
            const bool shown = keys_seen_by(c, inputs, i) == 1 || has_nan(row);
            if (!expect(shown, "dQ", query + " holds no NaN, though it sees " + value + ", which does")) return;
          } else if (!expect_same_bits("dQ", to_array(row), to_array(want.query.row(i)), {"row", "channel"},
                                       query + ", which may not see it, when " + value + " became NaN")) {
            return;
          }
        }
      }
    });
  }

  TEST_CASE("rows may lie anywhere in memory") {
    ask("How far apart in memory are rows 0 and 1 of this view? d_output may be some columns of something wider, too.");
    const AttentionCase& c = attention_case(4);
    const AttentionInputs inputs = make_inputs(c);
    const Matrix query = inputs.query.head();
    const Matrix key = inputs.key.head();
    const Matrix value = inputs.value.head();
    const Matrix d_output = make_output_gradient(c).head();
    const AttentionGradients want = attention_backward(query, key, value, d_output);
    const auto widened = [](const Matrix& matrix) {
      Matrix wide(matrix.rows(), matrix.cols() + 7);  // full of NaN
      wide.middleCols(3, matrix.cols()) = matrix;
      return wide;
    };
    const auto part = [](const Matrix& wide) { return wide.middleCols(3, wide.cols() - 7); };
    const Matrix wide_query = widened(query);
    const Matrix wide_key = widened(key);
    const Matrix wide_value = widened(value);
    const Matrix wide_d_output = widened(d_output);
    expect_same(attention_backward(query, key, value, part(wide_d_output)), want,
                "when the rows of d_output lay apart");
    expect_same(attention_backward(part(wide_query), key, value, d_output), want, "when the rows of query lay apart");
    expect_same(attention_backward(query, part(wide_key), value, d_output), want, "when the rows of key lay apart");
    expect_same(attention_backward(query, key, part(wide_value), d_output), want, "when the rows of value lay apart");
  }

  TEST_CASE("the arguments stay as they were and a second call gives the same bits") {
    ask("The caller needs the inputs again, and may ask again. What do you write to, and what do you remember?");
    for (const int number : {6, 27, 30}) {
      const AttentionCase& c = attention_case(number);
      run_case(number, c.text(), [&] {
        const AttentionInputs inputs = make_inputs(c);
        const TokenTensor d_output = make_output_gradient(c);
        const AttentionGradients first = answer(c, inputs, d_output);
        const AttentionInputs untouched = make_inputs(c);
        expect_same_bits("query", to_array(inputs.query.head()), to_array(untouched.query.head()), QUERY,
                         "by the call");
        expect_same_bits("key", to_array(inputs.key.head()), to_array(untouched.key.head()), KEY, "by the call");
        expect_same_bits("value", to_array(inputs.value.head()), to_array(untouched.value.head()), KEY, "by the call");
        expect_same_bits("d_output", to_array(d_output.head()), to_array(make_output_gradient(c).head()), QUERY,
                         "by the call");
        const AttentionCase& other = attention_case(number + 1);
        answer(other);
        expect_same(answer(c, inputs, d_output), first, "in the second call");
      });
    }
  }

  TEST_CASE("agrees with finite differences of the loss in float64") {
    ask("Move one number of query by a hair and watch the loss: that quotient is what dQ says. In which of the three "
        "gradients is the first that differs, and which of the five products makes it?");
    for_each(small_cases(), [](const AttentionCase& c) {
      const AttentionInputs inputs = make_inputs(c);
      const TokenTensor d_output = make_output_gradient(c);
      Loss loss(c, inputs, d_output);
      ExpectedGradients want = wanted(c, inputs, d_output);  // its bounds; the numbers are those of the quotients
      want.query = loss.slopes(loss.query);
      want.key = loss.slopes(loss.key);
      want.value = loss.slopes(loss.value);
      for (Bound* bound : {&want.query_bound, &want.key_bound, &want.value_bound}) {
        // The quotient errs by some 1e-9, where anything depends on the number at all.
        for (double& size : bound->magnitude.values) size += size > 0.0 ? 1e-3 : 0.0;
      }
      expect_gradients(answer(c, inputs, d_output), want);
    });
  }

  TEST_CASE("agrees with the float64 reference") {
    for_each(one_head_cases(), [](const AttentionCase& c) { expect_gradients(answer(c), wanted(c)); });
  }

  TEST_CASE("says what is wrong with bad arguments") {
    const Matrix query = Matrix::Ones(5, 4);
    const Matrix key = Matrix::Ones(7, 4);
    const Matrix value = Matrix::Ones(7, 3);
    const Matrix d_output = Matrix::Ones(5, 3);
    attention_backward(query, key, value, d_output);  // these are right
    expect_rejected("a d_output with a row too many", "d_output",
                    [&] { attention_backward(query, key, value, Matrix::Ones(6, 3)); });
    expect_rejected("a d_output with a row too few", "d_output",
                    [&] { attention_backward(query, key, value, Matrix::Ones(4, 3)); });
    expect_rejected("a d_output as wide as query", "d_output",
                    [&] { attention_backward(query, key, value, Matrix::Ones(5, 4)); });
    expect_rejected("a d_output with a row for each key", "d_output",
                    [&] { attention_backward(query, key, value, Matrix::Ones(7, 3)); });
    expect_rejected("a key narrower than the query", "key",
                    [&] { attention_backward(query, Matrix::Ones(7, 3), value, d_output); });
    expect_rejected("a value too few", "value", [&] { attention_backward(query, key, Matrix::Ones(6, 3), d_output); });
    expect_rejected("a boolean mask with its axes exchanged", "mask", [&] {
      attention_backward(query, key, value, d_output, BoolMatrix(BoolMatrix::Constant(7, 5, true)));
    });
    expect_rejected("an additive mask with a key too many", "mask",
                    [&] { attention_backward(query, key, value, d_output, Matrix(Matrix::Zero(5, 8))); });
    expect_rejected("a scale that is NaN", "scale",
                    [&] { attention_backward(query, key, value, d_output, {}, NOT_A_NUMBER); });
    expect_rejected("a width of 0", "query", [&] { attention_backward(Matrix(5, 0), Matrix(7, 0), value, d_output); });
  }
}
