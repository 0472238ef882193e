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
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ci import colab, pipeline, progress
from helpers import chat, display, machine, notebook, runs, steps
from helpers.errors import TunebookError
from helpers.evaluate import statistics
from helpers.panel import Panel
from helpers.report.facts import TITLES
from helpers.train import methods

MACHINE = "for this machine"
FORM = {"run": "default", "preset": MACHINE, "model": "", "dataset": "", "test_dataset": ""}
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
    for stage in ("sft", "orpo"):
        if stage in plan:
            methods.import_first(plan[stage])
    return Quick(plan)


class Line(progress.Board):
    """The run's board as one line of a notebook; what the stages say is in their folds."""

    def __init__(self, plan: dict[str, Any]) -> None:
        import ipywidgets as w

        super().__init__(plan)
        self.view, self.first, self.share = w.HTML(), time.monotonic(), 0.0

    def _raw(self, text: str) -> None:
        if text.startswith("["):  # a stage is over, or was left out
            self._draw(self.share if self.expected else 1.0, text)

    def _tick(self) -> None:
        while not self.over.wait(1.0):
            _, left, doing = self.now()
            gone = time.monotonic() - self.first
            told = f"{TITLES[self.stage]}: {doing} · {display.duration(gone)} gone, about {display.duration(left)} left"
            self._draw(max(self.share, gone / (gone + left)), f"{told} of the whole")

    def _draw(self, share: float, said: str) -> None:
        self.share = share
        bar = f"<progress style='width:100%' max='1' value='{share:.3f}' aria-label='The whole run'></progress>"
        self.view.value = f"{bar} {display.escape(said)}"


class Quick:
    """All stages of a run in this kernel. plan: the parameters of each, in order."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan, self.run = plan, next(iter(plan.values())).run
        self._watched = machine.interactive()
        if self._watched:
            self._display(_accordion({f"{_title(s)}: parameters": Panel(s, p).view for s, p in plan.items()}))

    def work(self) -> None:
        """Every stage, from where the run stands. What is finished with the same parameters is shown, not run again."""
        board, began = progress.Board(self.plan), time.monotonic()
        if self._watched:
            import ipywidgets as w

            board, self._folds = Line(self.plan), {stage: w.Output() for stage in self.plan}
            self._view = _accordion({_title(stage): fold for stage, fold in self._folds.items()})
            self._display(w.VBox([board.view, self._view]))
        for stage, chosen in self.plan.items():
            if why := steps.needless(stage, chosen):
                board.skip(stage, f"skipped: {why}")
                continue
            board.start(stage, chosen)
            said = "stopped"
            try:
                with self._fold(stage):
                    self._cells(stage, board)
                said = "finished"
            finally:
                board.end(said)
            gc.collect()
            if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
                torch.cuda.empty_cache()
        board._say(f"[{self.run}] done in {display.duration(time.monotonic() - began)}")

    def verdict(self) -> display.Html:
        """What the run came to, in the report's words, and the paired comparisons."""
        came_to = runs.load(self.run, "eval", verify=False)
        told = display.said(*statistics.sentences(came_to.metrics))
        return told + (display.load(came_to.path / "shown", "comparisons") or display.said())

    def chat(self) -> Any:
        """Talk to the exported file, beside the base."""
        return chat.of_run(self.run)

    def downloads(self) -> Any:
        """The report, and every file to take along."""
        return colab.downloads(self.run)

    # ------------------------------------------------------------ how it is done

    def _cells(self, stage: str, board: progress.Board) -> None:
        """A notebook's code cells after its parameters, in a namespace of their own; what ends one is shown."""
        path = machine.PROJECT / "notebooks" / f"{runs.FOLDERS[stage]}.ipynb"
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        namespace: dict[str, Any] = {"_chosen": self.plan[stage], "__name__": path.stem}
        for board.cell, cell in enumerate(cells[2:], 1):
            source = "".join(cell["source"])
            if not any(name in source for name in AT_THE_END):
                value = _run(source, namespace, path)
                if value is not None and self._watched:
                    self._display(value)

    def _display(self, value: Any) -> None:
        from IPython.display import display as show

        show(value)

    @contextlib.contextmanager
    def _fold(self, stage: str) -> Iterator[None]:
        """Put what is shown into the stage's fold. An Output widget keeps errors to itself: they are raised here."""
        if not self._watched:
            yield
            return
        caught: list[BaseException] = []
        self._view.selected_index = list(self.plan).index(stage)
        with self._folds[stage]:
            try:
                yield
            except BaseException as error:
                caught.append(error)
        if caught:
            raise caught[0]
        self._view.selected_index = None


def _title(stage: str) -> str:
    return f"{runs.FOLDERS[stage][:2]} {TITLES[stage]}"


def _accordion(parts: dict[str, Any]) -> Any:
    """Folded widgets under their titles."""
    import ipywidgets as w

    made = w.Accordion(children=list(parts.values()), selected_index=None)
    for place, title in enumerate(parts):
        made.set_title(place, title)
    return made


def _run(source: str, namespace: dict[str, Any], path: Path) -> Any:
    """Run a cell; returns the value of the expression that ends it."""
    tree = ast.parse(source, path.name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, path.name, "exec"), namespace)
    return eval(compile(ast.Expression(last.value), path.name, "eval"), namespace) if last else None
