// What the benchmark of context parallel attention does on the GPU besides.
#pragma once

#include <array>

#include "common/attention/view.hpp"
#include "common/gpu/gpu.hpp"

namespace flashkata::bench {

/// Which tokens of the sequence the rows of a rank are: row i is token begin[i / rows] + i % rows.
struct Tokens {
  std::array<Index, 2> begin;
  Index rows;
};

/// Normal random numbers, each a function of its place in the whole sequence and of `seed`; so every rank makes its own
/// part of the same tensors. [1, heads, 2 * tokens.rows, width], or any number of rows if there is one chunk.
void fill_normal(View<bf16, 4> local, const Tokens& tokens, Index length, unsigned seed);

/// How far a rank's part is from that of the whole.
struct Difference {
  double rms;      // of the differences, relative to the root mean square of the part of the whole
  double largest;  // of |difference| / (|whole| + the root mean square)
};
Difference difference(View<const bf16, 4> local, View<const bf16, 4> whole, const Tokens& tokens);

/// On the default stream. `bytes` is a multiple of 16.
void copy_bytes(std::byte* to, const std::byte* from, std::size_t bytes);

}  // namespace flashkata::bench
