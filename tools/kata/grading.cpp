#include "grading.hpp"

#include <algorithm>

#include "backup.hpp"
#include "build.hpp"
#include "compile_errors.hpp"
#include "failure.hpp"
#include "files.hpp"
#include "process.hpp"
#include "suite.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

// The line of CMakeCache.txt that says how the course itself was configured.
std::string cached(const fs::path& build, const std::string& name) {
  const auto cache = read_file(build / "CMakeCache.txt").value_or("");
  const auto at = cache.find("\n" + name + ":");
  if (at == std::string::npos) return {};
  const auto start = cache.find('=', at) + 1;
  return cache.substr(start, cache.find('\n', start) - start);
}

// Not where it is the same already: a new time would have it compiled again.
void put(const fs::path& path, const std::string& text) {
  if (read_file(path) != text) write_file(path, text);
}

}  // namespace

double StudentGrade::score() const {
  double sum = 0;
  std::size_t count = 0;
  for (const auto& grade : steps) {
    if (grade.skipped) continue;
    sum += grade.score;
    ++count;
  }
  return count == 0 ? 0 : sum / static_cast<double>(count);
}

Grader::Grader(const Course& course, std::vector<const Step*> steps, double limit_s)
    : course_(course),
      steps_(std::move(steps)),
      limit_s_(limit_s),
      answers_(course.state() / "grade" / "answers"),
      build_(course.state() / "grade" / ("build-" + course.preset)) {}

fs::path Grader::mine(const fs::path& built) const {
  return built.empty() ? built : build_ / built.lexically_relative(course_.build);
}

bool Grader::is_built(const Step& step) const { return fs::exists(mine(step.test)); }

std::vector<fs::path> Grader::answers_of(const Step& step) const {
  std::vector<fs::path> files;
  for (const auto& file : step.files) files.push_back(answers_ / step.folder / file);
  return files;
}

void Grader::take_files(const fs::path& folder, StudentGrade& student) {
  for (const auto& step : course_.steps) {
    if (std::find(steps_.begin(), steps_.end(), &step) == steps_.end()) {
      replace_by_ours(step);  // not graded, but the graded ones may call it
      continue;
    }
    StepGrade grade;
    grade.step = &step;
    grade.submitted = grade.untouched = true;
    for (const auto& file : step.files) {
      const auto theirs = folder / step.folder / file;
      // A symbolic link could lead to the solutions; whoever sent one sent no file.
      std::error_code error;
      const bool regular = fs::is_regular_file(fs::symlink_status(theirs, error));
      const auto text = regular ? read_file(theirs) : std::nullopt;
      const auto stub = find_stub(course_, course_.source / step.folder / file);
      if (!text && !stub) throw Failure("the stub of " + step.label + " is not in git", "git log -- " + step.folder);
      if (!text) grade.submitted = false;
      if (text && (!stub || *text != stub->text)) grade.untouched = false;
      put(answers_ / step.folder / file, text ? *text : stub->text);
    }
    if (!grade.submitted) grade.remark = "not submitted";
    grade.not_implemented = grade.untouched;
    student.steps.push_back(grade);
  }
}

void Grader::configure() {
  if (configured_) return;
  ProgressLine progress("configuring");
  Command command;
  // As the students' own trees are, whatever preset the instructor works in.
  const std::string preset = course_.preset.ends_with("-cuda") ? "learn-cuda" : "learn";
  command.argv = {"cmake",
                  "--preset",
                  preset,
                  "-B",
                  build_.string(),
                  "-DKATA_ANSWERS=" + answers_.string(),
                  "-DKATA_PROGRAM=OFF",
                  "-DCMAKE_CXX_COMPILER=" + cached(course_.build, "CMAKE_CXX_COMPILER")};
  command.folder = course_.source;
  command.on_tick = [&](double) { progress.tick(); };
  const auto outcome = run(command);
  progress.clear();
  if (!outcome.ok()) {
    throw Failure("cannot configure " + course_.shown(build_) + ":\n\n" + outcome.output,
                  "./kata doctor says what is missing");
  }
  configured_ = true;
}

// The folder may hold ours for what does not compile, so that the steps which call it can still be judged; without
// solutions the stub does as well.
void Grader::replace_by_ours(const Step& step) {
  for (const auto& file : step.files) {
    const auto path = fs::path(step.folder) / file;
    auto text = read_file(course_.hidden_root() / path);
    if (!text) {
      if (const auto stub = find_stub(course_, course_.source / path)) text = stub->text;
    }
    if (text) put(answers_ / path, *text);
  }
}

