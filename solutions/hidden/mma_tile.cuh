// What the tensor-core kernels of 2.05, 3.05 and 4.05 have in common: swizzled tiles in shared memory, products of
// tiles in fragments, and how rows leave.
#pragma once

#include <type_traits>

#include "common/gpu/gpu.hpp"

namespace flashkata {

constexpr int CHUNK = 8;  // elements in 16 bytes: what cp.async copies and ldmatrix reads

// 16 bytes at once.
template <typename T>
struct alignas(16) Chunk {
  T elements[CHUNK];
};

// The same number, of which the compiler knows nothing: what is derived from it is computed again in each round of a
// loop. Otherwise the compiler would compute all addresses of a tile once and keep them, in registers that the
// fragments need.
KATA_DEVICE int computed_anew(int value) {
#if KATA_REAL_GPU
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// All of these bits are set in inf and in NaN, and in no other number.
template <typename T>
constexpr std::uint32_t EXPONENT = std::is_same_v<T, fp16> ? 0x7c00 : 0x7f80;

template <typename T>
KATA_DEVICE bool is_finite(T number) {
  return (number.x & EXPONENT<T>) != EXPONENT<T>;
}

// A tile in shared memory, [rows, WIDTH], in chunks of 16 bytes. Chunk c of row r lies at place c XOR (r % 8), so that
// the 8 rows of one chunk column, which ldmatrix reads together, lie in 8 different groups of 4 banks. Rows shorter
// than 128 bytes share a line of banks, so it is the line's number that counts.
template <typename T, int WIDTH>
struct Tile {
  static constexpr unsigned CHUNKS = WIDTH / CHUNK;             // in a row
  static constexpr unsigned SWAPPED = CHUNKS < 8 ? CHUNKS : 8;  // chunks that change places among themselves
  static constexpr unsigned ROWS_PER_LINE = 8 / SWAPPED;

  T* smem;

  // One lane's row in a tile. Later rows and chunks are then constants away, which costs no address registers.
  struct Lane {
    T* row;
    unsigned swizzle;

    // `rows` further down, a multiple of 8, and `chunks` further right, an even number.
    KATA_DEVICE T* at(int rows, int chunks) const {
      const unsigned chunk = static_cast<unsigned>(chunks);
      return row + rows * WIDTH + chunk / SWAPPED * SWAPPED * CHUNK + ((chunk % SWAPPED) ^ swizzle) * CHUNK;
    }
  };

  KATA_DEVICE Lane lane(int row, int chunk) const {
    return {smem + row * WIDTH, (static_cast<unsigned>(row) / ROWS_PER_LINE % SWAPPED) ^ static_cast<unsigned>(chunk)};
  }
  KATA_DEVICE T* at(int row, int chunk) const {
    const unsigned place = static_cast<unsigned>(chunk) ^ (static_cast<unsigned>(row) / ROWS_PER_LINE % SWAPPED);
    return smem + row * WIDTH + place * CHUNK;
  }

  // Where each lane points ldmatrix_x4 for a 16 x 16 operand whose upper left corner is (row, chunk): the four 8 x 8
  // matrices are upper left, lower left, upper right, lower right ...
  KATA_DEVICE Lane down_first(int row, int chunk, int lane_index) const {
    return lane(row + lane_index % 16, chunk + lane_index / 16);
  }
  // ... or upper left, upper right, lower left, lower right.
  KATA_DEVICE Lane right_first(int row, int chunk, int lane_index) const {
    return lane(row + lane_index / 16 * 8 + lane_index % 8, chunk + lane_index / 8 % 2);
  }

  // Starts the copy of rows first .. first + ROWS - 1 of a head; rows from `limit` on become 0.
  template <int ROWS, int THREADS>
  KATA_DEVICE void load_async(const T* head, int row_stride, int first, int limit) const {
    static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies the same number of chunks");
    constexpr int ROWS_PER_STEP = THREADS / CHUNKS;
    const int row = static_cast<int>(threadIdx.x / CHUNKS);
    const int chunk = static_cast<int>(threadIdx.x % CHUNKS);
    T* destination = at(row, chunk);
#pragma unroll
    for (int step = 0; step < ROWS / ROWS_PER_STEP; ++step) {
      const int source_row = first + row + step * ROWS_PER_STEP;
      const bool in_range = source_row < limit;
      const T* source = head + static_cast<Index>(in_range ? source_row : 0) * row_stride + chunk * CHUNK;
      cp_async_16(destination + step * ROWS_PER_STEP * WIDTH, source, in_range);
    }
  }
};

// The same by pointers that walk: the tiles of a long loop, one after the other, without a multiplication. A thread
// copies one chunk in every ROWS_PER_STEP-th row.
template <typename T, int WIDTH, int THREADS>
struct WalkingTile : Tile<T, WIDTH> {
  using Base = Tile<T, WIDTH>;
  static constexpr unsigned CHUNKS = Base::CHUNKS;
  static constexpr int ROWS_PER_STEP = THREADS / CHUNKS;  // that the block copies at once

  static KATA_DEVICE int own_row(int thread) { return static_cast<int>(static_cast<unsigned>(thread) / CHUNKS); }
  static KATA_DEVICE int own_chunk(int thread) { return static_cast<int>(static_cast<unsigned>(thread) % CHUNKS); }
  KATA_DEVICE T* own(int thread) const { return Base::at(own_row(thread), own_chunk(thread)); }
  static KATA_DEVICE const T* own_source(int thread, const T* tile, Index row_stride) {
    return tile + own_row(thread) * row_stride + own_chunk(thread) * CHUNK;
  }

  // Starts a thread's copies, the first one from `source`. If LIMITED, rows from number `rows` on become 0.
  template <int ROWS, bool LIMITED>
  KATA_DEVICE void load_async(int thread, const T* source, Index row_stride, int rows) const {
    static_assert(ROWS % ROWS_PER_STEP == 0, "every thread copies the same number of chunks");
    T* destination = own(thread);
#pragma unroll
    for (int step = 0; step < ROWS / ROWS_PER_STEP; ++step) {
      cp_async_16(destination + step * ROWS_PER_STEP * WIDTH, source,
                  !LIMITED || own_row(thread) + step * ROWS_PER_STEP < rows);
      source += ROWS_PER_STEP * row_stride;
    }
  }

  // The rest is for a thread whose copies have landed, and concerns the chunks that it has copied itself.

  template <int ROWS>
  KATA_DEVICE void negate(int thread) const {
    for (int step = 0; step < ROWS / ROWS_PER_STEP; ++step) {
      auto* twos = reinterpret_cast<std::uint32_t*>(own(thread) + step * ROWS_PER_STEP * WIDTH);
      for (int i = 0; i < CHUNK / 2; ++i) twos[i] ^= 0x80008000;
    }
  }

  // Makes 0 of what is not finite. Was there any?
  template <int ROWS>
  KATA_DEVICE bool clear_non_finite(int thread) const {
    T* first = own(thread);
    // An exponent of ones, and its lowest bit once more: that overflows into the place of the sign.
    constexpr std::uint32_t EXPONENTS = EXPONENT<T> * 0x00010001;
    constexpr std::uint32_t LOWEST = EXPONENTS & ~(EXPONENTS << 1);
    std::uint32_t overflow = 0;
#pragma unroll
    for (int step = 0; step < ROWS / ROWS_PER_STEP; ++step) {
      const uint4 eight = *reinterpret_cast<const uint4*>(first + step * ROWS_PER_STEP * WIDTH);
      for (const std::uint32_t two : {eight.x, eight.y, eight.z, eight.w}) overflow |= (two & EXPONENTS) + LOWEST;
    }
    if ((overflow & 0x80008000) == 0) return false;
#pragma unroll 1
    for (int number = 0; number < ROWS / ROWS_PER_STEP * CHUNK; ++number) {
      T& value = first[number / CHUNK * ROWS_PER_STEP * WIDTH + number % CHUNK];
      if (!is_finite(value)) value = T{};
    }
    return true;
  }
};

// The largest of the 4 lanes that share a row of a C fragment.
KATA_DEVICE float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, 1));
  return fmaxf(value, __shfl_xor_sync(FULL_WARP, value, 2));
}

