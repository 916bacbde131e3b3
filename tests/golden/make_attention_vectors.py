#!/usr/bin/python3
"""Writes attention.json: small attention problems, and what PyTorch says about them.

The C++ reference judges every step, so something else has to judge the reference. Here attention is whole-tensor torch
in float64 and its gradients come from autograd; nothing is a translation of the C++. Wherever PyTorch has a function of
its own for a case, that function must agree as well, or nothing is written.

Format: {"cases": [{...}, ...]}. Every tensor is flat and row-major. A missing option is not used.
  name, family                  words
  B H Hk Sq Sk D Dv             lengths
  scale causal softcap          as in common/attention/reference.hpp
  window_left window_right
  dropout_probability
  query key value doutput       [B, H, Sq, D], [B, Hk, Sk, D], [B, Hk, Sk, Dv], [B, H, Sq, Dv]
  allowed kept bias             {"shape": [4 lengths, 1 broadcasts], "data": "0110..." or numbers, "-inf" for -inf}
  output weights lse            what comes out; "-inf" for -inf
  dquery dkey dvalue            gradients of sum(doutput * output)
"""

import json
import math
import pathlib
import random
import zlib

import torch
import torch.nn.functional as F

INFINITY = float("inf")
CASES = []


# ---- inputs ----------------------------------------------------------------------------------------------------------


def seeded(name):
    """A generator of its own for each case: adding a case changes no other."""
    return random.Random(zlib.crc32(name.encode()))


def numbers(rng, *shape, limit=128):
    """Multiples of 1/64, by default within [-2, 2]: exact in float64 and short in text."""
    data = [rng.randint(-limit, limit) / 64 for _ in range(math.prod(shape))]
    return torch.tensor(data, dtype=torch.float64).reshape(shape)


def booleans(rng, *shape, true=0.6):
    data = [rng.random() < true for _ in range(math.prod(shape))]
    return torch.tensor(data, dtype=torch.bool).reshape(shape)


def mask(rows):
    """[1, 1, Sq, Sk] from one string for each query: "x" attends, "." does not."""
    return torch.tensor([[[[mark == "x" for mark in row] for row in rows]]])


# ---- attention -------------------------------------------------------------------------------------------------------


def visibility(case):
    """[B, H, Sq, Sk], true = attend."""
    Sq, Sk = case["Sq"], case["Sk"]
    pairs = torch.ones(case["B"], case["H"], Sq, Sk, dtype=torch.bool)
    if case.get("causal"):
        pairs = pairs.tril(Sk - Sq)
    if "window_right" in case:
        pairs = pairs.tril(Sk - Sq + case["window_right"])
    if "window_left" in case:
        pairs = pairs.triu(Sk - Sq - case["window_left"])
    if "allowed" in case:
        pairs = pairs & case["allowed"]
    if "bias" in case:
        pairs = pairs & (case["bias"] != -INFINITY)
    return pairs


def attention(case, query, key, value):
    """softmax(cap(scale Q K^T) + bias) V: output, weights before dropout, logsumexp."""
    group = case["H"] // case["Hk"]
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    scale = case["scale"] if "scale" in case else case["D"] ** -0.5

    scores = torch.matmul(query, key.transpose(-1, -2)) * scale
    if "softcap" in case:
        scores = torch.tanh(scores / case["softcap"]) * case["softcap"]
    pairs = visibility(case)
    if "bias" in case:
        scores = scores + case["bias"].masked_fill(case["bias"] == -INFINITY, 0.0)
    scores = scores.masked_fill(~pairs, -INFINITY)
    lse = torch.logsumexp(scores.detach(), dim=-1)

    # A row of nothing but -inf would be NaN in softmax and in its gradient: give it zeros, and take its weights away.
    nothing = ~pairs.any(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    survivors = weights
    if "kept" in case:
        survivors = weights.masked_fill(~case["kept"], 0.0) / (1.0 - case.get("dropout_probability", 0.0))
    return torch.matmul(survivors, value), weights, lse


def gradients(output, doutput, inputs):
    """Of sum(doutput * output); zeros for an input that does not reach the output."""
    results = torch.autograd.grad((output * doutput).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, results)]


