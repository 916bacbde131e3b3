"""The steps as PyTorch operators, flashkata::attention_forward and flashkata::attention_backward, with autograd.

Which step answers: float32 on the CPU 2.03 and 3.03 (16-bit tensors are widened first); on a GPU float32 2.04 and 3.04,
float16 and bfloat16 2.05 and 3.05. With ``kernels=True`` CPU tensors go to the kernels too, on the virtual GPU.
"""

import contextlib
import math

import torch

from flashkata import library

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
WIDTHS = (16, 32, 64, 128)


def attention(q, k, v, *, causal=False, scale=None, kernels=False, deterministic=None):
    """softmax(scale q k^T) v: what torch.nn.functional.scaled_dot_product_attention computes, and its gradients.

    q [B, H, Sq, D], k [B, H, Sk, D], v [B, H, Sk, Dv], of one type and on one device. Returns [B, H, Sq, Dv].

    causal         key j is visible to query i when j <= i + Sk - Sq: aligned to the bottom right. PyTorch's is_causal is
                   aligned to the top left; where Sq = Sk the two are one.
    scale          multiplies q k^T; 1 / sqrt(D) by default.
    kernels        CPU tensors only: run the CUDA steps, on the virtual GPU.
    deterministic  on a GPU: gradients that are the same to the bit from call to call; by default as
                   torch.use_deterministic_algorithms() says.

    A query that may attend to nothing gets 0, and gradients of 0. On a GPU D and Dv may be at most 128; widths other
    than 16, 32, 64, 128 are padded with zeros. Raises ValueError naming the argument, its value and what is allowed, and
    NotImplementedStep naming the step that is still a stub.
    """
    return attention_forward(q, k, v, causal=causal, scale=scale, kernels=kernels, deterministic=deterministic)[0]


def attention_forward(q, k, v, *, causal=False, scale=None, kernels=False, deterministic=None):
    """The same, and the log-sum-exp of the scores: (output [B, H, Sq, Dv], lse [B, H, Sq] in float32)."""
    _check(q, k, v, scale, kernels)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    width, value_width = q.shape[3], v.shape[3]
    scale = 1.0 / math.sqrt(width) if scale is None else float(scale)
    if q.is_cuda or kernels:
        allowed = next(w for w in WIDTHS if w >= max(width, value_width))
        q, k, v = _padded(q, allowed), _padded(k, allowed), _padded(v, allowed)
    output, lse = torch.ops.flashkata.attention_forward(
        q, k, v, bool(causal), scale, bool(kernels), bool(deterministic)
    )
    return output[..., :value_width], lse


def _check(q, k, v, scale, kernels):
    def require(ok, argument, got, allowed):
        if not ok:
            raise ValueError(f"{argument}: got {got}, allowed is {allowed}")

    for name, x in (("q", q), ("k", k), ("v", v)):
        require(isinstance(x, torch.Tensor), name, type(x).__name__, "a torch.Tensor")
        require(x.dim() == 4, name, list(x.shape), "four axes: [B, H, S, D]")
        require(x.dtype in TYPES, name, x.dtype, "float32, float16 or bfloat16")
        require(x.dtype == q.dtype, name, x.dtype, f"{q.dtype}, as q")
        require(x.device == q.device, name, x.device, f"{q.device}, as q")
    require(q.device.type in ("cpu", "cuda"), "q", q.device, "a CPU or CUDA tensor")
    batch, heads, _, width = q.shape
    require(width > 0, "q", list(q.shape), "[B, H, Sq, D] with D at least 1")
    keys = k.shape[2]
    require(list(k.shape) == [batch, heads, keys, width], "k", list(k.shape), f"[{batch}, {heads}, Sk, {width}]")
    require(list(v.shape[:3]) == [batch, heads, keys], "v", list(v.shape), f"[{batch}, {heads}, {keys}, Dv]")
    require(scale is None or math.isfinite(scale), "scale", scale, "a finite number")
    if q.is_cuda:
        require(library.current().has_cuda, "q", "a CUDA tensor",
                "a CPU tensor: this library was built without CUDA. " + library.how_to_build("learn-cuda"))
    if kernels and not q.is_cuda:
        require(not library.current().has_cuda, "kernels", True,
                "False for CPU tensors: in a build for CUDA the kernels need CUDA tensors")
    if q.is_cuda or kernels:
        require(max(width, v.shape[3]) <= WIDTHS[-1], "q", list(q.shape), f"a width of at most {WIDTHS[-1]}")


def _padded(x, width):
    return x if x.shape[3] == width else torch.nn.functional.pad(x, (0, width - x.shape[3]))


# ---- Memory: what the library may be handed -------------------------------------------------------------------------


def _readable(x, gpu):
    """x, or a copy of it whose rows are contiguous and, for kernels, 16 bytes apart."""
    fine = x.shape[3] <= 1 or x.stride(3) == 1
    if gpu:
        each = 16 // x.element_size()
        fine = fine and x.stride(3) == 1 and x.data_ptr() % 16 == 0
        fine = fine and all(x.shape[a] <= 1 or x.stride(a) % each == 0 for a in range(3))
    return x if fine else x.clone(memory_format=torch.contiguous_format)  # contiguous() would keep a bad address


