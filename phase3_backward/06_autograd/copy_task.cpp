#include "copy_task.hpp"

namespace flashkata {

float train_step(const CopyTask& task, CopyLayer& layer, float learning_rate) {
  check_copy_layer(task, layer);
  // TODO, about 30 lines: embed, project, attend; the loss and its gradient with respect to the output; back through
  // the attention, then through the projections; then one step downhill.
  throw NotImplemented(__FILE__);
}

Tensor<float, 3> predict(const CopyTask& task, const CopyLayer& layer) {
  check_copy_layer(task, layer);
  // TODO, about 10 lines: the first half of a step. Nobody needs a gradient here.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
