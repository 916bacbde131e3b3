// What a test executable was asked for on its command line, beside doctest's own options.
#pragma once

#include <string>

namespace flashkata::testing {

/// --case=N: run only the numbered input N. 0: all of them.
int only_case();

/// --summary=FILE: where the verdict goes as JSON, for programs. Empty: nowhere.
const std::string& summary_file();

/// The reporter that prints failures as report.hpp shows them.
const char* reporter_name();

/// Whether there was anything to judge, after the run: a wrong --case or -tc must not look like success.
bool any_test_ran();

}  // namespace flashkata::testing
