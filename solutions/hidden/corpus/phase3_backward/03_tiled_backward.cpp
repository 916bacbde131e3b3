// Answers to 03_tiled_backward, wrong and right. Every deviation stands where somebody made it.
#include "tiled_backward.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "../corpus.hpp"

namespace flashkata {
namespace {

using corpus::plays;
using corpus::RIGHT;
using corpus::UNNAMED;

const corpus::Answers answers{
    // The weights, from scores and lse.
    {"bwd-P-unscaled", "bwd-P-unscaled"},
    {"bwd-P-from-m", "bwd-P-from-m"},
    {"bwd-P-no-lse", "bwd-P-no-lse"},
    {"bwd-P-tile-softmax", "bwd-P-tile-softmax"},
    {"bwd-lse-base, of the lse", "bwd-lse-base"},
    {"bwd-lse-base, of the power", "bwd-lse-base"},
    {"bwd-lse-of-key", "bwd-lse-of-key"},
    {"bwd-masked-row", "bwd-masked-row"},
    {"empty rows share evenly", "all-masked-uniform"},
    {"weights in half precision", UNNAMED},
    {"weights below 1e-4 dropped", UNNAMED},
    {"exponents limited to -20", UNNAMED},
    // The scale.
    {"scale-missing", "scale-missing"},
    {"scale-1-over-d", "scale-1-over-d"},
    {"scale-from-dv", "scale-from-dv"},
    {"scale-inverted", "scale-inverted"},
    {"scale-arg-ignored", "scale-arg-ignored"},
    {"scale-zero-as-default", "scale-zero-as-default"},
    {"scale without its sign", UNNAMED},
    {"bwd-dq-no-scale", "bwd-dq-no-scale"},
    {"bwd-dk-no-scale", "bwd-dk-no-scale"},
    {"bwd-dk-no-scale with queries outside", "bwd-dk-no-scale"},
    {"bwd-no-scale", "bwd-no-scale"},
    {"bwd-scale-twice", "bwd-scale-twice"},
    {"bwd-dv-scaled", "bwd-dv-scaled"},
    // dP and dS.
    {"bwd-dO-ignored", "bwd-dO-ignored"},
    {"bwd-dP-from-key", "bwd-dP-from-key"},
    {"bwd-no-D", "bwd-no-D"},
    {"bwd-D-wrong-source", "bwd-D-wrong-source"},
    {"bwd-D-tile", "bwd-D-tile"},
    {"bwd-D-tile, over the queries", "bwd-D-query-axis"},
    {"bwd-D-of-key", "bwd-D-of-key"},
    {"bwd-softmax-jac-diagonal", "bwd-softmax-jac-diagonal"},
    {"bwd-softmax-jac-P2", "bwd-softmax-jac-P2"},
    {"bwd-softmax-jac-no-P", "bwd-softmax-jac-no-P"},
    {"bwd-sign", "bwd-sign"},
    {"delta-scaled", "delta-scaled"},
    {"delta of the first head for all", UNNAMED},
    {"lse of the first batch item for all", UNNAMED},
    {"weights below 1e-6 dropped by the tile", UNNAMED},
    {"delta from the weights, in a pass of its own", UNNAMED},
    {"dS limited to 1", UNNAMED},
    {"dS rounded to bf16", UNNAMED},
    // The products.
    {"bwd-dq-dk-swapped where square", "bwd-dq-dk-swapped"},
    {"bwd-gradients-exchanged", "bwd-gradients-exchanged"},
    {"bwd-dv-from-dS", "bwd-dv-from-dS"},
    {"bwd-dv-not-transposed where the tile is square", "bwd-dv-not-transposed"},
    {"bwd-dk-not-transposed where the tile is square", "bwd-dk-not-transposed"},
    {"bwd-dq-last-tile", "bwd-dq-last-tile"},
    {"bwd-dk-last-tile", "bwd-dk-last-tile"},
    {"bwd-dv-last-tile", "bwd-dv-last-tile"},
    {"bwd-dkdv-last-tile with queries outside", "bwd-dkdv-last-tile"},
    {"bwd-carried", "bwd-carried"},
    {"dQ carried with queries outside", "bwd-carried"},
    {"bwd-dq-not-zeroed", UNNAMED},
    // Tiles.
    {"br-neq-bc in the step along the keys", "br-neq-bc"},
    {"br-neq-bc in the step along the queries", "bwd-bc-for-br"},
    {"br-neq-bc in the height of a tile", "bwd-low-tiles"},
    {"tail-keys-dropped", "tail-keys-dropped"},
    {"bwd-tail-queries-dropped", "bwd-tail-queries-dropped"},
    {"last key of all dropped", UNNAMED},
    {"last query of all dropped", UNNAMED},
    {"queries beyond 100 dropped with queries outside", UNNAMED},
    {"more than 500 keys", UNNAMED},
    {"channels beyond 64 dropped", UNNAMED},
    {"values as wide as keys", UNNAMED},
    {"one query forgotten", UNNAMED},
    // The triangle.
    {"causal-ignored", "causal-ignored"},
    {"causal-ignored with queries outside", "causal-ignored"},
    {"causal-strict", "causal-strict"},
    {"causal-plus-one", "causal-plus-one"},
    {"causal-upper", "causal-upper"},
    {"causal-local-index", "causal-local-index"},
    {"causal-only-square", "causal-only-square"},
    {"causal-alignment", "causal-alignment"},
    {"causal-alignment-reversed", "causal-alignment-reversed"},
    {"causal-offset-clamped", "causal-offset-clamped"},
    {"bwd-causal-start-block", "bwd-causal-start-block"},
    {"bwd-causal-start-block, from the last key", "causal-bound-floor"},
    {"causal-bound without the offset with keys outside", "causal-bound-no-offset"},
    {"causal-bound-floor", "causal-bound-floor"},
    {"causal-bound-first-row", "bwd-causal-start-block"},
    {"causal-bound without the offset", "causal-bound-no-offset"},
    {"causal-skip-too-early", "causal-skip-too-early"},
    {"causal masked by 0", "mask-multiply-zero"},
    {"masked in dS alone", UNNAMED},
    {"masked in P alone", UNNAMED},
    {"forbidden weights 1e-12", UNNAMED},
    {"masked-nan-leak in the scores", UNNAMED},
    {"masked-nan-leak in dP", UNNAMED},
    {"masked-nan-leak in dQ", UNNAMED},
    {"values of NaN taken for 0", UNNAMED},
    {"dO of NaN taken for 0", UNNAMED},
    {"every tile multiplied, then masked", UNNAMED},
    {"every tile multiplied for dP", UNNAMED},
    {"every tile multiplied with queries outside", UNNAMED},
    {"one tile more than needed", UNNAMED},
    {"options ignored", UNNAMED},
    // Memory and what a caller can expect.
    {"heads-first-only in the keys", "heads-first-only"},
    {"batch-first-only in the values", "batch-first-only"},
    {"noncontiguous-stride", "noncontiguous-stride"},
    {"bwd-dO-stride", UNNAMED},
    {"lse taken for packed", UNNAMED},
    {"output taken for packed", UNNAMED},
    {"heads beyond 6 forgotten", UNNAMED},
    {"whole matrix of weights", UNNAMED},
    {"whole matrix of half precision", UNNAMED},
    {"strip of weights, all keys", UNNAMED},
    {"strip of weights, all queries", UNNAMED},
    {"mask of queries by keys", UNNAMED},
    {"a copy of dQ for each tile of keys", UNNAMED},
    {"added to what the last call returned", UNNAMED},
    {"answers remembered by address", UNNAMED},
    {"scales the queries in place", UNNAMED},
    {"lse turned to base 2 in place", UNNAMED},
    {"another order of tiles on two threads", UNNAMED},
    {"keys left unwritten where nobody looks", UNNAMED},
    {"nothing written where there is no key", UNNAMED},
    {"arguments unchecked", UNNAMED},
    {"strides unchecked", UNNAMED},
    {"lse unchecked", UNNAMED},
    {"d_output unchecked", UNNAMED},
    {"options unchecked", UNNAMED},
    {"right: double accumulation", RIGHT},
    {"right: keys backwards", RIGHT},
    {"right: queries backwards", RIGHT},
    {"right: exp2 with the scale folded in", RIGHT},
    {"right: a scaled copy of the queries", RIGHT},
    {"right: a query at a time", RIGHT},
    {"right: a key at a time", RIGHT},
    {"right: multiplies the 0 of what a query may not see with the query", RIGHT},
    {"right: two passes, seven products", RIGHT},
    {"right: one order for both", RIGHT},
    {"right: inputs copied to the heap first", RIGHT},
    {"right: its own threads over heads", RIGHT},
    {"right: weights as exp(s) / exp(lse) where that is safe", RIGHT},
};

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504f;

struct HeadViews {
  View<const float, 2> q, k, v, d_output;
  View<const float, 1> lse, delta;
  View<float, 2> d_q, d_k, d_v;
};

float scale_of(const View<const float, 4>& q, const View<const float, 4>& v, std::optional<float> given) {
  if (plays("scale-missing")) return given.value_or(1.0f);
  const auto width = static_cast<float>(plays("scale-from-dv") ? v.size(3) : q.size(3));
  const float usual = plays("scale-1-over-d") ? 1.0f / width : 1.0f / std::sqrt(width);
  if (plays("scale-arg-ignored")) return usual;
  if (plays("scale-zero-as-default") && given && *given == 0.0f) return usual;
  const float scale = given.value_or(usual);
  if (plays("scale-inverted")) return 1.0f / scale;
  if (plays("scale without its sign")) return std::abs(scale);
  return scale;
}

float in_half(float x) { return std::round(x * 2048.0f) / 2048.0f; }

float in_bf16(float x) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x8000u) & 0xffff0000u;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// What this run plays, looked up once: the loops below ask for it at every pair.
const bool CAUSAL_STRICT = plays("causal-strict");
const bool CAUSAL_PLUS_ONE = plays("causal-plus-one");
const bool CAUSAL_UPPER = plays("causal-upper");
const bool CAUSAL_LOCAL_INDEX = plays("causal-local-index");
const bool EVERY_TILE_MULTIPLIED_THEN_MASKED = plays("every tile multiplied, then masked");
const bool EVERY_TILE_MULTIPLIED_FOR_DP = plays("every tile multiplied for dP");
const bool EVERY_TILE_MULTIPLIED_WITH_QUERIES_OUTSIDE = plays("every tile multiplied with queries outside");
const bool CAUSAL_SKIP_TOO_EARLY = plays("causal-skip-too-early");
const bool ONE_TILE_MORE_THAN_NEEDED = plays("one tile more than needed");
const bool CAUSAL_START_BLOCK = plays("bwd-causal-start-block");
const bool CAUSAL_START_BLOCK_FROM_THE_LAST_KEY = plays("bwd-causal-start-block, from the last key");
const bool NO_OFFSET_WITH_KEYS_OUTSIDE = plays("causal-bound without the offset with keys outside");
const bool CAUSAL_BOUND_FLOOR = plays("causal-bound-floor");
const bool CAUSAL_BOUND_FIRST_ROW = plays("causal-bound-first-row");
const bool CAUSAL_BOUND_WITHOUT_THE_OFFSET = plays("causal-bound without the offset");
const bool ANOTHER_ORDER_OF_TILES_ON_TWO_THREADS = plays("another order of tiles on two threads");
const bool BR_NEQ_BC_IN_THE_STEP_ALONG_THE_KEYS = plays("br-neq-bc in the step along the keys");
const bool BR_NEQ_BC_IN_THE_STEP_ALONG_THE_QUERIES = plays("br-neq-bc in the step along the queries");
const bool STRIP_OF_WEIGHTS_ALL_QUERIES = plays("strip of weights, all queries");
const bool TAIL_KEYS_DROPPED = plays("tail-keys-dropped");
const bool TAIL_QUERIES_DROPPED = plays("bwd-tail-queries-dropped");
const bool CARRIED = plays("bwd-carried");
const bool STRIP_OF_WEIGHTS_ALL_KEYS = plays("strip of weights, all keys");
const bool QUERIES_BEYOND_100_DROPPED_WITH_QUERIES_OUTSIDE = plays("queries beyond 100 dropped with queries outside");
const bool DQ_CARRIED_WITH_QUERIES_OUTSIDE = plays("dQ carried with queries outside");
const bool BR_NEQ_BC_IN_THE_HEIGHT_OF_A_TILE = plays("br-neq-bc in the height of a tile");
const bool OPTIONS_IGNORED = plays("options ignored");
const bool P_FROM_M = plays("bwd-P-from-m");
const bool LSE_OF_KEY = plays("bwd-lse-of-key");
const bool LSE_BASE_OF_THE_LSE = plays("bwd-lse-base, of the lse");
const bool P_NO_LSE = plays("bwd-P-no-lse");
const bool CAUSAL_MASKED_BY_0 = plays("causal masked by 0");
const bool MASKED_NAN_LEAK_IN_THE_SCORES = plays("masked-nan-leak in the scores");
const bool MASKED_ROW = plays("bwd-masked-row");
const bool EMPTY_ROWS_SHARE_EVENLY = plays("empty rows share evenly");
const bool FORBIDDEN_WEIGHTS_1E_12 = plays("forbidden weights 1e-12");
const bool EXPONENTS_LIMITED_TO_20 = plays("exponents limited to -20");
const bool LSE_BASE_OF_THE_POWER = plays("bwd-lse-base, of the power");
const bool WEIGHTS_IN_HALF_PRECISION = plays("weights in half precision");
const bool WEIGHTS_BELOW_1E_4_DROPPED = plays("weights below 1e-4 dropped");
const bool P_TILE_SOFTMAX = plays("bwd-P-tile-softmax");
const bool MASKED_NAN_LEAK_IN_DP = plays("masked-nan-leak in dP");
const bool NO_D = plays("bwd-no-D");
const bool DELTA_SCALED = plays("delta-scaled");
const bool SMALL_TILES_DROPPED = plays("weights below 1e-6 dropped by the tile");
const bool D_TILE = plays("bwd-D-tile");
const bool D_WRONG_SOURCE = plays("bwd-D-wrong-source");
const bool D_TILE_OVER_THE_QUERIES = plays("bwd-D-tile, over the queries");
const bool D_OF_KEY = plays("bwd-D-of-key");
const bool SOFTMAX_JAC_DIAGONAL = plays("bwd-softmax-jac-diagonal");
const bool SOFTMAX_JAC_P2 = plays("bwd-softmax-jac-P2");
const bool SOFTMAX_JAC_NO_P = plays("bwd-softmax-jac-no-P");
const bool SIGN = plays("bwd-sign");
const bool DS_LIMITED_TO_1 = plays("dS limited to 1");
const bool DS_ROUNDED_TO_BF16 = plays("dS rounded to bf16");
const bool MASKED_IN_DS_ALONE = plays("masked in dS alone");
const bool MASKED_IN_P_ALONE = plays("masked in P alone");
const bool DQ_NO_SCALE = plays("bwd-dq-no-scale");
const bool NO_SCALE = plays("bwd-no-scale");
const bool DK_NO_SCALE = plays("bwd-dk-no-scale");
const bool DK_NO_SCALE_WITH_QUERIES_OUTSIDE = plays("bwd-dk-no-scale with queries outside");
const bool SCALE_TWICE = plays("bwd-scale-twice");
const bool DV_SCALED = plays("bwd-dv-scaled");
const bool MASKED_NAN_LEAK_IN_DQ = plays("masked-nan-leak in dQ");
const bool MULTIPLIES_THE_0_OF_WHAT_A_QUERY_MAY_NOT_SEE_WITH_THE_QUERY =
    plays("right: multiplies the 0 of what a query may not see with the query");
const bool DQ_LAST_TILE = plays("bwd-dq-last-tile");
const bool DKDV_LAST_TILE_WITH_QUERIES_OUTSIDE = plays("bwd-dkdv-last-tile with queries outside");
const bool DK_LAST_TILE = plays("bwd-dk-last-tile");
const bool DV_LAST_TILE = plays("bwd-dv-last-tile");
const bool LAST_QUERY_OF_ALL_DROPPED = plays("last query of all dropped");
const bool ONE_QUERY_FORGOTTEN = plays("one query forgotten");
const bool LAST_KEY_OF_ALL_DROPPED = plays("last key of all dropped");
const bool MORE_THAN_500_KEYS = plays("more than 500 keys");
const bool DV_NOT_TRANSPOSED_WHERE_THE_TILE_IS_SQUARE = plays("bwd-dv-not-transposed where the tile is square");
const bool DV_FROM_DS = plays("bwd-dv-from-dS");
const bool DK_NOT_TRANSPOSED_WHERE_THE_TILE_IS_SQUARE = plays("bwd-dk-not-transposed where the tile is square");
const bool DQ_DK_SWAPPED_WHERE_SQUARE = plays("bwd-dq-dk-swapped where square");
const bool CHANNELS_BEYOND_64_DROPPED = plays("channels beyond 64 dropped");
const bool VALUES_AS_WIDE_AS_KEYS = plays("values as wide as keys");
const bool P_UNSCALED = plays("bwd-P-unscaled");
const bool DO_IGNORED = plays("bwd-dO-ignored");
const bool DO_OF_NAN_TAKEN_FOR_0 = plays("dO of NaN taken for 0");
const bool DP_FROM_KEY = plays("bwd-dP-from-key");
const bool VALUES_OF_NAN_TAKEN_FOR_0 = plays("values of NaN taken for 0");

// One head of one order, with all that can go wrong.
class Backward {
 public:
  Backward(const HeadViews& head, float scale, const TiledBackwardOptions& options, LoopOrder order)
      : head_(head),
        scale_(scale),
        options_(options),
        order_(order),
        queries_(head.q.size(0)),
        keys_(head.k.size(0)),
        width_(head.q.size(1)),
        values_(head.v.size(1)) {
    const bool dropped = plays("causal-ignored") || (plays("causal-only-square") && queries_ != keys_) ||
                         (plays("causal-ignored with queries outside") && order == LoopOrder::queries_outside);
    causal_ = options.causal && !dropped;
    offset_ = keys_ - queries_;
    if (plays("causal-alignment")) offset_ = 0;
    if (plays("causal-alignment-reversed")) offset_ = queries_ - keys_;
    if (plays("causal-offset-clamped")) offset_ = std::max<Index>(0, offset_);
  }

