"""Plots as inline SVG text: no script, no network, colours from the page's CSS so that light, dark and print all read well.

Every function returns a string of SVG or HTML with all text escaped. Points that are not numbers are left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
MOST_POINTS = 300  # of a curve; more cannot be seen at these sizes and only makes the page heavy


def finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: float) -> str:
    """A number as an axis or a table shows it: 1.25, 0.0031, 12,400, 3e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        return f"{value:.3g}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside [low, high]: steps of 1, 2 or 5 times a power of ten, the largest up to a quarter over span / count."""
    rough = ((high - low) or abs(high) or 1.0) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (10, 5, 2, 1) if power * m <= 1.25 * rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    inside = [t for t in powers if low <= t <= high]
    finer = [t * m for t in powers for m in (1, 2, 5) if low <= t * m <= high]
    return inside if len(inside) >= 3 else finer if len(finer) >= 2 else [low, high]


class Axes:
    """A frame of 480 × 250 units with ticks on both axes; `x` and `y` place values in it."""

    WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 480, 262, 62, 14, 28, 40

    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        x_label: str,
        y_label: str,
        log_x: bool = False,
        log_y: bool = False,
        percent_y: bool = False,
    ):
        self.log_x, self.log_y = log_x, log_y
        self.x0, self.x1 = self._range(xs, log_x, 0.02)
        self.y0, self.y1 = self._range(ys, log_y, 0.06)
        self.labels, self.percent_y = (x_label, y_label), percent_y

    @staticmethod
    def _range(values: Sequence[float], log: bool, margin: float) -> tuple[float, float]:
        low, high = min(values), max(values)
        if log:
            spread = (high / low) ** margin if high > low else 1.5
            return low / spread, high * spread
        pad = (high - low) * margin or abs(high) * 0.1 or 1.0
        return low - pad, high + pad

    def x(self, value: float) -> float:
        return round(
            self.LEFT + self._share(value, self.x0, self.x1, self.log_x) * (self.WIDE - self.LEFT - self.RIGHT), 1
        )

    def y(self, value: float) -> float:
        return round(
            self.HIGH
            - self.BOTTOM
            - self._share(value, self.y0, self.y1, self.log_y) * (self.HIGH - self.TOP - self.BOTTOM),
            1,
        )

    @staticmethod
    def _share(value: float, low: float, high: float, log: bool) -> float:
        return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)

    def draw(self, body: str, title: str) -> str:
        right, bottom = self.WIDE - self.RIGHT, self.HIGH - self.BOTTOM
        parts = []
        for t in _log_ticks(self.y0, self.y1) if self.log_y else ticks(self.y0, self.y1, 4):
            text = f"{t:.{0 if self.y1 - self.y0 > 0.04 else 1}%}" if self.percent_y else number(t)
            parts.append(
                f'<line class="grid" x1="{self.LEFT}" x2="{right}" y1="{self.y(t)}" y2="{self.y(t)}"/>'
                f'<text x="{self.LEFT - 6}" y="{self.y(t) + 4}" text-anchor="end">{text}</text>'
            )
        for t in _log_ticks(self.x0, self.x1) if self.log_x else ticks(self.x0, self.x1, 5):
            parts.append(f'<text x="{self.x(t)}" y="{bottom + 17}" text-anchor="middle">{number(t)}</text>')
        parts.append(f'<line class="axis" x1="{self.LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(
            f'<text class="label" x="{(self.LEFT + right) / 2}" y="{self.HIGH - 5}" text-anchor="middle">{escape(self.labels[0])}</text>'
        )
        parts.append(f'<text class="label" x="4" y="15">{escape(self.labels[1])}</text>')
        return _svg(self.WIDE, self.HIGH, "".join(parts) + body, title)


def _svg(wide: float, high: float, body: str, title: str, attributes: str = "") -> str:
    return f'<svg viewBox="0 0 {wide} {high}" role="img" aria-label="{escape(title)}" {attributes}><title>{escape(title)}</title>{body}</svg>'


