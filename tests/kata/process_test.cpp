#include "process.hpp"

#include <doctest/doctest.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>

#include "failure.hpp"

using namespace kata;

namespace {

Outcome shell(const std::string& script, double limit_s = 10) {
  Command command;
  command.argv = {"sh", "-c", script};
  command.limit_s = limit_s;
  return run(command);
}

}  // namespace

TEST_SUITE("process") {
  TEST_CASE("output of both streams and the exit code come back") {
    const auto outcome = shell("echo out; echo err >&2; exit 3");
    CHECK(outcome.started);
    CHECK(outcome.exit_code == 3);
    CHECK(outcome.output == "out\nerr\n");
    CHECK_FALSE(outcome.ok());
  }

  TEST_CASE("arguments arrive as they are: no shell reads them") {
    Command command;
    command.argv = {"printf", "%s|", "a b", "$HOME", "'; echo x", "*"};
    CHECK(run(command).output == "a b|$HOME|'; echo x|*|");
  }

  TEST_CASE("input, folder and environment are set") {
    Command command;
    command.argv = {"sh", "-c", "cat; pwd; echo $KATA_SETTING"};
    command.input = "fed\n";
    command.folder = "/";
    command.setting = {{"KATA_SETTING", "set"}};
    CHECK(run(command).output == "fed\n/\nset\n");
  }

  TEST_CASE("input that finds no room is an error that names the folder") {
    const char* before = std::getenv("TMPDIR");
    const std::string kept = before == nullptr ? "" : before;
    Command command;
    command.argv = {"cat"};
    command.input = "fed\n";
    ::setenv("TMPDIR", "/nowhere", 1);
    std::string what;
    try {
      run(command);
    } catch (const Failure& failure) {
      what = failure.what();
    }
    if (before == nullptr) {
      ::unsetenv("TMPDIR");
    } else {
      ::setenv("TMPDIR", kept.c_str(), 1);
    }
    CHECK(what == "cannot write to /nowhere: No such file or directory");
  }

  TEST_CASE("a program that does not exist never started") {
    Command command;
    command.argv = {"/nowhere/program"};
    CHECK_FALSE(run(command).started);
    CHECK_FALSE(run(command).ok());
    CHECK(output_of({"/nowhere/program"}).empty());
  }

  TEST_CASE("a signal is told apart from an exit code") {
    const auto outcome = shell("kill -SEGV $$");
    CHECK(outcome.signal == SIGSEGV);
    CHECK(outcome.exit_code == -1);
    CHECK(describe_signal(SIGSEGV).find("SIGSEGV") == 0);
  }

  TEST_CASE("what does not end is ended, with everything that it started") {
    const auto outcome = shell("sleep 60 & sleep 60", 0.2);
    CHECK(outcome.timed_out);
    CHECK(outcome.seconds < 5);
  }

  TEST_CASE("an endless flood of output neither hangs nor fills the memory") {
    const auto outcome = shell("yes", 0.3);
    CHECK(outcome.timed_out);
    CHECK(outcome.output.size() < (20u << 20));
  }

  TEST_CASE("lines are handed on as they come") {
    Command command;
    command.argv = {"printf", "a\\nb\\nrest"};
    std::vector<std::string> lines;
    command.on_line = [&](std::string_view line) { lines.emplace_back(line); };
    run(command);
    CHECK(lines == std::vector<std::string>{"a", "b"});
  }

  TEST_CASE("a child left behind does not hold us up") {
    const auto outcome = shell("sleep 60 & echo done");
    CHECK(outcome.output == "done\n");
    CHECK(outcome.seconds < 5);
  }
}
