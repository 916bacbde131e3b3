// What the suites of the backward kernels share: a call with its memory around it, the judgement, and the probes.
//
// T is float, fp16 or bf16. Inputs are rounded to T before anything else; output and lse come from the float64
// reference, rounded to T and to float, so that a mistake of a forward kernel cannot reach this phase.
#pragma once

#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common/attention/reference.hpp"
#include "common/testing/device_tensor.hpp"
#include "common/testing/flash_cases.hpp"
#include "common/testing/fragment_map.hpp"
#include "common/testing/half_judge.hpp"
#include "common/testing/kernel.hpp"
#include "common/testing/suite.hpp"
#include "common/virtual_gpu/findings.hpp"
#include "phase3_backward/flash.hpp"

namespace flashkata::testing {

inline constexpr float INF = std::numeric_limits<float>::infinity();
inline constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
inline const Axes QUERY_AXES = {"batch", "head", "query", "channel"};
inline const Axes KEY_AXES = {"batch", "head", "key", "channel"};

/// The answer that is judged, and the smallest width that it must have.
template <typename T>
struct BackwardStep {
  void (*launch)(const FlashBackward<T>& problem);
  Index width;
};

// ---- Inputs ---------------------------------------------------------------------------------------------------------

/// What the forward pass left behind.
struct ForwardResult {
  Array output;  // [B, H, Sq, D]
  Array lse;     // [B, H, Sq]
};

/// One backward pass on the host, every number already rounded to T.
struct BackwardInputs {
  AttentionCase sizes;  // value_width is width
  AttentionInputs inputs;
  TokenTensor d_output;
  std::optional<ForwardResult> forward = {};  // where it is empty, the reference is asked

  std::string text() const {
    const AttentionCase& c = sizes;
    return std::to_string(c.queries) + (c.queries == 1 ? " query, " : " queries, ") + std::to_string(c.keys) +
           (c.keys == 1 ? " key" : " keys") + ", D = " + std::to_string(c.width) + (c.causal ? ", causal" : "");
  }
};

/// The number in place [b, h, s, d].
using Fill = std::function<double(Index b, Index h, Index s, Index d)>;

template <typename T>
void set(TokenTensor& tensor, const Fill& value) {
  const View<float, 4> view = tensor.heads();
  for (Index b = 0; b < view.size(0); ++b)
    for (Index h = 0; h < view.size(1); ++h)
      for (Index s = 0; s < view.size(2); ++s)
        for (Index d = 0; d < view.size(3); ++d) {
          view(b, h, s, d) = static_cast<float>(rounded<T>(value(b, h, s, d)));
        }
}

/// The inputs of a numbered case. Of one that is none, N(0, 1) seeded by `number`.
template <typename T>
BackwardInputs inputs_of(AttentionCase c) {
  c.value_width = c.width;
  BackwardInputs made{.sizes = c, .inputs = make_inputs(c), .d_output = make_output_gradient(c)};
  for (TokenTensor* tensor : {&made.inputs.query, &made.inputs.key, &made.inputs.value, &made.d_output}) {
    const TokenTensor before = *tensor;
    const View<const float, 4> view = before.heads();
    set<T>(*tensor, [&](Index b, Index h, Index s, Index d) { return static_cast<double>(view(b, h, s, d)); });
  }
  return made;
}

/// [batch, heads] whose head (b, h) is head from(b, h) of `one`, which has one batch item.
inline BackwardInputs arranged(const BackwardInputs& one, Index batch, Index heads,
                               const std::function<Index(Index, Index)>& from) {
  AttentionCase c = one.sizes;
  c.batch = batch;
  c.heads = heads;
  BackwardInputs made{.sizes = c, .inputs = make_inputs(c), .d_output = make_output_gradient(c)};
  const auto spread = [&](const TokenTensor& source, TokenTensor& target) {
    for (Index b = 0; b < batch; ++b)
      for (Index h = 0; h < heads; ++h) as_matrix(target.heads()[b][h]) = as_matrix(source.heads()[0][from(b, h)]);
  };
  spread(one.inputs.query, made.inputs.query);
  spread(one.inputs.key, made.inputs.key);
  spread(one.inputs.value, made.inputs.value);
  spread(one.d_output, made.d_output);
  if (!one.forward) return made;
  made.forward = ForwardResult{{{batch, heads, c.queries, c.width}, {}}, {{batch, heads, c.queries}, {}}};
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < heads; ++h) {
      const auto append = [&](Array& all, const Array& source) {
        const Array head = head_of(source, 0, from(b, h));
        all.values.insert(all.values.end(), head.values.begin(), head.values.end());
      };
      append(made.forward->output, one.forward->output);
      append(made.forward->lse, one.forward->lse);
    }
  return made;
}

/// The forward pass by the reference.
inline reference::Forward reference_forward(const BackwardInputs& in) {
  const auto widened = [](const TokenTensor& tensor) {
    const View<const float, 4> view = tensor.heads();
    Tensor<double, 4> wide(view.shape());
    for (Index b = 0; b < view.size(0); ++b)
      for (Index h = 0; h < view.size(1); ++h) as_matrix(wide.view()[b][h]) = as_matrix(view[b][h]).cast<double>();
    return wide;
  };
  const Tensor<double, 4> query = widened(in.inputs.query);
  const Tensor<double, 4> key = widened(in.inputs.key);
  const Tensor<double, 4> value = widened(in.inputs.value);
  reference::Problem problem{.query = query, .key = key, .value = value, .causal = in.sizes.causal};
  if (in.sizes.scale) problem.scale = *in.sizes.scale;
  return reference::forward(problem);
}

inline ForwardResult forward_of(const BackwardInputs& in) {
  if (in.forward) return *in.forward;
  const reference::Forward result = reference_forward(in);
  return {to_array(result.output), to_array(result.lse)};
}

/// For several calls with the same inputs: the reference is asked once.
inline BackwardInputs with_forward(BackwardInputs in) {
  in.forward = forward_of(in);
  return in;
}

// ---- Calls ----------------------------------------------------------------------------------------------------------

struct BackwardOptions {
  bool deterministic = false;
  Layouts layouts = {};               // of the inputs; dO and the gradients lie as another tensor does
  std::array<bool, 3> repeated = {};  // d_output has a stride of 0 along batch, head, query
  Index rows_behind = 0;              // rows of NaN behind the last row of each head of every input
};

/// Where the gradients go, and the scratch; NaN at first. Several calls may use it one after the other.
template <typename T>
struct GradientMemory {
  GradientMemory(const AttentionCase& c, const Layouts& layouts)
      : query(DeviceTensor<T>::output("d_query", {c.batch, c.heads, c.queries, c.width}, layouts.value)),
        key(DeviceTensor<T>::output("d_key", {c.batch, c.heads, c.keys, c.width}, layouts.output)),
        value(DeviceTensor<T>::output("d_value", {c.batch, c.heads, c.keys, c.width}, layouts.query)),
        delta(DeviceTensor<float>::output("delta", {c.batch, c.heads, c.queries, 1}, Layout::heads)),
        query_sum(DeviceTensor<float>::output("d_query_sum", {c.batch, c.heads, c.queries, c.width}, Layout::heads)) {}

  DeviceTensor<T> query, key, value;
  DeviceTensor<float> delta, query_sum;
};

struct Gradients {
  Array query;  // [B, H, Sq, D]
  Array key;    // [B, H, Sk, D]
  Array value;  // [B, H, Sk, D]
  std::vector<KernelProfile> profiles;
};

