#include "dropout.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <optional>

#include "phase4_extensions/kernel_suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

using Forward = Call<FlashForward<float>>;
using Backward = Call<FlashBackward<float>>;

const Axes PAIR_AXES = {"batch", "head", "query", "key"};

// Both words of the seed and of the offset count.
constexpr std::uint64_t SEED = 0x9E3779B97F4A7C15;
constexpr std::uint64_t OFFSET = 0x0000000300000011;

Dropout with(double probability, std::uint64_t seed = SEED, std::uint64_t offset = OFFSET, bool training = true) {
  return {.probability = static_cast<float>(probability), .seed = seed, .offset = offset, .training = training};
}

std::vector<Forward> forwards(const Dropout& dropout) {
  return answers<FlashForward<float>>(
      "tiled_dropout_forward", [dropout](const auto& p) { tiled_dropout_forward(p, dropout); },  //
      "flash_dropout_forward", [dropout](const auto& p) { flash_dropout_forward(p, dropout); });
}

std::vector<Backward> backwards(const Dropout& dropout) {
  return answers<FlashBackward<float>>(
      "tiled_dropout_backward", [dropout](const auto& p) { tiled_dropout_backward(p, dropout); },  //
      "flash_dropout_backward", [dropout](const auto& p) { flash_dropout_backward(p, dropout); });
}

std::string text(const Dropout& dropout) {
  std::ostringstream text;
  text << "probability " << dropout.probability << ", seed " << dropout.seed << ", offset " << dropout.offset
       << (dropout.training ? "" : ", evaluation");
  return text.str();
}

// ---- The statistics of a mask ---------------------------------------------------------------------------------------

// A fair coin for each weight: +1 it stays, -1 it falls.
struct Coins {
  Coins(std::uint64_t seed, std::uint64_t offset, const Shape<4>& shape)
      : mask(dropout_mask(with(0.5, seed, offset), shape)) {}

  int operator()(Index b, Index h, Index i, Index j) const { return mask(b, h, i, j) ? 1 : -1; }

  Tensor<bool, 4> mask;
};

// How far apart two weights lie.
struct Step {
  Index b = 0, h = 0, i = 0, j = 0;

  std::string text() const {
    const auto part = [](const char* name, Index by) {
      return name + (by == 0 ? std::string() : (by > 0 ? " + " : " - ") + std::to_string(std::abs(by)));
    };
    return "(" + part("b", b) + ", " + part("h", h) + ", " + part("i", i) + ", " + part("j", j) + ")";
  }
};

// A sum of so many coins is larger than six times its standard deviation once in 500 million times.
constexpr double SIGMAS = 6.0;
struct Sum {
  double total = 0.0;
  Index count = 0;

  void add(int coin) { total += coin, ++count; }
  bool suspicious() const { return std::abs(total) > SIGMAS * std::sqrt(static_cast<double>(count)); }
  std::string alike() const {
    return "alike in " + std::to_string((static_cast<Index>(total) + count) / 2) + " of " + std::to_string(count) +
           " cases; want about half";
  }
};

// Calls body(b, h, i, j) where (b, h, i, j) and (b, h, i, j) + step are both inside.
template <typename Body>
void each_inside(const Shape<4>& shape, const Step& step, const Body& body) {
  const auto range = [](Index length, Index by) {
    return std::array<Index, 2>{std::max<Index>(0, -by), std::min(length, length - by)};
  };
  const auto bs = range(shape[0], step.b), hs = range(shape[1], step.h), is = range(shape[2], step.i),
             js = range(shape[3], step.j);
  for (Index b = bs[0]; b < bs[1]; ++b)
    for (Index h = hs[0]; h < hs[1]; ++h)
      for (Index i = is[0]; i < is[1]; ++i)
        for (Index j = js[0]; j < js[1]; ++j) body(b, h, i, j);
}

// Whether weights of `one` are like those of `other` that lie a step away.
Sum likeness(const Coins& one, const Coins& other, const Step& step) {
  Sum sum;
  each_inside(one.mask.shape(), step, [&](Index b, Index h, Index i, Index j) {
    sum.add(one(b, h, i, j) * other(b + step.b, h + step.h, i + step.i, j + step.j));
  });
  return sum;
}

bool expect_independent(const Coins& coins, const Step& step) {
  const Sum sum = likeness(coins, coins, step);
  return expect(!sum.suspicious(), "mask", "weights (b, h, i, j) and " + step.text() + " are " + sum.alike());
}

// Of every four corners of a rectangle along two axes, three say nothing about the fourth.
bool expect_no_pattern(const Coins& coins, std::size_t one, std::size_t other, Index by) {
  const auto along = [by](std::size_t axis) {
    std::array<Index, 4> step{};
    step[axis] = by;
    return Step{step[0], step[1], step[2], step[3]};
  };
  const Step x = along(one), y = along(other), both{x.b + y.b, x.h + y.h, x.i + y.i, x.j + y.j};
  Sum sum;
  each_inside(coins.mask.shape(), both, [&](Index b, Index h, Index i, Index j) {
    const auto at = [&](const Step& s) { return coins(b + s.b, h + s.h, i + s.i, j + s.j); };
    sum.add(at({}) * at(x) * at(y) * at(both));
  });
  return expect(!sum.suspicious(), "mask",
                "of weights (b, h, i, j), " + x.text() + ", " + y.text() + ", " + both.text() +
                    " an even number falls too often or too rarely: " + sum.alike());
}

// Whether the weights fall as often as they should: `what` they are.
bool expect_share(Index fallen, Index count, double probability, const std::string& what) {
  const auto n = static_cast<double>(count);
  const double sigma = std::sqrt(n * probability * (1.0 - probability));
  // The contract's 1/65536 and, for the few that a rare event is, one more.
  const double allowed = SIGMAS * sigma + n / 65536.0 + 1.0;
  if (std::abs(static_cast<double>(fallen) - n * probability) <= allowed) return true;
  std::ostringstream text;
  text << what << ": " << fallen << " of " << count << " fell, want about " << n * probability << " for probability "
       << probability;
  finding("mask", text.str());
  return false;
}

// clang-format off
constexpr std::uint64_t bit(int place) { return std::uint64_t{1} << place; }
// Seeds and offsets that are easily taken for each other.
constexpr std::array<std::array<std::uint64_t, 2>, 23> CALLS{{
    {0, 0}, {1, 0}, {0, 1}, {1, 1}, {2, 0}, {0, 2}, {3, 5}, {5, 3}, {4, 4}, {4, 3}, {4, 8},
    {bit(16), 0}, {0, bit(16)}, {bit(31), 0}, {0, bit(31)}, {bit(32), 0}, {0, bit(32)}, {bit(32), bit(32)},
    {bit(63), 0}, {0, bit(63)}, {SEED, 7}, {SEED + bit(32), 7}, {SEED, 7 + bit(32)}}};
// And how far apart in two masks the same fates might lie.
constexpr std::array<Step, 19> STEPS{{
    {}, {.b = 1}, {.b = -1}, {.h = 1}, {.h = -1}, {.h = 2}, {.i = 1}, {.i = -1}, {.i = 2}, {.i = -2}, {.i = 4},
    {.j = 1}, {.j = -1}, {.j = 2}, {.j = -2}, {.j = 4}, {.j = -4}, {.j = 8}, {.j = -8}}};
// clang-format on

// The mask is judged in the fast executable; the stub is red in both.
bool mask_is_judged_elsewhere() {
  dropout_mask(with(0.5), {1, 1, 1, 1});
  return kernels_are_checked();
}

// ---- What an answer did to each weight ------------------------------------------------------------------------------

// [B, H, Sq, Sk]: 1 the weight stayed, 0 it fell.
struct Fates {
  Array output, d_value, d_key, d_query;
};

