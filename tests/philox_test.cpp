// The generator that step 4.03 is given, against the vectors that its authors published: tests/kat_vectors in
// DEShawResearch/random123, the lines "philox4x32 10".
#include "phase4_extensions/03_dropout/philox.hpp"

#include <doctest/doctest.h>

#include <array>

namespace {

using flashkata::philox4x32_10;
using flashkata::Words2;
using flashkata::Words4;

struct KnownAnswer {
  Words4 counter;
  Words2 key;
  Words4 words;
};

constexpr std::array<KnownAnswer, 3> KNOWN_ANSWERS{{
    {{0x00000000, 0x00000000, 0x00000000, 0x00000000},
     {0x00000000, 0x00000000},
     {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
}};

}  // namespace

TEST_SUITE("tests.philox") {
  TEST_CASE("Philox4x32-10 gives the published words") {
    for (const KnownAnswer& known : KNOWN_ANSWERS) {
      const Words4 words = philox4x32_10(known.counter, known.key);
      CHECK(words.x == known.words.x);
      CHECK(words.y == known.words.y);
      CHECK(words.z == known.words.z);
      CHECK(words.w == known.words.w);
    }
  }
}
