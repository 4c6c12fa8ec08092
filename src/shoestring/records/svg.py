"""Line charts as SVG text, for pages that need nothing from anywhere else."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise

WIDTH, HEIGHT = 380, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 24
_FLAT = 1e-9  # of the values: what a chart takes for no height
COLOURS = ("#3b6fd4", "#d9822b", "#2e9e6b", "#b0479f", "#7a7f87")

Points = Sequence[tuple[float, float]]


def line_chart(
    series: Mapping[str, Points],
    *,
    unit: str = "",
    intervals: Sequence[tuple[float, float, float]] = (),
    faint: str = "",
) -> str:
    """Lines over steps, from 0 where nothing lies below it; a legend where there are several. `intervals` are (x, low,
    high); `faint` is the name of a line that stands back.

    A value that is not finite is a gap in its line.
    """
    seen = [point for points in series.values() for point in points if math.isfinite(point[1])]
    xs = [x for x, _ in seen] or [0.0]
    ys = [y for _, y in seen] + [y for _, *ends in intervals for y in ends] or [0.0]
    bottom, top = min([0.0, *ys] if max(ys) >= 0 else ys), max(ys)
    size = max(1.0, abs(bottom), abs(top))
    lines = ticks(bottom, top if top - bottom > _FLAT * size else bottom + size)
    low, high, first, last = lines[0], lines[-1], min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (y - low) / (high - low)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for value in lines:
        _, y = place(first, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{_short(value)}{unit}</text>')
    for x, anchor in ((first, "start"), (last, "end")) if last > first else ((first, "middle"),):
        at, _ = place(x, low)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{_short(x)}</text>')
    for x, below, above in intervals:
        (at, y1), (_, y2) = place(x, below), place(x, above)
        parts.append(f'<line class="interval" x1="{at:.1f}" x2="{at:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>')
    for (name, points), colour in zip(series.items(), cycle(COLOURS), strict=False):
        for run in _unbroken(points):
            way = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in run)
            look = f'stroke="{colour}"' + (' class="faint"' if name == faint else "")
            parts.append(f'<polyline points="{way}" {look}><title>{html.escape(name)}</title></polyline>')
            if len(run) == 1 or intervals:
                parts += ['<circle cx="{:.1f}" cy="{:.1f}" r="2.5" fill="{}"/>'.format(*place(*p), colour) for p in run]
    parts.append("</svg>")
    if len(series) > 1:
        keys = zip(series, cycle(COLOURS), strict=False)
        parts.append("".join(f'<span class="key" style="color:{c}">{html.escape(name)}</span>' for name, c in keys))
    return "".join(parts)


def ticks(low: float, high: float) -> list[float]:
    """Up to eight round values that hold all from `low` to `high`.

    >>> ticks(0, 0.87)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> ticks(-3, 12)
    [-5.0, 0.0, 5.0, 10.0, 15.0]
    """
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power >= rough * 0.999)
    return [float(f"{step * i:.12g}") for i in range(math.floor(low / step), math.ceil(high / step - 1e-9) + 1)]


def _unbroken(points: Points) -> list[list[tuple[float, float]]]:
    """The stretches of points between values that are not finite."""
    gaps = [-1, *(i for i, (_, y) in enumerate(points) if not math.isfinite(y)), len(points)]
    return [list(points[a + 1 : b]) for a, b in pairwise(gaps) if b > a + 1]


def _short(value: float) -> str:
    """The number in few letters.

    >>> [_short(x) for x in (0.25, 1500.0, 2_000_000.0, 0.0)]
    ['0.25', '1.5k', '2M', '0']
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
