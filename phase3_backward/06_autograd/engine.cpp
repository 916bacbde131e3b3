#include "engine.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "phase2_forward/03_tiled_forward/tiled_forward.hpp"
#include "phase3_backward/03_tiled_backward/tiled_backward.hpp"

namespace flashkata::engine {
namespace {

using MatrixXd = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

std::optional<float> narrowed(const std::optional<double>& scale) {
  if (!scale) return {};
  return static_cast<float>(*scale);
}

double scale_of(const View<const double, 4>& q, const AttentionOptions& options) {
  return options.scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(3))));
}

void check(const View<const double, 4>& q, const View<const double, 4>& k, const View<const double, 4>& v,
           const AttentionOptions& options) {
  require(q.size(3) > 0, "q", to_text(q.shape()), "[B, H, Sq, D] with D at least 1");
  const Shape<4> keys{q.size(0), q.size(1), k.size(2), q.size(3)};
  const Shape<4> values{q.size(0), q.size(1), k.size(2), v.size(3)};
  require(k.shape() == keys, "k", to_text(k.shape()), to_text(keys));
  require(v.shape() == values, "v", to_text(v.shape()), to_text(values));
  if (options.scale) require(std::isfinite(*options.scale), "scale", *options.scale, "a finite number");
}

// exp(scale q k^T - lse) of one head, 0 where a key is forbidden.
template <typename Q, typename K>
MatrixXd weights_of(const Q& q, const K& k, const View<const double, 1>& lse, double scale, bool causal) {
  MatrixXd weights = scale * q * k.transpose();
  for (Index i = 0; i < weights.rows(); ++i) {
    for (Index j = 0; j < weights.cols(); ++j) {
      const bool forbidden = causal && j > i + k.rows() - q.rows();
      weights(i, j) = forbidden ? 0.0 : std::exp(weights(i, j) - lse(i));
    }
  }
  return weights;
}

}  // namespace

Calls& calls() {
  thread_local Calls counted;
  return counted;
}

Forward<float> forward(View<const float, 4> q, View<const float, 4> k, View<const float, 4> v,
                       const AttentionOptions& options) {
  ++calls().forward;
  TiledResult result = tiled_forward(q, k, v, {.causal = options.causal, .scale = narrowed(options.scale)});
  return {std::move(result.output), std::move(result.lse)};
}

Forward<double> forward(View<const double, 4> q, View<const double, 4> k, View<const double, 4> v,
                        const AttentionOptions& options) {
  check(q, k, v, options);
  ++calls().forward;
  Forward<double> result{Tensor<double, 4>({q.size(0), q.size(1), q.size(2), v.size(3)}),
                         Tensor<double, 3>({q.size(0), q.size(1), q.size(2)})};
  for (Index b = 0; b < q.size(0); ++b) {
    for (Index h = 0; h < q.size(1); ++h) {
      const MatrixXd scores = scale_of(q, options) * as_matrix(q[b][h]) * as_matrix(k[b][h]).transpose();
      for (Index i = 0; i < scores.rows(); ++i) {
        const Index seen =
            options.causal ? std::clamp<Index>(i + 1 + scores.cols() - scores.rows(), 0, scores.cols()) : scores.cols();
        const auto row = scores.row(i).head(seen).array();
        result.lse(b, h, i) = seen == 0 ? -std::numeric_limits<double>::infinity()
                                        : row.maxCoeff() + std::log((row - row.maxCoeff()).exp().sum());
      }
      const Tensor<double, 3>& lse = result.lse;
      as_matrix(result.output.view()[b][h]) =
          weights_of(as_matrix(q[b][h]), as_matrix(k[b][h]), lse.view()[b][h], scale_of(q, options), options.causal) *
          as_matrix(v[b][h]);
    }
  }
  return result;
}

Gradients<float> backward(View<const float, 4> q, View<const float, 4> k, View<const float, 4> v,
                          View<const float, 4> output, View<const float, 3> lse, View<const float, 4> d_output,
                          const AttentionOptions& options) {
  ++calls().backward;
  TiledGradients result =
      tiled_backward(q, k, v, output, lse, d_output, {.causal = options.causal, .scale = narrowed(options.scale)});
  return {std::move(result.query), std::move(result.key), std::move(result.value)};
}

Gradients<double> backward(View<const double, 4> q, View<const double, 4> k, View<const double, 4> v,
                           View<const double, 4> output, View<const double, 3> lse, View<const double, 4> d_output,
                           const AttentionOptions& options) {
  ++calls().backward;
  Gradients<double> result{Tensor<double, 4>(q.shape()), Tensor<double, 4>(k.shape()), Tensor<double, 4>(v.shape())};
  const double scale = scale_of(q, options);
  for (Index b = 0; b < q.size(0); ++b) {
    for (Index h = 0; h < q.size(1); ++h) {
      const auto query = as_matrix(q[b][h]);
      const auto key = as_matrix(k[b][h]);
      const auto d_out = as_matrix(d_output[b][h]);
      const MatrixXd weights = weights_of(query, key, lse[b][h], scale, options.causal);
      MatrixXd d_scores = d_out * as_matrix(v[b][h]).transpose();
      for (Index i = 0; i < d_scores.rows(); ++i) {
        const double delta = d_out.row(i).dot(as_matrix(output[b][h]).row(i));
        d_scores.row(i) = weights.row(i).array() * (d_scores.row(i).array() - delta);
      }
      as_matrix(result.query.view()[b][h]) = scale * d_scores * key;
      as_matrix(result.key.view()[b][h]) = scale * d_scores.transpose() * query;
      as_matrix(result.value.view()[b][h]) = weights.transpose() * d_out;
    }
  }
  return result;
}

}  // namespace flashkata::engine
