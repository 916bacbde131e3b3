#include "softmax.hpp"

#include <cmath>
#include <limits>

namespace flashkata {

Matrix softmax_rows(ConstMatrixView scores) {
  Matrix weights = Matrix::Zero(scores.rows(), scores.cols());
  for (Index row = 0; row < scores.rows(); ++row) {
    // The row's own maximum: its largest term becomes exp(0) = 1, so the sum can neither overflow nor vanish.
    float row_max = -std::numeric_limits<float>::infinity();
    for (Index col = 0; col < scores.cols(); ++col) row_max = std::max(row_max, scores(row, col));
    if (std::isinf(row_max)) continue;  // nobody to attend to; -inf minus -inf would be NaN

    weights.row(row) = (scores.row(row).array() - row_max).exp();
    weights.row(row) /= weights.row(row).sum();
  }
  return weights;
}

}  // namespace flashkata
