// How fast phase 2's tiled forward pass is on this machine's CPU, on one thread and on all: GFLOP/s, counting
// 4 Sq Sk D H operations, or half of them under a causal mask. Every answer is checked before it is timed.
//
//   cmake --preset solutions -B build/native -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS="-march=native -w"
//   cmake --build build/native --target tiled_forward_cpu && build/native/benchmarks/tiled_forward_cpu
//
// Options: a number of threads, then Br and Bc, to try others than the defaults.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "phase2_forward/03_tiled_forward/tiled_forward.hpp"

namespace {

using namespace flashkata;

struct Problem {
  Index heads, length, width;
  bool causal;
};

Tensor<float, 4> random_tensor(const Problem& p, unsigned seed) {
  Tensor<float, 4> tensor({1, p.heads, p.length, p.width});
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::generate_n(tensor.data(), tensor.count(), [&] { return normal(engine); });
  return tensor;
}

// The largest error, against float64, over some queries of some heads.
double largest_error(const Problem& p, const Tensor<float, 4>& q, const Tensor<float, 4>& k, const Tensor<float, 4>& v,
                     const TiledResult& result) {
  double worst = 0.0;
  for (const Index h : {Index{0}, p.heads - 1}) {
    for (Index i = 0; i < p.length; i += i < 2 ? 1 : 97) {
      const Index seen = p.causal ? i + 1 : p.length;
      std::vector<double> score(static_cast<std::size_t>(seen));
      double high = -1e300;
      for (Index j = 0; j < seen; ++j) {
        double dot = 0.0;
        for (Index d = 0; d < p.width; ++d)
          dot += static_cast<double>(q(0, h, i, d)) * static_cast<double>(k(0, h, j, d));
        score[static_cast<std::size_t>(j)] = dot / std::sqrt(static_cast<double>(p.width));
        high = std::max(high, score[static_cast<std::size_t>(j)]);
      }
      double sum = 0.0;
      for (double& s : score) sum += s = std::exp(s - high);
      for (Index d = 0; d < p.width; ++d) {
        double want = 0.0;
        for (Index j = 0; j < seen; ++j)
          want += score[static_cast<std::size_t>(j)] / sum * static_cast<double>(v(0, h, j, d));
        const double error = std::abs(want - static_cast<double>(result.output(0, h, i, d)));
        worst = error <= worst ? worst : error;  // NaN stays
      }
      const double lse_error = std::abs(high + std::log(sum) - static_cast<double>(result.lse(0, h, i)));
      worst = lse_error <= worst ? worst : lse_error;
    }
  }
  return worst;
}

double median_seconds(const std::function<void()>& call) {
  std::vector<double> seconds;
  const auto clock = [] { return std::chrono::steady_clock::now(); };
  const auto begin = clock();
  do {
    const auto start = clock();
    call();
    seconds.push_back(std::chrono::duration<double>(clock() - start).count());
  } while (seconds.size() < 7 || (seconds.size() < 200 && clock() - begin < std::chrono::milliseconds(700)));
  std::nth_element(seconds.begin(), seconds.begin() + static_cast<long>(seconds.size() / 2), seconds.end());
  return seconds[seconds.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  TiledOptions options;
  const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  const int threads = argc > 1 ? std::atoi(argv[1]) : cores;
  if (argc > 2) options.block_rows = std::atol(argv[2]);
  if (argc > 3) options.block_cols = std::atol(argv[3]);
  std::printf("Br %ld, Bc %ld, fp32, B=1; median GFLOP/s\n", static_cast<long>(options.block_rows),
              static_cast<long>(options.block_cols));
  std::printf("%2s %6s %4s %7s %10s %11s %10s\n", "H", "S", "D", "", "1 thread",
              (std::to_string(threads) + " threads").c_str(), "max error");

  bool all_right = true;
  for (const Problem& p : {Problem{8, 1024, 64, false}, Problem{8, 1024, 64, true}, Problem{8, 4096, 64, false},
                           Problem{8, 4096, 64, true}, Problem{8, 2048, 128, false}, Problem{8, 2048, 128, true}}) {
    const Tensor<float, 4> q = random_tensor(p, 1);
    const Tensor<float, 4> k = random_tensor(p, 2);
    const Tensor<float, 4> v = random_tensor(p, 3);
    options.causal = p.causal;
    const double operations =
        4.0 * static_cast<double>(p.length * p.length * p.width * p.heads) * (p.causal ? 0.5 : 1.0);
    double rate[2];
    double error = 0.0;
    for (const int run : {0, 1}) {
      options.threads = run == 0 ? 1 : threads;
      const double e = largest_error(p, q, k, v, tiled_forward(q, k, v, options));
      error = e <= error ? error : e;
      rate[run] = operations / median_seconds([&] { tiled_forward(q, k, v, options); }) * 1e-9;
    }
    const bool right = error < 1e-5;
    all_right = all_right && right;
    std::printf("%2ld %6ld %4ld %7s %10.1f %11.1f %10.1e%s\n", static_cast<long>(p.heads), static_cast<long>(p.length),
                static_cast<long>(p.width), p.causal ? "causal" : "full", rate[0], rate[1], error,
                right ? "" : "  WRONG");
  }
  return all_right ? 0 : 1;
}
