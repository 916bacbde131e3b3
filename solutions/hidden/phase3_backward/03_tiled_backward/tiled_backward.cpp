#include "tiled_backward.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "common/attention/product.hpp"

namespace flashkata {
namespace {

constexpr Index SEGMENTS = 4;         // of the outer loop, each of which may run on a thread of its own
constexpr Index DIAGONAL_STRIP = 24;  // rows of a tile on the diagonal that are computed at a time
constexpr Index CACHE_LINE = 16;      // floats

using Rows = decltype(as_matrix(std::declval<View<const float, 2>>()));  // [S, D], rows maybe far apart in memory
using Gradient = Eigen::Ref<Matrix>;                                     // [S, D] or some of its rows, to be added to

struct Head {
  Rows q, k, v, d_output;
  View<const float, 1> lse, delta;
  float scale;
  const TiledBackwardOptions& options;

  // Under a causal mask the keys that a query sees are the first so many: the last query stands at the last key.
  Index keys_seen_by(Index query) const {
    return options.causal ? std::clamp<Index>(query + k.rows() - q.rows() + 1, 0, k.rows()) : k.rows();
  }
};

Index cache_lines(Index floats) { return (floats + CACHE_LINE - 1) / CACHE_LINE; }

// Whole cache lines, and an odd number of them: whoever reads down a column finds its rows in different places of the
// cache.
Index padded(Index cols) { return (cache_lines(cols) | 1) * CACHE_LINE; }

// A tile of keys, turned so that scores are made from rows of it, and memory for the weights of a tile.
struct Tile {
  Matrix k_turned, v_turned;  // [D, Bc], [Dv, Bc], and 0 beyond the last key
  Matrix p, ds;               // [Br, Bc]

  explicit Tile(const Head& head) {
    const Index rows = std::min(head.options.block_rows, head.q.rows());
    const Index cols = padded(std::min(head.options.block_cols, head.k.rows()));
    k_turned.resize(head.k.cols(), cols);
    v_turned.resize(head.v.cols(), cols);
    p.resize(rows, cols);
    ds.resize(rows, cols);
  }

