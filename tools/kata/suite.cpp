#include "suite.hpp"

#include <atomic>
#include <future>
#include <iostream>
#include <nlohmann/json.hpp>

#include "files.hpp"
#include "process.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

// doctest splits its filters at commas.
std::string as_filter(const std::string& text) {
  std::string filter = "-tc=*";
  for (const char c : text) {
    if (c == ',' || c == '\\') filter += '\\';
    filter += c;
  }
  return filter + "*";
}

}  // namespace

std::optional<Summary> parse_summary(const std::string& text) {
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions*/ false);
  if (!json.is_object()) return std::nullopt;
  Summary summary;
  try {
    json.at("passed").get_to(summary.passed);
    json.at("failed").get_to(summary.failed);
    summary.skipped = json.value("skipped", std::size_t{0});
    summary.not_implemented = json.value("not_implemented", false);
    summary.first_failed = json.value("first_failed", "");
    summary.question = json.value("question", "");
    for (const auto& test : json.value("tests", nlohmann::json::array())) {
      summary.tests.push_back({test.at("name").get<std::string>(), test.at("status").get<std::string>()});
    }
  } catch (const nlohmann::json::exception&) {
    return std::nullopt;
  }
  return summary;
}

bool SuiteRun::passed() const {
  return exit_code == 0 && summary && summary->passed > 0 && summary->failed == 0 && !summary->not_implemented;
}

bool SuiteRun::skipped() const {
  return summary && summary->passed == 0 && summary->failed == 0 && summary->skipped > 0 && !summary->not_implemented;
}

std::string SuiteRun::mishap(double limit_s) const {
  if (!started) return "the test program could not be started";
  if (timed_out) return "did not end within " + seconds_text(limit_s) + ": an endless loop?";
  if (signal != 0) return "crashed with " + describe_signal(signal);
  return "ended with exit code " + std::to_string(exit_code) + " before its tests were done: does it call exit?";
}

double time_limit(const Step& step) { return step.kind == "cpu" ? 60 : 300; }

namespace {

// on_tick is called a few times a second with the seconds so far.
SuiteRun run_program(const fs::path& program, const SuiteOptions& options, std::function<void(double)> on_tick,
                     bool shown_later = false) {
  const ScratchFolder scratch;
  const auto summary_file = scratch.path() / "summary.json";
  Command command;
  command.argv = {program.string(), "--summary=" + summary_file.string()};
  if (options.only_case) command.argv.push_back("--case=" + std::to_string(*options.only_case));
  if (!options.only_name.empty()) command.argv.push_back(as_filter(options.only_name));
  command.capture = !options.show;
  command.limit_s = options.limit_s;
  command.give_up = options.give_up;
  command.folder = options.folder;
  command.ends_politely = false;  // doctest would report Ctrl-C as a crash
  command.on_tick = std::move(on_tick);
  if (shown_later && Terminal::out().colour) command.setting = {{"CLICOLOR_FORCE", "1"}};
  auto outcome = run(command);
  SuiteRun result;
  if (const auto text = read_file(summary_file)) result.summary = parse_summary(*text);
  if (outcome.signal != 0 || outcome.timed_out) result.summary.reset();
  result.exit_code = outcome.exit_code;
  result.signal = outcome.signal;
  result.started = outcome.started;
  result.timed_out = outcome.timed_out;
  result.given_up = outcome.given_up;
  result.seconds = outcome.seconds;
  result.output = std::move(outcome.output);
  return result;
}

}  // namespace

SuiteRun run_suite(const Step& step, const SuiteOptions& options) {
  ProgressLine progress("running " + step.title());
  double next_word = 2;
  const auto on_tick = [&](double seconds) {
    if (!options.show) return progress.tick();
    if (seconds < next_word) return;
    // The test itself writes to the terminal, so whole lines only, and few.
    std::cerr << "  " << step.title() << " runs for " << seconds_text(seconds) << ", at most "
              << seconds_text(options.limit_s) << std::endl;
    next_word += 10;
  };
  std::cout << std::flush;
  if (step.check.empty()) return run_program(step.test, options, on_tick);

  // The watched program runs at the same time, unseen: neither of them keeps two cores busy throughout.
  std::atomic<bool> unwanted = false;
  SuiteOptions unseen = options;
  unseen.show = false;
  unseen.give_up = [&] { return unwanted.load(); };
  auto watched = std::async(std::launch::async, [&] { return run_program(step.check, unseen, {}, options.show); });
  // Whoever leaves before it has ended does not wait for its end.
  const struct Leaving {
    std::atomic<bool>& unwanted;
    ~Leaving() { unwanted = true; }
  } leaving{unwanted};
  SuiteRun run = run_program(step.test, options, on_tick);
  // Its word counts also when numbers are wrong: a race shows there as wrong numbers, here as a race, with its line.
  if (!run.summary || run.summary->not_implemented) return run;
  for (double seconds = run.seconds; watched.wait_for(std::chrono::milliseconds(20)) != std::future_status::ready;) {
    on_tick(seconds += 0.02);
    if (options.give_up && options.give_up()) unwanted = true;
  }
  progress.clear();
  SuiteRun checked = watched.get();
  if (options.show) std::cout << checked.output << std::flush;
  checked.seconds = std::max(run.seconds, checked.seconds);
  checked.output = run.output + checked.output;
  if (!checked.summary) return checked;
  if (run.exit_code != 0) checked.exit_code = run.exit_code;
  checked.summary->passed += run.summary->passed;
  checked.summary->failed += run.summary->failed;
  checked.summary->skipped += run.summary->skipped;
  if (!run.summary->first_failed.empty()) checked.summary->first_failed = run.summary->first_failed;
  if (!run.summary->question.empty()) checked.summary->question = run.summary->question;
  checked.summary->tests.insert(checked.summary->tests.begin(), run.summary->tests.begin(), run.summary->tests.end());
  return checked;
}

}  // namespace kata
