// Kernels whose speed is worth watching.
#pragma once

#include "common/gpu/launch.hpp"

namespace flashkata::speed {

void run_empty(int blocks, int threads);
void run_barriers(float* out, int blocks, int threads, int count);
void run_shuffles(float* out, int blocks, int threads, int count);
void run_matrix_products(float* out, int blocks, int threads, int count);
/// q, k, v, o: [heads, length, 64] in float.
void run_flash_forward(const float* q, const float* k, const float* v, float* o, int heads, int length);

}  // namespace flashkata::speed
