// Properties of a backward kernel that numbers of our choice show: each function says whether it holds.
#pragma once

#include "common/testing/fragment_map.hpp"
#include "phase3_backward/kernel_suite/judgement.hpp"

namespace flashkata::testing {

inline Array zeros(const Array& like) { return {like.shape, std::vector<double>(like.count(), 0.0)}; }

/// What rounding to T twice or thrice may change; in fp32, 1e-5.
template <typename T>
constexpr double few_roundings() {
  return std::is_same_v<T, float> ? 1e-5 : 3.0 * roundoff<T>();
}

/// One key has all the weight: dV = dO, and neither query nor key can change anything. All numbers are small integers.
template <typename T>
bool expect_one_pair(const BackwardStep<T>& step, Index width) {
  BackwardInputs in = inputs_of<T>({.why = "", .width = width, .scale = 0.5f});
  set<T>(in.inputs.query, [](Index, Index, Index, Index d) { return static_cast<double>(d % 3 - 1); });
  set<T>(in.inputs.key, [](Index, Index, Index, Index d) { return static_cast<double>(d % 5 - 2); });
  set<T>(in.inputs.value, [](Index, Index, Index, Index d) { return static_cast<double>(d % 4 + 1); });
  set<T>(in.d_output, [](Index, Index, Index, Index d) { return static_cast<double>(d % 3 + 1); });
  const Gradients got = gradients(step, in);
  const ExpectedGradients size = expected_gradients(in.sizes, in.inputs, in.d_output);
  const Array d_output = to_array(in.d_output.heads());
  const bool value = expect_close("d_value", got.value, d_output, {1e-5, d_output}, KEY_AXES);
  const bool key = expect_close("d_key", got.key, zeros(got.key), size.key_bound, KEY_AXES);
  if (expect_close("d_query", got.query, zeros(got.query), size.query_bound, QUERY_AXES) && key && value) return true;
  return not_so<T>(in);
}

/// The example of step 04's README: two queries and two keys, of which one channel is not 0.
template <typename T>
bool expect_example(const BackwardStep<T>& step, bool deterministic) {
  BackwardInputs in = inputs_of<T>({.why = "", .queries = 2, .keys = 2, .width = step.width, .scale = 1.0f});
  const auto column = [](double first, double second) -> Fill {
    return [=](Index, Index, Index s, Index d) { return d > 0 ? 0.0 : s == 0 ? first : second; };
  };
  set<T>(in.inputs.query, column(std::log(3.0), 0.0));
  set<T>(in.inputs.key, column(1.0, 2.0));
  set<T>(in.inputs.value, column(8.0, 0.0));
  set<T>(in.d_output, column(1.0, 2.0));
  const Gradients got = gradients(step, in, {.deterministic = deterministic});
  const double tolerance = std::is_same_v<T, float> ? 1e-5 : 4.0 * roundoff<T>();
  const auto close = [&](const char* name, const Array& array, double first, double second, const Axes& axes) {
    Array want = zeros(array);
    want.values[0] = first;
    want.values[static_cast<std::size_t>(step.width)] = second;
    const Array size{want.shape, std::vector<double>(want.count(), 4.0)};
    return expect_close(name, array, want, {tolerance, size}, axes);
  };
  const bool value = close("d_value", got.value, 1.25, 1.75, KEY_AXES);
  const bool key = close("d_key", got.key, 1.5 * std::log(3.0), -1.5 * std::log(3.0), KEY_AXES);
  if (close("d_query", got.query, -1.5, -4.0, QUERY_AXES) && key && value) return true;
  return not_so<T>(in, deterministic ? ", deterministic" : "");
}

/// With queries of 0, a query that sees n keys gives each the weight 1/n. Of row i of dO and of K, one of the channels
/// 0 to 7 says which place it has in its group of 8, one of the channels 8 to 15 which group of 8 it is in: dV lists
/// who came, and so does dQ, since the values make dS = (+-1 - delta) / n.
template <typename T>
bool expect_even_shares(const BackwardStep<T>& step, Index queries, Index keys, bool causal, bool deterministic) {
  BackwardInputs in = inputs_of<T>(
      {.why = "", .queries = queries, .keys = keys, .width = step.width, .scale = 1.0f, .causal = causal, .number = 3});
  const auto code = [](Index i, Index d) { return d == i % 8 || d == 8 + i / 8 % 8 ? 1.0 : 0.0; };
  const auto sign = [](Index j) { return j % 2 == 0 ? 1.0 : -1.0; };  // dP of any query and key j
  set<T>(in.inputs.query, [](Index, Index, Index, Index) { return 0.0; });
  set<T>(in.inputs.key, [&](Index, Index, Index j, Index d) { return code(j, d); });
  set<T>(in.inputs.value, [&](Index, Index, Index j, Index d) { return d < 8 ? sign(j) : 0.0; });
  set<T>(in.d_output, [&](Index, Index, Index i, Index d) { return code(i, d); });
  const Gradients got = gradients(step, in, {.deterministic = deterministic});

  Array value = zeros(got.value), query = zeros(got.query), query_size = zeros(got.query);
  for (Index i = 0; i < queries; ++i) {
    const Index seen = keys_seen(causal, i, queries, keys);
    double delta = 0.0;
    for (Index j = 0; j < seen; ++j) delta += sign(j) / static_cast<double>(seen);
    for (Index j = 0; j < seen; ++j)
      for (Index d = 0; d < 16; ++d) {
        const auto of_key = static_cast<std::size_t>(j * step.width + d);
        const auto of_query = static_cast<std::size_t>(i * step.width + d);
        value.values[of_key] += code(i, d) / static_cast<double>(seen);
        query.values[of_query] += (sign(j) - delta) * code(j, d) / static_cast<double>(seen);
        query_size.values[of_query] += (1.0 + std::abs(delta)) * code(j, d) / static_cast<double>(seen);
      }
  }
  const double tolerance = few_roundings<T>();
  const bool value_is_right = expect_close("d_value", got.value, value, {tolerance, value}, KEY_AXES);
  const bool key_is_right = expect_all("d_key", got.key, 0.0, 0.0, KEY_AXES, "every query is 0, so d_key should be");
  const bool query_is_right = expect_close("d_query", got.query, query, {tolerance, query_size}, QUERY_AXES);
  return (value_is_right && key_is_right && query_is_right) || not_so<T>(in, deterministic ? ", deterministic" : "");
}

/// The same by both ways to dQ: fp16 goes the one, bf16 the other, fp32 both; watched, by turns.
template <typename T>
bool expect_even_shares(const BackwardStep<T>& step, Index queries, Index keys, bool causal) {
  for (const bool deterministic : {false, true}) {
    if (kernels_are_checked() && std::is_same_v<T, float> && deterministic != ((queries + keys) % 2 == 0)) continue;
    if (!std::is_same_v<T, float> && deterministic != std::is_same_v<T, fp16>) continue;
    if (!expect_even_shares(step, queries, keys, causal, deterministic)) return false;
  }
  return true;
}

namespace kernel_suite_detail {

// Every number below 256 as +-2 in eight channels, again and again. Under 64 / width as scale two equal codes have the
// score 256, and codes that differ in one bit 64 less: all exact in 16 bits.
inline double code(Index number, Index channel) { return (number >> (channel % 8)) % 2 == 1 ? 2.0 : -2.0; }

}  // namespace kernel_suite_detail

enum class Product { d_value, d_key, d_query };

/// As many queries as keys as channels, and query i belongs to key 37 i + 11. One operand is fed with the numbers of
/// its rows in head 0, of its channels in head 1: which of them came out in every place of a gradient?
///
/// d_value: P is 1 for the pairs that belong together and 0 for the others, so dV holds rows of dO.
/// d_key:   all keys are 0, so P = 1/n; dO and V are unit vectors, so dS = ([belongs] - 1/n) / n, and dK holds rows of
///          Q, less their mean.
/// d_query: the same with queries of 0; dQ holds rows of K, less their mean.
template <typename T>
bool expect_positions(const BackwardStep<T>& step, Index width, Product product, bool deterministic = false) {
  const Index n = width;  // a power of two, so 37 i + 11 is a permutation
  const auto key_of = [n](Index i) { return (37 * i + 11) % n; };
  const auto query_of = [&](Index j) {
    Index i = 0;
    while (key_of(i) != j) ++i;
    return i;
  };
  // The channels' numbers with alternating signs, so that their mean is 0.
  const Fill fed = [](Index, Index h, Index s, Index d) {
    return static_cast<double>(h == 0 ? s : s % 2 == 0 ? d : -d);
  };
  const Fill zero = [](Index, Index, Index, Index) { return 0.0; };
  BackwardInputs in = inputs_of<T>({.why = "",
                                    .heads = 2,
                                    .queries = n,
                                    .keys = n,
                                    .width = width,
                                    .scale = product == Product::d_value ? 64.0f / static_cast<float>(width) : 1.0f,
                                    .number = 4});
  if (product == Product::d_value) {
    using kernel_suite_detail::code;
    set<T>(in.inputs.query, [&](Index, Index, Index i, Index d) { return code(key_of(i), d); });
    set<T>(in.inputs.key, [](Index, Index, Index j, Index d) { return code(j, d); });
    set<T>(in.d_output, fed);
  } else {
    set<T>(in.inputs.query, product == Product::d_key ? fed : zero);
    set<T>(in.inputs.key, product == Product::d_key ? zero : fed);
    set<T>(in.d_output, [](Index, Index, Index i, Index d) { return i == d ? 1.0 : 0.0; });
    set<T>(in.inputs.value, [&](Index, Index, Index j, Index d) { return query_of(j) == d ? 1.0 : 0.0; });
  }
  const Gradients got = gradients(step, in, {.deterministic = deterministic});
  const bool of_query = product == Product::d_query;
  const Array& gradient = product == Product::d_value ? got.value : of_query ? got.query : got.key;
  Array rows = head_of(gradient, 0, 0);
  Array channels = head_of(gradient, 0, 1);
  const double weight = product == Product::d_value ? 1.0 : static_cast<double>(n);
  const double mean = product == Product::d_value ? 0.0 : static_cast<double>(n - 1) / 2.0;
  for (double& value : rows.values) value = weight * value + mean;
  for (double& value : channels.values) value = std::abs(weight * value);
  const bool arrived = expect_arrived(rows, channels,
                                      {.name = product == Product::d_value ? "d_value"
                                               : of_query                  ? "d_query"
                                                                           : "d_key",
                                       .axis = of_query ? "query" : "key",
                                       .from = product == Product::d_value ? "dO[query,channel]"
                                               : of_query                  ? "K[key,channel]"
                                                                           : "Q[query,channel]",
                                       .source = of_query ? std::function<Index(Index)>(key_of) : query_of,
                                       .fragments = !std::is_same_v<T, float>});
  return arrived || not_so<T>(in, deterministic ? ", deterministic" : "");
}

/// All values alike, in small integers: every dP is delta, so dS is 0 and so are dQ and dK. The weights are random.
template <typename T>
bool expect_nothing_from_equal_values(const BackwardStep<T>& step, Index queries, Index keys, bool causal) {
  BackwardInputs in =
      inputs_of<T>({.why = "", .queries = queries, .keys = keys, .width = step.width, .causal = causal, .number = 5});
  set<T>(in.inputs.value, [](Index, Index, Index, Index d) { return static_cast<double>(d % 4 + 1); });
  set<T>(in.d_output, [](Index, Index, Index i, Index d) { return static_cast<double>((i + d) % 5 - 1); });
  const Gradients got = gradients(step, in);
  const ExpectedGradients size = expected_gradients(in.sizes, in.inputs, in.d_output);
  const bool key = expect_close("d_key", got.key, zeros(got.key), size.key_bound, KEY_AXES);
  return (expect_close("d_query", got.query, zeros(got.query), size.query_bound, QUERY_AXES) && key) || not_so<T>(in);
}

/// All keys alike: a row of dS adds up to 0, so dQ is 0.
template <typename T>
bool expect_nothing_from_equal_keys(const BackwardStep<T>& step, Index queries, Index keys, bool causal) {
  BackwardInputs in =
      inputs_of<T>({.why = "", .queries = queries, .keys = keys, .width = step.width, .causal = causal, .number = 6});
  const BackwardInputs before = in;
  set<T>(in.inputs.key, [](Index, Index, Index, Index d) { return static_cast<double>(d % 3) - 0.5; });
  const auto lifted = [](const TokenTensor& tensor) -> Fill {
    return [view = tensor.heads()](Index b, Index h, Index s, Index d) {
      return 2.0 + static_cast<double>(view(b, h, s, d));
    };
  };
  set<T>(in.inputs.value, lifted(before.inputs.value));
  set<T>(in.d_output, lifted(before.d_output));
  const Gradients got = gradients(step, in);
  Bound bound = expected_gradients(in.sizes, in.inputs, in.d_output).query_bound;
  bound.relative = few_roundings<T>();
  return expect_close("d_query", got.query, zeros(got.query), bound, QUERY_AXES) || not_so<T>(in);
}

/// dO = 0: exactly nothing.
template <typename T>
bool expect_nothing_from_nothing(const BackwardStep<T>& step, const AttentionCase& sizes) {
  BackwardInputs in = inputs_of<T>(sizes);
  set<T>(in.d_output, [](Index, Index, Index, Index) { return 0.0; });
  for (const bool deterministic : {true, false}) {
    const Gradients got = gradients(step, in, {.deterministic = deterministic});
    const bool value = expect_all("d_value", got.value, 0.0, 0.0, KEY_AXES, "d_output is 0, so d_value should be");
    const bool key = expect_all("d_key", got.key, 0.0, 0.0, KEY_AXES, "d_output is 0, so d_key should be");
    const bool query = expect_all("d_query", got.query, 0.0, 0.0, QUERY_AXES, "d_output is 0, so d_query should be");
    if (!value || !key || !query) return not_so<T>(in, deterministic ? ", deterministic" : "");
  }
  return true;
}

/// Twice the dO, twice every gradient. A factor of 2 changes no digit, unless a number is too small for its type.
template <typename T>
bool expect_linear(const BackwardStep<T>& step, const AttentionCase& sizes) {
  static_assert(!std::is_same_v<T, fp16>, "dS may be too small for fp16");
  BackwardInputs in = inputs_of<T>(sizes);
  Gradients want = gradients(step, in, {.deterministic = true});
  for (Array* array : {&want.query, &want.key, &want.value}) {
    for (double& value : array->values) value *= 2.0;
  }
  const BackwardInputs before = in;
  set<T>(in.d_output, [view = before.d_output.heads()](Index b, Index h, Index s, Index d) {
    return 2.0 * static_cast<double>(view(b, h, s, d));
  });
  return expect_same(gradients(step, in, {.deterministic = true}), want,
                     "beyond doubling, when d_output was doubled") ||
         not_so<T>(in);
}

/// Half the scale and twice the keys are the same scores. dQ and dV are the same then, and dK is half of what it was.
/// Factors of 2 change no digit, unless a number is too small for its type.
template <typename T>
bool expect_scale_belongs_to_keys(const BackwardStep<T>& step, AttentionCase sizes) {
  static_assert(!std::is_same_v<T, fp16>, "dS may be too small for fp16");
  BackwardInputs in = inputs_of<T>(sizes);
  in.sizes.scale = 0.25f;
  Gradients want = gradients(step, in, {.deterministic = true});
  for (double& value : want.key.values) value /= 2.0;
  const BackwardInputs before = in;
  set<T>(in.inputs.key, [view = before.inputs.key.heads()](Index b, Index h, Index s, Index d) {
    return 2.0 * static_cast<double>(view(b, h, s, d));
  });
  in.sizes.scale = 0.125f;
  const Gradients got = gradients(step, in, {.deterministic = true});
  return expect_same(got, want, "beyond halving d_key, when the scale was halved and the keys were doubled") ||
         not_so<T>(in);
}

namespace kernel_suite_detail {

// Sums over the rows of one head, channel by channel; rows from `first` on.
inline std::vector<double> column_sums(const Array& head, Index first, bool absolute) {
  const Index width = head.shape.at(1);
  std::vector<double> sums(static_cast<std::size_t>(width), 0.0);
  for (Index s = first; s < head.shape.at(0); ++s)
    for (Index d = 0; d < width; ++d) {
      const double value = head.values[static_cast<std::size_t>(s * width + d)];
      sums[static_cast<std::size_t>(d)] += absolute ? std::abs(value) : value;
    }
  return sums;
}

inline double dot(const Array& one, const Array& other, bool absolute) {
  double sum = 0.0;
  for (std::size_t i = 0; i < one.count(); ++i) {
    const double product = one.values[i] * other.values[i];
    sum += absolute ? std::abs(product) : product;
  }
  return sum;
}

}  // namespace kernel_suite_detail

/// The weights of a query add up to 1, so dV over all keys adds up to dO over all queries that see one; and scores know
/// only the products of queries and keys, so <dQ, Q> = <dK, K>.
template <typename T>
bool expect_balanced(const BackwardStep<T>& step, const AttentionCase& sizes, const BackwardOptions& options = {}) {
  using kernel_suite_detail::column_sums;
  using kernel_suite_detail::dot;
  const BackwardInputs in = inputs_of<T>(sizes);
  const Gradients got = gradients(step, in, options);
  const Array d_output = to_array(in.d_output.heads());
  const Array query = to_array(in.inputs.query.heads());
  const Array key = to_array(in.inputs.key.heads());
  const Index blind = sizes.causal ? std::max<Index>(0, sizes.queries - sizes.keys) : 0;
  for (Index b = 0; b < sizes.batch; ++b) {
    for (Index h = 0; h < sizes.heads; ++h) {
      const std::string head = "batch item " + std::to_string(b) + ", head " + std::to_string(h) + ": ";
      const Array rows = head_of(d_output, b, h);
      const std::vector<double> given = column_sums(rows, blind, false);
      const std::vector<double> size = column_sums(rows, blind, true);
      const std::vector<double> taken = column_sums(head_of(got.value, b, h), 0, false);
      for (std::size_t d = 0; d < given.size(); ++d) {
        if (std::abs(taken[d] - given[d]) <= few_roundings<T>() * size[d]) continue;
        std::ostringstream text;
        text << head << "channel " << d << " of all keys adds up to " << taken[d] << ", that of d_output to "
             << given[d];
        finding("d_value", text.str());
        return not_so<T>(in);
      }
      const Array dq = head_of(got.query, b, h), q = head_of(query, b, h);
      const Array dk = head_of(got.key, b, h), k = head_of(key, b, h);
      const double of_queries = dot(dq, q, false);
      const double of_keys = dot(dk, k, false);
      const double allowed = few_roundings<T>() * (dot(dq, q, true) + dot(dk, k, true));
      if (std::abs(of_queries - of_keys) <= allowed) continue;
      std::ostringstream text;
      text << head << "<d_query, query> = " << of_queries << ", <d_key, key> = " << of_keys;
      finding("balance", text.str());
      return not_so<T>(in);
    }
  }
  return true;
}

/// Queries that see no key: dQ exactly 0, and nothing of them in any key. No query: dK and dV exactly 0.
template <typename T>
bool expect_zeros_where_nobody_looks(const BackwardStep<T>& step, Index queries, Index keys, bool causal,
                                     bool deterministic) {
  const BackwardInputs in = inputs_of<T>(
      {.why = "", .heads = 2, .queries = queries, .keys = keys, .width = step.width, .causal = causal, .number = 7});
  const Gradients got = gradients(step, in, {.deterministic = deterministic});
  const std::string more = deterministic ? ", deterministic" : "";
  for (Index h = 0; h < 2; ++h) {
    const Array rows = head_of(got.query, 0, h);
    for (Index i = 0; i < queries; ++i) {
      if (keys_seen(causal, i, queries, keys) > 0) continue;
      const auto first = rows.values.begin() + i * step.width;
      const Array row{{step.width}, {first, first + step.width}};
      const std::string what = "query " + std::to_string(i) + " sees no key";
      if (!expect_all("d_query", row, 0.0, 0.0, {"channel"}, what)) return not_so<T>(in, more);
    }
  }
  if (queries == 0) {
    const bool value = expect_all("d_value", got.value, 0.0, 0.0, KEY_AXES, "no query sees any key");
    if (!expect_all("d_key", got.key, 0.0, 0.0, KEY_AXES, "no query sees any key") || !value) {
      return not_so<T>(in, more);
    }
  }
  return expect_gradients<T>(got, in) || not_so<T>(in, more);
}

/// What queries that see no key hold, they and their dO, reaches no gradient.
template <typename T>
bool expect_blind_are_harmless(const BackwardStep<T>& step, Index queries, Index keys, bool deterministic) {
  BackwardInputs in =
      inputs_of<T>({.why = "", .queries = queries, .keys = keys, .width = step.width, .causal = true, .number = 11});
  const Gradients want = gradients(step, in, {.deterministic = deterministic});
  for (Index i = 0; i < queries - keys; ++i)
    for (Index d = 0; d < step.width; ++d) {
      in.inputs.query.heads()(0, 0, i, d) = i % 2 == 0 ? NOT_A_NUMBER : INF;
      in.d_output.heads()(0, 0, i, d) = i % 2 == 0 ? -INF : NOT_A_NUMBER;
    }
  const Gradients got = gradients(step, in, {.deterministic = deterministic});
  const Bound bound{few_roundings<T>(), {got.query.shape, std::vector<double>(got.query.count(), 1.0)}};
  const bool same =
      expect_same(got, want, "when queries that see no key, and their d_output, became NaN and inf", deterministic) &&
      (deterministic || expect_close("d_query", got.query, want.query, bound, QUERY_AXES));
  return same || not_so<T>(in, deterministic ? ", deterministic" : "");
}

/// In head 0 nothing is wrong; in head h a key holds poison h - 1, or its value does. Queries that do not see that key
/// have the same gradients in all heads, bit for bit where the answer is deterministic.
enum class Poisoned { key, value };
template <typename T>
bool expect_forbidden_is_harmless(const BackwardStep<T>& step, Index queries, Index keys, Index place,
                                  Poisoned poisoned, bool deterministic) {
  constexpr std::array<float, 4> POISONS{-3e4f, INF, -INF, NOT_A_NUMBER};
  const BackwardInputs one =
      inputs_of<T>({.why = "", .queries = queries, .keys = keys, .width = step.width, .causal = true, .number = 8});
  BackwardInputs in = arranged(one, 1, 5, [](Index, Index) { return Index{0}; });
  for (Index h = 1; h < 5; ++h) {
    for (Index d = 0; d < step.width; ++d) {
      TokenTensor& tensor = poisoned == Poisoned::key ? in.inputs.key : in.inputs.value;
      tensor.heads()(0, h, place, d) = POISONS[static_cast<std::size_t>(h) - 1];
    }
  }
  const Gradients got = gradients(step, in, {.deterministic = deterministic});
  const auto row_of = [&](const Array& head, Index i) {
    const auto begin = head.values.begin() + i * step.width;
    return Array{{step.width}, {begin, begin + step.width}};
  };
  const Array clean = head_of(got.query, 0, 0);
  for (Index h = 1; h < 5; ++h) {
    const Array head = head_of(got.query, 0, h);
    for (Index i = 0; i < queries && place >= keys_seen(true, i, queries, keys); ++i) {
      const Array want = row_of(clean, i);
      const Bound bound{few_roundings<T>(), {want.shape, std::vector<double>(want.count(), 1.0)}};
      const std::string why = "of query " + std::to_string(i) + " when " +
                              (poisoned == Poisoned::key ? "key " : "the value of key ") + std::to_string(place) +
                              ", which it may not see, became " +
                              std::to_string(POISONS[static_cast<std::size_t>(h) - 1]);
      const bool same = deterministic ? expect_same_bits("d_query", row_of(head, i), want, {"channel"}, why)
                                      : expect_close("d_query " + why, row_of(head, i), want, bound, {"channel"});
      if (!same) return not_so<T>(in, deterministic ? ", deterministic" : "");
    }
  }
  return true;
}

/// Six heads, as 2 x 3 and in another order as 3 x 2.
template <typename T>
bool expect_heads_apart(const BackwardStep<T>& step, Index queries, Index keys, bool causal) {
  const BackwardInputs one = inputs_of<T>(
      {.why = "", .heads = 6, .queries = queries, .keys = keys, .width = step.width, .causal = causal, .number = 9});
  const auto shuffled = [](Index b, Index h) { return (5 * (2 * h + b) + 1) % 6; };
  const auto run = [&](Index batch, Index heads, const std::function<Index(Index, Index)>& from) {
    return gradients(step, arranged(one, batch, heads, from), {.deterministic = true});
  };
  const Gradients two_by_three = run(2, 3, [](Index b, Index h) { return 3 * b + h; });
  const Gradients three_by_two = run(3, 2, shuffled);
  for (Index b = 0; b < 3; ++b) {
    for (Index h = 0; h < 2; ++h) {
      const Index was = shuffled(b, h);
      const std::string why = "of head " + std::to_string(was % 3) + " of batch item " + std::to_string(was / 3) +
                              " when it became head " + std::to_string(h) + " of batch item " + std::to_string(b);
      using kernel_suite_detail::only_head;
      if (!expect_same(only_head(three_by_two, b, h), only_head(two_by_three, was / 3, was % 3), why))
        return not_so<T>(one);
    }
  }
  return true;
}

/// The same numbers in other places of memory, gradients too, with NaN between and behind the rows.
template <typename T>
bool expect_layouts_do_not_matter(const BackwardStep<T>& step, const AttentionCase& sizes) {
  const BackwardInputs in = with_forward(inputs_of<T>(sizes));
  const Gradients want = gradients(step, in, {.deterministic = true});
  const std::vector<Layouts> all{MIXED, MIXED_OTHERWISE, TOKENS, APART};
  const std::vector<Layouts> tried(all.begin(), kernels_are_checked() ? all.begin() + 1 : all.end());
  for (const Layouts& layouts : tried) {
    const Gradients got = gradients(step, in, {.deterministic = true, .layouts = layouts, .rows_behind = 3});
    if (!expect_same(got, want, "when the rows lay otherwise")) return not_so<T>(in);
  }
  return true;
}

/// dO that is the same for all queries, heads or batch items, stored once with a stride of 0, as sum() leaves it.
template <typename T>
bool expect_repeated_d_output(const BackwardStep<T>& step, const AttentionCase& sizes) {
  constexpr std::array<std::array<bool, 3>, 4> REPEATS{
      {{false, false, true}, {false, true, false}, {false, true, true}, {true, true, true}}};
  for (const std::array<bool, 3>& repeated : REPEATS) {
    if (kernels_are_checked() && !repeated[0]) continue;
    BackwardInputs in = inputs_of<T>(sizes);
    const BackwardInputs before = in;
    set<T>(in.d_output, [&](Index b, Index h, Index s, Index d) {
      return static_cast<double>(
          before.d_output.heads()(repeated[0] ? 0 : b, repeated[1] ? 0 : h, repeated[2] ? 0 : s, d));
    });
    in.forward = forward_of(in);
    const Gradients want = gradients(step, in, {.deterministic = true});
    const Gradients got = gradients(step, in, {.deterministic = true, .repeated = repeated});
    if (!expect_same(got, want, "when d_output was stored once, with a stride of 0,")) return not_so<T>(in);
  }
  return true;
}

/// Another problem of the same shape leaves its gradients and its scratch behind, then this one's are asked for twice.
template <typename T>
bool expect_memory_may_hold_anything(const BackwardStep<T>& step, AttentionCase sizes, bool deterministic) {
  const BackwardInputs in = with_forward(inputs_of<T>(sizes));
  sizes.number += 1;
  const BackwardInputs other = inputs_of<T>(sizes);
  const BackwardOptions options{.deterministic = deterministic};
  const Judgement<T> judgement(in);
  const Gradients want = gradients(step, in, options);
  GradientMemory<T> memory(in.sizes, options.layouts);
  gradients(step, other, options, &memory);
  for (int again = 0; again < 2; ++again) {
    const Gradients got = gradients(step, in, options, &memory);
    if (!expect_same(got, want, "in a later call in the same memory", deterministic)) return not_so<T>(in);
    if (!expect_gradients(got, judgement)) return not_so<T>(in, ", a later call in the same memory");
  }
  return true;
}

/// Blocks and threads run in another order each time. dK and dV have the same bits.
template <typename T>
bool expect_order_does_not_matter(const BackwardStep<T>& step, const AttentionCase& sizes) {
  const BackwardInputs in = with_forward(inputs_of<T>(sizes));
  const Judgement<T> judgement(in);
  const Gradients want = gradients(step, in);
  for (const std::uint64_t seed : {1u, 2u}) {
    if (kernels_are_checked() && seed > 1) continue;  // who is watched races in any order
    const AnotherOrder order(seed);
    const Gradients got = gradients(step, in);
    if (!expect_same(got, want, "when blocks and threads ran in another order", false)) return not_so<T>(in);
    if (!expect_gradients(got, judgement)) return not_so<T>(in, ", in another order");
  }
  return true;
}

/// With `deterministic` dQ, too, has the same bits. It is a sum of large numbers that cancel and small ones that stay,
/// so that hardly two orders of summation give the same: queries are 0 and weights therefore alike, the last third of
/// the keys is minus the first, with the same values, and the second third is small.
template <typename T>
bool expect_deterministic(const BackwardStep<T>& step, Index queries, Index third) {
  static_assert(!std::is_same_v<T, fp16>, "needs numbers of very different size");
  BackwardInputs in = inputs_of<T>(
      {.why = "", .queries = queries, .keys = 3 * third, .width = step.width, .scale = 1.0f, .number = 18});
  const BackwardInputs before = in;
  set<T>(in.inputs.query, [](Index, Index, Index, Index) { return 0.0; });
  set<T>(in.inputs.key, [third, view = before.inputs.key.heads()](Index b, Index h, Index s, Index d) {
    const double size = s < third ? 65536.0 : s < 2 * third ? 1.0 : -65536.0;
    return size * static_cast<double>(view(b, h, s % third, d));
  });
  set<T>(in.inputs.value, [third, view = before.inputs.value.heads()](Index b, Index h, Index s, Index d) {
    return static_cast<double>(view(b, h, s % third, d));
  });
  in.forward = forward_of(in);
  const Gradients want = gradients(step, in, {.deterministic = true});
  for (const std::uint64_t seed : {1u, 2u, 3u}) {
    if (kernels_are_checked() && seed > 1) continue;
    const AnotherOrder order(seed);
    const Gradients got = gradients(step, in, {.deterministic = true});
    if (!expect_same(got, want, "when blocks and threads ran in another order"))
      return not_so<T>(in, ", deterministic");
  }
  return true;
}

}  // namespace flashkata::testing
