#include "attention.hpp"

#include <cmath>
#include <limits>

namespace flashkata {

AttentionResult attention(ConstMatrixView query, ConstMatrixView key, ConstMatrixView value, const Mask& mask,
                          std::optional<float> scale) {
  check_head(query, key, value, mask, scale);
  constexpr float forbidden = -std::numeric_limits<float>::infinity();

  Matrix scores = query * key.transpose();  // [Sq, Sk]
  scores *= scale.value_or(1.0f / std::sqrt(static_cast<float>(query.cols())));

  // Selected, not added: a forbidden key may hold NaN, and NaN plus -inf is NaN.
  if (const auto* allowed = std::get_if<BoolMatrix>(&mask)) {
    scores = allowed->select(scores, forbidden);
  } else if (const auto* bias = std::get_if<Matrix>(&mask)) {
    scores = (bias->array() == forbidden).select(forbidden, scores + *bias);
  }

  Matrix weights = softmax_rows(scores);  // [Sq, Sk]

  // weights value, without the keys of weight 0: their values may be NaN, and 0 times NaN is NaN.
  Matrix output = Matrix::Zero(query.rows(), value.cols());  // [Sq, Dv]
  for (Index i = 0; i < weights.rows(); ++i) {
    for (Index j = 0; j < weights.cols(); ++j) {
      if (weights(i, j) > 0.0f) output.row(i) += weights(i, j) * value.row(j);
    }
  }
  return {output, weights};
}

}  // namespace flashkata