Array fates_of(const Tensor<bool, 4>& mask) { return to_array(mask); }

// All weights are alike. Queries, keys and d_output are unit vectors, each in channels of its own, so that every place
// of a gradient speaks of one weight; Sq + Sk channels at least. The last key's value is 0.
Inputs telling_inputs(Sizes sizes) {
  sizes.kv_heads = sizes.heads;
  const Index queries = sizes.queries, keys = sizes.keys;
  return filled_inputs<float>(
      sizes, [](Index, Index, Index i, Index d) { return d == i ? 1.0 : 0.0; },
      [=](Index, Index, Index j, Index d) { return d == queries + j ? 1.0 : 0.0; },
      [=](Index, Index, Index j, Index d) { return d < queries && j + 1 < keys ? 1.0 : 0.0; },
      [](Index, Index, Index i, Index d) { return d == i ? 1.0 : 0.0; });
}

// Channels first .. first + count - 1 of every row, as whether they are positive.
Array positive(const Array& rows, Index first, Index count, bool transposed) {
  const Index batch = rows.shape.at(0), heads = rows.shape.at(1), length = rows.shape.at(2), width = rows.shape.at(3);
  Array result{{batch, heads, transposed ? count : length, transposed ? length : count},
               std::vector<double>(static_cast<std::size_t>(batch * heads * length * count))};
  for (Index head = 0; head < batch * heads; ++head)
    for (Index row = 0; row < length; ++row)
      for (Index c = 0; c < count; ++c) {
        const double value = rows.values[static_cast<std::size_t>((head * length + row) * width + first + c)];
        const Index place = transposed ? c * length + row : row * count + c;
        result.values[static_cast<std::size_t>(head * length * count + place)] =
            std::isnan(value) ? value : (value > 0.0 ? 1.0 : 0.0);
      }
  return result;
}

Change kept_in(const Tensor<bool, 4>& mask, const Dropout& dropout) {
  return [&mask, dropout](reference::Problem& problem) {
    if (!dropout.training || dropout.probability == 0.0f) return;
    problem.kept = mask.view();
    problem.dropout_probability = static_cast<double>(dropout.probability);
  };
}

Shape<4> pairs_of(const Sizes& s) { return {s.batch, s.heads, s.queries, s.keys}; }
Shape<4> pairs_of(const Inputs& in) { return {in.query.size(0), in.query.size(1), in.query.size(2), in.key.size(2)}; }

// By the output, whose channels are the keys.
Array fates_forward(const Forward& call, const Sizes& sizes, const CallOptions& options) {
  Inputs in = filled_inputs<float>(
      {sizes.batch, sizes.heads, sizes.heads, sizes.queries, sizes.keys, sizes.width}, everywhere(0.0), noise(1),
      [](Index, Index, Index j, Index d) { return d == j ? 1.0 : 0.0; }, everywhere(0.0));
  return positive(forward(call, in, options).output, 0, sizes.keys, false);
}

// By the three gradients; those of keys and queries know nothing of the last key.
Fates fates_backward(const Backward& call, const Sizes& sizes, const Dropout& dropout, const CallOptions& options) {
  const Inputs in = telling_inputs(sizes);
  const Tensor<bool, 4> mask = dropout_mask(dropout, pairs_of(sizes));
  const ForwardResult before = expected_forward<float>(in, options, kept_in(mask, dropout)).exact;
  const Gradients got = backward(call, in, before, options);
  return {.output = {},
          .d_value = positive(got.value, 0, sizes.queries, true),
          .d_key = positive(got.key, 0, sizes.queries, true),
          .d_query = positive(got.query, sizes.queries, sizes.keys, false)};
}

// `keys`: how many of them are looked at.
bool expect_fates(const char* name, const Array& got, const Array& want, Index keys) {
  Index off = 0;
  std::size_t first = npos;
  for (std::size_t at = 0; at < want.count(); ++at) {
    if (static_cast<Index>(at) % want.shape[3] >= keys || got.values[at] == want.values[at]) continue;
    if (off++ == 0) first = at;
  }
  if (off == 0) return true;
  const auto word = [](double value) { return value == 1.0 ? "stayed" : value == 0.0 ? "fell" : "is NaN"; };
  finding(name, "has another mask than dropout_mask: " + std::to_string(off) + " of " + std::to_string(want.count()) +
                    " weights; first at [" + place(want, first, PAIR_AXES) + "], which " + word(got.values[first]) +
                    " here and " + word(want.values[first]) + " there");
  return false;
}

// Of a mask what a query may see.
Array seen_of(const Tensor<bool, 4>& mask, bool causal) {
  Array seen = fates_of(mask);
  std::size_t at = 0;
  each_inside(mask.shape(), {}, [&](Index, Index, Index i, Index j) {
    if (j >= keys_seen(causal, i, mask.size(2), mask.size(3))) seen.values[at] = 0.0;
    ++at;
  });
  return seen;
}

bool not_so(const Dropout& dropout) {
  finding("with", text(dropout));
  return false;
}

// ---- Recognition ----------------------------------------------------------------------------------------------------

// Which weights fall is the answer's own affair, so its outputs cannot be looked up. What is looked up does not depend
// on it: how the mask and the passes are related, and what comes out where a certain pattern falls.

// The kernels, or the CPU path while there are no kernels.
template <typename Problem, typename Use>
auto of_kernels(const std::vector<Call<Problem>>& calls, const Use& use) {
  try {
    return use(calls.back());
  } catch (const NotImplemented&) {
    return use(calls.front());
  }
}

constexpr CallOptions UNJUDGED{.causal = false, .scale = {}, .layouts = {}, .deterministic = false, .judge = false};

// A number for each thing that is wrong with the mask.
Array faults_of_mask() {
  Array faults{{}, {}};
  const auto note = [&](bool fault) {
    faults.values.push_back(fault ? 1.0 + 0.37 * static_cast<double>(faults.values.size()) : 0.0);
  };
  const Shape<4> shape{3, 3, 34, 40};
  const Coins coins(7, 3, shape);
  const auto like = [&](const Step& step) { return likeness(coins, coins, step).suspicious(); };
  for (const Step& step : {Step{.b = 1}, Step{.h = 1}, Step{.i = 1}, Step{.j = 1}, Step{.j = 8}, Step{.i = 1, .j = -1},
                           Step{.b = 1, .h = -1}, Step{.i = 32}, Step{.j = 32}}) {
    note(like(step));
  }
  const auto same = [&](std::uint64_t seed, std::uint64_t offset, const Step& step = {}) {
    return likeness(coins, Coins(seed, offset, shape), step).suspicious();
  };
  note(same(8, 3));
  note(same(7, 4));
  note(same(7 + bit(32), 3));
  note(same(7, 3 + bit(32)));
  note(same(6, 4));
  note(same(7, 2, {.j = 1}) || same(7, 2, {.h = 1}));
  const Tensor<bool, 4> small = dropout_mask(with(0.5, 7, 3), {2, 2, 20, 30});
  bool differs = false;
  each_inside(small.shape(), {}, [&](Index b, Index h, Index i, Index j) {
    differs = differs || small(b, h, i, j) != coins.mask(b, h, i, j);
  });
  note(differs);
  const Coins again(7, 3, shape);
  note(!std::equal(again.mask.data(), again.mask.data() + again.mask.count(), coins.mask.data()));
  const Tensor<bool, 4> quarter = dropout_mask(with(0.25, 7, 3), shape);
  const auto stayed = static_cast<double>(std::count(quarter.data(), quarter.data() + quarter.count(), true));
  faults.values.push_back(std::round(8.0 * stayed / static_cast<double>(quarter.count())) - 6.0);
  faults.shape = {static_cast<Index>(faults.values.size())};
  return faults;
}

