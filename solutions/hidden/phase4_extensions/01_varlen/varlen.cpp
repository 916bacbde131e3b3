#include "varlen.hpp"

#include "phase2_forward/03_tiled_forward/tiled_forward.hpp"
#include "phase3_backward/03_tiled_backward/tiled_backward.hpp"

#include <algorithm>
#include <span>

namespace flashkata {
namespace {

// From which token to which: of q or of k.
struct Range {
  Index first, count;
};

Range range_of(const View<const std::int32_t, 1>& cu_seqlens, Index b) {
  return {cu_seqlens(b), static_cast<Index>(cu_seqlens(b + 1)) - cu_seqlens(b)};
}

// Of a packed tensor [1, H, T, D] the tokens of one sequence, where they lie.
template <typename T>
View<T, 4> rows_of(const View<T, 4>& packed, const Range& range) {
  const Shape<4>& shape = packed.shape();
  return {
      packed.data() + range.first * packed.stride(2), {shape[0], shape[1], range.count, shape[3]}, packed.strides()};
}

template <typename T>
View<T, 3> rows_of(const View<T, 3>& packed, const Range& range) {
  const Shape<3>& shape = packed.shape();
  return {packed.data() + range.first * packed.stride(2), {shape[0], shape[1], range.count}, packed.strides()};
}

void copy(const Tensor<float, 4>& from, const View<float, 4>& to) {
  for (Index h = 0; h < from.size(1); ++h) as_matrix(to[0][h]) = as_matrix(from.view()[0][h]);
}

// Tensors [B, S, H*D] on their way over the GPU.
Tensor<float, 3> attend(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v, Index num_heads,
                        const PaddingMask& mask, bool causal) {
  const auto tokens_of = [&](const View<const float, 3>& x) {
    return packing_of(mask ? *mask : BoolMatrix(BoolMatrix::Constant(x.size(0), x.size(1), true)));
  };
  const Packing queries = tokens_of(q);
  const Packing keys = tokens_of(k);
  const auto uploaded = [](const char* name, const View<const float, 3>& x, const Packing& packing) {
    const Tensor<float, 2> tokens = pack(x, packing);
    return DeviceBuffer<float>(name, std::span(tokens.data(), static_cast<std::size_t>(tokens.count())));
  };
  const DeviceBuffer<float> query = uploaded("query", q, queries);
  const DeviceBuffer<float> key = uploaded("key", k, keys);
  const DeviceBuffer<float> value = uploaded("value", v, keys);
  const DeviceBuffer<std::int32_t> cu_seqlens_q("cu_seqlens_q", queries.cu_seqlens);
  const DeviceBuffer<std::int32_t> cu_seqlens_k("cu_seqlens_k", keys.cu_seqlens);
  const auto count = static_cast<Index>(queries.places.size());
  DeviceBuffer<float> output("output", query.size());
  DeviceBuffer<float> lse("lse", static_cast<std::size_t>(num_heads * count));

  // [T, H, D] as [1, H, T, D].
  const auto as_heads = [&]<typename T>(T* data, const Packing& packing) {
    const Index width = q.size(2) / num_heads;
    const auto tokens = static_cast<Index>(packing.places.size());
    return View<T, 4>(data, {1, num_heads, tokens, width}, {tokens * q.size(2), width, q.size(2), 1});
  };
  flash_varlen_forward(
      {
          .query = as_heads(query.data(), queries),
          .key = as_heads(key.data(), keys),
          .value = as_heads(value.data(), keys),
          .output = as_heads(output.data(), queries),
          .lse = lse.view(Shape<3>{1, num_heads, count}),
          .causal = causal,
      },
      {
          .cu_seqlens_q = View<const std::int32_t, 1>(cu_seqlens_q.data(), {q.size(0) + 1}),
          .cu_seqlens_k = View<const std::int32_t, 1>(cu_seqlens_k.data(), {q.size(0) + 1}),
          .max_seqlen_q = queries.max_seqlen,
          .max_seqlen_k = keys.max_seqlen,
      });
  synchronize();
  const std::vector<float> result = output.download();
  return unpack(View<const float, 2>(result.data(), {count, q.size(2)}), queries, q.size(1));
}

}  // namespace

Packing packing_of(const BoolMatrix& mask) {
  Packing packing;
  packing.cu_seqlens.push_back(0);
  for (Index b = 0; b < mask.rows(); ++b) {
    for (Index s = 0; s < mask.cols(); ++s) {
      if (mask(b, s)) packing.places.push_back(b * mask.cols() + s);
    }
    const auto end = static_cast<std::int32_t>(packing.places.size());
    packing.max_seqlen = std::max<Index>(packing.max_seqlen, end - packing.cu_seqlens.back());
    packing.cu_seqlens.push_back(end);
  }
  return packing;
}

Tensor<float, 2> pack(View<const float, 3> x, const Packing& packing) {
  check_pack(x, packing);
  Tensor<float, 2> tokens({static_cast<Index>(packing.places.size()), x.size(2)});
  for (Index t = 0; t < tokens.size(0); ++t) {
    const Index place = packing.places[static_cast<std::size_t>(t)];
    for (Index e = 0; e < x.size(2); ++e) tokens(t, e) = x(place / x.size(1), place % x.size(1), e);
  }
  return tokens;
}

Tensor<float, 3> unpack(View<const float, 2> tokens, const Packing& packing, Index length) {
  check_unpack(tokens, packing, length);
  Tensor<float, 3> x({static_cast<Index>(packing.cu_seqlens.size()) - 1, length, tokens.size(1)});
  std::fill_n(x.data(), x.count(), 0.0f);
  for (Index t = 0; t < tokens.size(0); ++t) {
    const Index place = packing.places[static_cast<std::size_t>(t)];
    for (Index e = 0; e < tokens.size(1); ++e) x(place / length, place % length, e) = tokens(t, e);
  }
  return x;
}

void tiled_varlen_forward(const FlashForward<float>& problem, const Sequences& sequences) {
  check_varlen_forward(problem, sequences);
  check_cu_seqlens(problem, sequences);
  for (Index b = 0; b + 1 < sequences.cu_seqlens_q.size(0); ++b) {
    const Range queries = range_of(sequences.cu_seqlens_q, b);
    const Range keys = range_of(sequences.cu_seqlens_k, b);
    if (queries.count == 0) continue;
    const TiledResult result =
        tiled_forward(rows_of(problem.query, queries), rows_of(problem.key, keys), rows_of(problem.value, keys),
                      {.causal = problem.causal, .scale = problem.scale});
    copy(result.output, rows_of(problem.output, queries));
    for (Index h = 0; h < problem.lse.size(1); ++h) {
      for (Index i = 0; i < queries.count; ++i) problem.lse(0, h, queries.first + i) = result.lse(0, h, i);
    }
  }
}

void tiled_varlen_backward(const FlashBackward<float>& problem, const Sequences& sequences) {
  check_varlen_backward(problem, sequences);
  check_cu_seqlens(problem, sequences);
  for (Index b = 0; b + 1 < sequences.cu_seqlens_q.size(0); ++b) {
    const Range queries = range_of(sequences.cu_seqlens_q, b);
    const Range keys = range_of(sequences.cu_seqlens_k, b);
    const TiledGradients gradients =
        tiled_backward(rows_of(problem.query, queries), rows_of(problem.key, keys), rows_of(problem.value, keys),
                       rows_of(problem.output, queries), rows_of(problem.lse, queries),
                       rows_of(problem.d_output, queries), {.causal = problem.causal, .scale = problem.scale});
    copy(gradients.query, rows_of(problem.d_query, queries));
    copy(gradients.key, rows_of(problem.d_key, keys));
    copy(gradients.value, rows_of(problem.d_value, keys));
  }
}

Tensor<float, 3> flash_bidirectional(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v,
                                     Index num_heads, const PaddingMask& mask) {
  check_padded(q, k, v, num_heads, mask);
  return attend(q, k, v, num_heads, mask, /*causal=*/false);
}

Tensor<float, 3> flash_causal(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v, Index num_heads,
                              const PaddingMask& mask) {
  check_padded(q, k, v, num_heads, mask);
  return attend(q, k, v, num_heads, mask, /*causal=*/true);
}

}  // namespace flashkata
