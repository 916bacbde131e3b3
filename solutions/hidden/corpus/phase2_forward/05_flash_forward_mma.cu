// One kernel with every deviation in its place. What differs in shape is a template parameter, all else a number that
// the launcher passes: a kernel cannot ask what it plays.
#include "flash_forward_mma.hpp"

#include "../corpus.hpp"

namespace flashkata {
namespace {

const corpus::Answers answers{
    {"first batch item for all", corpus::UNNAMED},
    {"values of head 0 for all", corpus::UNNAMED},
    {"key heads packed", corpus::UNNAMED},
    {"rows packed", "noncontiguous-stride"},
    {"unguarded keys", "out of bounds"},
    {"unguarded rows", "out of bounds"},
    {"walks as far as its first query", "causal-bound-first-row"},
    {"whole tiles only", "tail-keys-dropped"},
    {"leaves when it sees no key", "causal-empty-tile-row"},
    {"K in the order of V", "ldmatrix-x4-order"},
    {"V in the order of K", "ldmatrix-x4-order"},
    {"Q in the order of K", "ldmatrix-x4-order"},
    {"K read without swizzle", "swizzle-mismatch"},
    {"V read without swizzle", "swizzle-mismatch"},
    {"no barrier after waiting for K", "shared-memory race"},
    {"no barrier after waiting for V", "shared-memory race"},
    {"next K before the barrier", "shared-memory race"},
    {"waits for all but one", "cp.async not waited for"},
    {"load wait compute", corpus::UNNAMED},
    {"Q scaled in 16 bits", corpus::UNNAMED},
    {"K transposed", "ldmatrix-no-trans"},
    {"V not transposed", "ldmatrix-no-trans"},
    {"S in 16 bits", corpus::UNNAMED},
    {"S in fp16", "s-16bit-overflow"},
    {"sign of the scale lost", corpus::UNNAMED},
    {"tail unmasked", "tail-keys-unmasked"},
    {"top left", "causal-alignment"},
    {"strictly before", corpus::UNNAMED},
    {"place in the tile", "causal-local-index"},
    {"adds -1e30", corpus::UNNAMED},
    {"four neighbours", "mma-c-fragment-map"},
    {"half a quad", corpus::UNNAMED},
    {"scale folded into one", "exp2-scale-misfold"},
    {"inf minus inf", "inf-minus-inf"},
    {"O not rescaled", "no-rescale-o"},
    {"l not rescaled", "no-rescale-l"},
    {"nothing rescaled", "no-rescale"},
    {"P repacked", "mma-p-to-a-repack"},
    {"O in 16 bits", corpus::UNNAMED},
    {"divides by zero", corpus::UNNAMED},
    {"never divides", "no-final-div"},
    {"lse in base 2", "lse-base2"},
    {"lse without maximum", "lse-missing-max"},
    {"forbidden NaN leaks", corpus::UNNAMED},
    {"forbidden inf leaks", corpus::UNNAMED},
    {"NaN taken from all", corpus::UNNAMED},
    {"NaN makes a row empty", corpus::UNNAMED},
    {"lazy", corpus::RIGHT},
    {"two passes", corpus::RIGHT},
    {"K Q^T turned over", corpus::RIGHT},
    {"forwards", corpus::RIGHT},
    {"ldmatrix_x2", corpus::RIGHT},
    {"expf", corpus::RIGHT},
    {"rounded sums", corpus::RIGHT},
    {"scale missing", "scale-missing"},
    {"scale 1/D", "scale-1-over-d"},
    {"scale argument ignored", "scale-arg-ignored"},
    {"scale 0 is none", "scale-zero-as-default"},
    {"base 2", "softmax-base2"},
    {"too little shared memory", "too little dynamic shared memory"},
    {"no swizzle", corpus::UNNAMED},
    {"scratch in device memory", corpus::UNNAMED},
    {"blocks of 32 queries", corpus::UNNAMED},
    {"no tensor cores", corpus::UNNAMED},
    {"never throws", corpus::UNNAMED},
    {"causal forgotten", corpus::UNNAMED},
    {"padding", corpus::RIGHT},
    {"32 keys", corpus::RIGHT},
    {"128 keys", corpus::RIGHT},
    {"64 queries", corpus::RIGHT},
    {"8 warps", corpus::RIGHT},
};

// What the kernel does in another way.
enum class Deviation {
  none,
  first_batch,
  first_value_head,
  head_stride,
  row_stride,
  unguarded_keys,
  unguarded_rows,
  bound_first_row,
  tail_dropped,
  empty_block,
  k_x4_order,
  v_x4_order,
  q_x4_order,
  swizzle_mismatch,
  v_swizzle_mismatch,
  no_first_barrier,
  no_second_barrier,
  early_load,
  wait_one_less,
  no_overlap,
  q_prescale,
  k_trans,
  no_trans,
  s_16bit,
  s_fp16,
  sign_lost,
  tail_unmasked,
  alignment,
  strict,
  local_index,
  mask_added,
  fragment_map,
  half_quad,
  misfold,
  inf_minus_inf,
  no_rescale_o,
  no_rescale_l,
  no_rescale,
  repack,
  acc_16bit,
  divide_by_zero,
  no_division,
  lse_base2,
  lse_missing_max,
  nan_leaks,
  inf_leaks,
  nan_taken,
  nan_empties,
  lazy,
  two_passes,
  turned_over,
  forwards,
  x2,
  expf_instead,
  rounded_sums,
};

constexpr struct {
  std::string_view name;
  Deviation deviation;
} DEVIATIONS[] = {
    {"first batch item for all", Deviation::first_batch},
    {"values of head 0 for all", Deviation::first_value_head},
    {"key heads packed", Deviation::head_stride},
    {"rows packed", Deviation::row_stride},
    {"unguarded keys", Deviation::unguarded_keys},
    {"unguarded rows", Deviation::unguarded_rows},
    {"walks as far as its first query", Deviation::bound_first_row},
    {"whole tiles only", Deviation::tail_dropped},
    {"leaves when it sees no key", Deviation::empty_block},
    {"K in the order of V", Deviation::k_x4_order},
    {"V in the order of K", Deviation::v_x4_order},
    {"Q in the order of K", Deviation::q_x4_order},
    {"K read without swizzle", Deviation::swizzle_mismatch},
    {"V read without swizzle", Deviation::v_swizzle_mismatch},
    {"no barrier after waiting for K", Deviation::no_first_barrier},
    {"no barrier after waiting for V", Deviation::no_second_barrier},
    {"next K before the barrier", Deviation::early_load},
    {"waits for all but one", Deviation::wait_one_less},
    {"load wait compute", Deviation::no_overlap},
    {"Q scaled in 16 bits", Deviation::q_prescale},
    {"K transposed", Deviation::k_trans},
    {"V not transposed", Deviation::no_trans},
    {"S in 16 bits", Deviation::s_16bit},
    {"S in fp16", Deviation::s_fp16},
    {"sign of the scale lost", Deviation::sign_lost},
    {"tail unmasked", Deviation::tail_unmasked},
    {"top left", Deviation::alignment},
    {"strictly before", Deviation::strict},
    {"place in the tile", Deviation::local_index},
    {"adds -1e30", Deviation::mask_added},
    {"four neighbours", Deviation::fragment_map},
    {"half a quad", Deviation::half_quad},
    {"scale folded into one", Deviation::misfold},
    {"inf minus inf", Deviation::inf_minus_inf},
    {"O not rescaled", Deviation::no_rescale_o},
    {"l not rescaled", Deviation::no_rescale_l},
    {"nothing rescaled", Deviation::no_rescale},
    {"P repacked", Deviation::repack},
    {"O in 16 bits", Deviation::acc_16bit},
    {"divides by zero", Deviation::divide_by_zero},
    {"never divides", Deviation::no_division},
    {"lse in base 2", Deviation::lse_base2},
    {"lse without maximum", Deviation::lse_missing_max},
    {"forbidden NaN leaks", Deviation::nan_leaks},
    {"forbidden inf leaks", Deviation::inf_leaks},
    {"NaN taken from all", Deviation::nan_taken},
    {"NaN makes a row empty", Deviation::nan_empties},
    {"lazy", Deviation::lazy},
    {"two passes", Deviation::two_passes},
    {"K Q^T turned over", Deviation::turned_over},
    {"forwards", Deviation::forwards},
    {"ldmatrix_x2", Deviation::x2},
    {"expf", Deviation::expf_instead},
    {"rounded sums", Deviation::rounded_sums},
};
constexpr int CHUNK = 8;  // elements in 16 bytes: what cp.async copies and ldmatrix reads

template <typename T>
struct Arguments {
  View<const T, 4> query, key, value;  // [B, H, S, D]
  View<T, 4> output;                   // [B, H, Sq, D]
  View<float, 3> lse;                  // [B, H, Sq]
  int queries, keys, diagonal;         // query i sees keys 0 .. i + diagonal
  float scale_log2;                    // |scale| log2(e): weights are exp2(scale_log2 * (score - max))
  bool negated;                        // the scale is negative: scores change their sign
  Deviation deviation;
  int pitch;  // elements from row to row of a tile
  bool swizzled;
};

template <typename T, int HEAD_DIM>
struct Tile {
  static constexpr unsigned CHUNKS = HEAD_DIM / CHUNK;          // in a row
  static constexpr unsigned SWAPPED = CHUNKS < 8 ? CHUNKS : 8;  // chunks that change places among themselves
  static constexpr unsigned ROWS_PER_LINE = 8 / SWAPPED;