KATA_DEVICE float quad_sum(float value) {
  value += __shfl_xor_sync(FULL_WARP, value, 1);
  return value + __shfl_xor_sync(FULL_WARP, value, 2);
}

// The fragments, once for all products. A warp multiplies A [16, 16] by B [16, 8] and adds to C [16, 8] (mma.hpp).
// With group = lane / 4 and pair = lane % 4 * 2, a lane holds
//   of C   rows group (elements 0, 1) and group + 8 (elements 2, 3), columns pair and pair + 1
//   of A   the same rows and columns in registers 0 and 1, and columns 8 further in registers 2 and 3
// so two neighbouring C fragments, packed to 16 bits, are one A fragment. `sums` are C fragments of [16 M, 8 N].

// Whether a backward pass has the scale in dS when it is rounded. It has to in fp16, which may be too small for dP;
// bf16 reaches as far as float does, and there the sums are scaled at the end, which spares a product for each pair.
template <typename T>
constexpr bool SCALES_DS = std::is_same_v<T, fp16>;

// C fragments times a number.
template <int M, int N>
KATA_DEVICE void multiply_all(float (&frag)[M][N][4], float factor) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) frag[m][n][e] *= factor;
    }
  }
}

// C fragments [16 M, 16 STEPS] as A fragments.
template <typename T, int M, int STEPS>
KATA_DEVICE void pack(std::uint32_t (&a)[STEPS][M][4], const float (&c)[M][2 * STEPS][4]) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float* two = &c[m][2 * step + r / 2][r % 2 * 2];
        a[step][m][r] = pack2<T>(two[0], two[1]);
      }
    }
  }
}

