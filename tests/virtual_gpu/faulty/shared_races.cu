// Faults: two threads of a block, one address in shared memory, nothing that orders them.
#include "tests/virtual_gpu/corpus_launch.hpp"

namespace flashkata::corpus {
namespace {

__global__ void read_before_barrier(const float* in, float* out) {
  __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  tile[i] = in[i];                 // <- read_before_barrier
  out[i] = tile[THREADS - 1 - i];  // <- read_before_barrier
}

__global__ void overwritten_while_read(const float* in, float* out) {
  __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  float sum = 0.0f;
  for (int round = 0; round < 3; ++round) {
    tile[i] = in[i] + round;  // <- overwritten_while_read
    __syncthreads();
    sum += tile[THREADS - 1 - i];  // <- overwritten_while_read
  }
  out[i] = sum;
}

__global__ void missing_syncwarp(const float* in, float* out) {
  __shared__ float tile[32];
  const int lane = threadIdx.x;
  tile[lane] = in[lane];        // <- missing_syncwarp
  out[lane] = tile[31 - lane];  // <- missing_syncwarp
}

__global__ void shuffle_is_no_barrier(const float* in, float* out) {
  __shared__ float tile[32];
  const int lane = threadIdx.x;
  tile[lane] = in[lane];  // <- shuffle_is_no_barrier
  const float other = __shfl_xor_sync(FULL_WARP, in[lane], 1);
  out[lane] = tile[31 - lane] + other;  // <- shuffle_is_no_barrier
}

__global__ void ballot_is_no_barrier(const float* in, float* out) {
  __shared__ float tile[32];
  const int lane = threadIdx.x;
  tile[lane] = in[lane];  // <- ballot_is_no_barrier
  const unsigned votes = __ballot_sync(FULL_WARP, in[lane] > 3.0f);
  out[lane] = tile[lane ^ 1] + votes;  // <- ballot_is_no_barrier
}

__global__ void reduction_is_no_barrier(const float* in, float* out) {
  __shared__ float tile[32];
  const int lane = threadIdx.x;
  tile[lane] = in[lane];  // <- reduction_is_no_barrier
  const int sum = __reduce_add_sync(FULL_WARP, lane);
  out[lane] = tile[31 - lane] + sum;  // <- reduction_is_no_barrier
}

__global__ void half_warps_exchange(const float* in, float* out) {
  __shared__ float tile[32];
  const int lane = threadIdx.x;
  tile[lane] = in[lane];  // <- half_warps_exchange
  __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
  out[lane] = tile[lane ^ 16];  // <- half_warps_exchange
}

__global__ void syncwarp_across_warps(const float* in, float* out) {
  __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  tile[i] = in[i];  // <- syncwarp_across_warps
  __syncwarp();
  out[i] = tile[i ^ 32];  // <- syncwarp_across_warps
}

__global__ void everybody_writes_one_element(const float* in, float* out) {
  __shared__ float total;
  const int i = threadIdx.x;
  total = in[i];  // <- everybody_writes_one_element
  __syncthreads();
  out[i] = total;
}

__global__ void sum_without_atomic(const float* in, float* out) {
  __shared__ float total;
  const int i = threadIdx.x;
  if (i == 0) total = 0.0f;
  __syncthreads();
  total += in[i];  // <- sum_without_atomic
  __syncthreads();
  out[i] = total;
}

__global__ void atomic_and_plain_read(const float* in, float* out) {
  __shared__ float total;
  const int i = threadIdx.x;
  if (i == 0) total = 0.0f;
  __syncthreads();
  atomicAdd(&total, in[i]);  // <- atomic_and_plain_read
  out[i] = total;            // <- atomic_and_plain_read
}

__global__ void same_byte(const float* in, float* out) {
  __shared__ unsigned char flags[THREADS];
  const int i = threadIdx.x;
  flags[i / 2] = static_cast<unsigned char>(in[i]);  // <- same_byte
  __syncthreads();
  out[i] = flags[i / 2];
}

__global__ void same_half(const float* in, float* out) {
  __shared__ bf16 tile[THREADS];
  const int i = threadIdx.x;
  tile[i] = to_bf16(in[i]);                    // <- same_half
  out[i] = to_float(tile[(i + 1) % THREADS]);  // <- same_half
}

__global__ void tree_without_barrier(const float* in, float* out) {
  __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  tile[i] = in[i];
  __syncthreads();
  for (int half = THREADS / 2; half > 0; half /= 2) {
    if (i < half) tile[i] += tile[i + half];  // <- tree_without_barrier
  }
  __syncthreads();
  out[i] = tile[0];
}

__global__ void barrier_too_early(const float* in, float* out) {
  __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  __syncthreads();
  tile[i] = in[i];                    // <- barrier_too_early
  out[i] = tile[(i + 32) % THREADS];  // <- barrier_too_early
}

__global__ void wrong_double_buffer(const float* in, float* out) {
  __shared__ float tile[2][THREADS];
  const int i = threadIdx.x;
  float sum = 0.0f;
  tile[0][i] = in[i];
  for (int round = 0; round < 4; ++round) {
    __syncthreads();
    tile[round % 2][i] = in[i] + round;       // <- wrong_double_buffer
    sum += tile[round % 2][THREADS - 1 - i];  // <- wrong_double_buffer
  }
  out[i] = sum;
}

__global__ void dynamic_memory_race(const float* in, float* out) {
  float* tile = dynamic_shared<float>();
  const int i = threadIdx.x;
  tile[i] = in[i];                 // <- dynamic_memory_race
  out[i] = tile[THREADS - 1 - i];  // <- dynamic_memory_race
}

__global__ void producer_without_barrier(const float* in, float* out) {
  __shared__ float tile[32];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (warp == 0) tile[lane] = in[lane];  // <- producer_without_barrier
  __syncwarp();
  if (warp == 1) out[lane] = tile[lane];  // <- producer_without_barrier
}

__global__ void vector_over_scalars(const float* in, float* out) {
  alignas(16) __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  tile[i] = in[i];  // <- vector_over_scalars
  if (i < THREADS / 4) {
    const float4 four = reinterpret_cast<const float4*>(tile)[i];  // <- vector_over_scalars
    out[i] = four.x + four.y + four.z + four.w;
  }
}

__global__ void atomic_exclusive_or_and_plain_read(const float* in, float* out) {
  __shared__ unsigned bits;
  const int i = threadIdx.x;
  if (i == 0) bits = 0;
  __syncthreads();
  atomicXor(&bits, 1u << i % 32);  // <- atomic_exclusive_or_and_plain_read
  out[i] = in[i] + bits;           // <- atomic_exclusive_or_and_plain_read
}

}  // namespace

FaultyCases shared_race_cases() {
#define CASE(name, ...)                                                              \
  FaultyCase {                                                                       \
#name, FindingKind::shared_race, __FILE__, [] { run_in_out(name, __VA_ARGS__); } \
  }
  return {
      CASE(read_before_barrier, 1, THREADS),
      CASE(overwritten_while_read, 1, THREADS),
      CASE(missing_syncwarp, 1, 32),
      CASE(shuffle_is_no_barrier, 1, 32),
      CASE(ballot_is_no_barrier, 1, 32),
      CASE(reduction_is_no_barrier, 1, 32),
      CASE(half_warps_exchange, 1, 32),
      CASE(syncwarp_across_warps, 1, THREADS),
      CASE(everybody_writes_one_element, 1, THREADS),
      CASE(sum_without_atomic, 1, THREADS),
      CASE(atomic_and_plain_read, 1, THREADS),
      CASE(atomic_exclusive_or_and_plain_read, 1, THREADS),
      CASE(same_byte, 1, THREADS),
      CASE(same_half, 1, THREADS),
      CASE(tree_without_barrier, 1, THREADS),
      CASE(barrier_too_early, 1, THREADS),
      CASE(wrong_double_buffer, 1, THREADS),
      CASE(dynamic_memory_race, 1, THREADS, THREADS * sizeof(float)),
      CASE(producer_without_barrier, 1, THREADS),
      CASE(vector_over_scalars, 1, THREADS),
  };
#undef CASE
}

}  // namespace flashkata::corpus
