#include "names.hpp"

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "example_course.hpp"
#include "failure.hpp"

using namespace kata;

namespace {

// What the refusal of a name says to do next; empty where it was not refused.
std::string advice(const std::string& name, bool phases_too = false) {
  const Course course = example_course();
  try {
    if (phases_too) {
      find_steps(course, name);
    } else {
      find_step(course, name);
    }
  } catch (const Failure& failure) {
    return failure.next();
  }
  return {};
}

std::vector<std::string> labels(const std::string& name) {
  const Course course = example_course();
  std::vector<std::string> result;
  for (const Step* step : find_steps(course, name)) result.push_back(step->label);
  return result;
}

}  // namespace

TEST_SUITE("names") {
  TEST_CASE("the edit distance counts inserted, deleted, replaced and swapped letters") {
    CHECK(edit_distance("", "") == 0);
    CHECK(edit_distance("", "abc") == 3);
    CHECK(edit_distance("softmax", "softmax") == 0);
    CHECK(edit_distance("sofmax", "softmax") == 1);
    CHECK(edit_distance("softtmax", "softmax") == 1);
    CHECK(edit_distance("sofdmax", "softmax") == 1);
    CHECK(edit_distance("sotfmax", "softmax") == 1);
    CHECK(edit_distance("SOFTMAX", "softmax") == 0);
    CHECK(edit_distance("kitten", "sitting") == 3);
    CHECK(edit_distance("abc", "xyz") == edit_distance("xyz", "abc"));
  }

  TEST_CASE("every way to name a step finds it") {
    const Course course = example_course();
    for (const char* name : {"1.02", "1.2", "01.02", "phase1.02_attention", "02_attention", "attention", "Attention",
                             "02_attention/", "attention.cpp", "phase1_eager/02_attention",
                             "phase1_eager/02_attention/", "./phase1_eager/02_attention/attention.cpp",
                             "/course/phase1_eager/02_attention", "/course/phase1_eager/02_attention/attention.cpp"}) {
      INFO(name);
      CHECK(find_step(course, name).label == "phase1.02_attention");
    }
    CHECK(find_step(course, "3.10").label == "phase3.10_merge");
  }

  TEST_CASE("a number is not cut short: 3.1 is not 3.10") {
    CHECK_THROWS_AS(find_step(example_course(), "3.1"), Failure);
  }

  TEST_CASE("a name that two steps share asks for the number") {
    CHECK(advice("merge") == "use the number: 2.02 (phase2.02_merge) or 3.10 (phase3.10_merge)");
  }

  TEST_CASE("a wrong name lists the near ones, nearest first") {
    CHECK(advice("atention") == "did you mean 1.02 (attention)?");
    CHECK(advice("soft") == "did you mean 1.01 (softmax)?");
    CHECK(advice("phase1.01_softmux") == "did you mean 1.01 (softmax)?");
    CHECK(advice("xyzzy") == "./kata list shows every step");
    CHECK(advice("") == "./kata list shows every step");
  }

  TEST_CASE("phases and all name several steps") {
    for (const char* name : {"phase1", "1", "eager", "phase1_eager", "phase1_eager/"}) {
      INFO(name);
      CHECK(labels(name) == std::vector<std::string>{"phase1.01_softmax", "phase1.02_attention"});
    }
    CHECK(labels("all").size() == 4);
    CHECK(labels("softmax") == std::vector<std::string>{"phase1.01_softmax"});
    CHECK(advice("phase9", true).find("phase1") != std::string::npos);
  }

  TEST_CASE("near names keep their order and their limit") {
    CHECK(near_names("tset", {"test", "reset", "next"}) == std::vector<std::string>{"test"});
    CHECK(near_names("wach", {"watch", "hint"}) == std::vector<std::string>{"watch"});
    CHECK(near_names("list", {"lisp", "lost", "last", "list"}, 2) == std::vector<std::string>{"list", "lisp"});
    CHECK(near_names("q", {"test", "watch"}).empty());
  }

  TEST_CASE("either joins as a person would") {
    CHECK(either({}) == "");
    CHECK(either({"a"}) == "a");
    CHECK(either({"a", "b"}) == "a or b");
    CHECK(either({"a", "b", "c"}) == "a, b or c");
  }
}