namespace kernel_suite_detail {

// An input on the GPU, and the view of it that the call gets.
template <typename T, int Rank>
struct Placed {
  DeviceTensor<T> memory;
  View<const T, Rank> view;
};

// `values` [B, H, S, D], with rows of NaN behind each head's last; axes that are repeated are stored once.
template <typename T>
Placed<T, 4> place_input(const char* name, const View<const float, 4>& values, Layout layout, Index rows_behind,
                         const std::array<bool, 3>& repeated = {}) {
  Shape<4> stored = values.shape();
  for (std::size_t axis = 0; axis < 3; ++axis) {
    if (repeated[axis]) stored[axis] = std::min<Index>(stored[axis], 1);
  }
  const Index rows = stored[2];
  stored[2] += rows_behind;
  Tensor<float, 4> all(stored);  // NaN
  for (Index b = 0; b < stored[0]; ++b)
    for (Index h = 0; h < stored[1]; ++h)
      for (Index s = 0; s < rows; ++s)
        for (Index d = 0; d < stored[3]; ++d) all(b, h, s, d) = values(b, h, s, d);
  DeviceTensor<T> memory = DeviceTensor<T>::input(name, all.view(), layout);
  Shape<4> strides = memory.view().strides();
  for (std::size_t axis = 0; axis < 3; ++axis) {
    if (repeated[axis]) strides[axis] = 0;
  }
  const View<const T, 4> view(memory.view().data(), values.shape(), strides);
  return {std::move(memory), view};
}

inline Tensor<float, 4> to_tensor(const Array& array, const Shape<4>& shape) {
  Tensor<float, 4> tensor(shape);
  std::transform(array.values.begin(), array.values.end(), tensor.data(),
                 [](double value) { return static_cast<float>(value); });
  return tensor;
}

}  // namespace kernel_suite_detail

/// Calls the answer. With `judge`, what it does to memory that is not its own is a finding, and so is device memory of
/// its own.
template <typename T>
Gradients gradients(const BackwardStep<T>& step, const BackwardInputs& in, const BackwardOptions& options = {},
                    GradientMemory<T>* memory = nullptr, bool judge = true) {
  using kernel_suite_detail::place_input;
  const AttentionCase& c = in.sizes;
  const Layouts& layouts = options.layouts;
  const Shape<4> rows{c.batch, c.heads, c.queries, c.width};
  const ForwardResult forward = forward_of(in);
  const Index behind = options.rows_behind;

  const auto query = place_input<T>("query", in.inputs.query.heads(), layouts.query, behind);
  const auto key = place_input<T>("key", in.inputs.key.heads(), layouts.key, behind);
  const auto value = place_input<T>("value", in.inputs.value.heads(), layouts.value, behind);
  const Tensor<float, 4> output = kernel_suite_detail::to_tensor(forward.output, rows);
  const auto out = place_input<T>("output", output.view(), layouts.output, behind);
  const auto d_output = place_input<T>("d_output", in.d_output.heads(), layouts.key, behind, options.repeated);
  // One number a row; in the layouts of tokens the rows of two heads are neighbours.
  const Tensor<float, 4> lse = kernel_suite_detail::to_tensor(forward.lse, {c.batch, c.heads, c.queries, 1});
  const auto l = place_input<float>("lse", lse.view(),
                                    layouts.output == Layout::heads_apart ? Layout::heads : layouts.output, behind);

  std::optional<GradientMemory<T>> own;
  if (memory == nullptr) memory = &own.emplace(c, layouts);
  const FlashBackward<T> problem{
      .query = query.view,
      .key = key.view,
      .value = value.view,
      .output = out.view,
      .lse = View<const float, 3>(l.view.data(), {c.batch, c.heads, c.queries},
                                  {l.view.stride(0), l.view.stride(1), l.view.stride(2)}),
      .d_output = d_output.view,
      .d_query = memory->query.view(),
      .d_key = memory->key.view(),
      .d_value = memory->value.view(),
      .delta = memory->delta.rows(),
      .d_query_sum = memory->query_sum.view(),
      .causal = c.causal,
      .scale = c.scale,
      .deterministic = options.deterministic,
  };
  Gradients got;
  if (judge) {
    const std::size_t before = device_bytes();
    reset_peak_device_bytes();
    got.profiles = run_kernels([&] { step.launch(problem); });
    expect(peak_device_bytes() == before, "memory",
           std::to_string(peak_device_bytes() - before) + " bytes on the GPU beyond the arguments; want none");
  } else {
    run_unwatched([&] { step.launch(problem); });
  }
  got.query = memory->query.values(judge);
  got.key = memory->key.values(judge);
  got.value = memory->value.values(judge);
  if (judge) {
    memory->delta.values(judge);
    memory->query_sum.values(judge);
    for (const DeviceTensor<T>* input : {&query.memory, &key.memory, &value.memory, &out.memory, &d_output.memory}) {
      input->expect_unchanged();
    }
    l.memory.expect_unchanged();
  }
  return got;
}

// ---- The judgement --------------------------------------------------------------------------------------------------

namespace kernel_suite_detail {

using Matrix64 = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

inline Matrix64 matrix_of(const TokenTensor& tensor, Index b, Index h) {
  return as_matrix(tensor.heads()[b][h]).cast<double>();
}
inline Matrix64 matrix_of(const Array& all, Index b, Index h) {
  const Array head = head_of(all, b, h);
  return Eigen::Map<const Matrix64>(head.values.data(), head.shape.at(0), head.shape.at(1));
}
template <typename T>
Matrix64 rounded_matrix(const Matrix64& matrix) {
  return matrix.unaryExpr([](double value) { return rounded<T>(value); });
}
inline void append(Array& all, const Matrix64& head) {
  all.values.insert(all.values.end(), head.data(), head.data() + head.size());
}

// [1, 1, ...] of [B, H, ...].
inline Array only_head(const Array& all, Index b, Index h) {
  Array head = head_of(all, b, h);
  head.shape.insert(head.shape.begin(), {1, 1});
  return head;
}
inline Gradients only_head(const Gradients& all, Index b, Index h) {
  return {only_head(all.query, b, h), only_head(all.key, b, h), only_head(all.value, b, h), {}};
}

// The eager way with float scores. Rounded to T are what is multiplied, P and scale dS, the output that delta is made
// from, as it comes from the forward pass, and the gradients.
template <typename T>
Gradients honest(const BackwardInputs& in) {
  const AttentionCase& c = in.sizes;
  const reference::Forward forward = reference_forward(in);
  const Array all_weights = to_array(forward.weights);
  const Array output = to_array(forward.output);
  const double scale = static_cast<double>(c.scale.value_or(1.0f / std::sqrt(static_cast<float>(c.width))));
  Gradients made;
  made.query.shape = {c.batch, c.heads, c.queries, c.width};
  made.key.shape = made.value.shape = {c.batch, c.heads, c.keys, c.width};
  for (Index b = 0; b < c.batch; ++b) {
    for (Index h = 0; h < c.heads; ++h) {
      const Matrix64 weights = matrix_of(all_weights, b, h);
      const Matrix64 d_output = matrix_of(in.d_output, b, h);
      const Matrix64 d_weights = d_output * matrix_of(in.inputs.value, b, h).transpose();
      const Eigen::VectorXd delta = d_output.cwiseProduct(rounded_matrix<T>(matrix_of(output, b, h))).rowwise().sum();
      const Matrix64 d_scores = rounded_matrix<T>(scale * weights.cwiseProduct(d_weights.colwise() - delta));
      append(made.query, rounded_matrix<T>(d_scores * matrix_of(in.inputs.key, b, h)));
      append(made.key, rounded_matrix<T>(d_scores.transpose() * matrix_of(in.inputs.query, b, h)));
      append(made.value, rounded_matrix<T>(rounded_matrix<T>(weights).transpose() * d_output));
    }
  }
  return made;
}

}  // namespace kernel_suite_detail

/// What the float64 reference makes of some inputs, and how exact an answer must be.
template <typename T>
struct Judgement {
  explicit Judgement(const BackwardInputs& in) : want(expected_gradients(in.sizes, in.inputs, in.d_output)) {
    if constexpr (!std::is_same_v<T, float>) honest = kernel_suite_detail::honest<T>(in);
  }
  /// For whoever has asked the reference already.
  Judgement(ExpectedGradients exact, Gradients rounded) : want(std::move(exact)), honest(std::move(rounded)) {}

