// Faults: cp.async, read too early or started too early.
#include "tests/virtual_gpu/corpus_launch.hpp"

namespace flashkata::corpus {
namespace {

__global__ void read_without_wait(const float* in, float* out) {
  alignas(16) __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  cp_async_4(&tile[i], &in[i]);  // <- read_without_wait
  cp_async_commit();
  __syncthreads();
  out[i] = tile[i];  // <- read_without_wait
}

__global__ void waits_for_too_few(const float* in, float* out) {
  alignas(16) __shared__ float tile[2][THREADS];
  const int i = threadIdx.x;
  cp_async_4(&tile[0][i], &in[i]);
  cp_async_commit();
  cp_async_4(&tile[1][i], &in[i]);  // <- waits_for_too_few
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  out[i] = tile[0][i];
  out[i] += tile[1][i];  // <- waits_for_too_few
}

__global__ void never_committed(const float* in, float* out) {
  alignas(16) __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  cp_async_4(&tile[i], &in[i]);  // <- never_committed
  cp_async_wait<0>();
  __syncthreads();
  out[i] = tile[i];  // <- never_committed
}

__global__ void wait_before_commit(const float* in, float* out) {
  alignas(16) __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  if (i < THREADS / 4) cp_async_16(&tile[4 * i], &in[4 * i]);  // <- wait_before_commit
  cp_async_wait<0>();
  cp_async_commit();
  __syncthreads();
  out[i] = tile[i];  // <- wait_before_commit
}

__global__ void wait_without_barrier(const float* in, float* out) {
  alignas(16) __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  cp_async_4(&tile[i], &in[i]);  // <- wait_without_barrier
  cp_async_commit();
  cp_async_wait<0>();
  out[i] = tile[THREADS - 1 - i];  // <- wait_without_barrier
}

__global__ void started_while_still_read(const float* in, float* out) {
  alignas(16) __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  float sum = 0.0f;
  for (int round = 0; round < 3; ++round) {
    cp_async_4(&tile[i], &in[i]);  // <- started_while_still_read
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    sum += tile[THREADS - 1 - i];  // <- started_while_still_read
  }
  out[i] = sum;
}

__global__ void written_while_in_flight(const float* in, float* out) {
  alignas(16) __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  cp_async_4(&tile[i], &in[i]);  // <- written_while_in_flight
  cp_async_commit();
  tile[i] = 0.0f;  // <- written_while_in_flight
  cp_async_wait<0>();
  __syncthreads();
  out[i] = tile[i];
}

__global__ void misaligned_copy(const float* in, float* out) {
  alignas(16) __shared__ float tile[4 * 32 + 4];
  const int i = threadIdx.x;
  cp_async_16(&tile[4 * i + 1], &in[0]);  // <- misaligned_copy
  cp_async_commit();
  cp_async_wait<0>();
  out[i] = 0.0f;
}

__global__ void copy_beyond_the_buffer(const float* in, float* out) {
  alignas(16) __shared__ float tile[4 * 32];
  const int i = threadIdx.x;
  cp_async_16(&tile[4 * i], &in[4 * i]);  // <- copy_beyond_the_buffer
  cp_async_commit();
  cp_async_wait<0>();
  out[i] = tile[4 * i];
}

__global__ void copy_into_global_memory(const float* in, float* out) {
  cp_async_4(&out[threadIdx.x], &in[threadIdx.x]);  // <- copy_into_global_memory
  cp_async_commit();
  cp_async_wait<0>();
}

}  // namespace

FaultyCases async_copy_cases() {
#define CASE(name, kind, threads)                                            \
  FaultyCase {                                                               \
#name, FindingKind::kind, __FILE__, [] { run_in_out(name, 1, threads); } \
  }
  return {
      CASE(read_without_wait, async_copy_not_waited, THREADS),
      CASE(waits_for_too_few, async_copy_not_waited, THREADS),
      CASE(never_committed, async_copy_not_waited, THREADS),
      CASE(wait_before_commit, async_copy_not_waited, THREADS),
      CASE(wait_without_barrier, shared_race, THREADS),
      CASE(started_while_still_read, shared_race, THREADS),
      CASE(written_while_in_flight, async_copy_not_waited, THREADS),
      CASE(misaligned_copy, misaligned_access, 32),
      CASE(copy_beyond_the_buffer, out_of_bounds, 32),
      CASE(copy_into_global_memory, wrong_memory, 32),
  };
#undef CASE
}

}  // namespace flashkata::corpus
