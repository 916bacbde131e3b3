#pragma once

#include <map>
#include <span>
#include <stdexcept>
#include <vector>

#include "common/attention/tensor.hpp"
#include "phase4_extensions/06_split_kv/split_kv.hpp"

namespace flashkata {

/// One step of decoding over a cache in pages. A page holds `page_size` keys (and values) of one sequence, for all
/// heads. Key j of sequence b lies in page block_table(b, j / page_size), in slot j % page_size of it. Pages lie in any
/// order, and two sequences that begin alike may share some. Everything else is as in step 06.
template <typename T>
struct PagedDecode {
  View<const T, 4> query;                   // [B, H, Sq, D], Sq 1 to 16, D one of 16, 32, 64, 128
  View<const T, 4> key_pages;               // [pages, Hk, page_size, D], with strides of its own: K and V may be
  View<const T, 4> value_pages;             // [pages, Hk, page_size, D]  interleaved, and pages lie apart
  View<const std::int32_t, 2> block_table;  // [B, blocks]; entries from ceil(length / page_size) on are anything: -1
  View<const std::int32_t, 1> lengths;      // [B], keys in use, 0 to blocks * page_size
  View<T, 4> output;                        // [B, H, Sq, D]
  std::optional<View<float, 3>> lse = {};   // [B, H, Sq], natural logarithm, for whoever wants it
  View<float, 5> partial_output;            // [splits, B, H, Sq, D]
  View<float, 4> partial_lse;               // [splits, B, H, Sq]
  bool causal = true;                       // query i sees key j when j <= i + length - Sq
  std::optional<float> scale = {};          // multiplies query key^T; default 1 / sqrt(D)

  Index splits() const { return partial_lse.size(0); }
};

/// Throws std::invalid_argument naming the argument, its value and what is allowed. Stubs call it in their first line.
/// It does not look at the lengths and the table themselves, which may lie on the GPU: check_block_table() does.
template <typename T>
void check_paged_decode(const PagedDecode<T>& problem) {
  const Shape<4>& k = problem.key_pages.shape();
  decode_detail::check_rows(problem, "key_pages", k[1]);
  require(k[2] >= 1 && k[3] == problem.query.size(3), "key_pages", to_text(k),
          "[pages, Hk, page_size, " + std::to_string(problem.query.size(3)) + "] with page_size at least 1");
  require(problem.value_pages.shape() == k, "value_pages", to_text(problem.value_pages.shape()),
          to_text(k) + ", as key_pages");
  const Shape<2>& table = problem.block_table.shape();
  require(table[0] == problem.query.size(0), "block_table", to_text(table),
          "[" + std::to_string(problem.query.size(0)) + ", blocks]");
  constexpr Index LONGEST = std::numeric_limits<int>::max() / 2;
  require(k[0] <= LONGEST && k[2] <= LONGEST, "key_pages", to_text(k), "pages and slots that an int can count");
  require(table[1] * k[2] <= LONGEST, "block_table", to_text(table),
          "at most " + std::to_string(LONGEST) + " keys a sequence");
  flash_detail::check_layout(problem.key_pages, "key_pages");
  flash_detail::check_layout(problem.value_pages, "value_pages");
}

/// Throws std::invalid_argument unless every length is from 0 to blocks * page_size, and every entry that a length
/// makes use of is one of the pages.
inline void check_block_table(const View<const std::int32_t, 2>& block_table,
                              const View<const std::int32_t, 1>& lengths, Index pages, Index page_size) {
  check_lengths(lengths, block_table.size(1) * page_size);
  for (Index b = 0; b < lengths.size(0); ++b) {
    for (Index block = 0; block * page_size < lengths(b); ++block) {
      require(block_table(b, block) >= 0 && block_table(b, block) < pages, "block_table",
              std::to_string(block_table(b, block)) + " at " + to_text(Shape<2>{b, block}),
              "0 to " + std::to_string(pages - 1));
    }
  }
}

/// Decoding on the CPU and on the GPU, with all that tiled_decode() and flash_decode() promise in split_kv.hpp, the
/// partial results among it. Entries of the table behind a sequence's last page are not used for anything.
void tiled_paged_decode(const PagedDecode<float>& problem);

void flash_paged_decode(const PagedDecode<float>& problem, const Stream& stream = {});
void flash_paged_decode(const PagedDecode<fp16>& problem, const Stream& stream = {});
void flash_paged_decode(const PagedDecode<bf16>& problem, const Stream& stream = {});

/// "3 pages are missing"
class CacheFull : public std::runtime_error {
 public:
  explicit CacheFull(Index missing)
      : std::runtime_error(std::to_string(missing) + (missing == 1 ? " page is missing" : " pages are missing")),
        missing_(missing) {}
  Index missing() const { return missing_; }

