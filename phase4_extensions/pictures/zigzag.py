#!/usr/bin/env python3
"""Writes zigzag.svg: who has which chunk, what a rank computes, and how much that is.  python3 zigzag.py"""
from pathlib import Path

INK, LIGHT, FILLS = "#333", "#f4f4f4", ("#4c9ad4", "#7cc48a", "#f2b56b", "#c79bd3")
RANKS, CELL, TOP = 4, 30, 84
CHUNKS = 2 * RANKS


def owner(chunk, zigzag):
    return min(chunk, CHUNKS - 1 - chunk) if zigzag else chunk // 2


def pairs(rank, zigzag):
    """In pairs of chunks; a diagonal counts half."""
    return sum(chunk + 0.5 for chunk in range(CHUNKS) if owner(chunk, zigzag) == rank)


def main():
    parts = []

    def text(x, y, words, size=12, anchor="start", extra=""):
        parts.append(f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" {extra}>{words}</text>')

    def rect(x, y, width, height, fill, extra=""):
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" {extra}/>')

    # The pairs of chunks, in the colour of the rank that computes them.
    left = 96
    text(left, 20, "Who computes which pairs", 14, extra='font-weight="bold"')
    text(left, 38, f"{RANKS} ranks, {CHUNKS} chunks, causal", 11, extra='fill="#666"')
    for chunk in range(CHUNKS):
        fill = FILLS[owner(chunk, True)]
        rect(left + chunk * CELL, TOP - 24, CELL - 2, 14, fill)
        text(left + (chunk + 0.5) * CELL - 1, TOP - 28, str(chunk), 11, "middle")
        rect(left - 24, TOP + chunk * CELL, 14, CELL - 2, fill)
        text(left - 30, TOP + (chunk + 0.5) * CELL + 3, f"rank {owner(chunk, True)}", 11, "end")
        for key in range(CHUNKS):
            x, y, side = left + key * CELL, TOP + chunk * CELL, CELL - 2
            rect(x, y, side, side, fill if key < chunk else LIGHT)
            if key == chunk:
                parts.append(f'<path d="M{x} {y} L{x + side} {y + side} L{x} {y + side} Z" fill="{fill}"/>')
    bottom = TOP + CHUNKS * CELL
    text(left + CHUNKS * CELL / 2, bottom + 18, "chunks of keys", 11, "middle", 'fill="#666"')
    text(0, 0, "chunks of queries", 11, "middle", f'fill="#666" transform="translate(20 {TOP + CHUNKS * CELL / 2}) rotate(-90)"')

    # How much that is for each rank.
    unit, bar = 15, 15
    for number, (zigzag, name) in enumerate(((True, "zigzag: r and 2W-1-r"), (False, "in a row: 2r and 2r+1"))):
        x, y = left + CHUNKS * CELL + 64, 20 + number * 166
        text(x, y, name, 14, extra='font-weight="bold"')
        most = max(pairs(rank, zigzag) for rank in range(RANKS))
        all_pairs = sum(pairs(rank, zigzag) for rank in range(RANKS))
        text(x, y + 18, f"pairs of chunks; the busiest rank has {100 * most / all_pairs:.0f}% of all", 11,
             extra='fill="#666"')
        for rank in range(RANKS):
            at = y + 32 + rank * (bar + 9)
            count = pairs(rank, zigzag)
            rect(x + 50, at, count * unit, bar, FILLS[rank])
            text(x + 44, at + 12, f"rank {rank}", 11, "end")
            text(x + 56 + count * unit, at + 12, f"{count:g}", 11)
    width, height = left + CHUNKS * CELL + 64 + 50 + 15 * unit + 40, bottom + 28
    Path(__file__).with_name("zigzag.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" fill="{INK}">\n<title>The zigzag: chunks, ranks and their work</title>\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")


if __name__ == "__main__":
    main()
