"""What ./kata bench --against torch starts: measures the steps of one library and PyTorch's kernels, alternated.

    python3 bench_worker.py build/learn-cuda/bindings/libflashkata.so

Reads problems from its standard input, one in a line of JSON, and prints what came of each; benchmarks/bench/problem.hpp
says what is in them. Peers, whichever take the problem: on a GPU cuDNN, FlashAttention-2 ("FA2"), mem-efficient and math
behind scaled_dot_product_attention; for packed sequences and for windows the kernels below that; for groups one call of
steps 2.05 and 3.05 for each ("separate"); on the CPU PyTorch's flash kernel. Our answer is compared with float64 before
it is timed, and a peer's with ours. With a library for the virtual GPU, answers are compared, and times mean nothing.
"""

import json
import math
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # OpenMP's threads would spin on cores that ours need
os.environ.setdefault("KMP_BLOCKTIME", "0")

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bindings"))
import flashkata  # noqa: E402
import flashkata.library  # noqa: E402
from flashkata import operators  # noqa: E402

try:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention
except ImportError:  # before PyTorch 2.3: nobody to compare with
    SDPBackend = None

ALLOWED = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}
FEWEST, MOST = 3, 40  # calls
PATIENCE = 4
LARGEST_MATH = 2048  # queries: a matrix of queries x keys for every head
L2_BYTES = 64 << 20  # a cache that is smaller is read in several copies, or it would stay on the chip
CORES = os.sched_getaffinity(0)


def first_words(error):
    """The first line, and of what PyTorch says when memory runs out only what was asked for."""
    return str(error).split("\n")[0].split(" GPU ")[0]


class NoTime(Exception):
    def __init__(self, status, why):
        self.status, self.why = status, why


# ---- Who takes part: forward() gives an output [B, H, S, D], backward() the gradients of query, key and value --------


class Ours:
    """The library's forward and backward, without autograd around them."""

    def __init__(self, problem, q, k, v, d_output):
        self.inputs, self.d_output = (q, k, v), d_output
        self.options = (problem["causal"], 1.0 / math.sqrt(problem["width"]), KERNELS and problem["gpu"], False)
        self.extras = operators.Extras()
        if problem["packed"]:
            ends = cumulative(problem, q.device)
            longest = longest_of(problem)
            self.extras = operators.Extras(ends, ends, longest, longest)
        elif problem["groups"]:
            self.extras = operators.Extras(groups=operators._flat(problem["groups"]))
        elif problem["dropout"] > 0:
            self.extras = operators.Extras(dropout_p=problem["dropout"], dropout_seed=1, dropout_offset=2)
        elif problem["window"]:
            self.extras = operators.Extras(window=tuple(problem["window"]))
        self.output = self.forward()
        self.gradients = self.backward() if problem["direction"] in ("backward", "both") else ()

    def forward(self):
        output, self.lse = operators._forward(*self.inputs, *self.options, *self.extras)
        return output

    def backward(self):
        return operators._backward(self.d_output, *self.inputs, self.output, self.lse, *self.options, *self.extras)


