"""Notebook 03: preference training on the pairs of notebook 01, from the SFT adapter, from the base or from any adapter.

ORPO (arXiv:2403.07691) needs no reference model; DPO, KTO and SimPO stand beside it by parameter.
"""

from __future__ import annotations

from typing import Any

from helpers import machine, plots, runs
from helpers.errors import TunebookError
from helpers.train import methods, resume, rows
from helpers.train.job import Job, adapter_of, checked_source, exportable, plan_of


def needs(params: Any) -> tuple[str, ...]:
    """Which finished stages a run reads: the SFT stage only when it starts from it."""
    return ("data", "sft") if params.start_from == "sft" else ("data",)


def prepare(stage: Any) -> Job:
    """Read the pairs, check the settings, plan the run. Raises TunebookError for what cannot work or cannot fit."""
    params, data = stage.params, stage.parents["data"]
    card = machine.gpu()
    methods.check(params, card.capability if card else None)
    if params.resume == "must":
        resume.must_go_on(stage)
    source, tokenizer = checked_source(params, data)
    adapter = None
    if params.start_from == "sft":
        if "sft" not in stage.parents:
            raise TunebookError(
                f"start_from is 'sft' and run {params.run!r} has no finished SFT stage; run notebook 02 first, or set start_from to 'base'."
            )
        adapter = stage.parents["sft"].path / "adapter"
        if not adapter.is_dir():
            raise TunebookError(
                f"The SFT stage of run {params.run!r} trained the model's own weights, not an adapter; set start_from to 'base' and name its "
                f"model folder ({stage.parents['sft'].path / 'model'}) as model."
            )
    elif params.start_from != "base":
        adapter = adapter_of(params.start_from, source.name, tokenizer)
    if not (data.path / "preference.parquet").is_file():
        raise TunebookError(
            f"Run {params.run!r} has no preference pairs; set preference_dataset in notebook 01 and run it again."
        )
    exportable(params, source, adapter, stage)
    train, counts = rows.pairs(data, "preference.parquet", params.max_length, params.swap_labels)
    held_out, found = None, {}
    if (data.path / "preference_eval.parquet").is_file():
        held_out, found = rows.pairs(data, "preference_eval.parquet", params.max_length)
        held_out = held_out.select(range(min(params.eval_rows or len(held_out), len(held_out))))
    plan = plan_of(params, train, source, "orpo")
    return Job(
        stage,
        params,
        source,
        tokenizer,
        train,
        held_out,
        {"train": counts, "eval": found},
        plan,
        adapter,
        plots.preference_curves,
    )


def run(stage: Any) -> Any:
    """Prepare, train and finish in one go; returns the manifest."""
    return prepare(stage).train().finish()


def open_stage(params: Any) -> Any:
    """`runs.open_stage` with the parents that these parameters need."""
    return runs.open_stage("orpo", params, needs(params))
