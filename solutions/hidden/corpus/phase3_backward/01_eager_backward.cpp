// Answers to 01_eager_backward, wrong and right. Every deviation stands where somebody made it.
#include "eager_backward.hpp"

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
    // The weights.
    {"bwd-mask-ignored", "bwd-mask-ignored"},
    {"bool-mask-ignored", "bool-mask-ignored"},
    {"additive-mask-ignored", "additive-mask-ignored"},
    {"additive-mask-scaled", "additive-mask-scaled"},
    {"additive-mask-subtracted", "additive-mask-subtracted"},
    {"mask-polarity", "mask-polarity"},
    {"mask-post-softmax", "mask-post-softmax"},
    {"mask-finite-sentinel", "mask-finite-sentinel"},
    {"all-masked-nan", "all-masked-nan"},
    {"all-masked-uniform", "all-masked-uniform"},
    {"softmax-query-axis", "softmax-query-axis"},
    {"softmax-no-max", "softmax-no-max"},
    {"softmax-no-normalise", "softmax-no-normalise"},
    {"bwd-P-unscaled", "bwd-P-unscaled"},
    {"qk-swapped where square", "qk-swapped"},
    {"weights from the first call", UNNAMED},
    {"weights in half precision", UNNAMED},
    {"weights below 1e-4 dropped", UNNAMED},
    {"forbidden weights 1e-30", UNNAMED},
    // The scale.
    {"scale-arg-ignored", "scale-arg-ignored"},
    {"scale-arg-ignored in the weights alone", "scale-arg-ignored"},
    {"scale-arg-ignored after the weights", "scale-arg-ignored"},
    {"scale-zero-as-default", "scale-zero-as-default"},
    {"scale-1-over-d", "scale-1-over-d"},
    {"scale-from-dv", "scale-from-dv"},
    {"scale-inverted", "scale-inverted"},
    {"scale without its sign", UNNAMED},
    {"bwd-dq-no-scale", "bwd-dq-no-scale"},
    {"bwd-dk-no-scale", "bwd-dk-no-scale"},
    {"bwd-no-scale", "bwd-no-scale"},
    {"bwd-scale-twice", "bwd-scale-twice"},
    {"scale twice in dQ", UNNAMED},
    {"bwd-dv-scaled", "bwd-dv-scaled"},
    // dP.
    {"bwd-dO-ignored", "bwd-dO-ignored"},
    {"bwd-dO-stride", "bwd-dO-stride"},
    {"bwd-dP-from-key", "bwd-dP-from-key"},
    {"values reshaped where they should be transposed", UNNAMED},
    {"masked-nan-leak in dP", UNNAMED},
    // The Jacobian.
    {"bwd-no-D", "bwd-no-D"},
    {"bwd-D-wrong-source", "bwd-D-wrong-source"},
    {"bwd-D-unweighted", "bwd-D-unweighted"},
    {"bwd-D-sum-of-dP", "bwd-D-sum-of-dP"},
    {"bwd-D-query-axis", "bwd-D-query-axis"},
    {"bwd-D-whole-matrix", "bwd-D-whole-matrix"},
    {"bwd-softmax-jac-diagonal", "bwd-softmax-jac-diagonal"},
    {"bwd-softmax-jac-P2", "bwd-softmax-jac-P2"},
    {"bwd-softmax-jac-no-P", "bwd-softmax-jac-no-P"},
    {"bwd-softmax-jac-log", "bwd-softmax-jac-log"},
    {"bwd-sign", "bwd-sign"},
    {"D of the first 16 keys", UNNAMED},
    {"D without the last key", UNNAMED},
    {"D of the query before, beyond query 40", UNNAMED},
    {"dS clamped to 1", UNNAMED},
    {"dS rounded to bf16", UNNAMED},
    // The products.
    {"bwd-dq-dk-swapped where square", "bwd-dq-dk-swapped"},
    {"bwd-gradients-exchanged", "bwd-gradients-exchanged"},
    {"bwd-dq-assign", "bwd-dq-assign"},
    {"bwd-dk-assign", "bwd-dk-assign"},
    {"bwd-dv-assign", "bwd-dv-assign"},
    {"bwd-averaged", "bwd-averaged"},
    {"bwd-dv-not-transposed where square", "bwd-dv-not-transposed"},
    {"bwd-dk-not-transposed where square", "bwd-dk-not-transposed"},
    {"bwd-dv-from-dS", "bwd-dv-from-dS"},
    {"bwd-dv-from-dS and bwd-dq-no-scale", UNNAMED},
    {"value-is-key in dQ where as wide", UNNAMED},
    {"masked-nan-leak in dQ", UNNAMED},
    {"masked-nan-leak in dK", UNNAMED},
    {"masked-nan-leak in dV", UNNAMED},
    {"masked-nan-leak in all three", UNNAMED},
    {"masked-nan-leak unless nobody sees the key", UNNAMED},
    {"negative dS dropped", UNNAMED},
    {"last query dropped", UNNAMED},
    {"keys beyond 48 dropped", UNNAMED},
    {"channels beyond 64 dropped", UNNAMED},
    {"values as wide as keys", UNNAMED},
    {"no gradient with one key", UNNAMED},
    {"no gradient with one query", UNNAMED},
    // What a caller can expect.
    {"added to what the last call returned", UNNAMED},
    {"query scaled in place", UNNAMED},
    {"d_output cleaned in place", UNNAMED},
    {"NaN cleaned out of d_output", UNNAMED},
    {"NaN cleaned out of dP", UNNAMED},
    {"NaN cleaned out of the values", UNNAMED},
    {"rows taken for packed", UNNAMED},
    {"empty where there is nothing to do", UNNAMED},
    {"d_output unchecked", UNNAMED},
    {"only the queries of d_output checked", UNNAMED},
    {"arguments unchecked but for d_output", UNNAMED},
    {"right: double by hand", RIGHT},
    {"right: float by hand, keys outside", RIGHT},
    {"right: the Jacobian as a matrix", RIGHT},
    {"right: D from the output", RIGHT},
    {"right: distance of each value from the output", RIGHT},
    {"right: weights from the log-sum-exp", RIGHT},
    {"right: queries scaled beforehand", RIGHT},
    {"right: allowed keys gathered for each query", RIGHT},
    {"right: tiles of keys, the last first", RIGHT},
    {"right: transposed throughout", RIGHT},
};

