// In the order in which one would build the kernel: one tile of Q K^T, the row reductions, P V, the loop over tiles,
// the copies that run ahead, ragged shapes, causal; then what holds everywhere.
#include "flash_forward_mma.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/testing/flash_cases.hpp"
#include "common/testing/fragment_map.hpp"
#include "common/virtual_gpu/findings.hpp"
#include "phase2_forward/kernel_suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

using Sizes = ForwardSizes;
using Options = ForwardOptions;
using Answer = ForwardAnswer;

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
const Axes OUTPUT = {"batch", "head", "query", "channel"};
const Axes LSE = {"batch", "head", "query"};

template <typename T>
Answer call(const ForwardInputs<T>& in, const Options& options, bool judge = true) {
  return forward<T>([](const FlashForward<T>& problem) { flash_forward_mma(problem); }, in, options, judge);
}

template <typename T>
Answer attend(const Sizes& sizes, const Options& options, const Fill& q, const Fill& k, const Fill& v) {
  return call(ForwardInputs<T>(sizes, q, k, v), options);
}

bool expect_same(const Answer& got, const Answer& want, const std::string& why) {
  const bool output = expect_same_bits("output", got.output, want.output, OUTPUT, why);
  return expect_same_bits("lse", got.lse, want.lse, LSE, why) && output;
}

// Calls the answer and compares about `rows` rows of each head.
template <typename T>
bool expect_attention(const ForwardInputs<T>& in, const Options& options,
                      Index rows = std::numeric_limits<Index>::max()) {
  const Answer got = call(in, options);
  const Shape<4> shape = in.query.view().shape();
  const double scale = static_cast<double>(options.scale.value_or(1.0f / std::sqrt(static_cast<float>(shape[3]))));
  const ForwardRows want = forward_rows(in, options.causal, scale, spread_rows(shape[2], rows));
  const bool lse = expect_close("lse", want.of(got.lse), want.lse, lse_bound_of<T>(want), LSE);
  const bool output = expect_close_in_half<T>("output", want.of(got.output), want.output, want.baseline,
                                              arithmetic_of(want), "whose weights and output are rounded to", OUTPUT);
  if (!lse || !output) finding("of", std::string(type_name<T>()) + (options.causal ? ", causal" : ""));
  return lse && output;
}

template <typename T>
bool expect_attention(const Sizes& sizes, const Options& options, const Fill& q, const Fill& k, const Fill& v,
                      Index rows = std::numeric_limits<Index>::max()) {
  if (expect_attention(ForwardInputs<T>(sizes, q, k, v), options, rows)) return true;
  finding("of", sizes.text());
  return false;
}

// A numbered case's numbers, rounded to T.
template <typename T>
ForwardInputs<T> inputs_of(const FlashCase& c) {
  const AttentionInputs inputs = make_inputs(c.problem);
  const auto of = [](const TokenTensor& tensor) -> Fill {
    return
        [view = tensor.heads()](Index b, Index h, Index s, Index d) { return static_cast<double>(view(b, h, s, d)); };
  };
  const AttentionCase& p = c.problem;
  return {{p.batch, p.heads, p.queries, p.keys, p.width}, of(inputs.query), of(inputs.key), of(inputs.value)};
}

// Scores near -20000 come from numbers that fp16 does not hold.
template <typename T>
bool is_finite(const ForwardInputs<T>& in) {
  const auto finite = [](const Tensor<float, 4>& tensor) {
    const float* first = tensor.view().data();
    return std::all_of(first, first + tensor.view().count(), [](float x) { return std::isfinite(x); });
  };
  return finite(in.query) && finite(in.key) && finite(in.value);
}

Options options_of(const FlashCase& c) {
  return {.causal = c.problem.causal, .scale = c.problem.scale, .layouts = c.layouts};
}

// Numbers are judged, and recognised, in the fast executable.
const Recognise recognise_mma(numbers(flash_cases()), [](int number) -> std::vector<Array> {
  if (kernels_are_checked()) throw NotImplemented(__FILE__);
  const FlashCase& c = flash_cases().at(static_cast<std::size_t>(number) - 1);
  std::vector<Array> outputs;
  for_both_types([&](auto type) {
    Answer answer = call(inputs_of<decltype(type)>(c), options_of(c), /*judge=*/false);
    if (!take_findings().empty()) throw std::runtime_error("a kernel was abandoned");
    outputs.push_back(std::move(answer.output));
    outputs.push_back(std::move(answer.lse));
  });
  return outputs;
});

