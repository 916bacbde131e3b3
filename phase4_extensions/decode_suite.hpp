// What the suites of decoding share: a cache whose sequences have lengths of their own, calls with memory around them,
// what the float64 reference expects, and the probes that a cache in one piece and one in pages must both pass.
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <random>
#include <type_traits>

#include "phase4_extensions/07_paged_kv/paged_kv.hpp"
#include "phase4_extensions/kernel_suite.hpp"

namespace flashkata::testing {

// ---- Inputs ---------------------------------------------------------------------------------------------------------

using Lengths = std::vector<std::int32_t>;

/// As Inputs, d_output apart; key and value [B, Hk, capacity, D], of which sequence b has lengths[b] in use.
struct DecodeInputs {
  Inputs in;
  Lengths lengths;

  Index batch() const { return in.query.size(0); }
  Index heads() const { return in.query.size(1); }
  Index queries() const { return in.query.size(2); }
  Index width() const { return in.query.size(3); }
  Index kv_heads() const { return in.key.size(1); }
  Index capacity() const { return in.key.size(2); }
};

/// How a cache in pages is made of one in one piece.
struct Paging {
  enum class Storage {
    two_buffers,         // K and V [pages, Hk, page_size, D]
    interleaved,         // K and V are the halves of one buffer [pages, 2, Hk, page_size, D]
    interleaved_tokens,  // [pages, page_size, 2, Hk, D]
  };
  Index page_size = 16;
  unsigned order = 1;     // seed of a random order of the pages; 0: in order
  Index spare = 3;        // pages that nobody has; they hold NaN
  Index more_blocks = 2;  // entries of -1 in the longest sequence's row of the table
  Storage storage = Storage::two_buffers;
  bool shared_first = false;  // all sequences have the first one's first page, with the first one's keys in it
};

struct DecodeOptions {
  Index splits = 1;
  bool causal = true;
  std::optional<float> scale = {};
  Layouts layouts = {};
  Paging paging = {};  // of step 07
  bool with_lse = true;
  bool judge = true;
  Index apart = 0;  // numbers between two lengths and between two rows of the block table: views of larger tables
};

struct DecodeAnswer {
  Array output;          // [B, H, Sq, D]
  Array lse;             // [B, H, Sq]; no values without lse
  Array partial_lse;     // [splits, B, H, Sq]
  Array partial_output;  // [splits, B, H, Sq, D]
  std::vector<KernelProfile> profiles;
};

/// One answer, in one type.
template <typename T>
struct DecodeCall {
  const char* name;
  std::function<DecodeAnswer(const DecodeInputs&, const DecodeOptions&)> call;
  bool on_host = false;

