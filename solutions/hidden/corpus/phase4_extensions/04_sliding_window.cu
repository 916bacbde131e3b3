// Answers to 04_sliding_window, wrong and right. Every deviation stands where somebody made it.
//
// A thread's part of each pass is a class; the kernels run 32 of them at a time, the CPU path one after the other. So
// one and the same deviation can be in both, or in one of them, or in one pass.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../corpus.hpp"
#include "sliding_window.hpp"

namespace flashkata {
namespace {

using corpus::RIGHT;
using corpus::UNNAMED;

// X(what the code calls it, the answer's name, its mistake)
// clang-format off
#define WINDOW_ANSWERS(X) \
  X(left_less, "left without the key at its end", "window-off-by-one") \
  X(left_more, "left with one key more", "window-off-by-one") \
  X(right_less, "right without the key at its end", "window-off-by-one") \
  X(right_more, "right with one key more", "window-off-by-one") \
  X(alignment, "window-alignment", "window-alignment") \
  X(alignment_reversed, "window shifted the other way", "window-alignment") \
  X(all_top_left, "window and causal from the top left", "window-alignment") \
  X(ignored, "window ignored", "window-ignored") \
  X(left_ignored, "left ignored", "window-left-ignored") \
  X(right_ignored, "right ignored", "window-right-ignored") \
  X(swapped, "left and right exchanged", "window-swapped") \
  X(symmetric, "left on both sides", "window-symmetric") \
  X(zero_as_none, "a window of 0 taken for none", "window-zero-as-none") \
  X(none_as_zero, "no limit taken for 0", "window-none-as-zero") \
  X(both_or_none, "a limit on one side forgotten", "window-one-sided-ignored") \
  X(causal_dropped, "a right limit switches causal off", "window-causal-dropped") \
  X(causal_replaces, "causal switches the window off", "window-causal-replaces") \
  X(distance, "left for the distance on both sides under causal too", UNNAMED) \
  X(total_width, "left and right cut in halves", "window-halved") \
  X(int_left, "left in 32 bits", UNNAMED) \
  X(int_right, "right in 32 bits", UNNAMED) \
  X(whole_tiles, "keys of whole tiles", "window-whole-tiles") \
  X(local_index, "distances within a tile", "window-local-index") \
  X(begin_ceil, "tiles of keys that begin too late for the window", "window-skip-partial") \
  X(begin_last_row, "walk from where the last row begins", "window-begin-last-row") \
  X(begin_no_offset, "walk from a key as if Sq were Sk", "window-bound-no-offset") \
  X(end_first_row, "walk to where the first row ends", "window-end-first-row") \
  X(end_no_offset, "walk to a key as if Sq were Sk", "window-bound-no-offset") \
  X(end_no_right, "walk to the diagonal and no further", "window-end-diagonal") \
  X(end_floor, "last tile of keys dropped if it is not whole", UNNAMED) \
  X(begin_negative, "walk from before the first key", "out of bounds") \
  X(first_tile_masked, "window-first-tile-masked", "window-first-tile-masked") \
  X(low_mask, "forbidden scores of -1e30", UNNAMED) \
  X(blind_uniform, "queries without a key get a mean", UNNAMED) \
  X(blind_nan, "queries without a key get NaN", "all-masked-nan") \
  X(blind_unwritten, "queries without a key left out", UNNAMED) \
  X(blind_lse_zero, "queries without a key with an lse of 0", UNNAMED) \
  X(nan_leak_left, "0 times what lies left of the window", UNNAMED) \
  X(nan_leak_right, "0 times what lies right of the window", UNNAMED) \
  X(mask_by_score, "forbidden scores of 0", "mask-multiply-zero") \
  X(left_not_skipped, "tiles left of the window loaded", "loaded for nobody") \
  X(right_not_skipped, "tiles right of the window loaded", "loaded for nobody") \
  X(cap_noop, "softcap-noop", "softcap-noop") \
  X(cap_order, "softcap-order", "softcap-order") \
  X(cap_before_scale, "cap before scale", "softcap-before-scale") \
  X(cap_no_division, "c tanh s", "softcap-no-division") \
  X(cap_no_product, "tanh of s / c", "softcap-no-product") \
  X(cap_clamped, "scores cut off at c", "softcap-clamped") \
  X(cap_one_sided, "scores cut off at c and left alone below 0", UNNAMED) \
  X(cap_sigmoid, "a sigmoid for tanh", UNNAMED) \
  X(cap_overflow, "tanh from exp of 2x", "softcap-tanh-overflow") \
  X(cap_by_series, "tanh with ten bits", UNNAMED) \
  X(cap_zero, "divides by a cap of 0", "softcap-zero") \
  X(cap_by_default, "a cap of 50 where there is none", UNNAMED) \
  X(cap_with_window, "cap only where there is a window", UNNAMED) \
  X(cap_not_causal, "no cap under causal", UNNAMED) \
  X(cap_after_max, "cap on the score less its maximum", UNNAMED) \
  X(lse_uncapped, "lse of the scores without a cap", UNNAMED) \
  X(slope_missing, "softcap-bwd", "softcap-bwd") \
  X(slope_not_squared, "slope 1 - tanh", "softcap-bwd-slope") \
  X(slope_of_score, "slope 1 - score squared", "softcap-bwd-slope") \
  X(slope_of_product, "slope from the score without a cap", "softcap-bwd-slope") \
  X(slope_twice, "slope twice", "softcap-bwd-slope") \
  X(slope_of_capped, "slope from tanh of the capped score", "softcap-bwd-slope") \
  X(slope_masked, "slope of forbidden scores times 0", UNNAMED) \
  X(cut_by_queries, "window cut to the queries", UNNAMED) \
  X(cut_by_keys, "window cut to the keys", UNNAMED) \
  X(cap_not_128, "no cap at width 128", UNNAMED) \
  X(no_right_at_64, "right ignored at width 64", UNNAMED) \
  X(ends_only, "first and last tile of the window", UNNAMED) \
  X(slope_query_only, "slope in dQ alone", "softcap-bwd-one-side") \
  X(slope_key_only, "slope in dK alone", "softcap-bwd-one-side") \
  X(slope_in_value, "slope in dV too", "softcap-bwd-in-value") \
  X(weights_uncapped, "weights from scores without a cap on the way back", "softcap-bwd-uncapped") \
  X(slope_times_cap, "slope divided by c", "softcap-bwd-slope") \
  X(start_ceil, "tiles of queries that begin too late for the window", UNNAMED) \
  X(start_last_key, "walk from the first query of the last key", "bwd-causal-start-last-key") \
  X(start_no_offset, "queries from a place as if Sq were Sk", "bwd-causal-start-no-offset") \
  X(stop_first_key, "walk to the last query of the first key", "window-bwd-stop-first-key") \
  X(stop_no_offset, "queries to a place as if Sq were Sk", "window-bwd-no-offset") \
  X(stop_exclusive, "walk to before the last query of the last key", UNNAMED) \
  X(stop_floor, "last tile of queries dropped if the window ends in it", UNNAMED) \
  X(stop_by_right, "walk to as far as right reaches", "window-bwd-sides-exchanged") \
  X(queries_below_not_skipped, "tiles of queries beyond the window loaded", "loaded for nobody") \
  X(queries_above_not_skipped, "tiles of queries before the window loaded", "loaded for nobody") \
  X(unseen_unwritten, "keys that nobody sees left out", UNNAMED) \
  X(dq_unmasked, "dQ from keys outside of the window", UNNAMED) \
  X(dq_left_ignored, "left ignored for dQ alone", UNNAMED) \
  X(delta_blind, "what a blind query holds times 0", UNNAMED) \
  X(dk_accumulates, "adds to the dK that was there", UNNAMED) \
  X(dq_accumulates, "adds to the dQ that was there", UNNAMED) \
  X(dk_not_scaled, "dK without scale", "bwd-dk-no-scale") \
  X(deterministic_ignored, "deterministic-ignored", UNNAMED) \
  X(lse_base2, "lse in base 2", "lse-base2") \
  X(scale_ignored, "scale-arg-ignored", "scale-arg-ignored") \
  X(heads_first_only, "keys of head 0", UNNAMED) \
  X(batch_first_only, "keys of batch item 0", UNNAMED) \
  X(noncontiguous, "rows without gaps", UNNAMED) \
  X(writes_query, "scales the queries in place", "is an input") \
  X(workspace, "a copy of the scores on the GPU", "beyond the arguments") \
  X(no_barrier_before, "no barrier before the load", "shared-memory race") \
  X(early_return, "threads without a row return early", "barrier after exit") \
  X(unchecked_window, "window unchecked", UNNAMED) \
  X(unchecked_softcap, "softcap unchecked", UNNAMED) \
  X(unchecked, "problem unchecked", UNNAMED) \
  X(remembered, "window remembered from the first call", UNNAMED) \
  X(right_tiles_of_16, "right: tiles of 16 and blocks of 64", RIGHT) \
  X(right_aligned, "right: tiles that begin at multiples of their size", RIGHT) \
  X(right_backwards, "right: backwards", RIGHT) \
  X(right_finite_mask, "right: forbidden scores of -1e30 and weights set to 0", RIGHT) \
  X(right_two_pass, "right: maximum first, then the sum", RIGHT) \
  X(right_tanh_by_exp, "right: tanh from exp of -2|x|", RIGHT) \
  X(right_tanh_rational, "right: 1 - 2 / (exp of 2x + 1)", RIGHT) \
  X(right_slope_factors, "right: slope (1 - t)(1 + t)", RIGHT) \
  X(right_huge_cap, "right: no cap is a cap of 1e15", RIGHT) \
  X(right_exp2, "right: exp2 with log2 e folded in", RIGHT) \
  X(right_max_is_cap, "right: the cap for the maximum if it is small", RIGHT) \
  X(right_no_scratch, "right: delta made anew, sums in d_query", RIGHT) \
  X(right_no_atomics, "right: never atomics", RIGHT) \
  X(right_wide_window, "right: windows cut to the lengths first", RIGHT)
// clang-format on

// The same deviation in one pass, or on one of the two machines.
constexpr std::string_view IN_FORWARD = " in the forward pass";
constexpr std::string_view IN_BACKWARD = " in the backward pass";
constexpr std::string_view IN_KERNELS = " in the kernels";
constexpr std::string_view ON_CPU = " on the CPU";

enum class Play {
  none,
#define X(id, name, mistake) id,
  WINDOW_ANSWERS(X)
#undef X
};

const corpus::Answers answers{
#define X(id, name, mistake) {name, mistake},
    WINDOW_ANSWERS(X)
#undef X
        {"left without the key at its end in the forward pass", "window-off-by-one"},
    {"left with one key more in the forward pass", "window-off-by-one"},
    {"right without the key at its end in the forward pass", "window-off-by-one"},
    {"right with one key more in the forward pass", "window-off-by-one"},
    {"window-alignment in the forward pass", "window-alignment"},
    {"window-alignment in the backward pass", "bwd-mask-misaligned"},
    {"window shifted the other way in the backward pass", "bwd-mask-misaligned"},
    {"window and causal from the top left in the backward pass", "bwd-mask-misaligned"},
    {"window ignored in the forward pass", "window-ignored"},
    {"window ignored in the backward pass", "bwd-window-missing"},
    {"left ignored in the forward pass", "window-left-ignored"},
    {"left ignored in the backward pass", "bwd-window-missing"},
    {"right ignored in the backward pass", "bwd-window-missing"},
    {"left with one key more in the backward pass", "window-off-by-one"},
    {"left without the key at its end in the backward pass", "window-off-by-one"},
    {"left and right exchanged in the backward pass", "window-bwd-sides-exchanged"},
    {"a window of 0 taken for none in the backward pass", "window-zero-as-none"},
    {"softcap-noop in the forward pass", "softcap-noop"},
    {"softcap-order in the forward pass", "softcap-order"},
    {"window-alignment in the kernels", "window-alignment"},
    {"left with one key more in the kernels", "window-off-by-one"},
    {"softcap-noop in the kernels", "softcap-noop"},
    {"softcap-bwd in the kernels", "softcap-bwd"},
    {"window-alignment on the CPU", "window-alignment"},
    {"softcap-bwd on the CPU", "softcap-bwd"},
    {"right ignored on the CPU", "window-right-ignored"},
    {"tiles of keys that begin too late for the window on the CPU", "window-skip-partial"},
};

constexpr int WIDEST = 128;
constexpr Index EVERYTHING = Index{1} << 40;
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504f;

enum class Pass { forward, backward };

Play chosen_play(Pass pass, bool on_host) {
  std::string_view name = corpus::name();
  const auto only = [&](std::string_view suffix, bool here) {
    if (!name.ends_with(suffix)) return true;
    name.remove_suffix(suffix.size());
    return here;
  };
  if (!only(IN_FORWARD, pass == Pass::forward) || !only(IN_BACKWARD, pass == Pass::backward) ||
      !only(IN_KERNELS, !on_host) || !only(ON_CPU, on_host)) {
    return Play::none;
  }
#define X(id, answer, mistake) \
  if (name == answer) return Play::id;
  WINDOW_ANSWERS(X)
#undef X
  return Play::none;
}

struct Arguments {
  FlashBackward<float> p;  // of the forward pass its first five
  Play play;
  bool backward, atomics, causal, windowed;
  int queries, keys, width, tile, threads;
  Index offset, causal_offset, left, right;
  float scale, dk_scale, softcap;
  float* sums;  // [B, H, Sq, D] of dQ
};

struct Range {
  int begin, end;
};

int within(Index value, Index most) { return static_cast<int>(std::clamp<Index>(value, 0, most)); }

// One head's rows.
template <typename T>
struct Rows {
  T* first;
  Index stride;
  T* operator[](Index row) const { return first + row * stride; }
};

template <typename T>
Rows<T> rows_of(const Arguments& a, const View<T, 4>& view, Index b, Index h) {
  if (a.play == Play::noncontiguous) {
    return {view.data() + (b * view.size(1) + h) * view.size(2) * view.size(3), view.size(3)};
  }
  return {view.data() + b * view.stride(0) + h * view.stride(1), view.stride(2)};
}
Rows<const float> keys_of(const Arguments& a, const View<const float, 4>& view, Index b, Index h) {
  return rows_of(a, view, a.play == Play::batch_first_only ? 0 : b, a.play == Play::heads_first_only ? 0 : h);
}

bool too_far_left(const Arguments& a, Index i, Index j) { return j < i + a.offset - a.left; }
bool too_far_right(const Arguments& a, Index i, Index j) {
  return (a.causal && j > i + a.causal_offset) || j > i + a.offset + a.right;
}

// Places in the sequence, and in the tile.
bool sees(const Arguments& a, Index i, Index j, int local_i, int local_j) {
  if (i >= a.queries || j >= a.keys) return false;
  if (a.play == Play::local_index && a.windowed) {
    return local_j >= local_i - a.left && local_j <= local_i + a.right && !(a.causal && j > i + a.causal_offset);
  }
  if (a.play == Play::whole_tiles) return j / a.tile >= (i + a.offset - a.left) / a.tile && !too_far_right(a, i, j);
  return !too_far_left(a, i, j) && !too_far_right(a, i, j);
}

// What queries first .. last of a block walk over.
Range keys_for(const Arguments& a, int first, int last) {
  const Play play = a.play;
  const Index offset = play == Play::begin_no_offset && !a.backward ? 0 : a.offset;
  Index begin = first + offset - a.left;
  if (play == Play::begin_last_row) begin = last + offset - a.left;
  if (play == Play::left_not_skipped || play == Play::local_index) begin = 0;
  Index end = last + a.offset + a.right + 1;
  if (play == Play::end_no_offset && a.right < EVERYTHING / 2) end = last + a.right + 1;
  if (play == Play::end_first_row) end = first + a.offset + a.right + 1;
  if (play == Play::end_no_right && a.right < EVERYTHING / 2) end = last + a.offset + 1;
  if (a.causal) end = std::min(end, last + a.causal_offset + 1);
  if (play == Play::right_not_skipped || play == Play::local_index) end = a.keys;
  if (play == Play::begin_negative && a.left < EVERYTHING / 2) return {static_cast<int>(begin), within(end, a.keys)};
  Range range{within(begin, a.keys), within(end, a.keys)};
  if (play == Play::begin_ceil) range.begin = (range.begin + a.tile - 1) / a.tile * a.tile;
  if (play == Play::end_floor && range.end < a.keys) range.end = range.end / a.tile * a.tile;
  if (play == Play::right_aligned || play == Play::whole_tiles) range.begin = range.begin / a.tile * a.tile;
  return range;
}

// What keys first .. last of a block walk over.
Range queries_for(const Arguments& a, int first, int last) {
  const Play play = a.play;
  const Index right = a.causal ? std::min<Index>(a.right, 0) : a.right;
  Index begin = first - a.offset - right;
  if (play == Play::start_last_key) begin = last - a.offset - right;
  if (play == Play::start_no_offset && right < EVERYTHING / 2) begin = first - right;
  if (play == Play::queries_above_not_skipped || play == Play::local_index) begin = 0;
  if (a.causal && a.causal_offset != a.offset) begin = std::min(begin, first - a.causal_offset);
  Index end = last - a.offset + a.left + 1;
  if (play == Play::stop_first_key) end = first - a.offset + a.left + 1;
  if (play == Play::stop_no_offset && a.left < EVERYTHING / 2) end = last + a.left + 1;
  if (play == Play::stop_exclusive) --end;
  if (play == Play::stop_by_right && a.right < EVERYTHING / 2) end = last - a.offset + a.right + 1;
  if (play == Play::queries_below_not_skipped || play == Play::local_index || play == Play::whole_tiles) {
    end = a.queries;
  }
  Range range{within(begin, a.queries), within(end, a.queries)};
  if (play == Play::start_ceil && begin > 0) range.begin = (range.begin + a.tile - 1) / a.tile * a.tile;
  if (play == Play::stop_floor && range.end < a.queries) range.end = range.end / a.tile * a.tile;
  if (play == Play::right_aligned || play == Play::delta_blind) range.begin = range.begin / a.tile * a.tile;
  return range;
}

float dot(const Arguments& a, const float* one, const float* other) {
  float sum = 0.0f;
  for (int d = 0; d < a.width; d += 4) {
    const float4 x = *reinterpret_cast<const float4*>(one + d);
    const float4 y = *reinterpret_cast<const float4*>(other + d);
    sum += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
  }
  return sum;
}

// to += by * from
void add(const Arguments& a, float* to, float by, const float* from) {
  for (int d = 0; d < a.width; d += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + d);
    to[d] += by * four.x, to[d + 1] += by * four.y, to[d + 2] += by * four.z, to[d + 3] += by * four.w;
  }
}

float tanh_of(const Arguments& a, float x) {
  switch (a.play) {
    case Play::cap_overflow:
      return (expf(2.0f * x) - 1.0f) / (expf(2.0f * x) + 1.0f);
    case Play::cap_sigmoid:
      return 1.0f / (1.0f + expf(-x));
    case Play::cap_by_series:
      return rintf(tanhf(x) * 1024.0f) / 1024.0f;
    case Play::right_tanh_by_exp: {
      const float e = expf(-2.0f * fabsf(x));
      return copysignf(x * x < 1e-3f ? fabsf(x) * (1.0f - x * x / 3.0f) : (1.0f - e) / (1.0f + e), x);
    }
    case Play::right_tanh_rational:
      return 1.0f - 2.0f / (expf(2.0f * x) + 1.0f);
    default:
      return tanhf(x);
  }
}

struct Score {
  float value, slope;  // slope: its derivative by scale times product
};

Score score_of(const Arguments& a, float product) {
  const Play play = a.play;
  float s = product * a.scale;
  const float c = a.softcap;
  if (play == Play::cap_before_scale && c > 0.0f) {
    const float t = tanhf(product / c);
    return {a.scale * c * t, 1.0f - t * t};
  }
  if (c == 0.0f && play != Play::cap_zero) return {s, 1.0f};
  if (play == Play::weights_uncapped && a.backward) return {s, 1.0f};
  if (play == Play::cap_clamped) return {fminf(fmaxf(s, -c), c), fabsf(s) < c ? 1.0f : 0.0f};
  if (play == Play::cap_one_sided && s < 0.0f) return {s, 1.0f};
  const float t = tanh_of(a, play == Play::cap_no_division ? s : s / c);
  const float value = play == Play::cap_no_product ? t : c * t;
  float slope = 1.0f - t * t;
  if (play == Play::slope_missing) slope = 1.0f;
  if (play == Play::slope_not_squared) slope = 1.0f - t;
  if (play == Play::slope_of_score) slope = 1.0f - value * value;
  if (play == Play::slope_of_product) slope = 1.0f - s / c * (s / c);
  if (play == Play::slope_twice) slope *= slope;
  if (play == Play::slope_times_cap) slope /= c;
  if (play == Play::slope_of_capped) slope = 1.0f - tanhf(value / c) * tanhf(value / c);
  if (play == Play::right_slope_factors) slope = (1.0f - t) * (1.0f + t);
  return {value, slope};
}

float raise(const Arguments& a, float x) { return a.play == Play::right_exp2 ? exp2f(x * LOG2E) : expf(x); }

// Where a block stands, and one of its threads.
struct Place {
  Index b, h;
  int first, row, thread;

