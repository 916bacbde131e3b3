// The C library over this build's answers. The steps have suites of their own; here it is about who is called with
// what.
#include <cmath>
#include <cstring>
#include <string>

#include "bindings/flashkata.h"
#include "common/gpu/half.hpp"
#include "common/testing/device_tensor.hpp"
#include "common/testing/suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

template <typename T>
constexpr int TYPE = std::is_same_v<T, float>  ? FLASHKATA_FLOAT32
                     : std::is_same_v<T, fp16> ? FLASHKATA_FLOAT16
                                               : FLASHKATA_BFLOAT16;
template <typename T>
constexpr double ERROR = std::is_same_v<T, float>  ? 2e-5
                         : std::is_same_v<T, fp16> ? 5e-3
                                                   : 3e-2;

constexpr AttentionCase PROBLEM = {.why = "",
                                   .batch = 2,
                                   .heads = 3,
                                   .queries = 37,
                                   .keys = 45,
                                   .width = 64,
                                   .value_width = 64,
                                   .scale = 0.2f,
                                   .causal = true,
                                   .number = 900};

template <typename T>
flashkata_tensor described(const View<T, 4>& view) {
  flashkata_tensor tensor{};
  tensor.data = const_cast<std::remove_const_t<T>*>(view.data());
  for (int axis = 0; axis < 4; ++axis) {
    tensor.shape[axis] = view.size(axis);
    tensor.strides[axis] = view.stride(axis);
  }
  return tensor;
}

// The largest error over the largest number.
void expect_near(const char* name, const Array& got, const Array& want, double allowed) {
  REQUIRE(got.shape == want.shape);
  double largest = 0.0, worst = 0.0;
  for (std::size_t i = 0; i < want.count(); ++i) {
    largest = std::max(largest, std::abs(want.values[i]));
    const double error = std::abs(got.values[i] - want.values[i]);
    worst = error <= worst ? worst : error;  // NaN stays
  }
  expect(worst <= allowed * largest, name,
         "is wrong by " + std::to_string(worst) + ", the largest number is " + std::to_string(largest));
}

// One problem through the C interface: on the GPU from device memory, on the CPU from the host's.
template <typename T>
void forward_and_backward(bool gpu) {
  const AttentionInputs inputs = make_inputs(PROBLEM);
  const TokenTensor output_gradient = make_output_gradient(PROBLEM);
  const Expected forward = expected(PROBLEM, inputs);
  const ExpectedGradients gradients = expected_gradients(PROBLEM, inputs, output_gradient);
  const Shape<4> queries = inputs.query.heads().shape();
  const Shape<4> keys = inputs.key.heads().shape();

  using Device = DeviceTensor<T>;
  auto query = Device::input("query", inputs.query.heads(), Layout::tokens_apart);
  auto key = Device::input("key", inputs.key.heads(), Layout::heads_apart);
  auto value = Device::input("value", inputs.value.heads(), Layout::tokens);
  auto d_output = Device::input("d_output", output_gradient.heads(), Layout::heads_apart);
  auto output = Device::output("output", queries, Layout::tokens);
  auto d_query = Device::output("d_query", queries, Layout::heads_apart);
  auto d_key = Device::output("d_key", keys, Layout::tokens);
  auto d_value = Device::output("d_value", keys, Layout::tokens_apart);
  auto lse = DeviceTensor<float>::output("lse", {queries[0], queries[1], queries[2], 1}, Layout::heads);
  auto delta = DeviceTensor<float>::output("delta", {queries[0], queries[1], queries[2], 1}, Layout::heads);
  auto d_query_sum = DeviceTensor<float>::output("d_query_sum", queries, Layout::heads);

  flashkata_attention problem{};
  problem.type = TYPE<T>;
  problem.gpu = gpu;
  problem.causal = 1;
  problem.scale = 0.2f;
  problem.query = described(query.view());
  problem.key = described(key.view());
  problem.value = described(value.view());
  problem.output = described(output.view());
  problem.lse = lse.view().data();
  REQUIRE_MESSAGE(flashkata_forward(&problem) == FLASHKATA_OK, flashkata_message());
  synchronize();
  expect_near("output", output.values(true), forward.output, ERROR<T>);
  Array rows = lse.values(true);
  rows.shape.pop_back();
  expect_near("lse", rows, forward.lse, 1e-5 + 0.1 * ERROR<T>);

  problem.d_output = described(d_output.view());
  problem.d_query = described(d_query.view());
  problem.d_key = described(d_key.view());
  problem.d_value = described(d_value.view());
  problem.delta = delta.view().data();
  problem.d_query_sum = d_query_sum.view().data();
  for (const int deterministic : {0, 1}) {
    problem.deterministic = deterministic;
    REQUIRE_MESSAGE(flashkata_backward(&problem) == FLASHKATA_OK, flashkata_message());
    synchronize();
    expect_near("d_query", d_query.values(true), gradients.query, 2 * ERROR<T>);
    expect_near("d_key", d_key.values(true), gradients.key, 2 * ERROR<T>);
    expect_near("d_value", d_value.values(true), gradients.value, 2 * ERROR<T>);
  }
  for (const Device* each : {&query, &key, &value, &d_output}) each->expect_unchanged();
}

}  // namespace

