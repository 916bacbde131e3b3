// Answers to 01_varlen, wrong and right. Every deviation stands where somebody made it. Kernels have one query or one
// key a thread, for any width; the CPU's answers walk over the same rows.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <span>
#include <vector>

#include "../corpus.hpp"
#include "varlen.hpp"

namespace flashkata {
namespace {

using corpus::RIGHT;
using corpus::UNNAMED;

// Which of the functions deviates.
enum Where : unsigned { GPU = 1, GPU_BACK = 2, CPU = 4, CPU_BACK = 8, PACK = 16, MODEL = 32, EVERYWHERE = 63 };

// X(what the code calls it, where, the answer's name, its mistake)
// clang-format off
#define VARLEN_ANSWERS(X) \
  X(no_leading_zero, GPU, "cu-seqlens-no-leading-zero", "cu-seqlens-no-leading-zero") \
  X(no_leading_zero, GPU_BACK, "cu-seqlens-no-leading-zero backward", "cu-seqlens-no-leading-zero") \
  X(no_leading_zero, CPU, "cu-seqlens-no-leading-zero on the CPU", "cu-seqlens-no-leading-zero") \
  X(no_leading_zero, CPU_BACK, "cu-seqlens-no-leading-zero backward on the CPU", "cu-seqlens-no-leading-zero") \
  X(no_leading_zero, PACK, "sums without a leading 0", "cu-seqlens-no-leading-zero") \
  X(dtype, GPU, "cu-seqlens-dtype", "cu-seqlens-dtype") \
  X(dtype, GPU_BACK, "cu-seqlens-dtype backward", "cu-seqlens-dtype") \
  X(as_lengths, GPU, "cu_seqlens taken for lengths", UNNAMED) \
  X(as_lengths, CPU, "cu_seqlens taken for lengths on the CPU", "cu-seqlens-as-lengths") \
  X(as_lengths, PACK, "lengths instead of sums", "cu-seqlens-as-lengths") \
  X(cross_batch, GPU, "varlen-cross-sequence: all keys of the batch", "varlen-cross-sequence") \
  X(cross_batch, GPU_BACK, "varlen-cross-sequence: all keys of the batch backward", "varlen-cross-sequence") \
  X(cross_batch, CPU, "varlen-cross-sequence: all keys of the batch on the CPU", "varlen-cross-sequence") \
  X(cross_before, GPU, "varlen-cross-sequence: earlier sequences too", "varlen-cross-sequence") \
  X(cross_before, GPU_BACK, "varlen-cross-sequence: earlier sequences too backward", "varlen-cross-sequence") \
  X(cross_max, GPU, "varlen-cross-sequence: max_seqlen_k keys for each", "varlen-keys-to-max") \
  X(cross_max, GPU_BACK, "varlen-cross-sequence: max_seqlen_k keys for each backward", "varlen-keys-to-max") \
  X(cross_max, CPU, "varlen-cross-sequence: max_seqlen_k keys for each on the CPU", "varlen-keys-to-max") \
  X(cross_batch, MODEL, "all items as one sequence", "varlen-cross-sequence") \
  X(end_included, GPU, "the first key of the next sequence counted in", "varlen-end-included") \
  X(end_included, GPU_BACK, "the first key of the next sequence counted in backward", "varlen-end-included") \
  X(padded_place, GPU, "sequences looked for where padding would put them", "varlen-padded-place") \
  X(padded_place, GPU_BACK, "sequences looked for where padding would put them backward", "varlen-padded-place") \
  X(padded_place, CPU, "sequences looked for where padding would put them on the CPU", "varlen-padded-place") \
  X(q_for_k, GPU, "cu_seqlens_q used for the keys", "varlen-q-for-k") \
  X(q_for_k, GPU_BACK, "cu_seqlens_q used for the keys backward", "varlen-q-for-k") \
  X(q_for_k, CPU, "cu_seqlens_q used for the keys on the CPU", "varlen-q-for-k") \
  X(q_for_k, CPU_BACK, "cu_seqlens_q used for the keys backward on the CPU", "varlen-q-for-k") \
  X(last_forgotten, GPU, "the last sequence forgotten", "varlen-last-forgotten") \
  X(last_forgotten, GPU_BACK, "the last sequence forgotten backward", "varlen-last-forgotten") \
  X(last_forgotten, CPU, "the last sequence forgotten on the CPU", "varlen-last-forgotten") \
  X(max_too_small, GPU, "max-seqlen-too-small", "max-seqlen-too-small") \
  X(max_too_small, GPU_BACK, "max-seqlen-too-small backward", "max-seqlen-too-small") \
  X(max_exchanged, GPU, "max_seqlen_k for the queries", "max-seqlen-exchanged") \
  X(max_exchanged, GPU_BACK, "max_seqlen_q for the keys", "max-seqlen-exchanged") \
  X(max_floor, GPU, "whole tiles of max_seqlen_q only", "tail-rows-unwritten") \
  X(empty_queries_unwritten, GPU, "empty-sequence: queries without keys left alone", "empty-sequence") \
  X(empty_queries_unwritten, GPU_BACK, "empty-sequence: queries without keys left alone backward", "empty-sequence") \
  X(empty_queries_unwritten, CPU, "empty-sequence: queries without keys left alone on the CPU", "empty-sequence") \
  X(empty_keys_unwritten, GPU_BACK, "empty-sequence: keys without queries left alone", "empty-sequence") \
  X(empty_keys_unwritten, CPU_BACK, "empty-sequence: keys without queries left alone on the CPU", "empty-sequence") \
  X(empty_stops, CPU, "stops at the first empty sequence", "empty-sequence-stops") \
  X(empty_stops, CPU_BACK, "stops at the first empty sequence backward", "empty-sequence-stops") \
  X(empty_nan, GPU, "0 / 0 in rows without keys", "all-masked-nan") \
  X(empty_nan, CPU, "0 / 0 in rows without keys on the CPU", "all-masked-nan") \
  X(empty_lse_zero, GPU, "empty rows with an lse of 0", UNNAMED) \
  X(empty_skipped, PACK, "no entry for an item without tokens", "empty-item-skipped") \
  X(lse_tokens_first, GPU, "varlen-lse-layout: tokens before heads", "varlen-lse-layout") \
  X(lse_padded, GPU, "varlen-lse-layout: padded rows", "varlen-lse-layout") \
  X(lse_padded, GPU_BACK, "varlen-lse-layout: padded rows read backward", "varlen-lse-layout") \
  X(lse_unstrided, GPU_BACK, "lse read without its strides", UNNAMED) \
  X(tail_zeroed, GPU, "tokens of nobody set to 0", UNNAMED) \
  X(tail_zeroed, GPU_BACK, "gradients of tokens of nobody set to 0", UNNAMED) \
  X(tail_zeroed, CPU, "tokens of nobody set to 0 on the CPU", UNNAMED) \
  X(tail_attended, GPU, "uncovered-tail-tokens: the last sequence reaches to the end", "uncovered-tail-tokens") \
  X(tail_attended, GPU_BACK, "uncovered-tail-tokens: the last sequence reaches to the end backward", "uncovered-tail-tokens") \
  X(tail_attended, CPU, "uncovered-tail-tokens: the last sequence reaches to the end on the CPU", "uncovered-tail-tokens") \
  X(causal_top_left, GPU, "causal-alignment", "causal-alignment") \
  X(causal_top_left, GPU_BACK, "causal-alignment backward", "causal-alignment") \
  X(causal_top_left, CPU, "causal-alignment on the CPU", "causal-alignment") \
  X(causal_packed, GPU, "the diagonal of the whole batch", "varlen-causal-packed") \
  X(causal_packed, GPU_BACK, "the diagonal of the whole batch backward", "varlen-causal-packed") \
  X(causal_max, GPU, "the diagonal of the longest", "varlen-causal-max") \
  X(causal_max, GPU_BACK, "the diagonal of the longest backward", "varlen-causal-max") \
  X(causal_strict, GPU, "causal-strict", "causal-strict") \
  X(causal_ignored, GPU, "causal-ignored", "causal-ignored") \
  X(causal_ignored, CPU, "causal-ignored on the CPU", "causal-ignored") \
  X(causal_ignored, CPU_BACK, "causal-ignored backward on the CPU", "causal-ignored") \
  X(causal_ignored, MODEL, "causal-ignored in flash_causal", "causal-ignored") \
  X(scale_ignored, CPU, "scale-arg-ignored on the CPU", "scale-arg-ignored") \
  X(scale_ignored, CPU_BACK, "scale-arg-ignored backward on the CPU", "scale-arg-ignored") \
  X(scale_ignored, GPU, "scale-arg-ignored", "scale-arg-ignored") \
  X(scale_embed, MODEL, "scale-embed-dim", "scale-embed-dim") \
  X(assign, CPU_BACK, "dQ added to what the memory held", UNNAMED) \
  X(polarity, PACK, "mask-polarity", "mask-polarity") \
  X(as_length, PACK, "the mask taken for a length", "padding-as-length") \
  X(place_in_item, PACK, "places counted anew in each item", "packing-place-in-item") \
  X(max_is_s, PACK, "max_seqlen of the padded length", UNNAMED) \
  X(max_last, PACK, "max_seqlen of the last item", UNNAMED) \
  X(unstrided, PACK, "x taken for packed", "noncontiguous-stride") \
  X(not_zeroed, PACK, "padding left as it was", "unpack-not-zeroed") \
  X(in_order, PACK, "tokens unpacked to the left", "unpack-to-the-left") \
  X(pack_unchecked, PACK, "packings unchecked", UNNAMED) \
  X(padding_ignored, MODEL, "padding-ignored", "padding-ignored") \
  X(padding_first, MODEL, "padding-first-item", "padding-first-item") \
  X(heads_wrong, MODEL, "heads-view-no-transpose", "heads-view-no-transpose") \
  X(remembered, MODEL, "results remembered by shape", UNNAMED) \
  X(memory_kept, MODEL, "memory of the GPU never given back", UNNAMED) \
  X(padding_read, MODEL, "padding of k multiplied by 0", UNNAMED) \
  X(unchecked, static_cast<Where>(GPU | GPU_BACK), "arguments unchecked", UNNAMED) \
  X(unchecked, static_cast<Where>(CPU | CPU_BACK), "arguments unchecked on the CPU", UNNAMED) \
  X(unchecked, MODEL, "padded arguments unchecked", UNNAMED) \
  X(launch_each, GPU, "a launch for each sequence", "launches grow") \
  X(launch_each, GPU_BACK, "a launch for each sequence backward", "launches grow") \
  X(padding_loaded, GPU, "keys loaded up to max_seqlen_k", "padding loaded") \
  X(padding_loaded, GPU_BACK, "queries loaded up to max_seqlen_q", "padding loaded") \
  X(entries_beyond, GPU, "one entry of cu_seqlens too many", "out of bounds") \
  X(computed_twice, GPU, "every query computed by two blocks", "global-memory race") \
  X(writes_query, GPU, "scales the queries in place", "is an input") \
  X(writes_entries, GPU, "counts in cu_seqlens", "is an input") \
  X(workspace, GPU, "a workspace on the GPU", "beyond the arguments") \
  X(second_head, GPU, "later heads with the boundaries of the next sequence", UNNAMED) \
  X(short_lost, GPU, "sequences of one query lost beside long ones", UNNAMED) \
  X(memset_d_query, GPU_BACK, "all of d_query set to 0 unless deterministic", UNNAMED) \
  X(delta_padded, GPU_BACK, "delta in padded rows", UNNAMED) \
  X(max_is_one, GPU, "a special way for max_seqlen_q of 1 that knows no empty sequences", UNNAMED) \
  X(half_of_128, GPU_BACK, "half of the channels at width 128", UNNAMED) \
  X(b_h_exchanged, GPU, "heads and sequences exchanged in the block number", UNNAMED) \
  X(boundaries_remembered, CPU, "boundaries remembered by their number", UNNAMED) \
  X(dk_atomic, GPU_BACK, "dK as sums of atomics", UNNAMED) \
  X(right_search, static_cast<Where>(GPU | GPU_BACK), "right: a token looks for its sequence", RIGHT) \
  X(right_backwards, EVERYWHERE, "right: sequences and keys from the last to the first", RIGHT) \
  X(right_double, EVERYWHERE, "right: double accumulation", RIGHT) \
  X(right_no_max, static_cast<Where>(GPU | GPU_BACK), "right: max_seqlen ignored", RIGHT) \
  X(right_exp2, EVERYWHERE, "right: exp2", RIGHT) \
  X(right_online, static_cast<Where>(GPU | CPU), "right: maximum and sum in one pass", RIGHT) \
  X(right_zero_first, GPU_BACK, "right: a kernel that sets all gradients to 0 first", RIGHT) \
  X(right_heads_first, MODEL, "right: tokens head by head on the GPU", RIGHT) \
  X(right_all_padding, MODEL, "right: nothing but padding never reaches the GPU", RIGHT)

enum class Play {
  none, no_leading_zero, dtype, as_lengths, cross_batch, cross_before, cross_max, end_included, padded_place, q_for_k,
  last_forgotten, max_too_small, max_exchanged, max_floor, empty_queries_unwritten, empty_keys_unwritten, empty_stops,
  empty_nan, empty_lse_zero, empty_skipped, lse_tokens_first, lse_padded, lse_unstrided, tail_zeroed, tail_attended,
  causal_top_left, causal_packed, causal_max, causal_strict, causal_ignored, scale_ignored, scale_embed, assign,
  polarity, as_length, place_in_item, max_is_s, max_last, unstrided, not_zeroed, in_order, pack_unchecked,
  padding_ignored, padding_first, heads_wrong, remembered, memory_kept, padding_read, unchecked, launch_each,
  padding_loaded, entries_beyond, computed_twice, writes_query, writes_entries, workspace, second_head, short_lost,
  dk_atomic, memset_d_query, delta_padded, max_is_one, half_of_128, b_h_exchanged, boundaries_remembered,
  right_search, right_backwards, right_double, right_no_max, right_exp2, right_online, right_zero_first,
  right_heads_first, right_all_padding,
};
// clang-format on

const corpus::Answers answers{
#define X(id, where, name, mistake) {name, mistake},
    VARLEN_ANSWERS(X)
#undef X
};

Play play_of(Where where) {
#define X(id, places, name, mistake) \
  if (((places)&where) != 0 && corpus::plays(name)) return Play::id;
  VARLEN_ANSWERS(X)
#undef X
  return Play::none;
}

constexpr int WIDEST = 128;
constexpr int ROWS = 32;  // threads of a block
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504f;

struct Arguments {
  View<const float, 4> query, key, value;
  View<float, 4> output;
  View<float, 3> lse;
  View<const float, 4> d_output;  // from here on of the way back
  View<float, 4> d_query, d_key, d_value;
  View<float, 3> delta;
  std::int32_t* cu_q;
  std::int32_t* cu_k;
  int sequences, heads, width, total_q, total_k, max_q, max_k;
  float scale;
  bool causal;
  Play play;
  int only;  // the one sequence of this launch; -1: all

