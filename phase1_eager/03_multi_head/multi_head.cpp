#include "multi_head.hpp"

namespace flashkata {

Tensor<float, 3> eager_bidirectional(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v,
                                     Index num_heads, const PaddingMask& mask) {
  check_model_layout(q, k, v, num_heads, mask);
  // TODO, about 15 lines: attention() of step 02 for each head of each batch item; as_matrix(q[b]) is [Sq, H*D].
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
