// Answers to 01_softmax, wrong and right. Every deviation stands where somebody made it.
#include "softmax.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include "../corpus.hpp"

namespace flashkata {
namespace {

using corpus::plays;
using corpus::RIGHT;
using corpus::UNNAMED;

const corpus::Answers answers{
    {"softmax-query-axis", "softmax-query-axis"},
    {"softmax-no-max", "softmax-no-max"},
    {"softmax-no-max, rows of -inf guarded", "softmax-no-max"},
    {"softmax-global-max", "softmax-global-max"},
    {"softmax-no-normalise", "softmax-no-normalise"},
    {"softmax-no-normalise, max kept in", "softmax-no-normalise"},
    {"softmax-max-from-zero", "softmax-max-from-zero"},
    {"softmax-max-from-zero, smallest positive float", "softmax-max-from-zero"},
    {"softmax-max-sentinel", "softmax-max-sentinel"},
    {"softmax-min", "softmax-min"},
    {"softmax-base2", "softmax-base2"},
    {"softmax-mean-shift", "softmax-mean-shift"},
    {"softmax-abs-max", "softmax-abs-max"},
    {"softmax-first-score", "softmax-first-score"},
    {"softmax-eps, no max", "softmax-eps"},
    {"softmax-eps, 1e-6", UNNAMED},
    {"exponents limited to -20", UNNAMED},
    {"softmax-clamped", "softmax-clamped"},
    {"softmax-log", "softmax-log"},
    {"softmax-row-carried, maximum", "softmax-row-carried"},
    {"softmax-row-carried, sum", "softmax-row-carried"},
    {"softmax-whole-matrix", "softmax-whole-matrix"},
    {"softmax-sign", "softmax-sign"},
    {"softmax-linear", "softmax-linear"},
    {"softmax-lse-rounded", "softmax-lse-rounded"},
    {"softmax-empty-if-any", "softmax-empty-if-any"},
    {"softmax-zero-forbidden", "softmax-zero-forbidden"},
    {"all-masked-nan", "all-masked-nan"},
    {"all-masked-uniform", "all-masked-uniform"},
    {"rows taken for packed", "noncontiguous-stride"},
    {"last row left alone", UNNAMED},
    {"last score left out of the maximum", UNNAMED},
    {"last score left out of the sum", UNNAMED},
    {"last of an odd number of scores left out", UNNAMED},
    {"rows beyond 256 as row 0", UNNAMED},
    {"columns beyond 4096 ignored", UNNAMED},
    {"online without rescaling", UNNAMED},
    {"log2 e multiplied in before the subtraction", UNNAMED},
    {"weights in half precision", UNNAMED},
    {"exp in half precision", UNNAMED},
    {"weights below 1e-8 flushed to 0", UNNAMED},
    {"exp by a table of slopes", UNNAMED},
    {"scores below -1e29 taken for -inf", UNNAMED},
    {"maximum as an integer", UNNAMED},
    {"only the first row guarded against -inf", UNNAMED},
    {"all-masked-nan, empty rows left unwritten", "all-masked-nan"},
    {"buffer kept between calls", UNNAMED},
    {"writes into the scores", UNNAMED},
    {"weights sorted", UNNAMED},
    {"transposed where square", UNNAMED},
    {"no column crashes", UNNAMED},
    {"right: std only", RIGHT},
    {"right: double accumulation", RIGHT},
    {"right: one pass, rescaled", RIGHT},
    {"right: exp2 of the difference", RIGHT},
    {"right: minus the logarithm of the sum", RIGHT},
    {"right: columns in the outer loop", RIGHT},
    {"right: transposed inside", RIGHT},
    {"right: whole-matrix expressions", RIGHT},
    {"right: sum from the back, in pairs", RIGHT},
    {"right: shifted by the maximum rounded up", RIGHT},
    {"right: lowest float and a guard on the sum", RIGHT},
    {"right: an eps that rounds away", RIGHT},
};

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.44269504f;

float half(float x) {
  return x == 0.0f ? 0.0f : std::ldexp(std::round(std::ldexp(x, 10 - std::ilogb(x))), std::ilogb(x) - 10);
}

// exp by straight lines between whole numbers: a few per cent off.
float table_exp(float x) {
  if (x < -100.0f) return 0.0f;
  const float low = std::floor(x);
  return std::exp(low) + (x - low) * (std::exp(low + 1.0f) - std::exp(low));
}

float maximum(const Matrix& scores, Index row) {
  const auto cells = scores.row(row).array();
  if (plays("softmax-no-max") || plays("softmax-no-max, rows of -inf guarded") || plays("softmax-eps, no max"))
    return 0.0f;
  if (plays("softmax-linear")) return 0.0f;
  if (plays("softmax-global-max")) return scores.maxCoeff();
  if (plays("softmax-max-from-zero")) return std::max(0.0f, cells.maxCoeff());
  if (plays("softmax-max-from-zero, smallest positive float")) {
    return std::max(std::numeric_limits<float>::min(), cells.maxCoeff());
  }
  if (plays("softmax-max-sentinel")) return std::max(-1e4f, cells.maxCoeff());
  if (plays("softmax-min")) return cells.minCoeff();
  if (plays("softmax-mean-shift")) return cells.mean();
  if (plays("softmax-abs-max")) return cells.abs().maxCoeff();
  if (plays("softmax-first-score")) return cells(0);
  if (plays("softmax-row-carried, maximum")) return scores.topRows(row + 1).maxCoeff();
  if (plays("last score left out of the maximum") && cells.size() > 1) return cells.head(cells.size() - 1).maxCoeff();
  if (plays("maximum as an integer")) {
    return static_cast<float>(static_cast<int>(std::clamp(cells.maxCoeff(), -2147483520.0f, 2147483520.0f)));
  }
  return cells.maxCoeff();
}

float power(float x) {
  if (plays("softmax-base2")) return std::exp2(x);
  if (plays("softmax-linear")) return x == -INF ? 0.0f : x;
  if (plays("exponents limited to -20")) return std::exp(std::max(x, -20.0f));
  if (plays("exp in half precision")) return half(std::exp(x));
  if (plays("exp by a table of slopes")) return table_exp(x);
  return std::exp(x);
}

bool empty(const Matrix& scores, Index row) {
  if (scores.cols() == 0 && !plays("no column crashes")) return true;
  const float largest = scores.row(row).maxCoeff();
  if (plays("softmax-empty-if-any")) return scores.row(row).minCoeff() == -INF;
  if (plays("scores below -1e29 taken for -inf")) return largest < -1e29f;
  if (plays("only the first row guarded against -inf") && row > 0) return false;
  if (plays("all-masked-nan") || plays("softmax-no-max")) return false;
  return largest == -INF;
}

Matrix usual(Matrix scores) {
  const Index rows = scores.rows();
  const Index columns = scores.cols();
  if (plays("softmax-zero-forbidden")) scores = (scores.array() == 0.0f).select(-INF, scores);
  if (plays("softmax-sign")) scores = (scores.array() == -INF).select(scores, -scores);
  if (plays("columns beyond 4096 ignored") && columns > 4096) scores.rightCols(columns - 4096).setConstant(-INF);
  if (plays("last of an odd number of scores left out") && columns > 8 && columns % 2 == 1) {
    scores.rightCols(1).setConstant(-INF);
  }

  Matrix weights(rows, columns);
  float total = 0.0f;
  for (Index i = 0; i < rows; ++i) {
    if (empty(scores, i)) {
      const bool uniform = plays("all-masked-uniform") && columns > 0;
      if (!plays("all-masked-nan, empty rows left unwritten"))
        weights.row(i).setConstant(uniform ? 1.0f / static_cast<float>(columns) : 0.0f);
      continue;
    }
    if (plays("softmax-clamped")) scores.row(i) = scores.row(i).array().max(-80.0f).min(80.0f).matrix().eval();
    const float shift = maximum(scores, i);
    if (!plays("softmax-row-carried, sum") && !plays("softmax-whole-matrix")) total = 0.0f;
    for (Index j = 0; j < columns; ++j) {
      if (plays("log2 e multiplied in before the subtraction")) {
        const float scaled = scores(i, j) * LOG2_E;
        const float scaled_shift = shift * LOG2_E;
        weights(i, j) = std::exp2(scaled - scaled_shift);
      } else {
        weights(i, j) = power(scores(i, j) - shift);
      }
      const bool last = j + 1 == columns && columns > 1;
      if (!(plays("last score left out of the sum") && last)) total += weights(i, j);
    }
    if (plays("softmax-eps, no max") || plays("softmax-eps, 1e-6")) total += 1e-6f;
    if (plays("softmax-no-normalise, max kept in")) weights.row(i) *= std::exp(shift);
    if (plays("softmax-lse-rounded")) {
      const float lse = shift + std::log(total);
      weights.row(i) = (scores.row(i).array() - lse).exp();
    } else if (corpus::name().substr(0, 20) != "softmax-no-normalise" && !plays("softmax-whole-matrix")) {
      weights.row(i) /= total;
    }
  }
  if (plays("softmax-whole-matrix")) weights /= total;
  return weights;
}

// ---------------------------------------------------------------------------------------------------------------------

Matrix one_pass(const Matrix& scores, bool rescale) {
  Matrix weights = Matrix::Zero(scores.rows(), scores.cols());
  for (Index i = 0; i < scores.rows(); ++i) {
    float running_max = -INF;
    float sum = 0.0f;
    for (Index j = 0; j < scores.cols(); ++j) {
      if (scores(i, j) == -INF) continue;
      const float new_max = std::max(running_max, scores(i, j));
      if (rescale && running_max != -INF) sum *= std::exp(running_max - new_max);
      sum += std::exp(scores(i, j) - new_max);
      running_max = new_max;
    }
    for (Index j = 0; j < scores.cols() && running_max != -INF; ++j) {
      weights(i, j) = std::exp(scores(i, j) - running_max) / sum;
    }
  }
  return weights;
}

template <typename Real>
Matrix by_hand(ConstMatrixView scores) {
  Matrix weights = Matrix::Zero(scores.rows(), scores.cols());
  for (Index i = 0; i < scores.rows(); ++i) {
    std::vector<Real> powers;
    Real largest = -INF;
    for (Index j = 0; j < scores.cols(); ++j) largest = std::max(largest, static_cast<Real>(scores(i, j)));
    if (plays("right: shifted by the maximum rounded up")) largest = std::ceil(largest);
    Real sum = 0;
    for (Index j = 0; j < scores.cols(); ++j) {
      if (scores(i, j) == -INF) {
        powers.push_back(0);
        continue;
      }
      const Real difference = static_cast<Real>(scores(i, j)) - largest;
      powers.push_back(plays("right: exp2 of the difference") ? std::exp2(difference * static_cast<Real>(LOG2_E))
                                                              : std::exp(difference));
      sum += powers.back();
    }
    if (plays("right: sum from the back, in pairs")) {
      sum = 0;
      for (std::size_t k = powers.size(); k > 0; k -= std::min<std::size_t>(k, 2)) {
        sum += powers[k - 1] + (k > 1 ? powers[k - 2] : Real{0});
      }
    }
    if (sum == 0) continue;
    for (Index j = 0; j < scores.cols(); ++j) {
      const Real power = powers[static_cast<std::size_t>(j)];
      if (plays("right: minus the logarithm of the sum")) {
        const Real exponent = (static_cast<Real>(scores(i, j)) - largest) - std::log(sum);
        weights(i, j) = scores(i, j) == -INF ? 0.0f : static_cast<float>(std::exp(exponent));
      } else {
        weights(i, j) = static_cast<float>(power / sum);
      }
    }
  }
  return weights;
}

Matrix columns_outside(const Matrix& scores) {
  std::vector<float> largest(static_cast<std::size_t>(scores.rows()), -INF);
  std::vector<float> sum(largest.size(), 0.0f);
  Matrix weights = Matrix::Zero(scores.rows(), scores.cols());
  const auto at = [](Index i) { return static_cast<std::size_t>(i); };
  for (Index j = 0; j < scores.cols(); ++j)
    for (Index i = 0; i < scores.rows(); ++i) largest[at(i)] = std::max(largest[at(i)], scores(i, j));
  for (Index j = 0; j < scores.cols(); ++j) {
    for (Index i = 0; i < scores.rows(); ++i) {
      if (largest[at(i)] == -INF) continue;
      weights(i, j) = std::exp(scores(i, j) - largest[at(i)]);
      sum[at(i)] += weights(i, j);
    }
  }
  for (Index j = scores.cols(); j-- > 0;)
    for (Index i = 0; i < scores.rows(); ++i)
      if (sum[at(i)] > 0.0f) weights(i, j) *= 1.0f / sum[at(i)];
  return weights;
}

Matrix whole_matrix(const Matrix& scores) {
  if (scores.size() == 0) return scores;
  const Eigen::ArrayXf largest = scores.rowwise().maxCoeff().array().max(-1e38f);
  Eigen::ArrayXXf powers = (scores.array().colwise() - largest).exp();
  const Eigen::ArrayXf sums = powers.rowwise().sum();
  powers.colwise() /= (sums == 0.0f).select(1.0f, sums);
  return powers.matrix();
}

Matrix transposed_inside(ConstMatrixView scores) {
  Eigen::MatrixXf columns = scores;  // column-major
  for (Index i = 0; i < columns.rows(); ++i) {
    if (columns.cols() == 0) continue;
    const float largest = columns.row(i).maxCoeff();
    if (largest == -INF) {
      columns.row(i).setZero();
      continue;
    }
    columns.row(i) = (columns.row(i).array() - largest).exp();
    columns.row(i) *= 1.0f / columns.row(i).sum();
  }
  return columns;
}

Matrix lowest_and_eps(ConstMatrixView scores) {
  Matrix weights = Matrix::Zero(scores.rows(), scores.cols());
  for (Index i = 0; i < scores.rows(); ++i) {
    float largest = std::numeric_limits<float>::lowest();
    for (Index j = 0; j < scores.cols(); ++j) largest = std::max(largest, scores(i, j));
    float sum = plays("right: an eps that rounds away") ? 1e-9f : 0.0f;
    for (Index j = 0; j < scores.cols(); ++j) sum += weights(i, j) = std::exp(scores(i, j) - largest);
    if (sum > 0.0f) weights.row(i) /= sum;
  }
  return weights;
}

Matrix kept_buffer(ConstMatrixView scores) {
  static Matrix buffer;
  if (buffer.rows() != scores.rows() || buffer.cols() != scores.cols()) buffer.setZero(scores.rows(), scores.cols());
  for (Index i = 0; i < scores.rows(); ++i) {
    if (scores.cols() > 0 && scores.row(i).maxCoeff() > -INF) buffer.row(i) = by_hand<float>(scores.row(i));
  }
  return buffer;
}

}  // namespace

Matrix softmax_rows(ConstMatrixView scores) {
  if (plays("right: std only") || plays("right: exp2 of the difference") ||
      plays("right: minus the logarithm of the sum") || plays("right: sum from the back, in pairs") ||
      plays("right: shifted by the maximum rounded up")) {
    return by_hand<float>(scores);
  }
  if (plays("right: double accumulation")) return by_hand<double>(scores);
  if (plays("right: one pass, rescaled")) return one_pass(scores, true);
  if (plays("online without rescaling")) return one_pass(scores, false);
  if (plays("right: columns in the outer loop")) return columns_outside(scores);
  if (plays("right: whole-matrix expressions")) return whole_matrix(scores);
  if (plays("right: transposed inside")) return transposed_inside(scores);
  if (plays("right: lowest float and a guard on the sum") || plays("right: an eps that rounds away")) {
    return lowest_and_eps(scores);
  }
  if (plays("softmax-query-axis")) return by_hand<float>(Matrix(scores.transpose())).transpose();
  if (plays("transposed where square") && scores.rows() == scores.cols()) {
    return by_hand<float>(scores).transpose();
  }
  if (plays("buffer kept between calls")) return kept_buffer(scores);
  if (plays("rows taken for packed"))
    return usual(Eigen::Map<const Matrix>(scores.data(), scores.rows(), scores.cols()));

  Matrix weights = usual(scores);
  if (plays("softmax-log")) weights = weights.array().log();
  if (plays("last row left alone") && scores.rows() > 1) weights.bottomRows(1) = scores.bottomRows(1);
  if (plays("rows beyond 256 as row 0")) {
    for (Index i = 256; i < weights.rows(); ++i) weights.row(i) = weights.row(0);
  }
  if (plays("weights in half precision")) weights = weights.unaryExpr(&half);
  if (plays("weights below 1e-8 flushed to 0")) weights = (weights.array() < 1e-8f).select(0.0f, weights);
  if (plays("weights sorted")) {
    for (Index i = 0; i < weights.rows(); ++i) std::sort(weights.row(i).begin(), weights.row(i).end());
  }
  if (plays("writes into the scores")) {
    for (Index i = 0; i < weights.rows(); ++i)
      for (Index j = 0; j < weights.cols(); ++j)
        const_cast<float*>(scores.data())[i * scores.outerStride() + j] = weights(i, j);
  }
  return weights;
}

}  // namespace flashkata
