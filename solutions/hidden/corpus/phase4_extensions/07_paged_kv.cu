// Answers to 07_paged_kv, wrong and right.
#include "paged_kv.hpp"

// clang-format off
#define STEP_ANSWERS(X) \
  X(page_stride, "paged-page-stride", "paged-page-stride") \
  X(last_page, "paged-last-page", "paged-last-page") \
  X(logical, "paged-logical-physical", "paged-logical-physical") \
  X(table_first, "the row of the first sequence for all", "paged-table-first") \
  X(table_stride, "rows of the table as long as the sequence", UNNAMED) \
  X(size_16, "pages of 16 slots whatever their size", UNNAMED) \
  X(slot_not_wrapped, "slots counted through the pages", UNNAMED) \
  X(page_and_slot, "pages and slots exchanged", "paged-page-and-slot") \
  X(slot_reversed, "pages filled from behind", "paged-slot-reversed") \
  X(first_page_only, "the first page over and over", "paged-first-page-only") \
  X(table_packed, "the table without its stride", UNNAMED) \
  X(next_entry, "the table read one entry late", "paged-next-entry") \
  X(value_first_page, "values from the page before the table", "paged-values-logical") \
  X(values_behind_keys, "values where a half of the buffer would end", UNNAMED) \
  X(table_unchecked, "the table unchecked by the host", UNNAMED) \
  X(leak, "pages lost on release", UNNAMED) \
  X(leak_last, "the last page lost on release", UNNAMED) \
  X(given_twice, "a released page given twice", UNNAMED) \
  X(never_reused, "released pages never used again", UNNAMED) \
  X(page_per_append, "a new page for every append", UNNAMED) \
  X(page_too_early, "the next page taken when one is full", UNNAMED) \
  X(page_of_first_token, "all tokens of an append in one page", UNNAMED) \
  X(slot_from_0, "slots counted from 0 in every append", UNNAMED) \
  X(half_appended, "half-appended when full", UNNAMED) \
  X(pages_kept, "pages kept when full", UNNAMED) \
  X(length_first_then, "the length raised before the pages were counted", UNNAMED) \
  X(missing_all, "all wanted pages called missing", UNNAMED) \
  X(missing_tokens, "tokens called missing", UNNAMED) \
  X(missing_no_slots, "the slots left in the last page forgotten when counting", UNNAMED) \
  X(full_by_one, "the last free page never given", UNNAMED) \
  X(full_unnoticed, "tokens dropped when full", UNNAMED) \
  X(heads_first, "tokens of the first head for all", UNNAMED) \
  X(tokens_packed, "tokens without their strides", UNNAMED) \
  X(channels_packed, "channels without their stride", UNNAMED) \
  X(value_in_key, "values where the keys belong", UNNAMED) \
  X(value_of_key, "keys for values", UNNAMED) \
  X(table_zeros, "the table filled up with 0", UNNAMED) \
  X(table_wide, "a table as wide as the cache", UNNAMED) \
  X(table_in_order, "the table in the order of numbers", UNNAMED) \
  X(table_backwards, "the newest page first", UNNAMED) \
  X(lengths_in_pages, "lengths in pages", UNNAMED) \
  X(number_again, "a released number given again", UNNAMED) \
  X(release_keeps, "a released sequence that is still there", UNNAMED) \
  X(right_lowest, "right: the lowest free page first", RIGHT) \
  X(right_oldest, "right: the page that was released first", RIGHT) \
  X(right_last, "right: any free page", RIGHT)
#define STEP_ANSWERS_ON_CPU(X) \
  X("paged-page-stride", "paged-page-stride") \
  X("paged-last-page", "paged-last-page") \
  X("paged-logical-physical", "paged-logical-physical") \
  X("the row of the first sequence for all", "paged-table-first") \
  X("pages and slots exchanged", "paged-page-and-slot")
// clang-format on
#define CAUSAL_BY_CAPACITY "causal-ignored"
#define KEYS_BEHIND_LOADED "out of bounds"  // paged-table-entry-invalid
#include "decode_corpus.hpp"

namespace flashkata {
namespace {

template <typename T>
struct InPages {
  View<const T, 4> keys, values;
  View<const std::int32_t, 2> table;
  View<const std::int32_t, 1> lengths;
  Play play;

