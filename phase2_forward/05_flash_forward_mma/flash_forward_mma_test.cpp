// In the order in which one would build the kernel: one tile of Q K^T, the row reductions, P V, the loop over tiles,
// the copies that run ahead, ragged shapes, causal; then what holds everywhere.
#include "flash_forward_mma.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>

#include "common/testing/kernel.hpp"
#include "phase2_forward/suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
const Axes OUTPUT = {"batch", "head", "query", "channel"};
const Axes LSE = {"batch", "head", "query"};

template <typename T>
const char* type_name() {
  return std::is_same_v<T, fp16> ? "fp16" : "bf16";
}

// Half the spacing of T's numbers near 1: the largest relative error of one rounding.
template <typename T>
constexpr double roundoff() {
  return std::is_same_v<T, fp16> ? 0x1p-11 : 0x1p-8;
}

template <typename T>
double rounded(double value) {
  return static_cast<double>(to_float(from_float<T>(static_cast<float>(value))));
}

template <typename Body>
void for_both_types(const Body& body) {
  body(fp16{});
  body(bf16{});
}

// The number in place [b, h, s, d].
using Fill = std::function<double(Index, Index, Index, Index)>;
Fill everywhere(double value) {
  return [value](Index, Index, Index, Index) { return value; };
}

// Between -2 and 2, from the place alone.
Fill noise(unsigned seed) {
  return [seed](Index b, Index h, Index s, Index d) {
    std::uint32_t x = seed * 0x9e3779b9u;
    for (const Index part : {b, h, s, d}) {
      x = (x ^ static_cast<std::uint32_t>(part)) * 0x85ebca6bu;
      x ^= x >> 15;
    }
    return (static_cast<double>(x >> 16) - 32768.0) / 16384.0;
  };
}

// [B, H, S, D] in a larger buffer of NaN. `gap` < 0: head after head; otherwise token after token, as [B, S, H, D],
// with `gap` elements of NaN after each token.
template <typename T>
class Guarded {
 public:
  Guarded(const char* name, const Shape<4>& shape, Index gap)
      : shape_(shape), strides_(layout(shape, gap)), buffer_(name, size(shape, gap)) {}

  View<T, 4> view() { return {buffer_.data() + GUARD, shape_, strides_}; }

  void fill(const Fill& value) {
    std::vector<T> memory(buffer_.size(), T{0xffff});  // NaN
    const View<T, 4> host(memory.data() + GUARD, shape_, strides_);
    each([&](Index b, Index h, Index s, Index d) { host(b, h, s, d) = from_float<T>(float(value(b, h, s, d))); });
    buffer_.upload(memory);
  }

  void poison() { buffer_.poison(); }

  /// The elements; a finding if one that is not ours has been written.
  Array values() const {
    std::vector<T> memory = buffer_.download();
    const View<T, 4> host(memory.data() + GUARD, shape_, strides_);
    Array result{{shape_.begin(), shape_.end()}, {}};
    each([&](Index b, Index h, Index s, Index d) {
      result.values.push_back(static_cast<double>(to_float(host(b, h, s, d))));
      host(b, h, s, d).x = 0xffff;
    });
    const bool intact = std::all_of(memory.begin(), memory.end(), [](T value) { return value.x == 0xffff; });
    expect(intact, "guards", "memory around " + buffer_.name() + " was written");
    return result;
  }

 private:
  static constexpr Index GUARD = 64;

  static Shape<4> layout(const Shape<4>& shape, Index gap) {
    const auto [batch, heads, tokens, width] = shape;
    if (gap < 0) return {heads * tokens * width, tokens * width, width, 1};
    const Index token = heads * width + gap;
    return {tokens * token, width, token, 1};
  }
  static std::size_t size(const Shape<4>& shape, Index gap) {
    const Index gaps = std::max<Index>(gap, 0) * shape[0] * shape[2];
    return static_cast<std::size_t>(2 * GUARD + gaps + shape[0] * shape[1] * shape[2] * shape[3]);
  }
  template <typename Body>
  void each(const Body& body) const {
    for (Index b = 0; b < shape_[0]; ++b)
      for (Index h = 0; h < shape_[1]; ++h)
        for (Index s = 0; s < shape_[2]; ++s)
          for (Index d = 0; d < shape_[3]; ++d) body(b, h, s, d);
  }

