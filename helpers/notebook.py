"""What a notebook's first cell calls: read the parameters and show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from helpers import machine, panel
from helpers import params as parameters
from helpers.train import unsloth_backend


def start(stage: str, namespace: Mapping[str, Any]) -> Any:
    """Read a notebook's parameters out of its globals, check them, show them, and return them (`params.SftParams` and
    so on).

    Every unknown name, wrong type and value out of bounds stops here with an error message. Where a person is
    watching, the table is a panel of sliders bound to the returned object: the cells below read what the sliders say
    when they run, until the first step of the work freezes them. Headless it is a plain table.
    """
    from IPython.display import display

    params = parameters.resolve(stage, parameters.read_globals(stage, namespace))
    if stage in ("sft", "orpo"):
        unsloth_backend.import_first(params)
    display(panel.build(stage, params) if machine.interactive() else params)
    return params
