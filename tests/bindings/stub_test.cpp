// The C library over stubs: every call says which step is missing, and in which file.
#include <string>

#include "bindings/flashkata.h"
#include "common/testing/suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

struct Buffers {
  Tensor<float, 4> numbers = filled({1, 1, 4, 16}, 0.0f);
  alignas(16) float rows[4] = {};

  flashkata_attention problem(int type, bool gpu) {
    flashkata_attention problem{};
    problem.type = type;
    problem.gpu = gpu;
    problem.scale = 0.25f;
    for (flashkata_tensor* each : {&problem.query, &problem.key, &problem.value, &problem.output, &problem.d_output,
                                   &problem.d_query, &problem.d_key, &problem.d_value}) {
      *each = {numbers.data(), {1, 1, 4, 16}, {64, 64, 16, 1}};
    }
    problem.lse = problem.delta = rows;
    problem.d_query_sum = numbers.data();
    return problem;
  }
};

struct Missing {
  int type;
  bool gpu;
  std::string forward, backward;
};

}  // namespace

TEST_SUITE("tests.bindings") {
  TEST_CASE("a stub is named by its file") {
    const Missing steps[] = {
        {FLASHKATA_FLOAT32, false, "phase2_forward/03_tiled_forward/tiled_forward.cpp",
         "phase3_backward/03_tiled_backward/tiled_backward.cpp"},
        {FLASHKATA_FLOAT32, true, "phase2_forward/04_flash_forward/flash_forward.cu",
         "phase3_backward/04_flash_backward/flash_backward.cu"},
        {FLASHKATA_FLOAT16, true, "phase2_forward/05_flash_forward_mma/flash_forward_mma.cu",
         "phase3_backward/05_flash_backward_mma/flash_backward_mma.cu"},
        {FLASHKATA_BFLOAT16, true, "phase2_forward/05_flash_forward_mma/flash_forward_mma.cu",
         "phase3_backward/05_flash_backward_mma/flash_backward_mma.cu"},
    };
    Buffers buffers;
    for (const Missing& step : steps) {
      const flashkata_attention problem = buffers.problem(step.type, step.gpu);
      CHECK(flashkata_forward(&problem) == FLASHKATA_NOT_IMPLEMENTED);
      CHECK(std::string(flashkata_message()) == step.forward);
      CHECK(flashkata_backward(&problem) == FLASHKATA_NOT_IMPLEMENTED);
      CHECK(std::string(flashkata_message()) == step.backward);
    }
  }
}
