#include <array>
#include <ctime>
#include <iostream>
#include <memory>

#include "build.hpp"
#include "commands.hpp"
#include "failure.hpp"
#include "file_watch.hpp"
#include "files.hpp"
#include "names.hpp"
#include "pages.hpp"
#include "process.hpp"
#include "progress.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

std::string clock_time() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  ::localtime_r(&now, &parts);
  std::array<char, 16> text{};
  std::strftime(text.data(), text.size(), "%H:%M:%S", &parts);
  return text.data();
}

// What a verdict on the step depends on and somebody may be editing.
std::vector<fs::path> files_of(const Course& course, const Step& step) {
  std::vector<fs::path> files;
  for (const Step* each : course.with_needs(step)) {
    for (const auto& file : course.filled(*each)) files.push_back(file);
  }
  std::error_code error;
  for (fs::directory_iterator entry(course.source / step.folder, error), end; !error && entry != end;
       entry.increment(error)) {
    const auto extension = entry->path().extension();
    if (extension == ".hpp" || extension == ".cpp" || extension == ".cu") files.push_back(entry->path());
  }
  return files;
}

class Watch {
 public:
  Watch(const Course& course, const Step& step) : course_(course) { turn_to(step); }

  int run() {
    introduce();
    for (;;) {
      files_->wait(keys_.descriptor());
      throw_if_interrupted();
      const char key = keys_.pressed();
      if (key == 'q') {
        std::cout << "\n  stopped watching; ./kata shows where you are\n";
        return 0;
      }
      bool judge_now = key == 'r';
      if (files_->changed()) {
        files_->settle();
        judge_now = true;
      }
      if (judge_now && judge()) return 0;
      if (key == 'h') show_hint();
      if (key == 'n') show_where();
    }
  }

 private:
  void turn_to(const Step& step) {
    step_ = &step;
    renew_times(course_, {&step});  // before the first look, or it would be taken for a save
    files_ = std::make_unique<FileWatch>(files_of(course_, step));
  }

  void clear() const {
    if (Terminal::out().interactive) std::cout << "\033[H\033[2J\033[3J";
  }

  void say_keys() const {
    std::cout << field("watching", "save " + course_.to_open(*step_) + " for a verdict");
    std::cout << field("keys", keys_.descriptor() < 0 ? "Ctrl-C ends" : "h hint   r run again   n where am I   q quit");
    std::cout << std::flush;
  }

  // Builds all but the answer while the student reads, so that the first verdict is as quick as the others.
  void prepare() const {
    build_step(course_, *step_, [this] { return files_->has_change(); });
  }

  void introduce() {
    clear();
    Progress progress(course_);
    progress.refresh();
    if (progress.of(*step_).state == State::unfilled) {
      std::cout << "\n" << progress_bars(course_, progress) << "\n" << current_page(course_, progress, *step_) << "\n";
      say_keys();
      prepare();
    } else if (progress.of(*step_).state == State::done) {
      std::cout << "\n  " << step_->title() << " passes already\n\n";
      say_keys();
    } else {
      judge();
    }
  }

  void show_hint() const {
    try {
      hint(course_, {step_->number});
    } catch (const Failure& failure) {
      std::cout << "  " << failure.what() << "\n" << field("next", failure.next());
    }
    std::cout << std::flush;
  }

  void show_where() const {
    Progress progress(course_);
    progress.refresh();
    std::cout << "\n" << progress_bars(course_, progress) << "\n" << current_page(course_, progress, *step_) << "\n";
    say_keys();
  }

  // A verdict on what is saved now; true when there is nothing left to do.
  bool judge() {
    for (;;) {
      clear();
      std::cout << "\n  " << bold(step_->title()) << dim("   " + clock_time()) << "\n" << std::flush;
      Progress progress(course_);
      const auto judged = progress.key(*step_);
      const auto saved_again = [this] { return files_->has_change(); };
      const auto build = build_step(course_, *step_, saved_again);
      SuiteRun tests;
      if (build.ok) {
        SuiteOptions options;
        options.limit_s = time_limit(*step_);
        options.give_up = saved_again;
        tests = run_suite(*step_, options);
      }
      if (build.given_up || tests.given_up) {
        files_->changed();
        files_->settle();
        continue;
      }
      if (!build.ok) {
        progress.record_broken(*step_, judged, build.own_error);
        std::cout << "\n" << red("  does not compile") << "\n\n" << build.errors << "\n";
      } else {
        progress.record(*step_, judged, tests);
        if (!tests.summary)
          std::cout << "\n" << red("  " + step_->title() + " " + tests.mishap(time_limit(*step_))) << "\n";
        if (progress.of(*step_).state == State::done) return move_on(progress);
        std::cout << "\n";
      }
      say_keys();
      return false;
    }
  }

  // The step passes: says so, names what is passed over and why, and turns to the next that is to be done.
  bool move_on(Progress& progress) {
    std::cout << "\n  " << green(step_->title() + " passes") << "   "
              << dim("./kata solution " + step_->number + " compares yours with ours") << "\n";
    progress.refresh();
    const Step* next = nullptr;
    for (const auto& step : course_.steps) {
      if (&step <= step_) continue;
      const State state = progress.of(step).state;
      if (state != State::done && state != State::skipped) {
        next = &step;
        break;
      }
      std::cout << "  " << dim(step.title() + ": " + in_words(progress.of(step)) + ", so on") << "\n";
    }
    if (next == nullptr) next = progress.current();
    std::cout << "\n" << progress_bars(course_, progress) << "\n";
    if (next == nullptr) {
      std::cout << finished_page(course_, progress) << "\n";
      return true;
    }
    turn_to(*next);
    std::cout << current_page(course_, progress, *next) << "\n";
    say_keys();
    prepare();
    return false;
  }

  const Course& course_;
  const Step* step_ = nullptr;
  std::unique_ptr<FileWatch> files_;
  Keys keys_;
};

}  // namespace

int watch(const Course& course, const std::string& name) {
  try {
    const Step* step = name.empty() ? Progress(course).current_before_judging() : &find_step(course, name);
    if (step == nullptr) {
      std::cout << "\n  every step passes; ./kata watch STEP watches one of them all the same\n\n";
      return 0;
    }
    return Watch(course, *step).run();
  } catch (const Interrupted&) {
    std::cout << "\n  stopped watching; ./kata shows where you are" << std::endl;
    return 130;
  }
}

}  // namespace kata
