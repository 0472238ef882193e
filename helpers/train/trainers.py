"""TRL's trainers over the rows of notebook 01, which come tokenised, with exactly one end of turn.

SFT and ORPO run on packed rows: the same arithmetic as TRL's, without padding and without whole logits. One micro-batch
is one row of `rows.PackedRows`; a step's loss is divided by what the whole step trains on, so rows may be cut in any
way, over any number of GPUs, and give the same gradient. DPO, KTO and SimPO are TRL's own, padded.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # ORPO is among TRL's experiments; the pin keeps it still

import torch
import torch.nn.functional as F
from transformers import PrinterCallback, Trainer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from helpers import compat
from helpers.model import packed_attention
from helpers.model.chunked_loss import can_fuse, per_document
from helpers.model.packed_attention import IGNORE
from helpers.train import config, distributed, methods
from helpers.train.rows import MASKS, PackedRows, PairCollator, RowCollator, lengths_of

EXTRA = ("row_ids", "tokens")  # what a batch carries for people, not for the model
PAIRS = 8  # of a micro-batch of DPO, KTO and SimPO at most: their trainers hold whole logits


class PackedRowsTrainer(compat.CheckpointsOfEitherKind, Trainer):
    """What both packed trainers share; `make` sets its attributes."""

    control: Any
    rows: PackedRows
    held_out_rows: PackedRows | None
    row_collator: RowCollator
    step_rows: list[tuple[list[str], torch.Tensor]]  # ids and loss of the step's rows so far
    trained_tokens: int

    def _loader(self, rows: Any) -> Any:
        pinned = torch.cuda.is_available()
        loader = torch.utils.data.DataLoader(rows, batch_size=1, collate_fn=self.row_collator, pin_memory=pinned)
        return self.accelerator.prepare(loader)

    def get_train_dataloader(self) -> Any:
        return self._loader(self.rows)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._loader(self.held_out_rows)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.trained_tokens += int(self._everywhere(sum(batch["tokens"] for batch in batches))[0])
        return batches, items

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; keeps whose rows it was, for the message that stops a run."""
        ids = inputs.pop("row_ids", [])
        inputs.pop("tokens", None)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if len(self.step_rows) >= self.current_gradient_accumulation_steps:
            self.step_rows = []
        self.step_rows.append((ids, loss))
        return loss

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out means over every trained token (or pair), whatever the rows: `<prefix>_loss` and the other means."""
        started, model = time.monotonic(), self.model_wrapped if self.is_in_train else self.model
        was_training = self.model.training
        model.eval()
        totals: dict[str, Any] = {}
        for inputs in self.get_eval_dataloader():
            inputs = {k: v for k, v in inputs.items() if k not in EXTRA}
            with self.accelerator.autocast():
                for name, value in self.measure(model, inputs).items():
                    number = torch.as_tensor(value, dtype=torch.float64, device=self.accelerator.device)
                    totals[name] = totals.get(name, 0.0) + number
        sums = self.accelerator.reduce(torch.stack(list(totals.values())), "sum").tolist()
        means = self.means(dict(zip(totals, sums, strict=True)))
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in means.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.monotonic() - started
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train(was_training)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of a sharded model with an adapter only the adapter is gathered and written, as of any other."""
        if not (self.is_fsdp_enabled and hasattr(self.model, "peft_config")):
            super().save_model(output_dir, _internal_call)
            return
        state = distributed.whole_state(self.model, adapter_only=True)
        if self.args.should_save:
            self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=state)

    def _everywhere(self, *counts: int) -> list[float]:
        """Sums of plain numbers over all processes."""
        if self.accelerator.num_processes == 1:
            return [float(count) for count in counts]
        numbers = torch.tensor(counts, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(numbers, "sum").tolist()


class RowSFTTrainer(PackedRowsTrainer, SFTTrainer):
    """SFT on packed rows: cross-entropy over the labels, divided by the step's trained tokens."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = {k: v for k, v in inputs.items() if k not in EXTRA} | {"use_cache": False}
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def measure(self, model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        count = (inputs["labels"][..., 1:] != IGNORE).sum()
        loss = model(**inputs, use_cache=False).loss
        return {"loss": torch.where(count > 0, loss * count, 0.0), "count": count}

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / max(sums["count"], 1.0)}


class RowORPOTrainer(PackedRowsTrainer, ORPOTrainer):
    """ORPO (arXiv:2403.07691) on packed pairs: loss = nll − beta · log σ(log odds ratio).

    nll is the mean over the step's prompt and chosen tokens, the preference term the mean over its pairs.
    """

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """Rows come tokenised; TRL's own would add an end of turn and cut long answers to nothing."""
        return feature

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """A step's rows; its loss is divided by the tokens and the pairs in them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_tokens, self.step_pairs = self._everywhere(
            sum(b["nll_tokens"] for b in batches), sum(b["pair_count"] for b in batches)
        )
        return batches, torch.tensor(self.step_tokens)

    def forward_pairs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(summed nll of prompts and chosen answers, mean log-probability of each chosen answer, of each rejected one):
        shapes (), (pairs,), (pairs,)."""
        pairs, mask, labels = inputs["pair_count"], inputs["completion_mask"], inputs["labels"]
        known = {k: v for k, v in inputs.items() if k not in (*EXTRA, "pair_count", "completion_mask", "nll_tokens")}
        logps = model(**known, token_logps=True, use_cache=False).logps
        if not pairs:
            return logps.sum() * 0.0, logps.new_zeros(0), logps.new_zeros(0)
        answered = F.pad(mask[:, 1:], (0, 1)) * (F.pad(labels[:, 1:], (0, 1), value=IGNORE) != IGNORE)
        values = (logps, logps * answered, answered.to(logps.dtype))
        if logps.shape[0] == 1:
            total, answer, count = (per_document(v, inputs["document_lengths"]) for v in values)
        else:
            total, answer, count = (v.sum(1) for v in values)
        shared: Any = 0.0
        if inputs.get("prefix_length"):  # the first document is the prefix that all of them share
            shared, total, answer, count = total[0], total[1:], answer[1:], count[1:]
        mean = answer / count
        return -(total[:pairs].sum() + pairs * shared), mean[:pairs], mean[pairs:]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        nll, chosen, rejected = self.forward_pairs(model, inputs)
        loss, metrics = nll, {}
        if len(chosen):
            sums = self._sums(nll, chosen, rejected, inputs["nll_tokens"])
            loss = nll / self.step_tokens - sums["preference"] / self.step_pairs
            metrics = {k: v.detach() for k, v in self.means(sums).items() if k != "loss"}
        # Read only when they are logged: waiting for the GPU here would leave it idle before the backward pass.
        self.store_metrics(metrics, train_eval="train")
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, metrics) if return_outputs else loss

    def measure(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        nll, chosen, rejected = self.forward_pairs(model, inputs)
        sums = self._sums(nll, chosen, rejected, inputs["nll_tokens"])
        # The same names in every process, one whose rows are empty among them.
        return sums if len(chosen) else dict.fromkeys(sums, 0.0)

    def _sums(self, nll: Any, chosen: Any, rejected: Any, tokens: int) -> dict[str, Any]:
        preference, chosen_rewards, rejected_rewards, log_ratio, log_odds = self.odds_ratio_loss(chosen, rejected)
        return {
            "nll": nll,
            "tokens": tokens,
            "pairs": len(chosen),
            "preference": preference.sum(),
            "log_odds_ratio": log_ratio * len(chosen),
            "log_odds_chosen": log_odds * len(chosen),
            "rewards/margins": (chosen_rewards - rejected_rewards).sum(),
            "rewards/accuracies": (chosen > rejected).sum(),
            "logps/chosen": chosen.sum(),
            "logps/rejected": rejected.sum(),
        }

    def means(self, sums: dict[str, Any]) -> dict[str, Any]:
        pairs, nll = sums["pairs"], sums["nll"] / sums["tokens"]
        of_pairs = {name: value / pairs for name, value in sums.items() if name not in ("nll", "tokens", "pairs")}
        return {"loss": nll - of_pairs.pop("preference"), "nll_loss": nll, **of_pairs}


class PairsDPOTrainer(compat.RowsAsTheyAre, DPOTrainer): ...


class RowsKTOTrainer(compat.RowsAsTheyAre, KTOTrainer): ...


class PairsSimPOTrainer(CPOTrainer):
    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            answer = feature[f"{side}_ids"]
            row[f"{side}_input_ids"] = prompt + answer
            row[f"{side}_attention_mask"] = [1] * (len(prompt) + len(answer))
            mask = feature.get(f"{side}_mask") or [1] * len(answer)
            kept = [token if trained else IGNORE for token, trained in zip(answer, mask, strict=True)]
            row[f"{side}_labels"] = [IGNORE] * len(prompt) + kept
        return row


def unpaired(pairs: Any, group: int) -> Any:
    """KTO's rows: every answer alone with its label, and for the divergence another answer of the same `group` rows."""

    def split(batch: dict[str, list]) -> dict[str, list]:
        answers, count = batch["chosen_ids"] + batch["rejected_ids"], len(batch["chosen_ids"])
        rows = {"prompt_ids": batch["prompt_ids"] * 2, "completion_ids": answers}
        rows |= {"label": [True] * count + [False] * count, "KL_completion_ids": answers[-1:] + answers[:-1]}
        if masks := batch.get("chosen_mask", []) + batch.get("rejected_mask", []):
            rows |= {"answer_mask": masks, "KL_answer_mask": masks[-1:] + masks[:-1]}
        return rows

    return pairs.map(split, batched=True, batch_size=group // 2, remove_columns=pairs.column_names)


def masked(collate: Callable, examples: list[dict[str, Any]]) -> dict[str, Any]:
    """TRL's batch of pairs (DPO) or answers (KTO); what is not trained of an answer, the user's turns between several,
    is taken out of its completion mask."""
    batch, sides = collate(examples), {"completion_mask": MASKS, "KL_completion_mask": ("KL_answer_mask",)}
    if "label" in examples[0]:
        sides["completion_mask"] = ("answer_mask",)
    for name, masks in sides.items():
        rows = [(len(one["prompt_ids"]), one[mask]) for mask in masks for one in examples if mask in one]
        for row, (begin, mask) in enumerate(rows):
            batch[name][row, begin : begin + len(mask)] *= torch.tensor(mask)
    return batch


# ---------------------------------------------------------------- a job's trainer

# Trainer, its arguments' class, and the arguments that a loss always has.
LOSSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sft": (RowSFTTrainer, SFTConfig, {"dataset_kwargs": {"skip_prepare_dataset": True}, "loss_type": "nll"}),
    "orpo": (RowORPOTrainer, ORPOConfig, {}),
    "dpo": (PairsDPOTrainer, DPOConfig, {"max_length": None}),
    "kto": (RowsKTOTrainer, KTOConfig, {"max_length": None, "train_sampling_strategy": "sequential"}),
    "simpo": (PairsSimPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}),
}


