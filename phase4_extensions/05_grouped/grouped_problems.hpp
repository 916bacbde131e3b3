// Problems of grouped attention for the suite, and the ways in which the step computes them.
#pragma once

#include <memory>
#include <sstream>

#include "grouped.hpp"
#include "phase4_extensions/kernel_suite.hpp"

namespace flashkata::testing::grouped {

using Groups = std::vector<Group>;

// ---- Ways to compute ------------------------------------------------------------------------------------------------

// One of the step's forward functions, or of its backward ones.
template <typename Problem>
struct Way {
  const char* name;
  void (*launch)(const Problem& problem, std::span<const Group> groups);
  bool on_host = false;

  Call<Problem> with(Groups groups) const {
    return {name, [launch = launch, groups = std::move(groups)](const Problem& p) { launch(p, groups); }, on_host};
  }
};

inline const Way<FlashForward<float>> CPU_FORWARD{
    "tiled_grouped_forward", [](const auto& problem, auto groups) { tiled_grouped_forward(problem, groups); }, true};
inline const Way<FlashBackward<float>> CPU_BACKWARD{
    "tiled_grouped_backward",
    [](const FlashBackward<float>& problem, std::span<const Group> groups) {
      tiled_grouped_backward(problem, groups);
      const float* scratch = problem.delta.data();  // NaN at first
      expect(std::all_of(scratch, scratch + problem.delta.count(), [](float x) { return std::isnan(x); }), "delta",
             "was written; the CPU's path leaves the scratch alone");
    },
    true};

template <typename T>
Way<FlashForward<T>> separate() {
  return {"separate_grouped_forward", [](const FlashForward<T>& problem, std::span<const Group> groups) {
            separate_grouped_forward(problem, groups);
          }};
}
template <typename T>
Way<FlashForward<T>> fused() {
  return {"flash_grouped_forward", [](const FlashForward<T>& problem, std::span<const Group> groups) {
            flash_grouped_forward(problem, groups);
          }};
}
template <typename T>
Way<FlashBackward<T>> fused_backward() {
  return {"flash_grouped_backward", [](const FlashBackward<T>& problem, std::span<const Group> groups) {
            flash_grouped_backward(problem, groups);
          }};
}

// ---- Problems -------------------------------------------------------------------------------------------------------

// A problem's sizes and its groups.
struct Grouped {
  Index queries = 1, keys = 1;
  Groups groups = {};
  Index heads = 1, kv_heads = 1, width = 64;
  bool causal = false;
  std::optional<float> scale = {};

