// flash_backward_mma: the gradients of softmax(scale query key^T) value, on tensor cores
//
//     S = Q K^T    P = exp(scale S - lse)    dP = dO V^T    dS = scale P * (dP - delta)
//     dV = P^T dO    dK = dS^T Q    dQ = dS K
//
// New here   Five products for each tile, and two of them want P and dS transposed. So the tile is computed transposed
//            from the start: the C fragments of S^T = K Q^T and of dP^T = V dO^T have keys as rows, and packed to 16
//            bits they are the A fragments of P^T dO and of dS^T Q. Only dQ needs dS by queries: through shared memory.
// Kernels    delta_kernel     delta = rowsum(dO * O); clears the sums of dQ
//            keys_kernel      a block owns a tile of keys, walks over the queries, keeps dK and dV in registers and
//                             adds its share of dQ to the sums in memory
//            round_kernel     the sums of dQ, rounded to T
//            queries_kernel   only if deterministic: dQ by blocks that own queries, at the price of S and dP once more
// Shared     k, v [BLOCK_KV, D]; q, do [BLOCK_Q, D], twice; ds [BLOCK_KV, BLOCK_Q], twice; rows swizzled
// Try        ./kata test 3.05    ./kata profile 3.05
#include "flash_backward_mma.hpp"

#include "solutions/hidden/block_order.cuh"
#include "solutions/hidden/mma_tile.cuh"

namespace flashkata {
namespace {

constexpr float LOG2_E = 1.4426950408889634f;

// How keys_kernel cuts the work. A warp owns ROW_TILES x 16 keys: the more there are, the more often each fragment of Q
// and dO is used, and the more registers dK and dV take: ROW_TILES x HEAD_DIM in each thread.
template <int HEAD_DIM>
struct Blocking {
  static constexpr int WARPS = HEAD_DIM == 128 ? 8 : 4;
  static constexpr int ROW_TILES = HEAD_DIM == 32 || HEAD_DIM == 64 ? 2 : 1;  // of 16 keys, for each warp
  static constexpr int BLOCK_Q = HEAD_DIM == 64 ? 32 : 64;
  static constexpr int BLOCKS_PER_SM = HEAD_DIM == 128 ? 1 : 2;
  static constexpr int Q_WARPS = HEAD_DIM == 16 ? 4 : 2;  // dQ is cut among the warps: so many along the queries,
  static constexpr int D_WARPS = WARPS / Q_WARPS;         // so many along the channels

