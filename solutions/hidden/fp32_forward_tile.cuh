// What the fp32 forward kernels of 2.04 and of phase 4 have in common: how the work of a block is cut, how tiles come
// to shared memory, and the two products of a tile.
#pragma once

#include <limits>

#include "common/gpu/gpu.hpp"
#include "solutions/hidden/fp32_vector.cuh"

namespace flashkata::forward_tile {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;
constexpr int ROWS = 8;  // neighbouring queries, of each thread
constexpr int KV = 64;   // keys in a tile
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

// How the work is cut, by the width of a row. A thread's sums have to fit into its registers: 8 x 8 scores and up to
// 8 x 8 outputs do, and rows of 128 are spread over more lanes.
template <int HEAD_DIM>
struct Tiling {
  static constexpr int LANES = HEAD_DIM == 128 ? 16 : 8;  // threads that share rows
  static constexpr int GROUPS = 32 / LANES;               // of a warp
  static constexpr int BLOCKS = 2;  // that an SM holds at a time: up to 255 registers a thread, 113 KiB a block
  static constexpr int BLOCK_Q = WARPS * GROUPS * ROWS;
  static constexpr int KEYS = KV / LANES;        // columns of S of a thread: lane, lane + LANES, ...
  static constexpr int DIMS = HEAD_DIM / LANES;  // columns of O of a thread, in vectors of VECTOR neighbours
  static constexpr int VECTOR = DIMS < 4 ? DIMS : 4;

  // The groups of a warp read their own rows of Q and P at the same time: from different banks, thanks to a gap of
  // LANES floats after the rows of each group.
  static constexpr int Q_GROUP = ROWS * HEAD_DIM + LANES;
  static constexpr int P_GROUP = ROWS * KV + LANES;
  static constexpr int SHARED_FLOATS = WARPS * GROUPS * (Q_GROUP + P_GROUP) + 2 * KV * HEAD_DIM;

  // Where 4 neighbouring columns of K's row `row` lie. The lanes read the same columns of different rows at the same
  // time, and all rows begin in the same bank (with 16 columns, in one of two): so vector v of a row changes places
  // with vector v XOR row, and the lanes meet different banks.
  static KATA_DEVICE int k_place(int row, int column) {
    constexpr int SWAPPED = HEAD_DIM / 4 < 8 ? HEAD_DIM / 4 : 8;  // vectors that change places among themselves
    constexpr int ROWS_PER_LINE = 8 / SWAPPED;                    // of the 32 banks
    return row * HEAD_DIM + ((column / 4) ^ (row / ROWS_PER_LINE % SWAPPED)) * 4;
  }
};

// Copies the block's rows of Q to shared memory, times scale log2(e); rows from `limit` on become 0.
template <int HEAD_DIM>
KATA_DEVICE void load_q(float* q_smem, const float* head, Index row_stride, int first, int limit, float scale_log2) {
  using Cut = Tiling<HEAD_DIM>;
  constexpr int VECTORS = HEAD_DIM / 4;  // of 16 bytes, in a row
  for (int index = static_cast<int>(threadIdx.x); index < Cut::BLOCK_Q * VECTORS; index += THREADS) {
    const int row = index / VECTORS;
    const int column = index % VECTORS * 4;
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (first + row < limit) four = *reinterpret_cast<const float4*>(head + (first + row) * row_stride + column);
    four.x *= scale_log2, four.y *= scale_log2, four.z *= scale_log2, four.w *= scale_log2;
    *reinterpret_cast<float4*>(q_smem + row / ROWS * Cut::Q_GROUP + row % ROWS * HEAD_DIM + column) = four;
  }
}

// Starts the copy of rows first .. first + KV - 1 of one head of K or V; rows from `limit` on become 0.
template <int HEAD_DIM, bool IS_K>
KATA_DEVICE void load_async(float* smem, const float* head, Index row_stride, int first, int limit) {
  constexpr int VECTORS = HEAD_DIM / 4;
  constexpr int ROWS_PER_STEP = THREADS / VECTORS;
  static_assert(KV % ROWS_PER_STEP == 0, "every thread copies the same number of vectors");
  const int thread_row = static_cast<int>(threadIdx.x) / VECTORS;
  const int column = static_cast<int>(threadIdx.x) % VECTORS * 4;
  const float* source = head + (first + thread_row) * row_stride + column;
#pragma unroll
  for (int step = 0; step < KV; step += ROWS_PER_STEP) {
    const int row = thread_row + step;
    const int place = IS_K ? Tiling<HEAD_DIM>::k_place(row, column) : row * HEAD_DIM + column;
    cp_async_16(smem + place, source + step * row_stride, first + row < limit);
  }
  cp_async_commit();
}

// The lanes of a group stand 32 / LANES threads apart: lanes that read the same address are neighbours then, and
// one turn in shared memory serves twice as many of them.
template <int LANES>
KATA_DEVICE float max_of_lanes(float value) {
  for (int distance = 32 / LANES; distance < 32; distance *= 2) {
    value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, distance));
  }
  return value;
}

template <int LANES>
KATA_DEVICE float sum_of_lanes(float value) {
  for (int distance = 32 / LANES; distance < 32; distance *= 2) value += __shfl_xor_sync(FULL_WARP, value, distance);
  return value;
}

// S = Q K^T  [ROWS rows of this thread, keys lane, lane + LANES, ...]
template <int HEAD_DIM>
KATA_DEVICE void multiply_keys(float (&s_reg)[ROWS][Tiling<HEAD_DIM>::KEYS], const float* q_rows, const float* k_smem,
                               int lane) {
  using Cut = Tiling<HEAD_DIM>;
#pragma unroll 2
  for (int column = 0; column < HEAD_DIM; column += 4) {
    float4 k_four[Cut::KEYS];
#pragma unroll
    for (int key = 0; key < Cut::KEYS; ++key) {
      k_four[key] = *reinterpret_cast<const float4*>(k_smem + Cut::k_place(lane, column) + key * Cut::LANES * HEAD_DIM);
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const float4 q_four = *reinterpret_cast<const float4*>(q_rows + row * HEAD_DIM + column);
#pragma unroll
      for (int key = 0; key < Cut::KEYS; ++key) s_reg[row][key] = dot(q_four, k_four[key], s_reg[row][key]);
    }
  }
}

// O += P V  [ROWS rows of this thread, its channels], over the first `keys` keys of the tile
template <int HEAD_DIM, bool MASKED>
KATA_DEVICE void add_values(float (&o_reg)[ROWS][Tiling<HEAD_DIM>::DIMS], const float* p_rows, const float* v_smem,
                            int lane, int keys) {
  using Cut = Tiling<HEAD_DIM>;
#pragma unroll 4
  for (int key = 0; key < keys; key += 4) {
    float v_reg[4][Cut::DIMS];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int dim = 0; dim < Cut::DIMS; dim += Cut::VECTOR) {
        load_vector<Cut::VECTOR>(&v_reg[k][dim], v_smem + (key + k) * HEAD_DIM + dim * Cut::LANES + lane * Cut::VECTOR);
      }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      float p[4];
      load_vector<4>(p, p_rows + row * KV + key);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        // A forbidden value may be NaN, and 0 times NaN is NaN: it has to be left out.
        if (MASKED && p[k] == 0.0f) continue;
#pragma unroll
        for (int dim = 0; dim < Cut::DIMS; ++dim) o_reg[row][dim] = fmaf(p[k], v_reg[k][dim], o_reg[row][dim]);
      }
    }
  }
}

}  // namespace flashkata::forward_tile
