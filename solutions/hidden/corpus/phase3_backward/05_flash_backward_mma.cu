// Answers to 05_flash_backward_mma, wrong and right. Every deviation stands where somebody made it.
//
// A warp owns 16 keys, or 16 queries where dQ is not added up. The width of a row and the tiles are arguments, so that
// each kernel is compiled once for each type.
#include "flash_backward_mma.hpp"

#include "../corpus.hpp"

namespace flashkata {
namespace {

using corpus::RIGHT;
using corpus::UNNAMED;

// X(what a kernel calls it, the answer's name, its mistake)
// clang-format off
#define FLASH_BACKWARD_MMA_ANSWERS(X) \
  X(no_delta, "bwd-no-D", "bwd-no-D") \
  X(delta_of_d_output, "bwd-D-wrong-source", "bwd-D-wrong-source") \
  X(delta_first_64, "delta of the first 64 channels", UNNAMED) \
  X(delta_in_16_bits, "delta added up in 16 bits", UNNAMED) \
  X(jacobian_squared, "bwd-softmax-jac-P2", "bwd-softmax-jac-P2") \
  X(jacobian_diagonal, "bwd-softmax-jac-diagonal", "bwd-softmax-jac-diagonal") \
  X(jacobian_no_weight, "bwd-softmax-jac-no-P", "bwd-softmax-jac-no-P") \
  X(sign, "bwd-sign", "bwd-sign") \
  X(dq_no_scale, "bwd-dq-no-scale", "bwd-dq-no-scale") \
  X(dk_no_scale, "bwd-dk-no-scale", "bwd-dk-no-scale") \
  X(no_scale, "bwd-no-scale", "bwd-no-scale") \
  X(scale_twice, "bwd-scale-twice", "bwd-scale-twice") \
  X(dv_scaled, "bwd-dv-scaled", "bwd-dv-scaled") \
  X(weights_unscaled, "bwd-P-unscaled", "bwd-P-unscaled") \
  X(weights_no_lse, "bwd-P-no-lse", "bwd-P-no-lse") \
  X(lse_base, "bwd-lse-base", "bwd-lse-base") \
  X(base2, "exp2 without log2 of e", "softmax-base2") \
  X(scale_arg_ignored, "scale-arg-ignored", "scale-arg-ignored") \
  X(scale_1_over_d, "scale-1-over-d", "scale-1-over-d") \
  X(scale_zero_as_default, "scale-zero-as-default", "scale-zero-as-default") \
  X(scale_positive, "the sign of the scale dropped", UNNAMED) \
  X(dv_from_ds, "bwd-dv-from-dS", "bwd-dv-from-dS") \
  X(dp_from_key, "bwd-dP-from-key", "bwd-dP-from-key") \
  X(d_output_ignored, "bwd-dO-ignored", "bwd-dO-ignored") \
  X(dq_assign, "bwd-dq-last-tile", "bwd-dq-last-tile") \
  X(dk_assign, "bwd-dk-last-tile", "bwd-dk-last-tile") \
  X(dv_assign, "bwd-dv-last-tile", "bwd-dv-last-tile") \
  X(dk_dv_assign, "bwd-dkdv-last-tile", "bwd-dkdv-last-tile") \
  X(last_dq_lost, "dQ of the last tile of queries not added", UNNAMED) \
  X(stale_rows, "lse and delta of the tile before", UNNAMED) \
  X(scale_twice_owned, "dQ scaled twice where it is not added up", UNNAMED) \
  X(sums_not_zeroed, "bwd-accum-not-zeroed", "bwd-accum-not-zeroed") \
  X(sums_zeroed_once, "sums set to 0 by the first call alone", "bwd-accum-not-zeroed") \
  X(dk_not_zeroed, "dK added to what the memory held", UNNAMED) \
  X(mask_ignored, "bwd-mask-ignored", "bwd-mask-ignored") \
  X(mask_of_keys_only, "mask forgotten where dQ is not added up", UNNAMED) \
  X(causal_only_square, "causal-only-square", "causal-only-square") \
  X(causal_alignment, "causal-alignment", "causal-alignment") \
  X(causal_alignment_reversed, "causal-alignment-reversed", "causal-alignment-reversed") \
  X(causal_strict, "causal-strict", "causal-strict") \
  X(causal_plus_one, "causal-plus-one", "causal-plus-one") \
  X(causal_local_index, "causal-local-index", "causal-local-index") \
  X(start_ceil, "bwd-causal-start-block", "bwd-causal-start-block") \
  X(start_last_key, "bwd-causal-start-last-key", "bwd-causal-start-last-key") \
  X(start_no_offset, "bwd-causal-start-no-offset", "bwd-causal-start-no-offset") \
  X(end_floor, "causal-bound-floor", "causal-bound-floor") \
  X(end_first_row, "causal-bound-first-row", "causal-bound-first-row") \
  X(end_no_offset, "causal-bound without the offset", "causal-bound-no-offset") \
  X(masked_nan_leak, "0 times NaN", UNNAMED) \
  X(nan_leak_added, "0 times NaN where dQ is added up", UNNAMED) \
  X(value_nan_leak, "dS of forbidden pairs multiplied by 0", UNNAMED) \
  X(blind_leak, "0 times NaN of queries that see no key", UNNAMED) \
  X(blind_nan, "bwd-masked-row", "bwd-masked-row") \
  X(blind_unwritten, "queries that see no key left unwritten", "causal-empty-tile-row") \
  X(tail_queries_dropped, "bwd-tail-queries-dropped", "bwd-tail-queries-dropped") \
  X(tail_keys_dropped, "tail-keys-dropped", "tail-keys-dropped") \
  X(tail_keys_unwritten, "tail-rows-unwritten: keys", "tail-rows-unwritten") \
  X(tail_queries_unwritten, "tail-rows-unwritten: queries", UNNAMED) \
  X(tail_rows_oob, "tail rows written", "guard zone overwritten") \
  X(half_of_128, "half of the channels of dP at width 128", UNNAMED) \
  X(dk_half_of_128, "half of the channels of dK at width 128", UNNAMED) \
  X(scores_in_16_bits, "S in 16 bits", UNNAMED) \
  X(scores_in_fp16, "S in fp16", UNNAMED) \
  X(dp_in_16_bits, "dP in 16 bits", UNNAMED) \
  X(ds_unscaled, "dS unscaled in 16 bits", UNNAMED) \
  X(weights_cut, "P and dS cut off instead of rounded", UNNAMED) \
  X(dk_in_16_bits, "dK and dV rounded after each tile", UNNAMED) \
  X(dq_in_16_bits, "dQ rounded after each tile", UNNAMED) \
  X(fragment_map, "lse and delta of four neighbours", "mma-c-fragment-map") \
  X(repack, "P and dS repacked", "mma-p-to-a-repack") \
  X(q_not_transposed, "Q not transposed for dK", "ldmatrix-no-trans") \
  X(do_not_transposed, "dO not transposed for dV", "ldmatrix-no-trans") \
  X(k_not_transposed, "K not transposed for dQ", "ldmatrix-no-trans") \
  X(ds_not_transposed, "dS not transposed for dQ", "ldmatrix-no-trans") \
  X(k_order, "K in the order of Q", "ldmatrix-x4-order") \
  X(q_order, "Q in the order of K", "ldmatrix-x4-order") \
  X(ds_order, "dS in the order of K", "ldmatrix-x4-order") \
  X(q_swizzle, "Q read without swizzle", "swizzle-mismatch") \
  X(ds_swizzle, "dS written without swizzle", "swizzle-mismatch") \
  X(batch_first_only, "batch-first-only in keys and values", "batch-first-only") \
  X(heads_first_only, "heads-first-only in keys and values", "heads-first-only") \
  X(delta_first_item, "delta of the first batch item", UNNAMED) \
  X(noncontiguous, "noncontiguous-stride", "noncontiguous-stride") \
  X(d_output_packed, "bwd-dO-stride, packed", "bwd-dO-stride") \
  X(strides_of_key, "values with the strides of the keys", UNNAMED) \
  X(dk_strides, "d_key with the strides of key", "guard zone overwritten") \
  X(dq_strides, "d_query with the strides of query", "guard zone overwritten") \
  X(lse_packed, "lse read without its strides", UNNAMED) \
  X(deterministic_ignored, "deterministic ignored", UNNAMED) \
  X(race, "dQ added without atomics", "global-memory race") \
  X(delta_by_all, "delta written by every block that uses it", "global-memory race") \
  X(no_barrier_after_load, "no barrier after the load", "shared-memory race") \
  X(no_barrier_before_dq, "no barrier before dS is read", "shared-memory race") \
  X(no_barrier_at_end, "no barrier before the next load", "shared-memory race") \
  X(no_wait, "loads not waited for", "cp.async not waited for") \
  X(rows_unguarded, "tail rows loaded without a guard", "out of bounds") \
  X(lse_unguarded, "bwd-oob-lse", "out of bounds") \
  X(shared_too_small, "shared memory without dS", "too little dynamic shared memory") \
  X(no_swizzle, "rows in shared memory one behind the other", "bank conflicts") \
  X(scalar_dq, "dQ without tensor cores", "times mma_m16n8k16") \
  X(small_tiles, "16 keys a block", "times its size") \
  X(causal_not_skipped, "blind tiles not skipped", "see nothing of each other") \
  X(scores_in_shared, "shared memory for a row of scores", "shared memory grows") \
  X(workspace, "scratch in memory of its own", "beyond the arguments") \
  X(writes_query, "doubles the queries in place", "is an input") \
  X(unchecked, "arguments unchecked", UNNAMED) \
  X(never_throws, "bad arguments ignored", UNNAMED) \
  X(remembered, "gradients remembered by shape", UNNAMED) \
  X(bf16_only, "fp16 with the bits of bf16", UNNAMED) \
  X(right_expf, "right: expf", RIGHT) \
  X(right_x2, "right: ldmatrix_x2", RIGHT) \
  X(right_padding, "right: padding instead of a swizzle", RIGHT) \
  X(right_plain_loads, "right: loads without cp.async", RIGHT) \
  X(right_backwards, "right: tiles backwards", RIGHT) \
  X(right_64_queries, "right: 64 queries a tile", RIGHT) \
  X(right_8_warps, "right: 128 keys a block", RIGHT) \
  X(right_no_atomics, "right: deterministic without being asked", RIGHT) \
  X(right_delta_late, "right: delta subtracted after dP", RIGHT) \
  X(right_delta_in_place, "right: delta computed where it is used", RIGHT) \
  X(right_p_through_shared, "right: P and dS through shared memory", RIGHT) \
  X(right_two_kernels, "right: dV and dK by two kernels", RIGHT)
// clang-format on

enum class Play {
  none,
#define X(id, name, mistake) id,
  FLASH_BACKWARD_MMA_ANSWERS(X)
#undef X
};

const corpus::Answers answers{
#define X(id, name, mistake) {name, mistake},
    FLASH_BACKWARD_MMA_ANSWERS(X)
#undef X
};

Play chosen_play() {
#define X(id, answer, mistake) \
  if (corpus::name() == answer) return Play::id;
  FLASH_BACKWARD_MMA_ANSWERS(X)
#undef X
  return Play::none;
}

constexpr int CHUNK = 8;  // elements in 16 bytes
constexpr int WIDEST = 128;
constexpr int TILE = 64;      // most rows of the tile that a block walks over
constexpr int LARGEST = 128;  // most rows of a tile
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.4426950408889634f;

template <typename T>
struct Arguments {
  FlashBackward<T> p;
  Play play;
  int queries, keys, width;
  int offset;       // query i sees keys 0 .. i + offset
  int warps, tile;  // a block owns 16 warps rows of one side and walks over the other, a tile at a time
  float scale;      // of the scores
  float ds_scale;   // of dS
  float dq_scale, dk_scale, dv_scale;
  bool sums, for_dk, for_dv;
};

template <typename T>
struct Tile {
  T* smem;
  int width;
  int pitch;
  bool swizzled;

