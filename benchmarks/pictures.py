#!/usr/bin/env python3
"""Draws what ./kata bench has measured: speed against length, ratios to the peers, the roofline, what grouping saves.

    python3 benchmarks/pictures.py RESULTS.csv... FOLDER     writes FOLDER/<step>_<direction>_{speed,ratio}.svg,
                                                             FOLDER/roofline_<type>.svg, FOLDER/grouped_savings.svg

Needs nothing but Python.
"""

import csv
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

INK, GREY, GRID = "#333", "#777", "#e4e4e4"
OURS = "#c0392b"
PEERS = {"separate": "#2c7fb8", "cuDNN": "#2c7fb8", "FA2": "#3f8f4f", "mem-eff": "#c98a1b", "CPU flash": "#2c7fb8", "PyTorch": "#2c7fb8", "math": "#999"}


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


class Panel(NamedTuple):
    """One of the small plots of a figure, in the order in which they stand there."""

    what: str
    causal: bool
    width: int
    heads: str
    batch: int
    label: str


def panel_of(row):
    shared = f"{row['heads']}/{row['kv_heads']}"
    if row["direction"] == "decode":
        label, key = f"{shared} heads, batch {row['batch']}", (False, 128, shared.rjust(6), int(row["batch"]))
    elif row["what"].endswith(("chunks", "on all")):
        label, key = f"{shared} heads", (row["causal"] == "1", 128, shared, 0)
    else:
        causal, width = row["causal"] == "1", int(row["width"])
        label, key = f"D = {width}, {'causal' if causal else 'full'}", (causal, width, "", 0)
    return Panel(row["what"], *key, ", ".join(filter(None, (row["what"], label))))


def rate(row):
    """TFLOP/s; of decoding TB/s."""
    return float(row["gb"]) / float(row["ms"]) if row["direction"] == "decode" else float(row["tflops"])


def read(paths):
    """{(step, type, direction, device, threads): {panel: {who: {length: row}}}}"""
    figures = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for path in paths:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row["status"] == "ok":
                    figure = (row["step"], row["type"], row["direction"], row["device"], row["threads"])
                    figures[figure][panel_of(row)][row["who"]][int(row["length"])] = row
    return figures


def rows_of(panels):
    return [row for panel in panels.values() for rows in panel.values() for row in rows.values()]


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
    panels = {key: panel for key, panel in panels.items() if len(panel.get("ours", {})) > 1}
    if not panels:
        return None
    keys = sorted(panels)
    columns = next(n for n in (4, 3, 2, 1) if len(keys) % n == 0)
    rows = math.ceil(len(keys) / columns)
    width, height = 230, 150
    picture = Picture(max(560, columns * (width + 60) + 20), rows * (height + 80) + 60, f"Speed against length, step {figure[0]}")
    picture.text(20, 20, caption(figure, machine), 13, extra='font-weight="bold"')
    legend(picture, names_of(panels), 42)
    unit = "TB/s" if figure[2] == "decode" else "TFLOP/s"
    for number, key in enumerate(keys):
        panel = panels[key]
        points = {who: [(length, rate(row)) for length, row in rows.items()] for who, rows in panel.items()}
        lengths = sorted({length for rows in panel.values() for length in rows})
        largest = max(y for each in points.values() for _, y in each)
        ticks = nice_ticks(largest)
        axes = Axes(picture, 55 + number % columns * (width + 60), 85 + number // columns * (height + 80), width, height,
                    (lengths[0], lengths[-1]), (0, ticks[-1]))
        axes.frame(lengths[:: max(1, math.ceil(len(lengths) / 6))], ticks, "S", f"{unit}, {key.label}")
        for who in reversed(names_of(panels)):
            if who in points:
                axes.curve(points[who], OURS if who == "ours" else PEERS[who], 2.2 if who == "ours" else 1.4)
    return picture


SHADES = ("#c0392b", "#2c7fb8", "#3f8f4f", "#c98a1b", "#7d5ba6", "#17857b", "#b5508c", "#6b6b6b", "#8a6d3b", "#1b3a6b")


