#pragma once

#include "common/attention/not_implemented.hpp"
#include "phase2_forward/flash.hpp"

namespace flashkata {

/// flash_forward() of step 04 for fp16 and bf16, on tensor cores: 16-bit operands, scores, weights' sums and output
/// summed up in fp32, the weights rounded to 16 bits before they multiply the values, the output rounded once at the
/// end.
///
/// Shapes, strides and options as in phase2_forward/flash.hpp. A query that may attend to nothing gets output 0 and lse
/// -inf. What a forbidden key or its value holds, NaN and inf included, does not reach a query that may not attend to
/// it; only rounding may change, as rows share decisions. A NaN in a key that a query may attend to makes its output
/// and its lse NaN, one in a value that channel of its output. The same inputs give the same bits. Device memory: none
/// beyond the arguments.
void flash_forward_mma(const FlashForward<fp16>& problem, const Stream& stream = {});
void flash_forward_mma(const FlashForward<bf16>& problem, const Stream& stream = {});

}  // namespace flashkata
