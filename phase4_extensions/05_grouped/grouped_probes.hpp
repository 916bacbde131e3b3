// Properties of grouped attention, forward and backward: each function says whether one holds.
#pragma once

#include <numeric>

#include "grouped_problems.hpp"

namespace flashkata::testing::grouped {

// ---- The README's example: of each row one channel is not 0 ---------------------------------------------------------

inline Grouped example() { return {.queries = 2, .keys = 3, .groups = {{0, 1, 0, 2}, {1, 2, 1, 3}}, .scale = 1.0f}; }

template <typename T>
Inputs example_inputs() {
  const auto column = [](std::vector<double> numbers) -> Fill {
    return [=](Index, Index, Index s, Index d) { return d > 0 ? 0.0 : numbers.at(static_cast<std::size_t>(s)); };
  };
  return filled_inputs<T>(example().sizes(), column({std::log(3.0), std::log(2.0)}), column({0, 1, 2}),
                          column({4, 0, 3}), column({4, 3}));
}

// `first` holds the numbers in channel 0 of the rows; all others should be 0.
inline bool expect_column(const char* name, const Array& got, const std::vector<double>& first, double tolerance,
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
      const Index at = h * g.queries + i;
      const bool same_output = same_row_but_rounding(got.output, at, i, g.width, 4.0 * roundoff<T>());
      if (same_output && same_row_but_rounding(got.lse, at, i, 1, 1e-4)) continue;
      std::ostringstream text;
      text << "query " << i << " sees the keys " << seen.begin << ".." << seen.end << ", and noticed that "
           << (h % 2 == 1 ? "keys" : "values") << " of others became NaN, -inf and 60000";
      finding(same_output ? "lse" : "output", text.str());
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
inline bool expect_deterministic(const Way<FlashBackward<bf16>>& way, Index third) {
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

// ---- Bytes ----------------------------------------------------------------------------------------------------------

// Rows of keys, and of values, that the call loaded; 0 where nobody counts.
inline Index rows_loaded(const std::vector<KernelProfile>& profiles, const char* buffer, Index width) {
  return static_cast<Index>(bytes_loaded(profiles, buffer)) / (2 * width);
}

inline bool expect_rows_loaded(const std::vector<KernelProfile>& profiles, const Grouped& g, Index most,
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
inline Grouped coinciding(Index count, Index keys) {
  Grouped g{.queries = 16 * count, .keys = keys};
  for (Index n = 0; n < count; ++n) g.groups.push_back({16 * n, 16 * n + 16, 0, keys});
  return g;
}

}  // namespace flashkata::testing::grouped
