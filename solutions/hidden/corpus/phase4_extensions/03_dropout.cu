// Answers to 03_dropout, wrong and right. Every deviation stands where somebody made it.
//
// One query or one key a thread; the width of a row is an argument, so that each kernel is compiled once.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "../corpus.hpp"
#include "common/attention/tensor.hpp"
#include "dropout.hpp"

namespace flashkata {
namespace {

using corpus::RIGHT;
using corpus::UNNAMED;

// X(what the functions call it, the answer's name, its mistake)
// clang-format off
#define DROPOUT_ANSWERS(X) \
  X(heads_alike, "the same mask for all heads", "dropout-heads-alike") \
  X(items_alike, "the same mask for all batch items", "dropout-items-alike") \
  X(queries_alike, "the same mask for all queries", "dropout-queries-alike") \
  X(keys_alike, "queries fall, not weights", "dropout-keys-alike") \
  X(sum_of_places, "a function of i + j", "dropout-sum-of-places") \
  X(sum_of_heads, "a function of b + h", "dropout-sum-of-heads") \
  X(symmetric, "a function of i and j in any order", UNNAMED) \
  X(separable, "the bit of a row xor the bit of a column", UNNAMED) \
  X(seed_low, "the upper half of the seed ignored", "dropout-seed-32") \
  X(offset_low, "the upper half of the offset ignored", "dropout-offset-32") \
  X(offset_ignored, "the offset ignored", "dropout-rng-offset") \
  X(seed_ignored, "the seed ignored", "dropout-seed-ignored") \
  X(seed_plus_offset, "seed and offset added", "dropout-seed-plus-offset") \
  X(offset_moves_keys, "the offset added to the key", "dropout-offset-moves") \
  X(offset_moves_heads, "the offset added to the head", "dropout-offset-moves") \
  X(head_number, "b H + h for the head", "dropout-of-the-shape") \
  X(place_number, "i Sk + j for the place", "dropout-of-the-shape") \
  X(length_in_key, "Sk in the key", "dropout-of-the-shape") \
  X(four_alike, "four neighbours share a word", "dropout-words-shared") \
  X(places_in_tile, "places within a tile of 32", "dropout-local-places") \
  X(places_of_16_bits, "places of 16 bits", UNNAMED) \
  X(heads_of_8_bits, "h beside b in 8 bits", UNNAMED) \
  X(rows_of_12_bits, "i beside j in 12 bits", UNNAMED) \
  X(rows_of_20_bits, "i beside j in 20 bits", UNNAMED) \
  X(queries_of_20_bits, "j beside i in 20 bits", UNNAMED) \
  X(heads_of_16_bits, "h beside b in 16 bits", UNNAMED) \
  X(at_most_95, "probabilities above 0.95 taken for it", UNNAMED) \
  X(twelve_bits, "probabilities in steps of 1/4096", UNNAMED) \
  X(threshold_inverted, "keeps with the probability that it should drop with", "dropout-keeps-p") \
  X(signed_words, "words as signed numbers", UNNAMED) \
  X(eight_bits, "probabilities in steps of 1/256", UNNAMED) \
  X(float_rounding, "probabilities in steps of 1/10", UNNAMED) \
  X(one_round, "a mixture of one round", UNNAMED) \
  X(goes_on, "a generator that goes on from call to call", UNNAMED) \
  X(in_eval, "dropout-in-eval", "dropout-in-eval") \
  X(eval_divides, "weights divided in evaluation", "dropout-eval-divides") \
  X(mask_transposed, "dropout_mask of (j, i)", "dropout-rng-transposed") \
  X(mask_of_its_own, "dropout_mask from a generator of its own", UNNAMED) \
  X(mask_inverted, "dropout_mask says what falls", "dropout-mask-inverted") \
  X(before_sum, "dropout-before-sum", "dropout-before-sum") \
  X(before_sum_divided, "dropout-before-sum, and divided", "dropout-before-sum") \
  X(on_scores, "fallen scores of 0", "dropout-on-scores") \
  X(no_rescale, "dropout-no-rescale", "dropout-no-rescale") \
  X(no_rescale_forward, "dropout-no-rescale, on the way forward alone", "dropout-no-rescale") \
  X(rescale_inverse, "multiplied by 1 - p", "dropout-rescale-inverse") \
  X(rescale_by_p, "divided by p", "dropout-rescale-by-p") \
  X(rescale_twice, "divided twice", "dropout-rescale-twice") \
  X(lse_of_kept, "lse of the kept weights only", "dropout-lse-of-kept") \
  X(lse_divided, "lse of the divided weights", UNNAMED) \
  X(all_fallen_blind, "lse of -inf where everything fell", UNNAMED) \
  X(all_fallen_nan, "0/0 where everything fell", UNNAMED) \
  X(channels_fall, "channels of the output fall", UNNAMED) \
  X(first_tile_only, "no dropout behind the first tile of keys", UNNAMED) \
  X(last_tile_whole, "no dropout in a ragged last tile", UNNAMED) \
  X(gpu_not_at_all, "no dropout on the GPU", UNNAMED) \
  X(gpu_seed_low, "a seed of 32 bits on the GPU", UNNAMED) \
  X(gpu_offset_low, "an offset of 32 bits on the GPU", UNNAMED) \
  X(gpu_item_and_head, "b and h exchanged on the GPU", UNNAMED) \
  X(gpu_heads_beyond_4, "heads beyond the fourth as the first on the GPU", UNNAMED) \
  X(gpu_by_thread, "keyed on block and thread on the GPU", UNNAMED) \
  X(gpu_from_diagonal, "keys counted from the diagonal under a causal mask", UNNAMED) \
  X(cpu_otherwise, "another mask on the CPU", UNNAMED) \
  X(cpu_not_at_all, "no dropout on the CPU", UNNAMED) \
  X(cpu_causal_ignored, "causal ignored on the CPU", UNNAMED) \
  X(cpu_masked_nan, "masked-nan-leak on the CPU", UNNAMED) \
  X(cpu_strides, "packed rows on the CPU", UNNAMED) \
  X(cpu_blind, "queries that see nothing left unwritten on the CPU", UNNAMED) \
  X(cpu_dk_added, "dK added to what was there on the CPU", UNNAMED) \
  X(cpu_scale, "scale-arg-ignored on the CPU", UNNAMED) \
  X(bwd_dp_unmasked, "dropout-bwd-mask-missing", "dropout-bwd-mask-missing") \
  X(bwd_dv_unmasked, "dV from all weights", "dropout-bwd-dv-unmasked") \
  X(bwd_none, "no dropout on the way back", "dropout-bwd-none") \
  X(bwd_dp_undivided, "dP masked and not divided", "dropout-bwd-dp-undivided") \
  X(bwd_dv_undivided, "dV masked and not divided", "dropout-bwd-dv-undivided") \
  X(bwd_outer, "dS masked instead of dP", "dropout-bwd-outer") \
  X(bwd_delta_of_all, "delta from all weights", "dropout-bwd-delta-of-all") \
  X(bwd_delta_divided, "delta divided by 1 - p", "dropout-bwd-delta-divided") \
  X(bwd_no_delta, "bwd-no-D", UNNAMED) \
  X(bwd_transposed, "key (j, i) on the way back", "dropout-rng-transposed") \
  X(bwd_by_thread, "keyed on tile and thread on the way back", "dropout-rng-fwd-bwd") \
  X(bwd_next_offset, "the next offset on the way back", "dropout-rng-fwd-bwd") \
  X(bwd_dq_unmasked, "the kernel of dQ without the mask", "dropout-bwd-dq-kernel") \
  X(bwd_dq_transposed, "the kernel of dQ with (j, i)", UNNAMED) \
  X(bwd_in_eval, "dropout on the way back of an evaluation", UNNAMED) \
  X(bwd_lse_of_kept, "an lse of the kept weights taken for granted", UNNAMED) \
  X(bwd_race, "dQ added without atomics", "global-memory race") \
  X(bwd_deterministic_ignored, "deterministic ignored", UNNAMED) \
  X(causal_ignored, "causal ignored", UNNAMED) \
  X(causal_alignment, "causal aligned to the top left", UNNAMED) \
  X(masked_nan, "masked-nan-leak", UNNAMED) \
  X(heads_first_only, "keys of the first head", UNNAMED) \
  X(noncontiguous, "packed rows", UNNAMED) \
  X(scale_ignored, "scale-arg-ignored", UNNAMED) \
  X(writes_query, "scales the queries in place", "is an input") \
  X(unchecked, "the problem unchecked", UNNAMED) \
  X(unchecked_probability, "the probability unchecked", UNNAMED) \
  X(checked_in_training, "the probability checked in training alone", UNNAMED) \
  X(one_allowed, "a probability of 1 allowed", UNNAMED) \
  X(nan_allowed, "a probability of NaN allowed", UNNAMED) \
  X(mask_in_memory, "the mask in memory", "beyond the arguments") \
  X(from_global, "keys straight from global memory", "times its size") \
  X(not_skipped, "blind tiles not skipped", "see nothing of each other") \
  X(no_barrier_before, "no barrier before the load", "shared-memory race") \
  X(no_barrier_after, "no barrier after the load", "shared-memory race") \
  X(load_unguarded, "tail rows loaded without a guard", "out of bounds") \
  X(right_one_call, "right: a call of Philox for each weight", RIGHT) \
  X(right_four_queries, "right: four queries share a call", RIGHT) \
  X(right_halves, "right: eight keys share a call, 16 bits each", RIGHT) \
  X(right_apart, "right: keys 16 apart share a call", RIGHT) \
  X(right_seven_rounds, "right: Philox of seven rounds", RIGHT) \
  X(right_splitmix, "right: splitmix64 over the six numbers", RIGHT) \
  X(right_threefry, "right: Threefry-2x32", RIGHT) \
  X(right_other_end, "right: falls at the upper end", RIGHT) \
  X(right_divided_last, "right: the output divided at the end", RIGHT) \
  X(right_delta_trick, "right: dS = P (mask dP - (1 - p) delta) / (1 - p)", RIGHT) \
  X(right_double, "right: double accumulation", RIGHT) \
  X(right_tiles_of_16, "right: tiles of 16, blocks of 128", RIGHT) \
  X(right_no_atomics, "right: deterministic without being asked", RIGHT)
// clang-format on

enum class Play {
  none,
#define X(id, name, mistake) id,
  DROPOUT_ANSWERS(X)
#undef X
};

const corpus::Answers answers{
#define X(id, name, mistake) {name, mistake},
    DROPOUT_ANSWERS(X)
#undef X
};

Play chosen_play() {
#define X(id, answer, mistake) \
  if (corpus::name() == answer) return Play::id;
  DROPOUT_ANSWERS(X)
#undef X
  return Play::none;
}

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr int WIDEST = 128;

// ---- From the six numbers to a word ---------------------------------------------------------------------------------

// Who asks for a weight's fate.
enum class Asks { mask, cpu_forward, cpu_backward, forward, backward_keys, backward_queries };

KATA_BOTH bool on_gpu(Asks asks) { return asks >= Asks::forward; }
KATA_BOTH bool on_the_way_back(Asks asks) { return asks == Asks::cpu_backward || asks >= Asks::backward_keys; }

struct Place {
  Index b, h, i, j;
};

struct Rule {
  Play play;
  std::uint64_t seed, offset;
  float probability;
  bool drops;
  float factor;
  Index heads, keys;  // of the shape
  bool causal;
  Index diagonal;  // Sk - Sq
};

KATA_BOTH std::uint32_t low(std::uint64_t x) { return static_cast<std::uint32_t>(x); }
KATA_BOTH std::uint32_t high(std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); }
KATA_BOTH std::uint32_t word_of(const Words4& four, Index n) {
  return n < 2 ? (n == 0 ? four.x : four.y) : (n == 2 ? four.z : four.w);
}

KATA_BOTH Words4 rounds_of_philox(int rounds, Words4 c, Words2 key) {
  for (int round = 0; round < rounds; ++round) {
    const std::uint64_t x = std::uint64_t{0xD2511F53} * c.x;
    const std::uint64_t z = std::uint64_t{0xCD9E8D57} * c.z;
    c = {high(z) ^ c.y ^ key.x, low(z), high(x) ^ c.w ^ key.y, low(x)};
    key.x += 0x9E3779B9;
    key.y += 0xBB67AE85;
  }
  return c;
}

KATA_BOTH std::uint64_t splitmix(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// Salmon et al. 2011, section 3.2: 20 rounds.
KATA_BOTH Words2 threefry(Words2 counter, Words2 key) {
  const std::uint32_t keys[3] = {key.x, key.y, 0x1BD11BDAu ^ key.x ^ key.y};
  const int turns[8] = {13, 15, 26, 6, 17, 29, 16, 24};
  std::uint32_t x = counter.x + keys[0];
  std::uint32_t y = counter.y + keys[1];
  for (int round = 0; round < 20; ++round) {
    x += y;
    y = (y << turns[round % 8]) | (y >> (32 - turns[round % 8]));
    y ^= x;
    if (round % 4 == 3) {
      const int n = round / 4 + 1;
      x += keys[n % 3];
      y += keys[(n + 1) % 3] + static_cast<std::uint32_t>(n);
    }
  }
  return {x, y};
}

KATA_BOTH std::uint32_t random_word(const Rule& rule, const Place& p) {
  const Play play = rule.play;
  const auto b = static_cast<std::uint32_t>(p.b), h = static_cast<std::uint32_t>(p.h);
  const auto i = static_cast<std::uint32_t>(p.i), j = static_cast<std::uint32_t>(p.j);
  const Words2 seed{low(rule.seed), high(rule.seed)};
  if (play == Play::right_splitmix) {
    std::uint64_t x = splitmix(splitmix(rule.seed) + rule.offset);
    x = splitmix(x + (std::uint64_t{b} << 32 | h));
    return high(splitmix(x + (std::uint64_t{i} << 32 | j)));
  }
  if (play == Play::right_threefry) {
    const Words2 call = threefry({low(rule.offset), high(rule.offset)}, seed);
    const Words2 head = threefry({b, h}, call);
    return threefry({i, j}, head).x;
  }
  const Words4 head = philox4x32_10({b, h, low(rule.offset), high(rule.offset)}, seed);
  if (play == Play::place_number) {
    return philox4x32_10({static_cast<std::uint32_t>(p.i * rule.keys + p.j), 0, head.z, head.w}, {head.x, head.y}).x;
  }
  if (play == Play::one_round) return rounds_of_philox(1, {j, i, head.z, head.w}, {head.x, head.y}).x;
  if (play == Play::right_seven_rounds) {
    return word_of(rounds_of_philox(7, {j / 4, i, head.z, head.w}, {head.x, head.y}), p.j % 4);
  }
  if (play == Play::right_one_call) return philox4x32_10({i, j, head.x, head.y}, {head.z, head.w}).w;
  if (play == Play::right_four_queries) {
    return word_of(philox4x32_10({j, i / 4, head.z, head.w}, {head.x, head.y}), p.i % 4);
  }
  if (play == Play::right_apart) {
    return word_of(philox4x32_10({j / 64 * 16 + j % 16, i, head.z, head.w}, {head.x, head.y}), p.j / 16 % 4);
  }
  if (play == Play::right_halves) {
    const std::uint32_t word = word_of(philox4x32_10({j / 8, i, head.z, head.w}, {head.x, head.y}), p.j / 2 % 4);
    return j % 2 == 0 ? word << 16 | 0x8000u : (word & 0xffff0000u) | 0x8000u;
  }
  if (play == Play::separable) {
    const std::uint32_t row = philox4x32_10({i, 0, head.z, head.w}, {head.x, head.y}).x;
    return row ^ philox4x32_10({j, 1, head.z, head.w}, {head.x, head.y}).x;
  }
  return word_of(philox4x32_10({j / 4, i, head.z, head.w}, {head.x, head.y}), play == Play::four_alike ? 0 : p.j % 4);
}

// Does the weight stay? `tile` and `thread` are those of who asks.
KATA_BOTH bool stays(Rule rule, Place p, Asks asks, int tile = 32, int thread = 0) {
  const Play play = rule.play;
  if (!rule.drops && !(play == Play::bwd_in_eval && on_the_way_back(asks) && rule.probability > 0.0f)) return true;
  const bool gpu = on_gpu(asks);
  const bool back = on_the_way_back(asks);
  if (play == Play::gpu_not_at_all && gpu) return true;
  if (play == Play::cpu_not_at_all && !gpu && asks != Asks::mask) return true;
  if (play == Play::first_tile_only && gpu && p.j >= 32) return true;
  if (play == Play::last_tile_whole && gpu && p.j >= rule.keys / 32 * 32) return true;
  if (play == Play::heads_alike) p.h = 0;
  if (play == Play::items_alike) p.b = 0;
  if (play == Play::queries_alike) p.i = 0;
  if (play == Play::keys_alike) p.j = 0;
  if (play == Play::sum_of_places) p = {p.b, p.h, p.i + p.j, 0};
  if (play == Play::sum_of_heads) p = {0, p.b + p.h, p.i, p.j};
  if (play == Play::symmetric && p.i > p.j) p = {p.b, p.h, p.j, p.i};
  if (play == Play::seed_low || (play == Play::gpu_seed_low && gpu)) rule.seed = low(rule.seed);
  if (play == Play::offset_low || (play == Play::gpu_offset_low && gpu)) rule.offset = low(rule.offset);
  if (play == Play::seed_ignored) rule.seed = 0;
  if (play == Play::seed_plus_offset) rule.seed += rule.offset;
  if (play == Play::offset_moves_keys) p.j += static_cast<Index>(rule.offset % 1000000007u);
  if (play == Play::offset_moves_heads) p.h += static_cast<Index>(rule.offset % 1000000007u);
  if (play == Play::offset_ignored || play == Play::seed_plus_offset || play == Play::offset_moves_keys ||
      play == Play::offset_moves_heads) {
    rule.offset = 0;
  }
  if (play == Play::head_number) p = {0, p.b * rule.heads + p.h, p.i, p.j};
  if (play == Play::length_in_key) rule.seed += static_cast<std::uint64_t>(rule.keys) << 20;
  if (play == Play::places_in_tile) p = {p.b, p.h, p.i % 32, p.j % 32};
  if (play == Play::places_of_16_bits) p = {p.b, p.h, p.i % 65536, p.j % 65536};
  if (play == Play::heads_of_8_bits) p = {0, p.b * 256 + p.h, p.i, p.j};
  if (play == Play::rows_of_12_bits) p = {p.b, p.h, 0, p.i * 4096 + p.j};
  if (play == Play::rows_of_20_bits) p = {p.b, p.h, p.i + (p.j >> 20), p.j % (1 << 20)};
  if (play == Play::queries_of_20_bits) p = {p.b, p.h, p.i % (1 << 20), p.j + (p.i >> 20)};
  if (play == Play::heads_of_16_bits) p = {0, p.b * 65536 + p.h, p.i, p.j};
  if (play == Play::gpu_item_and_head && gpu) std::swap(p.b, p.h);
  if (play == Play::gpu_heads_beyond_4 && gpu && p.h >= 4) p.h = 0;
  if (play == Play::gpu_from_diagonal && gpu && rule.causal) p.j += 100000 - p.i;
  if (play == Play::cpu_otherwise && !gpu && asks != Asks::mask) rule.seed ^= 1;
  if ((play == Play::gpu_by_thread && gpu) || (play == Play::bwd_by_thread && asks >= Asks::backward_keys)) {
    p = {p.b, p.h, p.i / tile, (p.j / tile) * 100000 + thread * 100 + (thread == p.i % tile ? p.j : p.i) % tile};
  }
  if (play == Play::bwd_by_thread && asks == Asks::cpu_backward) std::swap(p.i, p.h);
  if (play == Play::bwd_transposed && back) std::swap(p.i, p.j);
  if (play == Play::mask_transposed && asks == Asks::mask) std::swap(p.i, p.j);
  if (play == Play::bwd_dq_transposed && asks == Asks::backward_queries) std::swap(p.i, p.j);
  if (play == Play::bwd_next_offset && back) ++rule.offset;

  const std::uint32_t word = random_word(rule, p);
  double probability = static_cast<double>(rule.probability);
  if (play == Play::at_most_95 && probability > 0.95) probability = 0.95;
  if (play == Play::twelve_bits) probability = rint(probability * 4096.0) / 4096.0;
  const auto threshold = static_cast<std::uint32_t>(4294967296.0 * probability);
  switch (play) {
    case Play::threshold_inverted:
      return word < threshold;
    case Play::signed_words:
      return static_cast<std::int32_t>(word) >= static_cast<std::int32_t>(2147483648.0 * probability);
    case Play::eight_bits:
      return static_cast<double>(word >> 24) >= rint(256.0 * probability);
    case Play::float_rounding:
      return static_cast<double>(word % 10u) >= floor(10.0 * probability + 0.5);
    case Play::right_other_end:
      return static_cast<double>(word) < 4294967296.0 * (1.0 - probability);
    case Play::mask_inverted:
      return asks == Asks::mask ? word < threshold : word >= threshold;
    default:
      return word >= threshold;
  }
}

template <typename Problem>
Rule rule_of(const Problem& problem, const Dropout& dropout) {
  const Play play = chosen_play();
  Rule rule{.play = play,
            .seed = dropout.seed,
            .offset = dropout.offset,
            .probability = dropout.probability,
            .drops = (dropout.training || play == Play::in_eval) && dropout.probability > 0.0f,
            .factor = 1.0f,
            .heads = problem.query.size(1),
            .keys = problem.key.size(2),
            .causal = problem.causal,
            .diagonal = problem.key.size(2) - problem.query.size(2)};
  if (rule.drops || play == Play::eval_divides || play == Play::bwd_in_eval) {
    const float stay = 1.0f - dropout.probability;
    rule.factor = play == Play::rescale_inverse ? stay
                  : play == Play::rescale_by_p  ? 1.0f / dropout.probability
                                                : 1.0f / stay;
    if (play == Play::no_rescale) rule.factor = 1.0f;
    if (play == Play::bwd_in_eval && !rule.drops) rule.factor = 1.0f;
  }
  if (play == Play::goes_on) {
    static std::uint64_t calls = 0;
    rule.offset += calls++;
  }
  return rule;
}

// ---- What a weight and a gradient become ----------------------------------------------------------------------------

// A running softmax over the keys of one query.
template <typename Real>
struct RunningRow {
  Real max = -INFINITE;
  Real sum = 0;       // of all weights, or of those that the answer takes for all
  Real kept_sum = 0;  // of those that stayed
  bool any = false;   // did one stay?
};

// What the key's value is multiplied by, and in `row.sum` what belongs there. `weight` is exp(score - max).
template <typename Real>
KATA_BOTH Real forward_weight(const Rule& rule, RunningRow<Real>& row, Real weight, bool stays) {
  const auto factor = static_cast<Real>(rule.factor);
  row.any = row.any || stays;
  if (stays) row.kept_sum += weight;
  switch (rule.play) {
    case Play::before_sum:
    case Play::before_sum_divided:
      if (stays) row.sum += weight;
      return stays ? (rule.play == Play::before_sum ? weight : weight * factor) : 0;
    case Play::no_rescale_forward:
    case Play::right_divided_last:
    case Play::channels_fall:
      row.sum += weight;
      return stays || rule.play == Play::channels_fall ? weight : 0;
    case Play::on_scores:
      row.sum += weight;
      return weight;
    case Play::rescale_twice:
      row.sum += weight;
      return stays ? weight * factor * factor : 0;
    default:
      row.sum += weight;
      return stays ? weight * factor : 0;
  }
}

template <typename Real>
KATA_BOTH float lse_of(const Rule& rule, const RunningRow<Real>& row) {
  Real sum = rule.play == Play::lse_of_kept ? row.kept_sum : row.sum;
  if (rule.play == Play::lse_divided) sum *= static_cast<Real>(rule.factor);
  if (rule.play == Play::all_fallen_blind && !row.any) sum = 0;
  if (!(sum > 0)) return -INFINITE;
  return static_cast<float>(row.max) + logf(static_cast<float>(sum));
}

// 1 / l, with what belongs to it.
template <typename Real>
KATA_BOTH Real last_factor(const Rule& rule, const RunningRow<Real>& row) {
  Real inverse = row.sum > 0 ? 1 / row.sum : 0;
  if (rule.play == Play::right_divided_last) inverse *= static_cast<Real>(rule.factor);
  if (rule.play == Play::all_fallen_nan && !row.any) inverse = static_cast<Real>(INFINITE);
  return inverse;
}

struct Pair {
  float of_value;  // what dO is multiplied by for dV
  float d_score;
};

KATA_BOTH Pair backward_pair(const Rule& rule, float weight, float d_weight, float delta, bool stays, Asks asks) {
  const float factor = rule.factor;
  float z = stays ? factor : 0.0f;
  float z_value = z;
  if (rule.play == Play::bwd_none) z = z_value = 1.0f;
  if (rule.play == Play::bwd_dp_unmasked) z = 1.0f;
  if (rule.play == Play::bwd_dv_unmasked) z_value = 1.0f;
  if (rule.play == Play::bwd_dp_undivided) z = stays ? 1.0f : 0.0f;
  if (rule.play == Play::bwd_dv_undivided) z_value = stays ? 1.0f : 0.0f;
  if (rule.play == Play::bwd_dq_unmasked && asks == Asks::backward_queries) z = 1.0f;
  const float of_value = z_value * weight;
  if (rule.play == Play::bwd_outer) return {of_value, z * weight * (d_weight - delta)};
  if (rule.play == Play::bwd_delta_divided) return {of_value, weight * (z * d_weight - factor * delta)};
  if (rule.play == Play::bwd_no_delta) return {of_value, weight * z * d_weight};
  if (rule.play == Play::right_delta_trick && rule.drops) {
    return {of_value, factor * weight * ((stays ? d_weight : 0.0f) - (1.0f - rule.probability) * delta)};
  }
  return {of_value, weight * (z * d_weight - delta)};
}

// ---- On the CPU: row by row -----------------------------------------------------------------------------------------

struct Sight {
  bool causal;
  Index queries, keys, diagonal;
  KATA_BOTH Index seen(Index i) const {
    const Index end = causal ? i + diagonal + 1 : keys;
    return end < 0 ? 0 : end > keys ? keys : end;
  }
};

template <typename Problem>
Sight sight_of(const Problem& problem, bool on_cpu) {
  const Play play = chosen_play();
  Sight sight{problem.causal && play != Play::causal_ignored && !(play == Play::cpu_causal_ignored && on_cpu),
              problem.query.size(2), problem.key.size(2), problem.key.size(2) - problem.query.size(2)};
  if (play == Play::causal_alignment) sight.diagonal = 0;
  return sight;
}

template <typename Problem>
float scale_of(const Problem& problem, bool on_cpu) {
  const Play play = chosen_play();
  const float usual = 1.0f / std::sqrt(static_cast<float>(problem.query.size(3)));
  if (play == Play::scale_ignored || (play == Play::cpu_scale && on_cpu)) return usual;
  return problem.scale.value_or(usual);
}

template <typename T>
View<T, 4> cpu_view(const View<T, 4>& view) {
  const bool packed = chosen_play() == Play::cpu_strides || chosen_play() == Play::noncontiguous;
  return packed ? View<T, 4>(view.data(), view.shape()) : view;
}

float dot_on_cpu(const float* one, const float* other, Index width) {
  float sum = 0.0f;
  for (Index d = 0; d < width; ++d) sum += one[d] * other[d];
  return sum;
}

template <typename Body>
void for_each_query(const Shape<4>& shape, const Body& body) {
  for (Index b = 0; b < shape[0]; ++b)
    for (Index h = 0; h < shape[1]; ++h)
      for (Index i = 0; i < shape[2]; ++i) body(b, h, i);
}

void forward_on_cpu(const FlashForward<float>& p, const Rule& rule) {
  const View<const float, 4> query = cpu_view(p.query), key = cpu_view(p.key), value = cpu_view(p.value);
  const View<float, 4> output = cpu_view(p.output);
  const Sight sight = sight_of(p, true);
  const float scale = scale_of(p, true);
  const Index width = query.size(3);
  std::vector<float> weights(static_cast<std::size_t>(sight.keys));
  for_each_query(query.shape(), [&](Index b, Index h, Index i) {
    const Index seen = sight.seen(i);
    if (seen == 0 && rule.play == Play::cpu_blind) return;
    const Index kh = rule.play == Play::heads_first_only ? 0 : h;
    RunningRow<float> row;
    for (Index j = 0; j < seen; ++j) {
      float& score = weights[static_cast<std::size_t>(j)];
      score = scale * dot_on_cpu(&query(b, h, i, 0), &key(b, kh, j, 0), width);
      if (rule.play == Play::on_scores && !stays(rule, {b, h, i, j}, Asks::cpu_forward)) score = 0.0f;
      row.max = std::max(row.max, score);
    }
    float* o_row = &output(b, h, i, 0);
    std::fill_n(o_row, width, 0.0f);
    const Index end = rule.play == Play::cpu_masked_nan || rule.play == Play::masked_nan ? sight.keys : seen;
    for (Index j = 0; j < end; ++j) {
      float p_kept = 0.0f;
      if (j < seen) {
        const float weight = std::exp(weights[static_cast<std::size_t>(j)] - row.max);
        p_kept = forward_weight(rule, row, weight, stays(rule, {b, h, i, j}, Asks::cpu_forward));
      }
      for (Index d = 0; d < width; ++d) o_row[d] += p_kept * value(b, kh, j, d);
    }
    for (Index d = 0; d < width; ++d) {
      o_row[d] *= last_factor(rule, row);
      if (rule.play == Play::channels_fall) o_row[d] *= stays(rule, {b, h, i, d}, Asks::cpu_forward) ? rule.factor : 0;
    }
    p.lse(b, h, i) = lse_of(rule, row);
  });
}

void backward_on_cpu(const FlashBackward<float>& p, const Rule& rule) {
  const Sight sight = sight_of(p, true);
  const float scale = scale_of(p, true);
  const Index width = p.query.size(3);
  const View<const float, 4> query = cpu_view(p.query), key = cpu_view(p.key), value = cpu_view(p.value);
  for_each_query(p.key.shape(), [&](Index b, Index h, Index j) {
    if (rule.play != Play::cpu_dk_added) std::fill_n(&p.d_key(b, h, j, 0), width, 0.0f);
    std::fill_n(&p.d_value(b, h, j, 0), width, 0.0f);
  });
  for_each_query(p.query.shape(), [&](Index b, Index h, Index i) {
    float* dq = &p.d_query(b, h, i, 0);
    const Index seen = sight.seen(i);
    if (seen == 0 && rule.play == Play::cpu_blind) return;
    std::fill_n(dq, width, 0.0f);
    const Index kh = rule.play == Play::heads_first_only ? 0 : h;
    const float* d_o = &p.d_output(b, h, i, 0);
    std::vector<float> weights(static_cast<std::size_t>(seen)), d_weights(static_cast<std::size_t>(seen));
    float delta = dot_on_cpu(d_o, &p.output(b, h, i, 0), width);
    float delta_of_all = 0.0f;
    float kept_sum = 0.0f;
    for (Index j = 0; j < seen; ++j) {
      const auto at = static_cast<std::size_t>(j);
      weights[at] = std::exp(scale * dot_on_cpu(&query(b, h, i, 0), &key(b, kh, j, 0), width) - p.lse(b, h, i));
      d_weights[at] = dot_on_cpu(d_o, &value(b, kh, j, 0), width);
      delta_of_all += weights[at] * d_weights[at];
      if (stays(rule, {b, h, i, j}, Asks::cpu_backward)) kept_sum += weights[at];
    }
    if (rule.play == Play::bwd_delta_of_all) delta = delta_of_all;
    for (Index j = 0; j < seen; ++j) {
      const auto at = static_cast<std::size_t>(j);
      if (rule.play == Play::bwd_lse_of_kept && kept_sum > 0.0f) weights[at] /= kept_sum;
      const Pair pair = backward_pair(rule, weights[at], d_weights[at], delta,
                                      stays(rule, {b, h, i, j}, Asks::cpu_backward), Asks::cpu_backward);
      for (Index d = 0; d < width; ++d) {
        dq[d] += scale * pair.d_score * key(b, kh, j, d);
        p.d_key(b, h, j, d) += scale * pair.d_score * query(b, h, i, d);
        p.d_value(b, h, j, d) += pair.of_value * d_o[d];
      }
    }
  });
}

// ---- On the GPU -----------------------------------------------------------------------------------------------------

struct Cut {
  int threads, tile;
};

Cut cut_of(Play play, bool backward) {
  if (play == Play::right_tiles_of_16) return {128, 16};
  return backward ? Cut{64, 16} : Cut{32, 32};
}

// Four neighbours of a row at once: the fewer accesses, the less there is to watch.
KATA_DEVICE void copy_row(float* to, const float* from, int width, bool inside) {
  for (int d = 0; d < width; d += 4) {
    *reinterpret_cast<float4*>(to + d) =
        inside ? *reinterpret_cast<const float4*>(from + d) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
}

template <typename Real>
KATA_DEVICE Real dot(const float* one, const float* other, int width) {
  Real sum = 0;
  for (int d = 0; d < width; d += 4) {
    const float4 a = *reinterpret_cast<const float4*>(one + d);
    const float4 b = *reinterpret_cast<const float4*>(other + d);
    sum += static_cast<Real>(a.x) * static_cast<Real>(b.x);
    sum += static_cast<Real>(a.y) * static_cast<Real>(b.y);
    sum += static_cast<Real>(a.z) * static_cast<Real>(b.z);
    sum += static_cast<Real>(a.w) * static_cast<Real>(b.w);
  }
  return sum;
}

template <typename Real>
KATA_DEVICE void add_times(Real* sum, Real by, const float* row, int width) {
  for (int d = 0; d < width; d += 4) {
    const float4 four = *reinterpret_cast<const float4*>(row + d);
    sum[d] += by * static_cast<Real>(four.x);
    sum[d + 1] += by * static_cast<Real>(four.y);
    sum[d + 2] += by * static_cast<Real>(four.z);
    sum[d + 3] += by * static_cast<Real>(four.w);
  }
}

template <typename T>
KATA_DEVICE T* row_of(Play play, const View<T, 4>& view, Index b, Index h, Index s) {
  if (play == Play::noncontiguous) return view.data() + ((b * view.size(1) + h) * view.size(2) + s) * view.size(3);
  return view.data() + b * view.stride(0) + h * view.stride(1) + s * view.stride(2);
}

// Rows first .. first + tile - 1 of two tensors to shared memory, by all threads.
template <typename T>
KATA_DEVICE void load_tile(const Rule& rule, float* one_smem, float* other_smem, const View<T, 4>& one,
                           const View<T, 4>& other, Index b, Index h, int first, int tile) {
  if (rule.play != Play::no_barrier_before) __syncthreads();
  const int width = static_cast<int>(one.size(3));
  const int rows = static_cast<int>(one.size(2));
  for (int row = static_cast<int>(threadIdx.x); row < tile; row += static_cast<int>(blockDim.x)) {
    const bool inside = first + row < rows || rule.play == Play::load_unguarded;
    copy_row(one_smem + row * width, row_of(rule.play, one, b, h, first + row), width, inside);
    copy_row(other_smem + row * width, row_of(rule.play, other, b, h, first + row), width, inside);
  }
  if (rule.play != Play::no_barrier_after) __syncthreads();
}

// What a thread works on: row `own` of `count` rows of one head, first_own being that of the block's first thread.
struct Worker {
  int thread, width;
  Index b, h, kv_head;
  int first_own, own;
  bool exists;

  template <typename Problem>
  KATA_DEVICE Worker(const Problem& p, const Rule& rule, Index count) {
    const int threads = static_cast<int>(blockDim.x);
    const int tiles = (static_cast<int>(count) + threads - 1) / threads;
    const Index head = static_cast<Index>(blockIdx.x) / tiles;
    thread = static_cast<int>(threadIdx.x);
    width = static_cast<int>(p.query.size(3));
    b = head / p.query.size(1);
    h = head % p.query.size(1);
    kv_head = rule.play == Play::heads_first_only ? 0 : h;
    first_own = static_cast<int>(blockIdx.x) % tiles * threads;
    own = first_own + thread;
    exists = own < count;
  }

  // Where the block's last query has seen everything, if `own` is a query.
  KATA_DEVICE int end(const Rule& rule, const Sight& sight) const {
    const int last = min(first_own + static_cast<int>(blockDim.x), static_cast<int>(sight.queries)) - 1;
    return static_cast<int>(rule.play == Play::not_skipped ? sight.keys : sight.seen(last));
  }
};

template <typename Real>
__global__ void forward_kernel(const FlashForward<float> p, const Rule rule, const Sight sight, float scale, int tile,
                               bool* mask) {
  const Worker worker(p, rule, sight.queries);
  const auto [thread, width, b, h, kh, q_first, i, live] = worker;
  const int keys = static_cast<int>(sight.keys);
  float* k_smem = dynamic_shared<float>();
  float* v_smem = k_smem + tile * width;

  alignas(16) float q_reg[WIDEST];
  Real o_reg[WIDEST];
  copy_row(q_reg, live ? row_of(rule.play, p.query, b, h, i) : nullptr, width, live);
  for (int d = 0; d < width; ++d) o_reg[d] = 0;
  if (rule.play == Play::writes_query && live) *const_cast<float*>(&p.query(b, h, i, 0)) *= scale;
  RunningRow<Real> row;
  const int seen = static_cast<int>(sight.seen(i));
  for (int kv_first = 0; kv_first < worker.end(rule, sight); kv_first += tile) {
    load_tile(rule, k_smem, v_smem, p.key, p.value, b, kh, kv_first, tile);
    if (!live) continue;
    const int limit = rule.play == Play::masked_nan ? min(tile, keys - kv_first) : min(tile, seen - kv_first);
    for (int n = 0; n < limit; ++n) {
      const int j = kv_first + n;
      const float* k_row = rule.play == Play::from_global ? &p.key(b, kh, j, 0) : k_smem + n * width;
      const bool forbidden = j >= seen;
      if (forbidden) {
        add_times(o_reg, Real{0}, v_smem + n * width, width);
        continue;
      }
      const bool stay = mask != nullptr ? mask[((b * p.query.size(1) + h) * sight.queries + i) * keys + j]
                                        : stays(rule, {b, h, i, j}, Asks::forward, tile, thread);
      Real score = static_cast<Real>(scale) * dot<Real>(q_reg, k_row, width);
      if (rule.play == Play::on_scores && !stay) score = 0;
      if (score > row.max) {
        const Real rescale = static_cast<Real>(expf(static_cast<float>(row.max - score)));
        row.sum *= rescale;
        row.kept_sum *= rescale;
        for (int d = 0; d < width; ++d) o_reg[d] *= rescale;
        row.max = score;
      }
      const Real weight = static_cast<Real>(expf(static_cast<float>(score - row.max)));
      const Real kept = forward_weight(rule, row, weight, stay);
      if (stay || kept != 0) add_times(o_reg, kept, v_smem + n * width, width);
    }
  }
  if (!live) return;
  float* o_row = row_of(rule.play, p.output, b, h, i);
  for (int d = 0; d < width; ++d) {
    o_row[d] = static_cast<float>(o_reg[d] * last_factor(rule, row));
    if (rule.play == Play::channels_fall) o_row[d] *= stays(rule, {b, h, i, d}, Asks::forward) ? rule.factor : 0.0f;
  }
  p.lse(b, h, i) = lse_of(rule, row);
}

__global__ void mask_kernel(const FlashForward<float> p, const Rule rule, bool* mask) {
  const Index at = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index queries = p.query.size(2);
  const Index keys = p.key.size(2);
  const Index heads = p.query.size(1);
  if (at >= p.query.size(0) * heads * queries * keys) return;
  const Index head = at / keys / queries;
  mask[at] = stays(rule, {head / heads, head % heads, at / keys % queries, at % keys}, Asks::forward);
}

// delta, and zeros for what will be added up.
__global__ void delta_kernel(const FlashBackward<float> p, const Rule rule, const Sight sight, float scale,
                             bool atomics) {
  const Index at = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index heads = p.query.size(1);
  if (at >= p.query.size(0) * heads * sight.queries) return;
  const Index b = at / sight.queries / heads;
  const Index h = at / sight.queries % heads;
  const Index i = at % sight.queries;
  const int width = static_cast<int>(p.query.size(3));
  const float* d_o = row_of(rule.play, p.d_output, b, h, i);
  float delta = dot<float>(row_of(rule.play, p.output, b, h, i), d_o, width);
  if (rule.play == Play::bwd_delta_of_all) {
    delta = 0.0f;
    for (Index j = 0; j < sight.seen(i); ++j) {
      const float score = scale * dot<float>(&p.query(b, h, i, 0), &p.key(b, h, j, 0), width);
      delta += expf(score - p.lse(b, h, i)) * dot<float>(d_o, &p.value(b, h, j, 0), width);
    }
  }
  p.delta(b, h, i) = delta;
  if (!atomics) return;
  float* dq = row_of(rule.play, p.d_query, b, h, i);
  for (int d = 0; d < width; ++d) dq[d] = 0.0f;
}

KATA_DEVICE float weight_of(const FlashBackward<float>& p, const Rule& rule, const Sight& sight, float score, Index b,
                            Index h, int i) {
  const float weight = expf(score - p.lse(b, h, i));
  if (rule.play != Play::bwd_lse_of_kept) return weight;
  float kept = 0.0f;
  const float scale = p.scale.has_value() ? *p.scale : 1.0f / sqrtf(static_cast<float>(p.query.size(3)));
  for (Index j = 0; j < sight.seen(i); ++j) {
    if (!stays(rule, {b, h, i, j}, Asks::forward)) continue;
    const float other = scale * dot<float>(&p.query(b, h, i, 0), &p.key(b, h, j, 0), static_cast<int>(p.query.size(3)));
    kept += expf(other - p.lse(b, h, i));
  }
  return kept > 0.0f ? weight / kept : weight;
}

// What query i and key j give to each other, from their rows. `asks` names the kernel.
KATA_DEVICE Pair pair_of(const FlashBackward<float>& p, const Rule& rule, const Sight& sight, float scale,
                         const Worker& worker, Asks asks, int tile, int i, int j, const float* q_row,
                         const float* k_row, const float* do_row, const float* v_row) {
  const float score = scale * dot<float>(q_row, k_row, worker.width);
  const float weight = weight_of(p, rule, sight, score, worker.b, worker.h, i);
  const float d_weight = dot<float>(do_row, v_row, worker.width);
  const bool stay = stays(rule, {worker.b, worker.h, i, j}, asks, tile, worker.thread);
  return backward_pair(rule, weight, d_weight, p.delta(worker.b, worker.h, i), stay, asks);
}

// dK and dV of one key a thread, and what it gives to dQ.
template <typename Real>
__global__ void keys_kernel(const FlashBackward<float> p, const Rule rule, const Sight sight, float scale, int tile,
                            bool atomics) {
  const Worker worker(p, rule, sight.keys);
  const auto [thread, width, b, h, kh, kv_first, j, mine] = worker;
  const int queries = static_cast<int>(sight.queries);
  float* q_smem = dynamic_shared<float>();
  float* do_smem = q_smem + tile * width;

  alignas(16) float k_reg[WIDEST];
  alignas(16) float v_reg[WIDEST];
  Real dk_reg[WIDEST];
  Real dv_reg[WIDEST];
  copy_row(k_reg, mine ? row_of(rule.play, p.key, b, kh, j) : nullptr, width, mine);
  copy_row(v_reg, mine ? row_of(rule.play, p.value, b, kh, j) : nullptr, width, mine);
  for (int d = 0; d < width; ++d) dk_reg[d] = dv_reg[d] = 0;
  int start = sight.causal && rule.play != Play::not_skipped ? kv_first - static_cast<int>(sight.diagonal) : 0;
  start = max(0, start) / tile * tile;
  for (int q_first = start; q_first < queries; q_first += tile) {
    load_tile(rule, q_smem, do_smem, p.query, p.d_output, b, h, q_first, tile);
    if (!mine) continue;
    for (int n = 0; n < tile && q_first + n < queries; ++n) {
      const int i = q_first + n;
      if (j >= sight.seen(i)) {
        if (rule.play == Play::masked_nan) add_times(dk_reg, Real{0}, q_smem + n * width, width);
        continue;
      }
      const Pair pair = pair_of(p, rule, sight, scale, worker, Asks::backward_keys, tile, i, j, q_smem + n * width,
                                k_reg, do_smem + n * width, v_reg);
      add_times(dv_reg, static_cast<Real>(pair.of_value), do_smem + n * width, width);
      add_times(dk_reg, static_cast<Real>(scale * pair.d_score), q_smem + n * width, width);
      if (!atomics) continue;
      float* dq = row_of(rule.play, p.d_query, b, h, i);
      for (int d = 0; d < width; ++d) {
        if (rule.play == Play::bwd_race) {
          dq[d] += scale * pair.d_score * k_reg[d];
        } else {
          atomicAdd(&dq[d], scale * pair.d_score * k_reg[d]);
        }
      }
    }
  }
  if (!mine) return;
  float* dk = row_of(rule.play, p.d_key, b, h, j);
  float* dv = row_of(rule.play, p.d_value, b, h, j);
  for (int d = 0; d < width; ++d) {
    dk[d] = static_cast<float>(dk_reg[d]);
    dv[d] = static_cast<float>(dv_reg[d]);
  }
}

// dQ of one query a thread.
__global__ void queries_kernel(const FlashBackward<float> p, const Rule rule, const Sight sight, float scale,
                               int tile) {
  const Worker worker(p, rule, sight.queries);
  const auto [thread, width, b, h, kh, q_first, i, live] = worker;
  float* k_smem = dynamic_shared<float>();
  float* v_smem = k_smem + tile * width;

  alignas(16) float q_reg[WIDEST];
  alignas(16) float do_reg[WIDEST];
  float dq_reg[WIDEST];
  copy_row(q_reg, live ? row_of(rule.play, p.query, b, h, i) : nullptr, width, live);
  copy_row(do_reg, live ? row_of(rule.play, p.d_output, b, h, i) : nullptr, width, live);
  for (int d = 0; d < width; ++d) dq_reg[d] = 0.0f;
  for (int kv_first = 0; kv_first < worker.end(rule, sight); kv_first += tile) {
    load_tile(rule, k_smem, v_smem, p.key, p.value, b, kh, kv_first, tile);
    if (!live) continue;
    for (int n = 0; n < tile && kv_first + n < sight.seen(i); ++n) {
      const Pair pair = pair_of(p, rule, sight, scale, worker, Asks::backward_queries, tile, i, kv_first + n, q_reg,
                                k_smem + n * width, do_reg, v_smem + n * width);
      add_times(dq_reg, scale * pair.d_score, k_smem + n * width, width);
    }
  }
  if (!live) return;
  float* dq = row_of(rule.play, p.d_query, b, h, i);
  for (int d = 0; d < width; ++d) dq[d] = dq_reg[d];
}

void forward_on_gpu(const FlashForward<float>& p, const Rule& rule, const Stream& stream) {
  const Sight sight = sight_of(p, false);
  const Cut cut = cut_of(rule.play, false);
  const Index heads = p.query.size(0) * p.query.size(1);
  const Index blocks = heads * ceil_div(sight.queries, cut.threads);
  if (blocks == 0) return;
  const Index pairs = heads * sight.queries * sight.keys;
  const bool in_memory = rule.play == Play::mask_in_memory && pairs > 0;
  DeviceBuffer<bool> mask("mask", in_memory ? static_cast<std::size_t>(pairs) : 0);
  if (in_memory) {
    launch(mask_kernel, dim3(static_cast<unsigned>(ceil_div(pairs, 64))), dim3(64), 0, stream, p, rule, mask.data());
  }
  const std::size_t shared = static_cast<std::size_t>(2 * cut.tile * p.query.size(3)) * sizeof(float);
  bool* const none = nullptr;
  launch(rule.play == Play::right_double ? forward_kernel<double> : forward_kernel<float>,
         dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(cut.threads)), shared, stream, p, rule, sight,
         scale_of(p, false), cut.tile, in_memory ? mask.data() : none);
}

void backward_on_gpu(const FlashBackward<float>& p, const Rule& rule, const Stream& stream) {
  const Sight sight = sight_of(p, false);
  const Cut cut = cut_of(rule.play, true);
  const float scale = scale_of(p, false);
  const Index heads = p.query.size(0) * p.query.size(1);
  const bool atomics =
      rule.play != Play::right_no_atomics && (!p.deterministic || rule.play == Play::bwd_deterministic_ignored);
  const std::size_t shared = static_cast<std::size_t>(2 * cut.tile * p.query.size(3)) * sizeof(float);
  const auto grid = [](Index blocks) { return dim3(static_cast<unsigned>(blocks)); };
  const dim3 block(static_cast<unsigned>(cut.threads));
  if (heads * sight.queries > 0) {
    launch(delta_kernel, grid(ceil_div(heads * sight.queries, 64)), dim3(64), 0, stream, p, rule, sight, scale,
           atomics);
  }
  if (heads * sight.keys > 0) {
    launch(rule.play == Play::right_double ? keys_kernel<double> : keys_kernel<float>,
           grid(heads * ceil_div(sight.keys, cut.threads)), block, shared, stream, p, rule, sight, scale, cut.tile,
           atomics);
  }
  if (!atomics && heads * sight.queries > 0) {
    launch(queries_kernel, grid(heads * ceil_div(sight.queries, cut.threads)), block, shared, stream, p, rule, sight,
           scale, cut.tile);
  }
}

// True if the call is to be answered; with `unchecked` a bad one must not end this program.
template <typename Check>
bool accepted(const Dropout& dropout, const Check& check) {
  Dropout claimed = dropout;
  const Play play = chosen_play();
  const float p = dropout.probability;
  if (play == Play::unchecked_probability || (play == Play::checked_in_training && !dropout.training) ||
      (play == Play::one_allowed && p == 1.0f) || (play == Play::nan_allowed && p != p)) {
    claimed.probability = 0.0f;
  }
  try {
    check(claimed);
  } catch (const std::invalid_argument&) {
    if (play == Play::unchecked) return false;
    throw;
  }
  return dropout.probability >= 0.0f && dropout.probability < 1.0f;
}

}  // namespace

Tensor<bool, 4> dropout_mask(const Dropout& dropout, const Shape<4>& shape) {
  if (!accepted(dropout, [&](const Dropout& d) { check_dropout_mask(d, shape); })) return Tensor<bool, 4>({0, 0, 0, 0});
  const auto [batch, heads, queries, keys] = shape;
  struct {
    View<const float, 4> query, key;
    bool causal;
  } const problem{{nullptr, {batch, heads, queries, 1}}, {nullptr, {batch, heads, keys, 1}}, false};
  const Rule rule = rule_of(problem, dropout);
  std::mt19937 own(static_cast<unsigned>(dropout.seed + dropout.offset));
  Tensor<bool, 4> mask(shape);
  for (Index b = 0; b < batch; ++b)
    for (Index h = 0; h < heads; ++h)
      for (Index i = 0; i < queries; ++i)
        for (Index j = 0; j < keys; ++j) {
          mask(b, h, i, j) = stays(rule, {b, h, i, j}, Asks::mask, 32, static_cast<int>(i % 32));
          if (rule.play == Play::mask_of_its_own && rule.drops) {
            mask(b, h, i, j) = static_cast<double>(own()) >= 4294967296.0 * static_cast<double>(dropout.probability);
          }
        }
  return mask;
}

void tiled_dropout_forward(const FlashForward<float>& problem, const Dropout& dropout) {
  if (!accepted(dropout, [&](const Dropout& d) { check_dropout_forward(problem, d); })) return;
  forward_on_cpu(problem, rule_of(problem, dropout));
}

void tiled_dropout_backward(const FlashBackward<float>& problem, const Dropout& dropout) {
  if (!accepted(dropout, [&](const Dropout& d) { check_dropout_backward(problem, d); })) return;
  backward_on_cpu(problem, rule_of(problem, dropout));
}

void flash_dropout_forward(const FlashForward<float>& problem, const Dropout& dropout, const Stream& stream) {
  if (!accepted(dropout, [&](const Dropout& d) { check_dropout_forward(problem, d); })) return;
  forward_on_gpu(problem, rule_of(problem, dropout), stream);
}

void flash_dropout_backward(const FlashBackward<float>& problem, const Dropout& dropout, const Stream& stream) {
  if (!accepted(dropout, [&](const Dropout& d) { check_dropout_backward(problem, d); })) return;
  backward_on_gpu(problem, rule_of(problem, dropout), stream);
}

}  // namespace flashkata
