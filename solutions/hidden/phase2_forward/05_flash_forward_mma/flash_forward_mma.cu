// flash_forward_mma: output = softmax(scale query key^T) value and its LSE, on tensor cores
//
// New here   Products run as mma_m16n8k16: 16-bit operands, float sums. Scores and weights never leave registers: the
//            C fragment of S = Q K^T is, element for element, the A fragment of P V. K and V come by cp.async, each
//            while the other is being used.
// Grid       one block for every BLOCK_Q queries of a head; longest first when causal: block_order.cuh
// Block      WARPS warps, each owns 32 queries: 2 row tiles of 16, so that every K and V fragment is used twice
// Shared     q_smem [BLOCK_Q, D], k_smem [BLOCK_KV, D], v_smem [BLOCK_KV, D], rows swizzled in chunks of 16 bytes
// Try        ./kata test 2.05    ./kata profile 2.05
#include "flash_forward_mma.hpp"

#include "solutions/hidden/block_order.cuh"
#include "solutions/hidden/mma_tile.cuh"

namespace flashkata {
namespace {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int ROW_TILES = 2;                     // of 16 queries, for each warp
constexpr int BLOCK_Q = WARPS * ROW_TILES * 16;  // 128
constexpr int BLOCK_KV = 64;  // keys in a tile; 64 scores a thread beside HEAD_DIM sums of the output

// Blocks that share an SM. More of them hide each other's waiting, but 65536 registers are all there are.
template <int HEAD_DIM>
constexpr int BLOCKS_OF_AN_SM = HEAD_DIM == 128  ? 2
                                : HEAD_DIM == 16 ? 4
                                                 : 3;

// Whether tiles that need no mask have a loop of their own. It is shorter; that costs registers, and with 64 channels
// and 3 blocks there are none to spare.
template <int HEAD_DIM>
constexpr bool TWO_LOOPS = HEAD_DIM != 64;

// The weights of a row are relative to a maximum that may lag behind by this many powers of 2: 256 fits into 16 bits
// as well as 1 does, and O is rescaled once in a while instead of in every tile.
constexpr float LAG = 8.0f;

template <typename T>
struct Arguments {
  View<const T, 4> query, key, value;  // [B, H, S, D]
  View<T, 4> output;                   // [B, H, Sq, D]
  View<float, 3> lse;                  // [B, H, Sq]
  BlockOrder order;
  int queries, keys, diagonal;  // query i sees keys 0 .. i + diagonal
  float scale_log2;             // |scale| log2(e): weights are exp2(scale_log2 * (score - max))
  bool negated;                 // the scale is negative: queries change their sign
};

// What a block works on.
template <typename T, int HEAD_DIM>
struct Work {
  int batch, head, q_first;
  int common_keys;  // this many keys are seen by every query of the block, as far as they exist

  KATA_DEVICE Work(const Arguments<T>& args, int block) {
    const int q_tiles = (args.queries + BLOCK_Q - 1) / BLOCK_Q;
    const int heads = static_cast<int>(args.query.size(1));
    const BlockWork work = args.order.work_of(block, q_tiles, BLOCKS_OF_AN_SM<HEAD_DIM>);
    batch = work.head / heads;
    head = work.head % heads;
    q_first = (q_tiles - 1 - work.tile) * BLOCK_Q;  // the last queries see the most keys
    common_keys = q_first + args.diagonal + 1;
  }
};

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(THREADS, BLOCKS_OF_AN_SM<HEAD_DIM>)
    flash_forward_mma_kernel(const Arguments<T> args) {
  constexpr int KV = BLOCK_KV;
  constexpr int KEY_TILES = KV / 8;         // n tiles of S, 8 keys each
  constexpr int DIM_TILES = HEAD_DIM / 8;   // n tiles of O, 8 channels each
  constexpr int DIM_STEPS = HEAD_DIM / 16;  // k steps of S
  constexpr int KEY_STEPS = KV / 16;        // k steps of O
  constexpr float INF = std::numeric_limits<float>::infinity();
  using Operand = WalkingTile<T, HEAD_DIM, THREADS>;

  const Work<T, HEAD_DIM> work(args, static_cast<int>(blockIdx.x));
  const int q_first = work.q_first;

  T* smem = dynamic_shared<T>();
  const Operand q_smem{{smem}};
  const Operand k_smem{{smem + BLOCK_Q * HEAD_DIM}};
  const Operand v_smem{{smem + (BLOCK_Q + KV) * HEAD_DIM}};

  const int keys_seen = min(args.keys, q_first + BLOCK_Q + args.diagonal);  // by the last query of the block
  const int kv_tiles = keys_seen <= 0 ? 0 : (keys_seen + KV - 1) / KV;
  __shared__ int left_out;  // whether a value beyond the common keys was not finite
  if (threadIdx.x == 0) left_out = 0;

  float o_frag[ROW_TILES][DIM_TILES][4] = {};  // C fragments of O: [2 x 16 queries, HEAD_DIM]
  float row_max[ROW_TILES][2];                 // rows lane / 4 and lane / 4 + 8 of each row tile
  float row_sum[ROW_TILES][2];                 // this lane's share; added up over the quad at the end
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_max[m][half] = -INF;
      row_sum[m][half] = 0.0f;
    }
  }

