// Answers to 02_attention, wrong and right. Every deviation stands where somebody made it.
#include "attention.hpp"

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
    {"softmax-global-max", "softmax-global-max"},
    {"softmax-no-normalise", "softmax-no-normalise"},
    {"scale-missing", "scale-missing"},
    {"scale-1-over-d", "scale-1-over-d"},
    {"scale-from-dv", "scale-from-dv"},
    {"scale-from-length", "scale-from-length"},
    {"scale-twice", "scale-twice"},
    {"scale-inverted", "scale-inverted"},
    {"scale-arg-ignored", "scale-arg-ignored"},
    {"scale-zero-as-default", "scale-zero-as-default"},
    {"scale-after-softmax", "scale-after-softmax"},
    {"additive-mask-scaled", "additive-mask-scaled"},
    {"additive-mask-ignored", "additive-mask-ignored"},
    {"additive-mask-subtracted", "additive-mask-subtracted"},
    {"additive-mask-multiplied", "additive-mask-multiplied"},
    {"bool-mask-ignored", "bool-mask-ignored"},
    {"mask-polarity", "mask-polarity"},
    {"bool-mask-added", "bool-mask-added"},
    {"int-mask-truthiness", "int-mask-truthiness"},
    {"mask-multiply-zero", "mask-multiply-zero"},
    {"mask-post-softmax", "mask-post-softmax"},
    {"mask-sign-posinf", "mask-sign-posinf"},
    {"mask-tiny-constant", "mask-multiply-zero"},
    {"mask-finite-sentinel", "mask-finite-sentinel"},
    {"mask-finite-sentinel, -5e4", "all-masked-uniform"},
    {"mask-transposed where square", "mask-transposed"},
    {"masked-nan-leak in the values", UNNAMED},
    {"masked-nan-leak in the keys", UNNAMED},
    {"all-masked-nan", "all-masked-nan"},
    {"all-masked-uniform", "all-masked-uniform"},
    {"scale-1-over-d and all-masked-nan", "scale-1-over-d"},
    {"scale-missing and all-masked-nan", "scale-missing"},
    {"additive-mask-scaled and all-masked-nan", "additive-mask-scaled"},
    {"weights-returned-unmasked", "weights-returned-unmasked"},
    {"weights-returned-scores", "weights-returned-scores"},
    {"kt-transposed-data", "kt-transposed-data"},
    {"qk-swapped where square", "qk-swapped"},
    {"value-is-key", "value-is-key"},
    {"last key dropped", UNNAMED},
    {"first query copied", UNNAMED},
    {"rows taken for packed", "noncontiguous-stride"},
    {"zero scores forbidden", UNNAMED},
    {"weights in half precision", UNNAMED},
    {"arguments unchecked", UNNAMED},
    {"right: std only", RIGHT},
    {"right: double accumulation", RIGHT},
    {"right: keys in blocks, backwards", RIGHT},
    {"right: loops exchanged", RIGHT},
    {"right: exp2 with the scale folded in", RIGHT},
    {"right: one pass, rescaled", RIGHT},
    {"right: divided at the end", RIGHT},
};

constexpr float INF = std::numeric_limits<float>::infinity();

float scale_of(const Matrix& query, const Matrix& key, const Matrix& value, std::optional<float> given) {
  if (corpus::name().starts_with("scale-missing")) return given.value_or(1.0f);
  const auto width = static_cast<float>(plays("scale-from-dv") ? value.cols() : query.cols());
  const float usual = corpus::name().starts_with("scale-1-over-d") ? 1.0f / width
                      : plays("scale-from-length")                 ? 1.0f / std::sqrt(static_cast<float>(key.rows()))
                                                                   : 1.0f / std::sqrt(width);
  if (plays("scale-arg-ignored")) return usual;
  if (plays("scale-zero-as-default") && given && *given == 0.0f) return usual;
  const float scale = given.value_or(usual);
  if (plays("scale-twice")) return scale * scale;
  if (plays("scale-inverted")) return 1.0f / scale;
  if (plays("scale-after-softmax")) return 1.0f;
  return scale;
}

