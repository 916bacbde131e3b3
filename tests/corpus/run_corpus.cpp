// run_corpus LABEL FINGERPRINTS RECORD EXECUTABLE [CHECKED_EXECUTABLE] [--record | --everything]
//
// Plays every answer of a step's corpus against the step's suite and prints what became of each; the answers of a
// kernel step also against the suite with checked kernels. Ends with an error if a wrong answer passes or is given
// another mistake's name, if a right one fails, or if fewer than 80% of the wrong answers with a name get it.
//
// A wrong answer is refused as soon as one test case refuses it, so what did so last time is asked first, and all the
// others only if it does not do so again. A right answer meets every test case, and with checked kernels those that
// refuse some wrong answer there alone or for what the checker finds. RECORD says which these are. It counts as long as
// the suite has the test cases that it names; without it, and with --everything, every answer meets everything.
//
// --record writes RECORD from a run of everything, after FINGERPRINTS, which recognition works from.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace {

using nlohmann::json;

struct Answer {
  std::string name;
  std::string mistake;
};

struct Run {
  int status = 0;
  std::string output;
};

// For the shell.
std::string quoted(const std::string& text) {
  std::string result = "'";
  for (const char letter : text) result += letter == '\'' ? "'\\''" : std::string(1, letter);
  return result + "'";
}

// Runs `executable arguments` with KATA_PLAY=`play`.
Run run(const std::string& play, const std::string& executable, const std::string& arguments) {
  const std::string command =
      "KATA_PLAY=" + quoted(play) + " timeout 60 " + quoted(executable) + " " + arguments + " 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) throw std::runtime_error("cannot run " + executable);
  Run result;
  char buffer[4096];
  while (const std::size_t length = fread(buffer, 1, sizeof buffer, pipe)) result.output.append(buffer, length);
  const int status = pclose(pipe);
  result.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128;
  return result;
}

std::vector<Answer> list(const std::string& executable) {
  std::istringstream lines(run("list", executable, "").output);
  std::vector<Answer> answers;
  for (std::string line; std::getline(lines, line);) {
    const std::size_t tab = line.find('\t');
    answers.push_back({line.substr(0, tab), line.substr(tab + 1)});
  }
  return answers;
}

// The names of the suite's test cases stand between two rulers.
std::vector<std::string> list_tests(const std::string& executable) {
  std::istringstream lines(run("", executable, "--list-test-cases").output);
  std::vector<std::string> tests;
  bool inside = false;
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("====", 0) == 0) {
      inside = !inside;
    } else if (inside) {
      tests.push_back(line);
    }
  }
  return tests;
}

// The argument that asks for these test cases; none asks for all.
std::string only(const std::vector<std::string>& tests) {
  if (tests.empty()) return "";
  std::string filter;
  for (const std::string& test : tests) {
    if (!filter.empty()) filter += ',';
    for (const char letter : test) filter += letter == ',' ? "\\," : std::string(1, letter);
  }
  return " " + quoted("--test-case=" + filter);
}

// What a suite says of an answer: fast, checked, or both.
struct Verdict {
  bool refused = false;
  std::string recognised;
  std::string output;        // of a run that refuses it
  std::string first_failed;  // the test case
};

// With `patient`, the first test case that fails is run to its end.
Verdict judge(const Answer& answer, const std::string& executable, const std::vector<std::string>& tests,
              bool patient) {
  const std::string summary = std::filesystem::temp_directory_path() / ("kata-corpus-" + std::to_string(getpid()));
  std::filesystem::remove(summary);
  const std::string stop = patient ? "" : " --abort-after=1";
  const Run result = run(answer.name, executable, "--summary=" + quoted(summary) + stop + only(tests));
  Verdict verdict;
  verdict.refused = result.status != 0;
  if (verdict.refused) verdict.output = result.output;
  if (std::ifstream file(summary); file) {
    const json said = json::parse(file);
    verdict.recognised = said.value("recognised", "");
    verdict.first_failed = said.value("first_failed", "");
  }
  std::filesystem::remove(summary);
  return verdict;
}

// "shared-memory race" is what the checker finds, not the name of a mistake.
bool is_finding(const std::string& mistake) { return mistake.find(' ') != std::string::npos; }

