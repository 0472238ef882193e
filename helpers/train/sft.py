"""Notebook 02, supervised fine-tuning on the rows of notebook 01, from rows to adapter:

job = sft.open(params)     1. checks, base, rows, plan: nothing is loaded or written
job.train()                2. the model in 4 bits (`job.TrainJob._load`), an adapter on it (`methods.trainable`), packed rows
                              and TRL's trainer (`trainers.make`), one probing row (`probe.run`), then the loop, or the
                              rest of one that was killed (`resume.newest`)
job.finish()               3. adapter/, log.jsonl, loss.png, tensorboard/, and the manifest last
"""

from __future__ import annotations

from typing import Any

from helpers import runs
from helpers.train import methods, rows
from helpers.train.job import Prepared, TrainJob, base_model, first, open_stage, plan_for


def open(params: Any) -> TrainJob:
    """The job of these parameters. Raises TunebookError for what cannot work, cannot fit, or has no rows."""
    stage = open_stage("sft", params)
    if stage.done:
        return TrainJob(stage)
    data = stage.parents["data"]
    source, tokenizer = base_model(params, data)
    adapter = methods.adapter_to_start_from(params.start_from, source.name, tokenizer) if params.start_from else None
    train, counts = rows.supervised(data, "train.parquet", params.train_on)
    held_out, found = None, {}
    if rows.has_rows(data, "eval.parquet"):
        held_out, found = rows.supervised(data, "eval.parquet", params.train_on)
        held_out = first(held_out, params.eval_rows)
    plan = plan_for(params, train, source, adapter, stage)
    return TrainJob(
        stage, Prepared(source, tokenizer, train, held_out, {"train": counts, "eval": found}, plan, adapter)
    )


def run(params: Any) -> runs.Manifest | None:
    """Open, train and finish in one go."""
    job = open(params)
    job.train()
    return job.finish()
