#include "flash_forward.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "common/testing/device_tensor.hpp"
#include "common/testing/flash_cases.hpp"
#include "common/testing/kernel.hpp"
#include "common/virtual_gpu/findings.hpp"
#include "phase2_forward/suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
const Axes OUTPUT = {"batch", "head", "query", "channel"};
const Axes LSE = {"batch", "head", "query"};

// ---- Calls ----------------------------------------------------------------------------------------------------------

struct Options {
  bool causal = false;
  std::optional<float> scale = {};
  Layouts layouts = {};
};

struct Answer {
  Array output;  // [B, H, Sq, D]
  Array lse;     // [B, H, Sq]
  std::vector<KernelProfile> profiles;
};

Answer call(const View<const float, 4>& query, const View<const float, 4>& key, const View<const float, 4>& value,
            const Options& options, bool judge = true) {
  using Tensor = DeviceTensor<float>;
  const Layouts& layouts = options.layouts;
  Tensor q = Tensor::input("query", query, layouts.query);
  Tensor k = Tensor::input("key", key, layouts.key);
  Tensor v = Tensor::input("value", value, layouts.value);
  Tensor o = Tensor::output("output", query.shape(), layouts.output);
  // One number a row; in the layouts of tokens the rows of two heads are neighbours.
  Tensor l = Tensor::output("lse", {query.size(0), query.size(1), query.size(2), 1},
                            layouts.output == Layout::heads_apart ? Layout::heads : layouts.output);
  const FlashForward<float> problem{
      .query = q.view(),
      .key = k.view(),
      .value = v.view(),
      .output = o.view(),
      .lse = l.rows(),
      .causal = options.causal,
      .scale = options.scale,
  };
  Answer answer;
  if (judge) {
    const std::size_t memory = device_bytes();
    reset_peak_device_bytes();
    answer.profiles = run_kernels([&] { flash_forward(problem); });
    expect(peak_device_bytes() == memory, "memory",
           std::to_string(peak_device_bytes() - memory) + " bytes on the GPU beyond the arguments; want none");
  } else {
    flash_forward(problem);
    synchronize();
  }
  answer.output = o.values(judge);
  answer.lse = l.values(judge);
  answer.lse.shape.pop_back();
  if (judge) {
    for (const Tensor* input : {&q, &k, &v}) input->expect_unchanged();
  }
  return answer;
}

Answer call(const AttentionInputs& inputs, const FlashCase& c, bool judge = true) {
  return call(inputs.query.heads(), inputs.key.heads(), inputs.value.heads(),
              {.causal = c.problem.causal, .scale = c.problem.scale, .layouts = c.layouts}, judge);
}

// Numbers are judged, and recognised, in the fast executable.
const Recognise recognise_flash_forward(numbers(flash_cases()), [](int number) -> std::vector<Array> {
  if (kernels_are_checked()) throw NotImplemented(__FILE__);
  const FlashCase& c = flash_cases().at(static_cast<std::size_t>(number) - 1);
  const AttentionInputs inputs = make_inputs(c.problem);
  const Answer answer = call(inputs, c, /*judge=*/false);
  if (!take_findings().empty()) throw std::runtime_error("a kernel was abandoned");
  return {answer.output, answer.lse};
});

bool expect_attention(const Answer& got, const Expected& want) {
  constexpr double eps = std::numeric_limits<float>::epsilon();
  const double largest_score = (want.output_bound.relative - 1e-5) / (2.0 * eps);
  const bool lse = expect_close("lse", got.lse, want.lse, lse_bound(want.lse, largest_score), LSE);
  return expect_close("output", got.output, want.output, want.output_bound, OUTPUT) && lse;
}

bool expect_same(const Answer& got, const Answer& want, const std::string& why) {
  const bool output = expect_same_bits("output", got.output, want.output, OUTPUT, why);
  return expect_same_bits("lse", got.lse, want.lse, LSE, why) && output;
}

std::string sizes(Index queries, Index keys, bool causal) {
  return std::to_string(queries) + " queries, " + std::to_string(keys) + " keys" + (causal ? ", causal" : "");
}