// ---- Needles: query i meets key `target(i)` and no other ------------------------------------------------------------

// Every number below 256 as +-2 in eight channels, again and again. Under needle_scale() two equal codes have the score
// 256, and codes that differ in one bit 64 less: all exact in 16 bits.
double code(Index number, Index channel) { return (number >> (channel % 8)) % 2 == 1 ? 2.0 : -2.0; }
float needle_scale(Index width) { return 64.0f / static_cast<float>(width); }

using Target = std::function<Index(Index)>;

// Two calls: one whose values are the numbers of their keys, one whose values are the numbers of their channels. The
// others' weights are exp(-64) and less.
template <typename T>
bool expect_needles(const Sizes& sizes, bool causal, const Target& target) {
  const auto find = [&](const Fill& v) {
    Array found = attend<T>(
                      sizes, {.causal = causal, .scale = needle_scale(sizes.width)},
                      [&](Index, Index, Index i, Index d) { return code(target(i), d); },
                      [](Index, Index, Index j, Index d) { return code(j, d); }, v)
                      .output;
    found.shape = {sizes.queries, sizes.width};
    return found;
  };
  const Array keys = find([](Index, Index, Index j, Index) { return double(j); });
  const Array channels = find([](Index, Index, Index, Index d) { return double(d); });
  const Arrival arrival{
      .name = "output", .axis = "query", .from = "V[key,channel]", .source = target, .tolerance = 1e-20};
  if (expect_arrived(keys, channels, arrival)) return true;
  finding("of", std::string(type_name<T>()) + ", " + sizes.text() + (causal ? ", causal" : ""));
  return false;
}

// In each head but the first, keys from a certain one on hold poison, in K, in V or in both. Queries that may not see
// them are those of the clean first head, but for rounding: rows of a warp may share the moment at which O is rescaled.
template <typename T>
void expect_forbidden_unseen() {
  constexpr double POISONS[] = {NOT_A_NUMBER, INF, -INF, 60000.0};
  constexpr const char* OPERANDS[] = {"the keys", "the values", "keys and values"};
  for (const auto& [queries, keys] : {std::pair<Index, Index>{40, 40}, {30, 80}, {70, 40}, {150, 150}, {140, 200}}) {
    if (kernels_are_checked() && queries > 70) continue;
    for (const Index first : {keys - 1, keys / 2, std::max<Index>(1, keys - 17)}) {
      const auto poisoned = [&](unsigned seed, unsigned operand) -> Fill {
        return [=, clean = noise(seed)](Index, Index h, Index s, Index d) {
          const bool here = h > 0 && s >= first && (((h - 1) / 4 + 1) & operand) != 0;
          return here ? POISONS[(h - 1) % 4] : clean(0, 0, s, d);
        };
      };
      const Fill query = [clean = noise(5)](Index, Index, Index s, Index d) { return clean(0, 0, s, d); };
      const Answer got = attend<T>({.heads = 13, .queries = queries, .keys = keys, .width = 16}, {.causal = true},
                                   query, poisoned(6, 1), poisoned(7, 2));
      for (Index at = 0; at < 13 * queries; ++at) {
        const Index h = at / queries, i = at % queries;
        if (first < keys_seen(true, i, queries, keys)) continue;
        const bool same_output = same_row_but_rounding(got.output, at, i, 16, 4.0 * roundoff<T>());
        if (same_output && same_row_but_rounding(got.lse, at, i, 1, 1e-4)) continue;
        finding(same_output ? "lse" : "output",
                std::string(type_name<T>()) + ", " + std::to_string(queries) + " queries, " + std::to_string(keys) +
                    " keys: query " + std::to_string(i) + " noticed that " + OPERANDS[(h - 1) / 4] + " from number " +
                    std::to_string(first) + " on, which it may not see, became " +
                    std::to_string(POISONS[(h - 1) % 4]));
        return;
      }
    }
  }
}

// Every score is 0, and V is 1: the output is 1, and exp(lse) counts the keys.
template <typename T>
bool expect_count(const Sizes& sizes, bool causal) {
  const Answer got = attend<T>(sizes, {.causal = causal}, everywhere(0.0), noise(3), everywhere(1.0));
  Array output{got.output.shape, {}};
  Array lse{got.lse.shape, {}};
  for (Index row = 0; row < sizes.batch * sizes.heads * sizes.queries; ++row) {
    const Index seen = keys_seen(causal, row % sizes.queries, sizes.queries, sizes.keys);
    output.values.insert(output.values.end(), static_cast<std::size_t>(sizes.width), seen > 0 ? 1.0 : 0.0);
    lse.values.push_back(std::log(static_cast<double>(seen)));
  }
  const bool counted = expect_close("lse", got.lse, lse, lse_bound(lse, 0.0), LSE);
  const bool ones = expect_same_bits("output", got.output, output, OUTPUT, "when every value is 1");
  if (!counted || !ones) finding("of", std::string(type_name<T>()) + ", " + sizes.text() + (causal ? ", causal" : ""));
  return counted && ones;
}

}  // namespace

