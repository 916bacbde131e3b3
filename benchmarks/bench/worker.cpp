// Measures the answers of one build, through its C library: reads problems from its standard input, one in a line, and
// prints what came of each before it begins the next. ./kata bench starts it; by hand:
//
//   echo '{"step": "2.03", "type": "float32", "direction": "forward", "heads": 8, "kv_heads": 8, "queries": 1024,
//          "length": 1024, "width": 64, "threads": 1}' | tr -d '\n' | build/learn/benchmarks/bench_worker
//
// The line {"ceilings": "gpu"} or {"ceilings": THREADS} asks what the machine could do at most.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "benchmarks/bench/timing.hpp"
#include "bindings/flashkata.h"
#include "common/gpu/gpu.hpp"

namespace {

using namespace flashkata;
using namespace flashkata::bench;
using Json = nlohmann::json;

// An answer that may not be timed: it is wrong, or there is none.
struct NoTime {
  std::string status;  // "wrong", "not implemented", "refused", "out of memory", "failed"
  std::string why;
};

// Random numbers as an input, in the memory of the CPU or of the GPU. A large tensor has them again and again, with a
// period that no row has.
template <typename T>
class Input {
 public:
  Input(const char* name, std::int64_t count, bool gpu, unsigned seed) {
    constexpr std::int64_t PERIOD = (1 << 22) - 3;
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    numbers_.resize(static_cast<std::size_t>(std::min(count, PERIOD)));
    for (T& number : numbers_) number = from_float<T>(normal(engine));
    const auto size = static_cast<std::size_t>(count);
    if (gpu) {
      device_.emplace(name, size);
      fill_on_gpu(device_->data(), size * sizeof(T), std::as_bytes(std::span(numbers_)));
    } else {
      host_.resize(size);
      for (std::size_t i = 0; i < size; ++i) host_[i] = numbers_[i % numbers_.size()];
    }
  }

  T* data() { return device_ ? device_->data() : host_.data(); }
  double operator[](std::int64_t at) const {
    return static_cast<double>(to_float(numbers_[static_cast<std::size_t>(at) % numbers_.size()]));
  }

  /// All of them anew.
  void set(std::vector<T> numbers) {
    numbers_ = std::move(numbers);
    device_ ? device_->upload(numbers_) : void(host_ = numbers_);
  }

 private:
  std::vector<T> numbers_, host_;
  std::optional<DeviceBuffer<T>> device_;
};

// What a step writes: NaN everywhere at first, so that what is not written is seen.
template <typename T>
class Output {
 public:
  Output(const char* name, std::int64_t count, bool gpu) : host_(static_cast<std::size_t>(gpu ? 0 : count)) {
    if (gpu) device_.emplace(name, static_cast<std::size_t>(count));
    std::fill(host_.begin(), host_.end(), from_float<T>(std::nanf("")));
  }

  T* data() { return device_ ? device_->data() : host_.data(); }
  void fetch() {
    if (device_) host_ = device_->download();
  }
  double operator[](std::int64_t at) const {
    return static_cast<double>(to_float(host_[static_cast<std::size_t>(at)]));
  }

 private:
  std::vector<T> host_;
  std::optional<DeviceBuffer<T>> device_;
};

// Whole numbers where the step reads them.
class Indices {
 public:
  Indices(const char* name, std::vector<std::int32_t> numbers, bool gpu) : host_(std::move(numbers)) {
    if (gpu && !host_.empty()) device_.emplace(name, host_);
  }
  const std::int32_t* data() const { return host_.empty() ? nullptr : device_ ? device_->data() : host_.data(); }
  std::int64_t operator[](std::int64_t at) const { return host_[static_cast<std::size_t>(at)]; }