Matrix scores_of(const Matrix& query, const Matrix& key) {
  if (plays("kt-transposed-data")) {
    const Eigen::Map<const Matrix> reshaped(key.data(), key.cols(), key.rows());
    return query * reshaped;
  }
  if (plays("qk-swapped where square") && query.rows() == key.rows()) return key * query.transpose();
  return query * key.transpose();
}

Matrix masked(Matrix scores, const Mask& mask, float scale) {
  const float fill = plays("mask-sign-posinf")             ? INF
                     : plays("mask-tiny-constant")         ? -1e-9f
                     : plays("mask-finite-sentinel")       ? -1e4f
                     : plays("mask-finite-sentinel, -5e4") ? -5e4f
                     : plays("all-masked-uniform")         ? -1e30f
                                                           : -INF;
  if (const auto* allowed = std::get_if<BoolMatrix>(&mask)) {
    if (plays("bool-mask-ignored") || plays("mask-post-softmax")) return scores;
    for (Index i = 0; i < scores.rows(); ++i) {
      for (Index j = 0; j < scores.cols(); ++j) {
        const bool transposed = plays("mask-transposed where square") && scores.rows() == scores.cols();
        const bool allow = (transposed ? (*allowed)(j, i) : (*allowed)(i, j)) != plays("mask-polarity");
        if (plays("bool-mask-added")) {
          scores(i, j) += allow ? 1.0f : 0.0f;
        } else if (plays("mask-multiply-zero")) {
          scores(i, j) *= allow ? 1.0f : 0.0f;
        } else if (plays("masked-nan-leak in the keys")) {
          scores(i, j) += allow ? 0.0f : -INF;
        } else if (!allow) {
          scores(i, j) = fill;
        }
      }
    }
  } else if (const auto* bias = std::get_if<Matrix>(&mask)) {
    if (plays("additive-mask-ignored")) return scores;
    for (Index i = 0; i < scores.rows(); ++i) {
      for (Index j = 0; j < scores.cols(); ++j) {
        const float b = (*bias)(i, j);
        if (plays("int-mask-truthiness")) {
          if (b == 0.0f) scores(i, j) = -INF;
        } else if (b == -INF) {
          scores(i, j) = fill;
        } else if (corpus::name().starts_with("additive-mask-scaled")) {
          scores(i, j) += b * scale;
        } else if (plays("additive-mask-subtracted")) {
          scores(i, j) -= b;
        } else if (plays("additive-mask-multiplied")) {
          scores(i, j) *= b;
        } else {
          scores(i, j) += b;
        }
      }
    }
  }
  if (plays("zero scores forbidden")) scores = (scores.array() == 0.0f).select(-INF, scores);
  return scores;
}

Matrix softmax(Matrix scores) {
  if (plays("softmax-query-axis")) return softmax_rows(scores.transpose()).transpose();
  const bool guarded = !corpus::name().ends_with("all-masked-nan");
  const float global_max = scores.size() > 0 ? scores.maxCoeff() : 0.0f;
  for (Index i = 0; i < scores.rows(); ++i) {
    if (scores.cols() == 0) continue;
    float row_max = plays("softmax-global-max") ? global_max : scores.row(i).maxCoeff();
    if (guarded && scores.row(i).maxCoeff() == -INF) {
      scores.row(i).setZero();
      continue;
    }
    if (plays("softmax-no-max")) row_max = 0.0f;
    scores.row(i) = (scores.row(i).array() - row_max).exp();
    if (!plays("softmax-no-normalise")) scores.row(i) /= scores.row(i).sum();
  }
  return scores;
}

Matrix product(const Matrix& weights, const Matrix& value) {
  if (plays("masked-nan-leak in the values")) return weights * value;
  Matrix output = Matrix::Zero(weights.rows(), value.cols());
  for (Index i = 0; i < weights.rows(); ++i) {
    for (Index j = 0; j < weights.cols(); ++j) {
      // A weight that is NaN is not skipped: it must be seen.
      if (weights(i, j) != 0.0f) output.row(i) += weights(i, j) * value.row(j);
    }
  }
  return output;
}

