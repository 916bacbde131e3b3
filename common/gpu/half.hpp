// The two 16-bit storage types and their conversions; arithmetic is done in float.
//
//   fp16  1 sign, 5 exponent, 10 mantissa bits: largest 65504, spacing near 1 is 2^-10
//   bf16  1 sign, 8 exponent,  7 mantissa bits: the range of float, spacing near 1 is 2^-7
//
// Conversions from float round to nearest, ties to even; NaN becomes 0x7fff in both worlds, as in CUDA.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "common/gpu/platform.hpp"

namespace flashkata {

struct bf16 {
  std::uint16_t x;
};

struct fp16 {
  std::uint16_t x;
};

namespace half_detail {

KATA_BOTH std::uint32_t float_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  return std::bit_cast<std::uint32_t>(value);
#endif
}

KATA_BOTH float float_from_bits(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

}  // namespace half_detail

KATA_BOTH float to_float(float value) { return value; }

KATA_BOTH float to_float(bf16 value) { return half_detail::float_from_bits(std::uint32_t{value.x} << 16); }

KATA_BOTH float to_float(fp16 value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.x));
  return result;
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(value.x & 0x8000u) << 16;
  const std::uint32_t magnitude = value.x & 0x7fffu;
  // As a float, the same bits mean 2^-112 times the value; the multiplication also makes subnormals normal.
  const float scaled = half_detail::float_from_bits(magnitude << 13) * 0x1p+112f;
  // Infinity and NaN keep their mantissas. No branch: the virtual GPU's tensor core converts eight at a time.
  const std::uint32_t no_number = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return half_detail::float_from_bits(sign | no_number | half_detail::float_bits(scaled));
#endif
}

KATA_BOTH bf16 to_bf16(float value) {
#ifdef __CUDA_ARCH__
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.x) : "f"(value));
  return result;
#else
  const std::uint32_t bits = half_detail::float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
  const std::uint32_t round = 0x7fffu + ((bits >> 16) & 1u);  // a tie goes up only from an odd mantissa
  return bf16{static_cast<std::uint16_t>((bits + round) >> 16)};
#endif
}

KATA_BOTH fp16 to_fp16(float value) {
#ifdef __CUDA_ARCH__
  fp16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.x) : "f"(value));
  return result;
#else
  const std::uint32_t bits = half_detail::float_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half = 0;
  if (magnitude > 0x7f800000u) return fp16{0x7fff};
  if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // 2^-14 and above: normal in fp16
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 lets the float unit round to a multiple of 2^-24
    half = half_detail::float_bits(half_detail::float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  }
  return fp16{static_cast<std::uint16_t>(sign | half)};
#endif
}

/// from_float<bf16>(x), from_float<fp16>(x), from_float<float>(x): for kernels templated on the storage type.
template <typename T>
KATA_BOTH T from_float(float value);
template <>
KATA_BOTH float from_float<float>(float value) {
  return value;
}
template <>
KATA_BOTH bf16 from_float<bf16>(float value) {
  return to_bf16(value);
}
template <>
KATA_BOTH fp16 from_float<fp16>(float value) {
  return to_fp16(value);
}

/// Two neighbours in one register, as mma wants them: `low` has the smaller index.
template <typename T>
KATA_BOTH std::uint32_t pack2(float low, float high) {
#ifdef __CUDA_ARCH__
  std::uint32_t two;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  }
  return two;
#else
  return static_cast<std::uint32_t>(from_float<T>(low).x) | static_cast<std::uint32_t>(from_float<T>(high).x) << 16;
#endif
}

}  // namespace flashkata
