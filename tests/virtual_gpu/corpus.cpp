#include "tests/virtual_gpu/corpus.hpp"

namespace flashkata::corpus {
namespace {

template <typename Cases>
void append(Cases& all, const Cases& more) {
  all.insert(all.end(), more.begin(), more.end());
}

}  // namespace

FaultyCases all_faulty_cases() {
  FaultyCases all;
  for (const auto& cases : {shared_race_cases, global_race_cases, bounds_cases, initialisation_cases, async_copy_cases,
                            synchronisation_cases, tensor_core_cases, flash_forward_faults, flash_backward_faults,
                            flash_tensor_core_faults}) {
    append(all, cases());
  }
  return all;
}

CleanCases all_clean_cases() {
  CleanCases all;
  for (const auto& cases : {synchronisation_clean_cases, memory_clean_cases, flash_clean_cases,
                            flash_backward_clean_cases, flash_tensor_core_clean_cases}) {
    append(all, cases());
  }
  return all;
}

}  // namespace flashkata::corpus
