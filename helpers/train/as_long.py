"""SFT trained further, from the same adapter, for the minutes that preference training took: what notebook 05 compares
preference training with. Without it a gain may come from training longer alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from helpers import display, plots, runs, worker
from helpers.evaluate.candidates import AS_LONG_FOLDER
from helpers.train import callbacks

OURS = {"mirror", "loggers", "sample_every", "early_stopping", "max_steps", "eval_steps", "save_steps"}


def train(stage: runs.Stage, seconds: float) -> Path:
    """The adapter, trained for so many seconds in a process of its own; a killed one goes on from its checkpoint."""
    sft, made = stage.parents["sft"], stage.path / AS_LONG_FOLDER
    if made.is_dir():
        return made
    scratch = stage.path / "work" / AS_LONG_FOLDER
    data = scratch / stage.params.run / runs.FOLDERS["data"]
    data.parent.mkdir(parents=True, exist_ok=True)
    if not data.exists():
        data.symlink_to(stage.parents["data"].path.resolve(), target_is_directory=True)
    values = {name: value for name, value in sft.params.items() if name not in OURS}
    values |= {"run": stage.params.run, "again": False, "score_rows": 0, "epochs": 100.0, "max_minutes": seconds / 60}
    values["start_from"] = str(sft.path / "adapter")
    display.say(f"SFT goes on for as long as this took, {display.duration(seconds)}, for notebook 05 to compare both.")
    view = callbacks.View(lambda lines: plots.training_curves(lines, "SFT, as long"), "SFT, as long")
    lines = list[dict[str, Any]]()

    def told(line: dict[str, Any]) -> None:
        lines.append(line)
        view.show(lines)

    with worker.Worker("helpers.train.training:further", name="SFT, as long") as child:
        done = child.ask({"runs": str(scratch), "params": values}, told, timeout_s=None)
    view.close()
    shutil.move(done, made)
    shutil.rmtree(scratch.parent)
    return made


class Tell(TrainerCallback):
    """Each line of a job's log, sent to whom it may concern."""

    def __init__(self, job: Any, event: Callable[[Any], None]) -> None:
        self.job, self.event, self.told = job, event, 0

    def on_log(self, args, state, control, **kwargs):
        for line in self.job.lines()[self.told :]:
            self.event(line)
            self.told += 1
