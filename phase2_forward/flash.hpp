// One forward pass on the GPU: the parameters of steps 04 and 05.
#pragma once

#include <cmath>
#include <limits>
#include <optional>

#include "common/attention/view.hpp"
#include "common/gpu/gpu.hpp"

namespace flashkata {

/// output = softmax(scale query key^T) value for every batch item and head, and the log-sum-exp of the scores. All
/// memory is the GPU's. The channels of a row are neighbours in memory; rows, heads and batch items may lie further
/// apart, at multiples of 16 bytes.
template <typename T>
struct FlashForward {
  View<const T, 4> query;           // [B, H, Sq, D], D one of 16, 32, 64, 128
  View<const T, 4> key;             // [B, H, Sk, D]
  View<const T, 4> value;           // [B, H, Sk, D]
  View<T, 4> output;                // [B, H, Sq, D]
  View<float, 3> lse;               // [B, H, Sq], natural logarithm
  bool causal = false;              // key j is visible to query i when j <= i + Sk - Sq
  std::optional<float> scale = {};  // multiplies query key^T; default 1 / sqrt(D)
};

namespace flash_detail {

inline void check_address(const void* data, const char* name) {
  require(reinterpret_cast<std::uintptr_t>(data) % 16 == 0, name,
          "an address that ends in " + std::to_string(reinterpret_cast<std::uintptr_t>(data) % 16),
          "a multiple of 16 bytes");
}

// Rows are read 16 bytes at a time.
template <typename T>
void check_layout(const View<T, 4>& view, const char* name) {
  require(view.stride(3) == 1, name, "stride(3) = " + std::to_string(view.stride(3)), "1");
  constexpr Index ALIGNED = 16 / sizeof(T);
  for (int axis = 0; axis < 3; ++axis) {
    require(view.size(axis) <= 1 || view.stride(axis) % ALIGNED == 0, name,
            "stride(" + std::to_string(axis) + ") = " + std::to_string(view.stride(axis)),
            "a multiple of " + std::to_string(ALIGNED) + " elements, 16 bytes");
  }
  check_address(view.data(), name);
}

}  // namespace flash_detail

/// How many heads K and V have: as many as the queries, or a number that divides it (phase 4).
enum class KeyHeads { as_queries, shared };

/// Throws std::invalid_argument naming the argument, its value and what is allowed. Stubs call it in their first line.
template <typename T>
void check_flash_forward(const FlashForward<T>& problem, KeyHeads key_heads = KeyHeads::as_queries) {
  const Shape<4>& q = problem.query.shape();
  const Index width = q[3];
  require(width == 16 || width == 32 || width == 64 || width == 128, "query", to_text(q),
          "[B, H, Sq, D] with D one of 16, 32, 64, 128");
  const Index shared_heads = problem.key.size(1);
  if (key_heads == KeyHeads::shared) {
    require(shared_heads > 0 && q[1] % shared_heads == 0, "key", to_text(problem.key.shape()),
            "[B, Hk, Sk, D] with an Hk that divides H = " + std::to_string(q[1]));
  }
  const Shape<4> key_shape{q[0], key_heads == KeyHeads::shared ? shared_heads : q[1], problem.key.size(2), width};
  require(problem.key.shape() == key_shape, "key", to_text(problem.key.shape()), to_text(key_shape) + ", as query");
  require(problem.value.shape() == key_shape, "value", to_text(problem.value.shape()), to_text(key_shape) + ", as key");
  require(problem.output.shape() == q, "output", to_text(problem.output.shape()), to_text(q) + ", as query");
  const Shape<3> lse_shape{q[0], q[1], q[2]};
  require(problem.lse.shape() == lse_shape, "lse", to_text(problem.lse.shape()), to_text(lse_shape) + ", [B, H, Sq]");
  require(std::isfinite(problem.scale.value_or(1.0f)), "scale", problem.scale.value_or(1.0f), "a finite number");
  constexpr Index LONGEST = std::numeric_limits<int>::max() / 2;
  require(q[2] <= LONGEST, "query", to_text(q), "a length of at most " + std::to_string(LONGEST));
  require(key_shape[2] <= LONGEST, "key", to_text(key_shape), "a length of at most " + std::to_string(LONGEST));

  flash_detail::check_layout(problem.query, "query");
  flash_detail::check_layout(problem.key, "key");
  flash_detail::check_layout(problem.value, "value");
  flash_detail::check_layout(problem.output, "output");
}

}  // namespace flashkata
