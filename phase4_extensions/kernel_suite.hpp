// What the suites of phase 4 share: inputs with key/value heads of their own, calls with memory around them, on the GPU
// or on the host, and what the float64 reference expects.
//
// A step of this phase has two answers under one contract: tiled_... works on the host's memory, flash_... on the
// GPU's. A suite puts them into a list and asks both the same:
//
//     using Forward = Call<FlashForward<float>>;
//     std::vector<Forward> forwards() {
//       return answers<FlashForward<float>>("tiled_gqa_forward", [](const auto& p) { tiled_gqa_forward(p); },
//                                           "flash_gqa_forward", [](const auto& p) { flash_gqa_forward(p); });
//     }
//     ...
//     const Inputs in = random_inputs<float>({.heads = 6, .kv_heads = 2, .queries = 21, .keys = 37}, /*seed=*/1);
//     for (const Forward& call : forwards()) {
//       if (!expect_right(call, in, {.causal = true})) return;
//     }
//
// What a step has beside FlashForward or FlashBackward (sequences, a window, dropout) goes into the lambda; what the
// reference has to know of it goes into a Change. T is float, fp16 or bf16, and inputs are rounded to it.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "phase4_extensions/expected.hpp"

namespace flashkata::testing {

inline const Axes LSE_AXES = {"batch", "head", "query"};

// ---- Memory ---------------------------------------------------------------------------------------------------------

/// A DeviceBuffer on the host.
template <typename T>
class HostBuffer {
 public:
  HostBuffer(const std::string&, std::size_t count) : values_(count) {}
  void upload(std::span<const T> values) { std::copy(values.begin(), values.end(), values_.begin()); }
  std::vector<T> download() const { return values_; }
  T* data() { return values_.data(); }

