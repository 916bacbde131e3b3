#include "online_softmax.hpp"

#include <cmath>
#include <limits>

namespace flashkata {

OnlineSoftmax online_softmax(ScoreStream& scores) {
  require(scores.unread(), "scores", "a stream that was read from", "a fresh one");
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
  const Index rows = scores.rows();

  // Until the division at the end, probabilities(i, j) = exp(score - running_max(i)), and running_sum(i) is their sum.
  Matrix probabilities = Matrix::Zero(rows, scores.columns());
  Vector running_max = Vector::Constant(rows, minus_infinity);
  Vector running_sum = Vector::Zero(rows);
  Vector lse = running_max;
  Index passed = 0;  // columns

  while (scores.more()) {
    const ConstMatrixView chunk = scores.next();  // [rows, width]
    for (Index row = 0; row < rows; ++row) {
      const float new_max = std::max(running_max(row), chunk.row(row).maxCoeff());
      if (new_max == minus_infinity) continue;  // nothing but -inf so far, and -inf minus -inf is not a number

      // What was measured against the old maximum shrinks to the new one. The first time it is exp(-inf) = 0.
      const float rescale = std::exp(running_max(row) - new_max);
      probabilities.row(row).head(passed) *= rescale;
      running_sum(row) *= rescale;

      auto fresh = probabilities.row(row).segment(passed, chunk.cols());
      fresh = (chunk.row(row).array() - new_max).exp();
      running_sum(row) += fresh.sum();
      running_max(row) = new_max;
      lse(row) = new_max + std::log(running_sum(row));
    }
    passed += chunk.cols();
    scores.report(lse);
  }

  for (Index row = 0; row < rows; ++row) {
    if (running_sum(row) > 0.0f) probabilities.row(row) /= running_sum(row);
  }
  return {probabilities, lse};
}

}  // namespace flashkata
