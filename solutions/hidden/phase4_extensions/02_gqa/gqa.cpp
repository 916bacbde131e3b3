#include "gqa.hpp"

#include "phase2_forward/03_tiled_forward/tiled_forward.hpp"
#include "phase3_backward/03_tiled_backward/tiled_backward.hpp"

namespace flashkata {
namespace {

// One batch item has the shape of a problem of its own: its key/value heads are the batch items, and the query heads
// that share one are the heads. That is a matter of strides, so no number moves.

// [H, S, D] of batch item b as [Hk, H / Hk, S, D]. Neighbouring heads share, so a group is a piece of the axis.
View<const float, 4> in_groups(const View<const float, 4>& x, Index b, Index kv_heads) {
  const Index group = x.size(1) / kv_heads;
  return {x.data() + b * x.stride(0),
          {kv_heads, group, x.size(2), x.size(3)},
          {group * x.stride(1), x.stride(1), x.stride(2), x.stride(3)}};
}

View<const float, 3> in_groups(const View<const float, 3>& x, Index b, Index kv_heads) {
  const Index group = x.size(1) / kv_heads;
  return {x.data() + b * x.stride(0), {kv_heads, group, x.size(2)}, {group * x.stride(1), x.stride(1), x.stride(2)}};
}

// [Hk, S, D] of batch item b as [Hk, group, S, D]: a stride of 0, so that each head of a group finds the same rows.
View<const float, 4> repeated(const View<const float, 4>& x, Index b, Index group) {
  return {x.data() + b * x.stride(0), {x.size(1), group, x.size(2), x.size(3)}, {x.stride(1), 0, x.stride(2), 1}};
}

}  // namespace

void tiled_gqa_forward(const FlashForward<float>& problem) {
  check_flash_forward(problem, KeyHeads::shared);
  const Index kv_heads = problem.key.size(1);
  const Index group = problem.query.size(1) / kv_heads;
  for (Index b = 0; b < problem.query.size(0); ++b) {
    const TiledResult result =
        tiled_forward(in_groups(problem.query, b, kv_heads), repeated(problem.key, b, group),
                      repeated(problem.value, b, group), {.causal = problem.causal, .scale = problem.scale});
    for (Index h = 0; h < problem.query.size(1); ++h) {
      as_matrix(problem.output[b][h]) = as_matrix(result.output.view()[h / group][h % group]);
      for (Index i = 0; i < problem.query.size(2); ++i) problem.lse(b, h, i) = result.lse(h / group, h % group, i);
    }
  }
}

void tiled_gqa_backward(const FlashBackward<float>& problem) {
  check_flash_backward(problem, KeyHeads::shared);
  const Index kv_heads = problem.key.size(1);
  const Index group = problem.query.size(1) / kv_heads;
  for (Index b = 0; b < problem.query.size(0); ++b) {
    const TiledGradients result = tiled_backward(
        in_groups(problem.query, b, kv_heads), repeated(problem.key, b, group), repeated(problem.value, b, group),
        in_groups(problem.output, b, kv_heads), in_groups(problem.lse, b, kv_heads),
        in_groups(problem.d_output, b, kv_heads), {.causal = problem.causal, .scale = problem.scale});
    for (Index h = 0; h < problem.query.size(1); ++h) {
      as_matrix(problem.d_query[b][h]) = as_matrix(result.query.view()[h / group][h % group]);
    }
    // Whatever is read by several is changed by the wishes of all: the derivative of a copy is a sum.
    for (Index hk = 0; hk < kv_heads; ++hk) {
      auto d_key = as_matrix(problem.d_key[b][hk]);
      auto d_value = as_matrix(problem.d_value[b][hk]);
      d_key.setZero();
      d_value.setZero();
      for (Index member = 0; member < group; ++member) {
        d_key += as_matrix(result.key.view()[hk][member]);
        d_value += as_matrix(result.value.view()[hk][member]);
      }
    }
  }
}

}  // namespace flashkata
