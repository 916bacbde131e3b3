// In the order in which one would build it: the CPU's path, a call for each group, the fused forward kernel, the fused
// backward kernels; then what holds everywhere, and what only a real GPU has the time for.
#include "grouped.hpp"

#include <memory>
#include <numeric>
#include <sstream>

#include "phase4_extensions/kernel_suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

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

const Way<FlashForward<float>> CPU_FORWARD{
    "tiled_grouped_forward", [](const auto& problem, auto groups) { tiled_grouped_forward(problem, groups); }, true};
const Way<FlashBackward<float>> CPU_BACKWARD{
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

Range seen_by(const Grouped& g, Index i) {
  for (const Group& group : g.groups) {
    if (i < group.q_begin || i >= group.q_end) continue;
    const Index seen = keys_seen(g.causal, i - group.q_begin, group.q_end - group.q_begin, group.k_end - group.k_begin);
    return {group.k_begin, group.k_begin + seen};
  }
  return {0, 0};
}

// What the reference has to know of it.
Change mask_of(const Grouped& g) {
  const auto pairs = static_cast<std::size_t>(g.queries * g.keys);
  const std::shared_ptr<bool[]> mask(new bool[pairs]);
  for (Index i = 0; i < g.queries; ++i)
    for (Index j = 0; j < g.keys; ++j) mask[static_cast<std::size_t>(i * g.keys + j)] = seen_by(g, i).holds(j);
  return [mask, shape = Shape<4>{1, g.heads, g.queries, g.keys}](reference::Problem& problem) {
    problem.causal = false;  // the mask knows
    problem.allowed = View<const bool, 4>(mask.get(), shape, {0, 0, shape[3], 1});
  };
}

std::string text_of(const Group& group) {
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

const std::vector<Arrangement>& arrangements() {
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

std::vector<Grouped> nothing_to_do() {
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

// ---- The README's example: of each row one channel is not 0
// -----------------------------------------------------------

Grouped example() { return {.queries = 2, .keys = 3, .groups = {{0, 1, 0, 2}, {1, 2, 1, 3}}, .scale = 1.0f}; }

template <typename T>
Inputs example_inputs() {
  const auto column = [](std::vector<double> numbers) -> Fill {
    return [=](Index, Index, Index s, Index d) { return d > 0 ? 0.0 : numbers.at(static_cast<std::size_t>(s)); };
  };
  return filled_inputs<T>(example().sizes(), column({std::log(3.0), std::log(2.0)}), column({0, 1, 2}),
                          column({4, 0, 3}), column({4, 3}));
}

// `first` holds the numbers in channel 0 of the rows; all others should be 0.
bool expect_column(const char* name, const Array& got, const std::vector<double>& first, double tolerance,
                   const Axes& axes) {
  Array want{got.shape, std::vector<double>(got.count(), 0.0)}, size = want;
  const auto width = static_cast<std::size_t>(got.shape.size() > 3 ? got.shape[3] : 1);
  for (std::size_t row = 0; row < first.size(); ++row) {
    want.values[row * width] = first[row];
    size.values[row * width] = 6.0;
  }
  return expect_close(name, got, want, {tolerance, size}, axes);
}

template <typename T>
bool expect_example(const Way<FlashForward<T>>& way) {
  const ForwardAnswer got = attend(way, example(), example_inputs<T>());
  const bool lse = expect_column("lse", got.lse, {std::log(4.0), std::log(6.0)}, few_roundings<T>(), LSE_AXES);
  return (expect_column("output", got.output, {1, 2}, few_roundings<T>(), QUERY_AXES) && lse) ||
         not_so(way, example(), type_name<T>());
}

template <typename T>
bool expect_example(const Way<FlashBackward<T>>& way, bool deterministic) {
  const Inputs in = example_inputs<T>();
  const Gradients got = go_back(way, example(), in, forward_result<T>(example(), in), deterministic);
  const double log2 = std::log(2.0), log3 = std::log(3.0), tolerance = few_roundings<T>();
  const bool value = expect_column("d_value", got.value, {1, 4, 2}, tolerance, KEY_AXES);
  const bool key = expect_column("d_key", got.key, {3 * log3, -3 * log3 - 2 * log2, 2 * log2}, tolerance, KEY_AXES);
  return (expect_column("d_query", got.query, {-3, 2}, tolerance, QUERY_AXES) && key && value) ||
         not_so(way, example(), type_name<T>(), deterministic);
}

// ---- Probes, forward: false where the property does not hold --------------------------------------------------------

// Every score is 0 and every value 1: the output is 1, and exp(lse) counts the keys.
template <typename T>
bool expect_counts(const Way<FlashForward<T>>& way, const Grouped& g) {
  const Inputs in = filled_inputs<T>(g.sizes(), everywhere(0.0), noise(2), everywhere(1.0), everywhere(0.0));
  const ForwardAnswer got = attend(way, g, in);
  for (Index row = 0; row < g.heads * g.queries; ++row) {
    const Index count = seen_by(g, row % g.queries).count();
    const double lse = got.lse.values[static_cast<std::size_t>(row)];
    const double want = std::log(static_cast<double>(count));
    const std::string query =
        "query " + std::to_string(row % g.queries) + " of head " + std::to_string(row / g.queries);
    if (count == 0 ? lse != want : !(std::abs(lse - want) < 1e-4)) {
      std::ostringstream text;
      text << "all scores are 0, and " << query << " has counted " << std::exp(lse) << " keys; want " << count;
      finding("lse", text.str());
      return not_so(way, g, type_name<T>());
    }
    for (Index d = 0; d < g.width; ++d) {
      const double output = got.output.values[static_cast<std::size_t>(row * g.width + d)];
      if (std::abs(output - (count > 0 ? 1.0 : 0.0)) <= 1e-5) continue;
      std::ostringstream text;
      text << "all values are 1, and " << query << " sees " << count << " keys; its channel " << d << " is " << output;
      finding("output", text.str());
      return not_so(way, g, type_name<T>());
    }
  }
  return true;
}

// Query i meets one key of those that it sees, and no other: its score is 64 higher than the next. Even channels of the
// values hold the number of their key, odd ones that of their channel.
template <typename T>
bool expect_needles(const Way<FlashForward<T>>& way, Grouped g) {
  g.scale = 64.0f / static_cast<float>(g.width);
  const auto target = [&](Index i) {
    const Range seen = seen_by(g, i);
    return seen.count() == 0 ? Index{0} : seen.begin + (5 * i + 3) % seen.count();
  };
  using kernel_suite_detail::code;
  const Inputs in = filled_inputs<T>(
      g.sizes(), [&](Index, Index, Index i, Index d) { return code(target(i), d); },
      [](Index, Index, Index j, Index d) { return code(j, d); },
      [](Index, Index, Index j, Index d) { return static_cast<double>(d % 2 == 0 ? j : d); }, everywhere(0.0));
  const ForwardAnswer got = attend(way, g, in);
  for (Index i = 0; i < g.queries; ++i) {
    if (seen_by(g, i).count() == 0) continue;
    for (Index d = 0; d < g.width; ++d) {
      const double output = got.output.values[static_cast<std::size_t>(i * g.width + d)];
      const auto want = static_cast<double>(d % 2 == 0 ? target(i) : d);
      if (std::abs(output - want) <= 1e-20) continue;
      std::ostringstream text;
      text << "query " << i << " matches key " << target(i) << " alone; in channel " << d
           << (d % 2 == 0 ? ", where values hold their keys' numbers, came out "
                          : ", where values hold their channels' numbers, came out ")
           << output;
      finding("output", text.str());
      return not_so(way, g, type_name<T>());
    }
  }
  return true;
}

// Head 1 is head 0 with NaN, -inf and 60000 in some keys, head 2 in their values. Queries that see none of these have
// the bits of head 0.
template <typename T>
bool expect_unmoved(const Way<FlashForward<T>>& way, Grouped g, const std::function<bool(Index)>& poisoned) {
  g.heads = g.kv_heads = 3;
  const auto fill = [&](unsigned seed, Index operand) -> Fill {
    return [=](Index, Index h, Index s, Index d) {
      const bool here = h > 0 && operand == h - 1 && poisoned(s);
      const double poison = s % 3 == 0 ? NOT_A_NUMBER : s % 3 == 1 ? -INF : 6e4;
      return here ? poison : noise(seed)(0, 0, s, d);
    };
  };
  const ForwardAnswer got =
      attend(way, g, filled_inputs<T>(g.sizes(), fill(5, 2), fill(6, 0), fill(7, 1), everywhere(0.0)));
  for (Index i = 0; i < g.queries; ++i) {
    const Range seen = seen_by(g, i);
    bool clean = true;
    for (Index j = seen.begin; j < seen.end; ++j) clean = clean && !poisoned(j);
    for (Index h = 1; clean && h < g.heads; ++h) {
      const auto same = [&](const Array& all, Index width) {
        const double* rows = all.values.data();
        return std::equal(rows + i * width, rows + (i + 1) * width, rows + (h * g.queries + i) * width);
      };
      if (same(got.output, g.width) && same(got.lse, 1)) continue;
      std::ostringstream text;
      text << "query " << i << " sees the keys " << seen.begin << ".." << seen.end << ", and noticed that "
           << (h % 2 == 1 ? "keys" : "values") << " of others became NaN, -inf and 60000";
      finding(same(got.output, g.width) ? "lse" : "output", text.str());
      return not_so(way, g, type_name<T>());
    }
  }
  return true;
}

// Where a tile holds keys of one group and of another. Calls body(problem, group) for the groups of some arrangements;
// with `left_out`, 0 or 1, for every other one.
template <typename Body>
bool for_each_shared_slice(std::size_t left_out, const Body& body) {
  for (const Arrangement& a : arrangements()) {
    const bool shared = a.keys == 75 || a.groups.size() == 6;
    if (!shared || (kernels_are_checked() && a.groups.size() != 6)) continue;
    for (std::size_t n = 0; n < a.groups.size(); ++n) {
      const Group& group = a.groups[n];
      if (group.q_begin == group.q_end || group.k_begin == group.k_end || n % 2 == left_out) continue;
      if (!body(Grouped{.queries = a.queries, .keys = a.keys, .groups = a.groups}, group)) return false;
      if (kernels_are_checked()) break;
    }
  }
  return true;
}

template <typename T>
bool expect_foreign_unseen(const Way<FlashForward<T>>& way, Index width, std::size_t left_out = 2) {
  return for_each_shared_slice(left_out, [&](Grouped g, const Group& group) {
    // All keys but those of this group's slice; then, with causal, all but the first half of it.
    g.width = width;
    if (!expect_unmoved<T>(way, g, [=](Index j) { return j < group.k_begin || j >= group.k_end; })) return false;
    const Index middle = (group.k_begin + group.k_end + 1) / 2;
    g.causal = true;
    return expect_unmoved<T>(way, g, [=](Index j) { return j < group.k_begin || j >= middle; });
  });
}

// In head h key 7 h + 2 is NaN in channel 5 of its value (even h), or everywhere (odd h).
template <typename T>
bool expect_nan_arrives(const Way<FlashForward<T>>& way, Grouped g) {
  g.heads = g.kv_heads = 6;
  const auto fill = [](unsigned seed, Index operand) -> Fill {
    return [=](Index b, Index h, Index s, Index d) {
      const bool here = s == 7 * h + 2 && h % 2 == operand && (operand == 1 || d == 5);
      return here ? static_cast<double>(NOT_A_NUMBER) : noise(seed)(b, h, s, d);
    };
  };
  const ForwardAnswer got =
      attend(way, g, filled_inputs<T>(g.sizes(), noise(5), fill(6, 1), fill(7, 0), everywhere(0.0)));
  for (Index row = 0; row < g.heads * g.queries; ++row) {
    const Index h = row / g.queries, i = row % g.queries;
    const bool sees = seen_by(g, i).holds(7 * h + 2);
    for (Index d = 0; d < g.width; ++d) {
      const bool want = sees && (h % 2 == 1 || d == 5);
      if (std::isnan(got.output.values[static_cast<std::size_t>(row * g.width + d)]) == want) continue;
      std::ostringstream text;
      text << (h % 2 == 1 ? "key " : "channel 5 of value ") << 7 * h + 2 << " is NaN, and query " << i
           << (sees ? " sees it: its channel " : " does not see it: its channel ") << d << " is "
           << (want ? "a number" : "NaN");
      finding("output", text.str());
      return not_so(way, g, type_name<T>());
    }
  }
  return true;
}

// All scores are 0, and each key/value head has a number of its own, in all of its values.
template <typename T>
bool expect_own_kv_head(const Way<FlashForward<T>>& way, const Grouped& g) {
  const Fill values = [](Index, Index h, Index, Index) { return static_cast<double>(h + 1); };
  const ForwardAnswer got =
      attend(way, g, filled_inputs<T>(g.sizes(), everywhere(0.0), noise(2), values, everywhere(0.0)));
  for (Index row = 0; row < g.heads * g.queries; ++row) {
    const Index h = row / g.queries;
    if (seen_by(g, row % g.queries).count() == 0) continue;
    for (Index d = 0; d < g.width; ++d) {
      const double output = got.output.values[static_cast<std::size_t>(row * g.width + d)];
      const Index want = h / (g.heads / g.kv_heads);
      if (std::abs(output - static_cast<double>(want + 1)) <= 1e-5) continue;
      std::ostringstream text;
      text << "query head " << h << " of " << g.heads << " read key/value head " << output - 1.0 << " of " << g.kv_heads
           << "; want " << want;
      finding("output", text.str());
      return not_so(way, g, type_name<T>());
    }
  }
  return true;
}

// ---- Probes, backward -----------------------------------------------------------------------------------------------

// With queries of 0 a query that sees n keys gives each the weight 1/n. Of row i of dO and of K, one of the channels 0
// to 7 says which place it has in its group of 8, one of the channels 8 to 15 which group of 8 it is in: dV lists who
// came, from all groups and all heads, and so does dQ, since the values make dS = (+-1 - delta) / n.
template <typename T>
bool expect_even_shares(const Way<FlashBackward<T>>& way, Grouped g, bool deterministic) {
  g.scale = 1.0f;
  const auto code = [](Index i, Index d) { return d == i % 8 || d == 8 + i / 8 % 8 ? 1.0 : 0.0; };
  const auto sign = [](Index j) { return j % 2 == 0 ? 1.0 : -1.0; };  // dP of any query and key j
  const Inputs in = filled_inputs<T>(
      g.sizes(), everywhere(0.0), [&](Index, Index, Index j, Index d) { return code(j, d); },
      [&](Index, Index, Index j, Index d) { return d < 8 ? sign(j) : 0.0; },
      [&](Index, Index h, Index i, Index d) { return code(i + 3 * h, d); });
  const Shape<4> of_query = in.query.shape(), of_key = in.key.shape();
  const auto zeros_of = [](const Shape<4>& shape) {
    std::size_t count = 1;
    for (const Index size : shape) count *= static_cast<std::size_t>(size);
    return Array{{shape.begin(), shape.end()}, std::vector<double>(count, 0.0)};
  };
  Array value = zeros_of(of_key), query = zeros_of(of_query), query_size = query;
  ForwardResult forward{zeros_of(of_query), {{1, g.heads, g.queries}, {}}};
  for (Index h = 0; h < g.heads; ++h)
    for (Index i = 0; i < g.queries; ++i) {
      const Range seen = seen_by(g, i);
      const auto n = static_cast<double>(seen.count());
      double mean = 0.0;
      for (Index j = seen.begin; j < seen.end; ++j) mean += sign(j) / n;
      const double delta = rounded<T>(mean);  // it is what output holds in channels 0 to 7
      for (Index d = 0; d < 8; ++d) {
        forward.output.values[static_cast<std::size_t>((h * g.queries + i) * g.width + d)] = delta;
      }
      forward.lse.values.push_back(std::log(n));
      for (Index j = seen.begin; j < seen.end; ++j)
        for (Index d = 0; d < 16; ++d) {
          const auto key_at = static_cast<std::size_t>((h / (g.heads / g.kv_heads) * g.keys + j) * g.width + d);
          const auto query_at = static_cast<std::size_t>((h * g.queries + i) * g.width + d);
          value.values[key_at] += code(i + 3 * h, d) / n;
          query.values[query_at] += (sign(j) - delta) * code(j, d) / n;
          query_size.values[query_at] += (1.0 + std::abs(delta)) * code(j, d) / n;
        }
    }
  const Gradients got = go_back(way, g, in, forward, deterministic);
  const double tolerance = few_roundings<T>();
  const bool value_is_right = expect_close("d_value", got.value, value, {tolerance, value}, KEY_AXES);
  const bool key_is_right = expect_all("d_key", got.key, 0.0, 0.0, KEY_AXES, "every query is 0, so d_key should be");
  return (expect_close("d_query", got.query, query, {tolerance, query_size}, QUERY_AXES) && key_is_right &&
          value_is_right) ||
         not_so(way, g, type_name<T>(), deterministic);
}

// What no query may see, and queries that may see nothing, hold NaN and inf, and so do their d_output: their gradients
// are exactly 0, and the others are what they were.
template <typename T>
bool expect_strangers_are_harmless(const Way<FlashBackward<T>>& way, const Grouped& g, bool deterministic) {
  std::vector<bool> used(static_cast<std::size_t>(g.keys), false);
  for (Index i = 0; i < g.queries; ++i)
    for (Index j = seen_by(g, i).begin; j < seen_by(g, i).end; ++j) used[static_cast<std::size_t>(j)] = true;
  const Inputs clean = random_of<T>(g, 3);
  Inputs in = copy_of(clean);
  const auto poison = [&](Tensor<float, 4>& tensor, Index s, float number) {
    for (Index h = 0; h < tensor.size(1); ++h)
      for (Index d = 0; d < tensor.size(3); ++d) tensor(0, h, s, d) = number;
  };
  for (Index j = 0; j < g.keys; ++j) {
    if (used[static_cast<std::size_t>(j)]) continue;
    poison(in.key, j, j % 2 == 0 ? NOT_A_NUMBER : INF);
    poison(in.value, j, j % 3 == 0 ? NOT_A_NUMBER : -INF);
  }
  for (Index i = 0; i < g.queries; ++i) {
    if (seen_by(g, i).count() > 0) continue;
    poison(in.query, i, i % 2 == 0 ? NOT_A_NUMBER : INF);
    poison(in.d_output, i, i % 2 == 0 ? -INF : NOT_A_NUMBER);
  }
  const ForwardResult before = forward_result<T>(g, clean);
  const Gradients want = go_back(way, g, clean, before, deterministic);
  const Gradients got = go_back(way, g, in, before, deterministic);
  const auto expect_zeros = [&](const char* name, const Array& all, Index rows, const auto& nothing) {
    for (std::size_t at = 0; at < all.count(); ++at) {
      const Index row = static_cast<Index>(at) / g.width % rows;
      if (!nothing(row) || all.values[at] == 0.0) continue;
      finding(name, "of row " + std::to_string(row) + ", which nobody sees or which sees nobody, is " +
                        std::to_string(all.values[at]) + "; want exactly 0");
      return false;
    }
    return true;
  };
  const auto blind = [&](Index i) { return seen_by(g, i).count() == 0; };
  const auto unseen = [&](Index j) { return !used[static_cast<std::size_t>(j)]; };
  const Bound bound{few_roundings<T>(), {got.query.shape, std::vector<double>(got.query.count(), 2.0)}};
  const char* why = "when keys that nobody sees, and queries that see nobody, became NaN and inf";
  const bool right = expect_zeros("d_query", got.query, g.queries, blind) &&
                     expect_zeros("d_key", got.key, g.keys, unseen) &&
                     expect_zeros("d_value", got.value, g.keys, unseen) && expect_same(got, want, why, deterministic) &&
                     (deterministic || expect_close("d_query", got.query, want.query, bound, QUERY_AXES));
  return right || not_so(way, g, type_name<T>(), deterministic);
}

// Head 1 is head 0 with NaN and inf in some keys, head 2 in their values. The gradients of queries that see none of
// them have the bits of head 0, and so do those of keys that nobody sees together with one of them.
template <typename T>
bool expect_gradients_unmoved(const Way<FlashBackward<T>>& way, Grouped g, const std::function<bool(Index)>& poisoned) {
  constexpr Index copies = 3;
  const Inputs one = random_of<T>(g, 5);
  const ForwardResult single = forward_result<T>(g, one);
  g.heads = g.kv_heads = copies;
  const auto copied = [&](const Tensor<float, 4>& from, Index operand) -> Fill {
    return [&, operand](Index, Index h, Index s, Index d) {
      const bool here = h > 0 && operand == h - 1 && poisoned(s);
      return here ? (s % 2 == 0 ? NOT_A_NUMBER : INF) : static_cast<double>(from(0, 0, s, d));
    };
  };
  const Inputs in = filled_inputs<T>(g.sizes(), copied(one.query, 2), copied(one.key, 0), copied(one.value, 1),
                                     copied(one.d_output, 2));
  ForwardResult forward = single;
  for (Array* array : {&forward.output, &forward.lse}) {
    const std::vector<double> head = array->values;
    array->shape[1] = copies;
    for (Index h = 1; h < copies; ++h) array->values.insert(array->values.end(), head.begin(), head.end());
  }
  const Gradients got = go_back(way, g, in, forward, /*deterministic=*/true);

  std::vector<bool> queries(static_cast<std::size_t>(g.queries)), keys(static_cast<std::size_t>(g.keys), true);
  for (Index j = 0; j < g.keys; ++j) keys[static_cast<std::size_t>(j)] = !poisoned(j);
  for (Index i = 0; i < g.queries; ++i) {
    const Range seen = seen_by(g, i);
    bool clean = true;
    for (Index j = seen.begin; j < seen.end; ++j) clean = clean && !poisoned(j);
    queries[static_cast<std::size_t>(i)] = clean;
    for (Index j = seen.begin; j < seen.end && !clean; ++j) keys[static_cast<std::size_t>(j)] = false;
  }
  const auto expect_rows = [&](const char* name, const Array& all, const std::vector<bool>& clean) {
    const auto rows = static_cast<Index>(clean.size());
    for (Index h = 1; h < copies; ++h)
      for (Index s = 0; s < rows; ++s) {
        const double* first = all.values.data();
        if (!clean[static_cast<std::size_t>(s)] ||
            std::equal(first + s * g.width, first + (s + 1) * g.width, first + (h * rows + s) * g.width)) {
          continue;
        }
        std::ostringstream text;
        text << "of row " << s << " noticed that " << (h % 2 == 1 ? "keys" : "values")
             << " which it has nothing to do with became NaN and inf";
        finding(name, text.str());
        return not_so(way, g, type_name<T>(), true);
      }
    return true;
  };
  return expect_rows("d_query", got.query, queries) && expect_rows("d_key", got.key, keys) &&
         expect_rows("d_value", got.value, keys);
}

// With `deterministic` dQ has the same bits in any order of blocks. It is a sum of large numbers that cancel and small
// ones that stay, so that hardly two orders of summation give the same: queries are 0 and weights therefore alike, the
// last third of the keys is minus the first, with the same values, and the second third is small.
bool expect_deterministic(const Way<FlashBackward<bf16>>& way, Index third) {
  const Grouped g{
      .queries = 8, .keys = 3 * third, .groups = {{0, 4, 0, 3 * third}, {4, 8, 0, 3 * third}}, .scale = 1.0f};
  const Fill keys = [third](Index b, Index h, Index s, Index d) {
    const double size = s < third ? 65536.0 : s < 2 * third ? 1.0 : -65536.0;
    return size * noise(2)(b, h, s % third, d);
  };
  const Fill values = [third](Index b, Index h, Index s, Index d) { return noise(3)(b, h, s % third, d); };
  const Inputs in = filled_inputs<bf16>(g.sizes(), everywhere(0.0), keys, values, noise(4));
  const ForwardResult forward = forward_result<bf16>(g, in);
  const Gradients want = go_back(way, g, in, forward, true);
  for (const std::uint64_t seed : {1u, 2u, 3u}) {
    if (kernels_are_checked() && seed > 1) continue;
    const AnotherOrder order(seed);
    if (!expect_same(go_back(way, g, in, forward, true), want, "when blocks and threads ran in another order")) {
      return not_so(way, g, "bf16", true);
    }
  }
  return true;
}

// ---- Numbered cases -------------------------------------------------------------------------------------------------

struct GroupedCase {
  const char* why;
  Grouped problem;
  Layouts layouts = {};
  double query_size = 1.0;
  int number = 0;  // its place in the list, from 1; also its seed
};

// clang-format off
// Their numbers never change: new ones go to the end.
const std::vector<GroupedCase>& grouped_cases() {
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

int number_of(Tried tried, const GroupedCase& c) { return 100 * static_cast<int>(tried) + c.number; }

// Kernels are tried with one type each, by turns, and go back one way or the other.
bool takes_bf16(const GroupedCase& c) { return c.number % 2 == 0; }
bool is_deterministic(const GroupedCase& c) { return c.number % 4 < 2; }

Index pairs_of(const GroupedCase& c) {
  return c.problem.queries * c.problem.keys * c.problem.heads * c.problem.width / 64;
}

bool is_tried(Tried tried, const GroupedCase& c) {
  if (tried == Tried::separate && c.number % 4 != 0 && c.number % 10 != 7) return false;  // tried in 2.05
  const Index most = tried == Tried::cpu_forward || tried == Tried::cpu_backward ? 4100 : 6000;
  return pairs_of(c) <= (kernels_are_checked() ? 2500 : most);
}

void for_each_case(Tried tried, const std::function<void(const GroupedCase&)>& body) {
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

std::vector<int> all_numbers() {
  std::vector<int> result;
  for (int tried = 0; tried < 5; ++tried) {
    for (const GroupedCase& c : grouped_cases()) {
      if (is_tried(static_cast<Tried>(tried), c)) result.push_back(number_of(static_cast<Tried>(tried), c));
    }
  }
  return result;
}

const Recognise recognise_grouped(all_numbers(), [](int number) -> std::vector<Array> {
  if (kernels_are_checked()) throw NotImplemented(__FILE__);
  const GroupedCase& c = grouped_cases().at(static_cast<std::size_t>(number % 100) - 1);
  switch (static_cast<Tried>(number / 100)) {
    case Tried::cpu_forward:
      return outputs_of(CPU_FORWARD, c);
    case Tried::cpu_backward:
      return outputs_of(CPU_BACKWARD, c);
    case Tried::separate:
      return takes_bf16(c) ? outputs_of(separate<bf16>(), c) : outputs_of(separate<fp16>(), c);
    case Tried::fused:
      return takes_bf16(c) ? outputs_of(fused<bf16>(), c) : outputs_of(fused<fp16>(), c);
    case Tried::fused_backward:
      break;
  }
  return takes_bf16(c) ? outputs_of(fused_backward<bf16>(), c) : outputs_of(fused_backward<fp16>(), c);
});

// ---- Bytes ----------------------------------------------------------------------------------------------------------

// Rows of keys, and of values, that the call loaded; 0 where nobody counts.
Index rows_loaded(const std::vector<KernelProfile>& profiles, const char* buffer, Index width) {
  return static_cast<Index>(bytes_loaded(profiles, buffer)) / (2 * width);
}

bool expect_rows_loaded(const std::vector<KernelProfile>& profiles, const Grouped& g, Index most,
                        const std::string& why) {
  for (const char* name : {"key", "value"}) {
    const Index rows = rows_loaded(profiles, name, g.width);
    if (!expect(rows <= most, "traffic",
                std::string(name) + ": " + std::to_string(rows) + " rows loaded; want at most " + std::to_string(most) +
                    ", " + why)) {
      return false;
    }
  }
  return true;
}

template <typename T>
bool expect_forward_traffic(const Grouped& g, Index most, const std::string& why) {
  const ForwardAnswer got = attend(fused<T>(), g, random_of<T>(g, 1));
  if (!kernels_are_judged()) return true;
  return expect_rows_loaded(got.profiles, g, most, why) || not_so(fused<T>(), g, type_name<T>());
}

template <typename T>
Gradients traffic_back(const Grouped& g, bool deterministic) {
  const Inputs in = random_of<T>(g, 1);
  return go_back(fused_backward<T>(), g, in, forward_result<T>(g, in), deterministic);
}

// `count` groups of 16 queries, all of the same keys.
Grouped coinciding(Index count, Index keys) {
  Grouped g{.queries = 16 * count, .keys = keys};
  for (Index n = 0; n < count; ++n) g.groups.push_back({16 * n, 16 * n + 16, 0, keys});
  return g;
}

// ---- Long sequences: some rows in float64 ---------------------------------------------------------------------------

struct Sampled {
  Array exact{{1, 1, 0, 0}, {}}, honest = exact, size = exact;

  void add(Index width, const std::vector<double>& row, const std::vector<double>& rounded_row,
           const std::vector<double>& size_row) {
    for (Array* array : {&exact, &honest, &size}) {
      ++array->shape[2];
      array->shape[3] = width;
    }
    exact.values.insert(exact.values.end(), row.begin(), row.end());
    honest.values.insert(honest.values.end(), rounded_row.begin(), rounded_row.end());
    size.values.insert(size.values.end(), size_row.begin(), size_row.end());
  }
};

// A row of a sum of products, exactly, as honest rounding makes it, and with every sign made positive.
struct Sum {
  explicit Sum(Index width) : exact(static_cast<std::size_t>(width), 0.0), honest(exact), size(exact) {}
  void add(double factor, double honest_factor, double factor_size, const float* row) {
    for (std::size_t d = 0; d < exact.size(); ++d) {
      const auto number = static_cast<double>(row[d]);
      exact[d] += factor * number;
      honest[d] += honest_factor * number;
      size[d] += factor_size * std::abs(number);
    }
  }
  template <typename T>
  void append_to(Sampled& sampled) {
    for (double& number : honest) number = rounded<T>(number);
    sampled.add(static_cast<Index>(exact.size()), exact, honest, size);
  }
  std::vector<double> exact, honest, size;
};

double dot(const float* one, const float* other, Index width, double* size = nullptr) {
  double sum = 0.0;
  for (Index d = 0; d < width; ++d) {
    const double product = static_cast<double>(one[d]) * static_cast<double>(other[d]);
    sum += product;
    if (size != nullptr) *size += std::abs(product);
  }
  return sum;
}

// Head and row.
using Places = std::vector<std::pair<Index, Index>>;

// Around the edges of some groups, and between.
Places places(const Grouped& g, bool of_keys) {
  Places picked;
  for (std::size_t n = 0; n < g.groups.size(); n += std::max<std::size_t>(1, g.groups.size() / 3)) {
    const Index begin = of_keys ? g.groups[n].k_begin : g.groups[n].q_begin;
    const Index end = of_keys ? g.groups[n].k_end : g.groups[n].q_end;
    const Index heads = of_keys ? g.kv_heads : g.heads;
    for (const Index s : {begin, begin + (end - begin) / 3, end - 1}) {
      if (begin < end) picked.push_back({static_cast<Index>(picked.size()) % heads, s});
    }
  }
  return picked;
}

Array rows_at(const Array& all, const Places& where) {
  const Index rows = all.shape[2], width = all.shape.size() > 3 ? all.shape[3] : 1;
  Array picked{{1, 1, static_cast<Index>(where.size())}, {}};
  if (all.shape.size() > 3) picked.shape.push_back(width);
  for (const auto& [h, s] : where) {
    const auto first = all.values.begin() + (h * rows + s) * width;
    picked.values.insert(picked.values.end(), first, first + width);
  }
  return picked;
}

// What a long problem took: GPU memory at most, and the largest errors of the sampled rows, as shares of what is
// allowed.
struct Taken {
  std::size_t bytes = 0;
  double output = 0.0, gradients = 0.0;
};

template <typename T>
bool expect_sampled(const char* name, const Array& got, const Sampled& want, double largest, const Axes& axes,
                    double& share) {
  const Bound bound{4.0 * std::numeric_limits<float>::epsilon() * (largest + 1.0), want.size};
  share = std::max(share, half_errors<T>(got, want.exact, want.honest, bound).share());
  return expect_close_in_half<T>(name, got, want.exact, want.honest, bound, "whose P, dS and results are rounded to",
                                 axes);
}

// A forward pass, and with `back` a backward pass from what it left behind; some rows of each are checked. Returns what
// was found to be right.
template <typename T>
bool expect_long(const Grouped& g, bool back, bool deterministic, Taken& taken) {
  const Inputs in = random_of<T>(g, 7);
  const Index width = g.width, shared = g.heads / g.kv_heads;
  const double scale = 1.0 / std::sqrt(static_cast<double>(width));
  const ForwardAnswer got = attend(fused<T>(), g, in);
  taken.bytes = peak_device_bytes();  // since the arguments were there: attend() and go_back() count anew
  const auto q = in.query.view();
  const auto k = in.key.view(), v = in.value.view();

  Sampled output;
  Array lse{{1, 1, 0}, {}};
  double largest = 0.0;
  const Places queries = places(g, /*of_keys=*/false);
  for (const auto& [h, i] : queries) {
    const Range seen = seen_by(g, i);
    std::vector<double> scores;
    double top = -std::numeric_limits<double>::infinity();
    for (Index j = seen.begin; j < seen.end; ++j) {
      double size = 0.0;
      scores.push_back(scale * dot(&q(0, h, i, 0), &k(0, h / shared, j, 0), width, &size));
      top = std::max(top, scores.back());
      largest = std::max(largest, scale * size);
    }
    double sum = 0.0;
    for (const double score : scores) sum += std::exp(score - top);
    Sum row(width);
    for (Index j = seen.begin; j < seen.end; ++j) {
      const double weight = std::exp(scores[static_cast<std::size_t>(j - seen.begin)] - top) / sum;
      row.add(weight, rounded<T>(weight), weight, &v(0, h / shared, j, 0));
    }
    row.template append_to<T>(output);
    ++lse.shape[2];
    lse.values.push_back(seen.count() > 0 ? top + std::log(sum) : top);
  }
  const bool lse_is_right =
      expect_close("lse", rows_at(got.lse, queries), lse, lse_bound(lse, largest, roundoff<T>()), LSE_AXES);
  if (!expect_sampled<T>("output", rows_at(got.output, queries), output, largest, QUERY_AXES, taken.output) ||
      !lse_is_right) {
    return not_so(fused<T>(), g, type_name<T>());
  }
  if (!back) return true;

  // From here on output and lse are what the forward pass made them.
  const Gradients gradients = go_back(fused_backward<T>(), g, in, {got.output, got.lse}, deterministic);
  taken.bytes = std::max(taken.bytes, peak_device_bytes());
  const auto d_o = in.d_output.view();
  const auto delta_of = [&](Index h, Index i) {
    double delta = 0.0;
    for (Index d = 0; d < width; ++d) {
      delta += static_cast<double>(d_o(0, h, i, d)) *
               got.output.values[static_cast<std::size_t>((h * g.queries + i) * width + d)];
    }
    return delta;
  };
  // Calls body(weight, dS, size of dS) of a pair.
  const auto pair = [&](Index h, Index i, Index j, double delta, const auto& body) {
    const double row_lse = got.lse.values[static_cast<std::size_t>(h * g.queries + i)];
    const double weight = std::exp(scale * dot(&q(0, h, i, 0), &k(0, h / shared, j, 0), width) - row_lse);
    double size = 0.0;
    const double d_weight = dot(&d_o(0, h, i, 0), &v(0, h / shared, j, 0), width, &size);
    body(weight, scale * weight * (d_weight - delta), scale * weight * (size + std::abs(delta)));
  };
  Sampled d_query, d_key, d_value;
  for (const auto& [h, i] : queries) {
    Sum row(width);
    const Range seen = seen_by(g, i);
    const double delta = delta_of(h, i);
    for (Index j = seen.begin; j < seen.end; ++j) {
      pair(h, i, j, delta,
           [&, h = h](double, double ds, double size) { row.add(ds, rounded<T>(ds), size, &k(0, h / shared, j, 0)); });
    }
    row.template append_to<T>(d_query);
  }
  const Places keys = places(g, /*of_keys=*/true);
  for (const auto& [hk, j] : keys) {
    Sum of_key(width), of_value(width);
    for (Index h = hk * shared; h < (hk + 1) * shared; ++h)
      for (const Group& group : g.groups)
        for (Index i = group.q_begin; i < group.q_end; ++i) {
          const Index seen =
              keys_seen(g.causal, i - group.q_begin, group.q_end - group.q_begin, group.k_end - group.k_begin);
          if (j < group.k_begin || j >= group.k_begin + seen) continue;
          pair(h, i, j, delta_of(h, i), [&](double weight, double ds, double size) {
            of_key.add(ds, rounded<T>(ds), size, &q(0, h, i, 0));
            of_value.add(weight, rounded<T>(weight), weight, &d_o(0, h, i, 0));
          });
        }
    of_key.template append_to<T>(d_key);
    of_value.template append_to<T>(d_value);
  }
  const auto right = [&](const char* name, const Array& all, const Places& where, const Sampled& want,
                         const Axes& axes) {
    return expect_sampled<T>(name, rows_at(all, where), want, largest, axes, taken.gradients);
  };
  const bool key_is_right = right("d_key", gradients.key, keys, d_key, KEY_AXES);
  const bool value_is_right = right("d_value", gradients.value, keys, d_value, KEY_AXES);
  return (right("d_query", gradients.query, queries, d_query, QUERY_AXES) && key_is_right && value_is_right) ||
         not_so(fused_backward<T>(), g, type_name<T>(), deterministic);
}

template <typename T>
bool expect_long(const Grouped& g, bool back, bool deterministic = false) {
  Taken taken;
  return expect_long<T>(g, back, deterministic, taken);
}

std::string mebibytes(std::size_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

// The same, and the figures are printed.
template <typename T>
bool expect_stress(const Grouped& g, bool back, bool deterministic = false) {
  Taken taken;
  if (!expect_long<T>(g, back, deterministic, taken)) return false;
  std::ostringstream text;
  text.precision(2);
  text << g.queries << " tokens in " << g.groups.size() << " groups, H=" << g.heads << " Hk=" << g.kv_heads
       << " D=" << g.width << (g.causal ? ", causal, " : ", ") << type_name<T>() << ": at most "
       << mebibytes(taken.bytes) << " on the GPU, nothing beyond the arguments; largest error of the output "
       << taken.output << " of what is allowed";
  if (back) text << ", of the gradients " << taken.gradients;
  figures(text.str());
  return true;
}

// `lengths` tokens behind each other, each sequence a group; with `shared` keys every group also sees the last so many
// of the sequence before it.
Grouped sequences(const std::vector<Index>& lengths, Index shared = 0) {
  Grouped g{.queries = 0, .keys = 0};
  for (const Index length : lengths) {
    const Index begin = g.queries;
    g.groups.push_back({begin, begin + length, std::max<Index>(0, begin - shared), begin + length});
    g.queries = g.keys = begin + length;
  }
  return g;
}

Grouped with_heads(Grouped g, Index heads, Index kv_heads, Index width, bool causal) {
  g.heads = heads;
  g.kv_heads = kv_heads;
  g.width = width;
  g.causal = causal;
  return g;
}

// A short one on the virtual GPU, so that nobody takes a stub for a skipped test.
bool stress_needs_a_gpu() {
  return needs_a_gpu([] {
    return expect_long<fp16>(with_heads(sequences({9, 21}, 5), 2, 1, 64, true), /*back=*/true);
  });
}

// Bytes of the GPU's memory that are taken, by whatever means.
std::size_t bytes_taken() {
#if KATA_REAL_GPU
  std::size_t free = 0, total = 0;
  cudaMemGetInfo(&free, &total);
  return total - free;
#else
  return device_bytes();
#endif
}

}  // namespace

TEST_SUITE("phase4.05_grouped") {
  // ---- The CPU's path -----------------------------------------------------------------------------------------------

  TEST_CASE("cpu: the example in the README") {
    ask("Two groups, three keys. What has key 1 to do with query 0, and what with query 1?");
    if (expect_example(CPU_FORWARD)) expect_example(CPU_BACKWARD, true);
  }

  TEST_CASE("cpu: a query counts the keys of its own slice") {
    ask("Every score is 0, so exp(lse) is how many keys a query has seen. Which of the four numbers of a group did "
        "you use for which view, and who wrote the rows of queries that are in no group?");
    for_each_arrangement(false, {.heads = 2, .width = 16}, [](const Grouped& g) {
      return expect_counts(CPU_FORWARD, g) && expect_needles(CPU_FORWARD, g);
    });
  }

  TEST_CASE("cpu: causal counts from the end of a slice") {
    ask("The last query of a group sees the last key of its slice. With 3 queries and 5 keys, how many does the "
        "first one see? Does it matter where in the tensor the slice lies?");
    for_each_arrangement(true, {.heads = 2, .width = 16}, [](const Grouped& g) {
      return expect_counts(CPU_FORWARD, g) && expect_needles(CPU_FORWARD, g);
    });
  }

  TEST_CASE("cpu: a key hears from every group that sees it") {
    ask("Key 10 belongs to two slices. How many gradients meet there, and what was in that place before the first?");
    for (const bool causal : {false, true}) {
      for_each_arrangement(causal, {.width = 16},
                           [](const Grouped& g) { return expect_even_shares(CPU_BACKWARD, g, true); });
    }
    for_each_arrangement(true, {.heads = 4, .kv_heads = 2, .width = 16},
                         [](const Grouped& g) { return expect_even_shares(CPU_BACKWARD, g, true); });
  }

  TEST_CASE("cpu: no query and no key") {
    ask("With no key at all, what are the maximum and the sum of nothing? And who writes the gradients of keys that "
        "nobody asks?");
    for (const Grouped& g : nothing_to_do()) {
      if (!expect_counts(CPU_FORWARD, g) || !expect_even_shares(CPU_BACKWARD, g, true)) return;
    }
  }

  TEST_CASE("cpu: query heads share key and value heads") {
    ask("With 6 query heads and 2 key/value heads, which of the two does query head 1 read? Head 3? And whose "
        "gradients does a key add up?");
    for_each_arrangement(false, {.heads = 6, .kv_heads = 2, .width = 16},
                         [](const Grouped& g) { return expect_own_kv_head(CPU_FORWARD, g); });
  }

  TEST_CASE("cpu: keys outside of a slice reach nobody") {
    ask("A key of another group holds NaN. Did it come near a product of yours?");
    if (!expect_foreign_unseen(CPU_FORWARD, 16)) return;
    for_each_arrangement(true, {.heads = 2, .width = 16},
                         [](const Grouped& g) { return expect_strangers_are_harmless(CPU_BACKWARD, g, true); });
  }

  TEST_CASE("cpu: forward agrees with the float64 reference") {
    ask("Which of the cases agree, and what have the others in common?");
    for_each_case(Tried::cpu_forward, [](const GroupedCase& c) {
      expect_attention(CPU_FORWARD, c.problem, inputs_of<float>(c), c.layouts);
    });
  }

  TEST_CASE("cpu: backward agrees with the float64 reference") {
    ask("Which of the cases agree, and what have the others in common?");
    for_each_case(Tried::cpu_backward, [](const GroupedCase& c) {
      expect_right_gradients(CPU_BACKWARD, c.problem, inputs_of<float>(c), is_deterministic(c), c.layouts);
    });
  }

  // ---- (a) A call for each group ------------------------------------------------------------------------------------

  TEST_CASE("one call a group: a query counts the keys of its own slice") {
    ask("A slice of a view is a pointer and a shape. Where does group g begin in each of the five views, and which "
        "call writes the rows of queries that are in no group?");
    for_each_arrangement(false, {}, [](const Grouped& g) { return expect_counts(separate<bf16>(), g); });
  }

  TEST_CASE("one call a group: query heads share key and value heads") {
    ask("2.05 wants as many heads of keys as of queries. Which strides let three heads read one, without a copy?");
    expect_own_kv_head(separate<fp16>(),
                       {.queries = 5, .keys = 9, .groups = {{0, 5, 2, 9}}, .heads = 6, .kv_heads = 2});
  }

  TEST_CASE("one call a group: agrees with the float64 reference") {
    ask("Which of the cases agree, and what have the others in common?");
    for_each_case(Tried::separate, [](const GroupedCase& c) {
      if (takes_bf16(c)) {
        expect_attention(separate<bf16>(), c.problem, inputs_of<bf16>(c), c.layouts);
      } else {
        expect_attention(separate<fp16>(), c.problem, inputs_of<fp16>(c), c.layouts);
      }
    });
  }

  // ---- (b) The fused forward kernel ---------------------------------------------------------------------------------

  TEST_CASE("fused: the example in the README") {
    ask("Two groups of one query each, in one block. Which keys does each row see, and which does the block load?");
    for_both_types([](auto type) {
      using T = decltype(type);
      expect_example(separate<T>());
      expect_example(fused<T>());
    });
  }

  TEST_CASE("fused: one group is plain attention") {
    ask("With one group of everything nothing is new. What has changed in your kernel since 2.05?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const Index width : {64, 128}) {
        if ((width == 64) != std::is_same_v<T, fp16>) continue;
        Grouped g{.queries = 33, .keys = 70, .groups = {{0, 33, 0, 70}}, .width = width};
        for (const bool causal : {false, true}) {
          g.causal = causal;
          if (!expect_needles(fused<T>(), g) || !expect_attention(fused<T>(), g, random_of<T>(g, 2))) return;
        }
      }
    });
  }

  TEST_CASE("fused: a query counts the keys of its own slice") {
    ask("Every score is 0, so exp(lse) is how many keys a query has seen. Two rows of one block are of two groups: "
        "from where does each know its slice? And the rows of no group, whose are they?");
    for_each_arrangement(false, {}, [](const Grouped& g) { return expect_counts(fused<fp16>(), g); });
  }

  TEST_CASE("fused: every key of a slice can win") {
    ask("Each query meets one key of its slice. Where does the slice begin in your tile, where does it end, and "
        "which of the two is no multiple of anything?");
    for_each_arrangement(false, {}, [](const Grouped& g) { return expect_needles(fused<bf16>(), g); });
    for_each_arrangement(true, {}, [](const Grouped& g) { return expect_needles(fused<fp16>(), g); });
  }

  TEST_CASE("fused: causal counts from the end of a slice") {
    ask("The last query of a group sees the last key of its slice. A row has a place in its block, in its group and "
        "in the tensor: which of the three counts here?");
    for_each_arrangement(true, {}, [](const Grouped& g) { return expect_counts(fused<bf16>(), g); });
  }

  TEST_CASE("fused: groups of every length and up to 128 of them") {
    ask("Groups of 15, 16 and 17 queries, and of one. To which group does the first query behind a boundary belong? "
        "Is there a number of groups that you had counted on?");
    for (const Index count : {2, 3, 4, 8, 16, 40, 128}) {
      Grouped g{.queries = 0, .keys = 160};
      for (Index n = 0; n < count; ++n) {
        const Index length = count > 16 ? 1 : std::array<Index, 4>{15, 1, 17, 16}[static_cast<std::size_t>(n % 4)];
        g.groups.push_back({g.queries, g.queries + length, n, n + 1 + n % 5 * 7});
        g.queries += count == 128 ? length + 1 : length;  // with a gap behind each
      }
      if (kernels_are_checked() && count > 4 && count != 40) continue;
      if (!expect_counts(fused<fp16>(), g)) return;
      g.causal = true;
      if (count <= 16 && !kernels_are_checked() && !expect_needles(fused<bf16>(), g)) return;
    }
  }

  TEST_CASE("fused: no query and no key") {
    ask("With no key at all, what are the maximum and the sum of nothing? How many blocks do you launch, and who "
        "writes "
        "the gradients of keys that nobody asks?");
    for (const Grouped& g : nothing_to_do()) {
      if (!expect_counts(separate<fp16>(), g) || !expect_counts(fused<fp16>(), g)) return;
      for (const bool deterministic : {false, true}) {
        if (!expect_even_shares(fused_backward<bf16>(), g, deterministic)) return;
      }
    }
  }

  TEST_CASE("fused: query heads share key and value heads") {
    ask("With 6 query heads and 2 key/value heads, which of the two does query head 1 read? Head 3? How many rows "
        "want the tile that a block has loaded?");
    expect_own_kv_head(
        fused<fp16>(),
        {.queries = 21, .keys = 19, .groups = {{0, 9, 0, 15}, {9, 21, 9, 19}}, .heads = 6, .kv_heads = 2});
    expect_own_kv_head(fused<bf16>(),
                       {.queries = 4, .keys = 19, .groups = {{1, 4, 2, 19}}, .heads = 32, .kv_heads = 8});
    expect_own_kv_head(fused<bf16>(),
                       {.queries = 3, .keys = 19, .groups = {{0, 1, 2, 9}, {2, 3, 4, 19}}, .heads = 20, .kv_heads = 1});
    expect_own_kv_head(fused<fp16>(), {.queries = 70,
                                       .keys = 19,
                                       .groups = {{0, 67, 0, 15}, {67, 70, 9, 19}},
                                       .heads = 4,
                                       .kv_heads = 2,
                                       .causal = true});
  }

  TEST_CASE("fused: keys outside of a slice reach nobody") {
    ask("A tile is loaded for one group, and another one of the same block may not see half of it: NaN there. A "
        "weight of 0 is no protection: what is 0 times NaN, and who multiplies a whole tile at once?");
    if (!expect_foreign_unseen(fused<bf16>(), 64, 1)) return;
    if (!kernels_are_checked()) expect_foreign_unseen(fused<fp16>(), 64, 0);
  }

  TEST_CASE("fused: what a key or a value holds reaches every query that may see it") {
    ask("A key of two slices is NaN, or its value is in one channel. Did all who see it notice, and nobody else?");
    for (const bool causal : {false, true}) {
      for (const Arrangement& a : arrangements()) {
        if (a.keys != 44 || (kernels_are_checked() && (causal || a.queries > 30))) continue;
        if (!expect_nan_arrives(fused<fp16>(),
                                {.queries = a.queries, .keys = a.keys, .groups = a.groups, .causal = causal})) {
          return;
        }
      }
    }
  }

  TEST_CASE("fused: the same inputs give the same bits") {
    ask("Call it, then with other groups, then as before. What did you keep from one call for the next?");
    const Grouped g{.queries = 40, .keys = 70, .groups = {{0, 20, 0, 50}, {20, 40, 25, 70}}, .causal = true};
    const Grouped other{.queries = 40, .keys = 70, .groups = {{0, 8, 30, 70}, {9, 40, 0, 33}}};
    const Inputs in = random_of<bf16>(g, 1);
    const ForwardAnswer want = attend(fused<bf16>(), g, in);
    if (!expect_attention(fused<bf16>(), other, in)) return;
    for (const std::uint64_t seed : {1u, 2u}) {
      const AnotherOrder order(seed);
      if (!expect_same(attend(fused<bf16>(), g, in), want, "in a later call, in another order of blocks")) return;
    }
  }

  TEST_CASE("fused: 2000 equal weights and as exact as 16 bits allow") {
    ask("Which numbers did you round to 16 bits? The operands arrive so, and the weights and the output have to be. "
        "Anything else, and anything twice?");
    for_both_types([](auto type) {
      using T = decltype(type);
      const Index keys = kernels_are_checked() ? 150 : 2000;
      const Grouped g{.queries = 5, .keys = keys, .groups = {{0, 2, 0, keys}, {2, 5, 3, keys - 1}}};
      const Fill values = [](Index b, Index h, Index j, Index d) { return 1.0 + 0.4 * noise(9)(b, h, j, d); };
      const Inputs alike = filled_inputs<T>(g.sizes(), everywhere(0.0), noise(3), values, everywhere(0.0));
      if (!expect_attention(fused<T>(), g, alike)) return;
      const Grouped few{.queries = 40, .keys = 75, .groups = {{0, 20, 0, 50}, {20, 40, 25, 75}}, .heads = 2};
      if (!expect_attention(fused<T>(), few, random_of<T>(few, 4))) return;
    });
  }

  TEST_CASE("fused: inputs of ten times the size") {
    ask("Scores of a hundred times the size: one key has nearly all the weight. Was the largest score subtracted "
        "before the exponent, in every tile, and for every group its own?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const bool causal : {false, true}) {
        const Grouped g{.queries = 40, .keys = 75, .groups = {{0, 20, 0, 50}, {20, 40, 25, 75}}, .causal = causal};
        const auto tenfold = [](unsigned seed) -> Fill {
          return [=](Index b, Index h, Index s, Index d) { return 10.0 * noise(seed)(b, h, s, d); };
        };
        const Inputs in = filled_inputs<T>(g.sizes(), tenfold(1), tenfold(2), tenfold(3), everywhere(0.0));
        if (!expect_attention(fused<T>(), g, in)) return;
      }
    });
  }

  TEST_CASE("fused: scores far from 0") {
    ask("Every score is -256, or +256, and the values are 1. Where does your search for the maximum begin, and what is "
        "exp(256)?");
    for (const double size : {-16.0, 16.0}) {
      const Grouped g{.queries = 9, .keys = 70, .groups = {{0, 4, 0, 66}, {4, 9, 60, 70}}, .scale = 1.0f};
      const auto first = [](double number) -> Fill {
        return [=](Index, Index, Index, Index d) { return d == 0 ? number : 0.0; };
      };
      const Inputs in = filled_inputs<bf16>(g.sizes(), first(16.0), first(size), everywhere(1.0), everywhere(0.0));
      if (!expect_attention(fused<bf16>(), g, in)) return;
    }
  }

  TEST_CASE("fused: agrees with the float64 reference") {
    ask("Which of the cases agree, and what have the others in common?");
    for_each_case(Tried::fused, [](const GroupedCase& c) {
      if (takes_bf16(c)) {
        expect_attention(fused<bf16>(), c.problem, inputs_of<bf16>(c), c.layouts);
      } else {
        expect_attention(fused<fp16>(), c.problem, inputs_of<fp16>(c), c.layouts);
      }
    });
  }

  TEST_CASE("fused: keys and values are loaded once for all groups that share them") {
    ask("Eight groups of 16 queries read the same keys: 128 rows. How often does your block have to load a key for "
        "64 of them? And how many rows of a GQA group want the same one?");
    if (needs_a_check()) return;
    const bool watched = kernels_are_checked();  // otherwise nobody counts
    const Index keys = watched ? 128 : 3;
    Grouped g = coinciding(8, keys);
    if (!expect_forward_traffic<fp16>(g, 2 * keys, "once for every 64 of 128 rows: eight groups share all keys"))
      return;
    g = {.queries = 16, .keys = keys, .groups = {{0, 16, 0, keys}}, .heads = 8};
    if (!expect_forward_traffic<bf16>(g, 2 * keys, "once for every 64 of 128 rows: eight heads share all keys")) return;
    if (!watched) return;
    g = {.queries = 64,
         .keys = 192,
         .groups = {{0, 16, 0, 128}, {16, 32, 64, 192}, {32, 48, 0, 192}, {48, 64, 128, 192}}};
    expect_forward_traffic<bf16>(g, 192, "once: the four groups have 64 rows together");
  }

  TEST_CASE("fused: keys that nobody sees are not loaded") {
    ask("Which tiles does a block have to walk, if its groups see two slices far apart, or if the last of its rows "
        "stops early under causal?");
    if (needs_a_check()) return;
    if (!kernels_are_checked()) {
      expect_counts(fused<fp16>(), {.queries = 2, .keys = 2, .groups = {{0, 2, 0, 2}}});
      return;
    }
    Grouped g{.queries = 128, .keys = 512, .groups = {{0, 64, 0, 64}, {64, 128, 384, 448}}};
    if (!expect_forward_traffic<fp16>(g, 256, "two slices of 64 keys, in tiles of 128 at most")) return;
    g = {.queries = 256, .keys = 256, .groups = {{0, 128, 0, 128}, {128, 256, 128, 256}}, .causal = true};
    expect_forward_traffic<fp16>(g, 460, "causal, two groups of 128: without it 512");
  }

  // ---- (c) The fused backward kernels -------------------------------------------------------------------------------

  TEST_CASE("fused backward: the example in the README") {
    ask("Two groups share key 1. What does each of them say about it, and in which order of your loops do they meet?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const bool deterministic : {false, true}) {
        if (!expect_example(fused_backward<T>(), deterministic)) return;
      }
    });
  }

  TEST_CASE("fused backward: one group is plain attention") {
    ask("With one group of everything nothing is new. What has changed in your kernels since 3.05?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const Index width : {64, 128}) {
        if ((width == 64) != std::is_same_v<T, fp16> || (kernels_are_checked() && width == 128)) continue;
        Grouped g{.queries = 33, .keys = 40, .groups = {{0, 33, 0, 40}}, .width = width};
        for (const bool causal : {false, true}) {
          g.causal = causal;
          if (!expect_even_shares(fused_backward<T>(), g, causal)) return;
          if (!expect_right_gradients(fused_backward<T>(), g, random_of<T>(g, 2), !causal)) return;
        }
      }
    });
  }

  TEST_CASE("fused backward: a key hears from every group that sees it") {
    ask("Key 10 belongs to two slices. How many gradients meet there, and who adds them up? Which groups does a "
        "block of keys have to ask?");
    for_each_arrangement(false, {}, [](const Grouped& g) {
      return g.keys % 2 == 0 ? expect_even_shares(fused_backward<fp16>(), g, false)
                             : expect_even_shares(fused_backward<bf16>(), g, true);
    });
  }

  TEST_CASE("fused backward: causal counts from the end of a slice") {
    ask("The first query of a group that sees a key: how do you find it from the key's place in the slice, and does "
        "it lie in the tile where you begin?");
    for_each_arrangement(true, {}, [](const Grouped& g) {
      return g.keys % 2 == 0 ? expect_even_shares(fused_backward<bf16>(), g, true)
                             : expect_even_shares(fused_backward<fp16>(), g, false);
    });
  }

  TEST_CASE("fused backward: groups of every length and up to 128 of them") {
    ask("Groups of 15, 16 and 17 queries, and of one. Is there a number of groups that you had counted on, and a "
        "tile of queries that began in one group and ended in the next?");
    for (const Index count : {3, 16, 128}) {
      Grouped g{.queries = 0, .keys = 100};
      for (Index n = 0; n < count; ++n) {
        const Index length = count > 16 ? 1 : std::array<Index, 4>{15, 1, 17, 16}[static_cast<std::size_t>(n % 4)];
        g.groups.push_back({g.queries, g.queries + length, n % 60, n % 60 + 1 + n % 5 * 7});
        g.queries += count == 128 ? length + 1 : length;  // with a gap behind each
      }
      if (kernels_are_checked() && count > 3) continue;
      if (!expect_even_shares(fused_backward<bf16>(), g, count % 16 == 0)) return;
      g.causal = true;
      if (count == 128) continue;
      if (!expect_even_shares(fused_backward<fp16>(), g, count % 16 != 0)) return;
    }
  }

  TEST_CASE("fused backward: a key hears from every query head that shares it") {
    ask("How many query heads read this key? Where do their shares meet: in registers, in memory, and in how many "
        "bits?");
    for (const bool deterministic : {false, true}) {
      Grouped g{.queries = 21, .keys = 19, .groups = {{0, 9, 0, 15}, {9, 21, 9, 19}}, .heads = 6, .kv_heads = 2};
      if (!expect_even_shares(fused_backward<bf16>(), g, deterministic)) return;
      if (kernels_are_checked()) continue;
      g = {.queries = 70, .keys = 19, .groups = {{0, 67, 0, 15}, {67, 70, 9, 19}}, .heads = 4, .kv_heads = 2};
      if (!expect_even_shares(fused_backward<bf16>(), g, deterministic)) return;
      g = {.queries = 4, .keys = 19, .groups = {{1, 4, 2, 19}}, .heads = 32, .kv_heads = 8, .causal = true};
      if (!expect_even_shares(fused_backward<fp16>(), g, deterministic)) return;
    }
  }

  TEST_CASE("fused backward: 48 shares are rounded once") {
    ask("24 groups and 2 heads each add a little to the gradient of one key. What is 64 + 0.25 in 16 bits, and how "
        "many roundings come before the last share is in?");
    for_both_types([](auto type) {
      using T = decltype(type);
      const Index count = kernels_are_checked() ? 4 : 24;
      Grouped g{.queries = count, .keys = 3, .heads = 2};
      for (Index n = 0; n < count; ++n) g.groups.push_back({n, n + 1, 0, 3});
      const auto near_one = [](unsigned seed) -> Fill {
        return [=](Index b, Index h, Index s, Index d) { return 1.0 + 0.2 * noise(seed)(b, h, s, d); };
      };
      const Inputs in = filled_inputs<T>(g.sizes(), near_one(1), near_one(2), noise(3), near_one(4));
      if (!expect_right_gradients(fused_backward<T>(), g, in, std::is_same_v<T, fp16>)) return;
    });
  }

  TEST_CASE("fused backward: what nobody sees and who sees nobody have gradients of 0") {
    ask("Keys in no slice, queries in no group, slices without a key: who writes their gradients? And if they hold "
        "NaN, into whose tile are they loaded?");
    for_each_arrangement(true, {}, [](const Grouped& g) {
      if (g.groups.size() == 16 || (kernels_are_checked() && g.queries * g.keys > 2200)) return true;
      const bool deterministic = g.groups.size() % 2 == 0;
      return g.keys % 2 == 0 ? expect_strangers_are_harmless(fused_backward<bf16>(), g, deterministic)
                             : expect_strangers_are_harmless(fused_backward<fp16>(), g, !deterministic);
    });
  }

  TEST_CASE("fused backward: keys outside of a slice reach nobody") {
    ask("A key of another group holds NaN, in the same tile. dS is 0 there, and a tensor core multiplies it by that "
        "key all the same: what could stand in the tile instead?");
    const bool first = for_each_shared_slice(1, [](Grouped g, const Group& group) {
      g.causal = group.k_begin == 0;
      return expect_gradients_unmoved(fused_backward<bf16>(), g,
                                      [=](Index j) { return j < group.k_begin || j >= group.k_end; });
    });
    if (!first || kernels_are_checked()) return;
    for_each_shared_slice(0, [](Grouped g, const Group& group) {
      const Index middle = (group.k_begin + group.k_end + 1) / 2;
      g.causal = group.k_begin > 0;
      return expect_gradients_unmoved(fused_backward<fp16>(), g, [=](Index j) { return j >= middle; });
    });
  }

  TEST_CASE("fused backward: the gradients may hold anything before the call and no bit depends on an order") {
    ask("Two blocks add to the same number. Is (a + b) + c the same as (c + a) + b? With deterministic, who owns a "
        "row of dQ, and a row of dK that two groups share?");
    Grouped g{.queries = 40, .keys = 140, .groups = {{0, 18, 0, 140}, {18, 40, 25, 130}}};
    if (kernels_are_checked()) g = {.queries = 20, .keys = 70, .groups = {{0, 9, 0, 70}, {9, 20, 25, 66}}};
    const Inputs in = random_of<bf16>(g, 1);
    const ExpectedBackward<bf16> want = expected_backward<bf16>(in, {}, mask_of(g));
    Grouped other = g;  // of the same sizes, so that what was kept for them would be used
    for (Group& group : other.groups) group.k_begin += 3;
    if (!expect_right_gradients(fused_backward<bf16>(), other, in, true)) return;
    for (const bool deterministic : {true, false}) {
      const Gradients first = go_back(fused_backward<bf16>(), g, in, want.forward, deterministic);
      for (const std::uint64_t seed : {1u, 2u}) {
        if (kernels_are_checked() && seed > 1) continue;
        const AnotherOrder order(seed);
        const Gradients got = go_back(fused_backward<bf16>(), g, in, want.forward, deterministic);
        if (!expect_same(got, first, "when blocks and threads ran in another order", deterministic) ||
            !expect_gradients<bf16>(got, want.gradients)) {
          not_so(fused_backward<bf16>(), g, "bf16", deterministic);
          return;
        }
      }
    }
    expect_deterministic(fused_backward<bf16>(), 128);
  }

  TEST_CASE("fused backward: agrees with the float64 reference") {
    ask("Which of the cases agree, and what have the others in common?");
    for_each_case(Tried::fused_backward, [](const GroupedCase& c) {
      if (takes_bf16(c)) {
        expect_right_both_ways(fused_backward<bf16>(), c);
      } else {
        expect_right_both_ways(fused_backward<fp16>(), c);
      }
    });
  }

  TEST_CASE("fused backward: keys are loaded once for all groups and queries by those who see them") {
    ask("A block of keys meets eight groups one after the other. Which rows stay where they are meanwhile? And which "
        "groups does it not have to meet at all?");
    if (needs_a_check()) return;
    const bool watched = kernels_are_checked();  // otherwise nobody counts
    const Index keys = watched ? 64 : 3;
    for (const bool deterministic : {false, true}) {
      const Grouped same = coinciding(watched ? 8 : 1, keys);
      const Gradients got = traffic_back<fp16>(same, deterministic);
      if (kernels_are_judged() && !expect_rows_loaded(got.profiles, same, 4 * keys,
                                                      "by the kernels that own them, and for every 64 of 128 rows")) {
        not_so(fused_backward<fp16>(), same, "fp16", deterministic);
        return;
      }
      if (!watched) return;
      Grouped apart{.queries = 64, .keys = 256};
      for (Index n = 0; n < 8; ++n) apart.groups.push_back({8 * n, 8 * n + 8, 32 * n, 32 * n + 32});
      const Gradients seen = traffic_back<bf16>(apart, deterministic);
      const Index rows = rows_loaded(seen.profiles, "query", apart.width);
      if (kernels_are_judged() && !expect(rows <= 4 * 64, "traffic",
                                          "query: " + std::to_string(rows) +
                                              " rows loaded of 64; want at most 256: each is seen by 32 keys of "
                                              "256")) {
        not_so(fused_backward<bf16>(), apart, "bf16", deterministic);
        return;
      }
    }
  }

  // ---- What only a real GPU has the time for ------------------------------------------------------------------------

  TEST_CASE("long sequences and many heads") {
    ask("The short ones are right. Which of your numbers has a limit that only a long sequence reaches?");
    if (stress_needs_a_gpu()) return;
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const bool causal : {false, true}) {
        for (const Grouped& g : {
                 with_heads(sequences({256, 256}), 8, 8, 64, causal),
                 with_heads(sequences({512}), 16, 16, 128, causal),
                 with_heads(sequences({1024, 1024, 1024, 1024}), 8, 8, 64, causal),
                 with_heads(sequences({100, 9900}), 2, 1, 64, causal),
                 with_heads(sequences({128, 1024, 257, 640, 511, 129, 900, 384}, 100), 4, 2, 64, causal),
                 with_heads(sequences({128, 512, 257, 130}, 300), 32, 8, 128, causal),
                 with_heads(sequences(std::vector<Index>(128, 1)), 4, 1, 128, causal),
             }) {
          if (!expect_long<T>(g, /*back=*/true, /*deterministic=*/causal)) return;
        }
      }
    });
  }

  TEST_CASE("stress: 65536 and 131072 tokens forward") {
    ask("Which of your indices is an int? What is 131072 x 2 x 64, in bytes, and what is a product of two lengths?");
    if (stress_needs_a_gpu()) return;
    // Two halves, the second of which sees the first as well; then one slice for all.
    for (const bool causal : {false, true}) {
      if (!expect_stress<bf16>(with_heads(sequences({32768, 32768}, 32768), 2, 1, 128, causal), false)) return;
    }
    Grouped all = with_heads(sequences({65536, 65536}), 2, 1, 64, false);
    for (Group& group : all.groups) group.k_begin = 0, group.k_end = all.keys;
    expect_stress<fp16>(all, false);
  }

  TEST_CASE("stress: 32768 tokens forward and backward") {
    ask("A key of the first slice hears from 32768 queries. In how many bits do you count them, and add them up?");
    if (stress_needs_a_gpu()) return;
    for (const bool deterministic : {false, true}) {
      const Grouped g = with_heads(sequences({8192, 100, 16284, 8192}, 8000), 4, 1, 64, deterministic);
      if (!expect_stress<bf16>(g, true, deterministic)) return;
    }
    Grouped all = with_heads(sequences({16384, 16384}), 2, 2, 128, false);
    for (Group& group : all.groups) group.k_begin = 0, group.k_end = all.keys;
    expect_stress<fp16>(all, true);
  }

  TEST_CASE("stress: 32 sequences ten times over") {
    ask("Does the tenth call take what the first one took?");
    if (stress_needs_a_gpu()) return;
    std::vector<Index> lengths;
    for (Index n = 0; n < 32; ++n) lengths.push_back(128 + n * 389 % 897);
    const Grouped g = with_heads(sequences(lengths, 64), 2, 1, 128, true);
    if (!expect_stress<bf16>(g, true, true)) return;
    const Inputs in = random_of<bf16>(g, 7);
    const ForwardAnswer want = attend(fused<bf16>(), g, in);
    const Gradients gradients = go_back(fused_backward<bf16>(), g, in, {want.output, want.lse});
    const std::size_t before = bytes_taken();
    for (int again = 0; again < 10; ++again) {
      if (!expect_same(attend(fused<bf16>(), g, in), want, "in a later call") ||
          !expect_same(go_back(fused_backward<bf16>(), g, in, {want.output, want.lse}), gradients, "in a later call")) {
        return;
      }
    }
    const std::size_t after = bytes_taken();
    figures(mebibytes(before) + " of the GPU taken after the first call, " + mebibytes(after) + " after ten more");
    expect(after <= before + (std::size_t{16} << 20), "memory",
           std::to_string((after - before) >> 20) + " MiB more were taken on the GPU after ten calls");
  }

  TEST_CASE("says what is wrong with bad arguments") {
    const Grouped good{.queries = 6, .keys = 7, .groups = {{0, 3, 0, 5}, {3, 6, 2, 7}}, .heads = 4, .kv_heads = 2};
    const auto judge = [&](const auto& forward_way, const auto& backward_way, auto type) {
      using T = decltype(type);
      DeviceBuffer<T> inputs("inputs", std::vector<T>(4096, from_float<T>(0.5f)));
      DeviceBuffer<T> outputs("outputs", 4096), d_key("d_key", 4096), d_value("d_value", 4096);
      DeviceBuffer<float> rows("rows", 24), scratch("scratch", 4096);
      const Shape<4> q{1, 4, 6, 64}, k{1, 2, 7, 64};
      const Shape<3> r{1, 4, 6};
      using In = View<const T, 4>;
      using Out = View<T, 4>;
      const FlashForward<T> forward{.query = In(inputs.data(), q),
                                    .key = In(inputs.data(), k),
                                    .value = In(inputs.data(), k),
                                    .output = Out(outputs.data(), q),
                                    .lse = View<float, 3>(rows.data(), r)};
      const FlashBackward<T> backward{.query = In(inputs.data(), q),
                                      .key = In(inputs.data(), k),
                                      .value = In(inputs.data(), k),
                                      .output = In(inputs.data(), q),
                                      .lse = View<const float, 3>(rows.data(), r),
                                      .d_output = In(inputs.data(), q),
                                      .d_query = Out(outputs.data(), q),
                                      .d_key = Out(d_key.data(), k),
                                      .d_value = Out(d_value.data(), k),
                                      .delta = View<float, 3>(scratch.data(), r),
                                      .d_query_sum = View<float, 4>(scratch.data(), q)};
      const auto refused = [](const auto& way, const auto& problem, std::string_view what, std::string_view argument,
                              Groups groups, const auto& change) {
        auto bad = problem;
        change(bad);
        expect_rejected(what, argument, [&] { way.launch(bad, groups); });
      };
      const auto both = [&](std::string_view what, std::string_view argument, const Groups& groups,
                            const auto& change) {
        refused(forward_way, forward, what, argument, groups, change);
        refused(backward_way, backward, what, argument, groups, change);
      };
      const Groups& groups = good.groups;
      const auto nothing = [](auto&) {};
      both("a width of 24", "query", groups, [&](auto& p) { p.query = In(inputs.data(), {1, 4, 6, 24}); });
      both("a batch of two", "query", groups, [&](auto& p) {
        using Problem = std::remove_cvref_t<decltype(p)>;
        const Shape<4> q2{2, 2, 6, 64}, k2{2, 2, 7, 64};
        p.query = In(inputs.data(), q2);
        p.key = p.value = In(inputs.data(), k2);
        if constexpr (std::is_same_v<Problem, FlashForward<T>>) {
          p.output = Out(outputs.data(), q2);
          p.lse = View<float, 3>(rows.data(), {2, 2, 6});
        } else {
          p.output = p.d_output = In(inputs.data(), q2);
          p.d_query = Out(outputs.data(), q2);
          p.d_key = p.d_value = Out(outputs.data(), k2);
          p.lse = View<const float, 3>(rows.data(), {2, 2, 6});
          p.delta = View<float, 3>(scratch.data(), {2, 2, 6});
          p.d_query_sum = View<float, 4>(scratch.data(), q2);
        }
      });
      both("3 key/value heads for 4 query heads", "key", groups, [&](auto& p) {
        p.key = p.value = In(inputs.data(), {1, 3, 7, 64});
      });
      both("a value too few", "value", groups, [&](auto& p) { p.value = In(inputs.data(), {1, 2, 6, 64}); });
      both("a scale that is NaN", "scale", groups, [](auto& p) { p.scale = NOT_A_NUMBER; });
      refused(forward_way, forward, "an lse too short", "lse", groups, [&](auto& p) {
        p.lse = View<float, 3>(rows.data(), {1, 4, 5});
      });
      refused(forward_way, forward, "an output of the keys' heads", "output", groups, [&](auto& p) {
        p.output = Out(outputs.data(), {1, 2, 6, 64});
      });
      refused(backward_way, backward, "a d_key of the queries' heads", "d_key", groups, [&](auto& p) {
        p.d_key = Out(outputs.data(), {1, 4, 7, 64});
      });
      refused(backward_way, backward, "a delta too short", "delta", groups, [&](auto& p) {
        p.delta = View<float, 3>(scratch.data(), {1, 4, 5});
      });
      both("queries from -1 on", "groups[1].q_begin", {{3, 6, 0, 5}, {-1, 3, 0, 5}}, nothing);
      both("queries up to the seventh of six", "groups[1].q_end", {{0, 3, 0, 5}, {3, 7, 0, 5}}, nothing);
      both("queries that end before they begin", "groups[0].q_end", {{3, 2, 0, 5}}, nothing);
      both("keys from -1 on", "groups[0].k_begin", {{0, 3, -1, 5}}, nothing);
      both("keys up to the eighth of seven", "groups[0].k_end", {{0, 3, 0, 8}}, nothing);
      both("keys that end before they begin", "groups[0].k_end", {{0, 3, 5, 4}}, nothing);
      both("keys that begin behind the last", "groups[1].k_begin", {{0, 3, 0, 5}, {3, 6, 8, 8}}, nothing);
      both("a query in two groups", "q_begin", {{0, 3, 0, 5}, {2, 6, 2, 7}}, nothing);
      both("queries inside of another group", "q_begin", {{2, 4, 0, 5}, {4, 4, 0, 5}, {0, 6, 2, 7}}, nothing);
      both("129 groups", "groups", Groups(129, Group{0, 0, 0, 5}), nothing);
      std::vector<T> now = outputs.download();
      const std::vector<T> key_now = d_key.download();
      now.insert(now.end(), key_now.begin(), key_now.end());
      expect(std::all_of(now.begin(), now.end(), [](T x) { return std::isnan(to_float(x)); }), "outputs",
             "were written before the arguments were refused");
    };
    expect_counts(CPU_FORWARD, good);
    expect_even_shares(CPU_BACKWARD, good, true);
    judge(CPU_FORWARD, CPU_BACKWARD, float{});
    for_both_types([&](auto type) {
      using T = decltype(type);
      expect_counts(separate<T>(), good);
      expect_counts(fused<T>(), good);
      expect_even_shares(fused_backward<T>(), good, false);
      judge(fused<T>(), fused_backward<T>(), type);
      judge(separate<T>(), fused_backward<T>(), type);
    });
  }
}
