// The tensor core: mma.m16n8k16 and ldmatrix for one warp, from the fragments of its 32 lanes.

#include <cstring>

#include "common/gpu/half.hpp"
#include "common/virtual_gpu/access_check.hpp"
#include "common/virtual_gpu/warp_operation.hpp"

namespace flashkata::virtual_gpu {
namespace {

struct MmaArgument {
  float* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
  const float* c;
};

// The 8 columns of a row, as a vector: what g++ makes of loops over plain arrays is mostly shuffling.
using Row = float __attribute__((vector_size(32)));

float* elements(Row* rows) { return reinterpret_cast<float*>(rows); }

// The fragment layout is written down in common/gpu/mma.hpp. Each element of c is summed from k = 0 on.
template <typename T>
void multiply(Worker& worker, void* const* arguments, std::uint32_t) {
  ++worker.events.matrix_products;
  T packed_a[16 * 16], packed_b[16 * 8];
  float a[16 * 16];
  Row b[16], c[16];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& fragment = *static_cast<const MmaArgument*>(arguments[lane]);
    const int group = lane / 4;
    const int pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8;
      const int col = pair + i / 2 * 8;
      packed_a[row * 16 + col] = T{static_cast<std::uint16_t>(fragment.a[i] & 0xffff)};
      packed_a[row * 16 + col + 1] = T{static_cast<std::uint16_t>(fragment.a[i] >> 16)};
    }
    for (int i = 0; i < 2; ++i) {
      const int row = pair + i * 8;
      packed_b[row * 8 + group] = T{static_cast<std::uint16_t>(fragment.b[i] & 0xffff)};
      packed_b[(row + 1) * 8 + group] = T{static_cast<std::uint16_t>(fragment.b[i] >> 16)};
      std::memcpy(elements(c) + (group + i * 8) * 8 + pair, fragment.c + 2 * i, 2 * sizeof(float));
    }
  }
  for (int i = 0; i < 16 * 16; ++i) a[i] = to_float(packed_a[i]);
  for (int i = 0; i < 16 * 8; ++i) elements(b)[i] = to_float(packed_b[i]);
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) c[row] += a[row * 16 + k] * b[k];
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<const MmaArgument*>(arguments[lane])->d;
    const int group = lane / 4;
    const int pair = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      std::memcpy(d + 2 * i, elements(c) + (group + i * 8) * 8 + pair, 2 * sizeof(float));
    }
  }
}

struct LoadArgument {
  std::uint32_t* fragment;
  const char* row;
};

/// Row `row` of matrix `matrix` lies where lane 8 * matrix + row said.
const char* row_address(void* const* arguments, int matrix, int row) {
  return static_cast<const LoadArgument*>(arguments[matrix * 8 + row])->row;
}

template <int MATRICES, bool TRANSPOSED>
void load(Worker& worker, void* const* arguments, std::uint32_t) {
  ++worker.events.matrix_loads;
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4;
    const int pair = lane % 4 * 2;
    for (int matrix = 0; matrix < MATRICES; ++matrix) {
      std::uint16_t elements[2];
      if (TRANSPOSED) {
        std::memcpy(&elements[0], row_address(arguments, matrix, pair) + group * 2, 2);
        std::memcpy(&elements[1], row_address(arguments, matrix, pair + 1) + group * 2, 2);
      } else {
        std::memcpy(elements, row_address(arguments, matrix, group) + pair * 2, 4);
      }
      std::memcpy(&static_cast<LoadArgument*>(arguments[lane])->fragment[matrix], elements, 4);
    }
  }
}

}  // namespace

void mma_m16n8k16(HalfKind kind, float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                  const float (&c)[4]) {
  MmaArgument argument{d, a, b, c};
  join_warp_operation(kind == HalfKind::bf16 ? multiply<bf16> : multiply<fp16>, "mma_m16n8k16()", 0xffffffffu,
                      &argument, site_of(__builtin_return_address(0)), /*whole_warp=*/true);
}

void load_matrix(std::uint32_t* fragment, const void* row, int matrices, bool transposed) {
  const Site site = site_of(__builtin_return_address(0));
  Worker& worker = *current_worker;
  const auto address = reinterpret_cast<std::uintptr_t>(row);
  if (worker.current->lane() < matrices * 8) {  // the other lanes' addresses are not used
    constexpr unsigned ROW_BYTES = 16;
    if (!worker.shared.is_shared(address))
      report_wrong_memory(worker, address, "ldmatrix, which reads", "shared", site);
    if (address % ROW_BYTES != 0) report_misaligned(worker, address, ROW_BYTES, "a row of ldmatrix,", site);
    if (worker.launch->check) check_access(worker, address, ROW_BYTES, AccessKind::read, site);
  }
  LoadArgument argument{fragment, static_cast<const char*>(row)};
  const WarpOperation operation =
      matrices == 4 ? (transposed ? load<4, true> : load<4, false>) : (transposed ? load<2, true> : load<2, false>);
  const char* name = matrices == 4 ? (transposed ? "ldmatrix_x4_trans()" : "ldmatrix_x4()")
                                   : (transposed ? "ldmatrix_x2_trans()" : "ldmatrix_x2()");
  join_warp_operation(operation, name, 0xffffffffu, &argument, site, /*whole_warp=*/true);
}

}  // namespace flashkata::virtual_gpu
