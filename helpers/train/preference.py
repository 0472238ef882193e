"""Notebook 03: preference training on the pairs of notebook 01, from the SFT adapter, from the base or any adapter.

ORPO (arXiv:2403.07691) needs no reference model; DPO, KTO and SimPO stand beside it by parameter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from helpers import plots, runs, steps
from helpers.errors import TunebookError
from helpers.params import OrpoParams
from helpers.train import methods, rows
from helpers.train.job import TrainJob, base_model, first, open_stage, plan_for


class PreferenceJob(TrainJob):
    drawn: ClassVar = {**TrainJob.drawn, "margins": ("margins", plots.preference_curves)}

    @steps.look
    def margins(self) -> Any:
        """Log odds, margin and accuracy: each step and on held-out pairs."""
        return self._draw("margins")


def open(params: OrpoParams) -> PreferenceJob:
    """The job of these parameters. Raises TunebookError for what cannot work, cannot fit, or has no pairs."""
    stage = open_stage("orpo", params)
    if stage.done:
        return PreferenceJob(stage)
    data = stage.parents["data"]
    source, tokenizer = base_model(params, data)
    adapter = None
    if params.start_from == "sft":
        adapter = _sft_adapter(stage.parents["sft"])
    elif params.start_from != "base":
        adapter = methods.adapter_to_start_from(params.start_from, source.name, tokenizer)
    if not rows.has_rows(data, "preference.parquet"):
        raise TunebookError(
            f"Run {params.run!r} has no preference pairs; set preference_dataset in notebook 01 and run it again."
        )
    counts, held_out = {}, None
    train, counts["train"] = rows.pairs(data, "preference.parquet", params.max_length, params.swap_labels)
    if not len(train):
        reasons = ", ".join(f"{n} {reason}" for reason, n in counts["train"]["left out"].items())
        raise TunebookError(
            f"{data.path / 'preference.parquet'} has no pair to train on ({reasons}); raise max_length, or check the "
            "preference data of notebook 01."
        )
    if rows.has_rows(data, "preference_eval.parquet"):
        held_out, counts["eval"] = rows.pairs(data, "preference_eval.parquet", params.max_length)
        held_out = first(held_out, params.eval_rows)
    if held_out is None:
        print("No pair is held out: this run will have no held-out figure, and its last step is kept.")
    plan = plan_for(params, train, source, adapter, stage)
    return PreferenceJob(stage, source, tokenizer, train, held_out, counts, plan, adapter)


def _sft_adapter(sft: runs.Manifest) -> Path:
    if not (sft.path / "adapter").is_dir():
        raise TunebookError(
            f"The SFT stage of run {sft.data['run']!r} trained the model's own weights, not an adapter; set start_from "
            f"to 'base' and name its model folder ({sft.path / 'model'}) as model."
        )
    return sft.path / "adapter"
