// What the suite learns of the library's use: every call writes itself down here, as it arrived.
#pragma once

#ifndef KATA_JUDGE
#error "The record of calls judges the answers, so an answer may not include it. Only suites may."
#endif

#include <cstddef>
#include <optional>
#include <string_view>
#include <vector>

#include "common/testing/array.hpp"

namespace flashkata::testing {

/// One call of scaled_dot_product_attention().
struct SdpaCall {
  View<const float, 4> query;
  View<const float, 4> key;
  View<const float, 4> value;
  std::optional<View<const bool, 4>> attn_mask;  // its memory may be gone: look at its shape and strides only
  bool is_causal;
  std::optional<float> scale;
  bool enable_gqa;
  bool inputs_changed;  // what the caller lent was no longer what it had been when it was lent
  Array result;         // [B, H, Sq, Dv]; empty if the library refused the arguments
};

/// Memory of the caller's that an answer may show to the library. The library checks that a view which begins in it
/// ends in it too, so that a wrong stride is an error with a sentence and not a crash.
class LentMemory {
 public:
  LentMemory(std::string_view name, const void* data, std::size_t bytes);

  std::string_view name() const { return name_; }
  bool holds(const void* address) const;
  bool unchanged() const;

  template <typename T>
  bool holds(const View<T, 4>& view) const {
    const T* first = view.data();
    const T* last = view.data();
    for (int axis = 0; axis < 4; ++axis) {
      const Index reach = (view.size(axis) - 1) * view.stride(axis);
      (reach < 0 ? first : last) += reach;
    }
    return view.count() == 0 || (holds(static_cast<const void*>(first)) && holds(static_cast<const void*>(last)));
  }

 private:
  std::string_view name_;
  const std::byte* begin_;
  std::vector<std::byte> copy_;
};

/// Emptied by the suite before it calls an answer.
struct SdpaRecord {
  std::vector<LentMemory> lent;
  std::vector<SdpaCall> calls;
};

SdpaRecord& sdpa_record();

}  // namespace flashkata::testing
