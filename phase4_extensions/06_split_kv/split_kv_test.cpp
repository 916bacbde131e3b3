#include "split_kv.hpp"

#include "phase4_extensions/decode_suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

const DecodeStep step{decode_on_host("tiled_decode", tiled_decode), decode_on_gpu<float>("flash_decode", flash_decode),
                      decode_on_gpu<fp16>("flash_decode", flash_decode),
                      decode_on_gpu<bf16>("flash_decode", flash_decode)};

const Recognise recognise_split_kv(decode_case_numbers(), [](int number) { return decode_outputs(step, number); });

bool needs_a_gpu() {
  return flashkata::testing::needs_a_gpu([] { return expect_even_shares(step.fp32, 1, {3}, {}); });
}

// What choose_splits() promises for one set of numbers, alone and beside its neighbours.
bool expect_good_splits(Index batch, Index heads, Index longest, int multiprocessors) {
  const auto splits_of = [&](Index b, Index h, Index n) {
    return static_cast<Index>(choose_splits(b, h, n, multiprocessors));
  };
  const Index splits = splits_of(batch, heads, longest);
  const Index worth_it = std::max<Index>(1, longest / 128);
  const std::string got = "for " + std::to_string(batch) + " sequences of up to " + std::to_string(longest) +
                          " keys, " + std::to_string(heads) + " key/value heads and " +
                          std::to_string(multiprocessors) + " multiprocessors: got " + std::to_string(splits) +
                          (splits == 1 ? " part" : " parts");
  const Index blocks = batch * heads * splits;
  return expect(splits >= 1, "splits", got + "; want at least 1") &&
         expect(splits <= worth_it, "splits", got + "; want at most " + std::to_string(worth_it) + ", longest / 128") &&
         expect(blocks >= multiprocessors || splits == worth_it, "splits",
                got + ", " + std::to_string(blocks) + " blocks; want at least 1 for each multiprocessor, or " +
                    std::to_string(worth_it) + " parts") &&
         expect(blocks - batch * heads < 16 * multiprocessors, "splits",
                got + "; one less would be " + std::to_string(blocks - batch * heads) +
                    " blocks, and want fewer than 16 for each multiprocessor then") &&
         expect(splits_of(batch, heads, longest + 100) >= splits, "splits",
                got + ", and fewer for 100 keys more; want no fewer") &&
         expect(splits_of(batch, heads, 2 * longest) >= splits, "splits",
                got + ", and fewer for twice as many keys; want no fewer") &&
         expect(splits_of(batch + 1, heads, longest) <= splits, "splits",
                got + ", and more for one sequence more; want no more") &&
         expect(splits_of(batch, heads + 1, longest) <= splits, "splits",
                got + ", and more for one head more; want no more");
}

}  // namespace

