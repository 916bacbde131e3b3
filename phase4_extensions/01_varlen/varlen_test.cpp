#include "varlen.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <span>

#include "common/testing/device_tensor.hpp"
#include "common/testing/kernel.hpp"
#include "common/testing/suite.hpp"
#include "common/virtual_gpu/findings.hpp"
#include "phase2_forward/suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
const Axes QUERIES = {"batch", "head", "query", "channel"};
const Axes KEYS = {"batch", "head", "key", "channel"};
const Axes LSE = {"batch", "head", "query"};
const Axes MODEL = {"item", "place", "channel"};

// ---- Batches --------------------------------------------------------------------------------------------------------

// One sequence: its lengths, and the seed of what it holds, wherever in a batch it stands.
struct Sequence {
  Index queries, keys;
  int seed = 0;
};

struct Batch {
  const char* why = "";
  std::vector<Sequence> sequences;
  Index heads = 1;
  Index width = 16;
  bool causal = false;
  std::optional<float> scale = {};
  Index tail_q = 0, tail_k = 0;  // tokens after the last sequence
  Index spare = 0;               // what max_seqlen is above the longest
  Layouts layouts = TOKENS;
  int number = 0;

  std::string text() const {
    std::string lengths;
    for (const Sequence& s : sequences) {
      lengths += (lengths.empty() ? "" : ", ") + std::to_string(s.queries) + " x " + std::to_string(s.keys);
    }
    return std::string(why) + ": queries x keys " + (lengths.empty() ? "none" : lengths) +
           "; H=" + std::to_string(heads) + " D=" + std::to_string(width) + (causal ? ", causal" : "");
  }
};

enum class Side { queries, keys };

Index length_of(const Sequence& sequence, Side side) {
  return side == Side::queries ? sequence.queries : sequence.keys;
}

// [B + 1]: where sequences begin.
std::vector<std::int32_t> begins(const Batch& batch, Side side) {
  std::vector<std::int32_t> result{0};
  for (const Sequence& s : batch.sequences)
    result.push_back(result.back() + static_cast<std::int32_t>(length_of(s, side)));
  return result;
}

Index owned(const Batch& batch, Side side) { return begins(batch, side).back(); }

Index longest(const Batch& batch, Side side) {
  Index result = 0;
  for (const Sequence& s : batch.sequences) result = std::max(result, length_of(s, side));
  return result;
}

// Sequence b of an array [1, H, T, ...], by itself.
Array part(const Array& all, const Batch& batch, std::size_t b, Side side) {
  const Index first = begins(batch, side)[b];
  const Index count = length_of(batch.sequences[b], side);
  const Index tokens = all.shape[2];
  const Index width = all.shape.size() > 3 ? all.shape[3] : 1;
  Array result{all.shape, {}};
  result.shape[2] = count;
  for (Index h = 0; h < all.shape[1]; ++h) {
    const auto begin = all.values.begin() + (h * tokens + first) * width;
    result.values.insert(result.values.end(), begin, begin + count * width);
  }
  return result;
}

// ---- Inputs ---------------------------------------------------------------------------------------------------------

struct Inputs {
  Tensor<float, 4> query, key, value, d_output;  // [1, H, T, D]; tokens of nobody hold NaN
};

AttentionCase problem_of(const Batch& batch, std::size_t b) {
  const Sequence& s = batch.sequences[b];
  return {.why = "",
          .heads = batch.heads,
          .queries = s.queries,
          .keys = s.keys,
          .width = batch.width,
          .value_width = batch.width,
          .scale = batch.scale,
          .causal = batch.causal,
          .number = s.seed};
}

// Copies rows between a packed tensor and those of one sequence.
template <typename From, typename To>
void copy_rows(const From& from, Index from_first, const To& to, Index to_first, Index count) {
  for (Index h = 0; h < from.size(1); ++h)
    for (Index s = 0; s < count; ++s)
      for (Index d = 0; d < from.size(3); ++d) to(0, h, to_first + s, d) = from(0, h, from_first + s, d);
}

Inputs inputs_of(const Batch& batch) {
  const Shape<4> queries{1, batch.heads, owned(batch, Side::queries) + batch.tail_q, batch.width};
  const Shape<4> keys{1, batch.heads, owned(batch, Side::keys) + batch.tail_k, batch.width};
  Inputs in{Tensor<float, 4>(queries), Tensor<float, 4>(keys), Tensor<float, 4>(keys), Tensor<float, 4>(queries)};
  const auto first_q = begins(batch, Side::queries), first_k = begins(batch, Side::keys);
  for (std::size_t b = 0; b < batch.sequences.size(); ++b) {
    const AttentionCase c = problem_of(batch, b);
    const AttentionInputs own = make_inputs(c);
    const TokenTensor d_output = make_output_gradient(c);
    copy_rows(own.query.heads(), 0, in.query.view(), first_q[b], c.queries);
    copy_rows(own.key.heads(), 0, in.key.view(), first_k[b], c.keys);
    copy_rows(own.value.heads(), 0, in.value.view(), first_k[b], c.keys);
    copy_rows(d_output.heads(), 0, in.d_output.view(), first_q[b], c.queries);
  }
  return in;
}

// Value(h, place in the sequence, d) for the rows of sequence b.
using Fill = std::function<double(Index h, Index s, Index d)>;

void fill(Tensor<float, 4>& packed, const Batch& batch, std::size_t b, Side side, const Fill& value) {
  const Index first = begins(batch, side)[b];
  for (Index h = 0; h < packed.size(1); ++h)
    for (Index s = 0; s < length_of(batch.sequences[b], side); ++s)
      for (Index d = 0; d < packed.size(3); ++d) packed(0, h, first + s, d) = static_cast<float>(value(h, s, d));
}

// What sequence b holds, as a problem of its own.
AttentionInputs sequence_of(const Inputs& in, const Batch& batch, std::size_t b) {
  const AttentionCase c = problem_of(batch, b);
  AttentionInputs own = make_inputs(c);
  copy_rows(in.query.view(), begins(batch, Side::queries)[b], own.query.heads(), 0, c.queries);
  copy_rows(in.key.view(), begins(batch, Side::keys)[b], own.key.heads(), 0, c.keys);
  copy_rows(in.value.view(), begins(batch, Side::keys)[b], own.value.heads(), 0, c.keys);
  return own;
}

// What the float64 reference makes of each sequence alone.
struct Right {
  std::vector<Expected> forward;
  std::vector<ExpectedGradients> backward;
};

Right right_of(const Batch& batch, const Inputs& in) {
  Right right;
  for (std::size_t b = 0; b < batch.sequences.size(); ++b) {
    const AttentionCase c = problem_of(batch, b);
    const AttentionInputs own = sequence_of(in, batch, b);
    right.forward.push_back(expected(c, own));
    TokenTensor d_output = make_output_gradient(c);
    copy_rows(in.d_output.view(), begins(batch, Side::queries)[b], d_output.heads(), 0, c.queries);
    right.backward.push_back(expected_gradients(c, own, d_output));
  }
  return right;
}

// ---- Memory, on the host or on the GPU ------------------------------------------------------------------------------

enum class Where { host, gpu };

// A packed tensor with something around it. Inputs have NaN between their rows. Outputs are NaN where a sequence has
// rows, and numbers that must stay between them, around them, and where tokens belong to nobody.
class Packed {
 public:
  static Packed input(Where where, const std::string& name, const View<const float, 4>& values, Layout layout) {
    Packed packed(where, name, values.shape(), layout, 0, NOT_A_NUMBER);
    packed.each([&](std::size_t at, Index h, Index s, Index d) { packed.before_[at] = values(0, h, s, d); });
    packed.place();
    return packed;
  }

  static Packed output(Where where, const std::string& name, const Shape<4>& shape, Index owned, Layout layout) {
    Packed packed(where, name, shape, layout, GUARD, UNTOUCHED);
    packed.owned_ = owned;
    packed.each([&](std::size_t at, Index, Index s, Index) {
      if (s < owned) packed.before_[at] = NOT_A_NUMBER;
    });
    packed.place();
    return packed;
  }

  View<float, 4> view() { return {data() + first_, shape_, strides_}; }
  View<float, 3> rows() {  // of [1, H, T, 1]
    return {data() + first_, {shape_[0], shape_[1], shape_[2]}, {strides_[0], strides_[1], strides_[2]}};
  }

  // [1, H, T, D] as it is now. With `judge`, whatever changed that is nobody's is a finding.
  Array values(bool judge) const {
    const std::vector<float> now = current();
    std::vector<bool> sequences(now.size(), false);
    Array array{{shape_.begin(), shape_.end()}, {}};
    each([&](std::size_t at, Index h, Index s, Index) {
      array.values.push_back(static_cast<double>(now[at]));
      sequences[at] = s < owned_;
      if (!judge || s < owned_ || same_bits(now[at], before_[at])) return;
      finding(name_, "token " + std::to_string(s) + " was written in head " + std::to_string(h) +
                         ", and the last sequence ends before token " + std::to_string(owned_));
      judge = false;
    });
    for (std::size_t i = 0; judge && i < now.size(); ++i) {
      if (sequences[i] || same_bits(now[i], before_[i])) continue;
      finding(name_, "guard zone overwritten: numbers that are not part of it changed; first at element " +
                         std::to_string(static_cast<Index>(i) - first_) + " from its beginning, stride of a token " +
                         std::to_string(strides_[2]));
      judge = false;
    }
    return array;
  }

