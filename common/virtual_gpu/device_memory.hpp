// Global memory: named buffers in one reserved range of addresses, so that any address leads to its buffer at once.
//
// Around each buffer lie pages that cannot be touched. In a fast program a buffer ends right before them, so that an
// overrun faults; in a checked one it begins at a multiple of 64 KiB, as the model of memory sectors wants it, and the
// shadow memory finds the overrun.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace flashkata::virtual_gpu {

/// Who touched a granule of global memory last; see global_shadow.hpp.
struct GlobalCell {
  std::atomic<std::uint64_t> writer;
  std::atomic<std::uint64_t> reader[2];
  std::atomic<std::uint32_t> writer_site;
  std::atomic<std::uint32_t> reader_site[2];
};

struct Buffer {
  std::string name;
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
  std::size_t element_bytes = 1;
  std::size_t granule_bytes = 4;  // of the shadow: at most one element, at most 4 bytes
  std::size_t number = 0;         // small, unique among the live buffers
  bool released = false;
  GlobalCell* cells = nullptr;           // one per granule; null in a fast program
  unsigned char* initialised = nullptr;  // one per granule
  std::uintptr_t first_slot = 0;
  std::uintptr_t slots = 0;

  std::size_t bytes() const { return end - begin; }
  std::size_t elements() const { return bytes() / element_bytes; }
  std::size_t granules() const { return (bytes() + granule_bytes - 1) / granule_bytes; }
};

void* allocate_device_memory(const char* name, std::size_t bytes, std::size_t element_bytes);
void release_device_memory(void* address);
/// The host wrote here: these bytes count as initialised (or, after poisoning, as uninitialised again).
void mark_host_write(const void* address, std::size_t bytes, bool initialised);

constexpr std::uintptr_t SLOT_BYTES = 64 * 1024;
constexpr std::uintptr_t DEVICE_MEMORY_BYTES = std::uintptr_t{64} << 30;
extern std::uintptr_t device_memory_begin;
extern Buffer** buffer_of_slot;

/// Is this an address in device memory, allocated or not?
inline bool is_device_memory(std::uintptr_t address) { return address - device_memory_begin < DEVICE_MEMORY_BYTES; }

/// The buffer whose pages hold the address (it may still be outside [begin, end), or released), or null.
inline Buffer* buffer_at(std::uintptr_t address) {
  return is_device_memory(address) ? buffer_of_slot[(address - device_memory_begin) / SLOT_BYTES] : nullptr;
}

/// The buffer next to a wild address, or null.
const Buffer* nearest_buffer(std::uintptr_t address);

/// Live buffers have numbers below this; live_buffer(n) may be null.
std::size_t buffer_number_limit();
Buffer* live_buffer(std::size_t number);

/// Forget all stamps: called before the number of the launch, of which a stamp holds a few bits, repeats.
void clear_global_shadow();

}  // namespace flashkata::virtual_gpu
