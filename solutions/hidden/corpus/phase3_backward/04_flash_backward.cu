// Answers to 04_flash_backward, wrong and right. Every deviation stands where somebody made it.
//
// One key or one query a thread; the width of a row is an argument, so that each kernel is compiled once.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../corpus.hpp"
#include "flash_backward.hpp"

namespace flashkata {
namespace {

using corpus::RIGHT;
using corpus::UNNAMED;

// X(what a kernel calls it, the answer's name, its mistake)
// clang-format off
#define FLASH_BACKWARD_ANSWERS(X) \
  X(no_delta, "bwd-no-D", "bwd-no-D") \
  X(delta_of_d_output, "bwd-D-wrong-source", "bwd-D-wrong-source") \
  X(delta_per_tile, "bwd-D-tile", "bwd-D-tile") \
  X(delta_mean, "delta-mean", "delta-mean") \
  X(delta_scaled, "delta-scaled", "delta-scaled") \
  X(delta_last_channel, "delta-last-channel", "delta-last-channel") \
  X(delta_row_carried, "delta carried into every 32nd row", UNNAMED) \
  X(delta_first_64, "delta of the first 64 channels", UNNAMED) \
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
  X(weights_of_max, "bwd-P-from-m", "bwd-P-from-m") \
  X(weights_no_lse, "bwd-P-no-lse", "bwd-P-no-lse") \
  X(lse_base, "bwd-lse-base", "bwd-lse-base") \
  X(lse_of_key, "bwd-lse-of-key where square", "bwd-lse-of-key") \
  X(delta_of_key, "bwd-D-of-key where square", "bwd-D-of-key") \
  X(base2, "exp2 without log2 of e", "softmax-base2") \
  X(scale_arg_ignored, "scale-arg-ignored", "scale-arg-ignored") \
  X(scale_1_over_d, "scale-1-over-d", "scale-1-over-d") \
  X(scale_inverted, "scale-inverted", "scale-inverted") \
  X(scale_zero_as_default, "scale-zero-as-default", "scale-zero-as-default") \
  X(scale_positive, "the sign of the scale dropped", UNNAMED) \
  X(dq_dk_swapped, "bwd-dq-dk-swapped where square", "bwd-dq-dk-swapped") \
  X(gradients_exchanged, "bwd-gradients-exchanged where square", "bwd-gradients-exchanged") \
  X(dv_from_ds, "bwd-dv-from-dS", "bwd-dv-from-dS") \
  X(dp_from_key, "bwd-dP-from-key", "bwd-dP-from-key") \
  X(d_output_ignored, "bwd-dO-ignored", "bwd-dO-ignored") \
  X(averaged, "bwd-averaged", "bwd-averaged") \
  X(dq_assign, "bwd-dq-last-tile", "bwd-dq-last-tile") \
  X(dk_assign, "bwd-dk-last-tile", "bwd-dk-last-tile") \
  X(dv_assign, "bwd-dv-last-tile", "bwd-dv-last-tile") \
  X(dk_dv_assign, "bwd-dkdv-last-tile", "bwd-dkdv-last-tile") \
  X(sums_not_zeroed, "bwd-accum-not-zeroed", "bwd-accum-not-zeroed") \
  X(sums_zeroed_once, "sums set to 0 by the first call alone", "bwd-accum-not-zeroed") \
  X(dk_not_zeroed, "dK added to what the memory held", UNNAMED) \
  X(mask_ignored, "bwd-mask-ignored", "bwd-mask-ignored") \
  X(causal_only_square, "causal-only-square", "causal-only-square") \
  X(causal_alignment, "causal-alignment", "causal-alignment") \
  X(causal_alignment_reversed, "causal-alignment-reversed", "causal-alignment-reversed") \
  X(causal_offset_clamped, "causal-offset-clamped", "causal-offset-clamped") \
  X(causal_strict, "causal-strict", "causal-strict") \
  X(causal_plus_one, "causal-plus-one", "causal-plus-one") \
  X(causal_local_index, "causal-local-index", "causal-local-index") \
  X(start_ceil, "bwd-causal-start-block", "bwd-causal-start-block") \
  X(start_last_key, "bwd-causal-start-last-key", "bwd-causal-start-last-key") \
  X(start_no_offset, "bwd-causal-start-no-offset", "bwd-causal-start-no-offset") \
  X(end_floor, "causal-bound-floor", "causal-bound-floor") \
  X(end_first_row, "causal-bound-first-row", "causal-bound-first-row") \
  X(end_no_offset, "causal-bound without the offset", "causal-bound-no-offset") \
  X(end_uncapped, "causal-bound-uncapped", "out of bounds") \
  X(masked_nan_leak, "masked-nan-leak", UNNAMED) \
  X(blind_nan, "bwd-masked-row", "bwd-masked-row") \
  X(blind_unwritten, "queries that see no key left unwritten", "causal-empty-tile-row") \
  X(tail_queries_dropped, "bwd-tail-queries-dropped", "bwd-tail-queries-dropped") \
  X(tail_keys_dropped, "tail-keys-dropped", "tail-keys-dropped") \
  X(tail_keys_unwritten, "tail-rows-unwritten: keys", "tail-rows-unwritten") \
  X(tail_queries_unwritten, "tail-rows-unwritten: queries", UNNAMED) \
  X(tail_rows_oob, "tail rows written", "guard zone overwritten") \
  X(last_query_lost, "the last of more than 128 queries lost", UNNAMED) \
  X(half_of_128, "half of the channels of dP at width 128", UNNAMED) \
  X(half_weights, "weights of ten bits", UNNAMED) \
  X(half_ds, "dS of ten bits", UNNAMED) \
  X(small_weights_dropped, "weights below a thousandth dropped", UNNAMED) \
  X(batch_first_only, "batch-first-only in keys and values", "batch-first-only") \
  X(heads_first_only, "heads-first-only in keys and values", "heads-first-only") \
  X(heads_beyond_4, "heads beyond the fourth forgotten", UNNAMED) \
  X(delta_first_item, "delta of the first batch item", UNNAMED) \
  X(noncontiguous, "noncontiguous-stride", "noncontiguous-stride") \
  X(d_output_packed, "bwd-dO-stride, packed", "bwd-dO-stride") \
  X(d_output_as_output, "bwd-dO-stride, those of output", UNNAMED) \
  X(strides_of_query, "values with the strides of the keys", UNNAMED) \
  X(dk_strides, "d_key with the strides of key", "guard zone overwritten") \
  X(dq_strides, "d_query with the strides of query", "guard zone overwritten") \
  X(lse_packed, "lse read without its strides", UNNAMED) \
  X(deterministic_ignored, "deterministic ignored", UNNAMED) \
  X(keys_by_atomics, "dK and dV added up by three blocks", UNNAMED) \
  X(race, "dQ added without atomics", "global-memory race") \
  X(delta_by_all, "delta written by every block that uses it", "global-memory race") \
  X(computed_twice, "every key computed by two blocks", "global-memory race") \
  X(no_barrier_before, "no barrier before the load", "shared-memory race") \
  X(no_barrier_after, "no barrier after the load", "shared-memory race") \
  X(early_return, "threads without a key return early", "barrier after exit") \
  X(barrier_in_branch, "barrier in a branch", "divergent barrier") \
  X(load_unguarded, "tail queries loaded without a guard", "out of bounds") \
  X(lse_unguarded, "bwd-oob-lse", "out of bounds") \
  X(shared_unset, "tail of the tile left as it was", "uninitialised read") \
  X(shared_too_small, "shared memory for the queries alone", "too little dynamic shared memory") \
  X(from_global, "queries straight from global memory", "times its size") \
  X(causal_not_skipped, "blind tiles not skipped", "see nothing of each other") \
  X(scores_in_shared, "a column of scores in shared memory", "shared memory grows") \
  X(workspace, "sums in memory of its own", "beyond the arguments") \
  X(writes_query, "scales the queries in place", "is an input") \
  X(writes_lse, "turns the lse to base 2 in place", "is an input") \
  X(unchecked, "arguments unchecked", UNNAMED) \
  X(remembered, "gradients remembered by shape", UNNAMED) \
  X(right_exp2, "right: exp2 with the scale folded in", RIGHT) \
  X(right_double, "right: double accumulation", RIGHT) \
  X(right_backwards, "right: tiles backwards", RIGHT) \
  X(right_tiles_of_16, "right: tiles of 16 queries, 128 keys a block", RIGHT) \
  X(right_no_atomics, "right: deterministic without being asked", RIGHT) \
  X(right_no_scratch, "right: atomics on d_query itself", RIGHT) \
  X(right_prescaled, "right: queries scaled on their way in", RIGHT) \
  X(right_no_delta_kernel, "right: delta computed where it is used, scratch untouched", RIGHT) \
  X(right_minus_delta, "right: dP begins at minus delta", RIGHT) \
  X(right_two_kernels, "right: dV and dK by two kernels", RIGHT) \
  X(right_query_first, "right: dQ first", RIGHT)
// clang-format on

enum class Play {
  none,
#define X(id, name, mistake) id,
  FLASH_BACKWARD_ANSWERS(X)
#undef X
};

const corpus::Answers answers{
#define X(id, name, mistake) {name, mistake},
    FLASH_BACKWARD_ANSWERS(X)
#undef X
};

Play chosen_play() {
#define X(id, answer, mistake) \
  if (corpus::name() == answer) return Play::id;
  FLASH_BACKWARD_ANSWERS(X)
#undef X
  return Play::none;
}

constexpr int WIDEST = 128;
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504f;

struct Arguments {
  FlashBackward<float> p;
  Play play;
  int queries, keys, width;
  int offset;  // query i sees keys 0 .. i + offset when causal
  bool causal, atomics;
  int tile, threads;
  float score_scale, dq_scale, dk_scale, dv_scale;
  float* sums;          // [B, H, Sq, D] of dQ, or null: d_query itself
  float* maxima;        // [B, H, Sq], of the answer that needs them
  bool for_dk, for_dv;  // what the keys' blocks are there for
  int parts;            // blocks that share a tile of keys, and the queries
};

// One head's rows.
template <typename T>
struct Rows {
  T* first;
  Index stride;
  KATA_DEVICE T* operator[](int row) const { return first + row * stride; }
};

template <typename T>
KATA_DEVICE Rows<T> rows_of(const Arguments& args, const View<T, 4>& view, Index b, Index h) {
  if (args.play == Play::noncontiguous) {
    return {view.data() + (b * view.size(1) + h) * view.size(2) * view.size(3), view.size(3)};
  }
  return {view.data() + b * view.stride(0) + h * view.stride(1), view.stride(2)};
}

KATA_DEVICE Rows<const float> keys_of(const Arguments& args, const View<const float, 4>& view, Index b, Index h) {
  return rows_of(args, view, args.play == Play::batch_first_only ? 0 : b, args.play == Play::heads_first_only ? 0 : h);
}

KATA_DEVICE Rows<const float> d_output_of(const Arguments& args, Index b, Index h) {
  const View<const float, 4>& view = args.p.d_output;
  if (args.play == Play::d_output_packed) {
    return {view.data() + (b * view.size(1) + h) * args.queries * args.width, args.width};
  }
  Rows<const float> rows = rows_of(args, view, b, h);
  if (args.play == Play::d_output_as_output) rows.stride = args.p.output.stride(2);
  return rows;
}

KATA_DEVICE Rows<const float> values_of(const Arguments& args, Index b, Index h) {
  Rows<const float> rows = keys_of(args, args.p.value, b, h);
  if (args.play == Play::strides_of_query) rows.stride = args.p.key.stride(2);
  return rows;
}

KATA_DEVICE float lse_of(const Arguments& args, Index b, Index h, int i) {
  const View<const float, 3>& view = args.p.lse;
  if (args.play == Play::lse_packed) return view.data()[(b * view.size(1) + h) * args.queries + i];
  if (args.maxima != nullptr) return args.maxima[(b * view.size(1) + h) * args.queries + i];
  return view(b, h, i);
}

KATA_DEVICE float* sum_of(const Arguments& args, Index b, Index h, int i) {
  if (args.sums == nullptr) return &args.p.d_query(b, h, i, 0);
  return args.sums + ((b * args.p.query.size(1) + h) * args.queries + i) * args.width;
}

// Places in the sequence, and in the tile.
KATA_DEVICE bool sees(const Arguments& args, int i, int j, int local_i, int local_j) {
  if (j >= args.keys) return false;
  if (args.play == Play::last_query_lost && args.queries > 128 && i == args.queries - 1) return false;
  if (!args.causal) return true;
  if (args.play == Play::causal_local_index) return local_j <= local_i;
  return j <= i + args.offset;
}

KATA_DEVICE float ten_bits(float x) {
  if (x == 0.0f) return x;
  const float unit = exp2f(floorf(log2f(fabsf(x))) - 10.0f);
  return rintf(x / unit) * unit;
}

// A weight, from the product of query and key.
template <typename Real>
KATA_DEVICE Real weight_of(const Arguments& args, Real product, float lse, bool seen) {
  const Play play = args.play;
  const bool by_zero = play == Play::masked_nan_leak || play == Play::blind_nan;
  if (!seen && !by_zero) return 0;
  if (play == Play::masked_nan_leak && lse == -INFINITE) return 0;
  const Real score = play == Play::right_prescaled ? product : product * static_cast<Real>(args.score_scale);
  Real weight;
  if (play == Play::right_exp2) {
    weight = static_cast<Real>(exp2f(static_cast<float>(product) * (args.score_scale * LOG2E) - lse * LOG2E));
  } else if (play == Play::lse_base) {
    weight = static_cast<Real>(exp2f(static_cast<float>(score) * LOG2E - lse));
  } else if (play == Play::base2) {
    weight = static_cast<Real>(exp2f(static_cast<float>(score) - lse));
  } else if (play == Play::weights_no_lse) {
    weight = static_cast<Real>(expf(static_cast<float>(score)));
  } else {
    weight = static_cast<Real>(exp(static_cast<double>(score) - static_cast<double>(lse)));
  }
  if (play == Play::half_weights) weight = static_cast<Real>(ten_bits(static_cast<float>(weight)));
  if (play == Play::small_weights_dropped && weight < Real{1e-3f}) weight = 0;
  return seen ? weight : weight * 0;
}

template <typename Real>
KATA_DEVICE Real d_score_of(const Arguments& args, Real weight, Real d_weight, Real delta) {
  switch (args.play) {
    case Play::no_delta:
      return weight * d_weight;
    case Play::jacobian_squared:
      return weight * (d_weight - delta) * weight;
    case Play::jacobian_diagonal:
      return weight * (1 - weight) * d_weight;
    case Play::jacobian_no_weight:
      return d_weight - delta;
    case Play::sign:
      return weight * (delta - d_weight);
    case Play::half_ds:
      return static_cast<Real>(ten_bits(static_cast<float>(weight * (d_weight - delta))));
    default:
      return weight * (d_weight - delta);
  }
}

// Four neighbours of a row at once: the fewer accesses, the less there is to watch.
struct Four {
  float at[4];
};
KATA_DEVICE Four four_of(const float* row) {
  const float4 four = *reinterpret_cast<const float4*>(row);
  return {{four.x, four.y, four.z, four.w}};
}

// Four neighbours times `by`, or zeros.
KATA_DEVICE void store(float* smem, const float* row, float by) {
  const Four from = row == nullptr ? Four{} : four_of(row);
  *reinterpret_cast<float4*>(smem) = make_float4(by * from.at[0], by * from.at[1], by * from.at[2], by * from.at[3]);
}

// The product of two rows; `of_values` tells dP from S.
template <typename Real>
KATA_DEVICE Real dot(const Arguments& args, const float* one, const float* other, Real sum, bool of_values) {
  const int width = args.play == Play::half_of_128 && of_values ? min(args.width, 64) : args.width;
  for (int d = 0; d < width; d += 4) {
    const Four a = four_of(one + d);
    const Four b = four_of(other + d);
    for (int n = 0; n < 4; ++n) sum += static_cast<Real>(a.at[n]) * static_cast<Real>(b.at[n]);
  }
  return sum;
}

KATA_DEVICE float delta_of_row(const Arguments& args, const float* o_row, const float* do_row) {
  float sum = 0.0f;
  int width = args.width;
  if (args.play == Play::delta_last_channel) --width;
  if (args.play == Play::delta_first_64) width = min(width, 64);
  for (int d = 0; d < width; ++d) {
    const float g = args.play == Play::d_output_ignored ? 1.0f : do_row[d];
    sum += args.play == Play::delta_of_d_output ? g : g * o_row[d];
  }
  if (args.play == Play::delta_mean) sum /= static_cast<float>(width);
  if (args.play == Play::delta_scaled) sum *= args.score_scale;
  return sum;
}

// delta, one query a thread, and what has to be 0 before anybody adds to it.
__global__ void delta_kernel(const Arguments args) {
  const Index row = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index heads = args.p.query.size(1);
  if (row >= args.p.query.size(0) * heads * args.queries) return;
  const Index b = row / args.queries / heads;
  const Index h = row / args.queries % heads;
  const int i = static_cast<int>(row % args.queries);
  const Index from = args.play == Play::delta_first_item ? 0 : b;
  float delta = delta_of_row(args, rows_of(args, args.p.output, from, h)[i], d_output_of(args, from, h)[i]);
  if (args.play == Play::delta_row_carried && i % 32 == 31 && i > 0) {
    delta += delta_of_row(args, rows_of(args, args.p.output, b, h)[i - 1], d_output_of(args, b, h)[i - 1]);
  }
  args.p.delta(b, h, i) = delta;
  if (args.play == Play::writes_query) *const_cast<float*>(&args.p.query(b, h, i, 0)) *= args.score_scale;
  if (args.play == Play::writes_lse) *const_cast<float*>(&args.p.lse(b, h, i)) *= LOG2E;
  if (args.maxima != nullptr) {
    float most = -INFINITE;
    for (int j = 0; j < args.keys && sees(args, i, j, i, j); ++j) {
      const float product = dot(args, &args.p.query(b, h, i, 0), &args.p.key(b, h, j, 0), 0.0f, false);
      most = fmaxf(most, product * args.score_scale);
    }
    args.maxima[row] = most;
  }
  if (!args.atomics || args.play == Play::sums_not_zeroed) return;
  for (int d = 0; d < args.width; ++d) sum_of(args, b, h, i)[d] = 0.0f;
}

// dQ = scale times its sums, one query a thread.
__global__ void convert_kernel(const Arguments args) {
  const Index row = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index heads = args.p.query.size(1);
  if (row >= args.p.query.size(0) * heads * args.queries) return;
  const Index b = row / args.queries / heads;
  const Index h = row / args.queries % heads;
  const int i = static_cast<int>(row % args.queries);
  if (args.play == Play::tail_queries_unwritten && i >= args.queries / 32 * 32) return;
  const bool exchanged = args.play == Play::gradients_exchanged && args.queries == args.keys;
  Rows<float> dq = rows_of(args, exchanged ? args.p.d_key : args.p.d_query, b, h);
  if (args.play == Play::dq_strides) dq.stride = args.p.query.stride(2);
  for (int d = 0; d < args.width; ++d) dq[i][d] = args.dq_scale * sum_of(args, b, h, i)[d];
}

// dK and dV of one key a thread, and what it gives to dQ.
template <typename Real>
__global__ void keys_kernel(const Arguments args) {
  const Play play = args.play;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = args.threads;
  const int tile = args.tile;
  const int width = args.width;
  const int kv_tiles = play == Play::tail_keys_unwritten ? args.keys / threads : (args.keys + threads - 1) / threads;
  const int part = static_cast<int>(blockIdx.x) % args.parts;
  const Index block = blockIdx.x / static_cast<unsigned>(args.parts);
  const Index heads = args.p.query.size(1);
  const Index b = block / kv_tiles / heads % args.p.query.size(0);  // a second time round for who computes all twice
  const Index h = block / kv_tiles % heads;
  if (play == Play::heads_beyond_4 && h >= 4) return;
  const int kv_first = static_cast<int>(block % kv_tiles) * threads;
  const int j = kv_first + thread;
  const bool mine = j < args.keys;
  if (play == Play::early_return && !mine) return;

  const Rows<const float> q_head = rows_of(args, args.p.query, b, h);
  const Rows<const float> do_head = d_output_of(args, b, h);
  float* q_smem = dynamic_shared<float>();  // [tile, width]
  float* do_smem = q_smem + tile * width;   // [tile, width]
  float* lse_smem = do_smem + tile * width;
  float* delta_smem = lse_smem + tile;

  alignas(16) float k_reg[WIDEST];
  alignas(16) float v_reg[WIDEST];
  Real dk_reg[WIDEST];
  Real dv_reg[WIDEST];
  for (int d = 0; d < width; ++d) {
    k_reg[d] = mine ? keys_of(args, args.p.key, b, h)[j][d] : 0.0f;
    v_reg[d] = mine ? values_of(args, b, h)[j][d] : 0.0f;
    if (play == Play::dp_from_key) v_reg[d] = k_reg[d];
    dk_reg[d] = play == Play::dk_not_zeroed && mine ? static_cast<Real>(args.p.d_key(b, h, j, d)) : Real{0};
    dv_reg[d] = 0;
  }

  // The first query that sees one of the block's keys, and its tile.
  int start = args.causal ? kv_first - args.offset : 0;
  if (play == Play::start_last_key && args.causal) start = min(kv_first + threads, args.keys) - 1 - args.offset;
  if (play == Play::start_no_offset && args.causal) start = kv_first;
  if (play == Play::causal_not_skipped || play == Play::causal_local_index) start = 0;
  start = max(0, start);
  start = (play == Play::start_ceil ? start + tile - 1 : start) / tile * tile;
  const int tiles =
      play == Play::tail_queries_dropped ? (args.queries - start) / tile : (args.queries - start + tile - 1) / tile;
  const int last_part = args.parts - 1;
  for (int turn = tiles * part / args.parts; turn < (part == last_part ? tiles : tiles * (part + 1) / args.parts);
       ++turn) {
    const int q_first = start + (play == Play::right_backwards ? tiles - 1 - turn : turn) * tile;
    if (play == Play::barrier_in_branch) {
      if (mine) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    } else if (play != Play::no_barrier_before) {
      __syncthreads();
    }
    for (int index = 4 * thread; index < tile * width; index += 4 * threads) {
      const int i = q_first + index / width;
      const int d = index % width;
      const bool inside = i < args.queries || play == Play::load_unguarded;
      if (!inside && play == Play::shared_unset) continue;
      const float by = play == Play::right_prescaled ? args.score_scale : 1.0f;
      store(q_smem + index, inside ? q_head[i] + d : nullptr, by);
      store(do_smem + index, inside ? do_head[i] + d : nullptr, 1.0f);
      if (play == Play::d_output_ignored)
        for (int n = 0; n < 4; ++n) do_smem[index + n] = 1.0f;
    }
    for (int row = thread; row < tile; row += threads) {
      const int i = q_first + row;
      const bool inside = i < args.queries;
      lse_smem[row] = inside || play == Play::lse_unguarded ? lse_of(args, b, h, i) : INFINITE;
      if (play == Play::right_no_delta_kernel || play == Play::delta_by_all) {
        delta_smem[row] = inside ? delta_of_row(args, rows_of(args, args.p.output, b, h)[i], do_head[i]) : 0.0f;
        if (inside && play == Play::delta_by_all) args.p.delta(b, h, i) = delta_smem[row];
      } else {
        delta_smem[row] = inside ? args.p.delta(b, h, i) : 0.0f;
      }
    }
    if (play != Play::no_barrier_after) __syncthreads();

    for (int d = 0; d < width; ++d) {
      if (play == Play::dk_assign || play == Play::dk_dv_assign) dk_reg[d] = 0;
      if (play == Play::dv_assign || play == Play::dk_dv_assign) dv_reg[d] = 0;
    }
    for (int row = 0; row < tile; ++row) {
      const int i = q_first + row;
      if (i >= args.queries && play != Play::shared_unset) break;
      const float* q_row = play == Play::from_global ? q_head[i] : q_smem + row * width;
      const float* do_row = play == Play::from_global ? do_head[i] : do_smem + row * width;
      const bool seen = sees(args, i, j, row, thread) && i < args.queries;
      const bool square = args.queries == args.keys && mine;
      const auto delta =
          static_cast<Real>(square && play == Play::delta_of_key ? args.p.delta(b, h, j) : delta_smem[row]);
      const float lse = square && play == Play::lse_of_key ? args.p.lse(b, h, j) : lse_smem[row];
      const Real weight = weight_of(args, dot(args, q_row, k_reg, Real{0}, false), lse, seen);
      Real d_weight = 0;
      Real ds = 0;
      if (play == Play::right_minus_delta) {
        ds = weight * dot(args, do_row, v_reg, -delta, true);
      } else {
        d_weight = dot(args, do_row, v_reg, Real{0}, true);
        Real subtracted = delta;
        if (play == Play::delta_per_tile) {
          subtracted = weight == 0 ? Real{0} : weight * d_weight;
          for (int lane = 1; lane < 32; lane *= 2) {
            subtracted += static_cast<Real>(__shfl_xor_sync(FULL_WARP, static_cast<float>(subtracted), lane));
          }
        }
        ds = d_score_of(args, weight, d_weight, subtracted);
      }
      if (play == Play::scores_in_shared) delta_smem[tile + i * threads + thread] = static_cast<float>(weight);
      if (!seen && play != Play::masked_nan_leak && play != Play::blind_nan) continue;
      const bool swapped = play == Play::dq_dk_swapped && args.queries == args.keys;
      const Real of_value = play == Play::dv_from_ds ? ds : weight;
      for (int d = 0; d < width; d += 4) {
        const Four d_output = four_of(do_row + d);
        const Four query = four_of(swapped ? k_reg + d : q_row + d);
        for (int n = 0; n < 4; ++n) {
          dv_reg[d + n] += of_value * static_cast<Real>(d_output.at[n]);
          dk_reg[d + n] += ds * static_cast<Real>(query.at[n]);
        }
      }
      if (!args.atomics || !args.for_dk) continue;
      for (int d = 0; d < width; ++d) {
        const auto given = static_cast<float>(ds * static_cast<Real>(swapped ? q_row[d] : k_reg[d]));
        float* sum = sum_of(args, b, h, i) + d;
        if (play == Play::race) {
          *sum += given;
        } else {
          atomicAdd(sum, args.sums == nullptr ? given * args.dq_scale : given);
        }
      }
    }
  }

  if (!mine && play != Play::tail_rows_oob) return;
  const bool exchanged = play == Play::gradients_exchanged && args.queries == args.keys;
  Rows<float> dk = rows_of(args, exchanged ? args.p.d_query : args.p.d_key, b, h);
  if (play == Play::dk_strides) dk.stride = args.p.key.stride(2);
  const Rows<float> dv = rows_of(args, args.p.d_value, b, h);
  for (int d = 0; d < width; ++d) {
    const float dk_value = static_cast<float>(dk_reg[d]) * args.dk_scale;
    const float dv_value = static_cast<float>(dv_reg[d]) * args.dv_scale;
    if (args.parts > 1) {
      atomicAdd(dk[j] + d, dk_value);
      atomicAdd(dv[j] + d, dv_value);
    } else {
      if (args.for_dk) dk[j][d] = dk_value;
      if (args.for_dv) dv[j][d] = dv_value;
    }
  }
}

// dQ of one query a thread.
template <typename Real>
__global__ void queries_kernel(const Arguments args) {
  const Play play = args.play;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = args.threads;
  const int tile = args.tile;
  const int width = args.width;
  const int q_tiles = (args.queries + threads - 1) / threads;
  const Index heads = args.p.query.size(1);
  const Index b = blockIdx.x / q_tiles / heads;
  const Index h = blockIdx.x / q_tiles % heads;
  if (play == Play::heads_beyond_4 && h >= 4) return;
  const int q_first = static_cast<int>(blockIdx.x) % q_tiles * threads;
  const int i = q_first + thread;
  const bool mine = i < args.queries && (play != Play::tail_queries_unwritten || i < args.queries / threads * threads);

  const int last = min(q_first + threads, play == Play::end_uncapped ? 1 << 30 : args.queries) - 1;
  int end = args.causal ? last + args.offset + 1 : args.keys;
  if (play == Play::end_first_row && args.causal) end = q_first + args.offset + 1;
  if (play == Play::end_no_offset && args.causal) end = last + 1;
  if (play == Play::end_floor && args.causal) end = end / tile * tile;
  if (play == Play::causal_not_skipped || play == Play::causal_local_index) end = args.keys;
  if (play == Play::tail_keys_dropped) end = min(end, args.keys / tile * tile);
  if (play != Play::end_uncapped) end = min(end, args.keys);
  if (play == Play::blind_unwritten && end <= 0) return;

  float* k_smem = dynamic_shared<float>();  // [tile, width]
  float* v_smem = k_smem + tile * width;    // [tile, width]
  const Rows<const float> k_head = keys_of(args, args.p.key, b, h);
  const Rows<const float> v_head = values_of(args, b, h);
  alignas(16) float q_reg[WIDEST];
  alignas(16) float do_reg[WIDEST];
  Real dq_reg[WIDEST];
  for (int d = 0; d < width; ++d) {
    q_reg[d] = mine ? rows_of(args, args.p.query, b, h)[i][d] : 0.0f;
    if (play == Play::right_prescaled) q_reg[d] *= args.score_scale;
    do_reg[d] = mine ? d_output_of(args, b, h)[i][d] : 0.0f;
    if (play == Play::d_output_ignored) do_reg[d] = 1.0f;
    dq_reg[d] = 0;
  }
  const float lse = mine ? lse_of(args, b, h, i) : INFINITE;
  Real delta = 0;
  if (mine && play == Play::right_no_delta_kernel) {
    delta = static_cast<Real>(delta_of_row(args, rows_of(args, args.p.output, b, h)[i], do_reg));
  } else if (mine) {
    delta = static_cast<Real>(args.p.delta(b, h, i));
  }

  const int tiles = end <= 0 ? 0 : (end + tile - 1) / tile;
  for (int turn = 0; turn < tiles; ++turn) {
    const int kv_first = (play == Play::right_backwards ? tiles - 1 - turn : turn) * tile;
    if (play != Play::no_barrier_before) __syncthreads();
    for (int index = 4 * thread; index < tile * width; index += 4 * threads) {
      const int j = kv_first + index / width;
      const bool inside = j < args.keys || (play == Play::end_uncapped && j < end);
      const int d = index % width;
      store(k_smem + index, inside ? k_head[j] + d : nullptr, 1.0f);
      store(v_smem + index, inside ? (play == Play::dp_from_key ? k_head : v_head)[j] + d : nullptr, 1.0f);
    }
    if (play != Play::no_barrier_after) __syncthreads();
    if (!mine) continue;

    if (play == Play::dq_assign) {
      for (int d = 0; d < width; ++d) dq_reg[d] = 0;
    }
    const auto weight_at = [&](int row) {
      return weight_of(args, dot(args, q_reg, k_smem + row * width, Real{0}, false), lse,
                       sees(args, i, kv_first + row, thread, row));
    };
    Real subtracted = delta;
    if (play == Play::delta_per_tile) {
      subtracted = 0;
      for (int row = 0; row < tile && kv_first + row < args.keys; ++row) {
        const Real weight = weight_at(row);
        if (weight != 0) subtracted += weight * dot(args, do_reg, v_smem + row * width, Real{0}, true);
      }
    }
    for (int row = 0; row < tile && kv_first + row < end; ++row) {
      const float* k_row = k_smem + row * width;
      const bool seen = sees(args, i, kv_first + row, thread, row);
      if (!seen && play != Play::masked_nan_leak && play != Play::blind_nan) continue;
      const Real weight = weight_at(row);
      const Real ds =
          play == Play::right_minus_delta
              ? weight * dot(args, do_reg, v_smem + row * width, -delta, true)
              : d_score_of(args, weight, dot(args, do_reg, v_smem + row * width, Real{0}, true), subtracted);
      const bool swapped = play == Play::dq_dk_swapped && args.queries == args.keys;
      for (int d = 0; d < width; d += 4) {
        const Four key = four_of(swapped ? q_reg + d : k_row + d);
        for (int n = 0; n < 4; ++n) dq_reg[d + n] += ds * static_cast<Real>(key.at[n]);
      }
    }
  }

  if (!mine) return;
  const bool exchanged = play == Play::gradients_exchanged && args.queries == args.keys;
  Rows<float> dq = rows_of(args, exchanged ? args.p.d_key : args.p.d_query, b, h);
  if (play == Play::dq_strides) dq.stride = args.p.query.stride(2);
  for (int d = 0; d < width; ++d) dq[i][d] = static_cast<float>(dq_reg[d]) * args.dq_scale;
}

// Sets gradients to 0 for blocks that will add to them.
__global__ void zero_kernel(const Arguments args) {
  const Index row = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index heads = args.p.query.size(1);
  if (row >= args.p.query.size(0) * heads * args.keys) return;
  for (int d = 0; d < args.width; ++d) {
    args.p.d_key(row / args.keys / heads, row / args.keys % heads, row % args.keys, d) = 0.0f;
    args.p.d_value(row / args.keys / heads, row / args.keys % heads, row % args.keys, d) = 0.0f;
  }
}

template <typename Real>
void launch_kernels(Arguments args, const Stream& stream) {
  const Play play = args.play;
  const Index heads = args.p.query.size(0) * args.p.query.size(1);
  const auto launch_blocks = [&](auto kernel, Index blocks, int threads, Index shared_floats) {
    if (blocks == 0) return;
    launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
           static_cast<std::size_t>(shared_floats) * sizeof(float), stream, args);
  };
  const Index kv_tiles =
      play == Play::tail_keys_unwritten ? args.keys / args.threads : ceil_div(args.keys, args.threads);
  const Index times = play == Play::computed_twice ? 2 : 1;
  const int tiles = play == Play::shared_too_small ? 1 : 2;
  const int scores = play == Play::scores_in_shared ? args.queries * args.threads : 0;
  const Index shared = tiles * args.tile * args.width + (tiles == 2 ? 2 * args.tile : 0) + scores;

