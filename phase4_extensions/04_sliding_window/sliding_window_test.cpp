#include "sliding_window.hpp"

#include <array>
#include <cmath>

#include "phase4_extensions/kernel_suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

using Forward = Call<FlashForward<float>>;
using Backward = Call<FlashBackward<float>>;

std::vector<Forward> forwards(const Window& window) {
  return answers<FlashForward<float>>(
      "tiled_window_forward", [window](const auto& problem) { tiled_window_forward(problem, window); },
      "flash_window_forward", [window](const auto& problem) { flash_window_forward(problem, window); });
}

std::vector<Backward> backwards(const Window& window) {
  return answers<FlashBackward<float>>(
      "tiled_window_backward", [window](const auto& problem) { tiled_window_backward(problem, window); },
      "flash_window_backward", [window](const auto& problem) { flash_window_backward(problem, window); });
}

// What the reference is told.
Change through(const Window& window) {
  return [window](reference::Problem& problem) {
    problem.window_left = window.left;
    problem.window_right = window.right;
    problem.softcap = static_cast<double>(window.softcap);
  };
}

std::string to_text(const Window& window) {
  const auto side = [](const char* name, const std::optional<Index>& limit) {
    return limit ? name + std::to_string(*limit) : std::string();
  };
  std::string text = side(" left=", window.left) + side(" right=", window.right);
  if (window.softcap > 0.0f) {
    std::ostringstream cap;
    cap << window.softcap;
    text += " softcap=" + cap.str();
  }
  return text.empty() ? "no window" : text.substr(1);
}

template <typename Problem>
bool not_so(const Call<Problem>& call, const Inputs& in, const Window& window, const CallOptions& options = {}) {
  testing::not_so(call, in, options);
  finding("window", to_text(window));
  return false;
}

// ---- Judgement: both answers, as the reference says -----------------------------------------------------------------

bool expect_forward_right(const Inputs& in, const Window& window, const CallOptions& options = {}) {
  const ExpectedForward want = expected_forward<float>(in, options, through(window));
  for (const Forward& call : forwards(window)) {
    if (!expect_forward<float>(forward(call, in, options), want)) return not_so(call, in, window, options);
  }
  return true;
}

// dQ by atomics and without; watched, by turns.
bool expect_backward_right(const Inputs& in, const Window& window, CallOptions options = {}) {
  const ExpectedBackward<float> want = expected_backward<float>(in, options, through(window));
  for (const Backward& call : backwards(window)) {
    for (const bool deterministic : {false, true}) {
      if (call.on_host && deterministic) continue;
      if (kernels_are_checked() && deterministic != ((in.query.size(2) + in.key.size(2)) % 2 == 0)) continue;
      options.deterministic = deterministic;
      const Gradients got = backward(call, in, want.forward, options);
      if (!expect_gradients<float>(got, want.gradients)) return not_so(call, in, window, options);
    }
  }
  return true;
}

// ---- Cases ----------------------------------------------------------------------------------------------------------

struct WindowCase {
  const char* why;
  Sizes sizes;
  Window window;
  CallOptions options = {};  // causal, scale, layouts
  double loud = 1.0;         // what queries are multiplied by: scores are of order 1 without it
  int number = 0;            // its place in the list, from 1; also its seed

  Inputs inputs() const {
    const auto seed = static_cast<unsigned>(100 + 4 * number);
    const Fill quiet = noise(seed);
    return filled_inputs<float>(
        sizes, [&](Index b, Index h, Index s, Index d) { return loud * quiet(b, h, s, d); }, noise(seed + 1),
        noise(seed + 2), noise(seed + 3));
  }
  std::string text() const { return std::string(why) + ": " + to_text(window) + (options.causal ? ", causal" : ""); }
};

