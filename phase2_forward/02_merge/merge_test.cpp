#include "merge.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "common/attention/reference.hpp"
#include "phase2_forward/suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
const Axes OUTPUT = {"query", "channel"};
const Axes LSE = {"query", "_"};

struct MergeCase {
  const char* why;
  Partial a;
  Partial b;

  std::string text() const {
    return std::string(why) + ": Sq=" + std::to_string(a.output.rows()) + " Dv=" + std::to_string(a.output.cols());
  }
};

Matrix normal(Index rows, Index columns, unsigned seed, float deviation = 1.0f) {
  Matrix matrix(rows, columns);
  fill_normal(View<float, 4>(matrix.data(), {1, 1, rows, columns}), seed);
  return matrix * deviation;
}

Vector vector(std::initializer_list<float> values) {
  Vector result(static_cast<Index>(values.size()));
  std::copy(values.begin(), values.end(), result.begin());
  return result;
}

// Outputs of order 1; each lse near `level`, spread by `deviation`.
Partial part(Index queries, Index channels, float level, float deviation, unsigned seed) {
  return {normal(queries, channels, seed), Vector(normal(queries, 1, seed + 1000, deviation).array() + level)};
}

// `part` with the listed queries empty: lse -inf, and `content` in their output.
Partial without(Partial part, std::initializer_list<Index> queries, float content) {
  for (const Index i : queries) {
    part.lse(i) = -INF;
    part.output.row(i).setConstant(content);
  }
  return part;
}

Partial empty(Index queries, Index channels, float content = 0.0f) {
  return {Matrix::Constant(queries, channels, content), Vector::Constant(queries, -INF)};
}

// Their numbers never change: new ones go to the end.
const std::vector<MergeCase>& merge_cases() {
  static const std::vector<MergeCase> cases = {
      {"one query, one channel", part(1, 1, 0, 1, 1), part(1, 1, 0, 1, 51)},
      {"log-sum-exps of order 1", part(6, 5, 0, 1, 2), part(6, 5, 0, 1, 52)},
      {"the second part is a little heavier", part(5, 4, 0, 0.3f, 3), part(5, 4, 2, 0.3f, 53)},
      {"the first part is a little heavier", part(5, 4, 3, 0.3f, 4), part(5, 4, 1, 0.3f, 54)},
      {"equal log-sum-exps", {normal(3, 4, 5), vector({0, 2.5f, -7})}, {normal(3, 4, 55), vector({0, 2.5f, -7})}},
      {"the second part is heavier by 20", part(4, 3, -10, 1, 6), part(4, 3, 10, 1, 56)},
      {"the first part is heavier by 20", part(4, 3, 10, 1, 7), part(4, 3, -10, 1, 57)},
      {"log-sum-exps near +100", part(5, 6, 100, 2, 8), part(5, 6, 100, 2, 58)},
      {"log-sum-exps near -120", part(5, 6, -120, 2, 9), part(5, 6, -120, 2, 59)},
      {"+100 against -100", part(3, 4, 100, 1, 10), part(3, 4, -100, 1, 60)},
      {"-100 against +100", part(3, 4, -100, 1, 11), part(3, 4, 100, 1, 61)},
      {"log-sum-exps near +10000", part(4, 5, 1e4f, 1.5f, 12), part(4, 5, 1e4f, 1.5f, 62)},
      {"log-sum-exps near -10000", part(4, 5, -1e4f, 1.5f, 13), part(4, 5, -1e4f, 1.5f, 63)},
      {"+10000 against -10000", part(3, 2, 1e4f, 1, 14), part(3, 2, -1e4f, 1, 64)},
      {"each query is far from its neighbours",
       {normal(6, 3, 15), vector({0, 300, -300, 50, 9000, -9000})},
       {normal(6, 3, 65), vector({1, 299, -301, -50, 9002, -8999})}},
      {"the first part is empty for some queries", without(part(6, 4, 1, 1, 16), {0, 2, 5}, 0.0f),
       part(6, 4, 1, 1, 66)},
      {"the second part is empty for some queries", part(6, 4, 1, 1, 17),
       without(part(6, 4, 1, 1, 67), {0, 2, 5}, 0.0f)},
      {"both are, for different queries", without(part(6, 4, 1, 1, 18), {1, 4}, 0.0f),
       without(part(6, 4, 1, 1, 68), {0, 5}, 0.0f)},
      {"both are, for some of the same queries", without(part(6, 4, 1, 1, 19), {1, 2, 4}, 0.0f),
       without(part(6, 4, 1, 1, 69), {2, 4, 5}, 0.0f)},
      {"the first part is empty", empty(4, 3), part(4, 3, 0, 1, 70)},
      {"the second part is empty", part(4, 3, 0, 1, 21), empty(4, 3)},
      {"both parts are empty", empty(3, 4), empty(3, 4)},
      {"empty, with NaN in the first output", without(part(5, 4, 1, 1, 23), {0, 3}, NOT_A_NUMBER),
       part(5, 4, 1, 1, 73)},
      {"empty, with NaN in the second output", part(5, 4, 1, 1, 24),
       without(part(5, 4, 1, 1, 74), {0, 3}, NOT_A_NUMBER)},
      {"empty, with infinity in the first output", without(part(5, 4, 1, 1, 25), {4}, INF), part(5, 4, 1, 1, 75)},
      {"both empty, with NaN in both outputs", empty(3, 3, NOT_A_NUMBER), empty(3, 3, NOT_A_NUMBER)},
      {"empty against -10000", empty(3, 4), part(3, 4, -1e4f, 1, 77)},
      {"-10000 against empty", part(3, 4, -1e4f, 1, 28), empty(3, 4)},
      {"large outputs",
       {normal(4, 4, 29, 1e6f), vector({0, 1, 2, 3})},
       {normal(4, 4, 79, 1e-3f), vector({1, 1, 1, 1})}},
      {"no query", {Matrix(0, 4), Vector(0)}, {Matrix(0, 4), Vector(0)}},
      {"no channel", {Matrix(3, 0), vector({0, 1, -INF})}, {Matrix(3, 0), vector({2, -INF, -INF})}},
      {"100 queries, 70 channels", part(100, 70, 0, 2, 32), part(100, 70, 0, 2, 82)},
      {"log-sum-exps between 80 and 95", part(8, 3, 88, 3, 33), part(8, 3, 88, 3, 83)},
      {"log-sum-exps between -110 and -80", part(8, 3, -95, 6, 34), part(8, 3, -95, 6, 84)},
  };
  return cases;
}