  Sizes sizes() const {
    return {.heads = heads, .kv_heads = kv_heads, .queries = queries, .keys = keys, .width = width};
  }
};

// The keys that query i sees, in the suite's own words.
struct Range {
  Index begin, end;
  Index count() const { return end - begin; }
  bool holds(Index j) const { return begin <= j && j < end; }
};

inline Range seen_by(const Grouped& g, Index i) {
  for (const Group& group : g.groups) {
    if (i < group.q_begin || i >= group.q_end) continue;
    const Index seen = keys_seen(g.causal, i - group.q_begin, group.q_end - group.q_begin, group.k_end - group.k_begin);
    return {group.k_begin, group.k_begin + seen};
  }
  return {0, 0};
}

// What the reference has to know of it.
inline Change mask_of(const Grouped& g) {
  const auto pairs = static_cast<std::size_t>(g.queries * g.keys);
  const std::shared_ptr<bool[]> mask(new bool[pairs]);
  for (Index i = 0; i < g.queries; ++i)
    for (Index j = 0; j < g.keys; ++j) mask[static_cast<std::size_t>(i * g.keys + j)] = seen_by(g, i).holds(j);
  return [mask, shape = Shape<4>{1, g.heads, g.queries, g.keys}](reference::Problem& problem) {
    problem.causal = false;  // the mask knows
    problem.allowed = View<const bool, 4>(mask.get(), shape, {0, 0, shape[3], 1});
  };
}

inline std::string text_of(const Group& group) {
  const auto range = [](Index begin, Index end) { return std::to_string(begin) + ".." + std::to_string(end); };
  return "queries " + range(group.q_begin, group.q_end) + " to keys " + range(group.k_begin, group.k_end);
}

// Beside what was found: the groups.
template <typename Problem>
bool not_so(const Way<Problem>& way, const Grouped& g, const char* type, bool deterministic = false) {
  std::string text = std::string(way.name) + ", " + type + ", H=" + std::to_string(g.heads) +
                     " Hk=" + std::to_string(g.kv_heads) + " Tq=" + std::to_string(g.queries) +
                     " Tk=" + std::to_string(g.keys) + " D=" + std::to_string(g.width) + (g.causal ? ", causal" : "") +
                     (deterministic ? ", deterministic" : "");
  finding("of", text);
  std::string list;
  for (std::size_t n = 0; n < std::min<std::size_t>(g.groups.size(), 8); ++n) {
    list += (n > 0 ? "; " : "") + text_of(g.groups[n]);
  }
  if (g.groups.size() > 8) list += "; ... " + std::to_string(g.groups.size()) + " of them";
  finding("groups", list.empty() ? "none" : list);
  return false;
}

template <typename T>
ForwardAnswer attend(const Way<FlashForward<T>>& way, const Grouped& g, const Inputs& in, Layouts layouts = {},
                     bool judge = true) {
  return forward<T>(way.with(g.groups), in, {.causal = g.causal, .scale = g.scale, .layouts = layouts, .judge = judge});
}

template <typename T>
Gradients go_back(const Way<FlashBackward<T>>& way, const Grouped& g, const Inputs& in, const ForwardResult& forward,
                  bool deterministic = true, Layouts layouts = {}, bool judge = true) {
  return backward<T>(
      way.with(g.groups), in, forward,
      {.causal = g.causal, .scale = g.scale, .layouts = layouts, .deterministic = deterministic, .judge = judge});
}

template <typename T>
bool expect_attention(const Way<FlashForward<T>>& way, const Grouped& g, const Inputs& in, Layouts layouts = {}) {
  const ForwardAnswer got = attend(way, g, in, layouts);
  const CallOptions options{.causal = g.causal, .scale = g.scale};
  return expect_forward<T>(got, expected_forward<T>(in, options, mask_of(g))) || not_so(way, g, type_name<T>());
}

template <typename T>
bool expect_right_gradients(const Way<FlashBackward<T>>& way, const Grouped& g, const Inputs& in, bool deterministic,
                            Layouts layouts = {}) {
  const CallOptions options{.causal = g.causal, .scale = g.scale};
  const ExpectedBackward<T> want = expected_backward<T>(in, options, mask_of(g));
  return expect_gradients<T>(go_back(way, g, in, want.forward, deterministic, layouts), want.gradients) ||
         not_so(way, g, type_name<T>(), deterministic);
}

// What a forward pass leaves behind, by the reference.
template <typename T>
ForwardResult forward_result(const Grouped& g, const Inputs& in) {
  return expected_forward<T>(in, {.scale = g.scale}, mask_of(g)).exact;
}

template <typename T>
Inputs random_of(const Grouped& g, unsigned seed) {
  return random_inputs<T>(g.sizes(), seed);
}

// The ways in which groups can lie. All lengths are below 256.
struct Arrangement {
  const char* what;
  Index queries, keys;
  Groups groups;
};

inline const std::vector<Arrangement>& arrangements() {
  static const std::vector<Arrangement> list = [] {
    std::vector<Arrangement> all = {
        {"one of everything", 21, 37, {{0, 21, 0, 37}}},
        {"disjoint, one behind the other",
         30,
         44,
         {{0, 5, 0, 7}, {5, 6, 7, 20}, {6, 16, 20, 21}, {16, 27, 21, 34}, {27, 30, 34, 44}}},
        {"all of the same keys", 45, 43, {{0, 1, 3, 36}, {1, 17, 3, 36}, {17, 40, 3, 36}, {40, 45, 3, 36}}},
        {"two that overlap", 40, 75, {{0, 20, 0, 50}, {20, 40, 25, 75}}},
        {"one inside of the other, and one of a single key",
         33,
         70,
         {{0, 16, 0, 70}, {16, 32, 10, 40}, {32, 33, 20, 21}}},
        {"in any order, with gaps, empty ones and two of the same keys",
         46,
         44,
         {{12, 23, 6, 30}, {0, 3, 18, 19}, {3, 3, 0, 40}, {25, 34, 8, 8}, {34, 44, 0, 40}, {5, 10, 6, 30}}},
        {"more queries than keys", 41, 40, {{0, 20, 5, 9}, {20, 21, 0, 40}, {21, 41, 38, 40}}},
        {"edges where tiles have theirs", 130, 132, {{0, 64, 0, 64}, {64, 128, 64, 128}, {128, 130, 63, 65}}},
        {"long slices before short ones", 20, 150, {{10, 20, 0, 3}, {0, 10, 0, 150}}},
        {"whole tiles of queries that see nobody", 150, 20, {{0, 65, 7, 7}, {70, 150, 0, 9}}},
        {"none", 5, 9, {}},
    };
    Arrangement one_token{"sixteen of one query and one key", 16, 16, {}};
    Arrangement growing{"sixteen of two queries, each with a key more than the one before", 32, 16, {}};
    for (Index g = 0; g < 16; ++g) {
      one_token.groups.push_back({g, g + 1, 15 - g, 16 - g});
      growing.groups.push_back({2 * g, 2 * g + 2, 0, g + 1});
    }
    all.push_back(one_token);
    all.push_back(growing);
    return all;
  }();
  return list;
}

inline std::vector<Grouped> nothing_to_do() {
  return {{.queries = 0, .keys = 20, .groups = {{0, 0, 3, 9}}},
          {.queries = 20, .keys = 0, .groups = {{0, 7, 0, 0}, {9, 20, 0, 0}}, .causal = true},
          {.queries = 0, .keys = 0, .groups = {{0, 0, 0, 0}}},
          {.queries = 3, .keys = 20, .groups = {}}};
}

// Body(problem) for each arrangement, with and without causal; watched, only the short ones. Ends with the first that
// is wrong.
template <typename Body>
bool for_each_arrangement(bool causal, const Grouped& like, const Body& body) {
  for (const Arrangement& a : arrangements()) {
    if (kernels_are_checked() && a.queries > 64 && a.groups.size() < 6) continue;
    Grouped g = like;
    g.queries = a.queries;
    g.keys = a.keys;
    g.groups = a.groups;
    g.causal = causal;
    if (body(g)) continue;
    finding("groups", a.what);
    return false;
  }
  return true;
}

}  // namespace flashkata::testing::grouped