// Writes A fragments to rows first .. first + 16 M - 1 of a tile.
template <typename T, int WIDTH, int M, int STEPS>
KATA_DEVICE void store(const Tile<T, WIDTH>& tile, int first, int lane, const std::uint32_t (&a)[STEPS][M][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        T* place = tile.at(first + m * 16 + r % 2 * 8 + lane / 4, 2 * step + r / 2) + lane % 4 * 2;
        *reinterpret_cast<std::uint32_t*>(place) = a[step][m][r];
      }
    }
  }
}

// sums += one 16 x 16 piece of B, given as its left and right fragments in one array, times a.
template <typename T, int M, int N>
KATA_DEVICE void multiply(float (&sums)[M][N][4], const std::uint32_t (&a)[M][4], const std::uint32_t (&b)[4],
                          int pair) {
  const std::uint32_t left[2] = {b[0], b[1]};
  const std::uint32_t right[2] = {b[2], b[3]};
#pragma unroll
  for (int m = 0; m < M; ++m) {
    mma_m16n8k16<T>(sums[m][2 * pair], a[m], left, sums[m][2 * pair]);
    mma_m16n8k16<T>(sums[m][2 * pair + 1], a[m], right, sums[m][2 * pair + 1]);
  }
}

// sums += X Y^T, both stored by rows of HEAD_DIM channels: a row of Y is a column of B, as mma wants it.
// x is a down_first() lane, y a right_first() one.
template <typename T, int HEAD_DIM, int M, int N, typename Lane>
KATA_DEVICE void add_rows_times_rows(float (&sums)[M][N][4], const Lane& x, const Lane& y) {
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    std::uint32_t x_frag[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) ldmatrix_x4(x_frag[m], x.at(m * 16, step * 2));
#pragma unroll
    for (int pair = 0; pair < N / 2; ++pair) {
      std::uint32_t y_frag[4];
      ldmatrix_x4(y_frag, y.at(pair * 16, step * 2));
      multiply<T>(sums, x_frag, y_frag, pair);
    }
  }
}

// sums += W Y, W in A fragments of [16 M, 16 STEPS], Y stored by rows: ldmatrix transposes on the way.
// y is a down_first() lane.
template <typename T, int M, int N, int STEPS, typename Lane>
KATA_DEVICE void add_weighted_rows(float (&sums)[M][N][4], const std::uint32_t (&w_frag)[STEPS][M][4], const Lane& y) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll
    for (int pair = 0; pair < N / 2; ++pair) {
      std::uint32_t y_frag[4];
      ldmatrix_x4_trans(y_frag, y.at(step * 16, pair * 2));
      multiply<T>(sums, w_frag[step], y_frag, pair);
    }
  }
}