  KATA_DEVICE T* at(int row, int chunk) const {
    const int chunks = width / CHUNK;
    const int swapped = chunks < 8 ? chunks : 8;
    const int swizzle = swizzled ? row / (8 / swapped) % swapped : 0;
    return smem + row * pitch + (chunk ^ swizzle) * CHUNK;
  }
  KATA_DEVICE T& element(int row, int column) const { return at(row, column / CHUNK)[column % CHUNK]; }
  KATA_DEVICE Tile linear() const { return {smem, width, pitch, false}; }
};

// One head's rows.
template <typename T>
struct Rows {
  T* first;
  Index stride;
  KATA_DEVICE T* operator[](int row) const { return first + row * stride; }
};

template <typename T, typename E>
KATA_DEVICE Rows<E> rows_of(const Arguments<T>& args, const View<E, 4>& view, Index b, Index h) {
  if (args.play == Play::noncontiguous) {
    return {view.data() + (b * view.size(1) + h) * view.size(2) * view.size(3), view.size(3)};
  }
  return {view.data() + b * view.stride(0) + h * view.stride(1), view.stride(2)};
}

template <typename T>
KATA_DEVICE Rows<const T> keys_of(const Arguments<T>& args, const View<const T, 4>& view, Index b, Index h) {
  return rows_of(args, view, args.play == Play::batch_first_only ? 0 : b, args.play == Play::heads_first_only ? 0 : h);
}

template <typename T>
KATA_DEVICE Rows<const T> values_of(const Arguments<T>& args, Index b, Index h) {
  if (args.play == Play::strides_of_key) {
    const View<const T, 4>& key = args.p.key;
    return {args.p.value.data() + b * key.stride(0) + h * key.stride(1), key.stride(2)};
  }
  return keys_of(args, args.p.value, b, h);
}

template <typename T>
KATA_DEVICE Rows<const T> d_output_of(const Arguments<T>& args, Index b, Index h) {
  const View<const T, 4>& view = args.p.d_output;
  if (args.play == Play::d_output_packed) {
    return {view.data() + (b * view.size(1) + h) * view.size(2) * view.size(3), view.size(3)};
  }
  return rows_of(args, view, b, h);
}

template <typename T>
KATA_DEVICE float lse_of(const Arguments<T>& args, Index b, Index h, int query) {
  if (query >= args.queries && args.play != Play::lse_unguarded) return 0.0f;
  if (args.play == Play::lse_packed) return args.p.lse.data()[(b * args.p.lse.size(1) + h) * args.queries + query];
  return args.p.lse.data()[b * args.p.lse.stride(0) + h * args.p.lse.stride(1) + query * args.p.lse.stride(2)];
}

template <typename T>
KATA_DEVICE float delta_from(const Arguments<T>& args, Index b, Index h, int query) {
  const T* output = rows_of(args, args.p.output, b, h)[query];
  const T* d_output = d_output_of(args, b, h)[query];
  float sum = 0.0f;
  for (int d = 0; d < args.width; ++d) {
    if (args.play == Play::delta_first_64 && d >= 64) break;
    const float o = args.play == Play::delta_of_d_output ? 1.0f : to_float(output[d]);
    sum += o * (args.play == Play::d_output_ignored ? 1.0f : to_float(d_output[d]));
    if (args.play == Play::delta_in_16_bits) sum = to_float(from_float<T>(sum));
  }
  return args.play == Play::no_delta || args.play == Play::jacobian_diagonal ? 0.0f : sum;
}

template <typename T>
KATA_DEVICE float delta_of(const Arguments<T>& args, Index b, Index h, int query) {
  if (query >= args.queries) return 0.0f;
  if (args.play == Play::right_delta_in_place) return delta_from(args, b, h, query);
  if (args.play == Play::delta_by_all) args.p.delta(b, h, query) = delta_from(args, b, h, query);
  return args.p.delta(args.play == Play::delta_first_item ? 0 : b, h, query);
}

// Rows first .. first + count - 1 of a head; those from `limit` on become 0.
template <typename T>
KATA_DEVICE void load(const Arguments<T>& args, const Tile<T>& tile, const Rows<const T>& rows, int first, int count,
                      int limit) {
  const int chunks = args.width / CHUNK;
  for (int index = static_cast<int>(threadIdx.x); index < count * chunks; index += static_cast<int>(blockDim.x)) {
    const int row = index / chunks, chunk = index % chunks;
    const bool exists = first + row < limit || args.play == Play::rows_unguarded;
    const T* source = rows[exists ? first + row : 0] + chunk * CHUNK;
    if (args.play == Play::right_plain_loads) {
      uint4 bytes{};
      if (exists) bytes = *reinterpret_cast<const uint4*>(source);
      *reinterpret_cast<uint4*>(tile.at(row, chunk)) = bytes;
    } else {
      cp_async_16(tile.at(row, chunk), source, exists);
    }
  }
}

// lse and delta of queries first .. first + count - 1.
template <typename T>
KATA_DEVICE void load_rows(const Arguments<T>& args, float* lse, float* delta, Index b, Index h, int first, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    lse[i] = lse_of(args, b, h, first + i);
    delta[i] = delta_of(args, b, h, first + i);
  }
}

template <typename T>
KATA_DEVICE void wait_for_loads(const Arguments<T>& args) {
  cp_async_commit();
  if (args.play != Play::no_wait) cp_async_wait<0>();
  if (args.play != Play::no_barrier_after_load) __syncthreads();
}

template <typename T>
KATA_DEVICE float round_trip(float value) {
  return to_float(from_float<T>(value));
}

template <typename T>
KATA_DEVICE std::uint32_t pack(const Arguments<T>& args, const float* two) {
  const auto cut = [](float value) {
    const std::uint32_t low_bits = std::is_same_v<T, fp16> ? 0x1fffu : 0xffffu;
    return half_detail::float_from_bits(half_detail::float_bits(value) & ~low_bits);
  };
  if (args.play == Play::weights_cut) return pack2<T>(cut(two[0]), cut(two[1]));
  if (args.play == Play::bf16_only) return pack2<bf16>(two[0], two[1]);
  return pack2<T>(two[0], two[1]);
}

// The four 8 x 8 matrices are upper left, lower left, upper right, lower right ...
template <typename T>
KATA_DEVICE const T* down_first(const Tile<T>& tile, int row, int chunk) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return tile.at(row + lane % 16, chunk + lane / 16);
}
// ... or upper left, upper right, lower left, lower right.
template <typename T>
KATA_DEVICE const T* right_first(const Tile<T>& tile, int row, int chunk) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return tile.at(row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2);
}

