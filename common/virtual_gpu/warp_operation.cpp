#include "common/virtual_gpu/warp_operation.hpp"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>

#include "common/virtual_gpu/device_calls.hpp"

namespace flashkata::virtual_gpu {

std::string mask_text(std::uint32_t mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

namespace {

void report_different_lines(Worker& worker, const Thread& last, const Thread& other) {
  const HooksOff hooks_off;
  if (!worker.sightings.is_new(FindingKind::divergent_warp, last.site, other.site)) return;
  worker.sightings.describe(FindingKind::divergent_warp, last.site, other.site,
                            worker.in_block() + worker.thread_name(last.id) + " calls " + last.waits_for +
                                " at {here} and meets " + worker.thread_name(other.id) +
                                " there, which comes from {there}; lanes that meet should come from the same line, or "
                                "the result depends on how the hardware happens to reunite them");
}

}  // namespace

void report_bad_mask(Worker& worker, const Thread& thread, BadMask what, std::uint32_t mask) {
  const HooksOff hooks_off;
  if (worker.sightings.is_new(FindingKind::absent_lane, thread.site)) {
    const std::size_t existing = worker.threads.size() - static_cast<std::size_t>(thread.warp()) * 32;
    const std::string why =
        what == BadMask::partial_warp
            ? "but its warp has only " + std::to_string(existing) + " threads; all 32 lanes have to take part"
            : "with the mask " + mask_text(mask) + ", which does not name lane " + std::to_string(thread.lane()) +
                  " itself";
    worker.sightings.describe(FindingKind::absent_lane, thread.site, 0,
                              worker.thread_and_block(thread.id) + " calls " + thread.waits_for + " at {here} " + why,
                              true);
  }
  worker.abandon();
}

void complete_if_agreed(Worker& worker, Warp& warp, const Thread& last) {
  Thread* lanes = &worker.threads[static_cast<std::size_t>(last.warp()) * 32];
  void* arguments[32];
  const Thread* from_elsewhere = nullptr;
  for (std::uint32_t rest = last.mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (lanes[lane].operation != last.operation || lanes[lane].mask != last.mask) return;
    if (lanes[lane].site != last.site) from_elsewhere = &lanes[lane];
    arguments[lane] = lanes[lane].argument;
  }
  if (from_elsewhere != nullptr && worker.launch->check) report_different_lines(worker, last, *from_elsewhere);

  last.operation(worker, arguments, last.mask);
  warp.waiting &= ~last.mask;
  if (worker.launch->profile && std::popcount(last.mask) == 32) {
    const HooksOff hooks_off;
    warp.log.flush(worker.lines);
  }
  for (std::uint32_t rest = last.mask; rest != 0; rest &= rest - 1) {
    make_ready(worker, lanes[std::countr_zero(rest)]);
  }
}

// ---- __syncwarp ------------------------------------------------------------------------------------------------

namespace {

/// Some lanes synchronise: each of them has now seen whatever one of them had seen before.
void join_lanes(Worker& worker, Warp& warp, std::uint32_t mask) {
  if (!warp.has_partial_syncs) {
    for (auto& row : warp.since) row.fill(warp.clock);
    warp.has_partial_syncs = true;
  }
  std::array<std::uint32_t, 32> seen{};
  for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const auto& row = warp.since[static_cast<std::size_t>(std::countr_zero(rest))];
    for (std::size_t lane = 0; lane < 32; ++lane) seen[lane] = std::max(seen[lane], row[lane]);
  }
  for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    seen[static_cast<std::size_t>(std::countr_zero(rest))] = worker.clock;
  }
  for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    warp.since[static_cast<std::size_t>(std::countr_zero(rest))] = seen;
  }
}

