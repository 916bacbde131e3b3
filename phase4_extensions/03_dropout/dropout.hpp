#pragma once

#include <cstdint>

#include "common/attention/not_implemented.hpp"
#include "phase3_backward/flash.hpp"
#include "phase4_extensions/03_dropout/philox.hpp"

namespace flashkata {

template <typename T, int Rank>
class Tensor;  // common/attention/tensor.hpp, which kernels do without

/// Dropout on the attention weights: each weight falls with a probability, and those that stay are divided by 1 minus
/// that probability, so that the mean over all masks is the weight (Srivastava et al. 2014; on attention weights in
/// Vaswani et al. 2017).
struct Dropout {
  float probability = 0.0f;  // that a weight falls; at least 0 and less than 1. 0: none falls
  std::uint64_t seed = 0;    // whose random numbers: of a run, a device
  std::uint64_t offset = 0;  // which call: whoever calls gives every forward pass another one
  bool training = true;      // false: evaluation, in which no weight falls and none is divided
};

/// Which weights stay: [B, H, Sq, Sk] of `shape`, true where weight (b, h, i, j) does. This is what the four functions
/// below do, in words: they keep exactly these, forward and backward, on the CPU and on the GPU.
///
/// Each weight falls with the given probability, to within 1/65536. Whether weight (b, h, i, j) falls depends on
/// probability, seed, offset, b, h, i, j (all bits of each) and on nothing else: neither on the shape, nor on tiles or
/// threads, nor on what was called before. Different (seed, offset, b, h, i, j) are independent of each other: seeds
/// and offsets that differ in one bit, in any order or sum, as well as neighbours in any direction.
///
/// Throws std::invalid_argument, as all functions here, naming the argument, its value and what is allowed.
Tensor<bool, 4> dropout_mask(const Dropout& dropout, const Shape<4>& shape);

/// output = (mask * softmax(scale query key^T) / (1 - probability)) value, with the shapes and options of
/// phase2_forward/flash.hpp. lse is that of all weights, fallen or not.
///
/// A query that may attend to nothing has output 0 and lse -inf; one whose weights have all fallen has output 0 and its
/// usual lse. What a forbidden key and its value hold, NaN and inf included, never reaches the queries that may not
/// attend to it. Every element of output and lse is written, whatever it held; the same arguments give the same bits.
///
/// tiled_dropout_forward: on the CPU, all memory is the host's. flash_dropout_forward: on the GPU, all memory is the
/// GPU's, and none is taken beyond the arguments: the mask is never in memory. Tiles of keys are loaded once for at
/// least 16 queries, and those that no query of a block may see are not even read.
void tiled_dropout_forward(const FlashForward<float>& problem, const Dropout& dropout);
void flash_dropout_forward(const FlashForward<float>& problem, const Dropout& dropout, const Stream& stream = {});

/// The gradients of sum(d_output * output) with the mask of the forward pass, which is never stored: it is computed
/// again from the same `dropout`. `output` and `lse` are those of the forward pass with this dropout. With Z = mask /
/// (1 - probability):
///
///     dV = (Z * P)^T dO,    dS = P * (Z * dO V^T - delta),    dQ = scale dS K,    dK = scale dS^T Q
///
/// Shapes and options as in phase3_backward/flash.hpp, scratch and `deterministic` among them; dK and dV of a key that
/// no query may see are exactly 0, and so is dQ of a query that may attend to nothing.
void tiled_dropout_backward(const FlashBackward<float>& problem, const Dropout& dropout);
void flash_dropout_backward(const FlashBackward<float>& problem, const Dropout& dropout, const Stream& stream = {});

// ---- What the contract promises to check ----------------------------------------------------------------------------

inline void check_dropout(const Dropout& dropout) {
  require(dropout.probability >= 0.0f && dropout.probability < 1.0f, "probability", dropout.probability,
          "at least 0 and less than 1");
}

inline void check_dropout_mask(const Dropout& dropout, const Shape<4>& shape) {
  check_dropout(dropout);
  for (const Index length : shape) require(length >= 0, "shape", to_text(shape), "no negative length");
}

inline void check_dropout_forward(const FlashForward<float>& problem, const Dropout& dropout) {
  check_flash_forward(problem);
  check_dropout(dropout);
}

inline void check_dropout_backward(const FlashBackward<float>& problem, const Dropout& dropout) {
  check_flash_backward(problem);
  check_dropout(dropout);
}

}  // namespace flashkata
