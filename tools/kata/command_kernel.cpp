// ./kata check and ./kata profile: what a step's kernels do to memory, told by the virtual GPU or by NVIDIA's tools.
#include <iostream>

#include "build.hpp"
#include "commands.hpp"
#include "failure.hpp"
#include "files.hpp"
#include "names.hpp"
#include "process.hpp"
#include "progress.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

const Step& kernel_step(const Course& course, const std::string& typed, const char* command) {
  const Step& step = find_step(course, typed);
  if (step.kind == "cuda") return step;
  std::string kernels;
  for (const Step& other : course.steps) {
    if (other.kind == "cuda") kernels += (kernels.empty() ? "" : ", ") + other.title();
  }
  throw Failure(step.title() + " has no kernel to " + command, "steps that have: " + kernels, 2);
}

// Builds the step, or prints why that fails.
bool build_or_say(const Course& course, const Step& step) {
  const auto build = build_step(course, step);
  if (build.ok) return true;
  std::cout << "\n" << red(step.title() + " does not compile") << "\n\n" << build.errors;
  std::cout << field("next", "open " + cyan(course.to_open(step)) + ", mend the first error");
  return false;
}

// Runs a program whose output is the answer.
int show(std::vector<std::string> argv) {
  std::cout << std::flush;
  Command command;
  command.argv = std::move(argv);
  command.capture = false;
  command.ends_politely = false;
  const auto outcome = run(command);
  if (!outcome.started) {
    throw Failure("cannot start " + command.argv.front(), "./kata doctor says what is missing on this machine");
  }
  return outcome.signal != 0 ? 1 : outcome.exit_code;
}

void append_case(std::vector<std::string>& argv, const KernelOptions& options) {
  if (options.only_case) argv.push_back("--case=" + std::to_string(*options.only_case));
}

// The suite under NVIDIA's own tools; only where kernels were built for a GPU.
void refuse_without_gpu_build(const Course& course, const std::string& command, const Step& step) {
  if (course.preset.find("cuda") != std::string::npos) return;
  throw Failure("--on gpu needs kernels that were built for a GPU, and this is the build " + course.preset,
                "./kata --preset learn-cuda " + command + " " + step.number + " --on gpu", 2);
}

void refuse_gpu_build(const Course& course, const std::string& command, const Step& step) {
  if (course.preset.find("cuda") == std::string::npos) return;
  throw Failure("the build " + course.preset + " has kernels for a GPU only",
                "./kata " + command + " " + step.number + ", or add --on gpu", 2);
}

int check_on_gpu(const Step& step, const KernelOptions& options) {
  int worst = 0;
  for (const char* tool : {"memcheck", "racecheck", "initcheck", "synccheck"}) {
    std::cout << "\n  " << bold("compute-sanitizer --tool " + std::string(tool)) << "\n";
    std::vector<std::string> argv = {"compute-sanitizer", "--tool", tool, "--error-exitcode", "7", step.test.string()};
    append_case(argv, options);
    worst = std::max(worst, show(std::move(argv)));
  }
  return worst == 0 ? 0 : 1;
}

int profile_on_gpu(const Step& step, const KernelOptions& options) {
  std::vector<std::string> argv = {"ncu", "--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis"};
  if (options.json) argv.insert(argv.end(), {"--csv", "--page", "raw"});
  argv.push_back(step.test.string());
  append_case(argv, options);
  return show(std::move(argv));
}

}  // namespace

int check(const Course& course, const KernelOptions& options) {
  const Step& step = kernel_step(course, options.step, "check");
  options.on_gpu ? refuse_without_gpu_build(course, "check", step) : refuse_gpu_build(course, "check", step);
  if (!build_or_say(course, step)) return 1;
  if (options.on_gpu) return check_on_gpu(step, options);
  std::vector<std::string> argv = {step.check.string(), "--findings"};
  append_case(argv, options);
  return show(std::move(argv));
}

int profile(const Course& course, const KernelOptions& options) {
  const Step& step = kernel_step(course, options.step, "profile");
  options.on_gpu ? refuse_without_gpu_build(course, "profile", step) : refuse_gpu_build(course, "profile", step);
  if (!build_or_say(course, step)) return 1;
  if (options.on_gpu) return profile_on_gpu(step, options);
  if (!options.json) {
    std::vector<std::string> argv = {step.check.string(), "--profile"};
    append_case(argv, options);
    return show(std::move(argv));
  }
  const ScratchFolder scratch;
  const auto file = scratch.path() / "profile.json";
  Command command;
  command.argv = {step.check.string(), "--profile=" + file.string()};
  append_case(command.argv, options);
  command.capture = true;
  const auto outcome = run(command);
  const auto json = read_file(file);
  if (!json) throw Failure("the kernels of " + step.title() + " left no profile", "./kata test " + step.number);
  std::cout << *json;
  return outcome.exit_code;
}

}  // namespace kata
