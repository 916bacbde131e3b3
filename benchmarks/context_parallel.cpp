// Strong scaling of step 4.08: one sequence on W GPUs, with the heads of Llama 3 8B.
//
//   cmake --build build/solutions-cuda --target context_parallel
//   mpiexec --bind-to none -n 4 build/solutions-cuda/benchmarks/context_parallel
//       [--csv FILE] [--tokens N]... [--calls N]
//
// For each length every GPU first computes the whole sequence alone, by one call of step 4.05: that is the time to be
// divided by W, and what the results are compared with. Figures of all runs are added to FILE.
//
//   ms            the median of the slowest rank's time, from a barrier to the end of its GPU's work; +- half of the
//                 distance between the quartiles, in percent
//   no exchange   the same, but what would go to another rank is copied to its place within the same GPU
//   exposed       the difference: time in communication that no work hides
//   efficiency    one GPU's time / (W ms)
//   sent          by each rank
//   held          GPU memory beyond the arguments, at most, in what the arguments take
//   rms, max      the difference from one GPU's results: its root mean square, relative to theirs, and the largest of
//                 |difference| / (|result| + their root mean square); of gradients the worst
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "benchmarks/context_parallel_kernels.hpp"
#include "common/distributed/devices.hpp"
#include "common/gpu/gpu.hpp"
#include "phase4_extensions/05_grouped/grouped.hpp"
#include "phase4_extensions/08_context_parallel/flash_context_parallel.hpp"

using namespace flashkata;
using namespace flashkata::bench;

namespace {

constexpr Index HEADS = 32, KEY_HEADS = 8, WIDTH = 128;
constexpr std::size_t WARM_UP = 2;  // calls
constexpr double TOLERANCE = 0.01;  // of the root mean square; 16 bits leave about 0.003

// ---- Communicators that watch ---------------------------------------------------------------------------------------

// Counts what this rank sends.
class Counting : public Communicator {
 public:
  explicit Counting(Communicator& real) : real_(real) {}
  int rank() const override { return real_.rank(); }
  int size() const override { return real_.size(); }
  std::size_t sent() const { return sent_; }

 protected:
  Transfer start_shift(std::span<const std::byte> outgoing, std::span<std::byte> incoming) override {
    if (size() > 1) sent_ += outgoing.size();
    return real_.shift(outgoing, incoming);
  }
  void gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    sent_ += others() * mine.size();
    real_.all_gather(mine, all);
  }
  void sum_and_scatter(std::span<const float> all, std::span<float> mine) override {
    sent_ += others() * mine.size_bytes();
    real_.reduce_scatter(all, mine);
  }
  void sum(std::span<float> values) override { real_.all_reduce(values); }
  void meet() override { real_.barrier(); }

 private:
  std::size_t others() const { return static_cast<std::size_t>(size() - 1); }

  Communicator& real_;
  std::size_t sent_ = 0;
};

// One of W ranks that sends everything to itself.
class NoExchange : public Communicator {
 public:
  NoExchange(int rank, int size) : rank_(rank), size_(size) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }

 protected:
  Transfer start_shift(std::span<const std::byte> outgoing, std::span<std::byte> incoming) override {
    copy_bytes(incoming.data(), outgoing.data(), outgoing.size());
    return {};
  }
  void gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    for (std::size_t begin = 0; begin < all.size(); begin += mine.size()) {
      copy_bytes(all.data() + begin, mine.data(), mine.size());
    }
  }
  void sum_and_scatter(std::span<const float> all, std::span<float> mine) override {
    const std::size_t begin = static_cast<std::size_t>(rank_) * mine.size();
    copy_bytes(std::as_writable_bytes(mine).data(), std::as_bytes(all.subspan(begin, mine.size())).data(),
               mine.size_bytes());
  }
  void sum(std::span<float>) override {}
  void meet() override {}

 private:
  int rank_, size_;
};

// ---- Tensors --------------------------------------------------------------------------------------------------------

Tokens all_tokens(Index length) { return {{0, 0}, length}; }
Tokens tokens_of(int rank, int ranks, Index length) {
  const Index rows = length / (2 * ranks);
  return {{rank * rows, (2 * ranks - 1 - rank) * rows}, rows};
}

// A tensor [1, heads, rows, WIDTH] in device memory.
class Half : public DeviceBuffer<bf16> {
 public:
  Half(const char* name, Index heads, Index rows)
      : DeviceBuffer(name, static_cast<std::size_t>(heads * rows * WIDTH)), shape_{1, heads, rows, WIDTH} {}
  View<bf16, 4> view() { return DeviceBuffer::view(shape_); }

