// The checker's front door: every memory access of a checked kernel comes through here.
//
// Decides which memory an address belongs to and asks that memory's shadow. What follows is inlined into the hooks that
// the compiler calls; whatever happens rarely is in access_check.cpp.
#pragma once

#include "common/virtual_gpu/device_memory.hpp"
#include "common/virtual_gpu/global_shadow.hpp"
#include "common/virtual_gpu/shared_shadow.hpp"
#include "common/virtual_gpu/worker.hpp"

namespace flashkata::virtual_gpu {

/// An access that is in none of the usual places: constants and kernel arguments may be read, all else is a finding.
void check_unusual_access(Worker& worker, std::uintptr_t address, unsigned bytes, AccessKind kind, Site site);
/// The access would do `what` ("ldmatrix, which reads") with memory that is not `wanted` ("shared").
[[noreturn]] void report_wrong_memory(Worker& worker, std::uintptr_t address, const char* what, const char* wanted,
                                      Site site);
/// Why no thread may access this address; `verb` as in "reads". Also says which kind of finding that is.
std::string bad_address_text(const Worker& worker, std::uintptr_t address, const char* verb, FindingKind* finding);
[[noreturn]] void report_dynamic_overrun(Worker& worker, std::uintptr_t address, AccessKind kind, Site site);
[[noreturn]] void report_misaligned(Worker& worker, std::uintptr_t address, unsigned bytes, const char* what,
                                    Site site);
void log_access(Worker& worker, std::uintptr_t address, unsigned bytes, MemorySpace space, AccessKind kind, Site site);

inline void count_traffic(Worker& worker, const Buffer& buffer, unsigned bytes, AccessKind kind) {
  BufferTraffic& traffic = worker.traffic[buffer.number];
  if (kind == AccessKind::read) {
    traffic.loaded += bytes;
  } else if (kind == AccessKind::write) {
    traffic.stored += bytes;
  } else {
    traffic.atomic += bytes;
  }
}

inline void check_access(Worker& worker, std::uintptr_t address, unsigned bytes, AccessKind kind, Site site) {
  Thread& thread = *worker.current;
  thread.site = site;  // should what follows fault, it was here
  if (address - worker.stacks.low(static_cast<std::size_t>(thread.id)) < worker.stacks.stack_bytes()) return;
  ++thread.work;

  if (const Buffer* buffer = buffer_at(address);
      buffer != nullptr && address >= buffer->begin && address + bytes <= buffer->end && !buffer->released) {
    check_global_access(worker, thread, *buffer, address, bytes, kind, site);
    count_traffic(worker, *buffer, bytes, kind);
    if (worker.launch->profile) log_access(worker, address, bytes, MemorySpace::global, kind, site);
    return;
  }
  if (worker.shared.is_dynamic(address)) {
    if (!worker.shared.dynamic_access_fits(address, bytes)) report_dynamic_overrun(worker, address, kind, site);
  } else if (!worker.shared.is_static(address) || !worker.shared.static_access_fits(address, bytes)) {
    check_unusual_access(worker, address, bytes, kind, site);
    return;
  }
  check_shared_access(worker, thread, address, bytes, kind, site);
  if (worker.launch->profile) log_access(worker, address, bytes, MemorySpace::shared, kind, site);
}

}  // namespace flashkata::virtual_gpu
