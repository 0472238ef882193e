"""Every figure: drawn by matplotlib from plain numbers, the same one in a notebook and in a report.

A function returns a matplotlib figure that a notebook cell can end with, that `display.save` writes as PNG, and
that `svg` turns into text for a page, where its ink takes the page's colour. `figure.alt` says in words what is to be
seen. The figures are made without pyplot: nothing is shown twice and none has to be closed.
"""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helpers import display

# Each at least 4.5:1 on white (and, as `svg` lightens it, on a dark page), and distinguishable by every colour vision.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2f6fd0", "#b0590c", "#1c7f57", "#c83a50", "#8a5cc7", "#6b7079"
PALETTE = (GREEN, BLUE, ORANGE, PURPLE, RED, "#147d8e", "#8d6413", "#b24c8a")
BASE, TRAINED, FILE, HELD_OUT = GREY, GREEN, BLUE, ORANGE  # what a colour means, in every figure and on every page
INK = "#1b1f27"  # text and axes; `svg` makes it the colour of the text around
MOST_POINTS = 400  # of a curve; more cannot be seen at these sizes

Lines = Sequence[Mapping[str, Any]]


def label(text: object) -> str:
    """Foreign text as matplotlib may draw it: not endless, hidden characters visible, no `$` that begins a formula."""
    return display.clean(str(text)[:80]).replace("$", r"\$")


def svg(figure: Any) -> str:
    """A figure as an <svg> element for a page: text stays text, ink is the page's colour, the alt text its label."""
    import matplotlib

    buffer = io.StringIO()
    figure.set_layout_engine("none")  # one panel needs no layout, which takes half of the time
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of signs that matplotlib's own font lacks: here the page's fonts draw them
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata=nothing)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    for colour in (*PALETTE, GREY):  # a third of the way to white on a dark page
        light = "".join(f"{(2 * int(colour[i : i + 2], 16) + 255) // 3:02x}" for i in (1, 3, 5))
        drawn = drawn.replace(colour, f"light-dark({colour}, #{light})")
    used = set(re.findall(r"#(\w+)", drawn))
    drawn = re.sub(r' id="(\w+)"', lambda found: found[0] if found[1] in used else "", drawn)
    return drawn.replace("<svg", f'<svg role="img" aria-label="{display.escape(figure.alt)}"', 1)


def inline(figure: Any) -> display.Html:
    """A figure as an image within HTML that a cell shows, as wide as there is room for."""
    data = base64.b64encode(display.png(figure)).decode()
    style, alt = "width:100%;max-width:62em;min-width:32em;height:auto", display.escape(figure.alt)
    image = f"<img alt='{alt}' style='{style}' src='data:image/png;base64,{data}'>"
    return display.Html(f"<div style='overflow-x:auto'>{image}</div>")


def bar(share: float, said: str) -> display.Html:
    """A bar that is full to a share, for a cell. said: what a screen reader says of it."""
    full = f"{100 * min(max(share, 0), 1):.1f}"
    style = f"height:.6em;border-radius:.3em;background:linear-gradient(90deg,{TRAINED} {full}%,#8884 {full}%)"
    role = f"role='progressbar' aria-valuemin='0' aria-valuemax='100' aria-valuenow='{full}'"
    return display.Html(f"<div {role} aria-label='{display.escape(said)}' style='{style}'></div>")


def _figure(
    alt: str, rows: int = 1, columns: int = 1, width: float = 4.6, height: float = 3.0
) -> tuple[Any, list[Any]]:
    """A figure of rows x columns panels of one size, in inches, and its panels in reading order."""
    import matplotlib
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context(dict.fromkeys(inked, INK) | {"font.size": 9, "axes.titlesize": 10}):
        figure: Any = Figure(figsize=(width * columns, height * rows), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.grid(alpha=0.25, color=GREY)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.alt = alt
    figure._repr_mimebundle_ = lambda include=None, exclude=None: (
        {"image/png": display.png(figure), "text/plain": alt},
        {"image/png": {"alt": alt}},
    )
    return figure, panels


def _legend(panel: Any, above: int = 0) -> None:
    """The names of what a panel shows, inside it, or in `above` columns above it."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": above} if above else {}
    panel.legend(frameon=False, fontsize=8, labelcolor=INK, **place)


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Curve:
    """One panel of a training log: the key as it was logged each step and, with `eval_` before it, on held-out rows.

    floor: the lower end of the axis; None leaves it to the values."""

    title: str
    unit: str
    smooth: bool = False
    floor: float | None = 0


CURVES = {
    "loss": Curve("Loss", "nats a token", smooth=True),
    "learning_rate": Curve("Learning rate", ""),
    "grad_norm": Curve("Gradient norm", "", floor=None),
    "tokens_per_s": Curve("Speed", "tokens a second"),
    "memory_gb": Curve("Memory", "GB"),
    "log_odds_chosen": Curve("Log odds, chosen over rejected", "nats", smooth=True, floor=None),
    "rewards/margins": Curve("Margin", "beta × log-probability", smooth=True, floor=None),
    "rewards/accuracies": Curve("Pairs with the chosen answer ahead", "share", smooth=True),
    "nll_loss": Curve("Negative log-likelihood", "nats a token", smooth=True),
}


def series(lines: Lines, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one logged number; lines without it, or where it is not a number, are skipped."""
    found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
    return [s for s, _ in found], [v for _, v in found]


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean, corrected for its start (as Adam's): the first point is the first value."""
    out, mean = [], 0.0
    for step, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**step))
    return out


