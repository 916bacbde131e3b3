// What a student reads when a test fails. Checks add findings; the reporter prints them once per test case:
//
//   phase1.02_attention · agrees with the float64 reference
//     case 7    scale 0.3 given, Sq=37 Sk=53 D=16 Dv=24, seed 7
//     output    888 of 888 elements off; first at [query 0, channel 0]: got 0.2310, want -0.1184; ...
//     looks like someone who never used the scale that was passed
//     ask yourself   Call it with scale = 0: what should every weight be?
//     again     ./kata test 1.02 --case 7
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace flashkata::testing {

/// Marks the running test case as failed, with a line "name    sentence" in its report. Never throws.
void finding(std::string_view name, const std::string& sentence);

/// The same, with a question of its own: it takes the place of ask()'s if this is the test case's first finding.
void finding(std::string_view name, const std::string& sentence, std::string_view question);

/// While one lives, findings are kept in it and fail no test case: for a rank, whose parent judges.
class KeepFindings {
 public:
  KeepFindings();
  ~KeepFindings();
  KeepFindings(const KeepFindings&) = delete;
  KeepFindings& operator=(const KeepFindings&) = delete;
  std::vector<std::pair<std::string, std::string>> found;  // name and sentence

 private:
  KeepFindings* before_;
};

/// A question for whoever fails this test case and is not recognised: what the failed property itself suggests.
/// Call it at the head of a test case.
void ask(std::string_view question);

/// Runs `body` as numbered input `number` of the running test case: its findings are printed under `sentence`, and
/// `--case=number` runs it alone. Only the first input that fails is printed in full, the others by number.
void run_case(int number, const std::string& sentence, const std::function<void()>& body);

/// The number of the run_case() that is running; 0 outside of any.
int running_case();

/// A line of figures, printed with the running test case's name once it has passed: for a test that is run to learn how
/// large and how exact something is, not only whether it is right.
void figures(const std::string& sentence);

/// Marks the running test case as skipped, for `reason`; return from it afterwards. ctest counts it as skipped.
void skip(const std::string& reason);

}  // namespace flashkata::testing