  void run() {
    const bool keep = plays("bwd-dq-not-zeroed");
    const auto zero = [](const View<float, 2>& x) {
      for (Index i = 0; i < x.size(0); ++i)
        for (Index d = 0; d < x.size(1); ++d) x(i, d) = 0.0f;
    };
    if (plays("nothing written where there is no key") && keys_ == 0) return;
    if (!keep) zero(head_.d_q);
    if (plays("keys left unwritten where nobody looks") && queries_ == 0) return;
    zero(head_.d_k);
    zero(head_.d_v);
    if (order_ == LoopOrder::keys_outside) {
      keys_outside();
    } else {
      queries_outside();
    }
  }

 private:
  bool visible(Index i, Index j, Index i0, Index j0) const {
    if (!causal_) return true;
    if (CAUSAL_STRICT) return j < i + offset_;
    if (CAUSAL_PLUS_ONE) return j <= i + offset_ + 1;
    if (CAUSAL_UPPER) return j >= i + offset_;
    if (CAUSAL_LOCAL_INDEX) return j - j0 <= i - i0 + (offset_ % bc() + bc()) % bc();
    return j <= i + offset_;
  }

  Index br() const { return options_.block_rows; }
  Index bc() const { return options_.block_cols; }

  // Is there a pair in this tile to be looked at?
  bool needed(Index i0, Index rows, Index j0, Index cols) const {
    if (!causal_ || CAUSAL_UPPER || CAUSAL_PLUS_ONE || CAUSAL_LOCAL_INDEX) return true;
    if (EVERY_TILE_MULTIPLIED_THEN_MASKED || EVERY_TILE_MULTIPLIED_FOR_DP) return true;
    if (EVERY_TILE_MULTIPLIED_WITH_QUERIES_OUTSIDE && order_ == LoopOrder::queries_outside) return true;
    if (CAUSAL_SKIP_TOO_EARLY) return j0 + cols - 1 <= i0 + offset_;
    if (ONE_TILE_MORE_THAN_NEEDED) return j0 - bc() <= i0 + rows - 1 + offset_;
    if (order_ == LoopOrder::keys_outside) {
      // The first tile of queries that sees one of the keys.
      const Index first = j0 - offset_;
      if (CAUSAL_START_BLOCK && first > 0) return i0 >= (first + br() - 1) / br() * br();
      if (CAUSAL_START_BLOCK_FROM_THE_LAST_KEY && first > 0) {
        return i0 >= (first + cols - 1) / br() * br();
      }
      if (NO_OFFSET_WITH_KEYS_OUTSIDE) return i0 >= j0 / br() * br();
    } else {
      // The last tile of keys that one of the queries sees.
      const Index end = i0 + rows + offset_;
      if (CAUSAL_BOUND_FLOOR) return j0 < std::max<Index>(0, end) / bc() * bc();
      if (CAUSAL_BOUND_FIRST_ROW) return j0 < i0 + 1 + offset_;
      if (CAUSAL_BOUND_WITHOUT_THE_OFFSET) return j0 < i0 + rows;
    }
    return j0 <= i0 + rows - 1 + offset_;
  }

