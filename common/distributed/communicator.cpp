#include "common/distributed/communicator.hpp"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <utility>

namespace flashkata {
namespace {

void check(bool ok, const std::string& argument, std::size_t got, const std::string& allowed) {
  if (!ok) throw std::invalid_argument(argument + ": got " + std::to_string(got) + " long, allowed is " + allowed);
}

}  // namespace

Transfer::Transfer(std::function<void()> finish, std::function<void()> abandon)
    : finish_(std::move(finish)), abandon_(std::move(abandon)) {}

Transfer::Transfer(Transfer&& other) noexcept
    : finish_(std::exchange(other.finish_, nullptr)), abandon_(std::exchange(other.abandon_, nullptr)) {}

Transfer& Transfer::operator=(Transfer&& other) noexcept {
  const Transfer before = std::move(*this);  // its destructor waits, when the new one is in place
  finish_ = std::exchange(other.finish_, nullptr);
  abandon_ = std::exchange(other.abandon_, nullptr);
  return *this;
}

Transfer::~Transfer() {
  if (!finish_) return;
  if (std::uncaught_exceptions() > 0) {
    if (abandon_) abandon_();
    return;
  }
  try {
    wait();
  } catch (const std::exception& error) {  // a destructor cannot pass it on, and the memory is about to go
    std::fprintf(stderr, "a transfer that nobody waited for: %s\n", error.what());
    std::terminate();
  }
}

void Transfer::wait() {
  abandon_ = nullptr;
  if (const auto finish = std::exchange(finish_, nullptr)) finish();
}

Transfer Communicator::shift(std::span<const std::byte> outgoing, std::span<std::byte> incoming) {
  const std::less<const std::byte*> before;
  const bool apart = outgoing.empty() || incoming.empty() ||
                     !before(outgoing.data(), incoming.data() + incoming.size()) ||
                     !before(incoming.data(), outgoing.data() + outgoing.size());
  if (!apart) throw std::invalid_argument("incoming: got memory that overlaps outgoing, allowed is memory of its own");
  return start_shift(outgoing, incoming);
}

void Communicator::all_gather(std::span<const std::byte> mine, std::span<std::byte> all) {
  const std::size_t want = mine.size() * static_cast<std::size_t>(size());
  check(all.size() == want, "all", all.size(), std::to_string(want) + ", size() times mine");
  gather(mine, all);
}

void Communicator::reduce_scatter(std::span<const float> all, std::span<float> mine) {
  const std::size_t want = mine.size() * static_cast<std::size_t>(size());
  check(all.size() == want, "all", all.size(), std::to_string(want) + ", size() times mine");
  sum_and_scatter(all, mine);
}

void Communicator::all_reduce(std::span<float> values) { sum(values); }

void Communicator::barrier() { meet(); }

Transfer OneRank::start_shift(std::span<const std::byte> outgoing, std::span<std::byte> incoming) {
  if (outgoing.size() != incoming.size()) {
    throw CommunicationError("shift: rank 0 sends " + std::to_string(outgoing.size()) +
                             " bytes to itself and expects " + std::to_string(incoming.size()));
  }
  return {[=] { std::copy(outgoing.begin(), outgoing.end(), incoming.begin()); }, nullptr};
}

void OneRank::gather(std::span<const std::byte> mine, std::span<std::byte> all) {
  std::copy(mine.begin(), mine.end(), all.begin());
}

void OneRank::sum_and_scatter(std::span<const float> all, std::span<float> mine) {
  std::copy(all.begin(), all.end(), mine.begin());
}

void OneRank::sum(std::span<float>) {}

void OneRank::meet() {}

}  // namespace flashkata
