// Answers to 04_causal, wrong and right. What is wrong about heads and padding stands in several_heads.hpp, what is
// wrong about the triangle here.
#include "causal.hpp"

#include "several_heads.hpp"

namespace flashkata {
namespace {

using corpus::padding_allows;
using corpus::plays;
using corpus::Problem;
using corpus::RIGHT;
using corpus::UNNAMED;

const corpus::Answers answers{
    {"causal-strict", "causal-strict"},
    {"causal-plus-one", "causal-plus-one"},
    {"causal-upper", "causal-upper"},
    {"causal-upper, aligned to the top left", "causal-upper"},
    {"causal-alignment", "causal-alignment"},
    {"causal-alignment, only with fewer queries than keys", UNNAMED},
    {"causal-alignment, only for one query", UNNAMED},
    {"causal-offset-clamped", "causal-offset-clamped"},
    {"causal-alignment-reversed", "causal-alignment-reversed"},
    {"causal-ignored", "causal-ignored"},
    {"causal-and-mask-dropped", "causal-and-mask-dropped"},
    {"causal-or-mask", "causal-or-mask"},
    {"causal-only-with-mask", "causal-only-with-mask"},
    {"causal-skips-triangle-with-mask", "causal-skips-triangle-with-mask"},
    {"causal-padding-shift", "causal-padding-shift"},
    {"causal-padding-shift, from the first real key", "causal-padding-shift"},
    {"causal-padding-shift, by the padding in the way", UNNAMED},
    {"causal-only-square", "causal-only-square"},
    {"left-pad-causal-empty", "left-pad-causal-empty"},
    {"empty queries look at themselves", UNNAMED},
    {"empty queries look at the first real key", UNNAMED},
    {"triangle in the first head only", UNNAMED},
    {"triangle in the first batch item only", UNNAMED},
    {"triangle left out of the row before last", UNNAMED},
    {"triangle in blocks of four", UNNAMED},
    {"no further back than 32 keys", UNNAMED},
    {"no further ahead than the last real key", UNNAMED},
    {"the first key always allowed", UNNAMED},
    {"diagonal off by one where Sq > Sk", UNNAMED},
    {"diagonal off by one for long sequences", UNNAMED},
    {"mask-finite-sentinel", "mask-finite-sentinel"},
    {"scale-embed-dim", "scale-embed-dim"},
    {"scale-missing", "scale-missing"},
    {"softmax-query-axis", "softmax-query-axis"},
    {"heads-view-no-transpose", "heads-view-no-transpose"},
    {"heads-interleaved", "heads-interleaved"},
    {"merge-no-permute", "merge-no-permute"},
    {"heads-first-only", "heads-first-only"},
    {"heads-not-split", "heads-not-split"},
    {"heads-reversed", "heads-reversed"},
    {"heads past the second copied", UNNAMED},
    {"batch-first-only", "batch-first-only"},
    {"batch-mixed", "batch-mixed"},
    {"batch items past the second copied", UNNAMED},
    {"axes-batch-token", "axes-batch-token"},
    {"padding-first-item", "padding-first-item"},
    {"padding-per-head", "padding-per-head"},
    {"padding-as-length", "padding-as-length"},
    {"mask-polarity", "mask-polarity"},
    {"mask-query-axis", "mask-query-axis"},
    {"padding-silences-queries", "padding-silences-queries"},
    {"padding-ignored in the last head", UNNAMED},
    {"mask-post-softmax", "mask-post-softmax"},
    {"mask-multiply-zero", "mask-multiply-zero"},
    {"bool-mask-added", "bool-mask-added"},
    {"mask kept from the first call of its shape", UNNAMED},
    {"masked-nan-leak in the keys", UNNAMED},
    {"masked-nan-leak in the values", UNNAMED},
    {"all-masked-nan", "all-masked-nan"},
    {"all-masked-uniform", "all-masked-uniform"},
    {"noncontiguous-stride", "noncontiguous-stride"},
    {"batch items as far apart as tokens say", UNNAMED},
    {"dv-stride-d", "dv-stride-d"},
    {"last query unwritten", UNNAMED},
    {"last key dropped", UNNAMED},
    {"weights in half precision", UNNAMED},
    {"answer kept from a call with the same q", UNNAMED},
    {"padding zeroed in memory of the caller", UNNAMED},
    {"q scaled in memory of the caller", UNNAMED},
    {"arguments unchecked", UNNAMED},
    {"mask unchecked", UNNAMED},
    {"padding-ignored if the last batch item has none", UNNAMED},
    {"padding-ignored past 64 keys", UNNAMED},
    {"padding-ignored past 5 heads", UNNAMED},
    {"padding-ignored with one key", UNNAMED},
    {"channels past 64 dropped in several heads", UNNAMED},
    {"queries past 160 unwritten in several heads", UNNAMED},
    {"values past 16 unwritten in several heads", UNNAMED},
    {"right: written out, one head at a time", RIGHT},
    {"right: step 02, heads before batch items", RIGHT},
    {"right: std only, loops exchanged", RIGHT},
    {"right: double accumulation", RIGHT},
    {"right: exp2 with the scale folded in", RIGHT},
    {"right: one pass, backwards, rescaled", RIGHT},
    {"right: each query with the keys that it sees", RIGHT},
    {"right: keys down and queries across", RIGHT},
    {"right: all heads in one product", RIGHT},
    {"right: an additive mask", RIGHT},
};

bool triangle_allows(const Problem& p, Index b, Index h, Index i, Index j) {
  Index offset = p.keys - p.queries;
  const Index real = p.mask ? p.mask->row(b).count() : p.keys;
  const auto first_real = [&] {
    Index first = 0;
    while (p.mask && first < p.keys && !(*p.mask)(b, first)) ++first;
    return first;
  };
  if (plays("causal-ignored")) return true;
  if (plays("causal-only-with-mask") && !p.mask) return true;
  if (plays("causal-skips-triangle-with-mask") && p.mask) return true;
  if (plays("causal-only-square") && offset != 0) return true;
  if (plays("triangle in the first head only") && h > 0) return true;
  if (plays("triangle in the first batch item only") && b > 0) return true;
  if (plays("triangle left out of the row before last") && i == p.queries - 2) return true;
  if (plays("triangle in blocks of four")) return j / 4 * 4 <= i + offset;
  if (plays("no further back than 32 keys") && j + 32 < i + offset) return false;
  if (plays("no further ahead than the last real key") && p.queries > p.keys && i + offset < 0) return j == 0;
  if (plays("the first key always allowed") && j == 0) return true;
  if (plays("causal-strict")) return j < i + offset;
  if (plays("causal-plus-one")) return j <= i + offset + 1;
  if (plays("diagonal off by one where Sq > Sk") && offset < 0) return j <= i + offset + 1;
  if (plays("diagonal off by one for long sequences") && p.keys > 100) return j < i + offset || j == 0;
  if (plays("causal-upper")) return j >= i + offset;
  if (plays("causal-upper, aligned to the top left")) return j >= i;
  if (plays("causal-alignment")) return j <= i;
  if (plays("causal-alignment, only with fewer queries than keys") && offset > 0) return j <= i;
  if (plays("causal-alignment, only for one query") && p.queries == 1) return j <= i;
  if (plays("causal-offset-clamped")) return j <= i + std::max<Index>(offset, 0);
  if (plays("causal-alignment-reversed")) return j <= i - offset;
  if (plays("causal-padding-shift")) return j <= i + real - p.queries;
  if (plays("causal-padding-shift, from the first real key")) return j <= i + offset + first_real();
  if (plays("causal-padding-shift, by the padding in the way")) return j <= i + offset + (p.keys - real);
  return j <= i + offset;
}

bool visible(const Problem& p, Index b, Index h, Index i, Index j) {
  const bool triangle = triangle_allows(p, b, h, i, j);
  if (plays("causal-and-mask-dropped")) return triangle;
  const bool padding = padding_allows(p, b, h, i, j);
  if (plays("causal-or-mask")) return p.mask ? triangle || padding : triangle;
  const Index position = i + p.keys - p.queries;
  if (plays("empty queries look at themselves") && j == position && p.mask && !p.mask->row(b).head(j + 1).any()) {
    return true;
  }
  if (plays("empty queries look at the first real key") && p.mask && position >= 0 &&
      !p.mask->row(b).head(position + 1).any()) {
    return (*p.mask)(b, j) && !p.mask->row(b).head(j).any();
  }
  return triangle && padding;
}

}  // namespace

Tensor<float, 3> eager_causal(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v, Index num_heads,
                              const PaddingMask& mask) {
  return corpus::several_heads(q, k, v, num_heads, mask, visible);
}

}  // namespace flashkata
