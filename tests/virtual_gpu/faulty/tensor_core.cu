// Faults: mma and ldmatrix.
#include "tests/virtual_gpu/corpus_launch.hpp"

namespace flashkata::corpus {
namespace {

constexpr int ROWS = 16;
constexpr int COLS = 16;

/// Fills a [16, STRIDE] tile with small numbers; 32 threads, 8 elements each.
template <int STRIDE>
__device__ void fill_tile(bf16* tile, const float* in) {
  for (int i = threadIdx.x % 32; i < ROWS * COLS; i += 32) tile[i / COLS * STRIDE + i % COLS] = to_bf16(in[i % 32]);
}

__device__ int matrix_row(int lane) { return lane % 16; }
__device__ int matrix_col(int lane) { return lane / 16 * 8; }

__global__ void ldmatrix_before_barrier(const float* in, float* out) {
  alignas(16) __shared__ bf16 tile[ROWS][COLS];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    for (int i = lane; i < ROWS * COLS; i += 32) {
      tile[i / COLS][i % COLS] = to_bf16(in[lane]);  // <- ldmatrix_before_barrier
    }
  }
  std::uint32_t fragment[4];
  ldmatrix_x4(fragment, &tile[matrix_row(lane)][matrix_col(lane)]);  // <- ldmatrix_before_barrier
  out[threadIdx.x] = fragment[0];
}

__global__ void ldmatrix_misaligned_rows(const float* in, float* out) {
  constexpr int STRIDE = COLS + 4;  // rows of 40 bytes
  alignas(16) __shared__ bf16 tile[ROWS * STRIDE];
  const int lane = threadIdx.x;
  fill_tile<STRIDE>(tile, in);
  __syncthreads();
  std::uint32_t fragment[4];
  ldmatrix_x4(fragment, tile + matrix_row(lane) * STRIDE + matrix_col(lane));  // <- ldmatrix_misaligned_rows
  out[lane] = fragment[0];
}

__global__ void ldmatrix_from_global_memory(const float* in, float* out) {
  std::uint32_t fragment[4];
  ldmatrix_x4(fragment, in + threadIdx.x / 4 * 4);  // <- ldmatrix_from_global_memory
  out[threadIdx.x] = fragment[0];
}

__global__ void ldmatrix_of_unwritten_rows(const float* in, float* out) {
  alignas(16) __shared__ bf16 tile[ROWS][COLS];
  const int lane = threadIdx.x;
  for (int i = lane; i < ROWS / 2 * COLS; i += 32) tile[i / COLS][i % COLS] = to_bf16(in[lane]);
  __syncthreads();
  std::uint32_t fragment[4];
  ldmatrix_x4_trans(fragment, &tile[matrix_row(lane)][matrix_col(lane)]);  // <- ldmatrix_of_unwritten_rows
  out[lane] = fragment[0];
}

__global__ void ldmatrix_beyond_the_memory(const float* in, float* out) {
  bf16* tile = dynamic_shared<bf16>();
  const int lane = threadIdx.x;
  fill_tile<COLS>(tile, in);
  __syncthreads();
  std::uint32_t fragment[4];
  ldmatrix_x4(fragment, tile + (matrix_row(lane) + 1) * COLS + matrix_col(lane));  // <- ldmatrix_beyond_the_memory
  out[lane] = fragment[0];
}

__global__ void mma_in_a_partial_warp(const float* in, float* out) {
  const std::uint32_t a[4] = {0, 0, 0, 0};
  const std::uint32_t b[2] = {0, 0};
  float acc[4] = {in[threadIdx.x], 0.0f, 0.0f, 0.0f};
  mma_m16n8k16<fp16>(acc, a, b, acc);  // <- mma_in_a_partial_warp
  out[threadIdx.x] = acc[0];
}

__global__ void mma_in_a_branch(const float* in, float* out) {
  const std::uint32_t a[4] = {0, 0, 0, 0};
  const std::uint32_t b[2] = {0, 0};
  float acc[4] = {in[threadIdx.x], 0.0f, 0.0f, 0.0f};
  if (threadIdx.x < 24) mma_m16n8k16<bf16>(acc, a, b, acc);  // <- mma_in_a_branch
  out[threadIdx.x] = acc[0];
}

__global__ void ldmatrix_after_exit(const float* in, float* out) {
  alignas(16) __shared__ bf16 tile[ROWS * COLS];
  const int lane = threadIdx.x;
  fill_tile<COLS>(tile, in);
  __syncthreads();
  if (lane >= 16) return;  // "the x2 form needs only 16 addresses"
  std::uint32_t fragment[2];
  ldmatrix_x2(fragment, tile + lane * COLS);  // <- ldmatrix_after_exit
  out[lane] = fragment[0];
}

__global__ void tile_overwritten_before_ldmatrix(const float* in, float* out) {
  alignas(16) __shared__ bf16 tile[ROWS][COLS];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  float sum = 0.0f;
  for (int round = 0; round < 3; ++round) {
    for (int i = threadIdx.x; i < ROWS * COLS; i += THREADS) {
      tile[i / COLS][i % COLS] = to_bf16(in[lane] + round);  // <- tile_overwritten_before_ldmatrix
    }
    __syncthreads();
    std::uint32_t fragment[4];
    ldmatrix_x4(fragment, &tile[matrix_row(lane)][matrix_col(lane)]);  // <- tile_overwritten_before_ldmatrix
    sum += fragment[0] + warp;
  }
  out[threadIdx.x] = sum;
}

}  // namespace

FaultyCases tensor_core_cases() {
#define CASE(name, kind, ...)                                                    \
  FaultyCase {                                                                   \
#name, FindingKind::kind, __FILE__, [] { run_in_out(name, 1, __VA_ARGS__); } \
  }
  return {
      CASE(ldmatrix_before_barrier, shared_race, THREADS),
      CASE(ldmatrix_misaligned_rows, misaligned_access, 32),
      CASE(ldmatrix_from_global_memory, wrong_memory, 32),
      CASE(ldmatrix_of_unwritten_rows, uninitialised_read, 32),
      CASE(ldmatrix_beyond_the_memory, dynamic_shared_too_small, 32, ROWS * COLS * sizeof(bf16)),
      CASE(mma_in_a_partial_warp, absent_lane, 48),
      CASE(mma_in_a_branch, absent_lane, 32),
      CASE(ldmatrix_after_exit, absent_lane, 32),
      CASE(tile_overwritten_before_ldmatrix, shared_race, THREADS),
  };
#undef CASE
}

}  // namespace flashkata::corpus
