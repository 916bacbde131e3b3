// Which number came out where: for results whose operands were fed with the numbers of their own rows and channels.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <sstream>
#include <string>

#include "common/testing/array.hpp"
#include "common/testing/report.hpp"

namespace flashkata::testing {

/// A result whose row r should be row source(r) of an operand.
struct Arrival {
  const char* name;  // of the result: "d_key"
  const char* axis;  // of its rows: "key"
  const char* from;  // the operand, with its axes: "Q[query,channel]"
  std::function<Index(Index)> source;
  bool fragments = true;  // the result is made of C fragments of mma_m16n8k16: say so beside the map
  double tolerance = 0.3;
};

/// `rows` and `channels`, [count, width], are the result when the operand holds the numbers of its rows and those of
/// its channels. A finding unless all are where they belong; then also a map of the tile of 16 rows and 8 channels
/// around the first that is not.
inline bool expect_arrived(const Array& rows, const Array& channels, const Arrival& arrival) {
  const Index count = rows.shape.at(0);
  const Index width = rows.shape.at(1);
  const auto at = [width](const Array& array, Index r, Index d) {
    return array.values[static_cast<std::size_t>(r * width + d)];
  };
  const auto is = [&](double got, Index want) {
    return std::abs(got - static_cast<double>(want)) <= arrival.tolerance;
  };
  const auto right = [&](Index r, Index d) {
    return is(at(rows, r, d), arrival.source(r)) && is(at(channels, r, d), d);
  };
  const auto number = [&](double got) {
    const bool whole = std::abs(got) < 1e6 && std::abs(got - std::round(got)) <= arrival.tolerance;
    return whole ? std::to_string(std::lround(got)) : std::string("?");
  };

  Index wrong = 0;
  while (wrong < count * width && right(wrong / width, wrong % width)) ++wrong;
  if (wrong == count * width) return true;

  std::ostringstream text;
  text << "at [" << arrival.axis << ' ' << wrong / width << ", channel " << wrong % width << "] arrived "
       << arrival.from << " = [" << at(rows, wrong / width, wrong % width) << ", "
       << at(channels, wrong / width, wrong % width) << "]; want [" << arrival.source(wrong / width) << ", "
       << wrong % width << "]";
  finding(arrival.name, text.str());

  const Index row = wrong / width / 16 * 16;
  const Index channel = wrong % width / 8 * 8;
  finding("map", std::string(arrival.from) + " that arrived in the tile of 16 x 8 around it, channels " +
                     std::to_string(channel) + " to " + std::to_string(channel + 7) +
                     (arrival.fragments ? "; as a C fragment: lane = 4 (row % 8) + (channel % 8) / 2, registers c[0], "
                                          "c[1] above row 8 and c[2], c[3] from row 8 on"
                                        : ""));
  for (Index r = row; r < std::min(count, row + 16); ++r) {
    std::string line;
    bool all_right = true;
    for (Index d = channel; d < channel + 8; ++d) {
      line += number(at(rows, r, d)) + "," + number(at(channels, r, d)) + "  ";
      all_right = all_right && right(r, d);
    }
    if (!all_right) {
      finding(std::string(arrival.axis) + " " + std::to_string(r), line + "want " + std::to_string(arrival.source(r)));
    }
  }
  return false;
}

}  // namespace flashkata::testing