def lines(
    series: Mapping[str, Points], title: str, x_label: str, y_label: str, log_y: bool = False, percent_y: bool = False
) -> str:
    """Curves over a shared x axis with a legend below. series: name -> [(x, y), …]. "" when nothing can be drawn."""
    kept, lost = {}, 0
    for name, points in series.items():
        good = [(x, y) for x, y in points if finite(x) and finite(y) and (y > 0 or not log_y)]
        lost += len(points) - len(good)
        if good:
            kept[name] = _thin(good)
    if not kept:
        return ""
    axes = Axes(
        [x for p in kept.values() for x, _ in p],
        [y for p in kept.values() for _, y in p],
        x_label,
        y_label,
        log_y=log_y,
        percent_y=percent_y,
    )
    body = ""
    for i, points in enumerate(kept.values()):
        colour = f"c{i % 6 + 1}"
        if len(points) > 1:
            body += (
                f'<polyline class="curve {colour}" points="{" ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in points)}"/>'
            )
        if len(points) <= 40:
            body += "".join(
                f'<circle class="dot {colour}" cx="{axes.x(x)}" cy="{axes.y(y)}" r="2.6"/>' for x, y in points
            )
    note = f"{lost} point{'s' if lost > 1 else ''} not a number, left out" if lost else ""
    return figure(axes.draw(body, title), title, legend(kept) if len(kept) > 1 else "", note)


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points that keep every peak: the lowest and highest of each bucket, in order."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS / 2))
    kept = []
    for i in range(0, len(points), size):
        bucket = points[i : i + size]
        pair = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept += sorted(pair)
    return kept


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    title: str,
    x_label: str,
    marker: float | None = None,
    marker_label: str = "",
) -> str:
    """Bars over `edges` (one more than counts), with a dashed line at `marker`."""
    if not counts or sum(counts) == 0 or len(edges) != len(counts) + 1:
        return ""
    xs = [*edges, *([marker] if finite(marker) else [])]
    axes = Axes(xs, [0, max(counts)], x_label, "rows")
    axes.y0 = 0
    body = "".join(
        f'<rect class="bar c1" x="{axes.x(a)}" y="{axes.y(n)}" width="{max(axes.x(b) - axes.x(a) - 1, 0.5):.1f}" '
        f'height="{max(axes.y(0) - axes.y(n), 0):.1f}"/>'
        for a, b, n in zip(edges, edges[1:], counts, strict=False)
    )
    if finite(marker):
        body += (
            f'<line class="marker" x1="{axes.x(marker)}" x2="{axes.x(marker)}" y1="{axes.TOP}" y2="{axes.y(0)}"/>'
            f'<text x="{axes.x(marker) - 5}" y="{axes.TOP + 10}" text-anchor="end">{escape(marker_label)}</text>'
        )
    return figure(axes.draw(body, title), title)


def scatter(
    points: Sequence[tuple[float, float, str]],
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    percent_y: bool = False,
) -> str:
    """Labelled points: (x, y, label)."""
    good = [(x, y, label) for x, y, label in points if finite(x) and finite(y) and (y > 0 or not log_y)]
    if not good:
        return ""
    axes = Axes([p[0] for p in good], [p[1] for p in good], x_label, y_label, log_y=log_y, percent_y=percent_y)
    pad = (axes.x1 - axes.x0) * 0.08
    axes.x0, axes.x1 = axes.x0 - pad, axes.x1 + pad
    body, taken = "", []
    for x, y, label in sorted(good, key=lambda p: -axes.y(p[1])):
        cx, cy = axes.x(x), axes.y(y)
        left = cx > axes.WIDE * 0.72
        level = cy + 4
        while any(abs(level - t) < 13 and abs(cx - tx) < 90 for tx, t in taken):
            level -= 13
        taken.append((cx, level))
        body += (
            f'<circle class="dot c1" cx="{cx}" cy="{cy}" r="4.5"/><text x="{cx + (-8 if left else 8)}" y="{level}" '
            f'text-anchor="{"end" if left else "start"}">{escape(label)}</text>'
        )
    return figure(axes.draw(body, title), title)


def interval(
    value: float | None,
    low: float | None,
    high: float | None,
    floor: float = 0.0,
    ceiling: float = 1.0,
    zero: bool = False,
) -> str:
    """A bar with its 95 % interval on a fixed scale, for a table cell: no text, stretches with the cell."""
    if not finite(value) or ceiling <= floor:
        return ""

    def at(v: float) -> float:
        return round(100 * (min(max(v, floor), ceiling) - floor) / (ceiling - floor), 2)

    origin = at(0.0) if zero else 0.0
    a, b = sorted((origin, at(value)))
    kind = " bad" if zero and value < 0 else ""
    body = f'<rect class="track" x="0" y="4" width="100" height="12"/><rect class="fill{kind}" x="{a}" y="4" width="{round(b - a, 2)}" height="12"/>'
    if finite(low) and finite(high):
        body += f'<rect class="whisker" x="{at(low)}" y="9" width="{round(at(high) - at(low), 2)}" height="2"/>'
        body += "".join(
            f'<rect class="whisker" x="{round(at(v) - 0.25, 2)}" y="5" width="0.5" height="10"/>' for v in (low, high)
        )
    if zero:
        body += f'<rect class="whisker" x="{round(origin - 0.15, 2)}" y="1" width="0.3" height="18"/>'
    return f'<svg class="interval" viewBox="0 0 100 20" preserveAspectRatio="none" aria-hidden="true">{body}</svg>'