  DecodeAnswer operator()(const DecodeInputs& in, const DecodeOptions& options = {}) const { return call(in, options); }
};

/// How many keys query i of sequence b sees.
inline Index keys_seen(const DecodeInputs& in, Index b, Index i, bool causal) {
  const Index length = in.lengths[static_cast<std::size_t>(b)];
  return causal ? std::clamp<Index>(i + length - in.queries() + 1, 0, length) : length;
}

/// Numbers by their place. What lies behind a sequence's length is NaN.
template <typename T>
DecodeInputs decode_inputs(const Sizes& sizes, const Lengths& lengths, const Fill& query, const Fill& key,
                           const Fill& value) {
  const auto used = [&](const Fill& fill) {
    return [&lengths, fill](Index b, Index h, Index s, Index d) {
      return s < lengths[static_cast<std::size_t>(b)] ? fill(b, h, s, d) : std::numeric_limits<double>::quiet_NaN();
    };
  };
  return {filled_inputs<T>(sizes, query, used(key), used(value), everywhere(0)), lengths};
}

/// Between -2 and 2; scores of order 1.
template <typename T>
DecodeInputs random_decode(const Sizes& sizes, const Lengths& lengths, unsigned seed) {
  return decode_inputs<T>(sizes, lengths, noise(4 * seed), noise(4 * seed + 1), noise(4 * seed + 2));
}

inline DecodeInputs copy_of(const DecodeInputs& in) { return {copy_of(in.in), in.lengths}; }

/// "B=2 H=6 Hk=2 Sq=1 Sk=37 D=16, lengths [37, 5], 3 parts", beside what was found.
template <typename T>
bool not_so(const DecodeCall<T>& call, const DecodeInputs& in, const DecodeOptions& options) {
  finding("of", std::string(call.name) + ", " + type_name<T>() + ", " + in.in.text() + ", lengths " +
                    to_text(in.lengths) + ", " + std::to_string(options.splits) +
                    (options.splits == 1 ? " part" : " parts") + (options.causal ? ", causal" : ""));
  return false;
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

namespace decode_suite_detail {

/// Integers that an answer reads.
template <typename Buffer>
class Integers {
 public:
  Integers(const char* name, std::vector<std::int32_t> values)
      : before_(std::move(values)), buffer_(name, before_.size()) {
    buffer_.upload(before_);
    name_ = name;
  }
  template <int Rank>
  View<const std::int32_t, Rank> view(const Shape<Rank>& shape) {
    return {buffer_.data(), shape};
  }
  void expect_unchanged() const { expect(buffer_.download() == before_, name_, "is an input, and was written"); }

 private:
  std::string name_;
  std::vector<std::int32_t> before_;
  Buffer buffer_;
};

/// Rows of `width` integers, `gap` others behind each: what nobody may read as a length or as a page.
inline std::vector<std::int32_t> spread(const std::vector<std::int32_t>& rows, Index width, Index gap) {
  std::vector<std::int32_t> result;
  for (std::size_t at = 0; at < rows.size(); ++at) {
    result.push_back(rows[at]);
    if ((static_cast<Index>(at) + 1) % width == 0) result.insert(result.end(), static_cast<std::size_t>(gap), 1);
  }
  return result;
}

/// All that is the same for both kinds of cache. `launch(fill)` makes the problem: fill(problem) sets what is known
/// here.
template <typename T, template <typename> class Memory>
struct Around {
  using Ints = Integers<std::conditional_t<std::is_same_v<Memory<T>, GpuTensor<T>>, DeviceBuffer<std::int32_t>,
                                           HostBuffer<std::int32_t>>>;
  Around(const DecodeInputs& inputs, const DecodeOptions& decode_options)
      : in(inputs),
        options(decode_options),
        rows(in.in.query.shape()),
        query(Memory<T>::input("query", in.in.query, options.layouts.query)),
        lengths("lengths", spread(in.lengths, 1, options.apart)),
        output(Memory<T>::output("output", rows, options.layouts.output)),
        lse(Memory<float>::output(
            "lse", {rows[0], rows[1], rows[2], 1},
            options.layouts.output == Layout::heads_apart ? Layout::heads : options.layouts.output)),
        partial_output(Memory<float>::output("partial_output", {options.splits * rows[0], rows[1], rows[2], rows[3]},
                                             Layout::heads)),
        partial_lse(
            Memory<float>::output("partial_lse", {options.splits * rows[0], rows[1], rows[2], 1}, Layout::heads)) {}

  View<float, 5> partial_output_view() {
    return {partial_output.view().data(), {options.splits, rows[0], rows[1], rows[2], rows[3]}};
  }
  View<float, 4> partial_lse_view() { return {partial_lse.view().data(), {options.splits, rows[0], rows[1], rows[2]}}; }
  View<const std::int32_t, 1> lengths_view() {
    return {lengths.template view<1>({in.batch()}).data(), {in.batch()}, {1 + options.apart}};
  }
  std::optional<View<float, 3>> lse_view() {
    if (!options.with_lse) return std::nullopt;
    return lse.rows();
  }

  DecodeAnswer answer(std::vector<KernelProfile> profiles) {
    DecodeAnswer got{output.values(options.judge), lse.values(options.judge), partial_lse.values(options.judge),
                     partial_output.values(options.judge), std::move(profiles)};
    got.lse.shape.pop_back();
    if (!options.with_lse) {
      const bool written = std::any_of(got.lse.values.begin(), got.lse.values.end(), [](double x) { return x == x; });
      expect(!written, "lse", "was written, though nobody asked for it");
      got.lse = {{0}, {}};
    }
    got.partial_lse.shape = {options.splits, rows[0], rows[1], rows[2]};
    if (options.judge) {
      query.expect_unchanged();
      lengths.expect_unchanged();
    }
    return got;
  }

  const DecodeInputs& in;
  const DecodeOptions& options;
  Shape<4> rows;
  Memory<T> query;
  Ints lengths;
  Memory<T> output;
  Memory<float> lse, partial_output, partial_lse;
};

template <typename T, template <typename> class Memory>
DecodeAnswer in_one_piece(const Call<Decode<T>>& call, const DecodeInputs& in, const DecodeOptions& options) {
  Around<T, Memory> around(in, options);
  Memory<T> key = Memory<T>::input("key", in.in.key, options.layouts.key);
  Memory<T> value = Memory<T>::input("value", in.in.value, options.layouts.value);
  const Decode<T> problem{.query = around.query.view(),
                          .key = key.view(),
                          .value = value.view(),
                          .lengths = around.lengths_view(),
                          .output = around.output.view(),
                          .lse = around.lse_view(),
                          .partial_output = around.partial_output_view(),
                          .partial_lse = around.partial_lse_view(),
                          .causal = options.causal,
                          .scale = options.scale};
  const DecodeAnswer got = around.answer(run(call, problem, options.judge));
  if (options.judge) {
    key.expect_unchanged();
    value.expect_unchanged();
  }
  return got;
}

}  // namespace decode_suite_detail

template <typename T>
DecodeCall<T> decode_on_gpu(const char* name, void (*launch)(const Decode<T>&, const Stream&)) {
  const auto call = on_gpu<Decode<T>>(name, [launch](const Decode<T>& problem) { launch(problem, {}); });
  return {name, [call](const DecodeInputs& in, const DecodeOptions& options) {
            return decode_suite_detail::in_one_piece<T, GpuTensor>(call, in, options);
          }};
}

inline DecodeCall<float> decode_on_host(const char* name, void (*launch)(const Decode<float>&)) {
  const auto call = on_host<Decode<float>>(name, launch);
  return {name,
          [call](const DecodeInputs& in, const DecodeOptions& options) {
            return decode_suite_detail::in_one_piece<float, HostTensor>(call, in, options);
          },
          true};
}

/// The answers of a step: on the CPU (not where kernels are watched: there is nothing to watch) and in three types.
struct DecodeStep {
  DecodeCall<float> host;
  DecodeCall<float> fp32;
  DecodeCall<fp16> half;
  DecodeCall<bf16> brain;

  std::vector<DecodeCall<float>> both() const {
    if (kernels_are_checked()) return {fp32};
    return {host, fp32};
  }
};

// ---- Judgement: false where something is wrong, and a finding says what ---------------------------------------------

template <typename T>
ExpectedForward expected_decode(const DecodeInputs& in, const DecodeOptions& options) {
  Tensor<bool, 4> allowed({in.batch(), in.heads(), in.queries(), in.capacity()});
  for (Index b = 0; b < in.batch(); ++b)
    for (Index h = 0; h < in.heads(); ++h)
      for (Index i = 0; i < in.queries(); ++i)
        for (Index j = 0; j < in.capacity(); ++j) allowed(b, h, i, j) = j < keys_seen(in, b, i, options.causal);
  const View<const bool, 4> view = allowed;
  return expected_forward<T>(in.in, {.scale = options.scale}, [&](reference::Problem& p) { p.allowed = view; });
}

template <typename T>
bool expect_decoded(const DecodeCall<T>& call, const DecodeInputs& in, const DecodeOptions& options,
                    const ExpectedForward& want) {
  const DecodeAnswer got = call(in, options);
  if (got.lse.values.empty() && !want.exact.lse.values.empty()) return not_so(call, in, options);
  return expect_forward<T>({got.output, got.lse, {}}, want) || not_so(call, in, options);
}

/// As the reference says.
template <typename T>
bool expect_decoded(const DecodeCall<T>& call, const DecodeInputs& in, const DecodeOptions& options) {
  return expect_decoded(call, in, options, expected_decode<T>(in, options));
}

template <typename T>
bool expect_same(const DecodeCall<T>& call, const DecodeAnswer& got, const DecodeAnswer& want, const DecodeInputs& in,
                 const DecodeOptions& options, const std::string& why) {
  return expect_same(ForwardAnswer{got.output, got.lse, {}}, ForwardAnswer{want.output, want.lse, {}}, why) ||
         not_so(call, in, options);
}

// ---- Probes ---------------------------------------------------------------------------------------------------------

/// One key: its value is the output, its score the lse. For every width.
template <typename T>
bool expect_one_key(const DecodeCall<T>& call, bool all_widths) {
  for (const Index width : {16, 32, 64, 128}) {
    if (!all_widths && width != 128) continue;
    const DecodeInputs in =
        decode_inputs<T>({.heads = 2, .kv_heads = 2, .keys = 3, .width = width}, {1}, noise(1), noise(2),
                         [](Index, Index h, Index, Index d) { return static_cast<double>(d + 1 + 100 * h); });
    const DecodeOptions options{.scale = 0.5f};
    const DecodeAnswer got = call(in, options);
    Array output{{1, 2, 1, width}, {}}, lse{{1, 2, 1}, {}};
    for (Index h = 0; h < 2; ++h) {
      double dot = 0.0;
      for (Index d = 0; d < width; ++d) {
        dot += 0.5 * static_cast<double>(in.in.query(0, h, 0, d)) * static_cast<double>(in.in.key(0, h, 0, d));
        output.values.push_back(static_cast<double>(in.in.value(0, h, 0, d)));
      }
      lse.values.push_back(dot);
    }
    if (!expect_close("output", got.output, output, {1e-6, output}, QUERY_AXES)) return not_so(call, in, options);
    if (!expect_close("lse", got.lse, lse, lse_bound(lse, 64.0), LSE_AXES)) return not_so(call, in, options);
  }
  return true;
}

/// With a query of 0 a row that sees n keys gives each the weight 1/n and has the lse log(n). Channels 0 .. 7 of a
/// value say which place a key has in its group of 8, channels 8 .. 15 which group of 8 it is in.
template <typename T>
bool expect_even_shares(const DecodeCall<T>& call, Index queries, const Lengths& lengths,
                        const DecodeOptions& options) {
  const Index batch = static_cast<Index>(lengths.size());
  const Index capacity = *std::max_element(lengths.begin(), lengths.end()) + 3;
  const DecodeInputs in = decode_inputs<T>(
      {.batch = batch, .heads = 1, .kv_heads = 1, .queries = queries, .keys = capacity}, lengths, everywhere(0),
      noise(3), [](Index, Index, Index j, Index d) { return d == j % 8 || d == 8 + j / 8 % 8 ? 1.0 : 0.0; });
  const DecodeAnswer got = call(in, options);
  Array output{{batch, 1, queries, 16}, {}}, lse{{batch, 1, queries}, {}};
  for (Index b = 0; b < batch; ++b) {
    for (Index i = 0; i < queries; ++i) {
      const Index seen = keys_seen(in, b, i, options.causal);
      std::array<double, 16> share{};
      for (Index j = 0; j < seen; ++j) {
        share[static_cast<std::size_t>(j % 8)] += 1.0 / static_cast<double>(seen);
        share[static_cast<std::size_t>(8 + j / 8 % 8)] += 1.0 / static_cast<double>(seen);
      }
      output.values.insert(output.values.end(), share.begin(), share.end());
      lse.values.push_back(std::log(static_cast<double>(seen)));
    }
  }
  const double exact = std::is_same_v<T, float> ? 1e-5 : 4.0 * roundoff<T>();
  const bool same = expect_close("output", got.output, output, {exact, output}, QUERY_AXES);
  if (expect_close("lse", got.lse, lse, lse_bound(lse, 0.0), LSE_AXES) && same) return true;
  return not_so(call, in, options);
}

/// Of the READMEs: five keys, a query of 0, and the value j for key j.
template <typename T>
bool expect_worked_example(const DecodeCall<T>& call, const DecodeOptions& options) {
  const DecodeInputs in = decode_inputs<T>({.keys = 12}, {5}, everywhere(0), noise(2),
                                           [](Index, Index, Index j, Index) { return static_cast<double>(j); });
  const DecodeAnswer got = call(in, options);
  const bool output = expect_all("output", got.output, 2.0, 1e-5, QUERY_AXES, "it is the mean of 0, 1, 2, 3 and 4");
  return (expect_all("lse", got.lse, std::log(5.0), 1e-5, LSE_AXES, "five scores of 0") && output) ||
         not_so(call, in, options);
}

/// With a query of 0, exp(partial_lse) counts the keys of each part.
template <typename T>
bool expect_fair_parts(const DecodeCall<T>& call, const Lengths& lengths, const DecodeOptions& options) {
  const Index batch = static_cast<Index>(lengths.size());
  const DecodeInputs in = decode_inputs<T>({.batch = batch, .heads = 2, .kv_heads = 1, .keys = lengths[0]}, lengths,
                                           everywhere(0), noise(3), noise(4));
  const DecodeAnswer got = call(in, options);
  for (Index b = 0; b < batch; ++b) {
    for (Index h = 0; h < 2; ++h) {
      const double length = static_cast<double>(lengths[static_cast<std::size_t>(b)]);
      const double most = std::max(64.0, 2.0 * std::ceil(length / static_cast<double>(options.splits)));
      double all = 0.0;
      for (Index split = 0; split < options.splits; ++split) {
        const double keys = std::exp(got.partial_lse.values[static_cast<std::size_t>((split * batch + b) * 2 + h)]);
        all += keys;
        if (keys <= most + 0.1) continue;  // so NaN is none of them
        finding("partial_lse", "part " + std::to_string(split) + " of sequence " + std::to_string(b) + ", head " +
                                   std::to_string(h) + " stands for " + std::to_string(keys) + " keys of " +
                                   std::to_string(lengths[static_cast<std::size_t>(b)]) + "; want at most " +
                                   std::to_string(static_cast<Index>(most)));
        return not_so(call, in, options);
      }
      if (expect(std::abs(all - length) < 0.5, "partial_lse",
                 "the parts of sequence " + std::to_string(b) + ", head " + std::to_string(h) + " stand for " +
                     std::to_string(all) + " keys together; want " + std::to_string(length)))
        continue;
      return not_so(call, in, options);
    }
  }
  return true;
}

/// What the parts of a row have left, put together by hand, is the row's output.
template <typename T>
bool expect_parts_add_up(const DecodeCall<T>& call, const DecodeOptions& options) {
  const DecodeInputs in =
      random_decode<T>({.batch = 2, .heads = 4, .kv_heads = 2, .queries = 2, .keys = 200}, {200, 67}, 19);
  const ExpectedForward want = expected_decode<T>(in, options);
  const DecodeAnswer got = call(in, options);
  const std::size_t rows = got.lse.values.size();
  Array sum{got.output.shape, std::vector<double>(rows * 16, 0.0)};
  for (std::size_t part = 0; part < static_cast<std::size_t>(options.splits); ++part) {
    for (std::size_t row = 0; row < rows; ++row) {
      const double weight = std::exp(got.partial_lse.values[part * rows + row] - want.exact.lse.values[row]);
      for (std::size_t d = 0; d < 16 && weight > 0.0; ++d) {
        sum.values[row * 16 + d] += weight * got.partial_output.values[(part * rows + row) * 16 + d];
      }
    }
  }
  const Array size{sum.shape, std::vector<double>(sum.count(), 2.0)};  // of the values
  return expect_close("partial_output", sum, want.exact.output,
                      {(std::is_same_v<T, float> ? 1e-5 : 4.0 * roundoff<T>()), size}, QUERY_AXES) ||
         not_so(call, in, options);
}

/// In all types, and on the CPU.
inline void expect_parts_add_up(const DecodeStep& step, const DecodeOptions& options) {
  for (const auto& call : step.both()) {
    if (!expect_parts_add_up(call, options)) return;
  }
  if (expect_parts_add_up(step.half, options)) expect_parts_add_up(step.brain, options);
}

/// A key that matches far better than all others, in each of these places, gives its value alone.
template <typename T>
bool expect_needles(const DecodeCall<T>& call, Index keys, const std::vector<Index>& places,
                    const DecodeOptions& options) {
  const Index heads = static_cast<Index>(places.size());
  const DecodeInputs in = decode_inputs<T>(
      {.heads = heads, .kv_heads = heads, .keys = keys}, {static_cast<std::int32_t>(keys)}, everywhere(1),
      [&](Index, Index h, Index j, Index d) { return j == places[static_cast<std::size_t>(h)] && d == 5 ? 60.0 : 0.0; },
      [](Index, Index, Index j, Index d) { return static_cast<double>(d % 2 == 0 ? j % 64 + 1 : j / 64 + 1); });
  DecodeOptions with_scale = options;
  with_scale.scale = 1.0f;
  const DecodeAnswer got = call(in, with_scale);
  Array output{{1, heads, 1, 16}, {}};
  for (const Index place : places) {
    for (Index d = 0; d < 16; ++d) output.values.push_back(static_cast<double>(in.in.value(0, 0, place, d)));
  }
  const bool same = expect_close("output", got.output, output, {1e-5, output}, QUERY_AXES);
  if (expect_all("lse", got.lse, 60.0, 1e-4, LSE_AXES, "one score of 60 is left") && same) return true;
  return not_so(call, in, with_scale);
}

/// Head h reads key/value head h / (H / Hk), whose values are all Hk-head + 1.
template <typename T>
bool expect_groups(const DecodeCall<T>& call, Index heads, Index kv_heads, Index queries,
                   const DecodeOptions& options) {
  const DecodeInputs in = decode_inputs<T>(
      {.batch = 2, .heads = heads, .kv_heads = kv_heads, .queries = queries, .keys = 8}, {7, 8}, noise(8), noise(9),
      [&](Index b, Index h, Index, Index) { return static_cast<double>(1 + h + kv_heads * b); });
  const DecodeAnswer got = call(in, options);
  Array want{{2, heads, queries, 16}, {}};
  for (Index b = 0; b < 2; ++b)
    for (Index h = 0; h < heads; ++h) {
      const double value = static_cast<double>(1 + h / (heads / kv_heads) + kv_heads * b);
      want.values.insert(want.values.end(), static_cast<std::size_t>(queries * 16), value);
    }
  const double exact = std::is_same_v<T, float> ? 1e-5 : 2.0 * roundoff<T>();
  return expect_close("output", got.output, want, {exact, want}, QUERY_AXES) || not_so(call, in, options);
}

/// What a key (and its value) holds reaches nobody who may not see it. Key `length - back` of every sequence becomes
/// poison: behind the length for back <= 0.
template <typename T>
bool expect_unmoved(const DecodeCall<T>& call, Index back, float poison, const DecodeOptions& options) {
  const Lengths lengths{21, 40, 6};
  const Sizes sizes{.batch = 3, .heads = 4, .kv_heads = 2, .queries = 5, .keys = 44};
  const DecodeInputs clean = random_decode<T>(sizes, lengths, 5);
  DecodeInputs in = copy_of(clean);
  for (Index b = 0; b < 3; ++b)
    for (Index h = 0; h < 2; ++h)
      for (Index d = 0; d < 16; ++d) {
        const Index j = lengths[static_cast<std::size_t>(b)] - back;
        in.in.key(b, h, j, d) = in.in.value(b, h, j, d) = static_cast<float>(rounded<T>(static_cast<double>(poison)));
      }
  const DecodeAnswer want = call(clean, options);
  const DecodeAnswer got = call(in, options);
  for (Index b = 0; b < 3; ++b)
    for (Index h = 0; h < 4; ++h)
      for (Index i = 0; i < 5; ++i) {
        const Index j = lengths[static_cast<std::size_t>(b)] - back;
        if (j < keys_seen(in, b, i, options.causal)) continue;
        const auto row = [&](const Array& all, Index width) {
          const auto begin = all.values.begin() + ((b * 4 + h) * 5 + i) * width;
          return Array{{width}, {begin, begin + width}};
        };
        const std::string why = "of query " + std::to_string(i) + " of sequence " + std::to_string(b) + ", head " +
                                std::to_string(h) + " when key " + std::to_string(j) +
                                ", which it may not see, became " + std::to_string(poison);
        if (!expect_same_bits("output", row(got.output, 16), row(want.output, 16), {"channel"}, why) ||
            !expect_same_bits("lse", row(got.lse, 1), row(want.lse, 1), {"query"}, why)) {
          return not_so(call, in, options);
        }
      }
  return true;
}

/// A value that is NaN in one channel reaches that channel of every query that sees it, and no other.
template <typename T>
bool expect_nan_values_seen(const DecodeCall<T>& call, const DecodeOptions& options) {
  const Lengths lengths{37, 37, 37, 37, 37, 37, 37};
  const std::array<Index, 7> places{0, 15, 20, 33, 34, 35, 36};  // of sequence b
  DecodeInputs in = random_decode<T>({.batch = 7, .heads = 2, .kv_heads = 1, .queries = 4, .keys = 40}, lengths, 6);
  for (Index b = 0; b < 7; ++b) {
    in.in.value(b, 0, places[static_cast<std::size_t>(b)], 5) = std::numeric_limits<float>::quiet_NaN();
  }
  const DecodeAnswer got = call(in, options);
  for (Index b = 0; b < 7; ++b)
    for (Index h = 0; h < 2; ++h)
      for (Index i = 0; i < 4; ++i)
        for (Index d = 0; d < 16; ++d) {
          const Index key = places[static_cast<std::size_t>(b)];
          const bool want = d == 5 && key < keys_seen(in, b, i, options.causal);
          const bool is = std::isnan(got.output.values[static_cast<std::size_t>(((b * 2 + h) * 4 + i) * 16 + d)]);
          if (is == want) continue;
          finding("output", "of query " + std::to_string(i) + ", channel " + std::to_string(d) + " is " +
                                (is ? "NaN" : "a number") + " when the value of key " + std::to_string(key) + " of " +
                                std::to_string(lengths[0]) + " is NaN in channel 5");
          return not_so(call, in, options);
        }
  return true;
}

/// The sequences come in another order, and each keeps its bits.
template <typename T>
bool expect_strangers(const DecodeCall<T>& call, const DecodeOptions& options) {
  const Lengths lengths{90, 3, 0, 41};
  const std::array<Index, 4> from{2, 0, 3, 1};
  const Sizes sizes{.batch = 4, .heads = 6, .kv_heads = 2, .queries = 2, .keys = 96};
  const DecodeInputs in = random_decode<T>(sizes, lengths, 7);
  DecodeInputs other = random_decode<T>(sizes, lengths, 7);
  const auto move = [&](const Tensor<float, 4>& source, Tensor<float, 4>& target) {
    const Index count = source.count() / 4;
    for (Index b = 0; b < 4; ++b) {
      std::copy_n(source.data() + from[static_cast<std::size_t>(b)] * count, count, target.data() + b * count);
    }
  };
  move(in.in.query, other.in.query);
  move(in.in.key, other.in.key);
  move(in.in.value, other.in.value);
  for (std::size_t b = 0; b < 4; ++b) other.lengths[b] = lengths[static_cast<std::size_t>(from[b])];
  const DecodeAnswer want = call(in, options);
  const DecodeAnswer got = call(other, options);
  for (Index b = 0; b < 4; ++b)
    for (Index h = 0; h < 6; ++h) {
      const Index was = from[static_cast<std::size_t>(b)];
      const std::string why = "of head " + std::to_string(h) + " of sequence " + std::to_string(was) +
                              " when it became sequence " + std::to_string(b);
      if (!expect_same_bits("output", head_of(got.output, b, h), head_of(want.output, was, h), {"query", "channel"},
                            why) ||
          !expect_same_bits("lse", head_of(got.lse, b, h), head_of(want.lse, was, h), {"query"}, why)) {
        return not_so(call, in, options);
      }
    }
  return true;
}

/// The first half of the keys has scores near `first`, the second half near `second`.
template <typename T>
bool expect_apart(const DecodeCall<T>& call, double first, double second, const DecodeOptions& options) {
  const Fill scores = [&](Index, Index, Index j, Index d) {
    const double small = static_cast<double>((7 * j + 3 * d) % 16) / 16.0;
    return d == 0 ? (j < 40 ? first : second) : small;
  };
  const DecodeInputs in = decode_inputs<T>(
      {.batch = 2, .heads = 2, .kv_heads = 1, .keys = 80}, {80, 71},
      [](Index, Index h, Index, Index d) { return d == 0       ? 1.0
                                                  : d == 1 + h ? 0.5
                                                               : 0.0; }, scores, noise(11));
  DecodeOptions with_scale = options;
  with_scale.scale = 1.0f;
  return expect_decoded(call, in, with_scale);
}

/// The same rows elsewhere in memory.
template <typename T>
bool expect_anywhere(const DecodeCall<T>& call, DecodeOptions options) {
  const DecodeInputs in =
      random_decode<T>({.batch = 2, .heads = 6, .kv_heads = 2, .queries = 2, .keys = 40}, {40, 19}, 12);
  const DecodeAnswer want = call(in, options);
  options.apart = 3;
  if (!expect_same(call, call(in, options), want, in, options,
                   "when the lengths (and the rows of the table) lay apart"))
    return false;
  for (const Layouts& layouts : {TOKENS, APART, MIXED, MIXED_OTHERWISE}) {
    options.layouts = layouts;
    if (!expect_same(call, call(in, options), want, in, options, "when the rows lay otherwise")) return false;
  }
  return true;
}

/// The output has the same bits with an lse and without.
template <typename T>
bool expect_without_lse(const DecodeCall<T>& call, DecodeOptions options) {
  const DecodeInputs in =
      random_decode<T>({.batch = 2, .heads = 4, .kv_heads = 2, .queries = 2, .keys = 70}, {70, 33}, 13);
  const DecodeAnswer want = call(in, options);
  options.with_lse = false;
  const DecodeAnswer got = call(in, options);
  return expect_same_bits("output", got.output, want.output, QUERY_AXES, "when nobody asked for the lse") ||
         not_so(call, in, options);
}

/// Twice the same, with something else in between and in another order of blocks and threads.
template <typename T>
bool expect_repeatable(const DecodeCall<T>& call, const DecodeOptions& options) {
  const DecodeInputs in =
      random_decode<T>({.batch = 2, .heads = 4, .kv_heads = 2, .queries = 3, .keys = 130}, {130, 77}, 14);
  const DecodeAnswer want = call(in, options);
  const DecodeInputs bad =
      decode_inputs<T>({.batch = 2, .heads = 4, .kv_heads = 2, .queries = 3, .keys = 130}, {130, 130}, everywhere(1),
                       everywhere(std::nan("")), everywhere(std::nan("")));
  DecodeOptions quietly = options;
  quietly.judge = false;
  call(bad, quietly);
  if (!expect_same(call, call(in, options), want, in, options, "in a later call")) return false;
  if (call.on_host) return true;
  for (const std::uint64_t seed : {1u, 2u}) {
    if (kernels_are_checked() && seed > 1) continue;
    const AnotherOrder order(seed);
    if (!expect_same(call, call(in, options), want, in, options, "when blocks and threads ran in another order"))
      return false;
  }
  return true;
}

// ---- Traffic, which only the virtual GPU counts ---------------------------------------------------------------------

struct DecodeTraffic {
  Index key, value, shared;
};

template <typename T>
DecodeTraffic decode_traffic(const DecodeCall<T>& call, const DecodeInputs& in, const DecodeOptions& options,
                             const char* key, const char* value) {
  const DecodeAnswer answer = call(in, options);
  DecodeTraffic traffic{bytes_loaded(answer.profiles, key), bytes_loaded(answer.profiles, value), 0};
  for (const KernelProfile& profile : answer.profiles) {
    traffic.shared = std::max<Index>(traffic.shared, profile.dynamic_shared_bytes);
  }
  return traffic;
}

/// Keys in use are loaded once for every 4 rows of a group, and no others.
template <typename T>
bool expect_loaded_once(const DecodeCall<T>& call, const char* key, const char* value, Index heads, Index queries) {
  const DecodeInputs in =
      random_decode<T>({.batch = 2, .heads = heads, .kv_heads = 1, .queries = queries, .keys = 200}, {128, 40}, 15);
  const DecodeOptions options{.splits = 2};
  const DecodeTraffic traffic = decode_traffic(call, in, options, key, value);
  if (!kernels_are_judged()) return true;
  const Index row = 16 * static_cast<Index>(sizeof(T));
  const Index times = ceil_div(heads * queries, 4);
  const Index most = times * (128 + 40) * row + 256;
  const auto expect_at_most = [&](Index loaded, const char* name) {
    return expect(loaded > 0 && loaded <= most, name,
                  "loaded too often: " + std::to_string(loaded) + " bytes of " + std::to_string(168 * row) +
                      " in use, for " + std::to_string(heads) + " query heads with " + std::to_string(queries) +
                      " queries each; want at most " + std::to_string(most)) ||
           not_so(call, in, options);
  };
  return expect_at_most(traffic.key, key) && expect_at_most(traffic.value, value);
}

template <typename T>
bool expect_no_row_of_scores(const DecodeCall<T>& call, const char* key, const char* value) {
  const auto shared = [&](std::int32_t keys) {
    const DecodeInputs in = random_decode<T>({.keys = keys}, {keys}, 16);
    return decode_traffic(call, in, {}, key, value).shared;
  };
  const Index one = shared(192);
  const Index two = shared(384);
  if (!kernels_are_judged()) return true;
  return expect(two <= one, "memory",
                "shared memory grows with the number of keys: " + std::to_string(one) + " bytes for 192 keys, " +
                    std::to_string(two) + " for 384");
}

// ---- Numbered cases -------------------------------------------------------------------------------------------------

struct DecodeCase {
  const char* why;
  Sizes sizes;
  Lengths lengths;
  Index splits = 1;
  bool causal = true;
  std::optional<float> scale = {};
  double shift = 0.0;  // of every score, roughly: channel 0 of the queries is 1, that of the keys this
  Layouts layouts = {};
  Paging paging = {};
  int number = 0;

  std::string text() const {
    std::string text = std::string(why) + ": B=" + std::to_string(sizes.batch) + " H=" + std::to_string(sizes.heads) +
                       " Hk=" + std::to_string(sizes.kv_heads) + " Sq=" + std::to_string(sizes.queries) +
                       " D=" + std::to_string(sizes.width) + ", lengths " + to_text(lengths) + ", " +
                       std::to_string(splits) + " parts" + (causal ? "" : ", not causal");
    if (scale) text += ", scale " + std::to_string(*scale);
    return text;
  }
  DecodeOptions options() const {
    return {.splits = splits, .causal = causal, .scale = scale, .layouts = layouts, .paging = paging};
  }
  template <typename T>
  DecodeInputs inputs() const {
    const auto shifted = [](Fill fill, double by) {
      return [fill, by](Index b, Index h, Index s, Index d) { return d == 0 && by != 0.0 ? by : fill(b, h, s, d); };
    };
    const auto seed = static_cast<unsigned>(1000 + 4 * number);
    return decode_inputs<T>(sizes, lengths, shifted(noise(seed), shift == 0.0 ? 0.0 : 1.0),
                            shifted(noise(seed + 1), shift), noise(seed + 2));
  }
};

/// In order of number. Numbers never change: new cases go to the end.
inline const std::vector<DecodeCase>& decode_cases() {
  static const std::vector<DecodeCase> cases = [] {
    using Storage = Paging::Storage;
    std::vector<DecodeCase> list{
        {"one query and a few keys", {.heads = 1, .kv_heads = 1, .keys = 12}, {9}, 1},
        {"one part for each tile", {.heads = 2, .kv_heads = 2, .keys = 150}, {150}, 3},
        {"more parts than keys", {.batch = 2, .heads = 2, .kv_heads = 1, .keys = 9}, {3, 7}, 16},
        {"lengths far apart", {.batch = 3, .heads = 4, .kv_heads = 2, .keys = 200}, {200, 1, 67}, 4},
        {"an empty sequence", {.batch = 3, .heads = 2, .kv_heads = 1, .keys = 40}, {33, 0, 40}, 2},
        {"several queries", {.batch = 2, .heads = 6, .kv_heads = 2, .queries = 4, .keys = 70}, {70, 21}, 3},
        {"more queries than keys", {.batch = 2, .heads = 2, .kv_heads = 2, .queries = 9, .keys = 30}, {5, 30}, 2},
        {"not causal", {.batch = 2, .heads = 3, .kv_heads = 1, .queries = 5, .keys = 50}, {50, 17}, 2, false},
        {"a group of 6, three groups", {.heads = 18, .kv_heads = 3, .keys = 60}, {53}, 2},
        {"scale 0.3 given", {.batch = 2, .heads = 2, .kv_heads = 1, .queries = 2, .keys = 90}, {90, 61}, 4, true, 0.3f},
        {"a scale of 0", {.heads = 2, .kv_heads = 1, .queries = 2, .keys = 40}, {37}, 2, true, 0.0f},
        {"a negative scale", {.heads = 2, .kv_heads = 1, .queries = 2, .keys = 70}, {69}, 3, true, -0.4f},
        {"scores near 120", {.batch = 2, .heads = 2, .kv_heads = 1, .keys = 100}, {100, 35}, 3, true, 1.0f, 120.0},
        {"scores near -120", {.batch = 2, .heads = 2, .kv_heads = 1, .keys = 100}, {100, 35}, 3, true, 1.0f, -120.0},
        {"32 channels", {.batch = 2, .heads = 4, .kv_heads = 2, .queries = 3, .keys = 70, .width = 32}, {68, 33}, 2},
        {"64 channels", {.batch = 2, .heads = 4, .kv_heads = 1, .queries = 2, .keys = 66, .width = 64}, {65, 30}, 2},
        {"128 channels", {.batch = 2, .heads = 5, .kv_heads = 1, .keys = 70, .width = 128}, {70, 31}, 3},
        {"16 queries", {.heads = 2, .kv_heads = 1, .queries = 16, .keys = 45}, {45}, 2},
        {"rows apart", {.batch = 2, .heads = 4, .kv_heads = 2, .queries = 2, .keys = 50}, {44, 50}, 2},
        {"a prompt of 4", {.batch = 2, .heads = 2, .kv_heads = 1, .queries = 4, .keys = 12}, {4, 11}, 2},
    };
    // Where step 07's rows lie.
    constexpr std::array<Index, 7> PAGE_SIZES{16, 64, 4, 32, 7, 16, 1};
    for (std::size_t i = 0; i < list.size(); ++i) {
      list[i].number = static_cast<int>(i + 1);
      list[i].paging.page_size = PAGE_SIZES[i % PAGE_SIZES.size()];
      list[i].paging.order = static_cast<unsigned>(i + 1);
      if (i % 3 == 1) list[i].paging.storage = Storage::interleaved;
      if (i % 3 == 2) list[i].paging.storage = Storage::interleaved_tokens;
    }
    list[18].layouts = MIXED;
    return list;
  }();
  return cases;
}

inline std::vector<int> decode_case_numbers() {
  std::vector<int> numbers;
  for (const DecodeCase& c : decode_cases()) numbers.push_back(c.number);
  return numbers;
}

inline void for_each(const std::vector<DecodeCase>& cases, const std::function<void(const DecodeCase&)>& body) {
  for (const DecodeCase& c : cases) run_case(c.number, c.text(), [&] { body(c); });
}

/// For Recognise: what the answer on the CPU makes of a case, or if that is right (or not there yet) what the one on
/// the GPU makes of it. So a mistake shows itself wherever it is.
inline std::vector<Array> decode_outputs(const DecodeStep& step, int number) {
  if (kernels_are_checked()) throw NotImplemented(__FILE__);
  const DecodeCase& c = decode_cases().at(static_cast<std::size_t>(number) - 1);
  const DecodeInputs in = c.inputs<float>();
  DecodeOptions options = c.options();
  options.judge = false;
  const ExpectedForward want = expected_decode<float>(in, options);
  const auto near = [](const Array& got, const Array& exact) {
    for (std::size_t i = 0; i < exact.count(); ++i) {
      const double off = std::abs(got.values[i] - exact.values[i]);
      const bool same = got.values[i] == exact.values[i];  // infinities
      if (!same && !(off <= 1e-3 * (1.0 + std::abs(exact.values[i])))) return false;
    }
    return true;
  };
  try {
    const DecodeAnswer host = step.host(in, options);
    if (!near(host.output, want.exact.output) || !near(host.lse, want.exact.lse)) return {host.output, host.lse};
  } catch (const NotImplemented&) {
    // Then only the other one can be wrong.
  }
  const DecodeAnswer gpu = step.fp32(in, options);
  if (!take_findings().empty()) throw std::runtime_error("a kernel was abandoned");
  return {gpu.output, gpu.lse};
}

/// Sizes of real models, for a real GPU.
template <typename T>
bool expect_long_cache(const DecodeCall<T>& call, Index heads, Index kv_heads, Index queries, Index width,
                       const Lengths& lengths, const std::vector<DecodeOptions>& all_options) {
  const DecodeInputs in = random_decode<T>({.batch = static_cast<Index>(lengths.size()),
                                            .heads = heads,
                                            .kv_heads = kv_heads,
                                            .queries = queries,
                                            .keys = *std::max_element(lengths.begin(), lengths.end()) + 5,
                                            .width = width},
                                           lengths, 21);
  const ExpectedForward want = expected_decode<T>(in, {});
  for (const DecodeOptions& options : all_options) {
    if (!expect_decoded(call, in, options, want)) return false;
  }
  return true;
}

}  // namespace flashkata::testing
