#include <stdexcept>

#include "benchmarks/bench/timing.hpp"

namespace flashkata::bench {

Time time_on_gpu(const std::function<void()>&, double) {
  throw std::runtime_error("this build has only the virtual GPU");
}

void fill_on_gpu(void*, std::size_t, std::span<const std::byte>) {
  throw std::runtime_error("this build has only the virtual GPU");
}

int gpu_multiprocessors() { return 1; }

Ceilings gpu_ceilings() { throw std::runtime_error("this build has only the virtual GPU"); }

}  // namespace flashkata::bench
