"""Examples into rows: best-fit packing that leaves the optimizer's batch exactly as asked.

One optimizer step sees exactly `batch_size` examples, in the seeded order of the epoch. Those examples are spread over
`accumulation × world_size` rows of nearly equal token count, none longer than the budget unless one example is. With
the loss divided by the step's trained tokens, any packing, accumulation or number of GPUs gives the same gradient.

Where rows are padded instead of packed (`padded`), a row costs its longest example times their number, and examples of
like length go together.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from helpers.errors import TunebookError

IGNORE = -100  # label that no loss counts


@dataclass(frozen=True)
class Layout:
    """How an epoch is cut: rows a rank works through per optimizer step, and how full they are."""

    accumulation: int
    rows_per_step: int
    steps_per_epoch: int
    max_row_tokens: int
    mean_row_tokens: float

    @property
    def fill(self) -> float:
        """Mean row over longest row, 1.0 when all rows are equal."""
        return self.mean_row_tokens / max(self.max_row_tokens, 1)


def best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: indices of `lengths` in as few rows of at most `budget` tokens as it finds.

    An item longer than the budget gets a row of its own. O(n · budget) at worst through a table of free room.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(budget + 1)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        room = next((r for r in range(min(length, budget + 1), budget + 1) if by_room[r]), None)
        if room is None:
            rows.append([index])
            row, room = len(rows) - 1, max(budget, length)
        else:
            row = by_room[room].pop()
            rows[row].append(index)
        if room - length > 0:
            by_room[room - length].append(row)
    return rows


def padded_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `lengths` in rows that, padded to their longest, hold at most `budget` tokens: neighbours in length together."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if rows and (len(rows[-1]) + 1) * lengths[rows[-1][0]] <= budget:
            rows[-1].append(index)
        else:
            rows.append([index])
    return rows


def cost(lengths: Sequence[int], padded: bool = False) -> int:
    """Tokens that the card works through for one row of examples with these lengths."""
    return max(lengths, default=0) * len(lengths) if padded else sum(lengths)


def spread(lengths: Sequence[int], rows: int, padded: bool = False) -> list[list[int]]:
    """Indices in exactly `rows` rows of nearly equal cost (longest first into the emptiest row; padded: by the least budget)."""
    out: list[list[int]] = [[] for _ in range(rows)]
    if padded:
        low, high = 0, max(lengths, default=0) * len(lengths)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(padded_fit(lengths, middle)) <= rows else (middle + 1, high)
        fitted = padded_fit(lengths, low)
        return [sorted(row) for row in fitted] + out[len(fitted) :]
    load = [0] * rows
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = min(range(rows), key=lambda r: (load[r], len(out[r]), r))
        out[row].append(index)
        load[row] += lengths[index]
    return [sorted(row) for row in out]


def plan_rows(
    lengths: Sequence[int],
    batch_size: int,
    budget: int,
    world_size: int = 1,
    seed: int = 0,
    epochs: int = 1,
    padded: bool = False,
) -> Layout:
    """The smallest accumulation whose rows stay within `budget` tokens in every step of every epoch.

    lengths: tokens of each example. Raises: TunebookError when an example alone exceeds the budget.
    """
    if not len(lengths):
        raise TunebookError("There are no training examples to pack; check the data stage's counts.")
    if max(lengths) > budget:
        raise TunebookError(
            f"The longest example has {max(lengths)} tokens and a row holds {budget}; raise the row budget or lower max_length."
        )
    batches = heaviest(lengths, batch_size, seed, epochs)
    fit = padded_fit if padded else best_fit
    need = max(len(fit([lengths[i] for i in batch], budget)) for batch in batches)
    accumulation = math.ceil(need / world_size)
    loads = [
        cost([lengths[i] for i in row], padded)
        for batch in batches
        for row in _rows_of(batch, lengths, accumulation * world_size, budget, padded)
    ]
    return Layout(
        accumulation,
        accumulation * world_size,
        math.ceil(len(lengths) / batch_size),
        max(loads),
        sum(loads) / len(loads),
    )


def heaviest(lengths: Sequence[int], batch_size: int, seed: int, epochs: int = 1, count: int = 24) -> list[list[int]]:
    """The optimizer steps with the most tokens in these epochs: what a row budget has to hold."""
    batches = [
        b for epoch in range(max(1, min(epochs, 50))) for b in epoch_batches(len(lengths), batch_size, seed, epoch)
    ]
    return sorted(batches, key=lambda b: -sum(lengths[i] for i in b))[:count]


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
    """The epoch's examples in order, cut into optimizer steps. A function of its arguments alone, so resume repeats it."""
    order = list(range(count))
    if shuffle:
        random.Random(f"{seed}/{epoch}").shuffle(order)
    return [order[i : i + batch_size] for i in range(0, count, batch_size)]


def _rows_of(
    batch: list[int], lengths: Sequence[int], rows: int, budget: int | None = None, padded: bool = False
) -> list[list[int]]:
    """The batch in exactly `rows` rows: evenly, or best fit where even rows would break the budget."""
    local = [lengths[i] for i in batch]
    out = spread(local, rows, padded)
    if budget and not padded and max(sum(local[i] for i in row) for row in out) > budget:
        fitted = best_fit(local, budget)
        if len(fitted) <= rows:
            out = fitted + [[] for _ in range(rows - len(fitted))]
    return [[batch[i] for i in row] for row in out]


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
            for row in _rows_of(batch, self.lengths, self.rows_per_step, self.budget, self.padded)
        ]

    def costs(self) -> list[int]:
        """Tokens that the card works through for each row."""
        return [cost([self.lengths[i] for i in row], self.padded) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[dict]:
        many = getattr(self.examples, "__getitems__", None)  # a dataset reads many rows at once several times as fast
        return many(self.rows[index]) if many and self.rows[index] else [self.examples[i] for i in self.rows[index]]


def example_labels(example: dict) -> list[int]:
    """Labels of one example: its `labels`, or its ids where `completion_mask` is 1, or all of its ids."""
    if example.get("labels") is not None:
        return list(example["labels"])
    ids = example["input_ids"]
    if example.get("completion_mask") is not None:
        return [i if m else IGNORE for i, m in zip(ids, example["completion_mask"], strict=True)]
    return list(ids)


def row_tensors(documents: Sequence[dict]) -> dict:
    """One packed row of `documents` (dicts with input_ids and labels or completion_mask).

    Returns input_ids, labels, position_ids (1, tokens), cu_seq_lens_q and _k (documents + 1) int32, max_length_q and
    _k, document_lengths. Positions restart and each document's first label is ignored: nothing predicts it.
    """
    import numpy
    import torch

    lengths = [len(d["input_ids"]) for d in documents]
    ids = [i for d in documents for i in d["input_ids"]]
    labels = [x for d in documents for x in [IGNORE, *example_labels(d)[1:]]]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.from_numpy(numpy.array([ids])),  # a fifth of torch.tensor's time
        "labels": torch.from_numpy(numpy.array([labels])),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "document_lengths": tuple(lengths),
    }


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
