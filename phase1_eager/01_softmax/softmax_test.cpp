#include "softmax.hpp"

#include <cmath>
#include <limits>
#include <numeric>

#include "common/testing/suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr double EPS = std::numeric_limits<float>::epsilon();
const Axes WEIGHTS = {"row", "column"};
const Axes ONE_ROW = {"_", "column"};

// A matrix of scores with `gap` columns of NaN on either side of it in memory.
struct ScoreCase {
  ScoreCase(const char* why, const Matrix& scores, Index gap = 0)
      : why(why),
        memory(Matrix::Constant(scores.rows(), scores.cols() + 2 * gap, NOT_A_NUMBER)),
        columns(scores.cols()),
        gap(gap) {
    memory.middleCols(gap, columns) = scores;
  }

  ConstMatrixView scores() const { return memory.middleCols(gap, columns); }
  std::string text() const {
    return std::string(why) + ": " + std::to_string(memory.rows()) + " rows, " + std::to_string(columns) + " columns";
  }

  const char* why;
  Matrix memory;
  Index columns;
  Index gap;
};

Matrix normal(Index rows, Index columns, unsigned seed, float deviation = 1.0f) {
  Matrix scores(rows, columns);
  fill_normal(View<float, 4>(scores.data(), {1, 1, rows, columns}), seed);
  return scores * deviation;
}

// Scores that run from `from` to `to` along every row, with a little noise on top.
Matrix slope(Index rows, Index columns, float from, float to, unsigned seed) {
  Matrix scores = normal(rows, columns, seed);
  for (Index j = 0; j < columns; ++j) {
    scores.col(j).array() += from + (to - from) * static_cast<float>(j) / static_cast<float>(columns - 1);
  }
  return scores;
}

// Row i lies i * step above row 0, with a little noise on top.
Matrix stairs(Index rows, Index columns, float step, unsigned seed) {
  Matrix scores = normal(rows, columns, seed);
  for (Index i = 0; i < rows; ++i) scores.row(i).array() += step * static_cast<float>(i);
  return scores;
}

// `scores` with about a third of them -inf, and the listed rows nothing else.
Matrix with_holes(Matrix scores, std::initializer_list<Index> empty_rows) {
  const Matrix chance = normal(scores.rows(), scores.cols(), 77);
  scores = (chance.array() < -0.4f).select(-INF, scores);
  for (const Index row : empty_rows) scores.row(row).setConstant(-INF);
  return scores;
}

