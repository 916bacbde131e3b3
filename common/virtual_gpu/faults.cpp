#include "common/virtual_gpu/faults.hpp"

#include <ucontext.h>

#include <array>
#include <cstdint>

#include "common/virtual_gpu/access_check.hpp"
#include "common/virtual_gpu/device_calls.hpp"
#include "common/virtual_gpu/worker.hpp"

namespace flashkata::virtual_gpu {
namespace {

constexpr std::array<int, 3> SIGNALS = {SIGSEGV, SIGBUS, SIGFPE};
constexpr std::size_t SIGNAL_STACK_BYTES = 64 * 1024;
struct sigaction actions_before[SIGNALS.size()];

/// Where the fault happened, as the return address of an imagined call.
Site fault_site(const void* context) {
#if defined(__x86_64__) && defined(__linux__)
  const auto* machine = &static_cast<const ucontext_t*>(context)->uc_mcontext;
  const auto address = static_cast<std::uintptr_t>(machine->gregs[REG_RIP]);
#elif defined(__aarch64__) && defined(__linux__)
  const auto address = static_cast<std::uintptr_t>(static_cast<const ucontext_t*>(context)->uc_mcontext.pc);
#else
  const std::uintptr_t address = 0;
#endif
  // In the runtime (a cp.async lands, say) the kernel's own line is where the thread last called us; not known here.
  return address >= image().begin && address < image().end ? static_cast<Site>(address - load_bias + 1) : 0;
}

std::string explain(const Worker& worker, int signal, std::uintptr_t address, FindingKind* finding) {
  *finding = FindingKind::crash;
  if (signal == SIGFPE) return "divides an integer by zero at {here}";
  if (worker.stacks.is_guard(address)) {
    *finding = FindingKind::stack_overflow;
    return "needs more than its stack of " + std::to_string(worker.stacks.stack_bytes() / 1024) +
           " KiB at {here}; large local arrays and recursion do not fit (KATA_GPU_STACK_KB sets the size)";
  }
  if (address == 0) {
    *finding = FindingKind::misaligned_access;
    return "dereferences a null pointer, or makes a vector access (float4, uint4) at an address that is not a multiple "
           "of 16 bytes, at {here}";
  }
  if (worker.shared.is_dynamic(address)) {
    *finding = FindingKind::dynamic_shared_too_small;
    return "touches byte " + std::to_string(worker.shared.dynamic_offset(address)) +
           " of dynamic shared memory at {here}, but the launch asked for " +
           std::to_string(worker.shared.dynamic_bytes()) + " bytes";
  }
  return bad_address_text(worker, address, "touches", finding);
}

void pass_on(int signal) {
  for (std::size_t i = 0; i < SIGNALS.size(); ++i) {
    // Returning repeats the fault, which then goes to the handler from before.
    if (SIGNALS[i] == signal) sigaction(signal, &actions_before[i], nullptr);
  }
}

void handle_fault(int signal, siginfo_t* info, void* context) {
  Worker* worker = current_worker;
  if (worker == nullptr || worker->current == nullptr) return pass_on(signal);
  checking_worker = nullptr;
  {
    FindingKind finding{};
    const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
    const std::string text = explain(*worker, signal, address, &finding);
    Site site = fault_site(context);
    if (!line_of(site).known()) site = worker->current->site;
    if (worker->sightings.is_new(finding, site)) {
      worker->sightings.describe(finding, site, 0, worker->thread_and_block(worker->current->id) + " " + text, true);
    }
  }
  // We leave the handler by a jump: the signal would stay blocked.
  sigset_t blocked;
  sigemptyset(&blocked);
  sigaddset(&blocked, signal);
  pthread_sigmask(SIG_UNBLOCK, &blocked, nullptr);
  worker->abandon();
}

}  // namespace

void trap() {
  Worker& worker = *current_worker;
  const Site site = site_of(__builtin_return_address(0));
  {
    const HooksOff hooks_off;
    if (worker.sightings.is_new(FindingKind::crash, site)) {
      worker.sightings.describe(FindingKind::crash, site, 0,
                                worker.thread_and_block(worker.current->id) + " calls __trap() at {here}", true);
    }
  }
  worker.abandon();
}

FaultHandlers::FaultHandlers() {
  struct sigaction action {};
  action.sa_sigaction = handle_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  for (std::size_t i = 0; i < SIGNALS.size(); ++i) sigaction(SIGNALS[i], &action, &actions_before[i]);
}

FaultHandlers::~FaultHandlers() {
  for (std::size_t i = 0; i < SIGNALS.size(); ++i) sigaction(SIGNALS[i], &actions_before[i], nullptr);
}

SignalStack::SignalStack() : memory_(new char[SIGNAL_STACK_BYTES]) {
  stack_t stack{};
  stack.ss_sp = memory_.get();
  stack.ss_size = SIGNAL_STACK_BYTES;
  sigaltstack(&stack, &before_);
}

SignalStack::~SignalStack() { sigaltstack(&before_, nullptr); }

}  // namespace flashkata::virtual_gpu
