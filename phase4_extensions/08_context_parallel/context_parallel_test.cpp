// The zigzag, and both forms between ranks on the host. Those between GPUs: flash_context_parallel_test.cpp.
#include "context_parallel.hpp"

#include <cmath>
#include <limits>
#include <map>
#include <sstream>

#include "common/testing/allocations.hpp"
#include "common/testing/kernel.hpp"
#include "common/testing/options.hpp"
#include "phase2_forward/suite.hpp"
#include "ranks_suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr double MINUS_INFINITY = -std::numeric_limits<double>::infinity();
const Axes ROWS = {"batch", "head", "token", "channel"};
const Axes LSE = {"batch", "head", "token"};

// ---- Problems -------------------------------------------------------------------------------------------------------

struct Problem {
  int ranks;
  AttentionCase problem;  // `heads` query heads; queries = keys = tokens
  Index kv_heads;
  bool coded = false;   // the value of a token is its place, in another unit for each channel
  Index poisoned = -1;  // the key and the value of this token hold NaN
  enum class Probe { numbers, overlap, memory } probe = Probe::numbers;

  Index tokens() const { return problem.queries; }
  Dealt dealt() const { return {problem.number, ranks, problem.batch, tokens()}; }
  Index rows() const { return dealt().rows(); }
  // Floats of K and V that a rank has.
  Index floats() const { return problem.batch * kv_heads * rows() * (problem.width + problem.value_width); }
  std::string text() const {
    return problem.why + std::string(": W=") + std::to_string(ranks) + " S=" + std::to_string(tokens()) +
           " B=" + std::to_string(problem.batch) + " H=" + std::to_string(problem.heads) +
           " Hk=" + std::to_string(kv_heads) + " D=" + std::to_string(problem.width) +
           " Dv=" + std::to_string(problem.value_width) + (problem.causal ? ", causal" : "");
  }
};

// Their numbers never change: new ones go to the end.
const std::vector<Problem>& problems() {
  static const std::vector<Problem> list = [] {
    const auto sizes = [](const char* why, Index batch, Index heads, Index tokens, Index width, Index value_width,
                          bool causal) {
      AttentionCase c{.why = why,
                      .batch = batch,
                      .heads = heads,
                      .queries = tokens,
                      .keys = tokens,
                      .width = width,
                      .value_width = value_width};
      c.causal = causal;
      return c;
    };
    const auto with_scores = [](AttentionCase c, Scores scores) {
      c.scores = scores;
      return c;
    };
    const auto with_gap = [](AttentionCase c) {
      c.gap = 3;
      return c;
    };
    const auto with_scale = [](AttentionCase c, float scale) {
      c.scale = scale;
      return c;
    };
    std::vector<Problem> all = {
        {3, sizes("two tokens a chunk", 1, 1, 12, 4, 4, true), 1},
        {3, sizes("every query sees every key", 1, 1, 12, 4, 4, false), 1},
        {3, with_scores(sizes("values say where they stood", 1, 1, 18, 4, 3, true), Scores::flat), 1, true},
        {3, sizes("two batch items, four heads share two", 2, 4, 30, 8, 5, true), 2},
        {3, with_gap(sizes("the last chunk has one token", 1, 2, 31, 4, 4, true)), 2},
        {3, with_gap(sizes("the last chunk is empty, three heads share one", 1, 3, 25, 4, 4, false)), 1},
        {3, sizes("fewer tokens than chunks", 1, 1, 4, 4, 4, true), 1},
        {3, with_scale(sizes("a scale, and wide values", 2, 1, 18, 8, 12, false), 0.3f), 1},
        {3, with_scores(sizes("scores falling by 300", 1, 1, 24, 8, 4, true), Scores::falling), 1},
        {3, with_scores(sizes("scores rising", 1, 1, 24, 8, 4, false), Scores::rising), 1},
        {3, sizes("a token of the middle holds NaN", 1, 1, 24, 4, 4, true), 1, false, 10},
        {3, sizes("long enough to look at the clock", 1, 1, 288, 24, 24, false), 1, false, -1, Problem::Probe::overlap},
        {2, sizes("two ranks, two heads share one", 1, 2, 16, 4, 4, true), 1},
        {2, sizes("two ranks, ragged", 1, 1, 13, 4, 4, false), 1},
        {4, sizes("four ranks, four heads share two", 1, 4, 64, 8, 8, true), 2},
        {4, sizes("four ranks, ragged", 2, 1, 59, 4, 6, false), 1},
        {4, sizes("four ranks, one token", 1, 1, 1, 4, 4, true), 1},
        {8, sizes("eight ranks, ragged, two heads share one", 1, 2, 61, 4, 4, true), 1},
        {8, sizes("eight ranks, many heads", 16, 8, 32, 16, 16, false), 8, false, -1, Problem::Probe::memory},
        {1, sizes("alone, two heads share one", 1, 2, 9, 4, 4, true), 1},
        {1, sizes("alone, ragged", 1, 1, 7, 4, 4, false), 1},
    };
    int number = 0;
    for (Problem& p : all) p.problem.number = ++number;
    return all;
  }();
  return list;
}

const Problem& problem_of(int number) { return problems().at(static_cast<std::size_t>(number - 1)); }

