"""Notebooks 02 and 03, from the rows of notebook 01 to an adapter: SFT, then preference training. ORPO
(arXiv:2403.07691) needs no reference model; DPO, KTO and SimPO stand beside it by parameter.

job = training.open(params)   checks, base, rows, plan: nothing is loaded or written
job.train()                   the model in 16 or 4 bits, an adapter on it (`methods`), TRL's trainer on packed rows
                              (`trainers`, `rows`), probing rows (`deadline`), then the loop, or the rest of one that
                              was killed (`resume`)
job.finish()                  adapter/, log.jsonl, loss.png, tensorboard/, and the manifest last
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, cast

from helpers import display, drive, machine, runs, steps
from helpers.data.vocabulary import of_run, without_rows
from helpers.errors import TunebookError
from helpers.gguf import preflight
from helpers.model.loading import ModelSource, load_config, load_tokenizer, resolve_model, template_hash
from helpers.params import TrainingParams
from helpers.planner import plan as planner
from helpers.planner import row_plan
from helpers.planner.plan import Plan
from helpers.train import config, distributed, examples, methods, resume
from helpers.train.job import TrainJob

NO_HUB = "Could not find a config file|The PEFT config's `base_model_name_or_path` was renamed"  # what PEFT warns then


def open(params: TrainingParams) -> TrainJob:
    """The job of these parameters. Raises TunebookError for what cannot work, cannot fit or has no rows."""
    gpu = machine.gpu()
    config.check(params, gpu.capability if gpu else None)
    if why := steps.needless(params.stage, params):
        if distributed.first():
            display.say(f"Skipped: {why}.")
            runs.set_aside(runs.folder(params.run, params.stage))  # of other data; 04 must not take it
        return cast(TrainJob, steps.Nothing())
    stage = distributed.shared(lambda: _stage(params))
    if stage.done:
        return TrainJob(stage)
    data = stage.parents["data"]
    source, tokenizer = _base(params, data)
    adapter = _adapter(params, stage.parents.get("sft"), source, tokenizer)
    train, held_out, counts = examples.read(data, params)
    params, why = distributed.shared(lambda: _as_begun(params, adapter, stage, tokenizer))
    if gpu and not params.plan_for and distributed.first() and (held := machine.gpu_held()):
        display.say(f"Memory of the GPU is also held by {held}; stop it, and there is more room.")
    plan = _plan(params, train, source, adapter, stage)
    method = distributed.shared(lambda: plan.method)  # of several GPUs the first decides
    if method != plan.method:
        plan = _plan(dataclasses.replace(params, method=method), train, source, adapter, stage)
    params = dataclasses.replace(params, method=method)
    config.check(params, gpu.capability if gpu else None)
    plan = dataclasses.replace(plan, reasons=(*why, *plan.reasons))
    return TrainJob(stage, source, tokenizer, train, held_out, counts, plan, adapter, params)


def _stage(params: TrainingParams) -> runs.Stage:
    """The stage's folder, looked at and not touched. Of several processes the first begins the work for all."""
    stage = runs.stage(params.stage, params)
    if distributed.size() > 1 and not stage.done:
        stage.begin()
    return stage


def _base(params: TrainingParams, data: runs.Manifest) -> tuple[ModelSource, Any]:
    """(source, the run's tokenizer) of the base that the data was rendered for; TunebookError for a base with another
    chat template, where none was chosen for the run, or with another vocabulary."""
    known = data.data.get("model") or {}
    from_hub, from_folder = (known.get("origin") == origin and not params.model for origin in ("hub", "folder"))
    name = params.model or known["path" if from_folder else "name"]
    source = resolve_model(name, known.get("revision", "") if from_hub else "")
    os.environ["HF_HUB_OFFLINE"] = "1"  # from now on PEFT must not ask a hub whenever it saves an adapter
    warnings.filterwarnings("ignore", NO_HUB)
    own, tokenizer = load_tokenizer(source), load_tokenizer(of_run(data.path, source.path))
    if lost := without_rows(load_tokenizer(source, mended=False), load_config(source).get_text_config().vocab_size):
        raise TunebookError(f"The tokenizer of {source.name} does not fit its model: {lost}")
    chosen, known_hash = data.data.get("chat_template"), data.data.get("template_hash")
    if known_hash not in (None, template_hash(tokenizer)) or not (chosen or known_hash in (None, template_hash(own))):
        raise TunebookError(
            f"The chat template of {source.name} is not the one that the data of run {params.run!r} was rendered with; "
            f"run notebook 01 again with model set to {source.name!r}, or leave model empty here."
        )
    if not own.get_vocab().items() <= tokenizer.get_vocab().items():
        raise TunebookError(
            f"The vocabulary of {source.name} is not the one that the data of run {params.run!r} was written with; "
            f"run notebook 01 again with model set to {source.name!r}, or leave model empty here."
        )
    return source, tokenizer


