#include "common/virtual_gpu/access_check.hpp"

namespace flashkata::virtual_gpu {

const char* verb(AccessKind kind) {
  switch (kind) {
    case AccessKind::read:
      return "reads";
    case AccessKind::write:
      return "writes";
    case AccessKind::atomic:
      return "atomically updates";
  }
  return "";
}

std::string buffer_element(const Buffer& buffer, std::uintptr_t address) {
  const auto size = static_cast<std::int64_t>(buffer.element_bytes);
  const auto offset = static_cast<std::int64_t>(address - buffer.begin);
  const std::int64_t index = offset >= 0 ? offset / size : -((-offset + size - 1) / size);
  return buffer.name + "[" + std::to_string(index) + "]";
}

namespace {

void describe_bad_access(Worker& worker, FindingKind finding, Site site, const std::string& what) {
  if (!worker.sightings.is_new(finding, site)) return;
  worker.sightings.describe(finding, site, 0, worker.thread_and_block(worker.current->id) + " " + what, true);
}

std::string outside_buffer(const Buffer& buffer, std::uintptr_t address, const std::string& verb) {
  std::string text = verb + " " + buffer_element(buffer, address) + " at {here}, but " + buffer.name;
  if (buffer.elements() == 0) return text + " has no elements";
  return text + " has " + std::to_string(buffer.elements()) + " elements, the last is " + buffer.name + "[" +
         std::to_string(buffer.elements() - 1) + "]";
}

}  // namespace

std::string bad_address_text(const Worker& worker, std::uintptr_t address, const char* verb_text,
                             FindingKind* finding) {
  const std::string verb = verb_text;
  *finding = FindingKind::out_of_bounds;
  if (const Buffer* buffer = buffer_at(address)) {
    if (!buffer->released) return outside_buffer(*buffer, address, verb);
    *finding = FindingKind::use_after_free;
    return verb + " " + buffer_element(*buffer, address) + " at {here}, but the host has released " + buffer->name;
  }
  if (is_device_memory(address)) {
    if (const Buffer* buffer = nearest_buffer(address)) return outside_buffer(*buffer, address, verb);
  }
  const int owner = worker.stacks.owner(address);
  if (owner >= 0) {
    return verb + " a local variable of " + worker.thread_name(owner) +
           " at {here}; local variables can be reached by their own thread only";
  }
  if (worker.shared.is_static(address)) {
    return verb + " past the end of a __shared__ array at {here}";
  }
  return verb + " an address at {here} that is in no buffer and in no shared array; " +
         (address < 4096 ? "it is a null pointer" : "is it a pointer to the host's memory, or not initialised?");
}

void check_unusual_access(Worker& worker, std::uintptr_t address, unsigned bytes, AccessKind kind, Site site) {
  const auto arguments = reinterpret_cast<std::uintptr_t>(worker.launch->arguments);
  if (kind == AccessKind::read && address - arguments < worker.launch->argument_bytes) return;
  if (address >= image().begin && address + bytes <= image().end) return;  // constants and __device__ variables
  if (kind == AccessKind::read && is_builtin_variable(address)) return;
  const HooksOff hooks_off;
  FindingKind finding{};
  const std::string text = bad_address_text(worker, address, verb(kind), &finding);
  describe_bad_access(worker, finding, site, text);
  worker.abandon();
}

void report_dynamic_overrun(Worker& worker, std::uintptr_t address, AccessKind kind, Site site) {
  const HooksOff hooks_off;
  const std::int64_t offset = worker.shared.dynamic_offset(address);
  if (offset < 0) {
    describe_bad_access(worker, FindingKind::out_of_bounds, site,
                        std::string(verb(kind)) + " " + std::to_string(-offset) +
                            " bytes before the start of dynamic shared memory at {here}");
  } else {
    describe_bad_access(worker, FindingKind::dynamic_shared_too_small, site,
                        std::string(verb(kind)) + " byte " + std::to_string(offset) +
                            " of dynamic shared memory at {here}, but the launch asked for " +
                            std::to_string(worker.shared.dynamic_bytes()) +
                            " bytes; compare the third argument of launch() with what the kernel lays out");
  }
  worker.abandon();
}

void report_misaligned(Worker& worker, std::uintptr_t address, unsigned bytes, const char* what, Site site) {
  const HooksOff hooks_off;
  std::string place;
  if (worker.shared.is_shared(address)) {
    place = worker.shared.name(address, 1);
  } else if (const Buffer* buffer = buffer_at(address)) {
    place = buffer_element(*buffer, address);
  } else {
    place = "an address";
  }
  const std::string size = std::to_string(bytes);
  describe_bad_access(worker, FindingKind::misaligned_access, site,
                      "uses " + place + " as " + what + " of " + size + " bytes at {here}, but its address is not a " +
                          "multiple of " + size + "; is the length of a row, and each offset, a multiple of " + size +
                          " bytes?");
  worker.abandon();
}

void report_wrong_memory(Worker& worker, std::uintptr_t address, const char* what, const char* wanted, Site site) {
  const HooksOff hooks_off;
  std::string place = "neither in a buffer nor in shared memory";
  if (worker.shared.is_shared(address)) {
    place = "in " + worker.shared.name(address, 1);
  } else if (const Buffer* buffer = buffer_at(address)) {
    place = "in global memory, at " + buffer_element(*buffer, address);
  } else if (worker.stacks.owner(address) >= 0) {
    place = "a local variable";
  }
  describe_bad_access(worker, FindingKind::wrong_memory, site,
                      std::string("calls ") + what + " " + wanted + " memory at {here}, but the address is " + place);
  worker.abandon();
}

void log_access(Worker& worker, std::uintptr_t address, unsigned bytes, MemorySpace space, AccessKind kind, Site site) {
  const HooksOff hooks_off;
  const Thread& thread = *worker.current;
  const MemoryAccess access = kind == AccessKind::read    ? MemoryAccess::load
                              : kind == AccessKind::write ? MemoryAccess::store
                                                          : MemoryAccess::atomic;
  worker.warp_of(thread).log.add(thread.lane(), address, bytes, space, access, site);
}

}  // namespace flashkata::virtual_gpu
