#include "row_delta.hpp"

#include <sys/mman.h>

#include <cmath>
#include <limits>

#include "common/testing/layout.hpp"
#include "common/testing/suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
const Axes DELTA = {"batch", "head", "query"};

// ---- Where [B, H, Sq, Dv] lies in memory ----------------------------------------------------------------------------

enum class Place {
  packed,
  apart,           // NaN after each row
  tokens,          // [B, Sq, H, Dv], the model's layout
  tokens_apart,    // ... with NaN after each token
  queries_last,    // [B, H, Dv, Sq]: two channels of a row are Sq apart
  batch_last,      // [Sq, Dv, H, B]
  every_third,     // two channels are three apart, with NaN between them
  backwards,       // the first number lies last
  one_number,      // all elements are one and the same, as in the gradient of a sum
  one_row,         // all queries, heads and batch items share one row
  one_channel,     // the channels of a row share one number, as in the gradient of a sum over channels
  shared_queries,  // the queries of a head share a row
  shared_heads,    // the heads of a batch item share their rows
  shared_batch,    // the batch items share everything
};

constexpr Place PLACES[] = {Place::packed,       Place::apart,       Place::tokens,      Place::tokens_apart,
                            Place::queries_last, Place::batch_last,  Place::every_third, Place::backwards,
                            Place::one_number,   Place::one_row,     Place::one_channel, Place::shared_queries,
                            Place::shared_heads, Place::shared_batch};

const char* text_of(Place place) {
  switch (place) {
    case Place::packed:
      return "packed";
    case Place::apart:
      return "with NaN after each row";
    case Place::tokens:
      return "in the model's layout";
    case Place::tokens_apart:
      return "in the model's layout with NaN after each token";
    case Place::queries_last:
      return "with the queries as neighbours instead of the channels";
    case Place::batch_last:
      return "with the batch items as neighbours";
    case Place::every_third:
      return "with two NaN after each channel";
    case Place::backwards:
      return "backwards";
    case Place::one_number:
      return "one number for all, strides 0";
    case Place::one_row:
      return "one row for all queries";
    case Place::one_channel:
      return "one number for all channels of a row";
    case Place::shared_queries:
      return "one row for all queries of a head";
    case Place::shared_heads:
      return "the same for all heads";
    case Place::shared_batch:
      return "the same for all batch items";
  }
  return "";
}

Shape<4> strides_at(const Shape<4>& shape, Place place) {
  const auto [batch, heads, queries, channels] = shape;
  const Shape<4> packed = strides_of(shape, Layout::heads, sizeof(float));
  switch (place) {
    case Place::apart:
      return strides_of(shape, Layout::heads_apart, sizeof(float));
    case Place::tokens:
      return strides_of(shape, Layout::tokens, sizeof(float));
    case Place::tokens_apart:
      return strides_of(shape, Layout::tokens_apart, sizeof(float));
    case Place::queries_last:
      return {packed[0], packed[1], 1, queries};
    case Place::batch_last:
      return {1, batch, channels * heads * batch, heads * batch};
    case Place::every_third:
      return {3 * packed[0], 3 * packed[1], 3 * packed[2], 3};
    case Place::backwards:
      return {-packed[0], -packed[1], -packed[2], -packed[3]};
    case Place::one_number:
      return {0, 0, 0, 0};
    case Place::one_row:
      return {0, 0, 0, 1};
    case Place::one_channel:
      return {heads * queries, queries, 1, 0};
    case Place::shared_queries:
      return {packed[0], packed[1], 0, 1};
    case Place::shared_heads:
      return {packed[0], 0, packed[2], 1};
    case Place::shared_batch:
      return {0, packed[1], packed[2], 1};
    default:
      return packed;
  }
}

