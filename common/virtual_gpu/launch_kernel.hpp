// Launching a kernel on the virtual GPU. It has finished when the call returns.
#pragma once

#include <cstddef>

#include "common/virtual_gpu/vector_types.hpp"

namespace flashkata::virtual_gpu {

struct KernelCall {
  const void* kernel;              // for its name
  void (*enter)(void* arguments);  // calls it
  void* arguments;
  std::size_t argument_bytes;
};

/// Null if the launch is possible, otherwise the reason why a GPU would refuse it.
const char* launch_error(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes);

/// Runs all blocks. Findings and profile go where take_findings() and take_profiles() find them.
void launch_kernel(const KernelCall& call, dim3 grid, dim3 block, std::size_t dynamic_shared_bytes);

}  // namespace flashkata::virtual_gpu