  void expect_unchanged() const {
    const std::vector<float> now = current();
    for (std::size_t i = 0; i < now.size(); ++i) {
      if (same_bits(now[i], before_[i])) continue;
      finding(name_, "is an input, and was written at element " + std::to_string(i));
      return;
    }
  }

 private:
  static constexpr Index GUARD = 64;  // elements before and after; keeps 16-byte alignment
  static constexpr float UNTOUCHED = -8192.5f;

  Packed(Where where, const std::string& name, const Shape<4>& shape, Layout layout, Index guard, float around)
      : where_(where),
        name_(name),
        shape_(shape),
        strides_(strides_of(shape, layout, sizeof(float))),
        owned_(shape[2]),
        first_(guard) {
    const Index extent = shape[1] * shape[2] * shape[3] == 0 ? 0 : std::max(strides_[0], strides_[1] * shape[1]);
    before_.assign(static_cast<std::size_t>(extent + 2 * guard), around);
  }

  void place() {
    if (where_ == Where::host) {
      host_ = before_;
    } else {
      device_.emplace(name_, std::span<const float>(before_));
    }
  }
  float* data() { return where_ == Where::host ? host_.data() : device_->data(); }
  std::vector<float> current() const { return where_ == Where::host ? host_ : device_->download(); }

  template <typename Body>
  void each(Body&& body) const {
    for (Index h = 0; h < shape_[1]; ++h)
      for (Index s = 0; s < shape_[2]; ++s)
        for (Index d = 0; d < shape_[3]; ++d) {
          body(static_cast<std::size_t>(first_ + h * strides_[1] + s * strides_[2] + d), h, s, d);
        }
  }

  Where where_;
  std::string name_;
  Shape<4> shape_, strides_;
  Index owned_;
  Index first_;
  std::vector<float> before_, host_;
  std::optional<DeviceBuffer<float>> device_;
};

// The entries of cu_seqlens, B + 1 numbers and not one more.
class Entries {
 public:
  Entries(Where where, const char* name, std::vector<std::int32_t> entries)
      : name_(name), host_(entries), before_(entries) {
    if (where == Where::gpu) device_.emplace(name, std::span<const std::int32_t>(before_));
  }
  View<const std::int32_t, 1> view() const {
    return {device_ ? device_->data() : host_.data(), {static_cast<Index>(before_.size())}};
  }
  void expect_unchanged() const {
    expect((device_ ? device_->download() : host_) == before_, name_, "is an input, and was written");
  }

 private:
  const char* name_;
  std::vector<std::int32_t> host_, before_;
  std::optional<DeviceBuffer<std::int32_t>> device_;
};

// ---- Calls ----------------------------------------------------------------------------------------------------------

struct Answer {
  Array output;  // [1, H, Tq, D]
  Array lse;     // [1, H, Tq]
  std::vector<KernelProfile> profiles;
};

struct Gradients {
  Array query, key, value;  // [1, H, T, D]
  std::vector<KernelProfile> profiles;
};

// Runs what is judged. With `judge`, what it does to memory that is not its own is a finding.
std::vector<KernelProfile> run(Where where, bool judge, const std::function<void()>& call) {
  if (where == Where::host) {
    call();
    return {};
  }
  if (!judge) {
    run_unwatched(call);
    return {};
  }
  const std::size_t memory = device_bytes();
  reset_peak_device_bytes();
  std::vector<KernelProfile> profiles = run_kernels(call);
  expect(peak_device_bytes() == memory, "memory",
         std::to_string(peak_device_bytes() - memory) + " bytes on the GPU beyond the arguments; want none");
  return profiles;
}

struct Boundaries {
  Boundaries(Where where, const Batch& batch)
      : q(where, "cu_seqlens_q", begins(batch, Side::queries)),
        k(where, "cu_seqlens_k", begins(batch, Side::keys)),
        sequences{q.view(), k.view(), longest(batch, Side::queries) + batch.spare,
                  longest(batch, Side::keys) + batch.spare} {}
  void expect_unchanged() const {
    q.expect_unchanged();
    k.expect_unchanged();
  }
  Entries q, k;
  Sequences sequences;
};

Layout lse_layout(const Layouts& layouts) {
  return layouts.output == Layout::heads_apart ? Layout::heads : layouts.output;
}

Answer forward(Where where, const Batch& batch, const Inputs& in, bool judge = true) {
  const Layouts& layouts = batch.layouts;
  const Index owned_q = owned(batch, Side::queries);
  Packed q = Packed::input(where, "query", in.query, layouts.query);
  Packed k = Packed::input(where, "key", in.key, layouts.key);
  Packed v = Packed::input(where, "value", in.value, layouts.value);
  Packed o = Packed::output(where, "output", in.query.shape(), owned_q, layouts.output);
  Packed l = Packed::output(where, "lse", {1, batch.heads, in.query.size(2), 1}, owned_q, lse_layout(layouts));
  const Boundaries boundaries(where, batch);
  const FlashForward<float> problem{.query = q.view(),
                                    .key = k.view(),
                                    .value = v.view(),
                                    .output = o.view(),
                                    .lse = l.rows(),
                                    .causal = batch.causal,
                                    .scale = batch.scale};
  Answer answer;
  answer.profiles = run(where, judge, [&] {
    where == Where::host ? tiled_varlen_forward(problem, boundaries.sequences)
                         : flash_varlen_forward(problem, boundaries.sequences);
  });
  answer.output = o.values(judge);
  answer.lse = l.values(judge);
  answer.lse.shape.pop_back();
  if (!judge) return answer;
  for (const Packed* input : {&q, &k, &v}) input->expect_unchanged();
  boundaries.expect_unchanged();
  return answer;
}

// Output and lse of the forward pass come from the reference, so that nobody's forward mistake is counted twice.
Gradients backward(Where where, const Batch& batch, const Inputs& in, bool deterministic = true, bool judge = true) {
  const Layouts& layouts = batch.layouts;
  const Index owned_q = owned(batch, Side::queries), owned_k = owned(batch, Side::keys);
  Tensor<float, 4> output(in.query.shape());
  Tensor<float, 4> lse({1, batch.heads, in.query.size(2), 1});
  for (std::size_t b = 0; b < batch.sequences.size(); ++b) {
    const Expected right = expected(problem_of(batch, b), sequence_of(in, batch, b));
    const Index first = begins(batch, Side::queries)[b], count = batch.sequences[b].queries;
    for (Index h = 0; h < batch.heads; ++h)
      for (Index i = 0; i < count; ++i) {
        const auto row = static_cast<std::size_t>(h * count + i);
        lse(0, h, first + i, 0) = static_cast<float>(right.lse.values[row]);
        for (Index d = 0; d < batch.width; ++d) {
          output(0, h, first + i, d) = static_cast<float>(
              right.output.values[row * static_cast<std::size_t>(batch.width) + static_cast<std::size_t>(d)]);
        }
      }
  }
  Packed q = Packed::input(where, "query", in.query, layouts.query);
  Packed k = Packed::input(where, "key", in.key, layouts.key);
  Packed v = Packed::input(where, "value", in.value, layouts.value);
  Packed o = Packed::input(where, "output", output, layouts.output);
  Packed d_o = Packed::input(where, "d_output", in.d_output, layouts.key);
  Packed l = Packed::input(where, "lse", lse, lse_layout(layouts));
  Packed d_q = Packed::output(where, "d_query", in.query.shape(), owned_q, layouts.value);
  Packed d_k = Packed::output(where, "d_key", in.key.shape(), owned_k, layouts.output);
  Packed d_v = Packed::output(where, "d_value", in.key.shape(), owned_k, layouts.query);
  const Index tokens = in.query.size(2);  // of scratch every row is the callee's
  Packed delta = Packed::output(where, "delta", {1, batch.heads, tokens, 1}, tokens, Layout::heads);
  Packed sums = Packed::output(where, "d_query_sum", in.query.shape(), tokens, Layout::heads);
  const Boundaries boundaries(where, batch);
  const FlashBackward<float> problem{.query = q.view(),
                                     .key = k.view(),
                                     .value = v.view(),
                                     .output = o.view(),
                                     .lse = l.rows(),
                                     .d_output = d_o.view(),
                                     .d_query = d_q.view(),
                                     .d_key = d_k.view(),
                                     .d_value = d_v.view(),
                                     .delta = delta.rows(),
                                     .d_query_sum = sums.view(),
                                     .causal = batch.causal,
                                     .scale = batch.scale,
                                     .deterministic = deterministic};
  Gradients got;
  got.profiles = run(where, judge, [&] {
    where == Where::host ? tiled_varlen_backward(problem, boundaries.sequences)
                         : flash_varlen_backward(problem, boundaries.sequences);
  });
  got.query = d_q.values(judge);
  got.key = d_k.values(judge);
  got.value = d_v.values(judge);
  if (!judge) return got;
  delta.values(true);
  sums.values(true);
  for (const Packed* input : {&q, &k, &v, &o, &d_o, &l}) input->expect_unchanged();
  boundaries.expect_unchanged();
  return got;
}

// ---- The judgement --------------------------------------------------------------------------------------------------

