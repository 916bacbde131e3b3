// Answers to 05_grouped, wrong and right. Every deviation stands where somebody made it, or could have.
//
// One query or one key a thread, in float; the width of a row is an argument, so that each kernel is compiled once for
// each type. Most mistakes are about which pairs see each other: those are made in one place, for the CPU's path and
// for all kernels, and an answer says in which of the step's functions it makes them.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "../corpus.hpp"
#include "grouped.hpp"

namespace flashkata {
namespace {

using corpus::RIGHT;
using corpus::UNNAMED;

// X(what the code calls it, the function that it spoils, the answer's name, its mistake)
// clang-format off
#define KERNELS(X, id, mistake) \
  X(id, fused, mistake ": fused forward", mistake) X(id, fused_backward, mistake ": fused backward", mistake)
#define PATHS(X, id, mistake) \
  X(id, cpu_forward, mistake ": cpu forward", mistake) X(id, fused, mistake ": fused forward", mistake)
#define GROUPED_ANSWERS(X) \
  PATHS(X, slice_length, "grouped-slice-length") \
  X(slice_length, fused_backward, "grouped-slice-length: fused backward", "grouped-slice-length") \
  X(slice_from_zero, fused, "grouped-slice-from-zero: fused forward", "grouped-slice-from-zero") \
  X(slice_ignored, fused, "grouped-slice-ignored: fused forward", "grouped-slice-ignored") \
  X(end_as_length, cpu_forward, "grouped-end-as-length: cpu forward", "grouped-end-as-length") \
  X(end_inclusive, fused_backward, "grouped-end-inclusive: fused backward", "grouped-end-inclusive") \
  X(last_key_lost, fused, "grouped-last-key-lost: fused forward", "grouped-last-key-lost") \
  X(own_places, fused, "grouped-own-places: fused forward", "grouped-own-places") \
  X(order_assumed, cpu_forward, "grouped-order-assumed: cpu forward", "grouped-order-assumed") \
  KERNELS(X, empty_stops, "grouped-empty-stops") \
  X(unions, fused, "grouped-union: fused forward", "grouped-union") \
  X(sixteen_keys, fused, "slices rounded out to multiples of 16", "grouped-slice-rounded") \
  KERNELS(X, causal_whole, "grouped-causal-whole") \
  PATHS(X, causal_packed, "grouped-causal-packed") \
  X(causal_alignment, cpu_backward, "causal-alignment: cpu backward", "causal-alignment") \
  KERNELS(X, causal_alignment, "causal-alignment") \
  X(causal_strict, fused_backward, "causal-strict: fused backward", "causal-strict") \
  X(causal_plus_one, fused, "causal-plus-one: fused forward", "causal-plus-one") \
  X(causal_clamped, fused, "causal-offset-clamped: fused forward", "causal-offset-clamped") \
  X(causal_only_square, fused, "causal-only-square: fused forward", "causal-only-square") \
  X(causal_ignored, fused, "causal-ignored: fused forward", "causal-ignored") \
  X(causal_ignored, fused_backward, "bwd-mask-ignored: fused backward", "bwd-mask-ignored") \
  KERNELS(X, boundary, "grouped-boundary") \
  KERNELS(X, tile_spans, "grouped-tile-spans") \
  X(same_slice_once, cpu_backward, "grouped-same-slice-once: cpu backward", "grouped-same-slice-once") \
  X(same_slice_once, fused_backward, "grouped-same-slice-once: fused backward", "grouped-same-slice-once") \
  X(sixteen_groups, fused, "groups beyond the sixteenth forgotten", UNNAMED) \
  X(hundred_groups, fused, "groups beyond the hundredth forgotten", UNNAMED) \
  X(separate_slice, separate, "separate calls on all keys", "grouped-slice-ignored") \
  X(separate_gaps, separate, "separate calls leave the gaps", UNNAMED) \
  X(separate_heads, separate, "separate calls with the wrong stride of heads", "gqa-head-mapping") \
  X(separate_copies, separate, "separate calls on copies", "beyond the arguments") \
  X(gaps_unwritten, fused, "rows of no group unwritten, fused", UNNAMED) \
  X(gaps_unwritten, fused_backward, "rows of no group unwritten, fused backward", UNNAMED) \
  X(blind_unwritten, fused, "queries of an empty slice left unwritten", "causal-empty-tile-row") \
  X(blind_nan, fused, "all-masked-nan", "all-masked-nan") \
  X(nan_leak, fused, "NaN of foreign values leaks", UNNAMED) \
  X(nan_leak, fused_backward, "NaN of foreign keys leaks, backward", UNNAMED) \
  X(nan_hidden, fused, "NaN taken for nothing", UNNAMED) \
  X(heads_interleaved, fused, "gqa-head-mapping: fused forward", "gqa-head-mapping") \
  X(heads_interleaved, fused_backward, "gqa-head-mapping: fused backward", "gqa-head-mapping") \
  X(heads_first, fused, "heads-first-only", "heads-first-only") \
  X(heads_beyond_16, fused, "heads beyond the sixteenth forgotten", UNNAMED) \
  X(gqa_overwrite, cpu_backward, "gqa-bwd-overwrite: cpu backward", "gqa-bwd-overwrite") \
  X(gqa_overwrite, fused_backward, "gqa-bwd-overwrite: fused backward", "gqa-bwd-overwrite") \
  X(gqa_16_bits, fused_backward, "heads added up in 16 bits", UNNAMED) \
  X(overlap_overwrite, cpu_backward, "grouped-overlap-overwrite: cpu backward", "grouped-overlap-overwrite") \
  X(overlap_overwrite, fused_backward, "grouped-overlap-overwrite: fused backward", "grouped-overlap-overwrite") \
  X(overlap_16_bits, fused_backward, "groups added up in 16 bits", UNNAMED) \
  X(overlap_race, fused_backward, "grouped-overlap-race", "global-memory race") \
  X(overlap_average, fused_backward, "bwd-averaged over groups", UNNAMED) \
  X(not_zeroed, cpu_backward, "added to what the memory held, cpu", UNNAMED) \
  X(not_zeroed, fused_backward, "added to what the memory held", UNNAMED) \
  X(sums_not_zeroed, fused_backward, "bwd-accum-not-zeroed", "bwd-accum-not-zeroed") \
  X(unseen_unwritten, fused_backward, "gradients of keys in no slice unwritten", UNNAMED) \
  X(deterministic_ignored, fused_backward, "deterministic ignored", UNNAMED) \
  X(no_delta, fused_backward, "bwd-no-D", "bwd-no-D") \
  X(dq_no_scale, fused_backward, "bwd-dq-no-scale: fused backward", "bwd-dq-no-scale") \
  X(dk_no_scale, fused_backward, "bwd-dk-no-scale", "bwd-dk-no-scale") \
  X(start_block, fused_backward, "bwd-causal-start-block", "bwd-causal-start-block") \
  X(no_rescale, fused, "no-rescale", "no-rescale") \
  X(no_division, fused, "no-final-div", "no-final-div") \
  X(max_from_zero, fused, "max of scores taken from 0", UNNAMED) \
  X(no_max, fused, "no maximum subtracted", UNNAMED) \
  X(lse_base2, fused, "lse-base2", "lse-base2") \
  X(scale_ignored, fused, "scale-arg-ignored: fused forward", "scale-arg-ignored") \
  X(scale_zero, fused, "scale-zero-as-default", "scale-zero-as-default") \
  X(half_of_128, fused, "half of the channels at width 128", UNNAMED) \
  X(packed, fused, "noncontiguous-stride", "noncontiguous-stride") \
  X(packed_d_output, fused_backward, "bwd-dO-stride", "bwd-dO-stride") \
  X(packed_cpu_lse, cpu_backward, "lse read as if packed, cpu", UNNAMED) \
  X(group_at_a_time, fused, "a launch for each group", "rows loaded") \
  X(head_at_a_time, fused, "a block for each query head", "rows loaded") \
  X(not_skipped, fused, "walks all keys", "rows loaded") \
  X(bwd_not_skipped, fused_backward, "meets all groups", "rows loaded") \
  X(bwd_group_at_a_time, fused_backward, "keys loaded for each group", "rows loaded") \
  X(remembered, fused, "a plan kept for calls of the same shape", UNNAMED) \
  X(remembered_backward, fused_backward, "gradients kept for calls of the same shape", UNNAMED) \
  X(workspace, fused, "the groups in memory of its own", "beyond the arguments") \
  X(writes_query, fused, "scales the queries in place", "is an input") \
  X(cpu_scratch, cpu_backward, "writes the scratch, cpu", UNNAMED) \
  X(unchecked, fused, "groups unchecked, fused forward", UNNAMED) \
  X(unchecked, fused_backward, "groups unchecked, fused backward", UNNAMED) \
  X(unchecked, separate, "groups unchecked, separate", UNNAMED) \
  X(late_check, fused, "checks when it has written", UNNAMED) \
  X(no_barrier_before, fused, "no barrier before the load", "shared-memory race") \
  X(no_barrier_after, fused_backward, "no barrier after the load", "shared-memory race") \
  X(unguarded_keys, fused, "keys loaded beyond the last", "out of bounds") \
  X(right_exp2, everywhere, "right: exp2 with the scale folded in", RIGHT) \
  X(right_double, everywhere, "right: double sums", RIGHT) \
  X(right_backwards, everywhere, "right: tiles and groups backwards", RIGHT) \
  X(right_gaps, everywhere, "right: gaps are groups without keys", RIGHT) \
  X(right_no_scratch, everywhere, "right: delta where it is used, scratch untouched", RIGHT) \
  X(right_wide_blocks, everywhere, "right: blocks of 128 queries, tiles of 16 keys", RIGHT) \
  X(right_two_kernels, everywhere, "right: dV and dK by two kernels", RIGHT) \
  X(right_packed_heads, everywhere, "right: rows of all heads without padding", RIGHT)
// clang-format on

enum class Play {
  none,
  slice_length,
  slice_from_zero,
  slice_ignored,
  end_as_length,
  end_inclusive,
  last_key_lost,
  own_places,
  order_assumed,
  empty_stops,
  unions,
  sixteen_keys,
  causal_whole,
  causal_packed,
  causal_alignment,
  causal_strict,
  causal_plus_one,
  causal_clamped,
  causal_only_square,
  causal_ignored,
  boundary,
  tile_spans,
  same_slice_once,
  sixteen_groups,
  hundred_groups,
  separate_slice,
  separate_gaps,
  separate_heads,
  separate_copies,
  gaps_unwritten,
  blind_unwritten,
  blind_nan,
  nan_leak,
  nan_hidden,
  heads_interleaved,
  heads_first,
  heads_beyond_16,
  gqa_overwrite,
  gqa_16_bits,
  overlap_overwrite,
  overlap_16_bits,
  overlap_race,
  overlap_average,
  not_zeroed,
  sums_not_zeroed,
  unseen_unwritten,
  deterministic_ignored,
  no_delta,
  dq_no_scale,
  dk_no_scale,
  start_block,
  no_rescale,
  no_division,
  max_from_zero,
  no_max,
  lse_base2,
  scale_ignored,
  scale_zero,
  half_of_128,
  packed,
  packed_d_output,
  packed_cpu_lse,
  group_at_a_time,
  head_at_a_time,
  not_skipped,
  bwd_not_skipped,
  bwd_group_at_a_time,
  remembered,
  remembered_backward,
  workspace,
  writes_query,
  cpu_scratch,
  unchecked,
  late_check,
  no_barrier_before,
  no_barrier_after,
  unguarded_keys,
  right_exp2,
  right_double,
  right_backwards,
  right_gaps,
  right_no_scratch,
  right_wide_blocks,
  right_two_kernels,
  right_packed_heads,
};

enum class Where { cpu_forward, cpu_backward, separate, fused, fused_backward, everywhere };

const corpus::Answers answers{
#define X(id, where, name, mistake) {name, mistake},
    GROUPED_ANSWERS(X)
#undef X
};

// What this run plays in that function.
Play play_in(Where here) {
#define X(id, where, answer, mistake) \
  if (corpus::name() == answer)       \
    return Where::where == here || Where::where == Where::everywhere ? Play::id : Play::none;
  GROUPED_ANSWERS(X)
#undef X
  return Play::none;
}

constexpr int WIDEST = 128;
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504f;

// The groups as a kernel gets them, and the rows that each has: for every query head of one key/value head its queries,
// rounded up to a multiple of 16.
struct Table {
  int count = 0;
  int q_begin[2 * MOST_GROUPS + 1], q_end[2 * MOST_GROUPS + 1];
  int k_begin[2 * MOST_GROUPS + 1], k_end[2 * MOST_GROUPS + 1];
  int first_row[2 * MOST_GROUPS + 2];
};

// What forward and backward, host and kernels have in common.
struct Common {
  Play play = Play::none;
  Table table = {};
  int queries = 0, keys = 0, width = 0;
  int heads = 0, kv_heads = 0, sharing = 0;
  int threads = 64, tile = 32;
  float scale = 1.0f;
  bool causal = false;
};

struct Range {
  int begin, end;
  KATA_BOTH bool holds(int j) const { return begin <= j && j < end; }
};

// The keys that query i of group g sees.
KATA_BOTH Range seen_by(const Common& c, int g, int i) {
  const Table& table = c.table;
  if (c.play == Play::boundary) {
    for (int other = 0; other < table.count; ++other) {
      if (table.q_end[other] == i && table.q_begin[other] < i) g = other;
    }
  }
  if (c.play == Play::tile_spans) {
    for (int other = 0; other < table.count; ++other) {
      if (table.q_begin[other] <= i / 16 * 16 && i / 16 * 16 < table.q_end[other]) g = other;
    }
  }
  const int q_begin = table.q_begin[g], k_begin = table.k_begin[g], k_end = table.k_end[g];
  const int queries = table.q_end[g] - q_begin, keys = k_end - k_begin;
  int end = k_end;
  if (c.causal && c.play != Play::causal_ignored) {
    const int offset = keys - queries;
    int seen = i - q_begin + 1 + offset;
    if (c.play == Play::causal_alignment) seen = i - q_begin + 1;
    if (c.play == Play::causal_strict) seen -= 1;
    if (c.play == Play::causal_plus_one) seen += 1;
    if (c.play == Play::causal_clamped && offset < 0) seen = i - q_begin + 1;
    if (c.play == Play::causal_only_square && offset != 0) seen = keys;
    if (c.play == Play::causal_whole) seen = i + c.keys - c.queries + 1 - k_begin;
    if (c.play == Play::causal_packed) seen = i + 1 - k_begin;
    if (seen < 0) seen = 0;
    if (seen < keys) end = k_begin + seen;
  }
  return {k_begin, end < k_begin ? k_begin : end};
}

// The key/value head that a query head reads.
KATA_BOTH int kv_head_of(const Common& c, int h) {
  if (c.play == Play::heads_interleaved || c.play == Play::separate_heads) return h % c.kv_heads;
  if (c.play == Play::heads_first) return 0;
  return h / c.sharing;
}

Group group_of(const Table& table, int g) {
  return {table.q_begin[g], table.q_end[g], table.k_begin[g], table.k_end[g]};
}

// The groups as somebody has understood them.
std::vector<Group> understood(std::span<const Group> groups, Play play, Index queries, Index keys) {
  std::vector<Group> all(groups.begin(), groups.end());
  const auto clamp = [keys](Index j) { return std::clamp<Index>(j, 0, keys); };
  if (play == Play::right_backwards) std::reverse(all.begin(), all.end());
  if (play == Play::right_gaps) {
    std::sort(all.begin(), all.end(), [](const Group& one, const Group& other) { return one.q_begin < other.q_begin; });
    std::vector<Group> gaps;
    Index end = 0;
    for (const Group& group : all) {
      if (group.q_begin == group.q_end) continue;
      if (end < group.q_begin) gaps.push_back({end, group.q_begin, 0, 0});
      end = group.q_end;
    }
    if (end < queries) gaps.push_back({end, queries, 0, 0});
    all.insert(all.end(), gaps.begin(), gaps.end());
  }
  if (all.empty()) return all;
  const std::vector<Group> given = all;
  const auto is_empty = [](const Group& g) { return g.q_begin == g.q_end || g.k_begin == g.k_end; };
  for (std::size_t g = 0; g < all.size(); ++g) {
    Group& group = all[g];
    if (play == Play::slice_length) group.k_end = clamp(group.k_begin + given[0].k_end - given[0].k_begin);
    if (play == Play::slice_from_zero) group.k_begin = 0;
    if (play == Play::slice_ignored || play == Play::separate_slice) group.k_begin = 0, group.k_end = keys;
    if (play == Play::end_as_length) group.k_end = clamp(group.k_begin + group.k_end);
    if (play == Play::end_inclusive) group.k_end = clamp(group.k_end + 1);
    if (play == Play::last_key_lost) group.k_end = std::max(group.k_begin, group.k_end - 1);
    if (play == Play::own_places) group.k_begin = clamp(group.q_begin), group.k_end = clamp(group.q_end);
    if (play == Play::order_assumed) group.q_begin = g == 0 ? 0 : std::min(given[g - 1].q_end, group.q_end);
    if (play == Play::sixteen_keys) {
      group.k_begin = group.k_begin / 16 * 16;
      group.k_end = clamp((group.k_end + 15) / 16 * 16);
    }
    if (play == Play::unions && !is_empty(group)) {
      for (const Group& other : given) {
        if (is_empty(other) || other.k_end <= given[g].k_begin || given[g].k_end <= other.k_begin) continue;
        group.k_begin = std::min(group.k_begin, other.k_begin);
        group.k_end = std::max(group.k_end, other.k_end);
      }
    }
  }
  if (play == Play::empty_stops) all.erase(std::find_if(all.begin(), all.end(), is_empty), all.end());
  if (play == Play::sixteen_groups && all.size() > 16) all.resize(16);
  if (play == Play::hundred_groups && all.size() > 100) all.resize(100);
  if (play == Play::same_slice_once) {
    std::vector<Group> once;
    for (const Group& group : all) {
      const bool again = std::any_of(once.begin(), once.end(), [&](const Group& other) {
        return other.k_begin == group.k_begin && other.k_end == group.k_end;
      });
      if (!again) once.push_back(group);
    }
    all = once;
  }
  return all;
}

template <typename Problem>
Common common_of(const Problem& p, std::span<const Group> groups, Play play) {
  Common c;
  c.play = play;
  c.queries = static_cast<int>(p.query.size(2));
  c.keys = static_cast<int>(p.key.size(2));
  c.width = static_cast<int>(p.query.size(3));
  c.heads = static_cast<int>(p.query.size(1));
  c.kv_heads = static_cast<int>(p.key.size(1));
  c.sharing = c.heads / c.kv_heads;
  c.causal = p.causal;
  const float usual = 1.0f / std::sqrt(static_cast<float>(c.width));
  c.scale = p.scale.value_or(usual);
  if (play == Play::scale_ignored) c.scale = usual;
  if (play == Play::scale_zero && c.scale == 0.0f) c.scale = usual;
  if (play == Play::right_wide_blocks) c.threads = 128, c.tile = 16;
  const int unit = play == Play::right_packed_heads ? 1 : 16;
  Table& table = c.table;
  table.first_row[0] = 0;
  for (const Group& group : understood(groups, play, p.query.size(2), p.key.size(2))) {
    const int g = table.count++;
    table.q_begin[g] = static_cast<int>(group.q_begin);
    table.q_end[g] = static_cast<int>(group.q_end);
    table.k_begin[g] = static_cast<int>(group.k_begin);
    table.k_end[g] = static_cast<int>(group.k_end);
    const int padded = (table.q_end[g] - table.q_begin[g] + unit - 1) / unit * unit;
    table.first_row[g + 1] = table.first_row[g] + padded * c.sharing;
  }
  return c;
}

// Whose row is this, of those that read one key/value head?
struct Row {
  int group = 0, head = 0, query = 0;
  bool exists = false;
};

KATA_DEVICE Row row_of(const Common& c, int kv, int row) {
  const Table& table = c.table;
  Row found;
  while (found.group < table.count && row >= table.first_row[found.group + 1]) ++found.group;
  if (found.group == table.count) return found;
  const int padded = (table.first_row[found.group + 1] - table.first_row[found.group]) / c.sharing;
  const int local = row - table.first_row[found.group];
  const bool interleaved = c.play == Play::heads_interleaved || c.play == Play::separate_heads;
  found.head = interleaved ? kv + local / padded * c.kv_heads : kv * c.sharing + local / padded;
  found.query = table.q_begin[found.group] + local % padded;
  found.exists = found.query < table.q_end[found.group];
  if (c.play == Play::heads_beyond_16 && found.head >= 16) found.exists = false;
  return found;
}

KATA_DEVICE bool is_in_a_group(const Common& c, int i) {
  for (int g = 0; g < c.table.count; ++g) {
    if (c.table.q_begin[g] <= i && i < c.table.q_end[g]) return true;
  }
  return false;
}

struct alignas(16) Eight {
  std::uint16_t at[8];
};

// Rows of keys or values, or of queries, into shared memory: rows x width, zeros where there is no row.
template <typename T>
KATA_DEVICE void load_rows(const Common& c, float* smem, const View<const T, 4>& view, int h, int first, int rows,
                           int end) {
  for (int index = 8 * static_cast<int>(threadIdx.x); index < rows * c.width;
       index += 8 * static_cast<int>(blockDim.x)) {
    const int row = first + index / c.width;
    Eight eight{};
    if (row < end) {
      const T* from = &view(0, h, row, index % c.width);
      if (c.play == Play::packed)
        from = view.data() + (static_cast<Index>(h) * view.size(2) + row) * c.width + index % c.width;
      eight = *reinterpret_cast<const Eight*>(from);
    }
    for (int n = 0; n < 8; ++n) smem[index + n] = to_float(T{eight.at[n]});
  }
}

template <typename T>
struct ForwardArguments {
  Common c;
  FlashForward<T> p;
};

template <typename T>
KATA_DEVICE float in_bits_of(float x) {
  return to_float(from_float<T>(x));
}

template <typename T, typename Real>
__global__ void forward_kernel(const ForwardArguments<T> a) {
  const Common& c = a.c;
  const Play play = c.play;
  const int thread = static_cast<int>(threadIdx.x);
  const bool per_head = play == Play::head_at_a_time;
  const int kv = per_head ? static_cast<int>(blockIdx.y) / c.sharing : static_cast<int>(blockIdx.y);
  const Row row = row_of(c, kv, static_cast<int>(blockIdx.x) * c.threads + thread);
  const bool mine = row.exists && (!per_head || row.head == static_cast<int>(blockIdx.y));
  const Range seen = mine ? seen_by(c, row.group, row.query) : Range{0, 0};

  int* begin_smem = dynamic_shared<int>();
  int* end_smem = begin_smem + c.threads;
  float* k_smem = reinterpret_cast<float*>(end_smem + c.threads);  // [tile, width]
  float* v_smem = k_smem + c.tile * c.width;                       // [tile, width]
  begin_smem[thread] = seen.begin;
  end_smem[thread] = seen.end;
  __syncthreads();
  int first = c.keys, last = 0;
  for (int other = 0; other < c.threads; ++other) {
    if (begin_smem[other] == end_smem[other]) continue;
    first = min(first, begin_smem[other]);
    last = max(last, end_smem[other]);
  }
  if (play == Play::not_skipped) first = 0, last = c.keys;
  if (play == Play::blind_unwritten && first >= last) return;

  Real out[WIDEST];
  float q[WIDEST];
  for (int d = 0; d < c.width; ++d) {
    q[d] = mine ? to_float(a.p.query(0, row.head, row.query, d)) : 0.0f;
    out[d] = 0;
  }
  if (play == Play::writes_query && mine) {
    const_cast<T&>(a.p.query(0, row.head, row.query, 0)) = from_float<T>(q[0] * c.scale);
  }
  Real row_max = play == Play::max_from_zero ? Real{0} : static_cast<Real>(-INFINITE);
  Real row_sum = 0;
  const int first_tile = first / c.tile, last_tile = (last + c.tile - 1) / c.tile;
  for (int turn = first_tile; turn < last_tile; ++turn) {
    const int kv_first = (play == Play::right_backwards ? first_tile + last_tile - 1 - turn : turn) * c.tile;
    bool needed = play == Play::not_skipped;
    for (int other = 0; other < c.threads; ++other) {
      needed |=
          begin_smem[other] < kv_first + c.tile && kv_first < end_smem[other] && begin_smem[other] < end_smem[other];
    }
    if (!needed) continue;
    if (play != Play::no_barrier_before) __syncthreads();
    const int end = play == Play::unguarded_keys ? kv_first + c.tile : c.keys;
    load_rows(c, k_smem, a.p.key, play == Play::heads_first ? 0 : kv, kv_first, c.tile, end);
    load_rows(c, v_smem, a.p.value, play == Play::heads_first ? 0 : kv, kv_first, c.tile, end);
    __syncthreads();
    if (!mine) continue;
    Real scores[32];
    Real tile_max = row_max;
    for (int j = 0; j < c.tile; ++j) {
      scores[j] = static_cast<Real>(-INFINITE);
      if (!seen.holds(kv_first + j)) continue;
      Real product = 0;
      const int width = play == Play::half_of_128 && c.width == 128 ? 64 : c.width;
      for (int d = 0; d < width; ++d) product += static_cast<Real>(q[d]) * static_cast<Real>(k_smem[j * c.width + d]);
      scores[j] = product * static_cast<Real>(c.scale);
      tile_max = scores[j] > tile_max || scores[j] != scores[j] ? scores[j] : tile_max;
    }
    if (play == Play::no_max) tile_max = 0;
    const bool nothing = tile_max == static_cast<Real>(-INFINITE);
    const Real shift = nothing && play != Play::blind_nan ? Real{0} : tile_max;
    const Real rescale = static_cast<Real>(exp(static_cast<double>(row_max - shift)));
    row_max = tile_max;
    const bool no_rescale = play == Play::no_rescale;
    if (!no_rescale) row_sum *= play == Play::no_max ? Real{1} : rescale;
    for (int d = 0; d < c.width; ++d) {
      if (!no_rescale && play != Play::no_max) out[d] *= rescale;
    }
    for (int j = 0; j < c.tile; ++j) {
      const bool sees = seen.holds(kv_first + j);
      if (!sees && play != Play::nan_leak) continue;
      Real weight = 0;
      if (sees && play == Play::right_exp2) {
        weight = static_cast<Real>(exp2f(static_cast<float>(scores[j] - shift) * LOG2E));
      } else if (sees) {
        weight = static_cast<Real>(exp(static_cast<double>(scores[j] - shift)));
      }
      row_sum += weight;
      for (int d = 0; d < c.width; ++d) {
        const float value = v_smem[j * c.width + d];
        if (play == Play::nan_hidden && value != value) continue;
        out[d] += weight * static_cast<Real>(value);
      }
    }
  }
  if (!mine) return;
  const bool blind = seen.begin == seen.end;
  for (int d = 0; d < c.width; ++d) {
    Real value = blind && play != Play::blind_nan ? Real{0} : out[d] / row_sum;
    if (play == Play::no_division) value = out[d];
    a.p.output(0, row.head, row.query, d) = from_float<T>(static_cast<float>(value));
  }
  float lse = static_cast<float>(row_max + static_cast<Real>(log(static_cast<double>(row_sum))));
  if (play == Play::lse_base2) lse *= LOG2E;
  if (blind) lse = -INFINITE;
  a.p.lse(0, row.head, row.query) = lse;
}

// Queries of no group.
template <typename T>
__global__ void blank_kernel(const ForwardArguments<T> a) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int h = static_cast<int>(blockIdx.y);
  if (i >= a.c.queries || is_in_a_group(a.c, i)) return;
  for (int d = 0; d < a.c.width; ++d) a.p.output(0, h, i, d) = from_float<T>(0.0f);
  a.p.lse(0, h, i) = -INFINITE;
}

dim3 grid(Index x, Index y) { return {static_cast<unsigned>(x), static_cast<unsigned>(y)}; }

template <typename T>
void launch_forward(const ForwardArguments<T>& a, const Stream& stream) {
  const Common& c = a.c;
  const Index blocks = ceil_div(c.table.first_row[c.table.count], c.threads);
  const auto shared = static_cast<std::size_t>(2 * c.threads + 2 * c.tile * c.width) * sizeof(float);
  const auto kernel = c.play == Play::right_double ? forward_kernel<T, double> : forward_kernel<T, float>;
  const Index heads = c.play == Play::head_at_a_time ? c.heads : c.kv_heads;
  if (blocks > 0 && heads > 0) {
    launch(kernel, grid(blocks, heads), dim3(static_cast<unsigned>(c.threads)), shared, stream, a);
  }
}

template <typename T>
void launch_blank(const ForwardArguments<T>& a, const Stream& stream) {
  if (a.c.queries == 0 || a.c.heads == 0) return;
  launch(blank_kernel<T>, grid(ceil_div(a.c.queries, 64), a.c.heads), dim3(64), 0, stream, a);
}

// Wrong groups that this program survives.
bool survives(std::span<const Group> groups, Index queries, Index keys) {
  for (const Group& g : groups) {
    if (g.q_begin < 0 || g.q_end > queries || g.k_begin < 0 || g.k_end > keys) return false;
  }
  return groups.size() <= static_cast<std::size_t>(MOST_GROUPS);
}

template <typename T>
void forward(const FlashForward<T>& problem, std::span<const Group> groups, const Stream& stream, Where where) {
  const Play play = play_in(where);
  if (play == Play::unchecked) {
    check_flash_forward(problem, KeyHeads::shared);
    if (problem.query.size(0) != 1 || !survives(groups, problem.query.size(2), problem.key.size(2))) return;
  } else if (play == Play::late_check) {
    if (problem.output.count() > 0) launch_blank(ForwardArguments<T>{common_of(problem, {}, play), problem}, stream);
    check_grouped_forward(problem, groups);
  } else {
    check_grouped_forward(problem, groups);
  }
  ForwardArguments<T> a{common_of(problem, groups, play), problem};
  if (play == Play::remembered) {
    static std::map<std::vector<int>, Table> plans;
    a.c.table = plans.insert({{a.c.queries, a.c.keys, a.c.heads, a.c.width, a.c.table.count}, a.c.table}).first->second;
  }
  DeviceBuffer<int> own("groups", play == Play::workspace ? 64 : 0);
  DeviceBuffer<T> copies("copies", play == Play::separate_copies ? 4096 : 0);
  if (play != Play::gaps_unwritten && play != Play::separate_gaps && play != Play::right_gaps) launch_blank(a, stream);
  if (where != Where::separate && play != Play::group_at_a_time) return launch_forward(a, stream);
  const Table table = a.c.table;
  for (int g = 0; g < table.count; ++g) {
    const std::vector<Group> one{group_of(table, g)};
    ForwardArguments<T> part{common_of(problem, one, Play::none), problem};
    part.c.play = play;
    part.c.scale = a.c.scale;
    part.c.causal = a.c.causal;
    launch_forward(part, stream);
  }
}

// ---- Backward -------------------------------------------------------------------------------------------------------

template <typename T>
struct BackwardArguments {
  Common c;
  FlashBackward<T> p;
  bool atomics, for_dk, for_dv;
};

template <typename T>
KATA_DEVICE const T* d_output_row(const BackwardArguments<T>& a, int h, int i) {
  if (a.c.play == Play::packed_d_output) {
    return a.p.d_output.data() + (static_cast<Index>(h) * a.c.queries + i) * a.c.width;
  }
  return &a.p.d_output(0, h, i, 0);
}

template <typename T>
KATA_DEVICE float delta_of(const BackwardArguments<T>& a, int h, int i) {
  float delta = 0.0f;
  const T* d_output = d_output_row(a, h, i);
  for (int d = 0; d < a.c.width; ++d) delta += to_float(d_output[d]) * to_float(a.p.output(0, h, i, d));
  return a.c.play == Play::no_delta ? 0.0f : delta;
}

template <typename T>
__global__ void delta_kernel(const BackwardArguments<T> a) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int h = static_cast<int>(blockIdx.y);
  if (i >= a.c.queries) return;
  a.p.delta(0, h, i) = delta_of(a, h, i);
  if (!a.atomics || a.c.play == Play::sums_not_zeroed) return;
  for (int d = 0; d < a.c.width; ++d) a.p.d_query_sum(0, h, i, d) = 0.0f;
}

