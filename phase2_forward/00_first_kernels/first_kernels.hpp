#pragma once

#include "common/attention/not_implemented.hpp"
#include "common/attention/view.hpp"
#include "common/gpu/gpu.hpp"

namespace flashkata {

/// sums(r) = sum over c of matrix(r, c), on the GPU.
///
/// matrix [rows, columns], device memory; its columns are neighbours in memory, its rows may lie further apart
/// sums   [rows], device memory, packed; a row without columns has the sum 0
/// Each element is read once, and the threads of a warp read neighbours in memory. The same matrix gives the same bits
/// again.
/// Throws std::invalid_argument naming the argument, its shape and what is allowed, before anything is written.
void row_sum(View<const float, 2> matrix, View<float, 1> sums, const Stream& stream = {});

/// transposed(c, r) = matrix(r, c), on the GPU.
///
/// matrix     [rows, columns], device memory; columns are neighbours, rows may lie further apart
/// transposed [columns, rows], device memory; likewise; not the memory of matrix
/// Each element is read once and written once, and both the reads and the writes of a warp are neighbours in memory: a
/// tile in shared memory stands between them. No bank of it is asked for more than two words at once.
/// Throws std::invalid_argument naming the argument, its shape and what is allowed, before anything is written.
void transpose(View<const float, 2> matrix, View<float, 2> transposed, const Stream& stream = {});

/// What the two promise to check. The stubs call it in their first line.
inline void check_row_sum(View<const float, 2> matrix, View<float, 1> sums) {
  require(matrix.stride(1) == 1 || matrix.size(1) <= 1, "matrix", "stride(1) = " + std::to_string(matrix.stride(1)),
          "1");
  require(sums.size(0) == matrix.size(0), "sums", to_text(sums.shape()),
          to_text(Shape<1>{matrix.size(0)}) + ", one element for each row of matrix");
  require(sums.stride(0) == 1 || sums.size(0) <= 1, "sums", "stride(0) = " + std::to_string(sums.stride(0)), "1");
}

inline void check_transpose(View<const float, 2> matrix, View<float, 2> transposed) {
  require(matrix.stride(1) == 1 || matrix.size(1) <= 1, "matrix", "stride(1) = " + std::to_string(matrix.stride(1)),
          "1");
  require(transposed.size(0) == matrix.size(1) && transposed.size(1) == matrix.size(0), "transposed",
          to_text(transposed.shape()),
          to_text(Shape<2>{matrix.size(1), matrix.size(0)}) + ", [columns, rows] of matrix");
  require(transposed.stride(1) == 1 || transposed.size(1) <= 1, "transposed",
          "stride(1) = " + std::to_string(transposed.stride(1)), "1");
  require(transposed.stride(0) >= transposed.size(1) || transposed.size(0) <= 1, "transposed",
          "stride(0) = " + std::to_string(transposed.stride(0)),
          "at least " + std::to_string(transposed.size(1)) + ", so that no row lies upon another");
}

}  // namespace flashkata
