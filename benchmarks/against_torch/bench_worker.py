"""What ./kata bench --against torch starts: measures the steps of one library and PyTorch's kernels, alternated.

    python3 bench_worker.py build/learn-cuda/bindings/libflashkata.so

Reads problems from its standard input, one in a line of JSON, and prints what came of each; benchmarks/bench/problem.hpp
says what is in them. Peers: on a GPU cuDNN, FlashAttention-2 (PyTorch's "flash"), mem-efficient and math, whichever take
the problem; on the CPU PyTorch's flash kernel. An answer is compared with math in float64 before it is timed.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bindings"))
import flashkata
from flashkata import operators

try:
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:  # PyTorch 1: there is one kernel, and no choice
    SDPBackend = None

ALLOWED = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}
WARM_UP, FEWEST, MOST, ENOUGH_S = 2, 7, 40, 0.5


class NoTime(Exception):
    def __init__(self, status, why):
        self.status, self.why = status, why


class Ours:
    """The library's forward and backward, without autograd around them."""

    def __init__(self, problem, q, k, v, d_output):
        self.inputs, self.d_output = (q, k, v), d_output
        self.options = (problem["causal"], 1.0 / math.sqrt(problem["width"]), False, False, *operators.Extras())
        self.output, self.lse = self.forward()
        self.gradients = self.backward() if problem["direction"] != "forward" else ()

    def forward(self):
        return operators._forward(*self.inputs, *self.options)

    def backward(self):
        return operators._backward(self.d_output, *self.inputs, self.output, self.lse, *self.options)


class Peer:
    """One of PyTorch's kernels."""

    def __init__(self, problem, backend, q, k, v, d_output):
        self.backend, self.causal, self.d_output = backend, problem["causal"], d_output
        needs = problem["direction"] != "forward"
        self.inputs = [x.detach().requires_grad_(needs) for x in (q, k, v)]
        self.output = self.forward()
        if needs:
            self.backward()

    def forward(self):
        if self.backend is None:
            return scaled_dot_product_attention(*self.inputs, is_causal=self.causal)
        with sdpa_kernel(self.backend):
            return scaled_dot_product_attention(*self.inputs, is_causal=self.causal)

    def backward(self):
        return torch.autograd.grad(self.output, self.inputs, self.d_output, retain_graph=True)


def peers_of(problem):
    if SDPBackend is None:
        return {"PyTorch": None} if hasattr(torch.nn.functional, "scaled_dot_product_attention") else {}
    if not problem["gpu"]:
        return {"CPU flash": SDPBackend.FLASH_ATTENTION}
    half = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FA2": SDPBackend.FLASH_ATTENTION} if problem["type"] != "float32" else {}
    return {**half, "mem-eff": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def expect_near(name, got, want, allowed):
    error = (got.double() - want).abs().max().item()
    if not error <= allowed * max(want.abs().max().item(), 1e-2):
        raise NoTime("wrong", f"{name} is off by {error:.2e}")


def check(problem, ours):
    """Two heads in float64, by queries' blocks, so that no large matrix is needed."""
    allowed = ALLOWED[problem["type"]]
    length = problem["length"]
    heads = {(0, 0), (problem["batch"] - 1, problem["heads"] - 1)}
    for b, h in heads:
        q, k, v = (x[b, h].double() for x in ours.inputs)
        d_output = ours.d_output[b, h].double() if ours.gradients else None
        d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)
        for first in range(0, length, 1024):
            rows = slice(first, min(first + 1024, length))
            scores = q[rows] @ k.T / math.sqrt(problem["width"])
            if problem["causal"]:
                later = torch.arange(length, device=q.device)[None] > torch.arange(length, device=q.device)[rows, None]
                scores.masked_fill_(later, -math.inf)
            weights = scores.softmax(1)
            want = weights @ v
            expect_near("output", ours.output[b, h, rows], want, allowed)
            if d_output is None:
                continue
            d_scores = weights * (d_output[rows] @ v.T - (d_output[rows] * want).sum(1, keepdim=True))
            d_scores /= math.sqrt(problem["width"])
            d_k += d_scores.T @ q[rows]
            d_v += weights.T @ d_output[rows]
            expect_near("d_query", ours.gradients[0][b, h, rows], d_scores @ k, allowed)
        if d_output is not None:
            expect_near("d_key", ours.gradients[1][b, h], d_k, allowed)
            expect_near("d_value", ours.gradients[2][b, h], d_v, allowed)


