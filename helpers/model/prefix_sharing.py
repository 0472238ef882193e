"""Rows with a common beginning put into one row that holds the beginning once (attention: `helpers.model.prefix`).

The same batch keys as `helpers.train.packing`, so the losses do not know the difference. Where sharing saves little,
the packed row of `batching` is used instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from helpers.train import packing
from helpers.train.packing import IGNORE

LEAST = 16  # a common beginning shorter than this is not worth a row of its own shape


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all sequences have in common."""
    low, high = min(sequences), max(sequences)  # the two that differ first, in dictionary order
    for index, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return index
    return min(len(low), len(high))


def shared_tensors(documents: Sequence[dict], prefix: int) -> dict:
    """One row of `prefix` common tokens and the rest of every document.

    Documents are dicts with input_ids and labels; labels[t] is trained unless -100. Every rest keeps the last common
    token as its first, so that what follows it is predicted inside the rest; labels of the beginning are taken from the
    first document and must be the same in all. Returns what `batching.row_tensors` does, and prefix_length, rest_index,
    rest_mask; document_lengths[0] is the beginning.
    """
    import torch

    rests = [d["input_ids"][prefix:] for d in documents]
    lengths = [len(r) for r in rests]
    longest, total = max(lengths), prefix + sum(lengths)
    ids = [*documents[0]["input_ids"][:prefix], *(i for r in rests for i in r)]
    labels = [IGNORE, *documents[0]["labels"][1:prefix]]
    for number, document in enumerate(documents):
        rest = list(document["labels"][prefix:])
        if number:
            rest[0] = IGNORE  # the first document's rest carries the target of the beginning's last token
        labels += rest
    position = torch.cat([torch.arange(prefix), *(torch.arange(prefix, prefix + n) for n in lengths)])
    index = torch.zeros(len(rests), longest, dtype=torch.long)
    mask = torch.zeros(len(rests), 1, longest, prefix + longest, dtype=torch.bool)
    mask[..., :prefix] = True
    mask[:, :, :, prefix:] = torch.ones(longest, longest, dtype=torch.bool).tril()
    start = prefix
    for number, n in enumerate(lengths):
        index[number, :n] = torch.arange(start, start + n)
        start += n
    assert start == total == len(ids) == len(labels), (start, total, len(ids), len(labels))
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": position[None],
        "document_lengths": (prefix, *lengths),
        "prefix_length": prefix,
        "rest_index": index,
        "rest_mask": mask,
    }


def shareable(documents: Sequence[dict], trained_prefix: bool = False) -> int:
    """Length of the beginning worth sharing: common to all and, unless `trained_prefix`, before anything is trained.

    One token short of what is common, since every rest repeats the last common token.
    """
    if len(documents) < 2:
        return 0
    common = common_length([d["input_ids"] for d in documents]) - 1
    if not trained_prefix:
        for d in documents:
            trained = next((t for t, label in enumerate(d["labels"]) if label != IGNORE and t > 0), len(d["labels"]))
            common = min(common, trained - 1)
    return common if common >= LEAST else 0


@dataclass
class SharedCollator:
    """Rows of `batching.PackedRows` into one batch, common beginnings once. Adds `loss_positions` and `row_ids`."""

    pad_token_id: int
    layout: str = "packed"
    share: bool = True

    def __call__(self, rows: Sequence) -> dict:
        documents = [d for row in rows for d in (row if isinstance(row, list) else [row])]
        plain = [{"input_ids": list(d["input_ids"]), "labels": packing.example_labels(d)} for d in documents]
        prefix = shareable(plain) if self.share and self.layout == "packed" else 0
        batch = (
            shared_tensors(plain, prefix) if prefix else packing.PackedCollator(self.pad_token_id, self.layout)(plain)
        )
        batch["loss_positions"] = predicting(batch["labels"])
        batch["row_ids"] = [str(d.get("id", "")) for d in documents]
        batch["tokens"] = sum(len(d["input_ids"]) for d in documents)
        return batch


@dataclass
class SharedPairCollator:
    """Preference pairs into one batch of 2n documents, all chosen and then all rejected, common beginnings once.

    Keys as in `batching.PairCollator`, and `row_ids`. The labels of chosen documents cover the prompt too (ORPO's NLL).
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
        if prefix:  # a completion is never part of the beginning, whatever two answers have in common
            prefix = max(0, min(prefix, min(len(p["prompt_ids"]) for p in pairs) - 1))
        if prefix >= LEAST:
            batch = shared_tensors(documents, prefix)
            masks = [[0] * prefix]
            for side in ("chosen_ids", "rejected_ids"):
                masks += [[0] * (len(p["prompt_ids"]) - prefix) + [1] * len(p[side]) for p in pairs]
            batch["completion_mask"] = torch.tensor([[m for mask in masks for m in mask]])
            batch["pair_count"] = len(pairs)
        else:
            batch = packing.PairCollator(self.pad_token_id, self.layout)(pairs)
        batch["loss_positions"] = predicting(batch["labels"])
        batch["nll_tokens"] = sum(len(p["prompt_ids"]) + len(p["chosen_ids"]) - 1 for p in pairs)
        batch["row_ids"] = [str(p.get("id", "")) for p in pairs]
        batch["tokens"] = sum(len(d["input_ids"]) for d in documents)
        return batch


def predicting(labels):
    """Flat indices of the positions whose next label is trained: the only ones that the head has to look at."""
    from helpers.model.chunked_loss import shifted

    return (shifted(labels).reshape(-1) != IGNORE).nonzero().reshape(-1)
