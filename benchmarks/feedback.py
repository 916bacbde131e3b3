#!/usr/bin/env python3
"""From a saved stub to its verdict: how long a student waits, step by step.

    python3 benchmarks/feedback.py [--preset solutions] [--rounds 3] [STEP...]      after building that preset

Touches a step's file, builds its target and runs its suite, and for a kernel its watched suite too: what ./kata test
does. Prints medians in seconds. The goal is 2 s for a step on the CPU and 4 s for a kernel, on two cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"cpu": 2.0, "cuda": 4.0}


def seconds(command):
    """How long it takes; ends the program if it fails."""
    began = time.perf_counter()
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{result.stdout}")
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="solutions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="such as 2.04; all of them by default")
    options = parser.parse_args()
    manifest = ROOT / "build" / options.preset / "course.json"
    if not manifest.exists():
        sys.exit(f"{manifest} does not exist: cmake --preset {options.preset} && cmake --build --preset {options.preset}")
    course = json.loads(manifest.read_text())
    known = [step["number"] for step in course["steps"]]
    for number in options.steps:
        if number not in known:
            sys.exit(f"STEP: got {number}, allowed is one of {', '.join(known)}")

    print(f"median of {options.rounds}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'step':28}{'build':>8}{'suite':>8}{'watched':>9}{'in all':>8}{'goal':>6}")
    for step in course["steps"]:
        if options.steps and step["number"] not in options.steps:
            continue
        build = ["cmake", "--build", course["build"], "--target", step["target"]]
        seconds(build)
        rounds = []
        for _ in range(options.rounds):
            os.utime(Path(course["answers"]) / step["folder"] / step["files"][0])
            rounds.append((seconds(build), seconds([step["test"]]), seconds([step["check"]]) if step["check"] else 0.0))
        built, suite, watched = (statistics.median(column) for column in zip(*rounds))
        total = statistics.median(map(sum, rounds))
        goal = GOALS[step["kind"]]
        print(f"{step['number'] + ' ' + step['name']:28}{built:8.2f}{suite:8.2f}"
              f"{f'{watched:9.2f}' if step['check'] else '         '}{total:8.2f}{goal:6.0f}"
              f"{'' if total <= goal else '  missed'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