// sums += W^T Y, both stored by rows of which there are 16 STEPS: ldmatrix transposes both.
// w is a right_first() lane, y a down_first() one.
template <typename T, int STEPS, int M, int N, typename WLane, typename YLane>
KATA_DEVICE void add_columns_times_rows(float (&sums)[M][N][4], const WLane& w, const YLane& y) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    std::uint32_t w_frag[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) ldmatrix_x4_trans(w_frag[m], w.at(step * 16, m * 2));
#pragma unroll
    for (int pair = 0; pair < N / 2; ++pair) {
      std::uint32_t y_frag[4];
      ldmatrix_x4_trans(y_frag, y.at(step * 16, pair * 2));
      multiply<T>(sums, w_frag, y_frag, pair);
    }
  }
}

// The same sums, pair by pair and only over those that are allowed. A forbidden pair has the weight 0; where the other
// one's row holds NaN or inf, a product of tiles would add 0 times NaN. This is the slow way for such tiles.
// weight(row) gives a function of the row of y; first(row) .. end(row) - 1 are those that the row of sums may see.
template <typename T, int WIDTH, int M, int N, typename Weight, typename Range>
KATA_DEVICE void add_allowed_rows(float (&sums)[M][N][4], int lane, const Tile<T, WIDTH>& y, int chunk,
                                  const Weight& weight, const Range& range) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + half * 8 + lane / 4;
      const int2 seen = range(row);
      for (int other = seen.x; other < seen.y; ++other) {
        const float w = to_float(weight(row, other));
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const T* pair = y.at(other, chunk + n) + lane % 4 * 2;
          sums[m][n][half * 2] += w * to_float(pair[0]);
          sums[m][n][half * 2 + 1] += w * to_float(pair[1]);
        }
      }
    }
  }
}

// Rounds C fragments of [16 M, HEAD_DIM] and writes them to rows first_row .. of a head, those before `rows`. On their
// way they lie in a tile, where this warp's rows from tile_row on are free: rows leave in whole chunks.
template <typename T, int HEAD_DIM, int M>
KATA_DEVICE void store_rows(const float (&frag)[M][HEAD_DIM / 8][4], const Tile<T, HEAD_DIM>& tile, int tile_row,
                            int lane, T* head, Index row_stride, int first_row, int rows) {
  std::uint32_t packed[HEAD_DIM / 16][M][4];
  pack<T>(packed, frag);
  __syncwarp();  // this warp has finished with its rows of the tile
  store(tile, tile_row, lane, packed);
  __syncwarp();  // its rows are complete
  constexpr int CHUNKS = HEAD_DIM / CHUNK;
#pragma unroll
  for (int step = 0; step < M * 16 * CHUNKS / 32; ++step) {
    const int row = (step * 32 + lane) / CHUNKS;
    const int chunk = lane % CHUNKS;
    if (first_row + row < rows) {
      *reinterpret_cast<Chunk<T>*>(head + (first_row + row) * row_stride + chunk * CHUNK) =
          *reinterpret_cast<const Chunk<T>*>(tile.at(tile_row + row, chunk));
    }
  }
}

// One atomic addition of 16 bytes where the GPU has it, four of 4 bytes elsewhere.
KATA_DEVICE void atomic_add(float* sum, float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(sum), float4{a, b, c, d});
#else
  atomicAdd(sum, a);
  atomicAdd(sum + 1, b);
  atomicAdd(sum + 2, c);
  atomicAdd(sum + 3, d);
#endif
}

// Adds one row of two neighbouring C fragments, 16 channels, to the 16 sums at `sums`. What a lane holds of them, two
// channels in each fragment, is kept together there, so that one atomic addition takes all four: channel
// 8 tile + pair + e is sum 2 pair + 2 tile + e. round_kernel puts them in order again.
KATA_DEVICE void add_to_sum(float* sums, int lane, const float* left, const float* right) {
  atomic_add(sums + lane % 4 * 4, left[0], left[1], right[0], right[1]);
}

}  // namespace flashkata
