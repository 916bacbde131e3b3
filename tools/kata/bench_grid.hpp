#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "course.hpp"

namespace kata {

/// What ./kata bench measures of a step; its workers in benchmarks/ read it as JSON.
struct BenchProblem {
  std::string step;
  std::string type{};
  std::string direction{};  // "forward", "backward", "both"
  bool gpu = false;
  bool causal = false;
  int batch = 1;
  int heads = 1;
  int length = 1;
  int width = 64;
  int threads = 0;  // on the CPU; 0: all

  double operations() const;
  double least_bytes() const;
};

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(BenchProblem, step, type, direction, gpu, causal, batch, heads, length, width,
                                   threads)

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
