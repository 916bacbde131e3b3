#include "pages.hpp"

#include <algorithm>
#include <iostream>
#include <vector>

#include "files.hpp"
#include "readme.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

struct Phase {
  int number = 0;
  std::string name;
  std::size_t done = 0;
  std::size_t total = 0;
};

std::vector<Phase> phases_of(const Course& course, const Progress& progress) {
  std::vector<Phase> phases;
  for (const auto& step : course.steps) {
    if (phases.empty() || phases.back().number != step.phase) phases.push_back({step.phase, step.phase_name});
    ++phases.back().total;
    if (progress.of(step).state == State::done) ++phases.back().done;
  }
  return phases;
}

std::string right_aligned(const std::string& text, std::size_t width) {
  const auto used = columns(text);
  return std::string(used < width ? width - used : 0, ' ') + text;
}

// Steps before this one that it calls and that do not pass: the reason may lie there.
std::string weak_ground(const Course& course, const Progress& progress, const Step& step) {
  std::vector<std::string> weak;
  for (const Step* need : course.with_needs(step)) {
    if (need != &step && progress.of(*need).state != State::done) weak.push_back(need->title());
  }
  if (weak.empty()) return {};
  std::string names;
  for (const auto& name : weak) names += (names.empty() ? "" : ", ") + name;
  return "it calls your " + names + (weak.size() == 1 ? ", which does not pass yet" : ", which do not pass yet");
}

}  // namespace

std::string mark(State state) {
  switch (state) {
    case State::done:
      return green("[x]");
    case State::unfilled:
      return dim("[ ]");
    case State::skipped:
      return dim("[-]");
    default:
      return red("[!]");
  }
}

std::string progress_bars(const Course& course, const Progress& progress) {
  const auto phases = phases_of(course, progress);
  std::size_t done = 0;
  std::size_t total = 0;
  std::size_t longest = 0;
  for (const auto& phase : phases) {
    done += phase.done;
    total += phase.total;
    longest = std::max(longest, phase.name.size());
  }
  const std::size_t width = std::min<std::size_t>(Terminal::out().width, 80) - 2;
  const std::string name = "  " + bold("FlashKata");
  const std::string count = std::to_string(done) + " of " + counted(total, "step");
  std::string text = name + right_aligned(count, width - columns(name)) + "\n\n";
  for (const auto& phase : phases) {
    const std::string label = "  " + std::to_string(phase.number) + " " + padded(phase.name, longest) + "   ";
    const std::string share = right_aligned(std::to_string(phase.done) + "/" + std::to_string(phase.total), 7);
    text += label + bar(phase.done, phase.total, width - columns(label) - columns(share)) + share + "\n";
  }
  return text;
}

std::string current_page(const Course& course, const Progress& progress, const Step& step) {
  const auto& verdict = progress.of(step);
  const auto readme = parse_readme(read_file(course.readme(step)).value_or(""));
  std::string text = field("now", bold(step.title()) + "   " + step.idea);
  if (verdict.state != State::unfilled) {
    const bool red_state = verdict.state != State::done && verdict.state != State::skipped;
    text += field("stands", red_state ? red(in_words(verdict)) : in_words(verdict));
  }
  if (const auto weak = weak_ground(course, progress, step); !weak.empty()) text += field("note", yellow(weak));
  // What the suite asked about this very answer leads further than the step's own question.
  const auto& question = verdict.question.empty() ? readme.question : verdict.question;
  if (!question.empty()) text += "\n" + field("ask", question) + "\n";
  text += field("open", cyan(course.to_open(step)));
  for (std::size_t i = 1; i < step.files.size(); ++i) {
    text += field("and", cyan(course.shown(course.filled(step)[i])));
  }
  return text + field("read", course.shown(course.readme(step)));
}

std::string what_to_type(const Progress& progress, const Step& step) {
  const auto& verdict = progress.of(step);
  std::string command = "./kata test";
  std::string also = "(./kata watch judges at every save)";
  if (verdict.state == State::missing) {
    command = "./kata reset " + step.number;
    also = "(brings the stub back)";
  } else if (verdict.state == State::failing) {
    also = "(./kata hint helps you on)";
  }
  return field("type", bold(command) + "   " + dim(also));
}

std::string finished_page(const Course& course, const Progress& progress) {
  std::size_t skipped = 0;
  for (const auto& step : course.steps) {
    if (progress.of(step).state == State::skipped) ++skipped;
  }
  std::string text = field("now", green("every step that this machine can run passes"));
  if (skipped > 0) text += field("note", counted(skipped, "step") + " need what this machine has not: ./kata doctor");
  return text + field("type", bold("./kata solution " + course.steps.back().number) + "   " +
                                  dim("(compare each answer with ours)"));
}

namespace {

std::string page_of(const Course& course, const Progress& progress, const Step* step) {
  if (step == nullptr) return finished_page(course, progress);
  return current_page(course, progress, *step) + what_to_type(progress, *step);
}

}  // namespace

int show_progress(const Course& course) {
  Progress progress(course);
  progress.refresh();
  std::cout << "\n" << progress_bars(course, progress) << "\n";
  const Step* step = progress.current();
  std::cout << page_of(course, progress, step) << "\n";
  return 0;
}

int show_list(const Course& course) {
  Progress progress(course);
  progress.refresh();
  const Step* current = progress.current();
  std::size_t longest = 0;
  for (const auto& step : course.steps) longest = std::max(longest, step.name.size());
  int phase = -1;
  for (const auto& step : course.steps) {
    if (step.phase != phase) std::cout << "\n  " << bold(std::to_string(step.phase) + " " + step.phase_name) << "\n";
    phase = step.phase;
    const auto& verdict = progress.of(step);
    std::cout << (&step == current ? "> " : "  ") << mark(verdict.state) << " " << step.number << " "
              << padded(step.name, longest) << "   " << wrapped(step.idea, longest + 14) << "\n";
    if (verdict.state == State::failing || verdict.state == State::broken || verdict.state == State::missing) {
      std::cout << std::string(longest + 14, ' ') << red(wrapped(in_words(verdict), longest + 14)) << "\n";
    }
  }
  std::cout << "\n  " << dim("[x] passes  [!] does not  [ ] not filled  [-] cannot run here  > the next to do")
            << "\n\n";
  return 0;
}

int show_next(const Course& course) {
  Progress progress(course);
  progress.refresh();
  const Step* step = progress.current();
  std::cout << "\n" << page_of(course, progress, step);
  if (step != nullptr && progress.of(*step).state != State::unfilled) {
    std::cout << "\n  "
              << wrapped(
                     "./kata next moves on when this step passes; any other step can be worked on at any "
                     "time by its name, for example ./kata watch " +
                         course.steps.back().number,
                     2)
              << "\n";
  }
  std::cout << "\n";
  return 0;
}

}  // namespace kata
