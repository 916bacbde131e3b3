"""Rounds of ours against PyTorch on this machine's CPU: what the comparisons in this folder share.

    import cpu_rounds            # before torch: it tells OpenMP's threads to sleep while they wait
    import torch

    options = cpu_rounds.options(__doc__)                              # --threads, --cells, --seconds, ...
    library = cpu_rounds.build(ENTRY, ["phase2_forward/03_tiled_forward/tiled_forward.cpp"], options)

    def contest(cell):           # cell.length, cell.width, cell.causal, cell.threads; cpu_rounds.HEADS heads
        ...                      # make inputs, check our answer
        return cpu_rounds.Contest(ours, theirs, error, operations)

    sys.exit(cpu_rounds.run(options, contest, bound=1e-5))

ENTRY is C++ that gives the step's function a C interface. `ours` and `theirs` take nothing and do all of the work, `error`
is the largest relative one against float64, `operations` is what GFLOP/s count. They are called in turn, ours, theirs,
ours, ..., in one process on the same inputs, so that a machine that grows slower or faster does so for both. A row is
printed only for an answer that was right.

One thread is pinned to one core. Threads that wait: OpenMP's spin for a while after a parallel region and would take
cores from whoever runs next, so they are told to sleep, as ours do.
"""

import argparse
import ctypes
import dataclasses
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import tempfile
import time
import typing

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # PyTorch from pip and from Debian: GNU's OpenMP
os.environ.setdefault("KMP_BLOCKTIME", "0")  # builds with Intel's

import torch  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEADS = 8
SHAPES = [(1024, 64), (4096, 64), (2048, 128)]  # S, D


@dataclasses.dataclass
class Cell:
    """One row of the table."""

    length: int
    width: int
    causal: bool
    threads: int


@dataclasses.dataclass
class Contest:
    ours: typing.Callable[[], object]
    theirs: typing.Callable[[], object]
    error: float
    operations: float


def options(description, arguments=None):
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=pathlib.Path, default=ROOT / "solutions/hidden",
                        help="root of the filled files; default: solutions/hidden")
    parser.add_argument("--library", type=pathlib.Path, help="what --keep kept, instead of building")
    parser.add_argument("--keep", type=pathlib.Path, metavar="FILE.so", help="where to leave the library")
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--flags", default="", help="more compiler flags, as in --flags=-I/opt/eigen3")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}), help="default: 1 and all")
    parser.add_argument("--cells", type=int, nargs="+", default=range(len(SHAPES)), help=f"which (S, D) of {SHAPES}")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row, at least")
    parser.add_argument("--rounds", type=int, default=9, help="for each row, at least")
    return parser.parse_args(arguments)


def build(entry, answers, options):
    """Compiles ENTRY and the answers (paths below --answers) for this machine, and loads them."""
    if options.library:
        return ctypes.CDLL(str(options.library.resolve()))
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "entry.cpp"
        source.write_text(entry)
        library = (options.keep or pathlib.Path(folder) / "answers.so").resolve()
        includes = [f"-I{ROOT}", "-I/usr/include/eigen3", "-I/usr/local/include/eigen3"]
        includes += [f"-I{ROOT / pathlib.Path(answer).parent}" for answer in answers]
        command = [options.compiler, "-std=c++20", "-O3", "-DNDEBUG", "-march=native", "-w", "-shared", "-fPIC", "-pthread"]
        command += [*includes, *shlex.split(options.flags), str(source)]
        subprocess.run([*command, *[str(options.answers / answer) for answer in answers], "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


def machine(options):
    """CPU, cores and versions, in a line."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    if options.library:
        compiler = f"{options.library.name} as it was built"
    else:
        compiler = subprocess.run([options.compiler, "--version"], check=True, capture_output=True, text=True).stdout
        compiler = compiler.splitlines()[0]
    capability = [line.strip("- \n") for line in torch.__config__.show().splitlines() if "CPU capability" in line]
    return f"{model}, {len(os.sched_getaffinity(0))} cores; {compiler}; PyTorch {torch.__version__}, {' '.join(capability)}"


def kernel_of(call):
    """The name of PyTorch's attention kernel that this call ends in, from its profiler."""
    with torch.autograd.profiler.profile() as profile:
        call()
    events = sorted(profile.function_events, key=lambda event: event.time_range.start)  # callers before the called
    names = [event.name.split("::")[-1] for event in events if "attention" in event.name]
    return names[-1] if names else "no attention kernel of its own"


def attention(q, k, v, causal):
    """PyTorch's own, on [B, H, S, D]: its flash kernel for CPUs where it has one (2.2 and newer), else the formula."""
    public = getattr(torch.nn.functional, "scaled_dot_product_attention", None)
    if public:
        return public(q, k, v, is_causal=causal)
    if hasattr(torch.nn.functional, "_scaled_dot_product_attention"):  # 1.13
        return torch.nn.functional._scaled_dot_product_attention(q, k, v, None, 0.0, False, causal)[0]
    raise SystemExit(f"PyTorch {torch.__version__} has no scaled_dot_product_attention; 1.13 or newer is needed")


def relative_error(got, want):
    """The largest difference over the largest number; NaN if anything is. `want` in float64."""
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def in_turn(calls, options):
    """Seconds of each call in each round."""
    for call in calls:
        call()
    seconds = [[] for _ in calls]
    begin = time.perf_counter()
    while len(seconds[0]) < options.rounds or time.perf_counter() - begin < options.seconds:
        for call, taken in zip(calls, seconds):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return seconds


def run(options, contest, bound):
    """Prints the table; returns what to exit with."""
    torch.manual_seed(1)
    cores = os.sched_getaffinity(0)
    print(machine(options))
    print(f"fp32, B=1, H={HEADS}, inputs N(0, 1); GFLOP/s: median (best); ratio of the medians", flush=True)
    kernel, right = None, True
    for threads in options.threads:
        os.sched_setaffinity(0, {max(cores)} if threads == 1 else cores)
        torch.set_num_threads(threads)
        for length, width in [SHAPES[i] for i in options.cells]:
            for causal in (False, True):
                one = contest(Cell(length, width, causal, threads))
                if kernel is None:
                    kernel = kernel_of(one.theirs)
                    print(f"PyTorch's kernel: {kernel}\n")
                    print("| threads | S | D | mask | ours | PyTorch | ratio | error | rounds |")
                    print("|---|---|---|---|---|---|---|---|---|")
                row = f"| {threads} | {length} | {width} | {'causal' if causal else 'full'} "
                if not one.error <= bound:  # NaN too
                    right = False
                    print(f"{row}| WRONG | | | {one.error:.1e} | |", flush=True)
                    continue
                ours, theirs = in_turn((one.ours, one.theirs), options)
                for seconds in (ours, theirs):
                    rates = [1e-9 * one.operations / s for s in (statistics.median(seconds), min(seconds))]
                    row += f"| {rates[0]:.0f} ({rates[1]:.0f}) "
                ratio = statistics.median(theirs) / statistics.median(ours)
                print(f"{row}| {ratio:.2f} | {one.error:.0e} | {len(ours)} |", flush=True)
    return 0 if right else f"WRONG: an error above {bound:g}"
