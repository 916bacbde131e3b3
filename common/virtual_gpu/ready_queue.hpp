// The threads of a block that can run: first in, first out, or in a random order that a seed repeats.
#pragma once

#include <bit>
#include <cstdint>
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
    state_ = seed;
  }

  bool empty() const { return count_ == 0; }

  void push(Thread* thread) {
    ring_[(first_ + count_) & (ring_.size() - 1)] = thread;
    ++count_;
  }

  Thread* pop() {
    if (random_) std::swap(ring_[first_], ring_[(first_ + random() % count_) & (ring_.size() - 1)]);
    Thread* thread = ring_[first_];
    first_ = (first_ + 1) & (ring_.size() - 1);
    --count_;
    return thread;
  }

 private:
  /// SplitMix64 (Steele, Lea, Flood 2014).
  std::uint64_t random() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  std::vector<Thread*> ring_;  // its size is a power of two
  std::size_t first_ = 0;
  std::size_t count_ = 0;
  bool random_ = false;
  std::uint64_t state_ = 0;
};

}  // namespace flashkata::virtual_gpu
