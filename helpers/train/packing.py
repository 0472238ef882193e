"""Rows of examples as the trainer reads them: the epoch's rows, and the collators that make tensors of them.

`helpers.planner.row_plan` decides which examples share a row, `helpers.model.packed_attention` how a row is laid out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from helpers.model.packed_attention import IGNORE, example_labels, loss_positions, row_tensors
from helpers.model.prefix_sharing import MIN_PREFIX, shareable, shared_tensors
from helpers.planner.row_plan import batch_rows, cost, epoch_batches


class PackedRows:
    """A map-style dataset whose items are rows: lists of examples that belong together.

    examples: a sequence of dicts, or a Hugging Face dataset, with `input_ids`; give `lengths` to avoid reading it all.
    padded: rows will be padded to their longest example, so `budget` and the evenness of rows count padding too.
    len() is `rows_per_step × steps`; reading it in order (a sequential sampler) with one row a batch and
    `gradient_accumulation_steps = accumulation` makes each optimizer step exactly `batch_size` examples, also when
    accelerate deals rows out to `world_size` ranks. A step's last rows may be empty when it has fewer examples than
    rows: they come as one token that no loss counts. `set_epoch` reshuffles.
    """

    def __init__(
        self,
        examples,
        *,
        batch_size: int,
        accumulation: int,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        lengths: Sequence[int] | None = None,
        budget: int | None = None,
        padded: bool = False,
    ):
        self.examples = examples
        self.lengths = list(lengths) if lengths is not None else [len(e["input_ids"]) for e in examples]
        self.batch_size, self.rows_per_step = batch_size, accumulation * world_size
        self.seed, self.shuffle, self.budget, self.padded = seed, shuffle, budget, padded
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Cut the rows of this epoch; accelerate's data loader calls it."""
        batches = epoch_batches(len(self.lengths), self.batch_size, self.seed, epoch, self.shuffle)
        self.rows = [
            row
            for batch in batches
            for row in batch_rows(batch, self.lengths, self.rows_per_step, self.budget, self.padded)
        ]

    def costs(self) -> list[int]:
        """Tokens that the card works through for each row."""
        return [cost([self.lengths[i] for i in row], self.padded) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[dict]:
        many = getattr(self.examples, "__getitems__", None)  # a dataset reads many rows at once several times as fast
        return many(self.rows[index]) if many and self.rows[index] else [self.examples[i] for i in self.rows[index]]


def padded_tensors(documents: Sequence[dict], pad_token_id: int) -> dict:
    """The same documents one a row, padded on the right: input_ids, labels, attention_mask (documents, longest)."""
    import torch

    longest = max(len(d["input_ids"]) for d in documents)
    out = {"input_ids": [], "labels": [], "attention_mask": []}
    for d in documents:
        pad = longest - len(d["input_ids"])
        out["input_ids"].append([*d["input_ids"], *[pad_token_id] * pad])
        out["labels"].append([IGNORE, *example_labels(d)[1:], *[IGNORE] * pad])
        out["attention_mask"].append([1] * (longest - pad) + [0] * pad)
    return {k: torch.tensor(v) for k, v in out.items()}


@dataclass
class PackedCollator:
    """Rows of `PackedRows` (or plain examples) into one batch.

    layout "packed": one row of all documents, boundaries kept by helpers.model.packed_attention. layout "padded": a row per
    document and an attention mask, for models whose attention cannot be packed and for Unsloth's own kernels.
    """

    pad_token_id: int
    layout: str = "packed"

    def __call__(self, rows: Sequence) -> dict:
        documents = [d for row in rows for d in (row if isinstance(row, list) else [row])]
        if not documents:
            documents = [{"input_ids": [self.pad_token_id], "labels": [IGNORE]}]
        return row_tensors(documents) if self.layout == "packed" else padded_tensors(documents, self.pad_token_id)


@dataclass
class PairCollator:
    """Preference pairs into one batch of 2n documents: chosen of every pair, then rejected of every pair.

    Each pair has `prompt_ids`, `chosen_ids`, `rejected_ids`. Labels cover completions; with `prompt_labels=True` the
    prompt too (ORPO's NLL counts prompt and chosen). Adds `completion_mask` (same shape as labels) and `pair_count`.
    """

    pad_token_id: int
    layout: str = "packed"
    prompt_labels: bool = True

    def __call__(self, rows: Sequence) -> dict:
        import torch

        pairs = [p for row in rows for p in (row if isinstance(row, list) else [row])]
        documents, masks = [], []
        for side in ("chosen_ids", "rejected_ids"):
            for pair in pairs:
                prompt, completion = list(pair["prompt_ids"]), list(pair[side])
                labels = prompt if self.prompt_labels else [IGNORE] * len(prompt)
                documents.append({"input_ids": prompt + completion, "labels": labels + completion})
                masks.append([0] * len(prompt) + [1] * len(completion))
        if not documents:
            documents, masks = [{"input_ids": [self.pad_token_id], "labels": [IGNORE]}] * 2, [[0], [0]]
        if self.layout == "packed":
            batch = row_tensors(documents)
            batch["completion_mask"] = torch.tensor([[m for mask in masks for m in mask]])
        else:
            batch = padded_tensors(documents, self.pad_token_id)
            width = batch["input_ids"].shape[1]
            batch["completion_mask"] = torch.tensor([m + [0] * (width - len(m)) for m in masks])
        batch["pair_count"] = len(pairs)
        return batch


@dataclass
class SharedCollator:
    """Rows of `PackedRows` into one batch, common prefixes once. Adds `loss_positions` and `row_ids`."""

    pad_token_id: int
    layout: str = "packed"
    share: bool = True

    def __call__(self, rows: Sequence) -> dict:
        documents = [d for row in rows for d in (row if isinstance(row, list) else [row])]
        plain = [{"input_ids": list(d["input_ids"]), "labels": example_labels(d)} for d in documents]
        prefix = shareable(plain) if self.share and self.layout == "packed" else 0
        batch = shared_tensors(plain, prefix) if prefix else PackedCollator(self.pad_token_id, self.layout)(plain)
        batch["loss_positions"] = loss_positions(batch["labels"])
        batch["row_ids"] = [str(d.get("id", "")) for d in documents]
        batch["tokens"] = sum(len(d["input_ids"]) for d in documents)
        return batch


@dataclass
class SharedPairCollator:
    """Preference pairs into one batch of 2n documents, all chosen and then all rejected, common prefixes once.

    Keys as in `PairCollator`, and `row_ids`. The labels of chosen documents cover the prompt too (ORPO's NLL).
    """

    pad_token_id: int
    layout: str = "packed"
    share: bool = True

    def __call__(self, rows: Sequence) -> dict:
        import torch

        pairs = [p for row in rows for p in (row if isinstance(row, list) else [row])]
        documents = [
            {"input_ids": [*p["prompt_ids"], *p["chosen_ids"]], "labels": [*p["prompt_ids"], *p["chosen_ids"]]}
            for p in pairs
        ]
        documents += [
            {
                "input_ids": [*p["prompt_ids"], *p["rejected_ids"]],
                "labels": [IGNORE] * len(p["prompt_ids"]) + list(p["rejected_ids"]),
            }
            for p in pairs
        ]
        prefix = shareable(documents, trained_prefix=True) if self.share and self.layout == "packed" and pairs else 0
        if prefix:  # a completion is never part of the prefix, whatever two answers have in common
            prefix = max(0, min(prefix, min(len(p["prompt_ids"]) for p in pairs) - 1))
        if prefix >= MIN_PREFIX:
            batch = shared_tensors(documents, prefix)
            masks = [[0] * prefix]
            for side in ("chosen_ids", "rejected_ids"):
                masks += [[0] * (len(p["prompt_ids"]) - prefix) + [1] * len(p[side]) for p in pairs]
            batch["completion_mask"] = torch.tensor([[m for mask in masks for m in mask]])
            batch["pair_count"] = len(pairs)
        else:
            batch = PairCollator(self.pad_token_id, self.layout)(pairs)
        batch["loss_positions"] = loss_positions(batch["labels"])
        batch["nll_tokens"] = sum(len(p["prompt_ids"]) + len(p["chosen_ids"]) - 1 for p in pairs)
        batch["row_ids"] = [str(p.get("id", "")) for p in pairs]
        batch["tokens"] = sum(len(d["input_ids"]) for d in documents)
        return batch


def drop_overlong(pairs: Sequence[dict], max_length: int) -> tuple[list[int], list[tuple[int, str]]]:
    """Indices of the pairs that can be trained on, and (index, reason) of each one that cannot.

    A prompt that leaves no room for a completion has a mean log-probability of 0/0, which turns the loss to NaN.
    """
    kept, dropped = [], []
    for index, pair in enumerate(pairs):
        prompt, chosen, rejected = (len(pair[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids"))
        longest = prompt + max(chosen, rejected)
        if not chosen or not rejected:
            dropped.append((index, f"{'chosen' if not chosen else 'rejected'} is empty"))
        elif longest > max_length:
            dropped.append((index, f"{longest} tokens, over max_length {max_length}"))
        else:
            kept.append(index)
    return kept, dropped
