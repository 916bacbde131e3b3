// Every faulty kernel must produce its finding at the lines that it marks; no clean kernel may produce any.
#include <doctest/doctest.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <set>
#include <sstream>

#include "common/virtual_gpu/findings.hpp"
#include "common/virtual_gpu/options.hpp"
#include "tests/virtual_gpu/corpus.hpp"

namespace {

using namespace flashkata;

/// The lines of the file with a comment "<- ... name ...".
std::set<int> marked_lines(const std::string& file, const std::string& name) {
  std::set<int> lines;
  std::ifstream stream(file);
  std::string text;
  for (int number = 1; std::getline(stream, text); ++number) {
    const std::size_t arrow = text.find("// <-");
    if (arrow == std::string::npos) continue;
    std::istringstream names(text.substr(arrow + 5));
    for (std::string word; names >> word;) {
      if (word == name) lines.insert(number);
    }
  }
  return lines;
}

std::string to_text(const std::set<int>& lines) {
  std::string text;
  for (const int line : lines) text += (text.empty() ? "" : ", ") + std::to_string(line);
  return text.empty() ? "none" : text;
}

/// clang does not look at the alignment of a struct that is copied as a whole, only of one whose members are used; the
/// fast mode's fault finds it then. See the limits in common/virtual_gpu/README.md.
bool is_known_to_be_missed(const std::string& name) {
#ifdef __clang__
  return name == "misaligned_vector";
#else
  return name.empty();
#endif
}

struct Verdict {
  bool reported = false;
  bool at_the_right_lines = false;
};

Verdict judge(const corpus::FaultyCase& faulty) {
  take_findings();
  faulty.run();
  const std::vector<Finding> findings = take_findings();
  std::ostringstream shown;
  print_findings(shown, findings);
  INFO(faulty.name, "\n", shown.str());

  Verdict verdict;
  std::set<int> named;
  for (const Finding& finding : findings) {
    if (finding.kind != faulty.kind) continue;
    verdict.reported = true;
    CHECK(finding.file == faulty.file);
    CHECK(!finding.sentence.empty());
    named.insert(finding.line);
    if (finding.other_line > 0) named.insert(finding.other_line);
  }
  const std::set<int> marked = marked_lines(faulty.file, faulty.name);
  verdict.at_the_right_lines = named == marked;
  if (is_known_to_be_missed(faulty.name)) return verdict;
  CHECK(verdict.reported);
  CHECK_MESSAGE(verdict.at_the_right_lines, "lines named: ", to_text(named), "; lines marked: ", to_text(marked));
  return verdict;
}

/// Runs `body` in the first-in-first-out order and in a few random ones.
template <typename Body>
void for_each_schedule(Body body) {
  for (const std::uint64_t seed : {0, 1, 2, 3}) {
    CAPTURE(seed);
    virtual_gpu::options().schedule_seed = seed;
    body(seed);
  }
  virtual_gpu::options().schedule_seed = 0;
}

struct Row {
  int kernels = 0;
  int reported = 0;
  int right = 0;
};

}  // namespace

TEST_SUITE("virtual_gpu.corpus") {
  TEST_CASE("each fault is found, at the lines where it is") {
    std::map<std::string, Row> table;
    for_each_schedule([&](std::uint64_t seed) {
      for (const corpus::FaultyCase& faulty : corpus::all_faulty_cases()) {
        const Verdict verdict = judge(faulty);
        if (seed != 0) continue;
        Row& row = table[std::string(to_text(faulty.kind))];
        row.kernels += 1;
        row.reported += verdict.reported;
        row.right += verdict.at_the_right_lines;
      }
    });
    std::printf("%-34s %8s %9s %16s %7s\n", "finding", "kernels", "reported", "file:line right", "missed");
    Row total;
    for (const auto& [kind, row] : table) {
      std::printf("%-34s %8d %9d %16d %7d\n", kind.c_str(), row.kernels, row.reported, row.right,
                  row.kernels - row.reported);
      total = {total.kernels + row.kernels, total.reported + row.reported, total.right + row.right};
    }
    std::printf("%-34s %8d %9d %16d %7d\n", "all", total.kernels, total.reported, total.right,
                total.kernels - total.reported);
    CHECK(total.kernels >= 40);
  }

  TEST_CASE("correct kernels stay clean, and are right") {
    int false_alarms = 0;
    for_each_schedule([&](std::uint64_t) {
      for (const corpus::CleanCase& clean : corpus::all_clean_cases()) {
        take_findings();
        CAPTURE(clean.name);
        CHECK(clean.run());
        const std::vector<Finding> findings = take_findings();
        std::ostringstream shown;
        print_findings(shown, findings);
        INFO(shown.str());
        CHECK(findings.empty());
        false_alarms += findings.empty() ? 0 : 1;
      }
    });
    std::printf("%zu clean kernels, 4 schedules: %d false alarms\n", corpus::all_clean_cases().size(), false_alarms);
    CHECK(corpus::all_clean_cases().size() >= 15);
  }
}
