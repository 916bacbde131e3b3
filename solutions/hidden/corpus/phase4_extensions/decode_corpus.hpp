// Answers to the steps of decoding, wrong and right: what 06_split_kv.cu and 07_paged_kv.cu share. Every deviation
// stands where somebody made it. One thread a row; any width.
//
// Whoever includes it has defined STEP_ANSWERS(X) and STEP_ANSWERS_ON_CPU(X), its own answers, and what two of these
// are in its kind of cache: CAUSAL_BY_CAPACITY and KEYS_BEHIND_LOADED.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../corpus.hpp"

namespace flashkata {
namespace {

using corpus::RIGHT;
using corpus::UNNAMED;

// X(what the code calls it, the answer's name, its mistake)
// clang-format off
#define DECODE_ANSWERS(X) \
  X(empty_split, "splitkv-empty-split", "splitkv-empty-split") \
  X(empty_zero, "empty parts with an lse of 0", "splitkv-empty-zero") \
  X(lse_null, "splitkv-lse-null", UNNAMED) \
  X(first_part, "only the first part", "splitkv-first-part") \
  X(last_part_lost, "the last part forgotten", "splitkv-last-part-lost") \
  X(share_floor, "the share rounded down", "splitkv-share-floor") \
  X(share_of_capacity, "parts of the capacity", UNNAMED) \
  X(one_part, "one part has all the work", UNNAMED) \
  X(merge_average, "merge-average", "merge-average") \
  X(merge_sum, "merge-sum", "merge-sum") \
  X(merge_no_max, "merge-no-max", "merge-no-max") \
  X(merge_winner, "the heaviest part takes all", "merge-winner-takes-all") \
  X(merge_no_division, "merged without a division", "merge-no-division") \
  X(merge_lse_max, "the largest lse for all", "merge-lse-max") \
  X(merge_base2, "parts weighed by powers of 2", "merge-base2") \
  X(merge_by_lse, "parts weighed by their lse", "merge-weighted-by-lse") \
  X(merge_empty_nan, "merge-empty-nan", "merge-empty-nan") \
  X(merge_empty_leak, "merge-empty-leak", "merge-empty-leak") \
  X(merge_batch_stride, "varlen-combine-batch-stride", "varlen-combine-batch-stride") \
  X(merge_head_stride, "parts of the first head merged for all", "splitkv-merge-first-head") \
  X(merge_32, "no more than 32 parts merged", UNNAMED) \
  X(parts_swapped, "parts stored by sequence first", UNNAMED) \
  X(averages_inside, "averages of the parts stored side by side", UNNAMED) \
  X(partial_base2, "partial_lse in base 2", UNNAMED) \
  X(atomic_merge, "atomic-float-merge", UNNAMED) \
  X(tile_crosses_group, "gqa-tile-crosses-group", "gqa-tile-crosses-group") \
  X(interleave, "gqa-repeat-vs-interleave", "gqa-head-mapping") \
  X(heads_first_only, "heads-first-only in the keys and values", "heads-first-only") \
  X(batch_first_only, "batch-first-only in the keys and values", "batch-first-only") \
  X(rows_16, "rows of a group beyond the 16th forgotten", UNNAMED) \
  X(top_left, "decode-causal-top-left", "decode-causal-top-left") \
  X(no_chunk, "decode-chunk-no-causal", "decode-chunk-no-causal") \
  X(causal_ignored, "causal-ignored", "causal-ignored") \
  X(causal_always, "causal whatever was asked", UNNAMED) \
  X(causal_strict, "causal-strict", "causal-strict") \
  X(causal_reversed, "causal-alignment-reversed", "causal-alignment-reversed") \
  X(causal_capacity, "causal by the capacity", CAUSAL_BY_CAPACITY) \
  X(causal_in_part, "causal within the part", "causal-local-index") \
  X(length_ignored, "lengths ignored", "decode-length-ignored") \
  X(length_first, "the first length for all", "decode-length-first") \
  X(lengths_packed, "lengths without their stride", UNNAMED) \
  X(length_short, "the newest key left out", "decode-newest-missing") \
  X(length_long, "a key more than there are", UNNAMED) \
  X(no_rescale_o, "no-rescale-o", "no-rescale-o") \
  X(no_rescale_l, "no-rescale-l", "no-rescale-l") \
  X(inverse_rescale, "inverse-rescale", "inverse-rescale") \
  X(no_max, "softmax-no-max", "softmax-no-max") \
  X(tail_unmasked, "tail-keys-unmasked", "tail-keys-unmasked") \
  X(tail_dropped, "tail-keys-dropped", "tail-keys-dropped") \
  X(no_final_div, "no-final-div", "no-final-div") \
  X(empty_nan, "all-masked-nan", "all-masked-nan") \
  X(masked_nan_leak, "masked-nan-leak", UNNAMED) \
  X(nan_as_zero, "values of NaN taken for 0", UNNAMED) \
  X(lse_base2, "lse-base2", "lse-base2") \
  X(lse_only_max, "lse-only-max", "lse-only-max") \
  X(lse_unwritten, "lse unwritten", UNNAMED) \
  X(scale_missing, "scale-missing", "scale-missing") \
  X(scale_1_over_d, "scale-1-over-d", "scale-1-over-d") \
  X(scale_twice, "scale-twice", "scale-twice") \
  X(scale_arg_ignored, "scale-arg-ignored", "scale-arg-ignored") \
  X(scale_zero_as_default, "scale-zero-as-default", "scale-zero-as-default") \
  X(value_is_key, "value-is-key", "value-is-key") \
  X(value_stride, "values with the strides of the keys", UNNAMED) \
  X(rows_packed, "queries and outputs without their strides", UNNAMED) \
  X(half_sums, "sums kept in 16 bits", UNNAMED) \
  X(writes_query, "scales the queries in place", "is an input") \
  X(unchecked, "arguments unchecked", UNNAMED) \
  X(unchecked_lengths, "lengths unchecked by the host", UNNAMED) \
  X(no_barrier_before, "no barrier before the load", "shared-memory race") \
  X(no_barrier_after, "no barrier after the load", "shared-memory race") \
  X(workspace, "scratch of its own on the GPU", "beyond the arguments") \
  X(loaded_by_rows, "every row loads the keys for itself", "loaded too often") \
  X(loaded_to_capacity, "keys behind the length loaded, too", KEYS_BEHIND_LOADED) \
  X(scores_in_shared, "a row of scores in shared memory", "shared memory grows") \
  X(remembered, "lengths remembered from the call before", UNNAMED) \
  X(right_tiles, "right: parts begin at multiples of 16", RIGHT) \
  X(right_even, "right: parts differ by one key at most", RIGHT) \
  X(right_strided, "right: keys dealt out to the parts in turns", RIGHT) \
  X(right_backwards, "right: keys backwards", RIGHT) \
  X(right_double, "right: double accumulation", RIGHT) \
  X(right_at_once, "right: one part alone writes the output at once", RIGHT) \
  X(right_pairwise, "right: parts merged one after the other, as in step 2.02", RIGHT)

// The same on the CPU, where the kernels are right.
#define DECODE_ANSWERS_ON_CPU(X) \
  X("splitkv-empty-split", "splitkv-empty-split") \
  X("only the first part", "splitkv-first-part") \
  X("the share rounded down", "splitkv-share-floor") \
  X("merge-average", "merge-average") \
  X("merge-no-max", "merge-no-max") \
  X("varlen-combine-batch-stride", "varlen-combine-batch-stride") \
  X("gqa-repeat-vs-interleave", "gqa-head-mapping") \
  X("decode-causal-top-left", "decode-causal-top-left") \
  X("decode-chunk-no-causal", "decode-chunk-no-causal") \
  X("the newest key left out", "decode-newest-missing") \
  X("scale-arg-ignored", "scale-arg-ignored") \
  X("lse-base2", "lse-base2") \
  X("one part has all the work", UNNAMED) \
  X("masked-nan-leak", UNNAMED) \
  X("values with the strides of the keys", UNNAMED) \
  X("right: keys dealt out to the parts in turns", RIGHT)
// clang-format on

#define ON_THE_CPU " on the CPU"

enum class Play {
  none,
#define X(id, name, mistake) id,
  DECODE_ANSWERS(X) STEP_ANSWERS(X)
#undef X
};

const corpus::Answers answers{
#define X(id, name, mistake) {name, mistake},
    DECODE_ANSWERS(X) STEP_ANSWERS(X)
#undef X
#define X(name, mistake) {name ON_THE_CPU, mistake},
        DECODE_ANSWERS_ON_CPU(X) STEP_ANSWERS_ON_CPU(X)
#undef X
};

Play play_of(std::string_view name) {
#define X(id, answer, mistake) \
  if (name == answer) return Play::id;
  DECODE_ANSWERS(X)
  STEP_ANSWERS(X)
#undef X
  return Play::none;
}

Play chosen_play(bool on_cpu) {
  std::string_view name = corpus::name();
  if (name.ends_with(ON_THE_CPU) != on_cpu) return Play::none;
  if (on_cpu) name.remove_suffix(std::string_view(ON_THE_CPU).size());
  return play_of(name);
}

constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504f;
constexpr int KEYS = 16;  // in a tile

// Cache has key(b, head, j, d) and value(b, head, j, d), both of type T.
template <typename T, typename Cache>
struct Arguments {
  View<const T, 4> query;
  Cache cache;
  View<const std::int32_t, 1> lengths;
  View<T, 4> output;
  View<float, 3> lse;
  View<float, 5> partial_output;
  View<float, 4> partial_lse;
  int heads, kv_heads, queries, width, splits, capacity;
  bool causal, with_lse;
  float scale;
  Play play;

