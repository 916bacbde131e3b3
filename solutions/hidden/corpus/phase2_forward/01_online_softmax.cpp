// Answers to 01_online_softmax, wrong and right. Every deviation stands where somebody made it.
#include <cmath>
#include <limits>
#include <vector>

#include "../corpus.hpp"
#include "online_softmax.hpp"

namespace flashkata {
namespace {

using corpus::plays;
using corpus::RIGHT;
using corpus::UNNAMED;

const corpus::Answers answers{
    {"no-rescale-o", "no-rescale-o"},
    {"no-rescale-l", "no-rescale-l"},
    {"nothing rescaled", "no-rescale"},
    {"inverse-rescale", "inverse-rescale"},
    {"inverse-rescale of the sum", "inverse-rescale-l"},
    {"inverse-rescale of the probabilities", "inverse-rescale-o"},
    {"rescale-after-add", "rescale-after-add"},
    {"max-not-running", "max-not-running"},
    {"max of the first chunk", "max-first-tile"},
    {"normalise-per-tile", "normalise-per-tile"},
    {"no-final-div", "no-final-div"},
    {"l-last-tile", "l-last-tile"},
    {"inf-minus-inf", "inf-minus-inf"},
    {"all-masked-nan in the division", "all-masked-nan"},
    {"lse-missing-max", "lse-missing-max"},
    {"lse-base2", "lse-base2"},
    {"lse is the maximum", "lse-only-max"},
    {"lse of the last chunk", UNNAMED},
    {"softmax-no-max", "softmax-no-max"},
    {"softmax-global-max of a chunk", "softmax-global-max"},
    {"softmax-base2", "softmax-base2"},
    {"softmax-max-from-zero", "softmax-max-from-zero"},
    {"softmax-max-sentinel -1e4", "softmax-max-sentinel"},
    {"tail-keys-dropped", "tail-keys-dropped"},
    {"one maximum for all rows", "softmax-global-max"},
    {"rescaled by the distance of the chunk", "rescale-wrong-side"},
    {"only the chunk before is rescaled", UNNAMED},
    {"the first chunk is never rescaled", UNNAMED},
    {"widths taken to be equal", UNNAMED},
    {"last row forgotten", UNNAMED},
    {"rows beyond 32 forgotten", UNNAMED},
    {"reports the chunk alone", UNNAMED},
    {"reports the maximum", UNNAMED},
    {"reports only at the end", UNNAMED},
    {"reports one number for all rows", UNNAMED},
    {"stops before the last chunk", UNNAMED},
    {"reads past the end", UNNAMED},
    {"remembers the chunk instead of copying it", UNNAMED},
    {"probabilities in half precision", UNNAMED},
    {"maximum kept from the first call", UNNAMED},
    {"arguments unchecked", UNNAMED},
    {"scores of 0 taken for -inf", UNNAMED},
    {"a row is empty once a chunk of it is", UNNAMED},
    {"right: double accumulation", RIGHT},
    {"right: each chunk alone, corrected at the end", RIGHT},
    {"right: by the log-sum-exp alone", RIGHT},
    {"right: score by score", RIGHT},
    {"right: exp2 throughout", RIGHT},
    {"right: rescales only when the maximum rises", RIGHT},
    {"right: rescales lazily, by more than 8", RIGHT},
    {"right: whole matrices at a time", RIGHT},
    {"right: probabilities transposed in memory", RIGHT},
};

constexpr float INF = std::numeric_limits<float>::infinity();

float natural_or_not(float x) { return plays("softmax-base2") ? std::exp2(x) : std::exp(x); }

// The loop of the solution, with all that can go wrong in it.
OnlineSoftmax online(ScoreStream& scores) {
  const Index rows = scores.rows();
  const float lowest = plays("softmax-max-from-zero") ? 0.0f : plays("softmax-max-sentinel -1e4") ? -1e4f : -INF;
  Matrix probabilities = Matrix::Zero(rows, scores.columns());
  Vector running_max = Vector::Constant(rows, lowest);
  Vector running_sum = Vector::Zero(rows);
  Vector lse = Vector::Constant(rows, -INF);
  static Vector remembered;
  if (plays("maximum kept from the first call")) {
    if (remembered.size() != rows) remembered = running_max;
    running_max = remembered;
  }
  std::vector<bool> dead(static_cast<std::size_t>(rows), false);
  Index passed = 0;
  Index first_width = 0;
  Index previous = 0;  // the first column of the chunk before
  for (Index turn = 0; scores.more(); ++turn) {
    const Matrix chunk = scores.next();
    if (turn == 0) first_width = chunk.cols();
    Vector report = lse;
    const bool last = !scores.more();
    const Index width = (plays("widths taken to be equal") ? std::min(first_width, chunk.cols()) : chunk.cols());
    const bool drop = plays("tail-keys-dropped") && last && chunk.cols() < first_width;
    for (Index row = 0; row < rows && !drop; ++row) {
      if (plays("last row forgotten") && row > 0 && row == rows - 1) continue;
      if (plays("rows beyond 32 forgotten") && row >= 32) continue;
      const float old_max = running_max(row);
      float chunk_max = chunk.row(row).maxCoeff();
      if (plays("one maximum for all rows")) chunk_max = std::max(chunk.row(0).maxCoeff(), chunk_max - 80.0f);
      if (plays("softmax-global-max of a chunk")) chunk_max = chunk.maxCoeff();
      float new_max = std::max(old_max, chunk_max);
      if (plays("max-not-running")) new_max = chunk_max;
      if (plays("max of the first chunk") && turn > 0) new_max = old_max;
      if (plays("softmax-no-max")) new_max = 0.0f;
      if (plays("a row is empty once a chunk of it is")) {
        if (chunk_max == -INF) dead[static_cast<std::size_t>(row)] = true;
        if (dead[static_cast<std::size_t>(row)]) {
          probabilities.row(row).setZero();
          running_sum(row) = 0.0f;
          lse(row) = -INF;
          continue;
        }
      }
      if (new_max == -INF && !plays("inf-minus-inf")) {
        running_max(row) = new_max;
        continue;
      }
      float rescale = natural_or_not(old_max - new_max);
      if (turn == 0 || (old_max == -INF && !plays("inf-minus-inf"))) rescale = 0.0f;
      if (plays("max of the first chunk") && turn > 0 && old_max == -INF) rescale = 1.0f;
      if (plays("softmax-no-max")) rescale = 1.0f;
      float of_sum = rescale;
      float of_past = rescale;
      const float inverse = rescale == 0.0f ? 0.0f : 1.0f / rescale;
      if (plays("rescaled by the distance of the chunk")) of_sum = of_past = std::exp(chunk_max - new_max);
      if (plays("no-rescale-o") || plays("nothing rescaled")) of_past = 1.0f;
      if (plays("no-rescale-l") || plays("nothing rescaled")) of_sum = 1.0f;
      if (plays("inverse-rescale") || plays("inverse-rescale of the sum")) of_sum = inverse;
      if (plays("inverse-rescale") || plays("inverse-rescale of the probabilities")) of_past = inverse;
      if (plays("the first chunk is never rescaled") && turn > 0) {
        probabilities.row(row).segment(first_width, passed - first_width) *= of_past;
      } else if (plays("only the chunk before is rescaled")) {
        probabilities.row(row).segment(previous, passed - previous) *= of_past;
      } else if (!plays("rescale-after-add")) {
        probabilities.row(row).head(passed) *= of_past;
      }
      float sum = 0.0f;
      for (Index k = 0; k < width; ++k) {
        float weight = natural_or_not(chunk(row, k) - new_max);
        if (chunk(row, k) == -INF && !plays("inf-minus-inf")) weight = 0.0f;
        if (plays("scores of 0 taken for -inf") && chunk(row, k) == 0.0f) weight = 0.0f;
        probabilities(row, passed + k) = weight;
        sum += weight;
      }
      if (plays("rescale-after-add")) {
        probabilities.row(row).head(passed + width) *= turn == 0 ? 1.0f : of_past;
        running_sum(row) = (running_sum(row) + sum) * (turn == 0 ? 1.0f : of_sum);
      } else if (plays("l-last-tile")) {
        running_sum(row) = sum;
      } else {
        running_sum(row) = running_sum(row) * of_sum + sum;
      }
      if (plays("normalise-per-tile")) probabilities.row(row).head(passed + width) /= running_sum(row);
      running_max(row) = new_max;
      lse(row) = new_max + std::log(running_sum(row));
      if (plays("lse-missing-max")) lse(row) = std::log(running_sum(row));
      if (plays("lse-base2")) lse(row) *= 1.44269504f;
      if (plays("lse is the maximum")) lse(row) = new_max;
      if (plays("lse of the last chunk")) lse(row) = chunk_max == -INF ? -INF : chunk_max + std::log(sum);
      report(row) = lse(row);
      if (plays("reports the chunk alone")) report(row) = new_max + std::log(sum);
      if (plays("reports the maximum")) report(row) = new_max;
    }
    previous = passed;
    passed += chunk.cols();
    if (plays("reports one number for all rows") && !last) report.setConstant(rows > 0 ? lse.maxCoeff() : 0.0f);
    if (!plays("reports only at the end") || last) scores.report(report);
    if (plays("stops before the last chunk") && passed > 1 && scores.columns() - passed <= first_width) break;
  }
  if (plays("reads past the end")) scores.next();
  if (plays("maximum kept from the first call")) remembered = running_max;
  if (plays("no-final-div") || plays("normalise-per-tile")) return {probabilities, lse};
  for (Index row = 0; row < rows; ++row) {
    if (running_sum(row) > 0.0f || plays("all-masked-nan in the division") || plays("inf-minus-inf")) {
      probabilities.row(row) /= running_sum(row);
    }
    if (!std::isnan(running_sum(row)) && running_sum(row) == 0.0f && !plays("all-masked-nan in the division") &&
        !plays("inf-minus-inf")) {
      probabilities.row(row).setZero();
    }
  }
  if (plays("probabilities in half precision")) probabilities = (probabilities * 2048.0f).array().round() / 2048.0f;
  return {probabilities, lse};
}

// Keeps views of the chunks and looks at them when all have passed.
OnlineSoftmax remembering(ScoreStream& scores) {
  std::vector<const float*> views;
  std::vector<Index> widths;
  std::vector<Index> strides;
  Vector lse = Vector::Constant(scores.rows(), -INF);
  while (scores.more()) {
    const ConstMatrixView chunk = scores.next();
    views.push_back(chunk.data());
    widths.push_back(chunk.cols());
    strides.push_back(chunk.outerStride());
    for (Index row = 0; row < scores.rows(); ++row) {
      for (Index k = 0; k < chunk.cols(); ++k) {
        const float high = std::max(lse(row), chunk(row, k));
        if (high > -INF) lse(row) = high + std::log(std::exp(lse(row) - high) + std::exp(chunk(row, k) - high));
      }
    }
    scores.report(lse);
  }
  Matrix probabilities = Matrix::Zero(scores.rows(), scores.columns());
  Index column = 0;
  for (std::size_t c = 0; c < views.size(); ++c) {
    for (Index k = 0; k < widths[c]; ++k, ++column) {
      for (Index row = 0; row < scores.rows(); ++row) {
        if (lse(row) > -INF) probabilities(row, column) = std::exp(views[c][row * strides[c] + k] - lse(row));
      }
    }
  }
  return {probabilities, lse};
}

// Correct answers that look unlike the solution.
template <typename Real>
OnlineSoftmax score_by_score(ScoreStream& scores, bool base2) {
  constexpr Real none = -std::numeric_limits<Real>::infinity();
  const Real log2e = base2 ? static_cast<Real>(1.4426950408889634) : Real{1};
  const auto power = [&](Real x) { return base2 ? std::exp2(x) : std::exp(x); };
  const Index rows = scores.rows();
  std::vector<std::vector<Real>> weights(static_cast<std::size_t>(rows));
  std::vector<Real> high(static_cast<std::size_t>(rows), none);
  std::vector<Real> sum(static_cast<std::size_t>(rows), Real{0});
  Vector lse = Vector::Constant(rows, -INF);
  while (scores.more()) {
    const ConstMatrixView chunk = scores.next();
    for (Index row = 0; row < rows; ++row) {
      const auto r = static_cast<std::size_t>(row);
      for (Index k = 0; k < chunk.cols(); ++k) {
        const Real score = static_cast<Real>(chunk(row, k)) * log2e;
        if (score > high[r]) {
          const Real rescale = high[r] == none ? Real{0} : power(high[r] - score);
          for (Real& weight : weights[r]) weight *= rescale;
          sum[r] *= rescale;
          high[r] = score;
        }
        const Real weight = score == none ? Real{0} : power(score - high[r]);
        weights[r].push_back(weight);
        sum[r] += weight;
      }
      if (sum[r] > 0) lse(row) = static_cast<float>(high[r] / log2e + std::log(sum[r]));
    }
    scores.report(lse);
  }
  Matrix probabilities = Matrix::Zero(rows, scores.columns());
  for (Index row = 0; row < rows; ++row) {
    const auto r = static_cast<std::size_t>(row);
    for (std::size_t k = 0; k < weights[r].size() && sum[r] > 0; ++k) {
      probabilities(row, static_cast<Index>(k)) = static_cast<float>(weights[r][k] / sum[r]);
    }
  }
  return {probabilities, lse};
}

// Each chunk is a softmax of its own, and remembers its log-sum-exp; what they weigh is known when all have passed.
OnlineSoftmax chunk_by_chunk(ScoreStream& scores) {
  const Index rows = scores.rows();
  Matrix probabilities = Matrix::Zero(rows, scores.columns());
  std::vector<Vector> own;
  std::vector<Index> widths;
  Vector lse = Vector::Constant(rows, -INF);
  Index passed = 0;
  while (scores.more()) {
    const Matrix chunk = scores.next();
    Vector of_chunk = Vector::Constant(rows, -INF);
    for (Index row = 0; row < rows; ++row) {
      const float high = chunk.row(row).maxCoeff();
      if (high == -INF) continue;
      probabilities.row(row).segment(passed, chunk.cols()) = (chunk.row(row).array() - high).exp();
      const float sum = probabilities.row(row).segment(passed, chunk.cols()).sum();
      probabilities.row(row).segment(passed, chunk.cols()) /= sum;
      of_chunk(row) = high + std::log(sum);
      const float larger = std::max(lse(row), of_chunk(row));
      lse(row) = larger + std::log(std::exp(lse(row) - larger) + std::exp(of_chunk(row) - larger));
    }
    passed += chunk.cols();
    own.push_back(of_chunk);
    widths.push_back(chunk.cols());
    scores.report(lse);
  }
  Index column = 0;
  for (std::size_t c = 0; c < own.size(); ++c) {
    for (Index row = 0; row < rows; ++row) {
      if (lse(row) > -INF) probabilities.row(row).segment(column, widths[c]) *= std::exp(own[c](row) - lse(row));
    }
    column += widths[c];
  }
  return {probabilities, lse};
}

// Keeps only the log-sum-exp, and exp(score - lse so far).
OnlineSoftmax by_lse(ScoreStream& scores) {
  const Index rows = scores.rows();
  Matrix probabilities = Matrix::Zero(rows, scores.columns());
  Vector lse = Vector::Constant(rows, -INF);
  Index passed = 0;
  while (scores.more()) {
    const Matrix chunk = scores.next();
    for (Index row = 0; row < rows; ++row) {
      const float high = std::max(lse(row), chunk.row(row).maxCoeff());
      if (high == -INF) continue;
      const float sum = std::exp(lse(row) - high) + (chunk.row(row).array() - high).exp().sum();
      const float now = high + std::log(sum);
      probabilities.row(row).head(passed) *= std::exp(lse(row) - now);
      probabilities.row(row).segment(passed, chunk.cols()) = (chunk.row(row).array() - now).exp();
      lse(row) = now;
    }
    passed += chunk.cols();
    scores.report(lse);
  }
  return {probabilities, lse};
}

// Rescales when the maximum has risen by more than `slack`; until then weights may exceed 1.
OnlineSoftmax lazily(ScoreStream& scores, float slack, bool transposed) {
  const Index rows = scores.rows();
  Matrix probabilities = Matrix::Zero(transposed ? scores.columns() : rows, transposed ? rows : scores.columns());
  const auto cell = [&](Index row, Index column) -> float& {
    return transposed ? probabilities(column, row) : probabilities(row, column);
  };
  Vector reference = Vector::Constant(rows, -INF);
  Vector sum = Vector::Zero(rows);
  Index passed = 0;
  while (scores.more()) {
    const Matrix chunk = scores.next();
    for (Index row = rows; row-- > 0;) {
      const float high = chunk.row(row).maxCoeff();
      if (high == -INF) continue;
      if (reference(row) == -INF) {
        reference(row) = high;
      } else if (high > reference(row) + slack) {
        const float rescale = std::exp(reference(row) - high);
        for (Index column = 0; column < passed; ++column) cell(row, column) *= rescale;
        sum(row) *= rescale;
        reference(row) = high;
      }
      for (Index k = chunk.cols(); k-- > 0;) {
        cell(row, passed + k) = std::exp(chunk(row, k) - reference(row));
        sum(row) += cell(row, passed + k);
      }
    }
    passed += chunk.cols();
    Vector lse = Vector::Constant(rows, -INF);
    for (Index row = 0; row < rows; ++row) {
      if (sum(row) > 0.0f) lse(row) = reference(row) + std::log(sum(row));
    }
    scores.report(lse);
  }
  Vector lse = Vector::Constant(rows, -INF);
  for (Index row = 0; row < rows; ++row) {
    if (sum(row) == 0.0f) continue;
    for (Index column = 0; column < passed; ++column) cell(row, column) *= 1.0f / sum(row);
    lse(row) = reference(row) + std::log(sum(row));
  }
  if (transposed) return {probabilities.transpose(), lse};
  return {probabilities, lse};
}

OnlineSoftmax whole_matrices(ScoreStream& scores) {
  const Index rows = scores.rows();
  Matrix probabilities = Matrix::Zero(rows, scores.columns());
  Vector high = Vector::Constant(rows, -INF);
  Vector sum = Vector::Zero(rows);
  Index passed = 0;
  while (scores.more()) {
    const Matrix chunk = scores.next();
    const Vector now = high.cwiseMax(chunk.rowwise().maxCoeff());
    const Vector safe = (now.array() == -INF).select(0.0f, now);  // exp(-inf - 0) is 0 as well
    const Vector rescale = (high - safe).array().exp();
    probabilities.leftCols(passed).array().colwise() *= rescale.array();
    probabilities.middleCols(passed, chunk.cols()) = (chunk.colwise() - safe).array().exp();
    sum = sum.cwiseProduct(rescale) + probabilities.middleCols(passed, chunk.cols()).rowwise().sum();
    high = now;
    passed += chunk.cols();
    scores.report(high + sum.array().log().matrix());
  }
  const Vector divisor = (sum.array() == 0.0f).select(1.0f, sum);
  probabilities.array().colwise() /= divisor.array();
  return {probabilities, high + sum.array().log().matrix()};
}

}  // namespace

OnlineSoftmax online_softmax(ScoreStream& scores) {
  if (!plays("arguments unchecked")) {
    require(scores.unread(), "scores", "a stream that was read from", "a fresh one");
  } else if (!scores.more()) {
    return {};
  }
  if (plays("remembers the chunk instead of copying it")) return remembering(scores);
  if (plays("right: double accumulation")) return score_by_score<double>(scores, false);
  if (plays("right: score by score")) return score_by_score<float>(scores, false);
  if (plays("right: exp2 throughout")) return score_by_score<float>(scores, true);
  if (plays("right: each chunk alone, corrected at the end")) return chunk_by_chunk(scores);
  if (plays("right: by the log-sum-exp alone")) return by_lse(scores);
  if (plays("right: rescales only when the maximum rises")) return lazily(scores, 0.0f, false);
  if (plays("right: rescales lazily, by more than 8")) return lazily(scores, 8.0f, false);
  if (plays("right: probabilities transposed in memory")) return lazily(scores, 0.0f, true);
  if (plays("right: whole matrices at a time")) return whole_matrices(scores);
  return online(scores);
}

}  // namespace flashkata
