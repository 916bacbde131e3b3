// Warp operations: the lanes arrive one by one, the last one does the work for all.
#pragma once

#include <cstdint>

#include "common/virtual_gpu/worker.hpp"

namespace flashkata::virtual_gpu {

/// Waits until all lanes of `mask` have come to the same operation; the last to arrive calls it with what each lane
/// brought along. Lanes that the block does not have are dropped from the mask, unless `whole_warp`.
void join_warp_operation(WarpOperation operation, const char* name, std::uint32_t mask, void* argument, Site site,
                         bool whole_warp = false);

/// The lane that runs now.
inline Thread& current_thread() { return *current_worker->current; }

}  // namespace flashkata::virtual_gpu
