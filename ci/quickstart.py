"""All stages of a run in one kernel, for notebooks/00_quickstart.ipynb: the cells of notebooks 01 to 05, one by one.

quick = quickstart.start(globals())      the preset's parameters for every stage, in one panel
quick.work()                             runs them; one line says how far the whole is
quick.verdict()  quick.chat()  quick.downloads()
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import gc
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ci import colab, pipeline
from helpers import chat, display, machine, notebook, runs
from helpers.errors import TunebookError
from helpers.report.facts import TITLES
from helpers.train import methods

MACHINE = "for this machine"
FORM = {"run": "default", "preset": MACHINE, "model": "", "dataset": "", "test_dataset": ""}
# Seconds of each stage in the default run on 2 cores of a server processor: what the whole's line is divided by.
SECONDS = {"data": 9, "sft": 204, "orpo": 70, "gguf": 55, "eval": 100}
AT_THE_END = (
    "chat.of_run(",
    "colab.downloads(",
    "publish.offer(",
)  # cells that the quickstart has once, below the verdict


def start(namespace: Mapping[str, Any]) -> Quick:
    """The quickstart of a notebook's globals, its panel shown. Raises TunebookError for a wrong name or value."""
    given = FORM | notebook.read_globals(namespace)
    for name in given.keys() - FORM.keys():
        near = difflib.get_close_matches(name, FORM) or FORM
        raise TunebookError(f"The quickstart has no parameter {name!r}; did you mean {', '.join(near)}?")
    preset = pipeline.default_recipe() if given["preset"] in ("", MACHINE) else given["preset"]
    plan = pipeline.resolve(preset, [], str(given["run"]))
    if missing := [stage for stage in ("data", "sft", "eval") if stage not in plan]:
        raise TunebookError(f"The preset {given['preset']!r} has no {', '.join(missing)}.yaml; name cpu, t4 or a100.")
    data = plan["data"]
    data.model = given["model"] or data.model
    if given["dataset"]:  # the preset's other files belong to its own rows
        data.dataset, data.test_dataset = given["dataset"], given["test_dataset"]
        data.preference_dataset = data.database = ""
    if not data.preference_dataset:
        plan.pop("orpo", None)
        display.say("There are no preference pairs: notebook 03 is left out.")
    for stage in ("sft", "orpo"):
        if stage in plan:
            methods.import_first(plan[stage])
    return Quick(plan)


