// Deadlocks: nobody can run and somebody waits. Who waits where, and which of the known reasons is it?

#include <map>

#include "common/virtual_gpu/warp_operation.hpp"
#include "common/virtual_gpu/worker.hpp"

namespace flashkata::virtual_gpu {
namespace {

/// Threads that wait at the same place, or have all left.
struct Crowd {
  int count = 0;
  int first = 0;
  int last = 0;
};

std::string describe(const Worker& worker, const Crowd& crowd) {
  if (crowd.count == 1) return worker.thread_name(crowd.first);
  return std::to_string(crowd.count) + " threads (" + worker.thread_name(crowd.first) + " to " +
         worker.thread_name(crowd.last) + ")";
}

std::string who_waits_where(const Worker& worker) {
  std::map<std::string, Crowd> crowds;
  for (const Thread& thread : worker.threads) {
    std::string place = "left the kernel";
    if (thread.state != ThreadState::done) {
      place = std::string("wait at ") + thread.waits_for + " at " + line_of(thread.site).text();
    }
    Crowd& crowd = crowds[place];
    if (crowd.count++ == 0) crowd.first = thread.id;
    crowd.last = thread.id;
  }
  std::string text;
  for (const auto& [place, crowd] : crowds) text += (text.empty() ? "" : "; ") + describe(worker, crowd) + " " + place;
  return text;
}

/// A lane that waits for one that has left the kernel, if that is the reason.
const Thread* lane_waiting_for_absent_one(const Worker& worker, const Thread** absent) {
  for (const Thread& thread : worker.threads) {
    if (thread.state != ThreadState::at_warp_operation) continue;
    for (int lane = 0; lane < 32; ++lane) {
      const std::size_t other = static_cast<std::size_t>(thread.warp() * 32 + lane);
      if ((thread.mask >> lane & 1) == 0 || other >= worker.threads.size()) continue;
      if (worker.threads[other].state != ThreadState::done) continue;
      *absent = &worker.threads[other];
      return &thread;
    }
  }
  return nullptr;
}

const Thread* any_waiting(const Worker& worker) {
  for (const Thread& thread : worker.threads) {
    if (thread.state == ThreadState::at_barrier) return &thread;
  }
  for (const Thread& thread : worker.threads) {
    if (thread.state != ThreadState::done) return &thread;
  }
  return nullptr;
}

/// A thread that waits somewhere else than `thread` does.
Site another_place(const Worker& worker, const Thread& thread) {
  for (const Thread& other : worker.threads) {
    if (other.state != ThreadState::done && line_of(other.site) != line_of(thread.site)) return other.site;
  }
  return 0;
}

bool report_absent_lane(Worker& worker) {
  const Thread* absent = nullptr;
  const Thread* waiting = lane_waiting_for_absent_one(worker, &absent);
  if (waiting == nullptr) return false;
  if (worker.sightings.is_new(FindingKind::absent_lane, waiting->site)) {
    worker.sightings.describe(
        FindingKind::absent_lane, waiting->site, 0,
        worker.in_block() + worker.thread_name(waiting->id) + " waits at " + waiting->waits_for +
            " at {here} for lane " + std::to_string(absent->lane()) + " (" + worker.thread_name(absent->id) +
            "), which the mask names but which has left the kernel; every lane of the mask has to "
            "arrive. " +
            who_waits_where(worker),
        true);
  }
  return true;
}

/// Two lanes of which one names the other, at different warp functions or with different masks.
bool report_disagreement(Worker& worker) {
  for (const Thread& thread : worker.threads) {
    if (thread.state != ThreadState::at_warp_operation) continue;
    for (const Thread& other : worker.threads) {
      if (other.state != ThreadState::at_warp_operation || other.warp() != thread.warp()) continue;
      if ((thread.mask >> other.lane() & 1) == 0) continue;
      if (other.operation == thread.operation && other.mask == thread.mask) continue;
      if (worker.sightings.is_new(FindingKind::divergent_warp, thread.site, other.site)) {
        worker.sightings.describe(FindingKind::divergent_warp, thread.site, other.site,
                                  worker.in_block() + worker.thread_name(thread.id) + " waits at " + thread.waits_for +
                                      " with mask " + mask_text(thread.mask) + " at {here} while " +
                                      worker.thread_name(other.id) + " waits at " + other.waits_for + " with mask " +
                                      mask_text(other.mask) +
                                      " at {there}; all lanes that a mask names must call the same function with it",
                                  true);
      }
      return true;
    }
  }
  return false;
}

void report_circle(Worker& worker) {
  const Thread& blocked = *any_waiting(worker);
  const Site elsewhere = another_place(worker, blocked);
  if (!worker.sightings.is_new(FindingKind::deadlock, blocked.site, elsewhere)) return;
  worker.sightings.describe(FindingKind::deadlock, blocked.site, elsewhere,
                            worker.in_block() + "nobody can go on: " + who_waits_where(worker) +
                                "; they wait for each other at different places",
                            true);
}

}  // namespace

void report_deadlock(Worker& worker) {
  const HooksOff hooks_off;
  if (!report_absent_lane(worker) && !report_disagreement(worker)) report_circle(worker);
  worker.abandon();
}

uint3 Worker::block_index(std::uint64_t number) const {
  const dim3 grid = launch->grid;
  return {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
          static_cast<unsigned>(number / grid.x / grid.y)};
}

namespace {
std::string index_text(const uint3& index, const dim3& shape) {
  if (shape.y == 1 && shape.z == 1) return std::to_string(index.x);
  std::string text = "(" + std::to_string(index.x) + ", " + std::to_string(index.y);
  if (shape.z != 1) text += ", " + std::to_string(index.z);
  return text + ")";
}
}  // namespace

std::string Worker::thread_name(int id) const {
  return "thread " + index_text(threads[static_cast<std::size_t>(id)].index, launch->block);
}

std::string Worker::thread_and_block(int id, std::uint64_t of_block) const {
  if (launch->blocks() == 1) return thread_name(id);
  return thread_name(id) + " of block " + index_text(block_index(of_block), launch->grid);
}

std::string Worker::in_block() const {
  if (launch->blocks() == 1) return "";
  return "in block " + index_text(block_index(block), launch->grid) + " ";
}

}  // namespace flashkata::virtual_gpu
