// The scheduler: runs the threads of one block after the other, and the block's barrier.

#include <algorithm>

#include "common/virtual_gpu/device_calls.hpp"
#include "common/virtual_gpu/options.hpp"
#include "common/virtual_gpu/stamp.hpp"
#include "common/virtual_gpu/worker.hpp"

namespace flashkata::virtual_gpu {

__thread Worker* current_worker = nullptr;
__thread Worker* checking_worker = nullptr;

// The built-in variables of the running thread; kernels see them as constants under CUDA's names.
__thread uint3 current_thread_index __asm__("flashkata_thread_index");
__thread uint3 current_block_index __asm__("flashkata_block_index");
struct PlainShape {  // dim3 has a constructor, which thread-local storage in assembler's clothes cannot have
  unsigned x, y, z;
};
__thread PlainShape current_block_shape __asm__("flashkata_block_shape");
__thread PlainShape current_grid_shape __asm__("flashkata_grid_shape");

void release_barrier(Worker& worker);

namespace {

void run_thread(boost::context::detail::transfer_t arrived) {
  *static_cast<Context*>(arrived.data) = arrived.fctx;
  Worker& worker = *current_worker;
  worker.launch->enter(worker.launch->arguments);

  Thread& thread = *worker.current;
  thread.state = ThreadState::done;
  --worker.alive;
  if (worker.alive == 0) {
    checking_worker = nullptr;
    worker.current = nullptr;
    switch_context(thread.context, worker.main_context);
  }
  // The barrier counts only threads that are alive: it may have been waiting for this one.
  if (worker.at_barrier == worker.alive) release_barrier(worker);
  run_next(worker, thread.context);
}

void report_exit_before_barrier(Worker& worker, const Thread& waiting) {
  if (!worker.sightings.is_new(FindingKind::barrier_after_exit, waiting.site)) return;
  const auto left = std::find_if(worker.threads.begin(), worker.threads.end(),
                                 [](const Thread& thread) { return thread.state == ThreadState::done; });
  const int count = static_cast<int>(worker.threads.size()) - worker.alive;
  worker.sightings.describe(FindingKind::barrier_after_exit, waiting.site, 0,
                            worker.in_block() + std::to_string(count) +
                                (count == 1 ? " thread (" : " threads (for example ") + worker.thread_name(left->id) +
                                ") left the kernel, but the others still wait for the whole block at " +
                                waiting.waits_for + " at {here}; every thread of the block has to reach each barrier");
}

/// All threads of a block must meet at the same line.
void check_barrier_lines(Worker& worker) {
  const HooksOff hooks_off;
  const Thread* first = nullptr;
  for (const Thread& thread : worker.threads) {
    if (thread.state != ThreadState::at_barrier) continue;
    if (first == nullptr) first = &thread;
    if (thread.site == first->site || line_of(thread.site) == line_of(first->site)) continue;
    if (worker.sightings.is_new(FindingKind::divergent_barrier, first->site, thread.site)) {
      worker.sightings.describe(FindingKind::divergent_barrier, first->site, thread.site,
                                worker.in_block() + worker.thread_name(first->id) + " waits at " + first->waits_for +
                                    " at {here} while " + worker.thread_name(thread.id) +
                                    " waits at another one, at {there}; a barrier inside a branch must be reached by "
                                    "all threads of the block or by none",
                                true);
    }
    worker.abandon();
  }
  if (worker.alive < static_cast<int>(worker.threads.size())) report_exit_before_barrier(worker, *first);
}

void flush_access_logs(Worker& worker) {
  const HooksOff hooks_off;
  for (Warp& warp : worker.warps) warp.log.flush(worker.lines);
}

void start_block(Worker& worker, std::uint64_t block) {
  const Launch& launch = *worker.launch;
  worker.block = block;
  current_block_index = worker.block_index(block);
  worker.alive = launch.threads();
  worker.at_barrier = 0;
  worker.votes = 0;
  if (!worker.acquired.empty()) worker.acquired.clear();
  worker.ready.reset(worker.threads.size(), launch.schedule_seed == 0 ? 0 : launch.schedule_seed * 1000003 + block + 1);

  if (worker.clock > Stamp::CLOCK_LIMIT / 2) {
    worker.clock = 0;
    worker.shared.clear_shadow();
  }
  worker.block_start = worker.last_barrier = ++worker.clock;
  for (Warp& warp : worker.warps) {
    warp.waiting = 0;
    warp.clock = worker.clock;
    warp.has_partial_syncs = false;
  }
  for (Thread& thread : worker.threads) {
    thread.clock = worker.clock;
    thread.state = ThreadState::ready;
    thread.fenced = false;
    thread.site = 0;
    thread.work = 0;
    thread.copies.clear();
    thread.groups.clear();
    thread.context = worker.stacks.start(static_cast<std::size_t>(thread.id), run_thread);
    worker.ready.push(&thread);
  }
  worker.shared.poison();
}

void prepare_threads(Worker& worker) {
  const dim3 shape = worker.launch->block;
  const auto count = static_cast<std::size_t>(worker.launch->threads());
  worker.threads.resize(count);
  worker.warps.resize((count + 31) / 32);
  for (std::size_t i = 0; i < count; ++i) {
    const auto id = static_cast<unsigned>(i);
    worker.threads[i].id = static_cast<int>(i);
    worker.threads[i].index = {id % shape.x, id / shape.x % shape.y, id / shape.x / shape.y};
  }
}

/// Blocks in order, or each once in an order that the seed decides.
std::uint64_t nth_block(const Launch& launch, std::uint64_t n) {
  if (launch.schedule_seed == 0) return n;
  const std::uint64_t blocks = launch.blocks();
  const std::uint64_t start = launch.schedule_seed % blocks;
  return launch.schedule_seed % 2 == 0 ? (start + n) % blocks : (start + blocks - n) % blocks;
}

}  // namespace

bool is_builtin_variable(std::uintptr_t address) {
  const auto inside = [address](const void* variable, std::size_t bytes) {
    return address - reinterpret_cast<std::uintptr_t>(variable) < bytes;
  };
  return inside(&current_thread_index, sizeof current_thread_index) ||
         inside(&current_block_index, sizeof current_block_index) ||
         inside(&current_block_shape, sizeof current_block_shape) ||
         inside(&current_grid_shape, sizeof current_grid_shape);
}

/// The last thread has arrived (or the last that was still missing has left the kernel): everybody goes on.
void release_barrier(Worker& worker) {
  if (worker.launch->check) check_barrier_lines(worker);
  worker.last_barrier = ++worker.clock;
  worker.at_barrier = 0;
  worker.votes_counted = worker.votes;
  worker.votes = 0;
  ++worker.events.barriers;
  if (worker.launch->profile) flush_access_logs(worker);
  for (Thread& thread : worker.threads) {
    if (thread.state != ThreadState::at_barrier) continue;
    thread.clock = worker.clock;
    make_ready(worker, thread);
  }
}

namespace {

__attribute__((always_inline)) inline void wait_at_barrier(Worker& worker, const char* name, Site site) {
  Thread& thread = *worker.current;
  thread.state = ThreadState::at_barrier;
  thread.waits_for = name;
  thread.site = site;
  if (++worker.at_barrier == worker.alive) release_barrier(worker);
  run_next(worker, thread.context);
}

const char* vote_name(BarrierVote kind) {
  switch (kind) {
    case BarrierVote::any:
      return "__syncthreads_or()";
    case BarrierVote::all:
      return "__syncthreads_and()";
    case BarrierVote::count:
      return "__syncthreads_count()";
  }
  return "";
}

}  // namespace

void sync_threads() { wait_at_barrier(*current_worker, "__syncthreads()", site_of(__builtin_return_address(0))); }

int sync_threads_vote(BarrierVote kind, bool predicate) {
  Worker& worker = *current_worker;
  worker.votes += predicate != (kind == BarrierVote::all) ? 1 : 0;  // "all" counts those that are against it
  wait_at_barrier(worker, vote_name(kind), site_of(__builtin_return_address(0)));
  // Nobody can have passed another barrier since: that would have had to wait for this thread.
  const int votes = worker.votes_counted;
  if (kind == BarrierVote::count) return votes;
  return (votes == 0) == (kind == BarrierVote::all) ? 1 : 0;
}

void Worker::run(Launch& the_launch) {
  launch = &the_launch;
  current_worker = this;
  current_block_shape = {launch->block.x, launch->block.y, launch->block.z};
  current_grid_shape = {launch->grid.x, launch->grid.y, launch->grid.z};
  stacks.resize(static_cast<std::size_t>(launch->threads()), options().stack_bytes);
  prepare_threads(*this);
  while (!launch->abandoned) {
    const std::uint64_t n = launch->next_block++;
    if (n >= launch->blocks()) break;
    start_block(*this, nth_block(*launch, n));
    checking_worker = launch->check ? this : nullptr;
    run_next(*this, main_context);
    if (launch->profile) flush_access_logs(*this);
  }
  current_worker = nullptr;
}

void Worker::abandon() {
  launch->abandoned = true;
  checking_worker = nullptr;
  current = nullptr;
  Context nowhere;
  switch_context(nowhere, main_context);
  __builtin_unreachable();
}

}  // namespace flashkata::virtual_gpu
