"""Notebook 02, supervised fine-tuning on the rows of notebook 01, from rows to adapter:

job = sft.open(params)     checks, base, rows, plan: nothing is loaded or written
job.train()                the model in 4 bits and an adapter on it (`methods`), TRL's trainer on packed rows
                           (`trainers`, `rows`), probing rows (`deadline`), then the loop, or the rest of one that
                           was killed (`resume`)
job.finish()               adapter/, log.jsonl, loss.png, tensorboard/, and the manifest last
"""

from __future__ import annotations

from helpers.params import SftParams
from helpers.train import methods, rows
from helpers.train.job import TrainJob, base_model, first, open_stage, plan_for


def open(params: SftParams) -> TrainJob:
    """The job of these parameters. Raises TunebookError for what cannot work, cannot fit, or has no rows."""
    stage = open_stage("sft", params)
    if stage.done:
        return TrainJob(stage)
    data = stage.parents["data"]
    source, tokenizer = base_model(params, data)
    adapter = methods.adapter_to_start_from(params.start_from, source.name, tokenizer) if params.start_from else None
    counts, held_out = {}, None
    train, counts["train"] = rows.supervised(data, "train.parquet", params.train_on)
    if rows.has_rows(data, "eval.parquet"):
        held_out, counts["eval"] = rows.supervised(data, "eval.parquet", params.train_on)
        held_out = first(held_out, params.eval_rows)
    plan = plan_for(params, train, source, adapter, stage)
    return TrainJob(stage, source, tokenizer, train, held_out, counts, plan, adapter)
