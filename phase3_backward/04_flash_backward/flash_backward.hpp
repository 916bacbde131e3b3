#pragma once

#include "common/attention/not_implemented.hpp"
#include "phase3_backward/flash.hpp"

namespace flashkata {

/// FlashAttention's backward pass in fp32 on the GPU (Dao 2023, FlashAttention-2, alg. 2 and section 3.2): a block owns
/// a tile of keys, walks over tiles of queries, computes their weights again from the log-sum-exp, and keeps the tile's
/// dK and dV to itself. The gradient of one query is a sum over all tiles of keys, so it is nobody's own: either a
/// second kernel, whose blocks own tiles of queries, or atomic additions.
///
/// Shapes, strides and options as in phase3_backward/flash.hpp. Every element of d_query, d_key and d_value is written,
/// whatever it held. A query that may attend to nothing has gradients of 0 and gives none to any key, whatever it and
/// its d_output hold; a key that no query may see has gradients of exactly 0. What a forbidden key and its value hold,
/// NaN and inf included, never reaches the gradients of queries that may not attend to it. Tiles that see nothing of
/// each other are not even read. With `deterministic` the same inputs give the same bits; without it d_query may differ
/// by rounding from call to call, d_key and d_value may not. Device memory: none beyond the arguments.
void flash_backward(const FlashBackward<float>& problem, const Stream& stream = {});

}  // namespace flashkata
