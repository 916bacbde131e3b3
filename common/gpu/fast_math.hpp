// Fast mathematics that CUDA offers only as PTX.
#pragma once

#include <cmath>

#include "common/gpu/platform.hpp"

#if KATA_HAS_DEVICE_CODE
namespace flashkata {

/// 2^x, one instruction on a GPU (ex2.approx.ftz): within 2 ulp, results below 2^-126 are 0, and 2^-inf is 0.
KATA_DEVICE float fast_exp2(float x) {
#if KATA_REAL_GPU
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::exp2(x);
#endif
}

}  // namespace flashkata
#endif
