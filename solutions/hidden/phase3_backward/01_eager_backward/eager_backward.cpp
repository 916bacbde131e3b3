#include "eager_backward.hpp"

#include <cmath>

namespace flashkata {

AttentionGradients attention_backward(ConstMatrixView query, ConstMatrixView key, ConstMatrixView value,
                                      ConstMatrixView d_output, const Mask& mask, std::optional<float> scale) {
  check_backward(query, key, value, d_output, mask, scale);
  const float factor = scale.value_or(1.0f / std::sqrt(static_cast<float>(query.cols())));
  const Matrix weights = attention(query, key, value, mask, scale).weights;  // P [Sq, Sk]

  // Selected, not multiplied: a value that the query may not see may hold NaN, and 0 times NaN is NaN.
  Matrix d_weights = d_output * value.transpose();  // dP [Sq, Sk]
  d_weights = (weights.array() == 0.0f).select(0.0f, d_weights);

  // What a score gains is lost by the others of its row: each row of dS adds up to 0.
  const Eigen::VectorXf delta = weights.cwiseProduct(d_weights).rowwise().sum();    // [Sq]
  const Matrix d_scores = weights.array() * (d_weights.colwise() - delta).array();  // dS [Sq, Sk]

  // Three products, without the pairs of weight 0, for the same reason.
  AttentionGradients gradients{Matrix::Zero(query.rows(), query.cols()), Matrix::Zero(key.rows(), key.cols()),
                               Matrix::Zero(value.rows(), value.cols())};
  for (Index i = 0; i < query.rows(); ++i) {
    for (Index j = 0; j < key.rows(); ++j) {
      if (weights(i, j) == 0.0f) continue;
      gradients.value.row(j) += weights(i, j) * d_output.row(i);
      gradients.query.row(i) += factor * d_scores(i, j) * key.row(j);
      gradients.key.row(j) += factor * d_scores(i, j) * query.row(i);
    }
  }
  return gradients;
}

}  // namespace flashkata
