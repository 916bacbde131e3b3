#include "common/testing/report.hpp"

#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <vector>

#include "common/attention/not_implemented.hpp"
#include "common/testing/mistakes.hpp"
#include "common/testing/options.hpp"
#include "common/testing/recognise.hpp"
#include "common/testing/step.hpp"

namespace flashkata::testing {
namespace {

constexpr const char* OUR_MESSAGE = "a finding";  // how the reporter tells our failures from a plain CHECK
constexpr std::size_t WIDTH = 110;
constexpr std::size_t INDENT = 16;

struct Finding {
  std::string name;
  std::string sentence;
};

// What the running test case has shown so far. Findings of the first failing case are kept, later cases are counted.
struct Running {
  std::vector<Finding> findings;
  std::vector<std::string> figures;
  std::string question;
  std::string sentence;  // of the case that failed first
  std::optional<int> first_case;
  std::vector<int> other_cases;
  int current_case = 0;   // 0: outside run_case
  std::string missing;    // the file of a NotImplemented
  std::string skipped;    // why
  bool ran_case = false;  // the one that --case asks for
};
Running running;
KeepFindings* keeper = nullptr;
std::size_t tests_ran = 0;

bool is_set(const char* variable) {
  const char* value = std::getenv(variable);
  return value != nullptr && *value != '\0' && std::string(value) != "0";
}

bool stdout_has_colours() {
  const char* no_color = std::getenv("NO_COLOR");  // whatever it is set to, https://no-color.org says
  if (no_color != nullptr && *no_color != '\0') return false;
  return isatty(STDOUT_FILENO) == 1 || is_set("CLICOLOR_FORCE");  // by whoever shows our output later
}

std::string styled(const char* code, const std::string& text) {
  static const bool colours = stdout_has_colours();
  return colours ? "\033[" + std::string(code) + "m" + text + "\033[0m" : text;
}

std::string bold(const std::string& text) { return styled("1", text); }
std::string red(const std::string& text) { return styled("31", text); }
std::string green(const std::string& text) { return styled("32", text); }
constexpr const char* YELLOW = "33";

// "  output     888 of 888 elements off; ...", wrapped with a hanging indent.
void print_line(const std::string& name, const std::string& sentence, const char* style = "0") {
  std::string line = "  " + name;
  line.resize(std::max(line.size() + 1, INDENT), ' ');
  std::istringstream words(sentence);
  std::string word;
  bool empty = true;
  while (words >> word) {
    if (!empty && line.size() + 1 + word.size() > WIDTH) {
      std::cout << styled(style, line) << '\n';
      line.assign(INDENT, ' ');
      empty = true;
    }
    if (!empty) line += ' ';
    line += word;
    empty = false;
  }
  std::cout << styled(style, line) << '\n';
}

std::string again(const char* test_name) {
  std::string command = std::string("./kata test ") + step.number;
  if (running.first_case) return command + " --case " + std::to_string(*running.first_case);
  return command + " --name '" + test_name + "'";
}

// Failures of one test case, from its title to the command that runs it alone.
void print_failure(const char* test_name, const std::optional<std::string>& recognised) {
  std::cout << red(bold(std::string(step.label) + " · " + test_name)) << '\n';
  if (running.first_case) {
    print_line("case " + std::to_string(*running.first_case), running.sentence);
  }
  for (const Finding& finding : running.findings) print_line(finding.name, finding.sentence);
  if (!running.other_cases.empty()) {
    std::string numbers;
    for (const int number : running.other_cases) numbers += (numbers.empty() ? "" : ", ") + std::to_string(number);
    print_line("also off", (running.other_cases.size() == 1 ? "case " : "cases ") + numbers);
  }
  std::string question = running.question;
  if (recognised) {
    const Mistake& mistake = *find_mistake(*recognised);
    print_line("looks like", "someone who " + std::string(mistake.looks_like), YELLOW);
    question = mistake.question;
  }
  if (!question.empty()) print_line("ask yourself", question, YELLOW);
  print_line("again", again(test_name));
  std::cout << '\n';
}

struct Verdict {
  std::string name;
  std::string status;  // passed, failed, skipped
};

class KataReporter : public doctest::IReporter {
 public:
  explicit KataReporter(const doctest::ContextOptions& options) : options_(options) {}