// The whole sequence, on one device.
struct Whole {
  AttentionInputs inputs;  // key/value heads repeated for every query head that reads them
  TokenTensor d_output;

  explicit Whole(const Problem& p) : inputs(make_inputs(p.problem)), d_output(make_output_gradient(p.problem)) {
    const Index shared = p.problem.heads / p.kv_heads;
    for (Index b = 0; b < p.problem.batch; ++b) {
      for (Index h = 0; h < p.problem.heads; ++h) {
        for (Index s = 0; s < p.tokens(); ++s) {
          const Index first = h / shared * shared;
          for (Index d = 0; d < p.problem.width; ++d) key()(b, h, s, d) = key()(b, first, s, d);
          for (Index d = 0; d < p.problem.value_width; ++d) {
            value()(b, h, s, d) =
                p.coded ? static_cast<float>(s + 1) * static_cast<float>(d + 1) : value()(b, first, s, d);
          }
        }
      }
    }
  }
  View<float, 4> key() { return inputs.key.heads(); }
  View<float, 4> value() { return inputs.value.heads(); }
};

// What one rank is given: rows of the whole in memory with gaps, NaN in what is padding.
struct Given {
  TokenTensor query, key, value, output, d_output;
  Tensor<float, 3> lse;
  LocalAttention local;

  Given(const Problem& p, int rank, Whole& whole, const Expected& want)
      : query(p.problem.batch, p.rows(), p.problem.heads, p.problem.width, p.problem.gap),
        key(p.problem.batch, p.rows(), p.kv_heads, p.problem.width, p.problem.gap),
        value(p.problem.batch, p.rows(), p.kv_heads, p.problem.value_width),
        output(p.problem.batch, p.rows(), p.problem.heads, p.problem.value_width, p.problem.gap),
        d_output(p.problem.batch, p.rows(), p.problem.heads, p.problem.value_width),
        lse({p.problem.batch, p.problem.heads, p.rows()}),
        local{query.heads(), key.heads(), value.heads(), p.tokens(), p.problem.causal, p.problem.scale} {
    const Index shared = p.problem.heads / p.kv_heads;
    for (const auto& view : {query.heads(), key.heads(), value.heads(), output.heads(), d_output.heads()}) {
      each(view, [](float& number, Index, Index, Index, Index) { number = NOT_A_NUMBER; });
    }
    const auto take = [&](const View<float, 4>& to, const auto& from, Index heads_apart) {
      each(to, [&](float& number, Index b, Index h, Index row, Index d) {
        const Index token = p.dealt().token_at(rank, row);
        if (token >= 0) number = static_cast<float>(from(b, h * heads_apart, token, d));
      });
    };
    take(query.heads(), whole.inputs.query.heads(), 1);
    take(key.heads(), whole.key(), shared);
    take(value.heads(), whole.value(), shared);
    take(d_output.heads(), whole.d_output.heads(), 1);
    const auto element = [&](const Array& array, Index b, Index h, Index token, Index d, Index width) {
      return array.values[static_cast<std::size_t>(((b * p.problem.heads + h) * p.tokens() + token) * width + d)];
    };
    take(
        output.heads(),
        [&](Index b, Index h, Index token, Index d) {
          return element(want.output, b, h, token, d, p.problem.value_width);
        },
        1);
    for (Index b = 0; b < p.problem.batch; ++b)
      for (Index h = 0; h < p.problem.heads; ++h)
        for (Index row = 0; row < p.rows(); ++row) {
          const Index token = p.dealt().token_at(rank, row);
          lse(b, h, row) = token < 0 ? NOT_A_NUMBER : static_cast<float>(element(want.lse, b, h, token, 0, 1));
        }
    if (p.poisoned >= 0 && place_of(p.poisoned, p.tokens(), p.ranks).rank == rank) {
      const Index row = place_of(p.poisoned, p.tokens(), p.ranks).row;
      for (Index d = 0; d < p.problem.width; ++d) key.heads()(0, 0, row, d) = NOT_A_NUMBER;
      for (Index d = 0; d < p.problem.value_width; ++d) value.heads()(0, 0, row, d) = NOT_A_NUMBER;
    }
  }

  std::vector<Array> inputs() const {
    return {to_array(query.heads()),  to_array(key.heads()),      to_array(value.heads()),
            to_array(output.heads()), to_array(d_output.heads()), to_array(lse)};
  }

  template <typename Body>
  static void each(const View<float, 4>& view, const Body& body) {
    for (Index b = 0; b < view.size(0); ++b)
      for (Index h = 0; h < view.size(1); ++h)
        for (Index row = 0; row < view.size(2); ++row)
          for (Index d = 0; d < view.size(3); ++d) body(view(b, h, row, d), b, h, row, d);
  }
};

// ---- What every rank does -------------------------------------------------------------------------------------------

struct Form {
  const char* name;
  TiledResult (*forward)(const LocalAttention&, Communicator&);
  TiledGradients (*backward)(const LocalAttention&, View<const float, 4>, View<const float, 3>, View<const float, 4>,
                             Communicator&);
};
const Form FORMS[] = {{"gather", gather_attention, gather_attention_backward},
                      {"ring", ring_attention, ring_attention_backward}};

