// Which lanes of a warp accessed memory together: the raw counts of the profile.
//
// The lanes of a warp run one after the other here. Their accesses are zipped again by (code address, memory space,
// occurrence): the third time that lane 5 passes a load belongs together with the third time that lane 6 does. At every
// synchronisation of the warp the counting starts afresh. Where lanes take different paths this is a guess.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "common/virtual_gpu/profile.hpp"
#include "common/virtual_gpu/symbols.hpp"

namespace flashkata::virtual_gpu {

struct LineCounts {
  MemorySpace space = MemorySpace::global;
  MemoryAccess access = MemoryAccess::load;
  std::int64_t requests = 0;
  std::int64_t lanes = 0;
  std::int64_t transactions = 0;
  std::int64_t least_transactions = 0;
};

/// Sums by place and kind of access.
class LineTotals {
 public:
  LineCounts& at(Site site, MemorySpace space, MemoryAccess access);
  const std::unordered_map<std::uint64_t, LineCounts>& all() const { return counts_; }
  static Site site(std::uint64_t key) { return static_cast<Site>(key >> 3); }
  void clear() { counts_.clear(); }

 private:
  std::unordered_map<std::uint64_t, LineCounts> counts_;
};

class WarpAccessLog {
 public:
  void add(int lane, std::uintptr_t address, unsigned bytes, MemorySpace space, MemoryAccess access, Site site);
  /// Turns what was logged into requests.
  void flush(LineTotals& totals);

 private:
  struct Request {
    unsigned bytes = 0;
    unsigned lanes = 0;
    std::array<std::uintptr_t, 32> addresses;
  };
  struct Place {
    Site site;
    MemorySpace space;
    MemoryAccess access;
    std::array<std::uint32_t, 32> occurrences{};
    std::vector<Request> requests;
  };

  std::unordered_map<std::uint64_t, std::unique_ptr<Place>> places_;
  std::vector<Place*> touched_;
  std::vector<std::uintptr_t> pieces_;  // of one request, while it is counted
};

}  // namespace flashkata::virtual_gpu
