#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kata {

/// A program to run: no shell in between, so no quoting to get wrong.
struct Command {
  std::vector<std::string> argv;
  std::filesystem::path folder;                              // where it runs; empty: here
  std::vector<std::pair<std::string, std::string>> setting;  // environment variables added
  std::string input;                                         // its standard input; empty: /dev/null
  bool capture = true;                                       // stdout and stderr together into Outcome::output
  bool errors_apart = false;                                 // capture stdout only, and drop stderr
  double limit_s = 0;                                        // killed after this long; 0: no limit
  std::function<void(std::string_view)> on_line;             // called for every captured line as it arrives
  std::function<void(double)> on_tick;                       // called a few times a second with the seconds so far
  std::function<bool()> give_up;                             // asked a few times a second; true: end it
  bool ends_politely = true;                                 // asked to end before it is killed: ninja then tidies up
};

struct Outcome {
  int exit_code = -1;  // -1 where a signal ended it, or it never started
  int signal = 0;
  bool started = false;
  bool timed_out = false;
  bool given_up = false;
  double seconds = 0;
  std::string output;

  bool ok() const { return started && exit_code == 0; }
};

/// Runs a command and everything that it starts in a process group of their own, and waits. Throws Interrupted after
/// Ctrl-C, when the group has ended.
Outcome run(const Command& command);

/// What the command printed, without the last newline; empty where it failed or does not exist.
std::string output_of(std::vector<std::string> argv, const std::filesystem::path& folder = {});

/// Catches Ctrl-C and its relatives from here on: they set a flag, and whoever waits looks at it.
void catch_interrupts();
bool interrupted();
void throw_if_interrupted();

/// "SIGSEGV (it read or wrote memory that is not its own)" for a person who has never met the number.
std::string describe_signal(int signal);

}  // namespace kata