  Shape<4> shape_, strides_;
  DeviceBuffer<T> buffer_;
};

struct Result {
  Array output;  // [B, H, Sq, D]
  Array lse;     // [B, H, Sq]
  std::vector<KernelProfile> profiles;
};

struct Sizes {
  Index batch = 1, heads = 1, queries = 1, keys = 1, width = 16;
  Index gap = -1;

  std::string text() const {
    return std::to_string(queries) + " queries, " + std::to_string(keys) + " keys, D = " + std::to_string(width);
  }
};

struct Options {
  bool causal = false;
  std::optional<float> scale = {};
};

// A problem with its memory; outputs are NaN before every call. Token after token, no two tensors have the same
// strides.
template <typename T>
class Attention {
 public:
  explicit Attention(const Sizes& s)
      : lse_shape_{s.batch, s.heads, s.queries},
        query("query", {s.batch, s.heads, s.queries, s.width}, s.gap),
        key("key", {s.batch, s.heads, s.keys, s.width}, s.gap < 0 ? s.gap : s.gap + 8),
        value("value", {s.batch, s.heads, s.keys, s.width}, s.gap < 0 ? s.gap : s.gap + 16),
        output_("output", {s.batch, s.heads, s.queries, s.width}, s.gap < 0 ? s.gap : s.gap + 24),
        lse_("lse", static_cast<std::size_t>(s.batch * s.heads * s.queries + 2 * LSE_GUARD)) {}

  void fill(const Fill& q, const Fill& k, const Fill& v) {
    query.fill(q);
    key.fill(k);
    value.fill(v);
  }

  FlashForward<T> problem(const Options& options) {
    return {
        query.view(),   key.view(),   value.view(), output_.view(), View<float, 3>(lse_.data() + LSE_GUARD, lse_shape_),
        options.causal, options.scale};
  }

  Result run(const Options& options) {
    output_.poison();
    lse_.poison();
    const FlashForward<T> call = problem(options);
    reset_peak_device_bytes();
    const std::size_t before = device_bytes();
    std::vector<KernelProfile> profiles = run_kernels([&] { flash_forward_mma(call); });
    expect(peak_device_bytes() == before, "memory",
           std::to_string(peak_device_bytes() - before) + " bytes of device memory beyond the arguments");
    Result result{output_.values(), {}, std::move(profiles)};
    std::vector<float> memory = lse_.download();
    result.lse.shape = {lse_shape_.begin(), lse_shape_.end()};
    result.lse.values.assign(memory.begin() + LSE_GUARD, memory.end() - LSE_GUARD);
    std::fill(memory.begin() + LSE_GUARD, memory.end() - LSE_GUARD, std::bit_cast<float>(0xffffffffu));
    const bool intact = std::all_of(memory.begin(), memory.end(),
                                    [](float value) { return std::bit_cast<std::uint32_t>(value) == 0xffffffffu; });
    expect(intact, "guards", "memory around lse was written");
    return result;
  }

 private:
  static constexpr Index LSE_GUARD = 8;
  Shape<3> lse_shape_;

 public:
  Guarded<T> query, key, value;

 private:
  Guarded<T> output_;
  DeviceBuffer<float> lse_;
};

template <typename T>
Result attend(const Sizes& sizes, const Options& options, const Fill& q, const Fill& k, const Fill& v) {
  Attention<T> attention(sizes);
  attention.fill(q, k, v);
  return attention.run(options);
}

bool expect_same(const Result& got, const Result& want, const std::string& why) {
  const bool output = expect_same_bits("output", got.output, want.output, OUTPUT, why);
  return expect_same_bits("lse", got.lse, want.lse, LSE, why) && output;
}

// ---- Needles: query i meets key `target(i)` and no other
// --------------------------------------------------------------