void for_each(const std::function<void(const MergeCase&)>& body) {
  int number = 0;
  for (const MergeCase& c : merge_cases()) run_case(++number, c.text(), [&] { body(c); });
}

std::vector<int> all_numbers() {
  std::vector<int> result(merge_cases().size());
  std::iota(result.begin(), result.end(), 1);
  return result;
}

const Recognise recognise_merge(all_numbers(), [](int number) -> std::vector<Array> {
  const MergeCase& c = merge_cases().at(static_cast<std::size_t>(number) - 1);
  const Partial merged = merge_partials(c.a, c.b);
  return {to_array(merged.output), to_array(merged.lse)};
});

// The formulas of merge.hpp in float64. `size` is what the output was added up from.
struct Merged {
  Array output;
  Array size;
  Array lse;
  double largest_lse = 0.0;
};

Merged in_float64(const Partial& a, const Partial& b) {
  const Index channels = a.output.cols();
  Merged merged{{{a.output.rows(), channels}, {}}, {{a.output.rows(), channels}, {}}, {{a.output.rows(), 1}, {}}};
  for (Index i = 0; i < a.lse.size(); ++i) {
    const double high = std::max(a.lse(i), b.lse(i));
    const bool none = std::isinf(high);
    const double of_a = none ? 0.0 : std::exp(static_cast<double>(a.lse(i)) - high);
    const double of_b = none ? 0.0 : std::exp(static_cast<double>(b.lse(i)) - high);
    merged.lse.values.push_back(high + std::log(of_a + of_b));
    for (const float lse : {a.lse(i), b.lse(i)}) {
      if (!std::isinf(lse)) merged.largest_lse = std::max(merged.largest_lse, static_cast<double>(std::abs(lse)));
    }
    for (Index d = 0; d < channels; ++d) {
      const double from_a = std::isinf(a.lse(i)) ? 0.0 : of_a / (of_a + of_b) * static_cast<double>(a.output(i, d));
      const double from_b = std::isinf(b.lse(i)) ? 0.0 : of_b / (of_a + of_b) * static_cast<double>(b.output(i, d));
      merged.output.values.push_back(from_a + from_b);
      merged.size.values.push_back(std::abs(from_a) + std::abs(from_b));
    }
  }
  return merged;
}