bool all_zero(const Array& array) {
  return std::all_of(array.values.begin(), array.values.end(), [](double value) { return value == 0.0; });
}

// 0: the same mask. 1: its transpose. 2: its opposite. 3: all weights stay. 4: another one.
double relation(const Array& got, const Tensor<bool, 4>& mask) {
  std::array<bool, 4> is{true, true, true, true};
  std::size_t at = 0;
  each_inside(mask.shape(), {}, [&](Index b, Index h, Index i, Index j) {
    const double fate = got.values[at++];
    is[0] = is[0] && fate == (mask(b, h, i, j) ? 1.0 : 0.0);
    is[1] = is[1] && fate == (mask(b, h, j, i) ? 1.0 : 0.0);
    is[2] = is[2] && fate == (mask(b, h, i, j) ? 0.0 : 1.0);
    is[3] = is[3] && fate == 1.0;
  });
  return static_cast<double>(std::find(is.begin(), is.end(), true) - is.begin());
}

struct Relations {
  double output, d_value;
};

Relations relations() {
  const Sizes sizes{.batch = 1, .heads = 2, .kv_heads = 2, .queries = 40, .keys = 40, .width = 128};
  const Dropout dropout = with(0.5);
  const Tensor<bool, 4> mask = dropout_mask(dropout, pairs_of(sizes));
  const Array output = of_kernels<FlashForward<float>>(
      forwards(dropout), [&](const Forward& call) { return fates_forward(call, sizes, UNJUDGED); });
  const Fates back = of_kernels<FlashBackward<float>>(
      backwards(dropout), [&](const Backward& call) { return fates_backward(call, sizes, dropout, UNJUDGED); });
  return {relation(output, mask), relation(back.d_value, mask)};
}

// 256 heads with the same query and three keys: what comes out where this or that set of weights falls, set by set.
constexpr Sizes ALIKE{.batch = 16, .heads = 16, .kv_heads = 16, .queries = 1, .keys = 3, .width = 16};

Inputs alike_inputs() {
  const auto alike = [](unsigned seed) {
    return [seed](Index, Index, Index s, Index d) { return noise(seed)(0, 0, s, d); };
  };
  return filled_inputs<float>(ALIKE, alike(1), alike(2), alike(3), alike(4));
}

// The head in which exactly the weights of `set` stay.
std::array<Index, 2> head_with(const Tensor<bool, 4>& mask, Index set) {
  for (Index b = 0; b < ALIKE.batch; ++b)
    for (Index h = 0; h < ALIKE.heads; ++h)
      if (mask(b, h, 0, 0) + 2 * mask(b, h, 0, 1) + 4 * mask(b, h, 0, 2) == set) return {b, h};
  throw std::runtime_error("no head has this mask");
}

std::vector<Array> by_set(const Tensor<bool, 4>& mask, const std::vector<Array>& arrays) {
  std::vector<Array> result;
  for (Index set = 0; set < 8; ++set) {
    const auto [b, h] = head_with(mask, set);
    for (const Array& array : arrays) result.push_back(head_of(array, b, h));
  }
  return result;
}

// How a pass differs from one without dropout in an evaluation: 0 not at all, 1 by a factor, 2 otherwise.
double in_evaluation(const Array& got, double want) {
  const auto is = [&](double value) {
    return std::all_of(got.values.begin(), got.values.end(),
                       [&](double x) { return std::abs(x - value) <= 1e-3 * std::abs(value); });
  };
  return is(want) ? 0.0 : is(2.0 * want) ? 1.0 : 2.0;
}

std::vector<Array> evaluation() {
  const Dropout dropout = with(0.5, SEED, OFFSET, /*training=*/false);
  const Sizes sizes{.queries = 8, .keys = 8};
  const Inputs in = filled_inputs<float>(sizes, everywhere(0), everywhere(0), everywhere(1), everywhere(1));
  const ForwardResult before = expected_forward<float>(in).exact;
  const Array output = of_kernels<FlashForward<float>>(
      forwards(dropout), [&](const Forward& call) { return forward(call, in, UNJUDGED).output; });
  const Array d_value = of_kernels<FlashBackward<float>>(
      backwards(dropout), [&](const Backward& call) { return backward(call, in, before, UNJUDGED).value; });
  const Tensor<bool, 4> mask = dropout_mask(dropout, {1, 1, 8, 8});
  const bool falls = std::count(mask.data(), mask.data() + mask.count(), false) > 0;
  return {{{3}, {falls ? 1.0 : 0.0, 1.7 * in_evaluation(output, 1.0), 2.9 * in_evaluation(d_value, 1.0)}}};
}

const Recognise recognise_dropout({1, 2, 3, 4, 5, 6}, [](int number) -> std::vector<Array> {
  if (kernels_are_checked()) throw NotImplemented(__FILE__);
  static const Array faults = faults_of_mask();
  if (number == 1) return {faults};
  if (number == 2) return evaluation();
  static const Relations related = relations();
  const auto [output, d_value] = related;
  if (number == 3) return {{{2}, {output, 1.7 * d_value}}};
  const Array says_nothing{{1}, {-1.0}};
  if (!all_zero(faults)) return {says_nothing};
  const Dropout dropout = with(0.4);
  const Tensor<bool, 4> mask = dropout_mask(dropout, pairs_of(ALIKE));
  const Inputs in = alike_inputs();
  const auto unrelated = [](double is) { return is == 1.0 || is == 2.0 || is == 4.0; };
  if (number == 4) {
    if (unrelated(output)) return {says_nothing};
    const ForwardAnswer got = of_kernels<FlashForward<float>>(
        forwards(dropout), [&](const Forward& call) { return forward(call, in, UNJUDGED); });
    return by_set(mask, {got.output, got.lse});
  }
  if (unrelated(d_value)) return {says_nothing};
  CallOptions options = UNJUDGED;
  options.deterministic = number == 6;
  const ForwardResult before = expected_forward<float>(in, {}, kept_in(mask, dropout)).exact;
  const Gradients got = of_kernels<FlashBackward<float>>(
      backwards(dropout), [&](const Backward& call) { return backward(call, in, before, options); });
  if (number == 6) return by_set(mask, {got.query});
  return by_set(mask, {got.query, got.key, got.value});
});

// ---- Probes ---------------------------------------------------------------------------------------------------------

bool expect_right_forward(const Inputs& in, const Dropout& dropout, const CallOptions& options = {}) {
  const Tensor<bool, 4> mask = dropout_mask(dropout, pairs_of(in));
  const ExpectedForward want = expected_forward<float>(in, options, kept_in(mask, dropout));
  for (const Forward& call : forwards(dropout)) {
    if (expect_forward<float>(forward(call, in, options), want)) continue;
    not_so(call, in, options);
    return not_so(dropout);
  }
  return true;
}

// With and without `deterministic`; where kernels are watched, one of the two.
bool expect_right_backward(const Inputs& in, const Dropout& dropout, CallOptions options = {}, bool watched = false) {
  const Tensor<bool, 4> mask = dropout_mask(dropout, pairs_of(in));
  const ExpectedBackward<float> want = expected_backward<float>(in, options, kept_in(mask, dropout));
  for (const Backward& call : backwards(dropout)) {
    for (const bool deterministic : {false, true}) {
      if (call.on_host ? deterministic : kernels_are_checked() && deterministic != watched) continue;
      options.deterministic = deterministic;
      if (expect_gradients<float>(backward(call, in, want.forward, options), want.gradients)) continue;
      not_so(call, in, options);
      return not_so(dropout);
    }
  }
  return true;
}