// With a query of 0, a query that sees n keys gives each the weight 1/n and has the lse log(n). The first 8 channels
// of a value are a unit vector that says which place a key has in its group of 8, the others which group of 8 it is in.
bool expect_even_shares(Index queries, Index keys, bool causal) {
  const Tensor<float, 4> q = filled({1, 1, queries, 16}, 0.0f);
  const Tensor<float, 4> k = normal({1, 1, keys, 16}, 3);
  Tensor<float, 4> v = filled({1, 1, keys, 16}, 0.0f);
  for (Index j = 0; j < keys; ++j) v(0, 0, j, j % 8) = v(0, 0, j, 8 + j / 8 % 8) = 1.0f;
  const Answer got = call(q, k, v, {.causal = causal});

  Array output{{1, 1, queries, 16}, {}};
  Array lse{{1, 1, queries}, {}};
  for (Index i = 0; i < queries; ++i) {
    const Index seen = keys_seen(causal, i, queries, keys);
    std::array<double, 16> share{};
    for (Index j = 0; j < seen; ++j) {
      share[static_cast<std::size_t>(j % 8)] += 1.0 / static_cast<double>(seen);
      share[static_cast<std::size_t>(8 + j / 8 % 8)] += 1.0 / static_cast<double>(seen);
    }
    output.values.insert(output.values.end(), share.begin(), share.end());
    lse.values.push_back(std::log(static_cast<double>(seen)));
  }
  const bool same = expect_close("output", got.output, output, fp32_bound(output, 0.0), OUTPUT);
  if (expect_close("lse", got.lse, lse, lse_bound(lse, 0.0), LSE) && same) return true;
  finding("lengths", sizes(queries, keys, causal));
  return false;
}

// Bytes of K and V that a call with these sizes loads.
struct Traffic {
  Index key, value, shared;
};

Traffic traffic_of(Index queries, Index keys, bool causal) {
  const Answer answer = call(normal({1, 1, queries, 16}, 5), normal({1, 1, keys, 16}, 6), normal({1, 1, keys, 16}, 7),
                             {.causal = causal});
  Traffic traffic{bytes_loaded(answer.profiles, "key"), bytes_loaded(answer.profiles, "value"), 0};
  for (const KernelProfile& profile : answer.profiles) {
    traffic.shared = std::max<Index>(traffic.shared, profile.dynamic_shared_bytes);
  }
  return traffic;
}

bool needs_a_gpu() {
#if KATA_REAL_GPU
  return false;
#else
  if (!expect_even_shares(1, 1, false)) return true;  // nobody should take an unfilled stub for a skipped test
  skip("needs a GPU: too long for the virtual one");
  return true;
#endif
}

// Every head of [batch, heads] holds one of two problems of one head, so the reference has little to do.
void expect_long(Index batch, Index heads, Index queries, Index keys, Index width, bool causal) {
  AttentionCase one{.why = "", .heads = 2, .queries = queries, .keys = keys, .width = width, .value_width = width};
  one.causal = causal;
  one.number = 300;
  const AttentionInputs inputs = make_inputs(one);
  const Expected want = expected(one, inputs);
  const auto from = [&](Index b, Index h) { return (b * heads + h) % 2; };
  const auto spread = [&](const View<const float, 4>& x) { return arranged(x, batch, heads, from); };
  const Answer got =
      call(spread(inputs.query.heads()), spread(inputs.key.heads()), spread(inputs.value.heads()), {.causal = causal});
  for (Index b = 0; b < batch; ++b) {
    for (Index h = 0; h < heads; ++h) {
      const auto part = [&](const Array& all) {
        Array result = head_of(all, b, h);
        result.shape.insert(result.shape.begin(), {1, 1});
        return result;
      };
      const auto wanted = [&](const Array& all) {
        Array result = head_of(all, 0, from(b, h));
        result.shape.insert(result.shape.begin(), {1, 1});
        return result;
      };
      Expected head;
      head.output = wanted(want.output);
      head.lse = wanted(want.lse);
      head.output_bound = {want.output_bound.relative, wanted(want.output_bound.magnitude)};
      if (!expect_attention({part(got.output), part(got.lse), {}}, head)) {
        finding("head", "batch item " + std::to_string(b) + ", head " + std::to_string(h) + ": " +
                            sizes(queries, keys, causal) + ", width " + std::to_string(width));
        return;
      }
    }
  }
}

}  // namespace

