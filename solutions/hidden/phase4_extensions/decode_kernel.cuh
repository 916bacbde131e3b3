// Decoding: a few queries, a long cache. What steps 06 and 07 share; they differ in where the row of a key lies.
//
//   part s of a row:  output = softmax(scale q K^T) V over its own keys, lse = log(sum(exp(scale q K^T)))
//   the row:          output = sum(exp(lse_s - lse) output_s),  lse = log(sum(exp(lse_s)))
//
// New here   Nobody can reuse a key: it meets the few queries of its group once. So K and V go straight from global
//            memory into the registers of the one warp that multiplies them; there is no tile in shared memory and no
//            barrier in the loop. What counts is bytes in flight: every warp asks for its next keys before it works on
//            those it has.
// Grid       a block for each row tile of each part of each key/value head of each sequence; then a block for each row
// Block      WARPS warps that share the keys of the part in turn, each with a running maximum, sum and output of its
// own Shared     only at the end, to merge what the workers of a block have gathered
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>

#include "common/gpu/gpu.hpp"

namespace flashkata::decode {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

/// Where the rows of the output go, and those of its parts.
template <typename T>
struct Results {
  View<T, 4> output;              // [B, H, Sq, D]; written by the first kernel if there is one part
  View<float, 3> lse;             // [B, H, Sq], or no memory at all
  View<float, 5> partial_output;  // [splits, B, H, Sq, D]
  View<float, 4> partial_lse;     // [splits, B, H, Sq]
  int heads, queries, splits;

  KATA_DEVICE void store_lse(Index b, Index h, Index i, float value) const {
    if (lse.data() != nullptr) lse(b, h, i) = value;
  }
};

/// Rows of K and V one stride apart.
template <typename T>
struct EvenRows {
  const T *key, *value;  // row 0
  Index key_stride, value_stride;

  KATA_DEVICE const T* key_row(int j) const { return key + j * key_stride; }
  KATA_DEVICE const T* value_row(int j) const { return value + j * value_stride; }
  KATA_DEVICE EvenRows tile(int first, bool /*exists*/) const {
    return {key_row(first), value_row(first), key_stride, value_stride};
  }
};

/// Cache says where rows lie: cache.head(b, kv_head) has key_row(j) and value_row(j), and tile(first, exists), which
/// has key_row(i) and value_row(i) of keys first .. first + 15, first a multiple of 16.
template <typename T, typename Cache>
struct Arguments {
  View<const T, 4> query;  // [B, H, Sq, D]
  Cache cache;
  View<const std::int32_t, 1> lengths;  // [B]
  Results<T> results;
  int kv_heads, group, queries, splits;  // group: query heads of a key/value head
  bool causal;
  float scale_log2;  // scale log2(e): weights are powers of 2
};

// ---- Loads ----------------------------------------------------------------------------------------------------------

// WORDS neighbouring words of 4 bytes: 1, 2 or 4 of them, in one load.
template <int WORDS>
KATA_DEVICE void load_words(std::uint32_t* reg, const void* memory) {
  if constexpr (WORDS == 4) {
    const uint4 four = *static_cast<const uint4*>(memory);
    reg[0] = four.x, reg[1] = four.y, reg[2] = four.z, reg[3] = four.w;
  } else if constexpr (WORDS == 2) {
    const uint2 two = *static_cast<const uint2*>(memory);
    reg[0] = two.x, reg[1] = two.y;
  } else {
    reg[0] = *static_cast<const std::uint32_t*>(memory);
  }
}

// 4 neighbouring numbers of type T.
template <typename T>
KATA_DEVICE void store_four(T* memory, float4 four) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float4*>(memory) = four;
  } else {
    *reinterpret_cast<uint2*>(memory) = make_uint2(pack2<T>(four.x, four.y), pack2<T>(four.z, four.w));
  }
}

// ---- What a block works on ------------------------------------------------------------------------------------------

// Some rows of one key/value head and some of its keys. Row r of the head is query r % Sq of its query head r / Sq.
struct Work {
  int batch, kv_head, split, first_row, rows;
  int length, begin, end;  // keys of the sequence; of the part: begin .. end - 1
  int common;              // every query sees the keys before this one

