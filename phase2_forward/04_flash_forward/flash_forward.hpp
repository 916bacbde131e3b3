#pragma once

#include "common/attention/not_implemented.hpp"
#include "phase2_forward/flash.hpp"

namespace flashkata {

/// FlashAttention's forward pass in fp32 on the GPU (Dao et al. 2022, Algorithm 1; Dao 2023, Algorithm 1): a block owns
/// a tile of queries and walks over tiles of keys and values in shared memory; scores and weights never reach global
/// memory. What a tile of keys holds that no query of the block may see is not even read.
///
/// Shapes, strides and options as in phase2_forward/flash.hpp. A query that may attend to nothing gets output 0 and lse
/// -inf. What a forbidden key and its value hold, NaN and inf included, never reaches the queries that may not attend
/// to it. The same inputs give the same bits. Device memory: none beyond the arguments.
void flash_forward(const FlashForward<float>& problem, const Stream& stream = {});

}  // namespace flashkata
