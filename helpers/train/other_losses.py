"""DPO, KTO and SimPO through TRL's own trainers, fed with the rows of notebook 01 as they are.

Each trainer's own tokenisation is left out: the rows come tokenised, with exactly one end of turn, and over-long pairs
were counted and left out before. Starting from an adapter, DPO's and KTO's reference is a copy of that adapter; starting
from base it is the base.
"""

from __future__ import annotations

import math
from typing import Any

from helpers.train import config, methods, precision

from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer  # isort: skip
from trl.experimental.cpo import CPOConfig, CPOTrainer  # isort: skip

MICRO = 8  # pairs of a micro-batch at most: these trainers hold whole logits


class PairsDPOTrainer(DPOTrainer):
    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class RowsKTOTrainer(KTOTrainer):
    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class PairsSimPOTrainer(CPOTrainer):
    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        prompt, row = feature["prompt_ids"], {}
        for side in ("chosen", "rejected"):
            answer = feature[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt + answer
            row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(answer))
            row[f"{side}_labels"] = [-100] * len(prompt) + answer
        return {**row, "prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}


def unpaired(pairs: Any, group: int) -> Any:
    """KTO's rows: every answer alone with its label, and for the divergence another answer of the same group of `group` rows."""
    from datasets import Dataset

    rows = [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[f"{side}_ids"], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    for start in range(0, len(rows), group):
        part = rows[start : start + group]
        answers = [row["completion_ids"] for row in part]
        for row, other in zip(part, answers[-1:] + answers[:-1], strict=True):
            row["KL_completion_ids"] = other
    return Dataset.from_list(rows)


def trainer(work: Any, numbers: precision.Precision) -> Any:
    """The trainer for `params.loss` of a `job.Job`."""
    params, train, held_out = work.params, work.train_rows, work.held_out
    micro = min(params.batch_size, MICRO)
    accumulation = math.ceil(params.batch_size / micro)
    options = config.common(work.stage, params, numbers, len(train), len(held_out or ()), accumulation)
    options.update(per_device_train_batch_size=micro, per_device_eval_batch_size=micro, prediction_loss_only=True)
    options.update(beta=params.beta, max_length=None)
    common = {"model": work.model, "processing_class": work.tokenizer}
    if params.loss == "dpo":
        made = PairsDPOTrainer(
            **common,
            args=config.one_gpu(DPOConfig(**options, disable_dropout=False)),
            train_dataset=train,
            eval_dataset=held_out,
        )
    elif params.loss == "kto":
        options.update(
            per_device_train_batch_size=2 * micro,
            per_device_eval_batch_size=2 * micro,
            train_sampling_strategy="sequential",
        )
        made = RowsKTOTrainer(
            **common,
            args=config.one_gpu(KTOConfig(**options, disable_dropout=False)),
            train_dataset=unpaired(train, 2 * micro),
            eval_dataset=unpaired(held_out, 2 * micro) if held_out is not None else None,
        )
    else:
        options["max_length"] = params.max_length
        made = PairsSimPOTrainer(
            **common,
            args=config.one_gpu(
                CPOConfig(
                    **options, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=params.simpo_gamma, disable_dropout=False
                )
            ),
            train_dataset=train,
            eval_dataset=held_out,
        )
    precision.keep_in_fp32(work.model)
    made.optimizer, _ = methods.optimizer_of(work.model, params, made.args)
    from helpers.train.building import quiet

    quiet(made)
    return made
