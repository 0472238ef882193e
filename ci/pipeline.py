"""Run the notebooks of a run through papermill, one after another, and end with the scores and the report.

    python ci/pipeline.py [--recipe NAME] [--run NAME] [-p STAGE.NAME VALUE]... [--from 03] [--to 05] [--fresh]

A recipe is a folder with a flat file for each stage that it needs (data, sft, orpo, gguf, eval .yaml). A stage that is
finished with the same parameters, parents and code is used again; --from runs that stage and those after it anew,
--fresh all. A killed run is resumed by the same command. All that the notebooks say is in runs/NAME/log.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from ci import progress
from helpers import display, machine, parameter, params, runs, steps
from helpers.errors import TunebookError, command
from helpers.evaluate import statistics

STAGES = list(runs.FOLDERS)
CHATTER = ("Executing", "Ending Cell", "Input Notebook", "Output Notebook", "Working directory")  # of papermill's log


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tunebook run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", help="its folder under runs/; default: the recipe's name, or default")
    parser.add_argument(
        "--recipe",
        default="",
        help="folder of a recipe, or its name in notebooks/recipes/; default: the one for this machine in ci/params/",
    )
    parser.add_argument(
        "-p", dest="single", nargs=2, action="append", default=[], metavar=("STAGE.NAME", "VALUE"), help="one parameter"
    )
    parser.add_argument("--from", dest="first", help="first notebook, run anew with those after it (01, or data)")
    parser.add_argument("--to", dest="last", default="05", help="last notebook to run (05, or eval)")
    parser.add_argument("--fresh", action="store_true", help="run every stage anew")
    return parser.parse_args(argv)


@command
def main(argv: list[str]) -> int:
    options = arguments(argv)
    folder = parameter.recipe_folder(options.recipe or default_recipe())
    options.run = (folder.resolve().name if options.recipe else "default") if options.run is None else options.run
    runs.run_folder(options.run)  # a bad name is refused before anything is written
    first, last = STAGES.index(_stage(options.first or "01")), STAGES.index(_stage(options.last))
    if first > last:
        raise TunebookError(f"--from {options.first} comes after --to {options.last}; name them in order.")
    plan = resolve(folder, options.single, options.run)
    chosen = {stage: plan[stage] for stage in STAGES[first : last + 1] if stage in plan}
    check_parents(chosen, STAGES[:first])
    started, board, order = time.monotonic(), progress.of(chosen), list(chosen.items())
    try:
        for (stage, its), following in zip(order, [*order[1:], None], strict=True):
            its.again = its.again or options.fresh or bool(options.first)
            if why := steps.needless(stage, its):
                runs.set_aside(runs.folder(its.run, stage))  # of other data; 04 must not take it
                board.skip(stage, f"skipped: {why}")
            elif manifest := finished(stage, its):
                done = f"is done already with these parameters ({manifest.data['finished_at']}); --fresh runs it anew"
                board.skip(stage, done)
            else:
                execute(stage, its, following)
    finally:
        end_others()
    display.say(f"\nThe run took {display.duration(time.monotonic() - started)}: {runs.run_folder(options.run)}")
    if "eval" in chosen:
        display.say(summary(options.run))
    return 0


def check_parents(chosen: dict[str, params.Params], earlier: list[str]) -> None:
    """Raise TunebookError for an earlier stage that these read and that is not there; one that they can do without is
    asked for only where it was begun and never finished."""
    for stage, its in chosen.items():
        needed = runs.parents_of(stage, its)
        for name in (parent for parent in earlier if parent in {p.rstrip("?") for p in runs.PARENTS[stage]}):
            begun = f"{name}?" in runs.PARENTS[stage] and (runs.folder(its.run, name) / "plan.json").is_file()
            if name in needed or begun:
                runs.load(its.run, name)


def finished(stage: str, chosen: params.Params) -> runs.Manifest | None:
    """The stage's manifest when it is finished with these parameters; what has none is not looked at any closer."""
    made = (runs.folder(chosen.run, stage) / "manifest.json").is_file()
    return runs.stage(stage, chosen).done if made else None


def default_recipe() -> Path:
    """ci/params/cpu without a GPU, t4 below compute capability 8, a100 from there on."""
    gpu = machine.gpu()
    name = "cpu" if gpu is None else "t4" if gpu.capability < (8, 0) else "a100"
    return PROJECT / "ci" / "params" / name


def resolve(recipe: str | Path, single: list[list[str]], run: str) -> dict[str, params.Params]:
    """The parameters of every stage that the recipe has, all checked before any work begins."""
    plan = params.recipe(recipe)
    for dotted, value in single:
        stage, _, name = dotted.partition(".")
        if stage not in plan or not name:
            raise TunebookError(
                f"-p {dotted} names no stage; write -p STAGE.NAME VALUE, the stage of {', '.join(plan)}."
            )
        setattr(plan[stage], name, value)
    for chosen in plan.values():
        chosen.run = run
    return plan


_begun: dict[str, Any] = {}  # stage → the kernel that waits for it


@contextlib.contextmanager
def kernel(stage: str, chosen: params.Params) -> Iterator[Any]:
    """The stage's kernel, ended afterwards."""
    from jupyter_core.utils import run_sync

    begin(stage, chosen)
    manager = _begun.pop(stage)
    end_others()
    try:
        yield manager
    finally:
        run_sync(manager.shutdown_kernel)()


def end_others() -> None:
    """End the kernels of stages that were done already, or that do not come any more."""
    from jupyter_core.utils import run_sync

    while _begun:
        run_sync(_begun.popitem()[1].shutdown_kernel)(now=True)


