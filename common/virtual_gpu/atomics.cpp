// Atomic operations: blocks run on several OS threads, so they have to be atomic here, too.

#include <algorithm>
#include <atomic>
#include <cmath>

#include "common/virtual_gpu/access_check.hpp"
#include "common/virtual_gpu/device_calls.hpp"

namespace flashkata::virtual_gpu {
namespace {

void check_atomic(const void* address, unsigned bytes, const void* return_address) {
  Worker& worker = *current_worker;
  if (!worker.launch->check) return;
  const auto place = reinterpret_cast<std::uintptr_t>(address);
  if (place % bytes != 0) report_misaligned(worker, place, bytes, "an atomic operation", site_of(return_address));
  check_access(worker, place, bytes, AccessKind::atomic, site_of(return_address));
  if (worker.current->fenced) release_writes(worker, place);
}

void learn_of_others(const void* address) {
  Worker& worker = *current_worker;
  if (worker.launch->check) acquire_writes(worker, reinterpret_cast<std::uintptr_t>(address));
}

template <typename T>
T combine(AtomicOperation operation, T old, T value) {
  switch (operation) {
    case AtomicOperation::add:
      return old + value;
    case AtomicOperation::min:
      return std::min(old, value);
    case AtomicOperation::max:
      return std::max(old, value);
    case AtomicOperation::exchange:
      return value;
    case AtomicOperation::bit_and:
      if constexpr (std::is_integral_v<T>) return old & value;
      break;
    case AtomicOperation::bit_or:
      if constexpr (std::is_integral_v<T>) return old | value;
      break;
    case AtomicOperation::bit_xor:
      if constexpr (std::is_integral_v<T>) return old ^ value;
      break;
    case AtomicOperation::subtract:
      return old - value;
    case AtomicOperation::increment:  // counts 0, 1, ..., value, 0, ...
      return old >= value ? T{0} : old + 1;
    case AtomicOperation::decrement:  // counts value, ..., 1, 0, value, ...
      return old == 0 || old > value ? value : old - 1;
  }
  return old;
}

template <typename T>
T update(AtomicOperation operation, T* address, T value, const void* return_address) {
  check_atomic(address, sizeof(T), return_address);
  std::atomic_ref<T> target(*address);
  T old = target.load(std::memory_order_relaxed);
  while (!target.compare_exchange_weak(old, combine(operation, old, value))) {
  }
  learn_of_others(address);
  return old;
}

template <typename T>
T compare_and_swap(T* address, T expected, T desired, const void* return_address) {
  check_atomic(address, sizeof(T), return_address);
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, desired);
  learn_of_others(address);
  return expected;
}

}  // namespace

float atomic_update(AtomicOperation operation, float* address, float value) {
  return update(operation, address, value, __builtin_return_address(0));
}
double atomic_update(AtomicOperation operation, double* address, double value) {
  return update(operation, address, value, __builtin_return_address(0));
}
int atomic_update(AtomicOperation operation, int* address, int value) {
  return update(operation, address, value, __builtin_return_address(0));
}
unsigned atomic_update(AtomicOperation operation, unsigned* address, unsigned value) {
  return update(operation, address, value, __builtin_return_address(0));
}
unsigned long long atomic_update(AtomicOperation operation, unsigned long long* address, unsigned long long value) {
  return update(operation, address, value, __builtin_return_address(0));
}
int atomic_compare_and_swap(int* address, int expected, int desired) {
  return compare_and_swap(address, expected, desired, __builtin_return_address(0));
}
unsigned atomic_compare_and_swap(unsigned* address, unsigned expected, unsigned desired) {
  return compare_and_swap(address, expected, desired, __builtin_return_address(0));
}
unsigned long long atomic_compare_and_swap(unsigned long long* address, unsigned long long expected,
                                           unsigned long long desired) {
  return compare_and_swap(address, expected, desired, __builtin_return_address(0));
}

void thread_fence() { current_worker->current->fenced = true; }

float fast_exp(float x) { return std::exp2(x * 1.44269504088896340736f); }
float fast_log(float x) { return std::log(x); }

}  // namespace flashkata::virtual_gpu
