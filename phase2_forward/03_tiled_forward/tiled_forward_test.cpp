#include "tiled_forward.hpp"

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <limits>
#include <numeric>

#include "common/testing/allocations.hpp"
#include "common/testing/tile_cases.hpp"
#include "phase2_forward/suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr Index SIZE = sizeof(float);
const Axes OUTPUT = {"batch", "head", "query", "channel"};
const Axes LSE = {"batch", "head", "query"};

TiledOptions options_of(const TileCase& c) {
  return {.causal = c.problem.causal,
          .scale = c.problem.scale,
          .block_rows = c.block_rows,
          .block_cols = c.block_cols,
          .threads = 1};
}

TiledResult answer(const AttentionInputs& inputs, const TiledOptions& options) {
  const AttentionInputs& const_inputs = inputs;
  return tiled_forward(const_inputs.query.heads(), const_inputs.key.heads(), const_inputs.value.heads(), options);
}

const Recognise recognise_tiled_forward(numbers(tile_cases()), [](int number) -> std::vector<Array> {
  const TileCase& c = tile_cases().at(static_cast<std::size_t>(number) - 1);
  const TiledResult result = answer(make_inputs(c.problem), options_of(c));
  return {to_array(result.output), to_array(result.lse)};
});

bool expect_attention(const TiledResult& got, const Expected& want) {
  constexpr double eps = std::numeric_limits<float>::epsilon();
  const double largest_score = (want.output_bound.relative - 1e-5) / (2.0 * eps);
  const bool lse = expect_close("lse", to_array(got.lse), want.lse, lse_bound(want.lse, largest_score), LSE);
  return expect_close("output", to_array(got.output), want.output, want.output_bound, OUTPUT) && lse;
}

bool expect_same(const TiledResult& got, const TiledResult& want, const std::string& why) {
  const bool output = expect_same_bits("output", to_array(got.output), to_array(want.output), OUTPUT, why);
  return expect_same_bits("lse", to_array(got.lse), to_array(want.lse), LSE, why) && output;
}

// With a query of 0, a query that sees n keys gives each the weight 1/n and has the lse log(n). The values are unit
// vectors, so the output is the weights.
void expect_even_shares(Index queries, Index keys, const TiledOptions& options) {
  const Tensor<float, 4> q = filled({1, 1, queries, 2}, 0.0f);
  const Tensor<float, 4> k = normal({1, 1, keys, 2}, 3);
  Tensor<float, 4> v = filled({1, 1, keys, keys}, 0.0f);
  for (Index j = 0; j < keys; ++j) v(0, 0, j, j) = 1.0f;
  const TiledResult result = tiled_forward(q, k, v, options);

  Array output{{1, 1, queries, keys}, {}};
  Array lse{{1, 1, queries}, {}};
  for (Index i = 0; i < queries; ++i) {
    const Index seen = keys_seen(options.causal, i, queries, keys);
    for (Index j = 0; j < keys; ++j) output.values.push_back(j < seen ? 1.0 / static_cast<double>(seen) : 0.0);
    lse.values.push_back(std::log(static_cast<double>(seen)));
  }
  const Axes weights = {"batch", "head", "query", "key"};
  const bool same = expect_close("weights", to_array(result.output), output, fp32_bound(output, 0.0), weights);
  if (!expect_close("lse", to_array(result.lse), lse, lse_bound(lse, 0.0), LSE) || !same) {
    finding("tiles", std::to_string(queries) + " queries, " + std::to_string(keys) + " keys" +
                         (options.causal ? ", causal" : "") + ", tiles of " + std::to_string(options.block_rows) +
                         " x " + std::to_string(options.block_cols));
  }
}

// Bytes that a call may hold at the same time: the result, the inputs twice (a copy in another layout, say, and one in
// another order), eight tiles of everything a thread works on, and change.
Index memory_budget(const View<const float, 4>& q, const View<const float, 4>& k, const View<const float, 4>& v,
                    const TiledOptions& options) {
  const Index result = q.size(0) * q.size(1) * q.size(2) * (v.size(3) + 1);
  const Index inputs = q.count() + k.count() + v.count();
  const Index widths = q.size(3) + v.size(3) + 4;
  const Index tiles = options.block_rows * options.block_cols + (options.block_rows + options.block_cols) * widths;
  return SIZE * (result + 2 * inputs + 8 * options.threads * tiles) + 64 * 1024;
}

