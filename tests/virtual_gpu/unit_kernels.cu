#include "tests/virtual_gpu/unit_kernels.hpp"

#include <type_traits>

#include "common/gpu/gpu.hpp"

namespace flashkata::unit {
namespace {

template <typename T>
__global__ void multiply_kernel(const float* a, const float* b, const float* c, float* d) {
  const int lane = threadIdx.x;
  const int group = lane / 4;
  const int pair = lane % 4 * 2;
  std::uint32_t a_frag[4];
  std::uint32_t b_frag[2];
  float c_frag[4];
  for (int i = 0; i < 4; ++i) {
    const float* row = a + (group + i % 2 * 8) * 16 + pair + i / 2 * 8;
    a_frag[i] = pack2<T>(row[0], row[1]);
    c_frag[i] = c[(group + i / 2 * 8) * 8 + pair + i % 2];
  }
  for (int i = 0; i < 2; ++i) {
    const float* element = b + (pair + i * 8) * 8 + group;
    b_frag[i] = pack2<T>(element[0], element[8]);
  }
  float d_frag[4];
  mma_m16n8k16<T>(d_frag, a_frag, b_frag, c_frag);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + pair + i % 2] = d_frag[i];
}

template <typename T>
std::vector<float> multiply(const std::vector<float>& a, const std::vector<float>& b, const std::vector<float>& c) {
  DeviceBuffer<float> a_buffer("a", a);
  DeviceBuffer<float> b_buffer("b", b);
  DeviceBuffer<float> c_buffer("c", c);
  DeviceBuffer<float> d_buffer("d", c.size());
  launch(multiply_kernel<T>, 1, 32, 0, Stream(), a_buffer.data(), b_buffer.data(), c_buffer.data(), d_buffer.data());
  synchronize();
  return d_buffer.download();
}

__global__ void load_matrices_kernel(std::uint32_t* out, MatrixLoad which) {
  alignas(16) __shared__ std::uint16_t tile[32][8];  // 4 matrices of 8 x 8
  const int lane = threadIdx.x;
  for (int col = 0; col < 8; ++col) tile[lane][col] = static_cast<std::uint16_t>(lane * 8 + col);
  __syncthreads();
  std::uint32_t four[4] = {0, 0, 0, 0};
  std::uint32_t two[2] = {0, 0};
  if (which == MatrixLoad::x4) ldmatrix_x4(four, tile[lane]);
  if (which == MatrixLoad::x4_trans) ldmatrix_x4_trans(four, tile[lane]);
  if (which == MatrixLoad::x2) ldmatrix_x2(two, tile[lane]);
  if (which == MatrixLoad::x2_trans) ldmatrix_x2_trans(two, tile[lane]);
  const bool is_x2 = which == MatrixLoad::x2 || which == MatrixLoad::x2_trans;
  for (int i = 0; i < 4; ++i) out[i * 32 + lane] = is_x2 ? two[i % 2] : four[i];
}

__global__ void to_half_kernel(const float* in, std::uint16_t* out, int count, bool bf) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = bf ? to_bf16(in[i]).x : to_fp16(in[i]).x;
}

__global__ void from_fp16_kernel(const std::uint16_t* in, float* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = to_float(fp16{in[i]});
}

std::vector<std::uint16_t> to_half(const std::vector<float>& values, bool bf) {
  DeviceBuffer<float> in("in", values);
  DeviceBuffer<std::uint16_t> out("out", values.size());
  const int count = static_cast<int>(values.size());
  launch(to_half_kernel, ceil_div(count, 256), 256, 0, Stream(), in.data(), out.data(), count, bf);
  synchronize();
  return out.download();
}

__global__ void zero_fill_kernel(const std::uint8_t* in, std::uint8_t* out, int bytes, int source_bytes) {
  alignas(16) __shared__ std::uint8_t cell[16];
  for (int i = 0; i < 16; ++i) cell[i] = 0xff;
  if (bytes == 4) cp_async_4(cell, in, source_bytes);
  if (bytes == 8) cp_async_8(cell, in, source_bytes);
  if (bytes == 16) cp_async_16(cell, in, source_bytes);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < 16; ++i) out[i] = cell[i];
}