// Every number below 256 as +-2 in eight channels, again and again. Under needle_scale() two equal codes have the score
// 256, and codes that differ in one bit 64 less: all exact in 16 bits.
double code(Index number, Index channel) { return (number >> (channel % 8)) % 2 == 1 ? 2.0 : -2.0; }
float needle_scale(Index width) { return 64.0f / static_cast<float>(width); }

using Target = std::function<Index(Index)>;

template <typename T>
Result find_needles(const Sizes& sizes, bool causal, const Target& target, const Fill& v) {
  return attend<T>(
      sizes, {.causal = causal, .scale = needle_scale(sizes.width)},
      [&](Index, Index, Index i, Index d) { return code(target(i), d); },
      [](Index, Index, Index j, Index d) { return code(j, d); }, v);
}

// The others' weights are exp(-64) and less.
bool arrived(double got, Index want) { return std::abs(got - static_cast<double>(want)) < 1e-20; }

// What a lane of the output's C fragments holds, for one tile of 16 queries and 8 channels: which key's value, and
// which channel of it, came out where.
void print_fragment_map(const Array& key_found, const Array& channel_found, Index queries, Index width, Index row,
                        Index column, const Target& target) {
  const auto number = [](double value) {
    const bool whole = std::isfinite(value) && std::abs(value - std::round(value)) < 1e-20 && std::abs(value) < 1e6;
    return whole ? std::to_string(std::lround(value)) : std::string("?");
  };
  row -= row % 16;
  column -= column % 8;
  finding("map", "V[key,channel] that arrived in this 16 x 8 tile of the output, channels " + std::to_string(column) +
                     " to " + std::to_string(column + 7) +
                     "; lane = 4 (row % 8) + (column % 8) / 2, registers c[0], "
                     "c[1] above row 8 and c[2], c[3] from row 8 on");
  for (Index i = row; i < std::min(queries, row + 16); ++i) {
    std::string line;
    bool wrong = false;
    for (Index d = column; d < column + 8; ++d) {
      const auto at = static_cast<std::size_t>(i * width + d);
      line += number(key_found.values[at]) + "," + number(channel_found.values[at]) + "  ";
      wrong = wrong || !arrived(key_found.values[at], target(i)) || !arrived(channel_found.values[at], d);
    }
    if (wrong) finding("query " + std::to_string(i), line + "want key " + std::to_string(target(i)));
  }
}

// Two calls: one whose values are the numbers of their keys, one whose values are the numbers of their channels.
template <typename T>
bool expect_needles(const Sizes& sizes, bool causal, const Target& target) {
  const Array keys =
      find_needles<T>(sizes, causal, target, [](Index, Index, Index j, Index) { return double(j); }).output;
  const Array channels =
      find_needles<T>(sizes, causal, target, [](Index, Index, Index, Index d) { return double(d); }).output;
  for (Index i = 0; i < sizes.queries; ++i) {
    for (Index d = 0; d < sizes.width; ++d) {
      const auto at = static_cast<std::size_t>(i * sizes.width + d);
      if (arrived(keys.values[at], target(i)) && arrived(channels.values[at], d)) continue;
      std::ostringstream text;
      text << type_name<T>() << ", " << sizes.text() << ": at [query " << i << ", channel " << d << "] arrived key "
           << keys.values[at] << ", channel " << channels.values[at] << "; want key " << target(i) << ", channel " << d;
      finding("output", text.str());
      print_fragment_map(keys, channels, sizes.queries, sizes.width, i, d, target);
      return false;
    }
  }
  return true;
}

// ---- The float64 reference, and what honest 16-bit rounding does to it
// ------------------------------------------------

struct Row {
  std::vector<double> output;    // exact
  std::vector<double> baseline;  // the weights rounded to T, and the output
  std::vector<double> size;      // sum of |weight value|
  double lse = 0.0;
  double largest_score = 0.0;
};

using Matrix64 = std::vector<std::vector<double>>;