void synchronise_lanes(Worker& worker, void* const*, std::uint32_t mask) {
  const std::size_t first_thread = static_cast<std::size_t>(worker.current->warp()) * 32;
  const std::size_t existing = std::min<std::size_t>(32, worker.threads.size() - first_thread);
  Warp& warp = worker.warp_of(*worker.current);
  ++worker.clock;
  ++worker.events.warp_barriers;
  if (std::popcount(mask) == static_cast<int>(existing)) {
    warp.clock = worker.clock;
    warp.has_partial_syncs = false;
  } else {
    join_lanes(worker, warp, mask);
  }
  for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    worker.threads[first_thread + static_cast<std::size_t>(std::countr_zero(rest))].clock = worker.clock;
  }
}

}  // namespace

void sync_warp(std::uint32_t mask) {
  join_warp_operation(synchronise_lanes, "__syncwarp()", mask, nullptr, site_of(__builtin_return_address(0)));
}

// ---- shuffles and votes ----------------------------------------------------------------------------------------

namespace {

struct ShuffleArgument {
  std::uint64_t value;
  std::uint64_t result;
  int source;
};

constexpr std::uint64_t POISON = 0x7fc0dead7fc0deadull;  // NaN as float and as double: what an absent lane gives

void report_absent_source(Worker& worker, int lane, int source, std::uint32_t mask) {
  const HooksOff hooks_off;
  const Thread& thread = worker.threads[static_cast<std::size_t>(worker.current->warp() * 32 + lane)];
  if (!worker.sightings.is_new(FindingKind::absent_lane, thread.site)) return;
  worker.sightings.describe(FindingKind::absent_lane, thread.site, 0,
                            worker.thread_and_block(thread.id) + " (lane " + std::to_string(lane) +
                                ") takes the value of lane " + std::to_string(source) + " with " + thread.waits_for +
                                " at {here}, but that lane does not take part (mask " + mask_text(mask) +
                                "); what it gets is undefined");
}

void exchange_values(Worker& worker, void* const* arguments, std::uint32_t mask) {
  ++worker.events.shuffles;
  for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    auto& mine = *static_cast<ShuffleArgument*>(arguments[lane]);
    if (mask >> mine.source & 1) {
      mine.result = static_cast<ShuffleArgument*>(arguments[mine.source])->value;
    } else {
      mine.result = POISON;
      report_absent_source(worker, lane, mine.source, mask);
    }
  }
}

void count_votes(Worker& worker, void* const* arguments, std::uint32_t mask) {
  ++worker.events.shuffles;
  std::uint32_t votes = 0;
  for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    if (*static_cast<std::uint32_t*>(arguments[lane]) != 0) votes |= 1u << lane;
  }
  for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    *static_cast<std::uint32_t*>(arguments[std::countr_zero(rest)]) = votes;
  }
}

/// Each group of `width` lanes is a warp of its own; a source outside it means the lane's own value, except for the
/// index form, which wraps around.
int source_lane(Shuffle kind, int lane, int argument, int width) {
  const int first = lane & ~(width - 1);
  int source = lane;
  switch (kind) {
    case Shuffle::index:
      return first | (argument & (width - 1));
    case Shuffle::exclusive_or:
      source = lane ^ argument;
      return source < first + width ? source & 31 : lane;
    case Shuffle::down:
      source = lane + argument;
      break;
    case Shuffle::up:
      source = lane - argument;
      break;
  }
  return source >= first && source < first + width ? source : lane;
}

const char* shuffle_name(Shuffle kind) {
  switch (kind) {
    case Shuffle::index:
      return "__shfl_sync()";
    case Shuffle::exclusive_or:
      return "__shfl_xor_sync()";
    case Shuffle::down:
      return "__shfl_down_sync()";
    case Shuffle::up:
      return "__shfl_up_sync()";
  }
  return "";
}

void match_values(Worker& worker, void* const* arguments, std::uint32_t mask) {
  ++worker.events.shuffles;
  std::uint64_t values[32];
  for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    values[lane] = *static_cast<std::uint64_t*>(arguments[lane]);
  }
  for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    std::uint64_t equal = 0;
    for (std::uint32_t others = mask; others != 0; others &= others - 1) {
      const int other = std::countr_zero(others);
      if (values[other] == values[lane]) equal |= std::uint64_t{1} << other;
    }
    *static_cast<std::uint64_t*>(arguments[lane]) = equal;
  }
}

