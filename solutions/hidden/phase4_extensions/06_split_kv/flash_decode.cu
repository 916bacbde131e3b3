// flash_decode: output = softmax(scale query key^T) value for a few queries and a long cache in one piece.
//
// The kernels are in decode_kernel.cuh; here is where the rows of a key/value head lie: one stride apart.
// Try        ./kata test 4.06    ./kata profile 4.06
#include "split_kv.hpp"

#include "solutions/hidden/phase4_extensions/decode_kernel.cuh"

namespace flashkata {
namespace {

template <typename T>
struct OnePiece {
  View<const T, 4> key, value;  // [B, Hk, capacity, D]

  KATA_DEVICE decode::EvenRows<T> head(int b, int kv_head) const {
    return {&key(b, kv_head, 0, 0), &value(b, kv_head, 0, 0), key.stride(2), value.stride(2)};
  }
};

template <typename T>
void launch_decode(const Decode<T>& p, const Stream& stream) {
  decode::decode<T>(p, OnePiece<T>{p.key, p.value}, p.key.size(1), stream);
}

}  // namespace

void flash_decode(const Decode<float>& problem, const Stream& stream) {
  check_decode(problem);
  launch_decode(problem, stream);
}

void flash_decode(const Decode<fp16>& problem, const Stream& stream) {
  check_decode(problem);
  launch_decode(problem, stream);
}

void flash_decode(const Decode<bf16>& problem, const Stream& stream) {
  check_decode(problem);
  launch_decode(problem, stream);
}

}  // namespace flashkata