template <typename T>
Row reference_row(const std::vector<double>& q, const Matrix64& k, const Matrix64& v, Index seen, double scale) {
  const std::size_t width = q.size();
  Row row{std::vector<double>(width), std::vector<double>(width), std::vector<double>(width)};
  row.lse = -INF;
  if (seen == 0) return row;
  std::vector<double> scores;
  for (std::size_t j = 0; j < static_cast<std::size_t>(seen); ++j) {
    scores.push_back(scale * std::inner_product(q.begin(), q.end(), k[j].begin(), 0.0));
    row.largest_score = std::max(row.largest_score, std::abs(scores.back()));
  }
  const double largest = *std::max_element(scores.begin(), scores.end());
  double sum = 0.0;
  for (const double score : scores) sum += std::exp(score - largest);
  row.lse = largest + std::log(sum);
  for (std::size_t j = 0; j < scores.size(); ++j) {
    const double weight = std::exp(scores[j] - row.lse);
    const double weight16 = rounded<T>(weight);
    for (std::size_t d = 0; d < width; ++d) {
      row.output[d] += weight * v[j][d];
      row.baseline[d] += weight16 * v[j][d];
      row.size[d] += weight * std::abs(v[j][d]);
    }
  }
  for (double& value : row.baseline) value = rounded<T>(value);
  return row;
}

// Errors of the answer and of the baseline, gathered over rows.
template <typename T>
class Judge {
 public:
  void add(const Row& row, const double* got, double lse) {
    for (std::size_t d = 0; d < row.output.size(); ++d) {
      const double error = std::abs(got[d] - row.output[d]);
      const double baseline = std::abs(row.baseline[d] - row.output[d]);
      // The exponent of a weight is a difference of two scores, each rounded to float.
      const double exponent = 4.0 * std::numeric_limits<float>::epsilon() * (row.largest_score + 1.0) * row.size[d];
      if (!(error <= worst_)) worst_ = error;
      baseline_worst_ = std::max({baseline_worst_, baseline, roundoff<T>() * std::abs(row.output[d])});
      exponent_ = std::max(exponent_, exponent);
      squares_ += error * error;
      baseline_squares_ += std::max(baseline * baseline, std::pow(0.4 * roundoff<T>() * row.output[d], 2));
      ++count_;
    }
    const double allowed =
        roundoff<T>() + 2.0 * std::numeric_limits<float>::epsilon() *
                            std::max(std::isfinite(row.lse) ? std::abs(row.lse) : 0.0, row.largest_score);
    const bool lse_is_right = lse == row.lse || std::abs(lse - row.lse) <= allowed;
    if (!lse_is_right && lse_off_++ == 0) {
      std::ostringstream text;
      text << "got " << lse << ", want " << row.lse << " within " << allowed;
      lse_first_ = text.str();
    }
  }

  bool verdict() const {
    bool good = true;
    if (lse_off_ > 0) {
      good = false;
      finding("lse", std::string(type_name<T>()) + ": " + std::to_string(lse_off_) + " off; the first: " + lse_first_);
    }
    if (count_ == 0) return good;
    const double floor = exponent_ + 0x1p-24;
    const double rms = std::sqrt(squares_ / static_cast<double>(count_));
    const double baseline_rms = std::sqrt(baseline_squares_ / static_cast<double>(count_));
    if (rms <= 2.0 * baseline_rms + floor && worst_ <= 3.0 * baseline_worst_ + floor) return good;
    std::ostringstream text;
    text.precision(3);
    text << type_name<T>() << ": rms error " << rms << ", largest " << worst_
         << "; allowed are 2 x and 3 x those of eager attention with float scores, whose weights and output are "
            "rounded to "
         << type_name<T>() << ": " << 2.0 * baseline_rms + floor << " and " << 3.0 * baseline_worst_ + floor;
    finding("output", text.str());
    return false;
  }

 private:
  double worst_ = 0.0, baseline_worst_ = 0.0, exponent_ = 0.0, squares_ = 0.0, baseline_squares_ = 0.0;
  long count_ = 0, lse_off_ = 0;
  std::string lse_first_;
};

// The inputs of one head, rounded to T.
template <typename T>
Matrix64 head_of(const Fill& fill, Index b, Index h, Index rows, Index width) {
  Matrix64 result(static_cast<std::size_t>(rows), std::vector<double>(static_cast<std::size_t>(width)));
  for (Index s = 0; s < rows; ++s)
    for (Index d = 0; d < width; ++d) {
      result[static_cast<std::size_t>(s)][static_cast<std::size_t>(d)] = rounded<T>(fill(b, h, s, d));
    }
  return result;
}

