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
KATA_DEVICE_FUNCTION int __syncthreads_or(int predicate) {
  return flashkata::virtual_gpu::sync_threads_vote(flashkata::virtual_gpu::BarrierVote::any, predicate != 0);
}
KATA_DEVICE_FUNCTION int __syncthreads_and(int predicate) {
  return flashkata::virtual_gpu::sync_threads_vote(flashkata::virtual_gpu::BarrierVote::all, predicate != 0);
}
KATA_DEVICE_FUNCTION int __syncthreads_count(int predicate) {
  return flashkata::virtual_gpu::sync_threads_vote(flashkata::virtual_gpu::BarrierVote::count, predicate != 0);
}
KATA_DEVICE_FUNCTION void __syncwarp(unsigned mask = 0xffffffffu) { flashkata::virtual_gpu::sync_warp(mask); }
KATA_DEVICE_FUNCTION void __threadfence() { flashkata::virtual_gpu::thread_fence(); }
KATA_DEVICE_FUNCTION void __threadfence_system() { flashkata::virtual_gpu::thread_fence(); }
KATA_DEVICE_FUNCTION void __threadfence_block() {}
KATA_DEVICE_FUNCTION void __trap() { flashkata::virtual_gpu::trap(); }

namespace flashkata::virtual_gpu {
/// The bytes of a value that goes to other lanes.
template <typename T>
KATA_DEVICE_FUNCTION std::uint64_t bits_of(T value) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "lanes exchange values of 4 or 8 bytes");
  std::uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
KATA_DEVICE_FUNCTION T shuffle_value(Shuffle kind, unsigned mask, T value, int argument, int width) {
  const std::uint64_t bits = shuffle(kind, mask, bits_of(value), argument, width);
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

template <typename T>
KATA_DEVICE_FUNCTION unsigned __match_any_sync(unsigned mask, T value) {
  return flashkata::virtual_gpu::match_any(mask, flashkata::virtual_gpu::bits_of(value));
}

#define KATA_REDUCTION(cuda_name, kind, type)                                                    \
  KATA_DEVICE_FUNCTION type cuda_name(unsigned mask, type value) {                               \
    return flashkata::virtual_gpu::reduce(flashkata::virtual_gpu::Reduction::kind, mask, value); \
  }
KATA_REDUCTION(__reduce_add_sync, add, int)
KATA_REDUCTION(__reduce_add_sync, add, unsigned)
KATA_REDUCTION(__reduce_min_sync, min, int)
KATA_REDUCTION(__reduce_min_sync, min, unsigned)
KATA_REDUCTION(__reduce_max_sync, max, int)
KATA_REDUCTION(__reduce_max_sync, max, unsigned)
KATA_REDUCTION(__reduce_and_sync, bit_and, unsigned)
KATA_REDUCTION(__reduce_or_sync, bit_or, unsigned)
KATA_REDUCTION(__reduce_xor_sync, bit_xor, unsigned)
#undef KATA_REDUCTION

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
KATA_INTEGER_ATOMIC(atomicXor, bit_xor)
KATA_ATOMIC(atomicSub, subtract, int)
KATA_ATOMIC(atomicSub, subtract, unsigned)
KATA_ATOMIC(atomicInc, increment, unsigned)
KATA_ATOMIC(atomicDec, decrement, unsigned)
KATA_ATOMIC(atomicAdd, add, float)
KATA_ATOMIC(atomicAdd, add, double)
KATA_ATOMIC(atomicExch, exchange, float)
#undef KATA_INTEGER_ATOMIC
#undef KATA_ATOMIC
#define KATA_COMPARE_AND_SWAP(type)                                                     \
  KATA_DEVICE_FUNCTION type atomicCAS(type* address, type expected, type desired) {     \
    return flashkata::virtual_gpu::atomic_compare_and_swap(address, expected, desired); \
  }
KATA_COMPARE_AND_SWAP(int)
KATA_COMPARE_AND_SWAP(unsigned)
KATA_COMPARE_AND_SWAP(unsigned long long)
#undef KATA_COMPARE_AND_SWAP

// Loads and stores with a wish about the caches, of which there are none here.
#define KATA_CACHED_LOAD(cuda_name)                    \
  template <typename T>                                \
  KATA_DEVICE_FUNCTION T cuda_name(const T* address) { \
    return *address;                                   \
  }
#define KATA_CACHED_STORE(cuda_name)                                               \
  template <typename T>                                                            \
  KATA_DEVICE_FUNCTION void cuda_name(T* address, std::type_identity_t<T> value) { \
    *address = value;                                                              \
  }
KATA_CACHED_LOAD(__ldg)
KATA_CACHED_LOAD(__ldca)
KATA_CACHED_LOAD(__ldcg)
KATA_CACHED_LOAD(__ldcs)
KATA_CACHED_STORE(__stcg)
KATA_CACHED_STORE(__stcs)
#undef KATA_CACHED_LOAD
#undef KATA_CACHED_STORE

#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("0x3fffff")

// CUDA has them without std:: as well.
using std::isfinite;
using std::isinf;
using std::isnan;

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
KATA_DEVICE_FUNCTION float fdividef(float numerator, float denominator) { return numerator / denominator; }
KATA_DEVICE_FUNCTION float __fadd_rn(float a, float b) { return a + b; }
KATA_DEVICE_FUNCTION float __fsub_rn(float a, float b) { return a - b; }
KATA_DEVICE_FUNCTION float __fmul_rn(float a, float b) { return a * b; }
KATA_DEVICE_FUNCTION float __fdiv_rn(float a, float b) { return a / b; }
KATA_DEVICE_FUNCTION float __frcp_rn(float x) { return 1.0f / x; }
KATA_DEVICE_FUNCTION float __fsqrt_rn(float x) { return std::sqrt(x); }
KATA_DEVICE_FUNCTION float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
KATA_DEVICE_FUNCTION float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
KATA_DEVICE_FUNCTION float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
KATA_DEVICE_FUNCTION unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
KATA_DEVICE_FUNCTION int __float_as_int(float x) { return std::bit_cast<int>(x); }
KATA_DEVICE_FUNCTION float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
KATA_DEVICE_FUNCTION float __int_as_float(int x) { return std::bit_cast<float>(x); }
KATA_DEVICE_FUNCTION int __popc(unsigned x) { return std::popcount(x); }
KATA_DEVICE_FUNCTION int __popcll(unsigned long long x) { return std::popcount(x); }
KATA_DEVICE_FUNCTION int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
KATA_DEVICE_FUNCTION int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
KATA_DEVICE_FUNCTION int __ffs(int x) { return __builtin_ffs(x); }
KATA_DEVICE_FUNCTION int __ffsll(long long x) { return __builtin_ffsll(x); }
KATA_DEVICE_FUNCTION unsigned __brev(unsigned x) {
  x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
  x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
  x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(x);
}
KATA_DEVICE_FUNCTION int __mulhi(int a, int b) { return static_cast<int>(static_cast<long long>(a) * b >> 32); }
KATA_DEVICE_FUNCTION unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}

