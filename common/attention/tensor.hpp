// Memory that a step owns and returns: matrices for one head, tensors for many.
#pragma once

#include <stdexcept>
#include <string>

namespace flashkata {

/// What Eigen's own checks end in, such as a product of matrices that do not fit: an exception that a suite can show,
/// where Eigen would abort.
[[noreturn]] inline void eigen_misuse(const char* condition) {
  throw std::logic_error(std::string("Eigen was misused, this does not hold: ") + condition);
}

}  // namespace flashkata

#define eigen_assert(condition) ((condition) ? static_cast<void>(0) : ::flashkata::eigen_misuse(#condition))

#include <Eigen/Core>
#include <algorithm>
#include <initializer_list>
#include <limits>
#include <memory>

#include "common/attention/view.hpp"

namespace flashkata {

/// One head: [rows, columns], row-major. A fresh Matrix is full of NaN, so an element that nobody writes is seen.
using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using BoolMatrix = Eigen::Matrix<bool, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// A read-only matrix owned by somebody else: a Matrix, some of its rows or columns, or one head of a tensor.
using ConstMatrixView = Eigen::Ref<const Matrix>;

/// A view of rank 2 as an Eigen matrix over the same memory. The columns must be neighbours in memory.
template <typename T>
auto as_matrix(const View<T, 2>& view) {
  using Dense = Eigen::Matrix<std::remove_const_t<T>, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using Target = std::conditional_t<std::is_const_v<T>, const Dense, Dense>;
  require(view.stride(1) == 1 || view.size(1) <= 1, "stride(1)", view.stride(1), "1: as_matrix needs contiguous rows");
  return Eigen::Map<Target, Eigen::Unaligned, Eigen::OuterStride<>>(view.data(), view.size(0), view.size(1),
                                                                    Eigen::OuterStride<>(view.stride(0)));
}

/// Owns its elements, packed and row-major; floating-point elements start as NaN. Move it or look at it through a view.
template <typename T, int Rank>
class Tensor {
 public:
  explicit Tensor(const Shape<Rank>& shape)
      : shape_(shape), data_(new T[static_cast<std::size_t>(view_of(nullptr).count())]) {
    std::fill_n(data_.get(), count(), initial());
  }

  /// The same from a shape known at run time. Throws std::invalid_argument unless it names exactly Rank lengths.
  Tensor(std::initializer_list<Index> shape) : Tensor(checked(shape)) {}

  View<T, Rank> view() { return view_of(data_.get()); }
  View<const T, Rank> view() const { return {data_.get(), shape_}; }
  operator View<T, Rank>() { return view(); }
  operator View<const T, Rank>() const { return view(); }

  const Shape<Rank>& shape() const { return shape_; }
  Index size(int axis) const { return shape_[static_cast<std::size_t>(axis)]; }
  Index count() const { return view().count(); }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }

  template <typename... Indices>
  T& operator()(Indices... indices) {
    return view()(indices...);
  }
  template <typename... Indices>
  const T& operator()(Indices... indices) const {
    return view()(indices...);
  }

 private:
  static constexpr T initial() {
    return std::numeric_limits<T>::has_quiet_NaN ? std::numeric_limits<T>::quiet_NaN() : T{};
  }
  static Shape<Rank> checked(std::initializer_list<Index> lengths) {
    require(lengths.size() == Rank, "shape", to_text(lengths), "a list of " + std::to_string(Rank) + " lengths");
    Shape<Rank> shape{};
    std::copy(lengths.begin(), lengths.end(), shape.begin());
    return shape;
  }
  View<T, Rank> view_of(T* data) const { return {data, shape_}; }

  Shape<Rank> shape_;
  std::unique_ptr<T[]> data_;
};

}  // namespace flashkata
