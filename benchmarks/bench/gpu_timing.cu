// On a real GPU only: the virtual one has no speed.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <string>

#include "benchmarks/bench/timing.hpp"
#include "common/gpu/gpu.hpp"

namespace flashkata::bench {
namespace {

constexpr int STEPS = 4096;  // of each chain
constexpr int CHAINS = 8;    // that a warp has in flight
constexpr double CEILING_S = 0.5;

// STEPS x CHAINS products of tensor cores, from registers.
__global__ void multiply_kernel(float* sums) {
  const std::uint32_t a[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};  // ones in bf16
  const std::uint32_t b[2] = {0x3f803f80, 0x3f803f80};
  float c[CHAINS][4] = {};
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll
    for (int chain = 0; chain < CHAINS; ++chain) mma_m16n8k16<bf16>(c[chain], a, b, c[chain]);
  }
  float sum = 0.0f;
  for (int chain = 0; chain < CHAINS; ++chain) sum += c[chain][0] + c[chain][1] + c[chain][2] + c[chain][3];
  sums[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// The same of multiplications and additions in fp32.
__global__ void multiply_add_kernel(float* sums, float factor) {
  float c[CHAINS];
  for (int chain = 0; chain < CHAINS; ++chain) c[chain] = static_cast<float>(threadIdx.x + chain);
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll
    for (int chain = 0; chain < CHAINS; ++chain) c[chain] = fmaf(c[chain], factor, 1.0f);
  }
  float sum = 0.0f;
  for (int chain = 0; chain < CHAINS; ++chain) sum += c[chain];
  sums[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

}  // namespace

Time time_on_gpu(const std::function<void()>& call, double seconds) {
  const auto begin = std::chrono::steady_clock::now();
  const auto spent = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
  for (int warm_up = 0; warm_up < 3 && spent() < seconds; ++warm_up) {
    call();
    synchronize();
  }
  std::vector<double> each;
  while (each.size() < 3 || (each.size() < 60 && spent() < seconds)) {
    Event start, stop;
    start.record();
    call();
    stop.record();
    each.push_back(static_cast<double>(Event::elapsed_ms(start, stop)));
  }
  return summary(each);
}

void fill_on_gpu(void* memory, std::size_t bytes, std::span<const std::byte> pattern) {
  if (bytes == 0) return;
  auto* to = static_cast<std::byte*>(memory);
  std::size_t filled = std::min(bytes, pattern.size());
  gpu_detail::check(cudaMemcpy(to, pattern.data(), filled, cudaMemcpyHostToDevice), "copying an input");
  while (filled < bytes) {  // what is there already is a whole number of patterns
    const std::size_t more = std::min(filled, bytes - filled);
    gpu_detail::check(cudaMemcpy(to + filled, to, more, cudaMemcpyDeviceToDevice), "copying an input");
    filled += more;
  }
}

int gpu_multiprocessors() {
  int count = 0;
  gpu_detail::check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0), "asking the GPU for its size");
  return count;
}

Ceilings gpu_ceilings() {
  cudaDeviceProp properties{};
  gpu_detail::check(cudaGetDeviceProperties(&properties, 0), "asking the GPU for its name");
  Ceilings ceilings{.name = properties.name};

  constexpr std::size_t COPIED = std::size_t{1} << 28;  // floats
  DeviceBuffer<float> from("from", COPIED), to("to", COPIED);
  const Time copying = time_on_gpu(
      [&] {
        gpu_detail::check(cudaMemcpyAsync(to.data(), from.data(), from.bytes(), cudaMemcpyDeviceToDevice), "copying");
      },
      CEILING_S);
  ceilings.copy_gb_s = 2.0 * static_cast<double>(from.bytes()) / copying.median * 1e-6;

  const int blocks = properties.multiProcessorCount * 4;
  constexpr int THREADS = 256;
  const auto grid = dim3(static_cast<unsigned>(blocks));
  const double work = static_cast<double>(blocks) * STEPS * CHAINS;
  const Time products =
      time_on_gpu([&] { launch(multiply_kernel, grid, dim3(THREADS), 0, Stream{}, to.data()); }, CEILING_S);
  ceilings.tensor_tflops = work * (THREADS / 32) * 2.0 * 16 * 8 * 16 / products.median * 1e-9;
  const Time sums =
      time_on_gpu([&] { launch(multiply_add_kernel, grid, dim3(THREADS), 0, Stream{}, to.data(), 0.5f); }, CEILING_S);
  ceilings.float32_tflops = work * THREADS * 2.0 / sums.median * 1e-9;
  return ceilings;
}

}  // namespace flashkata::bench
