#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "course.hpp"

namespace kata {

struct TestResult {
  std::string name;
  std::string status;  // "passed", "failed", "skipped"
};

/// What a step's test executable writes with --summary.
struct Summary {
  std::size_t passed = 0;
  std::size_t failed = 0;
  std::size_t skipped = 0;
  bool not_implemented = false;
  std::string first_failed;
  std::string question;  // the Socratic question to the mistake that was recognised, if one was
  std::vector<TestResult> tests;
};
std::optional<Summary> parse_summary(const std::string& json);

struct SuiteOptions {
  std::optional<int> only_case;   // --case=N
  std::string only_name;          // tests whose name contains this
  bool show = true;               // its output goes to ours; else it is kept in SuiteRun::output
  double limit_s = 60;            // an endless loop ends here
  std::function<bool()> give_up;  // e.g. the file was saved again meanwhile
  std::filesystem::path folder;   // where it runs; empty: here
};

struct SuiteRun {
  std::optional<Summary> summary;  // absent after a crash or at the time limit
  int exit_code = -1;
  int signal = 0;
  bool started = false;
  bool timed_out = false;
  bool given_up = false;
  double seconds = 0;
  std::string output;

  bool passed() const;   // every test ran and was right
  bool skipped() const;  // this machine cannot run any of it
  /// One line on what happened where there is no summary.
  std::string mishap(double limit_s) const;
};

/// Runs a step's test executable and, of a kernel step, the one that watches its kernels.
SuiteRun run_suite(const Step& step, const SuiteOptions& options);

/// How long a step may take before it is taken for endless: kernels on the virtual GPU are slower.
double time_limit(const Step& step);

}  // namespace kata
