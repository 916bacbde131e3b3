// What a test executable was asked for on its command line, beside doctest's own options.
#pragma once

#include <functional>
#include <string>
#include <string_view>

namespace flashkata::testing {

/// --case=N: run only the numbered input N. 0: all of them.
int only_case();

/// --summary=FILE: where the verdict goes as JSON, for programs. Empty: nowhere.
const std::string& summary_file();

/// What a library adds to main(), for example kernel.cpp for suites with kernels. Any of them may be empty.
struct Extension {
  std::function<std::string()> why_skip;         // why nothing can run here; empty if it can
  std::function<bool(std::string_view)> option;  // takes an argument of the command line; false if it is not its own
  std::function<int()> at_end;                   // after the run; what it returns is added to the exit code
  std::function<std::string()> remark;           // closes the last line: "all 12 tests pass<remark>"
};
/// At start-up, from a static object. Several add up.
struct ExtendMain {
  explicit ExtendMain(Extension extension);
};

const Extension& extension();

/// The reporter that prints failures as report.hpp shows them.
const char* reporter_name();

/// Whether there was anything to judge, after the run: a wrong --case or -tc must not look like success.
bool any_test_ran();

}  // namespace flashkata::testing
