// Work shared out over threads: tiles of a forward or backward pass, which know nothing of each other.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "common/attention/view.hpp"

namespace flashkata {

/// Threads that wait for a job, because starting one takes as long as a small tile.
class Workers {
 public:
  static Workers& shared() {
    static Workers workers;
    return workers;
  }

  /// Runs `job` here and, at the same time, on up to `helpers` other threads. Returns when all of them are done.
  void run(std::size_t helpers, const std::function<void()>& job) {
    const std::lock_guard one_job_at_a_time(callers_);
    while (threads_.size() < helpers) threads_.emplace_back([this] { serve(); });
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      places_ = helpers;
    }
    wake_.notify_all();
    job();
    std::unique_lock lock(mutex_);
    places_ = 0;  // who has not woken up by now is not needed any more
    done_.wait(lock, [this] { return working_ == 0; });
  }

 private:
  ~Workers() {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void serve() {
    std::unique_lock lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return closing_ || places_ > 0; });
      if (closing_) return;
      --places_;
      ++working_;
      lock.unlock();
      (*job_)();
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_;
  std::mutex mutex_;  // guards the five below
  std::condition_variable wake_, done_;
  const std::function<void()>* job_ = nullptr;
  std::size_t places_ = 0;   // how many more threads may join the job
  std::size_t working_ = 0;  // how many have
  bool closing_ = false;
  std::vector<std::thread> threads_;
};

/// Calls body(0), body(1), ..., body(count - 1), each once, on up to `threads` threads (0: as many as there are cores),
/// the calling one among them. With threads = 1 all calls are made here, in order. Returns when all are done; if one of
/// them throws, no new ones are begun, and the exception comes out here.
inline void parallel_for(Index count, int threads, const std::function<void(Index)>& body) {
  const Index cores = std::max<Index>(1, std::thread::hardware_concurrency());
  const Index wanted = std::min(count, threads == 0 ? cores : Index{threads});
  std::atomic<Index> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto job = [&] {
    try {
      for (Index i = next++; i < count; i = next++) body(i);
    } catch (...) {
      next = count;
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
  if (wanted <= 1) {
    job();
  } else {
    Workers::shared().run(static_cast<std::size_t>(wanted - 1), job);
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace flashkata
