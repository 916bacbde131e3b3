#include "common/testing/cases.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <random>
#include <sstream>

#include "common/attention/reference.hpp"
#include "common/testing/report.hpp"

namespace flashkata::testing {
namespace {

// clang-format off
const std::vector<AttentionCase>& listed() {
  static const std::vector<AttentionCase> list = {
    // One head: the numbers themselves.
    {.why = "one query, one key", .queries = 1, .keys = 1, .width = 4, .value_width = 4},
    {.why = "two queries, three keys", .queries = 2, .keys = 3, .width = 2, .value_width = 2},
    {.why = "the plain case", .queries = 24, .keys = 24, .width = 16, .value_width = 16},
    {.why = "more queries than keys, values wider than keys", .queries = 53, .keys = 37, .width = 16, .value_width = 24},
    {.why = "more keys than queries, values narrower than keys", .queries = 37, .keys = 53, .width = 24, .value_width = 16},
    {.why = "a scale is given", .queries = 37, .keys = 53, .width = 16, .value_width = 24, .scale = 0.3f},
    {.why = "scale 1 is given", .queries = 9, .keys = 11, .width = 16, .value_width = 16, .scale = 1.0f},
    {.why = "scale 0 is given", .queries = 5, .keys = 7, .width = 16, .value_width = 4, .scale = 0.0f},
    {.why = "a negative scale is given", .queries = 5, .keys = 7, .width = 4, .value_width = 4, .scale = -0.5f},
    {.why = "width 1", .queries = 6, .keys = 9, .width = 1, .value_width = 3},
    {.why = "width 128", .queries = 17, .keys = 33, .width = 128, .value_width = 64},
    {.why = "scores so small that all weights are nearly alike", .queries = 12, .keys = 20, .scores = Scores::tiny},
    {.why = "all scores are 0", .queries = 7, .keys = 10, .scores = Scores::flat},
    {.why = "scores up to 1e4 in size", .queries = 13, .keys = 19, .width = 16, .value_width = 8, .scale = 0.25f, .scores = Scores::exact},
    {.why = "all scores near -120", .queries = 13, .keys = 19, .scores = Scores::near_minus_120},
    {.why = "all scores near +120", .queries = 13, .keys = 19, .scores = Scores::near_plus_120},
    {.why = "each query's scores lie 150 below those of the query before", .queries = 5, .keys = 12, .scores = Scores::rows_apart},
    {.why = "scores fall by 300 along the keys", .queries = 9, .keys = 40, .scores = Scores::falling},
    {.why = "scores rise by 300 along the keys", .queries = 9, .keys = 40, .scores = Scores::rising},
    {.why = "one key", .queries = 5, .keys = 1},
    {.why = "one query", .queries = 1, .keys = 65},
    {.why = "no key at all", .queries = 4, .keys = 0},
    {.why = "no query at all", .queries = 0, .keys = 4},
    {.why = "the rows of a token lie apart in memory", .queries = 9, .keys = 14, .width = 8, .value_width = 6, .gap = 5},
    // One head: masks over pairs.
    {.why = "a boolean mask", .queries = 14, .keys = 21, .masking = Masking::pairs},
    {.why = "a boolean mask that allows everything", .queries = 8, .keys = 8, .masking = Masking::pairs_all_allowed},
    {.why = "a boolean mask that leaves some queries without a key", .queries = 12, .keys = 12, .masking = Masking::pairs_empty_rows},
    {.why = "an additive mask of finite numbers", .queries = 11, .keys = 17, .width = 16, .value_width = 8, .masking = Masking::bias},
    {.why = "an additive mask of zeros", .queries = 8, .keys = 8, .masking = Masking::bias_zero},
    {.why = "an additive mask with -inf in it", .queries = 10, .keys = 15, .masking = Masking::bias_infinite},
    {.why = "a boolean mask, and all scores near -20000", .queries = 9, .keys = 13, .width = 4, .value_width = 4, .scale = 0.25f, .masking = Masking::pairs, .scores = Scores::near_minus_2e4},
    {.why = "a boolean mask, and all scores near -120", .queries = 9, .keys = 13, .masking = Masking::pairs, .scores = Scores::near_minus_120},
    {.why = "a boolean mask and a scale", .queries = 19, .keys = 7, .width = 16, .value_width = 8, .scale = 0.7f, .masking = Masking::pairs},
    {.why = "an additive mask and a scale", .queries = 7, .keys = 19, .width = 16, .value_width = 8, .scale = 2.0f, .masking = Masking::bias},
    // Several heads.
    {.why = "three heads", .batch = 2, .heads = 3, .queries = 5, .keys = 5, .width = 4, .value_width = 4},
    {.why = "four heads, more keys than queries, values narrower than keys", .batch = 2, .heads = 4, .queries = 7, .keys = 11, .width = 8, .value_width = 6},
    {.why = "as many heads as tokens", .batch = 2, .heads = 4, .queries = 4, .keys = 4, .width = 4, .value_width = 4},
    {.why = "one head, three batch items", .batch = 3, .heads = 1, .queries = 6, .keys = 9, .width = 8, .value_width = 8},
    {.why = "eight heads", .batch = 1, .heads = 8, .queries = 16, .keys = 16, .width = 16, .value_width = 16},
    {.why = "one token", .batch = 2, .heads = 3, .queries = 1, .keys = 1, .width = 4, .value_width = 4},
    {.why = "several heads, and the rows of a token lie apart in memory", .batch = 2, .heads = 3, .queries = 6, .keys = 8, .width = 4, .value_width = 5, .gap = 7},
    {.why = "several heads, all scores near +120", .batch = 2, .heads = 2, .queries = 6, .keys = 9, .scores = Scores::near_plus_120},
    // Several heads: padded keys.
    {.why = "padding on the right", .batch = 3, .heads = 2, .queries = 8, .keys = 8, .masking = Masking::padding_right},
    {.why = "padding on the left", .batch = 3, .heads = 2, .queries = 8, .keys = 8, .masking = Masking::padding_left},
    {.why = "padding in between", .batch = 2, .heads = 3, .queries = 6, .keys = 13, .masking = Masking::padding_scattered},
    {.why = "a padding mask that allows everything", .batch = 2, .heads = 2, .queries = 7, .keys = 7, .masking = Masking::padding_none},
    {.why = "one batch item is nothing but padding", .batch = 3, .heads = 2, .queries = 5, .keys = 9, .masking = Masking::padding_whole_item},
    {.why = "padding on the right, and all scores near -20000", .batch = 2, .heads = 2, .queries = 6, .keys = 8, .width = 4, .value_width = 4, .masking = Masking::padding_right, .scores = Scores::near_minus_2e4},
    {.why = "one batch item is nothing but padding, all scores near -120", .batch = 2, .heads = 2, .queries = 5, .keys = 7, .masking = Masking::padding_whole_item, .scores = Scores::near_minus_120},
    // Causal.
    {.why = "causal, as many queries as keys", .batch = 1, .heads = 2, .queries = 16, .keys = 16, .causal = true},
    {.why = "causal, more keys than queries", .batch = 2, .heads = 2, .queries = 5, .keys = 12, .causal = true},
    {.why = "causal, more queries than keys", .batch = 2, .heads = 2, .queries = 12, .keys = 5, .causal = true},
    {.why = "causal, one query", .batch = 1, .heads = 3, .queries = 1, .keys = 9, .causal = true},
    {.why = "causal, two queries", .batch = 1, .heads = 2, .queries = 2, .keys = 9, .causal = true},
    {.why = "causal, one key", .batch = 1, .heads = 2, .queries = 4, .keys = 1, .causal = true},
    {.why = "causal and padding on the right", .batch = 3, .heads = 2, .queries = 8, .keys = 8, .causal = true, .masking = Masking::padding_right},
    {.why = "causal and padding on the left", .batch = 3, .heads = 2, .queries = 8, .keys = 8, .causal = true, .masking = Masking::padding_left},
    {.why = "causal and padding on the left, more keys than queries", .batch = 2, .heads = 2, .queries = 6, .keys = 11, .causal = true, .masking = Masking::padding_left},
    {.why = "causal, and one batch item is nothing but padding", .batch = 3, .heads = 2, .queries = 6, .keys = 6, .causal = true, .masking = Masking::padding_whole_item},
    {.why = "causal and padding in between, more queries than keys", .batch = 2, .heads = 3, .queries = 9, .keys = 6, .causal = true, .masking = Masking::padding_scattered},
    {.why = "causal and a padding mask that allows everything", .batch = 2, .heads = 2, .queries = 7, .keys = 7, .causal = true, .masking = Masking::padding_none},
    {.why = "causal, scores fall by 300 along the keys", .batch = 1, .heads = 2, .queries = 20, .keys = 20, .causal = true, .scores = Scores::falling},
    {.why = "causal, scores rise by 300 along the keys", .batch = 1, .heads = 2, .queries = 20, .keys = 20, .causal = true, .scores = Scores::rising},
    {.why = "causal, all scores near -20000", .batch = 1, .heads = 2, .queries = 9, .keys = 9, .width = 4, .value_width = 4, .causal = true, .scores = Scores::near_minus_2e4},
    {.why = "causal, values wider than keys, token rows apart", .batch = 2, .heads = 3, .queries = 7, .keys = 7, .width = 4, .value_width = 6, .causal = true, .gap = 3},
  };
  return list;
}
// clang-format on

// Box-Muller over a fixed engine: std::normal_distribution differs from library to library, these numbers do not.
class Normal {
 public:
  explicit Normal(unsigned seed) : engine_(seed) {}
  float operator()() {
    const double radius = std::sqrt(-2.0 * std::log(uniform()));
    return static_cast<float>(radius * std::cos(2.0 * std::numbers::pi * uniform()));
  }
  double uniform() { return (static_cast<double>(engine_()) + 0.5) / 4294967296.0; }
  Index integer(Index low, Index high) {
    return low + static_cast<Index>(uniform() * static_cast<double>(high - low + 1));
  }

