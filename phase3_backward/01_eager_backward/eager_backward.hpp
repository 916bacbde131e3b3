#pragma once

#include <optional>

#include "common/attention/arguments.hpp"
#include "common/attention/masks.hpp"
#include "common/attention/not_implemented.hpp"
#include "common/attention/tensor.hpp"
#include "phase1_eager/02_attention/attention.hpp"

namespace flashkata {

/// The gradients of a loss with respect to the inputs of attention().
struct AttentionGradients {
  Matrix query;  // [Sq, D]
  Matrix key;    // [Sk, D]
  Matrix value;  // [Sk, Dv]
};

/// The backward pass of attention(), one head (Dao et al. 2022, FlashAttention, appendix B.2). d_output, called dO
/// below, is the gradient of a loss with respect to the output, [Sq, Dv]; the result is what query, key and value have
/// to do with that loss:
///
///     P  = softmax(scale * query key^T + mask)    the weights of the forward pass
///     dV = P^T dO
///     dP = dO value^T
///     dS = P * (dP - rowsum(P * dP))              the Jacobian of softmax, row by row
///     dQ = scale dS key
///     dK = scale dS^T query
///
/// query [Sq, D], key [Sk, D], value [Sk, Dv], mask and scale as in attention(); the mask has no gradient.
/// A query that may attend to nothing has gradients of 0, and neither it nor its row of d_output gives any to a key. A
/// key that nobody may attend to has gradients of exactly 0. What a key and its value hold, NaN and inf included, never
/// reaches the gradient of a query that may not attend to that key. Throws std::invalid_argument naming the argument,
/// its shape and the shape expected.
AttentionGradients attention_backward(ConstMatrixView query, ConstMatrixView key, ConstMatrixView value,
                                      ConstMatrixView d_output, const Mask& mask = {}, std::optional<float> scale = {});

/// The checks that attention_backward() promises.
inline void check_backward(ConstMatrixView query, ConstMatrixView key, ConstMatrixView value, ConstMatrixView d_output,
                           const Mask& mask, std::optional<float> scale) {
  check_head(query, key, value, mask, scale);
  const Shape<2> output{query.rows(), value.cols()};
  require(d_output.rows() == output[0] && d_output.cols() == output[1], "d_output",
          to_text(Shape<2>{d_output.rows(), d_output.cols()}), to_text(output) + ", [Sq, Dv], as the output");
}

}  // namespace flashkata
