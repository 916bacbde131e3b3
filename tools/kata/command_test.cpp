#include <iostream>

#include "build.hpp"
#include "commands.hpp"
#include "failure.hpp"
#include "files.hpp"
#include "names.hpp"
#include "pages.hpp"
#include "progress.hpp"
#include "suite.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

void refuse_missing(const Course& course, const Step& step) {
  for (const auto& file : course.filled(step)) {
    if (fs::exists(file)) continue;
    throw Failure(course.shown(file) + " is gone", "./kata reset " + step.number + " brings the stub back");
  }
}

std::string next_line(const Course& course, const Progress& progress, const Step& step) {
  const auto& verdict = progress.of(step);
  const std::string open = cyan(course.to_open(step));
  if (verdict.state == State::done) {
    return field("next",
                 bold("./kata next") + dim("   (./kata solution " + step.number + " compares yours with ours)"));
  }
  if (verdict.state == State::skipped) return field("next", bold("./kata doctor") + "   says what it needs");
  if (verdict.state == State::unfilled) return field("next", "open " + open + " and fill it");
  return field("next", "open " + open + ", or ask " + bold("./kata hint " + step.number));
}

// A filter that matches nothing is a typing mistake, not a pass: names what there is.
[[noreturn]] void refuse_name(const Step& step, const std::string& name) {
  SuiteOptions everything;
  everything.show = false;
  everything.limit_s = time_limit(step);
  const auto run = run_suite(step, everything);
  std::string names;
  for (const auto& each : run.summary.value_or(Summary{}).tests) names += "\n    " + each.name;
  throw Failure("no test's name contains '" + name + "'; the tests of " + step.title() + " are\n" + names,
                "./kata test " + step.number + " --name TEXT, with a part of one of these", 2);
}

int test_part(const Course& course, const Step& step, const TestOptions& options, const SuiteRun& run) {
  const std::size_t ran = run.summary ? run.summary->passed + run.summary->failed : 0;
  if (run.summary && ran == 0 && !options.only_name.empty()) refuse_name(step, options.only_name);
  if (run.summary && ran == 0 && options.only_case) {
    std::cout << field("next", bold("./kata test " + step.number) + "   (what fails names its own number)");
    return 2;
  }
  const bool right = run.exit_code == 0 && run.summary && ran > 0 && run.summary->failed == 0;
  if (right) {
    std::cout << field("next", bold("./kata test " + step.number) + "   (this was only a part of its tests)");
    return 0;
  }
  std::cout << field("next", "open " + cyan(course.to_open(step)) + ", or ask " + bold("./kata hint " + step.number));
  return 1;
}

int test_one(const Course& course, const Step& step, const TestOptions& options) {
  refuse_missing(course, step);
  Progress progress(course);
  const auto judged = progress.key(step);
  const auto build = build_step(course, step);
  if (!build.ok) {
    progress.record_broken(step, judged, build.own_error);
    std::cout << "\n" << red(step.title() + " does not compile") << "\n\n" << build.errors;
    std::cout << field("next", "open " + cyan(course.to_open(step)) + ", mend the first error, then " +
                                   bold("./kata test " + step.number));
    return 1;
  }
  SuiteOptions suite;
  suite.only_case = options.only_case;
  suite.only_name = options.only_name;
  suite.limit_s = time_limit(step);
  const auto run = run_suite(step, suite);
  if (!run.summary) {
    std::cout << "\n" << red(step.title() + " " + run.mishap(suite.limit_s)) << "\n";
  }
  const bool part = options.only_case || !options.only_name.empty();
  if (part) return test_part(course, step, options, run);
  progress.record(step, judged, run);
  std::cout << next_line(course, progress, step);
  return progress.of(step).state == State::done ? 0 : 1;
}

int test_many(const Course& course, const std::vector<const Step*>& steps) {
  Progress progress(course);
  progress.forget(steps);
  progress.refresh(steps);
  std::size_t longest = 0;
  for (const Step* step : steps) longest = std::max(longest, step->name.size());
  std::size_t done = 0;
  std::size_t skipped = 0;
  const Step* first_open = nullptr;
  std::cout << "\n";
  for (const Step* step : steps) {
    const auto& verdict = progress.of(*step);
    const auto words = in_words(verdict);
    if (verdict.state == State::done) ++done;
    if (verdict.state == State::skipped) ++skipped;
    const bool fine = verdict.state == State::done || verdict.state == State::skipped;
    if (!fine && first_open == nullptr) first_open = step;
    const auto column = longest + 14;
    const std::string text = wrapped(words, column);
    std::cout << "  " << mark(verdict.state) << " " << step->number << " " << padded(step->name, longest) << "   "
              << (fine || verdict.state == State::unfilled ? text : red(text)) << "\n";
  }
  std::cout << "\n  " << done << " of " << counted(steps.size(), "step") << " pass";
  if (skipped > 0) std::cout << ", " << skipped << " cannot run on this machine";
  std::cout << "\n";
  if (first_open == nullptr) {
    std::cout << field("next", bold("./kata next"));
    return 0;
  }
  std::cout << field("next", bold("./kata test " + first_open->number) + "   (" + course.to_open(*first_open) + ")");
  return 1;
}

}  // namespace

int test(const Course& course, const TestOptions& options) {
  if (options.which.empty()) {
    const Step* current = Progress(course).current_before_judging();
    if (current != nullptr) return test_one(course, *current, options);
    std::cout << "\n  every step passes already: testing all of them again\n";
    return test_many(course, find_steps(course, "all"));
  }
  const auto steps = find_steps(course, options.which);
  if (steps.size() == 1) return test_one(course, *steps.front(), options);
  if (options.only_case || !options.only_name.empty()) {
    throw Failure("--case and --name go with one step, not with '" + options.which + "'",
                  "for example ./kata test " + steps.front()->number + " --case 7", 2);
  }
  return test_many(course, steps);
}

}  // namespace kata
