// Suites on several ranks: a test executable starts itself under mpiexec, every rank does the suite's work and leaves a
// report in a file, and the executable that was started by hand judges the reports.
#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "common/distributed/communicator.hpp"
#include "common/testing/array.hpp"

namespace flashkata::testing {

/// What one rank found out.
struct RankReport {
  std::string task;  // what on_ranks() was called with
  std::map<std::string, Array> arrays;
  std::vector<std::pair<std::string, std::string>> findings;  // name and sentence, as finding() takes them
  std::map<std::string, std::string> missing;                 // what is not implemented yet: the file to open
  std::string doing;                                          // what it is at, for whoever must say where it ended
  std::string error;                   // what its work threw; what had been found out before is there
  std::function<void()> save = [] {};  // keeps what has been found out so far, should the rank die
};

/// The work of a rank; one in each suite that has ranks.
struct RankWork {
  explicit RankWork(std::function<void(Communicator&, RankReport&)> work);
};

/// Why there can be only one rank here, and what to install; empty if there can be several.
std::string why_no_ranks();

struct RanksOutcome {
  std::vector<RankReport> ranks;  // of a rank that left none: an empty one
  std::string failure;            // who threw, died or did not come back, and where; empty if all is well
};

/// Does the work on so many ranks and returns their reports. `task` is handed to them, for suites that have several.
/// Runs each task once: later calls get the same reports. One rank is run here, without mpiexec. A rank that waits for
/// others longer than `patience` says so and gives up.
const RanksOutcome& on_ranks(int ranks, const std::string& task = "",
                             std::chrono::milliseconds patience = std::chrono::seconds(5));

}  // namespace flashkata::testing