template <typename T>
__global__ void convert_kernel(const BackwardArguments<T> a) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int h = static_cast<int>(blockIdx.y);
  if (i >= a.c.queries) return;
  if (a.c.play == Play::gaps_unwritten && !is_in_a_group(a.c, i)) return;
  const float scale = a.c.play == Play::dq_no_scale ? 1.0f : a.c.scale;
  for (int d = 0; d < a.c.width; ++d) a.p.d_query(0, h, i, d) = from_float<T>(scale * a.p.d_query_sum(0, h, i, d));
}

// Queries of no group, where nobody else writes them.
template <typename T>
__global__ void blank_gradient_kernel(const BackwardArguments<T> a) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= a.c.queries || is_in_a_group(a.c, i)) return;
  for (int d = 0; d < a.c.width; ++d) a.p.d_query(0, static_cast<int>(blockIdx.y), i, d) = from_float<T>(0.0f);
}

template <typename Real>
struct Pair {
  Real weight, d_score;
};

template <typename T, typename Real>
KATA_DEVICE Pair<Real> pair_of(const BackwardArguments<T>& a, const float* q, const float* k, const float* d_output,
                               const float* v, float lse, float delta) {
  const Play play = a.c.play;
  Real product = 0, d_weight = 0;
  for (int d = 0; d < a.c.width; ++d) {
    product += static_cast<Real>(q[d]) * static_cast<Real>(k[d]);
    d_weight += static_cast<Real>(d_output[d]) * static_cast<Real>(v[d]);
  }
  const Real score = product * static_cast<Real>(a.c.scale);
  Real weight;
  if (play == Play::right_exp2) {
    weight = static_cast<Real>(exp2f(static_cast<float>(score) * LOG2E - lse * LOG2E));
  } else {
    weight = static_cast<Real>(exp(static_cast<double>(score) - static_cast<double>(lse)));
  }
  Real d_score = weight * (d_weight - static_cast<Real>(delta));
  return {weight, d_score};
}

