"""Watching a run: a line of JSON a step, a live curve, a stop when it goes wrong, sealed checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from helpers import display, machine, plots
from helpers.errors import TunebookError
from helpers.evaluate.generate import HfModel
from helpers.tasks import text_metrics, text_to_sql
from helpers.tasks.questions import Answer, Decoding, Item, task_kind
from helpers.train import distributed, resume, rows

SCALER_STEPS = 10  # fp16's loss scale starts too high on purpose: its first steps overflow and are skipped
ZERO_STEPS = 3  # steps in a row without any gradient before a run is called dead
ANSWER_TOKENS, SHOWN_CHARS = 96, 400  # of a sample answer: written, and shown
ROW = "<div style='display:flex;flex-wrap:wrap;gap:.3em 1.5em;overflow-wrap:anywhere'>"  # answers side by side
RIGHT = 0.999  # a score from which an answer is right
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


def progress(lines: Sequence[Mapping[str, Any]], note: str = "") -> display.Html:
    """How far a run is, out of its log: a bar, and step, time, losses, speed and memory in a line; below it `note`."""
    now = next((line for line in reversed(lines) if "loss" in line), lines[-1])
    held_out = next((line for line in reversed(lines) if "eval_loss" in line), None)
    step, total = now["step"], lines[-1].get("of_steps", now["step"])
    parts = [f"step {step:,} of {total:,}"]
    if "left_s" in now:
        parts.append(f"{display.duration(now['seconds'])} gone, {display.duration(now['left_s'])} left")
        parts.append(f"loss {display.plain(now['loss'])}")  # one that is not finite stands in the log as text
    parts += [f"held-out loss {display.plain(held_out['eval_loss'])} at step {held_out['step']:,}"] if held_out else []
    parts += [f"{now['tokens_per_s']:,.0f} tokens/s"] if "tokens_per_s" in now else []
    parts += [f"{now['memory_gib']:.1f} GiB"] if "memory_gib" in now else []
    text = " · ".join(parts)
    return plots.bar(step / max(total, 1), text) + display.said(text, note)


class View:
    """A run as it goes on, shown in one place: in a notebook the bar, where someone is watching with the curves below,
    anew every 3 seconds or more; in a terminal a line every 20.

    note: what the bar says below; figure: draws the lines of a log.
    """

    def __init__(self, figure: Callable[[list[dict[str, Any]]], Any], note: str = "") -> None:
        self.figure, self.note, self.handle, self.due = figure, note, None, -math.inf
        self.watched, self.kernel = machine.interactive(), machine.kernel() is not None

    def show(self, lines: list[dict[str, Any]]) -> None:
        began = time.monotonic()
        if began < self.due:
            return
        shown = progress(lines, self.note)
        if self.watched and sum("loss" in line for line in lines) > 1:  # a curve of one point is an empty frame
            shown += plots.inline(self.figure(lines))
        if self.kernel:
            self._put(shown)
        else:
            display.say(shown.text)
            self.note = ""
        self.due = time.monotonic() + max(3.0 if self.watched else 20.0, 20 * (time.monotonic() - began))

    def close(self) -> None:
        """Leave nothing behind: what came out is what the cell ends with."""
        if self.handle:
            self._put(display.Html(""))
            self.handle = None

    def _put(self, shown: display.Html) -> None:
        from IPython.display import display as put

        self.handle = put(shown, display_id=True) if self.handle is None else self.handle.update(shown) or self.handle


class Log(TrainerCallback):
    """log.jsonl: every number of every step with tokens/s, memory and time left; `view` shows it as it grows.

    A resumed run first cuts off the lines after its checkpoint, so that the file reads like one unbroken run.
    """

    def __init__(self, path: Path, trainer: Any, view: View) -> None:
        self.path, self.trainer, self.view = path, trainer, view

    def on_train_begin(self, args, state, control, **kwargs):
        kept = [line for line in read(self.path) if line["step"] <= state.global_step]
        self.before = max((line["seconds"] for line in kept), default=0.0)
        self.tokens_before = max((line.get("trained_tokens", 0) for line in kept), default=0)
        self.started, self.first_step = time.monotonic(), state.global_step
        self.last = (self.started, 0)
        self.lines = kept
        if state.is_world_process_zero:
            self.view.show([*kept, {"step": state.global_step, "of_steps": state.max_steps}])
            self.view.due = -math.inf
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
        self.lines.append(values)
        if "loss" in logs:
            self.view.show(self.lines)

    def on_train_end(self, args, state, control, **kwargs):
        self.view.close()


class Samples(TrainerCallback):
    """Answers prompts by `sample(step)` every N steps, in every process: all gather a sharded model's weights."""

    def __init__(self, every: int, sample: Callable[[int], Any]) -> None:
        self.every, self.sample = every, sample

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            found = self.sample(state.global_step)
            if found and state.is_world_process_zero:
                display.say(f"step {state.global_step}: {found[0]['answer']!r}")


