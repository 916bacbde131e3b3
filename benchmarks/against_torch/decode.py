#!/usr/bin/env python3
"""Steps 4.06 and 4.07 on a GPU beside PyTorch: one new token for each sequence, and a long cache.

    benchmarks/against_torch/decode.py                  builds the answers in solutions/hidden with nvcc, then measures
    benchmarks/against_torch/decode.py --answers .      your own
    benchmarks/against_torch/decode.py --library a.so   one that was built before (--build a.so builds one and stops)

bf16, heads of 128, all sequences of the same length. Each output is compared with float64's first (some heads of it). Every contender's
calls are recorded into one CUDA graph, which is then replayed, theirs and ours in turn, so that the time is the GPU's
alone; a call in the graph uses other memory than the ones before, so that nothing is left in L2. Bandwidth counts the
bytes of K and V in use, once. PyTorch's backends are called with enable_gqa where heads are shared; those that refuse
are left out, and so is math where its copies of K and V would not fit. Needs PyTorch with CUDA, nvcc and Eigen 3.4.
"""

import argparse
import ctypes
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import warnings

ROOT = pathlib.Path(__file__).resolve().parents[2]
WIDTH = 128
HEADS = [(32, 8), (32, 32)]  # query heads, key/value heads
BATCHES = [1, 8, 64]
LENGTHS = [4096, 32768, 131072]
L2 = 64 << 20  # a cache that is smaller is used in several copies

ENTRY = r"""
#include "phase4_extensions/06_split_kv/split_kv.hpp"
#include "phase4_extensions/07_paged_kv/paged_kv.hpp"

using namespace flashkata;

// The Sq new tokens of each sequence, the cache, and where the results go.
struct Call {
  const void *query, *key, *value;
  const std::int32_t *lengths, *block_table;
  void* output;
  float *partial_output, *partial_lse;
  Index batch, heads, kv_heads, queries, capacity, width, splits, pages, page_size, blocks;
  void* stream;
};

static const bf16* in(const void* memory) { return static_cast<const bf16*>(memory); }

extern "C" {
int decode_splits(long batch, long kv_heads, long longest, int multiprocessors) {
  return choose_splits(batch, kv_heads, longest, multiprocessors);
}
void decode(const Call& c) {
  const Shape<4> rows{c.batch, c.heads, c.queries, c.width}, cache{c.batch, c.kv_heads, c.capacity, c.width};
  flash_decode(Decode<bf16>{.query = {in(c.query), rows},
                            .key = {in(c.key), cache},
                            .value = {in(c.value), cache},
                            .lengths = {c.lengths, {c.batch}},
                            .output = {static_cast<bf16*>(c.output), rows},
                            .partial_output = {c.partial_output, {c.splits, c.batch, c.heads, c.queries, c.width}},
                            .partial_lse = {c.partial_lse, {c.splits, c.batch, c.heads, c.queries}}},
               Stream::borrowed(static_cast<cudaStream_t>(c.stream)));
}
void paged_decode(const Call& c) {
  const Shape<4> rows{c.batch, c.heads, c.queries, c.width}, cache{c.pages, c.kv_heads, c.page_size, c.width};
  flash_paged_decode(
      PagedDecode<bf16>{.query = {in(c.query), rows},
                        .key_pages = {in(c.key), cache},
                        .value_pages = {in(c.value), cache},
                        .block_table = {c.block_table, {c.batch, c.blocks}},
                        .lengths = {c.lengths, {c.batch}},
                        .output = {static_cast<bf16*>(c.output), rows},
                        .partial_output = {c.partial_output, {c.splits, c.batch, c.heads, c.queries, c.width}},
                        .partial_lse = {c.partial_lse, {c.splits, c.batch, c.heads, c.queries}}},
      Stream::borrowed(static_cast<cudaStream_t>(c.stream)));
}
}
"""


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=pathlib.Path, default=ROOT / "solutions/hidden")
    parser.add_argument("--library", action="append", default=[], metavar="[NAME=]FILE")
    parser.add_argument("--build", type=pathlib.Path, help="build the library, and nothing else")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--flags", default="-I/usr/include/eigen3")
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--replays", type=int, default=11)
    parser.add_argument("--cells", help="only these: BATCH,LENGTH,HK;...")
    parser.add_argument("--page-sizes", default="16,256")
    parser.add_argument("--parts", type=int, help="instead of what choose_splits() says")
    return parser.parse_args()