bool expect_merged(const Partial& got, const Merged& want) {
  const bool lse = expect_close("lse", to_array(got.lse), want.lse, lse_bound(want.lse, want.largest_lse), LSE);
  return expect_close("output", to_array(got.output), want.output, fp32_bound(want.size, want.largest_lse), OUTPUT) &&
         lse;
}

bool expect_alike(const Partial& got, const Partial& want, double largest_lse) {
  const Array output = to_array(want.output);
  Array size = output;
  for (double& value : size.values) value = std::abs(value) + 3.0;
  const Array lse = to_array(want.lse);
  const bool same = expect_close("lse", to_array(got.lse), lse, lse_bound(lse, largest_lse), LSE);
  return expect_close("output", to_array(got.output), output, fp32_bound(size, largest_lse), OUTPUT) && same;
}

// Attention of 7 queries over keys [first, last) of `keys`, from the reference.
struct Attention {
  Index queries = 7, keys = 20, width = 8, channels = 5;
  Matrix query = normal(queries, width, 90);
  Matrix key = normal(keys, width, 91);
  Matrix value = normal(keys, channels, 92);

  Partial over(Index first, Index last) const {
    const auto wide = [](const Matrix& matrix) {
      return Eigen::Matrix<double, -1, -1, Eigen::RowMajor>(matrix.cast<double>());
    };
    const auto q = wide(query);
    const auto k = wide(key.middleRows(first, last - first));
    const auto v = wide(value.middleRows(first, last - first));
    const reference::Forward result =
        reference::forward({.query = View<const double, 4>(q.data(), {1, 1, queries, width}),
                            .key = View<const double, 4>(k.data(), {1, 1, last - first, width}),
                            .value = View<const double, 4>(v.data(), {1, 1, last - first, channels})});
    return {as_matrix(result.output.view()[0][0]).cast<float>(),
            Eigen::Map<const Eigen::VectorXd>(result.lse.data(), queries).cast<float>()};
  }
};

}  // namespace

