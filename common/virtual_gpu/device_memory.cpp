#include "common/virtual_gpu/device_memory.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

#include "common/virtual_gpu/options.hpp"

namespace flashkata::virtual_gpu {

std::uintptr_t device_memory_begin = 0;
Buffer** buffer_of_slot = nullptr;

namespace {

constexpr std::uintptr_t SLOTS = DEVICE_MEMORY_BYTES / SLOT_BYTES;
constexpr std::size_t PAGE = 4096;

std::mutex memory_mutex;
std::vector<std::unique_ptr<Buffer>> all_buffers;  // released ones too: they explain a use after free
std::vector<Buffer*> live_buffers;                 // by number; null where a number is free
std::uintptr_t next_slot = 1;

void* reserve(std::size_t bytes, int protection) {
  void* memory = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

void reserve_device_memory() {
  if (device_memory_begin != 0) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(reserve(DEVICE_MEMORY_BYTES + SLOT_BYTES, PROT_NONE));
  buffer_of_slot = static_cast<Buffer**>(reserve(SLOTS * sizeof(Buffer*), PROT_READ | PROT_WRITE));
  device_memory_begin = (begin + SLOT_BYTES - 1) / SLOT_BYTES * SLOT_BYTES;
}

bool is_live(std::uintptr_t slot) { return buffer_of_slot[slot] != nullptr && !buffer_of_slot[slot]->released; }

/// First slot of a gap that is one longer than asked for; addresses are reused as late as possible.
std::uintptr_t find_gap(std::uintptr_t slots) {
  for (int round = 0; round < 2; ++round) {
    std::uintptr_t start = next_slot;
    std::uintptr_t slot = start;
    while (slot + 1 < SLOTS && slot - start <= slots) {
      if (is_live(slot)) start = slot + 1;
      ++slot;
    }
    if (slot - start > slots) return start;
    next_slot = 1;
  }
  throw std::bad_alloc();
}

std::size_t free_number() {
  for (std::size_t number = 0; number < live_buffers.size(); ++number) {
    if (live_buffers[number] == nullptr) return number;
  }
  live_buffers.push_back(nullptr);
  return live_buffers.size() - 1;
}

}  // namespace

void* allocate_device_memory(const char* name, std::size_t bytes, std::size_t element_bytes) {
  const std::lock_guard lock(memory_mutex);
  reserve_device_memory();

  auto buffer = std::make_unique<Buffer>();
  const std::size_t pages = (std::max<std::size_t>(bytes, 1) + PAGE - 1) / PAGE * PAGE;
  buffer->name = name;
  buffer->slots = (pages + SLOT_BYTES - 1) / SLOT_BYTES;
  buffer->first_slot = find_gap(buffer->slots);
  next_slot = buffer->first_slot + buffer->slots + 1;

  const std::uintptr_t first_page = device_memory_begin + buffer->first_slot * SLOT_BYTES;
  if (mprotect(reinterpret_cast<void*>(first_page), pages, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  const std::size_t shift = has_checked_kernels() ? 0 : (pages - bytes) / 16 * 16;
  buffer->begin = first_page + shift;
  buffer->end = buffer->begin + bytes;
  buffer->element_bytes = element_bytes;
  buffer->granule_bytes = std::bit_floor(std::min<std::size_t>(element_bytes, 4));
  if (has_checked_kernels()) {
    const std::size_t count = buffer->granules() + 1;
    buffer->cells = static_cast<GlobalCell*>(reserve(count * sizeof(GlobalCell), PROT_READ | PROT_WRITE));
    buffer->initialised = static_cast<unsigned char*>(reserve(count, PROT_READ | PROT_WRITE));
  }
  buffer->number = free_number();
  live_buffers[buffer->number] = buffer.get();
  std::fill_n(buffer_of_slot + buffer->first_slot, buffer->slots, buffer.get());
  std::memset(reinterpret_cast<void*>(buffer->begin), 0xff, bytes);
  all_buffers.push_back(std::move(buffer));
  return reinterpret_cast<void*>(all_buffers.back()->begin);
}

void release_device_memory(void* address) {
  const std::lock_guard lock(memory_mutex);
  Buffer* buffer = buffer_at(reinterpret_cast<std::uintptr_t>(address));
  if (buffer == nullptr || buffer->released) return;
  if (buffer->cells != nullptr) {
    const std::size_t count = buffer->granules() + 1;
    munmap(buffer->cells, count * sizeof(GlobalCell));
    munmap(buffer->initialised, count);
  }
  void* first_page = reinterpret_cast<void*>(device_memory_begin + buffer->first_slot * SLOT_BYTES);
  const std::size_t bytes = buffer->slots * SLOT_BYTES;
  madvise(first_page, bytes, MADV_DONTNEED);
  mprotect(first_page, bytes, PROT_NONE);
  live_buffers[buffer->number] = nullptr;
  buffer->released = true;
}

void mark_host_write(const void* address, std::size_t bytes, bool initialised) {
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  const Buffer* buffer = buffer_at(begin);
  if (buffer == nullptr || buffer->initialised == nullptr || bytes == 0) return;
  const std::size_t first = (begin - buffer->begin) / buffer->granule_bytes;
  const std::size_t last = (begin - buffer->begin + bytes - 1) / buffer->granule_bytes;
  std::memset(buffer->initialised + first, initialised ? 1 : 0, last - first + 1);
}

const Buffer* nearest_buffer(std::uintptr_t address) {
  const std::lock_guard lock(memory_mutex);
  const Buffer* nearest = nullptr;
  std::uintptr_t least = UINTPTR_MAX;
  for (const Buffer* buffer : live_buffers) {
    if (buffer == nullptr) continue;
    const std::uintptr_t distance = address < buffer->begin  ? buffer->begin - address
                                    : address >= buffer->end ? address - buffer->end
                                                             : 0;
    if (distance < least) {
      least = distance;
      nearest = buffer;
    }
  }
  return nearest;
}

std::size_t buffer_number_limit() { return live_buffers.size(); }

Buffer* live_buffer(std::size_t number) { return live_buffers[number]; }

void clear_global_shadow() {
  const std::lock_guard lock(memory_mutex);
  for (Buffer* buffer : live_buffers) {
    if (buffer != nullptr && buffer->cells != nullptr) {
      madvise(buffer->cells, (buffer->granules() + 1) * sizeof(GlobalCell), MADV_DONTNEED);
    }
  }
}

}  // namespace flashkata::virtual_gpu
