#include "varlen.hpp"

#include "phase2_forward/03_tiled_forward/tiled_forward.hpp"
#include "phase3_backward/03_tiled_backward/tiled_backward.hpp"

namespace flashkata {

Packing packing_of(const BoolMatrix& mask) {
  // TODO, about 12 lines: walk over the mask; every token adds a place, every item an entry to cu_seqlens.
  throw NotImplemented(__FILE__);
}

Tensor<float, 2> pack(View<const float, 3> x, const Packing& packing) {
  check_pack(x, packing);
  // TODO, about 8 lines: a row for each place.
  throw NotImplemented(__FILE__);
}

Tensor<float, 3> unpack(View<const float, 2> tokens, const Packing& packing, Index length) {
  check_unpack(tokens, packing, length);
  // TODO, about 8 lines: zeros first, then each token to its place.
  throw NotImplemented(__FILE__);
}

void tiled_varlen_forward(const FlashForward<float>& problem, const Sequences& sequences) {
  check_varlen_forward(problem, sequences);
  check_cu_seqlens(problem, sequences);
  // TODO, about 20 lines: for each sequence, views of its rows, your tiled_forward(), and what comes back to its rows.
  throw NotImplemented(__FILE__);
}

void tiled_varlen_backward(const FlashBackward<float>& problem, const Sequences& sequences) {
  check_varlen_backward(problem, sequences);
  check_cu_seqlens(problem, sequences);
  // TODO, about 20 lines: the same with tiled_backward().
  throw NotImplemented(__FILE__);
}

Tensor<float, 3> flash_bidirectional(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v,
                                     Index num_heads, const PaddingMask& mask) {
  check_padded(q, k, v, num_heads, mask);
  // TODO, about 40 lines, for this one and the next together: pack, flash_varlen_forward(), unpack.
  throw NotImplemented(__FILE__);
}

Tensor<float, 3> flash_causal(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v, Index num_heads,
                              const PaddingMask& mask) {
  check_padded(q, k, v, num_heads, mask);
  // TODO, about 1 line.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
