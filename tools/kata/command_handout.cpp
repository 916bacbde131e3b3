#include <iostream>

#include "backup.hpp"
#include "commands.hpp"
#include "failure.hpp"
#include "files.hpp"
#include "process.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

constexpr const char* WITHOUT_SOLUTIONS = ":(exclude)solutions";

// Runs in `folder`; throws with the command's own words where it fails.
void must(const fs::path& folder, std::vector<std::string> argv) {
  Command command;
  command.argv = std::move(argv);
  command.folder = folder;
  const auto outcome = run(command);
  if (outcome.ok()) return;
  throw Failure(command.argv[0] + " failed in " + folder.string() + ": " + outcome.output,
                "empty that folder and run the same command again");
}

// git without what the instructor's own configuration would add: hooks, signatures, another name.
std::vector<std::string> plain_git(std::vector<std::string> arguments) {
  std::vector<std::string> argv = {"git",
                                   "-c",
                                   "user.name=FlashKata",
                                   "-c",
                                   "user.email=flashkata@localhost",
                                   "-c",
                                   "commit.gpgsign=false",
                                   "-c",
                                   "core.hooksPath=/dev/null",
                                   "-c",
                                   "init.defaultBranch=main",
                                   "-c",
                                   "init.templateDir="};
  argv.insert(argv.end(), arguments.begin(), arguments.end());
  return argv;
}

}  // namespace

int handout(const Course& course, const fs::path& folder) {
  std::error_code error;
  const fs::path target = fs::absolute(folder).lexically_normal();
  if (fs::exists(target) && !fs::is_directory(target))
    throw Failure(target.string() + " is a file", "name a new folder", 2);
  if (fs::exists(target) && !fs::is_empty(target)) {
    throw Failure(target.string() + " is not empty", "name a new folder, or empty this one", 2);
  }
  const auto head = git(course, {"rev-parse", "--short", "HEAD"});
  if (!head) throw Failure("a handout is made of the last commit, and there is none here", "git commit, then again");
  const auto changed = git(course, {"status", "--porcelain", "--untracked-files=no", "--", ".", WITHOUT_SOLUTIONS});

  fs::create_directories(target, error);
  if (error)
    throw Failure("cannot make " + target.string() + ": " + error.message(), "name a folder that you may write");
  // What the last commit holds, not what lies here: an instructor's own filled stubs and notes stay at home.
  const ScratchFolder scratch;
  const auto archive = (scratch.path() / "course.tar").string();
  must(course.source, {"git", "archive", "--format=tar", "--output=" + archive, "HEAD", "--", ".", WITHOUT_SOLUTIONS});
  must(target, {"tar", "-xf", archive});
  if (fs::exists(target / "solutions")) {
    throw Failure("the solutions came along into " + target.string(), "do not hand it out; this is our bug");
  }
  // A repository of its own, so that ./kata reset finds the stubs.
  must(target, plain_git({"init", "--quiet"}));
  must(target, plain_git({"add", "--all"}));
  must(target, plain_git({"commit", "--quiet", "--message", "FlashKata, as handed out"}));
  const auto commit = head->substr(0, head->find('\n'));
  std::cout << field("made", cyan(target.string()) + ": commit " + commit + " without solutions/");
  if (changed && !changed->empty()) {
    std::cout << field("note", yellow("this tree has changes that are not committed; they are not in it"));
  }
  std::cout << field("next", "pack that folder, or push it: students start with ./kata in it");
  std::cout << field("later", "./kata grade DIR...   on what comes back");
  return 0;
}

}  // namespace kata
