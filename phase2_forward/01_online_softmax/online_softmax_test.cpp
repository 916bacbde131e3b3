#include "online_softmax.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "phase2_forward/suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
const Axes PROBABILITIES = {"row", "column"};
const Axes LSE = {"row", "_"};
const Axes REPORTS = {"chunk", "row"};

using Widths = std::vector<Index>;

struct StreamCase {
  const char* why;
  Matrix scores;
  Widths widths;

  std::string text() const {
    return std::string(why) + ": " + std::to_string(scores.rows()) + " rows, chunks of widths " + to_text(widths);
  }
};

Matrix normal(Index rows, Index columns, unsigned seed, float deviation = 1.0f) {
  Matrix scores(rows, columns);
  fill_normal(View<float, 4>(scores.data(), {1, 1, rows, columns}), seed);
  return scores * deviation;
}

// Each chunk lies `step` above the one before, with a little noise on top.
Matrix stairs(Index rows, const Widths& widths, float step, unsigned seed) {
  Matrix scores = normal(rows, std::accumulate(widths.begin(), widths.end(), Index{0}), seed);
  Index column = 0;
  for (std::size_t chunk = 0; chunk < widths.size(); ++chunk) {
    for (Index k = 0; k < widths[chunk]; ++k) scores.col(column++).array() += step * static_cast<float>(chunk);
  }
  return scores;
}

// `scores` with -inf in about a third of the places, in columns [0, front) and in the listed rows.
Matrix with_holes(Matrix scores, Index front, std::initializer_list<Index> empty_rows) {
  const Matrix chance = normal(scores.rows(), scores.cols(), 77);
  scores = (chance.array() < -0.4f).select(-INF, scores);
  scores.leftCols(front).setConstant(-INF);
  for (const Index row : empty_rows) scores.row(row).setConstant(-INF);
  return scores;
}

// Rows that rise, fall, and stay, side by side: each must be rescaled by its own factor.
Matrix rows_apart(const Widths& widths, float step, unsigned seed) {
  Matrix scores = normal(6, std::accumulate(widths.begin(), widths.end(), Index{0}), seed);
  const Matrix rising = stairs(6, widths, step, seed);
  const Matrix falling = stairs(6, widths, -step, seed);
  scores.topRows(2) = rising.topRows(2);
  scores.middleRows(2, 2) = falling.middleRows(2, 2);
  return scores;
}

