"""A stage's work in steps: each is done once, however often its cell is run, and shown again from what it left.

    class SftJob(steps.Job):
        @steps.step                 the cell's call: begins the stage, works, keeps what it showed
        def train(self): ...

        @steps.look                 shows something before the work; sets nothing aside, writes nothing
        def plan(self): ...

A step called a second time returns what it returned the first time. In a finished stage (`Stage.done`) nothing is
computed: what the step showed then comes from `shown/` in the stage's folder.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from helpers import display, drive, machine, runs
from helpers.errors import Stopped

Result = TypeVar("Result")


class Job:
    """A stage's work; `stage` is where it goes. Subclasses add the steps, in the order of the notebook's cells."""

    def __init__(self, stage: runs.Stage) -> None:
        self.stage = stage
        self._results: dict[str, Any] = {}
        if stage.done:
            display.say(stage.note)

    def watch(self, other: str) -> None:
        """Show what another process does with this stage, until it ends. Most stages have nothing to show."""

    def stopped(self, step: str) -> str:
        """What to say when a person stops a step."""
        return f"Stopped in {step}(); run the cell again to go on."


def needless(stage: str, params: Any) -> str:
    """Why a stage has nothing to do in its run, "" when it has: preference training of data without preferences."""
    if stage != "orpo" or not (runs.folder(params.run, "data") / "manifest.json").is_file():
        return ""
    written = runs.load(params.run, "data", verify=False).data["artifacts"]
    files = {"preference.parquet"} | ({"kto.parquet"} if params.loss == "kto" else set())
    return "" if files & set(written) else "the data has no preference pairs; 04 and 05 go on with notebook 02's model"


class Nothing:
    """In the place of a job that has nothing to do: its steps show nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments, **named: None


def step(work: Callable[..., Result]) -> Callable[..., Result]:
    """A method (or a function whose first argument is a Job) that works once and then shows what it came to."""
    return _once(work, begins=True)


def look(work: Callable[..., Result]) -> Callable[..., Result]:
    """Like `step`, for what is shown before the work: it does not begin the stage."""
    return _once(work, begins=False)


def _once(work: Callable[..., Result], begins: bool) -> Callable[..., Result]:
    name = work.__name__

    @functools.wraps(work)
    def once(job: Any, *arguments: Any, **named: Any) -> Any:
        key = name + (repr((arguments, sorted(named.items()))) if arguments or named else "")
        stage, shown = job.stage, job.stage.path / "shown"
        if key not in job._results and stage.done is not None:
            job._results[key] = stage.done if name == "finish" else display.load(shown, name)
        if key in job._results:
            if stage.done and (moved := stage.moved()):
                display.say(f"Shown as it was made: {moved}")
            return job._results[key]
        stage.check()
        stopped = ""
        try:
            other = runs.worker(stage.params.run, stage.name) if begins and machine.interactive() else ""
            if other:
                job.watch(other)
                if stage.done:
                    return once(job, *arguments, **named)
            if begins and stage.finished_meanwhile():
                display.say(stage.note)
                return once(job, *arguments, **named)
            if begins and stage.begin():
                for earlier, value in job._results.items():
                    display.save(value, shown, earlier.split("(")[0])
            if begins:
                drive.keep(stage.path)
            result = work(job, *arguments, **named)
        except KeyboardInterrupt as interrupt:
            traceback.clear_frames(interrupt.__traceback__)  # they hold a model, and so do those of what is raised here
            stopped = job.stopped(name)
        except BaseException:
            runs.unlock(stage.params.run, stage.name)  # another process may have the stage until this cell is run again
            raise
        if stopped:
            runs.unlock(stage.params.run, stage.name)
            raise Stopped(stopped)
        if stage.begun and name != "finish":
            display.save(result, shown, name)
            drive.keep(stage.path)
        job._results[key] = result
        return result

    return once
