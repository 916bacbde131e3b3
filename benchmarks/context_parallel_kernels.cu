#include "benchmarks/context_parallel_kernels.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace flashkata::bench {
namespace {

constexpr int THREADS = 128;

struct Chunks {
  Index begin[2];
  Index rows;

  explicit Chunks(const Tokens& tokens) : begin{tokens.begin[0], tokens.begin[1]}, rows(tokens.rows) {}
  KATA_DEVICE Index token(Index row) const { return row < rows ? begin[0] + row : begin[1] + row - rows; }
};

// Every bit depends on every bit (the finaliser of Steele, Lea and Flood's SplitMix).
KATA_DEVICE std::uint64_t scramble(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// One block for each row and head.
__global__ void fill_kernel(View<bf16, 4> local, Chunks chunks, Index length, std::uint64_t seed) {
  const Index row = blockIdx.x, head = blockIdx.y, width = local.size(3);
  const Index place = (head * length + chunks.token(row)) * width;
  for (Index channel = threadIdx.x; channel < width; channel += blockDim.x) {
    const std::uint64_t bits = scramble(scramble(seed) + static_cast<std::uint64_t>(place + channel));
    // The sum of four uniform numbers is close to normal; its variance is 4 / 12.
    float sum = -2.0f;
    for (int part = 0; part < 4; ++part) sum += static_cast<float>(bits >> 16 * part & 0xffff) / 65536.0f;
    local(0, head, row, channel) = from_float<bf16>(sum * 1.7320508f);
  }
}

// Of one row: the sum of squares of the differences and of the whole, and the largest |difference| / (|whole| + scale).
__global__ void difference_kernel(View<const bf16, 4> local, View<const bf16, 4> whole, Chunks chunks, float scale,
                                  float* results) {
  const Index row = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x, head = blockIdx.y;
  if (row >= local.size(2)) return;
  float squares = 0.0f, reference = 0.0f, largest = 0.0f;
  for (Index channel = 0; channel < local.size(3); ++channel) {
    const float want = to_float(whole(0, head, chunks.token(row), channel));
    const float error = fabsf(to_float(local(0, head, row, channel)) - want);
    squares += error * error;
    reference += want * want;
    const float share = error / (fabsf(want) + scale);
    if (!(share <= largest)) largest = share;
  }
  float* const result = results + (head * local.size(2) + row) * 3;
  result[0] = squares;
  result[1] = reference;
  result[2] = largest;
}

__global__ void copy_kernel(uint4* to, const uint4* from, std::size_t count) {
  const std::size_t stride = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    to[i] = from[i];
  }
}

unsigned count_of(Index number) { return static_cast<unsigned>(number); }

}  // namespace

void fill_normal(View<bf16, 4> local, const Tokens& tokens, Index length, unsigned seed) {
  launch(fill_kernel, dim3(count_of(local.size(2)), count_of(local.size(1))), dim3(THREADS), 0, Stream{}, local,
         Chunks(tokens), length, static_cast<std::uint64_t>(seed));
}

Difference difference(View<const bf16, 4> local, View<const bf16, 4> whole, const Tokens& tokens) {
  const Index heads = local.size(1), rows = local.size(2);
  DeviceBuffer<float> results("results", static_cast<std::size_t>(heads * rows * 3));
  double squares = 0.0, reference = 0.0, largest = 0.0, scale = 1.0;
  for (int pass = 0; pass < 2; ++pass) {  // the second one knows the scale
    launch(difference_kernel, dim3(count_of(ceil_div<Index>(rows, THREADS)), count_of(heads)), dim3(THREADS), 0,
           Stream{}, local, whole, Chunks(tokens), static_cast<float>(scale), results.data());
    const std::vector<float> numbers = results.download();
    squares = reference = largest = 0.0;
    for (std::size_t i = 0; i < numbers.size(); i += 3) {
      squares += static_cast<double>(numbers[i]);
      reference += static_cast<double>(numbers[i + 1]);
      if (!(static_cast<double>(numbers[i + 2]) <= largest)) largest = static_cast<double>(numbers[i + 2]);
    }
    scale = std::sqrt(reference / static_cast<double>(heads * rows * local.size(3)));
  }
  return {std::sqrt(squares / reference), largest};
}

void copy_bytes(std::byte* to, const std::byte* from, std::size_t bytes) {
  const std::size_t count = bytes / sizeof(uint4);
  if (count == 0) return;
  const auto blocks = static_cast<unsigned>(std::min<std::size_t>(ceil_div<std::size_t>(count, THREADS), 4096));
  launch(copy_kernel, dim3(blocks), dim3(THREADS), 0, Stream{}, reinterpret_cast<uint4*>(to),
         reinterpret_cast<const uint4*>(from), count);
}

}  // namespace flashkata::bench