constexpr float INF = std::numeric_limits<float>::infinity();

bool allows(const Mask& mask, Index i, Index j) {
  if (const auto* allowed = std::get_if<BoolMatrix>(&mask)) return (*allowed)(i, j);
  if (const auto* bias = std::get_if<Matrix>(&mask)) return (*bias)(i, j) > -INF;
  return true;
}

float bias_of(const Mask& mask, Index i, Index j) {
  const auto* bias = std::get_if<Matrix>(&mask);
  return bias == nullptr ? 0.0f : (*bias)(i, j);
}

float to_bf16(float x) {
  const float high = x * 257.0f;  // Dekker: the upper 8 bits of the significand
  return high - (high - x);
}

float scale_of(const Matrix& query, const Matrix& value, std::optional<float> given) {
  const auto width = static_cast<float>(plays("scale-from-dv") ? value.cols() : query.cols());
  const float usual = plays("scale-1-over-d") ? 1.0f / width : 1.0f / std::sqrt(width);
  if (plays("scale-arg-ignored") || plays("scale-arg-ignored after the weights")) return usual;
  if (plays("scale-zero-as-default") && given && *given == 0.0f) return usual;
  if (plays("scale-inverted")) return 1.0f / given.value_or(usual);
  if (plays("scale without its sign")) return std::abs(given.value_or(usual));
  return given.value_or(usual);
}