// Runs the answer and compares about `rows` rows of each head, the first and the last among them.
template <typename T>
bool expect_attention(const Sizes& sizes, const Options& options, const Fill& q, const Fill& k, const Fill& v,
                      Index rows = std::numeric_limits<Index>::max()) {
  const Result got = attend<T>(sizes, options, q, k, v);
  const double scale = static_cast<double>(options.scale.value_or(1.0f / std::sqrt(static_cast<float>(sizes.width))));
  Judge<T> judge;
  bool all_numbers = true;
  for (Index b = 0; b < sizes.batch; ++b) {
    for (Index h = 0; h < sizes.heads; ++h) {
      const Matrix64 queries = head_of<T>(q, b, h, sizes.queries, sizes.width);
      const Matrix64 keys = head_of<T>(k, b, h, sizes.keys, sizes.width);
      const Matrix64 values = head_of<T>(v, b, h, sizes.keys, sizes.width);
      const Index step = std::max<Index>(1, sizes.queries / rows);
      for (Index i = 0; i < sizes.queries;
           i = i + step >= sizes.queries && i + 1 < sizes.queries ? sizes.queries - 1 : i + step) {
        const auto row = static_cast<std::size_t>((b * sizes.heads + h) * sizes.queries + i);
        judge.add(reference_row<T>(queries[static_cast<std::size_t>(i)], keys, values,
                                   keys_seen(options.causal, i, sizes.queries, sizes.keys), scale),
                  &got.output.values[row * static_cast<std::size_t>(sizes.width)], got.lse.values[row]);
      }
    }
  }
  const auto nan =
      std::count_if(got.output.values.begin(), got.output.values.end(), [](double value) { return std::isnan(value); });
  if (nan > 0) {
    const auto first = std::find_if(got.output.values.begin(), got.output.values.end(),
                                    [](double value) { return std::isnan(value); });
    all_numbers = false;
    finding("output", std::to_string(nan) + " of " + std::to_string(got.output.count()) + " are NaN; first at [" +
                          place(got.output, static_cast<std::size_t>(first - got.output.values.begin()), OUTPUT) + "]");
  }
  return judge.verdict() && all_numbers;
}

// ---- The numbered cases
// ----------------------------------------------------------------------------------------------

struct MmaCase {
  AttentionCase problem;
  float magnify = 1.0f;  // multiplies queries and keys

  Sizes sizes() const {
    return {problem.batch, problem.heads, problem.queries,
            problem.keys,  problem.width, problem.gap > 0 ? problem.gap : -1};
  }
  Options options() const { return {.causal = problem.causal, .scale = problem.scale}; }
};

