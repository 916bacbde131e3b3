#include <algorithm>
#include <iostream>

#include "backup.hpp"
#include "commands.hpp"
#include "files.hpp"
#include "process.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

constexpr std::size_t NAME_WIDTH = 18;

class Report {
 public:
  void fine(const std::string& name, const std::string& what) { line(green("ok     "), name, what); }
  void optional(const std::string& name, const std::string& cost) { line(yellow("absent "), name, cost); }
  void note(const std::string& name, const std::string& what) { line(yellow("look   "), name, what); }
  void broken(const std::string& name, const std::string& what) {
    line(red("MISSING"), name, what);
    ++problems_;
  }
  void title(const std::string& text) { std::cout << "\n  " << bold(text) << "\n"; }
  int problems() const { return problems_; }

 private:
  static void line(const std::string& sign, const std::string& name, const std::string& text) {
    std::cout << "  " << sign << " " << padded(name, NAME_WIDTH) << wrapped(text, NAME_WIDTH + 10) << "\n"
              << std::flush;
  }
  int problems_ = 0;
};

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

std::string cached(const fs::path& build, const std::string& name) {
  const auto cache = read_file(build / "CMakeCache.txt").value_or("");
  const auto at = cache.find("\n" + name + ":");
  if (at == std::string::npos) return {};
  const auto start = cache.find('=', at) + 1;
  return cache.substr(start, cache.find('\n', start) - start);
}

void tool(Report& report, const std::string& name, std::vector<std::string> argv, const std::string& cost,
          bool required) {
  const auto version = first_line(output_of(std::move(argv)));
  if (!version.empty()) {
    report.fine(name, version);
  } else if (required) {
    report.broken(name, cost);
  } else {
    report.optional(name, cost);
  }
}

void tools(Report& report, const std::string& compiler) {
  report.title("What every step needs");
  tool(report, "C++20 compiler", {compiler, "--version"}, "nothing can be built: apt-get install g++", true);
  tool(report, "cmake", {"cmake", "--version"}, "nothing can be configured: apt-get install cmake", true);
  tool(report, "ninja", {"ninja", "--version"}, "nothing can be built: apt-get install ninja-build", true);
  tool(report, "git", {"git", "--version"}, "./kata reset, handout and course updates: apt-get install git", true);
}

struct Header {
  const char* name;
  const char* test;  // for the preprocessor
  const char* absent;
};
constexpr Header HEADERS[] = {
    {"doctest", "__has_include(<doctest/doctest.h>)", "CMake fetches it (needs a network once): doctest-dev"},
    {"Eigen", "__has_include(<eigen3/Eigen/Core>) || __has_include(<Eigen/Core>)",
     "CMake fetches it (needs a network once): libeigen3-dev"},
    {"CLI11", "__has_include(<CLI/CLI.hpp>)", "CMake fetches it (needs a network once): libcli11-dev"},
    {"nlohmann-json", "__has_include(<nlohmann/json.hpp>)",
     "CMake fetches it (needs a network once): nlohmann-json3-dev"},
    {"Boost.Context", "__has_include(<boost/context/fiber.hpp>)",
     "kernels on the virtual GPU: apt-get install libboost-context-dev"},
    {"Google Benchmark", "__has_include(<benchmark/benchmark.h>)",
     "./kata bench: CMake fetches it (needs a network once): libbenchmark-dev"},
    {"NCCL", "__has_include(<nccl.h>)",
     "step 4.08 on several GPUs: apt-get install libnccl-dev, or NCCL_ROOT=... when you configure"},
};

// One run of the preprocessor answers for all of them, wherever this compiler looks.
void libraries(Report& report, const std::string& compiler) {
  report.title("Libraries");
  Command command;
  command.argv = {compiler, "-std=c++20", "-E", "-P", "-x", "c++", "-"};
  command.errors_apart = true;
  for (const auto& header : HEADERS) {
    command.input += std::string("#if ") + header.test + "\nhas " + header.name + "\n#endif\n";
  }
  const auto outcome = run(command);
  for (const auto& header : HEADERS) {
    const bool here = outcome.output.find(std::string("has ") + header.name) != std::string::npos;
    if (here) {
      report.fine(header.name, "installed");
    } else {
      report.optional(header.name, header.absent);
    }
  }
}