// A softmax of its own, with everything that went wrong in phase 1.
Matrix weights_by_hand(const Matrix& query, const Matrix& key, const Mask& mask, float scale) {
  const float fill = plays("mask-finite-sentinel") ? -1e4f : plays("all-masked-uniform") ? -1e30f : -INF;
  Matrix scores = scale * query * key.transpose();
  for (Index i = 0; i < scores.rows(); ++i) {
    for (Index j = 0; j < scores.cols(); ++j) {
      scores(i, j) = allows(mask, i, j) ? scores(i, j) + bias_of(mask, i, j) : fill;
    }
  }
  if (plays("softmax-query-axis")) return softmax_rows(scores.transpose()).transpose();
  for (Index i = 0; i < scores.rows() && scores.cols() > 0; ++i) {
    const float row_max = scores.row(i).maxCoeff();
    if (row_max == -INF && !plays("all-masked-nan")) {
      scores.row(i).setZero();
      continue;
    }
    scores.row(i) = (scores.row(i).array() - (plays("softmax-no-max") ? 0.0f : row_max)).exp();
    if (!plays("softmax-no-normalise")) scores.row(i) /= scores.row(i).sum();
  }
  return scores;
}

Matrix weights_of(const Matrix& query, const Matrix& key, const Matrix& value, const Mask& mask,
                  std::optional<float> given, float scale) {
  const auto* allowed = std::get_if<BoolMatrix>(&mask);
  const auto* bias = std::get_if<Matrix>(&mask);
  Mask seen = mask;
  if (plays("bwd-mask-ignored")) seen = {};
  if (allowed != nullptr && (plays("bool-mask-ignored") || plays("mask-post-softmax"))) seen = {};
  if (allowed != nullptr && plays("mask-polarity")) seen = BoolMatrix(!allowed->array());
  if (bias != nullptr && plays("additive-mask-ignored")) {
    seen = Matrix((bias->array() == -INF).select(-INF, Matrix::Zero(bias->rows(), bias->cols())));
  }
  if (bias != nullptr && plays("additive-mask-scaled")) seen = Matrix(*bias * scale);
  if (bias != nullptr && plays("additive-mask-subtracted")) {
    seen = Matrix((bias->array() == -INF).select(-INF, -*bias));
  }

  std::optional<float> passed = given;
  if (plays("scale-arg-ignored") || plays("scale-arg-ignored in the weights alone")) passed = {};
  if (plays("bwd-P-unscaled")) passed = 1.0f;
  if (plays("scale-zero-as-default") || plays("scale-1-over-d") || plays("scale-from-dv") || plays("scale-inverted") ||
      plays("scale without its sign")) {
    passed = scale;
  }
  const bool own = plays("mask-finite-sentinel") || plays("all-masked-uniform") || plays("all-masked-nan") ||
                   corpus::name().starts_with("softmax-");
  Matrix weights = own ? weights_by_hand(query, key, seen, scale) : attention(query, key, value, seen, passed).weights;
  if (plays("qk-swapped where square") && query.rows() == key.rows()) {
    weights = attention(key, query, value, seen, passed).weights;
  }
  if (allowed != nullptr && plays("mask-post-softmax")) weights = allowed->select(weights, 0.0f);
  if (plays("weights in half precision")) weights = (weights * 2048.0f).array().round().matrix() / 2048.0f;
  if (plays("weights below 1e-4 dropped")) weights = (weights.array() < 1e-4f).select(0.0f, weights);
  if (plays("forbidden weights 1e-30")) weights = weights.cwiseMax(1e-30f);
  if (plays("weights from the first call")) {
    static std::vector<Matrix> kept;
    for (const Matrix& old : kept) {
      if (old.rows() == weights.rows() && old.cols() == weights.cols()) return old;
    }
    kept.push_back(weights);
  }
  return weights;
}

