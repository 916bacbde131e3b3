// In the order in which one would build it: the CPU's path, a call for each group, the fused forward kernel, the fused
// backward kernels; then what holds everywhere, and what only a real GPU has the time for.
#include "grouped_cases.hpp"
#include "grouped_long.hpp"
#include "grouped_probes.hpp"

using namespace flashkata;
using namespace flashkata::testing;
using namespace flashkata::testing::grouped;

namespace {

const Recognise recognise_grouped(all_numbers(), [](int number) -> std::vector<Array> {
  if (kernels_are_checked()) throw NotImplemented(__FILE__);
  const GroupedCase& c = grouped_cases().at(static_cast<std::size_t>(number % 100) - 1);
  switch (static_cast<Tried>(number / 100)) {
    case Tried::cpu_forward:
      return outputs_of(CPU_FORWARD, c);
    case Tried::cpu_backward:
      return outputs_of(CPU_BACKWARD, c);
    case Tried::separate:
      return takes_bf16(c) ? outputs_of(separate<bf16>(), c) : outputs_of(separate<fp16>(), c);
    case Tried::fused:
      return takes_bf16(c) ? outputs_of(fused<bf16>(), c) : outputs_of(fused<fp16>(), c);
    case Tried::fused_backward:
      break;
  }
  return takes_bf16(c) ? outputs_of(fused_backward<bf16>(), c) : outputs_of(fused_backward<fp16>(), c);
});

}  // namespace