// Their numbers never change: new ones go to the end.
const std::vector<StreamCase>& stream_cases() {
  static const std::vector<StreamCase> cases = {
      {"the README's four scores", Matrix{{1, 2, 4, 3}}, {2, 2}},
      {"one score", Matrix{{0.7f}}, {1}},
      {"one chunk", normal(4, 9, 3), {9}},
      {"two chunks", normal(5, 8, 4), {4, 4}},
      {"chunks of one column", normal(4, 11, 5), {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}},
      {"ragged chunks", normal(7, 24, 6, 3.0f), {5, 1, 8, 2, 7, 1}},
      {"a narrow chunk last", normal(3, 33, 7, 3.0f), {16, 16, 1}},
      {"a narrow chunk first", normal(3, 33, 8, 3.0f), {1, 16, 16}},
      {"each chunk 1 above the one before", stairs(3, {3, 4, 2, 5}, 1.0f, 9), {3, 4, 2, 5}},
      {"each chunk 1 below the one before", stairs(3, {3, 4, 2, 5}, -1.0f, 10), {3, 4, 2, 5}},
      {"each chunk 100 above the one before", stairs(3, {4, 3, 4}, 100.0f, 11), {4, 3, 4}},
      {"each chunk 100 below the one before", stairs(3, {4, 3, 4}, -100.0f, 12), {4, 3, 4}},
      {"each chunk 60 below the one before, then up again",
       Matrix(-stairs(2, {4, 4, 4, 4, 4}, 60.0f, 13).array().abs() + 120.0f).cwiseAbs(),
       {4, 4, 4, 4, 4}},
      {"some rows rise by 5 from chunk to chunk, some fall, some do neither",
       rows_apart({6, 5, 7}, 5.0f, 14),
       {6, 5, 7}},
      {"some rows rise by 100 from chunk to chunk, some fall, some do neither",
       rows_apart({6, 5, 7}, 100.0f, 15),
       {6, 5, 7}},
      {"all scores near -500", Matrix(normal(4, 12, 16).array() - 500.0f), {5, 7}},
      {"all scores near +500", Matrix(normal(4, 12, 17).array() + 500.0f), {5, 7}},
      {"all scores near -20000", Matrix(normal(4, 12, 18).array() - 20000.0f), {5, 7}},
      {"all scores between 88 and 90", Matrix(normal(4, 8, 19, 0.3f).array() + 89.0f), {4, 4}},
      {"-inf here and there", with_holes(normal(6, 13, 20), 0, {}), {4, 6, 3}},
      {"the first chunk is -inf", with_holes(normal(5, 12, 21), 4, {}), {4, 5, 3}},
      {"the first three chunks are -inf", with_holes(normal(5, 13, 22), 8, {}), {2, 3, 3, 5}},
      {"the last chunk is -inf", with_holes(normal(5, 12, 23), 5, {}).rowwise().reverse(), {4, 3, 5}},
      {"rows of nothing but -inf among others", with_holes(normal(7, 10, 24), 0, {0, 3, 6}), {3, 3, 4}},
      {"nothing but -inf", Matrix::Constant(3, 6, -INF), {2, 4}},
      {"-inf first, then scores near -20000",
       with_holes(Matrix(normal(5, 9, 26).array() - 20000.0f), 3, {2}),
       {3, 3, 3}},
      {"each row starts with a different number of -inf",
       Matrix{{-INF, -INF, -INF, -INF, -INF, 2},
              {-INF, -INF, -INF, -3, -INF, 2},
              {-INF, -INF, 1, 5, 9, 2},
              {7, -INF, -INF, -INF, -INF, -INF}},
       {2, 2, 2}},
      {"equal scores", Matrix::Constant(3, 10, -3.0f), {3, 3, 3, 1}},
      {"scores of 0", Matrix::Zero(2, 7), {3, 4}},
      {"no column", Matrix(3, 0), {}},
      {"no row", Matrix(0, 5), {2, 3}},
      {"200 chunks", normal(2, 600, 32, 2.0f), Widths(200, 3)},
      {"100 chunks, each 3 above the one before", stairs(2, Widths(100, 2), 3.0f, 33), Widths(100, 2)},
      {"100 chunks, each 3 below the one before", stairs(2, Widths(100, 2), -3.0f, 34), Widths(100, 2)},
      {"60 rows", normal(60, 14, 35, 4.0f), {5, 5, 4}},
      {"a chunk of -inf between two others", Matrix{{1, 5, -INF, -INF, 3, 2}, {9, 2, -INF, -INF, 4, 1}}, {2, 2, 2}},
      {"wide chunks", normal(2, 700, 37, 3.0f), {130, 300, 14, 256}},
      {"300 rows", normal(300, 5, 38, 3.0f), {2, 3}},
  };
  return cases;
}

void for_each(const std::function<void(const StreamCase&)>& body) {
  int number = 0;
  for (const StreamCase& c : stream_cases()) run_case(++number, c.text(), [&] { body(c); });
}

std::vector<int> all_numbers() {
  std::vector<int> result(stream_cases().size());
  std::iota(result.begin(), result.end(), 1);
  return result;
}

OnlineSoftmax answer(const Matrix& scores, const Widths& widths) {
  ScoreStream stream(scores, widths);
  return online_softmax(stream);
}

const Recognise recognise_online_softmax(all_numbers(), [](int number) -> std::vector<Array> {
  const StreamCase& c = stream_cases().at(static_cast<std::size_t>(number) - 1);
  const OnlineSoftmax result = answer(c.scores, c.widths);
  return {to_array(result.probabilities), to_array(result.lse)};
});

// The formulas of online_softmax.hpp in float64, over all columns at once, without those that are -inf.
double lse_in_float64(ConstMatrixView scores, Index row) {
  double largest = -INF;
  for (Index j = 0; j < scores.cols(); ++j) largest = std::max(largest, static_cast<double>(scores(row, j)));
  double sum = 0.0;
  for (Index j = 0; j < scores.cols(); ++j) {
    if (scores(row, j) != -INF) sum += std::exp(static_cast<double>(scores(row, j)) - largest);
  }
  return largest + std::log(sum);
}