  KATA_BOTH int group() const { return heads / kv_heads; }

  KATA_BOTH int length(int b) const {
    const int own = play == Play::lengths_packed ? lengths.data()[b] : lengths(play == Play::length_first ? 0 : b);
    if (play == Play::length_ignored) return capacity;
    if (play == Play::length_short) return own > 0 ? own - 1 : 0;
    if (play == Play::length_long) return own < capacity ? own + 1 : own;
    return own;
  }

  struct Range {
    int begin, end, step;
  };
  KATA_BOTH Range range(int length, int split) const {
    int share = (length + splits - 1) / splits;
    if (play == Play::share_floor) share = length / splits;
    if (play == Play::share_of_capacity) share = (capacity + splits - 1) / splits;
    if (play == Play::right_tiles) share = (share + 15) / 16 * 16;
    if (play == Play::one_part) share = length;
    if (play == Play::right_strided) return {split, length, splits};
    if (play == Play::right_even) {
      return {static_cast<int>(static_cast<Index>(length) * split / splits),
              static_cast<int>(static_cast<Index>(length) * (split + 1) / splits), 1};
    }
    const int begin = split * share < length ? split * share : length;
    const int end = begin + share < length ? begin + share : length;
    return {begin, end, 1};
  }

  KATA_BOTH int seen(int length, int i) const {
    bool masks = causal;
    if (play == Play::causal_ignored) masks = false;
    if (play == Play::causal_always) masks = true;
    if (play == Play::no_chunk && queries != length) masks = false;
    if (!masks) return length;
    int last = i + length - queries;
    if (play == Play::top_left) last = i;
    if (play == Play::causal_strict) --last;
    if (play == Play::causal_reversed) last = i - (length - queries);
    if (play == Play::causal_capacity) last = i + capacity - queries;
    return last + 1 < 0 ? 0 : last + 1 < length ? last + 1 : length;
  }