  Place(const Arguments& a, Index block, int thread_, int rows) : thread(thread_) {
    const Index tiles = (rows + a.threads - 1) / a.threads;
    b = block / tiles / a.p.query.size(1);
    h = block / tiles % a.p.query.size(1);
    first = static_cast<int>(block % tiles) * a.threads;
    row = first + thread;
  }
};

// Rows [first, first + tile) of two tensors to shared memory; rows behind the last become 0.
void load(const Arguments& a, const Rows<const float>& one, const Rows<const float>& other, int first, int limit,
          int thread, float* smem) {
  for (int index = 4 * thread; index < a.tile * a.width; index += 4 * a.threads) {
    const int row = first + index / a.width;
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f), y = x;
    if (row < limit) {
      x = *reinterpret_cast<const float4*>(one[row] + index % a.width);
      y = *reinterpret_cast<const float4*>(other[row] + index % a.width);
    }
    *reinterpret_cast<float4*>(smem + index) = x;
    *reinterpret_cast<float4*>(smem + a.tile * a.width + index) = y;
  }
}

// The output of one query.
struct ForwardThread {
  const Arguments& a;
  Place at;
  Range range;
  bool mine;
  alignas(16) float q[WIDEST], o[WIDEST];
  float row_max = -INFINITE, row_sum = 0.0f;

