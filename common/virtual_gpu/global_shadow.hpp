// The shadow of global memory: races within a block and between blocks, and reads of what nobody has written.
//
// Between the blocks of one launch there is no order, with one exception: what a block wrote before a __threadfence()
// and an atomic operation is visible to a block whose atomic operation on the same address came later.
#pragma once

#include <atomic>

#include "common/virtual_gpu/device_memory.hpp"
#include "common/virtual_gpu/shared_shadow.hpp"
#include "common/virtual_gpu/worker.hpp"

namespace flashkata::virtual_gpu {

// launch 8 | block 21 | thread 10 | clock 24 | atomic 1; 0 is nobody
class GlobalStamp {
 public:
  static constexpr std::uint32_t LAUNCHES = 256;

  explicit GlobalStamp(std::uint64_t bits) : bits_(bits) {}
  GlobalStamp(const Worker& worker, const Thread& thread, bool atomic)
      : bits_(std::uint64_t{worker.launch->number} << 56 | (worker.block & BLOCK_MASK) << 35 |
              static_cast<std::uint64_t>(thread.id) << 25 | std::uint64_t{thread.clock} << 1 |
              static_cast<std::uint64_t>(atomic)) {}

  std::uint64_t bits() const { return bits_; }
  std::uint64_t block() const { return bits_ >> 35 & BLOCK_MASK; }
  int thread() const { return static_cast<int>(bits_ >> 25 & 1023); }
  std::uint32_t clock() const { return static_cast<std::uint32_t>(bits_ >> 1 & 0xffffff); }
  bool atomic() const { return (bits_ & 1) != 0; }
  bool same_launch(GlobalStamp other) const { return bits_ >> 56 == other.bits_ >> 56; }
  bool same_block(GlobalStamp other) const { return bits_ >> 35 == other.bits_ >> 35; }

 private:
  static constexpr std::uint64_t BLOCK_MASK = (1u << 21) - 1;
  std::uint64_t bits_;
};

/// A fenced thread is about to perform an atomic operation, so that others may learn of its block's writes.
void release_writes(Worker& worker, std::uintptr_t address);
/// A thread has performed an atomic operation: it learns of the blocks that released there before.
void acquire_writes(Worker& worker, std::uintptr_t address);
void forget_releases();

void report_global_race(Worker& worker, GlobalStamp earlier, AccessKind earlier_kind, Site earlier_site,
                        const Buffer& buffer, std::uintptr_t address, AccessKind kind, Site site);
void report_uninitialised_global(Worker& worker, const Buffer& buffer, std::uintptr_t address, AccessKind kind,
                                 Site site);

inline bool conflicts(const Worker& worker, const Thread& thread, GlobalStamp earlier, GlobalStamp me) {
  if (!earlier.same_launch(me)) return false;
  if (!earlier.same_block(me)) return true;
  return !is_ordered(worker, thread, earlier.thread(), earlier.clock());
}

/// Which of the two places for readers a new one takes: readers from different blocks are worth most.
inline int reader_place(const Worker& worker, const Thread& thread, const GlobalCell& cell, GlobalStamp me) {
  const GlobalStamp first(cell.reader[0].load(std::memory_order_relaxed));
  if (!first.same_launch(me)) return 0;
  if (!first.same_block(me)) return 1;
  if (is_ordered(worker, thread, first.thread(), first.clock())) return 0;
  const GlobalStamp second(cell.reader[1].load(std::memory_order_relaxed));
  const bool second_is_better = second.same_launch(me) && !second.same_block(me);
  return second_is_better ? 0 : 1;
}

inline void check_global_access(Worker& worker, const Thread& thread, const Buffer& buffer, std::uintptr_t address,
                                unsigned bytes, AccessKind kind, Site site) {
  constexpr auto relaxed = std::memory_order_relaxed;
  const GlobalStamp me(worker, thread, kind == AccessKind::atomic);
  const int shift = std::countr_zero(buffer.granule_bytes);
  const std::size_t last = (address - buffer.begin + bytes - 1) >> shift;
  for (std::size_t granule = (address - buffer.begin) >> shift; granule <= last; ++granule) {
    GlobalCell& cell = buffer.cells[granule];
    const std::uintptr_t place = buffer.begin + (granule << shift);
    const GlobalStamp writer(cell.writer.load(relaxed));
    if (conflicts(worker, thread, writer, me) && !(writer.atomic() && me.atomic())) {
      const AccessKind earlier = writer.atomic() ? AccessKind::atomic : AccessKind::write;
      report_global_race(worker, writer, earlier, cell.writer_site.load(relaxed), buffer, place, kind, site);
    }
    if (kind != AccessKind::write && buffer.initialised[granule] == 0) {
      report_uninitialised_global(worker, buffer, place, kind, site);
    }
    if (kind == AccessKind::read) {
      const int which = reader_place(worker, thread, cell, me);
      cell.reader[which].store(me.bits(), relaxed);
      cell.reader_site[which].store(site, relaxed);
      continue;
    }
    for (int which = 0; which < 2; ++which) {
      const GlobalStamp reader(cell.reader[which].load(relaxed));
      if (!conflicts(worker, thread, reader, me)) continue;
      report_global_race(worker, reader, AccessKind::read, cell.reader_site[which].load(relaxed), buffer, place, kind,
                         site);
      break;
    }
    cell.writer.store(me.bits(), relaxed);
    cell.writer_site.store(site, relaxed);
    buffer.initialised[granule] = 1;
  }
}

}  // namespace flashkata::virtual_gpu
