// The inputs that attention is tried on: every family that is known to expose somebody's mistake.
//
// A case is a shape, some options and the kind of numbers in it; its number is its seed and never changes, so that
// `./kata test 1.02 --case 7` means the same input for ever. New cases go to the end of the list.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "common/testing/array.hpp"
#include "common/testing/compare.hpp"
#include "common/testing/report.hpp"

namespace flashkata::testing {

/// Which keys are forbidden. The first group masks pairs [Sq, Sk], the second keys of a batch item [B, Sk].
enum class Masking {
  none,
  pairs_all_allowed,
  pairs,             // about half of them, no query left without a key
  pairs_empty_rows,  // some queries may attend to nothing
  bias,              // additive and finite
  bias_zero,         // additive, all zeros: it should change nothing
  bias_infinite,     // additive with -inf in it, in one row everywhere
  padding_none,      // a padding mask that forbids nothing
  padding_right,     // batch item b keeps its first keys, a different number each
  padding_left,      // ... its last keys
  padding_scattered,
  padding_whole_item,  // the last batch item has no key at all
};

/// What the scores look like, before any mask.
enum class Scores {
  normal,          // of order 1
  tiny,            // of order 1e-4: every weight nearly alike
  flat,            // exactly 0
  exact,           // integers up to about 1e4 in size, without rounding
  near_minus_120,  // where exp() underflows
  near_plus_120,   // where exp() overflows
  near_minus_2e4,  // below many a home-made "minus infinity"; exact
  rows_apart,      // each query's scores 150 below the query before
  falling,         // by 300 from the first key to the last
  rising,
};

struct AttentionCase {
  const char* why;  // what makes it hard, in words
  Index batch = 1;
  Index heads = 1;
  Index queries = 1;
  Index keys = 1;
  Index width = 8;        // D
  Index value_width = 8;  // Dv
  std::optional<float> scale = {};
  bool causal = false;
  Masking masking = Masking::none;
  Scores scores = Scores::normal;
  Index gap = 0;   // NaN floats between the rows of two tokens in memory
  int number = 0;  // its place in the list, from 1; also its seed

  /// "scale 0.3 given: Sq=37 Sk=53 D=16 Dv=24, scale 0.3, seed 7"
  std::string text() const;
};

/// Memory for [B, S, H, D], readable as heads and as the model's layout, with `gap` NaN floats after each token.
class TokenTensor {
 public:
  TokenTensor(Index batch, Index tokens, Index heads, Index width, Index gap = 0);

  View<float, 4> heads();  // [B, H, S, D]
  View<float, 3> model();  // [B, S, H*D]
  View<const float, 4> heads() const;
  View<const float, 3> model() const;
  /// The only head of the only batch item, [S, D].
  ConstMatrixView head() const;

 private:
  Index batch_, tokens_, heads_, width_, gap_;
  std::vector<float> memory_;
};

struct AttentionInputs {
  TokenTensor query;                  // [B, Sq, H, D]
  TokenTensor key;                    // [B, Sk, H, D]
  TokenTensor value;                  // [B, Sk, H, Dv]
  std::optional<BoolMatrix> allowed;  // [Sq, Sk], true = attend
  std::optional<Matrix> bias;         // [Sq, Sk]
  std::optional<BoolMatrix> padding;  // [B, Sk], true = attend
};

/// What the float64 reference makes of a case, and how exact an fp32 answer must be.
struct Expected {
  Array output;   // [B, H, Sq, Dv]
  Array weights;  // [B, H, Sq, Sk]
  Array lse;      // [B, H, Sq]
  Bound output_bound;
  Bound weights_bound;
};

/// Every case, in order of number.
const std::vector<AttentionCase>& attention_cases();

/// Those that `fits` holds for. They keep their numbers.
std::vector<AttentionCase> select(const std::function<bool(const AttentionCase&)>& fits);

/// The numbers of these cases.
std::vector<int> numbers(const std::vector<AttentionCase>& cases);

/// The case of that number.
const AttentionCase& attention_case(int number);

/// Runs `body` on each case through run_case() (report.hpp).
void for_each(const std::vector<AttentionCase>& cases, const std::function<void(const AttentionCase&)>& body);

/// Seeded by the case's number: the same on every machine.
AttentionInputs make_inputs(const AttentionCase& attention_case);

Expected expected(const AttentionCase& attention_case, const AttentionInputs& inputs);

/// May query i of batch item b attend to key j? In the suites' own words, for probes.
bool may_attend(const AttentionCase& attention_case, const AttentionInputs& inputs, Index b, Index i, Index j);

/// Under a causal mask query i sees so many keys, the first ones; without one, all of them.
Index keys_seen(bool causal, Index i, Index queries, Index keys);

/// dO of a case, [B, Sq, H, Dv]: the gradient of a loss with respect to the output. N(0, 1), seeded like the inputs.
TokenTensor make_output_gradient(const AttentionCase& attention_case);

/// The gradients of sum(dO * output) by the float64 reference, and how exact an fp32 answer must be.
struct ExpectedGradients {
  Array query;  // [B, H, Sq, D]
  Array key;    // [B, H, Sk, D]
  Array value;  // [B, H, Sk, Dv]
  Bound query_bound;
  Bound key_bound;
  Bound value_bound;
};

ExpectedGradients expected_gradients(const AttentionCase& attention_case, const AttentionInputs& inputs,
                                     const TokenTensor& output_gradient);

/// [B, H, S, D] as the model lays it out, [B, S, H*D].
Array in_model_layout(const Array& heads);

/// The same for a bound.
Bound in_model_layout(const Bound& bound);

/// Fills a view with the numbers of N(0, 1), seeded.
void fill_normal(View<float, 4> view, unsigned seed);

/// A tensor of such numbers, and one that holds the same number everywhere.
Tensor<float, 4> normal(const Shape<4>& shape, unsigned seed);
Tensor<float, 4> filled(const Shape<4>& shape, float value);

/// [batch, count, S, D] whose head (b, h) is head from(b, h) of `heads`, [1, n, S, D].
Tensor<float, 4> arranged(const View<const float, 4>& heads, Index batch, Index count,
                          const std::function<Index(Index, Index)>& from);

// ---- Cases with more to them than their problem: tiles, a layout. Their number is their problem's -------------------

template <typename Case>
std::vector<int> numbers(const std::vector<Case>& cases) {
  std::vector<int> result;
  for (const Case& c : cases) result.push_back(c.problem.number);
  return result;
}

template <typename Case>
void for_each(const std::vector<Case>& cases, const std::function<void(const Case&)>& body) {
  for (const Case& c : cases) run_case(c.problem.number, c.text(), [&] { body(c); });
}

}  // namespace flashkata::testing
