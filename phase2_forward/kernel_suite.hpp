// What the suite of step 05 and benchmarks/flash_forward_errors.cpp share: a call with its memory around it, and rows
// of attention in float64. T is float, fp16 or bf16; inputs are rounded to it before anything else.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "common/testing/device_tensor.hpp"
#include "common/testing/half_judge.hpp"
#include "common/testing/kernel.hpp"
#include "phase2_forward/flash.hpp"
#include "phase2_forward/suite.hpp"

namespace flashkata::testing {

struct ForwardSizes {
  Index batch = 1, heads = 1, queries = 1, keys = 1, width = 16;

  std::string text() const {
    return std::to_string(queries) + (queries == 1 ? " query, " : " queries, ") + std::to_string(keys) +
           (keys == 1 ? " key" : " keys") + ", D = " + std::to_string(width);
  }
};

struct ForwardOptions {
  bool causal = false;
  std::optional<float> scale = {};
  Layouts layouts = {};
};

struct ForwardAnswer {
  Array output;  // [B, H, Sq, D]
  Array lse;     // [B, H, Sq]
  std::vector<KernelProfile> profiles;
};

// ---- Inputs ---------------------------------------------------------------------------------------------------------

/// The number in place [b, h, s, d].
using Fill = std::function<double(Index, Index, Index, Index)>;

inline Fill everywhere(double value) {
  return [value](Index, Index, Index, Index) { return value; };
}

/// Between -2 and 2, from the place alone.
inline Fill noise(unsigned seed) {
  return [seed](Index b, Index h, Index s, Index d) {
    std::uint32_t x = seed * 0x9e3779b9u;
    for (const Index part : {b, h, s, d}) {
      x = (x ^ static_cast<std::uint32_t>(part)) * 0x85ebca6bu;
      x ^= x >> 15;
    }
    return (static_cast<double>(x >> 16) - 32768.0) / 16384.0;
  };
}

/// Such a tensor, its numbers rounded to T.
template <typename T>
Tensor<float, 4> made(const Shape<4>& shape, const Fill& fill) {
  Tensor<float, 4> tensor(shape);
  const View<float, 4> view = tensor.view();
  for (Index b = 0; b < shape[0]; ++b)
    for (Index h = 0; h < shape[1]; ++h)
      for (Index s = 0; s < shape[2]; ++s)
        for (Index d = 0; d < shape[3]; ++d) view(b, h, s, d) = static_cast<float>(rounded<T>(fill(b, h, s, d)));
  return tensor;
}

template <typename T>
struct ForwardInputs {
  ForwardInputs(const ForwardSizes& s, const Fill& q, const Fill& k, const Fill& v)
      : query(made<T>({s.batch, s.heads, s.queries, s.width}, q)),
        key(made<T>({s.batch, s.heads, s.keys, s.width}, k)),
        value(made<T>({s.batch, s.heads, s.keys, s.width}, v)) {}

  Tensor<float, 4> query, key, value;
};

// ---- Calls ----------------------------------------------------------------------------------------------------------

/// Calls launch(FlashForward<T>) on copies of the inputs that have NaN around them. With `judge`, whatever is wrong
/// with the call itself is a finding: memory, guards, inputs that were written.
template <typename T, typename Launch>
ForwardAnswer forward(const Launch& launch, const ForwardInputs<T>& in, const ForwardOptions& options,
                      bool judge = true) {
  using Memory = DeviceTensor<T>;
  const Layouts& layouts = options.layouts;
  const Shape<4> shape = in.query.view().shape();
  Memory q = Memory::input("query", in.query.view(), layouts.query);
  Memory k = Memory::input("key", in.key.view(), layouts.key);
  Memory v = Memory::input("value", in.value.view(), layouts.value);
  Memory o = Memory::output("output", shape, layouts.output);
  // One number a row; in the layouts of tokens the rows of two heads are neighbours.
  DeviceTensor<float> l = DeviceTensor<float>::output(
      "lse", {shape[0], shape[1], shape[2], 1}, layouts.output == Layout::heads_apart ? Layout::heads : layouts.output);
  const FlashForward<T> problem{.query = q.view(),
                                .key = k.view(),
                                .value = v.view(),
                                .output = o.view(),
                                .lse = l.rows(),
                                .causal = options.causal,
                                .scale = options.scale};
  ForwardAnswer answer;
  if (judge) {
    const std::size_t memory = device_bytes();
    reset_peak_device_bytes();
    answer.profiles = run_kernels([&] { launch(problem); });
    expect(peak_device_bytes() == memory, "memory",
           std::to_string(peak_device_bytes() - memory) + " bytes of device memory beyond the arguments");
  } else {
    launch(problem);
    synchronize();
  }
  answer.output = o.values(judge);
  answer.lse = l.values(judge);
  answer.lse.shape.pop_back();
  if (judge) {
    for (const Memory* input : {&q, &k, &v}) input->expect_unchanged();
  }
  return answer;
}

// ---- Rows in float64, and what honest rounding to T does to them ----------------------------------------------------

/// Some queries of every head.
struct ForwardRows {
  std::vector<Index> queries;
  Array output = {};    // [B, H, rows, D], exact
  Array baseline = {};  // the weights rounded to T, and the output
  Array size = {};      // sum of |weight value|
  Array lse = {};       // [B, H, rows]
  double largest_score = 0.0;