class Separate:
    """A call of steps 2.05 and 3.05 for each group: query heads that share keys reach them through a stride of 0."""

    def __init__(self, problem, q, k, v, d_output):
        self.groups, self.inputs, self.d_output = problem["groups"], (q, k, v), d_output
        self.options = (problem["causal"], 1.0 / math.sqrt(problem["width"]), True, False, operators.Extras())
        self.output = self.forward()
        self.gradients = self.backward() if problem["direction"] == "backward" else ()

    def slices(self, group, *of_queries):
        q_begin, q_end, k_begin, k_end = group
        shared = self.inputs[0].shape[1] // self.inputs[1].shape[1]
        queries = [x[0].unflatten(0, (-1, shared))[:, :, q_begin:q_end] for x in of_queries]
        keys = [x[0].unsqueeze(1)[:, :, k_begin:k_end].expand(-1, shared, -1, -1) for x in self.inputs[1:]]
        return queries, keys

    def forward(self):
        output = torch.empty_like(self.inputs[0])
        self.lse = []
        for group in self.groups:
            (q, part), keys = self.slices(group, self.inputs[0], output)
            self.lse.append(q.new_empty(q.shape[:3], dtype=torch.float32))
            flashkata.library.current().forward(operators._problem(q, *keys, part, self.lse[-1], *self.options))
        return output

    def backward(self):
        d_q = torch.empty_like(self.inputs[0])
        d_k, d_v = (torch.zeros(x.shape, device=x.device) for x in self.inputs[1:])
        for group, lse in zip(self.groups, self.lse):
            (q, output, d_output, part), keys = self.slices(group, self.inputs[0], self.output, self.d_output, d_q)
            sums = [torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in keys]  # of each query head still
            scratch = {"delta": torch.empty_like(lse), "d_query_sum": q.new_empty(q.shape, dtype=torch.float32)}
            flashkata.library.current().backward(operators._problem(
                q, *keys, output, lse, *self.options, d_output=d_output, d_query=part, d_key=sums[0], d_value=sums[1],
                **scratch))
            for total, each in zip((d_k, d_v), sums):
                total[0, :, group[2] : group[3]] += each.sum(1, dtype=torch.float32)
        return d_q, d_k.to(d_q.dtype), d_v.to(d_q.dtype)


class Sdpa:
    """One of the kernels behind scaled_dot_product_attention."""

    def __init__(self, problem, backend, q, k, v, d_output):
        self.backend, self.d_output = backend, d_output
        self.options = {"is_causal": problem["causal"], "dropout_p": problem["dropout"]}
        self.shared = problem["heads"] // problem["kv_heads"]
        if self.shared > 1 and backend != SDPBackend.EFFICIENT_ATTENTION:
            self.options["enable_gqa"] = True
        needs = problem["direction"] in ("backward", "both")
        self.inputs = [x.detach().requires_grad_(needs) for x in (q, k, v)]
        self.output = self.forward()
        self.gradients = self.backward() if needs else ()

    def forward(self):
        q, k, v = self.inputs
        if self.shared > 1 and self.backend == SDPBackend.EFFICIENT_ATTENTION:  # it knows no shared heads: copies
            k, v = (x.repeat_interleave(self.shared, dim=1) for x in (k, v))
        with sdpa_kernel(self.backend):
            return scaled_dot_product_attention(q, k, v, **self.options)

    def backward(self):
        return torch.autograd.grad(self.output, self.inputs, self.d_output, retain_graph=True)


class Efficient:
    """The mem-efficient kernel itself, which takes packed sequences and windows: [B, S, H, D]."""

    def __init__(self, problem, q, k, v, d_output):
        self.inputs, self.d_output = [x.transpose(1, 2) for x in (q, k, v)], d_output.transpose(1, 2)
        ends = cumulative(problem, q.device) if problem["groups"] else None
        self.longest = longest_of(problem) if problem["groups"] else problem["length"]
        self.sequences = (ends, ends)
        self.mask = 2 if problem["causal"] else 0  # 2: aligned to the bottom right
        self.window = {"window_size": problem["window"][0] + 1} if problem["window"] else {}
        self.output = self.forward()
        self.gradients = self.backward() if problem["direction"] == "backward" else ()

    def forward(self):
        longest = (self.longest, self.longest) if self.sequences[0] is not None else (None, None)
        output, *self.kept = torch.ops.aten._efficient_attention_forward(
            *self.inputs, None, *self.sequences, *longest, 0.0, self.mask, True, **self.window)
        return output.transpose(1, 2)

    def backward(self):
        lse, seed, offset = self.kept[:3]
        gradients = torch.ops.aten._efficient_attention_backward(
            self.d_output, *self.inputs, None, self.output.transpose(1, 2), *self.sequences, self.longest, self.longest,
            lse, 0.0, seed, offset, self.mask, False, **self.window)
        return [x.transpose(1, 2) for x in gradients[:3]]


