#include "common/virtual_gpu/profile.hpp"

#include <algorithm>

namespace flashkata {
namespace {

double worst_ratio(const std::vector<LineProfile>& lines, MemorySpace space) {
  double worst = 1.0;
  for (const LineProfile& line : lines) {
    if (line.space != space || line.least_transactions == 0) continue;
    worst = std::max(worst, static_cast<double>(line.transactions) / static_cast<double>(line.least_transactions));
  }
  return worst;
}

}  // namespace

EventCounts& EventCounts::operator+=(const EventCounts& other) {
  barriers += other.barriers;
  warp_barriers += other.warp_barriers;
  shuffles += other.shuffles;
  matrix_products += other.matrix_products;
  matrix_loads += other.matrix_loads;
  copy_groups += other.copy_groups;
  overlapped_groups += other.overlapped_groups;
  return *this;
}

const TensorTraffic* KernelProfile::tensor(const std::string& name) const {
  const auto found =
      std::find_if(tensors.begin(), tensors.end(), [&](const auto& tensor) { return tensor.name == name; });
  return found == tensors.end() ? nullptr : &*found;
}

double KernelProfile::worst_bank_conflict() const { return worst_ratio(lines, MemorySpace::shared); }
double KernelProfile::worst_coalescing() const { return worst_ratio(lines, MemorySpace::global); }

}  // namespace flashkata
