// Correct kernels whose use of memory is unusual: no finding may come from them.
#include "tests/virtual_gpu/corpus_launch.hpp"

namespace flashkata::corpus {
namespace {

__global__ void overlapping_reads(const float* in, float* out) {
  __shared__ float tile[THREADS + 2];
  const int i = threadIdx.x;
  tile[i + 1] = in[i];
  if (i == 0) tile[0] = tile[THREADS + 1] = 0.0f;
  __syncthreads();
  out[i] = tile[i] + tile[i + 1] + tile[i + 2];  // each element is read by three threads
}

__global__ void padding_is_never_read(const float* in, float* out) {
  __shared__ float tile[8][9];
  const int i = threadIdx.x;
  tile[i / 8][i % 8] = in[i];
  __syncthreads();
  out[i] = tile[i % 8][i / 8];
}

__global__ void neighbouring_bytes(const float* in, float* out) {
  __shared__ unsigned char tile[THREADS];
  const int i = threadIdx.x;
  tile[i] = static_cast<unsigned char>(in[i]);
  __syncthreads();
  out[i] = tile[THREADS - 1 - i];
}

__global__ void neighbouring_halves(const float* in, float* out) {
  __shared__ bf16 tile[THREADS];
  const int i = threadIdx.x;
  tile[i] = to_bf16(in[i]);
  __syncthreads();
  tile[i].x += 0x80;  // twice the value, for a normal number
  out[i] = to_float(tile[i]);
}

__global__ void atomics_on_shared_memory(const float* in, float* out) {
  __shared__ int histogram[4];
  const int i = threadIdx.x;
  if (i < 4) histogram[i] = 0;
  __syncthreads();
  atomicAdd(&histogram[static_cast<int>(in[i]) % 4], 1);
  __syncthreads();
  out[i] = histogram[i % 4];
}

__global__ void partial_tile(const float* in, float* out) {
  __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  const int count = 50;
  tile[i] = i < count ? in[i] : 0.0f;
  __syncthreads();
  out[i] = tile[THREADS - 1 - i];
}

__global__ void block_reads_its_own_results(const float* in, float* out) {
  const int i = threadIdx.x;
  out[i] = in[i] + 1.0f;
  __syncthreads();
  const float other = out[THREADS - 1 - i];
  __syncthreads();
  out[i] = other;
}

__global__ void vector_loads_and_stores(const float* in, float* out) {
  const int i = threadIdx.x;
  if (i < THREADS / 4) {
    float4 four = reinterpret_cast<const float4*>(in)[i];
    four.x += 1.0f;
    four.w += 1.0f;
    reinterpret_cast<float4*>(out)[i] = four;
  }
}

__global__ void copy_pipeline(const float* in, float* out) {
  alignas(16) __shared__ float tile[2][THREADS];
  const int i = threadIdx.x;
  const bool copies = i < THREADS / 4;
  if (copies) cp_async_16(&tile[0][4 * i], &in[4 * i]);
  cp_async_commit();
  float sum = 0.0f;
  for (int round = 0; round < 4; ++round) {
    if (copies && round < 3) cp_async_16(&tile[(round + 1) % 2][4 * i], &in[4 * i]);
    cp_async_commit();  // the last group is empty
    cp_async_wait<1>();
    __syncthreads();  // the copies of all threads have landed
    sum += tile[round % 2][THREADS - 1 - i];
    __syncthreads();  // this half may be overwritten
  }
  out[i] = sum;
}

__global__ void copies_with_zero_fill(const float* in, float* out) {
  alignas(16) __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  const float* beyond = in + 1000000;
  if (i < 4) cp_async_16(&tile[4 * i], &in[4 * i], 4 * i);  // 0, 1, 2, 3 elements
  if (i >= 4 && i < THREADS / 4) cp_async_16(&tile[4 * i], beyond, false);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[i] = tile[i];
}

__global__ void own_copies_need_no_barrier(const float* in, float* out) {
  __shared__ float tile[THREADS];
  const int i = threadIdx.x;
  cp_async_4(&tile[i], &in[i]);
  cp_async_commit();
  cp_async_wait<0>();
  out[i] = tile[i];
}

__constant__ const float TABLE[4] = {1.0f, 2.0f, 4.0f, 8.0f};

__global__ void constants_and_parameters(const float* in, float* out) {
  const int i = threadIdx.x;
  out[i] = TABLE[i % 4] + in[i];
}

__device__ float block_sum(float value) {
  __shared__ float partial[THREADS / 32];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(FULL_WARP, value, distance);
  __syncthreads();  // the sum before this one has been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < THREADS / 32; ++warp) sum += partial[warp];
  return sum;
}

__global__ void shared_memory_in_a_function(const float* in, float* out) {
  const float first = block_sum(in[threadIdx.x]);
  const float second = block_sum(1.0f);
  out[threadIdx.x] = first + second;
}

__global__ void atomics_between_blocks(float* sum, float* out) {
  atomicAdd(&sum[threadIdx.x % 4], 1.0f);
  out[blockIdx.x * blockDim.x + threadIdx.x] = 0.0f;
}

bool run_atomics_between_blocks() {
  constexpr int BLOCKS = 5;
  DeviceBuffer<float> sum("sum", 4);
  DeviceBuffer<float> out("out", BLOCKS * THREADS);
  sum.fill_zero();
  launch(atomics_between_blocks, BLOCKS, THREADS, 0, Stream(), sum.data(), out.data());
  synchronize();
  return all_equal(sum.download(), [](int) { return BLOCKS * THREADS / 4; });
}

/// The last block to take a ticket adds up what all blocks wrote before they took theirs.
__global__ void last_block_adds_up(unsigned* ticket, float* partial, float* out) {
  __shared__ bool is_last;
  const int i = threadIdx.x;
  partial[blockIdx.x * THREADS + i] = 1.0f;
  __threadfence();
  __syncthreads();
  if (i == 0) is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  float sum = 0.0f;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += partial[block * THREADS + i];
  out[i] = sum;
}

bool run_last_block(void (*kernel)(unsigned*, float*, float*)) {
  constexpr int BLOCKS = 6;
  DeviceBuffer<unsigned> ticket("ticket", 1);
  DeviceBuffer<float> partial("partial", BLOCKS * THREADS);
  DeviceBuffer<float> out("out", THREADS);
  ticket.fill_zero();
  launch(kernel, BLOCKS, THREADS, 0, Stream(), ticket.data(), partial.data(), out.data());
  synchronize();
  return all_equal(out.download(), [](int) { return BLOCKS; });
}

/// The same with the functions for the whole system, and a counter that is 0 again afterwards.
__global__ void last_block_resets_the_counter(unsigned* ticket, float* partial, float* out) {
  __shared__ bool is_last;
  const int i = threadIdx.x;
  __stcg(&partial[blockIdx.x * THREADS + i], 1.0f);
  __threadfence_system();
  __syncthreads();
  if (i == 0) is_last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence_system();
  float sum = 0.0f;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += __ldcg(&partial[block * THREADS + i]);
  out[i] = sum;
}

template <int WIDTH>
__global__ void template_with_views(View<const float, 2> in, View<float, 2> out) {
  __shared__ float row[WIDTH];
  const int col = threadIdx.x;
  row[col] = in(blockIdx.x, col);
  __syncthreads();
  out(blockIdx.x, col) = row[WIDTH - 1 - col];
}

bool run_template_with_views() {
  constexpr int ROWS = 3;
  constexpr int COLS = 32;
  DeviceBuffer<float> in("in", ramp(ROWS * COLS));
  DeviceBuffer<float> out("out", ROWS * COLS);
  const Shape<2> shape{ROWS, COLS};
  launch(template_with_views<COLS>, ROWS, COLS, 0, Stream(), in.view(shape), out.view(shape));
  synchronize();
  return all_equal(out.download(), [](int i) { return i / COLS * COLS + COLS - 1 - i % COLS; });
}

}  // namespace

CleanCases memory_clean_cases() {
#define CASE(name, want)                                                                    \
  CleanCase {                                                                               \
#name, __FILE__, [] { return all_equal(run_in_out(name), [](int i) { return want; }); } \
  }
  return {
      CASE(overlapping_reads, (i > 0 ? i - 1 : 0) + i + (i < THREADS - 1 ? i + 1 : 0)),
      CASE(padding_is_never_read, i % 8 * 8 + i / 8),
      CASE(neighbouring_bytes, THREADS - 1 - i),
      CASE(neighbouring_halves, i == 0 ? 0x1p-126f : 2 * i),
      CASE(atomics_on_shared_memory, 0 * i + THREADS / 4),
      CASE(partial_tile, THREADS - 1 - i < 50 ? THREADS - 1 - i : 0),
      CASE(block_reads_its_own_results, THREADS - i),
      CASE(vector_loads_and_stores, i + (i % 4 == 0 || i % 4 == 3 ? 1 : 0)),
      CASE(copy_pipeline, 4 * (THREADS - 1 - i)),
      CASE(copies_with_zero_fill, i < 16 && i % 4 < i / 4 ? i : 0),
      CASE(own_copies_need_no_barrier, i),
      CASE(constants_and_parameters, (1 << i % 4) + i),
      CASE(shared_memory_in_a_function, 0 * i + THREADS * (THREADS - 1) / 2 + THREADS),
      {"atomics_between_blocks", __FILE__, run_atomics_between_blocks},
      {"last_block_adds_up", __FILE__, [] { return run_last_block(last_block_adds_up); }},
      {"last_block_resets_the_counter", __FILE__, [] { return run_last_block(last_block_resets_the_counter); }},
      {"template_with_views", __FILE__, run_template_with_views},
  };
#undef CASE
}

}  // namespace flashkata::corpus