  const int first_thread = static_cast<int>(threadIdx.x);
  const Index k_stride = args.key.stride(2);
  const Index v_stride = args.value.stride(2);
  const Index kv_last = (kv_tiles - 1) * KV;
  // What this thread copies of the tile that is due next. Pointers walk: an address from a number costs more.
  const T* k_source =
      Operand::own_source(first_thread, &args.key(work.batch, work.head, 0, 0) + kv_last * k_stride, k_stride);
  const T* v_source =
      Operand::own_source(first_thread, &args.value(work.batch, work.head, 0, 0) + kv_last * v_stride, v_stride);
  if (kv_tiles > 0) {  // otherwise nobody would wait for these copies
    const Index q_stride = args.query.stride(2);
    const T* q_source = Operand::own_source(first_thread, &args.query(work.batch, work.head, q_first, 0), q_stride);
    q_smem.template load_async<BLOCK_Q, true>(first_thread, q_source, q_stride, args.queries - q_first);
    k_smem.template load_async<KV, true>(first_thread, k_source, k_stride, args.keys - static_cast<int>(kv_last));
    cp_async_commit();
    if (args.negated) {
      cp_async_wait<0>();
      q_smem.template negate<BLOCK_Q>(first_thread);
    }
  } else {
    __syncthreads();  // left_out is 0: there is no other barrier on this way
  }

  // One tile of keys. `masked` is a type: std::true_type if some query may not see, or nobody has, one of its keys.
  const auto visit = [&](int kv_tile, auto masked) {
    constexpr bool MASKED = decltype(masked)::value;
    const int kv_first = kv_tile * KV;
    const int thread = computed_anew(first_thread);
    const int lane = thread % 32;
    const int warp_row = thread / 32 * ROW_TILES * 16;  // first row of this warp in the block
    // Which row and chunk of a 16 x 16 operand each lane names to ldmatrix_x4. A: rows 0-7 and 8-15 of the left half,
    // then of the right half. B is read transposed: K holds its columns as rows, V holds them as columns.
    const auto q_lane = q_smem.lane(warp_row + lane % 16, lane / 16);
    const auto k_lane = k_smem.lane(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const auto v_lane = v_smem.lane(lane % 16, lane / 16);

    cp_async_wait<0>();
    __syncthreads();  // k_smem (and q_smem) are full; everybody has finished with v_smem of the tile before
    v_smem.template load_async<KV, MASKED>(thread, v_source, v_stride, args.keys - kv_first);
    v_source -= KV * v_stride;
    cp_async_commit();

    // S = Q K^T  [2 x 16 queries, KV keys]
    float s_frag[ROW_TILES][KEY_TILES][4] = {};
#pragma unroll
    for (int step = 0; step < DIM_STEPS; ++step) {
      std::uint32_t q_frag[ROW_TILES][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) ldmatrix_x4(q_frag[m], q_lane.at(m * 16, step * 2));
#pragma unroll
      for (int pair = 0; pair < KEY_TILES / 2; ++pair) {
        // Two B fragments at once: keys 0-7 left and right half, keys 8-15 left and right half.
        std::uint32_t k_frag[4];
        ldmatrix_x4(k_frag, k_lane.at(pair * 16, step * 2));
        const std::uint32_t low[2] = {k_frag[0], k_frag[1]};
        const std::uint32_t high[2] = {k_frag[2], k_frag[3]};
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          mma_m16n8k16<T>(s_frag[m][2 * pair], q_frag[m], low, s_frag[m][2 * pair]);
          mma_m16n8k16<T>(s_frag[m][2 * pair + 1], q_frag[m], high, s_frag[m][2 * pair + 1]);
        }
      }
    }

    cp_async_wait<0>();
    // A weight of 0 does not protect those who may not see a value: 0 times NaN is NaN.
    if (MASKED && kv_first + KV > work.common_keys && v_smem.template clear_non_finite<KV>(thread))
      atomicOr(&left_out, 1);
    __syncthreads();  // v_smem is full; everybody has finished with k_smem
    if (kv_tile > 0) {
      k_source -= KV * k_stride;
      k_smem.template load_async<KV, false>(thread, k_source, k_stride, KV);
      cp_async_commit();
    }

    // Forbid the keys beyond the end and, when causal, beyond each query's own.
    if (MASKED && kv_first + KV > min(args.keys, q_first + warp_row + args.diagonal + 1)) {
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int q_row = q_first + warp_row + m * 16 + half * 8 + lane / 4;
          const int end = min(args.keys, q_row + args.diagonal + 1) - kv_first;  // of this row, in the tile
#pragma unroll
          for (int n = 0; n < KEY_TILES; ++n) {
            const int key = n * 8 + lane % 4 * 2;
            if (key >= end) s_frag[m][n][half * 2] = -INF;
            if (key + 1 >= end) s_frag[m][n][half * 2 + 1] = -INF;
          }
        }
      }
    }

    // P = exp(scale S - max); where a maximum has risen too far, sums and output are brought to the new one first
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float tile_max = s_frag[m][0][half * 2];
#pragma unroll
        for (int n = 0; n < KEY_TILES; ++n) {
          tile_max = fmaxf(tile_max, fmaxf(s_frag[m][n][half * 2], s_frag[m][n][half * 2 + 1]));
        }
        tile_max = quad_max(tile_max);
        if (__any_sync(FULL_WARP, (tile_max - row_max[m][half]) * args.scale_log2 > LAG)) {
          const float new_max = fmaxf(row_max[m][half], tile_max);
          const float rescale = new_max == -INF ? 1.0f : fast_exp2((row_max[m][half] - new_max) * args.scale_log2);
          row_max[m][half] = new_max;
          row_sum[m][half] *= rescale;
#pragma unroll
          for (int n = 0; n < DIM_TILES; ++n) {
            o_frag[m][n][half * 2] *= rescale;
            o_frag[m][n][half * 2 + 1] *= rescale;
          }
        }
        // While a row has seen no key its maximum is -inf, and -inf minus -inf would be NaN.
        const float shift = row_max[m][half] == -INF ? 0.0f : row_max[m][half] * args.scale_log2;