__global__ void shuffles_kernel(int* out, int argument, int width) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(FULL_WARP, lane, argument, width);
  out[32 + lane] = __shfl_xor_sync(FULL_WARP, lane, argument, width);
  out[64 + lane] = __shfl_down_sync(FULL_WARP, lane, argument, width);
  out[96 + lane] = __shfl_up_sync(FULL_WARP, lane, argument, width);
}

__global__ void matches_and_reductions_kernel(const int* values, unsigned* out) {
  const int lane = threadIdx.x;
  const int value = values[lane];
  const auto bits = static_cast<unsigned>(value);
  unsigned* mine = out + lane * MATCH_RESULTS;
  mine[0] = __match_any_sync(FULL_WARP, value);
  mine[1] = __match_any_sync(FULL_WARP, static_cast<float>(value));
  mine[2] = __match_any_sync(FULL_WARP, static_cast<long long>(value) << 32);
  mine[3] = __reduce_add_sync(FULL_WARP, value);
  mine[4] = __reduce_add_sync(FULL_WARP, bits);
  mine[5] = __reduce_min_sync(FULL_WARP, value);
  mine[6] = __reduce_min_sync(FULL_WARP, bits);
  mine[7] = __reduce_max_sync(FULL_WARP, value);
  mine[8] = __reduce_max_sync(FULL_WARP, bits);
  mine[9] = __reduce_and_sync(FULL_WARP, bits);
  mine[10] = __reduce_or_sync(FULL_WARP, bits);
  mine[11] = __reduce_xor_sync(FULL_WARP, bits);
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  if (lane < 16) {
    mine[12] = __match_any_sync(half, value);
    mine[13] = __reduce_add_sync(half, value);
  } else {
    mine[12] = __match_any_sync(half, value);
    mine[13] = __reduce_add_sync(half, value);
  }
}

__global__ void barrier_votes_kernel(const int* values, int* out) {
  const int thread = threadIdx.x;
  const int count = blockDim.x;
  const int value = values[thread];
  const int predicates[3] = {value, value * value == 25, 0};  // any number but 0 is a yes
  for (int i = 0; i < 3; ++i) {
    out[(3 * i + 0) * count + thread] = __syncthreads_or(predicates[i]);
    out[(3 * i + 1) * count + thread] = __syncthreads_and(predicates[i]);
    out[(3 * i + 2) * count + thread] = __syncthreads_count(predicates[i]);
  }
}

__global__ void atomics_kernel(unsigned long long* element, const int* values, Atomic which) {
  const int value = values[threadIdx.x];
  auto* signed_element = reinterpret_cast<int*>(element);
  auto* unsigned_element = reinterpret_cast<unsigned*>(element);
  if (which == Atomic::subtract_int) atomicSub(signed_element, value);
  if (which == Atomic::subtract_unsigned) atomicSub(unsigned_element, static_cast<unsigned>(value));
  if (which == Atomic::exclusive_or) {
    atomicXor(signed_element, value);
    atomicXor(unsigned_element + 1, static_cast<unsigned>(value));
    atomicXor(element, static_cast<unsigned long long>(value) << 20);
  }
  if (which == Atomic::increment) atomicInc(unsigned_element, 9u);
  if (which == Atomic::decrement) atomicDec(unsigned_element, 9u);
  if (which == Atomic::largest_by_compare_and_swap) {
    const auto mine = static_cast<unsigned long long>(value) << 33;
    unsigned long long seen = 0;  // a guess: a plain read would race
    while (seen < mine) {
      const unsigned long long before = atomicCAS(element, seen, mine);
      if (before == seen) break;
      seen = before;
    }
  }
}

__global__ void float_functions_kernel(const float* in, unsigned* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float x = in[i];
  const unsigned results[FLOAT_RESULTS] = {
      static_cast<unsigned>(__float2int_rn(x)),
      static_cast<unsigned>(__float2int_rz(x)),
      static_cast<unsigned>(__float2int_rd(x)),
      static_cast<unsigned>(__float2int_ru(x)),
      __float2uint_rn(x),
      __float2uint_rz(x),
      __float2uint_rd(x),
      __float2uint_ru(x),
      __float_as_uint(__frsqrt_rn(x)),
      isnan(x) ? 1u : 0u,
      isinf(x) ? 1u : 0u,
      isfinite(x) ? 1u : 0u,
  };
  for (int k = 0; k < FLOAT_RESULTS; ++k) out[k * count + i] = results[k];
}

