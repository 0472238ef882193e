"""Training rows that hold an evaluation question: found by 8-grams of tokens, questions and answers looked at apart.

An evaluation item is the text that its user asks (the whole text of a plain-text row). A training row is contaminated
when its question, or its answer, holds at least `share` of the distinct 8-grams of one item, wherever line breaks fall
and whatever the case and punctuation; a gram is 8 characters where a script has no spaces. A gram counts for the less
the more questions it stands in, and for nothing when they are many: a shared instruction or schema asks no question.
Shorter items are compared whole, message by message; so are items without a gram of their own. System prompts and
tools are left out. Grams run across paragraphs: those that end with one find nothing of a question that was wrapped
anew (recall 0.87 → 0.00).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers.data.shingles import many, shingles, text_hash
from helpers.data.tables import StepReport, Table, open_parquet
from helpers.data.turns import BATCH_ROWS, Row, all_messages, batches

GRAM = 8
SHARE = 0.5
COPIES = 3  # of a question that may stand in the training rows, each edited otherwise, before they weaken its grams
SAMPLE = 10_000  # rows whose questions say how many share a gram
ASKS = ("user", "tool", "text")


def decontaminate(
    rows: Iterable[list[Row]],
    report: StepReport,
    evaluation: Iterable[list[Row]],
    share: float = SHARE,
    beside: Table | None = None,
) -> Iterator[list[Row]]:
    """Drop training rows that hold an item of `evaluation`; the reason names the item.

    share: of the weight of an item's distinct 8-grams that a row must hold, over 0 to 1. beside: the rows that say in
    how many questions a gram stands; None: `rows` themselves.
    """
    if beside is None:
        rows = beside = rows if isinstance(rows, Table) else Table.collect(rows)
    items = Items(evaluation, share, itertools.islice(beside.rows(), 0, None, -(-len(beside) // SAMPLE) or 1))
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
    """The evaluation questions as a sparse matrix, items by weighted 8-grams. short: items of at most 8 tokens.

    training: rows that the questions may stand in, all or a sample; a gram that stands in `n` different questions of
    both weighs 1 / (n - COPIES)² from there on, and nothing where `shingles.many` says that they are many. An item
    whose rarest gram stands in `m` of them has copies there, each edited otherwise: from n = 2 m on.
    """

    def __init__(self, evaluation: Iterable[list[Row]], share: float = SHARE, training: Iterable[Row] = ()) -> None:
        import pandas as pd

        self.names, texts = list[str](), list[str]()
        for row in itertools.chain.from_iterable(evaluation):
            texts.append("\n".join(_said(row, "user", "text")))
            self.names.append(f"{row['file']} row {row['row']}: {texts[-1][:100]}")
        flat, offsets = shingles(texts, GRAM, GRAM, symbols=False)
        sizes = np.diff(offsets)
        self.short = int((sizes < 2).sum())
        columns, grams = pd.factorize(flat)
        self._columns = pd.Index(grams)
        self._many: np.ndarray = np.zeros(len(grams), bool)
        held = self._matrix(np.repeat(np.arange(len(texts)), sizes), columns, len(texts)).astype(float)
        seen = {text_hash(text): place for place, text in enumerate(texts)}
        counts = held[list(seen.values())].sum(axis=0)
        for batch in batches(training):
            asked = {text_hash("\n".join(said)): said for row in batch if (said := _said(row, *ASKS))}
            new = [said for name, said in asked.items() if name not in seen]
            seen.update(dict.fromkeys(asked, -1))
            counts += self._found(*_parts(enumerate(new)), len(new)).sum(axis=0)
        self._many = many(counts, len(seen))
        owners: np.ndarray = np.repeat(np.arange(len(texts)), np.diff(held.indptr))
        often = counts[held.indices]
        rarest: np.ndarray = np.full(len(texts), np.inf)
        np.minimum.at(rarest, owners, often)
        bare = many(rarest, len(seen))  # nothing of its own: it has to be there whole
        spread = np.maximum(COPIES, 2 * rarest)[owners]  # edited otherwise each, some copies lack any gram
        weights = np.where(many(often - 2 * rarest[owners] + 2, len(seen)), 0, np.maximum(1, often - spread) ** -2.0)
        held.data = np.where(bare[owners], 1, weights)
        held.eliminate_zeros()
        self._held, self._needed = held, np.where(bare, 1, share) * held.sum(axis=1) - 1e-9

    def _matrix(self, rows: np.ndarray, columns: np.ndarray, size: int) -> Any:
        """Which grams stand in which rows, 1 or 0, int32 (size, grams)."""
        from scipy.sparse import csr_array

        matrix = csr_array((np.ones(len(rows), np.int32), (rows, columns)), (size, len(self._columns)))
        matrix.data[:] = 1
        return matrix

    def _found(self, texts: list[str], owners: Sequence[int], alone: list[bool], size: int) -> Any:
        """Which of the items' grams stand in the texts of which owner, as `_matrix` gives them.

        alone: one message of several; a short item that many rows hold (a greeting) is none there."""
        flat, offsets = shingles(texts, GRAM, GRAM, symbols=False)
        columns, sizes = self._columns.get_indexer(flat), np.diff(offsets)
        known = columns >= 0
        if self._many.any():
            known &= ~(np.repeat(alone, sizes) & self._many[columns])
        return self._matrix(np.repeat(owners, sizes)[known], columns[known], size)

    def holds(self, batch: list[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Every pair of a row and an item that it holds: their places, int (pairs,) each."""
        said = (
            (place, part) for place, row in enumerate(batch) for part in (_said(row, *ASKS), _said(row, "assistant"))
        )
        texts, owners, alone = _parts(said, self.short > 0)
        shared = (self._found(texts, range(len(texts)), alone, len(texts)) @ self._held.T).tocoo()
        enough = shared.data >= self._needed[shared.col]
        return np.asarray(owners)[shared.row[enough]], shared.col[enough]


def _said(row: Row, *roles: str) -> list[str]:
    return [message.get("content") or "" for message in all_messages(row) if message["role"] in roles]


def _parts(groups: Iterable[tuple[int, list[str]]], singly: bool = True) -> tuple[list[str], list[int], list[bool]]:
    """(texts, the owner of each, whether it is one message of several) of groups of messages with their owner: each
    group as one text and, where there are several and `singly`, each message."""
    texts, owners, alone = list[str](), list[int](), list[bool]()
    for owner, said in groups:
        more = said if singly and len(said) > 1 else []
        texts += ["\n".join(said), *more]
        owners += [owner] * (1 + len(more))
        alone += [False] + [True] * len(more)
    return texts, owners, alone


def held(questions: list[list[dict]], training: Path, share: float = SHARE) -> list[bool]:
    """Whether some row of a train.parquet of stage 01 holds each question (its messages)."""

    def rows() -> Iterator[list[Row]]:
        with open_parquet(training) as file:
            for batch in file.iter_batches(columns=["messages"], batch_size=BATCH_ROWS):
                cells = batch.column("messages").to_pylist()
                yield [{"messages": json.loads(cell) if isinstance(cell, str) else cell} for cell in cells]

    asked: list[Row] = [{"messages": messages, "file": "test", "row": i} for i, messages in enumerate(questions)]
    items = Items([asked], share, itertools.islice(itertools.chain.from_iterable(rows()), SAMPLE))
    found: np.ndarray = np.zeros(len(questions), bool)
    for batch in rows():
        found[items.holds(batch)[1]] = True
    return found.tolist()
