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

/// Leaves the running context, which is remembered in `here`, and continues `there`.
inline void switch_context(Context& here, Context there) {
  const boost::context::detail::transfer_t arrived = boost::context::detail::jump_fcontext(there, &here);
  // Somebody has switched back: leave that somebody's context where it said.
  *static_cast<Context*>(arrived.data) = arrived.fctx;
}

/// Stacks for the threads of one block, each above a page that cannot be touched.
class StackArena {
 public:
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
  static constexpr std::size_t GUARD_BYTES = 4096;
  std::size_t pitch() const { return stack_bytes_ + GUARD_BYTES; }

  std::uintptr_t begin_ = 0;
  std::size_t threads_ = 0;
  std::size_t stack_bytes_ = 0;
};

}  // namespace flashkata::virtual_gpu