  KATA_HOST_DEVICE bool plays(Play one) const { return play == one; }
};

// Of one sequence.
struct Ranges {
  int q_first, q_count, k_first, k_count;
};

KATA_HOST_DEVICE void range_of(const Arguments& args, const std::int32_t* entries, int b, int total, int longest,
                               int& first, int& count) {
  const int last = args.sequences;
  int begin = entries[b], end = entries[b + 1];
  if (args.plays(Play::no_leading_zero)) begin = entries[b + 1], end = entries[min(b + 2, last)];
  if (args.plays(Play::dtype)) {
    begin = 2 * b > last ? 0 : entries[2 * b];
    end = 2 * b + 2 > last ? 0 : entries[2 * b + 2];
  }
  if (args.plays(Play::as_lengths)) end = begin + end;
  if (args.plays(Play::padded_place)) end = b * longest + end - begin, begin = b * longest;
  if (args.plays(Play::tail_attended) && b + 1 == last) end = total;
  first = min(begin, total);
  count = max(0, min(end, total) - first);
}

enum class Rows { forward, queries, keys };

// Two blocks never write the same row here, so that what comes out does not depend on who runs first: whoever looks
// too far looks at rows that are not its own, the queries' blocks at keys, and the keys' blocks at queries.
KATA_HOST_DEVICE Ranges ranges_of(const Arguments& args, int b, int h, Rows rows) {
  if (args.plays(Play::second_head) && h > 1) b = min(b + 1, args.sequences - 1);
  Ranges r{};
  range_of(args, args.cu_q, b, args.total_q, args.max_q, r.q_first, r.q_count);
  range_of(args, args.cu_k, b, args.total_k, args.max_k, r.k_first, r.k_count);
  int& first = rows == Rows::keys ? r.q_first : r.k_first;
  int& count = rows == Rows::keys ? r.q_count : r.k_count;
  const int owned = (rows == Rows::keys ? args.cu_q : args.cu_k)[args.sequences];
  const int longest = rows == Rows::keys ? args.max_q : args.max_k;
  if (args.plays(Play::cross_batch)) first = 0, count = owned;
  if (args.plays(Play::cross_before)) count += first, first = 0;
  if (args.plays(Play::cross_max)) count = min(longest, owned - first);
  if (args.plays(Play::end_included) && first + count < owned) ++count;
  if (args.plays(Play::q_for_k)) {
    r.k_first = min(r.q_first, args.total_k);
    r.k_count = min(r.q_count, args.total_k - r.k_first);
  }
  return r;
}

KATA_HOST_DEVICE bool sees(const Arguments& args, const Ranges& r, int i, int j) {
  if (j < 0 || j >= r.k_count) return false;
  if (!args.causal || args.plays(Play::causal_ignored)) return true;
  int offset = r.k_count - r.q_count;
  if (args.plays(Play::causal_top_left)) offset = 0;
  if (args.plays(Play::causal_max)) offset = args.max_k - args.max_q;
  if (args.plays(Play::causal_strict)) --offset;
  if (args.plays(Play::causal_packed)) {
    offset = args.cu_k[args.sequences] - args.cu_q[args.sequences] + r.q_first - r.k_first;
  }
  return j <= i + offset;
}

template <typename Real>
KATA_HOST_DEVICE Real score_of(const Arguments& args, const float* q, const float* k) {
  Real sum = 0;
  for (int d = 0; d < args.width; ++d) sum += static_cast<Real>(q[d]) * static_cast<Real>(k[d]);
  return sum * static_cast<Real>(args.scale);
}

template <typename Real>
KATA_HOST_DEVICE Real raise(const Arguments& args, Real x) {
  if (args.plays(Play::right_exp2)) return static_cast<Real>(exp2f(static_cast<float>(x) * LOG2E));
  return static_cast<Real>(std::exp(static_cast<double>(x)));
}

// Rows of one head in memory.
template <typename T>
KATA_HOST_DEVICE T* row(const View<T, 4>& view, int h, int t) {
  return view.data() + h * view.stride(1) + t * view.stride(2);
}

KATA_HOST_DEVICE float* lse_at(const Arguments& args, const Ranges& r, int b, int h, int i) {
  const int end = args.heads * args.total_q;
  if (args.plays(Play::lse_tokens_first)) return args.lse.data() + (r.q_first + i) * args.heads + h;
  if (args.plays(Play::lse_padded)) return args.lse.data() + min((b * args.heads + h) * args.max_q + i, end - 1);
  if (args.plays(Play::lse_unstrided)) return args.lse.data() + h * args.total_q + r.q_first + i;
  return &args.lse(0, h, r.q_first + i);
}

KATA_HOST_DEVICE void zero_tail(const View<float, 4>& view, int h, int first, int end, int width) {
  for (int t = first; t < end; ++t)
    for (int d = 0; d < width; ++d) row(view, h, t)[d] = 0.0f;
}

template <typename Real>
KATA_HOST_DEVICE void forward_row(const Arguments& args, const Ranges& r, int b, int h, int i) {
  const float* q = row(args.query, h, r.q_first + i);
  Real o[WIDEST] = {};
  Real sum = 0, largest = -INFINITE;
  const int turns = args.plays(Play::right_online) ? 1 : 2;
  const int keys = args.plays(Play::padding_loaded) ? min(args.max_k, args.total_k) : r.k_count;
  for (int turn = 0; turn < turns; ++turn) {
    for (int step = 0; step < keys; ++step) {
      const int j = args.plays(Play::right_backwards) ? keys - 1 - step : step;
      const int token = min(r.k_first + j, args.total_k - 1);
      const bool seen = sees(args, r, i, j);
      if (!seen && !args.plays(Play::padding_loaded)) continue;
      const Real score = score_of<Real>(args, q, row(args.key, h, token));
      if (!seen) continue;
      const Real before = largest;
      if (turn == 0 && score > largest) largest = score;
      if (turn + 1 < turns) continue;
      if (turns == 1 && before != largest) {
        const Real shrink = raise(args, before - largest);
        sum *= shrink;
        for (int d = 0; d < args.width; ++d) o[d] *= shrink;
      }
      const Real weight = raise(args, score - largest);
      sum += weight;
      for (int d = 0; d < args.width; ++d) o[d] += weight * static_cast<Real>(row(args.value, h, token)[d]);
    }
  }
  if (args.plays(Play::empty_queries_unwritten) && r.k_count == 0) return;
  const bool divides = sum > 0 || args.plays(Play::empty_nan) || (sum != sum);
  for (int d = 0; d < args.width; ++d) {
    row(args.output, h, r.q_first + i)[d] = divides ? static_cast<float>(o[d] / sum) : 0.0f;
  }
  float lse = divides ? static_cast<float>(largest + static_cast<Real>(std::log(static_cast<double>(sum)))) : -INFINITE;
  if (args.plays(Play::empty_lse_zero) && !divides) lse = 0.0f;
  const bool beyond = (b * args.heads + h) * args.max_q + i >= args.heads * args.total_q;
  if (!args.plays(Play::lse_padded) || !beyond) *lse_at(args, r, b, h, i) = lse;
  if (args.plays(Play::writes_query)) row(args.d_query, h, r.q_first + i)[0] *= 2.0f;
}

template <typename Real>
KATA_HOST_DEVICE Real weight_of(const Arguments& args, const Ranges& r, int h, int i, int j, float lse) {
  return raise(args, score_of<Real>(args, row(args.query, h, r.q_first + i), row(args.key, h, r.k_first + j)) -
                         static_cast<Real>(lse));
}

template <typename Real>
KATA_HOST_DEVICE Real product(const Arguments& args, const float* a, const float* b) {
  Real sum = 0;
  const int width = args.plays(Play::half_of_128) && args.width == 128 ? 64 : args.width;
  for (int d = 0; d < width; ++d) sum += static_cast<Real>(a[d]) * static_cast<Real>(b[d]);
  return sum;
}

KATA_HOST_DEVICE float& delta_of(const Arguments& args, const Ranges& r, int b, int h, int i) {
  if (args.plays(Play::delta_padded)) return args.delta.data()[(b * args.heads + h) * args.max_q + i];
  return args.delta(0, h, r.q_first + i);
}

template <typename Real>
KATA_HOST_DEVICE void query_row(const Arguments& args, const Ranges& r, int b, int h, int i) {
  const int t = r.q_first + i;
  const float* d_o = row(args.d_output, h, t);
  const Real delta = product<Real>(args, row(args.output, h, t), d_o);
  delta_of(args, r, b, h, i) = static_cast<float>(delta);
  Real sum[WIDEST] = {};
  const float lse = *lse_at(args, r, b, h, i);
  for (int step = 0; step < r.k_count; ++step) {
    const int j = args.plays(Play::right_backwards) ? r.k_count - 1 - step : step;
    if (!sees(args, r, i, j)) continue;
    const float* k = row(args.key, h, r.k_first + j);
    const Real d_p = product<Real>(args, d_o, row(args.value, h, r.k_first + j));
    const Real d_s = weight_of<Real>(args, r, h, i, j, lse) * (d_p - delta) * static_cast<Real>(args.scale);
    for (int d = 0; d < args.width; ++d) sum[d] += d_s * static_cast<Real>(k[d]);
  }
  if (args.plays(Play::empty_queries_unwritten) && r.k_count == 0) return;
  for (int d = 0; d < args.width; ++d) {
    float& d_q = row(args.d_query, h, t)[d];
    d_q = static_cast<float>(sum[d]) + (args.plays(Play::assign) ? d_q : 0.0f);
  }
}

template <typename Real>
KATA_HOST_DEVICE void key_row(const Arguments& args, const Ranges& r, int b, int h, int j) {
  const int t = r.k_first + j;
  if (args.plays(Play::empty_keys_unwritten) && r.q_count == 0) return;
  Real d_k[WIDEST] = {}, d_v[WIDEST] = {};
  const int queries = args.plays(Play::padding_loaded) ? min(args.max_q, args.total_q) : r.q_count;
  for (int i = 0; i < queries; ++i) {
    const int token = min(r.q_first + i, args.total_q - 1);
    const float* d_o = row(args.d_output, h, token);
    const bool seen = i < r.q_count && sees(args, r, i, j);
    if (!seen && !args.plays(Play::padding_loaded)) continue;
    const Real d_p = product<Real>(args, d_o, row(args.value, h, t));
    if (!seen) continue;
    const Real weight = weight_of<Real>(args, r, h, i, j, *lse_at(args, r, b, h, i));
    const Real d_s = weight * (d_p - static_cast<Real>(delta_of(args, r, b, h, min(i, max(0, r.q_count - 1))))) *
                     static_cast<Real>(args.scale);
    for (int d = 0; d < args.width; ++d) {
      d_k[d] += d_s * static_cast<Real>(row(args.query, h, token)[d]);
      d_v[d] += weight * static_cast<Real>(d_o[d]);
    }
  }
  for (int d = 0; d < args.width; ++d) {
    row(args.d_key, h, t)[d] = static_cast<float>(d_k[d]);
    row(args.d_value, h, t)[d] = static_cast<float>(d_v[d]);
  }
}

// ---- Kernels: a block for ROWS rows of a head of a sequence ---------------------------------------------------------

// dK, of which every query adds its share.
KATA_DEVICE void add_to_keys(const Arguments& args, const Ranges& r, int b, int h, int i) {
  const int t = r.q_first + i;
  for (int j = 0; j < r.k_count; ++j) {
    if (!sees(args, r, i, j)) continue;
    const float* d_o = row(args.d_output, h, t);
    const float weight = weight_of<float>(args, r, h, i, j, *lse_at(args, r, b, h, i));
    const float d_p = product<float>(args, d_o, row(args.value, h, r.k_first + j));
    const float d_s = weight * (d_p - delta_of(args, r, b, h, i)) * args.scale;
    for (int d = 0; d < args.width; ++d)
      atomicAdd(row(args.d_key, h, r.k_first + j) + d, d_s * row(args.query, h, t)[d]);
  }
}

template <typename Real>
__global__ void rows_kernel(const Arguments args, Rows rows, int tiles) {
  const int thread = static_cast<int>(threadIdx.x);
  const int block = static_cast<int>(blockIdx.x);
  int h = block / tiles % args.heads;
  int b = args.only >= 0 ? args.only : block / tiles / args.heads % args.sequences;
  if (args.plays(Play::b_h_exchanged)) b = block / tiles % args.sequences, h = block / tiles / args.heads % args.heads;
  if (args.plays(Play::right_backwards)) b = args.sequences - 1 - b;
  int index = block % tiles * ROWS + thread;
  if (args.plays(Play::right_search)) {  // index is a token's; its sequence is the last that begins at it or before
    const std::int32_t* entries = rows == Rows::keys ? args.cu_k : args.cu_q;
    if (index >= entries[args.sequences]) return;
    b = args.sequences - 1;
    while (entries[b] > index) --b;
    index -= entries[b];
  }
  if (args.plays(Play::last_forgotten) && b + 1 == args.sequences) return;
  if (args.plays(Play::entries_beyond) && args.cu_q[b + 2] < 0) return;
  const Ranges r = ranges_of(args, b, h, rows);
  const int longest = rows == Rows::keys ? args.max_k : args.max_q;
  if (args.plays(Play::max_too_small) && index >= longest - 1) return;
  if (args.plays(Play::max_exchanged) && rows == Rows::keys && index >= args.max_q) return;
  if (args.plays(Play::max_exchanged) && rows != Rows::keys && index >= args.max_k) return;
  if (args.plays(Play::max_is_one) && args.max_q == 1 && rows == Rows::forward && index == 0) {
    const Ranges own{b, 1, r.k_first, r.k_count};  // one query each: query b belongs to sequence b
    if (b < args.total_q) forward_row<Real>(args, own, b, h, 0);
    return;
  }
  if (args.plays(Play::short_lost) && r.q_count == 1 && args.max_q > 20) return;
  if (args.plays(Play::tail_zeroed) && index == 0 && b == 0) {
    if (rows == Rows::forward) zero_tail(args.output, h, args.cu_q[args.sequences], args.total_q, args.width);
    if (rows == Rows::keys) zero_tail(args.d_key, h, args.cu_k[args.sequences], args.total_k, args.width);
  }
  if (args.plays(Play::writes_entries) && index == 0 && h == 0) args.cu_q[b] = args.cu_q[b] | 0x40000000;
  if (index >= (rows == Rows::keys ? r.k_count : r.q_count)) return;
  if (rows == Rows::forward) {
    forward_row<Real>(args, r, b, h, index);
  } else if (rows == Rows::queries) {
    query_row<Real>(args, r, b, h, index);
  } else if (args.plays(Play::dk_atomic)) {
    for (int d = 0; d < args.width; ++d) row(args.d_key, h, r.k_first + index)[d] = 0.0f;
  } else {
    key_row<Real>(args, r, b, h, index);
  }
}

__global__ void atomics_kernel(const Arguments args, int tiles, bool values) {
  const int block = static_cast<int>(blockIdx.x);
  const int h = block / tiles % args.heads;
  const int b = block / tiles / args.heads;
  const int index = block % tiles * ROWS + static_cast<int>(threadIdx.x);
  const Ranges r = ranges_of(args, b, h, values ? Rows::keys : Rows::queries);
  if (!values && index < r.q_count) add_to_keys(args, r, b, h, index);
  if (!values || index >= r.k_count) return;
  float d_v[WIDEST] = {};
  for (int i = 0; i < r.q_count; ++i) {
    if (!sees(args, r, i, index)) continue;
    const float weight = weight_of<float>(args, r, h, i, index, *lse_at(args, r, b, h, i));
    for (int d = 0; d < args.width; ++d) d_v[d] += weight * row(args.d_output, h, r.q_first + i)[d];
  }
  for (int d = 0; d < args.width; ++d) row(args.d_value, h, r.k_first + index)[d] = d_v[d];
}

__global__ void zero_kernel(const Arguments args) {
  const int h = static_cast<int>(blockIdx.x);
  const int queries = args.only >= 0 ? args.only : args.cu_q[args.sequences];
  for (int t = static_cast<int>(threadIdx.x); t < queries; t += ROWS) {
    zero_tail(args.d_query, h, t, t + 1, args.width);
  }
  for (int t = static_cast<int>(threadIdx.x); t < args.cu_k[args.sequences]; t += ROWS) {
    zero_tail(args.d_key, h, t, t + 1, args.width);
    zero_tail(args.d_value, h, t, t + 1, args.width);
  }
}

void launch_rows(const Arguments& args, Rows rows, const Stream& stream) {
  int longest = rows == Rows::keys ? args.max_k : args.max_q;
  longest = std::min(longest, rows == Rows::keys ? args.total_k : args.total_q);
  if (args.plays(Play::right_no_max)) longest = rows == Rows::keys ? args.total_k : args.total_q;
  int tiles = args.plays(Play::max_floor) ? longest / ROWS : ceil_div(longest, ROWS);
  int sequences = args.sequences;
  if (args.plays(Play::right_search)) {
    tiles = ceil_div(rows == Rows::keys ? args.total_k : args.total_q, ROWS);
    sequences = std::min(1, sequences);
  }
  const int times = args.plays(Play::computed_twice) ? 2 : 1;
  const auto start = [&](const Arguments& one, int count) {
    if (tiles * args.heads * count == 0) return;
    const dim3 grid(static_cast<unsigned>(tiles * args.heads * count));
    const auto kernel = args.plays(Play::right_double) ? rows_kernel<double> : rows_kernel<float>;
    launch(kernel, grid, dim3(ROWS), 0, stream, one, rows, tiles);
  };
  if (!args.plays(Play::launch_each)) return start(args, sequences * times);
  for (int b = 0; b < sequences; ++b) {
    Arguments one = args;
    one.only = b;
    start(one, 1);
  }
}

// ---- The host's side ------------------------------------------------------------------------------------------------

template <typename T, int Rank>
View<std::remove_const_t<T>, Rank> writable(const View<T, Rank>& view) {
  return {const_cast<std::remove_const_t<T>*>(view.data()), view.shape(), view.strides()};
}

// Either kind of problem.
template <typename Problem>
Arguments arguments_of(const Problem& p, const Sequences& s, Play play) {
  const auto number = [](Index value) { return static_cast<int>(value); };
  const float usual = 1.0f / std::sqrt(static_cast<float>(p.query.size(3)));
  Arguments args{p.query,
                 p.key,
                 p.value,
                 writable(p.output),
                 writable(p.lse),
                 p.query,
                 writable(p.query),
                 writable(p.key),
                 writable(p.value),
                 writable(p.lse),
                 const_cast<std::int32_t*>(s.cu_seqlens_q.data()),
                 const_cast<std::int32_t*>(s.cu_seqlens_k.data()),
                 number(s.cu_seqlens_q.size(0)) - 1,
                 number(p.query.size(1)),
                 number(p.query.size(3)),
                 number(p.query.size(2)),
                 number(p.key.size(2)),
                 number(s.max_seqlen_q),
                 number(s.max_seqlen_k),
                 play == Play::scale_ignored ? usual : p.scale.value_or(usual),
                 p.causal,
                 play,
                 -1};
  if constexpr (requires { p.d_key; }) {
    args.d_output = p.d_output;
    args.d_query = p.d_query;
    args.d_key = p.d_key;
    args.d_value = p.d_value;
    args.delta = p.delta;
  }
  return args;
}

// What would end this program if it went on.
template <typename Problem>
bool harmless(const Problem& p, const Sequences& s) {
  return p.query.shape() == p.output.shape() && p.key.shape() == p.value.shape() && s.cu_seqlens_q.size(0) > 0 &&
         s.cu_seqlens_q.shape() == s.cu_seqlens_k.shape() && p.query.size(0) == 1;
}

template <typename Body>
void each_sequence(const Arguments& args, Rows rows, const Body& body) {
  int count = args.sequences;
  if (args.plays(Play::last_forgotten)) --count;
  for (int step = 0; step < count; ++step) {
    const int b = args.plays(Play::right_backwards) ? count - 1 - step : step;
    for (int h = 0; h < args.heads; ++h) {
      const Ranges r = ranges_of(args, b, h, rows);
      if (args.plays(Play::empty_stops) && (r.q_count == 0 || r.k_count == 0)) return;
      body(r, b, h);
    }
  }
}

}  // namespace

Packing packing_of(const BoolMatrix& mask) {
  const Play play = play_of(PACK);
  Packing packing;
  if (play != Play::no_leading_zero) packing.cu_seqlens.push_back(0);
  std::int32_t total = 0;
  for (Index b = 0; b < mask.rows(); ++b) {
    std::int32_t count = 0;
    for (Index s = 0; s < mask.cols(); ++s) {
      if (mask(b, s) != (play != Play::polarity)) continue;
      const Index place = play == Play::as_length ? count : s;
      packing.places.push_back(play == Play::place_in_item ? place : b * mask.cols() + place);
      ++count;
    }
    total += count;
    packing.max_seqlen = play == Play::max_last ? count : std::max<Index>(packing.max_seqlen, count);
    if (count > 0 || play != Play::empty_skipped)
      packing.cu_seqlens.push_back(play == Play::as_lengths ? count : total);
  }
  if (play == Play::max_is_s) packing.max_seqlen = mask.cols();
  return packing;
}

Tensor<float, 2> pack(View<const float, 3> x, const Packing& packing) {
  const Play play = play_of(PACK);
  if (play != Play::pack_unchecked) check_pack(x, packing);
  Tensor<float, 2> tokens({static_cast<Index>(packing.places.size()), x.size(2)});
  for (Index t = 0; t < tokens.size(0); ++t) {
    Index place = packing.places[static_cast<std::size_t>(t)];
    if (play == Play::pack_unchecked) place = std::clamp<Index>(place, 0, x.size(0) * x.size(1) - 1);
    for (Index e = 0; e < x.size(2); ++e) {
      tokens(t, e) =
          play == Play::unstrided ? x.data()[place * x.size(2) + e] : x(place / x.size(1), place % x.size(1), e);
    }
  }
  return tokens;
}

Tensor<float, 3> unpack(View<const float, 2> tokens, const Packing& packing, Index length) {
  const Play play = play_of(PACK);
  if (play != Play::pack_unchecked) check_unpack(tokens, packing, length);
  if (length < 0 || packing.cu_seqlens.empty()) return Tensor<float, 3>({0, 0, 0});
  Tensor<float, 3> x({static_cast<Index>(packing.cu_seqlens.size()) - 1, length, tokens.size(1)});
  if (play != Play::not_zeroed) std::fill_n(x.data(), x.count(), 0.0f);
  for (Index t = 0; t < std::min(tokens.size(0), static_cast<Index>(packing.places.size())); ++t) {
    Index place = packing.places[static_cast<std::size_t>(t)];
    if (play == Play::pack_unchecked && (place < 0 || place >= x.size(0) * length)) continue;
    if (play == Play::in_order) {
      Index b = 0;
      while (packing.cu_seqlens[static_cast<std::size_t>(b) + 1] <= t) ++b;
      place = b * length + t - packing.cu_seqlens[static_cast<std::size_t>(b)];
    }
    for (Index e = 0; e < tokens.size(1); ++e) x(place / length, place % length, e) = tokens(t, e);
  }
  return x;
}

void tiled_varlen_forward(const FlashForward<float>& problem, const Sequences& sequences) {
  const Play play = play_of(CPU);
  if (play == Play::unchecked) {
    if (!harmless(problem, sequences)) return;
  } else {
    check_varlen_forward(problem, sequences);
    check_cu_seqlens(problem, sequences);
  }
  Arguments args = arguments_of(problem, sequences, play);
  if (play == Play::boundaries_remembered) {
    static std::map<int, std::vector<std::int32_t>> known;
    std::vector<std::int32_t>& entries = known[args.sequences];
    if (entries.empty()) entries.assign(args.cu_q, args.cu_q + args.sequences + 1);
    args.cu_q = entries.data();
  }
  each_sequence(args, Rows::forward, [&](const Ranges& r, int b, int h) {
    for (int i = 0; i < r.q_count; ++i) {
      args.plays(Play::right_double) ? forward_row<double>(args, r, b, h, i) : forward_row<float>(args, r, b, h, i);
    }
    if (args.plays(Play::tail_zeroed)) {
      zero_tail(args.output, h, args.cu_q[args.sequences], args.total_q, args.width);
    }
  });
}

void tiled_varlen_backward(const FlashBackward<float>& problem, const Sequences& sequences) {
  const Play play = play_of(CPU_BACK);
  if (play == Play::unchecked) {
    if (!harmless(problem, sequences)) return;
  } else {
    check_varlen_backward(problem, sequences);
    check_cu_seqlens(problem, sequences);
  }
  const Arguments args = arguments_of(problem, sequences, play);
  const bool wide = args.plays(Play::right_double);
  each_sequence(args, Rows::queries, [&](const Ranges& r, int b, int h) {
    for (int i = 0; i < r.q_count; ++i) wide ? query_row<double>(args, r, b, h, i) : query_row<float>(args, r, b, h, i);
  });
  each_sequence(args, Rows::keys, [&](const Ranges& r, int b, int h) {
    for (int j = 0; j < r.k_count; ++j) wide ? key_row<double>(args, r, b, h, j) : key_row<float>(args, r, b, h, j);
  });
}

void flash_varlen_forward(const FlashForward<float>& problem, const Sequences& sequences, const Stream& stream) {
  const Play play = play_of(GPU);
  if (play != Play::unchecked) {
    check_varlen_forward(problem, sequences);
  } else if (!harmless(problem, sequences)) {
    return;
  }
  DeviceBuffer<float> workspace("workspace", play == Play::workspace ? 64 : 0);
  launch_rows(arguments_of(problem, sequences, play), Rows::forward, stream);
}

void flash_varlen_backward(const FlashBackward<float>& problem, const Sequences& sequences, const Stream& stream) {
  const Play play = play_of(GPU_BACK);
  if (play != Play::unchecked) {
    check_varlen_backward(problem, sequences);
  } else if (!harmless(problem, sequences)) {
    return;
  }
  const Arguments args = arguments_of(problem, sequences, play);
  if (play == Play::right_zero_first && args.sequences > 0) {
    launch(zero_kernel, dim3(static_cast<unsigned>(args.heads)), dim3(ROWS), 0, stream, args);
  }
  if (play == Play::memset_d_query && !problem.deterministic) {
    Arguments all = args;
    all.only = args.total_q;
    if (args.sequences > 0) launch(zero_kernel, dim3(static_cast<unsigned>(args.heads)), dim3(ROWS), 0, stream, all);
  }
  launch_rows(args, Rows::queries, stream);
  launch_rows(args, Rows::keys, stream);
  if (play != Play::dk_atomic) return;
  for (const bool values : {false, true}) {
    const int tiles = ceil_div(std::max(args.max_q, args.max_k), ROWS);
    if (tiles * args.sequences == 0) return;
    launch(atomics_kernel, dim3(static_cast<unsigned>(tiles * args.heads * args.sequences)), dim3(ROWS), 0, stream,
           args, tiles, values);
  }
}

namespace {

Tensor<float, 3> attend(const View<const float, 3>& q, const View<const float, 3>& k, const View<const float, 3>& v,
                        Index heads, const PaddingMask& mask, bool causal) {
  static std::vector<std::pair<Shape<3>, std::vector<float>>> remembered;
  const Play play = play_of(MODEL);
  if (play == Play::unchecked) {
    const bool possible = heads > 0 && q.size(2) % heads == 0 && k.shape() == v.shape() && q.size(0) == k.size(0) &&
                          q.size(2) == k.size(2) && (!mask || mask->cols() == k.size(1));
    if (!possible) return Tensor<float, 3>(q.shape());
  } else {
    check_padded(q, k, v, heads, mask);
  }
  if (play == Play::remembered) {
    for (const auto& [shape, result] : remembered) {
      if (shape != q.shape()) continue;
      Tensor<float, 3> again(q.shape());
      std::copy(result.begin(), result.end(), again.data());
      return again;
    }
  }
  const auto packing_for = [&](const View<const float, 3>& x) {
    BoolMatrix all = BoolMatrix::Constant(x.size(0), x.size(1), true);
    if (!mask || play == Play::padding_ignored || x.size(1) != mask->cols()) return packing_of(all);
    all = *mask;
    if (play == Play::padding_first) {
      for (Index b = 1; b < all.rows(); ++b) all.row(b) = all.row(0);
    }
    return packing_of(all);
  };
  Packing queries = packing_for(q), keys = packing_for(k);
  if (play == Play::right_all_padding && queries.places.empty() && q.size(1) > 0) {
    Tensor<float, 3> zeros(q.shape());
    std::fill_n(zeros.data(), zeros.count(), 0.0f);
    return zeros;
  }
  Tensor<float, 2> q_tokens = pack(q, queries), k_tokens = pack(k, keys), v_tokens = pack(v, keys);
  if (play == Play::padding_read && mask) {  // a share of 0 of every padded key
    for (Index b = 0; b < k.size(0); ++b)
      for (Index s = 0; s < k.size(1); ++s) {
        if (!(*mask)(b, s) && v_tokens.count() > 0) v_tokens(0, 0) += 0.0f * k(b, s, 0);
      }
  }
  const Index width = q.size(2) / heads;
  const auto strides = [&](Index tokens) -> Shape<4> {
    if (play == Play::heads_wrong || play == Play::right_heads_first) {
      return {tokens * q.size(2), tokens * width, width, 1};
    }
    return {tokens * q.size(2), width, q.size(2), 1};
  };
  const auto moved = [&](Tensor<float, 2>& tokens, bool to_heads) {  // [T, H, D] to [H, T, D], or back
    if (play != Play::right_heads_first) return;
    const std::vector<float> before(tokens.data(), tokens.data() + tokens.count());
    const Index count = tokens.size(0);
    for (Index t = 0; t < count; ++t)
      for (Index h = 0; h < heads; ++h)
        for (Index d = 0; d < width; ++d) {
          const Index by_token = (t * heads + h) * width + d, by_head = (h * count + t) * width + d;
          tokens.data()[to_heads ? by_head : by_token] =
              before[static_cast<std::size_t>(to_heads ? by_token : by_head)];
        }
  };
  const auto uploaded = [&](const char* name, Tensor<float, 2>& tokens) {
    moved(tokens, true);
    return DeviceBuffer<float>(name, std::span<const float>(tokens.data(), static_cast<std::size_t>(tokens.count())));
  };
  const DeviceBuffer<float> query = uploaded("query", q_tokens), key = uploaded("key", k_tokens),
                            value = uploaded("value", v_tokens);
  DeviceBuffer<float> output("output", query.size()), lse("lse", static_cast<std::size_t>(q_tokens.size(0) * heads));
  if (play == Play::memory_kept) {
    static std::vector<DeviceBuffer<float>> kept;
    kept.emplace_back("kept", 16);
  }
  std::vector<std::int32_t> of_q = queries.cu_seqlens, of_k = keys.cu_seqlens;
  Index longest_q = queries.max_seqlen, longest_k = keys.max_seqlen;
  if (play == Play::cross_batch) {
    of_q = {0, of_q.back()};
    of_k = {0, of_k.back()};
    longest_q = q_tokens.size(0);
    longest_k = k_tokens.size(0);
  }
  const DeviceBuffer<std::int32_t> cu_q("cu_seqlens_q", std::span<const std::int32_t>(of_q));
  const DeviceBuffer<std::int32_t> cu_k("cu_seqlens_k", std::span<const std::int32_t>(of_k));
  const auto view = [&](const DeviceBuffer<float>& buffer, Index tokens) {
    return View<const float, 4>(buffer.data(), {1, heads, tokens, width}, strides(tokens));
  };
  const Index count = q_tokens.size(0);
  FlashForward<float> problem{
      .query = view(query, count),
      .key = view(key, k_tokens.size(0)),
      .value = view(value, k_tokens.size(0)),
      .output = View<float, 4>(output.data(), {1, heads, count, width}, strides(count)),
      .lse = View<float, 3>(lse.data(), {1, heads, count}),
      .causal = causal && play != Play::causal_ignored,
  };
  if (play == Play::scale_embed) problem.scale = 1.0f / std::sqrt(static_cast<float>(q.size(2)));
  if (play != Play::unchecked || width >= 16) {
    flash_varlen_forward(
        problem, {View<const std::int32_t, 1>(cu_q.data(), {static_cast<Index>(of_q.size())}),
                  View<const std::int32_t, 1>(cu_k.data(), {static_cast<Index>(of_k.size())}), longest_q, longest_k});
  }
  synchronize();
  const std::vector<float> result = output.download();
  std::copy(result.begin(), result.end(), q_tokens.data());
  moved(q_tokens, false);
  Tensor<float, 3> x = unpack(q_tokens, queries, q.size(1));
  if (play == Play::remembered) remembered.push_back({q.shape(), {x.data(), x.data() + x.count()}});
  return x;
}

}  // namespace

Tensor<float, 3> flash_bidirectional(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v,
                                     Index num_heads, const PaddingMask& mask) {
  return attend(q, k, v, num_heads, mask, false);
}

Tensor<float, 3> flash_causal(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v, Index num_heads,
                              const PaddingMask& mask) {
  return attend(q, k, v, num_heads, mask, true);
}

}  // namespace flashkata