std::vector<Array> answer_of(const Form& form, bool backward, const Given& given, Communicator& communicator) {
  if (!backward) {
    const TiledResult result = form.forward(given.local, communicator);
    return {to_array(result.output), to_array(result.lse)};
  }
  // Rows of the lse lie apart, with NaN between them.
  const Shape<3> rows = given.lse.view().shape();
  Tensor<float, 4> apart({rows[0], rows[1], rows[2], 2});
  std::fill_n(apart.data(), apart.count(), NOT_A_NUMBER);
  for (Index b = 0; b < rows[0]; ++b)
    for (Index h = 0; h < rows[1]; ++h)
      for (Index i = 0; i < rows[2]; ++i) apart(b, h, i, 0) = given.lse(b, h, i);
  const View<const float, 3> lse(apart.data(), rows, {rows[1] * rows[2] * 2, rows[2] * 2, 2});
  const TiledGradients result =
      form.backward(given.local, given.output.heads(), lse, given.d_output.heads(), communicator);
  return {to_array(result.query), to_array(result.key), to_array(result.value)};
}

bool alike(const std::vector<Array>& one, const std::vector<Array>& other) {
  for (std::size_t i = 0; i < one.size(); ++i) {
    if (one[i].shape != other[i].shape || first_difference(one[i], other[i]) != npos) return false;
  }
  return true;
}

// False if there is nothing more to be done: what is not implemented yet was in the middle of an exchange.
bool call(const Problem& p, const Form& form, bool backward, const Given& given, Communicator& real,
          RankReport& report) {
  const int number = p.problem.number;
  report.doing = "case " + std::to_string(number) + ", " + form.name + (backward ? " backward" : " forward");
  const auto found = [&](const std::string& sentence) {
    report.findings.emplace_back(key(number, form.name, backward, ""), sentence);
  };
  Watched<OnTheHost> watched(real);
  try {
    if (p.probe == Problem::Probe::memory) {
      const Allocations memory = allocations_of([&] {
        if (backward) {
          form.backward(given.local, given.output.heads(), given.lse, given.d_output.heads(), real);
        } else {
          form.forward(given.local, real);
        }
      });
      report.arrays[key(number, form.name, backward, "memory")] = {{1}, {static_cast<double>(memory.peak)}};
    }
    const std::vector<Array> before = given.inputs();
    const std::vector<Array> answer = answer_of(form, backward, given, watched);
    if (p.probe == Problem::Probe::overlap) {
      report.arrays[key(number, form.name, backward, "overlap")] = {{1}, {watched.overlap()}};
    }
    if (watched.under_way != 0) found("an exchange was begun and never waited for");
    for (const std::string& sentence : watched.findings) found(sentence);
    if (!alike(before, given.inputs())) found("changed what it was given");
    const std::vector<std::string> names = names_of(backward);
    for (std::size_t i = 0; i < names.size(); ++i) {
      report.arrays[key(number, form.name, backward, names[i])] = answer[i];
    }
    report.arrays[key(number, form.name, backward, "bytes")] = watched.bytes();
    if (number == 4 && !alike(answer, answer_of(form, backward, given, watched))) {
      found("gave other bits in a second call");
    }
    report.doing += ", at its end";
    real.barrier();  // whoever has left too early shall not meet others in another case
  } catch (const NotImplemented& error) {
    report.missing[key(number, form.name, backward, "")] = error.file();
    return !watched.used;
  }
  return true;
}

void work_on_hosts(Communicator& communicator, RankReport& report) {
  std::map<int, std::unique_ptr<Given>> given;
  for (const Problem& p : problems()) {
    if (p.ranks != communicator.size()) continue;
    Whole whole(p);
    given[p.problem.number] = std::make_unique<Given>(p, communicator.rank(), whole, expected(p.problem, whole.inputs));
  }
  for (const Form& form : FORMS) {
    for (const bool backward : {false, true}) {
      report.doing = form.name + std::string(backward ? " backward" : " forward");
      report.save();
      for (const auto& [number, mine] : given) {
        if (!call(problem_of(number), form, backward, *mine, communicator, report)) return;
      }
    }
  }
}

const RankWork work([](Communicator& communicator, RankReport& report) {
  report.task.starts_with(ON_GPUS) ? work_on_gpus(communicator, report) : work_on_hosts(communicator, report);
});

// ---- Judgement ------------------------------------------------------------------------------------------------------

// The gradient of a key/value head: the sum over the query heads that read it.
Array shared_sum(const Array& heads, Index kv_heads) {
  Array sum = heads;
  sum.shape[1] = kv_heads;
  const auto shared = static_cast<std::size_t>(heads.shape[1] / kv_heads);
  const auto each = static_cast<std::size_t>(heads.shape[2] * heads.shape[3]);
  sum.values.assign(heads.count() / shared, 0.0);
  for (std::size_t at = 0; at < heads.count(); ++at)
    sum.values[at / each / shared * each + at % each] += heads.values[at];
  return sum;
}

// Only the tokens before the one that holds NaN can be judged.
Array before_poison(const Problem& p, Array array) {
  if (p.poisoned < 0) return array;
  const Index each = array.shape.size() > 3 ? array.shape[3] : 1;  // one batch item, one head
  array.values.resize(static_cast<std::size_t>(p.poisoned * each));
  array.shape[2] = p.poisoned;
  return array;
}

