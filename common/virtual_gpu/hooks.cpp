// The functions that the compiler's instrumentation calls in a checked kernel file.
//
// -fsanitize=thread announces each memory access, -fsanitize=bounds,alignment what an address alone cannot show. We do
// not link the sanitizers: these definitions take their place.

#include <atomic>
#include <cstdint>
#include <cstring>

#include "common/virtual_gpu/access_check.hpp"
#include "common/virtual_gpu/options.hpp"
#include "common/virtual_gpu/worker.hpp"

namespace flashkata::virtual_gpu {
namespace {

bool checked_kernels_exist = false;

// Inlined into the hooks, whose frame and return address it needs.
__attribute__((always_inline)) inline void announce(const void* place, unsigned bytes, AccessKind kind) {
  Worker* worker = checking_worker;
  if (worker == nullptr) return;
  const auto address = reinterpret_cast<std::uintptr_t>(place);
  // Most accesses are to the kernel's local variables, right above this frame. A stack that ends sooner is followed by
  // a page that nobody can touch.
  if (address - reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0)) < StackArena::GUARD_BYTES) return;
  check_access(*worker, address, bytes, kind, site_of(__builtin_return_address(0)));
}

}  // namespace

bool has_checked_kernels() { return checked_kernels_exist; }

}  // namespace flashkata::virtual_gpu

using flashkata::virtual_gpu::AccessKind;

#define HOOK(name, bytes, kind) \
  void __tsan_##name##bytes(void* p) { flashkata::virtual_gpu::announce(p, bytes, AccessKind::kind); }
#define UPDATE_HOOK(name, bytes)                                   \
  void __tsan_##name##bytes(void* p) {                             \
    flashkata::virtual_gpu::announce(p, bytes, AccessKind::read);  \
    flashkata::virtual_gpu::announce(p, bytes, AccessKind::write); \
  }
#define ACCESS_HOOKS(bytes)           \
  HOOK(read, bytes, read)             \
  HOOK(write, bytes, write)           \
  HOOK(unaligned_read, bytes, read)   \
  HOOK(unaligned_write, bytes, write) \
  HOOK(volatile_read, bytes, read)    \
  HOOK(volatile_write, bytes, write)  \
  UPDATE_HOOK(read_write, bytes)      \
  UPDATE_HOOK(unaligned_read_write, bytes)

// Host code in a kernel file may use atomics; a kernel's own go through atomicAdd and its like. So these need not
// check.
#define FETCH_HOOK(bits, operation)                                                                                   \
  std::uint##bits##_t __tsan_atomic##bits##_fetch_##operation(volatile std::uint##bits##_t* p, std::uint##bits##_t v, \
                                                              int) {                                                  \
    return __atomic_fetch_##operation(p, v, __ATOMIC_SEQ_CST);                                                        \
  }
#define EXCHANGE_HOOK(bits, strength, weak)                                                              \
  int __tsan_atomic##bits##_compare_exchange_##strength(                                                 \
      volatile std::uint##bits##_t* p, std::uint##bits##_t* expected, std::uint##bits##_t v, int, int) { \
    return __atomic_compare_exchange_n(p, expected, v, weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
  }
#define ATOMIC_HOOKS(bits)                                                                                          \
  std::uint##bits##_t __tsan_atomic##bits##_load(const volatile std::uint##bits##_t* p, int) {                      \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                    \
  }                                                                                                                 \
  void __tsan_atomic##bits##_store(volatile std::uint##bits##_t* p, std::uint##bits##_t v, int) {                   \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                                       \
  }                                                                                                                 \
  std::uint##bits##_t __tsan_atomic##bits##_exchange(volatile std::uint##bits##_t* p, std::uint##bits##_t v, int) { \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                             \
  }                                                                                                                 \
  FETCH_HOOK(bits, add)                                                                                             \
  FETCH_HOOK(bits, sub)                                                                                             \
  FETCH_HOOK(bits, or)                                                                                              \
  FETCH_HOOK(bits, and)                                                                                             \
  FETCH_HOOK(bits, xor)                                                                                             \
  EXCHANGE_HOOK(bits, strong, false)                                                                                \
  EXCHANGE_HOOK(bits, weak, true)                                                                                   \
  std::uint##bits##_t __tsan_atomic##bits##_compare_exchange_val(                                                   \
      volatile std::uint##bits##_t* p, std::uint##bits##_t expected, std::uint##bits##_t v, int, int) {             \
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                        \
    return expected;                                                                                                \
  }