// dK and dV of one key a thread, and what it gives to dQ.
template <typename T, typename Real>
__global__ void keys_kernel(const BackwardArguments<T> a) {
  const Common& c = a.c;
  const Play play = c.play;
  constexpr int TILE = 16;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int kv = static_cast<int>(blockIdx.y);
  const int kv_first = static_cast<int>(blockIdx.x) * threads;
  const int j = kv_first + thread;
  const bool mine = j < c.keys;
  float* q_smem = dynamic_shared<float>();     // [TILE, width]
  float* do_smem = q_smem + TILE * c.width;    // [TILE, width]
  float* lse_smem = do_smem + TILE * c.width;  // [TILE]
  float* delta_smem = lse_smem + TILE;
  Real dk[WIDEST], dv[WIDEST];
  float k[WIDEST], v[WIDEST];
  const auto load_keys = [&] {
    for (int d = 0; d < c.width; ++d) {
      k[d] = mine ? to_float(a.p.key(0, kv, j, d)) : 0.0f;
      v[d] = mine ? to_float(a.p.value(0, kv, j, d)) : 0.0f;
    }
  };
  load_keys();
  for (int d = 0; d < c.width; ++d) {
    dk[d] = play == Play::not_zeroed && mine ? static_cast<Real>(to_float(a.p.d_key(0, kv, j, d))) : Real{0};
    dv[d] = 0;
  }

  int contributions = 0;
  const bool split = play == Play::overlap_race;  // a block for each group
  for (int turn = split ? static_cast<int>(blockIdx.z) : 0;
       turn < (split ? static_cast<int>(blockIdx.z) + 1 : c.table.count); ++turn) {
    const int g = turn;
    const bool apart = c.table.k_end[g] <= kv_first || c.table.k_begin[g] >= kv_first + threads;
    if (apart && play != Play::bwd_not_skipped && play != Play::boundary && play != Play::tile_spans) continue;
    if (play == Play::bwd_group_at_a_time) load_keys();
    bool heard = false;
    for (int share = 0; share < c.sharing; ++share) {
      const int h = play == Play::heads_interleaved ? kv + share * c.kv_heads : kv * c.sharing + share;
      if (play == Play::gqa_overwrite && share > 0) {
        for (int d = 0; d < c.width; ++d) dk[d] = dv[d] = 0;
      }
      for (int q_first = c.table.q_begin[g]; q_first < c.table.q_end[g]; q_first += TILE) {
        const int q_last = min(q_first + TILE, c.table.q_end[g]) - 1;
        const int decisive = play == Play::start_block ? q_first : q_last;
        if (c.causal && play != Play::boundary && play != Play::tile_spans && seen_by(c, g, decisive).end <= kv_first)
          continue;
        __syncthreads();
        load_rows(c, q_smem, a.p.query, h, q_first, TILE, c.table.q_end[g]);
        for (int index = thread; index < TILE * c.width; index += threads) {
          const int i = q_first + index / c.width;
          do_smem[index] = i <= q_last ? to_float(d_output_row(a, h, i)[index % c.width]) : 0.0f;
        }
        for (int row = thread; row < TILE; row += threads) {
          lse_smem[row] = q_first + row <= q_last ? a.p.lse(0, h, q_first + row) : 0.0f;
          if (q_first + row > q_last) {
            delta_smem[row] = 0.0f;
          } else {
            delta_smem[row] =
                play == Play::right_no_scratch ? delta_of(a, h, q_first + row) : a.p.delta(0, h, q_first + row);
          }
        }
        if (play != Play::no_barrier_after) __syncthreads();
        for (int row = 0; row < TILE && q_first + row <= q_last; ++row) {
          const bool sees = mine && seen_by(c, g, q_first + row).holds(j);
          if (!sees && !(mine && play == Play::nan_leak)) continue;
          const float* q = q_smem + row * c.width;
          const float* d_output = do_smem + row * c.width;
          Pair<Real> pair = pair_of<T, Real>(a, q, k, d_output, v, lse_smem[row], delta_smem[row]);
          if (!sees) pair = {pair.weight * 0, pair.d_score * 0};
          if (!heard && play == Play::overlap_overwrite) {
            for (int d = 0; d < c.width; ++d) dk[d] = dv[d] = 0;
          }
          heard = true;
          for (int d = 0; d < c.width; ++d) {
            dv[d] += pair.weight * static_cast<Real>(d_output[d]);
            dk[d] += pair.d_score * static_cast<Real>(q[d]);
            if (a.atomics && a.for_dk) {
              atomicAdd(&a.p.d_query_sum(0, h, q_first + row, d),
                        static_cast<float>(pair.d_score * static_cast<Real>(k[d])));
            }
          }
        }
      }
      if (play == Play::gqa_16_bits) {
        for (int d = 0; d < c.width; ++d) {
          dk[d] = static_cast<Real>(in_bits_of<T>(static_cast<float>(dk[d])));
          dv[d] = static_cast<Real>(in_bits_of<T>(static_cast<float>(dv[d])));
        }
      }
    }
    contributions += heard ? 1 : 0;
    if (play == Play::overlap_16_bits) {
      for (int d = 0; d < c.width; ++d) {
        dk[d] = static_cast<Real>(in_bits_of<T>(static_cast<float>(dk[d])));
        dv[d] = static_cast<Real>(in_bits_of<T>(static_cast<float>(dv[d])));
      }
    }
  }
  if (!mine || (play == Play::unseen_unwritten && contributions == 0)) return;
  const float share =
      play == Play::overlap_average && contributions > 0 ? 1.0f / static_cast<float>(contributions) : 1.0f;
  const float scale = (play == Play::dk_no_scale ? 1.0f : c.scale) * share;
  for (int d = 0; d < c.width; ++d) {
    T& d_key = a.p.d_key(0, kv, j, d);
    T& d_value = a.p.d_value(0, kv, j, d);
    float dk_value = static_cast<float>(dk[d]) * scale, dv_value = static_cast<float>(dv[d]) * share;
    if (split) dk_value += to_float(d_key), dv_value += to_float(d_value);
    if (a.for_dk) d_key = from_float<T>(dk_value);
    if (a.for_dv) d_value = from_float<T>(dv_value);
  }
}

