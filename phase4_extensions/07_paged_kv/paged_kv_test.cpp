#include "paged_kv.hpp"

#include <set>

#include "phase4_extensions/decode_suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;
using Storage = Paging::Storage;

namespace {

// ---- Calls ----------------------------------------------------------------------------------------------------------

// [B, blocks]: which page holds which keys. Pages come in a random order; entries behind a sequence's last page are -1.
struct Table {
  Index pages, blocks;
  std::vector<std::int32_t> entries;

  Table(const DecodeInputs& in, const Paging& paging) : pages(paging.spare), blocks(paging.more_blocks) {
    Index longest = 0;
    for (const std::int32_t length : in.lengths) {
      pages += ceil_div(Index{length}, paging.page_size);
      longest = std::max(longest, ceil_div(Index{length}, paging.page_size));
    }
    blocks += longest;
    std::vector<std::int32_t> order(static_cast<std::size_t>(pages));
    std::iota(order.begin(), order.end(), 0);
    if (paging.order > 0) std::shuffle(order.begin(), order.end(), std::mt19937(paging.order));
    entries.assign(in.lengths.size() * static_cast<std::size_t>(blocks), -1);
    std::size_t next = 0;
    for (std::size_t b = 0; b < in.lengths.size(); ++b) {
      for (Index block = 0; block * paging.page_size < in.lengths[b]; ++block) {
        std::int32_t& entry = entries[b * static_cast<std::size_t>(blocks) + static_cast<std::size_t>(block)];
        entry = paging.shared_first && b > 0 && block == 0 ? entries[0] : order[next++];
      }
    }
  }
  Index page(Index b, Index block) const { return entries[static_cast<std::size_t>(b * blocks + block)]; }
};

template <typename T, template <typename> class Memory>
DecodeAnswer in_pages(const Call<PagedDecode<T>>& call, const DecodeInputs& in, const DecodeOptions& options) {
  decode_suite_detail::Around<T, Memory> around(in, options);
  const Paging& paging = options.paging;
  const Table table(in, paging);
  const Index size = paging.page_size, heads = in.kv_heads(), width = in.width();
  const bool together = paging.storage != Storage::two_buffers;

  // Slots that nobody uses hold NaN. Interleaved, the heads of V come behind those of K.
  Tensor<float, 4> keys({table.pages, together ? 2 * heads : heads, size, width});
  Tensor<float, 4> values({together ? 0 : table.pages, heads, size, width});
  for (Index b = 0; b < in.batch(); ++b)
    for (Index j = 0; j < in.lengths[static_cast<std::size_t>(b)]; ++j)
      for (Index h = 0; h < heads; ++h)
        for (Index d = 0; d < width; ++d) {
          const Index page = table.page(b, j / size);
          keys(page, h, j % size, d) = in.in.key(b, h, j, d);
          (together ? keys(page, heads + h, j % size, d) : values(page, h, j % size, d)) = in.in.value(b, h, j, d);
        }
  const Layout key_layout = paging.storage == Storage::interleaved          ? Layout::heads
                            : paging.storage == Storage::interleaved_tokens ? Layout::tokens
                                                                            : options.layouts.key;
  Memory<T> key = Memory<T>::input("key_pages", keys, key_layout);
  Memory<T> value = Memory<T>::input("value_pages", values, options.layouts.value);
  typename decode_suite_detail::Around<T, Memory>::Ints block_table(
      "block_table", decode_suite_detail::spread(table.entries, table.blocks, options.apart));
  const Shape<4> shape{table.pages, heads, size, width};
  const Shape<4> strides = key.view().strides();
  const View<const T, 4> key_pages(key.view().data(), shape, strides);
  const View<const T, 4> value_pages = together
                                           ? View<const T, 4>(key.view().data() + heads * strides[1], shape, strides)
                                           : View<const T, 4>(value.view());
  const PagedDecode<T> problem{.query = around.query.view(),
                               .key_pages = key_pages,
                               .value_pages = value_pages,
                               .block_table = {block_table.template view<2>({in.batch(), table.blocks}).data(),
                                               {in.batch(), table.blocks},
                                               {table.blocks + options.apart, 1}},
                               .lengths = around.lengths_view(),
                               .output = around.output.view(),
                               .lse = around.lse_view(),
                               .partial_output = around.partial_output_view(),
                               .partial_lse = around.partial_lse_view(),
                               .causal = options.causal,
                               .scale = options.scale};
  const DecodeAnswer got = around.answer(run(call, problem, options.judge));
  if (options.judge) {
    key.expect_unchanged();
    value.expect_unchanged();
    block_table.expect_unchanged();
  }
  return got;
}

template <typename T>
DecodeCall<T> paged_on_gpu(void (*launch)(const PagedDecode<T>&, const Stream&)) {
  const auto call =
      on_gpu<PagedDecode<T>>("flash_paged_decode", [launch](const PagedDecode<T>& problem) { launch(problem, {}); });
  return {call.name, [call](const DecodeInputs& in, const DecodeOptions& options) {
            return in_pages<T, GpuTensor>(call, in, options);
          }};
}

DecodeCall<float> paged_on_host() {
  const auto call = on_host<PagedDecode<float>>("tiled_paged_decode", tiled_paged_decode);
  return {call.name,
          [call](const DecodeInputs& in, const DecodeOptions& options) {
            return in_pages<float, HostTensor>(call, in, options);
          },
          true};
}

const DecodeStep step{paged_on_host(), paged_on_gpu<float>(flash_paged_decode), paged_on_gpu<fp16>(flash_paged_decode),
                      paged_on_gpu<bf16>(flash_paged_decode)};

const Recognise recognise_paged_kv(decode_case_numbers(), [](int number) { return decode_outputs(step, number); });

bool needs_a_gpu() {
  return flashkata::testing::needs_a_gpu([] { return expect_even_shares(step.fp32, 1, {3}, {}); });
}

DecodeOptions options_of(Index splits, Index page_size, Storage storage = Storage::two_buffers) {
  return {.splits = splits, .paging = {.page_size = page_size, .storage = storage}};
}

// ---- The manager ----------------------------------------------------------------------------------------------------

// Tokens that say where they belong: sequence, place, head, channel; values are the negative.
Tensor<float, 3> tokens(int sequence, Index first, Index count, Index heads, Index width, float sign) {
  Tensor<float, 3> tensor({heads, count, width});
  for (Index h = 0; h < heads; ++h)
    for (Index t = 0; t < count; ++t)
      for (Index d = 0; d < width; ++d) {
        tensor(h, t, d) = sign * static_cast<float>(10000 * sequence + 100 * (first + t) + 10 * h + d + 1);
      }
  return tensor;
}

void append(PagedCache& cache, int sequence, int name, Index first, Index count) {
  const Index heads = cache.key_pages().size(1), width = cache.key_pages().size(3);
  cache.append(sequence, tokens(name, first, count, heads, width, 1.0f),
               tokens(name, first, count, heads, width, -1.0f));
}

struct Content {
  int sequence;  // its number in the cache
  int name;      // that of its tokens
  Index length;
};

// Tables, lengths, contents, and that no page is lost or given twice.
bool expect_cache(const PagedCache& cache, const std::vector<Content>& sequences, const std::string& when) {
  std::vector<int> numbers;
  for (const Content& e : sequences) numbers.push_back(e.sequence);
  const Tensor<std::int32_t, 1> lengths = cache.lengths(numbers);
  const Tensor<std::int32_t, 2> table = cache.block_table(numbers);
  const Index size = cache.page_size(), pages = cache.key_pages().size(0);
  Index blocks = 0, used = 0;
  for (const Content& e : sequences) {
    blocks = std::max(blocks, ceil_div(e.length, size));
    used += ceil_div(e.length, size);
  }
  const auto count = static_cast<Index>(sequences.size());
  if (!expect(lengths.size(0) == count, "lengths",
              to_text(lengths.shape()) + " " + when + "; want " + to_text(Shape<1>{count})))
    return false;
  if (!expect(table.shape() == Shape<2>{count, blocks}, "block_table",
              to_text(table.shape()) + " " + when + "; want " + to_text(Shape<2>{count, blocks})))
    return false;
  std::set<std::int32_t> taken;
  for (Index b = 0; b < count; ++b) {
    const Content& e = sequences[static_cast<std::size_t>(b)];
    const std::string who = "of row " + std::to_string(b) + " " + when;
    if (!expect(lengths(b) == e.length, "lengths",
                std::to_string(lengths(b)) + " " + who + "; want " + std::to_string(e.length)))
      return false;
    for (Index block = 0; block < blocks; ++block) {
      const std::int32_t page = table(b, block);
      const std::string entry = "entry " + std::to_string(block) + " " + who + " is " + std::to_string(page);
      if (block * size >= e.length) {
        if (!expect(page == -1, "block_table", entry + "; want -1 behind the last page")) return false;
        continue;
      }
      if (!expect(page >= 0 && page < pages, "block_table", entry + "; want a page")) return false;
      if (!expect(taken.insert(page).second, "block_table", entry + ", a page that somebody else has")) return false;
    }
    for (Index j = 0; j < e.length; ++j)
      for (Index h = 0; h < cache.key_pages().size(1); ++h)
        for (Index d = 0; d < cache.key_pages().size(3); ++d) {
          const Index page = table(b, j / size);
          const float want = static_cast<float>(10000 * e.name + 100 * j + 10 * h + d + 1);
          const float key = cache.key_pages()(page, h, j % size, d), value = cache.value_pages()(page, h, j % size, d);
          if (key == want && value == -want) continue;
          const bool key_wrong = key != want;
          finding(key_wrong ? "key_pages" : "value_pages", "key " + std::to_string(j) + ", head " + std::to_string(h) +
                                                               ", channel " + std::to_string(d) + " " + who + ": got " +
                                                               std::to_string(key_wrong ? key : value) + ", want " +
                                                               std::to_string(key_wrong ? want : -want));
          return false;
        }
  }
  return expect(cache.free_pages() == pages - used, "free_pages",
                std::to_string(cache.free_pages()) + " " + when + "; want " + std::to_string(pages - used));
}

}  // namespace

