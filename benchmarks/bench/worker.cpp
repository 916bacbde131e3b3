// Measures the answers of one build, through its C library: reads problems from its standard input, one in a line, and
// prints what came of each before it begins the next. ./kata bench starts it; by hand:
//
//   echo '{"step": "2.03", "type": "float32", "direction": "forward", "gpu": false, "causal": true, "batch": 1,
//          "heads": 8, "length": 1024, "width": 64, "threads": 1}' | tr -d '\n' | build/learn/benchmarks/bench_worker
//
// The line {"ceilings": "gpu"} or {"ceilings": THREADS} asks what the machine could do at most.
#include <cmath>
#include <iostream>
#include <optional>
#include <random>
#include <string>

#include "benchmarks/bench/timing.hpp"
#include "bindings/flashkata.h"
#include "common/gpu/gpu.hpp"

namespace {

using namespace flashkata;
using namespace flashkata::bench;
using Json = nlohmann::json;

// An answer that may not be timed: it is wrong, or there is none.
struct NoTime {
  std::string status;  // "wrong", "not implemented", "out of memory", "failed"
  std::string why;
};

// One tensor [B, H, S, D] in the memory of the CPU or of the GPU, of T; and its numbers on the host.
template <typename T>
class Memory {
 public:
  Memory(const char* name, std::int64_t count, bool gpu) : host_(static_cast<std::size_t>(count)) {
    if (gpu) device_.emplace(name, host_.size());
  }

  void fill_normal(unsigned seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    for (T& number : host_) number = from_float<T>(normal(engine));
    if (device_) device_->upload(host_);
  }
  /// NaN everywhere: what is not written is seen.
  void poison() {
    std::fill(host_.begin(), host_.end(), from_float<T>(std::nanf("")));
    if (device_) device_->upload(host_);
  }
  void fetch() {
    if (device_) device_->download(host_);
  }
  void* data() { return device_ ? static_cast<void*>(device_->data()) : static_cast<void*>(host_.data()); }
  double operator[](std::int64_t at) const {
    return static_cast<double>(to_float(host_[static_cast<std::size_t>(at)]));
  }

 private:
  std::vector<T> host_;
  std::optional<DeviceBuffer<T>> device_;
};

template <typename T>
class Run {
 public:
  explicit Run(const Problem& problem)
      : p_(problem),
        rows_(p_.batch * p_.heads * p_.length),
        q_("query", rows_ * p_.width, p_.gpu),
        k_("key", rows_ * p_.width, p_.gpu),
        v_("value", rows_ * p_.width, p_.gpu),
        o_("output", rows_ * p_.width, p_.gpu),
        lse_("lse", rows_, p_.gpu),
        do_("d_output", p_.backward() ? rows_ * p_.width : 0, p_.gpu),
        dq_("d_query", p_.backward() ? rows_ * p_.width : 0, p_.gpu),
        dk_("d_key", p_.backward() ? rows_ * p_.width : 0, p_.gpu),
        dv_("d_value", p_.backward() ? rows_ * p_.width : 0, p_.gpu),
        delta_("delta", p_.backward() ? rows_ : 0, p_.gpu),
        dq_sum_("d_query_sum", p_.backward() ? rows_ * p_.width : 0, p_.gpu) {
    unsigned seed = 1;
    for (Memory<T>* input : {&q_, &k_, &v_, &do_}) input->fill_normal(seed++);
    for (Memory<T>* output : {&o_, &dq_, &dk_, &dv_}) output->poison();
    lse_.poison();
    call_.type = std::is_same_v<T, float>  ? FLASHKATA_FLOAT32
                 : std::is_same_v<T, fp16> ? FLASHKATA_FLOAT16
                                           : FLASHKATA_BFLOAT16;
    call_.gpu = p_.gpu ? 1 : 0;
    call_.causal = p_.causal ? 1 : 0;
    call_.scale = 1.0f / std::sqrt(static_cast<float>(p_.width));
    call_.threads = p_.threads;
    call_.query = tensor(q_), call_.key = tensor(k_), call_.value = tensor(v_), call_.output = tensor(o_);
    call_.d_output = tensor(do_), call_.d_query = tensor(dq_), call_.d_key = tensor(dk_), call_.d_value = tensor(dv_);
    call_.lse = static_cast<float*>(lse_.data());
    call_.delta = static_cast<float*>(delta_.data());
    call_.d_query_sum = static_cast<float*>(dq_sum_.data());
  }

  Time time() {
    forward();
    if (p_.backward()) backward();
    synchronize();
    check();
    const auto call = [this] {
      if (p_.forward()) forward();
      if (p_.backward()) backward();
    };
    return p_.gpu ? time_on_gpu(call) : time_on_cpu(call);
  }

