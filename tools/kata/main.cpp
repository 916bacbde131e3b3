// The program behind ./kata: reads what was typed, and hands over to the command.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <iostream>

#include "commands.hpp"
#include "failure.hpp"
#include "names.hpp"
#include "pages.hpp"
#include "process.hpp"
#include "terminal.hpp"

namespace {

using namespace kata;

constexpr const char* STEP_HELP = "1.02, attention, 02_attention, phase1.02_attention or its path";

Course load_course() {
  const char* manifest = std::getenv("KATA_COURSE");
  if (manifest == nullptr) throw Failure("KATA_COURSE is not set", "start with the script ./kata, which sets it");
  return Course::load(manifest);
}

// What was typed, as options of each command.
struct Typed {
  TestOptions test;
  HintOptions hint;
  KernelOptions kernel;
  std::string where = "virtual";
  BenchOptions bench;
  std::string csv;
  GradeOptions grade;
  std::string step;
  std::string folder;
  std::string out;
  std::vector<std::string> submissions;
  bool give_up = false;
};

class CommandLine {
 public:
  CommandLine() {
    app_.set_help_flag("-h,--help", "This page, or a command's own: ./kata test --help");
    app_.require_subcommand(0, 1);
    app_.name("./kata");
    app_.footer(
        "Also: --preset NAME (or KATA_PRESET) picks the build, learn by default;\n"
        "      --no-install never installs a package. Colours: NO_COLOR turns them off.");
    student();
    instructor();
  }

  int run(int argc, char** argv) {
    refuse_unknown(argc, argv);
    try {
      app_.parse(argc, argv);
    } catch (const CLI::CallForHelp&) {
      std::cout << help();
      return 0;
    } catch (const CLI::ParseError& error) {
      const auto used = app_.get_subcommands();
      throw Failure(error.what(), "./kata " + (used.empty() ? "" : used.front()->get_name() + " ") + "--help", 2);
    }
    const Course course = load_course();
    return chosen_ ? chosen_(course) : show_progress(course);
  }

 private:
  CLI::App* command(const std::string& name, const std::string& what, const std::string& example,
                    std::function<int(const Course&)> action) {
    CLI::App* sub = app_.add_subcommand(name, what);
    sub->footer("Example: " + example);
    sub->callback([this, action] { chosen_ = action; });
    names_.push_back(name);
    return sub;
  }

  void student() {
    auto* test_command =
        command("test", "Build and judge a step, a phase or all; alone: the current step", "./kata test 1.02 --case 7",
                [this](const Course& course) { return test(course, typed_.test); });
    test_command->add_option("step", typed_.test.which, std::string(STEP_HELP) + "; phase1; all");
    test_command->add_option("--case", typed_.test.only_case, "Only this numbered input")->check(CLI::PositiveNumber);
    test_command->add_option("--name", typed_.test.only_name, "Only tests whose name contains this text");

    const auto kernel_options = [this](CLI::App* sub) {
      sub->add_option("step", typed_.kernel.step, STEP_HELP)->required();
      sub->add_option("--case", typed_.kernel.only_case, "Only this numbered input")->check(CLI::PositiveNumber);
      sub->add_option("--on", typed_.where, "virtual, or gpu: compute-sanitizer and ncu on a real one")
          ->check(CLI::IsMember({"virtual", "gpu"}));
    };
    kernel_options(command("check", "What a step's kernels do wrong: races, stray accesses, missed barriers",
                           "./kata check 2.00", [this](const Course& course) {
                             typed_.kernel.on_gpu = typed_.where == "gpu";
                             return check(course, typed_.kernel);
                           }));
    auto* profile_command = command("profile", "What a step's kernels move: bytes, sectors, bank conflicts, by line",
                                    "./kata profile 2.00", [this](const Course& course) {
                                      typed_.kernel.on_gpu = typed_.where == "gpu";
                                      return profile(course, typed_.kernel);
                                    });
    kernel_options(profile_command);
    profile_command->add_flag("--json", typed_.kernel.json, "For programs");

    auto* bench_command = command("bench", "How fast your steps are, beside the roofline and beside PyTorch",
                                  "./kata bench 2.05 --grid quick --against torch", [this](const Course& course) {
                                    typed_.bench.csv = typed_.csv;
                                    return bench(course, typed_.bench);
                                  });
    bench_command->add_option("step", typed_.bench.which, std::string(STEP_HELP) + "; phase2; all");
    bench_command->add_option("--grid", typed_.bench.grid, "quick (a minute or two) or full")
        ->check(CLI::IsMember({"quick", "full"}));
    bench_command->add_option("--csv", typed_.csv, "A file that the results are added to; goes on where it ends");
    bench_command->add_option("--against", typed_.bench.against, "torch: PyTorch's kernels, alternated with yours")
        ->check(CLI::IsMember({"torch"}));
    bench_command->add_option("--on", typed_.bench.on, "gpu or cpu: only the steps that run there")
        ->check(CLI::IsMember({"gpu", "cpu"}));

    command("next", "The next step: its question, the file to open", "./kata next",
            [](const Course& course) { return show_next(course); });

    auto* watch_command = command("watch", "Judge at every save; moves on when the step passes", "./kata watch",
                                  [this](const Course& course) { return watch(course, typed_.step); });
    watch_command->add_option("step", typed_.step, STEP_HELP);

    auto* hint_command = command("hint", "One hint more each time, three in all", "./kata hint 1.02",
                                 [this](const Course& course) { return hint(course, typed_.hint); });
    hint_command->add_option("step", typed_.hint.step, STEP_HELP);
    hint_command->add_flag("--again", typed_.hint.again, "The hints that were shown before");
    hint_command->add_flag("--solution", typed_.hint.solution, "Give up: one good answer instead of a hint");

    auto* solution_command =
        command("solution", "Compare yours with one good answer, after a pass", "./kata solution 1.02",
                [this](const Course& course) { return solution(course, typed_.step, typed_.give_up); });
    solution_command->add_option("step", typed_.step, STEP_HELP)->required();
    solution_command->add_flag("--i-give-up", typed_.give_up, "Show it although yours does not pass");

    auto* reset_command = command("reset", "The stub again; yours is backed up first", "./kata reset 1.02",
                                  [this](const Course& course) { return reset(course, typed_.step); });
    reset_command->add_option("step", typed_.step, STEP_HELP)->required();

    command("list", "Every step and how it stands", "./kata list",
            [](const Course& course) { return show_list(course); });
    command("doctor", "What this machine has, and what each missing thing costs you", "./kata doctor",
            [](const Course& course) { return doctor(course); });
    command("verify", "Build the hidden solutions and pass every test of the course", "./kata verify",
            [](const Course& course) { return verify(course); });
  }

