#include "merge.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace flashkata {

Partial merge_partials(const Partial& a, const Partial& b) {
  check_partials(a, b);
  constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

  Partial merged{Matrix::Zero(a.output.rows(), a.output.cols()), Vector::Constant(a.lse.size(), minus_infinity)};
  for (Index row = 0; row < a.lse.size(); ++row) {
    // Both lse measured against the larger one: exp() stays in (0, 1], and one of the two terms is 1.
    const float larger = std::max(a.lse(row), b.lse(row));
    if (larger == minus_infinity) continue;  // both are empty, and -inf minus -inf is not a number
    const float sum_a = std::exp(a.lse(row) - larger);
    const float sum_b = std::exp(b.lse(row) - larger);
    const float sum = sum_a + sum_b;

    // Added only if it counts: the output of an empty part may hold NaN, and 0 times NaN is NaN.
    if (sum_a > 0.0f) merged.output.row(row) += sum_a / sum * a.output.row(row);
    if (sum_b > 0.0f) merged.output.row(row) += sum_b / sum * b.output.row(row);
    merged.lse(row) = larger + std::log(sum);
  }
  return merged;
}

}  // namespace flashkata