  template <int ROWS, typename Arguments>
  static KATA_DEVICE Work of_block(const Arguments& args) {
    const int all_rows = args.group * args.queries;
    const int row_tiles = (all_rows + ROWS - 1) / ROWS;
    int index = static_cast<int>(blockIdx.x);
    Work work{};
    work.first_row = index % row_tiles * ROWS;  // neighbours in time: the second tile of rows finds the keys in L2
    work.rows = min(ROWS, all_rows - work.first_row);
    index /= row_tiles;
    work.split = index % args.splits;
    index /= args.splits;
    work.kv_head = index % args.kv_heads;
    work.batch = index / args.kv_heads;
    work.length = args.lengths(work.batch);
    const int share = (work.length + args.splits - 1) / args.splits;
    const int chunk = (share + 15) / 16 * 16;  // nobody cuts a tile of 16 keys
    work.begin = min(work.length, work.split * chunk);
    work.end = min(work.length, work.begin + chunk);
    work.common = args.causal ? work.length - args.queries + 1 : work.length;
    return work;
  }

  // How many keys does row first_row + r see?
  template <typename Arguments>
  KATA_DEVICE int keys_seen(const Arguments& args, int r) const {
    return args.causal ? common + (first_row + r) % args.queries : length;
  }
  template <typename Arguments>
  KATA_DEVICE Index head(const Arguments& args, int r) const {
    return static_cast<Index>(kv_head) * args.group + (first_row + r) / args.queries;
  }
  template <typename Arguments>
  KATA_DEVICE Index query(const Arguments& args, int r) const {
    return (first_row + r) % args.queries;
  }
};

// ---- Merging --------------------------------------------------------------------------------------------------------

// What the workers of a block have gathered, each from keys (or parts) of its own, in shared memory.
template <int WORKERS, int ROWS, int HEAD_DIM>
struct Gathered {
  static constexpr int STRIDE = HEAD_DIM + 4;  // rows begin in different banks
  static constexpr std::size_t BYTES = WORKERS * ROWS * (STRIDE + 2) * sizeof(float);

  float* output;   // [WORKERS, ROWS, HEAD_DIM]: sums of weighted values
  float* row_max;  // [WORKERS, ROWS]: of scores times log2(e)
  float* row_sum;  // [WORKERS, ROWS]: of weights

  KATA_DEVICE explicit Gathered(float* smem)
      : output(smem), row_max(smem + WORKERS * ROWS * STRIDE), row_sum(row_max + WORKERS * ROWS) {}

  KATA_DEVICE float* place(int worker, int row, int channel) const {
    return output + (worker * ROWS + row) * STRIDE + channel;
  }

  struct Row {
    float max, sum;

    KATA_DEVICE float inverse() const { return sum == 0.0f ? 0.0f : 1.0f / sum; }  // NaN stays
    KATA_DEVICE float lse() const { return sum == 0.0f ? MINUS_INFINITY : (max + log2f(sum)) * LN_2; }
  };

  // A worker that saw no key has the maximum -inf, and nobody else may have seen one: -inf minus -inf would be NaN.
  KATA_DEVICE float weight(int worker, int row, float max) const {
    return fast_exp2(row_max[worker * ROWS + row] - (max == MINUS_INFINITY ? 0.0f : max));
  }
  KATA_DEVICE Row merged(int row) const {
    Row result{MINUS_INFINITY, 0.0f};
    for (int worker = 0; worker < WORKERS; ++worker) result.max = fmaxf(result.max, row_max[worker * ROWS + row]);
    for (int worker = 0; worker < WORKERS; ++worker) {
      result.sum += weight(worker, row, result.max) * row_sum[worker * ROWS + row];
    }
    return result;
  }
  KATA_DEVICE float4 merged_output(int row, int channel, const Row& of) const {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int worker = 0; worker < WORKERS; ++worker) {
      const float share = weight(worker, row, of.max);
      if (share == 0.0f) continue;
      const float4 four = *reinterpret_cast<const float4*>(place(worker, row, channel));
      sum.x = fmaf(share, four.x, sum.x), sum.y = fmaf(share, four.y, sum.y);
      sum.z = fmaf(share, four.z, sum.z), sum.w = fmaf(share, four.w, sum.w);
    }
    const float inverse = of.inverse();
    return make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse);
  }
};