// Their numbers never change: new ones go to the end.
const std::vector<ScoreCase>& score_cases() {
  static const std::vector<ScoreCase> cases = {
      {"one score", Matrix{{0.7f}}},
      {"the README's two rows", Matrix{{1, 2, 3}, {101, 102, 103}}},
      {"equal scores in each row",
       Matrix{{0, 0, 0, 0}, {3, 3, 3, 3}, {-700, -700, -700, -700}, {1e30f, 1e30f, 1e30f, 1e30f}}},
      {"one column", normal(6, 1, 4)},
      {"no column", Matrix(3, 0)},
      {"no row", Matrix(0, 4)},
      {"scores of order 1", normal(9, 9, 7)},
      {"more rows than columns", normal(23, 5, 8)},
      {"more columns than rows", normal(5, 23, 9)},
      {"scores of order 10", normal(8, 17, 10, 10.0f)},
      {"scores of order 1e-4", normal(7, 12, 11, 1e-4f)},
      {"integers, zeros and ties among them", Matrix{{0, 1, 0, -1}, {2, 2, 0, 2}, {0, 0, 0, -3}, {-1, 0, 1, 1}}},
      {"all scores between 88 and 90", Matrix(normal(4, 8, 13, 0.3f).array() + 89.0f)},
      {"all scores between -110 and -104", Matrix(normal(4, 8, 14).array() - 107.0f)},
      {"all scores near -500", Matrix(normal(4, 8, 15).array() - 500.0f)},
      {"all scores near +500", Matrix(normal(4, 8, 16).array() + 500.0f)},
      {"all scores near -20000", Matrix(normal(4, 8, 17).array() - 20000.0f)},
      {"each row lies 150 below the row before", stairs(6, 7, -150.0f, 18)},
      {"each row lies 150 above the row before", stairs(6, 7, 150.0f, 19)},
      {"scores fall by 300 along the columns", slope(3, 40, 0.0f, -300.0f, 20)},
      {"scores rise by 300 along the columns", slope(3, 40, 0.0f, 300.0f, 21)},
      {"scores fall by 80 and then rise by 80", slope(2, 21, 80.0f, -80.0f, 22).cwiseAbs()},
      {"the last score is 200 above the others", Matrix{{-1, 0, 1, 200}, {-200, -201, -202, 0}}},
      {"the first score is 200 above the others", Matrix{{200, 1, 0, -1}, {0, -202, -201, -200}}},
      {"scores up to 1e30",
       Matrix{{1e30f, -1e30f, 0}, {-1e30f, -1e30f, -1e30f}, {1e30f, 1e30f, -1e30f}, {0, -1e30f, 1}}},
      {"-inf among scores of order 1", with_holes(normal(7, 11, 26), {})},
      {"-inf in the first column", Matrix{{-INF, 1, 2}, {-INF, -INF, 3}, {-INF, -300, -301}}},
      {"-inf in the last column", Matrix{{2, 1, -INF}, {3, -INF, -INF}, {-301, -300, -INF}}},
      {"rows of nothing but -inf among others", with_holes(normal(8, 6, 29), {0, 4, 7})},
      {"nothing but -inf", Matrix(Matrix::Constant(3, 5, -INF))},
      {"-inf among scores near -20000", with_holes(Matrix(normal(6, 9, 31).array() - 20000.0f), {2})},
      {"-inf beside -1e30", Matrix{{-1e30f, -INF, -1e30f}, {-INF, -INF, -1e30f}, {-INF, -INF, -INF}}},
      {"1000 columns", normal(3, 1000, 33)},
      {"1000 columns, rising by 300", slope(2, 1000, 0.0f, 300.0f, 34)},
      {"1000 columns, falling by 300", slope(2, 1000, 0.0f, -300.0f, 35)},
      {"300 rows", normal(300, 3, 36)},
      {"the columns of a wider matrix that holds NaN elsewhere", normal(6, 9, 37), 4},
      {"the columns of a wider matrix, some of them -inf", with_holes(normal(5, 8, 38, 3.0f), {1, 4}), 3},
      {"4099 columns", normal(2, 4099, 39)},
  };
  return cases;
}

void for_each(const std::function<void(const ScoreCase&)>& body) {
  int number = 0;
  for (const ScoreCase& c : score_cases()) run_case(++number, c.text(), [&] { body(c); });
}

std::vector<int> all_numbers() {
  std::vector<int> result(score_cases().size());
  std::iota(result.begin(), result.end(), 1);
  return result;
}

const Recognise recognise_softmax(all_numbers(), [](int number) -> std::vector<Array> {
  return {to_array(softmax_rows(score_cases().at(static_cast<std::size_t>(number) - 1).scores()))};
});

// The formula of softmax.hpp in float64, skipping the scores that are -inf.
Array in_float64(ConstMatrixView scores) {
  Array weights{{scores.rows(), scores.cols()}, {}};
  for (Index i = 0; i < scores.rows(); ++i) {
    double largest = -INF;
    for (Index j = 0; j < scores.cols(); ++j) largest = std::max(largest, static_cast<double>(scores(i, j)));
    double sum = 0.0;
    for (Index j = 0; j < scores.cols(); ++j) {
      if (scores(i, j) != -INF) sum += std::exp(static_cast<double>(scores(i, j)) - largest);
    }
    for (Index j = 0; j < scores.cols(); ++j) {
      const bool forbidden = scores(i, j) == -INF;
      weights.values.push_back(forbidden ? 0.0 : std::exp(static_cast<double>(scores(i, j)) - largest) / sum);
    }
  }
  return weights;
}