# ---- PyTorch's own functions, where they apply -----------------------------------------------------------------------

CHECKED = {"visibility by loops": 0, "scaled_dot_product_attention": 0, "multi_head_attention_forward": 0}


def close(name, got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=lambda text: f"{name}: {text}")


def check_visibility(case):
    """The definition, one pair at a time, against tril and triu."""
    pairs = visibility(case)
    shape = (case["B"], case["H"], case["Sq"], case["Sk"])
    allowed = case["allowed"].expand(shape) if "allowed" in case else None
    bias = case["bias"].expand(shape) if "bias" in case else None
    for b, h, i, j in torch.cartesian_prod(*[torch.arange(n) for n in shape]).tolist():
        ahead = j - (i + case["Sk"] - case["Sq"])  # how far key j lies after the key that query i is aligned with
        want = not (case.get("causal") and ahead > 0)
        want = want and -case.get("window_left", INFINITY) <= ahead <= case.get("window_right", INFINITY)
        want = want and (allowed is None or bool(allowed[b, h, i, j]))
        want = want and (bias is None or bias[b, h, i, j].item() != -INFINITY)
        assert bool(pairs[b, h, i, j]) == want, (case["name"], b, h, i, j)
    CHECKED["visibility by loops"] += 1


def check_fused(case, inputs, expected):
    """torch.nn.functional._scaled_dot_product_attention: no soft-cap, no dropout, no finite bias, no empty row."""
    bias_is_finite = "bias" in case and bool(((case["bias"] != 0) & (case["bias"] != -INFINITY)).any())
    pairs = visibility(case)
    if "softcap" in case or "kept" in case or bias_is_finite or 0 in pairs.shape or not pairs.any(dim=-1).all():
        return
    query, key, value = inputs
    group = case["H"] // case["Hk"]
    scale = case["scale"] * case["D"] ** 0.5 if "scale" in case else 1.0
    options = {"attn_mask": pairs}
    if set(case) & {"allowed", "bias", "window_left", "window_right"} or case["Sq"] != case["Sk"]:
        pass
    elif case.get("causal"):
        options = {"is_causal": True}
    else:
        options = {}
    output, weights = F._scaled_dot_product_attention(
        query * scale,
        key.repeat_interleave(group, dim=1),
        value.repeat_interleave(group, dim=1),
        need_attn_weights=True,
        **options,
    )
    close(case["name"], output, expected["output"])
    close(case["name"], weights, expected["weights"])
    for axis, got in zip("query key value".split(), gradients(output, case["doutput"], inputs)):
        close(case["name"], got, expected["d" + axis])
    CHECKED["scaled_dot_product_attention"] += 1


def check_multi_head(case, inputs, expected):
    """torch.nn.functional.multi_head_attention_forward with identity projections: [B, H, S, D] as [S, B, H * D]."""
    B, H, Sq, Sk, D = (case[axis] for axis in "B H Sq Sk D".split())
    if set(case) & {"scale", "softcap", "kept"} or case["Hk"] != H or case["Dv"] != D or 0 in (B, Sq, Sk):
        return
    if not visibility(case).any(dim=-1).all():
        return
    width = H * D

    def merged(x):
        return x.permute(2, 0, 1, 3).reshape(x.shape[2], B, width)

    additive = torch.zeros(B, H, Sq, Sk, dtype=torch.float64)
    if "bias" in case:
        additive = additive + case["bias"]
    additive = additive.masked_fill(~visibility(case), -INFINITY)
    identity = torch.eye(width, dtype=torch.float64)
    nothing = torch.zeros(width, dtype=torch.float64)
    output, _ = F.multi_head_attention_forward(
        *[merged(x) for x in inputs],
        embed_dim_to_check=width,
        num_heads=H,
        in_proj_weight=identity.repeat(3, 1),
        in_proj_bias=nothing.repeat(3),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=identity,
        out_proj_bias=nothing,
        need_weights=True,
        attn_mask=additive.reshape(B * H, Sq, Sk),
    )
    output = output.reshape(Sq, B, H, D).permute(1, 2, 0, 3)
    close(case["name"], output, expected["output"])
    for axis, got in zip("query key value".split(), gradients(output, case["doutput"], inputs)):
        close(case["name"], got, expected["d" + axis])
    CHECKED["multi_head_attention_forward"] += 1