extern "C" {

/// Called once for each instrumented file, before main().
void __tsan_init() { flashkata::virtual_gpu::checked_kernels_exist = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

ACCESS_HOOKS(1)
ACCESS_HOOKS(2)
ACCESS_HOOKS(4)
ACCESS_HOOKS(8)
ACCESS_HOOKS(16)

void __tsan_read_range(void* p, unsigned long bytes) {
  flashkata::virtual_gpu::announce(p, static_cast<unsigned>(bytes), AccessKind::read);
}
void __tsan_write_range(void* p, unsigned long bytes) {
  flashkata::virtual_gpu::announce(p, static_cast<unsigned>(bytes), AccessKind::write);
}

ATOMIC_HOOKS(8)
ATOMIC_HOOKS(16)
ATOMIC_HOOKS(32)
ATOMIC_HOOKS(64)
void __tsan_atomic_thread_fence(int) { std::atomic_thread_fence(std::memory_order_seq_cst); }
void __tsan_atomic_signal_fence(int) {}

// What clang's memcpy and memset become, see the end of cuda_language.hpp. Zero bytes are no access.
void* flashkata_checked_memcpy(void* destination, const void* source, std::size_t bytes) {
  if (bytes != 0) {
    flashkata::virtual_gpu::announce(source, static_cast<unsigned>(bytes), AccessKind::read);
    flashkata::virtual_gpu::announce(destination, static_cast<unsigned>(bytes), AccessKind::write);
  }
  return std::memmove(destination, source, bytes);
}
void* flashkata_checked_memset(void* destination, int value, std::size_t bytes) {
  if (bytes != 0) flashkata::virtual_gpu::announce(destination, static_cast<unsigned>(bytes), AccessKind::write);
  return std::memset(destination, value, bytes);
}

// ---- -fsanitize=bounds,alignment -------------------------------------------------------------------------------

// The layouts are the compilers' interface to the sanitizer's runtime.
struct SanitizerPlace {
  const char* file;
  std::uint32_t line;
  std::uint32_t column;
};
struct SanitizerType {
  std::uint16_t kind;
  std::uint16_t info;
  char name[1];  // "'float [8]'"
};
struct SanitizerBounds {
  SanitizerPlace place;
  SanitizerType* array;
  SanitizerType* index;
};
struct SanitizerMismatch {
  SanitizerPlace place;
  SanitizerType* type;
  unsigned char log_alignment;
  unsigned char use;
};

void __ubsan_handle_out_of_bounds(SanitizerBounds* data, std::uintptr_t index) {
  using namespace flashkata;
  virtual_gpu::Worker* worker = virtual_gpu::checking_worker;
  if (worker == nullptr) return;
  const virtual_gpu::Site site = virtual_gpu::site_of(__builtin_return_address(0));
  {
    const virtual_gpu::HooksOff hooks_off;
    if (worker->sightings.is_new(FindingKind::out_of_bounds, site)) {
      worker->sightings.describe(FindingKind::out_of_bounds, site, 0,
                                 worker->thread_and_block(worker->current->id) + " uses index " +
                                     std::to_string(static_cast<std::int32_t>(index)) + " of an array of type " +
                                     data->array->name + " at {here}",
                                 true);
    }
  }
  worker->abandon();
}

void __ubsan_handle_type_mismatch_v1(SanitizerMismatch* data, std::uintptr_t address) {
  flashkata::virtual_gpu::Worker* worker = flashkata::virtual_gpu::checking_worker;
  const unsigned alignment = 1u << data->log_alignment;
  if (worker == nullptr || address % alignment == 0) return;
  flashkata::virtual_gpu::report_misaligned(*worker, address, alignment, "a vector access",
                                            flashkata::virtual_gpu::site_of(__builtin_return_address(0)));
}

}  // extern "C"