def begin(stage: str, chosen: params.Params) -> None:
    """Start the kernel of a stage, which imports what its notebook will (`ci.warm`)."""
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_core.utils import run_sync

    if stage not in _begun:
        first = f'__import__("ci.warm").warm.libraries({stage!r}, {getattr(chosen, "backend", "hf")!r})'
        # errors only: it warns of TCP, which is on loopback and signed
        how = ["--IPKernelApp.log_level=40", f"--IPKernelApp.exec_lines={first}"]
        _begun[stage] = AsyncKernelManager(kernel_name="python3")
        run_sync(_begun[stage].start_kernel)(extra_arguments=how, cwd=str(PROJECT))


def execute(stage: str, chosen: params.Params, following: tuple[str, params.Params] | None = None) -> None:
    """One notebook through papermill, while the following one's kernel gets ready. Its executed copy ends in the
    stage's folder whatever happens."""
    import papermill

    name, run, said, board = runs.FOLDERS[stage], runs.run_folder(chosen.run), "stopped", progress.of({stage: chosen})
    os.environ |= {"TUNEBOOK_HEADLESS": "1", "TQDM_DISABLE": "1"}
    output, log = run / ".executing" / f"{name}.ipynb", run / "log.txt"
    output.parent.mkdir(parents=True, exist_ok=True)
    board.start(stage, chosen)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_stderr_into(log, f"[{name}] {time.strftime('%Y-%m-%d %H:%M:%S')}"))
            stack.enter_context(_log_into(log, board, chosen))
            manager = stack.enter_context(kernel(stage, chosen))
            if following:
                begin(*following)
            papermill.execute_notebook(
                PROJECT / "notebooks" / f"{name}.ipynb",
                output,
                parameters=chosen.changed(),
                kernel_name="python3",
                progress_bar=False,
                log_output=True,
                stdout_file=board,
                cwd=str(PROJECT),
                km=manager,
                start_timeout=300,
            )
        runs.load(chosen.run, stage, verify=False)  # one that ended early raises nothing, but it leaves no manifest
        said = "finished"
    except papermill.PapermillExecutionError as error:
        ours = len(error.traceback) == 1  # TunebookError and its kinds show a line instead of a traceback
        what = error.evalue if ours else f"{error.ename}: {error.evalue}\n{''.join(error.traceback[-6:])}"
        raise TunebookError(f"{name} failed. {what}") from None
    except RuntimeError as error:  # nbclient's DeadKernelError is one
        raise TunebookError(
            f"{name}: the notebook's process died ({error}), often for lack of memory, see {log}; the same command "
            "resumes where it stopped."
        ) from None
    finally:
        keep_executed(output, run / name)
        board.end(said)


@contextlib.contextmanager
def _stderr_into(log: Path, title: str) -> Iterator[None]:
    """Send what this process and its children write to standard error into a file: a kernel that ends may add a
    traceback.
    """
    with open(log, "a", encoding="utf-8") as file:
        print(title, file=file, flush=True)
        sys.stderr.flush()
        terminal = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)


def keep_executed(output: Path, folder: Path) -> None:
    """Move the executed notebook into the stage's folder; beside the folders when the stage never opened one."""
    if output.exists():
        target = folder / "executed.ipynb" if folder.is_dir() else folder.parent / f"{folder.name}.failed.ipynb"
        shutil.move(output, target)


def summary(run: str) -> str:
    """The closing table: every candidate's score with its interval, valid SQL where that was asked for, file size."""
    metrics = runs.load(run, "eval", verify=False).metrics
    scores = metrics["candidates"]
    order = {"base": 0, "sft": 1, "sft as long": 2, "orpo": 3, "merged": 4}
    sql = any(score["valid"] is not None for score in scores.values())
    rows = [
        [
            name,
            display.percent(score["accuracy"]),
            display.interval(score["low"], score["high"]),
            *[display.percent(score["valid"])] * sql,
            score["n"],
            display.size(score["size_bytes"]) if score.get("size_bytes") else "",
        ]
        for name, score in sorted(scores.items(), key=lambda item: (order.get(item[0], 9), item[0]))
    ]
    header = ["", metrics["label"], "95 % interval", *["valid SQL"] * sql, "n", "file size"]
    page = runs.run_folder(run) / "report.html"
    told = "\n".join(f"- {sentence}" for sentence in statistics.sentences(metrics))
    return f"{display.text_table(rows, header)}\n\n{told}\n\nReport: {page}\n{page.resolve().as_uri()}"


def _stage(text: str) -> str:
    for stage, folder in runs.FOLDERS.items():
        if text in (stage, folder, folder[:2], folder[1:2]):
            return stage
    raise TunebookError(f"There is no notebook {text!r}; name one of {', '.join(runs.FOLDERS.values())} or its number.")


class _Visible(logging.Formatter):
    """What libraries print in a notebook, `clean` but for the carriage returns of progress bars."""

    def format(self, record: logging.LogRecord) -> str:
        return "\r".join(map(display.clean, super().format(record).split("\r")))


@contextlib.contextmanager
def _log_into(file: Path, board: progress.Board, chosen: params.Params) -> Iterator[None]:
    """Send what papermill logs, all that cells print and show, into a file; the cell number goes to the board."""
    log, handler = logging.getLogger("papermill"), logging.FileHandler(file, encoding="utf-8")
    known = {
        f"Passed unknown parameter: {name}" for name in chosen.changed()
    }  # not in the notebook's form, and checked

    def kept(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if cell := re.match(r"Executing Cell (\d+)-", said):
            board.cell = int(cell[1])
        return said not in known and not said.startswith(CHATTER)

    handler.addFilter(kept)
    handler.setFormatter(_Visible("%(message)s"))
    level, log.propagate = log.level, False
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        handler.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
