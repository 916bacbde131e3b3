// Recognition: an answer that is wrong in a known way is told the question that its author should ask.
//
// The outputs of every known wrong answer on a step's numbered cases were reduced to a few numbers each, its
// fingerprint, and stored in common/testing/fingerprints/<label>.json. When a suite fails, the student's answer is run
// on the same cases and its fingerprint is looked up. No wrong (or right) answer is needed for it, only their
// fingerprints.
#pragma once

#include <functional>
#include <iosfwd>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "common/testing/array.hpp"

namespace flashkata::testing {

/// A case's outputs in five numbers that change little with rounding and much with anything else.
struct Fingerprint {
  double nan = 0.0;       // how many outputs are NaN; -1: the answer threw
  double infinite = 0.0;  // how many are infinite
  double norm = 0.0;      // root of the sum of squares of the others
  double first = 0.0;     // two sums of them under fixed random signs
  double second = 0.0;
};

/// The fingerprint of an answer: one for each of a step's cases, by number.
using Fingerprints = std::map<int, Fingerprint>;

/// Tells how to run the step's answer on its cases, so that a failure can be recognised. One in each suite:
///     const Recognise recognise([] { return ...; })
/// `cases` lists the numbers, `outputs` runs the answer on one of them.
struct Recognise {
  Recognise(std::vector<int> cases, std::function<std::vector<Array>(int)> outputs);
};

/// The answer's fingerprints on all cases but those that need a stub; none if the suite has no Recognise.
Fingerprints take_fingerprints();

/// The id of the known mistake that explains the answer on the cases that it has, if exactly one does. The step's
/// fingerprints are {"right": {"1": [...], ...}, "wrong": [{"mistake": id, "cases": {"1": [...], ...}}, ...]}, where a
/// wrong answer has the cases that it spoils.
std::optional<std::string> recognise(const Fingerprints& answer);
std::optional<std::string> recognise(const Fingerprints& answer, std::istream& fingerprints);

/// Whether two fingerprints are the same but for rounding.
bool alike(const Fingerprint& one, const Fingerprint& other);

/// {"3": [0, 0, 12.5, 1.25, -3.5], ...}: how fingerprints are stored.
void print_fingerprints(std::ostream& out, const Fingerprints& fingerprints);

}  // namespace flashkata::testing
