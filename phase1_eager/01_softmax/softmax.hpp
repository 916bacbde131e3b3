#pragma once

#include "common/attention/not_implemented.hpp"
#include "common/attention/tensor.hpp"

namespace flashkata {

/// Turns each row of scores into weights that are positive and add up to 1:
///
///     weights(i, j) = exp(scores(i, j)) / sum over k of exp(scores(i, k))
///
/// scores  [rows, columns], finite or -inf; any size up to 1e30 in either direction.
/// Returns [rows, columns]. A row of nothing but -inf, or of no column at all, has nobody to attend to: its weights are
/// 0.
Matrix softmax_rows(ConstMatrixView scores);

}  // namespace flashkata