def build(options, target):
    with tempfile.TemporaryDirectory() as folder:
        entry = pathlib.Path(folder) / "entry.cu"
        entry.write_text(ENTRY)
        sources = [entry] + [
            options.answers / file
            for file in (
                "phase4_extensions/06_split_kv/flash_decode.cu",
                "phase4_extensions/06_split_kv/split_kv.cpp",
                "phase4_extensions/07_paged_kv/flash_paged.cu",
                "phase2_forward/02_merge/merge.cpp",
            )
        ]
        includes = [ROOT, ROOT / "phase4_extensions/06_split_kv", ROOT / "phase4_extensions/07_paged_kv",
                    ROOT / "phase2_forward/02_merge"]
        command = [options.nvcc, "-std=c++20", "-O3", "-arch=" + options.arch, "--expt-relaxed-constexpr", "-w",
                   "-DKATA_GPU_CUDA", "-Xcompiler", "-fPIC", "-shared", "-o", str(target)]
        command += [f"-I{folder}" for folder in includes] + shlex.split(options.flags) + [str(s) for s in sources]
        subprocess.run(command, check=True)


class Call(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("query", "key", "value", "lengths", "block_table", "output",
                                                     "partial_output", "partial_lse")] + [
        (name, ctypes.c_longlong) for name in ("batch", "heads", "kv_heads", "queries", "capacity", "width", "splits",
                                               "pages", "page_size", "blocks")] + [("stream", ctypes.c_void_p)]