def roofline(kind, device, threads, figures, machine):
    """Operations for each byte that has to be moved against TFLOP/s; the roof from of_roofline, which is a share of it."""
    dots, roofs = defaultdict(list), {}
    for figure, panels in sorted(figures.items()):
        for row in rows_of(panels):
            share = float(row["of_roofline"])
            if row["who"] == "ours" and share > 0:
                x, y = float(row["tflops"]) * float(row["ms"]) / float(row["gb"]), float(row["tflops"])
                dots[f"{figure[0]} {figure[2]}"].append((x, y))
                roofs[x] = y / share
    picture = Picture(760, 400, f"Roofline, {kind}")
    where = "" if device == "gpu" else ", one thread" if threads == "1" else ", all threads"
    picture.text(20, 20, f"roofline, {kind}{where}; {machine}", 13, extra='font-weight="bold"')
    low, high = min(roofs) / 1.5, max(roofs) * 1.5
    peak = max(roofs.values())
    slope = min(roofs[x] / x for x in roofs) if min(roofs.values()) == peak else max(roofs[x] / x for x in roofs)
    top = 10 ** math.ceil(math.log10(peak))
    bottom = 10 ** math.floor(math.log10(min(y for each in dots.values() for _, y in each)))
    axes = Axes(picture, 60, 60, 510, 280, (low, high), (bottom, top), log_y=True)
    ticks = [2**k for k in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    decades = round(math.log10(top / bottom))
    rates = [bottom * 10**k * part for k in range(decades + 1) for part in ((1, 2, 5) if decades < 3 else (1,))]
    axes.frame(ticks[:: math.ceil(len(ticks) / 8)], [y for y in rates if y <= top],
               "operations for each byte that has to be moved", "TFLOP/s")
    ridge = peak / slope
    roof = [(low, max(bottom, slope * low)), (ridge, peak), (high, peak)] if ridge > low else [(low, peak), (high, peak)]
    picture.line([(axes.x(x), axes.y(y)) for x, y in roof], INK, 1.6)
    for number, (name, points) in enumerate(dots.items()):
        colour = SHADES[number % len(SHADES)]
        for x, y in points:
            picture.dot(axes.x(x), axes.y(y), colour, 2.8)
        picture.dot(592, 74 + 17 * number, colour, 3.4)
        picture.text(602, 78 + 17 * number, name)
    return picture


def savings(figures, machine):
    """Step 4.05: a call for each group beside one call for all of them, in time and in bytes."""
    curves = defaultdict(lambda: defaultdict(list))  # {direction: {name: [(length, ratio)]}}
    for (step, _, direction, _, _), panels in figures.items():
        for key, panel in panels.items():
            for length, ours in panel.get("ours", {}).items():
                other = panel.get("separate", {}).get(length)
                if step != "4.05" or other is None or not key.heads:
                    continue
                name = f"{key.what}, {key.heads}"
                curves[f"time, {direction}"][name].append((length, float(other["ms"]) / float(ours["ms"])))
                curves["bytes, by formula"][name].append((length, float(other["gb"]) / float(ours["gb"])))
    if not curves:
        return None
    names = sorted({name for each in curves.values() for name in each})
    colours = {name: SHADES[number] for number, name in enumerate(names)}
    width, height = 230, 190
    picture = Picture(3 * (width + 60) + 20, height + 200, "What grouping saves")
    picture.text(20, 20, f"step 4.05: a call for each group over one call for all; {machine}", 13, extra='font-weight="bold"')
    for number, title in enumerate(sorted(curves, reverse=True)):
        points = curves[title]
        lengths = sorted({x for each in points.values() for x, _ in each})
        ratios = [y for each in points.values() for _, y in each]
        low, high = math.floor(10 * min(*ratios, 1)), math.ceil(10 * max(*ratios, 1.1))
        ticks = [tick / 10 for tick in range(low, high + 1, math.ceil((high - low) / 7))]
        axes = Axes(picture, 55 + number * (width + 60), 60, width, height, (lengths[0], max(lengths[-1], lengths[0] + 1)),
                    (low / 10, high / 10))
        axes.frame(lengths, ticks, "tokens", f"separate / fused: {title}")
        picture.line([(axes.left, axes.y(1)), (axes.left + width, axes.y(1))], GREY, 1, "4 3")
        for name, each in points.items():
            axes.curve(sorted(set(each)), colours[name])
    for number, name in enumerate(names):
        x, y = 55 + number % 4 * 200, height + 125 + number // 4 * 22
        picture.line([(x, y - 4), (x + 18, y - 4)], colours[name], 2)
        picture.text(x + 23, y, f"{name} heads", 11)
    return picture


def ratio_colour(ratio):
    """Red below 1, white at 1, green above."""
    part = max(-1.0, min(1.0, math.log2(ratio) / 0.7))
    weak = 1 - abs(part)
    red, green, blue = (220, 80, 60) if part < 0 else (70, 150, 90)
    return "#%02x%02x%02x" % tuple(round(255 * weak + c * (1 - weak)) for c in (red, green, blue))


def ratio(figure, panels, machine):
    blocks = []  # of each peer: the panels and the lengths that it took part in
    for who in names_of(panels):
        common = {key: panel["ours"].keys() & panel.get(who, {}).keys() for key, panel in panels.items() if "ours" in panel}
        if who not in ("ours", "math") and any(common.values()):
            blocks.append((who, sorted(key for key in common if common[key]), sorted(set().union(*common.values()))))
    if not blocks:
        return None
    cell_w, cell_h = 46, 22
    left = 20 + 6 * max(len(key.label) for _, keys, _ in blocks for key in keys)
    block = left + max(150, cell_w * max(len(lengths) for _, _, lengths in blocks)) + 20
    columns = max(1, min(len(blocks), 1300 // block))
    deep = 60 + cell_h * max(len(keys) for _, keys, _ in blocks)
    title = caption(figure, machine)
    picture = Picture(max(8.4 * len(title) + 40, block * columns + 20), 30 + deep * math.ceil(len(blocks) / columns),
                      f"Times as fast as the peers, step {figure[0]}")
    picture.text(20, 20, title, 13, extra='font-weight="bold"')
    for number, (who, keys, lengths) in enumerate(blocks):
        x0, y0 = number % columns * block + 10, number // columns * deep
        picture.text(x0 + left, y0 + 46, f"times as fast as {who}", 12)
        for column, length in enumerate(lengths):
            picture.text(x0 + left + column * cell_w + cell_w / 2, y0 + 64, short(length), 10, "middle", GREY)
        for line, key in enumerate(keys):
            y = y0 + 70 + line * cell_h
            picture.text(x0 + left - 8, y + 15, key.label, 10, "end", GREY)
            for column, length in enumerate(lengths):
                mine, other = (panels[key].get(name, {}).get(length) for name in ("ours", who))
                if mine and other:
                    times = float(other["ms"]) / float(mine["ms"])
                    picture.rect(x0 + left + column * cell_w, y, cell_w - 1, cell_h - 1, ratio_colour(times))
                    ink = INK if abs(math.log2(times)) < 0.5 else "#fff"
                    picture.text(x0 + left + column * cell_w + cell_w / 2, y + 15, f"{times:.2f}", 10, "middle", ink)
    return picture


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    folder = Path(sys.argv[-1])
    folder.mkdir(parents=True, exist_ok=True)
    figures = read(sys.argv[1:-1])

    def draw(picture, name):
        if picture is not None:
            picture.write(folder / f"{name}.svg")

    by_place = defaultdict(dict)  # figures of the same roof
    for figure, panels in figures.items():
        step, kind, direction, device, threads = figure
        machine = rows_of(panels)[0]["machine"]
        where = "" if device == "gpu" else "_one_thread" if threads == "1" else "_all_threads"
        draw(speed(figure, panels, machine), f"{step}_{direction}{where}_speed")
        draw(ratio(figure, panels, machine), f"{step}_{direction}{where}_ratio")
        if direction != "both":
            by_place[kind, device, threads, where, machine][figure] = panels
    for (kind, device, threads, where, machine), some in by_place.items():
        draw(roofline(kind, device, threads, some, machine), f"roofline_{kind}{where}")
        if device == "gpu":
            draw(savings(some, machine), "grouped_savings") if any(figure[0] == "4.05" for figure in some) else None


if __name__ == "__main__":
    main()
