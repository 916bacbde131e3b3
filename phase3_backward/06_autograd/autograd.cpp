#include "autograd.hpp"

namespace flashkata {

template <typename Scalar>
struct AttentionFunction<Scalar>::Saved {
  // TODO, about 5 lines: what does backward() need that it cannot compute again in O(S) memory?
};

template <typename Scalar>
AttentionFunction<Scalar>::AttentionFunction(const AttentionOptions& options) : options_(options) {}

template <typename Scalar>
AttentionFunction<Scalar>::~AttentionFunction() = default;

template <typename Scalar>
AttentionFunction<Scalar>::AttentionFunction(AttentionFunction&&) noexcept = default;

template <typename Scalar>
Tensor<Scalar, 4> AttentionFunction<Scalar>::forward(const SharedVariable<Scalar>& q, const SharedVariable<Scalar>& k,
                                                     const SharedVariable<Scalar>& v) {
  // TODO, about 10 lines: engine::forward(), and what is worth keeping of it.
  throw NotImplemented(__FILE__);
}

template <typename Scalar>
void AttentionFunction<Scalar>::backward(View<const Scalar, 4> d_output) {
  // TODO, about 15 lines: engine::backward(), and each gradient to whom it belongs.
  throw NotImplemented(__FILE__);
}

template <typename Scalar>
bool AttentionFunction<Scalar>::can_go_back() const {
  return saved_ != nullptr;
}

template class AttentionFunction<float>;
template class AttentionFunction<double>;

}  // namespace flashkata