__global__ void float_pairs_kernel(const float* a, const float* b, float* out, int count) {
  const int i = threadIdx.x;
  if (i >= count) return;
  out[0 * count + i] = __fadd_rn(a[i], b[i]);
  out[1 * count + i] = __fsub_rn(a[i], b[i]);
  out[2 * count + i] = __fmul_rn(a[i], b[i]);
  out[3 * count + i] = __fdiv_rn(a[i], b[i]);
  // Whatever is loaded and stored past a cache is the same number.
  __stcs(&out[4 * count + i], __ldcg(&a[i]));
  __stcg(&out[5 * count + i], __ldcs(&a[i]));
  out[6 * count + i] = __ldca(&a[i]);
  out[7 * count + i] = fdividef(a[i], b[i]);
}

__global__ void integer_functions_kernel(const unsigned long long* in, long long* out, int count) {
  const int i = threadIdx.x;
  if (i >= count) return;
  const auto low = static_cast<unsigned>(in[i]);
  out[0 * count + i] = __popcll(in[i]);
  out[1 * count + i] = __clzll(static_cast<long long>(in[i]));
  out[2 * count + i] = __ffsll(static_cast<long long>(in[i]));
  out[3 * count + i] = __ffs(static_cast<int>(low));
  out[4 * count + i] = __brev(low);
  out[5 * count + i] = __umulhi(low, 0x9e3779b9u);
  out[6 * count + i] = __mulhi(static_cast<int>(low), -12345);
}

template <typename T, typename U>
__device__ bool is(U value, T want) {
  return std::is_same_v<T, U> && value == want;
}

__global__ void mixed_types_kernel(int* out) {
  const int negative = -1;
  const unsigned two = 2;
  const long negative_long = -1;
  const unsigned long two_long = 2;
  const long long negative_long_long = -1;
  const unsigned long long two_long_long = 2;
  int i = 0;
  out[i++] = is(min(negative, two), 2u) && is(min(two, negative), 2u);
  out[i++] = is(max(negative, two), 0xffffffffu) && is(max(two, negative), 0xffffffffu);
  out[i++] = is(min(negative_long, two_long), 2ul) && is(max(two_long, negative_long), ~0ul);
  out[i++] = is(min(negative_long_long, two_long_long), 2ull) && is(max(two_long_long, negative_long_long), ~0ull);
  out[i++] = is(min(1.5f, 1.25), 1.25) && is(max(1.25, 1.5f), 1.5);
  out[i++] = is(min(negative, 2), -1) && is(max(1.0f, 2.0f), 2.0f);
  out[i++] = CUDART_INF_F > 3.0e38f && isinf(CUDART_INF_F) && isnan(CUDART_NAN_F);
  const double2 pair = make_double2(1.0, 2.0);
  out[i++] = sizeof(double2) == 16 && alignof(double2) == 16 && pair.x + pair.y == 3.0;
}

__global__ void trap_kernel(const float* in) {
  if (in[threadIdx.x] < 0.0f) __trap();
  __threadfence_system();
}

__global__ void arrival_kernel(int* out) {
  __shared__ int arrived;
  if (threadIdx.x == 0) arrived = 0;
  __syncthreads();
  out[threadIdx.x] = atomicAdd(&arrived, 1);
}

__global__ void identities_kernel(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  unsigned* mine = out + 6 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  mine[0] = blockIdx.x;
  mine[1] = blockIdx.y;
  mine[2] = blockIdx.z;
  mine[3] = threadIdx.x;
  mine[4] = threadIdx.y;
  mine[5] = threadIdx.z;
}

__global__ void write_kernel(float* out, int index) { out[index] = 1.0f; }

__global__ void dynamic_memory_kernel(float* out, int count) {
  float* memory = dynamic_shared<float>();
  memory[count - 1] = 5.0f;
  out[0] = memory[count - 1];
}

__global__ void nothing_kernel() {}

template <int ROW>
__global__ void transpose_kernel(const float* in, float* out) {
  __shared__ float tile[32][ROW];
  const int lane = threadIdx.x;
  for (int row = 0; row < 32; ++row) tile[row][lane] = in[row * 32 + lane];
  __syncthreads();
  for (int row = 0; row < 32; ++row) out[row * 32 + lane] = tile[lane][row];
}