 private:
  std::vector<std::int32_t> host_;
  std::optional<DeviceBuffer<std::int32_t>> device_;
};

template <typename T>
class Run {
 public:
  explicit Run(const Problem& problem)
      : p_(problem),
        there_(p_.gpu && KATA_REAL_GPU),
        rows_(p_.batch * p_.heads * p_.queries),
        keys_(p_.batch * p_.kv_heads * p_.length),
        copies_(copies_of(p_)),
        q_("query", rows_ * p_.width, there_, 1),
        k_("key", copies_ * keys_ * p_.width, there_, 2),
        v_("value", copies_ * keys_ * p_.width, there_, 3),
        o_("output", rows_ * p_.width, there_),
        lse_("lse", rows_, there_),
        do_("d_output", p_.backward() ? rows_ * p_.width : 0, there_, 4),
        dq_("d_query", p_.backward() ? rows_ * p_.width : 0, there_),
        dk_("d_key", p_.backward() ? keys_ * p_.width : 0, there_),
        dv_("d_value", p_.backward() ? keys_ * p_.width : 0, there_),
        delta_("delta", p_.backward() ? rows_ : 0, there_),
        dq_sum_("d_query_sum", p_.backward() ? rows_ * p_.width : 0, there_),
        ends_("cu_seqlens", ends_of(p_), there_),
        lengths_("lengths", std::vector(static_cast<std::size_t>(p_.batch), static_cast<std::int32_t>(p_.length)),
                 there_),
        table_("block_table", table_of(p_), there_),
        splits_(splits_of(p_)),
        partial_o_("partial_output", splits_ * rows_ * p_.width, there_),
        partial_lse_("partial_lse", splits_ * rows_, there_) {
    p_.decodes() ? fill(decoding_) : fill_attention();
  }

  Time time() {
    if (p_.dropout > 0) {  // values that show which weights have fallen, until the answer is checked
      const std::vector<T> random = random_values();
      v_.set(one_hot());
      forward_and_backward();
      check();
      v_.set(random);
    } else {
      forward_and_backward();
      check();
    }
    const auto call = [this] {
      if (p_.forward()) forward();
      if (p_.backward()) backward();
    };
    Time time = p_.gpu ? time_on_gpu(call, p_.seconds) : time_on_cpu(call, p_.seconds);
    for (double* each : {&time.median, &time.low, &time.high}) *each /= static_cast<double>(copies_);
    return time;
  }

