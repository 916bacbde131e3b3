// The problems that the kernels for whole tensors are tried on, forward and backward.
#pragma once

#include "common/testing/cases.hpp"
#include "common/testing/layout.hpp"

namespace flashkata::testing {

struct FlashCase {
  AttentionCase problem;  // value_width is width, one of 16, 32, 64, 128
  Layouts layouts = {};

  std::string text() const;
};

/// In order of number. Numbers never change: new cases go to the end.
const std::vector<FlashCase>& flash_cases();

}  // namespace flashkata::testing
