// Signals: what a kernel without instrumentation does wrong still ends in a sentence, and the program goes on.
#pragma once

#include <signal.h>

#include <memory>

namespace flashkata::virtual_gpu {

/// While it lives, a fault inside a kernel becomes a finding and the launch is abandoned; a fault outside a kernel goes
/// to whoever handled it before.
class FaultHandlers {
 public:
  FaultHandlers();
  ~FaultHandlers();
  FaultHandlers(const FaultHandlers&) = delete;
  FaultHandlers& operator=(const FaultHandlers&) = delete;
};

/// The stack on which this OS thread handles signals: a stack overflow leaves no other.
class SignalStack {
 public:
  SignalStack();
  ~SignalStack();
  SignalStack(const SignalStack&) = delete;
  SignalStack& operator=(const SignalStack&) = delete;

 private:
  std::unique_ptr<char[]> memory_;
  stack_t before_{};
};

}  // namespace flashkata::virtual_gpu
