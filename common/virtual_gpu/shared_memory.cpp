#include "common/virtual_gpu/shared_memory.hpp"

#include <sys/mman.h>

#include <cstring>
#include <new>

#include "common/virtual_gpu/array_shapes.hpp"
#include "common/virtual_gpu/symbols.hpp"

namespace flashkata::virtual_gpu {
namespace {

void* reserve(std::size_t bytes, int protection) {
  void* memory = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

std::size_t shadow_bytes(std::size_t bytes) { return (bytes / SHARED_GRANULE_BYTES + 16) * sizeof(SharedCell); }

}  // namespace

SharedMemory::~SharedMemory() {
  if (region_begin_ != 0) munmap(reinterpret_cast<void*>(region_begin_), REGION_BYTES);
  if (static_cells_ != nullptr) munmap(static_cells_, shadow_bytes(static_bytes_));
  if (dynamic_cells_ != nullptr) munmap(dynamic_cells_, shadow_bytes(REGION_BYTES));
}

void SharedMemory::prepare(std::size_t dynamic_bytes, bool with_shadow) {
  static_begin_ = thread_local_begin();
  if (region_begin_ == 0) {
    region_begin_ = reinterpret_cast<std::uintptr_t>(reserve(REGION_BYTES, PROT_NONE));
    mprotect(reinterpret_cast<void*>(region_begin_ + GUARD_BYTES), REGION_BYTES - 2 * GUARD_BYTES,
             PROT_READ | PROT_WRITE);
    static_bytes_ = thread_local_bytes();
    array_of_granule_.assign(static_bytes_ / SHARED_GRANULE_BYTES + 16, 0);
    for (std::size_t i = 0; i < shared_symbols().size(); ++i) {
      const SharedSymbol& symbol = shared_symbols()[i];
      const std::size_t end = (symbol.offset + symbol.bytes + SHARED_GRANULE_BYTES - 1) / SHARED_GRANULE_BYTES;
      for (std::size_t granule = symbol.offset / SHARED_GRANULE_BYTES; granule < end; ++granule) {
        array_of_granule_[granule] = static_cast<std::uint16_t>(i + 1);
      }
    }
  }
  if (with_shadow && static_cells_ == nullptr) {
    static_cells_ = static_cast<SharedCell*>(reserve(shadow_bytes(static_bytes_), PROT_READ | PROT_WRITE));
    dynamic_cells_ = static_cast<SharedCell*>(reserve(shadow_bytes(REGION_BYTES), PROT_READ | PROT_WRITE));
  }
  dynamic_bytes_ = dynamic_bytes;
  constexpr std::size_t ALIGNMENT = 128;
  dynamic_begin_ = region_begin_ + REGION_BYTES - GUARD_BYTES - (dynamic_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

void SharedMemory::poison() const {
  std::memset(dynamic_memory(), 0xff, dynamic_bytes_);
  for (const SharedSymbol& symbol : shared_symbols()) {
    std::memset(reinterpret_cast<void*>(static_begin_ + symbol.offset), 0xff, symbol.bytes);
  }
}

void SharedMemory::clear_shadow() {
  if (static_cells_ == nullptr) return;
  madvise(static_cells_, shadow_bytes(static_bytes_), MADV_DONTNEED);
  madvise(dynamic_cells_, shadow_bytes(REGION_BYTES), MADV_DONTNEED);
}

std::string SharedMemory::name(std::uintptr_t address, std::size_t bytes) const {
  if (is_dynamic(address)) {
    const std::int64_t offset = dynamic_offset(address);
    const auto size = static_cast<std::int64_t>(dynamic_element_bytes_);
    return "element " + std::to_string(offset / size) + " of dynamic shared memory (elements of " +
           std::to_string(size) + " bytes)";
  }
  const std::size_t offset = address - static_begin_;
  const std::uint16_t array = array_of_granule_[offset / SHARED_GRANULE_BYTES];
  if (array == 0) return "shared memory outside every array";
  const SharedSymbol& symbol = shared_symbols()[array - 1];
  return symbol.name + element_text(symbol, offset - symbol.offset, bytes);
}

}  // namespace flashkata::virtual_gpu
