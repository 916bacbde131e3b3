#include "multi_head.hpp"

#include <cmath>
#include <limits>

#include "common/testing/suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
const Axes OUTPUT = {"batch item", "query", "column"};

std::vector<AttentionCase> model_cases() {
  return select([](const AttentionCase& c) {
    const bool padding_or_nothing = c.masking == Masking::none || c.masking >= Masking::padding_none;
    return padding_or_nothing && !c.scale && !c.causal;
  });
}

std::vector<AttentionCase> padded_cases() {
  return select([](const AttentionCase& c) { return c.masking >= Masking::padding_none && !c.causal; });
}

Tensor<float, 3> answer(const AttentionCase& c, const AttentionInputs& inputs) {
  return eager_bidirectional(inputs.query.model(), inputs.key.model(), inputs.value.model(), c.heads, inputs.padding);
}

const Recognise recognise_multi_head(numbers(model_cases()), [](int number) -> std::vector<Array> {
  const AttentionCase& c = attention_case(number);
  return {to_array(answer(c, make_inputs(c)))};
});

void expect_reference(const AttentionCase& c, const AttentionInputs& inputs, const Tensor<float, 3>& output) {
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
void overwrite_key(const AttentionCase& c, AttentionInputs& inputs, Index b, Index j, float with) {
  for (Index h = 0; h < c.heads; ++h) {
    for (Index d = 0; d < c.width; ++d) inputs.key.heads()(b, h, j, d) = with;
    for (Index d = 0; d < c.value_width; ++d) inputs.value.heads()(b, h, j, d) = with;
  }
}

// What a padded key and its value do to the output, whatever they hold: nothing.
void expect_deaf_to_forbidden_keys(const AttentionCase& c) {
  const AttentionInputs clean = make_inputs(c);
  const Array want = to_array(answer(c, clean));
  for (Index b = 0; b < c.batch; ++b) {
    for (Index j = 0; j < c.keys; ++j) {
      if ((*clean.padding)(b, j)) continue;
      for (const float poison : {7.5f, -3e4f, INF, NOT_A_NUMBER}) {
        AttentionInputs poisoned = clean;
        overwrite_key(c, poisoned, b, j, poison);
        const std::string why = "when key " + std::to_string(j) + " of batch item " + std::to_string(b) +
                                ", which is padding, became " + std::to_string(poison);
        if (!expect_same_bits("output", to_array(answer(c, poisoned)), want, OUTPUT, why)) return;
      }
    }
  }
}

struct Sizes {
  Index batch, heads, queries, keys, value_width;
};

// Key j of head h of batch item b is a one-hot vector of its own order, so that the winner tells who was read.
Index key_at(Index b, Index h, Index position, Index keys) { return (position + 2 * b + 3 * h) % keys; }

// Every query agrees with one key of its own head and batch item, and every value is a number of its own.
bool expect_needles(const Sizes& n) {
  TokenTensor q(n.batch, n.queries, n.heads, n.keys);
  TokenTensor k(n.batch, n.keys, n.heads, n.keys);
  TokenTensor v(n.batch, n.keys, n.heads, n.value_width);
  const auto wanted_key = [&](Index b, Index h, Index i) { return (5 * i + b + 7 * h) % n.keys; };
  const float certain = 1000.0f * std::sqrt(static_cast<float>(n.keys));
  for (Index b = 0; b < n.batch; ++b) {
    for (Index h = 0; h < n.heads; ++h) {
      for (Index d = 0; d < n.keys; ++d) {
        for (Index i = 0; i < n.queries; ++i) {
          q.heads()(b, h, i, d) = d == key_at(b, h, wanted_key(b, h, i), n.keys) ? certain : 0.0f;
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

  const Array got = to_array(eager_bidirectional(q.model(), k.model(), v.model(), n.heads));
  Array want{{n.batch, n.queries, n.heads * n.value_width}, {}};
  for (Index b = 0; b < n.batch; ++b)
    for (Index i = 0; i < n.queries; ++i)
      for (Index h = 0; h < n.heads; ++h)
        for (Index c = 0; c < n.value_width; ++c) want.values.push_back(code(b, h, wanted_key(b, h, i), c));
  if (!expect(got.shape == want.shape, "output", "has shape " + to_text(got.shape) + ", want " + to_text(want.shape))) {
    return false;
  }

  const auto read_at = [&](double number) -> std::string {
    if (std::isnan(number)) return "NaN, as before the call";
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

std::string list_of(const std::vector<Index>& keys) {
  std::string text = "{";
  for (const Index key : keys) text += (text.size() > 1 ? " " : "") + std::to_string(key);
  return text + "}";
}

// Queries of 0 look at all the keys that they may see alike, and one-hot values show which those are.
bool expect_to_see(const Sizes& n, const PaddingMask& mask) {
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
  const Tensor<float, 3> output = eager_bidirectional(q.model(), k.model(), v.model(), n.heads, mask);
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
          if (!mask || (*mask)(b, j)) want.push_back(j);
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

BoolMatrix bool_matrix(std::initializer_list<std::initializer_list<bool>> rows) { return BoolMatrix(rows); }

Tensor<float, 3> tokens(const Shape<3>& shape, std::initializer_list<float> numbers) {
  Tensor<float, 3> tensor(shape);
  std::copy(numbers.begin(), numbers.end(), tensor.data());
  return tensor;
}

}  // namespace

TEST_SUITE("phase1.03_multi_head") {
  TEST_CASE("two tokens in two heads worked with a pencil in the README") {
    ask("Follow the README's example head by head. Which is the first of its numbers that yours differs from?");
    const float ln3 = std::log(3.0f);
    const Tensor<float, 3> q = tokens({1, 2, 2}, {ln3, 0, 0, ln3});
    const Tensor<float, 3> k = tokens({1, 2, 2}, {1, 0, 0, 1});
    const Tensor<float, 3> v = tokens({1, 2, 4}, {4, 0, 12, 0, 8, 4, 20, 4});
    const Array output{{1, 2, 4}, {5, 1, 16, 2, 6, 2, 18, 3}};
    expect_close("output", to_array(eager_bidirectional(q, k, v, 2)), output, fp32_bound(output, 2.0), OUTPUT);
  }

  TEST_CASE("every query finds the needle in its own head and its own batch item") {
    ask("Take one number of your output and walk back: which channels of which token of which batch item made it?");
    for (const Sizes& sizes :
         {Sizes{1, 1, 3, 4, 2}, Sizes{1, 2, 3, 3, 3}, Sizes{1, 3, 4, 4, 1}, Sizes{2, 1, 4, 3, 5}, Sizes{2, 3, 4, 5, 2},
          Sizes{3, 2, 6, 4, 7}, Sizes{5, 4, 4, 4, 4}, Sizes{3, 9, 2, 6, 3}, Sizes{2, 5, 1, 7, 2}, Sizes{2, 2, 7, 1, 2},
          Sizes{9, 17, 2, 3, 1}, Sizes{2, 2, 3, 4, 70}, Sizes{1, 2, 40, 150, 2}, Sizes{1, 2, 300, 3, 2}}) {
      if (!expect_needles(sizes)) return;
    }
  }

  TEST_CASE("a head answers beside others as it does alone") {
    ask("Put two copies of one head side by side. Should either of them attend more evenly than it did alone?");
    for (const Index heads : {2, 3, 8}) {
      const Index width = 6;
      const Index value_width = 5;
      TokenTensor q(2, 7, heads, width);
      TokenTensor k(2, 9, heads, width);
      TokenTensor v(2, 9, heads, value_width);
      for (Index h = 0; h < heads; ++h) {  // in every head the same numbers
        const auto head_of = [&](View<float, 4> x) {
          return View<float, 4>(&x(0, h, 0, 0), {2, 1, x.size(2), x.size(3)}, x.strides());
        };
        fill_normal(head_of(q.heads()), 1);
        fill_normal(head_of(k.heads()), 2);
        fill_normal(head_of(v.heads()), 3);
      }
      TokenTensor q1(2, 7, 1, width);
      TokenTensor k1(2, 9, 1, width);
      TokenTensor v1(2, 9, 1, value_width);
      fill_normal(q1.heads(), 1);
      fill_normal(k1.heads(), 2);
      fill_normal(v1.heads(), 3);
      const Array alone = to_array(eager_bidirectional(q1.model(), k1.model(), v1.model(), 1));
      const Array together = to_array(eager_bidirectional(q.model(), k.model(), v.model(), heads));
      Array want{{2, 7, heads * value_width}, {}};
      for (Index row = 0; row < 2 * 7; ++row)
        for (Index column = 0; column < heads * value_width; ++column)
          want.values.push_back(alone.values.at(static_cast<std::size_t>(row * value_width + column % value_width)));
      Array ones = want;
      std::fill(ones.values.begin(), ones.values.end(), 1.0);
      if (!expect_close("output of " + std::to_string(heads) + " equal heads", together, want, fp32_bound(ones, 10.0),
                        OUTPUT)) {
        return;
      }
    }
  }

  TEST_CASE("new numbers in one head of one batch item move its output alone") {
    ask("Change head 1 of batch item 0. Which columns of which rows of the output may move, and must they?");
    for_each(select([](const AttentionCase& c) { return c.number >= 35 && c.number <= 47 && !c.causal; }),
             [](const AttentionCase& c) {
               const AttentionInputs clean = make_inputs(c);
               const Array want = to_array(answer(c, clean));
               for (Index b = 0; b < c.batch; ++b) {
                 for (Index h = 0; h < c.heads; ++h) {
                   AttentionInputs changed = clean;
                   for (TokenTensor* x : {&changed.query, &changed.key, &changed.value}) {
                     View<float, 4> all = x->heads();
                     fill_normal({&all(b, h, 0, 0), {1, 1, all.size(2), all.size(3)}, all.strides()}, 99);
                   }
                   const Array got = to_array(answer(c, changed));
                   const auto own = [&](Index item, Index, Index column) {
                     return item == b && column / c.value_width == h;
                   };
                   const std::string where = "head " + std::to_string(h) + " of batch item " + std::to_string(b);
                   const std::string when = "when " + where + " was changed, ";
                   if (!expect_same_bits("output", got, but_for(want, got, own), OUTPUT, when + "outside of it"))
                     return;
                   bool some_key = !clean.padding;
                   for (Index j = 0; j < c.keys; ++j) some_key = some_key || (*clean.padding)(b, j);
                   if (some_key && !expect(first_difference(got, want) != npos, "output",
                                           "does not move at all when " + where + " is changed")) {
                     return;
                   }
                 }
               }
             });
  }

  TEST_CASE("a query hears no other query") {
    ask("Change query 0. May the output of query 1 move? Over which index do your weights add up to 1?");
    for_each(select([](const AttentionCase& c) { return c.number >= 35 && c.number <= 47 && !c.causal; }),
             [](const AttentionCase& c) {
               const AttentionInputs clean = make_inputs(c);
               const Array want = to_array(answer(c, clean));
               for (Index i = 0; i < c.queries; ++i) {
                 AttentionInputs changed = clean;
                 for (Index h = 0; h < c.heads; ++h)
                   for (Index d = 0; d < c.width; ++d) changed.query.heads()(0, h, i, d) = static_cast<float>(d - 3);
                 const Array got = to_array(answer(c, changed));
                 const auto own = [&](Index item, Index query, Index) { return item == 0 && query == i; };
                 const std::string why =
                     "when query " + std::to_string(i) + " of batch item 0 was changed, outside of it";
                 if (!expect_same_bits("output", got, but_for(want, got, own), OUTPUT, why)) return;
               }
             });
  }

  TEST_CASE("a query sees the keys of its batch item that are not padding") {
    ask("Write down the mask over pairs for batch item 1, from row 1 of [B, Sk]. What do its rows have in common?");
    const std::vector<BoolMatrix> masks = {
        bool_matrix({{true, true, false, true}, {false, true, true, true}, {true, false, false, false}}),
        bool_matrix({{true, true, true, true}, {true, true, true, true}, {true, true, true, false}}),
        bool_matrix({{true, false, true, true, false, true}, {false, false, true, true, true, false}}),
        bool_matrix({{false, false}, {true, true}, {false, true}, {true, false}, {true, true}}),
        bool_matrix({{true}, {false}, {true}}),
    };
    for (const BoolMatrix& mask : masks) {
      const BoolMatrix reversed = mask.colwise().reverse();  // the last batch item first
      for (const Index heads : {1, 2, 3, 7}) {
        for (const Index queries : {1, 2, 3, 4, 6, 9}) {
          const Sizes sizes{mask.rows(), heads, queries, mask.cols(), mask.cols()};
          if (!expect_to_see(sizes, {}) || !expect_to_see(sizes, mask) || !expect_to_see(sizes, reversed)) return;
        }
      }
    }
  }

  TEST_CASE("a padded key cannot move any output whatever the key holds") {
    ask("A padded key holds NaN. Follow it from k to the output: where does it first meet a number of a real key?");
    for_each(padded_cases(), expect_deaf_to_forbidden_keys);
  }

  TEST_CASE("a batch item that is nothing but padding gets 0") {
    ask("If a query may look at nobody, what is its maximum, its sum, its quotient?");
    for (const int number : {22, 47, 49}) {
      const AttentionCase& c = attention_case(number);
      run_case(number, c.text(), [&] {
        const Tensor<float, 3> output = answer(c, make_inputs(c));
        const Index last = c.batch - 1;
        expect_all("output", to_array(output.view()[last]), 0.0, 0.0, {"query", "column"},
                   "batch item " + std::to_string(last) + " has no key to attend to");
      });
    }
  }

  TEST_CASE("no key of a long sequence is lost") {
    ask("A query weighs 2050 keys all alike. What is the mean of the numbers 0 to 2049?");
    for (const Sizes& n : {Sizes{1, 2, 200, 213, 2}, Sizes{2, 2, 3, 2050, 2}}) {
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
                if (!(!mask || (*mask)(b, j))) continue;
                ++seen;
                for (Index c = 0; c < 2; ++c) sums[c] += code(h, j, c);
              }
              for (const Index sum : sums) {
                want.values.push_back(seen > 0 ? static_cast<double>(sum) / static_cast<double>(seen) : 0.0);
              }
            }
          }
        }
        const Tensor<float, 3> output = eager_bidirectional(q.model(), k.model(), v.model(), n.heads, mask);
        const std::string name = std::to_string(n.queries) + " queries, " + std::to_string(n.keys) +
                                 (mask ? " keys, every fifth padded: output" : " keys: output");
        if (!expect_close(name, to_array(output), want, fp32_bound(want, 1.0), OUTPUT)) return;
      }
    }
  }

  TEST_CASE("an empty batch and sequences of no token are legal") {
    ask("How many rows has the output if there is no query? And what is in them if there is no key?");
    for (const Sizes& n : {Sizes{0, 2, 3, 4, 5}, Sizes{2, 2, 0, 4, 5}, Sizes{2, 2, 3, 0, 5}, Sizes{2, 2, 0, 0, 5}}) {
      const TokenTensor q(n.batch, n.queries, n.heads, 2);
      const TokenTensor k(n.batch, n.keys, n.heads, 2);
      const TokenTensor v(n.batch, n.keys, n.heads, n.value_width);
      const Array want{{n.batch, n.queries, n.heads * n.value_width},
                       std::vector<double>(static_cast<std::size_t>(n.batch * n.queries * n.heads * n.value_width))};
      for (const PaddingMask& mask : {PaddingMask(), PaddingMask(BoolMatrix(n.batch, n.keys))}) {
        expect_same_bits("output", to_array(eager_bidirectional(q.model(), k.model(), v.model(), n.heads, mask)), want,
                         OUTPUT, "where there is nothing to attend to");
      }
    }
  }

  TEST_CASE("a mask that allows everything changes nothing") {
    ask("In this mask true means attend. What should a mask of true change?");
    for (const int number : {35, 36, 38, 41}) {
      const AttentionCase& c = attention_case(number);
      run_case(number, c.text(), [&] {
        AttentionInputs inputs = make_inputs(c);
        const Array want = to_array(answer(c, inputs));
        inputs.padding = BoolMatrix::Constant(c.batch, c.keys, true);
        expect_same_bits("output", to_array(answer(c, inputs)), want, OUTPUT, "under a mask of true");
      });
    }
  }

  TEST_CASE("values of one give an output of one") {
    ask("What do the weights of a query add up to in each head? Then what must a value of 1 everywhere become?");
    for_each(model_cases(), [](const AttentionCase& c) {
      AttentionInputs inputs = make_inputs(c);
      for (Index b = 0; b < c.batch; ++b)
        for (Index j = 0; j < c.keys; ++j)
          for (Index h = 0; h < c.heads; ++h)
            for (Index d = 0; d < c.value_width; ++d) inputs.value.heads()(b, h, j, d) = 1.0f;
      Array ones = in_model_layout(expected(c, inputs).output);  // 1, or 0 where a query may attend to nothing
      for (double& one : ones.values) one = std::round(one);
      expect_close("output", to_array(answer(c, inputs)), ones, {2e-6, ones}, OUTPUT);
    });
  }

  TEST_CASE("q and k and v may be slices of something larger") {
    ask("k and v are slices of a cache with room for more tokens than there are. How far is it in memory to the next "
        "token, how far to the next batch item, and is it as far in q?");
    for_each(model_cases(), [](const AttentionCase& c) {
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
      expect_reference(c, inputs, eager_bidirectional(q, k, v, c.heads, inputs.padding));
    });
  }

  TEST_CASE("every call stands on its own and leaves its arguments alone") {
    ask("Call it twice with other numbers in the same memory. What of the first call may the second one know?");
    for (const int number : {36, 38, 43, 45}) {
      const AttentionCase& c = attention_case(number);
      run_case(number, c.text(), [&] {
        AttentionInputs inputs = make_inputs(c);
        const Array first = to_array(answer(c, inputs));
        const AttentionInputs untouched = make_inputs(c);
        const Axes axes = {"batch item", "head", "token", "channel"};
        expect_same_bits("q", to_array(inputs.query.heads()), to_array(untouched.query.heads()), axes, "by the call");
        expect_same_bits("k", to_array(inputs.key.heads()), to_array(untouched.key.heads()), axes, "by the call");
        expect_same_bits("v", to_array(inputs.value.heads()), to_array(untouched.value.heads()), axes, "by the call");
        expect(inputs.padding == untouched.padding, "mask", "changed by the call");
        expect_same_bits("output", to_array(answer(c, inputs)), first, OUTPUT, "when the same was asked again");

        inputs.padding = BoolMatrix::Constant(c.batch, c.keys, true);
        for (Index b = 0; b < c.batch; ++b) (*inputs.padding)(b, (b + 1) % c.keys) = false;
        expect_reference(c, inputs, answer(c, inputs));
        inputs.padding->rowwise().reverseInPlace();
        expect_reference(c, inputs, answer(c, inputs));
        for (TokenTensor* x : {&inputs.query, &inputs.key, &inputs.value}) {
          fill_normal(x->heads(), 77);
          expect_reference(c, inputs, answer(c, inputs));
        }
      });
    }
  }

  TEST_CASE("agrees with the float64 reference") {
    for_each(model_cases(), [](const AttentionCase& c) {
      const AttentionInputs inputs = make_inputs(c);
      expect_reference(c, inputs, answer(c, inputs));
    });
  }

  TEST_CASE("says what is wrong with bad arguments") {
    const auto ones = [](const Shape<3>& shape) {
      Tensor<float, 3> tensor(shape);
      std::fill_n(tensor.data(), tensor.count(), 1.0f);
      return tensor;
    };
    const Tensor<float, 3> q = ones({2, 5, 12});
    const Tensor<float, 3> k = ones({2, 7, 12});
    const Tensor<float, 3> v = ones({2, 7, 6});
    const auto call = [](const Tensor<float, 3>& q, const Tensor<float, 3>& k, const Tensor<float, 3>& v, Index heads,
                         const PaddingMask& mask = {}) { return eager_bidirectional(q, k, v, heads, mask); };
    const auto all_true = [](Index rows, Index columns) {
      return BoolMatrix(BoolMatrix::Constant(rows, columns, true));
    };
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
}
