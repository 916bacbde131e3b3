// What the communicator's tests expect, whatever memory it moves: host memory (communicator_test.cpp) or that of
// devices (devices_test.cpp). Both have a task "exchange" that reports its arrays under the names used here.
#pragma once

#include <chrono>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "common/testing/compare.hpp"
#include "common/testing/ranks.hpp"

namespace flashkata::testing {

inline Array array_of(const std::vector<float>& numbers) {
  return {{static_cast<Index>(numbers.size())}, {numbers.begin(), numbers.end()}};
}

/// Rank r's numbers: 100 r, 100 r + 1, ...
inline std::vector<float> counted_from(int rank, std::size_t count) {
  std::vector<float> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 100.0f * static_cast<float>(rank));
  return numbers;
}

/// The rank reported exactly these numbers under this name.
inline void expect_numbers(const RanksOutcome& outcome, int rank, const std::string& name,
                           const std::vector<double>& want) {
  const auto& arrays = outcome.ranks[static_cast<std::size_t>(rank)].arrays;
  expect_same_bits(name, arrays.at(name), Array{{static_cast<Index>(want.size())}, want}, {"number"},
                   "on rank " + std::to_string(rank) + " of " + std::to_string(outcome.ranks.size()));
}

/// The task "exchange" on so many ranks: everything has arrived where it should. False if the ranks failed.
inline bool expect_exchange(int ranks) {
  const RanksOutcome& outcome = on_ranks(ranks, "exchange");
  if (!expect(outcome.failure.empty(), "failure", outcome.failure)) return false;
  for (int rank = 0; rank < ranks; ++rank) {
    const double previous = 100.0 * ((rank + ranks - 1) % ranks), sum = 50.0 * ranks * (ranks - 1);
    const auto same = [&](const std::string& name, const std::vector<double>& want) {
      expect_numbers(outcome, rank, name, want);
    };
    const double last = 299'999;
    std::vector<double> all;
    for (int r = 0; r < ranks; ++r) {
      for (int i = 0; i < 3; ++i) all.push_back(100.0 * r + i);
    }
    same("shift 0", {});
    same("all_gather 0", {});
    same("shift 3", {previous, previous + 1, previous + 2});
    same("all_gather 3", all);
    same("reduce_scatter 3", {100.0 * rank * ranks, (100.0 * rank + 1) * ranks, (100.0 * rank + 2) * ranks});
    same("all_reduce 3", {sum, sum + ranks, sum + 2 * ranks});
    same("shift 300000", {previous, previous + last});
    same("all_gather 300000", {0, 100.0 * (ranks - 1) + last});
    same("reduce_scatter 300000", {100.0 * rank * ranks, (100.0 * rank + last) * ranks});
    same("all_reduce 300000", {sum, sum + ranks * last});
    same("two", {previous, previous + 1, previous + 1000, previous + 1004});
  }
  return true;
}

/// The task fails on so many ranks, says all of `words`, and takes less than `limit`.
inline void expect_failure(int ranks, std::chrono::milliseconds patience, const std::string& task,
                           const std::vector<std::string>& words, std::chrono::seconds limit) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  const RanksOutcome& outcome = on_ranks(ranks, task, patience);
  const auto took = std::chrono::duration_cast<std::chrono::seconds>(Clock::now() - begin);
  for (const std::string& word : words) {
    std::ostringstream sentence;
    sentence << "of '" << task << "' should say '" << word << "', but is '" << outcome.failure << "'";
    expect(outcome.failure.find(word) != std::string::npos, "failure", sentence.str());
  }
  expect(took < limit, "time", task + " took " + std::to_string(took.count()) + " s");
}

}  // namespace flashkata::testing
