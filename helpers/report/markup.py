"""HTML out of plain values, everything escaped, and numbers as people read them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from helpers.report.svg import finite, number

# Characters that would hide or reorder what a model wrote: shown as what they are. Tab and line end stay.
HIDDEN = {c: chr(0x2400 + c) for c in range(0x20) if c not in (0x09, 0x0A)} | {0x7F: "␡"}
HIDDEN |= {
    c: f"⟨U+{c:04X}⟩"
    for c in [*range(0x80, 0xA0), 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF]
}


class Markup(str):
    """Text that is HTML already; everything else is escaped when it meets a page."""


def esc(value: Any) -> Markup:
    """Any value as HTML text: escaped, control and direction characters made visible, lone surrogates replaced."""
    if isinstance(value, Markup):
        return value
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    return Markup(html.escape(text.translate(HIDDEN)))


def table(
    header: Sequence[str], rows: Iterable[Sequence[Any]], classes: Sequence[str] = (), row_classes: Sequence[str] = ()
) -> Markup:
    """A table that scrolls sideways in a narrow window. classes: one a column ("n" numbers, "bar", "name", "wide", "")."""
    rows = list(rows)
    if not rows:
        return Markup("")
    kinds = [*classes, *[""] * (len(header) - len(classes))]

    def cells(row: Sequence[Any], tag: str) -> str:
        return "".join(
            f"<{tag}{f' class={k!r}' if k else ''}>{esc('' if c is None else c)}</{tag}>"
            for c, k in zip(row, kinds, strict=True)
        )

    body = "".join(
        f"<tr{f' class={row_classes[i]!r}' if i < len(row_classes) and row_classes[i] else ''}>{cells(r, 'td')}</tr>"
        for i, r in enumerate(rows)
    )
    head = f"<thead><tr>{cells(header, 'th')}</tr></thead>" if any(header) else ""
    full = ' class="full"' if {"bar", "wide"} & set(kinds) else ""
    return Markup(f'<div class="scroll"><table{full}>{head}<tbody>{body}</tbody></table></div>')


def section(anchor: str, title: str, body: str, sub: str = "") -> Markup:
    """A card of the page; nothing when there is nothing to show."""
    if not body:
        return Markup("")
    below = f'<p class="sub">{esc(sub)}</p>' if sub else ""
    return Markup(f'<section id="{anchor}"><h2>{esc(title)}</h2>{below}{body}</section>')


def percent(value: Any, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %" if finite(value) else "–"


def points(value: Any) -> str:
    """A difference of shares in points, with its sign: +31.2"""
    return f"{100 * value:+.1f}" if finite(value) else "–"


def between(low: Any, high: Any, unit: str = "share") -> str:
    """A 95 % interval."""
    if not (finite(low) and finite(high)):
        return ""
    return f"{100 * low:.1f} – {100 * high:.1f} %" if unit == "share" else f"{number(low)} – {number(high)}"


def score(value: dict[str, Any] | None) -> str:
    """A score of scores.json in its own unit."""
    if not value or not finite(value.get("value")):
        return "–"
    return percent(value["value"]) if value.get("unit", "share") == "share" else number(value["value"])


def size(count: Any) -> str:
    """Bytes as people say them, in powers of ten."""
    if not finite(count):
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit in ("B", "kB") or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def duration(seconds: Any) -> str:
    if not finite(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def plain(value: Any) -> str:
    """Any metric as text: numbers short, shares not guessed, structures as compact JSON."""
    import json

    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return number(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