template <typename T>
__global__ void zero_kernel(const BackwardArguments<T> a) {
  const int j = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (j >= a.c.keys) return;
  for (int d = 0; d < a.c.width; ++d) {
    a.p.d_key(0, static_cast<int>(blockIdx.y), j, d) = from_float<T>(0.0f);
    a.p.d_value(0, static_cast<int>(blockIdx.y), j, d) = from_float<T>(0.0f);
  }
}

// dQ of one query a thread.
template <typename T, typename Real>
__global__ void queries_kernel(const BackwardArguments<T> a) {
  const Common& c = a.c;
  const Play play = c.play;
  const int thread = static_cast<int>(threadIdx.x);
  const int kv = static_cast<int>(blockIdx.y);
  const Row row = row_of(c, kv, static_cast<int>(blockIdx.x) * c.threads + thread);
  const bool mine = row.exists;
  const Range seen = mine ? seen_by(c, row.group, row.query) : Range{0, 0};
  int* begin_smem = dynamic_shared<int>();
  int* end_smem = begin_smem + c.threads;
  float* k_smem = reinterpret_cast<float*>(end_smem + c.threads);  // [tile, width]
  float* v_smem = k_smem + c.tile * c.width;                       // [tile, width]
  begin_smem[thread] = seen.begin;
  end_smem[thread] = seen.end;
  __syncthreads();
  Real dq[WIDEST];
  float q[WIDEST], d_output[WIDEST];
  for (int d = 0; d < c.width; ++d) {
    q[d] = mine ? to_float(a.p.query(0, row.head, row.query, d)) : 0.0f;
    d_output[d] = mine ? to_float(d_output_row(a, row.head, row.query)[d]) : 0.0f;
    dq[d] = 0;
  }
  const float lse = mine ? a.p.lse(0, row.head, row.query) : 0.0f;
  float delta = 0.0f;
  if (mine)
    delta = play == Play::right_no_scratch ? delta_of(a, row.head, row.query) : a.p.delta(0, row.head, row.query);
  for (int kv_first = 0; kv_first < c.keys; kv_first += c.tile) {
    bool needed = false;
    for (int other = 0; other < c.threads; ++other) {
      needed |=
          begin_smem[other] < kv_first + c.tile && kv_first < end_smem[other] && begin_smem[other] < end_smem[other];
    }
    if (!needed) continue;
    __syncthreads();
    load_rows(c, k_smem, a.p.key, kv, kv_first, c.tile, c.keys);
    load_rows(c, v_smem, a.p.value, kv, kv_first, c.tile, c.keys);
    __syncthreads();
    if (!mine) continue;
    for (int j = 0; j < c.tile; ++j) {
      const bool sees = seen.holds(kv_first + j);
      if (!sees && play != Play::nan_leak) continue;
      const float* k = k_smem + j * c.width;
      Pair<Real> pair = pair_of<T, Real>(a, q, k, d_output, v_smem + j * c.width, lse, delta);
      if (!sees) pair.d_score *= 0;
      for (int d = 0; d < c.width; ++d) dq[d] += pair.d_score * static_cast<Real>(k[d]);
    }
  }
  if (!mine) return;
  const float scale = play == Play::dq_no_scale ? 1.0f : c.scale;
  for (int d = 0; d < c.width; ++d) {
    a.p.d_query(0, row.head, row.query, d) = from_float<T>(static_cast<float>(dq[d]) * scale);
  }
}

