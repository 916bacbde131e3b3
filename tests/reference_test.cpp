// Who judges the judge? PyTorch's vectors, finite differences, and what must hold exactly.
//
// Compile with KATA_JUDGE (the reference is only for suites) and KATA_GOLDEN_DIR (the folder of attention.json,
// quoted).
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "common/attention/reference.hpp"

namespace {

using namespace flashkata;
using nlohmann::json;
using reference::Forward;
using reference::Gradients;
using reference::Problem;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// ---- A problem and the memory it looks at ---------------------------------------------------------------------------

struct Lengths {
  Index B = 1, H = 1, Hk = 1, Sq = 1, Sk = 1, D = 1, Dv = 1;
};

/// A Problem is made of views, so somebody must own the tensors. An option left out is a tensor that is not there.
struct Owned {
  Tensor<double, 4> query, key, value, doutput;
  std::optional<Tensor<bool, 4>> allowed{}, kept{};
  std::optional<Tensor<double, 4>> bias{};
  Problem options{.query = query, .key = key, .value = value};  // all but the masks, which problem() adds

  explicit Owned(const Lengths& n)
      : query({n.B, n.H, n.Sq, n.D}),
        key({n.B, n.Hk, n.Sk, n.D}),
        value({n.B, n.Hk, n.Sk, n.Dv}),
        doutput({n.B, n.H, n.Sq, n.Dv}) {}
  Owned(Owned&&) = default;  // moving a Tensor leaves its elements where they are, so the views stay good

  /// [B, H, Sq, Sk]
  Shape<4> pairs() const { return {query.size(0), query.size(1), query.size(2), key.size(2)}; }

  Problem problem() const {
    Problem problem = options;
    if (allowed) problem.allowed = broadcast(*allowed);
    if (bias) problem.bias = broadcast(*bias);
    if (kept) problem.kept = broadcast(*kept);
    return problem;
  }

  Forward forward() const { return reference::forward(problem()); }
  Gradients backward() const { return reference::backward(problem(), doutput.view()); }

