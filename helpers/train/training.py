"""Notebooks 02 and 03, from the rows of notebook 01 to an adapter: SFT, then preference training. ORPO
(arXiv:2403.07691) needs no reference model; DPO, KTO and SimPO stand beside it by parameter.

job = training.open(params)   checks, base, rows, plan: nothing is loaded or written
job.train()                   the model in 16 or 4 bits, an adapter on it (`methods`), TRL's trainer on packed rows
                              (`trainers`, `rows`), probing rows (`deadline`), then the loop, or the rest of one that
                              was killed (`resume`)
job.finish()                  adapter/, log.jsonl, loss.png, tensorboard/, and the manifest last
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from helpers import display, drive, machine, runs, steps
from helpers.data.vocabulary import of_run, without_rows
from helpers.errors import TunebookError
from helpers.gguf import preflight
from helpers.model import loading, weights
from helpers.model.layer_kinds import rope_limit, shape_of
from helpers.model.loading import ModelSource, load_config, load_tokenizer, resolve_model, template_hash
from helpers.params import TrainingParams, resolve
from helpers.planner import cost_model, row_plan
from helpers.planner import plan as planner
from helpers.planner.plan import Plan
from helpers.train import config, distributed, examples, resume
from helpers.train.job import TrainJob

MOST_ROWS = 8_000  # of an estimate, which takes a tenth of a second then
CARDS = ("T4", "L4", "A100-40", "A100-80", "H100")


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
    decided = distributed.shared(lambda: _decided(plan))  # of several GPUs the first decides
    params = dataclasses.replace(params, **decided)
    if decided != _decided(plan):
        plan = _plan(params, train, source, adapter, stage)
    config.check(params, gpu.capability if gpu else None)
    plan = dataclasses.replace(plan, reasons=(*why, *plan.reasons))
    return TrainJob(stage, source, tokenizer, train, held_out, counts, plan, adapter, params)


def further(request: dict[str, Any], event: Callable[[Any], None]) -> str:
    """In a child of `as_long`: the folder of the adapter, trained in a runs folder of its own, not kept on a drive."""
    from helpers.train import as_long

    os.environ["TUNEBOOK_RUNS"] = request["runs"]
    os.environ.pop("TUNEBOOK_KEEP", None)
    job = open(resolve("sft", request["params"]))
    if not job.stage.done:
        job.build().trainer.add_callback(as_long.Tell(job, event))
        job.train()
        job.finish()
    return str(job.stage.path / "adapter")


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
    loading.check_shapes(weights.Weights(source.path), load_config(source))
    os.environ["HF_HUB_OFFLINE"] = "1"  # from now on PEFT must not ask a hub whenever it saves an adapter
    warnings.filterwarnings("ignore", "Could not find a config file")  # what PEFT says then
    own, tokenizer = load_tokenizer(source), load_tokenizer(of_run(data.path, source.path))
    if lost := without_rows(load_tokenizer(source, mended=False), load_config(source).get_text_config().vocab_size):
        raise TunebookError(f"The tokenizer of {source.name} does not fit its model: {lost}")
    chosen, known_hash = data.data.get("chat_template"), data.data.get("template_hash")
    shown = known_hash in (None, template_hash(tokenizer)) and (chosen or known_hash in (None, template_hash(own)))
    if not shown or not own.get_vocab().items() <= tokenizer.get_vocab().items():
        what, how = ("vocabulary", "written") if shown else ("chat template", "rendered")
        raise TunebookError(
            f"The {what} of {source.name} is not the one that the data of run {params.run!r} was {how} with; "
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
    return adapter_to_start_from(folder, base, tokenizer)


def adapter_to_start_from(folder: Path, source: loading.ModelSource, tokenizer: Any) -> Path:
    """The adapter folder to train further. Raises TunebookError for one of another base, tokenizer or chat template.

    A run's manifest names its base by hash; an adapter from elsewhere has its base's name alone.
    """
    try:
        trained_on = weights.check_adapter(folder).get("base_model_name_or_path") or source.name
    except TunebookError as error:
        raise TunebookError(
            f"start_from is {str(folder)!r}, which is not an adapter folder to train further: {error} Name "
            "that of a finished run, such as runs/default/02_qlora_sft/adapter."
        ) from None
    known = weights.made_by(folder).get("model", {}).get("hash")
    same = known == weights.fingerprint(source.path) if known else Path(trained_on).name == Path(source.name).name
    what = "" if same else f"on {trained_on}{' with other weights, config or tokenizer' * bool(known)}"
    if same and (folder / "tokenizer_config.json").is_file():
        own = loading.load_tokenizer(folder)
        if loading.template_hash(own) != loading.template_hash(tokenizer):
            what = "with another chat template than this data was rendered with"
        elif loading.tokenizer_hash(own) != loading.tokenizer_hash(tokenizer):
            what = "with other added tokens than this data has"
    if what:
        raise TunebookError(
            f"The adapter in {folder} was trained {what}, and this base is {source.name}; run notebook 01 again with "
            "its base and tokens, or start from another adapter."
        )
    return folder.resolve()


def _as_begun(params: Any, adapter: Path | None, stage: runs.Stage, tokenizer: Any) -> tuple[Any, list[str]]:
    """(parameters, what the plan says of their method): `auto` is what the run's checkpoints were trained with, or the
    adapter that it begins with, whose base weights have to stay the same."""
    found, of = {}, resume.identity(params, stage.parents["data"], tokenizer)
    if adapter:
        found[f"{adapter} was"] = weights.made_by(adapter)
    if params.method == "auto" and params.resumes:
        mirror = params.mirror or drive.mirror()
        mirrored = resume.Mirror(mirror, stage, of).folder.parent.glob("*") if mirror else ()
        for checkpoint in (c for folder in (stage.path / "checkpoints", *mirrored) for c in resume.numbered(folder)):
            begun = (resume.sealed(checkpoint) or {}).get("of", {})
            if {**begun, "method": "auto", "quantize": params.quantize} == of:
                found = {"the checkpoints of this run were": begun}
                break
    for what, begun in found.items():
        method, eight, gpu = begun.get("method"), begun.get("quantize") == "fp8", machine.gpu()
        if params.method == "auto" and method in ("lora", "qlora") and (eight or params.quantize != "fp8"):
            keeps = eight and params.quantize == "auto" and config.has_fp8(gpu.capability if gpu else None)
            params = dataclasses.replace(params, method=method, quantize="fp8" if keeps else params.quantize)
            if eight == (params.quantize == "fp8"):
                return params, [f"Method auto: {method}{' on FP8' * eight}, as {what} trained."]
        if method in ("lora", "qlora") and (method, eight) != (params.method, params.quantize == "fp8"):
            own, theirs = params.method + " on FP8" * (params.quantize == "fp8"), method + " on FP8" * eight
            return params, [f"Warning: method is {own}, and {what} trained by {theirs}, on other base weights."]
    return params, []


def _plan(params: TrainingParams, train: Any, source: ModelSource, adapter: Path | None, stage: runs.Stage) -> Plan:
    """The planner's plan for these rows. Raises TunebookError for a job that cannot fit, or a model that would train
    and then not export to GGUF (`export_check`)."""
    warnings: tuple[str, ...] = ()
    if params.export_check:
        tokenizer = of_run(stage.parents["data"].path, source.path)
        warnings = preflight.check(source, adapter=adapter, where=stage.path, tokenizer=tokenizer).require().warnings
    data, world = stage.parents["data"], distributed.size()
    lengths, padded = examples.lengths_of(train), examples.lengths_of(train, padded=True)
    each = [n // 2 for n in padded] if "chosen_ids" in train.column_names else lengths
    limit, alone = rope_limit(load_config(source)), not params.packing and params.micro_batch == 1
    if min(each) <= limit < max(each) and not alone:
        raise TunebookError(
            f"{sum(n > limit for n in each):,} of {len(each):,} rows are longer than {limit:,} tokens, and beside them "
            f"{source.name} gives shorter ones other rotary frequencies than alone; set max_length to {limit} in "
            "notebook 01, or packing to False and micro_batch to 1."
        )
    plan = _planned(params, data, source, lengths=lengths, padded_lengths=padded, world_size=world)
    return dataclasses.replace(plan, reasons=(*plan.reasons, *warnings))


def _decided(plan: Plan) -> dict[str, Any]:
    """The parameters that the planner chose where they were `auto`, or where nothing else fitted."""
    made = plan.setting.params
    return {"method": made.method, "quantize": made.quantize, "shard_weights": made.shard_weights}


def _planned(params: TrainingParams, data: runs.Manifest, source: Any, **given: Any) -> Plan:
    """The plan of a job on that data. given: as `planner.plan` takes it."""
    given["sequence"] = int(data.metrics.get("lengths", {}).get("max_length") or 0)
    if params.quantize == "fp8":
        params = dataclasses.replace(params, method="lora")
    plan = planner.plan(params, source=source, **given)
    if plan.shares and plan.accumulation > 1 and not (params.row_tokens or plan.batches.accumulation):
        # A whole optimizer step in one row, where that fits: a prefix that its rows share is then computed once, which
        # counts for more here than anything else.
        lengths, world = given["lengths"], plan.world_size
        steps = row_plan.steps_of(tuple(lengths), plan.batches, params.seed, params.max_steps, math.ceil(params.epochs))
        heaviest = max(sum(lengths[i] for i in step) for step in steps.heaviest)
        whole = math.ceil(heaviest / world) + max(lengths) * (world > 1)
        with contextlib.suppress(TunebookError):  # such a row does not fit: keep the one that does
            longer = dataclasses.replace(params, row_tokens=whole, **_decided(plan))
            made = planner.plan(longer, source=source, **given)
            said = [reason for reason in plan.reasons if reason.startswith("Method auto")]
            return dataclasses.replace(made, reasons=(*said, *made.reasons))
    return plan


@dataclasses.dataclass(frozen=True)
class Outlook:
    """A job on one GPU: memory that it needs (0: not known); seconds (expected, shortest, longest), or why not."""

    card: cost_model.Card
    need_gib: float
    seconds: tuple[float, float, float] | None
    why: str = ""


class Estimate:
    """What 02 or 03 would come to with other parameters. Rows and base are read once; then a plan takes milliseconds,
    for which a sample stands in for more than MOST_ROWS rows."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def __call__(self, params: TrainingParams) -> tuple[int, int, list[Outlook]]:
        """(trained parameters, all parameters, the outlook here and on each of CARDS). Raises TunebookError where
        there is nothing to estimate yet: no data, no base on this machine, no row within max_length."""
        adapter = _as_adapter(params)
        params = dataclasses.replace(params, method=adapter.method)
        data = runs.load(params.run, "data", verify=False)
        base = _base_here(params, data)
        base_config, shape = self._once(("base", base), lambda: (load_config(base), shape_of(base)))
        key = ("rows", data.sha256, getattr(params, "loss", "") == "kto")
        lengths, padded = examples.lengths_at(self._once(key, lambda: examples.token_counts(data, params)), params)
        if not lengths:
            remedy = "set train_on to 'all'" if params.stage == "sft" else "raise max_length"
            raise TunebookError(f"No training row of run {params.run!r} is left; {remedy}.")
        count = len(lengths)
        if count > MOST_ROWS:
            chosen = [*random.Random(0).sample(range(count), MOST_ROWS - 1), max(range(count), key=padded.__getitem__)]
            lengths, padded = ([every[i] for i in sorted(chosen)] for every in (lengths, padded))
        looked, passes = params, max(1, 2 * MOST_ROWS // len(lengths))
        if params.max_steps > passes * count / params.batch_size or params.epochs > passes or count > MOST_ROWS:
            looked = dataclasses.replace(params, max_steps=0, epochs=float(min(passes, math.ceil(params.epochs))))
        here = cost_model.card_named(params.plan_for) if params.plan_for else cost_model.card_here()
        given = {"lengths": lengths, "padded_lengths": padded, "shape": shape, "data": data, "source": base_config}
        found = []
        for card in (here, *(cost_model.CARDS[name] for name in CARDS)):
            try:
                config.check(params, card.capability)
                plan = _planned(looked, card=card, advise=card is here, **given)
            except TunebookError as error:
                found.append(Outlook(card, getattr(error, "need_gib", 0.0), None, str(error)))
                continue
            if looked is not params:
                epoch = plan.steps / looked.epochs * count / len(lengths)
                plan = plan.shortened(params.max_steps or math.ceil(epoch * params.epochs))
            found.append(Outlook(card, plan.option.need_gib, plan.seconds))
        setting = cost_model.base_setting(adapter, here, 1, "hf", False, False)
        return cost_model.trained_parameters(shape, setting), shape.parameters, found

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known = {k: v for k, v in self._known.items() if k[0] != key[0]} | {key: make()}
        return self._known[key]


def _base_here(params: TrainingParams, data: runs.Manifest) -> Path:
    """The folder of the job's base, which must be on this machine already. Raises TunebookError."""
    from huggingface_hub import errors, try_to_load_from_cache

    known = data.data.get("model") or {}
    if params.model in ("", known.get("name")):
        return Path(known["path"])
    with contextlib.suppress(errors.HFValidationError):
        file = machine.path(params.model) / "config.json"
        found = file if file.is_file() else try_to_load_from_cache(params.model, "config.json")
        if isinstance(found, (str, Path)):
            return Path(found).parent
    raise TunebookError(f"The model {params.model!r} is not on this machine yet; the cell below gets it, then plans.")


def _as_adapter(params: TrainingParams) -> TrainingParams:
    """The parameters with rank and layers of the adapter that is trained further, and its method for "auto"."""
    sft = params.stage == "orpo" and params.start_from == "sft"
    if not sft and params.start_from in config.NO_ADAPTER:
        return dataclasses.replace(params)
    path = runs.load(params.run, "sft", verify=False).path / "adapter" if sft else machine.path(params.start_from)
    if not (path / "adapter_config.json").is_file():
        raise TunebookError(f"start_from is {params.start_from!r}, and {path} holds no adapter to train further.")
    adapter = json.loads((path / "adapter_config.json").read_text())
    modules = adapter.get("target_modules") or ""
    modules = modules if isinstance(modules, str) else ",".join(sorted(modules))
    method = params.method
    if method == "auto":
        method = weights.made_by(path).get("method") or method
    return dataclasses.replace(params, rank=adapter.get("r", params.rank), target_modules=modules, method=method)