__global__ void strided_load_kernel(const float* in, float* out, int stride) {
  out[threadIdx.x] = in[threadIdx.x * stride];
}

__global__ void pipelined_copy_kernel(const float* in, float* out, bool overlapped) {
  alignas(16) __shared__ float tile[2][128];
  const int i = threadIdx.x;
  cp_async_16(&tile[0][4 * i], &in[4 * i]);
  cp_async_commit();
  for (int round = 0; round < 8; ++round) {
    if (round < 7) cp_async_16(&tile[(round + 1) % 2][4 * i], &in[(round + 1) * 128 + 4 * i]);
    cp_async_commit();
    if (overlapped) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncwarp();
    for (int k = 0; k < 4; ++k) out[round * 128 + k * 32 + i] = tile[round % 2][k * 32 + i];
    __syncwarp();
  }
}

__device__ float recursion(float* out, int depth) {
  volatile float local[256];
  local[depth % 256] = out[0];
  return depth == 0 ? local[0] : recursion(out, depth - 1) + local[depth % 256];
}

__global__ void recursion_kernel(float* out, int depth) { out[0] = recursion(out, depth); }

__global__ void misaligned_kernel(const float* in, float* out) {
  *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(in + 1);
}

dim3 to_dim3(std::array<unsigned, 3> shape) { return dim3(shape[0], shape[1], shape[2]); }

}  // namespace

std::vector<float> multiply_bf16(const std::vector<float>& a, const std::vector<float>& b,
                                 const std::vector<float>& c) {
  return multiply<bf16>(a, b, c);
}
std::vector<float> multiply_fp16(const std::vector<float>& a, const std::vector<float>& b,
                                 const std::vector<float>& c) {
  return multiply<fp16>(a, b, c);
}

std::vector<std::uint32_t> load_matrices(MatrixLoad which) {
  DeviceBuffer<std::uint32_t> out("out", 4 * 32);
  launch(load_matrices_kernel, 1, 32, 0, Stream(), out.data(), which);
  synchronize();
  return out.download();
}

std::vector<std::uint16_t> to_bf16_on_device(const std::vector<float>& values) { return to_half(values, true); }
std::vector<std::uint16_t> to_fp16_on_device(const std::vector<float>& values) { return to_half(values, false); }

std::vector<float> from_fp16_on_device(const std::vector<std::uint16_t>& values) {
  DeviceBuffer<std::uint16_t> in("in", values);
  DeviceBuffer<float> out("out", values.size());
  const int count = static_cast<int>(values.size());
  launch(from_fp16_kernel, ceil_div(count, 256), 256, 0, Stream(), in.data(), out.data(), count);
  synchronize();
  return out.download();
}

std::vector<std::uint8_t> copy_with_zero_fill(int bytes, int source_bytes) {
  std::vector<std::uint8_t> values(16);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<std::uint8_t>(i + 1);
  DeviceBuffer<std::uint8_t> in("in", values);
  DeviceBuffer<std::uint8_t> out("out", 16);
  launch(zero_fill_kernel, 1, 1, 0, Stream(), in.data(), out.data(), bytes, source_bytes);
  synchronize();
  return out.download();
}

std::vector<int> shuffles(int argument, int width) {
  DeviceBuffer<int> out("out", 4 * 32);
  launch(shuffles_kernel, 1, 32, 0, Stream(), out.data(), argument, width);
  synchronize();
  return out.download();
}

std::vector<unsigned> matches_and_reductions(const std::vector<int>& values) {
  DeviceBuffer<int> in("values", values);
  DeviceBuffer<unsigned> out("out", values.size() * MATCH_RESULTS);
  launch(matches_and_reductions_kernel, 1, 32, 0, Stream(), in.data(), out.data());
  synchronize();
  return out.download();
}

std::vector<int> barrier_votes(const std::vector<int>& values) {
  DeviceBuffer<int> in("values", values);
  DeviceBuffer<int> out("out", 9 * values.size());
  launch(barrier_votes_kernel, 1, static_cast<unsigned>(values.size()), 0, Stream(), in.data(), out.data());
  synchronize();
  return out.download();
}

