#include "dropout.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/attention/tensor.hpp"
#include "solutions/hidden/phase4_extensions/03_dropout/kept.hpp"

namespace flashkata {
namespace {

// How many keys query i sees: the first ones.
Index keys_seen(bool causal, Index i, Index queries, Index keys) {
  return causal ? std::clamp<Index>(i + 1 + keys - queries, 0, keys) : keys;
}

// Of the first `count` weights of query i, what each is multiplied by: 0 or 1 / (1 - probability).
Eigen::VectorXf factors(const HeadKeeps& keeps, float factor, Index i, Index count) {
  return Eigen::VectorXf::NullaryExpr(count, [&](Index j) { return keeps(i, j) ? factor : 0.0f; });
}

template <typename Problem>
float scale_of(const Problem& problem) {
  return problem.scale.value_or(1.0f / std::sqrt(static_cast<float>(problem.query.size(3))));
}

}  // namespace

Tensor<bool, 4> dropout_mask(const Dropout& dropout, const Shape<4>& shape) {
  check_dropout_mask(dropout, shape);
  const Keeps keeps(dropout);
  Tensor<bool, 4> mask(shape);
  for (Index b = 0; b < shape[0]; ++b) {
    for (Index h = 0; h < shape[1]; ++h) {
      const HeadKeeps head = keeps.of_head(b, h);
      for (Index i = 0; i < shape[2]; ++i) {
        for (Index j = 0; j < shape[3]; ++j) mask(b, h, i, j) = head(i, j);
      }
    }
  }
  return mask;
}

void tiled_dropout_forward(const FlashForward<float>& problem, const Dropout& dropout) {
  check_dropout_forward(problem, dropout);
  const Keeps keeps(dropout);
  const auto [batch, heads, queries, width] = problem.query.shape();
  for (Index b = 0; b < batch; ++b) {
    for (Index h = 0; h < heads; ++h) {
      const HeadKeeps head = keeps.of_head(b, h);
      const auto q = as_matrix(problem.query[b][h]);  // [Sq, D]
      const auto k = as_matrix(problem.key[b][h]);    // [Sk, D]
      const auto v = as_matrix(problem.value[b][h]);  // [Sk, D]
      auto output = as_matrix(problem.output[b][h]);  // [Sq, D]
      for (Index i = 0; i < queries; ++i) {
        const Index seen = keys_seen(problem.causal, i, queries, k.rows());
        output.row(i).setZero();
        problem.lse(b, h, i) = -std::numeric_limits<float>::infinity();
        if (seen == 0) continue;
        const Eigen::VectorXf scores = scale_of(problem) * (k.topRows(seen) * q.row(i).transpose());
        const float largest = scores.maxCoeff();
        const Eigen::VectorXf weights = (scores.array() - largest).exp();
        // The sum is over all weights: whether one falls is decided after the softmax.
        const float sum = weights.sum();
        problem.lse(b, h, i) = largest + std::log(sum);
        const Eigen::VectorXf kept = weights.cwiseProduct(factors(head, keeps.factor, i, seen)) / sum;
        output.row(i) = kept.transpose() * v.topRows(seen);
      }
    }
  }
}

void tiled_dropout_backward(const FlashBackward<float>& problem, const Dropout& dropout) {
  check_dropout_backward(problem, dropout);
  const Keeps keeps(dropout);
  const float scale = scale_of(problem);
  const auto [batch, heads, queries, width] = problem.query.shape();
  for (Index b = 0; b < batch; ++b) {
    for (Index h = 0; h < heads; ++h) {
      const HeadKeeps head = keeps.of_head(b, h);
      const auto q = as_matrix(problem.query[b][h]);            // [Sq, D]
      const auto k = as_matrix(problem.key[b][h]);              // [Sk, D]
      const auto v = as_matrix(problem.value[b][h]);            // [Sk, D]
      const auto output = as_matrix(problem.output[b][h]);      // [Sq, D]
      const auto d_output = as_matrix(problem.d_output[b][h]);  // [Sq, D]
      auto d_q = as_matrix(problem.d_query[b][h]);              // [Sq, D]
      auto d_k = as_matrix(problem.d_key[b][h]);                // [Sk, D]
      auto d_v = as_matrix(problem.d_value[b][h]);              // [Sk, D]
      d_q.setZero();
      d_k.setZero();
      d_v.setZero();
      for (Index i = 0; i < queries; ++i) {
        const Index seen = keys_seen(problem.causal, i, queries, k.rows());
        if (seen == 0) continue;
        const Eigen::VectorXf scores = scale * (k.topRows(seen) * q.row(i).transpose());
        const Eigen::VectorXf p = (scores.array() - problem.lse(b, h, i)).exp();
        const Eigen::VectorXf z = factors(head, keeps.factor, i, seen);
        const Eigen::VectorXf d_p = z.cwiseProduct(v.topRows(seen) * d_output.row(i).transpose());
        // The output is made of the weights that stayed, so delta is already the sum that dS needs.
        const float delta = output.row(i).dot(d_output.row(i));
        const Eigen::VectorXf d_s = scale * p.cwiseProduct((d_p.array() - delta).matrix());
        d_q.row(i) = d_s.transpose() * k.topRows(seen);
        d_k.topRows(seen) += d_s * q.row(i);
        d_v.topRows(seen) += z.cwiseProduct(p) * d_output.row(i);
      }
    }
  }
}

}  // namespace flashkata
