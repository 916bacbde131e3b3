#include "corpus.hpp"

#include <cstdio>
#include <cstdlib>
#include <string>

namespace flashkata::corpus {
namespace {

const std::string& chosen() {
  static const std::string play = [] {
    const char* value = std::getenv("KATA_PLAY");
    return std::string(value == nullptr ? "" : value);
  }();
  return play;
}

}  // namespace

std::string_view name() { return chosen(); }

Answers::Answers(std::initializer_list<Answer> answers) {
  bool known = false;
  for (const Answer& answer : answers) {
    known = known || answer.name == chosen();
    if (chosen() == "list") {
      std::printf("%.*s\t%.*s\n", static_cast<int>(answer.name.size()), answer.name.data(),
                  static_cast<int>(answer.mistake.size()), answer.mistake.data());
    }
  }
  if (chosen() == "list") {
    std::fflush(stdout);
    std::_Exit(0);
  }
  if (!known && !chosen().empty()) {
    std::fprintf(stderr, "KATA_PLAY: got %s, allowed is what KATA_PLAY=list prints\n", chosen().c_str());
    std::_Exit(2);
  }
}

bool plays(std::string_view name) { return name == chosen(); }

}  // namespace flashkata::corpus