Array lse_in_float64(ConstMatrixView scores) {
  Array lse{{scores.rows(), 1}, {}};
  for (Index i = 0; i < scores.rows(); ++i) lse.values.push_back(lse_in_float64(scores, i));
  return lse;
}

Array probabilities_in_float64(ConstMatrixView scores) {
  Array probabilities{{scores.rows(), scores.cols()}, {}};
  for (Index i = 0; i < scores.rows(); ++i) {
    const double lse = lse_in_float64(scores, i);
    for (Index j = 0; j < scores.cols(); ++j) {
      probabilities.values.push_back(scores(i, j) == -INF ? 0.0 : std::exp(static_cast<double>(scores(i, j)) - lse));
    }
  }
  return probabilities;
}

double largest_score(ConstMatrixView scores) {
  double largest = 0.0;
  for (Index i = 0; i < scores.rows(); ++i)
    for (Index j = 0; j < scores.cols(); ++j)
      if (scores(i, j) != -INF) largest = std::max(largest, std::abs(static_cast<double>(scores(i, j))));
  return largest;
}

bool expect_softmax(const OnlineSoftmax& got, ConstMatrixView scores) {
  const Array probabilities = probabilities_in_float64(scores);
  const Array lse = lse_in_float64(scores);
  const double largest = largest_score(scores);
  const bool first = expect_close("probabilities", to_array(got.probabilities), probabilities,
                                  fp32_bound(probabilities, largest), PROBABILITIES);
  return expect_close("lse", to_array(got.lse), lse, lse_bound(lse, largest), LSE) && first;
}

// Every way to cut 6 columns into chunks: the bits of `cuts` say after which columns.
std::vector<Widths> all_cuts_of_six() {
  std::vector<Widths> all;
  for (unsigned cuts = 0; cuts < 32; ++cuts) {
    Widths widths{1};
    for (unsigned column = 0; column < 5; ++column) {
      if ((cuts >> column & 1U) != 0) widths.push_back(0);
      ++widths.back();
    }
    all.push_back(widths);
  }
  return all;
}

}  // namespace

