#include "copy_task.hpp"

#include <cmath>

namespace flashkata {
namespace {

// x weights for every sequence: [B, 1, S, D].
SharedVariable<float> projected(const CopyTask& task, const Matrix& weights, bool needs_gradient) {
  Tensor<float, 4> value({task.sequences, 1, task.length, weights.cols()});
  for (Index b = 0; b < task.sequences; ++b) as_matrix(value.view()[b][0]) = task.embedded(b) * weights;
  return std::make_shared<Variable<float>>(Variable<float>{std::move(value), needs_gradient});
}

// The value of a place is its symbol: [B, 1, S, N]. Nothing in it can be learnt.
SharedVariable<float> symbols_of(const CopyTask& task) {
  Tensor<float, 4> value({task.sequences, 1, task.length, task.symbols});
  for (Index b = 0; b < task.sequences; ++b) as_matrix(value.view()[b][0]) = task.embedded(b).leftCols(task.symbols);
  return std::make_shared<Variable<float>>(Variable<float>{std::move(value), false});
}

// x^T dy, summed over the sequences: the gradient of weights in y = x weights.
Matrix weights_gradient(const CopyTask& task, const Tensor<float, 4>& d_projected) {
  Matrix sum = Matrix::Zero(task.embedding(), d_projected.size(3));
  for (Index b = 0; b < task.sequences; ++b) {
    sum += task.embedded(b).transpose() * as_matrix(d_projected.view()[b][0]);
  }
  return sum;
}

}  // namespace

float train_step(const CopyTask& task, CopyLayer& layer, float learning_rate) {
  check_copy_layer(task, layer);
  // Fresh variables in every step, so that no gradient of the last one is left in them.
  const SharedVariable<float> q = projected(task, layer.query_weights, true);
  const SharedVariable<float> k = projected(task, layer.key_weights, true);
  AttentionFunction<float> attention({.causal = true});
  const Tensor<float, 4> output = attention.forward(q, k, symbols_of(task));

  // d loss / d p = -1 / (count p) where p is the probability of the right symbol; the others do not matter.
  const float count = static_cast<float>(task.sequences * (task.length - 1));
  float loss = 0.0f;
  Tensor<float, 4> d_output(output.shape());
  std::fill_n(d_output.data(), d_output.count(), 0.0f);
  for (Index b = 0; b < task.sequences; ++b) {
    for (Index i = 1; i < task.length; ++i) {
      const Index wanted = task.token(b, i - 1);
      const float probability = output(b, 0, i, wanted);
      loss -= std::log(probability) / count;
      d_output(b, 0, i, wanted) = -1.0f / (count * probability);
    }
  }

  attention.backward(d_output);
  layer.query_weights -= learning_rate * weights_gradient(task, *q->gradient);
  layer.key_weights -= learning_rate * weights_gradient(task, *k->gradient);
  return loss;
}

Tensor<float, 3> predict(const CopyTask& task, const CopyLayer& layer) {
  check_copy_layer(task, layer);
  AttentionFunction<float> attention({.causal = true});
  const Tensor<float, 4> output = attention.forward(projected(task, layer.query_weights, false),
                                                    projected(task, layer.key_weights, false), symbols_of(task));
  Tensor<float, 3> probabilities({task.sequences, task.length, task.symbols});
  std::copy_n(output.data(), output.count(), probabilities.data());
  return probabilities;
}

}  // namespace flashkata
