// What the kernels of phase 4 do differently: Rules say which rows a block works on, which keys a query sees, what
// becomes of a score and of a weight. Dense is attention as in phases 2 and 3; a step derives from it and replaces what
// its lesson is about.
#pragma once

#include <cmath>

#include "phase3_backward/flash.hpp"
#include "solutions/hidden/block_order.cuh"

namespace flashkata::flash_kernels {

// One head of one sequence.
struct Part {
  Index batch, head, kv_head;  // in the tensors
  Index q_first, k_first;      // the row, in the tensors, of its first query and of its first key
  int queries, keys;           // how many it has; from here on they are counted from 0
};

// Keys begin .. end - 1. Empty where begin >= end.
struct KeyRange {
  int begin, end;
};

struct Dense {
  static constexpr bool CAPS = false;   // whether cap() changes a score
  static constexpr bool DROPS = false;  // whether keep() changes a weight

  int sequences, heads, kv_heads;
  int queries, keys;  // of the longest sequence
  bool causal;
  int diagonal;  // query i sees keys 0 .. i + diagonal
  float scale;

  // From a FlashForward<float> or a FlashBackward<float>.
  template <typename Problem>
  explicit Dense(const Problem& p)
      : sequences(static_cast<int>(p.query.size(0))),
        heads(static_cast<int>(p.query.size(1))),
        kv_heads(static_cast<int>(p.key.size(1))),
        queries(static_cast<int>(p.query.size(2))),
        keys(static_cast<int>(p.key.size(2))),
        causal(p.causal),
        diagonal(p.causal ? keys - queries : keys),
        scale(p.scale.value_or(1.0f / std::sqrt(static_cast<float>(p.query.size(3))))) {}

  KATA_DEVICE Part part(int sequence, int head) const {
    return {
        .batch = sequence, .head = head, .kv_head = head, .q_first = 0, .k_first = 0, .queries = queries, .keys = keys};
  }

  // Of the blocks that own queries, and of those that own keys.
  KATA_DEVICE BlockOrder query_order() const { return {sequences * heads, causal}; }
  KATA_DEVICE BlockOrder key_order() const { return {sequences * kv_heads, causal}; }

  // The keys that query i of a part sees. For a later query neither end may be smaller.
  KATA_DEVICE KeyRange sees(const Part& part, int i) const { return {0, min(part.keys, i + diagonal + 1)}; }

  // With CAPS: a scaled score becomes another, and the derivative there, from the capped score.
  KATA_DEVICE float cap(float score) const { return score; }
  KATA_DEVICE float cap_slope(float) const { return 1.0f; }

  // With DROPS: what the weight of query i and key j is multiplied by.
  KATA_DEVICE float keep(const Part&, int, int) const { return 1.0f; }
};

// What some queries of a part see together: `some` of them and `all` of them.
struct Sight {
  KeyRange some, all;

  // Queries first .. first + count - 1, as far as they exist; at least the first one does.
  template <typename Rules>
  KATA_DEVICE static Sight of(const Rules& rules, const Part& part, int first, int count) {
    const KeyRange earliest = rules.sees(part, first);
    const KeyRange latest = rules.sees(part, min(first + count, part.queries) - 1);
    return {{earliest.begin, latest.end}, {latest.begin, earliest.end}};
  }

  // Does some query see some of the keys first .. first + count - 1? Does every query see all of them?
  KATA_DEVICE bool touches(int first, int count) const { return some.begin < first + count && some.end > first; }
  KATA_DEVICE bool covers(int first, int count) const { return all.begin <= first && all.end >= first + count; }
};

}  // namespace flashkata::flash_kernels
