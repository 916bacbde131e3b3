// Flash attention forward on tensor cores (bf16, cp.async double buffer, ldmatrix, mma), right and with the faults that
// are easily made in it.
#include "tests/virtual_gpu/flash_kernels.hpp"

namespace flashkata::corpus {
namespace {

enum class Fault {
  none,
  unpadded_rows,          // harmless: bank conflicts only
  no_wait,                // the tile is read while it is still being copied
  wait_allows_two,        // the same, by a wrong number
  no_commit_in_loop,      // the copies of the next tile belong to no group
  no_barrier_after_wait,  // other threads' copies need not have landed
  no_barrier_at_end,      // the next tile is copied over one that is still being read
  prefetch_into_same_stage,
  tail_unguarded,      // copies keys that do not exist
  rows_misaligned,     // padding by 4 elements: rows of 136 bytes
  one_row_too_little,  // of dynamic shared memory
};

constexpr int HEAD_DIM = 64;
constexpr int TILE = 32;  // query rows of a block, and keys of a tile
constexpr int WARPS = TILE / 16;
constexpr int BLOCK = WARPS * 32;
constexpr int LENGTH = 136;

template <Fault FAULT>
constexpr int STRIDE = FAULT == Fault::unpadded_rows     ? HEAD_DIM
                       : FAULT == Fault::rows_misaligned ? HEAD_DIM + 4
                                                         : HEAD_DIM + 8;

/// Starts copying rows [first_row, first_row + TILE) of a [length, HEAD_DIM] tensor.
template <Fault FAULT>
__device__ void copy_tile(bf16* tile, const bf16* tensor, int first_row, int length) {
  constexpr int CHUNKS = HEAD_DIM / 8;
  for (int i = threadIdx.x; i < TILE * CHUNKS; i += BLOCK) {
    const int row = i / CHUNKS;
    const int col = i % CHUNKS * 8;
    const bool exists = FAULT == Fault::tail_unguarded || first_row + row < length;
    const bf16* source = tensor + (exists ? first_row + row : 0) * HEAD_DIM + col;
    bf16* target = tile + row * STRIDE<FAULT> + col;
    // clang-format off
    cp_async_16(target, source, exists);  // <- no_wait wait_allows_two no_commit_in_loop no_barrier_after_wait no_barrier_at_end prefetch_into_same_stage tail_unguarded rows_misaligned one_row_too_little
    // clang-format on
  }
}

template <Fault FAULT>
__global__ void flash_tensor_core(const bf16* q, const bf16* k, const bf16* v, float* o, int length, float scale) {
  constexpr int ROW = STRIDE<FAULT>;
  bf16* q_smem = dynamic_shared<bf16>();   // [TILE, ROW]
  bf16* k_smem = q_smem + TILE * ROW;      // [2, TILE, ROW]
  bf16* v_smem = k_smem + 2 * TILE * ROW;  // [2, TILE, ROW]
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int group = lane / 4;
  const int pair = lane % 4 * 2;

  copy_tile<FAULT>(q_smem, q, blockIdx.x * TILE, length);
  copy_tile<FAULT>(k_smem, k, 0, length);
  copy_tile<FAULT>(v_smem, v, 0, length);
  cp_async_commit();

  float acc[HEAD_DIM / 8][4] = {};
  float running_max[2] = {-INFINITY, -INFINITY};  // of rows group and group + 8
  float running_sum[2] = {0.0f, 0.0f};
  const int tiles = ceil_div(length, TILE);
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % 2;
    const int next_stage = FAULT == Fault::prefetch_into_same_stage ? stage : 1 - stage;
    if (tile + 1 < tiles) {
      copy_tile<FAULT>(k_smem + next_stage * TILE * ROW, k, (tile + 1) * TILE, length);
      copy_tile<FAULT>(v_smem + next_stage * TILE * ROW, v, (tile + 1) * TILE, length);
    }
    if constexpr (FAULT != Fault::no_commit_in_loop) cp_async_commit();
    if constexpr (FAULT == Fault::wait_allows_two) {
      cp_async_wait<2>();
    } else if constexpr (FAULT != Fault::no_wait) {
      cp_async_wait<1>();
    }
    if constexpr (FAULT != Fault::no_barrier_after_wait) __syncthreads();

    // S = Q K^T  [16, TILE] for this warp
    const bf16* k_tile = k_smem + stage * TILE * ROW;
    const bf16* v_tile = v_smem + stage * TILE * ROW;
    float s[TILE / 8][4] = {};
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
      std::uint32_t a[4];
      const bf16* q_row = q_smem + (warp * 16 + lane % 16) * ROW + step * 16 + lane / 16 * 8;
      ldmatrix_x4(a, q_row);  // <- no_wait wait_allows_two no_commit_in_loop no_barrier_after_wait
      for (int n = 0; n < TILE / 16; ++n) {
        std::uint32_t b[4];
        const bf16* k_row = k_tile + (n * 16 + lane / 16 * 8 + lane % 8) * ROW + step * 16 + lane / 8 % 2 * 8;
        // clang-format off
        ldmatrix_x4(b, k_row);  // <- no_wait wait_allows_two no_commit_in_loop no_barrier_after_wait no_barrier_at_end prefetch_into_same_stage
        // clang-format on
        const std::uint32_t low[2] = {b[0], b[1]};
        const std::uint32_t high[2] = {b[2], b[3]};
        mma_m16n8k16<bf16>(s[2 * n], a, low, s[2 * n]);
        mma_m16n8k16<bf16>(s[2 * n + 1], a, high, s[2 * n + 1]);
      }
    }