// The block's rows leave: to the output if there is one part, otherwise to this part's place. `correct` may change 4
// numbers of row r from a channel on.
template <int ROWS, int HEAD_DIM, typename T, typename Cache, typename Workers, typename Correct>
KATA_DEVICE void store_rows(const Arguments<T, Cache>& args, const Work& work, const Workers& gathered,
                            const Correct& correct) {
  constexpr int FOURS = HEAD_DIM / 4;
  for (int index = static_cast<int>(threadIdx.x); index < work.rows * FOURS; index += THREADS) {
    const int row = index / FOURS;
    const int channel = index % FOURS * 4;
    const Index head = work.head(args, row);
    const Index query = work.query(args, row);
    const auto merged = gathered.merged(row);
    float4 four = gathered.merged_output(row, channel, merged);
    correct(row, channel, four);
    const Results<T>& to = args.results;
    if (args.splits == 1) {
      store_four(&to.output(work.batch, head, query, channel), four);
      if (channel == 0) to.store_lse(work.batch, head, query, merged.lse());
    } else {
      store_four(&to.partial_output(work.split, work.batch, head, query, channel), four);
      if (channel == 0) to.partial_lse(work.split, work.batch, head, query) = merged.lse();
    }
  }
}

// ---- The parts, 16 bits: tensor cores -------------------------------------------------------------------------------

// All of these bits are set in inf and in NaN, and in no other number.
template <typename T>
constexpr std::uint32_t EXPONENT = std::is_same_v<T, fp16> ? 0x7c00 : 0x7f80;

template <typename T>
KATA_DEVICE bool is_finite(T number) {
  return (number.x & EXPONENT<T>) != EXPONENT<T>;
}

// Makes 0 of a half that is not finite. Was there one?
template <typename T>
KATA_DEVICE bool clear_non_finite(std::uint32_t& two) {
  const std::uint32_t low = (two & EXPONENT<T>) == EXPONENT<T> ? 0x0000ffffu : 0u;
  const std::uint32_t high = (two >> 16 & EXPONENT<T>) == EXPONENT<T> ? 0xffff0000u : 0u;
  two &= ~(low | high);
  return (low | high) != 0;
}

// The largest and the sum over the 4 lanes that share a row of a C fragment.
KATA_DEVICE float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, 1));
  return fmaxf(value, __shfl_xor_sync(FULL_WARP, value, 2));
}

KATA_DEVICE float quad_sum(float value) {
  value += __shfl_xor_sync(FULL_WARP, value, 1);
  return value + __shfl_xor_sync(FULL_WARP, value, 2);
}

// Fragments without shared memory. A product adds up over its middle axis in any order, as long as both factors have
// the same; and it does not mind in which order the columns of its right factor come. So a lane loads 16 neighbouring
// bytes of a row and calls them what the fragment wants (mma.hpp; group = lane / 4, pair = 2 * (lane % 4)):
//
//   S = Q K^T   the lane has channels 32 c + 4 pair .. + 7 of rows group and group + 8 of Q, and of keys group and
//               group + 8: two k steps, of which the first takes channels + 0 .. + 3 as [pair], [pair + 1], [pair + 8],
//               [pair + 9]
//   O = P V     the lane has channels 64 c + 8 group .. + 7 of keys pair, pair + 1, pair + 8, pair + 9: column `group`
//               of 8 fragments of B. Fragment m has channels 64 c + 8 column + m.
template <typename T, int HEAD_DIM>
struct Fragments {
  static constexpr int ROWS = 16, KEYS = 16;
  static constexpr int K_WORDS = HEAD_DIM / 8;  // of a lane, in each row of Q or K
  static constexpr int K_LOAD = K_WORDS < 4 ? K_WORDS : 4;
  static constexpr int V_WORDS = HEAD_DIM / 16;  // of a lane, in each row of V
  static constexpr int V_LOAD = V_WORDS < 4 ? V_WORDS : 4;
  static constexpr int DIM_TILES = HEAD_DIM / 8;

