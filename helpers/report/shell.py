"""One page shell for every page and one way to write a card: Jinja2 templates in which every value is escaped.

A page is a single HTML file with its style and its one script inside; its policy lets nothing be fetched and no other
script run. Values meet a page through `display.clean` and autoescape, and a Markdown card through `markdown_text`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from helpers import display, plots

FOLDER = Path(__file__).parent / "templates"
FILTERS = ("number", "percent", "points", "interval", "size", "duration", "plain")


def page(template: str, title: str, /, **values: Any) -> str:
    """A whole page from a template that extends shell.html.j2."""
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    shell = {
        "title": title,
        "style": Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    return _pages().get_template(template).render(**shell, **values) + "\n"


def macro(template: str, name: str) -> Callable[..., Markup]:
    """A macro of a template as a function that returns ready markup."""
    return getattr(_pages().get_template(template).module, name)


def card(template: str, /, **values: Any) -> str:
    """A Markdown card; every value in it is escaped by `markdown_text`."""
    return _cards().get_template(template).render(**values).strip() + "\n"


def notebook_style() -> str:
    """The last part of the pages' style, which a notebook's output brings along."""
    return (FOLDER / "page.css").read_text(encoding="utf-8").partition("/* Tokens of real rows.")[2].partition("*/")[2]


def markdown_text(value: Any) -> str:
    """Text inside Markdown: no markup of its own, no line breaks, no table bars."""
    text = re.sub(r"\s+", " ", display.clean(value))
    return "".join(f"\\{c}" if c in "\\`*[]<>|#" else c for c in text)


def public(value: Any) -> Any:
    """A path of this machine says nothing to a reader elsewhere and may name its user: only the file's name is left."""
    if not isinstance(value, str):
        return value
    parts = [p.strip() for p in value.split(",")] if any(c in value for c in "/~") else [value]
    return ", ".join(Path(p).name if p.startswith(("/", "~")) else p for p in parts)


def bar(value: Any, low: Any, high: Any, floor: float = 0.0, ceiling: float = 1.0) -> Markup:
    """A value with its 95 % interval on a fixed scale, for a table's cell; a negative value points to the left."""
    if not display.finite(value) or ceiling <= floor:
        return Markup("")

    def place(number: float) -> float:
        return round(100 * (min(max(number, floor), ceiling) - floor) / (ceiling - floor), 2)

    def piece(name: str, start: float, end: float) -> str:
        return f'<i class="{name}" style="left:{place(start)}%;width:{round(place(end) - place(start), 2)}%"></i>'

    parts = [piece("fill bad" if value < 0 else "fill", min(value, 0), max(value, 0))]
    if display.finite(low) and display.finite(high):
        parts.append(piece("whisker", low, high))
    if floor < 0:
        parts.append(piece("zero", 0, 0))
    return Markup(f'<div class="interval" aria-hidden="true">{"".join(parts)}</div>')


def _environment(finalize: Callable[[Any], Any], autoescape: bool) -> Any:
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader, Undefined

    made = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=autoescape,
        finalize=finalize,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {name: _filter(getattr(display, name), Undefined) for name in FILTERS}
    made.filters |= {"public": public, "svg": lambda figure: Markup(plots.svg(figure))}
    made.tests["finite"] = display.finite
    made.globals["bar"] = bar
    return made


def _filter(write: Callable[..., str], undefined: type) -> Callable[..., str]:
    """A function of `display` as a filter: what is not there is written as None is."""
    return lambda *given: write(*(None if isinstance(value, undefined) else value for value in given))


@functools.cache
def _pages() -> Any:
    return _environment(lambda v: v if isinstance(v, Markup) else "" if v is None else display.clean(v), True)


@functools.cache
def _cards() -> Any:
    return _environment(lambda v: v if isinstance(v, Markup) else "" if v is None else markdown_text(v), False)
