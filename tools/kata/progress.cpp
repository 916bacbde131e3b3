#include "progress.hpp"

#include <algorithm>
#include <iostream>

#include "backup.hpp"
#include "build.hpp"
#include "files.hpp"
#include "records.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

constexpr std::pair<State, const char*> STATE_NAMES[] = {
    {State::broken, "broken"}, {State::failing, "failing"}, {State::skipped, "skipped"}, {State::done, "done"}};

std::string name_of(State state) {
  for (const auto& [value, name] : STATE_NAMES) {
    if (value == state) return name;
  }
  return {};
}

void add_code(Hash& hash, const fs::path& folder) {
  for (const auto& file : code_below(folder)) {
    hash.add(file.lexically_relative(folder).string());
    hash.add(read_file(file).value_or(""));
  }
}

bool all_exist(const Course& course, const Step& step) {
  const auto files = course.filled(step);
  return std::all_of(files.begin(), files.end(), [](const fs::path& file) { return fs::exists(file); });
}

}  // namespace

bool is_unfilled_step(const Course& course, const Step& step) {
  const auto files = course.filled(step);
  return std::any_of(files.begin(), files.end(), [](const fs::path& file) {
    const auto text = read_file(file);
    return text && is_unfilled(*text);
  });
}

std::string in_words(const Verdict& verdict) {
  switch (verdict.state) {
    case State::missing:
      return "its file is gone";
    case State::unfilled:
      return "not filled yet";
    case State::broken:
      return "does not compile";
    case State::skipped:
      return "cannot run on this machine";
    case State::done:
      return counted(verdict.passed, "test") + (verdict.passed == 1 ? " passes" : " pass");
    case State::failing:
      break;
  }
  if (!verdict.mishap.empty()) return verdict.mishap;
  const auto total = verdict.passed + verdict.failed;
  std::string text =
      std::to_string(verdict.failed) + " of " + counted(total, "test") + (verdict.failed == 1 ? " fails" : " fail");
  if (!verdict.first_failed.empty()) text += ", first: " + verdict.first_failed;
  return text;
}

Progress::Progress(const Course& course) : course_(course) {
  for (const auto& [name, record] : read_records(course.state() / "progress.json")) {
    const auto text = [&record = record](const std::string& key) {
      const auto entry = record.find(key);
      return entry == record.end() ? std::string() : entry->second;
    };
    const auto state = text("state");
    const auto known = std::find_if(std::begin(STATE_NAMES), std::end(STATE_NAMES),
                                    [&](const auto& pair) { return pair.second == state; });
    if (known == std::end(STATE_NAMES)) continue;
    memory_[name] = {text("key"), Verdict{known->first, number_in(record, "passed"), number_in(record, "failed"),
                                          text("first_failed"), text("question"), text("mishap")}};
  }
}

std::string Progress::key(const Step& step) {
  if (common_.empty()) {
    Hash shared;
    add_code(shared, course_.source / "common");
    common_ = shared.hex();
  }
  Hash hash;
  hash.add(common_);
  for (const Step* each : course_.with_needs(step)) {
    hash.add(each->label);
    for (const auto& file : course_.filled(*each)) hash.add(read_file(file).value_or(""));
    add_code(hash, course_.source / each->folder);  // header and suite; the stub again, where it is the filled file
  }
  return hash.hex();
}

bool Progress::look_up(const Step& step) {
  auto& verdict = verdicts_[step.label];
  if (!all_exist(course_, step)) {
    verdict = {};
    verdict.state = State::missing;
    return true;
  }
  if (is_unfilled_step(course_, step)) {
    verdict = {};
    if (course_.answers == course_.source) keep_stub_without_git(course_, step);
    return true;
  }
  const auto known = memory_.find(course_.preset + "/" + step.label);
  if (known == memory_.end() || known->second.first != key(step)) return false;
  verdict = known->second.second;
  return true;
}

void Progress::judge(const Step& step) {
  const auto judged = key(step);
  const auto build = build_step(course_, step);
  if (!build.ok) {
    record_broken(step, judged, build.own_error);
    return;
  }
  SuiteOptions options;
  options.show = false;
  options.limit_s = time_limit(step);
  record(step, judged, run_suite(step, options));
}