  ForwardThread(const Arguments& args, Index block, int thread) : a(args), at(a, block, thread, a.queries) {
    range = keys_for(a, at.first, std::min(at.first + a.threads, a.queries) - 1);
    mine = at.row < a.queries;
    for (int d = 0; d < a.width; ++d) {
      q[d] = mine ? rows_of(a, a.p.query, at.b, at.h)[at.row][d] : 0.0f;
      o[d] = 0.0f;
    }
    if (a.play == Play::writes_query && mine) *const_cast<float*>(&a.p.query(at.b, at.h, at.row, 0)) *= a.scale;
    if (a.play == Play::right_max_is_cap && a.softcap > 0.0f && a.softcap < 20.0f) row_max = a.softcap;
  }

  int passes() const { return a.play == Play::right_two_pass ? 2 : 1; }

  void fetch(int first, float* smem) const {
    load(a, keys_of(a, a.p.key, at.b, at.h), keys_of(a, a.p.value, at.b, at.h), first, a.keys, at.thread, smem);
  }

  void pass(const float* smem, int first, int turn) {
    if (!mine) return;
    const Play play = a.play;
    if (play == Play::ends_only && first > range.begin && first + a.tile < range.end) return;
    float scores[64];
    float most = -INFINITE;
    const int rows = std::min(a.tile, a.keys - first);
    for (int n = 0; n < rows; ++n) {
      const bool seen = sees(a, at.row, first + n, at.thread, n);
      scores[n] = -INFINITE;
      if (seen) scores[n] = score_of(a, dot(a, q, smem + n * a.width)).value;
      if (seen && play == Play::cap_after_max && a.softcap > 0.0f) scores[n] = a.scale * dot(a, q, smem + n * a.width);
      if (!seen && play == Play::cap_order && a.softcap > 0.0f) scores[n] = -a.softcap;
      if (!seen && play == Play::mask_by_score) scores[n] = 0.0f;
      if (!seen && (play == Play::right_finite_mask || play == Play::low_mask)) scores[n] = -1e30f;
      most = fmaxf(most, scores[n]);
    }
    if (play == Play::right_two_pass && turn == 0) {
      row_max = fmaxf(row_max, most);
      return;
    }
    const float new_max = play == Play::right_two_pass ? row_max : fmaxf(row_max, most);
    const bool nothing = new_max == -INFINITE;
    if (nothing) {
      const bool none_at_all = blind();
      if (play == Play::first_tile_masked && !none_at_all) row_sum = NAN;
      if (play == Play::blind_nan && none_at_all) row_sum = NAN;
      if (play != Play::blind_uniform || !none_at_all) return;
    }
    const float rescale = nothing ? 1.0f : raise(a, row_max - new_max);
    row_sum *= rescale;
    for (int d = 0; d < a.width; ++d) o[d] *= rescale;
    for (int n = 0; n < rows; ++n) {
      const bool seen = sees(a, at.row, first + n, at.thread, n);
      float p = nothing ? 1.0f : raise(a, scores[n] - new_max);
      if (play == Play::cap_after_max && a.softcap > 0.0f) {
        p = raise(a, a.softcap * tanhf((scores[n] - new_max) / a.softcap));
      }
      if (!seen) {
        const bool left = too_far_left(a, at.row, first + n);
        const bool leaks = (play == Play::nan_leak_left && left) || (play == Play::nan_leak_right && !left);
        const bool counts = play == Play::cap_order || play == Play::mask_by_score || nothing || play == Play::low_mask;
        if (leaks) p = 0.0f;
        if (!leaks && !counts) continue;
        if (play == Play::cap_order && a.softcap == 0.0f) continue;
      }
      row_sum += p;
      add(a, o, p, smem + (a.tile + n) * a.width);
    }
    row_max = new_max;
  }