  /// An axis of length 1 is repeated to the length that the pairs have there.
  template <typename T>
  View<const T, 4> broadcast(const Tensor<T, 4>& tensor) const {
    Shape<4> strides = tensor.view().strides();
    for (std::size_t axis = 0; axis < 4; ++axis)
      if (tensor.shape()[axis] != pairs()[axis]) strides[axis] = 0;
    return {tensor.data(), pairs(), strides};
  }
};

/// Multiples of 1/64 between -1.5 and 1.5, the same on every machine.
void fill(std::mt19937& random, Tensor<double, 4>& tensor) {
  for (Index n = 0; n < tensor.count(); ++n) tensor.data()[n] = static_cast<double>(random() % 193) / 64.0 - 1.5;
}

Tensor<double, 4> random_numbers(std::mt19937& random, const Shape<4>& shape) {
  Tensor<double, 4> tensor(shape);
  fill(random, tensor);
  return tensor;
}

Tensor<bool, 4> random_booleans(std::mt19937& random, const Shape<4>& shape, double true_share) {
  Tensor<bool, 4> tensor(shape);
  for (Index n = 0; n < tensor.count(); ++n) tensor.data()[n] = random() % 1000 < true_share * 1000;
  return tensor;
}

Owned random_problem(std::mt19937& random, const Lengths& lengths) {
  Owned owned(lengths);
  for (Tensor<double, 4>* tensor : {&owned.query, &owned.key, &owned.value, &owned.doutput}) fill(random, *tensor);
  return owned;
}

/// One problem for each option, and one with all of them. Sq != Sk, H != Hk, D != Dv wherever it can be.
struct Named {
  const char* name;
  Owned owned;
};

std::vector<Named> problems_with_each_option() {
  std::mt19937 random(20240229);
  std::vector<Named> problems;
  const auto add = [&](const char* name, const Lengths& lengths) -> Owned& {
    problems.push_back({name, random_problem(random, lengths)});
    return problems.back().owned;
  };
  add("plain", {.B = 2, .H = 2, .Hk = 2, .Sq = 3, .Sk = 4, .D = 3, .Dv = 2});
  add("scale", {.H = 1, .Hk = 1, .Sq = 3, .Sk = 4, .D = 3, .Dv = 2}).options.scale = -0.7;
  add("causal, fewer queries", {.H = 2, .Hk = 2, .Sq = 3, .Sk = 5, .D = 3, .Dv = 2}).options.causal = true;
  add("causal, empty rows", {.H = 2, .Hk = 2, .Sq = 5, .Sk = 3, .D = 3, .Dv = 2}).options.causal = true;
  add("soft-cap", {.H = 2, .Hk = 2, .Sq = 3, .Sk = 4, .D = 3, .Dv = 2}).options.softcap = 0.8;
  {
    Owned& owned = add("bias", {.H = 2, .Hk = 2, .Sq = 3, .Sk = 4, .D = 3, .Dv = 2});
    owned.bias = random_numbers(random, owned.pairs());
    (*owned.bias)(0, 0, 0, 2) = (*owned.bias)(0, 1, 2, 0) = -kInfinity;
  }
  {
    Owned& owned = add("mask", {.B = 2, .H = 2, .Hk = 2, .Sq = 4, .Sk = 4, .D = 3, .Dv = 2});
    owned.allowed = random_booleans(random, owned.pairs(), 0.5);
  }
  add("grouped heads", {.B = 2, .H = 6, .Hk = 2, .Sq = 2, .Sk = 3, .D = 2, .Dv = 3});
  {
    Owned& owned = add("dropout", {.H = 2, .Hk = 2, .Sq = 3, .Sk = 5, .D = 3, .Dv = 2});
    owned.options.dropout_probability = 0.4;
    owned.kept = random_booleans(random, owned.pairs(), 0.6);
  }
  {
    Owned& owned = add("window", {.H = 2, .Hk = 2, .Sq = 4, .Sk = 6, .D = 3, .Dv = 2});
    owned.options.window_left = 2;
    owned.options.window_right = 1;
  }
  {
    Owned& owned = add("everything", {.B = 2, .H = 4, .Hk = 2, .Sq = 5, .Sk = 4, .D = 3, .Dv = 2});
    owned.options.scale = 0.9;
    owned.options.causal = true;
    owned.options.window_left = 2;
    owned.options.softcap = 1.2;
    owned.options.dropout_probability = 0.25;
    owned.kept = random_booleans(random, owned.pairs(), 0.75);
    owned.bias = random_numbers(random, owned.pairs());
    owned.allowed = random_booleans(random, owned.pairs(), 0.8);
  }
  return problems;
}

// ---- Comparison -----------------------------------------------------------------------------------------------------

template <int Rank>
std::vector<double> elements(const Tensor<double, Rank>& tensor) {
  return {tensor.data(), tensor.data() + tensor.count()};
}

double largest_magnitude(const double* first, Index count) {
  double largest = 0.0;
  for (Index n = 0; n < count; ++n) largest = std::max(largest, std::abs(first[n]));
  return largest;
}

/// The worst error of any element, each divided by the largest magnitude that is wanted in its row (`row_length`
/// elements; 1 compares each element with itself), or by `floor` where the whole row is smaller than that. Equal
/// infinities agree; NaN is an infinite error.
double relative_error(const std::vector<double>& got, const std::vector<double>& want, Index row_length, double floor) {
  REQUIRE(got.size() == want.size());
  double worst = 0.0;
  for (std::size_t n = 0; n < got.size(); ++n) {
    if (got[n] == want[n]) continue;
    const std::size_t row = n - n % static_cast<std::size_t>(row_length);
    const double error = std::abs(got[n] - want[n]) / std::max(largest_magnitude(&want[row], row_length), floor);
    worst = std::max(worst, std::isfinite(error) ? error : kInfinity);
  }
  return worst;
}

/// Rows of a gradient are sums of terms that may cancel, so a row counts as no smaller than 1/1000 of its tensor. The
/// inputs are of order 1: below 1e-6 a whole tensor is rounding noise.
double gradient_error(const std::vector<double>& got, const std::vector<double>& want, Index row_length) {
  const double largest = largest_magnitude(want.data(), static_cast<Index>(want.size()));
  return relative_error(got, want, row_length, std::max(1e-3 * largest, 1e-6));
}

/// Bit for bit: NaN equals NaN, and 0 does not equal -0.
template <int Rank>
bool identical(const Tensor<double, Rank>& a, const Tensor<double, Rank>& b) {
  if (a.shape() != b.shape()) return false;
  return a.count() == 0 || std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.count()) * sizeof(double)) == 0;
}