 private:
  // A cache that is small is read in several copies, or it would stay on the chip.
  static std::int64_t copies_of(const Problem& p) {
    constexpr double ENOUGH_BYTES = 256e6;
    return p.decodes() ? std::clamp<std::int64_t>(static_cast<std::int64_t>(ENOUGH_BYTES / p.bytes()), 1, 16) : 1;
  }
  static std::vector<std::int32_t> ends_of(const Problem& p) {
    std::vector<std::int32_t> ends;
    if (!p.packed) return ends;
    for (const auto& group : p.groups) ends.push_back(static_cast<std::int32_t>(group[0]));
    ends.push_back(static_cast<std::int32_t>(p.length));
    return ends;
  }
  // Pages in any order.
  static std::vector<std::int32_t> table_of(const Problem& p) {
    std::vector<std::int32_t> table(static_cast<std::size_t>(p.page > 0 ? p.batch * p.length / p.page : 0));
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), std::mt19937(5));
    return table;
  }
  static std::int64_t splits_of(const Problem& p) {
    std::int64_t splits = 0;
    if (p.decodes()) demand(flashkata_choose_splits(p.batch, p.kv_heads, p.length, gpu_multiprocessors(), &splits));
    return splits;
  }

  // What the calls for whole sequences and for decoding have in common.
  template <typename Call>
  void fill(Call& call) {
    call.type = std::is_same_v<T, float>  ? FLASHKATA_FLOAT32
                : std::is_same_v<T, fp16> ? FLASHKATA_FLOAT16
                                          : FLASHKATA_BFLOAT16;
    call.gpu = p_.gpu ? 1 : 0;
    call.causal = p_.causal ? 1 : 0;
    call.scale = scale_;
    call.query = of_queries(q_.data()), call.output = of_queries(o_.data());
    call.key = of_keys(k_.data()), call.value = of_keys(v_.data());
    call.lse = lse_.data();
  }
  void fill(flashkata_decoding& call) {
    fill<flashkata_decoding>(call);
    call.lengths = lengths_.data();
    call.block_table = table_.data();
    call.blocks = p_.page > 0 ? p_.length / p_.page : 0;
    call.splits = splits_;
    call.partial_output = partial_o_.data(), call.partial_lse = partial_lse_.data();
  }
  void fill_attention() {
    fill(call_);
    call_.threads = p_.threads;
    call_.d_output = of_queries(do_.data()), call_.d_query = of_queries(dq_.data());
    call_.d_key = of_keys(dk_.data()), call_.d_value = of_keys(dv_.data());
    call_.delta = delta_.data(), call_.d_query_sum = dq_sum_.data();
    if (p_.packed) {
      call_.cu_seqlens_q = call_.cu_seqlens_k = ends_.data();
      call_.sequences = static_cast<std::int64_t>(p_.groups.size());
      for (const auto& group : p_.groups) call_.max_seqlen_q = std::max(call_.max_seqlen_q, group[1] - group[0]);
      call_.max_seqlen_k = call_.max_seqlen_q;
    } else if (!p_.groups.empty()) {
      call_.groups = p_.groups.front().data();
      call_.group_count = static_cast<std::int64_t>(p_.groups.size());
    }
    call_.dropout_p = static_cast<float>(p_.dropout);
    call_.dropout_seed = 1, call_.dropout_offset = 2;
    call_.window = p_.window.empty() ? nullptr : p_.window.data();
  }

  flashkata_tensor of_queries(T* data) const {
    const std::int64_t row = p_.width, head = p_.queries * row;
    return {data, {p_.batch, p_.heads, p_.queries, row}, {p_.heads * head, head, row, 1}};
  }
  flashkata_tensor of_keys(T* data) const {
    const std::int64_t length = p_.page > 0 ? p_.page : p_.length, row = p_.width, head = length * row;
    return {data, {p_.batch * p_.length / length, p_.kv_heads, length, row}, {p_.kv_heads * head, head, row, 1}};
  }
  // Where key j of a head lies: its row in the memory of all keys.
  std::int64_t key_row(std::int64_t b, std::int64_t kv_head, std::int64_t j) const {
    if (p_.page == 0) return (b * p_.kv_heads + kv_head) * p_.length + j;
    const std::int64_t page = table_[b * (p_.length / p_.page) + j / p_.page];
    return (page * p_.kv_heads + kv_head) * p_.page + j % p_.page;
  }

  static void demand(int status) {
    if (status == FLASHKATA_OK) return;
    const std::string why = flashkata_message();
    const bool memory = why.find("out of memory") != std::string::npos;
    throw NoTime{status == FLASHKATA_NOT_IMPLEMENTED ? "not implemented"
                 : status == FLASHKATA_BAD_ARGUMENT  ? "refused"
                 : memory                            ? "out of memory"
                                                     : "failed",
                 why};
  }
  void forward() {
    if (!p_.decodes()) return demand(flashkata_forward(&call_));
    for (std::int64_t copy = 0; copy < copies_; ++copy) {
      decoding_.key.data = k_.data() + copy * keys_ * p_.width;
      decoding_.value.data = v_.data() + copy * keys_ * p_.width;
      demand(flashkata_decode(&decoding_));
    }
  }
  void backward() const { demand(flashkata_backward(&call_)); }
  void forward_and_backward() {
    const std::int64_t copies = std::exchange(copies_, 1);  // the first one is what is checked
    forward();
    copies_ = copies;
    if (p_.backward()) backward();
    synchronize();
  }

  // ---- Some rows of the first and of the last head against float64, from the inputs as rounded ----------------------

  void check() {
    for (Output<T>* output : {&o_, &dq_, &dk_, &dv_}) output->fetch();
    lse_.fetch();
    for (const auto& [b, head] : {std::pair<std::int64_t, std::int64_t>{0, 0}, {p_.batch - 1, p_.heads - 1}}) {
      for (const std::int64_t row : {std::int64_t{0}, p_.queries / 3, p_.queries - 1}) check_query(b, head, row);
      if (!p_.backward()) continue;
      for (const std::int64_t channel : {std::int64_t{0}, p_.width / 3, p_.width - 1}) {
        check_key(b, head / shared(), channel * key_step());
      }
    }
    if (p_.dropout > 0 && std::abs(1.0 - kept_ / looked_at_ - p_.dropout) > 0.1) {
      throw NoTime{"wrong", std::to_string(1.0 - kept_ / looked_at_) + " of the weights fall"};
    }
  }

  std::int64_t shared() const { return p_.heads / p_.kv_heads; }  // query heads that read the same keys
  // The values that show which weights have fallen are those of every so many keys: 1 in a channel of its own.
  std::int64_t key_step() const { return std::max<std::int64_t>(1, p_.length / p_.width); }

  std::vector<T> random_values() const {
    std::vector<T> values(static_cast<std::size_t>(keys_ * p_.width));
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = from_float<T>(static_cast<float>(v_[static_cast<std::int64_t>(i)]));
    }
    return values;
  }
  std::vector<T> one_hot() const {
    std::vector<T> values(static_cast<std::size_t>(keys_ * p_.width), from_float<T>(0.0f));
    for (std::int64_t head = 0; head < p_.batch * p_.kv_heads; ++head) {
      for (std::int64_t d = 0; d < p_.width; ++d) {
        values[static_cast<std::size_t>((head * p_.length + d * key_step()) * p_.width + d)] = from_float<T>(1.0f);
      }
    }
    return values;
  }
  // What dropout multiplied the weight of query i (a row of the output) and key j by, as far as the output shows it;
  // elsewhere values are 0, and anything will do.
  double factor(std::int64_t i, std::int64_t j, double weight) {
    if (p_.dropout == 0.0) return 1.0;
    if (j % key_step() != 0 || j / key_step() >= p_.width) return 0.0;
    const bool kept = o_[i * p_.width + j / key_step()] > 0.5 * weight / (1.0 - p_.dropout);
    looked_at_ += 1.0;
    kept_ += kept ? 1.0 : 0.0;
    return kept ? 1.0 / (1.0 - p_.dropout) : 0.0;
  }

  template <typename One, typename Other>
  double dot(const One& one, std::int64_t row, const Other& other, std::int64_t other_row) const {
    double sum = 0.0;
    for (std::int64_t d = 0; d < p_.width; ++d) sum += one[row * p_.width + d] * other[other_row * p_.width + d];
    return sum;
  }
  double score(std::int64_t i, std::int64_t j) const { return dot(q_, i, k_, j) * static_cast<double>(scale_); }

  void check_query(std::int64_t b, std::int64_t head, std::int64_t row) {
    const std::int64_t i = (b * p_.heads + head) * p_.queries + row;
    const auto [first, last] = p_.keys_of(row);
    std::vector<double> weights;
    double largest = -INFINITY, sum = 0.0;
    for (std::int64_t j = first; j < last; ++j) {
      weights.push_back(score(i, key_row(b, head / shared(), j)));
      largest = std::max(largest, weights.back());
    }
    for (double& weight : weights) sum += weight = std::exp(weight - largest);
    expect("lse", largest + std::log(sum), lse_[i], 1.0, std::is_same_v<T, float> ? 1e-4 : 1e-2);
    std::vector<double> output(static_cast<std::size_t>(p_.width)), d_query(output.size());
    const double delta = p_.backward() ? dot(do_, i, o_, i) : 0.0;
    for (std::int64_t j = first; j < last; ++j) {
      const std::int64_t key = key_row(b, head / shared(), j);
      const double weight = weights[static_cast<std::size_t>(j - first)] / sum, fallen = factor(i, j, weight);
      for (std::int64_t d = 0; d < p_.width; ++d) {
        output[static_cast<std::size_t>(d)] += fallen * weight * v_[key * p_.width + d];
      }
      if (!p_.backward()) continue;
      const double d_score = weight * (fallen * dot(do_, i, v_, key) - delta) * static_cast<double>(scale_);
      for (std::int64_t d = 0; d < p_.width; ++d) {
        d_query[static_cast<std::size_t>(d)] += d_score * k_[key * p_.width + d];
      }
    }
    expect_row("output", output, o_, i);
    if (p_.backward()) expect_row("d_query", d_query, dq_, i);
  }

  void check_key(std::int64_t b, std::int64_t kv_head, std::int64_t j) {
    const std::int64_t key = key_row(b, kv_head, j);
    std::vector<double> d_key(static_cast<std::size_t>(p_.width)), d_value(d_key.size());
    for (std::int64_t head = kv_head * shared(); head < (kv_head + 1) * shared(); ++head) {
      for (std::int64_t row = 0; row < p_.queries; ++row) {
        if (!p_.keys_of(row).has(j)) continue;
        const std::int64_t i = (b * p_.heads + head) * p_.queries + row;
        const double weight = std::exp(score(i, key) - lse_[i]), fallen = factor(i, j, weight);
        const double delta = dot(do_, i, o_, i);
        const double d_score = weight * (fallen * dot(do_, i, v_, key) - delta) * static_cast<double>(scale_);
        for (std::int64_t d = 0; d < p_.width; ++d) {
          d_value[static_cast<std::size_t>(d)] += fallen * weight * do_[i * p_.width + d];
          d_key[static_cast<std::size_t>(d)] += d_score * q_[i * p_.width + d];
        }
      }
    }
    expect_row("d_key", d_key, dk_, key);
    expect_row("d_value", d_value, dv_, key);
  }

  // Coarse: what is slightly wrong is the suites' business, what is timed here must at least be attention.
  void expect_row(const char* name, const std::vector<double>& want, const Output<T>& got, std::int64_t row) const {
    double largest = 0.0;
    for (const double number : want) largest = std::max(largest, std::abs(number));
    for (std::size_t d = 0; d < want.size(); ++d) {
      expect(name, want[d], got[row * p_.width + static_cast<std::int64_t>(d)], std::max(largest, 1e-2),
             std::is_same_v<T, float>  ? 1e-4
             : std::is_same_v<T, fp16> ? 2e-2
                                       : 6e-2);
    }
  }

  static void expect(const char* name, double want, double got, double size, double allowed) {
    if (std::abs(got - want) <= allowed * size) return;
    throw NoTime{"wrong",
                 std::string(name) + " is " + std::to_string(got) + " where float64 has " + std::to_string(want)};
  }

  Problem p_;
  bool there_;                // in the GPU's memory; that of the virtual one is the host's
  std::int64_t rows_, keys_;  // of all queries, and of all keys of one copy
  std::int64_t copies_;
  float scale_ = 1.0f / std::sqrt(static_cast<float>(p_.width));
  Input<T> q_, k_, v_;
  Output<T> o_;
  Output<float> lse_;
  Input<T> do_;
  Output<T> dq_, dk_, dv_;
  Output<float> delta_, dq_sum_;
  Indices ends_, lengths_, table_;
  std::int64_t splits_;  // of the keys, in decoding
  Output<float> partial_o_, partial_lse_;
  flashkata_attention call_{};
  flashkata_decoding decoding_{};
  double looked_at_ = 0.0, kept_ = 0.0;  // weights that dropout may have taken
};

