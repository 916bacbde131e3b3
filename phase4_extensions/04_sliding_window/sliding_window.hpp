// Attention to what is near, and a lid on the scores: forward and backward, on the CPU and on the GPU.
#pragma once

#include "common/attention/not_implemented.hpp"
#include "phase3_backward/flash.hpp"

namespace flashkata {

/// Query i stands at place p = i + Sk - Sq among the keys: the last query at the last key. It sees key j when
///
///     p - left <= j <= p + right    and, if the problem is causal,  j <= p
///
/// so left = 0 and right = 0 is the key at its own place and no other. A window may be larger than everything. The soft
/// cap c puts scores between -c and c, before anything is forbidden (Gemma 2, arXiv:2408.00118, section 2):
///
///     s = scale query key^T,    score = c tanh(s / c),    d score / d s = 1 - tanh(s / c)^2
struct Window {
  std::optional<Index> left = {};   // how many keys before its place a query sees, 0 or more; none: all of them
  std::optional<Index> right = {};  // how many behind it, 0 or more; none: all of them, unless the problem is causal
  float softcap = 0.0f;             // c; 0: none
};

/// FlashAttention's passes with a window (Beltagy et al. 2020, arXiv:2004.05150, figure 2b) and a soft cap. Shapes,
/// layouts and options as in phase2_forward/flash.hpp and phase3_backward/flash.hpp; tiled_* work on the host's memory
/// with ordinary C++, flash_* on the GPU's with kernels. Both do the same.
///
/// Tiles of keys, or of queries, that lie outside of the window for everybody are not even read: the work grows with
/// the window and not with the other length. A query that sees nothing gets output 0, lse -inf and gradients of 0; a
/// key that nobody sees gets gradients of exactly 0. What a query or key holds that is not seen, NaN and inf included,
/// never reaches an output or a gradient. Every element of an output is written, whatever it held. The same inputs give
/// the same bits, in the backward pass of the GPU with `deterministic`; tiled_window_backward() is always so. Memory on
/// the GPU: none beyond the arguments. Throws std::invalid_argument naming the argument, its value and what is allowed.
void tiled_window_forward(const FlashForward<float>& problem, const Window& window);
void tiled_window_backward(const FlashBackward<float>& problem, const Window& window);
void flash_window_forward(const FlashForward<float>& problem, const Window& window, const Stream& stream = {});
void flash_window_backward(const FlashBackward<float>& problem, const Window& window, const Stream& stream = {});

/// The checks that these functions promise. Stubs call them in their first line.
inline void check_window(const Window& window) {
  require(window.left.value_or(0) >= 0, "left", window.left.value_or(0), "0 or more, or none");
  require(window.right.value_or(0) >= 0, "right", window.right.value_or(0), "0 or more, or none");
  require(std::isfinite(window.softcap) && window.softcap >= 0.0f, "softcap", window.softcap, "0, or a finite cap");
}

inline void check_window_forward(const FlashForward<float>& problem, const Window& window) {
  check_flash_forward(problem);
  check_window(window);
}

inline void check_window_backward(const FlashBackward<float>& problem, const Window& window) {
  check_flash_backward(problem);
  check_window(window);
}

}  // namespace flashkata
