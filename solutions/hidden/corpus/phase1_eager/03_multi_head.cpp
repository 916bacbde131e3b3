// Answers to 03_multi_head, wrong and right. The deviations stand in several_heads.hpp.
#include "multi_head.hpp"

#include "several_heads.hpp"

namespace flashkata {
namespace {

using corpus::RIGHT;
using corpus::UNNAMED;

const corpus::Answers answers{
    {"scale-embed-dim", "scale-embed-dim"},
    {"scale-missing", "scale-missing"},
    {"scale-1-over-d", "scale-1-over-d"},
    {"scale-from-dv", "scale-from-dv"},
    {"scale-from-length", "scale-from-length"},
    {"softmax-query-axis", "softmax-query-axis"},
    {"softmax-no-max", "softmax-no-max"},
    {"value-is-key", "value-is-key"},
    {"heads-view-no-transpose", "heads-view-no-transpose"},
    {"heads-view-no-transpose, merged rightly", "heads-view-no-transpose"},
    {"heads-interleaved", "heads-interleaved"},
    {"heads-interleaved, merged rightly", "heads-interleaved"},
    {"merge interleaved", "heads-interleaved"},
    {"merge-no-permute", "merge-no-permute"},
    {"merge-no-permute, heads before batch", "merge-no-permute"},
    {"heads-first-only", "heads-first-only"},
    {"heads-not-split", "heads-not-split"},
    {"heads-reversed", "heads-reversed"},
    {"heads past the second copied", UNNAMED},
    {"keys of the next head", UNNAMED},
    {"batch-first-only", "batch-first-only"},
    {"batch-mixed", "batch-mixed"},
    {"batch items past the second copied", UNNAMED},
    {"batch items past the third unwritten", UNNAMED},
    {"values of the next batch item", "batch-mixed"},
    {"axes-batch-token", "axes-batch-token"},
    {"padding-first-item", "padding-first-item"},
    {"padding-ignored", "padding-ignored"},
    {"padding-per-head", "padding-per-head"},
    {"padding-per-head, repeated instead of interleaved", "padding-per-head"},
    {"padding-as-length", "padding-as-length"},
    {"padding-silences-queries", "padding-silences-queries"},
    {"padding-silences-queries, from the end", "padding-silences-queries"},
    {"padding up to the first hole", UNNAMED},
    {"padding-ignored by a single query", UNNAMED},
    {"padding-ignored unless Sq = Sk", UNNAMED},
    {"padding-ignored in the last head", UNNAMED},
    {"nothing but padding taken for no padding", UNNAMED},
    {"first key always allowed", UNNAMED},
    {"mask-polarity", "mask-polarity"},
    {"mask-query-axis", "mask-query-axis"},
    {"mask-post-softmax", "mask-post-softmax"},
    {"mask-multiply-zero", "mask-multiply-zero"},
    {"mask-finite-sentinel", "mask-finite-sentinel"},
    {"bool-mask-added", "bool-mask-added"},
    {"mask [B, Sk] read as [Sk, B]", UNNAMED},
    {"mask kept from the first call of its shape", UNNAMED},
    {"masked-nan-leak in the keys", UNNAMED},
    {"masked-nan-leak in the values", UNNAMED},
    {"all-masked-nan", "all-masked-nan"},
    {"all-masked-uniform", "all-masked-uniform"},
    {"noncontiguous-stride", "noncontiguous-stride"},
    {"noncontiguous-stride of batch items", "noncontiguous-stride"},
    {"batch items as far apart as tokens say", UNNAMED},
    {"strides of q for all", UNNAMED},
    {"dv-stride-d", "dv-stride-d"},
    {"dv-stride-d in the output", "dv-stride-d"},
    {"dv-stride-d, the rest unwritten", "dv-stride-d"},
    {"last query unwritten", UNNAMED},
    {"last key dropped", UNNAMED},
    {"keys past the 64th dropped", UNNAMED},
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

}  // namespace

Tensor<float, 3> eager_bidirectional(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v,
                                     Index num_heads, const PaddingMask& mask) {
  return corpus::several_heads(q, k, v, num_heads, mask, corpus::padding_allows);
}

}  // namespace flashkata