bool not_so(const Batch& batch, std::size_t b) {
  const Sequence& s = batch.sequences[b];
  finding("of", "sequence " + std::to_string(b) + " of " + std::to_string(batch.sequences.size()) + ", " +
                    std::to_string(s.queries) + (s.queries == 1 ? " query, " : " queries, ") + std::to_string(s.keys) +
                    (s.keys == 1 ? " key" : " keys") + (batch.causal ? ", causal" : ""));
  return false;
}

// Of an answer that is not of the batch's shape nothing can be compared.
bool expect_forward(const Answer& got, const Batch& batch, const Right& right) {
  for (std::size_t b = 0; b < batch.sequences.size(); ++b) {
    const Expected& want = right.forward[b];
    constexpr double eps = std::numeric_limits<float>::epsilon();
    const double largest_score = (want.output_bound.relative - 1e-5) / (2.0 * eps);
    const bool lse =
        expect_close("lse", part(got.lse, batch, b, Side::queries), want.lse, lse_bound(want.lse, largest_score), LSE);
    const Array output = part(got.output, batch, b, Side::queries);
    if (!expect_close("output", output, want.output, want.output_bound, QUERIES) || !lse) return not_so(batch, b);
  }
  return true;
}

bool expect_backward(const Gradients& got, const Batch& batch, const Right& right) {
  for (std::size_t b = 0; b < batch.sequences.size(); ++b) {
    const ExpectedGradients& want = right.backward[b];
    const bool value =
        expect_close("d_value", part(got.value, batch, b, Side::keys), want.value, want.value_bound, KEYS);
    const bool key = expect_close("d_key", part(got.key, batch, b, Side::keys), want.key, want.key_bound, KEYS);
    const Array query = part(got.query, batch, b, Side::queries);
    if (!expect_close("d_query", query, want.query, want.query_bound, QUERIES) || !key || !value) {
      return not_so(batch, b);
    }
  }
  return true;
}

// Everything against the reference: forward, and the gradients by both ways to dQ.
bool expect_right(Where where, const Batch& batch, const Inputs& in) {
  const Right right = right_of(batch, in);
  if (!expect_forward(forward(where, batch, in), batch, right)) return false;
  for (const bool deterministic : {true, false}) {
    if (where == Where::host && !deterministic) continue;  // one and the same there
    if (kernels_are_checked() && deterministic != (batch.number % 2 == 0)) continue;
    if (!expect_backward(backward(where, batch, in, deterministic), batch, right)) return false;
  }
  return true;
}

bool expect_right(Where where, const Batch& batch) { return expect_right(where, batch, inputs_of(batch)); }

// Both halves of one call with the same bits: sequence b of the one is sequence from[b] of the other.
struct Both {
  Answer forward;
  Gradients backward;
};

Both both(Where where, const Batch& batch, const Inputs& in) {
  return {forward(where, batch, in), backward(where, batch, in)};
}

bool expect_same(const Both& got, const Batch& batch, std::size_t b, const Both& want, const Batch& before,
                 std::size_t was, const std::string& why, double tolerance = 0.0) {
  const auto same = [&](const char* name, const Array& is, const Array& should, Side side, const Axes& axes) {
    return expect_same_but_rounding(name, part(is, batch, b, side), part(should, before, was, side), tolerance, axes,
                                    "of sequence " + std::to_string(was) + " " + why);
  };
  return same("output", got.forward.output, want.forward.output, Side::queries, QUERIES) &&
         same("lse", got.forward.lse, want.forward.lse, Side::queries, LSE) &&
         same("d_query", got.backward.query, want.backward.query, Side::queries, QUERIES) &&
         same("d_key", got.backward.key, want.backward.key, Side::keys, KEYS) &&
         same("d_value", got.backward.value, want.backward.value, Side::keys, KEYS);
}

// ---- The numbered batches -------------------------------------------------------------------------------------------

std::vector<Batch> listed() {
  return {
      {.why = "one sequence", .sequences = {{21, 21}}},
      {.why = "two of different length", .sequences = {{5, 5}, {18, 18}}},
      {.why = "three, causal", .sequences = {{7, 7}, {19, 19}, {12, 12}}, .heads = 2, .causal = true},
      {.why = "fewer queries than keys, or more", .sequences = {{3, 17}, {20, 9}, {1, 33}, {4, 6}}, .heads = 2},
      {.why = "the same, causal", .sequences = {{3, 17}, {20, 9}, {1, 33}, {4, 6}}, .causal = true},
      {.why = "empty ones everywhere",
       .sequences = {{0, 5}, {6, 0}, {7, 11}, {0, 0}, {3, 0}, {0, 4}, {9, 8}, {0, 0}},
       .heads = 2},
      {.why = "empty at both ends, causal", .sequences = {{0, 0}, {4, 0}, {9, 9}, {0, 3}, {0, 0}}, .causal = true},
      {.why = "tokens of nobody", .sequences = {{6, 6}, {11, 13}}, .heads = 2, .tail_q = 5, .tail_k = 9},
      {.why = "tokens of nobody, causal, a large max_seqlen",
       .sequences = {{13, 10}, {2, 5}},
       .heads = 2,
       .causal = true,
       .tail_q = 3,
       .tail_k = 2,
       .spare = 70,
       .layouts = MIXED},
      {.why = "head by head in memory",
       .sequences = {{8, 14}, {15, 3}},
       .heads = 3,
       .tail_q = 2,
       .tail_k = 1,
       .layouts = MIXED_OTHERWISE},
      {.why = "scale 0.3 given", .sequences = {{9, 12}, {14, 6}}, .width = 32, .causal = true, .scale = 0.3f},
      {.why = "a scale below 0", .sequences = {{5, 12}, {10, 6}}, .scale = -0.4f},
      {.why = "a long one among short ones", .sequences = {{1, 1}, {66, 67}, {2, 3}, {3, 65}, {65, 2}}, .causal = true},
      {.why = "one token each", .sequences = {{1, 1}, {1, 1}, {1, 1}, {1, 1}, {1, 1}, {1, 1}}, .heads = 2},
      {.why = "width 64", .sequences = {{17, 5}, {6, 20}}, .width = 64, .causal = true},
      {.why = "width 128", .sequences = {{4, 7}, {9, 3}}, .width = 128},
  };
}

// Their numbers on the GPU; on the CPU they are 100 higher. The gradients of case n are case n + 50 for Recognise.
const std::vector<Batch>& batches() {
  static const std::vector<Batch> numbered = [] {
    std::vector<Batch> all = listed();
    for (std::size_t i = 0; i < all.size(); ++i) {
      all[i].number = static_cast<int>(i) + 1;
      for (std::size_t b = 0; b < all[i].sequences.size(); ++b) {
        all[i].sequences[b].seed = 20 * all[i].number + static_cast<int>(b);
      }
    }
    return all;
  }();
  return numbered;
}

constexpr int GRADIENTS = 50, ON_THE_CPU = 100, PADDED = 200, PACKED = 300;

void expect_all_batches(Where where) {
  for (const Batch& batch : batches()) {
    run_case(batch.number + (where == Where::host ? ON_THE_CPU : 0), batch.text(), [&] { expect_right(where, batch); });
  }
}

// ---- Tensors with padding -------------------------------------------------------------------------------------------

const std::vector<AttentionCase>& padded() {
  static const std::vector<AttentionCase> numbered = [] {
    std::vector<AttentionCase> all;
    const auto add = [&](const char* why, Masking masking, Index queries, Index keys, Index heads, Index width,
                         bool causal) {
      all.push_back({.why = why,
                     .batch = 3,
                     .heads = heads,
                     .queries = queries,
                     .keys = keys,
                     .width = width,
                     .value_width = width,
                     .causal = causal,
                     .masking = masking,
                     .gap = 8,
                     .number = PADDED + 1 + static_cast<int>(all.size())});
    };
    add("no mask", Masking::none, 9, 9, 2, 16, false);
    add("no mask and more keys, causal", Masking::none, 6, 11, 1, 32, true);
    add("a mask that forbids nothing, causal", Masking::padding_none, 8, 8, 2, 16, true);
    add("padding on the right", Masking::padding_right, 11, 11, 2, 16, false);
    add("padding on the right, causal", Masking::padding_right, 12, 12, 3, 16, true);
    add("padding on the left, causal", Masking::padding_left, 12, 12, 2, 16, true);
    add("padding in between", Masking::padding_scattered, 20, 20, 2, 16, false);
    add("padding in between, causal", Masking::padding_scattered, 21, 21, 1, 64, true);
    add("an item of padding", Masking::padding_whole_item, 9, 9, 2, 16, false);
    return all;
  }();
  return numbered;
}

Tensor<float, 3> attend(const AttentionCase& c, const AttentionInputs& in) {
  const auto function = c.causal ? flash_causal : flash_bidirectional;
  return function(in.query.model(), in.key.model(), in.value.model(), c.heads, in.padding);
}

bool is_token(const AttentionInputs& in, Index b, Index s) { return !in.padding || (*in.padding)(b, s); }

// By the reference, in which padding has 0 as well.
Expected expected_of(const AttentionCase& c, const AttentionInputs& in) {
  Expected want = expected(c, in);
  for (Index b = 0; b < c.batch; ++b)
    for (Index h = 0; h < c.heads; ++h)
      for (Index s = 0; s < c.queries; ++s) {
        if (is_token(in, b, s)) continue;
        const auto begin = want.output.values.begin() + ((b * c.heads + h) * c.queries + s) * c.width;
        std::fill(begin, begin + c.width, 0.0);
      }
  return want;
}