  // A lane's words of a row of Q or K.
  static KATA_DEVICE void load_k(std::uint32_t (&reg)[K_WORDS], const T* row, int lane, bool exists) {
#pragma unroll
    for (int word = 0; word < K_WORDS; word += K_LOAD) {
      if (exists) {
        load_words<K_LOAD>(&reg[word], row + 8 * word + lane % 4 * 2 * K_LOAD);
      } else {
        for (int i = 0; i < K_LOAD; ++i) reg[word + i] = 0;
      }
    }
  }

  // A lane's words of a row of V.
  static KATA_DEVICE void load_v(std::uint32_t (&reg)[V_WORDS], const T* row, int lane, bool exists) {
#pragma unroll
    for (int word = 0; word < V_WORDS; word += V_LOAD) {
      if (exists) {
        load_words<V_LOAD>(&reg[word], row + 16 * word + lane / 4 * 2 * V_LOAD);
      } else {
        for (int i = 0; i < V_LOAD; ++i) reg[word + i] = 0;
      }
    }
  }

  // The channel of column `column` of O's fragment m.
  static KATA_DEVICE int channel(int m, int column) {
    return m / (2 * V_LOAD) * 16 * V_LOAD + column * 2 * V_LOAD + m % (2 * V_LOAD);
  }
};

template <typename T, int HEAD_DIM, typename Cache>
__global__ void __launch_bounds__(THREADS) parts_mma_kernel(const Arguments<T, Cache> args) {
  using Frag = Fragments<T, HEAD_DIM>;
  constexpr int ROWS = Frag::ROWS, KEYS = Frag::KEYS;
  const Work work = Work::of_block<ROWS>(args);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int group = lane / 4;
  const int pair = lane % 4 * 2;
  const auto cache = args.cache.head(work.batch, work.kv_head);

  std::uint32_t q_reg[2][Frag::K_WORDS];  // rows group and group + 8; rows that do not exist are 0
  for (int half = 0; half < 2; ++half) {
    const int row = group + 8 * half;
    const bool exists = row < work.rows;
    const int from = exists ? row : 0;
    Frag::load_k(q_reg[half], &args.query(work.batch, work.head(args, from), work.query(args, from), 0), lane, exists);
  }
  float o_frag[Frag::DIM_TILES][4] = {};  // [16 rows, HEAD_DIM]
  float row_max[2] = {MINUS_INFINITY, MINUS_INFINITY};
  float row_sum[2] = {};  // this lane's share
  bool left_out = false;  // whether a value that not all rows see was not finite

  std::uint32_t k_reg[2][Frag::K_WORDS];  // keys group and group + 8
  const auto load_keys = [&](const auto& tile, int first) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = group + 8 * half;
      const bool exists = first + i < work.end;
      Frag::load_k(k_reg[half], exists ? tile.key_row(i) : nullptr, lane, exists);
    }
  };
  const int warp_begin = work.begin + warp * KEYS;
  auto tile = cache.tile(warp_begin, warp_begin < work.end);
  load_keys(tile, warp_begin);
  for (int first = warp_begin; first < work.end; first += WARPS * KEYS) {
    std::uint32_t v_reg[4][Frag::V_WORDS];  // keys pair, pair + 1, pair + 8, pair + 9; in flight during the scores
#pragma unroll
    for (int place = 0; place < 4; ++place) {
      const int i = pair + place % 2 + place / 2 * 8;
      const bool exists = first + i < work.end;
      Frag::load_v(v_reg[place], exists ? tile.value_row(i) : nullptr, lane, exists);
    }
    const int next = first + WARPS * KEYS;
    tile = cache.tile(next, next < work.end);  // if that takes a look into a table, it takes it now

    // S = Q K^T  [16 rows, 16 keys]
    float s_frag[2][4] = {};
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
      const std::uint32_t q_frag[4] = {q_reg[0][2 * step], q_reg[1][2 * step], q_reg[0][2 * step + 1],
                                       q_reg[1][2 * step + 1]};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const std::uint32_t k_frag[2] = {k_reg[n][2 * step], k_reg[n][2 * step + 1]};
        mma_m16n8k16<T>(s_frag[n], q_frag, k_frag, s_frag[n]);
      }
    }
    load_keys(tile, next);  // in flight until the next round

    const bool masked = first + KEYS > min(work.end, work.common);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_max = MINUS_INFINITY;
      const int limit = masked ? min(work.end, work.keys_seen(args, group + 8 * half)) - first : KEYS;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& s = s_frag[n][2 * half + i];
          s = 8 * n + pair + i < limit ? s * args.scale_log2 : MINUS_INFINITY;
          tile_max = fmaxf(tile_max, s);
        }
      }
      const float new_max = fmaxf(row_max[half], quad_max(tile_max));
      if (__any_sync(FULL_WARP, new_max > row_max[half])) {
        // While a row has seen no key its maximum is -inf, and -inf minus -inf would be NaN.
        const float rescale = new_max == MINUS_INFINITY ? 1.0f : fast_exp2(row_max[half] - new_max);
        row_max[half] = new_max;
        row_sum[half] *= rescale;
#pragma unroll
        for (int m = 0; m < Frag::DIM_TILES; ++m) {
          o_frag[m][2 * half] *= rescale;
          o_frag[m][2 * half + 1] *= rescale;
        }
      }
      const float shift = row_max[half] == MINUS_INFINITY ? 0.0f : row_max[half];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& weight = s_frag[n][2 * half + i];
          weight = fast_exp2(weight - shift);
          row_sum[half] += weight;
        }
      }
    }

    // A weight of 0 does not protect those who may not see a value: 0 times NaN is NaN.
    if (first + KEYS > work.common) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int word = 0; word < Frag::V_WORDS; ++word) left_out |= clear_non_finite<T>(v_reg[i][word]);
      }
    }

    // O += P V  [16 rows, HEAD_DIM]
    const std::uint32_t p_frag[4] = {pack2<T>(s_frag[0][0], s_frag[0][1]), pack2<T>(s_frag[0][2], s_frag[0][3]),
                                     pack2<T>(s_frag[1][0], s_frag[1][1]), pack2<T>(s_frag[1][2], s_frag[1][3])};
