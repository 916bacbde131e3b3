// The threads of a block that can run: first in, first out, or in a random order that a seed repeats.
#pragma once

#include <bit>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

namespace flashkata::virtual_gpu {

struct Thread;

class ReadyQueue {
 public:
  /// Empties it; `seed` 0 means first in, first out.
  void reset(std::size_t capacity, std::uint64_t seed) {
    if (ring_.size() < capacity) ring_.resize(std::bit_ceil(capacity));
    first_ = count_ = 0;
    random_ = seed != 0;
    if (random_) generator_.seed(seed);
  }

  bool empty() const { return count_ == 0; }

  void push(Thread* thread) {
    ring_[(first_ + count_) & (ring_.size() - 1)] = thread;
    ++count_;
  }

  Thread* pop() {
    if (random_) std::swap(ring_[first_], ring_[(first_ + generator_() % count_) & (ring_.size() - 1)]);
    Thread* thread = ring_[first_];
    first_ = (first_ + 1) & (ring_.size() - 1);
    --count_;
    return thread;
  }

  bool is_random() const { return random_; }

 private:
  std::vector<Thread*> ring_;  // its size is a power of two
  std::size_t first_ = 0;
  std::size_t count_ = 0;
  bool random_ = false;
  std::mt19937_64 generator_;
};

}  // namespace flashkata::virtual_gpu