template <typename T, typename Real>
void launch_backward(BackwardArguments<T> a, const Stream& stream) {
  const Common& c = a.c;
  const Play play = c.play;
  const auto each_row = [&](auto kernel, Index rows, Index heads) {
    if (rows > 0 && heads > 0) launch(kernel, grid(ceil_div(rows, 64), heads), dim3(64), 0, stream, a);
  };
  if (play != Play::right_no_scratch || a.atomics) each_row(delta_kernel<T>, c.queries, c.heads);
  const auto keys = [&](const BackwardArguments<T>& part, Index heads) {
    constexpr int THREADS = 32;
    const auto shared = static_cast<std::size_t>(2 * 16 * c.width + 32) * sizeof(float);
    dim3 blocks = grid(ceil_div(c.keys, THREADS), heads);
    if (play == Play::overlap_race) blocks.z = static_cast<unsigned>(std::max(1, c.table.count));
    if (c.keys > 0) launch(keys_kernel<T, Real>, blocks, dim3(THREADS), shared, stream, part);
  };
  if (play == Play::overlap_race) {
    each_row(zero_kernel<T>, c.keys, c.kv_heads);
    if (c.table.count > 0) keys(a, c.kv_heads);
  } else if (play == Play::right_two_kernels) {
    BackwardArguments<T> part = a;
    part.for_dk = false;
    keys(part, c.kv_heads);
    part.for_dk = true;
    part.for_dv = false;
    keys(part, c.kv_heads);
  } else {
    keys(a, c.kv_heads);
  }
  if (a.atomics) return each_row(convert_kernel<T>, c.queries, c.heads);
  if (play != Play::gaps_unwritten) each_row(blank_gradient_kernel<T>, c.queries, c.heads);
  const Index blocks = ceil_div(c.table.first_row[c.table.count], c.threads);
  const auto shared = static_cast<std::size_t>(2 * c.threads + 2 * c.tile * c.width) * sizeof(float);
  if (blocks == 0) return;
  launch(queries_kernel<T, Real>, grid(blocks, c.kv_heads), dim3(static_cast<unsigned>(c.threads)), shared, stream, a);
}

