"""Watching a run: a line of JSON a step, a live curve, a stop when it goes wrong, sealed checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from helpers import display, machine
from helpers.errors import TunebookError
from helpers.train import distributed, resume

SCALER_STEPS = 10  # fp16's loss scale starts too high on purpose: its first steps overflow and are skipped
ZERO_STEPS = 3  # steps in a row without any gradient before a run is called dead
DIVERGED, HIGH_STEPS = 3.0, 10  # so many times the lowest smoothed loss, for so many steps, is a divergence


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a last line that a kill cut off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class Log(TrainerCallback):
    """log.jsonl: every number of every step with tokens/s, memory and time left. Where someone is watching, the curves
    are drawn anew every 3 seconds; else a line of text every 20.

    A resumed run first cuts off the lines after its checkpoint, so that the file reads like one unbroken run.
    """

    def __init__(self, path: Path, trainer: Any, draw: Callable[[], Any]) -> None:
        self.path, self.trainer, self.draw = path, trainer, draw
        self.watched, self.shown, self.handle = machine.interactive(), -math.inf, None

    def on_train_begin(self, args, state, control, **kwargs):
        kept = [line for line in read(self.path) if line["step"] <= state.global_step]
        self.before = max((line["seconds"] for line in kept), default=0.0)
        self.tokens_before = max((line.get("trained_tokens", 0) for line in kept), default=0)
        self.started, self.first_step = time.monotonic(), state.global_step
        self.last = (self.started, 0)
        if state.is_world_process_zero:
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or not state.is_world_process_zero or not hasattr(self, "started"):
            return
        now, tokens = time.monotonic(), getattr(self.trainer, "trained_tokens", 0)
        line = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        line |= {k: v for k, v in logs.items() if isinstance(v, (int, float))}
        line |= {"of_steps": state.max_steps, "seconds": round(self.before + now - self.started, 2)}
        if "loss" in logs:
            per_step = (now - self.started) / max(state.global_step - self.first_step, 1)
            line["left_s"] = round(per_step * (state.max_steps - state.global_step), 1)
            line["memory_gib"] = machine.peak_memory_gib()
            if tokens:
                line["trained_tokens"] = self.tokens_before + tokens
                line["tokens_per_s"] = round((tokens - self.last[1]) / max(now - self.last[0], 1e-6), 1)
        self.last = (now, tokens)
        # NaN and infinity are kept as text: the file stays readable for every JSON reader.
        values = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        if "loss" in logs and now - self.shown >= (3.0 if self.watched else 20.0):
            self.shown = now
            self._show(line)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.watched:
            self._show({})

    def _show(self, line: dict[str, Any]) -> None:
        if not self.watched:
            at = f"step {line['step']}/{line['of_steps']}  loss {line['loss']:.4f}"
            left = display.duration(line["left_s"])
            display.say(f"{at}  {line.get('tokens_per_s', 0):,.0f} tokens/s  {left} left")
        elif self.handle:
            self.handle.update(self.draw())
        else:
            import IPython.display

            self.handle = IPython.display.display(self.draw(), display_id=True)


class Samples(TrainerCallback):
    """Answers prompts by `sample(step)` every N steps, in every process: all gather a sharded model's weights."""

    def __init__(self, every: int, sample: Callable[[int], Any]) -> None:
        self.every, self.sample = every, sample

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            found = self.sample(state.global_step)
            if found and state.is_world_process_zero:
                display.say(f"step {state.global_step}: {found[0]['answer']!r}")


class Tracker(TrainerCallback):
    """A tracker (TensorBoard, wandb, trackio …) whose failure is announced once and does not end the training."""

    def __init__(self, tracker: TrainerCallback) -> None:
        self._tracker, self._failed = tracker, False

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def event(*arguments: Any, **given: Any) -> Any:
            try:
                return None if self._failed else getattr(self._tracker, name)(*arguments, **given)
            except Exception as error:  # whatever a service or its library raises
                self._failed = True
                said = f"{type(error).__name__}: {error}"[:300]
                display.say(f"{type(self._tracker).__name__} failed ({said}); training continues without it.")

        return event


def guard_trackers(trainer: Any) -> None:
    """Put a `Tracker` around every callback of transformers' integrations."""
    callbacks = trainer.callback_handler.callbacks
    for place, callback in enumerate(callbacks):
        if type(callback).__module__.startswith("transformers.integrations"):
            callbacks[place] = Tracker(callback)


class Guard(TrainerCallback):
    """Stops a run that cannot come right and names the rows of that step: NaN, no gradient, or a loss that diverges."""

    def __init__(self, trainer: Any = None, fp16: bool = False) -> None:
        self.trainer, self.fp16 = trainer, fp16
        self.smooth, self.lowest, self.high, self.zeros, self.skipped = math.nan, math.inf, 0, 0, 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        loss, norm = logs["loss"], logs.get("grad_norm")
        if not math.isfinite(loss):
            remedy = "lower learning_rate, or look at these rows (an empty answer, or one of thousands of repeats)"
            self._stop(state, f"the loss is {loss}", remedy)
        if norm is not None and not math.isfinite(norm):
            self.skipped += 1
            if not self.fp16 or self.skipped > SCALER_STEPS:
                remedy = "lower learning_rate" + (" or set precision to 'fp32'" if self.fp16 else "")
                self._stop(state, f"the gradient is {norm}", remedy)
            return
        self.skipped = 0
        self.zeros = self.zeros + 1 if norm == 0.0 and logs.get("learning_rate", 1) else 0
        if self.zeros >= ZERO_STEPS:
            remedy = "check that these rows have trained tokens and that target_modules names layers in use"
            self._stop(state, f"no weight had a gradient in {ZERO_STEPS} steps", remedy)
        self.smooth = loss if math.isnan(self.smooth) else 0.9 * self.smooth + 0.1 * loss
        self.lowest = min(self.lowest, self.smooth)
        self.high = self.high + 1 if self.smooth > DIVERGED * max(self.lowest, 0.5) else 0
        if self.high >= HIGH_STEPS:
            what = f"the loss rose from {self.lowest:.2f} to {self.smooth:.2f} and stayed there"
            self._stop(state, what, "lower learning_rate or raise warmup_ratio")

    def _stop(self, state: Any, what: str, remedy: str) -> None:
        batches = getattr(self.trainer, "step_rows", [])
        bad = [ids for ids, loss in batches if not math.isfinite(float(loss))] or [ids for ids, _ in batches]
        ids = [row for batch in bad for row in batch if row]
        rows = (", ".join(ids[:16]) or "not known") + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
        raise TunebookError(
            f"Training stopped at step {state.global_step}: {what}; {remedy}. Rows of that step: {rows}."
        )


class Seal(TrainerCallback):
    """Marks every finished checkpoint as whole, and copies it to the mirror where there is one.

    Both happen beside the training; the next checkpoint and the end wait for them, and raise what they raised.
    """

    def __init__(self, of: dict[str, Any], log: Path, mirror: resume.Mirror | None) -> None:
        self.of, self.log, self.mirror = of, log, mirror
        self.worker, self.pending = ThreadPoolExecutor(1, "seal"), Future[None]()
        self.pending.set_result(None)

    def on_save(self, args, state, control, **kwargs):
        if distributed.size() > 1:
            torch.distributed.barrier()  # every process has written its part
        if state.is_world_process_zero:
            self.pending.result()
            self.pending = self.worker.submit(self._seal, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _seal(self, folder: Path) -> None:
        resume.seal(folder, self.of)
        if self.mirror:
            self.mirror.put(folder, self.log)
