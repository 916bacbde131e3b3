// How the cases of the corpus launch their kernels.
#pragma once

#include "common/gpu/gpu.hpp"
#include "tests/virtual_gpu/corpus.hpp"

namespace flashkata::corpus {

constexpr int THREADS = 64;

/// kernel(in, out): `in` holds 0, 1, 2, ..., and `out` nothing; both have one element for each thread of the grid.
inline std::vector<float> run_in_out(void (*kernel)(const float*, float*), int blocks = 1, int threads = THREADS,
                                     std::size_t shared_bytes = 0) {
  const std::size_t count = static_cast<std::size_t>(blocks) * static_cast<std::size_t>(threads);
  DeviceBuffer<float> in("in", ramp(count));
  DeviceBuffer<float> out("out", count);
  launch(kernel, blocks, threads, shared_bytes, Stream(), in.data(), out.data());
  synchronize();
  return out.download();
}

/// Does every element of `got` equal want(index)?
template <typename Want>
bool all_equal(const std::vector<float>& got, Want want) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (!(got[i] == static_cast<float>(want(static_cast<int>(i))))) return false;
  }
  return true;
}

}  // namespace flashkata::corpus