 private:
  Shape<4> shape_;
};

struct Keys {
  Half key, value, d_key, d_value;
  Keys(const Tokens& tokens, Index rows, Index length)
      : key("key", KEY_HEADS, rows),
        value("value", KEY_HEADS, rows),
        d_key("d_key", KEY_HEADS, rows),
        d_value("d_value", KEY_HEADS, rows) {
    fill_normal(key.view(), tokens, length, 2);
    fill_normal(value.view(), tokens, length, 3);
  }
};

struct Queries {
  Half query, output, d_output, d_query;
  DeviceBuffer<float> lse, delta, d_query_sum;
  Shape<3> row_shape;

  Queries(const Tokens& tokens, Index rows, Index length)
      : query("query", HEADS, rows),
        output("output", HEADS, rows),
        d_output("d_output", HEADS, rows),
        d_query("d_query", HEADS, rows),
        lse("lse", static_cast<std::size_t>(HEADS * rows)),
        delta("delta", static_cast<std::size_t>(HEADS * rows)),
        d_query_sum("d_query_sum", static_cast<std::size_t>(HEADS * rows * WIDTH)),
        row_shape{1, HEADS, rows} {
    fill_normal(query.view(), tokens, length, 1);
    fill_normal(d_output.view(), tokens, length, 4);
  }

  FlashForward<bf16> forward(Keys& keys) {
    return {.query = query.view(),
            .key = keys.key.view(),
            .value = keys.value.view(),
            .output = output.view(),
            .lse = lse.view(row_shape),
            .causal = true};
  }
  FlashBackward<bf16> backward(Keys& keys) {
    return {.query = query.view(),
            .key = keys.key.view(),
            .value = keys.value.view(),
            .output = output.view(),
            .lse = lse.view(row_shape),
            .d_output = d_output.view(),
            .d_query = d_query.view(),
            .d_key = keys.d_key.view(),
            .d_value = keys.d_value.view(),
            .delta = delta.view(row_shape),
            .d_query_sum = d_query_sum.view(query.view().shape()),
            .causal = true};
  }
};

// ---- Time -----------------------------------------------------------------------------------------------------------

struct Time {
  double median = 0.0, low = 0.0, high = 0.0;  // milliseconds; the quartiles
  double spread() const { return 50.0 * (high - low) / median; }
};

// Of the slowest rank, call by call; of several candidates in turn. The ranks begin together.
std::vector<Time> times_of(Communicator& ranks, int calls, const std::vector<std::function<void()>>& candidates) {
  const std::size_t rounds = static_cast<std::size_t>(calls), count = candidates.size();
  std::vector<float> mine(rounds * count);
  for (std::size_t i = 0; i < (rounds + WARM_UP) * count; ++i) {
    synchronize();
    ranks.barrier();
    const auto begin = std::chrono::steady_clock::now();
    candidates[i % count]();
    synchronize();
    const std::chrono::duration<float, std::milli> took = std::chrono::steady_clock::now() - begin;
    if (i >= WARM_UP * count) mine[i - WARM_UP * count] = took.count();
  }
  const DeviceBuffer<float> here("times", mine);
  DeviceBuffer<float> all("times of all", mine.size() * static_cast<std::size_t>(ranks.size()));
  ranks.all_gather({here.data(), here.size()}, std::span<float>(all.data(), all.size()));
  const std::vector<float> everybody = all.download();
  std::vector<Time> times;
  for (std::size_t candidate = 0; candidate < count; ++candidate) {
    std::vector<double> slowest(rounds);
    for (std::size_t i = candidate; i < everybody.size(); i += count) {
      double& slow = slowest[i % mine.size() / count];
      slow = std::max(slow, static_cast<double>(everybody[i]));
    }
    std::sort(slowest.begin(), slowest.end());
    const auto at = [&](double part) {
      return slowest[static_cast<std::size_t>(std::lround(part * static_cast<double>(rounds - 1)))];
    };
    times.push_back({at(0.5), at(0.25), at(0.75)});
  }
  return times;
}

Time time_of(Communicator& ranks, int calls, const std::function<void()>& call) {
  return times_of(ranks, calls, {call}).front();
}

// The largest of all ranks.
double largest(Communicator& ranks, double mine) {
  const DeviceBuffer<float> here("mine", std::vector<float>(4, static_cast<float>(mine)));
  DeviceBuffer<float> all("all", 4 * static_cast<std::size_t>(ranks.size()));
  ranks.all_gather({here.data(), here.size()}, std::span<float>(all.data(), all.size()));
  const std::vector<float> values = all.download();
  double result = 0.0;
  for (const float value : values) {
    if (!(static_cast<double>(value) <= result)) result = static_cast<double>(value);
  }
  return result;
}