// dS, given P and dP.
Matrix d_scores_of(const Matrix& weights, const Matrix& d_weights, const Matrix& d_output) {
  const Matrix product = weights.cwiseProduct(d_weights);
  const auto keys = static_cast<float>(weights.cols());
  Eigen::VectorXf delta = product.rowwise().sum();
  if (plays("bwd-no-D")) return product;
  if (plays("bwd-softmax-jac-diagonal")) return product.array() * (1.0f - weights.array());
  if (plays("bwd-softmax-jac-log")) {
    return d_weights.array() - weights.array().colwise() * d_weights.rowwise().sum().array();
  }
  if (plays("bwd-D-query-axis")) return weights.array() * (d_weights.rowwise() - product.colwise().sum()).array();
  if (plays("bwd-D-wrong-source")) delta = d_output.rowwise().sum();
  if (plays("bwd-D-unweighted")) delta = d_weights.rowwise().sum() / keys;
  if (plays("bwd-D-sum-of-dP")) delta = d_weights.rowwise().sum();
  if (plays("bwd-D-whole-matrix")) delta.setConstant(product.sum());
  if (plays("D of the first 16 keys")) {
    delta = product.leftCols(std::min<Index>(16, product.cols())).rowwise().sum();
  }
  if (plays("D without the last key") && product.cols() > 1) {
    delta = product.leftCols(product.cols() - 1).rowwise().sum();
  }
  if (plays("D of the query before, beyond query 40")) {
    for (Index i = delta.size() - 1; i > 40; --i) delta(i) = delta(i - 1);
  }
  Matrix d_scores = weights.array() * (d_weights.colwise() - delta).array();
  if (plays("bwd-softmax-jac-P2")) d_scores = d_scores.cwiseProduct(weights);
  if (plays("bwd-softmax-jac-no-P")) d_scores = d_weights.colwise() - delta;
  if (plays("bwd-sign")) d_scores = -d_scores;
  if (plays("dS clamped to 1")) d_scores = d_scores.cwiseMax(-1.0f).cwiseMin(1.0f);
  if (plays("dS rounded to bf16")) d_scores = d_scores.unaryExpr(&to_bf16);
  return d_scores;
}

AttentionGradients from_scores(const Matrix& query, const Matrix& key, const Matrix& value, const Matrix& d_output,
                               const Matrix& weights, const Matrix& d_scores, float scale) {
  AttentionGradients result{Matrix::Zero(query.rows(), query.cols()), Matrix::Zero(key.rows(), key.cols()),
                            Matrix::Zero(value.rows(), value.cols())};
  const bool square = query.rows() == key.rows();
  const float of_query =
      plays("bwd-dq-no-scale") || plays("bwd-no-scale") || plays("bwd-dv-from-dS and bwd-dq-no-scale") ? 1.0f
      : plays("bwd-scale-twice") || plays("scale twice in dQ")                                         ? scale * scale
                                                                                                       : scale;
  const float of_key = plays("bwd-dk-no-scale") || plays("bwd-no-scale") ? 1.0f
                       : plays("bwd-scale-twice")                        ? scale * scale
                                                                         : scale;
  const float of_value = plays("bwd-dv-scaled") ? scale : 1.0f;
  const bool leaks_everywhere = plays("masked-nan-leak in all three");
  const auto nobody_sees = [&](Index j) { return (weights.col(j).array() == 0.0f).all(); };
  for (Index i = 0; i < query.rows(); ++i) {
    if (plays("last query dropped") && i > 40 && i + 1 == query.rows()) continue;
    for (Index j = 0; j < key.rows(); ++j) {
      if (plays("keys beyond 48 dropped") && j > 48) continue;
      const bool skip = weights(i, j) == 0.0f && !plays("bwd-softmax-jac-no-P") && !plays("bwd-softmax-jac-log");
      const float d_score = plays("negative dS dropped") ? std::max(d_scores(i, j), 0.0f) : d_scores(i, j);
      const bool leaks = leaks_everywhere || (plays("masked-nan-leak unless nobody sees the key") && !nobody_sees(j));
      if (!skip || leaks || plays("masked-nan-leak in dQ")) {
        if (plays("bwd-dq-assign")) result.query.row(i).setZero();
        const bool swapped = plays("bwd-dq-dk-swapped where square") && square;
        const bool from_value = plays("value-is-key in dQ where as wide") && key.cols() == value.cols();
        const Matrix& other = swapped ? query : from_value ? value : key;
        result.query.row(i) += of_query * d_score * other.row(j);
      }
      const bool keys_turned = plays("bwd-dk-not-transposed where square") && square;
      if (keys_turned) {
        result.key.row(i) += of_key * d_score * query.row(j);
      } else if (!skip || leaks || plays("masked-nan-leak in dK")) {
        if (plays("bwd-dk-assign")) result.key.row(j).setZero();
        const bool swapped = plays("bwd-dq-dk-swapped where square") && square;
        result.key.row(j) += of_key * d_score * (swapped ? key : query).row(i);
      }
      const bool values_turned = plays("bwd-dv-not-transposed where square") && square;
      const float weight = corpus::name().starts_with("bwd-dv-from-dS") ? d_scores(i, j) : weights(i, j);
      if (values_turned) {
        result.value.row(i) += weight * d_output.row(j);
      } else if (!skip || leaks || plays("masked-nan-leak in dV")) {
        if (plays("bwd-dv-assign")) result.value.row(j).setZero();
        result.value.row(j) += of_value * weight * d_output.row(i);
      }
    }
  }
  if (plays("bwd-averaged")) {
    const auto queries = static_cast<float>(std::max<Index>(query.rows(), 1));
    for (Matrix* gradient : {&result.query, &result.key, &result.value}) *gradient /= queries;
  }
  if (plays("channels beyond 64 dropped") && query.cols() > 64) {
    result.key.rightCols(query.cols() - 64).setZero();
  }
  return result;
}

