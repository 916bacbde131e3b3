// The part of step 01 that knows nothing of the host's tensors: which tokens belong together, and the kernels.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

#include "common/attention/not_implemented.hpp"
#include "common/gpu/gpu.hpp"
#include "phase3_backward/flash.hpp"

namespace flashkata {

/// Which tokens belong together. Sequence b has the queries cu_seqlens_q[b] up to cu_seqlens_q[b + 1] and the keys
/// cu_seqlens_k[b] up to cu_seqlens_k[b + 1], the ends not included. Lengths differ as they like and may be 0, and a
/// sequence may have more keys than queries, or fewer. The entries lie in the memory of the function that reads them.
struct Sequences {
  View<const std::int32_t, 1> cu_seqlens_q;  // [B + 1], the first 0, none below the one before, the last at most Tq
  View<const std::int32_t, 1> cu_seqlens_k;  // [B + 1], the same for Tk
  Index max_seqlen_q;                        // no sequence has more queries; it may be larger than the longest
  Index max_seqlen_k;                        // no sequence has more keys
};

/// Attention within each sequence, in fp32. The tensors are packed: query, output [1, H, Tq, D], key, value
/// [1, H, Tk, D], lse [1, H, Tq], with strides; so [T, H, D] in memory is a view with stride(1) = D, stride(2) = H D.
///
/// A query attends to the keys of its own sequence and to no others. `causal` is aligned to the bottom right of each
/// sequence by itself: its query i, of q, sees its key j, of k, when j <= i + k - q. A query that may attend to nothing
/// (of a sequence without keys, for one) has output 0 and lse -inf. What other sequences and forbidden keys hold, NaN
/// and inf included, reaches nobody. Tokens after the last sequence, from cu_seqlens[B] on, belong to nobody: what they
/// hold is not used, and their rows of output and lse stay as they were.
///
/// One launch of each kernel serves all sequences. The same inputs give the same bits. Device memory: none beyond the
/// arguments. What is wrong with entries of cu_seqlens goes unseen: they are the GPU's.
void flash_varlen_forward(const FlashForward<float>& problem, const Sequences& sequences, const Stream& stream = {});

/// The gradients, under the same rules: d_output and d_query as query, d_key and d_value as key. A key that no query
/// sees, such as those of a sequence without queries, has gradients of exactly 0; a query that sees no key has 0, and
/// gives nothing. All rows of all sequences are written, whatever they held; those of tokens after the last sequence
/// stay as they were, except in delta and d_query_sum, which are scratch. `deterministic` as in phase 3.
void flash_varlen_backward(const FlashBackward<float>& problem, const Sequences& sequences, const Stream& stream = {});

// ---- The checks. Each throws std::invalid_argument naming the argument, its value and what is allowed ---------------

/// What can be seen from outside: no entry is read.
inline void check_sequences(const Sequences& sequences) {
  const auto check_entries = [](const View<const std::int32_t, 1>& entries, const char* name) {
    require(entries.size(0) >= 1, name, to_text(entries.shape()), "[B + 1], with one entry more than sequences");
    require(entries.size(0) == 1 || entries.stride(0) == 1, name, "stride(0) = " + std::to_string(entries.stride(0)),
            "1");
  };
  const auto check_longest = [](Index longest, const char* name) {
    constexpr Index LONGEST = std::numeric_limits<int>::max() / 2;
    require(longest >= 0 && longest <= LONGEST, name, longest, "0 to " + std::to_string(LONGEST));
  };
  check_entries(sequences.cu_seqlens_q, "cu_seqlens_q");
  check_entries(sequences.cu_seqlens_k, "cu_seqlens_k");
  require(sequences.cu_seqlens_k.shape() == sequences.cu_seqlens_q.shape(), "cu_seqlens_k",
          to_text(sequences.cu_seqlens_k.shape()), to_text(sequences.cu_seqlens_q.shape()) + ", as cu_seqlens_q");
  check_longest(sequences.max_seqlen_q, "max_seqlen_q");
  check_longest(sequences.max_seqlen_k, "max_seqlen_k");
}

template <typename T>
void check_varlen_forward(const FlashForward<T>& problem, const Sequences& sequences) {
  check_flash_forward(problem);
  require(problem.query.size(0) == 1, "query", to_text(problem.query.shape()), "[1, H, Tq, D]: one batch item");
  check_sequences(sequences);
}

template <typename T>
void check_varlen_backward(const FlashBackward<T>& problem, const Sequences& sequences) {
  check_flash_backward(problem);
  require(problem.query.size(0) == 1, "query", to_text(problem.query.shape()), "[1, H, Tq, D]: one batch item");
  check_sequences(sequences);
}

}  // namespace flashkata
