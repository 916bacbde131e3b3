// Warp operations: the lanes arrive one by one, the last one does the work for all.
#pragma once

#include <cstdint>

#include "common/virtual_gpu/worker.hpp"

namespace flashkata::virtual_gpu {

enum class BadMask { partial_warp, without_caller };
[[noreturn]] void report_bad_mask(Worker& worker, const Thread& thread, BadMask what, std::uint32_t mask);

/// The last lane of the mask has arrived somewhere. If all are at the same operation with the same mask, it happens.
/// (Otherwise some of them may still be waiting for a third; if nobody resolves it, that is a deadlock.)
void complete_if_agreed(Worker& worker, Warp& warp, const Thread& last);

/// Waits until all lanes of `mask` have come to the same operation; the last to arrive calls it with what each lane
/// brought along. Lanes that the block does not have are dropped from the mask, unless `whole_warp`.
__attribute__((always_inline)) inline void join_warp_operation(WarpOperation operation, const char* name,
                                                               std::uint32_t mask, void* argument, Site site,
                                                               bool whole_warp = false) {
  Worker& worker = *current_worker;
  Thread& thread = *worker.current;
  Warp& warp = worker.warp_of(thread);
  thread.waits_for = name;
  thread.site = site;
  ++thread.work;

  const auto existing = static_cast<int>(worker.threads.size()) - thread.warp() * 32;
  if (existing < 32) {
    if (whole_warp) report_bad_mask(worker, thread, BadMask::partial_warp, mask);
    mask &= (1u << existing) - 1;
  }
  if ((mask >> thread.lane() & 1) == 0) report_bad_mask(worker, thread, BadMask::without_caller, mask);

  thread.state = ThreadState::at_warp_operation;
  thread.operation = operation;
  thread.mask = mask;
  thread.argument = argument;
  warp.waiting |= 1u << thread.lane();
  if ((warp.waiting & mask) == mask) complete_if_agreed(worker, warp, thread);
  run_next(worker, thread.context);
}

/// "0x0000ffff"
std::string mask_text(std::uint32_t mask);

/// The lane that runs now.
inline Thread& current_thread() { return *current_worker->current; }

}  // namespace flashkata::virtual_gpu
