// Answers to 05_sdpa, wrong and right. Every deviation stands where somebody made it.
#include "sdpa.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "../corpus.hpp"

namespace flashkata {
namespace {

using corpus::plays;
using corpus::RIGHT;
using corpus::UNNAMED;

const corpus::Answers answers{
    {"layout-bshd-bhsd", "layout-bshd-bhsd"},
    {"heads-view-no-transpose", "heads-view-no-transpose"},
    {"heads-view-no-transpose, values only", UNNAMED},
    {"heads-interleaved", "heads-interleaved"},
    {"heads-first-only", "heads-first-only"},
    {"heads-reversed", "heads-reversed"},
    {"heads-not-split", "heads-not-split"},
    {"batch-first-only", "batch-first-only"},
    {"batch-mixed", "batch-mixed"},
    {"axes-batch-token where equal", UNNAMED},
    {"dv-stride-d", "dv-stride-d"},
    {"noncontiguous-stride", "noncontiguous-stride"},
    {"batch items taken for neighbours", UNNAMED},
    {"sdpa-layout-returned", "sdpa-layout-returned"},
    {"merged as if the heads had width D", UNNAMED},
    {"merged for the first batch item only", UNNAMED},
    {"merged for two heads only", UNNAMED},
    {"last token not merged", UNNAMED},
    {"last token of a rectangle copied", UNNAMED},
    {"value-is-key", "value-is-key"},
    {"qk-swapped where square", "qk-swapped"},
    {"mask-polarity", "mask-polarity"},
    {"mask-polarity, not in the triangle", "mask-polarity"},
    {"sdpa-mask-by-query where square", "sdpa-mask-by-query"},
    {"padding-ignored", "padding-ignored"},
    {"padding-first-item", "padding-first-item"},
    {"padding-per-head", "padding-per-head"},
    {"padding of the last key ignored", UNNAMED},
    {"padding ignored where an item would be empty", UNNAMED},
    {"mask kept between calls", UNNAMED},
    {"scale-missing", "scale-missing"},
    {"sdpa-scale-again, queries scaled", "sdpa-scale-again"},
    {"sdpa-scale-again, passed squared", "sdpa-scale-again"},
    {"scale-embed-dim", "scale-embed-dim"},
    {"scale-from-dv", "scale-from-dv"},
    {"scale-inverted", "scale-inverted"},
    {"causal-alignment", "causal-alignment"},
    {"causal-alignment-reversed", "causal-alignment-reversed"},
    {"sdpa-causal-flag", "sdpa-causal-flag"},
    {"sdpa-flag-and-mask", "sdpa-flag-and-mask"},
    {"causal-strict", "causal-strict"},
    {"causal-plus-one", "causal-plus-one"},
    {"causal-upper", "causal-upper"},
    {"causal-ignored", "causal-ignored"},
    {"causal-and-mask-dropped", "causal-and-mask-dropped"},
    {"causal-or-mask", "causal-or-mask"},
    {"causal-only-with-mask", "causal-only-with-mask"},
    {"causal-skips-triangle-with-mask", "causal-skips-triangle-with-mask"},
    {"causal-padding-shift", "causal-padding-shift"},
    {"causal-only-square", "causal-only-square"},
    {"padding-first-item, in the triangle too", "padding-first-item"},
    {"queries copied", UNNAMED},
    {"keys copied", UNNAMED},
    {"values copied where they lie apart", UNNAMED},
    {"a call for each batch item", UNNAMED},
    {"a call for each head", UNNAMED},
    {"called twice", UNNAMED},
    {"flag tried first, then a mask", UNNAMED},
    {"library not called", UNNAMED},
    {"output in half precision", UNNAMED},
    {"output divided again", UNNAMED},
    {"queries scaled in place and restored", UNNAMED},
    {"padded values set to 0 in place", UNNAMED},
    {"arguments unchecked", UNNAMED},
    {"mask unchecked", UNNAMED},
    {"empty rows as the mean", UNNAMED},
    {"right: mask written out", RIGHT},
    {"right: a mask of true when none is given", RIGHT},
    {"right: heads as the batch axis", RIGHT},
    {"right: heads backwards and back", RIGHT},
    {"right: scale passed", RIGHT},
    {"right: enable_gqa", RIGHT},
    {"right: is_causal where it means the same", RIGHT},
    {"right: one strip for the triangle", RIGHT},
    {"right: rows copied with memcpy", RIGHT},
    {"right: merged through a strided view", RIGHT},
    {"right: returns early on nothing", RIGHT},
};

bool plays_any(std::initializer_list<std::string_view> names) {
  return std::find(names.begin(), names.end(), corpus::name()) != names.end();
}

using Input = View<const float, 3>;
using Heads = View<const float, 4>;
using BoolMask = View<const bool, 4>;

enum Which { QUERY, KEY, VALUE };

Heads as_heads(const Input& x, Index num_heads, Which which, Index query_width) {
  const Index batch = x.size(0);
  const Index tokens = x.size(1);
  const Index width = x.size(2) / num_heads;
  const Shape<4> shape = {batch, num_heads, tokens, width};
  Shape<4> strides = {x.stride(0), width, x.stride(1), 1};
  if (plays("layout-bshd-bhsd")) {
    return {x.data(), {batch, tokens, num_heads, width}, {x.stride(0), x.stride(1), width, 1}};
  }
  if (plays("heads-view-no-transpose") || (plays("heads-view-no-transpose, values only") && which == VALUE)) {
    return {x.data(), shape};
  }
  if (plays("heads-interleaved")) strides = {x.stride(0), 1, x.stride(1), num_heads};
  if (plays("heads-first-only")) strides[1] = 0;
  if (plays("batch-first-only")) strides[0] = 0;
  if (plays("batch-mixed") && which != QUERY && batch > 1) {
    return {x.data() + (batch - 1) * x.stride(0), shape, {-x.stride(0), width, x.stride(1), 1}};
  }
  if (plays("axes-batch-token where equal") && batch == tokens) std::swap(strides[0], strides[2]);
  if (plays("dv-stride-d") && which == VALUE) strides[1] = query_width;
  if (plays("noncontiguous-stride")) strides = {tokens * x.size(2), width, x.size(2), 1};
  if (plays("batch items taken for neighbours")) strides[0] = tokens * x.stride(1);
  if (plays("heads-reversed") && which == VALUE) {
    return {x.data() + (num_heads - 1) * width, shape, {x.stride(0), -width, x.stride(1), 1}};
  }
  if (plays("right: heads backwards and back")) {
    return {x.data() + (num_heads - 1) * width, shape, {x.stride(0), -width, x.stride(1), 1}};
  }
  if (plays("right: heads as the batch axis")) {
    return {x.data(), {num_heads, batch, tokens, width}, {width, x.stride(0), x.stride(1), 1}};
  }
  return {x.data(), shape, strides};
}

Tensor<float, 3> merged(const Tensor<float, 4>& heads, Index batch, Index num_heads, Index tokens, Index width,
                        Index query_width) {
  Tensor<float, 3> model({batch, tokens, num_heads * width});
  if (plays("sdpa-layout-returned")) {
    std::copy_n(heads.data(), heads.count(), model.data());
    return model;
  }
  if (plays("right: rows copied with memcpy")) {
    float* to = model.data();
    for (Index b = 0; b < batch; ++b)
      for (Index s = 0; s < tokens; ++s)
        for (Index h = 0; h < num_heads; ++h, to += width) {
          if (width > 0) std::memcpy(to, &heads(b, h, s, 0), static_cast<std::size_t>(width) * sizeof(float));
        }
    return model;
  }
  if (plays("right: merged through a strided view")) {
    const View<float, 4> target(model.data(), {batch, num_heads, tokens, width},
                                {tokens * num_heads * width, width, num_heads * width, 1});
    const float* from = heads.data();
    for (Index b = 0; b < batch; ++b)
      for (Index h = 0; h < num_heads; ++h)
        for (Index s = 0; s < tokens; ++s)
          for (Index d = 0; d < width; ++d) target(b, h, s, d) = *from++;
    return model;
  }
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < num_heads; ++h)
      for (Index s = 0; s < tokens; ++s)
        for (Index d = 0; d < width; ++d) {
          Index column = h * width + d;
          if (plays("merged as if the heads had width D")) column = (h * query_width + d) % (num_heads * width);
          Index from_head = h;
          if (plays("merged for two heads only")) from_head = std::min<Index>(h, 1);
          if (plays("right: heads backwards and back")) from_head = num_heads - 1 - h;
          Index from_item = b;
          if (plays("merged for the first batch item only")) from_item = 0;
          Index from_token = s;
          if (plays("last token not merged") && s + 1 == tokens && tokens > 1) continue;
          if (plays("layout-bshd-bhsd")) {
            model(b, s, column) = heads(b, s, h, d);
          } else if (plays("right: heads as the batch axis")) {
            model(b, s, column) = heads(h, b, s, d);
          } else {
            model(b, s, column) = heads(from_item, from_head, from_token, d);
          }
        }
  return model;
}

Tensor<float, 4> by_hand(const Heads& q, const Heads& k, const Heads& v, const std::optional<BoolMask>& mask) {
  Tensor<float, 4> output({q.size(0), q.size(1), q.size(2), v.size(3)});
  for (Index b = 0; b < q.size(0); ++b)
    for (Index h = 0; h < q.size(1); ++h)
      for (Index i = 0; i < q.size(2); ++i) {
        std::vector<double> scores;
        std::vector<Index> keys;
        double largest = -std::numeric_limits<double>::infinity();
        for (Index j = 0; j < k.size(2); ++j) {
          if (mask && !(*mask)(b, h, i, j)) continue;
          double score = 0;
          for (Index d = 0; d < q.size(3); ++d)
            score += static_cast<double>(q(b, h, i, d)) * static_cast<double>(k(b, h, j, d));
          scores.push_back(score / std::sqrt(static_cast<double>(q.size(3))));
          keys.push_back(j);
          largest = std::max(largest, scores.back());
        }
        double sum = 0;
        for (double& score : scores) sum += score = std::exp(score - largest);
        for (Index d = 0; d < v.size(3); ++d) {
          double total = 0;
          for (std::size_t n = 0; n < keys.size(); ++n)
            total += scores[n] / sum * static_cast<double>(v(b, h, keys[n], d));
          output(b, h, i, d) = static_cast<float>(total);
        }
      }
  return output;
}

std::optional<float> scale_of(Index width, Index num_heads, Index value_width) {
  const auto root = [](Index n) { return std::sqrt(static_cast<float>(n)); };
  if (plays("scale-missing")) return 1.0f;
  if (plays("sdpa-scale-again, passed squared")) return 1.0f / static_cast<float>(width);
  if (plays("scale-embed-dim")) return 1.0f / root(width * num_heads);
  if (plays("scale-from-dv")) return 1.0f / root(value_width);
  if (plays("scale-inverted")) return root(width);
  if (plays("right: scale passed")) return 1.0f / root(width);
  return {};
}

bool sees(const PaddingMask& mask, bool causal, Index b, Index i, Index j, Index queries, Index keys) {
  bool padding = !mask || (*mask)(b, j);
  if (mask && plays("mask-polarity")) padding = !padding;
  if (mask && plays("mask-polarity, not in the triangle") && !causal) padding = !padding;
  if (mask && plays("padding of the last key ignored") && j + 1 == keys) padding = true;
  if (mask && (plays("padding ignored where an item would be empty") || plays("empty rows as the mean")) &&
      !mask->row(b).any()) {
    padding = true;
  }
  if (!causal) return padding;
  Index offset = keys - queries;
  if (plays("causal-alignment")) offset = 0;
  if (plays("sdpa-causal-flag") && !mask) offset = 0;
  if (plays("causal-alignment-reversed")) offset = -offset;
  if (plays("causal-strict")) offset -= 1;
  if (plays("causal-plus-one")) offset += 1;
  if (mask && plays("causal-padding-shift")) {
    Index last = keys;
    while (last > 0 && !(*mask)(b, last - 1)) --last;
    offset = last - queries;
  }
  bool triangle = j <= i + offset;
  if (plays("causal-upper")) triangle = j >= i + offset;
  if (plays("causal-ignored")) triangle = true;
  if (plays("causal-only-with-mask") && !mask) triangle = true;
  if (plays("causal-skips-triangle-with-mask") && mask) triangle = true;
  if (plays("causal-only-square") && queries != keys) triangle = true;
  if (plays("causal-and-mask-dropped")) return triangle;
  if (plays("causal-or-mask") && mask) return triangle || padding;
  return triangle && padding;
}

Tensor<float, 3> sdpa(const Input& q, const Input& k_given, const Input& v_given, Index num_heads,
                      const PaddingMask& given, bool causal) {
  if (plays("arguments unchecked")) {
    if (num_heads < 1) return Tensor<float, 3>({0, 0, 0});
  } else if (plays("mask unchecked")) {
    check_model_layout(q, k_given, v_given, num_heads, {});
  } else {
    check_model_layout(q, k_given, v_given, num_heads, given);
  }
  const Index batch = q.size(0);
  const Index queries = q.size(1);
  const Index keys = k_given.size(1);
  const Index query_width = q.size(2) / num_heads;
  const Index value_width = v_given.size(2) / num_heads;
  if (plays_any({"right: returns early on nothing", "right: heads as the batch axis"}) && q.count() == 0) {
    return Tensor<float, 3>({batch, queries, num_heads * value_width});
  }
  if (plays("mask unchecked") && given && (given->rows() != batch || given->cols() != keys)) {
    return Tensor<float, 3>({batch, queries, num_heads * value_width});
  }

  PaddingMask mask = given;
  static PaddingMask kept;
  if (plays("mask kept between calls") && mask) {
    if (!kept || kept->rows() != mask->rows() || kept->cols() != mask->cols()) kept = mask;
    mask = kept;
  }
  const Input k = plays("qk-swapped where square") && queries == keys ? q : k_given;
  const Input real_q = plays("qk-swapped where square") && queries == keys ? k_given : q;
  const Input v = plays("value-is-key") && query_width == value_width ? k_given : v_given;

  // Copies and changes of the inputs.
  const auto copied = [](const Input& x, float factor) {
    Tensor<float, 3> copy(x.shape());
    for (Index b = 0; b < x.size(0); ++b)
      for (Index s = 0; s < x.size(1); ++s)
        for (Index e = 0; e < x.size(2); ++e) copy(b, s, e) = factor * x(b, s, e);
    return copy;
  };
  Input query = real_q, key = k, value = v;
  Tensor<float, 3> copy({0, 0, 0});
  if (plays("queries copied")) query = Input(copy = copied(query, 1.0f));
  if (plays("sdpa-scale-again, queries scaled")) {
    query = Input(copy = copied(query, 1.0f / std::sqrt(static_cast<float>(query_width))));
  }
  if (plays("keys copied")) key = Input(copy = copied(key, 1.0f));
  if (plays("values copied where they lie apart") && value.stride(1) != value.size(2)) {
    value = Input(copy = copied(value, 1.0f));
  }
  std::optional<float> scale = scale_of(query_width, num_heads, value_width);
  const auto multiply = [](const Input& x, float factor) {
    for (Index b = 0; b < x.size(0); ++b)
      for (Index s = 0; s < x.size(1); ++s)
        for (Index e = 0; e < x.size(2); ++e) const_cast<float&>(x(b, s, e)) *= factor;
  };
  if (plays("queries scaled in place and restored")) {
    multiply(query, 0.5f);
    scale = 2.0f / std::sqrt(static_cast<float>(query_width));
  }
  if (plays("padded values set to 0 in place") && mask) {
    for (Index b = 0; b < batch; ++b)
      for (Index j = 0; j < keys; ++j)
        for (Index e = 0; e < value.size(2); ++e)
          if (!(*mask)(b, j)) const_cast<float&>(value(b, j, e)) = 0.0f;
  }
  if (plays("heads-not-split")) {
    const Tensor<float, 4> whole = scaled_dot_product_attention(as_heads(query, 1, QUERY, 0), as_heads(key, 1, KEY, 0),
                                                                as_heads(value, 1, VALUE, 0));
    return merged(whole, batch, 1, queries, value.size(2), query.size(2));
  }

  const Heads query_heads = as_heads(query, num_heads, QUERY, query_width);
  const Heads key_heads = as_heads(key, num_heads, KEY, query_width);
  const Heads value_heads = as_heads(value, num_heads, VALUE, query_width);
  const Shape<4> pairs = {query_heads.size(0), query_heads.size(1), query_heads.size(2), key_heads.size(2)};

  // The mask.
  std::optional<BoolMask> allowed;
  bool flag = false;
  Tensor<bool, 4> written({batch, num_heads, queries, keys});
  const auto write = [&] {
    for (Index b = 0; b < batch; ++b)
      for (Index h = 0; h < num_heads; ++h)
        for (Index i = 0; i < queries; ++i)
          for (Index j = 0; j < keys; ++j) {
            const bool first = plays("padding-first-item") && !causal;
            const bool all_first = plays("padding-first-item, in the triangle too");
            const bool per_head = plays("padding-per-head");
            const Index from = first || all_first ? 0 : per_head ? h % batch : b;
            written(b, h, i, j) = sees(mask, causal, from, i, j, queries, keys);
            if (plays("sdpa-mask-by-query where square") && queries == keys) {
              written(b, h, i, j) = sees(mask, causal, b, j, i, queries, keys);
            }
          }
    if (plays("right: heads as the batch axis")) {
      allowed = BoolMask(written.data(), pairs, {queries * keys, num_heads * queries * keys, keys, 1});
    } else {
      allowed = written.view();
    }
  };
  const Index strip_length = queries + keys;
  const std::unique_ptr<bool[]> strip(new bool[static_cast<std::size_t>(strip_length)]);
  if (plays("padding-ignored")) mask.reset();
  if (causal) {
    const bool means_the_same = queries == keys && plays("right: is_causal where it means the same");
    if (!mask && (plays("sdpa-causal-flag") || means_the_same)) {
      flag = true;
    } else if (plays("sdpa-flag-and-mask")) {
      flag = queries == keys || mask;
      if (mask) allowed = BoolMask(mask->data(), pairs, {keys, 0, 0, 1});
      if (!flag) write();
    } else if (plays("right: one strip for the triangle") && !mask && queries > 0) {
      allowed = BoolMask(strip.get() + queries - 1, pairs, {0, 0, -1, 1});
      for (Index n = 0; n < strip_length; ++n) {
        strip[static_cast<std::size_t>(n)] = n - (queries - 1) <= keys - queries;
      }
    } else {
      write();
    }
  } else if (mask || plays("right: a mask of true when none is given")) {
    const bool simple = mask && (plays("layout-bshd-bhsd") || corpus::name().empty());
    if (simple) {
      allowed = BoolMask(mask->data(), {batch, num_heads, queries, keys}, {keys, 0, 0, 1});
    } else {
      write();
    }
  }

  // The calls.
  const bool gqa = plays("right: enable_gqa");
  std::optional<Tensor<float, 4>> result;
  const auto part = [](const auto& view, Index b, Index count_b, Index h, Index count_h) {
    using V = std::remove_cvref_t<decltype(view)>;
    return V(view.data() + b * view.stride(0) + h * view.stride(1), {count_b, count_h, view.size(2), view.size(3)},
             view.strides());
  };
  if (plays_any({"a call for each batch item", "a call for each head"})) {
    const bool each_head = plays("a call for each head");
    result.emplace(Shape<4>{batch, num_heads, queries, value_width});
    for (Index b = 0; b < batch; ++b)
      for (Index h = 0; h < num_heads; h += each_head ? 1 : num_heads) {
        const Index count = each_head ? 1 : num_heads;
        std::optional<BoolMask> part_mask;
        if (allowed) part_mask = part(*allowed, b, 1, h, count);
        const Tensor<float, 4> one =
            scaled_dot_product_attention(part(query_heads, b, 1, h, count), part(key_heads, b, 1, h, count),
                                         part(value_heads, b, 1, h, count), part_mask);
        if (one.count() > 0) std::copy_n(one.data(), one.count(), &(*result)(b, h, 0, 0));
      }
  } else if (plays("library not called")) {
    result = by_hand(query_heads, key_heads, value_heads, allowed);
  } else if (plays("flag tried first, then a mask") && causal && mask) {
    try {
      result = scaled_dot_product_attention(query_heads, key_heads, value_heads, allowed, true);
    } catch (const std::invalid_argument&) {
      result = scaled_dot_product_attention(query_heads, key_heads, value_heads, allowed);
    }
  } else {
    if (plays("called twice")) scaled_dot_product_attention(query_heads, key_heads, value_heads, allowed);
    result = scaled_dot_product_attention(query_heads, key_heads, value_heads, allowed, flag, scale, gqa);
  }
  if (plays("queries scaled in place and restored")) multiply(query, 2.0f);

  Tensor<float, 3> output = merged(*result, batch, num_heads, queries, value_width, query_width);
  for (Index n = 0; n < output.count(); ++n) {
    float& x = output.data()[n];
    if (plays("output in half precision")) x = std::round(x * 1024.0f) / 1024.0f;
    if (plays("output divided again")) x = static_cast<float>(static_cast<double>(x) / 1.0000002);
  }
  if (plays("last token of a rectangle copied") && queries != keys && queries > 1) {
    for (Index b = 0; b < batch; ++b)
      for (Index e = 0; e < output.size(2); ++e) output(b, queries - 1, e) = output(b, queries - 2, e);
  }
  return output;
}

}  // namespace

Tensor<float, 3> sdpa_bidirectional(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v,
                                    Index num_heads, const PaddingMask& mask) {
  return sdpa(q, k, v, num_heads, mask, false);
}

Tensor<float, 3> sdpa_causal(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v, Index num_heads,
                             const PaddingMask& mask) {
  return sdpa(q, k, v, num_heads, mask, true);
}

}  // namespace flashkata
