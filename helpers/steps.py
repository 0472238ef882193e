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
from collections.abc import Callable
from typing import Any, TypeVar

from helpers import display, drive, runs

Result = TypeVar("Result")


class Job:
    """A stage's work; `stage` is where it goes. Subclasses add the steps, in the order of the notebook's cells."""

    def __init__(self, stage: runs.Stage) -> None:
        self.stage = stage
        self._results: dict[str, Any] = {}


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
            return job._results[key]
        stage.check()
        if begins and stage.begin():
            for earlier, value in job._results.items():
                display.save(value, shown, earlier.split("(")[0])
        if begins:
            drive.keep(stage.path)
        try:
            result = work(job, *arguments, **named)
        except BaseException:
            runs.unlock(stage.params.run, stage.name)  # another process may have the stage until this cell is run again
            raise
        if stage.begun and name != "finish":
            display.save(result, shown, name)
            drive.keep(stage.path)
        job._results[key] = result
        return result

    return once
