#!/usr/bin/env python3
"""Writes who_sees_whom.svg: the pairs of queries and keys that the steps of phase 4 compute.  python3 who_sees_whom.py"""
from pathlib import Path

INK, LIGHT, BLUES = "#333", "#f0f0f0", ("#9ecae9", "#f2b56b", "#7cc48a")
UNIT, SIDE, GAP, TOP = 9, 16, 48, 46


def packed(i, j):
    """Sequences of 5, 2 and 9 tokens."""
    begins = (0, 5, 7, 16)
    for number in range(3):
        if begins[number] <= i < begins[number + 1]:
            return number if begins[number] <= j <= i else None


def window(i, j):
    return 0 if i - 4 <= j <= i else None


def dropped(i, j):
    """A quarter of the pairs falls."""
    bits = (i * 0x9E3779B9 + j * 0x85EBCA6B) & 0xFFFFFFFF
    bits = ((bits ^ bits >> 15) * 0x2C1B3C6D) & 0xFFFFFFFF
    return 0 if j <= i and (bits ^ bits >> 13) % 100 >= 25 else None


def grouped(i, j):
    """Three groups of queries and their slices of keys."""
    for number, (q_begin, q_end, k_begin, k_end) in enumerate(((0, 5, 0, 6), (5, 10, 0, 12), (10, 16, 8, 16))):
        if q_begin <= i < q_end:
            return number if k_begin <= j < k_end and j - k_begin <= i - q_begin + (k_end - k_begin) - (q_end - q_begin) else None


PANELS = (
    ("4.01 varlen", "three sequences, one call", packed),
    ("4.03 dropout", "forward and backward alike", dropped),
    ("4.04 window", "outside nothing is read", window),
    ("4.05 grouped", "slices of one K and V", grouped),
)


def main():
    parts, side = [], SIDE * UNIT
    for number, (name, what, sees) in enumerate(PANELS):
        left = GAP / 2 + number * (side + GAP + 18)
        parts.append(f'<text x="{left}" y="18" font-size="14" font-weight="bold">{name}</text>')
        parts.append(f'<text x="{left}" y="35" font-size="10" fill="#666">{what}</text>')
        for i in range(SIDE):
            for j in range(SIDE):
                group = sees(i, j)
                fill = LIGHT if group is None else BLUES[group]
                parts.append(f'<rect x="{left + j * UNIT}" y="{TOP + i * UNIT}" width="{UNIT - 1}" height="{UNIT - 1}" fill="{fill}"/>')
        parts.append(f'<text x="{left + side / 2}" y="{TOP + side + 15}" font-size="11" text-anchor="middle" fill="#666">keys</text>')
        parts.append(f'<text transform="translate({left - 6} {TOP + side / 2}) rotate(-90)" font-size="11" text-anchor="middle" fill="#666">queries</text>')
    width, height = len(PANELS) * (side + GAP + 18), TOP + side + 26
    Path(__file__).with_name("who_sees_whom.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" fill="{INK}">\n<title>Which keys a query sees, in four steps of phase 4</title>\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")


if __name__ == "__main__":
    main()
