// Faults: values that nobody wrote.
#include "tests/virtual_gpu/corpus_launch.hpp"

namespace flashkata::corpus {
namespace {

__global__ void last_row_never_written(const float* in, float* out) {
  __shared__ float tile[8][8];
  const int i = threadIdx.x;
  if (i < 56) tile[i / 8][i % 8] = in[i];
  __syncthreads();
  out[i] = tile[i % 8][i / 8];  // <- last_row_never_written
}

/// Block 1 finds what block 0 left; on a GPU that is sometimes so, too.
__global__ void from_the_block_before(const float* in, float* out) {
  __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  if (blockIdx.x == 0) tile[i] = in[i];
  __syncthreads();
  out[blockIdx.x * THREADS + i] = tile[THREADS - 1 - i];  // <- from_the_block_before
}

__global__ void accumulator_not_cleared(const float* in, float* out) {
  __shared__ float total;
  const int i = threadIdx.x;
  atomicAdd(&total, in[i]);  // <- accumulator_not_cleared
  __syncthreads();
  out[i] = total;
}

__global__ void output_used_as_accumulator(const float* in, float* out) {
  out[threadIdx.x] += in[threadIdx.x];  // <- output_used_as_accumulator
}

__global__ void atomic_into_uninitialised(const float* in, float* out) {
  atomicAdd(&out[threadIdx.x % 4], in[threadIdx.x]);  // <- atomic_into_uninitialised
}

__global__ void dynamic_padding_read(const float* in, float* out) {
  float* tile = dynamic_shared<float>();  // [8, 9], of which the last column is padding
  const int i = threadIdx.x;
  tile[i / 8 * 9 + i % 8] = in[i];
  __syncthreads();
  float sum = 0.0f;
  for (int k = 0; k < 9; ++k) sum += tile[i / 8 * 9 + k];  // <- dynamic_padding_read
  out[i] = sum;
}

__global__ void vector_half_written(const float* in, float* out) {
  alignas(16) __shared__ float tile[4 * THREADS];
  const int i = threadIdx.x;
  tile[4 * i] = in[i];
  tile[4 * i + 1] = in[i];
  __syncthreads();
  const float4 four = reinterpret_cast<const float4*>(tile)[i];  // <- vector_half_written
  out[i] = four.x + four.z;
}

}  // namespace

FaultyCases initialisation_cases() {
#define CASE(name, ...)                                                                     \
  FaultyCase {                                                                              \
#name, FindingKind::uninitialised_read, __FILE__, [] { run_in_out(name, __VA_ARGS__); } \
  }
  return {
      CASE(last_row_never_written, 1, THREADS),    CASE(from_the_block_before, 2, THREADS),
      CASE(accumulator_not_cleared, 1, THREADS),   CASE(output_used_as_accumulator, 1, THREADS),
      CASE(atomic_into_uninitialised, 1, THREADS), CASE(dynamic_padding_read, 1, THREADS, 8 * 9 * sizeof(float)),
      CASE(vector_half_written, 1, THREADS),
  };
#undef CASE
}

}  // namespace flashkata::corpus