  ExpectedGradients want;
  Gradients honest;  // of 16 bits: what rounding makes of it

  /// The same of one head.
  Judgement only(Index b, Index h) const {
    using kernel_suite_detail::only_head;
    Judgement head = *this;
    const auto cut = [&](Array& array) {
      if (!array.shape.empty()) array = only_head(array, b, h);
    };
    for (Array* array : {&head.want.query, &head.want.key, &head.want.value, &head.want.query_bound.magnitude,
                         &head.want.key_bound.magnitude, &head.want.value_bound.magnitude, &head.honest.query,
                         &head.honest.key, &head.honest.value}) {
      cut(*array);
    }
    return head;
  }
};

/// In fp32 within the reference's bounds, in 16 bits as half_judge.hpp says.
template <typename T>
bool expect_gradients(const Gradients& got, const Judgement<T>& judgement) {
  const ExpectedGradients& want = judgement.want;
  const auto close = [](const char* name, const Array& is, const Array& should, const Array& baseline, Bound bound,
                        const Axes& axes) {
    if constexpr (std::is_same_v<T, float>) {
      return expect_close(name, is, should, bound, axes);
    } else {
      bound.relative -= 1e-5 - 4.0 * std::numeric_limits<float>::epsilon();
      return expect_close_in_half<T>(name, is, should, baseline, bound, "whose P, dS, output and gradients are", axes);
    }
  };
  const Gradients& honest = judgement.honest;
  const bool value = close("d_value", got.value, want.value, honest.value, want.value_bound, KEY_AXES);
  const bool key = close("d_key", got.key, want.key, honest.key, want.key_bound, KEY_AXES);
  return close("d_query", got.query, want.query, honest.query, want.query_bound, QUERY_AXES) && key && value;
}

template <typename T>
bool expect_gradients(const Gradients& got, const BackwardInputs& in) {
  return expect_gradients(got, Judgement<T>(in));
}

/// The same, with the sizes beside what is found.
template <typename T>
bool expect_right(const BackwardStep<T>& step, const BackwardInputs& in, const BackwardOptions& options = {}) {
  if (expect_gradients<T>(gradients(step, in, options), in)) return true;
  finding("of", std::string(type_name<T>()) + ", " + in.text() + (options.deterministic ? ", deterministic" : ""));
  return false;
}

inline bool expect_same(const Gradients& got, const Gradients& want, const std::string& why, bool with_query = true) {
  const bool value = expect_same_bits("d_value", got.value, want.value, KEY_AXES, why);
  const bool key = expect_same_bits("d_key", got.key, want.key, KEY_AXES, why);
  return (!with_query || expect_same_bits("d_query", got.query, want.query, QUERY_AXES, why)) && key && value;
}

// ---- Probes: false where the property does not hold
// ------------------------------------------------------------------

/// "fp16, 5 queries, 7 keys, D = 64", beside what was found.
template <typename T>
bool not_so(const BackwardInputs& in, const std::string& more = "") {
  finding("of", std::string(type_name<T>()) + ", " + in.text() + more);
  return false;
}

inline Array zeros(const Array& like) { return {like.shape, std::vector<double>(like.count(), 0.0)}; }

/// What rounding to T twice or thrice may change; in fp32, 1e-5.
template <typename T>
constexpr double few_roundings() {
  return std::is_same_v<T, float> ? 1e-5 : 3.0 * roundoff<T>();
}

/// One key has all the weight: dV = dO, and neither query nor key can change anything. All numbers are small integers.
template <typename T>
bool expect_one_pair(const BackwardStep<T>& step, Index width) {
  BackwardInputs in = inputs_of<T>({.why = "", .width = width, .scale = 0.5f});
  set<T>(in.inputs.query, [](Index, Index, Index, Index d) { return static_cast<double>(d % 3 - 1); });
  set<T>(in.inputs.key, [](Index, Index, Index, Index d) { return static_cast<double>(d % 5 - 2); });
  set<T>(in.inputs.value, [](Index, Index, Index, Index d) { return static_cast<double>(d % 4 + 1); });
  set<T>(in.d_output, [](Index, Index, Index, Index d) { return static_cast<double>(d % 3 + 1); });
  const Gradients got = gradients(step, in);
  const ExpectedGradients size = expected_gradients(in.sizes, in.inputs, in.d_output);
  const Array d_output = to_array(in.d_output.heads());
  const bool value = expect_close("d_value", got.value, d_output, {1e-5, d_output}, KEY_AXES);
  const bool key = expect_close("d_key", got.key, zeros(got.key), size.key_bound, KEY_AXES);
  if (expect_close("d_query", got.query, zeros(got.query), size.query_bound, QUERY_AXES) && key && value) return true;
  return not_so<T>(in);
}

/// The example of step 04's README: two queries and two keys, of which one channel is not 0.
template <typename T>
bool expect_example(const BackwardStep<T>& step, bool deterministic) {
  BackwardInputs in = inputs_of<T>({.why = "", .queries = 2, .keys = 2, .width = step.width, .scale = 1.0f});
  const auto column = [](double first, double second) -> Fill {
    return [=](Index, Index, Index s, Index d) { return d > 0 ? 0.0 : s == 0 ? first : second; };
  };
  set<T>(in.inputs.query, column(std::log(3.0), 0.0));
  set<T>(in.inputs.key, column(1.0, 2.0));
  set<T>(in.inputs.value, column(8.0, 0.0));
  set<T>(in.d_output, column(1.0, 2.0));
  const Gradients got = gradients(step, in, {.deterministic = deterministic});
  const double tolerance = std::is_same_v<T, float> ? 1e-5 : 4.0 * roundoff<T>();
  const auto close = [&](const char* name, const Array& array, double first, double second, const Axes& axes) {
    Array want = zeros(array);
    want.values[0] = first;
    want.values[static_cast<std::size_t>(step.width)] = second;
    const Array size{want.shape, std::vector<double>(want.count(), 4.0)};
    return expect_close(name, array, want, {tolerance, size}, axes);
  };
  const bool value = close("d_value", got.value, 1.25, 1.75, KEY_AXES);
  const bool key = close("d_key", got.key, 1.5 * std::log(3.0), -1.5 * std::log(3.0), KEY_AXES);
  if (close("d_query", got.query, -1.5, -4.0, QUERY_AXES) && key && value) return true;
  return not_so<T>(in, deterministic ? ", deterministic" : "");
}