 private:
  std::mt19937 engine_;
};

template <typename Value>
void fill(View<float, 4> view, Value&& value) {
  for (Index b = 0; b < view.size(0); ++b)
    for (Index h = 0; h < view.size(1); ++h)
      for (Index s = 0; s < view.size(2); ++s)
        for (Index d = 0; d < view.size(3); ++d) view(b, h, s, d) = value(b, h, s, d);
}

double scale_of(const AttentionCase& c) { return c.scale ? *c.scale : 1.0 / std::sqrt(static_cast<double>(c.width)); }

// Channel 0 of query and key carries an offset a(i) * b(j) of the scores; the other channels carry the noise.
void shift_scores(const AttentionCase& c, View<float, 4> query, View<float, 4> key) {
  const double scale = scale_of(c);
  const auto set = [&](auto query_factor, auto score_of_key) {
    fill(query, [&](Index b, Index h, Index i, Index d) { return d == 0 ? query_factor(i) : query(b, h, i, d); });
    fill(key, [&](Index b, Index h, Index j, Index d) {
      return d == 0 ? static_cast<float>(score_of_key(j) / scale) : key(b, h, j, d);
    });
  };
  const auto one = [](Index) { return 1.0f; };
  const double along = c.keys > 1 ? 300.0 / static_cast<double>(c.keys - 1) : 0.0;
  switch (c.scores) {
    case Scores::near_minus_120:
      return set(one, [](Index) { return -120.0; });
    case Scores::near_plus_120:
      return set(one, [](Index) { return 120.0; });
    case Scores::near_minus_2e4:
      return set(one, [](Index) { return -20000.0; });
    case Scores::rows_apart:
      return set([](Index i) { return static_cast<float>(-150 * i); }, [](Index) { return 1.0; });
    case Scores::falling:
      return set(one, [&](Index j) { return -along * static_cast<double>(j); });
    case Scores::rising:
      return set(one, [&](Index j) { return along * static_cast<double>(j); });
    default:
      return;
  }
}

void fill_query_and_key(const AttentionCase& c, Normal& random, View<float, 4> query, View<float, 4> key) {
  const auto both = [&](auto value) {
    fill(query, value);
    fill(key, value);
  };
  switch (c.scores) {
    case Scores::tiny:
      both([&](auto...) { return 0.01f * random(); });
      break;
    case Scores::exact:
      both([&](auto...) { return static_cast<float>(random.integer(-50, 50)); });
      break;
    case Scores::near_minus_2e4:
      both([&](auto...) { return static_cast<float>(random.integer(-2, 2)); });
      break;
    default:
      both([&](auto...) { return random(); });
  }
  if (c.scores == Scores::flat) fill(query, [](auto...) { return 0.0f; });
  shift_scores(c, query, key);
}

BoolMatrix pairs_mask(const AttentionCase& c, Normal& random, bool empty_rows) {
  BoolMatrix allowed(c.queries, c.keys);
  for (Index i = 0; i < c.queries; ++i) {
    for (Index j = 0; j < c.keys; ++j) allowed(i, j) = random.uniform() < 0.55;
    allowed(i, random.integer(0, c.keys - 1)) = true;
    if (empty_rows && (i == 0 || i == c.queries / 2 || i == c.queries - 1)) allowed.row(i).setConstant(false);
  }
  return allowed;
}

Matrix bias_mask(const AttentionCase& c, Normal& random) {
  Matrix bias(c.queries, c.keys);
  for (Index i = 0; i < c.queries; ++i) {
    for (Index j = 0; j < c.keys; ++j) {
      bias(i, j) = c.masking == Masking::bias_zero ? 0.0f : 1.5f * random();
      const bool forbid = c.masking == Masking::bias_infinite && (i == 1 || random.uniform() < 0.3);
      if (forbid) bias(i, j) = -std::numeric_limits<float>::infinity();
    }
  }
  return bias;
}

BoolMatrix padding_mask(const AttentionCase& c, Normal& random) {
  BoolMatrix allowed(c.batch, c.keys);
  for (Index b = 0; b < c.batch; ++b) {
    const Index kept = std::max<Index>(1, c.keys - 1 - 2 * b);
    for (Index j = 0; j < c.keys; ++j) {
      switch (c.masking) {
        case Masking::padding_right:
          allowed(b, j) = j < kept;
          break;
        case Masking::padding_left:
          allowed(b, j) = j >= c.keys - kept;
          break;
        case Masking::padding_scattered:
          allowed(b, j) = random.uniform() < 0.6;
          break;
        case Masking::padding_whole_item:
          allowed(b, j) = b + 1 < c.batch && j < kept;
          break;
        default:
          allowed(b, j) = true;
      }
    }
  }
  return allowed;
}

void fill_masks(const AttentionCase& c, Normal& random, AttentionInputs& inputs) {
  switch (c.masking) {
    case Masking::none:
      return;
    case Masking::pairs_all_allowed:
      inputs.allowed = BoolMatrix::Constant(c.queries, c.keys, true);
      return;
    case Masking::pairs:
      inputs.allowed = pairs_mask(c, random, false);
      return;
    case Masking::pairs_empty_rows:
      inputs.allowed = pairs_mask(c, random, true);
      return;
    case Masking::bias:
    case Masking::bias_zero:
    case Masking::bias_infinite:
      inputs.bias = bias_mask(c, random);
      return;
    default:
      inputs.padding = padding_mask(c, random);
  }
}

Tensor<double, 4> widened(View<const float, 4> view) {
  Tensor<double, 4> wide(view.shape());
  for (Index b = 0; b < view.size(0); ++b)
    for (Index h = 0; h < view.size(1); ++h)
      for (Index s = 0; s < view.size(2); ++s)
        for (Index d = 0; d < view.size(3); ++d) wide(b, h, s, d) = view(b, h, s, d);
  return wide;
}

template <typename T>
Tensor<T, 4> absolute(const Tensor<T, 4>& tensor) {
  Tensor<T, 4> result(tensor.shape());
  std::transform(tensor.data(), tensor.data() + tensor.count(), result.data(), [](T x) { return std::abs(x); });
  return result;
}

// weights [B, H, M, N] times values [B, H, N, D], head by head.
Tensor<double, 4> weighted_sum(const Tensor<double, 4>& weights, const Tensor<double, 4>& values) {
  const Index rows = weights.size(2);
  const Index terms = weights.size(3);
  const Index width = values.size(3);
  Tensor<double, 4> sum({weights.size(0), weights.size(1), rows, width});
  std::fill_n(sum.data(), sum.count(), 0.0);
  const double* weight = weights.data();
  double* row = sum.data();
  for (Index head = 0; head < weights.size(0) * weights.size(1); ++head) {
    for (Index i = 0; i < rows; ++i, row += width) {
      const double* value = values.data() + head * terms * width;
      for (Index j = 0; j < terms; ++j, ++weight) {
        for (Index d = 0; d < width; ++d) row[d] += *weight * *value++;
      }
    }
  }
  return sum;
}

// The last two axes exchanged.
Tensor<double, 4> transposed(const Tensor<double, 4>& tensor) {
  Tensor<double, 4> result({tensor.size(0), tensor.size(1), tensor.size(3), tensor.size(2)});
  for (Index b = 0; b < tensor.size(0); ++b)
    for (Index h = 0; h < tensor.size(1); ++h)
      for (Index i = 0; i < tensor.size(2); ++i)
        for (Index j = 0; j < tensor.size(3); ++j) result(b, h, j, i) = tensor(b, h, i, j);
  return result;
}

// A case as the reference wants it, with the memory that its problem looks at.
struct Judged {
  Tensor<double, 4> query, key, value;
  std::vector<double> bias;
  reference::Problem problem;

