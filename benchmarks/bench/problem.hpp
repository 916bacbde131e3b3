// One line of a benchmark: what is asked and what is answered, as ./kata bench (tools/kata) and its workers exchange
// it, in JSON.
#pragma once

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

namespace flashkata::bench {

struct Problem {
  std::string step;         // "2.05": forward; "3.05": backward, or both one after the other
  std::string type{};       // "float32", "float16", "bfloat16"
  std::string direction{};  // "forward", "backward", "both"
  bool gpu = false;
  bool causal = false;
  std::int64_t batch = 1, heads = 1, length = 1, width = 64;
  int threads = 0;  // on the CPU; 0: as many as there are cores

  bool forward() const { return direction != "backward"; }
  bool backward() const { return direction != "forward"; }

  /// 4 S^2 D for each head forward, two products; 10 S^2 D backward, five. Half of them under a causal mask.
  double operations() const {
    const double pairs = static_cast<double>(length) * static_cast<double>(length) * (causal ? 0.5 : 1.0);
    const double products = (forward() ? 2.0 : 0.0) + (backward() ? 5.0 : 0.0);
    return products * 2.0 * pairs * static_cast<double>(batch * heads * width);
  }

  /// The least that has to be moved: every input read once, every output written once.
  double bytes() const {
    const double tensor = static_cast<double>(batch * heads * length * width) * (type == "float32" ? 4.0 : 2.0);
    return tensor * ((forward() ? 4.0 : 0.0) + (backward() ? 8.0 : 0.0));
  }
};

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Problem, step, type, direction, gpu, causal, batch, heads, length, width, threads)

/// Milliseconds of one call: the median, and the quarters around it.
struct Time {
  double median = 0.0, low = 0.0, high = 0.0;
  int calls = 0;
};

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Time, median, low, high, calls)

/// What this machine could do at most, measured: copying counts what is read and what is written.
struct Ceilings {
  std::string name;
  double copy_gb_s = 0.0;
  double float32_tflops = 0.0;
  double tensor_tflops = 0.0;  // 16-bit matrix products; 0: it has none

  /// TFLOP/s that bandwidth and arithmetic allow (Williams et al. 2009, Roofline).
  double roof(const Problem& problem) const {
    const double rate = problem.type != "float32" && tensor_tflops > 0 ? tensor_tflops : float32_tflops;
    return std::min(rate, problem.operations() / problem.bytes() * copy_gb_s * 1e-3);
  }
};

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Ceilings, name, copy_gb_s, float32_tflops, tensor_tflops)

}  // namespace flashkata::bench
