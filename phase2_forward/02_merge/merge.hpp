#pragma once

#include "common/attention/not_implemented.hpp"
#include "phase2_forward/vector.hpp"

namespace flashkata {

/// Attention of Sq queries over some of the keys: what there is to know about those keys once they are gone.
struct Partial {
  Matrix output;  // [Sq, Dv]: the average of those values under the softmax over those keys alone
  Vector lse;     // [Sq]: log of the sum of exp(scores) over those keys; -inf if the query may attend to none of them
};

/// Attention over the keys of `a` and the keys of `b`, which have none in common, from the two parts alone:
///
///     lse(i)    = log(exp(a.lse(i)) + exp(b.lse(i)))
///     output(i) = exp(a.lse(i) - lse(i)) a.output(i) + exp(b.lse(i) - lse(i)) b.output(i)
///
/// lse is finite, up to 1e4 in either direction, or -inf. A part that is empty for a query (lse -inf) counts for
/// nothing there, whatever its output holds, NaN included. If both are, output is 0 and lse is -inf. Throws
/// std::invalid_argument naming a or b, its shapes and the shapes expected: [Sq, Dv] and [Sq] in both.
Partial merge_partials(const Partial& a, const Partial& b);

/// The checks that merge_partials() promises.
inline void check_partials(const Partial& a, const Partial& b) {
  const auto shapes = [](const Partial& part) {
    return "output " + to_text(Shape<2>{part.output.rows(), part.output.cols()}) + " and lse " +
           to_text(Shape<1>{part.lse.size()});
  };
  require(a.lse.size() == a.output.rows(), "a", shapes(a), "output [Sq, Dv] and lse [Sq]");
  require(b.output.rows() == a.output.rows() && b.output.cols() == a.output.cols() && b.lse.size() == a.lse.size(), "b",
          shapes(b), shapes(a) + ", as a");
}

}  // namespace flashkata