namespace flashkata::virtual_gpu {
/// What lies outside the type becomes its nearest value, and NaN becomes 0.
template <typename Integer>
KATA_DEVICE_FUNCTION Integer saturated(float whole) {
  constexpr Integer LEAST = std::is_signed_v<Integer> ? -0x7fffffff - 1 : 0;
  constexpr Integer MOST = std::is_signed_v<Integer> ? 0x7fffffff : 0xffffffff;
  if (whole != whole) return 0;
  if (whole <= static_cast<float>(LEAST)) return LEAST;
  return whole >= static_cast<float>(MOST) ? MOST : static_cast<Integer>(whole);  // MOST + 1 as float
}
}  // namespace flashkata::virtual_gpu

#define KATA_FLOAT_TO_INTEGER(direction, rounded)                   \
  KATA_DEVICE_FUNCTION int __float2int_##direction(float x) {       \
    return flashkata::virtual_gpu::saturated<int>(rounded);         \
  }                                                                 \
  KATA_DEVICE_FUNCTION unsigned __float2uint_##direction(float x) { \
    return flashkata::virtual_gpu::saturated<unsigned>(rounded);    \
  }
KATA_FLOAT_TO_INTEGER(rn, std::rint(x))
KATA_FLOAT_TO_INTEGER(rz, std::trunc(x))
KATA_FLOAT_TO_INTEGER(rd, std::floor(x))
KATA_FLOAT_TO_INTEGER(ru, std::ceil(x))
#undef KATA_FLOAT_TO_INTEGER

// Of a signed and an unsigned number both count as unsigned, as in C.
#define KATA_MIN_MAX(result, type_a, type_b)                                                                  \
  KATA_DEVICE_FUNCTION constexpr result min(type_a a, type_b b) {                                             \
    return static_cast<result>(b) < static_cast<result>(a) ? static_cast<result>(b) : static_cast<result>(a); \
  }                                                                                                           \
  KATA_DEVICE_FUNCTION constexpr result max(type_a a, type_b b) {                                             \
    return static_cast<result>(a) < static_cast<result>(b) ? static_cast<result>(b) : static_cast<result>(a); \
  }
#define KATA_INTEGER_MIN_MAX(type)                          \
  KATA_MIN_MAX(type, type, type)                            \
  KATA_MIN_MAX(unsigned type, unsigned type, unsigned type) \
  KATA_MIN_MAX(unsigned type, type, unsigned type)          \
  KATA_MIN_MAX(unsigned type, unsigned type, type)
KATA_INTEGER_MIN_MAX(int)
KATA_INTEGER_MIN_MAX(long)
KATA_INTEGER_MIN_MAX(long long)
#undef KATA_INTEGER_MIN_MAX
#undef KATA_MIN_MAX
#define KATA_MIN_MAX(result, type_a, type_b)                                              \
  KATA_DEVICE_FUNCTION result min(type_a a, type_b b) { return std::fmin(result(a), b); } \
  KATA_DEVICE_FUNCTION result max(type_a a, type_b b) { return std::fmax(result(a), b); }
KATA_MIN_MAX(float, float, float)
KATA_MIN_MAX(double, double, double)
KATA_MIN_MAX(double, float, double)
KATA_MIN_MAX(double, double, float)
#undef KATA_MIN_MAX

// clang copies whole structs with memcpy, which its thread instrumentation does not announce: in a checked kernel file
// these calls go to the runtime instead.
#if defined(__clang__) && defined(KATA_GPU_CHECKED_KERNEL)
__asm__(
    ".set memcpy, flashkata_checked_memcpy\n"
    ".set memmove, flashkata_checked_memcpy\n"
    ".set memset, flashkata_checked_memset\n");
#endif