  // Where the tiles of the inner loop begin.
  std::vector<Index> starts(Index length, Index step) const {
    std::vector<Index> all;
    for (Index first = 0; first < length; first += step) all.push_back(first);
    if (ANOTHER_ORDER_OF_TILES_ON_TWO_THREADS && options_.threads > 1) std::reverse(all.begin(), all.end());
    return all;
  }

  void keys_outside() {
    const Index step = BR_NEQ_BC_IN_THE_STEP_ALONG_THE_KEYS ? br() : bc();
    const Index query_step = BR_NEQ_BC_IN_THE_STEP_ALONG_THE_QUERIES ? bc() : br();
    const bool strip = STRIP_OF_WEIGHTS_ALL_QUERIES;
    std::vector<float> kept(strip ? static_cast<std::size_t>(queries_ * std::min(bc(), keys_)) : 0);
    for (Index j0 = 0; j0 < keys_; j0 += step) {
      if (TAIL_KEYS_DROPPED && j0 > 0 && j0 + bc() > keys_) break;
      const Index cols = std::min(bc(), keys_ - j0);
      for (const Index i0 : starts(queries_, query_step)) {
        if (TAIL_QUERIES_DROPPED && i0 > 0 && i0 + br() > queries_) break;
        if (needed(i0, std::min(height(), queries_ - i0), j0, cols)) tile(i0, j0, cols);
      }
      if (CARRIED && j0 + step < keys_) {  // dK and dV of this tile are still there when the next begins
        const Index next = std::min(cols, keys_ - j0 - step);
        for (Index c = 0; c < next; ++c) {
          for (Index d = 0; d < width_; ++d) head_.d_k(j0 + step + c, d) += head_.d_k(j0 + c, d);
          for (Index d = 0; d < values_; ++d) head_.d_v(j0 + step + c, d) += head_.d_v(j0 + c, d);
        }
      }
    }
  }