def training_curves(lines: Lines, title: str = "") -> Any:
    """Loss (each step, smoothed, held out), learning rate, gradient norm and speed of a log.jsonl's lines."""
    return curves({"": lines}, ("loss", "learning_rate", "grad_norm", "tokens_per_s"), title, columns=2)


def preference_curves(lines: Lines, title: str = "") -> Any:
    """Log odds, margin and accuracy, each step and on held-out pairs."""
    return curves({"": lines}, ("log_odds_chosen", "rewards/margins", "rewards/accuracies"), title, columns=3)


def curves(logs: Mapping[str, Lines], names: Sequence[str], title: str = "", columns: int = 1) -> Any:
    """A panel for each of `names` (keys of CURVES). logs: one run's, or several runs' by their names."""
    said = []
    for name, run in ((name, run) for name in names for run in logs):
        numbers = [v for v in series(logs[run], name)[1] if math.isfinite(v)]
        trend = f"from {display.number(numbers[0])} to {display.number(numbers[-1])}" if numbers else "not logged"
        said.append(f"{run} {CURVES[name].title.lower()} {trend}")
    width = 4.6 if columns < 3 else 3.5
    alt = f"{title or 'Curves'} by step: {', '.join(said)}"
    figure, panels = _figure(alt, -(-len(names) // columns), columns, width)
    figure.suptitle(label(title), fontsize=11, color=INK)
    for panel, name in zip(panels, names, strict=True):
        curve = CURVES[name]
        for number, (run, lines) in enumerate(logs.items()):
            colour = PALETTE[number % len(PALETTE)]
            (steps, values), held_out = series(lines, name), series(lines, f"eval_{name}")
            if len(logs) == 1:
                faint = 0.35 if curve.smooth else 1
                panel.plot(*_thinned(steps, values), color=colour, alpha=faint, linewidth=1, label="each step")
            if curve.smooth:
                points = {"marker": "o", "markersize": 4, "linestyle": "--" if run else "-"}
                panel.plot(*_thinned(steps, smoothed(values)), color=colour, label=label(run) or "smoothed")
                panel.plot(*held_out, color=colour if run else HELD_OUT, label="" if run else "held out", **points)
                _legend(panel)
            if values or held_out[1]:
                panel.set_ylim(bottom=curve.floor)
        ends = [line.get("of_steps", line["step"]) for lines in logs.values() for line in lines[-1:]]  # as known last
        last = max([*ends, *(line["step"] for lines in logs.values() for line in lines)], default=0)
        if last > 1:
            panel.set_xlim(0, last)
        panel.set(title=curve.title, xlabel="step", ylabel=curve.unit)
        panel.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most MOST_POINTS points that keep every peak: the lowest and the highest of each bucket, in order."""
    points = list(zip(steps, values, strict=True))
    if len(points) > MOST_POINTS:
        bucket = math.ceil(len(points) / (MOST_POINTS / 2))
        chunks = [points[i : i + bucket] for i in range(0, len(points), bucket)]
        points = [p for c in chunks for p in sorted({min(c, key=lambda p: p[1]), max(c, key=lambda p: p[1])})]
    return [s for s, _ in points], [v for _, v in points]


# ---------------------------------------------------------------- data and exported files


def lengths(histogram: Mapping[int, int], max_length: int, over: int, proposed: int | None) -> Any:
    """Rows by their length in tokens. histogram: length → rows; over: rows over max_length; proposed: length to use."""
    values = {int(length): count for length, count in histogram.items()}
    top = max([*values, 1])
    alt = f"Row lengths in tokens: {sum(values.values()):,} rows up to {top:,}; max_length {max_length:,}"
    figure, (panel,) = _figure(alt, width=5.6)
    panel.hist(list(values), bins=60, range=(0, top), weights=list(values.values()), color=BLUE)
    panel.axvline(max_length, color=RED, label=f"max_length {max_length:,}: {over:,} rows over")
    if proposed:
        panel.axvline(proposed, color=PURPLE, linestyle="--", label=f"proposed {proposed:,} (99 % of rows whole)")
    panel.set_xlim(0, max(top, min(max_length, 2 * top)) * 1.03)
    panel.set(xlabel="tokens in a row", ylabel="rows")
    _legend(panel, above=2)
    return figure


@dataclass(frozen=True)
class FilePoint:
    """An exported file: its mean KL divergence to the merged model in nats a token, of it the weights' part, and the
    most that is allowed."""

    name: str
    bytes: int
    kl: float
    weights_kl: float | None = None
    allowed: float | None = None


def file_sizes(files: Sequence[FilePoint]) -> Any:
    """Size of the exported files against their divergence."""
    said = [f"{f.name} {display.size(f.bytes)}, KL {display.number(f.kl)}" for f in files]
    figure, (panel,) = _figure(f"Exported files: {'; '.join(said)}", height=3.4)
    least = 1e-7  # a divergence of nothing has no place on a logarithmic axis
    files = sorted(files, key=lambda f: f.bytes)
    sizes, nan = [f.bytes / 1e6 for f in files], math.nan
    weights = [nan if f.weights_kl is None else max(f.weights_kl, least) for f in files]
    allowed = [nan if f.allowed is None else f.allowed for f in files]
    panel.plot(sizes, [max(f.kl, least) for f in files], color=BLUE, marker="o", label="file in llama.cpp")
    panel.plot(sizes, weights, color=ORANGE, marker="x", linestyle="", label="its weights alone")
    panel.plot(sizes, allowed, color=GREY, marker="_", markersize=14, linestyle="", label="allowed")
    for f, size in zip(files, sizes, strict=True):
        at = (size, max(f.kl, least))
        panel.annotate(label(f.name), at, textcoords="offset points", xytext=(6, 6), color=INK)
    panel.margins(x=0.2)
    panel.set(yscale="log", xlabel="size, MB", ylabel="mean KL, nats a token", title="What the smaller file changes")
    _legend(panel)
    return figure


# ---------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Bar:
    """A candidate's score as a share with its 95 % interval. kind: "base", "tuned", "file" or "ship": its colour."""

    name: str
    value: float
    low: float
    high: float
    kind: str = "tuned"
    bytes: int | None = None


def scores(bars: Sequence[Bar], label_x: str) -> Any:
    """A point with its interval for each candidate, its share and its file's size beside it; the one to ship is marked,
    and its score goes down through all rows."""
    colours = {"base": BASE, "tuned": TRAINED, "file": FILE, "ship": FILE}
    names = [f"{b.name}, to ship" if b.kind == "ship" else b.name for b in bars]
    said = [
        f"{n} {display.percent(b.value, 0)} ({display.interval(b.low, b.high)})"
        for n, b in zip(names, bars, strict=True)
    ]
    figure, (panel,) = _figure(f"{label_x}: {', '.join(said)}", width=3.7, height=0.24 * max(len(bars), 1) + 0.6)
    for place, bar in enumerate(bars):
        value, low, high = 100 * bar.value, 100 * bar.low, 100 * bar.high
        reach = [[max(value - low, 0)], [max(high - value, 0)]]
        wide, marker, size = (3, "D", 8) if bar.kind == "ship" else (2, "o", 6)
        how = {"capsize": 3, "linewidth": wide, "marker": marker, "markersize": size}
        panel.errorbar(value, place, xerr=reach, color=colours[bar.kind], **how)
        held = f"  {display.size(bar.bytes)}" if bar.bytes else ""
        panel.text(1.02, place, f"{value:.0f} %{held}", va="center", color=INK, transform=panel.get_yaxis_transform())
        if bar.kind == "ship":
            panel.axvline(value, color=FILE, linewidth=1, alpha=0.5, zorder=0)
    panel.set_yticks(range(len(bars)), [label(n) for n in names])
    panel.invert_yaxis()
    top = 100 * max([b.high for b in bars], default=1.0)
    panel.set(xlim=(-0.02 * top, max(1.05 * top, 1)), xlabel=label(label_x))
    panel.grid(axis="y", visible=False)
    return figure


def score_after(points: Sequence[Mapping[str, Any]], label_y: str = "score") -> Any:
    """Score against minutes of training. points: minutes, score, low and high (shares) of some checkpoints."""
    said = ", ".join(f"{display.percent(p['score'], 0)} after {p['minutes']:.3g} min" for p in points)
    figure, (panel,) = _figure(f"{label_y}: {said}", height=2.2)
    ys = [100 * p["score"] for p in points]
    both = list(zip(ys, points, strict=True))
    reach = [[abs(y - 100 * p[e]) if display.finite(p.get(e)) else 0 for y, p in both] for e in ("low", "high")]
    panel.errorbar([p["minutes"] for p in points], ys, yerr=reach, color=TRAINED, capsize=3, marker="o")
    panel.set(xlabel="minutes of training", ylabel=label(f"{label_y}, %"))
    panel.set_ylim(bottom=0)
    panel.set_xlim(left=0)
    return figure


def by_group(counts: Mapping[str, int], shares: Mapping[str, Mapping[str, float]]) -> Any:
    """Share right by group, a bar for each candidate. counts: group → questions; shares: candidate → group → share."""
    groups = list(counts)
    alt = "Share right by group: " + "; ".join(
        f"{n} " + ", ".join(f"{g} {display.percent(v.get(g, 0), 0)}" for g in groups) for n, v in shares.items()
    )
    width = max(4.6, min(14, 1.6 + 0.26 * len(groups) * (len(shares) + 1)))
    figure, (panel,) = _figure(alt, width=width, height=3.4)
    thickness = 0.8 / max(len(shares), 1)
    for number, (name, values) in enumerate(shares.items()):
        places = [x + (number - (len(shares) - 1) / 2) * thickness for x in range(len(groups))]
        colour = BASE if number == 0 else PALETTE[(number - 1) % len(PALETTE)]
        panel.bar(places, [100 * values.get(g, 0) for g in groups], thickness, label=label(name), color=colour)
    panel.set_xticks(range(len(groups)), [label(f"{g}\nn={counts[g]}") for g in groups])
    panel.set(ylim=(0, 105), ylabel="right, %")
    _legend(panel, above=4)
    panel.grid(axis="x", visible=False)
    return figure


def sweep(axes: Mapping[str, Sequence[Any]], names: Sequence[str]) -> Any:
    """Parallel coordinates: an axis for each of `axes` (name → a number, a word or None for each run), a line for each
    run, coloured by its place on the last axis. An axis goes from its lowest value to its highest; words are sorted."""
    figure, (panel,) = _figure(
        f"Parallel coordinates over {', '.join(axes)} of the runs {', '.join(names)}",
        width=max(4.6, 1.7 * len(axes)),
        height=3.6,
    )
    panel.grid(visible=False)
    panel.spines[["left", "bottom"]].set_visible(False)
    lines: list[list[float]] = [[] for _ in names]
    for x, values in enumerate(axes.values()):
        known = [v for v in values if v is not None]
        if all(display.finite(v) for v in known):
            low, high = min(known), max(known)
            places = [math.nan if v is None else (v - low) / (high - low) if high > low else 0.5 for v in values]
            marks = {display.number(low): 0.0, display.number(high): 1.0} if high > low else {display.number(low): 0.5}
        else:
            words = sorted({display.plain(v) for v in known})
            marks = {word: (at + 0.5) / len(words) for at, word in enumerate(words)}
            places = [math.nan if v is None else marks[display.plain(v)] for v in values]
        panel.axvline(x, color=GREY, linewidth=1)
        for text, y in marks.items():
            panel.text(x - 0.03, y, label(text[:18] or "(empty)"), ha="right", va="center", fontsize=8, color=INK)
        for line, place in zip(lines, places, strict=True):
            line.append(place)
    for name, line in zip(names, lines, strict=True):
        colour = GREEN if line[-1] > 2 / 3 else BLUE if line[-1] > 1 / 3 else ORANGE
        panel.plot(range(len(line)), line, color=colour, linewidth=2, marker="o", markersize=4)
        panel.text(len(line) - 0.95, line[-1], label(name), va="center", fontsize=8, color=INK)
    panel.set_xticks(range(len(axes)), [label(d.replace(".", "\n").replace("_", " ")) for d in axes])
    panel.xaxis.tick_top()
    panel.tick_params(length=0)
    panel.set(yticks=[], xlim=(-0.5, len(axes) - 0.3), ylim=(-0.05, 1.05))
    return figure
