#include "terminal.hpp"

#include <doctest/doctest.h>

#include "build.hpp"

using namespace kata;

TEST_SUITE("terminal") {
  TEST_CASE("columns count characters, not bytes or colours") {
    CHECK(columns("abc") == 3);
    CHECK(columns("\u2501\u2500") == 2);
    CHECK(columns("\033[31mred\033[0m") == 3);
    CHECK(padded("ab", 4) == "ab  ");
    CHECK(padded("abcde", 4) == "abcde");
  }

  TEST_CASE("text is wrapped at blanks, and blanks inside a line stay") {
    std::string words;
    for (int i = 0; i < 30; ++i) words += "word ";
    const auto text = wrapped(words, 6);
    const auto first = text.find('\n');
    REQUIRE(first != std::string::npos);
    CHECK(first + 6 <= 80);
    CHECK(text.substr(first + 1, 7) == "      w");
    CHECK(wrapped("a   b", 0) == "a   b");
    CHECK(wrapped("", 0).empty());
    CHECK(wrapped(std::string(200, 'x'), 0) == std::string(200, 'x'));  // nowhere to break
  }

  TEST_CASE("a bar shows a start, and is full only at the end") {
    const auto full = [](std::size_t done, std::size_t total) {
      std::size_t count = 0;
      const std::string text = bar(done, total, 10);
      for (std::size_t i = 0; i < text.size(); ++i) count += text[i] == '#' || text.substr(i, 3) == "\u2501";
      CHECK(columns(text) == 10);
      return count;
    };
    CHECK(full(0, 5) == 0);
    CHECK(full(1, 100) == 1);
    CHECK(full(99, 100) == 9);
    CHECK(full(5, 5) == 10);
    CHECK(full(0, 0) == 0);
  }

  TEST_CASE("ninja's status is read from its lines") {
    CHECK(ninja_progress("[3/7] Building CXX object a/b.dir/c.cpp.o") == "3/7 c.cpp");
    CHECK(ninja_progress("[7/7] Linking CXX executable a/b_test") == "7/7 b_test");
    CHECK(ninja_progress("FAILED: x").empty());
    CHECK(ninja_progress("").empty());
  }

  TEST_CASE("counts agree with their nouns") {
    CHECK(counted(1, "step") == "1 step");
    CHECK(counted(0, "step") == "0 steps");
    CHECK(seconds_text(0.25) == "0.2 s");
    CHECK(seconds_text(60) == "60 s");
  }
}