template <typename T>
KATA_DEVICE void multiply(float (*sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[4]) {
  const std::uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
  mma_m16n8k16<T>(sums[0], a, left, sums[0]);
  mma_m16n8k16<T>(sums[1], a, right, sums[1]);
}

// sums [16, columns] += X Y^T over `width` channels.
template <typename T>
KATA_DEVICE void add_rows_times_rows(const Arguments<T>& args, float (*sums)[4], const Tile<T>& x, int row,
                                     const Tile<T>& y, int columns, int width) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int step = 0; step < width / 16; ++step) {
    std::uint32_t a[4], b[4];
    ldmatrix_x4(a, args.play == Play::k_order ? right_first(x, row, step * 2) : down_first(x, row, step * 2));
    for (int pair = 0; pair < columns / 16; ++pair) {
      if (args.play == Play::right_x2) {
        std::uint32_t half[2];
        for (int n = 0; n < 2; ++n) {
          ldmatrix_x2(half, y.at(pair * 16 + n * 8 + lane % 8, step * 2 + lane / 8 % 2));
          b[n * 2] = half[0];
          b[n * 2 + 1] = half[1];
        }
      } else if (args.play == Play::q_order) {
        ldmatrix_x4(b, down_first(y, pair * 16, step * 2));
      } else {
        ldmatrix_x4(b, right_first(args.play == Play::q_swizzle ? y.linear() : y, pair * 16, step * 2));
      }
      multiply<T>(sums + 2 * pair, a, b);
    }
  }
}