bool is_right(const Answer& answer) { return answer.mistake == "right"; }

// Has a wrong answer been refused, and named if it has a name? Then nobody else need be asked.
bool is_settled(const Answer& answer, const Verdict& verdict) {
  if (!verdict.refused) return false;
  if (answer.mistake == "unnamed") return verdict.recognised.empty();
  if (is_finding(answer.mistake)) return verdict.output.find(answer.mistake) != std::string::npos;
  return verdict.recognised == answer.mistake;
}

// Where a wrong answer was refused.
struct Place {
  std::size_t executable = 0;  // 0: fast; 1: checked
  std::string test;
};

struct Record {
  std::vector<std::string> tests;       // of the suite, when this was written
  std::map<std::string, Place> places;  // by the answer's name
};

// The test cases that have to do with how memory is used: they refuse somebody with checked kernels alone, or for
// something that the checker finds.
std::vector<std::string> watched_tests(const Record& record, const std::vector<Answer>& answers) {
  std::set<std::string> watched;
  for (const Answer& answer : answers) {
    const auto place = record.places.find(answer.name);
    if (place == record.places.end()) continue;
    if (place->second.executable == 1 || is_finding(answer.mistake)) watched.insert(place->second.test);
  }
  return {watched.begin(), watched.end()};
}

Record read_record(const std::string& path) {
  Record record;
  std::ifstream file(path);
  if (!file) return record;
  const json stored = json::parse(file);
  record.tests = stored.at("tests").get<std::vector<std::string>>();
  for (const auto& [name, place] : stored.at("refused").items()) record.places[name] = {place.at(0), place.at(1)};
  return record;
}

void write_record(const Record& record, const std::string& path) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream out(path);
  out << "{\n\"tests\": " << json(record.tests).dump() << ",\n\"refused\": {";
  const char* separator = "\n";
  for (const auto& [name, place] : record.places) {
    out << separator << json(name).dump() << ": " << json{place.executable, place.test}.dump();
    separator = ",\n";
  }
  out << "\n}\n}\n";
  if (!out.flush()) throw std::runtime_error("cannot write " + path);
}

bool alike(const json& one, const json& other) {
  if (one[0] != other[0] || one[1] != other[1]) return false;
  const double allowed = 3e-3 * std::max(one[2].get<double>(), other[2].get<double>()) + 1e-30;
  for (int i = 2; i < 5; ++i) {
    if (std::abs(one[i].get<double>() - other[i].get<double>()) > allowed) return false;
  }
  return true;
}

// Of each answer whose mistake has a name, the cases on which it differs from the right answer. Several answers may
// share a mistake; two mistakes with the same fingerprints could not be told apart, and that is an error.
void record_fingerprints(const std::vector<Answer>& answers, const std::string& executable, const std::string& file) {
  const json right = json::parse(run("", executable, "--fingerprints").output);
  std::vector<json> known;
  for (const Answer& answer : answers) {
    if (is_right(answer) || answer.mistake == "unnamed" || is_finding(answer.mistake)) continue;
    json spoiled = json::object();
    const json prints = json::parse(run(answer.name, executable, "--fingerprints").output);
    for (const auto& [number, print] : prints.items()) {
      if (!alike(print, right.at(number))) spoiled[number] = print;
    }
    if (spoiled.empty()) throw std::runtime_error(answer.name + ": no case tells it from the right answer");
    for (const json& other : known) {
      if (other["cases"] == spoiled && other["mistake"] != answer.mistake) {
        throw std::runtime_error(answer.name + " has the fingerprints of " + other["mistake"].get<std::string>());
      }
    }
    known.push_back({{"mistake", answer.mistake}, {"cases", spoiled}});
  }
  std::ofstream out(file);
  out << "{\n\"right\": " << right.dump() << ",\n\"wrong\": [";
  const char* separator = "\n";
  for (const json& entry : known) {
    out << separator << entry.dump();
    separator = ",\n";
  }
  out << "\n]\n}\n";
  if (!out.flush()) throw std::runtime_error("cannot write " + file);
}