void Progress::refresh() {
  std::vector<const Step*> all;
  for (const auto& step : course_.steps) all.push_back(&step);
  refresh(all);
}

void Progress::refresh(const std::vector<const Step*>& steps) {
  std::vector<const Step*> stale;
  std::vector<std::string> targets;
  for (const Step* step : steps) {
    if (look_up(*step)) continue;
    stale.push_back(step);
    targets.push_back(step->target);
  }
  // Together first, for speed; then one by one, where what is built already costs nothing, to tell the broken ones.
  renew_times(course_, stale);
  if (stale.size() > 1) build_targets(course_.build, targets, "building what changed", /*keep_going*/ true);
  for (const Step* step : stale) judge(*step);
}

void Progress::forget(const std::vector<const Step*>& steps) {
  for (const Step* step : steps) memory_.erase(course_.preset + "/" + step->label);
}

const Step* Progress::current() const {
  for (const auto& step : course_.steps) {
    const State state = of(step).state;
    if (state != State::done && state != State::skipped) return &step;
  }
  return nullptr;
}

const Step* Progress::current_before_judging() {
  for (const auto& step : course_.steps) {
    if (!look_up(step)) {
      const auto known = memory_.find(course_.preset + "/" + step.label);
      const bool passed_before = known != memory_.end() && known->second.second.state == State::done;
      if (!passed_before) return &step;
      judge(step);  // most likely the course changed, not this file
    }
    const State state = of(step).state;
    if (state != State::done && state != State::skipped) return &step;
  }
  return nullptr;
}

const Verdict& Progress::record(const Step& step, const std::string& key, const SuiteRun& run) {
  Verdict& verdict = verdicts_[step.label];
  verdict = {};
  verdict.state = run.passed() ? State::done : run.skipped() ? State::skipped : State::failing;
  if (run.summary) {
    verdict.passed = run.summary->passed;
    verdict.failed = run.summary->failed;
    verdict.first_failed = run.summary->first_failed;
    verdict.question = run.summary->question;
    if (run.summary->not_implemented && verdict.failed == 0)
      verdict.mishap = "something that it calls is not filled yet";
  } else {
    verdict.mishap = run.mishap(time_limit(step));
  }
  // A file that is still a stub is recognised by itself; its verdict need not be remembered.
  if (is_unfilled_step(course_, step)) {
    verdict.state = State::unfilled;
  } else {
    remember(step, key, run.started && !run.given_up);
  }
  return verdict;
}

const Verdict& Progress::record_broken(const Step& step, const std::string& key, bool own_error) {
  Verdict& verdict = verdicts_[step.label];
  verdict = {};
  verdict.state = is_unfilled_step(course_, step) ? State::unfilled : State::broken;
  remember(step, key,
           own_error);  // a full disk or a missing compiler is not the file's fault, and may be gone next time
  return verdict;
}

void Progress::remember(const Step& step, const std::string& key, bool worth_keeping) {
  const auto name = course_.preset + "/" + step.label;
  if (worth_keeping) {
    memory_[name] = {key, verdicts_[step.label]};
  } else {
    memory_.erase(name);
  }
  save();
}

void Progress::save() {
  Records records;
  for (const auto& [name, entry] : memory_) {
    const auto& [key, verdict] = entry;
    records[name] = {{"key", key},
                     {"state", name_of(verdict.state)},
                     {"passed", std::to_string(verdict.passed)},
                     {"failed", std::to_string(verdict.failed)},
                     {"first_failed", verdict.first_failed},
                     {"question", verdict.question},
                     {"mishap", verdict.mishap}};
  }
  std::string why;
  const auto file = course_.state() / "progress.json";
  if (try_write_records(file, records, &why)) return;
  static bool said = false;
  if (!said) {
    std::cerr << "  note: cannot write " << course_.shown(file) << " (" << why << "); nothing is lost, only slower\n";
  }
  said = true;
}

}  // namespace kata
