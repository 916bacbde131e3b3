// What the gather form and the ring form have in common: views of chunks and heads, and K and V as they travel.
#pragma once

#include <algorithm>
#include <vector>

#include "context_parallel.hpp"

namespace flashkata {

// Rows begin .. begin + count - 1 of every head, of [B, H, S, D] or [B, H, S].
template <typename T, int Rank>
View<T, Rank> rows_of(const View<T, Rank>& x, Index begin, Index count) {
  Shape<Rank> shape = x.shape();
  shape[2] = count;
  return {x.data() + begin * x.stride(2), shape, x.strides()};
}

// Batch item b with its query heads sorted by the key/value head that they read: [B, H, ...] -> [Hk, H / Hk, ...].
template <typename T, int Rank>
View<T, Rank> by_key_head(const View<T, Rank>& x, Index b, Index key_heads) {
  Shape<Rank> shape = x.shape();
  Shape<Rank> strides = x.strides();
  shape[0] = key_heads;
  shape[1] = x.size(1) / key_heads;
  strides[0] = shape[1] * x.stride(1);
  return {x.data() + b * x.stride(0), shape, strides};
}

// The keys of batch item b for so many query heads, without a copy: [B, Hk, S, D] -> [Hk, H / Hk, S, D].
inline View<const float, 4> shared_by(const View<const float, 4>& x, Index b, Index heads) {
  return {x.data() + b * x.stride(0),
          {x.size(1), heads / x.size(1), x.size(2), x.size(3)},
          {x.stride(1), 0, x.stride(2), x.stride(3)}};
}

inline void copy(const View<const float, 4>& from, const View<float, 4>& to) {
  for (Index b = 0; b < from.size(0); ++b)
    for (Index h = 0; h < from.size(1); ++h) as_matrix(to[b][h]) = as_matrix(from[b][h]);
}

template <int Rank>
Tensor<float, Rank> filled_with(float value, const Shape<Rank>& shape) {
  Tensor<float, Rank> result(shape);
  std::fill_n(result.data(), result.count(), value);
  return result;
}

// One rank's K and V, or their gradients, as one piece of memory: a message.
class KeysAndValues {
 public:
  explicit KeysAndValues(const LocalAttention& local)
      : key_shape_(local.key.shape()),
        value_shape_(local.value.shape()),
        floats_(static_cast<std::size_t>(local.key.count() + local.value.count())) {}

  static KeysAndValues copy_of(const LocalAttention& local) {
    KeysAndValues result(local);
    copy(local.key, result.key());
    copy(local.value, result.value());
    return result;
  }

  View<float, 4> key() { return {floats_.data(), key_shape_}; }
  View<float, 4> value() { return {floats_.data() + key().count(), value_shape_}; }
  std::vector<float>& floats() { return floats_; }

  void operator+=(const KeysAndValues& other) {
    for (std::size_t at = 0; at < floats_.size(); ++at) floats_[at] += other.floats_[at];
  }

 private:
  Shape<4> key_shape_, value_shape_;
  std::vector<float> floats_;
};

// A chunk's place in the sequence and in its rank's rows.
struct Part {
  Index chunk;
  Index row;     // its first row among the rank's
  Index tokens;  // how many rows are tokens
};

inline std::array<Part, 2> parts_of(const Zigzag& zigzag, int rank) {
  const auto [first, second] = chunks_of(zigzag, rank);
  return {Part{first, 0, chunk_tokens(zigzag, first)}, Part{second, chunk_rows(zigzag), chunk_tokens(zigzag, second)}};
}

}  // namespace flashkata