def parallel(
    dimensions: Sequence[str], rows: Sequence[tuple[str, Sequence[object]]], title: str, shares: Sequence[str] = ()
) -> str:
    """Parallel coordinates: one vertical axis a dimension, one line a run, coloured by its place on the last axis.

    Values are numbers or words; words get places in sorted order. A missing value (None) breaks the line. shares: dimensions
    shown as percentages. Each line carries its run's name at its right end.
    """
    if len(rows) < 2 or len(dimensions) < 2:
        return ""
    high, top, bottom, right = 340, 46, 24, 130
    first = _scale([r[1][0] for r in rows if r[1][0] is not None], top, high - bottom, percent=dimensions[0] in shares)[
        1
    ]
    left = max(50, 14 + 7 * max((len(text) for _, text in first), default=0))  # room for the first axis's labels
    wide = left + right + 130 * (len(dimensions) - 1)
    step = (wide - left - right) / (len(dimensions) - 1)
    places, axes = [], ""
    for d, name in enumerate(dimensions):
        x = round(left + d * step, 1)
        place, marks = _scale(
            [r[1][d] for r in rows if r[1][d] is not None], top, high - bottom, percent=name in shares
        )
        places.append(place)
        words = _wrap(name, 16)
        axes += "".join(
            f'<text class="label" x="{x}" y="{top - 12 - 13 * (len(words) - 1 - i)}" text-anchor="middle">{escape(w)}</text>'
            for i, w in enumerate(words)
        )
        axes += f'<line class="axis" x1="{x}" x2="{x}" y1="{top}" y2="{high - bottom}"/>'
        axes += "".join(
            f'<text class="halo" x="{x - 5}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
            for y, text in marks
        )
    curves, ends = "", []
    for name, values in sorted(rows, key=lambda r: -(places[-1](r[1][-1]) if r[1][-1] is not None else 0)):
        points = [
            (round(left + d * step, 1), round(places[d](v), 1)) if v is not None else None for d, v in enumerate(values)
        ]
        share = 0.5 if points[-1] is None else 1 - (points[-1][1] - top) / (high - bottom - top)
        path, pen = "", "M"
        for point in points:
            path, pen = (path, "M") if point is None else (f"{path}{pen}{point[0]} {point[1]}", "L")
        style = f"stroke:color-mix(in oklab, var(--good) {round(100 * share)}%, var(--c2))"
        curves += (
            f'<path class="curve run" style="{style}" d="{path}" tabindex="0"><title>{escape(name)}</title></path>'
        )
        if points[-1]:
            ends.append((points[-1][1], name))
    level, labels = -99.0, ""
    for y, name in sorted(ends):
        level = max(y, level + 13)
        labels += f'<text class="halo" x="{wide - right + 8}" y="{level + 4:.1f}">{escape(name[:22])}</text>'
    svg = _svg(
        wide,
        high + max(0, round(level) - high + 10),
        curves + axes + labels,
        title,
        f'class="sweep" style="min-width:{min(wide, 900)}px;max-width:{wide * 1.2:.0f}px"',
    )
    return f'<figure class="wide"><div class="scroll">{svg}</div><figcaption>{escape(title)}</figcaption></figure>'


def _scale(values: Sequence[object], top: float, bottom: float, percent: bool = False):
    """(place: value -> y, [(y, text), …]) of one axis."""
    if values and all(finite(v) for v in values):
        low, high = min(values), max(values)
        log = low > 0 and high / low > 50

        def share(v):
            return 0.5 if high == low else math.log(v / low) / math.log(high / low) if log else (v - low) / (high - low)

        marks = [low] if high == low else [low, math.sqrt(low * high) if log else (low + high) / 2, high]
        return lambda v: bottom - share(v) * (bottom - top), [
            (bottom - share(m) * (bottom - top), f"{m:.1%}" if percent else number(float(f"{m:.3g}"))) for m in marks
        ]
    words = sorted({str(v) for v in values})
    places = {w: bottom - (i + 0.5) / max(len(words), 1) * (bottom - top) for i, w in enumerate(words)}
    return lambda v: places[str(v)], [(y, w[:18]) for w, y in places.items()]


def _wrap(text: str, width: int) -> list[str]:
    rows = [""]
    for word in text.replace("_", " ").split():
        if rows[-1] and len(rows[-1]) + len(word) >= width:
            rows.append("")
        rows[-1] = f"{rows[-1]} {word}".strip()
    return rows[-3:]


def legend(names: Sequence[str] | Mapping[str, object]) -> str:
    return (
        '<div class="legend">'
        + "".join(f'<span><i class="c{i % 6 + 1}"></i>{escape(n)}</span>' for i, n in enumerate(names))
        + "</div>"
    )


def figure(svg: str, title: str, below: str = "", note: str = "") -> str:
    note = f' <span class="muted">({escape(note)})</span>' if note else ""
    return f"<figure>{svg}{below}<figcaption>{escape(title)}{note}</figcaption></figure>"