#pragma unroll
        for (int n = 0; n < KEY_TILES; ++n) {
          float& left = s_frag[m][n][half * 2];
          float& right = s_frag[m][n][half * 2 + 1];
          left = fast_exp2(left * args.scale_log2 - shift);
          right = fast_exp2(right * args.scale_log2 - shift);
          row_sum[m][half] += left + right;
        }
      }
    }

    // O += P V  [2 x 16 queries, HEAD_DIM]
#pragma unroll
    for (int step = 0; step < KEY_STEPS; ++step) {
      std::uint32_t p_frag[ROW_TILES][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        // Two C fragments side by side are one A fragment: 16 keys.
        const float(&left)[4] = s_frag[m][2 * step];
        const float(&right)[4] = s_frag[m][2 * step + 1];
        p_frag[m][0] = pack2<T>(left[0], left[1]);
        p_frag[m][1] = pack2<T>(left[2], left[3]);
        p_frag[m][2] = pack2<T>(right[0], right[1]);
        p_frag[m][3] = pack2<T>(right[2], right[3]);
      }
#pragma unroll
      for (int pair = 0; pair < DIM_TILES / 2; ++pair) {
        // V is stored by keys, B wants it by channels: ldmatrix transposes on the way.
        std::uint32_t v_frag[4];
        ldmatrix_x4_trans(v_frag, v_lane.at(step * 16, pair * 2));
        const std::uint32_t low[2] = {v_frag[0], v_frag[1]};
        const std::uint32_t high[2] = {v_frag[2], v_frag[3]};
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          mma_m16n8k16<T>(o_frag[m][2 * pair], p_frag[m], low, o_frag[m][2 * pair]);
          mma_m16n8k16<T>(o_frag[m][2 * pair + 1], p_frag[m], high, o_frag[m][2 * pair + 1]);
        }
      }
    }
  };

  // From the last tile to the first: the tiles that need a mask come first.
  const int first_masked = TWO_LOOPS<HEAD_DIM> ? max(0, min(args.keys, work.common_keys)) / KV : 0;
  int kv_tile = kv_tiles - 1;
