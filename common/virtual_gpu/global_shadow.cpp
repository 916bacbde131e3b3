#include "common/virtual_gpu/global_shadow.hpp"

#include <mutex>
#include <unordered_map>

namespace flashkata::virtual_gpu {

std::string buffer_element(const Buffer& buffer, std::uintptr_t address);

namespace {

// Which blocks, up to which of their clock readings, have released their writes at which address.
std::mutex release_mutex;
std::unordered_map<std::uintptr_t, std::unordered_map<std::uint64_t, std::uint32_t>> releases;
std::atomic<bool> any_release{false};

bool has_acquired(const Worker& worker, GlobalStamp earlier) {
  const auto known = worker.acquired.find(earlier.block());
  return known != worker.acquired.end() && earlier.clock() <= known->second;
}

}  // namespace

void release_writes(Worker& worker, std::uintptr_t address) {
  const HooksOff hooks_off;
  const std::lock_guard lock(release_mutex);
  any_release = true;
  auto& released = releases[address];
  for (const auto& [block, clock] : worker.acquired) released[block] = std::max(released[block], clock);
  released[worker.block] = worker.clock;
}

void acquire_writes(Worker& worker, std::uintptr_t address) {
  if (!any_release) return;
  const HooksOff hooks_off;
  const std::lock_guard lock(release_mutex);
  const auto released = releases.find(address);
  if (released == releases.end()) return;
  for (const auto& [block, clock] : released->second) {
    worker.acquired[block] = std::max(worker.acquired[block], clock);
  }
}

void forget_releases() {
  releases.clear();
  any_release = false;
}

void report_global_race(Worker& worker, GlobalStamp earlier, AccessKind earlier_kind, Site earlier_site,
                        const Buffer& buffer, std::uintptr_t address, AccessKind kind, Site site) {
  const bool between_blocks = earlier.block() != worker.block;
  const HooksOff hooks_off;
  if (between_blocks && has_acquired(worker, earlier)) return;
  if (!worker.sightings.is_new(FindingKind::global_race, site, earlier_site)) return;
  std::string text = worker.thread_and_block(worker.current->id) + " " + verb(kind) + " " +
                     buffer_element(buffer, address) + " at {here} while " +
                     worker.thread_and_block(earlier.thread(), earlier.block()) + " " + verb(earlier_kind) +
                     " it at {there}";
  text += between_blocks
              ? "; blocks run in any order and at the same time: either one of them owns the element, or all "
                "updates are atomic"
              : "; no barrier stands between them";
  worker.sightings.describe(FindingKind::global_race, site, earlier_site, std::move(text));
}

void report_uninitialised_global(Worker& worker, const Buffer& buffer, std::uintptr_t address, AccessKind kind,
                                 Site site) {
  const HooksOff hooks_off;
  if (!worker.sightings.is_new(FindingKind::uninitialised_read, site)) return;
  worker.sightings.describe(FindingKind::uninitialised_read, site, 0,
                            worker.thread_and_block(worker.current->id) + " " + verb(kind) + " " +
                                buffer_element(buffer, address) +
                                " at {here}, but neither the host nor a kernel has written it");
}

}  // namespace flashkata::virtual_gpu
