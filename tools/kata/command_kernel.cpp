// ./kata check and ./kata profile: what a step's kernels do to memory, told by the virtual GPU or by NVIDIA's tools.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <map>
#include <sstream>

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

constexpr const char* DURATION = "gpu__time_duration.sum";  // as ncu calls it
constexpr std::size_t MOST_LAUNCHES = 1000;                 // of a suite that are timed
constexpr std::size_t MOST_KERNELS = 6;                     // that are looked at: each takes a run of the suite

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

// What ncu writes to its log beside "==PROF== Connected to process 123": tables, and what went wrong.
std::string without_progress(const std::string& log) {
  std::istringstream lines(log);
  std::string result;
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("==PROF==", 0) != 0) result += line + "\n";
  }
  return result;
}

// The cells of a line of ncu's CSV: "keys_kernel","1,024".
std::vector<std::string> cells_of(const std::string& line) {
  std::vector<std::string> cells;
  bool inside = false;
  for (const char letter : line) {
    if (letter == '"') {
      inside = !inside;
      if (inside) cells.emplace_back();
    } else if (inside) {
      cells.back() += letter;
    }
  }
  return cells;
}

struct Launch {
  std::string kernel, grid, block;
  double microseconds = 0;
};

std::vector<Launch> parse_launches(const std::string& log) {
  std::istringstream lines(log);
  std::vector<std::string> names;
  std::vector<Launch> launches;
  for (std::string line; std::getline(lines, line);) {
    const std::vector<std::string> cells = cells_of(line);
    if (!cells.empty() && cells.front() == "ID") names = cells;
    if (names.empty() || cells.size() != names.size() || cells.front() == "ID" || cells.front().empty()) continue;
    Launch launch;
    for (std::size_t i = 0; i < cells.size(); ++i) {
      if (names[i] == "Kernel Name") launch.kernel = cells[i];
      if (names[i] == "Grid Size") launch.grid = cells[i];
      if (names[i] == "Block Size") launch.block = cells[i];
      if (names[i] != DURATION) continue;
      std::string digits = cells[i];  // nanoseconds, maybe as 12,345
      std::erase(digits, ',');
      launch.microseconds = 1e-3 * std::strtod(digits.c_str(), nullptr);
    }
    launches.push_back(std::move(launch));
  }
  return launches;
}

// Runs ncu with the suite, whose own output is of no interest here, and returns ncu's.
std::string ncu(std::vector<std::string> arguments, const Step& step, const KernelOptions& options) {
  const ScratchFolder scratch;
  const auto log = scratch.path() / "ncu.txt";
  Command command;
  command.argv = {"ncu", "--log-file", log.string()};
  command.argv.insert(command.argv.end(), arguments.begin(), arguments.end());
  command.argv.push_back(step.test.string());
  append_case(command.argv, options);
  const auto outcome = run(command);
  if (!outcome.started) throw Failure("cannot start ncu", "./kata doctor says what is missing on this machine");
  const std::string text = without_progress(read_file(log).value_or(""));
  if (text.find("==ERROR==") == std::string::npos) return text;
  throw Failure("ncu could not profile " + step.title() + ":\n" + text,
                "where counters are for administrators only, sudo");
}

// The longest launch of each kernel, as places in `launches`, the longest of all first.
std::vector<std::size_t> longest_of_each_kernel(const std::vector<Launch>& launches) {
  std::map<std::string, std::size_t> longest;
  for (std::size_t i = 0; i < launches.size(); ++i) {
    std::size_t& best = longest.try_emplace(launches[i].kernel, i).first->second;
    if (launches[i].microseconds > launches[best].microseconds) best = i;
  }
  std::vector<std::size_t> result;
  for (const auto& [kernel, launch] : longest) result.push_back(launch);
  std::sort(result.begin(), result.end(), [&](std::size_t one, std::size_t other) {
    return launches[one].microseconds > launches[other].microseconds;
  });
  return result;
}

// A suite has hundreds of launches, most of them of a few rows, and ncu runs each a dozen times to see all that these
// sections show. So all launches are timed, which takes one run, and the longest of each kernel is looked at.
int profile_on_gpu(const Step& step, const KernelOptions& options) {
  const std::vector<Launch> launches = parse_launches(
      ncu({"--csv", "--page", "raw", "--metrics", DURATION, "--print-units", "base", "--print-kernel-base", "function",
           "--clock-control", "none", "--cache-control", "none", "--launch-count", std::to_string(MOST_LAUNCHES)},
          step, options));
  if (launches.empty()) {
    throw Failure("the suite of " + step.title() + " launched no kernel", "./kata test " + step.number);
  }
  std::vector<std::size_t> longest = longest_of_each_kernel(launches);
  const std::size_t kernels = longest.size();
  longest.resize(std::min(kernels, MOST_KERNELS));
  if (!options.json) {
    std::cout << "\n  " << launches.size() << " launches of " << kernels << (kernels == 1 ? " kernel" : " kernels")
              << (launches.size() == MOST_LAUNCHES ? ", and there are more that were not timed" : "")
              << "; here is the longest launch of " << (kernels > MOST_KERNELS ? "those that take longest" : "each")
              << ". --case N looks at one case alone.\n";
  }
  for (const std::size_t i : longest) {
    if (!options.json) {
      std::cout << "\n  " << bold(launches[i].kernel) << "  grid " << launches[i].grid << ", block "
                << launches[i].block << ": " << std::lround(launches[i].microseconds) << " us\n\n"
                << std::flush;
    }
    std::vector<std::string> arguments = {"--launch-skip", std::to_string(i), "--launch-count", "1"};
    arguments.insert(arguments.end(), {"--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis"});
    if (options.json) arguments.insert(arguments.end(), {"--csv", "--page", "raw"});
    std::cout << ncu(std::move(arguments), step, options) << std::flush;
  }
  return 0;
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
