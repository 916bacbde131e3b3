// Step 2.04's kernel: a block owns BLOCK_Q queries of a part and walks over the tiles of keys that some of them see.
// Grid       one block for every BLOCK_Q queries of every part; the last tiles, longest when causal, first
// Block      WARPS warps of GROUPS groups
// Shared     q_smem [D, BLOCK_Q], p_smem [BLOCK_Q, KV], and two chunks of K, [KV, CHUNK_DIMS], or of V, [CHUNK_KEYS, D]
#pragma once

#include "solutions/hidden/fp32_forward_tile.cuh"
#include "solutions/hidden/phase4_extensions/flash_rules.cuh"

namespace flashkata::flash_kernels::forward {

using namespace forward_tile;

struct Tensors {
  View<const float, 4> query, key, value;  // [B, H, Sq, D], [B, Hk, Sk, D] twice
  View<float, 4> output;                   // [B, H, Sq, D]
  View<float, 3> lse;                      // [B, H, Sq]
};

template <int HEAD_DIM, typename Rules>
__global__ void __launch_bounds__(THREADS, Tiling<HEAD_DIM>::BLOCKS)
    flash_forward_kernel(const Tensors tensors, const Rules rules) {
  using Cut = Tiling<HEAD_DIM>;
  constexpr int LANES = Cut::LANES, BLOCK_Q = Cut::BLOCK_Q, KV = Cut::KV;
  constexpr int DIMS = Cut::DIMS, VECTOR = Cut::VECTOR, CHUNKS = Cut::CHUNKS;

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32 / Cut::GROUPS;  // in the group
  const int group = warp * Cut::GROUPS + static_cast<int>(threadIdx.x) % Cut::GROUPS;
  const int q_tiles = (rules.queries + BLOCK_Q - 1) / BLOCK_Q;
  const BlockWork work = rules.query_order().work_of(static_cast<int>(blockIdx.x), q_tiles, Cut::BLOCKS);
  const int q_first = (q_tiles - 1 - work.tile) * BLOCK_Q;  // the last queries see the most keys
  const Part part = rules.part(work.head / rules.heads, work.head % rules.heads);
  if (q_first >= part.queries) return;  // a sequence shorter than the longest
  const float* q_head = &tensors.query(part.batch, part.head, part.q_first, 0);
  const float* k_head = &tensors.key(part.batch, part.kv_head, part.k_first, 0);
  const float* v_head = &tensors.value(part.batch, part.kv_head, part.k_first, 0);

  float* q_smem = dynamic_shared<float>();                         // [HEAD_DIM, BLOCK_Q]: transposed
  float* p_smem = q_smem + HEAD_DIM * BLOCK_Q;                     // [BLOCK_Q, KV], a gap after every ROWS rows
  float* full_smem = p_smem + WARPS * Cut::GROUPS * Cut::P_GROUP;  // the chunk of K or V that is being used,
  float* next_smem = full_smem + Cut::CHUNK;                       // and the one that is on its way
  const float* q_rows = q_smem + group * ROWS;                     // [HEAD_DIM, ROWS], this group's
  float* p_rows = p_smem + group * Cut::P_GROUP;                   // [ROWS, KV], this group's

  float o_reg[ROWS][DIMS] = {};  // [rows of this thread, its channels]
  float row_max[ROWS];           // of scores times log2(e)
  float row_sum[ROWS] = {};      // this lane's share until the end
  for (int row = 0; row < ROWS; ++row) row_max[row] = MINUS_INFINITY;

  const int first_row = q_first + group * ROWS;  // of this thread
  const int warp_row = q_first + warp * Cut::GROUPS * ROWS;
  const Sight block_sight = Sight::of(rules, part, q_first, BLOCK_Q);
  const Sight warp_sight = Sight::of(rules, part, min(warp_row, part.queries - 1), Cut::GROUPS * ROWS);

  const int kv_begin = block_sight.some.begin / KV * KV;
  const int kv_end = block_sight.some.end;
  // The chunks come one after the other: of each tile those of K, then those of V.
  const auto load_k = [&](float* smem, int kv_first, int chunk) {
    load_async<HEAD_DIM, true>(smem, k_head + chunk * Cut::CHUNK_DIMS, tensors.key.stride(2), kv_first, kv_end);
  };
  const auto load_v = [&](float* smem, int kv_first, int chunk) {
    load_async<HEAD_DIM, false>(smem, v_head, tensors.value.stride(2), kv_first + chunk * Cut::CHUNK_KEYS, kv_end);
  };
  // The next chunk is there, and everybody has finished with the one before.
  const auto advance = [&] {
    cp_async_wait<0>();
    __syncthreads();
    float* const finished = full_smem;
    full_smem = next_smem;
    next_smem = finished;
  };

  if (kv_begin < kv_end) {  // otherwise nobody would wait for this copy
    load_k(next_smem, kv_begin, 0);
    load_q<HEAD_DIM>(q_smem, q_head, tensors.query.stride(2), q_first, part.queries, rules.scale * LOG2_E);
  }
  for (int kv_first = kv_begin; kv_first < kv_end; kv_first += KV) {
    float s_reg[ROWS][KEYS] = {};  // scores times log2(e)
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      advance();
      if (chunk + 1 < CHUNKS) {
        load_k(next_smem, kv_first, chunk + 1);
      } else {
        load_v(next_smem, kv_first, 0);
      }
      const float* q_columns = q_rows + chunk * Cut::CHUNK_DIMS * BLOCK_Q;
      if (warp_sight.touches(kv_first + KV / 2, KV / 2)) {
        multiply_keys<HEAD_DIM, KEYS>(s_reg, q_columns, full_smem, lane);
      } else if (warp_sight.touches(kv_first, KV / 2)) {
        multiply_keys<HEAD_DIM, KEYS / 2>(s_reg, q_columns, full_smem, lane);
      }
    }

    if constexpr (Rules::CAPS) {
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
#pragma unroll
        for (int key = 0; key < KEYS; ++key) s_reg[row][key] = LOG2_E * rules.cap(LN_2 * s_reg[row][key]);
      }
    }
    if (!block_sight.covers(kv_first, KV)) {
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        const KeyRange seen = rules.sees(part, first_row + row);
#pragma unroll
        for (int key = 0; key < KEYS; ++key) {
          const int j = kv_first + lane + key * LANES;
          if (j < seen.begin || j >= seen.end) s_reg[row][key] = MINUS_INFINITY;
        }
      }
    }

    // P = exp(S - max), and what was gathered so far shrinks to the new maximum
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      float tile_max = s_reg[row][0];
#pragma unroll
      for (int key = 1; key < KEYS; ++key) tile_max = fmaxf(tile_max, s_reg[row][key]);
      const float new_max = fmaxf(row_max[row], max_of_lanes<LANES>(tile_max));
      // While a row has seen no key its maximum is -inf, and -inf minus -inf would be NaN.
      const float shift = new_max == MINUS_INFINITY ? 0.0f : new_max;
      const float rescale = fast_exp2(row_max[row] - shift);
      row_max[row] = new_max;
      row_sum[row] *= rescale;
