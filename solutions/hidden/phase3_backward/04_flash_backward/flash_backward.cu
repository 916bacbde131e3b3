// flash_backward: dV = P^T dO, dS = P (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q, in fp32
//
// New here   P is computed again, tile by tile, from the LSE that the forward pass left. A block owns a tile of keys,
//            and keeps their dK and dV in registers while the queries pass by. dQ is a sum over all such blocks: they
//            add to it in memory, atomically, in whatever order they run. With `deterministic` a second kernel, whose
//            blocks own queries, computes S and dP once more and adds in its own order: seven products for five.
//            The next tile of Q and of dO comes by cp.async as soon as everybody has finished with this one.
// Who owns   A group, every other thread of a warp, owns rows together: of S and dP each of its threads has
//            ROWS x KEYS elements, of dQ ROWS x DIMS, of dK and dV OWNED x DIMS.
// Grid       delta_kernel: D / 4 threads for each query. keys_kernel: a block for every KV keys of a head; when causal
//            the first see the most queries. queries_kernel: a block for every BLOCK_Q queries, the last first
// Block      GROUPS x 16 threads
// Shared     q_smem, do_smem [BLOCK_Q, D], k_smem, v_smem [KV, D], pair_smem [BLOCK_Q, KV]: P, then dS
// Tiles      how a tile is loaded and multiplied: fp32_backward_tile.cuh
// Try        ./kata test 3.04    ./kata profile 3.04
#include "flash_backward.hpp"

#include "solutions/hidden/block_order.cuh"
#include "solutions/hidden/fp32_backward_tile.cuh"