// ---- Tables ---------------------------------------------------------------------------------------------------------

// Rank 0 alone speaks.
class Report {
 public:
  Report(bool speaks, std::string file) : speaks_(speaks), file_(std::move(file)) {}

  template <typename... Values>
  void line(const char* format, Values... values) {
    if (!speaks_) return;
    std::printf(format, values...);
    std::fflush(stdout);
  }

  void add(const std::string& row) {
    if (!speaks_ || file_.empty()) return;
    const bool fresh = !std::filesystem::exists(file_);
    std::ofstream out(file_, std::ios::app);
    if (fresh) {
      out << "gpus,tokens,what,direction,ms,low,high,no_exchange_ms,one_gpu_ms,efficiency,sent_bytes,argument_bytes,"
             "held_bytes,rms,max\n";
    }
    out << row << '\n';
  }

 private:
  bool speaks_;
  std::string file_;
};

std::string row_of(std::initializer_list<std::string> cells) {
  std::string row;
  for (const std::string& cell : cells) row += (row.empty() ? "" : ",") + cell;
  return row;
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return text;
}

struct Form {
  const char* name;
  void (*forward)(const FlashForward<bf16>&, Index, Communicator&);
  void (*backward)(const FlashBackward<bf16>&, Index, Communicator&);
};
constexpr Form FORMS[]{{"gather", flash_gather_attention, flash_gather_attention_backward},
                       {"ring", flash_ring_attention, flash_ring_attention_backward}};

// ---- One length -----------------------------------------------------------------------------------------------------

class Benchmark {
 public:
  Benchmark(Communicator& ranks, Index length, int calls, Report& report)
      : ranks_(ranks),
        report_(report),
        length_(length),
        calls_(calls > 0 ? calls : static_cast<int>(std::clamp<Index>(5 * 131072 / length, 5, 25))),
        tokens_(tokens_of(ranks.rank(), ranks.size(), length)) {}

  void run() {
    report_.line("\n%lld tokens on %d GPU%s\n", static_cast<long long>(length_), ranks_.size(),
                 ranks_.size() == 1 ? "" : "s");
    const Index rows = 2 * tokens_.rows;
    Queries queries(tokens_, rows, length_);
    Keys keys(tokens_, rows, length_);
    alone_and_compared(queries, keys);
    report_.line("  %-8s %-9s %9s %4s %12s %9s %8s %11s %9s %6s %8s %8s\n", "form", "direction", "ms", "+-",
                 "no exchange", "exposed", "speed-up", "efficiency", "sent", "held", "rms", "max");
    report_.line("  %-8s %-9s %9.3f %3.0f%%\n", "one GPU", "forward", alone_[0].median, alone_[0].spread());
    report_.line("  %-8s %-9s %9.3f %3.0f%%\n", "one GPU", "backward", alone_[1].median, alone_[1].spread());
    for (int direction = 0; direction < 2; ++direction) {
      add_alone(direction);
      for (std::size_t form = 0; form < 2; ++form) measure(form, direction, queries, keys);
    }
    for (std::size_t form = 0; form < 2; ++form) both_directions(form);
    if (ranks_.size() > 1) exchanges(keys);
  }

 private:
  static const char* name_of(int direction) { return direction == 0 ? "forward" : "backward"; }

  // One GPU with everything; whether the others' results are its; and what there is to say about the work of a rank
  // that has all keys at hand.
  void alone_and_compared(Queries& queries, Keys& keys) {
    Keys all_keys(all_tokens(length_), length_, length_);
    {
      Queries all(all_tokens(length_), length_, length_);
      const std::vector<Group> one{{0, length_, 0, length_}};
      const auto forward = all.forward(all_keys);
      const auto backward = all.backward(all_keys);
      alone_[0] = time_of(ranks_, calls_, [&] { flash_grouped_forward(forward, one); });
      alone_[1] = time_of(ranks_, calls_, [&] { flash_grouped_backward(backward, one); });
      for (std::size_t form = 0; form < 2; ++form) compare(form, queries, keys, all, all_keys);
    }
    work_of_a_rank(queries, all_keys);
  }

