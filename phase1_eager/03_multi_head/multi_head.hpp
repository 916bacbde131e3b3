#pragma once

#include "common/attention/arguments.hpp"
#include "common/attention/masks.hpp"
#include "common/attention/not_implemented.hpp"
#include "common/attention/tensor.hpp"
#include "phase1_eager/02_attention/attention.hpp"

namespace flashkata {

/// Attention in H = num_heads heads side by side, in the model's layout (Vaswani et al. 2017, section 3.2.2, without
/// the projections). The last axis holds the heads one after the other: head h of a token is its columns h*D .. h*D + D
/// - 1. Every head attends on its own, with scale 1 / sqrt(D).
///
/// q    [B, Sq, H*D]
/// k    [B, Sk, H*D]
/// v    [B, Sk, H*Dv]; Dv may differ from D
/// mask [B, Sk], true = attend: which keys of a batch item are text and which are padding; none by default
/// Returns [B, Sq, H*Dv]. A query of a batch item that is nothing but padding gets 0. What a padded key and its value
/// hold, NaN and inf included, reaches no output.
/// The columns of q, k and v are neighbours in memory; their tokens and batch items may lie further apart than packed.
/// Throws std::invalid_argument naming the argument, its shape or value, and what is allowed.
Tensor<float, 3> eager_bidirectional(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v,
                                     Index num_heads, const PaddingMask& mask = {});

}  // namespace flashkata
