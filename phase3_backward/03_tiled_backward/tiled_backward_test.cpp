#include "tiled_backward.hpp"

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <utility>

#include "common/attention/reference.hpp"
#include "common/testing/allocations.hpp"
#include "common/testing/suite.hpp"
#include "common/testing/tile_cases.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr Index SIZE = sizeof(float);
constexpr LoopOrder ORDERS[] = {LoopOrder::keys_outside, LoopOrder::queries_outside};
const Axes QUERY = {"batch", "head", "query", "channel"};
const Axes KEY = {"batch", "head", "key", "channel"};

std::string text(LoopOrder order) { return order == LoopOrder::keys_outside ? "keys outside" : "queries outside"; }

// What the forward pass leaves behind, from the float64 reference.
struct Saved {
  Tensor<float, 4> output;
  Tensor<float, 3> lse;
};

Saved saved(const View<const float, 4>& q, const View<const float, 4>& k, const View<const float, 4>& v, bool causal,
            std::optional<float> scale = {}) {
  const auto widened = [](const View<const float, 4>& x) {
    const Array array = to_array(x);
    Tensor<double, 4> wide(x.shape());
    std::copy(array.values.begin(), array.values.end(), wide.data());
    return wide;
  };
  const Tensor<double, 4> query = widened(q), key = widened(k), value = widened(v);
  reference::Problem problem{.query = query, .key = key, .value = value, .causal = causal};
  if (scale) problem.scale = *scale;
  const reference::Forward forward = reference::forward(problem);
  Saved result{Tensor<float, 4>(forward.output.shape()), Tensor<float, 3>(forward.lse.shape())};
  const auto narrow = [](double x) { return static_cast<float>(x); };
  std::transform(forward.output.data(), forward.output.data() + forward.output.count(), result.output.data(), narrow);
  std::transform(forward.lse.data(), forward.lse.data() + forward.lse.count(), result.lse.data(), narrow);
  return result;
}

Saved saved(const AttentionCase& problem, const AttentionInputs& inputs) {
  return saved(inputs.query.heads(), inputs.key.heads(), inputs.value.heads(), problem.causal, problem.scale);
}

TiledBackwardOptions options_of(const TileCase& c, LoopOrder order) {
  return {.causal = c.problem.causal,
          .scale = c.problem.scale,
          .order = order,
          .block_rows = c.block_rows,
          .block_cols = c.block_cols,
          .threads = 1};
}

// The student's answer, of the shapes that the probes rely on.
TiledGradients gradients(const View<const float, 4>& q, const View<const float, 4>& k, const View<const float, 4>& v,
                         const View<const float, 4>& output, const View<const float, 3>& lse,
                         const View<const float, 4>& d_output, const TiledBackwardOptions& options) {
  TiledGradients got = tiled_backward(q, k, v, output, lse, d_output, options);
  const auto shaped = [](const char* name, const Tensor<float, 4>& gradient, const View<const float, 4>& of) {
    if (gradient.shape() == of.shape()) return;
    throw std::logic_error(std::string(name) + " has the shape " + to_text(gradient.shape()) + ", not " +
                           to_text(of.shape()));
  };
  shaped("dQ", got.query, q);
  shaped("dK", got.key, k);
  shaped("dV", got.value, v);
  return got;
}

TiledGradients answer(const AttentionInputs& inputs, const Saved& forward, const TokenTensor& d_output,
                      const TiledBackwardOptions& options) {
  return gradients(inputs.query.heads(), inputs.key.heads(), inputs.value.heads(), forward.output, forward.lse,
                   d_output.heads(), options);
}

// A problem with all that belongs to it. Probes change it in places.
struct Given {
  AttentionCase problem;
  AttentionInputs inputs;
  TokenTensor d_output;
  Saved forward;

  explicit Given(const AttentionCase& c)
      : problem(c), inputs(make_inputs(c)), d_output(make_output_gradient(c)), forward(saved(c, inputs)) {}
  Given(Index queries, Index keys, bool causal, int number)
      : Given(AttentionCase{.why = "",
                            .queries = queries,
                            .keys = keys,
                            .width = 3,
                            .value_width = 4,
                            .causal = causal,
                            .number = number}) {}

  TiledGradients call(const TiledBackwardOptions& options) const { return answer(inputs, forward, d_output, options); }
  ExpectedGradients expected() const { return expected_gradients(problem, inputs, d_output); }
};

// A numbered case and its gradients. Several test cases ask for them, and the reference takes its time.
struct Prepared {
  Given given;
  ExpectedGradients want;
};

const Prepared& prepared(const TileCase& c) {
  static std::map<int, Prepared> known;
  const auto place = known.find(c.problem.number);
  if (place != known.end()) return place->second;
  Given given(c.problem);
  ExpectedGradients want = given.expected();
  return known.emplace(c.problem.number, Prepared{std::move(given), std::move(want)}).first->second;
}

// Both loop orders are judged, so the first of them that goes wrong is the one to be recognised.
const Recognise recognise_tiled_backward(numbers(tile_cases()), [](int number) -> std::vector<Array> {
  const TileCase& c = tile_cases().at(static_cast<std::size_t>(number) - 1);
  const auto& [given, want] = prepared(c);
  const auto near = [](const Array& got, const Array& wanted, const Bound& bound) {
    for (std::size_t i = 0; i < got.count(); ++i) {
      const double allowed = 10.0 * bound.relative * bound.magnitude.values[i] + 1e-30;
      if (!(std::abs(got.values[i] - wanted.values[i]) <= allowed)) return false;
    }
    return true;
  };
  std::vector<Array> outputs;
  for (const LoopOrder order : ORDERS) {
    const TiledGradients got = given.call(options_of(c, order));
    outputs = {to_array(got.query), to_array(got.key), to_array(got.value)};
    if (!near(outputs[0], want.query, want.query_bound) || !near(outputs[1], want.key, want.key_bound) ||
        !near(outputs[2], want.value, want.value_bound)) {
      break;
    }
  }
  return outputs;
});

bool expect_gradients(const TiledGradients& got, const ExpectedGradients& want, LoopOrder order) {
  const bool query = expect_close("dQ", to_array(got.query), want.query, want.query_bound, QUERY);
  const bool key = expect_close("dK", to_array(got.key), want.key, want.key_bound, KEY);
  const bool value = expect_close("dV", to_array(got.value), want.value, want.value_bound, KEY);
  return expect(query && key && value, "loop order", text(order));
}

