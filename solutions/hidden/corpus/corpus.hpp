// The corpus: answers that a suite must refuse, with the mistake that it must name, and unusual ones that it must
// accept.
//
// corpus/phaseN_name/NN_step.cpp implements the step's functions once, with every deviation in its place; the variable
// KATA_PLAY chooses the one that a run plays. tests/corpus runs the step's suite against each of them.
#pragma once

#include <initializer_list>
#include <string_view>

namespace flashkata::corpus {

struct Answer {
  std::string_view name;
  std::string_view mistake;  // the id that the suite must recognise (mistakes.cpp), what the checker must find, such
                             // as "shared-memory race" (findings.hpp), or one of the two below
};

inline constexpr std::string_view RIGHT = "right";      // must pass
inline constexpr std::string_view UNNAMED = "unnamed";  // must fail; nobody has to recognise it

/// Announces a step's answers; one in each corpus file. With KATA_PLAY=list it prints them and ends the program.
struct Answers {
  Answers(std::initializer_list<Answer> answers);
};

/// The answer that this run plays; empty for the right one.
std::string_view name();

/// Does this run play that answer?
bool plays(std::string_view name);

}  // namespace flashkata::corpus
