#include "common/virtual_gpu/fiber.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace flashkata::virtual_gpu {

StackArena::~StackArena() {
  if (begin_ != 0) munmap(reinterpret_cast<void*>(begin_), arena_bytes());
}

void StackArena::resize(std::size_t threads, std::size_t stack_bytes) {
  if (threads <= threads_ && stack_bytes == stack_bytes_) return;
  if (begin_ != 0) munmap(reinterpret_cast<void*>(begin_), arena_bytes());
  begin_ = 0;
  threads_ = threads;
  stack_bytes_ = stack_bytes;
  void* memory =
      mmap(nullptr, arena_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  begin_ = reinterpret_cast<std::uintptr_t>(memory);
  for (std::size_t thread = 0; thread <= threads_; ++thread) {  // the last page is above the last stack
    mprotect(reinterpret_cast<void*>(begin_ + thread * pitch()), GUARD_BYTES, PROT_NONE);
  }
}

int StackArena::owner(std::uintptr_t address) const {
  if (begin_ == 0 || address - begin_ >= threads_ * pitch()) return -1;
  return static_cast<int>((address - begin_) / pitch());
}

bool StackArena::is_guard(std::uintptr_t address) const {
  return owner(address) >= 0 && (address - begin_) % pitch() < GUARD_BYTES;
}

Context StackArena::start(std::size_t thread, void (*function)(boost::context::detail::transfer_t)) const {
  // Stacks start a few cache lines apart, or all their tops would fall into the same few sets of the cache.
  const std::size_t colour = (thread * 17) % 60 * 64;
  auto* top = reinterpret_cast<char*>(low(thread) + stack_bytes_ - colour);
  // What a local variable holds before it is set: NaN, in float as in 16 bits, and not what an earlier block left
  // there.
  const std::size_t locals = std::min<std::size_t>(4096, stack_bytes_ - colour);  // where a kernel's own frame lies
  std::memset(top - locals, 0xff, locals);
  return boost::context::detail::make_fcontext(top, stack_bytes_ - colour, function);
}

}  // namespace flashkata::virtual_gpu
