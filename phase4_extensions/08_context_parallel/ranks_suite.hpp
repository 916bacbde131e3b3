// What the two halves of the suite share, ranks on the host and ranks that have a GPU each: where everything lies in
// the suite's own words, a communicator that looks on, and the reports of all ranks put together.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <ctime>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "common/distributed/communicator.hpp"
#include "common/gpu/gpu.hpp"
#include "common/testing/ranks.hpp"
#include "common/testing/suite.hpp"
#if !KATA_REAL_GPU
#include "common/virtual_gpu/device_memory.hpp"
#endif

namespace flashkata::testing {

// ---- The zigzag, in the suite's own words ---------------------------------------------------------------------------

struct Place {
  int rank;
  Index row;
};

inline Index rows_in_chunk(Index tokens, int ranks) { return (tokens + 2 * ranks - 1) / (2 * ranks); }

inline Place place_of(Index token, Index tokens, int ranks) {
  const Index rows = rows_in_chunk(tokens, ranks);
  const Index chunk = token / rows;
  return chunk < ranks ? Place{static_cast<int>(chunk), token % rows}
                       : Place{static_cast<int>(2 * ranks - 1 - chunk), rows + token % rows};
}

/// A numbered case of a suite, as it was dealt out.
struct Dealt {
  int number, ranks;
  Index batch, tokens;

  Index rows() const { return 2 * rows_in_chunk(tokens, ranks); }

  /// The token in this row of a rank, or -1.
  Index token_at(int rank, Index row) const {
    const Index half = rows() / 2;
    const Index chunk = row < half ? rank : 2 * ranks - 1 - rank;
    const Index token = chunk * half + row % half;
    return token < tokens ? token : -1;
  }
};

// ---- A communicator that looks on -----------------------------------------------------------------------------------

/// What a Watched keeps messages in, and how it counts work: in seconds of the processor.
struct OnTheHost {
  using Buffer = std::vector<std::byte>;
  static Buffer buffer(std::size_t bytes) { return Buffer(bytes); }
  static void copy(std::span<const std::byte> from, std::span<std::byte> to) {
    std::copy(from.begin(), from.end(), to.begin());
  }
  static void spoil(std::span<std::byte> memory) { std::fill(memory.begin(), memory.end(), std::byte{0xff}); }
  static bool same(std::span<const std::byte> one, std::span<const std::byte> other) {
    return std::memcmp(one.data(), other.data(), one.size()) == 0;
  }
  static double clock() {
    timespec time{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }
};

/// The same in a GPU's memory. A virtual GPU works on the processor's time.
struct OnTheGpu {
  using Buffer = DeviceBuffer<std::byte>;
  static Buffer buffer(std::size_t bytes) { return {"what is on its way", bytes}; }
#if KATA_REAL_GPU
  static void copy(std::span<const std::byte> from, std::span<std::byte> to) {
    gpu_detail::check(cudaMemcpy(to.data(), from.data(), from.size(), cudaMemcpyDeviceToDevice), "copying");
  }
  static void spoil(std::span<std::byte> memory) {
    gpu_detail::check(cudaMemset(memory.data(), 0xff, memory.size()), "filling");
  }
  static bool same(std::span<const std::byte> one, std::span<const std::byte> other) {
    const auto on_host = [](std::span<const std::byte> memory) {
      std::vector<std::byte> bytes(memory.size());
      gpu_detail::check(cudaMemcpy(bytes.data(), memory.data(), memory.size(), cudaMemcpyDeviceToHost), "copying");
      return bytes;
    };
    return on_host(one) == on_host(other);
  }
  static double clock() {
    synchronize();
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
#else
  static void copy(std::span<const std::byte> from, std::span<std::byte> to) {
    OnTheHost::copy(from, to);
    if (!to.empty()) virtual_gpu::mark_host_write(to.data(), to.size(), true);
  }
  static void spoil(std::span<std::byte> memory) {
    OnTheHost::spoil(memory);
    if (!memory.empty()) virtual_gpu::mark_host_write(memory.data(), memory.size(), false);
  }
  static bool same(std::span<const std::byte> one, std::span<const std::byte> other) {
    return OnTheHost::same(one, other);
  }
  static double clock() { return OnTheHost::clock(); }
#endif
};

/// Passes everything on. What is on its way can be seen by nobody: the receiver's memory holds NaN until it has waited.
template <typename Where>
class Watched : public Communicator {
 public:
  explicit Watched(Communicator& real) : real_(real) { last_ = Where::clock(); }

