// What the suites of steps 03 and 04 share: attention in the model's layout, over several heads and with padding, and
// the probes that hold with and without the triangle.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "common/testing/suite.hpp"

namespace flashkata::testing {

inline constexpr float INF = std::numeric_limits<float>::infinity();
inline constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
inline const Axes OUTPUT = {"batch item", "query", "column"};

/// The answer that is judged.
struct HeadsStep {
  Tensor<float, 3> (*attend)(View<const float, 3> q, View<const float, 3> k, View<const float, 3> v, Index num_heads,
                             const PaddingMask& mask);
  bool causal;

  Tensor<float, 3> operator()(const AttentionCase& c, const AttentionInputs& inputs) const {
    return attend(inputs.query.model(), inputs.key.model(), inputs.value.model(), c.heads, inputs.padding);
  }

  /// How many keys query i sees, the first ones, as far as padding allows.
  Index visible(Index i, Index queries, Index keys) const {
    return causal ? std::clamp<Index>(i + keys - queries + 1, 0, keys) : keys;
  }

  /// The case of that number, with the triangle where the step has one.
  AttentionCase number(int number) const {
    AttentionCase c = attention_case(number);
    c.causal = causal;
    return c;
  }

  std::vector<AttentionCase> all(const std::vector<int>& numbers) const {
    std::vector<AttentionCase> cases;
    for (const int each : numbers) cases.push_back(number(each));
    return cases;
  }
};

inline void expect_reference(const AttentionCase& c, const AttentionInputs& inputs, const Tensor<float, 3>& output) {
  const Expected want = expected(c, inputs);
  expect_close("output", to_array(output), in_model_layout(want.output), in_model_layout(want.output_bound), OUTPUT);
}

// `want`, but with what `got` has in the rows that may differ.
template <typename MayDiffer>
Array but_for(const Array& want, const Array& got, MayDiffer&& may_differ) {
  Array result = want;
  if (got.shape != want.shape) return result;
  const Index columns = want.shape[2];
  for (std::size_t flat = 0; flat < want.count(); ++flat) {
    const Index row = static_cast<Index>(flat) / columns;
    if (may_differ(row / want.shape[1], row % want.shape[1], static_cast<Index>(flat) % columns)) {
      result.values[flat] = got.values[flat];
    }
  }
  return result;
}

// Keys and values of token j of batch item b, in every head.
inline void overwrite_key(const AttentionCase& c, AttentionInputs& inputs, Index b, Index j, float with) {
  for (Index h = 0; h < c.heads; ++h) {
    for (Index d = 0; d < c.width; ++d) inputs.key.heads()(b, h, j, d) = with;
    for (Index d = 0; d < c.value_width; ++d) inputs.value.heads()(b, h, j, d) = with;
  }
}

// What a key and its value do to the queries that may not attend to them, whatever they hold: nothing.
inline void expect_deaf_to_forbidden_keys(const HeadsStep& step, const AttentionCase& c) {
  const AttentionInputs clean = make_inputs(c);
  const Array want = to_array(step(c, clean));
  for (Index b = 0; b < c.batch; ++b) {
    for (Index j = 0; j < c.keys; ++j) {
      for (const float poison : {7.5f, -3e4f, INF, NOT_A_NUMBER}) {
        AttentionInputs poisoned = clean;
        overwrite_key(c, poisoned, b, j, poison);
        const Array got = to_array(step(c, poisoned));
        const auto may_hear = [&](Index item, Index query, Index) {
          return item == b && may_attend(c, clean, b, query, j);
        };
        const std::string why = "where key " + std::to_string(j) + " of batch item " + std::to_string(b) +
                                " may not be seen, when it became " + std::to_string(poison);
        if (!expect_same_bits("output", got, but_for(want, got, may_hear), OUTPUT, why)) return;
      }
    }
  }
}

struct Sizes {
  Index batch, heads, queries, keys, value_width;
};

// Key j of head h of batch item b is a one-hot vector of its own order, so that the winner tells who was read.
inline Index key_at(Index b, Index h, Index position, Index keys) { return (position + 2 * b + 3 * h) % keys; }

// Every query agrees with one key that it may see, in its own head and batch item, and even more with the first key of
// its future, if it has one; every value is a number of its own.
inline bool expect_needles(const HeadsStep& step, const Sizes& n) {
  TokenTensor q(n.batch, n.queries, n.heads, n.keys);
  TokenTensor k(n.batch, n.keys, n.heads, n.keys);
  TokenTensor v(n.batch, n.keys, n.heads, n.value_width);
  const auto visible = [&](Index i) { return step.visible(i, n.queries, n.keys); };
  const auto wanted_key = [&](Index b, Index h, Index i) { return (5 * i + b + 7 * h) % visible(i); };
  const float certain = 1000.0f * std::sqrt(static_cast<float>(n.keys));
  for (Index b = 0; b < n.batch; ++b) {
    for (Index h = 0; h < n.heads; ++h) {
      for (Index d = 0; d < n.keys; ++d) {
        for (Index i = 0; i < n.queries; ++i) {
          const bool wanted = visible(i) > 0 && d == key_at(b, h, wanted_key(b, h, i), n.keys);
          const bool future = visible(i) < n.keys && d == key_at(b, h, visible(i), n.keys);
          q.heads()(b, h, i, d) = future ? 2.0f * certain : wanted ? certain : 0.0f;
        }
        for (Index j = 0; j < n.keys; ++j) k.heads()(b, h, j, d) = d == key_at(b, h, j, n.keys) ? 1.0f : 0.0f;
      }
    }
  }
  const auto code = [&](Index b, Index h, Index j, Index c) {
    return static_cast<float>(1 + c + n.value_width * (h + n.heads * (j + n.keys * b)));
  };
  for (Index b = 0; b < n.batch; ++b)
    for (Index h = 0; h < n.heads; ++h)
      for (Index j = 0; j < n.keys; ++j)
        for (Index c = 0; c < n.value_width; ++c) v.heads()(b, h, j, c) = code(b, h, j, c);

  const Array got = to_array(step.attend(q.model(), k.model(), v.model(), n.heads, {}));
  Array want{{n.batch, n.queries, n.heads * n.value_width}, {}};
  for (Index b = 0; b < n.batch; ++b)
    for (Index i = 0; i < n.queries; ++i)
      for (Index h = 0; h < n.heads; ++h)
        for (Index c = 0; c < n.value_width; ++c)
          want.values.push_back(visible(i) > 0 ? code(b, h, wanted_key(b, h, i), c) : 0.0f);
  if (!expect(got.shape == want.shape, "output", "has shape " + to_text(got.shape) + ", want " + to_text(want.shape))) {
    return false;
  }

  const auto read_at = [&](double number) -> std::string {
    if (std::isnan(number)) return "NaN, as before the call";
    if (number == 0.0) return "0";
    const auto flat = static_cast<Index>(number) - 1;
    if (!(number == std::floor(number)) || flat < 0 || flat >= n.batch * n.keys * n.heads * n.value_width) {
      return "none of the values alone, but " + std::to_string(number);
    }
    const Index head = flat / n.value_width;
    const Index token = head / n.heads;
    return "channel " + std::to_string(flat % n.value_width) + " of head " + std::to_string(head % n.heads) +
           " of key " + std::to_string(token % n.keys) + " of batch item " + std::to_string(token / n.keys);
  };
  const std::size_t first = first_difference(got, want);
  if (first == npos) return true;
  finding("output", "of q " + to_text(Shape<3>{n.batch, n.queries, n.heads * n.keys}) + " and v " +
                        to_text(Shape<3>{n.batch, n.keys, n.heads * n.value_width}) + " in " + std::to_string(n.heads) +
                        (n.heads == 1 ? " head: [" : " heads: [") + place(want, first, OUTPUT) + "] holds " +
                        read_at(got.values[first]) + ", want " + read_at(want.values[first]));
  return false;
}

inline std::string list_of(const std::vector<Index>& keys) {
  std::string text = "{";
  for (const Index key : keys) text += (text.size() > 1 ? " " : "") + std::to_string(key);
  return text + "}";
}

// Queries of 0 look at all the keys that they may see alike, and one-hot values show which those are.
inline bool expect_to_see(const HeadsStep& step, const Sizes& n, const PaddingMask& mask) {
  TokenTensor q(n.batch, n.queries, n.heads, 2);
  TokenTensor k(n.batch, n.keys, n.heads, 2);
  TokenTensor v(n.batch, n.keys, n.heads, n.keys);
  fill_normal(k.heads(), 3);
  for (Index b = 0; b < n.batch; ++b) {
    for (Index h = 0; h < n.heads; ++h) {
      for (Index i = 0; i < n.queries; ++i) q.heads()(b, h, i, 0) = q.heads()(b, h, i, 1) = 0.0f;
      for (Index j = 0; j < n.keys; ++j)
        for (Index c = 0; c < n.keys; ++c) v.heads()(b, h, j, c) = c == j ? 1.0f : 0.0f;
    }
  }
  const Tensor<float, 3> output = step.attend(q.model(), k.model(), v.model(), n.heads, mask);
  const Shape<3> shape{n.batch, n.queries, n.heads * n.keys};
  if (!expect(output.shape() == shape, "output", "has shape " + to_text(output.shape()) + ", want " + to_text(shape))) {
    return false;
  }
  for (Index b = 0; b < n.batch; ++b) {
    for (Index h = 0; h < n.heads; ++h) {
      for (Index i = 0; i < n.queries; ++i) {
        std::vector<Index> seen;
        std::vector<Index> want;
        bool even = true;
        for (Index j = 0; j < n.keys; ++j) {
          if (j < step.visible(i, n.queries, n.keys) && (!mask || (*mask)(b, j))) want.push_back(j);
          if (output(b, i, h * n.keys + j) != 0.0f) seen.push_back(j);
        }
        for (const Index j : seen) {
          even = even && std::abs(output(b, i, h * n.keys + j) * static_cast<float>(seen.size()) - 1.0f) < 1e-5f;
        }
        const std::string who = "query " + std::to_string(i) + " of " + std::to_string(n.queries) + " (batch item " +
                                std::to_string(b) + ", head " + std::to_string(h) + ", " + std::to_string(n.keys) +
                                (n.keys == 1 ? " key)" : " keys)");
        if (!expect(seen == want, "sees", who + " sees the keys " + list_of(seen) + ", want " + list_of(want)) ||
            !expect(even, "weights", who + " is orthogonal to all keys but does not weigh those it sees alike")) {
          return false;
        }
      }
    }
  }
  return true;
}

inline BoolMatrix bool_matrix(std::initializer_list<std::initializer_list<bool>> rows) { return BoolMatrix(rows); }

inline Tensor<float, 3> tokens(const Shape<3>& shape, std::initializer_list<float> numbers) {
  Tensor<float, 3> tensor(shape);
  std::copy(numbers.begin(), numbers.end(), tensor.data());
  return tensor;
}

// Other numbers in one head of one batch item move its own columns and no others.
inline void expect_heads_apart(const HeadsStep& step, const std::vector<AttentionCase>& cases) {
  for_each(cases, [&](const AttentionCase& c) {
    const AttentionInputs clean = make_inputs(c);
    const Array want = to_array(step(c, clean));
    for (Index b = 0; b < c.batch; ++b) {
      for (Index h = 0; h < c.heads; ++h) {
        AttentionInputs changed = clean;
        for (TokenTensor* x : {&changed.query, &changed.key, &changed.value}) {
          View<float, 4> all = x->heads();
          fill_normal({&all(b, h, 0, 0), {1, 1, all.size(2), all.size(3)}, all.strides()}, 99);
        }
        const Array got = to_array(step(c, changed));
        const auto own = [&](Index item, Index, Index column) { return item == b && column / c.value_width == h; };
        const std::string where = "head " + std::to_string(h) + " of batch item " + std::to_string(b);
        const std::string when = "when " + where + " was changed, ";
        if (!expect_same_bits("output", got, but_for(want, got, own), OUTPUT, when + "outside of it")) return;
        bool some_key = false;
        for (Index j = 0; j < c.keys; ++j) some_key = some_key || may_attend(c, clean, b, c.queries - 1, j);
        if (some_key && !expect(first_difference(got, want) != npos, "output",
                                "does not move at all when " + where + " is changed")) {
          return;
        }
      }
    }
  });
}

// Another query 0 .. Sq - 1 moves its own row and no others.
inline void expect_queries_apart(const HeadsStep& step, const std::vector<AttentionCase>& cases) {
  for_each(cases, [&](const AttentionCase& c) {
    const AttentionInputs clean = make_inputs(c);
    const Array want = to_array(step(c, clean));
    for (Index i = 0; i < c.queries; ++i) {
      AttentionInputs changed = clean;
      for (Index h = 0; h < c.heads; ++h)
        for (Index d = 0; d < c.width; ++d) changed.query.heads()(0, h, i, d) = static_cast<float>(d - 3);
      const Array got = to_array(step(c, changed));
      const auto own = [&](Index item, Index query, Index) { return item == 0 && query == i; };
      const std::string why = "when query " + std::to_string(i) + " of batch item 0 was changed, outside of it";
      if (!expect_same_bits("output", got, but_for(want, got, own), OUTPUT, why)) return;
    }
  });
}

// Weights that are all alike give means of values, which count the keys.
inline void expect_no_key_lost(const HeadsStep& step, const Sizes& n) {
  TokenTensor q(n.batch, n.queries, n.heads, 1);
  TokenTensor k(n.batch, n.keys, n.heads, 1);
  TokenTensor v(n.batch, n.keys, n.heads, n.value_width);
  const auto code = [](Index h, Index j, Index c) { return c == 0 ? j + 100 * h : j % 7; };
  fill_normal(k.heads(), 5);
  BoolMatrix padded(n.batch, n.keys);  // every fifth key, and another fifth in each batch item
  for (Index b = 0; b < n.batch; ++b) {
    for (Index h = 0; h < n.heads; ++h) {
      for (Index i = 0; i < n.queries; ++i) q.heads()(b, h, i, 0) = 0.0f;
      for (Index j = 0; j < n.keys; ++j) {
        padded(b, j) = j % 5 != b;
        for (Index c = 0; c < 2; ++c) v.heads()(b, h, j, c) = static_cast<float>(code(h, j, c));
      }
    }
  }
  for (const PaddingMask& mask : {PaddingMask(), PaddingMask(padded)}) {
    Array want{{n.batch, n.queries, 2 * n.heads}, {}};
    for (Index b = 0; b < n.batch; ++b) {
      for (Index i = 0; i < n.queries; ++i) {
        for (Index h = 0; h < n.heads; ++h) {
          Index seen = 0;
          Index sums[2] = {0, 0};
          for (Index j = 0; j < n.keys; ++j) {
            if (j >= step.visible(i, n.queries, n.keys) || (mask && !(*mask)(b, j))) continue;
            ++seen;
            for (Index c = 0; c < 2; ++c) sums[c] += code(h, j, c);
          }
          for (const Index sum : sums) {
            want.values.push_back(seen > 0 ? static_cast<double>(sum) / static_cast<double>(seen) : 0.0);
          }
        }
      }
    }
    const Tensor<float, 3> output = step.attend(q.model(), k.model(), v.model(), n.heads, mask);
    const std::string name = std::to_string(n.queries) + " queries, " + std::to_string(n.keys) +
                             (mask ? " keys, every fifth padded: output" : " keys: output");
    if (!expect_close(name, to_array(output), want, fp32_bound(want, 1.0), OUTPUT)) return;
  }
}

// Nobody to attend, or nothing to attend to: an output of that shape, and of 0.
inline void expect_emptiness_legal(const HeadsStep& step) {
  for (const Sizes& n : {Sizes{0, 2, 3, 4, 5}, Sizes{2, 2, 0, 4, 5}, Sizes{2, 2, 3, 0, 5}, Sizes{2, 2, 0, 0, 5}}) {
    const TokenTensor q(n.batch, n.queries, n.heads, 2);
    const TokenTensor k(n.batch, n.keys, n.heads, 2);
    const TokenTensor v(n.batch, n.keys, n.heads, n.value_width);
    const Array want{{n.batch, n.queries, n.heads * n.value_width},
                     std::vector<double>(static_cast<std::size_t>(n.batch * n.queries * n.heads * n.value_width))};
    for (const PaddingMask& mask : {PaddingMask(), PaddingMask(BoolMatrix(n.batch, n.keys))}) {
      expect_same_bits("output", to_array(step.attend(q.model(), k.model(), v.model(), n.heads, mask)), want, OUTPUT,
                       "where there is nothing to attend to");
    }
  }
}

// A padding mask of true is no mask.
inline void expect_mask_of_true_to_change_nothing(const HeadsStep& step, const std::vector<int>& numbers) {
  for (const int number : numbers) {
    const AttentionCase c = step.number(number);
    run_case(number, c.text(), [&] {
      AttentionInputs inputs = make_inputs(c);
      const Array want = to_array(step(c, inputs));
      inputs.padding = BoolMatrix::Constant(c.batch, c.keys, true);
      expect_same_bits("output", to_array(step(c, inputs)), want, OUTPUT, "under a mask of true");
    });
  }
}

// Weights add up to 1.
inline void expect_averages(const HeadsStep& step, const std::vector<AttentionCase>& cases) {
  for_each(cases, [&](const AttentionCase& c) {
    AttentionInputs inputs = make_inputs(c);
    for (Index b = 0; b < c.batch; ++b)
      for (Index j = 0; j < c.keys; ++j)
        for (Index h = 0; h < c.heads; ++h)
          for (Index d = 0; d < c.value_width; ++d) inputs.value.heads()(b, h, j, d) = 1.0f;
    Array ones = in_model_layout(expected(c, inputs).output);  // 1, or 0 where a query may attend to nothing
    for (double& one : ones.values) one = std::round(one);
    expect_close("output", to_array(step(c, inputs)), ones, {2e-6, ones}, OUTPUT);
  });
}

// The arguments lie in larger memory, whose other places are NaN.
inline void expect_slices_read(const HeadsStep& step, const std::vector<AttentionCase>& cases) {
  for_each(cases, [&](const AttentionCase& c) {
    if (c.queries == 0 || c.keys == 0) return;
    const AttentionInputs inputs = make_inputs(c);
    const auto lay_out = [](const TokenTensor& x, std::vector<float>& memory, Index begin, Index row, Index item) {
      const View<const float, 3> from = x.model();
      const View<float, 3> to(memory.data() + begin, from.shape(), {item, row, 1});
      for (Index b = 0; b < from.size(0); ++b)
        for (Index s = 0; s < from.size(1); ++s)
          for (Index e = 0; e < from.size(2); ++e) to(b, s, e) = from(b, s, e);
      return View<const float, 3>(to);
    };
    const Index row = c.heads * c.width + 2;
    std::vector<float> memory(static_cast<std::size_t>(c.batch * (c.queries + 1) * row), NOT_A_NUMBER);
    const auto q = lay_out(inputs.query, memory, 1, row, (c.queries + 1) * row);
    const Index cache_row = c.heads * (c.width + c.value_width) + 3;  // a key and its value side by side
    std::vector<float> cache(static_cast<std::size_t>(c.batch * (c.keys + 4) * cache_row), NOT_A_NUMBER);
    const auto k = lay_out(inputs.key, cache, 1, cache_row, (c.keys + 4) * cache_row);
    const auto v = lay_out(inputs.value, cache, 2 + c.heads * c.width, cache_row, (c.keys + 4) * cache_row);
    expect_reference(c, inputs, step.attend(q, k, v, c.heads, inputs.padding));
  });
}

// The same memory with other numbers, again and again.
inline void expect_calls_apart(const HeadsStep& step, const std::vector<int>& numbers) {
  for (const int number : numbers) {
    const AttentionCase c = step.number(number);
    run_case(number, c.text(), [&] {
      AttentionInputs inputs = make_inputs(c);
      const Array first = to_array(step(c, inputs));
      const AttentionInputs untouched = make_inputs(c);
      const Axes axes = {"batch item", "head", "token", "channel"};
      expect_same_bits("q", to_array(inputs.query.heads()), to_array(untouched.query.heads()), axes, "by the call");
      expect_same_bits("k", to_array(inputs.key.heads()), to_array(untouched.key.heads()), axes, "by the call");
      expect_same_bits("v", to_array(inputs.value.heads()), to_array(untouched.value.heads()), axes, "by the call");
      expect(inputs.padding == untouched.padding, "mask", "changed by the call");
      expect_same_bits("output", to_array(step(c, inputs)), first, OUTPUT, "when the same was asked again");

      inputs.padding = BoolMatrix::Constant(c.batch, c.keys, true);
      for (Index b = 0; b < c.batch; ++b) (*inputs.padding)(b, (b + 1) % c.keys) = false;
      expect_reference(c, inputs, step(c, inputs));
      inputs.padding->rowwise().reverseInPlace();
      expect_reference(c, inputs, step(c, inputs));
      for (TokenTensor* x : {&inputs.query, &inputs.key, &inputs.value}) {
        fill_normal(x->heads(), 77);
        expect_reference(c, inputs, step(c, inputs));
      }
    });
  }
}

// The float64 reference, case by case.
inline void expect_reference_everywhere(const HeadsStep& step, const std::vector<AttentionCase>& cases) {
  for_each(cases, [&](const AttentionCase& c) {
    const AttentionInputs inputs = make_inputs(c);
    expect_reference(c, inputs, step(c, inputs));
  });
}

// Each bad argument is refused by name.
inline void expect_bad_arguments_refused(const HeadsStep& step) {
  const auto ones = [](const Shape<3>& shape) {
    Tensor<float, 3> tensor(shape);
    std::fill_n(tensor.data(), tensor.count(), 1.0f);
    return tensor;
  };
  const Tensor<float, 3> q = ones({2, 5, 12});
  const Tensor<float, 3> k = ones({2, 7, 12});
  const Tensor<float, 3> v = ones({2, 7, 6});
  const auto call = [&](const Tensor<float, 3>& q, const Tensor<float, 3>& k, const Tensor<float, 3>& v, Index heads,
                        const PaddingMask& mask = {}) { step.attend(q, k, v, heads, mask); };
  const auto all_true = [](Index rows, Index columns) { return BoolMatrix(BoolMatrix::Constant(rows, columns, true)); };
  call(q, k, v, 3, all_true(2, 7));  // these are right
  expect_rejected("no heads", "num_heads", [&] { call(q, k, v, 0); });
  expect_rejected("a negative number of heads", "num_heads", [&] { call(q, k, v, -3); });
  expect_rejected("5 heads in 12 columns of q", "q", [&] { call(q, k, v, 5); });
  expect_rejected("4 heads in 6 columns of v", "v", [&] { call(q, k, v, 4); });
  expect_rejected("q without columns", "q", [&] { call(ones({2, 5, 0}), ones({2, 7, 0}), v, 3); });
  expect_rejected("k narrower than q", "k", [&] { call(q, ones({2, 7, 9}), v, 3); });
  expect_rejected("k of another batch", "k", [&] { call(q, ones({1, 7, 12}), ones({1, 7, 6}), 3); });
  expect_rejected("v of another batch", "v", [&] { call(q, k, ones({3, 7, 6}), 3); });
  expect_rejected("a value too few", "v", [&] { call(q, k, ones({2, 6, 6}), 3); });
  expect_rejected("a mask [B, Sq]", "mask", [&] { call(q, k, v, 3, all_true(2, 5)); });
  expect_rejected("a mask [Sk, B]", "mask", [&] { call(q, k, v, 3, all_true(7, 2)); });
  expect_rejected("a mask for one batch item", "mask", [&] { call(q, k, v, 3, all_true(1, 7)); });
}

}  // namespace flashkata::testing
