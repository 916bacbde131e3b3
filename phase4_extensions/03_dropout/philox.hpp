// Given: a random number generator without a state.
#pragma once

#include <cstdint>

#include "common/gpu/platform.hpp"

namespace flashkata {

struct Words2 {
  std::uint32_t x, y;
};
struct Words4 {
  std::uint32_t x, y, z, w;
};

/// Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3): four
/// random words of 32 bits from a counter of four words and a key of two. The same counter and key give the same words,
/// always and everywhere, on the host as on the GPU. If they differ in a single bit, anywhere, the words have nothing
/// to do with each other. Under one key different counters give different words: none come twice.
///
/// There is no state to advance, to share out among threads, or to save: who wants the millionth number asks for it.
KATA_BOTH Words4 philox4x32_10(Words4 counter, Words2 key) {
  for (int round = 0; round < 10; ++round) {
    // Two products of 64 bits; each half is mixed into the place of the other product.
    const std::uint64_t x_product = std::uint64_t{0xD2511F53} * counter.x;
    const std::uint64_t z_product = std::uint64_t{0xCD9E8D57} * counter.z;
    counter = {static_cast<std::uint32_t>(z_product >> 32) ^ counter.y ^ key.x, static_cast<std::uint32_t>(z_product),
               static_cast<std::uint32_t>(x_product >> 32) ^ counter.w ^ key.y, static_cast<std::uint32_t>(x_product)};
    key.x += 0x9E3779B9;  // of the golden ratio
    key.y += 0xBB67AE85;  // of sqrt(3)
  }
  return counter;
}

}  // namespace flashkata
