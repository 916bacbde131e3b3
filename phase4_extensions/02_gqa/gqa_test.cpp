#include "gqa.hpp"

#include <array>
#include <cmath>
#include <map>

#include "phase4_extensions/kernel_suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

using Forward = Call<FlashForward<float>>;
using Backward = Call<FlashBackward<float>>;

std::vector<Forward> forwards() {
  return answers<FlashForward<float>>(
      "tiled_gqa_forward", [](const auto& problem) { tiled_gqa_forward(problem); },  //
      "flash_gqa_forward", [](const auto& problem) { flash_gqa_forward(problem); });
}

std::vector<Backward> backwards() {
  return answers<FlashBackward<float>>(
      "tiled_gqa_backward", [](const auto& problem) { tiled_gqa_backward(problem); },  //
      "flash_gqa_backward", [](const auto& problem) { flash_gqa_backward(problem); });
}

// ---- Cases ----------------------------------------------------------------------------------------------------------

struct GqaCase {
  const char* why;
  Sizes sizes;
  CallOptions options = {};
  bool watched = true;  // where every access is; the others are for their numbers alone

  std::string text(int number) const {
    return std::string(why) + ": " + random_inputs<float>(sizes, static_cast<unsigned>(number)).text() +
           (options.causal ? ", causal" : "") + ", seed " + std::to_string(number);
  }
};

// Their places are their numbers, from 1. New ones go to the end.
const std::vector<GqaCase>& cases() {
  static const std::vector<GqaCase> all{
      {"one head", {.queries = 9, .keys = 9}},
      {"every query head has its own", {.batch = 2, .heads = 3, .kv_heads = 3, .queries = 17, .keys = 35}},
      {"all query heads share one", {.batch = 2, .heads = 4, .kv_heads = 1, .queries = 21, .keys = 37}},
      {"groups of three", {.batch = 2, .heads = 6, .kv_heads = 2, .queries = 20, .keys = 33}},
      {"groups of two", {.batch = 2, .heads = 6, .kv_heads = 3, .queries = 13, .keys = 70}, {.causal = true}},
      {"queries that see no key",
       {.batch = 2, .heads = 6, .kv_heads = 2, .queries = 50, .keys = 23},
       {.causal = true},
       false},
      {"scale 0.3, rows as the model has them",
       {.batch = 2, .heads = 6, .kv_heads = 2, .queries = 11, .keys = 20, .width = 32},
       {.scale = 0.3f, .layouts = TOKENS}},
      {"several tiles of both",
       {.heads = 2, .kv_heads = 1, .queries = 130, .keys = 140},
       {.causal = true, .layouts = MIXED},
       false},
      {"rows of 64", {.heads = 3, .kv_heads = 1, .queries = 20, .keys = 33, .width = 64}, {}, false},
      {"rows of 128", {.heads = 4, .kv_heads = 2, .queries = 7, .keys = 20, .width = 128}, {}, false},
      {"decoding", {.batch = 3, .heads = 12, .kv_heads = 4, .queries = 1, .keys = 50}, {.causal = true}, false},
      {"a large group, scale -0.5",
       {.heads = 16, .kv_heads = 1, .queries = 5, .keys = 35},
       {.scale = -0.5f, .layouts = APART},
       false},
      {"scale 0",
       {.batch = 2, .heads = 6, .kv_heads = 3, .queries = 33, .keys = 33},
       {.causal = true, .scale = 0.0f, .layouts = MIXED_OTHERWISE}},
      {"chunk of a prompt",
       {.batch = 2, .heads = 10, .kv_heads = 2, .queries = 16, .keys = 48},
       {.causal = true, .layouts = TOKENS},
       false},
  };
  return all;
}

Inputs inputs_of(int number) {
  return random_inputs<float>(cases().at(static_cast<std::size_t>(number) - 1).sizes, static_cast<unsigned>(number));
}

// Numbers are judged, and recognised, in the fast executable. Each of the four functions has its own hundred of
// numbers: who has one of them wrong has not the others wrong.
const Recognise recognise_gqa(
    [] {
      std::vector<int> numbers;
      for (int function = 0; function < 4; ++function)
        for (int i = 1; i <= static_cast<int>(cases().size()); ++i) numbers.push_back(100 * function + i);
      return numbers;
    }(),
    [](int number) -> std::vector<Array> {
      if (kernels_are_checked()) throw NotImplemented(__FILE__);
      CallOptions options = cases().at(static_cast<std::size_t>(number % 100) - 1).options;
      options.judge = false;
      const Inputs in = inputs_of(number % 100);
      const auto place = static_cast<std::size_t>(number / 100 % 2);
      static std::map<int, ForwardResult> results;  // of the two backward functions
      if (number < 200) {
        const ForwardAnswer got = forward(forwards().at(place), in, options);
        if (!take_findings().empty()) throw std::runtime_error("a kernel was abandoned");
        return {got.output, got.lse};
      }
      auto result = results.find(number % 100);
      if (result == results.end()) result = results.emplace(number % 100, forward_result(in, options)).first;
      const Gradients got = backward(backwards().at(place), in, result->second, options);
      if (!take_findings().empty()) throw std::runtime_error("a kernel was abandoned");
      return {got.query, got.key, got.value};
    });

// ---- Probes ---------------------------------------------------------------------------------------------------------

struct Heads {
  Index query, kv;

  Index group() const { return query / kv; }
};

