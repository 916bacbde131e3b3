// Flash attention forward in float, right and with the faults that are easily made in it.
#include "tests/virtual_gpu/flash_kernels.hpp"

namespace flashkata::corpus {
namespace {

enum class Fault {
  none,
  no_barrier_before_load,   // the next tile overwrites one that is still being read
  no_barrier_after_load,    // a tile is read before it is complete
  no_syncwarp_after_p,      // p is exchanged within a warp
  no_syncwarp_after_use,    // harmless: the next barrier comes before the next write
  query_tail_unguarded,     // reads rows of q that do not exist
  last_tile_row_unwritten,  // loads one row too few
  barrier_for_three_warps,
  output_tail_off_by_one,  // writes a row too many
};

constexpr int HEAD_DIM = 64;
constexpr int TILE = 32;
constexpr int LANES = 4;  // threads that share a query row
constexpr int BLOCK = TILE * LANES;
constexpr int KEYS = TILE / LANES;
constexpr int DIMS = HEAD_DIM / LANES;
constexpr int LENGTH = 100;

template <Fault FAULT>
__global__ void flash_forward(const float* q, const float* k, const float* v, float* o, float* lse, int length,
                              float scale) {
  __shared__ float q_smem[TILE][HEAD_DIM + 1];
  __shared__ float k_smem[TILE][HEAD_DIM + 1];
  __shared__ float v_smem[TILE][HEAD_DIM];
  __shared__ float p_smem[TILE][TILE + 1];
  const int row = threadIdx.x / LANES;
  const int part = threadIdx.x % LANES;
  const int query = blockIdx.x * TILE + row;

  for (int i = threadIdx.x; i < TILE * HEAD_DIM; i += BLOCK) {
    const int r = i / HEAD_DIM;
    const int d = i % HEAD_DIM;
    const int source = blockIdx.x * TILE + r;
    const bool exists = FAULT == Fault::query_tail_unguarded || source < length;
    q_smem[r][d] = exists ? q[source * HEAD_DIM + d] : 0.0f;  // <- query_tail_unguarded
  }
  float running_max = -INFINITY;
  float running_sum = 0.0f;
  float acc[DIMS];
  for (int d = 0; d < DIMS; ++d) acc[d] = 0.0f;

  for (int first_key = 0; first_key < length; first_key += TILE) {
    if constexpr (FAULT != Fault::no_barrier_before_load) __syncthreads();  // <- barrier_for_three_warps
    constexpr int ROWS = FAULT == Fault::last_tile_row_unwritten ? TILE - 1 : TILE;
    for (int i = threadIdx.x; i < ROWS * HEAD_DIM; i += BLOCK) {
      const int r = i / HEAD_DIM;
      const int d = i % HEAD_DIM;
      const bool exists = first_key + r < length;
      const int source = (first_key + r) * HEAD_DIM + d;
      k_smem[r][d] = exists ? k[source] : 0.0f;  // <- no_barrier_before_load no_barrier_after_load
      v_smem[r][d] = exists ? v[source] : 0.0f;  // <- no_barrier_before_load no_barrier_after_load
    }
    if constexpr (FAULT == Fault::barrier_for_three_warps) {
      if (threadIdx.x < 96) __syncthreads();  // <- barrier_for_three_warps
    } else if constexpr (FAULT != Fault::no_barrier_after_load) {
      __syncthreads();
    }

    float scores[KEYS];
    float tile_max = running_max;
    for (int j = 0; j < KEYS; ++j) {
      const int key = part + LANES * j;
      float dot = 0.0f;
      for (int d = 0; d < HEAD_DIM; ++d) {
        // clang-format off
        const float k_value = k_smem[key][d];  // <- no_barrier_before_load no_barrier_after_load last_tile_row_unwritten
        // clang-format on
        dot += q_smem[row][d] * k_value;
      }
      scores[j] = first_key + key < length ? dot * scale : -INFINITY;
      tile_max = fmaxf(tile_max, scores[j]);
    }
    tile_max = fmaxf(tile_max, __shfl_xor_sync(FULL_WARP, tile_max, 1));
    tile_max = fmaxf(tile_max, __shfl_xor_sync(FULL_WARP, tile_max, 2));
    const float correction = __expf(running_max - tile_max);
    float tile_sum = 0.0f;
    for (int j = 0; j < KEYS; ++j) {
      const float p = __expf(scores[j] - tile_max);
      p_smem[row][part + LANES * j] = p;  // <- no_syncwarp_after_p
      tile_sum += p;
    }
    tile_sum += __shfl_xor_sync(FULL_WARP, tile_sum, 1);
    tile_sum += __shfl_xor_sync(FULL_WARP, tile_sum, 2);
    running_sum = running_sum * correction + tile_sum;
    running_max = tile_max;
    if constexpr (FAULT != Fault::no_syncwarp_after_p) __syncwarp();

    for (int d = 0; d < DIMS; ++d) acc[d] *= correction;
    for (int key = 0; key < TILE; ++key) {
      const float p = p_smem[row][key];  // <- no_syncwarp_after_p
      for (int d = 0; d < DIMS; ++d) {
        const int dim = part + LANES * d;
        // clang-format off
        const float v_value = v_smem[key][dim];  // <- no_barrier_before_load no_barrier_after_load last_tile_row_unwritten
        // clang-format on
        acc[d] += p * v_value;
      }
    }
    if constexpr (FAULT != Fault::no_syncwarp_after_use) __syncwarp();
  }

  const bool exists = FAULT == Fault::output_tail_off_by_one ? query <= length : query < length;
  if (exists) {
    for (int d = 0; d < DIMS; ++d) {
      o[query * HEAD_DIM + part + LANES * d] = acc[d] / running_sum;  // <- output_tail_off_by_one
    }
    if (part == 0) lse[query] = running_max + __logf(running_sum);
  }
}

template <Fault FAULT>
bool run() {
  const float scale = 0.125f;
  const AttentionInputs inputs = attention_inputs(1, LENGTH, HEAD_DIM);
  DeviceBuffer<float> q("q", inputs.q);
  DeviceBuffer<float> k("k", inputs.k);
  DeviceBuffer<float> v("v", inputs.v);
  DeviceBuffer<float> o("o", inputs.q.size());
  DeviceBuffer<float> lse("lse", LENGTH);
  launch(flash_forward<FAULT>, ceil_div(LENGTH, TILE), BLOCK, 0, Stream(), q.data(), k.data(), v.data(), o.data(),
         lse.data(), LENGTH, scale);
  synchronize();
  const AttentionResults want = reference_attention(inputs, 1, LENGTH, HEAD_DIM, scale);
  return all_close(o.download(), want.output, 1e-5f) && all_close(lse.download(), want.lse, 1e-5f);
}

}  // namespace

FaultyCases flash_forward_faults() {
#define CASE(name, kind)                                           \
  FaultyCase {                                                     \
#name, FindingKind::kind, __FILE__, [] { run<Fault::name>(); } \
  }
  return {
      CASE(no_barrier_before_load, shared_race),
      CASE(no_barrier_after_load, shared_race),
      CASE(no_syncwarp_after_p, shared_race),
      CASE(query_tail_unguarded, out_of_bounds),
      CASE(last_tile_row_unwritten, uninitialised_read),
      CASE(barrier_for_three_warps, divergent_barrier),
      CASE(output_tail_off_by_one, out_of_bounds),
  };
#undef CASE
}

CleanCases flash_clean_cases() {
  return {
      {"flash_forward", __FILE__, run<Fault::none>},
      {"flash_forward_without_last_syncwarp", __FILE__, run<Fault::no_syncwarp_after_use>},
  };
}

}  // namespace flashkata::corpus
