// Answers to 00_first_kernels, wrong and right. Every deviation stands where somebody made it.
#include "first_kernels.hpp"

#include <algorithm>
#include <vector>

#include "../corpus.hpp"

namespace flashkata {
namespace {

using corpus::plays;
using corpus::RIGHT;
using corpus::UNNAMED;

const corpus::Answers answers{
    // row_sum: wrong numbers.
    {"sum: lane 31 stays out", "sum-lane-missing"},
    {"sum: shuffles reach 16 lanes", "sum-half-warp"},
    {"sum: shuffle distances 1 2 3 4 5", "sum-shuffle-distance"},
    {"sum: shuffle distances from 32 on", "sum-shuffle-distance-32"},
    {"sum: shuffles forget distance 1", "sum-shuffle-no-neighbour"},
    {"sum: lane 31 writes after shuffling down", "sum-wrong-lane-writes"},
    {"sum: up to 32 columns", "sum-first-stride-only"},
    {"sum: last column dropped", "sum-last-column"},
    {"sum: whole strides only", "sum-tail-dropped"},
    {"sum: rows taken for packed", "matrix-rows-packed"},
    {"sum: whole blocks of rows only", "sum-rows-dropped"},
    {"sum: negative numbers dropped", "sum-starts-above"},
    {"sum: columns in place of rows", "sum-of-columns"},
    {"sum: added to what was there", "sum-not-zeroed"},
    {"sum: shuffled up and xor mixed", "sum-shuffle-distance"},
    {"sum: the mean", UNNAMED},
    {"sum: of magnitudes", UNNAMED},
    {"sum: through fp16", UNNAMED},
    {"sum: bf16 partial sums", UNNAMED},
    {"sum: multiplies what is too much by 0", UNNAMED},
    {"sum: grid along y", UNNAMED},
    {"sum: row number in 16 bits", UNNAMED},
    {"sum: grid of the first call kept", UNNAMED},
    {"sum: no launch for 0 columns", UNNAMED},
    {"sum: launches 0 blocks", UNNAMED},
    {"sum: arguments unchecked", UNNAMED},
    {"sum: zeroes its input", UNNAMED},
    {"sum: multiples of 4 columns", UNNAMED},
    {"sum: float atomics from all blocks", UNNAMED},
    // row_sum: wrong memory, synchronisation or structure.
    {"sum: tail unguarded", "out of bounds"},
    {"sum: rows unguarded", "out of bounds"},
    {"sum: every lane writes its part", "global-memory race"},
    {"sum: half the warp has left", "absent lane"},
    {"sum: shuffle mask of 16 lanes", "absent lane"},
    {"sum: float4 wherever the columns fit", "misaligned access"},
    {"sum: tree without a barrier", "shared-memory race"},
    {"sum: tree with a barrier in the branch", "barrier after exit"},
    {"sum: tree with a barrier in either branch", "divergent barrier"},
    {"sum: tree over unset shared memory", "uninitialised read"},
    {"sum: tree in too little shared memory", "out of bounds"},
    {"sum: a row for each thread", UNNAMED},
    {"sum: lanes take neighbouring chunks", UNNAMED},
    {"sum: lanes take every second column", UNNAMED},
    {"sum: loads everything twice", UNNAMED},
    {"sum: on the host", UNNAMED},
    {"sum: scratch in device memory", UNNAMED},
    {"sum: remembers its last answer", UNNAMED},
    // transpose: wrong numbers.
    {"transpose: nothing but copied", "transpose-copied"},
    {"transpose: tile not turned", "transpose-tile-not-turned"},
    {"transpose: blocks not turned", "transpose-blocks-not-turned"},
    {"transpose: mirrored back to front", "transpose-rotated"},
    {"transpose: matrix rows taken for packed", "matrix-rows-packed"},
    {"transpose: target rows taken for packed", UNNAMED},
    {"transpose: whole tiles only", "transpose-tail-dropped"},
    {"transpose: store guarded as the load was", "transpose-guard-not-turned"},
    {"transpose: 8 of 32 rows", "transpose-loop-forgotten"},
    {"transpose: swizzle on one side only", "transpose-swizzle-one-side"},
    {"transpose: last row dropped", "transpose-last-row"},
    {"transpose: rounded to fp16", UNNAMED},
    {"transpose: adds 0", UNNAMED},
    {"transpose: first shape kept", UNNAMED},
    {"transpose: row number in 16 bits", UNNAMED},
    {"transpose: a row of blocks for each row", UNNAMED},
    {"transpose: in its input", UNNAMED},
    {"transpose: pads the gaps with 0", UNNAMED},
    {"transpose: arguments unchecked", UNNAMED},
    {"transpose: launches 0 blocks", UNNAMED},
    // transpose: wrong memory, synchronisation or structure.
    {"transpose: no barrier", "shared-memory race"},
    {"transpose: __syncwarp for the barrier", "shared-memory race"},
    {"transpose: barrier before the tile is full", "shared-memory race"},
    {"transpose: barrier in the branch", "barrier after exit"},
    {"transpose: leaves before the barrier", "barrier after exit"},
    {"transpose: tile used again without a barrier", "shared-memory race"},
    {"transpose: loads unguarded", "out of bounds"},
    {"transpose: stores unguarded", "uninitialised read"},
    {"transpose: tile a row short", "out of bounds"},
    {"transpose: too little dynamic shared memory", "too little dynamic shared memory"},
    {"transpose: copies not waited for", "cp.async not waited for"},
    {"transpose: straight, reads along rows", UNNAMED},
    {"transpose: straight, writes along rows", UNNAMED},
    {"transpose: tile without padding", UNNAMED},
    {"transpose: padding of 4", UNNAMED},
    {"transpose: loads everything twice", UNNAMED},
    {"transpose: on the host", UNNAMED},
    {"transpose: scratch in device memory", UNNAMED},
    {"transpose: through a buffer that it keeps", UNNAMED},
    {"transpose: straight where tiles are ragged", UNNAMED},
    {"transpose: no barrier in odd blocks", "shared-memory race"},
    {"transpose: tile columns from the fifth on", UNNAMED},

    {"right: shuffles down, lane 0 writes", RIGHT},
    {"right: from distance 16 to 1", RIGHT},
    {"right: a block for each row, tree in shared memory", RIGHT},
    {"right: a block for each row, two levels of shuffles", RIGHT},
    {"right: lane 0 adds up 32 numbers in shared memory", RIGHT},
    {"right: float4 where it fits", RIGHT},
    {"right: grid-stride rows", RIGHT},
    {"right: two rows for each warp", RIGHT},
    {"right: four sums in flight", RIGHT},
    {"right: double sums", RIGHT},
    {"right: compensated sums", RIGHT},
    {"right: zeroes, then one atomic addition a row", RIGHT},
    {"right: tiles of 16 x 16", RIGHT},
    {"right: tiles of 64 x 64", RIGHT},
    {"right: a thread for each element of a tile", RIGHT},
    {"right: swizzle in place of padding", RIGHT},
    {"right: tile in dynamic shared memory", RIGHT},
    {"right: grid-stride tiles", RIGHT},
    {"right: double-buffered tiles, one barrier", RIGHT},
    {"right: a warp for each tile, no barrier of the block", RIGHT},
    {"right: cp.async into the tile", RIGHT},
    {"right: turned while written into the tile", RIGHT},
    {"right: grid along x only", RIGHT},
};

constexpr int WARP = 32;
constexpr int WARPS = 4;

// == row_sum ==========================================================================================================

enum class Fold {
  exclusive_or,
  half_warp,
  linear,
  from_32,
  no_neighbour,
  down,
  down_wrong_writer,
  up_and_xor,
  falling
};

struct SumPlay {
  Fold fold = Fold::exclusive_or;
  bool lane_31_out = plays("sum: lane 31 stays out");
  bool first_stride = plays("sum: up to 32 columns");
  bool last_column = plays("sum: last column dropped");
  bool whole_strides = plays("sum: whole strides only");
  bool packed = plays("sum: rows taken for packed");
  bool negative_dropped = plays("sum: negative numbers dropped");
  bool adds_to_old = plays("sum: added to what was there");
  bool adds_atomically = plays("right: zeroes, then one atomic addition a row");
  bool mean = plays("sum: the mean");
  bool magnitudes = plays("sum: of magnitudes");
  bool half = plays("sum: through fp16");
  bool bfloat = plays("sum: bf16 partial sums");
  bool times_zero = plays("sum: multiplies what is too much by 0");
  bool narrow_row = plays("sum: row number in 16 bits");
  bool grid_y = plays("sum: grid along y");
  bool tail_unguarded = plays("sum: tail unguarded");
  bool rows_unguarded = plays("sum: rows unguarded");
  bool all_write = plays("sum: every lane writes its part");
  bool lanes_leave = plays("sum: half the warp has left");
  bool half_mask = plays("sum: shuffle mask of 16 lanes");
  bool chunks = plays("sum: lanes take neighbouring chunks");
  bool every_second = plays("sum: lanes take every second column");
  bool twice = plays("sum: loads everything twice");
  bool zero_input = plays("sum: zeroes its input");
  bool fours = plays("sum: multiples of 4 columns");
};

Fold chosen_fold() {
  if (plays("sum: shuffles reach 16 lanes")) return Fold::half_warp;
  if (plays("sum: shuffle distances 1 2 3 4 5")) return Fold::linear;
  if (plays("sum: shuffle distances from 32 on")) return Fold::from_32;
  if (plays("sum: shuffles forget distance 1")) return Fold::no_neighbour;
  if (plays("sum: lane 31 writes after shuffling down")) return Fold::down_wrong_writer;
  if (plays("sum: shuffled up and xor mixed")) return Fold::up_and_xor;
  if (plays("right: shuffles down, lane 0 writes")) return Fold::down;
  if (plays("right: from distance 16 to 1")) return Fold::falling;
  return Fold::exclusive_or;
}

__device__ float folded(float partial, Fold fold, unsigned mask) {
  switch (fold) {
    case Fold::exclusive_or:
      for (int distance = 1; distance < 32; distance *= 2) partial += __shfl_xor_sync(mask, partial, distance);
      break;
    case Fold::half_warp:
      for (int distance = 1; distance < 16; distance *= 2) partial += __shfl_xor_sync(mask, partial, distance);
      break;
    case Fold::linear:
      for (int distance = 1; distance <= 5; ++distance) partial += __shfl_xor_sync(mask, partial, distance);
      break;
    case Fold::from_32:
      for (int distance = 32; distance > 1; distance /= 2) partial += __shfl_down_sync(mask, partial, distance);
      break;
    case Fold::no_neighbour:
      for (int distance = 16; distance > 1; distance /= 2) partial += __shfl_xor_sync(mask, partial, distance);
      break;
    case Fold::down:
    case Fold::down_wrong_writer:
      for (int distance = 16; distance > 0; distance /= 2) partial += __shfl_down_sync(mask, partial, distance);
      break;
    case Fold::up_and_xor:
      for (int distance = 16; distance > 4; distance /= 2) partial += __shfl_up_sync(mask, partial, distance);
      for (int distance = 4; distance > 0; distance /= 2) partial += __shfl_xor_sync(mask, partial, distance);
      break;
    case Fold::falling:
      for (int distance = 16; distance > 0; distance /= 2) partial += __shfl_xor_sync(mask, partial, distance);
      break;
  }
  return partial;
}

__global__ void row_sum_kernel(const float* matrix, Index row_stride, float* sums, Index rows, Index columns,
                               SumPlay play) {
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  Index row = play.grid_y ? Index{blockIdx.y} : Index{blockIdx.x} * WARPS + threadIdx.x / WARP;
  if (play.narrow_row) row = static_cast<std::uint16_t>(row);
  if (row >= rows && !play.rows_unguarded) return;
  if (play.lanes_leave && lane >= columns) return;
  if (play.packed) row_stride = columns;

  Index first = lane;
  Index end = columns;
  Index step = WARP;
  if (play.first_stride) end = min(columns, Index{WARP});
  if (play.last_column) end = columns - 1;
  if (play.whole_strides) end = columns / WARP * WARP;
  if (play.tail_unguarded) end = ceil_div(columns, WARP) * WARP;
  if (play.fours) end = columns / 4 * 4;
  if (play.chunks) {
    const Index each = ceil_div(columns, WARP);
    first = lane * each;
    end = min(columns, first + each);
    step = 1;
  }
  float partial = 0.0f;
  if (play.every_second) {
    for (Index column = 2 * lane; column < columns; column += 2 * WARP) {
      partial += matrix[row * row_stride + column];
      if (column + 1 < columns) partial += matrix[row * row_stride + column + 1];
    }
  } else if (play.times_zero) {
    const Index size = (rows - 1) * row_stride + columns;
    for (Index start = 0; start < columns; start += WARP) {
      const Index at = row * row_stride + start + lane;
      partial += matrix[at < size ? at : size - 1] * (start + lane < columns ? 1.0f : 0.0f);
    }
  } else {
    for (Index column = first; column < end; column += step) {
      float value = matrix[row * row_stride + column];
      if (play.negative_dropped) value = max(value, 0.0f);
      if (play.magnitudes) value = value < 0.0f ? -value : value;
      if (play.half) value = to_float(to_fp16(value));
      if (play.mean) value /= static_cast<float>(columns);
      partial += value;
      if (play.bfloat) partial = to_float(to_bf16(partial));
      if (play.zero_input) const_cast<float*>(matrix)[row * row_stride + column] = 0.0f;
    }
  }
  if (play.twice) {
    float again = 0.0f;
    for (Index column = lane; column < columns; column += WARP) again += matrix[row * row_stride + column];
    partial = (partial + again) * 0.5f;
  }
  if (play.lane_31_out && lane == 31) partial = 0.0f;
  if (!play.all_write) partial = folded(partial, play.fold, play.half_mask ? 0xffffu : FULL_WARP);
  if (play.adds_to_old && lane == 0) partial += sums[row];
  const int writer = play.fold == Fold::down_wrong_writer ? 31 : 0;
  if (play.adds_atomically) {
    if (lane == 0) atomicAdd(&sums[row], partial);
    return;
  }
  if (lane == writer || play.all_write) sums[row] = partial;
}

// Sums of columns where rows were asked for, with the shapes that were asked for.
__global__ void column_sum_kernel(const float* matrix, Index row_stride, float* sums, Index rows, Index columns) {
  const Index mine = Index{blockIdx.x} * blockDim.x + threadIdx.x;
  if (mine >= rows) return;
  float sum = 0.0f;
  if (mine < columns) {
    for (Index row = 0; row < rows; ++row) sum += matrix[row * row_stride + mine];
  }
  sums[mine] = sum;
}

__global__ void thread_sum_kernel(const float* matrix, Index row_stride, float* sums, Index rows, Index columns) {
  const Index row = Index{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  float sum = 0.0f;
  for (Index column = 0; column < columns; ++column) sum += matrix[row * row_stride + column];
  sums[row] = sum;
}

__global__ void zero_kernel(float* sums, Index rows) {
  const Index row = Index{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row < rows) sums[row] = 0.0f;
}

// 128 columns a block, added up by whoever comes first.
__global__ void atomic_sum_kernel(const float* matrix, Index row_stride, float* sums, Index rows, Index columns) {
  const Index row = blockIdx.x % rows;
  const Index column = blockIdx.x / rows * 128 + threadIdx.x;
  float partial = column < columns ? matrix[row * row_stride + column] : 0.0f;
  partial = folded(partial, Fold::exclusive_or, FULL_WARP);
  if (threadIdx.x % WARP == 0) atomicAdd(&sums[row], partial);
}

constexpr int ROW_THREADS = 128;

struct TreePlay {
  bool no_barrier = plays("sum: tree without a barrier");
  bool barrier_in_branch = plays("sum: tree with a barrier in the branch");
  bool barrier_in_either = plays("sum: tree with a barrier in either branch");
  bool unset = plays("sum: tree over unset shared memory");
};

// A block for each row; the partial sums meet in shared memory.
template <int SIZE>
__global__ void tree_sum_kernel(const float* matrix, Index row_stride, float* sums, Index columns, TreePlay play) {
  __shared__ float partial[SIZE];
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (Index column = thread; column < columns; column += ROW_THREADS) {
    sum += matrix[Index{blockIdx.x} * row_stride + column];
  }
  if (!play.unset || thread < columns) partial[thread] = sum;
  __syncthreads();
  for (int distance = ROW_THREADS / 2; distance > 0; distance /= 2) {
    if (thread < distance) {
      partial[thread] += partial[thread + distance];
      if (play.barrier_in_branch || play.barrier_in_either) __syncthreads();
    } else if (play.barrier_in_either) {
      __syncthreads();
    }
    if (!play.no_barrier && !play.barrier_in_branch && !play.barrier_in_either) __syncthreads();
  }
  if (thread == 0) sums[blockIdx.x] = partial[0];
}

// A block for each row: every warp folds, then the first warp folds what the warps found.
__global__ void two_level_sum_kernel(const float* matrix, Index row_stride, float* sums, Index columns) {
  __shared__ float of_warp[ROW_THREADS / WARP];
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (Index column = thread; column < columns; column += ROW_THREADS) {
    sum += matrix[Index{blockIdx.x} * row_stride + column];
  }
  sum = folded(sum, Fold::down, FULL_WARP);
  if (thread % WARP == 0) of_warp[thread / WARP] = sum;
  __syncthreads();
  if (thread >= WARP) return;
  sum = folded(thread < ROW_THREADS / WARP ? of_warp[thread] : 0.0f, Fold::down, FULL_WARP);
  if (thread == 0) sums[blockIdx.x] = sum;
}

__global__ void serial_end_kernel(const float* matrix, Index row_stride, float* sums, Index columns) {
  __shared__ float partial[WARP];
  const int lane = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (Index column = lane; column < columns; column += WARP) {
    sum += matrix[Index{blockIdx.x} * row_stride + column];
  }
  partial[lane] = sum;
  __syncwarp();
  if (lane != 0) return;
  for (int other = 1; other < WARP; ++other) sum += partial[other];
  sums[blockIdx.x] = sum;
}

// Four columns with one load, where rows begin at multiples of 16 bytes.
__global__ void vector_sum_kernel(const float* matrix, Index row_stride, float* sums, Index columns, bool careless) {
  const int lane = static_cast<int>(threadIdx.x);
  const float* row = matrix + Index{blockIdx.x} * row_stride;
  const bool fits = careless ? columns % 4 == 0 : reinterpret_cast<std::uintptr_t>(row) % 16 == 0;
  const Index whole = fits ? columns / 4 * 4 : 0;
  float sum = 0.0f;
  for (Index column = 4 * lane; column < whole; column += 4 * WARP) {
    const float4 four = *reinterpret_cast<const float4*>(row + column);
    sum += (four.x + four.y) + (four.z + four.w);
  }
  for (Index column = whole + lane; column < columns; column += WARP) sum += row[column];
  sum = folded(sum, Fold::exclusive_or, FULL_WARP);
  if (lane == 0) sums[blockIdx.x] = sum;
}

__global__ void grid_stride_sum_kernel(const float* matrix, Index row_stride, float* sums, Index rows, Index columns) {
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  const Index warps = Index{gridDim.x} * blockDim.x / WARP;
  for (Index row = (Index{blockIdx.x} * blockDim.x + threadIdx.x) / WARP; row < rows; row += warps) {
    float sum = 0.0f;
    for (Index column = lane; column < columns; column += WARP) sum += matrix[row * row_stride + column];
    sum = folded(sum, Fold::exclusive_or, FULL_WARP);
    if (lane == 0) sums[row] = sum;
  }
}

__global__ void two_rows_kernel(const float* matrix, Index row_stride, float* sums, Index rows, Index columns) {
  const int lane = static_cast<int>(threadIdx.x) % 16;
  const Index row = (Index{blockIdx.x} * blockDim.x + threadIdx.x) / 16;
  float sum = 0.0f;
  if (row < rows) {
    for (Index column = lane; column < columns; column += 16) sum += matrix[row * row_stride + column];
  }
  for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_down_sync(FULL_WARP, sum, distance, 16);
  if (row < rows && lane == 0) sums[row] = sum;
}

enum class Adding { four_at_once, in_double, compensated };

__global__ void careful_sum_kernel(const float* matrix, Index row_stride, float* sums, Index columns, Adding adding) {
  const int lane = static_cast<int>(threadIdx.x);
  const float* row = matrix + Index{blockIdx.x} * row_stride;
  float sum = 0.0f;
  if (adding == Adding::four_at_once) {
    float part[4] = {};
    for (Index column = lane; column < columns; column += 4 * WARP) {
      for (int k = 0; k < 4; ++k) {
        if (column + k * WARP < columns) part[k] += row[column + k * WARP];
      }
    }
    sum = (part[0] + part[1]) + (part[2] + part[3]);
  } else if (adding == Adding::in_double) {
    double exact = 0.0;
    for (Index column = lane; column < columns; column += WARP) exact += static_cast<double>(row[column]);
    for (int distance = 1; distance < WARP; distance *= 2) exact += __shfl_xor_sync(FULL_WARP, exact, distance);
    if (lane == 0) sums[blockIdx.x] = static_cast<float>(exact);
    return;
  } else {
    float lost = 0.0f;
    for (Index column = lane; column < columns; column += WARP) {
      const float value = row[column] - lost;
      const float next = sum + value;
      lost = next - sum == value ? 0.0f : (next - sum) - value;  // infinities must not become NaN
      sum = next;
    }
  }
  sum = folded(sum, Fold::exclusive_or, FULL_WARP);
  if (lane == 0) sums[blockIdx.x] = sum;
}

// == transpose ========================================================================================================

struct TilePlay {
  bool copied = plays("transpose: nothing but copied");
  bool tile_not_turned = plays("transpose: tile not turned");
  bool blocks_not_turned = plays("transpose: blocks not turned");
  bool rotated = plays("transpose: mirrored back to front");
  bool packed = plays("transpose: matrix rows taken for packed");
  bool packed_target = plays("transpose: target rows taken for packed");
  bool old_guard = plays("transpose: store guarded as the load was");
  bool one_row = plays("transpose: 8 of 32 rows");
  bool last_row = plays("transpose: last row dropped");
  bool half = plays("transpose: rounded to fp16");
  bool adds_zero = plays("transpose: adds 0");
  bool narrow_row = plays("transpose: row number in 16 bits");
  bool pads = plays("transpose: pads the gaps with 0");
  bool no_barrier = plays("transpose: no barrier");
  bool odd_race = plays("transpose: no barrier in odd blocks");
  bool four_across = plays("transpose: tile columns from the fifth on");
  bool sync_warp = plays("transpose: __syncwarp for the barrier");
  bool early_barrier = plays("transpose: barrier before the tile is full");
  bool barrier_in_branch = plays("transpose: barrier in the branch");
  bool leaves = plays("transpose: leaves before the barrier");
  bool loads_unguarded = plays("transpose: loads unguarded");
  bool stores_unguarded = plays("transpose: stores unguarded");
  bool twice = plays("transpose: loads everything twice");
  bool in_input = plays("transpose: in its input");
};

// ROWS_AT_ONCE rows of TILE threads; PITCH floats from one row of the tile to the next, in TILE_ROWS rows.
template <int TILE, int ROWS_AT_ONCE, int PITCH, int TILE_ROWS = TILE>
__global__ void tile_kernel(const float* matrix, Index row_stride, float* transposed, Index transposed_stride,
                            Index rows, Index columns, TilePlay play) {
  __shared__ float tile[TILE_ROWS][PITCH];
  const int x = static_cast<int>(threadIdx.x);
  Index first_row = Index{blockIdx.y} * TILE;
  Index first_column = Index{blockIdx.x} * TILE;
  if (play.packed) row_stride = columns;
  if (play.packed_target) transposed_stride = rows;
  if (play.narrow_row)
    first_row = static_cast<std::uint16_t>(first_row), first_column = static_cast<std::uint16_t>(first_column);
  if (play.leaves && first_column + x >= columns) return;
  int last = TILE;
  if (play.one_row) last = ROWS_AT_ONCE;

  if (play.early_barrier) __syncthreads();
  for (int y = static_cast<int>(threadIdx.y); y < last; y += ROWS_AT_ONCE) {
    const bool inside = first_row + y < rows && first_column + x < columns;
    if (inside || play.loads_unguarded) {
      float value = matrix[(first_row + y) * row_stride + first_column + x];
      if (play.twice) value = 0.5f * value + 0.5f * matrix[(first_row + y) * row_stride + first_column + x];
      if (play.half) value = to_float(to_fp16(value));
      if (play.adds_zero) value += 0.0f;
      tile[y][x] = value;
    }
    if (play.barrier_in_branch && inside) __syncthreads();
  }
  if (play.four_across && blockIdx.x > 4 && blockIdx.y > 4) return;
  if (play.sync_warp || (play.odd_race && blockIdx.x % 2 == 1)) {
    __syncwarp();
  } else if (!play.no_barrier && !play.early_barrier && !play.barrier_in_branch) {
    __syncthreads();
  }

  if (play.blocks_not_turned) {
    const Index other = first_row;
    first_row = first_column;
    first_column = other;
  }
  for (int y = static_cast<int>(threadIdx.y); y < last; y += ROWS_AT_ONCE) {
    const Index target_row = first_column + y;
    Index target_column = first_row + x;
    bool inside = target_row < columns && target_column < rows - play.last_row;
    if (play.old_guard) inside = first_row + y < rows && first_column + x < columns && inside;
    if (play.stores_unguarded) inside = target_row < columns;
    if (play.rotated) target_column = rows - 1 - target_column;
    if (inside) {
      float* output = play.in_input ? const_cast<float*>(matrix) : transposed;
      output[target_row * transposed_stride + target_column] = play.tile_not_turned ? tile[y][x] : tile[x][y];
    }
    if (play.pads && target_row < columns && target_column >= rows && target_column < transposed_stride) {
      transposed[target_row * transposed_stride + target_column] = 0.0f;
    }
  }
}

// Without shared memory: one side runs along rows, the other jumps.
__global__ void straight_kernel(const float* matrix, Index row_stride, float* transposed, Index transposed_stride,
                                Index rows, Index columns, bool writes_along_rows) {
  const Index along = Index{blockIdx.x} * blockDim.x + threadIdx.x;
  const Index across = blockIdx.y;
  const Index row = writes_along_rows ? along : across;
  const Index column = writes_along_rows ? across : along;
  if (row < rows && column < columns) transposed[column * transposed_stride + row] = matrix[row * row_stride + column];
}

__global__ void copy_kernel(const float* matrix, Index row_stride, float* transposed, Index transposed_stride,
                            Index rows, Index columns) {
  const Index i = Index{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= rows * columns) return;
  transposed[i / rows * transposed_stride + i % rows] = matrix[i / columns * row_stride + i % columns];
}

// Row y of the tile begins at bank y: the column is mixed with the row.
__global__ void swizzled_kernel(const float* matrix, Index row_stride, float* transposed, Index transposed_stride,
                                Index rows, Index columns, bool one_side_only) {
  __shared__ float tile[WARP][WARP];
  const int x = static_cast<int>(threadIdx.x);
  const Index first_row = Index{blockIdx.y} * WARP;
  const Index first_column = Index{blockIdx.x} * WARP;
  for (int y = static_cast<int>(threadIdx.y); y < WARP; y += 8) {
    const bool inside = first_row + y < rows && first_column + x < columns;
    tile[y][x ^ y] = inside ? matrix[(first_row + y) * row_stride + first_column + x] : 0.0f;
  }
  __syncthreads();
  for (int y = static_cast<int>(threadIdx.y); y < WARP; y += 8) {
    if (first_column + y >= columns || first_row + x >= rows) continue;
    transposed[(first_column + y) * transposed_stride + first_row + x] = tile[x][one_side_only ? y : y ^ x];
  }
}

struct DynamicPlay {
  bool turned_on_the_way_in = plays("right: turned while written into the tile");
  bool copies = plays("right: cp.async into the tile") || plays("transpose: copies not waited for");
  bool not_waited = plays("transpose: copies not waited for");
};

__global__ void dynamic_tile_kernel(const float* matrix, Index row_stride, float* transposed, Index transposed_stride,
                                    Index rows, Index columns, DynamicPlay play) {
  float* tile = dynamic_shared<float>();
  const int x = static_cast<int>(threadIdx.x);
  const Index first_row = Index{blockIdx.y} * WARP;
  const Index first_column = Index{blockIdx.x} * WARP;
  for (int y = static_cast<int>(threadIdx.y); y < WARP; y += 8) {
    const bool inside = first_row + y < rows && first_column + x < columns;
    float* cell = tile + (play.turned_on_the_way_in ? x * (WARP + 1) + y : y * (WARP + 1) + x);
    const float* source = matrix + (first_row + y) * row_stride + first_column + x;
    if (play.copies) {
      cp_async_4(cell, source, inside);
    } else if (inside) {
      *cell = *source;
    }
  }
  if (play.copies) {
    cp_async_commit();
    if (!play.not_waited) cp_async_wait<0>();
  }
  __syncthreads();
  for (int y = static_cast<int>(threadIdx.y); y < WARP; y += 8) {
    if (first_column + y >= columns || first_row + x >= rows) continue;
    const float* cell = tile + (play.turned_on_the_way_in ? y * (WARP + 1) + x : x * (WARP + 1) + y);
    transposed[(first_column + y) * transposed_stride + first_row + x] = *cell;
  }
}

// A few blocks walk over all tiles. With two tiles a barrier a round is enough, with one it takes two.
__global__ void walking_kernel(const float* matrix, Index row_stride, float* transposed, Index transposed_stride,
                               Index rows, Index columns, int tiles, bool barrier_before_reuse) {
  __shared__ float tile[2][WARP][WARP + 1];
  const int x = static_cast<int>(threadIdx.x);
  const Index across = ceil_div(columns, WARP);
  const Index all = across * ceil_div(rows, WARP);
  int round = 0;
  for (Index number = blockIdx.x; number < all; number += gridDim.x, ++round) {
    float(&mine)[WARP][WARP + 1] = tile[round % tiles];
    const Index first_row = number / across * WARP;
    const Index first_column = number % across * WARP;
    for (int y = static_cast<int>(threadIdx.y); y < WARP; y += 8) {
      if (first_row + y < rows && first_column + x < columns) {
        mine[y][x] = matrix[(first_row + y) * row_stride + first_column + x];
      }
    }
    __syncthreads();
    for (int y = static_cast<int>(threadIdx.y); y < WARP; y += 8) {
      if (first_column + y < columns && first_row + x < rows) {
        transposed[(first_column + y) * transposed_stride + first_row + x] = mine[x][y];
      }
    }
    if (barrier_before_reuse) __syncthreads();
  }
}

// Every warp turns tiles of its own, 8 rows of 32 columns at a time into 32 rows of 8.
__global__ void warp_tile_kernel(const float* matrix, Index row_stride, float* transposed, Index transposed_stride,
                                 Index rows, Index columns) {
  __shared__ float tiles[2][WARP][WARP + 1];
  float(&tile)[WARP][WARP + 1] = tiles[threadIdx.y];
  const int lane = static_cast<int>(threadIdx.x);
  const Index first_row = Index{blockIdx.y} * WARP;
  const Index first_column = (Index{blockIdx.x} * 2 + threadIdx.y) * WARP;
  for (int y = 0; y < WARP; ++y) {
    if (first_row + y < rows && first_column + lane < columns) {
      tile[y][lane] = matrix[(first_row + y) * row_stride + first_column + lane];
    }
  }
  __syncwarp();
  for (int y = 0; y < WARP; ++y) {
    if (first_column + y < columns && first_row + lane < rows) {
      transposed[(first_column + y) * transposed_stride + first_row + lane] = tile[lane][y];
    }
  }
}

// A grid along x only.
__global__ void one_axis_kernel(const float* matrix, Index row_stride, float* transposed, Index transposed_stride,
                                Index rows, Index columns) {
  __shared__ float tile[WARP][WARP + 1];
  const Index across = ceil_div(columns, WARP);
  const Index first_row = blockIdx.x / across * WARP;
  const Index first_column = blockIdx.x % across * WARP;
  const int x = static_cast<int>(threadIdx.x) % WARP;
  const int y = static_cast<int>(threadIdx.x) / WARP;
  if (first_row + y < rows && first_column + x < columns) {
    tile[y][x] = matrix[(first_row + y) * row_stride + first_column + x];
  }
  __syncthreads();
  if (first_column + y < columns && first_row + x < rows) {
    transposed[(first_column + y) * transposed_stride + first_row + x] = tile[x][y];
  }
}

dim3 blocks_of(Index count) { return {static_cast<unsigned>(count)}; }

}  // namespace

void row_sum(View<const float, 2> matrix, View<float, 1> sums, const Stream& stream) {
  if (!plays("sum: arguments unchecked")) check_row_sum(matrix, sums);
  const Index rows = matrix.size(0);
  const Index columns = matrix.size(1);
  const Index stride = matrix.stride(0);
  const float* data = matrix.data();
  if (rows == 0 && !plays("sum: launches 0 blocks")) return;
  if (columns == 0 && plays("sum: no launch for 0 columns")) return;
  const auto each_row = [&](auto kernel, int threads, auto... more) {
    launch(kernel, blocks_of(rows), dim3(static_cast<unsigned>(threads)), 0, stream, data, stride, sums.data(), columns,
           more...);
  };
  const auto each_thread = [&](auto kernel) {
    launch(kernel, blocks_of(ceil_div(rows, 128)), dim3(128), 0, stream, data, stride, sums.data(), rows, columns);
  };

  if (plays("sum: on the host")) {
    for (Index row = 0; row < rows; ++row) {
      float sum = 0.0f;
      for (Index column = 0; column < columns; ++column) sum += data[row * stride + column];
      sums.data()[row] = sum;
    }
    return;
  }
  if (plays("sum: columns in place of rows")) return each_thread(column_sum_kernel);
  if (plays("sum: a row for each thread")) return each_thread(thread_sum_kernel);
  if (plays("sum: float atomics from all blocks")) {
    launch(zero_kernel, blocks_of(ceil_div(rows, 128)), dim3(128), 0, stream, sums.data(), rows);
    if (columns == 0) return;
    launch(atomic_sum_kernel, blocks_of(rows * ceil_div(columns, 128)), dim3(128), 0, stream, data, stride, sums.data(),
           rows, columns);
    return;
  }
  if (plays("sum: tree in too little shared memory")) {
    return each_row(tree_sum_kernel<ROW_THREADS - 1>, ROW_THREADS, TreePlay{});
  }
  if (plays("right: a block for each row, tree in shared memory") || corpus::name().substr(0, 9) == "sum: tree") {
    return each_row(tree_sum_kernel<ROW_THREADS>, ROW_THREADS, TreePlay{});
  }
  if (plays("right: a block for each row, two levels of shuffles")) return each_row(two_level_sum_kernel, ROW_THREADS);
  if (plays("right: lane 0 adds up 32 numbers in shared memory")) return each_row(serial_end_kernel, WARP);
  if (plays("right: float4 where it fits")) return each_row(vector_sum_kernel, WARP, false);
  if (plays("sum: float4 wherever the columns fit")) return each_row(vector_sum_kernel, WARP, true);
  if (plays("right: four sums in flight")) return each_row(careful_sum_kernel, WARP, Adding::four_at_once);
  if (plays("right: double sums")) return each_row(careful_sum_kernel, WARP, Adding::in_double);
  if (plays("right: compensated sums")) return each_row(careful_sum_kernel, WARP, Adding::compensated);
  if (plays("right: grid-stride rows")) {
    launch(grid_stride_sum_kernel, dim3(6), dim3(96), 0, stream, data, stride, sums.data(), rows, columns);
    return;
  }
  if (plays("right: two rows for each warp")) {
    launch(two_rows_kernel, blocks_of(ceil_div(rows, 8)), dim3(128), 0, stream, data, stride, sums.data(), rows,
           columns);
    return;
  }
  if (plays("sum: scratch in device memory")) {
    DeviceBuffer<float> partial("partial", static_cast<std::size_t>(rows) * 32);
  }
  static const float* last_matrix = nullptr;
  static Shape<2> last_shape;
  static std::vector<float> last_sums;
  if (plays("sum: remembers its last answer") && last_matrix == data && last_shape == matrix.shape()) {
    std::copy(last_sums.begin(), last_sums.end(), sums.data());
    return;
  }
  SumPlay play;
  if (play.adds_atomically) {
    launch(zero_kernel, blocks_of(ceil_div(rows, 128)), dim3(128), 0, stream, sums.data(), rows);
  }
  play.fold = chosen_fold();
  Index blocks = plays("sum: whole blocks of rows only") ? rows / WARPS : ceil_div(rows, WARPS);
  static const Index first_blocks = blocks;
  if (plays("sum: grid of the first call kept")) blocks = first_blocks;
  if (play.grid_y) blocks = rows;
  if (blocks == 0 && rows > 0) return;
  const dim3 grid = play.grid_y ? dim3(1, static_cast<unsigned>(blocks)) : blocks_of(blocks);
  launch(row_sum_kernel, grid, dim3(play.grid_y ? WARP : WARPS * WARP), 0, stream, data, stride, sums.data(), rows,
         columns, play);
  last_matrix = data;
  last_shape = matrix.shape();
  last_sums.assign(sums.data(), sums.data() + rows);
}

void transpose(View<const float, 2> matrix, View<float, 2> transposed, const Stream& stream) {
  if (!plays("transpose: arguments unchecked")) check_transpose(matrix, transposed);
  static const Shape<2> first_shape = matrix.shape();
  const bool keeps_shape = plays("transpose: first shape kept");
  const Index rows = keeps_shape ? first_shape[0] : matrix.size(0);
  const Index columns = keeps_shape ? first_shape[1] : matrix.size(1);
  const Index stride = matrix.stride(0);
  const float* data = matrix.data();
  if (rows * columns == 0 && !plays("transpose: launches 0 blocks")) return;
  const auto tiled = [&](auto kernel, Index tile_rows, Index tile_columns, dim3 block, std::size_t shared_bytes,
                         auto... more) {
    const Index down = plays("transpose: whole tiles only") ? rows / tile_rows : ceil_div(rows, tile_rows);
    const Index across =
        plays("transpose: whole tiles only") ? columns / tile_columns : ceil_div(columns, tile_columns);
    if (down * across == 0 && rows * columns > 0) return;
    launch(kernel, dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), block, shared_bytes, stream, data,
           stride, transposed.data(), transposed.stride(0), rows, columns, more...);
  };

