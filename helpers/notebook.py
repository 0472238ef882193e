"""What a notebook's first cell calls: read the parameters and show them."""

from __future__ import annotations

from collections.abc import Mapping
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
