// The main() of every test executable: doctest with the course's reporter, and a few options of our own.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <charconv>
#include <iostream>
#include <string_view>

#include "common/testing/options.hpp"
#include "common/testing/recognise.hpp"
#include "common/testing/step.hpp"

namespace flashkata::testing {
namespace {

int case_number = 0;
std::string summary;

Extension& the_extension() {
  static Extension instance;
  return instance;
}

// Takes "--name=value" out of `argument`.
bool option(std::string_view argument, std::string_view name, std::string_view& value) {
  if (argument.substr(0, name.size()) != name) return false;
  value = argument.substr(name.size());
  return true;
}

}  // namespace

// A suite may have kernels and ranks: then each has its say.
ExtendMain::ExtendMain(Extension added) {
  const Extension before = the_extension();
  the_extension() = {
      .why_skip =
          [=] {
            const std::string why = before.why_skip ? before.why_skip() : "";
            return why.empty() && added.why_skip ? added.why_skip() : why;
          },
      .option =
          [=](std::string_view argument) {
            return (before.option && before.option(argument)) || (added.option && added.option(argument));
          },
      .at_end = [=] { return (before.at_end ? before.at_end() : 0) + (added.at_end ? added.at_end() : 0); },
      .remark = [=] { return (before.remark ? before.remark() : "") + (added.remark ? added.remark() : ""); }};
}
const Extension& extension() { return the_extension(); }

int only_case() { return case_number; }
const std::string& summary_file() { return summary; }

}  // namespace flashkata::testing

int main(int argc, char** argv) {
  using namespace flashkata::testing;
  doctest::Context context;
  context.setOption("reporters", reporter_name());
  context.setOption("no-intro", true);
  context.applyCommandLine(argc, argv);
  for (int i = 1; i < argc; ++i) {
    std::string_view value;
    if (option(argv[i], "--case=", value)) {
      const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), case_number);
      if (error != std::errc{} || *end != '\0' || case_number < 1) {
        std::cerr << "--case: got " << value << ", allowed is the number of a case, from 1\n";
        return 2;
      }
    } else if (option(argv[i], "--summary=", value)) {
      summary = value;
    } else if (std::string_view(argv[i]) == "--fingerprints") {
      print_fingerprints(std::cout, take_fingerprints());
      return 0;
    } else if (extension().option) {
      extension().option(argv[i]);
    }
  }
  const bool lists_only = context.shouldExit();
  const std::string why_skip = extension().why_skip && !lists_only ? extension().why_skip() : "";
  if (!why_skip.empty()) {
    std::cout << "[skipped] " << step.label << ": " << why_skip << '\n';
    return 0;
  }
  int status = context.run();
  if (context.shouldExit()) return status;
  if (status == 0 && !any_test_ran()) status = 1;
  if (extension().at_end) status += extension().at_end();
  return status;
}