/// With queries of 0, a query that sees n keys gives each the weight 1/n. Of row i of dO and of K, one of the channels
/// 0 to 7 says which place it has in its group of 8, one of the channels 8 to 15 which group of 8 it is in: dV lists
/// who came, and so does dQ, since the values make dS = (+-1 - delta) / n.
template <typename T>
bool expect_even_shares(const BackwardStep<T>& step, Index queries, Index keys, bool causal, bool deterministic) {
  BackwardInputs in = inputs_of<T>(
      {.why = "", .queries = queries, .keys = keys, .width = step.width, .scale = 1.0f, .causal = causal, .number = 3});
  const auto code = [](Index i, Index d) { return d == i % 8 || d == 8 + i / 8 % 8 ? 1.0 : 0.0; };
  const auto sign = [](Index j) { return j % 2 == 0 ? 1.0 : -1.0; };  // dP of any query and key j
  set<T>(in.inputs.query, [](Index, Index, Index, Index) { return 0.0; });
  set<T>(in.inputs.key, [&](Index, Index, Index j, Index d) { return code(j, d); });
  set<T>(in.inputs.value, [&](Index, Index, Index j, Index d) { return d < 8 ? sign(j) : 0.0; });
  set<T>(in.d_output, [&](Index, Index, Index i, Index d) { return code(i, d); });
  const Gradients got = gradients(step, in, {.deterministic = deterministic});

  Array value = zeros(got.value), query = zeros(got.query), query_size = zeros(got.query);
  for (Index i = 0; i < queries; ++i) {
    const Index seen = keys_seen(causal, i, queries, keys);
    double delta = 0.0;
    for (Index j = 0; j < seen; ++j) delta += sign(j) / static_cast<double>(seen);
    for (Index j = 0; j < seen; ++j)
      for (Index d = 0; d < 16; ++d) {
        const auto of_key = static_cast<std::size_t>(j * step.width + d);
        const auto of_query = static_cast<std::size_t>(i * step.width + d);
        value.values[of_key] += code(i, d) / static_cast<double>(seen);
        query.values[of_query] += (sign(j) - delta) * code(j, d) / static_cast<double>(seen);
        query_size.values[of_query] += (1.0 + std::abs(delta)) * code(j, d) / static_cast<double>(seen);
      }
  }
  const double tolerance = few_roundings<T>();
  const bool value_is_right = expect_close("d_value", got.value, value, {tolerance, value}, KEY_AXES);
  const bool key_is_right = expect_all("d_key", got.key, 0.0, 0.0, KEY_AXES, "every query is 0, so d_key should be");
  const bool query_is_right = expect_close("d_query", got.query, query, {tolerance, query_size}, QUERY_AXES);
  return (value_is_right && key_is_right && query_is_right) || not_so<T>(in, deterministic ? ", deterministic" : "");
}

/// The same by both ways to dQ: fp16 goes the one, bf16 the other, fp32 both; watched, by turns.
template <typename T>
bool expect_even_shares(const BackwardStep<T>& step, Index queries, Index keys, bool causal) {
  for (const bool deterministic : {false, true}) {
    if (kernels_are_checked() && std::is_same_v<T, float> && deterministic != ((queries + keys) % 2 == 0)) continue;
    if (!std::is_same_v<T, float> && deterministic != std::is_same_v<T, fp16>) continue;
    if (!expect_even_shares(step, queries, keys, causal, deterministic)) return false;
  }
  return true;
}

namespace kernel_suite_detail {

// Every number below 256 as +-2 in eight channels, again and again. Under 64 / width as scale two equal codes have the
// score 256, and codes that differ in one bit 64 less: all exact in 16 bits.
inline double code(Index number, Index channel) { return (number >> (channel % 8)) % 2 == 1 ? 2.0 : -2.0; }

}  // namespace kernel_suite_detail

enum class Product { d_value, d_key, d_query };

/// As many queries as keys as channels, and query i belongs to key 37 i + 11. One operand is fed with the numbers of
/// its rows in head 0, of its channels in head 1: which of them came out in every place of a gradient?
///
/// d_value: P is 1 for the pairs that belong together and 0 for the others, so dV holds rows of dO.
/// d_key:   all keys are 0, so P = 1/n; dO and V are unit vectors, so dS = ([belongs] - 1/n) / n, and dK holds rows of
///          Q, less their mean.
/// d_query: the same with queries of 0; dQ holds rows of K, less their mean.
template <typename T>
bool expect_positions(const BackwardStep<T>& step, Index width, Product product, bool deterministic = false) {
  const Index n = width;  // a power of two, so 37 i + 11 is a permutation
  const auto key_of = [n](Index i) { return (37 * i + 11) % n; };
  const auto query_of = [&](Index j) {
    Index i = 0;
    while (key_of(i) != j) ++i;
    return i;
  };
  // The channels' numbers with alternating signs, so that their mean is 0.
  const Fill fed = [](Index, Index h, Index s, Index d) {
    return static_cast<double>(h == 0 ? s : s % 2 == 0 ? d : -d);
  };
  const Fill zero = [](Index, Index, Index, Index) { return 0.0; };
  BackwardInputs in = inputs_of<T>({.why = "",
                                    .heads = 2,
                                    .queries = n,
                                    .keys = n,
                                    .width = width,
                                    .scale = product == Product::d_value ? 64.0f / static_cast<float>(width) : 1.0f,
                                    .number = 4});
  if (product == Product::d_value) {
    using kernel_suite_detail::code;
    set<T>(in.inputs.query, [&](Index, Index, Index i, Index d) { return code(key_of(i), d); });
    set<T>(in.inputs.key, [](Index, Index, Index j, Index d) { return code(j, d); });
    set<T>(in.d_output, fed);
  } else {
    set<T>(in.inputs.query, product == Product::d_key ? fed : zero);
    set<T>(in.inputs.key, product == Product::d_key ? zero : fed);
    set<T>(in.d_output, [](Index, Index, Index i, Index d) { return i == d ? 1.0 : 0.0; });
    set<T>(in.inputs.value, [&](Index, Index, Index j, Index d) { return query_of(j) == d ? 1.0 : 0.0; });
  }
  const Gradients got = gradients(step, in, {.deterministic = deterministic});
  const bool of_query = product == Product::d_query;
  const Array& gradient = product == Product::d_value ? got.value : of_query ? got.query : got.key;
  Array rows = head_of(gradient, 0, 0);
  Array channels = head_of(gradient, 0, 1);
  const double weight = product == Product::d_value ? 1.0 : static_cast<double>(n);
  const double mean = product == Product::d_value ? 0.0 : static_cast<double>(n - 1) / 2.0;
  for (double& value : rows.values) value = weight * value + mean;
  for (double& value : channels.values) value = std::abs(weight * value);
  const bool arrived = expect_arrived(rows, channels,
                                      {.name = product == Product::d_value ? "d_value"
                                               : of_query                  ? "d_query"
                                                                           : "d_key",
                                       .axis = of_query ? "query" : "key",
                                       .from = product == Product::d_value ? "dO[query,channel]"
                                               : of_query                  ? "K[key,channel]"
                                                                           : "Q[query,channel]",
                                       .source = of_query ? std::function<Index(Index)>(key_of) : query_of,
                                       .fragments = !std::is_same_v<T, float>});
  return arrived || not_so<T>(in, deterministic ? ", deterministic" : "");
}

/// All values alike, in small integers: every dP is delta, so dS is 0 and so are dQ and dK. The weights are random.
template <typename T>
bool expect_nothing_from_equal_values(const BackwardStep<T>& step, Index queries, Index keys, bool causal) {
  BackwardInputs in =
      inputs_of<T>({.why = "", .queries = queries, .keys = keys, .width = step.width, .causal = causal, .number = 5});
  set<T>(in.inputs.value, [](Index, Index, Index, Index d) { return static_cast<double>(d % 4 + 1); });
  set<T>(in.d_output, [](Index, Index, Index i, Index d) { return static_cast<double>((i + d) % 5 - 1); });
  const Gradients got = gradients(step, in);
  const ExpectedGradients size = expected_gradients(in.sizes, in.inputs, in.d_output);
  const bool key = expect_close("d_key", got.key, zeros(got.key), size.key_bound, KEY_AXES);
  return (expect_close("d_query", got.query, zeros(got.query), size.query_bound, QUERY_AXES) && key) || not_so<T>(in);
}

/// All keys alike: a row of dS adds up to 0, so dQ is 0.
template <typename T>
bool expect_nothing_from_equal_keys(const BackwardStep<T>& step, Index queries, Index keys, bool causal) {
  BackwardInputs in =
      inputs_of<T>({.why = "", .queries = queries, .keys = keys, .width = step.width, .causal = causal, .number = 6});
  const BackwardInputs before = in;
  set<T>(in.inputs.key, [](Index, Index, Index, Index d) { return static_cast<double>(d % 3) - 0.5; });
  const auto lifted = [](const TokenTensor& tensor) -> Fill {
    return [view = tensor.heads()](Index b, Index h, Index s, Index d) {
      return 2.0 + static_cast<double>(view(b, h, s, d));
    };
  };
  set<T>(in.inputs.value, lifted(before.inputs.value));
  set<T>(in.d_output, lifted(before.d_output));
  const Gradients got = gradients(step, in);
  Bound bound = expected_gradients(in.sizes, in.inputs, in.d_output).query_bound;
  bound.relative = few_roundings<T>();
  return expect_close("d_query", got.query, zeros(got.query), bound, QUERY_AXES) || not_so<T>(in);
}

