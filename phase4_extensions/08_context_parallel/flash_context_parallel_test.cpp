// Both forms between ranks that have a GPU each: virtual ones, joined by MPI, or real ones, joined by NCCL.
#include "flash_context_parallel.hpp"

#include <sstream>

#include "common/distributed/devices.hpp"
#include "common/testing/options.hpp"
#include "phase4_extensions/kernel_suite.hpp"
#include "ranks_suite.hpp"

using namespace flashkata;
using namespace flashkata::testing;

namespace {

constexpr double MINUS_INFINITY = -std::numeric_limits<double>::infinity();

// ---- Problems -------------------------------------------------------------------------------------------------------

struct Problem {
  int number, ranks;
  const char* why;
  Index tokens;
  bool causal = false;
  Index heads = 1, kv_heads = 1;
  enum class Kind { random, coded, steep, cancelling } kind = Kind::random;
  bool in_bf16 = false;
  bool apart = false;  // the rows lie apart in memory
  std::optional<float> scale = {};
  Index width = 64;
  Index poisoned = -1;  // the key and the value of this token hold NaN
  enum class Probe { numbers, twice, overlap, memory } probe = Probe::numbers;

  Dealt dealt() const { return {number, ranks, 1, tokens}; }
  Index rows() const { return dealt().rows(); }
  // Bytes of K and V, and of Q, that a rank has.
  Index key_bytes() const { return 2 * kv_heads * rows() * width * 2; }
  Index query_bytes() const { return heads * rows() * width * 2; }
  std::string text() const {
    return why + std::string(": W=") + std::to_string(ranks) + " S=" + std::to_string(tokens) +
           " H=" + std::to_string(heads) + " Hk=" + std::to_string(kv_heads) + " D=" + std::to_string(width) +
           (causal ? ", causal, " : ", ") + (in_bf16 ? "bf16" : "fp16");
  }
};

// Their numbers never change: new ones go to the end of their ranks.
const std::vector<Problem>& problems() {
  using Kind = Problem::Kind;
  using Probe = Problem::Probe;
  static const std::vector<Problem> list = {
      {.number = 101, .ranks = 3, .why = "two tokens a chunk", .tokens = 12, .causal = true},
      {.number = 102,
       .ranks = 3,
       .why = "values say where they stood",
       .tokens = 18,
       .causal = true,
       .kind = Kind::coded},
      {.number = 103,
       .ranks = 3,
       .why = "four heads share two, rows apart",
       .tokens = 30,
       .causal = true,
       .heads = 4,
       .kv_heads = 2,
       .in_bf16 = true,
       .apart = true,
       .probe = Probe::twice},
      {.number = 104, .ranks = 3, .why = "the last chunk has one token", .tokens = 31, .causal = true},
      {.number = 105,
       .ranks = 3,
       .why = "the last chunk is empty, three heads share one",
       .tokens = 25,
       .heads = 3,
       .in_bf16 = true},
      {.number = 106, .ranks = 3, .why = "fewer tokens than chunks", .tokens = 4, .causal = true},
      {.number = 107, .ranks = 3, .why = "a scale, rows apart", .tokens = 18, .apart = true, .scale = 0.3f},
      {.number = 108, .ranks = 3, .why = "scores falling by 300", .tokens = 24, .causal = true, .kind = Kind::steep},
      {.number = 109,
       .ranks = 3,
       .why = "a token of the middle holds NaN",
       .tokens = 24,
       .causal = true,
       .poisoned = 10},
      {.number = 110, .ranks = 3, .why = "long enough to look at the clock", .tokens = 48, .probe = Probe::overlap},
      {.number = 111,
       .ranks = 3,
       .why = "ten heads share five, rows apart, 128 channels",
       .tokens = 20,
       .causal = true,
       .heads = 10,
       .kv_heads = 5,
       .apart = true,
       .width = 128},
      {.number = 121,
       .ranks = 2,
       .why = "two ranks, ragged, two heads share one",
       .tokens = 13,
       .causal = true,
       .heads = 2},
      {.number = 122, .ranks = 2, .why = "two ranks, every query sees every key", .tokens = 16, .in_bf16 = true},
      {.number = 131,
       .ranks = 4,
       .why = "four ranks, four heads share two",
       .tokens = 40,
       .causal = true,
       .heads = 4,
       .kv_heads = 2,
       .in_bf16 = true},
      {.number = 132, .ranks = 4, .why = "four ranks, ragged", .tokens = 29},
      {.number = 133, .ranks = 4, .why = "four ranks, one token", .tokens = 1, .causal = true},
      {.number = 134,
       .ranks = 4,
       .why = "four ranks, numbers that cancel",
       .tokens = 64,
       .kind = Kind::cancelling,
       .probe = Probe::memory},
      {.number = 141, .ranks = 1, .why = "alone, two heads share one", .tokens = 9, .causal = true, .heads = 2},
      {.number = 142, .ranks = 1, .why = "alone, ragged", .tokens = 7, .in_bf16 = true},
      {.number = 143, .ranks = 1, .why = "alone, 128 channels", .tokens = 6, .causal = true, .width = 128},
      {.number = 144, .ranks = 1, .why = "alone, several tiles", .tokens = 300, .probe = Probe::twice},
  };
  return list;
}

const Problem& problem_of(int number) {
  return *std::find_if(problems().begin(), problems().end(), [&](const Problem& p) { return p.number == number; });
}

// The whole sequence, on one device.
template <typename T>
Inputs whole_of(const Problem& p) {
  const auto seed = static_cast<unsigned>(4 * p.number);
  const Sizes sizes{1, p.heads, p.kv_heads, p.tokens, p.tokens, p.width};
  const auto middle = static_cast<double>(p.tokens - 1) / 2.0;
  switch (p.kind) {
    case Problem::Kind::coded:  // all scores are 0, and the value of a token is its place, in units of its own
      return filled_inputs<T>(
          sizes, noise(seed), everywhere(0.0),
          [](Index, Index, Index s, Index d) { return static_cast<double>((s + 1) * (d % 8 + 1)); }, noise(seed + 3));
    case Problem::Kind::steep:  // from 150 to -150
      return filled_inputs<T>(
          sizes, [](Index, Index, Index, Index d) { return d == 0 ? 8.0 : 0.0; },
          [=](Index, Index, Index s, Index d) {
            return d == 0 ? 150.0 * (middle - static_cast<double>(s)) / middle : 0.0;
          },
          noise(seed + 2), noise(seed + 3));
    case Problem::Kind::cancelling: {
      // All scores are 0 and all weights 1/64, exactly. The four ranks, of 16 tokens each, say 2048, 1, -2048 and 0 of
      // one sum: the output's (channels 0 to 31), dV's (32 to 62) and, through channel 63, dQ's. 16 bits would lose
      // the 1.
      const auto says = [p](Index token) {
        const double words[] = {2048.0, 1.0, -2048.0, 0.0};
        return words[place_of(token, p.tokens, p.ranks).rank];
      };
      const auto sign = [](Index token) { return token % 2 == 0 ? 1.0 : -1.0; };
      return filled_inputs<T>(
          sizes, everywhere(0.0), [=](Index, Index, Index s, Index) { return sign(s) * says(s) / 2.0; },
          [=](Index, Index, Index s, Index d) { return d < 32    ? says(s)
                                                       : d == 63 ? sign(s)
                                                                 : 0.0; },
          [=](Index, Index, Index s, Index d) { return d < 32    ? 0.0
                                                       : d == 63 ? 64.0
                                                                 : 4.0 * says(s); });
    }
    default:
      return filled_inputs<T>(sizes, noise(seed), noise(seed + 1), noise(seed + 2), noise(seed + 3));
  }
}

// The reference's answer is the same for both forms.
template <typename T>
const ExpectedBackward<T>& expected_of(const Problem& p) {
  static std::map<int, std::unique_ptr<ExpectedBackward<T>>> answers;
  auto& answer = answers[p.number];
  if (!answer) {
    answer = std::make_unique<ExpectedBackward<T>>(
        expected_backward<T>(whole_of<T>(p), {.causal = p.causal, .scale = p.scale}));
  }
  return *answer;
}

// Calls body(fp16{}) or body(bf16{}).
template <typename Body>
auto in_type_of(const Problem& p, const Body& body) {
  return p.in_bf16 ? body(bf16{}) : body(fp16{});
}

// ---- What a rank is given -------------------------------------------------------------------------------------------

// A rank's rows of the whole [1, H, S, ...], NaN in what is padding.
template <typename Element>
Tensor<float, 4> local_of(const Dealt& dealt, int rank, Index heads, Index width, const Element& element) {
  Tensor<float, 4> local({1, heads, dealt.rows(), width});
  for (Index h = 0; h < heads; ++h)
    for (Index row = 0; row < dealt.rows(); ++row) {
      const Index token = dealt.token_at(rank, row);
      for (Index d = 0; d < width; ++d) {
        local(0, h, row, d) = token < 0 ? NOT_A_NUMBER : static_cast<float>(element(h, token, d));
      }
    }
  return local;
}

Tensor<float, 4> local_of(const Dealt& dealt, int rank, const Tensor<float, 4>& whole) {
  return local_of(dealt, rank, whole.size(1), whole.size(3),
                  [&](Index h, Index token, Index d) { return whole(0, h, token, d); });
}

Tensor<float, 4> local_of(const Dealt& dealt, int rank, const Array& whole) {
  const Index width = whole.shape.size() > 3 ? whole.shape[3] : 1;
  return local_of(dealt, rank, whole.shape[1], width, [&](Index h, Index token, Index d) {
    return whole.values[static_cast<std::size_t>((h * dealt.tokens + token) * width + d)];
  });
}

// The arguments of one rank, in memory with something around it; NaN in what is to be written.
template <typename T>
struct Given {
  Index tokens;
  bool causal;
  std::optional<float> scale;
  Shape<4> rows, key_rows, one_each;
  Layouts layouts;
  DeviceTensor<T> q, k, v, o, d_o;
  DeviceTensor<float> l;

