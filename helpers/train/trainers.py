"""TRL's trainers over the rows of notebook 01, which come tokenised, with exactly one end of turn.

All run on packed rows: the same arithmetic as TRL's, without padding and without whole logits. One micro-batch is one
row of `rows.PackedRows`; a step's loss is divided by what the whole step trains on, so rows may be cut in any way, over
any number of GPUs, and give the same gradient.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # ORPO is among TRL's experiments; the pin keeps it still

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, send_to_device
from transformers import PrinterCallback, Trainer
from trl import SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from helpers import compat
from helpers.model.chunked_loss import per_document
from helpers.model.packed_attention import IGNORE
from helpers.planner.cost_model import REFERENCE
from helpers.planner.row_plan import Batches
from helpers.train import config, distributed, methods
from helpers.train.examples import lengths_of
from helpers.train.graphs import Graphs, forms
from helpers.train.rows import PackedRows, PairCollator, RowCollator, check_boundaries

# What a batch carries for people and for the loss, not for the model.
EXTRA = ("row_ids", "tokens", "pair_count", "good", "keys", "kl", "completion_mask", "nll_tokens")


class PackedRowsTrainer(compat.CheckpointsOfEitherKind, Trainer):
    """What both packed trainers share; `make` sets its attributes."""

    control: Any
    rows: PackedRows
    held_out_rows: PackedRows | None
    row_collator: RowCollator
    step_rows: list[tuple[list[str], torch.Tensor]]  # ids and loss of the step's rows so far
    trained_tokens: int
    router_weight: float
    score: Any = None  # a `task_score.TaskScore`
    graphs: Graphs | None = None
    trained: list[torch.nn.Parameter]
    step_seen: float  # tokens of the step, on all processes

    def _loader(self, rows: Any) -> Any:
        pinned = torch.cuda.is_available()
        loader = torch.utils.data.DataLoader(rows, batch_size=1, collate_fn=self.row_collator, pin_memory=pinned)
        return self.accelerator.prepare(loader)

    def get_train_dataloader(self) -> Any:
        return self._loader(self.rows)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._loader(self.held_out_rows)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # nobody reads their sum, and Trainer counts the model's parameters for every row

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_seen = max(self._everywhere(sum(batch["tokens"] for batch in batches))[0], 1.0)
        self.trained_tokens += int(self.step_seen)
        return batches, items

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; keeps whose rows it was, for the message that stops a run."""
        ids = inputs.pop("row_ids", [])
        if self.graphs and model.training:  # what Trainer does besides, over every module of a model, takes as long
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            loss = loss.detach()
        else:
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
            with self.accelerator.autocast():
                for name, value in self.measure(model, inputs).items():
                    number = torch.as_tensor(value, dtype=torch.float64, device=self.accelerator.device)
                    totals[name] = totals.get(name, 0.0) + number
        sums = self.accelerator.reduce(torch.stack(list(totals.values())), "sum").tolist()
        means = self.means(dict(zip(totals, sums, strict=True)))
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in means.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.monotonic() - started
        self.model.train(was_training)  # what answers in the midst of training may leave nothing that has no gradient
        step, last = self.state.global_step, self.state.global_step >= self.state.max_steps
        scored = self.score.ask(step, means["loss"], last) if self.score and self.is_in_train else {}
        kept = {"eval_kept": scored.pop("eval_kept")} if scored else {}
        self.log(metrics | scored)
        metrics |= scored | kept
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of a sharded model with an adapter only the adapter is gathered and written, as of any other; full tuning's
        weights are in the checkpoint's pieces."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif hasattr(self.model, "peft_config"):
            state = distributed.trained_state(self.model)
            if self.args.should_save:
                self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=state)

    def write_pieces(self, folder: Path) -> None:
        distributed.write_checkpoint(folder, self.model, getattr(self.optimizer, "optimizer", self.optimizer))

    def read_pieces(self, folder: Path, optimizer: Any = None) -> bool:
        """The weights of a checkpoint of a sharded run, or for one, or the optimizer's state; False for any other."""
        if (folder / distributed.PIECES).is_dir():
            pieces = distributed.Pieces(folder / distributed.PIECES)
        elif self.is_fsdp_enabled:
            pieces = distributed.OneProcess(folder, self.model, optimizer)
        else:
            return False
        if optimizer is None:
            distributed.read_weights(pieces, self.model)
        else:
            distributed.read_optimizer(pieces, self.model, optimizer)
        return True

    def _everywhere(self, *counts: float) -> list[float]:
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
        if self.graphs and (logps := self.graphs(model, inputs)) is not None:
            loss = -logps.sum() / num_items_in_batch
            return (loss, {}) if return_outputs else loss
        if not self.router_weight:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        found = model(**inputs, token_logps=True, router=True)
        loss = self.router_weight * found.router / self.step_seen - found.logps.sum() / num_items_in_batch
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, found) if return_outputs else loss

    def measure(self, model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        inputs = {k: v for k, v in inputs.items() if k not in EXTRA}
        count = (inputs["labels"][..., 1:] != IGNORE).sum()
        loss = model(**inputs, use_cache=False).loss
        return {"loss": torch.where(count > 0, loss * count, 0.0), "count": count}

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / max(sums["count"], 1.0)}