#pragma unroll
    for (int word = 0; word < Frag::V_WORDS; ++word) {
      // The same two channels of 4 keys: one fragment takes the first channel of each, the next the second.
      const std::uint32_t low[2] = {(v_reg[0][word] & 0xffffu) | v_reg[1][word] << 16,
                                    (v_reg[2][word] & 0xffffu) | v_reg[3][word] << 16};
      const std::uint32_t high[2] = {v_reg[0][word] >> 16 | (v_reg[1][word] & 0xffff0000u),
                                     v_reg[2][word] >> 16 | (v_reg[3][word] & 0xffff0000u)};
      mma_m16n8k16<T>(o_frag[2 * word], p_frag, low, o_frag[2 * word]);
      mma_m16n8k16<T>(o_frag[2 * word + 1], p_frag, high, o_frag[2 * word + 1]);
    }
  }

  const Gathered<WARPS, ROWS, HEAD_DIM> gathered(dynamic_shared<float>());
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = group + 8 * half;
    const float sum = quad_sum(row_sum[half]);
    if (pair == 0) {
      gathered.row_max[warp * ROWS + row] = row_max[half];
      gathered.row_sum[warp * ROWS + row] = sum;
    }
#pragma unroll
    for (int m = 0; m < Frag::DIM_TILES; ++m) {
      *gathered.place(warp, row, Frag::channel(m, pair)) = o_frag[m][2 * half];
      *gathered.place(warp, row, Frag::channel(m, pair + 1)) = o_frag[m][2 * half + 1];
    }
  }
  __shared__ int somebody_left_out[WARPS];
  const int warp_left_out = __any_sync(FULL_WARP, left_out);
  if (lane == 0) somebody_left_out[warp] = warp_left_out;
  __syncthreads();  // all workers' rows are there
  int any_left_out = 0;
  for (int other = 0; other < WARPS; ++other) any_left_out |= somebody_left_out[other];
  store_rows<ROWS, HEAD_DIM>(args, work, gathered, [&](int row, int channel, float4& four) {
    if (!any_left_out) return;
    // What was left out for the sake of those who may not see it belongs to those who may.
    const int end = min(work.end, work.keys_seen(args, row));
    for (int key = max(work.begin, work.common - KEYS); key < end; ++key) {
      const T* value = cache.value_row(key) + channel;
      if (!is_finite(value[0])) four.x += to_float(value[0]);
      if (!is_finite(value[1])) four.y += to_float(value[1]);
      if (!is_finite(value[2])) four.z += to_float(value[2]);
      if (!is_finite(value[3])) four.w += to_float(value[3]);
    }
  });
}