// ---- Correct answers that look unlike the solution. Real is what sums are kept in -----------------------------------

template <typename Real>
AttentionGradients by_hand(const Matrix& query, const Matrix& key, const Matrix& value, const Matrix& d_output,
                           const Mask& mask, float scale, bool keys_outside) {
  using Sums = Eigen::Matrix<Real, Eigen::Dynamic, Eigen::Dynamic>;
  const Real infinity = std::numeric_limits<Real>::infinity();
  const Index queries = query.rows();
  const Index keys = key.rows();
  Sums weights = Sums::Zero(queries, keys);
  Sums d_weights = Sums::Zero(queries, keys);
  std::vector<Real> delta(static_cast<std::size_t>(queries), 0);
  for (Index i = 0; i < queries; ++i) {
    Real row_max = -infinity;
    for (Index j = 0; j < keys; ++j) {
      if (!allows(mask, i, j)) continue;
      Real dot = 0;
      for (Index d = 0; d < query.cols(); ++d) dot += static_cast<Real>(query(i, d)) * static_cast<Real>(key(j, d));
      weights(i, j) = dot * static_cast<Real>(scale) + static_cast<Real>(bias_of(mask, i, j));
      row_max = std::max(row_max, weights(i, j));
      for (Index d = 0; d < value.cols(); ++d) {
        d_weights(i, j) += static_cast<Real>(d_output(i, d)) * static_cast<Real>(value(j, d));
      }
    }
    Real sum = 0;
    for (Index j = 0; j < keys; ++j) {
      if (allows(mask, i, j)) sum += std::exp(weights(i, j) - row_max);
    }
    const Real lse = row_max + std::log(sum);
    for (Index j = 0; j < keys; ++j) {
      if (!allows(mask, i, j)) continue;
      weights(i, j) = keys_outside ? std::exp(weights(i, j) - lse) : std::exp(weights(i, j) - row_max) / sum;
      delta[static_cast<std::size_t>(i)] += weights(i, j) * d_weights(i, j);
    }
  }
  Sums d_query = Sums::Zero(queries, query.cols());
  Sums d_key = Sums::Zero(keys, query.cols());
  Sums d_value = Sums::Zero(keys, value.cols());
  const auto pair = [&](Index i, Index j) {
    if (!allows(mask, i, j)) return;
    const Real d_score = static_cast<Real>(scale) * weights(i, j) * (d_weights(i, j) - delta[std::size_t(i)]);
    d_query.row(i) += d_score * key.row(j).template cast<Real>();
    d_key.row(j) += d_score * query.row(i).template cast<Real>();
    d_value.row(j) += weights(i, j) * d_output.row(i).template cast<Real>();
  };
  if (keys_outside) {
    for (Index j = keys; j-- > 0;)
      for (Index i = queries; i-- > 0;) pair(i, j);
  } else {
    for (Index i = 0; i < queries; ++i)
      for (Index j = 0; j < keys; ++j) pair(i, j);
  }
  return {d_query.template cast<float>(), d_key.template cast<float>(), d_value.template cast<float>()};
}