    // Online softmax; a row is spread over four lanes.
    for (int half = 0; half < 2; ++half) {
      float tile_max = running_max[half];
      for (int n = 0; n < TILE / 8; ++n) {
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const int key = tile * TILE + n * 8 + pair + i % 2;
          s[n][i] = key < length ? s[n][i] * scale : -INFINITY;
          tile_max = fmaxf(tile_max, s[n][i]);
        }
      }
      tile_max = fmaxf(tile_max, __shfl_xor_sync(FULL_WARP, tile_max, 1));
      tile_max = fmaxf(tile_max, __shfl_xor_sync(FULL_WARP, tile_max, 2));
      const float correction = __expf(running_max[half] - tile_max);
      float tile_sum = 0.0f;
      for (int n = 0; n < TILE / 8; ++n) {
        for (int i = 2 * half; i < 2 * half + 2; ++i) tile_sum += s[n][i] = __expf(s[n][i] - tile_max);
      }
      tile_sum += __shfl_xor_sync(FULL_WARP, tile_sum, 1);
      tile_sum += __shfl_xor_sync(FULL_WARP, tile_sum, 2);
      running_sum[half] = running_sum[half] * correction + tile_sum;
      running_max[half] = tile_max;
      for (int n = 0; n < HEAD_DIM / 8; ++n) {
        acc[n][2 * half] *= correction;
        acc[n][2 * half + 1] *= correction;
      }
    }

    // O += P V  [16, HEAD_DIM] for this warp
    for (int step = 0; step < TILE / 16; ++step) {
      const float(&left)[4] = s[2 * step];
      const float(&right)[4] = s[2 * step + 1];
      const std::uint32_t a[4] = {pack2<bf16>(left[0], left[1]), pack2<bf16>(left[2], left[3]),
                                  pack2<bf16>(right[0], right[1]), pack2<bf16>(right[2], right[3])};
      for (int n = 0; n < HEAD_DIM / 16; ++n) {
        std::uint32_t b[4];
        const bf16* v_row = v_tile + (step * 16 + lane % 16) * ROW + n * 16 + lane / 16 * 8;
        // clang-format off
        ldmatrix_x4_trans(b, v_row);  // <- no_wait wait_allows_two no_commit_in_loop no_barrier_after_wait no_barrier_at_end prefetch_into_same_stage
        // clang-format on
        const std::uint32_t low[2] = {b[0], b[1]};
        const std::uint32_t high[2] = {b[2], b[3]};
        mma_m16n8k16<bf16>(acc[2 * n], a, low, acc[2 * n]);
        mma_m16n8k16<bf16>(acc[2 * n + 1], a, high, acc[2 * n + 1]);
      }
    }
    if constexpr (FAULT != Fault::no_barrier_at_end) __syncthreads();
  }

  for (int half = 0; half < 2; ++half) {
    const int query = blockIdx.x * TILE + warp * 16 + group + 8 * half;
    if (query >= length) continue;
    for (int n = 0; n < HEAD_DIM / 8; ++n) {
      o[query * HEAD_DIM + n * 8 + pair] = acc[n][2 * half] / running_sum[half];
      o[query * HEAD_DIM + n * 8 + pair + 1] = acc[n][2 * half + 1] / running_sum[half];
    }
  }
}

std::vector<bf16> to_half(const std::vector<float>& values) {
  std::vector<bf16> result;
  for (const float value : values) result.push_back(to_bf16(value));
  return result;
}

template <Fault FAULT>
bool run() {
  const float scale = 0.125f;
  const AttentionInputs inputs = attention_inputs(1, LENGTH, HEAD_DIM);
  DeviceBuffer<bf16> q("q", to_half(inputs.q));
  DeviceBuffer<bf16> k("k", to_half(inputs.k));
  DeviceBuffer<bf16> v("v", to_half(inputs.v));
  DeviceBuffer<float> o("o", inputs.q.size());
  constexpr int ROWS = FAULT == Fault::one_row_too_little ? 5 * TILE - 1 : 5 * TILE;
  launch(flash_tensor_core<FAULT>, ceil_div(LENGTH, TILE), BLOCK, ROWS * STRIDE<FAULT> * sizeof(bf16), Stream(),
         q.data(), k.data(), v.data(), o.data(), LENGTH, scale);
  synchronize();
  return all_close(o.download(), reference_attention(inputs, 1, LENGTH, HEAD_DIM, scale).output, 5e-3f);
}

}  // namespace

FaultyCases flash_tensor_core_faults() {
#define CASE(name, kind)                                           \
  FaultyCase {                                                     \
#name, FindingKind::kind, __FILE__, [] { run<Fault::name>(); } \
  }
  return {
      CASE(no_wait, async_copy_not_waited),
      CASE(wait_allows_two, async_copy_not_waited),
      CASE(no_commit_in_loop, async_copy_not_waited),
      CASE(no_barrier_after_wait, shared_race),
      CASE(no_barrier_at_end, shared_race),
      CASE(prefetch_into_same_stage, async_copy_not_waited),
      CASE(tail_unguarded, out_of_bounds),
      CASE(rows_misaligned, misaligned_access),
      CASE(one_row_too_little, dynamic_shared_too_small),
  };
#undef CASE
}

CleanCases flash_tensor_core_clean_cases() {
  return {
      {"flash_tensor_core", __FILE__, run<Fault::none>},
      {"flash_tensor_core_with_bank_conflicts", __FILE__, run<Fault::unpadded_rows>},
  };
}

}  // namespace flashkata::corpus
