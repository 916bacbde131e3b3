// The corpus: small kernels with one fault each, and correct kernels with unusual synchronisation.
//
// A faulty kernel marks the lines that its findings must name with a comment "<- case_name". All findings of the
// expected kind must lie on marked lines, and each marked line must be named. A clean kernel computes something that
// the host can check, and no finding may come from it.
#pragma once

#include <cstddef>
#include <numeric>
#include <string>
#include <vector>

#include "common/virtual_gpu/findings.hpp"

namespace flashkata::corpus {

struct FaultyCase {
  const char* name;
  FindingKind kind;
  const char* file;
  void (*run)();
};

struct CleanCase {
  const char* name;
  const char* file;
  bool (*run)();  // is the result right?
};

using FaultyCases = std::vector<FaultyCase>;
using CleanCases = std::vector<CleanCase>;

FaultyCases shared_race_cases();
FaultyCases global_race_cases();
FaultyCases bounds_cases();
FaultyCases initialisation_cases();
FaultyCases async_copy_cases();
FaultyCases synchronisation_cases();
FaultyCases tensor_core_cases();
FaultyCases flash_forward_faults();
FaultyCases flash_backward_faults();
FaultyCases flash_tensor_core_faults();

CleanCases synchronisation_clean_cases();
CleanCases memory_clean_cases();
CleanCases flash_clean_cases();
CleanCases flash_backward_clean_cases();
CleanCases flash_tensor_core_clean_cases();

FaultyCases all_faulty_cases();
CleanCases all_clean_cases();

/// 0, 1, 2, ...
inline std::vector<float> ramp(std::size_t count) {
  std::vector<float> values(count);
  std::iota(values.begin(), values.end(), 0.0f);
  return values;
}

}  // namespace flashkata::corpus
