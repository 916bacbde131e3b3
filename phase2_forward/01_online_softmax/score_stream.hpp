// Scores that pass by once. Given to you; the suite makes the streams.
#pragma once

#include <string>
#include <vector>

#include "common/attention/not_implemented.hpp"
#include "phase2_forward/vector.hpp"

namespace flashkata {

/// A matrix of scores [rows, columns] that arrives a chunk of columns at a time, from left to right, each chunk once:
///
///     while (scores.more()) {
///       const ConstMatrixView chunk = scores.next();  // [rows, width]; widths differ from chunk to chunk
///       ...
///       scores.report(lse);                           // [rows]
///     }
class ScoreStream {
 public:
  /// The columns of `scores`, cut into chunks of these widths. Throws std::invalid_argument unless each is at least 1
  /// and they add up to the number of columns.
  ScoreStream(const Matrix& scores, std::vector<Index> widths);

  Index rows() const { return scores_.rows(); }
  Index columns() const { return scores_.cols(); }  // of all chunks together

  /// Is there another chunk?
  bool more() const { return taken_ < widths_.size(); }

  /// The next chunk, [rows, width]. Its memory is overwritten as soon as the next one is asked for: there is no way
  /// back. Throws std::logic_error if there is none, or if nothing was reported on the one before.
  ConstMatrixView next();

  /// After each chunk: the log-sum-exp of each row over everything that has passed so far, [rows]. Somebody at the
  /// other end is watching. Throws std::logic_error if there is no chunk that it could be about.
  void report(const Vector& lse);

  /// Has nobody asked for a chunk yet?
  bool unread() const { return taken_ == 0; }

  /// What was reported, one [rows] for each chunk. For the suite.
  const std::vector<Vector>& reports() const { return reports_; }

 private:
  Matrix scores_;
  std::vector<Index> widths_;
  Matrix window_;          // [rows, widest chunk]: what can be seen of them
  std::size_t taken_ = 0;  // chunks handed out
  Index passed_ = 0;       // columns handed out
  std::vector<Vector> reports_;
};

}  // namespace flashkata