namespace flashkata {
namespace {

using namespace backward_tile;

struct Arguments {
  View<const float, 4> query, key, value, output;  // [B, H, S, D]
  View<const float, 3> lse;                        // [B, H, Sq]
  View<const float, 4> d_output;
  View<float, 4> d_query, d_key, d_value;
  View<float, 3> delta;  // [B, H, Sq]
  BlockOrder order;
  int queries, keys, diagonal;  // query i sees keys 0 .. i + diagonal
  float scale;
  bool deterministic;
};

// delta = rowsum(dO * O), one query for D / 4 threads side by side. Where dQ will be added up, it begins at 0.
template <int HEAD_DIM>
__global__ void delta_kernel(const Arguments args) {
  constexpr int THREADS_PER_ROW = HEAD_DIM / 4;
  const Index thread = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index row = thread / THREADS_PER_ROW;  // over batch items, heads and queries
  const int column = static_cast<int>(thread % THREADS_PER_ROW) * 4;
  const Index heads = args.query.size(1);
  const Index head = row / args.queries;
  const bool inside = head < args.query.size(0) * heads;
  float sum = 0.0f;
  if (inside) {
    const float* o_row = &args.output(head / heads, head % heads, row % args.queries, column);
    const float* do_row = &args.d_output(head / heads, head % heads, row % args.queries, column);
    sum = dot(*reinterpret_cast<const float4*>(o_row), *reinterpret_cast<const float4*>(do_row), 0.0f);
    if (!args.deterministic) {
      float* dq_row = &args.d_query(head / heads, head % heads, row % args.queries, column);
      *reinterpret_cast<float4*>(dq_row) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
  for (int distance = 1; distance < THREADS_PER_ROW; distance *= 2) {
    sum += __shfl_xor_sync(FULL_WARP, sum, distance);
  }
  if (inside && column == 0) args.delta(head / heads, head % heads, row % args.queries) = sum;
}

// dK and dV of KV keys, and, unless `deterministic`, what these keys give to dQ.
template <int HEAD_DIM>
__global__ void __launch_bounds__(Tiling<HEAD_DIM>::THREADS, Tiling<HEAD_DIM>::BLOCKS)
    keys_kernel(const Arguments args) {
  using Cut = Tiling<HEAD_DIM>;
  constexpr int GROUPS = Cut::GROUPS, BLOCK_Q = Cut::BLOCK_Q, KV = Cut::KV;
  constexpr int ROWS = Cut::ROWS, KEYS = Cut::KEYS, OWNED = Cut::OWNED, DIMS = Cut::DIMS, VECTOR = Cut::VECTOR;

  const int lane = lane_of_thread();
  const int group = group_of_thread();
  const int kv_tiles = (args.keys + KV - 1) / KV;
  const BlockWork work = args.order.work_of(static_cast<int>(blockIdx.x), kv_tiles, Cut::BLOCKS);
  const int kv_first = work.tile * KV;  // the first keys are seen by the most queries
  const Index head = work.head;
  const Index heads = args.query.size(1);
  const Index b = head / heads;
  const Index h = head % heads;

  float* q_smem = dynamic_shared<float>();                   // [BLOCK_Q, HEAD_DIM]
  float* do_smem = q_smem + BLOCK_Q * Cut::STRIDE;           // [BLOCK_Q, HEAD_DIM]
  float* k_smem = do_smem + BLOCK_Q * Cut::STRIDE;           // [KV, HEAD_DIM]
  float* v_smem = k_smem + KV * Cut::STRIDE;                 // [KV, HEAD_DIM]
  float* pair_smem = v_smem + KV * Cut::STRIDE;              // [BLOCK_Q, KV]
  float* lse_smem = pair_smem + BLOCK_Q * Cut::PAIR_STRIDE;  // [BLOCK_Q]
  float* delta_smem = lse_smem + BLOCK_Q;                    // [BLOCK_Q]

  float dk_reg[OWNED][DIMS] = {};  // [keys of this thread, its channels]
  float dv_reg[OWNED][DIMS] = {};

  const float* q_head = &args.query(b, h, 0, 0);
  const float* do_head = &args.d_output(b, h, 0, 0);
  // A query that does not exist gives nothing, whatever its weights: its rows of Q and dO are 0, and so is its delta.
  const auto load_queries = [&](int q_first) {
    load_async<HEAD_DIM, BLOCK_Q>(q_smem, q_head, args.query.stride(2), q_first, args.queries);
    if (threadIdx.x < BLOCK_Q) {
      const int row = static_cast<int>(threadIdx.x);
      const bool exists = q_first + row < args.queries;
      cp_async_4(lse_smem + row, &args.lse(b, h, exists ? q_first + row : 0), exists);
      cp_async_4(delta_smem + row, &args.delta(b, h, exists ? q_first + row : 0), exists);
    }
  };
  const auto load_d_output = [&](int q_first) {
    load_async<HEAD_DIM, BLOCK_Q>(do_smem, do_head, args.d_output.stride(2), q_first, args.queries);
  };

  // The first query that sees the first key of the block lies in the first tile worth visiting.
  const int q_begin = max(0, kv_first - args.diagonal) / BLOCK_Q * BLOCK_Q;
  if (q_begin < args.queries) {  // otherwise nobody would wait for these copies
    load_async<HEAD_DIM, KV>(k_smem, &args.key(b, h, 0, 0), args.key.stride(2), kv_first, args.keys);
    load_async<HEAD_DIM, KV>(v_smem, &args.value(b, h, 0, 0), args.value.stride(2), kv_first, args.keys);
    load_queries(q_begin);
    load_d_output(q_begin);
    cp_async_commit();
  }
  for (int q_first = q_begin; q_first < args.queries; q_first += BLOCK_Q) {
    const int q_next = q_first + BLOCK_Q;
    cp_async_wait<0>();
    __syncthreads();  // the tiles are full; everybody has finished with the dS of the tile before

    // Does every query of the tile see every key of the block? Then nothing has to be forbidden.
    const bool masked = kv_first + KV > min(args.keys, q_first + args.diagonal + 1);

    // P = exp(scale Q K^T - lse)  [ROWS queries of this thread, keys lane, lane + 16, ...]
    float p_reg[ROWS][KEYS];
    multiply<HEAD_DIM>(p_reg, q_smem, k_smem, group, lane);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const int q_row = group + row * GROUPS;
      const int end = min(args.keys, q_first + q_row + args.diagonal + 1) - kv_first;  // first forbidden key
      // A query that sees nothing has an lse of -inf: with +inf its weights are 0.
      const float lse = lse_smem[q_row] == -INFINITE ? INFINITE : lse_smem[q_row];
#pragma unroll
      for (int key = 0; key < KEYS; ++key) {
        p_reg[row][key] = __expf(fmaf(p_reg[row][key], args.scale, -lse));
        if (masked && lane + key * LANES >= end) p_reg[row][key] = 0.0f;
        pair_smem[q_row * Cut::PAIR_STRIDE + lane + key * LANES] = p_reg[row][key];
      }
    }
    __syncthreads();  // P is complete: every thread needs its keys' columns of it

    if (masked) {
      add_to_keys<HEAD_DIM, true>(dv_reg, pair_smem, do_smem, group, lane);
    } else {
      add_to_keys<HEAD_DIM, false>(dv_reg, pair_smem, do_smem, group, lane);
    }

    // dS = P (dO V^T - delta)
    float ds_reg[ROWS][KEYS];
    multiply<HEAD_DIM>(ds_reg, do_smem, v_smem, group, lane);
    __syncthreads();  // everybody has finished with P and with do_smem
    if (q_next < args.queries) load_d_output(q_next);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const int q_row = group + row * GROUPS;
      const float delta = delta_smem[q_row];
#pragma unroll
      for (int key = 0; key < KEYS; ++key) {
        float ds = p_reg[row][key] * (ds_reg[row][key] - delta);
        if (masked && p_reg[row][key] == 0.0f) ds = 0.0f;  // a forbidden value may be NaN
        pair_smem[q_row * Cut::PAIR_STRIDE + lane + key * LANES] = ds;
      }
    }
    __syncthreads();  // dS is complete

    if (masked) {
      add_to_keys<HEAD_DIM, true>(dk_reg, pair_smem, q_smem, group, lane);
    } else {
      add_to_keys<HEAD_DIM, false>(dk_reg, pair_smem, q_smem, group, lane);
    }
    __syncthreads();  // everybody has finished with q_smem
    if (q_next < args.queries) load_queries(q_next);
    cp_async_commit();
    if (args.deterministic) continue;

    float dq_reg[ROWS][DIMS] = {};  // [queries of this thread, its channels]
    if (masked) {
      add_to_queries<HEAD_DIM, true>(dq_reg, pair_smem, k_smem, group, lane);
    } else {
      add_to_queries<HEAD_DIM, false>(dq_reg, pair_smem, k_smem, group, lane);
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const int q_row = q_first + group + row * GROUPS;
      if (q_row >= args.queries) continue;
      float* dq_row = &args.d_query(b, h, q_row, 0);
#pragma unroll
      for (int dim = 0; dim < DIMS; ++dim) dq_reg[row][dim] *= args.scale;
#pragma unroll
      for (int dim = 0; dim < DIMS; dim += VECTOR) {
        atomic_add_vector<VECTOR>(dq_row + channel<HEAD_DIM>(dim, lane), &dq_reg[row][dim]);
      }
    }
  }

#pragma unroll
  for (int key = 0; key < OWNED; ++key) {
    const int kv_row = kv_first + owned_key<HEAD_DIM>(key, group);
    if (kv_row >= args.keys) continue;
    float* dk_row = &args.d_key(b, h, kv_row, 0);
    float* dv_row = &args.d_value(b, h, kv_row, 0);
#pragma unroll
    for (int dim = 0; dim < DIMS; ++dim) {
      dk_row[channel<HEAD_DIM>(dim, lane)] = dk_reg[key][dim] * args.scale;
      dv_row[channel<HEAD_DIM>(dim, lane)] = dv_reg[key][dim];
    }
  }
}

// dQ of BLOCK_Q queries, in one thread's own order: the forward pass's loop, with dS for P.
template <int HEAD_DIM>
__global__ void __launch_bounds__(Tiling<HEAD_DIM>::THREADS, Tiling<HEAD_DIM>::BLOCKS)
    queries_kernel(const Arguments args) {
  using Cut = Tiling<HEAD_DIM>;
  constexpr int GROUPS = Cut::GROUPS, BLOCK_Q = Cut::BLOCK_Q, KV = Cut::KV;
  constexpr int ROWS = Cut::ROWS, KEYS = Cut::KEYS, DIMS = Cut::DIMS;

  const int lane = lane_of_thread();
  const int group = group_of_thread();
  const int q_tiles = (args.queries + BLOCK_Q - 1) / BLOCK_Q;
  const BlockWork work = args.order.work_of(static_cast<int>(blockIdx.x), q_tiles, Cut::BLOCKS);
  const int q_first = (q_tiles - 1 - work.tile) * BLOCK_Q;  // the last queries see the most keys
  const Index head = work.head;
  const Index heads = args.query.size(1);
  const Index b = head / heads;
  const Index h = head % heads;

  float* q_smem = dynamic_shared<float>();          // [BLOCK_Q, HEAD_DIM]
  float* do_smem = q_smem + BLOCK_Q * Cut::STRIDE;  // [BLOCK_Q, HEAD_DIM]
  float* k_smem = do_smem + BLOCK_Q * Cut::STRIDE;  // [KV, HEAD_DIM]
  float* v_smem = k_smem + KV * Cut::STRIDE;        // [KV, HEAD_DIM]
  float* pair_smem = v_smem + KV * Cut::STRIDE;     // [BLOCK_Q, KV]

  float dq_reg[ROWS][DIMS] = {};  // [queries of this thread, its channels]
  float lse[ROWS];
  float delta[ROWS];
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const int q_row = q_first + group + row * GROUPS;
    lse[row] = q_row < args.queries ? args.lse(b, h, q_row) : INFINITE;
    if (lse[row] == -INFINITE) lse[row] = INFINITE;
    delta[row] = q_row < args.queries ? args.delta(b, h, q_row) : 0.0f;
  }