// Numbers somewhere in memory, with NaN all around them.
class Placed {
 public:
  Placed(const Shape<4>& shape, Place place, const std::function<float(Index, Index, Index, Index)>& number)
      : shape_(shape), strides_(strides_at(shape, place)) {
    Index reach = 0;
    Index before = 0;
    for (std::size_t axis = 0; axis < 4; ++axis) {
      const Index last = std::max<Index>(shape[axis] - 1, 0) * strides_[axis];
      (last < 0 ? before : reach) += std::abs(last);
    }
    first_ = before + MARGIN;
    memory_.assign(static_cast<std::size_t>(before + reach + 1 + 2 * MARGIN), NOT_A_NUMBER);
    for (Index b = 0; b < shape[0]; ++b)
      for (Index h = 0; h < shape[1]; ++h)
        for (Index i = 0; i < shape[2]; ++i)
          for (Index c = 0; c < shape[3]; ++c) (*this)(b, h, i, c) = number(b, h, i, c);
  }

  View<const float, 4> view() const { return {memory_.data() + first_, shape_, strides_}; }
  float& operator()(Index b, Index h, Index i, Index c) {
    return View<float, 4>(memory_.data() + first_, shape_, strides_)(b, h, i, c);
  }
  const std::vector<float>& memory() const { return memory_; }

 private:
  static constexpr Index MARGIN = 128;  // who looks in the wrong place finds NaN and no other's memory
  Shape<4> shape_;
  Shape<4> strides_;
  Index first_ = 0;
  std::vector<float> memory_;
};

// ---- Cases ----------------------------------------------------------------------------------------------------------

enum class Numbers {
  normal,
  large,       // around 1e15, so that a product is around 1e30
  small,       // around 1e-15
  hundreds,    // around 100, so that sums are of order 1e4 and not whole
  cancelling,  // terms of a hundred that cancel but for a small rest
  same_sign,   // nothing cancels
  some_zero,   // every other query's output is 0, as of a query that may attend to nothing
};

struct DeltaCase {
  const char* why;
  Shape<4> shape;
  Place output = Place::packed;
  Place d_output = Place::packed;
  Numbers numbers = Numbers::normal;
  int number = 0;  // its place in the list, from 1; also its seed

  std::string text() const {
    return std::string(why) + ": [B, H, Sq, Dv] = " + to_text(shape) + ", output " + text_of(output) + ", d_output " +
           text_of(d_output);
  }
};

