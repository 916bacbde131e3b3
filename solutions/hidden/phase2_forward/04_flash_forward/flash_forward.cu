// flash_forward: output = softmax(scale query key^T) value and its LSE, in fp32
//
// New here   The loop of step 03, with a block of threads for a tile of queries: K and V tiles lie in shared memory for
//            all of them, and each thread computes ROWS x KEYS scores and ROWS x DIMS outputs, so that a number that
//            was loaded from shared memory is multiplied several times. K and V come in chunks by cp.async, each while
//            the one before is being used.
// Who owns   A group, LANES threads of a warp, owns ROWS rows: of S each of its threads has KEYS columns, of O each has
//            DIMS. Their maxima and sums meet by shuffles.
// Grid       one block for every BLOCK_Q queries of a head; the last tiles, longest when causal, first:
//            block_order.cuh
// Block      WARPS warps of GROUPS groups
// Shared     q_smem [D, BLOCK_Q], p_smem [BLOCK_Q, KV], and two chunks of K, [KV, CHUNK_DIMS], or of V, [CHUNK_KEYS, D]
// Tiles      how a tile is loaded, masked and multiplied: fp32_forward_tile.cuh
// Try        ./kata test 2.04    ./kata profile 2.04
#include "flash_forward.hpp"

#include "solutions/hidden/block_order.cuh"
#include "solutions/hidden/fp32_forward_tile.cuh"

namespace flashkata {
namespace {

using namespace forward_tile;

struct Arguments {
  View<const float, 4> query, key, value;  // [B, H, S, D]
  View<float, 4> output;                   // [B, H, Sq, D]
  View<float, 3> lse;                      // [B, H, Sq]
  BlockOrder order;
  int queries, keys, diagonal;  // query i sees keys 0 .. i + diagonal
  float scale_log2;             // scale log2(e): weights are powers of 2
};

template <int HEAD_DIM>
__global__ void __launch_bounds__(THREADS, Tiling<HEAD_DIM>::BLOCKS) flash_forward_kernel(const Arguments args) {
  using Cut = Tiling<HEAD_DIM>;
  constexpr int LANES = Cut::LANES, BLOCK_Q = Cut::BLOCK_Q, KV = Cut::KV;
  constexpr int DIMS = Cut::DIMS, VECTOR = Cut::VECTOR, CHUNKS = Cut::CHUNKS;

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32 / Cut::GROUPS;  // in the group
  const int group = warp * Cut::GROUPS + static_cast<int>(threadIdx.x) % Cut::GROUPS;
  const int q_tiles = (args.queries + BLOCK_Q - 1) / BLOCK_Q;
  const BlockWork work = args.order.work_of(static_cast<int>(blockIdx.x), q_tiles, Cut::BLOCKS);
  const int q_first = (q_tiles - 1 - work.tile) * BLOCK_Q;  // the last queries see the most keys
  const Index head = work.head;
  const Index heads = args.query.size(1);
  const float* q_head = &args.query(head / heads, head % heads, 0, 0);
  const float* k_head = &args.key(head / heads, head % heads, 0, 0);
  const float* v_head = &args.value(head / heads, head % heads, 0, 0);

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

  // How many keys do the block's last query, the warp's last and the thread's first one see?
  const int keys_seen = min(args.keys, q_first + BLOCK_Q + args.diagonal);
  const int warp_sees = min(args.keys, q_first + (warp + 1) * Cut::GROUPS * ROWS + args.diagonal);
  const int all_see = min(args.keys, q_first + args.diagonal + 1);  // every query of the block sees the keys before
  const int first_sees = q_first + group * ROWS + args.diagonal + 1;

  // The chunks come one after the other: of each tile those of K, then those of V.
  const auto load_k = [&](float* smem, int kv_first, int chunk) {
    load_async<HEAD_DIM, true>(smem, k_head + chunk * Cut::CHUNK_DIMS, args.key.stride(2), kv_first, keys_seen);
  };
  const auto load_v = [&](float* smem, int kv_first, int chunk) {
    load_async<HEAD_DIM, false>(smem, v_head, args.value.stride(2), kv_first + chunk * Cut::CHUNK_KEYS, keys_seen);
  };
  // The next chunk is there, and everybody has finished with the one before.
  const auto advance = [&] {
    cp_async_wait<0>();
    __syncthreads();
    float* const finished = full_smem;
    full_smem = next_smem;
    next_smem = finished;
  };

  if (keys_seen > 0) {  // otherwise nobody would wait for this copy
    load_k(next_smem, 0, 0);
    load_q<HEAD_DIM>(q_smem, q_head, args.query.stride(2), q_first, args.queries, args.scale_log2);
  }
  for (int kv_first = 0; kv_first < keys_seen; kv_first += KV) {
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
      if (warp_sees > kv_first + KV / 2) {
        multiply_keys<HEAD_DIM, KEYS>(s_reg, q_columns, full_smem, lane);
      } else if (warp_sees > kv_first) {
        multiply_keys<HEAD_DIM, KEYS / 2>(s_reg, q_columns, full_smem, lane);
      }
    }

    if (kv_first + KV > all_see) {
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        const int end = min(args.keys, first_sees + row) - kv_first;  // first forbidden key
#pragma unroll
        for (int key = 0; key < KEYS; ++key) {
          if (lane + key * LANES >= end) s_reg[row][key] = MINUS_INFINITY;
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
        const float weight = fast_exp2(s_reg[row][key] - shift);
        row_sum[row] += weight;
        p_rows[row * KV + lane + key * LANES] = weight;
      }
    }
    __syncwarp();  // the rows of p_smem that a group reads are those that it wrote

#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      advance();
      if (chunk + 1 < CHUNKS) {
        load_v(next_smem, kv_first, chunk + 1);
      } else if (kv_first + KV < keys_seen) {
        load_k(next_smem, kv_first + KV, 0);
      }
      const int first = chunk * Cut::CHUNK_KEYS;  // in the tile
      if (kv_first + first + Cut::CHUNK_KEYS > all_see) {
        add_values<HEAD_DIM, true>(o_reg, p_rows + first, full_smem, lane,
                                   min(Cut::CHUNK_KEYS, warp_sees - kv_first - first));
      } else {
        add_values<HEAD_DIM, false>(o_reg, p_rows + first, full_smem, lane, Cut::CHUNK_KEYS);
      }
    }
  }

