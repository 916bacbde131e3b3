// A worker: one OS thread of the virtual GPU, and everything about the block that it is running.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "common/virtual_gpu/access_log.hpp"
#include "common/virtual_gpu/fiber.hpp"
#include "common/virtual_gpu/ready_queue.hpp"
#include "common/virtual_gpu/shared_memory.hpp"
#include "common/virtual_gpu/sightings.hpp"
#include "common/virtual_gpu/vector_types.hpp"

namespace flashkata::virtual_gpu {

/// What all workers need to know about the running launch.
struct Launch {
  const void* kernel = nullptr;
  void (*enter)(void* arguments) = nullptr;  // calls the kernel
  void* arguments = nullptr;
  std::size_t argument_bytes = 0;
  dim3 grid;
  dim3 block;
  std::size_t dynamic_shared_bytes = 0;
  bool check = false;
  bool profile = false;
  std::uint64_t schedule_seed = 0;
  std::uint32_t number = 0;  // of the launch; never 0
  std::atomic<std::uint64_t> next_block{0};
  std::atomic<bool> abandoned{false};

  int threads() const { return static_cast<int>(block.x * block.y * block.z); }
  std::uint64_t blocks() const { return std::uint64_t{grid.x} * grid.y * grid.z; }
};

/// One cp.async in flight.
struct CopyInFlight {
  char* destination;
  const char* source;
  int bytes;
  int source_bytes;
  Site site;
};

struct CopyGroup {
  std::size_t end;         // its copies are those before this position, and after the group before it
  std::int64_t work_then;  // Thread::work at the commit
};

enum class ThreadState : std::uint8_t { ready, at_barrier, at_warp_operation, done };

/// What the lanes of a warp do together: `arguments[lane]` is what that lane brought along, for the lanes in `mask`.
struct Worker;
using WarpOperation = void (*)(Worker& worker, void* const* arguments, std::uint32_t mask);

/// A CUDA thread. What a switch touches lies in one line of the cache.
struct alignas(64) Thread {
  Context context = nullptr;
  uint3 index{};
  int id = 0;  // x first, then y, then z
  ThreadState state = ThreadState::ready;
  bool fenced = false;      // has called __threadfence()
  std::uint32_t clock = 0;  // of its last synchronisation

  // Where and for what it waits, or waited last.
  Site site = 0;
  std::uint32_t mask = 0;
  const char* waits_for = "";
  WarpOperation operation = nullptr;
  void* argument = nullptr;

  std::int64_t work = 0;  // memory accesses and warp operations so far
  std::vector<CopyInFlight> copies;
  std::vector<CopyGroup> groups;

  int lane() const { return id % 32; }
  int warp() const { return id / 32; }
};

struct Warp {
  std::uint32_t waiting = 0;  // lanes that have arrived at a warp operation
  std::uint32_t clock = 0;    // of the last synchronisation of all lanes
  bool has_partial_syncs = false;
  // since[a][b]: clock of the last synchronisation by which lane a has seen lane b; valid if has_partial_syncs
  std::array<std::array<std::uint32_t, 32>, 32> since{};
  WarpAccessLog log;
};

struct BufferTraffic {
  std::int64_t loaded = 0;
  std::int64_t stored = 0;
  std::int64_t atomic = 0;
};

struct Worker {
  Launch* launch = nullptr;

  // The running block.
  std::uint64_t block = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  ReadyQueue ready;
  Thread* current = nullptr;
  Context main_context = nullptr;
  int alive = 0;
  int at_barrier = 0;
  int votes = 0;          // of those who wait at the barrier
  int votes_counted = 0;  // of those whom the last barrier let go on

  // Clock readings, see stamp.hpp. A cell written at or after block_start was written in this block.
  std::uint32_t clock = 0;
  std::uint32_t block_start = 0;
  std::uint32_t last_barrier = 0;

  // Blocks whose writes this block may rely on, up to which clock reading; see global_shadow.hpp.
  std::unordered_map<std::uint64_t, std::uint32_t> acquired;

  StackArena stacks;
  SharedMemory shared;

  Sightings sightings;
  EventCounts events;
  std::vector<BufferTraffic> traffic;  // by buffer number
  LineTotals lines;

  /// Runs blocks of the launch until there is none left.
  void run(Launch& the_launch);

  Warp& warp_of(const Thread& thread) { return warps[static_cast<std::size_t>(thread.warp())]; }
  uint3 block_index(std::uint64_t number) const;

  /// "thread 32", "thread (3, 1)"; with the block if the grid has more than one: "thread 32 of block 1"
  std::string thread_name(int id) const;
  std::string thread_and_block(int id) const { return thread_and_block(id, block); }
  std::string thread_and_block(int id, std::uint64_t of_block) const;
  std::string in_block() const;  // "In block 1: ", or nothing

  /// Gives up the launch: leaves the running fiber for good.
  [[noreturn]] void abandon();
};

/// The worker of this OS thread; null outside a launch.
extern __thread Worker* current_worker;
/// The same while a checked kernel's thread runs, null otherwise: what the memory hooks look at.
extern __thread Worker* checking_worker;

/// While the runtime describes a finding, templates that it shares with an instrumented kernel file (std::string's,
/// say) must not call the hooks. No thread may be switched meanwhile.
class HooksOff {
 public:
  HooksOff() : before_(checking_worker) { checking_worker = nullptr; }
  ~HooksOff() { checking_worker = before_; }
  HooksOff(const HooksOff&) = delete;
  HooksOff& operator=(const HooksOff&) = delete;

 private:
  Worker* before_;
};

/// Is this one of threadIdx, blockIdx, blockDim, gridDim?
bool is_builtin_variable(std::uintptr_t address);

// The scheduler, block.cpp.

/// threadIdx of the running thread.
extern __thread uint3 current_thread_index __asm__("flashkata_thread_index");

/// Nobody is ready and somebody waits: says who waits where, and gives up.
[[noreturn]] void report_deadlock(Worker& worker);

inline void make_ready(Worker& worker, Thread& thread) {
  thread.state = ThreadState::ready;
  worker.ready.push(&thread);
}

/// Leaves the current thread, which waits for something, for the next one that is ready. Inlined, as is whatever calls
/// it on a kernel's behalf: the processor mispredicts each return that follows a switch of stacks.
__attribute__((always_inline)) inline void run_next(Worker& worker, Context& here) {
  if (worker.ready.empty()) report_deadlock(worker);
  Thread* next = worker.ready.pop();
  worker.current = next;
  current_thread_index = next->index;
  if (&next->context != &here) switch_context(here, next->context);
}

/// Has `thread` synchronised with the author of a stamp since it was made?
inline bool is_ordered(const Worker& worker, const Thread& thread, int author, std::uint32_t clock) {
  if (clock < worker.last_barrier || author == thread.id) return true;
  if (author / 32 != thread.warp()) return false;
  const Warp& warp = worker.warps[static_cast<std::size_t>(thread.warp())];
  if (clock < warp.clock) return true;
  return warp.has_partial_syncs &&
         clock < warp.since[static_cast<std::size_t>(thread.lane())][static_cast<std::size_t>(author % 32)];
}

}  // namespace flashkata::virtual_gpu
