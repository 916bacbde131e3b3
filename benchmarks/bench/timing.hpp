// Times of one call: Google Benchmark on the CPU, events on a GPU.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <span>
#include <vector>

#include "benchmarks/bench/problem.hpp"

namespace flashkata::bench {

/// Of milliseconds, one for each call.
inline Time summary(std::vector<double> each) {
  std::sort(each.begin(), each.end());
  const auto at = [&](double part) {
    return each[static_cast<std::size_t>(part * static_cast<double>(each.size() - 1))];
  };
  return {.median = at(0.5), .low = at(0.25), .high = at(0.75), .calls = static_cast<int>(each.size())};
}

/// Calls until the median is worth something: at least 3 times and for about so many seconds, at most 60 times.
Time time_on_cpu(const std::function<void()>& call, double seconds);
Time time_on_gpu(const std::function<void()>& call, double seconds);

/// Fills memory of the GPU with `pattern`, again and again.
void fill_on_gpu(void* memory, std::size_t bytes, std::span<const std::byte> pattern);
int gpu_multiprocessors();

/// What a processor can do, by one thread or by all (0).
Ceilings cpu_ceilings(int threads);
/// ... and a GPU: what the instructions that the course's kernels are made of reach, without any waiting for memory.
Ceilings gpu_ceilings();

}  // namespace flashkata::bench