def answers(job: Any, prompts: list[list[int]], decoding: Decoding) -> list[Answer]:
    """Of a `job.TrainJob`'s model as it is; the model and the random state are left as they were."""
    training, device = job.model.training, job.model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = HfModel(job.model, job.tokenizer)
        # Unsloth has an attention of its own, and a sharded model its weights together only in its own generate.
        model.fast &= job.planned.backend == "hf" and not distributed.sharded(job.params)
        found = model.generate(prompts, decoding) if prompts else []
    job.model.train(training)
    return found


def sample(job: Any, step: int, base: bool = False) -> list[dict[str, Any]]:
    """{step, id, question, reference, answer, stopped} of a few prompts to a `job.TrainJob`; with `base` also what the
    model answers without its adapter. Kept in samples.jsonl in place of what is there of this step and later ones."""
    found = rows.prompts(job.train_rows if job.held_out is None else job.held_out, job.tokenizer)
    asked, how = [row.pop("prompt_ids") for row in found], Decoding(ANSWER_TOKENS)
    for row, answer in zip(found, answers(job, asked, how), strict=True):
        row |= {"step": step, "answer": answer.text, "stopped": answer.stopped}
    with job.model.disable_adapter() if base else contextlib.nullcontext():
        for row, answer in zip(found, answers(job, asked, how) if base else (), strict=base):
            row["base"] = answer.text
    if distributed.first():
        file = job.stage.path / "samples.jsonl"
        lines = [*(line for line in read(file) if line["step"] < step), *found]
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return found


def side_by_side(found: Sequence[Mapping[str, Any]], database: Path) -> display.Html:
    """`sample`'s answers side by side, each right or wrong by the task's own score, and a line that counts them.
    database: file that queries are run on, where there is one."""
    asked = [Item(str(r["id"]), [{"role": "user", "content": r["question"]}], r["reference"]) for r in found]
    judge = None
    if database.is_file() and task_kind(asked, database) == "text_to_sql":
        judge = text_to_sql.Judge([text_to_sql.open_readonly(database)])
    table, blocks, right = [], "", {"base": [], "after training": []}  # type: ignore[var-annotated]
    for row in found:
        texts, cells = {"base": row.get("base"), "after training": row["answer"], "reference": row["reference"]}, []
        blocks += f"<p style='margin:.9em 0 .2em'><b>{display.escape(row['question'])}</b></p>" + ROW
        for name, text in ((name, text) for name, text in texts.items() if text is not None):
            said, look = "", ""
            if name != "reference":
                reference = row["reference"]
                one = judge.score(text, reference) if judge else text_metrics.entry(text, reference, "f1")
                said, look = _verdict(one["score"], one["detail"] or one["error"])
                right[name] += [one["score"] >= RIGHT] if one["score"] is not None else []
            told = f"<b style='{look}'>{display.escape(said)}</b> {display.escape(text[:SHOWN_CHARS])}"
            blocks += f"<div style='flex:1 1 14em;min-width:0'><i>{name}</i><br>{told}</div>"
            cells.append(said + text[:SHOWN_CHARS])
        blocks += "</div>"
        table.append((row["question"], *cells, display.plain(row["stopped"])))
    if judge:
        judge.close()
    kind = "execution accuracy" if judge else "exact match; else the share of shared words, F1"
    counted = ", ".join(f"{name} {sum(known)} of {len(known)}" for name, known in right.items() if known)
    ended = f"{sum(bool(row['stopped']) for row in found)} of {len(found)} answers stopped by themselves."
    return display.said(counted and f"Right ({kind}): {counted}.", ended) + display.Html(
        blocks, display.text_table(table)
    )


def _verdict(score: float | None, why: str) -> tuple[str, str]:
    """(what stands before an answer, its style: legible on a light page and on a dark one)."""
    if score is None:
        return "", ""
    right = score >= RIGHT
    said = "right: " if right else f"{display.percent(score, 0)}: " if score else f"wrong{f' ({why})' * bool(why)}: "
    return said, f"color:#fff;background:{plots.GREEN if right else plots.RED};padding:0 .3em"


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
        distributed.wait()  # every process has written its part
        if state.is_world_process_zero:
            self.pending.result()
            self.pending = self.worker.submit(self._seal, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _seal(self, folder: Path) -> None:
        resume.seal(folder, self.of)
        if self.mirror:
            self.mirror.put(folder, self.log)
