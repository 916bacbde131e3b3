// One line of a benchmark: what is asked and what is answered, as ./kata bench (tools/kata) and its workers exchange
// it, in JSON.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace flashkata::bench {

/// Queries [B, H, Sq, D] that attend to keys and values [B, Hk, S, D].
struct Problem {
  std::string step{};       // "2.05": forward; "3.05": backward, or both one after the other
  std::string type{};       // "float32", "float16", "bfloat16"
  std::string direction{};  // "forward", "backward", "both"; "decode": forward, a few new queries and a long cache
  std::string what{};       // what phase 4 adds, in words: "ragged", "4 chunks"; empty: nothing
  bool gpu = false;
  bool causal = false;  // aligned to the bottom right
  std::int64_t batch = 1, heads = 1, kv_heads = 1, queries = 1, length = 1, width = 64;
  int threads = 0;  // on the CPU; 0: as many as there are cores

  // What phase 4 adds.
  bool packed = false;  // 4.01: the groups are sequences, and are handed over as cu_seqlens
  std::vector<std::array<std::int64_t, 4>> groups{};  // 4.05: q_begin, q_end, k_begin, k_end of each
  double dropout = 0.0;                               // 4.03: the part of the weights that falls
  std::vector<std::int64_t> window{};  // 4.04: so many keys before a query's own place and behind it, -1: no limit
  std::int64_t page = 0;               // 4.07: keys in a page; 0: the cache is in one piece

  double seconds = 0.5;  // for each competitor, about

  bool forward() const { return direction != "backward"; }
  bool backward() const { return direction == "backward" || direction == "both"; }
  bool decodes() const { return direction == "decode"; }

  struct Range {
    std::int64_t first = 0, last = 0;  // `last` itself is outside

    std::int64_t count() const { return std::max<std::int64_t>(0, last - first); }
    bool has(std::int64_t j) const { return first <= j && j < last; }
  };

  /// The keys that query i of every head sees.
  Range keys_of(std::int64_t i) const {
    for (const auto& [q_begin, q_end, k_begin, k_end] : groups) {
      if (q_begin <= i && i < q_end) return {k_begin, causal ? k_end - (q_end - 1 - i) : k_end};
    }
    if (!groups.empty()) return {};
    const std::int64_t place = i + length - queries;
    Range range{0, causal ? place + 1 : length};
    if (!window.empty() && window[0] >= 0) range.first = std::max(range.first, place - window[0]);
    if (!window.empty() && window[1] >= 0) range.last = std::min(range.last, place + window[1] + 1);
    return range;
  }

  /// Pairs of a query and a key that it sees; of those on the edge of a causal mask half, so that S^2 / 2 are left.
  double pairs() const {
    double sum = 0.0;
    for (std::int64_t i = 0; i < queries; ++i) {
      sum += std::max(0.0, static_cast<double>(keys_of(i).count()) - (causal ? 0.5 : 0.0));
    }
    return sum;
  }

  /// 4 D for each pair forward, two products; 10 D backward, five.
  double operations() const {
    const double products = (forward() ? 2.0 : 0.0) + (backward() ? 5.0 : 0.0);
    return products * 2.0 * pairs() * static_cast<double>(batch * heads * width);
  }

  /// The least that has to be moved: every input read once, every output written once. `separately`: by a call for each
  /// group, which reads its own slice of the keys and values.
  double bytes(bool separately = false) const {
    double sliced = 0.0;
    for (const auto& group : groups) sliced += static_cast<double>(group[3] - group[2]);
    const double keys = separately ? sliced : static_cast<double>(length);
    const double rows = static_cast<double>(heads * queries) + static_cast<double>(kv_heads) * keys;
    const double number = type == "float32" ? 4.0 : 2.0;
    return ((forward() ? 2.0 : 0.0) + (backward() ? 4.0 : 0.0)) * rows * static_cast<double>(batch * width) * number;
  }
};

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE_WITH_DEFAULT(Problem, step, type, direction, what, gpu, causal, batch, heads,
                                                kv_heads, queries, length, width, threads, packed, groups, dropout,
                                                window, page, seconds)

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
