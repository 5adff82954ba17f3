"""Line charts as inline SVG: axes, round ticks, lines, dots with their values.

The colours are CSS variables of the page, so a chart follows its light and dark
theme.  The drawing is 440 units wide, so that 12-unit letters stay readable on
a telephone; wide pages put charts side by side instead of stretching them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 232
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 26, 36
MAX_POINTS = 400
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart.

    Args:
        points: (x, y), x ascending; points that are not finite are left out.
        style: the CSS class: ``s1``, ``s2`` or ``faint``.
        has_dots: each point is drawn and tells its value under the pointer.
    """

    name: str
    points: Sequence[Point]
    style: str = "s1"
    has_dots: bool = False


def draw_lines(
    series: Sequence[Series], *, x_label: str, y_label: str, mark: tuple[float, str] | None = None
) -> Markup | None:
    """A chart of several lines, or None when there is no point to draw.

    Args:
        mark: an x with a word, drawn as a dashed upright line.
    """
    kept = [(line, _thin(line.points)) for line in series]
    kept = [(line, points) for line, points in kept if points]
    if not kept:
        return None
    xs = [x for _, points in kept for x, _ in points]
    ys = [y for _, points in kept for _, y in points]
    x_ticks, y_ticks = pick_ticks(min(xs), max(xs)), pick_ticks(min(ys), max(ys))
    area = _Area(min(xs), max(xs), min(*ys, y_ticks[0]), max(*ys, y_ticks[-1]))
    named = f"{y_label} over {x_label}: " + ", ".join(line.name for line, _ in kept)
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    parts = [f'<svg class="chart" {box} role="img" aria-label="{escape(named)}">']
    parts += [area.draw_y_tick(y) for y in y_ticks]
    parts += [area.draw_x_tick(x) for x in x_ticks if min(xs) <= x <= max(xs)]
    parts.append(_draw_names(x_label, y_label))
    if mark and min(xs) <= mark[0] <= max(xs):
        parts.append(area.draw_mark(*mark))
    parts += [area.draw_series(line, points) for line, points in kept]
    parts.append(_draw_legend([line for line, _ in kept if line.name]))
    return Markup("".join(parts) + "</svg>")  # noqa: S704  (every text in it is escaped)


def pick_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover a range.

    >>> pick_ticks(0.0, 9.3), pick_ticks(3, 3)
    ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [3.0, 4.0])
    """
    span = high - low or max(1.0, abs(low) * 0.2)
    rough = span / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.8)
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    if low == high:
        return [float(low), float(low + span)]
    return [round(float(k * step), 12) for k in range(first, last + 1)]


def smooth(points: Sequence[Point], weight: float = 0.8) -> list[Point]:
    """An exponential mean of noisy values, corrected for its start.

    >>> smooth([(1, 2.0), (2, 2.0)])
    [(1, 2.0), (2, 2.0)]
    """
    mean, total, result = 0.0, 0.0, []
    for x, y in points:
        mean, total = weight * mean + (1 - weight) * y, weight * total + 1 - weight
        result.append((x, round(mean / total, 10)))
    return result


def to_short(value: float) -> str:
    """A tick's number in few letters.

    >>> to_short(0.0002), to_short(1500.0), to_short(2.5), to_short(0)
    ('2e-4', '1,500', '2.5', '0')
    """
    if value == 0:
        return "0"
    if abs(value) < 0.001:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class _Area:
    """The plane of a chart: from values to units of the drawing."""

    x0: float
    x1: float
    y0: float
    y1: float

    def to_x(self, x: float) -> float:
        share = (x - self.x0) / (self.x1 - self.x0) if self.x1 > self.x0 else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def to_y(self, y: float) -> float:
        share = (y - self.y0) / (self.y1 - self.y0) if self.y1 > self.y0 else 0.5
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def draw_y_tick(self, y: float) -> str:
        at = self.to_y(y)
        return (
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{to_short(y)}</text>'
        )

    def draw_x_tick(self, x: float) -> str:
        at = self.to_x(x)
        return (
            f'<text class="tick" x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
            f"{to_short(x)}</text>"
        )

    def draw_mark(self, x: float, word: str) -> str:
        at = self.to_x(x)
        side = "end" if at > WIDTH / 2 else "start"
        gap = -4 if side == "end" else 4
        return (
            f'<line class="mark" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="tick" x="{at + gap}" y="{TOP + 10}" text-anchor="{side}">'
            f"{escape(word)}</text>"
        )

    def draw_series(self, line: Series, points: Sequence[Point]) -> str:
        places = [(self.to_x(x), self.to_y(y)) for x, y in points]
        path = " ".join(f"{x},{y}" for x, y in places)
        drawn = f'<polyline class="line {line.style}" points="{path}"/>'
        if line.has_dots or len(points) == 1:
            for (x, y), (value_x, value_y) in zip(places, points, strict=True):
                title = f"{line.name} at {value_x:g}: {value_y:.4g}"
                drawn += (
                    f'<circle class="dot {line.style}" cx="{x}" cy="{y}" r="3.2">'
                    f"<title>{escape(title)}</title></circle>"
                )
        return drawn


def _draw_names(x_label: str, y_label: str) -> str:
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<text class="name" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">'
        f'{escape(x_label)}</text><text class="name" x="4" y="14">{escape(y_label)}</text>'
    )


def _draw_legend(lines: Sequence[Series]) -> str:
    """Names in the upper right corner, the last at the margin; one line needs none."""
    if len(lines) < 2:
        return ""
    parts, right = [], WIDTH - RIGHT
    for line in reversed(lines):
        name = escape(line.name)
        parts.append(f'<text class="tick" x="{right}" y="14" text-anchor="end">{name}</text>')
        right -= 7 * len(line.name) + 6
        parts.append(
            f'<line class="line {line.style}" x1="{right - 14}" x2="{right}" y1="10" y2="10"/>'
        )
        right -= 26
    return "".join(parts)


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most 400 finite points, the first and the last among them."""
    kept = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if len(kept) <= MAX_POINTS:
        return kept
    stride = (len(kept) - 1) / (MAX_POINTS - 1)
    return [kept[round(i * stride)] for i in range(MAX_POINTS)]