  const int keys_seen = min(args.keys, q_first + BLOCK_Q + args.diagonal);  // by the last query of the block
  if (keys_seen > 0) {  // otherwise nobody would wait for these copies
    load_async<HEAD_DIM, BLOCK_Q>(q_smem, &args.query(b, h, 0, 0), args.query.stride(2), q_first, args.queries);
    load_async<HEAD_DIM, BLOCK_Q>(do_smem, &args.d_output(b, h, 0, 0), args.d_output.stride(2), q_first, args.queries);
  }
  for (int kv_first = 0; kv_first < keys_seen; kv_first += KV) {
    __syncthreads();  // everybody has finished with k_smem, v_smem and pair_smem of the tile before
    load_async<HEAD_DIM, KV>(k_smem, &args.key(b, h, 0, 0), args.key.stride(2), kv_first, args.keys);
    load_async<HEAD_DIM, KV>(v_smem, &args.value(b, h, 0, 0), args.value.stride(2), kv_first, args.keys);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();  // the tiles are full: reads may start

    const bool masked = kv_first + KV > min(args.keys, q_first + args.diagonal + 1);
    float p_reg[ROWS][KEYS];
    float ds_reg[ROWS][KEYS];
    multiply<HEAD_DIM>(p_reg, q_smem, k_smem, group, lane);
    multiply<HEAD_DIM>(ds_reg, do_smem, v_smem, group, lane);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const int q_row = group + row * GROUPS;
      const int end = min(args.keys, q_first + q_row + args.diagonal + 1) - kv_first;  // first forbidden key
#pragma unroll
      for (int key = 0; key < KEYS; ++key) {
        float ds = __expf(fmaf(p_reg[row][key], args.scale, -lse[row])) * (ds_reg[row][key] - delta[row]);
        if (masked && lane + key * LANES >= end) ds = 0.0f;
        pair_smem[q_row * Cut::PAIR_STRIDE + lane + key * LANES] = ds;
      }
    }
    __syncwarp();  // the rows of pair_smem that a group reads are those that it wrote