  /// The same rows of a tensor [B, H, Sq, ...].
  Array of(const Array& all) const {
    Array picked{all.shape, {}};
    const Index count = all.shape[2];
    picked.shape[2] = static_cast<Index>(queries.size());
    const auto width = static_cast<std::ptrdiff_t>(all.shape.size() > 3 ? all.shape[3] : 1);
    for (Index head = 0; head < all.shape[0] * all.shape[1]; ++head) {
      for (const Index i : queries) {
        const auto begin = all.values.begin() + (head * count + i) * width;
        picked.values.insert(picked.values.end(), begin, begin + width);
      }
    }
    return picked;
  }
};

/// About `count` rows of each head, the first and the last among them.
inline std::vector<Index> spread_rows(Index rows, Index count) {
  std::vector<Index> picked;
  for (Index i = 0; i < rows; i += std::max<Index>(1, rows / count)) picked.push_back(i);
  if (rows > 0 && picked.back() != rows - 1) picked.push_back(rows - 1);
  return picked;
}

template <typename T>
ForwardRows forward_rows(const ForwardInputs<T>& in, bool causal, double scale, const std::vector<Index>& queries) {
  const View<const float, 4> q = in.query.view(), k = in.key.view(), v = in.value.view();
  const Index keys = k.size(2), width = q.size(3), rows = static_cast<Index>(queries.size());
  ForwardRows result{.queries = queries};
  for (Array* array : {&result.output, &result.baseline, &result.size})
    array->shape = {q.size(0), q.size(1), rows, width};
  result.lse.shape = {q.size(0), q.size(1), rows};
  std::vector<double> scores, output, baseline, size;
  for (Index b = 0; b < q.size(0); ++b) {
    for (Index h = 0; h < q.size(1); ++h) {
      for (const Index i : queries) {
        const Index seen = keys_seen(causal, i, q.size(2), keys);
        scores.assign(static_cast<std::size_t>(seen), 0.0);
        double largest = -std::numeric_limits<double>::infinity();
        for (Index j = 0; j < seen; ++j) {
          double& score = scores[static_cast<std::size_t>(j)];
          const float* one = &q(b, h, i, 0);
          const float* other = &k(b, h, j, 0);
          for (Index d = 0; d < width; ++d) score += static_cast<double>(one[d]) * static_cast<double>(other[d]);
          score *= scale;
          largest = std::max(largest, score);
          result.largest_score = std::max(result.largest_score, std::abs(score));
        }
        double sum = 0.0;
        for (const double score : scores) sum += std::exp(score - largest);
        const double lse = seen > 0 ? largest + std::log(sum) : largest;
        for (auto* row : {&output, &baseline, &size}) row->assign(static_cast<std::size_t>(width), 0.0);
        for (Index j = 0; j < seen; ++j) {
          const double weight = std::exp(scores[static_cast<std::size_t>(j)] - lse);
          const double weight16 = rounded<T>(weight);
          for (Index d = 0; d < width; ++d) {
            const auto at = static_cast<std::size_t>(d);
            const double value = static_cast<double>(v(b, h, j, d));
            output[at] += weight * value;
            baseline[at] += weight16 * value;
            size[at] += weight * std::abs(value);
          }
        }
        for (double& value : baseline) value = rounded<T>(value);
        result.output.values.insert(result.output.values.end(), output.begin(), output.end());
        result.baseline.values.insert(result.baseline.values.end(), baseline.begin(), baseline.end());
        result.size.values.insert(result.size.values.end(), size.begin(), size.end());
        result.lse.values.push_back(lse);
      }
    }
  }
  return result;
}

/// What fp32 arithmetic may add to an output in 16 bits: the exponent of a weight is a difference of two scores, each
/// rounded to float.
inline Bound arithmetic_of(const ForwardRows& rows) {
  return {4.0 * std::numeric_limits<float>::epsilon() * (rows.largest_score + 1.0), rows.size};
}

/// In fp32 1e-5, in 16 bits one rounding of the weights that are summed up.
template <typename T>
Bound lse_bound_of(const ForwardRows& rows) {
  return lse_bound(rows.lse, rows.largest_score, std::is_same_v<T, float> ? 1e-5 : roundoff<T>());
}

}  // namespace flashkata::testing