bool identical(const Forward& a, const Forward& b) {
  return identical(a.output, b.output) && identical(a.weights, b.weights) && identical(a.lse, b.lse);
}

bool identical(const Gradients& a, const Gradients& b) {
  return identical(a.query, b.query) && identical(a.key, b.key) && identical(a.value, b.value);
}

// ---- PyTorch's vectors ----------------------------------------------------------------------------------------------

json read_cases() {
  const std::string path = std::string(KATA_GOLDEN_DIR) + "/attention.json";
  std::ifstream file(path);
  REQUIRE_MESSAGE(file.good(), path << " cannot be read: tests/golden/README.md says how to make it");
  return json::parse(file).at("cases");
}

double number(const json& entry) {
  if (entry.is_string()) return entry == "-inf" ? -kInfinity : kNaN;
  return entry.get<double>();
}

std::vector<double> numbers(const json& entries) {
  std::vector<double> result;
  for (const json& entry : entries) result.push_back(number(entry));
  return result;
}

void read_into(Tensor<double, 4>& tensor, const json& entries) {
  REQUIRE(tensor.count() == static_cast<Index>(entries.size()));
  std::transform(entries.begin(), entries.end(), tensor.data(), number);
}

Tensor<bool, 4> read_booleans(const json& entry) {
  Tensor<bool, 4> tensor(entry.at("shape").get<Shape<4>>());
  const std::string marks = entry.at("data");
  REQUIRE(tensor.count() == static_cast<Index>(marks.size()));
  std::transform(marks.begin(), marks.end(), tensor.data(), [](char mark) { return mark == '1'; });
  return tensor;
}

Owned read_problem(const json& entry) {
  const auto length = [&](const char* axis) { return entry.at(axis).get<Index>(); };
  Owned owned({.B = length("B"),
               .H = length("H"),
               .Hk = length("Hk"),
               .Sq = length("Sq"),
               .Sk = length("Sk"),
               .D = length("D"),
               .Dv = length("Dv")});
  read_into(owned.query, entry.at("query"));
  read_into(owned.key, entry.at("key"));
  read_into(owned.value, entry.at("value"));
  read_into(owned.doutput, entry.at("doutput"));
  if (entry.contains("scale")) owned.options.scale = entry["scale"].get<double>();
  if (entry.contains("window_left")) owned.options.window_left = entry["window_left"].get<Index>();
  if (entry.contains("window_right")) owned.options.window_right = entry["window_right"].get<Index>();
  owned.options.causal = entry.value("causal", false);
  owned.options.softcap = entry.value("softcap", 0.0);
  owned.options.dropout_probability = entry.value("dropout_probability", 0.0);
  if (entry.contains("allowed")) owned.allowed = read_booleans(entry["allowed"]);
  if (entry.contains("kept")) owned.kept = read_booleans(entry["kept"]);
  if (entry.contains("bias")) {
    owned.bias = Tensor<double, 4>(entry["bias"].at("shape").get<Shape<4>>());
    read_into(*owned.bias, entry["bias"].at("data"));
  }
  return owned;
}