// For each query, the keys that it sees as matrices of their own: nothing forbidden is ever touched.
AttentionGradients gathered(const Matrix& query, const Matrix& key, const Matrix& value, const Matrix& d_output,
                            const Mask& mask, std::optional<float> given, float scale) {
  const Matrix all = attention(query, key, value, mask, given).weights;
  AttentionGradients result{Matrix::Zero(query.rows(), query.cols()), Matrix::Zero(key.rows(), key.cols()),
                            Matrix::Zero(value.rows(), value.cols())};
  for (Index i = 0; i < query.rows(); ++i) {
    std::vector<Index> seen;
    for (Index j = key.rows(); j-- > 0;) {
      if (allows(mask, i, j)) seen.push_back(j);
    }
    const auto count = static_cast<Index>(seen.size());
    if (count == 0) continue;
    Matrix keys(count, key.cols());
    Matrix values(count, value.cols());
    Eigen::VectorXf weights(count);
    for (Index n = 0; n < count; ++n) {
      keys.row(n) = key.row(seen[static_cast<std::size_t>(n)]);
      values.row(n) = value.row(seen[static_cast<std::size_t>(n)]);
      weights(n) = all(i, seen[static_cast<std::size_t>(n)]);
    }
    Eigen::VectorXf d_scores(count);
    if (plays("right: the Jacobian as a matrix")) {
      Eigen::MatrixXf jacobian = -weights * weights.transpose();
      jacobian.diagonal() += weights;
      d_scores = jacobian * (values * d_output.row(i).transpose());
    } else if (plays("right: D from the output")) {
      const Eigen::VectorXf output = values.transpose() * weights;
      const float delta = output.dot(d_output.row(i));
      d_scores = weights.array() * ((values * d_output.row(i).transpose()).array() - delta);
    } else if (plays("right: distance of each value from the output")) {
      const Eigen::RowVectorXf output = weights.transpose() * values;
      d_scores = weights.array() * ((values.rowwise() - output) * d_output.row(i).transpose()).array();
    } else {
      const Eigen::VectorXf d_weights = values * d_output.row(i).transpose();
      d_scores = weights.array() * (d_weights.array() - weights.dot(d_weights));
    }
    result.query.row(i) = scale * (d_scores.transpose() * keys);
    for (Index n = 0; n < count; ++n) {
      const Index j = seen[static_cast<std::size_t>(n)];
      result.key.row(j) += scale * d_scores(n) * query.row(i);
      result.value.row(j) += weights(n) * d_output.row(i);
    }
  }
  return result;
}

// Tiles of keys, with the weights computed again for each from the log-sum-exp.
AttentionGradients tiled(const Matrix& query, const Matrix& key, const Matrix& value, const Matrix& d_output,
                         const Mask& mask, float scale, Index width) {
  AttentionGradients result{Matrix::Zero(query.rows(), query.cols()), Matrix::Zero(key.rows(), key.cols()),
                            Matrix::Zero(value.rows(), value.cols())};
  const auto score = [&](Index i, Index j) { return scale * query.row(i).dot(key.row(j)) + bias_of(mask, i, j); };
  Eigen::VectorXf lse = Eigen::VectorXf::Constant(query.rows(), -INF);
  Eigen::VectorXf delta = Eigen::VectorXf::Zero(query.rows());
  for (Index i = 0; i < query.rows(); ++i) {
    float row_max = -INF;
    for (Index j = 0; j < key.rows(); ++j) {
      if (allows(mask, i, j)) row_max = std::max(row_max, score(i, j));
    }
    if (row_max == -INF) continue;
    float sum = 0.0f;
    Eigen::RowVectorXf output = Eigen::RowVectorXf::Zero(value.cols());
    for (Index j = 0; j < key.rows(); ++j) {
      if (!allows(mask, i, j)) continue;
      const float weight = std::exp(score(i, j) - row_max);
      sum += weight;
      output += weight * value.row(j);
    }
    lse(i) = row_max + std::log(sum);
    delta(i) = output.dot(d_output.row(i)) / sum;
  }
  for (Index first = (key.rows() - 1) / width * width; first >= 0; first -= width) {
    for (Index i = 0; i < query.rows(); ++i) {
      for (Index j = first; j < std::min(first + width, key.rows()); ++j) {
        if (!allows(mask, i, j)) continue;
        const float weight = std::exp(score(i, j) - lse(i));
        const float d_score = scale * weight * (d_output.row(i).dot(value.row(j)) - delta(i));
        result.query.row(i) += d_score * key.row(j);
        result.key.row(j) += d_score * query.row(i);
        result.value.row(j) += weight * d_output.row(i);
      }
    }
  }
  return result;
}

