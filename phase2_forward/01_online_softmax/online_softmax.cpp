#include "online_softmax.hpp"

namespace flashkata {

OnlineSoftmax online_softmax(ScoreStream& scores) {
  require(scores.unread(), "scores", "a stream that was read from", "a fresh one");
  // TODO, about 20 lines: for each row a running maximum and a running sum, chunk by chunk.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
