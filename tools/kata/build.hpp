#pragma once

#include <functional>
#include <string>
#include <vector>

#include "course.hpp"

namespace kata {

struct BuildResult {
  bool ok = false;
  bool given_up = false;
  double seconds = 0;
  std::string log;
};

/// Has ninja build targets in `folder`, quietly: after two seconds a progress line appears. `give_up` ends it early.
BuildResult build_targets(const std::filesystem::path& folder, const std::vector<std::string>& targets,
                          const std::string& what, bool keep_going = false, const std::function<bool()>& give_up = {});

/// "[3/7] Building CXX object a/b/c.cpp.o" as "3/7 c.cpp"; empty for any other line.
std::string ninja_progress(std::string_view line);

/// ninja goes by times alone, and a file that was put back with an old time (cp -p, tar, rsync) looks unchanged to it.
/// Gives such files of the steps, and of what all steps share, the present time. build_step() does it by itself.
void renew_times(const Course& course, const std::vector<const Step*>& steps);

/// Builds one step's test and keeps the log beside the build; where it fails, `errors` is for the student's eyes.
struct StepBuild {
  bool ok = false;
  bool given_up = false;
  bool own_error = false;  // the compiler's complaint is in the student's file
  double seconds = 0;
  std::string errors;
};
StepBuild build_step(const Course& course, const Step& step, const std::function<bool()>& give_up = {});

}  // namespace kata