// Numbers never change: new cases go to the end.
// clang-format off
const std::vector<WindowCase>& window_cases() {
  static const std::vector<WindowCase> list = [] {
    constexpr Index ANY = 1000;  // larger than every length here
    std::vector<WindowCase> cases = {
      {"left alone", {.queries = 37, .keys = 37}, {.left = 5}},
      {"right alone", {.queries = 37, .keys = 37}, {.right = 5}},
      {"a side each", {.queries = 40, .keys = 40}, {.left = 9, .right = 3}},
      {"a window under a causal mask", {.queries = 70, .keys = 70}, {.left = 20}, {.causal = true}},
      {"right under a causal mask", {.queries = 33, .keys = 33}, {.left = 6, .right = 4}, {.causal = true}},
      {"only the key at its place", {.queries = 19, .keys = 19}, {.left = 0, .right = 0}},
      {"larger than everything", {.queries = 21, .keys = 25}, {.left = ANY, .right = ANY}},
      {"more keys than queries", {.queries = 20, .keys = 53}, {.left = 12, .right = 4}},
      {"more queries than keys", {.queries = 53, .keys = 20}, {.left = 12, .right = 4}},
      {"more queries than keys, causal", {.queries = 53, .keys = 20}, {.left = 7}, {.causal = true}},
      {"tiles of queries that see nothing", {.queries = 150, .keys = 20}, {.left = 10, .right = 2}},
      {"few queries behind many keys", {.queries = 5, .keys = 133}, {.left = 40}, {.causal = true}},
      {"tiles of keys that nobody sees", {.queries = 9, .keys = 140}, {.left = 10, .right = 10}},
      {"several tiles each way", {.queries = 130, .keys = 130}, {.left = 50, .right = 9}},
      {"several tiles each way, causal", {.queries = 130, .keys = 130}, {.left = 64}, {.causal = true}},
      {"a narrow band", {.queries = 97, .keys = 96}, {.left = 3, .right = 3}},
      {"right alone, more queries than keys", {.queries = 40, .keys = 30}, {.right = 6}},
      {"left alone, more keys than queries", {.queries = 30, .keys = 40}, {.left = 6}},
      {"left 0, right open", {.queries = 17, .keys = 23}, {.left = 0}},
      {"right 0 is causal", {.queries = 17, .keys = 23}, {.right = 0}},
      {"no window, no cap", {.queries = 21, .keys = 25}, {}},
      {"causal alone", {.queries = 21, .keys = 25}, {}, {.causal = true}},
      {"a cap alone", {.queries = 37, .keys = 53}, {.softcap = 1.5f}},
      {"a cap under a causal mask", {.queries = 33, .keys = 33}, {.softcap = 0.7f}, {.causal = true}},
      {"a cap and a window", {.queries = 40, .keys = 47}, {.left = 8, .right = 5, .softcap = 2.0f}},
      {"loud scores under a low cap", {.queries = 13, .keys = 39}, {.softcap = 0.5f}, {.scale = 0.4f}, 12.0},
      {"scores of hundreds under a cap of 30", {.queries = 21, .keys = 21}, {.left = 12, .softcap = 30.0f}, {.causal = true}, 60.0},
      {"a negative scale under a cap", {.queries = 13, .keys = 21}, {.softcap = 1.0f}, {.scale = -0.7f}},
      {"a cap far above the scores", {.queries = 13, .keys = 21}, {.softcap = 50.0f}},
      {"a scale and a window", {.queries = 20, .keys = 28}, {.left = 7, .right = 2}, {.scale = 0.6f}},
      {"every tensor lies otherwise", {.batch = 2, .heads = 3, .kv_heads = 3, .queries = 20, .keys = 23}, {.left = 6}, {.causal = true, .layouts = MIXED}},
      {"every tensor lies otherwise, a cap", {.batch = 2, .heads = 2, .kv_heads = 2, .queries = 23, .keys = 20}, {.left = 9, .right = 4, .softcap = 1.0f}, {.layouts = MIXED_OTHERWISE}},
      {"width 64", {.heads = 2, .kv_heads = 2, .queries = 37, .keys = 41, .width = 64}, {.left = 11, .right = 6, .softcap = 3.0f}},
      {"width 128", {.queries = 19, .keys = 35, .width = 128}, {.left = 8}, {.causal = true}},
      {"width 32", {.queries = 35, .keys = 19, .width = 32}, {.left = 4, .softcap = 1.2f}, {.causal = true}},
      {"one query", {.queries = 1, .keys = 40}, {.left = 10}},
      {"no key at all", {.queries = 5, .keys = 0}, {.left = 2, .right = 2}},
      {"no query at all", {.queries = 0, .keys = 5}, {.left = 2, .right = 2}},
      {"right further than there are keys", {.queries = 60, .keys = 7}, {.left = 3, .right = 40}},
      {"left further than there are queries", {.queries = 7, .keys = 60}, {.left = 40, .right = 3}},
      {"width 128 under a cap", {.queries = 9, .keys = 20, .width = 128}, {.left = 6, .softcap = 1.5f}},
      {"width 64 without a cap", {.queries = 21, .keys = 19, .width = 64}, {.left = 5, .right = 3}},
      {"width 32 without a cap", {.queries = 21, .keys = 25, .width = 32}, {.left = 7}, {.causal = true}},
    };
    for (std::size_t i = 0; i < cases.size(); ++i) cases[i].number = static_cast<int>(i) + 1;
    return cases;
  }();
  return list;
}
// clang-format on

std::vector<int> numbers_of_cases() {
  std::vector<int> numbers;
  for (const WindowCase& c : window_cases()) numbers.push_back(c.number);
  return numbers;
}

// ---- Recognition ----------------------------------------------------------------------------------------------------

bool within(const Array& got, const Array& want, const Bound& bound) {
  for (std::size_t i = 0; i < want.count(); ++i) {
    const double allowed = bound.relative * bound.magnitude.values[i] + 1e-30;
    if (got.values[i] != want.values[i] && !(std::abs(got.values[i] - want.values[i]) <= allowed)) return false;
  }
  return true;
}

// Of the answers that are there the first that is wrong, or else the last: a mistake shows itself by the same numbers
// in the CPU path and in the kernels. Nothing if neither is there yet.
template <typename Problem, typename Run, typename IsRight>
std::optional<std::vector<Array>> first_wrong(const std::vector<Call<Problem>>& calls, const Run& run,
                                              const IsRight& is_right) {
  std::optional<std::vector<Array>> outputs;
  for (const Call<Problem>& call : calls) {
    try {
      outputs = run(call);
    } catch (const NotImplemented&) {
      continue;
    }
    if (!is_right(*outputs)) break;
  }
  return outputs;
}