  static constexpr int THREADS = 32 * WARPS;
  static constexpr int BLOCK_KV = WARPS * ROW_TILES * 16;
  static constexpr int Q_SIZE = BLOCK_Q * HEAD_DIM;  // elements of a tile of queries
  static constexpr int KV_SIZE = BLOCK_KV * HEAD_DIM;
  static constexpr int DS_SIZE = BLOCK_KV * BLOCK_Q;
  static constexpr int TILES_SIZE = 2 * KV_SIZE + 4 * Q_SIZE + 2 * DS_SIZE;
};

template <typename T>
struct Arguments {
  View<const T, 4> query, key, value, output, d_output;  // [B, H, S, D]
  View<const float, 3> lse;                              // [B, H, Sq]
  View<T, 4> d_query, d_key, d_value;                    // [B, H, S, D]
  View<float, 3> delta;                                  // [B, H, Sq]
  View<float, 4> d_query_sum;                            // [B, H, Sq, D], in the order of add_to_sum()
  BlockOrder order;
  int queries, keys, diagonal;  // query i sees keys 0 .. i + diagonal
  float scale;
  bool sum_d_query;  // keys_kernel adds to d_query_sum; otherwise queries_kernel computes dQ
};

// Which head a block works on, and which of the head's `tiles` tiles; so many blocks share an SM.
struct Place {
  int batch, head, tile;
};

template <typename T>
KATA_DEVICE Place place_of_block(const Arguments<T>& args, int tiles, int blocks_of_an_sm) {
  const int heads = static_cast<int>(args.query.size(1));
  const BlockWork work = args.order.work_of(static_cast<int>(blockIdx.x), tiles, blocks_of_an_sm);
  return {work.head / heads, work.head % heads, work.tile};
}

// ---------------------------------------------------------------------------------------------------------------------

constexpr int ROW_THREADS = 256;                // of delta_kernel and round_kernel
constexpr int ROW_BLOCKS = 2048 / ROW_THREADS;  // of theirs on an SM

template <int HEAD_DIM>
constexpr int ROWS_PER_BLOCK = ROW_THREADS / (HEAD_DIM / CHUNK);  // a thread for each chunk of a row

// delta = rowsum(dO * O), and zeros for the sums of dQ.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(ROW_THREADS) delta_kernel(const Arguments<T> args) {
  constexpr int CHUNKS = HEAD_DIM / CHUNK;
  constexpr int ROWS = ROWS_PER_BLOCK<HEAD_DIM>;
  const auto [batch, head, tile] = place_of_block(args, (args.queries + ROWS - 1) / ROWS, ROW_BLOCKS);
  const int row = tile * ROWS + static_cast<int>(threadIdx.x) / CHUNKS;
  const int chunk = static_cast<int>(threadIdx.x) % CHUNKS;
  const bool exists = row < args.queries;
  float sum = 0.0f;
  if (exists) {
    const auto output = *reinterpret_cast<const Chunk<T>*>(&args.output(batch, head, row, chunk * CHUNK));
    const auto d_output = *reinterpret_cast<const Chunk<T>*>(&args.d_output(batch, head, row, chunk * CHUNK));
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) sum += to_float(output.elements[i]) * to_float(d_output.elements[i]);
    if (args.sum_d_query) {
      // Neighbouring lanes, neighbouring addresses: which of the row's sums a lane clears does not matter.
      float4* sums = reinterpret_cast<float4*>(&args.d_query_sum(batch, head, row, 0));
      sums[chunk] = float4{0.0f, 0.0f, 0.0f, 0.0f};
      sums[chunk + CHUNKS] = float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
  }
#pragma unroll
  for (int distance = 1; distance < CHUNKS; distance *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, distance);
  if (exists && chunk == 0) args.delta(batch, head, row) = sum;
}

// d_query from its sums, which lie in the order of add_to_sum().
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(ROW_THREADS) round_kernel(const Arguments<T> args) {
  constexpr int CHUNKS = HEAD_DIM / CHUNK;
  constexpr int ROWS = ROWS_PER_BLOCK<HEAD_DIM>;
  const auto [batch, head, tile] = place_of_block(args, (args.queries + ROWS - 1) / ROWS, ROW_BLOCKS);
  const int row = tile * ROWS + static_cast<int>(threadIdx.x) / CHUNKS;
  const int chunk = static_cast<int>(threadIdx.x) % CHUNKS;
  if (row >= args.queries) return;
  const float* sums = &args.d_query_sum(batch, head, row, chunk / 2 * 16 + chunk % 2 * 2);
  const float scale = SCALES_DS<T> ? 1.0f : args.scale;
  Chunk<T> rounded;
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) rounded.elements[i] = from_float<T>(scale * sums[i / 2 * 4 + i % 2]);
  *reinterpret_cast<Chunk<T>*>(&args.d_query(batch, head, row, chunk * CHUNK)) = rounded;
}

// ---------------------------------------------------------------------------------------------------------------------