# ---- one case --------------------------------------------------------------------------------------------------------


def add(family, name, shape, tensors=None, **options):
    """shape: (B, H, Hk, Sq, Sk, D, Dv). tensors: a function of (rng, case) that sets or changes tensors of the case."""
    case = {"name": name, "family": family, **dict(zip("B H Hk Sq Sk D Dv".split(), shape))}
    B, H, Hk, Sq, Sk, D, Dv = shape
    assert name not in [other["name"] for other in CASES], name
    rng = seeded(name)
    case.update(options)
    case["query"] = numbers(rng, B, H, Sq, D)
    case["key"] = numbers(rng, B, Hk, Sk, D)
    case["value"] = numbers(rng, B, Hk, Sk, Dv)
    case["doutput"] = numbers(rng, B, H, Sq, Dv)
    if tensors:
        tensors(rng, case)

    inputs = [case[axis].clone().requires_grad_() for axis in ("query", "key", "value")]
    output, weights, lse = attention(case, *inputs)
    dquery, dkey, dvalue = gradients(output, case["doutput"], inputs)
    expected = dict(output=output, weights=weights, lse=lse, dquery=dquery, dkey=dkey, dvalue=dvalue)
    for axis, tensor in expected.items():
        assert not tensor.isnan().any(), (name, axis)
    check_visibility(case)
    check_fused(case, inputs, expected)
    check_multi_head(case, inputs, expected)
    CASES.append({**case, **{axis: tensor.detach() for axis, tensor in expected.items()}})


def with_allowed(rows_or_true):
    """A mask as drawn, or one [B, H, Sq, Sk] drawn at random in which each pair attends with that probability."""

    def tensors(rng, case):
        if isinstance(rows_or_true, float):
            case["allowed"] = booleans(rng, *[case[axis] for axis in "B H Sq Sk".split()], true=rows_or_true)
        else:
            case["allowed"] = mask(rows_or_true)

    return tensors


def with_bias(forbidden=0.0, limit=128, broadcast=()):
    def tensors(rng, case):
        shape = [1 if axis in broadcast else case[axis] for axis in "B H Sq Sk".split()]
        case["bias"] = numbers(rng, *shape, limit=limit)
        if forbidden:
            case["bias"] = case["bias"].masked_fill(booleans(rng, *shape, true=forbidden), -INFINITY)

    return tensors


def with_dropout(*others):
    def tensors(rng, case):
        shape = [case[axis] for axis in "B H Sq Sk".split()]
        case["kept"] = booleans(rng, *shape, true=1.0 - case["dropout_probability"])
        for other in others:
            other(rng, case)

    return tensors


def with_padding(side, lengths):
    """Batch item b holds lengths[b] real keys, and the padding lies to their left or right: [B, 1, 1, Sk]."""

    def tensors(rng, case):
        position = torch.arange(case["Sk"])
        length = torch.tensor(lengths)[:, None]
        real = position < length if side == "right" else position >= case["Sk"] - length
        case["allowed"] = real[:, None, None, :]

    return tensors


def with_key_ramp(per_query, per_key):
    """Adds per_query[i] * per_key[j] to the product of query i and key j, through the first of the D columns."""

    def tensors(rng, case):
        case["query"][..., 0] = torch.tensor(per_query, dtype=torch.float64)
        case["key"][..., 0] = torch.tensor(per_key, dtype=torch.float64)

    return tensors


