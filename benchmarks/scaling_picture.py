#!/usr/bin/env python3
"""Draws what benchmarks/context_parallel has measured: speed-up against GPUs, and where the time goes.

    python3 benchmarks/scaling_picture.py RESULTS.csv PICTURE.svg [NAME OF THE MACHINE]

Needs nothing but Python.
"""

import csv
import sys
from pathlib import Path

from pictures import GREY, GRID, Picture, short

COLOURS = ["#9ecae1", "#4292c6", "#08519c", "#000000"]  # of lengths, the shortest first
FORMS = ("gather", "ring")
PARTS = (("#c9d6df", "one GPU's time / W"), ("#e3b04b", "more work: hops, merges, copies"), ("#c0392b", "exchange not hidden"))


def read(path):
    with open(path, newline="") as file:
        return {(int(r["gpus"]), int(r["tokens"]), r["what"], r["direction"]): r for r in csv.DictReader(file)}


def speed_up(picture, rows, left, top, width, height):
    gpus = sorted({key[0] for key in rows if key[0] > 1})
    lengths = sorted({key[1] for key in rows})
    most = max(gpus)
    x = lambda w: left + width * (w - 1) / (most - 1)
    y = lambda s: top + height * (1 - (s - 1) / (most - 1))
    for w in range(1, most + 1):
        picture.line([(left, y(w)), (left + width, y(w))], GRID)
        picture.text(left - 6, y(w) + 4, w, 10, "end", GREY)
        picture.text(x(w), top + height + 15, w, 10, "middle", GREY)
    picture.text(left, top - 10, "forward and backward: times as fast as one GPU", 12, extra='font-weight="bold"')
    picture.text(left + width / 2, top + height + 32, "GPUs", 11, "middle", GREY)
    picture.line([(x(1), y(1)), (x(most), y(most))], GREY, 1, "2 3")
    picture.line([(x(1 / 0.9), y(1)), (x(most), y(0.9 * most))], GREY, 1, "6 3")
    picture.text(left + 8, y(most) + 12, "dotted: linear; grey dashes: 0.9 of it", 10, "start", GREY)
    for number, length in enumerate(lengths):
        for form in FORMS:
            points = [(x(1), y(1))]
            for w in gpus:
                row = rows.get((w, length, form, "both"))
                if row:
                    points.append((x(w), y(float(row["one_gpu_ms"]) / float(row["ms"]))))
            picture.line(points, COLOURS[number], 2, "" if form == "gather" else "7 4")
            for point in points[1:]:
                picture.dot(*point, COLOURS[number], 3)
    for number, length in enumerate(lengths):
        at = top + height - 14 - 16 * (len(lengths) - 1 - number)
        picture.line([(left + width - 118, at - 4), (left + width - 98, at - 4)], COLOURS[number], 2)
        picture.text(left + width - 92, at, f"{short(length)} tokens", 11)
    picture.text(left + width - 118, top + height - 14 - 16 * len(lengths), "solid: gather; dashed: ring", 10, "start", GREY)


def parts_of(rows, gpus, length, form, direction):
    row = rows[gpus, length, form, direction]
    ms, silent, one = float(row["ms"]), float(row["no_exchange_ms"]), float(row["one_gpu_ms"])
    share = one / gpus
    return [share / ms, max(0.0, silent - share) / ms, max(0.0, ms - max(silent, share)) / ms], ms


def where_the_time_goes(picture, rows, left, top, width):
    gpus = max(key[0] for key in rows)
    lengths = sorted({key[1] for key in rows if key[0] == gpus})
    picture.text(left, top - 10, f"where the time goes on {gpus} GPUs", 12, extra='font-weight="bold"')
    at = top + 6
    for direction in ("forward", "backward"):
        for length in lengths:
            for form in FORMS:
                parts, ms = parts_of(rows, gpus, length, form, direction)
                picture.text(left + 128, at + 10, f"{direction}, {short(length)}, {form}", 10, "end")
                begin = left + 134
                for part, (colour, _) in zip(parts, PARTS):
                    picture.rect(begin, at, part * (width - 200), 12, colour)
                    begin += part * (width - 200)
                picture.text(begin + 6, at + 10, f"{ms:.3g} ms", 10, "start", GREY)
                at += 17
        at += 8
    x = left
    for colour, name in PARTS:
        picture.rect(x, at + 2, 12, 12, colour)
        picture.text(x + 17, at + 12, name, 10)
        x += 30 + 5.4 * len(name)


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    rows = read(sys.argv[1])
    picture = Picture(900, 390, "Context parallel attention: strong scaling")
    machine = f"; {sys.argv[3]}" if len(sys.argv) > 3 else ""
    picture.text(20, 22, f"One sequence on several GPUs: 32 query heads, 8 key heads, D = 128, bf16, causal{machine}", 13,
                 extra='font-weight="bold"')
    speed_up(picture, rows, 45, 65, 340, 270)
    where_the_time_goes(picture, rows, 425, 65, 460)
    picture.write(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
