// How answers in fp16 and bf16 are judged: against what honest arithmetic of that precision would make of the inputs.
#pragma once

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <type_traits>

#include "common/gpu/half.hpp"
#include "common/testing/compare.hpp"
#include "common/testing/report.hpp"

namespace flashkata::testing {

template <typename T>
constexpr const char* type_name() {
  return std::is_same_v<T, float> ? "fp32" : std::is_same_v<T, fp16> ? "fp16" : "bf16";
}

/// Half the spacing of T's numbers near 1: the largest relative error of one rounding.
template <typename T>
constexpr double roundoff() {
  return std::is_same_v<T, float> ? 0x1p-24 : std::is_same_v<T, fp16> ? 0x1p-11 : 0x1p-8;
}

/// The largest error of rounding `value` to T. fp16 runs out of exponents at 2^-14: below, its spacing stays 2^-24.
template <typename T>
double rounding_error(double value) {
  return std::max(roundoff<T>() * std::abs(value), std::is_same_v<T, fp16> ? 0x1p-25 : 0.0);
}

/// The root mean square of many rounding errors is this part of the largest: sqrt(1 / 6), because errors are spread
/// evenly within half a spacing, and numbers within a factor of 2.
constexpr double TYPICAL_ERROR = 0.408;

template <typename T>
double rounded(double value) {
  return static_cast<double>(to_float(from_float<T>(static_cast<float>(value))));
}

/// Whether rows number `one` and `other`, of `width` numbers each, are the same but for rounding: each number within
/// `tolerance` of the other, NaN nowhere.
inline bool same_row_but_rounding(const Array& all, Index one, Index other, Index width, double tolerance) {
  const double* row = all.values.data();
  return std::equal(row + one * width, row + (one + 1) * width, row + other * width,
                    [&](double is, double was) { return is == was || std::abs(is - was) <= tolerance; });
}

/// Calls body(fp16{}), then body(bf16{}).
template <typename Body>
void for_both_types(const Body& body) {
  body(fp16{});
  body(bf16{});
}

/// How wrong an answer is, and how wrong it may be.
struct HalfErrors {
  double rms = 0.0, worst = 0.0;
  double rms_allowed = 0.0, worst_allowed = 0.0;

  /// Which part of what is allowed has been used up; beyond 1 the answer is wrong.
  double share() const {
    const double one = rms / rms_allowed;
    const double other = worst / worst_allowed;
    return std::isnan(one + other) ? INFINITY : std::max(one, other);
  }
};

/// `got` may be wrong by twice the root mean square error and by three times the largest error of `baseline`: the same
/// computation with scores in float, rounded to T as little as can be. What fp32 arithmetic may add is `arithmetic`.
template <typename T>
HalfErrors half_errors(const Array& got, const Array& want, const Array& baseline, const Bound& arithmetic) {
  double squares = 0.0, honest_squares = 0.0, honest_worst = 0.0, floor = 0x1p-24;
  HalfErrors errors;
  for (std::size_t i = 0; i < want.count(); ++i) {
    const double honest = std::abs(baseline.values[i] - want.values[i]);
    const double error = std::abs(got.values[i] - want.values[i]);
    squares += error * error;
    if (!(error <= errors.worst)) errors.worst = error;
    // An honest result may be right by luck, a rounded one is not wrong by less than this on the whole.
    const double least = rounding_error<T>(want.values[i]);
    honest_squares += std::max(honest * honest, std::pow(TYPICAL_ERROR * least, 2));
    honest_worst = std::max({honest_worst, honest, least});
    floor = std::max(floor, arithmetic.relative * arithmetic.magnitude.values[i]);
  }
  const double count = std::max(1.0, static_cast<double>(want.count()));
  errors.rms = std::sqrt(squares / count);
  errors.rms_allowed = 2.0 * std::sqrt(honest_squares / count) + floor;
  errors.worst_allowed = 3.0 * honest_worst + floor;
  return errors;
}

/// A finding unless the errors are within what half_errors() allows. `rounds` says where `baseline` is rounded; it
/// completes the sentence "allowed are those of the eager way with float scores, <rounds>".
template <typename T>
bool expect_close_in_half(std::string_view name, const Array& got, const Array& want, const Array& baseline,
                          const Bound& arithmetic, std::string_view rounds, const Axes& axes) {
  if (got.shape != want.shape) return expect_close(name, got, want, arithmetic, axes);  // says so
  const HalfErrors errors = half_errors<T>(got, want, baseline, arithmetic);
  const double allowed = errors.worst_allowed;
  std::size_t off = 0, nan = 0, first = npos;
  for (std::size_t i = 0; i < want.count(); ++i) {
    const double error = std::abs(got.values[i] - want.values[i]);
    if (std::isnan(error)) ++nan;
    if (error <= allowed) continue;
    ++off;
    if (first == npos) first = i;
  }
  if (errors.rms <= errors.rms_allowed && off == 0) return true;
  std::ostringstream text;
  text.precision(3);
  text << type_name<T>() << ": ";
  if (off > 0) {
    text << off << " of " << want.count() << " elements off";
    if (nan > 0) text << ", " << (nan == off ? "all of them" : std::to_string(nan)) << " NaN";
    text.precision(5);
    text << "; first at [" << place(want, first, axes) << "]: got " << got.values[first] << ", want "
         << want.values[first] << "; ";
    text.precision(3);
  }
  text << "rms error " << errors.rms << ", largest " << errors.worst << "; allowed are " << errors.rms_allowed
       << " and " << allowed << ", 2 x and 3 x those of the eager way with float scores, " << rounds << ' '
       << type_name<T>();
  finding(name, text.str());
  return false;
}

}  // namespace flashkata::testing
