// Answers to 02_merge, wrong and right. Every deviation stands where somebody made it.
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../corpus.hpp"
#include "merge.hpp"

namespace flashkata {
namespace {

using corpus::plays;
using corpus::RIGHT;
using corpus::UNNAMED;

const corpus::Answers answers{
    {"merge-average", "merge-average"},
    {"merge-sum", "merge-sum"},
    {"merge-lse-sum", "merge-lse-sum"},
    {"merge-lse-sum, in the lse alone", "merge-lse-sum-returned"},
    {"merge-no-max", "merge-no-max"},
    {"merge-no-max in the weights alone", UNNAMED},
    {"merge-max-of-first", "merge-max-of-first"},
    {"merge-swapped", "merge-swapped"},
    {"merge-unnormalised", "merge-unnormalised"},
    {"merge-weighted-by-lse", "merge-weighted-by-lse"},
    {"merge-winner-takes-all", "merge-winner-takes-all"},
    {"merge-lse-max", "merge-lse-max"},
    {"merge-lse-average", "merge-lse-average"},
    {"lse-missing-max", "lse-missing-max"},
    {"lse-base2", "lse-base2"},
    {"merge-base2", "merge-base2"},
    {"merge-empty-nan", "merge-empty-nan"},
    {"merge-empty-nan where the first is empty", UNNAMED},
    {"merge-empty-nan where both are empty", UNNAMED},
    {"merge-empty-nan by 0 times NaN", "merge-empty-leak"},
    {"0 times NaN in the second part alone", UNNAMED},
    {"0 times NaN where both are empty", UNNAMED},
    {"sigmoid without a guard", UNNAMED},
    {"-1e4 taken for empty", UNNAMED},
    {"an empty part wins", UNNAMED},
    {"empty lse returned as -1e30", UNNAMED},
    {"first empty returns the second but not its lse", UNNAMED},
    {"weights not divided", "merge-no-division"},
    {"weights not divided and not measured against the maximum", "merge-no-max-no-division"},
    {"last query forgotten", UNNAMED},
    {"last channel forgotten", UNNAMED},
    {"channels beyond 64 forgotten", UNNAMED},
    {"one maximum for all queries", "softmax-global-max"},
    {"weights of the first query for all", "merge-first-query"},
    {"written into the first part", UNNAMED},
    {"weights in half precision", UNNAMED},
    {"output clamped to 1e5", UNNAMED},
    {"lse capped at 88", UNNAMED},
    {"difference capped at 20", UNNAMED},
    {"kept from the first call", UNNAMED},
    {"arguments unchecked", UNNAMED},
    {"only the queries checked", UNNAMED},
    {"right: double accumulation", RIGHT},
    {"right: by the sigmoid of the difference", RIGHT},
    {"right: log1p of the smaller", RIGHT},
    {"right: by the formulas to the letter", RIGHT},
    {"right: exp2 throughout", RIGHT},
    {"right: whole matrices at a time", RIGHT},
    {"right: channel by channel", RIGHT},
    {"right: parts exchanged first", RIGHT},
};

constexpr float INF = std::numeric_limits<float>::infinity();

Partial merged(const Partial& a, const Partial& b) {
  const Index queries = a.lse.size();
  const Index channels = a.output.cols();
  Partial result{Matrix::Zero(queries, channels), Vector::Constant(queries, -INF)};
  const float base = plays("merge-base2") ? 0.69314718f : 1.0f;
  float highest = -INF;
  for (Index i = 0; i < queries; ++i) highest = std::max({highest, a.lse(i), b.lse(i)});

  for (Index i = 0; i < queries; ++i) {
    if (plays("last query forgotten") && queries > 1 && i == queries - 1) continue;
    const Index from = plays("weights of the first query for all") ? 0 : i;
    float la = a.lse(from);
    float lb = b.lse(from);
    if (plays("lse capped at 88")) {
      la = std::min(la, 88.0f);
      lb = std::min(lb, 88.0f);
    }
    if (plays("difference capped at 20") && la > -INF && lb > -INF) {
      if (la > lb) lb = std::max(lb, la - 20.0f);
      if (lb > la) la = std::max(la, lb - 20.0f);
    }
    if (plays("-1e4 taken for empty")) {
      if (la < -9990.0f) la = -INF;
      if (lb < -9990.0f) lb = -INF;
    }
    const bool guarded = !plays("merge-empty-nan");
    if (guarded && la == -INF && lb == -INF) {
      if (plays("empty lse returned as -1e30")) result.lse(i) = -1e30f;
      if (plays("merge-empty-nan where both are empty")) result.lse(i) = la - lb;
      if (plays("0 times NaN where both are empty")) result.output.row(i) = 0.0f * a.output.row(i);
      continue;
    }
    if (plays("an empty part wins") && (la == -INF || lb == -INF)) continue;
    if (plays("first empty returns the second but not its lse") && la == -INF) {
      result.output.row(i) = b.output.row(i);
      continue;
    }
    if (plays("merge-empty-nan where the first is empty") && la == -INF) {
      result.output.row(i) = (b.output.row(i).array() + (la - la)).matrix();
      result.lse(i) = la - la;
      continue;
    }
    float reference = std::max(la, lb);
    if (plays("merge-no-max") || plays("weights not divided and not measured against the maximum")) reference = 0.0f;
    if (plays("merge-max-of-first")) reference = la > -INF ? la : lb;
    if (plays("one maximum for all queries")) reference = highest;
    if (plays("merge-winner-takes-all")) reference = std::max(la, lb);
    float of_a = std::exp((la - reference) * base);
    float of_b = std::exp((lb - reference) * base);
    const float sum = of_a + of_b;
    result.lse(i) = reference + std::log(sum) / base;

    if (plays("merge-no-max in the weights alone")) {
      of_a = std::exp(la);
      of_b = std::exp(lb);
    }
    if (plays("merge-winner-takes-all")) {
      of_a = la >= lb ? 1.0f : 0.0f;
      of_b = 1.0f - of_a;
    }
    if (plays("merge-swapped")) std::swap(of_a, of_b);
    float total = of_a + of_b;
    if (plays("weights not divided") || plays("weights not divided and not measured against the maximum")) {
      total = 1.0f;
    }
    float wa = of_a / total;
    float wb = of_b / total;
    if (plays("merge-average")) wa = wb = la == -INF || lb == -INF ? 1.0f : 0.5f;
    if (plays("merge-average") && la == -INF) wa = 0.0f;
    if (plays("merge-average") && lb == -INF) wb = 0.0f;
    if (plays("merge-sum")) {
      wa = la == -INF ? 0.0f : 1.0f;
      wb = lb == -INF ? 0.0f : 1.0f;
    }
    if (plays("merge-weighted-by-lse") && la > -INF && lb > -INF) {
      wa = la / (la + lb);
      wb = lb / (la + lb);
    }
    if (plays("merge-lse-sum") || plays("merge-lse-sum, in the lse alone")) {
      result.lse(i) = la == -INF ? lb : lb == -INF ? la : la + lb;
      if (plays("merge-lse-sum")) {
        wa = la == -INF ? 0.0f : std::exp(la - result.lse(i));
        wb = lb == -INF ? 0.0f : std::exp(lb - result.lse(i));
      }
    }
    if (plays("merge-unnormalised")) {  // takes the outputs for sums that nobody has divided yet
      wa = std::exp(-result.lse(i) + std::max(la, lb) - la) * of_a;
      wb = std::exp(-result.lse(i) + std::max(la, lb) - lb) * of_b;
      if (la == -INF) wa = 0.0f;
      if (lb == -INF) wb = 0.0f;
    }
    if (plays("sigmoid without a guard")) {
      wb = 1.0f / (1.0f + std::exp(la - lb));
      wa = 1.0f - wb;
      result.lse(i) = la - std::log(1.0f / (1.0f + std::exp(lb - la)));
    }
    if (plays("weights in half precision")) {
      wa = std::round(wa * 2048.0f) / 2048.0f;
      wb = 1.0f - wa;
    }
    const bool leaks = plays("merge-empty-nan by 0 times NaN") || plays("merge-empty-nan");
    if (wa != 0.0f || la > -INF || leaks) result.output.row(i) += wa * a.output.row(i);
    if (wb != 0.0f || lb > -INF || leaks || plays("0 times NaN in the second part alone")) {
      result.output.row(i) += wb * b.output.row(i);
    }
    if (plays("last channel forgotten") && channels > 1) result.output(i, channels - 1) = a.output(i, channels - 1);
    if (plays("channels beyond 64 forgotten") && channels > 64) result.output.row(i).tail(channels - 64).setZero();
    if (plays("output clamped to 1e5")) result.output.row(i) = result.output.row(i).cwiseMax(-1e5f).cwiseMin(1e5f);

    if (plays("merge-lse-max")) result.lse(i) = std::max(la, lb);
    if (plays("merge-lse-average") && la > -INF && lb > -INF) result.lse(i) = 0.5f * (la + lb);
    if (plays("lse-missing-max")) result.lse(i) = std::log(sum);
    if (plays("lse-base2")) result.lse(i) *= 1.44269504f;
  }
  if (plays("written into the first part")) const_cast<Partial&>(a).output = result.output;
  return result;
}

// Correct answers that look unlike the solution.
Partial in_double(const Partial& a, const Partial& b, bool transposed) {
  Partial result{Matrix::Zero(a.output.rows(), a.output.cols()), Vector::Constant(a.lse.size(), -INF)};
  const auto one = [&](Index i, Index d) {
    const double la = a.lse(i);
    const double lb = b.lse(i);
    const double high = std::max(la, lb);
    if (std::isinf(high)) return 0.0;
    const double wa = std::exp(la - high);
    const double wb = std::exp(lb - high);
    double sum = 0.0;
    if (wa > 0.0) sum += wa * static_cast<double>(a.output(i, d));
    if (wb > 0.0) sum += wb * static_cast<double>(b.output(i, d));
    return sum / (wa + wb);
  };
  if (transposed) {
    for (Index d = 0; d < a.output.cols(); ++d)
      for (Index i = a.output.rows(); i-- > 0;) result.output(i, d) = static_cast<float>(one(i, d));
  } else {
    for (Index i = 0; i < a.output.rows(); ++i)
      for (Index d = 0; d < a.output.cols(); ++d) result.output(i, d) = static_cast<float>(one(i, d));
  }
  for (Index i = 0; i < a.lse.size(); ++i) {
    const double high = std::max(a.lse(i), b.lse(i));
    if (std::isinf(high)) continue;
    result.lse(i) =
        static_cast<float>(high + std::log(std::exp(a.lse(i) - high) + std::exp(static_cast<double>(b.lse(i)) - high)));
  }
  return result;
}

Partial by_hand(const Partial& a, const Partial& b) {
  Partial result{Matrix::Zero(a.output.rows(), a.output.cols()), Vector::Constant(a.lse.size(), -INF)};
  for (Index i = 0; i < a.lse.size(); ++i) {
    const float la = a.lse(i);
    const float lb = b.lse(i);
    if (la == -INF && lb == -INF) continue;
    if (la == -INF || lb == -INF) {
      const Partial& only = la == -INF ? b : a;
      result.output.row(i) = only.output.row(i);
      result.lse(i) = only.lse(i);
      continue;
    }
    if (plays("right: by the sigmoid of the difference")) {
      const float of_b = 1.0f / (1.0f + std::exp(la - lb));
      const float of_a = 1.0f / (1.0f + std::exp(lb - la));
      result.output.row(i) = of_a * a.output.row(i) + of_b * b.output.row(i);
      result.lse(i) = la > lb ? la - std::log(of_a) : lb - std::log(of_b);
    } else if (plays("right: log1p of the smaller")) {
      const float high = std::max(la, lb);
      const float low = std::min(la, lb);
      result.lse(i) = high + std::log1p(std::exp(low - high));
      const float share = std::exp(low - high) / (1.0f + std::exp(low - high));
      const Partial& heavy = la >= lb ? a : b;
      const Partial& light = la >= lb ? b : a;
      result.output.row(i) = heavy.output.row(i) + share * (light.output.row(i) - heavy.output.row(i));
    } else if (plays("right: exp2 throughout")) {
      const float log2e = 1.44269504f;
      const float high = std::max(la, lb);
      const float wa = std::exp2((la - high) * log2e);
      const float wb = std::exp2((lb - high) * log2e);
      result.lse(i) = high + std::log2(wa + wb) / log2e;
      result.output.row(i) = (a.output.row(i) * wa + b.output.row(i) * wb) / (wa + wb);
    } else {  // by the formulas to the letter
      const float high = std::max(la, lb);
      result.lse(i) = high + std::log(std::exp(la - high) + std::exp(lb - high));
      result.output.row(i) =
          std::exp(la - result.lse(i)) * a.output.row(i) + std::exp(lb - result.lse(i)) * b.output.row(i);
    }
  }
  return result;
}

Partial whole_matrices(const Partial& a, const Partial& b) {
  const Vector high = a.lse.cwiseMax(b.lse);
  const Vector safe = (high.array() == -INF).select(0.0f, high);
  const Vector wa = (a.lse - safe).array().exp();
  const Vector wb = (b.lse - safe).array().exp();
  const Vector sum = wa + wb;
  const Vector divisor = (sum.array() == 0.0f).select(1.0f, sum);
  const Index channels = a.output.cols();
  const Matrix from_a = (wa.array() == 0.0f).replicate(1, channels).select(0.0f, a.output);
  const Matrix from_b = (wb.array() == 0.0f).replicate(1, channels).select(0.0f, b.output);
  Partial result;
  result.output = from_a.array().colwise() * (wa.array() / divisor.array()) +
                  from_b.array().colwise() * (wb.array() / divisor.array());
  result.lse = high.array() + sum.array().log();
  return result;
}

}  // namespace

Partial merge_partials(const Partial& a, const Partial& b) {
  if (plays("arguments unchecked")) {
    if (a.lse.size() != a.output.rows() || b.output.rows() != a.output.rows() || b.output.cols() != a.output.cols() ||
        b.lse.size() != a.lse.size()) {
      return {};
    }
  } else if (plays("only the queries checked") && b.output.rows() == a.output.rows() && b.lse.size() == a.lse.size() &&
             a.lse.size() == a.output.rows() && a.output.cols() != b.output.cols()) {
    return {};
  } else {
    check_partials(a, b);
  }
  if (plays("kept from the first call")) {
    static std::vector<Partial> kept;
    for (const Partial& old : kept) {
      if (old.lse.size() == a.lse.size() && old.output.cols() == a.output.cols()) {
        Partial result = merged(a, b);
        result.output.col(0) = old.output.col(0);
        return result;
      }
    }
    if (a.output.cols() > 0) kept.push_back(merged(a, b));
    return merged(a, b);
  }
  if (plays("right: double accumulation")) return in_double(a, b, false);
  if (plays("right: channel by channel")) return in_double(a, b, true);
  if (plays("right: parts exchanged first")) return merged(b, a);
  if (plays("right: whole matrices at a time")) return whole_matrices(a, b);
  if (corpus::name().starts_with("right:")) return by_hand(a, b);
  return merged(a, b);
}

}  // namespace flashkata