  bool blind() const {
    for (int j = 0; j < a.keys; ++j) {
      if (sees(a, at.row, j, at.row, j)) return false;
    }
    return true;
  }

  void finish() {
    if (!mine) return;
    const bool none = row_sum == 0.0f;
    if (none && a.play == Play::blind_unwritten) return;
    float* row = const_cast<float*>(rows_of(a, a.p.output, at.b, at.h)[at.row]);
    for (int d = 0; d < a.width; ++d) row[d] = none ? 0.0f : o[d] / row_sum;
    float lse = none ? -INFINITE : row_max + logf(row_sum);
    if (a.play == Play::lse_base2) lse *= LOG2E;
    if (a.play == Play::blind_lse_zero && none) lse = 0.0f;
    if (a.play == Play::lse_uncapped && a.softcap > 0.0f && !none) lse = uncapped_lse();
    const_cast<float&>(a.p.lse(at.b, at.h, at.row)) = lse;
  }

  float uncapped_lse() const {
    float most = -INFINITE, sum = 0.0f;
    const Rows<const float> keys = keys_of(a, a.p.key, at.b, at.h);
    for (int turn = 0; turn < 2; ++turn) {
      for (int j = range.begin; j < range.end; ++j) {
        if (!sees(a, at.row, j, at.thread, 0)) continue;
        const float s = a.scale * dot(a, q, keys[j]);
        if (turn == 0) most = fmaxf(most, s);
        if (turn == 1) sum += expf(s - most);
      }
    }
    return most + logf(sum);
  }
};

