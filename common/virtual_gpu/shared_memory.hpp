// The shared memory of the block that an OS thread is running: where it is, what it is called, and its shadow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace flashkata::virtual_gpu {

/// What is known about two bytes of shared memory: stamps (see stamp.hpp) of who touched them; 0 is nobody.
struct SharedCell {
  std::uint64_t writer;
  std::uint64_t reader[2];
  std::uint64_t pending;  // a cp.async into it is in flight: the stamp of its issue
};
constexpr std::uintptr_t SHARED_GRANULE_BYTES = 2;

/// The most dynamic shared memory that a block of an H100 may have.
constexpr std::size_t MOST_DYNAMIC_SHARED_BYTES = 227 * 1024;

class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  /// On the OS thread that will run the blocks, at the start of each launch.
  void prepare(std::size_t dynamic_bytes, bool with_shadow);

  /// Fills everything with NaN: nothing survives from the block before.
  void poison() const;

  void set_dynamic_element_bytes(std::size_t bytes) { dynamic_element_bytes_ = bytes; }
  void* dynamic_memory() const { return reinterpret_cast<void*>(dynamic_begin_); }

  bool is_static(std::uintptr_t address) const { return address - static_begin_ < static_bytes_; }
  bool is_dynamic(std::uintptr_t address) const { return address - region_begin_ < REGION_BYTES; }
  bool is_shared(std::uintptr_t address) const { return is_static(address) || is_dynamic(address); }

  /// Static: does the access lie inside a shared array? Dynamic: inside what the launch asked for?
  bool static_access_fits(std::uintptr_t address, std::size_t bytes) const {
    const std::uintptr_t granule = (address - static_begin_) / SHARED_GRANULE_BYTES;
    return array_of_granule_[granule] != 0 &&
           array_of_granule_[granule] ==
               array_of_granule_[(address + bytes - 1 - static_begin_) / SHARED_GRANULE_BYTES];
  }
  bool dynamic_access_fits(std::uintptr_t address, std::size_t bytes) const {
    return address >= dynamic_begin_ && address + bytes <= dynamic_begin_ + dynamic_bytes_;
  }

  /// The cell of the granule that holds the address, which must be shared. Neighbours follow.
  SharedCell* cell(std::uintptr_t address) const {
    if (is_static(address)) return static_cells_ + (address - static_begin_) / SHARED_GRANULE_BYTES;
    return dynamic_cells_ + (address - region_begin_) / SHARED_GRANULE_BYTES;
  }

  /// Forget all stamps: before their clock, of which they hold a few bits, repeats.
  void clear_shadow();

  /// "k_smem[3][5]", "element 320 of dynamic shared memory"; `bytes` is the size of the access.
  std::string name(std::uintptr_t address, std::size_t bytes) const;

  std::size_t dynamic_bytes() const { return dynamic_bytes_; }
  std::int64_t dynamic_offset(std::uintptr_t address) const {
    return static_cast<std::int64_t>(address - dynamic_begin_);
  }

 private:
  static constexpr std::size_t GUARD_BYTES = 64 * 1024;
  static constexpr std::size_t REGION_BYTES = 228 * 1024 + 2 * GUARD_BYTES;

  std::uintptr_t region_begin_ = 0;  // guard, memory, guard; the dynamic memory ends at the second guard
  std::uintptr_t dynamic_begin_ = 0;
  std::size_t dynamic_bytes_ = 0;
  std::size_t dynamic_element_bytes_ = 1;
  std::uintptr_t static_begin_ = 0;
  std::size_t static_bytes_ = 0;
  std::vector<std::uint16_t> array_of_granule_;  // 1 + index in shared_symbols(); 0 for none
  SharedCell* static_cells_ = nullptr;
  SharedCell* dynamic_cells_ = nullptr;
};

}  // namespace flashkata::virtual_gpu