  KATA_BOTH Index page(int b, int j, bool of_value) const {
    const auto size = static_cast<int>(keys.size(2));
    const auto blocks = static_cast<int>(table.size(1));
    int block = j / (play == Play::size_16 ? 16 : size);
    if (play == Play::page_and_slot) block = j % ((lengths(b) + size - 1) / size);
    if (play == Play::first_page_only) block = 0;
    if (play == Play::next_entry && block + 1 < (lengths(b) + size - 1) / size) ++block;
    if (play == Play::logical) return block + 0 * b;
    if (play == Play::value_first_page && of_value) return block;
    if (play == Play::table_first) {
      const int used = (lengths(0) + size - 1) / size;
      return used == 0 ? 0 : table(0, block < used ? block : used - 1);
    }
    if (play == Play::table_stride) {
      const int used = (lengths(b) + size - 1) / size;
      const Index at = static_cast<Index>(b) * used + block;
      const int entry = at < table.size(0) * blocks ? table.data()[at] : 0;
      return entry < 0 ? 0 : entry;
    }
    if (play == Play::table_packed) return table.data()[static_cast<Index>(b) * blocks + block];
    return table(b, block);
  }
  KATA_BOTH Index slot(int b, int j) const {
    const auto size = static_cast<int>(keys.size(2));
    if (play == Play::size_16) return j % 16 < size ? j % 16 : 0;
    if (play == Play::slot_not_wrapped) return j;
    if (play == Play::page_and_slot) return j / ((lengths(b) + size - 1) / size);
    if (play == Play::slot_reversed) return size - 1 - j % size;
    return j % size;
  }
  KATA_BOTH T key(int b, int head, int j, int d) const {
    if (play == Play::page_stride) {
      const Index place = page(b, j, false) * keys.size(1) * keys.size(2) * keys.size(3);
      return keys.data()[place + head * keys.stride(1) + slot(b, j) * keys.stride(2) + d];
    }
    return keys(page(b, j, false), head, slot(b, j), d);
  }
  KATA_BOTH T value(int b, int head, int j, int d) const {
    if (play == Play::page_stride) {
      const Index place = page(b, j, true) * keys.size(1) * keys.size(2) * keys.size(3);
      return values.data()[place + head * values.stride(1) + slot(b, j) * values.stride(2) + d];
    }
    if (play == Play::value_stride) {
      return values.data()[page(b, j, true) * keys.stride(0) + head * keys.stride(1) + slot(b, j) * keys.stride(2) + d];
    }
    if (play == Play::values_behind_keys && values.data() > keys.data() &&
        values.data() < keys.data() + keys.stride(0)) {
      return keys.data()[page(b, j, true) * keys.stride(0) + (keys.size(1) + head) * keys.size(2) * keys.size(3) +
                         slot(b, j) * keys.size(3) + d];
    }
    return values(page(b, j, true), head, slot(b, j), d);
  }
};

template <typename T>
Arguments<T, InPages<T>> arguments_for(const PagedDecode<T>& p, Play play) {
  const InPages<T> cache{p.key_pages, p.value_pages, p.block_table, p.lengths, play};
  return arguments_of<T>(p, cache, p.key_pages.size(1), p.block_table.size(1) * p.key_pages.size(2), play);
}

template <typename T>
void decode_on_gpu(const PagedDecode<T>& problem, const Stream& stream) {
  const Play play = chosen_play(false);
  if (play == Play::unchecked) {
    const Shape<4>& q = problem.query.shape();
    const Shape<4>& k = problem.key_pages.shape();
    const bool harmless = problem.value_pages.shape() == k && k[1] > 0 && q[1] % k[1] == 0 && q[2] > 0 && k[2] > 0 &&
                          k[3] == q[3] && problem.output.shape() == q && problem.lengths.size(0) == q[0] &&
                          problem.block_table.size(0) == q[0] && problem.splits() > 0 &&
                          problem.partial_output.size(0) == problem.splits() && q[3] == 16 &&
                          problem.partial_lse.size(3) == q[2];
    if (!harmless) return;  // this program is to go on
  } else {
    check_paged_decode(problem);
  }
  PagedDecode<T> known = problem;
  std::vector<std::int32_t> whole;
  if (play == Play::last_page || play == Play::remembered) {
    const auto size = static_cast<std::int32_t>(problem.key_pages.size(2));
    for (Index b = 0; b < problem.lengths.size(0); ++b) whole.push_back(ceil_div(problem.lengths(b), size) * size);
  }
  static std::vector<DeviceBuffer<std::int32_t>> before;
  std::vector<DeviceBuffer<std::int32_t>> now;
  if (play == Play::last_page) {
    known.lengths = View<const std::int32_t, 1>(
        now.emplace_back("lengths", std::span<const std::int32_t>(whole)).data(), {problem.lengths.size(0)});
  }
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
  launch_decode(arguments_for(known, play), stream);
}

Play manager_play() { return chosen_play(false); }

}  // namespace

int PagedCache::add_sequence() {
  if (manager_play() == Play::number_again) {
    int number = 0;
    while (sequences_.contains(number)) ++number;
    sequences_[number] = {};
    return number;
  }
  sequences_[next_sequence_] = {};
  return next_sequence_++;
}

void PagedCache::append(int sequence, View<const float, 3> key, View<const float, 3> value) {
  check_append(sequence, key, value);
  const Play play = manager_play();
  Sequence& own = sequences_.at(sequence);
  const Index size = page_size();
  const Index tokens = key.size(1);
  Index length = own.length + tokens;
  const auto has = static_cast<Index>(own.pages.size());
  Index wanted = ceil_div(length, size) - has;
  if (play == Play::page_per_append) wanted = ceil_div(tokens, size);
  if (play == Play::page_too_early) wanted = length / size + 1 - has;
  if (play == Play::missing_no_slots) wanted = std::max(wanted, ceil_div(tokens, size));
  if (play == Play::length_first_then) own.length = length;
  const Index available = free_pages() - (play == Play::full_by_one ? 1 : 0);
  if (wanted > available) {
    Index missing = wanted - available;
    if (play == Play::missing_all) missing = wanted;
    if (play == Play::missing_tokens) missing = length - (has + available) * size;
    if (play == Play::half_appended || play == Play::full_unnoticed) {
      wanted = available;
      length = (has + available) * size;
    } else if (play == Play::pages_kept) {
      while (!free_pages_.empty()) {
        own.pages.push_back(free_pages_.back());
        free_pages_.pop_back();
      }
      throw CacheFull(missing);
    } else {
      throw CacheFull(missing);
    }
    if (play == Play::half_appended) {
      own.length = length;
      while (!free_pages_.empty()) {
        own.pages.push_back(free_pages_.back());
        free_pages_.pop_back();
      }
      throw CacheFull(missing);
    }
  }
  const Index begin = play == Play::length_first_then ? length - tokens : own.length;
  for (Index taken = 0; taken < wanted; ++taken) {
    auto from = free_pages_.end() - 1;
    if (play == Play::right_lowest) from = std::min_element(free_pages_.begin(), free_pages_.end());
    if (play == Play::right_oldest) from = free_pages_.begin();
    if (play == Play::right_last) from = free_pages_.begin() + (7 * length + taken) % free_pages();
    own.pages.push_back(*from);
    free_pages_.erase(from);
  }
  const Tensor<float, 1> unused({1});
  for (Index token = 0; token < length - begin; ++token) {
    const Index place = begin + token;
    Index block = place / size;
    if (play == Play::page_of_first_token) block = begin / size;
    const Index page =
        own.pages[static_cast<std::size_t>(std::min<Index>(block, static_cast<Index>(own.pages.size()) - 1))];
    const Index slot = play == Play::slot_from_0 ? token % size : place % size;
    for (Index head = 0; head < key.size(0); ++head) {
      for (Index d = 0; d < key.size(2); ++d) {
        const Index from = play == Play::heads_first ? 0 : head;
        const Index packed = (from * tokens + token) * key.size(2) + d;
        float k = play == Play::tokens_packed ? key.data()[packed] : key(from, token, d);
        float v = play == Play::tokens_packed ? value.data()[packed] : value(from, token, d);
        if (play == Play::channels_packed) k = (&key(from, token, 0))[d], v = (&value(from, token, 0))[d];
        key_pages_(page, head, slot, d) = play == Play::value_in_key ? v : k;
        value_pages_(page, head, slot, d) = play == Play::value_of_key ? k : v;
      }
    }
  }
  own.length = length;
}

void PagedCache::release(int sequence) {
  find(sequence);
  const Play play = manager_play();
  std::vector<std::int32_t> pages = sequences_.at(sequence).pages;
  if (play == Play::leak_last && !pages.empty()) pages.pop_back();
  if (play != Play::leak) free_pages_.insert(free_pages_.end(), pages.begin(), pages.end());
  if (play == Play::given_twice && !pages.empty()) free_pages_.push_back(pages.front());
  if (play == Play::never_reused && !pages.empty()) free_pages_.erase(free_pages_.end() - 1);
  if (play != Play::release_keeps) sequences_.erase(sequence);
}

Tensor<std::int32_t, 2> PagedCache::block_table(std::span<const int> sequences) const {
  for (const int sequence : sequences) find(sequence);
  const Play play = manager_play();
  std::vector<int> order(sequences.begin(), sequences.end());
  if (play == Play::table_in_order) std::sort(order.begin(), order.end());
  std::size_t blocks = 0;
  for (const int sequence : order) blocks = std::max(blocks, find(sequence).pages.size());
  if (play == Play::table_wide) blocks = static_cast<std::size_t>(key_pages_.size(0));
  Tensor<std::int32_t, 2> table({static_cast<Index>(order.size()), static_cast<Index>(blocks)});
  std::fill_n(table.data(), table.count(), play == Play::table_zeros ? 0 : -1);
  for (std::size_t row = 0; row < order.size(); ++row) {
    std::vector<std::int32_t> pages = find(order[row]).pages;
    if (play == Play::table_backwards) std::reverse(pages.begin(), pages.end());
    std::copy(pages.begin(), pages.end(), table.data() + row * blocks);
  }
  return table;
}

Tensor<std::int32_t, 1> PagedCache::lengths(std::span<const int> sequences) const {
  for (const int sequence : sequences) find(sequence);
  Tensor<std::int32_t, 1> result({static_cast<Index>(sequences.size())});
  for (std::size_t row = 0; row < sequences.size(); ++row) {
    const Sequence& own = find(sequences[row]);
    result.data()[row] = static_cast<std::int32_t>(
        manager_play() == Play::lengths_in_pages ? static_cast<Index>(own.pages.size()) : own.length);
  }
  return result;
}

void tiled_paged_decode(const PagedDecode<float>& problem) {
  check_paged_decode(problem);
  const auto check = [&] {
    check_block_table(problem.block_table, problem.lengths, problem.key_pages.size(0), problem.key_pages.size(2));
  };
  if (chosen_play(false) == Play::table_unchecked || chosen_play(false) == Play::unchecked_lengths) {
    try {
      check();
    } catch (const std::invalid_argument& error) {
      const bool lengths = std::string_view(error.what()).starts_with("lengths");
      if (lengths != (chosen_play(false) == Play::unchecked_lengths)) throw;
      return;  // this program is to go on
    }
  } else {
    check();
  }
  const Play play = chosen_play(true);
  PagedDecode<float> known = problem;
  std::vector<std::int32_t> whole;
  if (play == Play::last_page) {
    const auto size = static_cast<std::int32_t>(problem.key_pages.size(2));
    for (Index b = 0; b < problem.lengths.size(0); ++b) whole.push_back(ceil_div(problem.lengths(b), size) * size);
    known.lengths = View<const std::int32_t, 1>(whole.data(), {problem.lengths.size(0)});
  }
  decode_on_cpu(arguments_for(known, play));
}

void flash_paged_decode(const PagedDecode<float>& problem, const Stream& stream) { decode_on_gpu(problem, stream); }
void flash_paged_decode(const PagedDecode<fp16>& problem, const Stream& stream) { decode_on_gpu(problem, stream); }
void flash_paged_decode(const PagedDecode<bf16>& problem, const Stream& stream) { decode_on_gpu(problem, stream); }

}  // namespace flashkata
