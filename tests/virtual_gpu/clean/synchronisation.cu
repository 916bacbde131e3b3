// Correct kernels whose synchronisation is unusual: no finding may come from them.
#include "tests/virtual_gpu/corpus_launch.hpp"

namespace flashkata::corpus {
namespace {

__global__ void warp_synchronous_exchange(const float* in, float* out) {
  __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  float value = in[i];
  for (int distance = 1; distance < 32; distance *= 2) {
    tile[i] = value;
    __syncwarp();
    value = tile[i ^ distance];
    __syncwarp();
  }
  out[i] = value;
}

__global__ void double_buffer_with_one_barrier(const float* in, float* out) {
  __shared__ float tile[2][THREADS];
  const int i = threadIdx.x;
  float sum = 0.0f;
  for (int round = 0; round < 4; ++round) {
    tile[round % 2][i] = in[i];
    __syncthreads();  // the other half was read before the last barrier
    sum += tile[round % 2][THREADS - 1 - i];
  }
  out[i] = sum;
}

__global__ void whole_warps_leave_before_any_barrier(const float* in, float* out) {
  const int i = threadIdx.x;
  out[i] = in[i];
  if (i >= 32) return;
  __syncwarp();
  out[i] = __shfl_sync(FULL_WARP, in[i], 31 - i);
}

__global__ void single_threads_leave(const float* in, float* out) {
  const int i = threadIdx.x;
  out[i] = 0.0f;
  if (i >= 50) return;
  out[i] = in[i];
}

__global__ void whole_block_leaves(const float* in, float* out) {
  __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  const int global = blockIdx.x * THREADS + i;
  out[global] = 0.0f;
  if (blockIdx.x == 1) return;  // the same for all threads of the block
  tile[i] = in[global];
  __syncthreads();
  out[global] = tile[THREADS - 1 - i];
}

__global__ void shuffles_within_halves(const float* in, float* out) {
  const int lane = threadIdx.x;
  float value = in[lane];
  if (lane < 16) {
    value += __shfl_xor_sync(0x0000ffffu, value, 8);
  } else {
    value -= __shfl_xor_sync(0xffff0000u, value, 8);
  }
  out[lane] = value;
}

__global__ void partial_syncwarp(const float* in, float* out) {
  __shared__ float tile[32];
  const int lane = threadIdx.x;
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  tile[lane] = in[lane];
  __syncwarp(half);
  out[lane] = tile[lane ^ 8];
}

/// Lane 0 hands over to lane 1, and that one to lane 2, by two barriers of two lanes each.
__global__ void order_is_passed_on(const float* in, float* out) {
  __shared__ float value;
  const int lane = threadIdx.x;
  out[lane] = in[lane];
  if (lane == 0) value = 7.0f;
  if (lane <= 1) __syncwarp(0x3u);
  if (lane == 1 || lane == 2) __syncwarp(0x6u);
  if (lane == 2) out[lane] = value;
}

__global__ void barrier_in_a_uniform_branch(const float* in, float* out) {
  __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  const int global = blockIdx.x * THREADS + i;
  tile[i] = in[global];
  if (blockIdx.x % 2 == 0) {
    __syncthreads();
    out[global] = tile[THREADS - 1 - i];
  } else {
    out[global] = tile[i];
  }
}

__global__ void warps_loop_unevenly(const float* in, float* out) {
  const int i = threadIdx.x;
  const int rounds = 1 + i / 32;
  float value = in[i];
  for (int round = 0; round < rounds; ++round) value = __shfl_xor_sync(FULL_WARP, value, 1);
  out[i] = value;
}

__global__ void one_warp_produces_for_the_next(const float* in, float* out) {
  __shared__ float tile[32];
  const int i = threadIdx.x;
  if (i < 32) tile[i] = in[i];
  __syncthreads();
  out[i] = tile[i % 32];
}

__global__ void narrow_shuffles(const float* in, float* out) {
  const int lane = threadIdx.x;
  float sum = in[lane];
  for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_down_sync(FULL_WARP, sum, distance, 8);
  out[lane] = __shfl_sync(FULL_WARP, sum, 0, 8);
}

__global__ void last_warp_is_partial(const float* in, float* out) {
  const int i = threadIdx.x;  // 40 threads: the second warp has 8
  const float value = __shfl_xor_sync(FULL_WARP, in[i], 4);
  __syncwarp();
  out[i] = value;
}

__global__ void a_vote_is_a_barrier(const float* in, float* out) {
  __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  tile[i] = in[i];
  const int small = __syncthreads_count(in[i] < 10.0f);
  const float value = tile[THREADS - 1 - i];
  const int any = __syncthreads_or(value > 1000.0f);  // tile has been read
  tile[i] = value + small;
  out[i] = __syncthreads_and(small == 10) != 0 ? tile[THREADS - 1 - i] + any : -1.0f;
}

__global__ void reductions_by_parity(const float* in, float* out) {
  const int lane = threadIdx.x;
  const unsigned same = __match_any_sync(FULL_WARP, lane % 2);
  out[lane] = __reduce_add_sync(same, static_cast<int>(in[lane]));
}

int rounds_of(int i) { return 1 + i / 32; }

}  // namespace

CleanCases synchronisation_clean_cases() {
#define CASE(name, blocks, threads, want)                                                                    \
  CleanCase {                                                                                                \
#name, __FILE__, [] { return all_equal(run_in_out(name, blocks, threads), [](int i) { return want; }); } \
  }
  return {
      CASE(warp_synchronous_exchange, 1, THREADS, i ^ 31),
      CASE(double_buffer_with_one_barrier, 1, THREADS, 4 * (THREADS - 1 - i)),
      CASE(whole_warps_leave_before_any_barrier, 1, THREADS, i < 32 ? 31 - i : i),
      CASE(single_threads_leave, 1, THREADS, i < 50 ? i : 0),
      CASE(whole_block_leaves, 3, THREADS, i / THREADS == 1 ? 0 : i / THREADS * THREADS + THREADS - 1 - i % THREADS),
      CASE(shuffles_within_halves, 1, 32, i < 16 ? i + (i ^ 8) : i - (i ^ 8)),
      CASE(partial_syncwarp, 1, 32, i ^ 8),
      CASE(order_is_passed_on, 1, 32, i == 2 ? 7 : i),
      CASE(barrier_in_a_uniform_branch, 2, THREADS, i < THREADS ? THREADS - 1 - i : i),
      CASE(warps_loop_unevenly, 1, THREADS, rounds_of(i) % 2 == 1 ? i ^ 1 : i),
      CASE(one_warp_produces_for_the_next, 1, THREADS, i % 32),
      CASE(narrow_shuffles, 1, 32, 8 * (i / 8 * 8) + 28),
      CASE(a_vote_is_a_barrier, 1, THREADS, i + 10),
      CASE(reductions_by_parity, 1, 32, i % 2 == 0 ? 240 : 256),
      CASE(last_warp_is_partial, 1, 40, i ^ 4),
  };
#undef CASE
}

}  // namespace flashkata::corpus