 private:
  flashkata_tensor tensor(Memory<T>& memory) const {
    const std::int64_t row = p_.width, head = p_.length * row;
    return {memory.data(), {p_.batch, p_.heads, p_.length, p_.width}, {p_.heads * head, head, row, 1}};
  }

  static void demand(int status) {
    if (status == FLASHKATA_OK) return;
    throw NoTime{status == FLASHKATA_NOT_IMPLEMENTED ? "not implemented" : "failed", flashkata_message()};
  }
  void forward() const { demand(flashkata_forward(&call_)); }
  void backward() const { demand(flashkata_backward(&call_)); }

  // Some rows of the first and of the last head against float64, from the inputs as rounded.
  void check() {
    for (Memory<T>* memory : {&q_, &k_, &v_, &o_, &do_, &dq_, &dk_, &dv_}) memory->fetch();
    lse_.fetch();
    for (const std::int64_t head : {std::int64_t{0}, p_.batch * p_.heads - 1}) {
      for (const std::int64_t row : {std::int64_t{0}, p_.length / 3, p_.length - 1}) {
        check_query(head, row);
        if (p_.backward()) check_key(head, row);
      }
    }
  }

  double dot(const Memory<T>& one, std::int64_t row, const Memory<T>& other, std::int64_t other_row) const {
    double sum = 0.0;
    for (std::int64_t d = 0; d < p_.width; ++d) sum += one[row * p_.width + d] * other[other_row * p_.width + d];
    return sum;
  }
  double score(std::int64_t i, std::int64_t j) const { return dot(q_, i, k_, j) * static_cast<double>(call_.scale); }

  void check_query(std::int64_t head, std::int64_t row) const {
    const std::int64_t first = head * p_.length, i = first + row, seen = p_.causal ? row + 1 : p_.length;
    std::vector<double> weights(static_cast<std::size_t>(seen));
    double largest = -INFINITY, sum = 0.0;
    for (std::int64_t j = 0; j < seen; ++j) {
      largest = std::max(largest, weights[static_cast<std::size_t>(j)] = score(i, first + j));
    }
    for (double& weight : weights) sum += weight = std::exp(weight - largest);
    expect("lse", largest + std::log(sum), lse_[i], 1.0, std::is_same_v<T, float> ? 1e-4 : 1e-2);
    std::vector<double> output(static_cast<std::size_t>(p_.width)), d_query(output.size());
    for (std::int64_t j = 0; j < seen; ++j) {
      for (std::int64_t d = 0; d < p_.width; ++d) {
        output[static_cast<std::size_t>(d)] +=
            weights[static_cast<std::size_t>(j)] / sum * v_[(first + j) * p_.width + d];
      }
    }
    expect_row("output", output, o_, i);
    if (!p_.backward()) return;
    const double delta = dot(do_, i, o_, i);
    for (std::int64_t j = 0; j < seen; ++j) {
      const double weight = weights[static_cast<std::size_t>(j)] / sum;
      const double d_score = weight * (dot(do_, i, v_, first + j) - delta) * static_cast<double>(call_.scale);
      for (std::int64_t d = 0; d < p_.width; ++d) {
        d_query[static_cast<std::size_t>(d)] += d_score * k_[(first + j) * p_.width + d];
      }
    }
    expect_row("d_query", d_query, dq_, i);
  }

  void check_key(std::int64_t head, std::int64_t row) const {
    const std::int64_t first = head * p_.length, j = first + row;
    std::vector<double> d_key(static_cast<std::size_t>(p_.width)), d_value(d_key.size());
    for (std::int64_t i = first + (p_.causal ? row : 0); i < first + p_.length; ++i) {
      const double weight = std::exp(score(i, j) - lse_[i]);
      const double d_score = weight * (dot(do_, i, v_, j) - dot(do_, i, o_, i)) * static_cast<double>(call_.scale);
      for (std::int64_t d = 0; d < p_.width; ++d) {
        d_value[static_cast<std::size_t>(d)] += weight * do_[i * p_.width + d];
        d_key[static_cast<std::size_t>(d)] += d_score * q_[i * p_.width + d];
      }
    }
    expect_row("d_key", d_key, dk_, j);
    expect_row("d_value", d_value, dv_, j);
  }

  // Coarse: what is slightly wrong is the suites' business, what is timed here must at least be attention.
  void expect_row(const char* name, const std::vector<double>& want, const Memory<T>& got, std::int64_t row) const {
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
  std::int64_t rows_;
  Memory<T> q_, k_, v_, o_;
  Memory<float> lse_;
  Memory<T> do_, dq_, dk_, dv_;
  Memory<float> delta_, dq_sum_;
  flashkata_attention call_{};
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
