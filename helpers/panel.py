"""The panel of a notebook's first cell: presets, a control for every parameter, and of 02 and 03 what they come to.

Uses what ipywidgets 7.7 (Colab) and 8 share. Nothing waits for a click: a cell reads what the panel says when it runs.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import yaml

from helpers import display, machine, runs
from helpers import params as parameters
from helpers.data import files, sources
from helpers.display import escape
from helpers.errors import TunebookError
from helpers.params import STAGES, DataParams, Param, Params
from helpers.planner import proposals
from helpers.train import training

OWN, HERE, DEMO = "own", "for this machine", "demo"
PLACE = Path(__file__).parent
GROUPS = PLACE / "panel_groups.yaml"
AT_ONCE_S = 3.0  # a cell that begins so soon after the panel was made was not started by hand
WINS = (
    "The parameters cell gave these values; from here on <b>the panel wins</b>: the cells below read what it shows "
    "when they run. To go by the parameters cell again, run from the notebook's first cell."
)


def red(text: object) -> str:
    """A message that a screen reader says at once."""
    return f"<div role='alert' class='tunebook-red'>{escape(text)}</div>" if text else ""


def tell(control: Any, text: str) -> None:
    """The tooltip, under the name that this ipywidgets has for it."""
    setattr(control, "tooltip" if control.has_trait("tooltip") else "description_tooltip", text)


class Row:
    """One parameter: a field to type into (or a switch, or a list), a slider over its useful values, its meaning, and
    in red what was refused. moved: called with the row after a person has changed the value."""

    def __init__(self, param: Param, params: Params, moved: Callable[[Row], Any]) -> None:
        import ipywidgets as w

        self.param, self.params, self.moved, self.refused = param, params, moved, ""
        self._drawing = False
        value, typed = getattr(params, param.name), param.name == "run"
        self.field: Any
        if isinstance(param.default, bool):
            self.field = w.Checkbox(value=value, indent=True)
        elif param.choices:
            self.field = w.Dropdown(options=list(param.choices), value=value)
        else:
            self.field = (w.Textarea if "\n" in str(value) else w.Text)(continuous_update=typed)
        self.field.description, self.field.style = param.name, {"description_width": "13em"}
        tell(self.field, f"{param.name}: {param.meaning}")
        self.slider: Any = None
        if param.marks:
            self.slider = w.SelectionSlider(options=self._options(value), value=value, readout=False)
            self.slider.layout = w.Layout(width="15em", max_width="100%")
            tell(self.slider, param.name)
            self.slider.observe(self._changed, names="value")
        self.told = w.HTML(layout=w.Layout(flex="1 1 14em", min_width="14em"))
        self.controls = [self.field] if self.slider is None else [self.field, self.slider]
        self.view = w.HBox(
            [*self.controls, self.told], layout=w.Layout(flex_flow="row wrap", align_items="center", margin="1px 0")
        )
        self.view.add_class("tunebook-row")
        self.draw()
        self.field.observe(self._changed, names="value")

    def _options(self, value: Any) -> list[tuple[str, Any]]:
        kind = type(self.param.default)
        return [(self.param.text(kind(mark)), kind(mark)) for mark in sorted({*self.param.marks, value})]

    def draw(self) -> None:
        """Show the parameter's value and what was said about it."""
        import ipywidgets as w

        value = getattr(self.params, self.param.name)
        text = value if isinstance(value, bool) or self.param.choices else self.param.text(value)
        self._drawing = True
        if not (self.refused and self.param.name == "run"):  # a name is judged while it is being typed
            self.field.value = text
        if self.slider is not None:
            if value not in [mark for _, mark in self.slider.options]:
                self.slider.options = self._options(value)
            self.slider.value = value
        self._drawing = False
        longest = max(map(len, self.param.choices), default=len(str(text)))
        wide = f"calc(14em + {min(max(longest, 5) + 4, 62)}ch)"
        if self.field.layout.width != wide:
            self.field.layout = w.Layout(width="16em" if isinstance(value, bool) else wide, max_width="100%")
        said = red(f"{self.refused} {self.param.name} stays {text!r}." if self.refused else "")
        self.told.value = f"{said}<span class='tunebook-quiet'>{escape(self.param.meaning)}{self._of_run()}</span>"

    def _of_run(self) -> str:
        """Beside a run's name: what there is of it."""
        if self.param.name != "run":
            return ""
        done = [n[:2] for s, n in runs.FOLDERS.items() if (runs.folder(self.params.run, s) / "manifest.json").is_file()]
        return f"; finished there: {', '.join(done)}" if done else "; nothing is finished there"

    def _changed(self, event: dict[str, Any]) -> None:
        if not self._drawing:
            self.refused = self.set(event["new"])
            self.draw()
            self.moved(self)

    def set(self, value: Any) -> str:
        """Give the parameter a value; what is said against it, "" where it is taken."""
        try:
            setattr(self.params, self.param.name, value)
        except TunebookError as error:
            return str(error)
        return ""


