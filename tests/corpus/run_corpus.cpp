// run_corpus LABEL FINGERPRINTS EXECUTABLE [CHECKED_EXECUTABLE] [--record]
//
// Plays every answer of a step's corpus against the step's suite and prints what became of each; the answers of a
// kernel step also against the suite with checked kernels. Ends with an error if a wrong answer passes or is given
// another mistake's name, if a right one fails, or if fewer than 80% of the wrong answers with a name get it. With
// --record it first writes the fingerprints that recognition works from.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
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

// Runs `executable arguments` with KATA_PLAY=`play`; the names contain no quotes.
Run run(const std::string& play, const std::string& executable, const std::string& arguments) {
  const std::string command = "KATA_PLAY='" + play + "' timeout 60 '" + executable + "' " + arguments + " 2>&1";
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
void record(const std::vector<Answer>& answers, const std::string& executable, const std::string& file) {
  const json right = json::parse(run("", executable, "--fingerprints").output);
  std::vector<json> known;
  for (const Answer& answer : answers) {
    const bool named_by_finding = answer.mistake.find(' ') != std::string::npos;
    if (answer.mistake == "right" || answer.mistake == "unnamed" || named_by_finding) continue;
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

}  // namespace

int main(int argc, char** argv) try {
  std::vector<std::string> arguments(argv + 1, argv + argc);
  const bool recording = !arguments.empty() && arguments.back() == "--record";
  if (recording) arguments.pop_back();
  if (arguments.size() < 3 || arguments.size() > 4) {
    std::cerr << "usage: run_corpus LABEL FINGERPRINTS EXECUTABLE [CHECKED_EXECUTABLE] [--record]\n";
    return 2;
  }
  const std::string& label = arguments[0];
  const std::vector<std::string> executables(arguments.begin() + 2, arguments.end());
  const std::vector<Answer> answers = list(executables.front());
  if (recording) record(answers, executables.front(), arguments[1]);

  const std::string summary = std::filesystem::temp_directory_path() / ("kata-corpus-" + std::to_string(getpid()));
  int wrong = 0, killed = 0, with_name = 0, named = 0, misnamed = 0, right = 0, passed = 0;
  for (const Answer& answer : answers) {
    bool refused = false;
    std::string recognised;
    std::string output;
    for (const std::string& executable : executables) {
      std::filesystem::remove(summary);
      // The first failure refuses and names. Only what the checker finds may come later than another failure.
      const std::string stop = executable == executables.front() ? " --abort-after=1" : "";
      const Run result = run(answer.name, executable, "--summary=" + summary + stop);
      refused = refused || result.status != 0;
      if (result.status != 0) output += result.output;
      if (std::ifstream file(summary); file && recognised.empty()) {
        recognised = json::parse(file).value("recognised", "");
      }
      // Refused, and named as it should be: the slower executable has nothing to add.
      if (refused && (answer.mistake == "unnamed" || recognised == answer.mistake)) break;
    }
    std::string remark;
    if (answer.mistake == "right") {
      ++right;
      passed += !refused;
      if (refused) remark = "RIGHT, BUT REFUSED\n" + output;
    } else {
      ++wrong;
      killed += refused;
      if (!refused) remark = "WRONG, BUT ACCEPTED";
      if (answer.mistake.find(' ') != std::string::npos) {
        // "shared-memory race": the checker's finding is its name.
        ++with_name;
        const bool found = output.find(answer.mistake) != std::string::npos;
        named += found;
        if (!found) remark += " not found";
      } else if (answer.mistake != "unnamed") {
        ++with_name;
        named += recognised == answer.mistake;
        if (recognised.empty()) remark += " not recognised";
        if (!recognised.empty() && recognised != answer.mistake) {
          ++misnamed;
          remark += " TAKEN FOR " + recognised;
        }
      } else if (!recognised.empty()) {
        ++misnamed;
        remark += " TAKEN FOR " + recognised;
      }
    }
    std::printf("  %-44s %-34s %s\n", answer.name.c_str(), answer.mistake.c_str(), remark.c_str());
    std::fflush(stdout);
  }
  std::filesystem::remove(summary);

  std::printf("%s: %d of %d wrong answers refused, %d of %d named, %d wrongly named; %d of %d right answers accepted\n",
              label.c_str(), killed, wrong, named, with_name, misnamed, passed, right);
  const bool good =
      wrong > 0 && right > 0 && killed == wrong && misnamed == 0 && passed == right && named * 10 >= with_name * 8;
  return good ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << "run_corpus: " << error.what() << '\n';
  return 1;
}