// Every product the other way round, with operands from which all that nobody sees was taken out.
AttentionGradients transposed(const Matrix& query, const Matrix& key, const Matrix& value, const Matrix& d_output,
                              const Mask& mask, std::optional<float> given, float scale) {
  const Matrix weights_t = attention(query, key, value, mask, given).weights.transpose();  // [Sk, Sq]
  AttentionGradients result{Matrix::Zero(query.rows(), query.cols()), Matrix::Zero(key.rows(), key.cols()),
                            Matrix::Zero(value.rows(), value.cols())};
  Matrix d_weights_t = Matrix::Zero(key.rows(), query.rows());
  for (Index j = 0; j < key.rows(); ++j) {
    for (Index i = 0; i < query.rows(); ++i) {
      if (weights_t(j, i) > 0.0f) d_weights_t(j, i) = value.row(j).dot(d_output.row(i));
    }
  }
  const Eigen::RowVectorXf delta = weights_t.cwiseProduct(d_weights_t).colwise().sum();
  const Matrix d_scores_t = scale * weights_t.cwiseProduct(d_weights_t.rowwise() - delta);
  for (Index j = 0; j < key.rows(); ++j) {
    for (Index i = 0; i < query.rows(); ++i) {
      if (weights_t(j, i) == 0.0f) continue;
      result.value.row(j) += weights_t(j, i) * d_output.row(i);
      result.key.row(j) += d_scores_t(j, i) * query.row(i);
      result.query.row(i) += d_scores_t(j, i) * key.row(j);
    }
  }
  return result;
}

AttentionGradients unusual(const Matrix& query, const Matrix& key, const Matrix& value, const Matrix& d_output,
                           const Mask& mask, std::optional<float> given, float scale) {
  if (plays("right: double by hand")) return by_hand<double>(query, key, value, d_output, mask, scale, false);
  if (plays("right: float by hand, keys outside")) {
    return by_hand<float>(query, key, value, d_output, mask, scale, true);
  }
  if (plays("right: weights from the log-sum-exp")) return tiled(query, key, value, d_output, mask, scale, 1 << 20);
  if (plays("right: tiles of keys, the last first")) return tiled(query, key, value, d_output, mask, scale, 5);
  if (plays("right: transposed throughout")) return transposed(query, key, value, d_output, mask, given, scale);
  if (plays("right: queries scaled beforehand")) {
    // With the scale in the queries, dK has it, and dQ lacks it.
    AttentionGradients result = gathered(query * scale, key, value, d_output, mask, 1.0f, 1.0f);
    result.query *= scale;
    return result;
  }
  return gathered(query, key, value, d_output, mask, given, scale);
}

// Reads `view` as if its rows stood one after the other.
Matrix taken_for_packed(ConstMatrixView view) {
  return Eigen::Map<const Matrix>(view.data(), view.rows(), view.cols());
}