// What padding holds in q, k and v.
void set_padding(AttentionInputs& in, float value) {
  for (TokenTensor* tensor : {&in.query, &in.key, &in.value}) {
    const View<float, 3> model = tensor->model();
    for (Index b = 0; b < model.size(0); ++b)
      for (Index s = 0; s < model.size(1); ++s)
        for (Index e = 0; e < model.size(2) && !is_token(in, b, s); ++e) model(b, s, e) = value;
  }
}

// ---- Masks and their packings ---------------------------------------------------------------------------------------

BoolMatrix mask_of(const std::vector<std::string>& rows) {
  BoolMatrix mask(static_cast<Index>(rows.size()), rows.empty() ? 0 : static_cast<Index>(rows[0].size()));
  for (std::size_t b = 0; b < rows.size(); ++b)
    for (std::size_t s = 0; s < rows[b].size(); ++s)
      mask(static_cast<Index>(b), static_cast<Index>(s)) = rows[b][s] == '#';
  return mask;
}

// '#' is a token.
const std::vector<std::vector<std::string>>& masks() {
  static const std::vector<std::vector<std::string>> all{
      {"##..", "....", "#.##"},
      {"###", "###"},
      {"..##", ".###", "...#"},
      {".#.#.", "#...#", "..#.."},
      {"....", "####", ".##."},
      {"#"},
      {".", "."},
      {"#.......", "########"},
      {"####", "####", "...."},
  };
  return all;
}

std::string text_of(const std::vector<std::string>& rows) {
  std::string text;
  for (const std::string& row : rows) text += ' ' + row;
  return rows.empty() ? "a mask without items" : "the mask" + text + ", # being a token";
}

Array array_of(const Packing& packing) {
  Array array{{}, {}};
  for (const Index place : packing.places) array.values.push_back(static_cast<double>(place));
  for (const std::int32_t entry : packing.cu_seqlens) array.values.push_back(entry);
  array.values.push_back(static_cast<double>(packing.max_seqlen));
  array.shape = {static_cast<Index>(array.count())};
  return array;
}

bool expect_packing(const std::vector<std::string>& rows, const BoolMatrix& mask) {
  const Packing got = packing_of(mask);
  std::vector<Index> places, entries{0};
  Index longest = 0;
  for (std::size_t b = 0; b < rows.size(); ++b) {
    for (std::size_t s = 0; s < rows[b].size(); ++s) {
      if (rows[b][s] == '#') places.push_back(static_cast<Index>(b * rows[0].size() + s));
    }
    longest = std::max<Index>(longest, std::count(rows[b].begin(), rows[b].end(), '#'));
    entries.push_back(static_cast<Index>(places.size()));
  }
  const std::string of = ", for " + text_of(rows);
  const bool entries_right = std::equal(entries.begin(), entries.end(), got.cu_seqlens.begin(), got.cu_seqlens.end());
  return expect(entries_right, "cu_seqlens", "got " + to_text(got.cu_seqlens) + ", want " + to_text(entries) + of) &&
         expect(got.places == places, "places", "got " + to_text(got.places) + ", want " + to_text(places) + of) &&
         expect(got.max_seqlen == longest, "max_seqlen",
                "got " + std::to_string(got.max_seqlen) + ", want " + std::to_string(longest) + of);
}

// [B, S, E] whose element says where it is; behind every token and every item lies what is nobody's.
struct Model {
  explicit Model(const Shape<3>& shape)
      : memory({shape[0], shape[1] + 1, 2 * shape[2]}), view(memory.data(), shape, memory.view().strides()) {}
  Tensor<float, 3> memory;
  View<float, 3> view;
};

Model model_of(const Shape<3>& shape) {
  Model model(shape);
  for (Index b = 0; b < shape[0]; ++b)
    for (Index s = 0; s < shape[1]; ++s)
      for (Index e = 0; e < shape[2]; ++e) model.view(b, s, e) = static_cast<float>(100 * b + 10 * s + e + 1);
  return model;
}

// ---- Recognition ----------------------------------------------------------------------------------------------------

// Rows of tokens that belong to nobody are left out: nothing is asked of them here.
std::vector<Array> parts(const Batch& batch, const Array& all, Side side) {
  std::vector<Array> result;
  for (std::size_t b = 0; b < batch.sequences.size(); ++b) result.push_back(part(all, batch, b, side));
  return result;
}

template <typename... Lists>
std::vector<Array> joined(const Lists&... lists) {
  std::vector<Array> all;
  (all.insert(all.end(), lists.begin(), lists.end()), ...);
  return all;
}

std::vector<Array> outputs_of(int number) {
  if (number > PACKED) {
    const Packing packing = packing_of(mask_of(masks().at(static_cast<std::size_t>(number - PACKED) - 1)));
    return {array_of(packing)};
  }
  if (number > PADDED) {
    const AttentionCase& c = padded().at(static_cast<std::size_t>(number - PADDED) - 1);
    AttentionInputs in = make_inputs(c);
    std::vector<Array> result;
    run_unwatched([&] { result.push_back(to_array(attend(c, in))); });
    return result;
  }
  const Where where = number > ON_THE_CPU ? Where::host : Where::gpu;
  const int rest = number % ON_THE_CPU;
  const Batch& batch = batches().at(static_cast<std::size_t>(rest % GRADIENTS) - 1);
  const Inputs in = inputs_of(batch);
  if (rest < GRADIENTS) {
    const Answer got = forward(where, batch, in, /*judge=*/false);
    return joined(parts(batch, got.output, Side::queries), parts(batch, got.lse, Side::queries));
  }
  const Gradients got = backward(where, batch, in, /*deterministic=*/true, /*judge=*/false);
  return joined(parts(batch, got.query, Side::queries), parts(batch, got.key, Side::keys),
                parts(batch, got.value, Side::keys));
}

std::vector<int> all_numbers() {
  std::vector<int> numbers;
  for (const int base : {0, GRADIENTS, ON_THE_CPU, ON_THE_CPU + GRADIENTS}) {
    for (const Batch& batch : batches()) numbers.push_back(base + batch.number);
  }
  for (const AttentionCase& c : padded()) numbers.push_back(c.number);
  for (std::size_t i = 0; i < masks().size(); ++i) numbers.push_back(PACKED + 1 + static_cast<int>(i));
  return numbers;
}

// Numbers are judged, and recognised, in the fast executable.
const Recognise recognise_varlen(all_numbers(), [](int number) -> std::vector<Array> {
  if (kernels_are_checked()) throw NotImplemented(__FILE__);
  return outputs_of(number);
});

// ---- Probes, on the CPU and on the GPU. Each begins with its question -----------------------------------------------

Batch with_seeds(Batch batch, int first) {
  for (Sequence& s : batch.sequences) s.seed = first++;
  return batch;
}

void expect_single_tokens(Where where) {
  ask("Five sequences of one token. Which key may the query of sequence 3 attend to, and what is its weight?");
  const Batch batch = with_seeds({.sequences = {{1, 1}, {1, 1}, {1, 1}, {1, 1}, {1, 1}}, .heads = 2}, 501);
  Inputs in = inputs_of(batch);
  for (std::size_t b = 0; b < 5; ++b) {
    const auto place = static_cast<double>(b);
    fill(in.value, batch, b, Side::keys, [=](Index h, Index, Index d) {
      return 100.0 * place + 20.0 * static_cast<double>(h) + static_cast<double>(d);
    });
    fill(in.d_output, batch, b, Side::queries, [=](Index h, Index, Index d) {
      return static_cast<double>(d) - 100.0 * place - 20.0 * static_cast<double>(h);
    });
  }
  const Array value = to_array(in.value);
  if (!expect_close("output", forward(where, batch, in).output, value, {1e-6, value}, QUERIES)) return;
  const Array d_output = to_array(in.d_output);
  Array size = d_output;
  for (double& number : size.values) number = std::abs(number);
  expect_close("d_value", backward(where, batch, in).value, d_output, {1e-5, size}, KEYS);
}

// The batch of the README: two tokens, none, three; one channel.
void expect_page(Where where) {
  ask("The README has every number of this batch. Is it the first item that is off, or only the ones after it?");
  Batch batch = with_seeds({.sequences = {{2, 2}, {0, 0}, {3, 3}}, .scale = 1.0f}, 506);
  Inputs in = inputs_of(batch);
  const auto set = [](Tensor<float, 4>& tensor, const std::array<double, 5>& numbers) {
    std::fill_n(tensor.data(), tensor.count(), 0.0f);
    for (Index t = 0; t < 5; ++t) tensor(0, 0, t, 0) = static_cast<float>(numbers[static_cast<std::size_t>(t)]);
  };
  set(in.query, {std::log(3.0), 0.0, 0.0, 0.0, 0.0});
  set(in.key, {0.0, 1.0, 0.0, 0.0, 0.0});
  set(in.value, {1.0, 5.0, 2.0, 4.0, 9.0});
  set(in.d_output, {1.0, 1.0, 1.0, 1.0, 1.0});
  for (const bool causal : {false, true}) {
    batch.causal = causal;
    const auto want = [](const std::array<double, 5>& numbers) {
      Array array{{1, 1, 5, 16}, std::vector<double>(80, 0.0)};
      for (std::size_t t = 0; t < 5; ++t) array.values[16 * t] = numbers[t];
      return array;
    };
    const Array output = want(causal ? std::array<double, 5>{1, 3, 2, 3, 5} : std::array<double, 5>{4, 3, 5, 5, 5});
    const Array d_value = want(causal ? std::array<double, 5>{1.5, 0.5, 11.0 / 6, 5.0 / 6, 1.0 / 3}
                                      : std::array<double, 5>{0.75, 1.25, 1, 1, 1});
    const std::string name = causal ? ", causal" : "";
    if (!expect_close("output" + name, forward(where, batch, in).output, output, {1e-5, output}, QUERIES)) return;
    if (!expect_close("d_value" + name, backward(where, batch, in).value, d_value, {1e-5, d_value}, KEYS)) return;
  }
}

