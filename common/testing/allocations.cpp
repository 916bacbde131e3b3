#include "common/testing/allocations.hpp"

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

namespace {

std::atomic<bool> counting{false};
std::atomic<long long> held{0};
std::atomic<long long> peak{0};
std::atomic<long long> largest{0};

void raise_to(std::atomic<long long>& maximum, long long value) {
  long long seen = maximum;
  while (value > seen && !maximum.compare_exchange_weak(seen, value)) {
  }
}

void* taken(void* block) {
  if (counting && block != nullptr) {
    const auto size = static_cast<long long>(malloc_usable_size(block));
    raise_to(peak, held += size);
    raise_to(largest, size);
  }
  return block;
}

void given_back(void* block) {
  if (counting && block != nullptr) held -= static_cast<long long>(malloc_usable_size(block));
}

void* taken_or_throw(void* block) {
  if (block == nullptr) throw std::bad_alloc();
  return block;
}

}  // namespace

// The linker sends every call of malloc here (-Wl,--wrap=malloc), and so on.
extern "C" {
void* __real_malloc(std::size_t size);
void* __real_calloc(std::size_t count, std::size_t size);
void* __real_realloc(void* block, std::size_t size);
void* __real_aligned_alloc(std::size_t alignment, std::size_t size);
int __real_posix_memalign(void** block, std::size_t alignment, std::size_t size);
void __real_free(void* block);

void* __wrap_malloc(std::size_t size) { return taken(__real_malloc(size)); }
void* __wrap_calloc(std::size_t count, std::size_t size) { return taken(__real_calloc(count, size)); }
void* __wrap_realloc(void* block, std::size_t size) {
  given_back(block);
  return taken(__real_realloc(block, size));
}
void* __wrap_aligned_alloc(std::size_t alignment, std::size_t size) {
  return taken(__real_aligned_alloc(alignment, size));
}
int __wrap_posix_memalign(void** block, std::size_t alignment, std::size_t size) {
  const int error = __real_posix_memalign(block, alignment, size);
  if (error == 0) taken(*block);
  return error;
}
void __wrap_free(void* block) {
  given_back(block);
  __real_free(block);
}
}

// The library's own operator new calls malloc out of the linker's sight.
void* operator new(std::size_t size) { return taken_or_throw(std::malloc(size)); }
void* operator new[](std::size_t size) { return taken_or_throw(std::malloc(size)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  void* block = nullptr;
  const int error = posix_memalign(&block, std::max(sizeof(void*), static_cast<std::size_t>(alignment)), size);
  return taken_or_throw(error == 0 ? block : nullptr);
}
void* operator new[](std::size_t size, std::align_val_t alignment) { return operator new(size, alignment); }
void operator delete(void* block) noexcept { std::free(block); }
void operator delete[](void* block) noexcept { std::free(block); }
void operator delete(void* block, std::size_t) noexcept { std::free(block); }
void operator delete[](void* block, std::size_t) noexcept { std::free(block); }
void operator delete(void* block, std::align_val_t) noexcept { std::free(block); }
void operator delete[](void* block, std::align_val_t) noexcept { std::free(block); }
void operator delete(void* block, std::size_t, std::align_val_t) noexcept { std::free(block); }
void operator delete[](void* block, std::size_t, std::align_val_t) noexcept { std::free(block); }

namespace flashkata::testing {

Allocations allocations_of(const std::function<void()>& call) {
  held = peak = largest = 0;
  counting = true;
  try {
    call();
  } catch (...) {
    counting = false;
    throw;
  }
  counting = false;
  return {peak, largest, held};
}

}  // namespace flashkata::testing
