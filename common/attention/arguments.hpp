// The checks that a contract promises. Stubs call them in their first line, so that the rest is the lesson.
#pragma once

#include <cmath>
#include <optional>

#include "common/attention/masks.hpp"
#include "common/attention/tensor.hpp"

namespace flashkata {

/// One head: query [Sq, D], key [Sk, D], value [Sk, Dv], mask [Sq, Sk], a finite scale. D must not be 0.
/// Throws std::invalid_argument naming the argument, its shape or value, and what is allowed.
inline void check_head(ConstMatrixView query, ConstMatrixView key, ConstMatrixView value, const Mask& mask,
                       std::optional<float> scale) {
  const auto text = [](Index rows, Index columns) { return to_text(Shape<2>{rows, columns}); };
  const auto shape = [&](const auto& matrix) { return text(matrix.rows(), matrix.cols()); };
  require(query.cols() > 0, "query", shape(query), "[Sq, D] with D at least 1");
  require(key.cols() == query.cols(), "key", shape(key),
          "[Sk, " + std::to_string(query.cols()) + "], as wide as query");
  require(value.rows() == key.rows(), "value", shape(value),
          "[" + std::to_string(key.rows()) + ", Dv], one row for each key");
  const auto check_mask = [&](const auto& matrix) {
    require(matrix.rows() == query.rows() && matrix.cols() == key.rows(), "mask", shape(matrix),
            text(query.rows(), key.rows()) + ", [Sq, Sk]");
  };
  if (const auto* allowed = std::get_if<BoolMatrix>(&mask)) check_mask(*allowed);
  if (const auto* bias = std::get_if<Matrix>(&mask)) check_mask(*bias);
  if (scale) require(std::isfinite(*scale), "scale", *scale, "a finite number");
}

/// Several heads in the model's layout: q [B, Sq, H*D], k [B, Sk, H*D], v [B, Sk, H*Dv], mask [B, Sk].
/// Throws std::invalid_argument naming the argument, its shape or value, and what is allowed.
inline void check_model_layout(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v, Index num_heads,
                               const PaddingMask& mask) {
  const auto whole_heads = [&](const View<const float, 3>& x) { return x.size(2) > 0 && x.size(2) % num_heads == 0; };
  const std::string divisible = "a last axis that num_heads = " + std::to_string(num_heads) + " divides";
  require(num_heads > 0, "num_heads", num_heads, "at least 1");
  require(whole_heads(q), "q", to_text(q.shape()), divisible);
  require(k.size(0) == q.size(0) && k.size(2) == q.size(2), "k", to_text(k.shape()),
          "[" + std::to_string(q.size(0)) + ", Sk, " + std::to_string(q.size(2)) + "], as q");
  require(v.size(0) == k.size(0) && v.size(1) == k.size(1), "v", to_text(v.shape()),
          "[" + std::to_string(k.size(0)) + ", " + std::to_string(k.size(1)) + ", H*Dv], as k");
  require(whole_heads(v), "v", to_text(v.shape()), divisible);
  if (mask) {
    require(mask->rows() == k.size(0) && mask->cols() == k.size(1), "mask",
            to_text(Shape<2>{mask->rows(), mask->cols()}), to_text(Shape<2>{k.size(0), k.size(1)}) + ", [B, Sk]");
  }
}

}  // namespace flashkata