  // The division that was put off. Without keys the sum is 0: output 0, lse -inf.
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const int q_row = q_first + group * ROWS + row;
    const float sum = sum_of_lanes<LANES>(row_sum[row]);
    if (q_row >= args.queries) continue;
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    float* o_row = &args.output(head / heads, head % heads, q_row, 0);
#pragma unroll
    for (int dim = 0; dim < DIMS; ++dim) o_reg[row][dim] *= inverse;
#pragma unroll
    for (int dim = 0; dim < DIMS; dim += VECTOR) {
      store_vector<VECTOR>(o_row + dim * LANES + lane * VECTOR, &o_reg[row][dim]);
    }
    if (lane == 0) {
      args.lse(head / heads, head % heads, q_row) = sum > 0.0f ? (row_max[row] + log2f(sum)) * LN_2 : MINUS_INFINITY;
    }
  }
}

template <int HEAD_DIM>
void launch_for(const FlashForward<float>& p, const Stream& stream) {
  const BlockOrder order{static_cast<int>(p.query.size(0) * p.query.size(1)), p.causal};
  const auto queries = static_cast<int>(p.query.size(2));
  const auto keys = static_cast<int>(p.key.size(2));
  using Cut = Tiling<HEAD_DIM>;
  const Index blocks = p.query.size(0) * p.query.size(1) * ceil_div(p.query.size(2), Cut::BLOCK_Q);
  if (blocks == 0) return;
  launch(flash_forward_kernel<HEAD_DIM>, dim3(static_cast<unsigned>(blocks)), dim3(THREADS),
         Cut::SHARED_FLOATS * sizeof(float), stream,
         Arguments{p.query, p.key, p.value, p.output, p.lse, order, queries, keys, p.causal ? keys - queries : keys,
                   LOG2_E * p.scale.value_or(1.0f / std::sqrt(static_cast<float>(HEAD_DIM)))});
}

}  // namespace

void flash_forward(const FlashForward<float>& problem, const Stream& stream) {
  check_flash_forward(problem);
  switch (problem.query.size(3)) {
    case 16:
      return launch_for<16>(problem, stream);
    case 32:
      return launch_for<32>(problem, stream);
    case 64:
      return launch_for<64>(problem, stream);
    default:
      return launch_for<128>(problem, stream);
  }
}

}  // namespace flashkata
