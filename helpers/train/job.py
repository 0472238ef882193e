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
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import display, machine, plots, runs, steps
from helpers.errors import TunebookError
from helpers.gguf import preflight
from helpers.model import packed_attention, prefix_sharing
from helpers.model.loading import ModelSource, load_model, load_tokenizer, resolve_model, template_hash, tokenizer_hash
from helpers.planner import plan as planner
from helpers.planner.estimates import Plan
from helpers.train import config, distributed, resume, rows, unsloth_backend

IN_ROWS = 0.8  # of a run's time; the rest is optimizer, evaluations, checkpoints (0.79 and 0.85 seen on 2 cores)


# ---------------------------------------------------------------- before anything is loaded


@dataclass
class Prepared:
    """What a job is made of. counts: rows read and left out, with their reasons. adapter: folder to train further."""

    source: ModelSource
    tokenizer: Any
    train_rows: Any
    held_out: Any | None
    counts: dict[str, dict[str, Any]]
    plan: Plan
    adapter: Path | None = None


def open_stage(name: str, params: Any, needs: tuple[str, ...] | None = None) -> runs.Stage:
    """The stage's folder, looked at and not touched. Of several processes the first begins the work for all.

    Raises TunebookError for settings that cannot work, or for resume "must" without a run to resume.
    """
    gpu = machine.gpu()
    config.check(params, gpu.capability if gpu else None)

    def look() -> runs.Stage:
        stage = runs.stage(name, params, needs)
        if params.resume == "must":
            resume.must_resume(stage)
        if distributed.world().size > 1 and not stage.done:
            stage.begin()
        return stage

    return distributed.shared(look)


def base_model(params: Any, data: runs.Manifest) -> tuple[ModelSource, Any]:
    """(source, tokenizer) of the base that the data was rendered for. Raises TunebookError for another chat template."""
    known = data.data.get("model") or {}
    if params.model:
        source = resolve_model(params.model)
    elif known.get("origin") == "folder":
        source = resolve_model(known["path"])
    else:
        source = resolve_model(known["name"], known.get("revision", "") if known.get("origin") == "hub" else "")
    # The model is here: from now on PEFT must not ask a hub about it whenever it saves an adapter.
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings(
        "ignore", "Could not find a config file|The PEFT config's `base_model_name_or_path` was renamed"
    )
    tokenizer = load_tokenizer(source)
    if data.data.get("template_hash") and template_hash(tokenizer) != data.data["template_hash"]:
        raise TunebookError(
            f"The chat template of {source.name} is not the one that the data of run {params.run!r} was rendered with; "
            f"run notebook 01 again with model set to {source.name!r}, or leave model empty here."
        )
    if added := data.params.get("add_tokens"):
        from helpers.data.vocabulary import add_tokens

        add_tokens(None, tokenizer, added)
    return source, tokenizer


def plan_for(params: Any, examples: Any, source: ModelSource, adapter: Path | None, stage: runs.Stage) -> Plan:
    """The planner's plan for these rows. Raises TunebookError for a job that cannot fit, or a model that would train and
    then not export to GGUF (`export_check`)."""
    if params.export_check:
        preflight.check(source, adapter=adapter, where=stage.path).require()
    lengths, padded = rows.lengths_of(examples), rows.lengths_of(examples, padded=True)
    world = distributed.world().size

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
    """The first `count` held-out rows; all for 0."""
    return held_out.select(range(min(count or len(held_out), len(held_out))))


# ---------------------------------------------------------------- the job


