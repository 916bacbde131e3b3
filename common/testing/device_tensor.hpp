// A tensor [B, H, S, D] on the GPU with something around it: NaN between the rows of an input, numbers that must stay
// around the rows of an output.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>
#include <string>
#include <vector>

#include "common/gpu/gpu.hpp"
#include "common/testing/array.hpp"
#include "common/testing/layout.hpp"
#include "common/testing/report.hpp"

namespace flashkata::testing {

template <typename T>
bool same_bits(T one, T other) {
  if constexpr (sizeof(T) == 4) {
    return std::bit_cast<std::uint32_t>(one) == std::bit_cast<std::uint32_t>(other);
  } else {
    return std::bit_cast<std::uint16_t>(one) == std::bit_cast<std::uint16_t>(other);
  }
}

/// T is float, fp16 or bf16. Whoever wants the same on the host gives another buffer.
template <typename T, typename Buffer = DeviceBuffer<T>>
class DeviceTensor {
 public:
  /// An input: its own memory and not a byte more. `values` are rounded to T.
  static DeviceTensor input(const std::string& name, const View<const float, 4>& values, Layout layout) {
    DeviceTensor tensor(name, values.shape(), layout, 0, nan());
    tensor.each([&](std::size_t at, Index b, Index h, Index s, Index d) {
      tensor.before_[at] = from_float<T>(values(b, h, s, d));
    });
    tensor.buffer_.upload(tensor.before_);
    return tensor;
  }

  /// An output or scratch: NaN, with guard zones before and after, and between its rows.
  static DeviceTensor output(const std::string& name, const Shape<4>& shape, Layout layout) {
    DeviceTensor tensor(name, shape, layout, GUARD, from_float<T>(UNTOUCHED));
    tensor.each([&](std::size_t at, Index, Index, Index, Index) { tensor.before_[at] = nan(); });
    tensor.buffer_.upload(tensor.before_);
    return tensor;
  }

  const std::string& name() const { return name_; }
  const Shape<4>& shape() const { return shape_; }
  View<T, 4> view() { return {buffer_.data() + first_, shape_, strides_}; }

  /// Of a tensor [B, H, S, 1]: [B, H, S].
  View<T, 3> rows() {
    return {buffer_.data() + first_, {shape_[0], shape_[1], shape_[2]}, {strides_[0], strides_[1], strides_[2]}};
  }

  /// What it holds now. With `judge`, whatever changed around it is a finding.
  Array values(bool judge) const {
    const std::vector<T> now = buffer_.download();
    std::vector<bool> inside(now.size(), false);
    Array array{{shape_.begin(), shape_.end()}, {}};
    each([&](std::size_t at, Index, Index, Index, Index) {
      inside[at] = true;
      array.values.push_back(static_cast<double>(to_float(now[at])));
    });
    Index touched = 0;
    Index first = 0;
    for (std::size_t i = 0; i < now.size(); ++i) {
      if (inside[i] || same_bits(now[i], before_[i])) continue;
      if (touched++ == 0) first = static_cast<Index>(i) - first_;
    }
    if (judge && touched > 0) {
      finding(name_, "guard zone overwritten: " + std::to_string(touched) +
                         " numbers that are not part of it changed; first at element " + std::to_string(first) +
                         " from its beginning, stride of a row " + std::to_string(strides_[2]));
    }
    return array;
  }

  /// A finding if anything in it changed.
  void expect_unchanged() const {
    const std::vector<T> now = buffer_.download();
    for (std::size_t i = 0; i < now.size(); ++i) {
      if (same_bits(now[i], before_[i])) continue;
      finding(name_, "is an input, and was written at element " + std::to_string(i));
      return;
    }
  }

 private:
  static constexpr Index GUARD = 64;            // elements before and after; keeps 16-byte alignment
  static constexpr float UNTOUCHED = -8192.5f;  // what must stay

  static T nan() {
    if constexpr (sizeof(T) == 4) {
      return std::numeric_limits<float>::quiet_NaN();
    } else {
      return T{0x7fff};
    }
  }

  DeviceTensor(const std::string& name, const Shape<4>& shape, Layout layout, Index guard, T around)
      : name_(name),
        shape_(shape),
        strides_(strides_of(shape, layout, sizeof(T))),
        first_(guard),
        before_(static_cast<std::size_t>(extent() + 2 * guard), around),
        buffer_(name, before_.size()) {}

  // From the first element to the last row's end, gap included.
  Index extent() const {
    if (shape_[0] * shape_[1] * shape_[2] * shape_[3] == 0) return 0;
    return shape_[0] * std::max(strides_[0], strides_[1] * shape_[1]);
  }

  // Calls body(place in the buffer, b, h, s, d) for every element.
  template <typename Body>
  void each(Body&& body) const {
    for (Index b = 0; b < shape_[0]; ++b)
      for (Index h = 0; h < shape_[1]; ++h)
        for (Index s = 0; s < shape_[2]; ++s)
          for (Index d = 0; d < shape_[3]; ++d) {
            body(static_cast<std::size_t>(first_ + b * strides_[0] + h * strides_[1] + s * strides_[2] +
                                          d * strides_[3]),
                 b, h, s, d);
          }
  }

  std::string name_;
  Shape<4> shape_;
  Shape<4> strides_;
  Index first_;
  std::vector<T> before_;  // what the buffer held before the call
  Buffer buffer_;
};

}  // namespace flashkata::testing