// Numbers are judged, and recognised, in the fast executable. What is not there yet is taken for right.
const Recognise recognise_sliding_window(numbers_of_cases(), [](int number) -> std::vector<Array> {
  if (kernels_are_checked()) throw NotImplemented(__FILE__);
  const WindowCase& c = window_cases().at(static_cast<std::size_t>(number) - 1);
  const Inputs in = c.inputs();
  CallOptions options = c.options;
  options.judge = false;
  options.deterministic = true;
  const ExpectedForward ahead = expected_forward<float>(in, options, through(c.window));
  const ExpectedBackward<float> back = expected_backward<float>(in, options, through(c.window));
  const ExpectedGradients& want = back.gradients.want;

  const auto forward_outputs = first_wrong(
      forwards(c.window),
      [&](const Forward& call) {
        const ForwardAnswer got = forward(call, in, options);
        return std::vector<Array>{got.output, got.lse};
      },
      [&](const std::vector<Array>& got) {
        return within(got[0], ahead.exact.output, ahead.output_bound) &&
               within(got[1], ahead.exact.lse, ahead.lse_bound);
      });
  const auto backward_outputs = first_wrong(
      backwards(c.window),
      [&](const Backward& call) {
        const Gradients got = backward(call, in, back.forward, options);
        return std::vector<Array>{got.query, got.key, got.value};
      },
      [&](const std::vector<Array>& got) {
        return within(got[0], want.query, want.query_bound) && within(got[1], want.key, want.key_bound) &&
               within(got[2], want.value, want.value_bound);
      });
  if (!forward_outputs && !backward_outputs) throw NotImplemented(__FILE__);
  std::vector<Array> outputs = forward_outputs.value_or(std::vector<Array>{ahead.exact.output, ahead.exact.lse});
  for (const Array& gradient : backward_outputs.value_or(std::vector<Array>{want.query, want.key, want.value})) {
    outputs.push_back(gradient);
  }
  return outputs;
});

// ---- Probes ---------------------------------------------------------------------------------------------------------

struct Look {
  Index queries, keys;
  std::optional<Index> left, right;
  bool causal = false;

  bool sees(Index i, Index j) const {
    const Index place = i + keys - queries;
    return (!causal || j <= place) && (!left || j >= place - *left) && (!right || j <= place + *right);
  }
  Window window(float softcap = 0.0f) const { return {.left = left, .right = right, .softcap = softcap}; }
  Sizes sizes() const { return {.queries = queries, .keys = keys}; }
};

// Place s as two unit vectors: which place it has in its group of 8, and which group of 8 it is in.
double code(Index s, Index d) { return d == s % 8 || d == 8 + s / 8 % 8 ? 1.0 : 0.0; }

// With a query of 0, a query that sees n keys gives each the weight 1/n and has the lse log(n): its output lists them.
bool expect_even_shares(const Look& look, float softcap = 0.0f) {
  const Inputs in = filled_inputs<float>(
      look.sizes(), everywhere(0), noise(3), [](Index, Index, Index s, Index d) { return code(s, d); }, everywhere(0));
  Array output{{1, 1, look.queries, 16}, {}}, lse{{1, 1, look.queries}, {}};
  for (Index i = 0; i < look.queries; ++i) {
    std::array<double, 16> shares{};
    double seen = 0.0;
    for (Index j = 0; j < look.keys; ++j) {
      if (!look.sees(i, j)) continue;
      ++seen;
      for (Index d = 0; d < 16; ++d) shares[static_cast<std::size_t>(d)] += code(j, d);
    }
    for (const double share : shares) output.values.push_back(seen > 0.0 ? share / seen : 0.0);
    lse.values.push_back(std::log(seen));
  }
  const CallOptions options{.causal = look.causal};
  for (const Forward& call : forwards(look.window(softcap))) {
    const ForwardAnswer got = forward(call, in, options);
    const bool same = expect_close("output", got.output, output, fp32_bound(output, 0.0), QUERY_AXES);
    if (expect_close("lse", got.lse, lse, lse_bound(lse, 0.0), LSE_AXES) && same) continue;
    return not_so(call, in, look.window(softcap), options);
  }
  return true;
}

// The same on the way back: dV lists the queries that came, and so does dQ the keys, since the values make dP +-1.
bool expect_even_shares_back(const Look& look) {
  const auto coded = [](Index, Index, Index s, Index d) { return code(s, d); };
  const auto sign = [](Index, Index, Index s, Index d) { return d < 8 ? 1.0 - 2.0 * static_cast<double>(s % 2) : 0.0; };
  const Inputs in = filled_inputs<float>(look.sizes(), everywhere(0), coded, sign, coded);
  return expect_backward_right(in, look.window(), {.causal = look.causal, .scale = 1.0f});
}

// In every head the same numbers.
Inputs equal_heads(Index heads, Index queries, Index keys, unsigned seed) {
  const auto same = [](const Fill& fill) -> Fill {
    return [fill](Index, Index, Index s, Index d) { return fill(0, 0, s, d); };
  };
  return filled_inputs<float>({.heads = heads, .kv_heads = heads, .queries = queries, .keys = keys}, same(noise(seed)),
                              same(noise(seed + 1)), same(noise(seed + 2)), same(noise(seed + 3)));
}

