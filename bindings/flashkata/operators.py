"""The steps as PyTorch operators, flashkata::attention_forward and flashkata::attention_backward, with autograd.

Which step answers: float32 on the CPU 2.03 and 3.03 (16-bit tensors are widened first); on a GPU float32 2.04 and 3.04,
float16 and bfloat16 2.05 and 3.05; what phase 4 adds, see `attention`, `varlen_attention`, `grouped_attention`. With
``kernels=True`` CPU tensors go to the kernels too, on the virtual GPU.
"""

import contextlib
import ctypes
import math
from typing import NamedTuple, Optional

import torch

from flashkata import library

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
WIDTHS = (16, 32, 64, 128)


class Extras(NamedTuple):
    """What phase 4 adds to a call: in the order of the operators' last arguments."""

    cu_seqlens_q: Optional[torch.Tensor] = None
    cu_seqlens_k: Optional[torch.Tensor] = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    dropout_p: float = 0.0
    dropout_seed: int = 0
    dropout_offset: int = 0
    window: tuple = ()  # (left, right), -1: no limit
    softcap: float = 0.0
    groups: tuple = ()  # q_begin, q_end, k_begin, k_end of the first, of the second, ...


def attention(q, k, v, *, causal=False, scale=None, enable_gqa=False, dropout_p=0.0, window=None, softcap=0.0,
              kernels=False, deterministic=None):
    """softmax(scale q k^T) v: what torch.nn.functional.scaled_dot_product_attention computes, and its gradients.

    q [B, H, Sq, D], k [B, H, Sk, D], v [B, H, Sk, Dv], of one type and on one device. Returns [B, H, Sq, Dv].

    causal         key j is visible to query i when j <= i + Sk - Sq: aligned to the bottom right. PyTorch's is_causal is
                   aligned to the top left; where Sq = Sk the two are one.
    scale          multiplies q k^T; 1 / sqrt(D) by default.
    enable_gqa     k and v may have fewer heads, Hk, a divisor of H: query head h reads head h / (H / Hk). Step 4.02; in
                   16 bits on a GPU 4.05.
    dropout_p      so large a part of the weights is dropped, the others grow by 1 / (1 - dropout_p). Which, is drawn
                   from PyTorch's default generator. Step 4.03.
    window         (left, right): query i sees keys i + Sk - Sq - left to i + Sk - Sq + right; -1 is no limit. 4.04.
    softcap        c > 0: scores become c tanh(score / c). Step 4.04.
    kernels        CPU tensors only: run the CUDA steps, on the virtual GPU.
    deterministic  on a GPU: gradients that are the same to the bit from call to call; by default as
                   torch.use_deterministic_algorithms() says.

    Steps 4.03 and 4.04 compute in float32; 16-bit tensors are widened for them. One of dropout_p and window or softcap
    may be asked for at a time.

    A query that may attend to nothing gets 0, and gradients of 0. On a GPU D and Dv may be at most 128; widths other
    than 16, 32, 64, 128 are padded with zeros. Raises ValueError naming the argument, its value and what is allowed, and
    NotImplementedStep naming the step that is still a stub.
    """
    return attention_forward(q, k, v, causal=causal, scale=scale, enable_gqa=enable_gqa, dropout_p=dropout_p,
                             window=window, softcap=softcap, kernels=kernels, deterministic=deterministic)[0]