/// dO = 0: exactly nothing.
template <typename T>
bool expect_nothing_from_nothing(const BackwardStep<T>& step, const AttentionCase& sizes) {
  BackwardInputs in = inputs_of<T>(sizes);
  set<T>(in.d_output, [](Index, Index, Index, Index) { return 0.0; });
  for (const bool deterministic : {true, false}) {
    const Gradients got = gradients(step, in, {.deterministic = deterministic});
    const bool value = expect_all("d_value", got.value, 0.0, 0.0, KEY_AXES, "d_output is 0, so d_value should be");
    const bool key = expect_all("d_key", got.key, 0.0, 0.0, KEY_AXES, "d_output is 0, so d_key should be");
    const bool query = expect_all("d_query", got.query, 0.0, 0.0, QUERY_AXES, "d_output is 0, so d_query should be");
    if (!value || !key || !query) return not_so<T>(in, deterministic ? ", deterministic" : "");
  }
  return true;
}

/// Twice the dO, twice every gradient. A factor of 2 changes no digit, unless a number is too small for its type.
template <typename T>
bool expect_linear(const BackwardStep<T>& step, const AttentionCase& sizes) {
  static_assert(!std::is_same_v<T, fp16>, "dS may be too small for fp16");
  BackwardInputs in = inputs_of<T>(sizes);
  Gradients want = gradients(step, in, {.deterministic = true});
  for (Array* array : {&want.query, &want.key, &want.value}) {
    for (double& value : array->values) value *= 2.0;
  }
  const BackwardInputs before = in;
  set<T>(in.d_output, [view = before.d_output.heads()](Index b, Index h, Index s, Index d) {
    return 2.0 * static_cast<double>(view(b, h, s, d));
  });
  return expect_same(gradients(step, in, {.deterministic = true}), want,
                     "beyond doubling, when d_output was doubled") ||
         not_so<T>(in);
}

/// Half the scale and twice the keys are the same scores. dQ and dV are the same then, and dK is half of what it was.
/// Factors of 2 change no digit, unless a number is too small for its type.
template <typename T>
bool expect_scale_belongs_to_keys(const BackwardStep<T>& step, AttentionCase sizes) {
  static_assert(!std::is_same_v<T, fp16>, "dS may be too small for fp16");
  BackwardInputs in = inputs_of<T>(sizes);
  in.sizes.scale = 0.25f;
  Gradients want = gradients(step, in, {.deterministic = true});
  for (double& value : want.key.values) value /= 2.0;
  const BackwardInputs before = in;
  set<T>(in.inputs.key, [view = before.inputs.key.heads()](Index b, Index h, Index s, Index d) {
    return 2.0 * static_cast<double>(view(b, h, s, d));
  });
  in.sizes.scale = 0.125f;
  const Gradients got = gradients(step, in, {.deterministic = true});
  return expect_same(got, want, "beyond halving d_key, when the scale was halved and the keys were doubled") ||
         not_so<T>(in);
}

namespace kernel_suite_detail {

// Sums over the rows of one head, channel by channel; rows from `first` on.
inline std::vector<double> column_sums(const Array& head, Index first, bool absolute) {
  const Index width = head.shape.at(1);
  std::vector<double> sums(static_cast<std::size_t>(width), 0.0);
  for (Index s = first; s < head.shape.at(0); ++s)
    for (Index d = 0; d < width; ++d) {
      const double value = head.values[static_cast<std::size_t>(s * width + d)];
      sums[static_cast<std::size_t>(d)] += absolute ? std::abs(value) : value;
    }
  return sums;
}

inline double dot(const Array& one, const Array& other, bool absolute) {
  double sum = 0.0;
  for (std::size_t i = 0; i < one.count(); ++i) {
    const double product = one.values[i] * other.values[i];
    sum += absolute ? std::abs(product) : product;
  }
  return sum;
}

}  // namespace kernel_suite_detail

/// The weights of a query add up to 1, so dV over all keys adds up to dO over all queries that see one; and scores know
/// only the products of queries and keys, so <dQ, Q> = <dK, K>.
template <typename T>
bool expect_balanced(const BackwardStep<T>& step, const AttentionCase& sizes, const BackwardOptions& options = {}) {
  using kernel_suite_detail::column_sums;
  using kernel_suite_detail::dot;
  const BackwardInputs in = inputs_of<T>(sizes);
  const Gradients got = gradients(step, in, options);
  const Array d_output = to_array(in.d_output.heads());
  const Array query = to_array(in.inputs.query.heads());
  const Array key = to_array(in.inputs.key.heads());
  const Index blind = sizes.causal ? std::max<Index>(0, sizes.queries - sizes.keys) : 0;
  for (Index b = 0; b < sizes.batch; ++b) {
    for (Index h = 0; h < sizes.heads; ++h) {
      const std::string head = "batch item " + std::to_string(b) + ", head " + std::to_string(h) + ": ";
      const Array rows = head_of(d_output, b, h);
      const std::vector<double> given = column_sums(rows, blind, false);
      const std::vector<double> size = column_sums(rows, blind, true);
      const std::vector<double> taken = column_sums(head_of(got.value, b, h), 0, false);
      for (std::size_t d = 0; d < given.size(); ++d) {
        if (std::abs(taken[d] - given[d]) <= few_roundings<T>() * size[d]) continue;
        std::ostringstream text;
        text << head << "channel " << d << " of all keys adds up to " << taken[d] << ", that of d_output to "
             << given[d];
        finding("d_value", text.str());
        return not_so<T>(in);
      }
      const Array dq = head_of(got.query, b, h), q = head_of(query, b, h);
      const Array dk = head_of(got.key, b, h), k = head_of(key, b, h);
      const double of_queries = dot(dq, q, false);
      const double of_keys = dot(dk, k, false);
      const double allowed = few_roundings<T>() * (dot(dq, q, true) + dot(dk, k, true));
      if (std::abs(of_queries - of_keys) <= allowed) continue;
      std::ostringstream text;
      text << head << "<d_query, query> = " << of_queries << ", <d_key, key> = " << of_keys;
      finding("balance", text.str());
      return not_so<T>(in);
    }
  }
  return true;
}

/// Queries that see no key: dQ exactly 0, and nothing of them in any key. No query: dK and dV exactly 0.
template <typename T>
bool expect_zeros_where_nobody_looks(const BackwardStep<T>& step, Index queries, Index keys, bool causal,
                                     bool deterministic) {
  const BackwardInputs in = inputs_of<T>(
      {.why = "", .heads = 2, .queries = queries, .keys = keys, .width = step.width, .causal = causal, .number = 7});
  const Gradients got = gradients(step, in, {.deterministic = deterministic});
  const std::string more = deterministic ? ", deterministic" : "";
  for (Index h = 0; h < 2; ++h) {
    const Array rows = head_of(got.query, 0, h);
    for (Index i = 0; i < queries; ++i) {
      if (keys_seen(causal, i, queries, keys) > 0) continue;
      const auto first = rows.values.begin() + i * step.width;
      const Array row{{step.width}, {first, first + step.width}};
      const std::string what = "query " + std::to_string(i) + " sees no key";
      if (!expect_all("d_query", row, 0.0, 0.0, {"channel"}, what)) return not_so<T>(in, more);
    }
  }
  if (queries == 0) {
    const bool value = expect_all("d_value", got.value, 0.0, 0.0, KEY_AXES, "no query sees any key");
    if (!expect_all("d_key", got.key, 0.0, 0.0, KEY_AXES, "no query sees any key") || !value) {
      return not_so<T>(in, more);
    }
  }
  return expect_gradients<T>(got, in) || not_so<T>(in, more);
}

