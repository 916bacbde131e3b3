// The profile: what kernels did to memory, counted. A model of the hardware, not a measurement of it.
//
// Traffic and event counts are kept for every launch of a checked kernel; the counts per source line need
// options().profile = true.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

namespace flashkata {

/// What moved between a kernel and one buffer, in bytes.
struct TensorTraffic {
  std::string name;
  std::int64_t bytes = 0;   // size of the buffer
  std::int64_t loaded = 0;  // cp.async included
  std::int64_t stored = 0;
  std::int64_t atomic = 0;
  std::int64_t least_loaded = 0;  // different bytes loaded: no kernel that needs them can load less
  std::int64_t least_stored = 0;  // different bytes stored or updated
};

enum class MemorySpace { global, shared };
enum class MemoryAccess { load, store, atomic };

/// All accesses of one source line of one kind. A request is what the lanes of a warp do together. Its transactions
/// are sectors of 32 bytes in global memory, and wavefronts in shared memory: passes over the 32 banks.
struct LineProfile {
  std::string file;
  int line = 0;
  MemorySpace space = MemorySpace::global;
  MemoryAccess access = MemoryAccess::load;
  std::int64_t requests = 0;
  std::int64_t lanes = 0;
  std::int64_t transactions = 0;
  std::int64_t least_transactions = 0;  // for the same bytes, lying side by side

  double per_request() const {
    return requests == 0 ? 0.0 : static_cast<double>(transactions) / static_cast<double>(requests);
  }
  double least_per_request() const {
    return requests == 0 ? 0.0 : static_cast<double>(least_transactions) / static_cast<double>(requests);
  }
};

/// Events, summed over all threads that took part, except for the barriers: those count once for each block.
struct EventCounts {
  std::int64_t barriers = 0;
  std::int64_t warp_barriers = 0;      // __syncwarp, once for each warp
  std::int64_t shuffles = 0;           // shuffles and votes, once for each warp
  std::int64_t matrix_products = 0;    // mma_m16n8k16, once for each warp
  std::int64_t matrix_loads = 0;       // ldmatrix, once for each warp
  std::int64_t copy_groups = 0;        // non-empty cp.async groups, once for each thread
  std::int64_t overlapped_groups = 0;  // of these, groups whose thread did other work before it waited for them

  EventCounts& operator+=(const EventCounts& other);
};

/// All launches of one kernel since the last take_profiles().
struct KernelProfile {
  std::string kernel;
  std::int64_t launches = 0;
  std::int64_t blocks = 0;
  std::int64_t threads = 0;
  std::int64_t dynamic_shared_bytes = 0;  // of the last launch, for one block
  std::int64_t peak_device_bytes = 0;     // the most that was allocated while it ran
  EventCounts events;
  std::vector<TensorTraffic> tensors;
  std::vector<LineProfile> lines;  // by file, then line

  const TensorTraffic* tensor(const std::string& name) const;  // null if the kernel did not touch it
  /// The most wavefronts per request of any shared access, relative to the least possible; 1 means no bank conflicts.
  double worst_bank_conflict() const;
  /// The same for sectors.
  double worst_coalescing() const;
};

#ifdef KATA_GPU_CUDA
inline std::vector<KernelProfile> take_profiles() { return {}; }
#else
/// The profiles since the last call, one for each kernel, in order of first launch.
std::vector<KernelProfile> take_profiles();
#endif

/// Tables, then the kernels' source lines with their counts in the margin.
void print_profiles(std::ostream& out, const std::vector<KernelProfile>& profiles);

}  // namespace flashkata
