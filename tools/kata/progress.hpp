#pragma once

#include <map>
#include <string>
#include <vector>

#include "course.hpp"
#include "suite.hpp"

namespace kata {

enum class State {
  missing,   // the student's file is gone
  unfilled,  // it still throws NotImplemented
  broken,    // it does not compile
  failing,   // tests fail, crash or do not end
  skipped,   // this machine cannot run it, and said why
  done,
};

struct Verdict {
  State state = State::unfilled;
  std::size_t passed = 0;
  std::size_t failed = 0;
  std::string first_failed;
  std::string question;  // the suite's question to the mistake it recognised
  std::string mishap;    // a crash or a time-out in one line
};

/// Where the student stands. The truth is in the files alone: what .kata/progress.json holds is a memory of verdicts on
/// exactly these contents, and losing it costs a rebuild, nothing else.
class Progress {
 public:
  explicit Progress(const Course& course);

  /// Brings every verdict up to date: builds and runs what was filled or changed since it was last judged.
  void refresh();
  void refresh(const std::vector<const Step*>& steps);
  /// So that the next refresh judges these anew, whatever is remembered.
  void forget(const std::vector<const Step*>& steps);

  const Verdict& of(const Step& step) const { return verdicts_.at(step.label); }
  /// The first step in course order that is neither done nor beyond this machine; nullptr when there is none.
  const Step* current() const;
  /// The same, but a step that was changed and did not pass before is current without being judged: the command that
  /// asks will do that in the open.
  const Step* current_before_judging();

  /// Stands for the content of everything that a verdict on this step depends on. To be taken before building: what is
  /// saved while the tests run has not been judged by them.
  std::string key(const Step& step);

  /// Remembers what a full run of the suite, or the compiler, said of the content that `key` stands for.
  const Verdict& record(const Step& step, const std::string& key, const SuiteRun& run);
  const Verdict& record_broken(const Step& step, const std::string& key, bool own_error);

 private:
  bool look_up(const Step& step);  // false where it has to be judged anew
  void judge(const Step& step);
  void remember(const Step& step, const std::string& key, bool worth_keeping);
  void save();

  const Course& course_;
  std::map<std::string, Verdict> verdicts_;
  std::map<std::string, std::pair<std::string, Verdict>> memory_;  // by preset and label: key and verdict
  std::string common_;                                             // hash of what all steps share
};

/// True where the step's file is there and not filled.
bool is_unfilled_step(const Course& course, const Step& step);

/// "2 of 7 tests fail, first: ..." and the like, one line.
std::string in_words(const Verdict& verdict);

}  // namespace kata
