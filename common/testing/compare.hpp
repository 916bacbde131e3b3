// Checks: how an answer is held against what it should be. Each failure becomes one finding (report.hpp).
#pragma once

#include <string_view>
#include <vector>

#include "common/testing/array.hpp"

namespace flashkata::testing {

using Axes = std::vector<std::string_view>;  // {"query", "channel"}: names for the axes of an array

/// How far an element may be from the reference: `relative` times its magnitude, the size of the terms that were added
/// up to make it (so that cancellation is allowed for, and an element made of nothing must be 0).
struct Bound {
  double relative;
  Array magnitude;
};

/// The bound of an fp32 step: 1e-5, growing with the rounding of scores as large as `largest_score` in their exponent.
Bound fp32_bound(Array magnitude, double largest_score);

/// The same shape, and every element within its bound: !(|got - want| <= bound) fails, so NaN fails. Where want is
/// infinite, got must be the same infinity.
bool expect_close(std::string_view name, const Array& got, const Array& want, const Bound& bound, const Axes& axes);

/// The same shape and the same bits. `why` completes the sentence: "changed in 3 of 8 elements <why>; first at ...".
bool expect_same_bits(std::string_view name, const Array& got, const Array& want, const Axes& axes,
                      std::string_view why);

/// The same shape, NaN and infinities in the same places, and all else the same but for rounding: within `tolerance`
/// times the largest finite element of `want`. `why` as above.
bool expect_same_but_rounding(std::string_view name, const Array& got, const Array& want, double tolerance,
                              const Axes& axes, std::string_view why);

/// Every element within `tolerance` of `want`. `what` names the property: "every element should be 1, because ...".
bool expect_all(std::string_view name, const Array& got, double want, double tolerance, const Axes& axes,
                std::string_view what);

/// A finding with `sentence` unless `ok`.
bool expect(bool ok, std::string_view name, const std::string& sentence);

/// Calls `call`, which must throw std::invalid_argument whose text contains `argument`.
template <typename Call>
void expect_rejected(std::string_view what, std::string_view argument, Call&& call);

// ---------------------------------------------------------------------------------------------------------------------

void judge_rejection(std::string_view what, std::string_view argument, bool thrown, std::string_view message);

template <typename Call>
void expect_rejected(std::string_view what, std::string_view argument, Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    judge_rejection(what, argument, true, error.what());
    return;
  }
  judge_rejection(what, argument, false, "");
}

}  // namespace flashkata::testing