class Panel:
    """The widgets bound to `params`. `view` is what a notebook displays; rows: a Row by parameter."""

    def __init__(self, stage: str, params: Params) -> None:
        import ipywidgets as w

        self.stage, self.params = stage, params
        self.rows = {p.name: Row(p, params, self._moved) for p in STAGES[stage]}
        self.own = self._values()
        self.preset = w.Dropdown(options=[OWN, HERE, DEMO, *recipes(stage)], description="preset")
        tell(self.preset, "Preset: moves every control; own goes back to your values")
        self.preset.observe(self._chosen, names="value")
        self.run = w.Button(description="run with these", layout=w.Layout(width="auto"))
        tell(self.run, "Run the cells below with the values shown")
        self.run.on_click(lambda _: self.run_below())
        self.notice, self.out = w.HTML(), w.Output()
        self._do("panel.js", "")
        plain, rest = ([r for r in self.rows.values() if r.param.advanced is kind] for kind in (False, True))
        wrap = w.Layout(flex_flow="row wrap", align_items="center")
        parts = [w.HTML(f"<style>{(PLACE / 'panel.css').read_text()}</style><div class='tunebook-said'>{WINS}</div>")]
        parts += [w.HBox([self.preset, self.run], layout=wrap), self.notice, self.out, *(r.view for r in plain)]
        self.upload = Upload(self) if stage == "data" else None
        self.outlook = Outlooks(self) if stage in ("sft", "orpo") else None
        parts += [part.view for part in (self.upload, self.outlook) if part]
        self.filter = w.Text(description="filter", placeholder="word of a name or a meaning", continuous_update=True)
        tell(self.filter, "Filter: show only the folded parameters with these words")
        self.filter.observe(lambda _: self._filter(), names="value")
        self.groups = {name: (w.HTML(f"<b>{escape(name)}</b>"), rows) for name, rows in grouped(rest).items()}
        inside = [part for head, rows in self.groups.values() for part in (head, *(r.view for r in rows))]
        self.fold = w.Accordion(children=[w.VBox(inside)], selected_index=None)
        self.fold.set_title(0, f"{len(rest)} more")
        self.view = w.VBox([*parts, self.filter, self.fold])
        self.view.add_class("tunebook-panel")
        params.when_frozen(self.lock)

    def _values(self) -> dict[str, Any]:
        return {p.name: getattr(self.params, p.name) for p in STAGES[self.stage]}

    def _moved(self, row: Row) -> None:
        if not row.refused:
            self.own, self.preset.value = self._values(), OWN
        self.refresh(row.param.name)

    def refresh(self, name: str = "") -> None:
        """Show anew what hangs on the values. name: the parameter that was moved; "": any."""
        if self.outlook:
            self.outlook.draw()
        if self.upload and name in ("", "dataset", "format", "columns", "dataset_info", "unanswerable"):
            self.upload.draw()

    def _chosen(self, event: dict[str, Any]) -> None:
        """Move every control to a preset's values. A run keeps its name."""
        if event["new"] == OWN and self.own == self._values():
            return
        try:
            values = self.own if event["new"] == OWN else preset(self.stage, event["new"], self.params)
        except TunebookError as error:
            self.notice.value = red(error)
            return
        refused = [row.set(values[name]) for name, row in self.rows.items() if name != "run"]
        for row in self.rows.values():
            row.refused = ""
            row.draw()
        changed = (f"{n} = {v!r}" for n, v in self.params.changed().items() if n != "run")
        said = "; ".join(changed)[:600] or "every default"
        told = f"<div class='tunebook-said'>Preset <b>{escape(event['new'])}</b>: {escape(said)}.</div>"
        self.notice.value = red(next(filter(None, refused), "")) or told
        self.refresh()

    def _filter(self) -> None:
        words = self.filter.value.lower().split()
        for head, rows in self.groups.values():
            for row in rows:
                text = f"{row.param.name} {row.param.name.replace('_', ' ')} {row.param.meaning} {head.value}".lower()
                row.view.layout.display = None if all(word in text for word in words) else "none"
            head.layout.display = None if any(row.view.layout.display != "none" for row in rows) else "none"
        if words:
            self.fold.selected_index = 0

    def lock(self) -> None:
        """The stage has begun: its values are what they are."""
        for control in (self.preset, *(control for row in self.rows.values() for control in row.controls)):
            control.disabled = True
        self.notice.value = red(
            "The stage has begun with the values shown; a change is of no effect. For other values run the notebook "
            "from its first cell: they are set in a new panel."
        )

    def run_below(self) -> None:
        """Have the notebook run the cells below this one, where its frontend lets a widget do that."""
        if "google.colab" in sys.modules:
            self.notice.value = red("Colab lets no button run cells; choose Runtime ▸ Run after (Ctrl+F10).")
            return
        self._do("run_below.js", "This frontend lets no button run cells; choose 'Run All Below' in its menu.")

    def _do(self, script: str, otherwise: str) -> None:
        """Have the frontend run a script of ours, or show `otherwise` where it runs none."""
        data = {"application/javascript": f"{(PLACE / script).read_text()}\n// {time.time()}", "text/plain": otherwise}
        self.out.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)

    def watch(self, events: Any) -> None:
        """Say when the cells below run, from IPython's own events."""
        self.made = time.monotonic()

        def begins(info: Any) -> None:
            events.unregister("pre_run_cell", begins)
            at_once = "Run All: the cells below are already running" if time.monotonic() - self.made < AT_ONCE_S else ""
            said = f"{at_once or 'The cells below run'} with the values shown."
            if "notebook.start(" not in (info.raw_cell or ""):  # else a new panel takes this one's place
                self.notice.value = f"<div class='tunebook-said'><b>{said}</b></div>"

        events.register("pre_run_cell", begins)


