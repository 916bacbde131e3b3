#include "course.hpp"

#include <doctest/doctest.h>

#include "example_course.hpp"
#include "failure.hpp"
#include "files.hpp"
#include "suite.hpp"

using namespace kata;

namespace {

constexpr const char* MANIFEST = R"({ "source": "/r", "build": "/r/build/learn", "preset": "learn", "answers": "/r",
  "steps": [ { "number": "1.02", "label": "phase1.02_attention", "phase": 1, "phase_name": "eager",
    "name": "attention", "folder": "phase1_eager/02_attention", "idea": "scores", "kind": "cpu",
    "files": ["attention.cpp"], "needs": ["phase1.01_softmax"], "target": "phase1.02_attention_test",
    "test": "/r/build/learn/t" } ] })";

Course load(const std::string& text) {
  const ScratchFolder folder;
  write_file(folder.path() / "course.json", text);
  return Course::load(folder.path() / "course.json");
}

}  // namespace

TEST_SUITE("course") {
  TEST_CASE("the manifest is read whole") {
    const Course course = load(MANIFEST);
    REQUIRE(course.steps.size() == 1);
    const Step& step = course.steps.front();
    CHECK(step.folder_name() == "02_attention");
    CHECK(step.title() == "1.02 attention");
    CHECK(step.needs == std::vector<std::string>{"phase1.01_softmax"});
    CHECK(course.filled(step).front() == "/r/phase1_eager/02_attention/attention.cpp");
    CHECK(course.hidden(step).front() == "/r/solutions/hidden/phase1_eager/02_attention/attention.cpp");
    CHECK(course.to_open(step) == "phase1_eager/02_attention/attention.cpp");
  }

  TEST_CASE("a damaged, empty or absent manifest is a failure with a next thing to do") {
    const std::string text = MANIFEST;
    CHECK_THROWS_AS(load(text.substr(0, text.size() / 2)), Failure);
    CHECK_THROWS_AS(load("{}"), Failure);
    CHECK_THROWS_AS(load(R"({"source":"/","build":"/","preset":"p","answers":"/","steps":[]})"), Failure);
    CHECK_THROWS_AS(Course::load("/nowhere/course.json"), Failure);
  }

  TEST_CASE("needs are followed to their end, each once") {
    const Course course = example_course();
    CHECK(course.with_needs(course.steps[0]).size() == 1);
    CHECK(course.with_needs(course.steps[1]).size() == 2);
    CHECK(course.with_needs(course.steps[2]).size() == 3);
  }

  TEST_CASE("a suite's summary is read, and a damaged one is none") {
    const auto summary = parse_summary(R"({"label":"x","passed":5,"failed":2,"skipped":1,"not_implemented":false,
      "first_failed":"a","question":"q?","tests":[{"name":"a","status":"failed"}]})");
    REQUIRE(summary);
    CHECK(summary->passed == 5);
    CHECK(summary->failed == 2);
    CHECK(summary->question == "q?");
    CHECK(summary->tests.at(0).name == "a");
    CHECK_FALSE(parse_summary(""));
    CHECK_FALSE(parse_summary("{\"passed\": 5"));
    CHECK_FALSE(parse_summary("{\"passed\": \"five\", \"failed\": 0}"));
    CHECK_FALSE(parse_summary("[1, 2]"));
  }

  TEST_CASE("only a run that ended well, with tests, all of them right, has passed") {
    SuiteRun run;
    run.started = true;
    run.exit_code = 0;
    CHECK_FALSE(run.passed());  // no summary: it called exit(0)
    run.summary = Summary{};
    CHECK_FALSE(run.passed());  // no test at all
    run.summary->passed = 3;
    CHECK(run.passed());
    run.exit_code = 1;
    CHECK_FALSE(run.passed());
    run.exit_code = 0;
    run.summary->failed = 1;
    CHECK_FALSE(run.passed());
    run.summary->failed = 0;
    run.summary->not_implemented = true;
    CHECK_FALSE(run.passed());
  }
}
