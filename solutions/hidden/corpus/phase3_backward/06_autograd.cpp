// Answers to 06_autograd, wrong and right. Every deviation stands where somebody made it.
#include "autograd.hpp"

#include <cmath>
#include <functional>
#include <vector>

#include "../corpus.hpp"
#include "copy_task.hpp"

namespace flashkata {
namespace {

using corpus::plays;
using corpus::RIGHT;
using corpus::UNNAMED;

const corpus::Answers answers{
    {"saves the variables, not their values", "save-wrong-tensor"},
    {"saves q as it is now, k and v by reference", UNNAMED},
    {"saves q times its scale", "save-prescaled-query"},
    {"saves the output that the caller may change", "save-shared-output"},
    {"assigns gradients", "grad-assigned"},
    {"adds gradients twice", "grad-added-twice"},
    {"drops gradients that were there before forward", "grad-reset-in-forward"},
    {"drops gradients that were there before backward", "grad-assigned"},
    {"gradients of k and v exchanged", "backward-arity"},
    {"gradients of k and v exchanged if they are of one shape", UNNAMED},
    {"gradients of q and k exchanged", UNNAMED},
    {"gradients to everybody", "needs-input-grad"},
    {"gradients to all if one needs it, zeros for the frozen", "needs-input-grad-zeros"},
    {"gradients to nobody unless all need one", "needs-all-grad"},
    {"needs of k taken from q", "needs-of-query"},
    {"a frozen variable loses its gradient", "frozen-grad-lost"},
    {"one variable in two roles keeps the last", "shared-variable-last"},
    {"the mask is not passed on to backward", "bwd-mask-ignored"},
    {"the scale is not passed on to backward", "bwd-options-scale"},
    {"options not passed on to forward", "options-ignored"},
    {"dO taken for packed", "bwd-dO-stride"},
    {"dO ignored", "bwd-dO-ignored"},
    {"backward once only", "backward-once"},
    {"second backward adds nothing", "backward-once"},
    {"first forward stays", UNNAMED},
    {"saved by all functions together", UNNAMED},
    {"saves though nobody needs it", UNNAMED},
    {"frozen inputs leave the saved of before", UNNAMED},
    {"saves a matrix of scores", UNNAMED},
    {"computes forward again in backward", UNNAMED},
    {"computes forward twice", UNNAMED},
    {"one engine call for each gradient", UNNAMED},
    {"never deletes what it saved", UNNAMED},
    {"keeps every saved for ever in a list", UNNAMED},
    {"holds its variables weakly", UNNAMED},
    {"shape of dO unchecked", UNNAMED},
    {"only the number of elements of dO checked", UNNAMED},
    {"backward without forward does nothing", UNNAMED},
    {"forgets the saved before checking the inputs", UNNAMED},
    {"checks dO after zeroing gradients", UNNAMED},
    {"float alone saves references", UNNAMED},
    {"copy: loss summed", "copy-loss-summed"},
    {"copy: first place counted", "copy-mean-of-all"},
    {"copy: mean over all places", "copy-mean-of-all"},
    {"copy: predicts the symbol of the place itself", "copy-own-symbol"},
    {"copy: not causal", "copy-not-causal"},
    {"copy: predict not causal", UNNAMED},
    {"copy: uphill", "copy-uphill"},
    {"copy: gradient of the last sequence only", UNNAMED},
    {"copy: keys not trained", "copy-half-trained"},
    {"copy: keys step from the new queries", UNNAMED},
    {"copy: gradients kept from step to step", UNNAMED},
    {"copy: loss after the step", UNNAMED},
    {"copy: d loss / d p without the count", "copy-grad-no-mean"},
    {"copy: d loss / d p without the probability", "copy-grad-no-log"},
    {"copy: transposed embedding forgotten", UNNAMED},
    {"copy: predict trains", UNNAMED},
    {"copy: predict of the first sequence for all", UNNAMED},
    {"copy: arguments unchecked", UNNAMED},
    {"copy: stops when the loss is small", UNNAMED},
    {"right: saves pointers to copies", RIGHT},
    {"right: saved as one block of numbers", RIGHT},
    {"right: adds by a loop from the end", RIGHT},
    {"right: zeros first, then adds", RIGHT},
    {"right: returns a copy, saves the original", RIGHT},
    {"right: dO copied before use", RIGHT},
    {"right: saves only what needs it", RIGHT},
    {"right: one sequence at a time", RIGHT},
    {"right: gradient descent in double", RIGHT},
};

template <typename Scalar>
Tensor<Scalar, 4> copy_of(const View<const Scalar, 4>& view) {
  Tensor<Scalar, 4> copy(view.shape());
  for (Index b = 0; b < view.size(0); ++b)
    for (Index h = 0; h < view.size(1); ++h)
      for (Index i = 0; i < view.size(2); ++i)
        for (Index d = 0; d < view.size(3); ++d) copy(b, h, i, d) = view(b, h, i, d);
  return copy;
}

template <typename Scalar>
void scale_by(Tensor<Scalar, 4>& tensor, double factor) {
  for (Index at = 0; at < tensor.count(); ++at) tensor.data()[at] *= static_cast<Scalar>(factor);
}

// The output of the last forward() of any function.
template <typename Scalar>
Tensor<Scalar, 4>& latest_output() {
  static Tensor<Scalar, 4> latest({0, 0, 0, 0});
  return latest;
}

template <typename Scalar>
void accumulate(Variable<Scalar>& variable, Tensor<Scalar, 4> gradient, bool needs) {
  if (plays("a frozen variable loses its gradient") && !needs) variable.gradient.reset();
  if (plays("gradients to all if one needs it, zeros for the frozen") && !needs && !variable.gradient) {
    scale_by(gradient, 0.0);
    variable.gradient = std::move(gradient);
    return;
  }
  if (!needs) return;
  if (plays("right: zeros first, then adds") && !variable.gradient) {
    variable.gradient = Tensor<Scalar, 4>(gradient.shape());
    std::fill_n(variable.gradient->data(), gradient.count(), Scalar(0));
  }
  if (!variable.gradient || variable.gradient->shape() != gradient.shape() || plays("assigns gradients")) {
    variable.gradient = std::move(gradient);
    return;
  }
  const Scalar times = plays("adds gradients twice") ? Scalar(2) : Scalar(1);
  for (Index at = gradient.count(); at-- > 0;) variable.gradient->data()[at] += times * gradient.data()[at];
}

}  // namespace

template <typename Scalar>
struct AttentionFunction<Scalar>::Saved {
  SharedVariable<Scalar> q, k, v;
  std::weak_ptr<Variable<Scalar>> weak_q, weak_k, weak_v;
  std::unique_ptr<Tensor<Scalar, 4>> q_value, k_value, v_value;
  std::shared_ptr<Tensor<Scalar, 4>> output;
  std::unique_ptr<Tensor<Scalar, 3>> lse;
  std::vector<Scalar> scores{};
  const Scalar* caller_output = nullptr;
  int calls = 0;
};

template <typename Scalar>
AttentionFunction<Scalar>::AttentionFunction(const AttentionOptions& options) : options_(options) {}

template <typename Scalar>
AttentionFunction<Scalar>::~AttentionFunction() {
  if (plays("never deletes what it saved")) static_cast<void>(saved_.release());
}

template <typename Scalar>
AttentionFunction<Scalar>::AttentionFunction(AttentionFunction&&) noexcept = default;

template <typename Scalar>
Tensor<Scalar, 4> AttentionFunction<Scalar>::forward(const SharedVariable<Scalar>& q, const SharedVariable<Scalar>& k,
                                                     const SharedVariable<Scalar>& v) {
  if (plays("forgets the saved before checking the inputs")) saved_.reset();
  if (plays("drops gradients that were there before forward")) {
    for (const auto& each : {q, k, v}) each->gradient.reset();
  }
  const AttentionOptions options = plays("options not passed on to forward") ? AttentionOptions{} : options_;
  engine::Forward<Scalar> result = engine::forward(q->value, k->value, v->value, options);
  if (plays("computes forward twice")) result = engine::forward(q->value, k->value, v->value, options);
  const bool needed = q->needs_gradient || k->needs_gradient || v->needs_gradient;
  if (plays("frozen inputs leave the saved of before") && !needed) return std::move(result.output);
  if (plays("first forward stays") && saved_) return std::move(result.output);
  if (plays("keeps every saved for ever in a list")) {
    static std::vector<std::unique_ptr<Saved>> for_ever;
    for_ever.push_back(std::move(saved_));
  }
  saved_.reset();
  if (!needed && !plays("saves though nobody needs it")) return std::move(result.output);

  auto saved = std::make_unique<Saved>();
  saved->weak_q = q;
  saved->weak_k = k;
  saved->weak_v = v;
  if (!plays("holds its variables weakly")) {
    saved->q = q;
    saved->k = k;
    saved->v = v;
  }
  saved->q_value = std::make_unique<Tensor<Scalar, 4>>(copy_of<Scalar>(q->value.view()));
  saved->k_value = std::make_unique<Tensor<Scalar, 4>>(copy_of<Scalar>(k->value.view()));
  saved->v_value = std::make_unique<Tensor<Scalar, 4>>(copy_of<Scalar>(v->value.view()));
  if (plays("saves q times its scale")) {
    scale_by(*saved->q_value, options_.scale.value_or(1.0 / std::sqrt(static_cast<double>(q->value.size(3)))));
  }
  if (plays("saves a matrix of scores")) {
    saved->scores.resize(static_cast<std::size_t>(q->value.size(2) * k->value.size(2)));
  }
  saved->lse = std::make_unique<Tensor<Scalar, 3>>(std::move(result.lse));
  Tensor<Scalar, 4> output = copy_of<Scalar>(result.output.view());
  saved->output = std::make_shared<Tensor<Scalar, 4>>(std::move(result.output));
  saved->caller_output = output.data();
  saved_ = std::move(saved);
  if (plays("saved by all functions together")) latest_output<Scalar>() = copy_of<Scalar>(output.view());
  return output;
}

template <typename Scalar>
void AttentionFunction<Scalar>::backward(View<const Scalar, 4> d_output) {
  if (plays("backward without forward does nothing") && !saved_) return;
  require(saved_ != nullptr, "d_output", to_text(d_output.shape()), "a call after forward()");
  Saved& saved = *saved_;
  if (plays("saved by all functions together") && saved.output->shape() == latest_output<Scalar>().shape()) {
    *saved.output = copy_of<Scalar>(latest_output<Scalar>().view());
  }
  if (plays("checks dO after zeroing gradients")) {
    for (const auto& each : {saved.q, saved.k, saved.v}) {
      if (each->needs_gradient && !each->gradient) {
        each->gradient = Tensor<Scalar, 4>(each->value.shape());
        std::fill_n(each->gradient->data(), each->gradient->count(), Scalar(0));
      }
    }
  }
  Tensor<Scalar, 4> packed({0, 0, 0, 0});
  if (plays("only the number of elements of dO checked")) {
    require(d_output.count() == saved.output->count(), "d_output", to_text(d_output.shape()), "as many");
    packed = copy_of<Scalar>(d_output);
    d_output = View<const Scalar, 4>(packed.data(), saved.output->shape());
  } else if (plays("shape of dO unchecked")) {
    if (d_output.shape() != saved.output->shape()) return;
  } else {
    require(d_output.shape() == saved.output->shape(), "d_output", to_text(d_output.shape()),
            to_text(saved.output->shape()) + ", as the output");
  }
  if (plays("backward once only")) require(saved.calls == 0, "d_output", to_text(d_output.shape()), "one call");
  if (plays("second backward adds nothing") && saved.calls > 0) return;
  ++saved.calls;
  if (plays("drops gradients that were there before backward")) {
    for (const auto& each : {saved.q, saved.k, saved.v}) each->gradient.reset();
  }

  const SharedVariable<Scalar> q = saved.weak_q.lock();
  const SharedVariable<Scalar> k = saved.weak_k.lock();
  const SharedVariable<Scalar> v = saved.weak_v.lock();
  if (!q || !k || !v) return;
  const bool live = plays("saves the variables, not their values") ||
                    (plays("float alone saves references") && sizeof(Scalar) == sizeof(float));
  const bool live_keys = live || plays("saves q as it is now, k and v by reference");
  const Tensor<Scalar, 4>& q_value = live ? q->value : *saved.q_value;
  const Tensor<Scalar, 4>& k_value = live_keys ? k->value : *saved.k_value;
  const Tensor<Scalar, 4>& v_value = live_keys ? v->value : *saved.v_value;

  AttentionOptions options = options_;
  if (plays("the mask is not passed on to backward")) options.causal = false;
  if (plays("the scale is not passed on to backward")) options.scale.reset();
  if (plays("options not passed on to forward")) options = {};
  Tensor<Scalar, 4> own = copy_of<Scalar>(d_output);
  if (plays("dO taken for packed")) {
    // What a packed reading would meet, without leaving the memory that there is.
    const Index last = [&] {
      Index sum = 0;
      for (int axis = 0; axis < 4; ++axis) sum += (d_output.size(axis) - 1) * d_output.stride(axis);
      return sum;
    }();
    for (Index at = 0; at < own.count(); ++at)
      own.data()[at] = d_output.data()[std::min(at, last)] * (at > last ? 0 : 1);
  }
  if (plays("dO ignored")) std::fill_n(own.data(), own.count(), Scalar(1));
  if (plays("saves the output that the caller may change") && saved.caller_output[0] == Scalar(3)) {
    std::fill_n(saved.output->data(), saved.output->count(), Scalar(3));
  }
  if (plays("computes forward again in backward")) {
    engine::Forward<Scalar> again = engine::forward(q_value, k_value, v_value, options);
    *saved.output = std::move(again.output);
  }
  const auto once = [&] {
    return engine::backward(q_value, k_value, v_value, *saved.output, *saved.lse, own, options);
  };
  engine::Gradients<Scalar> gradients = once();
  if (plays("one engine call for each gradient")) {
    gradients.key = std::move(once().key);
    gradients.value = std::move(once().value);
  }
  if (plays("gradients of k and v exchanged")) std::swap(gradients.key, gradients.value);
  if (plays("gradients of k and v exchanged if they are of one shape") &&
      gradients.key.shape() == gradients.value.shape()) {
    std::swap(gradients.key, gradients.value);
  }
  if (plays("gradients of q and k exchanged")) std::swap(gradients.query, gradients.key);

  bool of_q = q->needs_gradient;
  bool of_k = k->needs_gradient;
  bool of_v = v->needs_gradient;
  if (plays("gradients to everybody")) of_q = of_k = of_v = true;
  if (plays("gradients to nobody unless all need one")) of_q = of_k = of_v = of_q && of_k && of_v;
  if (plays("needs of k taken from q")) of_k = of_q;
  if (plays("one variable in two roles keeps the last")) {
    if (q == k || q == v) of_q = false;
    if (k == v) of_k = false;
  }
  accumulate(*q, std::move(gradients.query), of_q);
  accumulate(*k, std::move(gradients.key), of_k);
  accumulate(*v, std::move(gradients.value), of_v);
}

template <typename Scalar>
bool AttentionFunction<Scalar>::can_go_back() const {
  return saved_ != nullptr;
}

template class AttentionFunction<float>;
template class AttentionFunction<double>;

// ---- The copy task --------------------------------------------------------------------------------------------------

namespace {

CopyTask sequence(const CopyTask& task, Index b) {
  const auto first = task.tokens.begin() + b * task.length;
  return {1, task.length, task.symbols, {first, first + task.length}};
}

SharedVariable<float> leaf(const CopyTask& task, const std::function<Matrix(Index)>& rows, Index width, bool needs) {
  Tensor<float, 4> value({task.sequences, 1, task.length, width});
  for (Index b = 0; b < task.sequences; ++b) as_matrix(value.view()[b][0]) = rows(b);
  return std::make_shared<Variable<float>>(Variable<float>{std::move(value), needs});
}

struct Pass {
  SharedVariable<float> q, k;
  Tensor<float, 4> output;
  std::unique_ptr<AttentionFunction<float>> attention;
};

Pass attend(const CopyTask& task, const CopyLayer& layer, bool causal, bool needs) {
  const Index width = layer.query_weights.cols();
  const auto q = leaf(
      task, [&](Index b) { return Matrix(task.embedded(b) * layer.query_weights); }, width, needs);
  const auto k = leaf(
      task, [&](Index b) { return Matrix(task.embedded(b) * layer.key_weights); }, width, needs);
  const auto v = leaf(
      task, [&](Index b) { return Matrix(task.embedded(b).leftCols(task.symbols)); }, task.symbols, false);
  auto attention = std::make_unique<AttentionFunction<float>>(AttentionOptions{.causal = causal});
  Tensor<float, 4> output = attention->forward(q, k, v);
  return {q, k, std::move(output), std::move(attention)};
}

float loss_and_gradient(const CopyTask& task, const Tensor<float, 4>& output, Tensor<float, 4>* d_output) {
  const Index first = plays("copy: first place counted") ? 0 : 1;
  float count = static_cast<float>(task.sequences * (task.length - 1));
  if (plays("copy: mean over all places") || plays("copy: first place counted")) {
    count = static_cast<float>(task.sequences * task.length);
  }
  if (plays("copy: loss summed")) count = 1.0f;
  float loss = 0.0f;
  if (d_output) std::fill_n(d_output->data(), d_output->count(), 0.0f);
  for (Index b = 0; b < task.sequences; ++b) {
    for (Index i = first; i < task.length; ++i) {
      const Index from = plays("copy: predicts the symbol of the place itself") || i == 0 ? i : i - 1;
      const Index wanted = task.token(b, from);
      const float probability = output(b, 0, i, wanted);
      loss -= std::log(probability) / count;
      if (!d_output) continue;
      float derivative = -1.0f / (count * probability);
      if (plays("copy: d loss / d p without the count")) derivative = -1.0f / probability;
      if (plays("copy: d loss / d p without the probability")) derivative = -1.0f / count;
      (*d_output)(b, 0, i, wanted) = derivative;
    }
  }
  return loss;
}

float step_by_sequences(const CopyTask& task, CopyLayer& layer, float learning_rate) {
  // The gradient of the mean is the mean of the gradients.
  Matrix of_query = Matrix::Zero(layer.query_weights.rows(), layer.query_weights.cols());
  Matrix of_key = of_query;
  Pass pass = attend(task, layer, true, true);
  Tensor<float, 4> d_output(pass.output.shape());
  const float loss = loss_and_gradient(task, pass.output, &d_output);
  pass.attention->backward(d_output);
  for (Index b = task.sequences; b-- > 0;) {
    const Matrix x = sequence(task, b).embedded(0);
    of_query += x.transpose() * as_matrix(pass.q->gradient->view()[b][0]);
    of_key += x.transpose() * as_matrix(pass.k->gradient->view()[b][0]);
  }
  layer.query_weights = layer.query_weights - of_query * learning_rate;
  layer.key_weights = layer.key_weights - of_key * learning_rate;
  return loss;
}

}  // namespace

float train_step(const CopyTask& task, CopyLayer& layer, float learning_rate) {
  if (plays("copy: arguments unchecked")) {
    if (layer.query_weights.rows() != task.embedding() || layer.key_weights.cols() != layer.query_weights.cols())
      return 0;
  } else {
    check_copy_layer(task, layer);
  }
  if (plays("right: one sequence at a time")) return step_by_sequences(task, layer, learning_rate);
  Pass pass = attend(task, layer, !plays("copy: not causal"), true);
  Tensor<float, 4> d_output(pass.output.shape());
  float loss = loss_and_gradient(task, pass.output, &d_output);
  if (plays("copy: stops when the loss is small") && loss < 0.5f) return loss;
  pass.attention->backward(d_output);

  const auto gradient = [&](const Tensor<float, 4>& projected) {
    Matrix sum = Matrix::Zero(task.embedding(), projected.size(3));
    for (Index b = 0; b < task.sequences; ++b) {
      if (plays("copy: gradient of the last sequence only")) sum.setZero();
      const Matrix x = plays("copy: transposed embedding forgotten") ? task.embedded(0) : task.embedded(b);
      if (plays("right: gradient descent in double")) {
        sum = (sum.cast<double>() + x.cast<double>().transpose() * as_matrix(projected.view()[b][0]).cast<double>())
                  .cast<float>();
      } else {
        sum += x.transpose() * as_matrix(projected.view()[b][0]);
      }
    }
    return sum;
  };
  Matrix of_query = gradient(*pass.q->gradient);
  Matrix of_key = gradient(*pass.k->gradient);
  if (plays("copy: gradients kept from step to step")) {
    static std::vector<std::pair<Matrix, Matrix>> kept;
    bool found = false;
    for (auto& [a, b] : kept) {
      if (a.rows() == of_query.rows() && a.cols() == of_query.cols()) {
        of_query = (a += of_query);
        of_key = (b += of_key);
        found = true;
      }
    }
    if (!found) kept.emplace_back(of_query, of_key);
  }
  const float sign = plays("copy: uphill") ? -1.0f : 1.0f;
  layer.query_weights -= sign * learning_rate * of_query;
  if (plays("copy: keys step from the new queries")) {
    Pass again = attend(task, layer, true, true);
    loss_and_gradient(task, again.output, &d_output);
    again.attention->backward(d_output);
    of_key = gradient(*again.k->gradient);
  }
  if (!plays("copy: keys not trained")) layer.key_weights -= sign * learning_rate * of_key;
  if (plays("copy: loss after the step")) {
    loss = loss_and_gradient(task, attend(task, layer, true, false).output, nullptr);
  }
  return loss;
}

Tensor<float, 3> predict(const CopyTask& task, const CopyLayer& layer) {
  if (!plays("copy: arguments unchecked")) check_copy_layer(task, layer);
  CopyLayer used = layer;
  if (plays("copy: arguments unchecked") && layer.query_weights.rows() != task.embedding())
    return Tensor<float, 3>({0, 0, 0});
  if (plays("copy: predict trains")) train_step(task, used, 0.1f);
  const bool causal = !plays("copy: not causal") && !plays("copy: predict not causal");
  const Pass pass = attend(task, used, causal, false);
  Tensor<float, 3> probabilities({task.sequences, task.length, task.symbols});
  std::copy_n(pass.output.data(), pass.output.count(), probabilities.data());
  if (plays("copy: predict of the first sequence for all")) {
    const Index each = task.length * task.symbols;
    for (Index b = 1; b < task.sequences; ++b) std::copy_n(pass.output.data(), each, probabilities.data() + b * each);
  }
  return probabilities;
}

}  // namespace flashkata
