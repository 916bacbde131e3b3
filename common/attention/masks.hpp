// The masks that phase 1 takes. They are data: what to do with them is the exercise.
#pragma once

#include <optional>
#include <variant>

#include "common/attention/tensor.hpp"

namespace flashkata {

/// A mask over pairs of one head, [Sq, Sk]: none, boolean (true = attend), or additive (added to the scaled scores;
/// -inf forbids).
using Mask = std::variant<std::monostate, BoolMatrix, Matrix>;

/// A mask over the keys of each batch item, [B, Sk], true = attend: which tokens are text and which are padding.
using PaddingMask = std::optional<BoolMatrix>;

}  // namespace flashkata
