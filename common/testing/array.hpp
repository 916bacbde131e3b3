// The suites' own arrays: any rank, float64, compared and printed without caring where they came from.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "common/attention/tensor.hpp"

namespace flashkata::testing {

struct Array {
  std::vector<Index> shape;
  std::vector<double> values;  // row-major

  std::size_t count() const { return values.size(); }
};

/// The first index at which two arrays of one shape differ, or npos. NaN equals NaN, and 0 equals -0.
std::size_t first_difference(const Array& one, const Array& other);
inline constexpr std::size_t npos = static_cast<std::size_t>(-1);

/// "query 3, channel 0" for flat index 24 of an array [_, 8] with axes {"query", "channel"}.
std::string place(const Array& array, std::size_t flat, const std::vector<std::string_view>& axes);

/// Head (b, h) of an array [B, H, ...].
Array head_of(const Array& array, Index b, Index h);

template <typename T, int Rank>
Array to_array(const View<T, Rank>& view) {
  Array array{{view.shape().begin(), view.shape().end()}, {}};
  array.values.reserve(static_cast<std::size_t>(view.count()));
  if constexpr (Rank == 1) {
    for (Index i = 0; i < view.size(0); ++i) array.values.push_back(static_cast<double>(view(i)));
  } else {
    for (Index i = 0; i < view.size(0); ++i) {
      const Array slice = to_array(view[i]);
      array.values.insert(array.values.end(), slice.values.begin(), slice.values.end());
    }
  }
  return array;
}

template <typename T, int Rank>
Array to_array(const Tensor<T, Rank>& tensor) {
  return to_array(tensor.view());
}

template <typename Derived>
Array to_array(const Eigen::DenseBase<Derived>& matrix) {
  Array array{{matrix.rows(), matrix.cols()}, {}};
  array.values.reserve(static_cast<std::size_t>(matrix.size()));
  for (Index row = 0; row < matrix.rows(); ++row) {
    for (Index column = 0; column < matrix.cols(); ++column) {
      array.values.push_back(static_cast<double>(matrix.derived().coeff(row, column)));
    }
  }
  return array;
}

}  // namespace flashkata::testing
