"""libflashkata.so, found and called: the C interface of bindings/flashkata.h, with errors as exceptions."""

import ctypes
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ("learn-cuda", "learn", "solutions-cuda", "solutions")

BAD_ARGUMENT, NOT_IMPLEMENTED = 1, 2


class FlashKataError(RuntimeError):
    """Something that the person in front of the screen can mend; the text says how."""


class NotImplementedStep(FlashKataError, NotImplementedError):
    """A step that this call needs is still a stub."""

    def __init__(self, file):
        self.file = file
        phase, step = Path(file).parts[-3:-1]
        self.step = f"{phase[len('phase'):].split('_')[0]}.{step.split('_')[0]}"
        super().__init__(f"step {self.step} is not implemented yet: {file}")


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("shape", ctypes.c_int64 * 4), ("strides", ctypes.c_int64 * 4)]


class Attention(ctypes.Structure):
    """flashkata_attention of flashkata.h, field by field."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("gpu", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("deterministic", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
        ("query", Tensor),
        ("key", Tensor),
        ("value", Tensor),
        ("output", Tensor),
        ("lse", ctypes.c_void_p),
        ("d_output", Tensor),
        ("d_query", Tensor),
        ("d_key", Tensor),
        ("d_value", Tensor),
        ("delta", ctypes.c_void_p),
        ("d_query_sum", ctypes.c_void_p),
        ("cu_seqlens_q", ctypes.c_void_p),
        ("cu_seqlens_k", ctypes.c_void_p),
        ("sequences", ctypes.c_int64),
        ("max_seqlen_q", ctypes.c_int64),
        ("max_seqlen_k", ctypes.c_int64),
        ("dropout_p", ctypes.c_float),
        ("dropout_seed", ctypes.c_uint64),
        ("dropout_offset", ctypes.c_uint64),
        ("window", ctypes.POINTER(ctypes.c_int64)),
        ("softcap", ctypes.c_float),
        ("groups", ctypes.POINTER(ctypes.c_int64)),
        ("group_count", ctypes.c_int64),
    ]


class Decoding(ctypes.Structure):
    """flashkata_decoding of flashkata.h, field by field."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("gpu", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("stream", ctypes.c_void_p),
        ("query", Tensor),
        ("key", Tensor),
        ("value", Tensor),
        ("lengths", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("output", Tensor),
        ("lse", ctypes.c_void_p),
        ("splits", ctypes.c_int64),
        ("partial_output", ctypes.c_void_p),
        ("partial_lse", ctypes.c_void_p),
    ]


class Library:
    """One libflashkata.so."""

    def __init__(self, path):
        self.path = Path(path)
        self._library = ctypes.CDLL(str(path))
        for name in ("flashkata_message", "flashkata_gpu", "flashkata_answers"):
            getattr(self._library, name).restype = ctypes.c_char_p

    @property
    def has_cuda(self):
        """Whether kernels run on a real GPU; otherwise they run on the virtual one, in host memory."""
        return self._library.flashkata_gpu() == b"cuda"

    @property
    def answers(self):
        """The root of the filled files."""
        return self._library.flashkata_answers().decode()

    def forward(self, problem):
        self._check(self._library.flashkata_forward(ctypes.byref(problem)))

    def backward(self, problem):
        self._check(self._library.flashkata_backward(ctypes.byref(problem)))

    def decode(self, problem):
        self._check(self._library.flashkata_decode(ctypes.byref(problem)))

    def choose_splits(self, batch, kv_heads, longest, multiprocessors):
        """Into how many parts step 4.06 would cut the keys."""
        splits = ctypes.c_int64()
        self._check(self._library.flashkata_choose_splits(
            ctypes.c_int64(batch), ctypes.c_int64(kv_heads), ctypes.c_int64(longest), ctypes.c_int32(multiprocessors),
            ctypes.byref(splits)))
        return splits.value

    def cache(self, name, *arguments):
        """Calls flashkata_cache_<name>."""
        self._check(getattr(self._library, f"flashkata_cache_{name}")(*arguments))

    def destroy_cache(self, cache):
        self._library.flashkata_cache_destroy(cache)

    def _check(self, status):
        if status == 0:
            return
        message = self._library.flashkata_message().decode()
        if status == NOT_IMPLEMENTED:
            raise NotImplementedStep(message)
        raise (ValueError if status == BAD_ARGUMENT else FlashKataError)(message)


def path_of(preset):
    """Where a preset's library is built."""
    return ROOT / "build" / preset / "bindings" / "libflashkata.so"


def how_to_build(preset):
    return f"cmake --preset {preset} && cmake --build --preset {preset} --target flashkata"


def find(preset=None):
    """The library of `preset`; without one that of FLASHKATA_PRESET, or the student's own.

    Raises FlashKataError with the command that builds it."""
    preset = preset or os.environ.get("FLASHKATA_PRESET")
    if preset:
        if preset not in PRESETS:
            raise FlashKataError(f"preset: got {preset!r}, allowed is one of {', '.join(PRESETS)}")
        if not path_of(preset).exists():
            raise FlashKataError(f"{path_of(preset)} is not built yet. In {ROOT}: {how_to_build(preset)}")
        return path_of(preset)
    for own in PRESETS[:2]:
        if path_of(own).exists():
            return path_of(own)
    raise FlashKataError(
        f"Your steps are not built as a library yet. In {ROOT}: {how_to_build('learn')} "
        f"(with CUDA: {how_to_build('learn-cuda')})"
    )


_current = None


def current():
    """The library in use; the first call finds it."""
    global _current
    if _current is None:
        _current = Library(find())
    return _current


def use(preset=None, path=None):
    """From now on, call the steps of `preset`, or the library at `path`."""
    global _current
    _current = Library(path or find(preset))
    return _current