// More than one group, more than one head in it, and not as many of the one as of the other; and the two ends. Where
// every access is watched, numbers have been judged already.
std::vector<Heads> tried_heads() {
  if (kernels_are_checked()) return {{6, 2}, {7, 1}};
  return {{6, 2}, {6, 3}, {12, 3}, {7, 1}, {5, 5}};
}

const Fill ZERO = everywhere(0.0);
// Of the keys, the even ones in channel 0: dP is 1 and -1 by turns.
double by_turns(Index j, Index d) { return d > 0 ? 0.0 : j % 2 == 0 ? 1.0 : -1.0; }

// Each key/value head of each batch item has a number: which one came out in each query head?
bool expect_head_numbers(std::string_view name, const Array& got, double per_number, const char* of,
                         const Heads& heads) {
  const Index batch = got.shape[0];
  for (Index b = 0; b < batch; ++b) {
    for (Index h = 0; h < heads.query; ++h) {
      const Index want = b * heads.kv + h / heads.group();
      for (const double value : head_of(got, b, h).values) {
        const double number = value / per_number;
        if (std::abs(number - static_cast<double>(want)) < 1e-3) continue;
        std::string text = "query head " + std::to_string(h) + " of " + std::to_string(heads.query) + ", batch item " +
                           std::to_string(b) + ", should have the " + of + " of key/value head " +
                           std::to_string(h / heads.group()) + " of " + std::to_string(heads.kv);
        const auto whole = static_cast<Index>(std::lround(std::isfinite(number) ? number : -1.0));
        if (whole >= 0 && whole < batch * heads.kv && std::abs(number - static_cast<double>(whole)) < 1e-3) {
          text += ", and has those of head " + std::to_string(whole % heads.kv);
          if (whole / heads.kv != b) text += " of batch item " + std::to_string(whole / heads.kv);
        } else {
          text += ", and has a mixture or nothing of them: " + std::to_string(value) + " where " +
                  std::to_string(static_cast<double>(want) * per_number) + " was due";
        }
        finding(name, text);
        return false;
      }
    }
  }
  return true;
}

// Query head h of batch item `giver` gave 2 to the power of h, and nobody else anything: who arrived at each key?
bool expect_givers(std::string_view name, const Array& got, double factor, const Heads& heads, Index giver) {
  const auto names = [&](Index bits) {
    std::string text;
    for (Index h = 0; h < heads.query; ++h) {
      if ((bits >> h) % 2 == 1) text += " " + std::to_string(h);
    }
    return text.empty() ? " none" : text;
  };
  for (Index b = 0; b < got.shape[0]; ++b) {
    for (Index hk = 0; hk < heads.kv; ++hk) {
      const Index want = b == giver ? ((Index{1} << heads.group()) - 1) << (hk * heads.group()) : 0;
      const Array rows = head_of(got, b, hk);
      for (Index j = 0; j < rows.shape[0]; ++j) {
        const double sum = std::abs(rows.values[static_cast<std::size_t>(j * rows.shape[1] + 1)]) * factor;
        if (std::abs(sum - static_cast<double>(want)) < 0.1) continue;
        std::string text = "key " + std::to_string(j) + " of key/value head " + std::to_string(hk) + " of " +
                           std::to_string(heads.kv) + ", batch item " + std::to_string(b) +
                           ", should hear from these of " + std::to_string(heads.query) + " query heads:" + names(want);
        const double whole = std::round(sum);
        const bool is_list = std::abs(sum - whole) < 0.1 && whole < std::exp2(static_cast<double>(heads.query));
        text += is_list ? "; heard from:" + names(static_cast<Index>(whole))
                        : "; heard something else: " + std::to_string(sum) + " for " + std::to_string(want);
        finding(name, text);
        return false;
      }
    }
  }
  return true;
}

// What the query heads of a group say about their keys. Keys are 0, so every weight is 1 / Sk; each head has one query
// with a dO, at a place of its own. Channel 0 of V makes dS = +-1 / Sk, channel 1 of dO makes dV.
bool expect_sums_over_groups(const Backward& call, const Heads& heads, Index queries, Index keys, Index giver) {
  const Sizes sizes{.batch = 2, .heads = heads.query, .kv_heads = heads.kv, .queries = queries, .keys = keys};
  const auto given = [&](Index b, Index h) { return b == giver ? std::exp2(static_cast<double>(h)) : 0.0; };
  const Fill query = [&](Index b, Index h, Index, Index) { return given(b, h); };
  const Fill value = [](Index, Index, Index j, Index d) { return by_turns(j, d); };
  const Fill d_output = [&](Index b, Index h, Index i, Index d) {
    return i != 7 * h % queries || d > 1 ? 0.0 : d == 0 ? 1.0 : given(b, h);
  };
  const CallOptions options{.scale = 1.0f};
  const Inputs in = filled_inputs<float>(sizes, query, ZERO, value, d_output);
  const Gradients got = backward(call, in, forward_result(in, options), options);
  const double factor = static_cast<double>(keys);
  const bool value_is_right = expect_givers("d_value", got.value, factor, heads, giver);
  return (expect_givers("d_key", got.key, factor, heads, giver) && value_is_right) || not_so(call, in, options);
}

// [B, H, ...] whose groups of `group` heads come from other places: group (b, g) from `source`.
Array regrouped(const Array& all, Index batch, Index groups, Index group,
                const std::function<std::array<Index, 2>(Index, Index)>& source) {
  Array result{all.shape, {}};
  result.shape[0] = batch;
  result.shape[1] = groups * group;
  for (Index b = 0; b < batch; ++b)
    for (Index g = 0; g < groups; ++g) {
      const auto [from_b, from_g] = source(b, g);
      for (Index member = 0; member < group; ++member) {
        const Array head = head_of(all, from_b, from_g * group + member);
        result.values.insert(result.values.end(), head.values.begin(), head.values.end());
      }
    }
  return result;
}