AttentionResult finish(const Matrix& weights, const Matrix& value) { return {product(weights, value), weights}; }

bool allows(const Mask& mask, Index i, Index j) {
  if (const auto* allowed = std::get_if<BoolMatrix>(&mask)) return (*allowed)(i, j);
  if (const auto* bias = std::get_if<Matrix>(&mask)) return (*bias)(i, j) > -INF;
  return true;
}

float bias_of(const Mask& mask, Index i, Index j) {
  const auto* bias = std::get_if<Matrix>(&mask);
  return bias == nullptr ? 0.0f : (*bias)(i, j);
}

// Correct answers that look unlike the solution. Real is what sums are kept in.
template <typename Real>
AttentionResult by_hand(const Matrix& query, const Matrix& key, const Matrix& value, const Mask& mask, float scale) {
  AttentionResult result{Matrix::Zero(query.rows(), value.cols()), Matrix::Zero(query.rows(), key.rows())};
  const bool backwards = plays("right: keys in blocks, backwards");
  const bool base2 = plays("right: exp2 with the scale folded in");
  const Real log2e = static_cast<Real>(1.4426950408889634);
  for (Index i = 0; i < query.rows(); ++i) {
    std::vector<Index> keys;
    for (Index block = 0; block < key.rows(); block += 5) {
      for (Index j = block; j < std::min(block + 5, key.rows()); ++j) {
        if (allows(mask, i, j)) keys.insert(backwards ? keys.begin() : keys.end(), j);
      }
    }
    std::vector<Real> scores;
    Real row_max = -std::numeric_limits<Real>::infinity();
    for (const Index j : keys) {
      Real dot = 0;
      for (Index d = 0; d < query.cols(); ++d) dot += static_cast<Real>(query(i, d)) * static_cast<Real>(key(j, d));
      Real score = dot * static_cast<Real>(scale) + static_cast<Real>(bias_of(mask, i, j));
      if (base2) score *= log2e;
      scores.push_back(score);
      row_max = std::max(row_max, score);
    }
    Real sum = 0;
    for (Real& score : scores) {
      score = base2 ? std::exp2(score - row_max) : std::exp(score - row_max);
      sum += score;
    }
    for (Index d = 0; d < value.cols(); ++d) {
      Real total = 0;
      for (std::size_t k = 0; k < keys.size(); ++k) total += scores[k] * static_cast<Real>(value(keys[k], d));
      if (!keys.empty()) result.output(i, d) = static_cast<float>(total / sum);
    }
    for (std::size_t k = 0; k < keys.size(); ++k) result.weights(i, keys[k]) = static_cast<float>(scores[k] / sum);
  }
  return result;
}

AttentionResult one_pass(const Matrix& query, const Matrix& key, const Matrix& value, const Mask& mask, float scale) {
  AttentionResult result{Matrix::Zero(query.rows(), value.cols()), Matrix::Zero(query.rows(), key.rows())};
  for (Index i = 0; i < query.rows(); ++i) {
    float running_max = -INF;
    float sum = 0.0f;
    for (Index j = 0; j < key.rows(); ++j) {
      if (!allows(mask, i, j)) continue;
      const float score = query.row(i).dot(key.row(j)) * scale + bias_of(mask, i, j);
      const float new_max = std::max(running_max, score);
      const float rescale = running_max == -INF ? 0.0f : std::exp(running_max - new_max);
      result.weights.row(i) *= rescale;
      result.output.row(i) *= rescale;
      result.weights(i, j) = std::exp(score - new_max);
      result.output.row(i) += result.weights(i, j) * value.row(j);
      sum = sum * rescale + result.weights(i, j);
      running_max = new_max;
    }
    if (sum == 0.0f) continue;
    result.weights.row(i) /= sum;
    result.output.row(i) /= sum;
  }
  return result;
}