// ---- The parts, fp32: multiply-adds ---------------------------------------------------------------------------------

// A worker is LANES neighbouring lanes that share the channels of a key, 8 each; a round of it is STEP keys.
template <int HEAD_DIM>
struct Lanes {
  static constexpr int ROWS = 4, STEP = 2, CHANNELS = 8;
  static constexpr int LANES = HEAD_DIM / CHANNELS;
  static constexpr int WORKERS = THREADS / LANES;

  // A lane's channels of a row: 4 of the first half and 4 of the second, so that neighbours load neighbours.
  static KATA_DEVICE int channel(int lane, int i) { return i / 4 * (HEAD_DIM / 2) + lane * 4 + i % 4; }

  static KATA_DEVICE void load(float (&reg)[CHANNELS], const float* row, int lane, bool exists) {
#pragma unroll
    for (int i = 0; i < CHANNELS; i += 4) {
      float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (exists) four = *reinterpret_cast<const float4*>(row + channel(lane, i));
      reg[i] = four.x, reg[i + 1] = four.y, reg[i + 2] = four.z, reg[i + 3] = four.w;
    }
  }

  static KATA_DEVICE float sum_of_lanes(float value) {
#pragma unroll
    for (int distance = 1; distance < LANES; distance *= 2) value += __shfl_xor_sync(FULL_WARP, value, distance);
    return value;
  }
};

template <int HEAD_DIM, typename Cache>
__global__ void __launch_bounds__(THREADS) parts_kernel(const Arguments<float, Cache> args) {
  using Cut = Lanes<HEAD_DIM>;
  constexpr int ROWS = Cut::ROWS, STEP = Cut::STEP, CHANNELS = Cut::CHANNELS, WORKERS = Cut::WORKERS;
  const Work work = Work::of_block<ROWS>(args);
  const int worker = static_cast<int>(threadIdx.x) / Cut::LANES;
  const int lane = static_cast<int>(threadIdx.x) % Cut::LANES;
  const auto cache = args.cache.head(work.batch, work.kv_head);

  float q_reg[ROWS][CHANNELS];  // times scale log2(e); rows that do not exist are 0
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const bool exists = row < work.rows;
    const int from = exists ? row : 0;
    Cut::load(q_reg[row], &args.query(work.batch, work.head(args, from), work.query(args, from), 0), lane, exists);
#pragma unroll
    for (int i = 0; i < CHANNELS; ++i) q_reg[row][i] *= args.scale_log2;
  }
  float o_reg[ROWS][CHANNELS] = {};
  float row_max[ROWS], row_sum[ROWS] = {};
#pragma unroll
  for (int row = 0; row < ROWS; ++row) row_max[row] = MINUS_INFINITY;

  // The keys of a worker's round are WORKERS apart, so that the lanes of a warp load neighbouring rows.
  float k_reg[STEP][CHANNELS];
  const auto load_keys = [&](int first) {
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
      const int key = first + worker + i * WORKERS;
      Cut::load(k_reg[i], key < work.end ? cache.key_row(key) : nullptr, lane, key < work.end);
    }
  };
  load_keys(work.begin);
  // All workers of a warp go round together: they shuffle together.
  for (int first = work.begin; first < work.end; first += STEP * WORKERS) {
    float v_reg[STEP][CHANNELS];
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
      const int key = first + worker + i * WORKERS;
      Cut::load(v_reg[i], key < work.end ? cache.value_row(key) : nullptr, lane, key < work.end);
    }
    float s_reg[STEP][ROWS];
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        float s = 0.0f;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) s = fmaf(q_reg[row][c], k_reg[i][c], s);
        s_reg[i][row] = Cut::sum_of_lanes(s);
      }
    }
    load_keys(first + STEP * WORKERS);  // in flight until the next round
    const bool masked = first + STEP * WORKERS > min(work.end, work.common);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const int limit = masked ? min(work.end, work.keys_seen(args, row)) - first - worker : STEP * WORKERS;
      float new_max = row_max[row];