Allocations memory_of(const Shape<4>& queries, const Shape<4>& keys, const TiledOptions& options, Index& budget) {
  const Tensor<float, 4> q = normal(queries, 5);
  const Tensor<float, 4> k = normal(keys, 6);
  const Tensor<float, 4> v = normal(keys, 7);
  budget = memory_budget(q, k, v, options);
  return allocations_of([&] { tiled_forward(q, k, v, options); });
}

std::string kibibytes(Index bytes) { return std::to_string(bytes / 1024) + " KiB"; }

// Row tile r and column tile c of these queries and keys: query and key of such a pair have the product 1e60, which is
// more than a float holds, if no query of the tile may see any of its keys; otherwise 0.
bool computes_forbidden_tile(const Cut& cut, Index only_row_tile, Index only_col_tile) {
  const Index col_tiles = (cut.keys + cut.block_cols - 1) / cut.block_cols;
  Tensor<float, 4> q = filled({1, 1, cut.queries, col_tiles}, 0.0f);
  Tensor<float, 4> k = filled({1, 1, cut.keys, col_tiles}, 0.0f);
  const Tensor<float, 4> v = filled({1, 1, cut.keys, 1}, 1.0f);
  for (Index j = 0; j < cut.keys; ++j) k(0, 0, j, j / cut.block_cols) = 1e30f;
  for (Index i = 0; i < cut.queries; ++i) {
    const Index row_tile = i / cut.block_rows;
    const Index last = std::min(cut.queries, (row_tile + 1) * cut.block_rows) - 1;
    for (Index c = 0; c < col_tiles; ++c) {
      const bool forbidden = c * cut.block_cols >= keys_seen(true, last, cut.queries, cut.keys);
      const bool asked = only_row_tile < 0 || (row_tile == only_row_tile && c == only_col_tile);
      if (forbidden && asked) q(0, 0, i, c) = 1e30f;
    }
  }
  std::feclearexcept(FE_ALL_EXCEPT);
  tiled_forward(
      q, k, v,
      {.causal = true, .scale = 1.0f, .block_rows = cut.block_rows, .block_cols = cut.block_cols, .threads = 1});
  return std::fetestexcept(FE_OVERFLOW) != 0;
}

}  // namespace

