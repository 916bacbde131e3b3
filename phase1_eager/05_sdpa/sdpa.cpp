#include "sdpa.hpp"

namespace flashkata {

Tensor<float, 3> sdpa_bidirectional(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v,
                                    Index num_heads, const PaddingMask& mask) {
  check_model_layout(q, k, v, num_heads, mask);
  // TODO, about 10 lines: views with the library's shape [B, H, S, D] on the same memory, the mask as the library reads
  // it, one call, and the result back as [B, Sq, H*Dv].
  throw NotImplemented(__FILE__);
}

Tensor<float, 3> sdpa_causal(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v, Index num_heads,
                             const PaddingMask& mask) {
  check_model_layout(q, k, v, num_heads, mask);
  // TODO, about 10 lines: the same with the triangle. Read what is_causal means in the library's header first.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