// Row s of sequence b: one of the channels 0 to 7 says which place it has in a group of 8, one of 8 to 15 in which
// sequence it is.
double code(std::size_t b, Index s, Index d) { return d == s % 8 || d == 8 + static_cast<Index>(b % 8) ? 1.0 : 0.0; }

// With queries of 0 a query that sees n keys gives each of them 1/n: its output is the mean of their codes, and dV of a
// key with equal values lists who looked.
bool expect_even_shares(Where where, const Batch& batch) {
  Inputs in = inputs_of(batch);
  Inputs back = inputs_of(batch);
  for (std::size_t b = 0; b < batch.sequences.size(); ++b) {
    for (Inputs* both : {&in, &back})
      fill(both->query, batch, b, Side::queries, [](Index, Index, Index) { return 0.0; });
    fill(in.value, batch, b, Side::keys, [b](Index, Index s, Index d) { return code(b, s, d); });
    fill(back.value, batch, b, Side::keys, [](Index, Index, Index) { return 1.0; });
    fill(back.d_output, batch, b, Side::queries, [b](Index, Index s, Index d) { return code(b, s, d); });
  }
  const Answer got = forward(where, batch, in);
  const Gradients gradients = backward(where, batch, back);
  for (std::size_t b = 0; b < batch.sequences.size(); ++b) {
    const auto [queries, keys, seed] = batch.sequences[b];
    Array output{{1, 1, queries, 16}, {}}, lse{{1, 1, queries}, {}};
    Array d_value{{1, 1, keys, 16}, std::vector<double>(static_cast<std::size_t>(16 * keys), 0.0)};
    for (Index i = 0; i < queries; ++i) {
      const Index seen = keys_seen(batch.causal, i, queries, keys);
      const double share = 1.0 / static_cast<double>(seen);
      std::array<double, 16> row{};
      for (Index j = 0; j < seen; ++j)
        for (Index d = 0; d < 16; ++d) {
          row[static_cast<std::size_t>(d)] += share * code(b, j, d);
          d_value.values[static_cast<std::size_t>(16 * j + d)] += share * code(b, i, d);
        }
      output.values.insert(output.values.end(), row.begin(), row.end());
      lse.values.push_back(std::log(static_cast<double>(seen)));
    }
    const bool counted = expect_close("lse", part(got.lse, batch, b, Side::queries), lse, lse_bound(lse, 0.0), LSE);
    const bool shared =
        expect_close("output", part(got.output, batch, b, Side::queries), output, fp32_bound(output, 0.0), QUERIES);
    if (!counted || !shared) return not_so(batch, b);
    const bool taken =
        expect_close("d_value", part(gradients.value, batch, b, Side::keys), d_value, fp32_bound(d_value, 0.0), KEYS);
    const bool still = expect_all("d_query", part(gradients.query, batch, b, Side::queries), 0.0, 1e-4, QUERIES,
                                  "all values are alike, so d_query should be 0") &&
                       expect_all("d_key", part(gradients.key, batch, b, Side::keys), 0.0, 0.0, KEYS,
                                  "all queries are 0, so d_key should be 0");
    if (!taken || !still) return not_so(batch, b);
  }
  return true;
}

void expect_own_keys(Where where) {
  ask("All scores are 0. exp(lse) counts the keys that a query attended to. How many keys has its sequence, and whose "
      "are the others?");
  for (const auto& sequences : std::vector<std::vector<Sequence>>{{{3, 2}, {2, 5}, {4, 3}},
                                                                  {{16, 16}, {1, 64}, {65, 17}, {33, 1}, {2, 65}},
                                                                  {{1, 31}, {1, 33}, {17, 2}, {64, 1}}}) {
    if (!expect_even_shares(where, with_seeds({.sequences = sequences}, 510))) return;
  }
}

void expect_own_diagonals(Where where) {
  ask("Sequence 1 has 3 queries and 5 keys, sequence 2 has 5 and 3. At which key of its own does the last query of "
      "each stand, and how far is that from the last key of the whole batch?");
  for (const auto& sequences : std::vector<std::vector<Sequence>>{{{4, 4}, {3, 5}, {5, 3}},
                                                                  {{16, 20}, {20, 16}, {1, 9}, {65, 66}, {9, 1}},
                                                                  {{2, 70}, {33, 30}, {30, 33}},
                                                                  {{40, 40}, {17, 17}, {1, 1}, {23, 23}}}) {
    if (!expect_even_shares(where, with_seeds({.sequences = sequences, .causal = true}, 520))) return;
  }
}

void expect_empty_ones(Where where) {
  ask("A sequence may have queries and no keys, or keys and no queries. What is the output of the ones, what is the "
      "gradient of the others, and who writes it when no block has anything to add?");
  const std::vector<std::vector<Sequence>> lists{
      {{0, 4}, {5, 3}},
      {{5, 3}, {0, 4}},
      {{5, 3}, {0, 70}, {70, 0}, {4, 6}},
      {{3, 0}, {5, 3}, {0, 0}, {2, 2}},
      {{0, 0}, {0, 2}, {3, 4}, {3, 0}, {0, 0}},
      {{1, 5}, {0, 3}, {1, 0}, {1, 7}},
      {{4, 0}, {3, 0}},
      {{0, 3}, {0, 66}},
      {{0, 0}, {0, 0}},
      {},
  };
  for (const auto& sequences : lists) {
    for (const bool causal : {false, true}) {
      const Batch batch = with_seeds({.sequences = sequences, .heads = 2, .causal = causal}, 530);
      const Inputs in = inputs_of(batch);
      const Both got = both(where, batch, in);
      for (std::size_t b = 0; b < sequences.size(); ++b) {
        if (sequences[b].keys == 0) {
          const bool zero = expect_all("output", part(got.forward.output, batch, b, Side::queries), 0.0, 0.0, QUERIES,
                                       "there is no key, so the output should be 0") &&
                            expect_all("d_query", part(got.backward.query, batch, b, Side::queries), 0.0, 0.0, QUERIES,
                                       "there is no key, so d_query should be 0");
          const Array lse = part(got.forward.lse, batch, b, Side::queries);
          const bool nothing = std::all_of(lse.values.begin(), lse.values.end(),
                                           [](double x) { return x == -static_cast<double>(INF); });
          if (!expect(nothing, "lse", "is not -inf where there is no key") || !zero) return void(not_so(batch, b));
        }
        if (sequences[b].queries == 0) {
          const bool key = expect_all("d_key", part(got.backward.key, batch, b, Side::keys), 0.0, 0.0, KEYS,
                                      "there is no query, so d_key should be 0");
          if (!expect_all("d_value", part(got.backward.value, batch, b, Side::keys), 0.0, 0.0, KEYS,
                          "there is no query, so d_value should be 0") ||
              !key) {
            return void(not_so(batch, b));
          }
        }
      }
      const Right right = right_of(batch, in);
      if (!expect_forward(got.forward, batch, right) || !expect_backward(got.backward, batch, right)) return;
      if (where == Where::host) continue;  // one way to dQ
      if (!expect_backward(backward(where, batch, in, /*deterministic=*/false), batch, right)) return;
    }
  }
}

void expect_any_order(Where where) {
  ask("Reorder the sequences. Their tokens move in memory. What else may change?");
  for (const bool causal : {false, true}) {
    if (kernels_are_checked() && !causal) continue;
    const std::vector<Sequence> sequences{{7, 12, 541}, {20, 5, 542}, {1, 17, 543}, {0, 3, 544}, {34, 34, 545}};
    const Batch before{.sequences = sequences, .heads = 2, .causal = causal};
    const Both want = both(where, before, inputs_of(before));
    for (const std::array<std::size_t, 5>& order : {std::array<std::size_t, 5>{4, 3, 2, 1, 0}, {2, 4, 0, 1, 3}}) {
      Batch batch = before;
      for (std::size_t b = 0; b < 5; ++b) batch.sequences[b] = sequences[order[b]];
      const Both got = both(where, batch, inputs_of(batch));
      for (std::size_t b = 0; b < 5; ++b) {
        // Tiles may be cut through all tokens, so where they begin in a sequence may change.
        if (!expect_same(got, batch, b, want, before, order[b], "when the sequences were reordered", 1e-5)) return;
      }
    }
  }
}

