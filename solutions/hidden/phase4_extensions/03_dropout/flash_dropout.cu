// flash_dropout_forward and flash_dropout_backward: attention with dropout on its weights, in fp32
//
// The kernels of steps 2.04 and 3.04. What is new is one question, asked wherever a weight is used: does it stay? The
// answer is computed from the weight's six numbers (kept.hpp), so that a block of 64 queries on the way there, a block
// of 64 keys on the way back and a block of 64 queries for dQ all give the same one, and no mask is ever stored.
#include "dropout.hpp"

#include "solutions/hidden/phase4_extensions/03_dropout/kept.hpp"
#include "solutions/hidden/phase4_extensions/flash_kernels.cuh"

namespace flashkata {
namespace {

using flash_kernels::Dense;

struct WithDropout : Dense {
  static constexpr bool DROPS = true;

  template <typename Problem>
  WithDropout(const Problem& problem, const Dropout& dropout) : Dense(problem), keeps(dropout) {}

  KATA_DEVICE float keep(const flash_kernels::Part& part, int i, int j) const {
    return keeps.of_head(part.batch, part.head)(i, j) ? keeps.factor : 0.0f;
  }

  Keeps keeps;
};

// Where nothing falls, nobody should wait for random numbers.
bool drops(const Dropout& dropout) { return dropout.training && dropout.probability > 0.0f; }

}  // namespace

void flash_dropout_forward(const FlashForward<float>& problem, const Dropout& dropout, const Stream& stream) {
  check_dropout_forward(problem, dropout);
  if (!drops(dropout)) return flash_kernels::launch_forward(problem, Dense(problem), stream);
  flash_kernels::launch_forward(problem, WithDropout(problem, dropout), stream);
}

void flash_dropout_backward(const FlashBackward<float>& problem, const Dropout& dropout, const Stream& stream) {
  check_dropout_backward(problem, dropout);
  if (!drops(dropout)) return flash_kernels::launch_backward(problem, Dense(problem), stream);
  flash_kernels::launch_backward(problem, WithDropout(problem, dropout), stream);
}

}  // namespace flashkata
