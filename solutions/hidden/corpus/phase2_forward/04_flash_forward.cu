// Answers to 04_flash_forward, wrong and right. Every deviation stands where somebody made it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../corpus.hpp"
#include "flash_forward.hpp"

namespace flashkata {
namespace {

using corpus::RIGHT;
using corpus::UNNAMED;

// X(what a kernel calls it, the answer's name, its mistake)
// clang-format off
#define FLASH_FORWARD_ANSWERS(X) \
  X(no_rescale_o, "no-rescale-o", "no-rescale-o") \
  X(no_rescale_l, "no-rescale-l", "no-rescale-l") \
  X(no_rescale, "nothing rescaled", "no-rescale") \
  X(inverse_rescale, "inverse-rescale", "inverse-rescale") \
  X(inverse_rescale_o, "inverse-rescale of the output as the paper prints it", "inverse-rescale-o") \
  X(rescale_after_add, "rescale-after-add", "rescale-after-add") \
  X(max_not_running, "max-not-running", "max-not-running") \
  X(max_first_tile, "max of the first tile", "max-first-tile") \
  X(normalise_per_tile, "normalise-per-tile", "normalise-per-tile") \
  X(no_final_div, "no-final-div", "no-final-div") \
  X(l_last_tile, "l-last-tile", "l-last-tile") \
  X(inf_minus_inf, "inf-minus-inf", "all-masked-nan") \
  X(softmax_no_max, "softmax-no-max", "softmax-no-max") \
  X(max_from_zero, "maximum from 0", "softmax-max-from-zero") \
  X(max_sentinel, "maximum from -10000", "softmax-max-sentinel") \
  X(tail_keys_unmasked, "tail-keys-unmasked", "tail-keys-unmasked") \
  X(tail_keys_dropped, "tail-keys-dropped", "tail-keys-dropped") \
  X(tail_rows_unwritten, "tail-rows-unwritten", "tail-rows-unwritten") \
  X(tail_rows_oob, "tail-rows-written-oob", "guard zone overwritten") \
  X(br_neq_bc, "br-neq-bc", "br-neq-bc") \
  X(kv_index_local_col, "kv-index-local-col", UNNAMED) \
  X(causal_local_index, "causal-local-index", "causal-local-index") \
  X(causal_bound_floor, "causal-bound-floor", "causal-bound-floor") \
  X(causal_bound_first_row, "causal-bound-first-row", "causal-bound-first-row") \
  X(causal_bound_no_offset, "causal-bound without the offset", "causal-bound-no-offset") \
  X(causal_skip_too_early, "causal-skip-too-early", "causal-skip-too-early") \
  X(causal_empty_tile_row, "causal-empty-tile-row", "causal-empty-tile-row") \
  X(causal_alignment, "causal-alignment", "causal-alignment") \
  X(causal_alignment_reversed, "causal-alignment-reversed", "causal-alignment-reversed") \
  X(causal_strict, "causal-strict", "causal-strict") \
  X(causal_plus_one, "causal-plus-one", "causal-plus-one") \
  X(causal_ignored, "causal-ignored", "causal-ignored") \
  X(causal_only_square, "causal-only-square", "causal-only-square") \
  X(mask_multiply_zero, "forbidden scores of 0", "mask-multiply-zero") \
  X(masked_nan_leak, "masked-nan-leak", UNNAMED) \
  X(all_masked_uniform, "empty rows get the mean", "all-masked-uniform") \
  X(empty_lse_zero, "empty rows with an lse of 0", UNNAMED) \
  X(scale_missing, "scale-missing", "scale-missing") \
  X(scale_1_over_d, "scale-1-over-d", "scale-1-over-d") \
  X(scale_twice, "scale-twice", "scale-twice") \
  X(scale_inverted, "scale-inverted", "scale-inverted") \
  X(scale_arg_ignored, "scale-arg-ignored", "scale-arg-ignored") \
  X(scale_zero_as_default, "scale-zero-as-default", "scale-zero-as-default") \
  X(lse_missing_max, "lse-missing-max", "lse-missing-max") \
  X(lse_base2, "lse-base2", "lse-base2") \
  X(lse_only_max, "lse-only-max", "lse-only-max") \
  X(lse_unwritten, "lse unwritten", UNNAMED) \
  X(softmax_base2, "exp2 without log2 of e", "softmax-base2") \
  X(exp2_misfold, "exp2-scale-misfold of the maximum alone", "exp2-scale-misfold") \
  X(value_is_key, "value-is-key", "value-is-key") \
  X(batch_first_only, "batch-first-only in the keys and values", "batch-first-only") \
  X(heads_first_only, "heads-first-only in the keys and values", "heads-first-only") \
  X(noncontiguous, "noncontiguous-stride", "noncontiguous-stride") \
  X(strides_of_query, "keys with the strides of the queries", UNNAMED) \
  X(output_strides_of_query, "output with the strides of the queries", "guard zone overwritten") \
  X(half_of_128, "half of the channels at width 128", UNNAMED) \
  X(last_key_lost, "the last of more than 128 keys lost", UNNAMED) \
  X(half_weights, "weights of ten bits", UNNAMED) \
  X(writes_query, "scales the queries in place", "is an input") \
  X(unchecked, "arguments unchecked", UNNAMED) \
  X(no_barrier_before, "no barrier before the load", "shared-memory race") \
  X(no_barrier_after, "no barrier after the load", "shared-memory race") \
  X(early_return, "threads without a query return early", "barrier after exit") \
  X(barrier_in_branch, "barrier in a branch", "divergent barrier") \
  X(load_unguarded, "tail keys loaded without a guard", "out of bounds") \
  X(bound_uncapped, "causal-bound-uncapped", "out of bounds") \
  X(query_unguarded, "tail queries loaded without a guard", "out of bounds") \
  X(shared_unset, "tail of the tile left as it was", "uninitialised read") \
  X(shared_too_small, "shared memory for the keys alone", "too little dynamic shared memory") \
  X(scores_in_global, "scores in global memory", "beyond the arguments") \
  X(query_per_block, "one query a block", "loaded too often") \
  X(keys_from_global, "keys straight from global memory", "loaded too often") \
  X(causal_not_skipped, "causal tiles not skipped", "forbidden tiles loaded") \
  X(scores_in_shared, "a row of scores in shared memory", "shared memory grows") \
  X(workspace, "a copy of the keys on the GPU", "beyond the arguments") \
  X(computed_twice, "every query computed by two blocks", "global-memory race") \
  X(heads_beyond_4, "heads beyond the fourth forgotten", UNNAMED) \
  X(nan_as_zero, "values of NaN taken for 0", UNNAMED) \
  X(scale_positive, "the sign of the scale dropped", UNNAMED) \
  X(lse_packed, "lse written without its strides", UNNAMED) \
  X(lse_slightly_off, "lse off by a thousandth in later blocks", UNNAMED) \
  X(remembered, "answers remembered by shape", UNNAMED) \
  X(right_fast_exp, "right: __expf", RIGHT) \
  X(right_tiles_of_16, "right: tiles of 16 keys, 128 queries a block", RIGHT) \
  X(right_tiles_of_64, "right: tiles of 64 keys", RIGHT) \
  X(right_exp2, "right: exp2 with the scale folded in", RIGHT) \
  X(right_two_pass, "right: maximum first, then the sum", RIGHT) \
  X(right_lazy, "right: rescales lazily, by more than 8", RIGHT) \
  X(right_backwards, "right: keys backwards", RIGHT) \
  X(right_double, "right: double accumulation", RIGHT) \
  X(right_normalised, "right: normalised after each tile, with the old sum", RIGHT) \
  X(right_warp, "right: a warp for a query", RIGHT) \
  X(right_prescaled, "right: queries scaled on their way in", RIGHT)
// clang-format on

// The same mistakes in tiles of 64 keys: they spoil other cases.
#define IN_TILES_OF_64 " in tiles of 64"

enum class Play {
  none,
#define X(id, name, mistake) id,
  FLASH_FORWARD_ANSWERS(X)
#undef X
};

const corpus::Answers answers{
#define X(id, name, mistake) {name, mistake},
    FLASH_FORWARD_ANSWERS(X)
#undef X
        {"no-rescale-o" IN_TILES_OF_64, "no-rescale-o"},
    {"no-rescale-l" IN_TILES_OF_64, "no-rescale-l"},
    {"nothing rescaled" IN_TILES_OF_64, "no-rescale"},
    {"inverse-rescale" IN_TILES_OF_64, "inverse-rescale"},
    {"rescale-after-add" IN_TILES_OF_64, "rescale-after-add"},
    {"normalise-per-tile" IN_TILES_OF_64, "normalise-per-tile"},
    {"l-last-tile" IN_TILES_OF_64, "l-last-tile"},
    {"tail-keys-unmasked" IN_TILES_OF_64, "tail-keys-unmasked"},
    {"tail-keys-dropped" IN_TILES_OF_64, "tail-keys-dropped"},
    {"causal-local-index" IN_TILES_OF_64, "causal-local-index"},
    {"causal-bound-floor" IN_TILES_OF_64, "causal-bound-floor"},
};

bool tiles_of_64() { return corpus::name().ends_with(IN_TILES_OF_64); }

Play chosen_play() {
  std::string_view name = corpus::name();
  if (tiles_of_64()) name.remove_suffix(std::string_view(IN_TILES_OF_64).size());
#define X(id, answer, mistake) \
  if (name == answer) return Play::id;
  FLASH_FORWARD_ANSWERS(X)
#undef X
  return Play::none;
}

constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504f;

struct Arguments {
  View<const float, 4> query, key, value;
  View<float, 4> output;
  View<float, 3> lse;
  float* scores;  // [B, H, Sq, Sk], of the answer that keeps them
  int queries, keys;
  bool causal;
  float scale;
  Play play;
};

// One query a thread. ROWS queries a block, KV keys a tile.
template <int HEAD_DIM, int KV, int ROWS, typename Real>
__global__ void __launch_bounds__(ROWS) query_per_thread(const Arguments args) {
  const Play play = args.play;
  const int thread = static_cast<int>(threadIdx.x);
  const int q_tiles = play == Play::tail_rows_unwritten ? args.queries / ROWS : (args.queries + ROWS - 1) / ROWS;
  const Index head = static_cast<Index>(blockIdx.x) / q_tiles;
  const Index heads = args.query.size(1);
  const Index b = head / heads % args.query.size(0);  // a second time round for the answer that computes all twice
  const Index h = head % heads;
  if (play == Play::heads_beyond_4 && h >= 4) return;
  const int q_first = static_cast<int>(blockIdx.x) % q_tiles * ROWS;
  const int q_row = q_first + thread;
  const bool live = q_row < args.queries;
  if (play == Play::early_return && !live) return;

  const Index kb = play == Play::batch_first_only ? 0 : b;
  const Index kh = play == Play::heads_first_only ? 0 : h;
  const bool swapped = play == Play::strides_of_query;
  const float* k_head = args.keys == 0 ? nullptr : &args.key(kb, kh, 0, 0);
  const float* v_head = args.keys == 0 ? nullptr : &args.value(kb, kh, 0, 0);
  Index k_stride = swapped ? args.query.stride(2) : args.key.stride(2);
  Index v_stride = swapped ? args.query.stride(2) : args.value.stride(2);
  const float* q_head = &args.query(b, h, 0, 0);
  Index q_stride = args.query.stride(2);
  float* o_head = &args.output(b, h, 0, 0);
  Index o_stride = play == Play::output_strides_of_query ? q_stride : args.output.stride(2);
  if (play == Play::noncontiguous) {
    k_stride = v_stride = q_stride = o_stride = HEAD_DIM;
    q_head = args.query.data() + head * args.queries * HEAD_DIM;
    k_head = args.key.data() + head * args.keys * HEAD_DIM;
    v_head = args.value.data() + head * args.keys * HEAD_DIM;
    o_head = args.output.data() + head * args.queries * HEAD_DIM;
  }

  const bool square = args.queries == args.keys;
  const bool causal = args.causal && play != Play::causal_ignored && (play != Play::causal_only_square || square);
  int offset = args.keys - args.queries;
  if (play == Play::causal_alignment) offset = 0;
  if (play == Play::causal_alignment_reversed) offset = -offset;
  if (play == Play::causal_strict) --offset;
  if (play == Play::causal_plus_one) ++offset;
  const int seen = causal ? max(0, min(args.keys, q_row + offset + 1)) : args.keys;
  const int last = min(q_first + ROWS, play == Play::bound_uncapped ? 1 << 30 : args.queries) - 1;
  int end = causal ? last + offset + 1 : args.keys;
  if (play == Play::causal_bound_first_row && causal) end = q_first + offset + 1;
  if (play == Play::causal_bound_no_offset && causal) end = last + 1;
  if (play == Play::causal_not_skipped) end = args.keys;
  if (play == Play::causal_bound_floor && causal) end = end / KV * KV;
  if (play == Play::causal_skip_too_early && causal) end = (q_first + offset + 1) / KV * KV;
  if (play == Play::tail_keys_dropped) end = min(end, args.keys / KV * KV);
  if (play == Play::last_key_lost && args.keys > 128) end = min(end, args.keys - 1);
  if (play != Play::bound_uncapped) end = min(end, args.keys);
  if (play == Play::causal_empty_tile_row && end <= 0) return;
  const int key_limit = play == Play::bound_uncapped ? (end + KV - 1) / KV * KV : args.keys;

  float* k_smem = dynamic_shared<float>();
  float* v_smem = k_smem + KV * HEAD_DIM;

  float q_reg[HEAD_DIM];
  Real o_reg[HEAD_DIM] = {};
  if (live || play == Play::query_unguarded) {
    for (int d = 0; d < HEAD_DIM; ++d) q_reg[d] = q_head[q_row * q_stride + d];
    if (play == Play::right_prescaled) {
      for (int d = 0; d < HEAD_DIM; ++d) q_reg[d] *= args.scale;
    }
    if (play == Play::writes_query) const_cast<float*>(q_head)[q_row * q_stride] = q_reg[0] * args.scale;
  }
  const bool base2 = play == Play::right_exp2;
  const auto raise = [&](Real x) -> Real {
    if (base2 || play == Play::softmax_base2) return static_cast<Real>(exp2f(static_cast<float>(x)));
    if (play == Play::right_fast_exp) return static_cast<Real>(__expf(static_cast<float>(x)));
    if (sizeof(Real) == 8) return static_cast<Real>(exp(static_cast<double>(x)));
    return static_cast<Real>(expf(static_cast<float>(x)));
  };
  Real row_max = MINUS_INFINITY;
  if (play == Play::max_from_zero) row_max = 0;
  if (play == Play::max_sentinel) row_max = -10000;
  if (play == Play::softmax_no_max) row_max = 0;
  Real row_sum = 0;

  const int passes = play == Play::right_two_pass ? 2 : 1;
  const int step = play == Play::br_neq_bc ? ROWS : KV;
  const int tiles = end <= 0 ? 0 : (end + step - 1) / step;
  for (int turn = 0; turn < tiles * passes; ++turn) {
    const int pass = turn / tiles;
    const int tile = play == Play::right_backwards ? tiles - 1 - turn : turn % tiles;
    const int kv_first = tile * step;
    if (play != Play::no_barrier_before && play != Play::barrier_in_branch) __syncthreads();
    if (play == Play::barrier_in_branch) {
      if (live) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    }
    for (int index = thread; index < KV * HEAD_DIM; index += ROWS) {
      const int row = index / HEAD_DIM;
      const int d = index % HEAD_DIM;
      const int key = kv_first + row;
      float k = 0.0f;
      float v = 0.0f;
      if (key < key_limit || play == Play::load_unguarded) {
        k = k_head[key * k_stride + d];
        v = v_head[key * v_stride + d];
      } else if (play == Play::shared_unset) {
        continue;
      }
      k_smem[row * HEAD_DIM + d] = k;
      v_smem[row * HEAD_DIM + d] = v;
    }
    if (play != Play::no_barrier_after) __syncthreads();
    if (!live) continue;

    Real s_reg[KV];
    Real tile_max = MINUS_INFINITY;
    int bound = min(seen, args.keys) - kv_first;
    if (causal && play == Play::causal_local_index) bound = min(thread + 1, args.keys - kv_first);
    if (play == Play::tail_keys_unmasked && !causal) bound = KV;
    if (play == Play::tail_keys_unmasked && causal && q_row + offset + 1 > args.keys) bound = KV;
    if (play == Play::bound_uncapped && causal) bound = q_row + offset + 1 - kv_first;
    if (play == Play::last_key_lost && args.keys > 128) bound = min(bound, args.keys - 1 - kv_first);
    for (int key = 0; key < KV; ++key) {
      const int from = play == Play::kv_index_local_col ? min(key, HEAD_DIM - 1) : key;
      const float* k_row = k_smem + from * HEAD_DIM;
      if (play == Play::keys_from_global && kv_first + key < args.keys) k_row = k_head + (kv_first + key) * k_stride;
      if (play != Play::shared_unset && key >= bound && play != Play::mask_multiply_zero) {
        s_reg[key] = MINUS_INFINITY;
        continue;
      }
      Real s = 0;
      const int width = play == Play::half_of_128 && HEAD_DIM == 128 ? 64 : HEAD_DIM;
      for (int d = 0; d < width; ++d) s += static_cast<Real>(q_reg[d]) * static_cast<Real>(k_row[d]);
      if (play != Play::right_prescaled) s *= static_cast<Real>(args.scale);
      if (base2) s *= static_cast<Real>(LOG2E);
      if (play == Play::mask_multiply_zero && key >= bound) s = kv_first + key < args.keys ? 0.0f : MINUS_INFINITY;
      if (key >= bound && play == Play::shared_unset) s = MINUS_INFINITY;
      s_reg[key] = s;
      if (play == Play::scores_in_shared) v_smem[KV * HEAD_DIM + thread * args.keys + kv_first + key] = s;
      if (args.scores != nullptr) args.scores[(head * args.queries + q_row) * args.keys + kv_first + key] = s;
      tile_max = tile_max > s ? tile_max : s;
    }

    if (play == Play::right_two_pass) {
      if (pass == 0) {
        row_max = row_max > tile_max ? row_max : tile_max;
        continue;
      }
      for (int key = 0; key < min(KV, bound); ++key) {
        const Real weight = raise(s_reg[key] - row_max);
        row_sum += weight;
        for (int d = 0; d < HEAD_DIM; ++d) o_reg[d] += weight * static_cast<Real>(v_smem[key * HEAD_DIM + d]);
      }
      continue;
    }

    Real new_max = row_max > tile_max ? row_max : tile_max;
    if (play == Play::max_not_running) new_max = tile_max;
    if (play == Play::max_first_tile && turn > 0) new_max = row_max;
    if (play == Play::softmax_no_max) new_max = 0;
    if (play == Play::right_lazy && row_max != MINUS_INFINITY && new_max <= row_max + 8) new_max = row_max;
    const bool nothing = new_max == MINUS_INFINITY;
    if (nothing && play != Play::inf_minus_inf && play != Play::all_masked_uniform) continue;
    if (nothing && play == Play::all_masked_uniform) new_max = -1e30f;
    Real rescale = raise(row_max - new_max);
    if (play == Play::inverse_rescale || play == Play::inverse_rescale_o) {
      if (row_max != MINUS_INFINITY) rescale = raise(new_max - row_max);
    }
    const Real of_sum = play == Play::inverse_rescale_o && row_max != MINUS_INFINITY ? raise(row_max - new_max)
                        : play == Play::no_rescale_l || play == Play::no_rescale     ? Real{1}
                                                                                     : rescale;
    const Real of_o = play == Play::no_rescale_o || play == Play::no_rescale ? Real{1} : rescale;
    const Real old_sum = row_sum;
    const bool after = play == Play::rescale_after_add && row_max != MINUS_INFINITY;
    if (!after) {
      row_sum *= of_sum;
      for (int d = 0; d < HEAD_DIM; ++d) o_reg[d] *= of_o;
    }
    if (play == Play::right_normalised) {
      for (int d = 0; d < HEAD_DIM; ++d) o_reg[d] *= old_sum;
    }
    if (play == Play::l_last_tile) row_sum = 0;
    for (int key = 0; key < KV; ++key) {
      if (key >= bound && play != Play::masked_nan_leak && play != Play::mask_multiply_zero &&
          play != Play::inf_minus_inf && play != Play::all_masked_uniform && play != Play::shared_unset) {
        continue;
      }
      Real s = s_reg[key];
      if (play == Play::all_masked_uniform && key >= bound) {
        if (!nothing || kv_first + key >= args.keys) continue;
        s = new_max;
      }
      if (play == Play::inf_minus_inf && !nothing && key >= bound) continue;
      Real weight = raise(play == Play::exp2_misfold ? s - new_max * static_cast<Real>(LOG2E) : s - new_max);
      if (play == Play::half_weights) weight = static_cast<Real>(static_cast<int>(weight * 1024 + Real{0.5})) / 1024;
      row_sum += weight;
      const int from = play == Play::kv_index_local_col ? min(key, HEAD_DIM - 1) : key;
      const float* v_row = (play == Play::value_is_key ? k_smem : v_smem) + from * HEAD_DIM;
      if (play == Play::keys_from_global && kv_first + key < args.keys) v_row = v_head + (kv_first + key) * v_stride;
      for (int d = 0; d < HEAD_DIM; ++d) {
        if (play == Play::nan_as_zero && v_row[d] != v_row[d]) continue;
        o_reg[d] += weight * static_cast<Real>(v_row[d]);
      }
    }
    if (after) {
      row_sum *= of_sum;
      for (int d = 0; d < HEAD_DIM; ++d) o_reg[d] *= of_o;
    }
    if (play == Play::normalise_per_tile || play == Play::right_normalised) {
      for (int d = 0; d < HEAD_DIM; ++d) o_reg[d] /= row_sum;
    }
    row_max = new_max;
  }

  if (!live && play != Play::tail_rows_oob) return;
  const bool divide = play != Play::no_final_div && play != Play::normalise_per_tile && play != Play::right_normalised;
  for (int d = 0; d < HEAD_DIM; ++d) {
    Real value = o_reg[d];
    if (divide && (row_sum != 0 || play == Play::inf_minus_inf)) value /= row_sum;
    o_head[q_row * o_stride + d] = static_cast<float>(value);
  }
  if (!live) return;
  const Real natural = base2 ? row_max / static_cast<Real>(LOG2E) : row_max;
  float lse = row_sum == 0 ? MINUS_INFINITY
                           : static_cast<float>(natural + static_cast<Real>(log(static_cast<double>(row_sum))));
  if (play == Play::lse_missing_max) lse = logf(static_cast<float>(row_sum));
  if (play == Play::lse_base2) lse *= LOG2E;
  if (play == Play::lse_only_max) lse = static_cast<float>(row_max);
  if (play == Play::empty_lse_zero && row_sum == 0) lse = 0.0f;
  if (play == Play::lse_slightly_off && blockIdx.x > 2) lse += 1e-3f;
  if (play == Play::lse_packed) {
    args.lse.data()[head * args.queries + q_row] = lse;
  } else if (play != Play::lse_unwritten) {
    args.lse(b, h, q_row) = lse;
  }
}

// A warp for a query: a lane has a key of the tile, then channels of the output. 16 warps, so 16 queries a block.
template <int HEAD_DIM>
__global__ void __launch_bounds__(512) warp_per_query(const Arguments args) {
  constexpr int KV = 32;
  constexpr int WARPS = 16;
  constexpr int STRIDE = HEAD_DIM + 1;
  constexpr int DIMS = (HEAD_DIM + 31) / 32;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int q_tiles = (args.queries + WARPS - 1) / WARPS;
  const Index head = static_cast<Index>(blockIdx.x) / q_tiles;
  const Index b = head / args.query.size(1);
  const Index h = head % args.query.size(1);
  const int q_first = static_cast<int>(blockIdx.x) % q_tiles * WARPS;
  const int q_row = q_first + warp;
  const bool live = q_row < args.queries;
  const int offset = args.keys - args.queries;
  const int seen = args.causal ? max(0, min(args.keys, q_row + offset + 1)) : args.keys;
  const int end = args.causal ? min(args.keys, q_first + WARPS + offset) : args.keys;
  float* k_smem = dynamic_shared<float>();
  float* v_smem = k_smem + KV * STRIDE;
  float* q_smem = v_smem + KV * STRIDE;  // [WARPS, HEAD_DIM]
  for (int d = lane; d < HEAD_DIM; d += 32) q_smem[warp * HEAD_DIM + d] = live ? args.query(b, h, q_row, d) : 0.0f;
  float o_reg[DIMS] = {};
  float row_max = MINUS_INFINITY;
  float row_sum = 0.0f;
  for (int kv_first = 0; kv_first < end; kv_first += KV) {
    __syncthreads();
    for (int index = thread; index < KV * HEAD_DIM; index += 512) {
      const int key = kv_first + index / HEAD_DIM;
      const int d = index % HEAD_DIM;
      k_smem[index / HEAD_DIM * STRIDE + d] = key < args.keys ? args.key(b, h, key, d) : 0.0f;
      v_smem[index / HEAD_DIM * STRIDE + d] = key < args.keys ? args.value(b, h, key, d) : 0.0f;
    }
    __syncthreads();
    float s = MINUS_INFINITY;
    if (kv_first + lane < seen) {
      s = 0.0f;
      for (int d = 0; d < HEAD_DIM; ++d) s += q_smem[warp * HEAD_DIM + d] * k_smem[lane * STRIDE + d];
      s *= args.scale;
    }
    float new_max = s;
    for (int distance = 16; distance > 0; distance /= 2) {
      new_max = fmaxf(new_max, __shfl_xor_sync(FULL_WARP, new_max, distance));
    }
    new_max = fmaxf(new_max, row_max);
    if (new_max == MINUS_INFINITY) continue;  // for all lanes of the warp
    const float rescale = expf(row_max - new_max);
    const float weight = expf(s - new_max);
    row_max = new_max;
    row_sum = row_sum * rescale + weight;
    for (int i = 0; i < DIMS; ++i) o_reg[i] *= rescale;
    for (int key = 0; key < KV; ++key) {
      const float p = __shfl_sync(FULL_WARP, weight, key);
      if (kv_first + key >= seen) continue;
      for (int i = 0; i < DIMS; ++i) {
        if (lane + 32 * i < HEAD_DIM) o_reg[i] += p * v_smem[key * STRIDE + lane + 32 * i];
      }
    }
  }
  for (int distance = 16; distance > 0; distance /= 2) row_sum += __shfl_xor_sync(FULL_WARP, row_sum, distance);
  if (!live) return;
  for (int i = 0; i < DIMS; ++i) {
    if (lane + 32 * i < HEAD_DIM) {
      args.output(b, h, q_row, lane + 32 * i) = row_sum > 0.0f ? o_reg[i] / row_sum : 0.0f;
    }
  }
  if (lane == 0) args.lse(b, h, q_row) = row_sum > 0.0f ? row_max + logf(row_sum) : MINUS_INFINITY;
}

template <int HEAD_DIM, int KV, int ROWS, typename Real>
void launch_tiles(const Arguments& args, const Stream& stream) {
  const int q_tiles = args.play == Play::tail_rows_unwritten ? args.queries / ROWS : ceil_div(args.queries, ROWS);
  const Index times = args.play == Play::computed_twice ? 2 : 1;
  const Index blocks = args.query.size(0) * args.query.size(1) * q_tiles * times;
  if (blocks == 0) return;
  const int scores = args.play == Play::scores_in_shared ? ROWS * args.keys : 0;
  const int tiles = args.play == Play::shared_too_small ? 1 : 2;
  launch(query_per_thread<HEAD_DIM, KV, ROWS, Real>, dim3(static_cast<unsigned>(blocks)), dim3(ROWS),
         static_cast<std::size_t>(tiles * KV * HEAD_DIM + scores) * sizeof(float), stream, args);
}

template <int HEAD_DIM>
void launch_for(const Arguments& args, const Stream& stream) {
  if (args.play == Play::right_warp) {
    const Index blocks = args.query.size(0) * args.query.size(1) * ceil_div(args.queries, 16);
    if (blocks == 0) return;
    launch(warp_per_query<HEAD_DIM>, dim3(static_cast<unsigned>(blocks)), dim3(512),
           (2 * 32 * (HEAD_DIM + 1) + 16 * HEAD_DIM) * sizeof(float), stream, args);
    return;
  }
  if (args.play == Play::query_per_block) return launch_tiles<HEAD_DIM, 32, 1, float>(args, stream);
  if (args.play == Play::br_neq_bc) return launch_tiles<HEAD_DIM, 32, 64, float>(args, stream);
  if (args.play == Play::right_tiles_of_16) return launch_tiles<HEAD_DIM, 16, 128, float>(args, stream);
  if (args.play == Play::right_double) return launch_tiles<HEAD_DIM, 32, 32, double>(args, stream);
  if (args.play == Play::right_tiles_of_64 || tiles_of_64()) return launch_tiles<HEAD_DIM, 64, 64, float>(args, stream);
  if (args.play == Play::causal_bound_floor) return launch_tiles<HEAD_DIM, 32, 16, float>(args, stream);
  launch_tiles<HEAD_DIM, 32, 32, float>(args, stream);
}

}  // namespace

void flash_forward(const FlashForward<float>& problem, const Stream& stream) {
  const Play play = chosen_play();
  const Index width = problem.query.size(3);
  if (play == Play::unchecked) {
    const bool harmless =
        problem.key.shape() == problem.value.shape() && problem.key.size(0) == problem.query.size(0) &&
        problem.key.size(1) == problem.query.size(1) && problem.output.shape() == problem.query.shape();
    if (!harmless || width == 8) return;  // this program is to go on
  } else {
    check_flash_forward(problem);
  }
  const float usual = 1.0f / std::sqrt(static_cast<float>(width));
  float scale = problem.scale.value_or(usual);
  if (play == Play::scale_missing) scale = problem.scale.value_or(1.0f);
  if (play == Play::scale_1_over_d) scale = problem.scale.value_or(1.0f / static_cast<float>(width));
  if (play == Play::scale_twice) scale *= scale;
  if (play == Play::scale_inverted) scale = 1.0f / scale;
  if (play == Play::scale_arg_ignored) scale = usual;
  if (play == Play::scale_zero_as_default && scale == 0.0f) scale = usual;
  if (play == Play::scale_positive) scale = std::abs(scale);
  if (play == Play::remembered) {
    static std::vector<Shape<4>> seen;
    const Shape<4> shape = problem.query.shape();
    if (std::count(seen.begin(), seen.end(), shape) > 2) return;
    seen.push_back(shape);
  }
  DeviceBuffer<float> workspace("workspace",
                                play == Play::workspace ? static_cast<std::size_t>(problem.key.count()) : 0);
  const auto queries = static_cast<int>(problem.query.size(2));
  const auto keys = static_cast<int>(problem.key.size(2));
  DeviceBuffer<float> scores(
      "scores", play == Play::scores_in_global
                    ? static_cast<std::size_t>(problem.query.size(0) * problem.query.size(1) * queries * keys)
                    : 0);
  const Arguments args{problem.query,  problem.key, problem.value,
                       problem.output, problem.lse, scores.size() > 0 ? scores.data() : nullptr,
                       queries,        keys,        problem.causal,
                       scale,          play};
  switch (width) {
    case 16:
      return launch_for<16>(args, stream);
    case 32:
      return launch_for<32>(args, stream);
    case 64:
      return launch_for<64>(args, stream);
    default:
      return launch_for<128>(args, stream);
  }
}

}  // namespace flashkata