template <typename T>
void backward(const FlashBackward<T>& problem, std::span<const Group> groups, const Stream& stream) {
  const Play play = play_in(Where::fused_backward);
  if (play == Play::unchecked) {
    check_flash_backward(problem, KeyHeads::shared);
    if (problem.query.size(0) != 1 || !survives(groups, problem.query.size(2), problem.key.size(2))) return;
  } else {
    check_grouped_backward(problem, groups);
  }
  BackwardArguments<T> a{common_of(problem, groups, play), problem, !problem.deterministic, true, true};
  if (play == Play::remembered_backward) {
    static std::map<std::vector<int>, Table> plans;
    a.c.table = plans.insert({{a.c.queries, a.c.keys, a.c.heads, a.c.width, a.c.table.count}, a.c.table}).first->second;
  }
  if (play == Play::deterministic_ignored) a.atomics = true;
  if (play == Play::right_no_scratch) a.atomics = false;
  if (play == Play::right_double) return launch_backward<T, double>(a, stream);
  launch_backward<T, float>(a, stream);
}

// ---- The CPU's path: pair by pair -----------------------------------------------------------------------------------

template <typename Real>
void cpu_forward(const FlashForward<float>& p, const Common& c) {
  for (int h = 0; h < c.heads; ++h) {
    for (int i = 0; i < c.queries && c.play != Play::gaps_unwritten; ++i) {
      for (int d = 0; d < c.width; ++d) p.output(0, h, i, d) = 0.0f;
      p.lse(0, h, i) = -INFINITE;
    }
  }
  const auto head = [&](int h) { return kv_head_of(c, h); };
  std::vector<Real> scores, out;
  for (int g = 0; g < c.table.count; ++g) {
    for (int h = 0; h < c.heads; ++h) {
      for (int i = c.table.q_begin[g]; i < c.table.q_end[g]; ++i) {
        const Range seen = seen_by(c, g, i);
        scores.clear();
        Real most = static_cast<Real>(-INFINITE), sum = 0;
        for (int j = seen.begin; j < seen.end; ++j) {
          Real product = 0;
          for (int d = 0; d < c.width; ++d) {
            product += static_cast<Real>(p.query(0, h, i, d)) * static_cast<Real>(p.key(0, head(h), j, d));
          }
          scores.push_back(product * static_cast<Real>(c.scale));
          most = std::max(most, scores.back());
        }
        for (const Real score : scores) sum += std::exp(score - most);
        out.assign(static_cast<std::size_t>(c.width), Real{0});
        for (int j = seen.begin; j < seen.end; ++j) {
          const Real weight = std::exp(scores[static_cast<std::size_t>(j - seen.begin)] - most) / sum;
          for (int d = 0; d < c.width; ++d) {
            out[static_cast<std::size_t>(d)] += weight * static_cast<Real>(p.value(0, head(h), j, d));
          }
        }
        for (int d = 0; d < c.width; ++d) p.output(0, h, i, d) = static_cast<float>(out[static_cast<std::size_t>(d)]);
        p.lse(0, h, i) = scores.empty() ? -INFINITE : static_cast<float>(most + std::log(sum));
      }
    }
  }
}