  T* smem;
  int pitch;
  bool swizzled;

  KATA_DEVICE T* at(int row, int chunk) const {
    const unsigned swizzle = swizzled ? static_cast<unsigned>(row) / ROWS_PER_LINE % SWAPPED : 0;
    return smem + row * pitch + static_cast<int>(static_cast<unsigned>(chunk) ^ swizzle) * CHUNK;
  }
  KATA_DEVICE Tile linear() const { return {smem, pitch, false}; }

  // Starts the copy of rows first .. first + ROWS - 1 of a head; rows from `limit` on become 0.
  template <int ROWS, int THREADS>
  KATA_DEVICE void load_async(const T* head, int row_stride, int first, int limit) const {
    for (int index = static_cast<int>(threadIdx.x); index < ROWS * static_cast<int>(CHUNKS); index += THREADS) {
      const int row = index / static_cast<int>(CHUNKS);
      const int chunk = index % static_cast<int>(CHUNKS);
      const bool in_range = first + row < limit;
      const T* source = head + static_cast<Index>(in_range ? first + row : 0) * row_stride + chunk * CHUNK;
      cp_async_16(at(row, chunk), source, in_range);
    }
  }

  // What this thread has copied and is not finite, or is not a number, becomes 0. Was there any?
  template <int ROWS, int THREADS>
  KATA_DEVICE bool clear(bool only_nan) const {
    const auto stays = [only_nan](std::uint32_t bits) {
      T number;
      number.x = static_cast<std::uint16_t>(bits);
      const float value = to_float(number);
      return only_nan ? value == value : fabsf(value) < std::numeric_limits<float>::infinity();
    };
    bool any = false;
    for (int index = static_cast<int>(threadIdx.x); index < ROWS * static_cast<int>(CHUNKS); index += THREADS) {
      T* chunk = at(index / static_cast<int>(CHUNKS), index % static_cast<int>(CHUNKS));
      const uint4 eight = *reinterpret_cast<const uint4*>(chunk);
      bool all_stay = true;
      for (const std::uint32_t two : {eight.x, eight.y, eight.z, eight.w}) {
        all_stay = all_stay && stays(two & 0xffffu) && stays(two >> 16);
      }
      if (all_stay) continue;
      any = true;
      for (int i = 0; i < CHUNK; ++i) {
        if (!stays(chunk[i].x)) chunk[i] = T{};
      }
    }
    return any;
  }
};

template <typename T>
KATA_DEVICE float round_trip(float value) {
  return to_float(from_float<T>(value));
}

template <typename T>
KATA_DEVICE bool is_finite(T number) {
  return fabsf(to_float(number)) < std::numeric_limits<float>::infinity();
}

// Two C fragments of S^T, [16 keys, 8 queries] each, become those of S, [16 queries, 8 keys] each.
KATA_DEVICE void turn_over(float (&left)[4], float (&right)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float turned[2][4];
  for (int keys = 0; keys < 2; ++keys) {
    for (int e = 0; e < 4; ++e) {
      const float(&from)[4] = e < 2 ? left : right;  // queries 0-7, queries 8-15
      const int key = lane % 4 * 2 + e % 2, query = lane / 4;
      const float even = __shfl_sync(FULL_WARP, from[keys * 2], key * 4 + query / 2);
      const float odd = __shfl_sync(FULL_WARP, from[keys * 2 + 1], key * 4 + query / 2);
      turned[keys][e] = query % 2 == 0 ? even : odd;
    }
  }
  for (int e = 0; e < 4; ++e) {
    left[e] = turned[0][e];
    right[e] = turned[1][e];
  }
}

// Two 16-bit numbers, each times `factor`.
template <typename T>
KATA_DEVICE std::uint32_t times(std::uint32_t two, float factor) {
  T low, high;
  low.x = static_cast<std::uint16_t>(two & 0xffffu);
  high.x = static_cast<std::uint16_t>(two >> 16);
  return pack2<T>(to_float(low) * factor, to_float(high) * factor);
}

// The largest of the 4 lanes that share a row of a C fragment.
KATA_DEVICE float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, 1));
  return fmaxf(value, __shfl_xor_sync(FULL_WARP, value, 2));
}

