#include "paged_kv.hpp"

#include "solutions/hidden/phase4_extensions/decode_cpu.hpp"

namespace flashkata {

int PagedCache::add_sequence() {
  sequences_[next_sequence_] = {};
  return next_sequence_++;
}

void PagedCache::append(int sequence, View<const float, 3> key, View<const float, 3> value) {
  check_append(sequence, key, value);
  Sequence& own = sequences_.at(sequence);
  const Index size = page_size();
  const Index length = own.length + key.size(1);
  // The last page may have room left, so that not every append takes a page.
  const Index wanted = ceil_div(length, size) - static_cast<Index>(own.pages.size());
  if (wanted > free_pages()) throw CacheFull(wanted - free_pages());  // nothing has changed

  for (Index taken = 0; taken < wanted; ++taken) {
    own.pages.push_back(free_pages_.back());
    free_pages_.pop_back();
  }
  for (Index token = 0; token < key.size(1); ++token) {
    const Index place = own.length + token;
    const Index page = own.pages[static_cast<std::size_t>(place / size)];
    for (Index head = 0; head < key.size(0); ++head) {
      for (Index d = 0; d < key.size(2); ++d) {
        key_pages_(page, head, place % size, d) = key(head, token, d);
        value_pages_(page, head, place % size, d) = value(head, token, d);
      }
    }
  }
  own.length = length;
}

void PagedCache::release(int sequence) {
  find(sequence);
  const std::vector<std::int32_t>& pages = sequences_.at(sequence).pages;
  free_pages_.insert(free_pages_.end(), pages.begin(), pages.end());
  sequences_.erase(sequence);
}

Tensor<std::int32_t, 2> PagedCache::block_table(std::span<const int> sequences) const {
  for (const int sequence : sequences) find(sequence);
  std::size_t blocks = 0;
  for (const int sequence : sequences) blocks = std::max(blocks, find(sequence).pages.size());
  Tensor<std::int32_t, 2> table({static_cast<Index>(sequences.size()), static_cast<Index>(blocks)});
  std::fill_n(table.data(), table.count(), -1);
  for (std::size_t row = 0; row < sequences.size(); ++row) {
    const std::vector<std::int32_t>& pages = find(sequences[row]).pages;
    std::copy(pages.begin(), pages.end(), table.data() + row * blocks);
  }
  return table;
}

Tensor<std::int32_t, 1> PagedCache::lengths(std::span<const int> sequences) const {
  for (const int sequence : sequences) find(sequence);
  Tensor<std::int32_t, 1> result({static_cast<Index>(sequences.size())});
  for (std::size_t row = 0; row < sequences.size(); ++row) {
    result.data()[row] = static_cast<std::int32_t>(find(sequences[row]).length);
  }
  return result;
}

void tiled_paged_decode(const PagedDecode<float>& problem) {
  check_paged_decode(problem);
  check_block_table(problem.block_table, problem.lengths, problem.key_pages.size(0), problem.key_pages.size(2));
  const Index size = problem.key_pages.size(2);
  const auto row = [&](const View<const float, 4>& pages, Index b, Index head, Index j) {
    return &pages(problem.block_table(b, j / size), head, j % size, 0);
  };
  decode_cpu::decode(
      problem, problem.key_pages.size(1), [&](Index b, Index h, Index j) { return row(problem.key_pages, b, h, j); },
      [&](Index b, Index h, Index j) { return row(problem.value_pages, b, h, j); });
}

}  // namespace flashkata
