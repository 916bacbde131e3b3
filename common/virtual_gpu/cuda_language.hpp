// CUDA's language, for a host compiler: keywords, built-in variables, barriers, warp functions, atomics, fast math.
//
// What a kernel finds here means what it means in CUDA; what is not here does not exist on the virtual GPU.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/virtual_gpu/device_calls.hpp"
#include "common/virtual_gpu/vector_types.hpp"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__
// One OS thread runs one block at a time, so thread-local memory is a block's shared memory. Inside a function it is
// static without saying so. The tag enters the symbol's name, by which the runtime recognises shared arrays.
#define __shared__ thread_local __attribute__((abi_tag("kata_shared")))

// The scheduler writes these variables (under their assembler names) whenever it switches threads; for a kernel they
// are constants.
extern __thread const uint3 threadIdx __asm__("flashkata_thread_index");
extern __thread const uint3 blockIdx __asm__("flashkata_block_index");
extern __thread const dim3 blockDim __asm__("flashkata_block_shape");
extern __thread const dim3 gridDim __asm__("flashkata_grid_shape");
constexpr int warpSize = 32;

#define KATA_DEVICE_FUNCTION inline __attribute__((always_inline))

KATA_DEVICE_FUNCTION void __syncthreads() { flashkata::virtual_gpu::sync_threads(); }
KATA_DEVICE_FUNCTION void __syncwarp(unsigned mask = 0xffffffffu) { flashkata::virtual_gpu::sync_warp(mask); }
KATA_DEVICE_FUNCTION void __threadfence() { flashkata::virtual_gpu::thread_fence(); }
KATA_DEVICE_FUNCTION void __threadfence_block() {}

namespace flashkata::virtual_gpu {
template <typename T>
KATA_DEVICE_FUNCTION T shuffle_value(Shuffle kind, unsigned mask, T value, int argument, int width) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "a shuffle moves values of 4 or 8 bytes");
  std::uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, argument, width);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace flashkata::virtual_gpu

template <typename T>
KATA_DEVICE_FUNCTION T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return flashkata::virtual_gpu::shuffle_value(flashkata::virtual_gpu::Shuffle::index, mask, value, lane, width);
}
template <typename T>
KATA_DEVICE_FUNCTION T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return flashkata::virtual_gpu::shuffle_value(flashkata::virtual_gpu::Shuffle::exclusive_or, mask, value, lane_mask,
                                               width);
}
template <typename T>
KATA_DEVICE_FUNCTION T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  return flashkata::virtual_gpu::shuffle_value(flashkata::virtual_gpu::Shuffle::down, mask, value,
                                               static_cast<int>(distance), width);
}
template <typename T>
KATA_DEVICE_FUNCTION T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  return flashkata::virtual_gpu::shuffle_value(flashkata::virtual_gpu::Shuffle::up, mask, value,
                                               static_cast<int>(distance), width);
}

KATA_DEVICE_FUNCTION unsigned __ballot_sync(unsigned mask, int predicate) {
  return flashkata::virtual_gpu::ballot(mask, predicate != 0);
}
KATA_DEVICE_FUNCTION int __any_sync(unsigned mask, int predicate) {
  return flashkata::virtual_gpu::ballot(mask, predicate != 0) != 0;
}
KATA_DEVICE_FUNCTION int __all_sync(unsigned mask, int predicate) {
  return flashkata::virtual_gpu::ballot(mask, predicate == 0) == 0;
}

#define KATA_ATOMIC(cuda_name, operation, type)                                                                       \
  KATA_DEVICE_FUNCTION type cuda_name(type* address, type value) {                                                    \
    return flashkata::virtual_gpu::atomic_update(flashkata::virtual_gpu::AtomicOperation::operation, address, value); \
  }
#define KATA_INTEGER_ATOMIC(cuda_name, operation) \
  KATA_ATOMIC(cuda_name, operation, int)          \
  KATA_ATOMIC(cuda_name, operation, unsigned)     \
  KATA_ATOMIC(cuda_name, operation, unsigned long long)
