#include "tests/virtual_gpu/unit_kernels.hpp"

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
