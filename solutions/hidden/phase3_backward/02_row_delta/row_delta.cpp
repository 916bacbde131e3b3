#include "row_delta.hpp"

namespace flashkata {

Tensor<float, 3> row_delta(View<const float, 4> output, View<const float, 4> d_output) {
  check_row_delta(output, d_output);
  Tensor<float, 3> delta({output.size(0), output.size(1), output.size(2)});
  for (Index b = 0; b < output.size(0); ++b) {
    for (Index h = 0; h < output.size(1); ++h) {
      const View<const float, 2> o = output[b][h];      // [Sq, Dv]
      const View<const float, 2> d_o = d_output[b][h];  // [Sq, Dv]
      for (Index i = 0; i < output.size(2); ++i) {
        // The view knows how far apart two channels lie; in the gradient of a sum they are one and the same place.
        float sum = 0.0f;
        for (Index c = 0; c < output.size(3); ++c) sum += d_o(i, c) * o(i, c);
        delta(b, h, i) = sum;
      }
    }
  }
  return delta;
}

}  // namespace flashkata
