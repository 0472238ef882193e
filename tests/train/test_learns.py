"""The real model learns: its loss falls and it ends its turn by itself."""

import train_data

from helpers import params as parameters
from helpers import plots
from helpers.evaluate.generate import HfModel
from helpers.tasks.questions import Decoding
from helpers.train import callbacks, examples, rows, training


def test_the_tuned_model_stops_by_itself_on_held_out_prompts(runs_root, smollm2, tokenizer):
    held_out = train_data.sft_rows(tokenizer, 24, seed=5)
    train_data.data_stage("r", smollm2.path, tokenizer, train=train_data.sft_rows(tokenizer, 96), held_out=held_out)
    job = training.open(
        parameters.resolve("sft", {"run": "r", "eval_rows": 2, "eval_steps": 12, "export_check": False})
    )
    job.train()
    losses = plots.series(callbacks.read(job.log), "loss")[1]
    assert losses[-1] < 0.35 * losses[0]
    prompts = rows.prompts(examples.supervised(job.stage.parents["data"], "eval.parquet")[0], tokenizer, 24)
    found = HfModel(job.model, tokenizer).generate([row["prompt_ids"] for row in prompts], Decoding(64))
    assert sum(answer.stopped for answer in found) >= 0.95 * len(found)
    assert sum(answer.text.startswith("SELECT") for answer in found) >= 0.9 * len(found)
