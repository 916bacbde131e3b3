// What one OS thread has seen while it ran blocks; turned into findings at the end of the launch.
//
// Code addresses become lines only then, because looking them up is slow: a sentence says {here} and {there} for them.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "common/virtual_gpu/findings.hpp"
#include "common/virtual_gpu/symbols.hpp"

namespace flashkata::virtual_gpu {

struct Sighting {
  FindingKind kind;
  Site here;
  Site there;  // 0 if there is no other place
  std::string sentence;
  bool abandoned;
  long count;
};

class Sightings {
 public:
  /// Counts it, and returns true when nobody has described it yet.
  bool is_new(FindingKind kind, Site here, Site there = 0);
  /// Describes what was new. Beyond a few hundred nothing is kept.
  void describe(FindingKind kind, Site here, Site there, std::string sentence, bool abandoned = false);

  const std::vector<Sighting>& all() const { return all_; }
  void clear();

 private:
  static std::uint64_t key(FindingKind kind, Site here, Site there);

  std::vector<Sighting> all_;
  std::unordered_map<std::uint64_t, std::size_t> position_;
};

/// Adds what the OS threads saw during one launch to the list that take_findings() gives away.
void publish(const std::vector<const Sightings*>& seen, const void* kernel);

}  // namespace flashkata::virtual_gpu