// Their numbers never change: new ones go to the end.
const std::vector<DeltaCase>& delta_cases() {
  static const std::vector<DeltaCase> numbered = [] {
    std::vector<DeltaCase> cases = {
        {.why = "one query, one channel", .shape = {1, 1, 1, 1}},
        {.why = "one head", .shape = {1, 1, 5, 4}},
        {.why = "several heads", .shape = {2, 3, 5, 4}},
        {.why = "one head, three batch items", .shape = {3, 1, 6, 8}},
        {.why = "four heads, one batch item", .shape = {1, 4, 7, 16}},
        {.why = "all lengths alike", .shape = {4, 4, 4, 4}},
        {.why = "more heads than queries", .shape = {2, 8, 3, 5}},
        {.why = "width 3", .shape = {2, 2, 9, 3}},
        {.why = "width 128", .shape = {1, 2, 6, 128}},
        {.why = "width 70", .shape = {2, 1, 5, 70}},
        {.why = "width 257", .shape = {1, 1, 3, 257}},
        {.why = "one channel", .shape = {2, 3, 4, 1}},
        {.why = "300 queries", .shape = {1, 2, 300, 2}},
        {.why = "d_output as the model lays it out", .shape = {2, 3, 5, 4}, .d_output = Place::tokens},
        {.why = "output as the model lays it out", .shape = {2, 3, 5, 4}, .output = Place::tokens},
        {.why = "both", .shape = {2, 3, 5, 4}, .output = Place::tokens, .d_output = Place::tokens},
        {.why = "token rows apart", .shape = {2, 3, 5, 4}, .output = Place::tokens_apart, .d_output = Place::apart},
        {.why = "rows apart", .shape = {2, 3, 5, 4}, .output = Place::apart, .d_output = Place::tokens_apart},
        {.why = "a transposed d_output", .shape = {2, 3, 5, 4}, .d_output = Place::queries_last},
        {.why = "a transposed output", .shape = {2, 3, 5, 4}, .output = Place::queries_last},
        {.why = "both, each in its own way",
         .shape = {2, 3, 5, 4},
         .output = Place::batch_last,
         .d_output = Place::every_third},
        {.why = "the gradient of a sum", .shape = {2, 3, 5, 4}, .d_output = Place::one_number},
        {.why = "the gradient of a sum over queries", .shape = {2, 3, 5, 4}, .d_output = Place::one_row},
        {.why = "the gradient of a sum over channels", .shape = {2, 3, 5, 4}, .d_output = Place::one_channel},
        {.why = "queries with one gradient", .shape = {2, 3, 5, 4}, .d_output = Place::shared_queries},
        {.why = "heads with one gradient", .shape = {2, 3, 5, 4}, .d_output = Place::shared_heads},
        {.why = "batch items with one gradient", .shape = {2, 3, 5, 4}, .d_output = Place::shared_batch},
        {.why = "heads with one output", .shape = {2, 3, 5, 4}, .output = Place::shared_heads},
        {.why = "read from the end", .shape = {2, 3, 5, 4}, .output = Place::backwards, .d_output = Place::backwards},
        {.why = "no query", .shape = {2, 3, 0, 4}},
        {.why = "no channel", .shape = {2, 3, 4, 0}},
        {.why = "no head", .shape = {2, 0, 4, 3}},
        {.why = "no batch item", .shape = {0, 3, 4, 3}},
        {.why = "large numbers", .shape = {1, 2, 5, 8}, .numbers = Numbers::large},
        {.why = "small numbers", .shape = {1, 2, 5, 8}, .numbers = Numbers::small},
        {.why = "terms that cancel, width 128", .shape = {1, 2, 8, 128}, .numbers = Numbers::cancelling},
        {.why = "terms that do not cancel, width 128", .shape = {1, 2, 8, 128}, .numbers = Numbers::same_sign},
        {.why = "some outputs are 0", .shape = {2, 2, 6, 5}, .numbers = Numbers::some_zero},
        {.why = "1 x 2 x 64 x 32", .shape = {1, 2, 64, 32}},
        {.why = "2 x 8 x 33 x 64 as the model lays it out",
         .shape = {2, 8, 33, 64},
         .output = Place::tokens,
         .d_output = Place::tokens},
        {.why = "seven heads", .shape = {2, 7, 6, 9}, .output = Place::tokens},
        {.why = "numbers around 100", .shape = {1, 2, 5, 6}, .numbers = Numbers::hundreds},
    };
    for (std::size_t i = 0; i < cases.size(); ++i) cases[i].number = static_cast<int>(i) + 1;
    return cases;
  }();
  return numbered;
}

struct DeltaInputs {
  Placed output;
  Placed d_output;
};

DeltaInputs make_inputs(const DeltaCase& c) {
  const Tensor<float, 4> one = normal(c.shape, static_cast<unsigned>(c.number));
  const Tensor<float, 4> other = normal(c.shape, static_cast<unsigned>(c.number) + 1000);
  const float factor = c.numbers == Numbers::large      ? 1e15f
                       : c.numbers == Numbers::small    ? 1e-15f
                       : c.numbers == Numbers::hundreds ? 100.0f
                                                        : 1.0f;
  return {Placed(c.shape, c.output,
                 [&](Index b, Index h, Index i, Index d) {
                   if (c.numbers == Numbers::some_zero && i % 2 == 0) return 0.0f;
                   if (c.numbers == Numbers::same_sign) return std::abs(one(b, h, i, d));
                   // Channels 2n and 2n + 1 are nearly alike, and so are their gradients, but for the sign.
                   if (c.numbers == Numbers::cancelling) return 10.0f + one(b, h, i, d / 2) + 0.001f * one(b, h, i, d);
                   return factor * one(b, h, i, d);
                 }),
          Placed(c.shape, c.d_output, [&](Index b, Index h, Index i, Index d) {
            if (c.numbers == Numbers::same_sign) return std::abs(other(b, h, i, d));
            if (c.numbers == Numbers::cancelling) {
              return (d % 2 == 0 ? 1.0f : -1.0f) * (10.0f + other(b, h, i, d / 2) + 0.001f * other(b, h, i, d));
            }
            return factor * other(b, h, i, d);
          })};
}

