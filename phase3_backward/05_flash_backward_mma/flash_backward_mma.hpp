#pragma once

#include "common/attention/not_implemented.hpp"
#include "phase3_backward/flash.hpp"

namespace flashkata {

/// flash_backward() of step 04 for fp16 and bf16, on tensor cores: 16-bit operands, all five products summed up in
/// fp32, P and scale dS rounded to 16 bits before they are multiplied (dP may be larger than fp16 holds, and the scale
/// makes it smaller; in bf16 the scale may wait for the sums), each gradient rounded once at the end.
///
/// Shapes, strides and options as in phase3_backward/flash.hpp; D is 64 or 128, and 16 and 32 are welcome but not asked
/// for (an answer that has none says so with std::invalid_argument naming query). Every element of d_query, d_key and
/// d_value is written, whatever it held. A query that may attend to nothing has gradients of 0 and gives none to any
/// key, whatever it and its d_output hold; a key that no query may see has gradients of exactly 0. What a forbidden key
/// and its value hold, NaN and inf included, never reaches the gradients of queries that may not attend to it. Tiles
/// that see nothing of each other are not even read. With `deterministic` the same inputs give the same bits; without
/// it d_query may differ by rounding from call to call, d_key and d_value may not. Device memory: none beyond the
/// arguments.
void flash_backward_mma(const FlashBackward<fp16>& problem, const Stream& stream = {});
void flash_backward_mma(const FlashBackward<bf16>& problem, const Stream& stream = {});

}  // namespace flashkata
