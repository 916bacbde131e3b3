// Profiles as text.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <fstream>
#include <map>
#include <ostream>

#include "common/virtual_gpu/findings.hpp"
#include "common/virtual_gpu/profile.hpp"

namespace flashkata {
namespace {

/// printf into a string: tables want columns.
__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...) {
  std::array<char, 512> buffer{};
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer.data(), buffer.size(), format, arguments);
  va_end(arguments);
  return buffer.data();
}

std::string bytes_text(std::int64_t bytes) {
  const auto value = static_cast<double>(bytes);
  if (bytes < 10 * 1024) return text("%lld B", static_cast<long long>(bytes));
  if (bytes < 10 * 1024 * 1024) return text("%.1f KiB", value / 1024);
  return text("%.1f MiB", value / 1024 / 1024);
}

std::string times_least(std::int64_t moved, std::int64_t least) {
  return least == 0 ? "" : text("%.1fx", static_cast<double>(moved) / static_cast<double>(least));
}

void print_tensors(std::ostream& out, const KernelProfile& profile) {
  out << text("  %-12s %11s %11s %7s %11s %7s %11s\n", "tensor", "size", "loaded", "/least", "stored", "/least",
              "atomic");
  for (const TensorTraffic& tensor : profile.tensors) {
    const std::int64_t stored = tensor.stored + tensor.atomic;
    out << text("  %-12s %11s %11s %7s %11s %7s %11s\n", tensor.name.c_str(), bytes_text(tensor.bytes).c_str(),
                bytes_text(tensor.loaded).c_str(), times_least(tensor.loaded, tensor.least_loaded).c_str(),
                bytes_text(tensor.stored).c_str(), times_least(stored, tensor.least_stored).c_str(),
                bytes_text(tensor.atomic).c_str());
  }
}

void print_events(std::ostream& out, const KernelProfile& profile) {
  const EventCounts& events = profile.events;
  const auto per_block = [&](std::int64_t count) {
    return static_cast<double>(count) / static_cast<double>(std::max<std::int64_t>(1, profile.blocks));
  };
  out << text(
      "  in each block: %.1f __syncthreads, %.1f __syncwarp, %.1f shuffles and votes, %.1f mma, %.1f ldmatrix\n",
      per_block(events.barriers), per_block(events.warp_barriers), per_block(events.shuffles),
      per_block(events.matrix_products), per_block(events.matrix_loads));
  if (events.copy_groups > 0) {
    out << text("  cp.async: of %lld groups %lld (%.0f %%) had other work between commit and wait\n",
                static_cast<long long>(events.copy_groups), static_cast<long long>(events.overlapped_groups),
                100.0 * static_cast<double>(events.overlapped_groups) / static_cast<double>(events.copy_groups));
  }
}

const char* name_of(MemoryAccess access) {
  switch (access) {
    case MemoryAccess::load:
      return "load";
    case MemoryAccess::store:
      return "store";
    case MemoryAccess::atomic:
      return "atomic";
  }
  return "";
}

void print_lines(std::ostream& out, const std::vector<LineProfile>& lines) {
  out << text("  %-28s %-14s %10s %7s %12s %7s\n", "line", "access", "requests", "lanes", "per request", "least");
  for (const LineProfile& line : lines) {
    const bool shared = line.space == MemorySpace::shared;
    const std::string place = line.file.substr(line.file.rfind('/') + 1) + ":" + std::to_string(line.line);
    const std::string kind = std::string(shared ? "shared " : "global ") + name_of(line.access);
    out << text("  %-28s %-14s %10lld %7.1f %6.2f %s %7.2f%s\n", place.c_str(), kind.c_str(),
                static_cast<long long>(line.requests),
                static_cast<double>(line.lanes) / static_cast<double>(std::max<std::int64_t>(1, line.requests)),
                line.per_request(), shared ? "wave" : "sect", line.least_per_request(),
                line.transactions > line.least_transactions * 3 / 2 ? "   <-" : "");
  }
}

/// What the margin says about one source line: the worst of its accesses.
std::string margin(const std::vector<const LineProfile*>& accesses) {
  std::string result;
  for (const LineProfile* access : accesses) {
    const bool shared = access->space == MemorySpace::shared;
    result += text("%s%s %s %.1f/%.1f", result.empty() ? "" : ", ", shared ? "shared" : "global",
                   name_of(access->access), access->per_request(), access->least_per_request());
  }
  return result;
}

void print_source(std::ostream& out, const std::vector<LineProfile>& lines) {
  std::map<std::string, std::map<int, std::vector<const LineProfile*>>> by_file;
  for (const LineProfile& line : lines) {
    if (line.line > 0) by_file[line.file][line.line].push_back(&line);
  }
  for (const auto& [name, by_line] : by_file) {
    std::ifstream file(name);
    if (!file) continue;
    out << "\n  " << from_here(name) << ": wavefronts (shared) or sectors (global) per request / least possible\n";
    const int first = by_line.begin()->first - 2;
    const int last = by_line.rbegin()->first + 1;
    std::string source;
    for (int number = 1; std::getline(file, source) && number <= last; ++number) {
      if (number < first) continue;
      const auto counted = by_line.find(number);
      const std::string counts = counted == by_line.end() ? "" : margin(counted->second);
      out << text("  %5d | %-44s | ", number, counts.c_str()) << source << '\n';
    }
  }
}

}  // namespace

void print_profiles(std::ostream& out, const std::vector<KernelProfile>& profiles) {
  out << "A model of a GPU's memory, not a measurement: counts by the virtual GPU, with 32-byte sectors, 32 banks of 4 "
         "bytes, no caches.\n";
  for (const KernelProfile& profile : profiles) {
    out << '\n'
        << profile.kernel
        << text(
               ": %lld launch%s, %lld blocks, %lld threads, %s dynamic shared memory a block, peak %s of device "
               "memory\n",
               static_cast<long long>(profile.launches), profile.launches == 1 ? "" : "es",
               static_cast<long long>(profile.blocks), static_cast<long long>(profile.threads),
               bytes_text(profile.dynamic_shared_bytes).c_str(), bytes_text(profile.peak_device_bytes).c_str());
    print_events(out, profile);
    print_tensors(out, profile);
    if (profile.lines.empty()) continue;
    print_lines(out, profile.lines);
    print_source(out, profile.lines);
  }
}

}  // namespace flashkata
