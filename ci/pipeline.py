"""Run the notebooks of a run through papermill, one after another, and end with the scores and the report.

    python ci/pipeline.py [--run NAME] [--params FILE] [-p STAGE.NAME VALUE]... [--from 03] [--to 05] [--fresh]

Parameter files have a section for each stage (data, sft, orpo, gguf, eval). A stage that is finished with the same parameters,
parents and code is used again; --from runs that stage and those after it anew, --fresh all. A killed run goes on with the same command.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from helpers import params, runs
from helpers.errors import TunebookError

STAGES = list(runs.FOLDERS)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="default", help="name of the run: its folder under runs/")
    parser.add_argument(
        "--params",
        type=Path,
        help="YAML file with a section for each stage; default: the one for this machine in ci/params/",
    )
    parser.add_argument(
        "-p", dest="single", nargs=2, action="append", default=[], metavar=("STAGE.NAME", "VALUE"), help="one parameter"
    )
    parser.add_argument(
        "--from", dest="first", default="01", help="first notebook to run anew (01 to 05, or a stage's name)"
    )
    parser.add_argument("--to", dest="last", default="05", help="last notebook to run")
    parser.add_argument("--fresh", action="store_true", help="run every stage anew")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = arguments(argv)
    try:
        first, last = _stage(options.first), _stage(options.last)
        plan = resolve(options.params or default_params(), options.single, options.run)
        for number, stage in enumerate(STAGES):
            if number < STAGES.index(first):
                runs.load(options.run, stage)
        anew = options.fresh or options.first != "01"
        started = time.time()
        for stage in STAGES[STAGES.index(first) : STAGES.index(last) + 1]:
            if not anew and (manifest := runs.is_done(stage, plan[stage])):
                print(
                    f"[{runs.FOLDERS[stage]}] is done already with these parameters ({manifest.data['finished_at']}); --fresh runs it anew"
                )
                continue
            anew = True
            execute(stage, plan[stage])
        print(f"\nThe run took {time.time() - started:.0f} s: {runs.root() / options.run}")
        if last == "eval":
            print(summary(options.run))
    except TunebookError as error:
        print(f"\nStopped: {error}", file=sys.stderr)
        return 1
    return 0


def default_params() -> Path:
    """cpu.yaml without a GPU, t4.yaml below compute capability 8, a100.yaml from there on."""
    from helpers import machine

    card = machine.gpu()
    return (
        PROJECT
        / "ci"
        / "params"
        / ("cpu.yaml" if card is None else "t4.yaml" if card.capability < (8, 0) else "a100.yaml")
    )


def resolve(file: Path, single: list[list[str]], run: str) -> dict[str, params.Params]:
    """Every stage's parameters, all checked before any work begins."""
    import yaml

    try:
        sections = yaml.safe_load(file.read_text()) or {}
    except FileNotFoundError:
        raise TunebookError(
            f"The parameter file {file} is missing; ci/params/ has {', '.join(p.name for p in sorted((PROJECT / 'ci/params').glob('*.yaml')))}."
        ) from None
    except yaml.YAMLError as error:
        raise TunebookError(f"The parameter file {file} is no valid YAML ({str(error).splitlines()[0]}).") from error
    if not isinstance(sections, dict) or not all(
        s in STAGES and isinstance(v, (dict, type(None))) for s, v in sections.items()
    ):
        raise TunebookError(
            f"The parameter file {file} must have the sections {', '.join(STAGES)}, each with names and values."
        )
    given: dict[str, dict[str, Any]] = {s: dict(sections.get(s) or {}) for s in STAGES}
    for dotted, value in single:
        stage, _, name = dotted.partition(".")
        if stage not in STAGES or not name:
            raise TunebookError(
                f"-p {dotted} names no stage; write -p STAGE.NAME VALUE with a stage out of {', '.join(STAGES)}."
            )
        given[stage][name] = value
    return {s: params.resolve(s, {**given[s], "run": run}) for s in STAGES}


def execute(stage: str, chosen: params.Params) -> None:
    """One notebook through papermill. Its executed copy ends in the stage's folder whatever happens."""
    import papermill

    name = runs.FOLDERS[stage]
    print(f"\n[{name}] " + ", ".join(f"{n}={v}" for n, v in chosen.changed().items()))
    _log_to_terminal()
    os.environ["TUNEBOOK_HEADLESS"] = "1"
    output = runs.root() / chosen.run / ".executing" / f"{name}.ipynb"
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()
    try:
        papermill.execute_notebook(
            PROJECT / "notebooks" / f"{name}.ipynb",
            output,
            parameters=chosen.changed(),
            kernel_name="python3",
            progress_bar=False,
            log_output=True,
            cwd=str(PROJECT),
            extra_arguments=["--IPKernelApp.log_level=40"],
        )  # errors: it warns of TCP, which is on loopback and signed
        runs.load(
            chosen.run, stage, verify=False
        )  # a notebook that ended early raises nothing, but it leaves no manifest
    except papermill.PapermillExecutionError as error:
        what = (
            error.evalue
            if error.ename == "TunebookError"
            else f"{error.ename}: {error.evalue}\n{''.join(error.traceback[-6:])}"
        )
        raise TunebookError(f"{name} failed. {what}") from None
    except RuntimeError as error:  # nbclient's DeadKernelError is one
        raise TunebookError(
            f"{name}: the notebook's process died ({error}), often for lack of memory; the same command goes on "
            "where it stopped."
        ) from None
    finally:
        keep_executed(output, runs.folder(chosen.run, stage))
    print(f"[{name}] finished in {time.time() - started:.0f} s")


def keep_executed(output: Path, folder: Path) -> None:
    """Move the executed notebook into the stage's folder; beside the folders when the stage never opened one."""
    if output.exists():
        target = folder / "executed.ipynb" if folder.is_dir() else folder.parent / f"{folder.name}.failed.ipynb"
        shutil.move(output, target)


def summary(run: str) -> str:
    """The closing table: execution accuracy with its interval, valid SQL and file size of every candidate."""
    manifest = runs.load(run, "eval", verify=False)
    lines = [f"{'':<14}{'accuracy':>9}  {'95 % interval':<15}{'valid SQL':>10}{'n':>6}{'file size':>12}"]
    order = {"base": 0, "sft": 1, "orpo": 2, "merged": 3}
    for name, score in sorted(
        manifest.metrics["candidates"].items(), key=lambda item: (order.get(item[0], 9), item[0])
    ):
        size = f"{score['size_bytes'] / 1e6:.0f} MB" if score.get("size_bytes") else ""
        lines.append(
            f"{name:<14}{score['accuracy']:>9.1%}  {score['low']:.1%} – {score['high']:<7.1%}{score['valid']:>10.1%}{score['n']:>6}{size:>12}"
        )
    return "\n".join([*lines, "", f"Report: {runs.root() / run / 'report.html'}"])


def _stage(text: str) -> str:
    for stage, folder in runs.FOLDERS.items():
        if text in (stage, folder, folder[:2], folder[1:2]):
            return stage
    raise TunebookError(f"There is no notebook {text!r}; name one of {', '.join(runs.FOLDERS.values())} or its number.")


def _log_to_terminal() -> None:
    """papermill logs what cells print; show it as it comes, less its own chatter."""
    log = logging.getLogger("papermill")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("  %(message)s"))
        handler.addFilter(
            lambda record: (
                not record.getMessage().startswith(("Executing", "Ending Cell", "Input Notebook", "Output Notebook"))
            )
        )
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
