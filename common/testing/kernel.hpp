// Checks for kernels: what the virtual GPU finds becomes a failure, and a suite can assert how a kernel uses memory.
//
// A suite of a CUDA step is linked twice: with the kernels compiled for speed (..._test), where numbers are judged, and
// with the kernels compiled for checking (..._check), where the same test cases run again with every memory access
// watched. On a real GPU there is only the first; compute-sanitizer and ncu do what the second does here.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "common/gpu/gpu.hpp"
#include "common/testing/array.hpp"
#include "common/virtual_gpu/profile.hpp"

namespace flashkata::testing {

/// True in the executable whose kernels are watched. Large inputs are for the other one.
bool kernels_are_checked();

/// Calls `launcher`, waits for the GPU, and adds every finding to the report of the running test case.
/// Returns what the kernels did to memory; empty unless kernels_are_judged(). Kernels outside of the case that --case
/// asks for run unwatched.
std::vector<KernelProfile> run_kernels(const std::function<void()>& launcher);

/// Whether the profiles that run_kernels() returns now say something: kernels are checked, neither --findings nor
/// --profile hands the run over as it is, and --case does not ask for another case. Without it a suite could not tell
/// a kernel that never ran from one that nobody watched.
bool kernels_are_judged();

/// For a test of what kernels move: true on a real GPU, where nobody counts it, and the test case is skipped.
bool needs_a_check();

/// While it lives, run_kernels() also counts, for each line of a kernel, the wavefronts and sectors of its accesses.
/// That is a third of the time of a watched run: only for who goes on to ask for them, see below.
class CountLines {
 public:
  CountLines();
  ~CountLines();
  CountLines(const CountLines&) = delete;
  CountLines& operator=(const CountLines&) = delete;
};

/// While it lives, the virtual GPU runs threads and blocks in a random order of that seed: what depends on the order
/// (a race, a sum by float atomics) shows itself. A real GPU has an order of its own each time.
class AnotherOrder {
 public:
  explicit AnotherOrder(std::uint64_t seed);
  ~AnotherOrder();
  AnotherOrder(const AnotherOrder&) = delete;
  AnotherOrder& operator=(const AnotherOrder&) = delete;

 private:
  std::uint64_t before_ = 0;
};

/// Calls `launcher` without a look at what it does: for Recognise, which runs after the verdict.
void run_unwatched(const std::function<void()>& launcher);

/// The bytes that `profiles` loaded from, or stored to (atomics included), the buffer of that name, all kernels
/// together.
std::int64_t bytes_loaded(const std::vector<KernelProfile>& profiles, std::string_view buffer);

/// A causal mask leaves whole tiles in which nobody sees anybody, so at most so many tenths of the bytes may be loaded.
/// `of` says of what: "query and key, for 512 queries and keys".
bool expect_blind_tiles_not_loaded(std::int64_t causal, std::int64_t all, const std::string& of, int tenths = 9);
std::int64_t bytes_stored(const std::vector<KernelProfile>& profiles, std::string_view buffer);

/// A shared-memory access of `limit` times the least possible wavefronts or more is a finding, with its line. The
/// kernels ran, and this is called, while a CountLines lived.
void expect_bank_conflicts_below(const std::vector<KernelProfile>& profiles, double limit);

/// The same for the sectors of global accesses.
void expect_sectors_below(const std::vector<KernelProfile>& profiles, double limit);

/// At least `share` (0 to 1) of the cp.async groups were in flight while their threads did something else.
void expect_copies_overlapped(const std::vector<KernelProfile>& profiles, double share);

/// What a buffer holds, row-major, as `shape`.
template <typename T, std::size_t Rank>
Array to_array(const DeviceBuffer<T>& buffer, const std::array<Index, Rank>& shape) {
  Array array{{shape.begin(), shape.end()}, {}};
  array.values.reserve(buffer.size());
  for (const T value : buffer.download()) array.values.push_back(static_cast<double>(to_float(value)));
  return array;
}

}  // namespace flashkata::testing
