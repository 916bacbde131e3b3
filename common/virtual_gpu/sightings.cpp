#include "common/virtual_gpu/sightings.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <utility>

namespace flashkata {

namespace {
std::mutex findings_mutex;
std::vector<Finding> findings;

// Findings that nobody took must not be lost: without this, a program that forgets to ask would pass.
void report_untaken_findings() {
  if (findings.empty()) return;
  print_findings(std::cerr, findings);
  std::fflush(stdout);
  std::cerr.flush();
  std::cout.flush();
  std::_Exit(1);
}
}  // namespace

std::vector<Finding> take_findings() {
  const std::lock_guard lock(findings_mutex);
  return std::exchange(findings, {});
}

namespace virtual_gpu {
namespace {

constexpr std::size_t MOST_SIGHTINGS = 400;  // per OS thread and launch
constexpr std::size_t MOST_FINDINGS = 200;   // not taken yet

void replace_all(std::string& text, const std::string& placeholder, const std::string& value) {
  for (std::size_t at = text.find(placeholder); at != std::string::npos;
       at = text.find(placeholder, at + value.size())) {
    text.replace(at, placeholder.size(), value);
  }
}

Finding to_finding(const Sighting& sighting, const std::string& kernel) {
  const SourceLine here = line_of(sighting.here);
  const SourceLine there = line_of(sighting.there);
  Finding result{sighting.kind, sighting.sentence,  here.file,     here.line, there.file, there.line,
                 kernel,        sighting.abandoned, sighting.count};
  replace_all(result.sentence, "{here}", here.text());
  replace_all(result.sentence, "{there}", there.text());
  return result;
}

/// The same kind at the same two places, whichever of the two came first.
bool same_places(const Finding& a, const Finding& b) {
  if (a.kind != b.kind || a.kernel != b.kernel) return false;
  const bool straight =
      a.file == b.file && a.line == b.line && a.other_file == b.other_file && a.other_line == b.other_line;
  const bool crossed =
      a.file == b.other_file && a.line == b.other_line && a.other_file == b.file && a.other_line == b.line;
  return straight || crossed;
}

/// A missing barrier lets a thread read before another has written: that is the race's doing, not a second fault.
void drop_consequences_of_races(std::vector<Finding>& launch) {
  const auto races_at = [&](const Finding& read) {
    return std::any_of(launch.begin(), launch.end(), [&](const Finding& finding) {
      const bool here = finding.file == read.file && finding.line == read.line;
      const bool there = finding.other_file == read.file && finding.other_line == read.line;
      return finding.kind == FindingKind::shared_race && (here || there);
    });
  };
  std::vector<Finding> kept;
  for (const Finding& finding : launch) {
    if (finding.kind != FindingKind::uninitialised_read || !races_at(finding)) kept.push_back(finding);
  }
  launch = std::move(kept);
}

/// The finding is the first of its kind at its places, or one more of a known one.
void merge(std::vector<Finding>& into, Finding finding) {
  const auto known =
      std::find_if(into.begin(), into.end(), [&](const Finding& other) { return same_places(finding, other); });
  if (known != into.end()) {
    known->count += finding.count;
    known->abandoned |= finding.abandoned;
  } else if (into.size() < MOST_FINDINGS) {
    into.push_back(std::move(finding));
  }
}

/// Compilers duplicate code: two addresses that turn out to be one line are no divergence.
bool is_one_line_after_all(const Finding& finding) {
  const bool by_line = finding.kind == FindingKind::divergent_warp;
  return by_line && !finding.abandoned && finding.line == finding.other_line && finding.file == finding.other_file;
}

}  // namespace

std::uint64_t Sightings::key(FindingKind kind, Site here, Site there) {
  const std::uint64_t low = std::min(here, there);
  const std::uint64_t high = std::max(here, there);
  return (static_cast<std::uint64_t>(kind) << 58) ^ (high << 29) ^ low;
}

bool Sightings::is_new(FindingKind kind, Site here, Site there) {
  const auto known = position_.find(key(kind, here, there));
  if (known != position_.end()) {
    ++all_[known->second].count;
    return false;
  }
  return all_.size() < MOST_SIGHTINGS;
}

void Sightings::describe(FindingKind kind, Site here, Site there, std::string sentence, bool abandoned) {
  position_[key(kind, here, there)] = all_.size();
  all_.push_back({kind, here, there, std::move(sentence), abandoned, 1});
}

void Sightings::clear() {
  all_.clear();
  position_.clear();
}

void publish(const std::vector<const Sightings*>& seen, const void* kernel) {
  std::vector<Site> sites;
  for (const Sightings* some : seen) {
    for (const Sighting& sighting : some->all()) {
      sites.push_back(sighting.here);
      sites.push_back(sighting.there);
    }
  }
  if (sites.empty()) return;
  prefetch_lines(sites);
  const std::string name = function_name(kernel);

  std::vector<Finding> launch;
  for (const Sightings* some : seen) {
    for (const Sighting& sighting : some->all()) {
      Finding finding = to_finding(sighting, name);
      if (!is_one_line_after_all(finding)) merge(launch, std::move(finding));
    }
  }
  drop_consequences_of_races(launch);

  const std::lock_guard lock(findings_mutex);
  [[maybe_unused]] static const bool registered = std::atexit(report_untaken_findings) == 0;
  for (Finding& finding : launch) merge(findings, std::move(finding));
}

}  // namespace virtual_gpu
}  // namespace flashkata