class Quick:
    """plan: the parameters of each stage, in order; folds: where each stage shows what it did, if somebody watches."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan, self.run = plan, next(iter(plan.values())).run
        self.folds: dict[str, Any] = {}
        self._watched = machine.interactive()
        self._at, self._share, self._started = next(iter(plan)), 0.0, time.monotonic()
        if self._watched:
            import ipywidgets as w
            from IPython.display import display as show

            panels = w.Accordion(children=[notebook.panel(s, p) for s, p in plan.items()], selected_index=None)
            for place, stage in enumerate(plan):
                panels.set_title(place, f"{runs.FOLDERS[stage][:2]} {TITLES[stage]}: parameters")
            show(panels)

    def work(self) -> None:
        """Every stage, from where the run stands. What is finished with the same parameters is shown, not run again."""
        self._started = time.monotonic()
        with self._line():
            for stage in self.plan:
                self._at, self._share = stage, 0.0
                begun = time.monotonic()
                with self._fold(stage):
                    self._cells(stage)
                gc.collect()
                if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
                    torch.cuda.empty_cache()
                if not self._watched:
                    display.say(f"[{runs.FOLDERS[stage]}] {display.duration(time.monotonic() - begun)}; {self._told()}")
            self._share = 1.0

    def verdict(self) -> display.Html:
        """What the run came to, in words and in the paired comparisons."""
        shown = runs.folder(self.run, "eval") / "shown"
        words = display.said(str(runs.load(self.run, "eval", verify=False).metrics.get("headline") or ""))
        return words + (display.load(shown, "comparisons") or display.said())

    def chat(self) -> Any:
        """Talk to the exported file, beside the base."""
        return chat.of_run(self.run)

    def downloads(self) -> Any:
        """The report, and every file to take along."""
        return colab.downloads(self.run)

    # ------------------------------------------------------------ how it is done

    def _cells(self, stage: str) -> None:
        """A notebook's code cells after its parameters, in a namespace of their own; what ends one is shown."""
        path = machine.PROJECT / "notebooks" / f"{runs.FOLDERS[stage]}.ipynb"
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        sources = ["".join(cell["source"]) for cell in cells[2:]]
        namespace: dict[str, Any] = {"_chosen": self.plan[stage], "__name__": path.stem}
        for done, source in enumerate(sources):
            self._share = max(self._share, done / len(sources))
            if not any(name in source for name in AT_THE_END):
                self._show(_run(source, namespace, path))

    def _show(self, value: Any) -> None:
        if value is not None and self._watched:
            from IPython.display import display as show

            show(value)

    @contextlib.contextmanager
    def _fold(self, stage: str) -> Iterator[None]:
        """Put what is shown into the stage's fold. An Output widget keeps errors to itself: they are raised here."""
        if not self._watched:
            yield
            return
        caught: list[BaseException] = []
        place = list(self.plan).index(stage)
        self._view.selected_index = place
        with self.folds[stage]:
            try:
                yield
            except BaseException as error:
                caught.append(error)
        if caught:
            raise caught[0]
        self._view.selected_index = None

    @contextlib.contextmanager
    def _line(self) -> Iterator[None]:
        """One line over the whole, drawn anew every second, and below it a fold for each stage."""
        if not self._watched:
            yield
            return
        import ipywidgets as w
        from IPython.display import display as show

        line, ended = w.HTML(), threading.Event()
        self.folds = {stage: w.Output() for stage in self.plan}
        self._view = w.Accordion(children=list(self.folds.values()), selected_index=None)
        for place, stage in enumerate(self.plan):
            self._view.set_title(place, f"{runs.FOLDERS[stage][:2]} {TITLES[stage]}")

        def draw() -> None:
            line.value = f"<progress style='width:100%' max='1' value='{self._done():.3f}'></progress> {self._told()}"

        def redraw() -> None:
            while not ended.wait(1.0):
                draw()

        show(w.VBox([line, self._view]))
        threading.Thread(target=redraw, daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            draw()

    def _done(self) -> float:
        """Share of the whole that is done, by what the stages usually take."""
        stages = list(self.plan)
        before = sum(SECONDS[s] for s in stages[: stages.index(self._at)])
        return (before + SECONDS[self._at] * max(self._share, self._trained())) / sum(SECONDS[s] for s in stages)

    def _trained(self) -> float:
        """Of a training stage: the share of its steps that its log has."""
        log = runs.folder(self.run, self._at) / "log.jsonl"
        if self._at not in ("sft", "orpo") or not log.is_file():
            return 0.0
        with contextlib.suppress(ValueError, KeyError, IndexError, OSError, ZeroDivisionError):
            last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
            return 0.9 * last["step"] / last["of_steps"]
        return 0.0

    def _told(self) -> str:
        gone, done = time.monotonic() - self._started, self._done()
        place = f"{list(self.plan).index(self._at) + 1} of {len(self.plan)}: {TITLES[self._at].lower()}"
        if done >= 1:
            return f"Done in {display.duration(gone)}."
        left = f", about {display.duration(gone / done - gone)} left" if done > 0.05 and gone > 10 else ""
        return f"{place} · {done:.0%} of the whole · {display.duration(gone)} gone{left}"


def _run(source: str, namespace: dict[str, Any], path: Path) -> Any:
    """Run a cell; returns the value of the expression that ends it."""
    tree = ast.parse(source, path.name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, path.name, "exec"), namespace)
    return eval(compile(ast.Expression(last.value), path.name, "eval"), namespace) if last else None
