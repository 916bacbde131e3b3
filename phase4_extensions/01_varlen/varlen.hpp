#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/attention/arguments.hpp"
#include "flash_varlen.hpp"

namespace flashkata {

// ---- Packing: from a batch with padding to its tokens alone, and back -----------------------------------------------

/// Where the T tokens of a batch [B, S] stand, one sequence after the other.
struct Packing {
  std::vector<Index> places;             // [T], ascending: packed token t is token places[t] % S of item places[t] / S
  std::vector<std::int32_t> cu_seqlens;  // [B + 1], "cumulative": item b has the packed tokens cu_seqlens[b] up to, but
                                         // not including, cu_seqlens[b + 1]; the first entry is 0, the last is T
  Index max_seqlen = 0;                  // tokens of the longest item
};

/// The packing of a mask [B, S], true = a token, false = padding, in any pattern. B and S may be 0.
Packing packing_of(const BoolMatrix& mask);

/// The tokens of x [B, S, E], one after the other: [T, E]. Padding is not read.
Tensor<float, 2> pack(View<const float, 3> x, const Packing& packing);

/// The way back: tokens [T, E] to their places in [B, S, E], S being `length`, and 0 in all others.
Tensor<float, 3> unpack(View<const float, 2> tokens, const Packing& packing, Index length);

// ---- Attention over packed sequences --------------------------------------------------------------------------------

/// flash_varlen_forward() and flash_varlen_backward() (flash_varlen.hpp) in host memory, under the same rules: one call
/// of step 2.03 or 3.03 for each sequence. Throws std::invalid_argument also when an entry of cu_seqlens is not as
/// Sequences says.
void tiled_varlen_forward(const FlashForward<float>& problem, const Sequences& sequences);
void tiled_varlen_backward(const FlashBackward<float>& problem, const Sequences& sequences);

// ---- From the model's tensors and back ------------------------------------------------------------------------------

/// eager_bidirectional() and eager_causal() of phase 1 on the GPU, without a product for padding: the tokens are
/// packed, attended to by flash_varlen_forward(), and unpacked.
///
/// q [B, Sq, H*D], k and v [B, Sk, H*D] in host memory, D one of 16, 32, 64, 128; scale 1 / sqrt(D); the columns are
/// neighbours, tokens and batch items may lie apart. mask [B, S], true = a token: it says so of queries and keys
/// alike, so with a mask Sq and Sk are equal. Returns [B, Sq, H*D], in which padding has 0. What padding holds, NaN and
/// inf included, reaches nobody.
Tensor<float, 3> flash_bidirectional(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v,
                                     Index num_heads, const PaddingMask& mask = {});
Tensor<float, 3> flash_causal(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v, Index num_heads,
                              const PaddingMask& mask = {});

// ---- The checks. Each throws std::invalid_argument naming the argument, its value and what is allowed ---------------

/// A packing of `items` batch items of `length` places each, for `tokens` tokens.
inline void check_packing(const Packing& packing, Index items, Index length, Index tokens) {
  require(packing.cu_seqlens.size() == static_cast<std::size_t>(items) + 1, "packing",
          std::to_string(packing.cu_seqlens.size()) + " entries in cu_seqlens", std::to_string(items) + " + 1");
  require(packing.places.size() == static_cast<std::size_t>(tokens), "packing",
          std::to_string(packing.places.size()) + " places", std::to_string(tokens) + ", one for each token");
  for (const Index place : packing.places) {
    require(place >= 0 && place < items * length, "packing", "the place " + std::to_string(place),
            "0 or more and below B * S = " + std::to_string(items * length));
  }
}

inline void check_pack(const View<const float, 3>& x, const Packing& packing) {
  check_packing(packing, x.size(0), x.size(1), static_cast<Index>(packing.places.size()));
}

inline void check_unpack(const View<const float, 2>& tokens, const Packing& packing, Index length) {
  require(length >= 0, "length", length, "at least 0");
  require(!packing.cu_seqlens.empty(), "packing", "no entry in cu_seqlens", "B + 1 of them");
  check_packing(packing, static_cast<Index>(packing.cu_seqlens.size()) - 1, length, tokens.size(0));
}

/// The entries themselves, in host memory: from 0 on, never backwards, to no more than `tokens`, none too long.
inline void check_cu_seqlens(const View<const std::int32_t, 1>& entries, Index tokens, Index longest,
                             const std::string& which) {
  const std::string name = "cu_seqlens_" + which;
  require(entries(0) == 0, name, "first " + std::to_string(entries(0)), "0: there the first sequence begins");
  for (Index b = 0; b + 1 < entries.size(0); ++b) {
    const Index length = static_cast<Index>(entries(b + 1)) - entries(b);
    const std::string sequence = "sequence " + std::to_string(b) + " of length " + std::to_string(length);
    require(length >= 0, name, sequence, "0 or more");
    require(length <= longest, "max_seqlen_" + which, longest, "at least " + std::to_string(length) + ", " + sequence);
  }
  const Index last = entries(entries.size(0) - 1);
  require(last <= tokens, name, "last " + std::to_string(last),
          "at most the number of tokens, " + std::to_string(tokens));
}

/// Both cu_seqlens of a problem in host memory.
template <typename Problem>
void check_cu_seqlens(const Problem& problem, const Sequences& sequences) {
  check_cu_seqlens(sequences.cu_seqlens_q, problem.query.size(2), sequences.max_seqlen_q, "q");
  check_cu_seqlens(sequences.cu_seqlens_k, problem.key.size(2), sequences.max_seqlen_k, "k");
}

inline void check_padded(const View<const float, 3>& q, const View<const float, 3>& k, const View<const float, 3>& v,
                         Index num_heads, const PaddingMask& mask) {
  check_model_layout(q, k, v, num_heads, mask);
  const Index width = q.size(2) / num_heads;
  require(width == 16 || width == 32 || width == 64 || width == 128, "q", to_text(q.shape()),
          "[B, Sq, H*D] with D one of 16, 32, 64, 128");
  require(v.size(2) == k.size(2), "v", to_text(v.shape()), to_text(k.shape()) + ", as k");
  if (mask) require(q.size(1) == k.size(1), "q", to_text(q.shape()), "as many tokens as k where there is a mask");
}

}  // namespace flashkata
