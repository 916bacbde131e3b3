"""How much memory a forward and a backward pass hold at most on the GPU, for longer and longer sequences.

    python3 bindings/clients/memory.py --preset solutions-cuda

Beside flashkata.attention: eager attention, which keeps S x S weights, while it fits.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import flashkata


def eager(q, k, v):
    return (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3) @ v


def peak(attention, tokens, options):
    """Bytes held at most by one forward and backward pass, the inputs and their gradients included; None: too many."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        q, k, v, d_output = (
            torch.randn(1, options.heads, tokens, options.width, device="cuda", dtype=getattr(torch, options.type))
            for _ in range(4)
        )
        for x in (q, k, v):
            x.requires_grad_()
        attention(q, k, v).backward(d_output)
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", help="whose steps; by default your own")
    parser.add_argument("--library", metavar="PATH", help="a libflashkata.so instead of a preset")
    parser.add_argument("--type", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "memory.py measures on a GPU, and PyTorch sees none.\n")
    try:
        flashkata.use(options.preset, options.library)
    except flashkata.FlashKataError as error:
        parser.exit(2, f"{error}\n")

    print(f"{options.heads} heads of {options.width}, {options.type}, on {torch.cuda.get_device_name()}, "
          f"PyTorch {torch.__version__}")
    print(f"{'tokens':>8}{'flashkata MiB':>16}{'bytes a token':>16}{'eager MiB':>14}{'bytes a token':>16}")
    for tokens in options.tokens:
        cells = []
        for attention in (flashkata.attention, eager):
            held = peak(attention, tokens, options)
            cells += [f"{held / 2**20:.1f}", f"{held / tokens:.0f}"] if held else ["out of memory", ""]
        print(f"{tokens:8}{cells[0]:>16}{cells[1]:>16}{cells[2]:>14}{cells[3]:>16}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