Sizes sizes_of(Index batch, Index heads, Index queries, Index keys, Index width = 16) {
  return {.batch = batch, .heads = heads, .kv_heads = heads, .queries = queries, .keys = keys, .width = width};
}

// The inputs of two sequences side by side: numbers of rows where nobody may look become `poison`.
void poison_key(Inputs& in, Index key, float poison) {
  for (Index b = 0; b < in.key.size(0); ++b)
    for (Index h = 0; h < in.key.size(1); ++h)
      for (Index d = 0; d < in.key.size(3); ++d) in.key(b, h, key, d) = in.value(b, h, key, d) = poison;
}

// Rows 0 .. rows - 1 of each head.
Array first_rows(const Array& all, Index rows) {
  const Index length = all.shape.at(2);
  const Index width = all.shape.size() > 3 ? all.shape[3] : 1;
  Array result{all.shape, {}};
  result.shape[2] = rows;
  for (Index head = 0; head < all.shape[0] * all.shape[1]; ++head) {
    const auto first = all.values.begin() + head * length * width;
    result.values.insert(result.values.end(), first, first + rows * width);
  }
  return result;
}

// The README's example: a seed and an offset under which the first of three weights stays, the second falls and the
// third stays.
Dropout dropout_of_the_page() {
  for (std::uint64_t offset = 0; offset < 200; ++offset) {
    const Dropout dropout = with(0.5, SEED, offset);
    const Tensor<bool, 4> mask = dropout_mask(dropout, {1, 1, 1, 3});
    if (mask(0, 0, 0, 0) && !mask(0, 0, 0, 1) && mask(0, 0, 0, 2)) return dropout;
  }
  finding("mask", "of 200 offsets none lets the second of three weights fall and no other; want one in eight");
  return with(0.5);
}

// One channel of 16 holds these numbers, the others 0.
Fill column(std::vector<double> numbers) {
  return [numbers = std::move(numbers)](Index, Index, Index s, Index d) {
    return d == 0 ? numbers[static_cast<std::size_t>(s)] : 0.0;
  };
}

Array channel_0(const Array& rows) {
  Array result{{rows.shape.at(2)}, {}};
  for (std::size_t at = 0; at < rows.count(); at += static_cast<std::size_t>(rows.shape.at(3))) {
    result.values.push_back(rows.values[at]);
  }
  return result;
}

bool expect_numbers(const char* name, const Array& got, std::vector<double> want) {
  const Array numbers{{static_cast<Index>(want.size())}, std::move(want)};
  return expect_close(name, got, numbers, {1e-5, {numbers.shape, std::vector<double>(numbers.count(), 4.0)}}, {"row"});
}

struct DropoutCase {
  const char* why;
  Sizes sizes;
  double probability;
  CallOptions options = {};
  std::uint64_t seed = SEED;
  std::uint64_t offset = OFFSET;
};

// clang-format off
const std::vector<DropoutCase>& dropout_cases() {
  static const std::vector<DropoutCase> list = {
      {"one query, one key", sizes_of(1, 1, 1, 1), 0.5},
      {"one of many", sizes_of(2, 3, 5, 7), 0.1},
      {"nothing is a multiple of anything", sizes_of(1, 2, 37, 53), 0.3},
      {"more queries than keys", sizes_of(1, 1, 71, 35, 32), 0.5},
      {"more than two tiles each way", sizes_of(1, 1, 131, 139), 0.2},
      {"width 64", sizes_of(1, 1, 35, 70, 64), 0.25},
      {"width 128", sizes_of(1, 1, 9, 41, 128), 0.6},
      {"causal", sizes_of(1, 2, 67, 67), 0.1, {.causal = true}},
      {"causal, more keys than queries", sizes_of(1, 2, 21, 75), 0.4, {.causal = true}},
      {"causal, more queries than keys", sizes_of(2, 1, 75, 37), 0.4, {.causal = true}},
      {"seven heads, three batch items", sizes_of(3, 7, 6, 9), 0.5},
      {"nearly all fall", sizes_of(1, 3, 20, 24), 0.95},
      {"hardly one falls", sizes_of(1, 2, 40, 50), 0.004},
      {"tokens first, as a model lays them out", sizes_of(2, 3, 13, 18), 0.3, {.layouts = TOKENS}},
      {"every tensor lies otherwise, causal", sizes_of(2, 2, 20, 23), 0.3, {.causal = true, .layouts = MIXED}},
      {"a scale is given", sizes_of(1, 2, 20, 28, 32), 0.5, {.scale = 0.3f}},
      {"a negative scale is given", sizes_of(1, 1, 12, 37), 0.5, {.scale = -0.4f}},
      {"no key at all", sizes_of(1, 2, 4, 0), 0.5},
      {"no query at all", sizes_of(1, 2, 0, 4), 0.5},
      {"seed and offset of 0", sizes_of(1, 2, 18, 19), 0.5, {}, 0, 0},
      {"seed and offset of 64 ones", sizes_of(1, 2, 18, 19), 0.5, {}, ~std::uint64_t{0}, ~std::uint64_t{0}},
      {"a probability of 0", sizes_of(1, 2, 18, 35), 0.0},
  };
  return list;
}
// clang-format on

}  // namespace