TEST_SUITE("tests.bindings") {
  TEST_CASE("kernels in fp32 fp16 and bf16 forward and backward") {
    SUBCASE("fp32") { forward_and_backward<float>(true); }
    SUBCASE("fp16") { forward_and_backward<fp16>(true); }
    SUBCASE("bf16") { forward_and_backward<bf16>(true); }
  }

  TEST_CASE("the tiled steps in fp32 forward and backward") {
    if (std::strcmp(flashkata_gpu(), "virtual") != 0) return skip("the buffers of this test are the GPU's");
    forward_and_backward<float>(false);
  }

  TEST_CASE("a bad argument is named and nothing is written") {
    Tensor<float, 4> q = normal({1, 1, 4, 16}, 1);
    Tensor<float, 4> k = normal({1, 1, 5, 16}, 2);
    Tensor<float, 4> wrong = normal({1, 1, 6, 16}, 3);
    Tensor<float, 4> output = filled({1, 1, 4, 16}, 7.0f);
    float lse[4] = {7, 7, 7, 7};
    flashkata_attention problem{};
    problem.scale = 0.25f;
    problem.query = described(q.view());
    problem.key = described(k.view());
    problem.value = described(wrong.view());
    problem.output = described(output.view());
    problem.lse = lse;
    CHECK(flashkata_forward(&problem) == FLASHKATA_BAD_ARGUMENT);
    CHECK(std::string(flashkata_message()) == "v: got [1, 1, 6, 16], allowed is [1, 1, 5, 16]");

    problem.value = described(k.view());
    CHECK(flashkata_forward(&problem) == FLASHKATA_OK);
    CHECK(std::string(flashkata_message()).empty());
    CHECK(output(0, 0, 0, 0) != 7.0f);

    output = filled({1, 1, 4, 16}, 7.0f);
    problem.output = described(output.view());
    problem.output.shape[2] = 3;
    CHECK(flashkata_forward(&problem) == FLASHKATA_BAD_ARGUMENT);
    CHECK(std::string(flashkata_message()) == "output: got [1, 1, 3, 16], allowed is [1, 1, 4, 16]");
    problem.output.shape[2] = 4;
    problem.type = FLASHKATA_FLOAT16;
    CHECK(flashkata_forward(&problem) == FLASHKATA_BAD_ARGUMENT);
    CHECK(std::string(flashkata_message()) == "type: got 1, allowed is 0 (float32) on the CPU");
    problem.gpu = 1;
    problem.type = 3;
    CHECK(flashkata_backward(&problem) == FLASHKATA_BAD_ARGUMENT);
    CHECK(std::string(flashkata_message()) == "type: got 3, allowed is 0 (float32), 1 (float16) or 2 (bfloat16)");
    for (Index i = 0; i < output.count(); ++i) CHECK(output.data()[i] == 7.0f);
  }

  TEST_CASE("says whose answers it holds") { CHECK(std::string(flashkata_answers()) == KATA_ANSWERS); }
}