AttentionResult loops_exchanged(const Matrix& query, const Matrix& key, const Matrix& value, const Mask& mask,
                                float scale) {
  Matrix scores = Matrix::Constant(query.rows(), key.rows(), -INF);
  for (Index j = 0; j < key.rows(); ++j) {
    for (Index i = query.rows(); i-- > 0;) {
      if (allows(mask, i, j)) scores(i, j) = (query.row(i) * scale).dot(key.row(j)) + bias_of(mask, i, j);
    }
  }
  return finish(softmax(scores), value);
}

AttentionResult divided_at_the_end(const Matrix& scores, const Matrix& value) {
  AttentionResult result{Matrix::Zero(scores.rows(), value.cols()), Matrix::Zero(scores.rows(), scores.cols())};
  for (Index i = 0; i < scores.rows(); ++i) {
    if (scores.cols() == 0 || scores.row(i).maxCoeff() == -INF) continue;
    result.weights.row(i) = (scores.row(i).array() - scores.row(i).maxCoeff()).exp();
    for (Index j = 0; j < scores.cols(); ++j) {
      if (result.weights(i, j) > 0.0f) result.output.row(i) += result.weights(i, j) * value.row(j);
    }
    result.output.row(i) *= 1.0f / result.weights.row(i).sum();
    result.weights.row(i) *= 1.0f / result.weights.row(i).sum();
  }
  return result;
}

// Reads `view` as if its rows stood one after the other.
Matrix taken_for_packed(ConstMatrixView view) {
  return Eigen::Map<const Matrix>(view.data(), view.rows(), view.cols());
}

}  // namespace

AttentionResult attention(ConstMatrixView query_view, ConstMatrixView key_view, ConstMatrixView value_view,
                          const Mask& mask, std::optional<float> given) {
  if (!plays("arguments unchecked")) check_head(query_view, key_view, value_view, mask, given);
  if (plays("arguments unchecked") && key_view.cols() != query_view.cols()) return {};
  const bool packed = plays("rows taken for packed");
  const Matrix query = packed ? taken_for_packed(query_view) : Matrix(query_view);
  const Matrix key = packed ? taken_for_packed(key_view) : Matrix(key_view);
  const Matrix value = packed ? taken_for_packed(value_view) : Matrix(value_view);

  const float scale = scale_of(query, key, value, given);
  if (plays("right: std only") || plays("right: keys in blocks, backwards") ||
      plays("right: exp2 with the scale folded in")) {
    return by_hand<float>(query, key, value, mask, scale);
  }
  if (plays("right: double accumulation")) return by_hand<double>(query, key, value, mask, scale);
  if (plays("right: one pass, rescaled")) return one_pass(query, key, value, mask, scale);
  if (plays("right: loops exchanged")) return loops_exchanged(query, key, value, mask, scale);

  const Matrix raw = scores_of(query, key) * scale;
  const Matrix scores = masked(raw, mask, scale);
  if (plays("right: divided at the end")) return divided_at_the_end(scores, value);
  Matrix weights = softmax(scores);
  if (const auto* allowed = std::get_if<BoolMatrix>(&mask); allowed != nullptr && plays("mask-post-softmax")) {
    weights = allowed->select(weights, 0.0f);
  }
  if (plays("scale-after-softmax")) weights *= given.value_or(1.0f / std::sqrt(static_cast<float>(query.cols())));
  if (plays("last key dropped") && key.rows() > 1) weights.rightCols(1).setZero();
  if (plays("first query copied") && query.rows() > 40) weights.row(40) = weights.row(0);
  if (plays("weights in half precision")) weights = (weights * 2048.0f).array().round().matrix() / 2048.0f;
  if (plays("value-is-key") && value.cols() == key.cols()) return finish(weights, key);
  AttentionResult result = finish(weights, value);
  if (plays("weights-returned-unmasked")) result.weights = softmax(raw);
  if (plays("weights-returned-scores")) result.weights = scores;
  return result;
}

}  // namespace flashkata