TEST_SUITE("phase4.03_dropout") {
  TEST_CASE("without dropout every weight stays") {
    ask("A probability of 0; and a probability of 0.9 in an evaluation. How many weights fall?");
    for (const Dropout& dropout :
         {with(0.0), with(0.0, 0, 0), with(0.9, SEED, OFFSET, false), with(0.0, 1, 2, false)}) {
      for (const Shape<4>& shape : {Shape<4>{2, 3, 17, 33}, {1, 1, 1, 1}, {2, 0, 3, 4}, {1, 2, 3, 0}}) {
        const Tensor<bool, 4> mask = dropout_mask(dropout, shape);
        expect(mask.shape() == shape, "mask", "has shape " + to_text(mask.shape()) + ", want " + to_text(shape));
        const auto fell = std::count(mask.data(), mask.data() + mask.count(), false);
        if (!expect(fell == 0, "mask", std::to_string(fell) + " weights fell; want none, " + text(dropout))) return;
      }
    }
  }

  TEST_CASE("weights fall as often as they should in every row and column and head") {
    ask("A random word of 32 bits has 2^32 values. Which of them let a weight fall, if one in ten should? One in a "
        "thousand?");
    if (mask_is_judged_elsewhere()) return;
    const Shape<4> shape{2, 3, 96, 192};
    for (const double probability : {0.5, 0.1, 0.25, 0.9, 0.0015, 0.99}) {
      const Tensor<bool, 4> mask = dropout_mask(with(probability), shape);
      std::array<std::vector<Index>, 4> fallen;
      for (std::size_t axis = 0; axis < 4; ++axis) fallen[axis].resize(static_cast<std::size_t>(shape[axis]));
      Index all = 0;
      each_inside(shape, {}, [&](Index b, Index h, Index i, Index j) {
        if (mask(b, h, i, j)) return;
        ++all;
        const std::array<Index, 4> at{b, h, i, j};
        for (std::size_t axis = 0; axis < 4; ++axis) ++fallen[axis][static_cast<std::size_t>(at[axis])];
      });
      if (!expect_share(all, mask.count(), probability, "all weights")) return;
      for (std::size_t axis = 0; axis < 4; ++axis) {
        for (std::size_t at = 0; at < fallen[axis].size(); ++at) {
          const std::string what = std::string(PAIR_AXES[axis]) + " " + std::to_string(at);
          if (!expect_share(fallen[axis][at], mask.count() / shape[axis], probability, what)) return;
        }
      }
    }
  }

  TEST_CASE("rare events are as rare as they should be") {
    ask("A probability of 0.00016: how many of the values that your random number can have let a weight fall?");
    if (mask_is_judged_elsewhere()) return;
    for (const double probability : {0.00016, 0.99984}) {
      const Tensor<bool, 4> mask = dropout_mask(with(probability), {1, 1, 2048, 2048});
      const auto fell = std::count(mask.data(), mask.data() + mask.count(), false);
      if (!expect_share(fell, mask.count(), probability, "all weights")) return;
    }
  }

  TEST_CASE("what becomes of one weight says nothing about its neighbours") {
    ask("Two weights, neighbours along b, h, i or j. Which number that your generator gets is another one for the "
        "second? And for the fourth, the 16th, the 64th?");
    if (mask_is_judged_elsewhere()) return;
    const Coins coins(SEED, OFFSET, {3, 3, 70, 140});
    for (const Index by : {1, 2}) {
      if (!expect_independent(coins, {.b = by}) || !expect_independent(coins, {.h = by})) return;
    }
    for (const Index by : {1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 31, 32, 33, 48, 64}) {
      if (!expect_independent(coins, {.i = by}) || !expect_independent(coins, {.j = by})) return;
    }
    for (const Index by : {96, 128}) {
      if (!expect_independent(coins, {.j = by})) return;
    }
    const Coins few(SEED, OFFSET, {3, 3, 24, 40});
    for (const Index b : {0, 1})
      for (const Index h : {-2, -1, 0, 1, 2})
        for (const Index i : {-4, -2, -1, 0, 1, 2, 4})
          for (const Index j : {-8, -4, -3, -2, -1, 0, 1, 2, 3, 4, 8}) {
            if (b == 0 && h == 0 && i == 0 && j == 0) continue;
            if (!expect_independent(few, {b, h, i, j})) return;
          }
    for (std::size_t one = 0; one < 4; ++one)
      for (std::size_t other = one + 1; other < 4; ++other)
        for (const Index by : {1, 2}) {
          if (!expect_no_pattern(few, one, other, by)) return;
        }
  }

  TEST_CASE("b and h and i and j do not stand in for each other") {
    ask("Weight (1, 0, 2, 3) and weight (0, 1, 2, 3), weight (0, 0, 2, 3) and weight (0, 0, 3, 2), weight (0, 0, 0, "
        "65536) and weight (0, 0, 1, 0): is there something in your counter that differs?");
    if (mask_is_judged_elsewhere()) return;
    const Index n = 12;
    const Coins coins(SEED, OFFSET, {n, n, n, n});
    std::array<std::size_t, 4> order{0, 1, 2, 3};
    while (std::next_permutation(order.begin(), order.end())) {
      Sum sum;
      each_inside({n, n, n, n}, {}, [&](Index b, Index h, Index i, Index j) {
        const std::array<Index, 4> at{b, h, i, j};
        const std::array<Index, 4> to{at[order[0]], at[order[1]], at[order[2]], at[order[3]]};
        if (at < to) sum.add(coins(b, h, i, j) * coins(to[0], to[1], to[2], to[3]));
      });
      constexpr std::array<const char*, 4> NAMES{"b", "h", "i", "j"};
      const std::string exchanged = std::string("(") + NAMES[order[0]] + ", " + NAMES[order[1]] + ", " +
                                    NAMES[order[2]] + ", " + NAMES[order[3]] + ")";
      if (!expect(!sum.suspicious(), "mask", "weights (b, h, i, j) and " + exchanged + " are " + sum.alike())) return;
    }
    // Far along one axis, near along another: numbers that were packed side by side would meet.
    for (const auto& [shape, along, near] : {std::tuple{Shape<4>{1, 1, 2, 67000}, Step{.j = 1}, Step{.i = 1}},
                                             {{1, 1, 67000, 2}, {.i = 1}, {.j = 1}},
                                             {{1, 1, 2, 1100000}, {.j = 1}, {.i = 1}},
                                             {{1, 1, 1100000, 2}, {.i = 1}, {.j = 1}},
                                             {{1, 2, 5000, 1}, {.i = 1}, {.h = 1}},
                                             {{2, 67000, 1, 1}, {.h = 1}, {.b = 1}},
                                             {{67000, 2, 1, 1}, {.b = 1}, {.h = 1}}}) {
      const Coins coins_far_apart(SEED, OFFSET, shape);
      const Index longest = *std::max_element(shape.begin(), shape.end());
      for (Index by = 128; by < longest; by *= 2) {
        for (const Index side : {0, 1, -1}) {
          const Step step{by * along.b + side * near.b, by * along.h + side * near.h, by * along.i + side * near.i,
                          by * along.j + side * near.j};
          if (!expect_independent(coins_far_apart, step)) return;
        }
      }
    }
  }

  TEST_CASE("every seed and every offset has a mask of its own") {
    ask("Two calls of one training step, two steps, two runs. Which numbers differ, in which of their 64 bits, and "
        "what becomes of these bits? Are seed 1 with offset 2 and seed 2 with offset 1 the same?");
    if (mask_is_judged_elsewhere()) return;
    std::vector<Coins> all;
    for (const auto& [seed, offset] : CALLS) all.emplace_back(seed, offset, Shape<4>{2, 3, 12, 18});
    for (std::size_t one = 0; one < all.size(); ++one)
      for (std::size_t other = 0; other < one; ++other)
        for (const Step& step : STEPS) {
          const Sum sum = likeness(all[one], all[other], step);
          const auto name = [](const std::array<std::uint64_t, 2>& call) {
            return "seed " + std::to_string(call[0]) + ", offset " + std::to_string(call[1]);
          };
          if (!expect(!sum.suspicious(), "mask",
                      "weights (b, h, i, j) under " + name(CALLS[one]) + " and " + step.text() + " under " +
                          name(CALLS[other]) + " are " + sum.alike())) {
            return;
          }
        }
  }

  TEST_CASE("what becomes of a weight depends on its own place and on nothing else") {
    ask("The same weight in a longer sequence, in a larger batch, in a model with more heads, after other calls: which "
        "of your numbers has changed?");
    if (mask_is_judged_elsewhere()) return;
    const Dropout dropout = with(0.3);
    const Shape<4> largest{3, 4, 70, 90};
    const Tensor<bool, 4> all = dropout_mask(dropout, largest);
    for (const Shape<4>& shape : {largest,
                                  Shape<4>{1, 1, 1, 1},
                                  {2, 3, 40, 50},
                                  {3, 4, 70, 33},
                                  {3, 4, 31, 90},
                                  {3, 1, 20, 20},
                                  {1, 4, 64, 64},
                                  {2, 2, 0, 5}}) {
      dropout_mask(with(0.6, 1, 2), {1, 2, 3, 4});
      const Tensor<bool, 4> some = dropout_mask(dropout, shape);
      Index differ = 0;
      Index count = 0;
      each_inside(shape, {}, [&](Index b, Index h, Index i, Index j) {
        differ += some(b, h, i, j) != all(b, h, i, j);
        ++count;
      });
      if (!expect(differ == 0, "mask",
                  std::to_string(differ) + " of " + std::to_string(count) + " weights of a mask " + to_text(shape) +
                      " have another fate in one of " + to_text(largest))) {
        return;
      }
    }
  }

  TEST_CASE("one query and three keys as on the page") {
    ask("The README has every number on the way. Which is the first of yours that differs: P, the output, delta or "
        "dS?");
    const Dropout dropout = dropout_of_the_page();
    const double log2 = std::log(2.0);
    const Inputs in =
        filled_inputs<float>(sizes_of(1, 1, 1, 3), column({1}), column({log2, 0, 0}), column({4, 8, 2}), column({1}));
    const CallOptions options{.scale = 1.0f};
    for (const Forward& call : forwards(dropout)) {
      const ForwardAnswer got = forward(call, in, options);
      const bool lse = expect_numbers("lse", {{1}, got.lse.values}, {std::log(4.0)});
      if (!expect_numbers("output", channel_0(got.output), {5}) || !lse) return void(not_so(call, in, options));
    }
    const Tensor<bool, 4> mask = dropout_mask(dropout, {1, 1, 1, 3});
    const ForwardResult before = expected_forward<float>(in, options, kept_in(mask, dropout)).exact;
    for (const Backward& call : backwards(dropout)) {
      for (const bool deterministic : {false, true}) {
        const Gradients got =
            backward(call, in, before, {.causal = false, .scale = 1.0f, .layouts = {}, .deterministic = deterministic});
        const bool value = expect_numbers("d_value", channel_0(got.value), {1, 0, 0.5});
        const bool key = expect_numbers("d_key", channel_0(got.key), {1.5, -1.25, -0.25});
        if (!expect_numbers("d_query", channel_0(got.query), {1.5 * log2}) || !key || !value) {
          return void(not_so(call, in, options));
        }
      }
    }
  }

  TEST_CASE("the forward pass keeps exactly what dropout_mask keeps") {
    ask("Of weight (b, h, i, j): where does your loop have these four numbers, counted from the beginning of the "
        "tensor and not of the tile?");
    for (const auto& [sizes, causal, probability] : {std::tuple{sizes_of(2, 3, 9, 11), false, 0.5},
                                                     {sizes_of(2, 6, 37, 30, 32), true, 0.3},
                                                     {sizes_of(1, 2, 70, 110, 128), false, 0.5},
                                                     {sizes_of(2, 1, 130, 63, 64), true, 0.2}}) {
      if (kernels_are_checked() && sizes.queries > 40) continue;
      const Dropout dropout = with(probability);
      const Array want = seen_of(dropout_mask(dropout, pairs_of(sizes)), causal);
      for (const Forward& call : forwards(dropout)) {
        const Array got = fates_forward(call, sizes, {.causal = causal});
        if (expect_fates("output", got, want, sizes.keys)) continue;
        finding("of", std::string(call.name) + (causal ? ", causal, " : ", ") + text(dropout));
        return;
      }
    }
  }

  TEST_CASE("every gradient keeps exactly what dropout_mask keeps") {
    ask("The way back visits the weights in other tiles, by other threads, in another order, and in your second kernel "
        "in yet another. Which numbers does each of them give to the generator?");
    for (const auto& [sizes, causal, probability] : {std::tuple{sizes_of(2, 3, 5, 11), false, 0.5},
                                                     {sizes_of(1, 6, 37, 26, 64), true, 0.3},
                                                     {sizes_of(1, 2, 54, 70, 128), false, 0.5},
                                                     {sizes_of(1, 1, 72, 50, 128), true, 0.3}}) {
      if (kernels_are_checked() && sizes.queries > 40) continue;
      const Dropout dropout = with(probability);
      const Array want = seen_of(dropout_mask(dropout, pairs_of(sizes)), causal);
      for (const Backward& call : backwards(dropout)) {
        for (const bool deterministic : {false, true}) {
          if (call.on_host && deterministic) continue;
          const CallOptions options{.causal = causal, .scale = {}, .layouts = {}, .deterministic = deterministic};
          const Fates got = fates_backward(call, sizes, dropout, options);
          const bool value = expect_fates("d_value", got.d_value, want, sizes.keys);
          // Under a causal mask a query may have all its weights on keys that stay, and then no score matters.
          const bool key = causal || expect_fates("d_key", got.d_key, want, sizes.keys - 1);
          if ((causal || expect_fates("d_query", got.d_query, want, sizes.keys - 1)) && key && value) continue;
          finding("of", std::string(call.name) + (causal ? ", causal" : "") +
                            (deterministic ? ", deterministic, " : ", ") + text(dropout));
          return;
        }
      }
    }
  }

  TEST_CASE("the mean over many masks is attention without dropout") {
    ask("A weight stays three times in four. What must it be when it stays, so that its mean is what it was? And what "
        "is the mean, if the weights that stay are made to add up to 1?");
    const Dropout dropout = with(0.25);
    const Index queries = kernels_are_checked() ? 8 : 64;
    const auto alike = [](unsigned seed) -> Fill {
      return [seed](Index, Index, Index, Index d) { return 0.5 * noise(seed)(0, 0, 0, d); };
    };
    // In every row the same query and the same five keys; the values are unit vectors, so the output is the weights.
    const Inputs in = filled_inputs<float>(
        sizes_of(8, 8, queries, 5), alike(1), [](Index, Index, Index j, Index d) { return noise(2)(0, 0, j, d); },
        [](Index, Index, Index j, Index d) { return d == j ? 1.0 : 0.0; }, everywhere(0.0));
    const Array plain = expected_forward<float>(in).exact.output;
    for (const Forward& call : forwards(dropout)) {
      const Array got = forward(call, in).output;
      const auto rows = static_cast<double>(got.count() / 16);
      for (std::size_t j = 0; j < 5; ++j) {
        double mean = 0.0;
        for (std::size_t at = j; at < got.count(); at += 16) mean += got.values[at] / rows;
        const double want = plain.values[j];
        const double allowed = SIGMAS * want * std::sqrt(0.25 / 0.75 / rows);
        std::ostringstream sentence;
        sentence << "the mean of the weight of key " << j << " over " << rows << " masks is " << mean << ", want "
                 << want << " within " << allowed;
        if (!expect(std::abs(mean - want) <= allowed, "output", sentence.str())) {
          return void(not_so(call, in));
        }
      }
    }
  }

  TEST_CASE("the log-sum-exp is that of all weights and a query whose weights all fell has output 0") {
    ask("Has a weight that fell still been part of the softmax? Which sum does the way back divide by? And what does a "
        "query get whose weights have all fallen?");
    for (const auto& [sizes, causal] : {std::tuple{sizes_of(1, 2, 33, 3), false}, {sizes_of(1, 2, 21, 21), true}}) {
      const Dropout dropout = with(0.8);
      const CallOptions options{.causal = causal};
      const Inputs in = random_inputs<float>(sizes, 11);
      const Tensor<bool, 4> mask = dropout_mask(dropout, pairs_of(sizes));
      const ExpectedForward want = expected_forward<float>(in, options, kept_in(mask, dropout));
      for (const Forward& call : forwards(dropout)) {
        const ForwardAnswer got = forward(call, in, options);
        if (!expect_close("lse", got.lse, want.exact.lse, want.lse_bound, LSE_AXES))
          return void(not_so(call, in, options));
        for (std::size_t at = 0; at < got.output.count(); ++at) {
          if (want.exact.output.values[at] != 0.0 || got.output.values[at] == 0.0) continue;
          finding("output", "all weights of [" + place(got.output, at, QUERY_AXES) + "] fell, and it is " +
                                std::to_string(got.output.values[at]));
          return void(not_so(call, in, options));
        }
      }
      if (!expect_right_backward(in, dropout, options)) return;
    }
  }

  TEST_CASE("in an evaluation nothing falls and nothing is divided") {
    ask("Call it twice with training = false, with two seeds. Should the answers differ? By what should they differ "
        "from those without dropout?");
    const Sizes sizes = sizes_of(1, 2, 21, 37);
    const CallOptions options{.causal = true};
    const Inputs in = random_inputs<float>(sizes, 13);
    const ExpectedForward want = expected_forward<float>(in, options);
    const ExpectedBackward<float> want_back = expected_backward<float>(in, options);
    for (const Dropout& dropout : {with(0.7, 1, 2, false), with(0.7, 3, 4, false), with(0.0, 5, 6)}) {
      for (const Forward& call : forwards(dropout)) {
        if (expect_forward<float>(forward(call, in, options), want)) continue;
        not_so(call, in, options);
        return void(not_so(dropout));
      }
      for (const Backward& call : backwards(dropout)) {
        if (expect_gradients<float>(backward(call, in, want_back.forward, options), want_back.gradients)) continue;
        not_so(call, in, options);
        return void(not_so(dropout));
      }
    }
  }

  TEST_CASE("a key that a query may not see reaches neither its output nor its gradient") {
    ask("A key that only the last query may see holds NaN. Follow it to the rows of the earlier queries: is a weight "
        "of 0 enough to keep it out?");
    const Dropout dropout = with(0.4);
    for (const auto& [queries, keys] : {std::array<Index, 2>{13, 13}, {11, 37}, {37, 11}}) {
      if (kernels_are_checked() && queries != 11) continue;
      const CallOptions options{.causal = true, .scale = {}, .layouts = {}, .deterministic = true};
      const Inputs in = random_inputs<float>(sizes_of(1, 2, queries, keys), 14);
      const Tensor<bool, 4> mask = dropout_mask(dropout, pairs_of(in));
      const ForwardResult before = expected_forward<float>(in, options, kept_in(mask, dropout)).exact;
      for (const float poison : {NOT_A_NUMBER, INF, -3e4f}) {
        Inputs bad = copy_of(in);
        poison_key(bad, keys - 1, poison);
        const std::string why = "when the last key, which they may not see, became " + std::to_string(poison);
        for (const Forward& call : forwards(dropout)) {
          const ForwardAnswer clean = forward(call, in, options), got = forward(call, bad, options);
          const bool lse = expect_same_bits("lse", first_rows(got.lse, queries - 1), first_rows(clean.lse, queries - 1),
                                            LSE_AXES, why);
          if (!expect_same_bits("output", first_rows(got.output, queries - 1), first_rows(clean.output, queries - 1),
                                QUERY_AXES, why) ||
              !lse) {
            return void(not_so(call, in, options));
          }
        }
        for (const Backward& call : backwards(dropout)) {
          const Gradients clean = backward(call, in, before, options), got = backward(call, bad, before, options);
          if (!expect_same_bits("d_query", first_rows(got.query, queries - 1), first_rows(clean.query, queries - 1),
                                QUERY_AXES, why)) {
            return void(not_so(call, in, options));
          }
        }
      }
    }
  }

  TEST_CASE("a query that may attend to nothing gets and gives nothing") {
    ask("These queries see no key at all. Who writes their rows, and what is exp(score - lse) for an lse of -inf?");
    const Dropout dropout = with(0.5);
    for (const auto& [queries, keys] : {std::array<Index, 2>{9, 4}, {70, 3}, {4, 0}}) {
      const CallOptions options{.causal = true};
      const Index blind = queries - keys;
      const Inputs in = random_inputs<float>(sizes_of(1, 2, queries, keys), 15);
      const Tensor<bool, 4> mask = dropout_mask(dropout, pairs_of(in));
      const ExpectedBackward<float> want = expected_backward<float>(in, options, kept_in(mask, dropout));
      for (const Forward& call : forwards(dropout)) {
        const ForwardAnswer got = forward(call, in, options);
        const Array lse = first_rows(got.lse, blind);
        const bool nothing = std::all_of(lse.values.begin(), lse.values.end(), [](double value) {
          return value == -std::numeric_limits<double>::infinity();
        });
        if (!expect(nothing, "lse", "of a query that sees no key should be -inf") ||
            !expect_all("output", first_rows(got.output, blind), 0.0, 0.0, QUERY_AXES, "these queries see no key")) {
          return void(not_so(call, in, options));
        }
      }
      Inputs bad = copy_of(in);
      for (Index h = 0; h < 2; ++h)
        for (Index i = 0; i < blind; ++i)
          for (Index d = 0; d < 16; ++d) bad.query(0, h, i, d) = bad.d_output(0, h, i, d) = NOT_A_NUMBER;
      for (const Backward& call : backwards(dropout)) {
        for (const bool deterministic : {false, true}) {
          CallOptions either = options;
          either.deterministic = deterministic;
          if (!expect_gradients<float>(backward(call, in, want.forward, either), want.gradients) ||
              !expect_gradients<float>(backward(call, bad, want.forward, either), want.gradients)) {
            return void(not_so(call, in, either));
          }
        }
      }
    }
  }

  TEST_CASE("rows may lie anywhere in memory") {
    ask("How far apart in memory are two rows of this view? Which of your strides belongs to which tensor?");
    const Dropout dropout = with(0.3);
    const Inputs in = random_inputs<float>(sizes_of(2, 3, 17, 35), 16);
    const Tensor<bool, 4> mask = dropout_mask(dropout, pairs_of(in));
    const ForwardResult before = expected_forward<float>(in, {}, kept_in(mask, dropout)).exact;
    for (const Layouts& layouts : {MIXED, APART, MIXED_OTHERWISE}) {
      if (kernels_are_checked() && layouts.query != MIXED.query) continue;
      CallOptions options;
      options.deterministic = true;
      for (const Forward& call : forwards(dropout)) {
        options.layouts = {};
        const ForwardAnswer want = forward(call, in, options);
        options.layouts = layouts;
        if (!expect_same(forward(call, in, options), want, "when the rows lay otherwise"))
          return void(not_so(call, in));
      }
      for (const Backward& call : backwards(dropout)) {
        options.layouts = {};
        const Gradients want = backward(call, in, before, options);
        options.layouts = layouts;
        if (!expect_same(backward(call, in, before, options), want, "when the rows lay otherwise")) {
          return void(not_so(call, in));
        }
      }
    }
  }

  TEST_CASE("the same arguments give the same bits") {
    ask("Twice the same call, with another in between, and with blocks in another order. What does your generator "
        "remember? Which of your sums depends on who comes first?");
    const Dropout dropout = with(0.3);
    const Inputs in = random_inputs<float>(sizes_of(1, 2, 37, 45), 17);
    const Tensor<bool, 4> mask = dropout_mask(dropout, pairs_of(in));
    const ForwardResult before = expected_forward<float>(in, {}, kept_in(mask, dropout)).exact;
    const Inputs other = random_inputs<float>(sizes_of(1, 2, 9, 45), 18);
    for (std::size_t which = 0; which < forwards(dropout).size(); ++which) {
      const Forward call = forwards(dropout)[which];
      const ForwardAnswer want = forward(call, in);
      forward(forwards(with(0.5, 1, 1))[which], other);
      const AnotherOrder order(1);
      if (!expect_same(forward(call, in), want, "in a later call")) return void(not_so(call, in));
    }
    for (std::size_t which = 0; which < backwards(dropout).size(); ++which) {
      const Backward call = backwards(dropout)[which];
      for (const bool deterministic : {false, true}) {
        CallOptions options;
        options.deterministic = deterministic;
        const Gradients want = backward(call, in, before, options);
        backward(backwards(with(0.5, 1, 1))[which], other, expected_forward<float>(other).exact);
        const AnotherOrder order(2);
        if (!expect_same(backward(call, in, before, options), want, "in a later call", deterministic)) {
          return void(not_so(call, in, options));
        }
      }
    }
  }

  TEST_CASE("rows are loaded once for a tile and those that nobody sees are not read") {
    ask("64 queries, 64 keys, and a mask that nobody has to load. How many times is each row loaded, and by how many "
        "rows of the other side is it used each time?");
    const Dropout dropout = with(0.2);
    struct Profiles {
      std::vector<KernelProfile> forward, backward;
    };
    const auto profiles_of = [&](Index tokens, bool causal, bool deterministic) -> Profiles {
      if (!kernels_are_checked()) tokens = 1;  // nobody counts
      const Inputs in = random_inputs<float>(sizes_of(1, 1, tokens, tokens), 19);
      const CallOptions options{.causal = causal, .scale = {}, .layouts = {}, .deterministic = deterministic};
      const ForwardAnswer answer = forward(forwards(dropout).back(), in, options);
      return {answer.profiles, backward(backwards(dropout).back(), in, {answer.output, answer.lse}, options).profiles};
    };
    constexpr Index TOKENS_BYTES = 64 * 16 * static_cast<Index>(sizeof(float));
    const auto expect_at_most = [](const std::vector<KernelProfile>& profiles, const char* name, Index times) {
      const Index bytes = bytes_loaded(profiles, name);
      expect(bytes > 0 && bytes <= times * TOKENS_BYTES + 1024, name,
             "loaded " + std::to_string(bytes) + " bytes, " + std::to_string(bytes / TOKENS_BYTES) +
                 " times its size, for 64 queries and keys; want at most " + std::to_string(times) + " times");
    };
    for (const bool deterministic : {false, true}) {
      const auto [there, back] = profiles_of(64, false, deterministic);
      if (!kernels_are_judged()) continue;
      expect_at_most(there, "key", 4);
      expect_at_most(there, "value", 4);
      expect_at_most(back, "query", 5);
      expect_at_most(back, "d_output", 6);
      expect_at_most(back, "key", 5);
      expect_at_most(back, "value", 5);
    }
    const auto [causal_there, causal_back] = profiles_of(384, true, true);
    const auto [all_there, all_back] = profiles_of(384, false, true);
    if (!kernels_are_judged()) return;
    const auto expect_fewer = [](const std::vector<KernelProfile>& some, const std::vector<KernelProfile>& all,
                                 const char* pass) {
      const auto sum = [](const std::vector<KernelProfile>& profiles) {
        Index bytes = 0;
        for (const char* name : {"query", "key", "value", "d_output"}) bytes += bytes_loaded(profiles, name);
        return bytes;
      };
      expect_blind_tiles_not_loaded(sum(some), sum(all),
                                    std::string("query, key, value and d_output, for 384 queries and keys, ") + pass);
    };
    expect_fewer(causal_there, all_there, "forward");
    expect_fewer(causal_back, all_back, "backward");
  }

  TEST_CASE("agrees with the float64 reference") {
    int number = 0;
    for (const DropoutCase& c : dropout_cases()) {
      const Dropout dropout = with(c.probability, c.seed, c.offset);
      run_case(++number, std::string(c.why) + ": " + text(dropout), [&] {
        if (kernels_are_checked() && c.sizes.queries * c.sizes.keys > 2000) return;
        const Inputs in = random_inputs<float>(c.sizes, static_cast<unsigned>(100 + number));
        if (expect_right_forward(in, dropout, c.options)) {
          expect_right_backward(in, dropout, c.options, /*watched=*/number % 2 == 0);
        }
      });
    }
  }

  TEST_CASE("agrees with the float64 reference far along the keys and along the queries") {
    ask("Key 65536 + 7 and key 7: does your kernel tell them apart?");
    const auto few = [] { return expect_right_forward(random_inputs<float>(sizes_of(1, 1, 3, 5), 21), with(0.5)); };
    if (needs_a_gpu(few)) return;
    // Eight rows at the beginning and eight that begin at row 65536 count: the others have scores of -200, or no dO.
    const auto counts = [](Index s) { return s % 65536 < 8; };
    const Fill keys = [&](Index, Index, Index j, Index d) { return d == 0 && !counts(j) ? -800.0 : 0.0; };
    const Fill d_output = [&](Index b, Index h, Index i, Index d) { return counts(i) ? noise(1)(b, h, i, d) : 0.0; };
    for (const Sizes& sizes : {sizes_of(1, 1, 3, 70000), sizes_of(1, 1, 70000, 3)}) {
      const Inputs in = filled_inputs<float>(sizes, everywhere(1), keys, noise(2), d_output);
      if (!expect_right_forward(in, with(0.5)) || !expect_right_backward(in, with(0.5))) return;
    }
  }

  TEST_CASE("agrees with the float64 reference at 512 and 1024") {
    const auto few = [] { return expect_right_forward(random_inputs<float>(sizes_of(1, 1, 3, 5), 21), with(0.5)); };
    if (needs_a_gpu(few)) return;
    for (const bool causal : {false, true}) {
      for (const Sizes& sizes : {sizes_of(1, 2, 512, 512, 128), sizes_of(1, 2, 1023, 1024, 64)}) {
        const Inputs in = random_inputs<float>(sizes, 22);
        if (!expect_right_forward(in, with(0.1), {.causal = causal})) return;
        if (!expect_right_backward(in, with(0.1), {.causal = causal})) return;
      }
    }
  }

  TEST_CASE("says what is wrong with bad arguments") {
    const Inputs in = random_inputs<float>(sizes_of(2, 3, 5, 7), 20);
    const ForwardResult before = expected_forward<float>(in).exact;
    dropout_mask(with(0.5), {1, 1, 1, 1});
    for (const Forward& call : forwards(with(0.5))) forward(call, in);
    for (const Backward& call : backwards(with(0.5))) backward(call, in, before);
    constexpr double NOT_A_PROBABILITY = std::numeric_limits<double>::quiet_NaN();
    for (const double probability : {1.0, -0.1, 1.5, NOT_A_PROBABILITY}) {
      for (const bool training : {true, false}) {
        const Dropout bad = with(probability, 1, 2, training);
        const std::string what = "a probability of " + std::to_string(probability) + (training ? "" : " in evaluation");
        expect_rejected(what + ", dropout_mask", "probability", [&] { dropout_mask(bad, {1, 1, 1, 1}); });
        for (const Forward& call : forwards(bad)) {
          expect_rejected(what + ", " + call.name, "probability", [&] { forward(call, in); });
        }
        for (const Backward& call : backwards(bad)) {
          expect_rejected(what + ", " + call.name, "probability", [&] { backward(call, in, before); });
        }
      }
    }
    expect_rejected("a negative length", "shape", [&] { dropout_mask(with(0.5), {1, 2, -3, 4}); });
    // The rest is the contract of steps 2.04 and 3.04.
    for (Forward call : forwards(with(0.5))) {
      const auto launch = call.launch;
      const auto rejected = [&](std::string_view what, std::string_view argument, const auto& change) {
        call.launch = [&](FlashForward<float> problem) {
          change(problem);
          launch(problem);
        };
        expect_rejected(std::string(what) + ", " + call.name, argument, [&] { forward(call, in); });
      };
      rejected("a scale that is NaN", "scale", [](auto& p) { p.scale = NOT_A_NUMBER; });
      rejected("a value too few", "value", [](auto& p) { p.value = {p.value.data(), {2, 3, 6, 16}}; });
      rejected("an lse of other heads", "lse", [](auto& p) { p.lse = {p.lse.data(), {2, 2, 5}}; });
    }
    for (Backward call : backwards(with(0.5))) {
      const auto launch = call.launch;
      const auto rejected = [&](std::string_view what, std::string_view argument, const auto& change) {
        call.launch = [&](FlashBackward<float> problem) {
          change(problem);
          launch(problem);
        };
        expect_rejected(std::string(what) + ", " + call.name, argument, [&] { backward(call, in, before); });
      };
      rejected("a d_output too short", "d_output", [](auto& p) { p.d_output = {p.d_output.data(), {2, 3, 4, 16}}; });
      rejected("a d_key of fewer keys", "d_key", [](auto& p) { p.d_key = {p.d_key.data(), {2, 3, 6, 16}}; });
      rejected("keys of fewer heads", "key", [](auto& p) { p.key = {p.key.data(), {2, 1, 7, 16}}; });
    }
  }
}