/// What queries that see no key hold, they and their dO, reaches no gradient.
template <typename T>
bool expect_blind_are_harmless(const BackwardStep<T>& step, Index queries, Index keys, bool deterministic) {
  BackwardInputs in =
      inputs_of<T>({.why = "", .queries = queries, .keys = keys, .width = step.width, .causal = true, .number = 11});
  const Gradients want = gradients(step, in, {.deterministic = deterministic});
  for (Index i = 0; i < queries - keys; ++i)
    for (Index d = 0; d < step.width; ++d) {
      in.inputs.query.heads()(0, 0, i, d) = i % 2 == 0 ? NOT_A_NUMBER : INF;
      in.d_output.heads()(0, 0, i, d) = i % 2 == 0 ? -INF : NOT_A_NUMBER;
    }
  const Gradients got = gradients(step, in, {.deterministic = deterministic});
  const Bound bound{few_roundings<T>(), {got.query.shape, std::vector<double>(got.query.count(), 1.0)}};
  const bool same =
      expect_same(got, want, "when queries that see no key, and their d_output, became NaN and inf", deterministic) &&
      (deterministic || expect_close("d_query", got.query, want.query, bound, QUERY_AXES));
  return same || not_so<T>(in, deterministic ? ", deterministic" : "");
}

/// In head 0 nothing is wrong; in head h a key holds poison h - 1, or its value does. Queries that do not see that key
/// have the same gradients in all heads, bit for bit where the answer is deterministic.
enum class Poisoned { key, value };
template <typename T>
bool expect_forbidden_is_harmless(const BackwardStep<T>& step, Index queries, Index keys, Index place,
                                  Poisoned poisoned, bool deterministic) {
  constexpr std::array<float, 4> POISONS{-3e4f, INF, -INF, NOT_A_NUMBER};
  const BackwardInputs one =
      inputs_of<T>({.why = "", .queries = queries, .keys = keys, .width = step.width, .causal = true, .number = 8});
  BackwardInputs in = arranged(one, 1, 5, [](Index, Index) { return Index{0}; });
  for (Index h = 1; h < 5; ++h) {
    for (Index d = 0; d < step.width; ++d) {
      TokenTensor& tensor = poisoned == Poisoned::key ? in.inputs.key : in.inputs.value;
      tensor.heads()(0, h, place, d) = POISONS[static_cast<std::size_t>(h) - 1];
    }
  }
  const Gradients got = gradients(step, in, {.deterministic = deterministic});
  const auto row_of = [&](const Array& head, Index i) {
    const auto begin = head.values.begin() + i * step.width;
    return Array{{step.width}, {begin, begin + step.width}};
  };
  const Array clean = head_of(got.query, 0, 0);
  for (Index h = 1; h < 5; ++h) {
    const Array head = head_of(got.query, 0, h);
    for (Index i = 0; i < queries && place >= keys_seen(true, i, queries, keys); ++i) {
      const Array want = row_of(clean, i);
      const Bound bound{few_roundings<T>(), {want.shape, std::vector<double>(want.count(), 1.0)}};
      const std::string why = "of query " + std::to_string(i) + " when " +
                              (poisoned == Poisoned::key ? "key " : "the value of key ") + std::to_string(place) +
                              ", which it may not see, became " +
                              std::to_string(POISONS[static_cast<std::size_t>(h) - 1]);
      const bool same = deterministic ? expect_same_bits("d_query", row_of(head, i), want, {"channel"}, why)
                                      : expect_close("d_query " + why, row_of(head, i), want, bound, {"channel"});
      if (!same) return not_so<T>(in, deterministic ? ", deterministic" : "");
    }
  }
  return true;
}

/// Six heads, as 2 x 3 and in another order as 3 x 2.
template <typename T>
bool expect_heads_apart(const BackwardStep<T>& step, Index queries, Index keys, bool causal) {
  const BackwardInputs one = inputs_of<T>(
      {.why = "", .heads = 6, .queries = queries, .keys = keys, .width = step.width, .causal = causal, .number = 9});
  const auto shuffled = [](Index b, Index h) { return (5 * (2 * h + b) + 1) % 6; };
  const auto run = [&](Index batch, Index heads, const std::function<Index(Index, Index)>& from) {
    return gradients(step, arranged(one, batch, heads, from), {.deterministic = true});
  };
  const Gradients two_by_three = run(2, 3, [](Index b, Index h) { return 3 * b + h; });
  const Gradients three_by_two = run(3, 2, shuffled);
  for (Index b = 0; b < 3; ++b) {
    for (Index h = 0; h < 2; ++h) {
      const Index was = shuffled(b, h);
      const std::string why = "of head " + std::to_string(was % 3) + " of batch item " + std::to_string(was / 3) +
                              " when it became head " + std::to_string(h) + " of batch item " + std::to_string(b);
      using kernel_suite_detail::only_head;
      if (!expect_same(only_head(three_by_two, b, h), only_head(two_by_three, was / 3, was % 3), why))
        return not_so<T>(one);
    }
  }
  return true;
}

/// The same numbers in other places of memory, gradients too, with NaN between and behind the rows.
template <typename T>
bool expect_layouts_do_not_matter(const BackwardStep<T>& step, const AttentionCase& sizes) {
  const BackwardInputs in = with_forward(inputs_of<T>(sizes));
  const Gradients want = gradients(step, in, {.deterministic = true});
  const std::vector<Layouts> all{MIXED, MIXED_OTHERWISE, TOKENS, APART};
  const std::vector<Layouts> tried(all.begin(), kernels_are_checked() ? all.begin() + 1 : all.end());
  for (const Layouts& layouts : tried) {
    const Gradients got = gradients(step, in, {.deterministic = true, .layouts = layouts, .rows_behind = 3});
    if (!expect_same(got, want, "when the rows lay otherwise")) return not_so<T>(in);
  }
  return true;
}

/// dO that is the same for all queries, heads or batch items, stored once with a stride of 0, as sum() leaves it.
template <typename T>
bool expect_repeated_d_output(const BackwardStep<T>& step, const AttentionCase& sizes) {
  constexpr std::array<std::array<bool, 3>, 4> REPEATS{
      {{false, false, true}, {false, true, false}, {false, true, true}, {true, true, true}}};
  for (const std::array<bool, 3>& repeated : REPEATS) {
    if (kernels_are_checked() && !repeated[0]) continue;
    BackwardInputs in = inputs_of<T>(sizes);
    const BackwardInputs before = in;
    set<T>(in.d_output, [&](Index b, Index h, Index s, Index d) {
      return static_cast<double>(
          before.d_output.heads()(repeated[0] ? 0 : b, repeated[1] ? 0 : h, repeated[2] ? 0 : s, d));
    });
    in.forward = forward_of(in);
    const Gradients want = gradients(step, in, {.deterministic = true});
    const Gradients got = gradients(step, in, {.deterministic = true, .repeated = repeated});
    if (!expect_same(got, want, "when d_output was stored once, with a stride of 0,")) return not_so<T>(in);
  }
  return true;
}

/// Another problem of the same shape leaves its gradients and its scratch behind, then this one's are asked for twice.
template <typename T>
bool expect_memory_may_hold_anything(const BackwardStep<T>& step, AttentionCase sizes, bool deterministic) {
  const BackwardInputs in = with_forward(inputs_of<T>(sizes));
  sizes.number += 1;
  const BackwardInputs other = inputs_of<T>(sizes);
  const BackwardOptions options{.deterministic = deterministic};
  const Judgement<T> judgement(in);
  const Gradients want = gradients(step, in, options);
  GradientMemory<T> memory(in.sizes, options.layouts);
  gradients(step, other, options, &memory);
  for (int again = 0; again < 2; ++again) {
    const Gradients got = gradients(step, in, options, &memory);
    if (!expect_same(got, want, "in a later call in the same memory", deterministic)) return not_so<T>(in);
    if (!expect_gradients(got, judgement)) return not_so<T>(in, ", a later call in the same memory");
  }
  return true;
}

