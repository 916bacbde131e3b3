// The problems that the CPU's tiled steps are tried on, forward and backward: each with its tiles.
#pragma once

#include "common/testing/cases.hpp"

namespace flashkata::testing {

struct TileCase {
  AttentionCase problem;
  Index block_rows;  // Br: queries in a tile
  Index block_cols;  // Bc: keys in a tile

  std::string text() const;
};

/// In order of number. Numbers never change: new cases go to the end.
const std::vector<TileCase>& tile_cases();

/// A length for the queries, one for the keys, and tiles: the ways in which a diagonal can cross them.
struct Cut {
  Index queries, keys, block_rows, block_cols;
};

const std::vector<Cut>& cuts();

}  // namespace flashkata::testing
