#pragma once

#include <memory>

#include "common/attention/not_implemented.hpp"
#include "engine.hpp"

namespace flashkata {

/// A tensor that collects a gradient, like a leaf of PyTorch's graph. Scalar is float or double.
template <typename Scalar>
struct Variable {
  Tensor<Scalar, 4> value;                      // [B, H, S, D]
  bool needs_gradient = true;                   // false: frozen, an input, a label
  std::optional<Tensor<Scalar, 4>> gradient{};  // none until a backward pass has been; then the sum over all of them
};

template <typename Scalar>
using SharedVariable = std::shared_ptr<Variable<Scalar>>;

/// Attention as a node of a graph: it computes, remembers what the way back will need, and goes it when asked. What
/// torch.autograd.Function is in PyTorch.
template <typename Scalar>
class AttentionFunction {
 public:
  explicit AttentionFunction(const AttentionOptions& options = {});
  ~AttentionFunction();
  AttentionFunction(AttentionFunction&&) noexcept;

  /// output = softmax(scale q k^T) v, [B, H, Sq, Dv], of q [B, H, Sq, D], k [B, H, Sk, D], v [B, H, Sk, Dv].
  ///
  /// If any of the three needs a gradient, saves for backward() the values of q, k and v as they are now, the output
  /// and one number for each query, and not a byte that grows with Sq Sk: the caller may change the values and the
  /// output afterwards. If none does, nothing is saved. A second forward() forgets the first. Throws
  /// std::invalid_argument naming the argument, its shape and what is allowed, before anything is saved.
  Tensor<Scalar, 4> forward(const SharedVariable<Scalar>& q, const SharedVariable<Scalar>& k,
                            const SharedVariable<Scalar>& v);

  /// Adds the gradients of sum(d_output * output) to the variables of the last forward() that need one; to the others
  /// nothing happens. One Variable may have been q, k and v at once: it gets the sum of all three. May be called more
  /// than once; every call adds. d_output [B, H, Sq, Dv], any strides but a contiguous last axis. Throws
  /// std::invalid_argument naming the argument, its shape and what is allowed, before any gradient has changed: also
  /// when there was no forward(), or none whose inputs needed a gradient.
  void backward(View<const Scalar, 4> d_output);

  /// Whether backward() may be called.
  bool can_go_back() const;

 private:
  struct Saved;  // yours: what the way back needs

  AttentionOptions options_;
  std::unique_ptr<Saved> saved_;  // null: nothing saved
};

}  // namespace flashkata
