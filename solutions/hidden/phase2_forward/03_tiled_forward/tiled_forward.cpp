#include "tiled_forward.hpp"

#include <algorithm>
#include <limits>
#include <utility>

#include "phase2_forward/vector.hpp"

namespace flashkata {
namespace {

constexpr Index DIAGONAL_STRIP = 64;  // rows; fewer would make the products slow
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

using Head = decltype(as_matrix(std::declval<View<const float, 2>>()));  // [S, D], rows maybe far apart in memory

// Queries [first_query, first_query + rows) of one head against all the keys that they may see.
void forward_row_tile(const Head& q, const Head& k, const Head& v, Index first_query, Index rows, float scale,
                      const TiledOptions& options, View<float, 2> output, View<float, 1> lse) {
  const Index num_keys = k.rows();
  const Index offset = num_keys - q.rows();  // the last query stands at the last key
  // The keys that a query sees are the first so many, so a tile of scores is visible on the left of its diagonal.
  const auto keys_seen_by = [&](Index query) {
    return options.causal ? std::clamp<Index>(query + offset + 1, 0, num_keys) : num_keys;
  };
  const Index end = keys_seen_by(first_query + rows - 1);

  // Step 1. What stays while the keys pass by. o_tile is divided by row_sum at the end.
  const Matrix q_tile = scale * q.middleRows(first_query, rows);  // [Br, D]
  Matrix o_tile = Matrix::Zero(rows, v.cols());                   // [Br, Dv]
  Vector row_max = Vector::Constant(rows, MINUS_INFINITY);        // [Br]
  Vector row_sum = Vector::Zero(rows);                            // [Br]
  Matrix p_tile(rows, std::min(options.block_cols, end));         // [Br, Bc], scores and then weights

  for (Index first_key = 0; first_key < end; first_key += options.block_cols) {
    const Index cols = std::min(options.block_cols, end - first_key);
    const auto k_tile = k.middleRows(first_key, cols);  // [Bc, D]
    const auto v_tile = v.middleRows(first_key, cols);  // [Bc, Dv]
    // Queries above `top` see none of these keys. Those below see all of them, or, on the diagonal, each one more than
    // the one above: there, the tile is cut into strips, so that little is computed that nobody sees.
    const Index top = options.causal ? std::max<Index>(0, first_key - offset - first_query) : 0;
    const bool diagonal = keys_seen_by(first_query + top) < first_key + cols;
    const Index strip_rows = diagonal ? DIAGONAL_STRIP : rows;
    // A weight of 0 leaves a value out only if 0 times the value is 0: neither NaN nor infinite.
    const bool zero_will_do = !diagonal || (0.0f * v_tile).sum() == 0.0f;

    for (Index first_row = top; first_row < rows; first_row += strip_rows) {
      const Index height = std::min(strip_rows, rows - first_row);
      const Index width = std::min(cols, keys_seen_by(first_query + first_row + height - 1) - first_key);
      auto p_strip = p_tile.block(first_row, 0, height, width);

      // Step 2. S = Q K^T
      p_strip.noalias() = q_tile.middleRows(first_row, height) * k_tile.topRows(width).transpose();

      // Step 3. P = exp(S - row_max); what was gathered with a smaller maximum shrinks to the new one.
      for (Index row = first_row; row < first_row + height; ++row) {
        const Index seen = std::min(width, keys_seen_by(first_query + row) - first_key);
        auto weights = p_tile.row(row).head(seen).array();
        const float new_max = std::max(row_max(row), weights.maxCoeff());
        if (new_max > row_max(row)) {
          const float rescale = std::exp(row_max(row) - new_max);  // exp(-inf) = 0 for the first tile
          o_tile.row(row) *= rescale;
          row_sum(row) *= rescale;
          row_max(row) = new_max;
        }
        weights = (weights - new_max).exp();
        row_sum(row) += weights.sum();
        // Set, not exp(-inf): where Eigen 3.4 vectorises exp, that is 1e-38.
        p_tile.row(row).segment(seen, width - seen).setZero();
      }

      // Step 4. O += P V
      if (zero_will_do) {
        o_tile.middleRows(first_row, height).noalias() += p_strip * v_tile.topRows(width);
      } else {
        for (Index row = first_row; row < first_row + height; ++row) {
          const Index seen = std::min(width, keys_seen_by(first_query + row) - first_key);
          o_tile.row(row).noalias() += p_tile.row(row).head(seen) * v_tile.topRows(seen);
        }
      }
    }
  }

  // Step 5. The division that was put off, and log(row_sum) in the units of the scores. Without keys: 0 and -inf.
  auto target = as_matrix(output).middleRows(first_query, rows);
  for (Index row = 0; row < rows; ++row) {
    target.row(row) = o_tile.row(row) / (row_sum(row) > 0.0f ? row_sum(row) : 1.0f);
    lse(first_query + row) = row_max(row) + std::log(row_sum(row));
  }
}

}  // namespace

TiledResult tiled_forward(View<const float, 4> q, View<const float, 4> k, View<const float, 4> v,
                          const TiledOptions& options) {
  check_tiled(q, k, v, options);
  const Index batch = q.size(0), heads = q.size(1), queries = q.size(2);
  const float scale = options.scale.value_or(1.0f / std::sqrt(static_cast<float>(q.size(3))));
  TiledResult result{Tensor<float, 4>({batch, heads, queries, v.size(3)}), Tensor<float, 3>({batch, heads, queries})};

  // Tiles of queries share nothing that is written. The last ones first: with a causal mask they are the longest, and
  // at the end only short ones should be left to wait for.
  const Index row_tiles = (queries + options.block_rows - 1) / options.block_rows;
  parallel_for(row_tiles * batch * heads, options.threads, [&](Index task) {
    const Index b = task / heads % batch;
    const Index h = task % heads;
    const Index first_query = (row_tiles - 1 - task / (batch * heads)) * options.block_rows;
    forward_row_tile(as_matrix(q[b][h]), as_matrix(k[b][h]), as_matrix(v[b][h]), first_query,
                     std::min(options.block_rows, queries - first_query), scale, options, result.output.view()[b][h],
                     result.lse.view()[b][h]);
  });
  return result;
}

}  // namespace flashkata
