// One backward pass on the GPU: the parameters of steps 04 and 05.
#pragma once

#include "phase2_forward/flash.hpp"

namespace flashkata {

/// The gradients of a loss with respect to query, key and value, from d_output, its gradient with respect to the output
/// of flash_forward(): with P = exp(scale Q K^T - lse), dP = dO V^T and delta = rowsum(dO * O),
///
///     dV = P^T dO,    dS = P * (dP - delta),    dQ = scale dS K,    dK = scale dS^T Q
///
/// (Dao 2023, FlashAttention-2, alg. 2). All memory is the GPU's. The channels of a row are neighbours in memory; rows,
/// heads and batch items may lie further apart, at multiples of 16 bytes. delta and d_query_sum are scratch: they hold
/// anything before the call and anything after it; whoever needs no scratch leaves them alone.
template <typename T>
struct FlashBackward {
  View<const T, 4> query;           // [B, H, Sq, D]
  View<const T, 4> key;             // [B, H, Sk, D]
  View<const T, 4> value;           // [B, H, Sk, D]
  View<const T, 4> output;          // [B, H, Sq, D], from the forward pass
  View<const float, 3> lse;         // [B, H, Sq], from the forward pass; -inf where a query may attend to nothing
  View<const T, 4> d_output;        // [B, H, Sq, D]
  View<T, 4> d_query;               // [B, H, Sq, D]
  View<T, 4> d_key;                 // [B, H, Sk, D]
  View<T, 4> d_value;               // [B, H, Sk, D]
  View<float, 3> delta;             // [B, H, Sq], scratch for rowsum(dO * O), one row after the other
  View<float, 4> d_query_sum;       // [B, H, Sq, D], scratch for sums of dQ in fp32, one row after the other
  bool causal = false;              // key j is visible to query i when j <= i + Sk - Sq
  std::optional<float> scale = {};  // multiplies query key^T; default 1 / sqrt(D)
  bool deterministic = false;       // true: the same inputs give the same bits, whatever order the blocks run in
};

/// Throws std::invalid_argument naming the argument, its value and what is allowed. Stubs call it in their first line.
template <typename T>
void check_flash_backward(const FlashBackward<T>& problem, KeyHeads key_heads = KeyHeads::as_queries) {
  const Shape<4>& q = problem.query.shape();
  // The forward pass's arguments under the same rules. Nothing is written, so const does not matter here.
  check_flash_forward(
      FlashForward<T>{
          .query = problem.query,
          .key = problem.key,
          .value = problem.value,
          .output = View<T, 4>(const_cast<T*>(problem.output.data()), problem.output.shape(), problem.output.strides()),
          .lse = View<float, 3>(const_cast<float*>(problem.lse.data()), problem.lse.shape(), problem.lse.strides()),
          .causal = problem.causal,
          .scale = problem.scale,
      },
      key_heads);
  const auto check_like = [](const auto& view, const char* name, const Shape<4>& shape, const char* as) {
    require(view.shape() == shape, name, to_text(view.shape()), to_text(shape) + ", as " + as);
    flash_detail::check_layout(view, name);
  };
  check_like(problem.d_output, "d_output", q, "query");
  check_like(problem.d_query, "d_query", q, "query");
  check_like(problem.d_key, "d_key", problem.key.shape(), "key");
  check_like(problem.d_value, "d_value", problem.value.shape(), "value");
  const auto check_scratch = [](const auto& view, const char* name, const auto& shape) {
    require(view.shape() == shape, name, to_text(view.shape()), to_text(shape));
    const auto packed = std::remove_cvref_t<decltype(view)>(view.data(), shape);
    require(view.strides() == packed.strides(), name, "strides " + to_text(view.strides()),
            to_text(packed.strides()) + ", one row after the other");
    flash_detail::check_address(view.data(), name);
  };
  check_scratch(problem.delta, "delta", Shape<3>{q[0], q[1], q[2]});
  check_scratch(problem.d_query_sum, "d_query_sum", q);
}

}  // namespace flashkata
