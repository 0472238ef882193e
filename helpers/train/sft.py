"""Notebook 02: supervised fine-tuning on the rows of notebook 01.

job = sft.prepare(stage)      checks, rows, plan; nothing heavy is loaded
job.train()                   or goes on with a killed run
job.finish()                  adapter/, log.jsonl, loss.png, tensorboard/, manifest
"""

from __future__ import annotations

from typing import Any

from helpers import machine
from helpers.train import methods, resume, rows
from helpers.train.job import Job, adapter_of, checked_source, exportable, plan_of


def prepare(stage: Any) -> Job:
    """Read the rows, check the settings, plan the run. Raises TunebookError for what cannot work or cannot fit."""
    params, data = stage.params, stage.parents["data"]
    card = machine.gpu()
    methods.check(params, card.capability if card else None)
    if params.resume == "must":
        resume.must_go_on(stage)
    source, tokenizer = checked_source(params, data)
    adapter = adapter_of(params.start_from, source.name, tokenizer) if params.start_from else None
    exportable(params, source, adapter, stage)
    train, counts = rows.supervised(data, "train.parquet", params.train_on)
    held_out, found = None, {}
    if (data.path / "eval.parquet").is_file() and _has_rows(data.path / "eval.parquet"):
        held_out, found = rows.supervised(data, "eval.parquet", params.train_on)
        held_out = held_out.select(range(min(params.eval_rows or len(held_out), len(held_out))))
    plan = plan_of(params, train, source, "sft")
    return Job(stage, params, source, tokenizer, train, held_out, {"train": counts, "eval": found}, plan, adapter)


def _has_rows(path: Any) -> bool:
    import pyarrow.parquet as parquet

    return parquet.read_metadata(path).num_rows > 0


def run(stage: Any) -> Any:
    """Prepare, train and finish in one go; returns the manifest."""
    return prepare(stage).train().finish()