def make(job: Any, model: Any, precision: str) -> Any:
    """The trainer of a `job.TrainJob`, its rows in place.

    Starting from an adapter, the reference of DPO and KTO is a copy of it; else it is the base.
    """
    params, loss, train, held_out = job.params, config.loss_of(job.params), job.train_rows, job.held_out
    packed = loss in ("sft", "orpo")
    kind, settings, given = LOSSES[loss]
    if loss == "sft":
        given = {**given, "max_length": None, "neftune_noise_alpha": params.neftune_alpha or None}
    else:
        given = {"max_length": params.max_length, **given, "beta": params.beta, "disable_dropout": False}
    if loss == "simpo":
        given["simpo_gamma"] = params.simpo_gamma
    accumulation = job.planned.accumulation
    if not packed:
        pairs = min(params.batch_size, PAIRS)
        accumulation, rows = math.ceil(params.batch_size / pairs), pairs
        if loss == "kto":  # its rows are single answers
            rows = 2 * pairs
            train, held_out = unpaired(train, rows), held_out and unpaired(held_out, rows)
        given |= {
            "gradient_accumulation_steps": accumulation,
            "per_device_train_batch_size": rows,
            "per_device_eval_batch_size": rows,
            "prediction_loss_only": True,
        }
    shared = config.arguments(job.stage, precision, job.planned, len(held_out or ()))
    trainer = kind(
        model=model,
        args=compat.use_one_gpu(settings(**{**shared, **given})),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=job.tokenizer,
    )
    methods.keep_in_fp32(model)
    if packed:
        compat.shard(trainer)
        _use_packed_rows(job, model, trainer, PairCollator if loss == "orpo" else RowCollator)
    trainer.optimizer = methods.lora_plus(model, params, trainer.args)
    if loss in ("dpo", "kto"):
        trainer.data_collator = functools.partial(masked, trainer.data_collator)
    trainer.remove_callback(PrinterCallback)  # a line a step: `callbacks.Log` speaks for it
    return trainer


