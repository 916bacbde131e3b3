#pragma once

#include <optional>

#include "common/attention/not_implemented.hpp"
#include "phase2_forward/flash.hpp"

namespace flashkata {

/// One step of decoding: few queries, a long cache. Sequence b has `lengths(b)` keys in its cache; its Sq queries are
/// its newest tokens, whose keys are already there. K and V have Hk heads: query head h reads key/value head
/// h / (H / Hk). Rows lie as in phase2_forward/flash.hpp; the partial results are packed, one row after the other.
///
/// The keys of each sequence are cut into `splits()` parts of about the same length. Part s of a row leaves its average
/// of values and the log-sum-exp of its scores, and the merge of all parts is the row's output.
template <typename T>
struct Decode {
  View<const T, 4> query;                  // [B, H, Sq, D], Sq 1 to 16, D one of 16, 32, 64, 128
  View<const T, 4> key;                    // [B, Hk, capacity, D], H a multiple of Hk
  View<const T, 4> value;                  // [B, Hk, capacity, D]
  View<const std::int32_t, 1> lengths;     // [B], keys in use, 0 to capacity; what lies behind them is anything, or NaN
  View<T, 4> output;                       // [B, H, Sq, D]
  std::optional<View<float, 3>> lse = {};  // [B, H, Sq], natural logarithm, for whoever wants it
  View<float, 5> partial_output;           // [splits, B, H, Sq, D]
  View<float, 4> partial_lse;              // [splits, B, H, Sq]
  bool causal = true;                      // query i sees key j when j <= i + length - Sq: the last query sees all
  std::optional<float> scale = {};         // multiplies query key^T; default 1 / sqrt(D)

