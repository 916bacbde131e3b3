#include "flash_backward.hpp"

namespace flashkata {

void flash_backward(const FlashBackward<float>& problem, const Stream& stream) {
  check_flash_backward(problem);
  // TODO, about 200 lines: kernels above this function, templated on D, and their launches here: delta, then dK and dV
  // by blocks that own keys, then dQ. Begin with one key a thread; the suite asks for no more.
  throw NotImplemented(__FILE__);
}

}  // namespace flashkata
