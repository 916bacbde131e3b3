#pragma once

#include "common/attention/arguments.hpp"
#include "common/attention/masks.hpp"
#include "common/attention/not_implemented.hpp"
#include "common/attention/tensor.hpp"
#include "phase1_eager/02_attention/attention.hpp"

namespace flashkata {

/// eager_bidirectional() of step 03 in which no token sees its future. The triangle is aligned to the bottom right: the
/// last query is the last key's contemporary, so key j is visible to query i when
///
///     j <= i + Sk - Sq
///
/// and, if there is a mask, when mask(b, j) is true as well.
///
/// q    [B, Sq, H*D]
/// k    [B, Sk, H*D]
/// v    [B, Sk, H*Dv]; Dv may differ from D
/// mask [B, Sk], true = attend: which keys of a batch item are text and which are padding; none by default
/// Returns [B, Sq, H*Dv]. A query that may attend to nothing gets 0: with Sq > Sk the first Sq - Sk of them, with
/// padding on the left the padded ones. What a forbidden key and its value hold, NaN and inf included, never reaches
/// the queries that may not attend to it. The columns of q, k and v are neighbours in memory; their tokens and batch
/// items may lie further apart than packed. Throws std::invalid_argument naming the argument, its shape or value, and
/// what is allowed.
Tensor<float, 3> eager_causal(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v, Index num_heads,
                              const PaddingMask& mask = {});

}  // namespace flashkata
