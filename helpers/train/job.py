"""One training job from its plan to its manifest: each cell of notebooks 02 and 03 is one of its steps.

`training.open` makes one. Nothing is loaded or written before the first step that trains.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import display, drive, machine, plots, runs, steps
from helpers.errors import TunebookError
from helpers.model import merging, weights
from helpers.model.loading import ModelSource, template_hash, tokenizer_hash
from helpers.planner.plan import Plan
from helpers.train import config, distributed, resume, rows

# Looks that are figures: the name of the file that is kept, and what draws it. A stage's last one is drawn live.
LOSS: dict[str, tuple[str, Callable[..., Any]]] = {"figure": ("loss", plots.training_curves)}
FIGURES = {"sft": LOSS, "orpo": {**LOSS, "margins": ("margins", plots.preference_curves)}}
WORDS = {"train_s": "seconds of training", "tokens_per_s": "tokens a second", "trainable": "trained parameters"}


@dataclass(eq=False, repr=False)
class TrainJob(steps.Job):
    """A training run. A finished stage needs its folder only: every step shows what it left there.

    counts: rows read and left out, with their reasons. planned: the plan, corrected by the probing rows.
    adapter: folder of the adapter to train further. params: the stage's, `auto` replaced by what it came to.
    """

    stage: runs.Stage
    source: ModelSource = None  # type: ignore[assignment]
    tokenizer: Any = None
    train_rows: Any = None
    held_out: Any = None
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    planned: Plan = None  # type: ignore[assignment]
    adapter: Path | None = None
    params: Any = None

    def __post_init__(self) -> None:
        super().__init__(self.stage)
        self.params = self.params or self.stage.params
        self.log, self.checkpoints = self.stage.path / "log.jsonl", self.stage.path / "checkpoints"
        self.model: Any = None
        self.base: Any = None  # a `distributed.Base`, where no process holds it whole
        self.trainer: Any = None
        self.notes: list[str] = []
        self.result: dict[str, Any] = {}
        if self.tokenizer is not None:
            self.identity = resume.identity(self.params, self.stage.parents["data"], self.tokenizer)
            mirror = getattr(self.params, "mirror", "") or drive.mirror()
            self.mirror = resume.Mirror(mirror, self.stage, self.identity) if mirror else None

    @steps.look
    def plan(self) -> display.Html:
        """Whether it fits and about how long it takes; the plan itself is said after the probing step."""
        warned = [reason for reason in self.planned.reasons if reason.startswith("Warning")]
        return display.said(self.planned.line(self.params.max_minutes), *warned)

    def watch(self, other: str) -> None:
        """Follow the log of a run that another process trains; raises TunebookError when it ends unfinished."""
        from helpers.train import callbacks

        run, stage = self.params.run, self.stage.name
        display.say(f"{other} trains this run; its log follows. Stopping this cell does not stop it.")
        view = callbacks.View(self._drawing(), f"{other} is training")
        while runs.worker(run, stage):
            if lines := callbacks.read(self.log):
                view.show(lines)
            time.sleep(0.5)
        view.close()
        found = runs.stage(stage, self.stage.params)
        self.stage.done = found.done
        if not found.done:
            did = "finished it with other parameters" if (self.stage.path / "manifest.json").exists() else "stopped"
            raise TunebookError(f"{other} {did}; run the notebook from its first cell again.")
        display.say(found.note)

    def stopped(self, step: str) -> str:
        """Where a training was stopped, and what is safe."""
        if runs.worker(self.params.run, self.stage.name):
            return "No longer watching; the training goes on in its own process. Run the cell again to see it."
        if step != "train":
            return super().stopped(step)
        safe = resume.newest(self.checkpoints, self.identity) if self.params.resumes else None
        kept = f"checkpoint {resume.step_of(safe)} is safe" if safe else "there is no checkpoint yet"
        return f"Stopped at step {self.reached}; {kept}; run the cell again to {'go on' if safe else 'begin anew'}."

    @steps.look
    def first_row(self) -> display.Html:
        """The first training row as the trainer sees it."""
        return rows.preview(self.train_rows[0], self.tokenizer)

    @steps.look
    def left_out(self) -> display.Html:
        """How many rows came, and why some were left out."""

        def told(value: Any) -> str:
            if isinstance(value, dict):
                value = [f"{count} {reason}" for reason, count in value.items()]
            return (", ".join(value) or "none") if isinstance(value, list) else display.plain(value)

        table = [(part, *map(told, found.values())) for part, found in self.counts.items()]
        return display.shown(table, ("", *self.counts["train"]))

    @steps.step
    def train(self) -> display.Html:
        """Train to the end, from the newest whole checkpoint where there is one. Returns what came out, with curves."""
        self.reached = 0
        try:
            self.build()
            with resume.disk_full_is_a_message(self.checkpoints):
                self._train()
        except BaseException as error:  # the cell may be run again: not on top of what these weights were trained to
            self.reached = self.trainer.state.global_step if self.trainer else 0
            self._free(error)
            raise
        self.result = r = self._outcome()
        held_out = f"held-out loss {r['eval_loss']:.3f}" if "eval_loss" in r else "no held-out rows"
        losses = f"loss {r['first_loss']:.3f} → {r['last_loss']:.3f}, {held_out}"
        said = f"{r['steps']:,} steps in {display.duration(r['train_s'])}: {losses}"
        plan = display.fold("The plan, and what else was weighed", self.planned._repr_html_())
        return display.said(said) + plots.inline(self._drawing()(self.lines())) + plan

    @steps.look
    def summary(self) -> display.Html:
        """What came out, as a table."""
        self._require_trained()
        named = {n: WORDS.get(n, n.replace("_", " ")) for n in self.result if n != "score_after"}
        table = [(words, display.plain(self.result[n])) for n, words in named.items()]
        for one in self.result.get("score_after", ()):
            said = f"{display.percent(one['score'])} ({display.interval(one['low'], one['high'])}), n = {one['n']}"
            table.append((f"score after {one['minutes']:.1f} minutes, step {one['step']}", said))
        missing = [("held-out loss", "none: no rows were held out")] if self.held_out is None else []
        return display.shown([*table, *missing, *(("how", note) for note in self.notes)])

    @steps.look
    def figure(self) -> Any:
        """The loss curves, drawn from log.jsonl."""
        return self._draw("figure")

    @steps.look
    def margins(self) -> Any:
        """Of preference training: log odds, margin and accuracy, each step and on held-out pairs."""
        return self._draw("margins")

    @steps.look
    def answers(self) -> display.Html:
        """Greedy answers to held-out prompts (where none were held out: training prompts), of the base and after
        training, right or wrong by the task's score; also in samples.jsonl, with earlier steps' (`sample_every`)."""
        self._require_trained()
        if self.model is None:
            raise TunebookError("The job is finished and its model is no longer in memory; helpers.chat talks to it.")
        from helpers.train import callbacks

        found = callbacks.sample(self, self.trainer.state.global_step, base=hasattr(self.model, "disable_adapter"))
        return callbacks.side_by_side(found, self.stage.parents["data"].path / "database.sqlite")

    @steps.step
    def finish(self) -> runs.Manifest | None:
        """Write the adapter (or the whole model), the figures and the manifest, and free the GPU; returns the manifest.

        Of several processes only the first writes, and the others return None.
        """
        from helpers.train import as_long, methods

        self._require_trained()
        kind = "adapter" if hasattr(self.model, "peft_config") else "model"
        with resume.disk_full_is_a_message(self.checkpoints):
            work, base = self.stage.path / "work", self.base if kind == "model" else None
            if base:  # no process has it whole
                distributed.write_checkpoint(work, self.model)
                distributed.wait()
            sharded = distributed.sharded(self.params) and not base
            whole = distributed.trained_state(self.model) if sharded else None
            if not distributed.first():
                return None
            if base:
                self.tokenizer.save_pretrained(work / "tokenizer")
                trained = distributed.Trained(base, distributed.Pieces(work / distributed.PIECES))
                merging.merge(self.source.path, None, self.stage.path / kind, "16bit", work / "tokenizer", trained)
                shutil.rmtree(work)
            else:
                methods.save(self.model, self.tokenizer, self.stage.path / kind, whole)
            for look, (name, _) in FIGURES[self.params.stage].items():
                display.save(getattr(self, look)(), self.stage.path, name)
        plan, peak = self.planned, machine.peak_memory_gib()
        speeds = [line["tokens_per_s"] for line in self.lines() if "tokens_per_s" in line]
        if speeds:  # the first steps compile kernels
            plan = plan.correct(peak_gib=peak, tokens_per_s=statistics.median(speeds[min(3, len(speeds) - 1) :]))
        self._free()
        if getattr(self.params, "sft_as_long", False):
            as_long.train(self.stage, self.result["train_s"])
        # LoftQ's adapter belongs to the 4-bit base, and so does one that was trained further from it.
        own = {"merge_onto": "nf4" if self.params.init == "loftq" else "16bit"}
        manifest = self.stage.finish(
            {**self.result, "peak_gib": peak},
            template_hash=template_hash(self.tokenizer),
            tokenizer_hash=tokenizer_hash(self.tokenizer),
            model=self.source.as_dict(),
            data_counts=self.counts,
            plan=plan.as_dict(),
            learning_rate_used=plan.learning_rate,
            notes=self.notes,
            trained=kind,
            method=self.params.method,
            quantize=self.params.quantize,
            merge_onto=(weights.made_by(self.adapter) if self.adapter else own).get("merge_onto", "16bit"),
        )
        if self.mirror and not self.params.mirror and drive.holds(self.stage.path):
            shutil.rmtree(self.mirror.folder, ignore_errors=True)  # the finished stage is there itself
        return manifest

    def run(self) -> runs.Manifest | None:
        """Every step but the answers, for runs without a notebook: one that is opened afterwards shows them."""
        for step in (self.plan, self.first_row, self.left_out, self.train, self.summary):
            step()
        return self.finish()

    # ---------------------------------------------------------------- how a step does it

    def lines(self) -> list[dict[str, Any]]:
        """The log so far; raises TunebookError before there is one."""
        from helpers.train import callbacks

        if not self.log.is_file():
            raise TunebookError("The job has not been trained; call its train() first.")
        return callbacks.read(self.log)

    def _draw(self, look: str) -> Any:
        return self._drawing(look)(self.lines())

    def _drawing(self, look: str = "") -> Callable[[Any], Any]:
        """What draws a look's figure from the lines of a log; of no look: the one that is drawn live."""
        figures = FIGURES[self.params.stage]
        draw = figures[look or [*figures][-1]][1]
        return lambda lines: draw(lines, f"{self.params.run}: {self.params.stage}")

    def build(self) -> TrainJob:
        """Load the model and make the trainer with all that watches it, once."""
        if self.trainer is not None:
            return self
        from transformers import EarlyStoppingCallback

        from helpers.train import callbacks, deadline, methods, task_score, trainers

        self.deadline = deadline.Deadline(self.params)
        self.stage.begin()
        if self.mirror and distributed.first():
            self.mirror.check()
        gpu = machine.gpu()
        precision, why = config.precision_of(gpu.capability if gpu else None, self.params.precision)
        self.model, notes = methods.load(self, precision)
        self.notes = [why, *notes]
        self.trainer = trainer = trainers.make(self, self.model, precision)
        callbacks.guard_trackers(trainer)
        self.seal = callbacks.Seal(self.identity, self.log, self.mirror)
        if score := task_score.make(self):  # before the deadline, which has to know of its pauses
            self.deadline.score = trainer.score = score
            trainer.add_callback(score)
            if trainer.args.load_best_model_at_end:
                trainer.args.metric_for_best_model, trainer.args.greater_is_better = "eval_kept", True
        if self.params.max_minutes:
            trainer.add_callback(self.deadline)
        self.view = callbacks.View(self._drawing())
        trainer.add_callback(callbacks.Log(self.log, trainer, self.view))
        trainer.add_callback(callbacks.Guard(trainer, precision == "fp16"))
        trainer.add_callback(self.seal)
        if self.params.sample_every:
            trainer.add_callback(callbacks.Samples(self.params.sample_every, lambda step: callbacks.sample(self, step)))
        if self.params.early_stopping and self.held_out is not None and not score:
            trainer.add_callback(EarlyStoppingCallback(self.params.early_stopping))
        return self

    def _train(self) -> None:
        trainer, whole, start = self.trainer, self.trainer.args.max_steps, None
        if self.params.resumes:
            start = resume.newest(self.checkpoints, self.identity)
            if start is None and self.mirror:
                start = self.mirror.fetch(self.checkpoints)
        if start is None:
            self._probe()
        else:
            display.say(f"Resuming from {start.name}.")
            state = resume.trainer_state(start)
            trainer.args.eval_steps, trainer.args.save_steps = state["eval_steps"], state["save_steps"]
        try:
            if start and resume.step_of(start) >= state["max_steps"]:
                self._take_finished(start)
            else:
                trainer.train(resume_from_checkpoint=str(start) if start else None)
        finally:
            self.view.close()
            self.seal.pending.result()
        total = trainer.state.max_steps
        if total < whole:
            self.planned = self.planned.shortened(total)
            self.notes.append(f"{total} of {whole} steps, what fits into {self.params.max_minutes:g} minutes")

    def _probe(self) -> None:
        """Correct the plan by a few rows, and end the run where max_minutes is over, as far as can be said now."""
        from helpers.train import deadline

        self.planned = deadline.probe(self)
        minutes, args, limit = self.params.max_minutes, self.trainer.args, self.deadline
        if self.planned.measured:
            self.view.note = self.planned.headline()
        elif minutes:
            display.say("This kind of training is not probed: max_minutes begins with the plan's estimate.")
        if not minutes:
            return
        limit.total, limit.pause_s = distributed.shared(lambda: deadline.first_estimate(self))
        if limit.total < args.max_steps:
            display.say(f"{limit.total} of {args.max_steps} steps fit into max_minutes {minutes:g}; the schedule ends.")
        times = limit.timetable(limit.total)
        args.eval_steps, args.save_steps = times["eval_steps"], times["save_steps"]

    def _take_finished(self, checkpoint: Path) -> None:
        """The weights of a run that was killed after its last step: the trainer's own loop would add one more."""
        from transformers import TrainerState

        state = self.trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if self.trainer.score:
            self.trainer.score.restore(state)
        best = checkpoint.parent / Path(state.best_model_checkpoint or "-").name
        keep_best = self.trainer.args.load_best_model_at_end and best.is_dir()
        self.trainer._load_from_checkpoint(str(best if keep_best else checkpoint))

    def _outcome(self) -> dict[str, Any]:
        """What the run came to, from the trainer's state and the log."""
        state, lines = self.trainer.state, self.lines()
        logged = {name: plots.series(lines, name)[1] for name in ("loss", "eval_loss", "seconds", "trained_tokens")}
        seconds, tokens = logged["seconds"][-1], max(logged["trained_tokens"], default=0)
        found = {
            "steps": state.global_step,
            "train_s": round(seconds, 2),
            "first_loss": logged["loss"][0],
            "last_loss": plots.smoothed(logged["loss"])[-1],
            "trained_tokens": tokens,
            "rows": len(self.train_rows),
            "trainable": sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad),
        }
        if tokens:
            found["tokens_per_s"] = round(tokens / max(seconds, 1e-6), 1)
        if logged["eval_loss"]:
            losses = dict(zip(*plots.series(lines, "eval_loss"), strict=True))
            last = logged["eval_loss"][-1]
            kept = (self.trainer.args.load_best_model_at_end and state.best_global_step) or state.global_step
            found |= {"eval_loss": losses.get(kept, last), "last_eval_loss": last, "best_step": kept}
            found |= self.trainer.score.outcome(kept) if self.trainer.score else {}
            pairs = [line for line in lines if "eval_rewards/margins" in line and line["step"] == kept][-1:]
            for name, value in (pairs[0] if pairs else {}).items():
                if name.startswith(("eval_rewards/", "eval_log_odds")):
                    found[name.removeprefix("eval_").replace("rewards/", "held_out_")] = value
        return found

    def _free(self, error: BaseException | None = None) -> None:
        """Let go of the model and of what holds it, the frames of an error too, and give the GPU's memory back."""
        if error:
            traceback.clear_frames(error.__traceback__)
        if self.trainer and self.trainer.score:
            self.trainer.score.close()
        self.model = self.trainer = None
        gc.collect()
        if machine.gpu():
            import torch

            torch.cuda.empty_cache()

    def _require_trained(self) -> None:
        if not self.result:
            raise TunebookError("The job has not been trained; call its train() first.")