TEST_CASE("reference: forward and gradients are PyTorch's") {
  constexpr double kForwardBound = 1e-12;
  constexpr double kGradientBound = 1e-10;
  const std::set<std::string> wanted_families = {"plain",
                                                 "ragged",
                                                 "Dv != D",
                                                 "scale",
                                                 "D = 1",
                                                 "1x1",
                                                 "causal square",
                                                 "causal Sq < Sk",
                                                 "causal Sq > Sk",
                                                 "boolean mask",
                                                 "fully masked rows",
                                                 "additive",
                                                 "additive -inf",
                                                 "boolean + causal",
                                                 "padding",
                                                 "batch item masked",
                                                 "GQA",
                                                 "MQA",
                                                 "window left",
                                                 "window right",
                                                 "window both",
                                                 "window + causal",
                                                 "soft-cap",
                                                 "soft-cap + causal",
                                                 "soft-cap + masks",
                                                 "dropout",
                                                 "dropout + mask + GQA",
                                                 "large scores",
                                                 "zero length",
                                                 "everything"};
  std::set<std::string> families;
  std::map<std::string, double> worst;  // by tensor
  const json cases = read_cases();
  for (const json& entry : cases) {
    const std::string name = entry.at("name");
    const std::string family = entry.at("family");
    INFO("family \"", family, "\", case \"", name, "\"");
    families.insert(family);

    const Owned owned = read_problem(entry);
    const Forward forward = owned.forward();
    const Gradients gradients = owned.backward();
    const Index D = owned.query.size(3);
    const Index Dv = owned.value.size(3);
    const auto want = [&](const char* tensor) { return numbers(entry.at(tensor)); };

    // A weight is compared with itself, however small. An lse is a logarithm: below 1 its absolute error counts.
    const std::map<std::string, double> forward_errors = {
        {"output", relative_error(elements(forward.output), want("output"), std::max<Index>(Dv, 1), 1e-3)},
        {"weights", relative_error(elements(forward.weights), want("weights"), 1, 1e-300)},
        {"lse", relative_error(elements(forward.lse), want("lse"), 1, 1.0)}};
    const std::map<std::string, double> gradient_errors = {
        {"dquery", gradient_error(elements(gradients.query), want("dquery"), D)},
        {"dkey", gradient_error(elements(gradients.key), want("dkey"), D)},
        {"dvalue", gradient_error(elements(gradients.value), want("dvalue"), std::max<Index>(Dv, 1))}};
    const auto judge = [&](const std::map<std::string, double>& errors, double bound) {
      for (const auto& measured : errors) {
        const std::string& tensor = measured.first;
        const double error = measured.second;
        CHECK_MESSAGE(error <= bound, tensor << ": relative error " << error);
        worst[tensor] = std::max(worst[tensor], error);
      }
    };
    judge(forward_errors, kForwardBound);
    judge(gradient_errors, kGradientBound);
  }
  CHECK(cases.size() >= 60);
  CHECK(families == wanted_families);
  MESSAGE(cases.size() << " cases in " << families.size() << " families; worst relative errors: output "
                       << worst["output"] << ", weights " << worst["weights"] << ", lse " << worst["lse"]
                       << " (bound 1e-12); dquery " << worst["dquery"] << ", dkey " << worst["dkey"] << ", dvalue "
                       << worst["dvalue"] << " (bound 1e-10)");
}

// ---- Gradients without PyTorch --------------------------------------------------------------------------------------

/// sum(doutput * output)
double loss(const Owned& owned) {
  const Forward forward = owned.forward();
  double sum = 0.0;
  for (Index n = 0; n < forward.output.count(); ++n) sum += owned.doutput.data()[n] * forward.output.data()[n];
  return sum;
}

/// d loss / d tensor by central differences of fourth order.
std::vector<double> finite_differences(const Owned& owned, Tensor<double, 4>& tensor) {
  constexpr double kStep = 1e-3;  // truncation kStep^4, rounding 1e-16 / kStep: both near 1e-13
  std::vector<double> gradient;
  for (Index n = 0; n < tensor.count(); ++n) {
    const double x = tensor.data()[n];
    const auto loss_at = [&](double moved) {
      tensor.data()[n] = moved;
      return loss(owned);
    };
    gradient.push_back(
        (8 * (loss_at(x + kStep) - loss_at(x - kStep)) - (loss_at(x + 2 * kStep) - loss_at(x - 2 * kStep))) /
        (12 * kStep));
    tensor.data()[n] = x;
  }
  return gradient;
}

TEST_CASE("reference: gradients are what finite differences measure") {
  double worst = 0.0;
  for (Named& named : problems_with_each_option()) {
    INFO(named.name);
    Owned& owned = named.owned;
    const Gradients gradients = owned.backward();
    const Index D = owned.query.size(3);
    const Index Dv = owned.value.size(3);
    for (const double error : {gradient_error(elements(gradients.query), finite_differences(owned, owned.query), D),
                               gradient_error(elements(gradients.key), finite_differences(owned, owned.key), D),
                               gradient_error(elements(gradients.value), finite_differences(owned, owned.value), Dv)}) {
      CHECK(error <= 1e-8);
      worst = std::max(worst, error);
    }
  }
  MESSAGE("worst relative error against finite differences: " << worst << " (bound 1e-8)");
}

