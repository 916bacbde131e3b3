// (a) How a sequence is dealt out to ranks: what stands where, without a number in it. zigzag.cpp.
#pragma once

#include <array>

#include "common/attention/view.hpp"

namespace flashkata {

// One sequence of S tokens on W ranks. It is cut into 2W chunks of C = ceil(S / 2W) tokens; the last chunks may be
// shorter, or empty. Rank r has chunks r and 2W-1-r, in this order, as a local tensor [B, H, 2C, D]: rows 0 .. C-1 are
// chunk r, rows C .. 2C-1 chunk 2W-1-r. Where a chunk has fewer than C tokens, the rows behind them are padding.

/// How a sequence is dealt out.
struct Zigzag {
  Index tokens = 0;  // S
  int ranks = 1;     // W
};

/// C, how many rows a chunk has: ceil(S / 2W).
Index chunk_rows(const Zigzag& zigzag);

/// How many of them are tokens: C, or fewer in one of the last chunks, or 0.
Index chunk_tokens(const Zigzag& zigzag, Index chunk);

/// The chunks of a rank, the earlier one first: r and 2W-1-r.
std::array<Index, 2> chunks_of(const Zigzag& zigzag, int rank);

/// The rank that has this chunk.
int owner_of(const Zigzag& zigzag, Index chunk);

/// Which pairs of a chunk of queries and a chunk of keys are to be computed.
enum class Pairs { none, causal, all };

/// `causal`: query i sees key j when j <= i, counted within the whole sequence. For chunks that have no token the
/// answer is that for chunks which have.
Pairs pairs_of(Index query_chunk, Index key_chunk, bool causal);

// ---- The checks that they promise -----------------------------------------------------------------------------------

inline void check_zigzag(const Zigzag& zigzag) {
  require(zigzag.tokens >= 0, "tokens", zigzag.tokens, "0 or more");
  require(zigzag.ranks >= 1, "ranks", zigzag.ranks, "at least 1");
}

inline void check_rank(int rank, int ranks) {
  require(ranks >= 1, "ranks", ranks, "at least 1");
  require(0 <= rank && rank < ranks, "rank", rank, "0 .. " + std::to_string(ranks - 1));
}

inline void check_chunk(const Zigzag& zigzag, Index chunk) {
  check_zigzag(zigzag);
  require(0 <= chunk && chunk < 2 * zigzag.ranks, "chunk", chunk, "0 .. " + std::to_string(2 * zigzag.ranks - 1));
}

}  // namespace flashkata