// sums [16, width] += W Y, W [16, rows] in C fragments; or in a tile from row `w_row` on.
template <typename T>
KATA_DEVICE void add_weighted_rows(const Arguments<T>& args, float (*sums)[4], const float (*w)[4],
                                   const Tile<T>* w_smem, int w_row, const Tile<T>& y, int rows, bool transposed) {
  for (int step = 0; step < rows / 16; ++step) {
    std::uint32_t a[4], b[4];
    if (w_smem != nullptr) {
      ldmatrix_x4(a, down_first(*w_smem, w_row, step * 2));
    } else {
      for (int r = 0; r < 4; ++r) a[r] = pack(args, &w[2 * step + r / 2][r % 2 * 2]);
    }
    if (args.play == Play::repack) std::swap(a[1], a[2]);
    for (int pair = 0; pair < args.width / 16; ++pair) {
      if (transposed) {
        ldmatrix_x4_trans(b, down_first(y, step * 16, pair * 2));
      } else {
        ldmatrix_x4(b, down_first(y, step * 16, pair * 2));
      }
      multiply<T>(sums + 2 * pair, a, b);
    }
  }
}

// The same sums one by one, where 0 times NaN would get in: weight(row, y_row) and allowed(row, y_row).
template <typename T, typename Weight, typename Allowed>
KATA_DEVICE void add_allowed_rows(const Arguments<T>& args, float (*sums)[4], const Tile<T>& y, int rows,
                                  const Weight& weight, const Allowed& allowed) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int e = 0; e < 4; ++e) {
    const int row = e / 2 * 8 + lane / 4;
    for (int other = 0; other < rows; ++other) {
      if (!allowed(row, other)) continue;
      const float w = weight(row, other);
      for (int n = 0; n < args.width / 8; ++n) {
        sums[n][e] += w * to_float(y.element(other, n * 8 + lane % 4 * 2 + e % 2));
      }
    }
  }
}

template <typename T>
KATA_DEVICE bool sees(const Arguments<T>& args, int query, int key, int q_first, int kv_first) {
  if (query >= args.queries || key >= args.keys) return false;
  if (args.play == Play::causal_local_index && args.p.causal) return key - kv_first <= query - q_first + args.offset;
  return key <= query + args.offset;
}

// P of a score.
template <typename T>
KATA_DEVICE float weight_of(const Arguments<T>& args, float score, float lse, bool allowed) {
  if (args.play == Play::scores_in_16_bits) score = round_trip<T>(score);
  if (args.play == Play::scores_in_fp16) score = round_trip<fp16>(score);
  if (args.play == Play::weights_unscaled) score /= args.scale;
  if (!allowed && !(args.play == Play::blind_nan && lse == -INFINITE)) return 0.0f;
  if (args.play == Play::blind_nan && lse == -INFINITE) score = -INFINITE;
  if (args.play == Play::weights_no_lse) lse = 0.0f;
  if (args.play == Play::lse_base) return fast_exp2(score * args.scale * LOG2_E - lse);
  if (args.play == Play::base2) return fast_exp2(score * args.scale - lse);
  if (args.play == Play::right_expf) return expf(score * args.scale - lse);
  return fast_exp2((score * args.scale - lse) * LOG2_E);
}

// dS of dP - delta.
template <typename T>
KATA_DEVICE float ds_of(const Arguments<T>& args, float p, float dp, float delta, bool allowed) {
  if (args.play == Play::dp_in_16_bits) dp = round_trip<T>(dp);
  if (args.play == Play::right_delta_late) dp -= delta;
  float ds = p * dp;
  if (args.play == Play::jacobian_squared) ds *= p;
  if (args.play == Play::jacobian_diagonal) ds *= 1.0f - p;
  if (args.play == Play::jacobian_no_weight && allowed) ds = dp;
  if (args.play == Play::sign) ds = -ds;
  ds *= args.ds_scale;
  if (args.play == Play::value_nan_leak) return ds;
  return allowed || args.play == Play::blind_nan ? ds : 0.0f;
}

template <typename T>
KATA_DEVICE bool is_finite(T value) {
  return fabsf(to_float(value)) < INFINITE;
}

// Does NaN or inf lie in the first `rows` rows?
template <typename T>
KATA_DEVICE bool is_poisoned(const Arguments<T>& args, const Tile<T>& tile, int rows) {
  bool poisoned = false;
  for (int index = static_cast<int>(threadIdx.x) % 32; index < rows * args.width; index += 32) {
    poisoned = poisoned || !is_finite(tile.element(index / args.width, index % args.width));
  }
  return __any_sync(FULL_WARP, poisoned) != 0;
}

// Rows first .. first + 15 of a head, those before `limit`.
template <typename T>
KATA_DEVICE void store_rows(const Arguments<T>& args, const float (*frag)[4], const Rows<T>& rows, int first, int limit,
                            float scale, bool add) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int n = 0; n < args.width / 8; ++n) {
    for (int e = 0; e < 4; ++e) {
      const int row = first + e / 2 * 8 + lane / 4;
      if (row >= limit && !(args.play == Play::tail_rows_oob && row < limit + 1)) continue;
      T& place = rows[row][n * 8 + lane % 4 * 2 + e % 2];
      place = from_float<T>(frag[n][e] * scale + (add ? to_float(place) : 0.0f));
    }
  }
}

struct Shared {
  int pitch, s_pitch;  // of rows of channels, and of rows of P and dS
  bool swizzled;
};

template <typename T>
KATA_BOTH Shared shared_of(const Arguments<T>& args) {
  const bool padded = args.play == Play::right_padding;
  const int padding = padded ? CHUNK : 0;
  return {args.width + padding, args.tile + padding, !padded && args.play != Play::no_swizzle};
}

// Tiles, one behind the other in a block's shared memory.
template <typename T>
struct Tiles {
  const Shared shared;
  const int width;
  T* next;

