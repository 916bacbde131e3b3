// Bad arguments of a backward kernel, the bytes that it may move, and lengths that only a real GPU has the time for.
#pragma once

#include "phase3_backward/kernel_suite/judgement.hpp"

namespace flashkata::testing {

// ---- Bad arguments --------------------------------------------------------------------------------------------------

/// After a good call.
template <typename T>
void expect_bad_arguments_refused(const BackwardStep<T>& step) {
  const Index width = step.width;
  DeviceBuffer<T> memory("inputs",
                         std::vector<T>(static_cast<std::size_t>(2 * 3 * 8 * 2 * width), from_float<T>(0.5f)));
  DeviceBuffer<T> gradients("gradients", memory.size());
  DeviceBuffer<float> lse("lse", std::vector<float>(2 * 3 * 5, 0.5f));
  DeviceBuffer<float> scratch("scratch", memory.size());
  const Shape<4> queries{2, 3, 5, width};
  const Shape<4> keys{2, 3, 7, width};
  const Shape<3> rows{2, 3, 5};
  using In = View<const T, 4>;
  using Out = View<T, 4>;
  using Problem = FlashBackward<T>;
  DeviceBuffer<T> d_key("d_key", memory.size());
  DeviceBuffer<T> d_value("d_value", memory.size());
  DeviceBuffer<float> delta("delta", 2 * 3 * 5);
  const Problem good{
      .query = In(memory.data(), queries),
      .key = In(memory.data(), keys),
      .value = In(memory.data(), keys),
      .output = In(memory.data(), queries),
      .lse = View<const float, 3>(lse.data(), rows),
      .d_output = In(memory.data(), queries),
      .d_query = Out(gradients.data(), queries),
      .d_key = Out(d_key.data(), keys),
      .d_value = Out(d_value.data(), keys),
      .delta = View<float, 3>(delta.data(), rows),
      .d_query_sum = View<float, 4>(scratch.data(), queries),
  };
  run_kernels([&] { step.launch(good); });
  const auto rejected = [&](std::string_view what, std::string_view argument, const auto& change) {
    Problem bad = good;
    change(bad);
    expect_rejected(what, argument, [&] { run_kernels([&] { step.launch(bad); }); });
  };
  const Shape<4> fewer{2, 3, 4, width};
  rejected("a width of 8", "query", [&](Problem& p) {
    p.query = p.output = p.d_output = In(memory.data(), {2, 3, 5, 8});
    p.key = p.value = In(memory.data(), {2, 3, 7, 8});
    p.d_query = Out(gradients.data(), {2, 3, 5, 8});
    p.d_key = p.d_value = Out(gradients.data(), {2, 3, 7, 8});
    p.d_query_sum = View<float, 4>(scratch.data(), {2, 3, 5, 8});
  });
  rejected("keys of fewer heads", "key", [&](Problem& p) { p.key = In(memory.data(), {2, 1, 7, width}); });
  rejected("keys of another batch", "key", [&](Problem& p) { p.key = In(memory.data(), {1, 3, 7, width}); });
  rejected("a value too few", "value", [&](Problem& p) { p.value = In(memory.data(), {2, 3, 6, width}); });
  rejected("an output too short", "output", [&](Problem& p) { p.output = In(memory.data(), fewer); });
  rejected("an lse of other heads", "lse", [&](Problem& p) { p.lse = View<const float, 3>(lse.data(), {2, 2, 5}); });
  rejected("a d_output too short", "d_output", [&](Problem& p) { p.d_output = In(memory.data(), fewer); });
  rejected("a d_output as long as the keys", "d_output", [&](Problem& p) { p.d_output = In(memory.data(), keys); });
  rejected("a d_query too short", "d_query", [&](Problem& p) { p.d_query = Out(gradients.data(), fewer); });
  rejected("a d_key as long as the queries", "d_key", [&](Problem& p) { p.d_key = Out(gradients.data(), queries); });
  rejected("a d_value of fewer heads", "d_value", [&](Problem& p) {
    p.d_value = Out(gradients.data(), {2, 1, 7, width});
  });
  rejected("a delta too short", "delta", [&](Problem& p) { p.delta = View<float, 3>(delta.data(), {2, 3, 4}); });
  rejected("a delta whose rows lie apart", "delta", [&](Problem& p) {
    p.delta = View<float, 3>(scratch.data(), rows, {48, 16, 2});
  });
  rejected("a d_query_sum too narrow", "d_query_sum", [&](Problem& p) {
    p.d_query_sum = View<float, 4>(scratch.data(), {2, 3, 5, width / 2});
  });
  rejected("a d_query_sum whose rows lie apart", "d_query_sum", [&](Problem& p) {
    p.d_query_sum = View<float, 4>(scratch.data(), queries, {24 * width, 8 * width, width + 4, 1});
  });
  rejected("a scale that is NaN", "scale", [](Problem& p) { p.scale = NOT_A_NUMBER; });
  rejected("a scale that is infinite", "scale", [](Problem& p) { p.scale = INF; });
  rejected("queries with a gap between channels", "query", [&](Problem& p) {
    p.query = In(memory.data(), queries, {15 * width, 5 * width, 1, 5});
  });
  rejected("keys whose rows are not 16 bytes apart", "key", [&](Problem& p) {
    p.key = In(memory.data(), keys, {24 * width, 8 * width, width + 1, 1});
  });
  rejected("values that begin between two multiples of 16 bytes", "value",
           [&](Problem& p) { p.value = In(memory.data() + 1, keys); });
  rejected("a d_output whose rows are not 16 bytes apart", "d_output", [&](Problem& p) {
    p.d_output = In(memory.data(), queries, {24 * width, 8 * width, width + 1, 1});
  });
  rejected("a d_query that begins between two multiples of 16 bytes", "d_query",
           [&](Problem& p) { p.d_query = Out(gradients.data() + 2, queries); });
}

// ---- What only the virtual GPU can tell, and what only a real one has the time for ----------------------------------

template <typename T>
bool needs_a_gpu([[maybe_unused]] const BackwardStep<T>& step) {
#if KATA_REAL_GPU
  return false;
#else
  if (!expect_even_shares(step, 1, 1, false)) return true;  // nobody should take an unfilled stub for a skipped test
  skip("needs a GPU: too long for the virtual one");
  return true;
#endif
}

/// What all kernels of a call load of each input, and the most shared memory that a block of one has.
struct Traffic {
  Index query, key, value, d_output, shared;
  std::vector<KernelProfile> profiles;
};

template <typename T>
Traffic traffic_of(const BackwardStep<T>& step, Index queries, Index keys, bool causal, bool deterministic) {
  if (!kernels_are_checked()) queries = keys = 1;  // nobody counts
  const Gradients got = gradients(
      step,
      inputs_of<T>({.why = "", .queries = queries, .keys = keys, .width = step.width, .causal = causal, .number = 10}),
      {.deterministic = deterministic});
  Traffic traffic{bytes_loaded(got.profiles, "query"),
                  bytes_loaded(got.profiles, "key"),
                  bytes_loaded(got.profiles, "value"),
                  bytes_loaded(got.profiles, "d_output"),
                  0,
                  got.profiles};
  for (const KernelProfile& profile : got.profiles) {
    traffic.shared = std::max<Index>(traffic.shared, profile.dynamic_shared_bytes);
  }
  return traffic;
}

/// Each row is loaded at most once for every `tile` rows of the other side, and once by a kernel that owns it; dO once
/// more, for delta.
template <typename T>
void expect_tiled_traffic(const BackwardStep<T>& step, Index tokens, Index tile) {
  for (const bool deterministic : {false, true}) {
    const Traffic traffic = traffic_of(step, tokens, tokens, false, deterministic);
    if (!kernels_are_judged()) continue;
    const Index bytes = tokens * step.width * static_cast<Index>(sizeof(T));
    const auto expect_at_most = [&](Index loaded, Index times, const char* name) {
      const Index most = times * bytes + 1024;
      expect(loaded > 0 && loaded <= most, name,
             "loaded " + std::to_string(loaded) + " bytes, " + std::to_string(loaded / bytes) +
                 " times its size, for " + std::to_string(tokens) + " queries and keys" +
                 (deterministic ? ", deterministic" : "") + "; want at most " + std::to_string(times) +
                 " times: once for every " + std::to_string(tile) + " rows that use it, and for its own");
    };
    expect_at_most(traffic.query, tokens / tile + 1, "query");
    expect_at_most(traffic.d_output, tokens / tile + 2, "d_output");
    expect_at_most(traffic.key, tokens / tile + 1, "key");
    expect_at_most(traffic.value, tokens / tile + 1, "value");
  }
}

/// Under a causal mask about half of the pairs of tiles see nothing of each other, and what is loaded shows it.
template <typename T>
void expect_blind_tiles_not_loaded(const BackwardStep<T>& step, Index tokens) {
  for (const bool deterministic : {false, true}) {
    const Traffic all = traffic_of(step, tokens, tokens, false, deterministic);
    const Traffic causal = traffic_of(step, tokens, tokens, true, deterministic);
    if (!kernels_are_judged()) continue;
    const Index some = causal.query + causal.key + causal.value + causal.d_output;
    const Index full = all.query + all.key + all.value + all.d_output;
    expect_blind_tiles_not_loaded(some, full,
                                  "query, key, value and d_output, for " + std::to_string(tokens) +
                                      " queries and keys" + (deterministic ? ", deterministic" : ""));
  }
}

/// All five products on tensor cores, and shared memory without conflicts. Lengths are multiples of 64.
template <typename T>
void expect_tensor_cores(const BackwardStep<T>& step, Index queries, Index keys) {
  const CountLines lines;
  const Traffic traffic = traffic_of(step, queries, keys, false, /*deterministic=*/false);
  if (!kernels_are_judged()) return;
  EventCounts events;
  for (const KernelProfile& profile : traffic.profiles) events += profile.events;
  const Index products = static_cast<Index>(events.matrix_products);
  const Index least = 5 * queries * keys * step.width / (16 * 8 * 16);
  expect(products >= least, "tensor cores",
         std::to_string(products) + " times mma_m16n8k16 for " + std::to_string(queries) + " queries and " +
             std::to_string(keys) + " keys, D = " + std::to_string(step.width) + "; five products take " +
             std::to_string(least));
  expect_bank_conflicts_below(traffic.profiles, 2.5);
}

/// Shared memory does not grow with either length.
template <typename T>
void expect_no_row_of_scores(const BackwardStep<T>& step) {
  const Index few = traffic_of(step, 4, 192, false, false).shared;
  const Index more_keys = traffic_of(step, 4, 384, false, false).shared;
  const Index more_queries = traffic_of(step, 192, 4, false, false).shared;
  const Index most_queries = traffic_of(step, 384, 4, false, false).shared;
  if (!kernels_are_judged()) return;
  const auto expect_equal = [](Index one, Index two, const char* of) {
    expect(two <= one, "memory",
           std::string("shared memory grows with the number of ") + of + ": " + std::to_string(one) +
               " bytes a block for 192, " + std::to_string(two) + " for 384");
  };
  expect_equal(few, more_keys, "keys");
  expect_equal(more_queries, most_queries, "queries");
}

/// Every head of [batch, heads] holds one of two problems of one head, so that the reference has little to do; with and
/// without `deterministic`.
template <typename T>
bool expect_long(const BackwardStep<T>& step, Index batch, Index heads, Index queries, Index keys, Index width,
                 bool causal) {
  BackwardInputs two = inputs_of<T>(
      {.why = "", .heads = 2, .queries = queries, .keys = keys, .width = width, .causal = causal, .number = 300});
  two.forward = forward_of(two);
  const auto from = [heads](Index b, Index h) { return (b * heads + h) % 2; };
  const BackwardInputs all = arranged(two, batch, heads, from);
  const Judgement<T> both(two);
  const std::array<Judgement<T>, 2> judgements{both.only(0, 0), both.only(0, 1)};
  for (const bool deterministic : {false, true}) {
    const Gradients got = gradients(step, all, {.deterministic = deterministic});
    for (Index b = 0; b < batch; ++b) {
      for (Index h = 0; h < heads; ++h) {
        const auto& judgement = judgements[static_cast<std::size_t>(from(b, h))];
        if (expect_gradients(kernel_suite_detail::only_head(got, b, h), judgement)) continue;
        return not_so<T>(two, ", batch item " + std::to_string(b) + ", head " + std::to_string(h) +
                                  (deterministic ? ", deterministic" : ""));
      }
    }
  }
  return true;
}

}  // namespace flashkata::testing