  void report_query(const doctest::QueryData& query) override {
    // What doctest_discover_tests() reads: a name on each line between two rulers.
    if (options_.list_test_cases) {
      std::cout << "[doctest] listing all test case names\n" << std::string(79, '=') << '\n';
      for (unsigned i = 0; i < query.num_data; ++i) std::cout << query.data[i]->m_name << '\n';
      std::cout << std::string(79, '=') << '\n';
      std::cout << "[doctest] unskipped test cases passing the current filters: " << query.num_data << '\n';
    } else {
      std::cout << "[doctest] unskipped test cases passing the current filters: " << query.num_data << '\n';
    }
  }

  void test_run_start() override {}

  void test_case_start(const doctest::TestCaseData& data) override {
    test_name_ = data.m_name;
    running = Running{};
  }
  void test_case_reenter(const doctest::TestCaseData&) override {}

  void test_case_exception(const doctest::TestCaseException& exception) override {
    if (!running.missing.empty()) return;
    crashed_ = crashed_ || exception.is_crash;
    if (running.current_case != 0 && !running.first_case) running.first_case = running.current_case;
    const std::string text = exception.error_string.c_str();
    running.findings.push_back({exception.is_crash ? "crashed" : "threw", text});
  }

  void test_case_end(const doctest::CurrentTestCaseStats& stats) override {
    const bool failed = stats.failure_flags != 0;
    if (!failed && only_case() != 0 && !running.ran_case) return;  // this test has no such case
    if (!failed && !running.skipped.empty()) {
      verdicts_.push_back({test_name_, "skipped"});
      std::cout << "[skipped] " << test_name_ << ": " << running.skipped << '\n';
      return;
    }
    verdicts_.push_back({test_name_, failed ? "failed" : "passed"});
    if (!failed) {
      for (const std::string& sentence : running.figures) print_line("measured", sentence);
      return;
    }
    if (!running.missing.empty()) {
      if (missing_.empty()) missing_ = running.missing;  // of several, the first to open
      return;
    }
    if (shown_ == 0) {
      const auto recognised = recognise_once();
      print_failure(test_name_, recognised);
      if (recognised) {
        question_ = find_mistake(*recognised)->question;
      } else {
        question_ = running.question;
      }
    } else {
      std::cout << red(std::string("also red: ") + test_name_) << '\n';
    }
    ++shown_;
  }

  void test_run_end(const doctest::TestRunStats& stats) override {
    if (options_.list_test_cases) return;
    if (!missing_.empty()) print_missing();
    if (shown_ > 1) std::cout << '\n';
    const auto failed = static_cast<std::size_t>(stats.numTestCasesFailed);
    const std::size_t ran = verdicts_.size();
    tests_ran = ran;
    const std::string with_case = only_case() == 0 ? "" : " with case " + std::to_string(only_case());
    const std::string label = std::string(step.label) + ": ";
    const auto skipped = static_cast<std::size_t>(std::count_if(
        verdicts_.begin(), verdicts_.end(), [](const Verdict& verdict) { return verdict.status == "skipped"; }));
    const std::size_t judged = ran - skipped;
    std::string remarks = with_case;
    if (extension().remark) remarks += extension().remark();
    if (skipped > 0) remarks += ", " + std::to_string(skipped) + " skipped";
    if (ran == 0) {
      std::cout << label << "no test" << with_case << " was found\n";
    } else if (judged == 0) {
      std::cout << label << "no test was judged" << remarks << '\n';
    } else if (failed == 0) {
      std::cout << green(label + (judged == 1 ? "1 test passes" : "all " + std::to_string(judged) + " tests pass") +
                         remarks)
                << '\n';
    } else {
      std::cout << label << judged - failed << " of " << judged << " tests pass" << remarks << '\n';
    }
    std::cout.flush();  // after a crash nothing else will
    write_summary(stats);
  }

  void subcase_start(const doctest::SubcaseSignature&) override {}
  void subcase_end() override {}

  void log_assert(const doctest::AssertData& assertion) override {
    if (!assertion.m_failed) return;
    std::ostringstream text;
    text << assertion.m_expr << " is false: " << assertion.m_decomp.c_str() << " (" << assertion.m_file << ':'
         << assertion.m_line << ')';
    running.findings.push_back({"check", text.str()});
  }
  void log_message(const doctest::MessageData& message) override {
    if (std::string_view(message.m_file) == OUR_MESSAGE) return;
    if ((message.m_severity & doctest::assertType::is_warn) != 0) {
      std::cout << "  " << message.m_string.c_str() << '\n';
    } else {
      running.findings.push_back({"check", message.m_string.c_str()});
    }
  }

