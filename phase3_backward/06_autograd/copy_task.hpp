#pragma once

#include <vector>

#include "autograd.hpp"

namespace flashkata {

/// Sequences of symbols. The task: say at every place which symbol stood at the place before.
struct CopyTask {
  Index sequences;          // B
  Index length;             // S
  Index symbols;            // N: symbols are 0 .. N-1
  std::vector<int> tokens;  // [B, S]

  Index embedding() const { return symbols + length; }  // E
  int token(Index b, Index i) const { return tokens[static_cast<std::size_t>(b * length + i)]; }

  /// What the layer sees of sequence b, [S, E]: which symbol stands at a place, one-hot, and which place it is,
  /// one-hot.
  Matrix embedded(Index b) const;
};

/// One causal attention layer: q = x query_weights, k = x key_weights, and the value of a place is its symbol, one-hot.
/// So the output at a place is a probability for each symbol.
struct CopyLayer {
  Matrix query_weights;  // [E, D]
  Matrix key_weights;    // [E, D]
};

/// One step of gradient descent. The loss is the mean, over all places but the first of each sequence, of -log of the
/// probability that the output gives to the symbol of the place before:
///
///     loss = -1 / (B (S - 1)) * sum over b and i >= 1 of log(output[b, i, token(b, i - 1)])
///
/// Computes it and its gradients with AttentionFunction<float>, then weights -= learning_rate * gradient.
/// Returns the loss before the step. The layer's shapes must fit the task; throws std::invalid_argument naming
/// the argument, its shape and what is allowed.
float train_step(const CopyTask& task, CopyLayer& layer, float learning_rate);

/// The output of the layer, [B, S, N]: a probability for each symbol.
Tensor<float, 3> predict(const CopyTask& task, const CopyLayer& layer);

/// The checks that both promise.
inline void check_copy_layer(const CopyTask& task, const CopyLayer& layer) {
  const auto text = [](const Matrix& matrix) { return to_text(Shape<2>{matrix.rows(), matrix.cols()}); };
  const auto rows = std::to_string(task.embedding());
  require(layer.query_weights.rows() == task.embedding() && layer.query_weights.cols() > 0, "query_weights",
          text(layer.query_weights), "[" + rows + ", D], [E, D] with D at least 1");
  require(layer.key_weights.rows() == task.embedding() && layer.key_weights.cols() == layer.query_weights.cols(),
          "key_weights", text(layer.key_weights), text(layer.query_weights) + ", as query_weights");
}

}  // namespace flashkata