TEST_CASE("reference: identities of the gradients") {
  for (Named& named : problems_with_each_option()) {
    INFO(named.name);
    Owned& owned = named.owned;
    const Forward forward = owned.forward();
    const Gradients gradients = owned.backward();
    const auto inner = [](const Tensor<double, 4>& a, const Tensor<double, 4>& b) {
      double sum = 0.0;
      for (Index n = 0; n < a.count(); ++n) sum += a.data()[n] * b.data()[n];
      return sum;
    };

    // Both are sum_ij dS_ij scale q_i . k_j.
    CHECK(inner(gradients.query, owned.query) == doctest::Approx(inner(gradients.key, owned.key)).epsilon(1e-12));

    // sum_j dS_ij = 0: a shift of all keys by one vector moves a row of scores as one, which softmax does not see. (A
    // soft-cap does.)
    if (owned.options.softcap == 0) {
      Owned& shifted = owned;
      const std::vector<double> shift = {0.5, -1.25, 2.0};
      const Index D = owned.key.size(3);
      for (Index n = 0; n < owned.key.count(); ++n) shifted.key.data()[n] += shift[static_cast<std::size_t>(n % D)];
      CHECK(relative_error(elements(shifted.forward().output), elements(forward.output), 1, 1.0) <= 1e-12);
      CHECK(relative_error(elements(shifted.backward().query), elements(gradients.query), 1, 1.0) <= 1e-12);
    }

    // Weights of a query sum to 1, so what goes into its dO comes out of dV. (Dropout takes some away.)
    if (!owned.kept) {
      for (Index column = 0; column < owned.value.size(3); ++column) {
        double into_values = 0.0;
        for (Index n = column; n < gradients.value.count(); n += owned.value.size(3))
          into_values += gradients.value.data()[n];
        double out_of_queries = 0.0;
        for (Index row = 0; row < forward.lse.count(); ++row)
          if (forward.lse.data()[row] != -kInfinity)
            out_of_queries += owned.doutput.data()[row * owned.value.size(3) + column];
        CHECK(into_values == doctest::Approx(out_of_queries).epsilon(1e-12));
      }
    }
  }
}

// ---- What must hold exactly -----------------------------------------------------------------------------------------

/// Every option that forbids, each leaving some key of each head without any query.
std::vector<Named> problems_with_forbidden_keys() {
  std::mt19937 random(7);
  std::vector<Named> problems;
  const Lengths lengths = {.B = 2, .H = 4, .Hk = 2, .Sq = 3, .Sk = 6, .D = 3, .Dv = 2};
  const auto add = [&](const char* name, const Lengths& n) -> Owned& {
    problems.push_back({name, random_problem(random, n)});
    return problems.back().owned;
  };
  {
    Owned& owned = add("allowed", lengths);
    owned.allowed = random_booleans(random, {2, 1, 1, 6}, 0.5);  // the same for all heads and queries
    for (const Index b : {0, 1}) (*owned.allowed)(b, 0, 0, 4) = false;
  }
  {
    Owned& owned = add("bias -inf", lengths);
    owned.bias = random_numbers(random, owned.pairs());
    for (Index row = 0; row < 2 * 4 * 3; ++row) owned.bias->data()[row * 6 + 1] = -kInfinity;
  }
  {
    Owned& owned = add("causal, window left", lengths);
    owned.options.causal = true;
    owned.options.window_left = 1;
  }
  {
    Lengths longer = lengths;
    longer.Sq = 2;
    Owned& owned = add("window left 0, right 0, soft-cap, dropout", longer);
    owned.options.window_left = 0;
    owned.options.window_right = 0;
    owned.options.softcap = 2.0;
    owned.options.dropout_probability = 0.5;
    owned.kept = random_booleans(random, owned.pairs(), 0.5);
  }
  {
    Owned& owned = add("nothing allowed", lengths);
    owned.allowed = random_booleans(random, {1, 1, 1, 1}, 0.0);
  }
  return problems;
}