KATA_INTEGER_ATOMIC(atomicAdd, add)
KATA_INTEGER_ATOMIC(atomicMin, min)
KATA_INTEGER_ATOMIC(atomicMax, max)
KATA_INTEGER_ATOMIC(atomicExch, exchange)
KATA_INTEGER_ATOMIC(atomicAnd, bit_and)
KATA_INTEGER_ATOMIC(atomicOr, bit_or)
KATA_ATOMIC(atomicAdd, add, float)
KATA_ATOMIC(atomicAdd, add, double)
KATA_ATOMIC(atomicExch, exchange, float)
#undef KATA_INTEGER_ATOMIC
#undef KATA_ATOMIC
KATA_DEVICE_FUNCTION int atomicCAS(int* address, int expected, int desired) {
  return flashkata::virtual_gpu::atomic_compare_and_swap(address, expected, desired);
}
KATA_DEVICE_FUNCTION unsigned atomicCAS(unsigned* address, unsigned expected, unsigned desired) {
  return flashkata::virtual_gpu::atomic_compare_and_swap(address, expected, desired);
}

template <typename T>
KATA_DEVICE_FUNCTION T __ldg(const T* address) {
  return *address;
}

// The C library declares some of these names for itself, hence macros.
#define __expf(x) ::flashkata::virtual_gpu::fast_exp(x)
#define __exp10f(x) ::flashkata::virtual_gpu::fast_exp((x)*2.30258509299404568402f)
#define __logf(x) ::flashkata::virtual_gpu::fast_log(x)
#define __log2f(x) (::flashkata::virtual_gpu::fast_log(x) * 1.44269504088896340736f)
#define __powf(x, y) (::powf((x), (y)))
#define __sinf(x) (::sinf(x))
#define __cosf(x) (::cosf(x))
#define __saturatef(x) (::fminf(::fmaxf((x), 0.0f), 1.0f))

KATA_DEVICE_FUNCTION float __fdividef(float numerator, float denominator) { return numerator / denominator; }
KATA_DEVICE_FUNCTION float __frcp_rn(float x) { return 1.0f / x; }
KATA_DEVICE_FUNCTION float __fsqrt_rn(float x) { return std::sqrt(x); }
KATA_DEVICE_FUNCTION float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
KATA_DEVICE_FUNCTION float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
KATA_DEVICE_FUNCTION unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
KATA_DEVICE_FUNCTION int __float_as_int(float x) { return std::bit_cast<int>(x); }
KATA_DEVICE_FUNCTION float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
KATA_DEVICE_FUNCTION float __int_as_float(int x) { return std::bit_cast<float>(x); }
KATA_DEVICE_FUNCTION int __popc(unsigned x) { return std::popcount(x); }
KATA_DEVICE_FUNCTION int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
KATA_DEVICE_FUNCTION int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }

#define KATA_MIN_MAX(type)                                                          \
  KATA_DEVICE_FUNCTION constexpr type min(type a, type b) { return b < a ? b : a; } \
  KATA_DEVICE_FUNCTION constexpr type max(type a, type b) { return a < b ? b : a; }
KATA_MIN_MAX(int)
KATA_MIN_MAX(unsigned)
KATA_MIN_MAX(long)
KATA_MIN_MAX(unsigned long)
KATA_MIN_MAX(long long)
KATA_MIN_MAX(unsigned long long)
#undef KATA_MIN_MAX
KATA_DEVICE_FUNCTION float min(float a, float b) { return std::fmin(a, b); }
KATA_DEVICE_FUNCTION float max(float a, float b) { return std::fmax(a, b); }
KATA_DEVICE_FUNCTION double min(double a, double b) { return std::fmin(a, b); }
KATA_DEVICE_FUNCTION double max(double a, double b) { return std::fmax(a, b); }

// clang copies whole structs with memcpy, which its thread instrumentation does not announce: in a checked kernel file
// these calls go to the runtime instead.
#if defined(__clang__) && defined(KATA_GPU_CHECKED_KERNEL)
__asm__(
    ".set memcpy, flashkata_checked_memcpy\n"
    ".set memmove, flashkata_checked_memcpy\n"
    ".set memset, flashkata_checked_memset\n");
#endif
