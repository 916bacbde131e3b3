// Kernels whose speed is worth watching: one operation over and over, and a small flash attention.
#include "tests/virtual_gpu/speed_kernels.hpp"

#include "common/gpu/gpu.hpp"

namespace flashkata::speed {
namespace {

__global__ void empty_kernel() {}

__global__ void barrier_kernel(float* out, int count) {
  for (int i = 0; i < count; ++i) __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<float>(count);
}

__global__ void shuffle_kernel(float* out, int count) {
  float value = static_cast<float>(threadIdx.x);
  for (int i = 0; i < count; ++i) value = __shfl_xor_sync(FULL_WARP, value, 1);
  out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

__global__ void mma_kernel(float* out, int count) {
  const std::uint32_t a[4] = {0, 0, 0, 0};
  const std::uint32_t b[2] = {0, 0};
  float acc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int i = 0; i < count; ++i) mma_m16n8k16<bf16>(acc, a, b, acc);
  out[blockIdx.x * blockDim.x + threadIdx.x] = acc[0];
}

constexpr int HEAD_DIM = 64;
constexpr int TILE = 32;               // query rows of a block, keys of a tile
constexpr int LANES = 4;               // threads that share a query row
constexpr int THREADS = TILE * LANES;  // of a block
constexpr int KEYS = TILE / LANES;     // of one thread, in each tile
constexpr int DIMS = HEAD_DIM / LANES;

__global__ void flash_forward_kernel(const float* q, const float* k, const float* v, float* o, int length,
                                     float scale) {
  __shared__ float q_smem[TILE][HEAD_DIM + 1];
  __shared__ float k_smem[TILE][HEAD_DIM + 1];
  __shared__ float v_smem[TILE][HEAD_DIM];
  __shared__ float p_smem[TILE][TILE + 1];
  const int row = threadIdx.x / LANES;
  const int part = threadIdx.x % LANES;
  const int first_query = blockIdx.x * TILE;
  const long head = static_cast<long>(blockIdx.y) * length * HEAD_DIM;

  for (int i = threadIdx.x; i < TILE * HEAD_DIM; i += THREADS) {
    const int r = i / HEAD_DIM;
    const int d = i % HEAD_DIM;
    q_smem[r][d] = first_query + r < length ? q[head + (first_query + r) * HEAD_DIM + d] : 0.0f;
  }

  float running_max = -INFINITY;
  float running_sum = 0.0f;
  float acc[DIMS];
  for (int d = 0; d < DIMS; ++d) acc[d] = 0.0f;

  for (int first_key = 0; first_key < length; first_key += TILE) {
    __syncthreads();  // everybody has read the last tile
    for (int i = threadIdx.x; i < TILE * HEAD_DIM; i += THREADS) {
      const int r = i / HEAD_DIM;
      const int d = i % HEAD_DIM;
      const bool exists = first_key + r < length;
      k_smem[r][d] = exists ? k[head + (first_key + r) * HEAD_DIM + d] : 0.0f;
      v_smem[r][d] = exists ? v[head + (first_key + r) * HEAD_DIM + d] : 0.0f;
    }
    __syncthreads();  // the tile is complete

    float scores[KEYS];
    float tile_max = running_max;
    for (int j = 0; j < KEYS; ++j) {
      const int key = part + LANES * j;
      float dot = 0.0f;
      for (int d = 0; d < HEAD_DIM; ++d) dot += q_smem[row][d] * k_smem[key][d];
      scores[j] = first_key + key < length ? dot * scale : -INFINITY;
      tile_max = fmaxf(tile_max, scores[j]);
    }
    tile_max = fmaxf(tile_max, __shfl_xor_sync(FULL_WARP, tile_max, 1));
    tile_max = fmaxf(tile_max, __shfl_xor_sync(FULL_WARP, tile_max, 2));

    const float correction = __expf(running_max - tile_max);
    float tile_sum = 0.0f;
    for (int j = 0; j < KEYS; ++j) {
      const float p = __expf(scores[j] - tile_max);
      p_smem[row][part + LANES * j] = p;
      tile_sum += p;
    }
    tile_sum += __shfl_xor_sync(FULL_WARP, tile_sum, 1);
    tile_sum += __shfl_xor_sync(FULL_WARP, tile_sum, 2);
    running_sum = running_sum * correction + tile_sum;
    running_max = tile_max;
    __syncwarp();  // a row of p is exchanged within a warp

    for (int d = 0; d < DIMS; ++d) acc[d] *= correction;
    for (int key = 0; key < TILE; ++key) {
      const float p = p_smem[row][key];
      for (int d = 0; d < DIMS; ++d) acc[d] += p * v_smem[key][part + LANES * d];
    }
    __syncwarp();  // p has been read
  }

  if (first_query + row < length) {
    for (int d = 0; d < DIMS; ++d) {
      o[head + (first_query + row) * HEAD_DIM + part + LANES * d] = acc[d] / running_sum;
    }
  }
}

}  // namespace

void run_empty(int blocks, int threads) { launch(empty_kernel, blocks, threads, 0, Stream()); }

void run_barriers(float* out, int blocks, int threads, int count) {
  launch(barrier_kernel, blocks, threads, 0, Stream(), out, count);
}

void run_shuffles(float* out, int blocks, int threads, int count) {
  launch(shuffle_kernel, blocks, threads, 0, Stream(), out, count);
}

void run_matrix_products(float* out, int blocks, int threads, int count) {
  launch(mma_kernel, blocks, threads, 0, Stream(), out, count);
}

void run_flash_forward(const float* q, const float* k, const float* v, float* o, int heads, int length) {
  const dim3 grid(ceil_div(length, TILE), heads);
  launch(flash_forward_kernel, grid, THREADS, 0, Stream(), q, k, v, o, length, 1.0f / 8.0f);
}

}  // namespace flashkata::speed
