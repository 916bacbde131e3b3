// How much memory a call takes: malloc, its relatives and operator new, in all threads, counted byte by byte.
//
// A suite that asks gets it from count_allocations(<label>) in its CMakeLists.txt (cmake/CountAllocations.cmake).
#pragma once

#include <functional>

#include "common/attention/view.hpp"

namespace flashkata::testing {

struct Allocations {
  Index peak = 0;     // bytes held at the same time, at most; what was held before the call does not count
  Index largest = 0;  // bytes of the largest block
  Index kept = 0;     // bytes still held when the call has returned
};

/// Runs `call` and counts.
Allocations allocations_of(const std::function<void()>& call);

}  // namespace flashkata::testing
