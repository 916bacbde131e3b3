#include "autograd.hpp"

namespace flashkata {
namespace {

template <typename Scalar>
Tensor<Scalar, 4> copy_of(const Tensor<Scalar, 4>& tensor) {
  Tensor<Scalar, 4> copy(tensor.shape());
  std::copy_n(tensor.data(), tensor.count(), copy.data());
  return copy;
}

// A leaf's gradient is a sum over everything that has used it: the first contribution is kept, others are added.
template <typename Scalar>
void accumulate(Variable<Scalar>& variable, Tensor<Scalar, 4> gradient) {
  if (!variable.needs_gradient) return;
  if (!variable.gradient) {
    variable.gradient = std::move(gradient);
    return;
  }
  std::transform(gradient.data(), gradient.data() + gradient.count(), variable.gradient->data(),
                 variable.gradient->data(), std::plus<>());
}

}  // namespace

template <typename Scalar>
struct AttentionFunction<Scalar>::Saved {
  SharedVariable<Scalar> q, k, v;               // who gets the gradients
  Tensor<Scalar, 4> q_value, k_value, v_value;  // as they were: their owners may change them
  Tensor<Scalar, 4> output;                     // for delta = rowsum(dO * O)
  Tensor<Scalar, 3> lse;                        // for P = exp(scale q k^T - lse)
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
  engine::Forward<Scalar> result = engine::forward(q->value, k->value, v->value, options_);
  saved_.reset();
  if (!q->needs_gradient && !k->needs_gradient && !v->needs_gradient) return std::move(result.output);

  // The output goes to the caller, who may change it: what backward() reads is a copy.
  Tensor<Scalar, 4> output = copy_of(result.output);
  saved_.reset(new Saved{q, k, v, copy_of(q->value), copy_of(k->value), copy_of(v->value), std::move(result.output),
                         std::move(result.lse)});
  return output;
}

template <typename Scalar>
void AttentionFunction<Scalar>::backward(View<const Scalar, 4> d_output) {
  require(saved_ != nullptr, "d_output", to_text(d_output.shape()),
          "a call after a forward() of which an input needs a gradient");
  Saved& saved = *saved_;
  require(d_output.shape() == saved.output.shape(), "d_output", to_text(d_output.shape()),
          to_text(saved.output.shape()) + ", as the output");

  engine::Gradients<Scalar> gradients =
      engine::backward(saved.q_value, saved.k_value, saved.v_value, saved.output, saved.lse, d_output, options_);
  accumulate(*saved.q, std::move(gradients.query));
  accumulate(*saved.k, std::move(gradients.key));
  accumulate(*saved.v, std::move(gradients.value));
}

template <typename Scalar>
bool AttentionFunction<Scalar>::can_go_back() const {
  return saved_ != nullptr;
}

template class AttentionFunction<float>;
template class AttentionFunction<double>;

}  // namespace flashkata
