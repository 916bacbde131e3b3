// The shadow of shared memory: races, uninitialised reads, and reads of what a cp.async has not brought yet.
//
// A granule of two bytes has room for its last writer and two readers. Two readers suffice: they are kept from
// different warps where possible, so that whoever writes next finds one that it has not synchronised with.
// Accesses to different bytes of a granule do not race.
#pragma once

#include "common/virtual_gpu/stamp.hpp"
#include "common/virtual_gpu/worker.hpp"

namespace flashkata::virtual_gpu {

enum class AccessKind : std::uint8_t { read, write, atomic };
/// "reads", "writes", "atomically updates"
const char* verb(AccessKind kind);

void report_shared_race(Worker& worker, Stamp earlier, AccessKind earlier_kind, std::uintptr_t address, unsigned bytes,
                        AccessKind kind, Site site);
void report_uninitialised_shared(Worker& worker, std::uintptr_t address, unsigned bytes, Site site);
void report_copy_not_waited(Worker& worker, Stamp issue, std::uintptr_t address, unsigned bytes, AccessKind kind,
                            Site site);

inline bool conflicts(const Worker& worker, const Thread& thread, Stamp earlier, unsigned byte_mask) {
  return earlier.clock() >= worker.last_barrier && (earlier.byte_mask() & byte_mask) != 0 &&
         !is_ordered(worker, thread, earlier.thread(), earlier.clock());
}

inline void remember_reader(const Worker& worker, const Thread& thread, SharedCell& cell, std::uint64_t me) {
  const Stamp first(cell.reader[0]);
  const bool first_is_alive = first.clock() >= worker.last_barrier;
  if (!first_is_alive || first.thread() == thread.id) {
    cell.reader[0] = me;
  } else if (first.thread() / 32 == thread.warp()) {
    const Stamp second(cell.reader[1]);
    const bool second_is_better = second.clock() >= worker.last_barrier && second.thread() / 32 != thread.warp();
    if (is_ordered(worker, thread, first.thread(), first.clock())) {
      cell.reader[0] = me;
    } else if (!second_is_better) {
      cell.reader[1] = me;
    }
  } else {
    cell.reader[1] = me;
  }
}

inline void check_shared_access(Worker& worker, const Thread& thread, std::uintptr_t address, unsigned bytes,
                                AccessKind kind, Site site) {
  const Stamp stamp(thread.clock, thread.id, kind == AccessKind::atomic, site);
  SharedCell* cell = worker.shared.cell(address);
  std::uintptr_t granule = address & ~(SHARED_GRANULE_BYTES - 1);
  for (; granule < address + bytes; granule += SHARED_GRANULE_BYTES, ++cell) {
    unsigned byte_mask = 3;
    if (granule < address) byte_mask &= 2;
    if (granule + SHARED_GRANULE_BYTES > address + bytes) byte_mask &= 1;
    const std::uint64_t me = stamp.with_bytes(byte_mask);

    const Stamp writer(cell->writer);
    if (cell->pending != 0 && Stamp(cell->pending).clock() >= worker.block_start) {
      report_copy_not_waited(worker, Stamp(cell->pending), granule, bytes, kind, site);
    } else if (conflicts(worker, thread, writer, byte_mask) && !(kind == AccessKind::atomic && writer.atomic())) {
      const AccessKind earlier = writer.atomic() ? AccessKind::atomic : AccessKind::write;
      report_shared_race(worker, writer, earlier, granule, bytes, kind, site);
    } else if (kind != AccessKind::write && writer.clock() < worker.block_start) {
      report_uninitialised_shared(worker, granule, bytes, site);
    }

    if (kind == AccessKind::read) {
      remember_reader(worker, thread, *cell, me);
      continue;
    }
    for (const std::uint64_t reader : cell->reader) {
      if (!conflicts(worker, thread, Stamp(reader), byte_mask)) continue;
      report_shared_race(worker, Stamp(reader), AccessKind::read, granule, bytes, kind, site);
      break;
    }
    cell->writer = me;
  }
}

}  // namespace flashkata::virtual_gpu
