#include "split_kv.hpp"

namespace flashkata {

int choose_splits(Index batch, Index kv_heads, Index longest, int multiprocessors) {
  check_choose_splits(batch, kv_heads, longest, multiprocessors);
  // TODO, about 5 lines: as many parts as make the GPU busy, and no shorter than is worth a merge.
  throw NotImplemented(__FILE__);
}

void tiled_decode(const Decode<float>& problem) {
  check_decode(problem);
  check_lengths(problem.lengths, problem.key.size(2));
  // TODO, about 50 lines: the parts of each head, then their merge.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
