#pragma once

#include "common/attention/not_implemented.hpp"
#include "phase3_backward/flash.hpp"

namespace flashkata {

/// Grouped-query attention (Ainslie et al. 2023, "GQA"): H query heads share Hk key/value heads, and H is a multiple of
/// Hk. Neighbours share: query head h reads key/value head h / (H / Hk). Hk = H is attention as before, Hk = 1 is
/// multi-query attention (Shazeer 2019).
///
/// Parameters as in phase2_forward/flash.hpp and phase3_backward/flash.hpp, but key, value, d_key and d_value are
/// [B, Hk, S, D]. The rules are those of steps 2.04 and 3.04: a query that may attend to nothing has output 0, lse -inf
/// and gradients of 0, a forbidden key reaches nothing, every output is written wholly. Besides:
///
/// - d_key and d_value are the sums of what the query heads of a group give, made in fp32, each by one owner in a fixed
///   order: the same inputs give the same bits of them, with `deterministic` and without it.
/// - Keys and values are read where they lie. Nobody copies a head out for the query heads that share it.
///
/// The functions throw std::invalid_argument naming the argument, its value and what is allowed, before they write.

/// On the host: every view is memory of the host, and the channels of a row are neighbours.
void tiled_gqa_forward(const FlashForward<float>& problem);
void tiled_gqa_backward(const FlashBackward<float>& problem);

/// On the GPU: every view is memory of the GPU. Device memory: none beyond the arguments.
void flash_gqa_forward(const FlashForward<float>& problem, const Stream& stream = {});
void flash_gqa_backward(const FlashBackward<float>& problem, const Stream& stream = {});

}  // namespace flashkata
