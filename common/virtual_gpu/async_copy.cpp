// cp.async: a copy is remembered when it is started and performed when its thread waits for it.
//
// For the checker the start counts as the write, so that it must not overtake readers of the old contents; until it has
// landed the destination is pending, and whoever touches it is reported. The landing is a write of the thread that
// waited: others need a barrier after it.

#include <algorithm>
#include <cstring>

#include "common/virtual_gpu/access_check.hpp"
#include "common/virtual_gpu/device_calls.hpp"
#include "common/virtual_gpu/worker.hpp"

namespace flashkata::virtual_gpu {
namespace {

void check_start(Worker& worker, const CopyInFlight& copy) {
  const auto destination = reinterpret_cast<std::uintptr_t>(copy.destination);
  const auto source = reinterpret_cast<std::uintptr_t>(copy.source);
  const auto bytes = static_cast<unsigned>(copy.bytes);
  if (!worker.shared.is_shared(destination)) {
    report_wrong_memory(worker, destination, "cp.async, which writes", "shared", copy.site);
  }
  if (copy.source_bytes > 0 && !is_device_memory(source)) {
    report_wrong_memory(worker, source, "cp.async, which reads", "global", copy.site);
  }
  if (destination % bytes != 0)
    report_misaligned(worker, destination, bytes, "the destination of a cp.async", copy.site);
  if (copy.source_bytes > 0 && source % bytes != 0) {
    report_misaligned(worker, source, bytes, "the source of a cp.async", copy.site);
  }
  if (!worker.launch->check) return;

  if (copy.source_bytes > 0) {
    check_access(worker, source, static_cast<unsigned>(copy.source_bytes), AccessKind::read, copy.site);
  }
  check_access(worker, destination, bytes, AccessKind::write, copy.site);
  const Thread& thread = *worker.current;
  SharedCell* cell = worker.shared.cell(destination);
  for (unsigned i = 0; i < bytes / SHARED_GRANULE_BYTES; ++i) {
    cell[i].pending = Stamp(thread.clock, thread.id, false, copy.site).bits();
  }
}

void land(Worker& worker, const CopyInFlight& copy) {
  worker.current->site = copy.site;  // should the source not exist, the fault belongs to that line
  std::memcpy(copy.destination, copy.source, static_cast<std::size_t>(copy.source_bytes));
  std::memset(copy.destination + copy.source_bytes, 0, static_cast<std::size_t>(copy.bytes - copy.source_bytes));
  if (!worker.launch->check) return;
  const Thread& thread = *worker.current;
  SharedCell* cell = worker.shared.cell(reinterpret_cast<std::uintptr_t>(copy.destination));
  for (int i = 0; i < copy.bytes / static_cast<int>(SHARED_GRANULE_BYTES); ++i) {
    cell[i].pending = 0;
    cell[i].writer = Stamp(thread.clock, thread.id, false, copy.site).with_bytes(3);
  }
}

}  // namespace

void copy_async(void* shared_destination, const void* global_source, int bytes, int source_bytes) {
  Worker& worker = *current_worker;
  Thread& thread = *worker.current;
  const CopyInFlight copy{static_cast<char*>(shared_destination), static_cast<const char*>(global_source), bytes,
                          std::clamp(source_bytes, 0, bytes), site_of(__builtin_return_address(0))};
  const std::int64_t work = thread.work;
  check_start(worker, copy);
  thread.work = work;  // starting a copy is not the work that hides it
  thread.copies.push_back(copy);
}

void copy_async_commit() {
  Thread& thread = *current_worker->current;
  thread.groups.push_back({thread.copies.size(), thread.work});
}

void copy_async_wait(int groups_still_in_flight) {
  Worker& worker = *current_worker;
  Thread& thread = *worker.current;
  const std::size_t in_flight = thread.groups.size();
  const auto may_stay = static_cast<std::size_t>(groups_still_in_flight);
  if (in_flight <= may_stay) return;

  const std::size_t landing = in_flight - may_stay;
  std::size_t next = 0;
  for (std::size_t group = 0; group < landing; ++group) {
    if (thread.groups[group].end > next) {
      ++worker.events.copy_groups;
      if (thread.work > thread.groups[group].work_then) ++worker.events.overlapped_groups;
    }
    for (; next < thread.groups[group].end; ++next) land(worker, thread.copies[next]);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(next));
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + static_cast<std::ptrdiff_t>(landing));
  for (CopyGroup& group : thread.groups) group.end -= next;
}

void* dynamic_shared_memory(std::size_t element_bytes) {
  SharedMemory& shared = current_worker->shared;
  shared.set_dynamic_element_bytes(element_bytes);
  return shared.dynamic_memory();
}

}  // namespace flashkata::virtual_gpu
