#include "grouped.hpp"

#include "phase2_forward/03_tiled_forward/tiled_forward.hpp"
#include "phase2_forward/05_flash_forward_mma/flash_forward_mma.hpp"
#include "phase3_backward/03_tiled_backward/tiled_backward.hpp"

namespace flashkata {
namespace {

// The groups, and for the queries between them groups of their own, whose slices are empty: a call on no keys writes
// what such queries get. Together they have each query once.
std::vector<Group> with_gaps(std::span<const Group> groups, Index queries) {
  std::vector<Group> all;
  for (const Group& group : groups) {
    if (group.q_begin < group.q_end) all.push_back(group);
  }
  std::sort(all.begin(), all.end(), [](const Group& one, const Group& other) { return one.q_begin < other.q_begin; });
  const std::size_t count = all.size();
  Index begin = 0;
  for (std::size_t g = 0; g <= count; ++g) {
    const Index end = g < count ? all[g].q_begin : queries;
    if (begin < end) all.push_back({begin, end, 0, 0});
    if (g < count) begin = all[g].q_end;
  }
  return all;
}

// Rows begin .. end - 1 of every head, of [B, H, S, D] or [B, H, S].
template <typename T, int Rank>
View<T, Rank> rows_of(const View<T, Rank>& x, Index begin, Index end) {
  Shape<Rank> shape = x.shape();
  shape[2] = end - begin;
  return {x.data() + begin * x.stride(2), shape, x.strides()};
}

// GQA without copies: key/value heads take the place of batch items, [1, H, ...] becomes [Hk, H / Hk, ...] ...
template <typename T, int Rank>
View<T, Rank> by_key_head(const View<T, Rank>& x, Index key_heads) {
  Shape<Rank> shape = x.shape();
  Shape<Rank> strides = x.strides();
  shape[0] = key_heads;
  shape[1] = x.size(1) / key_heads;
  strides[0] = shape[1] * x.stride(1);
  return {x.data(), shape, strides};
}

// ... and a stride of 0 lets all query heads of one read the same keys: [1, Hk, Sk, D] becomes [Hk, H / Hk, Sk, D].
template <typename T>
View<T, 4> shared_by(const View<T, 4>& x, Index query_heads) {
  return {
      x.data(), {x.size(1), query_heads / x.size(1), x.size(2), x.size(3)}, {x.stride(1), 0, x.stride(2), x.stride(3)}};
}

// One group as a problem of its own.
template <typename T>
FlashForward<T> part_of(const FlashForward<T>& problem, const Group& group) {
  const Index heads = problem.query.size(1);
  const Index key_heads = problem.key.size(1);
  return {
      .query = by_key_head(rows_of(problem.query, group.q_begin, group.q_end), key_heads),
      .key = shared_by(rows_of(problem.key, group.k_begin, group.k_end), heads),
      .value = shared_by(rows_of(problem.value, group.k_begin, group.k_end), heads),
      .output = by_key_head(rows_of(problem.output, group.q_begin, group.q_end), key_heads),
      .lse = by_key_head(rows_of(problem.lse, group.q_begin, group.q_end), key_heads),
      .causal = problem.causal,
      .scale = problem.scale,
  };
}

template <typename T>
void attend_separately(const FlashForward<T>& problem, std::span<const Group> groups, const Stream& stream) {
  for (const Group& group : with_gaps(groups, problem.query.size(2))) {
    flash_forward_mma(part_of(problem, group), stream);
  }
}

// Calls body(b, h) for all heads.
template <typename Body>
void for_each_head(const View<const float, 4>& x, const Body& body) {
  for (Index b = 0; b < x.size(0); ++b)
    for (Index h = 0; h < x.size(1); ++h) body(b, h);
}

}  // namespace

void tiled_grouped_forward(const FlashForward<float>& problem, std::span<const Group> groups) {
  check_grouped_forward(problem, groups);
  for (const Group& group : with_gaps(groups, problem.query.size(2))) {
    const FlashForward<float> part = part_of(problem, group);
    const TiledResult result =
        tiled_forward(part.query, part.key, part.value, {.causal = problem.causal, .scale = problem.scale});
    for_each_head(part.query, [&](Index b, Index h) {
      as_matrix(part.output[b][h]) = as_matrix(result.output.view()[b][h]);
      for (Index i = 0; i < part.query.size(2); ++i) part.lse(b, h, i) = result.lse(b, h, i);
    });
  }
}

void tiled_grouped_backward(const FlashBackward<float>& problem, std::span<const Group> groups) {
  check_grouped_backward(problem, groups);
  const Index heads = problem.query.size(1);
  const Index key_heads = problem.key.size(1);
  for (Index h = 0; h < key_heads; ++h) {
    as_matrix(problem.d_key[0][h]).setZero();
    as_matrix(problem.d_value[0][h]).setZero();
  }
  for (const Group& group : with_gaps(groups, problem.query.size(2))) {
    const auto of_group = [&](const auto& x) { return by_key_head(rows_of(x, group.q_begin, group.q_end), key_heads); };
    const auto slice = [&](const auto& x) { return rows_of(x, group.k_begin, group.k_end); };
    const View<float, 4> d_query = of_group(problem.d_query);
    const View<float, 4> d_key = slice(problem.d_key);
    const View<float, 4> d_value = slice(problem.d_value);
    const TiledGradients given =
        tiled_backward(of_group(problem.query), shared_by(slice(problem.key), heads),
                       shared_by(slice(problem.value), heads), of_group(problem.output), of_group(problem.lse),
                       of_group(problem.d_output), {.causal = problem.causal, .scale = problem.scale});
    for_each_head(d_query, [&](Index key_head, Index h) {
      as_matrix(d_query[key_head][h]) = as_matrix(given.query.view()[key_head][h]);
      // Slices overlap and heads share: a key's gradient is the sum of what all of them give it.
      as_matrix(d_key[0][key_head]) += as_matrix(given.key.view()[key_head][h]);
      as_matrix(d_value[0][key_head]) += as_matrix(given.value.view()[key_head][h]);
    });
  }
}

void separate_grouped_forward(const FlashForward<fp16>& problem, std::span<const Group> groups, const Stream& stream) {
  check_grouped_forward(problem, groups);
  attend_separately(problem, groups, stream);
}

void separate_grouped_forward(const FlashForward<bf16>& problem, std::span<const Group> groups, const Stream& stream) {
  check_grouped_forward(problem, groups);
  attend_separately(problem, groups, stream);
}

}  // namespace flashkata
