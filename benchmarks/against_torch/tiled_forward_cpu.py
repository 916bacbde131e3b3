#!/usr/bin/env python3
"""Step 2.03 on the CPU beside PyTorch's flash kernel for CPUs, on one thread and on all.

    benchmarks/against_torch/tiled_forward_cpu.py                  builds the answer in solutions/hidden, then measures
    benchmarks/against_torch/tiled_forward_cpu.py --answers .      your own

Each answer is compared with float64 before it is timed; the two are called in turn in one process on the same random
inputs. GFLOP/s count 4 S^2 D H operations, half of them if causal. Needs PyTorch, g++ and Eigen 3.4 (--flags=-I... if it
lies elsewhere). PyTorch has its flash kernel for CPUs from 2.2 on; 1.13 is measured by its only one, the formula, which
writes all S x S weights to memory.
"""

import ctypes
import sys

import cpu_rounds
import torch

STEP = "phase2_forward/03_tiled_forward/tiled_forward.cpp"

# A call returns its result, memory and all, as PyTorch's do; `release` gives that back.
ENTRY = r"""
#include "phase2_forward/03_tiled_forward/tiled_forward.hpp"

using namespace flashkata;

extern "C" {
TiledResult* forward(const float* q, const float* k, const float* v, Index heads, Index length, Index width, bool causal,
                     int threads) {
  const Shape<4> shape{1, heads, length, width};
  return new TiledResult(tiled_forward({q, shape}, {k, shape}, {v, shape}, {.causal = causal, .threads = threads}));
}
float* output_of(TiledResult* result) { return result->output.data(); }
float* lse_of(TiledResult* result) { return result->lse.data(); }
void release(TiledResult* result) { delete result; }
}
"""


class Ours:
    def __init__(self, library):
        self.library = library
        for function in (library.forward, library.output_of, library.lse_of):
            function.restype = ctypes.c_void_p

    def forward(self, q, k, v, causal, threads):
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (q, k, v)]
        sizes = [ctypes.c_int64(n) for n in q.shape[1:]]
        return ctypes.c_void_p(self.library.forward(*pointers, *sizes, ctypes.c_bool(causal), ctypes.c_int(threads)))

    def call(self, *arguments):
        self.library.release(self.forward(*arguments))

    def output_and_lse(self, q, *arguments):
        """Copies, as tensors."""
        result = self.forward(q, *arguments)
        tensors = []
        for address, shape in ((self.library.output_of(result), q.shape), (self.library.lse_of(result), q.shape[:3])):
            numbers = (ctypes.c_float * shape.numel()).from_address(address)
            tensors.append(torch.frombuffer(numbers, dtype=torch.float32).reshape(shape).clone())
        self.library.release(result)
        return tensors


def error_against_float64(output, lse, q, k, v, causal):
    """Over the first and the last head."""
    errors = []
    for head in (0, q.shape[1] - 1):
        scores = (q[0, head].double() @ k[0, head].double().T) / q.shape[3] ** 0.5
        if causal:
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        errors.append(cpu_rounds.relative_error(output[0, head], scores.softmax(1) @ v[0, head].double()))
        errors.append(cpu_rounds.relative_error(lse[0, head], scores.logsumexp(1)))
    return torch.tensor(errors).max().item()  # NaN stays


def main():
    options = cpu_rounds.options(__doc__)
    ours = Ours(cpu_rounds.build(ENTRY, [STEP], options))

    def contest(cell):
        q, k, v = (torch.randn(1, cpu_rounds.HEADS, cell.length, cell.width) for _ in range(3))
        output, lse = ours.output_and_lse(q, k, v, cell.causal, cell.threads)
        return cpu_rounds.Contest(
            ours=lambda: ours.call(q, k, v, cell.causal, cell.threads),
            theirs=lambda: cpu_rounds.attention(q, k, v, cell.causal),
            error=error_against_float64(output, lse, q, k, v, cell.causal),
            operations=4 * cell.length**2 * cell.width * cpu_rounds.HEADS / (2 if cell.causal else 1),
        )

    return cpu_rounds.run(options, contest, bound=1e-5)


if __name__ == "__main__":
    sys.exit(main())