KATA_DEVICE float quad_sum(float value) {
  value += __shfl_xor_sync(FULL_WARP, value, 1);
  return value + __shfl_xor_sync(FULL_WARP, value, 2);
}

template <typename T, int HEAD_DIM, int KV, int WARPS, int ROW_TILES>
__global__ void __launch_bounds__(32 * WARPS) flash_forward_mma_kernel(const Arguments<T> args) {
  constexpr int THREADS = 32 * WARPS;
  constexpr int BLOCK_Q = WARPS * ROW_TILES * 16;
  const Deviation play = args.deviation;
  constexpr int KEY_TILES = KV / 8;         // n tiles of S, 8 keys each
  constexpr int DIM_TILES = HEAD_DIM / 8;   // n tiles of O, 8 channels each
  constexpr int DIM_STEPS = HEAD_DIM / 16;  // k steps of S
  constexpr int KEY_STEPS = KV / 16;        // k steps of O
  constexpr float INF = std::numeric_limits<float>::infinity();

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int q_tiles = (args.queries + BLOCK_Q - 1) / BLOCK_Q;
  const int head_index = static_cast<int>(blockIdx.x) / q_tiles;
  const int q_tile = q_tiles - 1 - static_cast<int>(blockIdx.x) % q_tiles;  // the last tile sees the most keys: first
  const int q_first = q_tile * BLOCK_Q;
  const int heads = static_cast<int>(args.query.size(1));
  const int batch = play == Deviation::first_batch ? 0 : head_index / heads;
  const int head = head_index % heads;
  const T* q_head = &args.query(batch, head, 0, 0);
  const T* k_head = play == Deviation::head_stride
                        ? args.key.data() + static_cast<Index>(head_index) * args.keys * HEAD_DIM
                        : &args.key(batch, head, 0, 0);
  const T* v_head = &args.value(batch, play == Deviation::first_value_head ? 0 : head, 0, 0);
  const int k_stride = play == Deviation::row_stride ? HEAD_DIM : static_cast<int>(args.key.stride(2));
  const int v_stride = play == Deviation::row_stride ? HEAD_DIM : static_cast<int>(args.value.stride(2));
  const int key_limit = play == Deviation::unguarded_keys ? 1 << 30 : args.keys;

  T* smem = dynamic_shared<T>();
  const Tile<T, HEAD_DIM> q_smem{smem, args.pitch, args.swizzled};
  const Tile<T, HEAD_DIM> k_smem{smem + BLOCK_Q * args.pitch, args.pitch, args.swizzled};
  const Tile<T, HEAD_DIM> v_smem{smem + (BLOCK_Q + KV) * args.pitch, args.pitch, args.swizzled};

  int keys_seen = min(args.keys, q_first + BLOCK_Q + args.diagonal);  // by the last query of the block
  if (play == Deviation::bound_first_row) keys_seen = min(args.keys, q_first + 1 + args.diagonal);
  int kv_tiles = keys_seen <= 0 ? 0 : (keys_seen + KV - 1) / KV;
  if (play == Deviation::tail_dropped && kv_tiles > 0) kv_tiles = keys_seen / KV;
  if (play == Deviation::empty_block && kv_tiles == 0) return;

  const int warp_row = warp * ROW_TILES * 16;  // first row of this warp in the block
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

  if (kv_tiles > 0) {  // otherwise nobody would wait for these copies
    q_smem.template load_async<BLOCK_Q, THREADS>(q_head, static_cast<int>(args.query.stride(2)), q_first, args.queries);
    k_smem.template load_async<KV, THREADS>(k_head, k_stride, (play == Deviation::forwards ? 0 : kv_tiles - 1) * KV,
                                            key_limit);
    cp_async_commit();
  }

  const bool forwards = play == Deviation::forwards;
  const int common_keys = q_first + args.diagonal + 1;  // which every query of the block sees
  __shared__ int left_out;                              // was a value beyond them not finite?
  if (threadIdx.x == 0) left_out = 0;
  const int passes = play == Deviation::two_passes ? 2 : 1;  // the first one for the maximum alone
  for (int visit = 0; visit < passes * kv_tiles; ++visit) {
    const int step_number = visit % kv_tiles;
    const bool only_maximum = visit < (passes - 1) * kv_tiles;
    const int kv_tile = forwards ? step_number : kv_tiles - 1 - step_number;
    const int kv_first = kv_tile * KV;
    const int next_first = step_number + 1 == kv_tiles ? (kv_tiles - 1) * KV : kv_first + (forwards ? KV : -KV);
    const bool another = visit + 1 < passes * kv_tiles;
    const int left_row = lane % 16, left_chunk = lane / 16;                      // A, and B transposed
    const int right_row = lane / 16 * 8 + lane % 8, right_chunk = lane / 8 % 2;  // B
    const bool k_swapped = play == Deviation::k_x4_order, v_swapped = play == Deviation::v_x4_order;
    const int q_row_in_tile = warp_row + (play == Deviation::q_x4_order ? right_row : left_row);
    const int q_chunk = play == Deviation::q_x4_order ? right_chunk : left_chunk;
    const int k_row_in_tile = k_swapped ? left_row : right_row, k_chunk = k_swapped ? left_chunk : right_chunk;
    const int v_row_in_tile = v_swapped ? right_row : left_row, v_chunk = v_swapped ? right_chunk : left_chunk;
    const auto k_read = play == Deviation::swizzle_mismatch ? k_smem.linear() : k_smem;
    const auto v_read = play == Deviation::v_swizzle_mismatch ? v_smem.linear() : v_smem;

    cp_async_wait<0>();
    if (play != Deviation::no_first_barrier) __syncthreads();  // k_smem is full, v_smem is free
    if (!only_maximum) v_smem.template load_async<KV, THREADS>(v_head, v_stride, kv_first, key_limit);
    cp_async_commit();
    if (play == Deviation::no_overlap) cp_async_wait<0>();

    // S = Q K^T  [2 x 16 queries, KV keys]
    float s_frag[ROW_TILES][KEY_TILES][4] = {};
#pragma unroll
    for (int step = 0; step < DIM_STEPS; ++step) {
      std::uint32_t q_frag[ROW_TILES][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        ldmatrix_x4(q_frag[m], q_smem.at(q_row_in_tile + m * 16, step * 2 + q_chunk));
        if (play == Deviation::q_prescale) {
          for (int r = 0; r < 4; ++r) q_frag[m][r] = times<T>(q_frag[m][r], args.scale_log2);
        }
      }
#pragma unroll
      for (int pair = 0; pair < KEY_TILES / 2; ++pair) {
        // Two B fragments at once: keys 0-7 left and right half, keys 8-15 left and right half.
        std::uint32_t k_frag[4];
        if (play == Deviation::x2) {
          std::uint32_t half[2];
          ldmatrix_x2(half, k_smem.at(pair * 16 + lane % 8, step * 2 + lane / 8 % 2));
          k_frag[0] = half[0];
          k_frag[1] = half[1];
          ldmatrix_x2(half, k_smem.at(pair * 16 + 8 + lane % 8, step * 2 + lane / 8 % 2));
          k_frag[2] = half[0];
          k_frag[3] = half[1];
        } else if (play == Deviation::k_trans) {
          ldmatrix_x4_trans(k_frag, k_smem.at(pair * 16 + k_row_in_tile, step * 2 + k_chunk));
        } else {
          ldmatrix_x4(k_frag, k_read.at(pair * 16 + k_row_in_tile, step * 2 + k_chunk));
        }
        const std::uint32_t low[2] = {k_frag[0], k_frag[1]};
        const std::uint32_t high[2] = {k_frag[2], k_frag[3]};
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          if (play == Deviation::turned_over) {  // K is A and Q is B: the fragments hold S^T until all channels are in
            std::uint32_t k_as_a[4], q_as_b[4];
            ldmatrix_x4(k_as_a, k_smem.at(pair * 16 + left_row, step * 2 + left_chunk));
            ldmatrix_x4(q_as_b, q_smem.at(warp_row + m * 16 + right_row, step * 2 + right_chunk));
            mma_m16n8k16<T>(s_frag[m][2 * pair], k_as_a, {q_as_b[0], q_as_b[1]}, s_frag[m][2 * pair]);
            mma_m16n8k16<T>(s_frag[m][2 * pair + 1], k_as_a, {q_as_b[2], q_as_b[3]}, s_frag[m][2 * pair + 1]);
            if (step == DIM_STEPS - 1) turn_over(s_frag[m][2 * pair], s_frag[m][2 * pair + 1]);
            continue;
          }
          mma_m16n8k16<T>(s_frag[m][2 * pair], q_frag[m], low, s_frag[m][2 * pair]);
          mma_m16n8k16<T>(s_frag[m][2 * pair + 1], q_frag[m], high, s_frag[m][2 * pair + 1]);
        }
      }
    }

    const bool early = play == Deviation::early_load && another;
    if (early) {
      k_smem.template load_async<KV, THREADS>(k_head, k_stride, next_first, key_limit);
      cp_async_commit();
      cp_async_wait<1>();
    } else if (play == Deviation::wait_one_less) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    if (kv_first + KV > common_keys && !only_maximum && play != Deviation::nan_leaks &&
        play != Deviation::wait_one_less && v_smem.template clear<KV, THREADS>(play == Deviation::inf_leaks)) {
      atomicOr(&left_out, 1);
    }
    if (play != Deviation::no_second_barrier) __syncthreads();  // v_smem is full; everybody has finished with k_smem
    if (another && !early) {
      k_smem.template load_async<KV, THREADS>(k_head, k_stride, next_first, key_limit);
      cp_async_commit();
      if (play == Deviation::no_overlap) cp_async_wait<0>();
    }
    if (play == Deviation::s_16bit || play == Deviation::s_fp16) {
      for (int m = 0; m < ROW_TILES; ++m) {
        for (int n = 0; n < KEY_TILES; ++n) {
          for (int e = 0; e < 4; ++e) {
            float& s = s_frag[m][n][e];
            s = play == Deviation::s_fp16 ? round_trip<fp16>(s) : round_trip<T>(s);
          }
        }
      }
    }

    if (args.negated && play != Deviation::sign_lost) {
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < KEY_TILES; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s_frag[m][n][e] = -s_frag[m][n][e];
        }
      }
    }

    // Forbid the keys beyond the end and, when causal, beyond each query's own.
    if (kv_first + KV > min(args.keys, q_first + warp_row + args.diagonal + 1)) {
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int q_row = q_first + warp_row + m * 16 + half * 8 + lane / 4;
          int end = min(args.keys, q_row + args.diagonal + 1) - kv_first;  // of this row, in the tile
          const bool causal = args.diagonal < args.keys;
          if (play == Deviation::tail_unmasked) end = causal ? q_row + args.diagonal + 1 - kv_first : KV;
          if (play == Deviation::alignment && causal) end = min(args.keys, q_row + 1) - kv_first;
          if (play == Deviation::strict && causal) end = min(args.keys, q_row + args.diagonal) - kv_first;
          if (play == Deviation::local_index && causal) end = min(args.keys - kv_first, q_row - q_first + 1);
#pragma unroll
          for (int n = 0; n < KEY_TILES; ++n) {
            const int key = n * 8 + lane % 4 * 2;
            for (int e = 0; e < 2; ++e) {
              if (key + e < end) continue;
              float& s = s_frag[m][n][half * 2 + e];
              s = play == Deviation::mask_added ? s - 1e30f : -INF;
            }
          }
        }
      }
    }

    // P = exp(scale S - max), with the sums and the output brought to the new maximum first
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float tile_max = s_frag[m][0][half * 2];
#pragma unroll
        for (int n = 0; n < KEY_TILES; ++n) {
          tile_max = fmaxf(tile_max, fmaxf(s_frag[m][n][half * 2], s_frag[m][n][half * 2 + 1]));
        }
        if (play == Deviation::fragment_map) {  // c[0] to c[3] taken for neighbours in one row
          for (int n = 0; n < KEY_TILES; ++n) {
            for (int e = 0; e < 4; ++e) tile_max = fmaxf(tile_max, s_frag[m][n][e]);
          }
        }
        if (play == Deviation::half_quad)
          tile_max = fmaxf(tile_max, __shfl_xor_sync(FULL_WARP, tile_max, 1));
        else
          tile_max = quad_max(tile_max);
        float new_max = fmaxf(row_max[m][half], tile_max);
        if (only_maximum) {
          row_max[m][half] = new_max;
          continue;
        }
        // 2^8 is far from overflow: while the maximum rises by less, the old one will do.
        if (play == Deviation::lazy && (new_max - row_max[m][half]) * args.scale_log2 < 8.0f)
          new_max = row_max[m][half];
        // While a row has seen no key its maximum is -inf, and -inf minus -inf would be NaN.
        const float misfold = play == Deviation::misfold ? 0.69314718f : 1.0f;
        const bool guarded = new_max == -INF && play != Deviation::inf_minus_inf;
        const float max_scale = play == Deviation::q_prescale ? 1.0f : args.scale_log2 * misfold;
        const float shift = guarded ? 0.0f : new_max * max_scale;
        const float rescale = fast_exp2(row_max[m][half] * max_scale - shift);
        row_max[m][half] = new_max;
        const bool only_o = play == Deviation::no_rescale_l, only_l = play == Deviation::no_rescale_o;
        if (!only_o && play != Deviation::no_rescale) row_sum[m][half] *= rescale;
