// Kernels of the unit tests: each exposes one primitive to the host.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "common/gpu/buffer.hpp"
#include "common/gpu/half.hpp"

namespace flashkata::unit {

/// D = A B + C on the tensor core. A [16, 16], B [16, 8], C and D [16, 8], all row-major here.
std::vector<float> multiply_bf16(const std::vector<float>& a, const std::vector<float>& b, const std::vector<float>& c);
std::vector<float> multiply_fp16(const std::vector<float>& a, const std::vector<float>& b, const std::vector<float>& c);

/// What ldmatrix puts into the registers: [register][lane] as pairs of 16-bit numbers (low half first). Element (row,
/// col) of matrix m holds the number 64 m + 8 row + col.
enum class MatrixLoad { x4, x4_trans, x2, x2_trans };
std::vector<std::uint32_t> load_matrices(MatrixLoad which);

/// Converts on the device.
std::vector<std::uint16_t> to_bf16_on_device(const std::vector<float>& values);
std::vector<std::uint16_t> to_fp16_on_device(const std::vector<float>& values);
std::vector<float> from_fp16_on_device(const std::vector<std::uint16_t>& values);

/// Copies `bytes` (4, 8, 16) with `source_bytes` of them from the source 1, 2, 3, ...; the destination was -1 before.
std::vector<std::uint8_t> copy_with_zero_fill(int bytes, int source_bytes);

/// The four shuffles of the lane number by `argument` within groups of `width`: [index, xor, down, up][lane].
std::vector<int> shuffles(int argument, int width);

/// Matches and reductions of values[lane]: [lane][result], in the order of matches_and_reductions_kernel.
constexpr int MATCH_RESULTS = 14;
std::vector<unsigned> matches_and_reductions(const std::vector<int>& values);

/// __syncthreads_or, _and, _count of values[thread], of "values[thread] is 5 or -5" and of 0: [predicate][call][thread]
std::vector<int> barrier_votes(const std::vector<int>& values);

/// All threads call an atomic function on one element, each with its value; the limit of Inc and Dec is 9.
enum class Atomic { subtract_int, subtract_unsigned, exclusive_or, increment, decrement, largest_by_compare_and_swap };
unsigned long long atomics(Atomic which, unsigned long long start, const std::vector<int>& values);

/// To integers in the four directions, first signed, then unsigned; __frsqrt_rn as bits; isnan, isinf, isfinite:
/// [function][value]
constexpr int FLOAT_RESULTS = 12;
std::vector<unsigned> float_functions(const std::vector<float>& values);

/// a + b, a - b, a b, a / b; three times a, through the functions of the caches; fdividef: [function][pair]
std::vector<float> float_pairs(const std::vector<float>& a, const std::vector<float>& b);

/// __popcll, __clzll, __ffsll; of the low half __ffs, __brev, __umulhi by 0x9e3779b9, __mulhi by -12345:
/// [function][value]
std::vector<long long> integer_functions(const std::vector<unsigned long long>& values);

/// min and max of mixed types, constants, double2: for each group whether it is as in CUDA.
std::vector<int> mixed_types();

/// Lanes that find a negative number call __trap().
void trap_if_negative(const float* in);

/// out[thread] = how many threads of its block had written to a shared counter before it; shows the schedule.
std::vector<int> arrival_order(int threads);

/// Each thread names itself: (block, thread) in x, y, z.
std::vector<std::array<unsigned, 6>> identities(std::array<unsigned, 3> grid, std::array<unsigned, 3> block);

/// Writes out[index].
void write_element(float* out, int index);
void use_dynamic_memory(float* out, std::size_t shared_bytes);
void launch_shape(std::array<unsigned, 3> grid, std::array<unsigned, 3> block, std::size_t shared_bytes);

/// 32 x 32 transpose of one warp through shared memory with rows of 32 or of 33 floats.
void transpose(const float* in, float* out, bool padded);
/// Each thread loads the element `stride` times its number.
void strided_load(const float* in, float* out, int stride);
/// Copies a tensor through shared memory by cp.async, with or without work between commit and wait.
void pipelined_copy(const float* in, float* out, bool overlapped);
/// Calls itself until the stack ends.
void recurse(float* out, int depth);
void misaligned_float4(const float* in, float* out);

}  // namespace flashkata::unit