TEST_SUITE("phase4.05_grouped") {
  // ---- The CPU's path -----------------------------------------------------------------------------------------------

  TEST_CASE("cpu: the example in the README") {
    ask("Two groups, three keys. What has key 1 to do with query 0, and what with query 1?");
    if (expect_example(CPU_FORWARD)) expect_example(CPU_BACKWARD, true);
  }

  TEST_CASE("cpu: a query counts the keys of its own slice") {
    ask("Every score is 0, so exp(lse) is how many keys a query has seen. Which of the four numbers of a group did "
        "you use for which view, and who wrote the rows of queries that are in no group?");
    for_each_arrangement(false, {.heads = 2, .width = 16}, [](const Grouped& g) {
      return expect_counts(CPU_FORWARD, g) && expect_needles(CPU_FORWARD, g);
    });
  }

  TEST_CASE("cpu: causal counts from the end of a slice") {
    ask("The last query of a group sees the last key of its slice. With 3 queries and 5 keys, how many does the "
        "first one see? Does it matter where in the tensor the slice lies?");
    for_each_arrangement(true, {.heads = 2, .width = 16}, [](const Grouped& g) {
      return expect_counts(CPU_FORWARD, g) && expect_needles(CPU_FORWARD, g);
    });
  }

  TEST_CASE("cpu: a key hears from every group that sees it") {
    ask("Key 10 belongs to two slices. How many gradients meet there, and what was in that place before the first?");
    for (const bool causal : {false, true}) {
      for_each_arrangement(causal, {.width = 16},
                           [](const Grouped& g) { return expect_even_shares(CPU_BACKWARD, g, true); });
    }
    for_each_arrangement(true, {.heads = 4, .kv_heads = 2, .width = 16},
                         [](const Grouped& g) { return expect_even_shares(CPU_BACKWARD, g, true); });
  }

  TEST_CASE("cpu: no query and no key") {
    ask("With no key at all, what are the maximum and the sum of nothing? And who writes the gradients of keys that "
        "nobody asks?");
    for (const Grouped& g : nothing_to_do()) {
      if (!expect_counts(CPU_FORWARD, g) || !expect_even_shares(CPU_BACKWARD, g, true)) return;
    }
  }

  TEST_CASE("cpu: query heads share key and value heads") {
    ask("With 6 query heads and 2 key/value heads, which of the two does query head 1 read? Head 3? And whose "
        "gradients does a key add up?");
    for_each_arrangement(false, {.heads = 6, .kv_heads = 2, .width = 16},
                         [](const Grouped& g) { return expect_own_kv_head(CPU_FORWARD, g); });
  }

  TEST_CASE("cpu: keys outside of a slice reach nobody") {
    ask("A key of another group holds NaN. Did it come near a product of yours?");
    if (!expect_foreign_unseen(CPU_FORWARD, 16)) return;
    for_each_arrangement(true, {.heads = 2, .width = 16},
                         [](const Grouped& g) { return expect_strangers_are_harmless(CPU_BACKWARD, g, true); });
  }

  TEST_CASE("cpu: forward agrees with the float64 reference") {
    ask("Which of the cases agree, and what have the others in common?");
    for_each_case(Tried::cpu_forward, [](const GroupedCase& c) {
      expect_attention(CPU_FORWARD, c.problem, inputs_of<float>(c), c.layouts);
    });
  }

  TEST_CASE("cpu: backward agrees with the float64 reference") {
    ask("Which of the cases agree, and what have the others in common?");
    for_each_case(Tried::cpu_backward, [](const GroupedCase& c) {
      expect_right_gradients(CPU_BACKWARD, c.problem, inputs_of<float>(c), is_deterministic(c), c.layouts);
    });
  }

  // ---- (a) A call for each group ------------------------------------------------------------------------------------

  TEST_CASE("one call a group: a query counts the keys of its own slice") {
    ask("A slice of a view is a pointer and a shape. Where does group g begin in each of the five views, and which "
        "call writes the rows of queries that are in no group?");
    for_each_arrangement(false, {}, [](const Grouped& g) { return expect_counts(separate<bf16>(), g); });
  }

  TEST_CASE("one call a group: query heads share key and value heads") {
    ask("2.05 wants as many heads of keys as of queries. Which strides let three heads read one, without a copy?");
    expect_own_kv_head(separate<fp16>(),
                       {.queries = 5, .keys = 9, .groups = {{0, 5, 2, 9}}, .heads = 6, .kv_heads = 2});
  }

  TEST_CASE("one call a group: agrees with the float64 reference") {
    ask("Which of the cases agree, and what have the others in common?");
    for_each_case(Tried::separate, [](const GroupedCase& c) {
      if (takes_bf16(c)) {
        expect_attention(separate<bf16>(), c.problem, inputs_of<bf16>(c), c.layouts);
      } else {
        expect_attention(separate<fp16>(), c.problem, inputs_of<fp16>(c), c.layouts);
      }
    });
  }

  // ---- (b) The fused forward kernel ---------------------------------------------------------------------------------

  TEST_CASE("fused: the example in the README") {
    ask("Two groups of one query each, in one block. Which keys does each row see, and which does the block load?");
    for_both_types([](auto type) {
      using T = decltype(type);
      expect_example(separate<T>());
      expect_example(fused<T>());
    });
  }

  TEST_CASE("fused: one group is plain attention") {
    ask("With one group of everything nothing is new. What has changed in your kernel since 2.05?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const Index width : {64, 128}) {
        if ((width == 64) != std::is_same_v<T, fp16>) continue;
        Grouped g{.queries = 33, .keys = 70, .groups = {{0, 33, 0, 70}}, .width = width};
        for (const bool causal : {false, true}) {
          g.causal = causal;
          if (!expect_needles(fused<T>(), g) || !expect_attention(fused<T>(), g, random_of<T>(g, 2))) return;
        }
      }
    });
  }

  TEST_CASE("fused: a query counts the keys of its own slice") {
    ask("Every score is 0, so exp(lse) is how many keys a query has seen. Two rows of one block are of two groups: "
        "from where does each know its slice? And the rows of no group, whose are they?");
    for_each_arrangement(false, {}, [](const Grouped& g) { return expect_counts(fused<fp16>(), g); });
  }

  TEST_CASE("fused: every key of a slice can win") {
    ask("Each query meets one key of its slice. Where does the slice begin in your tile, where does it end, and "
        "which of the two is no multiple of anything?");
    for_each_arrangement(false, {}, [](const Grouped& g) { return expect_needles(fused<bf16>(), g); });
    for_each_arrangement(true, {}, [](const Grouped& g) { return expect_needles(fused<fp16>(), g); });
  }

  TEST_CASE("fused: causal counts from the end of a slice") {
    ask("The last query of a group sees the last key of its slice. A row has a place in its block, in its group and "
        "in the tensor: which of the three counts here?");
    for_each_arrangement(true, {}, [](const Grouped& g) { return expect_counts(fused<bf16>(), g); });
  }

  TEST_CASE("fused: groups of every length and up to 128 of them") {
    ask("Groups of 15, 16 and 17 queries, and of one. To which group does the first query behind a boundary belong? "
        "Is there a number of groups that you had counted on?");
    for (const Index count : {2, 3, 4, 8, 16, 40, 128}) {
      Grouped g{.queries = 0, .keys = 160};
      for (Index n = 0; n < count; ++n) {
        const Index length = count > 16 ? 1 : std::array<Index, 4>{15, 1, 17, 16}[static_cast<std::size_t>(n % 4)];
        g.groups.push_back({g.queries, g.queries + length, n, n + 1 + n % 5 * 7});
        g.queries += count == 128 ? length + 1 : length;  // with a gap behind each
      }
      if (kernels_are_checked() && count > 4 && count != 40) continue;
      if (!expect_counts(fused<fp16>(), g)) return;
      g.causal = true;
      if (count <= 16 && !kernels_are_checked() && !expect_needles(fused<bf16>(), g)) return;
    }
  }

  TEST_CASE("fused: no query and no key") {
    ask("With no key at all, what are the maximum and the sum of nothing? How many blocks do you launch, and who "
        "writes "
        "the gradients of keys that nobody asks?");
    for (const Grouped& g : nothing_to_do()) {
      if (!expect_counts(separate<fp16>(), g) || !expect_counts(fused<fp16>(), g)) return;
      for (const bool deterministic : {false, true}) {
        if (!expect_even_shares(fused_backward<bf16>(), g, deterministic)) return;
      }
    }
  }

  TEST_CASE("fused: query heads share key and value heads") {
    ask("With 6 query heads and 2 key/value heads, which of the two does query head 1 read? Head 3? How many rows "
        "want the tile that a block has loaded?");
    expect_own_kv_head(
        fused<fp16>(),
        {.queries = 21, .keys = 19, .groups = {{0, 9, 0, 15}, {9, 21, 9, 19}}, .heads = 6, .kv_heads = 2});
    expect_own_kv_head(fused<bf16>(),
                       {.queries = 4, .keys = 19, .groups = {{1, 4, 2, 19}}, .heads = 32, .kv_heads = 8});
    expect_own_kv_head(fused<bf16>(),
                       {.queries = 3, .keys = 19, .groups = {{0, 1, 2, 9}, {2, 3, 4, 19}}, .heads = 20, .kv_heads = 1});
    expect_own_kv_head(fused<fp16>(), {.queries = 70,
                                       .keys = 19,
                                       .groups = {{0, 67, 0, 15}, {67, 70, 9, 19}},
                                       .heads = 4,
                                       .kv_heads = 2,
                                       .causal = true});
  }

  TEST_CASE("fused: keys outside of a slice reach nobody") {
    ask("A tile is loaded for one group, and another one of the same block may not see half of it: NaN there. A "
        "weight of 0 is no protection: what is 0 times NaN, and who multiplies a whole tile at once?");
    if (!expect_foreign_unseen(fused<bf16>(), 64, 1)) return;
    if (!kernels_are_checked()) expect_foreign_unseen(fused<fp16>(), 64, 0);
  }

  TEST_CASE("fused: what a key or a value holds reaches every query that may see it") {
    ask("A key of two slices is NaN, or its value is in one channel. Did all who see it notice, and nobody else?");
    for (const bool causal : {false, true}) {
      for (const Arrangement& a : arrangements()) {
        if (a.keys != 44 || (kernels_are_checked() && (causal || a.queries > 30))) continue;
        if (!expect_nan_arrives(fused<fp16>(),
                                {.queries = a.queries, .keys = a.keys, .groups = a.groups, .causal = causal})) {
          return;
        }
      }
    }
  }

  TEST_CASE("fused: the same inputs give the same bits") {
    ask("Call it, then with other groups, then as before. What did you keep from one call for the next?");
    const Grouped g{.queries = 40, .keys = 70, .groups = {{0, 20, 0, 50}, {20, 40, 25, 70}}, .causal = true};
    const Grouped other{.queries = 40, .keys = 70, .groups = {{0, 8, 30, 70}, {9, 40, 0, 33}}};
    const Inputs in = random_of<bf16>(g, 1);
    const ForwardAnswer want = attend(fused<bf16>(), g, in);
    if (!expect_attention(fused<bf16>(), other, in)) return;
    for (const std::uint64_t seed : {1u, 2u}) {
      const AnotherOrder order(seed);
      if (!expect_same(attend(fused<bf16>(), g, in), want, "in a later call, in another order of blocks")) return;
    }
  }

  TEST_CASE("fused: 2000 equal weights and as exact as 16 bits allow") {
    ask("Which numbers did you round to 16 bits? The operands arrive so, and the weights and the output have to be. "
        "Anything else, and anything twice?");
    for_both_types([](auto type) {
      using T = decltype(type);
      const Index keys = kernels_are_checked() ? 150 : 2000;
      const Grouped g{.queries = 5, .keys = keys, .groups = {{0, 2, 0, keys}, {2, 5, 3, keys - 1}}};
      const Fill values = [](Index b, Index h, Index j, Index d) { return 1.0 + 0.4 * noise(9)(b, h, j, d); };
      const Inputs alike = filled_inputs<T>(g.sizes(), everywhere(0.0), noise(3), values, everywhere(0.0));
      if (!expect_attention(fused<T>(), g, alike)) return;
      const Grouped few{.queries = 40, .keys = 75, .groups = {{0, 20, 0, 50}, {20, 40, 25, 75}}, .heads = 2};
      if (!expect_attention(fused<T>(), few, random_of<T>(few, 4))) return;
    });
  }

  TEST_CASE("fused: inputs of ten times the size") {
    ask("Scores of a hundred times the size: one key has nearly all the weight. Was the largest score subtracted "
        "before the exponent, in every tile, and for every group its own?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const bool causal : {false, true}) {
        const Grouped g{.queries = 40, .keys = 75, .groups = {{0, 20, 0, 50}, {20, 40, 25, 75}}, .causal = causal};
        const auto tenfold = [](unsigned seed) -> Fill {
          return [=](Index b, Index h, Index s, Index d) { return 10.0 * noise(seed)(b, h, s, d); };
        };
        const Inputs in = filled_inputs<T>(g.sizes(), tenfold(1), tenfold(2), tenfold(3), everywhere(0.0));
        if (!expect_attention(fused<T>(), g, in)) return;
      }
    });
  }

  TEST_CASE("fused: scores far from 0") {
    ask("Every score is -256, or +256, and the values are 1. Where does your search for the maximum begin, and what is "
        "exp(256)?");
    for (const double size : {-16.0, 16.0}) {
      const Grouped g{.queries = 9, .keys = 70, .groups = {{0, 4, 0, 66}, {4, 9, 60, 70}}, .scale = 1.0f};
      const auto first = [](double number) -> Fill {
        return [=](Index, Index, Index, Index d) { return d == 0 ? number : 0.0; };
      };
      const Inputs in = filled_inputs<bf16>(g.sizes(), first(16.0), first(size), everywhere(1.0), everywhere(0.0));
      if (!expect_attention(fused<bf16>(), g, in)) return;
    }
  }

  TEST_CASE("fused: agrees with the float64 reference") {
    ask("Which of the cases agree, and what have the others in common?");
    for_each_case(Tried::fused, [](const GroupedCase& c) {
      if (takes_bf16(c)) {
        expect_attention(fused<bf16>(), c.problem, inputs_of<bf16>(c), c.layouts);
      } else {
        expect_attention(fused<fp16>(), c.problem, inputs_of<fp16>(c), c.layouts);
      }
    });
  }

  TEST_CASE("fused: a width of 16 or 32 is right or refused") {
    ask("Heads of 32 channels come in. Is there a kernel for them, and if not, who is told so?");
    for (const Index width : {16, 32}) {
      const Grouped g{.queries = 20, .keys = 40, .groups = {{0, 9, 3, 40}, {9, 20, 0, 17}}, .heads = 2, .width = width};
      const Inputs in = random_inputs<fp16>(g.sizes(), 71);
      try {
        if (!expect_attention(fused<fp16>(), g, in)) return;
        if (!expect_right_gradients(fused_backward<fp16>(), g, in, true)) return;
      } catch (const std::invalid_argument& refused) {
        if (!expect(std::string(refused.what()).find("query") != std::string::npos, "query",
                    "a width of " + std::to_string(width) + " is refused without naming query"))
          return;
      }
    }
  }

  TEST_CASE("fused: keys and values are loaded once for all groups that share them") {
    ask("Eight groups of 16 queries read the same keys: 128 rows. How often does your block have to load a key for "
        "64 of them? And how many rows of a GQA group want the same one?");
    if (needs_a_check()) return;
    const bool watched = kernels_are_checked();  // otherwise nobody counts
    const Index keys = watched ? 128 : 3;
    Grouped g = coinciding(8, keys);
    if (!expect_forward_traffic<fp16>(g, 2 * keys, "once for every 64 of 128 rows: eight groups share all keys"))
      return;
    g = {.queries = 16, .keys = keys, .groups = {{0, 16, 0, keys}}, .heads = 8};
    if (!expect_forward_traffic<bf16>(g, 2 * keys, "once for every 64 of 128 rows: eight heads share all keys")) return;
    if (!watched) return;
    g = {.queries = 64,
         .keys = 192,
         .groups = {{0, 16, 0, 128}, {16, 32, 64, 192}, {32, 48, 0, 192}, {48, 64, 128, 192}}};
    expect_forward_traffic<bf16>(g, 192, "once: the four groups have 64 rows together");
  }

  TEST_CASE("fused: keys that nobody sees are not loaded") {
    ask("Which tiles does a block have to walk, if its groups see two slices far apart, or if the last of its rows "
        "stops early under causal?");
    if (needs_a_check()) return;
    if (!kernels_are_checked()) {
      expect_counts(fused<fp16>(), {.queries = 2, .keys = 2, .groups = {{0, 2, 0, 2}}});
      return;
    }
    Grouped g{.queries = 128, .keys = 512, .groups = {{0, 64, 0, 64}, {64, 128, 384, 448}}};
    if (!expect_forward_traffic<fp16>(g, 256, "two slices of 64 keys, in tiles of 128 at most")) return;
    g = {.queries = 256, .keys = 256, .groups = {{0, 128, 0, 128}, {128, 256, 128, 256}}, .causal = true};
    expect_forward_traffic<fp16>(g, 460, "causal, two groups of 128: without it 512");
  }

  // ---- (c) The fused backward kernels -------------------------------------------------------------------------------

  TEST_CASE("fused backward: the example in the README") {
    ask("Two groups share key 1. What does each of them say about it, and in which order of your loops do they meet?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const bool deterministic : {false, true}) {
        if (!expect_example(fused_backward<T>(), deterministic)) return;
      }
    });
  }

  TEST_CASE("fused backward: one group is plain attention") {
    ask("With one group of everything nothing is new. What has changed in your kernels since 3.05?");
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const Index width : {64, 128}) {
        if ((width == 64) != std::is_same_v<T, fp16> || (kernels_are_checked() && width == 128)) continue;
        Grouped g{.queries = 33, .keys = 40, .groups = {{0, 33, 0, 40}}, .width = width};
        for (const bool causal : {false, true}) {
          g.causal = causal;
          if (!expect_even_shares(fused_backward<T>(), g, causal)) return;
          if (!expect_right_gradients(fused_backward<T>(), g, random_of<T>(g, 2), !causal)) return;
        }
      }
    });
  }

  TEST_CASE("fused backward: a key hears from every group that sees it") {
    ask("Key 10 belongs to two slices. How many gradients meet there, and who adds them up? Which groups does a "
        "block of keys have to ask?");
    for_each_arrangement(false, {}, [](const Grouped& g) {
      return g.keys % 2 == 0 ? expect_even_shares(fused_backward<fp16>(), g, false)
                             : expect_even_shares(fused_backward<bf16>(), g, true);
    });
  }

  TEST_CASE("fused backward: causal counts from the end of a slice") {
    ask("The first query of a group that sees a key: how do you find it from the key's place in the slice, and does "
        "it lie in the tile where you begin?");
    for_each_arrangement(true, {}, [](const Grouped& g) {
      return g.keys % 2 == 0 ? expect_even_shares(fused_backward<bf16>(), g, true)
                             : expect_even_shares(fused_backward<fp16>(), g, false);
    });
  }

  TEST_CASE("fused backward: groups of every length and up to 128 of them") {
    ask("Groups of 15, 16 and 17 queries, and of one. Is there a number of groups that you had counted on, and a "
        "tile of queries that began in one group and ended in the next?");
    for (const Index count : {3, 16, 128}) {
      Grouped g{.queries = 0, .keys = 100};
      for (Index n = 0; n < count; ++n) {
        const Index length = count > 16 ? 1 : std::array<Index, 4>{15, 1, 17, 16}[static_cast<std::size_t>(n % 4)];
        g.groups.push_back({g.queries, g.queries + length, n % 60, n % 60 + 1 + n % 5 * 7});
        g.queries += count == 128 ? length + 1 : length;  // with a gap behind each
      }
      if (kernels_are_checked() && count > 3) continue;
      if (!expect_even_shares(fused_backward<bf16>(), g, count % 16 == 0)) return;
      g.causal = true;
      if (count == 128) continue;
      if (!expect_even_shares(fused_backward<fp16>(), g, count % 16 != 0)) return;
    }
  }

  TEST_CASE("fused backward: a key hears from every query head that shares it") {
    ask("How many query heads read this key? Where do their shares meet: in registers, in memory, and in how many "
        "bits?");
    for (const bool deterministic : {false, true}) {
      Grouped g{.queries = 21, .keys = 19, .groups = {{0, 9, 0, 15}, {9, 21, 9, 19}}, .heads = 6, .kv_heads = 2};
      if (!expect_even_shares(fused_backward<bf16>(), g, deterministic)) return;
      if (kernels_are_checked()) continue;
      g = {.queries = 70, .keys = 19, .groups = {{0, 67, 0, 15}, {67, 70, 9, 19}}, .heads = 4, .kv_heads = 2};
      if (!expect_even_shares(fused_backward<bf16>(), g, deterministic)) return;
      g = {.queries = 4, .keys = 19, .groups = {{1, 4, 2, 19}}, .heads = 32, .kv_heads = 8, .causal = true};
      if (!expect_even_shares(fused_backward<fp16>(), g, deterministic)) return;
    }
  }

  TEST_CASE("fused backward: 48 shares are rounded once") {
    ask("24 groups and 2 heads each add a little to the gradient of one key. What is 64 + 0.25 in 16 bits, and how "
        "many roundings come before the last share is in?");
    for_both_types([](auto type) {
      using T = decltype(type);
      const Index count = kernels_are_checked() ? 4 : 24;
      Grouped g{.queries = count, .keys = 3, .heads = 2};
      for (Index n = 0; n < count; ++n) g.groups.push_back({n, n + 1, 0, 3});
      const auto near_one = [](unsigned seed) -> Fill {
        return [=](Index b, Index h, Index s, Index d) { return 1.0 + 0.2 * noise(seed)(b, h, s, d); };
      };
      const Inputs in = filled_inputs<T>(g.sizes(), near_one(1), near_one(2), noise(3), near_one(4));
      if (!expect_right_gradients(fused_backward<T>(), g, in, std::is_same_v<T, fp16>)) return;
    });
  }

  TEST_CASE("fused backward: what nobody sees and who sees nobody have gradients of 0") {
    ask("Keys in no slice, queries in no group, slices without a key: who writes their gradients? And if they hold "
        "NaN, into whose tile are they loaded?");
    for_each_arrangement(true, {}, [](const Grouped& g) {
      if (g.groups.size() == 16 || (kernels_are_checked() && g.queries * g.keys > 2200)) return true;
      const bool deterministic = g.groups.size() % 2 == 0;
      return g.keys % 2 == 0 ? expect_strangers_are_harmless(fused_backward<bf16>(), g, deterministic)
                             : expect_strangers_are_harmless(fused_backward<fp16>(), g, !deterministic);
    });
  }

  TEST_CASE("fused backward: keys outside of a slice reach nobody") {
    ask("A key of another group holds NaN, in the same tile. dS is 0 there, and a tensor core multiplies it by that "
        "key all the same: what could stand in the tile instead?");
    const bool first = for_each_shared_slice(1, [](Grouped g, const Group& group) {
      g.causal = group.k_begin == 0;
      return expect_gradients_unmoved(fused_backward<bf16>(), g,
                                      [=](Index j) { return j < group.k_begin || j >= group.k_end; });
    });
    if (!first || kernels_are_checked()) return;
    for_each_shared_slice(0, [](Grouped g, const Group& group) {
      const Index middle = (group.k_begin + group.k_end + 1) / 2;
      g.causal = group.k_begin > 0;
      return expect_gradients_unmoved(fused_backward<fp16>(), g, [=](Index j) { return j >= middle; });
    });
  }

  TEST_CASE("fused backward: the gradients may hold anything before the call and no bit depends on an order") {
    ask("Two blocks add to the same number. Is (a + b) + c the same as (c + a) + b? With deterministic, who owns a "
        "row of dQ, and a row of dK that two groups share?");
    Grouped g{.queries = 40, .keys = 140, .groups = {{0, 18, 0, 140}, {18, 40, 25, 130}}};
    if (kernels_are_checked()) g = {.queries = 20, .keys = 70, .groups = {{0, 9, 0, 70}, {9, 20, 25, 66}}};
    const Inputs in = random_of<bf16>(g, 1);
    const ExpectedBackward<bf16> want = expected_backward<bf16>(in, {}, mask_of(g));
    Grouped other = g;  // of the same sizes, so that what was kept for them would be used
    for (Group& group : other.groups) group.k_begin += 3;
    if (!expect_right_gradients(fused_backward<bf16>(), other, in, true)) return;
    for (const bool deterministic : {true, false}) {
      const Gradients first = go_back(fused_backward<bf16>(), g, in, want.forward, deterministic);
      for (const std::uint64_t seed : {1u, 2u}) {
        if (kernels_are_checked() && seed > 1) continue;
        const AnotherOrder order(seed);
        const Gradients got = go_back(fused_backward<bf16>(), g, in, want.forward, deterministic);
        if (!expect_same(got, first, "when blocks and threads ran in another order", deterministic) ||
            !expect_gradients<bf16>(got, want.gradients)) {
          not_so(fused_backward<bf16>(), g, "bf16", deterministic);
          return;
        }
      }
    }
    expect_deterministic(fused_backward<bf16>(), 128);
  }

  TEST_CASE("fused backward: agrees with the float64 reference") {
    ask("Which of the cases agree, and what have the others in common?");
    for_each_case(Tried::fused_backward, [](const GroupedCase& c) {
      if (takes_bf16(c)) {
        expect_right_both_ways(fused_backward<bf16>(), c);
      } else {
        expect_right_both_ways(fused_backward<fp16>(), c);
      }
    });
  }

  TEST_CASE("fused backward: keys are loaded once for all groups and queries by those who see them") {
    ask("A block of keys meets eight groups one after the other. Which rows stay where they are meanwhile? And which "
        "groups does it not have to meet at all?");
    if (needs_a_check()) return;
    const bool watched = kernels_are_checked();  // otherwise nobody counts
    const Index keys = watched ? 64 : 3;
    for (const bool deterministic : {false, true}) {
      const Grouped same = coinciding(watched ? 8 : 1, keys);
      const Gradients got = traffic_back<fp16>(same, deterministic);
      if (kernels_are_judged() && !expect_rows_loaded(got.profiles, same, 4 * keys,
                                                      "by the kernels that own them, and for every 64 of 128 rows")) {
        not_so(fused_backward<fp16>(), same, "fp16", deterministic);
        return;
      }
      if (!watched) return;
      Grouped apart{.queries = 64, .keys = 256};
      for (Index n = 0; n < 8; ++n) apart.groups.push_back({8 * n, 8 * n + 8, 32 * n, 32 * n + 32});
      const Gradients seen = traffic_back<bf16>(apart, deterministic);
      const Index rows = rows_loaded(seen.profiles, "query", apart.width);
      if (kernels_are_judged() && !expect(rows <= 4 * 64, "traffic",
                                          "query: " + std::to_string(rows) +
                                              " rows loaded of 64; want at most 256: each is seen by 32 keys of "
                                              "256")) {
        not_so(fused_backward<bf16>(), apart, "bf16", deterministic);
        return;
      }
    }
  }

  // ---- What only a real GPU has the time for ------------------------------------------------------------------------

  TEST_CASE("long sequences and many heads") {
    ask("The short ones are right. Which of your numbers has a limit that only a long sequence reaches?");
    if (stress_needs_a_gpu()) return;
    for_both_types([](auto type) {
      using T = decltype(type);
      for (const bool causal : {false, true}) {
        for (const Grouped& g : {
                 with_heads(sequences({256, 256}), 8, 8, 64, causal),
                 with_heads(sequences({512}), 16, 16, 128, causal),
                 with_heads(sequences({1024, 1024, 1024, 1024}), 8, 8, 64, causal),
                 with_heads(sequences({100, 9900}), 2, 1, 64, causal),
                 with_heads(sequences({128, 1024, 257, 640, 511, 129, 900, 384}, 100), 4, 2, 64, causal),
                 with_heads(sequences({128, 512, 257, 130}, 300), 32, 8, 128, causal),
                 with_heads(sequences(std::vector<Index>(128, 1)), 4, 1, 128, causal),
             }) {
          if (!expect_long<T>(g, /*back=*/true, /*deterministic=*/causal)) return;
        }
      }
    });
  }

  TEST_CASE("stress: 65536 and 131072 tokens forward") {
    ask("Which of your indices is an int? What is 131072 x 2 x 64, in bytes, and what is a product of two lengths?");
    if (stress_needs_a_gpu()) return;
    // Two halves, the second of which sees the first as well; then one slice for all.
    for (const bool causal : {false, true}) {
      if (!expect_stress<bf16>(with_heads(sequences({32768, 32768}, 32768), 2, 1, 128, causal), false)) return;
    }
    Grouped all = with_heads(sequences({65536, 65536}), 2, 1, 64, false);
    for (Group& group : all.groups) group.k_begin = 0, group.k_end = all.keys;
    expect_stress<fp16>(all, false);
  }

  TEST_CASE("stress: 32768 tokens forward and backward") {
    ask("A key of the first slice hears from 32768 queries. In how many bits do you count them, and add them up?");
    if (stress_needs_a_gpu()) return;
    for (const bool deterministic : {false, true}) {
      const Grouped g = with_heads(sequences({8192, 100, 16284, 8192}, 8000), 4, 1, 64, deterministic);
      if (!expect_stress<bf16>(g, true, deterministic)) return;
    }
    Grouped all = with_heads(sequences({16384, 16384}), 2, 2, 128, false);
    for (Group& group : all.groups) group.k_begin = 0, group.k_end = all.keys;
    expect_stress<fp16>(all, true);
  }

  TEST_CASE("stress: 32 sequences ten times over") {
    ask("Does the tenth call take what the first one took?");
    if (stress_needs_a_gpu()) return;
    std::vector<Index> lengths;
    for (Index n = 0; n < 32; ++n) lengths.push_back(128 + n * 389 % 897);
    const Grouped g = with_heads(sequences(lengths, 64), 2, 1, 128, true);
    if (!expect_stress<bf16>(g, true, true)) return;
    const Inputs in = random_of<bf16>(g, 7);
    const ForwardAnswer want = attend(fused<bf16>(), g, in);
    const Gradients gradients = go_back(fused_backward<bf16>(), g, in, {want.output, want.lse});
    // Others may be using the GPU as well, so it is a leak only if more is taken after every one of three rounds.
    constexpr std::size_t LITTLE = std::size_t{16} << 20;
    std::size_t before = 0, after = 0;
    for (int round = 0; round == 0 || (round < 3 && after > before + LITTLE); ++round) {
      before = bytes_taken();
      for (int again = 0; again < 10; ++again) {
        if (!expect_same(attend(fused<bf16>(), g, in), want, "in a later call") ||
            !expect_same(go_back(fused_backward<bf16>(), g, in, {want.output, want.lse}), gradients,
                         "in a later call")) {
          return;
        }
      }
      after = bytes_taken();
    }
    figures(mebibytes(before) + " of the GPU taken before ten calls, " + mebibytes(after) + " after them");
    expect(
        after <= before + LITTLE, "memory",
        mebibytes(after - before) + " more were taken on the GPU after ten calls, in the third round as in the others");
  }

  TEST_CASE("says what is wrong with bad arguments") {
    const Grouped good{.queries = 6, .keys = 7, .groups = {{0, 3, 0, 5}, {3, 6, 2, 7}}, .heads = 4, .kv_heads = 2};
    const auto judge = [&](const auto& forward_way, const auto& backward_way, auto type) {
      using T = decltype(type);
      DeviceBuffer<T> inputs("inputs", std::vector<T>(4096, from_float<T>(0.5f)));
      DeviceBuffer<T> outputs("outputs", 4096), d_key("d_key", 4096), d_value("d_value", 4096);
      DeviceBuffer<float> rows("rows", 24), scratch("scratch", 4096);
      const Shape<4> q{1, 4, 6, 64}, k{1, 2, 7, 64};
      const Shape<3> r{1, 4, 6};
      using In = View<const T, 4>;
      using Out = View<T, 4>;
      const FlashForward<T> forward{.query = In(inputs.data(), q),
                                    .key = In(inputs.data(), k),
                                    .value = In(inputs.data(), k),
                                    .output = Out(outputs.data(), q),
                                    .lse = View<float, 3>(rows.data(), r)};
      const FlashBackward<T> backward{.query = In(inputs.data(), q),
                                      .key = In(inputs.data(), k),
                                      .value = In(inputs.data(), k),
                                      .output = In(inputs.data(), q),
                                      .lse = View<const float, 3>(rows.data(), r),
                                      .d_output = In(inputs.data(), q),
                                      .d_query = Out(outputs.data(), q),
                                      .d_key = Out(d_key.data(), k),
                                      .d_value = Out(d_value.data(), k),
                                      .delta = View<float, 3>(scratch.data(), r),
                                      .d_query_sum = View<float, 4>(scratch.data(), q)};
      const auto refused = [](const auto& way, const auto& problem, std::string_view what, std::string_view argument,
                              Groups groups, const auto& change) {
        auto bad = problem;
        change(bad);
        expect_rejected(what, argument, [&] { way.launch(bad, groups); });
      };
      const auto both = [&](std::string_view what, std::string_view argument, const Groups& groups,
                            const auto& change) {
        refused(forward_way, forward, what, argument, groups, change);
        refused(backward_way, backward, what, argument, groups, change);
      };
      const Groups& groups = good.groups;
      const auto nothing = [](auto&) {};
      both("a width of 24", "query", groups, [&](auto& p) { p.query = In(inputs.data(), {1, 4, 6, 24}); });
      both("a batch of two", "query", groups, [&](auto& p) {
        using Problem = std::remove_cvref_t<decltype(p)>;
        const Shape<4> q2{2, 2, 6, 64}, k2{2, 2, 7, 64};
        p.query = In(inputs.data(), q2);
        p.key = p.value = In(inputs.data(), k2);
        if constexpr (std::is_same_v<Problem, FlashForward<T>>) {
          p.output = Out(outputs.data(), q2);
          p.lse = View<float, 3>(rows.data(), {2, 2, 6});
        } else {
          p.output = p.d_output = In(inputs.data(), q2);
          p.d_query = Out(outputs.data(), q2);
          p.d_key = p.d_value = Out(outputs.data(), k2);
          p.lse = View<const float, 3>(rows.data(), {2, 2, 6});
          p.delta = View<float, 3>(scratch.data(), {2, 2, 6});
          p.d_query_sum = View<float, 4>(scratch.data(), q2);
        }
      });
      both("3 key/value heads for 4 query heads", "key", groups, [&](auto& p) {
        p.key = p.value = In(inputs.data(), {1, 3, 7, 64});
      });
      both("a value too few", "value", groups, [&](auto& p) { p.value = In(inputs.data(), {1, 2, 6, 64}); });
      both("a scale that is NaN", "scale", groups, [](auto& p) { p.scale = NOT_A_NUMBER; });
      refused(forward_way, forward, "an lse too short", "lse", groups, [&](auto& p) {
        p.lse = View<float, 3>(rows.data(), {1, 4, 5});
      });
      refused(forward_way, forward, "an output of the keys' heads", "output", groups, [&](auto& p) {
        p.output = Out(outputs.data(), {1, 2, 6, 64});
      });
      refused(backward_way, backward, "a d_key of the queries' heads", "d_key", groups, [&](auto& p) {
        p.d_key = Out(outputs.data(), {1, 4, 7, 64});
      });
      refused(backward_way, backward, "a delta too short", "delta", groups, [&](auto& p) {
        p.delta = View<float, 3>(scratch.data(), {1, 4, 5});
      });
      both("queries from -1 on", "groups[1].q_begin", {{3, 6, 0, 5}, {-1, 3, 0, 5}}, nothing);
      both("queries up to the seventh of six", "groups[1].q_end", {{0, 3, 0, 5}, {3, 7, 0, 5}}, nothing);
      both("queries that end before they begin", "groups[0].q_end", {{3, 2, 0, 5}}, nothing);
      both("keys from -1 on", "groups[0].k_begin", {{0, 3, -1, 5}}, nothing);
      both("keys up to the eighth of seven", "groups[0].k_end", {{0, 3, 0, 8}}, nothing);
      both("keys that end before they begin", "groups[0].k_end", {{0, 3, 5, 4}}, nothing);
      both("keys that begin behind the last", "groups[1].k_begin", {{0, 3, 0, 5}, {3, 6, 8, 8}}, nothing);
      both("a query in two groups", "q_begin", {{0, 3, 0, 5}, {2, 6, 2, 7}}, nothing);
      both("queries inside of another group", "q_begin", {{2, 4, 0, 5}, {4, 4, 0, 5}, {0, 6, 2, 7}}, nothing);
      both("129 groups", "groups", Groups(129, Group{0, 0, 0, 5}), nothing);
      std::vector<T> now = outputs.download();
      const std::vector<T> key_now = d_key.download();
      now.insert(now.end(), key_now.begin(), key_now.end());
      expect(std::all_of(now.begin(), now.end(), [](T x) { return std::isnan(to_float(x)); }), "outputs",
             "were written before the arguments were refused");
    };
    expect_counts(CPU_FORWARD, good);
    expect_even_shares(CPU_BACKWARD, good, true);
    judge(CPU_FORWARD, CPU_BACKWARD, float{});
    for_both_types([&](auto type) {
      using T = decltype(type);
      expect_counts(separate<T>(), good);
      expect_counts(fused<T>(), good);
      expect_even_shares(fused_backward<T>(), good, false);
      judge(fused<T>(), fused_backward<T>(), type);
      judge(separate<T>(), fused_backward<T>(), type);
    });
  }
}