  Given(const Dealt& dealt, int rank, const Inputs& whole, const ForwardResult& forward, bool causal_,
        std::optional<float> scale_, const Layouts& layouts_)
      : tokens(dealt.tokens),
        causal(causal_),
        scale(scale_),
        rows{1, whole.query.size(1), dealt.rows(), whole.query.size(3)},
        key_rows{1, whole.key.size(1), dealt.rows(), whole.query.size(3)},
        one_each{1, rows[1], rows[2], 1},
        layouts(layouts_),
        q(DeviceTensor<T>::input("query", local_of(dealt, rank, whole.query), layouts.query)),
        k(DeviceTensor<T>::input("key", local_of(dealt, rank, whole.key), layouts.key)),
        v(DeviceTensor<T>::input("value", local_of(dealt, rank, whole.value), layouts.value)),
        o(DeviceTensor<T>::input("output", local_of(dealt, rank, forward.output), layouts.output)),
        d_o(DeviceTensor<T>::input("d_output", local_of(dealt, rank, whole.d_output), layouts.query)),
        l(DeviceTensor<float>::input("lse", local_of(dealt, rank, forward.lse), lse_layout())) {}

  Layout lse_layout() const { return layouts.query == Layouts{}.query ? Layout::heads : Layout::tokens; }