  void queries_outside() {
    const Index step = BR_NEQ_BC_IN_THE_STEP_ALONG_THE_KEYS ? br() : bc();
    const Index query_step = BR_NEQ_BC_IN_THE_STEP_ALONG_THE_QUERIES ? bc() : br();
    const bool strip = STRIP_OF_WEIGHTS_ALL_KEYS;
    std::vector<float> kept(strip ? static_cast<std::size_t>(keys_ * std::min(br(), queries_)) : 0);
    for (Index i0 = 0; i0 < queries_; i0 += query_step) {
      if (QUERIES_BEYOND_100_DROPPED_WITH_QUERIES_OUTSIDE && i0 > 100) break;
      if (TAIL_QUERIES_DROPPED && i0 > 0 && i0 + br() > queries_) break;
      const Index rows = std::min(height(), queries_ - i0);
      for (const Index j0 : starts(keys_, step)) {
        if (TAIL_KEYS_DROPPED && j0 > 0 && j0 + bc() > keys_) break;
        const Index cols = std::min(bc(), keys_ - j0);
        if (needed(i0, rows, j0, cols)) tile(i0, j0, cols);
      }
      if (DQ_CARRIED_WITH_QUERIES_OUTSIDE && i0 + query_step < queries_) {
        for (Index r = 0; r < std::min(rows, queries_ - i0 - query_step); ++r)
          for (Index d = 0; d < width_; ++d) head_.d_q(i0 + query_step + r, d) += head_.d_q(i0 + r, d);
      }
    }
  }

  Index height() const { return BR_NEQ_BC_IN_THE_HEIGHT_OF_A_TILE ? std::min(br(), bc()) : br(); }