    if (masked) {
      add_to_queries<HEAD_DIM, true>(dq_reg, pair_smem, k_smem, group, lane);
    } else {
      add_to_queries<HEAD_DIM, false>(dq_reg, pair_smem, k_smem, group, lane);
    }
  }

#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const int q_row = q_first + group + row * GROUPS;
    if (q_row >= args.queries) continue;
    float* dq_row = &args.d_query(b, h, q_row, 0);
#pragma unroll
    for (int dim = 0; dim < DIMS; ++dim) {
      dq_row[channel<HEAD_DIM>(dim, lane)] = dq_reg[row][dim] * args.scale;
    }
  }
}

template <int HEAD_DIM>
void launch_for(const FlashBackward<float>& p, const Stream& stream) {
  using Cut = Tiling<HEAD_DIM>;
  constexpr int DELTA_THREADS = 256;
  constexpr std::size_t SHARED_BYTES = Cut::SHARED_FLOATS * sizeof(float);
  const auto queries = static_cast<int>(p.query.size(2));
  const auto keys = static_cast<int>(p.key.size(2));
  const Arguments args{
      .query = p.query,
      .key = p.key,
      .value = p.value,
      .output = p.output,
      .lse = p.lse,
      .d_output = p.d_output,
      .d_query = p.d_query,
      .d_key = p.d_key,
      .d_value = p.d_value,
      .delta = p.delta,
      .order = {static_cast<int>(p.query.size(0) * p.query.size(1)), p.causal},
      .queries = queries,
      .keys = keys,
      .diagonal = p.causal ? keys - queries : keys,
      .scale = p.scale.value_or(1.0f / std::sqrt(static_cast<float>(HEAD_DIM))),
      .deterministic = p.deterministic,
  };
  const Index heads = p.query.size(0) * p.query.size(1);
  const auto launch_blocks = [&](auto kernel, Index blocks, int threads, std::size_t shared_bytes) {
    if (blocks == 0) return;
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), shared_bytes, stream,
           args);
  };
  launch_blocks(delta_kernel<HEAD_DIM>, ceil_div(heads * queries * (HEAD_DIM / 4), DELTA_THREADS), DELTA_THREADS, 0);
  launch_blocks(keys_kernel<HEAD_DIM>, heads * ceil_div(keys, Cut::KV), Cut::THREADS, SHARED_BYTES);
  if (!p.deterministic) return;
  launch_blocks(queries_kernel<HEAD_DIM>, heads * ceil_div(queries, Cut::BLOCK_Q), Cut::THREADS, SHARED_BYTES);
}

}  // namespace

void flash_backward(const FlashBackward<float>& problem, const Stream& stream) {
  check_flash_backward(problem);
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
