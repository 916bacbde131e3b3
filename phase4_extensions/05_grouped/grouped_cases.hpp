// Numbered cases: who is asked what, and recognised by it.
#pragma once

#include "grouped_problems.hpp"

namespace flashkata::testing::grouped {

struct GroupedCase {
  const char* why;
  Grouped problem;
  Layouts layouts = {};
  double query_size = 1.0;
  int number = 0;  // its place in the list, from 1; also its seed
};

// clang-format off
// Their numbers never change: new ones go to the end.
inline const std::vector<GroupedCase>& grouped_cases() {
  static const std::vector<GroupedCase> list = [] {
    const auto groups = [](const char* what) {
      for (const Arrangement& a : arrangements()) {
        if (std::string_view(a.what) == what) return Grouped{.queries = a.queries, .keys = a.keys, .groups = a.groups};
      }
      throw std::logic_error(what);
    };
    const auto with = [](Grouped g, Index heads, Index kv_heads, bool causal = false) {
      g.heads = heads;
      g.kv_heads = kv_heads;
      g.causal = causal;
      return g;
    };
    const Grouped any = groups("in any order, with gaps, empty ones and two of the same keys");
    const Grouped disjoint = groups("disjoint, one behind the other");
    const Grouped same = groups("all of the same keys");
    Grouped scaled = with(groups("two that overlap"), 1, 1);
    scaled.scale = 0.3f;
    Grouped zero = scaled, negative = scaled, wide = with(groups("two that overlap"), 1, 1), wide_any = with(any, 2, 1);
    zero.scale = 0.0f;
    negative.scale = -0.2f;
    wide.width = wide_any.width = 128;
    std::vector<GroupedCase> cases = {
        {"one group: plain attention", with(groups("one of everything"), 2, 2)},
        {"one group: plain attention, causal", with(groups("one of everything"), 1, 1, true)},
        {"disjoint slices: a varlen batch", with(disjoint, 2, 2)},
        {"disjoint slices: a varlen batch, causal", with(disjoint, 1, 1, true)},
        {"four groups, the same keys", with(same, 1, 1)},
        {"four groups, the same keys, causal", with(same, 1, 1, true)},
        {"two slices that overlap, a scale", scaled},
        {"scale 0", zero},
        {"a negative scale", negative},
        {"nested slices", with(groups("one inside of the other, and one of a single key"), 2, 1)},
        {"in any order, with gaps and empty groups", with(any, 2, 1)},
        {"in any order, with gaps and empty groups, causal", with(any, 1, 1, true)},
        {"more queries than keys, causal", with(groups("more queries than keys"), 1, 1, true)},
        {"one token for each of sixteen", with(groups("sixteen of one query and one key"), 4, 2)},
        {"sixteen slices that grow", with(groups("sixteen of two queries, each with a key more than the one before"), 2, 2)},
        {"GQA 6 over 2", with({.queries = 13, .keys = 21, .groups = {{0, 6, 0, 15}, {6, 13, 9, 21}}}, 6, 2)},
        {"GQA 32 over 8, causal", with({.queries = 5, .keys = 9, .groups = {{0, 2, 0, 6}, {2, 5, 3, 9}}}, 32, 8, true)},
        {"width 128", wide},
        {"width 128, any order, GQA", wide_any},
        {"tokens first, as a model lays them out", with(any, 2, 1), TOKENS},
        {"rows lie apart, causal", with(same, 2, 2, true), APART},
        {"every tensor lies otherwise", with(disjoint, 2, 2), MIXED},
        {"every tensor lies otherwise, GQA", with(any, 4, 2), MIXED_OTHERWISE},
        {"queries of four times the size", with(groups("two that overlap"), 1, 1), {}, 4.0},
        {"1 token beside 70", with({.queries = 71, .keys = 71, .groups = {{0, 1, 0, 1}, {1, 71, 1, 71}}}, 1, 1, true)},
        {"no group at all", with(groups("none"), 2, 1)},
        {"whole tiles of queries that see nobody, causal", with(groups("whole tiles of queries that see nobody"), 1, 1, true)},
    };
    for (std::size_t i = 0; i < cases.size(); ++i) cases[i].number = static_cast<int>(i) + 1;
    return cases;
  }();
  return list;
}
// clang-format on

// A case is tried by five functions, each under numbers of its own: that of the case and so many hundreds.
enum class Tried { cpu_forward, cpu_backward, separate, fused, fused_backward };

template <typename T>
Inputs inputs_of(const GroupedCase& c) {
  Inputs in = random_of<T>(c.problem, static_cast<unsigned>(c.number));
  for (Index at = 0; at < in.query.count(); ++at) in.query.data()[at] *= static_cast<float>(c.query_size);
  return in;
}

inline int number_of(Tried tried, const GroupedCase& c) { return 100 * static_cast<int>(tried) + c.number; }

// Kernels are tried with one type each, by turns, and go back one way or the other.
inline bool takes_bf16(const GroupedCase& c) { return c.number % 2 == 0; }
inline bool is_deterministic(const GroupedCase& c) { return c.number % 4 < 2; }

inline Index pairs_of(const GroupedCase& c) {
  return c.problem.queries * c.problem.keys * c.problem.heads * c.problem.width / 64;
}

inline bool is_tried(Tried tried, const GroupedCase& c) {
  if (tried == Tried::separate && c.number % 4 != 0 && c.number % 10 != 7) return false;  // tried in 2.05
  const Index most = tried == Tried::cpu_forward || tried == Tried::cpu_backward ? 4100 : 6000;
  return pairs_of(c) <= (kernels_are_checked() ? 2500 : most);
}

inline void for_each_case(Tried tried, const std::function<void(const GroupedCase&)>& body) {
  for (const GroupedCase& c : grouped_cases()) {
    if (is_tried(tried, c)) run_case(number_of(tried, c), c.why, [&] { body(c); });
  }
}

// Backward: with and without `deterministic`, by one expectation. If it is large, or watched, only the way that
// Recognise does not go.
template <typename T>
void expect_right_both_ways(const Way<FlashBackward<T>>& way, const GroupedCase& c) {
  const Inputs in = inputs_of<T>(c);
  const CallOptions options{.causal = c.problem.causal, .scale = c.problem.scale};
  const ExpectedBackward<T> want = expected_backward<T>(in, options, mask_of(c.problem));
  for (const bool deterministic : {false, true}) {
    if ((kernels_are_checked() || pairs_of(c) > 1000) && deterministic == is_deterministic(c)) continue;
    const Gradients got = go_back(way, c.problem, in, want.forward, deterministic, c.layouts);
    if (!expect_gradients<T>(got, want.gradients)) not_so(way, c.problem, type_name<T>(), deterministic);
  }
}

template <typename T>
std::vector<Array> outputs_of(const Way<FlashForward<T>>& way, const GroupedCase& c) {
  ForwardAnswer got = attend(way, c.problem, inputs_of<T>(c), c.layouts, /*judge=*/false);
  return {std::move(got.output), std::move(got.lse)};
}

template <typename T>
std::vector<Array> outputs_of(const Way<FlashBackward<T>>& way, const GroupedCase& c) {
  const Inputs in = inputs_of<T>(c);
  const ForwardResult forward = forward_result<T>(c.problem, in);
  Gradients got = go_back(way, c.problem, in, forward, is_deterministic(c), c.layouts, /*judge=*/false);
  return {std::move(got.query), std::move(got.key), std::move(got.value)};
}

inline std::vector<int> all_numbers() {
  std::vector<int> result;
  for (int tried = 0; tried < 5; ++tried) {
    for (const GroupedCase& c : grouped_cases()) {
      if (is_tried(static_cast<Tried>(tried), c)) result.push_back(number_of(static_cast<Tried>(tried), c));
    }
  }
  return result;
}

}  // namespace flashkata::testing::grouped