bool checked(ConstMatrixView query, ConstMatrixView key, ConstMatrixView value, ConstMatrixView d_output,
             const Mask& mask, std::optional<float> scale) {
  const bool d_output_fits = d_output.rows() == query.rows() && d_output.cols() == value.cols();
  if (plays("arguments unchecked but for d_output")) {
    const Shape<2> shape{d_output.rows(), d_output.cols()};
    require(d_output_fits, "d_output", to_text(shape), "[Sq, Dv]");
    return query.cols() == key.cols() && query.cols() > 0 && value.rows() == key.rows() && mask.index() == 0 &&
           std::isfinite(scale.value_or(1.0f));
  }
  if (plays("d_output unchecked") ||
      (plays("only the queries of d_output checked") && d_output.rows() == query.rows())) {
    check_head(query, key, value, mask, scale);
    return d_output_fits;
  }
  check_backward(query, key, value, d_output, mask, scale);
  return true;
}

}  // namespace

AttentionGradients attention_backward(ConstMatrixView query_view, ConstMatrixView key_view, ConstMatrixView value_view,
                                      ConstMatrixView d_output_view, const Mask& mask, std::optional<float> given) {
  if (!checked(query_view, key_view, value_view, d_output_view, mask, given)) return {};
  const bool packed = plays("rows taken for packed");
  const Matrix query = packed ? taken_for_packed(query_view) : Matrix(query_view);
  const Matrix key = packed ? taken_for_packed(key_view) : Matrix(key_view);
  Matrix value = packed ? taken_for_packed(value_view) : Matrix(value_view);
  Matrix d_output = plays("bwd-dO-stride") ? taken_for_packed(d_output_view) : Matrix(d_output_view);
  if (plays("bwd-dO-ignored")) d_output.setOnes();
  if (plays("NaN cleaned out of d_output")) d_output = d_output.array().isNaN().select(0.0f, d_output);

  if (plays("NaN cleaned out of the values")) value = value.array().isNaN().select(0.0f, value);

  const float scale = scale_of(query, value, given);
  if (corpus::name().starts_with("right:")) return unusual(query, key, value, d_output, mask, given, scale);
  if (plays("empty where there is nothing to do") && (query.rows() == 0 || key.rows() == 0)) return {};

  const Matrix weights = weights_of(query, key, value, mask, given, scale);
  Matrix d_weights = d_output * value.transpose();
  if (plays("values reshaped where they should be transposed")) {
    d_weights = d_output * Eigen::Map<const Matrix>(value.data(), value.cols(), value.rows());
  }
  if (plays("bwd-dP-from-key") && key.cols() == value.cols()) d_weights = d_output * key.transpose();
  if (plays("values as wide as keys") && value.cols() > key.cols()) {
    d_weights = d_output.leftCols(key.cols()) * value.leftCols(key.cols()).transpose();
  }
  if (!plays("masked-nan-leak in dP")) d_weights = (weights.array() == 0.0f).select(0.0f, d_weights);

  if (plays("NaN cleaned out of dP")) d_weights = d_weights.array().isNaN().select(0.0f, d_weights);

  const Matrix d_scores = d_scores_of(weights, d_weights, d_output);
  AttentionGradients result = from_scores(query, key, value, d_output, weights, d_scores, scale);

  if (plays("bwd-gradients-exchanged")) std::swap(result.query, result.key);
  if (plays("no gradient with one key") && key.rows() == 1) result.value.setZero();
  if (plays("no gradient with one query") && query.rows() == 1) result.query.setZero();
  if (plays("query scaled in place")) const_cast<float*>(query_view.data())[0] *= scale;
  if (plays("d_output cleaned in place")) {
    for (Index i = 0; i < d_output.rows(); ++i) {
      if ((weights.row(i).array() == 0.0f).all()) {
        auto* row = const_cast<float*>(d_output_view.row(i).data());
        std::fill_n(row, d_output.cols(), 0.0f);
      }
    }
  }
  if (plays("added to what the last call returned")) {
    static AttentionGradients last;
    const bool fits = last.query.rows() == result.query.rows() && last.query.cols() == result.query.cols();
    if (fits) result.query += last.query;
    last = result;
  }
  return result;
}

}  // namespace flashkata
