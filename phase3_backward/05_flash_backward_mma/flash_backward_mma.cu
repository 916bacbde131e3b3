#include "flash_backward_mma.hpp"

namespace flashkata {

void flash_backward_mma(const FlashBackward<fp16>& problem, const Stream& stream) {
  check_flash_backward(problem);
  // TODO, about 300 lines: kernels above this function, templated on the type and on D, and their launches.
  throw NotImplemented(__FILE__);
}

void flash_backward_mma(const FlashBackward<bf16>& problem, const Stream& stream) {
  check_flash_backward(problem);
  // TODO: the same with bf16.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