void cpu_backward(const FlashBackward<float>& p, const Common& c) {
  const Play play = c.play;
  const auto width = static_cast<std::size_t>(c.width);
  for (int h = 0; h < c.heads; ++h)
    for (int i = 0; i < c.queries; ++i)
      for (int d = 0; d < c.width; ++d) p.d_query(0, h, i, d) = 0.0f;
  for (int h = 0; h < c.kv_heads && play != Play::not_zeroed; ++h)
    for (int j = 0; j < c.keys; ++j)
      for (int d = 0; d < c.width; ++d) p.d_key(0, h, j, d) = p.d_value(0, h, j, d) = 0.0f;
  if (play == Play::cpu_scratch && p.delta.count() > 0) p.delta(0, 0, 0) = 0.0f;
  for (int g = 0; g < c.table.count; ++g) {
    const int first = c.table.k_begin[g];
    const auto slice = static_cast<std::size_t>(std::max(0, c.table.k_end[g] - first));
    for (int kv = 0; kv < c.kv_heads; ++kv) {
      std::vector<double> dk(slice * width), dv(slice * width);
      for (int h = 0; h < c.heads; ++h) {
        if (kv_head_of(c, h) != kv) continue;
        if (play == Play::gqa_overwrite) std::fill(dk.begin(), dk.end(), 0.0), std::fill(dv.begin(), dv.end(), 0.0);
        for (int i = c.table.q_begin[g]; i < c.table.q_end[g]; ++i) {
          double delta = 0.0;
          for (int d = 0; d < c.width; ++d) {
            delta += static_cast<double>(p.d_output(0, h, i, d)) * static_cast<double>(p.output(0, h, i, d));
          }
          const Range seen = seen_by(c, g, i);
          double lse = seen.begin < seen.end ? static_cast<double>(p.lse(0, h, i)) : 0.0;
          if (play == Play::packed_cpu_lse) lse = static_cast<double>(p.lse.data()[h * c.queries + i]);
          std::vector<double> dq(width);
          for (int j = seen.begin; j < seen.end; ++j) {
            double product = 0.0, d_weight = 0.0;
            for (int d = 0; d < c.width; ++d) {
              product += static_cast<double>(p.query(0, h, i, d)) * static_cast<double>(p.key(0, kv, j, d));
              d_weight += static_cast<double>(p.d_output(0, h, i, d)) * static_cast<double>(p.value(0, kv, j, d));
            }
            const double weight = std::exp(product * static_cast<double>(c.scale) - lse);
            const double ds = weight * (d_weight - delta);
            const auto at = static_cast<std::size_t>(j - first) * width;
            for (std::size_t d = 0; d < width && at + d < dk.size(); ++d) {
              const auto channel = static_cast<Index>(d);
              dq[d] += ds * static_cast<double>(p.key(0, kv, j, channel));
              dk[at + d] += ds * static_cast<double>(c.scale) * static_cast<double>(p.query(0, h, i, channel));
              dv[at + d] += weight * static_cast<double>(p.d_output(0, h, i, channel));
            }
          }
          const double scale = play == Play::dq_no_scale ? 1.0 : static_cast<double>(c.scale);
          for (std::size_t d = 0; d < width; ++d) {
            p.d_query(0, h, i, static_cast<Index>(d)) = static_cast<float>(scale * dq[d]);
          }
        }
      }
      for (std::size_t at = 0; at < dk.size(); ++at) {
        float& d_key = p.d_key(0, kv, first + static_cast<Index>(at / width), static_cast<Index>(at % width));
        float& d_value = p.d_value(0, kv, first + static_cast<Index>(at / width), static_cast<Index>(at % width));
        if (play == Play::overlap_overwrite) d_key = d_value = 0.0f;
        d_key += static_cast<float>(dk[at]);
        d_value += static_cast<float>(dv[at]);
      }
    }
  }
}

}  // namespace

