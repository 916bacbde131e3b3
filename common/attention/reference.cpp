// Three formulas and the rules of visibility, written so that they can be checked by eye. Speed is no aim here, beyond
// a thread for each head of keys: each query walks all keys and skips those it may not see, so that nothing a forbidden
// key holds is ever multiplied.
#include "common/attention/reference.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/attention/parallel.hpp"

namespace flashkata::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct ScoredKey {
  Index j;
  double score;
};

struct Sizes {
  Index B, H, Hk, Sq, Sk, D, Dv;
};

Sizes sizes_of(const Problem& problem) {
  return {.B = problem.query.size(0),
          .H = problem.query.size(1),
          .Hk = problem.key.size(1),
          .Sq = problem.query.size(2),
          .Sk = problem.key.size(2),
          .D = problem.query.size(3),
          .Dv = problem.value.size(3)};
}

double scale_of(const Problem& problem) {
  return problem.scale.value_or(1.0 / std::sqrt(static_cast<double>(problem.query.size(3))));
}

template <typename T>
void require_shape(std::string_view argument, const View<T, 4>& view, std::string_view axes, const Shape<4>& wanted) {
  require(view.shape() == wanted, argument, to_text(view.shape()), std::string(axes) + " = " + to_text(wanted));
}

void check(const Problem& problem) {
  const auto [B, H, Hk, Sq, Sk, D, Dv] = sizes_of(problem);
  const Shape<4> pairs = {B, H, Sq, Sk};

  require_shape("key", problem.key, "[B, Hk, Sk, D]", {B, Hk, Sk, D});
  require_shape("value", problem.value, "[B, Hk, Sk, Dv]", {B, Hk, Sk, Dv});
  require(Hk > 0, "key heads", Hk, "1 or more");
  require(H % Hk == 0, "query heads", H, "a multiple of the key heads, " + std::to_string(Hk));

  require(problem.scale || D > 0, "query", to_text(problem.query.shape()), "a width D of 1 or more, or a given scale");
  require(std::isfinite(scale_of(problem)), "scale", scale_of(problem), "a finite number");
  require(problem.window_left.value_or(0) >= 0, "window_left", problem.window_left.value_or(0), "0 or more");
  require(problem.window_right.value_or(0) >= 0, "window_right", problem.window_right.value_or(0), "0 or more");
  require(problem.softcap >= 0 && problem.softcap < kInfinity, "softcap", problem.softcap, "0 (none) or a finite cap");

  const double p = problem.dropout_probability;
  require(p >= 0 && p < 1, "dropout_probability", p, "at least 0 and less than 1");
  require(p == 0 || problem.kept, "dropout_probability", p, "0 unless kept says which weights survive");

  if (problem.allowed) require_shape("allowed", *problem.allowed, "[B, H, Sq, Sk]", pairs);
  if (problem.bias) require_shape("bias", *problem.bias, "[B, H, Sq, Sk]", pairs);
  if (problem.kept) require_shape("kept", *problem.kept, "[B, H, Sq, Sk]", pairs);
}

/// May query i of head h attend to key j?
bool visible(const Problem& problem, Index b, Index h, Index i, Index j) {
  const Index diagonal = i + problem.key.size(2) - problem.query.size(2);  // the last query sits at the last key
  if (problem.causal && j > diagonal) return false;
  if (problem.window_left && diagonal - j > *problem.window_left) return false;
  if (problem.window_right && j - diagonal > *problem.window_right) return false;
  if (problem.allowed && !(*problem.allowed)(b, h, i, j)) return false;
  if (problem.bias && (*problem.bias)(b, h, i, j) == -kInfinity) return false;
  return true;
}

/// The key/value head that query head h reads: neighbours share one.
Index kv_head(const Problem& problem, Index h) {
  const Index group = problem.query.size(1) / problem.key.size(1);
  return h / group;
}

double dot(const View<const double, 1>& a, const View<const double, 1>& b) {
  double sum = 0.0;
  for (Index d = 0; d < a.size(0); ++d) sum += a(d) * b(d);
  return sum;
}

/// target += factor * source
void add(const View<double, 1>& target, double factor, const View<const double, 1>& source) {
  for (Index d = 0; d < target.size(0); ++d) target(d) += factor * source(d);
}

/// scale q_i . k_j
double scaled_product(const Problem& problem, Index b, Index h, Index i, Index j) {
  return scale_of(problem) * dot(problem.query[b][h][i], problem.key[b][kv_head(problem, h)][j]);
}

/// What softmax sees: the scaled product, capped, plus the bias.
double score(const Problem& problem, Index b, Index h, Index i, Index j) {
  double score = scaled_product(problem, b, h, i, j);
  if (problem.softcap > 0) score = problem.softcap * std::tanh(score / problem.softcap);
  if (problem.bias) score += (*problem.bias)(b, h, i, j);
  return score;
}

