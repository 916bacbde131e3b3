#pragma once

#include <cmath>
#include <optional>

#include "common/attention/not_implemented.hpp"
#include "common/attention/parallel.hpp"
#include "common/attention/tensor.hpp"
#include "phase2_forward/03_tiled_forward/tiled_forward.hpp"
#include "phase3_backward/02_row_delta/row_delta.hpp"

namespace flashkata {

/// Which loop is the outer one, and so which gradients stay at hand while the inner one runs.
enum class LoopOrder {
  keys_outside,     // a tile of keys meets all queries: its dK and dV stay, dQ comes together in memory
  queries_outside,  // a tile of queries meets all keys: its dQ stays, dK and dV come together in memory
};

struct TiledBackwardOptions {
  bool causal = false;           // key j is visible to query i when j <= i + Sk - Sq
  std::optional<float> scale{};  // multiplies query key^T; default 1 / sqrt(D)
  LoopOrder order = LoopOrder::keys_outside;
  Index block_rows = 192;  // Br: queries in a tile
  Index block_cols = 192;  // Bc: keys in a tile
  int threads = 0;         // at most so many; 0: as many as there are cores; 1: the calling thread alone
};

struct TiledGradients {
  Tensor<float, 4> query;  // [B, H, Sq, D]
  Tensor<float, 4> key;    // [B, H, Sk, D]
  Tensor<float, 4> value;  // [B, H, Sk, Dv]
};

/// The backward pass without the matrix (Dao 2023, FlashAttention-2, alg. 2). Of the forward pass it needs the output
/// and one number for each query, the log-sum-exp: the weights of any tile are
///
///     P = exp(scale * q k^T - lse)
///
/// and with delta = row_delta(output, d_output)
///
///     dV += P^T dO,    dS = P * (dO v^T - delta),    dQ += scale dS k,    dK += scale dS^T q.
///
/// q [B, H, Sq, D], k [B, H, Sk, D], v [B, H, Sk, Dv], output and d_output [B, H, Sq, Dv], lse [B, H, Sq] with natural
/// logarithms; any strides, but the last axis of all except lse is contiguous. Dv may differ from D; any length may be
/// 0, D excepted.
///
/// Tiles of block_rows queries by block_cols keys, the last ones smaller; both at least 1, and larger than Sq or Sk if
/// they like. Either loop may be the outer one; both orders give the same gradients, to rounding. Beside the result and
/// copies of the inputs, and up to four copies of the gradients, a thread has memory for a few tiles and no more: never
/// for Sq x Sk or block_rows x Sk numbers. Of a tile that none of its queries may see, no product is computed. The same
/// bits come out for any number of threads.
///
/// A query that may attend to nothing (lse -inf) has gradients of 0 and gives none to any key. A key that nobody may
/// attend to has gradients of exactly 0; what it and its value hold, NaN and inf included, never reaches the gradients
/// of queries that may not attend to it. Throws std::invalid_argument naming the argument, its value and what is
/// allowed.
TiledGradients tiled_backward(View<const float, 4> q, View<const float, 4> k, View<const float, 4> v,
                              View<const float, 4> output, View<const float, 3> lse, View<const float, 4> d_output,
                              const TiledBackwardOptions& options = {});

/// The checks that tiled_backward() promises.
inline void check_tiled_backward(const View<const float, 4>& q, const View<const float, 4>& k,
                                 const View<const float, 4>& v, const View<const float, 4>& output,
                                 const View<const float, 3>& lse, const View<const float, 4>& d_output,
                                 const TiledBackwardOptions& options) {
  check_tiled(q, k, v, options);
  check_tiled_tensor("output", output, {q.size(0), q.size(1), q.size(2), v.size(3)});
  check_tiled_tensor("d_output", d_output, {q.size(0), q.size(1), q.size(2), v.size(3)});
  const Shape<3> rows{q.size(0), q.size(1), q.size(2)};
  require(lse.shape() == rows, "lse", to_text(lse.shape()), to_text(rows) + ", [B, H, Sq]");
}

}  // namespace flashkata