Tensor<float, 4> regrouped(const Tensor<float, 4>& all, Index batch, Index groups, Index group,
                           const std::function<std::array<Index, 2>(Index, Index)>& source) {
  const Array array = regrouped(to_array(all), batch, groups, group, source);
  return kernel_suite_detail::to_tensor(array, {batch, groups * group, all.size(2), all.size(3)});
}

// Groups and batch items in another order: three batch items with two groups, from two with three.
constexpr Index GROUP = 2;
std::array<Index, 2> shuffled(Index b, Index g) {
  const Index was = (5 * (2 * g + b) + 1) % 6;
  return {was / 3, was % 3};
}

Inputs in_another_order(const Inputs& in) {
  return {regrouped(in.query, 3, 2, GROUP, shuffled), regrouped(in.key, 3, 2, 1, shuffled),
          regrouped(in.value, 3, 2, 1, shuffled), regrouped(in.d_output, 3, 2, GROUP, shuffled)};
}

Gradients same_groups(const Gradients& got, Index group, const std::vector<Index>& groups) {
  const auto pick = [&](const Array& all, Index size) {
    return regrouped(all, all.shape[0], static_cast<Index>(groups.size()), size, [&](Index b, Index g) {
      return std::array<Index, 2>{b, groups[static_cast<std::size_t>(g)]};
    });
  };
  return {pick(got.query, group), pick(got.key, 1), pick(got.value, 1), {}};
}

// Rows 0 .. count - 1 of every head.
Array first_rows(const Array& all, Index count) {
  Array result{all.shape, {}};
  result.shape[2] = count;
  const Index rows = all.shape[2];
  const Index width = all.shape.size() > 3 ? all.shape[3] : 1;
  for (Index head = 0; head < all.shape[0] * all.shape[1]; ++head) {
    const auto begin = all.values.begin() + head * rows * width;
    result.values.insert(result.values.end(), begin, begin + count * width);
  }
  return result;
}

void set_head(Tensor<float, 4>& tensor, Index b, Index h, float value) {
  for (Index s = 0; s < tensor.size(2); ++s)
    for (Index d = 0; d < tensor.size(3); ++d) tensor(b, h, s, d) = value;
}

void set_row(Tensor<float, 4>& tensor, Index s, float value) {
  for (Index b = 0; b < tensor.size(0); ++b)
    for (Index h = 0; h < tensor.size(1); ++h)
      for (Index d = 0; d < tensor.size(3); ++d) tensor(b, h, s, d) = value;
}

// ---- Bad arguments: after a good call -------------------------------------------------------------------------------

constexpr Shape<4> QUERIES{2, 6, 5, 16};
constexpr Shape<4> KEYS{2, 2, 7, 16};
constexpr Shape<3> ROWS{2, 6, 5};
using In = View<const float, 4>;
using Out = View<float, 4>;

template <template <typename> class Buffer>
struct Numbers {
  explicit Numbers(const char* name) : buffer(name, 4096) { buffer.upload(std::vector<float>(4096, 0.5f)); }
  Buffer<float> buffer;
};

template <template <typename> class Buffer>
void expect_bad_forwards_refused(const Forward& call) {
  Numbers<Buffer> inputs("inputs"), outputs("output"), rows("lse");
  float* const in = inputs.buffer.data();
  float* const out = outputs.buffer.data();
  float* const lse = rows.buffer.data();
  using Problem = FlashForward<float>;
  const Problem good{.query = In(in, QUERIES),
                     .key = In(in, KEYS),
                     .value = In(in, KEYS),
                     .output = Out(out, QUERIES),
                     .lse = View<float, 3>(lse, ROWS)};
  run(call, good, /*judge=*/true);
  const auto rejected = [&](std::string_view what, std::string_view argument, const auto& change) {
    Problem bad = good;
    change(bad);
    expect_rejected(what, argument, [&] { run(call, bad, true); });
  };
  const auto keys_of = [&](Index heads) {
    return [in, heads](Problem& p) { p.key = p.value = In(in, {2, heads, 7, 16}); };
  };
  rejected("4 key/value heads for 6 query heads", "key", keys_of(4));
  rejected("5 key/value heads for 6 query heads", "key", keys_of(5));
  rejected("12 key/value heads for 6 query heads", "key", keys_of(12));
  rejected("no key/value head", "key", keys_of(0));
  rejected("a value of more heads than the key", "value", [&](Problem& p) { p.value = In(in, {2, 3, 7, 16}); });
  rejected("keys of another batch", "key", [&](Problem& p) { p.key = In(in, {1, 2, 7, 16}); });
  rejected("a value too few", "value", [&](Problem& p) { p.value = In(in, {2, 2, 6, 16}); });
  rejected("keys of another width", "key", [&](Problem& p) { p.key = In(in, {2, 2, 7, 32}); });
  rejected("an output of as many heads as the keys", "output", [&](Problem& p) { p.output = Out(out, {2, 2, 5, 16}); });
  rejected("an lse of as many heads as the keys", "lse", [&](Problem& p) { p.lse = View<float, 3>(lse, {2, 2, 5}); });
  rejected("a scale that is NaN", "scale", [](Problem& p) { p.scale = NOT_A_NUMBER; });
  rejected("keys whose rows are not 16 bytes apart", "key", [&](Problem& p) {
    p.key = In(in, KEYS, {400, 200, 17, 1});
  });
}

