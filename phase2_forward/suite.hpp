// What the suites of phase 2 share: the log-sum-exp is judged by its absolute error.
#pragma once

#include <cmath>
#include <limits>

#include "common/testing/suite.hpp"

namespace flashkata::testing {

/// An error e in a log-sum-exp is a factor exp(e) on every weight made from it: `basic`, and the rounding of numbers as
/// large as `largest_score` and as the log-sum-exp itself.
inline Bound lse_bound(Array lse, double largest_score, double basic = 1e-5) {
  constexpr double eps = std::numeric_limits<float>::epsilon();
  for (double& value : lse.values) {
    const double size = std::isfinite(value) ? std::max(std::abs(value), largest_score) : 0.0;
    value = 1.0 + 2.0 * eps * size / basic;
  }
  return {basic, std::move(lse)};
}

}  // namespace flashkata::testing