Tensor<float, 3> answer(const DeltaInputs& inputs) { return row_delta(inputs.output.view(), inputs.d_output.view()); }

void for_each_case(const std::function<void(const DeltaCase&)>& body) {
  for (const DeltaCase& c : delta_cases()) run_case(c.number, c.text(), [&] { body(c); });
}

std::vector<int> all_numbers() {
  std::vector<int> result;
  for (const DeltaCase& c : delta_cases()) result.push_back(c.number);
  return result;
}

const Recognise recognise_row_delta(all_numbers(), [](int number) -> std::vector<Array> {
  return {to_array(answer(make_inputs(delta_cases().at(static_cast<std::size_t>(number) - 1))))};
});

// ---- The sum in float64 ---------------------------------------------------------------------------------------------

struct Wanted {
  Array delta;
  Bound bound;
};

// Half a unit in the last place of a float. A product errs by so much of itself at most, and each of the Dv - 1
// additions by so much of the sum it makes, which is at most the sum of the terms' sizes: in whatever order they are
// added, fused or not, the error is below (Dv + 1) of it.
constexpr double ROUNDING = std::numeric_limits<float>::epsilon() / 2.0;

Wanted in_float64(const View<const float, 4>& output, const View<const float, 4>& d_output) {
  const Array o = to_array(output);
  const Array d_o = to_array(d_output);
  const auto channels = static_cast<std::size_t>(output.size(3));
  Wanted want{{{output.size(0), output.size(1), output.size(2)}, {}}, {}};
  Array size = want.delta;
  for (Index row = 0; row < output.size(0) * output.size(1) * output.size(2); ++row) {
    double sum = 0.0;
    double terms = 0.0;
    for (std::size_t c = 0; c < channels; ++c) {
      const std::size_t at = static_cast<std::size_t>(row) * channels + c;
      sum += o.values[at] * d_o.values[at];
      terms += std::abs(o.values[at] * d_o.values[at]);
    }
    want.delta.values.push_back(sum);
    size.values.push_back(terms);
  }
  want.bound = {(static_cast<double>(channels) + 1.0) * ROUNDING, std::move(size)};
  return want;
}

bool expect_delta(const Tensor<float, 3>& got, const Wanted& want) {
  return expect_close("delta", to_array(got), want.delta, want.bound, DELTA);
}

// A different whole number at every place.
float code(const Shape<4>& shape, Index b, Index h, Index i, Index c) {
  return static_cast<float>(1 + c + shape[3] * (i + shape[2] * (h + shape[1] * b)));
}

}  // namespace

