// Answers to 06_split_kv, wrong and right.
#include "split_kv.hpp"

// clang-format off
#define STEP_ANSWERS(X) \
  X(always_one, "one part whatever there is to do", UNNAMED) \
  X(always_many, "as many parts as the keys allow", UNNAMED) \
  X(no_heads, "parts without a thought for the heads", UNNAMED) \
  X(no_batch, "parts without a thought for the other sequences", UNNAMED) \
  X(blocks_floor, "as many parts as blocks fit", UNNAMED) \
  X(too_short, "parts of 16 keys", UNNAMED) \
  X(jumpy, "fewer parts for longer sequences", UNNAMED) \
  X(splits_unchecked, "numbers of blocks unchecked", UNNAMED) \
  X(noncontiguous, "noncontiguous-stride", UNNAMED) \
  X(right_few, "right: as few parts as are allowed", RIGHT) \
  X(right_power, "right: a power of 2", RIGHT)
#define STEP_ANSWERS_ON_CPU(X) \
  X("lengths ignored", "decode-length-ignored") \
  X("noncontiguous-stride", UNNAMED)
// clang-format on
#define CAUSAL_BY_CAPACITY UNNAMED
#define KEYS_BEHIND_LOADED "loaded too often"
#include "decode_corpus.hpp"

namespace flashkata {
namespace {

template <typename T>
struct OnePiece {
  View<const T, 4> keys, values;
  Play play;

  KATA_BOTH Index packed(int b, int head, int j, int d) const {
    return ((static_cast<Index>(b) * keys.size(1) + head) * keys.size(2) + j) * keys.size(3) + d;
  }
  KATA_BOTH T key(int b, int head, int j, int d) const {
    return play == Play::noncontiguous ? keys.data()[packed(b, head, j, d)] : keys(b, head, j, d);
  }
  KATA_BOTH T value(int b, int head, int j, int d) const {
    if (play == Play::noncontiguous) return values.data()[packed(b, head, j, d)];
    if (play == Play::value_stride) {
      return values.data()[b * keys.stride(0) + head * keys.stride(1) + j * keys.stride(2) + d];
    }
    return values(b, head, j, d);
  }
};

template <typename T>
void decode_on_gpu(const Decode<T>& problem, const Stream& stream) {
  const Play play = chosen_play(false);
  if (play == Play::unchecked) {
    const Shape<4>& q = problem.query.shape();
    const Shape<4>& k = problem.key.shape();
    const bool harmless = problem.value.shape() == k && k[0] == q[0] && k[1] > 0 && q[1] % k[1] == 0 && q[2] > 0 &&
                          problem.output.shape() == q && problem.lengths.size(0) == q[0] && problem.splits() > 0 &&
                          problem.partial_output.size(0) == problem.splits() && q[3] == 16 &&
                          problem.partial_lse.size(3) == q[2];
    if (!harmless) return;  // this program is to go on
  } else {
    check_decode(problem);
  }
  Decode<T> known = problem;
  static std::vector<DeviceBuffer<std::int32_t>> before;
  if (play == Play::remembered) {
    for (const auto& lengths : before) {
      if (static_cast<Index>(lengths.size()) == problem.lengths.size(0)) {
        known.lengths = View<const std::int32_t, 1>(lengths.data(), {problem.lengths.size(0)});
      }
    }
    if (known.lengths.data() == problem.lengths.data()) {
      std::vector<std::int32_t> copy;
      for (Index b = 0; b < problem.lengths.size(0); ++b) copy.push_back(problem.lengths(b));
      before.emplace_back("before", std::span<const std::int32_t>(copy));
    }
  }
  const OnePiece<T> cache{problem.key, problem.value, play};
  launch_decode(arguments_of<T>(known, cache, problem.key.size(1), problem.key.size(2), play), stream);
}

}  // namespace

int choose_splits(Index batch, Index kv_heads, Index longest, int multiprocessors) {
  const Play play = chosen_play(false);
  if (play != Play::splits_unchecked) check_choose_splits(batch, kv_heads, longest, multiprocessors);
  const Index worth_it = std::max<Index>(1, longest / 128);
  Index heads = std::max<Index>(1, batch * kv_heads);
  if (play == Play::no_heads) heads = batch;
  if (play == Play::no_batch) heads = kv_heads;
  Index wanted = ceil_div(Index{play == Play::right_few ? 2 : 4} * multiprocessors, heads);
  if (play == Play::always_one) wanted = 1;
  if (play == Play::always_many) wanted = worth_it;
  if (play == Play::blocks_floor) wanted = multiprocessors / heads;
  if (play == Play::jumpy && longest > 20000)
    wanted = std::max<Index>(wanted / 2, ceil_div(Index{2} * multiprocessors, heads));
  if (play == Play::right_power) {
    Index power = 1;
    while (power < wanted) power *= 2;
    wanted = power;
  }
  if (play == Play::too_short) return static_cast<int>(std::min(wanted, std::max<Index>(1, longest / 16)));
  return static_cast<int>(std::min(wanted, worth_it));
}

void tiled_decode(const Decode<float>& problem) {
  check_decode(problem);
  if (chosen_play(false) != Play::unchecked_lengths) check_lengths(problem.lengths, problem.key.size(2));
  const Play play = chosen_play(true);
  for (Index b = 0; b < problem.lengths.size(0); ++b) {
    if (problem.lengths(b) < 0 || problem.lengths(b) > problem.key.size(2)) return;  // this program is to go on
  }
  const OnePiece<float> cache{problem.key, problem.value, play};
  decode_on_cpu(arguments_of<float>(problem, cache, problem.key.size(1), problem.key.size(2), play));
}

void flash_decode(const Decode<float>& problem, const Stream& stream) { decode_on_gpu(problem, stream); }
void flash_decode(const Decode<fp16>& problem, const Stream& stream) { decode_on_gpu(problem, stream); }
void flash_decode(const Decode<bf16>& problem, const Stream& stream) { decode_on_gpu(problem, stream); }

}  // namespace flashkata
