#!/usr/bin/env python3
"""Writes loop_orders.svg and five_products.svg, the pictures of the way back.  python3 pictures.py"""
from pathlib import Path

INK, LIGHT, BLUE, DARK_BLUE, GREEN, ORANGE = "#333", "#e8e8e8", "#9ecae9", "#4c9ad4", "#7cc48a", "#f2b56b"


class Picture:
    def __init__(self):
        self.parts = []

    def rect(self, x, y, w, h, fill, stroke=INK, width=1.0, extra=""):
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{fill}" stroke="{stroke}" stroke-width="{width}" {extra}/>')

    def text(self, x, y, words, size=13, anchor="start", extra=""):
        self.parts.append(f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" {extra}>{words}</text>')

    def arrow(self, *points, dashed=False):
        path = " L".join(f"{x} {y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<path d="M{path}" stroke="{INK}" stroke-width="1.5" fill="none"{dash} marker-end="url(#head)"/>')

    def write(self, name, title, width, height):
        svg = f'''<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="sans-serif" fill="{INK}">
<title>{title}</title>
<defs>
<pattern id="skip" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="7" height="7" fill="white"/><path d="M0 0 V7" stroke="#bbb" stroke-width="2"/></pattern>
<marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto"><path d="M0 0 L8 4 L0 8 Z" fill="{INK}"/></marker>
</defs>
<rect width="{width}" height="{height}" fill="white"/>
''' + "\n".join(self.parts) + "\n</svg>\n"
        Path(__file__).with_name(name).write_text(svg)


# ---- Which loop is the outer one -------------------------------------------------------------------------------------

TOKENS, TILE, UNIT, STRIP = 20, 5, 11, 17  # as many queries as keys, causal
TILES, SIDE = TOKENS // TILE, TOKENS * UNIT


def walk(picture, left, top, keys_outside):
    """The grid of pairs, the rows that it is made of, and the gradients: green stay, orange are added to in memory."""
    mine = 1 if keys_outside else 2
    x_of, y_of = (lambda j: left + j * UNIT), (lambda i: top + i * UNIT)
    visited = [(r, mine) for r in range(mine, TILES)] if keys_outside else [(mine, c) for c in range(mine + 1)]

    for i in range(TOKENS):
        picture.rect(left, y_of(i), (i + 1) * UNIT, UNIT, LIGHT, "none")
    for r in range(TILES):
        for c in range(TILES):
            if (r, c) in visited:
                for i in range(r * TILE, (r + 1) * TILE):
                    picture.rect(x_of(c * TILE), y_of(i), UNIT * max(0, min(TILE, i + 1 - c * TILE)), UNIT, BLUE, "none")
            picture.rect(x_of(c * TILE), y_of(r * TILE), TILE * UNIT, TILE * UNIT, "url(#skip)" if c > r else "none", "#888", 0.8)
    for count, (r, c) in enumerate(visited):
        picture.text(x_of(c * TILE + TILE / 2), y_of(r * TILE + TILE / 2) + 5, str(count + 1), 15, "middle", 'font-weight="bold"')
    if keys_outside:
        picture.rect(x_of(mine * TILE), top, TILE * UNIT, SIDE, "none", INK, 2)
    else:
        picture.rect(left, y_of(mine * TILE), SIDE, TILE * UNIT, "none", INK, 2)

    rows, columns = {r for r, _ in visited}, {c for _, c in visited}
    for t in range(TILES):
        for k, name in enumerate(("K", "V")):
            picture.rect(x_of(t * TILE), top - 50 + k * 22, TILE * UNIT, STRIP, DARK_BLUE if t in columns else "white")
        for k, name in enumerate(("Q", "dO")):
            picture.rect(left - 54 + k * 24, y_of(t * TILE), STRIP, TILE * UNIT, DARK_BLUE if t in rows else "white")
        kept, added = GREEN, ORANGE
        picture.rect(left + SIDE + 12, y_of(t * TILE), STRIP, TILE * UNIT,
                     "white" if t not in rows else added if keys_outside else kept)
        for k in range(2):
            picture.rect(x_of(t * TILE), top + SIDE + 12 + k * 22, TILE * UNIT, STRIP,
                         "white" if t not in columns else kept if keys_outside else added)
    for k, name in enumerate(("K", "V")):
        picture.text(left - 8, top - 37 + k * 22, name, 13, "end")
    for k, name in enumerate(("Q", "dO")):
        picture.text(left - 54 + k * 24 + STRIP / 2, top + SIDE + 18, name, 13, "middle")
    picture.text(left + SIDE + 12 + STRIP / 2, top - 7, "dQ", 13, "middle")
    for k, name in enumerate(("dK", "dV")):
        picture.text(left + SIDE + 6, top + SIDE + 25 + k * 22, name, 13)


picture = Picture()
for left, keys_outside, title in ((74, True, "keys outside"), (444, False, "queries outside")):
    picture.text(left + SIDE / 2, 26, title, 15, "middle", 'font-weight="bold"')
    walk(picture, left, 94, keys_outside)
for k, (fill, words) in enumerate(((BLUE, "the walk of one tile: 1, 2, ..."), ("url(#skip)", "tiles that nobody visits"))):
    picture.rect(74, 388 + k * 24, 16, 14, fill)
    picture.text(98, 400 + k * 24, words)
for k, (fill, words) in enumerate(((GREEN, "stays at hand, and is written once, at the end"),
                                   (ORANGE, "lies in memory, and several walks add to it"))):
    picture.rect(300, 388 + k * 24, 16, 14, fill)
    picture.text(324, 400 + k * 24, words)
picture.write("loop_orders.svg", "With keys outside dK and dV stay and dQ is added to; with queries outside it is the other way round", 722, 446)


# ---- What is made from what ------------------------------------------------------------------------------------------

picture = Picture()
HEIGHT = 30


def box(x, y, words, fill, width=62):
    picture.rect(x - width / 2, y - HEIGHT / 2, width, HEIGHT, fill, extra='rx="4"')
    picture.text(x, y + 5, words, 14, "middle")
    return x, y


def product(x, y, words):
    """One of the five: a circle that carries its number."""
    product.count += 1
    picture.parts.append(f'<circle cx="{x}" cy="{y}" r="12" fill="white" stroke="{INK}" stroke-width="1.6"/>')
    picture.text(x, y + 5, str(product.count), 13, "middle", 'font-weight="bold"')
    picture.text(x, y - 18, words, 12, "middle")


product.count = 0

box(50, 55, "Q", DARK_BLUE), box(50, 105, "K", DARK_BLUE)
box(50, 215, "V", DARK_BLUE), box(50, 265, "dO", DARK_BLUE)
box(50, 345, "O", DARK_BLUE)
box(250, 30, "L", DARK_BLUE)

product(150, 80, "Q K&#8868;"), product(150, 240, "dO V&#8868;")
for y, of in ((55, 80), (105, 80), (215, 240), (265, 240)):
    picture.arrow((81, y), (137, of + (6 if y > of else -6)))
box(230, 80, "S", BLUE), box(330, 80, "P", BLUE)
picture.arrow((163, 80), (197, 80)), picture.arrow((261, 80), (297, 80)), picture.arrow((281, 34), (322, 62))
picture.text(279, 98, "exp", 12, "middle")
box(230, 240, "dP", BLUE)
picture.arrow((163, 240), (197, 240))
box(230, 330, "delta", GREEN)
picture.arrow((81, 341), (197, 333)), picture.arrow((81, 274), (200, 322))
picture.text(120, 364, "row by row, dO &#183; O", 12)
box(430, 240, "dS", BLUE)
picture.arrow((261, 240), (397, 240)), picture.arrow((338, 95), (417, 223)), picture.arrow((261, 326), (404, 257))
picture.text(322, 232, "P * (dP &#8722; delta)", 12, "middle")

product(560, 80, "P&#8868; dO"), product(560, 190, "dS&#8868; Q"), product(560, 290, "dS K")
picture.arrow((361, 80), (547, 80))
picture.arrow((461, 234), (548, 196)), picture.arrow((461, 247), (548, 284))
for y, name in ((80, "dV"), (190, "dK"), (290, "dQ")):
    box(670, y, name, ORANGE)
    picture.arrow((573, y), (637, y))
picture.text(603, 206, "* scale", 12, "middle"), picture.text(603, 306, "* scale", 12, "middle")
for k, (fill, words) in enumerate(((DARK_BLUE, "comes in, one row for each token (L: one number)"), (BLUE, "of one tile, gone after it"),
                                   (GREEN, "one number for each query"), (ORANGE, "goes out"))):
    x, y = ((34, 398), (34, 422), (420, 398), (420, 422))[k]
    picture.rect(x, y - 12, 16, 14, fill)
    picture.text(x + 24, y, words)
picture.write("five_products.svg", "Five products make three gradients out of Q, K, V, dO, O and one number L for each query", 724, 440)
