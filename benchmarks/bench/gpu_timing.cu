// On a real GPU only: the virtual one has no speed.
#include <cuda_runtime.h>

#include <chrono>
#include <string>

#include "benchmarks/bench/timing.hpp"
#include "common/gpu/gpu.hpp"

namespace flashkata::bench {
namespace {

constexpr int STEPS = 4096;  // of each chain
constexpr int CHAINS = 8;    // that a warp has in flight

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

Time time_on_gpu(const std::function<void()>& call) {
  for (int warm_up = 0; warm_up < 3; ++warm_up) call();
  synchronize();
  std::vector<double> each;
  const auto begin = std::chrono::steady_clock::now();
  const auto enough = [&] { return std::chrono::steady_clock::now() - begin > std::chrono::milliseconds(500); };
  while (each.size() < 7 || (each.size() < 60 && !enough())) {
    Event start, stop;
    start.record();
    call();
    stop.record();
    each.push_back(static_cast<double>(Event::elapsed_ms(start, stop)));
  }
  return summary(each);
}

Ceilings gpu_ceilings() {
  cudaDeviceProp properties{};
  gpu_detail::check(cudaGetDeviceProperties(&properties, 0), "asking the GPU for its name");
  Ceilings ceilings{.name = properties.name};

  constexpr std::size_t COPIED = std::size_t{1} << 28;  // floats
  DeviceBuffer<float> from("from", COPIED), to("to", COPIED);
  const Time copying = time_on_gpu([&] {
    gpu_detail::check(cudaMemcpyAsync(to.data(), from.data(), from.bytes(), cudaMemcpyDeviceToDevice), "copying");
  });
  ceilings.copy_gb_s = 2.0 * static_cast<double>(from.bytes()) / copying.median * 1e-6;

  const int blocks = properties.multiProcessorCount * 4;
  constexpr int THREADS = 256;
  const auto grid = dim3(static_cast<unsigned>(blocks));
  const double work = static_cast<double>(blocks) * STEPS * CHAINS;
  const Time products = time_on_gpu([&] { launch(multiply_kernel, grid, dim3(THREADS), 0, Stream{}, to.data()); });
  ceilings.tensor_tflops = work * (THREADS / 32) * 2.0 * 16 * 8 * 16 / products.median * 1e-9;
  const Time sums =
      time_on_gpu([&] { launch(multiply_add_kernel, grid, dim3(THREADS), 0, Stream{}, to.data(), 0.5f); });
  ceilings.float32_tflops = work * THREADS * 2.0 / sums.median * 1e-9;
  return ceilings;
}

}  // namespace flashkata::bench
