// What the fp32 backward kernels of 3.04 and of phase 4 have in common: how the work of a block is cut, how tiles come
// to shared memory, and the products of a tile.
#pragma once

#include <limits>

#include "common/gpu/gpu.hpp"
#include "solutions/hidden/fp32_vector.cuh"

namespace flashkata::backward_tile {

constexpr int LANES = 16;   // threads that share rows
constexpr int PADDING = 4;  // floats after a row in shared memory: neighbouring rows begin in different banks
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// How the work is cut, by the width of a row.
template <int HEAD_DIM>
struct Tiling {
  static constexpr int GROUPS = 8;                        // of LANES threads in a block
  static constexpr int BLOCKS = HEAD_DIM == 128 ? 2 : 3;  // that an SM holds at a time
  static constexpr int BLOCK_Q = 32;                      // queries in a tile
  static constexpr int KV = 64;                           // keys in a tile
  static constexpr int THREADS = GROUPS * LANES;
  static constexpr int STRIDE = HEAD_DIM + PADDING;  // of q_smem, do_smem, k_smem and v_smem
  static constexpr int PAIR_STRIDE = KV + PADDING;
  static constexpr int SHARED_FLOATS = 2 * (BLOCK_Q + KV) * STRIDE + BLOCK_Q * PAIR_STRIDE + 2 * BLOCK_Q;
  static constexpr int ROWS = BLOCK_Q / GROUPS;  // queries of a thread: group, group + GROUPS, ...
  static constexpr int KEYS = KV / LANES;        // its keys in S and dP: lane, lane + 16, ...
  static constexpr int OWNED = KV / GROUPS;      // its keys in dK and dV, four neighbours at a time
  static constexpr int DIMS = HEAD_DIM / LANES;  // its channels, in vectors of VECTOR neighbours
  static constexpr int VECTOR = DIMS < 4 ? DIMS : 4;
};

// Which group does a thread belong to, and which of the group's threads is it? The two groups of a warp alternate:
// threads that read the same address are neighbours then, and one turn in shared memory serves both.
KATA_DEVICE int group_of_thread() { return static_cast<int>(threadIdx.x) / 32 * 2 + static_cast<int>(threadIdx.x) % 2; }
KATA_DEVICE int lane_of_thread() { return static_cast<int>(threadIdx.x) % 32 / 2; }

// Starts the copy of rows first .. first + COUNT - 1 of one head to shared memory; rows from `limit` on become 0.
template <int HEAD_DIM, int COUNT>
KATA_DEVICE void load_async(float* smem, const float* head, Index row_stride, int first, int limit) {
  constexpr int VECTORS = HEAD_DIM / 4;  // of 16 bytes, in a row
  constexpr int ROWS_PER_STEP = Tiling<HEAD_DIM>::THREADS / VECTORS;
  static_assert(COUNT % ROWS_PER_STEP == 0, "every thread copies the same number of vectors");
  const int thread_row = static_cast<int>(threadIdx.x) / VECTORS;
  const int column = static_cast<int>(threadIdx.x) % VECTORS * 4;
  const float* source = head + (first + thread_row) * row_stride + column;
#pragma unroll
  for (int step = 0; step < COUNT; step += ROWS_PER_STEP) {
    cp_async_16(smem + (thread_row + step) * Tiling<HEAD_DIM>::STRIDE + column, source + step * row_stride,
                first + thread_row + step < limit);
  }
}

// Which channel is number `dim` of a thread's?
template <int HEAD_DIM>
KATA_DEVICE int channel(int dim, int lane) {
  constexpr int VECTOR = Tiling<HEAD_DIM>::VECTOR;
  return dim / VECTOR * VECTOR * LANES + lane * VECTOR + dim % VECTOR;
}

// result = rows keys^T, both [.., D] in shared memory: S from Q and K, dP from dO and V.
template <int HEAD_DIM>
KATA_DEVICE void multiply(float (&result)[Tiling<HEAD_DIM>::ROWS][Tiling<HEAD_DIM>::KEYS], const float* rows_smem,
                          const float* keys_smem, int group, int lane) {
  using Cut = Tiling<HEAD_DIM>;
#pragma unroll
  for (int row = 0; row < Cut::ROWS; ++row) {
#pragma unroll
    for (int key = 0; key < Cut::KEYS; ++key) result[row][key] = 0.0f;
  }
#pragma unroll 4
  for (int column = 0; column < HEAD_DIM; column += 4) {
    float4 key_four[Cut::KEYS];
#pragma unroll
    for (int key = 0; key < Cut::KEYS; ++key) {
      key_four[key] = *reinterpret_cast<const float4*>(keys_smem + (lane + key * LANES) * Cut::STRIDE + column);
    }
#pragma unroll
    for (int row = 0; row < Cut::ROWS; ++row) {
      const float4 row_four =
          *reinterpret_cast<const float4*>(rows_smem + (group + row * Cut::GROUPS) * Cut::STRIDE + column);
#pragma unroll
      for (int key = 0; key < Cut::KEYS; ++key) result[row][key] = dot(row_four, key_four[key], result[row][key]);
    }
  }
}

// Which key of the tile is number `key` of those whose dK and dV a thread keeps?
template <int HEAD_DIM>
KATA_DEVICE int owned_key(int key, int group) {
  return key / 4 * 4 * Tiling<HEAD_DIM>::GROUPS + group * 4 + key % 4;
}

// sum += pairs^T rows: dV from P and dO, dK from dS and Q.
// A forbidden pair holds 0, but what it would be multiplied with may be NaN, and 0 times NaN is NaN: with MASKED it is
// left out.
template <int HEAD_DIM, bool MASKED>
KATA_DEVICE void add_to_keys(float (&sum)[Tiling<HEAD_DIM>::OWNED][Tiling<HEAD_DIM>::DIMS], const float* pair_smem,
                             const float* rows_smem, int group, int lane) {
  using Cut = Tiling<HEAD_DIM>;
#pragma unroll 4
  for (int row = 0; row < Cut::BLOCK_Q; ++row) {
    float pair[Cut::OWNED];
    float reg[Cut::DIMS];
#pragma unroll
    for (int key = 0; key < Cut::OWNED; key += 4) {
      load_vector<4>(&pair[key], pair_smem + row * Cut::PAIR_STRIDE + owned_key<HEAD_DIM>(key, group));
    }
#pragma unroll
    for (int dim = 0; dim < Cut::DIMS; dim += Cut::VECTOR) {
      load_vector<Cut::VECTOR>(&reg[dim], rows_smem + row * Cut::STRIDE + channel<HEAD_DIM>(dim, lane));
    }
#pragma unroll
    for (int key = 0; key < Cut::OWNED; ++key) {
      if (MASKED && pair[key] == 0.0f) continue;
#pragma unroll
      for (int dim = 0; dim < Cut::DIMS; ++dim) sum[key][dim] = fmaf(pair[key], reg[dim], sum[key][dim]);
    }
  }
}

// sum += pairs keys: dQ from dS and K.
template <int HEAD_DIM, bool MASKED>
KATA_DEVICE void add_to_queries(float (&sum)[Tiling<HEAD_DIM>::ROWS][Tiling<HEAD_DIM>::DIMS], const float* pair_smem,
                                const float* keys_smem, int group, int lane) {
  using Cut = Tiling<HEAD_DIM>;
#pragma unroll 2
  for (int key = 0; key < Cut::KV; key += 4) {
    float reg[4][Cut::DIMS];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int dim = 0; dim < Cut::DIMS; dim += Cut::VECTOR) {
        load_vector<Cut::VECTOR>(&reg[k][dim], keys_smem + (key + k) * Cut::STRIDE + channel<HEAD_DIM>(dim, lane));
      }
    }
#pragma unroll
    for (int row = 0; row < Cut::ROWS; ++row) {
      float pair[4];
      load_vector<4>(pair, pair_smem + (group + row * Cut::GROUPS) * Cut::PAIR_STRIDE + key);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (MASKED && pair[k] == 0.0f) continue;
#pragma unroll
        for (int dim = 0; dim < Cut::DIMS; ++dim) sum[row][dim] = fmaf(pair[k], reg[k][dim], sum[row][dim]);
      }
    }
  }
}

}  // namespace flashkata::backward_tile
