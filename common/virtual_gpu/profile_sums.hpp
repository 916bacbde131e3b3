// From the counts of the workers of one launch to the profile of its kernel.
#pragma once

#include <vector>

#include "common/virtual_gpu/worker.hpp"

namespace flashkata::virtual_gpu {

void add_to_profiles(const std::vector<const Worker*>& workers, const Launch& launch);

}  // namespace flashkata::virtual_gpu