def call_of(problem, run):
    if problem["direction"] == "forward":
        return run.forward
    if problem["direction"] == "backward":
        return run.backward

    def both():
        run.output = run.forward() if isinstance(run, Peer) else run.forward()[0]
        run.backward()

    return both


def milliseconds(call, gpu):
    if not gpu:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)  # cycles in which Python gets ahead: what is measured is the GPU's work, not the host's
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def times(calls, gpu):
    """Medians and quartiles, each round calling everybody once."""
    for _ in range(WARM_UP):
        for call in calls.values():
            milliseconds(call, gpu)
    each = {who: [] for who in calls}
    begin = time.perf_counter()
    for rounds in range(MOST):
        if rounds >= FEWEST and time.perf_counter() - begin > ENOUGH_S * len(calls):
            break
        for who, call in calls.items():
            each[who].append(milliseconds(call, gpu))
    result = {}
    for who, numbers in each.items():
        low, median, high = statistics.quantiles(numbers, n=4)
        result[who] = {"median": median, "low": low, "high": high, "calls": len(numbers)}
    return result


def measure(problem):
    device = "cuda" if problem["gpu"] else "cpu"
    torch.manual_seed(1)
    if not problem["gpu"]:
        torch.set_num_threads(problem["threads"] or ALL_THREADS)
    # The model's layout, [B, S, H, D] in memory, for everybody.
    shape = (problem["batch"], problem["length"], problem["heads"], problem["width"])
    dtype = getattr(torch, problem["type"])
    q, k, v, d_output = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(4))
    ours = Ours(problem, q, k, v, d_output)
    check(problem, ours)
    runs, refused = {"ours": ours}, {}
    for who, backend in peers_of(problem).items():
        if who == "math" and problem["length"] > 8192:
            continue  # a matrix of queries x keys for every head
        try:
            runs[who] = Peer(problem, backend, q, k, v, d_output)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            refused[who] = str(error).split("\n")[0]
    return {"times": times({who: call_of(problem, run) for who, run in runs.items()}, problem["gpu"]),
            "refused": refused, "status": "ok"}


def ceilings(where):
    gpu = where == "gpu"
    if not gpu:
        torch.set_num_threads(where or ALL_THREADS)
    device = "cuda" if gpu else "cpu"

    def best(call, rounds=7):
        return min(milliseconds(call, gpu) for _ in range(rounds))

    def rate(dtype, side):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        return 2.0 * side**3 / best(lambda: a @ b) * 1e-9

    source = torch.ones(2**28 if gpu else 2**26, device=device)
    target = torch.empty_like(source)
    copied = 2.0 * source.numel() * 4 / best(lambda: target.copy_(source)) * 1e-6
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    return {"name": f"{name}, PyTorch {torch.__version__}", "copy_gb_s": copied, "float32_tflops": rate(torch.float32, 8192 if gpu else 2048),
            "tensor_tflops": rate(torch.bfloat16, 8192) if gpu else 0.0}


def answer(question):
    if "ceilings" in question:
        return ceilings(question["ceilings"])
    try:
        result = measure(question)
    except NoTime as reason:
        result = {"status": reason.status, "why": reason.why}
    except flashkata.NotImplementedStep as error:
        result = {"status": "not implemented", "why": error.file}
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        result = {"status": "out of memory", "why": str(error).split("\n")[0]}
    except Exception as error:
        result = {"status": "failed", "why": str(error).split("\n")[0]}
    if question["gpu"]:
        torch.cuda.empty_cache()
    return {"problem": question, **result}


if __name__ == "__main__":
    ALL_THREADS = torch.get_num_threads()
    flashkata.use(path=sys.argv[1])
    for text in sys.stdin:
        if text.strip():
            result = answer(json.loads(text))
            print(json.dumps(result), flush=True)
            if result.get("status") == "failed" and result["problem"]["gpu"]:
                sys.exit(3)  # after an error of the GPU nothing works any more in this process
