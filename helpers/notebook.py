"""What a notebook's first cell calls: read the parameters, show them, and where a person is watching draw sliders.

Uses what ipywidgets 7.7 (Colab) and 8 share. Nothing waits for a click: a cell reads what the panel says when it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from helpers import machine
from helpers import params as parameters
from helpers.display import escape
from helpers.errors import TunebookError
from helpers.params import STAGES, Param, Params
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
    display(panel(stage, params) if machine.interactive() else params)
    return params


def read_globals(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values among a notebook's globals: its parameters, and what is misspelt among them."""
    kinds = (str, int, float, bool, list, dict, tuple, type(None))
    return {n: v for n, v in namespace.items() if isinstance(v, kinds) and n[0] != "_" and n not in OTHERS}


def panel(stage: str, params: Params) -> Any:
    """The panel bound to `params`: a row of control and meaning each, the rarely needed ones folded away below."""
    import ipywidgets as w

    message = w.HTML()
    rows = {p: row(p, params, message) for p in STAGES[stage]}
    advanced = [shown for p, shown in rows.items() if p.advanced]
    fold = w.Accordion(children=[w.VBox(advanced)], selected_index=None)
    fold.set_title(0, f"{len(advanced)} more")
    plain = [shown for p, shown in rows.items() if not p.advanced]
    return w.VBox([w.HTML("<b>Parameters</b>: change them here, then run the cells below."), *plain, fold, message])


def row(param: Param, params: Params, message: Any) -> Any:
    """One control with its meaning beside it. A refused value is explained and the old one put back."""
    import ipywidgets as w

    control = widget(param, getattr(params, param.name))
    control.description, control.style = param.name, {"description_width": "12em"}
    control.layout = w.Layout(width="30em", max_width="100%")

    def changed(event: dict[str, Any]) -> None:
        if event["new"] == getattr(params, param.name):
            return
        try:
            setattr(params, param.name, event["new"])
            message.value = ""
        except TunebookError as error:
            message.value = f"<span style='color:#c33'>{escape(error)}</span>"
            control.value = getattr(params, param.name)

    control.observe(changed, names="value")
    meaning = escape(param.help + (f" ({param.unit})" if param.unit else ""))
    text = f"<span style='opacity:.75; line-height:1.3; display:inline-block'>{meaning}</span>"
    told = w.HTML(text, layout=w.Layout(flex="1 1 12em", min_width="12em"))
    return w.HBox([control, told], layout=w.Layout(align_items="center", margin="1px 0"))


def widget(param: Param, value: Any) -> Any:
    """The fitting control: switch, list, slider (logarithmic where the parameter says so), number or text."""
    import ipywidgets as w

    if isinstance(param.default, bool):
        return w.Checkbox(value=value, indent=True)
    if param.choices:
        return w.Dropdown(options=list(param.choices), value=value)
    given = {"value": value, "continuous_update": False}
    if isinstance(param.default, str):
        return w.Text(**given)
    if param.log and value:
        low, high = math.log10(param.low), math.log10(param.high)
        return w.FloatLogSlider(**given, base=10, min=low, max=high, step=0.05, readout_format=".1e")
    given |= {"min": min(param.low, param.default), "max": param.high}
    whole = isinstance(param.default, int)
    if not param.step:
        return (w.BoundedIntText if whole else w.BoundedFloatText)(**given)
    return (w.IntSlider if whole else w.FloatSlider)(**given, step=param.step)
