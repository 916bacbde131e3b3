#pragma once

#include "common/attention/arguments.hpp"
#include "common/attention/masks.hpp"
#include "common/attention/not_implemented.hpp"
#include "common/attention/tensor.hpp"
#include "scaled_dot_product_attention.hpp"

namespace flashkata {

/// What eager_bidirectional() of step 03 computes, by calling scaled_dot_product_attention(): once, without arithmetic
/// of your own and without copying q, k or v.
///
/// q    [B, Sq, H*D]
/// k    [B, Sk, H*D]
/// v    [B, Sk, H*Dv]; Dv may differ from D
/// mask [B, Sk], true = attend; none by default
/// Returns [B, Sq, H*Dv]. A query that may attend to nothing gets 0.
/// The columns of q, k and v are neighbours in memory; their tokens and batch items may lie further apart than packed.
/// Throws std::invalid_argument naming the argument, its shape or value, and what is allowed.
Tensor<float, 3> sdpa_bidirectional(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v,
                                    Index num_heads, const PaddingMask& mask = {});

/// What eager_causal() of step 04 computes, likewise: key j is visible to query i when j <= i + Sk - Sq and, if there
/// is a mask, when mask(b, j) is true as well.
Tensor<float, 3> sdpa_causal(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v, Index num_heads,
                             const PaddingMask& mask = {});

}  // namespace flashkata
