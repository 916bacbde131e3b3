// What a backward kernel should have written, and how far off it may be.
#pragma once

#include "phase3_backward/kernel_suite/calls.hpp"

namespace flashkata::testing {

namespace kernel_suite_detail {

using Matrix64 = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

inline Matrix64 matrix_of(const TokenTensor& tensor, Index b, Index h) {
  return as_matrix(tensor.heads()[b][h]).cast<double>();
}
inline Matrix64 matrix_of(const Array& all, Index b, Index h) {
  const Array head = head_of(all, b, h);
  return Eigen::Map<const Matrix64>(head.values.data(), head.shape.at(0), head.shape.at(1));
}
template <typename T>
Matrix64 rounded_matrix(const Matrix64& matrix) {
  return matrix.unaryExpr([](double value) { return rounded<T>(value); });
}
inline void append(Array& all, const Matrix64& head) {
  all.values.insert(all.values.end(), head.data(), head.data() + head.size());
}

// [1, 1, ...] of [B, H, ...].
inline Array only_head(const Array& all, Index b, Index h) {
  Array head = head_of(all, b, h);
  head.shape.insert(head.shape.begin(), {1, 1});
  return head;
}
inline Gradients only_head(const Gradients& all, Index b, Index h) {
  return {only_head(all.query, b, h), only_head(all.key, b, h), only_head(all.value, b, h), {}};
}

// The eager way with float scores. Rounded to T are what is multiplied, P and scale dS, the output that delta is made
// from, as it comes from the forward pass, and the gradients.
template <typename T>
Gradients honest(const BackwardInputs& in) {
  const AttentionCase& c = in.sizes;
  const reference::Forward forward = reference_forward(in);
  const Array all_weights = to_array(forward.weights);
  const Array output = to_array(forward.output);
  const double scale = static_cast<double>(c.scale.value_or(1.0f / std::sqrt(static_cast<float>(c.width))));
  Gradients made;
  made.query.shape = {c.batch, c.heads, c.queries, c.width};
  made.key.shape = made.value.shape = {c.batch, c.heads, c.keys, c.width};
  for (Index b = 0; b < c.batch; ++b) {
    for (Index h = 0; h < c.heads; ++h) {
      const Matrix64 weights = matrix_of(all_weights, b, h);
      const Matrix64 d_output = matrix_of(in.d_output, b, h);
      const Matrix64 d_weights = d_output * matrix_of(in.inputs.value, b, h).transpose();
      const Eigen::VectorXd delta = d_output.cwiseProduct(rounded_matrix<T>(matrix_of(output, b, h))).rowwise().sum();
      const Matrix64 d_scores = rounded_matrix<T>(scale * weights.cwiseProduct(d_weights.colwise() - delta));
      append(made.query, rounded_matrix<T>(d_scores * matrix_of(in.inputs.key, b, h)));
      append(made.key, rounded_matrix<T>(d_scores.transpose() * matrix_of(in.inputs.query, b, h)));
      append(made.value, rounded_matrix<T>(rounded_matrix<T>(weights).transpose() * d_output));
    }
  }
  return made;
}

}  // namespace kernel_suite_detail

/// What the float64 reference makes of some inputs, and how exact an answer must be.
template <typename T>
struct Judgement {
  explicit Judgement(const BackwardInputs& in) : want(expected_gradients(in.sizes, in.inputs, in.d_output)) {
    if constexpr (!std::is_same_v<T, float>) honest = kernel_suite_detail::honest<T>(in);
  }
  /// For whoever has asked the reference already.
  Judgement(ExpectedGradients exact, Gradients rounded) : want(std::move(exact)), honest(std::move(rounded)) {}

  ExpectedGradients want;
  Gradients honest;  // of 16 bits: what rounding makes of it

  /// The same of one head.
  Judgement only(Index b, Index h) const {
    using kernel_suite_detail::only_head;
    Judgement head = *this;
    const auto cut = [&](Array& array) {
      if (!array.shape.empty()) array = only_head(array, b, h);
    };
    for (Array* array : {&head.want.query, &head.want.key, &head.want.value, &head.want.query_bound.magnitude,
                         &head.want.key_bound.magnitude, &head.want.value_bound.magnitude, &head.honest.query,
                         &head.honest.key, &head.honest.value}) {
      cut(*array);
    }
    return head;
  }
};

/// In fp32 within the reference's bounds, in 16 bits as half_judge.hpp says.
template <typename T>
bool expect_gradients(const Gradients& got, const Judgement<T>& judgement) {
  const ExpectedGradients& want = judgement.want;
  const auto close = [](const char* name, const Array& is, const Array& should, const Array& baseline, Bound bound,
                        const Axes& axes) {
    if constexpr (std::is_same_v<T, float>) {
      return expect_close(name, is, should, bound, axes);
    } else {
      bound.relative -= 1e-5 - 4.0 * std::numeric_limits<float>::epsilon();
      return expect_close_in_half<T>(name, is, should, baseline, bound, "whose P, dS, output and gradients are", axes);
    }
  };
  const Gradients& honest = judgement.honest;
  const bool value = close("d_value", got.value, want.value, honest.value, want.value_bound, KEY_AXES);
  const bool key = close("d_key", got.key, want.key, honest.key, want.key_bound, KEY_AXES);
  return close("d_query", got.query, want.query, honest.query, want.query_bound, QUERY_AXES) && key && value;
}

template <typename T>
bool expect_gradients(const Gradients& got, const BackwardInputs& in) {
  return expect_gradients(got, Judgement<T>(in));
}

/// The same, with the sizes beside what is found.
template <typename T>
bool expect_right(const BackwardStep<T>& step, const BackwardInputs& in, const BackwardOptions& options = {}) {
  if (expect_gradients<T>(gradients(step, in, options), in)) return true;
  finding("of", std::string(type_name<T>()) + ", " + in.text() + (options.deterministic ? ", deterministic" : ""));
  return false;
}

inline bool expect_same(const Gradients& got, const Gradients& want, const std::string& why, bool with_query = true) {
  const bool value = expect_same_bits("d_value", got.value, want.value, KEY_AXES, why);
  const bool key = expect_same_bits("d_key", got.key, want.key, KEY_AXES, why);
  return (!with_query || expect_same_bits("d_query", got.query, want.query, QUERY_AXES, why)) && key && value;
}

/// "fp16, 5 queries, 7 keys, D = 64", beside what was found.
template <typename T>
bool not_so(const BackwardInputs& in, const std::string& more = "") {
  finding("of", std::string(type_name<T>()) + ", " + in.text() + more);
  return false;
}

}  // namespace flashkata::testing
