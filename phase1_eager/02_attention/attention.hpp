#pragma once

#include <optional>

#include "common/attention/arguments.hpp"
#include "common/attention/masks.hpp"
#include "common/attention/not_implemented.hpp"
#include "common/attention/tensor.hpp"
#include "phase1_eager/01_softmax/softmax.hpp"

namespace flashkata {

/// Output and weights of one attention head.
struct AttentionResult {
  Matrix output;   // [Sq, Dv]
  Matrix weights;  // [Sq, Sk]; a row adds up to 1, or is all 0 where its query may attend to nothing
};

/// Scaled dot-product attention of one head (Vaswani et al. 2017, eq. 1):
///
///     output = softmax(scale * query key^T + mask) value
///
/// query [Sq, D], key [Sk, D], value [Sk, Dv]; Dv may differ from D.
/// mask  [Sq, Sk], boolean (true = attend) or additive (added to the scaled scores; -inf forbids); none by default.
/// scale multiplies query key^T; default 1 / sqrt(D).
/// A query that may attend to nothing has output 0. What a forbidden key and its value hold, NaN and inf included,
/// never reaches the queries that may not attend to it. Throws std::invalid_argument naming the argument, its shape and
/// the shape expected.
AttentionResult attention(ConstMatrixView query, ConstMatrixView key, ConstMatrixView value, const Mask& mask = {},
                          std::optional<float> scale = {});

}  // namespace flashkata
