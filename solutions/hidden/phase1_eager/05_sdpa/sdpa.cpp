#include "sdpa.hpp"

namespace flashkata {
namespace {

// [B, S, H*D] as [B, H, S, D] on the same memory: the next head is D numbers further, the next token a whole row.
View<const float, 4> as_heads(View<const float, 3> x, Index num_heads) {
  const Index width = x.size(2) / num_heads;
  return {x.data(), {x.size(0), num_heads, x.size(1), width}, {x.stride(0), width, x.stride(1), x.stride(2)}};
}

// [B, H, S, D] as [B, S, H*D]. The heads of one token lie apart in the library's result: here a copy is due.
Tensor<float, 3> merged(const Tensor<float, 4>& heads) {
  const auto [batch, num_heads, tokens, width] = heads.shape();
  Tensor<float, 3> model({batch, tokens, num_heads * width});
  for (Index b = 0; b < batch; ++b) {
    for (Index h = 0; h < num_heads; ++h) {
      as_matrix(model.view()[b]).middleCols(h * width, width) = as_matrix(heads.view()[b][h]);
    }
  }
  return model;
}

}  // namespace

Tensor<float, 3> sdpa_bidirectional(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v,
                                    Index num_heads, const PaddingMask& mask) {
  check_model_layout(q, k, v, num_heads, mask);
  const Shape<4> pairs = {q.size(0), num_heads, q.size(1), k.size(1)};

  // Every head and every query of a batch item read the same row of the mask: strides of 0, and nothing is copied.
  std::optional<View<const bool, 4>> allowed;
  if (mask) allowed.emplace(mask->data(), pairs, Shape<4>{k.size(1), 0, 0, 1});

  return merged(
      scaled_dot_product_attention(as_heads(q, num_heads), as_heads(k, num_heads), as_heads(v, num_heads), allowed));
}

Tensor<float, 3> sdpa_causal(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v, Index num_heads,
                             const PaddingMask& mask) {
  check_model_layout(q, k, v, num_heads, mask);
  const Index batch = q.size(0);
  const Index queries = q.size(1);
  const Index keys = k.size(1);

  // The library's is_causal is another triangle where Sq != Sk, and it takes no mask beside it. A mask of ours says
  // both, for every batch item; the heads share it.
  Tensor<bool, 3> allowed({batch, queries, keys});
  for (Index b = 0; b < batch; ++b) {
    for (Index i = 0; i < queries; ++i) {
      for (Index j = 0; j < keys; ++j) allowed(b, i, j) = j <= i + keys - queries && (!mask || (*mask)(b, j));
    }
  }
  const View<const bool, 4> pairs(allowed.data(), {batch, num_heads, queries, keys}, {queries * keys, 0, keys, 1});

  return merged(
      scaled_dot_product_attention(as_heads(q, num_heads), as_heads(k, num_heads), as_heads(v, num_heads), pairs));
}

}  // namespace flashkata
