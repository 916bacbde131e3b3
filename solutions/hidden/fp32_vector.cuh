// Neighbours that are loaded, stored, added or multiplied together: what the fp32 tiles are made of.
#pragma once

#include "common/gpu/gpu.hpp"

namespace flashkata {

// SIZE neighbours at once: 1, 2 or 4.
template <int SIZE>
KATA_DEVICE void load_vector(float* reg, const float* smem) {
  if constexpr (SIZE == 4) {
    const float4 four = *reinterpret_cast<const float4*>(smem);
    reg[0] = four.x, reg[1] = four.y, reg[2] = four.z, reg[3] = four.w;
  } else if constexpr (SIZE == 2) {
    const float2 two = *reinterpret_cast<const float2*>(smem);
    reg[0] = two.x, reg[1] = two.y;
  } else {
    reg[0] = *smem;
  }
}

template <int SIZE>
KATA_DEVICE void store_vector(float* memory, const float* reg) {
  if constexpr (SIZE == 4) {
    *reinterpret_cast<float4*>(memory) = make_float4(reg[0], reg[1], reg[2], reg[3]);
  } else {
    *reinterpret_cast<float2*>(memory) = make_float2(reg[0], reg[1]);
  }
}

// Adds SIZE neighbours to memory that other blocks add to as well.
template <int SIZE>
KATA_DEVICE void atomic_add_vector(float* global, const float* reg) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (SIZE == 4) {
    atomicAdd(reinterpret_cast<float4*>(global), make_float4(reg[0], reg[1], reg[2], reg[3]));
  } else if constexpr (SIZE == 2) {
    atomicAdd(reinterpret_cast<float2*>(global), make_float2(reg[0], reg[1]));
  } else {
    atomicAdd(global, *reg);
  }
#else
  for (int i = 0; i < SIZE; ++i) atomicAdd(global + i, reg[i]);
#endif
}

KATA_DEVICE float dot(const float4& a, const float4& b, float sum) {
  sum = fmaf(a.x, b.x, sum);
  sum = fmaf(a.y, b.y, sum);
  sum = fmaf(a.z, b.z, sum);
  return fmaf(a.w, b.w, sum);
}

}  // namespace flashkata