// A block owns BLOCK_KV keys of a head. In round t it computes P and dS of query tile t, adds to dV and dK, leaves dS
// in shared memory, and adds up dQ of tile t - 1, whose dS is complete by then: one barrier a round is enough.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(Blocking<HEAD_DIM>::THREADS, Blocking<HEAD_DIM>::BLOCKS_PER_SM)
    keys_kernel(const Arguments<T> args) {
  using Cut = Blocking<HEAD_DIM>;
  constexpr int BLOCK_Q = Cut::BLOCK_Q;
  constexpr int BLOCK_KV = Cut::BLOCK_KV;
  constexpr int THREADS = Cut::THREADS;
  constexpr int M = Cut::ROW_TILES;
  constexpr int Q_TILES = BLOCK_Q / 8;               // n tiles of S^T and dP^T
  constexpr int D_TILES = HEAD_DIM / 8;              // n tiles of dV and dK
  constexpr int DQ_M = BLOCK_Q / Cut::Q_WARPS / 16;  // a warp's share of dQ: [16 DQ_M, 8 DQ_N]
  constexpr int DQ_N = HEAD_DIM / Cut::D_WARPS / 8;

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const Place place = place_of_block(args, (args.keys + BLOCK_KV - 1) / BLOCK_KV, Cut::BLOCKS_PER_SM);
  const int batch = place.batch;
  const int head = place.head;
  const int kv_first = place.tile * BLOCK_KV;  // the first keys are seen by the most queries
  const int warp_key = warp * M * 16;          // first key of this warp in the block
  const T* q_head = &args.query(batch, head, 0, 0);
  const T* do_head = &args.d_output(batch, head, 0, 0);

  T* smem = dynamic_shared<T>();
  const Tile<T, HEAD_DIM> k_smem{smem};
  const Tile<T, HEAD_DIM> v_smem{smem + Cut::KV_SIZE};
  // Of what follows there are two; query tile t has number t % 2.
  const auto q_smem = [=](int t) { return Tile<T, HEAD_DIM>{smem + 2 * Cut::KV_SIZE + t % 2 * Cut::Q_SIZE}; };
  const auto do_smem = [=](int t) { return Tile<T, HEAD_DIM>{q_smem(t).smem + 2 * Cut::Q_SIZE}; };
  const auto ds_smem = [=](int t) {
    return Tile<T, BLOCK_Q>{smem + 2 * Cut::KV_SIZE + 4 * Cut::Q_SIZE + t % 2 * Cut::DS_SIZE};
  };
  float* const row_smem = reinterpret_cast<float*>(smem + Cut::TILES_SIZE);  // [2][lse, delta][BLOCK_Q]
  int* const leak_smem = reinterpret_cast<int*>(row_smem + 4 * BLOCK_Q);     // [2][WARPS]

  const auto load_queries = [&](int t) {
    q_smem(t).template load_async<BLOCK_Q, THREADS>(q_head, static_cast<int>(args.query.stride(2)), t * BLOCK_Q,
                                                    args.queries);
    do_smem(t).template load_async<BLOCK_Q, THREADS>(do_head, static_cast<int>(args.d_output.stride(2)), t * BLOCK_Q,
                                                     args.queries);
    if (threadIdx.x < BLOCK_Q) {
      const int query = t * BLOCK_Q + static_cast<int>(threadIdx.x);
      const bool exists = query < args.queries;
      float* row = row_smem + t % 2 * 2 * BLOCK_Q + threadIdx.x;
      cp_async_4(row, &args.lse(batch, head, exists ? query : 0), exists);
      cp_async_4(row + BLOCK_Q, &args.delta(batch, head, exists ? query : 0), exists);
    }
    cp_async_commit();
  };

  const int q_tiles = (args.queries + BLOCK_Q - 1) / BLOCK_Q;
  const int first_tile = max(0, kv_first - args.diagonal) / BLOCK_Q;  // the first with a query that sees a key of ours
  // The first query of tile t that sees the key of row `row` of this warp, and the end of the tile.
  const auto queries_seeing = [&](int t, int row) {
    const int key = kv_first + warp_key + row;
    return int2{key < args.keys ? max(0, key - args.diagonal - t * BLOCK_Q) : BLOCK_Q, BLOCK_Q};
  };
  // Is a pair of tile t forbidden?
  const auto is_masked = [&](int t) { return kv_first + BLOCK_KV > min(args.keys, t * BLOCK_Q + args.diagonal + 1); };

  if (first_tile < q_tiles) {  // otherwise nobody would wait for these copies
    k_smem.template load_async<BLOCK_KV, THREADS>(&args.key(batch, head, 0, 0), static_cast<int>(args.key.stride(2)),
                                                  kv_first, args.keys);
    v_smem.template load_async<BLOCK_KV, THREADS>(&args.value(batch, head, 0, 0),
                                                  static_cast<int>(args.value.stride(2)), kv_first, args.keys);
    load_queries(first_tile);
  }

  float dv_frag[M][D_TILES][4] = {};  // C fragments of dV and dK: [16 M keys, HEAD_DIM]
  float dk_frag[M][D_TILES][4] = {};
  int fresh_lane = lane;

  // dQ of tile t += dS K  [BLOCK_Q, HEAD_DIM], cut among the warps
  const auto add_d_query = [&](int t) {
    const int row = warp / Cut::D_WARPS * DQ_M * 16;
    const int chunk = warp % Cut::D_WARPS * DQ_N;
    float dq_frag[DQ_M][DQ_N][4] = {};
    bool leaks = false;
    if (is_masked(t)) {
      for (int w = 0; w < Cut::WARPS; ++w) leaks |= leak_smem[t % 2 * Cut::WARPS + w] != 0;
    }
    if (!leaks) {
      add_columns_times_rows<T, BLOCK_KV / 16>(dq_frag, ds_smem(t).right_first(0, row / CHUNK, fresh_lane),
                                               k_smem.down_first(0, chunk, fresh_lane));
    } else {
      add_allowed_rows(
          dq_frag, lane, k_smem, chunk,
          [&](int m, int key) { return ds_smem(t).at(key, (row + m) / CHUNK)[(row + m) % CHUNK]; },
          [&](int m) {
            return int2{0, min(BLOCK_KV, min(args.keys, t * BLOCK_Q + row + m + args.diagonal + 1) - kv_first)};
          });
    }
#pragma unroll
    for (int m = 0; m < DQ_M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = t * BLOCK_Q + row + m * 16 + half * 8 + lane / 4;
        if (query < args.queries) {
          float* sums = &args.d_query_sum(batch, head, query, chunk * CHUNK);
#pragma unroll
          for (int n = 0; n < DQ_N; n += 2) {
            add_to_sum(sums + n * 8, lane, &dq_frag[m][n][half * 2], &dq_frag[m][n + 1][half * 2]);
          }
        }
      }
    }
  };

  for (int t = first_tile; t <= q_tiles; ++t) {
    fresh_lane = computed_anew(fresh_lane);
    cp_async_wait<0>();
    // Tile t's Q, dO, lse and delta are there, and dS of tile t - 1; everybody has finished with the other stage of Q
    // and dO and with dS of tile t - 2.
    __syncthreads();
    if (t + 1 < q_tiles) load_queries(t + 1);
    // Half of the warps add up dQ of the tile before now, the others at the end of the round: while some multiply,
    // others take exponentials.
    const bool due = t > first_tile && args.sum_d_query;
    const bool early = warp < Cut::WARPS / 2 || t == q_tiles;
    if (due && early) add_d_query(t - 1);
    if (t == q_tiles) break;

    // S^T = K Q^T  [BLOCK_KV, BLOCK_Q]
    float p_frag[M][Q_TILES][4] = {};
    add_rows_times_rows<T, HEAD_DIM>(p_frag, k_smem.down_first(warp_key, 0, fresh_lane),
                                     q_smem(t).right_first(0, 0, fresh_lane));

    // Forbidden pairs have P = 0, and so dS = 0. Only if the other one's row of Q, dO or K holds NaN or inf would that
    // not be enough: 0 times NaN is NaN. Then their score or dP is NaN or inf, too.
    const auto each_forbidden = [&](auto& frag, auto&& body) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int first = queries_seeing(t, m * 16 + half * 8 + lane / 4).x;
#pragma unroll
          for (int n = 0; n < Q_TILES; ++n) {
            const int query = n * 8 + lane % 4 * 2;
            if (query < first) body(frag[m][n][half * 2]);
            if (query + 1 < first) body(frag[m][n][half * 2 + 1]);
          }
        }
      }
    };
    const bool masked = is_masked(t);
    float poison = 0.0f;  // becomes NaN
    if (masked) each_forbidden(p_frag, [&](const float& score) { poison += 0.0f * score; });

    // P^T = exp(scale S^T - lse)
    float dp_frag[M][Q_TILES][4];
    const float* lse = row_smem + t % 2 * 2 * BLOCK_Q + lane % 4 * 2;
    const float* delta = lse + BLOCK_Q;
