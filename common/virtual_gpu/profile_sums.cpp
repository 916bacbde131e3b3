#include "common/virtual_gpu/profile_sums.hpp"

#include <algorithm>
#include <mutex>
#include <utility>

#include "common/gpu/memory_use.hpp"
#include "common/virtual_gpu/global_shadow.hpp"
#include "common/virtual_gpu/profile.hpp"

namespace flashkata {

namespace {
std::mutex profiles_mutex;
std::vector<KernelProfile> profiles;
}  // namespace

std::vector<KernelProfile> take_profiles() {
  const std::lock_guard lock(profiles_mutex);
  return std::exchange(profiles, {});
}

namespace virtual_gpu {
namespace {

KernelProfile& profile_of(const std::string& kernel) {
  for (KernelProfile& profile : profiles) {
    if (profile.kernel == kernel) return profile;
  }
  profiles.emplace_back().kernel = kernel;
  return profiles.back();
}

/// How many bytes of the buffer this launch read, and how many it wrote, each byte counted once.
void count_distinct(const Buffer& buffer, std::uint32_t launch, TensorTraffic& traffic) {
  const auto of_launch = [launch](const std::atomic<std::uint64_t>& stamp) {
    return stamp.load(std::memory_order_relaxed) >> 56 == launch;
  };
  const auto bytes = static_cast<std::int64_t>(buffer.granule_bytes);
  for (std::size_t granule = 0; granule < buffer.granules(); ++granule) {
    const GlobalCell& cell = buffer.cells[granule];
    if (of_launch(cell.reader[0])) traffic.least_loaded += bytes;
    if (of_launch(cell.writer)) traffic.least_stored += bytes;
  }
}

void add_traffic(KernelProfile& profile, const std::vector<const Worker*>& workers, const Launch& launch) {
  for (std::size_t number = 0; number < buffer_number_limit(); ++number) {
    const Buffer* buffer = live_buffer(number);
    BufferTraffic sum;
    for (const Worker* worker : workers) {
      sum.loaded += worker->traffic[number].loaded;
      sum.stored += worker->traffic[number].stored;
      sum.atomic += worker->traffic[number].atomic;
    }
    if (buffer == nullptr || sum.loaded + sum.stored + sum.atomic == 0) continue;
    auto tensor = std::find_if(profile.tensors.begin(), profile.tensors.end(),
                               [&](const TensorTraffic& known) { return known.name == buffer->name; });
    if (tensor == profile.tensors.end()) {
      tensor = profile.tensors.insert(profile.tensors.end(), TensorTraffic{});
      tensor->name = buffer->name;
    }
    tensor->bytes = static_cast<std::int64_t>(buffer->bytes());
    tensor->loaded += sum.loaded;
    tensor->stored += sum.stored;
    tensor->atomic += sum.atomic;
    count_distinct(*buffer, launch.number, *tensor);
  }
}

void add_lines(KernelProfile& profile, const std::vector<const Worker*>& workers) {
  std::vector<Site> sites;
  for (const Worker* worker : workers) {
    for (const auto& [key, counts] : worker->lines.all()) sites.push_back(LineTotals::site(key));
  }
  prefetch_lines(sites);
  for (const Worker* worker : workers) {
    for (const auto& [key, line_counts] : worker->lines.all()) {
      const LineCounts& counts = line_counts;
      const SourceLine place = line_of(LineTotals::site(key));
      auto line = std::find_if(profile.lines.begin(), profile.lines.end(), [&](const LineProfile& known) {
        return known.line == place.line && known.file == place.file && known.space == counts.space &&
               known.access == counts.access;
      });
      if (line == profile.lines.end()) {
        line = profile.lines.insert(profile.lines.end(), LineProfile{});
        line->file = place.file;
        line->line = place.line;
        line->space = counts.space;
        line->access = counts.access;
      }
      line->requests += counts.requests;
      line->lanes += counts.lanes;
      line->transactions += counts.transactions;
      line->least_transactions += counts.least_transactions;
    }
  }
  std::sort(profile.lines.begin(), profile.lines.end(), [](const LineProfile& a, const LineProfile& b) {
    return std::tie(a.file, a.line, a.space, a.access) < std::tie(b.file, b.line, b.space, b.access);
  });
}

}  // namespace

void add_to_profiles(const std::vector<const Worker*>& workers, const Launch& launch) {
  const std::lock_guard lock(profiles_mutex);
  KernelProfile& profile = profile_of(function_name(launch.kernel));
  profile.launches += 1;
  profile.blocks += static_cast<std::int64_t>(launch.blocks());
  profile.threads += static_cast<std::int64_t>(launch.blocks()) * launch.threads();
  profile.dynamic_shared_bytes = static_cast<std::int64_t>(launch.dynamic_shared_bytes);
  profile.peak_device_bytes = std::max(profile.peak_device_bytes, static_cast<std::int64_t>(device_bytes()));
  for (const Worker* worker : workers) profile.events += worker->events;
  add_traffic(profile, workers, launch);
  if (launch.profile) add_lines(profile, workers);
}

}  // namespace virtual_gpu
}  // namespace flashkata
