"""Which test items the training data of this run already held: by the 8-grams that data preparation compares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers.data.decontamination import GRAM, SHARE
from helpers.data.shingles import shingles


def overlap(questions: Sequence[str], training: Sequence[str]) -> np.ndarray:
    """For every question the largest share of its distinct 8-grams that one training text holds: float (questions,), 0 to 1.

    A question of fewer than 8 words is one gram of its own, found only in a training text that is nothing else.
    """
    flat, offsets = shingles(list(training), GRAM, GRAM, symbols=False)
    owner = np.repeat(np.arange(len(training)), np.diff(offsets))
    order = np.argsort(flat, kind="stable")
    flat, owner = flat[order], owner[order]
    mine, ends = shingles(list(questions), GRAM, GRAM, symbols=False)
    found = np.zeros(len(questions))
    for i in range(len(questions)):
        grams = np.unique(mine[ends[i] : ends[i + 1]])
        first, last = np.searchsorted(flat, grams, "left"), np.searchsorted(flat, grams, "right")
        holders = [np.unique(owner[a:b]) for a, b in zip(first, last, strict=True) if b > a]
        if holders:
            found[i] = np.bincount(np.concatenate(holders)).max() / len(grams)
    return found


def check(questions: Sequence[str], parquet: Path, share: float = SHARE) -> tuple[list[bool], dict[str, Any]]:
    """(contaminated or not per question, the record for scores.json without its scores) against a train.parquet of stage 01."""
    import pyarrow.parquet as pq

    texts = []
    for cell in pq.read_table(parquet, columns=["messages"]).column("messages").to_pylist():
        messages = json.loads(cell) if isinstance(cell, str) else cell
        spoken = [m.get("content") or "" for m in messages if m["role"] != "system"]
        texts += [
            "\n".join(spoken),
            *(spoken if len(spoken) > 1 else []),
        ]  # whole messages too: short questions are one gram
    held = overlap(questions, texts) >= share
    return held.tolist(), {
        "n": len(questions),
        "contaminated": int(held.sum()),
        "threshold": share,
        "ngram": GRAM,
        "reference": "train.parquet",
    }