#pragma unroll
      for (int dim = 0; dim < DIMS; ++dim) o_reg[row][dim] *= rescale;
#pragma unroll
      for (int key = 0; key < KEYS; ++key) {
        float weight = fast_exp2(s_reg[row][key] - shift);
        row_sum[row] += weight;
        if constexpr (Rules::DROPS) weight *= rules.keep(part, first_row + row, kv_first + lane + key * LANES);
        p_rows[row * KV + lane + key * LANES] = weight;
      }
    }
    __syncwarp();  // the rows of p_smem that a group reads are those that it wrote

#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      advance();
      if (chunk + 1 < CHUNKS) {
        load_v(next_smem, kv_first, chunk + 1);
      } else if (kv_first + KV < kv_end) {
        load_k(next_smem, kv_first + KV, 0);
      }
      const int first = chunk * Cut::CHUNK_KEYS;  // in the tile
      if (block_sight.covers(kv_first + first, Cut::CHUNK_KEYS)) {
        add_values<HEAD_DIM, false>(o_reg, p_rows + first, full_smem, lane, Cut::CHUNK_KEYS);
      } else {
        add_values<HEAD_DIM, true>(o_reg, p_rows + first, full_smem, lane,
                                   min(Cut::CHUNK_KEYS, warp_sight.some.end - kv_first - first));
      }
    }
  }

  // The division that was put off. Without keys the sum is 0: output 0, lse -inf.
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const int q_row = first_row + row;
    const float sum = sum_of_lanes<LANES>(row_sum[row]);
    if (q_row >= part.queries) continue;
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    float* o_row = &tensors.output(part.batch, part.head, part.q_first + q_row, 0);
#pragma unroll
    for (int dim = 0; dim < DIMS; ++dim) o_reg[row][dim] *= inverse;
#pragma unroll
    for (int dim = 0; dim < DIMS; dim += VECTOR) {
      store_vector<VECTOR>(o_row + dim * LANES + lane * VECTOR, &o_reg[row][dim]);
    }
    if (lane == 0) {
      float& lse = tensors.lse(part.batch, part.head, part.q_first + q_row);
      lse = sum > 0.0f ? (row_max[row] + log2f(sum)) * LN_2 : MINUS_INFINITY;
    }
  }
}

template <int HEAD_DIM, typename Rules>
void launch_for(const FlashForward<float>& p, const Rules& rules, const Stream& stream) {
  using Cut = Tiling<HEAD_DIM>;
  const Index blocks = Index{rules.sequences} * rules.heads * ceil_div(rules.queries, Cut::BLOCK_Q);
  if (blocks == 0) return;
  launch(flash_forward_kernel<HEAD_DIM, Rules>, dim3(static_cast<unsigned>(blocks)), dim3(THREADS),
         Cut::SHARED_FLOATS * sizeof(float), stream, Tensors{p.query, p.key, p.value, p.output, p.lse}, rules);
}

}  // namespace flashkata::flash_kernels::forward

namespace flashkata::flash_kernels {

/// The arguments have been checked.
template <typename Rules>
void launch_forward(const FlashForward<float>& problem, const Rules& rules, const Stream& stream) {
  switch (problem.query.size(3)) {
    case 16:
      return forward::launch_for<16>(problem, rules, stream);
    case 32:
      return forward::launch_for<32>(problem, rules, stream);
    case 64:
      return forward::launch_for<64>(problem, rules, stream);
    default:
      return forward::launch_for<128>(problem, rules, stream);
  }
}

}  // namespace flashkata::flash_kernels
