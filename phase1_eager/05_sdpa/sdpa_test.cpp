#include "sdpa.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "common/testing/suite.hpp"
#include "sdpa_calls.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
const Axes MODEL = {"item", "token", "channel"};

using Input = View<const float, 3>;

bool padding_or_none(Masking masking) { return masking == Masking::none || masking >= Masking::padding_none; }

// Both functions have a fixed scale and take no mask over pairs.
std::vector<AttentionCase> library_cases() {
  return select([](const AttentionCase& c) { return !c.scale && padding_or_none(c.masking); });
}

std::vector<AttentionCase> padded_cases() {
  return select([](const AttentionCase& c) { return !c.scale && c.masking >= Masking::padding_none; });
}

// What an answer returned, and how it used the library on the way.
struct Answer {
  Array output;  // [B, Sq, H*Dv]
  std::vector<SdpaCall> calls;
  std::vector<LentMemory> lent;
  bool inputs_changed;
};

// The floats from the first to the last element of a view, gaps included.
LentMemory lent(std::string_view name, const Input& x) {
  Index last = 0;
  for (int axis = 0; axis < 3; ++axis) last += (x.size(axis) - 1) * x.stride(axis);
  const Index floats = x.count() == 0 ? 0 : last + 1;
  return {name, x.data(), static_cast<std::size_t>(floats) * sizeof(float)};
}

Answer answer(bool causal, const Input& q, const Input& k, const Input& v, Index num_heads,
              const PaddingMask& mask = {}) {
  struct Cleared {
    Cleared() { sdpa_record() = {}; }
    ~Cleared() { sdpa_record() = {}; }
  } cleared;
  std::vector<LentMemory>& memory = sdpa_record().lent;
  memory = {lent("q", q), lent("k", k), lent("v", v)};
  if (mask) memory.emplace_back("mask", mask->data(), static_cast<std::size_t>(mask->size()));
  const auto& function = causal ? sdpa_causal : sdpa_bidirectional;
  const Array output = to_array(function(q, k, v, num_heads, mask));
  const bool changed =
      std::any_of(memory.begin(), memory.end(), [](const LentMemory& input) { return !input.unchanged(); });
  return {output, sdpa_record().calls, memory, changed};
}

Answer answer(const AttentionCase& c, const AttentionInputs& inputs) {
  return answer(c.causal, inputs.query.model(), inputs.key.model(), inputs.value.model(), c.heads, inputs.padding);
}

const Recognise recognise_sdpa(numbers(library_cases()), [](int number) -> std::vector<Array> {
  const AttentionCase& c = attention_case(number);
  return {answer(c, make_inputs(c)).output};
});

struct Sizes {
  Index batch, heads, queries, keys;
};

// A query that agrees with one key so well that it gets this key's value and nothing else, exactly: key j points along
// axis j, and query i of head h of item b along the axis of the key that `chosen` names. Values say where they lie.
struct Needles {
  template <typename Chosen>
  Needles(const Sizes& n, Index value_width, Chosen chosen)
      : query(n.batch, n.queries, n.heads, n.keys),
        key(n.batch, n.keys, n.heads, n.keys),
        value(n.batch, n.keys, n.heads, value_width),
        want{{n.batch, n.queries, n.heads * value_width}, {}} {
    const auto axis = [](Index at, Index d) { return at == d ? 100.0f : 0.0f; };
    for (Index b = 0; b < n.batch; ++b)
      for (Index h = 0; h < n.heads; ++h)
        for (Index d = 0; d < n.keys; ++d) {
          for (Index i = 0; i < n.queries; ++i) query.heads()(b, h, i, d) = axis(chosen(b, h, i), d);
          for (Index j = 0; j < n.keys; ++j) key.heads()(b, h, j, d) = axis(j, d);
        }
    const auto code = [](Index b, Index h, Index j, Index d) {
      return static_cast<float>(b * 100000 + j * 100 + h * 10 + d);
    };
    for (Index b = 0; b < n.batch; ++b)
      for (Index h = 0; h < n.heads; ++h)
        for (Index j = 0; j < n.keys; ++j)
          for (Index d = 0; d < value_width; ++d) value.heads()(b, h, j, d) = code(b, h, j, d);
    for (Index b = 0; b < n.batch; ++b)
      for (Index i = 0; i < n.queries; ++i)
        for (Index h = 0; h < n.heads; ++h)
          for (Index d = 0; d < value_width; ++d) want.values.push_back(code(b, h, chosen(b, h, i), d));
  }