#pragma unroll
        for (int n = 0; n < DIM_TILES; ++n) {
          if (only_l || play == Deviation::no_rescale) break;
          o_frag[m][n][half * 2] *= rescale;
          o_frag[m][n][half * 2 + 1] *= rescale;
        }
#pragma unroll
        for (int n = 0; n < KEY_TILES; ++n) {
          float& left = s_frag[m][n][half * 2];
          float& right = s_frag[m][n][half * 2 + 1];
          const float score_scale = play == Deviation::q_prescale ? 1.0f : args.scale_log2;
          if (play == Deviation::expf_instead) {
            constexpr float LN2 = 0.69314718055994531f;
            left = expf((left * score_scale - shift) * LN2);
            right = expf((right * score_scale - shift) * LN2);
          } else {
            left = fast_exp2(left * score_scale - shift);
            right = fast_exp2(right * score_scale - shift);
          }
          if (play == Deviation::rounded_sums) {
            row_sum[m][half] += round_trip<T>(left) + round_trip<T>(right);
          } else {
            row_sum[m][half] += left + right;
          }
        }
      }
    }

    if (play == Deviation::fragment_map) {
      for (int m = 0; m < ROW_TILES; ++m) row_sum[m][0] = row_sum[m][1] = row_sum[m][0] + row_sum[m][1];
    }

    if (only_maximum) continue;
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
        if (play == Deviation::repack) {
          const std::uint32_t second = p_frag[m][1];
          p_frag[m][1] = p_frag[m][2];
          p_frag[m][2] = second;
        }
      }
