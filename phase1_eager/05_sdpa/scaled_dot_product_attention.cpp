// The library: provided, not yours to fill. It computes in float64 and writes down every call for the suite.
#include "scaled_dot_product_attention.hpp"

#include <cmath>
#include <cstring>
#include <functional>

#include "common/attention/reference.hpp"
#include "sdpa_calls.hpp"

namespace flashkata {
namespace {

using testing::LentMemory;
using testing::sdpa_record;

// A view that begins in the caller's memory must end there.
template <typename T>
void check_memory(std::string_view argument, const View<T, 4>& view) {
  for (const LentMemory& memory : sdpa_record().lent) {
    if (view.count() == 0 || !memory.holds(static_cast<const void*>(view.data())) || memory.holds(view)) continue;
    require(false, argument, "shape " + to_text(view.shape()) + " with strides " + to_text(view.strides()),
            "a view that ends in the memory of " + std::string(memory.name()) + ", where it begins");
  }
}

void check(View<const float, 4> query, View<const float, 4> key, View<const float, 4> value,
           const std::optional<View<const bool, 4>>& attn_mask, bool is_causal, std::optional<float> scale,
           bool enable_gqa) {
  const Index batch = query.size(0);
  const Index heads = query.size(1);
  const Index key_heads = key.size(1);
  const Index keys = key.size(2);
  const Index width = query.size(3);
  const auto check_shape = [](std::string_view argument, const auto& view, std::string_view axes, Shape<4> want) {
    require(view.shape() == want, argument, to_text(view.shape()), std::string(axes) + " = " + to_text(want));
  };

  require(heads > 0, "query", to_text(query.shape()), "[B, H, Sq, D] with H at least 1");
  require(width > 0 || scale, "query", to_text(query.shape()), "[B, H, Sq, D] with D at least 1, or a given scale");
  require(key_heads > 0, "key", to_text(key.shape()), "[B, Hk, Sk, D] with Hk at least 1");
  check_shape("key", key, "[B, Hk, Sk, D]", {batch, key_heads, keys, width});
  check_shape("value", value, "[B, Hk, Sk, Dv]", {batch, key_heads, keys, value.size(3)});
  if (enable_gqa) {
    require(heads % key_heads == 0, "key", to_text(key.shape()),
            "a number of heads that divides query's, " + std::to_string(heads));
  } else {
    require(heads == key_heads, "key", to_text(key.shape()),
            "as many heads (axis 1) as query " + to_text(query.shape()) + " has, unless enable_gqa is true");
  }
  if (attn_mask) {
    check_shape("attn_mask", *attn_mask, "[B, H, Sq, Sk]", {batch, heads, query.size(2), keys});
    require(!is_causal, "is_causal", "true", "false where attn_mask is given: the two may not be combined");
  }
  if (scale) require(std::isfinite(*scale), "scale", *scale, "a finite number");

  check_memory("query", query);
  check_memory("key", key);
  check_memory("value", value);
  if (attn_mask) check_memory("attn_mask", *attn_mask);
}

// Calls visit(b, h, s, d) for every element.
template <typename Visit>
void for_each_index(const Shape<4>& shape, const Visit& visit) {
  for (Index b = 0; b < shape[0]; ++b)
    for (Index h = 0; h < shape[1]; ++h)
      for (Index s = 0; s < shape[2]; ++s)
        for (Index d = 0; d < shape[3]; ++d) visit(b, h, s, d);
}

template <typename To, typename From>
Tensor<To, 4> converted(const View<From, 4>& view) {
  Tensor<To, 4> tensor(view.shape());
  for_each_index(view.shape(), [&](auto... index) { tensor(index...) = static_cast<To>(view(index...)); });
  return tensor;
}

}  // namespace

Tensor<float, 4> scaled_dot_product_attention(View<const float, 4> query, View<const float, 4> key,
                                              View<const float, 4> value, std::optional<View<const bool, 4>> attn_mask,
                                              bool is_causal, std::optional<float> scale, bool enable_gqa) {
  bool changed = false;
  for (const LentMemory& memory : sdpa_record().lent) changed = changed || !memory.unchanged();
  sdpa_record().calls.push_back({query, key, value, attn_mask, is_causal, scale, enable_gqa, changed, {}});
  check(query, key, value, attn_mask, is_causal, scale, enable_gqa);

  const Tensor<double, 4> wide_query = converted<double>(query);
  const Tensor<double, 4> wide_key = converted<double>(key);
  const Tensor<double, 4> wide_value = converted<double>(value);
  reference::Problem problem{.query = wide_query, .key = wide_key, .value = wide_value};
  if (scale) problem.scale = *scale;
  problem.allowed = attn_mask;

  // The reference knows the triangle that ends in the bottom right corner; this one begins in the top left.
  Tensor<bool, 4> triangle({1, 1, query.size(2), key.size(2)});
  if (is_causal) {
    for_each_index(triangle.shape(), [&](Index, Index, Index i, Index j) { triangle(0, 0, i, j) = j <= i; });
    problem.allowed = View<const bool, 4>(triangle.data(), {query.size(0), query.size(1), query.size(2), key.size(2)},
                                          {0, 0, key.size(2), 1});
  }

  const reference::Forward forward = reference::forward(problem);
  Tensor<float, 4> result = converted<float>(forward.output.view());
  sdpa_record().calls.back().result = testing::to_array(result);
  return result;
}

namespace testing {

LentMemory::LentMemory(std::string_view name, const void* data, std::size_t bytes)
    : name_(name), begin_(static_cast<const std::byte*>(data)), copy_(begin_, begin_ + bytes) {}

bool LentMemory::holds(const void* address) const {
  const std::less<const void*> before;  // addresses of different blocks have no other order
  return !before(address, begin_) && before(address, begin_ + copy_.size());
}

bool LentMemory::unchanged() const { return copy_.empty() || std::memcmp(copy_.data(), begin_, copy_.size()) == 0; }

SdpaRecord& sdpa_record() {
  static SdpaRecord record;
  return record;
}

}  // namespace testing
}  // namespace flashkata