TEST_SUITE("phase2.05_flash_forward_mma") {
  TEST_CASE("one tile of Q K^T: channels meet channels") {
    ask("Query i is 1 in channel i alone, so its score with the only key is that key's channel i. Lane 5 owns which "
        "two rows of A, and which columns are in its four registers?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const Index width : {16, 32, 64, 128}) {
        const Answer got = attend<T>(
            {.queries = width, .keys = 1, .width = width}, {.scale = 1.0f},
            [](Index, Index, Index i, Index d) { return i == d ? 1.0 : 0.0; },
            [](Index, Index, Index, Index d) { return double(d + 1); }, everywhere(1.0));
        for (Index i = 0; i < width; ++i) {
          const double lse = got.lse.values[static_cast<std::size_t>(i)];
          if (std::abs(lse - static_cast<double>(i + 1)) <= 1e-4) continue;
          std::ostringstream text;
          text << type_name<T>() << ", D = " << width << ": query " << i << " met channel " << lse - 1.0
               << " of the key; want channel " << i;
          finding("lse", text.str());
          return;
        }
      }
    });
  }

  TEST_CASE("one tile of Q K^T: each query meets its own key") {
    ask("Query i has the score 100 + j with one key j, and 0 with the others. Which 8 lanes supply the addresses of "
        "each "
        "8 x 8 matrix of K, and which registers of B do they become?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const Index keys : {16, 64}) {
        // Key j is for query 5 j + 3 (mod keys).
        const Answer got = attend<T>(
            {.queries = keys, .keys = keys, .width = keys}, {.scale = 1.0f},
            [](Index, Index, Index i, Index d) { return i == d ? 1.0 : 0.0; },
            [keys](Index, Index, Index j, Index d) { return (5 * j + 3) % keys == d ? 100.0 + double(j) : 0.0; },
            everywhere(1.0));
        for (Index j = 0; j < keys; ++j) {
          const Index i = (5 * j + 3) % keys;
          const double lse = got.lse.values[static_cast<std::size_t>(i)];
          if (std::abs(lse - 100.0 - static_cast<double>(j)) <= 1e-3) continue;
          std::ostringstream text;
          text << type_name<T>() << ", " << keys << " keys, D = " << keys << ": query " << i << " met key "
               << lse - 100.0 << "; want key " << j;
          finding("lse", text.str());
          return;
        }
      }
    });
  }

  TEST_CASE("row reductions: a query of 0 counts its keys") {
    ask("All scores are 0, so every weight is 1. How many lanes hold a piece of one row, and what do they add up to?");
    for_both_types([](auto type) {
      for (const Index keys : {1, 2, 7, 8, 9, 16, 31, 33, 63, 64}) {
        if (!expect_count<decltype(type)>({.queries = 16, .keys = keys, .width = 16}, false)) return;
      }
    });
  }

  TEST_CASE("row reductions: rows know nothing of each other") {
    ask("Query i has the score 4 i with every key. Whose maximum did it subtract, and whose weights did it add?");
    for_both_types([](auto type) {
      using T = decltype(type);
      const Sizes sizes{.queries = 40, .keys = 32, .width = 16};
      const Answer got = attend<T>(
          sizes, {.scale = 1.0f}, [](Index, Index, Index i, Index d) { return d == 3 ? 4.0 * double(i) - 80.0 : 0.0; },
          everywhere(1.0), everywhere(1.0));
      Array lse{{1, 1, 40}, {}};
      for (int i = 0; i < 40; ++i) lse.values.push_back(4.0 * i - 80.0 + std::log(32.0));
      expect_close("lse", got.lse, lse, lse_bound(lse, 80.0), LSE);
      expect_all("output", got.output, 1.0, 0.0, OUTPUT, "weights of a row should add up to 1");
    });
  }

  TEST_CASE("P V: which row and which channel of V come out") {
    ask("Query i meets key 15 - i alone, so row 15 - i of V should come out. Give V the numbers of its rows and look "
        "at "
        "what lane 5 holds: where in P V has which register of P been, and which of V?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const Index width : {16, 32, 64, 128}) {
        if (!expect_needles<T>({.queries = 16, .keys = 16, .width = width}, false, [](Index i) { return 15 - i; }))
          return;
      }
    });
  }

  TEST_CASE("P V: a whole tile of keys") {
    ask("Now 64 keys. Which two C fragments of S are the A fragment of keys 16 to 31?");
    for_both_types([](auto type) {
      expect_needles<decltype(type)>({.queries = 64, .keys = 64, .width = 32}, false,
                                     [](Index i) { return (i * 37 + 11) % 64; });
    });
  }

  TEST_CASE("P V: weights are shared out as the scores say") {
    ask("Two keys, scores 0 and log 3: a quarter and three quarters. In which base are your exponents, and were scores "
        "and maximum converted alike?");
    for_both_types([](auto type) {
      using T = decltype(type);
      // Scores 0 and 1.375 under scale 1; the values are unit vectors.
      const Answer got = attend<T>(
          {.queries = 3, .keys = 2, .width = 16}, {.scale = 0.5f},
          [](Index, Index, Index, Index d) { return d == 0 ? 2.0 : 0.0; },
          [](Index, Index, Index j, Index d) { return d == 0 && j == 1 ? 1.375 : 0.0; },
          [](Index, Index, Index j, Index d) { return j == d ? 1.0 : 0.0; });
      const double other = std::exp(-1.375);
      Array output{{1, 1, 3, 16}, {}};
      for (int i = 0; i < 3; ++i) {
        for (int d = 0; d < 16; ++d) {
          output.values.push_back(d == 0 ? other / (1.0 + other) : d == 1 ? 1.0 / (1.0 + other) : 0.0);
        }
      }
      expect_close("output", got.output, output, {3.0 * roundoff<T>(), output}, OUTPUT);
      expect_all("lse", got.lse, 1.375 + std::log(1.0 + other), roundoff<T>(), LSE, "log(1 + exp(1.375))");
    });
  }

  TEST_CASE("the loop: every key of every tile can win") {
    ask("One key matches far better than the others, and each query has another one. Which of its places, first or "
        "last "
        "in a tile, does yours miss? What happens to what was gathered before it came?");
    for_both_types([](auto type) {
      using T = decltype(type);
      expect_needles<T>({.queries = 150, .keys = 150, .width = 16}, false, [](Index i) { return (i * 7 + 3) % 150; });
      expect_needles<T>({.queries = 16, .keys = 200, .width = 64}, false, [](Index i) { return (i * 13) % 200; });
    });
  }

  TEST_CASE("the loop: old tiles keep their share") {
    ask("The maximum of a later tile is a little larger, or a little smaller. In which units are the sum and the "
        "output "
        "that you had gathered up to then?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const double slope : {1.0, -1.0}) {
        // The score of key j is slope j / 32, exactly.
        const auto q = [](Index, Index, Index, Index d) { return d == 5 ? 1.0 : 0.0; };
        const auto k = [slope](Index, Index, Index j, Index d) { return d == 5 ? slope * double(j) / 32.0 : 0.0; };
        if (!expect_attention<T>({.queries = 5, .keys = 200, .width = 16}, {.scale = 1.0f}, q, k, noise(4))) return;
      }
    });
  }

  TEST_CASE("the loop: 2048 equal weights") {
    ask("Each of 2048 keys adds a little to a large sum. What is 256 + 0.5 in 16 bits, and where have you rounded "
        "before "
        "the last key was in?");
    for_both_types([](auto type) {
      using T = decltype(type);
      const auto values = [](Index b, Index h, Index j, Index d) { return 1.0 + 0.4 * noise(9)(b, h, j, d); };
      expect_attention<T>({.queries = 4, .keys = 2048, .width = 16}, {}, everywhere(0.0), noise(3), values);
      expect_count<T>({.queries = 4, .keys = 2048, .width = 16}, false);
    });
  }

  TEST_CASE("pipelining: copies run while the tensor cores do, and everybody's have landed before they are read") {
    ask("cp.async.wait waits for the copies of one thread. Who else copied what you are about to read, who may still "
        "be "
        "reading what you are about to overwrite, and what do you do while a copy is on its way?");
    for (const Index width : {64, 128}) {
      const Sizes sizes{.queries = 130, .keys = 200, .width = width};
      const Answer got = attend<fp16>(sizes, {}, noise(1), noise(2), noise(3));
      expect_same(attend<fp16>(sizes, {}, noise(1), noise(2), noise(3)), got, "when called again");
      if (!kernels_are_checked() || got.profiles.empty()) continue;
      expect_copies_overlapped(got.profiles, 0.6);
      EventCounts events;
      for (const KernelProfile& profile : got.profiles) events += profile.events;
      expect(events.copy_groups > 0, "copies", "no cp.async group was ever started");
    }
  }

  TEST_CASE("pipelining: no bank conflicts on tensor cores and no needless bytes") {
    ask("The 8 rows that ldmatrix reads together: in which banks does each begin? And how often does a block of "
        "queries "
        "have to read a key?");
    const CountLines lines;
    for (const Index width : {16, 32, 64, 128}) {
      const Sizes sizes{.queries = 128, .keys = 70, .width = width};
      const Answer got = attend<bf16>(sizes, {}, noise(1), noise(2), noise(3));
      if (!kernels_are_checked() || got.profiles.empty()) continue;
      // Padded rows, which are as good in the long run, cannot help but collide where a row is shorter than 128 bytes.
      if (width >= 64) expect_bank_conflicts_below(got.profiles, 1.5);
      EventCounts events;
      for (const KernelProfile& profile : got.profiles) events += profile.events;
      expect(events.matrix_products > 0, "tensor cores", "no mma_m16n8k16 was executed");
      const std::int64_t least = sizes.keys * width * 2;
      for (const char* name : {"key", "value"}) {
        const std::int64_t loaded = bytes_loaded(got.profiles, name);
        const std::int64_t allowed = least * ((sizes.queries + 63) / 64);
        expect(loaded <= allowed, "traffic",
               std::string(name) + ": " + std::to_string(loaded) + " bytes loaded; blocks of 64 queries or more need " +
                   std::to_string(allowed));
      }
      const std::int64_t read = bytes_loaded(got.profiles, "query");
      expect(read <= sizes.queries * width * 2, "traffic",
             "query: " + std::to_string(read) + " bytes loaded of " + std::to_string(sizes.queries * width * 2));
    }
  }

  TEST_CASE("ragged: values of one give an output of one") {
    ask("What do the weights of a query add up to? Which places of the last tile are no keys at all, and what is their "
        "score?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const auto& [queries, keys] : {std::pair{1, 1}, {17, 33}, {37, 53}, {127, 65}, {129, 128}, {1, 130}}) {
        const Sizes sizes{.queries = queries, .keys = keys, .width = 16};
        if (!expect_count<T>(sizes, false)) return;
        // Scores near -20, so that a place that is no key would win with its 0.
        const Answer got = attend<T>(sizes, {.scale = 1.0f}, everywhere(1.0), everywhere(-1.25), everywhere(1.0));
        if (!expect_all("output", got.output, 1.0, 0.0, OUTPUT, sizes.text() + ": every output should be 1")) return;
        const double lse = -20.0 + std::log(static_cast<double>(keys));
        if (!expect_all("lse", got.lse, lse, 1e-4, LSE, sizes.text() + ": all scores are -20")) return;
      }
    });
  }

  TEST_CASE("ragged: no key and no query") {
    ask("With no key at all, what are the maximum and the sum of nothing, and who writes the output?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const bool causal : {false, true}) {
        const Answer none = attend<T>({.heads = 2, .queries = 20, .keys = 0, .width = 32}, {.causal = causal}, noise(1),
                                      noise(2), noise(3));
        expect_all("output", none.output, 0.0, 0.0, OUTPUT, "without a key every output is 0");
        expect(std::all_of(none.lse.values.begin(), none.lse.values.end(), [](double x) { return x == -INF; }), "lse",
               "without a key every lse is -inf");
        attend<T>({.queries = 0, .keys = 20, .width = 32}, {.causal = causal}, noise(1), noise(2), noise(3));
      }
    });
  }

  TEST_CASE("ragged: heads and batch items lie anywhere and know nothing of each other") {
    ask("Head 2 of batch item 1, alone and among others, packed and between the rows of other heads. Which of your "
        "offsets comes from a stride, and which from a size?");
    for_both_types([](auto type) {
      using T = decltype(type);
      const ForwardInputs<T> in({.batch = 3, .heads = 5, .queries = 9, .keys = 19, .width = 16}, noise(1), noise(2),
                                noise(3));
      for (const bool causal : {false, true}) {
        const Answer packed = call(in, {.causal = causal});
        for (const Layouts& layouts : {TOKENS, APART, MIXED, MIXED_OTHERWISE}) {
          if (!expect_same(call(in, {.causal = causal, .layouts = layouts}), packed, "when the rows lay otherwise")) {
            return;
          }
        }
        for (Index b = 0; b < 3; ++b) {
          for (Index h = 0; h < 5; ++h) {
            if (kernels_are_checked() && (b + h) % 3 != 0) continue;
            const auto of = [b, h](unsigned seed) -> Fill {
              return [=, all = noise(seed)](Index, Index, Index s, Index d) { return all(b, h, s, d); };
            };
            const Answer one =
                attend<T>({.queries = 9, .keys = 19, .width = 16}, {.causal = causal}, of(1), of(2), of(3));
            const std::string why = "of batch item " + std::to_string(b) + ", head " + std::to_string(h) +
                                    " when it was computed among others";
            // How keys are cut into tiles may depend on how much there is to do.
            if (!expect_same_but_rounding("output", head_of(packed.output, b, h), head_of(one.output, 0, 0),
                                          4.0 * roundoff<T>(), {"query", "channel"}, why) ||
                !expect_same_but_rounding("lse", head_of(packed.lse, b, h), head_of(one.lse, 0, 0), 1e-5, {"query"},
                                          why)) {
              return;
            }
          }
        }
      }
    });
  }

  TEST_CASE("ragged: what lies behind the last key of a head reaches nobody") {
    ask("Behind this head's last key lies the next head, and that holds NaN. Which rows of your last tile are none of "
        "its business, and what is 0 times NaN?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const double poison : {NOT_A_NUMBER, INF}) {
        const Fill keys = [=](Index, Index h, Index s, Index d) { return h % 2 == 1 ? poison : noise(6)(0, 0, s, d); };
        const Fill values = [=](Index, Index h, Index s, Index d) {
          return h % 2 == 1 ? poison : noise(7)(0, 0, s, d);
        };
        for (const Index count : {1, 19, 70}) {
          const Sizes sizes{.heads = 3, .queries = 20, .keys = count, .width = 16};
          const Answer got = attend<T>(sizes, {}, noise(5), keys, values);
          const Answer want = attend<T>(sizes, {}, noise(5), noise(6), noise(7));
          if (!expect_same_bits("output", head_of(got.output, 0, 0), head_of(want.output, 0, 0), {"query", "channel"},
                                "when the next head became " + std::to_string(poison))) {
            return;
          }
        }
      }
    });
  }

  TEST_CASE("causal: a query sees the keys up to its own place") {
    ask("The last query stands at the last key. Every score is 0, so exp(lse) counts what a query sees: what is its "
        "place in the sequence, beyond its place in the tile?");
    for_both_types([](auto type) {
      for (const auto& [queries, keys] :
           {std::pair{16, 16}, {33, 33}, {17, 53}, {53, 17}, {130, 150}, {150, 20}, {1, 70}}) {
        if (!expect_count<decltype(type)>({.queries = queries, .keys = keys, .width = 16}, true)) return;
      }
    });
  }

  TEST_CASE("causal: the last key that a query sees can win") {
    ask("Query i meets the last key that it sees, and the one after it matches as well as any. Is your comparison of "
        "places < or <=, and where do both count from?");
    for_both_types([](auto type) {
      using T = decltype(type);
      expect_needles<T>({.queries = 140, .keys = 150, .width = 16}, true, [](Index i) { return i + 10; });
      expect_needles<T>({.queries = 140, .keys = 150, .width = 16}, true, [](Index i) { return (i + 10) / 2; });
    });
  }

  TEST_CASE("causal: a key that a query may not see cannot move its output") {
    ask("A key that only later queries may see holds NaN. A weight of 0 is no protection: what is 0 times NaN, and who "
        "computes it for a whole tile at once?");
    for_both_types([](auto type) { expect_forbidden_unseen<decltype(type)>(); });
  }

  TEST_CASE("a scale of any sign and size") {
    ask("A negative scale turns the order of the scores around: which of them is the largest then? And with scale 0, "
        "what "
        "should every weight be?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const float scale : {0.0f, -0.25f, 1.0f, -2.0f, 1e-3f}) {
        for (const bool causal : {false, true}) {
          if (!expect_attention<T>({.queries = 20, .keys = 75, .width = 16}, {.causal = causal, .scale = scale},
                                   noise(1), noise(2), noise(3))) {
            finding("of", "scale " + std::to_string(scale) + (causal ? ", causal" : ""));
            return;
          }
        }
      }
    });
  }

  TEST_CASE("products beyond 65504 before the scale") {
    ask("Where is the largest number of your computation, before or after the scale? Which type holds it?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const double size : {64.0, 200.0}) {
        const auto q = [size](Index b, Index h, Index s, Index d) { return size * (1.0 + noise(1)(b, h, s, d)); };
        const auto k = [size](Index b, Index h, Index s, Index d) { return size * (1.0 + noise(2)(b, h, s, d)); };
        if (!expect_attention<T>({.queries = 9, .keys = 40, .width = 128}, {.scale = 1e-6f}, q, k, noise(3))) return;
      }
    });
  }

  TEST_CASE("as exact as 16 bits allow") {
    ask("Which numbers did you round to 16 bits? The operands arrive so, and the weights and the output have to be. "
        "Anything else, and anything twice?");
    for_both_types([](auto type) {
      using T = decltype(type);
      const auto times = [](double factor, unsigned seed) -> Fill {
        return [=](Index b, Index h, Index s, Index d) { return factor * noise(seed)(b, h, s, d); };
      };
      for (const Index width : {32, 128}) {
        for (const double size : {1.0, 2.5}) {
          const Index keys = kernels_are_checked() ? 70 : 200;
          if (!expect_attention<T>({.queries = 40, .keys = keys, .width = width}, {}, times(size, 1), times(1.0, 2),
                                   noise(3))) {
            finding("of", "D = " + std::to_string(width) + ", " + std::to_string(keys) + " keys");
            return;
          }
        }
      }
    });
  }

  TEST_CASE("the same inputs give the same bits") {
    ask("Call it twice. What is left over from the first call, in shared memory and elsewhere?");
    for_both_types([](auto type) {
      using T = decltype(type);
      const Sizes sizes{.heads = 2, .queries = 37, .keys = 75, .width = 32};
      const ForwardInputs<T> in(sizes, noise(1), noise(2), noise(3));
      const Answer want = call(in, {.causal = true});
      attend<T>(sizes, {}, noise(4), everywhere(NOT_A_NUMBER), everywhere(NOT_A_NUMBER));
      expect_same(call(in, {.causal = true}), want, "in a later call");
    });
  }

  TEST_CASE("what a key or a value holds reaches every query that may see it") {
    ask("A value has become NaN in one channel, or a key in all. Which queries see it, and did their outputs notice, "
        "in "
        "that channel and in no other?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const bool causal : {false, true}) {
        // In head h, key 12 h + 3 holds a NaN, of its value in channel 5 alone.
        const Sizes sizes{.heads = 6, .queries = 37, .keys = 70, .width = 16};
        const Fill keys = [](Index b, Index h, Index s, Index d) {
          return s == 12 * h + 3 ? NOT_A_NUMBER : noise(6)(b, h, s, d);
        };
        const Fill values = [](Index b, Index h, Index s, Index d) {
          return s == 12 * h + 3 && d == 5 ? NOT_A_NUMBER : noise(7)(b, h, s, d);
        };
        const Answer of_key = attend<T>(sizes, {.causal = causal}, noise(5), keys, noise(7));
        const Answer of_value = attend<T>(sizes, {.causal = causal}, noise(5), noise(6), values);
        const auto expect_nan = [&](const char* name, const Array& got, std::size_t at, bool want, Index h, Index i) {
          if (std::isnan(got.values[at]) == want) return true;
          finding(name, std::string(type_name<T>()) + ": of query " + std::to_string(i) + " is " +
                            (want ? "a number" : "NaN") + " in element " + std::to_string(at) + "; number " +
                            std::to_string(12 * h + 3) + " of the keys, or channel 5 of its value, is NaN; " +
                            sizes.text() + (causal ? ", causal" : ""));
          return false;
        };
        for (Index row = 0; row < 6 * 37; ++row) {
          const Index h = row / 37, i = row % 37;
          const bool sees = 12 * h + 3 < keys_seen(causal, i, 37, 70);
          if (!expect_nan("lse", of_key.lse, static_cast<std::size_t>(row), sees, h, i) ||
              !expect_nan("lse", of_value.lse, static_cast<std::size_t>(row), false, h, i)) {
            return;
          }
          for (Index d = 0; d < 16; ++d) {
            const auto at = static_cast<std::size_t>(row * 16 + d);
            if (!expect_nan("output", of_key.output, at, sees, h, i) ||
                !expect_nan("output", of_value.output, at, sees && d == 5, h, i)) {
              return;
            }
          }
        }
      }
    });
  }

  TEST_CASE("long sequences and many heads") {
    ask("The short ones are right. Which of your numbers has a limit that only a long sequence reaches?");
    if (kernels_are_checked() || !KATA_REAL_GPU) {
      attend<fp16>({.queries = 1, .keys = 1, .width = 16}, {}, noise(1), noise(2), noise(3));
      skip("needs a GPU: sequences up to 4096");
      return;
    }
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const bool causal : {false, true}) {
        for (const Sizes& sizes : {Sizes{2, 8, 256, 256, 64}, Sizes{1, 16, 512, 512, 128}, Sizes{4, 8, 1024, 1024, 64},
                                   Sizes{1, 2, 2048, 2048, 64}, Sizes{1, 1, 4096, 4096, 128}, Sizes{2, 3, 113, 203, 64},
                                   Sizes{1, 2, 127, 513, 128}, Sizes{1, 2, 1023, 1024, 64}}) {
          if (!expect_attention<T>(sizes, {.causal = causal}, noise(1), noise(2), noise(3), 24)) {
            finding("of", sizes.text() + (causal ? ", causal" : ""));
            return;
          }
        }
      }
    });
  }

  TEST_CASE("agrees with the float64 reference") {
    ask("Which of the cases agree, and what have the others in common?");
    for_each<FlashCase>(flash_cases(), [](const FlashCase& c) {
      for_both_types([&](auto type) {
        const auto in = inputs_of<decltype(type)>(c);
        if (is_finite(in)) expect_attention(in, options_of(c));
      });
    });
  }

  TEST_CASE("says what is wrong with bad arguments") {
    for_both_types([](auto type) {
      using T = decltype(type);
      DeviceBuffer<T> q("query", std::vector<T>(2 * 3 * 5 * 32, from_float<T>(0.5f)));
      DeviceBuffer<T> k("key", std::vector<T>(2 * 3 * 8 * 32, from_float<T>(0.5f)));
      DeviceBuffer<T> o("output", 2 * 3 * 5 * 32);
      DeviceBuffer<float> lse("lse", 2 * 3 * 5);
      using In = View<const T, 4>;
      const FlashForward<T> good{.query = In(q.data(), {2, 3, 5, 32}),
                                 .key = In(k.data(), {2, 3, 7, 32}),
                                 .value = In(k.data(), {2, 3, 7, 32}),
                                 .output = View<T, 4>(o.data(), {2, 3, 5, 32}),
                                 .lse = View<float, 3>(lse.data(), {2, 3, 5})};
      run_kernels([&] { flash_forward_mma(good); });
      const auto rejected = [&](const char* what, const char* argument, const auto& change) {
        expect_rejected(what, argument, [&] {
          FlashForward<T> bad = good;
          change(bad);
          flash_forward_mma(bad);
        });
      };
      rejected("a width of 24", "query", [](auto& p) { p.query = In(p.query.data(), {2, 3, 5, 24}); });
      rejected("a width of 8", "query", [](auto& p) { p.query = In(p.query.data(), {2, 3, 5, 8}); });
      rejected("keys of another width", "key", [](auto& p) { p.key = In(p.key.data(), {2, 3, 7, 16}); });
      rejected("keys of fewer heads", "key", [](auto& p) { p.key = In(p.key.data(), {2, 1, 7, 32}); });
      rejected("a value too few", "value", [](auto& p) { p.value = In(p.value.data(), {2, 3, 6, 32}); });
      rejected("a smaller output", "output", [](auto& p) { p.output = View<T, 4>(p.output.data(), {2, 3, 4, 32}); });
      rejected("a smaller lse", "lse", [](auto& p) { p.lse = View<float, 3>(p.lse.data(), {2, 3, 4}); });
      rejected("a scale that is NaN", "scale", [](auto& p) { p.scale = std::numeric_limits<float>::quiet_NaN(); });
      rejected("rows 20 elements apart", "key", [](auto& p) {
        p.key = In(p.key.data(), {2, 3, 7, 32}, {672, 224, 20, 1});
      });
      rejected("heads 228 elements apart", "value", [](auto& p) {
        p.value = In(p.value.data(), {2, 3, 7, 32}, {672, 228, 32, 1});
      });
      rejected("channels 2 elements apart", "query", [](auto& p) {
        p.query = In(p.query.data(), {2, 3, 5, 32}, {480, 160, 32, 2});
      });
      rejected("queries that begin 2 bytes late", "query", [](auto& p) {
        p.query = In(p.query.data() + 1, {2, 3, 5, 32});
      });
      rejected("an output that begins 8 bytes late", "output", [](auto& p) {
        p.output = View<T, 4>(p.output.data() + 4, {2, 3, 5, 32});
      });
    });
  }
}