class TrainJob(steps.Job):
    """A training run. A finished stage needs nothing prepared: every step shows what it left on disk."""

    def __init__(self, stage: runs.Stage, prepared: Prepared | None = None) -> None:
        super().__init__(stage)
        self.params: Any = stage.params
        self.title = f"{self.params.run}: {self.params.stage}"
        self.log, self.checkpoints = stage.path / "log.jsonl", stage.path / "checkpoints"
        self.model: Any = None
        self.trainer: Any = None
        self.notes: list[str] = []
        self.result: dict[str, Any] = {}
        if prepared is not None:
            self.source, self.tokenizer, self.adapter = prepared.source, prepared.tokenizer, prepared.adapter
            self.train_rows, self.held_out, self.counts = prepared.train_rows, prepared.held_out, prepared.counts
            self.planned = prepared.plan
            self.identity = resume.identity(self.params, stage.parents["data"], self.tokenizer)

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
        table = [(part, *(display.plain(v) for v in found.values())) for part, found in self.counts.items() if found]
        return display.shown(table, ("", *self.counts["train"]))

    @steps.step
    def train(self) -> display.Html:
        """Train to the end, from the newest whole checkpoint where there is one."""
        self.build()
        start = self._checkpoint()
        if start is not None:
            print(f"Resuming from {start.name}.")
            self._set_length(resume.total_steps(start))
        else:
            self._probe()
        began = time.monotonic()
        with resume.disk_full_is_a_message(self.checkpoints):
            if start is not None and resume.step_of(start) >= self.trainer.args.max_steps:
                self._take_finished(start)
            else:
                self.trainer.train(resume_from_checkpoint=str(start) if start else None)
        self._outcome(time.monotonic() - began)
        r, loss = self.result, "loss {first_loss:.3f} → {last_loss:.3f}".format(**self.result)
        held = (
            f"held-out loss {r['eval_loss']:.3f}" if "eval_loss" in r else "no held-out figure: no rows were held out"
        )
        return display.Html(text := f"{r['steps']:,} steps in {display.duration(r['train_s'])}: {loss}, {held}", text)

    @steps.look
    def summary(self) -> display.Html:
        """What came out, as a table."""
        self._trained()
        table = [(name.replace("_", " "), display.plain(v)) for name, v in self.result.items()]
        if self.held_out is None:
            table.append(("held-out loss", "none: no rows were held out"))
        return display.shown([*table, *(("how", note) for note in self.notes)])

    @steps.look
    def figure(self) -> Any:
        """The loss curves, drawn from log.jsonl."""
        self._trained()
        return plots.training_curves(self.lines(), self.title)

    @steps.step
    def answers(self, count: int = 4) -> display.Html:
        """Greedy answers to held-out prompts beside their references; also in samples.jsonl."""
        from helpers.train import callbacks

        self._trained()
        if self.model is None:
            raise TunebookError("The job is finished and its model is no longer in memory; helpers.chat talks to it.")
        sampler = callbacks.Samples(self.stage.path / "samples.jsonl", self.prompts(count), self.tokenizer)
        found = sampler.write(self.model, self.trainer.state.global_step)
        table = [(r["prompt"], r["answer"], r["reference"], display.plain(r["stopped"])) for r in found]
        return display.shown(table, ("prompt (its end)", "answer", "reference", "stopped by itself"))

    @steps.step
    def finish(self) -> runs.Manifest | None:
        """Write the adapter (or the whole model), the figures and the manifest, and free the GPU; returns the manifest.

        Of several processes only the first writes, and the others return None.
        """
        from helpers.train import methods

        self._trained()
        kind = "adapter" if hasattr(self.model, "peft_config") else "model"
        with resume.disk_full_is_a_message(self.checkpoints):
            whole = None
            if distributed.sharded(self.params.method):
                whole = distributed.whole_state(self.model, adapter_only=kind == "adapter")
            if not distributed.world().first:
                return None
            methods.save(self.model, self.tokenizer, self.stage.path / kind, self.pissa, whole)
            for name, figure in self.figures().items():
                display.save_figure(self.stage, figure, name)
        if kind == "model" and self.params.precision == "fp32":
            self.notes.append("trained in fp32, as asked, and written in bf16")
        plan, peak = self.planned, machine.peak_memory_gib()
        speeds = [line["tokens_per_s"] for line in self.lines() if "tokens_per_s" in line]
        if speeds:  # the first steps compile kernels
            plan = plan.held_against(peak_gib=peak, tokens_per_s=statistics.median(speeds[min(3, len(speeds) - 1) :]))
        self.model = self.trainer = None
        gc.collect()
        if machine.gpu():
            import torch

            torch.cuda.empty_cache()
        return self.stage.finish(
            {**self.result, "peak_gib": peak},
            template_hash=template_hash(self.tokenizer),
            tokenizer_hash=tokenizer_hash(self.tokenizer),
            model=self.source.as_dict(),
            extra={
                "data_counts": self.counts,
                "plan": plan.as_dict(),
                "notes": self.notes,
                "trained": kind,
                "method": self.params.method,
                "merge_onto": "nf4" if self.params.init == "loftq" and not self.adapter else "16bit",
            },
        )

    # ---------------------------------------------------------------- how a step does it

    pissa = property(lambda self: self.stage.path / "work" / "pissa")

    def figures(self) -> dict[str, Any]:
        """The figures that a finished stage keeps, by file name."""
        return {"loss.png": plots.training_curves(self.lines(), self.title)}

    def lines(self) -> list[dict[str, Any]]:
        """The log so far."""
        from helpers.train import callbacks

        return callbacks.read(self.log)

    def prompts(self, count: int = 4) -> list[dict[str, Any]]:
        """Held-out prompts to answer; where none were held out, those of training rows."""
        return rows.prompts(self.train_rows if self.held_out is None else self.held_out, self.tokenizer, count)

    def build(self) -> TrainJob:
        """Load the model and make the trainer, once."""
        if self.trainer is not None:
            return self
        from transformers import EarlyStoppingCallback

        from helpers.train import callbacks, trainers

        self.stage.begin()
        mirror = resume.Mirror(self.params.mirror, self.stage, self.identity) if self.params.mirror else None
        if mirror and distributed.world().first:
            mirror.check()
        gpu = machine.gpu()
        precision = config.precision_of(gpu.capability if gpu else None, self.params.precision)
        self.notes = [precision.reason]
        self.model = self._load(precision)
        self.trainer = trainers.make(self, self.model, precision)
        for callback in (
            callbacks.Log(self.log, self.trainer),
            callbacks.Guard(self.trainer, precision.fp16),
            callbacks.LiveCurve(self.log, lambda: next(reversed(self.figures().values()))),
            callbacks.Samples(
                self.stage.path / "samples.jsonl", self.prompts(), self.tokenizer, self.params.sample_every
            ),
            callbacks.Seal(self.identity, self.log, mirror),
        ):
            self.trainer.add_callback(callback)
        if self.params.early_stopping and self.held_out is not None:
            self.trainer.add_callback(EarlyStoppingCallback(self.params.early_stopping))
        return self

    def _load(self, precision: config.Precision) -> Any:
        """The model with its adapter; says in `notes` what was done to it."""
        import transformers

        import datasets
        from helpers.data.vocabulary import add_tokens
        from helpers.model import fused_lora
        from helpers.train import methods

        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
        params, plan = self.params, self.planned
        if plan.backend == "unsloth":
            model, said = unsloth_backend.load(self.source, params, self.adapter)
            self.notes += [plan.reason, *said]
            return model
        packed = config.loss_of(params) in ("sft", "orpo")
        packed_attention.register()
        attention = plan.attention if packed else "sdpa"
        if plan.packed and attention == packed_attention.SDPA:
            attention = prefix_sharing.register()
        quantize = "nf4" if params.method == "qlora" else "none"
        model = load_model(self.source, quantize=quantize, dtype=precision.load, attention=attention)
        model.config.use_cache = False
        tokens = self.stage.parents["data"].params.get("add_tokens", "")
        added = add_tokens(model, load_tokenizer(self.source), tokens) if tokens else []
        model = methods.trainable(model, params, self.source, self.adapter, added)
        if added:
            self.notes.append(f"{len(added)} added tokens, each started as the mean of its pieces")
        if params.init == "pissa" and not self.adapter:
            methods.keep_pissa_start(model, self.pissa)
            self.notes.append("PiSSA: the adapter is written as plain LoRA of twice the rank, for the base as it was")
        if params.init == "loftq" and not self.adapter:
            self.notes.append("LoftQ: the adapter belongs to the 4-bit base and is merged onto that")
        self.notes += fused_lora.apply(model, fused_loss=packed, fused_lora=not (params.dora or params.dropout))
        if plan.recompute:
            self.notes.append(
                f"activation checkpointing in {self.checkpoint_activations(plan.option.setting, model)} layers"
            )
        return model

    def checkpoint_activations(self, setting: Any, model: Any = None) -> int:
        """Set the model's activation checkpointing as a planner's `Setting` says; returns in how many layers."""
        from helpers.model import checkpointing

        model = self.model if model is None else model
        layers = checkpointing.set_recompute(model, setting.recompute, setting.offload, setting.tile_mlp)
        if hasattr(model, "enable_input_require_grads") and not setting.offload:
            model.enable_input_require_grads()
        return layers

    def _checkpoint(self) -> Path | None:
        """The whole checkpoint to resume from, or None to begin at the beginning."""
        if self.params.resume == "never":
            return None
        found = resume.newest(self.checkpoints, self.identity) if self.stage.resumed else None
        if found is None and self.params.mirror:
            found = resume.Mirror(self.params.mirror, self.stage, self.identity).fetch(self.checkpoints)
        return found

    def _probe(self) -> None:
        """Correct the plan by one row, and shorten the run to what max_minutes leaves room for."""
        from helpers.train import probe

        self.planned = probe.run(self)
        minutes = self.params.max_minutes
        if self.planned.measured:
            print(self.planned.headline(), flush=True)
        elif minutes:
            print("This kind of training is not probed: max_minutes goes by the plan's estimate.", flush=True)
        per_step = self.planned.tokens / self.planned.steps / self.planned.tokens_per_s
        fits = distributed.shared(lambda: max(1, int(minutes * 60 * IN_ROWS / per_step)))
        whole = self.trainer.args.max_steps
        if minutes and fits < whole:
            print(f"{fits} of {whole} steps fit into max_minutes {minutes:g}: the schedule ends there.", flush=True)
            self.notes.append(f"{fits} steps, what fits into {minutes:g} minutes")
            self._set_length(fits)

    def _set_length(self, total: int) -> None:
        """Let the run and its schedule end after this many optimizer steps."""
        if total != self.trainer.args.max_steps:
            config.shorten(self.trainer.args, self.params, total)
            self.planned = self.planned.shortened(total)

    def _take_finished(self, checkpoint: Path) -> None:
        """The weights of a run that was killed after its last step: the trainer's own loop would add one more."""
        from transformers import TrainerState

        from helpers import compat

        if distributed.sharded(self.params.method):
            raise TunebookError(
                f"{checkpoint} is the last step of a sharded run; run the same command in one process to finish it, or "
                "remove that folder."
            )
        state = self.trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        best = checkpoint.parent / Path(state.best_model_checkpoint or "-").name
        keep_best = self.trainer.args.load_best_model_at_end and best.is_dir()
        compat.load_weights(self.trainer, best if keep_best else checkpoint)

    def _outcome(self, seconds: float) -> None:
        """Fill `result` from the trainer's state and the log."""
        from helpers.train import methods

        state, lines = self.trainer.state, self.lines()
        losses, held = (plots.series(lines, name)[1] for name in ("loss", "eval_loss"))
        seconds = max((line.get("seconds", 0.0) for line in lines), default=seconds)
        tokens = max((line.get("trained_tokens", 0) for line in lines), default=0)
        self.result = {
            "steps": state.global_step,
            "train_s": round(seconds, 2),
            "first_loss": losses[0],
            "last_loss": plots.smoothed(losses)[-1],
            "trained_tokens": tokens,
            "rows": len(self.train_rows),
            **methods.counts(self.model),
        }
        if tokens:
            self.result["tokens_per_s"] = round(tokens / max(seconds, 1e-6), 1)
        if held:
            best = self.trainer.args.load_best_model_at_end and state.best_metric is not None
            self.result["eval_loss"] = state.best_metric if best else held[-1]
            self.result["last_eval_loss"] = held[-1]
            kept = self.result["best_step"] = state.best_global_step or state.global_step
            found = [line for line in lines if "eval_rewards/margins" in line and line["step"] == kept]
            for name, value in (found[-1] if found else {}).items():
                if name.startswith(("eval_rewards/", "eval_log_odds")):
                    self.result[name.removeprefix("eval_").replace("rewards/", "held_out_")] = value

    def _trained(self) -> None:
        if not self.result:
            raise TunebookError("The job has not been trained; call its train() first.")
