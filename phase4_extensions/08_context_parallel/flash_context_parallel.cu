#include "flash_context_parallel.hpp"

namespace flashkata {

void flash_gather_attention(const FlashForward<fp16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_forward(local, tokens, communicator.size());
  // TODO, about 70 lines with a kernel that moves rows: gather K and V, put them in order, attend with two groups.
  throw NotImplemented(__FILE__);
}

void flash_gather_attention(const FlashForward<bf16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_forward(local, tokens, communicator.size());
  // TODO, about 1 line: the same for the other type.
  throw NotImplemented(__FILE__);
}

void flash_gather_attention_backward(const FlashBackward<fp16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_backward(local, tokens, communicator.size());
  // TODO, about 40 lines: the same two groups, and the gradients of all keys to their owners, in floats.
  throw NotImplemented(__FILE__);
}

void flash_gather_attention_backward(const FlashBackward<bf16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_backward(local, tokens, communicator.size());
  // TODO, about 1 line: the same for the other type.
  throw NotImplemented(__FILE__);
}

void flash_ring_attention(const FlashForward<fp16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_forward(local, tokens, communicator.size());
  // TODO, about 80 lines with a kernel that merges a hop: W hops; in each the next exchange begins, one rectangle (at
  // hop 0 two groups) is computed and merged, then the exchange is waited for.
  throw NotImplemented(__FILE__);
}

void flash_ring_attention(const FlashForward<bf16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_forward(local, tokens, communicator.size());
  // TODO, about 1 line: the same for the other type.
  throw NotImplemented(__FILE__);
}

void flash_ring_attention_backward(const FlashBackward<fp16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_backward(local, tokens, communicator.size());
  // TODO, about 70 lines with a kernel that adds: the same hops; dQ stays and is added up here, dK and dV travel.
  throw NotImplemented(__FILE__);
}

void flash_ring_attention_backward(const FlashBackward<bf16>& local, Index tokens, Communicator& communicator) {
  check_flash_local_backward(local, tokens, communicator.size());
  // TODO, about 1 line: the same for the other type.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
