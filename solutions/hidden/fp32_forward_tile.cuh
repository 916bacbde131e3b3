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
constexpr int KEYS = 8;  // its columns of S: lane, lane + LANES, ...
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

// How the work is cut, by the width of a row. A thread's sums have to fit into its registers: 8 x 8 scores and up to
// 8 x 8 outputs do, and rows of 128 are spread over more lanes, which makes larger tiles of keys. Such a tile comes in
// CHUNKS pieces: K by columns, V by rows.
template <int HEAD_DIM>
struct Tiling {
  static constexpr int LANES = HEAD_DIM == 128 ? 16 : 8;  // threads that share rows
  static constexpr int GROUPS = 32 / LANES;               // of a warp
  static constexpr int BLOCKS = 2;  // that an SM holds at a time: up to 255 registers a thread, 113 KiB a block
  static constexpr int BLOCK_Q = WARPS * GROUPS * ROWS;
  static constexpr int KV = LANES * KEYS;        // keys in a tile
  static constexpr int DIMS = HEAD_DIM / LANES;  // columns of O of a thread, in vectors of VECTOR neighbours
  static constexpr int VECTOR = DIMS < 4 ? DIMS : 4;
  static constexpr int CHUNKS = HEAD_DIM == 128 ? 4 : 1;
  static constexpr int CHUNK_DIMS = HEAD_DIM / CHUNKS;  // columns in a chunk of K
  static constexpr int CHUNK_KEYS = KV / CHUNKS;        // rows in a chunk of V
  static constexpr int CHUNK = KV * CHUNK_DIMS;         // floats in a chunk

  // The groups of a warp read their own rows of P at the same time: from different banks, thanks to a gap of LANES
  // floats after the rows of each group.
  static constexpr int P_GROUP = ROWS * KV + LANES;
  static constexpr int SHARED_FLOATS = BLOCK_Q * HEAD_DIM + WARPS * GROUPS * P_GROUP + 2 * CHUNK;

  // Where 4 neighbouring columns of row `row` of a chunk of K lie. The lanes read the same columns of different rows at
  // the same time, and all rows begin in the same bank (with 16 columns, in one of two): so vector v of a row changes
  // places with vector v XOR row, and the lanes meet different banks.
  static KATA_DEVICE int k_place(int row, int column) {
    constexpr int SWAPPED = CHUNK_DIMS / 4 < 8 ? CHUNK_DIMS / 4 : 8;  // vectors that change places among themselves
    constexpr int ROWS_PER_LINE = 8 / SWAPPED;                        // of the 32 banks
    return row * CHUNK_DIMS + ((column / 4) ^ (row / ROWS_PER_LINE % SWAPPED)) * 4;
  }
};

// Copies the block's rows of Q to shared memory, transposed, times scale log2(e); rows from `limit` on become 0.
template <int HEAD_DIM>
KATA_DEVICE void load_q(float* q_smem, const float* head, Index row_stride, int first, int limit, float scale_log2) {
  constexpr int BLOCK_Q = Tiling<HEAD_DIM>::BLOCK_Q;
  for (int index = static_cast<int>(threadIdx.x); index < BLOCK_Q * HEAD_DIM / 4; index += THREADS) {
    const int row = index % BLOCK_Q;
    const int column = index / BLOCK_Q * 4;
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (first + row < limit) four = *reinterpret_cast<const float4*>(head + (first + row) * row_stride + column);
    q_smem[column * BLOCK_Q + row] = four.x * scale_log2;
    q_smem[(column + 1) * BLOCK_Q + row] = four.y * scale_log2;
    q_smem[(column + 2) * BLOCK_Q + row] = four.z * scale_log2;
    q_smem[(column + 3) * BLOCK_Q + row] = four.w * scale_log2;
  }
}

// Starts the copy of a chunk: of rows first, first + 1, ... of one head of K or V, from `head` on. Rows from `limit` on
// become 0.
template <int HEAD_DIM, bool IS_K>
KATA_DEVICE void load_async(float* smem, const float* head, Index row_stride, int first, int limit) {
  using Cut = Tiling<HEAD_DIM>;
  constexpr int COUNT = IS_K ? Cut::KV : Cut::CHUNK_KEYS;
  constexpr int WIDTH = IS_K ? Cut::CHUNK_DIMS : HEAD_DIM;
  constexpr int VECTORS = WIDTH / 4;
  constexpr int ROWS_PER_STEP = THREADS / VECTORS;
  static_assert(COUNT % ROWS_PER_STEP == 0, "every thread copies the same number of vectors");
  const int thread_row = static_cast<int>(threadIdx.x) / VECTORS;
  const int column = static_cast<int>(threadIdx.x) % VECTORS * 4;
  const float* source = head + (first + thread_row) * row_stride + column;
#pragma unroll
  for (int step = 0; step < COUNT; step += ROWS_PER_STEP) {
    const int row = thread_row + step;
    cp_async_16(smem + (IS_K ? Cut::k_place(row, column) : row * HEAD_DIM + column), source, first + row < limit);
    source += ROWS_PER_STEP * row_stride;
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

// S += Q K^T  [ROWS rows of this thread, the first COUNT of its keys], over the columns of a chunk. Of Q come ROWS
// neighbours, so that a number of K is multiplied by all of them in a row, and has to be read from its register once:
// with Q and K both by columns the register file would be the bottleneck.
template <int HEAD_DIM, int COUNT>
KATA_DEVICE void multiply_keys(float (&s_reg)[ROWS][KEYS], const float* q_rows, const float* k_smem, int lane) {
  using Cut = Tiling<HEAD_DIM>;
#pragma unroll 1
  for (int column = 0; column < Cut::CHUNK_DIMS; column += 4) {
    float q_reg[4][ROWS];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int row = 0; row < ROWS; row += 4)
        load_vector<4>(&q_reg[c][row], q_rows + (column + c) * Cut::BLOCK_Q + row);
    }
#pragma unroll
    for (int key = 0; key < COUNT; ++key) {
      float k_reg[4];
      load_vector<4>(k_reg, k_smem + Cut::k_place(lane, column) + key * Cut::LANES * Cut::CHUNK_DIMS);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) s_reg[row][key] = fmaf(k_reg[c], q_reg[c][row], s_reg[row][key]);
      }
    }
  }
}

// O += P V  [ROWS rows of this thread, its channels], over the first `keys` keys of a chunk
template <int HEAD_DIM, bool MASKED>
KATA_DEVICE void add_values(float (&o_reg)[ROWS][Tiling<HEAD_DIM>::DIMS], const float* p_rows, const float* v_smem,
                            int lane, int keys) {
  using Cut = Tiling<HEAD_DIM>;
  // The loops of all cases together have to fit into the instruction cache: only the usual one is unrolled.
#pragma unroll(MASKED ? 1 : 4)
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
      load_vector<4>(p, p_rows + row * Cut::KV + key);
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
