"""One training job from its plan to its manifest: what supervised and preference training have in common.

`sft.open` and `preference.open` make one; each cell of notebooks 02 and 03 is one of its steps. Nothing is loaded or
written before the first step that trains.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from helpers import display, machine, plots, runs, steps
from helpers.data.vocabulary import add_tokens
from helpers.errors import TunebookError
from helpers.gguf import preflight
from helpers.model import packed_attention
from helpers.model.loading import ModelSource, load_tokenizer, resolve_model, template_hash, tokenizer_hash
from helpers.params import TrainingParams
from helpers.planner import plan as planner
from helpers.planner.plan import Plan
from helpers.train import config, distributed, resume, rows

NO_HUB = "Could not find a config file|The PEFT config's `base_model_name_or_path` was renamed"  # what PEFT warns then


# ---------------------------------------------------------------- before anything is loaded


def open_stage(name: str, params: TrainingParams) -> runs.Stage:
    """The stage's folder, looked at and not touched. Of several processes the first begins the work for all.

    Raises TunebookError for settings that cannot work, or for resume "must" without a run to resume.
    """
    gpu = machine.gpu()
    config.check(params, gpu.capability if gpu else None)

    def look() -> runs.Stage:
        stage = runs.stage(name, params)
        if params.resume == "must":
            resume.must_resume(stage)
        if distributed.size() > 1 and not stage.done:
            stage.begin()
        return stage

    return distributed.shared(look)


def base_model(params: TrainingParams, data: runs.Manifest) -> tuple[ModelSource, Any]:
    """(source, tokenizer) of the base that the data was rendered for; TunebookError for another chat template."""
    known = data.data.get("model") or {}
    from_hub, from_folder = (known.get("origin") == origin and not params.model for origin in ("hub", "folder"))
    name = params.model or known["path" if from_folder else "name"]
    source = resolve_model(name, known.get("revision", "") if from_hub else "")
    os.environ["HF_HUB_OFFLINE"] = "1"  # from now on PEFT must not ask a hub whenever it saves an adapter
    warnings.filterwarnings("ignore", NO_HUB)
    tokenizer = load_tokenizer(source)
    if data.data.get("template_hash") not in (None, template_hash(tokenizer)):
        raise TunebookError(
            f"The chat template of {source.name} is not the one that the data of run {params.run!r} was rendered with; "
            f"run notebook 01 again with model set to {source.name!r}, or leave model empty here."
        )
    if added := data.params.get("add_tokens"):
        add_tokens(None, tokenizer, added)
    return source, tokenizer


def plan_for(params: Any, examples: Any, source: ModelSource, adapter: Path | None, stage: runs.Stage) -> Plan:
    """The planner's plan for these rows. Raises TunebookError for a job that cannot fit, or a model that would train
    and then not export to GGUF (`export_check`)."""
    if params.export_check:
        preflight.check(source, adapter=adapter, where=stage.path).require()
    lengths, padded = rows.lengths_of(examples), rows.lengths_of(examples, padded=True)
    world = distributed.size()

    def planned(values: Any) -> Plan:
        return planner.plan(values, lengths, source, world_size=world, padded_lengths=padded)

    plan = planned(params)
    shares = plan.backend == "hf" and plan.packed and plan.attention == packed_attention.SDPA
    if shares and plan.accumulation > 1 and not params.row_tokens:
        # A whole optimizer step in one row, where that fits: a prefix that its rows share is then computed once, which
        # counts for more here than anything else.
        whole = sum(sorted(lengths)[-math.ceil(params.batch_size / world) :])
        try:
            return planned(dataclasses.replace(params, row_tokens=whole))
        except TunebookError:  # such a row does not fit: keep the one that does
            return plan
    return plan


def first(held_out: Any, count: int) -> Any:
    """The first `count` held-out rows; all for 0; None when there are none."""
    return held_out.select(range(min(count or len(held_out), len(held_out)))) if len(held_out) else None


# ---------------------------------------------------------------- the job


@dataclass(eq=False, repr=False)
class TrainJob(steps.Job):
    """A training run. A finished stage needs its folder only: every step shows what it left there.

    counts: rows read and left out, with their reasons. planned: the plan, corrected by the probing row.
    adapter: folder of the adapter to train further.
    """

    # Looks that are figures: the name of the file that is kept, and what draws it. The last one is drawn live.
    drawn: ClassVar[dict[str, tuple[str, Callable[..., Any]]]] = {"figure": ("loss", plots.training_curves)}

    stage: runs.Stage
    source: ModelSource = None  # type: ignore[assignment]
    tokenizer: Any = None
    train_rows: Any = None
    held_out: Any = None
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    planned: Plan = None  # type: ignore[assignment]
    adapter: Path | None = None

    def __post_init__(self) -> None:
        super().__init__(self.stage)
        self.params: Any = self.stage.params
        self.title = f"{self.params.run}: {self.params.stage}"
        self.log, self.checkpoints = self.stage.path / "log.jsonl", self.stage.path / "checkpoints"
        self.pissa = self.stage.path / "work" / "pissa"
        self.model: Any = None
        self.trainer: Any = None
        self.notes: list[str] = []
        self.result: dict[str, Any] = {}
        if self.tokenizer is not None:
            self.identity = resume.identity(self.params, self.stage.parents["data"], self.tokenizer)

    @steps.look
    def plan(self) -> Plan:
        """Whether it fits, how long it takes, and what else was weighed."""
        return self.planned

    @steps.look
    def first_row(self) -> display.Html:
        """The first training row as the trainer sees it."""
        return rows.preview(self.train_rows[0], self.tokenizer)

    @steps.look
    def left_out(self) -> display.Html:
        """How many rows came, and why some were left out."""

        def told(value: Any) -> str:
            counted = [f"{count} {reason}" for reason, count in value.items()] if isinstance(value, dict) else value
            return (", ".join(counted) or "none") if isinstance(counted, list) else display.plain(counted)

        table = [(part, *map(told, found.values())) for part, found in self.counts.items() if found]
        return display.shown(table, ("", *self.counts["train"]))

    @steps.step
    def train(self) -> display.Html:
        """Train to the end, from the newest whole checkpoint where there is one."""
        self.build()
        try:
            with resume.disk_full_is_a_message(self.checkpoints):
                self._train()
        except BaseException:  # the cell may be run again: not on top of what these weights were trained to
            self._free()
            raise
        self.result = r = self._outcome()
        held_out = f"held-out loss {r['eval_loss']:.3f}" if "eval_loss" in r else "no held-out rows"
        losses = f"loss {r['first_loss']:.3f} → {r['last_loss']:.3f}, {held_out}"
        said = f"{r['steps']:,} steps in {display.duration(r['train_s'])}: {losses}"
        return display.Html(display.escape(said), said)

    @steps.look
    def summary(self) -> display.Html:
        """What came out, as a table."""
        self._trained()
        table = [(name.replace("_", " "), display.plain(v)) for name, v in self.result.items()]
        missing = [("held-out loss", "none: no rows were held out")] if self.held_out is None else []
        return display.shown([*table, *missing, *(("how", note) for note in self.notes)])

    @steps.look
    def figure(self) -> Any:
        """The loss curves, drawn from log.jsonl."""
        return self._draw("figure")

    @steps.look
    def answers(self, count: int = 4) -> display.Html:
        """Greedy answers to held-out prompts beside their references; also in samples.jsonl."""
        self._trained()
        if self.model is None:
            raise TunebookError("The job is finished and its model is no longer in memory; helpers.chat talks to it.")
        found = self._samples(count).write(self.model, self.trainer.state.global_step)
        table = [(r["question"], r["answer"], r["reference"], display.plain(r["stopped"])) for r in found]
        return display.shown(table, ("question", "answer", "reference", "stopped by itself"))

    @steps.step
    def finish(self) -> runs.Manifest | None:
        """Write the adapter (or the whole model), the figures and the manifest, and free the GPU; returns the manifest.

        Of several processes only the first writes, and the others return None.
        """
        from helpers.train import methods

        self._trained()
        kind = "adapter" if hasattr(self.model, "peft_config") else "model"
        with resume.disk_full_is_a_message(self.checkpoints):
            sharded = distributed.sharded(self.params.method)
            whole = distributed.whole_state(self.model, adapter_only=kind == "adapter") if sharded else None
            if not distributed.first():
                return None
            methods.save(self.model, self.tokenizer, self.stage.path / kind, self.pissa, whole)
            for look, (name, _) in self.drawn.items():
                display.save(getattr(self, look)(), self.stage.path, name)
        plan, peak = self.planned, machine.peak_memory_gib()
        speeds = [line["tokens_per_s"] for line in self.lines() if "tokens_per_s" in line]
        if speeds:  # the first steps compile kernels
            plan = plan.correct(peak_gib=peak, tokens_per_s=statistics.median(speeds[min(3, len(speeds) - 1) :]))
        self._free()
        return self.stage.finish(
            {**self.result, "peak_gib": peak},
            template_hash=template_hash(self.tokenizer),
            tokenizer_hash=tokenizer_hash(self.tokenizer),
            model=self.source.as_dict(),
            data_counts=self.counts,
            plan=plan.as_dict(),
            notes=self.notes,
            trained=kind,
            method=self.params.method,
            merge_onto="nf4" if self.params.init == "loftq" and not self.adapter else "16bit",
        )

    def run(self) -> runs.Manifest | None:
        """Every step but the answers, for runs without a notebook: one that is opened afterwards shows them."""
        for step in (self.plan, self.first_row, self.left_out, self.train, self.summary):
            step()
        return self.finish()

    # ---------------------------------------------------------------- how a step does it

    def _draw(self, look: str) -> Any:
        return self.drawn[look][1](self.lines(), self.title)

    def lines(self) -> list[dict[str, Any]]:
        """The log so far; raises TunebookError before there is one."""
        from helpers.train import callbacks

        if not self.log.is_file():
            raise TunebookError("The job has not been trained; call its train() first.")
        return callbacks.read(self.log)

    def _train(self) -> None:
        start, whole = self._checkpoint(), self.trainer.args.max_steps
        if start is None:
            self._probe()
        else:
            print(f"Resuming from {start.name}.")
            for name in ("eval_steps", "save_steps"):
                setattr(self.trainer.args, name, resume.trainer_state(start)[name])
        try:
            if start is not None and resume.step_of(start) >= resume.trainer_state(start)["max_steps"]:
                self._take_finished(start)
            else:
                self.trainer.train(resume_from_checkpoint=str(start) if start else None)
        finally:
            self.seal.wait()
        total = self.trainer.state.max_steps
        if total < whole:
            self.planned = self.planned.shortened(total)
            self.notes.append(f"{total} of {whole} steps, what fits into {self.params.max_minutes:g} minutes")

    def build(self) -> TrainJob:
        """Load the model and make the trainer, once."""
        if self.trainer is not None:
            return self
        from transformers import EarlyStoppingCallback

        from helpers.train import callbacks, deadline, methods, trainers

        self.deadline = deadline.Deadline(self.params)
        self.stage.begin()
        mirror = self._mirror()
        if mirror and distributed.first():
            mirror.check()
        gpu = machine.gpu()
        precision = config.precision_of(gpu.capability if gpu else None, self.params.precision)
        self.model, notes = methods.load(self, precision)
        self.notes = [precision.reason, *notes]
        self.trainer = trainers.make(self, self.model, precision)
        if self.params.max_minutes:
            self.trainer.add_callback(self.deadline)
        self.trainer.add_callback(callbacks.Log(self.log, self.trainer))
        self.trainer.add_callback(callbacks.Guard(self.trainer, precision.fp16))
        self.trainer.add_callback(callbacks.LiveCurve(self.log, lambda: self._draw([*self.drawn][-1])))
        self.trainer.add_callback(self._samples(4, self.params.sample_every))
        self.seal = callbacks.Seal(self.identity, self.log, mirror)
        self.trainer.add_callback(self.seal)
        if self.params.early_stopping and self.held_out is not None:
            self.trainer.add_callback(EarlyStoppingCallback(self.params.early_stopping))
        return self

    def _mirror(self) -> resume.Mirror | None:
        return resume.Mirror(self.params.mirror, self.stage, self.identity) if self.params.mirror else None

    def _samples(self, count: int, every: int = 0) -> Any:
        """Writer of answers to held-out prompts; where none were held out, to training prompts."""
        from helpers.train import callbacks

        prompts = rows.prompts(self.train_rows if self.held_out is None else self.held_out, self.tokenizer, count)
        return callbacks.Samples(self.stage.path / "samples.jsonl", prompts, self.tokenizer, every)

    def _checkpoint(self) -> Path | None:
        """The whole checkpoint to resume from, or None to begin at the beginning."""
        if self.params.resume == "never":
            return None
        found = resume.newest(self.checkpoints, self.identity)
        mirror = self._mirror()
        return mirror.fetch(self.checkpoints) if mirror and found is None else found

    def _probe(self) -> None:
        """Correct the plan by a few rows, and end the run where max_minutes is over, as far as can be said now."""
        from helpers.train import deadline

        self.planned = deadline.probe(self)
        minutes, whole = self.params.max_minutes, self.trainer.args.max_steps
        if self.planned.measured:
            print(self.planned.headline(), flush=True)
        elif minutes:
            print("This kind of training is not probed: max_minutes begins with the plan's estimate.", flush=True)
        if not minutes:
            return
        limit = self.deadline
        limit.total, limit.pause_s = distributed.shared(
            lambda: deadline.first_estimate(self, limit.seconds - limit.elapsed)
        )
        if limit.total < whole:
            print(f"{limit.total} of {whole} steps fit into max_minutes {minutes:g}: the schedule ends there.")
        times = config.timetable(0, self.params, limit.total)
        self.trainer.args.eval_steps, self.trainer.args.save_steps = times["eval_steps"], times["save_steps"]

    def _take_finished(self, checkpoint: Path) -> None:
        """The weights of a run that was killed after its last step: the trainer's own loop would add one more."""
        from transformers import TrainerState

        from helpers import compat

        if distributed.sharded(self.params.method):
            raise TunebookError(
                f"{checkpoint} is the last step of a sharded run; run the same command in one process to finish it."
            )
        state = self.trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        best = checkpoint.parent / Path(state.best_model_checkpoint or "-").name
        keep_best = self.trainer.args.load_best_model_at_end and best.is_dir()
        compat.load_weights(self.trainer, best if keep_best else checkpoint)

    def _outcome(self) -> dict[str, Any]:
        """What the run came to, from the trainer's state and the log."""
        from helpers.train import methods

        state, lines = self.trainer.state, self.lines()
        losses, held_out = (plots.series(lines, name)[1] for name in ("loss", "eval_loss"))
        seconds, tokens = (max(plots.series(lines, n)[1], default=0) for n in ("seconds", "trained_tokens"))
        found = {
            "steps": state.global_step,
            "train_s": round(seconds, 2),
            "first_loss": losses[0],
            "last_loss": plots.smoothed(losses)[-1],
            "trained_tokens": tokens,
            "rows": len(self.train_rows),
            **methods.counts(self.model),
        }
        if tokens:
            found["tokens_per_s"] = round(tokens / max(seconds, 1e-6), 1)
        if held_out:
            best = self.trainer.args.load_best_model_at_end and state.best_metric is not None
            kept = state.best_global_step or state.global_step
            found |= {"eval_loss": state.best_metric if best else held_out[-1], "last_eval_loss": held_out[-1]}
            found["best_step"] = kept
            last = [line for line in lines if "eval_rewards/margins" in line and line["step"] == kept][-1:]
            for name, value in (last[0] if last else {}).items():
                if name.startswith(("eval_rewards/", "eval_log_odds")):
                    found[name.removeprefix("eval_").replace("rewards/", "held_out_")] = value
        return found

    def _free(self) -> None:
        self.model = self.trainer = None
        gc.collect()
        if machine.gpu():
            import torch

            torch.cuda.empty_cache()

    def _trained(self) -> None:
        if not self.result:
            raise TunebookError("The job has not been trained; call its train() first.")
