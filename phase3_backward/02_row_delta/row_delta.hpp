#pragma once

#include "common/attention/not_implemented.hpp"
#include "common/attention/tensor.hpp"

namespace flashkata {

/// delta = rowsum(dO * O), one number for each query (Dao 2023, FlashAttention-2, section 2.3.2):
///
///     delta[b, h, i] = sum over channels c of d_output[b, h, i, c] * output[b, h, i, c]
///
/// It stands for rowsum(P * dP), a sum over all keys, which the Jacobian of softmax asks for: the backward pass takes
/// it from the output, so that it may look at the keys one tile at a time.
///
/// output, d_output [B, H, Sq, Dv], each with any strides, 0, negative ones and gaps included, also along the channels;
/// any length may be 0. The result is [B, H, Sq]. Throws std::invalid_argument naming the argument, its shape and the
/// shape expected.
Tensor<float, 3> row_delta(View<const float, 4> output, View<const float, 4> d_output);

/// The checks that row_delta() promises.
inline void check_row_delta(const View<const float, 4>& output, const View<const float, 4>& d_output) {
  require(d_output.shape() == output.shape(), "d_output", to_text(d_output.shape()),
          to_text(output.shape()) + ", as output");
}

}  // namespace flashkata