  KATA_BOTH int kv_head(int head) const {
    if (play == Play::heads_first_only) return 0;
    if (play == Play::interleave) return head % kv_heads;
    if (play == Play::tile_crosses_group) return head / 16 * 16 / group();
    return head / group();
  }

  KATA_BOTH float part_lse(int split, int b, int h, int i) const {
    if (play == Play::merge_batch_stride) b = 0;
    if (play == Play::merge_head_stride) h = 0;
    if (play == Play::parts_swapped) {
      return partial_lse.data()[((b * splits + split) * heads + h) * queries + i];
    }
    const float lse = partial_lse(split, b, h, i);
    return play == Play::partial_base2 ? lse / LOG2E : lse;
  }
  KATA_BOTH float part_output(int split, int b, int h, int i, int d) const {
    if (play == Play::merge_batch_stride) b = 0;
    if (play == Play::merge_head_stride) h = 0;
    if (play == Play::parts_swapped) {
      return partial_output.data()[(((b * splits + split) * heads + h) * queries + i) * width + d];
    }
    if (play == Play::averages_inside) {
      return partial_output.data()[(((b * heads + h) * queries + i) * splits + split) * width + d];
    }
    return partial_output(split, b, h, i, d);
  }
  KATA_BOTH void store_part(int split, int b, int h, int i, float value) const {
    if (play == Play::partial_base2) value *= LOG2E;
    if (play == Play::parts_swapped) {
      partial_lse.data()[((b * splits + split) * heads + h) * queries + i] = value;
    } else {
      partial_lse(split, b, h, i) = value;
    }
  }
  KATA_BOTH void store_part(int split, int b, int h, int i, int d, float value) const {
    if (play == Play::parts_swapped) {
      partial_output.data()[(((b * splits + split) * heads + h) * queries + i) * width + d] = value;
    } else if (play == Play::averages_inside) {
      partial_output.data()[(((b * heads + h) * queries + i) * splits + split) * width + d] = value;
    } else {
      partial_output(split, b, h, i, d) = value;
    }
  }
  KATA_BOTH void store_output(int b, int h, int i, int d, float value) const {
    const Index packed = ((static_cast<Index>(b) * heads + h) * queries + i) * width + d;
    (play == Play::rows_packed ? output.data()[packed] : output(b, h, i, d)) = from_float<T>(value);
  }
  KATA_BOTH void store_lse(int b, int h, int i, float value) const {
    if (!with_lse || play == Play::lse_unwritten) return;
    lse(b, h, i) = play == Play::lse_base2 ? value * LOG2E : value;
  }