TEST_CASE("reference: what a forbidden key holds reaches nothing") {
  for (Named& named : problems_with_forbidden_keys()) {
    Owned& owned = named.owned;
    const Forward clean_forward = owned.forward();
    const Gradients clean_gradients = owned.backward();
    for (const double poison : {kNaN, kInfinity, -kInfinity, 1e308}) {
      INFO(named.name, ", forbidden keys hold ", poison);
      int forbidden = 0;
      for (Index b = 0; b < owned.key.size(0); ++b)
        for (Index hk = 0; hk < owned.key.size(1); ++hk)
          for (Index j = 0; j < owned.key.size(2); ++j) {
            double weight = 0.0;
            for (const Index h : {2 * hk, 2 * hk + 1})
              for (Index i = 0; i < owned.query.size(2); ++i) weight += clean_forward.weights(b, h, i, j);
            if (weight > 0) continue;
            ++forbidden;
            for (Index d = 0; d < owned.key.size(3); ++d) {
              CHECK(clean_gradients.key(b, hk, j, d) == 0.0);
              owned.key(b, hk, j, d) = poison;
            }
            for (Index d = 0; d < owned.value.size(3); ++d) {
              CHECK(clean_gradients.value(b, hk, j, d) == 0.0);
              owned.value(b, hk, j, d) = poison;
            }
          }
      CHECK(forbidden >= 4);  // one for each batch item and key head at least
      CHECK(identical(owned.forward(), clean_forward));
      CHECK(identical(owned.backward(), clean_gradients));
    }
  }
}

TEST_CASE("reference: a key that only some queries may see is kept from the others") {
  std::mt19937 random(11);
  Owned owned = random_problem(random, {.H = 1, .Hk = 1, .Sq = 4, .Sk = 4, .D = 3, .Dv = 2});
  owned.options.causal = true;
  const Forward clean = owned.forward();
  const Gradients clean_gradients = owned.backward();
  for (Index d = 0; d < 3; ++d) owned.key(0, 0, 2, d) = kNaN;
  for (Index d = 0; d < 2; ++d) owned.value(0, 0, 2, d) = kNaN;
  const Forward poisoned = owned.forward();
  const Gradients poisoned_gradients = owned.backward();
  for (const Index i : {0, 1, 2, 3}) {
    const bool sees_it = i >= 2;
    CHECK(std::isnan(poisoned.output(0, 0, i, 0)) == sees_it);
    CHECK(std::isnan(poisoned_gradients.query(0, 0, i, 0)) == sees_it);
    if (sees_it) continue;
    CHECK(poisoned.output(0, 0, i, 0) == clean.output(0, 0, i, 0));
    CHECK(poisoned.lse(0, 0, i) == clean.lse(0, 0, i));
    CHECK(poisoned_gradients.query(0, 0, i, 0) == clean_gradients.query(0, 0, i, 0));
  }
}

TEST_CASE("reference: a query that may attend to nothing") {
  std::mt19937 random(13);
  Owned owned = random_problem(random, {.H = 2, .Hk = 1, .Sq = 5, .Sk = 3, .D = 3, .Dv = 2});
  owned.options.causal = true;  // queries 0 and 1 see nothing
  for (const Index h : {0, 1})
    for (const Index i : {0, 1}) owned.query(0, h, i, 0) = owned.doutput(0, h, i, 0) = kNaN;  // and are seen by nothing
  const Forward forward = owned.forward();
  const Gradients gradients = owned.backward();
  for (const Index h : {0, 1})
    for (Index i = 0; i < 5; ++i) {
      const bool empty = i < 2;
      CHECK((forward.lse(0, h, i) == -kInfinity) == empty);
      double weights = 0.0;
      for (Index j = 0; j < 3; ++j) weights += forward.weights(0, h, i, j);
      CHECK(weights == doctest::Approx(empty ? 0.0 : 1.0).epsilon(1e-14));
      for (Index d = 0; d < 2; ++d) CHECK((forward.output(0, h, i, d) == 0.0) == empty);
      for (Index d = 0; d < 3; ++d) CHECK(std::isfinite(gradients.query(0, h, i, d)));
      for (Index d = 0; empty && d < 3; ++d) CHECK(gradients.query(0, h, i, d) == 0.0);
    }
  for (const double x : elements(gradients.key)) CHECK(std::isfinite(x));
  for (const double x : elements(gradients.value)) CHECK(std::isfinite(x));
}

