// flash_window: attention within a band around the diagonal, of scores under a lid
//
// New here   Which keys a query sees has a beginning as well as an end, so every walk has both, too: the kernels take
//            the first tile that some row of the block sees and stop after the last. A score passes through
//            c tanh(s / c) before anything is forbidden; its derivative comes from the capped score.
// Kernels    those of steps 2.04 and 3.04, templated on these rules: flash_kernels.cuh
// Try        ./kata test 4.04    ./kata profile 4.04
#include "sliding_window.hpp"

#include <algorithm>

#include "solutions/hidden/phase4_extensions/flash_kernels.cuh"

namespace flashkata {
namespace {

using flash_kernels::Dense;
using flash_kernels::KeyRange;
using flash_kernels::Part;

struct Band : Dense {
  int left, right;

  template <typename Problem>
  Band(const Problem& problem, const Window& window) : Dense(problem) {
    // From its last place a query reaches the first key with `keys`, from its first place the last one with `queries`.
    // More than that would see no more, and could overflow in a sum.
    left = static_cast<int>(std::min<Index>(window.left.value_or(keys), keys));
    right = problem.causal ? 0 : static_cast<int>(std::min<Index>(window.right.value_or(queries), queries));
  }

  KATA_DEVICE KeyRange sees(const Part& part, int i) const {
    const int place = i + part.keys - part.queries;
    return {max(0, place - left), min(part.keys, place + right + 1)};
  }
};

struct CappedBand : Band {
  static constexpr bool CAPS = true;
  float softcap;

  template <typename Problem>
  CappedBand(const Problem& problem, const Window& window) : Band(problem, window), softcap(window.softcap) {}

  KATA_DEVICE float cap(float score) const { return softcap * tanhf(score / softcap); }
  KATA_DEVICE float cap_slope(float capped) const {
    const float tangent = capped / softcap;
    return 1.0f - tangent * tangent;
  }
};

}  // namespace

void flash_window_forward(const FlashForward<float>& problem, const Window& window, const Stream& stream) {
  check_window_forward(problem, window);
  if (window.softcap > 0.0f) return flash_kernels::launch_forward(problem, CappedBand(problem, window), stream);
  flash_kernels::launch_forward(problem, Band(problem, window), stream);
}

void flash_window_backward(const FlashBackward<float>& problem, const Window& window, const Stream& stream) {
  check_window_backward(problem, window);
  if (window.softcap > 0.0f) return flash_kernels::launch_backward(problem, CappedBand(problem, window), stream);
  flash_kernels::launch_backward(problem, Band(problem, window), stream);
}

}  // namespace flashkata