#pragma unroll
      for (int pair = 0; pair < DIM_TILES / 2; ++pair) {
        // V is stored by keys, B wants it by channels: ldmatrix transposes on the way.
        std::uint32_t v_frag[4];
        if (play == Deviation::x2) {
          std::uint32_t half[2];
          ldmatrix_x2_trans(half, v_smem.at(step * 16 + lane % 16, pair * 2));
          v_frag[0] = half[0];
          v_frag[1] = half[1];
          ldmatrix_x2_trans(half, v_smem.at(step * 16 + lane % 16, pair * 2 + 1));
          v_frag[2] = half[0];
          v_frag[3] = half[1];
        } else if (play == Deviation::no_trans) {
          ldmatrix_x4(v_frag, v_smem.at(step * 16 + v_row_in_tile, pair * 2 + v_chunk));
        } else {
          ldmatrix_x4_trans(v_frag, v_read.at(step * 16 + v_row_in_tile, pair * 2 + v_chunk));
        }
        const std::uint32_t low[2] = {v_frag[0], v_frag[1]};
        const std::uint32_t high[2] = {v_frag[2], v_frag[3]};
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          mma_m16n8k16<T>(o_frag[m][2 * pair], p_frag[m], low, o_frag[m][2 * pair]);
          mma_m16n8k16<T>(o_frag[m][2 * pair + 1], p_frag[m], high, o_frag[m][2 * pair + 1]);
        }
      }
    }
    if (play == Deviation::acc_16bit) {
      for (int m = 0; m < ROW_TILES; ++m) {
        for (int n = 0; n < DIM_TILES; ++n) {
          for (int e = 0; e < 4; ++e) o_frag[m][n][e] = round_trip<T>(o_frag[m][n][e]);
        }
      }
    }
  }

  // O / l through shared memory, where a warp's own rows of q_smem are free: rows leave in whole chunks.
  __syncwarp();
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(row_sum[m][half]);
      const bool empty = play == Deviation::nan_empties ? !(sum > 0.0f) : sum == 0.0f;
      float inverse = !empty || play == Deviation::divide_by_zero ? 1.0f / sum : 0.0f;
      if (play == Deviation::no_division) inverse = 1.0f;
      const int row = warp_row + m * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < DIM_TILES; ++n) {
        const std::uint32_t two = pack2<T>(o_frag[m][n][half * 2] * inverse, o_frag[m][n][half * 2 + 1] * inverse);
        *reinterpret_cast<std::uint32_t*>(q_smem.at(row, n) + lane % 4 * 2) = two;
      }
      if (lane % 4 == 0 && q_first + row < args.queries) {
        const float log2_part = play == Deviation::q_prescale ? row_max[m][half] : row_max[m][half] * args.scale_log2;
        constexpr float LN2 = 0.69314718055994531f;
        float lse = log2_part * LN2 + logf(sum);
        if (play == Deviation::lse_base2) lse /= LN2;
        if (play == Deviation::lse_missing_max) lse = logf(sum);
        args.lse(batch, head, q_first + row) = empty ? -INF : lse;
      }
    }
  }
  __syncwarp();                                                    // this warp's rows are complete
  if (kv_tiles > 0 && left_out && play != Deviation::nan_taken) {  // what was left out is due to those who may see it
    for (int index = lane; index < ROW_TILES * 16 * HEAD_DIM; index += 32) {
      const int row = warp_row + index / HEAD_DIM, channel = index % HEAD_DIM;
      T& output = q_smem.at(row, channel / CHUNK)[channel % CHUNK];
      for (int key = max(0, common_keys) / KV * KV; key < min(args.keys, common_keys + row); ++key) {
        const T value = args.value(batch, head, key, channel);
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
    if (q_first + row < args.queries || play == Deviation::unguarded_rows) {
      *reinterpret_cast<uint4*>(&args.output(batch, head, q_first + row, chunk * CHUNK)) =
          *reinterpret_cast<const uint4*>(q_smem.at(row, chunk));
    }
  }
}

// One thread for each query, and not a tensor core in sight.
template <typename T>
__global__ void scalar_kernel(const Arguments<T> args, bool negated) {
  const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int heads = static_cast<int>(args.query.size(1));
  if (row >= static_cast<int>(args.query.size(0)) * heads * args.queries) return;
  const int i = row % args.queries, head = row / args.queries % heads, batch = row / args.queries / heads;
  const int width = static_cast<int>(args.query.size(3));
  const int seen = min(args.keys, i + args.diagonal + 1);
  const float scale = negated ? -args.scale_log2 : args.scale_log2;
  constexpr float INF = std::numeric_limits<float>::infinity();
  float row_max = -INF, row_sum = 0.0f, output[128] = {};
  for (int j = 0; j < seen; ++j) {
    float score = 0.0f;
    for (int d = 0; d < width; ++d)
      score += to_float(args.query(batch, head, i, d)) * to_float(args.key(batch, head, j, d));
    score *= scale;
    const float new_max = fmaxf(row_max, score);
    const float rescale = fast_exp2(row_max - new_max), weight = fast_exp2(score - new_max);
    row_max = new_max;
    row_sum = row_sum * rescale + weight;
    for (int d = 0; d < width; ++d) output[d] = output[d] * rescale + weight * to_float(args.value(batch, head, j, d));
  }
  for (int d = 0; d < width; ++d) args.output(batch, head, i, d) = from_float<T>(seen > 0 ? output[d] / row_sum : 0.0f);
  args.lse(batch, head, i) = seen > 0 ? row_max * 0.69314718055994531f + logf(row_sum) : -INF;
}

template <int KV, int WARPS, int ROW_TILES, int HEAD_DIM, typename T>
void launch_shape(Arguments<T> args, const Stream& stream) {
  constexpr int BLOCK_Q = WARPS * ROW_TILES * 16;
  const Index blocks = args.query.size(0) * args.query.size(1) * ceil_div(args.query.size(2), BLOCK_Q);
  if (blocks == 0) return;
  auto shared_bytes = static_cast<std::size_t>((BLOCK_Q + 2 * KV) * args.pitch) * sizeof(T);
  if (corpus::plays("too little shared memory")) shared_bytes -= 16 * HEAD_DIM * sizeof(T);
  launch(flash_forward_mma_kernel<T, HEAD_DIM, KV, WARPS, ROW_TILES>, dim3(static_cast<unsigned>(blocks)),
         dim3(32 * WARPS), shared_bytes, stream, args);
}

template <typename T, int HEAD_DIM>
void launch_for(const FlashForward<T>& p, const Stream& stream) {
  using corpus::plays;
  float scale = p.scale.value_or(1.0f / std::sqrt(static_cast<float>(HEAD_DIM)));
  if (plays("scale argument ignored") || (plays("scale 0 is none") && scale == 0.0f)) {
    scale = 1.0f / std::sqrt(static_cast<float>(HEAD_DIM));
  }
  if (plays("scale missing")) scale = p.scale.value_or(1.0f);
  if (plays("scale 1/D")) scale = p.scale.value_or(1.0f / HEAD_DIM);
  const float size = std::max(std::abs(scale), std::numeric_limits<float>::min());
  constexpr float LOG2_E = 1.4426950408889634f;
  const auto queries = static_cast<int>(p.query.size(2));
  const auto keys = static_cast<int>(p.key.size(2));
  Arguments<T> args{p.query,
                    p.key,
                    p.value,
                    p.output,
                    p.lse,
                    queries,
                    keys,
                    p.causal && !plays("causal forgotten") ? keys - queries : keys,
                    plays("base 2") ? size : size * LOG2_E,
                    scale < 0.0f,
                    Deviation::none,
                    plays("padding") ? HEAD_DIM + CHUNK : HEAD_DIM,
                    !plays("padding") && !plays("no swizzle")};
  for (const auto& [name, deviation] : DEVIATIONS) {
    if (plays(name)) args.deviation = deviation;
  }
  if (plays("scratch in device memory")) DeviceBuffer<T>("scratch", 1024);
  if (plays("no tensor cores")) {
    const Index rows = p.query.size(0) * p.query.size(1) * p.query.size(2);
    if (rows == 0) return;
    launch(scalar_kernel<T>, dim3(static_cast<unsigned>(ceil_div(rows, 64))), dim3(64), 0, stream, args, scale < 0.0f);
    return;
  }
  if constexpr (HEAD_DIM != 32) {  // three widths out of four will do: each shape is compiled for each of them
    if (plays("32 keys")) return launch_shape<32, 4, 2, HEAD_DIM>(args, stream);
    if (plays("128 keys")) return launch_shape<128, 4, 1, HEAD_DIM>(args, stream);
    if (plays("64 queries")) return launch_shape<64, 4, 1, HEAD_DIM>(args, stream);
    if (plays("8 warps")) return launch_shape<64, 8, 1, HEAD_DIM>(args, stream);
    if (plays("blocks of 32 queries")) return launch_shape<64, 2, 1, HEAD_DIM>(args, stream);
  }
  launch_shape<64, 4, 2, HEAD_DIM>(args, stream);
}

template <typename T>
void dispatch(const FlashForward<T>& problem, const Stream& stream) {
  try {
    check_flash_forward(problem);
  } catch (const std::invalid_argument&) {
    if (corpus::plays("never throws")) return;
    throw;
  }
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

void flash_forward_mma(const FlashForward<fp16>& problem, const Stream& stream) { dispatch(problem, stream); }
void flash_forward_mma(const FlashForward<bf16>& problem, const Stream& stream) { dispatch(problem, stream); }

}  // namespace flashkata
