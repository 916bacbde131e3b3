// flash_gqa: H query heads read Hk key/value heads
//
// New here   Two divisions. Forward, a block of queries of head h reads the tiles of key/value head h / (H / Hk).
//            Backward, a block owns keys of one of the Hk heads, so it walks over the queries of all H / Hk heads of
//            its group before it writes: their sum needs no other author, and no memory but the registers that hold dK,
//            dV.
// Kernels    steps 2.04 and 3.04 with rules (flash_kernels.cuh); keys_kernel has a block for every KV keys of each of
//            the Hk heads
// Try        ./kata test 4.02    ./kata profile 4.02
#include "gqa.hpp"

#include "solutions/hidden/phase4_extensions/flash_kernels.cuh"

namespace flashkata {
namespace {

struct SharedHeads : flash_kernels::Dense {
  using Dense::Dense;

  KATA_DEVICE flash_kernels::Part part(int sequence, int head) const {
    flash_kernels::Part part = Dense::part(sequence, head);
    part.kv_head = head / (heads / kv_heads);
    return part;
  }
};

}  // namespace

void flash_gqa_forward(const FlashForward<float>& problem, const Stream& stream) {
  check_flash_forward(problem, KeyHeads::shared);
  flash_kernels::launch_forward(problem, SharedHeads(problem), stream);
}

void flash_gqa_backward(const FlashBackward<float>& problem, const Stream& stream) {
  check_flash_backward(problem, KeyHeads::shared);
  flash_kernels::launch_backward(problem, SharedHeads(problem), stream);
}

}  // namespace flashkata
