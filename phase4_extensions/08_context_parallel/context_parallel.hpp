#pragma once

#include <span>

#include "common/distributed/communicator.hpp"
#include "phase2_forward/03_tiled_forward/tiled_forward.hpp"
#include "phase3_backward/03_tiled_backward/tiled_backward.hpp"
#include "zigzag.hpp"

namespace flashkata {

// ---- (a) The zigzag: the rest of zigzag.cpp -------------------------------------------------------------------------

/// [B, H, S, D] -> [B, H, 2C, D], rank r's part of it; padding is 0. `whole` may have any strides.
Tensor<float, 4> zigzag_split(View<const float, 4> whole, int rank, int ranks);

/// The way back: the parts [B, H, 2C, D] of all ranks, in their order, any strides -> [B, H, S, D], S = `tokens`.
/// Padding is left out, whatever it holds.
Tensor<float, 4> zigzag_merge(std::span<const View<const float, 4>> parts, Index tokens);

// ---- (b), (c), (d) Attention of one rank's queries to the keys of all -----------------------------------------------

/// What a rank has. H is a multiple of Hk; query head h reads key/value head h / (H / Hk). Padding may hold anything,
/// NaN included, and reaches nothing.
struct LocalAttention {
  View<const float, 4> query;    // [B, H, 2C, D], any strides, but the last axis of all is contiguous
  View<const float, 4> key;      // [B, Hk, 2C, D]
  View<const float, 4> value;    // [B, Hk, 2C, Dv]
  Index tokens;                  // S, of the whole sequence
  bool causal = false;           // token i sees token j when j <= i
  std::optional<float> scale{};  // multiplies query key^T; default 1 / sqrt(D)
};

// Every rank calls the same function with the same sizes and gets what attention over the whole sequence would give its
// rows: output [B, H, 2C, Dv] and lse [B, H, 2C], natural logarithm; or the gradients of its own query, key and value,
// shaped like them. Of padding: output 0, lse -inf, gradients 0. A query sees a key or it does not: what a key that it
// does not see holds, NaN and inf included, reaches neither its output nor its gradient.
//
// The way back takes what the way forward left: output [B, H, 2C, Dv] and lse [B, H, 2C] of this rank's rows, over the
// keys of all ranks, and d_output [B, H, 2C, Dv]. Sums are made in fp32. Pairs of chunks that see nothing of each other
// are not computed. The same inputs give the same bits; no call remembers another.
//
// Throws std::invalid_argument naming the argument, its value and what is allowed, before anything is sent.

/// The gather form: every rank gets the keys and values of all, by all_gather(), and attends to them. Of K and V
/// together each rank sends what it has, B Hk 2C (D + Dv) floats, once and no more.
TiledResult gather_attention(const LocalAttention& local, Communicator& communicator);  // gather_attention.cpp

/// Gathers again, and what a rank finds out about the keys of others returns to them by reduce_scatter(): again as many
/// floats in each direction as the forward pass sent in one.
TiledGradients gather_attention_backward(const LocalAttention& local, View<const float, 4> output,
                                         View<const float, 3> lse, View<const float, 4> d_output,
                                         Communicator& communicator);

/// The ring form: keys and values travel from rank to rank by shift(), W-1 times B Hk 2C (D + Dv) floats, and never
/// more than two ranks' keys and values are held at once. While a rank computes on some, the next are on their way:
/// every exchange has begun before the work that it can overlap with.
TiledResult ring_attention(const LocalAttention& local, Communicator& communicator);  // ring_attention.cpp

/// Keys and values travel as before. Their gradients travel too, as sums that every rank adds to, W times: the last hop
/// brings them home.
TiledGradients ring_attention_backward(const LocalAttention& local, View<const float, 4> output,
                                       View<const float, 3> lse, View<const float, 4> d_output,
                                       Communicator& communicator);

// ---- The checks that they promise -----------------------------------------------------------------------------------

/// The parts of all ranks, for zigzag_merge(). `rows` is 2C.
inline void check_parts(std::span<const View<const float, 4>> parts, Index tokens) {
  require(!parts.empty(), "parts", "none", "one for each rank");
  require(tokens >= 0, "tokens", tokens, "0 or more");
  const auto ranks = static_cast<Index>(parts.size());
  const Shape<4>& first = parts.front().shape();
  const Index rows = 2 * ((tokens + 2 * ranks - 1) / (2 * ranks));
  for (const View<const float, 4>& part : parts) {
    const Shape<4> want{first[0], first[1], rows, first[3]};
    require(part.shape() == want, "parts", to_text(part.shape()), to_text(want) + ", [B, H, 2C, D]");
  }
}

inline void check_local_attention(const LocalAttention& local, int ranks) {
  const Shape<4>& q = local.query.shape();
  require(local.tokens >= 0, "tokens", local.tokens, "0 or more");
  const Index rows = 2 * ((local.tokens + 2 * ranks - 1) / (2 * ranks));
  require(q[3] > 0 && q[2] == rows, "query", to_text(q),
          "[B, H, " + std::to_string(rows) + ", D] with D at least 1: 2C rows for " + std::to_string(local.tokens) +
              " tokens on " + std::to_string(ranks) + " ranks");
  const Index key_heads = local.key.size(1);
  require(key_heads > 0 && q[1] % key_heads == 0, "key", to_text(local.key.shape()),
          "[B, Hk, 2C, D] with an Hk that divides H = " + std::to_string(q[1]));
  check_tiled_tensor("query", local.query, q);
  check_tiled_tensor("key", local.key, {q[0], key_heads, rows, q[3]});
  check_tiled_tensor("value", local.value, {q[0], key_heads, rows, local.value.size(3)});
  if (local.scale) require(std::isfinite(*local.scale), "scale", *local.scale, "a finite number");
}

inline void check_local_backward(const LocalAttention& local, const View<const float, 4>& output,
                                 const View<const float, 3>& lse, const View<const float, 4>& d_output, int ranks) {
  check_local_attention(local, ranks);
  const Shape<4>& q = local.query.shape();
  check_tiled_tensor("output", output, {q[0], q[1], q[2], local.value.size(3)});
  check_tiled_tensor("d_output", d_output, {q[0], q[1], q[2], local.value.size(3)});
  const Shape<3> rows{q[0], q[1], q[2]};
  require(lse.shape() == rows, "lse", to_text(lse.shape()), to_text(rows) + ", [B, H, 2C]");
}

}  // namespace flashkata
