// What a run of the virtual GPU can be told, by the program or by environment variables.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashkata::virtual_gpu {

struct Options {
  /// OS threads that share out the blocks. KATA_GPU_THREADS; default: the number of cores. With one thread, float
  /// atomics always add in the same order.
  int threads;

  /// 0: threads run in order. Otherwise the seed of a random order of threads and blocks. KATA_GPU_SCHEDULE.
  std::uint64_t schedule_seed = 0;

  /// Stack of one CUDA thread. KATA_GPU_STACK_KB; default 64.
  std::size_t stack_bytes = 64 * 1024;

  /// Look at memory accesses at all; without effect on kernels that were compiled for the fast mode.
  bool check = true;

  /// Record each access for profiles(): sectors and wavefronts per source line. Slower; checked kernels only.
  bool profile = false;
};

/// The options of the next launch. The first call reads the environment.
Options& options();

/// True if a kernel file of this program was compiled for the checked mode.
bool has_checked_kernels();

}  // namespace flashkata::virtual_gpu