Time measure(const Problem& problem) {
  if (problem.type == "float16") return Run<fp16>(problem).time();
  if (problem.type == "bfloat16") return Run<bf16>(problem).time();
  return Run<float>(problem).time();
}

Json answer(const Json& question) {
  if (question.contains("ceilings")) {
    const Json& asked = question["ceilings"];
    return asked.is_number() ? cpu_ceilings(asked.get<int>()) : gpu_ceilings();
  }
  Json result = {{"problem", question}};
  try {
    result["times"]["ours"] = measure(question.get<Problem>());
    result["status"] = "ok";
  } catch (const NoTime& reason) {
    result["status"] = reason.status;
    result["why"] = reason.why;
  } catch (const std::exception& error) {
    const std::string why = error.what();
    const bool memory =
        dynamic_cast<const std::bad_alloc*>(&error) != nullptr || why.find("out of memory") != std::string::npos;
    result["status"] = memory ? "out of memory" : "failed";
    result["why"] = why;
  }
  return result;
}

}  // namespace

// Ends with 3 after a GPU error: in this process nothing on the GPU would work any more.
int main() {
  for (std::string line; std::getline(std::cin, line);) {
    if (line.empty()) continue;
    const Json result = answer(Json::parse(line));
    std::cout << result.dump() << std::endl;
    if (result.value("status", "") == "failed" && result["problem"]["gpu"]) return 3;
  }
}