def main():
    options = parse()
    if options.build:
        build(options, options.build)
        return
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    libraries = dict(text.split("=") if "=" in text else ("ours", text) for text in options.library)
    if not libraries:
        target = pathlib.Path(tempfile.mkdtemp()) / "decode.so"
        build(options, target)
        libraries = {"ours": str(target)}
    libraries = {name: ctypes.CDLL(str(pathlib.Path(file).resolve())) for name, file in libraries.items()}
    for library in libraries.values():
        library.decode_splits.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_int]
        for function in (library.decode, library.paged_decode):
            function.argtypes = [ctypes.POINTER(Call)]
    device = torch.cuda.get_device_properties(0)
    warnings.simplefilter("ignore")  # of backends that refuse
    print(f"{device.name}, {device.multi_processor_count} multiprocessors, PyTorch {torch.__version__}")
    torch.manual_seed(0)
    limit = torch.cuda.mem_get_info()[0] - (4 << 30)
    cells = [(batch, length, heads, kv_heads) for heads, kv_heads in HEADS for batch in BATCHES for length in LENGTHS]
    if options.cells:
        chosen = {tuple(int(x) for x in cell.split(",")) for cell in options.cells.split(";")}
        cells = [cell for cell in cells if (cell[0], cell[1], cell[3]) in chosen]
    bytes_of = {cell: 4 * cell[0] * cell[1] * cell[3] * WIDTH for cell in cells}
    cells = [cell for cell in cells if bytes_of[cell] <= limit]
    memory = torch.empty(max([bytes_of[cell] for cell in cells] + [8 * L2]) // 2, device="cuda", dtype=torch.bfloat16)
    for chunk in memory.split(1 << 28):
        chunk.normal_()

    # What a device copy reaches here: bytes read and written.
    other = torch.empty(1 << 30, device="cuda", dtype=torch.bfloat16)
    size = min(other.numel(), memory.numel())
    copied = record(torch, [lambda: other[:size].copy_(memory[:size])])
    print(f"a device copy: {4 * size / time_all(torch, [copied], options.replays)[0] / 1e12:.2f} TB/s")
    del other, copied
    page_sizes = [int(size) for size in options.page_sizes.split(",") if size]
    print("microseconds; TB/s of K and V; (its ratio to PyTorch's fastest)")
    for cell in cells:
        measure(torch, F, sdpa_kernel, SDPBackend, options, libraries, device, memory, cell, page_sizes)


def record(torch, calls):
    """A graph of these calls, one after the other."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_all(torch, graphs, replays):
    """Medians in seconds, in turn."""
    times = [[] for _ in graphs]
    for graph in graphs:
        graph.replay()
    for _ in range(replays):
        for graph, spent in zip(graphs, times):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            spent.append(start.elapsed_time(stop) * 1e-3)
    return [statistics.median(spent) for spent in times]


def measure(torch, F, sdpa_kernel, SDPBackend, options, libraries, device, memory, cell, page_sizes):
    batch, length, heads, kv_heads = cell
    count = batch * kv_heads * length * WIDTH  # numbers of K
    copies = max(1, min(8, memory.numel() // (2 * count), -(-4 * L2 // (4 * count))))
    calls = max(copies, min(16, copies * (-(-(1 << 28) // (4 * count * copies)))))
    parts = [memory[2 * count * i : 2 * count * (i + 1)] for i in range(copies)]
    keys = [part[:count].view(batch, kv_heads, length, WIDTH) for part in parts]
    values = [part[count:].view(batch, kv_heads, length, WIDTH) for part in parts]
    query = torch.randn(batch, heads, options.queries, WIDTH, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((batch,), length, device="cuda", dtype=torch.int32)

    def exact(b, head, key, value):  # one head of the first copy, float64
        scores = query[b, head].double() @ key.double().T / WIDTH**0.5
        for i in range(options.queries - 1):
            scores[i, length - options.queries + i + 1 :] = -float("inf")
        return torch.softmax(scores, -1) @ value.double()

    def check(name, output, rows):  # rows(b, kv_head): K and V [length, D]
        for b in {0, batch - 1}:
            for head in {0, heads // 2, heads - 1}:
                want = exact(b, head, *rows(b, head // (heads // kv_heads)))
                error = (output[b, head].double() - want).abs().max().item()
                if not error < 0.02 * want.abs().max().item():
                    return f" {name}: WRONG by {error:.3g}"
        return ""

    one_piece = lambda b, h: (keys[0][b, h], values[0][b, h])
    graphs, names, wrong = [], [], ""
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                    SDPBackend.MATH):
        if backend == SDPBackend.MATH and 4 * count * (heads // kv_heads) * 3 > 4e9:
            continue
        if options.queries > 1:
            break  # its causal mask is aligned to the top left
        gqa = {"enable_gqa": True} if heads != kv_heads else {}

        def theirs(i, backend=backend, gqa=gqa):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, keys[i % copies], values[i % copies], **gqa)

        try:
            said = check(backend.name, theirs(0), one_piece)
            if said:
                print(said)
                continue
            graphs.append(record(torch, [lambda i=i: theirs(i) for i in range(calls)]))
            names.append(backend.name.split("_")[0].lower())
        except RuntimeError:
            torch.cuda.synchronize()
    peers = len(names)
    kept = []
    for name, library in libraries.items():
        chosen = library.decode_splits(batch, kv_heads, length, device.multi_processor_count)
        splits = options.parts or chosen
        output = torch.full_like(query, float("nan"))
        partial_output = torch.empty(splits, *query.shape, device="cuda")
        partial_lse = torch.empty(splits, batch, heads, options.queries, device="cuda")
        kept += [output, partial_output, partial_lse]
        common = dict(query=query.data_ptr(), lengths=lengths.data_ptr(), output=output.data_ptr(),
                      partial_output=partial_output.data_ptr(), partial_lse=partial_lse.data_ptr(), batch=batch,
                      heads=heads, kv_heads=kv_heads, queries=options.queries, capacity=length, width=WIDTH,
                      splits=splits)

        def ours(i, library=library, common=common):
            library.decode(Call(key=keys[i % copies].data_ptr(), value=values[i % copies].data_ptr(),
                                stream=torch.cuda.current_stream().cuda_stream, **common))

        ours(0)
        torch.cuda.synchronize()
        wrong += check(name, output, one_piece)
        graphs.append(record(torch, [lambda i=i: ours(i) for i in range(calls)]))
        names.append(f"{name}, {splits} parts:")
        for size in page_sizes:
            blocks = length // size
            table = torch.randperm(batch * blocks, device="cuda").int().view(batch, blocks)
            paged = [part.view(2, batch * blocks, kv_heads, size, WIDTH) for part in parts]
            kept.append(table)

            def pages(i, library=library, common=common, size=size, blocks=blocks, table=table, paged=paged):
                library.paged_decode(Call(key=paged[i % copies][0].data_ptr(), value=paged[i % copies][1].data_ptr(),
                                          block_table=table.data_ptr(), pages=batch * blocks, page_size=size,
                                          blocks=blocks, stream=torch.cuda.current_stream().cuda_stream, **common))

            def rows(b, h, table=table, paged=paged):
                return [x[table[b].long(), h].reshape(length, WIDTH) for x in paged[0]]

            output.fill_(float("nan"))
            pages(0)
            torch.cuda.synchronize()
            wrong += check(f"{name}, pages of {size}", output, rows)
            graphs.append(record(torch, [lambda i=i: pages(i) for i in range(calls)]))
            names.append(f"pages of {size}:")
    times = [spent / calls for spent in time_all(torch, graphs, options.replays)]
    text = f"| {heads}/{kv_heads} | {batch} | {length} |"
    for name, spent in zip(names, times):
        text += f" {name} {spent * 1e6:.1f}, {4 * count / spent / 1e12:.2f}"
        text += (f" ({min(times[:peers]) / spent:.2f}) |" if peers and name not in names[:peers] else " |")
    print(text + wrong, flush=True)


if __name__ == "__main__":
    sys.exit(main())