  TokenTensor query, key, value;
  Array want;
};

// Every number as it was put in; `input` says what was put in.
bool expect_exactly(const Array& got, const Array& want, const std::string& input) {
  if (!expect(got.shape == want.shape, "output", "has shape " + to_text(got.shape) + ", want " + to_text(want.shape))) {
    return false;
  }
  std::size_t off = 0;
  for (std::size_t n = 0; n < want.count(); ++n) off += got.values[n] != want.values[n];
  if (off == 0) return true;
  const std::size_t first = first_difference(got, want);
  std::ostringstream text;
  text << off << " of " << want.count() << " elements off; first at [" << place(want, first, MODEL) << "]: got "
       << got.values[first] << ", want exactly " << want.values[first];
  finding("output", text.str());
  finding("input", input);
  return false;
}

// The rows of token i of every batch item, [B, H*Dv].
Array token(const Array& output, Index i) {
  Array rows{{output.shape[0], output.shape[2]}, {}};
  for (Index b = 0; b < output.shape[0]; ++b) {
    const auto begin = output.values.begin() + (b * output.shape[1] + i) * output.shape[2];
    rows.values.insert(rows.values.end(), begin, begin + output.shape[2]);
  }
  return rows;
}

// One batch item, [Sq, H*Dv].
Array item(const Array& output, Index b) {
  const Index size = output.shape[1] * output.shape[2];
  const auto begin = output.values.begin() + b * size;
  return {{output.shape[1], output.shape[2]}, {begin, begin + size}};
}

bool expect_output_shape(const Array& output, const AttentionCase& c) {
  const std::vector<Index> want = {c.batch, c.queries, c.heads * c.value_width};
  return expect(output.shape == want, "output", "has shape " + to_text(output.shape) + ", want " + to_text(want));
}

std::string named(const AttentionCase& c) { return c.causal ? "sdpa_causal" : "sdpa_bidirectional"; }

}  // namespace

