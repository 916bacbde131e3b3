// Tensor cores: mma.m16n8k16 and the ldmatrix loads that feed it (PTX ISA, "Matrix multiply-accumulate").
//
// Fragments, with group = lane / 4 and pair = 2 * (lane % 4); a register of 16-bit elements holds two neighbours:
//   a[0] = A[group][pair..]       a[1] = A[group + 8][pair..]     A is [16, 16], row-major
//   a[2] = A[group][pair + 8..]   a[3] = A[group + 8][pair + 8..]
//   b[0] = B[pair..][group]       b[1] = B[pair + 8..][group]     B is [16, 8], column-major
//   c[0], c[1] = C[group][pair..] c[2], c[3] = C[group + 8][pair..]   C and D are [16, 8] in float
#pragma once

#include <cstdint>

#include "common/gpu/half.hpp"

#if KATA_HAS_DEVICE_CODE
namespace flashkata {

/// d = a b + c for one warp; the elements of a and b are T (fp16 or bf16): mma_m16n8k16<bf16>(d, a, b, c).
/// All 32 lanes take part. d may be c.
template <typename T>
KATA_DEVICE void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                              const float (&c)[4]);

#if KATA_REAL_GPU
#define KATA_MMA(type, ptx_type)                                                                             \
  template <>                                                                                                \
  KATA_DEVICE void mma_m16n8k16<type>(float(&d)[4], const std::uint32_t(&a)[4], const std::uint32_t(&b)[2],  \
                                      const float(&c)[4]) {                                                  \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." ptx_type "." ptx_type                                       \
        ".f32 "                                                                                              \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                                \
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
          "f"(c[3]));                                                                                        \
  }
KATA_MMA(fp16, "f16")
KATA_MMA(bf16, "bf16")
#undef KATA_MMA

namespace mma_detail {
KATA_DEVICE unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
}  // namespace mma_detail

#define KATA_LDMATRIX_X4(name, ptx_suffix)                                                        \
  KATA_DEVICE void name(std::uint32_t(&fragment)[4], const void* row) {                           \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" ptx_suffix ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])     \
                 : "r"(mma_detail::shared_address(row))                                           \
                 : "memory");                                                                     \
  }
#define KATA_LDMATRIX_X2(name, ptx_suffix)                                                \
  KATA_DEVICE void name(std::uint32_t(&fragment)[2], const void* row) {                   \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" ptx_suffix ".shared.b16 {%0, %1}, [%2];" \
                 : "=r"(fragment[0]), "=r"(fragment[1])                                   \
                 : "r"(mma_detail::shared_address(row))                                   \
                 : "memory");                                                             \
  }
#else
template <>
KATA_DEVICE void mma_m16n8k16<fp16>(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                    const float (&c)[4]) {
  virtual_gpu::mma_m16n8k16(virtual_gpu::HalfKind::fp16, d, a, b, c);
}
template <>
KATA_DEVICE void mma_m16n8k16<bf16>(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                    const float (&c)[4]) {
  virtual_gpu::mma_m16n8k16(virtual_gpu::HalfKind::bf16, d, a, b, c);
}

namespace mma_detail {
constexpr bool transposed(const char* ptx_suffix) { return ptx_suffix[0] != '\0'; }
}  // namespace mma_detail

#define KATA_LDMATRIX_X4(name, ptx_suffix)                                          \
  KATA_DEVICE void name(std::uint32_t(&fragment)[4], const void* row) {             \
    virtual_gpu::load_matrix(fragment, row, 4, mma_detail::transposed(ptx_suffix)); \
  }
#define KATA_LDMATRIX_X2(name, ptx_suffix)                                          \
  KATA_DEVICE void name(std::uint32_t(&fragment)[2], const void* row) {             \
    virtual_gpu::load_matrix(fragment, row, 2, mma_detail::transposed(ptx_suffix)); \
  }
#endif

/// ldmatrix_x4(fragment, row): lane l gives the address of row l % 8 of 8 x 8 matrix l / 8 (16 bytes, 16-byte aligned,
/// in shared memory) and receives elements [lane / 4][pair..] of matrix m in fragment[m]; `_trans` gives it
/// [pair..][lane / 4] instead. The x2 forms use the addresses of lanes 0..15.
KATA_LDMATRIX_X4(ldmatrix_x4, "")
KATA_LDMATRIX_X4(ldmatrix_x4_trans, ".trans")
KATA_LDMATRIX_X2(ldmatrix_x2, "")
KATA_LDMATRIX_X2(ldmatrix_x2_trans, ".trans")
#undef KATA_LDMATRIX_X4
#undef KATA_LDMATRIX_X2

}  // namespace flashkata
#endif