  KATA_DEVICE explicit Tiles(const Arguments<T>& args)
      : shared(shared_of(args)), width(args.width), next(dynamic_shared<T>()) {}

  KATA_DEVICE Tile<T> tile(int rows, int columns, int pitch) {
    T* const here = next;
    next += rows * pitch;
    return {here, columns, pitch, shared.swizzled};
  }
  KATA_DEVICE Tile<T> of_channels(int rows) { return tile(rows, width, shared.pitch); }
  KATA_DEVICE Tile<T> of_pairs(int rows, int columns) { return tile(rows, columns, shared.s_pitch); }
};

template <int TILES>
KATA_DEVICE void set_to_zero(float (&sums)[TILES][4]) {
  for (auto& four : sums)
    for (float& sum : four) sum = 0.0f;
}

template <typename T, int TILES>
KATA_DEVICE void round_sums(float (&sums)[TILES][4]) {
  for (auto& four : sums)
    for (float& sum : four) sum = round_trip<T>(sum);
}

// Ones for the gradient of the output, in `rows` rows of which those before `limit` exist.
template <typename T>
KATA_DEVICE void ignore_d_output(const Tile<T>& do_smem, int width, int rows, int limit) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * width; i += static_cast<int>(blockDim.x)) {
    do_smem.element(i / width, i % width) = from_float<T>(i / width < limit ? 1.0f : 0.0f);
  }
  __syncthreads();
}

// The rows of a gradient, as if it lay in memory as what it is the gradient of.
template <typename T>
KATA_DEVICE Rows<T> rows_laid_out_as(const View<const T, 4>& original, const View<T, 4>& gradient, Index b, Index h) {
  return {gradient.data() + b * original.stride(0) + h * original.stride(1), original.stride(2)};
}

// ---------------------------------------------------------------------------------------------------------------------

// A warp for a row: delta, and zeros for the sums of dQ.
template <typename T>
__global__ void delta_kernel(const Arguments<T> args, bool clears) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int query = static_cast<int>(blockIdx.x) * static_cast<int>(blockDim.x / 32) + warp;
  const Index heads = args.p.query.size(1), b = blockIdx.y / heads, h = blockIdx.y % heads;
  if (query >= args.queries) return;
  if (lane == 0 && args.play != Play::delta_by_all && args.play != Play::right_delta_in_place) {
    args.p.delta(b, h, query) = delta_from(args, b, h, query);
  }
  for (int d = lane; clears && d < args.width; d += 32) args.p.d_query_sum(b, h, query, d) = 0.0f;
}

// A lane for a channel: the sums of dQ, rounded.
template <typename T>
__global__ void round_kernel(const Arguments<T> args) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int query = static_cast<int>(blockIdx.x) * static_cast<int>(blockDim.x / 32) + warp;
  const Index heads = args.p.query.size(1), b = blockIdx.y / heads, h = blockIdx.y % heads;
  if (query >= args.queries) return;
  Rows<T> rows = rows_of(args, args.p.d_query, b, h);
  if (args.play == Play::dq_strides) rows = rows_laid_out_as(args.p.query, args.p.d_query, b, h);
  for (int d = lane; d < args.width; d += 32) {
    rows[query][d] = from_float<T>(args.p.d_query_sum(b, h, query, d) * args.dq_scale);
  }
}