float delta_of(const Arguments& a, Index b, Index h, Index i) {
  const float* o = rows_of(a, a.p.output, b, h)[i];
  const float* d_o = rows_of(a, a.p.d_output, b, h)[i];
  return dot(a, o, d_o);
}

// A weight, and dS.
struct PairGradient {
  float p, ds, ds_of_key;
};

PairGradient pair_of(const Arguments& a, const float* q, const float* k, const float* v, const float* d_o, float lse,
                     float delta) {
  const Score score = score_of(a, dot(a, q, k));
  const float p = raise(a, score.value - lse);
  const float ds = p * (dot(a, d_o, v) - delta);
  PairGradient pair{p, ds * score.slope, ds * score.slope};
  if (a.play == Play::slope_query_only) pair.ds_of_key = ds;
  if (a.play == Play::slope_key_only) pair.ds = ds;
  if (a.play == Play::slope_in_value) pair.p *= score.slope;
  return pair;
}

// dQ of one query.
struct QueryThread {
  const Arguments& a;
  Place at;
  Range range;
  bool mine;
  alignas(16) float q[WIDEST], d_o[WIDEST], dq[WIDEST];
  float lse, delta;

  QueryThread(const Arguments& args, Index block, int thread) : a(args), at(a, block, thread, a.queries) {
    range = keys_for(a, at.first, std::min(at.first + a.threads, a.queries) - 1);
    if (a.play == Play::dq_unmasked || a.play == Play::dq_left_ignored) range.begin = 0;
    mine = at.row < a.queries;
    for (int d = 0; d < a.width; ++d) {
      q[d] = mine ? rows_of(a, a.p.query, at.b, at.h)[at.row][d] : 0.0f;
      d_o[d] = mine ? rows_of(a, a.p.d_output, at.b, at.h)[at.row][d] : 0.0f;
      dq[d] = a.play == Play::dq_accumulates && mine ? a.p.d_query(at.b, at.h, at.row, d) : 0.0f;
    }
    lse = mine ? a.p.lse(at.b, at.h, at.row) : INFINITE;
    delta = mine ? delta_of(a, at.b, at.h, at.row) : 0.0f;
  }

