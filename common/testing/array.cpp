#include "common/testing/array.hpp"

#include <cmath>
#include <functional>
#include <numeric>

namespace flashkata::testing {

std::size_t first_difference(const Array& one, const Array& other) {
  for (std::size_t i = 0; i < one.count(); ++i) {
    const bool both_nan = std::isnan(one.values[i]) && std::isnan(other.values[i]);
    if (one.values[i] != other.values[i] && !both_nan) return i;
  }
  return npos;
}

std::string place(const Array& array, std::size_t flat, const std::vector<std::string_view>& axes) {
  std::vector<Index> index(array.shape.size());
  auto rest = static_cast<Index>(flat);
  for (std::size_t axis = array.shape.size(); axis-- > 0;) {
    index[axis] = rest % array.shape[axis];
    rest /= array.shape[axis];
  }
  std::string text;
  for (std::size_t axis = 0; axis < index.size(); ++axis) {
    if (axis > 0) text += ", ";
    if (axis < axes.size()) text += std::string(axes[axis]) + ' ';
    text += std::to_string(index[axis]);
  }
  return text;
}

Array head_of(const Array& array, Index b, Index h) {
  Array result{{array.shape.begin() + 2, array.shape.end()}, {}};
  const Index size = std::accumulate(result.shape.begin(), result.shape.end(), Index{1}, std::multiplies<>());
  const auto first = array.values.begin() + (b * array.shape.at(1) + h) * size;
  result.values.assign(first, first + size);
  return result;
}

}  // namespace flashkata::testing