unsigned long long atomics(Atomic which, unsigned long long start, const std::vector<int>& values) {
  DeviceBuffer<int> in("values", values);
  DeviceBuffer<unsigned long long> element("element", std::vector<unsigned long long>{start});
  launch(atomics_kernel, 1, static_cast<unsigned>(values.size()), 0, Stream(), element.data(), in.data(), which);
  synchronize();
  return element.download()[0];
}

std::vector<unsigned> float_functions(const std::vector<float>& values) {
  DeviceBuffer<float> in("in", values);
  DeviceBuffer<unsigned> out("out", FLOAT_RESULTS * values.size());
  const int count = static_cast<int>(values.size());
  launch(float_functions_kernel, ceil_div(count, 256), 256, 0, Stream(), in.data(), out.data(), count);
  synchronize();
  return out.download();
}

std::vector<float> float_pairs(const std::vector<float>& a, const std::vector<float>& b) {
  DeviceBuffer<float> a_buffer("a", a);
  DeviceBuffer<float> b_buffer("b", b);
  DeviceBuffer<float> out("out", 8 * a.size());
  const int count = static_cast<int>(a.size());
  launch(float_pairs_kernel, 1, 256, 0, Stream(), a_buffer.data(), b_buffer.data(), out.data(), count);
  synchronize();
  return out.download();
}

std::vector<long long> integer_functions(const std::vector<unsigned long long>& values) {
  DeviceBuffer<unsigned long long> in("in", values);
  DeviceBuffer<long long> out("out", 7 * values.size());
  const int count = static_cast<int>(values.size());
  launch(integer_functions_kernel, 1, 256, 0, Stream(), in.data(), out.data(), count);
  synchronize();
  return out.download();
}

std::vector<int> mixed_types() {
  DeviceBuffer<int> out("out", 8);
  launch(mixed_types_kernel, 1, 1, 0, Stream(), out.data());
  synchronize();
  return out.download();
}

void trap_if_negative(const float* in) {
  launch(trap_kernel, 1, 32, 0, Stream(), in);
  synchronize();
}

std::vector<int> arrival_order(int threads) {
  DeviceBuffer<int> out("out", static_cast<std::size_t>(threads));
  launch(arrival_kernel, 1, threads, 0, Stream(), out.data());
  synchronize();
  return out.download();
}

std::vector<std::array<unsigned, 6>> identities(std::array<unsigned, 3> grid, std::array<unsigned, 3> block) {
  const std::size_t count = std::size_t{grid[0]} * grid[1] * grid[2] * block[0] * block[1] * block[2];
  DeviceBuffer<unsigned> out("out", 6 * count);
  launch(identities_kernel, to_dim3(grid), to_dim3(block), 0, Stream(), out.data());
  synchronize();
  const std::vector<unsigned> flat = out.download();
  std::vector<std::array<unsigned, 6>> result(count);
  for (std::size_t i = 0; i < flat.size(); ++i) result[i / 6][i % 6] = flat[i];
  return result;
}

void write_element(float* out, int index) {
  launch(write_kernel, 1, 1, 0, Stream(), out, index);
  synchronize();
}

void use_dynamic_memory(float* out, std::size_t shared_bytes) {
  launch(dynamic_memory_kernel, 1, 1, shared_bytes, Stream(), out, static_cast<int>(shared_bytes / sizeof(float)));
  synchronize();
}

void launch_shape(std::array<unsigned, 3> grid, std::array<unsigned, 3> block, std::size_t shared_bytes) {
  launch(nothing_kernel, to_dim3(grid), to_dim3(block), shared_bytes, Stream());
  synchronize();
}

void transpose(const float* in, float* out, bool padded) {
  launch(padded ? transpose_kernel<33> : transpose_kernel<32>, 1, 32, 0, Stream(), in, out);
  synchronize();
}

void strided_load(const float* in, float* out, int stride) {
  launch(strided_load_kernel, 1, 32, 0, Stream(), in, out, stride);
  synchronize();
}

void pipelined_copy(const float* in, float* out, bool overlapped) {
  launch(pipelined_copy_kernel, 1, 32, 0, Stream(), in, out, overlapped);
  synchronize();
}

void recurse(float* out, int depth) {
  launch(recursion_kernel, 1, 32, 0, Stream(), out, depth);
  synchronize();
}

void misaligned_float4(const float* in, float* out) {
  launch(misaligned_kernel, 1, 1, 0, Stream(), in, out);
  synchronize();
}

}  // namespace flashkata::unit