  int rank() const override { return real_.rank(); }
  int size() const override { return real_.size(); }

  std::vector<std::string> findings;
  std::int64_t shifted = 0, gathered = 0, scattered = 0, other = 0;  // bytes that this rank gave
  int under_way = 0;
  bool used = false;

  /// Of the work between begin and end, outside of the communicator: the share during which something was under way.
  double overlap() {
    pause();
    resume();
    return with_ / (with_ + without_);
  }

  Array bytes() const {
    return {{4},
            {static_cast<double>(shifted), static_cast<double>(gathered), static_cast<double>(scattered),
             static_cast<double>(other)}};
  }

 protected:
  Transfer start_shift(std::span<const std::byte> outgoing, std::span<std::byte> incoming) override {
    pause();
    struct State {
      typename Where::Buffer sent, arrived;
      Transfer transfer;
    };
    const auto state =
        std::make_shared<State>(State{Where::buffer(outgoing.size()), Where::buffer(incoming.size()), Transfer{}});
    const std::span<std::byte> sent(state->sent.data(), outgoing.size());
    const std::span<std::byte> arrived(state->arrived.data(), incoming.size());
    Where::copy(outgoing, sent);
    Where::spoil(incoming);
    state->transfer = real_.shift(sent, arrived);
    shifted += static_cast<std::int64_t>(outgoing.size());
    ++under_way;
    resume();
    return {[this, state, sent, arrived, outgoing, incoming] {
              pause();
              state->transfer.wait();
              if (!Where::same(outgoing, sent)) findings.emplace_back("what was being sent changed before wait()");
              Where::copy(arrived, incoming);
              --under_way;
              resume();
            },
            [] {}};
  }
  void gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    gathered += static_cast<std::int64_t>(mine.size());
    outside([&] { real_.all_gather(mine, all); });
  }
  void sum_and_scatter(std::span<const float> all, std::span<float> mine) override {
    scattered += static_cast<std::int64_t>(mine.size_bytes());
    outside([&] { real_.reduce_scatter(all, mine); });
  }
  void sum(std::span<float> values) override {
    other += static_cast<std::int64_t>(values.size_bytes());
    outside([&] { real_.all_reduce(values); });
  }
  void meet() override {
    outside([&] { real_.barrier(); });
  }

 private:
  void pause() {
    used = true;
    const double now = Where::clock();
    (under_way > 0 ? with_ : without_) += now - last_;
  }
  void resume() { last_ = Where::clock(); }
  template <typename Body>
  void outside(const Body& body) {
    pause();
    body();
    resume();
  }