template <typename T, Reduction KIND>
T combine(T a, T b) {
  if constexpr (KIND == Reduction::min) return std::min(a, b);
  if constexpr (KIND == Reduction::max) return std::max(a, b);
  const auto x = static_cast<std::uint32_t>(a);  // a sum may wrap around
  const auto y = static_cast<std::uint32_t>(b);
  if constexpr (KIND == Reduction::add) return static_cast<T>(x + y);
  if constexpr (KIND == Reduction::bit_and) return static_cast<T>(x & y);
  if constexpr (KIND == Reduction::bit_or) return static_cast<T>(x | y);
  return static_cast<T>(x ^ y);
}

template <typename T, Reduction KIND>
void reduce_values(Worker& worker, void* const* arguments, std::uint32_t mask) {
  ++worker.events.shuffles;
  T result = *static_cast<T*>(arguments[std::countr_zero(mask)]);
  for (std::uint32_t rest = mask & (mask - 1); rest != 0; rest &= rest - 1) {
    result = combine<T, KIND>(result, *static_cast<T*>(arguments[std::countr_zero(rest)]));
  }
  for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    *static_cast<T*>(arguments[std::countr_zero(rest)]) = result;
  }
}

struct NamedReduction {
  const char* name;
  WarpOperation operation;
};

/// Each kind is an operation of its own: lanes that call different ones do not meet.
template <typename T>
NamedReduction reduction(Reduction kind) {
  switch (kind) {
    case Reduction::add:
      return {"__reduce_add_sync()", reduce_values<T, Reduction::add>};
    case Reduction::min:
      return {"__reduce_min_sync()", reduce_values<T, Reduction::min>};
    case Reduction::max:
      return {"__reduce_max_sync()", reduce_values<T, Reduction::max>};
    case Reduction::bit_and:
      return {"__reduce_and_sync()", reduce_values<T, Reduction::bit_and>};
    case Reduction::bit_or:
      return {"__reduce_or_sync()", reduce_values<T, Reduction::bit_or>};
    case Reduction::bit_xor:
      return {"__reduce_xor_sync()", reduce_values<T, Reduction::bit_xor>};
  }
  return {};
}

template <typename T>
__attribute__((always_inline)) inline T join_reduction(Reduction kind, std::uint32_t mask, T value, Site site) {
  const NamedReduction named = reduction<T>(kind);
  join_warp_operation(named.operation, named.name, mask, &value, site);
  return value;
}

}  // namespace

std::uint64_t shuffle(Shuffle kind, std::uint32_t mask, std::uint64_t value, int argument, int width) {
  ShuffleArgument mine{value, 0, source_lane(kind, current_thread().lane(), argument, width)};
  join_warp_operation(exchange_values, shuffle_name(kind), mask, &mine, site_of(__builtin_return_address(0)));
  return mine.result;
}

std::uint32_t ballot(std::uint32_t mask, bool predicate) {
  std::uint32_t votes = predicate ? 1 : 0;
  join_warp_operation(count_votes, "a vote", mask, &votes, site_of(__builtin_return_address(0)));
  return votes;
}

std::uint32_t match_any(std::uint32_t mask, std::uint64_t value) {
  join_warp_operation(match_values, "__match_any_sync()", mask, &value, site_of(__builtin_return_address(0)));
  return static_cast<std::uint32_t>(value);
}

int reduce(Reduction kind, std::uint32_t mask, int value) {
  return join_reduction(kind, mask, value, site_of(__builtin_return_address(0)));
}
unsigned reduce(Reduction kind, std::uint32_t mask, unsigned value) {
  return join_reduction(kind, mask, value, site_of(__builtin_return_address(0)));
}

}  // namespace flashkata::virtual_gpu