// All that the suite says of an answer, as far as it is wanted, on each executable in turn. Where a wrong one was
// refused goes to `record`.
Verdict judge_everywhere(const Answer& answer, const std::vector<std::string>& executables,
                         const std::vector<std::string>& watched, Record& record) {
  Verdict all;
  for (std::size_t i = 0; i < executables.size(); ++i) {
    // The first failure refuses and names. Only what the checker finds may come later than another failure.
    const bool patient = i > 0;
    const Verdict one = judge(answer, executables[i], patient ? watched : std::vector<std::string>{}, patient);
    all.refused = all.refused || one.refused;
    all.output += one.output;
    if (all.recognised.empty()) all.recognised = one.recognised;
    if (is_right(answer) || !is_settled(answer, all)) continue;
    if (!one.first_failed.empty()) record.places[answer.name] = {i, one.first_failed};
    break;
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) try {
  std::vector<std::string> arguments(argv + 1, argv + argc);
  const std::string option = !arguments.empty() && arguments.back().rfind("--", 0) == 0 ? arguments.back() : "";
  if (!option.empty()) arguments.pop_back();
  const bool recording = option == "--record";
  if (arguments.size() < 4 || arguments.size() > 5 || !(option.empty() || recording || option == "--everything")) {
    std::cerr
        << "usage: run_corpus LABEL FINGERPRINTS RECORD EXECUTABLE [CHECKED_EXECUTABLE] [--record | --everything]\n";
    return 2;
  }
  const std::string& label = arguments[0];
  const std::vector<std::string> executables(arguments.begin() + 3, arguments.end());
  const std::vector<Answer> answers = list(executables.front());
  if (recording) record_fingerprints(answers, executables.front(), arguments[1]);

  const Record last = option.empty() ? read_record(arguments[2]) : Record{};
  Record now{list_tests(executables.front()), {}};
  const bool known = last.tests == now.tests;
  if (!known && !last.tests.empty()) {
    std::printf("  %s is of other test cases: everything runs\n", arguments[2].c_str());
  }
  const std::vector<std::string> watched = known ? watched_tests(last, answers) : std::vector<std::string>{};

  int wrong = 0, killed = 0, with_name = 0, named = 0, misnamed = 0, right = 0, passed = 0;
  for (const Answer& answer : answers) {
    Verdict verdict;
    if (const auto place = last.places.find(answer.name); known && place != last.places.end()) {
      const auto& [executable, test] = place->second;
      verdict = judge(answer, executables.at(executable), {test}, executable > 0);
    }
    if (!is_settled(answer, verdict)) {
      verdict = judge_everywhere(answer, executables, is_right(answer) ? watched : std::vector<std::string>{}, now);
    }

    std::string remark;
    if (is_right(answer)) {
      ++right;
      passed += !verdict.refused;
      if (verdict.refused) remark = "RIGHT, BUT REFUSED\n" + verdict.output;
    } else {
      ++wrong;
      killed += verdict.refused;
      if (!verdict.refused) remark = "WRONG, BUT ACCEPTED";
      if (is_finding(answer.mistake)) {
        ++with_name;
        named += is_settled(answer, verdict);
        if (!is_settled(answer, verdict)) remark += " not found";
      } else if (answer.mistake != "unnamed") {
        ++with_name;
        named += verdict.recognised == answer.mistake;
        if (verdict.recognised.empty()) remark += " not recognised";
        if (!verdict.recognised.empty() && verdict.recognised != answer.mistake) {
          ++misnamed;
          remark += " TAKEN FOR " + verdict.recognised;
        }
      } else if (!verdict.recognised.empty()) {
        ++misnamed;
        remark += " TAKEN FOR " + verdict.recognised;
      }
    }
    std::printf("  %-44s %-34s %s\n", answer.name.c_str(), answer.mistake.c_str(), remark.c_str());
    std::fflush(stdout);
  }

  std::printf("%s: %d of %d wrong answers refused, %d of %d named, %d wrongly named; %d of %d right answers accepted\n",
              label.c_str(), killed, wrong, named, with_name, misnamed, passed, right);
  const bool good =
      wrong > 0 && right > 0 && killed == wrong && misnamed == 0 && passed == right && named * 10 >= with_name * 8;
  if (recording && good) write_record(now, arguments[2]);
  return good ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << "run_corpus: " << error.what() << '\n';
  return 1;
}