#pragma unroll 1
  for (; kv_tile >= first_masked; --kv_tile) visit(kv_tile, std::true_type{});
  if constexpr (TWO_LOOPS<HEAD_DIM>) {
#pragma unroll 1
    for (; kv_tile >= 0; --kv_tile) visit(kv_tile, std::false_type{});
  }

  // O / l through shared memory, where a warp's own rows of q_smem are free: rows leave in whole chunks. What the block
  // works on is computed again; the loops have better uses for the registers.
  const Work<T, HEAD_DIM> same(args, computed_anew(static_cast<int>(blockIdx.x)));
  const int thread = computed_anew(static_cast<int>(threadIdx.x));
  const int lane = thread % 32;
  const int warp_row = thread / 32 * ROW_TILES * 16;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(row_sum[m][half]);
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;  // NaN stays
      const int row = warp_row + m * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < DIM_TILES; ++n) {
        const std::uint32_t two = pack2<T>(o_frag[m][n][half * 2] * inverse, o_frag[m][n][half * 2 + 1] * inverse);
        *reinterpret_cast<std::uint32_t*>(q_smem.at(row, n) + lane % 4 * 2) = two;
      }
      if (lane % 4 == 0 && same.q_first + row < args.queries) {
        constexpr float LN2 = 0.69314718055994531f;
        args.lse(same.batch, same.head, same.q_first + row) =
            sum == 0.0f ? -INF : row_max[m][half] * args.scale_log2 * LN2 + logf(sum);
      }
    }
  }
  __syncwarp();  // this warp's rows are complete
  if (kv_tiles > 0 && left_out) {
    // What was left out for the sake of those who may not see it belongs to those who may.
#pragma unroll 1
    for (int index = lane; index < ROW_TILES * 16 * HEAD_DIM; index += 32) {
      const int row = warp_row + index / HEAD_DIM;
      const int channel = index % HEAD_DIM;
      const int end = min(args.keys, same.common_keys + row);
      T& output = q_smem.at(row, channel / CHUNK)[channel % CHUNK];
      for (int key = max(0, same.common_keys) / KV * KV; key < end; ++key) {
        const T value = args.value(same.batch, same.head, key, channel);
        if (!is_finite(value)) output = from_float<T>(to_float(output) + to_float(value));
      }
    }
    __syncwarp();
  }
  constexpr int CHUNKS = HEAD_DIM / CHUNK;
#pragma unroll
  for (int step = 0; step < ROW_TILES * 16 * CHUNKS / 32; ++step) {
    const int index = step * 32 + lane;
    const int row = warp_row + index / CHUNKS;
    const int chunk = index % CHUNKS;
    if (same.q_first + row < args.queries) {
      *reinterpret_cast<uint4*>(&args.output(same.batch, same.head, same.q_first + row, chunk * CHUNK)) =
          *reinterpret_cast<const uint4*>(q_smem.at(row, chunk));
    }
  }
}

template <typename T, int HEAD_DIM>
void launch_for(const FlashForward<T>& p, const Stream& stream) {
  const float scale = p.scale.value_or(1.0f / std::sqrt(static_cast<float>(HEAD_DIM)));
  // A scale of 0 becomes the smallest that still keeps -inf apart from NaN.
  const float size = std::max(std::abs(scale), std::numeric_limits<float>::min());
  constexpr float LOG2_E = 1.4426950408889634f;
  const auto queries = static_cast<int>(p.query.size(2));
  const auto keys = static_cast<int>(p.key.size(2));
  const BlockOrder order{static_cast<int>(p.query.size(0) * p.query.size(1)), p.causal};
  const Arguments<T> args{
      p.query,       p.key,       p.value, p.output, p.lse, order, queries, keys, p.causal ? keys - queries : keys,
      size * LOG2_E, scale < 0.0f};
  const Index blocks = p.query.size(0) * p.query.size(1) * ceil_div(p.query.size(2), BLOCK_Q);
  if (blocks == 0) return;
  constexpr std::size_t shared_bytes = (BLOCK_Q + 2 * BLOCK_KV) * HEAD_DIM * sizeof(T);
  launch(flash_forward_mma_kernel<T, HEAD_DIM>, dim3(static_cast<unsigned>(blocks)), dim3(THREADS), shared_bytes,
         stream, args);
}

template <typename T>
void dispatch(const FlashForward<T>& problem, const Stream& stream) {
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

void flash_forward_mma(const FlashForward<fp16>& problem, const Stream& stream) {
  check_flash_forward(problem);
  dispatch(problem, stream);
}

void flash_forward_mma(const FlashForward<bf16>& problem, const Stream& stream) {
  check_flash_forward(problem);
  dispatch(problem, stream);
}

}  // namespace flashkata