class RowPreferenceTrainer(PackedRowsTrainer, ORPOTrainer):
    """ORPO (arXiv:2403.07691), DPO (2305.18290), KTO (2402.01306) and SimPO (2405.14734) on packed documents.

    ORPO's nll is the mean over the step's prompt and chosen tokens, every preference term the mean over its pairs (KTO:
    answers). KTO's divergence is TRL's, of each prompt with another answer, but over the whole step. The reference is
    the model as it began: the base, or the adapter that is trained further; asked once in a run for each document.
    """

    loss: str
    params: Any
    initial: list[torch.Tensor] | None  # first values of what is trained; None: the base without its adapter
    references: dict[int, float]

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """Rows come tokenised; TRL's own would add an end of turn and cut long answers to nothing."""
        return feature

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list, Any]:
        """A step's rows; its loss is divided by the tokens and the pairs in them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_tokens, self.step_pairs = self._everywhere(
            sum(b["nll_tokens"] for b in batches), sum(b["pair_count"] for b in batches)
        )
        self._ask(batches)
        return batches, torch.tensor(self.step_pairs)

    def forward_pairs(self, model: Any, inputs: dict[str, Any], router: bool = False) -> tuple[torch.Tensor, ...]:
        """(summed nll of prompts and chosen answers, log-probability of each answer, its tokens, the router's loss):
        shapes (), (documents,), (documents,), ()."""
        good, mask, labels = inputs["good"], inputs["completion_mask"], inputs["labels"]
        known = {k: v for k, v in inputs.items() if k not in EXTRA}
        logps, balance = self.graphs(model, known) if self.graphs else None, 0.0
        if logps is None:
            found = model(**known, token_logps=True, use_cache=False, **({"router": True} if router else {}))
            logps, balance = found.logps, found.router if router else 0.0
        if not inputs["pair_count"]:
            return logps.sum() * 0.0, logps.new_zeros(0), logps.new_zeros(0), balance * 0.0
        answered = F.pad(mask[:, 1:], (0, 1)) * (F.pad(labels[:, 1:], (0, 1), value=IGNORE) != IGNORE)
        values = (logps, logps * answered, answered.to(logps.dtype))
        if logps.shape[0] == 1:
            lengths = inputs.get("document_lengths") or labels.shape[1:]
            total, answer, count = (per_document(v, lengths) for v in values)
        else:
            total, answer, count = (v.sum(1) for v in values)
        shared: Any = 0.0
        if inputs.get("prefix_length"):  # the first document is the prefix that all of them share
            shared, total, answer, count = total[0], total[1:], answer[1:], count[1:]
        return -(total[:good].sum() + good * shared), answer, count, balance

    @contextlib.contextmanager
    def _as_it_began(self) -> Iterator[None]:
        if self.initial is None:
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                yield
            return
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        for again in (False, True):
            for i, weight in enumerate(trained):
                weight.data, self.initial[i] = self.initial[i], weight.data
            torch.clear_autocast_cache()  # it knows weights by their places, and would keep 16-bit copies of the others
            if not again:
                yield

    @torch.no_grad()
    def _ask(self, batches: list[dict[str, Any]]) -> None:
        """Ask the reference for a step's answers, once in a run, and tell every process; estimate KTO's divergence from
        it: over mismatched answers, at least 0. Processes ask together, of empty rows too: sharded ones have to."""
        if self.loss not in REFERENCE:
            return
        others = [batch.get("kl", batch) for batch in batches] if self.loss == "kto" else []
        rows, count = send_to_device([*others, *batches], self.accelerator.device), len(others)
        with self.accelerator.autocast():
            new = self._everywhere(*(sum(key not in self.references for key in row["keys"]) for row in rows))
            if any(new):
                asked = [row for row, keys in zip(rows, new, strict=True) if keys]
                with self._as_it_began():
                    found = [(row["keys"], self.forward_pairs(self.model, row)[1].tolist()) for row in asked]
                pairs = [pair for keys, logps in found for pair in zip(keys, logps, strict=True)]
                self.references |= gather_object(pairs)
            apart = [self.forward_pairs(self.model, row)[1] - self.reference(row) for row in rows[:count]]
        if others:
            total, answers = self._everywhere(float(sum(one.sum() for one in apart)), sum(map(len, apart)))
            self.kl = max(total / max(answers, 1), 0.0)

    def reference(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Log-probability of each answer by the model as it began, (documents,)."""
        return torch.tensor([self.references[key] for key in inputs["keys"]], device=inputs["labels"].device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        nll, logps, count, balance = self.forward_pairs(model, inputs, bool(self.router_weight))
        loss, metrics = nll, {}
        if len(logps):
            sums = self._sums(inputs, nll, logps, count)
            loss = nll / max(self.step_tokens, 1) if self.loss == "orpo" else 0.0
            loss = loss - sums["preference"] / self.step_pairs + self.router_weight * balance / self.step_seen
            metrics = {k: v.detach() for k, v in self.means(sums).items() if k != "loss" and torch.is_tensor(v)}
        # Read only when they are logged: waiting for the GPU here would leave it idle before the backward pass.
        self.store_metrics(metrics, train_eval="train")
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, metrics) if return_outputs else loss

    def measure(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        self._ask([inputs])
        nll, logps, count, _ = self.forward_pairs(model, inputs)
        sums = self._sums(inputs, nll, logps, count)
        # The same names in every process, one whose rows are empty among them.
        return sums if len(logps) else dict.fromkeys(sums, 0.0)

    def _sums(self, inputs: dict[str, Any], nll: Any, logps: Any, count: Any) -> dict[str, Any]:
        p, good, loss = self.params, inputs["good"], self.loss
        scores = logps - self.reference(inputs) if loss in REFERENCE else logps / count
        chosen, rejected = scores[:good], scores[good:]
        sums = {"pairs": inputs["pair_count"], "good": good, "bad": len(rejected)}
        if loss == "orpo":
            preference, _, _, log_ratio, log_odds = self.odds_ratio_loss(chosen, rejected)
            sums |= {"nll": nll, "tokens": inputs["nll_tokens"]}
            sums |= {"log_odds_ratio": log_ratio * good, "log_odds_chosen": log_odds * good}
        elif loss == "kto":
            gains = p.desirable_weight * torch.sigmoid(p.beta * (chosen - self.kl))
            losses = p.undesirable_weight * torch.sigmoid(p.beta * (self.kl - rejected))
            whole = p.desirable_weight * good + p.undesirable_weight * len(rejected)
            preference = torch.cat([gains, losses]) - whole / max(len(scores), 1)
            sums["kl"] = torch.tensor(self.kl) * len(scores)
        else:
            preference = F.logsigmoid(p.beta * (chosen - rejected) - (p.simpo_gamma if loss == "simpo" else 0.0))
        if loss != "kto":
            sums["rewards/accuracies"] = (chosen > rejected).sum()
        kept = {"rewards/chosen": p.beta * chosen, "rewards/rejected": p.beta * rejected}
        kept |= {"logps/chosen": (logps / count)[:good], "logps/rejected": (logps / count)[good:]}
        return {**sums, "preference": preference.sum(), **{name: value.sum() for name, value in kept.items()}}

    def means(self, sums: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        sums = dict(sums)
        pairs, good, bad = (sums.pop(name) for name in ("pairs", "good", "bad"))
        for side, count in (("chosen", good), ("rejected", bad)):
            found |= {f"{name}/{side}": sums.pop(f"{name}/{side}") / count for name in ("rewards", "logps") if count}
            if not count:
                del sums[f"rewards/{side}"], sums[f"logps/{side}"]
        if good and bad:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        nll = sums.pop("nll") / sums.pop("tokens") if "nll" in sums else 0.0
        found |= {name: value / pairs for name, value in sums.items()}
        loss = nll - found.pop("preference")
        return {"loss": loss, **({"nll_loss": nll} if self.loss == "orpo" else {}), **found}


# ---------------------------------------------------------------- a job's trainer


def make(job: Any, model: Any, precision: str) -> Any:
    """The trainer of a `job.TrainJob`, its rows in place.

    Starting from an adapter, the reference of DPO and KTO is that adapter as it was; else it is the base.
    """
    params, loss = job.params, config.loss_of(job.params)
    kind: Any = RowPreferenceTrainer
    made: Any = ORPOConfig
    given = {"max_length": params.max_length, "beta": params.beta, "disable_dropout": False} if loss != "sft" else {}
    if loss == "sft":
        kind, made = RowSFTTrainer, SFTConfig
        given = {"dataset_kwargs": {"skip_prepare_dataset": True}, "loss_type": "nll", "max_length": None}
        given["neftune_noise_alpha"] = params.neftune_alpha or None
    trainer = kind(
        model=model,
        args=compat.use_one_gpu(
            made(**{**config.arguments(job.stage, precision, job.planned, len(job.held_out or ())), **given})
        ),
        train_dataset=job.train_rows,
        eval_dataset=job.held_out,
        processing_class=job.tokenizer,
    )
    methods.keep_in_fp32(model)
    compat.shard(trainer)
    trainer.router_weight = params.router_aux_loss
    if loss != "sft":
        trainer.loss, trainer.params, trainer.references, trainer.initial = loss, params, {}, None
        if loss in REFERENCE and (job.adapter or params.init != "default"):
            trainer.initial = [weight.detach().clone() for weight in model.parameters() if weight.requires_grad]
    _use_packed_rows(job, model, trainer, loss)
    trainer.trained = list(distributed.named(model).values())  # sharded again before an optimizer is made
    trainer.optimizer = methods.lora_plus(model, params, trainer.args)
    trainer.remove_callback(PrinterCallback)  # a line a step: `callbacks.Log` speaks for it
    return trainer


def _use_packed_rows(job: Any, model: Any, trainer: Any, loss: str) -> None:
    """Give the trainer its rows, packed as the plan says, and prove on the model that they do not see each other."""
    params, plan, world = job.params, job.planned, distributed.size()

    def rows(examples: Any, batches: Batches, **given: Any) -> PackedRows:
        lengths = lengths_of(examples, not plan.packed)
        given |= {"lengths": lengths, "padded": not plan.packed, "partners": loss == "kto"}
        return PackedRows(examples, batches, world_size=world, **given)

    epoch = {"accumulation": plan.accumulation, "seed": params.seed, "budget": plan.setting.row_tokens or None}
    trainer.rows, trainer.held_out_rows = rows(job.train_rows, plan.batches, **epoch), None
    if job.held_out is not None:
        few = Batches((min(plan.batch_size, 8) if plan.batches.unit == "rows" else 8) * world)
        trainer.held_out_rows = rows(job.held_out, few, accumulation=1, shuffle=False)
    pad, layout = job.tokenizer.pad_token_id, "packed" if plan.packed else "padded"
    trainer.row_collator = RowCollator(pad, layout, plan.shares)
    if loss != "sft":
        trainer.row_collator = PairCollator(pad, layout, plan.shares, nll=loss == "orpo")
    if plan.setting.graphs and not params.router_aux_loss:
        many = max(map(len, trainer.rows.rows)) * (1 if loss in ("sft", "kto") else 2)
        trainer.graphs = Graphs(model, forms(trainer.rows.costs(), trainer.rows.lengths, many))
    trainer.step_rows, trainer.trained_tokens = [], 0
    trainer.model_accepts_loss_kwargs = True  # divided by num_items_in_batch, not once more by the accumulation
    if plan.backend == "unsloth":  # its trainers leave the model set for inference, without activation checkpointing
        model.for_training()
    elif plan.packed:
        with trainer.accelerator.autocast():
            check_boundaries(model, plan.shares)