  // One channel of a row from its parts; the first channel also brings the lse.
  KATA_BOTH void merge(int b, int h, int i, int d) const {
    int count = splits;
    if (play == Play::first_part) count = 1;
    if (play == Play::last_part_lost && count > 1) --count;
    if (play == Play::merge_32 && count > 32) count = 32;
    float largest = MINUS_INFINITY;
    for (int split = 0; split < count; ++split) {
      const float lse_of = part_lse(split, b, h, i);
      largest = lse_of > largest ? lse_of : largest;
    }
    if (play == Play::merge_no_max) largest = 0.0f;
    float sum = 0.0f, value = 0.0f, total = 0.0f;
    int used = 0;
    if (play == Play::right_pairwise) {
      float lse_so_far = MINUS_INFINITY;
      for (int split = 0; split < count; ++split) {
        const float own = part_lse(split, b, h, i);
        if (own == MINUS_INFINITY) continue;
        const float larger = own > lse_so_far ? own : lse_so_far;
        const float before = expf(lse_so_far - larger), after = expf(own - larger);
        value = before / (before + after) * value + after / (before + after) * part_output(split, b, h, i, d);
        lse_so_far = larger + logf(before + after);
      }
      store_output(b, h, i, d, value);
      if (d == 0) store_lse(b, h, i, lse_so_far);
      return;
    }
    for (int split = 0; split < count; ++split) {
      const float own = part_lse(split, b, h, i);
      const bool empty = own == MINUS_INFINITY;
      if (empty && play != Play::merge_empty_nan && play != Play::merge_empty_leak) continue;
      float weight = play == Play::merge_base2 ? exp2f(own - largest) : expf(own - largest);
      if (empty && play == Play::merge_empty_leak) weight = 0.0f;
      if (play == Play::merge_average || play == Play::merge_sum) weight = 1.0f;
      if (play == Play::merge_winner) weight = own == largest ? 1.0f : 0.0f;
      if (play == Play::merge_by_lse) weight = own;
      sum += weight;
      total += empty ? 0.0f : expf(own - largest);
      ++used;
      if (empty && play == Play::merge_empty_nan && sum == sum) continue;
      value += weight * part_output(split, b, h, i, d);
    }
    if (play == Play::merge_sum || play == Play::merge_no_division) sum = 1.0f;
    if (used > 0 || play == Play::merge_empty_nan) value /= sum;
    store_output(b, h, i, d, value);
    if (d != 0) return;
    float result = used == 0 ? MINUS_INFINITY : largest + logf(total);
    if (play == Play::merge_lse_max) result = largest;
    if (play == Play::merge_empty_nan) result = largest + logf(sum);
    store_lse(b, h, i, result);
  }
};

// A row's running sums over the keys that it is shown one after the other.
template <typename Real>
struct Row {
  Real max = MINUS_INFINITY, sum = 0;
};

// Grid: splits x key/value heads x sequences; block: a thread for each row of the group. Shared: a tile of keys and
// values, and the sums of every row.
template <typename T, typename Cache, typename Real>
__global__ void __launch_bounds__(1024) parts_kernel(const Arguments<T, Cache> args) {
  const Play play = args.play;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int split = static_cast<int>(blockIdx.x) % args.splits;
  const int kv_head = static_cast<int>(blockIdx.x) / args.splits % args.kv_heads;
  const int b = static_cast<int>(blockIdx.x) / args.splits / args.kv_heads;
  const int rows = args.group() * args.queries;
  const bool live = thread < rows && !(play == Play::rows_16 && thread >= 16);
  const int row = thread < rows ? thread : 0;
  const int i = row % args.queries;
  int head = kv_head * args.group() + row / args.queries;
  const bool own_keys = play == Play::loaded_by_rows || play == Play::tile_crosses_group || play == Play::interleave ||
                        play == Play::heads_first_only;
  const int own_head = args.kv_head(head);
  const int kb = play == Play::batch_first_only ? 0 : b;
  const int length = args.length(b);
  const auto range = args.range(length, split);
  int seen = args.seen(length, i);
  if (play == Play::causal_in_part && args.causal)
    seen = range.begin + max(0, i + (range.end - range.begin) - args.queries + 1);
  const int width = args.width;

  float* k_smem = dynamic_shared<float>();
  float* v_smem = k_smem + KEYS * width;
  Real* o_smem = reinterpret_cast<Real*>(v_smem + KEYS * width) + static_cast<Index>(thread) * width;
  if (live) {
    for (int d = 0; d < width; ++d) o_smem[d] = 0;
  }
  if (play == Play::writes_query && live) {
    T& first = const_cast<T&>(args.query(b, head, i, 0));
    first = from_float<T>(to_float(first) * args.scale);
  }
  const auto query = [&](int d) {
    const Index packed = ((static_cast<Index>(b) * args.heads + head) * args.queries + i) * width + d;
    return to_float(play == Play::rows_packed ? args.query.data()[packed] : args.query(b, head, i, d));
  };
  const auto raise = [&](Real x) -> Real {
    if (sizeof(Real) == 8) return static_cast<Real>(exp(static_cast<double>(x)));
    return static_cast<Real>(expf(static_cast<float>(x)));
  };

  Row<Real> state;
  if (play == Play::no_max) state.max = 0;
  const int count = range.end > range.begin ? (range.end - range.begin + range.step - 1) / range.step : 0;
  int tiles = (count + KEYS - 1) / KEYS;
  if (play == Play::tail_dropped) tiles = count / KEYS;
  const int loaded = play == Play::loaded_to_capacity ? args.capacity : length;
  for (int turn = 0; turn < tiles; ++turn) {
    const int tile = play == Play::right_backwards ? tiles - 1 - turn : turn;
    if (play != Play::no_barrier_before) __syncthreads();
    for (int index = thread; index < KEYS * width; index += threads) {
      const int place = tile * KEYS + index / width;
      const int key = range.begin + place * range.step;
      const bool exists = play == Play::loaded_to_capacity ? key < loaded : place < count;
      k_smem[index] = exists ? to_float(args.cache.key(kb, kv_head, key, index % width)) : 0.0f;
      v_smem[index] = exists ? to_float(args.cache.value(kb, kv_head, key, index % width)) : 0.0f;
    }
    if (play != Play::no_barrier_after) __syncthreads();
    if (!live) continue;
    for (int place = 0; place < KEYS; ++place) {
      const int key = range.begin + (tile * KEYS + place) * range.step;
      const bool exists = tile * KEYS + place < count;
      const bool visible = exists && key < seen;
      if (!exists && play != Play::tail_unmasked) continue;
      if (exists && !visible && play != Play::masked_nan_leak && play != Play::empty_nan) continue;
      const auto k = [&](int d) {
        return own_keys && exists ? to_float(args.cache.key(kb, own_head, key, d)) : k_smem[place * width + d];
      };
      const auto v = [&](int d) {
        if (play == Play::value_is_key) return k(d);
        return own_keys && exists ? to_float(args.cache.value(kb, own_head, key, d)) : v_smem[place * width + d];
      };
      Real s = 0;
      for (int d = 0; d < width; ++d) s += static_cast<Real>(query(d)) * static_cast<Real>(k(d));
      s *= static_cast<Real>(args.scale);
      if (exists && !visible) s = MINUS_INFINITY;
      if (play == Play::scores_in_shared) {
        float* scores = v_smem + KEYS * width + static_cast<Index>(threads) * width;
        scores[static_cast<Index>(row) * args.capacity + key] = static_cast<float>(s);
      }
      Real new_max = s > state.max ? s : state.max;
      if (play == Play::no_max) new_max = 0;
      if (new_max == MINUS_INFINITY && play != Play::empty_nan) {
        if (play == Play::masked_nan_leak) {
          for (int d = 0; d < width; ++d) o_smem[d] += Real{0} * static_cast<Real>(v(d));
        }
        continue;
      }
      const bool first = state.max == MINUS_INFINITY;
      Real rescale = first && play != Play::empty_nan ? Real{0} : raise(state.max - new_max);
      if (play == Play::inverse_rescale && !first) rescale = raise(new_max - state.max);
      const Real weight = raise(s - new_max);
      state.sum = (play == Play::no_rescale_l && !first ? Real{1} : rescale) * state.sum + weight;
      state.max = new_max;
      for (int d = 0; d < width; ++d) {
        const float value = v(d);
        if (play == Play::no_rescale_o || rescale == Real{1}) {
          // nothing to rescale
        } else {
          o_smem[d] *= rescale;
        }
        if (play == Play::nan_as_zero && value != value) continue;
        o_smem[d] += weight * static_cast<Real>(value);
        if (play == Play::half_sums && !std::is_same_v<T, float>) {
          o_smem[d] = static_cast<Real>(to_float(from_float<T>(static_cast<float>(o_smem[d]))));
        }
      }
    }
  }
  if (!live) return;
  const bool empty = state.sum == 0;
  if (play == Play::interleave) head = row / args.queries + kv_head * args.group();
  float lse =
      empty ? MINUS_INFINITY : static_cast<float>(state.max + static_cast<Real>(log(static_cast<double>(state.sum))));
  if (play == Play::lse_only_max && !empty) lse = static_cast<float>(state.max);
  if (empty && play == Play::empty_split && count == 0) return;
  if (empty && play == Play::empty_zero) lse = 0.0f;
  const bool divides = play != Play::no_final_div && !(empty && play != Play::empty_nan);
  for (int d = 0; d < width; ++d) {
    if (empty && count == 0 && play != Play::empty_zero) break;
    const float value = static_cast<float>(divides ? o_smem[d] / state.sum : o_smem[d]);
    if (play == Play::right_at_once && args.splits == 1) {
      args.store_output(b, head, i, d, value);
    } else {
      args.store_part(split, b, head, i, d, value);
    }
  }
  if (play == Play::lse_null && !args.with_lse) return;
  if (play == Play::right_at_once && args.splits == 1) {
    if (count == 0) {
      for (int d = 0; d < width; ++d) args.store_output(b, head, i, d, 0.0f);
    }
    args.store_lse(b, head, i, lse);
  } else {
    args.store_part(split, b, head, i, lse);
  }
}

// A row a block, a channel a thread.
template <typename T, typename Cache>
__global__ void __launch_bounds__(128) merge_kernel(const Arguments<T, Cache> args) {
  const int row = static_cast<int>(blockIdx.x);
  args.merge(row / args.queries / args.heads, row / args.queries % args.heads, row % args.queries,
             static_cast<int>(threadIdx.x));
}

// A part a thread: whoever comes first adds first.
template <typename T, typename Cache>
__global__ void __launch_bounds__(1024) atomic_merge_kernel(const Arguments<T, Cache> args) {
  const int row = static_cast<int>(blockIdx.x);
  const int i = row % args.queries, h = row / args.queries % args.heads, b = row / args.queries / args.heads;
  const int split = static_cast<int>(threadIdx.x);
  float* sums = dynamic_shared<float>();  // [width], then the sum of weights
  for (int d = split; d <= args.width; d += static_cast<int>(blockDim.x)) sums[d] = 0.0f;
  __syncthreads();
  float largest = MINUS_INFINITY;
  for (int other = 0; other < args.splits; ++other) {
    const float lse = args.partial_lse(other, b, h, i);
    largest = lse > largest ? lse : largest;
  }
  const float own = args.partial_lse(split, b, h, i);
  if (own != MINUS_INFINITY) {
    const float weight = expf(own - largest);
    atomicAdd(&sums[args.width], weight);
    for (int d = 0; d < args.width; ++d) atomicAdd(&sums[d], weight * args.partial_output(split, b, h, i, d));
  }
  __syncthreads();
  const float sum = sums[args.width];
  for (int d = split; d < args.width; d += static_cast<int>(blockDim.x)) {
    args.store_output(b, h, i, d, sum == 0.0f ? 0.0f : sums[d] / sum);
  }
  if (split == 0) args.store_lse(b, h, i, sum == 0.0f ? MINUS_INFINITY : largest + logf(sum));
}

template <typename T, typename Cache, typename Problem>
Arguments<T, Cache> arguments_of(const Problem& p, const Cache& cache, Index kv_heads, Index capacity, Play play) {
  const Shape<4>& q = p.query.shape();
  const float usual = 1.0f / std::sqrt(static_cast<float>(q[3]));
  float scale = p.scale.value_or(usual);
  if (play == Play::scale_missing) scale = p.scale.value_or(1.0f);
  if (play == Play::scale_1_over_d) scale = p.scale.value_or(1.0f / static_cast<float>(q[3]));
  if (play == Play::scale_twice) scale *= scale;
  if (play == Play::scale_arg_ignored) scale = usual;
  if (play == Play::scale_zero_as_default && scale == 0.0f) scale = usual;
  return {.query = p.query,
          .cache = cache,
          .lengths = p.lengths,
          .output = p.output,
          .lse = p.lse.value_or(View<float, 3>(nullptr, {0, 0, 0})),
          .partial_output = p.partial_output,
          .partial_lse = p.partial_lse,
          .heads = static_cast<int>(q[1]),
          .kv_heads = static_cast<int>(kv_heads),
          .queries = static_cast<int>(q[2]),
          .width = static_cast<int>(q[3]),
          .splits = static_cast<int>(p.splits()),
          .capacity = static_cast<int>(capacity),
          .causal = p.causal,
          .with_lse = p.lse.has_value(),
          .scale = scale,
          .play = play};
}

template <typename T, typename Cache>
void launch_decode(const Arguments<T, Cache>& args, const Stream& stream) {
  const int rows = args.group() * args.queries;
  const auto batch = static_cast<int>(args.query.size(0));
  if (rows * batch == 0) return;
  const Play play = args.play;
  const int threads = ceil_div(rows, 32) * 32;
  const DeviceBuffer<float> workspace("workspace", play == Play::workspace ? 100 : 0);
  const int scores = play == Play::scores_in_shared ? rows * args.capacity : 0;
  const auto shared = [&](std::size_t real) {
    return static_cast<std::size_t>(2 * KEYS * args.width + scores) * sizeof(float) +
           static_cast<std::size_t>(threads) * static_cast<std::size_t>(args.width) * real;
  };
  const dim3 grid(static_cast<unsigned>(args.splits * args.kv_heads * batch));
  if (play == Play::right_double) {
    launch(parts_kernel<T, Cache, double>, grid, dim3(static_cast<unsigned>(threads)), shared(8), stream, args);
  } else {
    launch(parts_kernel<T, Cache, float>, grid, dim3(static_cast<unsigned>(threads)), shared(4), stream, args);
  }
  if (play == Play::right_at_once && args.splits == 1) return;
  const dim3 all_rows(static_cast<unsigned>(batch * args.heads * args.queries));
  if (play == Play::atomic_merge) {
    launch(atomic_merge_kernel<T, Cache>, all_rows, dim3(static_cast<unsigned>(args.splits)),
           static_cast<std::size_t>(args.width + 1) * sizeof(float), stream, args);
  } else {
    launch(merge_kernel<T, Cache>, all_rows, dim3(static_cast<unsigned>(args.width)), 0, stream, args);
  }
}

// The same on the CPU: no tiles.
template <typename Cache>
void decode_on_cpu(const Arguments<float, Cache>& args) {
  const Play play = args.play;
  for (int b = 0; b < static_cast<int>(args.query.size(0)); ++b) {
    const int length = args.length(b);
    for (int h = 0; h < args.heads; ++h) {
      const int head = args.kv_head(h);
      for (int i = 0; i < args.queries; ++i) {
        const int seen = args.seen(length, i);
        for (int split = 0; split < args.splits; ++split) {
          const auto range = args.range(length, split);
          double sum = 0.0;
          float largest = MINUS_INFINITY;
          std::vector<double> output(static_cast<std::size_t>(args.width), 0.0);
          std::vector<float> scores;
          for (int j = range.begin; j < range.end; j += range.step) {
            float s = 0.0f;
            for (int d = 0; d < args.width; ++d) s += args.query(b, h, i, d) * args.cache.key(b, head, j, d);
            scores.push_back(j < seen ? s * args.scale : MINUS_INFINITY);
            largest = std::max(largest, scores.back());
          }
          std::size_t at = 0;
          for (int j = range.begin; j < range.end; j += range.step) {
            const float score = scores[at++];
            if (j >= seen && play != Play::masked_nan_leak) continue;
            const double weight = j < seen ? std::exp(static_cast<double>(score - largest)) : 0.0;
            sum += weight;
            for (int d = 0; d < args.width; ++d) {
              output[static_cast<std::size_t>(d)] += weight * static_cast<double>(args.cache.value(b, head, j, d));
            }
          }
          if (scores.empty() && play == Play::empty_split) continue;
          args.store_part(split, b, h, i, sum == 0.0 ? MINUS_INFINITY : static_cast<float>(largest + std::log(sum)));
          for (int d = 0; d < args.width && sum != 0.0; ++d) {
            args.store_part(split, b, h, i, d, static_cast<float>(output[static_cast<std::size_t>(d)] / sum));
          }
        }
        for (int d = 0; d < args.width; ++d) args.merge(b, h, i, d);
      }
    }
  }
}

}  // namespace
}  // namespace flashkata
