// Fibers: one CUDA thread is one stackful fiber, switched by Boost.Context in a few nanoseconds.
//
// A fiber never leaves the OS thread that started it, so thread-local storage is safe inside it. No exception may leave
// a fiber.
#pragma once

#include <boost/context/detail/fcontext.hpp>
#include <cstddef>
#include <cstdint>

namespace flashkata::virtual_gpu {

using Context = boost::context::detail::fcontext_t;

/// jump_fcontext, entered by a jump instead of a call. The processor predicts each return by the last call that it saw;
/// the call of jump_fcontext has no return of its own, so it would spoil the prediction of its caller's.
/// (The runtime is compiled with -mno-red-zone, since the compiler does not see this push.)
__attribute__((always_inline)) inline boost::context::detail::transfer_t jump_to(Context there, void* data) {
#if defined(__x86_64__) && defined(__linux__)
  boost::context::detail::transfer_t arrived;
  const auto jump = &boost::context::detail::jump_fcontext;
  asm volatile(
      "leaq 1f(%%rip), %%r8\n\t"
      "pushq %%r8\n\t"
      "jmpq *%[jump]\n"
      "1:"
      : "=a"(arrived.fctx), "=d"(arrived.data), "+D"(there), "+S"(data)
      : [jump] "r"(jump)
      : "rcx", "r8", "r9", "r10", "r11", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
        "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory");
  return arrived;
#else
  return boost::context::detail::jump_fcontext(there, data);
#endif
}

/// Leaves the running context, which is remembered in `here`, and continues `there`.
__attribute__((always_inline)) inline void switch_context(Context& here, Context there) {
  const boost::context::detail::transfer_t arrived = jump_to(there, &here);
  // Somebody has switched back: leave that somebody's context where it said.
  *static_cast<Context*>(arrived.data) = arrived.fctx;
}

/// Stacks for the threads of one block, each between two pages that cannot be touched.
class StackArena {
 public:
  static constexpr std::size_t GUARD_BYTES = 4096;

  StackArena() = default;
  ~StackArena();
  StackArena(const StackArena&) = delete;
  StackArena& operator=(const StackArena&) = delete;

  /// Makes room; keeps what there is if it suffices.
  void resize(std::size_t threads, std::size_t stack_bytes);

  std::uintptr_t low(std::size_t thread) const { return begin_ + thread * pitch() + GUARD_BYTES; }
  std::size_t stack_bytes() const { return stack_bytes_; }

  /// Which thread's stack or guard page holds this address? -1 if none's.
  int owner(std::uintptr_t address) const;
  bool is_guard(std::uintptr_t address) const;

  /// A context at the start of `function` on the thread's stack.
  Context start(std::size_t thread, void (*function)(boost::context::detail::transfer_t)) const;

 private:
  std::size_t pitch() const { return stack_bytes_ + GUARD_BYTES; }
  std::size_t arena_bytes() const { return threads_ * pitch() + GUARD_BYTES; }

  std::uintptr_t begin_ = 0;
  std::size_t threads_ = 0;
  std::size_t stack_bytes_ = 0;
};

}  // namespace flashkata::virtual_gpu