TEST_SUITE("phase2.01_online_softmax") {
  TEST_CASE("equal scores share alike however they are cut") {
    ask("Eight equal scores arrive three, three and two at a time. What is the share of each, and which denominator do "
        "you have after the first three?");
    const OnlineSoftmax result = answer(Matrix::Constant(2, 8, 3.0f), {3, 3, 2});
    expect_all("probabilities", to_array(result.probabilities), 0.125, 1e-7, PROBABILITIES, "each of 8 weighs 1/8");
    expect_all("lse", to_array(result.lse), 3.0 + std::log(8.0), 1e-6, LSE, "8 times exp(3) is exp(3 + log 8)");
  }

  TEST_CASE("four scores in two chunks, worked with a pencil in the README") {
    ask("Follow the README's example line by line. Which is the first of its numbers that yours differs from?");
    const Matrix scores{{1, 2, 4, 3}};
    ScoreStream stream(scores, {2, 2});
    expect_softmax(online_softmax(stream), scores);
    const Array probabilities{{1, 4}, {0.0321, 0.0871, 0.6439, 0.2369}};
    expect_close("probabilities", to_array(answer(scores, {2, 2}).probabilities), probabilities,
                 {1e-3, Array{{1, 4}, {0.1, 0.1, 0.1, 0.1}}}, PROBABILITIES);
    if (expect(stream.reports().size() == 2, "reports", "want one for each of 2 chunks")) {
      expect(std::abs(stream.reports()[0](0) - 2.3133f) < 1e-3f, "reports", "want 2.3133 after the first chunk");
      expect(std::abs(stream.reports()[1](0) - 4.4402f) < 1e-3f, "reports", "want 4.4402 after the second chunk");
    }
  }

  TEST_CASE("when a later chunk is larger by far the earlier ones weigh nothing") {
    ask("The maximum has just risen by 200. In which units is what you have gathered so far, and what is it worth in "
        "the new ones?");
    const OnlineSoftmax result = answer(Matrix{{0, 1, 200, 201, 400, 400}}, {2, 2, 2});
    const Array want{{1, 6}, {0, 0, 0, 0, 0.5, 0.5}};
    expect_close("probabilities", to_array(result.probabilities), want, fp32_bound(want, 400.0), PROBABILITIES);
    expect_all("lse", to_array(result.lse), 400.0 + std::log(2.0), 1e-4, LSE, "two scores of 400 are left");
  }

  TEST_CASE("when a later chunk is smaller by far it weighs nothing") {
    ask("The chunk's own maximum is 200 below what has passed. Can the factor between two maxima ever exceed 1?");
    const OnlineSoftmax result = answer(Matrix{{400, 400, 201, 200, 1, 0}}, {2, 2, 2});
    const Array want{{1, 6}, {0.5, 0.5, 0, 0, 0, 0}};
    expect_close("probabilities", to_array(result.probabilities), want, fp32_bound(want, 400.0), PROBABILITIES);
    expect_all("lse", to_array(result.lse), 400.0 + std::log(2.0), 1e-4, LSE, "two scores of 400 are left");
  }

  TEST_CASE("a score far above all others wins alone wherever it stands") {
    ask("One score is 2000 above the rest. Put it first, last, and at either side of a cut: which place does yours "
        "miss?");
    for (const Widths& widths : {Widths{3, 3, 3}, Widths{1, 7, 1}, Widths{4, 5}, Widths(9, 1), Widths{9}}) {
      for (Index winner = 0; winner < 9; ++winner) {
        Matrix scores = Matrix::Constant(2, 9, -1000.0f);
        scores(1, winner) = 1000.0f;
        const OnlineSoftmax result = answer(scores, widths);
        Array want{{2, 9}, std::vector<double>(18, 0.0)};
        std::fill_n(want.values.begin(), 9, 1.0 / 9.0);
        want.values[static_cast<std::size_t>(9 + winner)] = 1.0;
        if (!expect_close("probabilities", to_array(result.probabilities), want, fp32_bound(want, 1000.0),
                          PROBABILITIES))
          return;
      }
    }
  }

  TEST_CASE("where the cuts fall does not matter") {
    ask("The same six scores, cut in another way. What in your loop depends on where a chunk ends?");
    const Matrix scores{{1, 3, 2, 6, 4, 5}, {6, 5, 4, 3, 2, 1}, {-INF, -INF, 0, -INF, 30, -60}, {9, 9, 9, 9, 9, 9}};
    for (const Widths& widths : all_cuts_of_six()) {
      if (!expect_softmax(answer(scores, widths), scores)) {
        finding("cut into", to_text(widths));
        return;
      }
    }
  }

  TEST_CASE("chunks of -inf before the first score change nothing") {
    ask("Before any score was seen, what is your running maximum? What is the old one minus the new one, if both are "
        "that?");
    for (const Index front : {1, 2, 5}) {
      Matrix scores = normal(3, front + 4, 40);
      scores.leftCols(front).setConstant(-INF);
      Widths widths(static_cast<std::size_t>(front), 1);
      widths.insert(widths.end(), {2, 2});
      if (!expect_softmax(answer(scores, widths), scores)) return;
    }
  }

  TEST_CASE("a row of nothing but -inf has probabilities 0 and an lse of -inf") {
    ask("If a row never sees a score above -inf, what are its maximum, its sum, and the logarithm of its sum?");
    Matrix scores = normal(4, 7, 41);
    scores.row(1).setConstant(-INF);
    scores.row(3).setConstant(-INF);
    for (const Widths& widths : {Widths{7}, Widths{3, 4}, Widths(7, 1)}) {
      const OnlineSoftmax result = answer(scores, widths);
      expect_softmax(result, scores);
      for (const Index row : {1, 3}) {
        expect_all("probabilities", to_array(result.probabilities.row(row)), 0.0, 0.0, PROBABILITIES,
                   "nobody is there");
        expect(result.lse(row) == -INF, "lse",
               "want -inf where every score is -inf, got " + std::to_string(result.lse(row)));
      }
    }
  }

  TEST_CASE("the probabilities of a row add up to 1") {
    ask("Add up a row of your probabilities. Which chunks went into the number that you divide by?");
    for_each([](const StreamCase& c) {
      const OnlineSoftmax result = answer(c.scores, c.widths);
      for (Index i = 0; i < c.scores.rows(); ++i) {
        const bool empty = lse_in_float64(c.scores, i) == -INF;
        const double sum = result.probabilities.row(i).cast<double>().sum();
        if (std::abs(sum - (empty ? 0.0 : 1.0)) <= fp32_bound({}, largest_score(c.scores)).relative) continue;
        finding("probabilities", "row " + std::to_string(i) + " adds up to " + std::to_string(sum));
        return;
      }
    });
  }

  TEST_CASE("after each chunk the lse so far is reported") {
    ask("Stop after the first chunk. Which scores should be in the log-sum-exp that you report then?");
    for_each([](const StreamCase& c) {
      ScoreStream stream(c.scores, c.widths);
      online_softmax(stream);
      Array got{{static_cast<Index>(stream.reports().size()), c.scores.rows()}, {}};
      for (const Vector& report : stream.reports()) got.values.insert(got.values.end(), report.begin(), report.end());
      Array want{{static_cast<Index>(c.widths.size()), c.scores.rows()}, {}};
      Index passed = 0;
      for (const Index width : c.widths) {
        passed += width;
        for (Index i = 0; i < c.scores.rows(); ++i) {
          want.values.push_back(lse_in_float64(c.scores.leftCols(passed), i));
        }
      }
      expect_close("reports", got, want, lse_bound(want, largest_score(c.scores)), REPORTS);
    });
  }

  TEST_CASE("every chunk is taken once and the stream is used up") {
    ask("How many chunks are left when you return? Who asks for the last one?");
    for_each([](const StreamCase& c) {
      ScoreStream stream(c.scores, c.widths);
      online_softmax(stream);
      expect(!stream.more(), "stream", "some chunks were never asked for");
      expect(stream.reports().size() == c.widths.size(), "reports",
             std::to_string(stream.reports().size()) + " for " + std::to_string(c.widths.size()) + " chunks");
    });
  }

  TEST_CASE("rows know nothing of each other") {
    ask("Only row 1 has changed. What do the rows of your loop share?");
    const Widths widths{3, 4, 2};
    const Matrix scores = normal(4, 9, 42, 3.0f);
    const OnlineSoftmax want = answer(scores, widths);
    for (const float level : {-INF, -500.0f, 70.0f, 500.0f}) {
      Matrix changed = scores;
      changed.row(1).array() += level;
      const OnlineSoftmax got = answer(changed, widths);
      for (const Index row : {0, 2, 3}) {
        const std::string why = "of row " + std::to_string(row) + " when row 1 changed";
        if (!expect_same_bits("probabilities", to_array(got.probabilities.row(row)),
                              to_array(want.probabilities.row(row)), PROBABILITIES, why) ||
            !expect_same_bits("lse", to_array(got.lse.row(row)), to_array(want.lse.row(row)), LSE, why)) {
          return;
        }
      }
    }
  }

  TEST_CASE("the same scores give the same bits each time") {
    ask("Call it twice. What is left over from the first call?");
    const Matrix scores = with_holes(normal(5, 12, 43, 4.0f), 2, {3});
    const OnlineSoftmax want = answer(scores, {5, 3, 4});
    answer(Matrix(scores.array() + 300.0f), {5, 3, 4});
    const OnlineSoftmax got = answer(scores, {5, 3, 4});
    expect_same_bits("probabilities", to_array(got.probabilities), to_array(want.probabilities), PROBABILITIES,
                     "in the second call");
    expect_same_bits("lse", to_array(got.lse), to_array(want.lse), LSE, "in the second call");
  }

  TEST_CASE("agrees with float64 over all columns at once") {
    for_each([](const StreamCase& c) { expect_softmax(answer(c.scores, c.widths), c.scores); });
  }

  TEST_CASE("says what is wrong with bad arguments") {
    ScoreStream fresh(Matrix::Ones(2, 3), {1, 2});
    online_softmax(fresh);  // this is right
    expect_rejected("a stream that was read to its end", "scores", [&] { online_softmax(fresh); });
    ScoreStream begun(Matrix::Ones(2, 3), {1, 2});
    begun.next();
    expect_rejected("a stream that somebody has begun", "scores", [&] { online_softmax(begun); });
    begun.report(Vector::Ones(2));
    expect_rejected("a stream that somebody has begun and reported on", "scores", [&] { online_softmax(begun); });
  }
}