template <template <typename> class Buffer>
void expect_bad_backwards_refused(const Backward& call) {
  Numbers<Buffer> inputs("inputs"), first("d_query"), second("d_key"), third("d_value"), rows("delta"), sums("sums");
  float* const in = inputs.buffer.data();
  float* const dk = second.buffer.data();
  float* const dv = third.buffer.data();
  using Problem = FlashBackward<float>;
  const Problem good{.query = In(in, QUERIES),
                     .key = In(in, KEYS),
                     .value = In(in, KEYS),
                     .output = In(in, QUERIES),
                     .lse = View<const float, 3>(in, ROWS),
                     .d_output = In(in, QUERIES),
                     .d_query = Out(first.buffer.data(), QUERIES),
                     .d_key = Out(dk, KEYS),
                     .d_value = Out(dv, KEYS),
                     .delta = View<float, 3>(rows.buffer.data(), ROWS),
                     .d_query_sum = Out(sums.buffer.data(), QUERIES)};
  run(call, good, /*judge=*/true);
  const auto rejected = [&](std::string_view what, std::string_view argument, const auto& change) {
    Problem bad = good;
    change(bad);
    expect_rejected(what, argument, [&] { run(call, bad, true); });
  };
  rejected("4 key/value heads for 6 query heads", "key", [&](Problem& p) {
    p.key = p.value = In(in, {2, 4, 7, 16});
    p.d_key = Out(dk, {2, 4, 7, 16});
    p.d_value = Out(dv, {2, 4, 7, 16});
  });
  rejected("a d_key of as many heads as the queries", "d_key", [&](Problem& p) { p.d_key = Out(dk, {2, 6, 7, 16}); });
  rejected("a d_value of as many heads as the queries", "d_value", [&](Problem& p) {
    p.d_value = Out(dv, {2, 6, 7, 16});
  });
  rejected("a d_query of as many heads as the keys", "d_query", [&](Problem& p) {
    p.d_query = Out(first.buffer.data(), {2, 2, 5, 16});
  });
  rejected("a d_output of as many heads as the keys", "d_output", [&](Problem& p) {
    p.d_output = In(in, {2, 2, 5, 16});
  });
  rejected("a value too few", "value", [&](Problem& p) { p.value = In(in, {2, 2, 6, 16}); });
  rejected("a delta of as many heads as the keys", "delta", [&](Problem& p) {
    p.delta = View<float, 3>(rows.buffer.data(), {2, 2, 5});
  });
  rejected("a scale that is infinite", "scale", [](Problem& p) { p.scale = INF; });
}

// ---- What only a GPU has the time for -------------------------------------------------------------------------------

// Every group of [batch, heads] is one of two, so that the reference has little to do.
bool expect_long(Index batch, const Heads& heads, Index queries, Index keys, Index width, bool causal) {
  const Inputs two = random_inputs<float>(
      {.heads = 2 * heads.group(), .kv_heads = 2, .queries = queries, .keys = keys, .width = width}, 300);
  const CallOptions options{.causal = causal};
  const auto source = [&](Index b, Index g) { return std::array<Index, 2>{0, (b * heads.kv + g) % 2}; };
  const auto all = [&](const auto& x, Index group) { return regrouped(x, batch, heads.kv, group, source); };
  const Index group = heads.group();
  const Inputs in{all(two.query, group), all(two.key, 1), all(two.value, 1), all(two.d_output, group)};
  const ExpectedForward want = expected_forward<float>(two, options);
  const ForwardResult result{all(want.exact.output, group), all(want.exact.lse, group)};
  const ForwardAnswer got = forward(forwards().back(), in, options);
  const Bound output{want.output_bound.relative, all(want.output_bound.magnitude, group)};
  const Bound lse{want.lse_bound.relative, all(want.lse_bound.magnitude, group)};
  if (!expect_close("lse", got.lse, result.lse, lse, LSE_AXES) ||
      !expect_close("output", got.output, result.output, output, QUERY_AXES)) {
    return not_so(forwards().back(), in, options);
  }
  const ExpectedGradients one = expected_backward<float>(two, options).gradients.want;
  const Judgement<float> judgement({all(one.query, group),
                                    all(one.key, 1),
                                    all(one.value, 1),
                                    {one.query_bound.relative, all(one.query_bound.magnitude, group)},
                                    {one.key_bound.relative, all(one.key_bound.magnitude, 1)},
                                    {one.value_bound.relative, all(one.value_bound.magnitude, 1)}},
                                   {});
  return expect_gradients(backward(backwards().back(), in, result, options), judgement) ||
         not_so(backwards().back(), in, options);
}

bool something_short() { return expect_right(backwards().back(), inputs_of(1)); }

}  // namespace