# ---- the cases -------------------------------------------------------------------------------------------------------


def make_cases():
    #                                                           B  H Hk Sq Sk D Dv
    add("plain", "one head",                                   (1, 1, 1, 4, 4, 4, 4))
    add("plain", "two batch items of two heads",               (2, 2, 2, 3, 3, 4, 4))
    add("plain", "odd lengths",                                (1, 3, 3, 5, 5, 3, 3))
    add("plain", "wide heads",                                 (1, 1, 1, 3, 4, 16, 16))

    add("ragged", "fewer queries than keys",                   (1, 2, 2, 3, 7, 4, 4))
    add("ragged", "more queries than keys",                    (1, 2, 2, 7, 3, 4, 4))
    add("ragged", "one query of many keys",                    (2, 1, 1, 1, 9, 4, 4))
    add("ragged", "many queries of one key",                   (1, 1, 1, 6, 1, 4, 4))

    add("Dv != D", "values wider than keys",                   (1, 2, 2, 4, 5, 3, 5))
    add("Dv != D", "values narrower than keys",                (1, 2, 2, 5, 4, 5, 2))
    add("Dv != D", "values of width 1",                        (1, 2, 1, 4, 4, 4, 1))

    add("scale", "scale 0.3",                                  (1, 2, 2, 4, 4, 4, 4), scale=0.3)
    add("scale", "scale 0: the mean of the values",            (1, 1, 1, 4, 5, 4, 4), scale=0.0)
    add("scale", "scale -0.75",                                (1, 2, 2, 4, 4, 4, 4), scale=-0.75)
    add("scale", "scale 1, causal",                            (1, 2, 2, 4, 5, 3, 3), scale=1.0, causal=True)

    add("D = 1", "width 1",                                    (1, 2, 2, 4, 4, 1, 1))
    add("D = 1", "width 1, values wider",                      (1, 2, 1, 3, 5, 1, 3), causal=True)

    add("1x1", "one query, one key",                           (1, 1, 1, 1, 1, 4, 4))
    add("1x1", "one of everything",                            (1, 1, 1, 1, 1, 1, 1))
    add("1x1", "one causal pair in each of six heads",         (2, 3, 1, 1, 1, 2, 3), causal=True)

    add("causal square", "causal 5x5",                         (1, 2, 2, 5, 5, 4, 4), causal=True)
    add("causal square", "causal 4x4 in two batch items",      (2, 2, 2, 4, 4, 3, 3), causal=True)
    add("causal Sq < Sk", "causal 3x7",                        (1, 2, 2, 3, 7, 4, 4), causal=True)
    add("causal Sq < Sk", "causal 1x6 sees all",               (1, 2, 2, 1, 6, 4, 4), causal=True)
    add("causal Sq < Sk", "causal 5x6",                        (2, 1, 1, 5, 6, 3, 4), causal=True)
    add("causal Sq > Sk", "causal 7x3: four empty rows",       (1, 2, 2, 7, 3, 4, 4), causal=True)
    add("causal Sq > Sk", "causal 5x4: one empty row",         (2, 1, 1, 5, 4, 4, 3), causal=True)
    add("causal Sq > Sk", "causal 4x1: only the last row",     (1, 2, 2, 4, 1, 4, 4), causal=True)

    add("boolean mask", "asymmetric mask",                     (1, 2, 2, 4, 4, 4, 4),
        with_allowed(["x..x", "xxx.", ".x..", "..xx"]))
    add("boolean mask", "asymmetric mask 3x5",                 (2, 1, 1, 3, 5, 4, 4),
        with_allowed(["x...x", ".xx..", "xxxx."]))
    add("boolean mask", "another mask for each head",          (2, 2, 2, 4, 5, 3, 3), with_allowed(0.6))
    add("boolean mask", "one key for each query",              (1, 1, 1, 4, 4, 4, 4),
        with_allowed([".x..", "...x", "x...", ".x.."]))

    add("fully masked rows", "first and third row empty",      (1, 2, 2, 4, 4, 4, 4),
        with_allowed(["....", "x.xx", "....", ".xx."]))
    add("fully masked rows", "all rows empty",                 (1, 2, 2, 3, 4, 3, 3), with_allowed(["....", "....", "...."]))
    add("fully masked rows", "sparse masks",                   (2, 2, 2, 4, 3, 3, 3), with_allowed(0.25))

    add("additive", "a bias for each pair",                    (1, 2, 2, 4, 5, 4, 4), with_bias())
    add("additive", "one bias for all heads",                  (2, 2, 2, 3, 4, 3, 3), with_bias(broadcast=("B", "H")))
    add("additive", "a bias up to 20, causal",                 (1, 2, 2, 4, 6, 4, 4), with_bias(limit=1280), causal=True)
    add("additive -inf", "bias with -inf",                     (1, 2, 2, 4, 5, 4, 4), with_bias(forbidden=0.4))
    add("additive -inf", "bias with rows of -inf",             (2, 2, 1, 4, 3, 3, 3), with_bias(forbidden=0.75))
    add("additive -inf", "one -inf bias for all queries",      (2, 1, 1, 4, 5, 3, 3), with_bias(forbidden=0.4, broadcast=("H", "Sq")))

    add("boolean + causal", "mask and causal 4x4",             (1, 2, 2, 4, 4, 4, 4),
        with_allowed(["xx.x", ".xxx", "xx..", "x.xx"]), causal=True)
    add("boolean + causal", "mask and causal 3x6",             (1, 2, 2, 3, 6, 3, 3), with_allowed(0.6), causal=True)
    add("boolean + causal", "mask empties a causal row",       (1, 1, 1, 5, 4, 4, 4),
        with_allowed(["xxxx", ".xxx", "xxx.", "..xx", "xxxx"]), causal=True)

    add("padding", "right padding",                            (3, 1, 1, 3, 5, 3, 3), with_padding("right", [5, 2, 4]))
    add("padding", "left padding",                             (3, 1, 1, 3, 5, 3, 3), with_padding("left", [5, 2, 4]))
    add("padding", "right padding, causal",                    (2, 2, 2, 4, 5, 3, 3), with_padding("right", [2, 4]), causal=True)
    add("padding", "left padding, causal: empty rows",         (2, 2, 1, 5, 5, 3, 3), with_padding("left", [2, 4]), causal=True)
    add("batch item masked", "the second of two items",        (2, 2, 2, 3, 4, 3, 3), with_padding("right", [4, 0]))
    add("batch item masked", "the first of three items",       (3, 1, 1, 3, 4, 3, 3), with_padding("left", [0, 4, 2]), causal=True)

    add("GQA", "6 heads over 2",                               (1, 6, 2, 3, 4, 3, 3))
    add("GQA", "6 heads over 2, causal",                       (1, 6, 2, 3, 5, 2, 3), causal=True)
    add("GQA", "6 heads over 3, two batch items",              (2, 6, 3, 2, 3, 2, 2))
    add("MQA", "4 heads over 1",                               (2, 4, 1, 3, 4, 3, 3))
    add("MQA", "4 heads over 1, causal, more queries",         (2, 4, 1, 4, 3, 3, 2), causal=True)

    add("window left", "left 2 of 6x6",                        (1, 2, 2, 6, 6, 3, 3), window_left=2)
    add("window left", "left 1, 3x6",                          (1, 2, 2, 3, 6, 4, 4), window_left=1)
    add("window left", "left 1, 7x3",                          (1, 1, 1, 7, 3, 4, 4), window_left=1)
    add("window right", "right 1, 4x6",                        (1, 2, 2, 4, 6, 3, 3), window_right=1)
    add("window right", "right 1, 6x3: empty rows",            (1, 2, 2, 6, 3, 3, 3), window_right=1)
    add("window both", "left 2, right 1, 5x5",                 (1, 2, 2, 5, 5, 3, 3), window_left=2, window_right=1)
    add("window both", "left 1, right 2, 4x7",                 (1, 2, 2, 4, 7, 3, 3), window_left=1, window_right=2)
    add("window both", "left 1, right 1, 7x4: empty rows",     (1, 2, 2, 7, 4, 3, 3), window_left=1, window_right=1)
    add("window both", "left 0, right 0: only the diagonal",   (1, 1, 1, 4, 5, 4, 4), window_left=0, window_right=0)
    add("window + causal", "left 2, causal, 5x7, GQA",         (1, 4, 2, 5, 7, 2, 2), window_left=2, causal=True)
    add("window + causal", "causal beats right 3",             (1, 1, 1, 5, 5, 3, 3), window_left=3, window_right=3, causal=True)

    add("soft-cap", "small cap 0.5",                           (1, 2, 2, 4, 5, 4, 4), softcap=0.5)
    add("soft-cap", "cap 2 on scores that reach it",           (1, 2, 2, 4, 4, 4, 4), softcap=2.0, scale=1.0)
    add("soft-cap", "large cap 50",                            (1, 2, 2, 4, 5, 4, 4), softcap=50.0)
    add("soft-cap + causal", "cap 1.5, causal 4x6",            (1, 2, 2, 4, 6, 3, 3), softcap=1.5, causal=True)
    add("soft-cap + causal", "cap 1, causal 5x3, GQA",         (1, 4, 2, 5, 3, 3, 3), softcap=1.0, causal=True)
    add("soft-cap + masks", "cap 1, bias beyond the cap",      (1, 2, 2, 4, 4, 4, 4), with_bias(limit=256), softcap=1.0)
    add("soft-cap + masks", "cap 1, bias with -inf",           (1, 2, 2, 4, 4, 4, 4), with_bias(forbidden=0.4), softcap=1.0)
    add("soft-cap + masks", "cap 1, boolean mask",             (1, 2, 2, 4, 4, 4, 4), with_allowed(0.5), softcap=1.0)

    add("dropout", "p 0.5",                                    (1, 2, 2, 4, 5, 4, 4), with_dropout(), dropout_probability=0.5)
    add("dropout", "p 0.1",                                    (2, 2, 2, 3, 4, 3, 3), with_dropout(), dropout_probability=0.1)
    add("dropout", "p 0.875: rows without survivors",          (1, 2, 2, 5, 4, 4, 4), with_dropout(), dropout_probability=0.875)
    add("dropout", "p 0.25, causal 3x5",                       (1, 2, 2, 3, 5, 4, 4), with_dropout(), dropout_probability=0.25, causal=True)
    add("dropout + mask + GQA", "p 0.5, 6 heads over 2",       (1, 6, 2, 3, 4, 3, 3), with_dropout(with_allowed(0.6)), dropout_probability=0.5)
    add("dropout + mask + GQA", "p 0.25, bias, soft-cap",      (2, 4, 2, 3, 4, 2, 2), with_dropout(with_bias(forbidden=0.2)),
        dropout_probability=0.25, softcap=2.0, causal=True)

    add("large scores", "all scores near +120",                (1, 1, 1, 4, 5, 4, 4),
        with_key_ramp([12.0] * 4, [10.0] * 5), scale=1.0)
    add("large scores", "all scores near -120",                (1, 1, 1, 4, 5, 4, 4),
        with_key_ramp([12.0] * 4, [-10.0] * 5), scale=1.0)
    add("large scores", "near +1000: exp would overflow",       (1, 1, 1, 3, 4, 4, 4),
        with_key_ramp([40.0] * 3, [25.0] * 4), scale=1.0)
    add("large scores", "near -1000: exp would underflow",      (1, 1, 1, 3, 4, 4, 4),
        with_key_ramp([40.0] * 3, [-25.0] * 4), scale=1.0)
    add("large scores", "row maxima more than 104 apart",      (1, 1, 1, 5, 4, 4, 4),
        with_key_ramp([-12.0, 10.0, 0.0, 24.0, -1.0], [10.0] * 4), scale=1.0)
    add("large scores", "falling by 300 along the keys",       (1, 1, 1, 4, 7, 4, 4),
        with_key_ramp([1.0] * 4, [-50.0 * j for j in range(7)]), scale=1.0)
    add("large scores", "rising by 300 along the keys",        (1, 1, 1, 4, 7, 4, 4),
        with_key_ramp([1.0, 0.5, 0.03125, 0.015625], [50.0 * j for j in range(7)]), scale=1.0)
    add("large scores", "+120 and -120 by turns, causal",      (1, 2, 1, 4, 6, 4, 4),
        with_key_ramp([12.0, -12.0, 12.0, -12.0], [10.0, -10.0, 10.0, -10.0, 10.0, -10.0]), scale=1.0, causal=True)

    add("zero length", "no queries",                           (2, 2, 1, 0, 3, 3, 2))
    add("zero length", "no keys",                              (1, 2, 2, 3, 0, 3, 2))
    add("zero length", "no keys, causal, window",              (1, 2, 1, 3, 0, 3, 2), causal=True, window_left=2)
    add("zero length", "no queries, no keys",                  (1, 2, 2, 0, 0, 3, 2), causal=True)
    add("zero length", "no batch items",                       (0, 2, 2, 3, 4, 3, 2))
    add("zero length", "values without columns",               (1, 2, 2, 2, 3, 3, 0))

    add("everything", "all options at once, Sq < Sk",          (2, 4, 2, 3, 5, 2, 3),
        with_dropout(with_bias(forbidden=0.1), with_allowed(0.8)),
        scale=0.8, causal=True, window_left=3, softcap=1.5, dropout_probability=0.25)
    add("everything", "all options at once, Sq > Sk",          (1, 4, 1, 6, 4, 3, 2),
        with_dropout(with_bias(forbidden=0.1), with_allowed(0.8)),
        scale=-0.6, window_left=2, window_right=1, softcap=3.0, dropout_probability=0.125)