def _use_packed_rows(job: Any, model: Any, trainer: Any, collator: type[RowCollator]) -> None:
    """Give the trainer its rows, packed as the plan says, and prove on the model that they do not see each other."""
    params, plan, world = job.params, job.planned, distributed.size()

    def rows(examples: Any, batch_size: int, **given: Any) -> PackedRows:
        lengths, padded = lengths_of(examples, not plan.packed), not plan.packed
        return PackedRows(examples, batch_size=batch_size, world_size=world, lengths=lengths, padded=padded, **given)

    epoch = {"accumulation": plan.accumulation, "seed": params.seed, "budget": plan.setting.row_tokens or None}
    trainer.rows, trainer.held_out_rows = rows(job.train_rows, params.batch_size, **epoch), None
    if job.held_out is not None:
        trainer.held_out_rows = rows(job.held_out, min(params.batch_size, 8) * world, accumulation=1, shuffle=False)
    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    layout = "packed" if plan.packed else "padded"
    trainer.row_collator = collator(job.tokenizer.pad_token_id, layout, plan.shares, positions=not can_fuse(causal))
    trainer.step_rows, trainer.trained_tokens = [], 0
    trainer.model_accepts_loss_kwargs = True  # divided by num_items_in_batch, not once more by the accumulation
    if plan.backend == "unsloth":  # its trainers leave the model set for inference, without activation checkpointing
        model.for_training()
    elif plan.packed:
        with trainer.accelerator.autocast():
            packed_attention.check_boundaries(model)