  // Calls launch(FlashForward<T>, tokens), and returns output and lse.
  template <typename Launch>
  std::vector<Array> forward(const Launch& launch) {
    auto output = DeviceTensor<T>::output("output", rows, layouts.output);
    auto lse = DeviceTensor<float>::output("lse", one_each, lse_layout());
    launch(FlashForward<T>{.query = q.view(),
                           .key = k.view(),
                           .value = v.view(),
                           .output = output.view(),
                           .lse = lse.rows(),
                           .causal = causal,
                           .scale = scale});
    std::vector<Array> answer{output.values(true), lse.values(true)};
    answer[1].shape.pop_back();
    for (const DeviceTensor<T>* input : {&q, &k, &v}) input->expect_unchanged();
    return answer;
  }

  // The gradients of query, key and value.
  template <typename Launch>
  std::vector<Array> backward(const Launch& launch) {
    auto d_q = DeviceTensor<T>::output("d_query", rows, layouts.value);
    auto d_k = DeviceTensor<T>::output("d_key", key_rows, layouts.output);
    auto d_v = DeviceTensor<T>::output("d_value", key_rows, layouts.query);
    auto delta = DeviceTensor<float>::output("delta", one_each, Layout::heads);
    auto sums = DeviceTensor<float>::output("d_query_sum", rows, Layout::heads);
    launch(FlashBackward<T>{.query = q.view(),
                            .key = k.view(),
                            .value = v.view(),
                            .output = o.view(),
                            .lse = l.rows(),
                            .d_output = d_o.view(),
                            .d_query = d_q.view(),
                            .d_key = d_k.view(),
                            .d_value = d_v.view(),
                            .delta = delta.rows(),
                            .d_query_sum = sums.view(),
                            .causal = causal,
                            .scale = scale,
                            .deterministic = true});
    delta.values(true);
    sums.values(true);
    for (const DeviceTensor<T>* input : {&q, &k, &v, &o, &d_o}) input->expect_unchanged();
    l.expect_unchanged();
    return {d_q.values(true), d_k.values(true), d_v.values(true)};
  }
};

template <typename T>
struct Form {
  const char* name;
  void (*forward)(const FlashForward<T>&, Index, Communicator&);
  void (*backward)(const FlashBackward<T>&, Index, Communicator&);