bool expect_same(const TiledGradients& got, const TiledGradients& want, const std::string& why) {
  const bool query = expect_same_bits("dQ", to_array(got.query), to_array(want.query), QUERY, why);
  const bool key = expect_same_bits("dK", to_array(got.key), to_array(want.key), KEY, why);
  return expect_same_bits("dV", to_array(got.value), to_array(want.value), KEY, why) && query && key;
}

// With a query of 0, a query that sees n keys gives each the weight 1/n. The rows of dO are unit vectors, so the rows
// of dV are the weights.
void expect_even_shares(const Cut& cut, bool causal, LoopOrder order) {
  const Tensor<float, 4> q = filled({1, 1, cut.queries, 2}, 0.0f);
  const Tensor<float, 4> k = normal({1, 1, cut.keys, 2}, 3);
  const Tensor<float, 4> v = normal({1, 1, cut.keys, cut.queries}, 4);
  Tensor<float, 4> d_output = filled({1, 1, cut.queries, cut.queries}, 0.0f);
  for (Index i = 0; i < cut.queries; ++i) d_output(0, 0, i, i) = 1.0f;
  const Saved forward = saved(q, k, v, causal);
  const TiledGradients got = gradients(
      q, k, v, forward.output, forward.lse, d_output,
      {.causal = causal, .order = order, .block_rows = cut.block_rows, .block_cols = cut.block_cols, .threads = 1});
  Array shares{{1, 1, cut.keys, cut.queries}, {}};
  for (Index j = 0; j < cut.keys; ++j) {
    for (Index i = 0; i < cut.queries; ++i) {
      const Index seen = keys_seen(causal, i, cut.queries, cut.keys);
      shares.values.push_back(j < seen ? 1.0 / static_cast<double>(seen) : 0.0);
    }
  }
  const Axes weights = {"batch", "head", "key", "query"};
  expect(expect_close("weights", to_array(got.value), shares, fp32_bound(shares, 1.0), weights), "tiles",
         std::to_string(cut.queries) + " queries, " + std::to_string(cut.keys) + " keys" + (causal ? ", causal" : "") +
             ", tiles of " + std::to_string(cut.block_rows) + " x " + std::to_string(cut.block_cols) + ", " +
             text(order));
}

// Bytes that a call may hold at the same time: the result, four more copies of it, the inputs twice (a copy in another
// layout, say, and one in another order), eight tiles of everything a thread works on, and change.
Index memory_budget(Index queries, Index keys, Index width, const TiledBackwardOptions& options) {
  const Index gradients = (queries + 2 * keys) * width;
  const Index inputs = (3 * queries + 2 * keys) * width + 2 * queries;
  const Index tiles = options.block_rows * options.block_cols + (options.block_rows + options.block_cols) * 4 * width;
  return SIZE * (5 * gradients + 2 * inputs + 8 * options.threads * tiles) + 64 * 1024;
}

std::string kibibytes(Index bytes) { return std::to_string(bytes / 1024) + " KiB"; }

Allocations memory_of(Index queries, Index keys, Index width, const TiledBackwardOptions& options) {
  const Tensor<float, 4> q = normal({1, 1, queries, width}, 5);
  const Tensor<float, 4> k = normal({1, 1, keys, width}, 6);
  const Tensor<float, 4> v = normal({1, 1, keys, width}, 7);
  const Tensor<float, 4> output = normal({1, 1, queries, width}, 8);
  const Tensor<float, 4> d_output = normal({1, 1, queries, width}, 9);
  Tensor<float, 3> lse({1, 1, queries});
  std::fill_n(lse.data(), queries, 30.0f);
  return allocations_of([&] { tiled_backward(q, k, v, output, lse, d_output, options); });
}

void expect_memory(Index queries, Index keys, Index width, const TiledBackwardOptions& options) {
  const Index budget = memory_budget(queries, keys, width, options);
  const Allocations used = memory_of(queries, keys, width, options);
  expect(used.peak <= budget, "memory",
         std::to_string(queries) + " x " + std::to_string(keys) + " in tiles of " + std::to_string(options.block_rows) +
             " x " + std::to_string(options.block_cols) + ", " + text(options.order) + ": " + kibibytes(used.peak) +
             " at once, the largest block " + kibibytes(used.largest) + "; want at most " + kibibytes(budget));
}

// Row tile r and column tile c of these queries and keys: query and key of such a pair have the product 1e60, which is
// more than a float holds, if no query of the tile may see any of its keys; otherwise 0. So have dO and value, if
// asked.
bool computes_forbidden_tile(const Cut& cut, LoopOrder order, bool in_values, Index only_row_tile,
                             Index only_col_tile) {
  const Index col_tiles = (cut.keys + cut.block_cols - 1) / cut.block_cols;
  Tensor<float, 4> high_rows = filled({1, 1, cut.queries, col_tiles}, 0.0f);
  Tensor<float, 4> high_cols = filled({1, 1, cut.keys, col_tiles}, 0.0f);
  for (Index j = 0; j < cut.keys; ++j) high_cols(0, 0, j, j / cut.block_cols) = 1e30f;
  for (Index i = 0; i < cut.queries; ++i) {
    const Index row_tile = i / cut.block_rows;
    const Index last = std::min(cut.queries, (row_tile + 1) * cut.block_rows) - 1;
    for (Index c = 0; c < col_tiles; ++c) {
      const bool forbidden = c * cut.block_cols >= keys_seen(true, last, cut.queries, cut.keys);
      const bool asked = only_row_tile < 0 || (row_tile == only_row_tile && c == only_col_tile);
      if (forbidden && asked) high_rows(0, 0, i, c) = 1e30f;
    }
  }
  const Tensor<float, 4> zeros = filled({1, 1, cut.queries, col_tiles}, 0.0f);  // queries, or dO; the output too
  const Tensor<float, 4> ones = filled({1, 1, cut.keys, col_tiles}, 1.0f);
  Tensor<float, 3> lse({1, 1, cut.queries});
  for (Index i = 0; i < cut.queries; ++i) {
    lse(0, 0, i) = std::log(static_cast<float>(keys_seen(true, i, cut.queries, cut.keys)));
  }
  std::feclearexcept(FE_ALL_EXCEPT);
  tiled_backward(in_values ? zeros : high_rows, in_values ? ones : high_cols, in_values ? high_cols : ones, zeros, lse,
                 in_values ? high_rows : zeros,
                 {.causal = true,
                  .scale = 1.0f,
                  .order = order,
                  .block_rows = cut.block_rows,
                  .block_cols = cut.block_cols,
                  .threads = 1});
  return std::fetestexcept(FE_OVERFLOW) != 0;
}