/// Blocks and threads run in another order each time. dK and dV have the same bits.
template <typename T>
bool expect_order_does_not_matter(const BackwardStep<T>& step, const AttentionCase& sizes) {
  const BackwardInputs in = with_forward(inputs_of<T>(sizes));
  const Judgement<T> judgement(in);
  const Gradients want = gradients(step, in);
  for (const std::uint64_t seed : {1u, 2u}) {
    if (kernels_are_checked() && seed > 1) continue;  // who is watched races in any order
    const AnotherOrder order(seed);
    const Gradients got = gradients(step, in);
    if (!expect_same(got, want, "when blocks and threads ran in another order", false)) return not_so<T>(in);
    if (!expect_gradients(got, judgement)) return not_so<T>(in, ", in another order");
  }
  return true;
}

/// With `deterministic` dQ, too, has the same bits. It is a sum of large numbers that cancel and small ones that stay,
/// so that hardly two orders of summation give the same: queries are 0 and weights therefore alike, the last third of
/// the keys is minus the first, with the same values, and the second third is small.
template <typename T>
bool expect_deterministic(const BackwardStep<T>& step, Index queries, Index third) {
  static_assert(!std::is_same_v<T, fp16>, "needs numbers of very different size");
  BackwardInputs in = inputs_of<T>(
      {.why = "", .queries = queries, .keys = 3 * third, .width = step.width, .scale = 1.0f, .number = 18});
  const BackwardInputs before = in;
  set<T>(in.inputs.query, [](Index, Index, Index, Index) { return 0.0; });
  set<T>(in.inputs.key, [third, view = before.inputs.key.heads()](Index b, Index h, Index s, Index d) {
    const double size = s < third ? 65536.0 : s < 2 * third ? 1.0 : -65536.0;
    return size * static_cast<double>(view(b, h, s % third, d));
  });
  set<T>(in.inputs.value, [third, view = before.inputs.value.heads()](Index b, Index h, Index s, Index d) {
    return static_cast<double>(view(b, h, s % third, d));
  });
  in.forward = forward_of(in);
  const Gradients want = gradients(step, in, {.deterministic = true});
  for (const std::uint64_t seed : {1u, 2u, 3u}) {
    if (kernels_are_checked() && seed > 1) continue;
    const AnotherOrder order(seed);
    const Gradients got = gradients(step, in, {.deterministic = true});
    if (!expect_same(got, want, "when blocks and threads ran in another order"))
      return not_so<T>(in, ", deterministic");
  }
  return true;
}

// ---- Bad arguments --------------------------------------------------------------------------------------------------

/// After a good call.
template <typename T>
void expect_bad_arguments_refused(const BackwardStep<T>& step) {
  const Index width = step.width;
  DeviceBuffer<T> memory("inputs",
                         std::vector<T>(static_cast<std::size_t>(2 * 3 * 8 * 2 * width), from_float<T>(0.5f)));
  DeviceBuffer<T> gradients("gradients", memory.size());
  DeviceBuffer<float> lse("lse", std::vector<float>(2 * 3 * 5, 0.5f));
  DeviceBuffer<float> scratch("scratch", memory.size());
  const Shape<4> queries{2, 3, 5, width};
  const Shape<4> keys{2, 3, 7, width};
  const Shape<3> rows{2, 3, 5};
  using In = View<const T, 4>;
  using Out = View<T, 4>;
  using Problem = FlashBackward<T>;
  DeviceBuffer<T> d_key("d_key", memory.size());
  DeviceBuffer<T> d_value("d_value", memory.size());
  DeviceBuffer<float> delta("delta", 2 * 3 * 5);
  const Problem good{
      .query = In(memory.data(), queries),
      .key = In(memory.data(), keys),
      .value = In(memory.data(), keys),
      .output = In(memory.data(), queries),
      .lse = View<const float, 3>(lse.data(), rows),
      .d_output = In(memory.data(), queries),
      .d_query = Out(gradients.data(), queries),
      .d_key = Out(d_key.data(), keys),
      .d_value = Out(d_value.data(), keys),
      .delta = View<float, 3>(delta.data(), rows),
      .d_query_sum = View<float, 4>(scratch.data(), queries),
  };
  run_kernels([&] { step.launch(good); });
  const auto rejected = [&](std::string_view what, std::string_view argument, const auto& change) {
    Problem bad = good;
    change(bad);
    expect_rejected(what, argument, [&] { run_kernels([&] { step.launch(bad); }); });
  };
  const Shape<4> fewer{2, 3, 4, width};
  rejected("a width of 8", "query", [&](Problem& p) {
    p.query = p.output = p.d_output = In(memory.data(), {2, 3, 5, 8});
    p.key = p.value = In(memory.data(), {2, 3, 7, 8});
    p.d_query = Out(gradients.data(), {2, 3, 5, 8});
    p.d_key = p.d_value = Out(gradients.data(), {2, 3, 7, 8});
    p.d_query_sum = View<float, 4>(scratch.data(), {2, 3, 5, 8});
  });
  rejected("keys of fewer heads", "key", [&](Problem& p) { p.key = In(memory.data(), {2, 1, 7, width}); });
  rejected("keys of another batch", "key", [&](Problem& p) { p.key = In(memory.data(), {1, 3, 7, width}); });
  rejected("a value too few", "value", [&](Problem& p) { p.value = In(memory.data(), {2, 3, 6, width}); });
  rejected("an output too short", "output", [&](Problem& p) { p.output = In(memory.data(), fewer); });
  rejected("an lse of other heads", "lse", [&](Problem& p) { p.lse = View<const float, 3>(lse.data(), {2, 2, 5}); });
  rejected("a d_output too short", "d_output", [&](Problem& p) { p.d_output = In(memory.data(), fewer); });
  rejected("a d_output as long as the keys", "d_output", [&](Problem& p) { p.d_output = In(memory.data(), keys); });
  rejected("a d_query too short", "d_query", [&](Problem& p) { p.d_query = Out(gradients.data(), fewer); });
  rejected("a d_key as long as the queries", "d_key", [&](Problem& p) { p.d_key = Out(gradients.data(), queries); });
  rejected("a d_value of fewer heads", "d_value", [&](Problem& p) {
    p.d_value = Out(gradients.data(), {2, 1, 7, width});
  });
  rejected("a delta too short", "delta", [&](Problem& p) { p.delta = View<float, 3>(delta.data(), {2, 3, 4}); });
  rejected("a delta whose rows lie apart", "delta", [&](Problem& p) {
    p.delta = View<float, 3>(scratch.data(), rows, {48, 16, 2});
  });
  rejected("a d_query_sum too narrow", "d_query_sum", [&](Problem& p) {
    p.d_query_sum = View<float, 4>(scratch.data(), {2, 3, 5, width / 2});
  });
  rejected("a d_query_sum whose rows lie apart", "d_query_sum", [&](Problem& p) {
    p.d_query_sum = View<float, 4>(scratch.data(), queries, {24 * width, 8 * width, width + 4, 1});
  });
  rejected("a scale that is NaN", "scale", [](Problem& p) { p.scale = NOT_A_NUMBER; });
  rejected("a scale that is infinite", "scale", [](Problem& p) { p.scale = INF; });
  rejected("queries with a gap between channels", "query", [&](Problem& p) {
    p.query = In(memory.data(), queries, {15 * width, 5 * width, 1, 5});
  });
  rejected("keys whose rows are not 16 bytes apart", "key", [&](Problem& p) {
    p.key = In(memory.data(), keys, {24 * width, 8 * width, width + 1, 1});
  });
  rejected("values that begin between two multiples of 16 bytes", "value",
           [&](Problem& p) { p.value = In(memory.data() + 1, keys); });
  rejected("a d_output whose rows are not 16 bytes apart", "d_output", [&](Problem& p) {
    p.d_output = In(memory.data(), queries, {24 * width, 8 * width, width + 1, 1});
  });
  rejected("a d_query that begins between two multiples of 16 bytes", "d_query",
           [&](Problem& p) { p.d_query = Out(gradients.data() + 2, queries); });
}

