// The communicator over device memory, of virtual GPUs and of real ones: what arrives where and when, what overlaps,
// and how it ends when it cannot.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <thread>

#include "common/distributed/devices.hpp"
#include "common/gpu/gpu.hpp"
#include "common/testing/compare.hpp"
#include "common/testing/ranks.hpp"
#include "common/testing/report.hpp"
#include "slow_kernels.hpp"
#include "tests/distributed/exchanges.hpp"

using namespace flashkata;
using namespace flashkata::testing;
using namespace std::chrono_literals;

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto PATIENCE = 2000ms;

using Numbers = DeviceBuffer<float>;

std::span<float> all_of(Numbers& numbers) { return {numbers.data(), numbers.size()}; }
std::span<float> first_of(Numbers& numbers, std::size_t count) { return {numbers.data(), count}; }

Numbers numbers_of(int rank, std::size_t count) { return {"numbers", counted_from(rank, count)}; }

void exchange(Communicator& devices, RankReport& report) {
  const int rank = devices.rank();
  const auto ranks = static_cast<std::size_t>(devices.size());
  for (const std::size_t count : {std::size_t{0}, std::size_t{3}, std::size_t{300'000}}) {
    Numbers mine = numbers_of(rank, count), reduced = numbers_of(rank, count);
    Numbers next("next", count), all("all", ranks * count), sum("sum", count);
    Transfer transfer = devices.shift(all_of(mine), all_of(next));
    transfer.wait();
    transfer.wait();  // does nothing
    devices.all_gather(all_of(mine), all_of(all));
    devices.reduce_scatter(all_of(all), all_of(sum));
    devices.all_reduce(all_of(reduced));
    devices.barrier();
    const auto report_as = [&](const std::string& name, const Numbers& numbers) {
      std::vector<float> values = numbers.download();
      if (count == 300'000) values = {values.front(), values.back()};  // the ends suffice
      report.arrays[name + " " + std::to_string(count)] = array_of(values);
    };
    report_as("shift", next);
    report_as("all_gather", all);
    report_as("reduce_scatter", sum);
    report_as("all_reduce", reduced);
  }
  // Two exchanges at once arrive in the order in which they began, whatever is waited for first. A destructor waits.
  Numbers one = numbers_of(rank, 2), other = numbers_of(rank + 10, 5), first("first", 2), second("second", 5);
  {
    Transfer a = devices.shift(all_of(one), all_of(first));
    Transfer b = devices.shift(all_of(other), all_of(second));
    b.wait();
  }
  const std::vector<float> a = first.download(), b = second.download();
  report.arrays["two"] = array_of({a[0], a[1], b[0], b[4]});
}

// Kernels before, during and after an exchange, and no waiting for the GPU anywhere.
void order(Communicator& devices, RankReport& report) {
  const int rank = devices.rank();
  Numbers sent("sent", 1000), got("got", 1000), kept("kept", 1000), gathered("gathered", 1000 * devices.size());
  for (int turn = 0; turn < 3; ++turn) {
    const float mine = static_cast<float>(1000 * rank + turn);
    write_late(20ms, mine, all_of(sent));
    Transfer transfer = devices.shift(all_of(sent), all_of(got));
    write_late(20ms, mine, all_of(kept));
    transfer.wait();
    write_late(0ms, -1.0f, all_of(sent));  // too late to arrive
    const std::vector<float> values = got.download();
    report.arrays["shift " + std::to_string(turn)] = array_of({values.front(), values.back()});
    devices.all_gather(all_of(kept), all_of(gathered));
    write_late(0ms, -1.0f, all_of(kept));
    const std::vector<float> all = gathered.download();
    report.arrays["all_gather " + std::to_string(turn)] = array_of({all.front(), all.back()});
  }
}

// Milliseconds of 256 MiB around the ring, of kernels that fill the GPU, and of both at once; the best of several.
void overlap(Communicator& devices, RankReport& report) {
  constexpr std::size_t COUNT = std::size_t{64} << 20;
  Numbers sent("sent", COUNT), got("got", COUNT);
  const auto milliseconds_of = [&](const std::function<void()>& work) {
    double best = 1e9;
    for (int turn = 0; turn < 6; ++turn) {  // the first finds the way
      devices.barrier();
      synchronize();
      const auto begin = Clock::now();
      work();
      synchronize();
      best = std::min(best, std::chrono::duration<double, std::milli>(Clock::now() - begin).count());
    }
    return best;
  };
  const auto work = [] { keep_busy(250, 20us); };
  const auto send = [&] {
    for (int message = 0; message < 8; ++message) devices.shift(all_of(sent), all_of(got)).wait();
  };
  const double working = milliseconds_of(work), sending = milliseconds_of(send) / 8;
  const double both = milliseconds_of([&] {
    Transfer transfer = devices.shift(all_of(sent), all_of(got));
    work();
    transfer.wait();
  });
  report.arrays["ms"] = {{3}, {working, sending, both}};
}

const RankWork work([](Communicator& hosts, RankReport& report) {
  report.doing = report.task;
  const auto devices = hosts.size() == 1 ? one_device() : connect_devices(PATIENCE);
  const int rank = devices->rank();
  Numbers four("four", 4), other("other", 4), many("many", 40);
  four.fill_zero();
  many.fill_zero();
  if (report.task == "exchange") exchange(*devices, report);
  if (report.task == "order") order(*devices, report);
  if (report.task == "overlap") overlap(*devices, report);
  if (report.task == "killed") {
    if (rank == 1) raise(SIGKILL);
    devices->shift(all_of(four), all_of(other)).wait();
    devices->all_reduce(all_of(four));
  }
  if (report.task == "leaves") {
    if (rank == 1) std::_Exit(0);
    devices->all_reduce(all_of(four));
  }
  if (report.task == "throws during an exchange") {
    Transfer transfer = devices->shift(all_of(four), all_of(other));
    if (rank == 1) throw std::runtime_error("rank 1 had enough");
    transfer.wait();
    devices->barrier();
  }
  if (report.task == "does not come") {
    if (rank == 1) std::this_thread::sleep_for(20s);
    devices->shift(all_of(four), all_of(other)).wait();
  }
  if (report.task == "is busy") {  // so that the exchange has begun everywhere, but moves nothing
    if (rank == 1) write_late(6s, 0.0f, all_of(four));
    devices->shift(all_of(four), all_of(other)).wait();
  }
  if (report.task == "sends more") {
    devices->shift(first_of(many, rank == 1 ? 8 : 4), all_of(other)).wait();
  }
  if (report.task == "gathers more") {
    const std::size_t count = rank == 1 ? 5 : 4;
    const std::size_t all = count * static_cast<std::size_t>(devices->size());
    devices->all_gather(first_of(many, count), std::span<float>(many.data() + 10, all));
  }
  if (report.task == "sums more") devices->all_reduce(first_of(many, rank == 1 ? 5 : 4));
  if (report.task == "calls something else") {
    if (rank == 1) {
      devices->barrier();
    } else {
      devices->all_reduce(all_of(four));
    }
  }
});

// Why a case on so many ranks cannot run here; empty if it can.
std::string why_not(int ranks) {
  if (ranks > 1 && !why_no_ranks().empty()) return why_no_ranks();
  return why_not_so_many_devices(ranks);
}

bool skipped(int ranks) {
  const std::string why = why_not(ranks);
  if (!why.empty()) skip(why);
  return !why.empty();
}

// How many ranks there are GPUs for: of real ones 1, 2, 4, 8.
std::vector<int> numbers_of_ranks() {
  std::vector<int> possible;
  for (const int ranks : KATA_REAL_GPU ? std::vector<int>{1, 2, 4, 8} : std::vector<int>{1, 3}) {
    if (why_not(ranks).empty()) possible.push_back(ranks);
  }
  return possible;
}

// The task fails on three ranks, or on two where there are no more GPUs, says what it should, and takes less than
// `limit`.
void expect_failure(const std::string& task, const std::vector<std::string>& words, std::chrono::seconds limit) {
  testing::expect_failure(why_not(3).empty() ? 3 : 2, 5s, task, words, limit);
}

// NCCL's ranks compare what they are about to do; MPI's find out.
std::vector<std::string> words(std::vector<std::string> mpi, std::vector<std::string> nccl) {
  return KATA_REAL_GPU ? nccl : mpi;
}

}  // namespace

TEST_SUITE("tests.devices") {
  TEST_CASE("everything arrives where it should") {
    if (skipped(1)) return;
    for (const int ranks : numbers_of_ranks()) {
      if (!expect_exchange(ranks)) return;
    }
  }

  TEST_CASE("what was launched before is sent, what is launched after is not") {
    if (skipped(1)) return;
    for (const int ranks : numbers_of_ranks()) {
      const RanksOutcome& outcome = on_ranks(ranks, "order");
      if (!expect(outcome.failure.empty(), "failure", outcome.failure)) return;
      for (int rank = 0; rank < ranks; ++rank) {
        for (int turn = 0; turn < 3; ++turn) {
          const double previous = 1000.0 * ((rank + ranks - 1) % ranks) + turn, last = 1000.0 * (ranks - 1) + turn;
          expect_numbers(outcome, rank, "shift " + std::to_string(turn), {previous, previous + 999});
          expect_numbers(outcome, rank, "all_gather " + std::to_string(turn), {static_cast<double>(turn), last + 999});
        }
      }
    }
  }

  TEST_CASE("an exchange hides behind work") {
    if (!KATA_REAL_GPU) return skip("needs real GPUs: on the virtual one work has been done when it has been launched");
    if (skipped(2)) return;
    for (const int ranks : numbers_of_ranks()) {
      if (ranks == 1) continue;
      const RanksOutcome& outcome = on_ranks(ranks, "overlap");
      if (!expect(outcome.failure.empty(), "failure", outcome.failure)) return;
      const std::vector<double>& ms = outcome.ranks[0].arrays.at("ms").values;
      const double working = ms[0], sending = ms[1], both = ms[2];
      std::ostringstream text;
      text.precision(3);
      text << "on " << ranks << " ranks: work " << working << " ms, 256 MiB around the ring " << sending
           << " ms, both at once " << both << " ms";
      figures(text.str());
      expect(both < working + 0.5 * sending, "overlap", text.str() + ", want half of the exchange hidden or more");
    }
  }

  TEST_CASE("a rank that dies ends the others") {
    if (skipped(2)) return;
    expect_failure("throws during an exchange", {"rank 1 in throws during an exchange: rank 1 had enough"}, 15s);
    if (!KATA_REAL_GPU) return;  // the others are MPI's, and tested in communicator_test.cpp
    expect_failure("killed", {"rank 1", "signal 9"}, 15s);
    expect_failure("leaves", {"rank 1 was ended"}, 15s);
  }

  TEST_CASE("who waits in vain says so") {
    if (skipped(2)) return;
    expect_failure("does not come",
                   words({"rank 2 in does not come: rank 2 of 3, shift 1: waiting for 16 bytes from rank 1"},
                         {"rank 0 in does not come: rank 0 of",
                          "shift 1: the ranks do not meet: ", "waiting for rank 1 since 2000 ms"}),
                   15s);
  }

  TEST_CASE("an exchange that does not move is aborted") {
    if (!KATA_REAL_GPU) return skip("needs real GPUs: on the virtual one nothing is late");
    if (skipped(2)) return;
    const std::string next = why_not(3).empty() ? "2" : "0";  // after rank 1
    expect_failure("is busy",
                   {"rank " + next + " in is busy: rank " + next + " of", "shift 1: waiting for 16 bytes from rank 1",
                    "since 2000 ms"},
                   20s);
  }

  TEST_CASE("sizes that differ are named") {
    if (skipped(2)) return;
    const std::string last = why_not(3).empty() ? "2" : "0";
    expect_failure("sends more",
                   words({"shift 1: expected 16 bytes from rank 1, and more arrived"},
                         {"shift 1: sizes differ: rank 1 sends 32 bytes, rank " + last + " expects 16 bytes"}),
                   15s);
    expect_failure("gathers more",
                   words({"all_gather: sizes differ: this rank brought 16, rank 1 20"},
                         {"all_gather: sizes differ: rank 0 sends 16 bytes, rank 1 expects 20 bytes"}),
                   15s);
    if (!KATA_REAL_GPU) return;  // as above
    expect_failure("sums more", {"all_reduce: sizes differ: rank 0 sends 16 bytes, rank 1 expects 20 bytes"}, 15s);
    expect_failure("calls something else", {"all_reduce: rank 1 calls barrier", "barrier: rank 0 calls all_reduce"},
                   15s);
  }

  TEST_CASE("more ranks than GPUs") {
    if (!KATA_REAL_GPU) return skip("of virtual GPUs there are as many as are wanted");
    if (skipped(2)) return;
    int ranks = 2;
    while (why_not(ranks).empty()) ++ranks;
    expect(why_not(ranks).find("needs " + std::to_string(ranks) + " GPUs") == 0, "why", why_not(ranks));
    const RanksOutcome& outcome = on_ranks(ranks, "exchange");
    for (const std::string& word : {std::to_string(ranks) + " ranks on this machine, but it has",
                                    std::string("GPU 0 is rank 0's too"), std::string("mpiexec -n")}) {
      expect(outcome.failure.find(word) != std::string::npos, "failure",
             "should say '" + word + "', but is '" + outcome.failure + "'");
    }
  }

  TEST_CASE("one device says what is wrong with bad arguments") {
    if (skipped(1)) return;
    const auto alone = one_device();
    Numbers four("four", 4), five("five", 5), out("out", 4);
    four.fill_zero();
    five.fill_zero();
    alone->shift(all_of(four), all_of(out)).wait();  // this is right
    expect_rejected("the same memory", "incoming", [&] { alone->shift(all_of(four), all_of(four)).wait(); });
    expect_rejected("too much to gather", "all", [&] { alone->all_gather(all_of(four), all_of(five)); });
    expect_rejected("too much to scatter", "all", [&] { alone->reduce_scatter(all_of(five), all_of(four)); });
    try {
      alone->shift(all_of(five), all_of(four)).wait();
      finding("shift", "of 5 numbers into 4 did not throw");
    } catch (const CommunicationError& error) {
      expect(std::string(error.what()).find("20 bytes") != std::string::npos, "shift", error.what());
    }
  }
}