bool judge_rows(const Problem& p, const RanksOutcome& outcome, const std::string& form, bool backward,
                const std::string& name, const Array& want, const Bound& bound, double padding) {
  const Index width = want.shape.size() > 3 ? want.shape[3] : 0;
  const Together got =
      together(p.dealt(), outcome, key(p.problem.number, form, backward, name), want.shape[1], width, padding);
  return expect_close(name, before_poison(p, got.array), before_poison(p, want),
                      {bound.relative, before_poison(p, bound.magnitude)}, width > 0 ? ROWS : LSE) &&
         expect(got.wrong_padding.empty(), name, got.wrong_padding);
}

bool judge_numbers(const Problem& p, const RanksOutcome& outcome, const std::string& form, bool backward) {
  const auto rows = [&](const char* name, const Array& want, const Bound& bound, double padding) {
    return judge_rows(p, outcome, form, backward, name, want, bound, padding);
  };
  Whole whole(p);
  if (!backward) {
    const Expected want = expected(p.problem, whole.inputs);
    // The bound of the output has grown with the scores; so may that of the lse.
    const double largest_score =
        (want.output_bound.relative - fp32_bound({}, 0.0).relative) / (2.0 * std::numeric_limits<float>::epsilon());
    return rows("lse", want.lse, lse_bound(want.lse, largest_score), MINUS_INFINITY) &&
           rows("output", want.output, want.output_bound, 0.0);
  }
  const ExpectedGradients want = expected_gradients(p.problem, whole.inputs, whole.d_output);
  const auto shared = [&](const Bound& bound) {
    return Bound{bound.relative, shared_sum(bound.magnitude, p.kv_heads)};
  };
  if (!rows("d_query", want.query, want.query_bound, 0.0)) return false;
  if (p.poisoned >= 0) return true;
  return rows("d_key", shared_sum(want.key, p.kv_heads), shared(want.key_bound), 0.0) &&
         rows("d_value", shared_sum(want.value, p.kv_heads), shared(want.value_bound), 0.0);
}

void judge(const Problem& p, const RanksOutcome& outcome, const std::string& form, bool backward) {
  if (!complete(p.problem.number, outcome, form, backward)) {
    finding("ranks", outcome.failure,
            "Write down for each rank which calls of the communicator it makes, in order. Do all ranks make the same "
            "ones, also those that have nothing to compute?");
    return;
  }
  judge_numbers(p, outcome, form, backward);
  expect_no_findings(p.problem.number, outcome, form, backward);
}

// On the host there is nothing to be watched: where kernels are, these tests have nothing to say.
const RanksOutcome* outcome_on(int ranks) {
  return kernels_are_checked() ? nullptr : testing::outcome_on(ranks, "", "");
}

// Whether --case asks for one of these, or for none.
bool wanted(bool (*fits)(const Problem&)) {
  return only_case() == 0 || (only_case() <= static_cast<int>(problems().size()) && fits(problem_of(only_case())));
}

void judge_all(int ranks, const std::string& form, bool backward) {
  const RanksOutcome* outcome = nullptr;
  for (const Problem& p : problems()) {
    if (p.ranks != ranks) continue;
    if (only_case() != 0 && only_case() != p.problem.number) continue;
    if (outcome == nullptr) outcome = outcome_on(ranks);
    if (outcome == nullptr) return;
    run_case(p.problem.number, p.text(), [&] { judge(p, *outcome, form, backward); });
  }
}

// ---- The zigzag -----------------------------------------------------------------------------------------------------

// The value of token t, channel d, head h, batch item b says which one it is.
Tensor<float, 4> places(Index batch, Index heads, Index tokens, Index width) {
  Tensor<float, 4> x({batch, heads, tokens, width});
  Given::each(x, [](float& number, Index b, Index h, Index token, Index d) {
    number = static_cast<float>(token + 1) + 0.1f * static_cast<float>(d) + 100.0f * static_cast<float>(h) +
             1000.0f * static_cast<float>(b);
  });
  return x;
}

// [B, H, S, D] with a gap behind each channel and each token, and the tokens outside of the heads.
struct Apart {
  std::vector<float> memory;
  View<float, 4> view;

  explicit Apart(const View<const float, 4>& x, float between = NOT_A_NUMBER)
      : memory(static_cast<std::size_t>(x.size(0) * x.size(2) * (x.size(1) * x.size(3) * 2 + 5)) + 1, between),
        view(memory.data(), x.shape(),
             {x.size(2) * (x.size(1) * x.size(3) * 2 + 5), x.size(3) * 2, x.size(1) * x.size(3) * 2 + 5, 2}) {
    Given::each(view, [&](float& number, Index b, Index h, Index s, Index d) { number = x(b, h, s, d); });
  }
};

// What zigzag_split() should return.
Array split_of(const Tensor<float, 4>& whole, int rank, int ranks) {
  const Index tokens = whole.size(2);
  Tensor<float, 4> part({whole.size(0), whole.size(1), 2 * rows_in_chunk(tokens, ranks), whole.size(3)});
  std::fill_n(part.data(), part.count(), 0.0f);
  for (Index token = 0; token < tokens; ++token) {
    const Place place = place_of(token, tokens, ranks);
    if (place.rank != rank) continue;
    for (Index b = 0; b < whole.size(0); ++b)
      for (Index h = 0; h < whole.size(1); ++h)
        for (Index d = 0; d < whole.size(3); ++d) part(b, h, place.row, d) = whole(b, h, token, d);
  }
  return to_array(part);
}

