// Shapes, strides and views: how every step names the memory it reads and writes.
//
// Row-major, 64-bit offsets. No step owns its inputs: it receives views, which may be slices of something larger, so
// neighbouring rows need not be neighbours in memory. Only the last axis may be assumed to be contiguous, and only
// where a contract says so.
#pragma once

#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#ifdef __CUDACC__
#define KATA_HOST_DEVICE __host__ __device__
#else
#define KATA_HOST_DEVICE
#endif

namespace flashkata {

using Index = std::int64_t;

template <int Rank>
using Shape = std::array<Index, Rank>;

/// "[2, 3, 4]"
template <typename Range>
std::string to_text(const Range& shape) {
  std::ostringstream text;
  text << '[';
  const char* separator = "";
  for (const auto& length : shape) {
    text << separator << length;
    separator = ", ";
  }
  text << ']';
  return text.str();
}

/// Throws std::invalid_argument "ARGUMENT: got VALUE, allowed is ALLOWED" unless `ok`. Call it before anything is
/// written.
template <typename Value>
void require(bool ok, std::string_view argument, const Value& value, std::string_view allowed) {
  if (ok) return;
  std::ostringstream message;
  message << argument << ": got " << value << ", allowed is " << allowed;
  throw std::invalid_argument(message.str());
}

/// A window on memory owned by somebody else: element (i, j, ...) lies at data + i * stride(0) + j * stride(1) + ...
/// T is `const float` for inputs and `float` for outputs. Copying a view copies no data.
template <typename T, int Rank>
class View {
 public:
  /// Rows one after the other, without gaps. Throws std::invalid_argument if a length is negative.
  View(T* data, const Shape<Rank>& shape) : View(data, shape, packed_strides(shape)) {}

  /// Any layout: strides count elements, not bytes; a stride of 0 repeats one slice along that axis.
  View(T* data, const Shape<Rank>& shape, const Shape<Rank>& strides) : data_(data), shape_(shape), strides_(strides) {
    for (const Index length : shape) {
      if (length < 0) require(false, "shape", to_text(shape), "no negative length");
    }
  }

  /// The same memory, seen as read-only.
  View(const View<std::remove_const_t<T>, Rank>& other) requires std::is_const_v<T>
      : data_(other.data()), shape_(other.shape()), strides_(other.strides()) {}

  View(const View&) = default;
  View& operator=(const View&) = default;

  KATA_HOST_DEVICE T* data() const { return data_; }
  KATA_HOST_DEVICE Index size(int axis) const { return shape_[static_cast<std::size_t>(axis)]; }
  KATA_HOST_DEVICE Index stride(int axis) const { return strides_[static_cast<std::size_t>(axis)]; }
  const Shape<Rank>& shape() const { return shape_; }
  const Shape<Rank>& strides() const { return strides_; }

  /// How many elements the view names.
  Index count() const {
    Index product = 1;
    for (const Index length : shape_) product *= length;
    return product;
  }

  template <typename... Indices>
  KATA_HOST_DEVICE T& operator()(Indices... indices) const {
    static_assert(sizeof...(Indices) == Rank, "one index for each axis");
    Index offset = 0;
    int axis = 0;
    ((offset += static_cast<Index>(indices) * stride(axis++)), ...);
    return data_[offset];
  }

  /// Fix the first axis: x[b] of [B, S, E] is the [S, E] of batch item b.
  View<T, Rank - 1> operator[](Index index) const requires(Rank > 1) {
    Shape<Rank - 1> shape{};
    Shape<Rank - 1> strides{};
    for (std::size_t axis = 1; axis < Rank; ++axis) {
      shape[axis - 1] = shape_[axis];
      strides[axis - 1] = strides_[axis];
    }
    return {data_ + index * strides_[0], shape, strides};
  }

 private:
  static Shape<Rank> packed_strides(const Shape<Rank>& shape) {
    Shape<Rank> strides{};
    Index stride = 1;
    for (std::size_t axis = Rank; axis-- > 0;) {
      strides[axis] = stride;
      stride *= shape[axis];
    }
    return strides;
  }

  T* data_;
  Shape<Rank> shape_;
  Shape<Rank> strides_;
};

}  // namespace flashkata
