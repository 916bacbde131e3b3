#include "first_kernels.hpp"

namespace flashkata {

// ---------------------------------------------------------------------------------------------------------------------
// row_sum: sums[r] = sum over c of matrix[r, c]
//
// New here   32 lanes add up one row together: each strides over the columns, then the warp folds its 32 partial sums
//            into one with shuffles; no shared memory, no barrier.
// Grid       ceil(rows / WARPS) blocks of WARPS * 32 threads; one warp owns one row
// Moves      rows * columns floats in, rows floats out: bandwidth is the limit
// Try        ./kata test 2.00    ./kata check 2.00
namespace {
constexpr int WARP = 32;
constexpr int WARPS = 4;  // of a block; enough to hide some latency, any number works

__global__ void row_sum_kernel(const float* matrix,  // [rows, columns]
                               Index row_stride,
                               float* sums,  // [rows]
                               Index rows, Index columns) {
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  const Index row = Index{blockIdx.x} * WARPS + threadIdx.x / WARP;
  if (row >= rows) return;  // whole warps leave together, so no lane is missed below

  // Stage 1. Each lane sums its own columns: lane, lane + 32, ... (neighbouring lanes, neighbouring addresses)
  float partial = 0.0f;
  for (Index column = lane; column < columns; column += WARP) partial += matrix[row * row_stride + column];

  // Stage 2. Fold 32 partial sums into one: after distance d, a lane holds the sum of the 2d lanes of its group.
  for (int distance = 1; distance < WARP; distance *= 2) partial += __shfl_xor_sync(FULL_WARP, partial, distance);

  if (lane == 0) sums[row] = partial;
}
}  // namespace

void row_sum(View<const float, 2> matrix, View<float, 1> sums, const Stream& stream) {
  check_row_sum(matrix, sums);
  if (matrix.size(0) == 0) return;  // a grid must not be empty
  const auto blocks = static_cast<unsigned>(ceil_div(matrix.size(0), WARPS));
  launch(row_sum_kernel, dim3(blocks), dim3(WARPS * WARP), /*shared bytes*/ 0, stream, matrix.data(), matrix.stride(0),
         sums.data(), matrix.size(0), matrix.size(1));
}

// ---------------------------------------------------------------------------------------------------------------------
// transpose: transposed[c, r] = matrix[r, c]
//
// New here   A tile in shared memory stands between reading along rows and writing along rows: the block turns it
//            there, where any order is cheap. One float of padding a row puts a column of it into 32 different banks.
// Grid       (ceil(columns / TILE), ceil(rows / TILE)) blocks of (TILE, ROWS_AT_ONCE) threads; one block owns one tile.
//            A grid ends at 65535 along y, here at 2,097,120 rows; launch() would say so.
// Shared     tile[TILE][TILE + 1]
// Moves      every float in once and out once, in whole sectors
// Try        ./kata test 2.00    ./kata check 2.00    ./kata profile 2.00
namespace {
constexpr int TILE = 32;         // a warp reads one row of the tile
constexpr int ROWS_AT_ONCE = 8;  // so a thread moves four elements, with one index calculation
static_assert(TILE % ROWS_AT_ONCE == 0, "a block walks its tile in whole strides of ROWS_AT_ONCE rows");

__global__ void transpose_kernel(const float* matrix,  // [rows, columns]
                                 Index row_stride,
                                 float* transposed,  // [columns, rows]
                                 Index transposed_stride, Index rows, Index columns) {
  __shared__ float tile[TILE][TILE + 1];  // [rows of matrix, columns of matrix and one float of padding]
  const int x = static_cast<int>(threadIdx.x);
  const Index first_row = Index{blockIdx.y} * TILE;
  const Index first_column = Index{blockIdx.x} * TILE;

  // Stage 1. Read along rows of the matrix: x runs over columns.
  for (int y = static_cast<int>(threadIdx.y); y < TILE; y += ROWS_AT_ONCE) {
    if (first_row + y < rows && first_column + x < columns) {
      tile[y][x] = matrix[(first_row + y) * row_stride + first_column + x];
    }
  }
  __syncthreads();  // tile is full: others may read what this thread wrote

  // Stage 2. Write along rows of the transposed matrix: now x runs over rows of the matrix.
  for (int y = static_cast<int>(threadIdx.y); y < TILE; y += ROWS_AT_ONCE) {
    if (first_column + y < columns && first_row + x < rows) {
      transposed[(first_column + y) * transposed_stride + first_row + x] = tile[x][y];
    }
  }
}
}  // namespace

void transpose(View<const float, 2> matrix, View<float, 2> transposed, const Stream& stream) {
  check_transpose(matrix, transposed);
  if (matrix.count() == 0) return;  // a grid must not be empty
  const dim3 blocks(static_cast<unsigned>(ceil_div(matrix.size(1), TILE)),
                    static_cast<unsigned>(ceil_div(matrix.size(0), TILE)));
  launch(transpose_kernel, blocks, dim3(TILE, ROWS_AT_ONCE), /*shared bytes*/ 0, stream, matrix.data(),
         matrix.stride(0), transposed.data(), transposed.stride(0), matrix.size(0), matrix.size(1));
}

}  // namespace flashkata
