#!/usr/bin/env python3
"""Draws what ./kata bench has measured: speed against length, the roofline, and ratios to the peers.

    python3 benchmarks/pictures.py RESULTS.csv FOLDER        writes FOLDER/<step>_<direction>_{speed,roofline,ratio}.svg

Needs nothing but Python.
"""

import csv
import math
import sys
from collections import defaultdict
from pathlib import Path

INK, GREY, GRID = "#333", "#777", "#e4e4e4"
OURS = "#c0392b"
PEERS = {"cuDNN": "#2c7fb8", "FA2": "#3f8f4f", "mem-eff": "#c98a1b", "CPU flash": "#2c7fb8", "PyTorch": "#2c7fb8", "math": "#999"}


class Picture:
    def __init__(self, width, height, title):
        self.width, self.height, self.title, self.parts = width, height, title, []

    def text(self, x, y, words, size=11, anchor="start", fill=INK, extra=""):
        words = str(words).replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" {extra}>{words}</text>')

    def line(self, points, stroke, width=1.0, dash=""):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width}"{dash}/>')

    def dot(self, x, y, fill, radius=2.6):
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}"/>')

    def rect(self, x, y, w, h, fill):
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{fill}"/>')

    def write(self, path):
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="sans-serif">\n<title>{self.title}</title>\n'
            f'<rect width="{self.width}" height="{self.height}" fill="white"/>\n' + "\n".join(self.parts) + "\n</svg>\n")


class Axes:
    """A plot of its own within a picture; axes may be logarithmic."""

    def __init__(self, picture, left, top, width, height, x_range, y_range, log_y=False):
        self.picture, self.left, self.top, self.width, self.height = picture, left, top, width, height
        self.x_range, self.y_range, self.log_y = x_range, y_range, log_y

    def x(self, value):
        low, high = self.x_range
        return self.left + self.width * math.log(value / low) / math.log(high / low) if high > low else self.left + self.width / 2

    def y(self, value):
        low, high = self.y_range
        part = math.log(value / low) / math.log(high / low) if self.log_y else (value - low) / (high - low)
        return self.top + self.height * (1 - part)

    def frame(self, x_ticks, y_ticks, x_name, y_name):
        for tick in y_ticks:
            self.picture.line([(self.left, self.y(tick)), (self.left + self.width, self.y(tick))], GRID)
            self.picture.text(self.left - 5, self.y(tick) + 4, f"{tick:g}", 10, "end", GREY)
        for tick in x_ticks:
            self.picture.text(self.x(tick), self.top + self.height + 14, short(tick), 10, "middle", GREY)
        self.picture.line([(self.left, self.top), (self.left, self.top + self.height), (self.left + self.width, self.top + self.height)], INK)
        self.picture.text(self.left + self.width / 2, self.top + self.height + 30, x_name, 11, "middle", GREY)
        self.picture.text(self.left, self.top - 8, y_name, 11, "start", GREY)

    def curve(self, points, colour, width=1.6, dash=""):
        points = sorted(points)
        self.picture.line([(self.x(x), self.y(y)) for x, y in points], colour, width, dash)
        for x, y in points:
            self.picture.dot(self.x(x), self.y(y), colour)


def short(number):
    return f"{number / 1024:g}K" if number >= 1024 else f"{number:g}"


def nice_ticks(largest, count=5):
    step = 10 ** math.floor(math.log10(largest / count))
    for factor in (1, 2, 5, 10):
        if largest / (step * factor) <= count:
            step *= factor
            break
    return [step * i for i in range(int(largest / step) + 2)]


def read(path):
    """{(step, type, direction, device, threads): {(width, causal): {who: {length: row}}}}"""
    figures = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if row["status"] != "ok":
                continue
            figure = (row["step"], row["type"], row["direction"], row["device"], row["threads"])
            figures[figure][int(row["width"]), row["causal"] == "1"][row["who"]][int(row["length"])] = row
    return figures


def caption(figure, machine):
    step, kind, direction, device, threads = figure
    where = "" if device == "gpu" else ", one thread" if threads == "1" else ", all threads"
    return f"step {step}, {kind}, {direction}{where}; {machine}"


def names_of(panels):
    found = {who for panel in panels.values() for who in panel}
    return ["ours"] + [who for who in PEERS if who in found]


def legend(picture, names, y):
    x = 20
    for who in names:
        colour = OURS if who == "ours" else PEERS[who]
        picture.line([(x, y - 4), (x + 18, y - 4)], colour, 2)
        picture.text(x + 23, y, who, 11)
        x += 40 + 7 * len(who)