def grouped(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows under the groups of panel_groups.yaml; what none lists under "Other"."""
    of = {name: group for group, names in yaml.safe_load(GROUPS.read_text()).items() for name in names}
    order = [*dict.fromkeys(of.values()), "Other"]
    found = {group: [row for row in rows if of.get(row.param.name, "Other") == group] for group in order}
    return {group: rows for group, rows in found.items() if rows}


def recipes(stage: str) -> list[str]:
    """The recipes with a file for the stage."""
    return sorted(file.parent.name for file in (machine.PROJECT / "notebooks/recipes").glob(f"*/{stage}.yaml"))


def preset(stage: str, name: str, params: Params) -> dict[str, Any]:
    """Every value of a preset. For this machine: what names data, models and runs stays. Raises TunebookError."""
    if name == HERE:
        gpu = machine.gpu()
        known = "cpu" if gpu is None else "a100" if gpu.total_gib > 30 and gpu.capability >= (8, 0) else "t4"
    made = parameters.recipe(known if name == HERE else "cpu" if name == DEMO else name).get(stage)
    made = made or parameters.resolve(stage)
    values = {p.name: getattr(made, p.name) for p in STAGES[stage]}
    texts = [p for p in STAGES[stage] if isinstance(p.default, str) and not p.choices] if name == HERE else []
    mine = {p.name: getattr(params, p.name) for p in texts}
    values |= {p.name: mine[p.name] for p in texts if p.name not in made.changed() or mine[p.name] != p.default}
    return values


class Outlooks:
    """What the values of 02 or 03 come to here and on other GPUs: memory as bars, time, cost at a price an hour."""

    def __init__(self, panel: Panel) -> None:
        import ipywidgets as w

        self.params: Any = panel.params
        self.estimate = training.Estimate()
        self.table = w.HTML("<div class='tunebook-said'>Comes with the first change of a value.</div>")
        style, wide = {"description_width": "5em"}, w.Layout(width="10em")
        self.prices = {n: w.FloatText(description=n, style=style, layout=wide) for n in ("here", *training.CARDS)}
        for name, field in self.prices.items():
            tell(field, f"Price of an hour on {name}, in your currency")
            field.observe(lambda _: self.draw(), names="value")
        prices = w.HBox([*self.prices.values()], layout=w.Layout(flex_flow="row wrap"))
        asked = w.HTML("<span class='tunebook-quiet'>Price of an hour, in your currency (0: not known):</span>")
        self.view = w.VBox([w.HTML("<b>What this comes to</b>"), self.table, asked, prices])

    def draw(self) -> None:
        """Plan anew and show it."""
        try:
            trained, every, outlooks = self.estimate(self.params)
        except (TunebookError, OSError, ValueError, KeyError) as error:
            self.table.value = f"<div class='tunebook-said'>No estimate: {escape(error)}</div>"
            return
        share = display.percent(trained / every, 2)
        said = f"Trained: <b>{trained:,}</b> of {every:,} parameters ({share}). Time is training alone, predicted."
        said += f"<br>{escape(proposals.used(self.params, every)[1])}"
        rows = [self._line(name, o) for name, o in zip(self.prices, outlooks, strict=True)]
        head = "".join(f"<th scope='col'>{name}</th>" for name in ("GPU", "memory", "", "time", "cost"))
        table = f"<table><tr>{head}</tr>{''.join(rows)}</table>"
        wrong = [n for n, field in self.prices.items() if not (field.value >= 0 and math.isfinite(field.value))]
        price = f"The price of an hour on {', '.join(wrong)} is not valid; give 0 or more." if wrong else ""
        self.table.value = f"{red(outlooks[0].why)}{red(price)}<div class='tunebook-said'>{said}</div>{table}"

    def _line(self, name: str, one: training.Outlook) -> str:
        total, need = one.card.total_gib, one.need_gib
        over = need > total
        memory = f"{need:.1f} of {total:.1f} GiB" if need else "–"
        full = 100 * min(need / total, 1)
        label = f"role='img' aria-label='{escape(name)}: memory {memory}{', too much' if over else ''}'"
        bar = f"<div class='tunebook-bar' {label}><div {'class=over ' * over}style='width:{full:.0f}%'></div></div>"
        seconds, limit, price = one.seconds, self.params.max_minutes * 60, self.prices[name].value
        took, cost = f"<span title='{escape(one.why)}'>{'does not fit' if over else 'cannot run'}</span>", "–"
        if seconds is not None:
            took = "{} ({} to {})".format(*map(display.duration, seconds))
            if limit and seconds[0] > limit:
                took = f"{display.duration(limit)} of {display.duration(seconds[0])} (max_minutes)"
            spent = min(seconds[0], limit or seconds[0])
            cost = f"{price * spent / 3600:,.2f}" if price > 0 and math.isfinite(price) else "–"
        card = f"here ({escape(one.card.name)})" if name == "here" else name
        return f"<tr><th scope='row'>{card}</th><td>{bar}</td><td>{memory}</td><td>{took}</td><td>{cost}</td></tr>"


class Upload:
    """01's button for a file of one's own, and what the first rows of `dataset` are read as."""

    def __init__(self, panel: Panel) -> None:
        import ipywidgets as w

        self.panel, self.said = panel, ""
        kinds = ",".join((*sources.READABLE, *files.PACKED))
        self.button = w.FileUpload(accept=kinds, multiple=False, description="upload a file")
        self.button.layout.width = "max-content"
        tell(self.button, "Upload a file of rows or a document; it becomes the dataset")
        self.button.observe(self._came, names="value")
        self.preview = w.HTML()
        self.view = w.VBox([self.button, self.preview])

    def _came(self, event: dict[str, Any]) -> None:
        new = event["new"]  # ipywidgets 7: by name; 8: one after the other
        for name, file in new.items() if isinstance(new, dict) else [(one["name"], one) for one in new]:
            try:
                path, self.said = sources.keep(name, bytes(file["content"])), ""
            except (TunebookError, OSError) as error:
                self.said = str(error)
                self.draw()
                continue
            row = self.panel.rows["dataset"]
            row.refused = row.set(path)
            row.draw()
            self.panel._moved(row)

    def draw(self) -> None:
        """Show the first rows and the mapping found; nothing is written."""
        try:
            self.preview.value = red(self.said) + sources.peek(cast(DataParams, self.panel.params)).markup
        except (TunebookError, OSError, ValueError) as error:
            self.preview.value = red(self.said) + red(error)
