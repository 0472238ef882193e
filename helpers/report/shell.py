"""One page shell for every page and one way to write a card: Jinja2 templates in which every value is escaped.

A page is a single HTML file with its style and its one script inside; its policy lets nothing be fetched and no other
script run. Values meet a page through `display.clean` and autoescape, and a Markdown card through `markdown_text`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from helpers import display, plots

FOLDER = Path(__file__).parent / "templates"
FILTERS = ("number", "percent", "points", "interval", "size", "duration")


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
    return _environment("page").get_template(template).render(**shell, **values) + "\n"


def macro(template: str, name: str) -> Callable[..., Markup]:
    """A macro of a template as a function that returns ready markup."""
    return getattr(_environment("page").get_template(template).module, name)


def card(template: str, /, **values: Any) -> str:
    """A Markdown card; every value in it is escaped by `markdown_text`."""
    return _environment("card").get_template(template).render(**values).strip() + "\n"


def markdown_text(value: Any) -> str:
    """Text inside Markdown: no markup of its own, no line breaks, no table bars."""
    text = re.sub(r"\s+", " ", display.clean(value))
    return "".join(f"\\{c}" if c in "\\`*[]<>|#" else c for c in text)


def gigabytes(gib: Any) -> float | None:
    """Memory in the unit of files' sizes, so that a page has one."""
    return gib * 2**30 / 1e9 if display.finite(gib) else None


def public(value: Any) -> Any:
    """A path of this machine says nothing to a reader elsewhere and may name its user: only the file's name is left."""
    if not isinstance(value, str):
        return value
    parts = [p.strip() for p in value.split(",")] if any(c in value for c in "/~") else [value]
    return ", ".join(Path(p).name if p.startswith(("/", "~")) else p for p in parts)


@functools.cache
def _environment(kind: str) -> Any:
    """Jinja2 for pages or cards. What is not there is printed as nothing, and by the filters as a dash."""
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader, Undefined

    written: Callable[[Any], str] = display.clean if kind == "page" else markdown_text
    made = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=kind == "page",
        finalize=lambda v: v if isinstance(v, Markup) else "" if v is None else written(v),
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {name: getattr(display, name) for name in FILTERS}
    made.filters["plain"] = lambda v: display.plain(None if isinstance(v, Undefined) else v)
    made.filters |= {"public": public, "svg": lambda figure: Markup(plots.svg(figure))}
    made.filters["memory"] = lambda gib: display.size((gigabytes(gib) or math.nan) * 1e9)
    made.tests["finite"] = display.finite
    return made