  void test_case_skipped(const doctest::TestCaseData& data) override {
    if (data.m_skip) verdicts_.push_back({data.m_name, "skipped"});
  }

 private:
  const std::optional<std::string>& recognise_once() {
    if (!looked_ && !crashed_) {
      looked_ = true;
      recognised_ = recognise(take_fingerprints());
    }
    return recognised_;
  }

  void print_missing() const {
    std::size_t waiting = 0;
    for (const Verdict& verdict : verdicts_) waiting += verdict.status == "failed";
    std::cout << red(bold(std::string(step.label) + " · not implemented yet")) << '\n';
    const std::string file = step.file;
    if (missing_.starts_with(file.substr(0, file.rfind('/') + 1))) {  // a step may have several files
      print_line("open", missing_);
    } else {
      print_line("needs", missing_ + ", an earlier step of yours, which is not implemented yet either");
    }
    print_line("waiting", std::to_string(waiting) + (waiting == 1 ? " test" : " tests"));
    std::cout << '\n';
  }

  void write_summary(const doctest::TestRunStats& stats) const {
    if (summary_file().empty()) return;
    nlohmann::json tests = nlohmann::json::array();
    unsigned skipped = 0;
    std::string first_failed;
    for (const Verdict& verdict : verdicts_) {
      tests.push_back({{"name", verdict.name}, {"status", verdict.status}});
      skipped += verdict.status == "skipped";
      if (first_failed.empty() && verdict.status == "failed") first_failed = verdict.name;
    }
    const nlohmann::json summary = {{"label", step.label},
                                    {"passed", verdicts_.size() - skipped - stats.numTestCasesFailed},
                                    {"failed", stats.numTestCasesFailed},
                                    {"skipped", skipped},
                                    {"not_implemented", !missing_.empty()},
                                    {"first_failed", first_failed},
                                    {"recognised", recognised_.value_or("")},
                                    {"question", question_},
                                    {"tests", tests}};
    std::ofstream file(summary_file());
    file << summary.dump(2) << '\n';
    if (!file.flush()) std::cerr << "cannot write the summary to " << summary_file() << '\n';
  }

  const doctest::ContextOptions& options_;
  const char* test_name_ = "";
  std::vector<Verdict> verdicts_;
  std::string missing_;
  std::string question_;
  int shown_ = 0;
  bool looked_ = false;
  bool crashed_ = false;
  std::optional<std::string> recognised_;
};

DOCTEST_REGISTER_REPORTER("kata", 0, KataReporter);

DOCTEST_REGISTER_EXCEPTION_TRANSLATOR(const NotImplemented& error) {
  running.missing = error.file();
  return error.what();
}

}  // namespace

const char* reporter_name() { return "kata"; }
bool any_test_ran() { return tests_ran > 0; }

void finding(std::string_view name, const std::string& sentence) {
  if (keeper != nullptr) {
    keeper->found.emplace_back(name, sentence);
    return;
  }
  if (only_case() != 0 && running.current_case == 0) return;
  const bool in_later_case = running.first_case && *running.first_case != running.current_case;
  if (in_later_case) {
    if (running.other_cases.empty() || running.other_cases.back() != running.current_case) {
      running.other_cases.push_back(running.current_case);
    }
  } else {
    if (running.current_case != 0) running.first_case = running.current_case;
    running.findings.push_back({std::string(name), sentence});
  }
  DOCTEST_ADD_FAIL_CHECK_AT(OUR_MESSAGE, 0, "");
}

KeepFindings::KeepFindings() : before_(std::exchange(keeper, this)) {}
KeepFindings::~KeepFindings() { keeper = before_; }

void finding(std::string_view name, const std::string& sentence, std::string_view question) {
  if (running.findings.empty()) running.question = question;
  finding(name, sentence);
}

int running_case() { return running.current_case; }

void figures(const std::string& sentence) { running.figures.push_back(sentence); }

void skip(const std::string& reason) { running.skipped = reason; }

void ask(std::string_view question) { running.question = question; }

void run_case(int number, const std::string& sentence, const std::function<void()>& body) {
  if (only_case() != 0 && only_case() != number) return;
  running.current_case = number;
  running.ran_case = true;
  if (!running.first_case) running.sentence = sentence;
  try {
    body();
  } catch (const NotImplemented&) {
    throw;
  } catch (const std::exception& error) {
    finding("threw", error.what());
  }
  running.current_case = 0;
}

}  // namespace flashkata::testing