/// d score / d scaled product: (c tanh(x / c))' = 1 - tanh(x / c)^2
double score_slope(const Problem& problem, Index b, Index h, Index i, Index j) {
  if (problem.softcap == 0) return 1.0;
  const double t = std::tanh(scaled_product(problem, b, h, i, j) / problem.softcap);
  return 1.0 - t * t;
}

/// What dropout multiplies a weight by.
double dropout_factor(const Problem& problem, Index b, Index h, Index i, Index j) {
  if (!problem.kept) return 1.0;
  return (*problem.kept)(b, h, i, j) ? 1.0 / (1.0 - problem.dropout_probability) : 0.0;
}

/// Calls body(b, h) for every query head. Heads that share keys and values follow each other on one thread: what they
/// add up, they add up in the same order on any machine.
template <typename Body>
void each_head(const Problem& problem, const Body& body) {
  const auto [B, H, Hk, Sq, Sk, D, Dv] = sizes_of(problem);
  const Index group = H / Hk;
  const bool worth_a_thread = Sq * Sk * (D + Dv) * group > 1'000'000;
  parallel_for(B * Hk, worth_a_thread ? 0 : 1, [&, Hk = Hk](Index n) {
    for (Index h = n % Hk * group; h < (n % Hk + 1) * group; ++h) body(n / Hk, h);
  });
}

template <int Rank>
Tensor<double, Rank> zeros(const Shape<Rank>& shape) {
  Tensor<double, Rank> tensor(shape);
  std::fill_n(tensor.data(), tensor.count(), 0.0);
  return tensor;
}

}  // namespace

Forward forward(const Problem& problem) {
  check(problem);
  const auto [B, H, Hk, Sq, Sk, D, Dv] = sizes_of(problem);
  Forward result{.output = zeros<4>({B, H, Sq, Dv}), .weights = zeros<4>({B, H, Sq, Sk}), .lse = zeros<3>({B, H, Sq})};

  each_head(problem, [&, Sq = Sq, Sk = Sk](Index b, Index h) {
    for (Index i = 0; i < Sq; ++i) {
      std::vector<ScoredKey> keys;
      for (Index j = 0; j < Sk; ++j)
        if (visible(problem, b, h, i, j)) keys.push_back({j, score(problem, b, h, i, j)});

      // exp(score - largest) cannot overflow. Without keys: largest = log(0) = -inf, and all sums are empty.
      double largest = -kInfinity;
      for (const auto& [j, score] : keys) largest = std::max(largest, score);
      double sum = 0.0;
      for (const auto& [j, score] : keys) sum += std::exp(score - largest);
      result.lse(b, h, i) = largest + std::log(sum);

      const View<double, 1> output = result.output.view()[b][h][i];
      for (const auto& [j, score] : keys) {
        const double weight = std::exp(score - largest) / sum;
        result.weights(b, h, i, j) = weight;
        add(output, weight * dropout_factor(problem, b, h, i, j), problem.value[b][kv_head(problem, h)][j]);
      }
    }
  });
  return result;
}

Gradients backward(const Problem& problem, View<const double, 4> doutput) {
  check(problem);
  const auto [B, H, Hk, Sq, Sk, D, Dv] = sizes_of(problem);
  require_shape("doutput", doutput, "[B, H, Sq, Dv]", {B, H, Sq, Dv});
  const Forward result = forward(problem);
  Gradients gradients{
      .query = zeros<4>({B, H, Sq, D}), .key = zeros<4>({B, Hk, Sk, D}), .value = zeros<4>({B, Hk, Sk, Dv})};

  each_head(problem, [&, Sq = Sq, Sk = Sk](Index b, Index h) {
    for (Index i = 0; i < Sq; ++i) {
      const Index hk = kv_head(problem, h);
      const View<const double, 1> dout = doutput[b][h][i];
      const double delta = dot(dout, result.output.view()[b][h][i]);  // rowsum(dO * O) = sum_j weight_j dweight_j

      for (Index j = 0; j < Sk; ++j) {
        if (!visible(problem, b, h, i, j)) continue;
        const double weight = result.weights(b, h, i, j);
        const double factor = dropout_factor(problem, b, h, i, j);
        const double dweight = factor * dot(dout, problem.value[b][hk][j]);
        const double dscore = weight * (dweight - delta);
        const double dproduct = dscore * score_slope(problem, b, h, i, j) * scale_of(problem);

        add(gradients.value.view()[b][hk][j], weight * factor, dout);
        add(gradients.query.view()[b][h][i], dproduct, problem.key[b][hk][j]);
        add(gradients.key.view()[b][hk][j], dproduct, problem.query[b][h][i]);
      }
    }
  });
  return gradients;
}

}  // namespace flashkata::reference
