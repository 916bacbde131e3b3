#include "tiled_backward.hpp"

namespace flashkata {

TiledGradients tiled_backward(View<const float, 4> q, View<const float, 4> k, View<const float, 4> v,
                              View<const float, 4> output, View<const float, 3> lse, View<const float, 4> d_output,
                              const TiledBackwardOptions& options) {
  check_tiled_backward(q, k, v, output, lse, d_output, options);
  // TODO, about 80 lines: for each tile, the weights from lse, then five products; once for each order of the loops.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
