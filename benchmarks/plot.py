"""One picture without anything from outside: lines over block sizes, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import log2

_COLOURS = (
    "#0b6e4f",
    "#1f77b4",
    "#d62728",
    "#9467bd",
    "#ff7f0e",
    "#7f7f7f",
    "#17becf",
    "#8c564b",
    "#bcbd22",
    "#e377c2",
)
_WIDTH, _HEIGHT, _LEFT, _TOP, _LEGEND = 640, 340, 60, 40, 190


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def chart(title: str, unit: str, lines: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """An SVG of `lines`: name -> (block bytes, ratio to the limit) points. The dashed line is the limit itself."""
    points = [point for line in lines.values() for point in line]
    sizes = sorted({size for size, _ in points})
    top = max([1.1, *(value * 1.05 for _, value in points)])
    low, high = log2(sizes[0]), max(log2(sizes[-1]), log2(sizes[0]) + 1)

    def place(size: int, value: float) -> tuple[float, float]:
        x = _LEFT + (log2(size) - low) / (high - low) * (_WIDTH - _LEFT - 20)
        return x, _TOP + (1 - value / top) * (_HEIGHT - _TOP - 40)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH + _LEGEND} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{escape(title)}</text>',
        f'<text x="{_LEFT}" y="34" fill="#555">{escape(unit)}</text>',
    ]
    for step in range(int(top / 0.25) + 1):
        x, y = place(sizes[0], step * 0.25)
        dash = ' stroke-dasharray="5 3"' if step == 4 else ""
        colour = "#333" if step == 4 else "#ddd"
        parts.append(f'<line x1="{x}" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"{dash}/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{step * 0.25:g}</text>')
    for size in sizes:
        x, y = place(size, 0)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{_size(size)}</text>')
    for index, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in sorted(line)))
        y = _TOP + 14 * index
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<rect x="{_WIDTH}" y="{y}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{_WIDTH + 16}" y="{y + 9}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def page(title: str, text: str, charts: Sequence[str]) -> str:
    """A self-contained HTML page: the charts and, below them, `text` as it was printed."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><h1>{escape(title)}</h1>'
        + "".join(f"<p>{chart}</p>" for chart in charts)
        + f"<pre>{escape(text)}</pre></html>\n"
    )
