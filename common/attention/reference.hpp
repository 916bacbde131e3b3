// The judge: attention and its gradients in float64, as obvious as prose.
//
// Suites compare with it; no step may call it, and it shares nothing with a step: masks, alignment and empty rows are
// written out here a second time, so that a mistake made in one place cannot hide in the other.
#pragma once

#ifndef KATA_JUDGE
#error "The reference judges the answers, so an answer may not include it. Only suites may."
#endif

#include <optional>

#include "common/attention/tensor.hpp"

namespace flashkata::reference {

/// One attention problem. B batch items, H query heads over Hk key/value heads (H a multiple of Hk; query head h reads
/// key/value head h / (H / Hk)), Sq queries, Sk keys, width D of queries and keys, width Dv of values.
struct Problem {
  View<const double, 4> query;  // [B, H, Sq, D]
  View<const double, 4> key;    // [B, Hk, Sk, D]
  View<const double, 4> value;  // [B, Hk, Sk, Dv]

  std::optional<double> scale{};  // multiplies query key^T; default 1 / sqrt(D)

  bool causal = false;                  // key j is visible to query i when j <= i + Sk - Sq
  std::optional<Index> window_left{};   // ... when j >= i + Sk - Sq - window_left
  std::optional<Index> window_right{};  // ... when j <= i + Sk - Sq + window_right
  double softcap = 0.0;                 // c > 0: scores become c tanh(score / c) before any mask or bias; 0: none

  std::optional<View<const bool, 4>> allowed{};  // [B, H, Sq, Sk], true = attend; strides of 0 broadcast
  std::optional<View<const double, 4>> bias{};   // [B, H, Sq, Sk], added to the scaled scores; -inf forbids

  std::optional<View<const bool, 4>> kept{};  // [B, H, Sq, Sk], true = this weight survives dropout
  double dropout_probability = 0.0;           // surviving weights are divided by 1 - dropout_probability
};

/// A query that may attend to nothing has output 0, weights 0 and lse -inf. What a forbidden key holds, NaN included,
/// reaches nothing.
struct Forward {
  Tensor<double, 4> output;   // [B, H, Sq, Dv]
  Tensor<double, 4> weights;  // [B, H, Sq, Sk]: softmax(scores), before dropout
  Tensor<double, 3> lse;      // [B, H, Sq]: log of the sum of exp(scores), natural logarithm
};

struct Gradients {
  Tensor<double, 4> query;  // [B, H, Sq, D]
  Tensor<double, 4> key;    // [B, Hk, Sk, D]: summed over the query heads of a group
  Tensor<double, 4> value;  // [B, Hk, Sk, Dv]
};

/// Vaswani et al. 2017, eq. 1, with the options above. Throws std::invalid_argument naming the argument, its value and
/// what is allowed: shapes that do not match, H not a multiple of Hk, a scale that is not finite, a negative window or
/// soft-cap, a dropout probability outside [0, 1) or one that comes without `kept`.
Forward forward(const Problem& problem);

/// Gradients of sum(doutput * output): dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)), dQ = scale dS K, dK = scale
/// dS^T Q, with the derivatives of dropout and soft-cap where they are used. doutput is [B, H, Sq, Dv].
Gradients backward(const Problem& problem, View<const double, 4> doutput);

}  // namespace flashkata::reference