def attention_forward(q, k, v, *, causal=False, scale=None, enable_gqa=False, dropout_p=0.0, window=None, softcap=0.0,
                      kernels=False, deterministic=None):
    """The same, and the log-sum-exp of the scores: (output [B, H, Sq, Dv], lse [B, H, Sq] in float32)."""
    _check_tensors(q, k, v, scale, kernels)
    batch, heads, queries, width = q.shape
    keys, kv_heads = k.shape[2], k.shape[1]
    _require(list(k.shape[:1]) == [batch] and k.shape[3] == width, "k", list(k.shape),
             f"[{batch}, {heads}, Sk, {width}]")
    _require(list(v.shape[:3]) == [batch, kv_heads, keys], "v", list(v.shape), f"[{batch}, {kv_heads}, {keys}, Dv]")
    _check_heads(heads, kv_heads, k, enable_gqa)
    _require(0.0 <= dropout_p < 1.0, "dropout_p", dropout_p, "at least 0 and less than 1")
    extras = Extras(window=_window(window), softcap=float(softcap))
    if dropout_p > 0.0:
        offset = int(torch.randint(2**62, ()))
        extras = extras._replace(dropout_p=float(dropout_p), dropout_seed=torch.initial_seed() % 2**62,
                                 dropout_offset=offset)
    in_float = dropout_p > 0.0 or extras.window or softcap
    if in_float:
        output, lse = _call(q.float(), *_for_every_head(heads, k.float(), v.float()), causal, scale, kernels,
                            deterministic, extras)
        return output.to(q.dtype), lse
    if kv_heads != heads and (q.is_cuda or kernels) and q.dtype != torch.float32:
        packed = [x.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        groups = [(b * queries, (b + 1) * queries, b * keys, (b + 1) * keys) for b in range(batch)]
        output, lse = _call(*packed, causal, scale, kernels, deterministic, Extras(groups=_flat(groups)))
        return (output[0].unflatten(1, (batch, queries)).transpose(0, 1),
                lse[0].unflatten(1, (batch, queries)).transpose(0, 1))
    return _call(q, k, v, causal, scale, kernels, deterministic, extras)


def varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal=False, scale=None,
                     kernels=False, deterministic=None):
    """Attention within each sequence of a packed batch: q [Tq, H, D], k [Tk, Hk, D], v [Tk, Hk, Dv] -> [Tq, H, Dv].

    Sequence b owns the tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1: int32 tensors of B + 1 entries, the first 0, the
    last Tq or Tk, on the device of q. max_seqlen: at least the longest. Hk divides H. The other options, and what is
    raised, as for `attention`. Step 4.01; in 16 bits on a GPU, and with fewer key/value heads, 4.05, which reads
    cu_seqlens on the host, so the GPU is waited for, and takes at most 128 sequences.
    """
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _require(isinstance(x, torch.Tensor) and x.dtype == torch.int32 and x.dim() == 1 and len(x) > 0, name,
                 f"{x.dtype}, {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__,
                 "an int32 tensor [B + 1]")
        _require(x.device == q.device, name, x.device, f"{q.device}, as q")
    _require(len(cu_seqlens_q) == len(cu_seqlens_k), "cu_seqlens_k", f"{len(cu_seqlens_k)} entries",
             f"{len(cu_seqlens_q)}, as cu_seqlens_q")
    q, k, v = _heads_first(q, k, v)
    _check_packed(q, k, v, scale, kernels)
    gpu = q.is_cuda or kernels
    if q.dtype != torch.float32 and gpu or k.shape[1] != q.shape[1] and not gpu:
        begins_q, begins_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        extras = Extras(groups=_flat(zip(begins_q, begins_q[1:], begins_k, begins_k[1:])))
    else:
        k, v = _for_every_head(q.shape[1], k, v)
        extras = Extras(cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), int(max_seqlen_q), int(max_seqlen_k))
    return _tokens_first(_call(q, k, v, causal, scale, kernels, deterministic, extras)[0])


def grouped_attention(q, k, v, groups, *, causal=False, scale=None, kernels=False, deterministic=None):
    """Groups of queries attend to slices of one K and V: q [Tq, H, D], k [Tk, Hk, D], v [Tk, Hk, Dv] -> [Tq, H, Dv].

    groups: a list of (q_begin, q_end, k_begin, k_end). Queries q_begin to q_end - 1 attend to keys k_begin to k_end - 1;
    slices may overlap, queries may not. ``causal`` is aligned to the bottom right of each group. Hk divides H. The other
    options, and what is raised, as for `attention`. Step 4.05, on a GPU in float16 and bfloat16.
    """
    q, k, v = _heads_first(q, k, v)
    _check_packed(q, k, v, scale, kernels)
    groups = list(groups) or [(0, 0, 0, 0)]  # no groups: every query gets 0
    for number, group in enumerate(groups):
        _require(len(group) == 4, f"groups[{number}]", list(group), "(q_begin, q_end, k_begin, k_end)")
    return _tokens_first(_call(q, k, v, causal, scale, kernels, deterministic, Extras(groups=_flat(groups)))[0])


def _call(q, k, v, causal, scale, kernels, deterministic, extras):
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    width, value_width = q.shape[3], v.shape[3]
    scale = 1.0 / math.sqrt(width) if scale is None else float(scale)
    # Phase 4's steps want D of the kernels' widths and Dv = D on the CPU too.
    if q.is_cuda or kernels or _asks(extras) or k.shape[1] != q.shape[1]:
        allowed = next((w for w in WIDTHS if w >= max(width, value_width)), None)
        _require(allowed is not None, "q", list(q.shape), f"a width of at most {WIDTHS[-1]}")
        q, k, v = _padded(q, allowed), _padded(k, allowed), _padded(v, allowed)
    output, lse = torch.ops.flashkata.attention_forward(
        q, k, v, bool(causal), scale, bool(kernels), bool(deterministic), *extras
    )
    return output[..., :value_width], lse