 private:
  std::vector<T> values_;  // where new puts it: at a multiple of 16 bytes
};

template <typename T>
using GpuTensor = DeviceTensor<T>;
template <typename T>
using HostTensor = DeviceTensor<T, HostBuffer<T>>;

// ---- Calls ----------------------------------------------------------------------------------------------------------

/// An answer, and where its memory lies. Problem is FlashForward<T>, FlashBackward<T> or a step's own.
template <typename Problem>
struct Call {
  const char* name;
  std::function<void(const Problem&)> launch;
  bool on_host = false;
};

template <typename Problem>
Call<Problem> on_gpu(const char* name, std::function<void(const Problem&)> launch) {
  return {name, std::move(launch), false};
}
template <typename Problem>
Call<Problem> on_host(const char* name, std::function<void(const Problem&)> launch) {
  return {name, std::move(launch), true};
}

/// Both answers of a step. Where kernels are watched only theirs: there is nothing to watch in the other.
template <typename Problem>
std::vector<Call<Problem>> answers(const char* host_name, std::function<void(const Problem&)> host,
                                   const char* gpu_name, std::function<void(const Problem&)> gpu) {
  std::vector<Call<Problem>> calls;
  if (!kernels_are_checked()) calls.push_back(on_host<Problem>(host_name, std::move(host)));
  calls.push_back(on_gpu<Problem>(gpu_name, std::move(gpu)));
  return calls;
}

/// Calls the answer, whose memory is ready. With `judge` device memory beyond the arguments is a finding.
template <typename Problem>
std::vector<KernelProfile> run(const Call<Problem>& call, const Problem& problem, bool judge) {
  if (call.on_host) {
    call.launch(problem);
    return {};
  }
  if (!judge) {
    run_unwatched([&] { call.launch(problem); });
    return {};
  }
  const std::size_t memory = device_bytes();
  reset_peak_device_bytes();
  const std::vector<KernelProfile> profiles = run_kernels([&] { call.launch(problem); });
  expect(peak_device_bytes() == memory, "memory",
         std::to_string(peak_device_bytes() - memory) + " bytes on the GPU beyond the arguments; want none");
  return profiles;
}

namespace kernel_suite_detail {

// An lse has one number a row; in the layouts of tokens the rows of two heads are neighbours.
inline Layout layout_of_lse(const Layouts& layouts) {
  return layouts.output == Layout::heads_apart ? Layout::heads : layouts.output;
}

template <typename T, template <typename> class Memory>
ForwardAnswer forward_in(const Call<FlashForward<T>>& call, const Inputs& in, const CallOptions& options) {
  const Layouts& layouts = options.layouts;
  const Shape<4>& rows = in.query.shape();
  Memory<T> q = Memory<T>::input("query", in.query, layouts.query);
  Memory<T> k = Memory<T>::input("key", in.key, layouts.key);
  Memory<T> v = Memory<T>::input("value", in.value, layouts.value);
  Memory<T> o = Memory<T>::output("output", rows, layouts.output);
  auto l = Memory<float>::output("lse", {rows[0], rows[1], rows[2], 1}, layout_of_lse(layouts));
  const FlashForward<T> problem{.query = q.view(),
                                .key = k.view(),
                                .value = v.view(),
                                .output = o.view(),
                                .lse = l.rows(),
                                .causal = options.causal,
                                .scale = options.scale};
  ForwardAnswer answer;
  answer.profiles = run(call, problem, options.judge);
  answer.output = o.values(options.judge);
  answer.lse = l.values(options.judge);
  answer.lse.shape.pop_back();
  if (options.judge) {
    for (const Memory<T>* input : {&q, &k, &v}) input->expect_unchanged();
  }
  return answer;
}

template <typename T, template <typename> class Memory>
Gradients backward_in(const Call<FlashBackward<T>>& call, const Inputs& in, const ForwardResult& forward,
                      const CallOptions& options) {
  const Layouts& layouts = options.layouts;
  const Shape<4>& rows = in.query.shape();
  const Shape<4> one_each{rows[0], rows[1], rows[2], 1};
  const Tensor<float, 4> output = to_tensor(forward.output, rows);
  const Tensor<float, 4> lse = to_tensor(forward.lse, one_each);
  Memory<T> q = Memory<T>::input("query", in.query, layouts.query);
  Memory<T> k = Memory<T>::input("key", in.key, layouts.key);
  Memory<T> v = Memory<T>::input("value", in.value, layouts.value);
  Memory<T> o = Memory<T>::input("output", output, layouts.output);
  auto l = Memory<float>::input("lse", lse, layout_of_lse(layouts));
  Memory<T> d_o = Memory<T>::input("d_output", in.d_output, layouts.key);
  Memory<T> d_q = Memory<T>::output("d_query", rows, layouts.value);
  Memory<T> d_k = Memory<T>::output("d_key", in.key.shape(), layouts.output);
  Memory<T> d_v = Memory<T>::output("d_value", in.key.shape(), layouts.query);
  auto delta = Memory<float>::output("delta", one_each, Layout::heads);
  auto sums = Memory<float>::output("d_query_sum", rows, Layout::heads);
  const FlashBackward<T> problem{.query = q.view(),
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
                                 .causal = options.causal,
                                 .scale = options.scale,
                                 .deterministic = options.deterministic};
  Gradients got;
  got.profiles = run(call, problem, options.judge);
  got.query = d_q.values(options.judge);
  got.key = d_k.values(options.judge);
  got.value = d_v.values(options.judge);
  if (!options.judge) return got;
  delta.values(true);
  sums.values(true);
  for (const Memory<T>* input : {&q, &k, &v, &o, &d_o}) input->expect_unchanged();
  l.expect_unchanged();
  return got;
}

}  // namespace kernel_suite_detail

/// Calls the answer on copies of the inputs that have NaN between their rows; the outputs' memory holds NaN at first.
template <typename T>
ForwardAnswer forward(const Call<FlashForward<T>>& call, const Inputs& in, const CallOptions& options = {}) {
  using namespace kernel_suite_detail;
  return call.on_host ? forward_in<T, HostTensor>(call, in, options) : forward_in<T, GpuTensor>(call, in, options);
}

/// The same way back. `forward` is what the forward pass left behind: the reference's, as a rule.
template <typename T>
Gradients backward(const Call<FlashBackward<T>>& call, const Inputs& in, const ForwardResult& forward,
                   const CallOptions& options = {}) {
  using namespace kernel_suite_detail;
  return call.on_host ? backward_in<T, HostTensor>(call, in, forward, options)
                      : backward_in<T, GpuTensor>(call, in, forward, options);
}

// ---- Judgement: false where something is wrong, and a finding says what ---------------------------------------------

template <typename T>
bool expect_forward(const ForwardAnswer& got, const ExpectedForward& want) {
  const bool lse = expect_close("lse", got.lse, want.exact.lse, want.lse_bound, LSE_AXES);
  if constexpr (std::is_same_v<T, float>) {
    return expect_close("output", got.output, want.exact.output, want.output_bound, QUERY_AXES) && lse;
  } else {
    return expect_close_in_half<T>("output", got.output, want.exact.output, want.honest, want.output_bound,
                                   "whose weights and output are rounded to", QUERY_AXES) &&
           lse;
  }
}

inline bool expect_same(const ForwardAnswer& got, const ForwardAnswer& want, const std::string& why) {
  const bool lse = expect_same_bits("lse", got.lse, want.lse, LSE_AXES, why);
  return expect_same_bits("output", got.output, want.output, QUERY_AXES, why) && lse;
}

/// "flash_gqa_forward, fp32, B=2 H=6 Hk=2 Sq=21 Sk=37 D=16, causal", beside what was found.
template <typename Problem>
bool not_so(const Call<Problem>& call, const Inputs& in, const CallOptions& options = {}) {
  finding("of", std::string(call.name) + ", " + in.text() + (options.causal ? ", causal" : "") +
                    (options.deterministic ? ", deterministic" : ""));
  return false;
}

/// As the reference says. Backward, the reference's forward pass is what the answer gets.
template <typename T>
bool expect_right(const Call<FlashForward<T>>& call, const Inputs& in, const CallOptions& options = {},
                  const Change& change = {}) {
  return expect_forward<T>(forward(call, in, options), expected_forward<T>(in, options, change)) ||
         not_so(call, in, options);
}
template <typename T>
bool expect_right(const Call<FlashBackward<T>>& call, const Inputs& in, const CallOptions& options = {},
                  const Change& change = {}) {
  const ExpectedBackward<T> want = expected_backward<T>(in, options, change);
  return expect_gradients<T>(backward(call, in, want.forward, options), want.gradients) || not_so(call, in, options);
}

/// For what takes too long without a GPU: `probe` is something short, so that nobody takes a stub for a skipped test.
inline bool needs_a_gpu([[maybe_unused]] const std::function<bool()>& probe) {
#if KATA_REAL_GPU
  return false;
#else
  if (probe()) skip("needs a GPU: too long for the virtual one");
  return true;
#endif
}

}  // namespace flashkata::testing
