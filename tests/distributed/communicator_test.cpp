// The communicator alone and over MPI: what arrives where, and how it ends when it cannot.
#include <doctest/doctest.h>

#include <chrono>
#include <csignal>
#include <thread>

#include "common/testing/compare.hpp"
#include "common/testing/ranks.hpp"
#include "common/testing/report.hpp"
#include "tests/distributed/exchanges.hpp"

using namespace flashkata;
using namespace flashkata::testing;
using namespace std::chrono_literals;

namespace {

void exchange(Communicator& communicator, RankReport& report) {
  const int rank = communicator.rank();
  const auto ranks = static_cast<std::size_t>(communicator.size());
  // Small and large messages: MPI has other ways for the latter.
  for (const std::size_t count : {std::size_t{0}, std::size_t{3}, std::size_t{300'000}}) {
    const std::vector<float> mine = counted_from(rank, count);
    std::vector<float> next(count), all(ranks * count), sum(count), reduced = mine;
    Transfer transfer = communicator.shift(mine, next);
    transfer.wait();
    transfer.wait();  // does nothing
    communicator.all_gather(mine, all);
    communicator.reduce_scatter(all, sum);
    communicator.all_reduce(reduced);
    communicator.barrier();
    if (count == 300'000) {  // the ends suffice
      next = {next.front(), next.back()};
      all = {all.front(), all.back()};
      sum = {sum.front(), sum.back()};
      reduced = {reduced.front(), reduced.back()};
    }
    const std::string name = std::to_string(count);
    report.arrays["shift " + name] = array_of(next);
    report.arrays["all_gather " + name] = array_of(all);
    report.arrays["reduce_scatter " + name] = array_of(sum);
    report.arrays["all_reduce " + name] = array_of(reduced);
  }
  // Two exchanges at once arrive in the order in which they began, whatever is waited for first. A destructor waits.
  std::vector<float> first(2), second(5);
  const std::vector<float> one = counted_from(rank, 2), other = counted_from(rank + 10, 5);
  {
    Transfer a = communicator.shift(one, first);
    Transfer b = communicator.shift(other, second);
    b.wait();
  }
  report.arrays["two"] = array_of({first[0], first[1], second[0], second[4]});
}

void one_is_late(Communicator& communicator, RankReport&) {
  if (communicator.rank() == 1) std::this_thread::sleep_for(600ms);
  std::vector<float> numbers(4);
  const std::vector<float> mine = counted_from(communicator.rank(), 4);
  communicator.shift(mine, numbers).wait();
  communicator.all_reduce(numbers);
}

const RankWork work([](Communicator& communicator, RankReport& report) {
  const int rank = communicator.rank();
  report.doing = report.task;
  std::vector<float> four(4), other(4), many(40);
  if (report.task == "exchange") exchange(communicator, report);
  if (report.task == "late") one_is_late(communicator, report);
  if (report.task == "killed") {
    if (rank == 1) raise(SIGKILL);
    communicator.shift(four, other).wait();
    communicator.all_reduce(four);
  }
  if (report.task == "leaves") {
    if (rank == 1) std::_Exit(0);
    communicator.all_reduce(four);
  }
  if (report.task == "throws") {
    if (rank == 1) throw std::runtime_error("rank 1 had enough");
    communicator.barrier();
  }
  if (report.task == "throws during an exchange") {
    Transfer transfer = communicator.shift(four, other);
    if (rank == 1) throw std::runtime_error("rank 1 had enough");
    transfer.wait();
    communicator.barrier();
  }
  if (report.task == "does not come") {
    if (rank == 1) std::this_thread::sleep_for(20s);
    communicator.shift(four, other).wait();
  }
  if (report.task == "does not come to a sum") {
    if (rank == 1) std::this_thread::sleep_for(20s);
    communicator.all_reduce(four);
  }
  if (report.task == "sends more") {
    communicator.shift(std::span<const float>(many).first(rank == 1 ? 8 : 4), other).wait();
  }
  if (report.task == "sends less") {
    communicator.shift(std::span<const float>(many).first(rank == 1 ? 2 : 4), other).wait();
  }
  if (report.task == "gathers more") {
    const std::size_t count = rank == 1 ? 5 : 4;
    communicator.all_gather(std::span<const float>(many).first(count), std::span<float>(many).last(3 * count));
  }
  if (report.task == "sums more") communicator.all_reduce(std::span<float>(many).first(rank == 1 ? 5 : 4));
  if (report.task == "calls something else") {
    if (rank == 1) {
      communicator.barrier();
    } else {
      communicator.all_reduce(four);
    }
  }
});

bool no_ranks() {
  if (why_no_ranks().empty()) return false;
  skip(why_no_ranks());
  return true;
}

// The task fails on three ranks, says all of `words`, and takes less than `limit`.
void expect_failure(const std::string& task, const std::vector<std::string>& words, std::chrono::seconds limit) {
  testing::expect_failure(3, 1500ms, task, words, limit);
}

}  // namespace

TEST_SUITE("tests.communicator") {
  TEST_CASE("everything arrives where it should") {
    for (const int ranks : {1, 2, 3}) {
      if (ranks > 1 && no_ranks()) return;
      if (!expect_exchange(ranks)) return;
    }
  }

  TEST_CASE("who is late is waited for") {
    if (no_ranks()) return;
    expect(on_ranks(3, "late").failure.empty(), "failure", on_ranks(3, "late").failure);
  }

  TEST_CASE("a rank that dies ends the others") {
    if (no_ranks()) return;
    expect_failure("killed", {"rank 1", "signal 9"}, 10s);
    expect_failure("leaves", {"rank 1 was ended"}, 15s);
    expect_failure("throws", {"rank 1 in throws: rank 1 had enough"}, 10s);
    expect_failure("throws during an exchange", {"rank 1 in throws during an exchange: rank 1 had enough"}, 10s);
  }

  TEST_CASE("who waits in vain says for whom") {
    if (no_ranks()) return;
    expect_failure("does not come", {"rank 2 in does not come: rank 2 of 3, shift 1: waiting for 16 bytes from rank 1"},
                   15s);
    expect_failure("does not come to a sum",
                   {"rank 0 of 3, all_reduce: waiting for rank 1", "rank 2 of 3, all_reduce: waiting for rank 1"}, 15s);
  }

  TEST_CASE("sizes that differ are named") {
    if (no_ranks()) return;
    expect_failure("sends more", {"rank 2 of 3, shift 1: expected 16 bytes from rank 1, and more arrived"}, 10s);
    expect_failure("sends less", {"rank 2 of 3, shift 1: expected 16 bytes from rank 1, but 8 bytes arrived"}, 10s);
    expect_failure("gathers more", {"rank 0 of 3, all_gather: sizes differ: this rank brought 16, rank 1 20"}, 10s);
    expect_failure("sums more", {"rank 1 of 3, all_reduce: sizes differ: this rank brought 5, rank 0 4"}, 10s);
    expect_failure("calls something else", {"all_reduce: rank 1 makes another call"}, 10s);
  }

  TEST_CASE("one rank says what is wrong with bad arguments") {
    OneRank alone;
    std::vector<float> four(4), five(5);
    std::vector<float> out(4);
    Transfer transfer = alone.shift(four, out);  // these are right
    transfer.wait();
    expect_rejected("the same memory", "incoming", [&] { alone.shift(four, four).wait(); });
    expect_rejected("memory that overlaps", "incoming",
                    [&] { alone.shift(std::span<const float>(five).first(4), std::span<float>(five).last(4)).wait(); });
    expect_rejected("too much to gather", "all", [&] { alone.all_gather(four, five); });
    expect_rejected("too much to scatter", "all", [&] { alone.reduce_scatter(five, four); });
    try {
      alone.shift(five, four).wait();
      finding("shift", "of 5 numbers into 4 did not throw");
    } catch (const CommunicationError& error) {
      expect(std::string(error.what()).find("20 bytes") != std::string::npos, "shift", error.what());
    }
  }
}