  void instructor() {
    auto* handout_command = command("handout", "For instructors: this course without its solutions, in a new folder",
                                    "./kata handout ../flashkata-2024",
                                    [this](const Course& course) { return handout(course, typed_.folder); });
    handout_command->add_option("folder", typed_.folder, "A folder that is empty or does not exist")->required();

    auto* grade_command = command("grade", "For instructors: judge what came back, into a score file",
                                  "./kata grade submissions/* --out scores.json", [this](const Course& course) {
                                    for (const auto& each : typed_.submissions)
                                      typed_.grade.submissions.emplace_back(each);
                                    typed_.grade.out = typed_.out;
                                    return grade(course, typed_.grade);
                                  });
    grade_command->add_option("folders", typed_.submissions, "Students' trees; only the files they fill are taken")
        ->required();
    grade_command->add_option("--only", typed_.grade.only, "A phase or a step; all by default");
    grade_command->add_option("--out", typed_.out, "The score file (.kata/grade/scores.json)");
    grade_command->add_option("--limit", typed_.grade.limit_s, "Seconds that a step's tests may take (60)")
        ->check(CLI::PositiveNumber);
  }

  std::string help() const {
    const auto used = app_.get_subcommands();
    return used.empty() ? app_.help() : used.front()->help("./kata");
  }

  // CLI11 would only say that an argument was not expected.
  void refuse_unknown(int argc, char** argv) const {
    if (argc < 2 || argv[1][0] == '-') return;
    const std::string word = argv[1];
    if (word == "help") throw Failure("'help' is an option", "./kata --help, or of a command: ./kata test --help", 2);
    if (std::find(names_.begin(), names_.end(), word) != names_.end()) return;
    const auto near = near_names(word, names_);
    std::vector<std::string> commands;
    for (const auto& name : near) commands.push_back("./kata " + name);
    std::string next = commands.empty() ? "./kata --help lists them" : "did you mean " + either(commands) + "?";
    if (commands.empty()) {
      try {
        next = "did you mean ./kata test " + find_step(load_course(), word).number + "?";
      } catch (const Failure&) {  // no step either
      }
    }
    throw Failure("there is no command '" + word + "'", next, 2);
  }

  CLI::App app_{"FlashKata: attention from scratch, step by step. Without a command: where you are."};
  std::vector<std::string> names_;
  std::function<int(const Course&)> chosen_;
  Typed typed_;
};

}  // namespace

int main(int argc, char** argv) {
  catch_interrupts();
  try {
    const int code = CommandLine().run(argc, argv);
    std::cout << std::flush;
    if (!std::cout) throw Failure("cannot write to standard output", "is the disk full?");
    return code;
  } catch (const Failure& failure) {
    std::cout << std::flush;
    std::cerr << "\n  " << failure.what() << "\n\n  next       " << failure.next() << "\n\n";
    return failure.code();
  } catch (const Interrupted&) {
    std::cout << std::flush;
    std::cerr << "\n  stopped; nothing is half written\n";
    return 130;
  } catch (const std::exception& error) {
    std::cerr << "\n  " << error.what() << "\n\n  next       ./kata doctor\n\n";
    return 1;
  }
}