def _asks(extras):
    """Whether one of phase 4's steps is asked for."""
    return any(isinstance(x, torch.Tensor) or bool(x) for x in extras)


# ---- Arguments ------------------------------------------------------------------------------------------------------


def _require(ok, argument, got, allowed):
    if not ok:
        raise ValueError(f"{argument}: got {got}, allowed is {allowed}")


def _check_tensors(q, k, v, scale, kernels, axes="four axes: [B, H, S, D]"):
    for name, x in (("q", q), ("k", k), ("v", v)):
        _require(isinstance(x, torch.Tensor), name, type(x).__name__, "a torch.Tensor")
        _require(x.dim() == 4, name, list(x.shape), axes)
        _require(x.dtype in TYPES, name, x.dtype, "float32, float16 or bfloat16")
        _require(x.dtype == q.dtype, name, x.dtype, f"{q.dtype}, as q")
        _require(x.device == q.device, name, x.device, f"{q.device}, as q")
    _require(q.device.type in ("cpu", "cuda"), "q", q.device, "a CPU or CUDA tensor")
    _require(q.shape[3] > 0, "q", list(q.shape), "a width D of at least 1")
    _require(scale is None or math.isfinite(scale), "scale", scale, "a finite number")
    if q.is_cuda:
        _require(library.current().has_cuda, "q", "a CUDA tensor",
                 "a CPU tensor: this library was built without CUDA. " + library.how_to_build("learn-cuda"))
    if kernels and not q.is_cuda:
        _require(not library.current().has_cuda, "kernels", True,
                 "False for CPU tensors: in a build for CUDA the kernels need CUDA tensors")
    if q.is_cuda or kernels:
        _require(max(q.shape[3], v.shape[3]) <= WIDTHS[-1], "q", list(q.shape), f"a width of at most {WIDTHS[-1]}")


def _check_heads(heads, kv_heads, k, enable_gqa):
    if not enable_gqa:
        _require(kv_heads == heads, "k", list(k.shape), f"{heads} heads, as q, or a divisor of it with enable_gqa=True")
    _require(kv_heads > 0 and heads % kv_heads == 0, "k", list(k.shape), f"a number of heads that divides {heads}")


def _check_packed(q, k, v, scale, kernels):
    """q, k, v as [1, H, T, D] views of what the caller handed over as [T, H, D]."""
    _check_tensors(q, k, v, scale, kernels, "three axes: [T, H, D]")
    _check_heads(q.shape[1], k.shape[1], k, True)
    _require(k.shape[3] == q.shape[3], "k", list(k.shape), f"a width of {q.shape[3]}, as q")
    _require(v.shape[1:3] == k.shape[1:3], "v", list(v.shape), f"{k.shape[2]} tokens of {k.shape[1]} heads, as k")


def _heads_first(*tensors):
    views = []
    for x in tensors:
        _require(isinstance(x, torch.Tensor) and x.dim() == 3, "qkv"[len(views)],
                 list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__, "three axes: [T, H, D]")
        views.append(x.transpose(0, 1).unsqueeze(0))
    return views


def _tokens_first(output):
    return output[0].transpose(0, 1)


def _for_every_head(heads, *tensors):
    """Key/value heads repeated where a step knows nothing of shared ones."""
    return [x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1) for x in tensors]


def _window(window):
    if window is None:
        return ()
    _require(len(window) == 2, "window", window, "(left, right)")
    limits = tuple(-1 if side is None else int(side) for side in window)
    _require(min(limits) >= -1, "window", window, "at least 0 each, or -1 for no limit")
    return limits if limits != (-1, -1) else ()


def _flat(groups):
    return tuple(int(bound) for group in groups for bound in group)


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


def _problem(q, k, v, output, lse, causal, scale, gpu, deterministic, extras, **tensors):
    problem = library.Attention(
        type=TYPES[q.dtype], gpu=gpu, causal=causal, deterministic=deterministic, scale=scale,
        threads=torch.get_num_threads(),
        stream=torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None,
        query=_tensor(q), key=_tensor(k), value=_tensor(v), output=_tensor(output), lse=lse.data_ptr(),
    )
    extras = Extras(*extras)
    if extras.cu_seqlens_q is not None:
        problem.cu_seqlens_q, problem.cu_seqlens_k = extras.cu_seqlens_q.data_ptr(), extras.cu_seqlens_k.data_ptr()
        problem.sequences = len(extras.cu_seqlens_q) - 1
        problem.max_seqlen_q, problem.max_seqlen_k = extras.max_seqlen_q, extras.max_seqlen_k
    problem.dropout_p, problem.softcap = extras.dropout_p, extras.softcap
    problem.dropout_seed, problem.dropout_offset = extras.dropout_seed, extras.dropout_offset
    if extras.window:
        problem.window = (ctypes.c_int64 * 2)(*extras.window)
    if extras.groups:
        problem.groups = (ctypes.c_int64 * len(extras.groups))(*extras.groups)
        problem.group_count = len(extras.groups) // 4
    for name, x in tensors.items():
        setattr(problem, name, x.data_ptr() if name in ("delta", "d_query_sum") else _tensor(x))
    return problem


