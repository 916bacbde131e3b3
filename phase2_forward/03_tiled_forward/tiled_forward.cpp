#include "tiled_forward.hpp"

namespace flashkata {

TiledResult tiled_forward(View<const float, 4> q, View<const float, 4> k, View<const float, 4> v,
                          const TiledOptions& options) {
  check_tiled(q, k, v, options);
  // TODO, about 45 lines: for each tile of queries, walk the tiles of keys with a running maximum and a running sum.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