// A block owns keys and walks over the queries: dK, dV, and its share of dQ.
template <typename T>
__global__ void keys_kernel(const Arguments<T> args) {
  const Play play = args.play;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int block_kv = 16 * args.warps, block_q = args.tile;
  const Index heads = args.p.query.size(1), b = blockIdx.y / heads, h = blockIdx.y % heads;
  const int kv_first = static_cast<int>(blockIdx.x) * block_kv;
  const int warp_key = warp * 16;

  Tiles<T> tiles_in_shared(args);
  const Tile<T> k_smem = tiles_in_shared.of_channels(block_kv);
  const Tile<T> v_smem = tiles_in_shared.of_channels(block_kv);
  const Tile<T> q_smem = tiles_in_shared.of_channels(block_q);
  const Tile<T> do_smem = tiles_in_shared.of_channels(block_q);
  __shared__ float lse[LARGEST], delta[LARGEST];
  const Tile<T> p_smem = tiles_in_shared.of_pairs(block_kv, block_q);
  const Tile<T> ds_smem = tiles_in_shared.of_pairs(block_kv, block_q);

  int first = 0;  // the first query that sees a key of ours
  if (args.p.causal && play != Play::causal_not_skipped) {
    first = max(0, kv_first - args.offset);
    if (play == Play::start_last_key) first = max(0, min(args.keys, kv_first + block_kv) - 1 - args.offset);
    if (play == Play::start_no_offset) first = kv_first;
  }
  const int tiles = play == Play::tail_queries_dropped ? args.queries / block_q : ceil_div(args.queries, block_q);
  const int first_tile = play == Play::start_ceil && args.p.causal ? ceil_div(first, block_q) : first / block_q;

  if (first_tile < tiles) {
    load(args, k_smem, keys_of(args, args.p.key, b, h), kv_first, block_kv, args.keys);
    load(args, v_smem, values_of(args, b, h), kv_first, block_kv, args.keys);
  }
  float dv[WIDEST / 8][4] = {}, dk[WIDEST / 8][4] = {};  // C fragments of 16 keys
  for (int round = 0; round < tiles - first_tile; ++round) {
    const int t = play == Play::right_backwards ? tiles - 1 - round : first_tile + round;
    const int q_first = t * block_q;
    load(args, q_smem, rows_of(args, args.p.query, b, h), q_first, block_q, args.queries);
    load(args, do_smem, d_output_of(args, b, h), q_first, block_q, args.queries);
    const bool stale = play == Play::stale_rows && round > 0;
    load_rows(args, lse, delta, b, h, stale ? q_first - block_q : q_first, block_q);
    wait_for_loads(args);  // Q and dO are there, K and V too
    if (play == Play::d_output_ignored) ignore_d_output(do_smem, args.width, block_q, args.queries - q_first);

    // S^T and P^T [16 keys, block_q]
    float p[TILE / 8][4] = {}, ds[TILE / 8][4];
    add_rows_times_rows(args, p, k_smem, warp_key, q_smem, block_q, args.width);
    for (int n = 0; n < block_q / 8; ++n) {
      for (int e = 0; e < 4; ++e) {
        int query = n * 8 + lane % 4 * 2 + e % 2;
        const int key = kv_first + warp_key + e / 2 * 8 + lane / 4;
        const bool allowed = sees(args, q_first + query, key, q_first, kv_first);
        if (play == Play::fragment_map) query = n * 8 + lane % 2 * 4 + e;
        p[n][e] = weight_of(args, p[n][e], lse[query], allowed);
        ds[n][e] = play == Play::right_delta_late ? 0.0f : -delta[query];
      }
    }
    // dP^T - delta and dS^T
    const bool half_wide = play == Play::half_of_128 && args.width == 128;
    add_rows_times_rows(args, ds, play == Play::dp_from_key ? k_smem : v_smem, warp_key, do_smem, block_q,
                        half_wide ? 64 : args.width);
    for (int n = 0; n < block_q / 8; ++n) {
      for (int e = 0; e < 4; ++e) {
        const int query = n * 8 + lane % 4 * 2 + e % 2;
        const int key = kv_first + warp_key + e / 2 * 8 + lane / 4;
        ds[n][e] = ds_of(args, p[n][e], ds[n][e], delta[query], sees(args, q_first + query, key, q_first, kv_first));
        const auto place = [&](const Tile<T>& tile) {
          return &tile.element(warp_key + e / 2 * 8 + lane / 4, n * 8 + lane % 4 * 2);
        };
        const auto ds_written = play == Play::ds_swizzle ? ds_smem.linear() : ds_smem;
        if (e % 2 == 1) {
          *reinterpret_cast<std::uint32_t*>(place(p_smem)) = pack(args, &p[n][e - 1]);
          *reinterpret_cast<std::uint32_t*>(place(ds_written)) = pack(args, &ds[n][e - 1]);
        }
      }
    }
    __syncwarp();  // this warp's rows of P and dS are complete

    const bool masked = args.p.causal && kv_first + block_kv > q_first + args.offset + 1;
    const bool slow = masked && play != Play::masked_nan_leak && play != Play::blind_leak &&
                      (is_poisoned(args, q_smem, block_q) || is_poisoned(args, do_smem, block_q));
    if (play == Play::dv_assign || play == Play::dk_dv_assign) set_to_zero(dv);
    if (play == Play::dk_assign || play == Play::dk_dv_assign) set_to_zero(dk);
    const auto allowed = [&](int row, int query) {
      return sees(args, q_first + query, kv_first + warp_key + row, q_first, kv_first);
    };
    if (slow) {
      add_allowed_rows(
          args, dv, do_smem, block_q,
          [&](int row, int query) { return to_float(p_smem.element(warp_key + row, query)); }, allowed);
      add_allowed_rows(
          args, dk, q_smem, block_q,
          [&](int row, int query) { return to_float(ds_smem.element(warp_key + row, query)); }, allowed);
    } else {
      const bool through_shared = play == Play::right_p_through_shared;
      add_weighted_rows(args, dv, play == Play::dv_from_ds ? ds : p, through_shared ? &p_smem : nullptr, warp_key,
                        do_smem, block_q, play != Play::do_not_transposed);
      add_weighted_rows(args, dk, ds, through_shared ? &ds_smem : nullptr, warp_key, q_smem, block_q,
                        play != Play::q_not_transposed);
    }
    if (play == Play::dk_in_16_bits) {
      round_sums<T>(dk);
      round_sums<T>(dv);
    }

    if (play != Play::no_barrier_before_dq) __syncthreads();  // everybody's dS is there
    // dQ [16 queries of this warp, width], for every 16 warps-th row of the tile
    const bool lost = (play == Play::dq_assign && kv_first + block_kv < args.keys) ||
                      (play == Play::last_dq_lost && t == tiles - 1 && t > first_tile);
    const bool adds = args.sums && !lost;
    const bool leaks = play == Play::masked_nan_leak || play == Play::nan_leak_added;
    const bool k_poisoned = adds && masked && !leaks && is_poisoned(args, k_smem, block_kv);
    for (int row = warp * 16; adds && row < block_q; row += 16 * args.warps) {
      float dq[WIDEST / 8][4] = {};
      const auto weight = [&](int m, int key) { return to_float(ds_smem.element(key, row + m)); };
      if (k_poisoned || play == Play::scalar_dq) {
        add_allowed_rows(args, dq, k_smem, block_kv, weight, [&](int m, int key) {
          return sees(args, q_first + row + m, kv_first + key, q_first, kv_first);
        });
      } else {
        for (int step = 0; step < args.warps; ++step) {
          std::uint32_t a[4], k[4];
          if (play == Play::ds_order) {
            ldmatrix_x4_trans(a, down_first(ds_smem, step * 16, row / CHUNK));
          } else if (play == Play::ds_not_transposed) {
            ldmatrix_x4(a, right_first(ds_smem, step * 16, row / CHUNK));
          } else {
            ldmatrix_x4_trans(a, right_first(ds_smem, step * 16, row / CHUNK));
          }
          for (int pair = 0; pair < args.width / 16; ++pair) {
            if (play == Play::k_not_transposed) {
              ldmatrix_x4(k, down_first(k_smem, step * 16, pair * 2));
            } else {
              ldmatrix_x4_trans(k, down_first(k_smem, step * 16, pair * 2));
            }
            multiply<T>(dq + 2 * pair, a, k);
          }
        }
      }
      for (int n = 0; n < args.width / 8; ++n) {
        for (int e = 0; e < 4; ++e) {
          const int query = q_first + row + e / 2 * 8 + lane / 4;
          if (query >= args.queries) continue;
          float& sum = args.p.d_query_sum(b, h, query, n * 8 + lane % 4 * 2 + e % 2);
          const float share = play == Play::dq_in_16_bits ? round_trip<T>(dq[n][e]) : dq[n][e];
          if (play == Play::race) {
            sum += share;
          } else {
            atomicAdd(&sum, share);
          }
        }
      }
    }
    if (play != Play::no_barrier_at_end) __syncthreads();  // Q, dO and dS may be overwritten
  }

  const int limit = play == Play::tail_keys_unwritten ? args.keys / 16 * 16 : args.keys;
  if (play == Play::tail_keys_dropped && kv_first + block_kv > args.keys) {
    set_to_zero(dk);
    set_to_zero(dv);
  }
  if (play == Play::dk_half_of_128 && args.width == 128) {
    for (int n = 8; n < 16; ++n)
      for (float& sum : dk[n]) sum = 0.0f;
  }
  Rows<T> dk_rows = rows_of(args, args.p.d_key, b, h);
  if (play == Play::dk_strides) dk_rows = rows_laid_out_as(args.p.key, args.p.d_key, b, h);
  if (args.for_dv) {
    store_rows(args, dv, rows_of(args, args.p.d_value, b, h), kv_first + warp_key, limit, args.dv_scale, false);
  }
  if (args.for_dk) {
    store_rows(args, dk, dk_rows, kv_first + warp_key, limit, args.dk_scale, play == Play::dk_not_zeroed);
  }
}

