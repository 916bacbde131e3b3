#include "sliding_window.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include "common/attention/tensor.hpp"

namespace flashkata {
namespace {

constexpr Index TILE = 64;  // queries in a tile, and keys
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

using Rows = decltype(as_matrix(std::declval<View<const float, 2>>()));  // [S, D], rows maybe far apart in memory
using Numbers = Eigen::Array<float, 1, Eigen::Dynamic>;                  // one for each key that a query sees

// The indices from begin to end - 1.
struct Range {
  Index begin, end;
  Index count() const { return end - begin; }

  // Those of [first, first + size), counted from `first`.
  Range within(Index first, Index size) const {
    return {std::clamp<Index>(begin - first, 0, size), std::clamp<Index>(end - first, 0, size)};
  }
};

// Who sees whom. The further down a query, the further right both ends of what it sees: so a tile of queries sees from
// the beginning of its first one's range to the end of its last one's, and the same holds for keys.
struct Band {
  Index queries, keys;
  Index left, right;

  Band(Index queries, Index keys, bool causal, const Window& window) : queries(queries), keys(keys) {
    const Index everything = queries + keys;  // larger windows see no more, and could overflow in a sum
    left = std::min(window.left.value_or(everything), everything);
    right = causal ? 0 : std::min(window.right.value_or(everything), everything);
  }

  Range keys_of(Index query) const {
    const Index place = query + keys - queries;
    return {std::clamp<Index>(place - left, 0, keys), std::clamp<Index>(place + right + 1, 0, keys)};
  }
  Range queries_of(Index key) const {
    const Index at_its_place = key + queries - keys;
    return {std::clamp<Index>(at_its_place - right, 0, queries),
            std::clamp<Index>(at_its_place + left + 1, 0, queries)};
  }
};

float scale_of(const auto& problem) {
  return problem.scale.value_or(1.0f / std::sqrt(static_cast<float>(problem.query.size(3))));
}

Numbers capped(const Numbers& scores, float softcap) {
  if (softcap == 0.0f) return scores;
  return softcap * (scores / softcap).tanh();
}

}  // namespace

void tiled_window_forward(const FlashForward<float>& problem, const Window& window) {
  check_window_forward(problem, window);
  const auto [batch, heads, queries, width] = problem.query.shape();
  const Index keys = problem.key.size(2);
  const Band band(queries, keys, problem.causal, window);
  const float scale = scale_of(problem);

  for (Index task = 0; task < batch * heads; ++task) {
    const Index b = task / heads, h = task % heads;
    const Rows q = as_matrix(problem.query[b][h]);
    const Rows k = as_matrix(problem.key[b][h]);
    const Rows v = as_matrix(problem.value[b][h]);
    for (Index first_query = 0; first_query < queries; first_query += TILE) {
      const Index rows = std::min(TILE, queries - first_query);
      const Range seen{band.keys_of(first_query).begin, band.keys_of(first_query + rows - 1).end};
      Matrix o = Matrix::Zero(rows, width);
      Eigen::ArrayXf row_max = Eigen::ArrayXf::Constant(rows, MINUS_INFINITY);
      Eigen::ArrayXf row_sum = Eigen::ArrayXf::Zero(rows);
      for (Index first_key = seen.begin; first_key < seen.end; first_key += TILE) {
        const Index cols = std::min(TILE, seen.end - first_key);
        const Matrix s = scale * q.middleRows(first_query, rows) * k.middleRows(first_key, cols).transpose();
        for (Index row = 0; row < rows; ++row) {
          // What the query sees of this tile are neighbours, maybe none: nothing else is touched.
          const Range own = band.keys_of(first_query + row).within(first_key, cols);
          if (own.count() == 0) continue;
          const Numbers scores = capped(s.row(row).segment(own.begin, own.count()), window.softcap);
          const float new_max = std::max(row_max(row), scores.maxCoeff());
          const float rescale = std::exp(row_max(row) - new_max);
          const Numbers p = (scores - new_max).exp();
          row_max(row) = new_max;
          row_sum(row) = row_sum(row) * rescale + p.sum();
          o.row(row) = o.row(row) * rescale + p.matrix() * v.middleRows(first_key + own.begin, own.count());
        }
      }
      for (Index row = 0; row < rows; ++row) {
        const bool blind = band.keys_of(first_query + row).count() == 0;
        as_matrix(problem.output[b][h]).row(first_query + row) = o.row(row) / (blind ? 1.0f : row_sum(row));
        problem.lse(b, h, first_query + row) = blind ? MINUS_INFINITY : row_max(row) + std::log(row_sum(row));
      }
    }
  }
}

void tiled_window_backward(const FlashBackward<float>& problem, const Window& window) {
  check_window_backward(problem, window);
  const auto [batch, heads, queries, width] = problem.query.shape();
  const Index keys = problem.key.size(2);
  const Band band(queries, keys, problem.causal, window);
  const float scale = scale_of(problem);

  for (Index task = 0; task < batch * heads; ++task) {
    const Index b = task / heads, h = task % heads;
    const Rows q = as_matrix(problem.query[b][h]);
    const Rows k = as_matrix(problem.key[b][h]);
    const Rows v = as_matrix(problem.value[b][h]);
    const Rows d_output = as_matrix(problem.d_output[b][h]);
    const Eigen::ArrayXf delta = d_output.cwiseProduct(as_matrix(problem.output[b][h])).rowwise().sum();
    auto d_query = as_matrix(problem.d_query[b][h]);
    d_query.setZero();
    for (Index first_key = 0; first_key < keys; first_key += TILE) {
      const Index cols = std::min(TILE, keys - first_key);
      const Range seeing{band.queries_of(first_key).begin, band.queries_of(first_key + cols - 1).end};
      auto d_key = as_matrix(problem.d_key[b][h]).middleRows(first_key, cols);
      auto d_value = as_matrix(problem.d_value[b][h]).middleRows(first_key, cols);
      d_key.setZero();
      d_value.setZero();
      for (Index first_query = seeing.begin; first_query < seeing.end; first_query += TILE) {
        const Index rows = std::min(TILE, seeing.end - first_query);
        const Matrix s = scale * q.middleRows(first_query, rows) * k.middleRows(first_key, cols).transpose();
        const Matrix d_p = d_output.middleRows(first_query, rows) * v.middleRows(first_key, cols).transpose();
        for (Index row = 0; row < rows; ++row) {
          const Index i = first_query + row;
          const Range own = band.keys_of(i).within(first_key, cols);
          if (own.count() == 0) continue;
          const Numbers scores = capped(s.row(row).segment(own.begin, own.count()), window.softcap);
          const Numbers p = (scores - problem.lse(b, h, i)).exp();
          Numbers d_s = p * (d_p.row(row).segment(own.begin, own.count()).array() - delta(i));
          if (window.softcap > 0.0f) d_s *= 1.0f - (scores / window.softcap).square();  // 1 - tanh^2
          d_s *= scale;
          d_query.row(i) += d_s.matrix() * k.middleRows(first_key + own.begin, own.count());
          d_key.middleRows(own.begin, own.count()) += d_s.matrix().transpose() * q.row(i);
          d_value.middleRows(own.begin, own.count()) += p.matrix().transpose() * d_output.row(i);
        }
      }
    }
  }
}

}  // namespace flashkata
