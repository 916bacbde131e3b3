#include "slow_kernels.hpp"

#include "common/gpu/gpu.hpp"

namespace flashkata::testing {
namespace {

KATA_DEVICE void spin([[maybe_unused]] long long nanoseconds) {
#if KATA_REAL_GPU
  const auto now = [] {
    long long time = 0;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
    return time;
  };
  const long long begin = now();
  while (now() - begin < nanoseconds) {
  }
#endif
}

__global__ void write_late_kernel(long long nanoseconds, float first, float* numbers, int count) {
  if (blockIdx.x == 0) spin(nanoseconds);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    numbers[i] = first + static_cast<float>(i);
  }
}

__global__ void busy_kernel(long long nanoseconds) { spin(nanoseconds); }

}  // namespace

void write_late(std::chrono::microseconds late, float first, std::span<float> numbers, const Stream& stream) {
  launch(write_late_kernel, dim3(1), dim3(32), 0, stream, late.count() * 1000, first, numbers.data(),
         static_cast<int>(numbers.size()));
}

void keep_busy([[maybe_unused]] int waves, std::chrono::microseconds each, const Stream& stream) {
  unsigned blocks = 1;
  std::size_t shared_bytes = 0;
#if KATA_REAL_GPU
  int device = 0, multiprocessors = 0, most = 0;
  gpu_detail::check(cudaGetDevice(&device), "asking for the GPU");
  gpu_detail::check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "asking a GPU");
  gpu_detail::check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "asking a GPU");
  blocks = static_cast<unsigned>(waves * multiprocessors);
  shared_bytes = static_cast<std::size_t>(most) / 4 * 3;
#endif
  launch(busy_kernel, dim3(blocks), dim3(128), shared_bytes, stream, each.count() * 1000);
}

}  // namespace flashkata::testing