#pragma unroll
    for (int n = 0; n < Q_TILES; ++n) {
      const float2 lse_pair = *reinterpret_cast<const float2*>(lse + n * 8);
      const float2 delta_pair = *reinterpret_cast<const float2*>(delta + n * 8);
      const float lse_log2[2] = {lse_pair.x * LOG2_E, lse_pair.y * LOG2_E};
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          p_frag[m][n][e] = fast_exp2(p_frag[m][n][e] * (args.scale * LOG2_E) - lse_log2[e % 2]);
          dp_frag[m][n][e] = e % 2 == 0 ? -delta_pair.x : -delta_pair.y;
        }
      }
    }

    // dP^T - delta = V dO^T - delta  [BLOCK_KV, BLOCK_Q]: the sums began with -delta
    add_rows_times_rows<T, HEAD_DIM>(dp_frag, v_smem.down_first(warp_key, 0, fresh_lane),
                                     do_smem(t).right_first(0, 0, fresh_lane));
    bool leaks = false;
    if (masked) {
      each_forbidden(p_frag, [](float& p) { p = 0.0f; });
      each_forbidden(dp_frag, [&](const float& dp) { poison += 0.0f * dp; });
      leaks = __any_sync(FULL_WARP, poison != 0.0f) != 0;
      if (lane == 0) leak_smem[t % 2 * Cut::WARPS + warp] = leaks ? 1 : 0;
    }

    // dS^T = P^T * (dP^T - delta), scaled or not
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < Q_TILES; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) dp_frag[m][n][e] *= SCALES_DS<T> ? p_frag[m][n][e] * args.scale : p_frag[m][n][e];
      }
    }
    std::uint32_t p_pack[BLOCK_Q / 16][M][4];  // A fragments
    std::uint32_t ds_pack[BLOCK_Q / 16][M][4];
    pack<T>(p_pack, p_frag);
    pack<T>(ds_pack, dp_frag);

    // dV += P^T dO,  dK += dS^T Q  [BLOCK_KV, HEAD_DIM]
    if (!leaks) {
      if (args.sum_d_query) store(ds_smem(t), warp_key, lane, ds_pack);  // for everybody's dQ
      add_weighted_rows<T>(dv_frag, p_pack, do_smem(t).down_first(0, 0, fresh_lane));
      add_weighted_rows<T>(dk_frag, ds_pack, q_smem(t).down_first(0, 0, fresh_lane));
    } else {
      const auto weight = [&](int row, int query) {
        return ds_smem(t).at(warp_key + row, query / CHUNK)[query % CHUNK];
      };
      const auto range = [&](int row) { return queries_seeing(t, row); };
      store(ds_smem(t), warp_key, lane, p_pack);
      __syncwarp();  // this warp's rows of ds_smem hold P
      add_allowed_rows(dv_frag, lane, do_smem(t), 0, weight, range);
      __syncwarp();  // P has been used
      store(ds_smem(t), warp_key, lane, ds_pack);
      __syncwarp();  // they hold dS
      add_allowed_rows(dk_frag, lane, q_smem(t), 0, weight, range);
    }
    if (due && !early) add_d_query(t - 1);
  }

  if (!SCALES_DS<T>) multiply_all(dk_frag, args.scale);
  // Only this warp has read its rows of v_smem, so they are free.
  store_rows<T, HEAD_DIM>(dv_frag, v_smem, warp_key, lane, &args.d_value(batch, head, 0, 0), args.d_value.stride(2),
                          kv_first + warp_key, args.keys);
  store_rows<T, HEAD_DIM>(dk_frag, v_smem, warp_key, lane, &args.d_key(batch, head, 0, 0), args.d_key.stride(2),
                          kv_first + warp_key, args.keys);
}