TEST_SUITE("phase2.04_flash_forward") {
  TEST_CASE("one query and one key give the value") {
    ask("There is one key, so it has all the weight. What is the maximum, what is the sum, and what is left to "
        "divide?");
    for (const Index width : {16, 32, 64, 128}) {
      const Tensor<float, 4> q = normal({1, 1, 1, width}, 1);
      const Tensor<float, 4> k = normal({1, 1, 1, width}, 2);
      Tensor<float, 4> v({1, 1, 1, width});
      for (Index d = 0; d < width; ++d) v(0, 0, 0, d) = static_cast<float>(d + 1);
      const Answer got = call(q, k, v, {.scale = 0.5f});
      double dot = 0.0;
      for (Index d = 0; d < width; ++d)
        dot += 0.5 * static_cast<double>(q(0, 0, 0, d)) * static_cast<double>(k(0, 0, 0, d));
      const Array lse{{1, 1, 1}, {dot}};
      const Array output = to_array(v);
      if (!expect_close("output", got.output, output, {1e-6, output}, OUTPUT)) return;
      if (!expect_close("lse", got.lse, lse, lse_bound(lse, 8.0), LSE)) return;
    }
  }

  TEST_CASE("a query of 0 shares evenly among the keys that it sees") {
    ask("All scores are 0. How many keys does this query see, and how many are in its sum? exp(lse) counts them for "
        "you.");
    for (const Index keys : {1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129}) {
      if (!expect_even_shares(3, keys, false)) return;
    }
    for (const Index queries : {1, 15, 16, 17, 33, 65, 129}) {
      if (!expect_even_shares(queries, 5, false)) return;
    }
  }

  TEST_CASE("under a causal mask a query sees the keys up to its own place") {
    ask("The last query stands at the last key. In a block's tile of queries, which key is the last that the last of "
        "them sees, which tile holds it, and which keys of that tile does the first of them see?");
    constexpr std::array<std::array<Index, 2>, 13> SIZES{{{1, 1},
                                                          {16, 16},
                                                          {17, 17},
                                                          {33, 33},
                                                          {64, 64},
                                                          {65, 65},
                                                          {20, 37},
                                                          {37, 20},
                                                          {100, 30},
                                                          {40, 90},
                                                          {2, 66},
                                                          {66, 65},
                                                          {97, 97}}};
    for (const auto& [queries, keys] : SIZES) {
      if (!expect_even_shares(queries, keys, true)) return;
    }
  }

  TEST_CASE("a key that matches far better than the others gives its value alone") {
    ask("One score is 60 above the rest. It lies at the edge of a tile: which place does yours miss, and which loop "
        "should have gone there?");
    constexpr std::array<Index, 14> PLACES{0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130};
    const Index keys = 131;
    Tensor<float, 4> q = filled({1, 1, 14, 16}, 0.0f);
    Tensor<float, 4> k = filled({1, 1, keys, 16}, 0.0f);
    Tensor<float, 4> v({1, 1, keys, 16});
    for (Index j = 0; j < keys; ++j) {
      for (Index d = 0; d < 16; ++d) v(0, 0, j, d) = static_cast<float>(16 * j + d + 1);
    }
    Array output{{1, 1, 14, 16}, {}};
    for (Index i = 0; i < 14; ++i) {
      const Index place = PLACES[static_cast<std::size_t>(i)];
      q(0, 0, i, i) = 1.0f;
      k(0, 0, place, i) = 60.0f;
      for (Index d = 0; d < 16; ++d) output.values.push_back(static_cast<double>(16 * place + d + 1));
    }
    const Answer got = call(q, k, v, {.scale = 1.0f});
    expect_close("output", got.output, output, {1e-6, output}, OUTPUT);
    expect_all("lse", got.lse, 60.0, 1e-4, LSE, "one score of 60 is left");
  }

  TEST_CASE("values of one give an output of one") {
    ask("What do the weights of a query add up to? After the last tile, which keys are in the number that you divide "
        "by?");
    for_each<FlashCase>(flash_cases(), [](const FlashCase& c) {
      if (kernels_are_checked() && c.problem.number % 5 != 0) return;  // watched on every case further down
      AttentionInputs inputs = make_inputs(c.problem);
      const View<float, 4> v = inputs.value.heads();
      for (Index b = 0; b < v.size(0); ++b)
        for (Index h = 0; h < v.size(1); ++h) as_matrix(v[b][h]).setOnes();
      const Answer got = call(inputs, c);
      Array want{{c.problem.batch, c.problem.heads, c.problem.queries, c.problem.width}, {}};
      for (Index row = 0; row < c.problem.batch * c.problem.heads * c.problem.queries; ++row) {
        const bool any = keys_seen(c.problem.causal, row % c.problem.queries, c.problem.queries, c.problem.keys) > 0;
        want.values.insert(want.values.end(), static_cast<std::size_t>(c.problem.width), any ? 1.0 : 0.0);
      }
      expect_close("output", got.output, want, {5e-6, want}, OUTPUT);
    });
  }

  TEST_CASE("a query that may attend to nothing has output 0 and an lse of -inf") {
    ask("A block's queries see no key at all. Who writes their rows, and what are the maximum and the sum of nothing?");
    constexpr std::array<std::array<Index, 3>, 6> SIZES{
        {{9, 4, 1}, {4, 0, 0}, {5, 0, 1}, {70, 3, 1}, {140, 7, 1}, {33, 32, 1}}};
    for (const auto& [queries, keys, causal] : SIZES) {
      const Answer got = call(normal({1, 2, queries, 16}, 4), normal({1, 2, keys, 16}, 5), normal({1, 2, keys, 16}, 6),
                              {.causal = causal == 1});
      for (Index h = 0; h < 2; ++h) {
        for (Index i = 0; i < queries; ++i) {
          if (keys_seen(causal == 1, i, queries, keys) > 0) continue;
          const std::string what =
              "query " + std::to_string(i) + " may attend to nothing; " + sizes(queries, keys, causal);
          const std::size_t row = static_cast<std::size_t>(h * queries + i);
          const auto first = got.output.values.begin() + static_cast<std::ptrdiff_t>(row * 16);
          const Array output{{16}, {first, first + 16}};
          if (!expect_all("output", output, 0.0, 0.0, {"channel"}, what)) return;
          const double lse = got.lse.values[row];
          if (!expect(lse == -static_cast<double>(INF), "lse", what + ", got " + std::to_string(lse))) return;
        }
      }
    }
  }

  TEST_CASE("a key that a query may not see cannot move its output") {
    ask("A key that only later queries may see holds NaN. Follow it through shared memory and every line of yours: "
        "where "
        "does it first meet the row of an earlier query?");
    constexpr std::array<float, 5> POISONS{7.5f, -3e4f, INF, -INF, NOT_A_NUMBER};
    for (const auto& [queries, keys] : {std::array<Index, 2>{13, 13}, {11, 37}, {37, 11}}) {
      if (kernels_are_checked() && queries != 11) continue;
      // Head 0 is clean; in head h of batch item b, key places[b] holds poison h - 1.
      const std::array<Index, 3> places{keys / 2, keys - 2, keys - 1};
      const Tensor<float, 4> q0 = normal({1, 1, queries, 16}, 7);
      const Tensor<float, 4> k0 = normal({1, 1, keys, 16}, 8);
      const Tensor<float, 4> v0 = normal({1, 1, keys, 16}, 9);
      const auto first = [](Index, Index) { return Index{0}; };
      const Tensor<float, 4> q = arranged(q0, 3, 6, first);
      Tensor<float, 4> k = arranged(k0, 3, 6, first);
      Tensor<float, 4> v = arranged(v0, 3, 6, first);
      for (Index b = 0; b < 3; ++b) {
        for (Index h = 1; h < 6; ++h) {
          for (Index d = 0; d < 16; ++d) {
            k(b, h, places[static_cast<std::size_t>(b)], d) = v(b, h, places[static_cast<std::size_t>(b)], d) =
                POISONS[static_cast<std::size_t>(h) - 1];
          }
        }
      }
      const Answer got = call(q, k, v, {.causal = true});
      const Array clean = head_of(got.output, 0, 0);
      const Array clean_lse = head_of(got.lse, 0, 0);
      for (Index b = 0; b < 3; ++b) {
        for (Index h = 1; h < 6; ++h) {
          const Array output = head_of(got.output, b, h);
          const Array lse = head_of(got.lse, b, h);
          const Index key = places[static_cast<std::size_t>(b)];
          for (Index i = 0; i < queries && key >= keys_seen(true, i, queries, keys); ++i) {
            const std::string why = "of query " + std::to_string(i) + " when key " + std::to_string(key) +
                                    ", which it may not see, became " +
                                    std::to_string(POISONS[static_cast<std::size_t>(h) - 1]) + "; " +
                                    sizes(queries, keys, true);
            const auto row = [i](const Array& all, Index width) {
              const auto begin = all.values.begin() + i * width;
              return Array{{width}, {begin, begin + width}};
            };
            if (!expect_same_bits("output", row(output, 16), row(clean, 16), {"channel"}, why) ||
                !expect_same_bits("lse", row(lse, 1), row(clean_lse, 1), {"query"}, why)) {
              return;
            }
          }
        }
      }
    }
  }

  TEST_CASE("what a value holds reaches every query that may see it") {
    ask("A value has become NaN in one channel. Which queries see that key, and did their outputs notice in that "
        "channel "
        "and in no other?");
    for (const bool causal : {false, true}) {
      const Index queries = 9;
      const Index keys = 35;
      // In head h, key h + 24 holds a NaN in channel 5.
      const Tensor<float, 4> q = normal({1, 11, queries, 16}, 10);
      const Tensor<float, 4> k = normal({1, 11, keys, 16}, 11);
      Tensor<float, 4> v = normal({1, 11, keys, 16}, 12);
      for (Index h = 0; h < 11; ++h) v(0, h, h + 24, 5) = NOT_A_NUMBER;
      const Answer got = call(q, k, v, {.causal = causal});
      for (Index h = 0; h < 11; ++h) {
        const Array output = head_of(got.output, 0, h);
        for (Index i = 0; i < queries; ++i) {
          for (Index d = 0; d < 16; ++d) {
            const bool want = d == 5 && h + 24 < keys_seen(causal, i, queries, keys);
            const bool is = std::isnan(output.values[static_cast<std::size_t>(i * 16 + d)]);
            if (is == want) continue;
            finding("output", "of query " + std::to_string(i) + ", channel " + std::to_string(d) + " is " +
                                  (is ? "NaN" : "a number") + " when the value of key " + std::to_string(h + 24) +
                                  " is NaN in channel 5; " + sizes(queries, keys, causal));
            return;
          }
        }
      }
    }
  }

  TEST_CASE("heads and batch items know nothing of each other") {
    ask("Six heads, in two orders. From a block's number, how do you know its head, its batch item, and where they "
        "lie?");
    for (const bool causal : {false, true}) {
      const Tensor<float, 4> q = normal({1, 6, 21, 16}, 13);
      const Tensor<float, 4> k = normal({1, 6, 35, 16}, 14);
      const Tensor<float, 4> v = normal({1, 6, 35, 16}, 15);
      const auto in_order = [](Index b, Index h) { return 3 * b + h; };
      const auto shuffled = [](Index b, Index h) { return (5 * (2 * h + b) + 1) % 6; };
      const auto run = [&](Index batch, Index heads, auto from) {
        return call(arranged(q, batch, heads, from), arranged(k, batch, heads, from), arranged(v, batch, heads, from),
                    {.causal = causal});
      };
      const Answer two_by_three = run(2, 3, in_order);
      const Answer three_by_two = run(3, 2, shuffled);
      for (Index b = 0; b < 3; ++b) {
        for (Index h = 0; h < 2; ++h) {
          const Index was = shuffled(b, h);
          const std::string why = "of head " + std::to_string(was % 3) + " of batch item " + std::to_string(was / 3) +
                                  " when it became head " + std::to_string(h) + " of batch item " + std::to_string(b);
          if (!expect_same_bits("output", head_of(three_by_two.output, b, h),
                                head_of(two_by_three.output, was / 3, was % 3), {"query", "channel"}, why) ||
              !expect_same_bits("lse", head_of(three_by_two.lse, b, h), head_of(two_by_three.lse, was / 3, was % 3),
                                {"query"}, why)) {
            return;
          }
        }
      }
    }
  }

  TEST_CASE("rows may lie anywhere in memory") {
    ask("How far apart in memory are two rows of this view? And of the output? Which of your strides belongs to which "
        "tensor?");
    const Tensor<float, 4> q = normal({2, 3, 17, 16}, 16);
    const Tensor<float, 4> k = normal({2, 3, 35, 16}, 17);
    const Tensor<float, 4> v = normal({2, 3, 35, 16}, 18);
    const Answer want = call(q, k, v, {});
    for (const Layouts& layouts : {TOKENS, APART, MIXED, MIXED_OTHERWISE}) {
      if (!expect_same(call(q, k, v, {.layouts = layouts}), want, "when the rows lay otherwise")) return;
    }
  }

  TEST_CASE("the same inputs give the same bits") {
    ask("Twice the same call, with another in between. Which of your sums depends on who comes first? And what is left "
        "in shared memory from the last block?");
    for (const bool causal : {false, true}) {
      const Tensor<float, 4> q = normal({1, 2, 33, 32}, 19);
      const Tensor<float, 4> k = normal({1, 2, 45, 32}, 20);
      const Tensor<float, 4> v = normal({1, 2, 45, 32}, 21);
      const Answer want = call(q, k, v, {.causal = causal});
      // A block that leaves NaN behind in shared memory.
      const Tensor<float, 4> bad = filled({1, 2, 45, 32}, NOT_A_NUMBER);
      call(q, bad, bad, {.causal = causal});
      if (!expect_same(call(q, k, v, {.causal = causal}), want, "in a later call")) return;
    }
  }

  TEST_CASE("keys and values are loaded once for a tile of queries") {
    ask("64 queries, 64 keys. How many times is each key loaded from global memory, and how many queries use it each "
        "time? Who else could use what one thread has loaded?");
    if (needs_a_check()) return;
    const Traffic traffic = traffic_of(64, 64, false);
    if (!kernels_are_checked()) return;
    const Index bytes = 64 * 16 * static_cast<Index>(sizeof(float));
    const Index most = 4 * bytes + 1024;
    const auto expect_at_most = [&](Index loaded, const char* name) {
      expect(loaded > 0 && loaded <= most, name,
             "loaded too often: " + std::to_string(loaded) + " bytes, " + std::to_string(loaded / bytes) +
                 " times its size, for 64 queries; want at most " + std::to_string(most) +
                 ", once for every 16 queries");
    };
    expect_at_most(traffic.key, "key");
    expect_at_most(traffic.value, "value");
  }

  TEST_CASE("tiles that no query of the block may see are not even read") {
    ask("Above the diagonal lie whole tiles that nobody may see. For a block's queries, which is the last tile of keys "
        "worth loading?");
    if (needs_a_check()) return;
    const Traffic all = traffic_of(256, 256, false);
    const Traffic causal = traffic_of(256, 256, true);
    if (!kernels_are_checked()) return;
    const auto expect_fewer = [](Index some, Index full, const char* name) {
      expect(some * 5 <= full * 4, name,
             "forbidden tiles loaded: causal, " + std::to_string(some) + " bytes of " + std::to_string(full) +
                 " without a mask, for 256 queries and keys; want at most 4/5");
    };
    expect_fewer(causal.key, all.key, "key");
    expect_fewer(causal.value, all.value, "value");
  }

  TEST_CASE("no row of scores is kept in shared memory") {
    ask("For how many keys at once does your block hold scores? What if there were a million keys?");
    if (needs_a_check()) return;
    const Traffic one = traffic_of(4, 192, false);
    const Traffic two = traffic_of(4, 384, false);
    if (!kernels_are_checked()) return;
    expect(two.shared <= one.shared, "memory",
           "shared memory grows with the number of keys: " + std::to_string(one.shared) + " bytes for 192 keys, " +
               std::to_string(two.shared) + " for 384");
  }

  TEST_CASE("agrees with the float64 reference") {
    for_each<FlashCase>(flash_cases(), [](const FlashCase& c) {
      const AttentionInputs inputs = make_inputs(c.problem);
      expect_attention(call(inputs, c), expected(c.problem, inputs));
    });
  }

  TEST_CASE("agrees with the float64 reference at 256 and 512") {
    if (needs_a_gpu()) return;
    for (const bool causal : {false, true}) {
      expect_long(2, 8, 256, 256, 64, causal);
      expect_long(1, 16, 512, 512, 128, causal);
      expect_long(1, 2, 127, 513, 32, causal);
    }
  }

  TEST_CASE("agrees with the float64 reference at 1024 and 2048") {
    if (needs_a_gpu()) return;
    for (const bool causal : {false, true}) {
      expect_long(4, 8, 1024, 1024, 64, causal);
      expect_long(1, 2, 1023, 1024, 32, causal);
      expect_long(1, 2, 2048, 2048, 16, causal);
    }
  }

  TEST_CASE("says what is wrong with bad arguments") {
    DeviceBuffer<float> q("query", std::vector<float>(2 * 3 * 5 * 16, 0.5f));
    DeviceBuffer<float> k("key", std::vector<float>(2 * 3 * 8 * 16, 0.5f));
    DeviceBuffer<float> v("value", std::vector<float>(2 * 3 * 8 * 16, 0.5f));
    DeviceBuffer<float> o("output", 2 * 3 * 5 * 16);
    DeviceBuffer<float> l("lse", 2 * 3 * 5);
    const Shape<4> queries{2, 3, 5, 16};
    const Shape<4> keys{2, 3, 7, 16};
    const FlashForward<float> good{.query = View<const float, 4>(q.data(), queries),
                                   .key = View<const float, 4>(k.data(), keys),
                                   .value = View<const float, 4>(v.data(), keys),
                                   .output = View<float, 4>(o.data(), queries),
                                   .lse = View<float, 3>(l.data(), {2, 3, 5})};
    run_kernels([&] { flash_forward(good); });
    const auto expect_refused = [&](std::string_view what, std::string_view argument, auto change) {
      FlashForward<float> bad = good;
      change(bad);
      expect_rejected(what, argument, [&] { run_kernels([&] { flash_forward(bad); }); });
    };
    using Problem = FlashForward<float>;
    expect_refused("a width of 8", "query", [&](Problem& p) {
      p.query = View<const float, 4>(q.data(), {2, 3, 5, 8});
      p.key = p.value = View<const float, 4>(k.data(), {2, 3, 7, 8});
      p.output = View<float, 4>(o.data(), {2, 3, 5, 8});
    });
    expect_refused("keys of fewer heads", "key", [&](Problem& p) {
      p.key = View<const float, 4>(k.data(), {2, 1, 7, 16});
    });
    expect_refused("keys of another batch", "key", [&](Problem& p) {
      p.key = View<const float, 4>(k.data(), {1, 3, 7, 16});
    });
    expect_refused("a value too few", "value", [&](Problem& p) {
      p.value = View<const float, 4>(v.data(), {2, 3, 6, 16});
    });
    expect_refused("an output too short", "output", [&](Problem& p) {
      p.output = View<float, 4>(o.data(), {2, 3, 4, 16});
    });
    expect_refused("an lse of other heads", "lse", [&](Problem& p) { p.lse = View<float, 3>(l.data(), {2, 2, 5}); });
    expect_refused("a scale that is NaN", "scale", [&](Problem& p) { p.scale = NOT_A_NUMBER; });
    expect_refused("queries with a gap between channels", "query", [&](Problem& p) {
      p.query = View<const float, 4>(q.data(), queries, {240, 80, 1, 5});
    });
    expect_refused("keys whose rows are not 16 bytes apart", "key", [&](Problem& p) {
      p.key = View<const float, 4>(k.data(), keys, {360, 120, 17, 1});
    });
    expect_refused("values that begin between two multiples of 16 bytes", "value",
                   [&](Problem& p) { p.value = View<const float, 4>(v.data() + 1, keys); });
  }
}
