// The library: provided, not yours to fill. Its conventions are those of PyTorch's function of the same name
// (torch.nn.functional.scaled_dot_product_attention), which are not those of this course.
#pragma once

#include <optional>

#include "common/attention/tensor.hpp"

namespace flashkata {

/// softmax(scale * query key^T + mask) value for every batch item and head.
///
/// query       [B, H, Sq, D], any strides
/// key         [B, Hk, Sk, D]
/// value       [B, Hk, Sk, Dv]
/// attn_mask   [B, H, Sq, Sk], true = attend; a stride of 0 repeats it along an axis
/// is_causal   key j is visible to query i when j <= i: aligned to the top left, whatever Sq and Sk are.
///             It may not be combined with attn_mask.
/// scale       default 1 / sqrt(D)
/// enable_gqa  whether Hk may be smaller than H (query head h then reads key head h / (H / Hk))
/// Returns [B, H, Sq, Dv], packed. A query that may attend to nothing gets 0.
/// Throws std::invalid_argument naming the argument, its value and what is allowed.
Tensor<float, 4> scaled_dot_product_attention(View<const float, 4> query, View<const float, 4> key,
                                              View<const float, 4> value,
                                              std::optional<View<const bool, 4>> attn_mask = {}, bool is_causal = false,
                                              std::optional<float> scale = {}, bool enable_gqa = false);

}  // namespace flashkata
