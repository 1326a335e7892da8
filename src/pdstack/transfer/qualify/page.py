"""The result as one HTML page without anything from outside: heat map, curves, verdicts, surroundings."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from math import log2
from typing import Any

from pdstack.transfer.qualify.result import size_text

_COLOURS = {"shared": "#0b6e4f", "cma": "#1f77b4", "stream": "#9467bd", "ucx": "#d62728", "nixl": "#ff7f0e"}
_LIMIT_COLOURS = {"memcpy": "#333333", "socket": "#888888"}
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 320, 60, 20, 40
_STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.3em .7em;border:1px solid #ccc;text-align:left;"
    "font-variant-numeric:tabular-nums}pre{background:#f4f4f4;padding:1em;overflow-x:auto}.bad{color:#b00020}"
)
Curves = Mapping[str, Sequence[tuple[int, float]]]


def page(result: Mapping[str, Any], lines: Sequence[str], regressions: Sequence[str]) -> str:
    """`result` is the JSON document, `lines` the table and the problems as they were printed."""
    pairs = result["pairs"]
    failed = sum(bool(pair["problems"]) for pair in pairs)
    verdict = f'<p class="bad">{failed} of {len(pairs)} pairs do not hold.</p>' if failed else "<p>All pairs hold.</p>"
    measured, wanted = result["measured"], " or ".join(result["demand"]["want"]) or "any"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>KV path, {escape(result['date'])}</title><style>{_STYLE}</style></head><body>",
        f"<h1>KV path between prefill and decode</h1><p>{escape(result['date'])}, {len(pairs)} pairs, "
        f"{size_text(measured['nbytes'])} a read, {measured['rounds']} rounds; "
        f"path {escape(result['demand']['path'])}, "
        f"floor {escape(str(result['demand']['floor']))}, wanted transport {escape(wanted)}</p>",
        verdict,
        "<h2>Pairs</h2><p>Transport of the path that is used, and its smallest ratio to the limit over all block "
        "sizes. Green is the limit, red nothing.</p>",
        heat_map(pairs),
        "<h2>Block sizes</h2><p>GB/s, the median over all pairs of each pair's median; dashed are the limits of the "
        "same rounds.</p>",
        chart(*curves(pairs)),
    ]
    if regressions:
        items = "".join(f"<li>{escape(line)}</li>" for line in regressions)
        parts.append(f'<h2>Worse than before</h2><ul class="bad">{items}</ul>')
    versions = "".join(f"<tr><th>{escape(n)}</th><td>{escape(v)}</td></tr>" for n, v in result["versions"].items())
    text = escape("\n".join(lines))
    parts += [f"<h2>Figures</h2><pre>{text}</pre>", f"<h2>Versions</h2><table>{versions}</table></body></html>\n"]
    return "".join(parts)


def heat_map(pairs: Sequence[Mapping[str, Any]]) -> str:
    """A table: a row for each prefill, a column for each decode."""
    cells = {(pair["prefill"], pair["decode"]): pair for pair in pairs}
    prefills, decodes = (list(dict.fromkeys(pair[role] for pair in pairs)) for role in ("prefill", "decode"))
    head = "".join(f"<th>{escape(name)}</th>" for name in decodes)
    rows = []
    for prefill in prefills:
        row = "".join(_cell(cells[prefill, decode]) for decode in decodes)
        rows.append(f"<tr><th>{escape(prefill)}</th>{row}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _cell(pair: Mapping[str, Any]) -> str:
    ratio = pair["worst_ratio"]
    if ratio is None:
        return '<td style="background:#b00020;color:white">no path</td>'
    mark = " ✗" if pair["problems"] else ""
    hue = 120 * min(1.0, max(0.0, ratio))
    return f'<td style="background:hsl({hue:.0f} 65% 75%)">{escape(pair["transport"])} {ratio:.2f}{mark}</td>'


def curves(pairs: Sequence[Mapping[str, Any]]) -> tuple[Curves, Curves]:
    """For each path, and for each limit, (block bytes, GB/s) points in order of size."""
    found: dict[str, dict[int, list[float]]] = {}
    limits: dict[str, dict[int, list[float]]] = {}
    for size, path in ((size, one["path"]) for pair in pairs for one in pair["paths"] for size in one["sizes"]):
        found.setdefault(path, {}).setdefault(size["block_bytes"], []).append(size["gbps"]["median"])
        for name, spread in size["limits"].items():
            limits.setdefault(name, {}).setdefault(size["block_bytes"], []).append(spread["median"])

    def lines(points: Mapping[str, Mapping[int, Sequence[float]]]) -> Curves:
        return {
            name: [(size, statistics.median(values)) for size, values in sorted(sizes.items())]
            for name, sizes in points.items()
        }

    return lines(found), lines(limits)


def chart(paths: Curves, limits: Curves) -> str:
    """An SVG of throughput over block size."""
    points = [point for lines in (paths, limits) for line in lines.values() for point in line]
    if not points:
        return "<p>Nothing was measured.</p>"
    sizes = sorted({size for size, _ in points})
    top = 1.05 * max(value for _, value in points)
    low, high = log2(sizes[0]), max(log2(sizes[-1]), log2(sizes[0]) + 1)

    def place(size: int, value: float) -> tuple[float, float]:
        x = _LEFT + (log2(size) - low) / (high - low) * (_WIDTH - _LEFT - 30)
        return x, _TOP + (1 - value / top) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH + 140} {_HEIGHT}" role="img" font-family="sans-serif" font-size="11">']
    for step in range(5):
        x, y = place(sizes[0], top * step / 5)
        parts.append(f'<line x1="{x:.1f}" x2="{_WIDTH - 30}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{top * step / 5:.1f}</text>')
    for size in sizes:
        x, _ = place(size, 0)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{size_text(size)}</text>')
    row = 0
    for lines, colours, dash in ((paths, _COLOURS, ""), (limits, _LIMIT_COLOURS, ' stroke-dasharray="6 4"')):
        for name, line in lines.items():
            colour = colours.get(name, "#666666")
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
            for x, y in (place(*point) for point in line):
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            parts.append(f'<rect x="{_WIDTH}" y="{_TOP + 16 * row}" width="10" height="10" fill="{colour}"/>')
            parts.append(f'<text x="{_WIDTH + 16}" y="{_TOP + 16 * row + 9}">{escape(name)}</text>')
            row += 1
    return "".join([*parts, "</svg>"])
