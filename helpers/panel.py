"""Sliders and switches for a stage's parameters. The only file that draws widgets.

Uses what ipywidgets 7.7 (Colab) and 8 share. Nothing waits for a click: a cell reads what the panel says when it runs.
"""

from __future__ import annotations

import html
import math
from typing import Any

from helpers.errors import TunebookError
from helpers.params import STAGES, Param, Params


def show(stage: str, params: Params) -> Any:
    """Draw the panel bound to `params`; return the widget that was displayed."""
    from IPython.display import display

    panel = build(stage, params)
    display(panel)
    return panel


def build(stage: str, params: Params) -> Any:
    """The panel: a row of control and meaning for each parameter, the rarely needed ones folded away below."""
    import ipywidgets as w

    message = w.HTML()
    plain = [row(p, params, message) for p in STAGES[stage] if not p.advanced]
    advanced = [row(p, params, message) for p in STAGES[stage] if p.advanced]
    parts = [w.HTML("<b>Parameters</b>: change them here, then run the cells below."), *plain]
    if advanced:
        fold = w.Accordion(children=[w.VBox(advanced)])
        fold.set_title(0, f"{len(advanced)} more")
        fold.selected_index = None
        parts.append(fold)
    return w.VBox([*parts, message])


def row(param: Param, params: Params, message: Any) -> Any:
    """One control with its meaning beside it. A refused value is explained and the old one put back."""
    import ipywidgets as w

    control = widget(param, getattr(params, param.name))
    control.description = param.name
    control.style = {"description_width": "12em"}
    control.layout = w.Layout(width="30em", max_width="100%")

    def changed(event: dict[str, Any]) -> None:
        if event["new"] == getattr(params, param.name):
            return
        try:
            setattr(params, param.name, event["new"])
            message.value = ""
        except TunebookError as error:
            message.value = f"<span style='color:#c33'>{html.escape(str(error))}</span>"
            control.value = getattr(params, param.name)

    control.observe(changed, names="value")
    meaning = w.HTML(
        f"<span style='opacity:.75; line-height:1.3; display:inline-block'>{html.escape(param.help)}{html.escape(f' ({param.unit})' if param.unit else '')}</span>",
        layout=w.Layout(flex="1 1 12em", min_width="12em"),
    )
    return w.HBox([control, meaning], layout=w.Layout(align_items="center", margin="1px 0"))


def widget(param: Param, value: Any) -> Any:
    """The fitting control: switch, list, slider (logarithmic where the parameter says so), number or text."""
    import ipywidgets as w

    bounded = param.low is not None and param.high is not None
    if isinstance(param.default, bool):
        return w.Checkbox(value=value, indent=True)
    if param.choices is not None:
        return w.Dropdown(options=list(param.choices), value=value)
    if isinstance(param.default, float) and bounded and param.log and param.low > 0:
        return w.FloatLogSlider(
            value=value,
            base=10,
            min=math.log10(param.low),
            max=math.log10(param.high),
            step=0.05,
            readout_format=".1e",
            continuous_update=False,
        )
    if isinstance(param.default, float):
        if bounded and param.step:
            return w.FloatSlider(
                value=value,
                min=param.low,
                max=param.high,
                step=param.step,
                readout_format=".3g",
                continuous_update=False,
            )
        return w.BoundedFloatText(value=value, min=_or(param.low, -1e30), max=_or(param.high, 1e30))
    if isinstance(param.default, int):
        if bounded and param.step:
            return w.IntSlider(
                value=value, min=int(param.low), max=int(param.high), step=int(param.step), continuous_update=False
            )
        return w.BoundedIntText(value=value, min=int(_or(param.low, -(2**53))), max=int(_or(param.high, 2**53)))
    return w.Text(value=value, continuous_update=False)


def _or(bound: float | None, otherwise: float) -> float:
    return otherwise if bound is None else bound
