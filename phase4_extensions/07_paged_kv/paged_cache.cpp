#include "paged_kv.hpp"

namespace flashkata {

int PagedCache::add_sequence() {
  // TODO, about 2 lines: an entry in sequences_, under a number that nobody has had.
  throw NotImplemented(__FILE__);
}

void PagedCache::append(int sequence, View<const float, 3> key, View<const float, 3> value) {
  check_append(sequence, key, value);
  // TODO, about 20 lines: are there enough pages? Take them, and copy each token to its page and slot.
  throw NotImplemented(__FILE__);
}

void PagedCache::release(int sequence) {
  find(sequence);
  // TODO, about 3 lines: its pages are free, and it is gone.
  throw NotImplemented(__FILE__);
}

Tensor<std::int32_t, 2> PagedCache::block_table(std::span<const int> sequences) const {
  for (const int sequence : sequences) find(sequence);
  // TODO, about 8 lines: the pages of each, filled up with -1.
  throw NotImplemented(__FILE__);
}

Tensor<std::int32_t, 1> PagedCache::lengths(std::span<const int> sequences) const {
  for (const int sequence : sequences) find(sequence);
  // TODO, about 3 lines.
  throw NotImplemented(__FILE__);
}

void tiled_paged_decode(const PagedDecode<float>& problem) {
  check_paged_decode(problem);
  check_block_table(problem.block_table, problem.lengths, problem.key_pages.size(0), problem.key_pages.size(2));
  // TODO, about 50 lines: step 06's tiled_decode(), with its rows looked up in the table.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