// ---- What only the virtual GPU can tell, and what only a real one has the time for
// -----------------------------------

inline bool needs_a_check() {
#if KATA_REAL_GPU
  skip("counts bytes, which only the virtual GPU does: ./kata test in a build without CUDA, or ncu");
  return true;
#else
  return false;
#endif
}

template <typename T>
bool needs_a_gpu([[maybe_unused]] const BackwardStep<T>& step) {
#if KATA_REAL_GPU
  return false;
#else
  if (!expect_even_shares(step, 1, 1, false)) return true;  // nobody should take an unfilled stub for a skipped test
  skip("needs a GPU: too long for the virtual one");
  return true;
#endif
}

/// What all kernels of a call load of each input, and the most shared memory that a block of one has.
struct Traffic {
  Index query, key, value, d_output, shared;
  std::vector<KernelProfile> profiles;
};

template <typename T>
Traffic traffic_of(const BackwardStep<T>& step, Index queries, Index keys, bool causal, bool deterministic) {
  if (!kernels_are_checked()) queries = keys = 1;  // nobody counts
  const Gradients got = gradients(
      step,
      inputs_of<T>({.why = "", .queries = queries, .keys = keys, .width = step.width, .causal = causal, .number = 10}),
      {.deterministic = deterministic});
  Traffic traffic{bytes_loaded(got.profiles, "query"),
                  bytes_loaded(got.profiles, "key"),
                  bytes_loaded(got.profiles, "value"),
                  bytes_loaded(got.profiles, "d_output"),
                  0,
                  got.profiles};
  for (const KernelProfile& profile : got.profiles) {
    traffic.shared = std::max<Index>(traffic.shared, profile.dynamic_shared_bytes);
  }
  return traffic;
}

/// Each row is loaded at most once for every `tile` rows of the other side, and once by a kernel that owns it; dO once
/// more, for delta.
template <typename T>
void expect_tiled_traffic(const BackwardStep<T>& step, Index tokens, Index tile) {
  for (const bool deterministic : {false, true}) {
    const Traffic traffic = traffic_of(step, tokens, tokens, false, deterministic);
    if (!kernels_are_judged()) continue;
    const Index bytes = tokens * step.width * static_cast<Index>(sizeof(T));
    const auto expect_at_most = [&](Index loaded, Index times, const char* name) {
      const Index most = times * bytes + 1024;
      expect(loaded > 0 && loaded <= most, name,
             "loaded " + std::to_string(loaded) + " bytes, " + std::to_string(loaded / bytes) +
                 " times its size, for " + std::to_string(tokens) + " queries and keys" +
                 (deterministic ? ", deterministic" : "") + "; want at most " + std::to_string(times) +
                 " times: once for every " + std::to_string(tile) + " rows that use it, and for its own");
    };
    expect_at_most(traffic.query, tokens / tile + 1, "query");
    expect_at_most(traffic.d_output, tokens / tile + 2, "d_output");
    expect_at_most(traffic.key, tokens / tile + 1, "key");
    expect_at_most(traffic.value, tokens / tile + 1, "value");
  }
}

/// Under a causal mask about half of the pairs of tiles see nothing of each other, and what is loaded shows it.
template <typename T>
void expect_blind_tiles_not_loaded(const BackwardStep<T>& step, Index tokens) {
  for (const bool deterministic : {false, true}) {
    const Traffic all = traffic_of(step, tokens, tokens, false, deterministic);
    const Traffic causal = traffic_of(step, tokens, tokens, true, deterministic);
    if (!kernels_are_judged()) continue;
    const Index some = causal.query + causal.key + causal.value + causal.d_output;
    const Index full = all.query + all.key + all.value + all.d_output;
    expect(some * 10 <= full * 9, "traffic",
           "tiles loaded that see nothing of each other: causal, " + std::to_string(some) +
               " bytes of query, key, value and d_output, without a mask " + std::to_string(full) + ", for " +
               std::to_string(tokens) + " queries and keys" + (deterministic ? ", deterministic" : "") +
               "; want at most 9/10");
  }
}

/// All five products on tensor cores, and shared memory without conflicts. Lengths are multiples of 64.
template <typename T>
void expect_tensor_cores(const BackwardStep<T>& step, Index queries, Index keys) {
  const Traffic traffic = traffic_of(step, queries, keys, false, /*deterministic=*/false);
  if (!kernels_are_judged()) return;
  EventCounts events;
  for (const KernelProfile& profile : traffic.profiles) events += profile.events;
  const Index products = static_cast<Index>(events.matrix_products);
  const Index least = 5 * queries * keys * step.width / (16 * 8 * 16);
  expect(products >= least, "tensor cores",
         std::to_string(products) + " times mma_m16n8k16 for " + std::to_string(queries) + " queries and " +
             std::to_string(keys) + " keys, D = " + std::to_string(step.width) + "; five products take " +
             std::to_string(least));
  expect_bank_conflicts_below(traffic.profiles, 2.5);
}

/// Shared memory does not grow with either length.
template <typename T>
void expect_no_row_of_scores(const BackwardStep<T>& step) {
  const Index few = traffic_of(step, 4, 192, false, false).shared;
  const Index more_keys = traffic_of(step, 4, 384, false, false).shared;
  const Index more_queries = traffic_of(step, 192, 4, false, false).shared;
  const Index most_queries = traffic_of(step, 384, 4, false, false).shared;
  if (!kernels_are_judged()) return;
  const auto expect_equal = [](Index one, Index two, const char* of) {
    expect(two <= one, "memory",
           std::string("shared memory grows with the number of ") + of + ": " + std::to_string(one) +
               " bytes a block for 192, " + std::to_string(two) + " for 384");
  };
  expect_equal(few, more_keys, "keys");
  expect_equal(more_queries, most_queries, "queries");
}

/// Every head of [batch, heads] holds one of two problems of one head, so that the reference has little to do; with and
/// without `deterministic`.
template <typename T>
bool expect_long(const BackwardStep<T>& step, Index batch, Index heads, Index queries, Index keys, Index width,
                 bool causal) {
  BackwardInputs two = inputs_of<T>(
      {.why = "", .heads = 2, .queries = queries, .keys = keys, .width = width, .causal = causal, .number = 300});
  two.forward = forward_of(two);
  const auto from = [heads](Index b, Index h) { return (b * heads + h) % 2; };
  const BackwardInputs all = arranged(two, batch, heads, from);
  const Judgement<T> both(two);
  const std::array<Judgement<T>, 2> judgements{both.only(0, 0), both.only(0, 1)};
  for (const bool deterministic : {false, true}) {
    const Gradients got = gradients(step, all, {.deterministic = deterministic});
    for (Index b = 0; b < batch; ++b) {
      for (Index h = 0; h < heads; ++h) {
        const auto& judgement = judgements[static_cast<std::size_t>(from(b, h))];
        if (expect_gradients(kernel_suite_detail::only_head(got, b, h), judgement)) continue;
        return not_so<T>(two, ", batch item " + std::to_string(b) + ", head " + std::to_string(h) +
                                  (deterministic ? ", deterministic" : ""));
      }
    }
  }
  return true;
}

}  // namespace flashkata::testing
