#include <algorithm>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>

#include "commands.hpp"
#include "failure.hpp"
#include "files.hpp"
#include "grading.hpp"
#include "names.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

// One name for each submission: its folder's, or as much of the path as tells two of them apart.
std::vector<std::string> student_names(const std::vector<fs::path>& submissions) {
  std::vector<std::string> names;
  std::set<std::string> seen;
  std::set<std::string> twice;
  const auto whole = [](const fs::path& path) {
    std::string text = fs::absolute(path).lexically_normal().string();
    while (text.size() > 1 && text.ends_with('/')) text.pop_back();
    return text;
  };
  for (const auto& path : submissions) {
    const auto name = fs::path(whole(path)).filename().string();
    if (!seen.insert(name).second) twice.insert(name);
    names.push_back(name);
  }
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (twice.contains(names[i])) names[i] = whole(submissions[i]);
  }
  return names;
}

std::string percent(double score) {
  char text[16];
  std::snprintf(text, sizeof text, "%5.1f %%", 100 * score);
  return text;
}

std::string in_words(const StepGrade& grade) {
  if (grade.skipped) return dim("skipped: this machine cannot run it");
  if (!grade.remark.empty()) return red(grade.remark);
  if (grade.not_implemented) return yellow("not filled");
  const auto total = grade.passed + grade.failed;
  std::string share = std::to_string(grade.passed) + " of " + counted(total, "test");
  for (const auto& label : grade.ours_for) share += ", on our " + label;
  return grade.failed == 0 ? green(share) : red(share);
}

nlohmann::json as_json(const StudentGrade& student) {
  auto steps = nlohmann::json::array();
  for (const auto& grade : student.steps) {
    steps.push_back({{"label", grade.step->label},
                     {"passed", grade.passed},
                     {"failed", grade.failed},
                     {"skipped", grade.skipped},
                     {"submitted", grade.submitted},
                     {"untouched", grade.untouched},
                     {"not_implemented", grade.not_implemented},
                     {"compile_error", grade.compile_error},
                     {"crashed", grade.crashed},
                     {"timed_out", grade.timed_out},
                     {"ours_for", grade.ours_for},
                     {"remark", grade.remark},
                     {"score", grade.score}});
  }
  return {{"student", student.name}, {"folder", student.folder.string()}, {"steps", steps}, {"score", student.score()}};
}

void print(const StudentGrade& student, std::size_t longest) {
  std::cout << "  " << bold(student.name) << "\n";
  for (const auto& grade : student.steps) {
    std::cout << "    " << grade.step->number << " " << padded(grade.step->name, longest) << "  "
              << (grade.skipped ? "      -" : percent(grade.score)) << "   " << wrapped(in_words(grade), longest + 21)
              << "\n";
  }
  std::cout << "    " << padded("all", longest + 5) << "  " << bold(percent(student.score())) << "\n\n" << std::flush;
}

}  // namespace

int grade(const Course& course, const GradeOptions& options) {
  for (const auto& folder : options.submissions) {
    if (!fs::is_directory(folder))
      throw Failure(folder.string() + " is not a folder", "name the folders that came back", 2);
    const bool any = std::any_of(course.steps.begin(), course.steps.end(), [&](const Step& step) {
      return fs::exists(folder / step.folder / step.files.front());
    });
    if (!any) {
      throw Failure(folder.string() + " has none of the course's files, such as " + course.steps.front().folder + "/" +
                        course.steps.front().files.front(),
                    "name the folder that has phase1_eager/ in it", 2);
    }
  }
  const auto out = options.out.empty() ? course.state() / "grade" / "scores.json" : options.out;
  std::size_t longest = 0;
  for (const auto& step : course.steps) longest = std::max(longest, step.name.size());

  auto students = nlohmann::json::array();
  const auto names = student_names(options.submissions);
  Grader grader(course, find_steps(course, options.only), options.limit_s);
  std::cout << "\n";
  for (std::size_t i = 0; i < names.size(); ++i) {
    const auto student = grader.grade(names[i], fs::absolute(options.submissions[i]).lexically_normal());
    print(student, longest);
    students.push_back(as_json(student));
    // After each, so that what was graded before Ctrl-C or a full disk is not lost.
    const nlohmann::json scores = {
        {"course", "FlashKata"}, {"time", utc_timestamp()}, {"limit_s", options.limit_s}, {"students", students}};
    write_file(out, scores.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
  }
  std::cout << field("scores", cyan(course.shown(fs::absolute(out))));
  return 0;
}

}  // namespace kata