TEST_SUITE("phase4.06_split_kv") {
  TEST_CASE("one key gives its value") {
    ask("There is one key in the cache. What do its part, the other parts and the merge report?");
    for (const auto& call : step.both()) {
      if (!expect_one_key(call, !kernels_are_checked())) return;
    }
    if (expect_one_key(step.half, !kernels_are_checked()) && !kernels_are_checked()) expect_one_key(step.brain, true);
  }

  TEST_CASE("five keys in four parts are the example of the README") {
    ask("Work it out with a pencil: what does each part report, and what do you make of it?");
    for (const auto& call : step.both()) {
      if (!expect_worked_example(call, {.splits = 4})) return;
    }
    if (expect_worked_example(step.half, {.splits = 4})) expect_worked_example(step.brain, {.splits = 4});
  }

  TEST_CASE("a query of 0 shares evenly among the keys of its sequence") {
    ask("All scores are 0. How many keys does this sequence have, and how many are in the sum? exp(lse) counts them "
        "for "
        "you.");
    const std::vector<Lengths> many{{1, 2, 7, 15, 16, 17}, {31, 32, 33, 63, 64, 65}, {127, 128, 129, 5, 200, 1}};
    for (const auto& call : step.both()) {
      for (const Lengths& lengths : many) {
        for (const Index splits : {1, 3, 5}) {
          if (kernels_are_checked() && splits == 5) continue;
          if (!expect_even_shares(call, 1, lengths, {.splits = splits})) return;
        }
      }
    }
    if (expect_even_shares(step.half, 1, many[1], {.splits = 3})) {
      expect_even_shares(step.brain, 1, many[2], {.splits = 2});
    }
  }

  TEST_CASE("the newest tokens see the keys up to their own place") {
    ask("4 new tokens, 10 keys in the cache, those of the 4 among them. Which keys does the first of the 4 see, and "
        "which "
        "the last?");
    const Lengths lengths{10, 4, 33, 64, 17};
    for (const auto& call : step.both()) {
      for (const Index queries : {2, 4, 16}) {
        for (const bool causal : {true, false}) {
          if (kernels_are_checked() && !causal && queries != 4) continue;
          if (!expect_even_shares(call, queries, lengths, {.splits = 2, .causal = causal})) return;
        }
      }
    }
    if (!expect_even_shares(step.half, 4, lengths, {.splits = 2})) return;
    expect_even_shares(step.brain, 3, lengths, {.splits = 1});
  }

  TEST_CASE("a query that sees no key has output 0 and an lse of -inf") {
    ask("A sequence is empty, or shorter than the number of new tokens. What is the maximum of nothing, what is its "
        "sum, "
        "and who writes the row?");
    for (const auto& call : step.both()) {
      for (const Index splits : {1, 4}) {
        if (!expect_even_shares(call, 5, {2, 0, 5, 1}, {.splits = splits})) return;
      }
    }
    if (expect_even_shares(step.half, 5, {2, 0, 5, 1}, {.splits = 4})) {
      expect_even_shares(step.brain, 5, {2, 0, 5, 1}, {.splits = 1});
    }
  }

  TEST_CASE("a part without keys changes nothing") {
    ask("3 keys and 8 parts. What do the parts without a key put into partial_lse, and may anybody read what is in "
        "their "
        "partial_output?");
    for (const auto& call : step.both()) {
      for (const Lengths& lengths : {Lengths{3, 1}, Lengths{17, 40}, Lengths{64, 2}}) {
        for (const Index splits : {2, 8, 16}) {
          if (kernels_are_checked() && splits == 2) continue;
          if (!expect_even_shares(call, 1, lengths, {.splits = splits})) return;
        }
      }
    }
    if (expect_even_shares(step.half, 2, {3, 20}, {.splits = 8})) {
      expect_even_shares(step.brain, 2, {3, 20}, {.splits = 8});
    }
  }

  TEST_CASE("every part has its share of the keys") {
    ask("1000 keys and 8 parts: if one of them has all the work, what do the other blocks do meanwhile? Where does "
        "part s "
        "of a sequence begin?");
    for (const auto& call : step.both()) {
      if (!expect_fair_parts(call, {400, 130, 64}, {.splits = 4})) return;
      if (!expect_fair_parts(call, {300, 299}, {.splits = 3})) return;
    }
    if (!kernels_are_checked() && expect_fair_parts(step.half, {400, 130}, {.splits = 4})) {
      expect_fair_parts(step.brain, {400, 130}, {.splits = 4});
    }
  }

  TEST_CASE("what the parts leave behind adds up to the output") {
    ask("partial_output(s, ...) is the average of part s, whoever merges it: where in memory does it begin, and who "
        "divided it by what?");
    expect_parts_add_up(step, {.splits = 3});
  }

  TEST_CASE("a key that matches far better than the others gives its value alone") {
    ask("One score is 60 above the rest. In which part is that key, and is it the first or the last of it?");
    const std::vector<Index> places{0, 1, 15, 16, 31, 32, 47, 48, 63, 64, 65, 95, 96, 127, 128, 129, 130};
    for (const auto& call : step.both()) {
      for (const Index splits : {1, 2, 3, 4}) {
        if (kernels_are_checked() && splits % 2 == 0) continue;
        if (!expect_needles(call, 131, places, {.splits = splits})) return;
      }
    }
    if (expect_needles(step.half, 131, places, {.splits = 3})) expect_needles(step.brain, 131, places, {.splits = 1});
  }

  TEST_CASE("parts whose scores lie far apart merge") {
    ask("One part has scores near 200, the other near 90. What is exp(200) in a float, and which of the two lse is the "
        "one "
        "to measure against?");
    for (const auto& call : step.both()) {
      for (const Index splits : {1, 2, 5}) {
        if (kernels_are_checked() && splits != 2) continue;
        if (!expect_apart(call, 200.0, 199.0, {.splits = splits})) return;
        if (!expect_apart(call, -150.0, 90.0, {.splits = splits})) return;
        if (!expect_apart(call, 90.0, -150.0, {.splits = splits})) return;
        if (!expect_apart(call, -200.0, -201.0, {.splits = splits})) return;
      }
    }
  }

  TEST_CASE("query heads find the key and value head of their group") {
    ask("48 query heads, 2 key/value heads: a group has 24. If a block takes 16 rows at a time, whose keys do heads 16 "
        "to "
        "31 need?");
    for (const auto& call : step.both()) {
      for (const auto& [heads, kv_heads] :
           {std::array<Index, 2>{48, 2}, {40, 2}, {80, 4}, {6, 3}, {4, 4}, {5, 1}, {18, 3}}) {
        if (kernels_are_checked() && heads > 48) continue;
        if (!expect_groups(call, heads, kv_heads, 1, {.splits = 2})) return;
      }
      if (!expect_groups(call, 6, 2, 5, {.splits = 1}) || !expect_groups(call, 12, 2, 3, {.splits = 2})) return;
    }
    if (expect_groups(step.half, 48, 2, 1, {.splits = 2}) && expect_groups(step.half, 12, 2, 3, {.splits = 1})) {
      expect_groups(step.brain, 40, 2, 1, {.splits = 1});
    }
  }

  TEST_CASE("a key that a query may not see cannot move its output") {
    ask("Slots behind the length hold what some other sequence left there. Who reads them, and does a weight of 0 "
        "protect "
        "from a value that is NaN?");
    for (const float poison : {7.5f, -3e4f, std::numeric_limits<float>::infinity(),
                               -std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
      for (const Index back : {0, -2, 1, 2, 4}) {
        if (kernels_are_checked() && (back < 0 || back % 2 != 0 || poison == poison)) continue;
        for (const auto& call : step.both()) {
          if (!expect_unmoved(call, back, poison, {.splits = 2})) return;
        }
        if (back == 1) continue;
        if (!expect_unmoved(step.half, back, poison, {.splits = 2})) return;
        if (!expect_unmoved(step.brain, back, poison, {.splits = 1})) return;
      }
    }
  }

  TEST_CASE("what a value holds reaches every query that may see it") {
    ask("A value has become NaN in one channel. Which queries see that key, and did their outputs notice in that "
        "channel "
        "and in no other?");
    for (const bool causal : {true, false}) {
      for (const auto& call : step.both()) {
        if (!expect_nan_values_seen(call, {.splits = 2, .causal = causal})) return;
      }
      if (!expect_nan_values_seen(step.half, {.splits = 2, .causal = causal})) return;
      if (!expect_nan_values_seen(step.brain, {.splits = 1, .causal = causal})) return;
    }
  }

  TEST_CASE("sequences know nothing of each other") {
    ask("The sequences come in another order. From a block's number, how do you know its sequence, its head and its "
        "part? "
        "And in the merge?");
    for (const auto& call : step.both()) {
      if (!expect_strangers(call, {.splits = 1}) || !expect_strangers(call, {.splits = 3})) return;
    }
    if (expect_strangers(step.half, {.splits = 3})) expect_strangers(step.brain, {.splits = 1});
  }

  TEST_CASE("rows may lie anywhere in memory") {
    ask("How far apart in memory are two keys of this cache, and two heads of it? Which of your strides belongs to "
        "which "
        "tensor?");
    for (const auto& call : step.both()) {
      if (!expect_anywhere(call, {.splits = 2})) return;
      if (!kernels_are_checked() && !expect_anywhere(call, {.splits = 1})) return;
    }
    if (expect_anywhere(step.half, {.splits = 2})) expect_anywhere(step.brain, {.splits = 1});
  }

  TEST_CASE("whoever wants no lse gets the same output") {
    ask("Nobody asked for the lse this time. Who else needs it, besides the caller?");
    for (const auto& call : step.both()) {
      if (!expect_without_lse(call, {.splits = 1}) || !expect_without_lse(call, {.splits = 3})) return;
    }
    if (expect_without_lse(step.half, {.splits = 3})) expect_without_lse(step.brain, {.splits = 1});
  }

  TEST_CASE("the same inputs give the same bits") {
    ask("Twice the same call, with another in between. Which of your sums depends on who comes first? And what is left "
        "in "
        "the scratch from the last call?");
    for (const auto& call : step.both()) {
      if (!expect_repeatable(call, {.splits = 4})) return;
    }
    if (expect_repeatable(step.half, {.splits = 4})) expect_repeatable(step.brain, {.splits = 1});
  }

  TEST_CASE("the number of parts fits the work and the machine") {
    ask("1 sequence with 8 heads on 132 multiprocessors: how many blocks are there without a split? And with 64 "
        "sequences? "
        "What does a part of 16 keys cost in the merge, beside what it reads?");
    for (const int multiprocessors : {1, 20, 132, 148}) {
      for (const Index batch : {1, 2, 7, 8, 64, 300}) {
        for (const Index heads : {1, 2, 8, 32}) {
          for (const Index longest : {0, 1, 100, 127, 128, 255, 256, 300, 1000, 4096, 16000, 32768, 131072}) {
            if (!expect_good_splits(batch, heads, longest, multiprocessors)) return;
          }
        }
      }
    }
    expect_rejected("no sequence", "batch", [] { choose_splits(0, 1, 1, 1); });
    expect_rejected("no head", "kv_heads", [] { choose_splits(1, 0, 1, 1); });
    expect_rejected("a length of -1", "longest", [] { choose_splits(1, 1, -1, 1); });
    expect_rejected("no multiprocessor", "multiprocessors", [] { choose_splits(1, 1, 1, 0); });
  }

  TEST_CASE("a key is loaded once for the heads of its group") {
    ask("4 query heads read the same key. How many times does it come from global memory, and whose time is that? And "
        "the "
        "slots behind the length?");
    if (needs_a_check()) return;
    for (const auto& [heads, queries] : {std::array<Index, 2>{1, 1}, {4, 1}, {1, 4}, {6, 1}, {8, 2}}) {
      if (!expect_loaded_once(step.fp32, "key", "value", heads, queries)) return;
      if (!expect_loaded_once(step.brain, "key", "value", heads, queries)) return;
    }
  }

  TEST_CASE("no row of scores is kept in shared memory") {
    ask("For how many keys at once does your block hold scores? What if there were a million keys?");
    if (needs_a_check()) return;
    if (expect_no_row_of_scores(step.fp32, "key", "value")) expect_no_row_of_scores(step.half, "key", "value");
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

  TEST_CASE("does not depend on the number of parts") {
    ask("The same keys, cut into 1, 2, 7 and 40 parts. May the answer depend on how you cut the work?");
    const DecodeInputs in =
        random_decode<float>({.batch = 2, .heads = 4, .kv_heads = 2, .queries = 2, .keys = 300}, {300, 111}, 17);
    const ExpectedForward want = expected_decode<float>(in, {});
    for (const auto& call : step.both()) {
      for (const Index splits : {1, 2, 7, 40}) {
        if (kernels_are_checked() && splits > 2) continue;
        if (!expect_decoded(call, in, {.splits = splits}, want)) return;
      }
    }
    if (kernels_are_checked()) return;
    // Parts beyond those that a block of the merge reads at first, in wide rows.
    for (const Index width : {64, 128}) {
      const Sizes sizes{.keys = 1500, .width = width};
      const DecodeOptions options{.splits = 80};
      if (!expect_decoded(step.host, random_decode<float>(sizes, {1500}, 18), options)) return;
      if (!expect_decoded(step.fp32, random_decode<float>(sizes, {1500}, 18), options)) return;
      if (!expect_decoded(step.half, random_decode<fp16>(sizes, {1500}, 18), options)) return;
      if (!expect_decoded(step.brain, random_decode<bf16>(sizes, {1500}, 18), options)) return;
    }
  }

  TEST_CASE("agrees with the float64 reference at thousands of keys") {
    if (needs_a_gpu()) return;
    const std::vector<DecodeOptions> options{{.splits = 1}, {.splits = 4}, {.splits = 33}};
    if (!expect_long_cache(step.fp32, 8, 2, 1, 128, {4096, 1000}, options)) return;
    if (!expect_long_cache(step.half, 32, 8, 1, 128, {4100, 2001}, options)) return;
    if (!expect_long_cache(step.brain, 64, 8, 2, 128, {2049, 3}, options)) return;
    if (!expect_long_cache(step.brain, 8, 8, 16, 64, {1000, 999}, options)) return;
    if (!expect_long_cache(step.half, 48, 2, 1, 32, {2500}, options)) return;
    expect_long_cache(step.brain, 16, 4, 4, 16, {2500}, options);
  }

  TEST_CASE("says what is wrong with bad arguments") {
    const Shape<4> queries{2, 4, 3, 16}, keys{2, 2, 7, 16};
    using Problem = Decode<float>;
    // The same memory for the host's answer and for the GPU's.
    const auto refuses = [&](auto&& numbers, auto&& lengths, const auto& launch, bool on_host) {
      const auto in = [&](const Shape<4>& shape) { return View<const float, 4>(numbers.data(), shape); };
      std::remove_reference_t<decltype(numbers)> o("output", 2 * 4 * 3 * 16), l("lse", 2 * 4 * 3),
          po("partial_output", 2 * 2 * 4 * 3 * 16), pl("partial_lse", 2 * 2 * 4 * 3), wide("wide", 2 * 2 * 4 * 3 * 32);
      const Problem good{.query = in(queries),
                         .key = in(keys),
                         .value = in(keys),
                         .lengths = View<const std::int32_t, 1>(lengths.data(), {2}),
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
      rejected("a width of 8", "query", [&](Problem& p) {
        p.query = in({2, 4, 3, 8});
        p.key = p.value = in({2, 2, 7, 8});
        p.output = View<float, 4>(o.data(), {2, 4, 3, 8});
        p.partial_output = View<float, 5>(po.data(), {2, 2, 4, 3, 8});
      });
      rejected("17 queries", "query", [&](Problem& p) { p.query = in({1, 1, 17, 16}); });
      rejected("no query", "query", [&](Problem& p) { p.query = in({2, 4, 0, 16}); });
      rejected("3 key heads for 4 query heads", "key", [&](Problem& p) { p.key = p.value = in({2, 3, 7, 16}); });
      rejected("no key head", "key", [&](Problem& p) { p.key = p.value = in({2, 0, 7, 16}); });
      rejected("keys of another batch", "key", [&](Problem& p) { p.key = p.value = in({1, 2, 7, 16}); });
      rejected("a value too few", "value", [&](Problem& p) { p.value = in({2, 2, 6, 16}); });
      rejected("3 lengths for 2 sequences", "lengths",
               [&](Problem& p) { p.lengths = View<const std::int32_t, 1>(lengths.data(), {1}); });
      rejected("an output too short", "output", [&](Problem& p) {
        p.output = View<float, 4>(o.data(), {2, 4, 2, 16});
      });
      rejected("an lse of other heads", "lse", [&](Problem& p) { p.lse = View<float, 3>(l.data(), {2, 2, 3}); });
      rejected("no part", "partial_lse", [&](Problem& p) {
        p.partial_lse = View<float, 4>(pl.data(), {0, 2, 4, 3});
        p.partial_output = View<float, 5>(po.data(), {0, 2, 4, 3, 16});
      });
      rejected("outputs of one part and lse of two", "partial_output", [&](Problem& p) {
        p.partial_output = View<float, 5>(po.data(), {1, 2, 4, 3, 16});
      });
      rejected("parts of other queries", "partial_lse", [&](Problem& p) {
        p.partial_lse = View<float, 4>(pl.data(), {2, 2, 4, 2});
      });
      rejected("parts whose rows lie apart", "partial_output", [&](Problem& p) {
        p.partial_output = View<float, 5>(wide.data(), {2, 2, 4, 3, 16}, {768, 384, 96, 32, 1});
      });
      rejected("a scale that is NaN", "scale", [](Problem& p) { p.scale = std::nanf(""); });
      rejected("keys whose rows are not 16 bytes apart", "key", [&](Problem& p) {
        p.key = View<const float, 4>(numbers.data(), keys, {238, 119, 17, 1});
      });
      rejected("values that begin between two multiples of 16 bytes", "value",
               [&](Problem& p) { p.value = View<const float, 4>(numbers.data() + 1, keys); });
      if (on_host) {
        const std::array<std::int32_t, 2> too_long{7, 8}, negative{-1, 7};
        rejected("8 keys in a cache of 7", "lengths",
                 [&](Problem& p) { p.lengths = View<const std::int32_t, 1>(too_long.data(), {2}); });
        rejected("a length of -1", "lengths",
                 [&](Problem& p) { p.lengths = View<const std::int32_t, 1>(negative.data(), {2}); });
        // The first sequence is fine, the second is not.
        o.upload(std::vector<float>(2 * 4 * 3 * 16, 7.5f));
        rejected("8 keys in a cache of 7", "lengths",
                 [&](Problem& p) { p.lengths = View<const std::int32_t, 1>(too_long.data(), {2}); });
        const std::vector<float> now = o.download();
        expect(std::all_of(now.begin(), now.end(), [](float x) { return x == 7.5f; }), "output",
               "was written before the arguments were refused");
      }
    };
    const std::vector<float> numbers(2 * 4 * 8 * 16, 0.5f);
    const std::vector<std::int32_t> lengths{7, 4};
    if (!kernels_are_checked()) {
      HostBuffer<float> memory("inputs", numbers.size());
      memory.upload(numbers);
      HostBuffer<std::int32_t> host_lengths("lengths", 2);
      host_lengths.upload(lengths);
      refuses(
          memory, host_lengths, [](const Problem& p) { tiled_decode(p); }, true);
    }
    DeviceBuffer<float> memory("inputs", numbers);
    DeviceBuffer<std::int32_t> gpu_lengths("lengths", lengths);
    refuses(
        memory, gpu_lengths, [](const Problem& p) { flash_decode(p); }, false);
  }
}