void expect_no_neighbours(Where where) {
  ask("One sequence becomes NaN from its first to its last token. Its neighbours begin and end in the same tile of "
      "memory as it does. Do they notice?");
  for (const bool causal : {false, true}) {
    const Batch batch = with_seeds({.sequences = {{5, 9}, {12, 7}, {3, 3}, {40, 35}}, .causal = causal}, 550);
    const Both want = both(where, batch, inputs_of(batch));
    const std::array<float, 4> poisons{NOT_A_NUMBER, INF, -3e4f, -INF};
    for (std::size_t bad = 0; bad < 4; ++bad) {
      if (kernels_are_checked() && (bad % 2 == 0) == causal) continue;
      Inputs in = inputs_of(batch);
      const Fill poison = [&](Index, Index, Index) { return static_cast<double>(poisons[bad]); };
      for (Tensor<float, 4>* tensor : {&in.query, &in.d_output}) fill(*tensor, batch, bad, Side::queries, poison);
      for (Tensor<float, 4>* tensor : {&in.key, &in.value}) fill(*tensor, batch, bad, Side::keys, poison);
      const Both got = both(where, batch, in);
      for (std::size_t b = 0; b < 4; ++b) {
        if (b == bad) continue;
        if (!expect_same(got, batch, b, want, batch, b,
                         "when sequence " + std::to_string(bad) + " became " + std::to_string(poisons[bad])))
          return;
      }
    }
  }
}

void expect_tail_left_alone(Where where) {
  ask("cu_seqlens ends at token 12 and the tensor has 15. Whose are the last three? What do they hold after your call, "
      "and what before?");
  for (const Layouts& layouts : {TOKENS, Layouts{}, MIXED}) {
    if (kernels_are_checked() && layouts.query != Layout::heads) continue;
    const Batch batch =
        with_seeds({.sequences = {{5, 8}, {7, 4}}, .heads = 2, .causal = true, .layouts = layouts}, 560);
    const Both want = both(where, batch, inputs_of(batch));
    for (const auto& [tail_q, tail_k] : {std::array<Index, 2>{3, 3}, {1, 70}, {70, 0}, {0, 1}}) {
      Batch longer = batch;
      longer.tail_q = tail_q;
      longer.tail_k = tail_k;
      const Both got = both(where, longer, inputs_of(longer));
      for (std::size_t b = 0; b < 2; ++b) {
        if (!expect_same(got, longer, b, want, batch, b,
                         "when " + std::to_string(tail_q) + " queries and " + std::to_string(tail_k) +
                             " keys of nobody came after the last sequence"))
          return;
      }
    }
  }
  Batch none{.sequences = {}, .tail_q = 4, .tail_k = 5};
  both(where, none, inputs_of(none));  // all tokens are nobody's
}

void expect_generous_max(Where where) {
  ask("max_seqlen only says that no sequence is longer. What do you use it for, and what must you use instead to know "
      "where a sequence ends?");
  for (const Index spare : {1, 15, 63, 200}) {
    for (const bool causal : {false, true}) {
      if (kernels_are_checked() && causal != (spare == 63)) continue;
      const Batch batch = with_seeds({.sequences = {{5, 9}, {17, 16}, {2, 3}}, .causal = causal, .spare = spare}, 570);
      if (!expect_right(where, batch)) return;
    }
  }
}

// ---- Bad arguments --------------------------------------------------------------------------------------------------

// Eight tokens of one head, all numbers 0.5.
class Tokens {
 public:
  Tokens(Where where, const char* name) : host_(8 * 16, 0.5f) {
    if (where == Where::gpu) device_.emplace(name, std::span<const float>(host_));
  }
  float* data() { return device_ ? device_->data() : host_.data(); }
  View<float, 4> view(const Shape<4>& shape = {1, 1, 8, 16}) { return {data(), shape}; }
  View<float, 3> rows(const Shape<3>& shape = {1, 1, 8}) { return {data(), shape}; }

 private:
  std::vector<float> host_;
  std::optional<DeviceBuffer<float>> device_;
};

void expect_bad_arguments_refused(Where where) {
  const bool on_host = where == Where::host;
  Tokens inputs(where, "inputs"), lse_in(where, "lse"), output(where, "output"), lse(where, "lse");
  Tokens d_q(where, "d_query"), d_k(where, "d_key"), d_v(where, "d_value"), delta(where, "delta"), sums(where, "sums");
  const FlashForward<float> good_forward{
      .query = inputs.view(), .key = inputs.view(), .value = inputs.view(), .output = output.view(), .lse = lse.rows()};
  const FlashBackward<float> good_backward{.query = inputs.view(),
                                           .key = inputs.view(),
                                           .value = inputs.view(),
                                           .output = inputs.view(),
                                           .lse = lse_in.rows(),
                                           .d_output = inputs.view(),
                                           .d_query = d_q.view(),
                                           .d_key = d_k.view(),
                                           .d_value = d_v.view(),
                                           .delta = delta.rows(),
                                           .d_query_sum = sums.view()};
  const Entries two(where, "cu_seqlens_q", {0, 2, 6}), others(where, "cu_seqlens_k", {0, 3, 7});
  const Sequences good{two.view(), others.view(), 4, 4};
  const auto call_forward = [&](const FlashForward<float>& p, const Sequences& s) {
    run_kernels([&] { on_host ? tiled_varlen_forward(p, s) : flash_varlen_forward(p, s); });
  };
  const auto call_backward = [&](const FlashBackward<float>& p, const Sequences& s) {
    run_kernels([&] { on_host ? tiled_varlen_backward(p, s) : flash_varlen_backward(p, s); });
  };
  call_forward(good_forward, good);
  call_backward(good_backward, good);

  const auto rejected = [&](std::string_view what, std::string_view argument, const auto& change) {
    Sequences bad = good;
    change(bad);
    expect_rejected(what, argument, [&] { call_forward(good_forward, bad); });
    expect_rejected(what, argument, [&] { call_backward(good_backward, bad); });
  };
  const auto rejected_problem = [&](std::string_view what, std::string_view argument, const auto& change) {
    FlashForward<float> bad_forward = good_forward;
    FlashBackward<float> bad_backward = good_backward;
    change(bad_forward);
    change(bad_backward);
    expect_rejected(what, argument, [&] { call_forward(bad_forward, good); });
    expect_rejected(what, argument, [&] { call_backward(bad_backward, good); });
  };
  const Entries none(where, "none", {}), one(where, "one", {0, 6});
  rejected("cu_seqlens_q without an entry", "cu_seqlens_q", [&](Sequences& s) { s.cu_seqlens_q = none.view(); });
  rejected("another number of sequences for the keys", "cu_seqlens_k",
           [&](Sequences& s) { s.cu_seqlens_k = one.view(); });
  rejected("entries that lie apart", "cu_seqlens_q", [&](Sequences& s) {
    s.cu_seqlens_q = View<const std::int32_t, 1>(two.view().data(), {2}, {2});
    s.cu_seqlens_k = one.view();
  });
  rejected("a negative max_seqlen_q", "max_seqlen_q", [](Sequences& s) { s.max_seqlen_q = -1; });
  rejected("a max_seqlen_k beyond any tensor", "max_seqlen_k", [](Sequences& s) { s.max_seqlen_k = Index{1} << 40; });
  rejected_problem("a scale that is NaN", "scale", [](auto& p) { p.scale = NOT_A_NUMBER; });
  rejected_problem("a value too few", "value", [&](auto& p) { p.value = inputs.view({1, 1, 7, 16}); });
  rejected_problem("keys of other heads", "key", [&](auto& p) { p.key = inputs.view({1, 2, 4, 16}); });
  rejected_problem("an output too short", "output", [&](auto& p) { p.output = output.view({1, 1, 7, 16}); });
  rejected_problem("an lse of other heads", "lse", [&](auto& p) { p.lse = lse.rows({1, 2, 4}); });
  rejected_problem("keys between two multiples of 16 bytes", "key", [&](auto& p) {
    p.key = View<float, 4>(inputs.data() + 1, {1, 1, 4, 16});
    p.value = inputs.view({1, 1, 4, 16});
  });
  const auto two_items = [&](auto& p) {
    p.query = p.key = p.value = inputs.view({2, 1, 4, 16});
    p.output = output.view({2, 1, 4, 16});
    p.lse = lse.rows({2, 1, 4});
    if constexpr (requires { p.d_key; }) {
      p.d_output = inputs.view({2, 1, 4, 16});
      p.d_query = d_q.view({2, 1, 4, 16});
      p.d_key = d_k.view({2, 1, 4, 16});
      p.d_value = d_v.view({2, 1, 4, 16});
      p.delta = delta.rows({2, 1, 4});
      p.d_query_sum = sums.view({2, 1, 4, 16});
    }
  };
  rejected_problem("two batch items", "query", two_items);
  FlashBackward<float> bad = good_backward;
  bad.d_key = d_k.view({1, 1, 7, 16});
  expect_rejected("a d_key too short", "d_key", [&] { call_backward(bad, good); });
  if (!on_host) return;

  // On the host the entries can be read.
  const Entries late(where, "", {1, 2, 6}), back(where, "", {0, 5, 4}), beyond(where, "", {0, 6, 9});
  for (const bool of_keys : {false, true}) {
    const std::string name = of_keys ? "cu_seqlens_k" : "cu_seqlens_q",
                      most = of_keys ? "max_seqlen_k" : "max_seqlen_q";
    const auto set = [&](Sequences& s, const Entries& entries) {
      (of_keys ? s.cu_seqlens_k : s.cu_seqlens_q) = entries.view();
      s.max_seqlen_q = s.max_seqlen_k = 8;
    };
    rejected("entries that begin at 1", name, [&](Sequences& s) { set(s, late); });
    rejected("a sequence that ends before it begins", name, [&](Sequences& s) { set(s, back); });
    rejected("a sequence that ends behind the last token", name, [&](Sequences& s) { set(s, beyond); });
    rejected("a max_seqlen below the longest", most,
             [&](Sequences& s) { (of_keys ? s.max_seqlen_k : s.max_seqlen_q) = 3; });
  }
}

