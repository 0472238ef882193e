"""Training rows that hold an evaluation question: found by 8-grams of tokens, over the whole example.

An evaluation item is the text that its user asks (the whole text of a plain-text row). A training row is contaminated
when it holds at least `share` of the distinct 8-grams of one item, wherever line breaks fall and whatever the case and
punctuation; a gram is 8 characters where a script has no spaces. Shorter items are compared whole, message by message.
System prompts and tools are left out: every row of a job may share them. Grams run across paragraphs: those that end
with one find nothing of a question that was wrapped anew (recall 0.87 → 0.00).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from helpers.data.shingles import shingles
from helpers.data.tables import StepReport
from helpers.data.turns import Row, spoken

GRAM = 8
SHARE = 0.5


def decontaminate(
    rows: Iterable[list[Row]], report: StepReport, evaluation: Iterable[list[Row]], share: float = SHARE
) -> Iterator[list[Row]]:
    """Drop training rows that hold an item of `evaluation`; the reason names the item.

    share: of an item's distinct 8-grams that a row must hold, over 0 to 1.
    """
    items = Items(evaluation, share)
    report.figures |= {"items": len(items.names), "items_too_short": items.short, "share": share, "items_found": 0}
    touched: set[int] = set()

    def judge(batch: list[Row]) -> Iterator[tuple[str, str] | None]:
        places, found = items.holds(batch)
        item_of = dict(zip(places.tolist(), found.tolist(), strict=True))
        touched.update(item_of.values())
        report.figures["items_found"] = len(touched)
        for place in range(len(batch)):
            yield ("holds an evaluation question", items.names[item_of[place]]) if place in item_of else None

    return report.sift(rows, judge)


class Items:
    """The evaluation questions as a sparse matrix, items by 8-grams. short: items of at most 8 tokens."""

    def __init__(self, evaluation: Iterable[list[Row]], share: float = SHARE) -> None:
        import pandas as pd

        self.names, texts = list[str](), list[str]()
        for row in itertools.chain.from_iterable(evaluation):
            texts.append("\n".join(m.get("content") or "" for m in row["messages"] if m["role"] in ("user", "text")))
            self.names.append(f"{row['file']} row {row['row']}: {texts[-1][:100]}")
        flat, offsets = shingles(texts, GRAM, GRAM, symbols=False)
        sizes = np.diff(offsets)
        self.short = int((sizes < 2).sum())
        columns, grams = pd.factorize(flat)
        self._columns = pd.Index(grams)
        self._held = self._matrix(np.repeat(np.arange(len(texts)), sizes), columns, len(texts))
        self._needed = np.maximum(1, np.ceil(share * np.diff(self._held.indptr) - 1e-9))

    def _matrix(self, rows: np.ndarray, columns: np.ndarray, size: int) -> Any:
        """Which grams stand in which rows, 1 or 0, int32 (size, grams)."""
        from scipy.sparse import csr_array

        matrix = csr_array((np.ones(len(rows), np.int32), (rows, columns)), (size, len(self._columns)))
        matrix.data[:] = 1
        return matrix

    def holds(self, batch: list[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Every pair of a row and an item that it holds: their places, int (pairs,) each."""
        texts, owners = [], []
        for place, row in enumerate(batch):
            messages = spoken(row)
            parts = ["\n".join(messages), *(messages if self.short and len(messages) > 1 else [])]
            texts += parts
            owners += [place] * len(parts)
        flat, offsets = shingles(texts, GRAM, GRAM, symbols=False)
        columns = self._columns.get_indexer(flat)
        known = columns >= 0
        rows: np.ndarray = np.repeat(owners, np.diff(offsets))
        shared = (self._matrix(rows[known], columns[known], len(batch)) @ self._held.T).tocoo()
        enough = shared.data >= self._needed[shared.col]
        return shared.row[enough], shared.col[enough]


def held(questions: list[list[dict]], training: Path, share: float = SHARE) -> list[bool]:
    """Whether some row of a train.parquet of stage 01 holds each question (its messages)."""
    import pyarrow.parquet as pq

    rows: list[Row] = [{"messages": messages, "file": "test", "row": i} for i, messages in enumerate(questions)]
    items = Items([rows], share)
    found: np.ndarray = np.zeros(len(questions), bool)
    for batch in pq.ParquetFile(training).iter_batches(columns=["messages"]):
        cells = batch.column("messages").to_pylist()
        found[items.holds([{"messages": json.loads(c) if isinstance(c, str) else c} for c in cells])[1]] = True
    return found.tolist()
