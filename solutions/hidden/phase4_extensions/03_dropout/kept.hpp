// From the six numbers of a weight to its fate: one function for the CPU and the GPU, forward and backward.
//
// Philox mixes 192 bits, 128 of a counter and 64 of a key. Seed, offset, b, h, i and j have more than that, so it is
// asked twice: once for the 128 bits of a head, and with these for the words of four weights at a time.
#pragma once

#include "dropout.hpp"

namespace flashkata {

/// Which weights of one head stay.
struct HeadKeeps {
  Words4 head;              // random bits of (seed, offset, b, h)
  std::uint32_t threshold;  // a weight stays whose word is at least this

  // A call gives the words of four keys that lie 16 apart: in our kernels these are keys of the same thread, for which
  // the compiler then makes one call.
  KATA_BOTH bool operator()(Index i, Index j) const {
    const auto key = static_cast<std::uint32_t>(j);
    const Words4 four = philox4x32_10({key / 64 * 16 + key % 16, static_cast<std::uint32_t>(i), head.z, head.w},  //
                                      {head.x, head.y});
    const std::uint32_t which = key / 16 % 4;
    const std::uint32_t word = which < 2 ? (which == 0 ? four.x : four.y) : (which == 2 ? four.z : four.w);
    return word >= threshold;
  }
};

/// A Dropout as the kernels want it.
struct Keeps {
  Words2 seed, offset;      // low half, high half
  std::uint32_t threshold;  // of the 2^32 words so many let a weight fall; 0: none does
  float factor;             // what a weight that stays is multiplied by

  explicit Keeps(const Dropout& dropout)
      : seed(halves(dropout.seed)),
        offset(halves(dropout.offset)),
        threshold(dropout.training ? static_cast<std::uint32_t>(0x1p32 * static_cast<double>(dropout.probability)) : 0),
        factor(dropout.training ? 1.0f / (1.0f - dropout.probability) : 1.0f) {}

  KATA_BOTH HeadKeeps of_head(Index b, Index h) const {
    return {philox4x32_10({static_cast<std::uint32_t>(b), static_cast<std::uint32_t>(h), offset.x, offset.y}, seed),
            threshold};
  }

 private:
  static Words2 halves(std::uint64_t number) {
    return {static_cast<std::uint32_t>(number), static_cast<std::uint32_t>(number >> 32)};
  }
};

}  // namespace flashkata