// A block owns queries and walks over the keys: dQ alone.
template <typename T>
__global__ void queries_kernel(const Arguments<T> args) {
  const Play play = args.play;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int block_q = 16 * args.warps, block_kv = args.tile;
  const Index heads = args.p.query.size(1), b = blockIdx.y / heads, h = blockIdx.y % heads;
  const int q_first = static_cast<int>(blockIdx.x) * block_q;
  const int warp_query = warp * 16;

  Tiles<T> tiles_in_shared(args);
  const Tile<T> q_smem = tiles_in_shared.of_channels(block_q);
  const Tile<T> do_smem = tiles_in_shared.of_channels(block_q);
  const Tile<T> k_smem = tiles_in_shared.of_channels(block_kv);
  const Tile<T> v_smem = tiles_in_shared.of_channels(block_kv);

  __shared__ float lse[LARGEST], delta[LARGEST];

  int end = args.keys;
  if (args.p.causal && play != Play::causal_not_skipped) {
    end = min(args.keys, q_first + block_q + args.offset);
    if (play == Play::end_first_row) end = min(args.keys, q_first + 1 + args.offset);
    if (play == Play::end_no_offset) end = min(args.keys, q_first + block_q);
  }
  int tiles = end <= 0 ? 0 : ceil_div(end, block_kv);
  if (play == Play::end_floor && args.p.causal && end > 0) tiles = end / block_kv;
  if (play == Play::blind_unwritten && tiles == 0) return;
  if (tiles > 0) {
    load(args, q_smem, rows_of(args, args.p.query, b, h), q_first, block_q, args.queries);
    load(args, do_smem, d_output_of(args, b, h), q_first, block_q, args.queries);
    load_rows(args, lse, delta, b, h, q_first, block_q);
  }
  float dq[WIDEST / 8][4] = {};
  for (int round = 0; round < tiles; ++round) {
    const int t = play == Play::right_backwards ? tiles - 1 - round : round;
    const int kv_first = t * block_kv;
    load(args, k_smem, keys_of(args, args.p.key, b, h), kv_first, block_kv, args.keys);
    load(args, v_smem, values_of(args, b, h), kv_first, block_kv, args.keys);
    wait_for_loads(args);
    if (play == Play::d_output_ignored && round == 0) ignore_d_output(do_smem, args.width, block_q, block_q);
    float p[TILE / 8][4] = {}, ds[TILE / 8][4];
    add_rows_times_rows(args, p, q_smem, warp_query, k_smem, block_kv, args.width);
    const auto allowed = [&](int row, int key) {
      if (play == Play::mask_of_keys_only) return kv_first + key < args.keys;
      return sees(args, q_first + warp_query + row, kv_first + key, q_first, kv_first);
    };
    const auto query_of = [&](int e) {
      return play == Play::fragment_map ? warp_query + lane % 8 : warp_query + e / 2 * 8 + lane / 4;
    };
    for (int e = 0; e < 4; ++e) {
      const int row = e / 2 * 8 + lane / 4;
      for (int n = 0; n < block_kv / 8; ++n) {
        p[n][e] = weight_of(args, p[n][e], lse[query_of(e)], allowed(row, n * 8 + lane % 4 * 2 + e % 2));
        ds[n][e] = play == Play::right_delta_late ? 0.0f : -delta[query_of(e)];
      }
    }
    const bool half_wide = play == Play::half_of_128 && args.width == 128;
    add_rows_times_rows(args, ds, do_smem, warp_query, play == Play::dp_from_key ? k_smem : v_smem, block_kv,
                        half_wide ? 64 : args.width);
    for (int n = 0; n < block_kv / 8; ++n) {
      for (int e = 0; e < 4; ++e) {
        const bool seen = allowed(e / 2 * 8 + lane / 4, n * 8 + lane % 4 * 2 + e % 2);
        ds[n][e] = ds_of(args, p[n][e], ds[n][e], delta[query_of(e)], seen);
      }
    }
    const bool masked = args.p.causal && kv_first + block_kv > q_first + args.offset + 1;
    if (play == Play::dq_assign) set_to_zero(dq);
    if (masked && play != Play::masked_nan_leak && is_poisoned(args, k_smem, block_kv)) {
      const auto weight = [&](int row, int key) {
        // The pair's lane of the C fragment, and its element.
        float found = 0.0f;
        const int from = row % 8 * 4 + key % 8 / 2;
        for (int n = 0; n < block_kv / 8; ++n) {
          for (int e = 0; e < 4; ++e) {
            const float value = __shfl_sync(FULL_WARP, ds[n][e], from);
            if (n == key / 8 && e == row / 8 * 2 + key % 2) found = value;
          }
        }
        return round_trip<T>(found);
      };
      // All lanes walk all pairs, so that they may shuffle.
      for (int row = 0; row < 16; ++row) {
        for (int key = 0; key < block_kv; ++key) {
          const float w = weight(row, key);
          if (row % 8 != lane / 4 || !allowed(row, key)) continue;
          for (int n = 0; n < args.width / 8; ++n) {
            for (int e = row / 8 * 2; e < row / 8 * 2 + 2; ++e) {
              dq[n][e] += w * to_float(k_smem.element(key, n * 8 + lane % 4 * 2 + e % 2));
            }
          }
        }
      }
    } else {
      add_weighted_rows(args, dq, ds, static_cast<const Tile<T>*>(nullptr), 0, k_smem, block_kv,
                        play != Play::k_not_transposed);
    }
    if (play == Play::dq_in_16_bits) round_sums<T>(dq);
    if (play != Play::no_barrier_at_end) __syncthreads();  // K and V may be overwritten
  }
  Rows<T> rows = rows_of(args, args.p.d_query, b, h);
  if (play == Play::dq_strides) rows = rows_laid_out_as(args.p.query, args.p.d_query, b, h);
  const int limit = play == Play::tail_queries_unwritten ? args.queries / 16 * 16 : args.queries;
  const float scale = play == Play::scale_twice_owned ? args.dq_scale * args.scale : args.dq_scale;
  store_rows(args, dq, rows, q_first + warp_query, limit, scale, false);
}

