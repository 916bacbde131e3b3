#include "softmax.hpp"

namespace flashkata {

Matrix softmax_rows(ConstMatrixView scores) {
  // TODO, about 8 lines: the formula in softmax.hpp, for scores of any size.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
