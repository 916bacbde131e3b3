#include <algorithm>
#include <iostream>

#include "commands.hpp"
#include "failure.hpp"
#include "files.hpp"
#include "names.hpp"
#include "pages.hpp"
#include "progress.hpp"
#include "readme.hpp"
#include "records.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

// How many hints of each step were asked for so far.
class HintsShown {
 public:
  explicit HintsShown(const Course& course) : file_(course.state() / "hints.json"), records_(read_records(file_)) {}

  std::size_t of(const Step& step) { return number_in(records_[step.label], "shown"); }

  void set(const Step& step, std::size_t count) {
    records_[step.label]["shown"] = std::to_string(count);
    std::string why;
    if (try_write_records(file_, records_, &why)) return;
    std::cerr << "  note: cannot write " << file_.string() << " (" << why
              << "), so the next hint will be this one again; "
              << "the README of the step has them all\n";
  }

 private:
  fs::path file_;
  Records records_;
};

void print(const Hint& hint) { std::cout << "  " << bold(hint.title) << "\n\n" << rendered(hint.text, 4) << "\n"; }

}  // namespace

int hint(const Course& course, const HintOptions& options) {
  Progress progress(course);
  const Step* step = options.step.empty() ? progress.current_before_judging() : &find_step(course, options.step);
  if (step == nullptr) {
    std::cout << "\n" << field("now", "every step passes; name the one whose hints you want: ./kata hint STEP") << "\n";
    return 0;
  }
  if (options.solution) return solution(course, step->number, /*give_up*/ true);
  const auto readme = parse_readme(read_file(course.readme(*step)).value_or(""));
  if (readme.hints.empty()) {
    throw Failure(step->title() + " has no hints in " + course.shown(course.readme(*step)),
                  "read that page, or ask for the solution: ./kata solution " + step->number + " --i-give-up");
  }
  HintsShown shown(course);
  const auto before = std::min(shown.of(*step), readme.hints.size());
  const std::string more = "./kata hint " + step->number;
  const std::string give_up = "./kata solution " + step->number + " --i-give-up";
  std::cout << "\n  " << bold(step->title()) << dim("   " + course.to_open(*step)) << "\n\n";
  if (options.again) {
    if (before == 0) throw Failure("no hint of " + step->title() + " was shown yet", more);
    for (std::size_t i = 0; i < before; ++i) print(readme.hints[i]);
    return 0;
  }
  if (before == readme.hints.size()) {
    std::cout << "  There are no more hints: you have seen all " << before << ".\n\n";
    std::cout << field("again", bold(more + " --again") + "   shows them once more");
    std::cout << field("or", bold(give_up) + "   shows one good answer") << "\n";
    return 0;
  }
  print(readme.hints[before]);
  shown.set(*step, before + 1);
  const auto left = readme.hints.size() - before - 1;
  std::cout << (left > 0 ? field("more", bold(more) + dim("   (" + counted(left, "hint") + " left)"))
                         : field("more", dim("that was the last one; ") + bold("./kata test " + step->number)))
            << "\n";
  return 0;
}

}  // namespace kata
