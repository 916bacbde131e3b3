// Flash attention as a subject for faults: the template parameter says what is wrong with the kernel, if anything.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "tests/virtual_gpu/corpus_launch.hpp"

namespace flashkata::corpus {

struct AttentionInputs {
  std::vector<float> q, k, v, output_gradient;  // [heads, length, head_dim]
};

inline AttentionInputs attention_inputs(int heads, int length, int head_dim) {
  std::mt19937 generator(1);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  AttentionInputs inputs;
  for (std::vector<float>* tensor : {&inputs.q, &inputs.k, &inputs.v, &inputs.output_gradient}) {
    tensor->resize(static_cast<std::size_t>(heads) * length * head_dim);
    for (float& value : *tensor) value = to_float(to_bf16(uniform(generator)));
  }
  return inputs;
}

struct AttentionResults {
  std::vector<float> output, lse, q_gradient;
};

/// In double, one query after the other.
inline AttentionResults reference_attention(const AttentionInputs& in, int heads, int length, int head_dim,
                                            double scale) {
  AttentionResults results;
  results.output.resize(in.q.size());
  results.q_gradient.resize(in.q.size());
  results.lse.resize(static_cast<std::size_t>(heads) * length);
  std::vector<double> p(static_cast<std::size_t>(length));
  for (int head = 0; head < heads; ++head) {
    const std::size_t base = static_cast<std::size_t>(head) * length * head_dim;
    for (int row = 0; row < length; ++row) {
      double sum = 0.0;
      for (int key = 0; key < length; ++key) {
        double dot = 0.0;
        for (int d = 0; d < head_dim; ++d) {
          dot += static_cast<double>(in.q[base + row * head_dim + d]) * in.k[base + key * head_dim + d];
        }
        sum += p[key] = std::exp(dot * scale);
      }
      results.lse[static_cast<std::size_t>(head) * length + row] = static_cast<float>(std::log(sum));
      double delta = 0.0;
      for (int d = 0; d < head_dim; ++d) {
        double value = 0.0;
        for (int key = 0; key < length; ++key) value += p[key] / sum * in.v[base + key * head_dim + d];
        results.output[base + row * head_dim + d] = static_cast<float>(value);
        delta += value * in.output_gradient[base + row * head_dim + d];
      }
      for (int key = 0; key < length; ++key) {
        double dp = 0.0;
        for (int d = 0; d < head_dim; ++d) {
          dp += static_cast<double>(in.output_gradient[base + row * head_dim + d]) * in.v[base + key * head_dim + d];
        }
        const double ds = p[key] / sum * (dp - delta) * scale;
        for (int d = 0; d < head_dim; ++d) {
          results.q_gradient[base + row * head_dim + d] += static_cast<float>(ds * in.k[base + key * head_dim + d]);
        }
      }
    }
  }
  return results;
}

inline bool all_close(const std::vector<float>& got, const std::vector<float>& want, float tolerance) {
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (!(std::abs(got[i] - want[i]) <= tolerance)) return false;
  }
  return got.size() == want.size();
}

}  // namespace flashkata::corpus
