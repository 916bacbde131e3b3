// What phase 4 asks the float64 reference: attention whose key/value heads are fewer than those of the queries, with
// whatever a step adds to it, and how exact an answer in fp32, fp16 or bf16 must be.
#pragma once

#include <functional>
#include <string>

#include "phase2_forward/kernel_suite.hpp"
#include "phase3_backward/kernel_suite.hpp"

namespace flashkata::testing {

// ---- Inputs ---------------------------------------------------------------------------------------------------------

struct Sizes {
  Index batch = 1, heads = 1, kv_heads = 1, queries = 1, keys = 1, width = 16;
};

struct Inputs {
  Tensor<float, 4> query;     // [B, H, Sq, D]
  Tensor<float, 4> key;       // [B, Hk, Sk, D]
  Tensor<float, 4> value;     // [B, Hk, Sk, D]
  Tensor<float, 4> d_output;  // [B, H, Sq, D]

  /// "B=2 H=6 Hk=2 Sq=21 Sk=37 D=16", beside what was found.
  std::string text() const {
    const auto part = [](const char* name, Index size) { return name + std::to_string(size); };
    return part("B=", query.size(0)) + part(" H=", query.size(1)) + part(" Hk=", key.size(1)) +
           part(" Sq=", query.size(2)) + part(" Sk=", key.size(2)) + part(" D=", query.size(3));
  }
};

/// Every number by its place: `noise(seed)`, `everywhere(0)` (phase 2), or a lambda of (b, h, s, d).
template <typename T>
Inputs filled_inputs(const Sizes& s, const Fill& query, const Fill& key, const Fill& value, const Fill& d_output) {
  return {made<T>({s.batch, s.heads, s.queries, s.width}, query), made<T>({s.batch, s.kv_heads, s.keys, s.width}, key),
          made<T>({s.batch, s.kv_heads, s.keys, s.width}, value),
          made<T>({s.batch, s.heads, s.queries, s.width}, d_output)};
}

/// Between -2 and 2; scores of order 1.
template <typename T>
Inputs random_inputs(const Sizes& sizes, unsigned seed) {
  return filled_inputs<T>(sizes, noise(4 * seed), noise(4 * seed + 1), noise(4 * seed + 2), noise(4 * seed + 3));
}

/// To change a number or two of what is used elsewhere as it was.
inline Inputs copy_of(const Inputs& in) {
  const auto copy = [](const Tensor<float, 4>& from) {
    Tensor<float, 4> to(from.shape());
    std::copy_n(from.data(), from.count(), to.data());
    return to;
  };
  return {copy(in.query), copy(in.key), copy(in.value), copy(in.d_output)};
}

struct CallOptions {
  bool causal = false;
  std::optional<float> scale = {};
  Layouts layouts = {};        // of the inputs; dO and the gradients lie as another tensor does
  bool deterministic = false;  // of a backward pass
  bool judge = true;           // whether what a call does to memory that is not its own is a finding; not in Recognise
};

// ---- What the float64 reference expects -----------------------------------------------------------------------------

/// What is to be told to the reference beyond CallOptions: allowed, window_left, kept, softcap, ...
using Change = std::function<void(reference::Problem&)>;

/// What is expected, and how exact an answer must be. `honest` is what rounding to 16 bits makes of it; empty for fp32.
struct ExpectedForward {
  ForwardResult exact;
  Array honest;
  Bound output_bound, lse_bound;
};

template <typename T>
struct ExpectedBackward {
  ForwardResult forward;  // for backward()
  Judgement<T> gradients;
};

namespace kernel_suite_detail {

inline Tensor<double, 4> widened(const Tensor<float, 4>& from) {
  Tensor<double, 4> to(from.shape());
  std::copy_n(from.data(), from.count(), to.data());
  return to;
}

/// The reference's problem with the memory that it looks at. It stays where it is.
struct Exact {
  Exact(const Inputs& in, const CallOptions& options, const Change& change)
      : query(widened(in.query)), key(widened(in.key)), value(widened(in.value)), d_output(widened(in.d_output)) {
    problem.causal = options.causal;
    if (options.scale) problem.scale = *options.scale;
    if (change) change(problem);
  }
  Exact(const Exact&) = delete;

