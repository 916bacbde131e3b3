#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <vector>

#include "common/attention/not_implemented.hpp"
#include "phase3_backward/flash.hpp"

namespace flashkata {

/// Queries q_begin .. q_end - 1 attend to keys k_begin .. k_end - 1 and to no other.
struct Group {
  Index q_begin = 0, q_end = 0;
  Index k_begin = 0, k_end = 0;
};

/// A call has at most so many groups: they reach the GPU as an argument of the kernel, and arguments are few bytes.
inline constexpr Index MOST_GROUPS = 128;

// Grouped attention: all queries lie in one tensor [1, H, Tq, D], all keys and values in another, [1, Hk, Tk, D], and
// each group is a rectangle of pairs. A varlen batch is the case of disjoint slices, plain attention that of one group.
//
// Groups come in any order. Their queries do not overlap; their slices of keys may overlap, nest, coincide, be empty or
// have one key. H is a multiple of Hk, and query head h reads key/value head h / (H / Hk). With `causal` each group is
// aligned to the bottom right of its own rectangle: the last query of a group sees the last key of its slice.
//
// A query that may attend to nothing, because it is in no group or its slice is empty or too short, gets output 0 and
// lse -inf, and has gradients of 0, and gives none to any key, whatever it and its d_output hold. What a key outside of
// a query's slice holds, NaN and inf included, does not reach that query's output, lse or gradient (only their rounding
// may change, as rows share decisions); a NaN in one that it may attend to is not hidden from its output. A key of
// several slices gets the sum of what the groups give it; one that no query may see gets gradients of exactly 0.
// Everything is written wholly, whatever it held. The same inputs give the same bits; of flash_grouped_backward() this
// holds for d_query only with `deterministic`. Device memory: none beyond the arguments.
//
// Every function throws std::invalid_argument naming the argument, its value and what is allowed, before it writes.

// ---- On the CPU, in float: host memory, one call of tiled_forward() or tiled_backward() for each group --------------

void tiled_grouped_forward(const FlashForward<float>& problem, std::span<const Group> groups);

/// Leaves the scratch, delta and d_query_sum, alone.
void tiled_grouped_backward(const FlashBackward<float>& problem, std::span<const Group> groups);

// ---- (a) The prototype: host code that calls flash_forward_mma() once for each group, and copies nothing ------------

void separate_grouped_forward(const FlashForward<fp16>& problem, std::span<const Group> groups,
                              const Stream& stream = {});
void separate_grouped_forward(const FlashForward<bf16>& problem, std::span<const Group> groups,
                              const Stream& stream = {});

// ---- (b), (c) The fused kernels ---------------------------------------------------------------------------------
//
// D is 64 or 128, and 16 and 32 are welcome but not asked for (an answer that has none says so with
// std::invalid_argument naming query). Precision as flash_forward_mma() and flash_backward_mma(): operands of 16 bits,
// sums in fp32, the output and each gradient rounded once at the end.
//
// Keys and values are loaded for at least 64 rows of queries at once wherever as many need them. All rows count that
// read the same key/value head: those of several groups whose slices share the tile, and those of all heads of a GQA
// group. (Each group may round up its rows of each head to a multiple of 16.) What is in nobody's slice, and what
// `causal` hides from everybody, is not loaded.

void flash_grouped_forward(const FlashForward<fp16>& problem, std::span<const Group> groups, const Stream& stream = {});
void flash_grouped_forward(const FlashForward<bf16>& problem, std::span<const Group> groups, const Stream& stream = {});

void flash_grouped_backward(const FlashBackward<fp16>& problem, std::span<const Group> groups,
                            const Stream& stream = {});
void flash_grouped_backward(const FlashBackward<bf16>& problem, std::span<const Group> groups,
                            const Stream& stream = {});

// ---- The checks that they promise -----------------------------------------------------------------------------------

namespace grouped_detail {

inline void check_groups(const Shape<4>& query, const Shape<4>& key, std::span<const Group> groups) {
  require(query[0] == 1, "query", to_text(query), "[1, H, Tq, D]: one batch item, its sequences one after the other");
  require(groups.size() <= static_cast<std::size_t>(MOST_GROUPS), "groups", std::to_string(groups.size()) + " of them",
          "at most " + std::to_string(MOST_GROUPS));
  const auto check_range = [](const std::string& name, char which, Index begin, Index end, Index count) {
    const std::string prefix = name + '.' + which;
    require(0 <= begin && begin <= count, prefix + "_begin", begin, "0 .. " + std::to_string(count));
    require(begin <= end && end <= count, prefix + "_end", end,
            std::to_string(begin) + " .. " + std::to_string(count) + ", not before its begin");
  };
  std::vector<std::size_t> order;  // groups that have queries, from the first query to the last
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const std::string name = "groups[" + std::to_string(g) + "]";
    check_range(name, 'q', groups[g].q_begin, groups[g].q_end, query[2]);
    check_range(name, 'k', groups[g].k_begin, groups[g].k_end, key[2]);
    if (groups[g].q_begin < groups[g].q_end) order.push_back(g);
  }
  std::sort(order.begin(), order.end(),
            [&](std::size_t one, std::size_t other) { return groups[one].q_begin < groups[other].q_begin; });
  for (std::size_t i = 1; i < order.size(); ++i) {
    const Group& before = groups[order[i - 1]];
    require(before.q_end <= groups[order[i]].q_begin, "groups[" + std::to_string(order[i]) + "].q_begin",
            groups[order[i]].q_begin,
            std::to_string(before.q_end) + " or more: queries up to there are in groups[" +
                std::to_string(order[i - 1]) + "]");
  }
}

}  // namespace grouped_detail

template <typename T>
void check_grouped_forward(const FlashForward<T>& problem, std::span<const Group> groups) {
  check_flash_forward(problem, KeyHeads::shared);
  grouped_detail::check_groups(problem.query.shape(), problem.key.shape(), groups);
}

template <typename T>
void check_grouped_backward(const FlashBackward<T>& problem, std::span<const Group> groups) {
  check_flash_backward(problem, KeyHeads::shared);
  grouped_detail::check_groups(problem.query.shape(), problem.key.shape(), groups);
}

}  // namespace flashkata