TEST_SUITE("phase2.03_tiled_forward") {
  TEST_CASE("two queries and four keys in tiles of two, worked with a pencil in the README") {
    ask("Follow the README's example tile by tile. Which is the first of its numbers that yours differs from?");
    Tensor<float, 4> q = filled({1, 1, 2, 1}, 1.0f);
    Tensor<float, 4> k({1, 1, 4, 1});
    Tensor<float, 4> v({1, 1, 4, 1});
    const float keys[] = {1, 2, 4, 3};
    const float values[] = {8, 0, 4, 2};
    for (Index j = 0; j < 4; ++j) {
      k(0, 0, j, 0) = keys[j];
      v(0, 0, j, 0) = values[j];
    }
    q(0, 0, 1, 0) = -1.0f;
    const TiledResult result = tiled_forward(q, k, v, {.block_rows = 2, .block_cols = 2, .threads = 1});
    const Array output{{1, 1, 2, 1}, {3.30589, 5.45384}};
    const Array lse{{1, 1, 2}, {4.4402, -0.5598}};
    expect_close("output", to_array(result.output), output, {2e-5, output}, OUTPUT);
    expect_close("lse", to_array(result.lse), lse, {2e-4, Array{{1, 1, 2}, {1, 1}}}, LSE);
  }

  TEST_CASE("a query of 0 shares evenly among the keys that it sees") {
    ask("All scores are 0. How many keys does this query see, and how many are in its sum? exp(lse) counts them for "
        "you.");
    for (const Cut& cut : cuts()) {
      expect_even_shares(cut.queries, cut.keys,
                         {.block_rows = cut.block_rows, .block_cols = cut.block_cols, .threads = 1});
    }
  }

  TEST_CASE("under a causal mask a query sees the keys up to its own place") {
    ask("The last query stands at the last key. Which is the last key that the last query of a tile sees, which tile "
        "holds it, and which keys of that tile does the first query see?");
    for (const Cut& cut : cuts()) {
      expect_even_shares(cut.queries, cut.keys,
                         {.causal = true, .block_rows = cut.block_rows, .block_cols = cut.block_cols, .threads = 1});
    }
  }

  TEST_CASE("a key that matches far better than the others gives its value alone") {
    ask("One score is 1000 above the rest. Put it first, last, and at either side of a tile's edge: which place does "
        "yours miss?");
    const Index keys = 21;
    Tensor<float, 4> v({1, 1, keys, 2});
    for (Index j = 0; j < keys; ++j) v(0, 0, j, 0) = v(0, 0, j, 1) = static_cast<float>(j + 1);
    for (Index winner = 0; winner < keys; ++winner) {
      const Tensor<float, 4> q = filled({1, 1, 5, 2}, 1.0f);
      Tensor<float, 4> k = filled({1, 1, keys, 2}, -250.0f);
      k(0, 0, winner, 0) = k(0, 0, winner, 1) = 250.0f;
      const TiledResult result =
          tiled_forward(q, k, v, {.scale = 1.0f, .block_rows = 2, .block_cols = 8, .threads = 1});
      const bool won = expect_all("output", to_array(result.output), static_cast<double>(winner + 1), 1e-4, OUTPUT,
                                  "key " + std::to_string(winner) + " of 21 should win alone");
      if (!won || !expect_all("lse", to_array(result.lse), 500.0, 1e-3, LSE, "one score of 500 is left")) return;
    }
  }

  TEST_CASE("values of one give an output of one") {
    ask("What do the weights of a query add up to? After the last tile, which keys are in the number that you divide "
        "by?");
    for_each<TileCase>(tile_cases(), [](const TileCase& c) {
      AttentionInputs inputs = make_inputs(c.problem);
      const View<float, 4> v = inputs.value.heads();
      for (Index b = 0; b < v.size(0); ++b)
        for (Index h = 0; h < v.size(1); ++h)
          for (Index j = 0; j < v.size(2); ++j)
            for (Index d = 0; d < v.size(3); ++d) v(b, h, j, d) = 1.0f;
      const TiledResult result = answer(inputs, options_of(c));
      Array want{{c.problem.batch, c.problem.heads, c.problem.queries, c.problem.value_width}, {}};
      for (Index row = 0; row < c.problem.batch * c.problem.heads * c.problem.queries; ++row) {
        const Index i = row % c.problem.queries;
        const bool any = keys_seen(c.problem.causal, i, c.problem.queries, c.problem.keys) > 0;
        want.values.insert(want.values.end(), static_cast<std::size_t>(c.problem.value_width), any ? 1.0 : 0.0);
      }
      expect_close("output", to_array(result.output), want, {5e-6, want}, OUTPUT);
    });
  }

  TEST_CASE("a query that may attend to nothing has output 0 and an lse of -inf") {
    ask("A tile of queries sees no key at all. Who writes its rows, and what are the maximum and the sum of nothing?");
    for_each<TileCase>(tile_cases(), [](const TileCase& c) {
      const TiledResult result = answer(make_inputs(c.problem), options_of(c));
      for (Index i = 0; i < c.problem.queries; ++i) {
        if (keys_seen(c.problem.causal, i, c.problem.queries, c.problem.keys) > 0) continue;
        const std::string what = "query " + std::to_string(i) + " may attend to nothing";
        const Array output = to_array(result.output.view()[0][0][i]);
        if (!expect_all("output", output, 0.0, 0.0, {"channel"}, what)) return;
        if (!expect(result.lse(0, 0, i) == -INF, "lse", what + ", got " + std::to_string(result.lse(0, 0, i)))) return;
      }
    });
  }

  TEST_CASE("how attention is cut into tiles does not matter") {
    ask("The same problem in other tiles. Where do you use Br where Bc is meant, or a length where the end of a tile "
        "is "
        "meant?");
    for (const bool causal : {false, true}) {
      for (const Cut& shape : {Cut{13, 19, 0, 0}, Cut{19, 13, 0, 0}}) {
        AttentionCase problem{.why = "", .queries = shape.queries, .keys = shape.keys, .width = 3, .value_width = 5};
        problem.causal = causal;
        problem.number = 200;
        const AttentionInputs inputs = make_inputs(problem);
        const Expected want = expected(problem, inputs);
        for (const Index rows : {1, 2, 3, 5, 8, 16, 64}) {
          for (const Index cols : {1, 2, 3, 5, 8, 16, 64}) {
            const TiledOptions options{.causal = causal, .block_rows = rows, .block_cols = cols, .threads = 1};
            if (!expect_attention(answer(inputs, options), want)) {
              finding("tiles", std::to_string(rows) + " x " + std::to_string(cols) + (causal ? ", causal" : ""));
              return;
            }
          }
        }
      }
    }
  }

  TEST_CASE("a key that a query may not see cannot move its output, whatever the key holds") {
    ask("A key that only later queries may see holds NaN. Follow it through every line of yours: where does it first "
        "meet the row of an earlier query?");
    for (const Cut& cut : {Cut{9, 9, 4, 4}, Cut{7, 11, 3, 4}, Cut{11, 7, 4, 3}, Cut{9, 9, 16, 16}}) {
      AttentionCase problem{.why = "", .queries = cut.queries, .keys = cut.keys, .width = 3, .value_width = 4};
      problem.causal = true;
      problem.number = 201;
      const TiledOptions options{
          .causal = true, .block_rows = cut.block_rows, .block_cols = cut.block_cols, .threads = 1};
      const AttentionInputs clean = make_inputs(problem);
      const TiledResult want = answer(clean, options);
      const Expected reference = expected(problem, clean);
      for (const float poison : {7.5f, -3e4f, INF, -INF, NOT_A_NUMBER}) {
        for (Index j = 0; j < cut.keys; ++j) {
          AttentionInputs poisoned = make_inputs(problem);
          for (Index d = 0; d < 3; ++d) poisoned.key.heads()(0, 0, j, d) = poison;
          for (Index d = 0; d < 4; ++d) poisoned.value.heads()(0, 0, j, d) = poison;
          const TiledResult got = answer(poisoned, options);
          for (Index i = 0; i < cut.queries && j >= keys_seen(true, i, cut.queries, cut.keys); ++i) {
            const std::string why = "of query " + std::to_string(i) + " when key " + std::to_string(j) +
                                    ", which it may not see, became " + std::to_string(poison);
            const Array row = to_array(got.output.view()[0][0][i]);
            bool deaf = true;
            if (std::isfinite(poison)) {
              deaf = expect_same_bits("output", row, to_array(want.output.view()[0][0][i]), {"channel"}, why);
            } else {  // such a value may have to be treated in another way, which may round in another way
              for (std::size_t d = 0; d < 4; ++d) {
                const double difference = row.values[d] - reference.output.values[static_cast<std::size_t>(i) * 4 + d];
                deaf = deaf && std::abs(difference) <= 1e-4;
              }
              expect(deaf, "output", "changed in channels " + why);
            }
            deaf = deaf && expect_same_bits("lse", Array{{1}, {got.lse(0, 0, i)}}, Array{{1}, {want.lse(0, 0, i)}},
                                            {"query"}, why);
            if (!deaf) return;
          }
        }
      }
    }
  }

  TEST_CASE("what a key holds reaches every query that may see it") {
    ask("The value of a key has changed, or has become NaN. Which queries see that key, and did their outputs notice?");
    for (const bool causal : {false, true}) {
      AttentionCase problem{.why = "", .queries = 9, .keys = 11, .width = 3, .value_width = 4};
      problem.causal = causal;
      problem.number = 203;
      const TiledOptions options{.causal = causal, .block_rows = 4, .block_cols = 4, .threads = 1};
      AttentionInputs inputs = make_inputs(problem);  // changed in place: an answer may not be remembered by address
      const TiledResult before = answer(inputs, options);
      for (Index j = 0; j < 11; ++j) {
        for (const float content : {50.0f, NOT_A_NUMBER}) {
          float& value = inputs.value.heads()(0, 0, j, 2);
          const float old = value;
          value = content;
          const TiledResult got = answer(inputs, options);
          value = old;
          for (Index i = 0; i < 9; ++i) {
            if (j >= keys_seen(causal, i, 9, 11)) continue;
            const float output = got.output(0, 0, i, 2);
            if (std::isnan(content) ? std::isnan(output) : output > before.output(0, 0, i, 2)) continue;
            finding("output", "of query " + std::to_string(i) + " did not notice that the value of key " +
                                  std::to_string(j) + " became " + std::to_string(content) +
                                  (causal ? ", causal" : ""));
            return;
          }
        }
      }
    }
  }

  TEST_CASE("a tile that none of its queries may see is not even multiplied") {
    ask("Above the diagonal lie whole tiles that nobody may see. For a tile of queries, which is the last tile of keys "
        "worth visiting?");
    for (const Cut& cut : cuts()) {
      if (!computes_forbidden_tile(cut, -1, -1)) continue;
      // Which one?
      for (Index r = 0; r * cut.block_rows < cut.queries; ++r) {
        for (Index c = 0; c * cut.block_cols < cut.keys; ++c) {
          if (!computes_forbidden_tile(cut, r, c)) continue;
          finding("tiles", std::to_string(cut.queries) + " queries, " + std::to_string(cut.keys) + " keys, tiles of " +
                               std::to_string(cut.block_rows) + " x " + std::to_string(cut.block_cols) + ": row tile " +
                               std::to_string(r) + " was multiplied with column tile " + std::to_string(c));
          return;
        }
      }
      finding("tiles", "one that no query may see was multiplied");
      return;
    }
  }

  TEST_CASE("no matrix of queries by keys is kept in memory") {
    ask("How many numbers do you hold at once for 512 queries and 512 keys? Which of your buffers grows with both?");
    const TiledOptions options{.block_rows = 16, .block_cols = 16, .threads = 2};
    Index budget = 0;
    const Allocations square = memory_of({1, 1, 512, 8}, {1, 1, 512, 8}, options, budget);
    expect(square.peak <= budget, "memory",
           "512 x 512 in tiles of 16 x 16: " + kibibytes(square.peak) + " at once, the largest block " +
               kibibytes(square.largest) + "; want at most " + kibibytes(budget));
  }

  TEST_CASE("no strip of queries by all keys is kept in memory") {
    ask("Your tile has 128 queries. For how many keys at once do you hold their scores? What did step 01 do instead?");
    const TiledOptions options{.block_rows = 128, .block_cols = 16, .threads = 1};
    Index budget = 0;
    const Allocations strip = memory_of({1, 1, 128, 1}, {1, 1, 3000, 1}, options, budget);
    expect(strip.peak <= budget, "memory",
           "128 x 3000 in tiles of 128 x 16: " + kibibytes(strip.peak) + " at once, the largest block " +
               kibibytes(strip.largest) + "; want at most " + kibibytes(budget));
  }

  TEST_CASE("twice the length takes at most twice the memory") {
    ask("S has doubled. Which of your buffers has grown by more than that?");
    const TiledOptions options{.causal = true, .block_rows = 32, .block_cols = 32, .threads = 1};
    Index budget = 0;
    const Index once = memory_of({1, 1, 192, 4}, {1, 1, 192, 4}, options, budget).peak;
    const Index twice = memory_of({1, 1, 384, 4}, {1, 1, 384, 4}, options, budget).peak;
    expect(once > 0 && twice <= 2 * once + 4096, "memory",
           kibibytes(once) + " for S = 192, " + kibibytes(twice) + " for S = 384");
  }

  TEST_CASE("heads and batch items know nothing of each other") {
    ask("Head 2 of batch item 1, alone and among others. Which of your offsets knows how many there are?");
    for (const bool causal : {false, true}) {
      const Tensor<float, 4> q = normal({2, 5, 11, 4}, 8);
      const Tensor<float, 4> k = normal({2, 5, 13, 4}, 9);
      const Tensor<float, 4> v = normal({2, 5, 13, 3}, 10);
      const TiledOptions options{.causal = causal, .block_rows = 4, .block_cols = 4, .threads = 1};
      const TiledResult all = tiled_forward(q, k, v, options);
      for (Index b = 0; b < 2; ++b) {
        for (Index h = 0; h < 5; ++h) {
          const auto alone = [&](const Tensor<float, 4>& x) {
            return View<const float, 4>(&x(b, h, 0, 0), {1, 1, x.size(2), x.size(3)});
          };
          const TiledResult one = tiled_forward(alone(q), alone(k), alone(v), options);
          const std::string why = "of batch item " + std::to_string(b) + ", head " + std::to_string(h) +
                                  " when it was computed among others";
          const bool same =
              expect_same_bits("output", to_array(all.output.view()[b][h]), to_array(one.output.view()[0][0]),
                               {"query", "channel"}, why) &&
              expect_same_bits("lse", to_array(all.lse.view()[b][h]), to_array(one.lse.view()[0][0]), {"query"}, why);
          if (!same) return;
        }
      }
    }
  }

  TEST_CASE("rows may lie anywhere in memory") {
    ask("How far apart in memory are two rows of this view? And two heads, if all share the same keys?");
    const Tensor<float, 4> memory = normal({9, 3, 2, 7}, 11);  // q, k and v are slices; heads share their keys
    const View<const float, 4> q(memory.data(), {2, 2, 9, 4}, {14, 7, 42, 1});
    const View<const float, 4> k(memory.data() + 2, {2, 2, 8, 4}, {14, 0, 42, 1});
    const View<const float, 4> v(memory.data() + 7, {2, 2, 8, 3}, {0, 14, 42, 1});
    const auto packed = [](const View<const float, 4>& x) {
      Tensor<float, 4> copy(x.shape());
      for (Index b = 0; b < x.size(0); ++b)
        for (Index h = 0; h < x.size(1); ++h)
          for (Index s = 0; s < x.size(2); ++s)
            for (Index d = 0; d < x.size(3); ++d) copy(b, h, s, d) = x(b, h, s, d);
      return copy;
    };
    const TiledOptions options{.block_rows = 4, .block_cols = 3, .threads = 1};
    expect_same(tiled_forward(q, k, v, options), tiled_forward(packed(q), packed(k), packed(v), options),
                "when the rows lay apart");
  }

  TEST_CASE("any number of threads gives the same bits") {
    ask("One thread, two, eight: the same tiles. What do two threads share that one of them writes?");
    for (const bool causal : {false, true}) {
      const Tensor<float, 4> q = normal({2, 2, 29, 4}, 12);
      const Tensor<float, 4> k = normal({2, 2, 33, 4}, 13);
      const Tensor<float, 4> v = normal({2, 2, 33, 4}, 14);
      TiledOptions options{.causal = causal, .block_rows = 4, .block_cols = 8, .threads = 1};
      const TiledResult want = tiled_forward(q, k, v, options);
      for (const int threads : {2, 3, 8, 0, 4, 64}) {
        options.threads = threads;
        if (!expect_same(tiled_forward(q, k, v, options), want, "with threads = " + std::to_string(threads))) return;
      }
    }
  }

  TEST_CASE("a call leaves its inputs alone and the next call unmoved") {
    ask("Call it twice, with something else in between. What is left over from the first call? And do you write into "
        "what is not yours?");
    const AttentionCase& problem = tile_cases().at(6).problem;
    const TiledOptions options = options_of(tile_cases().at(6));
    const AttentionInputs inputs = make_inputs(problem);
    const AttentionInputs before = make_inputs(problem);
    const TiledResult want = answer(inputs, options);
    AttentionCase other = problem;
    other.number = 202;
    answer(make_inputs(other), options);
    expect_same(answer(inputs, options), want, "in a later call");
    const Axes axes = {"batch", "head", "token", "channel"};
    expect_same_bits("q", to_array(inputs.query.heads()), to_array(before.query.heads()), axes, "by the call");
    expect_same_bits("k", to_array(inputs.key.heads()), to_array(before.key.heads()), axes, "by the call");
    expect_same_bits("v", to_array(inputs.value.heads()), to_array(before.value.heads()), axes, "by the call");
  }

  TEST_CASE("1023 queries and 1024 keys under a causal mask") {
    ask("All scores are 0, so lse is the logarithm of how many keys a query sees. From which query on is it wrong, and "
        "which tile is that?");
    const Tensor<float, 4> q = filled({1, 1, 1023, 1}, 0.0f);
    const Tensor<float, 4> k = filled({1, 1, 1024, 1}, 1.0f);
    Tensor<float, 4> v({1, 1, 1024, 1});
    for (Index j = 0; j < 1024; ++j) v(0, 0, j, 0) = static_cast<float>(j);
    const TiledResult result =
        tiled_forward(q, k, v, {.causal = true, .block_rows = 128, .block_cols = 128, .threads = 1});
    Array output{{1, 1, 1023, 1}, {}};
    Array lse{{1, 1, 1023}, {}};
    for (Index i = 0; i < 1023; ++i) {
      output.values.push_back(static_cast<double>(i + 1) / 2.0);  // the mean of 0, 1, ..., i + 1
      lse.values.push_back(std::log(static_cast<double>(i + 2)));
    }
    expect_close("output", to_array(result.output), output, fp32_bound(output, 0.0), OUTPUT);
    expect_close("lse", to_array(result.lse), lse, lse_bound(lse, 0.0), LSE);
  }

  TEST_CASE("agrees with the float64 reference") {
    for_each<TileCase>(tile_cases(), [](const TileCase& c) {
      const AttentionInputs inputs = make_inputs(c.problem);
      expect_attention(answer(inputs, options_of(c)), expected(c.problem, inputs));
    });
  }

  TEST_CASE("says what is wrong with bad arguments") {
    const Tensor<float, 4> q = normal({2, 3, 5, 4}, 15);
    const Tensor<float, 4> k = normal({2, 3, 7, 4}, 16);
    const Tensor<float, 4> v = normal({2, 3, 7, 6}, 17);
    tiled_forward(q, k, v);  // these are right
    const auto one = [](const Shape<4>& shape) { return filled(shape, 1.0f); };
    expect_rejected("a width of 0", "q", [&] { tiled_forward(one({2, 3, 5, 0}), one({2, 3, 7, 0}), v); });
    expect_rejected("keys of another width", "k", [&] { tiled_forward(q, one({2, 3, 7, 5}), v); });
    expect_rejected("keys of fewer heads", "k", [&] { tiled_forward(q, one({2, 1, 7, 4}), v); });
    expect_rejected("keys of another batch", "k", [&] { tiled_forward(q, one({1, 3, 7, 4}), v); });
    expect_rejected("a value too few", "v", [&] { tiled_forward(q, k, one({2, 3, 6, 6})); });
    expect_rejected("values of fewer heads", "v", [&] { tiled_forward(q, k, one({2, 2, 7, 6})); });
    expect_rejected("values of another batch", "v", [&] { tiled_forward(q, k, one({3, 3, 7, 6})); });
    const View<const float, 4> apart(q.data(), {2, 3, 5, 2}, {60, 20, 4, 2});
    expect_rejected("queries with a gap between channels", "q", [&] { tiled_forward(apart, one({2, 3, 7, 2}), v); });
    const View<const float, 4> crossed(v.data(), {2, 3, 7, 6}, {126, 42, 1, 7});
    expect_rejected("values with a gap between channels", "v", [&] { tiled_forward(q, k, crossed); });
    expect_rejected("no row in a tile", "block_rows", [&] { tiled_forward(q, k, v, {.block_rows = 0}); });
    expect_rejected("a negative number of columns in a tile", "block_cols",
                    [&] { tiled_forward(q, k, v, {.block_cols = -8}); });
    expect_rejected("a negative number of threads", "threads", [&] { tiled_forward(q, k, v, {.threads = -1}); });
    expect_rejected("a scale that is NaN", "scale", [&] { tiled_forward(q, k, v, {.scale = NOT_A_NUMBER}); });
    expect_rejected("an infinite scale", "scale", [&] { tiled_forward(q, k, v, {.scale = INF}); });
  }
}
