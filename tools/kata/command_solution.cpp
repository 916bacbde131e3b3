#include <algorithm>
#include <iostream>

#include "backup.hpp"
#include "commands.hpp"
#include "failure.hpp"
#include "files.hpp"
#include "names.hpp"
#include "process.hpp"
#include "progress.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

// A unified diff, coloured on a terminal; empty where the two are the same. What is not there is empty.
std::string difference(const Course& course, const fs::path& mine, const fs::path& ours) {
  Command command;
  command.folder = course.source;  // so that the paths in it are short
  const std::string colour = Terminal::out().colour ? "--color=always" : "--color=never";
  const std::string left = fs::exists(mine) ? course.shown(mine) : "/dev/null";
  const std::string right = course.shown(ours);
  command.argv = {"git", "--no-pager", "diff", "--no-index", "--no-ext-diff", colour, "--", left, right};
  auto outcome = run(command);
  if (!outcome.started || outcome.exit_code > 1) {
    command.argv = {"diff", "-u", left, right};
    outcome = run(command);
  }
  if (!outcome.started || outcome.exit_code > 1) {
    throw Failure("cannot compare " + left + " with " + right + ": " + outcome.output, "open both side by side");
  }
  return outcome.output;
}

// What lies beside the answers, is no file of the step, and is included by its answer but not by the student's own.
std::vector<fs::path> parts_of_answer(const Course& course, const Step& step) {
  const auto included_by = [&](const std::vector<fs::path>& files) {
    return included_below(course.hidden_root(), files, course.source);
  };
  auto known = included_by(course.filled(step));
  for (const auto& file : course.hidden(step)) known.push_back(file.lexically_normal());
  auto parts = included_by(course.hidden(step));
  std::erase_if(parts,
                [&](const fs::path& part) { return std::find(known.begin(), known.end(), part) != known.end(); });
  return parts;
}

void refuse_foreign_answers(const Course& course, const std::string& command) {
  if (course.answers == course.source) return;
  throw Failure("the preset " + course.preset + " takes its answers from " + course.shown(course.answers) +
                    ", which are not yours",
                "KATA_PRESET=learn ./kata " + command, 2);
}

}  // namespace

int solution(const Course& course, const std::string& name, bool give_up) {
  refuse_foreign_answers(course, "solution " + name);
  const Step& step = find_step(course, name);
  const auto hidden = course.hidden(step);
  const bool here = std::all_of(hidden.begin(), hidden.end(), [](const fs::path& file) { return fs::exists(file); });
  if (!here) {
    throw Failure("this tree was handed out without its solutions (" + course.shown(hidden.front()) + ")",
                  "ask whoever handed it out, or look in the course's own repository; ./kata hint " + step.number +
                      " is still here");
  }
  Progress progress(course);
  progress.refresh({&step});
  const auto& verdict = progress.of(step);
  if (verdict.state != State::done && !give_up) {
    throw Failure("the solution of " + step.title() + " opens when your own passes; now it is: " + in_words(verdict),
                  "./kata hint " + step.number + ", or ./kata solution " + step.number + " --i-give-up");
  }
  std::cout << "\n  " << bold(step.title()) << ": yours (-) and one good answer (+); there are others\n\n";
  bool same = true;
  for (std::size_t i = 0; i < hidden.size(); ++i) {
    const auto text = difference(course, course.filled(step)[i], hidden[i]);
    same = same && text.empty();
    std::cout << text;
  }
  if (same) std::cout << "  no difference\n";
  std::string names;
  for (const auto& part : parts_of_answer(course, step)) {
    std::cout << difference(course, "/dev/null", part);
    names += (names.empty() ? "" : ", ") + course.shown(part);
  }
  std::cout << "\n";
  if (!names.empty()) std::cout << field("with", names + ", which the answer includes from there");
  std::cout << field("next", bold(verdict.state == State::done ? "./kata next" : "./kata test " + step.number)) << "\n";
  return 0;
}

int reset(const Course& course, const std::string& name) {
  refuse_foreign_answers(course, "reset " + name);
  const Step& step = find_step(course, name);
  const auto files = course.filled(step);
  std::vector<Stub> stubs;
  for (const auto& file : files) {
    const auto stub = find_stub(course, file);
    if (!stub) {
      throw Failure("cannot find the stub of " + course.shown(file) + ": not in git, and no copy in .kata/stubs",
                    "fetch that file from where you got the course; yours is unchanged");
    }
    stubs.push_back(*stub);
  }
  bool same = true;
  bool any = false;
  for (std::size_t i = 0; i < files.size(); ++i) {
    same = same && read_file(files[i]) == stubs[i].text;
    any = any || fs::exists(files[i]);
  }
  if (same) {
    std::cout << field("same", "nothing to do: " + course.to_open(step) + " is the stub already");
    return 0;
  }
  if (any) std::cout << field("saved", "yours, to " + course.shown(back_up(course, step)) + "/") << std::flush;
  for (std::size_t i = 0; i < files.size(); ++i) {
    write_file(files[i], stubs[i].text);
    std::cout << field("reset", cyan(course.shown(files[i])) + " is the stub again (from " + stubs[i].origin + ")");
  }
  std::cout << field("next", bold("./kata test " + step.number));
  return 0;
}

}  // namespace kata
