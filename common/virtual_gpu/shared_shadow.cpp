#include "common/virtual_gpu/shared_shadow.hpp"

namespace flashkata::virtual_gpu {
namespace {

std::string advice(const Worker& worker, Stamp earlier) {
  if (earlier.thread() / 32 == worker.current->warp()) {
    return "; neither a barrier nor a __syncwarp() stands between them, and lanes of a warp need not run in step";
  }
  return "; no barrier stands between them";
}

}  // namespace

void report_shared_race(Worker& worker, Stamp earlier, AccessKind earlier_kind, std::uintptr_t address, unsigned bytes,
                        AccessKind kind, Site site) {
  const HooksOff hooks_off;
  if (!worker.sightings.is_new(FindingKind::shared_race, site, earlier.site())) return;
  const std::string name = worker.shared.name(address, bytes);
  const std::string me = worker.in_block() + worker.thread_name(worker.current->id);
  const std::string other = worker.thread_name(earlier.thread());
  std::string text;
  if (earlier_kind == AccessKind::read) {
    text = me + " " + (kind == AccessKind::write ? "overwrites" : verb(kind)) + " " + name + " at {here} while " +
           other + " reads it at {there}";
  } else {
    text =
        me + " " + verb(kind) + " " + name + " at {here} while " + other + " " + verb(earlier_kind) + " it at {there}";
  }
  worker.sightings.describe(FindingKind::shared_race, site, earlier.site(), text + advice(worker, earlier));
}

void report_uninitialised_shared(Worker& worker, std::uintptr_t address, unsigned bytes, Site site) {
  const HooksOff hooks_off;
  if (!worker.sightings.is_new(FindingKind::uninitialised_read, site)) return;
  worker.sightings.describe(
      FindingKind::uninitialised_read, site, 0,
      worker.thread_and_block(worker.current->id) + " reads " + worker.shared.name(address, bytes) +
          " at {here}, but nobody in this block has written it; a GPU leaves there what the block "
          "before left");
}

void report_copy_not_waited(Worker& worker, Stamp issue, std::uintptr_t address, unsigned bytes, AccessKind kind,
                            Site site) {
  const HooksOff hooks_off;
  if (!worker.sightings.is_new(FindingKind::async_copy_not_waited, site, issue.site())) return;
  worker.sightings.describe(FindingKind::async_copy_not_waited, site, issue.site(),
                            worker.thread_and_block(worker.current->id) + " " + verb(kind) + " " +
                                worker.shared.name(address, bytes) + " at {here} while the cp.async that " +
                                worker.thread_name(issue.thread()) +
                                " started at {there} may still be in flight; that thread has not waited for its group");
}

}  // namespace flashkata::virtual_gpu
