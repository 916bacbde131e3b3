#include "common/testing/kernel.hpp"

#include <algorithm>
#include <fstream>
#include <iostream>
#include <sstream>
#include <utility>

#include "common/testing/compare.hpp"
#include "common/testing/options.hpp"
#include "common/testing/report.hpp"
#include "common/virtual_gpu/findings.hpp"
#include "common/virtual_gpu/json.hpp"
#include "common/virtual_gpu/options.hpp"

namespace flashkata::testing {
namespace {

std::string at(const LineProfile& line) {
  return line.file.substr(line.file.rfind('/') + 1) + ':' + std::to_string(line.line);
}

// What whoever reads a finding of this kind should ask next.
std::string_view question(FindingKind kind) {
  switch (kind) {
    case FindingKind::shared_race:
      return "Who writes this element, who reads it, and what makes the one wait for the other?";
    case FindingKind::global_race:
      return "Which two threads meet at this address, and how would either know that the other is done?";
    case FindingKind::out_of_bounds:
      return "What is the largest index that this line can reach, and in which thread of which block?";
    case FindingKind::uninitialised_read:
      return "Which thread should have written this element before, and did it?";
    case FindingKind::async_copy_not_waited:
      return "The copy was started. Who makes sure that it has arrived, and for which threads?";
    case FindingKind::divergent_barrier:
      return "Can two threads of this block take different ways to their next barrier?";
    case FindingKind::barrier_after_exit:
      return "Do all threads of the block reach this barrier, also those that have nothing to do?";
    case FindingKind::deadlock:
      return "Who waits for whom, and what would have to happen first?";
    case FindingKind::absent_lane:
      return "Which lanes does the mask name, and which of them still run at this line?";
    case FindingKind::divergent_warp:
      return "Do all lanes of the warp stand at the same call, in the same round of the loop?";
    case FindingKind::misaligned_access:
      return "By what must the address of such an access be divisible? Is it, in every row?";
    case FindingKind::dynamic_shared_too_small:
      return "How many bytes does the launch ask for, and how many does the kernel use?";
    case FindingKind::stack_overflow:
      return "How many bytes do the local arrays of one thread take?";
    case FindingKind::use_after_free:
      return "Who owns this buffer, and when is it given back?";
    case FindingKind::wrong_memory:
      return "In which memory does this address lie, and in which must it?";
    case FindingKind::crash:
      return "What on this line can go wrong for some thread: a division by 0, an address that is none?";
  }
  return "";
}

std::string times(double ratio) {
  std::ostringstream text;
  text.precision(2);
  text << std::fixed << ratio;
  return text.str();
}

// --findings and --profile hand over the whole run instead of judging each test case.
bool show_findings = false;
bool show_profile = false;
std::string profile_file;  // --profile=FILE: as JSON

bool take_option(std::string_view argument) {
  constexpr std::string_view PROFILE = "--profile";
  if (argument == "--findings") {
    show_findings = true;
  } else if (argument.substr(0, PROFILE.size()) == PROFILE) {
    show_profile = true;
    if (argument.size() > PROFILE.size()) profile_file = argument.substr(PROFILE.size() + 1);
  } else {
    return false;
  }
  return true;
}

int show_at_end() {
  if (show_profile) {
    const std::vector<KernelProfile> profiles = take_profiles();
    if (profile_file.empty()) {
      print_profiles(std::cout, profiles);
    } else {
      std::ofstream file(profile_file);
      file << nlohmann::json(profiles).dump(2) << '\n';
      if (!file.flush()) std::cerr << "cannot write the profile to " << profile_file << '\n';
    }
  }
  if (!show_findings) return 0;
  const std::vector<Finding> findings = take_findings();
  print_findings(std::cout, findings);
  if (findings.empty()) std::cout << "no findings: no race, no stray access, no unfinished copy, no barrier missed\n";
  return findings.empty() ? 0 : 1;
}

std::string remark() { return kernels_are_checked() ? ", every memory access of the kernels watched" : ""; }

const ExtendMain extend_main({gpu_missing_reason, take_option, show_at_end, remark});

int line_counters = 0;  // how many CountLines live

// A finding for each line of `space` that needs `limit` times the transactions of the best layout, or more.
void expect_transactions_below(const std::vector<KernelProfile>& profiles, MemorySpace space, double limit,
                               std::string_view name, const std::string& unit) {
  if (line_counters == 0) throw std::logic_error("what lines do to memory is judged, but no CountLines counted it");
#ifdef __clang__
  limit = std::max(limit, 4.5);  // clang splits a float4 into up to four accesses, each as wide as the whole
#endif
  for (const KernelProfile& profile : profiles) {
    for (const LineProfile& line : profile.lines) {
      if (line.space != space || line.least_transactions == 0) continue;
      const double ratio = line.per_request() / line.least_per_request();
      if (ratio < limit) continue;
      finding(name, at(line) + ": each request takes " + times(line.per_request()) + ' ' + unit + " where " +
                        times(line.least_per_request()) + " would do; allowed is less than " + times(limit) +
                        " times that");
    }
  }
}

std::int64_t sum(const std::vector<KernelProfile>& profiles, std::string_view buffer,
                 const std::function<std::int64_t(const TensorTraffic&)>& of) {
  std::int64_t total = 0;
  for (const KernelProfile& profile : profiles) {
    if (const TensorTraffic* traffic = profile.tensor(std::string(buffer))) total += of(*traffic);
  }
  return total;
}

bool case_is_wanted() { return only_case() == 0 || running_case() != 0; }

void watch([[maybe_unused]] bool on) {
#if !KATA_REAL_GPU
  virtual_gpu::options().check = on;
  virtual_gpu::options().profile = on && kernels_are_checked() && (show_profile || line_counters > 0);
#endif
}

}  // namespace

bool kernels_are_checked() {
#if KATA_REAL_GPU
  return false;
#else
  return virtual_gpu::has_checked_kernels();
#endif
}

bool kernels_are_judged() { return kernels_are_checked() && !show_findings && !show_profile && case_is_wanted(); }

std::vector<KernelProfile> run_kernels(const std::function<void()>& launcher) {
  watch(case_is_wanted());
  if (!show_profile) take_profiles();
  launcher();
  synchronize();
  if (show_findings || show_profile) return {};
  for (const Finding& found : take_findings()) {
    finding(to_text(found.kind), found.sentence, question(found.kind));
  }
  return take_profiles();
}

bool needs_a_check() {
#if KATA_REAL_GPU
  skip("counts bytes, which only the virtual GPU does: ./kata test in a build without CUDA, or ncu");
  return true;
#else
  return false;
#endif
}

CountLines::CountLines() { ++line_counters; }
CountLines::~CountLines() { --line_counters; }

#if KATA_REAL_GPU
AnotherOrder::AnotherOrder(std::uint64_t) {}
AnotherOrder::~AnotherOrder() = default;
#else
AnotherOrder::AnotherOrder(std::uint64_t seed) : before_(std::exchange(virtual_gpu::options().schedule_seed, seed)) {}
AnotherOrder::~AnotherOrder() { virtual_gpu::options().schedule_seed = before_; }
#endif

void run_unwatched(const std::function<void()>& launcher) {
  watch(false);
  const auto forget = [] {
    if (show_findings || show_profile) return;  // they are for the end
    take_findings();
    take_profiles();
  };
  try {
    launcher();
    synchronize();
  } catch (...) {
    forget();
    throw;
  }
  forget();
}

std::int64_t bytes_loaded(const std::vector<KernelProfile>& profiles, std::string_view buffer) {
  return sum(profiles, buffer, [](const TensorTraffic& traffic) { return traffic.loaded; });
}

bool expect_blind_tiles_not_loaded(std::int64_t causal, std::int64_t all, const std::string& of, int tenths) {
  return expect(causal * 10 <= all * tenths, "traffic",
                "tiles loaded that see nothing of each other: causal, " + std::to_string(causal) + " bytes of " + of +
                    ", without a mask " + std::to_string(all) + "; want at most " + std::to_string(tenths) + "/10" +
                    (causal == all ? ". Is there such a tile, or has your block more rows than there are?" : ""));
}

std::int64_t bytes_stored(const std::vector<KernelProfile>& profiles, std::string_view buffer) {
  return sum(profiles, buffer, [](const TensorTraffic& traffic) { return traffic.stored + traffic.atomic; });
}

void expect_bank_conflicts_below(const std::vector<KernelProfile>& profiles, double limit) {
  expect_transactions_below(profiles, MemorySpace::shared, limit, "banks", "wavefronts");
}

void expect_sectors_below(const std::vector<KernelProfile>& profiles, double limit) {
  expect_transactions_below(profiles, MemorySpace::global, limit, "coalescing", "sectors");
}

void expect_copies_overlapped(const std::vector<KernelProfile>& profiles, double share) {
  std::int64_t groups = 0;
  std::int64_t overlapped = 0;
  for (const KernelProfile& profile : profiles) {
    groups += profile.events.copy_groups;
    overlapped += profile.events.overlapped_groups;
  }
  if (profiles.empty() || static_cast<double>(overlapped) >= share * static_cast<double>(groups)) return;
  finding("overlap", std::to_string(overlapped) + " of " + std::to_string(groups) +
                         " cp.async groups were in flight while their thread did something else");
}

}  // namespace flashkata::testing