// The first tile of which it does, or nothing.
std::string forbidden_tile_computed(const Cut& cut, LoopOrder order, bool in_values) {
  if (!computes_forbidden_tile(cut, order, in_values, -1, -1)) return "";
  for (Index r = 0; r * cut.block_rows < cut.queries; ++r) {
    for (Index c = 0; c * cut.block_cols < cut.keys; ++c) {
      if (!computes_forbidden_tile(cut, order, in_values, r, c)) continue;
      return std::to_string(cut.queries) + " queries, " + std::to_string(cut.keys) + " keys, tiles of " +
             std::to_string(cut.block_rows) + " x " + std::to_string(cut.block_cols) + ", " + text(order) +
             ": row tile " + std::to_string(r) + " was multiplied with column tile " + std::to_string(c) +
             (in_values ? " for dP" : " for the scores");
    }
  }
  return "one that no query may see was multiplied";
}

}  // namespace

TEST_SUITE("phase3.03_tiled_backward") {
  TEST_CASE("two queries and two keys in tiles of one pair worked with a pencil in the README") {
    ask("Follow the README's example tile by tile. Which is the first of its numbers that yours differs from?");
    const float q[] = {1, 2}, k[] = {0, std::log(3.0f)}, v[] = {8, 0}, d_output[] = {1, 2}, output[] = {2, 0.8f};
    const float lse[] = {std::log(4.0f), std::log(10.0f)};
    const auto column = [](const float* x) { return View<const float, 4>(x, {1, 1, 2, 1}); };
    for (const LoopOrder order : ORDERS) {
      const TiledGradients got =
          gradients(column(q), column(k), column(v), column(output), View<const float, 3>(lse, {1, 1, 2}),
                    column(d_output), {.order = order, .block_rows = 1, .block_cols = 1, .threads = 1});
      const Array d_query{{1, 1, 2, 1}, {-1.5 * std::log(3.0), -1.44 * std::log(3.0)}};
      const Array d_key{{1, 1, 2, 1}, {4.38, -4.38}};
      const Array d_value{{1, 1, 2, 1}, {0.45, 2.55}};
      const Array ones{{1, 1, 2, 1}, {1, 1}};
      const bool query = expect_close("dQ", to_array(got.query), d_query, {1e-5, ones}, QUERY);
      const bool key = expect_close("dK", to_array(got.key), d_key, {1e-5, ones}, KEY);
      const bool value = expect_close("dV", to_array(got.value), d_value, {1e-5, ones}, KEY);
      if (!expect(query && key && value, "loop order", text(order))) return;
    }
  }

  TEST_CASE("a query of 0 shares its dO evenly among the keys that it sees") {
    ask("All scores are 0, so a query that sees n keys has the lse log(n). What weight do you make of that for each "
        "key, and which tile is the wrong one in?");
    for (const LoopOrder order : ORDERS)
      for (const Cut& cut : cuts()) expect_even_shares(cut, false, order);
  }

  TEST_CASE("under a causal mask only the keys up to a query's own place get a share") {
    ask("The last query stands at the last key. Which is the first query that sees the first key of a tile, and which "
        "tile holds that query? Do you draw the triangle where the forward pass drew it?");
    for (const LoopOrder order : ORDERS)
      for (const Cut& cut : cuts()) expect_even_shares(cut, true, order);
  }

  TEST_CASE("a key that matches far better than the others takes all of dO") {
    ask("One score is 1000 above the rest, so its weight is 1. Put it first, last, and at either side of a tile's "
        "edge: which place does yours miss? And can a weight of 1 move?");
    const Index keys = 21;
    Tensor<float, 4> v({1, 1, keys, 2});
    Tensor<float, 4> d_output({1, 1, 5, 2});
    for (Index j = 0; j < keys; ++j) v(0, 0, j, 0) = v(0, 0, j, 1) = static_cast<float>(j + 1);
    for (Index i = 0; i < 5; ++i) {
      d_output(0, 0, i, 0) = static_cast<float>(i + 1);
      d_output(0, 0, i, 1) = -2.0f;
    }
    for (const LoopOrder order : ORDERS) {
      for (Index winner = 0; winner < keys; ++winner) {
        const Tensor<float, 4> q = filled({1, 1, 5, 2}, 1.0f);
        Tensor<float, 4> k = filled({1, 1, keys, 2}, -250.0f);
        k(0, 0, winner, 0) = k(0, 0, winner, 1) = 250.0f;
        const Saved forward = saved(q, k, v, false, 1.0f);
        const TiledGradients got =
            gradients(q, k, v, forward.output, forward.lse, d_output,
                      {.scale = 1.0f, .order = order, .block_rows = 2, .block_cols = 8, .threads = 1});
        Array want{{1, 1, keys, 2}, std::vector<double>(42, 0.0)};
        want.values[static_cast<std::size_t>(2 * winner)] = 15.0;
        want.values[static_cast<std::size_t>(2 * winner + 1)] = -10.0;
        Array size = want;
        for (double& x : size.values) x = std::abs(x);
        const std::string all =
            "key " + std::to_string(winner) + " of 21 has all the weight, and nothing can change it";
        if (!expect_close("dV", to_array(got.value), want, {1e-5, size}, KEY) ||
            !expect_all("dQ", to_array(got.query), 0.0, 1e-3, QUERY, all) ||
            !expect_all("dK", to_array(got.key), 0.0, 1e-3, KEY, all)) {
          finding("winner", "key " + std::to_string(winner) + ", " + text(order));
          return;
        }
      }
    }
  }

  TEST_CASE("all of dO arrives at the values") {
    ask("The weights of a query add up to 1. So what must the rows of dV add up to, and what do yours?");
    for_each<TileCase>(tile_cases(), [](const TileCase& c) {
      const auto& [given, expected] = prepared(c);
      const Index queries = c.problem.queries, keys = c.problem.keys, width = c.problem.value_width;
      for (const LoopOrder order : ORDERS) {
        const TiledGradients got = given.call(options_of(c, order));
        Array sums{{c.problem.batch, c.problem.heads, width}, {}}, want = sums, size = sums;
        for (Index b = 0; b < c.problem.batch; ++b) {
          for (Index h = 0; h < c.problem.heads; ++h) {
            for (Index d = 0; d < width; ++d) {
              double sum = 0.0, arriving = 0.0, magnitude = 0.0;
              for (Index j = 0; j < keys; ++j) sum += static_cast<double>(got.value(b, h, j, d));
              for (Index i = 0; i < queries; ++i) {
                if (keys_seen(c.problem.causal, i, queries, keys) == 0) continue;
                const auto own = static_cast<double>(given.d_output.heads()(b, h, i, d));
                arriving += own;
                magnitude += std::abs(own);
              }
              sums.values.push_back(sum);
              want.values.push_back(arriving);
              size.values.push_back(magnitude);
            }
          }
        }
        if (!expect_close("sum of dV", sums, want, {expected.value_bound.relative, size},
                          {"batch", "head", "channel"})) {
          finding("loop order", text(order));
          return;
        }
      }
    });
  }

  TEST_CASE("adding one vector to all keys does not move dQ") {
    ask("The same vector added to every key raises all scores of a query alike, and its weights stay. dQ is the sum of "
        "dS times the keys: so what must the dS of one query add up to? Over which keys?");
    Given given(13, 22, false, 300);
    const AttentionInputs before = make_inputs(given.problem);
    for (Index j = 0; j < 22; ++j)
      for (Index d = 0; d < 3; ++d) given.inputs.key.heads()(0, 0, j, d) += static_cast<float>(d + 1);
    const Saved shifted = saved(given.problem, given.inputs);
    const Bound bound = given.expected().query_bound;
    for (const LoopOrder order : ORDERS) {
      const TiledBackwardOptions options{.order = order, .block_rows = 4, .block_cols = 5, .threads = 1};
      const Array want = to_array(answer(before, given.forward, given.d_output, options).query);
      const Array got = to_array(answer(given.inputs, shifted, given.d_output, options).query);
      if (!expect(expect_close("dQ", got, want, bound, QUERY), "loop order", text(order))) return;
      const Array reference = expected_gradients(given.problem, before, given.d_output).query;
      if (!expect(expect_close("dQ", want, reference, bound, QUERY), "loop order", text(order))) return;
    }
  }

  TEST_CASE("queries and keys play the same part") {
    ask("A score is scale times query times key. So the sum of dQ times Q and the sum of dK times K are both the sum "
        "of "
        "dS times S. Which of your two gradients has a factor that the other lacks?");
    for_each<TileCase>(tile_cases(), [](const TileCase& c) {
      const auto& [given, bounds] = prepared(c);
      const auto dot = [](const Array& gradient, const Array& x, bool size) {
        double sum = 0.0;
        for (std::size_t i = 0; i < x.count(); ++i) {
          sum += size ? std::abs(gradient.values[i] * x.values[i]) : gradient.values[i] * x.values[i];
        }
        return sum;
      };
      const Array q = to_array(given.inputs.query.heads()), k = to_array(given.inputs.key.heads());
      const double size = dot(bounds.query_bound.magnitude, q, true) + dot(bounds.key_bound.magnitude, k, true);
      // Neither is 0, or two zeros would agree.
      const Array want{{1}, {dot(bounds.query, q, false)}};
      const Bound bound{bounds.query_bound.relative, Array{{1}, {size}}};
      for (const LoopOrder order : ORDERS) {
        const TiledGradients got = given.call(options_of(c, order));
        const bool same = expect_close("dQ Q", Array{{1}, {dot(to_array(got.query), q, false)}}, want, bound, {"sum"});
        if (!expect_close("dK K", Array{{1}, {dot(to_array(got.key), k, false)}}, want, bound, {"sum"}) || !same) {
          finding("loop order", text(order));
          return;
        }
      }
    });
  }

  TEST_CASE("twice the dO gives twice the gradients to the bit") {
    ask("Double dO. What else in your formulas must double, and what must stay?");
    const TileCase& c = tile_cases().at(6);
    const AttentionInputs inputs = make_inputs(c.problem);
    TokenTensor d_output = make_output_gradient(c.problem);
    for (const LoopOrder order : ORDERS) {
      TiledGradients want = answer(inputs, saved(c.problem, inputs), d_output, options_of(c, order));
      TokenTensor twice = make_output_gradient(c.problem);
      const View<float, 4> view = twice.heads();
      for (Index i = 0; i < view.size(2); ++i)
        for (Index d = 0; d < view.size(3); ++d) view(0, 0, i, d) *= 2.0f;
      for (Tensor<float, 4>* gradient : {&want.query, &want.key, &want.value})
        for (Index n = 0; n < gradient->count(); ++n) gradient->data()[n] *= 2.0f;
      const TiledGradients got = answer(inputs, saved(c.problem, inputs), twice, options_of(c, order));
      if (!expect_same(got, want, "from twice what it was for half of this dO, " + text(order))) return;
    }
  }

  TEST_CASE("half of the keys with the lse and the output of all give their share") {
    ask("A call sees half of the keys, as on one of two machines, and is handed the lse and the output of all of them. "
        "Which numbers make weights of scores, and from where do you take them?");
    Given given(11, 20, false, 301);
    const ExpectedGradients want = given.expected();
    for (const LoopOrder order : ORDERS) {
      TiledGradients sum{Tensor<float, 4>({1, 1, 11, 3}), Tensor<float, 4>({1, 1, 20, 3}),
                         Tensor<float, 4>({1, 1, 20, 4})};
      std::fill_n(sum.query.data(), sum.query.count(), 0.0f);
      for (const auto& [first, count] : {std::pair<Index, Index>{0, 9}, {9, 11}}) {
        const auto half = [first = first, count = count](const View<const float, 4>& x) {
          return View<const float, 4>(&x(0, 0, first, 0), {1, 1, count, x.size(3)}, x.strides());
        };
        const AttentionInputs& inputs = given.inputs;
        const TokenTensor& d_output = given.d_output;
        const TiledGradients part = gradients(
            inputs.query.heads(), half(inputs.key.heads()), half(inputs.value.heads()), given.forward.output,
            given.forward.lse, d_output.heads(), {.order = order, .block_rows = 4, .block_cols = 4, .threads = 1});
        for (Index n = 0; n < sum.query.count(); ++n) sum.query.data()[n] += part.query.data()[n];
        std::copy_n(part.key.data(), part.key.count(), &sum.key(0, 0, first, 0));
        std::copy_n(part.value.data(), part.value.count(), &sum.value(0, 0, first, 0));
      }
      if (!expect_gradients(sum, want, order)) return;
    }
  }

  TEST_CASE("a query that may attend to nothing has gradients of 0 and gives none") {
    ask("A query that sees no key has the lse -inf. What is exp(score - lse) of such a query? Who writes its row of "
        "dQ, and does anything of its dO reach a key?");
    for_each<TileCase>(tile_cases(), [](const TileCase& c) {
      const Index queries = c.problem.queries, keys = c.problem.keys;
      Index empty = 0;  // the first so many
      while (empty < queries && keys_seen(c.problem.causal, empty, queries, keys) == 0) ++empty;
      if (empty == 0 && queries > 0) return;
      const AttentionInputs inputs = make_inputs(c.problem);
      AttentionInputs other = make_inputs(c.problem);
      const TokenTensor d_output = make_output_gradient(c.problem);
      TokenTensor other_d_output = make_output_gradient(c.problem);
      for (Index i = 0; i < empty; ++i) {
        for (Index d = 0; d < c.problem.width; ++d) other.query.heads()(0, 0, i, d) = 1e4f;
        for (Index d = 0; d < c.problem.value_width; ++d) other_d_output.heads()(0, 0, i, d) = -1e4f;
      }
      const Saved forward = saved(c.problem, inputs);
      for (const LoopOrder order : ORDERS) {
        const TiledGradients got = answer(inputs, forward, d_output, options_of(c, order));
        for (Index i = 0; i < empty; ++i) {
          const std::string what = "query " + std::to_string(i) + " may attend to nothing; " + text(order);
          if (!expect_all("dQ", to_array(got.query.view()[0][0][i]), 0.0, 0.0, {"channel"}, what)) return;
        }
        if (empty == queries) {
          const std::string what = "no query may attend to these keys; " + text(order);
          if (!expect_all("dK", to_array(got.key), 0.0, 0.0, KEY, what)) return;
          if (!expect_all("dV", to_array(got.value), 0.0, 0.0, KEY, what)) return;
        }
        const std::string why = "when the queries before " + std::to_string(empty) +
                                ", which may attend to nothing, changed; " + text(order);
        if (!expect_same(answer(other, forward, other_d_output, options_of(c, order)), got, why)) return;
      }
    });
  }

  TEST_CASE("a key that a query may not see cannot move its dQ whatever the key holds") {
    ask("A key that only later queries may see holds NaN. Follow it through every line of yours: where does it first "
        "meet the row of an earlier query?");
    for (const Cut& cut : {Cut{9, 9, 4, 4}, Cut{7, 11, 3, 4}, Cut{11, 7, 4, 3}, Cut{9, 9, 16, 16}}) {
      for (const LoopOrder order : ORDERS) {
        const TiledBackwardOptions options{
            .causal = true, .order = order, .block_rows = cut.block_rows, .block_cols = cut.block_cols, .threads = 1};
        Given given(cut.queries, cut.keys, true, 302);
        const TiledGradients want = given.call(options);
        const Array reference = given.expected().query;
        for (const float poison : {7.5f, -3e4f, INF, -INF, NOT_A_NUMBER}) {
          for (Index j = 0; j < cut.keys; ++j) {
            AttentionInputs poisoned = make_inputs(given.problem);
            for (Index d = 0; d < 3; ++d) poisoned.key.heads()(0, 0, j, d) = poison;
            for (Index d = 0; d < 4; ++d) poisoned.value.heads()(0, 0, j, d) = poison;
            const TiledGradients got = answer(poisoned, given.forward, given.d_output, options);
            for (Index i = 0; i < cut.queries && j >= keys_seen(true, i, cut.queries, cut.keys); ++i) {
              const std::string why = "of query " + std::to_string(i) + " when key " + std::to_string(j) +
                                      ", which it may not see, became " + std::to_string(poison) + "; " + text(order);
              const Array row = to_array(got.query.view()[0][0][i]);
              bool deaf = true;
              if (std::isfinite(poison)) {
                deaf = expect_same_bits("dQ", row, to_array(want.query.view()[0][0][i]), {"channel"}, why);
              } else {  // such a key may have to be treated in another way, which may round in another way
                for (std::size_t d = 0; d < 3; ++d) {
                  deaf =
                      deaf && std::abs(row.values[d] - reference.values[static_cast<std::size_t>(i) * 3 + d]) <= 1e-4;
                }
                expect(deaf, "dQ", "changed in channels " + why);
              }
              if (!deaf) return;
            }
          }
        }
      }
    }
  }

  TEST_CASE("a query that may not see a key cannot move its gradients") {
    ask("Query 3 may not see key 5. Change query 3 and its dO: which rows of dK and dV may move?");
    for (const Cut& cut : {Cut{9, 9, 4, 4}, Cut{7, 11, 3, 4}, Cut{11, 7, 4, 3}, Cut{9, 9, 16, 16}}) {
      for (const LoopOrder order : ORDERS) {
        const TiledBackwardOptions options{
            .causal = true, .order = order, .block_rows = cut.block_rows, .block_cols = cut.block_cols, .threads = 1};
        Given given(cut.queries, cut.keys, true, 303);
        const TiledGradients want = given.call(options);
        for (Index i = 0; i < cut.queries; ++i) {
          Given changed(cut.queries, cut.keys, true, 303);
          for (Index d = 0; d < 3; ++d) changed.inputs.query.heads()(0, 0, i, d) = 2.5f;
          for (Index d = 0; d < 4; ++d) changed.d_output.heads()(0, 0, i, d) = -40.0f;
          const TiledGradients got = answer(changed.inputs, given.forward, changed.d_output, options);
          for (Index j = keys_seen(true, i, cut.queries, cut.keys); j < cut.keys; ++j) {
            const std::string why = "of key " + std::to_string(j) + " when query " + std::to_string(i) +
                                    ", which may not see it, changed; " + text(order);
            const auto same = [&](std::string_view name, const Tensor<float, 4>& now, const Tensor<float, 4>& then) {
              return expect_same_bits(name, to_array(now.view()[0][0][j]), to_array(then.view()[0][0][j]), {"channel"},
                                      why);
            };
            if (!same("dK", got.key, want.key) || !same("dV", got.value, want.value)) return;
          }
        }
      }
    }
  }

  TEST_CASE("what a query or a key holds reaches whom it concerns") {
    ask("dO of one query, or one value, has become NaN. Which gradients are made of it, and did they notice?");
    for (const LoopOrder order : ORDERS) {
      for (const bool causal : {false, true}) {
        const TiledBackwardOptions options{
            .causal = causal, .order = order, .block_rows = 3, .block_cols = 3, .threads = 1};
        Given given(6, 8, causal, 304);  // changed in place: an answer may not be remembered by address
        const TiledGradients before = given.call(options);
        for (Index i = 0; i < 6; ++i) {
          for (Index j = 0; j < keys_seen(causal, i, 6, 8); ++j) {
            for (const float content : {50.0f, NOT_A_NUMBER}) {
              const auto reaches = [&](float& place, const auto& gradient) {
                const float old = std::exchange(place, content);
                const float now = gradient(given.call(options));
                place = old;
                return std::isnan(content) ? std::isnan(now) : now != gradient(before);
              };
              const auto told = [&](const std::string& sentence) {
                finding("gradients", sentence + " became " + std::to_string(content) + "; " + text(order) +
                                         (causal ? ", causal" : ""));
              };
              const std::string query = std::to_string(i), key = std::to_string(j);
              if (!reaches(given.d_output.heads()(0, 0, i, 2), [&](const auto& g) { return g.value(0, 0, j, 2); })) {
                return told("dV of key " + key + " did not notice that dO of query " + query);
              }
              if (!reaches(given.inputs.value.heads()(0, 0, j, 1),
                           [&](const auto& g) { return g.query(0, 0, i, 0); })) {
                return told("dQ of query " + query + " did not notice that the value of key " + key);
              }
              if (!reaches(given.inputs.query.heads()(0, 0, i, 1), [&](const auto& g) { return g.key(0, 0, j, 1); })) {
                return told("dK of key " + key + " did not notice that query " + query);
              }
            }
          }
        }
      }
    }
  }

  TEST_CASE("a tile that none of its queries may see is not even multiplied") {
    ask("Above the diagonal lie whole tiles that nobody may see. For a tile of keys, which is the first tile of "
        "queries "
        "worth visiting? For a tile of queries, which is the last tile of keys?");
    for (const LoopOrder order : ORDERS) {
      for (const Cut& cut : cuts()) {
        for (const bool in_values : {false, true}) {
          const std::string which = forbidden_tile_computed(cut, order, in_values);
          if (!expect(which.empty(), "tiles", which)) return;
        }
      }
    }
  }

  TEST_CASE("no matrix of queries by keys is kept in memory") {
    ask("How many numbers do you hold at once for 1024 queries and 1024 keys? Which of your buffers grows with both?");
    for (const LoopOrder order : ORDERS) {
      expect_memory(1024, 1024, 2, {.order = order, .block_rows = 32, .block_cols = 32, .threads = 2});
    }
  }

  TEST_CASE("no strip of a tile's queries by all keys or of its keys by all queries is kept in memory") {
    ask("Your tile has 128 queries. For how many keys at once do you hold their weights? And the other way round?");
    for (const LoopOrder order : ORDERS) {
      expect_memory(128, 3000, 1, {.order = order, .block_rows = 128, .block_cols = 16, .threads = 1});
      expect_memory(3000, 128, 1, {.order = order, .block_rows = 16, .block_cols = 128, .threads = 1});
    }
  }

  TEST_CASE("twice the length takes at most twice the memory") {
    ask("S has doubled. Which of your buffers has grown by more than that?");
    for (const LoopOrder order : ORDERS) {
      const TiledBackwardOptions options{
          .causal = true, .order = order, .block_rows = 32, .block_cols = 32, .threads = 1};
      const Index once = memory_of(192, 192, 4, options).peak;
      const Index twice = memory_of(384, 384, 4, options).peak;
      expect(once > 0 && twice <= 2 * once + 4096, "memory",
             kibibytes(once) + " for S = 192, " + kibibytes(twice) + " for S = 384; " + text(order));
    }
  }

  TEST_CASE("exchanging heads and batch items exchanges their gradients and nothing else") {
    ask("Head 2 of batch item 1 in another place. Which of your offsets, or of your sums, knows where it was?");
    const Tensor<float, 4> q = normal({1, 10, 11, 4}, 18), k = normal({1, 10, 13, 4}, 19),
                           v = normal({1, 10, 13, 3}, 20);
    const Tensor<float, 4> d_output = normal({1, 10, 11, 3}, 21);
    const auto from = [](Index b, Index h) { return (7 * (5 * b + h) + 3) % 10; };
    const auto exchanged = [&](const Tensor<float, 4>& x) { return arranged(x, 2, 5, from); };
    const Tensor<float, 4> other_q = exchanged(q), other_k = exchanged(k), other_v = exchanged(v);
    const Tensor<float, 4> other_d_output = exchanged(d_output);
    for (const LoopOrder order : ORDERS) {
      for (const bool causal : {false, true}) {
        const TiledBackwardOptions options{
            .causal = causal, .order = order, .block_rows = 4, .block_cols = 4, .threads = 1};
        const Saved forward = saved(q, k, v, causal), other = saved(other_q, other_k, other_v, causal);
        const TiledGradients got = gradients(q, k, v, forward.output, forward.lse, d_output, options);
        const TiledGradients want{exchanged(got.query), exchanged(got.key), exchanged(got.value)};
        const TiledGradients now =
            gradients(other_q, other_k, other_v, other.output, other.lse, other_d_output, options);
        if (!expect_same(now, want, "when ten heads became two batch items of five in another order; " + text(order)))
          return;
      }
    }
  }

  TEST_CASE("rows may lie anywhere in memory") {
    ask("How far apart in memory are two rows of this view? Two heads, if all share the same keys? The lse of two "
        "queries? And two rows of dO, if the loss is the sum of all outputs?");
    const Tensor<float, 4> memory = normal({9, 3, 2, 7}, 11);  // q, k and v are slices; heads share their keys
    const View<const float, 4> q(memory.data(), {2, 2, 9, 4}, {14, 7, 42, 1});
    const View<const float, 4> k(memory.data() + 2, {2, 2, 8, 4}, {14, 0, 42, 1});
    const View<const float, 4> v(memory.data() + 7, {2, 2, 8, 3}, {0, 14, 42, 1});
    const View<const float, 4> same_row(memory.data() + 5, {2, 2, 9, 3}, {0, 2, 0, 1});
    const View<const float, 4> apart(memory.data() + 3, {2, 2, 9, 3}, {14, 7, 42, 1});
    const auto packed = [](const View<const float, 4>& x) {
      const Array values = to_array(x);
      Tensor<float, 4> copy(x.shape());
      std::transform(values.values.begin(), values.values.end(), copy.data(),
                     [](double value) { return static_cast<float>(value); });
      return copy;
    };
    const Saved forward = saved(q, k, v, false);
    Tensor<float, 4> output({2, 9, 2, 3});  // [B, S, H, Dv]
    Tensor<float, 3> lse({9, 2, 2});        // [S, H, B]
    for (Index b = 0; b < 2; ++b)
      for (Index h = 0; h < 2; ++h)
        for (Index i = 0; i < 9; ++i) {
          lse(i, h, b) = forward.lse(b, h, i);
          for (Index d = 0; d < 3; ++d) output(b, i, h, d) = forward.output(b, h, i, d);
        }
    for (const LoopOrder order : ORDERS) {
      for (const View<const float, 4>& d_output : {same_row, apart}) {
        const TiledBackwardOptions options{.order = order, .block_rows = 4, .block_cols = 3, .threads = 1};
        const TiledGradients got = gradients(q, k, v, View<const float, 4>(output.data(), {2, 2, 9, 3}, {54, 3, 6, 1}),
                                             View<const float, 3>(lse.data(), {2, 2, 9}, {1, 2, 4}), d_output, options);
        const TiledGradients want =
            gradients(packed(q), packed(k), packed(v), forward.output, forward.lse, packed(d_output), options);
        if (!expect_same(got, want, "when the rows lay apart; " + text(order))) return;
      }
    }
  }

  TEST_CASE("any number of threads gives the same bits") {
    ask("Two tiles add to the same row of a gradient, one on each of two threads. Who reads the row while the other "
        "writes it? And in which order do the two come, the next time you call?");
    for (const bool causal : {false, true}) {
      for (const Shape<4>& shape : {Shape<4>{2, 2, 45, 4}, Shape<4>{1, 1, 400, 2}}) {
        const Tensor<float, 4> q = normal(shape, 12), k = normal(shape, 13), v = normal(shape, 14);
        const Tensor<float, 4> d_output = normal(shape, 15);
        Saved forward{normal(shape, 16), Tensor<float, 3>({shape[0], shape[1], shape[2]})};
        std::fill_n(forward.lse.data(), forward.lse.count(), 6.0f);  // any will do: bits are compared, not numbers
        for (const LoopOrder order : ORDERS) {
          TiledBackwardOptions options{
              .causal = causal, .order = order, .block_rows = 4, .block_cols = 8, .threads = 1};
          const auto call = [&] { return gradients(q, k, v, forward.output, forward.lse, d_output, options); };
          const TiledGradients want = call();
          // Many calls: who adds up in the order in which threads arrive is right every now and then.
          for (const int threads : {2, 3, 8, 0, 4, 64, 3, 3, 3, 3}) {
            options.threads = threads;
            if (!expect_same(call(), want, "with threads = " + std::to_string(threads) + "; " + text(order))) return;
          }
        }
      }
    }
  }

  TEST_CASE("a call leaves its inputs alone and the next call unmoved") {
    ask("Call it twice, with something else in between. What did the first call leave behind that the second adds to? "
        "And do you write into what is not yours?");
    const TileCase& c = tile_cases().at(6);
    Given given(1, 1, false, 305);
    for (const LoopOrder order : ORDERS) {
      const TiledBackwardOptions options = options_of(c, order);
      const AttentionInputs inputs = make_inputs(c.problem), before = make_inputs(c.problem);
      const TokenTensor d_output = make_output_gradient(c.problem), before_d_output = make_output_gradient(c.problem);
      const Saved forward = saved(c.problem, inputs), before_forward = saved(c.problem, inputs);
      const TiledGradients want = answer(inputs, forward, d_output, options);
      AttentionCase other = c.problem;
      other.number = 306;
      const AttentionInputs other_inputs = make_inputs(other);
      answer(other_inputs, saved(other, other_inputs), make_output_gradient(other), options);
      expect_same(answer(inputs, forward, d_output, options), want, "in a later call; " + text(order));
      const auto untouched = [&](std::string_view name, const View<const float, 4>& now,
                                 const View<const float, 4>& then) {
        expect_same_bits(name, to_array(now), to_array(then), {"batch", "head", "token", "channel"}, "by the call");
      };
      untouched("q", inputs.query.heads(), before.query.heads());
      untouched("k", inputs.key.heads(), before.key.heads());
      untouched("v", inputs.value.heads(), before.value.heads());
      untouched("output", forward.output, before_forward.output);
      untouched("d_output", d_output.heads(), before_d_output.heads());
      expect_same_bits("lse", to_array(forward.lse), to_array(before_forward.lse), {"batch", "head", "query"},
                       "by the call");
    }
  }

  TEST_CASE("1023 queries and 1024 keys under a causal mask") {
    ask("All scores are 0 and value j is j, as is key j: dQ of a query that sees n keys is the variance of 0 to n - 1. "
        "From which query on is it wrong, and which tile is that?");
    const Tensor<float, 4> q = filled({1, 1, 1023, 1}, 0.0f), d_output = filled({1, 1, 1023, 1}, 1.0f);
    Tensor<float, 4> v({1, 1, 1024, 1});
    std::iota(v.data(), v.data() + 1024, 0.0f);
    Tensor<float, 4> output({1, 1, 1023, 1});
    Tensor<float, 3> lse({1, 1, 1023});
    Array d_query{{1, 1, 1023, 1}, {}}, d_value{{1, 1, 1024, 1}, std::vector<double>(1024, 0.0)};
    for (Index i = 0; i < 1023; ++i) {
      const auto seen = static_cast<double>(i + 2);
      output(0, 0, i, 0) = static_cast<float>((seen - 1.0) / 2.0);
      lse(0, 0, i) = static_cast<float>(std::log(seen));
      d_query.values.push_back((seen * seen - 1.0) / 12.0);
      for (std::size_t j = 0; j < static_cast<std::size_t>(i + 2); ++j) d_value.values[j] += 1.0 / seen;
    }
    for (const LoopOrder order : ORDERS) {
      const TiledGradients got =
          gradients(q, v, v, output, lse, d_output,
                    {.causal = true, .order = order, .block_rows = 128, .block_cols = 96, .threads = 1});
      const bool query = expect_close("dQ", to_array(got.query), d_query, fp32_bound(d_query, 10.0), QUERY);
      const bool value = expect_close("dV", to_array(got.value), d_value, fp32_bound(d_value, 10.0), KEY);
      if (!expect(query && value, "loop order", text(order))) return;
    }
  }

  TEST_CASE("how attention is cut into tiles does not matter") {
    ask("The same problem in other tiles. Where do you use Br where Bc is meant, or a length where the end of a tile "
        "is "
        "meant?");
    for (const bool causal : {false, true}) {
      for (const Cut& shape : {Cut{13, 19, 0, 0}, Cut{19, 13, 0, 0}}) {
        const Given given(shape.queries, shape.keys, causal, 307);
        const ExpectedGradients want = given.expected();
        for (const LoopOrder order : ORDERS) {
          for (const Index rows : {1, 2, 3, 5, 8, 16, 64}) {
            for (const Index cols : {1, 2, 3, 5, 8, 16, 64}) {
              const TiledBackwardOptions options{
                  .causal = causal, .order = order, .block_rows = rows, .block_cols = cols, .threads = 1};
              if (!expect_gradients(given.call(options), want, order)) {
                finding("tiles", std::to_string(rows) + " x " + std::to_string(cols) + (causal ? ", causal" : ""));
                return;
              }
            }
          }
        }
      }
    }
  }

  TEST_CASE("agrees with the float64 reference") {
    for_each<TileCase>(tile_cases(), [](const TileCase& c) {
      const auto& [given, want] = prepared(c);
      for (const LoopOrder order : ORDERS) {
        if (!expect_gradients(given.call(options_of(c, order)), want, order)) return;
      }
    });
  }

  TEST_CASE("says what is wrong with bad arguments") {
    const Tensor<float, 4> q = normal({2, 3, 5, 4}, 15), k = normal({2, 3, 7, 4}, 16), v = normal({2, 3, 7, 6}, 17);
    const Tensor<float, 4> d_output = normal({2, 3, 5, 6}, 22);
    const Saved forward = saved(q, k, v, false);
    const View<const float, 4> o = forward.output;
    const View<const float, 3> lse = forward.lse;
    tiled_backward(q, k, v, o, lse, d_output);  // these are right
    const auto one = [](const Shape<4>& shape) { return filled(shape, 1.0f); };
    const auto rejected = [&](std::string_view what, std::string_view argument, const View<const float, 4>& query,
                              const View<const float, 4>& key, const View<const float, 4>& value) {
      expect_rejected(what, argument, [&] { tiled_backward(query, key, value, o, lse, d_output); });
    };
    rejected("a width of 0", "q", one({2, 3, 5, 0}), one({2, 3, 7, 0}), v);
    rejected("keys of another width", "k", q, one({2, 3, 7, 5}), v);
    rejected("keys of fewer heads", "k", q, one({2, 1, 7, 4}), v);
    rejected("keys of another batch", "k", q, one({1, 3, 7, 4}), v);
    rejected("a value too few", "v", q, k, one({2, 3, 6, 6}));
    rejected("values of fewer heads", "v", q, k, one({2, 2, 7, 6}));
    rejected("values of another batch", "v", q, k, one({3, 3, 7, 6}));
    rejected("values of another width than the output", "output", q, k, one({2, 3, 7, 5}));
    rejected("a query too many", "output", one({2, 3, 6, 4}), k, v);
    rejected("queries with a gap between channels", "q", View<const float, 4>(q.data(), {2, 3, 5, 2}, {60, 20, 4, 2}),
             one({2, 3, 7, 2}), v);
    rejected("values with a gap between channels", "v", q, k,
             View<const float, 4>(v.data(), {2, 3, 7, 6}, {126, 42, 1, 7}));
    const auto gradient = [&](std::string_view what, const View<const float, 4>& other) {
      expect_rejected(what, "d_output", [&] { tiled_backward(q, k, v, o, lse, other); });
      expect_rejected(what, "output", [&] { tiled_backward(q, k, v, other, lse, d_output); });
    };
    gradient("one query less", one({2, 3, 4, 6}));
    gradient("another width", one({2, 3, 5, 4}));
    gradient("another batch", one({1, 3, 5, 6}));
    gradient("a gap between channels", View<const float, 4>(o.data(), {2, 3, 5, 6}, {90, 30, 1, 5}));
    expect_rejected("an lse too few", "lse", [&] {
      tiled_backward(q, k, v, o, View<const float, 3>(lse.data(), {2, 3, 4}), d_output);
    });
    expect_rejected("an lse for each key", "lse", [&] {
      tiled_backward(q, k, v, o, Tensor<float, 3>({2, 3, 7}), d_output);
    });
    const auto with = [&](const TiledBackwardOptions& options) { tiled_backward(q, k, v, o, lse, d_output, options); };
    expect_rejected("no row in a tile", "block_rows", [&] { with({.block_rows = 0}); });
    expect_rejected("a negative number of columns in a tile", "block_cols", [&] { with({.block_cols = -8}); });
    expect_rejected("a negative number of threads", "threads", [&] { with({.threads = -1}); });
    expect_rejected("a scale that is NaN", "scale", [&] { with({.scale = NOT_A_NUMBER}); });
    expect_rejected("an infinite scale", "scale", [&] { with({.scale = INF}); });
  }
}