TEST_CASE("reference: strides, not neighbourhood, say where an element lies") {
  std::mt19937 random(17);
  const Owned packed = random_problem(random, {.B = 2, .H = 2, .Hk = 2, .Sq = 3, .Sk = 3, .D = 2, .Dv = 2});
  // The same numbers in the model's layout, [B, S, H, D], with a gap of NaN after each head.
  const auto model_layout = [](const Tensor<double, 4>& tensor) {
    const auto [B, H, S, D] = tensor.shape();
    Tensor<double, 4> moved({B, S, H, D + 1});
    for (Index b = 0; b < B; ++b)
      for (Index h = 0; h < H; ++h)
        for (Index s = 0; s < S; ++s)
          for (Index d = 0; d < D; ++d) moved(b, s, h, d) = tensor(b, h, s, d);
    return moved;
  };
  const auto view = [](const Tensor<double, 4>& moved) {
    const auto [B, S, H, padded] = moved.shape();
    const Shape<4> strides = moved.view().strides();
    return View<const double, 4>(moved.data(), {B, H, S, padded - 1}, {strides[0], strides[2], strides[1], 1});
  };
  const Tensor<double, 4> query = model_layout(packed.query);
  const Tensor<double, 4> key = model_layout(packed.key);
  const Tensor<double, 4> value = model_layout(packed.value);
  const Tensor<double, 4> doutput = model_layout(packed.doutput);
  const Problem strided{.query = view(query), .key = view(key), .value = view(value)};
  CHECK(identical(reference::forward(strided), packed.forward()));
  CHECK(identical(reference::backward(strided, view(doutput)), packed.backward()));
}

TEST_CASE("reference: lengths of zero") {
  SUBCASE("queries of width 0 weigh all keys alike, once a scale is given") {
    Owned owned({.Sq = 2, .Sk = 4, .D = 0, .Dv = 1});
    owned.options.scale = 1.0;
    for (Index j = 0; j < 4; ++j) owned.value(0, 0, j, 0) = static_cast<double>(j);
    for (Index i = 0; i < 2; ++i) owned.doutput(0, 0, i, 0) = 1.0;
    CHECK(owned.forward().output(0, 0, 0, 0) == 1.5);
    CHECK(owned.forward().lse(0, 0, 1) == doctest::Approx(std::log(4.0)).epsilon(1e-15));
    CHECK(owned.backward().value(0, 0, 3, 0) == 0.5);
  }
  SUBCASE("no heads") {
    const Owned owned({.H = 0, .Hk = 1, .Sq = 2, .Sk = 2, .D = 2, .Dv = 2});
    CHECK(owned.forward().output.count() == 0);
  }
  SUBCASE("no queries: dK and dV are 0") {
    std::mt19937 random(19);
    const Owned owned = random_problem(random, {.Sq = 0, .Sk = 2, .D = 2, .Dv = 2});
    for (const double x : elements(owned.backward().key)) CHECK(x == 0.0);
    for (const double x : elements(owned.backward().value)) CHECK(x == 0.0);
  }
  SUBCASE("no keys: O is 0, lse is -inf, dQ is 0") {
    std::mt19937 random(23);
    const Owned owned = random_problem(random, {.Sq = 2, .Sk = 0, .D = 2, .Dv = 2});
    for (const double x : elements(owned.forward().output)) CHECK(x == 0.0);
    for (const double x : elements(owned.forward().lse)) CHECK(x == -kInfinity);
    for (const double x : elements(owned.backward().query)) CHECK(x == 0.0);
  }
}

TEST_CASE("reference: a window as wide as an Index can say is no window") {
  std::mt19937 random(29);
  Owned owned = random_problem(random, {.Sq = 4, .Sk = 2, .D = 2, .Dv = 2});
  const Forward open = owned.forward();
  owned.options.window_left = owned.options.window_right = std::numeric_limits<Index>::max();
  CHECK(identical(owned.forward(), open));
}

