#pragma once

#include "common/attention/not_implemented.hpp"
#include "phase2_forward/vector.hpp"
#include "score_stream.hpp"

namespace flashkata {

struct OnlineSoftmax {
  Matrix probabilities;  // [rows, columns]; a row adds up to 1, or is all 0 where every score is -inf
  Vector lse;            // [rows]; log of the sum of exp(scores), natural logarithm; -inf where every score is -inf
};

/// The softmax of each row, and its log-sum-exp, from scores that pass by once (Milakov and Gimelshein 2018, alg. 3):
///
///     probabilities(i, j) = exp(scores(i, j) - lse(i)),    lse(i) = log(sum over k of exp(scores(i, k)))
///
/// scores  [rows, columns] in chunks of any widths; finite, up to 1e5 in either direction, or -inf. Whole chunks and
///         whole rows may be -inf.
/// Every chunk is taken once, and after each of them the log-sum-exp of all that has passed is reported.
/// Throws std::invalid_argument naming scores if somebody has read from the stream before.
OnlineSoftmax online_softmax(ScoreStream& scores);

}  // namespace flashkata