#pragma unroll
      for (int i = 0; i < STEP; ++i) {
        if (i * WORKERS >= limit) s_reg[i][row] = MINUS_INFINITY;
        new_max = fmaxf(new_max, s_reg[i][row]);
      }
      // While a row has seen no key its maximum is -inf, and -inf minus -inf would be NaN.
      const float shift = new_max == MINUS_INFINITY ? 0.0f : new_max;
      const float rescale = fast_exp2(row_max[row] - shift);
      row_max[row] = new_max;
      row_sum[row] *= rescale;
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) o_reg[row][c] *= rescale;
#pragma unroll
      for (int i = 0; i < STEP; ++i) {
        // A forbidden value may be NaN, and 0 times NaN is NaN: it has to be left out.
        if (i * WORKERS >= limit) continue;
        const float weight = fast_exp2(s_reg[i][row] - shift);
        row_sum[row] += weight;
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) o_reg[row][c] = fmaf(weight, v_reg[i][c], o_reg[row][c]);
      }
    }
  }

  const Gathered<WORKERS, ROWS, HEAD_DIM> gathered(dynamic_shared<float>());
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    if (lane == 0) {
      gathered.row_max[worker * ROWS + row] = row_max[row];
      gathered.row_sum[worker * ROWS + row] = row_sum[row];
    }
#pragma unroll
    for (int i = 0; i < CHANNELS; i += 4) {
      store_four(gathered.place(worker, row, Cut::channel(lane, i)),
                 make_float4(o_reg[row][i], o_reg[row][i + 1], o_reg[row][i + 2], o_reg[row][i + 3]));
    }
  }
  __syncthreads();  // all workers' rows are there
  store_rows<ROWS, HEAD_DIM>(args, work, gathered, [](int, int, float4&) {});
}

// ---- The merge ------------------------------------------------------------------------------------------------------

// One row a block. A part is to the row what a key is to a part: its lse is the score, its output the value.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(THREADS) merge_kernel(const Results<T> to) {
  constexpr int LANES = HEAD_DIM / 4;
  constexpr int WORKERS = THREADS / LANES;
  constexpr int STEP = 4;  // loads in flight
  const int worker = static_cast<int>(threadIdx.x) / LANES;
  const int channel = static_cast<int>(threadIdx.x) % LANES * 4;
  const Index query = static_cast<int>(blockIdx.x) % to.queries;
  const Index head = static_cast<int>(blockIdx.x) / to.queries % to.heads;
  const Index batch = static_cast<int>(blockIdx.x) / to.queries / to.heads;

  float row_max = MINUS_INFINITY, row_sum = 0.0f;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int first = worker; first < to.splits; first += STEP * WORKERS) {
    float lse[STEP];
    float4 part[STEP];
    float new_max = row_max;
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
      const int split = first + i * WORKERS;
      lse[i] = split < to.splits ? to.partial_lse(split, batch, head, query) * LOG2_E : MINUS_INFINITY;
      new_max = fmaxf(new_max, lse[i]);
    }
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
      // What an empty part holds is anything.
      part[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (lse[i] == MINUS_INFINITY) continue;
      part[i] = *reinterpret_cast<const float4*>(&to.partial_output(first + i * WORKERS, batch, head, query, channel));
    }
    const float shift = new_max == MINUS_INFINITY ? 0.0f : new_max;
    const float rescale = fast_exp2(row_max - shift);
    row_max = new_max;
    row_sum *= rescale;
    sum.x *= rescale, sum.y *= rescale, sum.z *= rescale, sum.w *= rescale;
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
      const float weight = fast_exp2(lse[i] - shift);
      if (weight == 0.0f) continue;
      row_sum += weight;
      sum.x = fmaf(weight, part[i].x, sum.x), sum.y = fmaf(weight, part[i].y, sum.y);
      sum.z = fmaf(weight, part[i].z, sum.z), sum.w = fmaf(weight, part[i].w, sum.w);
    }
  }
  const Gathered<WORKERS, 1, HEAD_DIM> gathered(dynamic_shared<float>());
  store_four(gathered.place(worker, 0, channel), sum);
  if (channel == 0) {
    gathered.row_max[worker] = row_max;
    gathered.row_sum[worker] = row_sum;
  }
  __syncthreads();  // all workers' sums are there
  if (worker != 0) return;
  const auto merged = gathered.merged(0);
  store_four(&to.output(batch, head, query, channel), gathered.merged_output(0, channel, merged));
  if (channel == 0) to.store_lse(batch, head, query, merged.lse());
}

