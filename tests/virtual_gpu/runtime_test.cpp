// What only the virtual GPU has: schedules, guard pages, the profile, the life of findings.
#include <doctest/doctest.h>

#include <algorithm>
#include <iostream>
#include <numeric>
#include <sstream>

#include "common/virtual_gpu/findings.hpp"
#include "common/virtual_gpu/json.hpp"
#include "common/virtual_gpu/options.hpp"
#include "common/virtual_gpu/profile.hpp"
#include "tests/virtual_gpu/unit_kernels.hpp"

namespace {

using namespace flashkata;
using virtual_gpu::has_checked_kernels;
using virtual_gpu::options;

std::vector<float> ramp(std::size_t count) {
  std::vector<float> values(count);
  std::iota(values.begin(), values.end(), 0.0f);
  return values;
}

KernelProfile profile_of(void (*run)(const float*, float*), std::size_t count) {
  DeviceBuffer<float> in("in", ramp(count));
  DeviceBuffer<float> out("out", count);
  take_profiles();
  options().profile = true;
  run(in.data(), out.data());
  options().profile = false;
  const std::vector<KernelProfile> profiles = take_profiles();
  REQUIRE(profiles.size() == 1);
  std::ostringstream text;
  print_profiles(text, profiles);
  CHECK(text.str().rfind("A model", 0) == 0);
  CHECK(nlohmann::json(profiles).at(0).at("kernel") == profiles[0].kernel);
  return profiles[0];
}

const LineProfile& line_with(const KernelProfile& profile, MemorySpace space, MemoryAccess access) {
  const auto found = std::find_if(profile.lines.begin(), profile.lines.end(), [&](const LineProfile& line) {
    return line.space == space && line.access == access;
  });
  REQUIRE(found != profile.lines.end());
  return *found;
}

}  // namespace

TEST_SUITE("virtual_gpu.runtime") {
  TEST_CASE("threads run in order, or in a random order that its seed repeats") {
    std::vector<int> in_order(64);
    std::iota(in_order.begin(), in_order.end(), 0);
    CHECK(unit::arrival_order(64) == in_order);

    options().schedule_seed = 7;
    const std::vector<int> shuffled = unit::arrival_order(64);
    CHECK(shuffled != in_order);
    CHECK(unit::arrival_order(64) == shuffled);
    options().schedule_seed = 8;
    CHECK(unit::arrival_order(64) != shuffled);
    options().schedule_seed = 0;
  }

  TEST_CASE("an overrun, a stack overflow and a misaligned vector become findings, and the program goes on") {
    take_findings();
    DeviceBuffer<float> out("weights", 64);
    out.fill_zero();
    unit::write_element(out.data(), 64);
    std::vector<Finding> findings = take_findings();
    REQUIRE(findings.size() == 1);
    CHECK(findings[0].kind == FindingKind::out_of_bounds);
    CHECK(findings[0].sentence.find("weights[64]") != std::string::npos);
    CHECK(findings[0].line > 0);
    CHECK(findings[0].abandoned);
    MESSAGE(findings[0].sentence);

    unit::recurse(out.data(), 100000);
    findings = take_findings();
    REQUIRE(findings.size() == 1);
    CHECK(findings[0].kind == FindingKind::stack_overflow);
    MESSAGE(findings[0].sentence);

    DeviceBuffer<float> in("in", ramp(64));
    unit::misaligned_float4(in.data(), out.data());
    findings = take_findings();
#ifdef __clang__
    if (has_checked_kernels()) return;  // see is_known_to_be_missed in corpus_test.cpp
#endif
    REQUIRE(findings.size() == 1);
    CHECK(findings[0].kind == FindingKind::misaligned_access);
    MESSAGE(findings[0].sentence);
  }

  TEST_CASE("__trap() is a finding, and the program goes on") {
    take_findings();
    std::vector<float> values = ramp(32);
    unit::trap_if_negative(DeviceBuffer<float>("in", values).data());
    CHECK(take_findings().empty());
    values[7] = -1.0f;
    unit::trap_if_negative(DeviceBuffer<float>("in", values).data());
    const std::vector<Finding> findings = take_findings();
    REQUIRE(findings.size() == 1);
    CHECK(findings[0].kind == FindingKind::crash);
    CHECK(findings[0].sentence.find("thread 7 calls __trap()") != std::string::npos);
    CHECK(findings[0].line > 0);
    CHECK(findings[0].abandoned);
  }

  TEST_CASE("padding removes the bank conflicts of a transpose") {
    if (!has_checked_kernels()) return;
    const KernelProfile plain = profile_of([](auto in, auto out) { unit::transpose(in, out, false); }, 1024);
    const KernelProfile padded = profile_of([](auto in, auto out) { unit::transpose(in, out, true); }, 1024);
    CHECK(line_with(plain, MemorySpace::shared, MemoryAccess::load).per_request() == 32.0);
    CHECK(line_with(padded, MemorySpace::shared, MemoryAccess::load).per_request() == 1.0);
    CHECK(plain.worst_bank_conflict() == 32.0);
    CHECK(padded.worst_bank_conflict() == 1.0);
    CHECK(padded.events.barriers == 1);
    REQUIRE(padded.tensor("in") != nullptr);
    CHECK(padded.tensor("in")->loaded == 4096);
    CHECK(padded.tensor("in")->least_loaded == 4096);
    CHECK(padded.tensor("out")->stored == 4096);
    print_profiles(std::cout, {plain});
  }

  TEST_CASE("a stride costs sectors") {
    if (!has_checked_kernels()) return;
    const KernelProfile unit_stride = profile_of([](auto in, auto out) { unit::strided_load(in, out, 1); }, 256);
    const KernelProfile stride_8 = profile_of([](auto in, auto out) { unit::strided_load(in, out, 8); }, 256);
    CHECK(line_with(unit_stride, MemorySpace::global, MemoryAccess::load).per_request() == 4.0);
    CHECK(line_with(stride_8, MemorySpace::global, MemoryAccess::load).per_request() == 32.0);
    CHECK(line_with(stride_8, MemorySpace::global, MemoryAccess::load).least_per_request() == 4.0);
  }

  TEST_CASE("cp.async groups count as overlapped when there was work before their wait") {
    if (!has_checked_kernels()) return;
    const KernelProfile overlapped = profile_of([](auto in, auto out) { unit::pipelined_copy(in, out, true); }, 1024);
    const KernelProfile serial = profile_of([](auto in, auto out) { unit::pipelined_copy(in, out, false); }, 1024);
    CHECK(overlapped.events.copy_groups == 8 * 32);
    CHECK(overlapped.events.overlapped_groups == 7 * 32);
    CHECK(serial.events.overlapped_groups == 0);
  }

  TEST_CASE("the same fault is one finding, however often it is seen") {
    if (!has_checked_kernels()) return;
    take_findings();
    DeviceBuffer<float> in("in", 64);
    DeviceBuffer<float> out("out", 64);
    unit::strided_load(in.data(), out.data(), 1);
    const std::vector<Finding> findings = take_findings();
    REQUIRE(findings.size() == 1);
    CHECK(findings[0].kind == FindingKind::uninitialised_read);
    CHECK(findings[0].count == 32);
    CHECK(nlohmann::json(findings).at(0).at("kind") == "uninitialised read");
    CHECK(take_findings().empty());
  }
}
