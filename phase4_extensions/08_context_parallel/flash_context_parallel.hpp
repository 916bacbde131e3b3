// (e) The same on GPUs: every rank has one, and its part of the sequence lies in the memory of that GPU.
#pragma once

#include "common/distributed/communicator.hpp"
#include "phase4_extensions/05_grouped/grouped.hpp"
#include "zigzag.hpp"

namespace flashkata {

// A rank's part of a sequence of `tokens` tokens, as zigzag_split() cuts it: FlashForward and FlashBackward with
//
//     query, output, d_output, d_query   [1, H, 2C, D]      rows 0 .. C-1 are chunk r, rows C .. 2C-1 chunk 2W-1-r
//     key, value, d_key, d_value         [1, Hk, 2C, D]     query head h reads key/value head h / (H / Hk)
//     lse                                [1, H, 2C]
//
// in fp16 or bf16, in the memory of the rank's GPU. `causal` is that of the whole sequence: token i sees token j when
// j <= i. What is given to the communicator lies in the same memory. D is what your flash_grouped_forward() takes.
//
// Every rank calls the same function with the same sizes and gets what attention over the whole sequence would give its
// rows, as the functions of context_parallel.hpp do: of padding, output 0, lse -inf, gradients 0, whatever it holds;
// what a query does not see, NaN and inf included, reaches neither its output nor its gradient. The way back takes the
// output and the lse over the keys of all ranks. Every output is written wholly, no input is, and no call remembers
// another. The same inputs give the same bits; on the way back this holds for d_query only with `deterministic`.
//
// Precision: chunks of queries and keys are computed by flash_grouped_forward() and flash_grouped_backward(), whose
// results have 16 bits. Whatever is added up after that, partial outputs of several hops or gradients of several ranks,
// is added up in fp32, and rounded once, at the end. Keys and values travel as they are, in 16 bits; sums of gradients
// in fp32.
//
// Work is launched on the default stream. An exchange begins when what had been launched before it is done, and what is
// launched after its wait() begins when it is over; in between they overlap.
//
// Memory of the GPU beyond the arguments, where L is what a rank's K and V take and Q what its query takes, in bytes:
// the gather form at most (2W + 2) L forward, and (6W + 3) L backward; the ring form at most 3 L + 4 Q forward and
// 9 L + 4 Q backward, on however many ranks; and a few floats for each query on top.
//
// Throws std::invalid_argument naming the argument, its value and what is allowed, before anything is sent.
//
// All in flash_context_parallel.cu.

/// One all_gather() of K and V (or one for each), L bytes from every rank; their rows put back in order; then the two
/// chunks are two groups with slices of different length.
void flash_gather_attention(const FlashForward<fp16>& local, Index tokens, Communicator& communicator);
void flash_gather_attention(const FlashForward<bf16>& local, Index tokens, Communicator& communicator);

/// Gathers again; the gradients of all keys go to their owners by reduce_scatter(), in floats.
void flash_gather_attention_backward(const FlashBackward<fp16>& local, Index tokens, Communicator& communicator);
void flash_gather_attention_backward(const FlashBackward<bf16>& local, Index tokens, Communicator& communicator);

/// K and V travel by shift(), W-1 times L bytes. While a rank computes on some, the next are on their way. At hop 0 its
/// own keys: two groups, causal or not; at every later hop one rectangle without a mask; each merged with those before.
void flash_ring_attention(const FlashForward<fp16>& local, Index tokens, Communicator& communicator);
void flash_ring_attention(const FlashForward<bf16>& local, Index tokens, Communicator& communicator);

/// K and V travel as before, and sums of their gradients travel too, W times, in floats.
void flash_ring_attention_backward(const FlashBackward<fp16>& local, Index tokens, Communicator& communicator);
void flash_ring_attention_backward(const FlashBackward<bf16>& local, Index tokens, Communicator& communicator);

// ---- The checks that they promise -----------------------------------------------------------------------------------

namespace context_parallel_detail {

inline void check_rows(const Shape<4>& query, const Shape<4>& key, Index tokens, int ranks) {
  require(tokens >= 0, "tokens", tokens, "0 or more");
  const Index rows = 2 * ((tokens + 2 * ranks - 1) / (2 * ranks));
  const std::string why = ": 2C rows for " + std::to_string(tokens) + " tokens on " + std::to_string(ranks) + " ranks";
  require(query[0] == 1 && query[2] == rows, "query", to_text(query),
          "[1, H, " + std::to_string(rows) + ", D]" + why + ", and one batch item");
  require(key[2] == rows, "key", to_text(key), "[1, Hk, " + std::to_string(rows) + ", D]" + why);
}

}  // namespace context_parallel_detail

template <typename T>
void check_flash_local_forward(const FlashForward<T>& local, Index tokens, int ranks) {
  check_flash_forward(local, KeyHeads::shared);
  context_parallel_detail::check_rows(local.query.shape(), local.key.shape(), tokens, ranks);
}

template <typename T>
void check_flash_local_backward(const FlashBackward<T>& local, Index tokens, int ranks) {
  check_flash_backward(local, KeyHeads::shared);
  context_parallel_detail::check_rows(local.query.shape(), local.key.shape(), tokens, ranks);
}

}  // namespace flashkata
