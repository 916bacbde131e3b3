// Findings: what the virtual GPU has to say about a kernel, in sentences, each with the kernel's file and line.
#pragma once

#include <iosfwd>
#include <string>
#include <string_view>
#include <vector>

namespace flashkata {

enum class FindingKind {
  shared_race,               // two threads of a block, one shared address, one of them writes, no barrier between
  global_race,               // the same for global memory, within a block or between blocks
  out_of_bounds,             // outside a buffer, a shared array, a local array; or not device memory at all
  uninitialised_read,        // shared memory not written in this block, or a buffer never written
  async_copy_not_waited,     // shared memory read while a cp.async into it is in flight
  divergent_barrier,         // threads of a block meet at different __syncthreads() or votes of the block
  barrier_after_exit,        // threads wait at __syncthreads() after others have left the kernel
  deadlock,                  // nobody can run, somebody waits
  absent_lane,               // a warp function names a lane that left, does not exist, or is not in the mask
  divergent_warp,            // lanes of a warp meet at different warp functions, masks or source lines
  misaligned_access,         // a vector, ldmatrix or cp.async address that is not a multiple of its size
  dynamic_shared_too_small,  // an access beyond the dynamic shared memory that the launch asked for
  stack_overflow,            // the local variables of a thread need more than its stack
  use_after_free,            // a buffer that the host has released
  wrong_memory,              // ldmatrix or cp.async on an address that is not in shared (or global) memory
  crash,                     // the kernel ran into a signal, for example a division by zero, or calls __trap()
};

/// "shared-memory race"
std::string_view to_text(FindingKind kind);

struct Finding {
  FindingKind kind;
  std::string sentence;
  std::string file;        // of `line`; empty if not known
  int line = 0;            // where it happened; 0 if not known
  std::string other_file;  // the other access of a race, the issue of a cp.async, ...
  int other_line = 0;      // 0 if there is no other place
  std::string kernel;
  bool abandoned = false;  // the launch could not go on after it
  long count = 0;          // how often it was seen
};

#ifdef KATA_GPU_CUDA
inline std::vector<Finding> take_findings() { return {}; }
#else
/// The findings since the last call, oldest first. A program that ends without having taken them prints them and
/// ends with exit code 1: they cannot be lost.
std::vector<Finding> take_findings();
#endif

/// `path` as typed from the folder that the program runs in, if it lies below that.
std::string from_here(const std::string& path);

/// One paragraph for each finding.
void print_findings(std::ostream& out, const std::vector<Finding>& findings);

}  // namespace flashkata
