#include "common/virtual_gpu/access_log.hpp"

#include <algorithm>

namespace flashkata::virtual_gpu {
namespace {

constexpr std::uintptr_t SECTOR_BYTES = 32;
constexpr std::uintptr_t BANK_BYTES = 4;
constexpr unsigned BANKS = 32;
constexpr std::size_t MOST_REQUESTS = 65536;  // at one place between two synchronisations; later ones are not counted

std::uint64_t key_of(Site site, MemorySpace space, MemoryAccess access) {
  return static_cast<std::uint64_t>(site) << 3 | static_cast<std::uint64_t>(access) << 1 |
         static_cast<std::uint64_t>(space);
}

std::int64_t round_up_divide(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

/// The different pieces of `size` bytes that the accesses touch. The memory for them is the caller's, for reuse.
void find_pieces(const std::uintptr_t* addresses, unsigned lanes, unsigned bytes, std::uintptr_t size,
                 std::vector<std::uintptr_t>& pieces) {
  pieces.clear();
  for (unsigned lane = 0; lane < lanes; ++lane) {
    for (std::uintptr_t piece = addresses[lane] / size; piece <= (addresses[lane] + bytes - 1) / size; ++piece) {
      pieces.push_back(piece);
    }
  }
  if (!std::is_sorted(pieces.begin(), pieces.end())) std::sort(pieces.begin(), pieces.end());
  pieces.erase(std::unique(pieces.begin(), pieces.end()), pieces.end());
}

/// Passes over the banks: as many as the busiest bank has different words.
std::int64_t wavefronts(const std::vector<std::uintptr_t>& words) {
  std::array<int, BANKS> in_bank{};
  int most = 1;
  for (const std::uintptr_t word : words) most = std::max(most, ++in_bank[word % BANKS]);
  return most;
}

}  // namespace

LineCounts& LineTotals::at(Site site, MemorySpace space, MemoryAccess access) {
  LineCounts& counts = counts_[key_of(site, space, access)];
  counts.space = space;
  counts.access = access;
  return counts;
}

void WarpAccessLog::add(int lane, std::uintptr_t address, unsigned bytes, MemorySpace space, MemoryAccess access,
                        Site site) {
  std::unique_ptr<Place>& place = places_[key_of(site, space, access)];
  if (place == nullptr) place = std::make_unique<Place>(Place{site, space, access, {}, {}});
  const std::size_t occurrence = place->occurrences[static_cast<std::size_t>(lane)]++;
  if (occurrence >= MOST_REQUESTS) return;
  if (place->requests.empty()) touched_.push_back(place.get());
  if (occurrence >= place->requests.size()) place->requests.resize(occurrence + 1);
  Request& request = place->requests[occurrence];
  request.bytes = bytes;
  if (request.lanes < 32) request.addresses[request.lanes++] = address;
}

void WarpAccessLog::flush(LineTotals& totals) {
  for (Place* place : touched_) {
    LineCounts& counts = totals.at(place->site, place->space, place->access);
    for (const Request& request : place->requests) {
      counts.requests += 1;
      counts.lanes += request.lanes;
      if (place->space == MemorySpace::global) {
        find_pieces(request.addresses.data(), request.lanes, request.bytes, SECTOR_BYTES, pieces_);
        counts.transactions += static_cast<std::int64_t>(pieces_.size());
        counts.least_transactions += round_up_divide(std::int64_t{request.lanes} * request.bytes, SECTOR_BYTES);
        continue;
      }
      // The hardware takes 8-byte accesses in two halves of the warp and 16-byte ones in four quarters.
      const unsigned at_once = request.bytes <= 4 ? 32 : request.bytes <= 8 ? 16 : 8;
      for (unsigned first = 0; first < request.lanes; first += at_once) {
        const unsigned lanes = std::min(at_once, request.lanes - first);
        find_pieces(request.addresses.data() + first, lanes, request.bytes, BANK_BYTES, pieces_);
        counts.transactions += wavefronts(pieces_);
        counts.least_transactions += 1;
      }
    }
    place->requests.clear();
    place->occurrences.fill(0);
  }
  touched_.clear();
}

}  // namespace flashkata::virtual_gpu