  Communicator& real_;
  double last_ = 0.0, with_ = 0.0, without_ = 0.0;
};

// ---- Reports --------------------------------------------------------------------------------------------------------

/// What a rank's report calls the thing `what` of a case.
inline std::string key(int number, const std::string& form, bool backward, const std::string& what) {
  return std::to_string(number) + ' ' + form + (backward ? " backward " : " forward ") + what;
}

inline std::vector<std::string> names_of(bool backward) {
  if (backward) return {"d_query", "d_key", "d_value"};
  return {"output", "lse"};
}

/// Every rank has said something about it. Throws NotImplemented where one had not implemented it.
inline bool complete(int number, const RanksOutcome& outcome, const std::string& form, bool backward) {
  const std::string last = key(number, form, backward, "bytes");
  bool all = true;
  for (const RankReport& report : outcome.ranks) {
    if (report.arrays.contains(last)) continue;
    const auto missing = report.missing.find(key(number, form, backward, ""));
    if (missing != report.missing.end()) throw NotImplemented(missing->second.c_str());
    if (report.error.empty() && !report.missing.empty()) throw NotImplemented(report.missing.begin()->second.c_str());
    all = false;
  }
  return all;
}

/// What all ranks said of one thing, [B, H, S, ...] put together again. Padding must be `padding`.
struct Together {
  Array array;
  std::string wrong_padding;
};

inline Together together(const Dealt& dealt, const RanksOutcome& outcome, const std::string& name, Index heads,
                         Index width, double padding) {
  Together result{{{dealt.batch, heads, dealt.tokens}, {}}, ""};
  if (width > 0) result.array.shape.push_back(width);
  const Index each = std::max<Index>(width, 1);
  result.array.values.resize(static_cast<std::size_t>(dealt.batch * heads * dealt.tokens * each));
  for (int rank = 0; rank < dealt.ranks; ++rank) {
    const Array& part = outcome.ranks[static_cast<std::size_t>(rank)].arrays.at(name);
    std::vector<Index> shape{dealt.batch, heads, dealt.rows()};
    if (width > 0) shape.push_back(width);
    if (part.shape != shape) {
      throw std::runtime_error(name + " of rank " + std::to_string(rank) + ": got " + to_text(part.shape) + ", want " +
                               to_text(shape));
    }
    std::size_t at = 0;
    for (Index b = 0; b < dealt.batch; ++b)
      for (Index h = 0; h < heads; ++h)
        for (Index row = 0; row < dealt.rows(); ++row) {
          const Index token = dealt.token_at(rank, row);
          for (Index d = 0; d < each; ++d, ++at) {
            if (token >= 0) {
              const Index to = ((b * heads + h) * dealt.tokens + token) * each + d;
              result.array.values[static_cast<std::size_t>(to)] = part.values[at];
            } else if (!(part.values[at] == padding) && result.wrong_padding.empty()) {
              result.wrong_padding = "row " + std::to_string(row) + " of rank " + std::to_string(rank) +
                                     " is padding: got " + std::to_string(part.values[at]) + ", want " +
                                     std::to_string(padding);
            }
          }
        }
  }
  return result;
}

/// A finding for each thing that a rank itself found out about a case; the first of them.
inline bool expect_no_findings(int number, const RanksOutcome& outcome, const std::string& form, bool backward) {
  for (std::size_t rank = 0; rank < outcome.ranks.size(); ++rank) {
    for (const auto& [name, sentence] : outcome.ranks[rank].findings) {
      if (name != key(number, form, backward, "")) continue;
      finding("rank " + std::to_string(rank), sentence);
      return false;
    }
  }
  return true;
}

/// Which tasks of ranks this process has begun.
inline std::set<std::string>& tasks_begun() {
  static std::set<std::string> instance;
  return instance;
}

/// Runs the ranks that a test needs. Null if there can be none here: then the test is skipped.
inline const RanksOutcome* outcome_on(int ranks, const std::string& task, const std::string& why_not) {
  const std::string reason = ranks > 1 ? why_no_ranks() : "";
  if (!reason.empty() || !why_not.empty()) {
    skip(reason.empty() ? why_not : reason);
    return nullptr;
  }
  tasks_begun().insert(task);
#if KATA_REAL_GPU
  return &on_ranks(ranks, task, std::chrono::seconds(task.empty() ? 5 : 60));  // GPUs take a while to find each other
#else
  return &on_ranks(ranks, task);
#endif
}

/// For Recognise: what the three ranks of a task said of a case.
inline std::vector<Array> outputs_on_ranks(const std::string& task, int number, const std::string& form,
                                           bool backward) {
  // What the tests so far have not asked for is not looked at either; without a test, as for fingerprints, everything
  // is.
  if (doctest::is_running_in_test && !tasks_begun().contains(task)) throw NotImplemented("not asked for");
  std::vector<Array> outputs;
  for (const RankReport& report : on_ranks(3, task).ranks) {
    const auto missing = report.missing.find(key(number, form, backward, ""));
    if (missing != report.missing.end()) throw NotImplemented(missing->second.c_str());
    for (const std::string& name : names_of(backward)) {
      const auto found = report.arrays.find(key(number, form, backward, name));
      if (found == report.arrays.end()) throw std::runtime_error("no answer");
      outputs.push_back(found->second);
    }
  }
  return outputs;
}

// ---- The ranks that have a GPU each: flash_context_parallel_test.cpp ------------------------------------------------

inline const std::string ON_GPUS = "gpu";

/// What a rank does for the tasks that begin so.
void work_on_gpus(Communicator& hosts, RankReport& report);

/// For Recognise: the numbers of cases, and the outputs of one.
std::vector<int> recognised_on_gpus();
std::vector<Array> outputs_on_gpus(int number);

}  // namespace flashkata::testing
