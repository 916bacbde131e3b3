#pragma once

#include <cmath>
#include <optional>

#include "common/attention/not_implemented.hpp"
#include "common/attention/parallel.hpp"
#include "common/attention/tensor.hpp"

namespace flashkata {

struct TiledOptions {
  bool causal = false;           // key j is visible to query i when j <= i + Sk - Sq
  std::optional<float> scale{};  // multiplies query key^T; default 1 / sqrt(D)
  Index block_rows = 256;        // Br: queries in a tile
  Index block_cols = 256;        // Bc: keys in a tile
  int threads = 0;               // at most so many; 0: as many as there are cores; 1: the calling thread alone
};

struct TiledResult {
  Tensor<float, 4> output;  // [B, H, Sq, Dv]
  Tensor<float, 3> lse;     // [B, H, Sq]; log of the sum of exp(scores), natural logarithm
};

/// Attention without its matrix (Dao 2023, FlashAttention-2, alg. 1; mind that its line 10 misprints the rescaling):
///
///     output = softmax(scale * q k^T) v,    lse = log(rowsum(exp(scale * q k^T)))
///
/// q [B, H, Sq, D], k [B, H, Sk, D], v [B, H, Sk, Dv], with any strides but for the last axis, which is contiguous. Dv
/// may differ from D; any length may be 0, D excepted.
///
/// Tiles of block_rows queries by block_cols keys, the last ones smaller; both at least 1, and larger than Sq or Sk if
/// they like. Beside the result and copies of the inputs, a thread has memory for a few tiles and no more: never for
/// Sq x Sk or block_rows x Sk numbers. Of a tile that none of its queries may see, no product is computed. The same
/// bits come out for any number of threads.
///
/// A query that may attend to nothing has output 0 and lse -inf. What a forbidden key and its value hold, NaN and inf
/// included, never reaches the queries that may not attend to it. Throws std::invalid_argument naming the argument, its
/// value and what is allowed.
TiledResult tiled_forward(View<const float, 4> q, View<const float, 4> k, View<const float, 4> v,
                          const TiledOptions& options = {});

/// One tensor's part of the checks below.
inline void check_tiled_tensor(std::string_view argument, const View<const float, 4>& x, const Shape<4>& shape) {
  require(x.shape() == shape, argument, to_text(x.shape()), to_text(shape));
  require(x.stride(3) == 1 || x.size(3) <= 1, argument, "a last axis of stride " + std::to_string(x.stride(3)),
          "a contiguous last axis");
}

/// The checks that tiled_forward() promises. The way back has options of its own, of which it promises the same.
template <typename Options>
void check_tiled(const View<const float, 4>& q, const View<const float, 4>& k, const View<const float, 4>& v,
                 const Options& options) {
  require(q.size(3) > 0, "q", to_text(q.shape()), "[B, H, Sq, D] with D at least 1");
  check_tiled_tensor("q", q, q.shape());
  check_tiled_tensor("k", k, {q.size(0), q.size(1), k.size(2), q.size(3)});
  check_tiled_tensor("v", v, {q.size(0), q.size(1), k.size(2), v.size(3)});
  if (options.scale) require(std::isfinite(*options.scale), "scale", *options.scale, "a finite number");
  require(options.block_rows > 0, "block_rows", options.block_rows, "at least 1");
  require(options.block_cols > 0, "block_cols", options.block_cols, "at least 1");
  require(options.threads >= 0, "threads", options.threads, "0, for all cores, or more");
}

}  // namespace flashkata
