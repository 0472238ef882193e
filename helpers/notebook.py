"""What a notebook's first cell calls: read the parameters and show them, as a panel where a person is watching."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from helpers import machine
from helpers import params as parameters
from helpers.panel import Panel
from helpers.train import methods

OTHERS = ("In", "Out", "keep_runs_in", "also_install")  # globals that are no parameters of a stage


def start(stage: str, namespace: Mapping[str, Any]) -> Any:
    """A notebook's parameters (`params.SftParams` and so on) out of its globals: checked, shown and returned.

    Where a person is watching, the table is a panel of sliders bound to them: the cells below read what the sliders say
    when they run, until the first step of the work freezes them.
    """
    from IPython.display import display

    if "_chosen" in namespace:  # the quickstart runs these cells with parameters of its own panel
        return namespace["_chosen"]
    params = parameters.resolve(stage, read_globals(namespace))
    if stage in ("sft", "orpo"):
        methods.import_first(params)
    if not machine.interactive():
        display(params)
        return params
    panel = Panel(stage, params)
    display(panel.view)
    panel.refresh()
    if shell := sys.modules["IPython"].get_ipython():
        panel.watch(shell.events)
    return params


def read_globals(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values among a notebook's globals: its parameters, and what is misspelt among them."""
    kinds = (str, int, float, bool, list, dict, tuple, type(None))
    return {n: v for n, v in namespace.items() if isinstance(v, kinds) and n[0] != "_" and n not in OTHERS}