std::vector<View<const float, 4>> views_of(const std::vector<Tensor<float, 4>>& parts) {
  return {parts.begin(), parts.end()};
}

// The parts of all ranks, by the suite, with NaN in their padding.
std::vector<Tensor<float, 4>> parts_with_nan(const Tensor<float, 4>& whole, int ranks) {
  std::vector<Tensor<float, 4>> parts;
  const Index rows = rows_in_chunk(whole.size(2), ranks);
  for (int rank = 0; rank < ranks; ++rank) {
    Tensor<float, 4> part({whole.size(0), whole.size(1), 2 * rows, whole.size(3)});
    for (Index token = 0; token < whole.size(2); ++token) {
      const Place place = place_of(token, whole.size(2), ranks);
      if (place.rank != rank) continue;
      for (Index b = 0; b < whole.size(0); ++b)
        for (Index h = 0; h < whole.size(1); ++h)
          for (Index d = 0; d < whole.size(3); ++d) part(b, h, place.row, d) = whole(b, h, token, d);
    }
    parts.push_back(std::move(part));
  }
  return parts;
}

const char* name_of(Pairs pairs) { return pairs == Pairs::none ? "none" : pairs == Pairs::causal ? "causal" : "all"; }

// ---- What is recognised: the zigzag, and four answers on three ranks ------------------------------------------------

constexpr int LAST_RECOGNISED = 11;

std::vector<int> recognised_numbers() {
  std::vector<int> result{1, 2, 3, 4, 5};
  if (!why_no_ranks().empty()) return result;
  for (int kind = 1; kind <= 4; ++kind) {
    for (int number = 1; number <= LAST_RECOGNISED; ++number) result.push_back(100 * kind + number);
  }
  for (const int number : recognised_on_gpus()) result.push_back(number);
  return result;
}

std::vector<Array> zigzag_outputs(int number) {
  const Zigzag zigzag{21, 4};  // chunks of 3 tokens; one of 0
  Array numbers{{0}, {}};
  const auto add = [&](auto value) { numbers.values.push_back(static_cast<double>(value)); };
  if (number == 1) {
    add(chunk_rows(zigzag));
    for (Index chunk = 0; chunk < 8; ++chunk) add(chunk_tokens(zigzag, chunk));
    for (Index chunk = 0; chunk < 6; ++chunk) add(chunk_tokens({16, 3}, chunk));
  } else if (number == 2) {
    for (int rank = 0; rank < 4; ++rank) {
      for (const Index chunk : chunks_of(zigzag, rank)) add(chunk);
    }
    for (Index chunk = 0; chunk < 8; ++chunk) add(owner_of(zigzag, chunk));
  } else if (number == 3) {
    for (const bool causal : {false, true})
      for (Index q = 0; q < 4; ++q)
        for (Index k = 0; k < 4; ++k) add(static_cast<int>(pairs_of(q, k, causal)) + 1);
  } else if (number == 4) {
    const Tensor<float, 4> whole = places(2, 2, 21, 2);
    std::vector<Array> parts;
    for (int rank = 0; rank < 4; ++rank) parts.push_back(to_array(zigzag_split(whole, rank, 4)));
    return parts;
  } else {
    const auto parts = parts_with_nan(places(2, 2, 21, 2), 4);
    return {to_array(zigzag_merge(views_of(parts), 21))};
  }
  return {numbers};
}

const Recognise recognise_context_parallel(recognised_numbers(), [](int number) {
  if (number < 100) return zigzag_outputs(number);
  if (number > 1000) return outputs_on_gpus(number);
  const Form& form = FORMS[(number / 100 - 1) / 2];
  return outputs_on_ranks("", number % 100, form.name, (number / 100 - 1) % 2 == 1);
});

// Alone, and counts what is exchanged.
class Counting : public OneRank {
 public:
  int calls = 0;

 protected:
  Transfer start_shift(std::span<const std::byte> outgoing, std::span<std::byte> incoming) override {
    ++calls;
    return OneRank::start_shift(outgoing, incoming);
  }
  void gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    ++calls;
    OneRank::gather(mine, all);
  }
};

}  // namespace

