#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace kata {

/// A command that cannot go on: what is wrong, and the next thing to do. Printed by main, which then exits with `code`.
class Failure : public std::runtime_error {
 public:
  Failure(const std::string& what, std::string next, int code = 1)
      : std::runtime_error(what), next_(std::move(next)), code_(code) {}
  const std::string& next() const { return next_; }
  int code() const { return code_; }

 private:
  std::string next_;
  int code_;
};

/// Ctrl-C, or a polite request to end: unwinds to main, so that destructors put everything back in order.
class Interrupted : public std::exception {
 public:
  const char* what() const noexcept override { return "interrupted"; }
};

}  // namespace kata
