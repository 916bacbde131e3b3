// Faults: barriers and warp functions that not everybody reaches, or not in the same way.
#include "tests/virtual_gpu/corpus_launch.hpp"

namespace flashkata::corpus {
namespace {

__global__ void barriers_in_both_branches(const float* in, float* out) {
  const int i = threadIdx.x;
  out[i] = in[i];
  if (i < 40) {
    __syncthreads();  // <- barriers_in_both_branches
  } else {
    __syncthreads();  // <- barriers_in_both_branches
  }
}

__global__ void barrier_for_some(const float* in, float* out) {
  const int i = threadIdx.x;
  if (i < 48) __syncthreads();  // <- barrier_for_some
  out[i] = in[i];
  __syncthreads();  // <- barrier_for_some
}

__global__ void exit_before_barrier(const float* in, float* out) {
  const int i = threadIdx.x;
  if (i >= 50) return;
  out[i] = in[i];
  __syncthreads();  // <- exit_before_barrier
}

__global__ void votes_in_both_branches(const float* in, float* out) {
  const int i = threadIdx.x;
  if (i < 40) {
    out[i] = __syncthreads_or(in[i] > 3.0f);  // <- votes_in_both_branches
  } else {
    out[i] = __syncthreads_and(in[i] > 3.0f);  // <- votes_in_both_branches
  }
}

__global__ void exit_before_count(const float* in, float* out) {
  const int i = threadIdx.x;
  if (i >= 50) return;
  out[i] = __syncthreads_count(in[i] > 3.0f);  // <- exit_before_count
}

__global__ void barrier_against_syncwarp(const float* in, float* out) {
  const int lane = threadIdx.x;
  out[lane] = in[lane];
  if (lane < 16) {
    __syncthreads();  // <- barrier_against_syncwarp
  } else {
    __syncwarp();  // <- barrier_against_syncwarp
  }
}

__global__ void shuffle_after_exit(const float* in, float* out) {
  const int lane = threadIdx.x;
  if (lane == 31) return;
  out[lane] = __shfl_down_sync(FULL_WARP, in[lane], 1);  // <- shuffle_after_exit
}

__global__ void vote_in_a_branch(const float* in, float* out) {
  const int lane = threadIdx.x;
  out[lane] = in[lane];
  if (lane < 16) {
    out[lane] = __ballot_sync(FULL_WARP, 1);  // <- vote_in_a_branch
  }
}

__global__ void caller_not_in_mask(const float* in, float* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_xor_sync(0x0000ffffu, in[lane], 1);  // <- caller_not_in_mask
}

__global__ void source_not_in_mask(const float* in, float* out) {
  const int lane = threadIdx.x;
  out[lane] = in[lane];
  if (lane < 16) {
    out[lane] = __shfl_xor_sync(0x0000ffffu, in[lane], 16);  // <- source_not_in_mask
  }
}

__global__ void source_does_not_exist(const float* in, float* out) {
  const int lane = threadIdx.x;                          // the block has 48 threads: its second warp is half a warp
  out[lane] = __shfl_xor_sync(FULL_WARP, in[lane], 16);  // <- source_does_not_exist
}

__global__ void different_masks(const float* in, float* out) {
  const int lane = threadIdx.x;
  const unsigned mask = lane < 8 ? FULL_WARP : 0x0fffffffu;
  if (lane < 28) {
    out[lane] = __shfl_xor_sync(mask, in[lane], 1);  // <- different_masks
  } else {
    out[lane] = __shfl_xor_sync(FULL_WARP, in[lane], 1);
  }
}

__global__ void different_functions(const float* in, float* out) {
  const int lane = threadIdx.x;
  if (lane < 16) {
    out[lane] = __shfl_xor_sync(FULL_WARP, in[lane], 1);  // <- different_functions
  } else {
    out[lane] = __ballot_sync(FULL_WARP, in[lane] > 0.0f);  // <- different_functions
  }
}

__global__ void match_in_a_branch(const float* in, float* out) {
  const int lane = threadIdx.x;
  out[lane] = in[lane];
  if (lane < 16) {
    out[lane] = __match_any_sync(FULL_WARP, in[lane]);  // <- match_in_a_branch
  }
}

__global__ void different_reductions(const float* in, float* out) {
  const int lane = threadIdx.x;
  const int value = static_cast<int>(in[lane]);
  if (lane < 16) {
    out[lane] = __reduce_add_sync(FULL_WARP, value);  // <- different_reductions
  } else {
    out[lane] = __reduce_max_sync(FULL_WARP, value);  // <- different_reductions
  }
}

__global__ void different_lines(const float* in, float* out) {
  const int lane = threadIdx.x;
  if (lane < 16) {
    out[lane] = __shfl_xor_sync(FULL_WARP, in[lane], 1);  // <- different_lines
  } else {
    out[lane] = __shfl_xor_sync(FULL_WARP, in[lane], 2);  // <- different_lines
  }
}

__global__ void uneven_loop(const float* in, float* out) {
  const int lane = threadIdx.x;
  float value = in[lane];
  const int rounds = lane < 31 ? 3 : 2;
  for (int round = 0; round < rounds; ++round) {
    value += __shfl_xor_sync(FULL_WARP, value, 1);  // <- uneven_loop
  }
  out[lane] = value;
}

}  // namespace

FaultyCases synchronisation_cases() {
#define CASE(name, kind, threads)                                            \
  FaultyCase {                                                               \
#name, FindingKind::kind, __FILE__, [] { run_in_out(name, 1, threads); } \
  }
  return {
      CASE(barriers_in_both_branches, divergent_barrier, THREADS),
      CASE(barrier_for_some, divergent_barrier, THREADS),
      CASE(exit_before_barrier, barrier_after_exit, THREADS),
      CASE(votes_in_both_branches, divergent_barrier, THREADS),
      CASE(exit_before_count, barrier_after_exit, THREADS),
      CASE(barrier_against_syncwarp, deadlock, 32),
      CASE(shuffle_after_exit, absent_lane, 32),
      CASE(vote_in_a_branch, absent_lane, 32),
      CASE(caller_not_in_mask, absent_lane, 32),
      CASE(source_not_in_mask, absent_lane, 32),
      CASE(source_does_not_exist, absent_lane, 48),
      CASE(different_masks, divergent_warp, 32),
      CASE(different_functions, divergent_warp, 32),
      CASE(match_in_a_branch, absent_lane, 32),
      CASE(different_reductions, divergent_warp, 32),
      CASE(different_lines, divergent_warp, 32),
      CASE(uneven_loop, absent_lane, 32),
  };
#undef CASE
}

}  // namespace flashkata::corpus