  void compare(std::size_t form, Queries& queries, Keys& keys, Queries& all, Keys& all_keys) {
    const auto record = [&](int direction, Half& mine, Half& whole) {
      const Difference off = difference(mine.view(), whole.view(), tokens_);
      Difference& worst = off_[form][direction];
      worst.rms = std::max(worst.rms, largest(ranks_, off.rms));
      worst.largest = std::max(worst.largest, largest(ranks_, off.largest));
      if (!(off.rms <= TOLERANCE)) {
        throw std::runtime_error(std::string(FORMS[form].name) + " " + name_of(direction) + ": " + mine.name() +
                                 " of rank " + std::to_string(ranks_.rank()) + " is off by " + number(off.rms));
      }
    };
    FORMS[form].forward(queries.forward(keys), length_, ranks_);
    record(0, queries.output, all.output);
    FORMS[form].backward(queries.backward(keys), length_, ranks_);
    record(1, queries.d_query, all.d_query);
    record(1, keys.d_key, all_keys.d_key);
    record(1, keys.d_value, all_keys.d_value);
  }

  // What the chunks are worth: a rank's queries and all keys, without any exchange.
  void work_of_a_rank(Queries& queries, Keys& all_keys) {
    const Index rows = tokens_.rows;
    const int rank = ranks_.rank(), size = ranks_.size();
    const std::vector<Group> zigzag{{0, rows, 0, (rank + 1) * rows}, {rows, 2 * rows, 0, (2 * size - rank) * rows}};
    const std::vector<Group> contiguous{{0, 2 * rows, 0, 2 * (rank + 1) * rows}};
    const auto forward = queries.forward(all_keys);
    const auto backward = queries.backward(all_keys);
    const auto measure = [&](const char* what, int direction, const std::function<void()>& call) {
      const Time time = time_of(ranks_, calls_, call);
      report_.line("  %-50s %-9s %9.3f ms %3.0f%%\n", what, name_of(direction), time.median, time.spread());
      report_.add(row_of({std::to_string(size), std::to_string(length_), what, name_of(direction), number(time.median),
                          number(time.low), number(time.high), "", "", "", "", "", "", "", ""}));
    };
    measure("zigzag; two groups in one call", 0, [&] { flash_grouped_forward(forward, zigzag); });
    measure("zigzag; one call for each group", 0, [&] {
      for (const Group& group : zigzag) flash_grouped_forward(forward, std::span(&group, 1));
    });
    measure("contiguous rows for each rank", 0, [&] { flash_grouped_forward(forward, contiguous); });
    flash_grouped_forward(forward, zigzag);
    measure("zigzag; two groups in one call", 1, [&] { flash_grouped_backward(backward, zigzag); });
    measure("zigzag; one call for each group (sums not added)", 1, [&] {
      for (const Group& group : zigzag) flash_grouped_backward(backward, std::span(&group, 1));
    });
    flash_grouped_forward(forward, contiguous);
    measure("contiguous rows for each rank", 1, [&] { flash_grouped_backward(backward, contiguous); });
  }

  void add_alone(int direction) {
    const Time& alone = alone_[direction];
    report_.add(row_of({std::to_string(ranks_.size()), std::to_string(length_), "one GPU", name_of(direction),
                        number(alone.median), number(alone.low), number(alone.high), "", number(alone.median), "", "",
                        "", "", "", ""}));
  }

  void measure(std::size_t form, int direction, Queries& queries, Keys& keys) {
    const auto forward = queries.forward(keys);
    const auto backward = queries.backward(keys);
    const auto call = [&](Communicator& ranks) {
      if (direction == 0) {
        FORMS[form].forward(forward, length_, ranks);
      } else {
        FORMS[form].backward(backward, length_, ranks);
      }
    };
    if (direction == 1) FORMS[form].forward(forward, length_, ranks_);
    const std::size_t before = device_bytes();
    reset_peak_device_bytes();
    Counting counting(ranks_);
    call(counting);
    synchronize();
    const double held = static_cast<double>(peak_device_bytes() - before);
    double arguments = static_cast<double>(queries.query.bytes() * 2 + queries.lse.bytes() + keys.key.bytes() * 2);
    if (direction == 1) {
      arguments += static_cast<double>(queries.query.bytes() * 2 + queries.delta.bytes() + queries.d_query_sum.bytes() +
                                       keys.key.bytes() * 2);
    }
    NoExchange nobody(ranks_.rank(), ranks_.size());
    const std::vector<Time> both = times_of(ranks_, calls_, {[&] { call(ranks_); }, [&] { call(nobody); }});
    const Time &time = both[0], &silent = both[1];
    times_[form][direction] = time;
    const double one = alone_[direction].median, efficiency = one / time.median / ranks_.size();
    const Difference& off = off_[form][direction];
    report_.line("  %-8s %-9s %9.3f %3.0f%% %12.3f %9.3f %8.2f %11.3f %6.0f MB %6.2f %8.1e %8.1e\n", FORMS[form].name,
                 name_of(direction), time.median, time.spread(), silent.median, time.median - silent.median,
                 one / time.median, efficiency, static_cast<double>(counting.sent()) * 1e-6, held / arguments, off.rms,
                 off.largest);
    report_.add(row_of({std::to_string(ranks_.size()), std::to_string(length_), FORMS[form].name, name_of(direction),
                        number(time.median), number(time.low), number(time.high), number(silent.median), number(one),
                        number(efficiency), std::to_string(counting.sent()), number(arguments), number(held),
                        number(off.rms), number(off.largest)}));
  }