def _adapter(params: TrainingParams, sft: runs.Manifest | None, base: ModelSource, tokenizer: Any) -> Path | None:
    """Folder of the adapter that is trained further."""
    if sft and not (sft.path / "adapter").is_dir():
        raise TunebookError(
            f"The SFT stage of run {sft.data['run']!r} trained the model's own weights, not an adapter; set start_from "
            f"to 'base' and name its model folder ({sft.path / 'model'}) as model."
        )
    if not sft and params.start_from in config.NO_ADAPTER:
        return None
    folder = sft.path / "adapter" if sft else machine.path(params.start_from)
    return methods.adapter_to_start_from(folder, base, tokenizer)


def _as_begun(params: Any, adapter: Path | None, stage: runs.Stage, tokenizer: Any) -> tuple[Any, list[str]]:
    """(parameters, what the plan says of their method): `auto` is what the run's checkpoints were trained with, or the
    adapter that it begins with, whose base weights have to stay the same."""
    found, of = {}, resume.identity(params, stage.parents["data"], tokenizer)
    if earlier := adapter and adapter.parent / "manifest.json":
        found[f"{adapter} was"] = json.loads(earlier.read_text()).get("method") if earlier.is_file() else None
    if params.method == "auto" and params.resumes:
        mirror = params.mirror or drive.mirror()
        mirrored = resume.Mirror(mirror, stage, of).folder.parent.glob("*") if mirror else ()
        for checkpoint in (c for folder in (stage.path / "checkpoints", *mirrored) for c in resume.numbered(folder)):
            if (sealed := resume.sealed(checkpoint)) and {**sealed["of"], "method": "auto"} == of:
                found = {"the checkpoints of this run were": sealed["of"]["method"]}
                break
    for what, method in found.items():
        if method in ("lora", "qlora") and params.method == "auto":
            return dataclasses.replace(params, method=method), [f"Method auto: {method}, as {what} trained."]
        if method in ("lora", "qlora") and method != params.method:
            return params, [
                f"Warning: method is {params.method}, and {what} trained by {method}, on other base weights."
            ]
    return params, []


def _plan(params: TrainingParams, train: Any, source: ModelSource, adapter: Path | None, stage: runs.Stage) -> Plan:
    """The planner's plan for these rows. Raises TunebookError for a job that cannot fit, or a model that would train
    and then not export to GGUF (`export_check`)."""
    if params.export_check:
        tokenizer = of_run(stage.parents["data"].path, source.path)
        preflight.check(source, adapter=adapter, where=stage.path, tokenizer=tokenizer).require()
    lengths, padded = examples.lengths_of(train), examples.lengths_of(train, padded=True)
    world = distributed.size()
    sequence = int(stage.parents["data"].metrics.get("lengths", {}).get("max_length") or 0)
    plan = planner.plan(params, lengths, source, world, padded_lengths=padded, sequence=sequence)
    if plan.shares and plan.accumulation > 1 and not (params.row_tokens or plan.batches.accumulation):
        # A whole optimizer step in one row, where that fits: a prefix that its rows share is then computed once, which
        # counts for more here than anything else.
        heaviest = row_plan.heaviest(lengths, plan.batches, params.seed, math.ceil(plan.steps * plan.batch_size))
        whole = math.ceil(max(sum(lengths[i] for i in step) for step in heaviest) / world) + max(lengths) * (world > 1)
        try:
            longer = dataclasses.replace(params, row_tokens=whole, method=plan.method)
            return planner.plan(longer, lengths, source, world, padded_lengths=padded, sequence=sequence)
        except TunebookError:  # such a row does not fit: keep the one that does
            return plan
    return plan
