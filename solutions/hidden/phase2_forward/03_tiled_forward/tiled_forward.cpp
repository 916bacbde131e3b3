#include "tiled_forward.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numbers>
#include <thread>
#include <utility>
#include <vector>

namespace flashkata {
namespace {

// A tile of queries is cut into panels, which lie column by column in memory: the rows of a panel are the lanes of two
// vector registers (of 16 floats with AVX-512, of 8 with AVX), and maxima and sums over keys never cross a register.
constexpr int VECTOR = std::max<int>(4, EIGEN_MAX_STATIC_ALIGN_BYTES / sizeof(float));
constexpr int PANEL = 2 * VECTOR;           // rows
constexpr int STRIP = VECTOR < 16 ? 4 : 8;  // columns: PANEL x STRIP numbers fill half of the registers
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

using Head = decltype(as_matrix(std::declval<View<const float, 2>>()));  // [S, D], rows maybe far apart in memory
using Panel = Eigen::Array<float, PANEL, Eigen::Dynamic>;                // column-major
using Rows = Eigen::Array<float, PANEL, 1>;                              // one number for each row of a panel

// A register as the compiler knows it, for what Eigen has no word for: the bits of a float.
typedef float Lanes __attribute__((vector_size(VECTOR * sizeof(float)), aligned(alignof(float)), may_alias));
typedef std::uint32_t LaneBits __attribute__((vector_size(VECTOR * sizeof(float))));

// 2^x for x <= 0, and 2^-126 instead of less; takes half as long as Eigen's exp. x is a whole number n and a rest in
// [-1/2, 1/2]: for the rest there is a polynomial (relative error 1e-7), and n belongs into the bits of the exponent.
Rows exp2(const Rows& x) {
  constexpr float ROUND = 12582912.0f + 127.0f;  // 1.5 * 2^23: what is added to it loses its fraction; 127: of 2^0
  const Lanes lowest = Lanes{} - 126.0f;
  Rows result;
  for (int part = 0; part < PANEL; part += VECTOR) {
    Lanes lanes = reinterpret_cast<const Lanes&>(x.coeffRef(part));
    lanes = lanes < lowest ? lowest : lanes;
    const Lanes n = lanes + ROUND;
    const Lanes rest = lanes - (n - ROUND);
    Lanes power = 1.32647238e-3f * rest + 9.67151858e-3f;
    power = power * rest + 5.55073395e-2f;
    power = power * rest + 2.40222424e-1f;
    power = power * rest + 6.93147004e-1f;
    power = power * rest + 1.0f;
    reinterpret_cast<Lanes&>(result.coeffRef(part)) = power * (Lanes)((LaneBits)n << 23);
  }
  return result;
}

// Columns [first, first + COLS) of c = a b, or of c += a b. Eigen's own product would begin with a copy of a and b in
// another order; tiles are too small to earn that back, and in this order the numbers are already.
template <int COLS>
void multiply_strip(const Panel& a, const auto& b, Index first, bool add, Panel& c) {
  const Index depth = b.rows();
  const auto b_strip = b.template middleCols<COLS>(first);  // [depth, COLS]
  const Lanes* a_col = reinterpret_cast<const Lanes*>(a.data());
  Lanes strip[COLS][2] = {};  // [PANEL, COLS], in registers from begin to end
  for (Index i = 0; i < depth; ++i, a_col += 2) {
    for (int col = 0; col < COLS; ++col) {
      const float factor = b_strip.coeff(i, col);
      for (int half = 0; half < 2; ++half) strip[col][half] += a_col[half] * factor;
    }
  }
  Lanes* c_col = reinterpret_cast<Lanes*>(&c.coeffRef(0, first));
  for (int col = 0; col < COLS; ++col, c_col += 2) {
    for (int half = 0; half < 2; ++half) c_col[half] = add ? c_col[half] + strip[col][half] : strip[col][half];
  }
}

// c [PANEL, cols] = a [PANEL, depth] b [depth, cols], or c += a b. Further columns of a and c stay out of it.
void multiply(const Panel& a, const auto& b, bool add, Panel& c) {
  Index col = 0;
  for (; col + STRIP <= b.cols(); col += STRIP) multiply_strip<STRIP>(a, b, col, add, c);
  for (; col < b.cols(); ++col) multiply_strip<1>(a, b, col, add, c);
}

// What stays of a panel of queries while the keys pass by. o is divided by row_sum at the end.
struct QueryPanel {
  Index first;   // its first query
  Index height;  // how many there are; the rows below are zeros, and nobody reads what becomes of them
  Panel q;       // [PANEL, D], times scale and log2(e), for exp(x) is 2^(x log2(e))
  Panel o;       // [PANEL, Dv]
  Rows row_max;  // [PANEL]
  Rows row_sum;  // [PANEL]
};

// A tile of keys passes by. The panel's first query sees `seen` of them, counted from the first key on, and each query
// sees one more than the one above (seen may be negative, or so large that all see all). p is memory for the scores.
void pass_by(const auto& k_tile, const auto& v_tile, Index seen, QueryPanel& panel, Panel& p) {
  const Index width = std::min(k_tile.rows(), seen + panel.height - 1);  // keys that some query sees
  if (width <= 0) return;
  const Index full = std::clamp<Index>(seen, 0, width);               // keys that all queries see
  const auto blind_rows = [&](Index key) { return key + 1 - seen; };  // to a key from `full` on: the first so many

  // Step 2. S = Q K^T
  multiply(panel.q, k_tile.topRows(width).transpose(), false, p);
  for (Index key = full; key < width; ++key) p.col(key).head(blind_rows(key)).setConstant(MINUS_INFINITY);

  // Step 3. P = 2^(S - row_max); what was gathered with a smaller maximum shrinks to the new one.
  const Rows new_max = panel.row_max.max(p.leftCols(width).rowwise().maxCoeff());
  const Rows shift = (new_max == MINUS_INFINITY).select(0.0f, new_max);  // no key yet: -inf - -inf would be NaN
  const Rows rescale = exp2(panel.row_max - shift);
  for (Index d = 0; d < panel.o.cols(); ++d) panel.o.col(d) *= rescale;
  for (Index key = 0; key < width; ++key) p.col(key) = exp2(p.col(key) - shift);
  // Set, for exp2(-inf) is 1e-38 and not 0.
  for (Index key = full; key < width; ++key) p.col(key).head(blind_rows(key)).setZero();
  panel.row_sum = panel.row_sum * rescale + p.leftCols(width).rowwise().sum();
  panel.row_max = new_max;

  // Step 4. O += P V. A weight of 0 leaves a value out only if 0 times the value is 0: neither NaN nor infinite.
  const bool zero_will_do = (0.0f * v_tile.middleRows(full, width - full)).sum() == 0.0f;
  const Index together = zero_will_do ? width : full;
  multiply(p, v_tile.topRows(together), true, panel.o);
  for (Index key = together; key < width; ++key) {
    const Index rows = PANEL - blind_rows(key);
    panel.o.bottomRows(rows).matrix() += p.col(key).tail(rows).matrix() * v_tile.row(key);
  }
}

// Queries [first_query, end_query) of one head against all the keys that they may see.
void forward_row_tile(const Head& q, const Head& k, const Head& v, Index first_query, Index end_query, float scale,
                      const TiledOptions& options, View<float, 2> output, View<float, 1> lse) {
  const Index offset = k.rows() - q.rows();  // the last query stands at the last key
  const Index end_key = options.causal ? std::clamp<Index>(end_query + offset, 0, k.rows()) : k.rows();

  // Step 1. Nothing is gathered yet.
  std::vector<QueryPanel> panels;
  for (Index first = first_query; first < end_query; first += PANEL) {
    const Index height = std::min<Index>(PANEL, end_query - first);
    panels.push_back({first, height, Panel::Zero(PANEL, q.cols()), Panel::Zero(PANEL, v.cols()),
                      Rows::Constant(MINUS_INFINITY), Rows::Zero()});
    panels.back().q.topRows(height) = scale * std::numbers::log2e_v<float> * q.middleRows(first, height).array();
  }

  // Each tile of keys passes by all panels, while it is in the cache.
  Panel p(PANEL, std::min(options.block_cols, end_key));
  for (Index first_key = 0; first_key < end_key; first_key += options.block_cols) {
    const Index cols = std::min(options.block_cols, end_key - first_key);
    for (QueryPanel& panel : panels) {
      const Index seen = options.causal ? panel.first + offset + 1 - first_key : cols;
      pass_by(k.middleRows(first_key, cols), v.middleRows(first_key, cols), seen, panel, p);
    }
  }

  // Step 5. The division that was put off, and the natural logarithm of the sum. Without keys: 0 and -inf.
  for (QueryPanel& panel : panels) {
    const Rows divisor = (panel.row_sum > 0.0f).select(panel.row_sum, 1.0f);
    for (Index d = 0; d < panel.o.cols(); ++d) panel.o.col(d) /= divisor;
    as_matrix(output).middleRows(panel.first, panel.height) = panel.o.topRows(panel.height);
    const Rows panel_lse = std::numbers::ln2_v<float> * panel.row_max + panel.row_sum.log();
    for (Index row = 0; row < panel.height; ++row) lse(panel.first + row) = panel_lse(row);
  }
}

}  // namespace

TiledResult tiled_forward(View<const float, 4> q, View<const float, 4> k, View<const float, 4> v,
                          const TiledOptions& options) {
  check_tiled(q, k, v, options);
  const Index batch = q.size(0), heads = q.size(1), queries = q.size(2);
  const float scale = options.scale.value_or(1.0f / std::sqrt(static_cast<float>(q.size(3))));
  TiledResult result{Tensor<float, 4>({batch, heads, queries, v.size(3)}), Tensor<float, 3>({batch, heads, queries})};

  // Tiles of queries share nothing that is written. Where they are few for so many threads, they are halved (between
  // panels, which changes no bit): a thread that starts late then has less to be waited for.
  const Index threads = options.threads > 0 ? options.threads : std::max<Index>(1, std::thread::hardware_concurrency());
  const auto tiles = [&](Index rows) { return (queries + rows - 1) / rows; };
  Index rows = options.block_rows;
  while (rows % (2 * PANEL) == 0 && tiles(rows) * batch * heads < 4 * threads) rows /= 2;

  // The last ones first: with a causal mask they are the longest, and at the end only short ones should be left.
  parallel_for(tiles(rows) * batch * heads, options.threads, [&](Index task) {
    const Index b = task / heads % batch;
    const Index h = task % heads;
    const Index first_query = (tiles(rows) - 1 - task / (batch * heads)) * rows;
    const Index end_query = first_query + std::min(rows, queries - first_query);
    forward_row_tile(as_matrix(q[b][h]), as_matrix(k[b][h]), as_matrix(v[b][h]), first_query, end_query, scale, options,
                     result.output.view()[b][h], result.lse.view()[b][h]);
  });
  return result;
}

}  // namespace flashkata
