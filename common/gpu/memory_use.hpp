// How much device memory is allocated: suites bound the peak to prove that no large scratch buffer is used.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>

namespace flashkata {

namespace memory_use_detail {
inline std::atomic<std::size_t> current{0};
inline std::atomic<std::size_t> peak{0};

inline void add(std::size_t bytes) {
  const std::size_t now = current += bytes;
  std::size_t highest = peak;
  while (highest < now && !peak.compare_exchange_weak(highest, now)) {
  }
}
inline void subtract(std::size_t bytes) { current -= bytes; }
}  // namespace memory_use_detail

/// Bytes in all DeviceBuffers that live now, and the most there ever were since the last reset.
inline std::size_t device_bytes() { return memory_use_detail::current; }
inline std::size_t peak_device_bytes() { return memory_use_detail::peak; }
/// The peak counts from what is allocated now.
inline void reset_peak_device_bytes() { memory_use_detail::peak = memory_use_detail::current.load(); }

}  // namespace flashkata
