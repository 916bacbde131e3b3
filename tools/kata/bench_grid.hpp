#pragma once

#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "benchmarks/bench/problem.hpp"
#include "course.hpp"

namespace kata {

using BenchProblem = flashkata::bench::Problem;

/// Whether there is something to measure in a step: an answer for whole tensors.
bool is_benched(const Step& step);

/// The problems of one step, "quick" or "full", in the order in which they are measured.
std::vector<BenchProblem> bench_grid(const Step& step, const std::string& grid);

/// The file of results: a line for each problem and each competitor. It grows line by line, so that what was measured
/// is kept whatever happens.
class BenchRecord {
 public:
  /// Throws Failure where `path` exists and is something else. `fresh` begins anew.
  BenchRecord(std::filesystem::path path, bool fresh);

  bool has(const BenchProblem& problem, const std::string& who) const;
  void add(const BenchProblem& problem, const std::string& who, const std::string& status, const nlohmann::json& time,
           double of_roofline, const std::string& machine);
  const std::filesystem::path& path() const { return path_; }

 private:
  static std::string key(const BenchProblem& problem, const std::string& who);

  std::filesystem::path path_;
  std::set<std::string> keys_;
};

}  // namespace kata
