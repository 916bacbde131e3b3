#!/usr/bin/env python3
"""Prints what ./kata bench has measured beside its peers as tables in Markdown: the peer's time over ours.

    python3 benchmarks/tables.py RESULTS.csv...              all steps, each beside the peer that its goal names
    python3 benchmarks/tables.py RESULTS.csv... --beside cuDNN --step 2.05

Needs nothing but Python.
"""

import argparse
import statistics
from pathlib import Path

import pictures

GOALS = ("separate", "FA2", "mem-eff", "CPU flash")  # whose speed an answer should reach, if nobody else is named


def table(figure, panels, who):
    """Rows of a figure's panels, columns of lengths."""
    both = {key: panel["ours"].keys() & panel.get(who, {}).keys() for key, panel in panels.items() if "ours" in panel}
    keys = sorted(key for key in both if both[key])
    if not keys:
        return
    step, kind, direction, device, threads = figure
    where = "" if device == "gpu" else ", one thread" if threads == "1" else ", all threads"
    ratios = {key: {length: float(panels[key][who][length]["ms"]) / float(panels[key]["ours"][length]["ms"])
                    for length in both[key]} for key in keys}
    every = [ratio for rows in ratios.values() for ratio in rows.values()]
    lengths = sorted(set().union(*both.values()))
    print(f"**{step}, {kind}, {direction}{where}, beside {who}**: {min(every):.2f} to {max(every):.2f}, "
          f"median {statistics.median(every):.2f}; 1.00 or more, rounded, in {sum(ratio >= 0.995 for ratio in every)} of {len(every)}\n")
    print("| | " + " | ".join(pictures.short(length) for length in lengths) + " |")
    print("|---" * (len(lengths) + 1) + "|")
    for key in keys:
        print(f"| {key.label} | " + " | ".join(f"{ratios[key][length]:.2f}" if length in ratios[key] else ""
                                               for length in lengths) + " |")
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--beside", help="a peer's name; default: the one of the goals")
    parser.add_argument("--step", help="only this one")
    options = parser.parse_args()
    for figure, panels in sorted(pictures.read(options.results).items()):
        if options.step and figure[0] != options.step:
            continue
        names = pictures.names_of(panels)
        goals = ("cuDNN",) if figure[2] == "decode" else GOALS
        chosen = [options.beside] if options.beside else [name for name in goals if name in names]
        for who in chosen if figure[0] == "4.05" else chosen[:1]:
            table(figure, panels, who)


if __name__ == "__main__":
    main()