TEST_SUITE("phase1.05_sdpa") {
  TEST_CASE("three tokens worked with a pencil in the README come back in their own order") {
    ask("The README writes down which number of memory head 1 of token 0 begins with. Where does your view begin it?");
    // Token 0 agrees with itself only, and so do 1 and 2, in both heads.
    std::vector<float> q = {1000, 0, 1000, 0, 0, 1000, 0, 1000, -1000, -1000, -1000, -1000};
    std::vector<float> v = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    const Input tokens(q.data(), {1, 3, 4});
    const Input values(v.data(), {1, 3, 4});
    const Array want{{1, 3, 4}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}};
    for (const bool causal : {false, true}) {
      if (!expect_exactly(answer(causal, tokens, tokens, values, 2).output, want, "each token sees only itself"))
        return;
    }
  }

  TEST_CASE("each head of each token finds the value that it looks for") {
    ask("The value that comes out tells where it lay: the first digit of six is the item, the three before the last "
        "two the token, then the head, then the channel. Which of them is not the one that was asked for?");
    for (const Sizes n : {Sizes{1, 1, 3, 3}, Sizes{2, 3, 5, 7}, Sizes{2, 4, 4, 4}, Sizes{3, 5, 9, 2},
                          Sizes{2, 7, 4, 130}, Sizes{1, 2, 1, 6}}) {
      for (const Index value_width : {std::min<Index>(n.keys, 9), Index{3}, Index{9}}) {
        const Needles inputs(n, value_width, [&](Index b, Index h, Index i) { return (3 * i + b + 2 * h) % n.keys; });
        const Array got = answer(false, inputs.query.model(), inputs.key.model(), inputs.value.model(), n.heads).output;
        const std::string what = "B=" + std::to_string(n.batch) + " H=" + std::to_string(n.heads) +
                                 " Sq=" + std::to_string(n.queries) + " Sk=" + std::to_string(n.keys) +
                                 " D=" + std::to_string(n.keys) + " Dv=" + std::to_string(value_width);
        if (!expect_exactly(got, inputs.want, what)) return;
      }
    }
  }

  TEST_CASE("the last key that a token may see is found and the first that it may not see is not") {
    ask("Number the tokens from the end. Which key stands beside the last query, and which beside the last but one?");
    std::vector<Sizes> sizes = {{2, 2, 6, 6}, {1, 4, 4, 4}, {2, 7, 3, 80}, {1, 2, 20, 3}};
    for (Index queries = 1; queries <= 6; ++queries)
      for (Index keys = 1; keys <= 7; ++keys) sizes.push_back({2, 3, queries, keys});
    for (const Sizes& n : sizes) {
      const Index offset = n.keys - n.queries;
      // Each query looks for its last visible key ...
      Needles inputs(n, 4, [&](Index, Index, Index i) { return std::max<Index>(0, i + offset); });
      for (Index b = 0; b < n.batch; ++b)
        for (Index i = 0; i < n.queries && i + offset < 0; ++i)
          for (Index e = 0; e < n.heads * 4; ++e) {
            inputs.want.values[static_cast<std::size_t>((b * n.queries + i) * n.heads * 4 + e)] = 0.0;
          }
      const std::string what = "Sq=" + std::to_string(n.queries) + " Sk=" + std::to_string(n.keys);
      const Array got = answer(true, inputs.query.model(), inputs.key.model(), inputs.value.model(), n.heads).output;
      if (!expect_exactly(got, inputs.want, what + ", each query looks for the last key that it may see")) return;

      // ... and then for the key after it, which it must not find: the others share its attention alike.
      const Needles forbidden(n, 1, [&](Index, Index, Index i) { return std::max<Index>(0, i + offset + 1); });
      const Array missed =
          answer(true, forbidden.query.model(), forbidden.key.model(), forbidden.value.model(), n.heads).output;
      Array want{missed.shape, {}};
      for (Index b = 0; b < n.batch; ++b)
        for (Index i = 0; i < n.queries; ++i)
          for (Index h = 0; h < n.heads; ++h) {
            const double mean_token = static_cast<double>(i + offset) / 2.0;  // of keys 0 .. i + offset
            const bool none = i + offset < 0;
            const double mean = static_cast<double>(b * 100000 + h * 10) + 100.0 * mean_token;
            want.values.push_back(none ? 0.0 : mean);
          }
      if (!expect_close("output", missed, want, {1e-6, want}, MODEL)) {
        finding("input", what + ", each query looks for the first key that it may not see");
        return;
      }
    }
  }

  TEST_CASE("one key is all that there is to attend to") {
    ask("With a single key its weight is 1 in every head, whatever the scores are. Whose value comes out?");
    for (const bool causal : {false, true}) {
      for (const Sizes n : {Sizes{3, 4, 1, 1}, Sizes{2, 3, 5, 1}, Sizes{4, 4, 4, 1}}) {
        TokenTensor query(n.batch, n.queries, n.heads, 5);
        TokenTensor key(n.batch, 1, n.heads, 5);
        TokenTensor value(n.batch, 1, n.heads, 6);
        fill_normal(query.heads(), 1);
        fill_normal(key.heads(), 2);
        fill_normal(value.heads(), 3);
        Array want{{n.batch, n.queries, n.heads * 6}, {}};
        for (Index b = 0; b < n.batch; ++b)
          for (Index i = 0; i < n.queries; ++i)
            for (Index e = 0; e < n.heads * 6; ++e) {
              want.values.push_back(causal && i + 1 < n.queries ? 0.0 : static_cast<double>(value.model()(b, 0, e)));
            }
        const Array got = answer(causal, query.model(), key.model(), value.model(), n.heads).output;
        const std::string what = "B=" + std::to_string(n.batch) + " H=" + std::to_string(n.heads) +
                                 " Sq=" + std::to_string(n.queries) + (causal ? ", causal" : "");
        if (!expect_exactly(got, want, what)) return;
      }
    }
  }

  TEST_CASE("the scale counts the width of one head and is applied once") {
    ask("Who applies the scale here, you or the library? Over how many numbers does one head's dot product run?");
    for (const Index width : {1, 4, 16, 64, 256}) {
      for (const Index heads : {1, 3}) {
        // The first key's score is ln 2 above the second's, if the scale is 1 / sqrt(D).
        const float factor = std::log(2.0f) / std::sqrt(static_cast<float>(width));
        std::vector<float> q(static_cast<std::size_t>(heads * width), 1.0f);
        std::vector<float> k(2 * q.size(), 0.0f);
        std::fill_n(k.begin(), q.size(), factor);
        std::vector<float> v(static_cast<std::size_t>(2 * heads), 0.0f);
        std::fill_n(v.begin(), heads, 3.0f);
        const Input query(q.data(), {1, 1, heads * width}), key(k.data(), {1, 2, heads * width});
        const Input value(v.data(), {1, 2, heads});
        const std::string what = "H=" + std::to_string(heads) + " D=" + std::to_string(width) +
                                 ": weights 2/3 and 1/3 of values 3 and 0 should make 2";
        for (const bool causal : {false, true}) {
          if (!expect_all("output", answer(causal, query, key, value, heads).output, 2.0, 1e-5, MODEL, what)) return;
        }
      }
    }
  }

  TEST_CASE("a padding mask of true changes nothing") {
    ask("What does true mean in the course's mask, and what in the library's? Set it everywhere: what should change?");
    for_each(library_cases(), [](const AttentionCase& c) {
      AttentionInputs inputs = make_inputs(c);
      inputs.padding.reset();
      const Array want = answer(c, inputs).output;
      inputs.padding = BoolMatrix::Constant(c.batch, c.keys, true);
      expect_same_bits("output", answer(c, inputs).output, want, MODEL, "when a mask of true was given");
    });
  }

  TEST_CASE("a padded key cannot move any output whatever it holds") {
    ask("A padded key and its value become NaN. Which row of the mask did the library read for this batch item?");
    for_each(padded_cases(), [](const AttentionCase& c) {
      const AttentionInputs clean = make_inputs(c);
      const Array want = answer(c, clean).output;
      for (const float poison : {7.5f, -3e4f, INF, NOT_A_NUMBER}) {
        AttentionInputs inputs = clean;
        for (Index b = 0; b < c.batch; ++b)
          for (Index j = 0; j < c.keys; ++j) {
            if ((*inputs.padding)(b, j)) continue;
            for (Index e = 0; e < c.heads * c.width; ++e) inputs.key.model()(b, j, e) = poison;
            for (Index e = 0; e < c.heads * c.value_width; ++e) inputs.value.model()(b, j, e) = poison;
          }
        const std::string why = "when the padded keys and values became " + std::to_string(poison);
        if (!expect_same_bits("output", answer(c, inputs).output, want, MODEL, why)) return;
      }
    });
  }

  TEST_CASE("a key that is not padded moves the outputs of its own batch item only") {
    ask("Key j of item b changes. Which batch items, which heads and which tokens may notice?");
    for_each(select([](const AttentionCase& c) {
               return !c.scale && padding_or_none(c.masking) && c.batch > 1 && c.scores == Scores::normal;
             }),
             [](const AttentionCase& c) {
               const AttentionInputs clean = make_inputs(c);
               const Array want = answer(c, clean).output;
               if (!expect_output_shape(want, c)) return;
               for (Index b = 0; b < c.batch; ++b) {
                 for (Index j = 0; j < c.keys; ++j) {
                   if (clean.padding && !(*clean.padding)(b, j)) continue;
                   AttentionInputs inputs = clean;
                   for (Index e = 0; e < c.heads * c.value_width; ++e) inputs.value.model()(b, j, e) += 1000.0f;
                   const Array got = answer(c, inputs).output;
                   const std::string key = "key " + std::to_string(j) + " of item " + std::to_string(b);
                   for (Index other = 0; other < c.batch; ++other) {
                     if (other == b) continue;
                     if (!expect_same_bits("item " + std::to_string(other), item(got, other), item(want, other),
                                           {"token", "channel"}, "when the value of " + key + " changed")) {
                       return;
                     }
                   }
                   for (Index i = 0; i < c.queries; ++i) {
                     for (Index e = 0; e < c.heads * c.value_width; ++e) {
                       const auto at = static_cast<std::size_t>((b * c.queries + i) * c.heads * c.value_width + e);
                       const bool moved = got.values[at] != want.values[at];
                       const bool may = may_attend(c, clean, b, i, j);
                       if (!expect(moved == may, "output",
                                   "[item " + std::to_string(b) + ", token " + std::to_string(i) + ", channel " +
                                       std::to_string(e) + "] " + (moved ? "moved" : "did not move") +
                                       " when the value of " + key + " did, which it may " + (may ? "" : "not ") +
                                       "attend to")) {
                         return;
                       }
                     }
                   }
                 }
               }
             });
  }

  TEST_CASE("a token does not notice that its future changes") {
    ask("Change everything after one token. What does the library's is_causal say about it when Sq and Sk differ?");
    for_each(select([](const AttentionCase& c) { return c.causal; }), [](const AttentionCase& c) {
      const AttentionInputs clean = make_inputs(c);
      const Array want = answer(c, clean).output;
      if (!expect_output_shape(want, c)) return;
      for (Index first = 0; first < c.keys; ++first) {  // keys `first` and after become NaN
        AttentionInputs inputs = clean;
        for (Index b = 0; b < c.batch; ++b)
          for (Index j = first; j < c.keys; ++j) {
            for (Index e = 0; e < c.heads * c.width; ++e) inputs.key.model()(b, j, e) = NOT_A_NUMBER;
            for (Index e = 0; e < c.heads * c.value_width; ++e) inputs.value.model()(b, j, e) = NOT_A_NUMBER;
          }
        const Array got = answer(c, inputs).output;
        for (Index i = 0; i < c.queries && i + c.keys - c.queries < first; ++i) {
          if (!expect_same_bits("token " + std::to_string(i), token(got, i), token(want, i), {"item", "channel"},
                                "when key " + std::to_string(first) + " and those after it became NaN")) {
            return;
          }
        }
      }
    });
  }

  TEST_CASE("the last query sees all keys with the triangle as without") {
    ask("The last query is the last key's contemporary. What does the triangle forbid it?");
    for_each(select([](const AttentionCase& c) { return c.causal; }), [](const AttentionCase& c) {
      const AttentionInputs inputs = make_inputs(c);
      AttentionCase free = c;
      free.causal = false;
      const Array causal = answer(c, inputs).output;
      const Array all = answer(free, inputs).output;
      if (!expect_output_shape(causal, c) || !expect_output_shape(all, c)) return;
      expect_same_bits("last token", token(causal, c.queries - 1), token(all, c.queries - 1), {"item", "channel"},
                       "when the triangle was added");
    });
  }

  TEST_CASE("a query that may attend to nothing gets 0") {
    ask("What does the library return for a query whose row of the mask is false everywhere? Does yours still?");
    for_each(library_cases(), [](const AttentionCase& c) {
      const AttentionInputs inputs = make_inputs(c);
      const Array output = answer(c, inputs).output;
      if (!expect_output_shape(output, c)) return;
      for (Index b = 0; b < c.batch; ++b)
        for (Index i = 0; i < c.queries; ++i) {
          bool any = false;
          for (Index j = 0; j < c.keys; ++j) any = any || may_attend(c, inputs, b, i, j);
          if (any) continue;
          Array row{{c.heads * c.value_width}, {}};
          const auto begin = output.values.begin() + (b * c.queries + i) * row.shape[0];
          row.values.assign(begin, begin + row.shape[0]);
          if (!expect_all("output", row, 0.0, 0.0, {"channel"},
                          "query " + std::to_string(i) + " of item " + std::to_string(b) + " may attend to nothing")) {
            return;
          }
        }
    });
  }

  TEST_CASE("no batch item and no token give an output with no element") {
    ask("How long is a loop over a batch of 0? Which shape does the caller still expect?");
    std::vector<float> memory(64, 1.0f);
    for (const bool causal : {false, true}) {
      for (const Shape<3> shape : {Shape<3>{0, 3, 4}, Shape<3>{2, 0, 4}, Shape<3>{0, 0, 4}}) {
        const Input x(memory.data(), shape);
        const Array output = answer(causal, x, x, x, 2).output;
        expect(output.shape == std::vector<Index>(shape.begin(), shape.end()), "output",
               "has shape " + to_text(output.shape) + ", want " + to_text(shape));
      }
      const Input tokens(memory.data(), {2, 3, 4});
      const Input none(memory.data(), {2, 0, 4});
      const Array output = answer(causal, tokens, none, none, 2, PaddingMask(BoolMatrix(2, 0))).output;
      const Array want{{2, 3, 4}, std::vector<double>(24, 0.0)};
      expect_exactly(output, want, "three tokens and no key to attend to");
    }
  }

  TEST_CASE("tokens and batch items may lie apart in memory") {
    ask("Token 1 need not follow token 0, nor item 1 the last token of item 0. Which numbers of the view say where?");
    // The first tokens of a longer cache whose rows are wider, NaN elsewhere.
    struct Cache {
      Cache(Index tokens, Index capacity, Index heads, Index width, unsigned seed)
          : row(heads * width + 3),
            memory(static_cast<std::size_t>(2 * capacity * row), NOT_A_NUMBER),
            apart(memory.data(), {2, tokens, heads * width}, {capacity * row, row, 1}),
            packed(2, tokens, heads, width) {
        fill_normal(packed.heads(), seed);
        for (Index b = 0; b < 2; ++b)
          for (Index s = 0; s < tokens; ++s)
            for (Index e = 0; e < heads * width; ++e) apart(b, s, e) = packed.model()(b, s, e);
      }
      Index row;
      std::vector<float> memory;
      View<float, 3> apart;
      TokenTensor packed;
    };
    const Cache q(4, 9, 3, 4, 1), k(6, 7, 3, 4, 2), v(6, 11, 3, 2, 3);
    const Input packed_q = q.packed.model(), packed_k = k.packed.model(), packed_v = v.packed.model();
    BoolMatrix mask{{true, true, false, true, true, false}, {false, true, true, true, false, true}};
    for (const bool causal : {false, true}) {
      for (const PaddingMask& padding : {PaddingMask{}, PaddingMask{mask}}) {
        const Array want = answer(causal, packed_q, packed_k, packed_v, 3, padding).output;
        const std::string why =
            causal ? "when the caller's tokens moved apart, causal" : "when the caller's tokens moved apart";
        const auto same = [&](const Answer& got) { return expect_same_bits("output", got.output, want, MODEL, why); };
        if (!same(answer(causal, q.apart, packed_k, packed_v, 3, padding))) return;
        if (!same(answer(causal, packed_q, k.apart, packed_v, 3, padding))) return;
        if (!same(answer(causal, packed_q, packed_k, v.apart, 3, padding))) return;
        if (!same(answer(causal, q.apart, k.apart, v.apart, 3, padding))) return;
      }
    }
  }

  TEST_CASE("the library is called once for all batch items and heads") {
    ask("The library loops over batch items and heads itself. How many calls are left for you?");
    for_each(library_cases(), [](const AttentionCase& c) {
      const std::size_t calls = answer(c, make_inputs(c)).calls.size();
      expect(calls == 1 || c.queries == 0, "calls",
             named(c) + " called the library " + std::to_string(calls) + " times, want 1");
    });
  }

  TEST_CASE("the library reads q and k and v where they lie") {
    ask("A view is a pointer, a shape and strides. Which strides make [B, H, S, D] out of memory that holds "
        "[B, S, H*D], without moving a number?");
    for_each(library_cases(), [](const AttentionCase& c) {
      const Answer got = answer(c, make_inputs(c));
      for (const SdpaCall& call : got.calls) {
        const std::string sentence = " was copied: the library got memory that is not the caller's";
        const auto inside = [&](const View<const float, 4>& view, std::size_t input) {
          return view.count() == 0 || got.lent[input].holds(static_cast<const void*>(view.data()));
        };
        if (!expect(inside(call.query, 0), "q", "query" + sentence)) return;
        if (!expect(inside(call.key, 1), "k", "key" + sentence)) return;
        if (!expect(inside(call.value, 2), "v", "value" + sentence)) return;
      }
    });
  }

  TEST_CASE("q and k and v and the mask are read and not changed") {
    ask("The inputs belong to the caller. Do they still hold the same when the library reads them, and afterwards?");
    for_each(library_cases(), [](const AttentionCase& c) {
      const Answer got = answer(c, make_inputs(c));
      for (const SdpaCall& call : got.calls) {
        if (!expect(!call.inputs_changed, "inputs", "had changed when the library was called")) return;
      }
      expect(!got.inputs_changed, "inputs", "had changed when " + named(c) + " returned");
    });
  }

  TEST_CASE("the output holds the numbers that the library returned and no others") {
    ask("After the library's call only the order of the numbers is yours to change. Which line of yours computes?");
    for_each(library_cases(), [](const AttentionCase& c) {
      const Answer got = answer(c, make_inputs(c));
      if (got.calls.size() != 1 || !expect_output_shape(got.output, c)) return;
      std::vector<double> returned = got.calls[0].result.values;
      std::vector<double> output = got.output.values;
      std::sort(returned.begin(), returned.end());
      std::sort(output.begin(), output.end());
      expect(returned == output, "output", "has numbers that the library did not return, or not as often");
    });
  }

  TEST_CASE("an earlier call leaves no trace in a later one") {
    ask("Call it with one mask, then with another of the same shape. What of the first is still there?");
    for (const bool causal : {false, true}) {
      const Masking right = Masking::padding_right;
      const auto some = select([&](const AttentionCase& c) { return c.causal == causal && c.masking == right; });
      const AttentionCase& c = some.front();
      const AttentionInputs one = make_inputs(c);
      AttentionInputs other = one;
      other.padding = one.padding->rowwise().reverse();
      AttentionInputs none = one;
      none.padding.reset();
      const Array first = answer(c, one).output;
      const Array second = answer(c, other).output;
      const Array third = answer(c, none).output;
      expect(first_difference(first, second) != npos, "output", "is the same under two different masks");
      expect(first_difference(first, third) != npos, "output", "is the same with a mask and without");
      expect_same_bits("output", answer(c, other).output, second, MODEL, "after other calls");
      expect_same_bits("output", answer(c, one).output, first, MODEL, "after other calls");
      expect_same_bits("output", answer(c, none).output, third, MODEL, "after other calls");
    }
  }

  TEST_CASE("agrees with the float64 reference") {
    for_each(library_cases(), [](const AttentionCase& c) {
      const AttentionInputs inputs = make_inputs(c);
      const Expected want = expected(c, inputs);
      expect_close("output", answer(c, inputs).output, in_model_layout(want.output), in_model_layout(want.output_bound),
                   MODEL);
    });
  }

  TEST_CASE("says what is wrong with bad arguments") {
    std::vector<float> memory(512, 1.0f);
    const auto ones = [&](Index batch, Index tokens, Index columns) {
      return Input(memory.data(), {batch, tokens, columns});
    };
    const Input q = ones(2, 3, 12), k = ones(2, 5, 12), v = ones(2, 5, 8);
    for (const bool causal : {false, true}) {
      const auto& function = causal ? sdpa_causal : sdpa_bidirectional;
      function(q, k, v, 4, BoolMatrix(BoolMatrix::Constant(2, 5, true)));  // these are right
      const auto mask = [&](Index rows, Index columns) {
        return BoolMatrix(BoolMatrix::Constant(rows, columns, true));
      };
      expect_rejected("a mask [Sk, B]", "mask", [&] { function(q, k, v, 4, mask(5, 2)); });
      expect_rejected("a mask [B, Sk + 1]", "mask", [&] { function(q, k, v, 4, mask(2, 6)); });
      expect_rejected("a mask [B + 1, Sk]", "mask", [&] { function(q, k, v, 4, mask(3, 5)); });
      expect_rejected("5 heads in 12 columns", "num_heads", [&] { function(q, k, v, 5, {}); });
      expect_rejected("a k narrower than q", "k", [&] { function(q, ones(2, 5, 8), v, 4, {}); });
      expect_rejected("a k with fewer batch items than q", "k", [&] { function(q, ones(1, 5, 12), v, 4, {}); });
      expect_rejected("a v with fewer tokens than k", "v", [&] { function(q, k, ones(2, 4, 8), 4, {}); });
      expect_rejected("a v whose columns 4 heads cannot share", "v", [&] { function(q, k, ones(2, 5, 6), 4, {}); });
      expect_rejected("columns of width 0", "q", [&] { function(ones(2, 3, 0), ones(2, 5, 0), v, 4, {}); });
      expect_rejected("no head", "num_heads", [&] { function(q, k, v, 0, {}); });
      expect_rejected("-4 heads", "num_heads", [&] { function(q, k, v, -4, {}); });
    }
  }
}
