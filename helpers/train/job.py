"""One training job from its plan to its manifest: what notebooks 02 and 03 and `python -m helpers.train` have in common."""

from __future__ import annotations

import math
import os
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import display, machine, plots
from helpers.errors import TunebookError
from helpers.train import callbacks, distributed, methods, precision, resume, rows

IN_ROWS = (
    0.8  # of a run's time: the rest goes to the optimizer, evaluations and checkpoints (0.79 and 0.85 seen on 2 cores)
)


@dataclass
class Job:
    """A prepared training run. `train` runs (or goes on with) it, `finish` writes adapter, pictures and manifest."""

    stage: Any
    params: Any
    source: Any
    tokenizer: Any
    train_rows: Any
    held_out: Any | None
    counts: dict[str, Any]
    plan: Any
    adapter: Path | None = None
    draw: Any = plots.training_curves
    trainer: Any = None
    model: Any = None
    notes: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)

    log = property(lambda self: self.stage.path / "log.jsonl")
    checkpoints = property(lambda self: self.stage.path / "checkpoints")
    samples = property(lambda self: self.stage.path / "samples.jsonl")

    def build(self) -> Job:
        """Load the model and make the trainer."""
        from helpers.train import building

        self.model, self.notes, numbers = building.model(self)
        self.trainer = building.trainer(self, numbers)
        of = resume.identity(self.params, self.stage.parents["data"], self.tokenizer)
        for callback in self._callbacks(of, numbers):
            self.trainer.add_callback(callback)
        self.identity = of
        return self

    def _callbacks(self, of: dict[str, Any], numbers: precision.Precision) -> list[Any]:
        from transformers import EarlyStoppingCallback

        found = [
            callbacks.Log(self.log, self.trainer),
            callbacks.Guard(self.trainer, numbers.fp16),
            callbacks.LiveCurve(self.log, lambda lines: self.draw(lines, f"{self.params.run}: {self.params.stage}")),
            callbacks.Samples(self.samples, self.prompts(), self.tokenizer, self.params.sample_every),
            callbacks.Seal(of, self.params.mirror, self.log),
        ]
        if self.params.early_stopping and self.held_out is not None:
            found.append(EarlyStoppingCallback(self.params.early_stopping))
        return found

    def prompts(self, count: int = 4) -> list[dict[str, Any]]:
        return rows.prompts(self.held_out if self.held_out is not None else self.train_rows, self.tokenizer, count)

    def first_row(self) -> Any:
        """The first training row as the trainer sees it."""
        return rows.preview(self.train_rows[0], self.tokenizer)

    def checkpoint(self) -> Path | None:
        """The whole checkpoint that this run goes on from, or None to begin at the beginning."""
        from helpers.train.resume import fetch, newest

        if self.params.resume == "never":
            return None
        found = newest(self.checkpoints, self.identity) if self.stage.resumed else None
        if found is None and self.params.mirror and self.params.resume != "never":
            found = fetch(Path(self.params.mirror), self.checkpoints, self.identity)
        return found

    def train(self) -> Job:
        """Train to the end, from the newest whole checkpoint where there is one."""
        if self.trainer is None:
            self.build()
        start = self.checkpoint()
        if start is not None:
            print(f"Going on from {start.name}.")
            self._length(resume.total_steps(start))
        else:
            self._probe()
        began = time.time()
        with resume.disk_full_is_a_sentence(self.checkpoints):
            if start is not None and resume.step_of(start) >= self.trainer.args.max_steps:
                self._take(start)
            else:
                self.trainer.train(resume_from_checkpoint=str(start) if start else None)
            state = self.trainer.state
            lines = callbacks.read(self.log)
            losses = plots.series(lines, "loss")[1]
            held = plots.series(lines, "eval_loss")[1]
            tokens = max((line.get("trained_tokens", 0) for line in lines), default=0)
            self.result = {
                "steps": state.global_step,
                "train_s": round(max((line.get("seconds", 0.0) for line in lines), default=time.time() - began), 2),
                "first_loss": losses[0] if losses else None,
                "last_loss": plots.smoothed(losses)[-1] if losses else None,
                "trained_tokens": tokens,
                "rows": len(self.train_rows),
                **methods.counts(self.model),
            }
            if tokens:
                self.result["tokens_per_s"] = round(tokens / max(self.result["train_s"], 1e-6), 1)
            if held:
                self.result.update(
                    eval_loss=state.best_metric
                    if self.trainer.args.load_best_model_at_end and state.best_metric is not None
                    else held[-1],
                    last_eval_loss=held[-1],
                    best_step=state.best_global_step or state.global_step,
                )
            self.result.update(
                {
                    k.removeprefix("eval_").replace("rewards/", "held_out_"): v
                    for k, v in self._held_out_numbers(lines).items()
                }
            )
        return self

    def _probe(self) -> None:
        """Correct the plan by one row, and shorten the run to what max_minutes leaves room for."""
        from helpers.train import probe

        self.plan = probe.run(self)
        if self.plan.measured:
            print(self.plan.headline(), flush=True)
        if not self.params.max_minutes:
            return
        if not self.plan.measured:
            print("This kind of training is not probed: max_minutes goes by the plan's estimate.", flush=True)
        per_step = self.plan.tokens / self.plan.steps / self.plan.tokens_per_s
        fits = distributed.shared(lambda: max(1, int(self.params.max_minutes * 60 * IN_ROWS / per_step)))
        if fits < self.trainer.args.max_steps:
            whole = self.trainer.args.max_steps
            print(
                f"{fits} of {whole} steps fit into max_minutes {self.params.max_minutes:g}: the schedule ends there.",
                flush=True,
            )
            self.notes.append(f"{fits} steps, what fits into {self.params.max_minutes:g} minutes")
            self._length(fits)

    def _take(self, checkpoint: Path) -> None:
        """The weights of a run that had reached its last step when it was killed: the trainer's own loop would add one more."""
        from transformers import TrainerState

        if distributed.sharded(self.params.method):
            raise TunebookError(
                f"{checkpoint} is the last step of a sharded run; run the same command in one process to finish it, or remove that folder."
            )
        state = self.trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        best = checkpoint.parent / Path(state.best_model_checkpoint or "-").name
        self.trainer._load_from_checkpoint(
            str(best if self.trainer.args.load_best_model_at_end and best.is_dir() else checkpoint)
        )

    def _length(self, steps: int) -> None:
        """Let the run and its schedule end after this many optimizer steps."""
        from helpers.train import config

        if steps != self.trainer.args.max_steps:
            config.shorten(self.trainer.args, self.params, steps)
            self.plan = self.plan.shortened(steps)

    def _held_out_numbers(self, lines: list[dict[str, Any]]) -> dict[str, float]:
        """The preference numbers of the kept step's evaluation."""
        best = self.result.get("best_step")
        found = [line for line in lines if "eval_rewards/margins" in line and (line["step"] == best or best is None)]
        return {
            k: v for k, v in (found[-1] if found else {}).items() if k.startswith(("eval_rewards/", "eval_log_odds"))
        }

    def figure(self) -> Any:
        """The loss curves, drawn again from log.jsonl."""
        return plots.training_curves(callbacks.read(self.log), f"{self.params.run}: {self.params.stage}")

    def margins(self) -> Any:
        """Log odds, margin and accuracy of a preference run: each step and on held-out pairs."""
        return plots.preference_curves(callbacks.read(self.log), f"{self.params.run}: {self.params.stage}")

    def summary(self) -> Any:
        """What came out, as a table."""

        def plain(value: Any) -> str:
            return (
                f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if isinstance(value, float) else str(value)
            )

        return display.Html(
            display.table(
                [(k.replace("_", " "), plain(v)) for k, v in self.result.items() if v is not None]
                + [("how", n) for n in self.notes]
            )
        )

    def left_out(self) -> Any:
        """How many rows came, and why some were left out."""
        return display.Html(
            display.table(
                [(part, *map(str, found.values())) for part, found in self.counts.items() if found],
                ("", *next(iter(self.counts.values()))),
            )
        )

    def answers(self, count: int = 4) -> Any:
        """Greedy answers to held-out prompts beside their references; also appended to samples.jsonl."""
        sampler = callbacks.Samples(self.samples, self.prompts(count), self.tokenizer)
        found = sampler.write(self.model, self.trainer.state.global_step)
        return display.Html(
            display.table(
                [(r["prompt"], r["answer"], r["reference"], "yes" if r["stopped"] else "no") for r in found],
                ("prompt (its end)", "answer", "reference", "stopped by itself"),
            )
        )

    def finish(self) -> Any:
        """Write the adapter (or the whole model), the pictures and the manifest; returns the manifest."""
        if not self.result:
            raise TunebookError("The job has not been trained; call its train() first.")
        with resume.disk_full_is_a_sentence(self.checkpoints):
            folder = self.stage.path / ("adapter" if hasattr(self.model, "peft_config") else "model")
            whole = (
                distributed.whole_state(self.model, hasattr(self.model, "peft_config"))
                if distributed.sharded(self.params.method)
                else None
            )
            if not is_first():
                return None
            save(self.model, self.tokenizer, folder, self.stage.path / "work" / "pissa", whole)
            pictures = [("loss.png", plots.training_curves)] + (
                [("margins.png", plots.preference_curves)] if self.draw is plots.preference_curves else []
            )
            for name, draw in pictures:
                figure = draw(callbacks.read(self.log), f"{self.params.run}: {self.params.stage}")
                display.save_figure(self.stage, figure, name)
        from helpers.model.loading import template_hash, tokenizer_hash

        plan = self.plan
        if self.result.get("tokens_per_s"):
            steps = [line["tokens_per_s"] for line in callbacks.read(self.log) if "tokens_per_s" in line]
            steady = (
                sorted(steps[min(3, len(steps) - 1) :])[len(steps[min(3, len(steps) - 1) :]) // 2]
                if steps
                else self.result["tokens_per_s"]
            )
            plan = plan.held_against(peak_gib=machine.peak_memory_gib(), tokens_per_s=steady)
        metrics = {k: v for k, v in self.result.items() if v is not None}
        metrics["peak_gib"] = machine.peak_memory_gib()
        return self.stage.finish(
            metrics,
            template_hash=template_hash(self.tokenizer),
            tokenizer_hash=tokenizer_hash(self.tokenizer),
            model=self.source.as_dict(),
            extra={
                "data_counts": self.counts,
                "plan": plan.as_dict(),
                "notes": self.notes,
                "trained": folder.name,
                "method": self.params.method,
                "merge_onto": "nf4" if self.params.init == "loftq" and not self.adapter else "16bit",
            },
        )


def save(
    model: Any, tokenizer: Any, folder: Path, first: Path | None = None, whole: dict[str, Any] | None = None
) -> None:
    """Adapter or whole model with its tokenizer into `folder`, by a neighbour that is renamed, so it is whole or not there.

    first: PiSSA's first adapter, where there is one: what is written is then plain LoRA for the unchanged base.
    whole: the state gathered from all processes, where the model is sharded.
    """
    import shutil

    import torch

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if hasattr(model, "peft_config"):
        extra = {"path_initial_model_for_weight_conversion": str(first)} if first is not None and first.is_dir() else {}
        if whole:
            extra["state_dict"] = whole
        if model.peft_config[
            "default"
        ].trainable_token_indices:  # their rows are in the adapter; the whole embedding would be a gigabyte
            extra["save_embedding_layers"] = False
        model.save_pretrained(partial, safe_serialization=True, selected_adapters=["default"], **extra)
    else:
        state = {
            k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in (whole or model.state_dict()).items()
        }
        model.config.dtype = torch.bfloat16
        model.save_pretrained(partial, state_dict=state, safe_serialization=True)
    (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty card; 05 writes the real one
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def checked_source(params: Any, data: Any) -> tuple[Any, Any]:
    """(ModelSource, tokenizer) of the base that the data was rendered for. Raises TunebookError for another template."""
    from helpers.model.loading import load_tokenizer, resolve_model, template_hash

    known = data.data.get("model") or {}
    if params.model:
        source = resolve_model(params.model)
    elif known.get("origin") == "folder":
        source = resolve_model(known["path"])
    else:
        source = resolve_model(known["name"], known.get("revision", "") if known.get("origin") == "hub" else "")
    os.environ["HF_HUB_OFFLINE"] = (
        "1"  # the model is here: from now on PEFT must not ask a hub about it whenever it saves an adapter
    )
    warnings.filterwarnings(
        "ignore", "Could not find a config file|The PEFT config's `base_model_name_or_path` was renamed"
    )
    tokenizer = load_tokenizer(source)
    if data.data.get("template_hash") and template_hash(tokenizer) != data.data["template_hash"]:
        raise TunebookError(
            f"The chat template of {source.name} is not the one that the data of run {params.run!r} was rendered with; run notebook 01 "
            f"again with model set to {source.name!r}, or leave model empty here."
        )
    if added := data.data["params"].get("add_tokens"):
        from helpers.data.vocabulary import add_tokens

        add_tokens(None, tokenizer, added)
    return source, tokenizer


def exportable(params: Any, source: Any, adapter: Path | None, stage: Any) -> None:
    """Refuse a model that would train and then not export to GGUF (`export_check`)."""
    if params.export_check:
        from helpers.gguf import preflight

        preflight.check(source, adapter=adapter, where=stage.path).require()


def plan_of(params: Any, examples: Any, source: Any, stage: str) -> Any:
    """The planner's plan for these training rows. Without a GPU a whole optimizer step goes into one row where that fits:
    rows that begin alike are then worked out once (`helpers.model.prefix_sharing`), which counts for more there than anything else."""
    from helpers.model import packed_attention
    from helpers.planner import plan as planner

    lengths, padded = rows.lengths_of(examples), rows.lengths_of(examples, padded=True)

    def planned(values: Any) -> Any:
        return planner.plan(values, lengths, source, stage=stage, world_size=world_size(), padded_lengths=padded)

    plan = planned(params)
    if (
        plan.backend == "hf"
        and plan.attention == packed_attention.SDPA
        and plan.packed
        and plan.accumulation > 1
        and not params.row_tokens
    ):
        whole = sum(sorted(lengths)[-math.ceil(params.batch_size / world_size()) :])
        try:
            return planned({**params.as_dict(), "row_tokens": whole})
        except TunebookError:  # such a row does not fit: keep the one that does
            return plan
    return plan


def world_size() -> int:
    """Processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """True in the process that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def adapter_of(start_from: str, base: str, tokenizer: Any) -> Path:
    """The adapter folder named by start_from, checked: the same base, the same template."""
    import json

    from helpers.model.loading import load_tokenizer, template_hash

    folder = Path(start_from).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise TunebookError(
            f"start_from is {start_from!r}, which is no adapter folder (it has no adapter_config.json); name the adapter folder of a "
            "finished run, such as runs/default/02_qlora_sft/adapter."
        )
    trained_on = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path") or ""
    if trained_on and base and Path(trained_on).name != Path(base).name:
        raise TunebookError(
            f"The adapter in {folder} was trained on {trained_on} and this run's base is {base}; use that base in notebook 01, or "
            "start from another adapter."
        )
    if (folder / "tokenizer_config.json").is_file() and template_hash(load_tokenizer(folder)) != template_hash(
        tokenizer
    ):
        raise TunebookError(
            f"The adapter in {folder} was trained with another chat template than this data was rendered with; run notebook 01 again "
            "with its base, or start from another adapter."
        )
    return folder.resolve()
