#include <stdexcept>

#include "benchmarks/bench/timing.hpp"

namespace flashkata::bench {

Time time_on_gpu(const std::function<void()>&) { throw std::runtime_error("this build has only the virtual GPU"); }

Ceilings gpu_ceilings() { throw std::runtime_error("this build has only the virtual GPU"); }

}  // namespace flashkata::bench
