#include "grouped.hpp"

#include "phase2_forward/03_tiled_forward/tiled_forward.hpp"
#include "phase2_forward/05_flash_forward_mma/flash_forward_mma.hpp"
#include "phase3_backward/03_tiled_backward/tiled_backward.hpp"

namespace flashkata {

void tiled_grouped_forward(const FlashForward<float>& problem, std::span<const Group> groups) {
  check_grouped_forward(problem, groups);
  // TODO, about 40 lines with a helper or two: slices of the views, and a call of tiled_forward() for each group.
  throw NotImplemented(__FILE__);
}

void tiled_grouped_backward(const FlashBackward<float>& problem, std::span<const Group> groups) {
  check_grouped_backward(problem, groups);
  // TODO, about 40 lines: a call of tiled_backward() for each group; where slices overlap, their gradients meet.
  throw NotImplemented(__FILE__);
}

void separate_grouped_forward(const FlashForward<fp16>& problem, std::span<const Group> groups, const Stream& stream) {
  check_grouped_forward(problem, groups);
  // TODO, about 30 lines, templated on the type: a call of flash_forward_mma() for each group, and no copies.
  throw NotImplemented(__FILE__);
}

void separate_grouped_forward(const FlashForward<bf16>& problem, std::span<const Group> groups, const Stream& stream) {
  check_grouped_forward(problem, groups);
  // TODO, about 1 line: the same for the other type.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
