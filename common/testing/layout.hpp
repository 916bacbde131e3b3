// Where the elements of [B, H, S, D] lie in memory.
#pragma once

#include "common/attention/view.hpp"

namespace flashkata::testing {

enum class Layout {
  heads,         // [B, H, S, D]
  heads_apart,   // [B, H, S, D] with 32 bytes that belong to nobody after each row
  tokens,        // [B, S, H, D], the model's
  tokens_apart,  // ... with 16 bytes after each token
};

/// Strides of [B, H, S, D], in elements of `element_bytes` each.
inline Shape<4> strides_of(const Shape<4>& shape, Layout layout, Index element_bytes) {
  const auto [batch, heads, rows, width] = shape;
  const Index row = layout == Layout::heads_apart ? width + 32 / element_bytes : width;
  const Index token = heads * width + (layout == Layout::tokens_apart ? 16 / element_bytes : 0);
  if (layout == Layout::heads || layout == Layout::heads_apart) return {heads * rows * row, rows * row, row, 1};
  return {rows * token, width, token, 1};
}

/// One for each tensor of a problem.
struct Layouts {
  Layout query = Layout::heads;
  Layout key = Layout::heads;
  Layout value = Layout::heads;
  Layout output = Layout::heads;
};
inline constexpr Layouts TOKENS = {Layout::tokens, Layout::tokens, Layout::tokens, Layout::tokens};
inline constexpr Layouts APART = {Layout::heads_apart, Layout::heads_apart, Layout::heads_apart, Layout::heads_apart};
inline constexpr Layouts MIXED = {Layout::tokens_apart, Layout::heads_apart, Layout::tokens, Layout::heads};
inline constexpr Layouts MIXED_OTHERWISE = {Layout::heads, Layout::tokens, Layout::heads_apart, Layout::tokens_apart};

}  // namespace flashkata::testing
