// Which world this is: real CUDA, or the virtual GPU.
//
// A kernel file (.cu) is compiled by nvcc (real) or by the host compiler (virtual). Host files of a CUDA build are told
// by KATA_GPU_CUDA, which the build defines for the target flashkata_gpu.
#pragma once

#if defined(__CUDACC__) || defined(KATA_GPU_CUDA)
#define KATA_REAL_GPU 1
#include <cuda_runtime.h>
#include <math_constants.h>
#else
#define KATA_REAL_GPU 0
#include "common/virtual_gpu/cuda_language.hpp"
#endif

#ifdef __CUDACC__
#define KATA_DEVICE __device__ __forceinline__
#define KATA_BOTH __host__ __device__ __forceinline__
#else
#define KATA_DEVICE inline __attribute__((always_inline))
#define KATA_BOTH inline __attribute__((always_inline))
#endif

// Device functions exist in a kernel file and, on the virtual GPU, everywhere.
#if defined(__CUDACC__) || !KATA_REAL_GPU
#define KATA_HAS_DEVICE_CODE 1
#else
#define KATA_HAS_DEVICE_CODE 0
#endif

namespace flashkata {

/// All 32 lanes take part.
constexpr unsigned FULL_WARP = 0xffffffffu;

#if KATA_HAS_DEVICE_CODE
/// The block's dynamic shared memory, of the size that the launch asked for; aligned to 128 bytes.
template <typename T>
KATA_DEVICE T* dynamic_shared() {
#if KATA_REAL_GPU
  extern __shared__ __align__(128) unsigned char flashkata_dynamic_shared[];
  return reinterpret_cast<T*>(flashkata_dynamic_shared);
#else
  return static_cast<T*>(virtual_gpu::dynamic_shared_memory(sizeof(T)));
#endif
}
#endif

}  // namespace flashkata
