// One number for each row: a maximum, a sum, a log-sum-exp.
#pragma once

#include "common/attention/tensor.hpp"

namespace flashkata {

/// [rows]. A fresh Vector is full of NaN, so an element that nobody writes is seen.
using Vector = Eigen::Matrix<float, Eigen::Dynamic, 1>;

}  // namespace flashkata
