// The one header of a kernel file: CUDA under nvcc, the virtual GPU under g++ or clang++.
//
// Language    __global__ __device__ __shared__ threadIdx ... __syncthreads __shfl_*_sync atomicAdd: as in CUDA
//             FULL_WARP, dynamic_shared<T>()                                       platform.hpp
// Types       fp16, bf16, to_float, to_fp16, to_bf16, from_float<T>, pack2<T>       half.hpp
// Tensor core mma_m16n8k16<T>, ldmatrix_x4, _x2, each also _trans                   mma.hpp
// Mathematics fast_exp2, and CUDA's own __expf, rsqrtf, ...                         fast_math.hpp
// Copies      cp_async_4, _8, _16, cp_async_commit, cp_async_wait<GROUPS>           async_copy.hpp
// Host        launch, Stream, Event, synchronize, GpuError, ceil_div                launch.hpp
//             DeviceBuffer<T>                                                       buffer.hpp
//             device_bytes, peak_device_bytes                                       memory_use.hpp
//
// An aligned shared array is written `alignas(16) __shared__ float tile[32];`.
#pragma once

#include "common/gpu/async_copy.hpp"
#include "common/gpu/buffer.hpp"
#include "common/gpu/fast_math.hpp"
#include "common/gpu/half.hpp"
#include "common/gpu/launch.hpp"
#include "common/gpu/memory_use.hpp"
#include "common/gpu/mma.hpp"
#include "common/gpu/platform.hpp"
