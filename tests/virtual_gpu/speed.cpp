// Prints what the operations of the virtual GPU cost. speed is linked with fast kernels, speed_checked with checked
// ones.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "common/gpu/buffer.hpp"
#include "common/virtual_gpu/findings.hpp"
#include "tests/virtual_gpu/speed_kernels.hpp"

namespace {

using namespace flashkata;

/// Seconds of the fastest of a few runs.
template <typename Run>
double seconds(Run run) {
  double best = 1e30;
  for (int i = 0; i < 5; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    synchronize();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

std::vector<float> random_values(std::size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

void time_flash_forward(int length) {
  constexpr int HEADS = 2;
  constexpr int HEAD_DIM = 64;
  const std::size_t count = static_cast<std::size_t>(HEADS) * length * HEAD_DIM;
  DeviceBuffer<float> q("q", random_values(count, 1));
  DeviceBuffer<float> k("k", random_values(count, 2));
  DeviceBuffer<float> v("v", random_values(count, 3));
  DeviceBuffer<float> o("o", count);
  const double time = seconds([&] { speed::run_flash_forward(q.data(), k.data(), v.data(), o.data(), HEADS, length); });
  const std::vector<float> result = o.download();
  const bool complete = std::none_of(result.begin(), result.end(), [](float value) { return std::isnan(value); });
  std::printf("flash forward fp32, N=%-4d B=1 H=2 D=64   %9.2f ms%s\n", length, time * 1e3,
              complete ? "" : "   (NaN in the output)");
}

}  // namespace

int main() {
  if (!gpu_available()) {
    std::printf("skipped: %s\n", gpu_missing_reason().c_str());
    return 0;
  }
  constexpr int THREADS = 128;
  constexpr int COUNT = 20000;
  DeviceBuffer<float> out("out", 1024 * THREADS);
  const double per_operation = 1e9 / (static_cast<double>(THREADS) * COUNT);
  // One block: one OS thread does all the work.
  const double empty = seconds([&] { speed::run_empty(1000, THREADS); });
  std::printf("empty block of 128 threads  %8.2f us\n", empty * 1e3);
  std::printf("__syncthreads               %8.1f ns a thread\n",
              seconds([&] { speed::run_barriers(out.data(), 1, THREADS, COUNT); }) * per_operation);
  std::printf("__shfl_xor_sync             %8.1f ns a thread\n",
              seconds([&] { speed::run_shuffles(out.data(), 1, THREADS, COUNT); }) * per_operation);
  std::printf("mma_m16n8k16                %8.1f ns a thread\n",
              seconds([&] { speed::run_matrix_products(out.data(), 1, THREADS, COUNT); }) * per_operation);
  for (const int length : {128, 256, 512}) time_flash_forward(length);
  const std::vector<Finding> findings = take_findings();
  std::printf("%zu findings\n", findings.size());
  return findings.empty() ? 0 : 1;
}