class FlashPacked:
    """FlashAttention-2 over packed sequences: [T, H, D]."""

    def __init__(self, problem, q, k, v, d_output):
        self.inputs, self.d_output = [x[0].transpose(0, 1) for x in (q, k, v)], d_output[0].transpose(0, 1)
        ends, longest = cumulative(problem, q.device), longest_of(problem)
        self.sequences, self.causal = (ends, ends, longest, longest), problem["causal"]
        self.output = self.forward()
        self.gradients = self.backward() if problem["direction"] == "backward" else ()

    def forward(self):
        output, *self.kept = torch.ops.aten._flash_attention_forward(*self.inputs, *self.sequences, 0.0, self.causal, False)
        return output.transpose(0, 1).unsqueeze(0)

    def backward(self):
        lse, state, unused = self.kept[:3]
        gradients = torch.ops.aten._flash_attention_backward(
            self.d_output, *self.inputs, self.output[0].transpose(0, 1), lse, *self.sequences, 0.0, self.causal, state, unused)
        return [x.transpose(0, 1).unsqueeze(0) for x in gradients]


def sdpa(backend):
    return lambda problem, *tensors: Sdpa(problem, backend, *tensors)


def peers_of(problem):
    """{name: what makes it}"""
    if SDPBackend is None:
        return {}
    if not problem["gpu"]:
        return {"CPU flash": sdpa(SDPBackend.FLASH_ATTENTION)}
    if problem["groups"]:
        disjoint = all(g[:2] == g[2:] for g in problem["groups"])
        if not disjoint:
            return {"separate": Separate}
        return {"mem-eff": Efficient} if problem["packed"] else {"FA2": FlashPacked, "separate": Separate}
    if problem["window"]:
        return {"mem-eff": Efficient} if problem["causal"] and problem["window"][1] == 0 else {}
    half = {"cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION), "FA2": sdpa(SDPBackend.FLASH_ATTENTION)}
    rest = {"mem-eff": sdpa(SDPBackend.EFFICIENT_ATTENTION), "math": sdpa(SDPBackend.MATH)}
    if problem["direction"] == "decode":
        return half
    if problem["queries"] > LARGEST_MATH:
        del rest["math"]
    return {**half, **rest} if problem["type"] != "float32" else rest


def cumulative(problem, device):
    """Where each sequence begins, and where the last one ends."""
    return torch.tensor([group[0] for group in problem["groups"]] + [problem["length"]], dtype=torch.int32, device=device)


def longest_of(problem):
    return max(group[1] - group[0] for group in problem["groups"])


# ---- Is it right? ----------------------------------------------------------------------------------------------------


def expect_near(name, got, want, allowed):
    error = (got.double() - want).abs().max().item()
    if not error <= allowed * max(want.abs().max().item(), 1e-2):
        raise NoTime("wrong", f"{name} is off by {error:.2e}")


def seen(problem, rows, keys):
    """[rows, keys]: which of these keys these queries see, as Problem::keys_of() in problem.hpp."""
    place = rows + problem["length"] - problem["queries"]
    first, last = torch.zeros_like(rows), torch.full_like(rows, problem["length"])
    if problem["causal"]:
        last = place + 1
    for q_begin, q_end, k_begin, k_end in problem["groups"]:
        inside = (rows >= q_begin) & (rows < q_end)
        first[inside] = k_begin
        last[inside] = k_end - (q_end - 1 - rows[inside]) if problem["causal"] else k_end
    if problem["window"]:
        first, last = torch.maximum(first, place - problem["window"][0]), torch.minimum(last, place + problem["window"][1] + 1)
    return (keys >= first[:, None]) & (keys < last[:, None])


def some_keys(problem):
    """As many as a head has channels."""
    return [d * (problem["length"] // problem["width"]) for d in range(problem["width"])]


def one_hot(problem, v):
    """Values that show which weights have fallen: channel d of the output is the weight of the d-th of some_keys()."""
    result = torch.zeros_like(v)
    for channel, key in enumerate(some_keys(problem)):
        result[:, :, key, channel] = 1
    return result


def check(problem, ours):
    """Two heads in float64: some queries, and the gradients of some keys. Where weights fall, v is one_hot()."""
    allowed, scale, p = ALLOWED[problem["type"]], 1.0 / math.sqrt(problem["width"]), problem["dropout"]
    q, k, v = ours.inputs
    shared = problem["heads"] // problem["kv_heads"]
    rows = torch.linspace(0, problem["queries"] - 1, 64, device=q.device).round().long()
    all_queries, all_keys = (torch.arange(problem[name], device=q.device) for name in ("queries", "length"))
    keys = torch.tensor(some_keys(problem), device=q.device)

    def factors(weights, output):
        """What dropout multiplies the weights of some_keys() by, as far as the output shows it."""
        kept = output.double() > 0.5 * weights / (1 - p)
        part = 1 - kept[weights > 0].double().mean().item()
        if abs(part - p) > 0.05:
            raise NoTime("wrong", f"dropout: {part:.3f} of the weights fall")
        return kept.double() / (1 - p)

    for b, h in {(0, 0), (problem["batch"] - 1, problem["heads"] - 1)}:
        key, value = k[b, h // shared].double(), v[b, h // shared].double()
        scores = (q[b, h, rows].double() @ key.T * scale).masked_fill_(~seen(problem, rows, all_keys), -math.inf)
        weights = scores.softmax(1)
        factor = torch.ones_like(weights)
        if p > 0:
            factor = torch.zeros_like(weights)
            factor[:, keys] = factors(weights[:, keys], ours.output[b, h, rows])
        expect_near("lse", ours.lse[b, h, rows], scores.logsumexp(1), allowed)
        expect_near("output", ours.output[b, h, rows], (weights * factor) @ value, allowed)
        if not ours.gradients:
            continue
        d_output = ours.d_output[b, h, rows].double()
        delta = (d_output * ours.output[b, h, rows].double()).sum(1, keepdim=True)
        d_scores = weights * (factor * (d_output @ value.T) - delta) * scale
        expect_near("d_query", ours.gradients[0][b, h, rows], d_scores @ key, allowed)
        d_key, d_value = (torch.zeros_like(key[keys]) for _ in range(2))
        mask = ~seen(problem, all_queries, keys)
        for head in range(h // shared * shared, (h // shared + 1) * shared):
            query, output, d_output = (x[b, head].double() for x in (q, ours.output, ours.d_output))
            scores = (query @ key[keys].T * scale).masked_fill_(mask, -math.inf)
            weights = (scores - ours.lse[b, head, :, None].double()).exp()
            factor = factors(weights, output) if p > 0 else 1.0
            delta = (d_output * output).sum(1, keepdim=True)
            d_key += (weights * (factor * (d_output @ value[keys].T) - delta) * scale).T @ query
            d_value += (weights * factor).T @ d_output
        expect_near("d_key", ours.gradients[1][b, h // shared, keys], d_key, allowed)
        expect_near("d_value", ours.gradients[2][b, h // shared, keys], d_value, allowed)


def agree(problem, peer, ours):
    """A peer that answers another question is no peer."""
    if problem["dropout"] > 0:
        return  # its random numbers are others
    for name, got, want in zip(("output", "d_query", "d_key", "d_value"), (peer.output, *peer.gradients),
                               (ours.output, *ours.gradients)):
        size = max(want.abs().max().item(), 1e-2)
        if not (got - want).abs().max().item() <= ALLOWED[problem["type"]] * size:
            raise NoTime("wrong", f"its {name} is another one")


# ---- How long does it take? ------------------------------------------------------------------------------------------


def call_of(problem, run):
    if problem["direction"] == "forward":
        return run.forward
    if problem["direction"] == "backward":
        return run.backward

    def both():
        run.output = run.forward()
        run.backward()

    return both


def milliseconds(call, gpu, cycles=1_000_000):
    """cycles: for so long the GPU sleeps first and the host gets ahead; what is measured is the GPU's work alone."""
    if not gpu:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def warm(call, gpu):
    """Calls once; returns for how many cycles the GPU has to sleep until the host has asked for all of a call's work."""
    start = time.perf_counter()
    call()
    asked = time.perf_counter() - start
    if gpu:
        torch.cuda.synchronize()
    return min(max(1_000_000, int(4e9 * asked)), 40_000_000)  # twice as long, at 2 GHz; 20 ms at most


def quartiles(numbers):
    return statistics.quantiles(numbers, n=4, method="inclusive")


def unsteady(numbers):
    """Whether something else has been going on: the quartiles are more than 5 percent apart."""
    low, median, high = quartiles(numbers)
    return high - low > 0.05 * median


def times(calls, gpu, seconds, repeated=1):
    """Medians and quartiles, each round calling everybody once, and the first one last in the next, so that nobody always
    runs behind the same neighbour; a call is `repeated` of them. As long as somebody is unsteady it goes on, up to
    PATIENCE times as long."""
    each = {who: [] for who in calls}
    cycles = {who: warm(call, gpu) for who, call in calls.items()}
    order = list(calls)
    begin = time.perf_counter()
    spent = lambda: time.perf_counter() - begin  # noqa: E731
    for rounds in range(MOST):
        if rounds >= (2 if spent() > 1.0 else FEWEST) and spent() > seconds * len(calls):
            if spent() > PATIENCE * seconds * len(calls) or not any(map(unsteady, each.values())):
                break
        for who in order:
            each[who].append(milliseconds(calls[who], gpu, cycles[who]) / repeated)
        order = order[1:] + order[:1]
    result = {}
    for who, numbers in each.items():
        low, median, high = quartiles(numbers)
        result[who] = {"median": median, "low": low, "high": high, "calls": len(numbers)}
    return result


def place(problem):
    """The device; on the CPU also how many threads, one of them pinned to one core."""
    alone = not problem["gpu"] and problem["threads"] == 1
    os.sched_setaffinity(0, {max(CORES)} if alone else CORES)
    if not problem["gpu"]:
        torch.set_num_threads(problem["threads"] or ALL_THREADS)
    return "cuda" if problem["gpu"] and not KERNELS else "cpu"


def with_peers(problem, ours, make_peers):
    """{"ours": ours, ...}, and why others are not among them; make_peers: {name: a function that makes it}."""
    runs, refused = {"ours": ours}, {}
    for who, make in make_peers.items():
        try:
            peer = make()
            agree(problem, peer, ours)
            runs[who] = peer
        except NoTime as reason:
            refused[who] = reason.why
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            refused[who] = first_words(error)
    return runs, refused


def measure(problem):
    device = place(problem)
    torch.manual_seed(1)
    dtype = getattr(torch, problem["type"])

    def normal(heads):  # the model's layout, [B, S, H, D] in memory, for everybody
        shape = (problem["batch"], problem["length"], heads, problem["width"])
        return torch.randn(shape, device=device, dtype=dtype).transpose(1, 2)

    q, k, v, d_output = (normal(problem[heads]) for heads in ("heads", "kv_heads", "kv_heads", "heads"))
    if problem["dropout"] > 0:
        check(problem, Ours(problem, q, k, one_hot(problem, v), d_output))
    ours = Ours(problem, q, k, v, d_output)
    if problem["dropout"] == 0:
        check(problem, ours)
    tensors = (q, k, v, d_output)
    runs, refused = with_peers(problem, ours, {who: lambda make=make: make(problem, *tensors)
                                               for who, make in peers_of(problem).items()})
    calls = {who: call_of(problem, run) for who, run in runs.items()}
    return {"times": times(calls, device == "cuda", problem["seconds"]), "refused": refused, "status": "ok"}


# ---- Decoding: one new query of each sequence ------------------------------------------------------------------------


class Decoder:
    """Somebody's call(key, value) for each copy of the cache, recorded as one piece of work for the GPU: a call is so
    short that the host could not keep up."""

    def __init__(self, call, copies):
        self.output, self.gradients = call(*copies[0]), ()
        if self.output.is_cuda:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                for copy in copies:
                    call(*copy)
            self.forward = self.graph.replay
        else:
            self.forward = lambda: [call(*copy) for copy in copies]


def measure_decoding(problem):
    device = place(problem)
    torch.manual_seed(1)
    dtype = getattr(torch, problem["type"])
    batch, heads, kv_heads, length, width, page = (
        problem[name] for name in ("batch", "heads", "kv_heads", "length", "width", "page"))
    q = torch.randn(batch, heads, problem["queries"], width, device=device, dtype=dtype)
    cache = (batch, kv_heads, length, width)
    count = max(1, min(16, -(-4 * L2_BYTES // (2 * math.prod(cache) * q.element_size()))))
    copies = [[torch.empty(cache, device=device, dtype=dtype).normal_() for _ in range(2)] for _ in range(count)]
    lengths = torch.full((batch,), length, device=device, dtype=torch.int32)
    table = None
    if page:
        table = torch.randperm(batch * length // page, device=device).int().view(batch, -1)

    def of_page(x):  # the same memory, as pages
        return x.view(-1, kv_heads, page, width) if page else x

    def ours(key, value):
        return flashkata.decode(q, of_page(key), of_page(value), lengths, block_table=table, causal=False,
                                kernels=KERNELS and problem["gpu"])

    def rows(x, b, head):
        return of_page(x)[table[b].long(), head].reshape(length, width) if page else x[b, head]

    our_run = Decoder(ours, copies)
    for b, h in {(0, 0), (batch - 1, heads - 1)}:
        key, value = (rows(x, b, h // (heads // kv_heads)).double() for x in copies[0])
        weights = (q[b, h].double() @ key.T / math.sqrt(width)).softmax(1)
        expect_near("output", our_run.output[b, h], weights @ value, ALLOWED[problem["type"]])

    def theirs(make):
        def call(key, value):
            return make(problem, q, key, value, None).output

        return lambda: Decoder(call, copies)

    reference = our_run
    if page:  # PyTorch's read a cache in one piece, and are compared with ours on that
        reference = Decoder(lambda key, value: flashkata.decode(q, key, value, lengths, causal=False,
                                                                kernels=KERNELS and problem["gpu"]), copies[:1])
    peers = {who: theirs(make) for who, make in peers_of(problem).items()}
    runs, refused = with_peers(problem, reference, peers)
    runs["ours"] = our_run
    calls = {who: run.forward for who, run in runs.items()}
    return {"times": times(calls, device == "cuda", problem["seconds"], count), "refused": refused, "status": "ok"}


# ---- What the machine could do ---------------------------------------------------------------------------------------


def processor_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def ceilings(where):
    gpu = where == "gpu"
    device = place({"gpu": gpu, "threads": where})

    def best(call, rounds=7):
        return min(milliseconds(call, gpu) for _ in range(rounds))

    def rate(dtype, side):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        if not gpu and torch.backends.mkldnn.is_available():  # a @ b is slow where PyTorch has no fast BLAS
            a, b = a.to_mkldnn(), b.to_mkldnn()
            return 2.0 * side**3 / best(lambda: torch.nn.functional.linear(a, b)) * 1e-9
        return 2.0 * side**3 / best(lambda: a @ b) * 1e-9

    source = torch.ones(2**28 if gpu else 2**26, device=device)
    target = torch.empty_like(source)
    copied = 2.0 * source.numel() * 4 / best(lambda: target.copy_(source)) * 1e-6
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if gpu else f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return {"name": f"{name}, PyTorch {torch.__version__}", "copy_gb_s": copied,
            "float32_tflops": rate(torch.float32, 8192 if gpu else 2048), "tensor_tflops": rate(torch.bfloat16, 8192) if gpu else 0.0}


def answer(question):
    if "ceilings" in question:
        return ceilings(question["ceilings"])
    try:
        result = measure_decoding(question) if question["direction"] == "decode" else measure(question)
    except NoTime as reason:
        result = {"status": reason.status, "why": reason.why}
    except ValueError as error:
        result = {"status": "refused", "why": str(error)}
    except flashkata.NotImplementedStep as error:
        result = {"status": "not implemented", "why": error.file}
    except Exception as error:
        memory = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "out of memory" in str(error)
        result = {"status": "out of memory" if memory else "failed", "why": first_words(error)}
    if result["status"] == "out of memory" and question["gpu"] and not KERNELS:
        torch.cuda.empty_cache()
    return {"problem": question, **result}


def start(path):
    global ALL_THREADS, KERNELS
    ALL_THREADS = torch.get_num_threads()
    KERNELS = not flashkata.use(path=path).has_cuda  # "gpu" is the virtual one then
    warnings.simplefilter("ignore")  # of kernels that refuse


if __name__ == "__main__":
    start(sys.argv[1])
    for text in sys.stdin:
        if text.strip():
            result = answer(json.loads(text))
            print(json.dumps(result), flush=True)
            if result.get("status") == "failed" and result["problem"]["gpu"]:
                sys.exit(3)  # after an error of the GPU nothing works any more in this process
