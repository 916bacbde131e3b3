"""Decoding: attention of few new tokens over a cache, in one piece (step 4.06) or in pages (step 4.07). No gradients."""

import ctypes
import math

import torch

from flashkata import library
from flashkata.operators import TYPES, _check_tensors, _device_of, _readable, _require, _tensor


def decode(q, key, value, lengths, *, block_table=None, causal=True, scale=None, splits=None, kernels=False):
    """softmax(scale q key^T) value over the keys in use: q [B, H, Sq, D] with Sq from 1 to 16 -> [B, H, Sq, D].

    key, value   [B, Hk, capacity, D], Hk a divisor of H; what lies behind a sequence's length is not looked at. With a
                 block table [pages, Hk, page_size, D].
    lengths      int32 [B], keys in use, on the device of q. The queries are the newest tokens; their keys are there.
    block_table  int32 [B, blocks]: key j of sequence b lies in page block_table[b, j // page_size], slot j % page_size.
    causal       query i sees key j when j <= i + length - Sq; the last query sees them all.
    splits       parts that the keys are cut into, each for blocks of its own; by default as step 4.06 chooses.

    D is 16, 32, 64 or 128. On the CPU 16-bit tensors are widened. Raises as `flashkata.attention` does.
    """
    _check_tensors(q, key, value, scale, kernels)
    gpu = q.is_cuda or kernels
    if not gpu and q.dtype != torch.float32:
        wide = decode(q.float(), key.float(), value.float(), lengths, block_table=block_table, causal=causal,
                      scale=scale, splits=splits)
        return wide.to(q.dtype)
    for name, x, axes in (("lengths", lengths, 1), ("block_table", block_table, 2)):
        if x is None and name == "block_table":
            continue
        _require(isinstance(x, torch.Tensor) and x.dtype == torch.int32 and x.dim() == axes, name,
                 f"{x.dtype}, {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__,
                 f"an int32 tensor of {axes} axes")
        _require(x.device == q.device and len(x) == len(q), name, f"{list(x.shape)} on {x.device}",
                 f"{len(q)} sequences on {q.device}, as q")
    current = library.current()
    if splits is None:
        multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        capacity = key.shape[2] * (1 if block_table is None else block_table.shape[1])
        splits = current.choose_splits(max(1, len(q)), key.shape[1], capacity, multiprocessors)
    _require(splits >= 1, "splits", splits, "at least 1")
    q, key, value = (_readable(x, gpu) for x in (q, key, value))
    lengths = lengths.contiguous()
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    partial_output = q.new_empty((splits, *q.shape), dtype=torch.float32)
    partial_lse = q.new_empty((splits, *q.shape[:3]), dtype=torch.float32)
    problem = library.Decoding(
        type=TYPES[q.dtype], gpu=gpu, causal=causal, scale=1.0 / math.sqrt(q.shape[3]) if scale is None else scale,
        stream=torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None,
        query=_tensor(q), key=_tensor(key), value=_tensor(value), lengths=lengths.data_ptr(), output=_tensor(output),
        splits=splits, partial_output=partial_output.data_ptr(), partial_lse=partial_lse.data_ptr(),
    )
    if block_table is not None:
        block_table = block_table.contiguous()
        problem.block_table, problem.blocks = block_table.data_ptr(), block_table.shape[1]
    with _device_of(q):
        current.decode(problem)
    return output


class PagedCache:
    """Keys and values of several sequences in pages, for every layer of a model. Which page belongs to whom is kept by
    the PagedCache of step 4.07; all layers share one block table.

    cache = PagedCache(layers=4, kv_heads=2, width=64, pages=256, device="cuda", dtype=torch.bfloat16)
    cache.begin(batch=8)                             # sequences, empty
    cache.extend(tokens=5)                           # room for 5 tokens more of each
    out = cache.attend(layer, q, k, v)               # [B, H, 5, D]: k, v [B, Hk, 5, D] are put there, then looked at
    cache.end()                                      # the pages are free again
    """

    def __init__(self, layers, kv_heads, width, pages, page_size=16, device="cpu", dtype=torch.float32, kernels=False):
        self._library, self._kernels, self.page_size, self._pages = library.current(), kernels, page_size, pages
        self._handle = ctypes.c_void_p()
        self._library.cache("create", ctypes.c_int64(pages), ctypes.c_int64(page_size), ctypes.byref(self._handle))
        shape = (layers, 2, pages, kv_heads, page_size, width)
        self.memory = torch.full(shape, math.nan, device=device, dtype=dtype)  # what is not a key is seen
        self.sequences = []

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.destroy_cache(self._handle)

    @property
    def free_pages(self):
        count = ctypes.c_int64()
        self._library.cache("free_pages", self._handle, ctypes.byref(count))
        return count.value

    def begin(self, batch):
        """Sequences 0 to batch - 1, all empty; those of before end."""
        self.end()
        for _ in range(batch):
            number = ctypes.c_int32()
            self._library.cache("add", self._handle, ctypes.byref(number))
            self.sequences.append(number.value)

    def end(self):
        while self.sequences:
            self._library.cache("release", self._handle, ctypes.c_int32(self.sequences.pop()))

    def extend(self, tokens):
        """Room for so many tokens more of each sequence. Raises FlashKataError where there are too few pages."""
        rows, lengths = [], []
        for number in self.sequences:
            self._library.cache("append", self._handle, ctypes.c_int32(number), ctypes.c_int64(tokens))
            row, length = (ctypes.c_int32 * self._pages)(), ctypes.c_int32()
            self._library.cache("pages", self._handle, ctypes.c_int32(number), ctypes.c_int64(self._pages), row,
                                ctypes.byref(length))
            lengths.append(length.value)
            rows.append(row[: -(-length.value // self.page_size)])
        blocks = max(map(len, rows))
        table = [row + [-1] * (blocks - len(row)) for row in rows]
        self.block_table = torch.tensor(table, dtype=torch.int32, device=self.memory.device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=self.memory.device)
        # Where each of the new tokens lies: its page and its slot, [B, tokens].
        places = self.lengths[:, None].long() - tokens + torch.arange(tokens, device=self.memory.device)
        self._new_pages = self.block_table.long().gather(1, places // self.page_size)
        self._new_slots = places % self.page_size

    def attend(self, layer, q, k, v, *, scale=None):
        """Puts the new tokens' k and v [B, Hk, tokens, D] into the cache and attends to all of it, causally.

        q is [B, H, tokens, D]; more than 16 tokens go in portions of 16. Computed in the type of the cache, returned in
        that of q."""
        key, value = self.memory[layer]
        key[self._new_pages, :, self._new_slots] = k.transpose(1, 2).to(key.dtype)
        value[self._new_pages, :, self._new_slots] = v.transpose(1, 2).to(key.dtype)
        tokens, dtype = q.shape[2], q.dtype
        q = q.to(key.dtype)
        outputs = []
        for first in range(0, tokens, 16):
            last = min(first + 16, tokens)
            outputs.append(decode(q[:, :, first:last], key, value, self.lengths - (tokens - last),
                                  block_table=self.block_table, scale=scale, kernels=self._kernels))
        return torch.cat(outputs, dim=2).to(dtype)
