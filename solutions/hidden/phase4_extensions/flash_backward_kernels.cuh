// Step 3.04's kernels: delta for every query; dK and dV by blocks that own KV keys of one key/value head and meet the
// queries of all heads that read it; dQ by atomic additions, or, with `deterministic`, by blocks that own queries.
// Grid       delta_kernel: D / 4 threads for each query. keys_kernel: a block for every KV keys of a key/value head.
//            queries_kernel: a block for every BLOCK_Q queries of a head, the last first
// Block      GROUPS x 16 threads
// Shared     q_smem, do_smem [BLOCK_Q, D], k_smem, v_smem [KV, D], pair_smem [BLOCK_Q, KV]: P, then dS
#pragma once

#include "solutions/hidden/fp32_backward_tile.cuh"
#include "solutions/hidden/phase4_extensions/flash_rules.cuh"

namespace flashkata::flash_kernels::backward {

using namespace backward_tile;

struct Tensors {
  View<const float, 4> query, key, value, output;  // [B, H, Sq, D], [B, Hk, Sk, D] twice, [B, H, Sq, D]
  View<const float, 3> lse;                        // [B, H, Sq]
  View<const float, 4> d_output;
  View<float, 4> d_query, d_key, d_value;
  View<float, 3> delta;  // [B, H, Sq]
  bool deterministic;
};

// exp(score - lse), and, where scores are capped, the derivative of the cap there.
template <typename Rules>
KATA_DEVICE float weight_of(const Rules& rules, float product, float lse, [[maybe_unused]] float& slope) {
  if constexpr (Rules::CAPS) {
    const float score = rules.cap(product * rules.scale);
    slope = rules.cap_slope(score);
    return __expf(score - lse);
  } else {
    return __expf(fmaf(product, rules.scale, -lse));
  }
}

// delta = rowsum(dO * O), one query for D / 4 threads side by side. Where dQ will be added up, it begins at 0.
template <int HEAD_DIM, typename Rules>
__global__ void delta_kernel(const Tensors tensors, const Rules rules) {
  constexpr int THREADS_PER_ROW = HEAD_DIM / 4;
  const Index thread = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int column = static_cast<int>(thread % THREADS_PER_ROW) * 4;
  const int i = static_cast<int>(thread / THREADS_PER_ROW % rules.queries);
  const int head = static_cast<int>(thread / THREADS_PER_ROW / rules.queries);  // over sequences and heads
  bool inside = head < rules.sequences * rules.heads;
  const Part part = rules.part(inside ? head / rules.heads : 0, inside ? head % rules.heads : 0);
  inside = inside && i < part.queries;
  float sum = 0.0f;
  if (inside) {
    const float* o_row = &tensors.output(part.batch, part.head, part.q_first + i, column);
    const float* do_row = &tensors.d_output(part.batch, part.head, part.q_first + i, column);
    sum = dot(*reinterpret_cast<const float4*>(o_row), *reinterpret_cast<const float4*>(do_row), 0.0f);
    if (!tensors.deterministic) {
      float* dq_row = &tensors.d_query(part.batch, part.head, part.q_first + i, column);
      *reinterpret_cast<float4*>(dq_row) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
  for (int distance = 1; distance < THREADS_PER_ROW; distance *= 2) {
    sum += __shfl_xor_sync(FULL_WARP, sum, distance);
  }
  if (inside && column == 0) tensors.delta(part.batch, part.head, part.q_first + i) = sum;
}

// dK and dV of KV keys, and, unless `deterministic`, what these keys give to dQ.
template <int HEAD_DIM, typename Rules>
__global__ void __launch_bounds__(Tiling<HEAD_DIM>::THREADS, Tiling<HEAD_DIM>::BLOCKS)
    keys_kernel(const Tensors tensors, const Rules rules) {
  using Cut = Tiling<HEAD_DIM>;
  constexpr int GROUPS = Cut::GROUPS, BLOCK_Q = Cut::BLOCK_Q, KV = Cut::KV;
  constexpr int ROWS = Cut::ROWS, KEYS = Cut::KEYS, OWNED = Cut::OWNED, DIMS = Cut::DIMS, VECTOR = Cut::VECTOR;

  const int lane = lane_of_thread();
  const int group = group_of_thread();
  const int kv_tiles = (rules.keys + KV - 1) / KV;
  const BlockWork work = rules.key_order().work_of(static_cast<int>(blockIdx.x), kv_tiles, Cut::BLOCKS);
  const int sequence = work.head / rules.kv_heads;
  const int kv_head = work.head % rules.kv_heads;
  const int kv_first = work.tile * KV;                   // the first keys are seen by the most queries
  const int group_heads = rules.heads / rules.kv_heads;  // query heads that read this key/value head
  const Part first_part = rules.part(sequence, kv_head * group_heads);
  if (kv_first >= first_part.keys) return;  // a sequence shorter than the longest

  float* q_smem = dynamic_shared<float>();                   // [BLOCK_Q, HEAD_DIM]
  float* do_smem = q_smem + BLOCK_Q * Cut::STRIDE;           // [BLOCK_Q, HEAD_DIM]
  float* k_smem = do_smem + BLOCK_Q * Cut::STRIDE;           // [KV, HEAD_DIM]
  float* v_smem = k_smem + KV * Cut::STRIDE;                 // [KV, HEAD_DIM]
  float* pair_smem = v_smem + KV * Cut::STRIDE;              // [BLOCK_Q, KV]
  float* lse_smem = pair_smem + BLOCK_Q * Cut::PAIR_STRIDE;  // [BLOCK_Q]
  float* delta_smem = lse_smem + BLOCK_Q;                    // [BLOCK_Q]

  float dk_reg[OWNED][DIMS] = {};  // [keys of this thread, its channels]
  float dv_reg[OWNED][DIMS] = {};

  // A visit is a tile of queries of one of the heads.
  const int q_tiles = (first_part.queries + BLOCK_Q - 1) / BLOCK_Q;
  const int visits = group_heads * q_tiles;
  const auto part_of = [&](int visit) { return rules.part(sequence, kv_head * group_heads + visit / q_tiles); };
  // The first visit from `visit` on to queries of which some see keys of the block; at least `visits` if there is none.
  const auto next_visit = [&](int visit) {
    while (visit < visits &&
           !Sight::of(rules, part_of(visit), visit % q_tiles * BLOCK_Q, BLOCK_Q).touches(kv_first, KV)) {
      ++visit;
    }
    return visit;
  };
  // A query that does not exist gives nothing, whatever its weights: its rows of Q and dO are 0, and so is its delta.
  const auto load_queries = [&](int visit) {
    const Part part = part_of(visit);
    const int q_first = visit % q_tiles * BLOCK_Q;
    load_async<HEAD_DIM, BLOCK_Q>(q_smem, &tensors.query(part.batch, part.head, part.q_first, 0),
                                  tensors.query.stride(2), q_first, part.queries);
    if (threadIdx.x < BLOCK_Q) {
      const int row = static_cast<int>(threadIdx.x);
      const bool exists = q_first + row < part.queries;
      const Index i = part.q_first + (exists ? q_first + row : 0);
      cp_async_4(lse_smem + row, &tensors.lse(part.batch, part.head, i), exists);
      cp_async_4(delta_smem + row, &tensors.delta(part.batch, part.head, i), exists);
    }
  };
  const auto load_d_output = [&](int visit) {
    const Part part = part_of(visit);
    load_async<HEAD_DIM, BLOCK_Q>(do_smem, &tensors.d_output(part.batch, part.head, part.q_first, 0),
                                  tensors.d_output.stride(2), visit % q_tiles * BLOCK_Q, part.queries);
  };

  int visit = next_visit(0);
  if (visit < visits) {  // otherwise nobody would wait for these copies
    load_async<HEAD_DIM, KV>(k_smem, &tensors.key(first_part.batch, kv_head, first_part.k_first, 0),
                             tensors.key.stride(2), kv_first, first_part.keys);
    load_async<HEAD_DIM, KV>(v_smem, &tensors.value(first_part.batch, kv_head, first_part.k_first, 0),
                             tensors.value.stride(2), kv_first, first_part.keys);
    load_queries(visit);
    load_d_output(visit);
    cp_async_commit();
  }
  for (int following; visit < visits; visit = following) {
    following = next_visit(visit + 1);
    const Part part = part_of(visit);
    const int q_first = visit % q_tiles * BLOCK_Q;
    const Sight sight = Sight::of(rules, part, q_first, BLOCK_Q);
    const Index q_part = part.q_first;

    cp_async_wait<0>();
    __syncthreads();  // the tiles are full; everybody has finished with the dS of the visit before

    // Does every query of the tile see every key of the block? Then nothing has to be forbidden.
    const bool masked = !sight.covers(kv_first, KV);

    // P = exp(scale Q K^T - lse)  [ROWS queries of this thread, keys lane, lane + 16, ...]
    float p_reg[ROWS][KEYS];
    [[maybe_unused]] float slope[ROWS][KEYS];
    multiply<HEAD_DIM>(p_reg, q_smem, k_smem, group, lane);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const int q_row = group + row * GROUPS;
      const KeyRange seen = rules.sees(part, q_first + q_row);
      // A query that sees nothing has an lse of -inf: with +inf its weights are 0.
      const float lse = lse_smem[q_row] == -INFINITE ? INFINITE : lse_smem[q_row];
#pragma unroll
      for (int key = 0; key < KEYS; ++key) {
        const int j = kv_first + lane + key * LANES;
        p_reg[row][key] = weight_of(rules, p_reg[row][key], lse, slope[row][key]);
        if (masked && (j < seen.begin || j >= seen.end)) p_reg[row][key] = 0.0f;
        float kept = p_reg[row][key];
        if constexpr (Rules::DROPS) kept *= rules.keep(part, q_first + q_row, j);
        pair_smem[q_row * Cut::PAIR_STRIDE + lane + key * LANES] = kept;
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
    if (following < visits) load_d_output(following);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const int q_row = group + row * GROUPS;
      const float delta = delta_smem[q_row];
#pragma unroll
      for (int key = 0; key < KEYS; ++key) {
        if constexpr (Rules::DROPS) {
          ds_reg[row][key] *= rules.keep(part, q_first + q_row, kv_first + lane + key * LANES);
        }
        float ds = p_reg[row][key] * (ds_reg[row][key] - delta);
        if constexpr (Rules::CAPS) ds *= slope[row][key];
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
    if (following < visits) load_queries(following);
    cp_async_commit();
    if (tensors.deterministic) continue;

    float dq_reg[ROWS][DIMS] = {};  // [queries of this thread, its channels]
    if (masked) {
      add_to_queries<HEAD_DIM, true>(dq_reg, pair_smem, k_smem, group, lane);
    } else {
      add_to_queries<HEAD_DIM, false>(dq_reg, pair_smem, k_smem, group, lane);
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const int q_row = q_first + group + row * GROUPS;
      if (q_row >= part.queries) continue;
      float* dq_row = &tensors.d_query(part.batch, part.head, q_part + q_row, 0);
#pragma unroll
      for (int dim = 0; dim < DIMS; ++dim) dq_reg[row][dim] *= rules.scale;
#pragma unroll
      for (int dim = 0; dim < DIMS; dim += VECTOR) {
        atomic_add_vector<VECTOR>(dq_row + channel<HEAD_DIM>(dim, lane), &dq_reg[row][dim]);
      }
    }
  }

#pragma unroll
  for (int key = 0; key < OWNED; ++key) {
    const int kv_row = kv_first + owned_key<HEAD_DIM>(key, group);
    if (kv_row >= first_part.keys) continue;
    float* dk_row = &tensors.d_key(first_part.batch, kv_head, first_part.k_first + kv_row, 0);
    float* dv_row = &tensors.d_value(first_part.batch, kv_head, first_part.k_first + kv_row, 0);
#pragma unroll
    for (int dim = 0; dim < DIMS; ++dim) {
      dk_row[channel<HEAD_DIM>(dim, lane)] = dk_reg[key][dim] * rules.scale;
      dv_row[channel<HEAD_DIM>(dim, lane)] = dv_reg[key][dim];
    }
  }
}

// dQ of BLOCK_Q queries, in one thread's own order: the forward pass's loop, with dS for P.
template <int HEAD_DIM, typename Rules>
__global__ void __launch_bounds__(Tiling<HEAD_DIM>::THREADS, Tiling<HEAD_DIM>::BLOCKS)
    queries_kernel(const Tensors tensors, const Rules rules) {
  using Cut = Tiling<HEAD_DIM>;
  constexpr int GROUPS = Cut::GROUPS, BLOCK_Q = Cut::BLOCK_Q, KV = Cut::KV;
  constexpr int ROWS = Cut::ROWS, KEYS = Cut::KEYS, DIMS = Cut::DIMS;

  const int lane = lane_of_thread();
  const int group = group_of_thread();
  const int q_tiles = (rules.queries + BLOCK_Q - 1) / BLOCK_Q;
  const BlockWork work = rules.query_order().work_of(static_cast<int>(blockIdx.x), q_tiles, Cut::BLOCKS);
  const int q_first = (q_tiles - 1 - work.tile) * BLOCK_Q;  // the last queries see the most keys
  const Part part = rules.part(work.head / rules.heads, work.head % rules.heads);
  if (q_first >= part.queries) return;  // a sequence shorter than the longest
  const float* k_head = &tensors.key(part.batch, part.kv_head, part.k_first, 0);
  const float* v_head = &tensors.value(part.batch, part.kv_head, part.k_first, 0);

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
    lse[row] = q_row < part.queries ? tensors.lse(part.batch, part.head, part.q_first + q_row) : INFINITE;
    if (lse[row] == -INFINITE) lse[row] = INFINITE;
    delta[row] = q_row < part.queries ? tensors.delta(part.batch, part.head, part.q_first + q_row) : 0.0f;
  }

  const Sight sight = Sight::of(rules, part, q_first, BLOCK_Q);
  const int kv_begin = sight.some.begin / KV * KV;
  const int kv_end = sight.some.end;
  if (kv_begin < kv_end) {  // otherwise nobody would wait for these copies
    load_async<HEAD_DIM, BLOCK_Q>(q_smem, &tensors.query(part.batch, part.head, part.q_first, 0),
                                  tensors.query.stride(2), q_first, part.queries);
    load_async<HEAD_DIM, BLOCK_Q>(do_smem, &tensors.d_output(part.batch, part.head, part.q_first, 0),
                                  tensors.d_output.stride(2), q_first, part.queries);
  }
  for (int kv_first = kv_begin; kv_first < kv_end; kv_first += KV) {
    __syncthreads();  // everybody has finished with k_smem, v_smem and pair_smem of the tile before
    load_async<HEAD_DIM, KV>(k_smem, k_head, tensors.key.stride(2), kv_first, part.keys);
    load_async<HEAD_DIM, KV>(v_smem, v_head, tensors.value.stride(2), kv_first, part.keys);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();  // the tiles are full: reads may start

    const bool masked = !sight.covers(kv_first, KV);
    float p_reg[ROWS][KEYS];
    float ds_reg[ROWS][KEYS];
    multiply<HEAD_DIM>(p_reg, q_smem, k_smem, group, lane);
    multiply<HEAD_DIM>(ds_reg, do_smem, v_smem, group, lane);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const int q_row = group + row * GROUPS;
      const KeyRange seen = rules.sees(part, q_first + q_row);
#pragma unroll
      for (int key = 0; key < KEYS; ++key) {
        const int j = kv_first + lane + key * LANES;
        float slope = 1.0f;
        const float weight = weight_of(rules, p_reg[row][key], lse[row], slope);
        if constexpr (Rules::DROPS) ds_reg[row][key] *= rules.keep(part, q_first + q_row, j);
        float ds = weight * (ds_reg[row][key] - delta[row]);
        if constexpr (Rules::CAPS) ds *= slope;
        if (masked && (j < seen.begin || j >= seen.end)) ds = 0.0f;
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
    if (q_row >= part.queries) continue;
    float* dq_row = &tensors.d_query(part.batch, part.head, part.q_first + q_row, 0);
#pragma unroll
    for (int dim = 0; dim < DIMS; ++dim) {
      dq_row[channel<HEAD_DIM>(dim, lane)] = dq_reg[row][dim] * rules.scale;
    }
  }
}

template <int HEAD_DIM, typename Rules>
void launch_for(const FlashBackward<float>& p, const Rules& rules, const Stream& stream) {
  using Cut = Tiling<HEAD_DIM>;
  constexpr int DELTA_THREADS = 256;
  constexpr std::size_t SHARED_BYTES = Cut::SHARED_FLOATS * sizeof(float);
  const Tensors tensors{.query = p.query,
                        .key = p.key,
                        .value = p.value,
                        .output = p.output,
                        .lse = p.lse,
                        .d_output = p.d_output,
                        .d_query = p.d_query,
                        .d_key = p.d_key,
                        .d_value = p.d_value,
                        .delta = p.delta,
                        .deterministic = p.deterministic};
  const Index heads = Index{rules.sequences} * rules.heads;
  const Index kv_heads = Index{rules.sequences} * rules.kv_heads;
  const auto launch_blocks = [&](auto kernel, Index blocks, int threads, std::size_t shared_bytes) {
    if (blocks == 0) return;
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), shared_bytes, stream,
           tensors, rules);
  };
  launch_blocks(delta_kernel<HEAD_DIM, Rules>, ceil_div(heads * rules.queries * (HEAD_DIM / 4), DELTA_THREADS),
                DELTA_THREADS, 0);
  launch_blocks(keys_kernel<HEAD_DIM, Rules>, kv_heads * ceil_div(rules.keys, Cut::KV), Cut::THREADS, SHARED_BYTES);
  if (!p.deterministic) return;
  launch_blocks(queries_kernel<HEAD_DIM, Rules>, heads * ceil_div(rules.queries, Cut::BLOCK_Q), Cut::THREADS,
                SHARED_BYTES);
}

}  // namespace flashkata::flash_kernels::backward

namespace flashkata::flash_kernels {

/// The arguments have been checked.
template <typename Rules>
void launch_backward(const FlashBackward<float>& problem, const Rules& rules, const Stream& stream) {
  switch (problem.query.size(3)) {
    case 16:
      return backward::launch_for<16>(problem, rules, stream);
    case 32:
      return backward::launch_for<32>(problem, rules, stream);
    case 64:
      return backward::launch_for<64>(problem, rules, stream);
    default:
      return backward::launch_for<128>(problem, rules, stream);
  }
}

}  // namespace flashkata::flash_kernels