def _empty_like_tokens(x, width):
    """[B, H, S, width] as the model lays it out, [B, S, H, width] in memory, so that merging heads costs nothing."""
    batch, heads, tokens, _ = x.shape
    return x.new_empty((batch, tokens, heads, width)).transpose(1, 2)


# ---- The operators --------------------------------------------------------------------------------------------------


def _forward(q, k, v, causal, scale, kernels, deterministic, *extras):
    gpu = q.is_cuda or kernels
    if not gpu and q.dtype != torch.float32:
        output, lse = _forward(q.float(), k.float(), v.float(), causal, scale, kernels, deterministic, *extras)
        return output.to(q.dtype), lse
    q, k, v = (_readable(x, gpu) for x in (q, k, v))
    output = _empty_like_tokens(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    with _device_of(q):
        library.current().forward(_problem(q, k, v, output, lse, causal, scale, gpu, deterministic, extras))
    return output, lse


def _backward(d_output, q, k, v, output, lse, causal, scale, kernels, deterministic, *extras):
    gpu = q.is_cuda or kernels
    if not gpu and q.dtype != torch.float32:
        wide = (x.float() for x in (d_output, q, k, v, output))
        gradients = _backward(*wide, lse, causal, scale, kernels, deterministic, *extras)
        return tuple(x.to(q.dtype) for x in gradients)
    d_output, q, k, v, output = (_readable(x, gpu) for x in (d_output, q, k, v, output))
    gradients = [_empty_like_tokens(x, x.shape[3]) for x in (q, k, v)]
    scratch = {}
    if gpu or _asks(extras) or k.shape[1] != q.shape[1]:
        scratch["delta"] = q.new_empty(q.shape[:3], dtype=torch.float32)
        scratch["d_query_sum"] = q.new_empty(q.shape, dtype=torch.float32)
    problem = _problem(q, k, v, output, lse.contiguous(), causal, scale, gpu, deterministic, extras, d_output=d_output,
                       d_query=gradients[0], d_key=gradients[1], d_value=gradients[2], **scratch)
    with _device_of(q):
        library.current().backward(problem)
    return tuple(gradients)


def _device_of(x):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


class AttentionFunction(torch.autograd.Function):
    """What backward needs, and nothing quadratic: q, k, v, the output and one number for each query."""

    @staticmethod
    def forward(ctx, q, k, v, *options):
        with _below_autograd():
            output, lse = torch.ops.flashkata.attention_forward(q, k, v, *options)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_output, _):
        gradients = torch.ops.flashkata.attention_backward(d_output, *ctx.saved_tensors, *ctx.options)
        asked = (g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad))
        return (*asked, *(None for _ in ctx.options))


def _below_autograd():
    """A context in which operators are called without autograd around them."""
    guard = torch._C._AutoDispatchBelowAutograd()
    return guard if hasattr(guard, "__enter__") else contextlib.nullcontext(guard)  # PyTorch 1: while it lives


_library = torch.library.Library("flashkata", "DEF")
_OPTIONS = ("bool causal, float scale, bool kernels, bool deterministic, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
            " int max_seqlen_q, int max_seqlen_k, float dropout_p, int dropout_seed, int dropout_offset, int[] window,"
            " float softcap, int[] groups")
_library.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define("attention_backward(Tensor d_output, Tensor q, Tensor k, Tensor v, Tensor output, Tensor lse,"
                f" {_OPTIONS}) -> (Tensor, Tensor, Tensor)")
for _device in ("CPU", "CUDA"):
    _library.impl("attention_forward", _forward, _device)
    _library.impl("attention_backward", _backward, _device)
_library.impl("attention_forward", AttentionFunction.apply, "Autograd")


def _register_shapes():
    """Shapes without numbers, for torch.compile (PyTorch 2)."""
    if not hasattr(torch.library, "register_fake"):
        return

    def forward(q, k, v, *_):
        return _empty_like_tokens(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)

    def backward(d_output, q, k, v, *_):
        return tuple(_empty_like_tokens(x, x.shape[3]) for x in (q, k, v))

    torch.library.register_fake("flashkata::attention_forward", forward)
    torch.library.register_fake("flashkata::attention_backward", backward)


_register_shapes()