  Judged(const AttentionCase& c, const AttentionInputs& inputs)
      : query(widened(inputs.query.heads())),
        key(widened(inputs.key.heads())),
        value(widened(inputs.value.heads())),
        problem{.query = query, .key = key, .value = value} {
    if (c.scale) problem.scale = *c.scale;
    problem.causal = c.causal;
    const Shape<4> pairs{c.batch, c.heads, c.queries, c.keys};
    if (inputs.allowed) problem.allowed = View<const bool, 4>(inputs.allowed->data(), pairs, {0, 0, c.keys, 1});
    if (inputs.padding) problem.allowed = View<const bool, 4>(inputs.padding->data(), pairs, {c.keys, 0, 0, 1});
    if (inputs.bias) {
      bias.assign(inputs.bias->data(), inputs.bias->data() + inputs.bias->size());
      problem.bias = View<const double, 4>(bias.data(), pairs, {0, 0, c.keys, 1});
    }
  }
  Judged(const Judged&) = delete;
  Judged& operator=(const Judged&) = delete;
};

// The largest sum of |scale * query * key| over the channels of a pair: what fp32 rounds the scores against.
double largest_score(const AttentionCase& c, const Tensor<double, 4>& query, const Tensor<double, 4>& key) {
  double largest = 0.0;
  for (Index head = 0; head < c.batch * c.heads; ++head)
    for (Index i = 0; i < c.queries; ++i)
      for (Index j = 0; j < c.keys; ++j) {
        const double* q = query.data() + (head * c.queries + i) * c.width;
        const double* k = key.data() + (head * c.keys + j) * c.width;
        double sum = 0.0;
        for (Index d = 0; d < c.width; ++d) sum += std::abs(q[d] * k[d]);
        largest = std::max(largest, sum * std::abs(scale_of(c)));
      }
  return largest;
}

}  // namespace

std::string AttentionCase::text() const {
  std::ostringstream text;
  text << why << ": ";
  if (batch * heads > 1) text << "B=" << batch << " H=" << heads << ' ';
  text << "Sq=" << queries << " Sk=" << keys << " D=" << width << " Dv=" << value_width;
  if (scale) text << ", scale " << *scale;
  text << ", seed " << number;
  return text.str();
}

TokenTensor::TokenTensor(Index batch, Index tokens, Index heads, Index width, Index gap)
    : batch_(batch),
      tokens_(tokens),
      heads_(heads),
      width_(width),
      gap_(gap),
      memory_(static_cast<std::size_t>(batch * tokens * (heads * width + gap)),
              std::numeric_limits<float>::quiet_NaN()) {}

View<float, 4> TokenTensor::heads() {
  const Index row = heads_ * width_ + gap_;
  return {memory_.data(), {batch_, heads_, tokens_, width_}, {tokens_ * row, width_, row, 1}};
}

View<float, 3> TokenTensor::model() {
  const Index row = heads_ * width_ + gap_;
  return {memory_.data(), {batch_, tokens_, heads_ * width_}, {tokens_ * row, row, 1}};
}

View<const float, 4> TokenTensor::heads() const { return const_cast<TokenTensor*>(this)->heads(); }
View<const float, 3> TokenTensor::model() const { return const_cast<TokenTensor*>(this)->model(); }
ConstMatrixView TokenTensor::head() const { return as_matrix(heads()[0][0]); }

const std::vector<AttentionCase>& attention_cases() {
  static const std::vector<AttentionCase> numbered = [] {
    std::vector<AttentionCase> cases = listed();
    for (std::size_t i = 0; i < cases.size(); ++i) cases[i].number = static_cast<int>(i) + 1;
    return cases;
  }();
  return numbered;
}

std::vector<AttentionCase> select(const std::function<bool(const AttentionCase&)>& fits) {
  std::vector<AttentionCase> chosen;
  std::copy_if(attention_cases().begin(), attention_cases().end(), std::back_inserter(chosen), fits);
  return chosen;
}

std::vector<int> numbers(const std::vector<AttentionCase>& cases) {
  std::vector<int> result;
  for (const AttentionCase& c : cases) result.push_back(c.number);
  return result;
}

const AttentionCase& attention_case(int number) { return attention_cases().at(static_cast<std::size_t>(number) - 1); }

void for_each(const std::vector<AttentionCase>& cases, const std::function<void(const AttentionCase&)>& body) {
  for (const AttentionCase& c : cases) run_case(c.number, c.text(), [&] { body(c); });
}

AttentionInputs make_inputs(const AttentionCase& c) {
  Normal random(static_cast<unsigned>(c.number));
  AttentionInputs inputs{TokenTensor(c.batch, c.queries, c.heads, c.width, c.gap),
                         TokenTensor(c.batch, c.keys, c.heads, c.width, c.gap),
                         TokenTensor(c.batch, c.keys, c.heads, c.value_width, c.gap),
                         {},
                         {},
                         {}};
  fill_query_and_key(c, random, inputs.query.heads(), inputs.key.heads());
  fill(inputs.value.heads(), [&](auto...) { return random(); });
  fill_masks(c, random, inputs);
  return inputs;
}

Expected expected(const AttentionCase& c, const AttentionInputs& inputs) {
  const Judged judged(c, inputs);
  const reference::Forward forward = reference::forward(judged.problem);
  const double largest = largest_score(c, judged.query, judged.key);
  return {to_array(forward.output), to_array(forward.weights), to_array(forward.lse),
          fp32_bound(to_array(weighted_sum(forward.weights, absolute(judged.value))), largest),
          fp32_bound(to_array(forward.weights), largest)};
}

TokenTensor make_output_gradient(const AttentionCase& c) {
  TokenTensor gradient(c.batch, c.queries, c.heads, c.value_width, c.gap);
  fill_normal(gradient.heads(), static_cast<unsigned>(c.number) + 1000);
  return gradient;
}

ExpectedGradients expected_gradients(const AttentionCase& c, const AttentionInputs& inputs,
                                     const TokenTensor& output_gradient) {
  const Judged judged(c, inputs);
  const Tensor<double, 4> doutput = widened(output_gradient.heads());
  const reference::Gradients gradients = reference::backward(judged.problem, doutput);
  const double largest = largest_score(c, judged.query, judged.key);

  // The same products with every sign made positive: |dS| <= P (|dO| |V|^T + rowsum(|dO| P |V|)).
  const Tensor<double, 4> weights = reference::forward(judged.problem).weights;
  const Tensor<double, 4> size = absolute(doutput);
  const Tensor<double, 4> value = absolute(judged.value);
  Tensor<double, 4> dscores = weighted_sum(size, transposed(value));  // |dO| |V|^T  [B, H, Sq, Sk]
  for (Index b = 0; b < c.batch; ++b)
    for (Index h = 0; h < c.heads; ++h)
      for (Index i = 0; i < c.queries; ++i) {
        double delta = 0.0;
        for (Index j = 0; j < c.keys; ++j) delta += weights(b, h, i, j) * dscores(b, h, i, j);
        for (Index j = 0; j < c.keys; ++j) {
          double& dscore = dscores(b, h, i, j);
          dscore = std::abs(scale_of(c)) * weights(b, h, i, j) * (dscore + delta);
        }
      }
  return {to_array(gradients.query),
          to_array(gradients.key),
          to_array(gradients.value),
          fp32_bound(to_array(weighted_sum(dscores, absolute(judged.key))), largest),
          fp32_bound(to_array(weighted_sum(transposed(dscores), absolute(judged.query))), largest),
          fp32_bound(to_array(weighted_sum(transposed(weights), size)), largest)};
}

Index keys_seen(bool causal, Index i, Index queries, Index keys) {
  return causal ? std::clamp<Index>(i + 1 + keys - queries, 0, keys) : keys;
}

bool may_attend(const AttentionCase& c, const AttentionInputs& inputs, Index b, Index i, Index j) {
  if (c.causal && j - i > c.keys - c.queries) return false;
  if (inputs.allowed && !(*inputs.allowed)(i, j)) return false;
  if (inputs.bias && std::isinf((*inputs.bias)(i, j))) return false;
  return !inputs.padding || (*inputs.padding)(b, j);
}

Array in_model_layout(const Array& heads) {
  const Index batch = heads.shape.at(0);
  const Index count = heads.shape.at(1);
  const Index tokens = heads.shape.at(2);
  const Index width = heads.shape.at(3);
  Array model{{batch, tokens, count * width}, {}};
  model.values.reserve(heads.count());
  for (Index b = 0; b < batch; ++b)
    for (Index s = 0; s < tokens; ++s)
      for (Index h = 0; h < count; ++h)
        for (Index d = 0; d < width; ++d)
          model.values.push_back(heads.values[static_cast<std::size_t>(((b * count + h) * tokens + s) * width + d)]);
  return model;
}

Bound in_model_layout(const Bound& bound) { return {bound.relative, in_model_layout(bound.magnitude)}; }

void fill_normal(View<float, 4> view, unsigned seed) {
  Normal random(seed);
  fill(view, [&](auto...) { return random(); });
}

Tensor<float, 4> normal(const Shape<4>& shape, unsigned seed) {
  Tensor<float, 4> tensor(shape);
  fill_normal(tensor, seed);
  return tensor;
}

Tensor<float, 4> filled(const Shape<4>& shape, float value) {
  Tensor<float, 4> tensor(shape);
  std::fill_n(tensor.data(), tensor.count(), value);
  return tensor;
}

Tensor<float, 4> arranged(const View<const float, 4>& heads, Index batch, Index count,
                          const std::function<Index(Index, Index)>& from) {
  Tensor<float, 4> result({batch, count, heads.size(2), heads.size(3)});
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < count; ++h) as_matrix(result.view()[b][h]) = as_matrix(heads[0][from(b, h)]);
  return result;
}

}  // namespace flashkata::testing