 private:
  Index missing_;
};

/// The pages of a cache and who has them, on the host. A sequence has ceil(length / page_size) pages and no more; no
/// page belongs to two sequences; pages that a sequence gave back are there for others.
class PagedCache {
 public:
  /// Throws std::invalid_argument naming the argument unless all are at least 1.
  PagedCache(Index pages, Index kv_heads, Index page_size, Index width)
      : key_pages_(checked(pages, kv_heads, page_size, width)), value_pages_(key_pages_.shape()) {
    for (Index page = pages; page-- > 0;) free_pages_.push_back(static_cast<std::int32_t>(page));
  }

  /// A new sequence, empty. Its number is none that another sequence has or had.
  int add_sequence();

  /// Puts tokens behind those that the sequence has: key and value [Hk, tokens, D], any strides, tokens may be 0.
  /// Where that takes more pages than are free, throws CacheFull with the number that is missing, and nothing has
  /// changed. Throws std::invalid_argument naming `sequence` if there is no such sequence, `key` or `value` if their
  /// shape is another one; nothing has changed then either.
  void append(int sequence, View<const float, 3> key, View<const float, 3> value);

  /// Ends a sequence and gives its pages back. Throws std::invalid_argument naming `sequence` if there is no such one.
  void release(int sequence);

  /// The pages of these sequences, in this order: [B, blocks], blocks as many as the longest of them has, -1 where a
  /// sequence has fewer. Throws std::invalid_argument naming `sequence` if there is no such one.
  Tensor<std::int32_t, 2> block_table(std::span<const int> sequences) const;

  /// How many keys each of them has, [B]. Throws as block_table() does.
  Tensor<std::int32_t, 1> lengths(std::span<const int> sequences) const;

  Index free_pages() const { return static_cast<Index>(free_pages_.size()); }
  View<const float, 4> key_pages() const { return key_pages_.view(); }      // [pages, Hk, page_size, D]
  View<const float, 4> value_pages() const { return value_pages_.view(); }  // [pages, Hk, page_size, D]
  Index page_size() const { return key_pages_.size(2); }

 private:
  struct Sequence {
    std::vector<std::int32_t> pages = {};  // in order
    Index length = 0;
  };

  static Shape<4> checked(Index pages, Index kv_heads, Index page_size, Index width) {
    require(pages >= 1, "pages", pages, "at least 1");
    require(kv_heads >= 1, "kv_heads", kv_heads, "at least 1");
    require(page_size >= 1, "page_size", page_size, "at least 1");
    require(width >= 1, "width", width, "at least 1");
    return {pages, kv_heads, page_size, width};
  }
  // The sequence of that number, or the exception that is promised.
  const Sequence& find(int sequence) const {
    const auto found = sequences_.find(sequence);
    require(found != sequences_.end(), "sequence", sequence, "the number of a sequence that is there");
    return found->second;
  }
  // The checks that append() promises, but for the number of pages.
  void check_append(int sequence, const View<const float, 3>& key, const View<const float, 3>& value) const {
    find(sequence);
    const Shape<3> shape{key_pages_.size(1), key.size(1), key_pages_.size(3)};
    require(key.shape() == shape, "key", to_text(key.shape()), to_text(shape) + ", [Hk, tokens, D]");
    require(value.shape() == shape, "value", to_text(value.shape()), to_text(shape) + ", as key");
  }

  Tensor<float, 4> key_pages_, value_pages_;
  std::vector<std::int32_t> free_pages_;  // those that no sequence has
  std::map<int, Sequence> sequences_;
  [[maybe_unused]] int next_sequence_ = 0;  // for add_sequence()
};

}  // namespace flashkata
