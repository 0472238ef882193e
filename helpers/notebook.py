"""What a notebook's own cells call: read the parameters, show a table, keep a figure."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from helpers import machine
from helpers import params as parameters


def start(stage: str, namespace: Mapping[str, Any]) -> parameters.Params:
    """Read a notebook's parameters out of its globals, check them, and show them.

    Every name that is no parameter of the stage, every wrong type and every value out of bounds stops here with a sentence.
    Where a person is watching, the table is a panel of sliders bound to the returned object: the cells below read what the
    sliders say when they run. Headless it is a plain table.
    """
    given = parameters.read_globals(stage, namespace)
    params = parameters.resolve(stage, given)
    if stage in ("sft", "orpo"):
        from helpers.train import unsloth_backend

        unsloth_backend.early_import(params.as_dict())
    if machine.interactive():
        from helpers import panel

        panel.show(stage, params)
    else:
        show(params)
    return params


def show(value: Any) -> None:
    """Display an object as a notebook would when it ends a cell; print it in a script."""
    from IPython.display import display

    display(value)


def table(rows: Iterable[Iterable[Any]], header: Iterable[str] = ()) -> str:
    """A small HTML table; every cell is escaped."""

    def line(cells: Iterable[Any], tag: str) -> str:
        return (
            "<tr>" + "".join(f"<{tag} style='text-align:left'>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"
        )

    head = line(header, "th") if header else ""
    return f"<table>{head}{''.join(line(r, 'td') for r in rows)}</table>"


class Html:
    """Ready HTML for a notebook, with a plain text for terminals. The maker answers for the escaping."""

    def __init__(self, markup: str, text: str = ""):
        self.markup, self.text = markup, text

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return self.text or "(HTML)"


def save_figure(folder: str | Path, figure: Any, name: str) -> Path:
    """Write a matplotlib figure as PNG into a stage's folder, atomically, and return the path."""
    from helpers.runs import write_atomic

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return write_atomic(Path(getattr(folder, "path", folder)) / name, buffer.getvalue())