  // Output and lse, or the gradients.
  std::vector<Array> answer(bool to_go_back, Given<T>& given, Communicator& communicator) const {
    if (to_go_back) {
      return given.backward(
          [&](const auto& local) { run_kernels([&] { backward(local, given.tokens, communicator); }); });
    }
    return given.forward([&](const auto& local) { run_kernels([&] { forward(local, given.tokens, communicator); }); });
  }
};

constexpr const char* FORMS[] = {"gather", "ring"};

template <typename T>
Form<T> form_of(const std::string& name) {
  return name == "gather" ? Form<T>{"gather", flash_gather_attention, flash_gather_attention_backward}
                          : Form<T>{"ring", flash_ring_attention, flash_ring_attention_backward};
}

// ---- What every rank does -------------------------------------------------------------------------------------------

bool alike(const std::vector<Array>& one, const std::vector<Array>& other) {
  for (std::size_t i = 0; i < one.size(); ++i) {
    if (one[i].shape != other[i].shape || first_difference(one[i], other[i]) != npos) return false;
  }
  return true;
}

// Bytes of the GPU's memory that the call takes beyond its arguments, at most.
template <typename T>
double memory_of(const Form<T>& form, bool backward, Given<T>& given, Communicator& devices) {
  double most = 0.0;
  const auto measure = [&](const auto& call) {
    const std::size_t before = device_bytes();
    reset_peak_device_bytes();
    call();
    most = static_cast<double>(peak_device_bytes() - before);
  };
  if (backward) {
    given.backward([&](const auto& local) { measure([&] { form.backward(local, given.tokens, devices); }); });
  } else {
    given.forward([&](const auto& local) { measure([&] { form.forward(local, given.tokens, devices); }); });
  }
  return most;
}

// False if there is nothing more to be done: what is not implemented yet was in the middle of an exchange.
template <typename T>
bool call(const Problem& p, const Form<T>& form, bool backward, Given<T>& given, Communicator& devices,
          Communicator& hosts, RankReport& report) {
  report.doing = "case " + std::to_string(p.number) + ", " + form.name + (backward ? " backward" : " forward");
  KeepFindings kept;
  Watched<OnTheGpu> watched(devices);
  const auto name = [&](const std::string& what) { return key(p.number, form.name, backward, what); };
  try {
    if (p.probe == Problem::Probe::memory) {
      report.arrays[name("memory")] = {{1}, {memory_of(form, backward, given, devices)}};
    }
    const std::vector<Array> answer = form.answer(backward, given, watched);
    if (p.probe == Problem::Probe::overlap) report.arrays[name("overlap")] = {{1}, {watched.overlap()}};
    if (watched.under_way != 0) finding("communicator", "an exchange was begun and never waited for");
    for (const std::string& sentence : watched.findings) finding("communicator", sentence);
    for (std::size_t i = 0; i < answer.size(); ++i) report.arrays[name(names_of(backward)[i])] = answer[i];
    report.arrays[name("bytes")] = watched.bytes();
    if (p.probe == Problem::Probe::twice) {
      const AnotherOrder order(7);
      expect(alike(answer, form.answer(backward, given, watched)), "communicator",
             "a second call gave other bits, when the threads of the GPU ran in another order");
    }
    for (const auto& [what, sentence] : kept.found) report.findings.emplace_back(name(""), what + ": " + sentence);
    report.doing += ", at its end";
    hosts.barrier();  // whoever has left too early shall not meet others in another case
  } catch (const NotImplemented& error) {
    report.missing[name("")] = error.file();
    return !watched.used;
  }
  return true;
}

template <typename T>
Given<T> given_of(const Problem& p, int rank) {
  Inputs whole = whole_of<T>(p);
  static std::map<int, ForwardResult> answers;  // of the reference, for the way back
  const auto [answer, is_new] = answers.try_emplace(p.number);
  if (is_new) answer->second = forward_result(whole, {.causal = p.causal, .scale = p.scale});
  if (p.poisoned >= 0) {
    for (Index d = 0; d < p.width; ++d) {
      whole.key(0, 0, p.poisoned, d) = NOT_A_NUMBER;
      whole.value(0, 0, p.poisoned, d) = NOT_A_NUMBER;
    }
  }
  return {p.dealt(), rank, whole, answer->second, p.causal, p.scale, p.apart ? MIXED : Layouts{}};
}

void numbered_cases(Communicator& devices, Communicator& hosts, RankReport& report) {
  for (const char* const name : FORMS) {
    for (const bool backward : {false, true}) {
      report.doing = name + std::string(backward ? " backward" : " forward");
      report.save();
      for (const Problem& p : problems()) {
        if (p.ranks != devices.size()) continue;
        if (kernels_are_checked() && p.probe == Problem::Probe::overlap) continue;  // watching takes time
        const bool goes_on = in_type_of(p, [&](auto zero) {
          using T = decltype(zero);
          Given<T> given = given_of<T>(p, devices.rank());
          return call(p, form_of<T>(name), backward, given, devices, hosts, report);
        });
        if (!goes_on) return;
      }
    }
  }
}

// ---- Long sequences, on real GPUs -----------------------------------------------------------------------------------

const std::string LONG = ON_GPUS + " long";

// How far a rank's rows are from those that one GPU computes, in roundings of T: of all, and of the worst row. A row's
// error is measured against its own size and that of a typical row.
template <typename T>
Array distance(const Dealt& dealt, int rank, const Array& local, const Array& whole) {
  const Index width = whole.shape[3], heads = whole.shape[1];
  double typical = 0.0;
  for (const double number : whole.values) typical += number * number;
  typical /= static_cast<double>(heads * dealt.tokens);
  double squares = 0.0, all = 0.0, worst = 0.0;
  for (Index h = 0; h < heads; ++h)
    for (Index row = 0; row < dealt.rows(); ++row) {
      const Index token = dealt.token_at(rank, row);
      double error = 0.0, size = 0.0;
      for (Index d = 0; d < width; ++d) {
        const double got = local.values[static_cast<std::size_t>((h * dealt.rows() + row) * width + d)];
        const double want =
            token < 0 ? 0.0 : whole.values[static_cast<std::size_t>((h * dealt.tokens + token) * width + d)];
        error += (got - want) * (got - want);
        size += want * want;
      }
      const double share = error / (size + typical);
      if (!(share <= worst)) worst = share;
      squares += share;
      all += 1.0;
    }
  return {{2}, {std::sqrt(squares / all) / roundoff<T>(), std::sqrt(worst) / roundoff<T>()}};
}

constexpr Index LENGTHS[] = {4096, 8192, 16384};

void long_cases(Communicator& devices, Communicator& hosts, RankReport& report) {
  using T = bf16;
  constexpr Index HEADS = 4;  // which share one of keys
  for (const Index tokens : LENGTHS) {
    const Dealt dealt{static_cast<int>(tokens), devices.size(), 1, tokens};
    const Inputs whole = random_inputs<T>({1, HEADS, 1, tokens, tokens, 128}, static_cast<unsigned>(tokens));
    // One device, that is a group of one which holds all, and 4.05 in one group.
    const Dealt one_device{0, 1, 1, tokens};
    const ForwardResult nothing{
        {{1, HEADS, tokens, 128}, std::vector<double>(static_cast<std::size_t>(HEADS * tokens * 128))},
        {{1, HEADS, tokens}, std::vector<double>(static_cast<std::size_t>(HEADS * tokens))}};
    const std::vector<Group> group{{0, tokens, 0, tokens}};
    const std::vector<Array> forward =
        Given<T>(one_device, 0, whole, nothing, true, {}, {}).forward([&](const auto& p) {
          run_kernels([&] { flash_grouped_forward(p, group); });
        });
    const ForwardResult left{forward[0], forward[1]};
    const std::vector<Array> backward = Given<T>(one_device, 0, whole, left, true, {}, {}).backward([&](const auto& p) {
      run_kernels([&] { flash_grouped_backward(p, group); });
    });
    Given<T> given(dealt, devices.rank(), whole, left, true, {}, {});
    for (const char* const name : FORMS) {
      for (const bool back : {false, true}) {
        const Form<T> form = form_of<T>(name);
        report.doing = std::to_string(tokens) + " tokens, " + form.name + (back ? " backward" : " forward");
        report.save();
        KeepFindings kept;
        const auto called = [&](const std::string& what) { return key(dealt.number, form.name, back, what); };
        const std::vector<Array> answer = form.answer(back, given, devices);
        for (std::size_t i = 0; i < answer.size(); ++i) {
          if (answer[i].shape.size() < 4) continue;  // the lse is in every weight of the way back
          report.arrays[called(names_of(back)[i])] =
              distance<T>(dealt, devices.rank(), answer[i], back ? backward[i] : forward[i]);
        }
        report.arrays[called("bytes")] = {{1}, {0}};
        for (const auto& [what, sentence] : kept.found) {
          report.findings.emplace_back(called(""), what + ": " + sentence);
        }
        hosts.barrier();
      }
    }
  }
}

}  // namespace

