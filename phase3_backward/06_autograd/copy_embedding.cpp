#include "copy_task.hpp"

namespace flashkata {

Matrix CopyTask::embedded(Index b) const {
  Matrix x = Matrix::Zero(length, embedding());
  for (Index i = 0; i < length; ++i) {
    x(i, token(b, i)) = 1.0f;
    x(i, symbols + i) = 1.0f;
  }
  return x;
}

}  // namespace flashkata