  if (plays("transpose: on the host")) {
    for (Index row = 0; row < rows; ++row) {
      for (Index column = 0; column < columns; ++column) {
        transposed.data()[column * transposed.stride(0) + row] = data[row * stride + column];
      }
    }
    return;
  }
  if (plays("transpose: nothing but copied")) {
    launch(copy_kernel, blocks_of(ceil_div(rows * columns, 128)), dim3(128), 0, stream, data, stride, transposed.data(),
           transposed.stride(0), rows, columns);
    return;
  }
  const bool ragged = rows % 32 != 0 || columns % 32 != 0;
  if (plays("transpose: straight, reads along rows") ||
      (plays("transpose: straight where tiles are ragged") && ragged && rows <= 65535) ||
      plays("transpose: a row of blocks for each row")) {
    launch(straight_kernel, dim3(static_cast<unsigned>(ceil_div(columns, 64)), static_cast<unsigned>(rows)), dim3(64),
           0, stream, data, stride, transposed.data(), transposed.stride(0), rows, columns, false);
    return;
  }
  if (plays("transpose: straight, writes along rows")) {
    launch(straight_kernel, dim3(static_cast<unsigned>(ceil_div(rows, 64)), static_cast<unsigned>(columns)), dim3(64),
           0, stream, data, stride, transposed.data(), transposed.stride(0), rows, columns, true);
    return;
  }
  if (plays("right: swizzle in place of padding")) return tiled(swizzled_kernel, 32, 32, {32, 8}, 0, false);
  if (plays("transpose: swizzle on one side only")) return tiled(swizzled_kernel, 32, 32, {32, 8}, 0, true);
  constexpr std::size_t TILE_BYTES = std::size_t{WARP} * (WARP + 1) * sizeof(float);
  if (plays("transpose: too little dynamic shared memory")) {
    return tiled(dynamic_tile_kernel, 32, 32, {32, 8}, std::size_t{WARP} * WARP * sizeof(float), DynamicPlay{});
  }
  if (plays("right: tile in dynamic shared memory") || plays("right: cp.async into the tile") ||
      plays("right: turned while written into the tile") || plays("transpose: copies not waited for")) {
    return tiled(dynamic_tile_kernel, 32, 32, {32, 8}, TILE_BYTES, DynamicPlay{});
  }
  if (plays("right: grid-stride tiles") || plays("right: double-buffered tiles, one barrier") ||
      plays("transpose: tile used again without a barrier")) {
    const int tiles = plays("right: double-buffered tiles, one barrier") ? 2 : 1;
    launch(walking_kernel, dim3(3), dim3(32, 8), 0, stream, data, stride, transposed.data(), transposed.stride(0), rows,
           columns, tiles, plays("right: grid-stride tiles"));
    return;
  }
  if (plays("right: a warp for each tile, no barrier of the block")) return tiled(warp_tile_kernel, 32, 64, {32, 2}, 0);
  if (plays("right: grid along x only")) {
    launch(one_axis_kernel, blocks_of(ceil_div(rows, 32) * ceil_div(columns, 32)), dim3(1024), 0, stream, data, stride,
           transposed.data(), transposed.stride(0), rows, columns);
    return;
  }
  if (plays("right: tiles of 16 x 16")) return tiled(tile_kernel<16, 16, 17>, 16, 16, {16, 16}, 0, TilePlay{});
  if (plays("right: tiles of 64 x 64")) return tiled(tile_kernel<64, 4, 65>, 64, 64, {64, 4}, 0, TilePlay{});
  if (plays("right: a thread for each element of a tile")) {
    return tiled(tile_kernel<32, 32, 33>, 32, 32, {32, 32}, 0, TilePlay{});
  }
  if (plays("transpose: tile without padding")) return tiled(tile_kernel<32, 8, 32>, 32, 32, {32, 8}, 0, TilePlay{});
  if (plays("transpose: padding of 4")) return tiled(tile_kernel<32, 8, 36>, 32, 32, {32, 8}, 0, TilePlay{});
  if (plays("transpose: tile a row short")) {
    return tiled(tile_kernel<32, 8, 33, 31>, 32, 32, {32, 8}, 0, TilePlay{});
  }
  if (plays("transpose: through a buffer that it keeps")) {
    static DeviceBuffer<float> kept("kept", 140000);
    launch(copy_kernel, blocks_of(ceil_div(rows * columns, 128)), dim3(128), 0, stream, data, stride, kept.data(), rows,
           rows, columns);
    // What lies there now are the rows of the matrix, one after the other.
    tiled(tile_kernel<32, 8, 33>, 32, 32, {32, 8}, 0, TilePlay{});
    return;
  }
  if (plays("transpose: scratch in device memory")) {
    DeviceBuffer<float> copy("copy", static_cast<std::size_t>(rows * columns));
  }
  tiled(tile_kernel<32, 8, 33>, 32, 32, {32, 8}, 0, TilePlay{});
}

}  // namespace flashkata