void flashkata::testing::work_on_gpus(Communicator& hosts, RankReport& report) {
  const bool alone = hosts.size() == 1;
  const auto devices = alone ? one_device() : connect_devices(std::chrono::seconds(KATA_REAL_GPU ? 60 : 5));
  report.task == LONG ? long_cases(*devices, hosts, report) : numbered_cases(*devices, hosts, report);
}

// ---- Judgement ------------------------------------------------------------------------------------------------------

namespace {

// Only what does not see the token that holds NaN can be judged: the rest is taken for right.
void excuse(const Problem& p, Array& got, const Array& want, Index from) {
  if (p.poisoned < 0 || got.shape != want.shape) return;
  const std::size_t each = got.shape.size() > 3 ? static_cast<std::size_t>(got.shape[3]) : 1;  // one head
  for (std::size_t at = static_cast<std::size_t>(from) * each; at < got.count(); ++at) got.values[at] = want.values[at];
}

template <typename T>
bool judge_numbers(const Problem& p, const RanksOutcome& outcome, const std::string& form, bool backward) {
  std::string wrong_padding;
  const auto all_of = [&](const char* name, Index heads, Index width, double padding) {
    Together all = together(p.dealt(), outcome, key(p.number, form, backward, name), heads, width, padding);
    if (!all.wrong_padding.empty() && wrong_padding.empty())
      wrong_padding = std::string(name) + ", " + all.wrong_padding;
    return all.array;
  };
  bool right = false;
  if (backward) {
    const Judgement<T>& want = expected_of<T>(p).gradients;
    Gradients got{all_of("d_query", p.heads, p.width, 0.0),
                  all_of("d_key", p.kv_heads, p.width, 0.0),
                  all_of("d_value", p.kv_heads, p.width, 0.0),
                  {}};
    excuse(p, got.query, want.want.query, p.poisoned);
    excuse(p, got.key, want.want.key, 0);  // later queries see it, and it them
    excuse(p, got.value, want.want.value, 0);
    right = expect_gradients<T>(got, want);
  } else {
    const ExpectedForward want = expected_forward<T>(whole_of<T>(p), {.causal = p.causal, .scale = p.scale});
    ForwardAnswer got{all_of("output", p.heads, p.width, 0.0), all_of("lse", p.heads, 0, MINUS_INFINITY), {}};
    excuse(p, got.output, want.exact.output, p.poisoned);
    excuse(p, got.lse, want.exact.lse, p.poisoned);
    right = expect_forward<T>(got, want);
  }
  return right && expect(wrong_padding.empty(), "padding", wrong_padding);
}

void judge(const Problem& p, const RanksOutcome& outcome, const std::string& form, bool backward) {
  if (!complete(p.number, outcome, form, backward)) {
    finding("ranks", outcome.failure,
            "Write down for each rank which calls of the communicator it makes, in order. Do all ranks make the same "
            "ones, also those that have nothing to compute?");
    return;
  }
  in_type_of(p, [&](auto zero) { judge_numbers<decltype(zero)>(p, outcome, form, backward); });
  expect_no_findings(p.number, outcome, form, backward);
}

const RanksOutcome* on_gpus(int ranks, const std::string& task = ON_GPUS) {
  return outcome_on(ranks, task, why_not_so_many_devices(ranks));
}

void judge_all(int ranks, const std::string& form, bool backward) {
  const RanksOutcome* outcome = nullptr;
  for (const Problem& p : problems()) {
    if (p.ranks != ranks) continue;
    if (only_case() != 0 && only_case() != p.number) continue;
    if (kernels_are_checked() && p.probe == Problem::Probe::overlap) continue;
    if (outcome == nullptr) outcome = on_gpus(ranks);
    if (outcome == nullptr) return;
    run_case(p.number, p.text(), [&] { judge(p, *outcome, form, backward); });
  }
}

void judge_all(int ranks) {
  for (const char* const form : FORMS) {
    for (const bool backward : {false, true}) judge_all(ranks, form, backward);
  }
}

// Whether --case asks for this one, or for none.
bool wanted(int number) { return only_case() == 0 || only_case() == number; }

void stress(int ranks) {
  const bool too_long =
      needs_a_gpu([] {  // a short one on the virtual GPU, so that nobody takes a stub for a skipped test
        const RanksOutcome& alone = on_ranks(1, ON_GPUS);
        return complete(141, alone, "gather", false) && complete(141, alone, "gather", true) &&
               complete(141, alone, "ring", false) && complete(141, alone, "ring", true);
      });
  if (too_long) return;
  const RanksOutcome* outcome = on_gpus(ranks, LONG);
  if (outcome == nullptr) return;
  for (const Index tokens : LENGTHS) {
    for (const char* const form : FORMS) {
      for (const bool backward : {false, true}) {
        const auto number = static_cast<int>(tokens);
        const std::string what = std::to_string(tokens) + " tokens, " + form + (backward ? " backward" : " forward");
        if (!complete(number, *outcome, form, backward)) {
          finding("ranks", outcome->failure);
          return;
        }
        if (!expect_no_findings(number, *outcome, form, backward)) return;
        std::ostringstream text;
        text.precision(2);
        text << what << ": errors against one GPU, in roundings of bf16 (root mean square of rows, worst row):";
        for (const std::string& name : names_of(backward)) {
          double rms = 0.0, worst = 0.0;
          if (name == "lse") continue;
          for (const RankReport& report : outcome->ranks) {
            const Array& one = report.arrays.at(key(number, form, backward, name));
            rms = std::isnan(one.values[0]) ? one.values[0] : std::max(rms, one.values[0]);
            worst = std::isnan(one.values[1]) ? one.values[1] : std::max(worst, one.values[1]);
          }
          text << ' ' << name << ' ' << rms << ", " << worst << ';';
          if (!(rms <= 4.0 && worst <= 16.0)) {
            finding(name, text.str() + " allowed are 4 and 16");
            return;
          }
        }
        figures(text.str());
      }
    }
  }
}

constexpr int LAST_RECOGNISED = 109;

}  // namespace

