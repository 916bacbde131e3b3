// cp.async: copies from global to shared memory that run while the thread goes on (PTX ISA, "cp.async").
//
//   cp_async_16(&k_smem[row][col], &k[index], in_range);  // start; when !in_range nothing is read, zeros are written
//   cp_async_commit();                                     // what was started since the last commit is one group
//   cp_async_wait<1>();                                    // all but the newest group of this thread have landed
//   __syncthreads();                                       // ... and now everybody else's have, too
#pragma once

#include "common/gpu/platform.hpp"

#if KATA_HAS_DEVICE_CODE
namespace flashkata {

#if KATA_REAL_GPU
// 16 bytes bypass L1 (.cg), the smaller sizes cannot (.ca).
#define KATA_CP_ASYNC(size, cache)                                                                          \
  KATA_DEVICE void cp_async_##size(void* shared_destination, const void* global_source, int source_bytes) { \
    const unsigned destination = static_cast<unsigned>(__cvta_generic_to_shared(shared_destination));       \
    asm volatile("cp.async." cache ".shared.global [%0], [%1], " #size ", %2;" ::"r"(destination),          \
                 "l"(__cvta_generic_to_global(global_source)), "r"(source_bytes)                            \
                 : "memory");                                                                               \
  }
#else
#define KATA_CP_ASYNC(size, cache)                                                                          \
  KATA_DEVICE void cp_async_##size(void* shared_destination, const void* global_source, int source_bytes) { \
    virtual_gpu::copy_async(shared_destination, global_source, size, source_bytes);                         \
  }
#endif

/// Starts a copy of 4, 8 or 16 bytes, both addresses aligned to that size. Of the source `source_bytes` are read, the
/// rest of the destination becomes zero.
KATA_CP_ASYNC(4, "ca")
KATA_CP_ASYNC(8, "ca")
KATA_CP_ASYNC(16, "cg")
#undef KATA_CP_ASYNC

/// All of it, or zeros when `valid` is false; the source is not read then and need not exist.
KATA_DEVICE void cp_async_4(void* shared_destination, const void* global_source, bool valid = true) {
  cp_async_4(shared_destination, global_source, valid ? 4 : 0);
}
KATA_DEVICE void cp_async_8(void* shared_destination, const void* global_source, bool valid = true) {
  cp_async_8(shared_destination, global_source, valid ? 8 : 0);
}
KATA_DEVICE void cp_async_16(void* shared_destination, const void* global_source, bool valid = true) {
  cp_async_16(shared_destination, global_source, valid ? 16 : 0);
}

/// Closes the group of the copies that this thread started since its last commit; a group may be empty.
KATA_DEVICE void cp_async_commit() {
#if KATA_REAL_GPU
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  virtual_gpu::copy_async_commit();
#endif
}

/// Waits until at most GROUPS of this thread's newest groups are still in flight.
template <int GROUPS>
KATA_DEVICE void cp_async_wait() {
  static_assert(GROUPS >= 0, "cp_async_wait counts groups that may stay in flight");
#if KATA_REAL_GPU
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#else
  virtual_gpu::copy_async_wait(GROUPS);
#endif
}

}  // namespace flashkata
#endif
