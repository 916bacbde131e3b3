#!/usr/bin/env python3
"""Step 3.03 on the CPU beside the backward pass of PyTorch's flash kernel for CPUs, on one thread and on all.

    benchmarks/against_torch/tiled_backward_cpu.py                 builds the answers in solutions/hidden, then measures
    benchmarks/against_torch/tiled_backward_cpu.py --answers .     your own

Each answer is compared with float64 before it is timed; the two are called in turn in one process on the same random
inputs, each with what its own forward pass left behind. GFLOP/s count 10 S^2 D H operations, five products, or half of
them if causal. Needs PyTorch, g++ and Eigen 3.4 (--flags=-I... if it lies elsewhere). PyTorch has its flash kernel for
CPUs from 2.2 on; 1.13 is measured by the gradient of the formula, which keeps all S x S weights in memory.
"""

import ctypes
import sys

import cpu_rounds
import torch

STEPS = [
    "phase3_backward/03_tiled_backward/tiled_backward.cpp",
    "phase3_backward/02_row_delta/row_delta.cpp",
    "phase2_forward/03_tiled_forward/tiled_forward.cpp",
]

# A call returns its result, memory and all, as PyTorch's do; `release` gives that back.
ENTRY = r"""
#include "phase2_forward/03_tiled_forward/tiled_forward.hpp"
#include "phase3_backward/03_tiled_backward/tiled_backward.hpp"

using namespace flashkata;

extern "C" {
void forward(const float* q, const float* k, const float* v, float* output, float* lse, Index heads, Index length,
             Index width, bool causal, int threads) {
  const Shape<4> shape{1, heads, length, width};
  const TiledResult result = tiled_forward({q, shape}, {k, shape}, {v, shape}, {.causal = causal, .threads = threads});
  std::copy_n(result.output.data(), result.output.count(), output);
  std::copy_n(result.lse.data(), result.lse.count(), lse);
}
TiledGradients* backward(const float* q, const float* k, const float* v, const float* output, const float* lse,
                         const float* d_output, Index heads, Index length, Index width, bool causal, int threads) {
  const Shape<4> shape{1, heads, length, width};
  return new TiledGradients(tiled_backward({q, shape}, {k, shape}, {v, shape}, {output, shape},
                                           {lse, {1, heads, length}}, {d_output, shape},
                                           {.causal = causal, .threads = threads}));
}
const float* d_query_of(TiledGradients* result) { return result->query.data(); }
const float* d_key_of(TiledGradients* result) { return result->key.data(); }
const float* d_value_of(TiledGradients* result) { return result->value.data(); }
void release(TiledGradients* result) { delete result; }
}
"""


def pointers(*tensors):
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]


def sizes(q):
    return [ctypes.c_int64(n) for n in q.shape[1:]]


class Ours:
    def __init__(self, library):
        self.library = library
        self.gradients = (library.d_query_of, library.d_key_of, library.d_value_of)
        for function in (library.backward, *self.gradients):
            function.restype = ctypes.c_void_p

    def forward(self, q, k, v, causal, threads):
        """Output and lse, on as many threads as what is measured: a thread stays on the cores of who started it."""
        output, lse = torch.empty_like(q), torch.empty(q.shape[:3])
        arguments = [*pointers(q, k, v, output, lse), *sizes(q), ctypes.c_bool(causal), ctypes.c_int(threads)]
        self.library.forward(*arguments)
        return output, lse

    def backward(self, tensors, causal, threads):
        """`tensors`: q, k, v, output, lse, d_output."""
        arguments = [*pointers(*tensors), *sizes(tensors[0]), ctypes.c_bool(causal), ctypes.c_int(threads)]
        return ctypes.c_void_p(self.library.backward(*arguments))

    def call(self, *arguments):
        self.library.release(self.backward(*arguments))

    def copies(self, tensors, *arguments):
        """The gradients of q, k and v as tensors."""
        result = self.backward(tensors, *arguments)
        shape = tensors[0].shape
        copies = []
        for gradient in self.gradients:
            numbers = (ctypes.c_float * shape.numel()).from_address(gradient(result))
            copies.append(torch.frombuffer(numbers, dtype=torch.float32).reshape(shape).clone())
        self.library.release(result)
        return copies


def error_against_float64(gradients, q, k, v, d_output, causal):
    """Over the first and the last head."""
    errors = []
    scale = q.shape[3] ** -0.5
    for head in (0, q.shape[1] - 1):
        q1, k1, v1, d_output1 = (x[0, head].double() for x in (q, k, v, d_output))
        weights = (q1 @ k1.T).mul_(scale)
        if causal:
            weights.masked_fill_(torch.ones_like(weights, dtype=torch.bool).triu(1), float("-inf"))
        weights = weights.softmax(1)
        delta = (d_output1 * (weights @ v1)).sum(1, keepdim=True)
        d_scores = (d_output1 @ v1.T).sub_(delta).mul_(weights).mul_(scale)
        for got, want in zip(gradients, (d_scores @ k1, d_scores.T @ q1, weights.T @ d_output1)):
            errors.append(cpu_rounds.relative_error(got[0, head], want))
    return torch.tensor(errors).max().item()  # NaN stays


def main():
    options = cpu_rounds.options(__doc__)
    ours = Ours(cpu_rounds.build(ENTRY, STEPS, options))

    def contest(cell):
        q, k, v, d_output = (torch.randn(1, cpu_rounds.HEADS, cell.length, cell.width) for _ in range(4))
        tensors = (q, k, v, *ours.forward(q, k, v, cell.causal, cell.threads), d_output)
        gradients = ours.copies(tensors, cell.causal, cell.threads)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        output = cpu_rounds.attention(*leaves, cell.causal)
        return cpu_rounds.Contest(
            ours=lambda: ours.call(tensors, cell.causal, cell.threads),
            theirs=lambda: torch.autograd.grad(output, leaves, d_output, retain_graph=True),
            error=error_against_float64(gradients, q, k, v, d_output, cell.causal),
            operations=10 * cell.length**2 * cell.width * cpu_rounds.HEADS / (2 if cell.causal else 1),
        )

    return cpu_rounds.run(options, contest, bound=1e-5)


if __name__ == "__main__":
    sys.exit(main())
