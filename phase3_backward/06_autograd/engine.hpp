// What computes: attention forward and backward, as one call each, for two kinds of numbers.
#pragma once

#include <optional>

#include "common/attention/tensor.hpp"

namespace flashkata {

struct AttentionOptions {
  bool causal = false;            // key j is visible to query i when j <= i + Sk - Sq
  std::optional<double> scale{};  // multiplies q k^T; default 1 / sqrt(D)
};

namespace engine {

template <typename Scalar>
struct Forward {
  Tensor<Scalar, 4> output;  // [B, H, Sq, Dv]
  Tensor<Scalar, 3> lse;     // [B, H, Sq]
};

template <typename Scalar>
struct Gradients {
  Tensor<Scalar, 4> query;  // [B, H, Sq, D]
  Tensor<Scalar, 4> key;    // [B, H, Sk, D]
  Tensor<Scalar, 4> value;  // [B, H, Sk, Dv]
};

/// output = softmax(scale q k^T) v. float: your tiled_forward() of step 2.03. double: a plain one that comes with this
/// step, exact enough for difference quotients.
Forward<float> forward(View<const float, 4> q, View<const float, 4> k, View<const float, 4> v,
                       const AttentionOptions& options);
Forward<double> forward(View<const double, 4> q, View<const double, 4> k, View<const double, 4> v,
                        const AttentionOptions& options);

/// The gradients of sum(d_output * output), from the very inputs and results of a forward(). float: your
/// tiled_backward() of step 3.03. double: a plain one.
Gradients<float> backward(View<const float, 4> q, View<const float, 4> k, View<const float, 4> v,
                          View<const float, 4> output, View<const float, 3> lse, View<const float, 4> d_output,
                          const AttentionOptions& options);
Gradients<double> backward(View<const double, 4> q, View<const double, 4> k, View<const double, 4> v,
                           View<const double, 4> output, View<const double, 3> lse, View<const double, 4> d_output,
                           const AttentionOptions& options);

/// How often this thread has called forward() and backward(), of either kind.
struct Calls {
  int forward = 0;
  int backward = 0;
};
Calls& calls();

}  // namespace engine
}  // namespace flashkata