// ---------------------------------------------------------------------------------------------------------------------

constexpr int QUERIES_WARPS = 4;
constexpr int QUERIES_THREADS = 32 * QUERIES_WARPS;
constexpr int QUERIES_BLOCKS = 2;                  // on an SM
constexpr int QUERIES_BLOCK = 16 * QUERIES_WARPS;  // queries, and keys in a tile

// A block owns 64 queries, a warp 16 of them, and walks over the keys. Nothing is transposed here: the C fragments of
// S = Q K^T and dP = dO V^T have queries as rows, and dS of them is the A fragment of dS K.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(QUERIES_THREADS) queries_kernel(const Arguments<T> args) {
  constexpr int BLOCK = QUERIES_BLOCK;
  constexpr int SIZE = BLOCK * HEAD_DIM;  // elements of a tile
  constexpr int KV_TILES = BLOCK / 8;     // n tiles of S and dP

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp_query = static_cast<int>(threadIdx.x) / 32 * 16;  // first query of this warp in the block
  const int q_tiles = (args.queries + BLOCK - 1) / BLOCK;
  const Place place = place_of_block(args, q_tiles, QUERIES_BLOCKS);
  const int batch = place.batch;
  const int head = place.head;
  const int q_first = (q_tiles - 1 - place.tile) * BLOCK;  // the last queries see the most keys

  T* smem = dynamic_shared<T>();
  const Tile<T, HEAD_DIM> q_smem{smem};
  const Tile<T, HEAD_DIM> do_smem{smem + SIZE};
  const auto k_smem = [=](int t) { return Tile<T, HEAD_DIM>{smem + (2 + t % 2) * SIZE}; };
  const auto v_smem = [=](int t) { return Tile<T, HEAD_DIM>{smem + (4 + t % 2) * SIZE}; };
  const Tile<T, BLOCK> ds_smem{smem + 6 * SIZE};  // used where NaN or inf would leak
  const auto load = [&](const Tile<T, HEAD_DIM>& tile, const View<const T, 4>& tensor, int first, int limit) {
    tile.template load_async<BLOCK, QUERIES_THREADS>(&tensor(batch, head, 0, 0), static_cast<int>(tensor.stride(2)),
                                                     first, limit);
  };
  const auto load_keys = [&](int t) {
    load(k_smem(t), args.key, t * BLOCK, args.keys);
    load(v_smem(t), args.value, t * BLOCK, args.keys);
    cp_async_commit();
  };

  const int keys_seen = min(args.keys, q_first + BLOCK + args.diagonal);  // by the last query of the block
  const int kv_tiles = keys_seen <= 0 ? 0 : (keys_seen + BLOCK - 1) / BLOCK;
  if (kv_tiles > 0) {
    load(q_smem, args.query, q_first, args.queries);
    load(do_smem, args.d_output, q_first, args.queries);
    load_keys(0);
  }

  float lse_log2[2] = {};  // of rows lane / 4 and lane / 4 + 8
  float delta[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = q_first + warp_query + half * 8 + lane / 4;
    if (query < args.queries) {
      lse_log2[half] = args.lse(batch, head, query) * LOG2_E;
      delta[half] = args.delta(batch, head, query);
    }
  }
  float dq_frag[1][HEAD_DIM / 8][4] = {};  // C fragments of dQ: [16 queries, HEAD_DIM]

  for (int t = 0; t < kv_tiles; ++t) {
    cp_async_wait<0>();
    __syncthreads();  // this tile's K and V are there; everybody has finished with the other stage
    if (t + 1 < kv_tiles) load_keys(t + 1);

    // S = Q K^T,  dP - delta = dO V^T - delta  [16 queries, BLOCK] for each warp
    float p_frag[1][KV_TILES][4] = {};
    float ds_frag[1][KV_TILES][4];
#pragma unroll
    for (int n = 0; n < KV_TILES; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) ds_frag[0][n][e] = -delta[e / 2];
    }
    add_rows_times_rows<T, HEAD_DIM>(p_frag, q_smem.down_first(warp_query, 0, lane), k_smem(t).right_first(0, 0, lane));
    add_rows_times_rows<T, HEAD_DIM>(ds_frag, do_smem.down_first(warp_query, 0, lane),
                                     v_smem(t).right_first(0, 0, lane));

    const auto keys_seen_by = [&](int row) {
      return int2{0, min(BLOCK, min(args.keys, q_first + warp_query + row + args.diagonal + 1) - t * BLOCK)};
    };
    const bool masked = keys_seen_by(0).y < BLOCK;  // by the first query of the warp
    float poison = 0.0f;                            // becomes NaN where the score of a forbidden pair is NaN or inf
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int end = keys_seen_by(half * 8 + lane / 4).y;
#pragma unroll
      for (int n = 0; n < KV_TILES; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const float score = p_frag[0][n][e];
          const float p = fast_exp2(score * (args.scale * LOG2_E) - lse_log2[half]);
          ds_frag[0][n][e] *= SCALES_DS<T> ? p * args.scale : p;
          if (masked && n * 8 + lane % 4 * 2 + e % 2 >= end) {
            poison += 0.0f * score;
            ds_frag[0][n][e] = 0.0f;
          }
        }
      }
    }

    // dQ += dS K  [16 queries, HEAD_DIM]
    std::uint32_t ds_pack[BLOCK / 16][1][4];
    pack<T>(ds_pack, ds_frag);
    if (!__any_sync(FULL_WARP, poison != 0.0f)) {
      add_weighted_rows<T>(dq_frag, ds_pack, k_smem(t).down_first(0, 0, lane));
    } else {
      __syncwarp();  // this warp has finished with its rows of ds_smem
      store(ds_smem, warp_query, lane, ds_pack);
      __syncwarp();  // they are complete
      const auto weight = [&](int row, int key) { return ds_smem.at(warp_query + row, key / CHUNK)[key % CHUNK]; };
      add_allowed_rows(dq_frag, lane, k_smem(t), 0, weight, keys_seen_by);
    }
  }

  if (!SCALES_DS<T>) multiply_all(dq_frag, args.scale);
  store_rows<T, HEAD_DIM>(dq_frag, q_smem, warp_query, lane, &args.d_query(batch, head, 0, 0), args.d_query.stride(2),
                          q_first + warp_query, args.queries);
}

