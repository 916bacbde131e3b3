#include "context_parallel.hpp"

namespace flashkata {

Index chunk_rows(const Zigzag& zigzag) {
  check_zigzag(zigzag);
  // TODO, about 1 line: the formula in zigzag.hpp.
  throw NotImplemented(__FILE__);
}

Index chunk_tokens(const Zigzag& zigzag, Index chunk) {
  check_chunk(zigzag, chunk);
  // TODO, about 2 lines: what is left of the sequence where this chunk begins?
  throw NotImplemented(__FILE__);
}

std::array<Index, 2> chunks_of(const Zigzag& zigzag, int rank) {
  check_rank(rank, zigzag.ranks);
  // TODO, about 1 line.
  throw NotImplemented(__FILE__);
}

int owner_of(const Zigzag& zigzag, Index chunk) {
  check_chunk(zigzag, chunk);
  // TODO, about 2 lines: chunks_of(), read the other way round.
  throw NotImplemented(__FILE__);
}

Pairs pairs_of(Index query_chunk, Index key_chunk, bool causal) {
  // TODO, about 3 lines: is that chunk of keys in the past, the present or the future of these queries?
  throw NotImplemented(__FILE__);
}

Tensor<float, 4> zigzag_split(View<const float, 4> whole, int rank, int ranks) {
  check_rank(rank, ranks);
  // TODO, about 15 lines: two chunks of rows, and zeros behind the last token.
  throw NotImplemented(__FILE__);
}

Tensor<float, 4> zigzag_merge(std::span<const View<const float, 4>> parts, Index tokens) {
  check_parts(parts, tokens);
  // TODO, about 15 lines: each chunk of each part to its place in the sequence.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
