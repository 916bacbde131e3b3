// Ranks: processes with memory of their own, numbered from 0, that work on one problem and send each other parts of it.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>

namespace flashkata {

/// What was to be exchanged could not be: somebody did not come in time, has gone, or brought another size. The
/// communicator that threw it is of no use any more.
class CommunicationError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An exchange that is under way. Until wait() has returned, what is being sent must not change, what is being received
/// must not be looked at, and the memory of both must stay where it is. The destructor waits too, where nobody has; but
/// not if it is an exception that destroys it.
class Transfer {
 public:
  Transfer() = default;
  /// For back ends: `finish` waits, `abandon` is called in its place on the way out of an exception.
  Transfer(std::function<void()> finish, std::function<void()> abandon);
  Transfer(Transfer&& other) noexcept;
  Transfer& operator=(Transfer&& other) noexcept;
  ~Transfer();

  /// Returns when everything has been sent and received. A second call does nothing.
  void wait();

 private:
  std::function<void()> finish_;
  std::function<void()> abandon_;
};

/// One rank's end of the line. All ranks of a group make the same calls, in the same order, with the same sizes.
///
/// No call waits for ever: who waits longer than the back end's time limit throws CommunicationError, which says for
/// whom and for what. Sizes that differ between ranks end in the same way. A back end says where the memory lies (host
/// or device). Numbers are added in float, whatever kind of numbers they will be rounded to: so there are sums of
/// floats only, while bytes of any kind may be moved.
class Communicator {
 public:
  virtual ~Communicator() = default;
  Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  /// One step around the ring, begun and not waited for: `outgoing` goes to rank() + 1, `incoming` comes from
  /// rank() - 1, both modulo size(). They must not overlap. Of several exchanges under way at once, the first that a
  /// rank has begun meets the first that its neighbour has begun.
  [[nodiscard]] Transfer shift(std::span<const std::byte> outgoing, std::span<std::byte> incoming);
  [[nodiscard]] Transfer shift(std::span<const float> outgoing, std::span<float> incoming) {
    return shift(std::as_bytes(outgoing), std::as_writable_bytes(incoming));
  }

  /// What every rank has, by rank: all[r * n .. (r + 1) * n) is rank r's `mine`, n = mine.size().
  void all_gather(std::span<const std::byte> mine, std::span<std::byte> all);
  void all_gather(std::span<const float> mine, std::span<float> all) {
    all_gather(std::as_bytes(mine), std::as_writable_bytes(all));
  }

  /// The way back of all_gather: `mine` is the sum, over all ranks, of what they have in all[r * n .. (r + 1) * n),
  /// where r is this rank and n = mine.size().
  void reduce_scatter(std::span<const float> all, std::span<float> mine);

  /// Replaces `values` by their sums over all ranks.
  void all_reduce(std::span<float> values);

  /// Returns when every rank has called it.
  void barrier();

 protected:
  // What back ends do, once the arguments have been checked.
  virtual Transfer start_shift(std::span<const std::byte> outgoing, std::span<std::byte> incoming) = 0;
  virtual void gather(std::span<const std::byte> mine, std::span<std::byte> all) = 0;
  virtual void sum_and_scatter(std::span<const float> all, std::span<float> mine) = 0;
  virtual void sum(std::span<float> values) = 0;
  virtual void meet() = 0;
};

/// A group of one: what is sent comes back to the sender. Needs no back end.
class OneRank : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }

 protected:
  Transfer start_shift(std::span<const std::byte> outgoing, std::span<std::byte> incoming) override;
  void gather(std::span<const std::byte> mine, std::span<std::byte> all) override;
  void sum_and_scatter(std::span<const float> all, std::span<float> mine) override;
  void sum(std::span<float> values) override;
  void meet() override;
};

}  // namespace flashkata
