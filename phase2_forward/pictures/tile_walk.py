#!/usr/bin/env python3
"""Writes tile_walk.svg: one tile of queries walks along the keys under a causal mask.  python3 tile_walk.py"""
from pathlib import Path

QUERIES, KEYS, BR, BC = 20, 24, 4, 6  # the last query stands at the last key
UNIT, LEFT, TOP = 13, 110, 92
ROW_TILE = 2
INK, LIGHT, BLUE, DARK_BLUE, GREEN = "#333", "#e8e8e8", "#9ecae9", "#4c9ad4", "#7cc48a"
parts = []


def rect(x, y, w, h, fill, stroke=INK, width=1.0, extra=""):
    parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{fill}" stroke="{stroke}" stroke-width="{width}" {extra}/>')


def text(x, y, words, size=13, anchor="start", extra=""):
    parts.append(f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" {extra}>{words}</text>')


def arrow(x1, y1, x2, y2):
    parts.append(f'<path d="M{x1} {y1} L{x2} {y2}" stroke="{INK}" stroke-width="1.6" fill="none" marker-end="url(#head)"/>')


def seen(i):
    return max(0, min(KEYS, i + 1 + KEYS - QUERIES))


x_of = lambda j: LEFT + j * UNIT
y_of = lambda i: TOP + i * UNIT

# What a causal mask allows, then the tiles on top.
for i in range(QUERIES):
    parts.append(f'<rect x="{x_of(0)}" y="{y_of(i)}" width="{seen(i) * UNIT}" height="{UNIT}" fill="{LIGHT}"/>')
for r in range(QUERIES // BR):
    last = seen((r + 1) * BR - 1)
    for c in range(KEYS // BC):
        visited = c * BC < last
        mine = r == ROW_TILE and visited
        if mine:
            for i in range(r * BR, (r + 1) * BR):
                width = max(0, min(seen(i), (c + 1) * BC) - c * BC)
                parts.append(f'<rect x="{x_of(c * BC)}" y="{y_of(i)}" width="{width * UNIT}" height="{UNIT}" fill="{BLUE}"/>')
        rect(x_of(c * BC), y_of(r * BR), BC * UNIT, BR * UNIT, "none" if visited else "url(#skip)", "#888", 0.8)
        if mine:
            text(x_of(c * BC + BC / 2), y_of(r * BR) + BR * UNIT / 2 + 5, f"{c + 1}", 15, "middle", 'font-weight="bold"')
rect(x_of(0), y_of(ROW_TILE * BR), KEYS * UNIT, BR * UNIT, "none", INK, 2)

# Keys and values above, queries on the left.
for k, name in enumerate(("K", "V")):
    y = TOP - 58 + k * 24
    for c in range(KEYS // BC):
        rect(x_of(c * BC), y, BC * UNIT, 18, DARK_BLUE if c * BC < seen((ROW_TILE + 1) * BR - 1) else "white")
    text(LEFT - 10, y + 14, name, 14, "end")
text(x_of(KEYS / 2), TOP - 66, "tiles of keys, Bc wide", 13, "middle")
for r in range(QUERIES // BR):
    rect(LEFT - 48, y_of(r * BR), 30, BR * UNIT, DARK_BLUE if r == ROW_TILE else "white")
text(LEFT - 33, y_of(QUERIES) + 20, "Q", 14, "middle")
text(LEFT - 62, y_of(QUERIES / 2), "tiles of queries, Br high", 13, "middle",
     f'transform="rotate(-90 {LEFT - 62} {y_of(QUERIES / 2)})"')

# What the walking tile keeps.
kept, y = x_of(KEYS) + 62, y_of(ROW_TILE * BR)
arrow(x_of(KEYS) + 6, y + BR * UNIT / 2, kept - 8, y + BR * UNIT / 2)
for name, width, x in (("m", 14, 0), ("l", 14, 26), ("O", 84, 52)):
    rect(kept + x, y, width, BR * UNIT, GREEN)
    text(kept + x + width / 2, y - 7, name, 14, "middle")
text(kept, y + BR * UNIT + 20, "kept from tile to tile:")
text(kept, y + BR * UNIT + 37, "2 numbers and a row of Dv")
text(kept, y + BR * UNIT + 54, "for each query")

# Legend.
for k, (fill, words) in enumerate(((BLUE, "the walk of this tile of queries: 1, 2, ..."), (LIGHT, "pairs that the mask allows"),
                                   ("url(#skip)", "tiles that nobody visits"))):
    rect(LEFT, y_of(QUERIES) + 38 + k * 22, 16, 14, fill)
    text(LEFT + 24, y_of(QUERIES) + 50 + k * 22, words)

width, height = kept + 190, y_of(QUERIES) + 112
svg = f'''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="sans-serif" fill="{INK}">
<title>One tile of queries walks along the tiles of keys and keeps a maximum, a sum and an output for each row</title>
<defs>
<pattern id="skip" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="7" height="7" fill="white"/><path d="M0 0 V7" stroke="#bbb" stroke-width="2"/></pattern>
<marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto"><path d="M0 0 L8 4 L0 8 Z" fill="{INK}"/></marker>
</defs>
<rect width="{width}" height="{height}" fill="white"/>
''' + "\n".join(parts) + "\n</svg>\n"
Path(__file__).with_name("tile_walk.svg").write_text(svg)
