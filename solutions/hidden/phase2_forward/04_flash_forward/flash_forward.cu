// flash_forward: output = softmax(scale query key^T) value and its LSE, in fp32
//
// New here   The loop of step 03, with a block of threads for a tile of queries: K and V tiles lie in shared memory for
// all
//            of them, and each thread computes ROWS x a few elements of each product, so that a value that was loaded
//            from shared memory is used several times.
// Who owns   16 threads side by side (a half warp) own ROWS rows together: of S each of them has KEYS columns, of O
// each has
//            DIMS. Their maxima and sums meet by shuffles within the half warp.
// Grid       one block for every BLOCK_Q queries of a head; the last tiles, longest when causal, first
// Block      ROW_GROUPS x 16 threads
// Shared     q_smem [BLOCK_Q, D], k_smem [KV, D], v_smem [KV, D], p_smem [BLOCK_Q, KV]
// Try        ./kata test 2.04    ./kata profile 2.04
#include "flash_forward.hpp"

namespace flashkata {
namespace {

constexpr int ROWS = 8;     // queries of each thread: group, group + ROW_GROUPS, ...
constexpr int PADDING = 4;  // floats after a row in shared memory: neighbouring rows begin in different banks
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

// How the work is cut, by the width of a row: long rows leave registers and shared memory for smaller tiles only.
template <int HEAD_DIM>
struct Tiling {
  static constexpr int LANES = 16;                             // threads that share rows
  static constexpr int ROW_GROUPS = HEAD_DIM == 128 ? 8 : 16;  // groups of LANES threads in a block
  static constexpr int BLOCKS = HEAD_DIM == 128 ? 3 : 2;       // that an SM holds at a time
  static constexpr int KV = HEAD_DIM == 128 ? 32 : 64;         // keys in a tile
  static constexpr int THREADS = ROW_GROUPS * LANES;
  static constexpr int BLOCK_Q = ROW_GROUPS * ROWS;
  static constexpr int STRIDE = HEAD_DIM + PADDING;  // of q_smem and k_smem
  static constexpr int P_STRIDE = KV + PADDING;
  static constexpr int SHARED_FLOATS = (BLOCK_Q + KV) * STRIDE + KV * HEAD_DIM + BLOCK_Q * P_STRIDE;
  static constexpr int KEYS = KV / LANES;        // columns of S of a thread: lane, lane + 16, ...
  static constexpr int DIMS = HEAD_DIM / LANES;  // columns of O of a thread, in vectors of VECTOR neighbours
  static constexpr int VECTOR = DIMS < 4 ? DIMS : 4;
};

struct Arguments {
  View<const float, 4> query, key, value;  // [B, H, S, D]
  View<float, 4> output;                   // [B, H, Sq, D]
  View<float, 3> lse;                      // [B, H, Sq]
  int queries, keys, diagonal;             // query i sees keys 0 .. i + diagonal
  float scale;
};

// Copies rows first .. first + COUNT - 1 of one head to shared memory; rows from `limit` on become 0.
template <int HEAD_DIM, int COUNT>
KATA_DEVICE void load_tile(float* smem, int smem_stride, const float* head, Index row_stride, int first, int limit) {
  constexpr int VECTORS = HEAD_DIM / 4;  // of 16 bytes, in a row
  for (int index = static_cast<int>(threadIdx.x); index < COUNT * VECTORS; index += Tiling<HEAD_DIM>::THREADS) {
    const int row = index / VECTORS;
    const int column = index % VECTORS * 4;
    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (first + row < limit) four = *reinterpret_cast<const float4*>(head + (first + row) * row_stride + column);
    *reinterpret_cast<float4*>(smem + row * smem_stride + column) = four;
  }
}

// SIZE neighbours at once: 1, 2 or 4.
template <int SIZE>
KATA_DEVICE void load_vector(float* reg, const float* smem) {
  if constexpr (SIZE == 4) {
    const float4 four = *reinterpret_cast<const float4*>(smem);
    reg[0] = four.x, reg[1] = four.y, reg[2] = four.z, reg[3] = four.w;
  } else if constexpr (SIZE == 2) {
    const float2 two = *reinterpret_cast<const float2*>(smem);
    reg[0] = two.x, reg[1] = two.y;
  } else {
    reg[0] = *smem;
  }
}

KATA_DEVICE float dot(const float4& a, const float4& b, float sum) {
  sum = fmaf(a.x, b.x, sum);
  sum = fmaf(a.y, b.y, sum);
  sum = fmaf(a.z, b.z, sum);
  return fmaf(a.w, b.w, sum);
}

template <int LANES>
KATA_DEVICE float max_of_lanes(float value) {
  for (int distance = 1; distance < LANES; distance *= 2) {
    value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, distance));
  }
  return value;
}

