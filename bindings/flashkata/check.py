"""python3 -m flashkata.check: the steps, called from PyTorch, beside PyTorch's own attention.

For every problem of a grid: the output and the three gradients, as the largest error against float64 over the largest
sum of sizes that an element is made of (an element made of 3 - 3 has the size 6). Next to each error what is allowed:
3 times what eager attention errs that rounds its weights and results to the tensors' type, and for float32 1e-5. Where
this PyTorch has scaled_dot_product_attention, its error is shown too.
"""

import argparse
import math
import sys

from flashkata import library

# batch, heads, Sq, Sk, D, causal
QUICK = [
    (1, 1, 5, 7, 16, False),
    (2, 3, 37, 37, 64, True),
    (1, 2, 40, 33, 64, False),
    (1, 2, 33, 70, 128, True),
]
FULL = QUICK + [
    (1, 2, 64, 64, 32, False),
    (2, 8, 256, 256, 64, True),
    (1, 16, 512, 512, 128, False),
    (1, 16, 512, 512, 128, True),
    (4, 8, 1024, 1024, 64, True),
    (1, 2, 113, 203, 64, False),
    (1, 2, 239, 1, 64, False),
    (1, 2, 127, 513, 128, True),
    (1, 2, 1023, 1024, 64, True),
    (2, 4, 100, 100, 40, True),  # padded to 64
]
NAMES = ("output", "dq", "dk", "dv")


def eager(q, k, v, d_output, causal, rounded=lambda x: x, sizes=False):
    """Output and gradients by the formulas in float64; `rounded` is applied to the weights and to every result. With
    `sizes`, the same sums of what their terms are in size."""
    scale = 1.0 / math.sqrt(q.shape[3])
    q, k, v, d_output = (x.double() for x in (q, k, v, d_output))
    scores = scale * q @ k.transpose(2, 3)
    if causal:
        queries, keys = scores.shape[2:]
        allowed = scores.new_ones(queries, keys).tril(keys - queries).bool()
        scores = scores.masked_fill(~allowed, -math.inf)
    weights = scores.softmax(3).nan_to_num(0.0)  # a query without keys
    output = weights @ v
    if sizes:
        q, k, v, d_output, output = (x.abs() for x in (q, k, v, d_output, output))
    d_weights = d_output @ v.transpose(2, 3)
    delta = (d_output * output).sum(3, keepdim=True)
    d_scores = weights * (d_weights + delta if sizes else d_weights - delta)
    weights, d_scores = rounded(weights), rounded(d_scores)
    return [
        rounded(x)
        for x in (
            weights @ v,
            scale * d_scores @ k,
            scale * d_scores.transpose(2, 3) @ q,
            weights.transpose(2, 3) @ d_output,
        )
    ]


