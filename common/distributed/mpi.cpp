#include "common/distributed/mpi.hpp"

#include <mpi.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

namespace flashkata {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int RING_TAG = 1;
constexpr int CALL_TAG = 2;

std::string text_of(int error) {
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  MPI_Error_string(error, text.data(), &length);
  return {text.data(), static_cast<std::size_t>(length)};
}

std::string bytes(std::int64_t count) { return std::to_string(count) + (count == 1 ? " byte" : " bytes"); }

// MPI counts with an int.
int count_of(std::size_t elements) {
  if (elements > static_cast<std::size_t>(std::numeric_limits<int>::max())) {
    throw std::invalid_argument("size: got " + std::to_string(elements) + " elements in one call, allowed are " +
                                std::to_string(std::numeric_limits<int>::max()));
  }
  return static_cast<int>(elements);
}

class MpiCommunicator : public Communicator {
 public:
  explicit MpiCommunicator(std::chrono::milliseconds limit) : limit_(limit) {
    int initialized = 0;
    MPI_Initialized(&initialized);
    if (initialized == 0) {
      int threads = 0;  // there may be others, but only the one that called this calls MPI
      if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &threads) != MPI_SUCCESS) {
        throw CommunicationError("MPI could not be started");
      }
      ends_mpi_ = true;
    }
    check(MPI_Comm_dup(MPI_COMM_WORLD, &group_), "connecting");  // nobody else's messages arrive here
    MPI_Comm_set_errhandler(group_, MPI_ERRORS_RETURN);
    MPI_Comm_rank(group_, &rank_);
    MPI_Comm_size(group_, &size_);
  }

  ~MpiCommunicator() override {
    if (broken_) return;  // MPI_Finalize would wait for ranks that do not come
    MPI_Comm_free(&group_);
    if (ends_mpi_) MPI_Finalize();
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }

 protected:
  Transfer start_shift(std::span<const std::byte> outgoing, std::span<std::byte> incoming) override {
    const int next = (rank_ + 1) % size_;
    const int previous = (rank_ + size_ - 1) % size_;
    const std::string step = "shift " + std::to_string(++shifts_);
    // Receiving first: what arrives finds its place waiting.
    const auto requests = std::make_shared<std::array<MPI_Request, 2>>();
    check(MPI_Irecv(incoming.data(), count_of(incoming.size()), MPI_BYTE, previous, RING_TAG, group_, &(*requests)[0]),
          step);
    check(MPI_Isend(outgoing.data(), count_of(outgoing.size()), MPI_BYTE, next, RING_TAG, group_, &(*requests)[1]),
          step);
    const auto expected = static_cast<std::int64_t>(incoming.size());
    const auto sent = static_cast<std::int64_t>(outgoing.size());
    return {[this, requests, step, previous, next, expected, sent] {
              MPI_Status status{};
              wait_for((*requests)[0], status, [&](int error) {
                const std::string wanted = bytes(expected) + " from rank " + std::to_string(previous);
                return error == MPI_ERR_TRUNCATE ? step + ": expected " + wanted + ", and more arrived"
                                                 : step + ": waiting for " + wanted;
              });
              int arrived = 0;
              MPI_Get_count(&status, MPI_BYTE, &arrived);
              if (arrived != expected) {
                fail(step + ": expected " + bytes(expected) + " from rank " + std::to_string(previous) + ", but " +
                     bytes(arrived) + " arrived");
              }
              wait_for((*requests)[1], status, [&](int) {
                return step + ": rank " + std::to_string(next) + " has not taken the " + bytes(sent) +
                       " that are for it";
              });
            },
            [this, requests] {  // an exception is on its way: the memory goes, so nothing may arrive any more
              broken_ = true;
              MPI_Cancel(&(*requests)[0]);
            }};
  }

  void gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    agree("all_gather", 1, mine.size());
    MPI_Request request = MPI_REQUEST_NULL;
    const int count = count_of(mine.size());
    check(MPI_Iallgather(mine.data(), count, MPI_BYTE, all.data(), count, MPI_BYTE, group_, &request), "all_gather");
    wait_for_all(request, "all_gather");
  }

  void sum_and_scatter(std::span<const float> all, std::span<float> mine) override {
    agree("reduce_scatter", 2, mine.size());
    MPI_Request request = MPI_REQUEST_NULL;
    check(
        MPI_Ireduce_scatter_block(all.data(), mine.data(), count_of(mine.size()), MPI_FLOAT, MPI_SUM, group_, &request),
        "reduce_scatter");
    wait_for_all(request, "reduce_scatter");
  }

  void sum(std::span<float> values) override {
    agree("all_reduce", 3, values.size());
    MPI_Request request = MPI_REQUEST_NULL;
    check(MPI_Iallreduce(MPI_IN_PLACE, values.data(), count_of(values.size()), MPI_FLOAT, MPI_SUM, group_, &request),
          "all_reduce");
    wait_for_all(request, "all_reduce");
  }

  void meet() override { agree("barrier", 4, 0); }

 private:
  [[noreturn]] void fail(const std::string& what) {
    broken_ = true;
    throw CommunicationError("rank " + std::to_string(rank_) + " of " + std::to_string(size_) + ", " + what);
  }

  void check(int error, const std::string& what) {
    if (error != MPI_SUCCESS) fail(what + ": " + text_of(error));
  }

  // MPI_Wait with a limit. More ranks than cores: who waits lets the others work. It soon sleeps: asking
  // again and again, seven of eight ranks would take more time than the one that works.
  template <typename What>
  void wait_for(MPI_Request& request, MPI_Status& status, const What& what) {
    const auto begin = Clock::now();
    for (int tries = 0;; ++tries) {
      int done = 0;
      const int error = MPI_Test(&request, &done, &status);
      if (error != MPI_SUCCESS) {
        int kind = MPI_SUCCESS;
        MPI_Error_class(error, &kind);
        fail(what(kind) + (kind == MPI_ERR_TRUNCATE ? "" : ": " + text_of(error)));
      }
      if (done != 0) return;
      if (Clock::now() - begin > limit_) {
        fail(what(MPI_SUCCESS) + " since " + std::to_string(limit_.count()) + " ms");
      }
      if (tries < 20) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
    }
  }

  void wait_for_all(MPI_Request& request, const std::string& what) {
    MPI_Status status{};
    wait_for(request, status, [&](int) { return what + ": waiting for the other ranks"; });
  }

  // Collective calls of different kinds or sizes would hang, or write where they should not. So every rank first tells
  // every other what it is about to do, in a small message each; and who waits knows for whom.
  void agree(const std::string& what, std::int64_t kind, std::size_t size) {
    struct Call {
      std::int64_t kind, elements;
    };
    const Call mine{kind, static_cast<std::int64_t>(size)};
    const auto ranks = static_cast<std::size_t>(size_);
    std::vector<Call> calls(ranks);
    std::vector<MPI_Request> arriving(ranks, MPI_REQUEST_NULL), leaving(ranks, MPI_REQUEST_NULL);
    for (int other = 0; other < size_; ++other) {
      const auto r = static_cast<std::size_t>(other);
      if (other == rank_) continue;
      check(MPI_Irecv(&calls[r], 2, MPI_INT64_T, other, CALL_TAG, group_, &arriving[r]), what);
      check(MPI_Isend(&mine, 2, MPI_INT64_T, other, CALL_TAG, group_, &leaving[r]), what);
    }
    try {
      MPI_Status status{};
      for (int other = 0; other < size_; ++other) {
        const auto waiting = [&](int) { return what + ": waiting for rank " + std::to_string(other); };
        wait_for(arriving[static_cast<std::size_t>(other)], status, waiting);
        wait_for(leaving[static_cast<std::size_t>(other)], status, waiting);
      }
    } catch (const CommunicationError&) {  // the memory goes, so nothing may arrive any more
      for (MPI_Request& request : arriving) {
        if (request != MPI_REQUEST_NULL) MPI_Cancel(&request);
      }
      throw;
    }
    for (int other = 0; other < size_; ++other) {
      const Call& call = calls[static_cast<std::size_t>(other)];
      if (other == rank_) continue;
      if (call.kind != mine.kind) fail(what + ": rank " + std::to_string(other) + " makes another call");
      if (call.elements != mine.elements) {
        fail(what + ": sizes differ: this rank brought " + std::to_string(mine.elements) + ", rank " +
             std::to_string(other) + " " + std::to_string(call.elements));
      }
    }
  }

  std::chrono::milliseconds limit_;
  MPI_Comm group_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  std::int64_t shifts_ = 0;
  bool ends_mpi_ = false;
  bool broken_ = false;
};

}  // namespace

std::unique_ptr<Communicator> connect_by_mpi(std::chrono::milliseconds limit) {
  return std::make_unique<MpiCommunicator>(limit);
}

void abort_all_ranks(int code) {
  MPI_Abort(MPI_COMM_WORLD, code);
  std::_Exit(code);
}

}  // namespace flashkata