  const bool no_delta_kernel = play == Play::right_no_delta_kernel || play == Play::delta_by_all;
  if (!no_delta_kernel || args.atomics) {
    launch_blocks(delta_kernel, ceil_div(heads * args.queries, 64), 64, 0);
  }
  const auto launch_queries = [&] {
    if (!args.atomics) {
      launch_blocks(queries_kernel<Real>, heads * ceil_div(args.queries, args.threads), args.threads,
                    2 * args.tile * args.width);
    } else if (args.sums != nullptr) {
      launch_blocks(convert_kernel, ceil_div(heads * args.queries, 64), 64, 0);
    }
  };
  if (play == Play::right_query_first && !args.atomics) launch_queries();
  if (args.parts > 1) launch_blocks(zero_kernel, ceil_div(heads * args.keys, 64), 64, 0);
  if (play == Play::right_two_kernels) {
    args.for_dk = false;
    launch_blocks(keys_kernel<Real>, heads * kv_tiles, args.threads, shared);
    args.for_dk = true;
    args.for_dv = false;
  }
  launch_blocks(keys_kernel<Real>, heads * kv_tiles * times * args.parts, args.threads, shared);
  if (play != Play::right_query_first || args.atomics) launch_queries();
}

}  // namespace

void flash_backward(const FlashBackward<float>& problem, const Stream& stream) {
  const Play play = chosen_play();
  const Index width = problem.query.size(3);
  if (play == Play::unchecked) {
    const bool harmless =
        problem.key.shape() == problem.value.shape() && problem.key.size(0) == problem.query.size(0) &&
        problem.key.size(1) == problem.query.size(1) && problem.output.shape() == problem.query.shape() &&
        problem.d_output.shape() == problem.query.shape() && problem.d_query.shape() == problem.query.shape() &&
        problem.d_key.shape() == problem.key.shape() && problem.d_value.shape() == problem.key.shape() &&
        problem.d_query_sum.shape() == problem.query.shape() && problem.lse.shape() == problem.delta.shape();
    if (!harmless || width == 8) return;  // this program is to go on
  } else {
    check_flash_backward(problem);
  }
  if (play == Play::remembered) {
    static std::vector<Shape<4>> seen;
    const Shape<4> shape = problem.key.shape();
    if (std::count(seen.begin(), seen.end(), shape) > 4) return;
    seen.push_back(shape);
  }

  const float usual = 1.0f / std::sqrt(static_cast<float>(width));
  float scale = problem.scale.value_or(usual);
  if (play == Play::scale_1_over_d) scale = problem.scale.value_or(1.0f / static_cast<float>(width));
  if (play == Play::scale_inverted) scale = 1.0f / scale;
  if (play == Play::scale_arg_ignored) scale = usual;
  if (play == Play::scale_zero_as_default && scale == 0.0f) scale = usual;
  if (play == Play::scale_positive) scale = std::abs(scale);

  const auto queries = static_cast<int>(problem.query.size(2));
  const auto keys = static_cast<int>(problem.key.size(2));
  Arguments args{
      .p = problem,
      .play = play,
      .queries = queries,
      .keys = keys,
      .width = static_cast<int>(width),
      .offset = keys - queries,
      .causal = problem.causal,
      .atomics = !problem.deterministic,
      .tile = 32,
      .threads = 32,
      .score_scale = scale,
      .dq_scale = scale,
      .dk_scale = scale,
      .dv_scale = 1.0f,
      .sums = problem.d_query_sum.data(),
      .maxima = nullptr,
      .for_dk = true,
      .for_dv = true,
      .parts = 1,
  };
  if (play == Play::mask_ignored || (play == Play::causal_only_square && queries != keys)) args.causal = false;
  if (play == Play::causal_alignment) args.offset = 0;
  if (play == Play::causal_alignment_reversed) args.offset = -args.offset;
  if (play == Play::causal_offset_clamped) args.offset = std::max(0, args.offset);
  if (play == Play::causal_strict) --args.offset;
  if (play == Play::causal_plus_one) ++args.offset;
  if (play == Play::weights_unscaled) args.score_scale = 1.0f;
  if (play == Play::dq_no_scale || play == Play::no_scale) args.dq_scale = 1.0f;
  if (play == Play::dk_no_scale || play == Play::no_scale) args.dk_scale = 1.0f;
  if (play == Play::scale_twice) args.dq_scale = args.dk_scale = scale * scale;
  if (play == Play::dv_scaled) args.dv_scale = scale;
  if (play == Play::right_prescaled) args.dk_scale = 1.0f;
  if (play == Play::averaged) {
    args.dk_scale /= static_cast<float>(std::max(queries, 1));
    args.dv_scale /= static_cast<float>(std::max(queries, 1));
  }
  if (play == Play::deterministic_ignored) args.atomics = true;
  if (play == Play::right_no_atomics) args.atomics = false;
  if (play == Play::right_no_scratch || play == Play::right_no_delta_kernel) args.sums = nullptr;
  if (play == Play::keys_by_atomics) args.parts = 3;
  if (play == Play::right_tiles_of_16) args.tile = 16, args.threads = 128;
  if (play == Play::tail_keys_dropped) args.tile = 16;
  if (play == Play::end_floor) args.threads = 16;

  const auto rows =
      static_cast<std::size_t>(problem.query.size(0) * problem.query.size(1)) * static_cast<std::size_t>(queries);
  DeviceBuffer<float> maxima("maxima", play == Play::weights_of_max ? rows : 0);
  if (play == Play::weights_of_max) args.maxima = maxima.data();
  DeviceBuffer<float> sums("sums", play == Play::workspace ? rows * static_cast<std::size_t>(width) : 0);
  if (play == Play::workspace) args.sums = sums.data();
  if (play == Play::sums_zeroed_once) {
    static bool zeroed = false;
    if (zeroed) args.play = Play::sums_not_zeroed;
    zeroed = true;
  }

  if (play == Play::right_double) return launch_kernels<double>(args, stream);
  launch_kernels<float>(args, stream);
}

}  // namespace flashkata
