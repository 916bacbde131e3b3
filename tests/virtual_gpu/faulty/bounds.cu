// Faults: addresses that a kernel must not touch.
#include "tests/virtual_gpu/corpus_launch.hpp"

namespace flashkata::corpus {
namespace {

constexpr int COUNT = 100;  // elements, of which the last block has only a part

__global__ void tail_without_guard(const float* in, float* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[min(i, count - 1)] = in[i];  // <- tail_without_guard
}

__global__ void writes_one_past_the_end(const float* in, float* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= count) out[i] = in[min(i, count - 1)];  // <- writes_one_past_the_end
}

__global__ void negative_index(const float* in, float* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) {
    out[i] = in[i - 1];  // <- negative_index
  }
}

__global__ void vector_over_the_end(const float* in, float* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i * 4 < count + 4) {
    const float4 four = reinterpret_cast<const float4*>(in)[i];  // <- vector_over_the_end
    out[i] = four.x + four.w;
  }
}

__global__ void index_beyond_the_row(const float* in, float* out, int count) {
  __shared__ float tile[8][8];
  const int i = threadIdx.x;
  tile[i / 8][i % 8] = in[i];
  __syncthreads();
  out[i] = tile[0][count];  // <- index_beyond_the_row
}

__global__ void local_array_index(const float* in, float* out, int count) {
  float values[8];
  for (int k = 0; k < 8; ++k) values[k] = in[k];
  out[threadIdx.x] = values[count];  // <- local_array_index
}

__global__ void past_the_shared_array(const float* in, float* out, int count) {
  __shared__ float tile[THREADS];
  float* pointer = tile;
  pointer[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = pointer[threadIdx.x + count * 1000000];  // <- past_the_shared_array
}

__global__ void null_pointer(const float* in, float* out, int count) {
  const float* nowhere = count > 0 ? nullptr : in;
  out[threadIdx.x] = nowhere[threadIdx.x];  // <- null_pointer
}

__global__ void local_variable_of_another_thread(const float* in, float* out, int) {
  __shared__ const float* pointer;
  float mine = in[threadIdx.x];
  if (threadIdx.x == 0) pointer = &mine;
  __syncthreads();
  out[threadIdx.x] = *pointer;  // <- local_variable_of_another_thread
}

void run(void (*kernel)(const float*, float*, int), int argument) {
  DeviceBuffer<float> in("in", ramp(COUNT));
  DeviceBuffer<float> out("out", COUNT);
  launch(kernel, 2, THREADS, 0, Stream(), in.data(), out.data(), argument);
  synchronize();
}

__global__ void reads_host_memory(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];  // <- reads_host_memory
}

void run_with_host_pointer() {
  const std::vector<float> host = ramp(THREADS);
  DeviceBuffer<float> out("out", THREADS);
  launch(reads_host_memory, 1, THREADS, 0, Stream(), host.data(), out.data());
  synchronize();
}

__global__ void uses_a_released_buffer(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];  // <- uses_a_released_buffer
}

void run_with_released_buffer() {
  DeviceBuffer<float> out("out", THREADS);
  const float* dangling = DeviceBuffer<float>("scratch", ramp(THREADS)).data();
  launch(uses_a_released_buffer, 1, THREADS, 0, Stream(), dangling, out.data());
  synchronize();
}

__global__ void too_little_dynamic_memory(const float* in, float* out) {
  float* tile = dynamic_shared<float>();
  tile[threadIdx.x] = in[threadIdx.x];  // <- too_little_dynamic_memory
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void before_the_dynamic_memory(const float* in, float* out) {
  float* tile = dynamic_shared<float>();
  const int i = threadIdx.x;
  tile[i] = in[i];
  __syncthreads();
  out[i] = tile[i - 1];  // <- before_the_dynamic_memory
}

__global__ void misaligned_vector(const float* in, float* out) {
  const float4 four = *reinterpret_cast<const float4*>(in + threadIdx.x);  // <- misaligned_vector
  out[threadIdx.x] = four.x;
}

__global__ void misaligned_member(const float* in, float* out) {
  out[threadIdx.x] = reinterpret_cast<const float4*>(in + threadIdx.x)->x;  // <- misaligned_member
}

__global__ void misaligned_pair(const float* in, float* out) {
  alignas(16) __shared__ bf16 tile[2 * THREADS];
  const int i = threadIdx.x;
  tile[2 * i] = tile[2 * i + 1] = to_bf16(in[i]);
  __syncthreads();
  out[i] = *reinterpret_cast<const unsigned*>(tile + (i < 4 ? i : 4));  // <- misaligned_pair
}

__device__ float deep(const float* in, int depth) {
  volatile float large[1024];
  large[depth % 1024] = in[depth % 32];  // <- stack_overflow
  if (depth == 0) return large[0];
  return deep(in, depth - 1) + large[depth % 1024];
}

__global__ void stack_overflow(const float* in, float* out) { out[threadIdx.x] = deep(in, 1000); }

__global__ void division_by_zero(const float* in, float* out) {
  const int zero = static_cast<int>(in[0]);
  out[threadIdx.x] = static_cast<int>(threadIdx.x) / zero;  // <- division_by_zero
}

}  // namespace

FaultyCases bounds_cases() {
#define CASE(name, argument)                                                 \
  FaultyCase {                                                               \
#name, FindingKind::out_of_bounds, __FILE__, [] { run(name, argument); } \
  }
#define IN_OUT(name, kind, ...)                                               \
  FaultyCase {                                                                \
#name, FindingKind::kind, __FILE__, [] { run_in_out(name, __VA_ARGS__); } \
  }
  return {
      CASE(tail_without_guard, COUNT),
      CASE(writes_one_past_the_end, COUNT),
      CASE(negative_index, COUNT),
      CASE(vector_over_the_end, COUNT),
      CASE(index_beyond_the_row, 9),
      CASE(local_array_index, 9),
      CASE(past_the_shared_array, 1),
      CASE(null_pointer, 1),
      CASE(local_variable_of_another_thread, 0),
      {"reads_host_memory", FindingKind::out_of_bounds, __FILE__, run_with_host_pointer},
      {"uses_a_released_buffer", FindingKind::use_after_free, __FILE__, run_with_released_buffer},
      IN_OUT(too_little_dynamic_memory, dynamic_shared_too_small, 1, THREADS, (THREADS - 1) * sizeof(float)),
      IN_OUT(before_the_dynamic_memory, out_of_bounds, 1, THREADS, THREADS * sizeof(float)),
      IN_OUT(misaligned_vector, misaligned_access, 1, 32),
      IN_OUT(misaligned_member, misaligned_access, 1, 32),
      IN_OUT(misaligned_pair, misaligned_access, 1, THREADS),
      IN_OUT(stack_overflow, stack_overflow, 1, 32),
      IN_OUT(division_by_zero, crash, 1, 32),
  };
#undef CASE
#undef IN_OUT
}

}  // namespace flashkata::corpus