def _tensor(x):
    # Axes of one element may have any stride in PyTorch; here they must be plain numbers, and are never used.
    strides = [x.stride(a) if x.shape[a] > 1 else 0 for a in range(3)] + [1]
    return library.Tensor(x.data_ptr(), tuple(x.shape), tuple(strides))


def _problem(q, k, v, output, lse, causal, scale, gpu, deterministic, **tensors):
    problem = library.Attention(
        type=TYPES[q.dtype], gpu=gpu, causal=causal, deterministic=deterministic, scale=scale,
        threads=torch.get_num_threads(),
        stream=torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None,
        query=_tensor(q), key=_tensor(k), value=_tensor(v), output=_tensor(output), lse=lse.data_ptr(),
    )
    for name, x in tensors.items():
        setattr(problem, name, x.data_ptr() if name in ("delta", "d_query_sum") else _tensor(x))
    return problem


def _empty_like_tokens(x, width):
    """[B, H, S, width] as the model lays it out, [B, S, H, width] in memory, so that merging heads costs nothing."""
    batch, heads, tokens, _ = x.shape
    return x.new_empty((batch, tokens, heads, width)).transpose(1, 2)


# ---- The operators --------------------------------------------------------------------------------------------------


def _forward(q, k, v, causal, scale, kernels, deterministic):
    gpu = q.is_cuda or kernels
    if not gpu and q.dtype != torch.float32:
        output, lse = _forward(q.float(), k.float(), v.float(), causal, scale, kernels, deterministic)
        return output.to(q.dtype), lse
    q, k, v = (_readable(x, gpu) for x in (q, k, v))
    output = _empty_like_tokens(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    with _device_of(q):
        library.current().forward(_problem(q, k, v, output, lse, causal, scale, gpu, deterministic))
    return output, lse


def _backward(d_output, q, k, v, output, lse, causal, scale, kernels, deterministic):
    gpu = q.is_cuda or kernels
    if not gpu and q.dtype != torch.float32:
        wide = (x.float() for x in (d_output, q, k, v, output))
        gradients = _backward(*wide, lse, causal, scale, kernels, deterministic)
        return tuple(x.to(q.dtype) for x in gradients)
    d_output, q, k, v, output = (_readable(x, gpu) for x in (d_output, q, k, v, output))
    gradients = [_empty_like_tokens(x, x.shape[3]) for x in (q, k, v)]
    scratch = {}
    if gpu:
        scratch["delta"] = q.new_empty(q.shape[:3], dtype=torch.float32)
        scratch["d_query_sum"] = q.new_empty(q.shape, dtype=torch.float32)
    problem = _problem(q, k, v, output, lse.contiguous(), causal, scale, gpu, deterministic, d_output=d_output,
                       d_query=gradients[0], d_key=gradients[1], d_value=gradients[2], **scratch)
    with _device_of(q):
        library.current().backward(problem)
    return tuple(gradients)


def _device_of(x):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


class AttentionFunction(torch.autograd.Function):
    """What backward needs, and nothing quadratic: q, k, v, the output and one number for each query."""

    @staticmethod
    def forward(ctx, q, k, v, causal, scale, kernels, deterministic):
        with _below_autograd():
            output, lse = torch.ops.flashkata.attention_forward(q, k, v, causal, scale, kernels, deterministic)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.options = (causal, scale, kernels, deterministic)
        ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_output, _):
        gradients = torch.ops.flashkata.attention_backward(d_output, *ctx.saved_tensors, *ctx.options)
        asked = (g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad))
        return (*asked, None, None, None, None)


def _below_autograd():
    """A context in which operators are called without autograd around them."""
    guard = torch._C._AutoDispatchBelowAutograd()
    return guard if hasattr(guard, "__enter__") else contextlib.nullcontext(guard)  # PyTorch 1: while it lives


_library = torch.library.Library("flashkata", "DEF")
_library.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, bool causal, float scale, bool kernels, bool deterministic)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "attention_backward(Tensor d_output, Tensor q, Tensor k, Tensor v, Tensor output, Tensor lse, bool causal,"
    " float scale, bool kernels, bool deterministic) -> (Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _library.impl("attention_forward", _forward, _device)
    _library.impl("attention_backward", _backward, _device)
_library.impl("attention_forward", AttentionFunction.apply, "Autograd")


def _register_shapes():
    """Shapes without numbers, for torch.compile (PyTorch 2)."""
    if not hasattr(torch.library, "register_fake"):
        return

    def forward(q, k, v, causal, scale, kernels, deterministic):
        return _empty_like_tokens(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)

    def backward(d_output, q, k, v, *_):
        return tuple(_empty_like_tokens(x, x.shape[3]) for x in (q, k, v))

    torch.library.register_fake("flashkata::attention_forward", forward)
    torch.library.register_fake("flashkata::attention_backward", backward)


_register_shapes()