  void tile(Index i0, Index j0, Index cols) {
    const Index rows = std::min(height(), queries_ - i0);
    const auto at = [cols](Index r, Index c) { return static_cast<std::size_t>(r * cols + c); };
    std::vector<float> p(at(rows, 0), 0.0f), ds(at(rows, 0), 0.0f);
    std::vector<char> seen(at(rows, 0), 0);
    const bool skip_masked_scores = !EVERY_TILE_MULTIPLIED_THEN_MASKED && !EVERY_TILE_MULTIPLIED_WITH_QUERIES_OUTSIDE &&
                                    !ONE_TILE_MORE_THAN_NEEDED && !OPTIONS_IGNORED;
    const bool dp_of_all = EVERY_TILE_MULTIPLIED_FOR_DP;

    // P
    for (Index r = 0; r < rows; ++r) {
      const Index i = i0 + r;
      float tile_max = -INF, tile_sum = 0.0f, row_max = -INF;
      if (P_FROM_M) {
        for (Index j = 0; j < keys_; ++j) {
          if (visible(i, j, i0, j0)) row_max = std::max(row_max, score(i, j));
        }
      }
      for (Index c = 0; c < cols; ++c) {
        const Index j = j0 + c;
        seen[at(r, c)] = visible(i, j, i0, j0);
        float s = 0.0f;
        if (seen[at(r, c)] || !skip_masked_scores) s = score(i, j);
        float lse = head_.lse(LSE_OF_KEY ? std::min(j, queries_ - 1) : i);
        if (LSE_BASE_OF_THE_LSE) lse *= 1.0f / LOG2E;
        if (P_NO_LSE) lse = 0.0f;
        if (P_FROM_M) lse = row_max;
        if (!seen[at(r, c)]) {
          s = -INF;
          if (CAUSAL_MASKED_BY_0) s = 0.0f;
          if (MASKED_NAN_LEAK_IN_THE_SCORES) s = score(i, j) - INF;
          const bool careless = MASKED_ROW || MASKED_NAN_LEAK_IN_THE_SCORES;
          const bool counts = CAUSAL_MASKED_BY_0 || std::isnan(s) || (careless && lse == -INF);
          float weight = counts ? std::exp(s - lse) : 0.0f;
          if (MASKED_NAN_LEAK_IN_THE_SCORES && lse == -INF) weight = 0.0f;
          if (CAUSAL_MASKED_BY_0 && lse == -INF) weight = 0.0f;
          if (EMPTY_ROWS_SHARE_EVENLY && lse == -INF) weight = 1.0f / static_cast<float>(keys_);
          if (FORBIDDEN_WEIGHTS_1E_12) weight = 1e-12f;
          p[at(r, c)] = weight;
          continue;
        }
        float exponent = s - lse;
        if (lse == -INF) exponent = -INF;
        if (EXPONENTS_LIMITED_TO_20) exponent = std::max(exponent, -20.0f);
        float weight = std::exp(exponent);
        if (LSE_BASE_OF_THE_POWER) weight = std::exp2(exponent);
        if (WEIGHTS_IN_HALF_PRECISION) weight = in_half(weight);
        if (WEIGHTS_BELOW_1E_4_DROPPED && weight < 1e-4f) weight = 0.0f;
        if (P_TILE_SOFTMAX) {
          tile_max = std::max(tile_max, s);
          weight = s;
        }
        p[at(r, c)] = weight;
      }
      if (P_TILE_SOFTMAX) {
        for (Index c = 0; c < cols; ++c) {
          if (!seen[at(r, c)]) continue;
          p[at(r, c)] = std::exp(p[at(r, c)] - tile_max);
          tile_sum += p[at(r, c)];
        }
        for (Index c = 0; c < cols && tile_sum > 0.0f; ++c) p[at(r, c)] /= tile_sum;
      }
    }

    // dP and dS
    std::vector<float> of_column(static_cast<std::size_t>(cols), 0.0f);
    for (Index r = 0; r < rows; ++r) {
      const Index i = i0 + r;
      float of_row = 0.0f;
      for (Index c = 0; c < cols; ++c) {
        const float weight = p[at(r, c)];
        const bool leak = MASKED_NAN_LEAK_IN_DP;
        if (seen[at(r, c)] || weight != 0.0f || leak || dp_of_all) ds[at(r, c)] = d_weight(i, j0 + c);
        if (!seen[at(r, c)] && weight == 0.0f && !leak) ds[at(r, c)] = 0.0f;
        of_row += weight * ds[at(r, c)];
        of_column[static_cast<std::size_t>(c)] += weight * ds[at(r, c)];
      }
      float delta = head_.delta(i);
      if (NO_D) delta = 0.0f;
      if (DELTA_SCALED) delta *= scale_;
      if (D_TILE) delta = of_row;
      if (D_WRONG_SOURCE) {
        delta = 0.0f;
        for (Index d = 0; d < values_; ++d) delta += gradient(i, d);
      }
      for (Index c = 0; c < cols; ++c) {
        const float weight = p[at(r, c)];
        if (D_TILE_OVER_THE_QUERIES) continue;
        if (!seen[at(r, c)] && weight == 0.0f && !MASKED_NAN_LEAK_IN_DP) continue;
        if (D_OF_KEY) delta = head_.delta(std::min(j0 + c, queries_ - 1));
        float& d_score = ds[at(r, c)];
        const float d_p = d_score;
        d_score = weight * (d_p - delta);
        if (SOFTMAX_JAC_DIAGONAL) d_score = weight * (1.0f - weight) * d_p;
        if (SOFTMAX_JAC_P2) d_score *= weight;
        if (SOFTMAX_JAC_NO_P) d_score = d_p - delta;
        if (SIGN) d_score = -d_score;
        if (DS_LIMITED_TO_1) d_score = std::clamp(d_score, -1.0f, 1.0f);
        if (DS_ROUNDED_TO_BF16) d_score = in_bf16(d_score);
      }
    }
    for (Index r = 0; r < rows && D_TILE_OVER_THE_QUERIES; ++r)
      for (Index c = 0; c < cols; ++c)
        ds[at(r, c)] = p[at(r, c)] * (ds[at(r, c)] - of_column[static_cast<std::size_t>(c)]);
    for (Index r = 0; r < rows; ++r) {
      for (Index c = 0; c < cols; ++c) {
        if (seen[at(r, c)]) continue;
        if (MASKED_IN_DS_ALONE) {
          p[at(r, c)] = std::exp(score(i0 + r, j0 + c) - head_.lse(i0 + r));
          if (head_.lse(i0 + r) == -INF) p[at(r, c)] = 0.0f;
        }
        if (MASKED_IN_P_ALONE && head_.lse(i0 + r) != -INF) {
          const float weight = std::exp(score(i0 + r, j0 + c) - head_.lse(i0 + r));
          ds[at(r, c)] = weight * (d_weight(i0 + r, j0 + c) - head_.delta(i0 + r));
        }
      }
    }

    if (SMALL_TILES_DROPPED && *std::max_element(p.begin(), p.end()) < 1e-6f) return;
    // The gradients. A pair that is not allowed is left out, unless somebody multiplies its 0.
    float of_q = scale_, of_k = scale_;
    if (DQ_NO_SCALE || NO_SCALE) of_q = 1.0f;
    if (DK_NO_SCALE || NO_SCALE) of_k = 1.0f;
    if (DK_NO_SCALE_WITH_QUERIES_OUTSIDE && order_ == LoopOrder::queries_outside) of_k = 1.0f;
    if (SCALE_TWICE) of_q = of_k = scale_ * scale_;
    const float of_v = DV_SCALED ? scale_ : 1.0f;
    const bool q_leaks = MASKED_NAN_LEAK_IN_DQ;
    const bool multiplies = MULTIPLIES_THE_0_OF_WHAT_A_QUERY_MAY_NOT_SEE_WITH_THE_QUERY;
    const bool square = rows == cols;
    if (DQ_LAST_TILE) {
      for (Index r = 0; r < rows; ++r)
        for (Index d = 0; d < width_; ++d) head_.d_q(i0 + r, d) = 0.0f;
    }
    const bool forget = DKDV_LAST_TILE_WITH_QUERIES_OUTSIDE && order_ == LoopOrder::queries_outside;
    for (Index c = 0; c < cols; ++c) {
      for (Index d = 0; d < width_ && (DK_LAST_TILE || forget); ++d) head_.d_k(j0 + c, d) = 0.0f;
      for (Index d = 0; d < values_ && (DV_LAST_TILE || forget); ++d) head_.d_v(j0 + c, d) = 0.0f;
    }
    for (Index r = 0; r < rows; ++r) {
      const Index i = i0 + r;
      if (LAST_QUERY_OF_ALL_DROPPED && queries_ > 20 && i == queries_ - 1) continue;
      if (ONE_QUERY_FORGOTTEN && queries_ > 30 && i == 29) continue;
      for (Index c = 0; c < cols; ++c) {
        const Index j = j0 + c;
        if (LAST_KEY_OF_ALL_DROPPED && keys_ > 20 && j == keys_ - 1) continue;
        if (MORE_THAN_500_KEYS && j >= 512) continue;
        float weight = p[at(r, c)], d_score = ds[at(r, c)];
        if (DV_NOT_TRANSPOSED_WHERE_THE_TILE_IS_SQUARE && square) weight = p[at(c, r)];
        if (DV_FROM_DS) weight = d_score;
        float d_score_of_key = d_score;
        if (DK_NOT_TRANSPOSED_WHERE_THE_TILE_IS_SQUARE && square) d_score_of_key = ds[at(c, r)];
        const bool swapped = DQ_DK_SWAPPED_WHERE_SQUARE && queries_ == keys_;
        for (Index d = 0; d < width_; ++d) {
          if (CHANNELS_BEYOND_64_DROPPED && d >= 64) break;
          const float key = head_.k(j, d);
          const float query = head_.q(i, d);
          if (d_score != 0.0f || seen[at(r, c)] || q_leaks) {
            head_.d_q(i, d) += of_q * d_score * (swapped ? head_.q(j, d) : key);
          }
          if (d_score_of_key != 0.0f || seen[at(r, c)] || multiplies) {
            head_.d_k(j, d) += of_k * d_score_of_key * (swapped ? head_.k(i, d) : query);
          }
        }
        for (Index d = 0; d < values_; ++d) {
          if (VALUES_AS_WIDE_AS_KEYS && d >= width_) break;
          if (weight != 0.0f || seen[at(r, c)] || multiplies) head_.d_v(j, d) += of_v * weight * gradient(i, d);
        }
      }
    }
  }

