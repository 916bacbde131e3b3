#include "multi_head.hpp"

namespace flashkata {

Tensor<float, 3> eager_bidirectional(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v,
                                     Index num_heads, const PaddingMask& mask) {
  check_model_layout(q, k, v, num_heads, mask);
  const Index batch = q.size(0);
  const Index queries = q.size(1);
  const Index width = q.size(2) / num_heads;        // D
  const Index value_width = v.size(2) / num_heads;  // Dv

  Tensor<float, 3> output({batch, queries, num_heads * value_width});
  for (Index b = 0; b < batch; ++b) {
    // Every query of a batch item sees the same keys.
    Mask pairs;
    if (mask) pairs = BoolMatrix(mask->row(b).replicate(queries, 1));  // [Sq, Sk]

    const auto query_heads = as_matrix(q[b]);         // [Sq, H*D]
    const auto key_heads = as_matrix(k[b]);           // [Sk, H*D]
    const auto value_heads = as_matrix(v[b]);         // [Sk, H*Dv]
    auto output_heads = as_matrix(output.view()[b]);  // [Sq, H*Dv]
    for (Index h = 0; h < num_heads; ++h) {
      output_heads.middleCols(h * value_width, value_width) =
          attention(query_heads.middleCols(h * width, width), key_heads.middleCols(h * width, width),
                    value_heads.middleCols(h * value_width, value_width), pairs)
              .output;
    }
  }
  return output;
}

}  // namespace flashkata