  int passes() const { return 1; }

  void fetch(int first, float* smem) const {
    load(a, keys_of(a, a.p.key, at.b, at.h), keys_of(a, a.p.value, at.b, at.h), first, a.keys, at.thread, smem);
  }

  void pass(const float* smem, int first, int) {
    if (!mine) return;
    for (int n = 0; n < std::min(a.tile, a.keys - first); ++n) {
      const Index j = first + n;
      bool seen = sees(a, at.row, j, at.thread, n);
      const bool left = too_far_left(a, at.row, j);
      if (a.play == Play::dq_unmasked || (a.play == Play::dq_left_ignored && left)) {
        seen = !too_far_right(a, at.row, j) && lse != -INFINITE;
      }
      const float* k = smem + n * a.width;
      if (!seen && ((a.play == Play::nan_leak_left && left) || (a.play == Play::nan_leak_right && !left))) {
        add(a, dq, 0.0f, k);
      }
      if (!seen) continue;
      add(a, dq, pair_of(a, q, k, smem + (a.tile + n) * a.width, d_o, lse, delta).ds, k);
    }
  }

  void finish() {
    if (!mine) return;
    if (a.play == Play::blind_unwritten && lse == -INFINITE) return;
    float* row = rows_of(a, a.p.d_query, at.b, at.h)[at.row];
    for (int d = 0; d < a.width; ++d) row[d] = a.scale * dq[d];
  }
};

// dK and dV of one key, and what it gives to dQ.
struct KeyThread {
  const Arguments& a;
  Place at;
  Range range;
  bool mine;
  alignas(16) float k[WIDEST], v[WIDEST], dk[WIDEST], dv[WIDEST];

  KeyThread(const Arguments& args, Index block, int thread) : a(args), at(a, block, thread, a.keys) {
    range = queries_for(a, at.first, std::min(at.first + a.threads, a.keys) - 1);
    mine = at.row < a.keys;
    for (int d = 0; d < a.width; ++d) {
      k[d] = mine ? keys_of(a, a.p.key, at.b, at.h)[at.row][d] : 0.0f;
      v[d] = mine ? keys_of(a, a.p.value, at.b, at.h)[at.row][d] : 0.0f;
      dk[d] = a.play == Play::dk_accumulates && mine ? a.p.d_key(at.b, at.h, at.row, d) : 0.0f;
      dv[d] = 0.0f;
    }
  }

  int passes() const { return 1; }

  void fetch(int first, float* smem) const {
    load(a, rows_of(a, a.p.query, at.b, at.h), rows_of(a, a.p.d_output, at.b, at.h), first, a.queries, at.thread, smem);
    float* lse = smem + 2 * a.tile * a.width;
    for (int n = at.thread; n < a.tile; n += a.threads) {
      const bool inside = first + n < a.queries;
      lse[n] = inside ? a.p.lse(at.b, at.h, first + n) : INFINITE;
      lse[a.tile + n] = !inside                            ? 0.0f
                        : a.play == Play::right_no_scratch ? delta_of(a, at.b, at.h, first + n)
                                                           : a.p.delta(at.b, at.h, first + n);
    }
  }

  void pass(const float* smem, int first, int) {
    if (!mine) return;
    const float* lse = smem + 2 * a.tile * a.width;
    for (int n = 0; n < std::min(a.tile, a.queries - first); ++n) {
      const Index i = first + n;
      const float* q = smem + n * a.width;
      const float* d_o = smem + (a.tile + n) * a.width;
      if (!sees(a, i, at.row, n, at.thread)) {
        if (a.play == Play::delta_blind) add(a, dv, 0.0f, d_o);
        if (a.play == Play::slope_masked && a.softcap > 0.0f) dk[0] += 0.0f * (1.0f - INFINITE);
        continue;
      }
      const PairGradient pair = pair_of(a, q, k, v, d_o, lse[n], lse[a.tile + n]);
      add(a, dk, pair.ds_of_key, q);
      add(a, dv, pair.p, d_o);
      if (!a.atomics) continue;
      float* sum = a.sums + ((at.b * a.p.query.size(1) + at.h) * a.queries + i) * a.width;
      if (a.play == Play::right_no_scratch) sum = rows_of(a, a.p.d_query, at.b, at.h)[i];
      for (int d = 0; d < a.width; ++d) {
        const float given = pair.ds * k[d] * (a.play == Play::right_no_scratch ? a.scale : 1.0f);
        atomicAdd(sum + d, given);
      }
    }
  }

  void finish() {
    if (!mine) return;
    if (a.play == Play::unseen_unwritten && range.begin >= range.end) return;
    float* dk_row = rows_of(a, a.p.d_key, at.b, at.h)[at.row];
    float* dv_row = rows_of(a, a.p.d_value, at.b, at.h)[at.row];
    for (int d = 0; d < a.width; ++d) {
      dk_row[d] = a.dk_scale * dk[d];
      dv_row[d] = dv[d];
    }
  }
};