TEST_SUITE("phase4.08_context_parallel") {
  TEST_CASE("eight tokens on two ranks as in the handout") {
    ask("Four chunks of two tokens. Which two of them together see as much as the other two?");
    Tensor<float, 4> tokens({1, 1, 8, 1});
    for (Index t = 0; t < 8; ++t) tokens(0, 0, t, 0) = static_cast<float>(t);
    const Array want[] = {{{1, 1, 4, 1}, {0, 1, 6, 7}}, {{1, 1, 4, 1}, {2, 3, 4, 5}}};
    for (int rank = 0; rank < 2; ++rank) {
      expect_same_bits("rank " + std::to_string(rank), to_array(zigzag_split(tokens, rank, 2)),
                       want[static_cast<std::size_t>(rank)], ROWS, "from what the handout says");
    }
  }

  TEST_CASE("rank r has chunk r and its mirror image") {
    ask("Fold a strip of 2W chunks in the middle. Which two lie on each other, and whose are they?");
    for (int ranks = 1; ranks <= 8; ++ranks) {
      const Zigzag zigzag{40, ranks};
      for (int rank = 0; rank < ranks; ++rank) {
        const std::array<Index, 2> want{rank, 2 * ranks - 1 - rank};
        const std::array<Index, 2> got = chunks_of(zigzag, rank);
        const std::string which = std::to_string(rank) + " of " + std::to_string(ranks);
        if (!expect(got == want, "chunks", "of rank " + which + ": got " + to_text(got) + ", want " + to_text(want))) {
          return;
        }
        for (const Index chunk : want) {
          const int owner = owner_of(zigzag, chunk);
          if (!expect(owner == rank, "owner",
                      "of chunk " + std::to_string(chunk) + " on " + std::to_string(ranks) + " ranks: got " +
                          std::to_string(owner) + ", want " + std::to_string(rank))) {
            return;
          }
        }
      }
    }
  }

  TEST_CASE("the chunks hold the sequence and only the last ones are short") {
    ask("Seven tokens on two ranks: how many rows has a chunk, and how many tokens has each? And three tokens?");
    for (int ranks = 1; ranks <= 8; ++ranks) {
      for (Index tokens = 0; tokens <= 41; ++tokens) {
        const Zigzag zigzag{tokens, ranks};
        const std::string which = std::to_string(tokens) + " tokens on " + std::to_string(ranks) + " ranks";
        const Index want_rows = rows_in_chunk(tokens, ranks);
        const Index rows = chunk_rows(zigzag);
        if (!expect(rows == want_rows, "chunk_rows",
                    which + ": got " + std::to_string(rows) + ", want " + std::to_string(want_rows))) {
          return;
        }
        for (Index chunk = 0; chunk < 2 * ranks; ++chunk) {
          const Index want = std::clamp<Index>(tokens - chunk * rows, 0, rows);
          const Index got = chunk_tokens(zigzag, chunk);
          if (!expect(got == want, "chunk_tokens",
                      "of chunk " + std::to_string(chunk) + ", " + which + ": got " + std::to_string(got) + ", want " +
                          std::to_string(want))) {
            return;
          }
        }
      }
    }
  }

  TEST_CASE("a chunk of keys is in the past or the present or the future of a chunk of queries") {
    ask("Take chunks of three tokens and draw the nine pairs of each. When are all of them allowed, when none?");
    for (const bool causal : {false, true}) {
      for (Index q = 0; q < 16; ++q) {
        for (Index k = 0; k < 16; ++k) {
          int allowed = 0;
          for (Index i = 3 * q; i < 3 * q + 3; ++i)
            for (Index j = 3 * k; j < 3 * k + 3; ++j) allowed += !causal || j <= i ? 1 : 0;
          const Pairs want = allowed == 9 ? Pairs::all : allowed == 0 ? Pairs::none : Pairs::causal;
          const Pairs got = pairs_of(q, k, causal);
          if (!expect(got == want, "pairs",
                      "of query chunk " + std::to_string(q) + " and key chunk " + std::to_string(k) +
                          (causal ? ", causal" : "") + ": got " + name_of(got) + ", want " + name_of(want))) {
            return;
          }
        }
      }
    }
  }

  TEST_CASE("every rank computes as many pairs as every other") {
    ask("Count the pairs of rank 0 and of the last rank. Which chunk of each has few, and which has many?");
    for (int ranks = 1; ranks <= 8; ++ranks) {
      const Zigzag zigzag{6 * ranks, ranks};  // chunks of 3
      const Index want = (6 * ranks) * (6 * ranks + 1) / 2 / ranks;
      for (int rank = 0; rank < ranks; ++rank) {
        Index count = 0;
        for (const Index q : chunks_of(zigzag, rank)) {
          for (Index k = 0; k < 2 * ranks; ++k) {
            const Index n = chunk_tokens(zigzag, q), m = chunk_tokens(zigzag, k);
            const Pairs pairs = pairs_of(q, k, true);
            count += pairs == Pairs::all ? n * m : pairs == Pairs::causal ? n * (n + 1) / 2 : 0;
          }
        }
        if (!expect(count == want, "pairs",
                    "rank " + std::to_string(rank) + " of " + std::to_string(ranks) + " computes " +
                        std::to_string(count) + ", want " + std::to_string(want))) {
          return;
        }
      }
    }
  }

  TEST_CASE("split gives every rank its tokens and zeros behind the last one") {
    ask("Each number says which token it is. Read what rank 1 got: which token stands in the row that is off?");
    for (const int ranks : {1, 2, 3, 4, 8}) {
      for (const Index tokens : {24, 23, 5, 1, 0}) {
        const Tensor<float, 4> whole = places(2, 3, tokens, 2);
        const Apart apart(whole);
        for (int rank = 0; rank < ranks; ++rank) {
          const std::string why = "from rank " + std::to_string(rank) + " of " + std::to_string(ranks) + "'s part of " +
                                  std::to_string(tokens) + " tokens";
          const Array want = split_of(whole, rank, ranks);
          if (!expect_same_bits("split", to_array(zigzag_split(whole, rank, ranks)), want, ROWS, why)) return;
          if (!expect_same_bits("split", to_array(zigzag_split(apart.view, rank, ranks)), want, ROWS,
                                why + " when rows and channels lay apart")) {
            return;
          }
        }
      }
    }
  }

  TEST_CASE("merge puts every token back and leaves padding out") {
    ask("Row 0 of rank 1 on four ranks: which token is it? And the first row of its second half?");
    for (const int ranks : {1, 2, 3, 4, 8}) {
      for (const Index tokens : {24, 23, 5, 1, 0}) {
        const Tensor<float, 4> whole = places(2, 3, tokens, 2);
        const std::vector<Tensor<float, 4>> parts = parts_with_nan(whole, ranks);
        const std::string why = "from the " + std::to_string(tokens) + " tokens that " + std::to_string(ranks) +
                                (ranks == 1 ? " rank has" : " ranks have");
        const Array want = to_array(whole);
        if (!expect_same_bits("merge", to_array(zigzag_merge(views_of(parts), tokens)), want, ROWS, why)) return;
        std::vector<Apart> apart;
        apart.reserve(parts.size());
        std::vector<View<const float, 4>> views;
        for (const Tensor<float, 4>& part : parts) views.emplace_back(apart.emplace_back(part.view(), 7.0f).view);
        if (!expect_same_bits("merge", to_array(zigzag_merge(views, tokens)), want, ROWS,
                              why + " when rows and channels lay apart")) {
          return;
        }
      }
    }
  }

  TEST_CASE("alone in the world all four functions are attention and its gradients") {
    ask("One rank has both chunks. What is left to be exchanged, and which pairs of its chunks are to be computed?");
    for (const Form& form : FORMS) {
      for (const bool backward : {false, true}) judge_all(1, form.name, backward);
    }
  }

  TEST_CASE("gather forward on three ranks agrees with one device") {
    ask("Print what rank 1 has gathered, with values that say which token they are. Is it in the order of the "
        "sequence, "
        "and where does the slice of each of its two chunks end?");
    judge_all(3, "gather", false);
  }

  TEST_CASE("gather backward on three ranks agrees with one device") {
    ask("Which ranks have something to say about key 0? How do their sums come together, and in which order of "
        "tokens?");
    judge_all(3, "gather", true);
  }

  TEST_CASE("ring forward on three ranks agrees with one device") {
    ask("At each hop, whose keys does rank 1 hold? Which pairs of its chunks with theirs are past, present and "
        "future?");
    judge_all(3, "ring", false);
  }

  TEST_CASE("ring backward on three ranks agrees with one device") {
    ask("After the last hop, whose keys does a rank hold? Where, then, are the gradients of its own?");
    judge_all(3, "ring", true);
  }

  TEST_CASE("a rank sends what the formula says and no more") {
    ask("Of K and V a rank has 2C rows for each key/value head. How many times does it send as much as that?");
    if (!wanted([](const Problem& p) { return p.ranks == 3; })) return;
    const RanksOutcome* outcome = outcome_on(3);
    if (outcome == nullptr) return;
    for (const Form& form : FORMS) {
      for (const bool backward : {false, true}) {
        for (const Problem& p : problems()) {
          if (p.ranks != 3) continue;
          run_case(p.problem.number, p.text(), [&] {
            if (!complete(p.problem.number, *outcome, form.name, backward)) {
              finding("ranks", outcome->failure);
              return;
            }
            const bool ring = form.name == std::string("ring");
            const Index times[] = {ring ? (backward ? 5 : 2) : 0, ring ? 0 : 1, ring || !backward ? 0 : 1, 0};
            const char* const calls[] = {"shift", "all_gather", "reduce_scatter", "all_reduce"};
            for (std::size_t rank = 0; rank < 3; ++rank) {
              const Array& bytes = outcome->ranks[rank].arrays.at(key(p.problem.number, form.name, backward, "bytes"));
              for (std::size_t kind = 0; kind < 4; ++kind) {
                const Index allowed = times[kind] * 4 * p.floats();
                if (bytes.values[kind] <= static_cast<double>(allowed)) continue;
                finding("bytes", std::string(form.name) + (backward ? " backward" : " forward") + ": rank " +
                                     std::to_string(rank) + " gave " +
                                     std::to_string(std::llround(bytes.values[kind])) + " bytes to " + calls[kind] +
                                     "(), want at most " + std::to_string(allowed) + " = " +
                                     std::to_string(times[kind]) + " x " + std::to_string(4 * p.floats()));
                return;
              }
            }
          });
        }
      }
    }
  }

  TEST_CASE("a ring computes while the next keys are on their way") {
    ask("When does your exchange begin, when do you wait for it, and what do you compute in between?");
    if (!wanted([](const Problem& p) { return p.probe == Problem::Probe::overlap; })) return;
    const RanksOutcome* outcome = outcome_on(3);
    if (outcome == nullptr) return;
    const Problem& p = problem_of(12);
    run_case(12, p.text(), [&] {
      for (const bool backward : {false, true}) {
        if (!complete(p.problem.number, *outcome, "ring", backward)) {
          finding("ranks", outcome->failure);
          return;
        }
        for (std::size_t rank = 0; rank < 3; ++rank) {
          const double share = outcome->ranks[rank].arrays.at(key(12, "ring", backward, "overlap")).values[0];
          // Of three hops the first two can overlap with an exchange of keys.
          if (share >= 0.4) continue;
          finding("overlap", std::string(backward ? "backward" : "forward") + ", rank " + std::to_string(rank) +
                                 ": an exchange was under way during " + std::to_string(std::lround(100 * share)) +
                                 "% of the work, want 40% or more");
          return;
        }
      }
    });
  }

  TEST_CASE("both forms on two ranks") {
    ask("It is right for three ranks. What is different when next and previous are the same rank?");
    for (const Form& form : FORMS) {
      for (const bool backward : {false, true}) judge_all(2, form.name, backward);
    }
  }

  TEST_CASE("both forms on four ranks") {
    ask("It is right for three ranks. Which of your numbers is 3, and which is W?");
    for (const Form& form : FORMS) {
      for (const bool backward : {false, true}) judge_all(4, form.name, backward);
    }
  }

  TEST_CASE("both forms on eight ranks") {
    ask("It is right for three ranks. Which of your numbers is 3, and which is W?");
    for (const Form& form : FORMS) {
      for (const bool backward : {false, true}) judge_all(8, form.name, backward);
    }
  }

  TEST_CASE("a ring never holds the whole sequence") {
    ask("How many ranks' keys and values do you hold at once, and does that number grow with W?");
    if (!wanted([](const Problem& p) { return p.probe == Problem::Probe::memory; })) return;
    const RanksOutcome* outcome = outcome_on(8);
    if (outcome == nullptr) return;
    const Problem& p = problem_of(19);
    run_case(19, p.text(), [&] {
      for (const bool backward : {false, true}) {
        if (!complete(p.problem.number, *outcome, "ring", backward)) {
          finding("ranks", outcome->failure);
          return;
        }
        const double unit = 4.0 * static_cast<double>(p.floats());
        const double peak = outcome->ranks[0].arrays.at(key(19, "ring", backward, "memory")).values[0] / unit;
        const double allowed = backward ? 10.0 : 5.5;
        std::ostringstream text;
        text.precision(3);
        text << (backward ? "backward" : "forward") << ": at once " << peak
             << " times what a rank has of K and V, want "
             << "at most " << allowed << "; all ranks together have 8 times that";
        if (!expect(peak <= allowed, "memory", text.str())) return;
      }
    });
  }

  TEST_CASE("says what is wrong with bad arguments") {
    const Zigzag zigzag{12, 3};
    chunk_rows(zigzag);  // this is right
    const Tensor<float, 4> x = places(2, 4, 6, 3);
    Counting alone;
    const Tensor<float, 4> keys = places(2, 2, 6, 3), values = places(2, 2, 6, 5);
    const Tensor<float, 4> d_output = places(2, 4, 6, 5);
    const auto good = [&] { return LocalAttention{x, keys, values, 6, true, {}}; };
    const TiledResult result = gather_attention(good(), alone);  // these are right
    ring_attention_backward(good(), result.output, result.lse, d_output, alone);
    expect_rejected("a negative length", "tokens", [] { chunk_rows({-1, 2}); });
    expect_rejected("no rank", "ranks", [] { chunk_rows({5, 0}); });
    expect_rejected("a chunk too many", "chunk", [&] { chunk_tokens(zigzag, 6); });
    expect_rejected("a rank too many", "rank", [&] { chunks_of(zigzag, 3); });
    expect_rejected("a negative chunk", "chunk", [&] { owner_of(zigzag, -1); });
    expect_rejected("a negative rank", "rank", [&] { zigzag_split(x, -1, 2); });
    const std::vector<View<const float, 4>> short_parts{x, values};
    expect_rejected("parts of two shapes", "parts", [&] { zigzag_merge(short_parts, 12); });
    expect_rejected("no parts", "parts", [] { zigzag_merge({}, 12); });
    const Tensor<float, 4> three = places(2, 3, 6, 3), wide = places(2, 2, 6, 4), longer = places(2, 2, 8, 3);
    for (const Form& form : FORMS) {
      const int before = alone.calls;
      const auto reject = [&](const char* what, const char* argument, const LocalAttention& local) {
        expect_rejected(what, argument, [&] { form.forward(local, alone); });
        expect_rejected(what, argument, [&] { form.backward(local, result.output, result.lse, d_output, alone); });
      };
      reject("rows for another length", "query", {x, keys, values, 8, true, {}});
      reject("heads that cannot be shared", "key", {x, three, three, 6, true, {}});
      reject("keys of another width", "key", {x, wide, values, 6, true, {}});
      reject("more values than keys", "value", {x, keys, longer, 6, true, {}});
      reject("a scale that is NaN", "scale", {x, keys, values, 6, true, NOT_A_NUMBER});
      expect_rejected("an output of another width", "output",
                      [&] { form.backward(good(), x, result.lse, d_output, alone); });
      expect_rejected("a gradient of another width", "d_output",
                      [&] { form.backward(good(), result.output, result.lse, x, alone); });
      const Tensor<float, 3> few({2, 4, 5});
      expect_rejected("an lse too short", "lse", [&] { form.backward(good(), result.output, few, d_output, alone); });
      expect(alone.calls == before, "communicator",
             std::string(form.name) +
                 ": something was sent before the arguments were refused, and the others wait for "
                 "the rest");
    }
  }
}
