// flash_varlen_forward and flash_varlen_backward: attention within each sequence of a packed batch, in fp32
//
// New here   Nothing but where a block's rows lie. The grid has room for every sequence to be as long as the longest;
//            a block looks up its own sequence in cu_seqlens, leaves if that is shorter, and counts its rows from 0
//            from there on. So the diagonal is the sequence's own as well.
// The rest   The kernels of 2.04 and 3.04, made templates of Rules: flash_rules.cuh
// Try        ./kata test 4.01    ./kata profile 4.01
#include "flash_varlen.hpp"

#include <algorithm>

#include "solutions/hidden/phase4_extensions/flash_kernels.cuh"

namespace flashkata {
namespace {

struct Varlen : flash_kernels::Dense {
  using Part = flash_kernels::Part;

  View<const std::int32_t, 1> cu_seqlens_q, cu_seqlens_k;  // [B + 1]

  template <typename Problem>
  Varlen(const Problem& p, const Sequences& s) : Dense(p), cu_seqlens_q(s.cu_seqlens_q), cu_seqlens_k(s.cu_seqlens_k) {
    sequences = static_cast<int>(s.cu_seqlens_q.size(0)) - 1;
    queries = static_cast<int>(std::min(p.query.size(2), s.max_seqlen_q));
    keys = static_cast<int>(std::min(p.key.size(2), s.max_seqlen_k));
  }

  // One batch item, whose rows are those of all sequences one after the other.
  KATA_DEVICE Part part(int sequence, int head) const {
    const int q_first = cu_seqlens_q(sequence);
    const int k_first = cu_seqlens_k(sequence);
    return {.batch = 0,
            .head = head,
            .kv_head = head,
            .q_first = q_first,
            .k_first = k_first,
            .queries = cu_seqlens_q(sequence + 1) - q_first,
            .keys = cu_seqlens_k(sequence + 1) - k_first};
  }

  // The last query of a sequence stands at its last key.
  KATA_DEVICE flash_kernels::KeyRange sees(const Part& part, int i) const {
    return {0, causal ? min(part.keys, i + part.keys - part.queries + 1) : part.keys};
  }
};

}  // namespace

void flash_varlen_forward(const FlashForward<float>& problem, const Sequences& sequences, const Stream& stream) {
  check_varlen_forward(problem, sequences);
  flash_kernels::launch_forward(problem, Varlen(problem, sequences), stream);
}

void flash_varlen_backward(const FlashBackward<float>& problem, const Sequences& sequences, const Stream& stream) {
  check_varlen_backward(problem, sequences);
  flash_kernels::launch_backward(problem, Varlen(problem, sequences), stream);
}

}  // namespace flashkata