TEST_CASE("reference: a bad argument is named, with its value and what is allowed") {
  const Lengths lengths = {.B = 2, .H = 4, .Hk = 2, .Sq = 3, .Sk = 5, .D = 6, .Dv = 7};
  const Owned good(lengths);
  const auto expect = [&](const std::string& message, const std::function<void(Problem&)>& spoil) {
    Problem problem = good.problem();
    spoil(problem);
    CHECK_THROWS_WITH_AS(reference::forward(problem), message.c_str(), std::invalid_argument);
    CHECK_THROWS_WITH_AS(reference::backward(problem, good.doutput.view()), message.c_str(), std::invalid_argument);
  };
  static const double no_numbers[1] = {};
  static const bool no_booleans[1] = {};
  const auto shaped = [](const Shape<4>& shape) { return View<const double, 4>(no_numbers, shape); };
  const auto mask = [](const Shape<4>& shape) { return View<const bool, 4>(no_booleans, shape); };

  expect("key: got [3, 2, 5, 6], allowed is [B, Hk, Sk, D] = [2, 2, 5, 6]", [&](Problem& p) {
    p.key = shaped({3, 2, 5, 6});
  });
  expect("key: got [2, 2, 5, 8], allowed is [B, Hk, Sk, D] = [2, 2, 5, 6]", [&](Problem& p) {
    p.key = shaped({2, 2, 5, 8});
  });
  expect("value: got [2, 4, 5, 7], allowed is [B, Hk, Sk, Dv] = [2, 2, 5, 7]", [&](Problem& p) {
    p.value = shaped({2, 4, 5, 7});
  });
  expect("value: got [2, 2, 4, 7], allowed is [B, Hk, Sk, Dv] = [2, 2, 5, 7]", [&](Problem& p) {
    p.value = shaped({2, 2, 4, 7});
  });
  expect("key heads: got 0, allowed is 1 or more", [&](Problem& p) {
    p.key = shaped({2, 0, 5, 6});
    p.value = shaped({2, 0, 5, 7});
  });
  expect("query heads: got 4, allowed is a multiple of the key heads, 3", [&](Problem& p) {
    p.key = shaped({2, 3, 5, 6});
    p.value = shaped({2, 3, 5, 7});
  });
  expect("query: got [2, 4, 3, 0], allowed is a width D of 1 or more, or a given scale", [&](Problem& p) {
    p.query = shaped({2, 4, 3, 0});
    p.key = shaped({2, 2, 5, 0});
  });
  expect("scale: got nan, allowed is a finite number", [](Problem& p) { p.scale = kNaN; });
  expect("scale: got -inf, allowed is a finite number", [](Problem& p) { p.scale = -kInfinity; });
  expect("window_left: got -1, allowed is 0 or more", [](Problem& p) { p.window_left = -1; });
  expect("window_right: got -2, allowed is 0 or more", [](Problem& p) { p.window_right = -2; });
  expect("softcap: got -0.5, allowed is 0 (none) or a finite cap", [](Problem& p) { p.softcap = -0.5; });
  expect("softcap: got nan, allowed is 0 (none) or a finite cap", [](Problem& p) { p.softcap = kNaN; });
  expect("softcap: got inf, allowed is 0 (none) or a finite cap", [](Problem& p) { p.softcap = kInfinity; });
  const auto all_kept = mask({2, 4, 3, 5});
  expect("dropout_probability: got 1, allowed is at least 0 and less than 1", [&](Problem& p) {
    p.kept = all_kept;
    p.dropout_probability = 1.0;
  });
  expect("dropout_probability: got -0.1, allowed is at least 0 and less than 1", [&](Problem& p) {
    p.kept = all_kept;
    p.dropout_probability = -0.1;
  });
  expect("dropout_probability: got nan, allowed is at least 0 and less than 1", [&](Problem& p) {
    p.kept = all_kept;
    p.dropout_probability = kNaN;
  });
  expect("dropout_probability: got 0.5, allowed is 0 unless kept says which weights survive",
         [](Problem& p) { p.dropout_probability = 0.5; });
  expect("allowed: got [2, 4, 5, 3], allowed is [B, H, Sq, Sk] = [2, 4, 3, 5]", [&](Problem& p) {
    p.allowed = mask({2, 4, 5, 3});
  });
  expect("bias: got [2, 2, 3, 5], allowed is [B, H, Sq, Sk] = [2, 4, 3, 5]", [&](Problem& p) {
    p.bias = shaped({2, 2, 3, 5});
  });
  expect("kept: got [1, 1, 1, 1], allowed is [B, H, Sq, Sk] = [2, 4, 3, 5]", [&](Problem& p) {
    p.kept = mask({1, 1, 1, 1});
  });

  CHECK_THROWS_WITH_AS(reference::backward(good.problem(), shaped({2, 4, 3, 6})),
                       "doutput: got [2, 4, 3, 6], allowed is [B, H, Sq, Dv] = [2, 4, 3, 7]", std::invalid_argument);
}

}  // namespace
