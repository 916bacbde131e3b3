// Stamps: who touched a granule of shared memory, when, and where in the code, in 64 bits.
//
// "When" is the worker's clock. It moves on at every barrier of the block and of a warp, and a stamp holds the reading
// of the thread's last synchronisation. A stamp from before the reader's last common synchronisation with its author is
// ordered; stamps of earlier blocks are older than the start of this one, so nothing need be cleared between blocks.
#pragma once

#include <cstdint>

#include "common/virtual_gpu/symbols.hpp"

namespace flashkata::virtual_gpu {

// clock 24 | thread 10 | atomic 1 | bytes of the granule 2 | site 27
class Stamp {
 public:
  static constexpr std::uint32_t CLOCK_LIMIT = 1u << 24;

  Stamp() = default;
  explicit Stamp(std::uint64_t bits) : bits_(bits) {}
  Stamp(std::uint32_t clock, int thread, bool atomic, Site site)
      : bits_(static_cast<std::uint64_t>(clock) << 40 | static_cast<std::uint64_t>(thread) << 30 |
              static_cast<std::uint64_t>(atomic) << 29 | (site & SITE_MASK)) {}

  std::uint64_t bits() const { return bits_; }
  std::uint64_t with_bytes(unsigned byte_mask) const { return bits_ | static_cast<std::uint64_t>(byte_mask) << 27; }

  std::uint32_t clock() const { return static_cast<std::uint32_t>(bits_ >> 40); }
  int thread() const { return static_cast<int>(bits_ >> 30 & 1023); }
  bool atomic() const { return (bits_ >> 29 & 1) != 0; }
  unsigned byte_mask() const { return static_cast<unsigned>(bits_ >> 27 & 3); }
  Site site() const { return static_cast<Site>(bits_ & SITE_MASK); }

 private:
  static constexpr Site SITE_MASK = (1u << 27) - 1;
  std::uint64_t bits_ = 0;
};

}  // namespace flashkata::virtual_gpu