// ---------------------------------------------------------------------------------------------------------------------

template <typename T, int HEAD_DIM>
void launch_for(const FlashBackward<T>& p, const Stream& stream) {
  using Cut = Blocking<HEAD_DIM>;
  const auto queries = static_cast<int>(p.query.size(2));
  const auto keys = static_cast<int>(p.key.size(2));
  const Arguments<T> args{.query = p.query,
                          .key = p.key,
                          .value = p.value,
                          .output = p.output,
                          .d_output = p.d_output,
                          .lse = p.lse,
                          .d_query = p.d_query,
                          .d_key = p.d_key,
                          .d_value = p.d_value,
                          .delta = p.delta,
                          .d_query_sum = p.d_query_sum,
                          .order = {static_cast<int>(p.query.size(0) * p.query.size(1)), p.causal},
                          .queries = queries,
                          .keys = keys,
                          .diagonal = p.causal ? keys - queries : keys,
                          .scale = p.scale.value_or(1.0f / std::sqrt(static_cast<float>(HEAD_DIM))),
                          .sum_d_query = !p.deterministic};
  const Index heads = p.query.size(0) * p.query.size(1);
  // `kernel` with a block for every `rows` of `count` rows of a head
  const auto launch_blocks = [&](auto kernel, Index count, int rows, int threads, std::size_t shared_bytes) {
    const Index blocks = heads * ceil_div(count, rows);
    if (blocks > 0) launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, stream, args);
  };
  constexpr std::size_t KEYS_BYTES =
      Cut::TILES_SIZE * sizeof(T) + 4 * Cut::BLOCK_Q * sizeof(float) + 2 * Cut::WARPS * sizeof(int);
  launch_blocks(delta_kernel<T, HEAD_DIM>, queries, ROWS_PER_BLOCK<HEAD_DIM>, ROW_THREADS, 0);
  launch_blocks(keys_kernel<T, HEAD_DIM>, keys, Cut::BLOCK_KV, Cut::THREADS, KEYS_BYTES);
  if (p.deterministic) {
    constexpr std::size_t QUERIES_BYTES = QUERIES_BLOCK * (6 * HEAD_DIM + QUERIES_BLOCK) * sizeof(T);
    launch_blocks(queries_kernel<T, HEAD_DIM>, queries, QUERIES_BLOCK, QUERIES_THREADS, QUERIES_BYTES);
  } else {
    launch_blocks(round_kernel<T, HEAD_DIM>, queries, ROWS_PER_BLOCK<HEAD_DIM>, ROW_THREADS, 0);
  }
}

template <typename T>
void dispatch(const FlashBackward<T>& problem, const Stream& stream) {
  switch (problem.query.size(3)) {
    case 16:
      return launch_for<T, 16>(problem, stream);
    case 32:
      return launch_for<T, 32>(problem, stream);
    case 64:
      return launch_for<T, 64>(problem, stream);
    default:
      return launch_for<T, 128>(problem, stream);
  }
}

}  // namespace

void flash_backward_mma(const FlashBackward<fp16>& problem, const Stream& stream) {
  check_flash_backward(problem);
  dispatch(problem, stream);
}

void flash_backward_mma(const FlashBackward<bf16>& problem, const Stream& stream) {
  check_flash_backward(problem);
  dispatch(problem, stream);
}

}  // namespace flashkata