  void load_keys(const Head& head, Index first_key, Index cols) {
    // A few keys at a time, which stay in the cache until their last column has been read.
    for (Index key = 0; key < cols; key += CACHE_LINE) {
      const Index keys = std::min(CACHE_LINE, cols - key);
      k_turned.middleCols(key, keys) = head.k.middleRows(first_key + key, keys).transpose();
      v_turned.middleCols(key, keys) = head.v.middleRows(first_key + key, keys).transpose();
    }
    k_turned.rightCols(k_turned.cols() - cols).setZero();
    v_turned.rightCols(v_turned.cols() - cols).setZero();
  }
};

// What one tile of weights contributes to the gradients of its queries and of its keys.
void backward_tile(const Head& head, Tile& tile, Index first_query, Index first_key, Gradient d_q, Gradient d_k,
                   Gradient d_v) {
  const Index rows = d_q.rows(), cols = d_k.rows();
  // Queries above `top` see none of these keys. Those below see all of them, or, on the diagonal, each one more than
  // the one above: there, the tile is cut into strips, so that little is computed that nobody sees.
  const Index offset = head.k.rows() - head.q.rows();
  const Index top = head.options.causal ? std::max<Index>(0, first_key - offset - first_query) : 0;
  if (top >= rows) return;
  const bool diagonal = head.keys_seen_by(first_query + top) < first_key + cols;
  const Index strip_rows = diagonal ? DIAGONAL_STRIP : rows;
  // A dS of 0 leaves a key out only if 0 times the key is 0: neither NaN nor infinite.
  const bool zero_will_do = !diagonal || (0.0f * head.k.middleRows(first_key, cols)).sum() == 0.0f;

  for (Index first_row = top; first_row < rows; first_row += strip_rows) {
    const Index height = std::min(strip_rows, rows - first_row);
    const Index query = first_query + first_row;
    const Index width = std::min(cols, head.keys_seen_by(query + height - 1) - first_key);
    const auto q = head.q.middleRows(query, height);                // [Br, D]
    const auto d_output = head.d_output.middleRows(query, height);  // [Br, Dv]
    const auto k = head.k.middleRows(first_key, width);             // [Bc, D]

    // Step 1. S = Q K^T, dP = dO V^T, in whole cache lines
    const Index whole = cache_lines(width) * CACHE_LINE;
    set_product(q, tile.k_turned.leftCols(whole), tile.p.topLeftCorner(height, whole));
    set_product(d_output, tile.v_turned.leftCols(whole), tile.ds.topLeftCorner(height, whole));

    // Step 2. P = exp(scale S - lse), dS = scale P (dP - delta); with the scale in dS, dQ and dK have it too.
    for (Index row = 0; row < height; ++row) {
      auto weights = tile.p.row(row).head(whole).array();
      auto d_scores = tile.ds.row(row).head(whole).array();
      weights = (head.scale * weights - head.lse(query + row)).exp();
      d_scores = head.scale * weights * (d_scores - head.delta(query + row));
      const Index seen = std::min(width, head.keys_seen_by(query + row) - first_key);
      tile.p.row(row).segment(seen, width - seen).setZero();  // set, not multiplied by 0: NaN may stand there
      tile.ds.row(row).segment(seen, width - seen).setZero();
    }

    // Step 3. dV += P^T dO, dK += dS^T Q, dQ += dS K
    const auto p = tile.p.topLeftCorner(height, width);    // [Br, Bc]
    const auto ds = tile.ds.topLeftCorner(height, width);  // [Br, Bc]
    add_transposed_product(p, d_output, d_v.topRows(width));
    add_transposed_product(ds, q, d_k.topRows(width));
    if (zero_will_do) {
      add_product(ds, k, d_q.middleRows(first_row, height));
    } else {
      for (Index row = 0; row < height; ++row) {
        const Index seen = std::min(width, head.keys_seen_by(query + row) - first_key);
        for (Index key = 0; key < seen; ++key) d_q.row(first_row + row) += ds(row, key) * k.row(key);
      }
    }
  }
}

// One head, as a batch of its own.
View<const float, 4> alone(const View<const float, 4>& tensor, Index b, Index h) {
  return {tensor[b][h].data(), {1, 1, tensor.size(2), tensor.size(3)}, tensor.strides()};
}

// Is this tile of the outer loop the segment's? 0 1 2 3 3 2 1 0 0 1 ...: with a causal mask one tile has more work than
// the next, and so each segment has as much as the others.
bool belongs(Index tile, Index segment) {
  const Index turn = tile % (2 * SEGMENTS);
  return std::min(turn, 2 * SEGMENTS - 1 - turn) == segment;
}

// A tile of keys meets all queries: its dK and dV stay, dQ comes together in memory.
void keys_outside(const Head& head, Index segment, Matrix& d_query, Gradient d_key, Gradient d_value) {
  const Index queries = head.q.rows(), keys = head.k.rows();
  const auto [block_rows, block_cols] = std::pair(head.options.block_rows, head.options.block_cols);
  d_query.setZero(queries, head.q.cols());
  Tile tile(head);
  for (Index first_key = 0, turn = 0; first_key < keys; first_key += block_cols, ++turn) {
    if (!belongs(turn, segment)) continue;
    const Index cols = std::min(block_cols, keys - first_key);
    Gradient d_k = d_key.middleRows(first_key, cols);
    Gradient d_v = d_value.middleRows(first_key, cols);
    d_k.setZero();
    d_v.setZero();
    tile.load_keys(head, first_key, cols);
    for (Index first_query = 0; first_query < queries; first_query += block_rows) {
      const Index rows = std::min(block_rows, queries - first_query);
      backward_tile(head, tile, first_query, first_key, d_query.middleRows(first_query, rows), d_k, d_v);
    }
  }
}

// A tile of queries meets all keys: its dQ stays, dK and dV come together in memory.
void queries_outside(const Head& head, Index segment, Gradient d_query, Matrix& d_key, Matrix& d_value) {
  const Index queries = head.q.rows(), keys = head.k.rows();
  const auto [block_rows, block_cols] = std::pair(head.options.block_rows, head.options.block_cols);
  d_key.setZero(keys, head.k.cols());
  d_value.setZero(keys, head.v.cols());
  Tile tile(head);
  for (Index first_query = 0, turn = 0; first_query < queries; first_query += block_rows, ++turn) {
    if (!belongs(turn, segment)) continue;
    const Index rows = std::min(block_rows, queries - first_query);
    Gradient d_q = d_query.middleRows(first_query, rows);
    d_q.setZero();
    const Index end = head.keys_seen_by(first_query + rows - 1);
    for (Index first_key = 0; first_key < end; first_key += block_cols) {
      const Index cols = std::min(block_cols, keys - first_key);
      tile.load_keys(head, first_key, cols);
      backward_tile(head, tile, first_query, first_key, d_q, d_key.middleRows(first_key, cols),
                    d_value.middleRows(first_key, cols));
    }
  }
}

}  // namespace

TiledGradients tiled_backward(View<const float, 4> q, View<const float, 4> k, View<const float, 4> v,
                              View<const float, 4> output, View<const float, 3> lse, View<const float, 4> d_output,
                              const TiledBackwardOptions& options) {
  check_tiled_backward(q, k, v, output, lse, d_output, options);
  const Index heads = q.size(1), all_heads = q.size(0) * heads;
  const Index threads = options.threads == 0 ? std::thread::hardware_concurrency() : options.threads;
  const float scale = options.scale.value_or(1.0f / std::sqrt(static_cast<float>(q.size(3))));
  TiledGradients result{Tensor<float, 4>(q.shape()), Tensor<float, 4>(k.shape()), Tensor<float, 4>(v.shape())};
  Tensor<float, 3> delta(lse.shape());
  parallel_for(all_heads, options.threads, [&](Index head) {
    const Index b = head / heads, h = head % heads;
    const Tensor<float, 3> rows = row_delta(alone(output, b, h), alone(d_output, b, h));
    std::copy_n(rows.data(), rows.count(), delta.view()[b][h].data());
  });

  // Tiles of the outer loop share nothing that they write but the gradients that come together in memory. Of those
  // every segment has its own, added up at the end in one order: how many threads there are moves no bit. Heads are
  // taken so many at a time that each thread has two segments: the next ones find the memory of these, and warm.
  struct Gathered {
    Matrix d_q, d_k, d_v;
  };
  const Index at_once = std::clamp<Index>(2 * threads / SEGMENTS, 1, std::max<Index>(1, all_heads));
  std::vector<Gathered> gathered(static_cast<std::size_t>(at_once * SEGMENTS));
  for (Index first_head = 0; first_head < all_heads; first_head += at_once) {
    const Index tasks = std::min(at_once, all_heads - first_head) * SEGMENTS;
    parallel_for(tasks, options.threads, [&](Index task) {
      const Index head_index = first_head + task / SEGMENTS, segment = task % SEGMENTS;
      const Index b = head_index / heads, h = head_index % heads;
      const Head head{as_matrix(q[b][h]),
                      as_matrix(k[b][h]),
                      as_matrix(v[b][h]),
                      as_matrix(d_output[b][h]),
                      lse[b][h],
                      delta.view()[b][h],
                      scale,
                      options};
      auto& [d_q, d_k, d_v] = gathered[static_cast<std::size_t>(task)];
      if (options.order == LoopOrder::keys_outside) {
        keys_outside(head, segment, d_q, as_matrix(result.key.view()[b][h]), as_matrix(result.value.view()[b][h]));
      } else {
        queries_outside(head, segment, as_matrix(result.query.view()[b][h]), d_k, d_v);
      }
    });
    parallel_for(tasks, options.threads, [&](Index task) {
      const Index head_index = first_head + task / SEGMENTS, share = task % SEGMENTS;
      const Index b = head_index / heads, h = head_index % heads;
      const Gathered* const parts = &gathered[static_cast<std::size_t>(task - share)];
      const auto add_up = [&](Tensor<float, 4>& gradient, Matrix Gathered::*part) {
        auto sum = as_matrix(gradient.view()[b][h]);
        const Index begin = sum.rows() * share / SEGMENTS, end = sum.rows() * (share + 1) / SEGMENTS;
        const auto rows = [&](Index segment) { return (parts[segment].*part).middleRows(begin, end - begin); };
        sum.middleRows(begin, end - begin) = rows(0) + rows(1) + rows(2) + rows(3);
      };
      if (options.order == LoopOrder::keys_outside) {
        add_up(result.query, &Gathered::d_q);
      } else {
        add_up(result.key, &Gathered::d_k);
        add_up(result.value, &Gathered::d_v);
      }
    });
  }
  return result;
}

}  // namespace flashkata
