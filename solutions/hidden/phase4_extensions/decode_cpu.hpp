// Decoding on the CPU. What steps 06 and 07 share; they differ in where the row of a key lies.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "merge.hpp"

namespace flashkata::decode_cpu {

constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

/// Attention of one head's queries over keys begin .. end - 1. key_row(j) and value_row(j) are rows of D numbers; query
/// i sees the keys before common + i.
template <typename KeyRow, typename ValueRow>
Partial attend(const View<const float, 2>& query, const KeyRow& key_row, const ValueRow& value_row, Index begin,
               Index end, Index common, Index step, float scale) {
  const Index width = query.size(1);
  Partial part{Matrix::Zero(query.size(0), width), Vector::Constant(query.size(0), MINUS_INFINITY)};
  using Row = Eigen::Map<const Eigen::RowVectorXf>;
  std::vector<float> scores;
  for (Index i = 0; i < query.size(0); ++i) {
    const Index seen = std::min(end, common + i * step);
    if (seen <= begin) continue;
    const Row q(&query(i, 0), width);
    scores.clear();
    float largest = MINUS_INFINITY;
    for (Index j = begin; j < seen; ++j) {
      scores.push_back(scale * q.dot(Row(key_row(j), width)));
      largest = std::max(largest, scores.back());
    }
    if (largest == MINUS_INFINITY) largest = 0.0f;  // all of them are -inf or not a number
    float sum = 0.0f;
    for (Index j = begin; j < seen; ++j) {
      const float weight = std::exp(scores[static_cast<std::size_t>(j - begin)] - largest);
      sum += weight;
      part.output.row(i) += weight * Row(value_row(j), width);
    }
    part.output.row(i) /= sum;
    part.lse(i) = largest + std::log(sum);
  }
  return part;
}

/// Problem: Decode<float> or PagedDecode<float>, checked. key_row(b, kv_head, j) and value_row(b, kv_head, j).
template <typename Problem, typename KeyRow, typename ValueRow>
void decode(const Problem& p, Index kv_heads, const KeyRow& key_row, const ValueRow& value_row) {
  const auto [batch, heads, queries, width] = p.query.shape();
  const Index splits = p.splits();
  const float scale = p.scale.value_or(1.0f / std::sqrt(static_cast<float>(width)));
  for (Index b = 0; b < batch; ++b) {
    const Index length = p.lengths(b);
    const Index chunk = (length + splits - 1) / splits;
    const Index common = p.causal ? length - queries + 1 : length;
    for (Index h = 0; h < heads; ++h) {
      const Index kv_head = h / (heads / kv_heads);
      Partial all{Matrix::Zero(queries, width), Vector::Constant(queries, MINUS_INFINITY)};
      for (Index split = 0; split < splits; ++split) {
        const Index begin = std::min(length, split * chunk);
        const Partial part = attend(
            p.query[b][h], [&](Index j) { return key_row(b, kv_head, j); },
            [&](Index j) { return value_row(b, kv_head, j); }, begin, std::min(length, begin + chunk), common,
            p.causal ? 1 : 0, scale);
        for (Index i = 0; i < queries; ++i) {
          p.partial_lse(split, b, h, i) = part.lse(i);
          for (Index d = 0; d < width; ++d) p.partial_output(split, b, h, i, d) = part.output(i, d);
        }
        all = merge_partials(all, part);
      }
      for (Index i = 0; i < queries; ++i) {
        if (p.lse) (*p.lse)(b, h, i) = all.lse(i);
        for (Index d = 0; d < width; ++d) p.output(b, h, i, d) = all.output(i, d);
      }
    }
  }
}

}  // namespace flashkata::decode_cpu
