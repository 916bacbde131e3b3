#include "causal.hpp"

namespace flashkata {

Tensor<float, 3> eager_causal(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v, Index num_heads,
                              const PaddingMask& mask) {
  check_model_layout(q, k, v, num_heads, mask);
  // TODO, about 20 lines: your step 03, with a mask over pairs [Sq, Sk] that knows the triangle and the padding.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
