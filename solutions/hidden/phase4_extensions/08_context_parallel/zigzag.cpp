#include "context_parallel.hpp"

namespace flashkata {
namespace {

// Rows begin .. begin + count - 1 of head h of batch item b.
auto rows(const View<const float, 4>& x, Index b, Index h, Index begin, Index count) {
  return View<const float, 2>(x.data() + b * x.stride(0) + h * x.stride(1) + begin * x.stride(2), {count, x.size(3)},
                              {x.stride(2), x.stride(3)});
}

void copy(const View<const float, 2>& from, float* to) {
  for (Index i = 0; i < from.size(0); ++i)
    for (Index d = 0; d < from.size(1); ++d) *to++ = from(i, d);
}

}  // namespace

Index chunk_rows(const Zigzag& zigzag) {
  check_zigzag(zigzag);
  return (zigzag.tokens + 2 * zigzag.ranks - 1) / (2 * zigzag.ranks);
}

Index chunk_tokens(const Zigzag& zigzag, Index chunk) {
  check_chunk(zigzag, chunk);
  const Index rows = chunk_rows(zigzag);
  return std::clamp<Index>(zigzag.tokens - chunk * rows, 0, rows);
}

std::array<Index, 2> chunks_of(const Zigzag& zigzag, int rank) {
  check_rank(rank, zigzag.ranks);
  return {rank, 2 * zigzag.ranks - 1 - rank};
}

int owner_of(const Zigzag& zigzag, Index chunk) {
  check_chunk(zigzag, chunk);
  return static_cast<int>(std::min<Index>(chunk, 2 * zigzag.ranks - 1 - chunk));
}

Pairs pairs_of(Index query_chunk, Index key_chunk, bool causal) {
  if (!causal || key_chunk < query_chunk) return Pairs::all;
  return key_chunk == query_chunk ? Pairs::causal : Pairs::none;
}

Tensor<float, 4> zigzag_split(View<const float, 4> whole, int rank, int ranks) {
  check_rank(rank, ranks);
  const Zigzag zigzag{whole.size(2), ranks};
  const Index C = chunk_rows(zigzag);
  Tensor<float, 4> part({whole.size(0), whole.size(1), 2 * C, whole.size(3)});
  std::fill_n(part.data(), part.count(), 0.0f);
  const auto chunks = chunks_of(zigzag, rank);
  for (Index b = 0; b < whole.size(0); ++b) {
    for (Index h = 0; h < whole.size(1); ++h) {
      for (Index half = 0; half < 2; ++half) {
        const Index chunk = chunks[static_cast<std::size_t>(half)];
        const Index tokens = chunk_tokens(zigzag, chunk);
        if (tokens > 0) copy(rows(whole, b, h, chunk * C, tokens), &part(b, h, half * C, 0));
      }
    }
  }
  return part;
}

Tensor<float, 4> zigzag_merge(std::span<const View<const float, 4>> parts, Index tokens) {
  check_parts(parts, tokens);
  const Zigzag zigzag{tokens, static_cast<int>(parts.size())};
  const Index C = chunk_rows(zigzag);
  const Shape<4>& shape = parts.front().shape();
  Tensor<float, 4> whole({shape[0], shape[1], tokens, shape[3]});
  for (Index chunk = 0; chunk < 2 * zigzag.ranks; ++chunk) {
    const int owner = owner_of(zigzag, chunk);
    const Index row = chunks_of(zigzag, owner)[0] == chunk ? 0 : C;
    const Index count = chunk_tokens(zigzag, chunk);
    for (Index b = 0; b < shape[0] && count > 0; ++b) {
      for (Index h = 0; h < shape[1]; ++h) {
        copy(rows(parts[static_cast<std::size_t>(owner)], b, h, row, count), &whole(b, h, chunk * C, 0));
      }
    }
  }
  return whole;
}

}  // namespace flashkata