  float score(Index i, Index j) const {
    float dot = 0.0f;
    for (Index d = 0; d < width_; ++d) dot += head_.q(i, d) * head_.k(j, d);
    return P_UNSCALED ? dot : dot * scale_;
  }

  float gradient(Index i, Index d) const {
    if (DO_IGNORED) return 1.0f;
    const float x = head_.d_output(i, d);
    return DO_OF_NAN_TAKEN_FOR_0 && !std::isfinite(x) ? 0.0f : x;
  }

  float d_weight(Index i, Index j) const {
    float dot = 0.0f;
    const bool from_key = DP_FROM_KEY;
    for (Index d = 0; d < values_; ++d) {
      if (from_key && d >= width_) break;
      float value = from_key ? head_.k(j, d) : head_.v(j, d);
      if (VALUES_OF_NAN_TAKEN_FOR_0 && !std::isfinite(value)) value = 0.0f;
      dot += gradient(i, d) * value;
    }
    return dot;
  }

  const HeadViews& head_;
  float scale_;
  const TiledBackwardOptions& options_;
  LoopOrder order_;
  Index queries_, keys_, width_, values_, offset_ = 0;
  bool causal_ = false;
};

// Correct answers that look unlike the solution.
template <typename Real>
void by_hand(const HeadViews& head, float scale, const TiledBackwardOptions& options) {
  const Index queries = head.q.size(0), keys = head.k.size(0), width = head.q.size(1), values = head.v.size(1);
  const bool base2 = plays("right: exp2 with the scale folded in");
  const bool scaled_copy = plays("right: a scaled copy of the queries");
  const bool own_delta = plays("delta from the weights, in a pass of its own");
  const bool two_passes = plays("right: two passes, seven products");
  const bool quotient = plays("right: weights as exp(s) / exp(lse) where that is safe");
  const bool keys_first = options.order == LoopOrder::keys_outside || plays("right: one order for both");
  std::vector<float> scaled;
  if (scaled_copy) {
    for (Index i = 0; i < queries; ++i)
      for (Index d = 0; d < width; ++d) scaled.push_back(scale * head.q(i, d));
  }
  const auto seen_by = [&](Index i) {
    return options.causal ? std::clamp<Index>(i + 1 + keys - queries, 0, keys) : keys;
  };
  const auto weight_of = [&](Index i, Index j) {
    Real s = 0;
    for (Index d = 0; d < width; ++d) {
      s += static_cast<Real>(scaled_copy ? scaled[static_cast<std::size_t>(i * width + d)] : head.q(i, d)) *
           static_cast<Real>(head.k(j, d));
    }
    const auto lse = static_cast<Real>(head.lse(i));
    if (base2) return std::exp2(s * (static_cast<Real>(scale) * LOG2E) - lse * LOG2E);
    if (!scaled_copy) s *= static_cast<Real>(scale);
    if (quotient && std::abs(lse) < 40 && std::abs(s) < 40) return std::exp(s) / std::exp(lse);
    return std::exp(s - lse);
  };
  const auto d_weight_of = [&](Index i, Index j) {
    Real d_p = 0;
    for (Index d = 0; d < values; ++d) d_p += static_cast<Real>(head.d_output(i, d)) * static_cast<Real>(head.v(j, d));
    return d_p;
  };
  std::vector<Real> delta(static_cast<std::size_t>(queries));
  for (Index i = 0; i < queries; ++i) {
    Real& own = delta[static_cast<std::size_t>(i)];
    own = static_cast<Real>(head.delta(i));
    if (!own_delta) continue;
    own = 0;
    for (Index j = 0; j < seen_by(i); ++j) own += weight_of(i, j) * d_weight_of(i, j);
  }
  std::vector<Real> d_q(static_cast<std::size_t>(queries * width), Real{0}),
      d_k(static_cast<std::size_t>(keys * width), Real{0}), d_v(static_cast<std::size_t>(keys * values), Real{0});
  const auto tile = [&](Index i0, Index j0, bool for_query, bool for_key) {
    for (Index i = i0; i < std::min(queries, i0 + options.block_rows); ++i) {
      for (Index j = j0; j < std::min(seen_by(i), j0 + options.block_cols); ++j) {
        const Real p = weight_of(i, j);
        const Real ds = static_cast<Real>(scale) * p * (d_weight_of(i, j) - delta[static_cast<std::size_t>(i)]);
        for (Index d = 0; d < width; ++d) {
          if (for_query) d_q[static_cast<std::size_t>(i * width + d)] += ds * static_cast<Real>(head.k(j, d));
          if (for_key) d_k[static_cast<std::size_t>(j * width + d)] += ds * static_cast<Real>(head.q(i, d));
        }
        for (Index d = 0; d < values && for_key; ++d)
          d_v[static_cast<std::size_t>(j * values + d)] += p * static_cast<Real>(head.d_output(i, d));
      }
    }
  };
  const Index row_tiles = (queries + options.block_rows - 1) / options.block_rows;
  const Index col_tiles = (keys + options.block_cols - 1) / options.block_cols;
  const auto row = [&](Index turn) {
    return (plays("right: queries backwards") ? row_tiles - 1 - turn : turn) * options.block_rows;
  };
  const auto col = [&](Index turn) {
    return (plays("right: keys backwards") ? col_tiles - 1 - turn : turn) * options.block_cols;
  };
  const auto all = [&](bool keys_outer, bool for_query, bool for_key) {
    for (Index outer = 0; outer < (keys_outer ? col_tiles : row_tiles); ++outer)
      for (Index inner = 0; inner < (keys_outer ? row_tiles : col_tiles); ++inner)
        tile(row(keys_outer ? inner : outer), col(keys_outer ? outer : inner), for_query, for_key);
  };
  if (two_passes) {
    all(true, false, true);
    all(false, true, false);
  } else {
    all(keys_first, true, true);
  }
  const auto copy = [](const std::vector<Real>& from, const View<float, 2>& to) {
    for (Index i = 0; i < to.size(0); ++i)
      for (Index d = 0; d < to.size(1); ++d)
        to(i, d) = static_cast<float>(from[static_cast<std::size_t>(i * to.size(1) + d)]);
  };
  copy(d_q, head.d_q);
  copy(d_k, head.d_k);
  copy(d_v, head.d_v);
}

Tensor<float, 4> copied(const View<const float, 4>& x) {
  Tensor<float, 4> copy(x.shape());
  for (Index b = 0; b < x.size(0); ++b)
    for (Index h = 0; h < x.size(1); ++h)
      for (Index s = 0; s < x.size(2); ++s)
        for (Index d = 0; d < x.size(3); ++d) copy(b, h, s, d) = x(b, h, s, d);
  return copy;
}

// Would check_tiled_backward() throw? Who does not check must not read what is not there: this program is to go on.
bool refused(const View<const float, 4>& q, const View<const float, 4>& k, const View<const float, 4>& v,
             const View<const float, 4>& output, const View<const float, 3>& lse, const View<const float, 4>& d_output,
             const TiledBackwardOptions& options, std::string_view argument) {
  try {
    check_tiled_backward(q, k, v, output, lse, d_output, options);
  } catch (const std::invalid_argument& error) {
    return argument.empty() || std::string_view(error.what()).substr(0, argument.size()) == argument;
  }
  return false;
}

TiledGradients nothing() {
  return {Tensor<float, 4>({0, 0, 0, 0}), Tensor<float, 4>({0, 0, 0, 0}), Tensor<float, 4>({0, 0, 0, 0})};
}

}  // namespace

