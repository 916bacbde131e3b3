#include "common/testing/compare.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "common/testing/report.hpp"

namespace flashkata::testing {
namespace {

std::string number(double value, int digits = 5) {
  if (std::isnan(value)) return "NaN";  // whatever its sign
  std::ostringstream text;
  text.precision(digits);
  text << value;
  return text.str();
}

// Two numbers that are not the same, with as many digits as show it.
std::pair<std::string, std::string> told_apart(double one, double other) {
  constexpr int ALL = std::numeric_limits<double>::max_digits10;
  int digits = 5;
  while (digits < ALL && number(one, digits) == number(other, digits)) ++digits;
  return {number(one, digits), number(other, digits)};
}

bool same_shape(std::string_view name, const Array& got, const Array& want) {
  if (got.shape == want.shape) return true;
  finding(name, "has shape " + to_text(got.shape) + ", want " + to_text(want.shape));
  return false;
}

std::string how_many(std::size_t some, std::size_t all) {
  return std::to_string(some) + " of " + std::to_string(all) + (all == 1 ? " element" : " elements");
}

// `differs(got, want)` says whether an element counts.
template <typename Differs>
bool expect_same(std::string_view name, const Array& got, const Array& want, const Axes& axes, std::string_view why,
                 const Differs& differs) {
  if (!same_shape(name, got, want)) return false;
  std::size_t changed = 0, first = npos;
  for (std::size_t i = 0; i < want.count(); ++i) {
    const double is = got.values[i], was = want.values[i];
    if (is == was || (std::isnan(is) && std::isnan(was)) || !differs(is, was)) continue;
    ++changed;
    if (first == npos) first = i;
  }
  if (changed == 0) return true;
  const auto [was, became] = told_apart(want.values[first], got.values[first]);
  finding(name, "changed in " + how_many(changed, want.count()) + " " + std::string(why) + "; first at [" +
                    place(want, first, axes) + "]: " + was + " became " + became);
  return false;
}

}  // namespace

Bound fp32_bound(Array magnitude, double largest_score) {
  constexpr double eps = std::numeric_limits<float>::epsilon();
  return {1e-5 + 2.0 * eps * largest_score, std::move(magnitude)};
}

bool expect_close(std::string_view name, const Array& got, const Array& want, const Bound& bound, const Axes& axes) {
  if (!same_shape(name, got, want)) return false;
  std::size_t off = 0;
  std::size_t nan = 0;
  std::size_t first = npos;
  double worst = 0.0;
  for (std::size_t i = 0; i < want.count(); ++i) {
    // Below the smallest normal float nothing can be asked for: weights of exp(-100) may round to 0.
    const double allowed = bound.relative * bound.magnitude.values[i] + std::numeric_limits<float>::min();
    const double error = got.values[i] == want.values[i] ? 0.0 : std::abs(got.values[i] - want.values[i]);
    if (error <= allowed) continue;
    ++off;
    if (std::isnan(got.values[i])) ++nan;
    if (first == npos) first = i;
    const double ratio = error / allowed;
    if (!(ratio <= worst)) worst = ratio;
  }
  if (off == 0) return true;

  std::ostringstream text;
  text << how_many(off, want.count()) << " off";
  if (nan > 0) text << ", " << (nan == off ? "all of them" : std::to_string(nan)) << " NaN";
  text << "; first at [" << place(want, first, axes) << "]: got " << number(got.values[first]) << ", want "
       << number(want.values[first]);
  if (std::isfinite(worst)) text << "; worst " << number(worst) << " x the bound (" << number(bound.relative) << ")";
  finding(name, text.str());
  return false;
}

bool expect_same_bits(std::string_view name, const Array& got, const Array& want, const Axes& axes,
                      std::string_view why) {
  return expect_same(name, got, want, axes, why, [](double, double) { return true; });
}

bool expect_same_but_rounding(std::string_view name, const Array& got, const Array& want, double tolerance,
                              const Axes& axes, std::string_view why) {
  double largest = 0.0;
  for (const double value : want.values) {
    if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
  }
  return expect_same(name, got, want, axes, why,
                     [&](double is, double was) { return !(std::abs(is - was) <= tolerance * largest); });
}

bool expect_all(std::string_view name, const Array& got, double want, double tolerance, const Axes& axes,
                std::string_view what) {
  std::size_t off = 0;
  std::size_t first = npos;
  for (std::size_t i = 0; i < got.count(); ++i) {
    if (std::abs(got.values[i] - want) <= tolerance) continue;
    ++off;
    if (first == npos) first = i;
  }
  if (off == 0) return true;
  finding(name, std::string(what) + "; " + how_many(off, got.count()) + " off, first at [" + place(got, first, axes) +
                    "]: got " + number(got.values[first]) + ", want " + number(want));
  return false;
}

bool expect(bool ok, std::string_view name, const std::string& sentence) {
  if (!ok) finding(name, sentence);
  return ok;
}

void judge_rejection(std::string_view what, std::string_view argument, bool thrown, std::string_view message) {
  if (!thrown) {
    finding("accepted",
            std::string(what) + ": nothing was thrown, want std::invalid_argument naming " + std::string(argument));
  } else if (message.find(argument) == std::string_view::npos) {
    finding("message", std::string(what) + ": \"" + std::string(message) + "\" does not name " + std::string(argument));
  }
}

}  // namespace flashkata::testing
