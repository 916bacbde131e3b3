// Runs kernels of the corpus by name, on whichever GPU this program was built for:
//
//   virtual_gpu_run list            names of all kernels
//   virtual_gpu_run clean           all clean kernels; exit code 1 if one is wrong or has a finding
//   virtual_gpu_run NAME...         these kernels; findings are printed at the end, with exit code 1
//   virtual_gpu_run counts NAME...  of each kernel that these launch, the counts that ncu measures on a GPU: sectors of
//                                   global loads and stores, wavefronts of shared loads and stores (checked build only)
//
//   compute-sanitizer --tool racecheck virtual_gpu_run read_before_barrier
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>

#include "common/gpu/launch.hpp"
#include "common/virtual_gpu/options.hpp"
#include "common/virtual_gpu/profile.hpp"
#include "tests/virtual_gpu/corpus.hpp"

namespace {

using namespace flashkata;

int list() {
  for (const auto& faulty : corpus::all_faulty_cases())
    std::printf("%-34s %s\n", faulty.name, to_text(faulty.kind).data());
  for (const auto& clean : corpus::all_clean_cases()) std::printf("%-34s clean\n", clean.name);
  return 0;
}

/// Prints a line for the clean kernel and returns whether it is right.
bool run(const corpus::CleanCase& clean) {
  const bool right = clean.run();
  const std::vector<Finding> findings = take_findings();
  print_findings(std::cout, findings);
  std::printf("%-40s %s\n", clean.name, !right ? "WRONG" : findings.empty() ? "right" : "FINDINGS");
  return right && findings.empty();
}

int run_all_clean() {
  int failures = 0;
  for (const corpus::CleanCase& clean : corpus::all_clean_cases()) failures += run(clean) ? 0 : 1;
  return failures == 0 ? 0 : 1;
}

int run_by_name(const char* name) {
  int known = 0;
  int failures = 0;
  for (const corpus::FaultyCase& faulty : corpus::all_faulty_cases()) {
    if (std::strcmp(faulty.name, name) != 0) continue;
    ++known;
    faulty.run();
    const std::vector<Finding> findings = take_findings();
    print_findings(std::cout, findings);
    std::printf("%-40s %zu findings\n", name, findings.size());
    failures += findings.empty() ? 0 : 1;
  }
  for (const corpus::CleanCase& clean : corpus::all_clean_cases()) {
    if (std::strcmp(clean.name, name) != 0) continue;
    ++known;
    failures += run(clean) ? 0 : 1;
  }
  if (known == 0) std::fprintf(stderr, "no kernel is called %s; try: list\n", name);
  return known > 0 && failures == 0 ? 0 : 1;
}

#if !KATA_REAL_GPU
void print_counts(const char* name) {
  virtual_gpu::options().profile = true;
  run_by_name(name);
  for (const KernelProfile& profile : take_profiles()) {
    const auto total = [&](MemorySpace space, MemoryAccess access) {
      long long sum = 0;
      for (const LineProfile& line : profile.lines) {
        if (line.space == space && line.access == access) sum += line.transactions;
      }
      return sum;
    };
    std::printf("counts %s %s %lld %lld %lld %lld\n", name, profile.kernel.c_str(),
                total(MemorySpace::global, MemoryAccess::load), total(MemorySpace::global, MemoryAccess::store),
                total(MemorySpace::shared, MemoryAccess::load), total(MemorySpace::shared, MemoryAccess::store));
  }
}
#endif

}  // namespace

int main(int count, char** arguments) try {
  if (count < 2 || std::strcmp(arguments[1], "list") == 0) return list();
  if (!gpu_available()) {
    std::printf("skipped: %s\n", gpu_missing_reason().c_str());
    return 0;
  }
  if (std::strcmp(arguments[1], "clean") == 0) return run_all_clean();
#if !KATA_REAL_GPU
  if (std::strcmp(arguments[1], "counts") == 0) {
    for (int i = 2; i < count; ++i) print_counts(arguments[i]);
    return 0;
  }
#endif
  int result = 0;
  for (int i = 1; i < count; ++i) result |= run_by_name(arguments[i]);
  return result;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
