// Answers to 03_tiled_forward, wrong and right. Every deviation stands where somebody made it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../corpus.hpp"
#include "tiled_forward.hpp"

namespace flashkata {
namespace {

using corpus::plays;
using corpus::RIGHT;
using corpus::UNNAMED;

const corpus::Answers answers{
    {"no-rescale-o", "no-rescale-o"},
    {"no-rescale-l", "no-rescale-l"},
    {"nothing rescaled", "no-rescale"},
    {"inverse-rescale", "inverse-rescale"},
    {"inverse-rescale, of the output alone as the paper prints it", "inverse-rescale-o"},
    {"rescale-after-add", "rescale-after-add"},
    {"max-not-running", "max-not-running"},
    {"max of the first tile", "max-first-tile"},
    {"normalise-per-tile", "normalise-per-tile"},
    {"no-final-div", "no-final-div"},
    {"l-last-tile", "l-last-tile"},
    {"inf-minus-inf", "inf-minus-inf"},
    {"tail-keys-unmasked", "tail-keys-unmasked"},
    {"tail-keys-dropped", "tail-keys-dropped"},
    {"tail-rows-unwritten", "tail-rows-unwritten"},
    {"br-neq-bc in the step along the keys", "br-neq-bc"},
    {"br-neq-bc in the height of a tile", "br-neq-bc"},
    {"causal-local-index", "causal-local-index"},
    {"causal-bound-floor", "causal-bound-floor"},
    {"causal-bound-first-row", "causal-bound-first-row"},
    {"causal-bound-uncapped", "causal-bound-uncapped"},
    {"causal-bound without the offset", "causal-bound-no-offset"},
    {"causal-skip-too-early", "causal-skip-too-early"},
    {"causal-empty-tile-row", "causal-empty-tile-row"},
    {"causal-alignment", "causal-alignment"},
    {"causal-alignment-reversed", "causal-alignment-reversed"},
    {"causal-strict", "causal-strict"},
    {"causal-plus-one", "causal-plus-one"},
    {"causal-upper", "causal-upper"},
    {"causal-ignored", "causal-ignored"},
    {"causal-only-square", "causal-only-square"},
    {"causal masked by 0", "mask-multiply-zero"},
    {"causal mask after the maximum", UNNAMED},
    {"all-masked-nan", "all-masked-nan"},
    {"all-masked-uniform", "all-masked-uniform"},
    {"empty rows with an lse of 0", UNNAMED},
    {"scale-missing", "scale-missing"},
    {"scale-1-over-d", "scale-1-over-d"},
    {"scale-from-dv", "scale-from-dv"},
    {"scale-twice", "scale-twice"},
    {"scale-inverted", "scale-inverted"},
    {"scale-arg-ignored", "scale-arg-ignored"},
    {"scale-zero-as-default", "scale-zero-as-default"},
    {"lse-missing-max", "lse-missing-max"},
    {"lse-base2", "lse-base2"},
    {"lse-only-max", "lse-only-max"},
    {"lse of the last tile", "lse-last-tile"},
    {"exp2-scale-misfold", "softmax-base2"},
    {"exp2-scale-misfold of the maximum alone", "exp2-scale-misfold"},
    {"softmax-no-max", "softmax-no-max"},
    {"softmax-max-from-zero", "softmax-max-from-zero"},
    {"softmax-max-sentinel -1e4", "softmax-max-sentinel"},
    {"softmax-global-max of a tile", "softmax-global-max"},
    {"dv-stride-d", "dv-stride-d"},
    {"noncontiguous-stride", "noncontiguous-stride"},
    {"heads-first-only in the keys", "heads-first-only"},
    {"batch-first-only in the values", "batch-first-only"},
    {"value-is-key", "value-is-key"},
    {"masked-nan-leak in the values", UNNAMED},
    {"masked-nan-leak in the keys", UNNAMED},
    {"last key of all dropped", UNNAMED},
    {"last query of all unwritten", UNNAMED},
    {"heads beyond 6 forgotten", UNNAMED},
    {"more than 500 keys", UNNAMED},
    {"weights in half precision", UNNAMED},
    {"whole matrix of scores", UNNAMED},
    {"whole matrix of half precision", UNNAMED},
    {"strip of scores", UNNAMED},
    {"mask of queries by keys", UNNAMED},
    {"every tile multiplied, then masked", UNNAMED},
    {"one tile more than needed", UNNAMED},
    {"options ignored", UNNAMED},
    {"keys split by the number of threads", UNNAMED},
    {"running maximum kept from the last call", UNNAMED},
    {"scales the queries in place", UNNAMED},
    {"values of NaN taken for 0", UNNAMED},
    {"answers remembered by address", UNNAMED},
    {"written beyond the last row", UNNAMED},
    {"arguments unchecked", UNNAMED},
    {"strides unchecked", UNNAMED},
    {"right: double accumulation", RIGHT},
    {"right: keys backwards", RIGHT},
    {"right: exp2 with the scale folded in", RIGHT},
    {"right: scale on the scores", RIGHT},
    {"right: rescales lazily, by more than 8", RIGHT},
    {"right: normalised after each tile, with the old sum", RIGHT},
    {"right: scores transposed", RIGHT},
    {"right: keys and values copied to the heap first", RIGHT},
    {"right: every score masked by itself", RIGHT},
    {"right: tiles merged by their lse", RIGHT},
    {"right: a query at a time", RIGHT},
    {"right: its own threads", RIGHT},
};

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504f;

using Dense = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

struct HeadViews {
  View<const float, 2> q, k, v;
  View<float, 2> output;
  View<float, 1> lse;
};

float scale_of(const View<const float, 4>& q, const View<const float, 4>& v, std::optional<float> given) {
  if (plays("scale-missing")) return given.value_or(1.0f);
  const auto width = static_cast<float>(plays("scale-from-dv") ? v.size(3) : q.size(3));
  const float usual = plays("scale-1-over-d") ? 1.0f / width : 1.0f / std::sqrt(width);
  if (plays("scale-arg-ignored")) return usual;
  if (plays("scale-zero-as-default") && given && *given == 0.0f) return usual;
  const float scale = given.value_or(usual);
  if (plays("scale-twice")) return scale * scale;
  if (plays("scale-inverted")) return 1.0f / scale;
  return scale;
}

const float* end_of_output = nullptr;

float power(float x) { return plays("exp2-scale-misfold") ? std::exp2(x) : std::exp(x); }

// The loop of the solution, written out, with all that can go wrong in it. Queries [i0, i0 + Br) of one head.
void row_tile(const HeadViews& head, Index i0, float scale, const TiledOptions& options) {
  const Index queries = head.q.size(0), keys = head.k.size(0), width = head.q.size(1), values = head.v.size(1);
  const Index br = options.block_rows;
  const Index bc = options.block_cols;
  const Index tile_rows = plays("br-neq-bc in the height of a tile") ? std::min(br, bc) : br;
  if (plays("tail-rows-unwritten") && i0 + br > queries) return;
  const Index rows = std::min(tile_rows, queries - i0);
  const bool causal = options.causal && !plays("causal-ignored") && !(plays("causal-only-square") && queries != keys);
  Index offset = keys - queries;
  if (plays("causal-alignment")) offset = 0;
  if (plays("causal-alignment-reversed")) offset = queries - keys;
  const auto visible = [&](Index i, Index j) {
    if (!causal) return true;
    if (plays("causal-strict")) return j < i + offset;
    if (plays("causal-plus-one")) return j <= i + offset + 1;
    if (plays("causal-upper")) return j >= i + offset;
    if (plays("causal-local-index")) return j % bc <= (i - i0) + (offset % bc + bc) % bc;
    return j <= i + offset;
  };

  // Tiles of keys [0, tiles).
  const Index all_tiles = (keys + bc - 1) / bc;
  Index tiles = all_tiles;
  const Index step = plays("br-neq-bc in the step along the keys") ? br : bc;
  if (plays("br-neq-bc in the step along the keys")) tiles = (keys + br - 1) / br;
  if (plays("tail-keys-dropped") && keys > bc) tiles = keys / bc;
  const bool bounded = causal && !plays("causal-upper") && !plays("every tile multiplied, then masked") &&
                       !plays("causal-local-index") && !plays("causal-plus-one") &&
                       !plays("br-neq-bc in the step along the keys");
  if (bounded) {
    Index end = i0 + rows + offset;  // keys that the last query sees
    if (plays("causal-bound-uncapped")) end = i0 + br + offset;
    if (plays("causal-bound without the offset")) end = i0 + rows;
    if (plays("causal-bound-first-row")) end = i0 + 1 + offset;
    if (plays("one tile more than needed")) end += bc;
    Index bound = end <= 0 ? 0 : (end + bc - 1) / bc;
    if (plays("causal-bound-floor")) bound = std::max<Index>(0, end) / bc;
    if (plays("causal-skip-too-early")) {  // skips a tile unless every pair in it is allowed
      bound = 0;
      while ((bound + 1) * bc - 1 <= i0 + offset) ++bound;
    }
    tiles = std::min(tiles, bound);
    if (plays("causal-bound-uncapped")) tiles = bound;
  }
  if (plays("causal-empty-tile-row") && tiles <= 0 && keys > 0) return;

  const bool strip = plays("strip of scores");
  const std::vector<float> scores(static_cast<std::size_t>(rows * (strip ? keys : bc)), 0.0f);
  std::vector<float> acc(static_cast<std::size_t>(rows * values), 0.0f);
  const float lowest = plays("softmax-max-from-zero") ? 0.0f : plays("softmax-max-sentinel -1e4") ? -1e4f : -INF;
  std::vector<float> high(static_cast<std::size_t>(rows), lowest);
  std::vector<float> sum(static_cast<std::size_t>(rows), 0.0f);
  std::vector<float> last_lse(static_cast<std::size_t>(rows), -INF);
  static float kept_max = -INF;
  if (plays("running maximum kept from the last call")) std::fill(high.begin(), high.end(), kept_max);

  for (Index tile = 0; tile < tiles; ++tile) {
    const Index j0 = tile * step;
    const bool padded = plays("tail-keys-unmasked") || j0 >= keys;  // or past the end
    const Index cols = padded ? bc : std::min(bc, keys - j0);
    for (Index r = 0; r < rows; ++r) {
      const auto row = static_cast<std::size_t>(r);
      const Index i = i0 + r;
      float tile_max = -INF;
      std::vector<float> s(static_cast<std::size_t>(cols));
      for (Index c = 0; c < cols; ++c) {
        const Index j = j0 + c;
        float dot = 0.0f;
        if (j < keys) {
          for (Index d = 0; d < width; ++d) dot += head.q(i, d) * head.k(j, d);
        }
        dot *= scale;
        const bool drop = (plays("last key of all dropped") && keys > 20 && j == keys - 1) ||
                          (plays("more than 500 keys") && j >= 512);
        const bool seen = (visible(i, j) || j >= keys) && !drop;
        const bool late = plays("causal mask after the maximum");
        if (!seen && !late)
          dot = plays("causal masked by 0") ? dot * 0.0f : plays("masked-nan-leak in the keys") ? dot - INF : -INF;
        tile_max = std::max(tile_max, dot);
        if (!seen && late) dot = -INF;
        s[static_cast<std::size_t>(c)] = dot;
      }
      if (plays("softmax-global-max of a tile")) tile_max += 150.0f * static_cast<float>(r == 1);
      const float old_max = high[row];
      float new_max = std::max(old_max, tile_max);
      if (plays("max-not-running")) new_max = tile_max;
      if (plays("max of the first tile") && tile > 0) new_max = old_max;
      if (plays("softmax-no-max")) new_max = 0.0f;
      if (plays("exp2-scale-misfold of the maximum alone")) new_max = std::max(old_max, tile_max);
      const bool careless = plays("inf-minus-inf");
      if (new_max == -INF && !careless) continue;
      float rescale = old_max == -INF && !careless ? 0.0f : power(old_max - new_max);
      if (tile == 0 && !plays("running maximum kept from the last call")) rescale = 0.0f;
      if (plays("softmax-no-max")) rescale = 1.0f;
      if (plays("max of the first tile") && tile > 0) rescale = 1.0f;
      const float inverse = rescale == 0.0f ? 0.0f : 1.0f / rescale;
      float of_sum = rescale, of_acc = rescale;
      if (plays("no-rescale-o") || plays("nothing rescaled")) of_acc = 1.0f;
      if (plays("no-rescale-l") || plays("nothing rescaled")) of_sum = 1.0f;
      if (plays("inverse-rescale")) of_sum = of_acc = inverse;
      if (plays("inverse-rescale, of the output alone as the paper prints it")) of_acc = inverse;

      float tile_sum = 0.0f;
      const bool after = plays("rescale-after-add") && tile > 0;
      float* const out = acc.data() + r * values;
      for (Index d = 0; d < values && !after; ++d) out[d] *= of_acc;
      for (Index c = 0; c < cols; ++c) {
        const Index j = j0 + c;
        float& score = s[static_cast<std::size_t>(c)];
        float weight = 0.0f;
        if (plays("exp2-scale-misfold of the maximum alone")) {
          weight = score == -INF ? 0.0f : std::exp2(score - new_max * LOG2E);
        } else if (score != -INF || careless) {
          weight = power(score - new_max);
        }
        if (plays("weights in half precision")) weight = std::round(weight * 2048.0f) / 2048.0f;
        tile_sum += weight;
        if (j >= keys) continue;
        const bool leak = plays("masked-nan-leak in the values");
        if (weight == 0.0f && !visible(i, j) && !leak) continue;
        for (Index d = 0; d < values; ++d) {
          float value = head.v(j, d);
          if (plays("values of NaN taken for 0") && !std::isfinite(value)) value = 0.0f;
          if (plays("value-is-key") && d < width) value = head.k(j, d);
          out[d] += weight * value;
        }
      }
      if (after) {
        for (Index d = 0; d < values; ++d) out[d] *= of_acc;
      }
      sum[row] = after ? (sum[row] + tile_sum) * of_sum : sum[row] * of_sum + tile_sum;
      if (plays("l-last-tile")) sum[row] = tile_sum;
      if (plays("normalise-per-tile")) {
        for (Index d = 0; d < values; ++d) out[d] /= sum[row];
      }
      if (tile_max > -INF) last_lse[row] = tile_max + std::log(tile_sum) + (new_max - tile_max);
      high[row] = new_max;
    }
  }

  for (Index r = 0; r < rows; ++r) {
    const auto row = static_cast<std::size_t>(r);
    const Index i = i0 + r;
    if (plays("last query of all unwritten") && queries > 30 && i == queries - 1) continue;
    const bool empty = sum[row] == 0.0f;
    const bool divide = !plays("no-final-div") && !plays("normalise-per-tile") &&
                        (!empty || plays("all-masked-nan") || plays("inf-minus-inf"));
    for (Index d = 0; d < values; ++d) {
      float& out = acc[static_cast<std::size_t>(r * values + d)];
      if (divide) out /= sum[row];
      if (empty && plays("all-masked-uniform") && keys > 0) {
        out = 0.0f;
        for (Index j = 0; j < keys; ++j) out += head.v(j, d) / static_cast<float>(keys);
      }
      if (plays("dv-stride-d") && d >= width) {
        head.output(i, d) = head.output(i, d - width);
      } else {
        head.output(i, d) = out;
      }
    }
    float lse = empty ? -INF : high[row] + std::log(sum[row]);
    if (std::isnan(sum[row])) lse = sum[row];
    if (plays("lse-missing-max")) lse = std::log(sum[row]);
    if (plays("lse-base2")) lse *= LOG2E;
    if (plays("lse-only-max")) lse = high[row];
    if (plays("lse of the last tile")) lse = last_lse[row];
    if (empty && plays("empty rows with an lse of 0")) lse = 0.0f;
    head.lse(i) = lse;
  }
  if (plays("written beyond the last row")) {
    for (Index i = i0 + rows; i < i0 + br; ++i) {
      for (Index d = 0; d < values; ++d) {
        float* const place = &head.output(i, d);
        if (place < end_of_output) *place = 0.0f;  // this program is to go on
      }
    }
  }
  if (plays("running maximum kept from the last call") && !high.empty()) kept_max = std::max(kept_max, high[0]);
}

// One head by the formula, with a matrix of scores. `Score` is what they are kept in.
template <typename Score>
void eager(const HeadViews& head, float scale, bool causal) {
  const Index queries = head.q.size(0), keys = head.k.size(0);
  std::vector<Score> scores(static_cast<std::size_t>(queries * keys));
  const float units = sizeof(Score) == 2 ? 1024.0f : 1.0f;
  for (Index i = 0; i < queries; ++i) {
    const Index seen = causal ? std::clamp<Index>(i + 1 + keys - queries, 0, keys) : keys;
    float high = -INF;
    std::vector<float> row(static_cast<std::size_t>(keys));
    for (Index j = 0; j < seen; ++j) {
      float dot = 0.0f;
      for (Index d = 0; d < head.q.size(1); ++d) dot += head.q(i, d) * head.k(j, d);
      row[static_cast<std::size_t>(j)] = dot * scale;
      if constexpr (sizeof(Score) == 4) {
        scores[static_cast<std::size_t>(i * keys + j)] = dot * scale;
      } else {
        scores[static_cast<std::size_t>(i * keys + j)] =
            static_cast<Score>(std::clamp(dot * scale, -30.0f, 30.0f) * units);
      }
      high = std::max(high, dot * scale);
    }
    float sum = 0.0f;
    for (Index d = 0; d < head.v.size(1); ++d) head.output(i, d) = 0.0f;
    for (Index j = 0; j < seen; ++j) {
      const float weight = std::exp(row[static_cast<std::size_t>(j)] - high);
      sum += weight;
      for (Index d = 0; d < head.v.size(1); ++d) head.output(i, d) += weight * head.v(j, d);
    }
    for (Index d = 0; d < head.v.size(1) && sum > 0.0f; ++d) head.output(i, d) /= sum;
    head.lse(i) = sum > 0.0f ? high + std::log(sum) : -INF;
  }
}

// Correct answers that look unlike the solution.
template <typename Real>
void by_hand(const HeadViews& head, Index i0, float scale, const TiledOptions& options) {
  const Index queries = head.q.size(0), keys = head.k.size(0), width = head.q.size(1), values = head.v.size(1);
  const Index rows = std::min(options.block_rows, queries - i0);
  const Index offset = keys - queries;
  const bool base2 = plays("right: exp2 with the scale folded in");
  const bool lazy = plays("right: rescales lazily, by more than 8");
  const bool fa1 = plays("right: normalised after each tile, with the old sum");
  const bool transposed = plays("right: scores transposed");
  const bool backwards = plays("right: keys backwards");
  const Real unit = base2 ? static_cast<Real>(1.4426950408889634) : Real{1};
  const auto raise = [&](Real x) { return base2 ? std::exp2(x) : std::exp(x); };
  const Real none = -std::numeric_limits<Real>::infinity();
  std::vector<Real> acc(static_cast<std::size_t>(rows * values), Real{0}), high(static_cast<std::size_t>(rows), none),
      sum(static_cast<std::size_t>(rows), Real{0});
  const Index end = options.causal ? std::clamp<Index>(i0 + rows + offset, 0, keys) : keys;
  const Index tiles = (end + options.block_cols - 1) / options.block_cols;
  std::vector<Real> scores(static_cast<std::size_t>(rows * options.block_cols));
  for (Index turn = 0; turn < tiles; ++turn) {
    const Index tile = backwards ? tiles - 1 - turn : turn;
    const Index j0 = tile * options.block_cols;
    const Index cols = std::min(options.block_cols, keys - j0);
    const auto at = [&](Index r, Index c) -> Real& {
      return scores[static_cast<std::size_t>(transposed ? c * rows + r : r * cols + c)];
    };
    for (Index c = 0; c < cols; ++c) {
      for (Index r = 0; r < rows; ++r) {
        Real dot = 0;
        for (Index d = 0; d < width; ++d)
          dot += static_cast<Real>(head.q(i0 + r, d)) * static_cast<Real>(head.k(j0 + c, d));
        at(r, c) = dot * (static_cast<Real>(scale) * unit);
      }
    }
    for (Index r = 0; r < rows; ++r) {
      const auto row = static_cast<std::size_t>(r);
      const Index seen = options.causal ? std::min(cols, i0 + r + offset + 1 - j0) : cols;
      if (seen <= 0) continue;
      Real tile_max = none;
      for (Index c = 0; c < seen; ++c) tile_max = std::max(tile_max, at(r, c));
      Real new_max = std::max(high[row], tile_max);
      if (lazy && high[row] != none && new_max <= high[row] + 8) new_max = high[row];
      const Real rescale = high[row] == none ? Real{0} : raise(high[row] - new_max);
      Real tile_sum = 0;
      for (Index c = 0; c < seen; ++c) {
        at(r, c) = raise(at(r, c) - new_max);
        tile_sum += at(r, c);
      }
      const Real new_sum = sum[row] * rescale + tile_sum;
      for (Index d = 0; d < values; ++d) {
        Real& out = acc[static_cast<std::size_t>(r * values + d)];
        Real fresh = 0;
        for (Index c = 0; c < seen; ++c) fresh += at(r, c) * static_cast<Real>(head.v(j0 + c, d));
        out = fa1 ? (out * sum[row] * rescale + fresh) / new_sum : out * rescale + fresh;
      }
      sum[row] = new_sum;
      high[row] = new_max;
    }
  }
  for (Index r = 0; r < rows; ++r) {
    const auto row = static_cast<std::size_t>(r);
    const Real divisor = fa1 || sum[row] == 0 ? Real{1} : sum[row];
    for (Index d = 0; d < values; ++d) {
      head.output(i0 + r, d) = static_cast<float>(acc[static_cast<std::size_t>(r * values + d)] / divisor);
    }
    head.lse(i0 + r) = static_cast<float>(high[row] / unit + std::log(sum[row]));
  }
}

// Each tile is an attention of its own; they are merged as in 02_merge.
void merged_by_lse(const HeadViews& head, Index i0, float scale, const TiledOptions& options) {
  const Index queries = head.q.size(0), keys = head.k.size(0), values = head.v.size(1);
  const Index rows = std::min(options.block_rows, queries - i0);
  for (Index r = 0; r < rows; ++r) {
    const Index i = i0 + r;
    const Index seen = options.causal ? std::clamp<Index>(i + 1 + keys - queries, 0, keys) : keys;
    std::vector<float> total(static_cast<std::size_t>(values), 0.0f);
    float lse = -INF;
    for (Index j0 = 0; j0 < seen; j0 += options.block_cols) {
      const Index end = std::min(seen, j0 + options.block_cols);
      std::vector<float> s;
      for (Index j = j0; j < end; ++j) {
        float dot = 0.0f;
        for (Index d = 0; d < head.q.size(1); ++d) dot += scale * head.q(i, d) * head.k(j, d);
        s.push_back(dot);
      }
      const float high = *std::max_element(s.begin(), s.end());
      float sum = 0.0f;
      for (float& x : s) sum += x = std::exp(x - high);
      const float own = high + std::log(sum);
      const float larger = std::max(lse, own);
      const float wa = std::exp(lse - larger), wb = std::exp(own - larger);
      for (Index d = 0; d < values; ++d) {
        float part = 0.0f;
        for (Index j = j0; j < end; ++j) part += s[static_cast<std::size_t>(j - j0)] / sum * head.v(j, d);
        float& out = total[static_cast<std::size_t>(d)];
        out = (wa * out + wb * part) / (wa + wb);
      }
      lse = larger + std::log(wa + wb);
    }
    for (Index d = 0; d < values; ++d) head.output(i, d) = total[static_cast<std::size_t>(d)];
    head.lse(i) = lse;
  }
}

Tensor<float, 4> copied(const View<const float, 4>& x) {
  Tensor<float, 4> copy(x.shape());
  for (Index b = 0; b < x.size(0); ++b)
    for (Index h = 0; h < x.size(1); ++h)
      for (Index s = 0; s < x.size(2); ++s)
        for (Index d = 0; d < x.size(3); ++d) copy(b, h, s, d) = x(b, h, s, d);
  return copy;
}

}  // namespace

TiledResult tiled_forward(View<const float, 4> q, View<const float, 4> k, View<const float, 4> v,
                          const TiledOptions& given) {
  TiledOptions options = given;
  if (plays("arguments unchecked")) {
    if (q.size(3) != k.size(3) || q.size(1) != k.size(1) || q.size(0) != k.size(0) || v.size(1) != k.size(1) ||
        v.size(0) != k.size(0) || v.size(2) != k.size(2) || options.block_rows < 1 || options.block_cols < 1) {
      return {Tensor<float, 4>({0, 0, 0, 0}), Tensor<float, 3>({0, 0, 0})};
    }
  } else if (plays("strides unchecked") && (q.stride(3) != 1 || v.stride(3) != 1)) {
    return {Tensor<float, 4>({0, 0, 0, 0}), Tensor<float, 3>({0, 0, 0})};
  } else {
    check_tiled(q, k, v, options);
  }
  if (plays("answers remembered by address")) {
    static const float* last_v = nullptr;
    static std::vector<float> output, lse;
    TiledResult result{Tensor<float, 4>({q.size(0), q.size(1), q.size(2), v.size(3)}),
                       Tensor<float, 3>({q.size(0), q.size(1), q.size(2)})};
    const bool same = last_v == v.data() && static_cast<Index>(output.size()) == result.output.count();
    if (!same) {
      const auto head = [&](Index b, Index h) {
        return HeadViews{q[b][h], k[b][h], v[b][h], result.output.view()[b][h], result.lse.view()[b][h]};
      };
      for (Index b = 0; b < q.size(0); ++b)
        for (Index h = 0; h < q.size(1); ++h)
          for (Index i0 = 0; i0 < q.size(2); i0 += options.block_rows)
            by_hand<float>(head(b, h), i0, scale_of(q, v, options.scale), options);
      output.assign(result.output.data(), result.output.data() + result.output.count());
      lse.assign(result.lse.data(), result.lse.data() + result.lse.count());
      last_v = v.data();
    }
    std::copy(output.begin(), output.end(), result.output.data());
    std::copy(lse.begin(), lse.end(), result.lse.data());
    return result;
  }
  const Index batch = q.size(0), heads = q.size(1), queries = q.size(2);
  const float scale = scale_of(q, v, options.scale);
  TiledResult result{Tensor<float, 4>({batch, heads, queries, v.size(3)}), Tensor<float, 3>({batch, heads, queries})};
  end_of_output = result.output.data() + result.output.count();
  if (plays("noncontiguous-stride")) {
    q = View<const float, 4>(q.data(), q.shape());
    k = View<const float, 4>(k.data(), k.shape());
    v = View<const float, 4>(v.data(), v.shape());
  }
  std::vector<Tensor<float, 4>> copies;
  if (plays("right: keys and values copied to the heap first")) {
    copies.push_back(copied(k));
    copies.push_back(copied(v));
    k = copies[0].view();
    v = copies[1].view();
  }
  std::vector<char> mask;
  if (plays("mask of queries by keys")) mask.assign(static_cast<std::size_t>(queries * k.size(2)), 1);
  if (plays("scales the queries in place") && queries > 0) {
    for (Index s = 0; s < queries; ++s) {
      float& first = const_cast<float&>(q(0, 0, s, 0));
      first = std::nextafter(first, 0.0f);
    }
  }
  if (plays("options ignored")) options.block_rows = options.block_cols = 16;
  if (plays("right: a query at a time")) options.block_rows = 1;
  if (plays("keys split by the number of threads") && options.threads > 1) {
    options.block_cols = std::max<Index>(1, options.block_cols / options.threads);
  }
  const auto head_of = [&](Index b, Index h) {
    const Index kv = plays("heads-first-only in the keys") ? 0 : h;
    const Index vb = plays("batch-first-only in the values") ? 0 : b;
    return HeadViews{q[b][h], k[b][kv], v[vb][h], result.output.view()[b][h], result.lse.view()[b][h]};
  };
  const Index tiles = (queries + options.block_rows - 1) / options.block_rows;
  const auto one_tile = [&](Index task) {
    const bool back = plays("written beyond the last row");
    const Index turn = back ? tiles * batch * heads - 1 - task : task;
    const Index b = turn / tiles / heads, h = turn / tiles % heads, i0 = turn % tiles * options.block_rows;
    if (plays("heads beyond 6 forgotten") && h >= 6) return;
    const HeadViews head = head_of(b, h);
    if (plays("whole matrix of scores") || plays("whole matrix of half precision")) {
      if (i0 != 0) return;
      if (plays("whole matrix of scores")) eager<float>(head, scale, options.causal);
      if (plays("whole matrix of half precision")) eager<short>(head, scale, options.causal);
    } else if (plays("right: double accumulation")) {
      by_hand<double>(head, i0, scale, options);
    } else if (plays("right: tiles merged by their lse")) {
      merged_by_lse(head, i0, scale, options);
    } else if (corpus::name().starts_with("right:")) {
      by_hand<float>(head, i0, scale, options);
    } else {
      row_tile(head, i0, scale, options);
    }
  };
  if (plays("right: its own threads")) {
    const int count = options.threads == 0 ? 2 : options.threads;
    std::vector<std::thread> threads;
    for (int t = 1; t < count; ++t) {
      threads.emplace_back([&, t] {
        for (Index task = t; task < tiles * batch * heads; task += count) one_tile(task);
      });
    }
    for (Index task = 0; task < tiles * batch * heads; task += count) one_tile(task);
    for (std::thread& thread : threads) thread.join();
  } else {
    parallel_for(tiles * batch * heads, options.threads, one_tile);
  }
  return result;
}

}  // namespace flashkata