// clang-format off
// Their numbers never change: new ones go to the end.
const std::vector<MmaCase>& mma_cases() {
  static const std::vector<MmaCase> list = [] {
    std::vector<MmaCase> cases = {
      {{.why = "one query, one key", .queries = 1, .keys = 1, .width = 16}},
      {{.why = "one fragment of everything", .queries = 16, .keys = 16, .width = 16}},
      {{.why = "17 queries, 33 keys", .queries = 17, .keys = 33, .width = 32}},
      {{.why = "37 queries, 53 keys", .queries = 37, .keys = 53, .width = 64}},
      {{.why = "127 queries, 65 keys: one key in the second tile", .queries = 127, .keys = 65, .width = 16}},
      {{.why = "129 queries, 128 keys: one query in the second block", .queries = 129, .keys = 128, .width = 16}},
      {{.why = "width 128", .queries = 19, .keys = 70, .width = 128}},
      {{.why = "width 32, three tiles of keys", .queries = 20, .keys = 130, .width = 32}},
      {{.why = "a scale is given", .queries = 9, .keys = 40, .width = 32, .scale = 0.3f}},
      {{.why = "scale 0 is given", .queries = 5, .keys = 20, .width = 16, .scale = 0.0f}},
      {{.why = "a negative scale is given", .queries = 9, .keys = 75, .width = 16, .scale = -0.5f}},
      {{.why = "products beyond what fp16 holds, before the scale", .queries = 9, .keys = 40, .width = 128, .scale = 4e-5f}, 120.0f},
      {{.why = "two batch items, three heads", .batch = 2, .heads = 3, .queries = 11, .keys = 20, .width = 16}},
      {{.why = "the rows of a token lie apart in memory", .batch = 2, .heads = 2, .queries = 9, .keys = 20, .width = 32, .gap = 8}},
      {{.why = "scores rise by 300 along the keys", .queries = 6, .keys = 140, .width = 16, .scores = Scores::rising}},
      {{.why = "scores fall by 300 along the keys", .queries = 6, .keys = 140, .width = 16, .scores = Scores::falling}},
      {{.why = "all scores near -120", .queries = 6, .keys = 70, .width = 16, .scores = Scores::near_minus_120}},
      {{.why = "all scores near +120", .queries = 6, .keys = 70, .width = 16, .scores = Scores::near_plus_120}},
      {{.why = "one query, 200 keys", .queries = 1, .keys = 200, .width = 64}},
      {{.why = "130 queries, one key", .queries = 130, .keys = 1, .width = 16}},
      {{.why = "no key at all", .queries = 20, .keys = 0, .width = 16}},
      {{.why = "no query at all", .queries = 0, .keys = 20, .width = 16}},
      {{.why = "causal, as many queries as keys", .queries = 33, .keys = 33, .width = 16, .causal = true}},
      {{.why = "causal, more keys than queries", .queries = 17, .keys = 83, .width = 32, .causal = true}},
      {{.why = "causal, more queries than keys", .queries = 53, .keys = 17, .width = 16, .causal = true}},
      {{.why = "causal, a whole block of queries without a key", .queries = 150, .keys = 9, .width = 16, .causal = true}},
      {{.why = "causal, several tiles both ways", .queries = 140, .keys = 150, .width = 16, .causal = true}},
      {{.why = "causal, one query", .heads = 2, .queries = 1, .keys = 70, .width = 16, .causal = true}},
      {{.why = "causal, several heads, tokens apart, a scale", .batch = 2, .heads = 3, .queries = 18, .keys = 25, .width = 16, .scale = 0.4f, .causal = true, .gap = 16}},
      {{.why = "512 keys, weights nearly alike", .queries = 8, .keys = 512, .width = 16, .scores = Scores::tiny}},
    };
    for (std::size_t i = 0; i < cases.size(); ++i) {
      cases[i].problem.number = static_cast<int>(i) + 1;
      cases[i].problem.value_width = cases[i].problem.width;
    }
    return cases;
  }();
  return list;
}
// clang-format on

// The case's numbers, as places.
struct CaseInputs {
  explicit CaseInputs(const MmaCase& c) : inputs(make_inputs(c.problem)) {
    const auto of = [](const TokenTensor& tensor, double factor) -> Fill {
      return [view = tensor.heads(), factor](Index b, Index h, Index s, Index d) {
        return factor * static_cast<double>(view(b, h, s, d));
      };
    };
    const AttentionInputs& constant = inputs;
    q = of(constant.query, static_cast<double>(c.magnify));
    k = of(constant.key, static_cast<double>(c.magnify));
    v = of(constant.value, 1.0);
  }
  CaseInputs(const CaseInputs&) = delete;
  CaseInputs& operator=(const CaseInputs&) = delete;

  AttentionInputs inputs;
  Fill q, k, v;
};

// The watched kernels are slower: there one of the larger cases stands for its kind.
bool is_tried(const MmaCase& c) {
  return !kernels_are_checked() || c.problem.queries * c.problem.keys * c.problem.width <= 64 * 1024;
}

std::vector<int> all_numbers() {
  std::vector<int> result(mma_cases().size());
  std::iota(result.begin(), result.end(), 1);
  return result;
}