int tiles_of(const Arguments& a, const Range& range) {
  return range.end <= range.begin ? 0 : (range.end - range.begin + a.tile - 1) / a.tile;
}
int tile_at(const Arguments& a, const Range& range, int turn, int tiles) {
  const int tile = turn % tiles;
  return range.begin + (a.play == Play::right_backwards ? tiles - 1 - tile : tile) * a.tile;
}

template <typename Thread>
__global__ void on_gpu(const Arguments a) {
  Thread thread(a, blockIdx.x, static_cast<int>(threadIdx.x));
  if (a.play == Play::early_return && !thread.mine) return;
  float* smem = dynamic_shared<float>();
  const int tiles = tiles_of(a, thread.range);
  for (int turn = 0; turn < tiles * thread.passes(); ++turn) {
    const int first = tile_at(a, thread.range, turn, tiles);
    if (a.play != Play::no_barrier_before) __syncthreads();
    thread.fetch(first, smem);
    __syncthreads();
    thread.pass(smem, first, turn / tiles);
  }
  thread.finish();
}

template <typename Thread>
void on_cpu(const Arguments& a, int rows) {
  const Index blocks = a.p.query.size(0) * a.p.query.size(1) * ((rows + a.threads - 1) / a.threads);
  std::vector<float4> shared(static_cast<std::size_t>(2 * a.tile * a.width + 2 * a.tile) / 4 + 1);
  float* smem = &shared[0].x;
  for (Index block = 0; block < blocks; ++block) {
    std::vector<Thread> threads;
    threads.reserve(static_cast<std::size_t>(a.threads));
    for (int thread = 0; thread < a.threads; ++thread) threads.emplace_back(a, block, thread);
    const int tiles = tiles_of(a, threads[0].range);
    for (int turn = 0; turn < tiles * threads[0].passes(); ++turn) {
      const int first = tile_at(a, threads[0].range, turn, tiles);
      if (first < 0) break;  // the program is to go on
      for (Thread& thread : threads) thread.fetch(first, smem);
      for (Thread& thread : threads) thread.pass(smem, first, turn / tiles);
    }
    for (Thread& thread : threads) thread.finish();
  }
}

// delta, and zeros where others will add.
void prepare_row(const Arguments& a, Index row) {
  const Index b = row / a.queries / a.p.query.size(1), h = row / a.queries % a.p.query.size(1), i = row % a.queries;
  if (a.play != Play::right_no_scratch) a.p.delta(b, h, i) = delta_of(a, b, h, i);
  if (!a.atomics) return;
  float* sum = a.play == Play::right_no_scratch ? rows_of(a, a.p.d_query, b, h)[i] : a.sums + row * a.width;
  for (int d = 0; d < a.width; ++d) sum[d] = 0.0f;
}

__global__ void prepare(const Arguments a, Index rows) {
  const Index row = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < rows) prepare_row(a, row);
}

// dQ = scale times its sums.
__global__ void take_over(const Arguments a, Index rows) {
  const Index row = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const Index b = row / a.queries / a.p.query.size(1), h = row / a.queries % a.p.query.size(1);
  if (a.play == Play::blind_unwritten && a.p.lse(b, h, row % a.queries) == -INFINITE) return;
  float* to = rows_of(a, a.p.d_query, b, h)[row % a.queries];
  for (int d = 0; d < a.width; ++d) {
    to[d] = a.scale * a.sums[row * a.width + d] + (a.play == Play::dq_accumulates ? to[d] : 0.0f);
  }
}

Arguments arguments_of(const FlashBackward<float>& p, Window window, bool backward, bool on_host) {
  const Play play = chosen_play(backward ? Pass::backward : Pass::forward, on_host);
  if (play == Play::remembered) {
    static const Window first = window;
    window = first;
  }
  const Index queries = p.query.size(2), keys = p.key.size(2);
  const float usual = 1.0f / std::sqrt(static_cast<float>(p.query.size(3)));
  bool causal = p.causal;
  std::optional<Index> left = window.left, right = window.right;
  if (play == Play::zero_as_none) {
    if (left == 0) left.reset();
    if (right == 0) right.reset();
  }
  if (play == Play::both_or_none && !(left && right)) left.reset(), right.reset();
  if (play == Play::ignored) left.reset(), right.reset();
  if (play == Play::left_ignored) left.reset();
  if (play == Play::right_ignored) right.reset();
  if (play == Play::swapped) std::swap(left, right);
  if (play == Play::symmetric) right = left;
  if (play == Play::distance && left && causal) causal = false, right = left;
  if (play == Play::causal_dropped && right) causal = false;
  if (play == Play::causal_replaces && causal) left.reset();
  const Index none = play == Play::none_as_zero && (left || right) ? 0 : EVERYTHING;
  Arguments a{
      .p = p,
      .play = play,
      .backward = backward,
      .atomics = backward && !on_host && !p.deterministic,
      .causal = causal,
      .windowed = left.has_value() || right.has_value(),
      .queries = static_cast<int>(queries),
      .keys = static_cast<int>(keys),
      .width = static_cast<int>(p.query.size(3)),
      .tile = 32,
      .threads = 32,
      .offset = keys - queries,
      .causal_offset = keys - queries,
      .left = std::min(left.value_or(none), EVERYTHING),
      .right = std::min(right.value_or(causal ? EVERYTHING : none), EVERYTHING),
      .scale = p.scale.value_or(usual),
      .dk_scale = p.scale.value_or(usual),
      .softcap = window.softcap,
      .sums = p.d_query_sum.data(),
  };
  if (play == Play::int_left && left) a.left = static_cast<int>(window.left.value_or(0));
  if (play == Play::int_right && right) a.right = static_cast<int>(window.right.value_or(0));
  if (play == Play::total_width && left) a.left /= 2;
  if (play == Play::total_width && right) a.right /= 2;
  if (play == Play::left_less && left) --a.left;
  if (play == Play::left_more && left) ++a.left;
  if (play == Play::right_less && right) --a.right;
  if (play == Play::right_more && right) ++a.right;
  if (play == Play::alignment) a.offset = 0;
  if (play == Play::alignment_reversed) a.offset = -a.offset;
  if (play == Play::all_top_left) a.offset = a.causal_offset = 0;
  if (play == Play::cap_noop) a.softcap = 0.0f;
  if (play == Play::cap_with_window && !a.windowed) a.softcap = 0.0f;
  if (play == Play::cap_not_causal && causal) a.softcap = 0.0f;
  if (play == Play::cap_by_default && a.softcap == 0.0f) a.softcap = 50.0f;
  if (play == Play::cap_not_128 && a.width == 128) a.softcap = 0.0f;
  if (play == Play::no_right_at_64 && a.width == 64) a.right = EVERYTHING;
  if (play == Play::cut_by_queries) a.left = std::min(a.left, queries), a.right = std::min(a.right, queries);
  if (play == Play::cut_by_keys) a.left = std::min(a.left, keys), a.right = std::min(a.right, keys);
  if (play == Play::right_huge_cap && a.softcap == 0.0f) a.softcap = 1e15f;
  if (play == Play::scale_ignored) a.scale = a.dk_scale = usual;
  if (play == Play::dk_not_scaled) a.dk_scale = 1.0f;
  if (play == Play::right_tiles_of_16) a.tile = 16, a.threads = 64;
  if (play == Play::begin_ceil || play == Play::start_ceil || play == Play::whole_tiles) a.tile = 16;
  if (play == Play::end_floor || play == Play::stop_floor) a.tile = 16;
  if (play == Play::first_tile_masked || play == Play::low_mask) a.tile = 16;
  if (play == Play::right_no_atomics) a.atomics = false;
  if (play == Play::deterministic_ignored && !on_host) a.atomics = backward;
  if (play == Play::right_wide_window) {
    a.left = std::min(a.left, queries + keys);
    a.right = std::min(a.right, queries + keys);
  }
  return a;
}