// The label of a step whose answer includes a file of the solutions, as the compiler itself recorded it.
std::string Grader::peeked_at() const {
  const auto deps = output_of({"ninja", "-C", build_.string(), "-t", "deps"});
  std::string object;
  std::string found;
  std::size_t start = 0;
  while (start < deps.size()) {
    const auto end = std::min(deps.find('\n', start), deps.size());
    const std::string_view line(deps.data() + start, end - start);
    if (!line.starts_with(' ')) object = line;
    if (line.starts_with(' ') && line.find("solutions/hidden/") != std::string_view::npos) found += object + "\n";
    start = end + 1;
  }
  return found;
}

void Grader::build(StudentGrade& student) {
  std::vector<std::string> targets;
  for (const auto& grade : student.steps) {
    // What is left of the student before must not be taken for this one's.
    std::error_code ignored;
    fs::remove(mine(grade.step->test), ignored);
    if (!grade.untouched) targets.push_back(grade.step->target);
  }
  if (targets.empty()) return;
  // Each round takes out the files that do not compile; there cannot be more rounds than steps.
  for (std::size_t round = 0; round <= course_.steps.size(); ++round) {
    const auto result = build_targets(build_, targets, "building " + student.name, /*keep_going*/ true);
    if (result.ok) break;
    bool found = false;
    for (auto& grade : student.steps) {
      if (grade.untouched || grade.compile_error || is_built(*grade.step)) continue;
      const auto report = read_build_log(result.log, answers_of(*grade.step));
      if (report.mine.empty()) continue;
      const auto& first = report.mine.front();
      grade.compile_error = found = true;
      grade.remark = "does not compile: " + fs::path(first.file).filename().string() + ":" +
                     std::to_string(first.line) + ": " + first.message;
    }
    if (!found) {  // no error in a file of theirs: the first that is not built lacks a function, or has it twice
      for (auto& grade : student.steps) {
        if (found || grade.untouched || grade.compile_error || is_built(*grade.step)) continue;
        const auto report = read_build_log(result.log, {});
        grade.compile_error = found = true;
        grade.remark = "does not link" + (report.link.empty() ? "" : ": " + report.link.front());
      }
    }
    if (!found) throw Failure("the suites do not build:\n\n" + result.log, "mend this tree first: ./kata test all");
    for (const auto& grade : student.steps) {
      if (grade.compile_error) replace_by_ours(*grade.step);
    }
  }
  for (auto& grade : student.steps) {
    for (const Step* need : course_.with_needs(*grade.step)) {
      for (const auto& other : student.steps) {
        if (other.step == need && &other != &grade && other.compile_error) grade.ours_for.push_back(need->label);
      }
    }
  }
  const auto peeked = peeked_at();
  for (auto& grade : student.steps) {
    if (grade.compile_error) continue;  // what was built in its place is ours
    const auto built_from_ours = [&](const std::string& target) {
      return peeked.find("/" + target + ".dir/") != std::string::npos;
    };
    if (!built_from_ours(grade.step->label) && !built_from_ours(grade.step->label + "_host")) continue;
    grade.remark = "includes a file of the solutions: no points";
    grade.compile_error = true;
  }
}

void Grader::test(StepGrade& grade) {
  if (grade.compile_error || grade.untouched) return;
  Step step = *grade.step;
  step.test = mine(step.test);
  step.check = mine(step.check);
  const ScratchFolder elsewhere;  // a student's code may write files: not into this tree
  SuiteOptions options;
  options.show = false;
  options.limit_s = limit_s_;
  options.folder = elsewhere.path();
  const auto run = run_suite(step, options);
  if (!run.summary) {
    grade.timed_out = run.timed_out;
    grade.crashed = !run.timed_out;
    grade.remark = run.mishap(limit_s_);
    return;
  }
  grade.passed = run.summary->passed;
  grade.failed = run.summary->failed;
  grade.skipped = run.skipped();
  grade.not_implemented = run.summary->not_implemented;
  const auto total = grade.passed + grade.failed;
  if (total > 0) grade.score = static_cast<double>(grade.passed) / static_cast<double>(total);
}

StudentGrade Grader::grade(const std::string& name, const fs::path& folder) {
  StudentGrade student{name, folder, {}};
  take_files(folder, student);
  configure();
  build(student);
  ProgressLine progress("testing " + name);
  for (auto& grade : student.steps) {
    progress.say(grade.step->number);
    progress.tick();
    test(grade);
  }
  return student;
}

}  // namespace kata
