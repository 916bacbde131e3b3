// Products of tiles that lie in the cache: c = a b, c += a b and c += a^T b.
//
// Eigen's product copies both factors into an order of its own first, which pays off for large matrices. A tile of
// attention is so small that copying takes a sixth of the time; these read it where it is.
#pragma once

#include "common/attention/tensor.hpp"

namespace flashkata {
namespace product_detail {

#if defined(__AVX512F__)
constexpr Index LANES = 16, ACROSS = 4;  // floats in a register; registers across a block, of 32
#elif defined(__AVX__)
constexpr Index LANES = 8, ACROSS = 2;  // of 16
#else
constexpr Index LANES = 4, ACROSS = 2;  // of 16
#endif
constexpr Index ROWS = 6;  // of a block: 6 x 4 or 6 x 2 sums, and there are registers left for what is added to them

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(alignof(float)), may_alias));

struct Factors {
  const float* a;
  Index a_stride;
  const float* b;
  Index b_stride;
  Index depth;  // columns of a, or its rows if it is transposed; rows of b
};

// Rows [row, row + HEIGHT) by columns [col, col + WIDTH * LANES) of the product, in registers from begin to end: for
// that no loop over `sum` may be left when the compiler looks for what can be one, and so it is told to unroll them.
template <int HEIGHT, int WIDTH, bool TRANSPOSED>
void multiply_block(const Factors& f, Index row, Index col, float* c, Index c_stride, bool add) {
  Lanes sum[HEIGHT][WIDTH];
#pragma GCC unroll 8
  for (int y = 0; y < HEIGHT; ++y) {
#pragma GCC unroll 8
    for (int x = 0; x < WIDTH; ++x) {
      sum[y][x] = Lanes{};
      __builtin_prefetch(c + (row + y) * c_stride + col + x * LANES, 1);  // here when the sums are ready
    }
  }
  const float* a = f.a + (TRANSPOSED ? row : row * f.a_stride);
  const float* b = f.b + col;
  for (Index k = 0; k < f.depth; ++k, a += TRANSPOSED ? f.a_stride : 1, b += f.b_stride) {
    const Lanes* const b_row = reinterpret_cast<const Lanes*>(b);
#pragma GCC unroll 8
    for (int y = 0; y < HEIGHT; ++y) {
      const float factor = a[TRANSPOSED ? y : y * f.a_stride];
#pragma GCC unroll 8
      for (int x = 0; x < WIDTH; ++x) sum[y][x] += factor * b_row[x];
    }
  }
#pragma GCC unroll 8
  for (int y = 0; y < HEIGHT; ++y) {
    Lanes* const c_row = reinterpret_cast<Lanes*>(c + (row + y) * c_stride + col);
#pragma GCC unroll 8
    for (int x = 0; x < WIDTH; ++x) c_row[x] = add ? c_row[x] + sum[y][x] : sum[y][x];
  }
}

// Rows [row, rows) of a panel of columns: blocks of HEIGHT, and what is left in lower ones.
template <int HEIGHT, int WIDTH, bool TRANSPOSED>
void multiply_panel(const Factors& f, Index row, Index rows, Index col, float* c, Index c_stride, bool add) {
  for (; row + HEIGHT <= rows; row += HEIGHT) multiply_block<HEIGHT, WIDTH, TRANSPOSED>(f, row, col, c, c_stride, add);
  if constexpr (HEIGHT > 1) multiply_panel<HEIGHT - 1, WIDTH, TRANSPOSED>(f, row, rows, col, c, c_stride, add);
}

// Somebody's rows, where they are. No Eigen::Ref: it takes rows that share one place (stride 0) for packed ones.
using Tile = Eigen::Map<const Matrix, Eigen::Unaligned, Eigen::OuterStride<>>;

template <typename Dense>
Tile tile(const Dense& rows) {
  return {rows.data(), rows.rows(), rows.cols(), Eigen::OuterStride<>(rows.outerStride())};
}

template <bool TRANSPOSED>
void multiply(const Tile& a, const Tile& b, Eigen::Ref<Matrix> c, bool add) {
  const Factors f{a.data(), a.outerStride(), b.data(), b.outerStride(), b.rows()};
  Index col = 0;
  for (; col + ACROSS * LANES <= c.cols(); col += ACROSS * LANES)
    multiply_panel<ROWS, ACROSS, TRANSPOSED>(f, 0, c.rows(), col, c.data(), c.outerStride(), add);
  for (; col + LANES <= c.cols(); col += LANES)
    multiply_panel<ROWS, 1, TRANSPOSED>(f, 0, c.rows(), col, c.data(), c.outerStride(), add);
  if (col == c.cols()) return;
  // Fewer columns than a register holds.
  auto rest = c.rightCols(c.cols() - col);
  if (!add) rest.setZero();
  for (Index row = 0; row < c.rows(); ++row) {
    for (Index k = 0; k < f.depth; ++k) {
      const float factor = TRANSPOSED ? a(k, row) : a(row, k);
      rest.row(row) += factor * b.row(k).tail(rest.cols());
    }
  }
}

}  // namespace product_detail

/// c = a b. Matrices, some rows or columns of them, or one head of a tensor; c must not overlap a or b.
template <typename A, typename B>
void set_product(const A& a, const B& b, Eigen::Ref<Matrix> c) {
  product_detail::multiply<false>(product_detail::tile(a), product_detail::tile(b), c, false);
}

/// c += a b
template <typename A, typename B>
void add_product(const A& a, const B& b, Eigen::Ref<Matrix> c) {
  product_detail::multiply<false>(product_detail::tile(a), product_detail::tile(b), c, true);
}

/// c += a^T b
template <typename A, typename B>
void add_transposed_product(const A& a, const B& b, Eigen::Ref<Matrix> c) {
  product_detail::multiply<true>(product_detail::tile(a), product_detail::tile(b), c, true);
}

}  // namespace flashkata