# ---- the file --------------------------------------------------------------------------------------------------------


def as_number(x):
    """repr of a float reads back to the same bits; whole numbers need no point; JSON knows no infinity."""
    if math.isinf(x):
        return "-inf" if x < 0 else "inf"
    return int(x) if x == int(x) else x


def as_json(name, entry):
    if not isinstance(entry, torch.Tensor):
        return entry
    flat = entry.flatten().tolist()
    data = "".join("01"[x] for x in flat) if entry.dtype == torch.bool else [as_number(x) for x in flat]
    return {"shape": list(entry.shape), "data": data} if name in ("allowed", "bias", "kept") else data


def main():
    make_cases()
    lines = []
    for case in CASES:
        pairs = [f"{json.dumps(name)}: {json.dumps(as_json(name, entry), separators=(',', ':'))}" for name, entry in case.items()]
        lines.append("{" + ",\n ".join(pairs) + "}")
    text = '{"cases": [\n' + ",\n".join(lines) + "\n]}\n"
    json.loads(text, parse_constant=lambda constant: 1 / 0)  # valid JSON: no NaN, no Infinity
    path = pathlib.Path(__file__).with_name("attention.json")
    path.write_text(text)
    families = {case["family"] for case in CASES}
    print(f"{path.name}: {len(CASES)} cases in {len(families)} families, {len(text)} bytes, PyTorch {torch.__version__}")
    for function, count in CHECKED.items():
        print(f"  {count} cases also agree with {function}")


if __name__ == "__main__":
    main()