// The forward pass's problem in the clothes of the backward pass's.
FlashBackward<float> dressed(const FlashForward<float>& p) {
  return {.query = p.query,
          .key = p.key,
          .value = p.value,
          .output = p.output,
          .lse = p.lse,
          .d_output = p.query,
          .d_query = p.output,
          .d_key = p.output,
          .d_value = p.output,
          .delta = p.lse,
          .d_query_sum = p.output,
          .causal = p.causal,
          .scale = p.scale};
}

// Whether the call is to go on: it does not where it would end the program.
template <typename Problem>
bool checked(const Problem& problem, const Window& window, bool on_host) {
  const Play play = chosen_play(std::is_same_v<Problem, FlashForward<float>> ? Pass::forward : Pass::backward, on_host);
  if (play == Play::unchecked) {
    check_window(window);
    return problem.query.size(3) >= 16 && problem.key.shape() == problem.value.shape() &&
           problem.key.size(1) == problem.query.size(1) && problem.output.shape() == problem.query.shape();
  }
  if constexpr (std::is_same_v<Problem, FlashForward<float>>) {
    check_flash_forward(problem);
  } else {
    check_flash_backward(problem);
  }
  Window shown = window;
  if (play == Play::unchecked_window) shown.left.reset(), shown.right.reset();
  if (play == Play::unchecked_softcap) shown.softcap = 0.0f;
  check_window(shown);
  return true;
}

template <typename Thread>
void launch_blocks(const Arguments& a, int rows, const Stream& stream) {
  const Index blocks = a.p.query.size(0) * a.p.query.size(1) * ((rows + a.threads - 1) / a.threads);
  if (blocks == 0) return;
  launch(on_gpu<Thread>, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(a.threads)),
         static_cast<std::size_t>(2 * a.tile * a.width + 2 * a.tile) * sizeof(float), stream, a);
}

}  // namespace

void tiled_window_forward(const FlashForward<float>& problem, const Window& window) {
  if (!checked(problem, window, true)) return;
  const Arguments a = arguments_of(dressed(problem), window, false, true);
  on_cpu<ForwardThread>(a, a.queries);
}

void tiled_window_backward(const FlashBackward<float>& problem, const Window& window) {
  if (!checked(problem, window, true)) return;
  const Arguments a = arguments_of(problem, window, true, true);
  for (Index row = 0; row < problem.query.size(0) * problem.query.size(1) * a.queries; ++row) prepare_row(a, row);
  on_cpu<KeyThread>(a, a.keys);
  on_cpu<QueryThread>(a, a.queries);
}

void flash_window_forward(const FlashForward<float>& problem, const Window& window, const Stream& stream) {
  if (!checked(problem, window, false)) return;
  const Arguments a = arguments_of(dressed(problem), window, false, false);
  const DeviceBuffer<float> scores("scores", a.play == Play::workspace ? static_cast<std::size_t>(a.queries) + 1 : 0);
  launch_blocks<ForwardThread>(a, a.queries, stream);
}

void flash_window_backward(const FlashBackward<float>& problem, const Window& window, const Stream& stream) {
  if (!checked(problem, window, false)) return;
  const Arguments a = arguments_of(problem, window, true, false);
  const Index rows = problem.query.size(0) * problem.query.size(1) * a.queries;
  const auto row_blocks = dim3(static_cast<unsigned>((rows + 63) / 64));
  if (rows > 0) launch(prepare, row_blocks, dim3(64), 0, stream, a, rows);
  launch_blocks<KeyThread>(a, a.keys, stream);
  if (!a.atomics) {
    launch_blocks<QueryThread>(a, a.queries, stream);
  } else if (rows > 0 && a.play != Play::right_no_scratch) {
    launch(take_over, row_blocks, dim3(64), 0, stream, a, rows);
  }
}

}  // namespace flashkata