  Index splits() const { return partial_lse.size(0); }
};

namespace decode_detail {

// What a cache in one piece and one in pages (step 07) have in common.
template <typename Problem>
void check_rows(const Problem& problem, const char* key_name, Index key_heads) {
  const Shape<4>& q = problem.query.shape();
  const Index width = q[3];
  require(width == 16 || width == 32 || width == 64 || width == 128, "query", to_text(q),
          "[B, H, Sq, D] with D one of 16, 32, 64, 128");
  require(q[2] >= 1 && q[2] <= 16, "query", to_text(q), "[B, H, Sq, D] with Sq from 1 to 16");
  require(key_heads > 0 && q[1] % key_heads == 0, key_name, std::to_string(key_heads) + " heads",
          "a number of heads that divides H = " + std::to_string(q[1]));
  const Shape<1> sequences{q[0]};
  require(problem.lengths.shape() == sequences, "lengths", to_text(problem.lengths.shape()),
          to_text(sequences) + ", [B]");
  require(problem.output.shape() == q, "output", to_text(problem.output.shape()), to_text(q) + ", as query");
  const Shape<3> rows{q[0], q[1], q[2]};
  if (problem.lse) {
    require(problem.lse->shape() == rows, "lse", to_text(problem.lse->shape()), to_text(rows) + ", [B, H, Sq]");
  }
  const Index splits = problem.partial_lse.size(0);
  require(splits >= 1, "partial_lse", to_text(problem.partial_lse.shape()),
          "[splits, B, H, Sq] with splits at least 1");
  const auto check_packed = [](const auto& view, const char* name, const auto& shape) {
    require(view.shape() == shape, name, to_text(view.shape()), to_text(shape));
    const auto packed = std::remove_cvref_t<decltype(view)>(view.data(), shape);
    require(view.strides() == packed.strides(), name, "strides " + to_text(view.strides()),
            to_text(packed.strides()) + ", one row after the other");
    flash_detail::check_address(view.data(), name);
  };
  check_packed(problem.partial_lse, "partial_lse", Shape<4>{splits, q[0], q[1], q[2]});
  check_packed(problem.partial_output, "partial_output", Shape<5>{splits, q[0], q[1], q[2], width});
  require(std::isfinite(problem.scale.value_or(1.0f)), "scale", problem.scale.value_or(1.0f), "a finite number");
  flash_detail::check_layout(problem.query, "query");
  flash_detail::check_layout(problem.output, "output");
}

}  // namespace decode_detail

/// Throws std::invalid_argument naming the argument, its value and what is allowed. Stubs call it in their first line.
/// It does not look at the lengths themselves, which may lie on the GPU: check_lengths() does.
template <typename T>
void check_decode(const Decode<T>& problem) {
  const Shape<4>& k = problem.key.shape();
  decode_detail::check_rows(problem, "key", k[1]);
  const Shape<4> keys{problem.query.size(0), k[1], k[2], problem.query.size(3)};
  require(k == keys, "key", to_text(k), to_text(keys) + ", [B, Hk, capacity, D]");
  require(problem.value.shape() == k, "value", to_text(problem.value.shape()), to_text(k) + ", as key");
  constexpr Index LONGEST = std::numeric_limits<int>::max() / 2;
  require(k[2] <= LONGEST, "key", to_text(k), "a capacity of at most " + std::to_string(LONGEST));
  flash_detail::check_layout(problem.key, "key");
  flash_detail::check_layout(problem.value, "value");
}

/// Throws std::invalid_argument unless every length is from 0 to `capacity`.
inline void check_lengths(const View<const std::int32_t, 1>& lengths, Index capacity) {
  for (Index b = 0; b < lengths.size(0); ++b) {
    require(lengths(b) >= 0 && lengths(b) <= capacity, "lengths",
            std::to_string(lengths(b)) + " for sequence " + std::to_string(b), "0 to " + std::to_string(capacity));
  }
}

/// Into how many parts to cut the keys, so that a GPU of so many multiprocessors has enough blocks to keep its memory
/// busy, when there is one block for each part of each key/value head of each sequence, and the longest sequence has
/// `longest` keys. At least 1, and
///   - worth the merge:  no more than 1 where longest is below 256, and never more than longest / 128;
///   - busy:             as far as that allows, at least 1 block for each multiprocessor;
///   - no more than that takes: with one part less there would be fewer than 16 blocks for each multiprocessor;
///   - in order:         more keys never mean fewer parts, more sequences or heads never more.
/// Throws std::invalid_argument unless batch, kv_heads and multiprocessors are at least 1 and longest at least 0.
int choose_splits(Index batch, Index kv_heads, Index longest, int multiprocessors);

/// The checks that choose_splits() promises.
inline void check_choose_splits(Index batch, Index kv_heads, Index longest, int multiprocessors) {
  require(batch >= 1, "batch", batch, "at least 1");
  require(kv_heads >= 1, "kv_heads", kv_heads, "at least 1");
  require(longest >= 0, "longest", longest, "at least 0");
  require(multiprocessors >= 1, "multiprocessors", multiprocessors, "at least 1");
}

/// Decoding on the CPU; all memory is the host's. The parts of a row are merged by merge_partials() of step 2.02.
///
/// Part s of a row leaves in partial_lse(s, ...) the log-sum-exp of its scores, -inf if the row sees none of its keys,
/// and in partial_output(s, ...) its average of values, anything if it sees none; with one part they may be left alone.
/// No part of a sequence has more keys than twice its share, ceil(length / splits), or than 64 if that is more. The
/// output does not depend on the number of parts but for rounding. A query that sees no key gets output 0 and lse -inf.
/// What a key that it may not see and its value hold, NaN and inf included, never reaches a query. The same inputs give
/// the same bits. Throws std::invalid_argument, before anything is written, also where a length is not from 0 to
/// capacity.
void tiled_decode(const Decode<float>& problem);

/// The same on the GPU; all memory is the GPU's, and no more of it than the arguments. The keys of a part are read by
/// all query heads of their group together: for up to 4 queries (over the group's heads) each key is loaded once, and
/// no more often than once for every 4 if there are more; keys behind a sequence's length are not loaded. Lengths that
/// are not from 0 to capacity cannot be found out here.
void flash_decode(const Decode<float>& problem, const Stream& stream = {});
void flash_decode(const Decode<fp16>& problem, const Stream& stream = {});
void flash_decode(const Decode<bf16>& problem, const Stream& stream = {});

}  // namespace flashkata
