// Flash attention backward in float (the gradient of q), right and with the faults that are easily made in it.
//
// One block owns 32 keys and walks over the query tiles, so that all blocks add to the same rows of dq.
#include "tests/virtual_gpu/flash_kernels.hpp"

namespace flashkata::corpus {
namespace {

enum class Fault {
  none,
  no_barrier_before_tile,  // harmless: the barrier after dS comes after the last read of a query tile
  no_barrier_after_tile,   // a query tile is read before it is complete
  no_barrier_after_ds,     // dS is read before it is complete
  dq_without_atomic,       // blocks add to dq at the same time
};

constexpr int HEAD_DIM = 32;
constexpr int TILE = 32;
constexpr int LANES = 4;
constexpr int BLOCK = TILE * LANES;
constexpr int KEYS = TILE / LANES;
constexpr int DIMS = HEAD_DIM / LANES;
constexpr int LENGTH = 70;

struct Tensors {
  const float* q;
  const float* k;
  const float* v;
  const float* output_gradient;
  const float* lse;
  const float* delta;  // per query: sum over d of output * output_gradient
  float* q_gradient;
};

template <Fault FAULT>
__global__ void flash_backward(Tensors in, int length, float scale) {
  float* q_smem = dynamic_shared<float>();          // [TILE, HEAD_DIM + 1]
  float* do_smem = q_smem + TILE * (HEAD_DIM + 1);  // [TILE, HEAD_DIM + 1]
  float* k_smem = do_smem + TILE * (HEAD_DIM + 1);  // [TILE, HEAD_DIM + 1]
  float* v_smem = k_smem + TILE * (HEAD_DIM + 1);   // [TILE, HEAD_DIM + 1]
  float* ds_smem = v_smem + TILE * (HEAD_DIM + 1);  // [TILE, TILE + 1]
  const int row = threadIdx.x / LANES;
  const int part = threadIdx.x % LANES;
  const int first_key = blockIdx.x * TILE;

  for (int i = threadIdx.x; i < TILE * HEAD_DIM; i += BLOCK) {
    const int r = i / HEAD_DIM;
    const int d = i % HEAD_DIM;
    const bool exists = first_key + r < length;
    k_smem[r * (HEAD_DIM + 1) + d] = exists ? in.k[(first_key + r) * HEAD_DIM + d] : 0.0f;
    v_smem[r * (HEAD_DIM + 1) + d] = exists ? in.v[(first_key + r) * HEAD_DIM + d] : 0.0f;
  }

  for (int first_query = 0; first_query < length; first_query += TILE) {
    if constexpr (FAULT != Fault::no_barrier_before_tile) __syncthreads();
    for (int i = threadIdx.x; i < TILE * HEAD_DIM; i += BLOCK) {
      const int r = i / HEAD_DIM;
      const int d = i % HEAD_DIM;
      const bool exists = first_query + r < length;
      const int source = (first_query + r) * HEAD_DIM + d;
      const int target = r * (HEAD_DIM + 1) + d;
      q_smem[target] = exists ? in.q[source] : 0.0f;                 // <- no_barrier_after_tile
      do_smem[target] = exists ? in.output_gradient[source] : 0.0f;  // <- no_barrier_after_tile
    }
    if constexpr (FAULT != Fault::no_barrier_after_tile) __syncthreads();

    const int query = first_query + row;
    for (int j = 0; j < KEYS; ++j) {
      const int key = part + LANES * j;
      float score = 0.0f;
      float dp = 0.0f;
      for (int d = 0; d < HEAD_DIM; ++d) {
        const float q = q_smem[row * (HEAD_DIM + 1) + d];                 // <- no_barrier_after_tile
        const float output_gradient = do_smem[row * (HEAD_DIM + 1) + d];  // <- no_barrier_after_tile
        score += q * k_smem[key * (HEAD_DIM + 1) + d];
        dp += output_gradient * v_smem[key * (HEAD_DIM + 1) + d];
      }
      const bool exists = query < length && first_key + key < length;
      const float p = exists ? __expf(score * scale - in.lse[query]) : 0.0f;
      const float ds = exists ? p * (dp - in.delta[query]) * scale : 0.0f;
      ds_smem[row * (TILE + 1) + key] = ds;  // <- no_barrier_after_ds
    }
    if constexpr (FAULT != Fault::no_barrier_after_ds) __syncthreads();

    // Rows are mirrored, so that threads read what another warp has written.
    const int mirrored = TILE - 1 - row;
    if (first_query + mirrored >= length) continue;
    for (int j = 0; j < DIMS; ++j) {
      const int d = part + LANES * j;
      float sum = 0.0f;
      for (int key = 0; key < TILE; ++key) {
        const float ds = ds_smem[mirrored * (TILE + 1) + key];  // <- no_barrier_after_ds
        sum += ds * k_smem[key * (HEAD_DIM + 1) + d];
      }
      float* target = &in.q_gradient[(first_query + mirrored) * HEAD_DIM + d];
      if constexpr (FAULT == Fault::dq_without_atomic) {
        *target += sum;  // <- dq_without_atomic
      } else {
        atomicAdd(target, sum);
      }
    }
  }
}

template <Fault FAULT>
bool run() {
  const float scale = 0.25f;
  const AttentionInputs inputs = attention_inputs(1, LENGTH, HEAD_DIM);
  const AttentionResults want = reference_attention(inputs, 1, LENGTH, HEAD_DIM, scale);
  std::vector<float> deltas(LENGTH, 0.0f);
  for (int i = 0; i < LENGTH * HEAD_DIM; ++i) deltas[i / HEAD_DIM] += want.output[i] * inputs.output_gradient[i];

  DeviceBuffer<float> q("q", inputs.q);
  DeviceBuffer<float> k("k", inputs.k);
  DeviceBuffer<float> v("v", inputs.v);
  DeviceBuffer<float> output_gradient("output_gradient", inputs.output_gradient);
  DeviceBuffer<float> lse("lse", want.lse);
  DeviceBuffer<float> delta("delta", deltas);
  DeviceBuffer<float> q_gradient("q_gradient", inputs.q.size());
  q_gradient.fill_zero();
  const Tensors tensors{q.data(),   k.data(),     v.data(),         output_gradient.data(),
                        lse.data(), delta.data(), q_gradient.data()};
  const std::size_t shared_bytes = (4 * TILE * (HEAD_DIM + 1) + TILE * (TILE + 1)) * sizeof(float);
  launch(flash_backward<FAULT>, ceil_div(LENGTH, TILE), BLOCK, shared_bytes, Stream(), tensors, LENGTH, scale);
  synchronize();
  return all_close(q_gradient.download(), want.q_gradient, 1e-4f);
}

}  // namespace

FaultyCases flash_backward_faults() {
#define CASE(name, kind)                                           \
  FaultyCase {                                                     \
#name, FindingKind::kind, __FILE__, [] { run<Fault::name>(); } \
  }
  return {
      CASE(no_barrier_after_tile, shared_race),
      CASE(no_barrier_after_ds, shared_race),
      CASE(dq_without_atomic, global_race),
  };
#undef CASE
}

CleanCases flash_backward_clean_cases() {
  return {
      {"flash_backward", __FILE__, run<Fault::none>},
      {"flash_backward_with_two_barriers", __FILE__, run<Fault::no_barrier_before_tile>},
  };
}

}  // namespace flashkata::corpus
