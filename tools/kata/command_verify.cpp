#include <algorithm>
#include <iostream>
#include <thread>

#include "build.hpp"
#include "commands.hpp"
#include "failure.hpp"
#include "files.hpp"
#include "process.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

// "  3/40 Test  #3: phase1.01_softmax · ... ........   Passed    0.01 sec" as "3/40".
std::string ctest_progress(std::string_view line) {
  while (line.starts_with(' ')) line.remove_prefix(1);
  const auto test = line.find(" Test ");
  if (test == std::string_view::npos || line.substr(0, test).find('/') == std::string_view::npos) return {};
  return std::string(line.substr(0, test));
}

bool is_pass(std::string_view line) { return line.find("   Passed ") != std::string_view::npos; }
bool is_start(std::string_view line) { return line.find("    Start ") == 0 || line.find(" Start ") != line.npos; }

void configure(const Course& course, const std::string& preset) {
  ProgressLine progress("configuring " + preset);
  Command command;
  command.argv = {"cmake", "--preset", preset};
  command.folder = course.source;
  command.on_tick = [&](double) { progress.tick(); };
  const auto outcome = run(command);
  progress.clear();
  if (outcome.ok()) return;
  throw Failure("cmake --preset " + preset + " failed:\n\n" + outcome.output, "./kata doctor says what is missing");
}

}  // namespace

int verify(const Course& course) {
  const std::string preset = course.preset.ends_with("-cuda") ? "solutions-cuda" : "solutions";
  if (!fs::exists(course.hidden_root())) {
    throw Failure("this tree was handed out without its solutions, so there is nothing to verify",
                  "./kata test all judges your own answers");
  }
  const auto folder = course.source / "build" / preset;
  std::cout << "  configuring and building " << course.shown(folder) << "\n" << std::flush;
  configure(course, preset);
  const auto build = build_targets(folder, {}, "building the solutions", /*keep_going*/ true);
  if (!build.ok) {
    throw Failure("the solutions do not build:\n\n" + build.log, "mend what is named first, then ./kata verify");
  }
  std::cout << "  built in " << seconds_text(build.seconds) << "; testing\n" << std::flush;

  const auto jobs = std::max(1u, std::thread::hardware_concurrency());
  ProgressLine progress("testing");
  Command command;
  command.argv = {"ctest", "--preset", preset, "--output-on-failure", "-j", std::to_string(jobs)};
  command.folder = course.source;
  std::string tail;  // from ctest's own summary on
  command.on_line = [&](std::string_view line) {
    const bool summary = !tail.empty() || line.find("% tests passed") != std::string_view::npos;
    if (summary) {
      tail += std::string(line) + "\n";
    } else if (const auto count = ctest_progress(line); is_pass(line) && !count.empty()) {
      progress.say(count);
    } else if (!line.empty() && !is_start(line) && !line.starts_with("Test project")) {
      progress.clear();  // a failure with what it printed
      std::cout << line << "\n" << std::flush;
    }
  };
  command.on_tick = [&](double) { progress.tick(); };
  const auto outcome = run(command);
  progress.clear();
  if (!outcome.started) throw Failure("cannot start ctest", "./kata doctor says what is missing");
  std::cout << "\n" << tail;
  if (outcome.ok() && !tail.empty()) return 0;
  throw Failure(tail.empty() ? "ctest found no tests" : "the solutions do not pass",
                "the first failure above says what and where; ctest --preset " + preset + " -R NAME repeats one");
}

}  // namespace kata
