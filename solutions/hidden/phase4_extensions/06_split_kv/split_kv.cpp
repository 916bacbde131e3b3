#include "split_kv.hpp"

#include "solutions/hidden/phase4_extensions/decode_cpu.hpp"

namespace flashkata {

int choose_splits(Index batch, Index kv_heads, Index longest, int multiprocessors) {
  check_choose_splits(batch, kv_heads, longest, multiprocessors);
  // A multiprocessor holds two blocks at a time: as many as run together, for those that come later would run alone.
  const Index wanted = std::max<Index>(1, Index{2} * multiprocessors / (batch * kv_heads));
  const Index worth_it = std::max<Index>(1, longest / 128);
  return static_cast<int>(std::min(wanted, worth_it));
}

void tiled_decode(const Decode<float>& problem) {
  check_decode(problem);
  check_lengths(problem.lengths, problem.key.size(2));
  decode_cpu::decode(
      problem, problem.key.size(1), [&](Index b, Index h, Index j) { return &problem.key(b, h, j, 0); },
      [&](Index b, Index h, Index j) { return &problem.value(b, h, j, 0); });
}

}  // namespace flashkata
