#include <benchmark/benchmark.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <memory>
#include <thread>

#include "benchmarks/bench/timing.hpp"
#include "common/attention/tensor.hpp"

namespace flashkata::bench {
namespace {

// Google Benchmark prints what it measures; this keeps it.
class Keep : public benchmark::BenchmarkReporter {
 public:
  bool ReportContext(const Context&) override { return true; }
  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& run : runs) {
      if (run.run_type == Run::RT_Iteration) milliseconds.push_back(run.GetAdjustedRealTime());
    }
  }
  std::vector<double> milliseconds;
};

// The best of many short calls, in seconds: what is possible, not what is usual.
double best_seconds(const std::function<void()>& call) {
  using Clock = std::chrono::steady_clock;
  double best = 1e300;
  const auto begin = Clock::now();
  do {
    const auto start = Clock::now();
    call();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  } while (Clock::now() - begin < std::chrono::milliseconds(600));
  return best;
}

void on_threads(int threads, const std::function<void(int)>& work) {
  std::vector<std::jthread> running;
  for (int thread = 1; thread < threads; ++thread) running.emplace_back(work, thread);
  work(0);
}

// Multiplications and additions in registers, as many chains as hide their latency.
using Packet = Eigen::internal::packet_traits<float>::type;
constexpr int LANES = Eigen::internal::packet_traits<float>::size;
constexpr int CHAINS = 12;
constexpr int STEPS = 50000;
constexpr double OPERATIONS = 2.0 * LANES * CHAINS * STEPS;

float multiply_and_add() {
  using namespace Eigen::internal;
  const Packet factor = pset1<Packet>(0.5f), one = pset1<Packet>(1.0f);
  Packet chain[CHAINS];
  for (int c = 0; c < CHAINS; ++c) chain[c] = pset1<Packet>(static_cast<float>(c));
  for (int step = 0; step < STEPS; ++step) {
#pragma GCC unroll 12
    for (int c = 0; c < CHAINS; ++c) chain[c] = pmadd(chain[c], factor, one);
  }
  Packet sum = chain[0];
  for (int c = 1; c < CHAINS; ++c) sum = padd(sum, chain[c]);
  return predux(sum);
}

std::string processor_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "CPU";
}

}  // namespace

Time time_on_cpu(const std::function<void()>& call, double seconds) {
  Keep keep;
  const auto body = [&](benchmark::State& state) {
    for (auto _ : state) call();
  };
  // Each repetition is one call or, if calls are short, as many as take its part of the time.
  const int repetitions = seconds < 0.5 ? 3 : 9;
  benchmark::RegisterBenchmark("call", body)
      ->Unit(benchmark::kMillisecond)
      ->UseRealTime()
      ->MinTime(seconds / repetitions)
      ->Repetitions(repetitions);
  static bool initialised = false;
  if (!initialised) {
    int count = 1;
    char name[] = "bench";
    char* arguments[] = {name, nullptr};
    benchmark::Initialize(&count, arguments);
    initialised = true;
  }
  benchmark::RunSpecifiedBenchmarks(&keep);
  benchmark::ClearRegisteredBenchmarks();
  return summary(keep.milliseconds);
}

Ceilings cpu_ceilings(int threads) {
  if (threads == 0) threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  Ceilings ceilings{.name =
                        processor_name() + ", " + std::to_string(threads) + (threads == 1 ? " thread" : " threads")};
  // Copies far larger than any cache; products that live in it.
  constexpr std::size_t COPIED = std::size_t{1} << 27;
  const std::unique_ptr<char[]> from(new char[COPIED]), to(new char[COPIED]);
  const std::size_t share = COPIED / static_cast<std::size_t>(threads);
  on_threads(threads, [&](int thread) {
    std::memset(from.get() + static_cast<std::size_t>(thread) * share, 1, share);
    std::memset(to.get() + static_cast<std::size_t>(thread) * share, 2, share);
  });
  const double copying = best_seconds([&] {
    on_threads(threads, [&](int thread) {
      const std::size_t begin = static_cast<std::size_t>(thread) * share;
      std::memcpy(to.get() + begin, from.get() + begin, share);
      benchmark::DoNotOptimize(to[begin]);
    });
  });
  ceilings.copy_gb_s = 2.0 * static_cast<double>(COPIED) / copying * 1e-9;

  std::vector<float> sums(static_cast<std::size_t>(threads));
  const double multiplying = best_seconds(
      [&] { on_threads(threads, [&](int thread) { sums[static_cast<std::size_t>(thread)] = multiply_and_add(); }); });
  benchmark::DoNotOptimize(sums.data());
  ceilings.float32_tflops = OPERATIONS * threads / multiplying * 1e-12;
  return ceilings;
}

}  // namespace flashkata::bench
