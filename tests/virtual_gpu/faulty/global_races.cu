// Faults: one address in global memory, several blocks (or threads of a block), nothing that orders them.
#include "tests/virtual_gpu/corpus_launch.hpp"

namespace flashkata::corpus {
namespace {

__global__ void plus_equals_between_blocks(float* sum, float* out) {
  const int i = threadIdx.x;
  sum[i] += 1.0f;  // <- plus_equals_between_blocks
  if (blockIdx.x == 0) out[i] = 0.0f;
}

__global__ void two_blocks_write_one_element(float* sum, float* out) {
  if (threadIdx.x == 0) sum[0] = blockIdx.x;  // <- two_blocks_write_one_element
  if (blockIdx.x == 0) out[threadIdx.x] = 0.0f;
}

__global__ void reads_the_neighbours_result(float* sum, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int count = gridDim.x * blockDim.x;
  sum[i] = i;                   // <- reads_the_neighbours_result
  out[i] = sum[count - 1 - i];  // <- reads_the_neighbours_result
}

__global__ void race_within_a_block(float* sum, float* out) {
  const int i = threadIdx.x;
  sum[i] = i;            // <- race_within_a_block
  out[i] = sum[i ^ 32];  // <- race_within_a_block
}

__global__ void atomic_and_plain_store(float* sum, float* out) {
  if (blockIdx.x == 0) {
    sum[0] = 0.0f;  // <- atomic_and_plain_store
    out[threadIdx.x] = 0.0f;
  }
  atomicAdd(&sum[0], 1.0f);  // <- atomic_and_plain_store
}

__global__ void atomic_of_64_bits_and_plain_store(float* sum, float* out) {
  auto* element = reinterpret_cast<unsigned long long*>(sum);
  if (blockIdx.x == 0) {
    __stcg(element, 0ull);  // <- atomic_of_64_bits_and_plain_store
    out[threadIdx.x] = 0.0f;
  }
  atomicCAS(element, 0ull, 1ull);  // <- atomic_of_64_bits_and_plain_store
}

__global__ void past_the_caches(float* sum, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int count = gridDim.x * blockDim.x;
  __stcs(&sum[i], 1.0f);                 // <- past_the_caches
  out[i] = __ldcg(&sum[count - 1 - i]);  // <- past_the_caches
}

/// The last block to finish adds up what the others wrote, but nobody fenced.
__global__ void last_block_without_fence(float* sum, float* out) {
  __shared__ bool is_last;
  sum[1 + blockIdx.x] = blockIdx.x;  // <- last_block_without_fence
  if (threadIdx.x == 0) is_last = atomicAdd(&sum[0], 1.0f) == gridDim.x - 1;
  __syncthreads();
  if (is_last && threadIdx.x == 0) {
    out[0] = sum[1] + sum[2];  // <- last_block_without_fence
  }
}

void run(void (*kernel)(float*, float*), int blocks, int threads) {
  const std::size_t count = static_cast<std::size_t>(blocks * THREADS);
  DeviceBuffer<float> sum("sum", count);
  DeviceBuffer<float> out("out", count);
  sum.fill_zero();
  launch(kernel, blocks, threads, 0, Stream(), sum.data(), out.data());
  synchronize();
}

}  // namespace

FaultyCases global_race_cases() {
#define CASE(name, blocks, threads)                                               \
  FaultyCase {                                                                    \
#name, FindingKind::global_race, __FILE__, [] { run(name, blocks, threads); } \
  }
  return {
      CASE(plus_equals_between_blocks, 4, THREADS),
      CASE(two_blocks_write_one_element, 4, THREADS),
      CASE(reads_the_neighbours_result, 2, THREADS),
      CASE(race_within_a_block, 1, THREADS),
      CASE(atomic_and_plain_store, 4, THREADS),
      CASE(last_block_without_fence, 2, 1),
      CASE(atomic_of_64_bits_and_plain_store, 4, THREADS),
      CASE(past_the_caches, 2, THREADS),
  };
#undef CASE
}

}  // namespace flashkata::corpus