const Recognise recognise_mma(all_numbers(), [](int number) -> std::vector<Array> {
  const MmaCase& c = mma_cases().at(static_cast<std::size_t>(number) - 1);
  const CaseInputs in(c);
  std::vector<Array> outputs;
  for_both_types([&](auto type) {
    Result result = attend<decltype(type)>(c.sizes(), c.options(), in.q, in.k, in.v);
    outputs.push_back(std::move(result.output));
    outputs.push_back(std::move(result.lse));
  });
  return outputs;
});

// Every score is 0, and V is 1: the output is 1, and exp(lse) counts the keys.
template <typename T>
bool expect_count(const Sizes& sizes, bool causal) {
  const Result got = attend<T>(sizes, {.causal = causal}, everywhere(0.0), noise(3), everywhere(1.0));
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
        "two "
        "rows of A, and which columns are in its four registers?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const Index width : {16, 32, 64, 128}) {
        const Result got = attend<T>(
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
        const Result got = attend<T>(
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
      const Result got = attend<T>(
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
      const Result got = attend<T>(
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

  TEST_CASE("the loop: 512 equal weights") {
    ask("Each of 512 keys adds a little to a large sum. What is 256 + 0.5 in 16 bits, and where have you rounded "
        "before "
        "the last key was in?");
    for_both_types([](auto type) {
      using T = decltype(type);
      const auto values = [](Index b, Index h, Index j, Index d) { return 1.0 + 0.4 * noise(9)(b, h, j, d); };
      expect_attention<T>({.queries = 4, .keys = 512, .width = 16}, {}, everywhere(0.0), noise(3), values);
      expect_count<T>({.queries = 4, .keys = 512, .width = 16}, false);
    });
  }

  TEST_CASE("pipelining: copies run while the tensor cores do, and everybody's have landed before they are read") {
    ask("cp.async.wait waits for the copies of one thread. Who else copied what you are about to read, who may still "
        "be "
        "reading what you are about to overwrite, and what do you do while a copy is on its way?");
    for (const Index width : {64, 128}) {
      const Sizes sizes{.queries = 130, .keys = 200, .width = width};
      const Result got = attend<fp16>(sizes, {}, noise(1), noise(2), noise(3));
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
    for (const Index width : {16, 32, 64, 128}) {
      const Sizes sizes{.queries = 130, .keys = 70, .width = width};
      const Result got = attend<bf16>(sizes, {}, noise(1), noise(2), noise(3));
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
        const Result got = attend<T>(sizes, {.scale = 1.0f}, everywhere(1.0), everywhere(-1.25), everywhere(1.0));
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
        const Result none = attend<T>({.heads = 2, .queries = 20, .keys = 0, .width = 32}, {.causal = causal}, noise(1),
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
      for (const bool causal : {false, true}) {
        for (const Index gap : {-1, 0, 24}) {
          const Sizes sizes{.batch = 3, .heads = 5, .queries = 9, .keys = 19, .width = 16, .gap = gap};
          const Result all = attend<T>(sizes, {.causal = causal}, noise(1), noise(2), noise(3));
          for (Index b = 0; b < 3; ++b) {
            for (Index h = 0; h < 5; ++h) {
              if (kernels_are_checked() && (b + h) % 3 != 0) continue;
              const auto of = [b, h](unsigned seed) -> Fill {
                return [=, all_heads = noise(seed)](Index, Index, Index s, Index d) { return all_heads(b, h, s, d); };
              };
              const Result one =
                  attend<T>({.queries = 9, .keys = 19, .width = 16}, {.causal = causal}, of(1), of(2), of(3));
              const std::size_t head = static_cast<std::size_t>(b * 5 + h);
              const auto part = [head](const Array& array, std::size_t count, const std::vector<Index>& shape) {
                const auto begin = array.values.begin() + static_cast<std::ptrdiff_t>(head * count);
                return Array{shape, {begin, begin + static_cast<std::ptrdiff_t>(count)}};
              };
              const std::string why = "of batch item " + std::to_string(b) + ", head " + std::to_string(h) +
                                      " when it was computed among others" +
                                      (gap < 0 ? "" : ", token after token in memory");
              if (!expect_same_bits("output", part(all.output, 9 * 16, one.output.shape), one.output, OUTPUT, why))
                return;
              if (!expect_same_bits("lse", part(all.lse, 9, one.lse.shape), one.lse, LSE, why)) return;
            }
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
    ask("A key that only later queries may see holds NaN. Adding a large negative number to NaN gives what? And what "
        "should be left of a forbidden score?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const auto& [queries, keys] : {std::pair{40, 40}, {30, 80}, {70, 40}}) {
        Attention<T> attention({.queries = queries, .keys = keys, .width = 16});
        attention.fill(noise(5), noise(6), noise(7));
        const Result want = attention.run({.causal = true});
        for (const double poison : {NOT_A_NUMBER, INF, 60000.0}) {
          for (const Index j : {keys - 1, keys / 2, keys > 17 ? keys - 17 : 1}) {
            attention.key.fill(
                [&](Index b, Index h, Index s, Index d) { return s >= j ? poison : noise(6)(b, h, s, d); });
            const Result got = attention.run({.causal = true});
            for (Index i = 0; i < queries && j >= keys_seen(true, i, queries, keys); ++i) {
              for (Index d = 0; d < 16; ++d) {
                const auto at = static_cast<std::size_t>(i * 16 + d);
                if (got.output.values[at] == want.output.values[at] &&
                    got.lse.values[static_cast<std::size_t>(i)] == want.lse.values[static_cast<std::size_t>(i)]) {
                  continue;
                }
                finding("output", std::string(type_name<T>()) + ", " + std::to_string(queries) + " queries, " +
                                      std::to_string(keys) + " keys: query " + std::to_string(i) +
                                      " noticed that keys from " + std::to_string(j) + " on became " +
                                      std::to_string(poison));
                return;
              }
            }
          }
        }
      }
    });
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

  TEST_CASE("the same inputs give the same bits and are left alone") {
    ask("Call it twice. What is left over from the first call, and do you write into what is not yours?");
    for_both_types([](auto type) {
      using T = decltype(type);
      const Sizes sizes{.heads = 2, .queries = 37, .keys = 75, .width = 32};
      Attention<T> attention(sizes);
      attention.fill(noise(1), noise(2), noise(3));
      const Array before[] = {attention.query.values(), attention.key.values(), attention.value.values()};
      const Result want = attention.run({.causal = true});
      attend<T>(sizes, {}, noise(4), noise(5), noise(6));
      expect_same(attention.run({.causal = true}), want, "in a later call");
      const Array after[] = {attention.query.values(), attention.key.values(), attention.value.values()};
      const char* names[] = {"query", "key", "value"};
      for (int i = 0; i < 3; ++i) expect_same_bits(names[i], after[i], before[i], OUTPUT, "by the call");
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
        for (const Sizes& sizes : {Sizes{1, 2, 64, 64, 32}, Sizes{2, 8, 256, 256, 64}, Sizes{1, 16, 512, 512, 128},
                                   Sizes{4, 8, 1024, 1024, 64}, Sizes{1, 2, 2048, 2048, 64},
                                   Sizes{1, 1, 4096, 4096, 128}, Sizes{2, 3, 113, 203, 64}, Sizes{1, 2, 239, 1, 64},
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
    for (const MmaCase& c : mma_cases()) {
      if (!is_tried(c)) continue;
      run_case(c.problem.number, c.problem.text(), [&] {
        const CaseInputs in(c);
        for_both_types([&](auto type) { expect_attention<decltype(type)>(c.sizes(), c.options(), in.q, in.k, in.v); });
      });
    }
  }

  TEST_CASE("says what is wrong with bad arguments") {
    for_both_types([](auto type) {
      using T = decltype(type);
      Attention<T> attention({.batch = 2, .heads = 3, .queries = 5, .keys = 7, .width = 32});
      attention.fill(noise(1), noise(2), noise(3));
      attention.run({});  // these are right
      const FlashForward<T> good = attention.problem({});
      const auto rejected = [&](const char* what, const char* argument, const auto& change) {
        expect_rejected(what, argument, [&] {
          FlashForward<T> bad = good;
          change(bad);
          flash_forward_mma(bad);
        });
      };
      using In = View<const T, 4>;
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
