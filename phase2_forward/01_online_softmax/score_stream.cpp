#include "score_stream.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace flashkata {

ScoreStream::ScoreStream(const Matrix& scores, std::vector<Index> widths)
    : scores_(scores), widths_(std::move(widths)) {
  Index sum = 0;
  Index widest = 0;
  for (const Index width : widths_) {
    require(width >= 1, "widths", to_text(widths_), "numbers of at least 1");
    sum += width;
    widest = std::max(widest, width);
  }
  require(sum == columns(), "widths", to_text(widths_), "a sum of " + std::to_string(columns()) + ", all the columns");
  window_.resize(rows(), widest);
}

ConstMatrixView ScoreStream::next() {
  if (!more()) {
    throw std::logic_error("next() was called after the last of " + std::to_string(taken_) +
                           " chunks: ask more() first");
  }
  if (reports_.size() != taken_) {
    throw std::logic_error("chunk " + std::to_string(taken_) + " was asked for before report() was called for chunk " +
                           std::to_string(taken_ - 1));
  }
  const Index width = widths_[taken_++];
  window_.setConstant(std::numeric_limits<float>::quiet_NaN());
  window_.leftCols(width) = scores_.middleCols(passed_, width);
  passed_ += width;
  return window_.leftCols(width);
}

void ScoreStream::report(const Vector& lse) {
  if (reports_.size() + 1 != taken_) {
    throw std::logic_error("report() was called " + std::to_string(reports_.size() + 1) + " times for " +
                           std::to_string(taken_) + " chunks");
  }
  require(lse.size() == rows(), "lse", lse.size(), std::to_string(rows()) + " numbers, one for each row");
  reports_.push_back(lse);
}

}  // namespace flashkata
