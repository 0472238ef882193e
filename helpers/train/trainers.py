"""TRL's SFT and ORPO trainers over packed rows: the same arithmetic, without padding and without whole logits.

What is overridden is what transformers documents for subclasses: the data loader, `compute_loss`, `evaluate`. One
micro-batch is one row of `batching.PackedRows`; the loss of a step is divided by what the whole step trains on, so rows
may be cut in any way, over any number of GPUs, and give the same gradient.
"""

from __future__ import annotations

import os
import time
from typing import Any

os.environ.setdefault(
    "TRL_EXPERIMENTAL_SILENCE", "1"
)  # ORPO has its place among TRL's experiments; the pin keeps it still

import torch
import torch.nn.functional as F
from transformers import Trainer
from trl import SFTTrainer
from trl.experimental.orpo import ORPOTrainer

from helpers.model.chunked_loss import IGNORE, per_document
from helpers.train import checkpoints, distributed

EXTRA = ("row_ids", "tokens")  # what a batch carries for people, not for the model


class PackedRowsTrainer:
    """What both trainers share. `use_rows` must be called before `train` or `evaluate`."""

    def use_rows(self, train: Any, held_out: Any, collator: Any, fused: bool = True) -> None:
        """train, held_out: `batching.PackedRows` (held_out may be None); collator: rows → batch; fused: `head_loss` is installed."""
        self.rows, self.held_out_rows, self.row_collator, self.fused = train, held_out, collator, fused
        self.model_accepts_loss_kwargs = (
            True  # the loss is divided by num_items_in_batch, not once more by the accumulation
        )
        self.step_rows: list[tuple[list[str], torch.Tensor]] = []
        self.trained_tokens = 0

    def _loader(self, rows: Any) -> Any:
        loader = torch.utils.data.DataLoader(
            rows,
            batch_size=1,
            shuffle=False,
            collate_fn=self.row_collator,
            num_workers=0,
            pin_memory=torch.cuda.is_available(),
        )
        return self.accelerator.prepare(loader)

    def get_train_dataloader(self) -> Any:
        return self._loader(self.rows)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._loader(self.held_out_rows)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """A step's rows; counts the tokens in them, of all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = sum(batch["tokens"] for batch in batches)
        self.trained_tokens += tokens if self.accelerator.num_processes == 1 else int(self._everywhere(tokens)[0])
        return batches, items

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; keeps whose rows it was, for the sentence that stops a run."""
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
        """Held-out means over every trained token (or pair), whatever the rows: `<prefix>_loss` and what `measure` adds."""
        started, model = time.time(), self.model_wrapped if self.is_in_train else self.model
        was_training = self.model.training
        model.eval()
        totals: dict[str, torch.Tensor] = {}
        for inputs in self.get_eval_dataloader():
            inputs = self._prepare_inputs({k: v for k, v in inputs.items() if k not in EXTRA})
            with self.accelerator.autocast():
                for name, value in self.measure(model, inputs).items():
                    totals[name] = totals.get(name, 0.0) + value.double()
        names = sorted(totals)
        sums = self.accelerator.reduce(torch.stack([totals[n] for n in names]), "sum").tolist()
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.means(dict(zip(names, sums, strict=True))).items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.time() - started
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
            self._save(output_dir or self.args.output_dir, state_dict=state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if checkpoints.moved(resume_from_checkpoint, self.is_fsdp_enabled):
            checkpoints.load_weights(
                self.model if model is None else model, resume_from_checkpoint, self.is_fsdp_enabled
            )
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and checkpoints.moved(checkpoint, self.is_fsdp_enabled):
            checkpoints.load_optimizer(self.model, self.optimizer, self.lr_scheduler, checkpoint, self.is_fsdp_enabled)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        if checkpoints.moved(self.state.best_model_checkpoint, self.is_fsdp_enabled):
            checkpoints.load_weights(self.model, self.state.best_model_checkpoint, self.is_fsdp_enabled)
        else:
            super()._load_best_model()

    def _everywhere(self, *counts: int) -> list[float]:
        """Sums of plain numbers over all processes."""
        return self.accelerator.reduce(
            torch.tensor(counts, dtype=torch.float64, device=self.accelerator.device), "sum"
        ).tolist()


class RowSFTTrainer(PackedRowsTrainer, SFTTrainer):
    """SFT on packed rows: cross-entropy over the labels, divided by the step's trained tokens."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        for name in EXTRA if self.fused else (*EXTRA, "loss_positions"):
            inputs.pop(name, None)
        inputs["use_cache"] = False
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def measure(self, model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        count = (inputs["labels"][..., 1:] != IGNORE).sum()
        if not self.fused:
            inputs.pop("loss_positions", None)
        loss = model(**inputs, use_cache=False).loss
        return {"loss": torch.where(count > 0, loss * count, 0.0), "count": count}

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / max(sums["count"], 1.0)}


class RowORPOTrainer(PackedRowsTrainer, ORPOTrainer):
    """ORPO (arXiv:2403.07691) on packed pairs: loss = nll − beta · log σ(log odds ratio).

    nll is the mean over the step's prompt and chosen tokens, the preference term the mean over its pairs.
    """

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """Rows come tokenised, with exactly one end of turn; TRL's own would add another and cut long answers to nothing."""
        return feature

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """A step's rows; counts the tokens and the pairs that its loss is divided by."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_tokens, self.step_pairs = self._everywhere(
            sum(b["nll_tokens"] for b in batches), sum(b["pair_count"] for b in batches)
        )
        return batches, torch.tensor(self.step_tokens)

    def forward_pairs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(summed nll of prompts and chosen, mean log-probability of each chosen, of each rejected answer): (), (pairs,), (pairs,)."""
        pairs, mask, labels = inputs["pair_count"], inputs["completion_mask"], inputs["labels"]
        known = {k: v for k, v in inputs.items() if k not in (*EXTRA, "pair_count", "completion_mask", "nll_tokens")}
        logps = model(**known, token_logps=True, use_cache=False).logps
        if not pairs:
            nothing = logps.sum() * 0.0
            return nothing, logps.new_zeros(0), logps.new_zeros(0)
        answered = F.pad(mask[:, 1:], (0, 1)) * (F.pad(labels[:, 1:], (0, 1), value=IGNORE) != IGNORE)
        if logps.shape[0] == 1:
            lengths = inputs["document_lengths"]
            total, answer, count = (
                per_document(v, lengths) for v in (logps, logps * answered, answered.to(logps.dtype))
            )
        else:
            total, answer, count = logps.sum(1), (logps * answered).sum(1), answered.sum(1)
        shared = 0.0
        if inputs.get("prefix_length"):  # the first document is the beginning that all of them share
            shared, total, answer, count = total[0], total[1:], answer[1:], count[1:]
        mean = answer / count
        return -(total[:pairs].sum() + pairs * shared), mean[:pairs], mean[pairs:]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        nll, chosen, rejected = self.forward_pairs(model, inputs)
        if not len(chosen):
            loss, metrics = nll, {}
        else:
            preference, chosen_rewards, rejected_rewards, log_ratio, log_odds = self.odds_ratio_loss(chosen, rejected)
            loss = nll / self.step_tokens - preference.sum() / self.step_pairs
            metrics = {
                "nll_loss": nll / inputs["nll_tokens"],
                "log_odds_ratio": log_ratio,
                "log_odds_chosen": log_odds,
                "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
                "rewards/accuracies": (chosen > rejected).float().mean(),
                "logps/chosen": chosen.mean(),
                "logps/rejected": rejected.mean(),
            }
        # Read only when they are logged: waiting for the card here would leave it idle while the backward pass is launched.
        self.store_metrics({k: v.detach() for k, v in metrics.items()}, train_eval="train")
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, metrics) if return_outputs else loss

    def measure(self, model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        nll, chosen, rejected = self.forward_pairs(model, inputs)
        if not len(chosen):
            return {}
        preference, chosen_rewards, rejected_rewards, log_ratio, log_odds = self.odds_ratio_loss(chosen, rejected)
        pairs = torch.tensor(float(len(chosen)), device=nll.device)
        return {
            "nll": nll,
            "tokens": torch.tensor(float(inputs["nll_tokens"]), device=nll.device),
            "pairs": pairs,
            "preference": preference.sum(),
            "log_odds_ratio": log_ratio * pairs,
            "log_odds_chosen": log_odds * pairs,
            "margins": (chosen_rewards - rejected_rewards).sum(),
            "correct": (chosen > rejected).float().sum(),
            "chosen": chosen.sum(),
            "rejected": rejected.sum(),
        }

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        pairs, nll = sums["pairs"], sums["nll"] / sums["tokens"]
        return {
            "loss": nll - sums["preference"] / pairs,
            "nll_loss": nll,
            "log_odds_ratio": sums["log_odds_ratio"] / pairs,
            "log_odds_chosen": sums["log_odds_chosen"] / pairs,
            "rewards/margins": sums["margins"] / pairs,
            "rewards/accuracies": sums["correct"] / pairs,
            "logps/chosen": sums["chosen"] / pairs,
            "logps/rejected": sums["rejected"] / pairs,
        }