template <int LANES>
KATA_DEVICE float sum_of_lanes(float value) {
  for (int distance = 1; distance < LANES; distance *= 2) value += __shfl_xor_sync(FULL_WARP, value, distance);
  return value;
}

template <int HEAD_DIM>
__global__ void __launch_bounds__(Tiling<HEAD_DIM>::THREADS, Tiling<HEAD_DIM>::BLOCKS)
    flash_forward_kernel(const Arguments args) {
  using Cut = Tiling<HEAD_DIM>;
  constexpr int LANES = Cut::LANES, ROW_GROUPS = Cut::ROW_GROUPS, BLOCK_Q = Cut::BLOCK_Q, KV = Cut::KV;
  constexpr int STRIDE = Cut::STRIDE, P_STRIDE = Cut::P_STRIDE;
  constexpr int KEYS = Cut::KEYS, DIMS = Cut::DIMS, VECTOR = Cut::VECTOR;

  const int lane = static_cast<int>(threadIdx.x) % LANES;
  const int group = static_cast<int>(threadIdx.x) / LANES;  // first row of this thread in the tile
  const int q_tiles = (args.queries + BLOCK_Q - 1) / BLOCK_Q;
  const int q_first = (q_tiles - 1 - static_cast<int>(blockIdx.x) % q_tiles) * BLOCK_Q;
  const Index head = static_cast<Index>(blockIdx.x) / q_tiles;  // over batch items and heads
  const Index heads = args.query.size(1);
  const float* q_head = &args.query(head / heads, head % heads, 0, 0);
  const float* k_head = &args.key(head / heads, head % heads, 0, 0);
  const float* v_head = &args.value(head / heads, head % heads, 0, 0);

  float* q_smem = dynamic_shared<float>();    // [BLOCK_Q, HEAD_DIM]
  float* k_smem = q_smem + BLOCK_Q * STRIDE;  // [KV, HEAD_DIM]
  float* v_smem = k_smem + KV * STRIDE;       // [KV, HEAD_DIM]
  float* p_smem = v_smem + KV * HEAD_DIM;     // [BLOCK_Q, KV]

  float o_reg[ROWS][DIMS] = {};  // [rows of this thread, its channels]
  float row_max[ROWS];
  float row_sum[ROWS] = {};  // this lane's share until the end
  for (int row = 0; row < ROWS; ++row) row_max[row] = MINUS_INFINITY;

  const int keys_seen = min(args.keys, q_first + BLOCK_Q + args.diagonal);  // by the last query of the block
  load_tile<HEAD_DIM, BLOCK_Q>(q_smem, STRIDE, q_head, args.query.stride(2), q_first, args.queries);

  for (int kv_first = 0; kv_first < keys_seen; kv_first += KV) {
    __syncthreads();  // everybody has finished with k_smem, v_smem and p_smem of the tile before
    load_tile<HEAD_DIM, KV>(k_smem, STRIDE, k_head, args.key.stride(2), kv_first, args.keys);
    load_tile<HEAD_DIM, KV>(v_smem, HEAD_DIM, v_head, args.value.stride(2), kv_first, args.keys);
    __syncthreads();  // q_smem, k_smem and v_smem are full: reads may start

    // S = scale Q K^T  [ROWS rows of this thread, keys lane, lane + 16, ...]
    float s_reg[ROWS][KEYS] = {};
#pragma unroll 4
    for (int column = 0; column < HEAD_DIM; column += 4) {
      float4 k_four[KEYS];
#pragma unroll
      for (int key = 0; key < KEYS; ++key) {
        k_four[key] = *reinterpret_cast<const float4*>(k_smem + (lane + key * LANES) * STRIDE + column);
      }
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        const float4 q_four = *reinterpret_cast<const float4*>(q_smem + (group + row * ROW_GROUPS) * STRIDE + column);
#pragma unroll
        for (int key = 0; key < KEYS; ++key) s_reg[row][key] = dot(q_four, k_four[key], s_reg[row][key]);
      }
    }

    // Does every query of the block see every key of the tile? Then nothing has to be forbidden.
    const bool masked = kv_first + KV > min(args.keys, q_first + args.diagonal + 1);

    // P = exp(S - max), and what was gathered so far shrinks to the new maximum
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const int end =
          min(args.keys, q_first + group + row * ROW_GROUPS + args.diagonal + 1) - kv_first;  // first forbidden key
      float tile_max = MINUS_INFINITY;
#pragma unroll
      for (int key = 0; key < KEYS; ++key) {
        s_reg[row][key] *= args.scale;
        if (masked && lane + key * LANES >= end) s_reg[row][key] = MINUS_INFINITY;
        tile_max = fmaxf(tile_max, s_reg[row][key]);
      }
      const float new_max = fmaxf(row_max[row], max_of_lanes<LANES>(tile_max));
      // While a row has seen no key its maximum is -inf, and -inf minus -inf would be NaN.
      const float shift = new_max == MINUS_INFINITY ? 0.0f : new_max;
      const float rescale = __expf(row_max[row] - shift);
      row_max[row] = new_max;
      row_sum[row] *= rescale;
#pragma unroll
      for (int dim = 0; dim < DIMS; ++dim) o_reg[row][dim] *= rescale;
#pragma unroll
      for (int key = 0; key < KEYS; ++key) {
        const float weight = __expf(s_reg[row][key] - shift);
        row_sum[row] += weight;
        p_smem[(group + row * ROW_GROUPS) * P_STRIDE + lane + key * LANES] = weight;
      }
    }
    __syncwarp();  // the rows of p_smem that this half warp reads are those that it wrote

    // O += P V  [ROWS rows of this thread, its channels]