// Each weight on its own, however small: what its exponent, score - largest, loses to rounding. Exponents beyond -104
// count for nothing, because their weights are 0.
Bound bound_of(ConstMatrixView scores) {
  double spread = 0.0;
  for (Index i = 0; i < scores.rows(); ++i) {
    float largest = -INF;
    for (Index j = 0; j < scores.cols(); ++j) largest = std::max(largest, scores(i, j));
    for (Index j = 0; j < scores.cols(); ++j) {
      const double distance = static_cast<double>(largest) - static_cast<double>(scores(i, j));
      if (distance < 104.0) spread = std::max(spread, distance);
    }
  }
  return fp32_bound(in_float64(scores), spread);
}

bool expect_weights(ConstMatrixView scores) {
  return expect_close("weights", to_array(softmax_rows(scores)), in_float64(scores), bound_of(scores), WEIGHTS);
}

bool expect_shape(const Matrix& weights, ConstMatrixView scores) {
  return expect(weights.rows() == scores.rows() && weights.cols() == scores.cols(), "weights",
                "have shape " + to_text(to_array(weights).shape) + ", want " + to_text(to_array(scores).shape));
}

}  // namespace

TEST_SUITE("phase1.01_softmax") {
  TEST_CASE("a score that is alone in its row weighs 1") {
    ask("A row has one score. Of how many units of attention does it get how much, whatever the score is?");
    const Matrix scores{{0.0f}, {3.25f}, {-3.25f}, {-500.0f}, {500.0f}, {1e30f}, {-1e30f}, {1e-30f}};
    const Matrix weights = softmax_rows(scores);
    if (expect_shape(weights, scores)) {
      expect_all("weights", to_array(weights), 1.0, 0.0, WEIGHTS, "the only score of a row should weigh exactly 1");
    }
  }

  TEST_CASE("equal scores share a row evenly") {
    ask("Four scores of a row are all 3. What do the weights have to add up to, and why should one be larger?");
    for (const Index columns : {2, 3, 4, 7, 64, 1000}) {
      for (const float score : {0.0f, 3.0f, -3.0f, 100.0f, -200.0f, 1e30f, -1e30f}) {
        const Matrix scores = Matrix::Constant(2, columns, score);
        const Matrix weights = softmax_rows(scores);
        if (!expect_shape(weights, scores)) return;
        const double share = 1.0 / static_cast<double>(columns);
        const std::string what =
            "each of " + std::to_string(columns) + " equal scores should weigh 1/" + std::to_string(columns);
        if (!expect_all("weights", to_array(weights), share, 1e-6 * share, WEIGHTS, what)) return;
      }
    }
  }

  TEST_CASE("of two scores that differ by ln 2 the larger weighs twice as much") {
    ask("e to the power of ln 2 is 2. If one score is ln 2 above the other, what are the two weights?");
    const float ln2 = std::log(2.0f);
    const Matrix scores{{ln2, 0.0f}, {0.0f, ln2}, {0.0f, -ln2}, {-2.0f * ln2, -ln2}};
    const double two = 2.0 / 3.0;
    const double one = 1.0 / 3.0;
    const Array weights{{4, 2}, {two, one, one, two, two, one, one, two}};
    expect_close("weights", to_array(softmax_rows(scores)), weights, {1e-6, weights}, WEIGHTS);
  }

  TEST_CASE("two rows of three scores worked with a pencil in the README") {
    ask("Follow the README's table column by column. Which is the first of its numbers that yours differs from?");
    const Matrix scores{{1, 2, 3}, {101, 102, 103}};
    const Array weights{{2, 3}, {0.0900, 0.2447, 0.6652, 0.0900, 0.2447, 0.6652}};
    const Matrix result = softmax_rows(scores);
    if (expect_shape(result, scores)) expect_close("weights", to_array(result), weights, {6e-4, weights}, WEIGHTS);
  }

  TEST_CASE("the scores are read and not changed") {
    ask("The scores belong to the caller. Does the caller still have them after your call?");
    for_each([](const ScoreCase& c) {
      const Matrix before = c.memory;
      softmax_rows(c.scores());
      expect_same_bits("scores", to_array(c.memory), to_array(before), WEIGHTS, "during the call");
    });
  }

  TEST_CASE("adding one number to a whole row changes none of its weights") {
    ask("Add 1000 to every score of a row. By what factor does each exp grow, by what their sum, and the quotient?");
    // Multiples of 1/8, so that every sum below is exact in a float.
    const Matrix scores = (normal(6, 9, 1, 16.0f).array().round() / 8.0f).matrix();
    const Array want = to_array(softmax_rows(scores));
    for (const float shift : {1.0f, -1.0f, 64.0f, 100.0f, -100.0f, 1024.0f, -1024.0f, 65536.0f, -65536.0f}) {
      const Array got = to_array(softmax_rows((scores.array() + shift).matrix()));
      if (!expect_close("weights", got, want, {EPS, want}, WEIGHTS)) {
        finding("shift", "the second call had every score " + std::to_string(shift) + " higher");
        return;
      }
    }
  }

  TEST_CASE("a score of -inf weighs 0 and leaves the others as if it were not there") {
    ask("What is exp(-inf)? What does such a term add to the sum?");
    const Matrix scores = normal(5, 8, 2, 3.0f);
    const Matrix alone = softmax_rows(scores);
    for (Index at = 0; at <= scores.cols(); ++at) {
      Matrix wider(scores.rows(), scores.cols() + 1);
      wider << scores.leftCols(at), Matrix::Constant(scores.rows(), 1, -INF), scores.rightCols(scores.cols() - at);
      const Matrix weights = softmax_rows(wider);
      if (!expect_shape(weights, wider) || !expect_shape(alone, scores)) return;
      const std::string column = std::to_string(at);
      if (!expect_all("weights", to_array(weights.col(at)), 0.0, 0.0, {"row"}, "column " + column + " is -inf")) return;
      Matrix rest(scores.rows(), scores.cols());
      rest << weights.leftCols(at), weights.rightCols(scores.cols() - at);
      const Array want = to_array(alone);
      if (!expect_close("the others", to_array(rest), want, {1e-6, want}, WEIGHTS)) return;
    }
  }

  TEST_CASE("a row of nothing but -inf and a row of no column weigh 0") {
    ask("If every score of a row is -inf, what is its maximum, its sum, its quotient? What should nobody get?");
    const Matrix scores{{-INF, -INF, -INF}, {0, 1, 2}, {-INF, -INF, -INF}, {-INF, -INF, -1e30f}, {-INF, -INF, -INF}};
    const Matrix weights = softmax_rows(scores);
    if (!expect_shape(weights, scores)) return;
    for (const Index row : {0, 2, 4}) {
      expect_all("weights", to_array(weights.row(row)), 0.0, 0.0, ONE_ROW,
                 "row " + std::to_string(row) + " has nobody to attend to");
    }
    expect_all("weights", to_array(weights.row(3)), 1.0 / 3.0, 1.0, ONE_ROW, "row 3 has one score");
    expect(weights(3, 2) == 1.0f, "weights", "the only score of row 3 that is not -inf, -1e30, should weigh 1");
    expect_shape(softmax_rows(Matrix(4, 0)), Matrix(4, 0));
    expect_shape(softmax_rows(Matrix(0, 4)), Matrix(0, 4));
    expect_shape(softmax_rows(Matrix(0, 0)), Matrix(0, 0));
  }

  TEST_CASE("every row is worked out alone") {
    ask("Change the scores of row 1. Which of your lines let row 0 know?");
    const Matrix scores = normal(7, 6, 3, 2.0f);
    const Matrix want = softmax_rows(scores);
    if (!expect_shape(want, scores)) return;
    for (Index row = 0; row < scores.rows(); ++row) {
      const std::string name = "row " + std::to_string(row);
      const Matrix alone = softmax_rows(scores.row(row));
      if (!expect_same_bits(name, to_array(alone), to_array(want.row(row)), ONE_ROW, "without the other rows")) return;
      for (const float score : {1e30f, 300.0f, -300.0f, -1e30f, -INF}) {
        Matrix others = Matrix::Constant(scores.rows(), scores.cols(), score);
        others.row(row) = scores.row(row);
        const Matrix weights = softmax_rows(others);
        const std::string why = "when the scores of the other rows became " + std::to_string(score);
        if (!expect_same_bits(name, to_array(weights.row(row)), to_array(want.row(row)), ONE_ROW, why)) return;
      }
    }
  }

  TEST_CASE("exchanging two columns exchanges their weights") {
    ask("A weight depends on its own score and on the set of the others. Why should their order matter?");
    for_each([](const ScoreCase& c) {
      if (c.columns < 2) return;
      const Array want = to_array(softmax_rows(c.scores()).rowwise().reverse());
      const Array got = to_array(softmax_rows(c.scores().rowwise().reverse()));
      expect_close("reversed", got, want, {bound_of(c.scores()).relative, want}, WEIGHTS);
    });
  }

  TEST_CASE("the weights of a row are none below 0 and add up to 1") {
    ask("Print the sum of each row of your weights. Which row's is not 1, and what is special about that row?");
    for_each([](const ScoreCase& c) {
      const Matrix weights = softmax_rows(c.scores());
      if (!expect_shape(weights, c.scores())) return;
      for (Index i = 0; i < weights.rows(); ++i) {
        double sum = 0.0;
        bool empty = true;
        for (Index j = 0; j < weights.cols(); ++j) {
          if (!expect(weights(i, j) >= 0.0f, "weights",
                      "row " + std::to_string(i) + ", column " + std::to_string(j) + " is " +
                          std::to_string(weights(i, j)) + ", want a number that is not below 0")) {
            return;
          }
          sum += static_cast<double>(weights(i, j));
          empty = empty && c.scores()(i, j) == -INF;
        }
        const double want = empty ? 0.0 : 1.0;
        if (!expect(
                std::abs(sum - want) <= 5e-6, "row sums",
                "row " + std::to_string(i) + " adds up to " + std::to_string(sum) + ", want " + (empty ? "0" : "1"))) {
          return;
        }
      }
    });
  }

  TEST_CASE("a weight is right in its own size however small it is") {
    ask("A score lies 69 below the largest, so its weight is about 1e-30. Where in your lines could it be lost?");
    for (int distance = 0; distance <= 86; ++distance) {
      const auto d = static_cast<float>(distance);
      for (const float largest : {0.0f, 60.0f, -60.0f, -80.0f, -95.0f, 300.0f, -300.0f}) {
        if (!expect_weights(Matrix{{largest, largest - d}, {largest - d, largest}})) return;
      }
    }
  }

  TEST_CASE("an earlier call leaves no trace in a later one") {
    ask("Call it with one matrix, then with another of the same shape. What of the first is still there?");
    const Matrix full = normal(5, 6, 4, 2.0f);
    const Matrix holes = with_holes(normal(5, 6, 5, 2.0f), {1, 4});
    const Matrix wide = normal(9, 12, 6, 40.0f);
    const Array first = to_array(softmax_rows(holes));
    for (const Matrix& between : {full, wide, Matrix(full.topRows(2)), Matrix(-full)}) {
      softmax_rows(between);
      if (!expect_same_bits("weights", to_array(softmax_rows(holes)), first, WEIGHTS, "after another call")) return;
      if (!expect_weights(full)) return;
    }
    Matrix reused = full;
    for (const float factor : {1.0f, -1.0f, 3.0f}) {
      reused = full * factor;  // other scores at the same place in memory
      if (!expect_weights(reused)) return;
    }
  }

  TEST_CASE("agrees with the float64 reference") {
    for_each([](const ScoreCase& c) { expect_weights(c.scores()); });
  }
}