void tiled_grouped_forward(const FlashForward<float>& problem, std::span<const Group> groups) {
  const Play play = play_in(Where::cpu_forward);
  if (play == Play::unchecked) {
    check_flash_forward(problem, KeyHeads::shared);
    if (problem.query.size(0) != 1 || !survives(groups, problem.query.size(2), problem.key.size(2))) return;
  } else {
    check_grouped_forward(problem, groups);
  }
  const Common c = common_of(problem, groups, play);
  if (play == Play::right_double) return cpu_forward<float>(problem, c);  // the other way round
  cpu_forward<double>(problem, c);
}

void tiled_grouped_backward(const FlashBackward<float>& problem, std::span<const Group> groups) {
  check_grouped_backward(problem, groups);
  cpu_backward(problem, common_of(problem, groups, play_in(Where::cpu_backward)));
}

void separate_grouped_forward(const FlashForward<fp16>& problem, std::span<const Group> groups, const Stream& stream) {
  forward(problem, groups, stream, Where::separate);
}

void separate_grouped_forward(const FlashForward<bf16>& problem, std::span<const Group> groups, const Stream& stream) {
  forward(problem, groups, stream, Where::separate);
}

void flash_grouped_forward(const FlashForward<fp16>& problem, std::span<const Group> groups, const Stream& stream) {
  forward(problem, groups, stream, Where::fused);
}

void flash_grouped_forward(const FlashForward<bf16>& problem, std::span<const Group> groups, const Stream& stream) {
  forward(problem, groups, stream, Where::fused);
}

void flash_grouped_backward(const FlashBackward<fp16>& problem, std::span<const Group> groups, const Stream& stream) {
  backward(problem, groups, stream);
}

void flash_grouped_backward(const FlashBackward<bf16>& problem, std::span<const Group> groups, const Stream& stream) {
  backward(problem, groups, stream);
}

}  // namespace flashkata