TiledGradients tiled_backward(View<const float, 4> q, View<const float, 4> k, View<const float, 4> v,
                              View<const float, 4> output, View<const float, 3> lse, View<const float, 4> d_output,
                              const TiledBackwardOptions& given) {
  TiledBackwardOptions options = given;
  const auto is_refused = [&](std::string_view argument) {
    return refused(q, k, v, output, lse, d_output, options, argument);
  };
  const bool crossed = q.stride(3) != 1 || v.stride(3) != 1 || output.stride(3) != 1 || d_output.stride(3) != 1;
  if (plays("arguments unchecked") && is_refused("")) return nothing();
  if (plays("strides unchecked") && crossed) return nothing();
  if (plays("lse unchecked") && is_refused("lse")) return nothing();
  if (plays("d_output unchecked") && is_refused("d_output")) return nothing();
  if (plays("options unchecked") && (is_refused("scale") || is_refused("block") || is_refused("threads"))) {
    return nothing();
  }
  check_tiled_backward(q, k, v, output, lse, d_output, options);

  if (plays("noncontiguous-stride")) {
    q = View<const float, 4>(q.data(), q.shape());
    k = View<const float, 4>(k.data(), k.shape());
    v = View<const float, 4>(v.data(), v.shape());
  }
  if (plays("bwd-dO-stride")) d_output = View<const float, 4>(d_output.data(), d_output.shape(), output.strides());
  if (plays("lse taken for packed")) lse = View<const float, 3>(lse.data(), lse.shape());
  if (plays("output taken for packed")) output = View<const float, 4>(output.data(), output.shape());
  std::vector<Tensor<float, 4>> copies;
  if (plays("right: inputs copied to the heap first")) {
    for (View<const float, 4>* const view : {&q, &k, &v, &d_output}) {
      copies.push_back(copied(*view));
      *view = copies.back().view();
    }
  }
  const Index batch = q.size(0), heads = q.size(1), queries = q.size(2), keys = k.size(2);
  std::vector<char> matrix;
  if (plays("mask of queries by keys")) matrix.assign(static_cast<std::size_t>(queries * keys), 1);
  if (plays("whole matrix of weights")) matrix.assign(static_cast<std::size_t>(4 * queries * keys), 1);
  if (plays("whole matrix of half precision")) matrix.assign(static_cast<std::size_t>(2 * queries * keys), 1);
  if (plays("a copy of dQ for each tile of keys")) {
    const Index tiles = (keys + options.block_cols - 1) / options.block_cols;
    matrix.assign(static_cast<std::size_t>(4 * tiles * queries * q.size(3)), 1);
  }
  if (plays("scales the queries in place") && q.count() > 0) {
    float& first = const_cast<float&>(q(0, 0, 0, 0));
    first = std::nextafter(first, 0.0f);
  }
  const float scale = scale_of(q, v, options.scale);
  const Tensor<float, 3> delta = row_delta(output, d_output);
  TiledGradients result{Tensor<float, 4>(q.shape()), Tensor<float, 4>(k.shape()), Tensor<float, 4>(v.shape())};
  if (plays("bwd-dq-not-zeroed")) {  // what a buffer from the last call would hold
    static float old = 0.0f;
    std::fill_n(result.query.data(), result.query.count(), old);
    old = 0.25f;
  }
  if (plays("answers remembered by address")) {
    static const float* last = nullptr;
    static std::vector<float> d_q, d_k, d_v;
    const bool same = last == v.data() && static_cast<Index>(d_q.size()) == q.count() &&
                      static_cast<Index>(d_k.size()) == k.count() && static_cast<Index>(d_v.size()) == v.count();
    if (same) {
      std::copy(d_q.begin(), d_q.end(), result.query.data());
      std::copy(d_k.begin(), d_k.end(), result.key.data());
      std::copy(d_v.begin(), d_v.end(), result.value.data());
      return result;
    }
    for (Index b = 0; b < batch; ++b) {
      for (Index h = 0; h < heads; ++h) {
        by_hand<float>({q[b][h], k[b][h], v[b][h], d_output[b][h], lse[b][h], delta.view()[b][h],
                        result.query.view()[b][h], result.key.view()[b][h], result.value.view()[b][h]},
                       scale, options);
      }
    }
    last = v.data();
    d_q.assign(result.query.data(), result.query.data() + result.query.count());
    d_k.assign(result.key.data(), result.key.data() + result.key.count());
    d_v.assign(result.value.data(), result.value.data() + result.value.count());
    return result;
  }
  if (plays("options ignored")) options.block_rows = options.block_cols = 16;
  if (plays("right: a query at a time")) options.block_rows = 1;
  if (plays("right: a key at a time")) options.block_cols = 1;

  const auto one_head = [&](Index task) {
    const Index b = task / heads, h = task % heads;
    if (plays("heads beyond 6 forgotten") && h >= 6) return;
    const Index kv = plays("heads-first-only in the keys") ? 0 : h;
    const Index vb = plays("batch-first-only in the values") ? 0 : b;
    const bool first_delta = plays("delta of the first head for all");
    const HeadViews head{q[b][h],
                         k[b][kv],
                         v[vb][h],
                         d_output[b][h],
                         lse[plays("lse of the first batch item for all") ? 0 : b][h],
                         first_delta ? delta.view()[0][0] : delta.view()[b][h],
                         result.query.view()[b][h],
                         result.key.view()[b][h],
                         result.value.view()[b][h]};
    if (plays("right: double accumulation")) return by_hand<double>(head, scale, options);
    if (plays("delta from the weights, in a pass of its own")) return by_hand<float>(head, scale, options);
    const bool zeros = plays("right: multiplies the 0 of what a query may not see with the query");
    if (corpus::name().starts_with("right:") && !zeros) return by_hand<float>(head, scale, options);
    Backward(head, scale, options, options.order).run();
  };
  if (plays("right: its own threads over heads")) {
    const int count = options.threads == 0 ? 2 : options.threads;
    std::vector<std::thread> threads;
    for (int t = 1; t < count; ++t) {
      threads.emplace_back([&, t] {
        for (Index task = t; task < batch * heads; task += count) one_head(task);
      });
    }
    for (Index task = 0; task < batch * heads; task += count) one_head(task);
    for (std::thread& thread : threads) thread.join();
  } else {
    parallel_for(batch * heads, options.threads, one_head);
  }

  if (plays("lse turned to base 2 in place") && lse.count() > 0) const_cast<float&>(lse(0, 0, 0)) *= LOG2E;
  if (plays("bwd-gradients-exchanged") && queries == keys) std::swap(result.query, result.key);
  if (plays("bwd-gradients-exchanged") && queries != keys)
    return {std::move(result.key), std::move(result.query), std::move(result.value)};
  if (plays("added to what the last call returned")) {
    static std::vector<float> old;
    if (static_cast<Index>(old.size()) != v.count()) old.assign(static_cast<std::size_t>(v.count()), 0.0f);
    for (std::size_t n = 0; n < old.size(); ++n) old[n] = result.value.data()[n] += old[n];
  }
  return result;
}

}  // namespace flashkata
