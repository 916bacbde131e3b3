#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "course.hpp"

/// What the student and the instructor type, one function each; they return the exit code.
namespace kata {

struct TestOptions {
  std::string which;             // a step, a phase or "all"; empty: the current step
  std::optional<int> only_case;  // only this numbered input
  std::string only_name;         // only tests whose name contains this
};
int test(const Course& course, const TestOptions& options);

struct HintOptions {
  std::string step;  // empty: the current one
  bool again = false;
  bool solution = false;
};
int hint(const Course& course, const HintOptions& options);

struct KernelOptions {
  std::string step;
  std::optional<int> only_case;
  bool json = false;
  bool on_gpu = false;  // NVIDIA's tools on a real GPU instead of the virtual one
};
int check(const Course& course, const KernelOptions& options);
int profile(const Course& course, const KernelOptions& options);

int watch(const Course& course, const std::string& step);
int solution(const Course& course, const std::string& step, bool give_up);
int reset(const Course& course, const std::string& step);
int doctor(const Course& course);
int verify(const Course& course);
int handout(const Course& course, const std::filesystem::path& folder);

struct BenchOptions {
  std::string which;           // a step, a phase or "all"; empty: all
  std::string grid = "quick";  // or "full"
  std::filesystem::path
      csv;              // grows by what is measured; what it has already is not measured again. Empty: .kata/bench
  std::string against;  // "torch": PyTorch's kernels beside ours. Empty: ours alone
  std::string on;       // "gpu" or "cpu": only steps that run there. Empty: both
};
int bench(const Course& course, const BenchOptions& options);

struct GradeOptions {
  std::vector<std::filesystem::path> submissions;
  std::string only = "all";   // a step or a phase
  std::filesystem::path out;  // empty: .kata/grade/scores.json
  double limit_s = 60;        // for each step's suite
};
int grade(const Course& course, const GradeOptions& options);

}  // namespace kata
