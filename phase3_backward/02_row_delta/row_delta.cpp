#include "row_delta.hpp"

namespace flashkata {

Tensor<float, 3> row_delta(View<const float, 4> output, View<const float, 4> d_output) {
  check_row_delta(output, d_output);
  // TODO, about 8 lines: the sum of row_delta.hpp, for every query.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
