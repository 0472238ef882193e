"""How things are shown, once for all: a table, a number, a size, a duration; foreign text with nothing hidden in it.

A result that ends a cell is an `Html` (a table or several), a matplotlib figure, or what can be shown as one (`Shown`);
`save` keeps what was shown in a stage's folder and `load` brings it back.
"""

from __future__ import annotations

import calendar
import html
import io
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from helpers.cache import write_atomic
from helpers.errors import HIDDEN, clean  # noqa: F401 - display is where they are asked for


class Html:
    """Ready HTML for a notebook, with a plain text for terminals. The maker answers for the escaping."""

    def __init__(self, markup: str, text: str = "") -> None:
        self.markup, self.text = markup, clean(text)

    def __add__(self, other: Html) -> Html:
        """Both, one below the other."""
        return Html(self.markup + other.markup, "\n".join(filter(None, (self.text, other.text))))

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return self.text or "(HTML)"


class Shown:
    """What a cell may end with: subclasses say as what, in `_shown`."""

    def _shown(self) -> Html:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return self._shown().markup

    def __repr__(self) -> str:
        return repr(self._shown())


def escape(text: object) -> str:
    """Any value as HTML text."""
    return html.escape(clean(text))


def table(rows: Iterable[Iterable[Any]], header: Iterable[str] = ()) -> str:
    """A small HTML table; every cell is escaped."""

    def cell(value: Any, tag: str) -> str:
        # A long word must not widen the page, nor a narrow page break every word of a sentence.
        wrap = ";overflow-wrap:anywhere;min-width:14em" if len(str(value)) > 40 else ""
        return f"<{tag} style='text-align:left{wrap}'>{escape(value)}</{tag}>"

    def line(cells: Iterable[Any], tag: str) -> str:
        return f"<tr>{''.join(cell(value, tag) for value in cells)}</tr>"

    names = list(header)
    return f"<table>{line(names, 'th') if names else ''}{''.join(line(r, 'td') for r in rows)}</table>"


def text_table(rows: Iterable[Iterable[Any]], header: Iterable[str] = ()) -> str:
    """The same table for a terminal: columns of equal width, two blanks between them."""
    lines = [[clean(c) for c in row] for row in ([list(header)] if header else []) + [list(r) for r in rows]]
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(max(map(len, lines), default=0))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=False)).rstrip() for line in lines)


def shown(rows: Sequence[Sequence[Any]], header: Sequence[str] = ()) -> Html:
    """A table as a cell ends with it: HTML in a notebook, aligned text in a terminal."""
    return Html(table(rows, header), text_table(rows, header))


def fold(title: str, markup: str) -> Html:
    """Ready HTML behind a title that opens it; nothing in a terminal."""
    return Html(f"<details><summary>{escape(title)}</summary>{markup}</details>")


def said(*lines: str) -> Html:
    """Sentences as a cell ends with them, a paragraph each; empty ones are left out."""
    kept = [clean(line) for line in lines if line]
    return Html("".join(f"<p>{escape(line)}</p>" for line in kept), "\n".join(kept))


def say(*lines: object, end: str = "\n") -> None:
    """Print lines at once, each `clean`: the one way to the terminal for what may hold foreign text."""
    print(*map(clean, lines), sep="\n", end=end, flush=True)


# ---------------------------------------------------------------- numbers


def finite(value: object) -> TypeGuard[float]:
    """Whether a value is a number that can be shown: no text, no truth value, no NaN, no infinity."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: float) -> str:
    """A number with four significant digits, thousands separated: 0.0312, 15,340, 1.2e-05."""
    if not finite(value):
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def percent(share: Any, digits: int = 1) -> str:
    """A share as a percentage: 0.187 → 18.7 %."""
    return f"{100 * share:.{digits}f} %" if finite(share) else "–"


def points(difference: Any) -> str:
    """A difference of shares in percentage points, with its sign: +31.2."""
    return f"{100 * difference:+.1f}" if finite(difference) else "–"


def interval(low: Any, high: Any, unit: str = "share") -> str:
    """A confidence interval: 12.1 – 24.2 %."""
    if not (finite(low) and finite(high)):
        return ""
    return f"{100 * low:.1f} – {100 * high:.1f} %" if unit == "share" else f"{number(low)} – {number(high)}"


def size(count: Any) -> str:
    """Bytes as people say them, in powers of ten: 144 MB."""
    if not finite(count):
        return "–"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "kB") or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: Any) -> str:
    """Seconds as people say them: 42 s, 7 min, 2.5 h."""
    if not finite(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def clock(utc: str) -> str:
    """A UTC time of a manifest by the clock of this machine: "at 10:25" today, else "on 2026-11-26 at 10:25"."""
    then = time.localtime(calendar.timegm(time.strptime(utc, "%Y-%m-%dT%H:%M:%SZ")))
    return time.strftime("at %H:%M" if then[:3] == time.localtime()[:3] else "on %Y-%m-%d at %H:%M", then)


def plain(value: Any) -> str:
    """Any metric as text: numbers short, truth values as words, structures as compact JSON."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, (int, float)):
        return number(value) if math.isfinite(value) else str(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- what a cell showed


def png(figure: Any) -> bytes:
    """A matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def save(value: Any, folder: Path, name: str) -> None:
    """Write what ended a cell as `folder/name`.png, if it is a figure, or as `name`.json, its HTML and its text."""
    if hasattr(value, "savefig"):
        write_atomic(folder / f"{name}.png", png(value))
    elif value is not None:
        markup = value._repr_html_() if hasattr(value, "_repr_html_") else f"<pre>{escape(value)}</pre>"
        write_atomic(folder / f"{name}.json", json.dumps({"html": markup, "text": repr(value)}))


def load(folder: Path, name: str) -> Any:
    """What `save` kept, an image or an `Html`; None when there is nothing of that name."""
    if (folder / f"{name}.png").is_file():
        from IPython.display import Image

        return Image(folder / f"{name}.png")
    if (folder / f"{name}.json").is_file():
        kept = json.loads((folder / f"{name}.json").read_text())
        return Html(kept["html"], kept["text"])
    return None