def speed(figure, panels, machine):
    keys = sorted(panels)
    columns = min(4, len(keys))
    rows = math.ceil(len(keys) / columns)
    width, height = 230, 150
    picture = Picture(columns * (width + 60) + 20, rows * (height + 80) + 60, f"Speed against length, step {figure[0]}")
    picture.text(20, 20, caption(figure, machine), 13, extra='font-weight="bold"')
    legend(picture, names_of(panels), 42)
    for number, key in enumerate(keys):
        panel = panels[key]
        points = {who: [(length, float(row["tflops"])) for length, row in rows.items()] for who, rows in panel.items()}
        lengths = sorted({length for rows in panel.values() for length in rows})
        largest = max(y for each in points.values() for _, y in each)
        ticks = nice_ticks(largest)
        axes = Axes(picture, 55 + number % columns * (width + 60), 85 + number // columns * (height + 80), width, height,
                    (lengths[0], lengths[-1]), (0, ticks[-1]))
        axes.frame(lengths[:: max(1, len(lengths) // 6)], ticks, "S", f"TFLOP/s, D = {key[0]}, {'causal' if key[1] else 'full'}")
        for who in reversed(names_of(panels)):
            if who in points:
                axes.curve(points[who], OURS if who == "ours" else PEERS[who], 2.2 if who == "ours" else 1.4)
    return picture


def roofline(figure, panels, machine):
    """Operations for each byte that has to be moved against TFLOP/s; the roof from of_roofline, which is a share of it."""
    dots, roofs = [], {}
    forward, backward = figure[2] != "backward", figure[2] != "forward"
    for (width, causal), panel in panels.items():
        for length, row in panel.get("ours", {}).items():
            pairs = length * length * (0.5 if causal else 1)
            operations = ((2 if forward else 0) + (5 if backward else 0)) * 2 * pairs * width
            moved = length * width * (4 if figure[1] == "float32" else 2) * ((4 if forward else 0) + (8 if backward else 0))
            rate, share = float(row["tflops"]), float(row["of_roofline"])
            if share > 0:
                dots.append((operations / moved, rate, width))
                roofs[operations / moved] = rate / share
    if not dots:
        return None
    picture = Picture(560, 330, f"Roofline, step {figure[0]}")
    picture.text(20, 20, caption(figure, machine), 13, extra='font-weight="bold"')
    low, high = min(roofs) / 1.5, max(roofs) * 1.5
    top = 10 ** math.ceil(math.log10(max(roofs.values())))
    bottom = 10 ** math.floor(math.log10(min(rate for _, rate, _ in dots)))
    axes = Axes(picture, 60, 55, 470, 220, (low, high), (bottom, top), log_y=True)
    decades = range(round(math.log10(bottom)), round(math.log10(top)) + 1)
    axes.frame([2**k for k in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)][::2],
               [10.0**k for k in decades], "operations for each byte that has to be moved", "TFLOP/s")
    picture.line([(axes.x(x), axes.y(y)) for x, y in sorted(roofs.items())], INK, 1.6)
    shades = {16: "#f2b56b", 32: "#e08e79", 64: "#c0392b", 128: "#7b241c"}
    for x, y, width in dots:
        picture.dot(axes.x(x), axes.y(y), shades.get(width, OURS), 3.2)
    for number, width in enumerate(sorted({width for _, _, width in dots})):
        picture.dot(470, 190 + 16 * number, shades.get(width, OURS), 3.2)
        picture.text(480, 194 + 16 * number, f"D = {width}")
    return picture


def ratio_colour(ratio):
    """Red below 1, white at 1, green above."""
    part = max(-1.0, min(1.0, math.log2(ratio) / 0.7))
    weak = 1 - abs(part)
    red, green, blue = (220, 80, 60) if part < 0 else (70, 150, 90)
    return "#%02x%02x%02x" % tuple(round(255 * weak + c * (1 - weak)) for c in (red, green, blue))


def ratio(figure, panels, machine):
    peers = [who for who in names_of(panels) if who not in ("ours", "math")]
    keys = sorted(panels)
    lengths = sorted({length for panel in panels.values() for length in panel.get("ours", {})})
    if not peers or not lengths:
        return None
    cell_w, cell_h, left = 46, 22, 110
    block = left + cell_w * len(lengths) + 30
    picture = Picture(max(480, block * len(peers)), 90 + cell_h * len(keys), f"Times as fast as the peers, step {figure[0]}")
    picture.text(20, 20, caption(figure, machine), 13, extra='font-weight="bold"')
    for number, who in enumerate(peers):
        x0 = number * block + 10
        picture.text(x0 + left, 44, f"times as fast as {who}", 12)
        for column, length in enumerate(lengths):
            picture.text(x0 + left + column * cell_w + cell_w / 2, 62, short(length), 10, "middle", GREY)
        for line, key in enumerate(keys):
            y = 68 + line * cell_h
            picture.text(x0 + left - 8, y + 15, f"D = {key[0]}, {'causal' if key[1] else 'full'}", 10, "end", GREY)
            for column, length in enumerate(lengths):
                mine, other = (panels[key].get(name, {}).get(length) for name in ("ours", who))
                if mine and other:
                    times = float(other["ms"]) / float(mine["ms"])
                    picture.rect(x0 + left + column * cell_w, y, cell_w - 1, cell_h - 1, ratio_colour(times))
                    picture.text(x0 + left + column * cell_w + cell_w / 2, y + 15, f"{times:.2f}", 10, "middle")
    return picture


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for figure, panels in read(sys.argv[1]).items():
        machine = next(row["machine"] for panel in panels.values() for rows in panel.values() for row in rows.values())
        name = f"{figure[0]}_{figure[2]}" + ("" if figure[3] == "gpu" else "_one_thread" if figure[4] == "1" else "_all_threads")
        for kind in (speed, roofline, ratio):
            picture = kind(figure, panels, machine)
            if picture is not None:
                picture.write(folder / f"{name}_{kind.__name__}.svg")


if __name__ == "__main__":
    main()