TEST_SUITE("phase4.02_gqa") {
  TEST_CASE("a query head reads the values of its own group and of no other") {
    ask("Six query heads share two key/value heads, and neighbours share. Which one do query heads 1, 2 and 3 read? "
        "Where does it begin in memory, in batch item 1?");
    for (const Heads& heads : tried_heads()) {
      const Sizes sizes{.batch = 2, .heads = heads.query, .kv_heads = heads.kv, .queries = 3, .keys = 5};
      const Fill numbers = [&](Index b, Index hk, Index, Index) { return static_cast<double>(b * heads.kv + hk); };
      const Inputs in = filled_inputs<float>(sizes, noise(1), noise(2), numbers, ZERO);
      for (const Forward& call : forwards()) {
        if (expect_head_numbers("output", forward(call, in).output, 1.0, "values", heads)) continue;
        not_so(call, in);
        return;
      }
    }
  }

  TEST_CASE("a query head compares itself with the keys of its own group and of no other") {
    ask("Each key/value head has one loud key, each at a place of its own. Whose loud key does query head 1 hear, and "
        "which line of yours decides it?");
    for (const Heads& heads : tried_heads()) {
      const Sizes sizes{.batch = 2, .heads = heads.query, .kv_heads = heads.kv, .queries = 2, .keys = 2 * heads.kv + 1};
      const Fill loud = [&](Index b, Index hk, Index j, Index) { return j == b * heads.kv + hk ? 8.0 : 0.0; };
      const Fill place = [](Index, Index, Index j, Index) { return static_cast<double>(j); };
      const Inputs in = filled_inputs<float>(sizes, everywhere(1.0), loud, place, ZERO);
      for (const Forward& call : forwards()) {
        const ForwardAnswer got = forward(call, in, {.scale = 1.0f});
        const bool lse = expect_all("lse", got.lse, 128.0, 1e-3, LSE_AXES, "one key has the score 128, the others 0");
        if (expect_head_numbers("output", got.output, 1.0, "keys", heads) && lse) continue;
        not_so(call, in);
        return;
      }
    }
  }

  TEST_CASE("the gradient of a query comes from the keys and the values of its own group") {
    ask("dS = P (dO V^T - delta) and dQ = scale dS K: both name a key/value head. Is it the one that the forward pass "
        "read?");
    for (const Heads& heads : tried_heads()) {
      const Sizes sizes{.batch = 2, .heads = heads.query, .kv_heads = heads.kv, .queries = 3, .keys = 4};
      const auto number = [&](Index b, Index hk) { return static_cast<double>(b * heads.kv + hk); };
      const Fill even = [](Index, Index, Index j, Index) { return j % 2 == 0 ? 1.0 : 0.0; };
      const Fill turns = [](Index, Index, Index j, Index d) { return by_turns(j, d); };
      for (const bool of_keys : {true, false}) {
        const Fill key = [&](Index b, Index hk, Index j, Index d) {
          return (of_keys ? number(b, hk) : 1.0) * even(b, hk, j, d);
        };
        const Fill value = [&](Index b, Index hk, Index j, Index d) {
          return (of_keys ? 1.0 : number(b, hk)) * turns(b, hk, j, d);
        };
        const CallOptions options{.scale = 1.0f};
        const Inputs in = filled_inputs<float>(sizes, ZERO, key, value, everywhere(1.0));
        const ForwardResult result = forward_result(in, options);
        for (const Backward& call : backwards()) {
          const Gradients got = backward(call, in, result, options);
          if (expect_head_numbers("d_query", got.query, 0.5, of_keys ? "keys" : "values", heads)) continue;
          not_so(call, in, options);
          return;
        }
      }
    }
  }

  TEST_CASE("the gradient of a key is the sum of what every query head of its group says") {
    ask("Each query head gives a power of two of its own. How many heads read key 0 of key/value head 1? How often is "
        "its gradient written, and what becomes of what was written before?");
    for (const Backward& call : backwards()) {
      for (const Heads& heads : tried_heads()) {
        if (!kernels_are_checked() && !expect_sums_over_groups(call, heads, 1, 4, /*giver=*/1)) return;
        if (!expect_sums_over_groups(call, heads, 40, 64, /*giver=*/0)) return;
      }
    }
  }

  TEST_CASE("two query heads that share as on the page") {
    ask("The README has every number on the way. Which is the first of yours that differs?");
    // One channel is used. q = (log 3, 0) in the two heads, keys 1 and 2 with values 8 and 0, dO = (1, 2).
    const auto column = [](double first, double second) -> Fill {
      return [=](Index, Index h, Index s, Index d) { return d > 0 ? 0.0 : h + s == 0 ? first : second; };
    };
    const Inputs in = filled_inputs<float>({.heads = 2, .keys = 2}, column(std::log(3.0), 0.0), column(1.0, 2.0),
                                           column(8.0, 0.0), column(1.0, 2.0));
    const CallOptions options{.scale = 1.0f};
    const auto at = [](const Array& array, Index row) { return array.values[static_cast<std::size_t>(16 * row)]; };
    const auto expect_number = [](const char* name, double got, double want) {
      return expect(std::abs(got - want) < 1e-5, name,
                    "got " + std::to_string(got) + ", on the page it is " + std::to_string(want));
    };
    for (const Forward& call : forwards()) {
      const ForwardAnswer got = forward(call, in, options);
      const bool first = expect_number("output of head 0", at(got.output, 0), 2.0);
      if (!expect_number("output of head 1", at(got.output, 1), 4.0) || !first) return;
    }
    for (const Backward& call : backwards()) {
      const Gradients got = backward(call, in, forward_result(in, options), options);
      const bool first = expect_number("d_value of key 0", at(got.value, 0), 1.25);
      const bool second = expect_number("d_value of key 1", at(got.value, 1), 1.75);
      const bool third = expect_number("d_key of key 0", at(got.key, 0), 1.5 * std::log(3.0));
      if (!expect_number("d_key of key 1", at(got.key, 1), -1.5 * std::log(3.0)) || !first || !second || !third) return;
    }
  }

  TEST_CASE("many heads may share and no small share is lost") {
    ask("63 heads give a key 1 each, and one gives 8192. How many digits has the number that you add them up in? How "
        "often is the sum rounded before the last head is added?");
    const Sizes sizes{.heads = 64, .queries = 1, .keys = 4};
    const Fill given = [](Index, Index h, Index, Index) { return h == 0 ? 8192.0 : 1.0; };
    const Fill turns = [](Index, Index, Index j, Index d) { return by_turns(j, d); };
    const Fill d_output = [&](Index b, Index h, Index i, Index d) { return d == 0 ? 1.0 : given(b, h, i, d); };
    const CallOptions options{.scale = 1.0f};
    const Inputs in = filled_inputs<float>(sizes, given, ZERO, turns, d_output);
    for (const Backward& call : backwards()) {
      const Gradients got = backward(call, in, forward_result(in, options), options);
      for (const auto& [name, array] : {std::pair{"d_key", &got.key}, {"d_value", &got.value}}) {
        for (std::size_t j = 0; j < 4; ++j) {
          const double sum = 4.0 * std::abs(array->values[j * 16 + 1]);
          if (!expect(
                  std::abs(sum - 8192.0 - 63.0) < 0.4, name,
                  "the heads gave key " + std::to_string(j) + " 8192 + 63, and " + std::to_string(sum) + " arrived")) {
            not_so(call, in, options);
            return;
          }
        }
      }
    }
  }

  TEST_CASE("a head of K and V reaches its own group and nobody else") {
    ask("One head of K and V is NaN. Who may notice? From a block's number, how do you know its batch item, its query "
        "head and its key/value head?");
    for (const bool causal : {false, true}) {
      const CallOptions options{.causal = causal};
      const Inputs clean = random_inputs<float>({.heads = 6, .kv_heads = 3, .queries = 19, .keys = 37}, 21);
      Inputs poisoned = copy_of(clean);
      set_head(poisoned.key, 0, 1, NOT_A_NUMBER);
      set_head(poisoned.value, 0, 1, NOT_A_NUMBER);
      const std::vector<Index> others{0, 2};
      const auto of = [&](const Array& all, const std::vector<Index>& groups) {
        return regrouped(all, 1, static_cast<Index>(groups.size()), 2, [&](Index, Index g) {
          return std::array<Index, 2>{0, groups[static_cast<std::size_t>(g)]};
        });
      };
      for (const Forward& call : forwards()) {
        const ForwardAnswer want = forward(call, clean, options);
        const ForwardAnswer got = forward(call, poisoned, options);
        const std::string why = "of the query heads 0, 1, 4 and 5 of 6 when head 1 of 3 of K and V became NaN";
        const bool lse = expect_same_bits("lse", of(got.lse, others), of(want.lse, others), LSE_AXES, why);
        const bool same =
            expect_same_bits("output", of(got.output, others), of(want.output, others), QUERY_AXES, why) && lse;
        const Array own = of(got.output, {1});
        const auto numbers = std::count_if(own.values.begin(), own.values.end(), [](double x) { return x == x; });
        if (expect(numbers == 0, "output",
                   std::to_string(numbers) + " numbers of query heads 2 and 3 of 6 did not notice that head 1 of 3 of "
                                             "K and V became NaN") &&
            same) {
          continue;
        }
        not_so(call, poisoned, options);
        return;
      }
    }
  }

  TEST_CASE("on the way back a head of K and V reaches its own group and nobody else") {
    ask("One head of K and V is NaN, or the dO of one query head is. Which gradients may notice, and which of your "
        "loops goes one head too far?");
    for (const bool of_query : {false, true}) {
      const CallOptions options{.causal = of_query, .deterministic = true};
      const Inputs clean = random_inputs<float>({.heads = 6, .kv_heads = 3, .queries = 19, .keys = 37}, 22);
      const ForwardResult result = forward_result(clean, options);
      Inputs poisoned = copy_of(clean);
      if (of_query) {
        set_head(poisoned.d_output, 0, 2, NOT_A_NUMBER);
      } else {
        set_head(poisoned.key, 0, 1, NOT_A_NUMBER);
        set_head(poisoned.value, 0, 1, NOT_A_NUMBER);
      }
      for (const Backward& call : backwards()) {
        const Gradients want = backward(call, clean, result, options);
        const Gradients got = backward(call, poisoned, result, options);
        if (!expect_same(same_groups(got, 2, {0, 2}), same_groups(want, 2, {0, 2}),
                         of_query ? "of the first and the last group when the dO of query head 2 of 6 became NaN"
                                  : "of the first and the last group when head 1 of 3 of K and V became NaN")) {
          not_so(call, poisoned, options);
          return;
        }
      }
    }
  }

  TEST_CASE("groups and batch items know nothing of each other") {
    ask("Six groups, as two batch items with three and, in another order, as three with two. How many heads of K does "
        "one batch item own, and how many of Q?");
    const Inputs in = random_inputs<float>({.batch = 2, .heads = 6, .kv_heads = 3, .queries = 21, .keys = 35}, 23);
    const Inputs other = in_another_order(in);
    for (const Forward& call : forwards()) {
      const ForwardAnswer before = forward(call, in, {.causal = true});
      const ForwardAnswer want{
          regrouped(before.output, 3, 2, GROUP, shuffled), regrouped(before.lse, 3, 2, GROUP, shuffled), {}};
      if (expect_same(forward(call, other, {.causal = true}), want, "when the groups came in another order")) continue;
      not_so(call, other);
      return;
    }
  }

  TEST_CASE("on the way back groups and batch items know nothing of each other") {
    ask("Six groups, in two orders. Whose batch stride do you use for d_key, and how many heads does it step over?");
    const CallOptions options{.causal = true, .deterministic = true};
    const Inputs in = random_inputs<float>({.batch = 2, .heads = 6, .kv_heads = 3, .queries = 21, .keys = 35}, 24);
    const Inputs other = in_another_order(in);
    for (const Backward& call : backwards()) {
      const Gradients before = backward(call, in, forward_result(in, options), options);
      const Gradients want{regrouped(before.query, 3, 2, GROUP, shuffled),
                           regrouped(before.key, 3, 2, 1, shuffled),
                           regrouped(before.value, 3, 2, 1, shuffled),
                           {}};
      const Gradients got = backward(call, other, forward_result(other, options), options);
      if (expect_same(got, want, "when the groups came in another order")) continue;
      not_so(call, other, options);
      return;
    }
  }

  TEST_CASE("a query that sees no key has output 0 and gradients of 0") {
    ask("What are the sum and the maximum of nothing? And when no head of the group has a query: who writes the "
        "gradients of its keys?");
    struct Lengths {
      Index queries, keys;
      bool causal;
    };
    for (const Lengths& n : {Lengths{9, 4, true}, {4, 0, false}, {70, 3, true}, {0, 5, false}, {0, 70, true}}) {
      const Inputs in = random_inputs<float>({.heads = 4, .kv_heads = 2, .queries = n.queries, .keys = n.keys}, 25);
      for (const Forward& call : forwards()) {
        if (!expect_right(call, in, {.causal = n.causal})) return;
      }
      for (const Backward& call : backwards()) {
        for (const bool deterministic : {false, true}) {
          if (kernels_are_checked() && deterministic != n.causal) continue;
          if (!expect_right(call, in, {.causal = n.causal, .deterministic = deterministic})) return;
        }
      }
    }
  }

  TEST_CASE("a key that a query may not see cannot move it") {
    ask("The last key holds NaN, in every head. Under a causal mask, which queries of which heads see it?");
    const CallOptions options{.causal = true, .deterministic = true};
    const Inputs clean = random_inputs<float>({.heads = 4, .kv_heads = 2, .queries = 20, .keys = 37}, 26);
    const ForwardResult result = forward_result(clean, options);
    for (const bool of_key : {true, false}) {
      Inputs poisoned = copy_of(clean);
      set_row(of_key ? poisoned.key : poisoned.value, 36, NOT_A_NUMBER);
      const std::string why = std::string("of queries that may not see the last key, whose ") +
                              (of_key ? "row of K" : "row of V") + " became NaN";
      for (const Forward& call : forwards()) {
        const ForwardAnswer want = forward(call, clean, options);
        const ForwardAnswer got = forward(call, poisoned, options);
        if (expect_same_bits("output", first_rows(got.output, 19), first_rows(want.output, 19), QUERY_AXES, why) &&
            expect_same_bits("lse", first_rows(got.lse, 19), first_rows(want.lse, 19), LSE_AXES, why)) {
          continue;
        }
        not_so(call, poisoned, options);
        return;
      }
      for (const Backward& call : backwards()) {
        const Gradients want = backward(call, clean, result, options);
        const Gradients got = backward(call, poisoned, result, options);
        if (expect_same_bits("d_query", first_rows(got.query, 19), first_rows(want.query, 19), QUERY_AXES, why)) {
          continue;
        }
        not_so(call, poisoned, options);
        return;
      }
    }
  }

  TEST_CASE("rows may lie anywhere in memory") {
    ask("K has fewer heads than Q, so its strides are others, also where both are packed. Which stride belongs to "
        "which "
        "tensor? And in the model's layout?");
    const Inputs in = random_inputs<float>({.batch = 2, .heads = 6, .kv_heads = 2, .queries = 17, .keys = 35}, 27);
    const ForwardResult result = forward_result(in);
    for (const Layouts& layouts : {TOKENS, APART, MIXED, MIXED_OTHERWISE}) {
      const CallOptions options{.layouts = layouts, .deterministic = true};
      if (kernels_are_checked() && layouts.query != MIXED.query) continue;
      for (const Forward& call : forwards()) {
        if (expect_same(forward(call, in, options), forward(call, in), "when the rows lay otherwise")) continue;
        not_so(call, in);
        return;
      }
      for (const Backward& call : backwards()) {
        const Gradients want = backward(call, in, result, {.deterministic = true});
        if (expect_same(backward(call, in, result, options), want, "when the rows lay otherwise")) continue;
        not_so(call, in, options);
        return;
      }
    }
  }

  TEST_CASE("the order in which blocks run changes no bit of what keys get") {
    ask("Is (a + b) + c the same as (c + a) + b? Who adds up what the heads of a group say, and in which order? And if "
        "two of them read the number before either has written it?");
    const Inputs in = random_inputs<float>({.heads = 8, .kv_heads = 1, .queries = 33, .keys = 40}, 28);
    for (const bool deterministic : {false, true}) {
      if (kernels_are_checked() && deterministic) continue;
      const CallOptions options{.deterministic = deterministic};
      const ExpectedBackward<float> expected = expected_backward<float>(in, options);
      for (const Backward& call : backwards()) {
        const Gradients want = backward(call, in, expected.forward, options);
        for (const std::uint64_t seed : {1u, 2u, 3u}) {
          if (kernels_are_checked() && seed > 1) continue;  // who is watched races in any order
          const AnotherOrder order(seed);
          const Gradients got = backward(call, in, expected.forward, options);
          if (expect_same(got, want, "when blocks and threads ran in another order", deterministic) &&
              expect_gradients(got, expected.gradients)) {
            continue;
          }
          not_so(call, in, options);
          return;
        }
      }
    }
  }

  TEST_CASE("a tile of keys is loaded for many queries and a tile of queries for many keys") {
    ask("64 queries and 64 keys, two query heads that share. How many times is each row loaded from global memory? "
        "Does the block of keys load them again for each head of its group?");
    if (needs_a_check()) return;
    const Index rows = kernels_are_checked() ? 64 : 1;  // otherwise nobody counts
    const Inputs in = random_inputs<float>({.heads = 2, .kv_heads = 1, .queries = rows, .keys = rows}, 29);
    const ForwardAnswer output = forward(forwards().back(), in);
    const Gradients gradients = backward(backwards().back(), in, {output.output, output.lse}, {.deterministic = true});
    if (!kernels_are_judged()) return;
    const Index bytes = rows * 16 * static_cast<Index>(sizeof(float));  // of one head
    const auto expect_at_most = [&](const std::vector<KernelProfile>& profiles, const char* name, Index times) {
      const Index loaded = bytes_loaded(profiles, name);
      expect(loaded > 0 && loaded <= times * bytes + 1024, name,
             "loaded too often: " + std::to_string(loaded) + " bytes, " + std::to_string(loaded / bytes) +
                 " times a head of it, for 64 rows; want at most " + std::to_string(times) + " times");
    };
    // Two query heads, and 64 / 16 tiles of each. On the way back once more for each head, by the block that owns keys.
    expect_at_most(output.profiles, "key", 2 * 4);
    expect_at_most(output.profiles, "value", 2 * 4);
    expect_at_most(gradients.profiles, "key", 2 * (4 + 1));
    expect_at_most(gradients.profiles, "value", 2 * (4 + 1));
    expect_at_most(gradients.profiles, "query", 2 * (4 + 1));
    expect_at_most(gradients.profiles, "d_output", 2 * (4 + 2));
  }

  TEST_CASE("tiles that see nothing of each other are not even read in any head of the group") {
    ask("A block of keys walks over the queries of one head after the other. Where does it begin in the second head?");
    if (needs_a_check()) return;
    const Index rows = kernels_are_checked() ? 320 : 1;
    const Inputs in = random_inputs<float>({.heads = 4, .kv_heads = 1, .queries = rows, .keys = rows}, 30);
    const auto loaded = [&](bool causal) {
      const CallOptions options{.causal = causal, .deterministic = true};
      const Gradients got = backward(backwards().back(), in, forward_result(in, options), options);
      return bytes_loaded(got.profiles, "query");
    };
    const std::int64_t all = loaded(false);
    const std::int64_t causal = loaded(true);
    if (!kernels_are_judged()) return;
    expect_blind_tiles_not_loaded(causal, all, "query, for 320 queries and keys of four heads", 8);
  }

  TEST_CASE("agrees with the float64 reference") {
    for (int number = 1; number <= static_cast<int>(cases().size()); ++number) {
      const GqaCase& c = cases()[static_cast<std::size_t>(number) - 1];
      run_case(number, c.text(number), [&] {
        if (kernels_are_checked() && !c.watched) return;
        const Inputs in = inputs_of(number);
        const ExpectedForward want = expected_forward<float>(in, c.options);
        for (const Forward& call : forwards()) {
          if (!expect_forward<float>(forward(call, in, c.options), want)) {
            not_so(call, in, c.options);
            return;
          }
        }
      });
    }
  }

  TEST_CASE("gradients agree with the float64 reference") {
    for (int number = 1; number <= static_cast<int>(cases().size()); ++number) {
      const GqaCase& c = cases()[static_cast<std::size_t>(number) - 1];
      run_case(number, c.text(number), [&] {
        if (kernels_are_checked() && !c.watched) return;
        const Inputs in = inputs_of(number);
        const ExpectedBackward<float> want = expected_backward<float>(in, c.options);
        for (const Backward& call : backwards()) {
          for (const bool deterministic : {false, true}) {
            if (kernels_are_checked() && deterministic != (number % 2 == 0)) continue;
            CallOptions options = c.options;
            options.deterministic = deterministic;
            if (expect_gradients(backward(call, in, want.forward, options), want.gradients)) continue;
            not_so(call, in, options);
            return;
          }
        }
      });
    }
  }

  TEST_CASE("agrees with the float64 reference at 512 keys with 32 query heads and 8 key heads") {
    if (needs_a_gpu(something_short)) return;
    for (const bool causal : {false, true}) {
      if (!expect_long(1, {32, 8}, 200, 512, 32, causal)) return;
      if (!expect_long(1, {32, 1}, 60, 700, 64, causal)) return;
    }
  }

  TEST_CASE("agrees with the float64 reference for 70400 heads") {
    ask("How many blocks may a grid have in x, and how many in y and z?");
    if (needs_a_gpu(something_short)) return;
    expect_long(1100, {64, 8}, 2, 3, 16, true);
  }

  TEST_CASE("says what is wrong with bad arguments") {
    for (const Forward& call : forwards()) {
      call.on_host ? expect_bad_forwards_refused<HostBuffer>(call) : expect_bad_forwards_refused<DeviceBuffer>(call);
    }
  }

  TEST_CASE("says what is wrong with bad arguments of the way back") {
    for (const Backward& call : backwards()) {
      call.on_host ? expect_bad_backwards_refused<HostBuffer>(call) : expect_bad_backwards_refused<DeviceBuffer>(call);
    }
  }
}
