#include "sliding_window.hpp"

#include "common/attention/tensor.hpp"

namespace flashkata {

void tiled_window_forward(const FlashForward<float>& problem, const Window& window) {
  check_window_forward(problem, window);
  // TODO, about 40 lines: 2.03's loop over tiles of keys, from the first key that one of the tile's queries sees to the
  // last. Which keys a query sees deserves a function of its own, above: all four passes ask for it.
  throw NotImplemented(__FILE__);
}

void tiled_window_backward(const FlashBackward<float>& problem, const Window& window) {
  check_window_backward(problem, window);
  // TODO, about 40 lines: 3.03's loops over tiles of keys and queries, from the first query that sees one of the tile's
  // keys to the last, and the cap's derivative.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