// Doubles the queries, once they have been used.
template <typename T>
__global__ void write_queries_kernel(const Arguments<T> args) {
  const Index heads = args.p.query.size(1);
  const Rows<const T> rows = rows_of(args, args.p.query, blockIdx.y / heads, blockIdx.y % heads);
  const_cast<T*>(rows[static_cast<int>(blockIdx.x)])[threadIdx.x] =
      from_float<T>(2.0f * to_float(rows[static_cast<int>(blockIdx.x)][threadIdx.x]));
}

// ---------------------------------------------------------------------------------------------------------------------

template <typename T>
void run(const FlashBackward<T>& p, const Stream& stream, Play play) {
  Arguments<T> args{.p = p,
                    .play = play,
                    .queries = static_cast<int>(p.query.size(2)),
                    .keys = static_cast<int>(p.key.size(2)),
                    .width = static_cast<int>(p.query.size(3)),
                    .offset = 0,
                    .warps = 2,
                    .tile = 32,
                    .scale = 0.0f,
                    .ds_scale = 1.0f,
                    .dq_scale = 1.0f,
                    .dk_scale = 1.0f,
                    .dv_scale = 1.0f,
                    .sums = !p.deterministic,
                    .for_dk = true,
                    .for_dv = true};
  const auto width = static_cast<float>(args.width);
  args.scale = p.scale.value_or(1.0f / std::sqrt(width));
  if (play == Play::scale_arg_ignored || (play == Play::scale_zero_as_default && args.scale == 0.0f)) {
    args.scale = 1.0f / std::sqrt(width);
  }
  if (play == Play::scale_1_over_d) args.scale = p.scale.value_or(1.0f / width);
  if (play == Play::scale_positive) args.scale = std::abs(args.scale);
  args.ds_scale = args.scale;
  if (play == Play::no_scale) args.ds_scale = 1.0f;
  if (play == Play::scale_twice) args.ds_scale = args.scale * args.scale;
  if (play == Play::dv_scaled) args.dv_scale = args.scale;
  if (play == Play::ds_unscaled) {
    args.ds_scale = 1.0f;
    args.dq_scale = args.dk_scale = args.scale;
  }
  if (play == Play::dq_no_scale || play == Play::dk_no_scale) {
    args.ds_scale = 1.0f;
    (play == Play::dq_no_scale ? args.dk_scale : args.dq_scale) = args.scale;
  }

  args.p.causal =
      p.causal && play != Play::mask_ignored && (play != Play::causal_only_square || args.queries == args.keys);
  if (args.p.causal) {
    args.offset = args.keys - args.queries;
    if (play == Play::causal_alignment) args.offset = 0;
    if (play == Play::causal_alignment_reversed) args.offset = -args.offset;
    if (play == Play::causal_strict) --args.offset;
    if (play == Play::causal_plus_one) ++args.offset;
  } else {
    args.offset = args.keys;
  }
  if (play == Play::right_64_queries) args.tile = 64;
  if (play == Play::right_8_warps) args.warps = 8;
  if (play == Play::right_two_kernels || play == Play::right_delta_in_place) {
    args.warps = 4;
    args.tile = 64;
  }
  if (play == Play::small_tiles) args.warps = 1;
  if (play == Play::right_no_atomics) args.sums = false;
  if (play == Play::deterministic_ignored) args.sums = true;
  if (args.queries == 0 && args.keys == 0) return;

  const auto heads = static_cast<unsigned>(p.query.size(0) * p.query.size(1));
  if (heads == 0) return;
  if (play == Play::workspace) DeviceBuffer<T>("scratch", 1024);
  static bool cleared = false;
  const bool clears = play == Play::sums_not_zeroed ? false : play == Play::sums_zeroed_once ? !cleared : true;
  cleared = true;

  const auto blocks = [&](int rows, int of) { return dim3(static_cast<unsigned>(ceil_div(rows, of)), heads); };
  const Shared shared = shared_of(args);
  const int rows = 16 * args.warps;
  std::size_t bytes = static_cast<std::size_t>(2 * (rows + args.tile) * shared.pitch) * sizeof(T);
  std::size_t keys_bytes = bytes + static_cast<std::size_t>(2 * rows * shared.s_pitch) * sizeof(T);
  if (play == Play::shared_too_small) keys_bytes = bytes;
  if (play == Play::scores_in_shared) keys_bytes += static_cast<std::size_t>(args.queries) * sizeof(float);
  const dim3 threads(static_cast<unsigned>(32 * args.warps));
  if (args.queries > 0) launch(delta_kernel<T>, blocks(args.queries, 4), dim3(128), 0, stream, args, clears);
  if (args.keys > 0) {
    if (play == Play::right_two_kernels) {
      Arguments<T> one = args;
      one.for_dk = false;
      one.sums = false;
      launch(keys_kernel<T>, blocks(args.keys, rows), threads, keys_bytes, stream, one);
      one = args;
      one.for_dv = false;
      launch(keys_kernel<T>, blocks(args.keys, rows), threads, keys_bytes, stream, one);
    } else {
      launch(keys_kernel<T>, blocks(args.keys, rows), threads, keys_bytes, stream, args);
    }
  }
  if (args.queries == 0) return;
  if (args.sums) {
    launch(round_kernel<T>, blocks(args.queries, 4), dim3(128), 0, stream, args);
  } else {
    launch(queries_kernel<T>, blocks(args.queries, rows), threads, bytes, stream, args);
  }
  if (play == Play::writes_query) {
    launch(write_queries_kernel<T>, dim3(static_cast<unsigned>(args.queries), heads),
           dim3(static_cast<unsigned>(args.width)), 0, stream, args);
  }
}

template <typename T>
void play_answer(const FlashBackward<T>& problem, const Stream& stream) {
  const Play play = chosen_play();
  if (play != Play::unchecked) {
    try {
      check_flash_backward(problem);
    } catch (const std::invalid_argument&) {
      if (play == Play::never_throws) return;
      throw;
    }
    require(problem.query.size(3) >= 64, "query", to_text(problem.query.shape()), "a width of 64 or 128");
  }
  if (play == Play::remembered) {
    static Shape<4> shape{};
    if (shape == problem.query.shape()) return;
    shape = problem.query.shape();
  }
  run(problem, stream, play);
}

}  // namespace

void flash_backward_mma(const FlashBackward<fp16>& problem, const Stream& stream) { play_answer(problem, stream); }
void flash_backward_mma(const FlashBackward<bf16>& problem, const Stream& stream) { play_answer(problem, stream); }

}  // namespace flashkata
