// Recognition of mistakes, on a step that is made up: cases 1 and 2 need its CPU path, cases 3 to 6 its kernels, and
// what an answer may do wrong is to multiply by a factor.
#include "common/testing/recognise.hpp"

#include <doctest/doctest.h>

#include <sstream>

#include "common/attention/not_implemented.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr double STUB = 0.0;

struct Answer {
  double on_cpu, in_kernels;  // factors: 1 is right
};

Fingerprints fingerprints_of(const Answer& answer) {
  const Recognise recognise_answer({1, 2, 3, 4, 5, 6}, [answer](int number) -> std::vector<Array> {
    const double factor = number <= 2 ? answer.on_cpu : answer.in_kernels;
    if (factor == STUB) throw NotImplemented(__FILE__);
    return {Array{{2}, {factor * number, factor}}};
  });
  return take_fingerprints();
}

// The mistake as it is stored: only the cases that it spoils.
std::string stored(const std::string& mistake, const Answer& answer) {
  auto spoiled = fingerprints_of(answer);
  const auto right = fingerprints_of({1.0, 1.0});
  std::erase_if(spoiled, [&](const auto& entry) { return alike(entry.second, right.at(entry.first)); });
  std::ostringstream text;
  text << R"({"mistake": ")" << mistake << R"(", "cases": )";
  print_fingerprints(text, spoiled);
  return text.str() + "}";
}

std::string name_of(const Answer& answer) {
  std::stringstream file;
  file << R"({"right": )";
  print_fingerprints(file, fingerprints_of({1.0, 1.0}));
  file << R"(, "wrong": [)" << stored("softmax-no-max", {2.0, 2.0}) << ", " << stored("scale-missing", {3.0, 1.0})
       << ", " << stored("softmax-no-normalise", {1.0, 4.0}) << ", " << stored("softmax-query-axis", {5.0, 5.0}) << ", "
       << stored("softmax-global-max", {5.0, 6.0}) << "]}";
  return recognise(fingerprints_of(answer), file).value_or("nobody");
}

}  // namespace

TEST_SUITE("recognition") {
  TEST_CASE("a mistake is named in a whole answer") {
    CHECK(name_of({2.0, 2.0}) == "softmax-no-max");
    CHECK(name_of({3.0, 1.0}) == "scale-missing");
    CHECK(name_of({1.0, 4.0}) == "softmax-no-normalise");
    CHECK(name_of({5.0, 6.0}) == "softmax-global-max");
    CHECK(name_of({1.0, 1.0}) == "nobody");
    CHECK(name_of({7.0, 7.0}) == "nobody");
  }

  TEST_CASE("a mistake is named while the other part is a stub still") {
    CHECK(name_of({2.0, STUB}) == "softmax-no-max");
    CHECK(name_of({3.0, STUB}) == "scale-missing");
    CHECK(name_of({STUB, 2.0}) == "softmax-no-max");
    CHECK(name_of({STUB, 4.0}) == "softmax-no-normalise");
    CHECK(name_of({STUB, 6.0}) == "softmax-global-max");
  }

  TEST_CASE("nobody is named for what is right, for stubs, or for what two mistakes would explain") {
    CHECK(name_of({1.0, STUB}) == "nobody");
    CHECK(name_of({7.0, STUB}) == "nobody");
    CHECK(name_of({5.0, STUB}) == "nobody");
    CHECK(name_of({STUB, STUB}) == "nobody");
    CHECK(fingerprints_of({STUB, STUB}).empty());
    CHECK(fingerprints_of({1.0, STUB}).size() == 2);
  }
}