  void both_directions(std::size_t form) {
    const double one = alone_[0].median + alone_[1].median;
    const double ours = times_[form][0].median + times_[form][1].median;
    const double efficiency = one / ours / ranks_.size();
    report_.line("  %-8s %-9s %9.3f %39.2f %11.3f\n", FORMS[form].name, "both", ours, one / ours, efficiency);
    report_.add(row_of({std::to_string(ranks_.size()), std::to_string(length_), FORMS[form].name, "both", number(ours),
                        "", "", "", number(one), number(efficiency), "", "", "", "", ""}));
  }

  // The exchanges alone, as the two forms make them.
  void exchanges(Keys& keys) {
    const std::size_t size = static_cast<std::size_t>(ranks_.size()), count = keys.key.bytes();
    DeviceBuffer<std::byte> all("all", size * count);
    DeviceBuffer<float> sums("sums", size * keys.key.size()), mine("mine", keys.key.size());
    sums.fill_zero();
    const std::span<const std::byte> key{reinterpret_cast<const std::byte*>(keys.key.data()), count};
    const auto measure = [&](const char* what, double sent, const std::function<void()>& call) {
      const Time time = time_of(ranks_, 10, call);
      report_.line("  %-50s %-9s %9.3f ms %3.0f%% %8.1f GB/s from each GPU\n", what, "", time.median, time.spread(),
                   sent / time.median * 1e-6);
      report_.add(row_of({std::to_string(ranks_.size()), std::to_string(length_), what, "", number(time.median),
                          number(time.low), number(time.high), "", "", "", number(sent), "", "", "", ""}));
    };
    measure("shift of K", static_cast<double>(count),
            [&] { ranks_.shift(key, std::span<std::byte>(all.data(), count)).wait(); });
    measure("all_gather of K", static_cast<double>((size - 1) * count),
            [&] { ranks_.all_gather(key, std::span<std::byte>(all.data(), all.size())); });
    measure("reduce_scatter of d_key, in floats", static_cast<double>((size - 1) * mine.bytes()), [&] {
      ranks_.reduce_scatter(std::span<const float>(sums.data(), sums.size()),
                            std::span<float>(mine.data(), mine.size()));
    });
  }

  Communicator& ranks_;
  Report& report_;
  Index length_;
  int calls_;
  Tokens tokens_;
  Time alone_[2];     // forward, backward
  Time times_[2][2];  // of a form in a direction
  Difference off_[2][2]{};
};

}  // namespace

int main(int count, char** arguments) {
  std::string csv;
  std::vector<Index> lengths;
  int calls = 0;  // as many as the length allows
  for (int i = 1; i + 1 < count; i += 2) {
    if (std::strcmp(arguments[i], "--csv") == 0) csv = arguments[i + 1];
    if (std::strcmp(arguments[i], "--calls") == 0) calls = std::atoi(arguments[i + 1]);
    if (std::strcmp(arguments[i], "--tokens") == 0) lengths.push_back(std::atoll(arguments[i + 1]));
  }
  if (lengths.empty()) lengths = {32768, 65536, 131072};
  try {
    const auto ranks = connect_devices(std::chrono::minutes(1));
    Report report(ranks->rank() == 0, csv);
    report.line("%lld query heads, %lld key heads, D = %lld, bf16, causal\n", static_cast<long long>(HEADS),
                static_cast<long long>(KEY_HEADS), static_cast<long long>(WIDTH));
    for (const Index length : lengths) {
      if (length <= 0 || length % (2 * ranks->size()) != 0) throw std::invalid_argument("--tokens: 2W must divide it");
      Benchmark(*ranks, length, calls, report).run();
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "context_parallel: %s\n", error.what());
    std::_Exit(1);  // without a farewell: so mpiexec ends the others
  }
}