TEST_SUITE("phase4.07_paged_kv") {
  TEST_CASE("tokens go to the sequence's pages one after the other") {
    ask("Pages of 4 slots, and 3 tokens, then 3 more. In which page and slot is token 3, in which token 4, and how "
        "many "
        "pages did the second call take?");
    for (const Index size : {1, 3, 4, 16}) {
      PagedCache cache(20, 2, size, 8);
      const int one = cache.add_sequence();
      if (!expect_cache(cache, {{one, 1, 0}}, "at first")) return;
      Index length = 0;
      for (const Index count : {1, 2, 0, 1, 4, 3, 5}) {
        append(cache, one, 1, length, count);
        length += count;
        if (!expect_cache(cache, {{one, 1, length}},
                          "after " + std::to_string(length) + " tokens, page_size " + std::to_string(size)))
          return;
      }
    }
  }

  TEST_CASE("sequences grow in turns and keep their pages apart") {
    ask("Two sequences take pages in turns. Which pages has each, and in which order? Must they lie side by side?");
    PagedCache cache(12, 1, 4, 4);
    const int one = cache.add_sequence(), two = cache.add_sequence(), three = cache.add_sequence();
    if (!expect(one != two && two != three && one != three, "sequence", "two sequences have the same number")) return;
    append(cache, one, 1, 0, 5);
    append(cache, two, 2, 0, 3);
    append(cache, one, 1, 5, 6);
    append(cache, three, 3, 0, 4);
    append(cache, two, 2, 3, 9);
    if (!expect_cache(cache, {{one, 1, 11}, {two, 2, 12}, {three, 3, 4}}, "after five calls")) return;
    if (!expect_cache(cache, {{three, 3, 4}, {one, 1, 11}, {two, 2, 12}}, "asked in another order")) return;
  }

  TEST_CASE("a released sequence gives its pages back") {
    ask("A sequence ends. Who may have its pages now, and how would you notice if they were lost, or given twice?");
    PagedCache cache(6, 2, 2, 4);
    for (int round = 0; round < 12; ++round) {
      const std::string when = "in round " + std::to_string(round);
      const int one = cache.add_sequence(), two = cache.add_sequence();
      append(cache, one, 1, 0, 3);
      append(cache, two, 2, 0, 5);
      append(cache, one, 1, 3, 2);
      if (!expect_cache(cache, {{one, 1, 5}, {two, 2, 5}}, when)) return;
      cache.release(round % 2 == 0 ? one : two);
      const int rest = round % 2 == 0 ? two : one, name = round % 2 == 0 ? 2 : 1;
      if (!expect_cache(cache, {{rest, name, 5}}, "when the other had gone, " + when)) return;
      const int three = cache.add_sequence();
      if (!expect(three != one && three != two, "sequence", "a number was given again, " + when)) return;
      append(cache, three, 3, 0, 6);
      if (!expect_cache(cache, {{three, 3, 6}, {rest, name, 5}}, "when a third had come, " + when)) return;
      cache.release(three);
      cache.release(rest);
      if (!expect(cache.free_pages() == 6, "free_pages",
                  std::to_string(cache.free_pages()) + " when all had gone, " + when + "; want 6"))
        return;
    }
  }

  TEST_CASE("an append that does not fit says how many pages are missing and changes nothing") {
    ask("2 pages are free and 4 are needed. How many are missing? And what has become of the first tokens when you "
        "find "
        "out?");
    PagedCache cache(5, 1, 4, 4);
    const int one = cache.add_sequence(), two = cache.add_sequence();
    append(cache, one, 1, 0, 6);
    append(cache, two, 2, 0, 3);
    const auto missing = [&](int sequence, int name, Index first, Index count) -> Index {
      try {
        append(cache, sequence, name, first, count);
      } catch (const CacheFull& full) {
        return full.missing();
      }
      return 0;
    };
    const std::vector<Content> before{{one, 1, 6}, {two, 2, 3}};
    for (const auto& [count, want] : {std::array<Index, 2>{11, 1}, {14, 1}, {15, 2}, {30, 5}}) {
      const Index got = missing(one, 9, 6, count);
      if (!expect(got == want, "missing",
                  std::to_string(got) + " for " + std::to_string(count) +
                      " tokens more, with 2 slots left in the last page and 2 pages free; want " +
                      std::to_string(want)))
        return;
      if (!expect_cache(cache, before, "after an append that did not fit")) return;
    }
    // What fits exactly, fits.
    if (!expect(missing(one, 1, 6, 10) == 0, "missing", "10 tokens do not fit in 2 slots and 2 pages of 4")) return;
    if (!expect(missing(two, 2, 3, 1) == 0, "missing", "1 token does not fit in the last slot of a page")) return;
    if (!expect_cache(cache, {{one, 1, 16}, {two, 2, 4}}, "when all pages were full")) return;
    expect(missing(two, 9, 4, 1) == 1, "missing", "not 1 for one token with no slot and no page left");
    expect(missing(two, 9, 4, 0) == 0, "missing", "some for no token at all");
    expect_cache(cache, {{one, 1, 16}, {two, 2, 4}}, "when nothing more fitted");
  }

  TEST_CASE("tokens may come in any layout") {
    ask("The model's keys lie as [tokens, Hk, D]. How far apart are two tokens of a head there?");
    PagedCache cache(4, 2, 4, 4);
    const int one = cache.add_sequence();
    const Tensor<float, 3> packed_key = tokens(1, 0, 7, 2, 4, 1.0f), packed_value = tokens(1, 0, 7, 2, 4, -1.0f);
    Tensor<float, 3> key({7, 2, 4}), value({7, 2, 6});
    for (Index h = 0; h < 2; ++h)
      for (Index t = 0; t < 7; ++t)
        for (Index d = 0; d < 4; ++d) {
          key(t, h, d) = packed_key(h, t, d);
          value(t, h, d) = packed_value(h, t, d);
        }
    cache.append(one, View<const float, 3>(key.data(), {2, 7, 4}, {4, 8, 1}),
                 View<const float, 3>(value.data(), {2, 7, 4}, {6, 12, 1}));
    if (!expect_cache(cache, {{one, 1, 7}}, "after 7 tokens in the model's layout")) return;
    // Channel by channel: [D, tokens, Hk] in memory.
    const int two = cache.add_sequence();
    Tensor<float, 3> turned_key({4, 5, 2}), turned_value({4, 5, 2});
    for (Index h = 0; h < 2; ++h)
      for (Index t = 0; t < 5; ++t)
        for (Index d = 0; d < 4; ++d) {
          turned_key(d, t, h) = packed_key(h, t, d);
          turned_value(d, t, h) = packed_value(h, t, d);
        }
    cache.append(two, View<const float, 3>(turned_key.data(), {2, 5, 4}, {1, 2, 10}),
                 View<const float, 3>(turned_value.data(), {2, 5, 4}, {1, 2, 10}));
    expect_cache(cache, {{one, 1, 7}, {two, 1, 5}}, "after 5 tokens whose channels lay apart");
  }

  TEST_CASE("the manager says what is wrong") {
    PagedCache cache(4, 2, 4, 4);
    const int one = cache.add_sequence(), two = cache.add_sequence();
    append(cache, one, 1, 0, 5);
    append(cache, two, 2, 0, 2);
    const Tensor<float, 3> good({2, 3, 4}), wide({2, 3, 5}), headless({1, 3, 4}), longer({2, 4, 4});
    // Sequences may have any numbers; these two have never been anybody's.
    const int above = std::max(one, two) + 70, below = std::min(one, two) - 70;
    expect_rejected("an append to nobody", "sequence", [&] { cache.append(above, good, good); });
    expect_rejected("keys too wide", "key", [&] { cache.append(one, wide, wide); });
    expect_rejected("keys of one head", "key", [&] { cache.append(one, headless, headless); });
    expect_rejected("more values than keys", "value", [&] { cache.append(one, good, longer); });
    expect_rejected("the release of nobody", "sequence", [&] { cache.release(below); });
    const std::array<int, 2> unknown{one, above};
    expect_rejected("the table of nobody", "sequence", [&] { cache.block_table(unknown); });
    expect_rejected("the length of nobody", "sequence", [&] { cache.lengths(unknown); });
    expect_cache(cache, {{one, 1, 5}, {two, 2, 2}}, "after calls that were refused");
    cache.release(one);
    expect_rejected("a second release", "sequence", [&] { cache.release(one); });
    expect_rejected("an append to one that has gone", "sequence", [&] { cache.append(one, good, good); });
    expect_cache(cache, {{two, 2, 2}}, "when the first had gone");
    expect_rejected("no pages", "pages", [] { PagedCache(0, 1, 1, 1); });
    expect_rejected("pages without slots", "page_size", [] { PagedCache(1, 1, 0, 1); });
  }

  TEST_CASE("one key gives its value") {
    ask("There is one key in the cache. In which page is it, and where does that page begin?");
    for (const auto& call : step.both()) {
      if (!expect_one_key(call, !kernels_are_checked())) return;
    }
    if (expect_one_key(step.half, !kernels_are_checked()) && !kernels_are_checked()) expect_one_key(step.brain, true);
  }

  TEST_CASE("five keys in pages of two are the example of the README") {
    ask("Work it out with a pencil: in which page and slot is key 3?");
    for (const auto& call : step.both()) {
      if (!expect_worked_example(call, options_of(1, 2))) return;
    }
    if (expect_worked_example(step.half, options_of(1, 2))) expect_worked_example(step.brain, options_of(2, 2));
  }

  TEST_CASE("a query of 0 shares evenly among the keys of its sequence") {
    ask("All scores are 0. How many slots of the last page are real? exp(lse) counts the keys for you.");
    const std::vector<Lengths> many{{1, 2, 7, 15, 16, 17}, {31, 32, 33, 63, 64, 65}, {127, 128, 129, 5, 0, 1}};
    for (const auto& call : step.both()) {
      for (const Lengths& lengths : many) {
        for (const Index size : {1, 4, 7, 16, 32, 256}) {
          if (kernels_are_checked() && size % 4 != 0) continue;
          if (!expect_even_shares(call, 1, lengths, options_of(1 + size % 3, size))) return;
        }
      }
    }
    if (expect_even_shares(step.half, 1, many[1], options_of(3, 16))) {
      expect_even_shares(step.brain, 1, many[2], options_of(2, 7));
    }
  }

  TEST_CASE("the newest tokens see the keys up to their own place") {
    ask("4 new tokens, 10 keys in the cache, those of the 4 among them. Which keys does the first of the 4 see, and "
        "which "
        "the last?");
    for (const auto& call : step.both()) {
      for (const Index queries : {2, 5, 16}) {
        if (kernels_are_checked() && queries == 5) continue;
        DecodeOptions options = options_of(2, 8);
        if (!expect_even_shares(call, queries, {10, 4, 33, 0, 17}, options)) return;
        options.causal = false;
        if (!expect_even_shares(call, queries, {10, 4, 33, 0, 17}, options)) return;
      }
    }
    if (expect_even_shares(step.half, 4, {10, 2, 33}, options_of(2, 8))) {
      expect_even_shares(step.brain, 3, {10, 2, 33}, options_of(1, 4));
    }
  }

  TEST_CASE("a part without keys changes nothing") {
    ask("3 keys and 8 parts. What do the parts without a key put into partial_lse, and which entry of the table would "
        "they "
        "have looked at?");
    for (const auto& call : step.both()) {
      for (const Lengths& lengths : {Lengths{3, 1}, Lengths{17, 40}}) {
        if (!expect_even_shares(call, 1, lengths, options_of(8, 16))) return;
      }
      if (!expect_fair_parts(call, {300, 130, 64}, options_of(4, 16))) return;
      if (!kernels_are_checked() && !expect_even_shares(call, 1, {700, 64}, options_of(40, 16))) return;
    }
    if (!expect_even_shares(step.half, 2, {3, 20}, options_of(8, 4))) return;
    if (!expect_even_shares(step.brain, 2, {3, 20}, options_of(8, 16)) || kernels_are_checked()) return;
    // More parts than a block of the merge reads at first, in wide rows.
    const Sizes wide{.keys = 1500, .width = 128};
    if (!expect_decoded(step.fp32, random_decode<float>(wide, {1500}, 18), options_of(80, 16))) return;
    expect_decoded(step.half, random_decode<fp16>(wide, {1500}, 18), options_of(80, 48));
  }

  TEST_CASE("what the parts leave behind adds up to the output") {
    ask("partial_output(s, ...) is the average of part s, whoever merges it: where in memory does it begin, and who "
        "divided it by what?");
    expect_parts_add_up(step, options_of(3, 16));
  }

  TEST_CASE("a key that matches far better than the others gives its value alone") {
    ask("One score is 60 above the rest. In which page is that key, and is it the first or the last slot of it?");
    const std::vector<Index> places{0, 1, 15, 16, 31, 32, 47, 48, 63, 64, 65, 95, 96, 127, 128, 129, 130};
    for (const auto& call : step.both()) {
      if (!expect_needles(call, 131, places, options_of(1, 16))) return;
      if (!expect_needles(call, 131, places, options_of(3, 32))) return;
      if (!kernels_are_checked() && !expect_needles(call, 131, places, options_of(4, 5))) return;
    }
    if (expect_needles(step.half, 131, places, options_of(3, 16))) {
      expect_needles(step.brain, 131, places, options_of(2, 64));
    }
  }

  TEST_CASE("pages may lie in any order") {
    ask("Shuffle the pages and the table with them: may the output change? Which of your indices counts along the "
        "sequence, and which along the memory?");
    const DecodeInputs in =
        random_decode<float>({.batch = 3, .heads = 4, .kv_heads = 2, .queries = 2, .keys = 70}, {70, 33, 5}, 31);
    for (const auto& call : step.both()) {
      DecodeOptions options = options_of(2, 16);
      options.paging.order = 0;
      options.paging.spare = 0;
      const DecodeAnswer want = call(in, options);
      for (const unsigned order : {1u, 2u, 3u}) {
        options.paging.order = order;
        options.paging.spare = order;
        if (!expect_same(call, call(in, options), want, in, options, "when the pages lay in another order")) return;
      }
    }
  }

  TEST_CASE("pages may be of any size") {
    ask("The same keys in pages of 1, 3, 16 and 100 slots. May the output change? Which of your numbers is a multiple "
        "of "
        "the page size only by chance?");
    const DecodeInputs in =
        random_decode<float>({.batch = 2, .heads = 4, .kv_heads = 2, .queries = 2, .keys = 70}, {70, 33}, 32);
    const ExpectedForward want = expected_decode<float>(in, {});
    for (const auto& call : step.both()) {
      for (const Index size : {1, 3, 8, 64, 100}) {
        if (expect_decoded(call, in, options_of(2, size), want)) continue;
        finding("pages", "of " + std::to_string(size) + " slots");
        return;
      }
    }
  }

  TEST_CASE("keys and values may share one buffer") {
    ask("K and V of a page lie side by side, and then comes the next page. How far is page 1 from page 0, and who "
        "knows "
        "that?");
    const DecodeInputs in =
        random_decode<float>({.batch = 2, .heads = 4, .kv_heads = 2, .queries = 2, .keys = 70}, {70, 33}, 33);
    for (const auto& call : step.both()) {
      const DecodeAnswer want = call(in, options_of(2, 16));
      for (const Storage storage : {Storage::interleaved, Storage::interleaved_tokens}) {
        const DecodeOptions options = options_of(2, 16, storage);
        if (!expect_same(call, call(in, options), want, in, options, "when K and V shared a buffer")) return;
      }
    }
    for (const Storage storage : {Storage::interleaved, Storage::interleaved_tokens}) {
      if (!expect_even_shares(step.half, 1, {20, 37}, options_of(2, 16, storage))) return;
      if (!expect_even_shares(step.brain, 1, {20, 37}, options_of(1, 4, storage))) return;
    }
  }

  TEST_CASE("rows may lie anywhere in memory") {
    ask("How far apart in memory are two slots of a page, two heads, two pages? Which of your strides belongs to which "
        "tensor?");
    for (const auto& call : step.both()) {
      if (!expect_anywhere(call, options_of(2, 8))) return;
      if (!kernels_are_checked() && !expect_anywhere(call, options_of(1, 16))) return;
    }
    if (expect_anywhere(step.half, options_of(2, 16))) expect_anywhere(step.brain, options_of(1, 16));
  }

  TEST_CASE("two sequences may share a page") {
    ask("Two questions about the same text: the pages of the text are in both rows of the table. Who may write to "
        "them, "
        "and does your kernel?");
    DecodeInputs in =
        random_decode<float>({.batch = 3, .heads = 4, .kv_heads = 2, .queries = 2, .keys = 50}, {50, 20, 31}, 34);
    for (Index b = 1; b < 3; ++b)
      for (Index h = 0; h < 2; ++h)
        for (Index j = 0; j < 16; ++j)
          for (Index d = 0; d < 16; ++d) {
            in.in.key(b, h, j, d) = in.in.key(0, h, j, d);
            in.in.value(b, h, j, d) = in.in.value(0, h, j, d);
          }
    DecodeOptions options = options_of(2, 16);
    for (const auto& call : step.both()) {
      options.paging.shared_first = false;
      const DecodeAnswer want = call(in, options);
      options.paging.shared_first = true;
      if (!expect_same(call, call(in, options), want, in, options, "when the sequences shared their first page"))
        return;
    }
  }

  TEST_CASE("query heads find the key and value head of their group") {
    ask("48 query heads, 2 key/value heads: a group has 24. If a block takes 16 rows at a time, whose keys do heads 16 "
        "to "
        "31 need?");
    for (const auto& call : step.both()) {
      for (const auto& [heads, kv_heads] : {std::array<Index, 2>{48, 2}, {40, 2}, {80, 4}, {6, 3}, {4, 4}}) {
        if (kernels_are_checked() && heads > 40) continue;
        if (!expect_groups(call, heads, kv_heads, 1, options_of(2, 4))) return;
      }
      if (!expect_groups(call, 12, 2, 3, options_of(1, 4))) return;
    }
    if (expect_groups(step.half, 48, 2, 1, options_of(2, 4))) expect_groups(step.brain, 12, 2, 3, options_of(1, 4));
  }

  TEST_CASE("a key that a query may not see cannot move its output") {
    ask("The rest of the last page holds what some other sequence left there. Who reads it, and does a weight of 0 "
        "protect "
        "from a value that is NaN?");
    for (const float poison : {7.5f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
      for (const Index back : {1, 2, 4}) {
        if (kernels_are_checked() && (back != 2 || poison == poison)) continue;
        for (const auto& call : step.both()) {
          if (!expect_unmoved(call, back, poison, options_of(2, 16))) return;
        }
        if (!expect_unmoved(step.half, back, poison, options_of(2, 16))) return;
        if (!expect_unmoved(step.brain, back, poison, options_of(1, 4))) return;
      }
    }
  }

  TEST_CASE("what a value holds reaches every query that may see it") {
    ask("A value has become NaN in one channel. Which queries see that key, and did their outputs notice in that "
        "channel "
        "and in no other?");
    for (const auto& call : step.both()) {
      if (!expect_nan_values_seen(call, options_of(2, 8))) return;
    }
    if (expect_nan_values_seen(step.half, options_of(2, 8))) expect_nan_values_seen(step.brain, options_of(1, 16));
  }

  TEST_CASE("sequences know nothing of each other") {
    ask("The sequences come in another order, and the rows of the table with them. Whose row does a block read, and "
        "whose "
        "length?");
    for (const auto& call : step.both()) {
      if (!expect_strangers(call, options_of(1, 16)) || !expect_strangers(call, options_of(3, 8))) return;
    }
    if (expect_strangers(step.half, options_of(3, 16))) expect_strangers(step.brain, options_of(1, 8));
  }

  TEST_CASE("whoever wants no lse gets the same output") {
    ask("Nobody asked for the lse this time. Who else needs it, besides the caller?");
    for (const auto& call : step.both()) {
      if (!expect_without_lse(call, options_of(1, 16)) || !expect_without_lse(call, options_of(3, 16))) return;
    }
  }

  TEST_CASE("the same inputs give the same bits") {
    ask("Twice the same call, with another in between. Which of your sums depends on who comes first? And what is left "
        "in "
        "the scratch from the last call?");
    for (const auto& call : step.both()) {
      if (!expect_repeatable(call, options_of(4, 16))) return;
    }
    if (expect_repeatable(step.half, options_of(4, 16))) expect_repeatable(step.brain, options_of(1, 16));
  }

  TEST_CASE("a key is loaded once for the heads of its group") {
    ask("4 query heads read the same key. How many times does it come from global memory? And the slots behind the "
        "length?");
    if (needs_a_check()) return;
    for (const auto& [heads, queries] : {std::array<Index, 2>{1, 1}, {4, 1}, {8, 2}}) {
      if (!expect_loaded_once(step.fp32, "key_pages", "value_pages", heads, queries)) return;
      if (!expect_loaded_once(step.brain, "key_pages", "value_pages", heads, queries)) return;
    }
    if (expect_no_row_of_scores(step.fp32, "key_pages", "value_pages")) {
      expect_no_row_of_scores(step.half, "key_pages", "value_pages");
    }
  }

  TEST_CASE("agrees with the float64 reference") {
    for_each(decode_cases(), [](const DecodeCase& c) {
      const DecodeInputs in = c.inputs<float>();
      const ExpectedForward want = expected_decode<float>(in, c.options());
      for (const auto& call : step.both()) {
        if (!expect_decoded(call, in, c.options(), want)) return;
      }
      if (kernels_are_checked() && c.number % 3 != 0) return;
      if (!expect_decoded(step.half, c.inputs<fp16>(), c.options()) || kernels_are_checked()) return;
      expect_decoded(step.brain, c.inputs<bf16>(), c.options());
    });
  }

  TEST_CASE("decoding from the manager's pages agrees with the float64 reference") {
    ask("The table and the lengths come from the manager now. Do its pages hold what the reference was given?");
    const DecodeInputs in =
        random_decode<float>({.batch = 2, .heads = 4, .kv_heads = 2, .queries = 3, .keys = 45}, {45, 18}, 35);
    PagedCache cache(8, 2, 8, 16);
    const std::array<int, 3> sequences{cache.add_sequence(), cache.add_sequence(), cache.add_sequence()};
    const auto add = [&](Index b, Index first, Index count) {
      const auto part = [&](const Tensor<float, 4>& all) {
        const Shape<4> strides = all.view().strides();
        return View<const float, 3>(&all(b, 0, first, 0), {2, count, 16}, {strides[1], strides[2], 1});
      };
      cache.append(sequences[static_cast<std::size_t>(b)], part(in.in.key), part(in.in.value));
    };
    cache.append(sequences[2], tokens(7, 0, 3, 2, 16, 1.0f), tokens(7, 0, 3, 2, 16, -1.0f));
    add(0, 0, 20);
    add(1, 0, 3);
    cache.release(sequences[2]);
    add(1, 3, 15);  // the page that has come back is taken, old tokens and all
    for (Index first = 20; first < 40; ++first) add(0, first, 1);
    if (kernels_are_checked()) return;
    const Tensor<std::int32_t, 1> lengths = cache.lengths(std::span(sequences).first(2));
    const Tensor<std::int32_t, 2> table = cache.block_table(std::span(sequences).first(2));
    if (!expect(lengths(0) == 40 && lengths(1) == 18, "lengths", "not 40 and 18")) return;
    DecodeInputs shorter = copy_of(in);
    shorter.lengths = {40, 18};
    Tensor<float, 4> output({2, 4, 3, 16});
    Tensor<float, 3> lse({2, 4, 3});
    Tensor<float, 5> partial_output({2, 2, 4, 3, 16});
    Tensor<float, 4> partial_lse({2, 2, 4, 3});
    tiled_paged_decode({.query = in.in.query.view(),
                        .key_pages = cache.key_pages(),
                        .value_pages = cache.value_pages(),
                        .block_table = table,
                        .lengths = lengths,
                        .output = output,
                        .lse = lse.view(),
                        .partial_output = partial_output,
                        .partial_lse = partial_lse});
    expect_forward<float>({to_array(output), to_array(lse), {}}, expected_decode<float>(shorter, {}));
  }

  TEST_CASE("agrees with the float64 reference at thousands of keys") {
    if (needs_a_gpu()) return;
    const std::vector<DecodeOptions> options{options_of(1, 16, Storage::interleaved), options_of(4, 256),
                                             options_of(33, 64)};
    if (!expect_long_cache(step.fp32, 8, 2, 1, 128, {4096, 1000}, options)) return;
    if (!expect_long_cache(step.half, 32, 8, 1, 128, {4100, 2001}, options)) return;
    if (!expect_long_cache(step.brain, 64, 8, 2, 128, {2049, 3}, options)) return;
    expect_long_cache(step.brain, 16, 4, 4, 16, {2500}, options);
  }

  TEST_CASE("says what is wrong with bad arguments") {
    const Shape<4> queries{2, 4, 3, 16}, pages{3, 2, 4, 16};
    using Problem = PagedDecode<float>;
    const auto refuses = [&](auto&& numbers, auto&& integers, const auto& launch, bool on_host) {
      const auto in = [&](const Shape<4>& shape) { return View<const float, 4>(numbers.data(), shape); };
      std::remove_reference_t<decltype(numbers)> o("output", 2 * 4 * 3 * 16), l("lse", 2 * 4 * 3),
          po("partial_output", 2 * 2 * 4 * 3 * 16), pl("partial_lse", 2 * 2 * 4 * 3);
      const Problem good{.query = in(queries),
                         .key_pages = in(pages),
                         .value_pages = in(pages),
                         .block_table = View<const std::int32_t, 2>(integers.data(), {2, 2}),
                         .lengths = View<const std::int32_t, 1>(integers.data() + 4, {2}),
                         .output = View<float, 4>(o.data(), queries),
                         .lse = View<float, 3>(l.data(), {2, 4, 3}),
                         .partial_output = View<float, 5>(po.data(), {2, 2, 4, 3, 16}),
                         .partial_lse = View<float, 4>(pl.data(), {2, 2, 4, 3})};
      const auto call = [&](const Problem& problem) {
        if (on_host) return launch(problem);
        run_kernels([&] { launch(problem); });
      };
      call(good);
      const auto rejected = [&](std::string_view what, std::string_view argument, const auto& change) {
        Problem bad = good;
        change(bad);
        expect_rejected(what, argument, [&] { call(bad); });
      };
      rejected("17 queries", "query", [&](Problem& p) { p.query = in({1, 1, 17, 16}); });
      rejected("3 key heads for 4 query heads", "key_pages", [&](Problem& p) {
        p.key_pages = p.value_pages = in({2, 3, 4, 16});
      });
      rejected("keys of another width", "key_pages", [&](Problem& p) {
        p.key_pages = p.value_pages = in({3, 2, 2, 32});
      });
      rejected("pages without slots", "key_pages", [&](Problem& p) {
        p.key_pages = p.value_pages = in({3, 2, 0, 16});
      });
      rejected("a page of values too few", "value_pages", [&](Problem& p) { p.value_pages = in({2, 2, 4, 16}); });
      rejected("a table of one row", "block_table", [&](Problem& p) {
        p.block_table = View<const std::int32_t, 2>(integers.data(), {1, 2});
      });
      rejected("one length for 2 sequences", "lengths",
               [&](Problem& p) { p.lengths = View<const std::int32_t, 1>(integers.data() + 4, {1}); });
      rejected("an output too short", "output", [&](Problem& p) {
        p.output = View<float, 4>(o.data(), {2, 4, 2, 16});
      });
      rejected("an lse of other heads", "lse", [&](Problem& p) { p.lse = View<float, 3>(l.data(), {2, 2, 3}); });
      rejected("no part", "partial_lse", [&](Problem& p) {
        p.partial_lse = View<float, 4>(pl.data(), {0, 2, 4, 3});
        p.partial_output = View<float, 5>(po.data(), {0, 2, 4, 3, 16});
      });
      rejected("a scale that is infinite", "scale",
               [](Problem& p) { p.scale = std::numeric_limits<float>::infinity(); });
      rejected("slots that are not 16 bytes apart", "key_pages", [&](Problem& p) {
        p.key_pages = View<const float, 4>(numbers.data(), pages, {136, 68, 17, 1});
      });
      rejected("values that begin between two multiples of 16 bytes", "value_pages",
               [&](Problem& p) { p.value_pages = View<const float, 4>(numbers.data() + 1, pages); });
      if (!on_host) return;
      const std::array<std::int32_t, 2> too_long{7, 9};
      const std::array<std::int32_t, 4> no_page{0, 3, 2, -1}, unused{0, 1, 2, -1};
      rejected("9 keys in 2 pages of 4", "lengths",
               [&](Problem& p) { p.lengths = View<const std::int32_t, 1>(too_long.data(), {2}); });
      rejected("page 3 of 3", "block_table", [&](Problem& p) {
        p.block_table = View<const std::int32_t, 2>(no_page.data(), {2, 2});
      });
      Problem fine = good;  // the second sequence has 4 keys and no need of its second entry
      fine.block_table = View<const std::int32_t, 2>(unused.data(), {2, 2});
      call(fine);
    };
    const std::vector<float> numbers(2 * 4 * 8 * 16, 0.5f);
    const std::vector<std::int32_t> integers{0, 1, 2, -1, 7, 4};  // the table, the lengths
    if (!kernels_are_checked()) {
      HostBuffer<float> memory("inputs", numbers.size());
      memory.upload(numbers);
      HostBuffer<std::int32_t> host("integers", integers.size());
      host.upload(integers);
      refuses(
          memory, host, [](const Problem& p) { tiled_paged_decode(p); }, true);
    }
    DeviceBuffer<float> memory("inputs", numbers);
    DeviceBuffer<std::int32_t> gpu("integers", integers);
    refuses(
        memory, gpu, [](const Problem& p) { flash_paged_decode(p); }, false);
  }
}