void gpu(Report& report) {
  report.title("For a real GPU, and for comparison (all optional)");
  const auto cards = output_of({"nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"});
  if (cards.empty()) {
    report.optional("GPU", "kernels run on the virtual GPU instead, with checks; no timings of your own");
  } else {
    report.fine("GPU", first_line(cards) + (cards.find('\n') == std::string::npos ? "" : ", and more"));
  }
  const auto nvcc = output_of({"nvcc", "--version"});
  const auto release = nvcc.find("release ");
  if (release == std::string::npos) {
    report.optional("nvcc", "the learn-cuda preset: kernels compile for the virtual GPU only");
  } else {
    report.fine("nvcc", first_line(nvcc.substr(release)));
  }
  const auto torch = output_of({"python3", "-c", "import importlib.metadata as m; print(m.version('torch'))"});
  if (torch.empty()) {
    report.optional("PyTorch", "side-by-side timing and the drop-in; no step needs it");
  } else {
    report.fine("PyTorch", torch);
  }
  tool(report, "MPI", {"mpiexec", "--version"},
       "step 4.08 is judged on one rank only: apt-get install libopenmpi-dev openmpi-bin, then cmake --preset learn",
       false);
  tool(report, "clang-format", {"clang-format", "--version"}, "formatting as the course does; no step needs it", false);
}

void build_folder(Report& report, const Course& course) {
  report.title("This tree");
  report.fine("preset", course.preset + " in " + course.shown(course.build));
  if (fs::path(cached(course.build, "CMAKE_HOME_DIRECTORY")) != course.source) {
    report.broken("build folder",
                  "it belongs to another tree: delete " + course.shown(course.build) + " and run ./kata");
  } else if (!fs::exists(course.build / "build.ninja")) {
    report.broken("build folder", "it was not configured to the end: ./kata does it again");
  } else {
    report.fine("build folder", "configured, " + std::to_string(course.steps.size()) + " steps");
  }
  std::error_code error;
  const auto free = fs::space(course.build, error).available >> 20;
  if (error || free < 1024) {
    report.note("free disk", std::to_string(free) + " MiB; a build of everything takes about 1 GiB");
  } else {
    report.fine("free disk", std::to_string(free >> 10) + " GiB");
  }
  std::string why;
  const auto probe = course.state() / "writable";
  if (try_write_file(probe, "", &why)) {
    fs::remove(probe, error);
    report.fine("state", course.shown(course.state()) + " is writable");
  } else {
    report.note("state", course.shown(course.state()) + " is not writable (" + why +
                             "): verdicts, hints and backups are not kept");
  }
  report.fine("solutions", fs::exists(course.hidden_root()) ? "here; ./kata solution opens one after a pass"
                                                            : "not in this tree, as handed out");
}

// A stub that both the student and the course changed is the only thing that git pull can stumble over.
void updates(Report& report, const Course& course) {
  const auto upstream = git(course, {"rev-parse", "--abbrev-ref", "@{upstream}"});
  if (!upstream) {
    report.fine("course updates", "no upstream branch to compare with");
    return;
  }
  const auto base = git(course, {"merge-base", "HEAD", "@{upstream}"});
  const std::string common = base ? first_line(*base) : "HEAD";
  std::size_t clashes = 0;
  for (const auto& step : course.steps) {
    for (const auto& file : step.files) {
      const auto path = "./" + step.folder + "/" + file;
      const auto before = git(course, {"show", common + ":" + path});
      const auto theirs = git(course, {"show", "@{upstream}:" + path});
      const auto mine = read_file(course.source / step.folder / file);
      if (!before || !theirs || !mine || *before == *theirs || *mine == *before || *mine == *theirs) continue;
      ++clashes;
      report.note(
          "stub changed",
          step.folder + "/" + file + " was changed by the course since you filled it: ./kata reset " + step.number +
              " (it backs yours up), git commit if you had committed yours, git pull, then copy your lines back in");
    }
  }
  if (clashes == 0)
    report.fine("course updates", "git pull from " + first_line(*upstream) + " touches no file that you filled");
}

}  // namespace

int doctor(const Course& course) {
  Report report;
  auto compiler = cached(course.build, "CMAKE_CXX_COMPILER");
  if (compiler.empty()) compiler = "c++";
  tools(report, compiler);
  libraries(report, compiler);
  gpu(report);
  build_folder(report, course);
  updates(report, course);
  std::cout << "\n";
  if (report.problems() == 0) {
    std::cout << field("next", bold("./kata"));
    return 0;
  }
  std::cout << "  " << red(counted(static_cast<std::size_t>(report.problems()), "problem"))
            << "; the lines marked MISSING say what to do\n";
  return 1;
}

}  // namespace kata