  double scale() const { return problem.scale.value_or(1.0 / std::sqrt(static_cast<double>(query.size(3)))); }

  /// Calls body(b, h, i, j, head of K and V, weight, what dropout makes of 1) for every pair that has a weight.
  template <typename Body>
  void each_pair(const Body& body) const {
    const Index group = query.size(1) / std::max<Index>(1, key.size(1));
    for (Index b = 0; b < query.size(0); ++b)
      for (Index h = 0; h < query.size(1); ++h)
        for (Index i = 0; i < query.size(2); ++i)
          for (Index j = 0; j < key.size(2); ++j) {
            const double weight = forward.weights(b, h, i, j);
            if (weight == 0.0) continue;
            double kept = 1.0;
            if (problem.kept) kept = (*problem.kept)(b, h, i, j) ? 1.0 / (1.0 - problem.dropout_probability) : 0.0;
            body(b, h, i, j, h / group, weight, kept);
          }
  }

  /// Of the products that make a score, all with the same sign: an answer rounds each of them.
  double largest_score() const {
    double largest = 0.0;
    each_pair([&](Index b, Index h, Index i, Index j, Index hk, double, double) {
      double sum = 0.0;
      for (Index d = 0; d < query.size(3); ++d) sum += std::abs(query(b, h, i, d) * key(b, hk, j, d));
      largest = std::max(largest, sum * std::abs(scale()));
    });
    return largest;
  }