// ---- What is recognised: four answers on three ranks ----------------------------------------------------------------

std::vector<int> flashkata::testing::recognised_on_gpus() {
  std::vector<int> result;
  if (!why_not_so_many_devices(3).empty()) return result;
  for (int kind = 1; kind <= 4; ++kind) {
    for (int number = 101; number <= LAST_RECOGNISED; ++number) result.push_back(1000 * kind + number);
  }
  return result;
}

std::vector<Array> flashkata::testing::outputs_on_gpus(int number) {
  return outputs_on_ranks(ON_GPUS, number % 1000, FORMS[(number / 1000 - 1) / 2], (number / 1000 - 1) % 2 == 1);
}

TEST_SUITE("phase4.08_context_parallel") {
  TEST_CASE("gpu: alone in the world all four functions are attention and its gradients") {
    ask("One rank has both chunks. Which rows of its keys does each of them look at, and what is done about rows that "
        "are no token?");
    judge_all(1);
  }

  TEST_CASE("gpu: gather forward on three ranks agrees with one device") {
    ask("What all_gather() brings lies rank by rank. Which row of which rank is token t, and how many keys has the "
        "slice of each chunk?");
    judge_all(3, "gather", false);
  }

  TEST_CASE("gpu: gather backward on three ranks agrees with one device") {
    ask("Which ranks have something to say about key 0? In what kind of numbers are their words added up, and in which "
        "order of tokens are they sent?");
    judge_all(3, "gather", true);
  }

  TEST_CASE("gpu: ring forward on three ranks agrees with one device") {
    ask("At a hop after the first: which rows of the queries, which of the keys? And what does a hop leave behind of a "
        "row that sees none of its keys?");
    judge_all(3, "ring", false);
  }

  TEST_CASE("gpu: ring backward on three ranks agrees with one device") {
    ask("Each hop writes all of the gradients that it is given. Where do you keep those of the hop before, in what "
        "kind "
        "of numbers, and which of them are on their way?");
    judge_all(3, "ring", true);
  }

  TEST_CASE("gpu: a rank sends what the formula says and no more") {
    ask("Of K and V a rank has 2C rows for each key/value head, in 16 bits. How many times does it send as much?");
    if (only_case() != 0 && (only_case() < 101 || only_case() > 110)) return;
    const RanksOutcome* outcome = on_gpus(3);
    if (outcome == nullptr) return;
    for (const char* const form : FORMS) {
      for (const bool backward : {false, true}) {
        for (const Problem& p : problems()) {
          if (p.ranks != 3 || (kernels_are_checked() && p.probe == Problem::Probe::overlap)) continue;
          run_case(p.number, p.text(), [&] {
            if (!complete(p.number, *outcome, form, backward)) {
              finding("ranks", outcome->failure);
              return;
            }
            const bool ring = form == std::string("ring");
            // Of K and V at 2 bytes a number; sums of gradients have 4.
            const Index times[] = {ring ? (backward ? 2 + 3 * 2 : 2) : 0, ring ? 0 : 1, ring || !backward ? 0 : 2, 0};
            const char* const calls[] = {"shift", "all_gather", "reduce_scatter", "all_reduce"};
            for (std::size_t rank = 0; rank < 3; ++rank) {
              const Array& bytes = outcome->ranks[rank].arrays.at(key(p.number, form, backward, "bytes"));
              for (std::size_t kind = 0; kind < 4; ++kind) {
                const Index allowed = times[kind] * p.key_bytes();
                if (bytes.values[kind] <= static_cast<double>(allowed)) continue;
                finding("bytes", std::string(form) + (backward ? " backward" : " forward") + ": rank " +
                                     std::to_string(rank) + " gave " +
                                     std::to_string(std::llround(bytes.values[kind])) + " bytes to " + calls[kind] +
                                     "(), want at most " + std::to_string(allowed) + " = " +
                                     std::to_string(times[kind]) + " x " + std::to_string(p.key_bytes()));
                return;
              }
            }
          });
        }
      }
    }
  }

  TEST_CASE("gpu: a ring computes while the next keys are on their way") {
    ask("When does your exchange begin, when do you wait for it, and what have you launched in between?");
    if (!wanted(110) || kernels_are_checked()) return;
#if KATA_REAL_GPU
    skip("on real GPUs benchmarks/context_parallel measures it");
#else
    const RanksOutcome* outcome = on_gpus(3);
    if (outcome == nullptr) return;
    run_case(110, problem_of(110).text(), [&] {
      for (const bool backward : {false, true}) {
        if (!complete(110, *outcome, "ring", backward)) {
          finding("ranks", outcome->failure);
          return;
        }
        for (std::size_t rank = 0; rank < 3; ++rank) {
          const double share = outcome->ranks[rank].arrays.at(key(110, "ring", backward, "overlap")).values[0];
          // Of three hops the first two can overlap with an exchange of keys.
          if (share >= 0.4) continue;
          finding("overlap", std::string(backward ? "backward" : "forward") + ", rank " + std::to_string(rank) +
                                 ": an exchange was under way during " + std::to_string(std::lround(100 * share)) +
                                 "% of the work, want 40% or more");
          return;
        }
      }
    });
#endif
  }

  TEST_CASE("gpu: both forms on two ranks") {
    ask("It is right for three ranks. What is different when next and previous are the same rank?");
    if (!kernels_are_checked()) judge_all(2);
  }

  TEST_CASE("gpu: both forms on four ranks") {
    ask("It is right for three ranks. Which of your numbers is 3, and which is W?");
    if (!kernels_are_checked()) judge_all(4);
  }

  TEST_CASE("gpu: no more memory than the contract allows") {
    ask("Which buffers live at once, and which of them grow with W?");
    if (!wanted(134) || kernels_are_checked()) return;
    const RanksOutcome* outcome = on_gpus(4);
    if (outcome == nullptr) return;
    const Problem& p = problem_of(134);
    run_case(134, p.text(), [&] {
      for (const char* const form : FORMS) {
        for (const bool backward : {false, true}) {
          if (!complete(134, *outcome, form, backward)) {
            finding("ranks", outcome->failure);
            return;
          }
          const bool ring = form == std::string("ring");
          const Index of_keys = ring ? (backward ? 9 : 3) : (backward ? 6 * 4 + 3 : 2 * 4 + 2);
          const Index a_few_floats = 4 * 4 * p.heads * p.rows();
          const Index allowed = of_keys * p.key_bytes() + (ring ? 4 * p.query_bytes() : 0) + a_few_floats;
          const double got = outcome->ranks[0].arrays.at(key(134, form, backward, "memory")).values[0];
          if (!expect(got <= static_cast<double>(allowed), "memory",
                      std::string(form) + (backward ? " backward" : " forward") + ": " +
                          std::to_string(std::llround(got)) + " bytes beyond the arguments, want at most " +
                          std::to_string(allowed) + " = " + std::to_string(of_keys) + " L" + (ring ? " + 4 Q" : "") +
                          " and a few floats for each query")) {
            return;
          }
        }
      }
    });
  }

  TEST_CASE("gpu: says what is wrong with bad arguments") {
    const auto alone = one_device();
    const Problem& p = problem_of(141);
    using T = fp16;
    Given<T> given = given_of<T>(p, 0);
    for (const char* const name : FORMS) {
      const Form<T> form = form_of<T>(name);
      form.answer(false, given, *alone);  // these are right
      form.answer(true, given, *alone);
      // `spoil` gets the parts of a call that is right.
      const auto reject = [&](const char* what, const char* argument, Index tokens, const auto& spoil) {
        given.forward([&](FlashForward<T> local) {
          spoil(local);
          expect_rejected(what, argument, [&] { form.forward(local, tokens, *alone); });
        });
        given.backward([&](FlashBackward<T> local) {
          spoil(local);
          expect_rejected(what, argument, [&] { form.backward(local, tokens, *alone); });
        });
      };
      const auto with_rows = [](const auto& x, Index rows) {
        Shape<4> shape = x.shape();
        shape[2] = rows;
        return std::remove_cvref_t<decltype(x)>(x.data(), shape, x.strides());
      };
      reject("rows for another length", "query", p.tokens + 2, [](auto&) {});
      reject("a negative length", "tokens", -1, [](auto&) {});
      reject("keys for another length", "key", p.tokens, [&](auto& local) {
        local.key = with_rows(local.key, p.rows() - 2);
        local.value = with_rows(local.value, p.rows() - 2);
        if constexpr (requires { local.d_key; }) {
          local.d_key = with_rows(local.d_key, p.rows() - 2);
          local.d_value = with_rows(local.d_value, p.rows() - 2);
        }
      });
      reject("more values than keys", "value", p.tokens,
             [&](auto& local) { local.value = with_rows(local.value, p.rows() - 2); });
      reject("a scale that is NaN", "scale", p.tokens, [](auto& local) { local.scale = NOT_A_NUMBER; });
    }
  }

  TEST_CASE("stress: 4K to 16K tokens on one GPU") { stress(1); }
  TEST_CASE("stress: 4K to 16K tokens on two GPUs") { stress(2); }
  TEST_CASE("stress: 4K to 16K tokens on four GPUs") { stress(4); }
  TEST_CASE("stress: 4K to 16K tokens on eight GPUs") { stress(8); }
}
