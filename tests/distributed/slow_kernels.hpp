// Kernels that take a known time on a real GPU, and none on the virtual one.
#pragma once

#include <chrono>
#include <span>

#include "common/gpu/launch.hpp"

namespace flashkata::testing {

/// After so long, numbers[i] = first + i.
void write_late(std::chrono::microseconds late, float first, std::span<float> numbers, const Stream& stream = {});

/// Keeps the whole GPU busy for about `waves` times `each`, as attention does: one thread block after the other, of
/// which only one has room on a multiprocessor.
void keep_busy(int waves, std::chrono::microseconds each, const Stream& stream = {});

}  // namespace flashkata::testing