// ---- Launches -------------------------------------------------------------------------------------------------------

template <typename T, int HEAD_DIM, typename Cache>
void launch_for(const Arguments<T, Cache>& args, const Stream& stream) {
  const Index rows = static_cast<Index>(args.group) * args.queries;
  const Index heads = args.query.size(0) * args.kv_heads;
  if (rows * heads == 0) return;
  constexpr bool MMA = !std::is_same_v<T, float>;
  constexpr int ROWS = MMA ? 16 : Lanes<HEAD_DIM>::ROWS;
  constexpr std::size_t BYTES =
      MMA ? Gathered<WARPS, 16, HEAD_DIM>::BYTES : Gathered<Lanes<HEAD_DIM>::WORKERS, ROWS, HEAD_DIM>::BYTES;
  const Index blocks = heads * args.splits * ceil_div(rows, ROWS);
  const dim3 grid(static_cast<unsigned>(blocks));
  if constexpr (MMA) {
    launch(parts_mma_kernel<T, HEAD_DIM, Cache>, grid, dim3(THREADS), BYTES, stream, args);
  } else {
    launch(parts_kernel<HEAD_DIM, Cache>, grid, dim3(THREADS), BYTES, stream, args);
  }
  if (args.splits == 1) return;
  launch(merge_kernel<T, HEAD_DIM>, dim3(static_cast<unsigned>(heads * rows)), dim3(THREADS),
         Gathered<THREADS / (HEAD_DIM / 4), 1, HEAD_DIM>::BYTES, stream, args.results);
}

/// Problem: Decode<T> or PagedDecode<T>, checked.
template <typename T, typename Cache, typename Problem>
void decode(const Problem& p, const Cache& cache, Index kv_heads, const Stream& stream) {
  const Shape<4>& q = p.query.shape();
  const Arguments<T, Cache> args{
      .query = p.query,
      .cache = cache,
      .lengths = p.lengths,
      .results = {.output = p.output,
                  .lse = p.lse.value_or(View<float, 3>(nullptr, {0, 0, 0})),
                  .partial_output = p.partial_output,
                  .partial_lse = p.partial_lse,
                  .heads = static_cast<int>(q[1]),
                  .queries = static_cast<int>(q[2]),
                  .splits = static_cast<int>(p.splits())},
      .kv_heads = static_cast<int>(kv_heads),
      .group = static_cast<int>(q[1] / kv_heads),
      .queries = static_cast<int>(q[2]),
      .splits = static_cast<int>(p.splits()),
      .causal = p.causal,
      .scale_log2 = LOG2_E * p.scale.value_or(1.0f / std::sqrt(static_cast<float>(q[3]))),
  };
  switch (q[3]) {
    case 16:
      return launch_for<T, 16>(args, stream);
    case 32:
      return launch_for<T, 32>(args, stream);
    case 64:
      return launch_for<T, 64>(args, stream);
    default:
      return launch_for<T, 128>(args, stream);
  }
}

}  // namespace flashkata::decode