def with_autograd(attention, q, k, v, d_output):
    """The output and the gradients, and None; or, if a step of the way back is missing, the output and that step."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    output = attention(q, k, v)
    try:
        output.backward(d_output)
    except library.NotImplementedStep as missing:
        return [output.detach()], missing
    return [output.detach(), q.grad, k.grad, v.grad], None


def errors(got, want, sizes):
    return [
        ((g.double() - w).abs().max() / size.max().clamp(min=1e-30)).item() if w.numel() else 0.0
        for g, w, size in zip(got, want, sizes)
    ]


def row(torch, problem, dtype, device, kernels):
    """What one problem comes to: (ours, allowed, PyTorch's own or None), or the step that is missing."""
    from flashkata import operators

    batch, heads, queries, keys, width, causal = problem
    generator = torch.Generator().manual_seed(hash(problem) % 2**31)

    def normal(tokens):
        # As a model lays it out: token after token.
        x = torch.randn(batch, tokens, heads, width, generator=generator)
        return x.transpose(1, 2).to(device=device, dtype=dtype)

    q, k, v, d_output = normal(queries), normal(keys), normal(keys), normal(queries)
    want = eager(q, k, v, d_output, causal)
    sizes = eager(q, k, v, d_output, causal, sizes=True)
    baseline = errors(eager(q, k, v, d_output, causal, lambda x: x.to(dtype).double()), want, sizes)
    allowed = [3.0 * e + (1e-5 if dtype == torch.float32 else 1e-6) for e in baseline]

    def ours(q, k, v):
        return operators.attention(q, k, v, causal=causal, kernels=kernels)

    try:
        got, missing = with_autograd(ours, q, k, v, d_output)
    except library.NotImplementedStep as of_forward:
        return of_forward
    theirs = None
    sdpa = getattr(torch.nn.functional, "scaled_dot_product_attention", None)
    if sdpa and not (causal and queries != keys):  # its is_causal is aligned to the top left
        answer, _ = with_autograd(lambda q, k, v: sdpa(q, k, v, is_causal=causal), q, k, v, d_output)
        theirs = errors(answer, want, sizes)
    return errors(got, want, sizes), allowed, theirs, missing


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python3 -m flashkata.check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=library.PRESETS, help="whose steps; by default your own")
    parser.add_argument("--library", metavar="PATH", help="a libflashkata.so instead of a preset")
    parser.add_argument("--grid", choices=("quick", "full"), default="quick")
    options = parser.parse_args(arguments)
    try:
        import torch
    except ImportError:
        print("flashkata.check compares with PyTorch, and this python3 has none. Debian and Ubuntu: apt install "
              "python3-torch; otherwise: pip install torch.", file=sys.stderr)
        return 2
    try:
        steps = library.use(options.preset, options.library)
    except library.FlashKataError as error:
        print(error, file=sys.stderr)
        return 2

    where = [("cpu", False, dtype) for dtype in (torch.float32, torch.bfloat16)]
    if steps.has_cuda and torch.cuda.is_available():
        where += [("cuda", False, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    elif not steps.has_cuda:
        where += [("cpu", True, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    else:
        print("This library was built for CUDA, and PyTorch sees no GPU: kernels are not checked.")
    print(f"PyTorch {torch.__version__}, steps of {steps.answers or library.ROOT}")
    peer = hasattr(torch.nn.functional, "scaled_dot_product_attention")
    print("largest error over the largest sum of sizes: ours / allowed" + (" (PyTorch's own)" if peer else ""))
    cell = 26 if peer else 18

    agreed, partly, wrong, missing = 0, 0, 0, {}
    for device, kernels, dtype in where:
        place = "virtual GPU" if kernels else "GPU" if device == "cuda" else "CPU"
        print(f"\n{place}, {str(dtype).split('.')[1]}")
        print(f"  {'B x H x Sq x Sk x D':32}" + "".join(name.rjust(cell) for name in NAMES))
        for problem in FULL if options.grid == "full" else QUICK:
            batch, heads, queries, keys, width, causal = problem
            if kernels and batch * heads * queries * keys * width > 2**21:
                continue  # long ones are for a real GPU
            text = f"{batch} x {heads} x {queries} x {keys} x {width}" + (" causal" if causal else "")
            result = row(torch, problem, dtype, device, kernels)
            if isinstance(result, library.NotImplementedStep):
                missing[result.step] = result.file
                print(f"  {text:32}  step {result.step} is not implemented yet")
                continue
            ours, allowed, theirs, stub = result
            cells = []
            for i, (error, bound) in enumerate(zip(ours, allowed)):
                own = f" ({theirs[i]:.0e})" if theirs else ""
                cells.append(f"{error:.1e} / {bound:.0e}{own}".rjust(cell))
            off = [name for name, error, bound in zip(NAMES, ours, allowed) if not error <= bound]
            verdict = f"   wrong: {', '.join(off)}" if off else ""
            if stub:
                missing[stub.step] = stub.file
                verdict += f"   step {stub.step} is not implemented yet"
            print(f"  {text:32}" + "".join(cells) + verdict, flush=True)
            wrong += bool(off)
            agreed += not off and not stub
            partly += not off and bool(stub)
    summary = [f"{agreed} agree", f"{wrong} do not"]
    if partly:
        summary.insert(1, f"{partly} as far as there are steps")
    steps_missing = f"; not implemented yet: {', '.join(sorted(missing))}" if missing else ""
    print(f"\n{', '.join(summary)}{steps_missing}")
    for step, file in sorted(missing.items()):
        print(f"  {step}  {file}")
    return 1 if wrong else 3 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