// Row s of head h of [1, H, S, ...].
Array row_of(const Array& all, Index h, Index s) {
  Array head = head_of(all, 0, h);
  const Index width = head.shape.size() > 1 ? head.shape[1] : 1;
  const auto begin = head.values.begin() + s * width;
  return {{width}, {begin, begin + width}};
}

constexpr std::array<float, 3> POISONS{-3e4f, INF, NOT_A_NUMBER};

std::string poison(Index h) { return std::to_string(POISONS[static_cast<std::size_t>(h) - 1]); }

void poison_row(Tensor<float, 4>& tensor, Index h, Index s) {
  for (Index d = 0; d < tensor.size(3); ++d) tensor(0, h, s, d) = POISONS[static_cast<std::size_t>(h) - 1];
}

// Each of `gradients` bit by bit as in head 0, in those rows that `concerned` does not name.
bool expect_others_same(const Gradients& got, Index h, const std::function<bool(Index)>& query_concerned,
                        const std::function<bool(Index)>& key_concerned, const std::string& when) {
  for (Index i = 0; i < got.query.shape[2]; ++i) {
    if (query_concerned(i)) continue;
    const std::string why = "of query " + std::to_string(i) + when;
    if (!expect_same_bits("d_query", row_of(got.query, h, i), row_of(got.query, 0, i), {"channel"}, why)) return false;
  }
  for (Index j = 0; j < got.key.shape[2]; ++j) {
    if (key_concerned(j)) continue;
    const std::string why = "of key " + std::to_string(j) + when;
    if (!expect_same_bits("d_key", row_of(got.key, h, j), row_of(got.key, 0, j), {"channel"}, why) ||
        !expect_same_bits("d_value", row_of(got.value, h, j), row_of(got.value, 0, j), {"channel"}, why)) {
      return false;
    }
  }
  return true;
}

const std::vector<Look> BANDS{{40, 40, 6, 3}, {20, 53, 9, 2}, {53, 20, 4, 5}};

// ---- TwoLengths -----------------------------------------------------------------------------------------------------

// With left and right 0 a query has one key and a key one query: twice the tokens, twice the bytes. Whoever reads the
// tiles on either side as well loads about four times as much.
struct TwoLengths {
  std::vector<KernelProfile> once, twice;

  template <typename Count>
  explicit TwoLengths(const Count& profiles_of) {
    const Index tokens = kernels_are_checked() ? 256 : 1;  // without a check nobody counts
    once = profiles_of(tokens);
    twice = profiles_of(2 * tokens);
  }

  void expect_proportional(const char* name) const {
    const Index some = bytes_loaded(once, name), more = bytes_loaded(twice, name);
    expect(some > 0 && static_cast<double>(more) <= 2.3 * static_cast<double>(some), name,
           "tiles loaded for nobody: " + std::to_string(more) + " bytes for 512 queries and keys, " +
               std::to_string(some) + " for 256, with left and right 0; want twice as many and not more");
  }
};

// ---- Bad arguments --------------------------------------------------------------------------------------------------

// For each answer: what it says to a window that is none, and to problems that are none.
template <typename Problem, typename Calls, typename Run>
void expect_bad_arguments_refused(const Calls& calls, const Run& run) {
  const auto refused = [&](const char* what, const char* argument, const Window& window) {
    for (const Call<Problem>& call : calls(window)) expect_rejected(what, argument, [&] { run(call); });
  };
  refused("a left of -1", "left", {.left = -1, .right = 3});
  refused("a right of -1", "right", {.left = 3, .right = -1});
  refused("a right of -1 without a left", "right", {.right = -1});
  refused("a softcap of -1", "softcap", {.softcap = -1.0f});
  refused("a softcap that is NaN", "softcap", {.softcap = NOT_A_NUMBER});
  refused("a softcap that is infinite", "softcap", {.softcap = INF});

  const auto broken = [&](const char* what, const char* argument, const std::function<void(Problem&)>& change) {
    for (Call<Problem> call : calls(Window{.left = 2})) {
      const auto launch = call.launch;
      call.launch = [&](const Problem& good) {
        Problem bad = good;
        change(bad);
        launch(bad);
      };
      expect_rejected(what, argument, [&] { run(call); });
    }
  };
  broken("a scale that is NaN", "scale", [](Problem& p) { p.scale = NOT_A_NUMBER; });
  broken("a width of 8", "query", [](Problem& p) {
    p.query = View<const float, 4>(p.query.data(), {1, 2, 5, 8}, p.query.strides());
  });
  broken("a value too few", "value", [](Problem& p) {
    p.value = View<const float, 4>(p.value.data(), {1, 2, 6, 16}, p.value.strides());
  });
  broken("keys of fewer heads", "key", [](Problem& p) {
    p.key = View<const float, 4>(p.key.data(), {1, 1, 7, 16}, p.key.strides());
  });
  broken("queries with a gap between channels", "query", [](Problem& p) {
    p.query = View<const float, 4>(p.query.data(), {1, 2, 5, 16}, {160, 80, 1, 5});
  });
}

const Inputs& small() {
  static const Inputs in = random_inputs<float>({.heads = 2, .kv_heads = 2, .queries = 5, .keys = 7}, 9);
  return in;
}

}  // namespace

