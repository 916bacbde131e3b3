// What each block of a grid works on, and so in which order the work is done: blocks start by number.
#pragma once

#include "common/gpu/gpu.hpp"

namespace flashkata {

// A head, of all heads of the batch, and one of the tiles that it is cut into.
struct BlockWork {
  int head, tile;
};

// One head after the other, and of each the tiles in order. If tiles are `uneven`, as they are with a causal mask, long
// work has to start first, or the long tiles of the last head run alone when everybody else has finished. So tile 0 has
// to be the longest, and heads come in groups, of which all first tiles start before all second ones. A group is as
// small as two rounds of blocks on all multiprocessors: what its heads read stays in the L2 cache meanwhile.
struct BlockOrder {
  int heads;  // of the whole batch
  bool uneven;

  // Heads in a group, if a block walks over about `tiles` tiles and a multiprocessor runs `blocks_of_an_sm` at a time.
  KATA_DEVICE int heads_together(int tiles, int blocks_of_an_sm) const {
    constexpr int MULTIPROCESSORS = 128;  // more or less: few GPUs have half as many or twice
    return uneven ? max(1, 2 * MULTIPROCESSORS * blocks_of_an_sm / tiles) : 1;
  }

  // Of block number `block`; each head has `tiles`, and `group` heads make a group.
  KATA_DEVICE BlockWork work_in_groups(int block, int tiles, int group) const {
    const int first = block / (group * tiles) * group;
    const int count = min(group, heads - first);  // the last group may be smaller
    const int place = block - first * tiles;
    return {first + place % count, place / count};
  }

  // The same where each tile of a head walks over the head's other tiles.
  KATA_DEVICE BlockWork work_of(int block, int tiles, int blocks_of_an_sm) const {
    return work_in_groups(block, tiles, heads_together(tiles, blocks_of_an_sm));
  }
};

}  // namespace flashkata