TEST_SUITE("phase2.02_merge") {
  TEST_CASE("two parts of equal weight meet in the middle") {
    ask("Both parts have the same log-sum-exp. What is each part's say, and the sum of two equal exponentials?");
    const Partial merged = merge_partials({Matrix::Constant(2, 3, 4.0f), vector({1, -6})},
                                          {Matrix::Constant(2, 3, 8.0f), vector({1, -6})});
    expect_all("output", to_array(merged.output), 6.0, 1e-6, OUTPUT, "halfway between 4 and 8");
    expect_all("lse", to_array(merged.lse.array() - vector({1, -6}).array()), std::log(2.0), 2e-6, LSE,
               "twice as much is log 2 more");
  }

  TEST_CASE("one key against three keys, worked with a pencil in the README") {
    ask("Part A has seen one key and part B three, all with the score 0. Equal say? Whose lse is larger?");
    const Partial a{Matrix{{8, 0}}, vector({0})};
    const Partial b{Matrix{{0, 4}}, vector({std::log(3.0f)})};
    const Array output{{1, 2}, {2, 3}};
    for (const Partial& merged : {merge_partials(a, b), merge_partials(b, a)}) {
      expect_close("output", to_array(merged.output), output, fp32_bound(output, 2.0), OUTPUT);
      expect_all("lse", to_array(merged.lse), std::log(4.0), 1e-6, LSE, "four keys of score 0");
    }
  }

  TEST_CASE("a part that is heavier by far comes out alone") {
    ask("One part's lse is 200 above the other's. Whose output should come out, and does it?");
    for (const float level : {0.0f, 100.0f, -300.0f, 9000.0f}) {
      const Partial heavy{Matrix::Constant(2, 3, 2.0f), Vector::Constant(2, level + 100.0f)};
      const Partial light{Matrix::Constant(2, 3, -5e20f), Vector::Constant(2, level - 100.0f)};
      Merged want = in_float64(heavy, light);
      std::fill(want.output.values.begin(), want.output.values.end(), 2.0);
      if (!expect_merged(merge_partials(heavy, light), want)) return;
      if (!expect_merged(merge_partials(light, heavy), want)) return;
    }
  }

  TEST_CASE("merging with an empty part changes nothing") {
    ask("What should merging nothing with X give? Follow an lse of -inf through your lines.");
    for (const float level : {0.0f, 100.0f, -1e4f}) {
      const Partial x = part(4, 3, level, 1.0f, 93);
      const Merged want = in_float64(x, empty(4, 3));
      for (const float content : {0.0f, 7.0f}) {
        if (!expect_merged(merge_partials(x, empty(4, 3, content)), want)) return;
        if (!expect_merged(merge_partials(empty(4, 3, content), x), want)) return;
      }
    }
  }

  TEST_CASE("what an empty part holds never comes out") {
    ask("The output of an empty part may be memory that nobody wrote. What is 0 times NaN?");
    const Partial x = part(4, 3, 0.0f, 1.0f, 94);
    const Merged want = in_float64(x, empty(4, 3));
    for (const float content : {NOT_A_NUMBER, INF, -INF, 3e38f}) {
      const bool fine = expect_merged(merge_partials(x, empty(4, 3, content)), want) &&
                        expect_merged(merge_partials(empty(4, 3, content), x), want);
      if (!fine) {
        finding("held", std::to_string(content));
        return;
      }
    }
  }

  TEST_CASE("nothing merged with nothing is nothing") {
    ask("Two parts without keys: what is the larger of their lse, and what is -inf minus that?");
    for (const float content : {0.0f, 3.0f, INF, NOT_A_NUMBER}) {
      for (const float other : {0.0f, NOT_A_NUMBER}) {
        const Partial merged = merge_partials(empty(3, 4, content), empty(3, 4, other));
        expect_all("output", to_array(merged.output), 0.0, 0.0, OUTPUT, "no key, no output");
        expect(merged.lse.size() == 3 && (merged.lse.array() == -INF).all(), "lse", "want -inf for every query");
      }
    }
  }

  TEST_CASE("equal outputs stay what they are") {
    ask("If both parts say 5, what must come out, whatever their weights? What do your two weights add up to?");
    for_each([](const MergeCase& c) {
      if (c.a.output.size() == 0) return;
      const auto fives = [](const Partial& part) { return Partial{part.output * 0.0f, part.lse}; };
      Partial a = fives(c.a);
      Partial b = fives(c.b);
      a.output.setConstant(5.0f);
      b.output.setConstant(5.0f);
      const Merged want = in_float64(a, b);
      const Partial got = merge_partials(a, b);
      expect_close("output", to_array(got.output), want.output, fp32_bound(want.size, want.largest_lse), OUTPUT);
    });
  }

  TEST_CASE("the order of the two does not matter") {
    ask("Exchange the two parts. Which of your lines treats them differently?");
    for_each([](const MergeCase& c) {
      const Merged want = in_float64(c.b, c.a);
      if (expect_merged(merge_partials(c.b, c.a), want)) expect_merged(merge_partials(c.a, c.b), want);
    });
  }

  TEST_CASE("how three are bracketed does not matter") {
    ask("Is what you return again something that could be merged: an average, and the lse of everything in it?");
    for (const float spread : {1.0f, 30.0f, 300.0f}) {
      const Partial a = without(part(6, 3, 0, spread, 95), {0, 4}, NOT_A_NUMBER);
      const Partial b = without(part(6, 3, 0, spread, 96), {0, 1}, NOT_A_NUMBER);
      const Partial c = without(part(6, 3, 0, spread, 97), {0, 2, 4}, NOT_A_NUMBER);
      const Partial left = merge_partials(merge_partials(a, b), c);
      const Partial right = merge_partials(a, merge_partials(b, c));
      expect_alike(left, right, 3.0 * static_cast<double>(spread));
      expect_alike(left, merge_partials(merge_partials(c, a), b), 3.0 * static_cast<double>(spread));
      expect_all("output", to_array(left.output.row(0)), 0.0, 0.0, OUTPUT, "query 0 has no key in any part");
    }
  }

  TEST_CASE("a part merged with itself twice over keeps its output") {
    ask("The same part sixteen times: the output stays, and the lse rises by log 16. Which of the two drifts in "
        "yours?");
    const Partial x = part(5, 4, -3.0f, 2.0f, 98);
    Partial merged = x;
    for (int i = 0; i < 4; ++i) merged = merge_partials(merged, merged);
    Partial want = x;
    want.lse.array() += std::log(16.0f);
    expect_alike(merged, want, 10.0);
  }

  TEST_CASE("attention over two halves of the keys is attention over all of them") {
    ask("Each half was normalised by its own sum. Which sum belongs under the whole, and what does each half's lse "
        "tell "
        "about it?");
    const Attention attention;
    const Partial whole = attention.over(0, attention.keys);
    for (const Index cut : {0, 1, 2, 7, 10, 19, 20}) {
      const Partial first = attention.over(0, cut);
      const Partial second = attention.over(cut, attention.keys);
      if (!expect_alike(merge_partials(first, second), whole, 5.0)) {
        finding("cut", "after key " + std::to_string(cut) + " of " + std::to_string(attention.keys));
        return;
      }
    }
  }

  TEST_CASE("key after key builds up attention over all of them") {
    ask("Begin with nothing and merge one key at a time. After two keys, what does your lse say, and what should it?");
    const Attention attention;
    Partial so_far = empty(attention.queries, attention.channels, NOT_A_NUMBER);
    for (Index j = 0; j < attention.keys; ++j) {
      so_far = merge_partials(so_far, attention.over(j, j + 1));
      if (!expect_alike(so_far, attention.over(0, j + 1), 5.0)) {
        finding("after", "key " + std::to_string(j));
        return;
      }
    }
  }

  TEST_CASE("queries know nothing of each other") {
    ask("Only query 1 has changed. What do the queries of your loop share?");
    const Partial a = part(4, 3, 0, 1, 99);
    const Partial b = part(4, 3, 0, 1, 100);
    const Partial want = merge_partials(a, b);
    for (const float lse : {-INF, 500.0f, -500.0f, 9000.0f}) {
      Partial changed = a;
      changed.lse(1) = lse;
      changed.output.row(1).setConstant(lse == -INF ? NOT_A_NUMBER : 1e30f);
      const Partial got = merge_partials(changed, b);
      for (const Index i : {0, 2, 3}) {
        const std::string why = "of query " + std::to_string(i) + " when query 1 changed";
        expect_same_bits("output", to_array(got.output.row(i)), to_array(want.output.row(i)), OUTPUT, why);
        expect_same_bits("lse", to_array(got.lse.row(i)), to_array(want.lse.row(i)), LSE, why);
      }
    }
  }

  TEST_CASE("the two parts are left as they were") {
    ask("The caller may need both parts again. Do you write into what is not yours?");
    const Partial a = without(part(5, 3, 1, 1, 101), {2}, 4.0f);
    const Partial b = without(part(5, 3, 2, 1, 102), {0, 2}, 4.0f);
    const Partial a_before = a;
    const Partial b_before = b;
    const Partial first = merge_partials(a, b);
    expect_same_bits("a.output", to_array(a.output), to_array(a_before.output), OUTPUT, "by the call");
    expect_same_bits("a.lse", to_array(a.lse), to_array(a_before.lse), LSE, "by the call");
    expect_same_bits("b.output", to_array(b.output), to_array(b_before.output), OUTPUT, "by the call");
    expect_same_bits("b.lse", to_array(b.lse), to_array(b_before.lse), LSE, "by the call");
    const Partial again = merge_partials(a, b);
    expect_same_bits("output", to_array(again.output), to_array(first.output), OUTPUT, "in the second call");
    expect_same_bits("lse", to_array(again.lse), to_array(first.lse), LSE, "in the second call");
  }

  TEST_CASE("agrees with the formulas in float64") {
    for_each([](const MergeCase& c) { expect_merged(merge_partials(c.a, c.b), in_float64(c.a, c.b)); });
  }

  TEST_CASE("says what is wrong with bad arguments") {
    const Partial good = part(5, 4, 0, 1, 103);
    merge_partials(good, good);  // this is right
    expect_rejected("a with an lse too few", "a", [&] { merge_partials({good.output, Vector::Zero(4)}, good); });
    expect_rejected("b with an lse too few", "b: ", [&] { merge_partials(good, {good.output, Vector::Zero(4)}); });
    expect_rejected("b with an lse too many", "b: ", [&] { merge_partials(good, {good.output, Vector::Zero(6)}); });
    expect_rejected("b with fewer channels", "b: ", [&] { merge_partials(good, part(5, 3, 0, 1, 104)); });
    expect_rejected("b with fewer queries", "b: ", [&] { merge_partials(good, part(4, 4, 0, 1, 105)); });
    expect_rejected("b with more queries", "b: ", [&] { merge_partials(good, part(6, 4, 0, 1, 106)); });
  }
}
