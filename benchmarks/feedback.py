#!/usr/bin/env python3
"""From a saved stub to its verdict: how long a student waits, file by file; and what a change in common/ costs.

    python3 benchmarks/feedback.py [--preset solutions] [--rounds 3] [STEP...]      after building that preset
    python3 benchmarks/feedback.py --common [STEP]           touches files of common/ and builds the step and everything

Touches a file that a student fills, builds its step's target and runs its suite, and for a kernel its watched suite at the
same time: what ./kata test does. Prints medians, as a table in Markdown: seconds on the clock, and in brackets of the processor,
which say more where others use the machine as well. The goal is 2 s for a step on the CPU and 4 s for one with kernels,
on two cores.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"cpu": 2.0, "cuda": 4.0}
COMMON = ["common/attention/tensor.hpp", "common/testing/suite.hpp", "common/virtual_gpu/block.cpp"]


def processor_seconds():
    """Of all commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(command):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def seconds(*commands):
    """How long they take side by side, on the clock and of the processor; ends the program if one fails."""
    used, began = processor_seconds(), time.perf_counter()
    with ThreadPoolExecutor() as side_by_side:
        results = list(side_by_side.map(run, commands))
    taken = time.perf_counter() - began, processor_seconds() - used
    for command, result in zip(commands, results):
        if result.returncode != 0:
            sys.exit(f"{' '.join(map(str, command))} failed:\n{result.stdout}")
    return taken


def medians(rounds):
    """The median of each column of pairs, as pairs."""
    return [tuple(map(statistics.median, zip(*column))) for column in zip(*rounds)]


def text(taken):
    return f"{taken[0]:.1f} ({taken[1]:.1f})"


def added(pairs):
    return tuple(map(sum, zip(*pairs)))


def verdicts(course, steps, rounds):
    print("| step | file | build | suites | in all | goal |")
    print("|---|---|---:|---:|---:|---:|")
    for step in steps:
        build = ["cmake", "--build", course["build"], "--target", step["target"]]
        seconds(build)
        for file in step["files"]:
            taken = []
            for _ in range(rounds):
                os.utime(Path(course["answers"]) / step["folder"] / file)
                runs = [seconds(build), seconds(*([step[name]] for name in ("test", "check") if step[name]))]
                taken.append(runs + [added(runs)])
            *parts, total = medians(taken)
            goal = GOALS[step["kind"]]
            columns = [step["number"], f"`{file}`", *map(text, parts), text(total)]
            columns += [f"{goal:.0f}" + ("" if total[0] <= goal else ", missed")]
            print(f"| {' | '.join(columns)} |", flush=True)


def after_common(course, step):
    print(f"| touched | until {step['number']} is built | until all of {course['preset']} is |")
    print("|---|---:|---:|")
    one = ["cmake", "--build", course["build"], "--target", step["target"]]
    everything = ["cmake", "--build", course["build"]]
    seconds(everything)
    for file in COMMON:
        os.utime(ROOT / file)
        first = seconds(one)
        print(f"| `{file}` | {text(first)} | {text(added([first, seconds(everything)]))} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="solutions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--common", action="store_true", help="what a change in common/ costs")
    parser.add_argument("steps", nargs="*", metavar="STEP", help="such as 2.04; all of them by default")
    options = parser.parse_args()
    manifest = ROOT / "build" / options.preset / "course.json"
    if not manifest.exists():
        sys.exit(f"{manifest} does not exist: cmake --preset {options.preset} && cmake --build --preset {options.preset}")
    course = json.loads(manifest.read_text())
    known = {step["number"]: step for step in course["steps"]}
    for number in options.steps:
        if number not in known:
            sys.exit(f"STEP: got {number}, allowed is one of {', '.join(known)}")

    load = f"load {os.getloadavg()[0]:.1f} at the start"
    if options.common:
        print(f"Seconds on the clock (of the processor); {os.cpu_count()} cores, {load}\n")
        after_common(course, known[(options.steps or ["2.04"])[0]])
    else:
        print(f"Seconds on the clock (of the processor), median of {options.rounds}; {os.cpu_count()} cores, {load}\n")
        verdicts(course, [known[number] for number in options.steps or known], options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
