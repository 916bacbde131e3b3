"""FlashKata's attention inside PyTorch.

    import flashkata
    out = flashkata.attention(q, k, v, causal=True)     # [B, H, S, D], differentiable

The steps of the course do the work: a student's own by default, those of another preset after
``flashkata.use(preset="solutions-cuda")`` or with FLASHKATA_PRESET in the environment.
"""

from flashkata.library import FlashKataError, NotImplementedStep, use

_OPERATORS = ("attention", "attention_forward", "varlen_attention", "grouped_attention")
_DECODING = ("decode", "PagedCache")
__all__ = [*_OPERATORS, *_DECODING, "use", "FlashKataError", "NotImplementedStep"]


def __getattr__(name):
    # PyTorch is imported by whoever needs it, so that a machine without it gets a sentence and not a traceback.
    if name in _OPERATORS:
        from flashkata import operators

        return getattr(operators, name)
    if name in _DECODING:
        from flashkata import decoding

        return getattr(decoding, name)
    raise AttributeError(f"module 'flashkata' has no attribute {name!r}")