TEST_SUITE("phase4.04_sliding_window") {
  // The README's example: only channel 0 is not 0. softcap 5 makes 3 of 5 ln 2 and 4 of 5 ln 3.
  const Window ON_THE_PAGE{.left = 1, .right = 0, .softcap = 5.0f};
  Inputs on_the_page() {
    const auto column = [](std::array<double, 4> numbers) -> Fill {
      return [numbers](Index, Index, Index s, Index d) { return d == 0 ? numbers[static_cast<std::size_t>(s)] : 0.0; };
    };
    return filled_inputs<float>({.queries = 2, .keys = 4}, column({1, 1, 0, 0}),
                                column({9, 0, 5 * std::log(2.0), 5 * std::log(3.0)}), column({100, 8, 0, 4}),
                                column({1, 1, 0, 0}));
  }

  TEST_CASE("two queries and four keys as on the page") {
    ask("At which place among the keys does query 0 stand? So which two does it see, and what are their scores under "
        "the lid?");
    for (const Forward& call : forwards(ON_THE_PAGE)) {
      const ForwardAnswer got = forward(call, on_the_page(), {.scale = 1.0f});
      const Array output{{2}, {got.output.values[0], got.output.values[16]}};
      const Array size{{2}, {8.0, 8.0}};
      const bool lse = expect_close("lse", Array{{2}, got.lse.values}, {{2}, {3.048587, 4.313262}},
                                    {1e-5, {{2}, {1.0, 1.0}}}, {"query"});
      if (expect_close("output", output, {{2}, {0.379407, 2.924234}}, {1e-5, size}, {"query"}) && lse) continue;
      not_so(call, on_the_page(), ON_THE_PAGE);
      return;
    }
  }

  TEST_CASE("the way back of two queries and four keys as on the page") {
    ask("The page has every number on the way. Which is the first of yours that differs: the weight, dP, delta, or "
        "what the lid's slope makes of dS?");
    const ForwardResult ahead = expected_forward<float>(on_the_page(), {.scale = 1.0f}, through(ON_THE_PAGE)).exact;
    for (const Backward& call : backwards(ON_THE_PAGE)) {
      for (const bool deterministic : {false, true}) {
        const CallOptions options{.scale = 1.0f, .deterministic = deterministic};
        const Gradients got = backward(call, on_the_page(), ahead, options);
        const auto column = [](const Array& all) {
          Array numbers{{all.shape[2]}, {}};
          for (std::size_t i = 0; i < all.count(); i += 16) numbers.values.push_back(all.values[i]);
          return numbers;
        };
        const auto close = [&](const char* name, const Array& all, const std::vector<double>& want, const char* axis) {
          const Array size{{static_cast<Index>(want.size())}, std::vector<double>(want.size(), 8.0)};
          return expect_close(name, column(all), {size.shape, want}, {1e-5, size}, {axis});
        };
        const bool value = close("d_value", got.value, {0.0, 0.047426, 1.221516, 0.731059}, "key");
        const bool key = close("d_key", got.key, {0.0, 0.361413, -0.734631, 0.283121}, "key");
        if (close("d_query", got.query, {-0.801640, -0.189195}, "query") && key && value) continue;
        not_so(call, on_the_page(), ON_THE_PAGE, options);
        return;
      }
    }
  }

  TEST_CASE("a query of 0 shares evenly among the keys of its window") {
    ask("exp(lse) counts the keys that a query saw, and its output lists them. Where does query i stand when there are "
        "more keys than queries, and is the key at the window's very end in it?");
    for (const Look& look :
         std::vector<Look>{{1, 1, 0, 0},     {5, 5, 0, 0},     {5, 5, 1, 0},     {5, 5, 0, 1},     {9, 9, 2, 3},
                           {33, 33, 16, 0},  {33, 33, 15, 1},  {65, 65, 31, 32}, {65, 65, 32, 33}, {20, 37, 4, 3},
                           {37, 20, 4, 3},   {100, 30, 12, 8}, {30, 100, 12, 8}, {3, 130, 64, 1},  {130, 3, 64, 1},
                           {66, 130, 63, 0}, {129, 65, 1, 17}, {97, 97, 96, 96}, {97, 97, 95, 95}, {128, 128, 2, 2}}) {
      if (kernels_are_checked() && look.queries * look.keys > 8000) continue;
      if (!expect_even_shares(look)) return;
    }
  }

  TEST_CASE("a window may be open on either side and a causal mask closes the right one") {
    ask("No limit is not a limit of 0, and 0 is not no limit: what does each of them let a query see? And of two "
        "limits on one side, which one counts?");
    constexpr std::nullopt_t OPEN = std::nullopt;
    for (const Look& look : std::vector<Look>{{17, 17, 3, OPEN},
                                              {17, 17, OPEN, 3},
                                              {17, 17, 0, OPEN},
                                              {17, 17, OPEN, 0},
                                              {20, 41, 0, OPEN},
                                              {41, 20, OPEN, 0},
                                              {41, 20, 5, OPEN},
                                              {20, 70, OPEN, 5},
                                              {17, 17, OPEN, OPEN},
                                              {17, 17, 3, OPEN, true},
                                              {17, 17, 3, 5, true},
                                              {17, 17, OPEN, 5, true},
                                              {17, 17, OPEN, 0, true},
                                              {17, 17, 0, OPEN, true},
                                              {20, 70, 8, 3, true},
                                              {70, 20, 8, 3, true},
                                              {66, 66, 40, OPEN, true}}) {
      if (!expect_even_shares(look)) return;
    }
  }

  TEST_CASE("a window larger than everything is no window") {
    ask("A window of 2^62 is allowed. In what type do you hold it, and what happens when you add it to a place?");
    const Inputs& in = small();
    for (const Index size : {Index{12}, Index{1} << 31, (Index{1} << 32) + 1, std::numeric_limits<Index>::max()}) {
      for (const Window& window : {Window{.left = size, .right = size}, {.left = size}, {.right = size}}) {
        if (!expect_forward_right(in, window)) return;
        if (!expect_backward_right(in, window, {.causal = true})) return;
      }
    }
  }

  TEST_CASE("a cap keeps every score between minus c and c") {
    ask("tanh never leaves the interval from -1 to 1. How far apart can two capped scores be? And what does your tanh "
        "make of 1000?");
    for (const float cap : {0.5f, 2.0f, 20.0f}) {
      for (const double score : {0.3, 3.0, 50.0, 3e3, 1e30}) {
        // Three keys with the scores -s, 0 and s.
        const Inputs in = filled_inputs<float>(
            {.queries = 1, .keys = 3}, [&](Index, Index, Index, Index d) { return d == 0 ? std::sqrt(score) : 0.0; },
            [&](Index, Index, Index s, Index d) {
              return d == 0 ? std::sqrt(score) * static_cast<double>(s - 1) : 0.0;
            },
            [](Index, Index, Index s, Index d) { return s == d ? 1.0 : 0.0; }, everywhere(0));
        const double root = static_cast<double>(static_cast<float>(std::sqrt(score)));
        const double high = static_cast<double>(cap) * std::tanh(root * root / static_cast<double>(cap));
        const double sum = std::exp(high) + 1.0 + std::exp(-high);
        Array output{{1, 1, 1, 16}, std::vector<double>(16, 0.0)};
        for (std::size_t j = 0; j < 3; ++j) output.values[j] = std::exp((static_cast<double>(j) - 1.0) * high) / sum;
        const Array lse{{1, 1, 1}, {std::log(sum)}};
        const Window window{.softcap = cap};
        for (const Forward& call : forwards(window)) {
          const ForwardAnswer got = forward(call, in, {.scale = 1.0f});
          const bool same = expect_close("output", got.output, output, fp32_bound(output, 50.0), QUERY_AXES);
          if (expect_close("lse", got.lse, lse, lse_bound(lse, 50.0), LSE_AXES) && same) continue;
          finding("scores", std::to_string(-score) + ", 0 and " + std::to_string(score));
          not_so(call, in, window);
          return;
        }
      }
    }
  }

  TEST_CASE("what lies outside of the window stays outside under a cap") {
    ask("What is c tanh(-inf / c)? Has the key that you forbade still no weight after that?");
    for (const Look& look : std::vector<Look>{{17, 17, 3, 2}, {20, 37, 4, 3}, {37, 20, 4, 3}, {70, 70, 9, 0}}) {
      for (const float cap : {0.25f, 4.0f}) {
        if (!expect_even_shares(look, cap)) return;
      }
    }
    if (!expect_even_shares({17, 19, std::nullopt, std::nullopt}, 0.25f)) return;
    expect_even_shares({17, 19, std::nullopt, std::nullopt, true}, 0.25f);
  }

  TEST_CASE("a key hears from the queries whose window it is in and from no other") {
    ask("Turn the picture round. For a tile of keys: which is the first query that sees one of them, and which is the "
        "last? On which side of a key do the queries stand that left lets in?");
    constexpr std::nullopt_t OPEN = std::nullopt;
    for (const Look& look : std::vector<Look>{{5, 5, 0, 0},
                                              {5, 5, 1, 0},
                                              {5, 5, 0, 1},
                                              {33, 33, 16, 0},
                                              {65, 65, 31, 32},
                                              {20, 37, 4, 3},
                                              {37, 20, 4, 3},
                                              {100, 30, 12, 8},
                                              {30, 100, 12, 8},
                                              {130, 3, 64, 1},
                                              {3, 130, 64, 1},
                                              {17, 17, 3, OPEN},
                                              {17, 17, OPEN, 3},
                                              {41, 20, OPEN, 0},
                                              {20, 41, 0, OPEN},
                                              {17, 17, 3, 5, true},
                                              {20, 70, 8, 3, true},
                                              {70, 20, 8, OPEN, true},
                                              {97, 97, 64, OPEN, true},
                                              {128, 128, 2, 2}}) {
      if (kernels_are_checked() && look.queries * look.keys > 4000) continue;
      if (!expect_even_shares_back(look)) return;
    }
  }

  TEST_CASE("a score at the lid moves nothing") {
    ask("Draw c tanh(s / c). How steep is it far out? So what can a small change of a key do to a score that is there "
        "already?");
    const Window window{.left = 5, .softcap = 1.5f};
    const auto high = [](Index, Index, Index s, Index d) { return d == 0 ? (s % 2 == 0 ? 200.0 : -200.0) : 0.0; };
    const Inputs in = filled_inputs<float>({.queries = 9, .keys = 9}, high, high, noise(6), noise(7));
    if (!expect_backward_right(in, window, {.causal = true, .scale = 1.0f})) return;
    const ForwardResult ahead = expected_forward<float>(in, {.causal = true, .scale = 1.0f}, through(window)).exact;
    for (const Backward& call : backwards(window)) {
      const Gradients got = backward(call, in, ahead, {.causal = true, .scale = 1.0f});
      const char* const why = "every score is at the lid, so every element should be";
      if (!expect_all("d_query", got.query, 0.0, 1e-3, QUERY_AXES, why)) return;
      if (!expect_all("d_key", got.key, 0.0, 1e-3, KEY_AXES, why)) return;
    }
  }

  TEST_CASE("what lies on either side of the window cannot move an output") {
    ask("A key in the same tile, but outside of this query's window, holds NaN. Which line of yours multiplies it, and "
        "is 0 times NaN 0?");
    for (const Look& look : BANDS) {
      if (kernels_are_checked() && look.queries == 40) continue;
      for (const Index place : {look.keys / 2, Index{3}, look.keys - 2}) {
        Inputs in = equal_heads(4, look.queries, look.keys, 20);
        for (Index h = 1; h < 4; ++h) {
          poison_row(in.key, h, place);
          poison_row(in.value, h, place);
        }
        for (const Forward& call : forwards(look.window(look.queries == 20 ? 1.0f : 0.0f))) {
          const ForwardAnswer got = forward(call, in);
          for (Index h = 1; h < 4; ++h) {
            for (Index i = 0; i < look.queries; ++i) {
              if (look.sees(i, place)) continue;
              const std::string why = "of query " + std::to_string(i) + " when key " + std::to_string(place) +
                                      ", which it may not see, became " + poison(h);
              if (expect_same_bits("output", row_of(got.output, h, i), row_of(got.output, 0, i), {"channel"}, why) &&
                  expect_same_bits("lse", row_of(got.lse, h, i), row_of(got.lse, 0, i), {"query"}, why)) {
                continue;
              }
              not_so(call, in, look.window());
              return;
            }
          }
        }
      }
    }
  }

  TEST_CASE("what lies on either side of the window cannot move a gradient") {
    ask("A key and a query that do not see each other, and one of them holds NaN. In which of dQ, dK and dV does your "
        "product over the tile let the other one feel it?");
    for (const Look& look : BANDS) {
      if (kernels_are_checked() && look.queries != 53) continue;
      const Window window = look.window(look.queries == 20 ? 1.0f : 0.0f);
      const Inputs clean = equal_heads(4, look.queries, look.keys, 30);
      const ForwardResult ahead = expected_forward<float>(clean, {}, through(window)).exact;
      for (const Index which : {0, 1, 2}) {  // a key, a value, a query and its dO
        Inputs in = copy_of(clean);
        const Index place = which == 2 ? look.queries - 4 : look.keys / 2;
        for (Index h = 1; h < 4; ++h) {
          if (which < 2) poison_row(which == 0 ? in.key : in.value, h, place);
          if (which == 2) poison_row(in.query, h, place), poison_row(in.d_output, h, place);
        }
        for (const Backward& call : backwards(window)) {
          const Gradients got = backward(call, in, ahead, {.deterministic = true});
          for (Index h = 1; h < 4; ++h) {
            const std::string when = std::string(" when ") +
                                     (which == 0   ? "key "
                                      : which == 1 ? "the value of key "
                                                   : "query (and its d_output) ") +
                                     std::to_string(place) + " became " + poison(h);
            const auto query_concerned = [&](Index i) { return which == 2 ? i == place : look.sees(i, place); };
            // With delta from the weights and dP, as it may be, a query that sees the key changes for all its keys.
            const auto key_concerned = [&](Index j) {
              if (which == 2) return look.sees(place, j);
              for (Index i = 0; i < look.queries; ++i) {
                if (look.sees(i, place) && look.sees(i, j)) return true;
              }
              return j == place;
            };
            if (expect_others_same(got, h, query_concerned, key_concerned, when)) continue;
            not_so(call, in, window);
            return;
          }
        }
      }
    }
  }

  TEST_CASE("a query that sees nothing and a key that nobody sees are left in peace") {
    ask("Sq > Sk: where do the first queries stand? Which tiles does a block visit in which nobody sees anything, who "
        "writes its rows, and what is -inf minus -inf?");
    for (const Look& look : std::vector<Look>{{9, 4, 0, 0},
                                              {70, 3, 5, 1},
                                              {140, 7, 3, 0},
                                              {5, 100, 2, 2},
                                              {40, 33, 6, 2, true},
                                              {4, 0, 1, 1},
                                              {0, 5, 1, 1},
                                              {3, 150, 0, 0}}) {
      Inputs in = random_inputs<float>(look.sizes(), 8);
      std::vector<bool> seen(static_cast<std::size_t>(look.keys), false);
      for (Index i = 0; i < look.queries; ++i) {
        bool blind = true;
        for (Index j = 0; j < look.keys; ++j) {
          if (!look.sees(i, j)) continue;
          seen[static_cast<std::size_t>(j)] = true;
          blind = false;
        }
        for (Index d = 0; blind && d < 16; ++d) in.query(0, 0, i, d) = in.d_output(0, 0, i, d) = NOT_A_NUMBER;
      }
      for (Index j = 0; j < look.keys; ++j) {
        const bool nobody = !seen[static_cast<std::size_t>(j)];
        for (Index d = 0; nobody && d < 16; ++d) in.key(0, 0, j, d) = in.value(0, 0, j, d) = NOT_A_NUMBER;
      }
      for (const float cap : {0.0f, 1.0f}) {
        if (!expect_forward_right(in, look.window(cap), {.causal = look.causal})) return;
        if (!expect_backward_right(in, look.window(cap), {.causal = look.causal})) return;
      }
    }
  }

  TEST_CASE("the same inputs give the same bits whatever order the blocks run in") {
    ask("Twice the same call, with the blocks in another order. Which of your sums depends on who comes first, "
        "although "
        "it was told not to?");
    const Window window{.left = 20, .right = 8, .softcap = 4.0f};
    const Inputs in = random_inputs<float>({.queries = 70, .keys = 150}, 11);
    const ForwardResult ahead = expected_forward<float>(in, {}, through(window)).exact;
    for (const Forward& call : forwards(window)) {
      const ForwardAnswer want = forward(call, in);
      const AnotherOrder order(1);
      if (!expect_same(forward(call, in), want, "in another order")) return;
    }
    for (const Backward& call : backwards(window)) {
      const Gradients want = backward(call, in, ahead, {.deterministic = true});
      for (const std::uint64_t seed : {1u, 2u}) {
        if (kernels_are_checked() && seed > 1) continue;
        const AnotherOrder order(seed);
        if (!testing::expect_same(backward(call, in, ahead, {.deterministic = true}), want, "in another order")) return;
      }
    }
  }

  TEST_CASE("tiles of keys outside of the window are not even read") {
    ask("Left of the window lie whole tiles that none of a block's queries sees, and right of it others. Which is the "
        "first tile worth loading, and which the last? Whose window decides each?");
    if (needs_a_check()) return;
    const Forward call = forwards({.left = 0, .right = 0}).back();
    const TwoLengths traffic([&](Index tokens) {
      return forward(call, random_inputs<float>({.queries = tokens, .keys = tokens}, 12)).profiles;
    });
    if (!kernels_are_judged()) return;
    for (const char* name : {"key", "value"}) traffic.expect_proportional(name);
  }

  TEST_CASE("tiles of queries outside of the window are not even read") {
    ask("For a block's keys: which tile of queries is the first that sees one of them, and which is the last? A causal "
        "mask needed no last one.");
    if (needs_a_check()) return;
    const Window window{.left = 0, .right = 0};
    const Backward call = backwards(window).back();
    const TwoLengths traffic([&](Index tokens) {
      const Inputs in = random_inputs<float>({.queries = tokens, .keys = tokens}, 13);
      const ForwardResult ahead = expected_forward<float>(in, {}, through(window)).exact;
      return backward(call, in, ahead, {.deterministic = true}).profiles;
    });
    if (!kernels_are_judged()) return;
    for (const char* name : {"query", "d_output", "key", "value"}) traffic.expect_proportional(name);
  }

  TEST_CASE("agrees with the float64 reference") {
    for (const WindowCase& c : window_cases()) {
      run_case(c.number, c.text(), [&] { expect_forward_right(c.inputs(), c.window, c.options); });
    }
  }

  TEST_CASE("the gradients agree with the float64 reference") {
    for (const WindowCase& c : window_cases()) {
      if (kernels_are_checked() && c.sizes.queries * c.sizes.keys > 3000) continue;
      run_case(c.number, c.text(), [&] { expect_backward_right(c.inputs(), c.window, c.options); });
    }
  }

  TEST_CASE("agrees with the float64 reference at 1024 and 2048") {
    const Window near{.left = 3, .softcap = 2.0f};
    if (needs_a_gpu([&] { return expect_forward_right(small(), near) && expect_backward_right(small(), near); }))
      return;
    for (const auto& [sizes, window, causal] : std::vector<std::tuple<Sizes, Window, bool>>{
             {{.heads = 2, .kv_heads = 2, .queries = 2048, .keys = 2048, .width = 64}, {.left = 256}, true},
             {{.queries = 1023, .keys = 2000, .width = 128}, {.left = 100, .right = 77, .softcap = 20.0f}, false},
             {{.queries = 1500, .keys = 700, .width = 32}, {.left = 333}, false},
             {{.batch = 2, .queries = 1024, .keys = 1024, .width = 16}, {.softcap = 1.0f}, true}}) {
      const Inputs in = random_inputs<float>(sizes, 14);
      if (!expect_forward_right(in, window, {.causal = causal})) return;
      if (!expect_backward_right(in, window, {.causal = causal})) return;
    }
  }

  TEST_CASE("says what is wrong with bad arguments") {
    const Window good{.left = 2};
    if (!expect_forward_right(small(), good) || !expect_backward_right(small(), good)) return;
    const ForwardResult ahead = expected_forward<float>(small(), {}, through(good)).exact;
    expect_bad_arguments_refused<FlashForward<float>>(forwards, [](const Forward& call) { forward(call, small()); });
    expect_bad_arguments_refused<FlashBackward<float>>(backwards,
                                                       [&](const Backward& call) { backward(call, small(), ahead); });
  }
}
