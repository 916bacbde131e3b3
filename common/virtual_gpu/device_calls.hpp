// The calls that a kernel makes into the virtual GPU. Kernel files do not use them directly: they write CUDA's names,
// which cuda_language.hpp and common/gpu map to these.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashkata::virtual_gpu {

// Each of these takes the line of its caller from its return address, so none may be inlined into the kernel, and two
// calls in two branches may not become one.
#ifdef __clang__
#define KATA_NOT_MERGED __attribute__((nomerge))
#else
#define KATA_NOT_MERGED
#endif

KATA_NOT_MERGED void sync_threads();
enum class BarrierVote { any, all, count };
/// The barrier, at which the threads also count those whose predicate holds.
KATA_NOT_MERGED int sync_threads_vote(BarrierVote kind, bool predicate);
KATA_NOT_MERGED void sync_warp(std::uint32_t mask);

enum class Shuffle { index, exclusive_or, down, up };
KATA_NOT_MERGED std::uint64_t shuffle(Shuffle kind, std::uint32_t mask, std::uint64_t value, int argument, int width);
KATA_NOT_MERGED std::uint32_t ballot(std::uint32_t mask, bool predicate);
/// The lanes whose 4 or 8 bytes are those of this lane.
KATA_NOT_MERGED std::uint32_t match_any(std::uint32_t mask, std::uint64_t value);

enum class Reduction { add, min, max, bit_and, bit_or, bit_xor };
KATA_NOT_MERGED int reduce(Reduction kind, std::uint32_t mask, int value);
KATA_NOT_MERGED unsigned reduce(Reduction kind, std::uint32_t mask, unsigned value);

/// Ends the launch with a finding.
KATA_NOT_MERGED void trap();

/// Orders this thread's writes before its next atomic operation, as seen by other blocks.
void thread_fence();

enum class AtomicOperation { add, min, max, exchange, bit_and, bit_or, bit_xor, subtract, increment, decrement };
float atomic_update(AtomicOperation operation, float* address, float value);
double atomic_update(AtomicOperation operation, double* address, double value);
int atomic_update(AtomicOperation operation, int* address, int value);
unsigned atomic_update(AtomicOperation operation, unsigned* address, unsigned value);
unsigned long long atomic_update(AtomicOperation operation, unsigned long long* address, unsigned long long value);
int atomic_compare_and_swap(int* address, int expected, int desired);
unsigned atomic_compare_and_swap(unsigned* address, unsigned expected, unsigned desired);
unsigned long long atomic_compare_and_swap(unsigned long long* address, unsigned long long expected,
                                           unsigned long long desired);

/// Start of the block's dynamic shared memory; findings count it in elements of this size.
void* dynamic_shared_memory(std::size_t element_bytes);

enum class HalfKind { fp16, bf16 };
/// d = a b + c for one warp: a [16, 16], b [16, 8], c and d [16, 8]; fragments as in PTX mma.m16n8k16.
KATA_NOT_MERGED void mma_m16n8k16(HalfKind kind, float (&d)[4], const std::uint32_t (&a)[4],
                                  const std::uint32_t (&b)[2], const float (&c)[4]);

/// PTX ldmatrix: `matrices` (2 or 4) matrices of 8 x 8 16-bit elements; lane l gives the address of row l.
KATA_NOT_MERGED void load_matrix(std::uint32_t* fragment, const void* row, int matrices, bool transposed);

/// PTX cp.async: copies source_bytes and fills up to `bytes` (4, 8 or 16) with zeros. It lands when it is waited for.
void copy_async(void* shared_destination, const void* global_source, int bytes, int source_bytes);
void copy_async_commit();
void copy_async_wait(int groups_still_in_flight);

float fast_exp(float x);
float fast_log(float x);

}  // namespace flashkata::virtual_gpu