// ---- What only the virtual GPU can tell, and what only a real one has the time for ----------------------------------

// A short call, so that nobody takes an unfilled stub for a skipped test.
bool needs_a_gpu() {
#if KATA_REAL_GPU
  return false;
#else
  if (!expect_right(Where::gpu, with_seeds({.sequences = {{1, 1}}}, 590))) return true;
  skip("needs a GPU: too long for the virtual one");
  return true;
#endif
}

}  // namespace

TEST_SUITE("phase4.01_varlen") {
  // ---- Packing

  TEST_CASE("a packing lists the tokens of each item") {
    ask("How many entries describe 3 sequences? Where does the first begin, and where the one after an empty one?");
    for (std::size_t i = 0; i < masks().size(); ++i) {
      run_case(PACKED + 1 + static_cast<int>(i), text_of(masks()[i]),
               [&] { expect_packing(masks()[i], mask_of(masks()[i])); });
    }
    expect_packing({}, BoolMatrix(0, 4));
    expect_packing({"", "", ""}, BoolMatrix(3, 0));
  }

  TEST_CASE("packing keeps the tokens and never looks at padding") {
    ask("Which row of [B * S, E] is packed token 3, and which of the mask's trues is it?");
    for (const auto& rows : masks()) {
      const BoolMatrix mask = mask_of(rows);
      const Packing packing = packing_of(mask);
      Model x = model_of({mask.rows(), mask.cols(), 3});
      Array want{{mask.count(), 3}, {}};
      for (Index b = 0; b < mask.rows(); ++b)
        for (Index s = 0; s < mask.cols(); ++s)
          for (Index e = 0; e < 3; ++e) {
            if (mask(b, s)) {
              want.values.push_back(static_cast<double>(x.view(b, s, e)));
            } else {
              x.view(b, s, e) = NOT_A_NUMBER;
            }
          }
      if (!expect_same_bits("tokens", to_array(pack(x.view, packing)), want, {"token", "channel"}, "on the way"))
        return;
    }
  }

  TEST_CASE("what was packed comes back to its place and padding is 0") {
    ask("Token 3 knows the place it came from. Who writes the places that no token came from?");
    for (const auto& rows : masks()) {
      const BoolMatrix mask = mask_of(rows);
      const Packing packing = packing_of(mask);
      const Model x = model_of({mask.rows(), mask.cols(), 3});
      const Tensor<float, 2> tokens = pack(x.view, packing);
      const Index count = tokens.size(0);
      Tensor<float, 2> apart({count, 8});  // the same, three columns of eight
      for (Index t = 0; t < count; ++t)
        for (Index e = 0; e < 3; ++e) apart(t, e) = tokens(t, e);
      const View<const float, 2> view(apart.data(), {count, 3}, {8, 1});
      Array want{{mask.rows(), mask.cols(), 3}, {}};
      for (Index b = 0; b < mask.rows(); ++b)
        for (Index s = 0; s < mask.cols(); ++s)
          for (Index e = 0; e < 3; ++e) want.values.push_back(mask(b, s) ? static_cast<double>(x.view(b, s, e)) : 0.0);
      if (!expect_same_bits("x", to_array(unpack(view, packing, mask.cols())), want, MODEL, "on the way")) return;
    }
  }

  TEST_CASE("pack and unpack say what is wrong with bad arguments") {
    const Packing good = packing_of(mask_of({"##.", "..#"}));
    const Tensor<float, 3> x({2, 3, 4}), other({3, 3, 4}), shorter({2, 2, 4});
    const Tensor<float, 2> tokens = pack(x, good);
    unpack(tokens, good, 3);
    expect_rejected("another batch", "packing", [&] { pack(other, good); });
    expect_rejected("an x too short for the last place", "packing", [&] { pack(shorter, good); });
    Packing bad = good;
    bad.places[0] = -1;
    expect_rejected("a place before the first", "packing", [&] { pack(x, bad); });
    expect_rejected("tokens too few", "packing", [&] { unpack(Tensor<float, 2>({2, 4}), good, 3); });
    expect_rejected("a length too short for the last place", "packing", [&] { unpack(tokens, good, 2); });
    expect_rejected("a negative length", "length", [&] { unpack(tokens, good, -1); });
    expect_rejected("a packing without entries", "packing",
                    [&] { unpack(tokens, Packing{.places = good.places, .cu_seqlens = {}}, 3); });
  }

  // ---- On the CPU

  TEST_CASE("one token in each sequence takes its own value on the CPU") { expect_single_tokens(Where::host); }
  TEST_CASE("the batch on the page on the CPU") { expect_page(Where::host); }
  TEST_CASE("a query attends to the keys of its own sequence on the CPU") { expect_own_keys(Where::host); }
  TEST_CASE("under a causal mask each sequence has a diagonal of its own on the CPU") {
    expect_own_diagonals(Where::host);
  }
  TEST_CASE("empty sequences get zeros and disturb nobody on the CPU") { expect_empty_ones(Where::host); }
  TEST_CASE("the order of the sequences changes nothing about them on the CPU") { expect_any_order(Where::host); }
  TEST_CASE("what one sequence holds reaches no other on the CPU") { expect_no_neighbours(Where::host); }
  TEST_CASE("tokens after the last sequence are left alone on the CPU") { expect_tail_left_alone(Where::host); }
  TEST_CASE("agrees with the float64 reference on the CPU") { expect_all_batches(Where::host); }
  TEST_CASE("says what is wrong with bad arguments on the CPU") { expect_bad_arguments_refused(Where::host); }

  // ---- On the GPU

  TEST_CASE("one token in each sequence takes its own value") { expect_single_tokens(Where::gpu); }
  TEST_CASE("the batch on the page") { expect_page(Where::gpu); }
  TEST_CASE("a query attends to the keys of its own sequence") { expect_own_keys(Where::gpu); }
  TEST_CASE("under a causal mask each sequence has a diagonal of its own") { expect_own_diagonals(Where::gpu); }
  TEST_CASE("empty sequences get zeros and disturb nobody") { expect_empty_ones(Where::gpu); }
  TEST_CASE("the order of the sequences changes nothing about them") { expect_any_order(Where::gpu); }
  TEST_CASE("what one sequence holds reaches no other") { expect_no_neighbours(Where::gpu); }
  TEST_CASE("tokens after the last sequence are left alone") { expect_tail_left_alone(Where::gpu); }
  TEST_CASE("max_seqlen may be larger than the longest sequence") { expect_generous_max(Where::gpu); }

  TEST_CASE("the order in which blocks run changes no bit") {
    ask("A block of sequence 0 and one of sequence 1 run at the same time. Do they write any number both? And with "
        "deterministic, in which order are the shares of one sum added up?");
    const Batch batch = with_seeds({.sequences = {{40, 30}, {7, 7}, {0, 5}, {70, 70}}, .causal = true}, 600);
    const Inputs in = inputs_of(batch);
    const Both want = both(Where::gpu, batch, in);
    for (const std::uint64_t seed : {1u, 2u}) {
      const AnotherOrder order(seed);
      const Both got = both(Where::gpu, batch, in);
      for (std::size_t b = 0; b < 4; ++b) {
        if (!expect_same(got, batch, b, want, batch, b, "when blocks and threads ran in another order")) return;
      }
      if (kernels_are_checked()) break;  // who is watched races in any order
    }
  }

  TEST_CASE("one launch serves all sequences") {
    ask("A launch takes some microseconds, however little there is to do. How many do a thousand sequences take?");
    const Batch one = with_seeds({.sequences = {{6, 6}}}, 610);
    const Batch six = with_seeds({.sequences = {{1, 1}, {6, 6}, {2, 3}, {4, 1}, {5, 5}, {3, 3}}}, 610);
    const Both of_one = both(Where::gpu, one, inputs_of(one)), of_six = both(Where::gpu, six, inputs_of(six));
    if (!kernels_are_judged()) return;
    const auto launches = [](const std::vector<KernelProfile>& profiles) {
      std::int64_t sum = 0;
      for (const KernelProfile& profile : profiles) sum += profile.launches;
      return sum;
    };
    const auto expect_no_more = [&](const char* name, const auto& few, const auto& many) {
      expect(launches(few) > 0 && launches(many) <= launches(few), name,
             "launches grow with the number of sequences: " + std::to_string(launches(few)) + " for one sequence, " +
                 std::to_string(launches(many)) + " for six");
    };
    expect_no_more("forward", of_one.forward.profiles, of_six.forward.profiles);
    expect_no_more("backward", of_one.backward.profiles, of_six.backward.profiles);
  }

  TEST_CASE("nothing is loaded for padding that is not there") {
    ask("max_seqlen is 256, and 20 of the sequences have one token. For which tiles of keys does a block of those read "
        "memory, and for whom?");
    if (needs_a_check()) return;
    const Index length = kernels_are_checked() ? 256 : 1;  // otherwise nobody counts
    std::vector<Sequence> sequences{{1, length}, {length, 1}};
    const Batch alone = with_seeds({.sequences = sequences}, 620);
    sequences.resize(22, {1, 1});
    const Batch batch = with_seeds({.sequences = sequences}, 620);
    const Both one = both(Where::gpu, alone, inputs_of(alone)), all = both(Where::gpu, batch, inputs_of(batch));
    if (!kernels_are_judged()) return;
    const auto expect_few = [](const std::string& pass, const auto& some, const auto& more, const char* name) {
      const Index before = bytes_loaded(some, name), now = bytes_loaded(more, name);
      const Index most = before + 20 * 128 * 16 * static_cast<Index>(sizeof(float));
      expect(now <= most, name,
             "padding loaded: " + pass + ", " + std::to_string(before) + " bytes for two sequences, " +
                 std::to_string(now) + " with 20 sequences of one token beside them; want at most " +
                 std::to_string(most) + ", a tile of 128 rows for each");
    };
    for (const char* name : {"query", "key", "value"}) {
      expect_few("forward", one.forward.profiles, all.forward.profiles, name);
      expect_few("backward", one.backward.profiles, all.backward.profiles, name);
    }
    expect_few("backward", one.backward.profiles, all.backward.profiles, "d_output");
  }

  TEST_CASE("agrees with the float64 reference") { expect_all_batches(Where::gpu); }

  TEST_CASE("agrees with the float64 reference for long sequences") {
    if (needs_a_gpu()) return;
    std::vector<Sequence> sequences;
    for (int b = 0; b < 24; ++b) {
      const Index queries = (b * 131 + 17) % 400, keys = b % 3 == 0 ? queries : (b * 97 + 5) % 450;
      sequences.push_back({queries, keys, 700 + b});
    }
    for (const Index width : {64, 128}) {
      for (const bool causal : {false, true}) {
        if (!expect_right(Where::gpu, {.sequences = sequences, .heads = 2, .width = width, .causal = causal})) return;
      }
    }
  }

  TEST_CASE("serves 70000 sequences") {
    ask("How many blocks may a grid have in x, and how many in y and z?");
    if (needs_a_gpu()) return;
    constexpr Index COUNT = 70000;
    std::vector<float> numbers(COUNT * 16);
    for (Index t = 0; t < COUNT; ++t)
      for (Index d = 0; d < 16; ++d)
        numbers[static_cast<std::size_t>(16 * t + d)] = static_cast<float>((t + 31 * d) % 1009);
    std::vector<std::int32_t> entries(COUNT + 1);
    std::iota(entries.begin(), entries.end(), 0);
    const DeviceBuffer<float> value("value", std::span<const float>(numbers));
    DeviceBuffer<float> output("output", numbers.size()), lse("lse", COUNT);
    const DeviceBuffer<std::int32_t> begin("cu_seqlens", std::span<const std::int32_t>(entries));
    const Shape<4> shape{1, 1, COUNT, 16};
    const View<const float, 4> v(value.data(), shape);
    const View<const std::int32_t, 1> cu_seqlens(begin.data(), {COUNT + 1});
    flash_varlen_forward({v, v, v, View<float, 4>(output.data(), shape), View<float, 3>(lse.data(), {1, 1, COUNT})},
                         {cu_seqlens, cu_seqlens, 1, 1});
    synchronize();
    expect_same_bits("output", to_array(output, shape), to_array(value, shape), QUERIES,
                     "on the way from value, of which each query has one");
  }

  TEST_CASE("says what is wrong with bad arguments") { expect_bad_arguments_refused(Where::gpu); }

  // ---- Tensors with padding

  TEST_CASE("tokens of a padded batch have the attention of phase 1 and padding has 0") {
    ask("Packed, the tokens of an item lie side by side. Which of them does a token attend to, and does it matter "
        "where the padding was?");
    for (const AttentionCase& c : padded()) {
      run_case(c.number, c.text(), [&] {
        const AttentionInputs in = make_inputs(c);
        const std::size_t memory = device_bytes();
        Array got;
        run_kernels([&] { got = to_array(attend(c, in)); });
        const Expected want = expected_of(c, in);
        expect_close("output", got, in_model_layout(want.output), in_model_layout(want.output_bound), MODEL);
        expect(device_bytes() == memory, "memory",
               std::to_string(device_bytes() - memory) + " bytes on the GPU were not given back");
      });
    }
  }

  TEST_CASE("a batch of padding alone gives zeros") {
    ask("No item has a token. How many tokens are packed, and what is unpacked?");
    const Tensor<float, 4> numbers = normal({2, 1, 3, 32}, 630);
    const View<const float, 3> x(numbers.data(), {2, 3, 32});
    for (const auto function : {flash_bidirectional, flash_causal}) {
      Array got;
      run_kernels([&] { got = to_array(function(x, x, x, 2, BoolMatrix::Constant(2, 3, false))); });
      if (!expect_same_bits("output", got, {{2, 3, 32}, std::vector<double>(192, 0.0)}, MODEL,
                            "though nothing is there"))
        return;
      for (const Shape<3>& shape : {Shape<3>{0, 3, 32}, {2, 0, 32}}) {
        const View<const float, 3> none(numbers.data(), shape);
        run_kernels([&] { got = to_array(function(none, none, none, 2, {})); });
        expect(got.shape == std::vector<Index>(shape.begin(), shape.end()), "output",
               "has shape " + to_text(got.shape) + ", want " + to_text(shape));
      }
    }
  }

  TEST_CASE("what padding holds reaches nobody") {
    ask("A padded place holds NaN. Is it ever read?");
    for (const AttentionCase& c : padded()) {
      if (c.masking == Masking::none) continue;
      AttentionInputs in = make_inputs(c);
      Array want, got;
      run_kernels([&] { want = to_array(attend(c, in)); });
      for (const float poison : {NOT_A_NUMBER, -INF}) {
        if (kernels_are_checked() && poison == -INF) continue;
        set_padding(in, poison);
        run_kernels([&] { got = to_array(attend(c, in)); });
        if (expect_same_bits("output", got, want, MODEL, "when padding became " + std::to_string(poison))) continue;
        finding("of", c.text());
        return;
      }
    }
  }

  TEST_CASE("tokens do not notice on which side the padding stands") {
    ask("The same tokens, padded on the left, on the right and in between. What of it is left after packing?");
    const std::vector<std::string> sides[]{{"###....", "#####.."}, {"....###", "..#####"}, {"#.#...#", "##.#.##"}};
    for (const bool causal : {false, true}) {
      std::vector<Array> results;
      for (const std::vector<std::string>& rows : sides) {
        const BoolMatrix mask = mask_of(rows);
        const Tensor<float, 4> tokens = normal({3, 1, 8, 32}, 640);  // q, k, v of the packed tokens
        const Packing packing = packing_of(mask);
        const auto spread = [&](Index which) {
          return unpack(View<const float, 2>(&tokens(which, 0, 0, 0), {8, 32}), packing, 7);
        };
        const Tensor<float, 3> q = spread(0), k = spread(1), v = spread(2);
        run_kernels([&] {
          results.push_back(to_array(pack((causal ? flash_causal : flash_bidirectional)(q, k, v, 2, mask), packing)));
        });
      }
      for (const Array& result : results) {
        if (!expect_same_bits("output", result, results[0], {"token", "channel"},
                              std::string("when the padding moved") + (causal ? ", causal" : "")))
          return;
      }
    }
  }

  TEST_CASE("says what is wrong with bad arguments to padded batches") {
    const Tensor<float, 4> numbers = normal({2, 1, 6, 32}, 650);
    const View<const float, 3> x(numbers.data(), {2, 6, 32}), shorter(numbers.data(), {2, 5, 32}),
        narrow(numbers.data(), {2, 6, 16}), one(numbers.data(), {1, 6, 32});
    const BoolMatrix mask = BoolMatrix::Constant(2, 6, true), wrong = BoolMatrix::Constant(2, 5, true);
    for (const auto function : {flash_bidirectional, flash_causal}) {
      run_kernels([&] { function(x, x, x, 2, mask); });
      const auto rejected = [&](std::string_view what, std::string_view argument, const auto& call) {
        expect_rejected(what, argument, [&] { run_kernels(call); });
      };
      rejected("no heads", "num_heads", [&] { function(x, x, x, 0, mask); });
      rejected("three heads for 32 columns", "q", [&] { function(x, x, x, 3, mask); });
      rejected("heads of width 8", "q", [&] { function(x, x, x, 4, mask); });
      rejected("keys of another batch", "k", [&] { function(x, one, one, 2, mask); });
      rejected("values too narrow", "v", [&] { function(x, x, narrow, 2, mask); });
      rejected("values too few", "v", [&] { function(x, x, shorter, 2, {}); });
      rejected("a mask too short", "mask", [&] { function(x, x, x, 2, wrong); });
      rejected("a mask and fewer queries than keys", "q", [&] { function(shorter, x, x, 2, mask); });
    }
  }
}
