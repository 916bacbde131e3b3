// A call of a backward kernel with its memory around it.
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

}  // namespace flashkata::testing