  Tensor<double, 4> query, key, value, d_output;
  reference::Problem problem{.query = query, .key = key, .value = value};
  reference::Forward forward{.output = Tensor<double, 4>({0, 0, 0, 0}),
                             .weights = Tensor<double, 4>({0, 0, 0, 0}),
                             .lse = Tensor<double, 3>({0, 0, 0})};
};

inline Tensor<double, 4> zeros(const Shape<4>& shape) {
  Tensor<double, 4> tensor(shape);
  std::fill_n(tensor.data(), tensor.count(), 0.0);
  return tensor;
}

template <typename T>
Array rounded_array(const Tensor<double, 4>& tensor) {
  Array array = to_array(tensor);
  for (double& number : array.values) number = rounded<T>(number);
  return array;
}

}  // namespace kernel_suite_detail

/// What the reference's forward pass leaves behind, for whoever wants a way back and no judgement.
inline ForwardResult forward_result(const Inputs& in, const CallOptions& options = {}, const Change& change = {}) {
  const kernel_suite_detail::Exact exact(in, options, change);
  const reference::Forward forward = reference::forward(exact.problem);
  return {to_array(forward.output), to_array(forward.lse)};
}

template <typename T>
ExpectedForward expected_forward(const Inputs& in, const CallOptions& options = {}, const Change& change = {}) {
  using namespace kernel_suite_detail;
  Exact exact(in, options, change);
  exact.forward = reference::forward(exact.problem);
  Tensor<double, 4> size = zeros(in.query.shape()), honest = zeros(in.query.shape());
  exact.each_pair([&](Index b, Index h, Index i, Index j, Index hk, double weight, double kept) {
    const double weight16 = std::is_same_v<T, float> ? 0.0 : rounded<T>(weight * kept);
    for (Index d = 0; d < size.size(3); ++d) {
      size(b, h, i, d) += weight * kept * std::abs(exact.value(b, hk, j, d));
      honest(b, h, i, d) += weight16 * exact.value(b, hk, j, d);
    }
  });
  const double largest = exact.largest_score();
  ExpectedForward want{.exact = {to_array(exact.forward.output), to_array(exact.forward.lse)},
                       .honest = {},
                       .output_bound = fp32_bound(to_array(size), largest),
                       .lse_bound = {}};
  if constexpr (std::is_same_v<T, float>) {
    want.lse_bound = lse_bound(want.exact.lse, largest);
  } else {
    want.honest = rounded_array<T>(honest);
    want.output_bound.relative = 4.0 * std::numeric_limits<float>::epsilon() * (largest + 1.0);
    want.lse_bound = lse_bound(want.exact.lse, largest, roundoff<T>());
  }
  return want;
}

/// In 16 bits without dropout and soft-cap, which `honest` does not know.
template <typename T>
ExpectedBackward<T> expected_backward(const Inputs& in, const CallOptions& options = {}, const Change& change = {}) {
  using namespace kernel_suite_detail;
  Exact exact(in, options, change);
  exact.forward = reference::forward(exact.problem);
  const reference::Gradients gradients = reference::backward(exact.problem, exact.d_output);
  const Index width = in.query.size(3);

  // dP of every pair, and delta; the same with every sign made positive, which is how large the terms of a sum are.
  const Shape<4> pairs = exact.forward.weights.shape(), rows{pairs[0], pairs[1], pairs[2], 1};
  Tensor<double, 4> d_weight = zeros(pairs), d_weight_size = zeros(pairs), delta = zeros(rows),
                    delta_size = zeros(rows);
  exact.each_pair([&](Index b, Index h, Index i, Index j, Index hk, double weight, double kept) {
    for (Index d = 0; d < width; ++d) {
      const double term = kept * exact.d_output(b, h, i, d) * exact.value(b, hk, j, d);
      d_weight(b, h, i, j) += term;
      d_weight_size(b, h, i, j) += std::abs(term);
    }
    delta_size(b, h, i, 0) += weight * d_weight_size(b, h, i, j);
  });
  for (Index b = 0; b < rows[0]; ++b)
    for (Index h = 0; h < rows[1]; ++h)
      for (Index i = 0; i < rows[2]; ++i)
        for (Index d = 0; d < width; ++d) {
          delta(b, h, i, 0) += exact.d_output(b, h, i, d) * rounded<T>(exact.forward.output(b, h, i, d));
        }

  const Shape<4> of_query = in.query.shape(), of_key = in.key.shape();
  Tensor<double, 4> query_size = zeros(of_query), key_size = zeros(of_key), value_size = zeros(of_key);
  Tensor<double, 4> honest_query = zeros(of_query), honest_key = zeros(of_key), honest_value = zeros(of_key);
  exact.each_pair([&](Index b, Index h, Index i, Index j, Index hk, double weight, double kept) {
    const double scale = exact.scale();
    const double size = std::abs(scale) * weight * (d_weight_size(b, h, i, j) + delta_size(b, h, i, 0));
    const double d_score16 = rounded<T>(scale * weight * (d_weight(b, h, i, j) - delta(b, h, i, 0)));
    const double weight16 = rounded<T>(weight);
    for (Index d = 0; d < width; ++d) {
      query_size(b, h, i, d) += size * std::abs(exact.key(b, hk, j, d));
      key_size(b, hk, j, d) += size * std::abs(exact.query(b, h, i, d));
      value_size(b, hk, j, d) += weight * kept * std::abs(exact.d_output(b, h, i, d));
      if constexpr (std::is_same_v<T, float>) continue;
      honest_query(b, h, i, d) += d_score16 * exact.key(b, hk, j, d);
      honest_key(b, hk, j, d) += d_score16 * exact.query(b, h, i, d);
      honest_value(b, hk, j, d) += weight16 * exact.d_output(b, h, i, d);
    }
  });
  const double largest = exact.largest_score();
  ExpectedGradients want{to_array(gradients.query),
                         to_array(gradients.key),
                         to_array(gradients.value),
                         fp32_bound(to_array(query_size), largest),
                         fp32_bound(to_array(key_size), largest),
                         fp32_bound(to_array(value_size), largest)};
  Gradients honest;
  if constexpr (!std::is_same_v<T, float>) {
    honest = {rounded_array<T>(honest_query), rounded_array<T>(honest_key), rounded_array<T>(honest_value), {}};
  }
  return {.forward = {to_array(exact.forward.output), to_array(exact.forward.lse)},
          .gradients = Judgement<T>(std::move(want), std::move(honest))};
}

}  // namespace flashkata::testing
