#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "course.hpp"

namespace kata {

struct StepGrade {
  const Step* step = nullptr;
  bool submitted = false;  // all of its files were there
  bool untouched = false;  // they are the stubs as handed out: not built, nothing to judge
  bool compile_error = false;
  bool crashed = false;
  bool timed_out = false;
  bool not_implemented = false;
  bool skipped = false;  // this machine cannot run it: it does not count
  std::size_t passed = 0;
  std::size_t failed = 0;
  std::vector<std::string> ours_for;  // labels of steps that it calls, where theirs did not compile
  std::string remark;                 // why there are no results, or why they do not count
  double score = 0;                   // passed / (passed + failed); 0 where the suite did not come to its end
};

struct StudentGrade {
  std::string name;
  std::filesystem::path folder;
  std::vector<StepGrade> steps;

  double score() const;  // the mean over the steps that this machine can run
};

/// Grades submissions one after the other in .kata/grade/: only the files that the manifest names are taken from them,
/// and they are built against this tree's headers and suites. The build folder is shared, so that a further student
/// costs only the compilation of his own files.
class Grader {
 public:
  Grader(const Course& course, std::vector<const Step*> steps, double limit_s);
  StudentGrade grade(const std::string& name, const std::filesystem::path& folder);

 private:
  void take_files(const std::filesystem::path& folder, StudentGrade& student);
  void configure();
  void build(StudentGrade& student);
  void test(StepGrade& grade);
  bool is_built(const Step& step) const;
  std::filesystem::path mine(const std::filesystem::path& built) const;  // what the grading build has in its place
  std::vector<std::filesystem::path> answers_of(const Step& step) const;
  void replace_by_ours(const Step& step);
  std::string peeked_at() const;

  const Course& course_;
  std::vector<const Step*> steps_;  // that are graded
  double limit_s_;
  std::filesystem::path answers_;
  std::filesystem::path build_;
  bool configured_ = false;
};

}  // namespace kata