#pragma unroll 2
    for (int key = 0; key < KV; key += 4) {
      float v_reg[4][DIMS];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int dim = 0; dim < DIMS; dim += VECTOR) {
          load_vector<VECTOR>(&v_reg[k][dim], v_smem + (key + k) * HEAD_DIM + dim * LANES + lane * VECTOR);
        }
      }
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        const float4 p_four = *reinterpret_cast<const float4*>(p_smem + (group + row * ROW_GROUPS) * P_STRIDE + key);
        const float p[4] = {p_four.x, p_four.y, p_four.z, p_four.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          // A forbidden value may be NaN, and 0 times NaN is NaN: it has to be left out.
          if (masked && p[k] == 0.0f) continue;
#pragma unroll
          for (int dim = 0; dim < DIMS; ++dim) o_reg[row][dim] = fmaf(p[k], v_reg[k][dim], o_reg[row][dim]);
        }
      }
    }
  }

  // The division that was put off. Without keys the sum is 0: output 0, lse -inf.
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const int q_row = q_first + group + row * ROW_GROUPS;
    const float sum = sum_of_lanes<LANES>(row_sum[row]);
    if (q_row >= args.queries) continue;
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    float* o_row = &args.output(head / heads, head % heads, q_row, 0);
#pragma unroll
    for (int dim = 0; dim < DIMS; ++dim) {
      o_row[dim / VECTOR * VECTOR * LANES + lane * VECTOR + dim % VECTOR] = o_reg[row][dim] * inverse;
    }
    if (lane == 0) {
      args.lse(head / heads, head % heads, q_row) = sum > 0.0f ? row_max[row] + logf(sum) : MINUS_INFINITY;
    }
  }
}

template <int HEAD_DIM>
void launch_for(const FlashForward<float>& p, const Stream& stream) {
  const auto queries = static_cast<int>(p.query.size(2));
  const auto keys = static_cast<int>(p.key.size(2));
  using Cut = Tiling<HEAD_DIM>;
  const Index blocks = p.query.size(0) * p.query.size(1) * ceil_div(p.query.size(2), Cut::BLOCK_Q);
  if (blocks == 0) return;
  launch(flash_forward_kernel<HEAD_DIM>, dim3(static_cast<unsigned>(blocks)), dim3(Cut::THREADS),
         Cut::SHARED_FLOATS * sizeof(float), stream,
         Arguments{p.query, p.key, p.value, p.output, p.lse, queries, keys, p.causal ? keys - queries : keys,
                   p.scale.value_or(1.0f / std::sqrt(static_cast<float>(HEAD_DIM)))});
}

}  // namespace

void flash_forward(const FlashForward<float>& problem, const Stream& stream) {
  check_flash_forward(problem);
  switch (problem.query.size(3)) {
    case 16:
      return launch_for<16>(problem, stream);
    case 32:
      return launch_for<32>(problem, stream);
    case 64:
      return launch_for<64>(problem, stream);
    default:
      return launch_for<128>(problem, stream);
  }
}

}  // namespace flashkata