TEST_SUITE("phase3.02_row_delta") {
  TEST_CASE("the two queries worked with a pencil in the README") {
    ask("Follow the README's example line by line. Which is the first of its numbers that yours differs from?");
    Tensor<float, 4> output({1, 1, 2, 2});
    as_matrix(output.view()[0][0]) = Matrix{{0.8916165f, 0.5541917f}, {0.5541917f, 0.8916165f}};
    Tensor<float, 4> d_output({1, 1, 2, 2});
    as_matrix(d_output.view()[0][0]) = Matrix{{1, 0}, {1, 2}};
    const Array want{{1, 1, 2}, {0.8916165, 2.3374248}};
    expect_close("delta", to_array(row_delta(output, d_output)), want, {1e-6, want}, DELTA);
  }

  TEST_CASE("a gradient that picks one channel gives that channel of the output") {
    ask("dO is 1 in one channel of each row and 0 elsewhere. Which number of O is left of the sum, and of which batch "
        "item, head and query is the one that you return?");
    const Shape<4> shape{2, 3, 4, 5};
    for (const Place place : {Place::packed, Place::tokens, Place::queries_last}) {
      for (Index picked = 0; picked < 5; ++picked) {
        const Placed coded(shape, place, [&](Index b, Index h, Index i, Index c) { return code(shape, b, h, i, c); });
        const Placed pick(shape, Place::packed,
                          [&](Index, Index, Index, Index c) { return c == picked ? 1.0f : 0.0f; });
        Array want{{2, 3, 4}, {}};
        for (Index row = 0; row < 24; ++row) {
          want.values.push_back(static_cast<double>(code(shape, 0, 0, row, picked)));
        }
        const std::string why = " picks channel " + std::to_string(picked) + " of codes that lie " + text_of(place);
        const bool ok = expect_same_bits("delta", to_array(row_delta(coded.view(), pick.view())), want, DELTA,
                                         "where d_output" + why) &&
                        expect_same_bits("delta", to_array(row_delta(pick.view(), coded.view())), want, DELTA,
                                         "where output" + why);
        if (!ok) return;
      }
    }
  }

  TEST_CASE("only the query with a gradient has a delta") {
    ask("One single number of dO is not 0. How many deltas are not 0, and whose is it?");
    const Shape<4> shape{2, 3, 4, 2};
    const Placed coded(shape, Place::tokens,
                       [&](Index b, Index h, Index i, Index c) { return code(shape, b, h, i, c); });
    for (std::size_t row = 0; row < 24; ++row) {
      const Placed needle(shape, Place::packed, [&](Index b, Index h, Index i, Index c) {
        return c == 1 && static_cast<std::size_t>((b * 3 + h) * 4 + i) == row ? 0.5f : 0.0f;
      });
      Array want{{2, 3, 4}, std::vector<double>(24, 0.0)};
      want.values[row] = static_cast<double>(row) + 1.0;  // half of 1 + 1 + 2 row
      const std::string why = "though only row " + std::to_string(row) + " of 24 has a gradient";
      if (!expect_same_bits("delta", to_array(row_delta(coded.view(), needle.view())), want, DELTA, why)) return;
    }
  }

  TEST_CASE("the gradient of a sum makes delta the sum of a row of the output") {
    ask("The loss is the sum of all outputs. What is dO, and what strides does it have if nobody wants to store so "
        "many "
        "ones?");
    const Shape<4> shape{2, 3, 4, 5};
    const Placed coded(shape, Place::packed,
                       [&](Index b, Index h, Index i, Index c) { return code(shape, b, h, i, c); });
    const float one = 1.0f;
    const View<const float, 4> ones(&one, shape, {0, 0, 0, 0});
    Array want{{2, 3, 4}, {}};
    for (Index row = 0; row < 24; ++row) want.values.push_back(static_cast<double>(15 + 25 * row));
    expect_same_bits("delta", to_array(row_delta(coded.view(), ones)), want, DELTA, "of the sums of the rows");
    expect_same_bits("delta", to_array(row_delta(ones, coded.view())), want, DELTA,
                     "of the sums of the rows, with the arguments exchanged");
    const Array fives{{2, 3, 4}, std::vector<double>(24, 5.0)};
    expect_same_bits("delta", to_array(row_delta(ones, ones)), fives, DELTA, "of five ones each");
  }

  TEST_CASE("whole numbers come out exactly") {
    ask("All products and sums are whole numbers below 16 million, which a float holds exactly. In which precision do "
        "you multiply, and in which do you add?");
    const Shape<4> shape{1, 2, 3, 128};
    const Placed output(shape, Place::packed,
                        [](Index, Index h, Index i, Index c) { return static_cast<float>(201 + c + 5 * i + h); });
    const Placed d_output(shape, Place::apart, [](Index, Index h, Index i, Index c) {
      return static_cast<float>((c % 2 == 0 ? 1 : -1) * (203 + c + i - 2 * h));
    });
    const Wanted want = in_float64(output.view(), d_output.view());
    expect_same_bits("delta", to_array(row_delta(output.view(), d_output.view())), want.delta, DELTA,
                     "of what whole numbers make exactly");
  }

  TEST_CASE("a sum over channels of the output is a sum over all keys of weight times its gradient") {
    ask("O is a sum over keys of P times V. Put it into the sum of dO times O and exchange the two sums: what stands "
        "behind P, and what is it the gradient of?");
    const Index queries = 7;
    const Index keys = 50;
    const Index channels = 24;
    const Tensor<float, 4> value = normal({1, 1, keys, channels}, 31);
    const Tensor<float, 4> d_output = normal({1, 1, queries, channels}, 32);
    Tensor<float, 4> output({1, 1, queries, channels});
    Array want{{1, 1, queries}, {}};
    Array size = want;
    for (Index i = 0; i < queries; ++i) {
      // Weights that add up to 1 over the keys that the query sees: query 0 none, query 1 one, the last one all.
      const Index seen = i == 0 ? 0 : i == 1 ? 1 : i + 1 == queries ? keys : 8 * i;
      std::vector<double> weights;
      double total = 0.0;
      for (Index j = 0; j < seen; ++j) {
        weights.push_back(1.0 + static_cast<double>((j * 7 + i) % 11));
        total += weights.back();
      }
      std::vector<double> mixed(static_cast<std::size_t>(channels), 0.0);
      double sum = 0.0;
      double terms = 0.0;
      for (Index j = 0; j < seen; ++j) {
        const double weight = weights[static_cast<std::size_t>(j)] / total;
        double d_weight = 0.0;  // dP = dO V^T
        for (Index c = 0; c < channels; ++c) {
          const double of_value = static_cast<double>(value(0, 0, j, c));
          mixed[static_cast<std::size_t>(c)] += weight * of_value;
          d_weight += static_cast<double>(d_output(0, 0, i, c)) * of_value;
          terms += std::abs(weight * static_cast<double>(d_output(0, 0, i, c)) * of_value);
        }
        sum += weight * d_weight;
      }
      for (Index c = 0; c < channels; ++c) {
        output(0, 0, i, c) = static_cast<float>(mixed[static_cast<std::size_t>(c)]);
      }
      want.values.push_back(sum);
      size.values.push_back(terms);
    }
    // One rounding more than the sum's own: that of the output to a float.
    const Bound bound{(static_cast<double>(channels) + 2.0) * ROUNDING, size};
    expect_close("delta", to_array(row_delta(output, d_output)), want, bound, DELTA);
  }

  TEST_CASE("numbers may lie anywhere in memory and NaN between them is not read") {
    ask("How far apart in memory are two channels of this view, two queries, two heads? Who is to be asked: the shape, "
        "or the view?");
    const Shape<4> shape{2, 3, 5, 4};
    for (const Place at : PLACES) {
      for (const Place d_at : PLACES) {
        DeltaCase c{.why = "", .shape = shape, .output = at, .d_output = d_at};
        c.number = 50;
        const DeltaInputs inputs = make_inputs(c);
        if (expect_delta(answer(inputs), in_float64(inputs.output.view(), inputs.d_output.view()))) continue;
        finding("memory", std::string("output ") + text_of(at) + "; d_output " + text_of(d_at));
        return;
      }
    }
  }

  TEST_CASE("rows may lie billions of numbers apart") {
    ask("How large can the offset of an element become, and which type do you keep it in?");
    // 16 GiB of addresses, of which two pages are touched.
    constexpr Index STRIDE = (Index{1} << 32) + 64;
    constexpr std::size_t BYTES = static_cast<std::size_t>(STRIDE + 64) * sizeof(float);
    void* memory = mmap(nullptr, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      skip("this machine does not give 16 GiB of addresses");
      return;
    }
    auto* data = static_cast<float*>(memory);
    for (Index c = 0; c < 4; ++c) {
      data[c] = 1.0f;
      data[STRIDE + c] = 10.0f;
    }
    const float one = 1.0f;
    for (int axis = 0; axis < 4; ++axis) {
      Shape<4> shape{1, 1, 1, axis == 3 ? 2 : 4};
      Shape<4> strides{0, 0, 0, 1};
      shape[static_cast<std::size_t>(axis)] = 2;
      strides[static_cast<std::size_t>(axis)] = STRIDE;
      const View<const float, 4> far(data, shape, strides);
      const View<const float, 4> near(&one, shape, {0, 0, 0, 0});
      Array want{{shape[0], shape[1], shape[2]}, {4.0, 40.0}};
      if (axis == 3) want.values = {11.0};
      const std::string why = "of rows, or channels, 4294967360 numbers apart";
      const bool same = expect_same_bits("delta", to_array(row_delta(far, near)), want, DELTA, why) &&
                        expect_same_bits("delta", to_array(row_delta(near, far)), want, DELTA, why);
      if (!same) break;
    }
    munmap(memory, BYTES);
  }

  TEST_CASE("NaN in one query reaches no other") {
    ask("One query's output holds NaN, and only its own delta may. What do two queries share in your code?");
    const Shape<4> shape{2, 2, 4, 6};
    DeltaCase c{.why = "", .shape = shape, .output = Place::tokens};
    c.number = 51;
    for (const float poison : {NOT_A_NUMBER, INF}) {
      for (Index row = 0; row < 16; ++row) {
        DeltaInputs inputs = make_inputs(c);
        Array want = to_array(answer(inputs));
        const Index b = row / 8;
        const Index h = row / 4 % 2;
        const Index i = row % 4;
        Placed& one = row % 2 == 0 ? inputs.output : inputs.d_output;
        one(b, h, i, row % 6) = poison;
        Array got = to_array(answer(inputs));
        const auto at = static_cast<std::size_t>(row);
        if (!expect(got.count() == 16 && !std::isfinite(got.values[at]), "delta",
                    "of row " + std::to_string(row) + " should show what the row holds, " + std::to_string(poison))) {
          return;
        }
        want.values[at] = got.values[at] = 0.0;
        const std::string why = "when row " + std::to_string(row) + " of 16 became " + std::to_string(poison);
        if (!expect_same_bits("delta", got, want, DELTA, why)) return;
      }
    }
  }

  TEST_CASE("heads and batch items know nothing of each other") {
    ask("Head 2 of batch item 1, alone and among others. Which of your offsets knows how many there are?");
    const Shape<4> shape{3, 4, 5, 6};
    DeltaCase c{.why = "", .shape = shape, .output = Place::apart, .d_output = Place::tokens};
    c.number = 52;
    const DeltaInputs inputs = make_inputs(c);
    const Array all = to_array(answer(inputs));
    if (!expect(all.shape == std::vector<Index>{3, 4, 5}, "delta", "has shape " + to_text(all.shape))) return;
    for (Index b = 0; b < 3; ++b) {
      for (Index h = 0; h < 4; ++h) {
        const auto alone = [&](const View<const float, 4>& x) {
          return View<const float, 4>(&x(b, h, 0, 0), {1, 1, 5, 6}, x.strides());
        };
        const Array one = to_array(row_delta(alone(inputs.output.view()), alone(inputs.d_output.view())));
        const std::string why =
            "of batch item " + std::to_string(b) + ", head " + std::to_string(h) + " when it was computed among others";
        if (!expect_same_bits("delta", head_of(all, b, h), head_of(one, 0, 0), {"query"}, why)) return;
      }
    }
  }

  TEST_CASE("twice the gradient gives twice the delta") {
    ask("The loss counts double. Is there a term in your sum that does not know of it?");
    for_each_case([](const DeltaCase& c) {
      const DeltaInputs inputs = make_inputs(c);
      Array want = to_array(answer(inputs));
      const Array d_o = to_array(inputs.d_output.view());
      Tensor<float, 4> doubled(c.shape);
      for (std::size_t i = 0; i < d_o.count(); ++i) doubled.data()[i] = 2.0f * static_cast<float>(d_o.values[i]);
      const Wanted bound = in_float64(inputs.output.view(), doubled);
      for (double& value : want.values) value *= 2.0;
      expect_close("delta", to_array(row_delta(inputs.output.view(), doubled)), want,
                   {2.0 * bound.bound.relative, bound.bound.magnitude}, DELTA);
    });
  }

  TEST_CASE("rows without channels have a delta of 0 and no query has none") {
    ask("A sum of nothing is 0. Who writes it, and what does a new Tensor hold before that?");
    const auto of = [](const Shape<4>& shape) {
      const Tensor<float, 4> nothing(shape);
      return row_delta(nothing, nothing);
    };
    expect_same_bits("delta", to_array(of({2, 3, 4, 0})), Array{{2, 3, 4}, std::vector<double>(24, 0.0)}, DELTA,
                     "though a sum of nothing is 0");
    for (const Shape<4>& shape : {Shape<4>{2, 3, 0, 4}, Shape<4>{2, 0, 4, 4}, Shape<4>{0, 3, 4, 4}}) {
      const Tensor<float, 3> delta = of(shape);
      expect(delta.shape() == Shape<3>{shape[0], shape[1], shape[2]}, "delta",
             "has shape " + to_text(delta.shape()) + " for outputs of " + to_text(shape));
    }
  }

  TEST_CASE("the arguments stay as they were and a second call gives the same bits") {
    ask("The backward pass needs O and dO again, and may call you again. What do you write to, and what do you "
        "remember?");
    for_each_case([](const DeltaCase& c) {
      DeltaInputs inputs = make_inputs(c);
      const Tensor<float, 3> first = answer(inputs);
      const DeltaInputs untouched = make_inputs(c);
      const auto same_memory = [](const Placed& one, const Placed& other, const char* name) {
        const auto flat = [](const Placed& placed) {
          return Array{{static_cast<Index>(placed.memory().size())},
                       std::vector<double>(placed.memory().begin(), placed.memory().end())};
        };
        return expect_same_bits(name, flat(one), flat(other), {"place"}, "by the call");
      };
      same_memory(inputs.output, untouched.output, "output");
      same_memory(inputs.d_output, untouched.d_output, "d_output");
      const Array before = to_array(first);
      const Array second = to_array(answer(inputs));
      expect_same_bits("delta", second, before, DELTA, "in the second call");
      expect_same_bits("delta", to_array(first), before, DELTA, "of the first call by the second");
      if (inputs.output.view().count() == 0) return;
      inputs.output(0, 0, 0, 0) += 1.0f;  // another number, in the same memory
      expect_delta(answer(inputs), in_float64(inputs.output.view(), inputs.d_output.view()));
    });
  }

  TEST_CASE("agrees with the sum in float64") {
    for_each_case([](const DeltaCase& c) {
      const DeltaInputs inputs = make_inputs(c);
      expect_delta(answer(inputs), in_float64(inputs.output.view(), inputs.d_output.view()));
    });
  }

  TEST_CASE("says what is wrong with bad arguments") {
    const Tensor<float, 4> output = filled({2, 3, 4, 5}, 1.0f);
    row_delta(output, output);  // these are right
    const auto rejects = [&](std::string_view what, const Shape<4>& shape) {
      const Tensor<float, 4> d_output = filled(shape, 1.0f);
      expect_rejected(what, "d_output", [&] { row_delta(output, d_output); });
    };
    rejects("a batch item too few", {1, 3, 4, 5});
    rejects("a head too many", {2, 4, 4, 5});
    rejects("a query too few", {2, 3, 3, 5});
    rejects("a channel too many", {2, 3, 4, 6});
    rejects("the model's layout", {2, 4, 3, 5});
    rejects("queries and channels exchanged", {2, 3, 5, 4});
    rejects("no query at all", {2, 3, 0, 5});
  }
}
