"""What a terminal shows of a run: a line a stage with its bar and the time that is left of the whole.

On a terminal the line of the stage at work is redrawn every second, in colour unless NO_COLOR is set; elsewhere it is
written at a quarter, a half and three quarters. Everything else that is said is in runs/NAME/log.txt.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from helpers import display, params, runs

# Seconds that the stages of the default run took on 2 CPU cores without the time of training itself.
USUAL = {"data": 15, "sft": 40, "orpo": 40, "gguf": 75, "eval": 150}
TRAINING = 240  # seconds of a training that max_minutes does not bound, until its log says more
CLEAR = "\r\033[K"  # what stands on the terminal's line
MARKS = (0.25, 0.5, 0.75)
NOTES = 3  # lines of a stage's own that the terminal repeats


_boards: list[Board] = []


def of(plan: dict[str, params.Params]) -> Board:
    """The board that shows these stages: the last one made where they are among its own, else a new one."""
    if not (_boards and plan.keys() <= _boards[-1].expected.keys() and len(plan) == 1):
        _boards.append(Board(plan))
    return _boards[-1]


class Board:
    """The lines of a run. plan: the parameters of the stages that are to run, in order."""

    def __init__(self, plan: dict[str, params.Params]) -> None:
        self.live = sys.stdout.isatty()
        self.colour = self.live and "NO_COLOR" not in os.environ
        self.expected = {stage: expected(stage, chosen) for stage, chosen in plan.items()}
        self.took = self.usual = 60.0  # seconds of the finished stages, and those expected of them, drawn towards even

    def start(self, stage: str, chosen: params.Params) -> None:
        """Begin a stage's line."""
        self.stage, self.began, self.cell = stage, time.monotonic(), 0
        self.folder, self.marks, self.notes, self.part = runs.folder(chosen.run, stage), list(MARKS), 0, ""
        values = ", ".join(f"{n}={display.plain(v)}" for n, v in chosen.changed().items() if n not in ("run", "again"))
        self._say(f"\n[{runs.FOLDERS[stage]}] {values[:200]}")
        self.over = threading.Event()
        self.ticker = threading.Thread(target=self._tick, daemon=True)
        self.ticker.start()

    def end(self, said: str) -> None:
        """Replace the line by what came of the stage."""
        self.over.set()
        self.ticker.join()
        took = time.monotonic() - self.began
        self.took, self.usual = self.took + took, self.usual + self.expected.pop(self.stage)
        self._say(f"[{runs.FOLDERS[self.stage]}] {said} in {display.duration(took)}")

    def skip(self, stage: str, why: str) -> None:
        """A stage that is not run."""
        self.expected.pop(stage, None)
        self._say(f"[{runs.FOLDERS[stage]}] {why}")

    def write(self, text: str) -> None:
        """What a stage says as it works: its first lines are repeated. (papermill writes into this like a file.)"""
        said = (line.strip() for line in text.splitlines() if not line.endswith(": ready"))  # as every bootstrap ends
        for line in filter(None, said):
            self.notes += 1
            if self.notes <= NOTES:
                self._say(f"  {display.clean(line)[:300]}")
            elif self.notes == NOTES + 1:
                self._say("  … more in log.txt")

    def flush(self) -> None:
        sys.stdout.flush()

    def _say(self, line: str) -> None:
        self._raw(f"{CLEAR * self.live}{display.clean(line)}\n")

    def _raw(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def _tick(self) -> None:
        while not self.over.wait(1.0 if self.live else 5.0):
            share, left, doing = self.now()
            if self.live:
                self._raw(CLEAR + self._line(share, left, doing))
            elif self.marks and share >= self.marks[0]:
                self.marks = [mark for mark in self.marks if mark > share]
                self._raw(f"  {self._line(share, left, doing)}\n")

    def now(self) -> tuple[float, float, str]:
        """(share of the stage that is done, seconds left of the whole run, what it is doing)."""
        gone, usual = time.monotonic() - self.began, self.expected[self.stage]
        line = last_line(self.folder / "log.jsonl") if self.stage in ("sft", "orpo") else {}
        doing = f"cell {self.cell}"
        if line.get("left_s") is not None and line["step"] < line["of_steps"]:
            loss = line.get("loss")
            doing = f"step {line['step']} of {line['of_steps']}" + (
                f", loss {loss:.3f}" if display.finite(loss) else ""
            )
            usual = gone + line["left_s"] + 15
        here = max(usual - gone, 0.2 * gone, 1.0)  # later than expected: a guess that grows
        later = sum(seconds for stage, seconds in self.expected.items() if stage != self.stage)
        return gone / (gone + here), here + later * self.took / self.usual, doing

    def _line(self, share: float, left: float, doing: str) -> str:
        columns = shutil.get_terminal_size().columns if self.live else 200
        width = min(24, max(columns // 8, 4))  # of the bar: what it says is worth more
        room = max(columns - width - len(runs.FOLDERS[self.stage]) - 3, 10)
        full = round(share * width)
        bar = "█" * full + "░" * (width - full)
        if self.colour:
            bar = f"\033[32m{'█' * full}\033[2m{'░' * (width - full)}\033[0m"
        gone = display.duration(time.monotonic() - self.began)
        done, rest = display.percent(share, 0), display.duration(left)
        text = f"{done:>5}; about {rest} left of the whole run; {doing}, {gone} gone"
        if len(text) > room:
            text = f"{done:>5}; {doing}; {rest} left"
        return f"{runs.FOLDERS[self.stage]} {bar} {text[:room]}"


def expected(stage: str, chosen: Any) -> float:
    """Seconds that a stage will take: what it took in this run before, else as on 2 CPU cores."""
    for folder in sorted(runs.run_folder(chosen.run).glob(f"{runs.FOLDERS[stage]}*")):
        try:
            made = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if all(
                made["params"].get(n) == getattr(chosen, n) for n in ("max_minutes", "max_steps") if hasattr(chosen, n)
            ):
                return max(float(made["wall_s"]), 1.0) + 10
        except (OSError, ValueError, KeyError, TypeError):
            continue
    minutes = getattr(chosen, "max_minutes", None)
    training = 0 if minutes is None else 60 * minutes or TRAINING
    return USUAL[stage] + training * (1 + getattr(chosen, "sft_as_long", False))


def last_line(log: Path) -> dict[str, Any]:
    """The newest line of a training's log with a loss; {} before there is one."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4000))
            lines = re.findall(rb"^\{.*\}$", file.read(), re.M)
        found = [line for line in map(json.loads, lines) if "loss" in line and "of_steps" in line]
        return found[-1] if found else {}
    except (OSError, ValueError):
        return {}
